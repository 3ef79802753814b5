# Every target sets up what it needs. Override: make test VENV=/tmp/venv PYTHON=python3.13

PYTHON ?= python3
VENV ?= .venv
BUDGET ?= 60
SPEED_BUDGET ?= 700
WORKERS ?= 2

# Workers share the cores: threads of OpenMP would spin while the others compute.
test test-all: export OMP_NUM_THREADS = 1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
BENCH = --budget $(BUDGET) --restart --optional --out build/bench
LOCK := uv pip compile pyproject.toml --universal --python-version 3.11 --fork-strategy fewest \
	--generate-hashes --no-emit-index-url --no-emit-find-links --no-header --quiet --extra all

.PHONY: demo test test-all lint format bench bench-full bench-smoke docs lock clean
.DELETE_ON_ERROR:

demo: $(VENV)/.run-ready
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev-ready
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-all: $(VENV)/.dev-ready
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "slow or not slow"

lint: $(VENV)/.dev-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.dev-ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Speed beside the rivals, whose environments it makes: about 15 minutes on two cores. What did not
# fit is named. The full run takes hours, can be stopped, and goes on where it was.
bench: $(VENV)/.run-ready
	$(BIN)/python benchmarks/speed.py --budget $(SPEED_BUDGET) --rounds 3 --seconds 0.2 \
		--restart --out build/bench/speed.jsonl

bench-full: $(VENV)/.run-ready
	$(BIN)/python benchmarks/speed.py --budget 86400 --rounds 9 --compile all --timeout 900 --resume \
		--out build/bench/speed-full.jsonl

# A short run of every other claim, to see that it works; benchmarks/README.md has full budgets,
# rivals, and what LAMINAR_DATA must hold. What has no data here is skipped.
bench-smoke: $(VENV)/.run-ready
	$(BIN)/python benchmarks/incremental.py $(BENCH)/incremental.jsonl --dims 2,8,43
	$(BIN)/python benchmarks/errors.py $(BENCH)/errors.jsonl --depths 1
	$(BIN)/python benchmarks/defaults.py $(BENCH)/defaults.jsonl --sizes 200 --splits 1
	$(BIN)/python benchmarks/mixed.py $(BENCH)/mixed.jsonl --rows 500
	$(BIN)/python benchmarks/ugly.py $(BENCH)/ugly.jsonl --only category
	$(BIN)/python benchmarks/bsds300.py $(BENCH)/bsds300 --test-rows 10000
	$(BIN)/python benchmarks/figure3.py $(BENCH)/figure3.jsonl --seeds 1 --steps 500 --targets U1 --flows planar
	$(BIN)/python benchmarks/posteriordb.py $(BENCH)/posteriordb.jsonl --methods laminar,NUTS
	$(BIN)/python benchmarks/hard_targets.py $(BENCH)/hard_targets.jsonl
	$(BIN)/python benchmarks/dlgm.py $(BENCH)/dlgm.jsonl --data digits --posterior diagonal,planar-10

docs: $(VENV)/.dev-ready
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# Pins with hashes for every platform and for Python 3.11 and newer; needs uv.
lock:
	$(LOCK) --group build --output-file requirements.txt
	$(LOCK) --group dev --constraint requirements.txt --output-file requirements-dev.txt

clean:
	rm -rf build dist demo docs/_build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks examples docs -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run-ready: requirements.txt pyproject.toml | $(VENV)/pyvenv.cfg
	$(PIP) --require-hashes -r requirements.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev-ready: requirements-dev.txt pyproject.toml | $(VENV)/pyvenv.cfg
	$(PIP) --require-hashes -r requirements-dev.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@
