# make help lists the targets
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-dev
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

QUICK := $(VENV)/.installed
THREADS ?= 2

.PHONY: help quickstart tiny-base install test test-slow bench lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(QUICK): pyproject.toml entry_points.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

quickstart: $(QUICK)  ## install, and fine-tune the embedded tiny model with LoRA (a minute and a half)
	$(BIN)/lightning-sft fit --config configs/quickstart.yaml

tiny-base: $(STAMP)  ## pre-train the embedded tiny model anew (13 minutes)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m lightning_sft.assets.build

$(STAMP): pyproject.toml entry_points.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ $(QUICK)

install: $(STAMP)  ## make .venv and install the package with everything that developing needs

test: $(STAMP)  ## the test suite (under 10 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(STAMP)  ## fresh environments and several processes (under 45 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

bench: $(STAMP)  ## training speed on one CPU thread, against the peers that are installed (docs/speed.md)
	$(BIN)/python benchmarks/train_speed.py

lint: $(STAMP)  ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## put every file into the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build ./*.egg-info
