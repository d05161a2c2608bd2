# Each target does all of its own set-up: a virtual environment in .venv, a CPU build of
# PyTorch, this package with its compiled kernels. A second call finds the stamps in .venv
# and starts at once. To begin anew: make clean.

PYTHON ?= python3
# A plain "torch" on Linux brings gigabytes of CUDA libraries, so its CPU index comes first. Where
# that index cannot be reached, this version is taken from the indexes pip is configured with.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
RUN ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What the build reads: a change here means another build.
SOURCES := pyproject.toml $(wildcard setup.py) $(shell find src -name '*.cpp' -o -name '*.h')

.PHONY: help demo test lint types layers contracts unit gpu-test format bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train a small byte-level Mamba for about five minutes and read what it writes"
	@echo "make test    linters, type checker, layers, and all tests"
	@echo "make gpu-test all laws of operations, modules and models once more, on the CUDA device; memcheck"
	@echo "make bench   measure this machine, its GPU if there is one: rows in benchmarks/results,"
	@echo "             tables in README.md, docs/kernels.md and benchmarks/README.md"
	@echo "make format  rewrite the sources in the project's format"
	@echo "make clean   remove the environment, builds and caches (runs/ stays)"

demo: $(VENV)/.package
	$(BIN)/mambakit train recipes/demo.toml --out $(RUN)

# The tests run last, so that their closing line is the last one read.
test: lint types layers contracts unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

layers: $(VENV)/.dev
	$(BIN)/lint-imports --no-logo

# Operations, modules, models and generation once more, with every annotation checked at each call.
# The kernels of other devices are under the same interface, and slow on a processor; so are many
# draws of the modes.
contracts: $(VENV)/.dev
	$(BIN)/python -m pytest tests/ops tests/modules $(CONTRACTS) -q -n logical \
	    -m "not compiles and not refuses" \
	    --ignore tests/ops/scan/test_triton.py --ignore tests/ops/scan/test_triton_compiles.py \
	    -k "not cuda and (not every_mode_is_each_sequence_alone or mixer)" \
	    --jaxtyping-packages="mambakit,$(CHECKER)"

# To beartype an int is a float only if it is told.
CHECKER = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
CONTRACTS = tests/data/test_batches.py \
    $(patsubst %,tests/models/test_%.py,backbone config documents language layouts modes parity state) \
    $(patsubst %,tests/generation/test_%.py,beam chance complete generate history sampling \
        speculative text)

unit: $(VENV)/.dev
	$(BIN)/python -m pytest -n logical

# What needs a GPU runs with the machine's own Python, whose PyTorch is built for its GPU, and which
# has this package with what the tests or the benchmarks need: pip install -e '.[test,bench]'.
GPU_PYTHON ?= $(PYTHON)

gpu-test:
	$(GPU_PYTHON) -m pytest tests/ops tests/modules tests/models tests/generation \
	    tests/training/test_loss.py tests/training/test_gradient.py -n 8 --dist worksteal --device cuda
	@if command -v compute-sanitizer > /dev/null; then \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --report-api-errors no \
	        --error-exitcode 1 $(GPU_PYTHON) -m tests.gpu_memory; \
	else echo "compute-sanitizer is not here: the kernels' memory was not checked"; fi

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A text is not this project's to carry: make bench SHAKESPEARE=FILE measures its row too.
SHAKESPEARE ?=

# Asked for this goal alone, because importing PyTorch takes a while.
ifneq ($(filter bench,$(MAKECMDGOALS)),)
SEES_GPU := $(shell $(GPU_PYTHON) -c \
    'import torch; print(torch.cuda.is_available())' 2> /dev/null)
endif

ifeq ($(SEES_GPU),True)
bench: BENCH_PYTHON = $(GPU_PYTHON)
else
bench: BENCH_PYTHON = $(BIN)/python
bench: $(VENV)/.bench
endif

bench:
	@if [ "$(SEES_GPU)" = True ]; then \
	    echo "The GPU that $(GPU_PYTHON) sees is measured."; \
	    $(GPU_PYTHON) -c 'import mambakit' 2> /dev/null || { \
	        echo "$(GPU_PYTHON) needs this package and what the benchmarks need:" \
	            "$(GPU_PYTHON) -m pip install -e '.[bench]'"; exit 1; }; \
	elif command -v nvidia-smi > /dev/null; then \
	    echo "The processor is measured: $(GPU_PYTHON) has no PyTorch that sees a GPU here;" \
	        "make bench GPU_PYTHON=... names another Python."; \
	fi
	$(BENCH_PYTHON) -m benchmarks $(if $(SHAKESPEARE),--shakespeare "$(SHAKESPEARE)")
	$(BENCH_PYTHON) -m benchmarks.tables

clean:
	rm -rf $(VENV) build dist src/*.egg-info src/mambakit/ops/_cpu_* \
	    .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "mambakit needs Python 3.11 or newer, and $(PYTHON) is not:" \
	         "name one by make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.created
	@reach='import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)'; \
	if [ "$$(uname -s)" != Linux ]; then \
	    echo "PyTorch: $(TORCH) from pip's index"; \
	    $(PIP) install --quiet "$(TORCH)"; \
	elif $(BIN)/python -c "$$reach" "$(TORCH_INDEX)/torch/" 2>/dev/null \
	    || $(BIN)/python -c "$$reach" "$(TORCH_INDEX)/torch/" 2>/dev/null; then \
	    echo "PyTorch: $(TORCH) from its CPU index, $(TORCH_INDEX)"; \
	    $(PIP) install --quiet --index-url "$(TORCH_INDEX)" "$(TORCH)"; \
	else \
	    echo "PyTorch: $(TORCH_INDEX) cannot be reached;" \
	         "$(TORCH) from pip's index instead (on Linux this may bring CUDA libraries)"; \
	    $(PIP) install --quiet "$(TORCH)"; \
	fi
	@touch $@

$(VENV)/.package: $(VENV)/.torch $(SOURCES)
	$(PIP) install --quiet -e '.[plot,tokenizers]'
	@touch $@

# Triton's interpreter runs its kernels without a GPU; GPU builds of PyTorch bring their own.
$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(PIP) install --quiet -e '.[dev]'
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then $(PIP) install --quiet 'triton>=3.7' \
	    || echo "Triton could not be installed: the tests of its form of the scan are skipped"; fi
	@touch $(VENV)/.package $@

$(VENV)/.bench: $(VENV)/.package
	$(PIP) install --quiet -e '.[bench]'
	@touch $@
