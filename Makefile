# Every verb makes what it needs; on a fresh machine `make demo` or `make test` is all there is.
SHELL := bash
PYTHON ?= python3
# A package index to take torch from first; the README's line for machines without a GPU sets it.
TORCH_INDEX ?=
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt
CODE := src tests $(wildcard examples benchmarks)

.PHONY: help demo test check fix same bench faults
help:  ## list the verbs
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 12

.venv/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(BIN)/pip install --quiet --index-url $(TORCH_INDEX) $(shell grep ^torch== constraints.txt))
	$(INSTALL) --editable .
	@touch $@

.venv/.dev: .venv/.runtime
	$(INSTALL) --editable '.[dev]'
	@touch $@

demo: .venv/.runtime  ## train the embedded model on real questions, offline, and show what changed
	$(BIN)/lorafit demo --overwrite

test: .venv/.dev  ## run the tests: minutes, no network, no GPU
	$(BIN)/pytest -q -n 2 -m 'not gpu and not slow'

check: .venv/.dev  ## look, change nothing: format, lint, types, imports, the house's numbers
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/pytest -q tests/test_house.py

fix: .venv/.dev  ## format, and mend what the linter can mend
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

same: .venv/.dev  ## show that the numbers have not moved: a golden loss curve
	$(BIN)/pytest -q tests/test_same.py

# Peers' environments are made outside the repository: gigabytes, once. BENCH='--rounds 5 --data d1'
bench: .venv/.dev  ## measure against the peers on this CPU; BENCH='--smoke' tries it all in minutes
	TORCH_INDEX=$(TORCH_INDEX) $(BIN)/python benchmarks/cpu.py $(BENCH)

faults: .venv/.dev  ## kill, tear and fill the disk at every operation; writes docs/reliability.md
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.faults.sweep $(FAULTS)
