# FednnU-Net Appliance. A fresh machine needs python3 (3.11 to 3.13) with venv, and make; `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# One thread for each process: several nnU-Nets share the cores in tests and in the demo.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONUTF8=1
PACKAGES := federation appliance orchestrator
PYTEST_ARGS ?=
# Two processes for the tests: a federation waits as much as it computes. A file's tests stay in one, the long files first.
WORKERS ?= 2
PARALLEL = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Images: BASE=docker pulls a slim Python, BASE=debian makes one from Debian's packages where no registry is reached.
DOCKER ?= docker
TORCH ?= cpu
BASE ?= docker
BASE_IMAGE ?= fednnunet/base:bookworm
TOOLS_IMAGE ?= fednnunet/tools:bookworm
SOURCE ?= unknown
# The files of the tests with a marker: collecting all others takes half a minute.
marked = $(shell grep -rlE 'mark\.$(1)\b' tests --include='test_*.py')
IMAGES = --base-image $(BASE_IMAGE) --tools-image $(TOOLS_IMAGE) --source $(SOURCE)
export DOCKER BASE_IMAGE

.DEFAULT_GOAL := help
.PHONY: help demo test test-shaken test-long test-exhaustive faults test-browser test-gpu test-containers test-charts helm-tools test-fresh lint format benchmark docs pictures lock base-image wheelhouse image \
    image-sizes clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## three phantom hospitals train one model on this machine (under 4 minutes on 2 cores)
	@$(BIN)/fednnunet simulate demo

test: $(READY) ## unit tests and whole federations on this machine (about 15 minutes on 2 cores)
	@$(ONE_THREAD) $(BIN)/python -m pytest -m "not long and not exhaustive and not browser and not containers and not charts and not gpu and not benchmark" \
	    $(PARALLEL) --durations=10 $(PYTEST_ARGS)

test-shaken: $(READY) ## `make test` with threads that begin late and folders in any order: finds races (about 15 minutes)
	@PYTHONPATH="$(CURDIR)/tests/shaken" $(MAKE) --no-print-directory test

test-long: $(READY) ## whole studies for rarer cases: full disks, a cascade, real data, the pages of the documentation
	@$(ONE_THREAD) $(BIN)/python -m pytest $(call marked,long) -m "long and not exhaustive" $(PARALLEL) --durations=10 $(PYTEST_ARGS)

test-exhaustive: $(READY) ## each trainer, all folds, more processes killed, a disk that fails at every write (long)
	@$(ONE_THREAD) $(BIN)/python -m pytest $(call marked,exhaustive) -m exhaustive $(PARALLEL) --durations=10 $(PYTEST_ARGS)

faults: $(READY) ## kill -9 at every transition, a disk that fails at every write (very long); figures in build/faults.json
	@$(ONE_THREAD) FAULTS_SHARE=1 $(BIN)/python -m pytest tests/faults/test_every_transition.py tests/faults/test_disk.py $(PYTEST_ARGS)

test-browser: $(READY) ## reports and the web page in a real browser (needs Chromium: apt-get install chromium)
	@$(ONE_THREAD) $(BIN)/python -m pytest $(call marked,browser) -m browser --durations=10 $(PYTEST_ARGS)

test-gpu: $(READY) ## the worker on a CUDA device: mixed precision, memory, a device that is lost (skipped without one)
	@$(BIN)/python -m pytest $(call marked,gpu) -m gpu --durations=10 $(PYTEST_ARGS)

test-containers: $(READY) image helm-tools ## real images, compose federations, pods, bundles (needs a running Docker engine)
	@$(BIN)/python -m pytest $(call marked,containers) -m containers --durations=10 $(PYTEST_ARGS)

test-charts: $(READY) helm-tools ## helm 3 and 4 lint and render, schemas, policies, references (no cluster needed)
	@$(BIN)/python -m pytest $(call marked,charts) -m charts --durations=10 $(PYTEST_ARGS)

helm-tools: $(READY) ## fetch helm 3 and 4, kubectl and the checkers into build/helm
	@PYTHON=$(BIN)/python helm/tools.sh

test-fresh: ## the README's two commands, by an ordinary user in a bare Debian container (half an hour; needs a Docker engine)
	@images/fresh.sh

lint: $(READY) ## ruff, mypy --strict, the layer rules and the Dockerfiles
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@! test -x $(BIN)/hadolint || $(BIN)/hadolint images/*.Dockerfile

format: $(READY) ## write the code the way lint wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(READY) ## measure fingerprint, wire, aggregation and rounds (minutes; BENCHMARKS="a.py b.py" picks some)
	@for file in $(or $(BENCHMARKS),$(sort $(wildcard benchmarks/[a-z]*.py))); do \
	    echo "== $$file"; $(ONE_THREAD) $(BIN)/python $$file || exit 1; \
	done

lock: $(READY) ## choose anew what the images install (images/*.lock)
	@$(BIN)/python images/lock.py

base-image: ## the images' base: from a slim Python, or with BASE=debian from Debian's packages
ifeq ($(BASE),debian)
	@$(DOCKER) image inspect $(BASE_IMAGE) >/dev/null 2>&1 || images/base.sh $(BASE_IMAGE)
	@$(DOCKER) image inspect $(TOOLS_IMAGE) >/dev/null 2>&1 || images/base.sh $(TOOLS_IMAGE) binutils
else
	@DOCKER_BUILDKIT=1 $(DOCKER) build -f images/base.Dockerfile --target base -t $(BASE_IMAGE) images
	@DOCKER_BUILDKIT=1 $(DOCKER) build -f images/base.Dockerfile --target tools -t $(TOOLS_IMAGE) images
endif

wheelhouse: $(READY) ## collect what the images install into build/wheels (TORCH=cpu|cuda)
	@PYTHON=$(BIN)/python images/wheelhouse.sh cpu
	@test $(TORCH) = cpu || PYTHON=$(BIN)/python images/wheelhouse.sh $(TORCH)

image: base-image wheelhouse ## build both images, with no network (TORCH=cuda: the appliance for NVIDIA GPUs)
	@$(BIN)/fednnunet image build appliance --torch $(TORCH) $(IMAGES)
	@$(BIN)/fednnunet image build orchestrator $(IMAGES)

image-sizes: $(READY) ## where the images' bytes are; the CUDA image's from its wheels' metadata
	@$(BIN)/python images/sizes.py

docs: $(READY) ## write docs/reference anew from the code, and build the site into build/docs
	@$(BIN)/python docs/generate.py
	@$(BIN)/sphinx-build -q -W -E -b html docs build/docs
	@echo "build/docs/index.html"

pictures: $(READY) ## make the documentation's pictures anew from a real study (5 minutes; needs Chromium)
	@$(ONE_THREAD) $(BIN)/python docs/pictures.py

clean: ## remove what tests, demo and lint left (not .venv)
	rm -rf build dist demo fednnunet-state .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find $(PACKAGES) tests docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## remove .venv too
	rm -rf $(VENV)

# torch first and alone: pip would else take a newer build while it resolves nnU-Net.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "Python %d.%d found; 3.11 to 3.13 needed: make PYTHON=python3.11 ..." % v)'
	@echo "1/4 Python environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "2/4 torch (a few hundred MB)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@echo "3/4 nnU-Net, Flower and the rest"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@$(BIN)/python -c 'import platform; from importlib.metadata import version as v; print("4/4 ready: Python", platform.python_version(), *(f"{n} {v(n)}" for n in ("torch", "nnunetv2", "flwr")))'
	@touch $@
