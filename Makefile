# Recipes of the project. `make demo` and `make test` need Python 3.11 and a package index.
PYTHON ?= python3

stubs: ## regenerate vllm_companion_plugin/protocol/schema.binpb and messages.py from protos/
	$(PYTHON) tools/make_stubs.py
