//! How long a store takes to be opened again: after `close`, left alone for some seconds before its process ended, or in the middle of
//! work; by its index, and with all of the journal read.
//!
//! `cargo bench --bench reopen [keys]`

#![allow(missing_docs, reason = "benches are not documented")]

mod workload;

use oncekey::{Durability, Request, Store};
use std::path::Path;
use std::time::{Duration, Instant};
use workload::{builder, fresh, key};

/// Longer than upkeep waits for a second without much to do.
const CALM: Duration = Duration::from_secs(4);

#[derive(Clone, Copy)]
enum End {
    Closed,
    LeftAlone,
    AtWork,
}

fn main() {
    let keys = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(1_000_000);
    println!("| {keys} keys | closed | left alone | at work |\n|---|---|---|---|");
    let table = [true, false].map(|index| {
        [End::Closed, End::LeftAlone, End::AtWork].map(|end| {
            let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
            fill(&builder(Durability::Buffered).open(dir.path()).expect("a new store"), keys, end);
            reopen(dir.path(), index, keys)
        })
    });
    for (name, [closed, left_alone, at_work]) in ["by index", "all read"].into_iter().zip(table) {
        println!("| {name} | {closed} | {left_alone} | {at_work} |");
    }
}

fn fill(store: &Store, keys: u64, end: End) {
    (0..keys).for_each(|number| fresh(store, &key(number)));
    match end {
        End::Closed => store.clone().close().expect("a disk that works"),
        End::LeftAlone => std::thread::sleep(CALM),
        End::AtWork => {}
    }
}

/// Until the first answer, and how many records had to be read.
fn reopen(dir: &Path, index: bool, keys: u64) -> String {
    let start = Instant::now();
    let store = builder(Durability::Buffered).index(index).open(dir).expect("the store is whole");
    let key = key(keys / 2);
    assert!(store.get(&Request::new(&key)).expect("the store is whole").is_some(), "it was answered");
    format!("{:.0} ms, {} records read", start.elapsed().as_secs_f64() * 1000.0, store.recovery().records)
}
