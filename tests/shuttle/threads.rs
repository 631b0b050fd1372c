//! Threads of shuttle: who goes on is decided at each lock, condition and atomic, of the store and of the rig.

use oncekey::{Pending, Result, Wait};
use std::cell::Cell;
use std::time::Duration;

pub type Atomic = shuttle::sync::atomic::AtomicU64;
pub type Mutex<T> = shuttle::sync::Mutex<T>;
pub type MutexGuard<'m, T> = shuttle::sync::MutexGuard<'m, T>;

shuttle::thread_local! {
    static READING: Cell<u64> = Cell::new(0);
}

/// Notes what this thread's call read from the clock.
pub fn read(now_ms: u64) {
    READING.with(|reading| reading.set(now_ms));
}

pub fn last_reading() -> u64 {
    READING.with(Cell::get)
}

/// The scheduler does that.
pub fn dawdle() {}

pub fn give_way() {
    shuttle::thread::yield_now();
}

pub fn give_up(why: &str) -> ! {
    panic!("violated: {why}");
}

/// Waits for the end of an operation that surely ends; whoever is not woken is a deadlock, which shuttle tells.
pub fn wait(pending: Pending, blocks: bool) -> Result<Wait> {
    match blocks {
        true => pending.wait(Duration::from_secs(24 * 3600)),
        false => shuttle::future::block_on(pending.wait_async()),
    }
}
