# Two commands: `make train`, `make test`. Each sets up its own .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
GPU_TESTS := $(addprefix tests/test_,hopper_kernels.py route_kernels.py router_product.py \
	ragged_groups.py quantized_experts.py fp8_experts.py quantized_bank.py every_backend.py \
	paged_kernels.py schedule.py remote_gpus.py settle.py \
	quantize_kernels.py norm_kernels.py heads_kernels.py)
ARGS ?=
EXTRAS ?= dev# e.g. make train EXTRAS=dev,cuda13

.PHONY: help setup train infer test test-slow test-all test-gpu check format docs wheel check-wheel clean

help:
	@echo "make train     set up, then train the tiny preset on 8 fake CPU devices (at most 5 minutes)"
	@echo "make test      set up, then run the first tier of tests (at most 20 minutes on 2 cores)"
	@echo "make test-slow the second tier;   make test-all  both;   make check  lint and types"
	@echo "make infer     talk to the packaged model;   ARGS='...' passes flags to train and infer"
	@echo "make docs      the documents as a site in site/, links checked"
	@echo "make wheel     sdist and wheel in dist/;   make check-wheel  installs it and runs examples/"
	@echo "EXTRAS=dev,cuda13 (or dev,tpu) before the first make sets up for an accelerator"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@if command -v uv >/dev/null 2>&1; then \
		echo "setting up $(VENV) with uv"; \
		uv venv -q --allow-existing --python $(PYTHON) $(VENV) && \
		uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[$(EXTRAS)]'; \
	else \
		echo "setting up $(VENV) with venv and pip"; \
		$(PYTHON) -m venv $(VENV) && \
		$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'; \
	fi
	@touch $(STAMP)

train: $(STAMP)
	$(BIN)/python train.py $(ARGS)

infer: $(STAMP)
	$(BIN)/python infer.py $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" $(ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu" $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not gpu" $(ARGS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest --gpu $(GPU_TESTS) $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(DOCS_STAMP): $(STAMP)
	@if command -v uv >/dev/null 2>&1; then \
		uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[docs]'; \
	else \
		$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'; \
	fi
	@touch $(DOCS_STAMP)

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The wheel is built from the sdist, which so has all that a build needs.
wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --installer $(shell command -v uv >/dev/null 2>&1 && echo uv || echo pip) >/dev/null
	@ls dist

check-wheel: wheel
	$(BIN)/python tests/check_wheel.py

clean:
	rm -rf $(VENV) runs build dist site *.egg-info
