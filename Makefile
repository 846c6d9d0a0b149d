# Everything on a fresh machine that has Python (3.11 or newer) and make:
#   make quickstart    a teacher, then low-bit students with and without it, on real images; table, plot, and an export
#   make test          lint, format, types, and the tests that are not slow
#   make test-slow     the tests that kill processes, start ranks or Ray, or train for minutes
#   make slurm         trainings that are preempted, killed and cut short on a SLURM cluster of the tests' own

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin

.PHONY: quickstart test lint types tests test-slow slurm install clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m qtrain +experiment=quickstart
	$(BIN)/python -m qtrain task=export checkpoint=outputs/quickstart/w2a2-distill

test: lint types tests

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

# One thread for each of the processes that share the cores.
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

tests: $(VENV)/.installed-test
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed-test
	$(PYTEST) -m slow

# By one process: its scenes want the cores for themselves. Needs root, slurmctld, slurmd, slurm-client, munge, iproute2.
slurm: $(VENV)/.installed-test
	QTRAIN_REQUIRE_SLURM=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/slurm

install: $(VENV)/.installed-test

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "qtrain needs Python 3.11 or newer; give one with make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# The stamps make pip run again when, and only when, what it installs has changed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[export]' -c constraints.txt
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test]' -c constraints.txt
	@touch $@ $(VENV)/.installed

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
