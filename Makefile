# make test    the tests;  make check  formatting, lint, types
#
# PYTHON   the interpreter for the environment          TORCH   which torch is installed into it

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: test check clean

test: $(VENV)/.dev
	$(BIN)/pytest -n auto

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# mypy follows no import hook, so it is shown the installed layout: kernels/ as harlora.kernels.
	@rm -rf build/typecheck && mkdir -p build/typecheck/harlora
	@ln -s $(CURDIR)/harlora/* $(CURDIR)/kernels build/typecheck/harlora/
	cd build/typecheck && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml harlora

# torch comes first and pinned: an extension is built against it, and an unpinned one would bring another build.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH) 'setuptools>=77' ninja
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/_C.so runs
