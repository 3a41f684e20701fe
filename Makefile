# Each target does its own set-up, in .venv, through scripts/bootstrap.py; a second call finds its
# stamps and costs nothing.

PYTHON ?= python3
# Not native: pip keeps the built wheel in its cache, and a cache may move between processors.
CMAKE_ARGS ?= -DGGML_NATIVE=OFF
export CMAKE_ARGS

RUN := .venv/bin/python

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test soak lint bench bench-peers docs install-systemd uninstall-systemd python

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

soak: python ## The long ones, about an hour: kills, crashes, simulations, fuzz. KVD_SEED=n replays
	@$(PYTHON) scripts/bootstrap.py test
	@echo "== 1/9 500 workers killed, 100 of them with a surviving child"
	$(RUN) -m pytest tests/soak/test_worker_deaths.py
	@echo "== 2/9 200 daemons killed under load, and one at each point, at several times of coming there"
	$(RUN) -m pytest -s tests/soak/test_daemon_kills.py
	KVD_CRASH_AT=1,2,3,5,8 $(RUN) -m pytest tests/shell/test_crash_points.py
	@echo "== 3/9 10,000 simulations of restarts; the model of the core, 2,000 times 50 steps"
	KVD_SIMULATIONS=10000 $(RUN) -m pytest --timeout 7200 tests/core/test_restarts.py
	KVD_EXAMPLES=2000 KVD_STEPS=50 $(RUN) -m pytest --timeout 7200 tests/core/test_model.py
	@echo "== 4/9 1,000,000 messages to the codec, and to a daemon"
	KVD_FUZZ=1000000 $(RUN) -m pytest --timeout 7200 tests/proto/test_codec_fuzz.py
	$(RUN) -m pytest -s tests/soak/test_wire_fuzz.py
	@echo "== 5/9 what one client's load costs another"
	$(RUN) -m pytest -s tests/soak/test_stall.py
	@echo "== 6/9 1,000,000 random operations of four clients, and every byte accounted for"
	KVD_OPERATIONS=1000000 $(RUN) -m pytest -s tests/shell/test_operations.py
	@echo "== 7/9 a cache of 10 GiB is adopted"
	$(RUN) -m pytest -s tests/soak/test_large_adoption.py
	@echo "== 8/9 two batching workers for 10 minutes, which are killed, and so is the daemon;"
	@echo "       and each integration while the daemon is away, or hangs, for 10 s"
	KVD_BATCHING_SECONDS=600 $(RUN) -m pytest -s tests/e2e/test_batching_storm.py
	KVD_OUTAGE_SECONDS=10 $(RUN) -m pytest -s tests/e2e/test_outage.py
	@echo "== 9/9 real models and every prompt, continued to the bit"
	KVD_ALL_PROMPTS=1 $(RUN) -m pytest tests/e2e/test_kinds.py

lint: python ## Style, format, types, and what may import what
	@$(PYTHON) scripts/bootstrap.py lint
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(RUN) .venv/bin/lint-imports

bench-peers: python ## Get Redis, memcached and LMCache, for `make bench` to compare with (1.5 GB)
	@$(PYTHON) scripts/peers.py

bench: python ## Measure, beside floors and peers in the same run; writes bench/report.md and .json
	@$(PYTHON) scripts/bootstrap.py bench
	$(RUN) -m bench

docs: python ## Write docs/commands.md and docs/schema from what they are of
	@$(PYTHON) scripts/bootstrap.py test
	$(RUN) scripts/commands.py
	$(RUN) scripts/schemas.py

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
