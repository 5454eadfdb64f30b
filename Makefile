# Paperlab: `make book` builds the site, `make test` proves it. Everything else is a convenience.
VENV   ?= .venv
PYTHON ?= python3
PY     := $(VENV)/bin/python
PRESS  := $(PY) -m paperbook
JOBS   ?= 2

.DEFAULT_GOAL := help
.PHONY: help book test lint unit contract verdicts nbval browser page new serve lab gpu bench doctor clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Paperlab needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed: on Debian, apt-get install python3-venv"; exit 1; }
	@echo "Installing the pinned requirements (once) …"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

book: $(VENV)/.ready  ## execute every page and render the site into _build/html
	@$(PRESS) build --jobs $(JOBS)

test: lint unit book verdicts nbval browser  ## everything: lint, unit tests, contract, verdicts, nbval, the site in a browser

lint: $(VENV)/.ready  ## ruff: errors, imports, format
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

unit: $(VENV)/.ready  ## unit tests of the library and the press, and the contract of the pages
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist worksteal --ignore tests/browser --ignore tests/pages

verdicts: book  ## the executed pages' verdicts against the committed ones; a second execution must repeat them
	@$(PRESS) verdicts
	@$(PY) -m pytest -q tests/pages

nbval: $(VENV)/.ready  ## nbval on the pages that changed and a rotating eighth of the rest (ALL=1: on every page)
	@$(PRESS) nbval $(if $(ALL),--all)

browser: book  ## the built site in Chromium, offline
	@$(PY) -m pytest -q -n $(JOBS) tests/browser

page: $(VENV)/.ready  ## execute and render one page: make page PAPER=hopfield
	@test -n "$(PAPER)" || { echo "which one? make page PAPER=hopfield"; exit 2; }
	@$(PRESS) page $(PAPER)

new: $(VENV)/.ready  ## the three files of a new paper: make new PAPER=hopular
	@test -n "$(PAPER)" || { echo "which one? make new PAPER=hopular"; exit 2; }
	@$(PRESS) new $(PAPER)

serve: $(VENV)/.ready  ## serve the built site on this machine
	@$(PRESS) serve

lab: $(VENV)/.ready  ## the notebooks in JupyterLab
	@$(PY) -c 'import jupyterlab' 2>/dev/null || $(PY) -m pip install --quiet --disable-pip-version-check jupyterlab==4.6.6
	@$(VENV)/bin/jupyter lab notebooks

gpu: $(VENV)/.ready  ## the CUDA tests
	@$(PY) -m pytest -q -m gpu

bench: $(VENV)/.ready  ## the press and the methods about speed, against their peers (QUICK=1: seconds)
	@$(PY) -m benchmarks $(if $(QUICK),--quick)

doctor: $(VENV)/.ready  ## what this machine lacks, and how to get it
	@$(PRESS) doctor

clean:  ## remove all build products
	rm -rf _build
