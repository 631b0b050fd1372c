//! Latency of FRESH (reserve a new key, complete it): while all grows from empty, and while a million keys expire.
//!
//! Every pair is timed, with one clock read each, so that stalls of growing tables, of a segment's end and of upkeep
//! show up in the tail.

#![allow(missing_docs, reason = "benches are not documented")]

#[path = "workload/baseline.rs"]
mod baseline;
mod workload;

use baseline::{Baseline, RETENTION};
use hdrhistogram::Histogram;
use oncekey::{Builder, Clock, Durability, ManualClock, Store};
use std::sync::Arc;
use std::time::{Duration, Instant};
use workload::{builder, fresh, key};

fn time_each(keys: std::ops::Range<u64>, histogram: &mut Histogram<u64>, mut pair: impl FnMut(&[u8; 16])) {
    let mut before = Instant::now();
    for i in keys {
        pair(&key(i));
        let after = Instant::now();
        histogram.record((after - before).as_nanos() as u64).expect("the histogram resizes itself");
        before = after;
    }
}

fn histogram() -> Histogram<u64> {
    Histogram::new(3).expect("three digits are in range")
}

fn print(name: &str, histogram: &Histogram<u64>, remark: &str) {
    let us = |ns: u64| ns as f64 / 1000.0;
    let quantiles = [0.5, 0.99, 0.999].map(|quantile| us(histogram.value_at_quantile(quantile)));
    let [p50, p99, p999] = quantiles;
    println!("{name:34} {p50:9.2} {p99:9.2} {p999:9.2} {:10.1}   {remark}", us(histogram.max()));
}

fn measure_oncekey(name: &str, keys: u64, open: impl FnOnce(Builder) -> Store) {
    let clock = Arc::new(ManualClock::new(oncekey::SystemClock::new().now_ms()));
    let store = open(builder(Durability::Buffered).clock(Arc::clone(&clock)));
    let mut growing = histogram();
    time_each(0..keys, &mut growing, |key| fresh(&store, key));
    print(&format!("{name}, growing"), &growing, "");

    store.sync().expect("the store is good");
    clock.advance(RETENTION + Duration::from_secs(1));
    let (mut reclaiming, start) = (histogram(), Instant::now());
    let mut next = keys;
    // The new keys don't expire: the clock stands still again.
    while store.stats().expired < keys && next < 20 * keys {
        let step = (keys / 20).max(1);
        time_each(next..next + step, &mut reclaiming, |key| fresh(&store, key));
        next += step;
    }
    let took = start.elapsed();
    let (pairs, expired) = (next - keys, store.stats().expired);
    let remark = format!("{expired} reclaimed beside {pairs} pairs in {:.2} s", took.as_secs_f64());
    print(&format!("{name}, reclaiming"), &reclaiming, &remark);
}

fn measure_dashmap(keys: u64) {
    let clock = Arc::new(ManualClock::new(oncekey::SystemClock::new().now_ms()));
    let baseline = Baseline::new(Arc::clone(&clock));
    let pair = |key: &[u8; 16]| {
        assert!(baseline.reserve(key));
        baseline.complete(key);
    };
    let mut growing = histogram();
    time_each(0..keys, &mut growing, pair);
    print("dashmap, growing", &growing, "");
    baseline.replay(&key(0));

    clock.advance(RETENTION + Duration::from_secs(1));
    let (mut reclaiming, start) = (histogram(), Instant::now());
    let mut next = keys;
    std::thread::scope(|scope| {
        let now_ms = clock.now_ms();
        let map = &baseline.keys;
        let sweeper = scope.spawn(move || map.retain(|_, operation| operation.until_ms > now_ms));
        while !sweeper.is_finished() {
            let step = (keys / 20).max(1);
            time_each(next..next + step, &mut reclaiming, pair);
            next += step;
        }
    });
    let remark = format!("`retain` beside {} pairs in {:.2} s", next - keys, start.elapsed().as_secs_f64());
    print("dashmap, reclaiming", &reclaiming, &remark);
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        return;
    }
    let measures = arguments.iter().any(|argument| argument == "--bench");
    let keys = if measures && !arguments.iter().any(|argument| argument == "--test") { 1_000_000 } else { 1_000 };
    println!("FRESH, {keys} keys, 1 thread; us");
    println!("{:34} {:>9} {:>9} {:>9} {:>10}", "", "p50", "p99", "p99.9", "max");
    measure_dashmap(keys);
    measure_oncekey("oncekey in memory", keys, |builder| builder.in_memory().expect("memory can be mapped"));
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("the target directory is writable");
    measure_oncekey("oncekey Buffered", keys, |builder| builder.open(dir.path()).expect("a store opens"));
}
