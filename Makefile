# make install | reproduce | test | lint | bench
# Each works on a fresh machine with python >= 3.11, a C++ compiler and git. PYTHON names another interpreter, OUT another folder.

PYTHON ?= python3
OUT ?= results/theory
BIN := .venv/bin

.PHONY: install reproduce test test-native test-interpreted lint bench

install: .venv/installed

# torch first: with it at hand the CPU library is built ahead, by the compiler here and against that torch
.venv/installed: pyproject.toml setup.py constraints.txt $(wildcard kernels/cpu/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools ninja torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[experiments,test,dev]'
	@touch $@

reproduce: install
	$(BIN)/mixfeat reproduce theory --resume --out $(OUT)

# The operators also run on Triton's kernels, in its interpreter: a process of its own, as triton decides once. Both runs share the
# cores, so threads that wait for work must not hold on to theirs.
test: install lint
	OMP_WAIT_POLICY=passive $(MAKE) --no-print-directory --jobs=2 --output-sync=target test-native test-interpreted

test-native: install
	$(BIN)/python -m pytest

test-interpreted: install
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m triton tests/test_patch_conv.py tests/test_pairwise_mixup_loss.py

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: install
	$(BIN)/python -m pytest benchmarks
