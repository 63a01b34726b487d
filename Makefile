# make run [MAILS=DIR]   send mails through three mailboxes and check what arrived
# make test              lint and the whole suite
# make lint, make clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MAILS ?=
SETTINGS := setup.py pyproject.toml constraints.txt

.DELETE_ON_ERROR:
.PHONY: run test lint clean

run: $(VENV)/.demo
	@PYTHONPATH=examples $(BIN)/python -m demo $(if $(MAILS),"$(MAILS)")

test: lint
	$(BIN)/pytest -n auto

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples/demo

clean:
	rm -rf $(VENV) build dist var .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -o -name '*.egg-info' -prune | xargs rm -rf

# One environment: what `make test` adds leaves `make run` as it was.
$(VENV)/.demo $(VENV)/.test: $(VENV)/.%: $(SETTINGS) | $(BIN)/python
	@echo "Installing cpsmailaccess_delivery[$*] into $(VENV)"
	@$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[$*]'
	@touch $@

$(VENV)/.test: | packages

$(BIN)/python:
	@echo "Making $(VENV)"
	@PYTHON=$(PYTHON) .ci/make-venv $(VENV)

.PHONY: packages
packages:
	@.ci/install-packages .ci/system-packages
