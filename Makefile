# `make test` installs what the machine lacks and runs all tests; the other targets are for people at work.
.PHONY: test setup unit loom fuzz demo bench lint filesystems filesystems-release

# Seconds that each fuzz target runs.
FUZZ_SECONDS ?= 20
FUZZ_TARGETS = $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))

test: setup unit loom fuzz demo

setup:
	.ci/install

# Unit, integration and doc tests.
unit:
	cargo test --locked

# Every interleaving of the state word's and the watermark's steps.
loom:
	RUSTFLAGS="--cfg oncekey_loom" CARGO_TARGET_DIR=target/loom cargo test --locked --release --lib loom_

fuzz:
	for target in $(FUZZ_TARGETS); do \
		cargo +nightly fuzz run $$target -- -max_total_time=$(FUZZ_SECONDS) -timeout=20 -rss_limit_mb=4096 || exit 1; \
	done

demo:
	cargo run --locked --release --example checkout

bench:
	cargo bench --locked

lint:
	cargo fmt --check
	cargo clippy --locked --all-targets --all-features -- -D warnings
	cargo clippy --locked --no-default-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps

# Real file systems on small disks that fill up, fail and lose their power; needs root, loop devices and FUSE.
filesystems:
	cargo test --locked --release --test filesystems

filesystems-release:
	cargo test --locked --release --test filesystems -- --images 1000 --every-call
