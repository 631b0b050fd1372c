//! Runs scripts, each under many schedules.

use crate::caller::Caller;
use crate::scenes;
use crate::script::{self, Restarts, Script, Taste};
use crate::trace::{Shown, Trace};
use crate::world::{Lock, Place, World};
use clap::Parser;
use fastrand::Rng;
use oncekey::Durability;
use oncekey::testing::SimDisk;
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, FailurePersistence, Runner};
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

#[derive(Parser)]
struct Args {
    /// How many schedules to run, over all scripts.
    #[arg(long, default_value_t = 100_000)]
    schedules: usize,
    /// Schedules of one script.
    #[arg(long, default_value_t = 20)]
    per_script: usize,
    /// Decides on scripts and schedules.
    #[arg(long)]
    seed: Option<u64>,
    /// Runs this script only, as a failure names it.
    #[arg(long)]
    script: Option<usize>,
    /// Ignored: `cargo test` and the test runners of IDEs add it.
    #[arg(long, hide = true)]
    nocapture: bool,
}

/// Where a script is played.
#[derive(Clone, Copy, Debug)]
pub enum Stage {
    Memory,
    /// All keys of one hash.
    Crowded,
    Synced,
    Buffered,
}

const STAGES: [Stage; 4] = [Stage::Memory, Stage::Synced, Stage::Buffered, Stage::Crowded];

/// More than the deepest call of the store needs, with room for a panic's message.
const STACK: usize = 512 * 1024;

/// Preemptions that the scheduler of Burckhardt et al., "A randomized scheduler with probabilistic guarantees of finding
/// bugs" (2010), places; most bugs need fewer.
const DEPTH: usize = 3;

const WHOLE: &str = "nobody panics under this lock";

pub fn main() -> ExitCode {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
    println!("seed {seed}");
    let shown: Arc<Mutex<Vec<Shown>>> = Arc::default();
    let scripts = match args.script {
        Some(only) => only..only + 1,
        None => 0..args.schedules.div_ceil(args.per_script),
    };
    for number in scripts {
        let mut rng = Rng::with_seed(seed ^ (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let stage = STAGES[number % STAGES.len()];
        let restarts = match stage {
            Stage::Memory | Stage::Crowded => None,
            Stage::Synced => Some(Restarts::Close),
            Stage::Buffered => Some(Restarts::CloseOrDie),
        };
        let taste = Taste { callers: 3, steps: 5, restarts, maintains: true };
        let script = Arc::new(script::write(&mut rng, taste));
        let scheduler: Box<dyn Scheduler + Send> = match rng.bool() {
            true => Box::new(RandomScheduler::new_from_seed(rng.u64(..), args.per_script)),
            false => Box::new(PctScheduler::new_from_seed(rng.u64(..), DEPTH, args.per_script)),
        };
        let play = {
            let (script, shown) = (Arc::clone(&script), Arc::clone(&shown));
            move || {
                scenes::play(number / STAGES.len(), stage, &mut Rng::with_seed(seed ^ number as u64));
                let one = play(stage, &script);
                shown.lock().expect(WHOLE).push(one);
            }
        };
        let mut config = Config::new();
        config.stack_size = STACK;
        config.failure_persistence = FailurePersistence::None;
        config.silence_warnings = true;
        if catch_unwind(AssertUnwindSafe(|| Runner::new(scheduler, config).run(play))).is_err() {
            println!("script: {script:?}\nagain: --seed {seed} --script {number} ({stage:?})");
            return ExitCode::FAILURE;
        }
    }
    let shown = std::mem::take(&mut *shown.lock().expect(WHOLE));
    let overlapping = shown.iter().filter(|shown| shown.is_overlapping).count();
    let restarted = shown.iter().filter(|shown| shown.has_restart).count();
    let steps: usize = shown.iter().map(|shown| shown.steps).sum();
    let patterns: HashSet<u64> = shown.iter().map(|shown| shown.pattern).collect();
    println!("{steps} steps, {} distinct outcomes, {restarted} schedules with a restart", patterns.len());
    let share = 100.0 * overlapping as f64 / shown.len().max(1) as f64;
    println!(
        "schedules {}, overlapping {share:.1} %, records moved {}, violated 0",
        shown.len(),
        scenes::MOVED.load(Ordering::Relaxed)
    );
    if shown.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// A world at its stage.
pub fn make(stage: Stage) -> World {
    let disk = || Place::Disk(Lock::new(SimDisk::new()));
    let (place, durability) = match stage {
        Stage::Memory | Stage::Crowded => (Place::Memory, Durability::Buffered),
        Stage::Synced => (disk(), Durability::Synced),
        Stage::Buffered => (disk(), Durability::Buffered),
    };
    // The same hash each time, or a seed would not give the same schedule.
    let hash = if matches!(stage, Stage::Crowded) { 7 } else { 1 << 40 };
    World::new(place, durability, |builder| builder.fixed_hash(hash))
}

/// Plays a script once, in the threads of shuttle.
fn play(stage: Stage, script: &Arc<Script>) -> Shown {
    let world = Arc::new(make(stage));
    let callers: Vec<_> = (0..script.len())
        .map(|number| {
            let (world, script) = (Arc::clone(&world), Arc::clone(script));
            shuttle::thread::spawn(move || Caller::new(&world, 0, number).play(&script[number]))
        })
        .collect();
    let mut trace = Trace::default();
    for caller in callers {
        trace.steps.extend(caller.join().expect("a caller panicked"));
    }
    match trace.check(&world.deaths(), script) {
        Ok(shown) => shown,
        Err(drawing) => panic!("{drawing}"),
    }
}
