# make lodo    from a bare clone to the table: environment, installation, the main study in its quick preset
# make test    the tests;  make check  formatting, lint, types
# make sanitize  the operators' tests on kernels built with AddressSanitizer and UBSan; needs GCC
# make compile   GPU kernels for sm_80, sm_90 and sm_100, without a GPU; fails on spills and without tensor cores
# make instructions  instruction counts of operator calls against the committed baseline; needs valgrind and a C compiler
# make study   all of experiments/: many hours on two cores; goes on where it was stopped
# make report  docs/results.md from the committed results
# make bench   this machine's CPU against bitsandbytes with PEFT and others, 16 minutes; harlora bench --help has more
# make gpu     on a machine with an NVIDIA GPU, with $(PYTHON)'s own packages, no internet: build, GPU tests, GPU bench
# make benchmarks  docs/benchmarks.md from the committed results
#
# PYTHON   the interpreter for the environment          TORCH   which torch is installed into it
# ARGS     further options of lodo, bench and gpu       HARLORA_DATA   the folder with the datasets

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: lodo test check sanitize compile instructions study report bench gpu benchmarks clean

lodo: $(VENV)/.har
	$(BIN)/harlora lodo $(ARGS)

test: $(VENV)/.dev
	$(BIN)/pytest -n auto

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# mypy follows no import hook, so it is shown the installed layout: kernels/ as harlora.kernels, bench/ too.
	@rm -rf build/typecheck && mkdir -p build/typecheck/harlora
	@ln -s $(CURDIR)/harlora/* $(CURDIR)/kernels $(CURDIR)/bench build/typecheck/harlora/
	cd build/typecheck && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml harlora

# Beside the installed extension, not over it. The runtimes must be loaded before Python, and libstdc++ with them, or
# the first C++ exception finds no interceptor. Leaks are not looked for: Python and torch keep memory until the end.
# A finding ends a worker of pytest, which fails its test; its report goes to the terminal (--capture=sys). The test of
# the extension fails where it was not built; all others would skip.
SANITIZE_CXX ?= g++
SANITIZE_RUNTIME = $(foreach name,asan ubsan stdc++,$(shell $(SANITIZE_CXX) -print-file-name=lib$(name).so))
sanitize: $(VENV)/.dev
	HARLORA_SANITIZE=1 HARLORA_CUDA=0 CXX=$(SANITIZE_CXX) $(BIN)/python setup.py --quiet build \
		--build-lib build/sanitize/lib --build-temp build/sanitize/temp
	PYTHONPATH=build/sanitize/lib LD_PRELOAD="$(SANITIZE_RUNTIME)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/pytest -n auto -x --capture=sys tests/test_ops.py tests/test_format.py tests/test_linear.py \
		tests/test_cpu.py tests/test_whole.py tests/test_groups.py tests/test_precision.py \
		tests/test_build.py::test_the_extension_of_this_installation_serves

compile: $(VENV)/.dev
	$(BIN)/python bench/compile_report.py $(ARGS)

instructions: $(VENV)/.dev
	$(BIN)/python -m harlora.bench.instructions $(ARGS)

study: $(VENV)/.har
	$(BIN)/harlora run experiments/*.toml $(ARGS)
	$(MAKE) report

report: $(VENV)/.har
	$(BIN)/harlora report --readme README.md

bench: $(VENV)/.dev
	$(BIN)/harlora bench $(ARGS)

gpu:
	$(PYTHON) bench/gpu.py $(ARGS)

benchmarks: $(VENV)/.dev
	$(BIN)/python -m harlora.bench.report bench/results docs/benchmarks.md

# torch comes first and pinned: an extension is built against it, and an unpinned one would bring another build.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH) 'setuptools>=77' ninja
	touch $@

$(VENV)/.har: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[har]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	HARLORA_WERROR=1 $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/_C.so runs
