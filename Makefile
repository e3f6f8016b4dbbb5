# make demo   trains on handwritten digits with wrong labels and shows what is gained
# make check  lint, types, the tests of a step: while one works on it
# make test   lint, types, tests, doctests, wheel; what continuous integration runs
# make help   all of them

PYTHON ?= python3
JOBS ?= 2
# For bench, profile and paper: cuda12, cuda13 or tpu; nothing for the CPU.
ACCELERATOR ?=
OLDEST_PYTHON ?= python3.11
NEWEST_PYTHON ?= python3.12
TEST := .venv-test/bin
DEMO := .venv-demo/bin
RELEASE := .venv-release/bin
# What is never imported need not be compiled.
PIP := --quiet --disable-pip-version-check --no-compile
# Tests start processes that import the same again: compiled modules are kept.
unexport PYTHONDONTWRITEBYTECODE
# Environments for several accelerators stand side by side.
BENCH_ENV := .venv-bench$(ACCELERATOR:%=-%)
PAPER_ENV := .venv-paper$(ACCELERATOR:%=-%)

ifeq ($(ACCELERATOR),)
# XLA allocates the temporaries of a program anew at every call; glibc gets large ones
# back from the kernel faster in huge pages (docs/evidence/cost.md).
demo bench profile paper: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
else ifeq ($(filter $(ACCELERATOR),cuda12 cuda13 tpu),)
$(error ACCELERATOR must be cuda12, cuda13, tpu or nothing, got $(ACCELERATOR))
else
# Without it JAX goes on on the CPU where it finds no accelerator.
bench profile paper: export JAX_PLATFORMS := $(ACCELERATOR:cuda%=cuda),cpu
endif

# The package index has PyTorch for CPUs and for CUDA 13 alone; its libraries and those
# of CUDA 12 overwrite each other.
PEERS := $(if $(filter cuda12 tpu,$(ACCELERATOR)),experiments,benchmark)

.PHONY: help demo check test test-slow test-versions test-oldest test-newest lint format types pytest wheel docs bench profile paper clean

help:
	@sed -nE 's/^([a-z-]+):.*## /make \1\t/p' Makefile

# A virtual environment per extra, made anew when its requirements change.
.venv-test/.ready: EXTRA = dev
.venv-docs/.ready: EXTRA = docs
.venv-demo/.ready: EXTRA = experiments
.venv-release/.ready: EXTRA = release
$(BENCH_ENV)/.ready: EXTRA = $(PEERS)$(ACCELERATOR:%=,%)
$(PAPER_ENV)/.ready: EXTRA = data,experiments$(ACCELERATOR:%=,%)
.venv-%/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else \
	  "Python 3.11 or newer is needed, $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install $(PIP) --editable '.[$(EXTRA)]'
	@touch $@

demo: .venv-demo/.ready ## the main job: five methods on noisy digits; results in demo/
	$(DEMO)/python -m experiments.compare --config=experiments/configs/digits.py --workdir=demo

check: lint ## lint, types, tests of steps: one method of each kind, no subprocesses
	$(MAKE) --jobs=2 types steps CHECKED='vsam_jax tests/library'

.PHONY: steps
steps: .venv-test/.ready
	$(TEST)/python -m pytest -q -n $(JOBS) --dist worksteal \
	  -m 'not slow and not subprocess and not more_methods and not around' \
	  vsam_jax tests/library tests/test_layout.py

# Types take one process for a minute: the other cores are not kept waiting. What is
# wrong with them is shown last, where it is not lost among the tests.
test: lint ## lint, types, wheel, pytest
	@mkdir -p build
	@$(MAKE) types > build/types.txt 2>&1 & types=$$!; \
	  $(MAKE) wheel && $(MAKE) pytest; runs=$$?; \
	  wait $$types; failed=$$?; cat build/types.txt; exit $$((runs | failed))

lint: .venv-test/.ready ## ruff: style and formatting
	$(TEST)/ruff check .
	$(TEST)/ruff format --check .

format: .venv-test/.ready ## ruff: puts style and formatting right
	$(TEST)/ruff check --fix .
	$(TEST)/ruff format .

types: .venv-test/.ready ## pyright
	$(TEST)/pyright --pythonpath $(TEST)/python $(CHECKED)

pytest: .venv-test/.ready ## tests and doctests
	$(TEST)/python -m pytest -n $(JOBS) --dist worksteal

test-slow: .venv-test/.ready ## tests that take minutes
	$(TEST)/python -m pytest -m slow

test-versions: ## pytest on the oldest and the newest supported versions (two interpreters)
	$(MAKE) test-oldest test-newest

test-oldest: VERSION_PYTHON = $(OLDEST_PYTHON)
test-newest: VERSION_PYTHON = $(NEWEST_PYTHON)
test-oldest test-newest: test-%: pyproject.toml tests/versions/%.txt
	@$(VERSION_PYTHON) --version || { echo "$@: $(VERSION_PYTHON) is missing or does not start;" \
	  "name another: make $@ $(if $(findstring old,$@),OLDEST,NEWEST)_PYTHON=..." >&2; exit 1; }
	$(VERSION_PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install $(PIP) \
	  --constraint tests/versions/$*.txt --editable '.[dev]'
	.venv-$*/bin/python -m pytest -n $(JOBS) --dist worksteal

# In an environment of its own it is tried by `make release`, which takes longer.
wheel: .venv-test/.ready ## the wheel builds, and works without the files here
	rm -rf build/wheel
	$(TEST)/python -m build --wheel --outdir build/wheel . > /dev/null
	$(TEST)/python -m pip install $(PIP) --no-deps --target build/wheel/site build/wheel/*.whl
	PYTHONPATH=$(CURDIR)/build/wheel/site $(TEST)/python -P -W error tests/smoke.py

# A warning is an error, and so is a notebook that fails or a page that loads anything
# from elsewhere. Notebooks are kept in build/ and run again where something changed.
docs: .venv-docs/.ready ## the site, with its notebooks run: build/docs/index.html
	.venv-docs/bin/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet -j $(JOBS) \
	  -d build/doctrees docs build/docs
	.venv-docs/bin/python docs/_ext/offline.py build/docs

# make bench ACCELERATOR=cuda13: on a GPU, also without CUDA graphs (command buffers).
MEASURED := experiments/results/benchmark/$(or $(ACCELERATOR),cpu)
BENCH := $(BENCH_ENV)/bin/python -m experiments.benchmark

# Above the size of a program's temporaries, so that glibc keeps them.
KEPT := glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296

bench: $(BENCH_ENV)/.ready ## cost of steps and of whole runs, against optax and PyTorch
	$(BENCH) --rounds=7 --output=$(MEASURED).json
	$(BENCH) --few --rounds=41 --steps=1 --output=$(MEASURED)_closely.json
	$(BENCH) --parts=sweeps --rounds=7 --output=$(MEASURED)_sweeps.json
	$(BENCH) --parts=runs --windows=3 --output=$(MEASURED)_runs.json
ifeq ($(ACCELERATOR),)
	$(BENCH) --problems=transformer --notorch --output=$(MEASURED)_transformer.json
	GLIBC_TUNABLES= $(BENCH) --few --steps=1 --output=$(MEASURED)_small_pages.json
	GLIBC_TUNABLES=$(KEPT) $(BENCH) --few --rounds=41 --steps=1 --problems=mlp \
	  --output=$(MEASURED)_kept_memory.json
	GLIBC_TUNABLES=$(KEPT) $(BENCH) --parts=sweeps --rounds=7 \
	  --output=$(MEASURED)_sweeps_kept_memory.json
else ifneq ($(filter cuda%,$(ACCELERATOR)),)
	XLA_FLAGS="$(XLA_FLAGS) --xla_gpu_enable_command_buffer=" \
	  $(BENCH) --notorch --output=$(MEASURED)_without_graphs.json
endif

profile: $(BENCH_ENV)/.ready ## where the time and the memory of a step go
	$(BENCH_ENV)/bin/python -m experiments.benchmark.profile --output=$(MEASURED)_profile.json

# Overridden for a trial: make paper MODELS=small_resnet OPTIONS='--config.epochs=1 ...'
MODELS ?= resnet18 wide_resnet
CONFIG ?= experiments/configs/cifar100.py:short
RUNS ?= runs/paper
OPTIONS ?=
PAPER := $(PAPER_ENV)/bin

# Goes on where it was when it is started again, whatever ended it.
paper: $(PAPER_ENV)/.ready ## CIFAR-100 on an accelerator: tuning, seven methods, Figures 1 and 2
	for model in $(MODELS); do \
	  work=$(RUNS)/$$model; \
	  common="--config=$(CONFIG) --config.model=$$model $(OPTIONS)"; \
	  $(PAPER)/python -m experiments.tune $$common --workdir=$$work/tuning && \
	  $(PAPER)/python -m experiments.compare $$common --workdir=$$work \
	    --tuning=$$work/tuning/tuning.json || exit 1; \
	done
	$(PAPER)/python -m experiments.figures --workdir=$(RUNS) \
	  $(foreach model,$(MODELS),--comparison=$(RUNS)/$(model))

# For a machine that has jax, flax, optax, torch and scikit-learn but no package index.
PACK := build/gpu
GPU_PYTHON ?=
GPU := experiments.studies.proof
MINUTES ?= 30

.PHONY: gpu-pack gpu
gpu-pack: $(PAPER_ENV)/.ready ## what such a machine lacks, into build/gpu: wheels and CIFAR-100
	$(PAPER_ENV)/bin/python -m $(GPU).pack --output=$(PACK) --python=$(GPU_PYTHON)

gpu: ## there: steps and runs on its accelerator, the most important first
	$(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target $(PACK)/site $(PACK)/wheels/*.whl
	PYTHONPATH=$(PACK)/site $(PYTHON) -m $(GPU).gpu --pack=$(PACK) --minutes=$(MINUTES) $(OPTIONS)

.PHONY: release
release: .venv-test/.ready .venv-release/.ready ## a release but for the upload: sdist and wheel, checked and tried
	@test -z "$$(git status --porcelain)" || { git status --short; \
	  echo "release: these files are not committed" >&2; exit 1; }
	$(RELEASE)/python -m tests.release
	$(RELEASE)/cffconvert --validate
	rm -rf dist build/release
	$(RELEASE)/python -m build . > /dev/null
	$(RELEASE)/twine check --strict dist/*
	for built in dist/*; do \
	  $(PYTHON) -m venv --clear build/release/env && \
	  build/release/env/bin/python -m pip install $(PIP) $$built && \
	  build/release/env/bin/python -P -W error tests/smoke.py || exit 1; \
	done
	mkdir build/release/sdist && tar -xzf dist/*.tar.gz -C build/release/sdist --strip-components=1
	cd build/release/sdist && $(CURDIR)/$(TEST)/python -m pytest -q tests/test_release.py tests/library/test_plan.py
	@$(RELEASE)/python -m tests.release --next

clean: ## removes what the others made
	rm -rf .venv-* .jax_cache build demo dist runs
