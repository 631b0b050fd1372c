//! What the benches ask for: random keys, an answer, and how they ask oncekey.

mod keys;

pub use keys::{key, mix};
use oncekey::{Builder, Durability, Fingerprint, Outcome, Request, Reservation, Store};
use std::time::Duration;

pub const LEASE: Duration = Duration::from_secs(30);

/// Random bytes, so that nothing gains from compressing them.
pub const ANSWER: [u8; 128] = {
    let mut answer = [0; 128];
    let mut at = 0;
    while at < answer.len() {
        let word = mix(at as u64 + 1).to_le_bytes();
        let mut byte = 0;
        while byte < word.len() {
            answer[at + byte] = word[byte];
            byte += 1;
        }
        at += word.len();
    }
    answer
};

pub fn builder(durability: Durability) -> Builder {
    Store::builder().durability(durability).lease(LEASE)
}

/// Reserves a key that nobody asked for before.
#[inline]
pub fn reserve(store: &Store, key: &[u8; 16]) -> Reservation {
    let request = Request::new(key).fingerprint(Fingerprint::from_bytes(*key));
    match store.reserve(&request).expect("the store is good") {
        Outcome::Reserved(reservation) => reservation,
        other => panic!("a new key is {other:?}"),
    }
}

/// One FRESH pair.
#[inline]
pub fn fresh(store: &Store, key: &[u8; 16]) {
    reserve(store, key).complete(ANSWER).expect("the store is good");
}
