# The commands of the project: `make help` lists them. Each makes .venv once, and again when a requirement changes.

PYTHON ?= python3
# On Linux the default package index has the CUDA build of torch only (gigabytes), so without an NVIDIA driver PyTorch's own
# index of CPU builds is asked as well. TORCH_INDEX= turns this off, TORCH_INDEX=URL names another.
ifeq ($(shell uname -s)$(shell command -v nvidia-smi),Linux)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif

BIN := .venv/bin
INSTALLED := .venv/installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help quickstart test test-slow test-gpu lint docs clean

help: ## list these commands
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 20

quickstart: $(INSTALLED) ## pretrain a small ViT on bundled images, in minutes on a CPU
	$(BIN)/accelerate launch hf_accel/run.py recipes/simclr.yaml
	@out=$$(sed -nE 's/^output_dir: *([^ #]+).*/\1/p' recipes/simclr.yaml); \
	echo; \
	echo "results      $$out/results.json"; \
	echo "curves       $$out/curves.png"; \
	echo "encoder      $$out/final    (AutoModel.from_pretrained opens it after import hf_accel)"

test: $(INSTALLED) ## the fast tests
	$(BIN)/pytest -n 2 --dist loadfile

test-slow: $(INSTALLED) ## the slow tests: whole runs, several processes
	$(BIN)/pytest -m slow -n 2 --dist loadfile

test-gpu: $(INSTALLED) ## the tests that need a GPU; `python -m benchmarks.gpu FOLDER` also measures
	$(BIN)/pytest -m gpu

lint: $(INSTALLED) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(INSTALLED) ## build the documentation into site/; broken links are errors
	$(BIN)/mkdocs build --strict --quiet

clean: ## remove .venv and caches, keep runs
	rm -rf .venv .pytest_cache .ruff_cache build site hf_accel.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(PIP) install -q --no-deps --retries 0 --extra-index-url $(TORCH_INDEX) -c constraints.txt torch)
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@# For tests, in a folder of its own: the accelerate command imports timm where it finds it, and that needs torchvision
	$(PIP) install -q --no-deps --upgrade --target .venv/timm -c constraints.txt timm
	@touch $@
