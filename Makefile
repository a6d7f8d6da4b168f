# `make demo` and `make test` set up everything they need (.venv with Python 3.12+ and the pinned requirements).
PYTHON := .venv/bin/python
# Most of the tests' time is XLA compiling: two workers on two cores.
WORKERS ?= 2

.PHONY: demo test parity lint setup setup-test

# On the CPU: with libtpu there, which the tests compile with, JAX would look for a TPU first and complain.
demo: setup
	JAX_PLATFORMS=cpu $(PYTHON) main.py demo

test: setup-test lint
	JAX_PLATFORMS=cpu $(PYTHON) -m pytest -n $(WORKERS) --dist loadfile

# Compares with transformers, live, on checkpoints that it writes for the occasion (in .parity, an environment of its own).
parity: setup-test
	JAX_PLATFORMS=cpu $(PYTHON) tests/parity/live.py

lint: setup-test
	.venv/bin/ruff check .

setup:
	@scripts/setup

setup-test:
	@scripts/setup test
