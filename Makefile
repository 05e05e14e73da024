# `make help` lists the targets. Everything is installed into .venv unless EADAPRUNE_PYTHON names the Python of an
# environment that has vLLM already (a CUDA machine's): then only this project is added to it.
.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-unit coverage test-slow test-versions check docs format clean

ifdef EADAPRUNE_PYTHON
PY := $(EADAPRUNE_PYTHON)
STAMP := .venv/.installed-beside-vllm-$(shell echo $(PY) | cksum | cut -d " " -f 1)
else
PY := .venv/bin/python
STAMP := .venv/.installed
endif
BIN := $(dir $(PY))
PYTHON ?= python3

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Install everything into .venv (vLLM for CPU, unless EADAPRUNE_PYTHON is set)

.venv/.installed: pyproject.toml $(wildcard docker/cpu/*.sh docker/cpu/vllm-bridge/*)
	$(PYTHON) -m venv .venv
	@echo "Installing into .venv; 3 to 6 minutes on a fast connection:"
	@docker/cpu/install.sh .venv/bin/python
	@echo "This project and its tools"
	@.venv/bin/python -m pip --disable-pip-version-check install --quiet --editable '.[dev]'
	@touch $@

.venv/.installed-beside-vllm-%: pyproject.toml
	@mkdir -p .venv
	$(PY) -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## Serve the embedded model, ask it about pictures, show what was saved
	@$(BIN)eadaprune demo

serve: $(STAMP) ## Serve the embedded model on port 8000 until interrupted
	VLLM_CPU_KVCACHE_SPACE=1 $(BIN)vllm serve "$$($(BIN)eadaprune demo-model)" --plugin eadaprune --port 8000 --max-model-len 2048

test: $(STAMP) ## Run all tests but the slow ones, two files at a time (half an hour on 2 cores)
	$(PY) -m pytest -m "not slow" --cov --cov-report=

test-unit: $(STAMP) ## Run the tests that start no vLLM (1:20 to 2:20 minutes on 2 cores)
	$(PY) -m pytest -m "not server"

coverage: $(STAMP) ## Run what test runs, and list what is not covered, in servers too (an hour on 2 cores)
	$(PY) -m pytest -m "not slow" --cov --cov-config=tests/coverage.toml --cov-fail-under=0

test-slow: $(STAMP) ## Run the slow tests (45 minutes on 2 cores)
	$(PY) -m pytest -m slow -n 0

test-versions: $(STAMP) ## Run unit tests and a smoke on each release of vLLM and each Python (installs them; an hour)
	$(PY) tests/versions.py

check: $(STAMP) ## Lint, formatting and types
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy

docs: $(STAMP) ## Build the documents as a site in build/docs; warnings are errors
	$(PY) -m sphinx -q -W --keep-going -c docs . build/docs

format: $(STAMP) ## Let ruff mend what it can
	$(BIN)ruff check --fix .
	$(BIN)ruff format .

clean: ## Remove what was installed and made here
	rm -rf .venv build demo-output dist .mypy_cache .ruff_cache .pytest_cache
