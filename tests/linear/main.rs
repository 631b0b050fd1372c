//! Linearizability: many small histories of threads that call one store at the same time, each checked against the promise.
//!
//! ```sh
//! cargo test --locked --test linear -- --histories 100000
//! ```
//!
//! Histories come in worlds: one store, fresh keys for each history, callers who start each history together, and a thread
//! that does upkeep beside. In some worlds the store is closed, or its process dies, in the middle of a history. A seed gives
//! the same scripts; how the threads meet is up to the machine.

mod caller;
mod report;
mod script;
mod spec;
mod threads;
mod trace;
mod world;

use caller::{Caller, Op};
use clap::Parser;
use fastrand::Rng;
use indicatif::{ProgressBar, ProgressStyle};
use oncekey::Durability;
use oncekey::testing::SimDisk;
use script::{Restarts, Script, Taste};
use std::collections::HashSet;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;
use trace::{Shown, Trace};
use world::{Lock, Place, World};

/// Histories in one world.
const WORLD: usize = 250;

#[derive(Parser)]
struct Args {
    /// How many histories to record and check.
    #[arg(long, default_value_t = 100_000)]
    histories: usize,
    /// Decides on the scripts; drawn if it isn't given.
    #[arg(long)]
    seed: Option<u64>,
    /// Plays this world only, as a failure names it.
    #[arg(long)]
    world: Option<usize>,
    /// The most callers of a history.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(2..=7))]
    threads: u8,
    /// Seconds that a world may take, on a busy machine, before a call in it is said never to return.
    #[arg(long, default_value_t = 60)]
    patience: u64,
    /// Ignored: `cargo test` and the test runners of IDEs add it.
    #[arg(long, hide = true)]
    nocapture: bool,
}

/// What all histories together showed.
#[derive(Default)]
struct Tally {
    histories: usize,
    overlapping: usize,
    restarted: usize,
    steps: usize,
    patterns: HashSet<u64>,
}

impl Tally {
    fn add(&mut self, shown: Shown) {
        self.histories += 1;
        self.overlapping += usize::from(shown.is_overlapping);
        self.restarted += usize::from(shown.has_restart);
        self.steps += shown.steps;
        self.patterns.insert(shown.pattern);
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
    println!("seed {seed}");
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} histories, {eta} left").expect("a fine template");
    let bar = ProgressBar::new(args.histories as u64).with_style(style);
    let mut tally = Tally::default();
    let worlds = Arc::new(AtomicUsize::new(0));
    watch(Arc::clone(&worlds), Duration::from_secs(args.patience));
    let numbers = match args.world {
        Some(only) => only..only + 1,
        None => 0..args.histories.div_ceil(WORLD),
    };
    for number in numbers {
        let count = if args.world.is_some() { WORLD } else { WORLD.min(args.histories - number * WORLD) };
        let mut rng = Rng::with_seed(seed ^ (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let (world, taste) = make(number, usize::from(args.threads));
        let scripts: Vec<_> = (0..count).map(|_| script::write(&mut rng, taste)).collect();
        let traces = record(&world, &scripts, taste.callers, rng.u64(..));
        let deaths = world.deaths();
        for (trace, script) in traces.iter().zip(&scripts) {
            match trace.check(&deaths, script) {
                Ok(shown) => tally.add(shown),
                Err(drawing) => {
                    println!("{drawing}\nseen by chance; to play the same: --seed {seed} --world {number} ({taste:?})");
                    return ExitCode::FAILURE;
                }
            }
        }
        worlds.fetch_add(1, Ordering::SeqCst);
        bar.inc(count as u64);
    }
    bar.finish_and_clear();
    println!(
        "{} steps, {} distinct outcomes, {} histories with a restart",
        tally.steps,
        tally.patterns.len(),
        tally.restarted
    );
    let share = 100.0 * tally.overlapping as f64 / tally.histories.max(1) as f64;
    println!("histories {}, overlapping {share:.1} %, not linearizable 0", tally.histories);
    if tally.histories == 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Gives up when no world ends for a while: whoever hangs can't say so.
fn watch(worlds: Arc<AtomicUsize>, patience: Duration) {
    thread::spawn(move || {
        let mut ended = None;
        loop {
            let now = Some(worlds.load(Ordering::SeqCst));
            if now == ended {
                threads::give_up("a call does not return");
            }
            ended = now;
            thread::sleep(patience);
        }
    });
}

fn make(number: usize, callers: usize) -> (World, Taste) {
    let calm = Taste { callers, steps: 6, restarts: None, maintains: false };
    let fair = |builder: oncekey::Builder| builder;
    match number % 16 {
        1 => {
            let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory for a store");
            let taste = Taste { restarts: Some(Restarts::Close), ..calm };
            // A disk's syncs last long enough for others to come meanwhile.
            let durability = if number % 32 == 1 { Durability::Synced } else { Durability::Buffered };
            (World::new(Place::Dir(dir), durability, fair), taste)
        }
        9 => {
            let place = Place::Disk(Lock::new(SimDisk::new()));
            (World::new(place, Durability::Synced, fair), Taste { restarts: Some(Restarts::CloseOrDie), ..calm })
        }
        // All keys of one hash: they share a run of slots, and their lookups wait for each other's records.
        5 | 13 => (World::new(Place::Memory, Durability::Buffered, |builder| builder.fixed_hash(7)), calm),
        _ => (World::new(Place::Memory, Durability::Buffered, fair), calm),
    }
}

/// Plays the scripts one after the other, all callers of each at the same time.
fn record(world: &World, scripts: &[Script], callers: usize, seed: u64) -> Vec<Trace> {
    let traces: Vec<Lock<Trace>> = scripts.iter().map(|_| Lock::new(Trace::default())).collect();
    // Counts arrivals: caller c may begin history h once all are there, so h * callers of them before.
    let arrivals = AtomicUsize::new(0);
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let upkeep = scope.spawn(|| upkeep(world, &is_over, seed));
        let players: Vec<_> = (0..callers)
            .map(|number| {
                let (arrivals, traces) = (&arrivals, &traces);
                scope.spawn(move || {
                    threads::seed(seed + number as u64);
                    for (at, script) in scripts.iter().enumerate() {
                        let life = world.life();
                        meet(arrivals, (2 * at + 1) * callers);
                        let steps = match script.get(number) {
                            Some(ops) => Caller::new(world, at, number).play(ops),
                            None => Vec::new(),
                        };
                        let mut trace = traces[at].lock();
                        trace.life = life;
                        trace.steps.extend(steps);
                        drop(trace);
                        meet(arrivals, (2 * at + 2) * callers);
                    }
                })
            })
            .collect();
        for player in players {
            player.join().expect("a caller panicked");
        }
        is_over.store(true, Ordering::SeqCst);
        upkeep.join().expect("upkeep panicked");
    });
    traces.into_iter().map(|trace| std::mem::take(&mut *trace.lock())).collect()
}

/// Waits, busily, until so many have arrived.
fn meet(arrivals: &AtomicUsize, all: usize) {
    arrivals.fetch_add(1, Ordering::SeqCst);
    let mut spins = 0;
    while arrivals.load(Ordering::SeqCst) < all {
        spins += 1;
        if spins % 64 == 0 { thread::yield_now() } else { std::hint::spin_loop() }
    }
}

/// Does upkeep all the time, in each life of the store.
fn upkeep(world: &World, is_over: &AtomicBool, seed: u64) {
    threads::seed(!seed);
    while !is_over.load(Ordering::SeqCst) {
        Caller::new(world, 0, 0).play(&[Op::Maintain]);
        thread::yield_now();
    }
}
