# make demo   the whole job on synthetic scans: lesion maps, a table and a picture (about 10 minutes)
# make test   the tests; make test-slow adds those that take more than a minute each

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
SEED := 1
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

.PHONY: demo test test-slow lint clean

$(VENV)/installed: setup.py tf_lesion/__init__.py
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[scripts,test]"
	touch $@

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -q

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(DEMO)
