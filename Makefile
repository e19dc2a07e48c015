# `make demo` and `make test` work in a fresh clone: they make the virtual environment first.
PYTHON ?= python3
ARGS ?=
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: demo test test-all slow check install clean

demo: $(STAMP)  ## The whole loop: make demo ARGS="--data DIR_OR_HUB_ID"
	$(VENV)/bin/pathalign demo $(ARGS)

test: check  ## Lint, types and the quick tests: make test ARGS="-k reward"
	$(VENV)/bin/pytest $(ARGS)

test-all: check  ## As `test`, with the slow tests
	$(VENV)/bin/pytest -m "" $(ARGS)

slow: $(STAMP)  ## The slow tests only
	$(VENV)/bin/pytest -m slow $(ARGS)

check: $(STAMP)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing pathalign into $(VENV) (some minutes the first time)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[all]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
