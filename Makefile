# `make run` and `make test` need Python 3.10 or newer and make, nothing else. CONTRIBUTING.md lists the rest.
# PYTHON chooses another Python; GUNICORN another gunicorn (GUNICORN===23.0.0).

PYTHON ?= python3
VENV ?= .venv
GUNICORN ?= >=23
TESTS ?= tests
# what of setup.cfg's extras the tests need
EXTRA ?= test
# The tests mostly wait for processes that they start, so more run at a time than there are processors.
JOBS ?= 6
BIN = $(VENV)/bin
# gunicorn is not in the constraints: the tests run with several
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-dev.txt
SOCKET ?= $(abspath $(VENV))/seed.sock

RUNS ?= 50000

.PHONY: run test test-compiled unit coverage fuzz lint types docs docs-serve modules constraints dist bench bench-proxy clean

# Made anew when what is to be installed changes.
$(VENV)/installed: setup.cfg pyproject.toml constraints-dev.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Error: Python 3.10 or newer is needed; say which with make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.' 'gunicorn$(GUNICORN)'
	$(PIP) --editable '.[fast]' 'gunicorn$(GUNICORN)' || \
	    echo "gunicorn_h1c was not installed (it needs a C compiler): requests are parsed by gunicorn's Python parser"
	@touch $@

$(VENV)/tested: $(VENV)/installed
	$(PIP) --editable '.[$(EXTRA)]' 'gunicorn$(GUNICORN)'
	@touch $@

$(VENV)/linted: $(VENV)/installed
	$(PIP) --editable '.[lint]' 'gunicorn$(GUNICORN)'
	@touch $@

# examples/seed under four workers; Ctrl-C stops it.
run: $(VENV)/installed
	@echo
	@echo "The primary (a proxy, on the UNIX socket that a web server would reach):"
	@echo "    curl --unix-socket $(SOCKET) http://localhost/hello"
	@echo "The second server, on its own port:"
	@echo "    curl http://127.0.0.1:9000/hello"
	@echo "Ctrl-C stops both."
	@echo
	@cd examples/seed && exec $(abspath $(BIN))/gunicorn -k gunicorn_passenger.Worker -w 4 --umask 007 -b unix:$(SOCKET) app

# The tests start gunicorn with PYTHONDONTWRITEBYTECODE; without compileall each of those would compile the package
# again. pytest itself may write bytecode: each of its processes imports all tests.
test: $(VENV)/tested
	$(BIN)/python -m compileall -q gunicorn_passenger tests/programs
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(TESTS)

# The compiled package (setup.py) in an environment of its own, and tests with it. They run in a copy without the
# source, which Python would import. test_fast_path.py has replaced functions that compiled code calls directly.
$(VENV)/compiled: setup.py setup.cfg constraints-dev.txt Makefile scripts/compiled-wheel $(shell find gunicorn_passenger -name '*.py')
	$(PYTHON) -m venv $(VENV)
	rm -rf $(VENV)/wheel
	scripts/compiled-wheel $(BIN)/python $(VENV)/wheel
	$(PIP) --force-reinstall --no-deps $(VENV)/wheel/*.whl
	$(PIP) "gunicorn-passenger[fast,$(EXTRA)] @ file://$$(realpath $(VENV)/wheel/*.whl)" 'gunicorn$(GUNICORN)'
	@touch $@

COMPILED_TESTS ?= tests/http tests/proxy

test-compiled: $(VENV)/compiled
	rm -rf $(VENV)/copy && mkdir $(VENV)/copy
	cp -r $$(git ls-files | cut -d/ -f1 | sort -u | grep -v '^gunicorn_passenger$$') $(VENV)/copy
	cd $(VENV)/copy && ../bin/python -m pytest -n $(JOBS) --dist worksteal --ignore tests/proxy/test_fast_path.py $(COMPILED_TESTS)

# The tests that start no gunicorn. They do not wait, so more jobs than this would only cost more imports.
unit: $(VENV)/tested
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 4 --dist worksteal tests/unit

# The suite with coverage.py in every process that it starts; a process that is killed is not counted. The table has
# the lines that no test ran, also when a test has failed; build/coverage/html/index.html shows them.
coverage: $(VENV)/tested
	$(PIP) --editable '.[coverage]' 'gunicorn$(GUNICORN)'
	rm -rf build/coverage && mkdir -p build/coverage
	status=0; \
	$(BIN)/python -m coverage run -m pytest -n $(JOBS) --dist worksteal $(TESTS) || status=$$?; \
	$(BIN)/python -m coverage combine --quiet && \
	$(BIN)/python -m coverage html --quiet && \
	$(BIN)/python -m coverage report && exit $$status

# The same seed each time; RUNS says how long.
fuzz: $(VENV)/tested
	$(PIP) atheris
	rm -rf $(VENV)/fuzzed && mkdir $(VENV)/fuzzed
	$(BIN)/python fuzz/fuzz_http.py -seed=1 -runs=$(RUNS) -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 \
	    -artifact_prefix=$(VENV)/ $(VENV)/fuzzed fuzz/corpus

lint: $(VENV)/linted
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/linted
	$(BIN)/mypy

$(VENV)/documented: $(VENV)/installed
	$(PIP) --editable '.[docs]' 'gunicorn$(GUNICORN)'
	@touch $@

# The documentation site, in build/site. A warning, such as a link that leads nowhere, is an error.
docs: $(VENV)/documented
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The page of all modules, from their docstrings.
modules:
	$(PYTHON) scripts/modules_page.py

# Renews the versions with which everything here is developed and tested, for each Python.
constraints: $(VENV)/installed
	$(PIP) uv
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --all-extras --no-emit-package gunicorn \
	    --no-annotate --custom-compile-command 'make constraints' --output-file constraints-dev.txt setup.cfg

docs-serve: $(VENV)/documented
	$(BIN)/mkdocs serve

$(VENV)/packaged: $(VENV)/installed
	$(PIP) --editable '.[dist]' 'gunicorn$(GUNICORN)'
	@touch $@

# The wheel and the sdist, checked; the wheel is installed into an empty environment and started from there.
dist: $(VENV)/packaged
	scripts/build-dist $(BIN)/python

# What each measures, and what it needs: bench/README.md.
bench: $(VENV)/installed
	$(BIN)/python bench/listen.py
	$(BIN)/python bench/wsgi.py

bench-proxy: $(VENV)/installed
	$(BIN)/python bench/proxy.py

clean:
	rm -rf $(VENV) build dist *.egg-info
