//! Every damage of some kinds to a store's files, one at a time: each bit, each length, 4 KiB of zeros, of ones and of what follows at
//! each offset, each file missing, in another's place, of another store or of an earlier time.
//!
//! A case has a number, and the command that replays it is printed when it fails. `--every 211` takes one in so many.

mod subject;
mod sweep;
mod verdict;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use oncekey::Retention;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;
use subject::{End, Subject};
use sweep::{Allowed, Sweep};
use verdict::{Bench, Changes, Damage, Look, Opened};

#[derive(Debug, Parser)]
struct Args {
    /// Takes one case in so many; a number that eight does not share a factor with meets all bits of a byte.
    #[arg(long, default_value_t = 1)]
    every: usize,
    /// This case only, of each sweep that has it.
    #[arg(long)]
    case: Option<usize>,
    /// Sweeps whose name contains this only.
    #[arg(long, default_value = "")]
    only: String,
    /// Salvages one in so many of the stores that open in strict mode; of those refused all.
    #[arg(long, default_value_t = 16)]
    salvage_every: usize,
    /// Tells each case that runs into a known limit.
    #[arg(long)]
    tell: bool,
    /// As many as there are processors by default.
    #[arg(long)]
    threads: Option<usize>,
}

impl Args {
    /// The cases of a sweep to take, from one on. Changes of whole files are few: all of them.
    fn cases(&self, sweep: &Sweep<'_>, first: usize) -> impl Iterator<Item = usize> + use<> {
        let stride = if sweep.is_of_files() { 1 } else { self.every };
        let only = self.case;
        (first..sweep.count).step_by(stride).filter(move |case| only.is_none_or(|only| only == *case))
    }
}

/// So many that the last ones are not of those that sync what was before them.
const KEYS: usize = 22;
/// Cases that a thread takes at a time.
const BATCH: usize = 128;
/// Failures that are told in full.
const MOST_TOLD: usize = 10;

#[derive(Debug, Default)]
struct Tally {
    cases: u64,
    whole: u64,
    short: u64,
    known_limit: u64,
    refused: u64,
    foreign: u64,
    indexed: u64,
    salvaged: u64,
    wrong: u64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let started = Instant::now();
    let ends = [End::Closed, End::Killed, End::Cut];
    let subjects = ends.map(|end| Subject::new(end, KEYS, &[Retention::Forever], 1));
    let other = Subject::new(End::Closed, KEYS, &[Retention::Forever], 2);
    subjects.iter().for_each(verdict::check_subject);
    let sweeps: Vec<Sweep<'_>> = subjects
        .iter()
        .zip(["closed", "killed", "cut"])
        .flat_map(|(subject, name)| sweep::all(subject, &other, name))
        .filter(|sweep| sweep.name.contains(&args.only))
        .collect();
    // Batches of one sweep each: (sweep, first case).
    let batches: Vec<(usize, usize)> = sweeps
        .iter()
        .enumerate()
        .flat_map(|(at, sweep)| args.cases(sweep, 0).step_by(BATCH).map(move |first| (at, first)))
        .collect();
    let bar = ProgressBar::new(batches.len() as u64 * BATCH as u64)
        .with_style(ProgressStyle::with_template("{bar:40} {pos}/{len} cases, {eta} left").expect("a template"));
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(2, usize::from));
    let next = AtomicUsize::new(0);
    let total = Mutex::new(Tally::default());
    // What a failing case panics with is told with its name.
    std::panic::set_hook(Box::new(|_| {}));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut tally = Tally::default();
                while let Some(&(at, first)) = batches.get(next.fetch_add(1, Ordering::Relaxed)) {
                    run(&sweeps[at], first, &args, &mut tally, &bar);
                    bar.inc(BATCH as u64);
                }
                total.lock().unwrap_or_else(PoisonError::into_inner).add(&tally);
            });
        }
    });
    bar.finish_and_clear();
    let Tally { cases, whole, short, known_limit, refused, foreign, indexed, salvaged, wrong } =
        total.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!(
        "cases {cases}, refused {refused}, refused in salvage too {foreign}, whole {whole}, without what no mark vouched for {short}, \
         known limit {known_limit}, opened by index {indexed}, salvaged {salvaged}, wrong {wrong}, {:.0} s",
        started.elapsed().as_secs_f64()
    );
    if wrong == 0 && cases > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A batch of a sweep's cases.
fn run(sweep: &Sweep<'_>, first: usize, args: &Args, tally: &mut Tally, bar: &ProgressBar) {
    let mut bench = Bench::new(sweep.subject);
    for case in args.cases(sweep, first).take(BATCH) {
        let Some(changes) = sweep.changes(case) else { continue };
        tally.cases += 1;
        let checked = catch_unwind(AssertUnwindSafe(|| {
            let mut tally = Tally::default();
            check(&mut bench, sweep, &changes, case, args, &mut tally);
            tally
        }));
        match checked {
            Ok(one) => {
                if args.tell && one.known_limit > 0 {
                    bar.suspend(|| println!("{} {case}: opens without what was durable", sweep.name));
                }
                tally.add(&one);
            }
            Err(panic) => {
                bench = Bench::new(sweep.subject);
                tally.wrong += 1;
                if tally.wrong as usize <= MOST_TOLD {
                    let message = panic.downcast_ref::<String>().map(String::as_str);
                    let message = message.or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without text");
                    let replay = format!("make corruption CORRUPTION=\"--only {} --case {case}\"", sweep.name);
                    bar.suspend(|| eprintln!("{} {case}: {message}\n    {replay}", sweep.name));
                }
            }
        }
    }
}

fn check(bench: &mut Bench<'_>, sweep: &Sweep<'_>, changes: &Changes, case: usize, args: &Args, tally: &mut Tally) {
    if sweep.allowed == Allowed::AnyRefusal {
        bench.check_refused(changes);
        tally.refused += 1;
        tally.foreign += 1;
        return;
    }
    let look = if case.is_multiple_of(61) { Look::Thorough } else { Look::Quick };
    let damage = Damage::new(sweep.subject, changes);
    let opened = bench.strict(&damage, look);
    match sweep.allowed {
        Allowed::Exact => opened.may_come_of(sweep.subject.end),
        Allowed::Refusal | Allowed::AnyRefusal => assert_eq!(opened, Opened::Refused, "this has to be noticed"),
        Allowed::Older => {}
    }
    match opened {
        Opened::Whole => tally.whole += 1,
        Opened::Short { of_durable: false } => tally.short += 1,
        Opened::Short { of_durable: true } => tally.known_limit += 1,
        Opened::Refused => tally.refused += 1,
    }
    if sweep.subject.end == End::Closed && sweep.allowed != Allowed::Older {
        tally.indexed += u64::from(bench.indexed(&damage, opened));
    }
    if opened == Opened::Refused || case.is_multiple_of(args.salvage_every) {
        bench.salvage(&damage, opened, look);
        tally.salvaged += 1;
    }
}

impl Tally {
    fn add(&mut self, other: &Tally) {
        self.cases += other.cases;
        self.whole += other.whole;
        self.short += other.short;
        self.known_limit += other.known_limit;
        self.refused += other.refused;
        self.foreign += other.foreign;
        self.indexed += other.indexed;
        self.salvaged += other.salvaged;
        self.wrong += other.wrong;
    }
}
