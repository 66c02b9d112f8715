# Everything from nothing: each target makes its own environment in .venv first. `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
# torch is pinned and comes first: pip then picks the CPU build where one is offered, and the package's own range is already met.
TORCH := torch==2.13.0 torchvision==0.28.0
PYTEST := $(BIN)/python -m pytest -q --numprocesses 2 --dist worksteal

.PHONY: help demo test test-slow lint clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

.venv/torch.installed: Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	@touch $@

.venv/report.installed: .venv/torch.installed pyproject.toml
	$(BIN)/pip install --quiet --editable '.[report]'
	@touch $@

.venv/dev.installed: .venv/torch.installed pyproject.toml
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

demo: .venv/report.installed ## a real search on the embedded images, under six minutes on two cores
	$(BIN)/capnas search resnet --data fashion-mnist-12k --trials 10 --epochs 3 --max-macs 6M --values combined --workers 2 --out runs/demo
	$(BIN)/capnas best runs/demo --code runs/demo/best.py
	$(BIN)/capnas report runs/demo --html runs/demo/report.html

lint: .venv/dev.installed ## style, import directions, types
	$(BIN)/ruff check capnas search_spaces tests examples results
	$(BIN)/ruff format --check --quiet capnas search_spaces tests examples results
	$(BIN)/lint-imports
	$(BIN)/mypy

test: lint ## every test but the slow ones, two side by side, under ten minutes on two cores
	$(PYTEST)

test-slow: .venv/dev.installed ## the tests that take minutes each
	$(PYTEST) -m slow

clean: ## remove the environment and caches, never results or runs
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
