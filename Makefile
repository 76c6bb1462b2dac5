# Each target works in a fresh clone with nothing but Python 3.11+ and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
CORE := $(VENV)/.installed-core
FULL := $(VENV)/.installed-full

DEMO_METHODS := single_task,equal,excess_mtl:warmup=180,aligned_mtl,imtl_g,imtl_l,imtl,independent,individual

.DEFAULT_GOAL := help
# All targets share one environment and one build folder: never two recipes at once.
.NOTPARALLEL:
.PHONY: help demo test faults book lab lint format clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(CORE)  ## compare methods on images of two digits (CPU), print and draw the table
	$(BIN)/mtl-tutorial run multidigits --methods $(DEMO_METHODS) --seeds 3 --budget quick --device cpu --out results/demo
	$(BIN)/mtl-tutorial plot results/demo

# tests/book reads the built pages, so it belongs to `make book`, right after they are built.
test: $(FULL)  ## run the tests, then execute every chapter and compare its checked outputs
	$(PYTEST) tests --ignore tests/book -n 2
	$(PYTEST) --nbval-lax --nbval-current-env --nbval-sanitize-with notebooks/nbval_sanitize.cfg --nbval-cell-timeout 300 notebooks

faults: $(FULL)  ## kill, starve and mislead sweeps, counted, in full; writes book/faults.md
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/faults/campaign.py

# From nothing: in an incremental build a page that warned once would pass unseen, and pages of
# modules that are gone would stay.
book: $(FULL)  ## build the book as HTML and check that it needs no network
	rm -rf _build
	$(BIN)/jupyter-book build . --config _config.yml --toc book/_toc.yml --all -W --keep-going -n
	$(PYTEST) tests/book
	@echo "The book: file://$(CURDIR)/_build/html/index.html"

lab: $(FULL)  ## open the chapters in JupyterLab
	$(BIN)/jupyter lab notebooks

lint: $(FULL)  ## check format, lint rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(FULL)  ## apply format and safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the built book and caches (keeps .venv and results)
	rm -rf _build build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find book mtl_tutorial notebooks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Creates the environment when it is missing or was left half made.
define ensure_venv
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  command -v $(PYTHON) >/dev/null || \
	    { echo "expected Python 3.11 or newer, got no '$(PYTHON)'; install it or say make PYTHON=/path/to/python" >&2; exit 1; }; \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "expected Python 3.11 or newer, got $$($(PYTHON) --version 2>&1); say make PYTHON=python3.11" >&2; exit 1; }; \
	  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "expected the venv module, got none; do: apt install python3-venv" >&2; exit 1; }; \
	  echo "Creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
endef

$(CORE): pyproject.toml
	$(ensure_venv)
	@echo "Installing the package and torch into $(VENV): once, a few minutes, about 6 GB on Linux"
	@$(PIP) install -q -e .
	@touch $@

$(FULL): pyproject.toml
	$(ensure_venv)
	@echo "Installing the package, torch, the book's and the tests' tools into $(VENV): once, a few minutes, about 6 GB on Linux"
	@$(PIP) install -q -e '.[book,test,dev]'
	@touch $(CORE) $@
