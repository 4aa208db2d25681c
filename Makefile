# Every target creates .venv by itself; nothing here needs root except test-system.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
# The CPU build; set TORCH=torch for the CUDA build.
TORCH ?= torch==2.13.0
VARIANT ?= cpu
BIN := .venv/bin
STAMP := .venv/.installed
RESULTS := bench/results.json
POOL_RESULTS := bench/pool.json
BENCH_MODEL := smollm2-135m-instruct
# The demo does without what tests and checks need; where that is installed, it has all.
DEMO_STAMP := $(if $(wildcard $(STAMP)),$(STAMP),.venv/.installed-demo)

.PHONY: demo demo-long test test-system check proto chart image oracle-full validation bench bench-pool bench-peers study gpu-bundle clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

$(STAMP): EXTRAS := dev
.venv/.installed-demo: EXTRAS := convert
# The attention kernel is compiled by the install, where there is a C++ compiler.
$(STAMP) .venv/.installed-demo: pyproject.toml $(wildcard workers/kernels/cpu/*.cpp workers/kernels/cpu/*.h workers/kernels/cpu/*.txt)
	@echo "installing into .venv (about a minute, longer on a first download) ..."
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	.ci/pip-install $(TORCH)
	.ci/pip-install -e '.[$(EXTRAS)]'
	@touch $@

demo: $(DEMO_STAMP)  ## serve a real model from a cluster on this machine and ask it two questions
	$(BIN)/anabranch demo

demo-long: $(DEMO_STAMP)  ## one request that no worker could hold, over eight of them
	$(BIN)/anabranch demo --long

test: $(STAMP)  ## all tests that need no root
	$(BIN)/pytest tests -n 2 --dist loadfile

test-system: $(STAMP)  ## tests with network namespaces and servers (root; installs what it needs)
	.ci/install-system
	$(BIN)/pytest tests -m 'system or redis' --durations=25

check: $(STAMP)  ## style, types, import contracts, proto lint and stub drift
	.ci/check

proto: $(STAMP)  ## regenerate the stubs in anabranch/v1 from proto/
	.ci/generate-stubs

chart: $(STAMP)  ## regenerate the Helm chart's values, schema and table, and its rendered examples
	$(BIN)/python -m deploy.helm.generate
	.ci/install-helm
	.ci/render-examples

image:  ## build the container image (VARIANT=cuda for GPUs; IMAGE_FLAGS are podman's own)
	podman build -f deploy/image/Containerfile --build-arg VARIANT=$(VARIANT) $(IMAGE_FLAGS) -t anabranch .

oracle-full: $(STAMP)  ## the full matrix of token equality; records its result
	$(BIN)/pytest tests/oracle -m long
	$(BIN)/python -m tests.oracle.full

validation: $(STAMP)  ## what was published beside what the simulator gives; writes docs/validation.md
	$(BIN)/python -m loadgen.simulation.validation_page > docs/validation.md.new
	mv docs/validation.md.new docs/validation.md

bench: $(STAMP)  ## measure the hot path; writes bench/results.json
	$(BIN)/anabranch model fetch $(BENCH_MODEL)
	$(BIN)/anabranch bench kernel --json $(RESULTS)
	$(BIN)/anabranch bench product --json $(RESULTS)
	$(BIN)/anabranch bench context --json $(RESULTS)
	$(BIN)/anabranch bench lane --json $(RESULTS)
	$(BIN)/anabranch bench step --json $(RESULTS)
	$(BIN)/anabranch bench verify $(RESULTS)

bench-pool: $(STAMP)  ## measure the pool and the controller, long contexts included; writes bench/pool.json
	$(BIN)/anabranch model fetch $(BENCH_MODEL)
	$(BIN)/anabranch bench directory --json $(POOL_RESULTS)
	$(BIN)/anabranch bench prefix --json $(POOL_RESULTS)
	$(BIN)/anabranch bench long-prefill --json $(POOL_RESULTS)
	$(BIN)/anabranch bench long-decode --json $(POOL_RESULTS)
	$(BIN)/python -m tests.controller_stopped --json $(POOL_RESULTS)

bench-peers: $(STAMP) .venv-peers/.installed  ## the same batches through vLLM and transformers, in turn with ours
	$(BIN)/anabranch model fetch $(BENCH_MODEL)
	$(BIN)/anabranch bench serve --peers .venv-peers/bin/python --json $(RESULTS)

.venv-peers/.installed: anabranch/cli/bench/peers/install
	$< .venv-peers $(PYTHON) "$(TORCH)"

study: $(STAMP)  ## the example study: real, emulated and simulated clusters; writes bench/study.json and docs/study.html
	$(BIN)/anabranch model fetch $(BENCH_MODEL)
	rm -rf build/study build/study.tar.gz
	$(BIN)/anabranch loadgen study --out build/study
	cp build/study/results.json bench/study.json
	cp build/study/report.html docs/study.html

gpu-bundle: $(STAMP)  ## collect the wheels a GPU machine may lack into build/gpu-bundle
	.ci/gpu-bundle

clean:  ## remove the environment and caches
	rm -rf .venv .venv-peers .mypy_cache .ruff_cache .pytest_cache build dist
