# Each target does its own set-up, in .venv, through scripts/bootstrap.py; a second call finds its
# stamps and costs nothing.

PYTHON ?= python3
# Not native: pip keeps the built wheel in its cache, and a cache may move between processors.
CMAKE_ARGS ?= -DGGML_NATIVE=OFF
export CMAKE_ARGS

RUN := .venv/bin/python

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint bench python

help: ## Say what there is
	@echo "usage: make [PYTHON=python3.x] TARGET"
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 10

demo: python ## Three workers share a prefix of 1,000 tokens through one daemon, on a real model
	@$(PYTHON) scripts/bootstrap.py demo
	$(RUN) examples/demo.py

test: python ## All tests: the fast ones, then real processes, then a real model
	@$(PYTHON) scripts/bootstrap.py test
	@echo "== 1/3 packaging, protocol and core: the fast ones"
	$(RUN) -m pytest tests/project tests/proto tests/core
	@echo "== 2/3 daemon and client: real processes, sockets and shared memory"
	$(RUN) -m pytest tests/shell tests/client
	@echo "== 3/3 llama.cpp: real models in real workers, end to end"
	$(RUN) -m pytest tests/llama tests/e2e

lint: python ## Style, format, types, and what may import what
	@$(PYTHON) scripts/bootstrap.py lint
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(RUN) .venv/bin/lint-imports

bench: python ## Measure, beside bare baselines in the same run; writes bench/report.json
	@$(PYTHON) scripts/bootstrap.py bench
	$(RUN) -m bench

python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: $(PYTHON) was not found. Install Python 3.11 or later, or: make PYTHON=..." >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.11 or later is needed." >&2; \
	  echo "make: install one, and say which: make PYTHON=python3.12" >&2; \
	  exit 1; }
