# Two commands for a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
# Each sets up a virtual environment in .venv the first time; nothing outside this folder is changed.
#
#   PYTHON=python3.12 make test              another interpreter for the virtual environment
#   PIP_INSTALL_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" make demo
#                                            the small CPU build of torch where pip's default is the CUDA one

PYTHON ?= python3
VENV ?= .venv
PIP_INSTALL_FLAGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_INSTALL_FLAGS)

.DEFAULT_GOAL := help
.PHONY: demo results bench test slow artefacts engines models structures fuzz lint format clean help

help:
	@echo "make demo    set up, then sample digits with the original, vectorised and cached model"
	@echo "make results the demo, then the README's table and picture from it; on a quiet machine"
	@echo "make bench   speed on this CPU: steps, layers, trajectories; 15 minutes at first; most of it compiles, once"
	@echo "make test    set up, then run the fast test suite"
	@echo "make slow    the slow tests"
	@echo "make artefacts  what export writes, in every format; 2 minutes"
	@echo "make engines TensorRT-RTX engines of all four models, fp32 and fp16, without a GPU; 20 minutes"
	@echo "make models  HiDream and Nucleus of diffusers, and their pipelines; 7 minutes"
	@echo "make structures  420 ways to write a model, each transformed and proven or refused; 15 minutes on two cores"
	@echo "make fuzz    10 minutes of coverage-guided fuzzing of discovery; stops at the first finding"
	@echo "make lint    ruff (lint, format) and mypy"
	@echo "make format  let ruff rewrite what it can"
	@echo "make clean   remove the virtual environment, caches and outputs"

demo: $(VENV)/.installed-demo
	$(BIN)/moeca-fx demo

results: demo
	$(BIN)/python docs/update_results.py out/demo

bench: $(VENV)/.installed-demo
	$(BIN)/python -m bench.cpu

# Two workers, a file each: transformed models are made once a file.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

artefacts: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 -m "artefact and not slow"

engines: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow tests/export/test_models.py -k test_an_engine_is_built

models: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 -m slow tests/models tests/pipelines -k "not compiled and not published_ and not meta"

# In two processes of its own; `python -m tests.structures.report` writes what it finds to docs/structures.md.
structures: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow tests/structures

# A finding is a file that `python -m tests.fuzz.fuzz_discovery FILE` runs again.
fuzz: $(VENV)/.installed-fuzz
	mkdir -p out/fuzz
	$(BIN)/python -m tests.fuzz.fuzz_discovery -max_total_time=600 -timeout=120 -max_len=32 -len_control=0 \
	  -artifact_prefix=out/fuzz/ out/fuzz

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A sentinel is touched only when everything before it succeeded, so an interrupted set-up starts again.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: moeca_fx needs Python 3.11 or newer, found $$($(PYTHON) --version 2>&1); run: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV), once: installing torch (a large download, a few minutes)"
	@$(PIP) torch
	@touch $@

$(VENV)/.installed-%: $(VENV)/.torch pyproject.toml
	@echo "setting up $(VENV), once: installing moeca_fx[$*]"
	@$(PIP) -e '.[$*]'
	@touch $@

.PRECIOUS: $(VENV)/.torch $(VENV)/.installed-%
