# make demo           train a split model end to end, export it and generate with it, here and now
# make test           run all tests
# make test-pythons   what needs no torch, on the other versions of Python that are promised and found here
# make test-lowest    all tests, or those in TESTS, with the lowest versions that pyproject.toml allows
# make test-runtimes  load an exported folder with every runtime that people deploy with; needs node
# make test-page      the live page in Chromium; needs chromium and node
# make pictures       those of the live page that the documents show; needs chromium
# make check          lint, format, types
# make bench          the benchmarks, long
# make bench-links    how long until a model is good enough, over 3G, 4G, Wi-Fi and a LAN
# make bench-export   how fast an exported model is, beside what else there is; compiles llama.cpp once
# make chaos          300 runs of a tiny model, disturbed at random, with both engines
# make fuzz           1.5 million broken frames, and attacks on a live server
# make fuzz-folders   100,000 nearly right models, adapters, exported folders, settings and data files
# make mutants        small faults put into the federation: how many its own tests notice
# make device-check   eight minutes on a machine with a CUDA device, beside the torch that is there; DEVICE=cpu is its dry run
# make soak           30 minutes of a server whose devices come and go
# make arm64          a device on an emulated 64-bit ARM processor in a run; needs root, debootstrap and qemu-user-static

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# The quickest first: the last one plays 1,500 histories.
FEDERATION_TESTS := $(addprefix tests/test_,message_rules.py member.py roster.py gathering.py turnout.py codec_policy.py deadline.py timing.py transcript.py \
	federation.py itinerary.py)

# The other versions of Python that are promised.
PYTHONS := 3.10 3.12 3.13

.PHONY: demo test test-pythons test-lowest test-runtimes test-page pictures check bench bench-links bench-export chaos fuzz fuzz-folders mutants device-check soak arm64
.DEFAULT_GOAL := demo

demo: $(VENV)/.runtime .venv-device/.packages
	$(BIN)/python examples/demo.py --devices .venv-device

# Each process of them takes a gigabyte. Files begin in the order of tests/conftest.py, the longest first.
test: $(VENV)/.development
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-pythons: $(VENV)/.development
	for version in $(PYTHONS); do tests/on_python $$version || exit 1; done

test-lowest: .venv-lowest/.packages
	.venv-lowest/bin/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(TESTS)

test-runtimes: $(VENV)/.development .venv-runtimes/.runtimes .venv-node/.packages
	$(BIN)/python -m pytest tests/runtimes

test-page: $(VENV)/.browser .venv-axe/.packages
	$(BIN)/python -m pytest tests/page

pictures: $(VENV)/.browser
	PYTHONPATH=tests $(BIN)/python tests/page/pictures.py

check: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Long: the last one trains for the better part of an hour on two cores.
bench: bench-links
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/overlap.py
	$(BIN)/python benchmarks/server_scale.py
	$(BIN)/python benchmarks/federation_cost.py
	$(BIN)/python benchmarks/several_ranks.py
	$(BIN)/python benchmarks/page_cost.py
	$(BIN)/python benchmarks/device_weight.py
	$(BIN)/python benchmarks/edge_engine.py
	$(BIN)/python benchmarks/data_load.py
	$(BIN)/python benchmarks/codecs.py
	$(BIN)/python benchmarks/wire_bytes.py
	$(BIN)/python benchmarks/codec_quality.py
	$(BIN)/python benchmarks/labels_over_links.py
	$(BIN)/python benchmarks/few_rows.py
	$(BIN)/python benchmarks/e2e.py

bench-links: $(VENV)/.development
	$(BIN)/python benchmarks/link_speed.py
	$(BIN)/python benchmarks/time_to_perplexity.py

bench-export: $(VENV)/.development .venv-runtimes/.engines
	$(BIN)/python benchmarks/export_speed.py
	$(BIN)/python benchmarks/export_speed.py --model smollm2-135m
	$(BIN)/python benchmarks/adapter_cost.py

chaos: $(VENV)/.development
	$(BIN)/python benchmarks/disturbed_runs.py --runs 200
	$(BIN)/python benchmarks/disturbed_runs.py --runs 100 --engine onnxruntime

fuzz: $(VENV)/.development
	$(BIN)/python benchmarks/fuzz.py

fuzz-folders: $(VENV)/.development
	$(BIN)/python benchmarks/fuzz_folders.py

mutants: $(VENV)/.development
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutants.py gpu_server/federation --tests $(FEDERATION_TESTS) \
		--equivalent benchmarks/equivalent_mutants.txt

# The torch of the other targets computes on the CPU alone. Which Python has one that finds the card, PYTHON says.
PYTHON := python3
DEVICE := cuda
CHECKED_WITH := $(if $(filter cpu,$(DEVICE)),$(VENV)/.development,.venv-cuda/.packages)

device-check: $(CHECKED_WITH)
	$(dir $(CHECKED_WITH))bin/python benchmarks/device_check.py --device $(DEVICE) --output device-check.json

soak: $(VENV)/.development
	$(BIN)/python benchmarks/soak.py --minutes 30

arm64: $(VENV)/.development
	tests/arm64/run

$(VENV)/.runtime: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install --constraint constraints.txt --editable '.[server,export]'
	touch $@

$(VENV)/.browser: $(VENV)/.development
	$(PIP) install --constraint constraints.txt --group browser
	touch $@

# What a device has, and nothing else.
.venv-device/.packages: pyproject.toml constraints.txt
	python3 -m venv .venv-device
	.venv-device/bin/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt --editable .
	touch $@

# Dependency groups need a pip of 2025, which the runtime's recipe has just installed.
$(VENV)/.development: $(VENV)/.runtime
	$(PIP) install --constraint constraints.txt --group dev
	touch $@

# pip, which knows where the torch that constraints.txt names comes from, installs what uv has found out.
.venv-lowest/.packages: pyproject.toml constraints.txt tests/without-torch.txt $(VENV)/.development
	python3 -m venv .venv-lowest
	$(BIN)/uv pip compile --quiet --python .venv-lowest --resolution lowest-direct --override tests/without-torch.txt \
		--extra server --extra export --group dev --output-file .venv-lowest/lowest.txt pyproject.toml
	.venv-lowest/bin/python -m pip --disable-pip-version-check --quiet install --requirement .venv-lowest/lowest.txt \
		"$$(grep ^torch== constraints.txt)"
	.venv-lowest/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --editable .
	touch $@

# It sees all packages that PYTHON sees, and pip adds what is missing: a machine's own torch fits its driver. Where there is no
# driver, several GB would be fetched only to say that there is nothing to check.
.venv-cuda/.packages: pyproject.toml
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null || { \
		echo "this needs a CUDA device, and there is no driver of one here: make device-check DEVICE=cpu is the dry run" >&2; \
		exit 1; }
	$(PYTHON) -m venv .venv-cuda
	$(PYTHON) -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
		> "$$(.venv-cuda/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/those-of-the-machine.pth"
	.venv-cuda/bin/python -m pip --disable-pip-version-check --quiet install --editable '.[server,export]' pytest
	touch $@

.venv-runtimes/.runtimes: tests/runtimes/requirements.txt
	python3 -m venv .venv-runtimes
	.venv-runtimes/bin/python -m pip --disable-pip-version-check --quiet install --requirement $<
	touch $@

.venv-runtimes/.engines: benchmarks/engines.txt .venv-runtimes/.runtimes
	CMAKE_ARGS=-DLLAVA_BUILD=OFF CMAKE_BUILD_PARALLEL_LEVEL=2 \
		.venv-runtimes/bin/python -m pip --disable-pip-version-check --quiet install --requirement $<
	touch $@

.venv-node/.packages: tests/runtimes/package.json
.venv-axe/.packages: tests/page/package.json

# Packages bring what they need; their install scripts would fetch libraries for GPUs.
.venv-node/.packages .venv-axe/.packages:
	mkdir -p $(@D)
	cp $< $(@D)
	npm install --prefix $(@D) --ignore-scripts --no-audit --no-fund
	touch $@
