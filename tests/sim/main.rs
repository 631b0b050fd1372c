//! Deterministic simulation: the whole engine on a simulated disk and clock, beside a model that knows what it may answer.
//!
//! A seed is a history. `--seeds 2000 --ops 2000` runs two thousand of them; a seed that fails is shrunk to the operations
//! that it takes to fail, and the command that replays it is printed.

mod shrink;
mod world;

use clap::Parser;
use fastrand::Rng;
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use world::{OP_LEN, Op, Tally};

#[derive(Debug, Parser)]
struct Args {
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many seeds, from that one on.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Operations a seed.
    #[arg(long, default_value_t = 2000)]
    ops: usize,
    /// Threads, each with seeds of its own; as many as there are processors by default.
    #[arg(long)]
    threads: Option<usize>,
    /// Seconds that a history may take, on a busy machine, before it is said never to end.
    #[arg(long, default_value_t = 60)]
    patience: u64,
}

/// Seeds that are being run or shrunk.
static UNDER_WAY: Mutex<BTreeSet<u64>> = Mutex::new(BTreeSet::new());

fn main() -> ExitCode {
    let args = Args::parse();
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(2, usize::from));
    let started = Instant::now();
    let bar = ProgressBar::new(args.seeds)
        .with_style(ProgressStyle::with_template("{bar:40} {pos}/{len} seeds, {eta} left").expect("a template"));
    let (next, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    let total = Mutex::new(Tally::default());
    std::panic::set_hook(Box::new(shrink::note_panic));
    watch(Duration::from_secs(args.patience));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !failed.load(Ordering::Relaxed) {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at >= args.seeds {
                        break;
                    }
                    let seed = args.seed + at;
                    UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner).insert(seed);
                    let answer = run(seed, args.ops);
                    UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner).remove(&seed);
                    match answer {
                        Ok(tally) => total.lock().unwrap_or_else(PoisonError::into_inner).add(&tally),
                        Err(report) => {
                            failed.store(true, Ordering::Relaxed);
                            bar.suspend(|| eprintln!("{report}"));
                        }
                    }
                    bar.inc(1);
                }
            });
        }
    });
    bar.finish_and_clear();
    if failed.into_inner() {
        return ExitCode::FAILURE;
    }
    let Tally { steps, power_cuts, deaths, cut_recoveries, indexed, damaged, refused } =
        total.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!(
        "seeds {}, operations {steps}, power cuts {power_cuts}, deaths and closings {deaths}, cut recoveries {cut_recoveries}, by index {indexed}, \
         damaged {damaged} (refused {refused}), violations 0, {:.0} s",
        args.seeds,
        started.elapsed().as_secs_f64()
    );
    ExitCode::SUCCESS
}

/// Gives up when no history ends for a while: one that hangs can't say so.
fn watch(patience: Duration) {
    std::thread::spawn(move || {
        let mut before = None;
        loop {
            let now = Some(shrink::ENDED.load(Ordering::Relaxed));
            if now == before {
                let seeds = UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner);
                eprintln!("violated: an operation does not return, in one of the seeds {seeds:?}");
                std::process::exit(1);
            }
            before = now;
            std::thread::sleep(patience);
        }
    });
}

/// One history; an error is what to print.
fn run(seed: u64, len: usize) -> Result<Tally, String> {
    let (collide, ops) = history(seed, len);
    let answer = shrink::outcome(collide, &ops);
    answer.map_err(|_| {
        let (ops, message) = shrink::shrink(collide, ops);
        let ops: Vec<String> = ops.iter().map(|op| format!("    Op::{op:?},")).collect();
        format!(
            "seed {seed} fails; replay it with\n    make sim SEED={seed} OPS={len}\nshrunk to {} operations{}:\n{}\n{message}",
            ops.len(),
            if collide { " on keys of one hash" } else { "" },
            ops.join("\n"),
        )
    })
}

/// The operations of a seed: drawn from some that the seed drew before, so that each has rates and keys of its own.
fn history(seed: u64, len: usize) -> (bool, Vec<Op>) {
    let mut random = Rng::with_seed(seed);
    let mut bytes = || std::array::from_fn::<u8, OP_LEN, _>(|_| random.u8(..));
    let palette: Vec<_> = (0..96).map(|_| bytes()).collect();
    // Stores that live long fill segments, and empty them again.
    let is_calm = seed % 4 == 3;
    let ops = (0..len).map(|_| {
        let [choice, fresh, rare, ..] = bytes();
        let mut op = palette[usize::from(choice) % palette.len()];
        // The kind is the palette's, and half of the time all that goes with it.
        if fresh % 2 == 0 {
            op[1..].copy_from_slice(&bytes()[1..]);
        }
        match Op::decode(op) {
            Op::Break { .. } | Op::Rot { .. } | Op::Restart { .. } if is_calm && rare % 16 > 0 => {
                Op::Maintain { budget: usize::MAX }
            }
            op => op,
        }
    });
    (seed.is_multiple_of(5), ops.collect())
}

impl Tally {
    fn add(&mut self, other: &Tally) {
        self.steps += other.steps;
        self.power_cuts += other.power_cuts;
        self.deaths += other.deaths;
        self.cut_recoveries += other.cut_recoveries;
        self.indexed += other.indexed;
        self.damaged += other.damaged;
        self.refused += other.refused;
    }
}
