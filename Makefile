# Each target does its own set-up, in .venv, through scripts/bootstrap.py; a second call finds its
# stamps and costs nothing.

PYTHON ?= python3
# Not native: pip keeps the built wheel in its cache, and a cache may move between processors.
CMAKE_ARGS ?= -DGGML_NATIVE=OFF
export CMAKE_ARGS

RUN := .venv/bin/python

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint bench install-systemd uninstall-systemd python

help: ## Say what there is
	@echo "usage: make [PYTHON=python3.x] TARGET"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: python ## Three workers share a prefix of 1,000 tokens through one daemon, on a real model
	@$(PYTHON) scripts/bootstrap.py demo
	$(RUN) examples/demo.py

test: python ## All tests: the fast ones, real processes, a real model, a real systemd
	@$(PYTHON) scripts/bootstrap.py test
	@echo "== 1/4 packaging, protocol and core: the fast ones"
	$(RUN) -m pytest tests/project tests/proto tests/core
	@echo "== 2/4 daemon and client: real processes, sockets and shared memory"
	$(RUN) -m pytest tests/shell tests/client
	@echo "== 3/4 llama.cpp: real models in real workers, end to end"
	$(RUN) -m pytest tests/llama tests/e2e
	@echo "== 4/4 systemd: the real service in a container, workers in containers of their own"
	$(RUN) -m pytest tests/system

lint: python ## Style, format, types, and what may import what
	@$(PYTHON) scripts/bootstrap.py lint
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(RUN) .venv/bin/lint-imports

bench: python ## Measure, beside bare baselines in the same run; writes bench/report.json
	@$(PYTHON) scripts/bootstrap.py bench
	$(RUN) -m bench

install-systemd: ## As root: kvd as a service, in PREFIX=/opt/kvd (packagers: DESTDIR=...)
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' PYTHON='$(PYTHON)' systemd/install.sh install

uninstall-systemd: ## Remove the service; /etc/kvd and the user kvd stay
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' systemd/install.sh uninstall

python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: $(PYTHON) was not found. Install Python 3.11 or later, or: make PYTHON=..." >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.11 or later is needed." >&2; \
	  echo "make: install one, and say which: make PYTHON=python3.12" >&2; \
	  exit 1; }
