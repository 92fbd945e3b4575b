PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test lint bench docs clean

help: ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-7s %s\n", $$1, $$2}'

setup: .venv/.twofold ## a virtual environment in .venv with twofold and its default encoders

demo: setup ## the main job on shipped data: pictures and words come to share a space (offline)
	$(BIN)/twofold demo

test: .venv/.twofold-dev ## the whole test suite, one process a core; the tests of a file stay together
	$(BIN)/pytest -n auto --dist loadfile

lint: .venv/.twofold-dev ## style, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.twofold-bench ## every benchmark, peers side by side, into benchmarks/results
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

docs: .venv/.twofold-dev ## the reference, from the docstrings, into docs/reference
	$(BIN)/pdoc --docformat markdown --output-directory docs/reference twofold

clean: ## forget the environment and every cache inside the checkout
	rm -rf .venv build docs/reference src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

.venv/.twofold: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/.twofold-dev: .venv/.twofold
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

.venv/.twofold-bench: .venv/.twofold-dev
	$(BIN)/pip install --quiet -c constraints.txt -e ".[bench]"
	touch $@
