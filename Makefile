# The commands of potluck. `make help` lists them; each one sets up what it needs.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
PYTHON ?= python3
LOCK := python/requirements.lock
SEED ?= 1
SEEDS ?= 1
# Root installs Debian packages directly; others are told what is missing.
APT := $(shell [ "$$(id -u)" = 0 ] && command -v apt-get)
export PATH := $(CURDIR)/.build/tools/bin:$(PATH)
export RUSTC_WORKSPACE_WRAPPER := $(CURDIR)/tools/rustc-tests
RUST_TESTS := --workspace --release --all-features
# As `built` left them: they run beside another cargo that compiles.
BUILT_TESTS := --cargo-metadata .build/metadata.json --binaries-metadata .build/tests.json

.PHONY: help setup wheel demo test built test-rust test-decoders test-python oldest-lightning check fix bench sim nat neon windows hard-days fuzz clean

help:  ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed .build/system  ## Make .venv and install what the rest needs

$(VENV)/.installed: $(LOCK)
	tools/check-needs $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r $(LOCK)
	@touch $@

# Enough to begin to build with: the benchmark installs the little that it needs while the compiler works.
$(VENV)/.maturin: $(LOCK)
	tools/check-needs $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c $(LOCK) maturin
	@touch $@

# Tools of the operating system: network namespaces and NAT for the network tests, a browser for the dashboard's.
.build/system: tools/system-packages
	@mkdir -p .build
	tools/system-packages $(APT)
	@touch $@

wheel: setup  ## Build the wheel in release mode and install it into .venv
	tools/install-wheel $(PY)

demo: wheel  ## Train a real model with three peers on this machine; one joins late, one is killed
	$(PY) -m potluck.demo --output demo-output

test: built  ## Run every test, from a clean clone
	@# The wheel is compiled while Rust's tests wait for one another; random bytes take what processor time the others leave.
	trap 'kill $$(jobs -p) 2>/dev/null' EXIT; \
		$(MAKE) --no-print-directory test-decoders & decoders=$$!; nice $(MAKE) --no-print-directory wheel & wheel=$$!; \
		$(MAKE) --no-print-directory test-rust RUST_TESTS="$(BUILT_TESTS)" && wait $$wheel \
		&& $(MAKE) --no-print-directory test-python && wait $$decoders

# What the network brings and what the compiler makes need not wait for each other.
built:
	tools/check-needs $(PYTHON)
	cargo test $(RUST_TESTS) --no-run & compiler=$$!; \
		$(MAKE) --no-print-directory setup || { kill $$compiler; exit 1; }; wait $$compiler
	tools/ensure-cargo nextest 0.9.148
	cargo metadata --format-version 1 --all-features > .build/metadata.json
	cargo nextest list $(RUST_TESTS) --list-type binaries-only --message-format json > .build/tests.json

test-rust: setup
	tools/ensure-cargo nextest 0.9.148
	cargo nextest run $(RUST_TESTS)
	cargo test --workspace --release --all-features --doc

# Each decoder for as long as random bytes should find what is wrong with it.
test-decoders:
	FUZZ_SECONDS=30 nice -n 19 cargo test --workspace --release --all-features --test decoders

test-python: wheel
	@# test-rust has just built it; by itself, with other features, it would take minutes.
	test -x target/release/potluck || cargo build --release -p potluck-cli
	$(PY) -m pytest -n 2 --dist loadfile --ignore python/tests/test_bench.py python/tests
	@# By itself: the more programs have torch in memory, the smaller is each one's part of it, which the benchmark measures.
	$(PY) -m pytest python/tests/test_bench.py
	$(PY) -m pytest tests/hard_days
	tools/oldest-lightning $(PY) -q python/tests/test_lightning_strategy.py \
		python/tests/test_lightning_peers.py::test_every_way_to_join

oldest-lightning: wheel  ## All of Lightning's tests with the oldest Lightning that is supported
	tools/oldest-lightning $(PY) python/tests/test_lightning_*.py

check: setup  ## Read-only gate: format, lints, docs, tests, licences, tidy
	cargo fmt --all --check
	cargo clippy --locked --release --workspace --all-targets --all-features -- -D warnings
	cargo check --locked --release --manifest-path fuzz/Cargo.toml --target-dir fuzz/target
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --document-private-items --all-features
	tools/ensure-cargo nextest 0.9.148
	cargo nextest run --locked --release --workspace --all-features
	cargo test --locked --release --workspace --all-features --doc
	tools/ensure-cargo deny 0.20.2
	cargo deny --locked check bans licenses sources
	tools/check-advisories
	$(VENV)/bin/ruff check python examples bench tests
	$(VENV)/bin/ruff format --check python examples bench tests

fix:  ## Format and apply the lints' own corrections
	cargo fmt --all
	cargo clippy --workspace --all-targets --all-features --fix --allow-dirty --allow-staged
	$(VENV)/bin/ruff check --fix python examples bench tests
	$(VENV)/bin/ruff format python examples bench tests

# A thousand simulated peers look up scattered memory all the time: large pages save a fifth of their time.
sim:  ## Explore simulated runs, then measure the protocol; SEED=7 SEEDS=1000, TABLE=0|P4|strict
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 SEED=$(SEED) SEEDS=$(SEEDS) TABLE=$(TABLE) cargo run --release -p potluck-tests --bin explore

nat: setup  ## Connect every pair of NAT kinds, and ask the doctor behind each, in network namespaces (needs root, three minutes)
	tests/nat/run
	tests/nat/doctor --binary $${CARGO_TARGET_DIR:-target}/release/potluck

neon:  ## Test the codecs as an aarch64 program under qemu (about two minutes)
	tools/neon $(APT)

windows:  ## Check that the command and the wheel's core compile for Windows (some minutes)
	tools/windows $(APT)

bench: $(VENV)/.maturin .build/system  ## Measure beside hivemind, Gloo and memcpy (links need root); ARGS="--quick", "--only codecs"
	@# What the network brings and what the compiler makes need not wait for each other.
	{ tools/install-wheel $(PY) build && cargo build --release -p potluck-cli \
		&& cargo build --release -p potluck-net-sim --example all_reduce \
		&& cargo test --release -p potluck-dht --test churn --no-run; } & built=$$!; \
		$(PIP) -c $(LOCK) torch numpy msgpack psutil && $(PY) bench/run.py --install $(ARGS); \
		installed=$$?; wait $$built && exit $$installed
	tools/install-wheel $(PY)
	$(PY) bench/run.py $(ARGS)

hard-days: wheel  ## Real processes, real faults, real networks (needs root); ARGS="--only spot_notice", "--minutes 60"
	cargo build $(RUST_TESTS) --bin potluck --bin hostile
	$(PY) tests/hard_days/run.py $(ARGS)

fuzz:  ## Every decoder of strangers' bytes, with coverage feedback, SECONDS each: make fuzz SECONDS=60
	tools/fuzz $(or $(SECONDS),600)

clean:  ## Remove what make built
	rm -rf $(VENV) .build target fuzz/target demo-output
