# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
SOURCES := sfexport optimum tests benchmarks examples

.PHONY: demo test fuzz lint format clean

demo: $(READY)
	$(VENV)/bin/sfexport demo

test: $(READY)
	$(VENV)/bin/python -m pytest -q

# Hostile input, damage and kills in large: FUZZ='--seed 7 --minutes 20' for other ones.
fuzz: $(READY)
	$(VENV)/bin/python -m tests.fuzz $(FUZZ)

lint: $(READY)
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)

format: $(READY)
	$(VENV)/bin/ruff check --fix $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)

# The stamp is written last: an interrupted installation is repeated.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[torch,dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) sfexport-demo build *.egg-info .pytest_cache .ruff_cache .hypothesis
