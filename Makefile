# The project's commands. `make help` lists them; each says what it does while it does it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
MAKEFLAGS += --no-print-directory

# Where rustup and Go's archive put programs that a fresh shell does not find yet.
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/local/go/bin

# One profile for all but the demo, which measures what users get: a second one would double a cold build.
CARGO_FLAGS := --release --locked

say = @printf '\n==> %s\n' "$(1)"

.DEFAULT_GOAL := help
.PHONY: help install build check unit e2e cluster-builds test demo bench

help: ## List these commands
	@grep -hE '^[a-z0-9]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9]+):.*## /\1\t/' | while IFS=$$'\t' read -r name text; do printf '  make %-8s %s\n' "$$name" "$$text"; done

demo: ## Play the three stories on real services and print the table (root; installs what is missing; about 10 minutes the first time)
	$(call say,Installing what is missing)
	@./e2e/install.sh demo
	$(call say,Building clip-csi as the Dockerfile ships it, and the CSI client)
	@cargo build --profile dist --locked
	./e2e/tools.sh >/dev/null
	$(call say,Making the image: five layers of 30 MB of real files)
	@python3 e2e/images.py build demo5 demo1
	$(call say,Playing the three stories)
	@CLIP_CSI_BIN=$${CLIP_CSI_BIN:-$(CURDIR)/target/dist/clip-csi} python3 e2e/demo.py

bench: ## Measure against the best that could be, in ratios (root, idle machine; BENCH=name,name picks; about 15 minutes after builds)
	$(call say,Installing what is missing)
	@./e2e/install.sh demo
	$(call say,Building clip-csi and its inflater alone; the readers and the registry)
	@cargo build $(CARGO_FLAGS) --bins --bench inflate
	./e2e/tools.sh >/dev/null
	$(call say,Measuring)
	@python3 e2e/bench/run.py "$(BENCH)"

test: ## Everything that continuous integration runs (root; installs what is missing; about half an hour the first time)
	$(call say,1/4 Installing what is missing)
	@$(MAKE) install
	$(call say,2/4 Format and lints and documentation; beside it what the cluster of the end-to-end tests needs is built)
	# With low priority, on the core that linking and waiting leave idle. Waited for also after a failure: nothing runs on.
	@nice $(MAKE) cluster-builds &
	trap 'wait' EXIT
	$(MAKE) check
	$(call say,3/4 Unit and integration tests)
	@$(MAKE) unit
	$(call say,4/4 End-to-end tests with a real registry and real images)
	@$(MAKE) e2e

install: ## Install what the tests need and this machine lacks (root)
	@./e2e/install.sh test

build: ## Build the program
	@cargo build $(CARGO_FLAGS)

check: ## Format, clippy and rustdoc, each without a warning
	@cargo fmt --check
	cargo clippy $(CARGO_FLAGS) --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc $(CARGO_FLAGS) --no-deps

unit: ## Unit and integration tests
	@# Without it the tests of S3 say that they are skipped.
	./e2e/tools.sh s3 >/dev/null || true
	cargo test $(CARGO_FLAGS)

e2e: install build ## End-to-end tests alone (root; CASES=name,name or E2E="-k NAME" picks some; cold about 25 minutes)
	@./e2e/tools.sh >/dev/null
	# All, unless some cases are picked: those make what they need. The cluster's cases come last, and wait for the builds.
	if [ -z "$(CASES)$(E2E)" ]; then
		python3 e2e/images.py build
		nice $(MAKE) cluster-builds &
		trap 'wait' EXIT
	fi
	python3 e2e/run.py --cases "$(CASES)" $(E2E)

# Two at once, because linking leaves a core idle. Whoever comes second waits for the first.
cluster-builds:
	@cargo fetch --quiet --locked
	./e2e/tools.sh s3 >/dev/null
	./e2e/tools.sh kubernetes >/dev/null & kubernetes=$$!
	trap 'wait' EXIT
	python3 e2e/cluster/project_image.py >/dev/null
	wait $$kubernetes
