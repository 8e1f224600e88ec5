# The two commands of the README are `make demo` and `make test`; everything else is for people who change the code.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DATA ?= data/fashion-mnist
DEMO ?= demo

.DEFAULT_GOAL := help
.PHONY: help install demo test check format bench clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# A stamp newer than what it was made from means that a second run installs nothing.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "midge needs Python >= 3.10: make PYTHON=/path/to/python3 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/midge  # pyright cannot follow the editable install's hook
	@touch $@

install: $(STAMP) ## Create .venv and install midge with everything it can use

$(DATA)/SOURCE.json: | $(STAMP)
	$(BIN)/midge data fetch fashion-mnist --out $(DATA)

demo: $(STAMP) $(DATA)/SOURCE.json ## The main job: pretrain, export, quantize, measure, compare (about 8 minutes on 2 cores)
	$(BIN)/midge run quickstart --data $(DATA) --out $(DEMO) --resume

# Two processes with a thread each: more threads than cores wait for each other. CONTRIBUTING says why by worksteal.
test: check ## Install, lint, type-check and run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

check: $(STAMP) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --warnings

format: $(STAMP) ## Let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## The benchmarks of tests/bench, as tables
	@for bench in tests/bench/bench_*.py; do echo "== $$bench"; $(BIN)/python $$bench $(BENCH_ARGS) || exit 1; done

clean: ## Remove what make test and make demo leave (the environment and the data stay)
	rm -rf $(DEMO) build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
