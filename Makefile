# From a fresh clone, `make demo` and `make test` are each the only command needed.

PYTHON ?= python3
VENV ?= .venv
WHEEL ?= .venv-wheel
ARGS ?=

BIN := $(VENV)/bin
# What an installation depends on: until one of these changes, it is not repeated.
INPUTS := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: help demo test test-fast wheel-test bench gpu gpu-sanitize lint docs clean
.DEFAULT_GOAL := help

help: ## print this
	@echo "Variables: PYTHON=$(PYTHON) (makes the environment), VENV=$(VENV), WHEEL=$(WHEEL), ARGS= (passed on: make test ARGS='-k doctor')"
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile

demo: $(VENV)/.installed ## train on procedural flowers, segment, generate, report: a few minutes on 2 CPU cores
	$(BIN)/factorkit demo $(ARGS)

# A process a core, of one thread: the tensors of the tests are so small that handing them to a second thread
# takes longer than the work. Bytecode is written whatever the environment says: half of the collection is compiling
# the tests, and subprocesses would compile the package again. ARGS="-n 0 -s" shows what tests print.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder --timeout=300

test: $(VENV)/.installed-test ## the test suite
	$(PYTEST) $(ARGS)

# Everything but the package is copied away from it, so that nothing but the wheel can be imported;
# tests/test_build.py is about a checkout. PYTHON=python3.13 tries another Python.
wheel-test: ## build a wheel, install it into an environment of its own (WHEEL=), run the test suite there
	rm -rf $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)
	mkdir $(WHEEL)/tree
	$(WHEEL)/bin/python -m pip wheel --disable-pip-version-check --no-deps -w $(WHEEL)/wheels .
	$(WHEEL)/bin/python -m pip install --disable-pip-version-check -c constraints.txt "$$(echo $(WHEEL)/wheels/factorkit-*.whl)[test]"
	git ls-files -z -- ':!factorkit' ':!kernels' | tar -c --null -T - | tar -x -C $(WHEEL)/tree
	cd $(WHEEL)/tree && OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(abspath $(WHEEL))/bin/python -m pytest -n logical --dist loadfile --no-loadscope-reorder \
		--timeout=300 --ignore tests/test_build.py $(ARGS)

test-fast: $(VENV)/.installed-test ## the tests without those marked slow: what to run before every commit
	$(PYTEST) -m "not slow" $(ARGS)

bench: $(VENV)/.installed-test ## the quick benchmarks: every op and training step on one CPU thread, in 5 minutes
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest benchmarks/ --benchmark-only -q -k "not compiled" --batch 4 --benchmark-max-time 0.05 \
		--benchmark-columns=median,iqr,rounds --benchmark-autosave $(ARGS)

# No environment of their own: a GPU machine has its torch already, and often no network.
gpu: ## build, tests, timings and a profile on a GPU, in 9 minutes: ARGS='--out FOLDER' (docs/gpu.md)
	$(PYTHON) -m benchmarks.gpu_box $(ARGS)

gpu-sanitize: ## compute-sanitizer (memcheck, racecheck) over the CUDA ops
	$(PYTHON) -m benchmarks.gpu_box --sanitize $(ARGS)

lint: $(VENV)/.installed-test ## ruff (rules and format), the import contracts, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: $(VENV)/.installed-test ## the documentation site, into site/: without network, a warning fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean: ## remove the environment and everything built
	rm -rf $(VENV) $(WHEEL) build dist site *.egg-info factorkit/_C.*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis

# Cleared first, should an earlier attempt have been interrupted halfway.
$(VENV)/.created:
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(VENV)/.installed: $(INPUTS) $(VENV)/.created
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[baselines]"
	touch $@

# It holds all that .installed asks for, so that `make demo` after `make test` installs nothing.
$(VENV)/.installed-test: $(INPUTS) $(VENV)/.created
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[test,docs]"
	touch $(VENV)/.installed $@
