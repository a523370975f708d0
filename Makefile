# make demo   set everything up, generate a clip dense and sparse, show both
# make test   set everything up, run the tests
# make lint   style and types        make bench   the short benchmarks, under ten minutes

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Extra arguments of pip, such as "-c constraints.txt".
PIP_ARGS ?=

# glibc gives large blocks back to the kernel after every use; the page faults cost more than the arithmetic.
TUNED = MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456 \
        MALLOC_ARENA_MAX=2
# A process a core; files stay whole, since what is costly to set up is shared within one.
PARALLEL = -n auto --maxprocesses 8 --dist loadfile

.PHONY: demo test test-slow lint bench clean
.DELETE_ON_ERROR:

$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sparsereel needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_ARGS) -e ".[dev]"
	@touch $@

demo: $(VENV)/ready
	$(TUNED) $(BIN)/python -m sparsereel.demo

test: $(VENV)/ready
	$(TUNED) $(BIN)/python -m pytest -q $(PARALLEL)

test-slow: $(VENV)/ready
	$(TUNED) $(BIN)/python -m pytest -q -m slow

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(TUNED) $(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) out build dist
