# `make demo` and `make test` are all that a fresh machine needs: Python 3.11 or newer and make.
# Every path is relative and nothing looks at an activated environment, so any clone folder works.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed
TEST_STAMP := .venv/.installed-for-tests
# Test files that run side by side: each may start a Ray of its own. In the order of tests/marks.py: xdist's own leaves
# the longest files, which hold few tests, for the end, where one of them runs alone.
TEST_WORKERS ?= 2
PYTEST := $(PY) -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check clean

# The install is made for this folder: a clone that was moved or copied is installed anew.
ifneq ($(strip $(shell cat $(STAMP) 2>/dev/null)),$(strip $(CURDIR)))
.PHONY: $(STAMP)
endif

help:
	@echo 'make setup      install all packages into .venv, those of the tests too (PYTHON=python3.12 chooses another Python)'
	@echo 'make demo       train a captioner and a generator on built-in data, score them, write runs/demo/index.html'
	@echo '                (ARGS=--fresh starts anew, ARGS=--help lists its flags)'
	@echo 'make test       checks and the tests of every change (TEST_WORKERS=1: one after another)'
	@echo 'make test-all   the same with the nightly and the soak tests'
	@echo 'make check      ruff and mypy'
	@echo 'make clean      remove .venv, caches and runs/demo'

$(STAMP): pyproject.toml constraints.txt
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, and '$(PYTHON)' is none ($$('$(PYTHON)' --version 2>&1)); name one: make PYTHON=python3.12" >&2; exit 1; }
	@# Of another folder: its programs name that folder's Python.
	@[ ! -e $(STAMP) ] || [ "$$(cat $(STAMP))" = "$$(pwd -P)" ] || rm -rf .venv
	@rm -f $(STAMP)
	'$(PYTHON)' -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e .
	@pwd -P > $(STAMP)

# Tests and checks need packages that no job and no service runs.
$(TEST_STAMP): $(STAMP)
	@rm -f $(TEST_STAMP)
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(TEST_STAMP)

setup: $(TEST_STAMP)
	@echo '.venv is ready'

demo: $(STAMP)
	$(PY) jobs/demo.py $(ARGS)

check: $(TEST_STAMP)
	$(PY) -m ruff check .
	$(PY) -m mypy

test: check
	$(PYTEST) -m 'not (nightly or soak)'

test-all: check
	$(PYTEST)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache mmcore.egg-info runs/demo
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
