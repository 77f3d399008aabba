# Everything happens in .venv, which each target makes when it is not there. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
# One process a core, up to two: for so small a network that is nearly twice as fast as two threads, and the same run.
RANKS := $(shell test "$$(nproc)" -gt 1 && echo 2 || echo 1)
PYTEST := $(BIN)/python -m pytest -n $(RANKS) --dist loadgroup
BENCHES := $(wildcard benchmarks/ops/bench_*.py benchmarks/bench_*.py)
BENCH_STORE := .benchmarks/$(shell uname -n)
BENCH_LIMIT ?= 25%
PACKAGING := setup.py pyproject.toml kernels/setup.py
unexport PYTHONDONTWRITEBYTECODE  # where it is set, each process would spend seconds on compiling torch anew

.DEFAULT_GOAL := help
.PHONY: help venv lint browser test test-slow test-long gpu-check bench bench-compare results demo docs pictures dist clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp ## install, get Fashion-MNIST, pretrain configs/demo.yaml, evaluate (4 to 11 minutes on 2 cores)
	@echo "== Fashion-MNIST: fetching it unless it is already here"
	@$(BIN)/fastjepa data get fashion-mnist
	@echo "== Pretraining configs/demo.yaml into $(DEMO) (continues a run that was stopped)"
	@$(BIN)/torchrun --standalone --nproc_per_node $(RANKS) fastjepa/train.py --config configs/demo.yaml --output $(DEMO) \
		data.batch_size=$$((64 / $(RANKS)))
	@echo "== Evaluating: raw pixels, random encoder, context encoder, target encoder"
	@$(BIN)/fastjepa eval table --checkpoint $(DEMO) --data fashion-mnist --n-train 10000
	@echo "== Writing its report"
	@$(BIN)/fastjepa report $(DEMO)
	@echo "== Done"
	@echo "  all of it, one page  $(DEMO)/report.html: open it in a browser"
	@echo "  config and versions  $(DEMO)/config.yaml, $(DEMO)/run.json"
	@echo "  every logged step    $(DEMO)/metrics.jsonl"
	@echo "  weights              $(DEMO)/checkpoints/"
	@echo "  the command          $(BIN)/fastjepa --help"

browser: ## Chromium, which the tests of the report's page need, by apt where there is none
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
		as=$$(test "$$(id -u)" -eq 0 || echo sudo); \
		$$as apt-get update -qq && $$as apt-get install -y -qq --no-install-recommends chromium

test: $(VENV)/dev.stamp ## every test that needs no GPU and is neither slow nor long (under 6 minutes on 2 cores)
	$(PYTEST) -m "not slow and not long"
	@echo "== The ops, on Triton's interpreter where there is no GPU"
	$(PYTEST) -m "not slow" tests/ops

test-slow: $(VENV)/dev.stamp ## the slow tests: launchers, ZeRO, compiled networks, other architectures (under 10 minutes on 2 cores)
	$(PYTEST) -m slow --durations 20
	$(PYTEST) -m slow tests/ops

test-long: $(VENV)/dev.stamp ## the long tests: leaks, NVMe, wheels, ViT-H, every command of the pages (each night on GitHub)
	$(PYTEST) -m long --durations 20

gpu-check: ## all that needs a card: tests, steps, benches (any PYTHON with torch; ARGS='--part ops|steps|hours|data')
	PYTHONPATH=kernels:. $(PYTHON) benchmarks/gpu_check.py $(ARGS)

bench: $(VENV)/dev.stamp ## time the ops, and save the result of this machine (ARGS='-k "not compiled"', '--toy')
	@mkdir -p $(BENCH_STORE)
	$(BIN)/python -m pytest $(BENCHES) --benchmark-storage=file://$(BENCH_STORE) --benchmark-autosave \
		--benchmark-json=$(BENCH_STORE)/bench.json $(ARGS)

bench-compare: $(VENV)/dev.stamp ## the same against this machine's last saved result: fails where a median grew by more than BENCH_LIMIT (25%)
	@ls $(BENCH_STORE)/*/*.json >/dev/null 2>&1 || \
		{ echo "make: nothing is saved in $(BENCH_STORE) to compare with; run make bench first." >&2; exit 1; }
	$(BIN)/python -m pytest $(BENCHES) --benchmark-storage=file://$(BENCH_STORE) --benchmark-compare \
		--benchmark-compare-fail=median:$(BENCH_LIMIT) $(ARGS)

results: $(VENV)/dev.stamp ## write benchmarks/RESULTS.md from benchmarks/results/*.json
	$(BIN)/python benchmarks/results.py write

lint: $(VENV)/dev.stamp ## style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/dev.stamp ## the documentation, into site/; a broken link is an error
	$(BIN)/mkdocs build --strict

pictures: $(VENV)/dev.stamp ## draw every picture of the documentation again, from a run of configs/multiblock.yaml
	$(BIN)/fastjepa data get fashion-mnist
	$(BIN)/torchrun --standalone --nproc_per_node $(RANKS) fastjepa/train.py --config configs/multiblock.yaml --output runs/multiblock \
		data.batch_size=$$((128 / $(RANKS)))
	$(BIN)/python docs/curves.py docs/pictures/runs.svg docs/metrics/healthy.jsonl docs/metrics/collapsing.jsonl
	$(BIN)/python docs/curves.py docs/pictures/small.svg $(patsubst %,docs/metrics/%.jsonl,base over-the-batch vicreg)
	$(BIN)/python docs/scene_labels.py docs/pictures/scene-labels.png
	$(BIN)/fastjepa decoder runs/multiblock --data fashion-mnist
	$(BIN)/fastjepa visualize runs/multiblock --data fashion-mnist --images 6 --output docs/pictures

dist: $(VENV)/dev.stamp ## wheels and sdists of both distributions, into dist/
	$(BIN)/python -m build --no-isolation --outdir dist kernels
	$(BIN)/python -m build --no-isolation --outdir dist .

venv: $(VENV)/dev.stamp ## the environment with everything the tests need
	@echo "$(VENV) is ready: . $(BIN)/activate"

clean: ## remove the environment, caches and the demo's run; other runs and downloaded data stay
	rm -rf $(VENV) $(DEMO) build dist site .pytest_cache .ruff_cache .hypothesis *.egg-info kernels/*.egg-info
	find fastjepa kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# 1: what to install. --no-compile: what is imported gets compiled and kept then, the rest (20 s of it) never.
define install
@echo "== Installing $(1) and the kernels into $(VENV); torch is large, so the first time takes minutes"
@$(BIN)/python -m pip install --disable-pip-version-check --no-compile -e ./kernels -e '$(1)' || \
	{ echo "make: pip could not install $(1); mend what its last lines name (network? 7 GB of disk?) and run make again." >&2; exit 1; }
endef

$(VENV)/demo.stamp: $(PACKAGING) | $(VENV)/python.stamp
	$(call install,.)
	@touch $@

$(VENV)/dev.stamp: $(PACKAGING) | $(VENV)/python.stamp
	$(call install,.[dev])
	@touch $@ $(VENV)/demo.stamp

$(VENV)/python.stamp:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "make: there is no $(PYTHON); install Python 3.11 or newer (sudo apt-get install python3 python3-venv)." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is older than 3.11; install a newer one and name it: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "make: $(PYTHON) cannot make virtual environments; sudo apt-get install python3-venv" >&2; exit 1; }
	@echo "== Making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@
