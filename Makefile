# Every target makes `.venv` if it is missing and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2

.PHONY: venv demo test test-default test-examples test-selection check docs pages
.PHONY: tutorials bench bench-losses bench-oracles bench-llqr bench-learning bench-training
.PHONY: browser bench-gpu package clean

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

PYTEST = $(BIN)/python -m pytest -n $(JOBS) -q
# Annotations are checked when functions are called, which takes a sixth of the time.
TYPES := --jaxtyping-packages=diffprog,beartype.beartype

test: venv
	$(PYTEST) $(ARGS)

# Everything, also what is slow or costly, compiled as users do, annotations checked.
test-default: venv
	$(PYTEST) $(TYPES) --default-flags --all $(ARGS)

# Every public function once, compiled as users do, annotations checked.
test-selection: venv
	$(PYTEST) $(TYPES) --default-flags --selection $(ARGS)

# Every example, with little to do.
test-examples: venv
	$(PYTEST) --all --dist=load tests/test_examples.py $(ARGS)

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/.browser: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[browser]'
	touch $@

# The site that `make docs` built, in headless Chromium, skipped where there is none; and
# its formulas.
browser: .venv/.browser
	$(BIN)/python -m pytest -q --site site $(addprefix tests/test_,site.py play.py pages.py) \
	  $(ARGS)

# The Python blocks of the pages, and what they print.
pages: venv
	$(BIN)/python docs/programs/run_pages.py $(ARGS)

# The pages of tutorials from a run of their programs: make tutorials ARGS=pendulum.
tutorials: venv
	$(BIN)/python docs/programs/tutorials.py $(ARGS)

# Torch first, and this one: other versions bring gigabytes of libraries for a GPU. The
# setup of mpc needs an old setuptools.
.venv/.bench: .venv/.installed benchmarks/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	PIP_CONSTRAINT=benchmarks/constraints.txt \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps mpc==0.0.6
	touch $@

# Options go into ARGS: make bench ARGS="--only single" or ARGS="--write docs".
bench: .venv/.bench
	$(BIN)/python -m benchmarks $(ARGS)

bench-losses: .venv/.bench
	$(BIN)/python -m benchmarks.losses $(ARGS)

bench-oracles: venv
	$(BIN)/python -m benchmarks.oracles $(ARGS)

bench-llqr: venv
	$(BIN)/python -m benchmarks.llqr $(ARGS)

bench-learning: .venv/.bench
	$(BIN)/python -m benchmarks.learning $(ARGS)

bench-training: .venv/.bench
	$(BIN)/python -m benchmarks.training $(ARGS)

bench-gpu: venv
	$(BIN)/python -m benchmarks.gpu $(ARGS)

# The wheel and the source archive in dist/, and a test of both in an empty environment.
package: venv
	rm -rf dist
	$(BIN)/pyproject-build --outdir dist
	$(PYTEST) --all -n 0 tests/test_package.py $(ARGS)

clean:
	rm -rf .venv site out build dist
