# Every task is one command. `make demo` and `make test` do all set-up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Test tensors are tiny: a second thread brings nothing, and spins where a neighbour has its core.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-full check setup clean

demo: $(STAMP)
	$(BIN)/foveal demo

test: $(STAMP)
	$(PYTEST) -m "not slow"

# OUTSIDE=a source tree of flash-attention adds its tests (tests/outside/run.py says how to get one).
test-full: $(STAMP)
	$(BIN)/python tests/full_report.py $(if $(OUTSIDE),--outside $(OUTSIDE))

check: $(STAMP)
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(STAMP)

NATIVE := $(wildcard src/foveal/kernels/cpu/*.cpp src/foveal/kernels/cpu/*.h)

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt src/foveal/kernels/cpu/CMakeLists.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "foveal needs Python 3.11 or newer; found %d.%d. Try: make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
