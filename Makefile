# `make demo` and `make test` set up what they need: a virtual environment in .venv with the pinned packages.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# A process takes up to 2.5 GB.
TEST_PROCESSES ?= 2

DEMO_MODEL := examples/tiny_moe/model
DEMO_RAM ?= 56MiB
DEMO_PROMPT ?= class FileReader:

.PHONY: demo test lint bench setup clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable '.[test,lint,bench]'
	touch $@

demo: setup
	$(BIN)/offload plan $(DEMO_MODEL) --ram $(DEMO_RAM) --context 512
	$(BIN)/offload run $(DEMO_MODEL) --ram $(DEMO_RAM) --context 512 --nvme .demo-store -n 160 --echo --temperature 0.7 --top-p 0.9 --seed 3 \
		--prompt "$(DEMO_PROMPT)"

test: setup
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks all

clean:
	rm -rf $(VENV) .demo-store .bench
