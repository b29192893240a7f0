# Everything runs inside .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
WORK ?= build/embedded-model

.DEFAULT_GOAL := help
.PHONY: help demo docs test check oldest gpu format notebook benchmarks embedded-model clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(INSTALLED)  ## Set up, draw with and without guidance on the embedded model, compare in demo.png
	$(BIN)/svdd predict --config configs/quickstart.yaml --output runs/demo/unguided --overwrite true --model.sampler Unguided
	$(BIN)/svdd predict --config configs/quickstart.yaml --output runs/demo/best-of-8 --overwrite true --model.sampler BestOfN --model.sampler.num_particles 8
	$(BIN)/svdd predict --config configs/quickstart.yaml --output runs/demo/svdd --overwrite true
	$(BIN)/svdd compare runs/demo/unguided runs/demo/best-of-8 runs/demo/svdd --output demo.png

docs: $(INSTALLED)  ## Build the documentation site in build/site, which opens without a server; any broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: $(INSTALLED)  ## Set up and run all tests
	$(TESTS)

check: $(INSTALLED)  ## Lint, types and the fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m compileall -q svdd
	$(TESTS) -m 'not slow and not gpu'

oldest: $(INSTALLED)  ## Install the lowest versions that pyproject.toml allows in .venv-oldest and run the fast tests
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	$(BIN)/python -m tools.oldest > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv-oldest/constraints.txt --editable '.[dev]'
	.venv-oldest/bin/python -m pytest -m 'not slow and not gpu'

gpu: $(INSTALLED)  ## On a machine with a GPU: the tests marked gpu, and speed and memory of all shapes (an hour)
	$(BIN)/python -m pytest -m gpu
	for shape in emoji sd15 sdxl sd35 flux; do $(BIN)/python -m benchmarks.hardware --shape $$shape --device cuda; done

format: $(INSTALLED)  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

notebook: $(INSTALLED)  ## Execute examples/quickstart.ipynb again
	$(BIN)/python -m tools.notebook

benchmarks: $(INSTALLED)  ## Measure everything that the docs quote (a day on 2 cores; --processes and --device cuda shorten it; continued where it stopped)
	$(BIN)/python -m benchmarks.coverage
	$(BIN)/python -m benchmarks.guidance
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.arithmetic
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.previews
	$(BIN)/python -m benchmarks.over_optimisation
	$(BIN)/python -m benchmarks.values
	$(BIN)/python -m benchmarks.values --reward clipscore
	$(BIN)/python -m benchmarks.samplers
	$(BIN)/python -m benchmarks.transitions
	$(BIN)/python -m benchmarks.compute
	$(BIN)/python -m benchmarks.starts
	$(BIN)/python -m benchmarks.temperature
	$(BIN)/python -m benchmarks.default_settings
	$(BIN)/python -m benchmarks.preview_ranks
	$(BIN)/python -m benchmarks.choose_start
	$(BIN)/python -m benchmarks.scale --processes 26
	$(BIN)/python -m benchmarks.text_rendering
	$(BIN)/python -m benchmarks.safety
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps rapidocr-onnxruntime
	$(BIN)/python -m benchmarks.guided_text
	$(BIN)/python -m benchmarks.app_memory

embedded-model: $(INSTALLED)  ## Rebuild the embedded model from its data (hours; continues where it stopped)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train]'
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.embedded_model.vae --work $(WORK)
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.embedded_model.clip --work $(WORK) --name clip
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.embedded_model.clip --work $(WORK) --name judge
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.embedded_model.unet --work $(WORK)
	OMP_NUM_THREADS=2 $(BIN)/python -m tools.embedded_model.flow --work $(WORK)
	$(BIN)/python -m tools.embedded_model.export --work $(WORK)
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.embedded_model.tiny_decoder --work $(WORK)
	$(BIN)/python -m tools.embedded_model.contact_sheets

clean:  ## Remove caches and runs, keep the environment
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache
