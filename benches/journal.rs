//! Appends to the journal, and what a sync costs.
//!
//! A recovery point is one record: 88 bytes with a 16-byte key, 216 with a payload of 128 bytes. Each replaces the one
//! before, so the journal stays small however long this runs.

#![allow(missing_docs, reason = "benches are not documented")]

mod workload;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};
use oncekey::{Durability, Media, Store};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use workload::{ANSWER, builder, fresh, key, reserve};

fn open(durability: Durability, media: Media) -> (Store, TempDir) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("the target directory is writable");
    let store = builder(durability).media(media).open(dir.path().join("store")).expect("a store opens");
    (store, dir)
}

fn append(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("append");
    for (name, media) in [("mmap", Media::Mmap), ("pwrite", Media::Pwrite)] {
        for (bytes, point) in [(88, &ANSWER[..0]), (216, &ANSWER[..])] {
            let (store, _dir) = open(Durability::Buffered, media);
            let mut reservation = reserve(&store, &key(0));
            group.throughput(Throughput::Bytes(bytes));
            group.bench_function(BenchmarkId::new(name, format!("{bytes} B")), |bencher| {
                bencher.iter(|| reservation.recovery_point(point).expect("the store is good"));
            });
            reservation.release().expect("the store is good");
        }
    }
}

/// Time of one synced append when so many threads make them: a shared sync makes it fall.
fn synced(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("synced append");
    for threads in [1, 8, 64] {
        let (store, _dir) = open(Durability::Synced, Media::Auto);
        let mut next = 0;
        group.throughput(Throughput::Elements(1));
        group.bench_function(BenchmarkId::from_parameter(format!("{threads} threads")), |bencher| {
            bencher.iter_custom(|count| {
                let each = count.div_ceil(threads);
                let barrier = Barrier::new(threads as usize + 1);
                let reservations: Vec<_> = (next..next + threads).map(|i| reserve(&store, &key(i))).collect();
                next += threads;
                let took = std::thread::scope(|scope| {
                    for mut reservation in reservations {
                        let barrier = &barrier;
                        scope.spawn(move || {
                            barrier.wait();
                            for _ in 0..each {
                                reservation.recovery_point(ANSWER).expect("the store is good");
                            }
                            barrier.wait();
                            reservation.release().expect("the store is good");
                        });
                    }
                    barrier.wait();
                    let start = Instant::now();
                    barrier.wait();
                    start.elapsed()
                });
                took.mul_f64(count as f64 / (each * threads) as f64)
            });
        });
    }
}

criterion_group! {
    name = operations;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    targets = append, synced
}

/// Bytes of the pages that this process made dirty so far. Each is written once by the next sync.
fn dirtied() -> Option<u64> {
    let counts = std::fs::read_to_string("/proc/self/io").ok()?;
    counts.lines().find_map(|line| line.strip_prefix("write_bytes: "))?.parse().ok()
}

/// Bytes that the device of a directory was sent so far, by whomever.
fn device_writes(dir: &Path) -> Option<u64> {
    let device = std::fs::metadata(dir).ok()?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let counts = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
    Some(counts.split_whitespace().nth(6)?.parse::<u64>().ok()? * 512)
}

fn print_bytes_a_sync(pairs: u64) {
    let (store, dir) = open(Durability::Synced, Media::Auto);
    // The first pairs make segments; spares follow in the background.
    let mut next = 0;
    let mut run = |pairs: u64| {
        (next..next + pairs).for_each(|i| fresh(&store, &key(i)));
        next += pairs;
    };
    run(10);
    let mut before = dirtied();
    loop {
        std::thread::sleep(Duration::from_millis(100));
        let now = dirtied();
        if now == before {
            break;
        }
        before = now;
    }
    let (syncs, device) = (store.stats().syncs, device_writes(dir.path()));
    let start = Instant::now();
    run(pairs);
    let took = start.elapsed();
    let syncs = (store.stats().syncs - syncs) as f64;
    println!("\n{pairs} Synced pairs by one thread: {syncs} syncs, {:.0} us each", took.as_micros() as f64 / syncs);
    // A record and the mark behind it, well below a page.
    let appended = 4096.0;
    for (name, before, after) in [
        ("pages dirtied by this process", before, dirtied()),
        ("device counter, others' writes included", device, device_writes(dir.path())),
    ] {
        match (before, after) {
            (Some(before), Some(after)) => {
                let bytes = (after - before) as f64 / syncs;
                println!(
                    "bytes to the device a sync: {bytes:.0} (appended, rounded to 4 KiB: {appended:.0}), ratio {:.2} ({name})",
                    bytes / appended
                );
            }
            _ => println!("bytes to the device a sync: unknown here ({name})"),
        }
    }
}

fn main() {
    operations();
    Criterion::default().configure_from_args().final_summary();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        return;
    }
    let measures = arguments.iter().any(|argument| argument == "--bench");
    let quick = !measures || arguments.iter().any(|argument| argument == "--test");
    print_bytes_a_sync(if quick { 10 } else { 2000 });
}
