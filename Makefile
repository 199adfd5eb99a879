# make demo        make the environment, then train and evaluate a model on synthetic slides (OUT=DIR: elsewhere)
# make test        make the environment if needed, then run the tests, but for the slow ones
# make test-slow   the slow ones: processes that are killed, benches, studies
# make test-all    all tests
# make faults      the nightly campaign: killed commands, full disks, damaged files (about 20 minutes)
# make env         make the environment alone: .venv, from requirements.txt
# make docs        build the documentation into site/ (docs/*.md); any warning is an error
# make lint types  the checks besides the tests

PYTHON ?= $(or $(shell command -v python3.11),python3)
OUT ?= demo
RUN := .venv/bin/python

.PHONY: env demo test test-slow test-all faults docs lint types

env:
	@$(PYTHON) tools/make_env.py

demo: env
	@$(RUN) tools/demo.py --out "$(OUT)"

PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile

test: env
	@$(PYTEST) -m "not slow"

test-slow: env
	@$(PYTEST) -m slow

test-all: env
	@$(PYTEST)

faults: env
	@OMP_NUM_THREADS=1 $(RUN) -m tools.faults

docs: env
	@$(RUN) tools/make_docs.py
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "site/index.html"

lint: env
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check

types: env
	@$(RUN) -m pyright
