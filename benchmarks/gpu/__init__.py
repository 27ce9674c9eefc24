"""One command for a machine with one or more GPUs: what works there, how fast, and what was skipped.

    make gpu                                  # in .venv, which it makes complete first
    make gpu PYTHON=python3                   # with an interpreter that has torch, lightning and transformers, as it is
    python -m benchmarks.gpu --help

Each file of ``sections`` is one part of the table. It runs in a process of its own, so that a crash or a hang is a row
of the table, not its end. On a machine without a GPU the same command runs on the CPU, with a tiny model.
"""
