# Everything here works on a bare machine with Python 3.11 or newer; `make` alone lists what there is.
#
#   PYTHON=python3.12                                    the interpreter to build .venv with
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu     where torch comes from (this one: the small CPU build)
#   ARGS="..."                                           passed on to the demo, the benchmark or pytest

BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-all checks bench clean

# One thread to a worker. A file's tests stay on one worker, so that what they share is made once. Bytecode is kept,
# whatever the environment says: without it, pytest rewrites every assertion anew in each of its processes.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s%s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@sed -n 's/^#   \([A-Z_]*=.*\)/  \1/p' $(MAKEFILE_LIST)

demo:  ## a small model served with a drafter that learns: a table and a plot
	@sh tools/setup.sh run
	@$(BIN)/onlinespec demo $(ARGS)

test: checks  ## lint, format, types, then every test that needs no GPU and no network, long proofs in short
	@echo "4/4 pytest: tests and doctests, on two workers; proofs at their full length are for make test-all"
	@$(PYTEST) -m "not full" $(ARGS)

test-all: checks  ## the same, with every proof at its full length
	@echo "4/4 pytest: tests and doctests, all of them, on two workers"
	@$(PYTEST) $(ARGS)

checks:
	@sh tools/setup.sh dev
	@echo "1/4 ruff check: lint"
	@$(BIN)/ruff check .
	@echo "2/4 ruff format --check: formatting"
	@$(BIN)/ruff format --check .
	@echo "3/4 mypy --strict: the types of src/ (slower the first time, then it has a cache)"
	@$(BIN)/mypy

bench:  ## what one forward pass of a target costs on this machine
	@sh tools/setup.sh run
	@$(BIN)/python benchmarks/forward.py $(ARGS)

clean:  ## remove .venv and every cache; results under runs/ stay
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
