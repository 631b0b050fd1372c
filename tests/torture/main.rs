//! Real crashes: processes that use one store are killed, and an oracle outside of them says what must be there.
//!
//! ```text
//!   child: 4 threads, random operations on one store      this process
//!     a line before each, a line after each  -- pipe -->    oracle: what each key may be
//!              <-- SIGKILL, at a random time --             audit: all keys, records and files, between two children
//!
//!   strace: a kill, or an error, at each system call of a script -- pipe --> an oracle and an audit of its own
//! ```
//!
//! The store of the first part is one and the same over the whole run. Its clock runs fast, so that answers of many
//! lifetimes expire. The seed repeats what the callers ask for and when kills are due, but not how threads interleave; the
//! second part is repeated exactly.

mod audit;
mod caller;
mod client;
mod clock;
mod kills;
mod oracle;
mod process;
mod random;
mod story;
mod syscalls;
mod watchdog;

use oncekey::Durability;
use oracle::{Breach, Violation};
use process::Orders;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use watchdog::Watchdog;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

#[derive(clap::Parser)]
#[command(about = "Kills processes that use a store, and compares what is left with what they were told")]
struct Args {
    /// Kills at random times.
    #[arg(long, default_value_t = 300)]
    cycles: u64,
    /// Acknowledged operations to reach as well.
    #[arg(long, default_value_t = 100_000)]
    acks: u64,
    /// The longest that a process is left alive, in ms.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..))]
    longest_ms: u64,
    /// Kills and errors at system calls.
    #[arg(long, value_enum, default_value_t = Strace::On)]
    strace: Strace,
    /// Where to make the directory for kills and errors at system calls, if elsewhere: what a killed process leaves is in
    /// the page cache, so tmpfs serves as well, many times as fast.
    #[arg(long)]
    strace_dir: Option<PathBuf>,
    /// Takes every so-manieth occurrence of a system call, at least four of each; where to begin is drawn.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    strace_every: u64,
    /// Random if not given.
    #[arg(long)]
    seed: Option<u64>,
    /// Where to make the directory that holds the stores.
    #[arg(long, default_value = env!("CARGO_TARGET_TMPDIR"))]
    dir: PathBuf,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(clap::Subcommand)]
enum Role {
    /// A process to be killed; started by the other one.
    #[command(hide = true)]
    Child(Orders),
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Strace {
    On,
    Off,
    Only,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Durable {
    Buffered,
    Synced,
}

impl From<Durable> for Durability {
    fn from(durable: Durable) -> Durability {
        match durable {
            Durable::Buffered => Durability::Buffered,
            Durable::Synced => Durability::Synced,
        }
    }
}

#[derive(Default)]
struct Figures {
    kills: u64,
    kills_before_open: u64,
    strace_kills: u64,
    recovery_kills: u64,
    errors: u64,
    /// Operations that were answered with an error.
    refusals: u64,
    audits: u64,
    acks: u64,
}

fn main() -> ExitCode {
    let args = <Args as clap::Parser>::parse();
    if let Some(Role::Child(orders)) = &args.role {
        orders.carry_out();
        return ExitCode::SUCCESS;
    }
    match torture(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("torture: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether the store kept its word.
fn torture(args: &Args) -> Result<bool> {
    let started = Instant::now();
    let seed = args.seed.map_or_else(getrandom::u64, Ok)?;
    std::fs::create_dir_all(&args.dir)?;
    let dir_in = |place| tempfile::Builder::new().prefix("torture-").tempdir_in(place);
    let dir = dir_in(&args.dir)?;
    println!("torture: --seed {seed}, in {}", dir.path().display());
    let watchdog = Watchdog::start(format!("--seed {seed}, kept {}", dir.path().display()));
    if args.strace != Strace::Off {
        syscalls::check_strace()?;
    }
    let mut figures = Figures::default();
    let mut held = Ok(());
    if args.strace != Strace::Only {
        held = kills::run(args, dir.path(), seed, &watchdog, &mut figures);
    }
    let dir = match &args.strace_dir {
        Some(place) if held.is_ok() => dir_in(place)?,
        Some(_) | None => dir,
    };
    if held.is_ok() && args.strace != Strace::Off {
        held = syscalls::run(args, dir.path(), seed, &watchdog, &mut figures);
    }
    let mut breaches = [0; 3];
    if let Err(error) = &held {
        println!("torture: {error}\ntorture: --seed {seed}, kept {}", dir.path().display());
        let breach = error.downcast_ref::<Violation>().map_or(Breach::Lost, |violation| violation.breach);
        breaches[breach as usize] += 1;
    }
    let is_held = held.is_ok();
    if is_held {
        dir.close()?;
    } else {
        let _kept = dir.keep();
    }
    let Figures { kills, kills_before_open, strace_kills, recovery_kills, errors, refusals, audits, acks } = figures;
    println!(
        "torture: {kills} kills at random times, {kills_before_open} of them before the store was open; {strace_kills} at \
         system calls, {recovery_kills} of them aimed at recoveries; {errors} errors injected, {refusals} operations \
         refused; {audits} audits; {:.1} s",
        started.elapsed().as_secs_f64()
    );
    let [lost, double, back] = breaches;
    let all = kills + strace_kills;
    println!("kills {all}, acks {acks}, lost {lost}, double grants {double}, fence regressions {back}");
    Ok(is_held)
}
