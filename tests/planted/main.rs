//! Shows that the rigs catch bugs: each one of `src/planted.rs` is planted in turn, and the rig that is to catch it has to fail
//! with a violation. Without a bug the same commands have to pass.
//!
//! ```sh
//! make planted
//! ```

#[cfg(oncekey_planted)]
mod runner;
#[cfg(oncekey_planted)]
mod table;

#[cfg(oncekey_planted)]
fn main() -> std::process::ExitCode {
    runner::main()
}

#[cfg(not(oncekey_planted))]
fn main() {
    eprintln!("built without --cfg oncekey_planted; see `make planted`");
    std::process::exit(2);
}
