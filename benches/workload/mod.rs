//! What the benches ask for: random keys, an answer, and how they ask oncekey.

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

/// The finalizer of MurmurHash3: a bijection that leaves no pattern.
pub const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Key number `i`: 16 bytes that look random. It serves as the fingerprint too.
#[inline]
pub fn key(i: u64) -> [u8; 16] {
    let low = mix(i.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1));
    let high = mix(low ^ i);
    let mut key = [0; 16];
    key[..8].copy_from_slice(&low.to_le_bytes());
    key[8..].copy_from_slice(&high.to_le_bytes());
    key
}

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
