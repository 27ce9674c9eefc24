# Every target first makes .venv complete, which takes no time when it is. ARGS goes to the command that is run:
#   make test ARGS="-k ledger"
.DEFAULT_GOAL := help
# two at a time, a file of tests in one process: many wait for processes to start
PARALLEL := -n 2 --dist loadfile
MODEL := runs/models/SmolLM2-135M-Instruct
CONFIG := examples/synchronous.yaml
BENCHMARKS := $(filter-out __init__,$(basename $(notdir $(wildcard benchmarks/*.py))))
.PHONY: help install model demo train test test-quick chaos bench check format clean

help:
	@echo "make demo        train a small model with reinforcement, here and now (installs what it needs into .venv)"
	@echo "make train       the same job from a config: CONFIG=examples/fully_asynchronous.yaml"
	@echo "make test        all tests"
	@echo "make test-quick  the tests that need no vLLM and kill nothing at random"
	@echo "make chaos       the tests that kill processes, with CHAOS=5 times as many kills"
	@echo "make bench       all benchmarks, for about three hours; BENCHMARKS='overhead rollout' chooses"
	@echo "make check       lint, formatting, types and the examples in docstrings"
	@echo "make format      rewrite the code in the project's style"
	@echo "make install     only make .venv complete; PYTHON=python3.12 chooses the interpreter"
	@echo "make model       only make the demo's model, runs/models/SmolLM2-135M-Instruct"
	@echo "make clean       remove .venv and what tools left behind"

install:
	@.ci/install

demo: install
	.venv/bin/python examples/demo.py $(ARGS)

model: install $(MODEL)/model.safetensors

$(MODEL)/model.safetensors: | install
	.venv/bin/python examples/convert_smollm2.py $(MODEL)

train: model
	.venv/bin/python -m lightning_rft fit --config $(CONFIG) $(ARGS)

test: install
	.venv/bin/python -m pytest $(PARALLEL) $(ARGS)

test-quick: install
	.venv/bin/python -m pytest $(PARALLEL) -m "not vllm and not chaos and not exhaustive" $(ARGS)

# CHAOS multiplies kills and lengths; the tests of these names run with 1 in `make test`
CHAOS ?= 5
chaos: install
	CHAOS=$(CHAOS) .venv/bin/python -m pytest -m chaos $(ARGS)

# One after another, and with nothing else running: they measure times.
bench: model
	.venv/bin/python -m pip install --quiet --editable ".[bench]"
	@set -e; for name in $(BENCHMARKS); do echo "=== $$name"; .venv/bin/python -m benchmarks.$$name $(ARGS); done

check: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy lightning_rft
	.venv/bin/python -m pytest --doctest-modules lightning_rft --ignore=lightning_rft/explorer/engines/vllm_weights.py $(ARGS)

format: install
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
