# make demo         a virtual environment, the package with the demo's teacher, and the demo itself
# make test         the same environment with the developers' tools, and all tests
# make test-fast    the tests without a mark (slow, cluster, network, gpu), in one to two minutes
# make test-oldest  an environment with the oldest versions that are supported, and what depends on versions
# make lint         style, format, the direction of imports, types
# make docs         the documentation as a site, in build/docs; docs/cli.md is generated from --help
# Another Python:   make PYTHON=python3.12 demo

VENV ?= .venv
OUT ?= demo-out
TESTS ?=
# Of the tests: one more than cores, at most four. Tests wait for time-outs and for the ends of other processes.
PROCESSES ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 3 ? cores + 1 : 4)))
CONSTRAINTS ?=
# Minor versions of Python 3, the ones to prefer first.
MINORS ?= 13 12 11 14
BIN = $(VENV)/bin

# The first that runs and can make environments: what is on the PATH may be the shim of a version manager, which fails.
PYTHON ?= $(shell \
	usable() { "$$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$1"; }; \
	IFS=:; for minor in $(MINORS); do \
		for folder in $$PATH; do usable "$$folder/python3.$$minor" && exit; done; \
		for home in "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.$$minor.*; do usable "$$home/bin/python" && exit; done; \
	done; \
	for folder in $$PATH; do usable "$$folder/python3" && exit; done)

# Tests start hundreds of processes, each of which would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast test-oldest lint docs versions clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(BIN)/python -m distinit demo --out "$(OUT)"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses=$(PROCESSES) --dist=worksteal $(TESTS)

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses=$(PROCESSES) --dist=worksteal \
		-m "not slow and not cluster and not network and not gpu" $(TESTS)

# The tests that depend on versions of libraries: of decoding, Zarr, torch, dask and click.
test-oldest:
	@$(MAKE) --no-print-directory VENV=.venv-oldest CONSTRAINTS=tests/oldest.txt MINORS="11 12 13 14" versions test \
		TESTS="tests/pipeline/video tests/pipeline/prepared tests/pipeline/store tests/stages/test_extract_cluster.py \
		tests/stages/test_cli_errors.py tests/stages/test_cli_options.py"

# mypy and import-linter take the package by name, whatever the folder is called: a link gives it that name.
lint: $(VENV)/.installed-dev $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p .mypy_cache/path && ln -sfn ../.. .mypy_cache/path/distinit
	PYTHONPATH=.mypy_cache/path $(BIN)/lint-imports --no-cache --no-logo
	MYPYPATH=.mypy_cache/path $(BIN)/mypy -p distinit

# Nothing is fetched while it builds, and no code of a page is run: tests/ run it.
docs: $(VENV)/.installed-docs
	$(BIN)/python docs/write_cli_reference.py
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/docs
	@echo "build/docs/index.html"

versions: $(VENV)/.installed-dev
	@$(BIN)/python -c 'import sys; from importlib.metadata import version; \
		print("Python", sys.version.split()[0], *(f"{p} {version(p)}" for p in \
		"torch torchvision numpy av zarr dask h5py scikit-learn click pydantic rich pytest".split()), sep=", ")'

clean:
	rm -rf "$(VENV)" .venv-oldest build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(VENV)/.made
	@echo "Installing distinit[$*] into $(VENV): some minutes, up to 3 GB"
	@rm -f "$(VENV)/pip.log"
	@$(BIN)/python -m pip install --disable-pip-version-check -qqq --log "$(VENV)/pip.log" \
		$(CONSTRAINTS:%=--constraint=%) --editable ".[$*]" || { \
		if grep -qiE "no space left|disk quota" "$(VENV)/pip.log"; then \
			echo "make: disk full while installing into $(VENV), which needs 6 GB; free some space and run it again"; \
		elif grep -qE "NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|SSLError" "$(VENV)/pip.log"; then \
			echo "make: pip cannot reach a package index; connect, or set PIP_INDEX_URL or HTTPS_PROXY"; \
		else \
			echo "make: pip failed: $$(grep -aoE "ERROR: .*" "$(VENV)/pip.log" | tail -1); all of it: $(VENV)/pip.log"; \
		fi >&2; exit 1; }
	@touch $@

$(VENV)/.made:
	@python="$(PYTHON)"; \
	test -n "$$python" || { echo "make: no Python 3.11 or newer with venv and ensurepip was found; install it" \
		"(Debian, Ubuntu: apt install python3-venv) or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "make: $$python is" \
		"older than 3.11 or does not run; name a newer one: make PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	"$$python" -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $$python has no venv or ensurepip; install" \
		"them (Debian, Ubuntu: apt install python3-venv) or name another: make PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	echo "$(VENV): $$("$$python" --version), $$python"; \
	failure=$$("$$python" -m venv "$(VENV)" 2>&1) && $(BIN)/python -m pip --version >/dev/null || { \
		echo "make: $$python cannot make $(VENV): $$(echo "$$failure" | tail -1)" >&2; rm -f $@; exit 1; }
	@touch $@
