# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
SOURCES := sfexport optimum tests benchmarks examples docs
# Exact versions with hashes: base.txt for `make demo`, test.txt for `make test`, the oldest that pyproject.toml allows.
LOCKS := requirements
UV := uv==0.13.9
TORCH := $(shell grep '^torch==' constraints.txt)
# Part of each stamp's name: another Python makes the environment anew.
VERSION := $(shell $(PYTHON) -c 'import platform; print(platform.python_version())')
READY := .ready-$(VERSION)
# Each of two workers takes half of the tests, so that what a file's fixtures make is made once; the faster one takes
# over some of the other's at the end.
PARALLEL := -n 2 --dist worksteal
# Threads of NumPy and PyTorch wait actively: with two in each worker, the suite takes a third longer on two cores.
test test-oldest test-oldest-base test-newest test-newest-base: export OMP_NUM_THREADS := 1

.PHONY: demo test test-oldest test-oldest-base test-newest test-newest-base fuzz lock lint format docs clean

demo: .venv-demo/$(READY)
	.venv-demo/bin/sfexport demo

test: .venv/$(READY)
	.venv/bin/python -m pytest -q $(PARALLEL)

# Hostile input, damage and kills in large: FUZZ='--seed 7 --minutes 20' for other ones.
fuzz: .venv/$(READY)
	.venv/bin/python -m tests.fuzz $(FUZZ)

# The lowest versions that pyproject.toml allows: first without PyTorch, then with it, whose packages want newer ones.
test-oldest: test-oldest-base .venv-oldest/$(READY)
	.venv-oldest/bin/python -m pytest -q $(PARALLEL)

test-oldest-base: .venv-oldest-base/$(READY)
	.venv-oldest-base/bin/python -m pytest -q $(PARALLEL)

# The newest versions that pyproject.toml allows and the registry has today: never locked, installed anew each time.
# TORCH=torch takes the newest PyTorch too.
test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet $(TORCH) --editable '.[torch,dev]'
	.venv-newest/bin/python -m pytest -q $(PARALLEL)

test-newest-base:
	$(PYTHON) -m venv --clear .venv-newest-base
	.venv-newest-base/bin/python -m pip install --quiet --editable '.[test]'
	.venv-newest-base/bin/python -m pytest -q $(PARALLEL)

# PyTorch is in no lock: which of its builds is right depends on the machine. What it needs is.
define install
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --no-compile --require-hashes --no-deps --only-binary :all: --requirement $<
endef

# The stamp is written last: an interrupted installation is repeated.
define finish
	$(@D)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(@D)/bin/python -m pip check
	touch $@
endef

.venv-demo/$(READY): $(LOCKS)/base.txt pyproject.toml
	$(install)
	$(finish)

.venv/$(READY): $(LOCKS)/test.txt constraints.txt pyproject.toml
	$(install)
	$(@D)/bin/python -m pip install --quiet $(TORCH)
	$(finish)

.venv-oldest/$(READY): $(LOCKS)/oldest.txt constraints.txt pyproject.toml
	$(install)
	$(@D)/bin/python -m pip install --quiet $(TORCH)
	$(finish)

.venv-oldest-base/$(READY): $(LOCKS)/oldest-base.txt pyproject.toml
	$(install)
	$(finish)

# Versions that are locked already and still fit are kept; UPGRADE=--upgrade takes the newest of everything.
COMPILE = .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes \
	--custom-compile-command 'make lock' --no-emit-package torch --group build pyproject.toml
ALL := --extra torch --extra dev
lock:
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --quiet $(UV)
	$(COMPILE) $(UPGRADE) $(ALL) --constraint constraints.txt --output-file $(LOCKS)/test.txt
	$(COMPILE) --upgrade --constraint $(LOCKS)/test.txt --output-file $(LOCKS)/base.txt
	$(COMPILE) $(UPGRADE) --resolution lowest-direct $(ALL) --output-file $(LOCKS)/oldest.txt
	$(COMPILE) $(UPGRADE) --resolution lowest-direct --extra test --output-file $(LOCKS)/oldest-base.txt

lint: .venv/$(READY)
	.venv/bin/ruff check $(SOURCES)
	.venv/bin/ruff format --check $(SOURCES)
	.venv/bin/mypy
	# Python 3.10 has no import-linter.
	if [ -x .venv/bin/lint-imports ]; then .venv/bin/lint-imports; fi
	.venv/bin/python docs/generate_api.py --check

# docs/api.md is made of docstrings.
docs: .venv/$(READY)
	.venv/bin/python docs/generate_api.py

format: .venv/$(READY)
	.venv/bin/ruff check --fix $(SOURCES)
	.venv/bin/ruff format $(SOURCES)

clean:
	rm -rf .venv .venv-* sfexport-demo build *.egg-info .pytest_cache .ruff_cache .hypothesis
