# Two commands matter: `make run` and `make test`. Everything else is listed by `make help`.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# The first of these that is a Python from 3.11 to 3.13 builds the environment.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
# cpu or cuda; without it the one that .venv was made for, at first cpu.
DEVICE ?=
VLLM ?= 0.27.1
ARGS ?=
# Test processes; 0 runs all tests in one, with output as it comes.
JOBS ?= 2
BUF_VERSION := 1.75.0

BIN := .venv/bin
OMNI := $(BIN)/omni
TESTS := $(wildcard proto libs services cli bench tests)
PACKAGES := omni_common omni_engine omni_kernels omni_proxy omni_prefill omni_decode omni_kvstore omni_placement omni_cli
BUF := .omni/tools/node_modules/.bin/buf

.PHONY: help setup run test test-fast test-all test-vllm test-compose lint type buf proto up down status doctor bench bench-kvstore bench-placement bench-proxy bench-scheduler chaos clean kernels release

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  ARGS are passed on: make up ARGS='--engine sim --decode 4'; make test ARGS='-k sessions'"

setup:  ## create .venv from constraints.txt (DEVICE=cpu|cuda, PYTHON=python3.11); nothing to do the second time
	@test -n "$(PYTHON)" || { echo "error: no Python from 3.11 to 3.13 found; name one: make setup PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) scripts/setup.py $(addprefix --device ,$(DEVICE))

run: setup  ## start 1 prefill + 1 decode on CPU, show a first answer, stay until Ctrl-C
	@$(OMNI) up $(ARGS)

test: setup  ## the full test suite
	@$(BIN)/python -m pytest -n $(JOBS) -m "not compose" $(TESTS) $(ARGS)

test-fast: setup  ## all but the tests that start real engines
	@$(BIN)/python -m pytest -n $(JOBS) -m "not compose and not engine" $(TESTS) $(ARGS)

test-all: setup  ## the full test suite and the container tests
	@$(BIN)/python -m pytest $(TESTS) $(ARGS)

test-vllm: setup  ## the engine tests on a second vLLM (VLLM=0.27.1)
	@$(PYTHON) scripts/setup.py --second-engine $(VLLM)
	@PYTHONPATH=$(CURDIR)/.venv-vllm-$(VLLM) $(BIN)/python -m pytest -m engine libs/engine $(ARGS)

test-compose: setup  ## the container tests; needs a container engine
	@$(BIN)/python -m pytest -m compose $(TESTS) $(ARGS)

lint: setup type buf  ## style, formatting, import contracts, types, stubs, wire contracts
	@$(BIN)/ruff check --no-cache .  # its cache does not notice a module that changes what is first-party
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/python proto/generate.py --check

type: setup  ## mypy, strict
	@$(BIN)/mypy $(addprefix -p ,$(PACKAGES))
	@$(BIN)/mypy scripts/setup.py proto/generate.py

buf:
	@if ! command -v npm >/dev/null; then echo "buf: skipped, npm is not installed"; exit 0; fi; \
	if [ "$$($(BUF) --version 2>/dev/null)" != "$(BUF_VERSION)" ]; then \
		npm install --silent --no-audit --no-fund --prefix .omni/tools @bufbuild/buf@$(BUF_VERSION) >/dev/null \
			|| { echo "buf: skipped, npm cannot fetch it"; exit 0; }; fi; \
	$(BUF) lint proto || exit 1; \
	if [ -f proto/baseline.binpb ]; then $(BUF) breaking proto --against proto/baseline.binpb; \
	elif git rev-parse --verify --quiet main:proto >/dev/null 2>&1; then \
		$(BUF) breaking proto --against '.git#branch=main,subdir=proto'; \
	else echo "buf breaking: skipped, neither proto/baseline.binpb nor a main branch to compare with"; fi

proto: setup  ## generate the stubs from the contracts
	@$(BIN)/python proto/generate.py

up: setup  ## start a stack in the background (omni up --detach)
	@$(OMNI) up --detach $(ARGS)

down:  ## stop it
	@$(OMNI) down $(ARGS)

status:  ## what runs, and is it well
	@$(OMNI) status $(ARGS)

doctor: setup  ## check this machine and environment
	@$(OMNI) doctor $(ARGS)

bench: setup  ## measure a stack beside vLLM's own server (ARGS=--quick)
	@$(BIN)/python bench/serving.py $(ARGS)

bench-kvstore: setup  ## measure the prefix index beside its baselines (ARGS=--quick)
	@$(BIN)/python bench/kvstore.py $(ARGS)

bench-placement: setup  ## compare solvers of expert placement with DeepSeek's and vLLM's (ARGS='--quick --affinity')
	@$(BIN)/python bench/placement.py $(ARGS)

bench-proxy: setup  ## tokens per second, latency and profile of the proxy on one core (ARGS=--quick)
	@$(BIN)/python bench/proxy.py $(ARGS)

bench-scheduler: setup  ## compare scheduling policies on a trace (ARGS='--trace FILE --quick'), simulated
	@$(BIN)/python bench/scheduler.py $(ARGS)

kernels: setup  ## every op on every backend: error, shapes, refusals, contract with Ascend (ARGS='--op rms_norm')
	@$(OMNI) kernels table $(ARGS)

chaos: setup  ## kill, pause and delay a stack under load for ten minutes (ARGS='--engine vllm --seed 7')
	@$(BIN)/python tests/chaos/run.py $(ARGS)

release: setup  ## build one package into dist/ (PKG=services/proxy) after checking its changelog
	@test -f "$(PKG)/pyproject.toml" || { echo "error: name a package: make release PKG=services/proxy"; exit 1; }
	@cd $(PKG) && version=$$($(CURDIR)/$(BIN)/python -m hatchling version) && name=$$(sed -n 's/^name = "\(.*\)"/\1/p' pyproject.toml) \
		&& { ! sed -n '/^## Unreleased/,/^## [0-9]/p' CHANGELOG.md | grep -q '^- ' \
			|| { echo "error: $(PKG)/CHANGELOG.md: put what is under Unreleased below the new version, and raise __version__"; exit 1; }; } \
		&& { grep -q "^## $$version" CHANGELOG.md || { echo "error: $(PKG)/CHANGELOG.md has no section $$version"; exit 1; }; } \
		&& $(CURDIR)/$(BIN)/python -m hatchling build -d $(CURDIR)/dist \
		&& echo "next: git tag $$name-v$$version"

clean:  ## stop stacks; remove the environments, caches, logs and builds
	@if [ -x $(OMNI) ]; then $(OMNI) down --all; fi
	@rm -rf .venv .venv-vllm-* .omni dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
