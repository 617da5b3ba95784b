# Two commands for a fresh machine: `make demo` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PRODUCT := $(VENV)/.product
STAMP := $(VENV)/.installed
# It measures who waits for whom, so nothing else may run.
ALONE := tests/distributed/test_bubble.py
INSTALL := DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-gpu test-all check format bench docs clean

demo: $(PRODUCT)  # the product alone
	$(BIN)/python -m tests.demo

test: check docs
	$(BIN)/python -m pytest -q -n 2 tests/unit
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile --durations 15 --ignore $(ALONE) tests/distributed tests/faults tests/fuzz
	$(BIN)/python -m pytest -q -m "not slow" $(ALONE)

test-gpu: $(STAMP)  # on one GPU, in minutes
	$(BIN)/python -m pytest -q -m gpu -n 8 --dist loadgroup tests/gpu

test-all: check  # the long proofs too: more than an hour on two cores
	NUM_KILLS=50 NUM_MUTATIONS=5000 $(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(INSTALL) -e '.[bench]'
	$(BIN)/python benchmarks/tokenize.py

docs: $(STAMP)  # the manual as a site, into site/
	$(INSTALL) -e '.[docs]'
	$(BIN)/mkdocs build --strict

$(PRODUCT): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[gguf,plots]'
	touch $(PRODUCT)

$(STAMP): $(PRODUCT)
	$(INSTALL) -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) .cache demo site
