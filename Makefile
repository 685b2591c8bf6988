# Two commands for people: make demo, make test. The rest is for those who work on pgstrata.

.PHONY: all build deps demo test test-all bench fuzz lint clean
FUZZ_SECONDS ?= 60
PG_BIN ?= $(shell ls -d /usr/lib/postgresql/15/bin 2>/dev/null)

all: build

# Installs what is missing: PostgreSQL 15 to 18, a C compiler, and an S3 server for the tests.
deps:
	scripts/install-deps

build: deps
	cargo build --workspace --locked

demo: deps
	cargo build --workspace --locked --release
	scripts/demo target/release

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings

test: build lint
	scripts/with-venv cargo test --workspace --locked -- --test-threads=2
	cargo test --package pgstrata-pg-redo --features redo-faults --locked --test faults

# The same with every moment, every round and every version, and what takes longer.
test-all: build lint
	PGSTRATA_TEST_ALL=1 scripts/with-venv cargo test --workspace --locked -- --test-threads=2
	cargo test --package pgstrata-pg-redo --features redo-faults --locked --test faults
	scripts/fuzz $(FUZZ_SECONDS)

# Each target for a while; a crash fails.
fuzz:
	scripts/fuzz $(FUZZ_SECONDS)

bench: deps
	cargo build --workspace --locked --release
	scripts/bench target/release

clean:
	cargo clean
