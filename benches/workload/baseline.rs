//! The same promise but for crashes, as one would write it over dashmap.

use super::workload::{ANSWER, LEASE};
use dashmap::{DashMap, Entry};
use oncekey::Clock;
use std::time::Duration;

/// What a store keeps answers for unless it is told otherwise.
pub const RETENTION: Duration = Duration::from_secs(24 * 3600);

/// Keys, each with where its operation stands.
pub struct Baseline<C> {
    pub keys: DashMap<Box<[u8]>, Operation, ahash::RandomState>,
    clock: C,
}

pub struct Operation {
    fingerprint: [u8; 16],
    /// End of the lease or of the retention, Unix ms.
    pub until_ms: u64,
    state: State,
}

enum State {
    Reserved,
    Completed(Box<[u8]>),
}

/// Reads all of an answer.
#[inline]
pub fn touch(answer: &[u8]) -> u64 {
    answer.iter().map(|byte| u64::from(*byte)).sum()
}

fn ms(time: Duration) -> u64 {
    time.as_millis() as u64
}

impl<C: Clock> Baseline<C> {
    pub fn new(clock: C) -> Self {
        Baseline { keys: DashMap::default(), clock }
    }

    /// Whether the key is the caller's now.
    #[inline]
    pub fn reserve(&self, key: &[u8; 16]) -> bool {
        let now_ms = self.clock.now_ms();
        let reserved =
            Operation { fingerprint: *key, until_ms: now_ms.saturating_add(ms(LEASE)), state: State::Reserved };
        match self.keys.entry(Box::from(&key[..])) {
            Entry::Vacant(vacant) => {
                vacant.insert(reserved);
                true
            }
            Entry::Occupied(mut found) => {
                let is_over = found.get().until_ms <= now_ms;
                if is_over {
                    found.insert(reserved);
                }
                is_over
            }
        }
    }

    #[inline]
    pub fn complete(&self, key: &[u8; 16]) {
        let now_ms = self.clock.now_ms();
        let mut operation = self.keys.get_mut(&key[..]).expect("the key is reserved");
        operation.until_ms = now_ms.saturating_add(ms(RETENTION));
        operation.state = State::Completed(Box::from(&ANSWER[..]));
    }

    /// Reads a completed key's answer; through `get`, which needs no copy of the key as `entry` would.
    #[inline]
    pub fn replay(&self, key: &[u8; 16]) -> u64 {
        let now_ms = self.clock.now_ms();
        let operation = self.keys.get(&key[..]).expect("the key is there");
        match &operation.state {
            State::Completed(answer) if operation.until_ms > now_ms && operation.fingerprint == *key => touch(answer),
            State::Completed(_) | State::Reserved => panic!("the key is completed"),
        }
    }
}
