# For people and CI alike. `make demo` shows the thing, `make smollm2` on a real model;
# `make test check` before a commit; `make test-long` has those that it leaves out.
# PYTHON makes the virtual environment (3.11 or newer), VENV is where it goes.

PYTHON ?= python3
VENV ?= .venv
SOURCES = $(sort $(shell find ifp_mlx convert examples -name '*.py'))
TESTS = $(sort $(shell find tests -name '*.py'))
PAGES = $(wildcard *.md) $(sort $(shell find examples -name '*.md'))

ifeq ($(shell uname),Linux)
  # MLX's wheel for Linux brings a reference BLAS, 20 to 50 times slower than OpenBLAS.
  BLAS := $(shell PATH="$$PATH:/sbin" ldconfig -p | awk '/libopenblas\.so\.0/ {print $$NF; exit}')
  ifeq ($(BLAS),)
    HINT = @echo "apt-get install libopenblas0-pthread makes MLX on this CPU much faster."
  else
    RUN = LD_PRELOAD=$(BLAS) OPENBLAS_NUM_THREADS=$(shell nproc)
  endif
  # On a CPU mx.compile calls g++ for every fused kernel: minutes of a cold test run.
  # Matrices of tests are too small to share: a second thread would only wait for them.
  TEST_RUN = MLX_DISABLE_COMPILE=1 $(RUN) OPENBLAS_NUM_THREADS=1
endif

.PHONY: setup demo smollm2 test test-long quick check fix sizes

setup: $(VENV)/.setup

$(VENV)/.setup: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -e '.[test,gguf]'
	@touch $@

$(VENV)/.dev: $(VENV)/.setup
	$(VENV)/bin/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: setup
	$(RUN) $(VENV)/bin/python -m ifp_mlx.generate --prompt "What is Germany called in French?"
	$(RUN) $(VENV)/bin/python -m ifp_mlx.generate --prompt "Tell me the currency code of Japan."
	@echo "And the first question with the channels of the second, which know currencies alone:"
	$(RUN) $(VENV)/bin/python -m ifp_mlx.generate --prompt "What is Germany called in French?" --instruction "Tell me the currency code of Japan."

smollm2: setup
	$(HINT)
	$(RUN) $(VENV)/bin/python examples/smollm2.py

test: setup
	$(HINT)
	$(TEST_RUN) $(VENV)/bin/python -m pytest -m 'not long'

test-long: setup
	$(TEST_RUN) $(VENV)/bin/python -m pytest -m long

quick: setup
	$(HINT)
	$(TEST_RUN) $(VENV)/bin/python -m pytest -m 'not long and not real and not coreml'

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	@$(VENV)/bin/codespell $(SOURCES) $(TESTS) $(PAGES) Makefile .ci/run

fix: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

sizes:
	@wc -l $(SOURCES) $(TESTS)
