# Every target starts from a machine that has only Python >= 3.11 and make.
# PYTHON=... chooses the interpreter, MARK="not slow" some of the tests, ARGS=... anything else for pytest.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
IS_SUPPORTED := import sys; sys.exit(sys.version_info < (3, 11))
PACKAGES := precond curvature solvers
JOBS ?= 2

.PHONY: help install demo docs test test-long bench lint types format

help:
	@echo "make install   create $(VENV) and install precond with pinned versions"
	@echo "make demo      train the demo models and print what came out"
	@echo "make docs      build the documentation into build/site (in an environment of its own)"
	@echo "make test      run the tests (MARK='not slow' for some of them)"
	@echo "make test-long run the tests that take minutes each"
	@echo "make bench     measure costs beside other libraries, into docs/performance.md (hours; ARGS='--only HVP' for some)"
	@echo "make lint      check style and format"
	@echo "make types     check types"
	@echo "make format    mend style and format"

install: $(STAMP)

demo: install
	$(BIN)/python -m precond demo

# One thread for each of the processes: more of them would only wait for each other.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(if $(MARK),-m "not long and ($(MARK))") $(ARGS)

# The tools of the site stay out of $(VENV): nothing of the library needs them. They read its sources and import nothing.
docs: $(VENV)/docs/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/python -m mkdocs build --strict -f docs/site/mkdocs.yml
	@echo "open build/site/index.html"

$(VENV)/docs/installed: docs/site/requirements.txt | $(BIN)/python
	$(BIN)/python -m venv $(VENV)/docs
	$(VENV)/docs/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r docs/site/requirements.txt
	@touch $@

test-long: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m long $(ARGS)

# One thread, and the CPU time of one process: other programs on the machine change little.
bench: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.harness --write $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy $(PACKAGES)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Torch goes first and with what it needs, so that the index decides which build (CPU, CUDA) this exact version means.
# The rest is listed in full, so nothing is left to resolve.
$(STAMP): setup.py constraints.txt | $(BIN)/python
	@$(BIN)/python -c '$(IS_SUPPORTED)' || { \
	  echo "error: $(VENV) holds $$($(BIN)/python --version) and precond needs Python >= 3.11." \
	    "Remove $(VENV) and run make again" >&2; \
	  exit 1; \
	}
	$(PIP) -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PIP) --no-deps -r constraints.txt
	$(PIP) --no-deps -e .
	@touch $@

# Candidates are run, not just looked up: a version manager's shim may exist for a Python that does not.
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.13 python3)
$(BIN)/python:
	@for python in $(CANDIDATES); do \
	  if $$python -c 'import ensurepip; $(IS_SUPPORTED)' 2>/dev/null; then \
	    echo "Creating $(VENV) with $$($$python --version)"; \
	    exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "error: precond needs Python >= 3.11 with the venv module; tried: $(CANDIDATES)." \
	  "Install one (Debian: python3 and python3-venv) or name it: make PYTHON=/path/to/python3.11" >&2; \
	exit 1
