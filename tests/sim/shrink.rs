//! Makes a failing history short: operations are left out as long as it still fails (delta debugging, Zeller 1999).

use crate::world::{Op, Tally, World};
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

/// How many histories have ended.
pub static ENDED: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Keeps what a history panics with, which is told once, when it is shrunk.
pub fn note_panic(info: &PanicHookInfo<'_>) {
    let place = info.location().map(|place| format!("{}:{}", place.file(), place.line())).unwrap_or_default();
    let text = info.payload().downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| info.payload().downcast_ref::<&str>().copied()).unwrap_or_default();
    PANIC.set(format!("{place}: {text}"));
}

/// Runs a history; an error is where and with what it panicked.
pub fn outcome(collide: bool, ops: &[Op]) -> Result<Tally, String> {
    let answer = catch_unwind(AssertUnwindSafe(|| World::run(collide, ops))).map_err(|_| PANIC.take());
    ENDED.fetch_add(1, Ordering::Relaxed);
    answer
}

/// The operations that are needed to fail, and what the failure says.
pub fn shrink(collide: bool, mut ops: Vec<Op>) -> (Vec<Op>, String) {
    let mut message = String::new();
    let mut chunk = ops.len() / 2;
    while chunk > 0 {
        let mut at = 0;
        while at < ops.len() {
            let mut fewer = ops.clone();
            fewer.drain(at..(at + chunk).min(ops.len()));
            match outcome(collide, &fewer) {
                Err(text) => (ops, message) = (fewer, text),
                Ok(_) => at += chunk,
            }
        }
        chunk /= 2;
    }
    if message.is_empty() {
        message = outcome(collide, &ops).err().unwrap_or_else(|| "it does not fail a second time".to_owned());
    }
    (ops, message)
}
