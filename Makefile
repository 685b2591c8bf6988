# Two commands for people: make demo, make test. The rest is for those who work on pgstrata.

# One after the other, whatever MAKEFLAGS say: each step needs the one before.
.NOTPARALLEL:
.PHONY: all build deps test-deps demo test test-all test-compose bench fuzz sim mutants lint clean
# Where rustup puts cargo: 'make deps' may have installed it just now.
export PATH := $(PATH):$(HOME)/.cargo/bin
FUZZ_SECONDS ?= 60
SEEDS ?= 10000
FROM ?= 0
# What a user runs, and nothing that only tests need.
PROGRAMS = --package pgstrata-cli --package pgstrata-safekeeper --package pgstrata-pageserver \
  --package pgstrata-storage-broker --package pgstrata-compute-shim --package pgstrata-preload

all: build

# Installs what is missing: PostgreSQL 15, a C compiler, Rust. Tests also need PostgreSQL 16 to 18 and an S3 server.
deps:
	scripts/install-deps

test-deps:
	scripts/install-deps --tests

build: deps
	cargo build $(PROGRAMS) --locked

demo: deps
	cargo build $(PROGRAMS) --locked --release
	scripts/demo target/release

lint:
	cargo fmt --all --check
	scripts/check-docs
	cargo clippy --workspace --all-targets --locked -- -D warnings

# All targets at once: the same packages with other features, because other targets are wanted, would be built again.
test: test-deps
	cargo build --workspace --all-targets --locked
	$(MAKE) lint
	scripts/with-venv cargo test --workspace --locked --no-fail-fast -- --test-threads=2
	cargo test --package pgstrata-pg-redo --features redo-faults --locked --test faults
	PROGRAMS=$${CARGO_TARGET_DIR:-target}/debug scripts/test-all compute-15 compute-18

# docker-compose.yml in containers: scripts/test-compose --help. As root, on Debian 12.
test-compose: deps
	cargo build $(PROGRAMS) --package pgstrata-tests --locked --release
	scripts/test-compose

# The same with every moment, every round and every version, and what takes longer: hours, and one table at the end.
test-all: test-deps lint
	cargo build --workspace --locked --release
	FUZZ_SECONDS=$(FUZZ_SECONDS) scripts/test-all

# Each target for a while; a crash fails.
fuzz:
	scripts/fuzz $(FUZZ_SECONDS)

# Safekeepers, computes, disks and network in one thread, so many times; what fails is shown.
sim: deps
	cargo run --locked --release --package pgstrata-world --example world -- seeds=$(SEEDS) from=$(FROM)

# What the tests of redo notice of mistakes in it: docs/redo-mutants.md.
mutants: deps
	scripts/mutants

bench: deps
	cargo build --workspace --locked --release
	scripts/bench target/release

clean:
	cargo clean
