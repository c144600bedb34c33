# make demo    a whole job on sample photographs
# make test    lint, types and all tests
# make bench   speed and memory, against a plain Beam job (see benchmarks/README.md)
# PYTHON and VENV choose the interpreter and the place of the environment.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = $(wildcard *.py configs/*.py configs/*/*.yaml modules/*.py modules/*/*.py pipelines/*.py transforms/*.py)
MODULE = mobilenet_v2_050_224

.PHONY: demo test lint types unit bench clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: pyproject.toml $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet '.[openvino]'
	touch $@

$(VENV)/dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet '.[dev]'
	touch $@

# Tests run against the installed package, as users have it.
$(VENV)/package: $(SOURCES) $(VENV)/dev
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall .
	touch $@

demo: $(VENV)/demo
	@echo
	@if $(BIN)/hubbeam modules fetch $(MODULE); then \
	  $(BIN)/hubbeam extract tests/photos --module $(MODULE) --output demo/vectors --overwrite; \
	else \
	  echo; \
	  echo '*** The module cannot be fetched. This demo builds an UNTRAINED stand-in of the same'; \
	  echo '*** shape and uses that: its vectors have the right form and mean nothing.'; \
	  echo; \
	  rm -rf demo/$(MODULE) && \
	  $(BIN)/hubbeam modules build $(MODULE) --untrained --output demo/$(MODULE) && \
	  $(BIN)/hubbeam extract tests/photos --module demo/$(MODULE) --output demo/vectors --store demo/store --overwrite; \
	fi
	@echo; echo 'The vectors: demo/vectors/$(MODULE)/*.parquet'
	@$(BIN)/python -c "import pyarrow.parquet as pq; \
	  t = pq.read_table('demo/vectors/$(MODULE)', columns=['uri', 'vector']); \
	  [print(u.rsplit('/', 1)[-1].ljust(24), [round(x, 3) for x in v[:6]], '...', len(v)) \
	   for u, v in zip(t['uri'].to_pylist(), t['vector'].to_pylist())]"

test: lint types unit

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/package
	$(BIN)/mypy -p hubbeam

unit: $(VENV)/package
	$(BIN)/python -m pytest -n auto --dist loadfile

# In an environment of its own, for what else is installed counts: Beam imports Google's libraries
# and pandas wherever it finds them, which takes seconds.
$(VENV)-bench/package: pyproject.toml $(SOURCES)
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip install --quiet '.[bench]'
	touch $@

bench: $(VENV)-bench/package
	$(VENV)-bench/bin/python benchmarks/bench.py $(if $(BENCH_MODULE),--module $(BENCH_MODULE)) $(BENCH_ARGS)

clean:
	rm -rf $(VENV) $(VENV)-bench build demo *.egg-info
