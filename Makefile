# `make serve` and `make test` need make and Python 3.11 or later; everything else goes into .venv.

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$python"; break; }; done)
BIN := .venv/bin
# Pins what pip builds with as well as what it installs.
PIP_INSTALL = PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq

.PHONY: serve test clients peers format docs clean

serve: .venv/serve.stamp ## HOST, PORT and MODEL are passed on
	@exec $(BIN)/millicent serve $(HOST:%=--host %) $(PORT:%=--port %) $(MODEL)

test: .venv/test.stamp ## the whole recipe; what continuous integration runs
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2

clients: .clients/stamp ## other people's clients, for the tests that need them

peers: .peers/stamp ## other people's servers, for the tests that put them behind ours

format: .venv/test.stamp
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

docs: .venv/test.stamp ## the reference pages that are made from the code
	$(BIN)/python tests/reference_pages.py

clean:
	rm -rf .venv .clients .peers build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# A stamp stands for a finished installation. It goes away before anything is changed, and an environment without one
# is made anew, so that an installation that was cut off is never used.
.venv/serve.stamp: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or later was not found: install it, or name it with PYTHON=..."; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) cannot make virtual environments: on Debian, apt-get install python3-venv"; exit 1; }
	@test -f $@ || "$(PYTHON)" -m venv --clear .venv
	@rm -f .venv/*.stamp
	@echo "Installing Millicent and its engine into .venv (once; about 1 GB on disk)"
	@$(PIP_INSTALL) --editable '.[engine]'
	@touch $@

.venv/test.stamp: .venv/serve.stamp
	@rm -f .venv/*.stamp
	@echo "Installing the development tools into .venv"
	@$(PIP_INSTALL) --editable '.[engine,dev]'
	@touch .venv/serve.stamp $@

.clients/stamp: tests/clients/requirements.txt tests/clients/package.json tests/clients/package-lock.json
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or later was not found: install it, or name it with PYTHON=..."; exit 1; }
	@echo "Installing other people's clients into .clients (about 600 MB on disk)"
	@"$(PYTHON)" -m venv --clear .clients
	@PIP_DISABLE_PIP_VERSION_CHECK=1 .clients/bin/python -m pip install -qq --no-deps --no-compile -r tests/clients/requirements.txt
	@cp tests/clients/package.json tests/clients/package-lock.json .clients/
	@PATH="$(CURDIR)/.clients/bin:$$PATH" npm ci --prefix .clients --silent --ignore-scripts --no-audit --no-fund
	@touch $@

.peers/stamp: tests/peers/requirements.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or later was not found: install it, or name it with PYTHON=..."; exit 1; }
	@echo "Installing other people's servers into .peers (about 1.5 GB on disk)"
	@"$(PYTHON)" -m venv --clear .peers
	@PIP_DISABLE_PIP_VERSION_CHECK=1 .peers/bin/python -m pip install -qq --no-deps --no-compile -r tests/peers/requirements.txt
	@touch $@
