# Everything a developer runs. `make` alone lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# `make PREFIX=…` wins; an environment may have a PREFIX that is somebody else's.
PREFIX := $(abspath $(or $(GPUCKPT_PREFIX),/opt/gpuckpt))
export PREFIX
export GPUCKPT_PREFIX := $(PREFIX)
# The environment holds an editable install of one checkout; what is tested is the checkout one stands in.
export PYTHONPATH := $(CURDIR)

python := $(PREFIX)/venv/bin/python
# Folders with Python that mypy reads, and those with tests; a folder may be missing or have no Python yet.
typed := gpuckpt hooks tests $(foreach folder,scripts seccomp benchmarks,$(if $(wildcard $(folder)/*.py),$(folder)))
fast := $(wildcard tests/unit)
# Their thousands of small files are in memory, where programs may be started from there: a third of a disk's time.
in_memory = $(shell findmnt -no OPTIONS /dev/shm 2>/dev/null | tail -1 | grep -qvw noexec && echo TMPDIR=/dev/shm)
# Compiled modules, the tests' too, are kept out of the tree and also where the environment says that none be written:
# to compile them anew takes half a minute.
compiled := env -u PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX=$(CURDIR)/build/pycache
benchmarks := restore density sweep steady create archive ignore_flags criu_binaries cold pool
all := $(wildcard tests/unit tests/property tests/contract tests/integration tests/browser)
# The guest server's own tests run where it runs: in the server's environment, with torch.
guest := $(wildcard tests/guest tests/guest_api)
server := $(PREFIX)/server/bin/python

.PHONY: help setup setup-server setup-tests check lint types imports unit test-guest test demo demo-pool bench bench-pool bench-sessions bench-kv gpu-acceptance soak format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\n  PREFIX=%s holds CRIU and the Python environments (GPUCKPT_PREFIX)\n' '$(PREFIX)'

setup: ## prepare the machine: podman, CRIU, the host's Python environment (as root)
	@scripts/setup

setup-server: ## the same, and the environment that runs vLLM on the CPU (3.4 GB)
	@scripts/setup --server

setup-tests: ## the same, and what tests freeze and run: allocators, redis, Go, Node, a C compiler, the GPU packages
	@scripts/setup --server --tests

# $(call timed,NAME,COMMANDS): run COMMANDS, stop at the first that fails (no && in there), say how long they took.
timed = started=$$EPOCHREALTIME; $(2); awk -v a=$$started -v b=$$EPOCHREALTIME 'BEGIN {printf "  %-10s %5.1f s\n", "$(1)", b - a}'

check: ## linters, types, import contracts, unit tests: under a minute
	@$(call timed,check,$(MAKE) lint types imports unit)

lint: $(python)
	@$(call timed,ruff,$(python) -m ruff check .; $(python) -m ruff format --check .)

types: $(python)
	@$(call timed,mypy,$(python) -m mypy $(typed))

imports: $(python)
	@$(call timed,imports,$(PREFIX)/venv/bin/lint-imports)

unit: $(python)
	@$(call timed,unit,$(compiled) $(in_memory) $(python) -m pytest -q -n 2 $(fast))

test-guest: $(server) ## the session engine's tests: exact over many architectures, its HTTP interface
	@TORCHDYNAMO_DISABLE=1 PYTHONPATH=$(CURDIR):$(CURDIR)/hooks $(server) -m pytest -q -n 2 $(guest)

test: ## set up everything, check, then all tests with real containers (as root)
	@$(MAKE) setup-tests
	@$(MAKE) check
	@$(MAKE) test-guest
	@$(python) -m pytest $(all)

demo: ## set up everything, then show what gpuckpt does, step by step, as root (DEMO=--keep keeps a golden)
	@$(MAKE) setup-server
	@$(python) -m benchmarks.demo $(DEMO)

demo-pool: ## set up everything, then show the warm pool: three models behind one address (as root)
	@$(MAKE) setup-server
	@$(python) -m benchmarks.demo_pool

# One after the other; a part that fails does not keep the others, an interruption ends them all.
bench: ## measure everything: about 3.5 hours on 2 cores (BENCH=--quick: a trial); results in build/bench
	@$(MAKE) setup-server
	@failed=; for part in $(benchmarks); do \
	  status=0; $(python) -m benchmarks.$$part $(BENCH) || status=$$?; \
	  case $$status in 0) ;; 130) exit 130;; *) failed="$$failed $$part";; esac; \
	done; \
	$(python) -m benchmarks.report --results build/results; \
	test ! -e build/bench/pool.json || $(python) -m benchmarks.report --pool --results build/results; \
	test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

bench-pool: ## measure the warm pool: about 20 minutes on 2 cores (BENCH=--quick: a trial); build/bench/pool.json
	@$(MAKE) setup-server
	@$(python) -m benchmarks.pool $(BENCH)
	@$(python) -m benchmarks.report --pool --results build/results

bench-sessions: ## measure the session engine: about 35 minutes on 2 cores (BENCH=--quick: a trial); build/bench/sessions.json
	@$(MAKE) setup-server
	@$(python) -m benchmarks.sessions $(BENCH)

bench-kv: ## measure KV paging: about 10 minutes on 2 cores (BENCH=--quick: a trial); build/bench/kv.json
	@$(MAKE) setup-server
	@$(python) -m benchmarks.kv $(BENCH)

# No set-up here: a host with a GPU has its own PyTorch, and often no network.
gpu-acceptance: $(python) ## prove the GPU's side on a host that has one: under 8 minutes (GPU=--resume goes on, GPU=--dry-run: anywhere)
	@status=0; $(python) -m benchmarks.gpu_acceptance --prefix $(PREFIX) $(GPU) || status=$$?; \
	case $$status in 0|1) test ! -e build/bench/gpu.json || $(python) -m benchmarks.report --gpu --results build/results;; esac; \
	exit $$status

soak: ## ten minutes of the warm pool under random load and chaos, 15 in all (SOAK=--quick: small models); build/bench/soak.json
	@$(MAKE) setup-server
	@$(python) -m benchmarks.pool_soak $(SOAK)

format: $(python) ## let ruff format the tree and mend what it can
	@$(python) -m ruff check --fix-only .
	@$(python) -m ruff format .

clean: ## remove caches and build output (nothing outside the checkout)
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(python):
	@echo 'there is no $@ yet: make setup' >&2; exit 1

$(server):
	@echo 'there is no $@ yet: make setup-tests' >&2; exit 1
