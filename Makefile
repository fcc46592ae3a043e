# Each target sets itself up: a machine with Python 3.11 or newer, pip and make is enough.
# `make test PYTHON=python3.12` takes another Python; run `make clean` before changing it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LM_EVAL := $(VENV)/.ready-lm-eval

unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.PHONY: help demo test test-all test-releases test-gpu lint docs heads comparison pareto peers speed clean

help: ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST)

demo: $(READY) ## the quick look: a small model, with and without pruning
	mkdir -p build
	$(BIN)/kvprune demo --html build/demo.html

test: lint ## lint and the tests, without the slow ones
	$(BIN)/python -m pytest -n 2

test-all: lint $(LM_EVAL) ## lint and all tests, with more examples each
	HYPOTHESIS_PROFILE=ci $(BIN)/python -m pytest -n 2 -m ""

test-releases: $(READY) ## the core of the tests on the oldest and the newest transformers release
	$(BIN)/python -m bench.releases oldest newest

docs: $(READY) ## the documentation as a site, in build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # not -q: it would count no warnings

test-gpu: $(READY) ## the tests that need CUDA (skipped, and said so, without it)
	$(BIN)/python -m pytest -m gpu -rs tests/gpu

heads: $(READY) ## train the heads that ship (an hour and a half of two cores)
	$(BIN)/python -m bench.heads --ship
	$(BIN)/python -m bench.saliency --ship

comparison: $(READY) ## the published comparison (two hours of two cores); goes on where it was stopped
	$(BIN)/python -m bench.comparison $(ARGS)

pareto: $(READY) ## shares, bits and policies: nats lost against bytes (two hours of two cores)
	$(BIN)/python -m bench.pareto $(ARGS)

peers: $(READY) ## kvpress beside kvprune, in an environment of its own; ARGS="speed --repeats 2"
	$(BIN)/python -m bench.peers $(ARGS)

speed: $(READY) ## time, memory and FLOPs against dense (50 minutes of two cores); ARGS="--parts whole"
	$(BIN)/python -m bench.speed $(ARGS)
	$(BIN)/python -m bench.performance

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean: ## remove all that make and the tools made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is there only while the venv is whole. A venv without one was interrupted and
# is made anew; one with a stamp that is merely old is brought up to date where it is.
# The constraints hold in the one pip call that installs torch: an open range would take
# the newest torch, and with it gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): the first time this takes a minute or more."
	test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	rm -f $@
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# Half a gigabyte that only the tests of lm-evaluation-harness need.
$(LM_EVAL): $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev,lm-eval]"
	touch $@
