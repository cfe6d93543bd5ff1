# Each target does its own set-up: a virtual environment in .venv with the package and what it needs.
# make bench            text from a real model, the check against the reference, the throughput table
# make test             the whole test suite
# make test-fast        the edit-test loop: what takes more than a few seconds is left out
# make lint             ruff and mypy
# make sanitize         the native backend's tests under AddressSanitizer, UBSan and ThreadSanitizer (GCC, Linux)
# make check-platforms  csrc/ compiled for Linux and macOS on arm64 and for Windows; run where there are qemu-aarch64 and wine
# make test-versions    the kernels under the oldest and the newest Triton that setup.py admits
# make mutate           break the kernels on purpose; the tests must notice
# make peers            environments with other engines, for python -m benchmarks.compare
# make manifest         compile what changed of the kernels for every target, with no GPU; kernels/manifest.json
# make gpu-check        is the triton backend right and fast on this machine's GPU? PART=conformance|invariance|bench|peers
# ARGS="..." adds options: make bench ARGS="--preset gpt2 --prompt-len 448"

PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
ARGS ?=
COMMA := ,

.PHONY: bench peers test test-fast lint sanitize check-platforms test-versions mutate manifest gpu-check clean

bench: .venv/.installed
	$(BIN)/python -m engine.bench $(ARGS)

peers: .venv/.installed
	$(BIN)/python -m benchmarks.make_peers $(ARGS)

test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-fast: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The packages of .venv with another Triton before them: nothing else differs, and no other PyTorch can come.
TRITONS := 3.6.0 3.9.0
.venv-triton-%/.installed: | .venv/.installed
	rm -rf $(@D)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) triton==$*
	@touch $@

test-versions: $(TRITONS:%=.venv-triton-%/.installed)
	@set -e; export OMP_NUM_THREADS=1; for version in $(TRITONS); do \
		export PYTHONPATH="$(CURDIR)/.venv-triton-$$version"; \
		$(BIN)/python -c "import triton; assert triton.__version__ == '$$version', triton.__file__"; \
		echo "Triton $$version"; \
		$(BIN)/python -m pytest -q -n $(WORKERS) -m versions $(ARGS); \
	done

mutate: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutate.py --workers $(WORKERS) $(if $(findstring --only,$(ARGS)),,--output kernels/MUTANTS.md) $(ARGS)

manifest: .venv/.installed
	$(BIN)/python -m kernels.compile --output kernels/manifest.json $(ARGS)
	$(BIN)/python -m kernels.manifest

gpu-check:
	$(PYTHON) tests/gpu_check.py $(ARGS)

# Each build is a copy of the package in build/; Python itself is not instrumented, so the runtime is preloaded. Python
# never frees everything: leaks are watched by a test instead. What reads the machine code is left out.
SANITIZED := tests/test_native_step.py tests/test_native_later_steps.py tests/test_native_screen.py tests/test_native_kernels.py tests/test_native_sampling.py tests/test_native_robustness.py
define sanitized
	ENGINE_REQUIRE_NATIVE=1 ENGINE_CXXFLAGS="-fsanitize=$(2) -fno-omit-frame-pointer -g1 -O1" $(BIN)/python setup.py -q build --build-base build/$(1) --build-lib build/$(1)/lib
	LD_PRELOAD="$$(g++ -print-file-name=lib$(3).so) $$(g++ -print-file-name=libstdc++.so)" $(4) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -q -p no:cacheprovider -o pythonpath="build/$(1)/lib tests" -k "not registers and not instruction_set and not memory" $(SANITIZED) $(ARGS)
endef

sanitize: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt pybind11 setuptools
	$(call sanitized,asan,address$(COMMA)undefined,asan,ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1)
	$(call sanitized,tsan,thread,tsan,TSAN_OPTIONS=halt_on_error=1:die_after_fork=0:ignore_noninstrumented_modules=1)

check-platforms: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt pybind11 ziglang
	$(BIN)/python -m pytest -q -rs tests/test_native_platforms.py $(ARGS)

.venv/.installed: setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,lint]"
	@touch $@

clean:
	rm -rf .venv .venv-triton-* build *.egg-info
