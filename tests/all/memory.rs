//! What the hot path allocates, and what a key costs.

use crate::support::request;
use oncekey::{Builder, Durability, Fingerprint, Outcome, Request, Store};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::process::Command;

/// Counts the allocations of each thread.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn count() {
    // A thread that is just ending has no counter any more.
    ALLOCATIONS.try_with(|allocations| allocations.set(allocations.get() + 1)).ok();
}

// SAFETY: every call is handed on to the system's allocator as it is.
#[allow(unsafe_code, reason = "an allocator can't be written otherwise")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(memory, layout, new_size) }
    }
}

fn allocations(run: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.get();
    run();
    ALLOCATIONS.get() - before
}

fn asked(key: &[u8; 16]) -> Request<'_> {
    Request::new(key).fingerprint(Fingerprint::from_bytes([9; 16]))
}

fn key(number: u64) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    key
}

fn fresh(store: &Store, number: u64) {
    let Ok(Outcome::Reserved(owner)) = store.reserve(&asked(&key(number))) else { panic!("{number} is not fresh") };
    owner.complete([number as u8; 128]).unwrap();
}

/// Operations between two growth steps of the tables allocate nothing: over many short stretches most are clean.
fn check(builder: Builder, open: impl FnOnce(Builder) -> Store) {
    let store = open(builder.durability(Durability::Buffered));
    for number in 0..20_000 {
        fresh(&store, number);
    }
    let replays = allocations(|| {
        for number in 0..20_000 {
            let Ok(Outcome::Replay(record)) = store.reserve(&asked(&key(number))) else { panic!("{number} is gone") };
            assert_eq!(record.bytes()[127], number as u8);
        }
    });
    assert_eq!(replays, 0, "replays allocate");
    let stretches = 2_000_u64;
    let clean = (0..stretches)
        .filter(|stretch| allocations(|| (0..10).for_each(|at| fresh(&store, 20_000 + stretch * 10 + at))) == 0)
        .count() as u64;
    // 256 tables and wheels grow now and then, each for hundreds of keys; that is not the steady state.
    assert!(clean * 10 > stretches * 6, "only {clean} of {stretches} stretches of ten pairs allocated nothing");
    // Once the tables have their size, nothing is left to allocate: as many keys go as come.
    let again = || {
        for _ in 0..5_000 {
            let Ok(Outcome::Reserved(owner)) = store.reserve(&asked(&key(u64::MAX))) else { panic!("not released") };
            owner.release().unwrap();
        }
    };
    // The first time around its table may still have to grow for this key.
    again();
    assert_eq!(allocations(again), 0, "reserve and release allocate");
}

#[test]
fn the_hot_path_allocates_nothing_in_memory() {
    check(Store::builder().background(true), |builder| builder.in_memory().unwrap());
}

#[test]
fn the_hot_path_allocates_nothing_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    check(Store::builder(), |builder| builder.open(dir.path()).unwrap());
}

fn anonymous_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).expect("a kernel that counts anonymous memory");
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

const CHILD: &str = "ONCEKEY_MEMORY_CHILD";

/// Does nothing but in the process that the test below starts.
#[test]
fn child_with_a_million_keys() {
    let Some(dir) = std::env::var_os(CHILD) else { return };
    let store = Store::builder().durability(Durability::Buffered).open(dir).unwrap();
    let before = anonymous_bytes();
    for number in 0..1_000_000 {
        fresh(&store, number);
        if number % 100_000 == 99_999 {
            println!("RESULT {} {}", number + 1, (anonymous_bytes() - before) as f64 / (number + 1) as f64);
        }
    }
}

#[test]
fn a_million_keys_cost_at_most_64_bytes_of_anonymous_memory_each() {
    let dir = tempfile::tempdir().unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "memory::child_with_a_million_keys", "--nocapture"])
        .env(CHILD, dir.path())
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
    let output = String::from_utf8(child.stdout).unwrap();
    // The test runner may print before it on the same line.
    let results: Vec<(u64, f64)> = output
        .lines()
        .filter_map(|line| {
            let mut words = line.split("RESULT ").nth(1)?.split_whitespace();
            Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
        })
        .collect();
    let (keys, bytes) = *results.last().expect("the child reports");
    println!("{bytes:.1} bytes of anonymous memory a key at {keys} keys");
    assert_eq!(keys, 1_000_000);
    assert!(bytes <= 64.0, "{bytes:.1} bytes a key: {results:?}");
}

#[test]
fn a_store_gives_its_memory_back_when_its_keys_are_released() {
    let (_, builder) = crate::support::manual();
    let store = builder.segment_size(1 << 20).in_memory().unwrap();
    for round in 0..20 {
        for number in 0..500 {
            let name = format!("{round}/{number}");
            let Ok(Outcome::Reserved(owner)) = store.reserve(&request(&name, 1)) else { panic!() };
            owner.release().unwrap();
        }
        while store.maintain(10_000).unwrap().has_more {}
    }
    assert_eq!(store.stats().keys, 0);
    assert!(store.stats().segments <= 6, "{:?}", store.stats());
}

/// The same keys come and go a second time, so that every table, wheel and segment has its size already.
fn check_a_second_life(store: &Store, clock: &oncekey::ManualClock) {
    use oncekey::Retention;
    use std::time::Duration;

    const KEYS: u64 = 3_000;
    let brief = Retention::For(Duration::from_secs(60));
    let life = || {
        for number in 0..KEYS {
            let key = key(number);
            let request = asked(&key).retention(brief);
            let Ok(Outcome::Reserved(owner)) = store.reserve(&request) else { panic!("{number} is not fresh") };
            let Ok(Outcome::InFlight(pending)) = store.reserve(&request) else { panic!("{number} has two owners") };
            drop(pending);
            drop(owner.complete([number as u8; 128]).unwrap());
            let Ok(Outcome::Replay(record)) = store.reserve(&request) else { panic!("{number} is gone") };
            assert_eq!(record.bytes(), [number as u8; 128]);
            assert!(store.get(&request).unwrap().is_some());
        }
    };
    // Keys that stay, so that no table shrinks when the others go.
    for number in 1_000_000..1_030_000 {
        fresh(store, number);
    }
    for _ in 0..2 {
        life();
        clock.advance(Duration::from_secs(60));
        while store.stats().keys > 30_000 {
            store.maintain(10_000).unwrap();
        }
    }
    assert_eq!(allocations(life), 0, "reserve, complete and replay allocate in the steady state");
    assert_eq!(store.stats().keys, 30_000 + KEYS);
}

#[test]
fn a_second_life_of_the_same_keys_allocates_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for background in [false, true] {
        let (clock, _) = crate::support::manual();
        let builder = || Store::builder().clock(std::sync::Arc::clone(&clock)).background(background);
        let builder = || builder().durability(Durability::Buffered);
        check_a_second_life(&builder().in_memory().unwrap(), &clock);
        let path = dir.path().join(background.to_string());
        check_a_second_life(&builder().open(path).unwrap(), &clock);
    }
}
