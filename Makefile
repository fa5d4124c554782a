# Every target makes `.venv` if it is missing and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2

.PHONY: venv demo test check docs bench clean

venv: .venv/.installed

.venv/.installed: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
	  || { echo "diffprog needs Python 3.11 or newer: make PYTHON=python3.12 venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

demo: venv
	$(BIN)/python examples/car_racing.py

test: venv
	$(BIN)/python -m pytest -n $(JOBS) -q

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: venv
	$(BIN)/python benchmarks/control.py

clean:
	rm -rf .venv site out build dist
