# Every target first makes .venv complete, which takes no time when it is. ARGS goes to the command that is run:
#   make test ARGS="-k ledger"
# DEPS chooses versions, for any target: tested (those of .ci/tested.txt) or latest, in an environment of its own:
#   make test DEPS=latest
.DEFAULT_GOAL := help
DEPS ?= tested
VENV := $(if $(filter latest,$(DEPS)),.venv-latest,.venv)
export DEPS VENV
# two at a time, a file of tests in one process: many wait for processes to start; tests/conftest.py says in which order
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
MODEL := runs/models/SmolLM2-135M-Instruct
CONFIG := examples/synchronous.yaml
# what makes the pages, in a folder that goes before the packages of $(VENV): it wants another docutils
SPHINX := build/sphinx-$(DEPS)
BENCHMARKS := $(filter-out __init__ beside,$(basename $(notdir $(wildcard benchmarks/*.py))))
.PHONY: help install model demo train test test-quick chaos bench gpu check format docs dist dist-check tested clean

help:
	@echo "make demo        train a small model with reinforcement, here and now (installs what it needs into .venv)"
	@echo "make train       the same job from a config: CONFIG=examples/fully_asynchronous.yaml"
	@echo "make test        all tests"
	@echo "make test-quick  the tests that need no vLLM and kill nothing at random"
	@echo "make chaos       the tests that kill processes, with CHAOS=5 times as many kills"
	@echo "make bench       all benchmarks, for about seven hours; BENCHMARKS='overhead rollout' chooses"
	@echo "make gpu         what works on this machine's GPUs, how fast, and what was skipped; PYTHON=python3 installs nothing"
	@echo "make check       lint, formatting, types and the examples in docstrings"
	@echo "make format      rewrite the code in the project's style"
	@echo "make docs        the pages of docs/ as a site, in build/docs"
	@echo "make install     only make .venv complete; PYTHON=python3.12 chooses the interpreter"
	@echo "make model       only make the demo's model, runs/models/SmolLM2-135M-Instruct"
	@echo "make dist        wheel and sdist, in dist/"
	@echo "make dist-check  the same, then the wheel in an empty environment: every extra, and the README's program"
	@echo "make tested      write .ci/tested.txt, the versions that all of this takes, from today's newest"
	@echo "make clean       remove .venv, .venv-latest and what tools left behind"
	@echo "With DEPS=latest, any of these takes the newest versions of everything instead, in .venv-latest."

install:
	@.ci/install

demo: install
	$(VENV)/bin/python examples/demo.py $(ARGS)

model: install $(MODEL)/model.safetensors

$(MODEL)/model.safetensors: | install
	$(VENV)/bin/python examples/convert_smollm2.py $(MODEL)

train: model
	$(VENV)/bin/python -m lightning_rft fit --config $(CONFIG) $(ARGS)

test: install
	$(VENV)/bin/python -m pytest $(PARALLEL) $(ARGS)

test-quick: install
	$(VENV)/bin/python -m pytest $(PARALLEL) -m "not vllm and not chaos and not exhaustive" $(ARGS)

# CHAOS multiplies kills and lengths; the tests of these names run with 1 in `make test`
CHAOS ?= 5
chaos: install
	CHAOS=$(CHAOS) $(VENV)/bin/python -m pytest -m chaos $(ARGS)

# One after another, and with nothing else running: they measure times.
bench: CONSTRAINT := $(if $(filter tested,$(DEPS)),--constraint .ci/tested.txt)
bench: model
	$(VENV)/bin/python -m pip install --quiet $(CONSTRAINT) --editable ".[bench]"
	@set -e; for name in $(BENCHMARKS); do echo "=== $$name"; $(VENV)/bin/python -m benchmarks.$$name $(ARGS); done

# PYTHON=python3 takes that interpreter as it is, with torch, lightning and transformers, perhaps without a network.
gpu: $(if $(PYTHON),,install)
	$(or $(PYTHON),$(VENV)/bin/python) -m benchmarks.gpu $(ARGS)

check: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy lightning_rft benchmarks
	$(VENV)/bin/python -m pytest --doctest-modules lightning_rft --ignore=lightning_rft/explorer/engines/vllm_weights.py $(ARGS)

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: install $(SPHINX)/complete
	PYTHONPATH=$(SPHINX) $(VENV)/bin/python -m sphinx --fail-on-warning --keep-going --quiet --write-all docs build/docs $(ARGS)
	@echo "Now open build/docs/index.html"

$(SPHINX)/complete: CONSTRAINT := $(if $(filter tested,$(DEPS)),--constraint .ci/docs.txt)
$(SPHINX)/complete: .ci/docs.txt $(VENV)/complete
	rm -rf $(SPHINX)
	$(VENV)/bin/python -m pip install -qq --no-warn-conflicts --target $(SPHINX) $(CONSTRAINT) furo myst-nb
	touch $@

$(VENV)/complete: | install ;

dist: install
	rm -rf dist
	$(VENV)/bin/python -m build --outdir dist
	$(VENV)/bin/twine check --strict dist/*

dist-check: dist
	$(VENV)/bin/python .ci/dist_check.py

# What the benchmarks want belongs to it.
tested:
	@$(MAKE) --no-print-directory install DEPS=latest
	.venv-latest/bin/python -m pip install --quiet --editable ".[bench]"
	.venv-latest/bin/python .ci/tested.py
	@echo "Now: make check test, which installs these versions into .venv; then commit .ci/tested.txt"

clean:
	rm -rf .venv .venv-latest build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
