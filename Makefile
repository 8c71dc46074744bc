# `make demo` and `make test` need Python 3.11 or 3.12 and a package index, and install all else into .venv.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test test-all chaos docs lint clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all,dev,docs]'
	touch $@

demo: install
	$(BIN)/prelora train jobs/configs/digits.yaml

# In two processes, each with a Ray of its own.
test: install lint
	$(BIN)/python -m pytest -m 'not slow' --numprocesses 2 --no-loadscope-reorder

test-all: test
	$(BIN)/python -m pytest -m slow

chaos: install
	$(BIN)/python -m tests.chaos.chaos

docs: install
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/docs
	@echo "open build/docs/index.html"

lint: install
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
