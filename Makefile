# Each target does its own set-up: a virtual environment in .venv with the package and what it needs.
# make bench            text from a real model, the check against the reference, the throughput table
# make test             the whole test suite
# make test-fast        the edit-test loop: what takes more than a few seconds is left out
# make lint             ruff and mypy
# make mutate           break the kernels on purpose; the tests must notice
# make manifest         compile every kernel for every target, with no GPU; kernels/manifest.json
# make gpu-check        is the triton backend right and fast on this machine's GPU? PART=conformance|invariance|bench
# ARGS="..." adds options: make bench ARGS="--preset gpt2 --prompt-len 448"

PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
ARGS ?=

.PHONY: bench test test-fast lint clean mutate manifest gpu-check

bench: .venv/.installed
	$(BIN)/python -m engine.bench $(ARGS)

test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-fast: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutate: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutate.py $(ARGS)

manifest: .venv/.installed
	$(BIN)/python -m kernels.compile --output kernels/manifest.json $(ARGS)

gpu-check:
	$(PYTHON) tests/gpu_check.py $(ARGS)

.venv/.installed: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,lint]"
	@touch $@

clean:
	rm -rf .venv build *.egg-info
