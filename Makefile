# make bench: verify every op and benchmark it against its peers on this machine
# make test:  the test suite
# make docs:  the documentation in site/, strictly: any warning, broken link or anchor fails
# all set everything up on a fresh machine: .venv, pinned packages, native libraries
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
BENCH ?= quick

.PHONY: bench peers test test-full lint docs native setup clean

bench: native peers
	$(PY) -m tilefuse verify --quick
	$(PY) -m tilefuse bench --suite $(BENCH)

# the libraries to compare with, in .peers/ and not in the environment; one line for each that cannot be had
peers: setup
	$(PY) scripts/install_peers.py

# within 30 minutes on two quiet cores: the log names the slowest
test: native
	$(PY) -m pytest -n 2 --dist loadgroup -m "not slow and not gpu" --durations=60

test-full: native
	$(PY) -m pytest -n 2 --dist loadgroup -m "not gpu"

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	find csrc -type f | xargs $(VENV)/bin/clang-format --dry-run --Werror
	$(VENV)/bin/basedpyright
	$(PY) scripts/check_counts.py

# site/ needs no network to read; search works where it is served: $(PY) -m http.server -d site
docs: native
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "open site/index.html"

# the native libraries build into python/tilefuse when g++ (and nvcc) are on PATH, else one line says why not
native: setup
	$(PY) setup.py -q build_ext --inplace

setup: $(VENV)/.installed

$(VENV)/.installed: requirements-dev.txt setup.py pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements-dev.txt
	TILEFUSE_BUILD_NATIVE=0 $(PY) -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf build site .peers $(VENV) python/tilefuse/_*.so
