# From a fresh clone, `make demo` and `make test` are each the only command needed.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
# What an installation depends on: until one of these changes, it is not repeated.
INPUTS := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: help demo test lint clean
.DEFAULT_GOAL := help

help: ## print this
	@echo "Variables: PYTHON=$(PYTHON) (makes the environment), VENV=$(VENV), ARGS= (passed on: make test ARGS='-k doctor')"
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

demo: $(VENV)/.installed ## train on procedural flowers, segment, generate, report: a few minutes on 2 CPU cores
	$(BIN)/factorkit demo $(ARGS)

# A process a core, of one thread: the tensors of the tests are so small that handing them to a second thread
# takes longer than the work. ARGS="-n 0 -s" shows what tests print.
test: $(VENV)/.installed-test ## the test suite
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n logical --dist loadfile --timeout=300 $(ARGS)

lint: $(VENV)/.installed-test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info factorkit/_C.*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis

# Cleared first, should an earlier attempt have been interrupted halfway.
$(VENV)/.created:
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(VENV)/.installed: $(INPUTS) $(VENV)/.created
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[baselines]"
	touch $@

# It holds all that .installed asks for, so that `make demo` after `make test` installs nothing.
$(VENV)/.installed-test: $(INPUTS) $(VENV)/.created
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $(VENV)/.installed $@
