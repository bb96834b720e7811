# Everything is set up by the first target that needs it: `make demo`, `make test`.
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
READY := $(VENV)/.ready

.PHONY: help demo test test-long check format bench clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/pip install --quiet uv

# The interpreter that .python-version names; a stand-in of the same version is fine.
$(READY): pyproject.toml constraints.txt | $(filter .uv/bin/uv,$(UV))
	$(UV) venv --quiet --allow-existing $(VENV)
	$(UV) pip install --quiet --python $(BIN)/python --constraint constraints.txt --compile-bytecode --editable . --group dev
	$(BIN)/python -m compileall -q tilenet
	@touch $@

demo: $(READY) ## segment two real images with the bundled model, write masks and pictures
	$(BIN)/python examples/demo.py demo

PYTEST := $(BIN)/python -m pytest
PARALLEL := -n 2 --dist loadfile --max-worker-restart 0

test: $(READY) ## run the tests (needs no network, no GPU; a quarter of an hour on two cores)
	$(PYTEST) $(PARALLEL) -m "not alone and not long"; first=$$?; $(PYTEST) -m alone && exit $$first

test-long: $(READY) ## run the tests that take longer each (four minutes more)
	$(PYTEST) $(PARALLEL) -m long

check: $(READY) ## lint, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## measure speed and memory on generated rasters
	$(BIN)/python tests/benchmarks/bench.py

clean: ## remove what make made
	rm -rf $(VENV) .uv demo bench

.PHONY: quality
quality: $(READY) ## measure the bundled model and what tiling changes
	$(BIN)/python tests/benchmarks/quality.py

.PHONY: bench-overhead
bench-overhead: $(READY) ## measure what surrounds the network: starting, small images, planning, Dask, exports
	$(BIN)/python tests/benchmarks/overhead.py

.PHONY: bench-memory
bench-memory: $(READY) ## measure whether memory and speed stay flat up to 32,768² (half an hour, 2 GB)
	$(BIN)/python tests/benchmarks/memory.py

.PHONY: bench-rivals
bench-rivals: $(READY) ## measure against MONAI, which is installed apart
	UV=$(UV) $(BIN)/python tests/benchmarks/rivals.py

.PHONY: bench-training
bench-training: $(READY) ## train on real data: DATA=folder of data sets, WEIGHTS=lite0.pth
	$(BIN)/python tests/benchmarks/training.py "$(DATA)" "$(WEIGHTS)"

.PHONY: bench-scaling
bench-scaling: $(READY) ## measure 1 to 32 workers, and what a scheduler takes for 100,000 blocks (half an hour, 3 GB)
	$(BIN)/python tests/benchmarks/scaling.py

.PHONY: cluster
cluster: $(READY) ## cut hosts of a cluster off from each other (needs network namespaces; ten minutes)
	$(BIN)/python tests/hosts

.PHONY: fault fault-long
fault: $(READY) ## break runs in every way we know and compare with undisturbed ones (ten minutes)
	$(BIN)/python tests/fault

fault-long: $(READY) ## the same, hundreds of times (hours)
	$(BIN)/python tests/fault --long

.PHONY: nightly
nightly: $(READY) ## segment 500 small slides, five of them broken, and the same again (the tests have 60)
	TILENET_SLIDES=500 $(BIN)/python -m pytest -s -k ManySlides tests/test_nightly.py

.PHONY: slurm images workflows
slurm: $(READY) ## run the SLURM workflows on a real SLURM of this machine (Debian, as root)
	tests/slurm/cluster.sh install
	$(BIN)/python -m pytest -o faulthandler_timeout=0 tests/test_slurm.py

images: $(READY) ## build docker/ with a real Docker, run the images and compose.yaml (Debian, as root; 20 GB)
	tests/images/docker.sh install
	UV=$(UV) TILENET_IMAGES=bench/images $(BIN)/python -m pytest -o faulthandler_timeout=0 tests/test_images.py

workflows: $(READY) ## run the Airflow and Prefect flows, and lint what needs more tools, installed apart
	UV=$(UV) TILENET_FLOWS=bench/flows $(BIN)/python -m pytest -o faulthandler_timeout=0 tests/test_workflows.py tests/test_flows.py
