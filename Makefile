# Recipes of the project. `make demo` and `make test` need Python 3.11 and a package index, nothing else.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready
VERSIONS ?= 0.27.1 0.29.0 0.31.0 0.32.0

.PHONY: help check test test-slow test-docs test-versions lint types demo stubs test-gpu clean

help: ## list the recipes
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(STAMP): pyproject.toml tools/make_venv.sh
	PYTHON=$(PYTHON) tools/make_venv.sh

check: $(STAMP) lint types ## the inner loop: lint, types, layers, rules, arenas, and a program that uses a companion
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests/unit tests/contract tests/test_layering.py tests/examples tests/docs/test_pages.py

test: $(STAMP) lint types ## lint, types, layers and all tests, with real engines on CPU
	$(BIN)/python -m pytest -q -m "not vllm and not alone and not slow and not gpu" -n 2 --dist worksteal
	$(BIN)/python -m pytest -q -m "vllm and not alone and not slow and not gpu" -n 2 --dist worksteal
	$(BIN)/python -m pytest -q -m "alone and not slow and not gpu"

test-slow: $(STAMP) ## every architecture against a normal load, orders of events in the registry, thirty more rounds of chaos with real engines, and 1,200 with stand-ins
	$(BIN)/python -m pytest -q -m slow --ignore tests/docs --ignore tests/packaging
	$(BIN)/python -m tests.process.chaos --rounds 1000

test-docs: $(STAMP) ## each install line and command of README and guide, the packages, and the tests of the source distribution
	$(BIN)/python -m pytest -q -m slow tests/docs tests/packaging

test-versions: ## the core of the tests over VERSIONS of vLLM, each in a .venv-VERSION that is kept
	PYTHON=$(PYTHON) tools/test_versions.sh $(VERSIONS)

lint: $(STAMP) ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

demo: $(STAMP) ## two real vLLM servers on one copy of a real model, on CPU
	$(BIN)/python tools/demo.py

stubs: $(STAMP) ## regenerate vllm_companion_plugin/wire/schema.binpb, messages.py and messages.pyi from protos/
	$(BIN)/python tools/make_stubs.py

test-gpu: ## tests and acceptance figures on a machine with a GPU and a CUDA build of vLLM
	$(PYTHON) -m pytest -q -m gpu tests/contract tests/gpu
	$(PYTHON) -m benchmarks.gpu_acceptance --out out/gpu

clean: ## remove what the recipes made
	rm -rf .venv .venv-* build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache
