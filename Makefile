# make run [PORT=8080]   a Zope with the ZMI and three SMTP servers, until Ctrl-C
# make demo [MAILS=DIR]  send mails through three mailboxes and check what arrived
# make test              lint and the whole suite
# make bench [ROUNDS=3] [SCALE=1] [ROWS="plain tls"] [LIMIT=30] [BENCH_DIR=/var/tmp]
#                        side by side with zope.sendmail and Postfix, see docs/performance.rst
# make soak [KILLS=500] [SEED=1] [BACK_END=postgresql]
#                        kill -9, again and again, and a count of what arrived: docs/reliability.rst
# make crash             states after a power loss and faults of the disk, all of them:
#                        see docs/reliability.rst
# make fuzz [INPUTS=2000000]
#                        hostile input for every parser, see docs/security.rst
# make pictures          docs/images, taken by the tests that use a browser
# make lint, make clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MAILS ?=
PORT ?= 8080
ROUNDS ?= 3
SCALE ?= 1
LIMIT ?= 30
ROWS ?=
BENCH_DIR ?= /var/tmp
KILLS ?= 500
BACK_END ?= directory
SEED ?= 1
INPUTS ?= 2000000
SETTINGS := setup.py pyproject.toml constraints.txt

.DELETE_ON_ERROR:
.PHONY: run demo test lint bench soak crash fuzz pictures clean

run: $(VENV)/.demo
	@PYTHONPATH=examples PORT=$(PORT) exec $(BIN)/python -m demo.site $(if $(MAILS),"$(MAILS)")

demo: $(VENV)/.demo
	@PYTHONPATH=examples $(BIN)/python -m demo $(if $(MAILS),"$(MAILS)")

test: lint
	$(BIN)/pytest -n auto --dist worksteal

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples/demo

bench: $(VENV)/.bench
	@benchmarks/install-postfix || echo "without Postfix"
	@PYTHONPATH=tests $(BIN)/python -m benchmarks --rounds $(ROUNDS) --scale $(SCALE) --limit $(LIMIT) \
		--directory $(BENCH_DIR) $(ROWS)

soak: $(VENV)/.test
	@PYTHONPATH=tests $(BIN)/python -m soak --kills $(KILLS) --seed $(SEED) --back-end $(BACK_END)

crash: $(VENV)/.test
	@PYTHONPATH=tests $(BIN)/python tests/crash

fuzz: $(VENV)/.test $(VENV)/.fuzz
	@PYTHONPATH=tests $(BIN)/python -m fuzz.run --inputs $(INPUTS)

pictures: $(VENV)/.test
	PICTURES=1 $(BIN)/pytest -q tests/test_zope*chromium.py

clean:
	rm -rf $(VENV) build dist var fuzz-findings .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -o -name '*.egg-info' -prune | xargs rm -rf

# One environment: what `make test` adds leaves `make run` as it was.
$(VENV)/.demo $(VENV)/.test $(VENV)/.bench $(VENV)/.fuzz: $(VENV)/.%: $(SETTINGS) | $(BIN)/python
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
