# make install | reproduce | test | test-long | test-triton-3.6 | test-versions | coverage | lint | docs | wheel | bench
# | gpu | gpu-sanitize
# Each works on a fresh machine with python >= 3.11, a C++ compiler and git. PYTHON names another interpreter, OUT another folder.

PYTHON ?= python3
OUT ?= results/theory
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
RUN := $(BIN)/python

RESULTS ?= benchmarks/results

.PHONY: install reproduce test test-operators test-native test-triton test-interpreted test-long test-triton-3.6 test-versions coverage lint types docs wheel bench gpu \
	gpu-sanitize

install: $(VENV)/installed

# pip first, as older ones know no dependency groups; then torch: with it at hand the CPU library is built ahead, by the compiler
# here and against that torch
$(VENV)/installed: pyproject.toml setup.py $(CONSTRAINTS) $(wildcard kernels/cpu/* kernels/cpu/isa/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) pip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) setuptools ninja torch
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[experiments,test]' --group dev
	@touch $@

reproduce: install
	$(BIN)/mixfeat reproduce theory --resume --out $(OUT)

# Lint and all tests, with the same random inputs every time (MIXFEAT_TEST_SEED draws others), in runs that share two cores:
# so threads that wait for work must not hold on to theirs.
test: install
	OMP_WAIT_POLICY=passive $(MAKE) --no-print-directory --jobs=2 --output-sync=target lint test-operators test-native test-interpreted test-triton

# What `make test-versions` runs too, on the CPU's kernels and in plain PyTorch
OPERATOR_TESTS := accuracy activations autograd binary_cross_entropy checks compile cross_entropy cutmix derivatives \
	export gradient_descent infinities mixup nn pairwise_mixup_loss patch_conv registration surroundings

test-operators: install
	$(RUN) -m pytest -m "not kernels" $(OPERATOR_TESTS:%=tests/test_%.py)

# All others
test-native: install
	$(RUN) -m pytest -m "not kernels" $(OPERATOR_TESTS:%=--ignore=tests/test_%.py)

# The operators on Triton's kernels, in its interpreter: a process of its own, as triton decides once
test-interpreted: install
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -m "triton and not kernels" $(OPERATOR_TESTS:%=tests/test_%.py)

# The kernels alone, interpreted; and compiled for every target
test-triton: install
	$(RUN) -m pytest -m kernels tests/test_triton_*.py

# With new random inputs, whose seed is in the report: 10,000 examples of every property (20 in the interpreter), 51 kills,
# every Triton kernel compiled for every target; some three hours
test-long: install
	MIXFEAT_TEST_LONG=1 OMP_NUM_THREADS=1 $(RUN) -m pytest --timeout=7200 tests/test_properties.py tests/test_fuzz.py tests/test_kills.py tests/test_triton_compile.py
	MIXFEAT_TEST_LONG=1 OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(RUN) -m pytest --timeout=7200 -m triton tests/test_properties.py

# The kernels on the oldest Triton that is served, whose interpreter needs a NumPy below 2.4, in an environment of its own
test-triton-3.6:
	mkdir -p build
	sed -e 's/^triton==.*/triton==3.6.0/' -e 's/^numpy==.*/numpy==2.3.5/' constraints.txt > build/constraints-triton-3.6.txt
	$(MAKE) VENV=.venv-triton-3.6 CONSTRAINTS=build/constraints-triton-3.6.txt test-triton test-interpreted

# The operators on the oldest PyTorch that is served and on the newest, each in an environment of some GB, with the CPU
# library that `make install` has built, which must load under all of them
TORCH_VERSIONS ?= 2.10.0 2.14.1

test-versions: $(TORCH_VERSIONS:%=test-torch-%)

test-torch-%: install
	mkdir -p build
	grep -vE '^(torch|triton|numpy|cuda-|nvidia-)' $(CONSTRAINTS) > build/constraints-torch.txt
	$(PYTHON) -m venv .venv-torch-$*
	.venv-torch-$*/bin/python -m pip install --quiet --constraint build/constraints-torch.txt torch==$* setuptools ninja
	MIXFEAT_SKIP_CPU_BUILD=1 .venv-torch-$*/bin/python -m pip install --quiet --constraint build/constraints-torch.txt \
		--no-build-isolation --editable '.[test]'
	CXX=none .venv-torch-$*/bin/python -m mixfeat check --quick --backend cpu
	.venv-torch-$*/bin/python -m pytest -m "not kernels" $(OPERATOR_TESTS:%=tests/test_%.py)

# Branches of mixfeat/ that the suites run, child processes included
coverage: install
	$(BIN)/coverage erase
	$(MAKE) --no-print-directory RUN="$(BIN)/coverage run" test-operators test-native test-interpreted test-triton
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: install types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell

types: install
	rm -rf build/types && mkdir -p build/types/mixfeat
	ln -s $(abspath $(wildcard mixfeat/*) kernels benchmarks) build/types/mixfeat/
	$(BIN)/mypy

# The site, into build/docs, with warnings as errors
docs: install
	$(BIN)/python -m sphinx -W --keep-going -q -d build/doctrees docs build/docs
	@echo build/docs/index.html

# Into dist/: one wheel with the CPU library for all of Linux from glibc 2.28 on, whatever Python 3 and PyTorch; checked without a compiler
wheel: install
	rm -rf build/wheel build/lib*
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --plat manylinux_2_28_$$(uname -m) --only-plat \
		--exclude 'libtorch*' --exclude 'libc10*' --wheel-dir build/wheel/dist build/wheel/*.whl
	$(BIN)/python -m pip install --quiet --no-deps --target build/wheel/installed build/wheel/dist/*.whl
	cd build/wheel/installed && CXX=none $(abspath $(BIN))/python -m mixfeat check --quick --backend cpu
	mkdir -p dist && cp build/wheel/dist/*.whl dist/

bench: install
	$(BIN)/mixfeat bench

# On a machine with a GPU: its tests, mixfeat check and the benchmarks, within 9 minutes, with PYTHON's own packages (torch, triton,
# pytest, pytest-benchmark, pytest-timeout), without network and without .venv. Results go to the folder RESULTS, whatever fails.
gpu:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable . \
		|| MIXFEAT_SKIP_CPU_BUILD=1 $(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
	mkdir -p "$(RESULTS)"
	failed=; parallel=$$($(PYTHON) -c "import xdist; print('-n 12 --dist worksteal')" 2>/dev/null); \
	timeout -s INT 200 $(PYTHON) -m pytest -q -W default $$parallel -m "gpu or triton" --junitxml="$(RESULTS)/tests-gpu.xml" \
		|| failed="$$failed tests"; \
	timeout 80 $(PYTHON) -m mixfeat check --backend triton --json "$(RESULTS)/check-gpu.json" || failed="$$failed check"; \
	$(PYTHON) -m mixfeat bench --seconds 1 --limit 230 --out "$(RESULTS)/bench-gpu.json" || failed="$$failed bench"; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# The same tests' smallest shapes under compute-sanitizer, which finds reads and writes outside memory
gpu-sanitize:
	compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) -m mixfeat check --quick --backend triton
