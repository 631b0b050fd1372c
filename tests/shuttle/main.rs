//! The whole store under shuttle: callers whose every step is scheduled by chance, and the histories that they leave checked
//! as those of real threads are.
//!
//! ```sh
//! make shuttle
//! ```
//!
//! The store's locks, conditions, atomics and threads are shuttle's (`src/sync.rs`). Those of `arc-swap` and `dashmap` are not:
//! each of their calls is one step. What is scheduled are sequentially consistent interleavings; weaker orderings are for loom.
//! A seed gives the same scripts and the same schedules.

#[cfg(oncekey_shuttle)]
#[path = "../linear/caller.rs"]
mod caller;
#[cfg(oncekey_shuttle)]
#[path = "../linear/report.rs"]
mod report;
#[cfg(oncekey_shuttle)]
mod scenes;
#[cfg(oncekey_shuttle)]
mod schedules;
#[cfg(oncekey_shuttle)]
#[path = "../linear/script.rs"]
mod script;
#[cfg(oncekey_shuttle)]
#[path = "../linear/spec.rs"]
mod spec;
#[cfg(oncekey_shuttle)]
mod threads;
#[cfg(oncekey_shuttle)]
#[path = "../linear/trace.rs"]
mod trace;
#[cfg(oncekey_shuttle)]
#[path = "../linear/world.rs"]
mod world;

#[cfg(oncekey_shuttle)]
fn main() -> std::process::ExitCode {
    schedules::main()
}

#[cfg(not(oncekey_shuttle))]
fn main() {
    eprintln!("built without --cfg oncekey_shuttle; see `make shuttle`");
    std::process::exit(2);
}
