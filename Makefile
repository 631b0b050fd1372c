# `make test` installs what the machine lacks and runs all tests; the other targets are for people at work.
.PHONY: test setup unit loom shuttle linear filesystems filesystems-release fuzz demo bench lint

# Seconds that each fuzz target runs.
FUZZ_SECONDS ?= 20
# Histories of real threads to record and check; ten times as many before a release.
HISTORIES ?= 100000
# Schedules to run the whole store under.
SCHEDULES ?= 100000
FUZZ_TARGETS = $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))

test: setup unit loom shuttle linear fuzz demo

setup:
	.ci/install

# Unit, integration and doc tests.
unit:
	cargo test --locked

# Every interleaving of the steps of the state word, the watermark, group commit and the waking of waiters.
loom:
	RUSTFLAGS="--cfg oncekey_loom" CARGO_TARGET_DIR=target/loom cargo test --locked --release --lib loom_

# The whole store, with each lock, condition and atomic scheduled by chance.
shuttle:
	RUSTFLAGS="--cfg oncekey_shuttle" CARGO_TARGET_DIR=target/shuttle \
		cargo test --locked --release --test shuttle -- --schedules $(SCHEDULES)

# Whether what real threads were told at the same time could have been told one after the other.
linear:
	cargo test --locked --release --test linear -- --histories $(HISTORIES)

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
