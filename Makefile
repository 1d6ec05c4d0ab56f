# Two targets matter: `make check` (the main job) and `make test` (all tests). Both do their own set-up in .venv from
# nothing but a python3 of 3.11 to 3.13, and skip it while pyproject.toml has not changed.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
# Test processes: one per core, at most 8 (each holds a copy of Torch). They share the cores, so each runs one thread.
JOBS   ?= $(shell .venv/bin/python -c 'import os; print(min(8, len(os.sched_getaffinity(0))))' 2>/dev/null || echo 2)
BIN    := .venv/bin
# Torch in a pip call of its own, before the rest: on a machine without a GPU this takes the small build.
TORCH  := torch==2.13.0
# The Triton that belongs to it. Elsewhere than on Linux there is none, and the checks that need it say so.
TRITON := triton==3.7.1; platform_system == "Linux"
# Everything that the README shows works after `make check`: its commands need these, and its tests pytest.
EXTRAS := bench,book,check,fast,witness
PYTEST := 'pytest>=8'
# A clone is called refllm, and so a script in the folder above it finds that folder instead of the package in it. Asked
# first, the finder of the editable install knows better; where PYTHONPATH names another copy, that one counts.
FINDER := import os, sys; "PYTHONPATH" in os.environ or sys.meta_path.sort(key=lambda f: "editable___refllm" not in getattr(f, "__module__", ""))

.DEFAULT_GOAL := help
.PHONY: help check test test-stacks test-cpus test-long test-wheel mutation lint types imports house format bench gpu golden clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

check: .venv/ready-to-check  ## the main job: every embedded checkpoint; Torch, Triton and Transformers against it
	$(BIN)/refllm check

test: .venv/ready-to-test  ## all tests
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-ci} $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

STACK ?=
test-stacks: .venv/ready-to-check  ## other people's stacks, each in an environment of its own: all, or STACK="litgpt mlx"; needs a network
	$(BIN)/python tests/house/run_stacks.py $(STACK) $(ARGS)

test-cpus: .venv/ready-to-test  ## what depends on the processor, and `refllm check`, under every CPU that can be simulated
	$(BIN)/python tests/house/run_cpus.py $(ARGS)

MINUTES ?= 60
test-long: .venv/ready-to-test  ## the drawn tests with random seeds for an hour, or MINUTES=...
	$(BIN)/python tests/house/run_long.py --minutes $(MINUTES)

PYTHONS ?=
test-wheel: .venv/ready-to-check  ## the wheel in clean environments of Python 3.11 to 3.13, or PYTHONS="..."; needs a network
	$(BIN)/python tests/house/check_wheel.py $(addprefix --python ,$(PYTHONS)) $(ARGS)

MUTANTS ?= 60
SEED    ?=
mutation: .venv/ready-to-test  ## how many changes of the product the tests notice: MUTANTS=60, drawn with SEED=...
	$(BIN)/python tests/house/run_mutation.py --mutants $(MUTANTS) $(if $(SEED),--seed $(SEED))

lint: .venv/ready-to-test  ## ruff: rules and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready-to-test  ## mypy over refllm, kernels and golden
	$(BIN)/python tests/house/check_types.py

imports: .venv/ready-to-test  ## who may import whom: the contracts of pyproject.toml, by import-linter
	$(BIN)/python tests/house/check_imports.py

house: .venv/ready-to-check  ## draw docs/house.svg, the rooms and their imports, again
	$(BIN)/python tests/house/draw_house.py

format: .venv/ready-to-test  ## let ruff lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/ready-to-test  ## speed and memory on this CPU, against Transformers
	$(BIN)/refllm bench cpu

# On a machine that has torch, triton and a GPU already, with or without a network: installs nothing but this project,
# into a folder of its own, and uses that machine's python3.
GPU_PYTHON ?= python3
GPU_FILE   ?= build/gpu.json
gpu:  ## on a machine with a GPU: the kernels compiled, against their definitions, and timed; writes build/gpu.json
	@$(GPU_PYTHON) -c 'import torch, triton; assert torch.cuda.is_available()' 2>/dev/null || { echo \
		"make gpu needs a python3 that has torch and triton and sees a GPU; name another with GPU_PYTHON=..." >&2; exit 2; }
	@rm -rf build/gpu build/lib
	@$(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --no-build-isolation --target build/gpu .
	PYTHONPATH=build/gpu $(GPU_PYTHON) -P -m refllm.bench.gpu --output $(GPU_FILE)

golden: .venv/ready-to-check  ## make the embedded checkpoints again, then the golden vectors (ARGS=--yes replaces them)
	$(BIN)/python -m refllm.golden.make_checkpoints
	$(BIN)/refllm golden make $(ARGS)

clean:  ## remove everything that make made
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/ready-to-check: pyproject.toml
	@test -n "$(PYTHON)" || { echo "refllm needs python3 of version 3.11, 3.12 or 3.13 with the venv module" >&2; exit 2; }
	@echo "setting up .venv (once; takes a minute or a few)"
	@$(BIN)/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet $(TORCH)
	@$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]' '$(TRITON)' $(PYTEST)
	@echo '$(FINDER)' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/refllm-first.pth"
	@touch $@

.venv/ready-to-test: .venv/ready-to-check
	@$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@
