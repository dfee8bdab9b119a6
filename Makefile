# make serve   run the server          make test    everything CI runs
# make check   lint, types, unit tests  make bench   benchmarks          make lock   renew requirements.lock
#                                       make bench-nodes   those of many nodes over Redis
# Pass options with ARGS: make serve ARGS="--port 9000". Choose an interpreter with PYTHON=/path/to/python3.12.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/pytest
UNIT_TESTS := $(wildcard tests/broker tests/transports tests/plugins tests/test_*.py)
BENCHMARKS := $(wildcard benchmarks/bench_*.py)

.PHONY: serve test check lint unit bench bench-nodes lock clean

serve: $(INSTALLED)
	@$(BIN)/broker serve $(ARGS)

test: $(INSTALLED)
	@sh scripts/get_test_tools.sh $(BIN)/python
	@$(MAKE) --no-print-directory lint
	$(PYTEST) -n 2 $(ARGS)

check: lint unit

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(INSTALLED)
	$(PYTEST) -q -n 2 $(UNIT_TESTS) $(ARGS)

bench: $(INSTALLED)
	$(if $(BENCHMARKS),,@echo "there are no programs benchmarks/bench_*.py")
	@set -e; for program in $(BENCHMARKS); do echo "== $$program"; $(BIN)/python $$program $(ARGS); done

# Not one of bench_*.py: it takes other options, and needs Redis.
bench-nodes: $(INSTALLED)
	@$(BIN)/python benchmarks/redis_nodes.py $(ARGS)

# Installs exactly what the lock file says; runs again when that or the project's own metadata changes.
$(INSTALLED): requirements.lock pyproject.toml scripts/make_venv.sh scripts/find_python.sh
	@sh scripts/make_venv.sh $(VENV)
	@touch $(INSTALLED)

lock:
	@sh scripts/lock.sh

clean:
	rm -rf $(VENV) .tools .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
