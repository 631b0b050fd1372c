# `make test` installs what the machine lacks and runs the tests; docs/testing.md tells of the longer ones.
.PHONY: test setup unit loom sim sim-many planted shuttle linear torture torture-release filesystems no-filesystems filesystems-release \
	corruption corruption-release dashboard fuzz fuzz-long demo bench bench-compiles bench-gateway instructions compare compare-full compare-setup lint lint-compare

# Seconds that each fuzz target runs.
FUZZ_SECONDS ?= 30
# Executions of `fuzz-long`, over all targets: a tenth of them with crashes and restarts.
RUNS ?= 100000000
# The history to simulate, its operations, and how many histories `sim-many` runs.
SEED ?= 0
OPS ?= 2000
SEEDS ?= 600
# Histories of real threads to record and check.
HISTORIES ?= 50000
# Schedules to run the whole store under.
SCHEDULES ?= 10000
# Arguments for the rig of damages, such as those that a failing case says.
CORRUPTION ?= --every 401
# Arguments for the dashboard's rig: `--screenshot docs/dashboard.png --past 200` draws what the docs show.
DASHBOARD ?=
# What mounting file systems takes.
CAN_MOUNT = $(and $(filter 0,$(shell id -u)),$(wildcard /dev/loop-control),$(wildcard /dev/fuse))

FUZZ_TARGETS = $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))

test: setup unit fuzz loom sim-many linear shuttle torture $(if $(CAN_MOUNT),filesystems,no-filesystems) corruption dashboard demo

setup:
	.ci/install

# What is compiled with the profile of tests selects the same packages and features, so that each is compiled once.
EVERYTHING = --locked --workspace --all-features

# Rigs too are compiled as the tests are, with assertions and checks of overflow; the long ones before a release, as users compile the crate.
RIGS = $(EVERYTHING)
torture-release filesystems-release corruption-release: RIGS = --locked --release

# Unit, integration and doc tests.
# More at a time than there may be cores, for most of them wait for the disk or for a limit of time.
unit: export RUST_TEST_THREADS = 4
unit:
	cargo test $(EVERYTHING) --tests
	cargo test $(EVERYTHING) --doc

# Every interleaving of the steps of the state word, the watermark, group commit and the waking of waiters.
loom:
	RUSTC_WORKSPACE_WRAPPER=.ci/cfg/loom cargo test $(EVERYTHING) --lib loom_

# One simulated history, as a failing seed says: `make sim SEED=7 OPS=2000`.
sim:
	cargo test $(RIGS) --test sim -- --seed $(SEED) --ops $(OPS)

sim-many:
	cargo test $(RIGS) --test sim -- --seeds $(SEEDS) --ops $(OPS)

# The whole store, with each lock, condition and atomic scheduled by chance.
shuttle:
	RUSTC_WORKSPACE_WRAPPER=.ci/cfg/shuttle cargo test $(EVERYTHING) --test shuttle -- --schedules $(SCHEDULES)

# Whether what real threads were told at the same time could have been told one after the other.
linear:
	cargo test $(RIGS) --test linear -- --histories $(HISTORIES)

# Tracing compares would cost most of the time in loops over zeros; checksums are put right by the targets themselves.
FUZZ_FLAGS = --sanitizer address --no-trace-compares
FUZZ_LIMITS = -timeout=20 -rss_limit_mb=4096 -malloc_limit_mb=256 -print_final_stats=1
# Forty operations: longer histories are the simulation's.
fuzz-operations: FUZZ_LIMITS += -max_len=241
FUZZ_END = -max_total_time=$(FUZZ_SECONDS)
# Short stacks of allocations, which the address sanitizer keeps of each.
fuzz-%: export ASAN_OPTIONS = malloc_context_size=3

# Two targets at a time. What they find goes below target/, so that the tree stays clean; an input that fails, to fuzz/artifacts.
fuzz:
	cargo +nightly fuzz build $(FUZZ_FLAGS)
	$(MAKE) --output-sync=target --jobs=2 $(addprefix fuzz-,$(FUZZ_TARGETS))

fuzz-%:
	mkdir -p target/fuzz-corpus/$*
	cargo +nightly fuzz run $(FUZZ_FLAGS) $* target/fuzz-corpus/$* fuzz/corpus/$* -- $(FUZZ_LIMITS) $(FUZZ_END)

fuzz-long:
	cargo +nightly fuzz build $(FUZZ_FLAGS)
	$(MAKE) --output-sync=line --jobs=2 fuzz-operations-long fuzz-recover_dir-long
	$(MAKE) --output-sync=line --jobs=2 fuzz-record_decode-long fuzz-wheel-long

# Shares of the runs, by what an execution costs.
fuzz-operations-long: SHARE = 2
fuzz-recover_dir-long: SHARE = 8
fuzz-record_decode-long fuzz-wheel-long: SHARE = 45
fuzz-%-long:
	$(MAKE) fuzz-$* FUZZ_END=-runs=$$(($(RUNS) * $(SHARE) / 100))

demo: TARGET_DIR = $$(cargo metadata --no-deps --format-version 1 | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
demo:
	cargo build $(EVERYTHING) --example checkout
	$(TARGET_DIR)/debug/examples/checkout
	cargo test $(EVERYTHING) --test demo

bench:
	cargo bench --locked
	cargo bench --locked --package oncekey-examples --bench http

# Whether the benches compile: with the tests' profile, for which most of it is there.
bench-compiles:
	cargo bench $(EVERYTHING) --no-run --profile test

# The gateway beside a bare proxy; needs wrk.
bench-gateway:
	cargo bench --locked --features gateway --bench gateway

# Whether operations take the instructions that are recorded, within 5 %; needs valgrind.
instructions:
	cargo run --locked --release --package oncekey-instructions

# oncekey beside rivals: a few minutes, and hours. What isn't installed is left out; see `compare-setup`.
ROCKSDB = $(wildcard /usr/include/rocksdb/c.h)
COMPARE = ROCKSDB_LIB_DIR=$(dir $(firstword $(wildcard /usr/lib/*/librocksdb.so /usr/lib/librocksdb.so))) ROCKSDB_INCLUDE_DIR=/usr/include \
	cargo run --locked --release --manifest-path benches/compare/Cargo.toml $(if $(ROCKSDB),--features rocksdb) --

compare:
	$(COMPARE) --selection quick --chart target/compare/chart.svg

compare-full:
	$(COMPARE) --selection full --chart target/compare/chart.svg

compare-setup:
	.ci/install-rivals

# Documented is all but the program, whose pages would take the library's place; the example, so that features are those of clippy.
lint:
	cargo fmt --check
	cargo clippy $(EVERYTHING) --all-targets -- -D warnings
	cargo clippy $(EVERYTHING) --test '*' -- -D warnings
	cargo clippy --locked --no-default-features -- -D warnings
	cargo clippy --locked --features http -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc $(EVERYTHING) --no-deps --lib --examples --bin '[!o]*'

# Of the comparison, which is a package of its own.
lint-compare:
	cargo fmt --manifest-path benches/compare/Cargo.toml --check
	cargo clippy --locked --manifest-path benches/compare/Cargo.toml -- -D warnings

# Whether the rigs catch bugs: those of src/planted.rs, one at a time.
planted:
	RUSTC_WORKSPACE_WRAPPER=.ci/cfg/planted cargo test --locked --release --test planted

# Processes killed at random, and killed and failed at system calls; needs strace. That part goes to tmpfs where there is one.
TORTURE = cargo test $(RIGS) --test torture -- $(if $(wildcard /dev/shm),--strace-dir /dev/shm)

torture:
	$(TORTURE) --cycles 300 --acks 100000 --strace-every 16

# An hour on tmpfs (`--dir /dev/shm`), hours on a slow disk: 130,000 and 15,000 operations a second were measured.
torture-release:
	$(TORTURE) --cycles 5000 --acks 10000000 --longest-ms 1000

# Real file systems on small disks that fill up, fail and lose their power; needs root, loop devices and FUSE.
filesystems:
	cargo test $(RIGS) --test filesystems

no-filesystems:
	@echo "no file systems were mounted and tested: that takes root, loop devices and FUSE"

filesystems-release:
	cargo test $(RIGS) --test filesystems -- --images 1000 --every-call

# Damage to a store's files: some of all places, and each of them.
corruption:
	cargo test $(RIGS) --test corruption -- $(CORRUPTION)

corruption-release:
	cargo test $(RIGS) --test corruption

# The gateway's dashboard in Chromium, which Node.js drives.
dashboard:
	cargo test $(EVERYTHING) --test dashboard -- $(DASHBOARD)
