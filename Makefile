PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
CPP := $(wildcard bench/*.cpp csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
# a build with sanitizers, beside $(VENV) and its build
comma := ,
sanitized = build/$@/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps \
  -Cbuild-dir=build/$@/cmake -Cinstall.strip=false \
  -Ccmake.define.FASTRSSM_CUDA=OFF -Ccmake.define.FASTRSSM_SANITIZE=$(1) -e .
# threads that wait at a barrier on a busy machine should sleep, not spin
export GOMP_SPINCOUNT := 1000

.PHONY: help demo test test-slow test-isa test-gpu gpu dev lint format types bench report stubs asan tsan wheel clean
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12
demo: $(VENV)/train.stamp ## imitate a walker from observations alone: data, training, evaluation, report (5 minutes)
	$(BIN)/fastrssm demo --out runs/demo
test: $(VENV)/dev.stamp ## all tests that need no GPU (6 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not slow and not cuda"
test-slow: $(VENV)/dev.stamp ## the long tests: training parity, more seeds
	$(BIN)/python -m pytest -m slow
test-gpu: $(VENV)/dev.stamp ## the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m cuda
gpu: ## on a machine with an NVIDIA GPU, no network needed: build, tests, benchmarks, one JSON (10 minutes); DRY=1: all but the GPU
	$(PYTHON) -m bench.gpu $(if $(DRY),--dry) $(if $(ONLY),--only $(ONLY))
dev: $(VENV)/dev.stamp ## virtual environment with everything a developer needs
lint: $(VENV)/dev.stamp ## ruff and clang-format, no changes made
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/clang-format --dry-run --Werror $(CPP)
format: $(VENV)/dev.stamp ## ruff and clang-format, files rewritten
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format . && $(BIN)/clang-format -i $(CPP)
types: $(VENV)/dev.stamp ## pyright, strict
	$(BIN)/pyright
bench: $(VENV)/dev.stamp ## OP=gaussian_kl: its tests, then its benchmark
	$(BIN)/python -m pytest tests/ops/test_$(OP).py && $(BIN)/python -m pytest bench/ops/bench_$(OP).py
report: $(VENV)/dev.stamp ## bench/results/*.json -> bench/RESULTS.md
	$(BIN)/python -m bench.report
stubs: $(VENV)/dev.stamp ## type stubs of the native modules
	$(BIN)/pybind11-stubgen fastrssm._native -o python && $(BIN)/pybind11-stubgen fastrssm._stepper -o python
test-isa: $(VENV)/dev.stamp ## the op tests on every instruction set that this processor has, one after the other
	for isa in $$($(BIN)/python -c "from fastrssm._native import gemm_isas; print(*gemm_isas())"); do \
	  echo "FASTRSSM_ISA=$$isa"; FASTRSSM_ISA=$$isa $(BIN)/python -m pytest -q -m "not slow and not cuda" -k "not triton and not aot and not cluster" tests/ops || exit 1; \
	done
asan: build/asan/packages ## op and environment tests under address and undefined-behaviour sanitizers
	$(call sanitized,address$(comma)undefined)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  build/asan/bin/python -m pytest -s -m "not slow and not cuda" -k "not without_a_trace and not memory_is_flat and not compile and not wiring and not buffer and not triton and not aot and not cluster" \
	  tests/ops tests/envs
tsan: build/tsan/packages ## environment tests under the thread sanitizer
	$(call sanitized,thread)
	LD_PRELOAD="$$(g++ -print-file-name=libtsan.so)" TSAN_OPTIONS=halt_on_error=1 \
	  build/tsan/bin/python -m pytest -s -k "not promises and not forked_child and not without_a_trace and not memory_is_flat" \
	  tests/envs/test_vector_env.py tests/envs/test_state.py tests/envs/test_autoreset.py tests/envs/test_faults.py
wheel: $(VENV)/dev.stamp ## a wheel in dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
clean: ## remove everything that was built
	rm -rf $(VENV) build dist

# A CPU torch where there is no NVIDIA driver: the default one brings gigabytes of CUDA packages. pip takes the CPU build
# where its configuration offers one by version; uv knows where PyTorch publishes it.
$(VENV)/torch.stamp: constraints.txt
	@command -v g++ >/dev/null || { echo "a C++ compiler is needed: apt install g++"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@if nvidia-smi -L >/dev/null 2>&1; then $(PIP) torch==$(TORCH); \
	else $(PIP) torch==$(TORCH)+cpu 2>/dev/null || \
	  { $(PIP) uv && $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend cpu torch==$(TORCH); }; fi
	@touch $@
# a virtual environment that finds all packages but ours in $(VENV)
build/%/packages: $(VENV)/dev.stamp
	$(BIN)/python -m venv --without-pip build/$*
	$(BIN)/python -c "import site; print(*site.getsitepackages())" > $@
	cp $@ "$$(build/$*/bin/python -c 'import site; print(*site.getsitepackages())')/packages.pth"
$(VENV)/train.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(PIP) -c constraints.txt -e '.[train]'
	@touch $@
$(VENV)/dev.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/train.stamp
