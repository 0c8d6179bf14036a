# Every task of this project has its name here; `make` prints them.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= trainer/constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The choices a person makes: make train DATA=imagefolder:PATH RECIPE=demo NPROC=2 ARGS="--set epochs=1"
DATA ?= auto
RECIPE ?= demo
NPROC ?=
DATA_DIR ?= data
RUNS_DIR ?= runs
NAME ?= $(RECIPE)
ARGS ?=
TESTS ?= trainer/tests chart/tests image/tests
KILLS ?= 20
# Not ?=, for a shell may export HOSTS for something else.
HOSTS = 2
SEED ?=
ONLY ?=
ROWS ?=
RANKS ?=
# Each command that a person may stop runs by it. Exit codes, for scripts that call k8scifar or the tools themselves:
# 0 done, 1 failed (a restart may mend it), 2 the user's mistake, 3 stopped and saved, 130 stopped by Ctrl-C. make adds its
# own "*** [Makefile:N: task] Error CODE" after any code but 0, and ends with 2 for all of them; after Ctrl-C at a
# terminal it says nothing and ends as interrupted.
FOREGROUND = $(PYTHON) trainer/tools/foreground.py
# Where the TensorBoards listen; not ?=, for some shells export a HOST of their own, this machine's name.
HOST = localhost
PORT ?= 6006
BENCH_ROWS = $(subst $(comma), ,$(ROWS))
comma := ,

##@ Set-up
help: ## print every task
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY) ## build the Python environment in .venv (all other tasks do so by themselves)

# uv takes torch's CPU build where there is no NVIDIA GPU; a folder of wheels that pip is configured with comes first.
$(READY): trainer/pyproject.toml $(CONSTRAINTS)
	@echo "building $(VENV) (once; about a minute)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) must be Python 3.10 or newer; set PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: no venv module; install python3-venv" >&2; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv 2> >(grep -v WARNING >&2)
	@links=$$($(BIN)/python -m pip config get :env:.find-links 2>/dev/null || $(BIN)/python -m pip config get global.find-links 2>/dev/null || true); \
	backend="--torch-backend=auto"; \
	if ls $$links/torch-*.whl >/dev/null 2>&1; then export UV_FIND_LINKS="$$links"; backend=""; fi; \
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python $$backend -c $(CONSTRAINTS) -e 'trainer[dev]'
	@touch $@

clean: ## remove the environment and caches (data/ and runs/ stay)
	rm -rf $(VENV) .pytest_cache .ruff_cache trainer/src/*.egg-info
	find trainer -name __pycache__ -type d -prune -exec rm -rf {} +

##@ Training on this machine
LAUNCH = $(if $(NPROC),--nproc-per-node $(NPROC)) --recipe "$(RECIPE)" --data-dir "$(DATA_DIR)" --runs-dir "$(RUNS_DIR)" --name "$(NAME)"
train: $(READY) ## train with DDP, NPROC=processes here (its GPUs, else 2); DATA=auto|cifar10|imagefolder:PATH|synthetic RECIPE=demo
	@$(BIN)/k8scifar launch --check $(LAUNCH) $(ARGS) # a mistake shows before the download
	@$(FOREGROUND) $(BIN)/k8scifar prepare --source "$(DATA)" --data-dir "$(DATA_DIR)"
	@$(FOREGROUND) $(BIN)/k8scifar launch $(LAUNCH) $(ARGS)

report: $(READY) ## write runs/NAME/report.html of a finished run again
	@$(FOREGROUND) $(BIN)/k8scifar report "$(RUNS_DIR)/$(NAME)" --data-dir "$(DATA_DIR)"

evaluate: $(READY) ## evaluate the trained model of run NAME
	@$(FOREGROUND) $(BIN)/k8scifar evaluate "$(RUNS_DIR)/$(NAME)" --data-dir "$(DATA_DIR)" $(ARGS)

tensorboard: $(READY) ## serve TensorBoard for RUNS_DIR; PORT=6006 HOST=localhost (0.0.0.0: to all networks)
	@$(FOREGROUND) $(BIN)/python chart/tools/serve_tensorboard.py --logdir "$(RUNS_DIR)" --host "$(HOST)" --port "$(PORT)"

.PHONY: screenshot
screenshot: $(READY) ## take README's picture of TensorBoard from a short real run (needs chromium, chromedriver)
	@$(BIN)/k8scifar prepare --source "$(DATA)" --data-dir "$(DATA_DIR)"
	@$(BIN)/python trainer/tools/screenshot.py --data-dir "$(DATA_DIR)" --runs-dir "$(RUNS_DIR)"

##@ Chart
# make install RELEASE=cifar NAMESPACE=default VALUES="values/two-node.yaml" NFS=ADDRESS HELM_ARGS="--set nodes=4 ..."
RELEASE ?= cifar
NAMESPACE ?= default
VALUES ?= values/two-node.yaml
NFS ?=
HELM_ARGS ?=
CHART_FILES = $(BIN)/python chart/tools/chart_files.py
FIND_HELM = helm=$$($(BIN)/python chart/tools/helm.py)
HELM_OPTIONS = --namespace "$(NAMESPACE)" $(foreach file,$(VALUES),-f $(file)) $(if $(NFS),--set nfs.server=$(NFS)) $(HELM_ARGS)

chart-lint: $(READY) ## lint the chart with Helm 3 and 4, for each file in values/, and look for stale generated files
	@$(CHART_FILES) schema --check
	@$(CHART_FILES) docs --check
	@for major in 3 4; do helm=$$($(BIN)/python chart/tools/helm.py $$major); \
	for file in values/*.yaml; do \
	  layers="-f values/two-node.yaml -f $$file --set nfs.server=192.0.2.1"; \
	  if grep -Eq 'hostPath|^local:' "$$file"; then layers="-f $$file"; fi; \
	  "$$helm" lint --strict --quiet chart $$layers && "$$helm" template cifar chart $$layers >/dev/null; \
	done; echo "Helm $$major: $$(ls values/*.yaml | wc -l) files of values pass"; done

template: $(READY) ## print what VALUES=values/two-node.yaml NFS=ADDRESS would install
	@$(FIND_HELM); "$$helm" template "$(RELEASE)" chart $(HELM_OPTIONS)

install: $(READY) ## install or upgrade RELEASE=cifar with VALUES=values/two-node.yaml NFS=ADDRESS
	@$(FIND_HELM); "$$helm" upgrade --install "$(RELEASE)" chart $(HELM_OPTIONS)

uninstall: $(READY) ## uninstall RELEASE=cifar; volumes and checkpoints stay
	@$(FIND_HELM); "$$helm" uninstall "$(RELEASE)" --namespace "$(NAMESPACE)"

schema: $(READY) ## write the chart's values schema anew, from the trainer's own
	@$(CHART_FILES) schema

chart-docs: $(READY) ## write the table in chart/README.md anew, from chart/values.yaml
	@$(CHART_FILES) docs

package: $(READY) ## pack the chart into dist/
	@$(FIND_HELM); "$$helm" package chart --destination dist

##@ Cluster
# For RELEASE in NAMESPACE of kubectl's current context, or CONTEXT=...; they need Python and kubectl, nothing more.
CONTEXT ?=
CLUSTER ?=
RUN_DIR ?=
CLAIM ?=
IN_CLUSTER = --release "$(RELEASE)" --namespace "$(NAMESPACE)" --context "$(CONTEXT)"
CLUSTER_TOOL = $(FOREGROUND) $(PYTHON) chart/tools/cluster.py

up: ## from nothing: a throw-away two-worker cluster here (CLUSTER=kind|k3d|minikube), image and chart in it
	@$(FOREGROUND) $(PYTHON) chart/tools/sandbox.py up --cluster "$(CLUSTER)" --release "$(RELEASE)" --namespace "$(NAMESPACE)" $(HELM_ARGS)

down: ## delete the cluster of `make up`; its data and runs stay
	@$(FOREGROUND) $(PYTHON) chart/tools/sandbox.py down --cluster "$(CLUSTER)"

status: ## pods, volumes, warnings and progress of RELEASE=cifar NAMESPACE=default
	@$(CLUSTER_TOOL) status $(IN_CLUSTER)

logs: ## follow the trainers of RELEASE; ARGS="--previous --tail=50" goes to kubectl
	@$(CLUSTER_TOOL) logs $(IN_CLUSTER) $(ARGS)

results: ## copy the run of RELEASE (report, weights, metrics, curves) to results/RELEASE; ARGS=--checkpoints for all
	@$(CLUSTER_TOOL) results $(IN_CLUSTER) --run-dir "$(RUN_DIR)" --image "$(IMAGE)" --claim "$(CLAIM)" $(ARGS)

tensorboard-cluster: ## TensorBoard of RELEASE at http://localhost:PORT/ while it runs; PORT=6006 HOST=localhost
	@$(CLUSTER_TOOL) tensorboard $(IN_CLUSTER) --host "$(HOST)" --port "$(PORT)"

diagnose: ## collect what a bug report needs of RELEASE, secrets left out, into results/
	@$(FOREGROUND) $(PYTHON) chart/tools/diagnose.py $(IN_CLUSTER)

##@ Image
image: ## build the container image; VARIANT=cpu|cuda EXTRAS=remote PLATFORMS=linux/amd64,linux/arm64 ENGINE=docker|podman|buildah
	@$(PYTHON) image/tools/image.py build

image-smoke: ## train in two hardened containers of the image on a private network
	@$(PYTHON) image/tools/smoke.py

push: ## push the image; REGISTRY=host/name
	@$(PYTHON) image/tools/image.py push

load: ## put the image into the k3s, kind or minikube of this machine; CLUSTER=k3s|kind|minikube
	@$(PYTHON) image/tools/image.py load

sbom: ## list what is in the image (needs syft or trivy)
	@$(PYTHON) image/tools/image.py sbom

scan: ## look for known vulnerabilities in the image (needs trivy or grype)
	@$(PYTHON) image/tools/image.py scan

image-lock: $(READY) ## renew image/requirements.lock; UPGRADE=1 takes the newest versions that are allowed
	@$(PYTHON) image/tools/image.py lock

image-test: ## build and smoke-test in a throw-away engine on a home-made base image (root; where no image can be pulled)
	@image/tools/with-engine.sh sh -c 'image/tools/base.sh k8scifar-base:local && make image BASE=k8scifar-base:local && make image-smoke'

##@ Development
test: $(READY) ## run the tests, two files at a time; TESTS=file picks some, ARGS go to pytest
	@$(FOREGROUND) $(BIN)/python -m pytest -c trainer/pyproject.toml -n 2 --dist loadfile --no-loadscope-reorder $(TESTS) $(ARGS)

test-nightly: ## run the tests that take minutes each, which `make test` leaves out
	@$(MAKE) test ARGS="-m nightly $(ARGS)"

# What has to work with every torch that pyproject.toml allows, in an environment of its own: .venv-oldest, .venv-newest.
CORE = $(addprefix trainer/tests/,training/test_train.py training/test_world_size.py training/test_checkpoint.py exchange/test_comm.py launch/test_launch.py launch/test_supervisor.py \
	launch/test_launch_torchrun.py training/test_golden.py)
TORCH ?= oldest

test-versions: ## run the core tests with TORCH=oldest or newest of the torch releases that are allowed
	@$(MAKE) test VENV=.venv-$(TORCH) CONSTRAINTS=trainer/constraints-$(TORCH).txt TESTS="$(CORE)"

golden: $(READY) ## renew trainer/tests/training/golden.json, the losses of tiny trainings, and say what changed
	@$(BIN)/python trainer/tests/training/golden.py

chaos: $(READY) ## strike trainings on HOSTS=2 to 4 hosts KILLS=20 times at random, compare the weights (root); SEED= repeats one
	@$(FOREGROUND) $(BIN)/python trainer/tests/helpers/chaos.py --kills $(KILLS) --hosts $(HOSTS) $(if $(SEED),--seed $(SEED)) $(ARGS)

mutants: $(READY) ## make each mistake of trainer/tests/mutants.yaml in a copy and see its test fail; ONLY=word picks some
	@$(FOREGROUND) $(BIN)/python trainer/tests/helpers/mutants.py $(if $(ONLY),--only "$(ONLY)")

bench: $(READY) ## measure against plain DDP, print the table; ROWS=step,data picks some; BENCH_MINUTES=10 for ROWS=time,avx2
	@$(BIN)/k8scifar prepare --source "$(DATA)" --data-dir "$(DATA_DIR)"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python trainer/benchmarks/bench.py $(BENCH_ROWS) --data "$(DATA_DIR)" $(ARGS)

# Not ?=, for batch systems export a NODES of their own.
NODES =
EPOCHS = 1
SCALING_CLUSTER = $(BIN)/python chart/tools/scaling_cluster.py $(IN_CLUSTER) --nodes "$(NODES)" --epochs "$(EPOCHS)"
SCALING_HERE = $(BIN)/python trainer/benchmarks/scaling.py --data "$(DATA_DIR)" $(if $(RANKS),--ranks $(RANKS))

scaling: $(READY) ## speed-up and efficiency on 1, 2, ... RANKS=cores here, or NODES=2 of a cluster (VALUES, NFS), drawn in results/
	@$(if $(NODES),,$(FOREGROUND) $(BIN)/k8scifar prepare --source "$(DATA)" --data-dir "$(DATA_DIR)")
	@$(FOREGROUND) $(if $(NODES),$(SCALING_CLUSTER) $(ARGS) -- $(HELM_OPTIONS),$(SCALING_HERE) $(ARGS))

bench-gpu: $(READY) ## measure what needs a GPU, in ten minutes; ROWS=gpu,flops picks some
	@$(MAKE) bench ARGS="--gpu $(ARGS)"

GPU_MINUTES ?= 10

gpu: $(READY) ## with a GPU, GPU_MINUTES=10 in all: the tests that need one, then the measurements, results kept
	@until=$$(( $$(date +%s) + 60 * $(GPU_MINUTES) )); failed=0; \
	$(MAKE) test TESTS=trainer/tests/test_gpu.py ARGS="-n 0" || failed=1; \
	BENCH_UNTIL=$$until $(MAKE) bench-gpu || failed=1; exit $$failed

source-map: $(READY) ## write trainer/README.md anew: a line for each file of the package
	@$(BIN)/python trainer/tools/source_map.py

lint: $(READY) ## check style and likely mistakes
	@$(BIN)/ruff check trainer
	@$(BIN)/ruff check --config trainer/pyproject.toml image chart
	@$(BIN)/ruff format --check trainer
	@$(BIN)/ruff format --check --config trainer/pyproject.toml image chart

format: $(READY) ## rewrite the code in the project's style
	@$(BIN)/ruff check --fix trainer
	@$(BIN)/ruff check --fix --config trainer/pyproject.toml image chart
	@$(BIN)/ruff format trainer
	@$(BIN)/ruff format --config trainer/pyproject.toml image chart

.PHONY: help venv clean train report evaluate tensorboard test test-nightly test-versions golden chaos mutants bench bench-gpu \
	scaling gpu lint format source-map \
	up down status logs results tensorboard-cluster diagnose \
	chart-lint template install uninstall schema chart-docs package \
	image image-smoke push load sbom scan image-lock image-test
