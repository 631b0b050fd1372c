//! What several modules need.

use oncekey::{Builder, Durability, Fingerprint, ManualClock, Outcome, Record, Request, Reservation, Store};
use std::sync::Arc;

/// When the tests' clocks start: 2026-01-01.
pub const START_MS: u64 = 1_767_225_600_000;

/// A clock that the test moves, and settings that use it: small segments, no threads.
pub fn manual() -> (Arc<ManualClock>, Builder) {
    let clock = Arc::new(ManualClock::new(START_MS));
    let builder = Store::builder()
        .clock(Arc::clone(&clock))
        .background(false)
        .durability(Durability::Buffered)
        .segment_size(64 * 1024);
    (clock, builder)
}

/// A request whose payload is a number.
pub fn request(key: &str, payload: u8) -> Request<'_> {
    Request::new(key).fingerprint(Fingerprint::of(&[payload]))
}

#[track_caller]
pub fn reserved(outcome: Outcome) -> Reservation {
    match outcome {
        Outcome::Reserved(reservation) => reservation,
        other => panic!("expected a fresh reservation, got {other:?}"),
    }
}

#[track_caller]
pub fn interrupted(outcome: Outcome) -> Reservation {
    match outcome {
        Outcome::Interrupted(reservation) => reservation,
        other => panic!("expected an interrupted reservation, got {other:?}"),
    }
}

#[track_caller]
pub fn replay(outcome: Outcome) -> Record {
    match outcome {
        Outcome::Replay(record) => record,
        other => panic!("expected a replay, got {other:?}"),
    }
}
