# make demo: a virtual environment, the package with the demo's teacher, and the demo itself.
# make test: the same environment with the developers' tools, and the tests.
# Another Python: make PYTHON=python3.12 demo

VENV ?= .venv
OUT ?= demo-out
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c '$(NEW_ENOUGH)' 2>/dev/null && echo "$$p" && break; done)
BIN = $(VENV)/bin

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(BIN)/python -m distinit demo --out "$(OUT)"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

# mypy takes the package by name, whatever the folder is called: a link gives it that name.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	@mkdir -p .mypy_cache/path && ln -sfn ../.. .mypy_cache/path/distinit
	MYPYPATH=.mypy_cache/path $(BIN)/mypy -p distinit

clean:
	rm -rf "$(VENV)" build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.installed-%: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar on --editable ".[$*]"
	@touch $@

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found:" \
		"install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c '$(NEW_ENOUGH)' || { echo "$(PYTHON) is older than 3.11 or does not run:" \
		"name a newer one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) lacks venv or ensurepip:" \
		"install it, on Debian and Ubuntu: apt install $$("$(PYTHON)" -c \
		'import sys; print("python3.%d-venv" % sys.version_info[1])')" >&2; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"
	@touch $@
