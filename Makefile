# make demo: every phase of Dreamer 4 on this machine.  make test: what CI runs.  Both set themselves up in .venv.
SHELL := /bin/bash
BIN := $(CURDIR)/.venv/bin
STAMP := .venv/.installed
export PYTHON
export TORCH_INDEX
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup gl browser metaworld demo test gpu export readme docs execute check lint notebooks pytest clean

help:
	@echo "make setup | demo | test | lint | gpu | export | docs | execute | clean"

setup: gl $(STAMP)

$(STAMP): settings.ini setup.py
	@.ci/setup python
	@touch $@

# MuJoCo draws without a screen through OSMesa (a CPU) or EGL. One of them is enough.
gl:
	@.ci/setup gl

# The page of play is tested in Chromium. Without it these tests are skipped.
browser:
	@.ci/setup browser

# Meta-World and its pins, in an environment of its own: study 77 films its experts.
metaworld: gl
	@.ci/setup metaworld

# What was typed here is what the command says to type again.
demo: export DREAMER4_COMMAND = make demo$(if $(ARGS), ARGS="$(ARGS)")
demo: setup
	$(BIN)/dreamer4-nb demo $(ARGS)

# The front page is notebook index, as it was last run.
readme: setup
	$(BIN)/python .ci/readme > README.md

# Runs all notebooks and stores their outputs, in hours on two cores. ARGS="nbs/01_flow.ipynb --check" and so on.
execute: setup
	$(BIN)/python .ci/execute $(ARGS) && $(BIN)/nbdev_clean

# The course as a site, from stored outputs, without a network: _docs/html/index.html.
docs: setup
	$(BIN)/python docs/build.py

# The notebooks are the source: their modules and their cleaned form must be what is committed.
test: setup browser
	@$(MAKE) --no-print-directory check && time $(MAKE) --no-print-directory notebooks && time $(MAKE) --no-print-directory pytest

# What only a GPU can tell, in under ten minutes, into nbs/results/gpu.json. ARGS="--minutes 20 --only bench" and so on.
gpu:
	@nvidia-smi -L 2>/dev/null | grep -q GPU || { echo "make gpu needs an NVIDIA GPU with its driver (80 GB for all of it); a trial without: python tests/gpu/run.py --device cpu --small"; exit 2; }
	@$(MAKE) --no-print-directory setup
	$(BIN)/python tests/gpu/run.py $(ARGS)

export: setup
	$(BIN)/nbdev_clean && $(BIN)/nbdev_export

check:
	@.ci/check
	@$(MAKE) --no-print-directory lint

# ruff.toml and mypy.ini say what is looked at.
lint:
	$(BIN)/ruff check dreamer4_nb tests docs && $(BIN)/mypy

# Two notebooks at a time, each with one thread: faster than one with two.
notebooks:
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing

pytest:
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations 15 tests

clean:
	rm -rf .venv .venv-metaworld build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis _docs _proc
	find . -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
