.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
DEMO := .venv/.demo
READY := .venv/.ready
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
SHAPED := functional transfer_functions kernels losses terms taps pairs distiller preflight augment visualize

BUILD_DOCS := rm -rf site && $(BIN)/python docs/site/build.py site

.PHONY: help demo test test-slow check docs bench schema clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO) ## Train a teacher and a student on digits, with and without attention transfer (minutes)
	$(BIN)/attention-transfer demo

test: $(READY) ## Run the tests, and the core ones again with every array shape checked
	$(PYTEST)
	$(PYTEST) --shapes $(addprefix tests/test_,$(addsuffix .py,$(SHAPED)))

test-slow: $(READY) ## Run the slow tier too
	$(PYTEST) --slow

check: $(READY) ## Lint, check the format, the types, and that the documentation builds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BUILD_DOCS)

docs: $(READY) ## Build the documentation site into site/
	$(BUILD_DOCS)
	@echo "Open site/index.html; for the search: $(BIN)/python -m http.server --directory site"

bench: $(READY) ## Measure the speed against the floor and others, and write docs/speed.md (14 minutes)
	$(BIN)/attention-transfer bench

schema: $(READY) ## Compile the schema of Caffe's files again, after a change of caffe.proto
	cd attention_transfer/caffe/schema && $(CURDIR)/$(BIN)/python -m grpc_tools.protoc -I. \
		--descriptor_set_out=caffe.binpb caffe.proto

clean: ## Remove the virtual environment and caches
	rm -rf site .venv .pytest_cache .ruff_cache .mypy_cache

$(DEMO): pyproject.toml constraints.txt
	@echo "Setting up .venv: PyTorch and what the demo needs, several GB, a few minutes the first time"
	$(PYTHON) -m venv .venv
	$(INSTALL) ".[demo]"
	@touch $@

$(READY): $(DEMO)
	@echo "Adding to .venv what the tests, the checks and the documentation need"
	$(INSTALL) ".[dev]"
	@touch $@
