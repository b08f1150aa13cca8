# make demo: every phase of Dreamer 4 on this machine.  make test: what CI runs.  Both set themselves up in .venv.
SHELL := /bin/bash
BIN := $(CURDIR)/.venv/bin
STAMP := .venv/.installed
NEWEST := python3 python3.14 python3.13 python3.12 python3.11
PYTHON ?= $(firstword $(foreach p,$(NEWEST),$(shell command -v $(p) >/dev/null 2>&1 && $(p) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && echo $(p))))
APT := apt-get install -y -qq --no-install-recommends
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup gl demo test gpu export readme check notebooks pytest clean

help:
	@echo "make setup | demo | test | gpu | export | clean"

setup: gl $(STAMP)

$(STAMP): settings.ini setup.py
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; install it, or type: make setup PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { echo "cannot make .venv; on Debian or Ubuntu type: sudo apt-get install python3-venv"; exit 1; }
	@echo "installing the package and its tools in .venv (about 6 GB, some minutes)"
	$(BIN)/python -m pip install -q -e ".[dev]"
	@touch $@

# MuJoCo draws without a screen through OSMesa (a CPU) or EGL. One of them is enough.
gl:
	@[[ "$$(uname)" != Linux ]] || [[ "$$(PATH=$$PATH:/sbin:/usr/sbin ldconfig -p)" =~ libOSMesa|libEGL\.so ]] || { \
	root=""; [[ $$(id -u) = 0 ]] || root="sudo -n"; \
	echo "installing libosmesa6 and libegl1, with which MuJoCo draws without a screen"; \
	command -v apt-get >/dev/null && $$root true 2>/dev/null && $$root apt-get update -qq && \
	{ $$root env DEBIAN_FRONTEND=noninteractive $(APT) libegl1 libgl1-mesa-dri; $$root env DEBIAN_FRONTEND=noninteractive $(APT) libosmesa6; } || \
	echo "MuJoCo needs OSMesa or EGL to draw; type: sudo apt-get install libosmesa6 libegl1 (or install them with your own package manager)"; }

demo: setup
	$(BIN)/dreamer4 demo $(ARGS)

# The front page is notebook index, as it was last run.
readme: setup
	$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --no-input --output-dir . --output README nbs/index.ipynb

# The notebooks are the source: their modules and their cleaned form must be what is committed.
test: setup
	@$(MAKE) --no-print-directory check && time $(MAKE) --no-print-directory notebooks && time $(MAKE) --no-print-directory pytest

# What only a GPU can tell, in under ten minutes, into nbs/results/gpu.json. ARGS="--minutes 20 --only bench" and so on.
gpu:
	@nvidia-smi -L 2>/dev/null | grep -q GPU || { echo "make gpu needs an NVIDIA GPU with its driver (80 GB for all of it); a trial without: python tests/gpu/run.py --device cpu --small"; exit 2; }
	@$(MAKE) --no-print-directory setup
	$(BIN)/python tests/gpu/run.py $(ARGS)

export: setup
	$(BIN)/nbdev_clean && $(BIN)/nbdev_export

check:
	@before=$$(mktemp -d) && trap "rm -rf $$before" EXIT && cp -r nbs dreamer4_nb $$before/ && $(BIN)/nbdev_clean && $(BIN)/nbdev_export && \
	diff -r -x __pycache__ $$before/nbs nbs >/dev/null && diff -r -x __pycache__ $$before/dreamer4_nb dreamer4_nb || \
	{ echo "notebooks and modules do not agree, or a notebook is not clean; make export was just done: look at it and commit it"; exit 1; }

# Two notebooks at a time, each with one thread: faster than one with two.
notebooks:
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing

pytest:
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations 15 tests

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis _docs _proc
	find . -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
