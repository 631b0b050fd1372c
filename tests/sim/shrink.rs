//! Makes a failing history short: operations are left out as long as it still fails (delta debugging, Zeller 1999).

use crate::world::{Op, Tally, World};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs a history; an error is what it panicked with.
pub fn outcome(collide: bool, ops: &[Op]) -> Result<Tally, String> {
    catch_unwind(AssertUnwindSafe(|| World::run(collide, ops))).map_err(|payload| {
        let text = payload.downcast_ref::<String>().cloned();
        text.or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
    })
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
