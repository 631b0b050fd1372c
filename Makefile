# `make test` installs what the machine lacks and runs all tests; the other targets are for people at work.
.PHONY: test setup unit loom fuzz demo torture torture-release bench lint

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

# Real kills against one store, and kills and errors at its system calls; those go to tmpfs where there is one.
TORTURE = cargo test --locked --release --test torture -- $(if $(wildcard /dev/shm),--strace-dir /dev/shm)

torture:
	$(TORTURE) --cycles 300 --acks 100000 --strace-every 8

# Hours on a slow disk: 15,000 operations a second were measured on one, 130,000 on tmpfs.
torture-release:
	$(TORTURE) --cycles 5000 --acks 10000000 --longest-ms 1000

bench:
	cargo bench --locked

lint:
	cargo fmt --check
	cargo clippy --locked --all-targets --all-features -- -D warnings
	cargo clippy --locked --no-default-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps
