# Two targets do everything on a fresh machine: `make demo` and `make test`. `make help` lists all.
# They need Python 3.11 or newer and a C++ compiler; the rest goes into .venv, and a second run starts at once.

VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEV    := $(VENV)/.dev
# The first interpreter that is new enough; `make PYTHON=…` chooses another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
            $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
ONCE   ?=
PORT   ?=
TESTS  ?= tests
# Tests start a thousand processes, which load what an earlier one compiled: an eighth of their processor time.
export PYTHONDONTWRITEBYTECODE :=
# Where each part of the tests leaves how many there were, for the last line of `make test`.
COUNTS := build/tests

.DEFAULT_GOAL := help
.PHONY: help demo bench wheel check fast test drills drill-tests slow kernels kernels-beside kernels-off kernels-plain kernels-avx2 kernels-avx512 kernels-sanitized lint docs structured clients bench-cpu accuracy accuracy-own clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 19

demo: $(READY)  ## measure this machine, plan, deploy two replicas, verify the promise, keep serving (ONCE=1: stop then)
	@$(BIN)/python examples/demo.py $(if $(ONCE),--once) $(if $(PORT),--port $(PORT))

bench: $(READY)  ## load the demo model for two minutes and report how it did (DURATION=30s)
	@$(BIN)/python examples/bench.py $(if $(DURATION),--duration $(DURATION))

check: $(DEV)  ## between two edits: lint, types and the fast tests (a minute and a half, the first time two; tests/slow_files.txt is what it leaves out)
	@$(MAKE) --no-print-directory -j 2 lint fast

fast: $(DEV)
	@echo "· fast tests"
	@$(BIN)/python -m pytest -n 2 --fast --save-counts $(COUNTS)/fast.json $(TESTS)

structured: $(DEV)  ## structured output against 2,000 schemas and as many regular expressions (some minutes)
	@POWERBAND_STRUCTURED_CASES=2000 $(BIN)/python -m pytest -s --timeout=7200 tests/structured/test_answers_of_generated_schemas.py

# Nothing runs twice. Drills mostly wait, and measure: kernels run beside them, with less right to the processors.
test: $(DEV)  ## the whole proof: check, drills and kernels, then the slow tests (TESTS=tests/core for a part)
	@rm -rf $(COUNTS)
	@$(MAKE) --no-print-directory check
	@$(if $(filter tests,$(TESTS)),$(MAKE) --no-print-directory -j 2 kernels-beside drill-tests)
	@$(MAKE) --no-print-directory slow
	@$(BIN)/python -m pytest --add-counts $(COUNTS) tests/test_architecture.py

# Files as tests/slow_files.txt orders them: those that take longest come first, so that no process ends long after the others.
# More processes than two processors: what waits for a server or a load leaves them to others.
slow: $(DEV)
	@echo "· slow tests"
	@$(BIN)/python -m pytest -n 4 --no-loadscope-reorder --slow --save-counts $(COUNTS)/slow.json $(TESTS) \
	  $(if $(filter tests,$(TESTS)),--ignore tests/drills)

drill-tests: $(DEV)
	@echo "· drills"
	@$(BIN)/python -m pytest --save-counts $(COUNTS)/drills.json tests/drills

kernels-beside: $(DEV)
	@mkdir -p $(COUNTS)
	@MAKEFLAGS= nice -n 5 $(MAKE) --no-print-directory kernels CASES=$(CASES) >$(COUNTS)/kernels.txt 2>&1; code=$$?; cat $(COUNTS)/kernels.txt; exit $$code

drills: $(DEV)  ## do to a service what happens to services, and print what its users noticed (SOAK=30m KILLS=300 SEED=7)
	@$(BIN)/python scripts/drills.py $(if $(SOAK),--soak $(SOAK)) $(if $(KILLS),--kills $(KILLS)) $(if $(SEED),--seed $(SEED))

# What this processor cannot run is skipped, and so is its own tier: all other tests run with that. Under the sanitizers the same tests look for bad memory accesses.
# One thread for each of two processes; tests/engine/cpu_kernels/test_team.py has more. Every test runs in each tier, with every value of each of its parameters;
# all combinations of them run with the own tier. `make kernels CASES=all` runs them with every tier; without it, AVX2 stands for the others.
# They are compiled first, in no test's time and without the sanitizers' library in the compiler.
COMPILE      = $(1) $(BIN)/python -m powerband doctor --compile
KERNEL_TESTS = OMP_NUM_THREADS=1 $(1) $(BIN)/python -m pytest --no-header -p no:cacheprovider $(if $(filter all,$(CASES)),,--fewer-cases) --save-counts $(COUNTS)/$(subst -,_,$@).json $(2)
SANITIZERS   = $(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libubsan.so)
kernels: $(DEV)  ## the tests of the C++ kernels, compiled for older processors and with sanitizers; whole models without any (CASES=all)
	@own=$$($(BIN)/python -c "from powerband.engine.kernels.cpu.library import load; print(load().tier)"); \
	$(MAKE) --no-print-directory -j 2 --output-sync kernels-sanitized kernels-off \
	  $$(for tier in $(if $(filter all,$(CASES)),plain avx2 avx512,avx2); do [ $$tier = $$own ] || echo kernels-$$tier; done)

kernels-off: $(DEV)
	@echo "· kernels: none"
	@$(call KERNEL_TESTS,POWERBAND_KERNEL_TIER=off,tests/engine/test_parity.py)

kernels-plain kernels-avx2 kernels-avx512: kernels-%: $(DEV)
	@echo "· kernels: $*"
	@$(call COMPILE,POWERBAND_KERNEL_TIER=$*)
	@$(call KERNEL_TESTS,POWERBAND_KERNEL_TIER=$*,tests/engine/cpu_kernels)

kernels-sanitized: $(DEV)
	@echo "· kernels: sanitizers"
	@if command -v g++ >/dev/null; then $(call COMPILE,CXX=g++ POWERBAND_KERNEL_SANITIZE=1) && $(call KERNEL_TESTS,CXX=g++ POWERBAND_KERNEL_SANITIZE=1 LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0,\
	  tests/engine/cpu_kernels); else echo "skipped: there is no g++"; fi

lint: $(DEV)  ## ruff and mypy --strict
	@echo "· ruff"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@echo "· mypy --strict"
	@$(BIN)/mypy --no-error-summary

docs: $(DEV)  ## build the documentation into site/ (zensical goes into a .venv of its own)
	@test -x build/docs/bin/zensical || { $(PYTHON) -m venv build/docs && build/docs/bin/pip install -q zensical; }
	@$(BIN)/python scripts/document.py
	@build/docs/bin/zensical build

clients: $(DEV)  ## run the official clients (OpenAI's, Anthropic's, LangChain, …) against a server and a gateway, and write docs/clients.md (ARGS="--only openai-3")
	@$(BIN)/python scripts/clients.py $(ARGS)

bench-cpu: $(DEV)  ## beside OpenVINO, vLLM and llama.cpp, which it installs outside the repository (ARGS="--quick")
	@$(BIN)/python -m benchmarks.cpu $(ARGS)

accuracy: $(DEV)  ## how near the planner's predictions come to measured tables, which lie beside the checkout (ARGS="--quick")
	@$(BIN)/python -m benchmarks.accuracy $(ARGS)

accuracy-own: $(DEV)  ## predicted beside measured for our own engine on this machine, half an hour (ARGS="--models demo")
	@$(BIN)/python -m benchmarks.accuracy_own $(ARGS)

wheel:  ## a wheel and an sdist in dist/ (the package build goes into a .venv of its own)
	@test -x build/wheel/bin/python || { $(PYTHON) -m venv build/wheel && build/wheel/bin/pip install -q build; }
	@build/wheel/bin/python -m build --outdir dist

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info

# The set-up: what the demo needs, and for tests the tools of development beside it. Each runs again when the dependencies change.
INSTALL = $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer with venv was found."; \
	  echo "hint:  install one (Debian: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python"; exit 3; }
	@echo "· set-up: $(VENV) with $(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "· set-up: torch (the largest part: this may take minutes the first time)"
	@$(INSTALL) torch
	@echo "· set-up: everything else"
	@$(INSTALL) -e ".[serve]"
	@echo "· set-up: kernels for this processor"
	@$(BIN)/python -m powerband doctor --compile || echo "plain torch computes instead, several times slower"
	@touch $@

$(DEV): $(READY)
	@echo "· set-up: tools for development"
	@$(INSTALL) -e ".[serve,dev]"
	@touch $@
