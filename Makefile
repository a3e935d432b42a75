# praxino: `make help` lists the targets. Everything runs in .venv, which `make install` builds and keeps up to date.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed
# the first interpreter that runs, has venv and is 3.11 to 3.13 (a pyenv shim can exist and fail)
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
# data of the demo: a folder of videos; empty: moving shapes made on the spot
DATA ?=
DEMO ?= demo
# a file of tests a core
PARALLEL := --numprocesses auto --maxprocesses 8 --dist loadfile

.PHONY: help install demo test test-slow lint format type build lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  make demo DATA=DIR  the same on your own folder of videos"

install: $(STAMP)  ## build the virtual environment with the tested versions

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 with venv found (Debian: apt install python3-venv); set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(RUN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install  ## videos to gallery: train a VAE and a DiT, sample, predict; DATA=DIR takes your own folder of videos
	@test -n "$(DEMO)"
ifeq ($(DATA),)
	$(RUN)/praxino-pipeline experiment=demo out=$(DEMO)
else
	$(RUN)/praxino-pipeline experiment=demo_own data.root="'$(DATA)'" out=$(DEMO)
endif

test: install  ## run the test suite without the slow tests
	$(RUN)/python -m pytest -m "not slow" $(PARALLEL)

test-slow: install  ## run the slow tests
	$(RUN)/python -m pytest -m slow $(PARALLEL)

lint: install  ## check style, formatting and types
	$(RUN)/ruff check . && $(RUN)/ruff format --check . && $(RUN)/mypy

format: install  ## format the code and sort the imports
	$(RUN)/ruff check --fix . ; $(RUN)/ruff format .

type: install  ## check the types
	$(RUN)/mypy

build: install  ## build the wheel and the source archive into dist/
	$(RUN)/python -m build

lock: install  ## write the installed versions to constraints.txt
	$(RUN)/pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean:  ## remove caches, builds and the demo's output; keep .venv
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache demo
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
