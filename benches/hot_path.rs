//! Reserve, complete, replay and herd: in memory, `Buffered` and `Synced` on disk, and on dashmap in the same run.
//!
//! Criterion measures the single operations. The run ends with FRESH (reserve a new key, complete it) while a store
//! grows from empty to a million keys, and REPLAY (reserve a completed key, read its answer) over all of them in random
//! order. Stores take turns with dashmap; only their ratios count on a machine that others use too.

#![allow(missing_docs, reason = "benches are not documented")]

#[path = "workload/baseline.rs"]
mod baseline;
mod workload;

use baseline::{Baseline, touch};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};
use oncekey::{Durability, Fingerprint, Outcome, Request, Store, SystemClock};
use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use workload::{ANSWER, builder, fresh, key, mix, reserve};

/// Reservations that are made in a row before they are ended, outside of the measured time.
const BATCH: u64 = 1024;
/// Completed keys that the replay of one operation picks from.
const REPLAYED: u64 = 100_000;

const MILLION: u64 = 1_000_000;

/// What is measured; the directory goes with its store.
enum Subject {
    Oncekey(Store, Option<TempDir>),
    Dashmap(Baseline<SystemClock>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Dashmap,
    Memory,
    Buffered,
    Synced,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Dashmap => "dashmap",
            Kind::Memory => "memory",
            Kind::Buffered => "Buffered",
            Kind::Synced => "Synced",
        }
    }

    fn open(self) -> Subject {
        let on_disk = |durability| {
            let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("the target directory is writable");
            let store = builder(durability).open(dir.path().join("store")).expect("a store opens");
            Subject::Oncekey(store, Some(dir))
        };
        match self {
            Kind::Dashmap => Subject::Dashmap(Baseline::new(SystemClock::new())),
            Kind::Memory => {
                Subject::Oncekey(builder(Durability::Buffered).in_memory().expect("memory can be mapped"), None)
            }
            Kind::Buffered => on_disk(Durability::Buffered),
            Kind::Synced => on_disk(Durability::Synced),
        }
    }
}

impl Subject {
    #[inline]
    fn fresh(&self, key: &[u8; 16]) {
        match self {
            Subject::Oncekey(store, _) => fresh(store, key),
            Subject::Dashmap(baseline) => {
                assert!(baseline.reserve(key));
                baseline.complete(key);
            }
        }
    }

    #[inline]
    fn replay(&self, key: &[u8; 16]) -> u64 {
        match self {
            Subject::Oncekey(store, _) => {
                match store.reserve(&Request::new(key).fingerprint(Fingerprint::from_bytes(*key))) {
                    Ok(Outcome::Replay(record)) => touch(record.bytes()),
                    other => panic!("a completed key is {other:?}"),
                }
            }
            Subject::Dashmap(baseline) => baseline.replay(key),
        }
    }

    /// Whether this caller won the key; the winner completes it.
    fn contend(&self, key: &[u8; 16]) -> bool {
        match self {
            Subject::Oncekey(store, _) => {
                match store.reserve(&Request::new(key).fingerprint(Fingerprint::from_bytes(*key))) {
                    Ok(Outcome::Reserved(reservation)) => reservation.complete(ANSWER).is_ok(),
                    Ok(Outcome::Replay(_) | Outcome::InFlight(_)) => false,
                    other => panic!("a key that others want too is {other:?}"),
                }
            }
            Subject::Dashmap(baseline) => {
                let won = baseline.reserve(key);
                if won {
                    baseline.complete(key);
                }
                won
            }
        }
    }

    /// Time of `count` reservations of new keys, and of their completions.
    fn halves(&self, next: &mut u64, count: u64) -> (Duration, Duration) {
        let (mut reserving, mut completing) = (Duration::ZERO, Duration::ZERO);
        let mut reservations = Vec::with_capacity(BATCH as usize);
        let mut left = count;
        while left > 0 {
            let keys = *next..*next + left.min(BATCH);
            (left, *next) = (left - (keys.end - keys.start), keys.end);
            let start = Instant::now();
            for i in keys.clone() {
                match self {
                    Subject::Oncekey(store, _) => reservations.push(reserve(store, &key(i))),
                    Subject::Dashmap(baseline) => assert!(baseline.reserve(&key(i))),
                }
            }
            let middle = Instant::now();
            for reservation in reservations.drain(..) {
                black_box(reservation.complete(ANSWER).expect("the store is good"));
            }
            if let Subject::Dashmap(baseline) = self {
                keys.for_each(|i| baseline.complete(&key(i)));
            }
            reserving += middle - start;
            completing += middle.elapsed();
        }
        (reserving, completing)
    }
}

/// Spares are made, and what was written is on its way to the device, before something else is measured.
fn settle(subject: &Subject) {
    if let Subject::Oncekey(store, Some(_)) = subject {
        store.sync().expect("the store is good");
    }
}

const ALL: [Kind; 4] = [Kind::Dashmap, Kind::Memory, Kind::Buffered, Kind::Synced];

fn halves(criterion: &mut Criterion) {
    let mut subjects = ALL.map(|kind| (kind, kind.open(), 0));
    for (name, completes) in [("reserve", false), ("complete", true)] {
        let mut group = criterion.benchmark_group(name);
        for (kind, subject, next) in &mut subjects {
            group.bench_function(kind.name(), |bencher| {
                bencher.iter_custom(|count| {
                    let (reserving, completing) = subject.halves(next, count);
                    if completes { completing } else { reserving }
                });
            });
        }
    }
}

fn replay(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("replay");
    // A replay writes nothing, so `Synced` is the same as `Buffered`.
    for kind in [Kind::Dashmap, Kind::Memory, Kind::Buffered] {
        let subject = kind.open();
        (0..REPLAYED).for_each(|i| subject.fresh(&key(i)));
        settle(&subject);
        let mut turn = 0;
        group.bench_function(kind.name(), |bencher| {
            bencher.iter(|| {
                turn += 1;
                subject.replay(&key(mix(turn) % REPLAYED))
            });
        });
    }
}

/// All threads walk the same new keys; of each exactly one caller becomes the owner.
fn herd(criterion: &mut Criterion) {
    let threads = std::thread::available_parallelism().map_or(2, usize::from).max(2);
    let mut group = criterion.benchmark_group("herd");
    group.throughput(Throughput::Elements(threads as u64));
    for kind in ALL {
        let (subject, mut next) = (kind.open(), 0);
        group.bench_function(BenchmarkId::new(kind.name(), format!("{threads} threads")), |bencher| {
            bencher.iter_custom(|count| {
                let keys = next..next + count;
                next = keys.end;
                let (winners, barrier) = (AtomicU64::new(0), Barrier::new(threads + 1));
                let took = std::thread::scope(|scope| {
                    for _ in 0..threads {
                        scope.spawn(|| {
                            barrier.wait();
                            let won = keys.clone().filter(|i| subject.contend(&key(*i))).count();
                            winners.fetch_add(won as u64, Ordering::Relaxed);
                            barrier.wait();
                        });
                    }
                    barrier.wait();
                    let start = Instant::now();
                    barrier.wait();
                    start.elapsed()
                });
                assert_eq!(winners.into_inner(), count, "one owner a key");
                took
            });
        });
    }
}

criterion_group! {
    name = operations;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(700));
    targets = halves, replay, herd
}

/// Nanoseconds of one FRESH pair and one REPLAY.
fn million_keys(kind: Kind, keys: u64) -> [f64; 2] {
    let subject = kind.open();
    let start = Instant::now();
    for i in 0..keys {
        subject.fresh(&key(i));
    }
    let fresh = start.elapsed();
    settle(&subject);
    let start = Instant::now();
    let mut sum = 0;
    for turn in 0..keys {
        sum += subject.replay(&key(mix(turn) % keys));
    }
    let replay = start.elapsed();
    black_box(sum);
    [fresh, replay].map(|took| took.as_nanos() as f64 / keys as f64)
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn print_ratios(keys: u64, rounds: usize) {
    let kinds = [Kind::Dashmap, Kind::Memory, Kind::Buffered];
    let rounds: Vec<_> = (0..rounds).map(|_| kinds.map(|kind| million_keys(kind, keys))).collect();
    println!("\n{keys} keys, 1 thread, rounds: {}, each with a fresh store of each kind\n", rounds.len());
    println!("{:22} {:>12} {:>12} {:>12}", "median, ns", "dashmap", "memory", "Buffered");
    for (what, name) in ["FRESH pair", "REPLAY"].iter().enumerate() {
        let median = |kind: usize| sorted(rounds.iter().map(|round| round[kind][what]))[rounds.len() / 2];
        println!("{name:22} {:12.0} {:12.0} {:12.0}", median(0), median(1), median(2));
    }
    println!("\n{:22} {:>8} {:>16}   target", "speed against dashmap", "median", "lowest..highest");
    let targets = [(0, 1, None), (0, 2, Some(0.5)), (1, 1, None), (1, 2, Some(0.8))];
    for (what, kind, target) in targets {
        let ratios = sorted(rounds.iter().map(|round| round[0][what] / round[kind][what]));
        let median = ratios[ratios.len() / 2];
        let verdict = match target {
            None => String::new(),
            // Too few to judge by.
            Some(target) if keys < MILLION => format!(">= {target:.1}x"),
            Some(target) if median >= target => format!(">= {target:.1}x  met"),
            Some(target) => format!(">= {target:.1}x  MISSED"),
        };
        let name = format!("{} {}", ["FRESH", "REPLAY"][what], kinds[kind].name());
        println!("{name:22} {median:7.2}x {:7.2}x..{:.2}x   {verdict}", ratios[0], ratios[ratios.len() - 1]);
    }
}

fn main() {
    operations();
    Criterion::default().configure_from_args().final_summary();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        return;
    }
    // As criterion has it: without `--bench`, and with `--test`, everything runs once and nothing is measured.
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    if has("--bench") && !has("--test") { print_ratios(MILLION, 5) } else { print_ratios(1_000, 1) }
}
