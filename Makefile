# The project's commands. `make help` lists them; each says what it does while it does it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
MAKEFLAGS += --no-print-directory

# Where rustup and Go's archive put programs that a fresh shell does not find yet.
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/local/go/bin

# Lints and tests are built in the profile dev; end-to-end tests and the demo run what ships, built in the profile dist.
CARGO_FLAGS := --locked

# Empty: without what needs Kubernetes.
export KUBERNETES ?= yes

say = @printf '\n==> %s\n' "$(1)"

.DEFAULT_GOAL := help
.PHONY: help install build check unit sanity storage kernels e2e kubernetes builds test ci demo bench

help: ## List these commands
	@grep -hE '^[a-z0-9]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9]+):.*## /\1\t/' | while IFS=$$'\t' read -r name text; do printf '  make %-8s %s\n' "$$name" "$$text"; done

demo: ## Play the three stories on real services and print the table (root; installs what is missing; about a quarter of an hour the first time)
	$(call say,Installing what is missing)
	@./e2e/install.sh demo
	$(call say,Building clip-csi as the Dockerfile ships it; the CSI client; the image: five layers of 30 MB of real files)
	@trap 'wait' EXIT
	(nice -n 5 ./e2e/tools.sh >/dev/null && nice -n 5 python3 e2e/images.py build demo5 demo1) & beside=$$!
	cargo build --profile dist --locked
	wait $$beside
	$(call say,Playing the three stories)
	@CLIP_CSI_BIN=$${CLIP_CSI_BIN:-$(CURDIR)/target/dist/clip-csi} python3 e2e/demo.py

bench: ## Measure against the best that could be, in ratios (root, idle machine; BENCH=name,name picks; about half an hour after builds)
	$(call say,Installing what is missing)
	@./e2e/install.sh test
	$(call say,Building clip-csi as the Dockerfile ships it, its inflater alone and agents without disks; the readers, the registry and Kubernetes)
	@cargo build --profile dist --locked --bins --bench inflate --bench prewarm_agents
	./e2e/tools.sh >/dev/null
	./e2e/tools.sh kubernetes >/dev/null
	$(call say,Measuring)
	@CLIP_CSI_BIN=$${CLIP_CSI_BIN:-$(CURDIR)/target/dist/clip-csi} python3 e2e/bench/run.py "$(BENCH)"

test: KUBERNETES :=
test: ## Format, lints, documentation, unit and integration tests, and the end-to-end tests that need no Kubernetes (root; installs what is missing; 15 to 30 minutes, the longer the first time)
ci: ## All that continuous integration runs: `make test`, and a real Kubernetes (root; installs what is missing; 20 to 45 minutes, the longer the first time)
test ci:
	$(call say,1/3 Installing what is missing)
	@$(if $(KUBERNETES),$(MAKE) kubernetes &) trap 'wait' EXIT
	$(MAKE) install
	$(call say,2/3 Format; then end-to-end tests with a real registry and real images$(if $(KUBERNETES), and a real Kubernetes))
	@cargo fmt --check
	# These make way for the end-to-end tests, which often wait, and are shown after them.
	log="$$(mktemp)"
	CARGO_INCREMENTAL=0 nice $(MAKE) unit check >"$$log" 2>&1 & beside=$$!
	# Waited for also after a failure: nothing runs on.
	trap 'wait; rm -f "$$log"' EXIT
	failed=0
	$(MAKE) e2e || failed=1
	$(call say,3/3 Unit and integration tests; lints and documentation)
	@wait $$beside || failed=1
	cat "$$log"
	exit $$failed

install: ## Install what the tests need and this machine lacks (root)
	@./e2e/install.sh test

build: ## Build the program
	@cargo build --release --locked

check: ## Format, clippy and rustdoc, each without a warning
	@cargo fmt --check
	cargo clippy $(CARGO_FLAGS) --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc $(CARGO_FLAGS) --no-deps

unit: ## Unit and integration tests
	@# Without it the tests of S3 say that they are skipped.
	./e2e/tools.sh s3 >/dev/null || true
	cargo test $(CARGO_FLAGS)

sanity: ## csi-sanity, unfiltered, on real mounts; also while agent and serve are killed every second (root; part of e2e)
	@$(MAKE) e2e CASES=csi-sanity,csi-sanity-while-agent-and-serve-are-killed

storage: install ## Kubernetes' own end-to-end tests of CSI drivers on the cluster (root; not part of ci, because it takes minutes to build)
	@./e2e/tools.sh kubernetes >/dev/null
	python3 e2e/storage_suite.py

kernels: ## The tests of images in the kernel, on the kernels of distributions, in virtual machines (root; not part of ci, because it fetches them; KERNELS="NAME NAME" picks)
	@./e2e/install.sh kernels
	python3 e2e/kernels.py $(KERNELS)

e2e: ## End-to-end tests alone, all of them (root; CASES=name,name or E2E="-k NAME" picks some; 15 to 35 minutes, the longer the first time)
	@trap 'wait' EXIT
	# All is built at once, unless some cases are picked: those make what they need.
	[ -n "$(CASES)$(E2E)" ] || $(if $(KUBERNETES),$(MAKE) kubernetes,true) &
	$(MAKE) install
	[ -n "$(CASES)$(E2E)" ] || $(MAKE) builds &
	cargo fetch --quiet --locked
	nice -n 15 ./e2e/tools.sh >/dev/null
	# What is tested is what ships: the programs of the project's image, unless others are named.
	export CLIP_CSI_BIN="$${CLIP_CSI_BIN:-$$(python3 e2e/cluster/project_image.py --programs | tail -n 1)/clip-csi}"
	# The S3 server, which a few cases want, of which none comes first.
	[ -n "$(CASES)$(E2E)" ] || nice -n 5 ./e2e/tools.sh s3 >/dev/null &
	python3 e2e/run.py $(if $(KUBERNETES),,--without-kubernetes) --cases "$(CASES)" $(E2E)

# It needs Go alone: where that is, before anything is installed.
kubernetes:
	@! command -v go >/dev/null || nice -n 5 ./e2e/tools.sh kubernetes >/dev/null

# All that is built for the end-to-end tests; whoever comes second waits and finds it. The image goes first, because at its end it uses one core
# alone; then Kubernetes, for which the cases that take longest wait.
builds:
	@trap 'wait' EXIT
	cargo fetch --quiet --locked
	python3 e2e/cluster/project_image.py >/dev/null & image=$$!
	$(if $(KUBERNETES),nice -n 5 ./e2e/tools.sh kubernetes >/dev/null,true) & kubernetes=$$!
	nice -n 15 ./e2e/tools.sh csi >/dev/null
	nice -n 15 python3 e2e/images.py build
	wait $$image
	wait $$kubernetes
