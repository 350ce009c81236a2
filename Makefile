# make bench      the microbenchmark against eager PyTorch, on the GPU if there is one
# make test       the tests, and the extension against a CPU-only torch, in minutes
# make test-full  the slow tests too, as continuous integration runs them
# make coverage   the lines of the package that `make test` does not run
# make lint       ruff, clang-format, mypy, pyright, shellcheck and zizmor; make format mends what the
#                 first two find
# make docs       the documentation, into site/
# make gpu        on a GPU machine: everything that needs one, with PYTHON's own packages; PARTS=right,
#                 fast or tuned is one call of it, PARTS="smoke ncu" those parts; DEADLINE in seconds
#
# Each makes .venv first. Versions of the tools stand in pyproject.toml, those of torch here.

PYTHON ?= python3
TORCH ?= torch==2.11.0
TORCH_CPU ?= torch==2.13.0
BENCH ?=
GPU_OUT ?= benchmarks/results/gpu

VENV := .venv
CPU_VENV := .venv-cpu
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CXX_FILES := $(shell find csrc instruments tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

bench: $(VENV)/built
	$(VENV)/bin/python -m benchmarks $(BENCH)

# The CPU-only torch loads the modules that were built against the other one. A process for each
# core, with one thread: threads that wait for each other take the time of the other processes.
PYTEST := -m pytest -n auto --dist loadfile --no-loadscope-reorder
CPU_TESTS := tests/test_installation.py tests/functional/test_threshold.py \
	tests/ops/test_autograd.py tests/pruning/test_pruner_compatibility.py tests/docs/test_api.py

test: CHOSEN := not slow
test-full: CHOSEN := slow or not slow
test test-full: export OMP_NUM_THREADS = 1
test test-full: $(VENV)/built $(VENV)/stacks $(VENV)/docs $(CPU_VENV)/tools
	PYTHONPATH=. $(CPU_VENV)/bin/python $(PYTEST) -q $(CPU_TESTS) \
		-m "($(CHOSEN)) and not gpu and not installed"
	$(VENV)/bin/python $(PYTEST) -m "$(CHOSEN)"

coverage: export OMP_NUM_THREADS = 1
coverage: $(VENV)/built $(VENV)/stacks
	$(VENV)/bin/python $(PYTEST) -m "not slow" --cov --cov-report term-missing:skip-covered

# pyright follows no editable install: it verifies the Python files that a wheel would hold.
TYPED := build/typed
lint: $(VENV)/stacks
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck --shell bash --severity warning .ci/run $(shell find benchmarks studies -name '*.sh')
	$(VENV)/bin/zizmor --offline --no-progress --quiet .github
	rm -rf $(TYPED)
	$(VENV)/bin/python -c "import setuptools; setuptools.setup()" --quiet build_py --build-lib $(TYPED)
	PATH="$(abspath $(VENV))/bin:$$PATH" PYTHONPATH=$(TYPED) $(VENV)/bin/pyright \
		--verifytypes pdp_kernels --ignoreexternal

format: $(VENV)/tools
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/docs
	$(VENV)/bin/python -m mkdocs build --quiet --strict

gpu:
	PYTHON="$(PYTHON)" OUT="$(GPU_OUT)" benchmarks/gpu.sh $(PARTS)

$(VENV)/tools: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade "pip>=25.1"
	$(VENV)/bin/pip install --quiet "$(TORCH)" --group build --group test --group bench --group studies \
		--group lint
	touch $@

# Beside the same torch, which another release of a library might replace.
$(VENV)/stacks: $(VENV)/tools
	$(VENV)/bin/pip install --quiet "$(TORCH)" --group test --group stacks
	touch $@

$(VENV)/docs: $(VENV)/tools
	$(VENV)/bin/pip install --quiet "$(TORCH)" --group docs
	touch $@

$(VENV)/built: $(VENV)/tools $(SOURCES)
	$(VENV)/bin/pip install --no-build-isolation --no-deps --editable .
	touch $@

$(CPU_VENV)/tools: pyproject.toml Makefile
	$(PYTHON) -m venv $(CPU_VENV)
	$(CPU_VENV)/bin/pip install --quiet --upgrade "pip>=25.1"
	$(CPU_VENV)/bin/pip install --quiet "$(TORCH_CPU)" --group test
	touch $@

clean:
	rm -rf $(VENV) $(CPU_VENV) build dist site *.egg-info pdp_kernels/*.so pdp_kernels/_build_record.json

.PHONY: bench test test-full coverage lint format docs gpu clean
