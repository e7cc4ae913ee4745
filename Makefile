# `make demo` and `make test` set everything up on their own: a virtual environment in .venv, installed
# from constraints.txt, made anew when pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV   ?= .venv
# On Linux, PyPI's own torch brings several GB of CUDA libraries. On a machine without a GPU point
# TORCH_INDEX at PyTorch's CPU wheel index (see docs/jobs.md) and the CPU build is taken from there.
TORCH_INDEX ?=
# Where this is set, each of some hundred processes compiles the package anew.
export PYTHONDONTWRITEBYTECODE :=
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed

.PHONY: setup demo playground test check lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

data/quickstart/index.json: | $(STAMP)
	$(BIN)/python -m relora_ray.data.prepare configs/quickstart/austen.txt.bz2 --out data/quickstart \
		--tokenizer configs/quickstart/tokenizer --document-separator '<\|endoftext\|>|(?i:chapter [ivxlc0-9]+)' \
		--validation-fraction 0.05

demo: $(STAMP) data/quickstart/index.json
	$(BIN)/python -m relora_ray.launch configs/quickstart.yaml

# Also: make playground ARGS=--tour
playground: $(STAMP) data/quickstart/index.json
	$(BIN)/python -m cluster.local $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What to run while working: some minutes less than `make test`.
check: $(STAMP) lint
	$(BIN)/python -m pytest -m "not slow" -n 4

test: $(STAMP) lint
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) data/quickstart runs/quickstart
