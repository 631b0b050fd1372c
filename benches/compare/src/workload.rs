//! Keys, answers and the order in which they are asked for; the same for every peer.

#[path = "../../workload/keys.rs"]
mod keys;

pub use keys::mix;

use crate::cell::KeyForm;
use oncekey::{Clock, SystemClock};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long an owner has; the default of oncekey.
pub const LEASE_MS: u64 = 30_000;
/// How long answers are kept; the default of oncekey.
const RETENTION: Duration = Duration::from_secs(24 * 3600);

/// A key and the fingerprint of what is asked with it.
pub struct Asked {
    bytes: [u8; 36],
    len: usize,
    pub fingerprint: [u8; 16],
}

impl Asked {
    /// Key number `i`: 16 bytes that look random, or the 36 characters of a UUID.
    #[inline]
    pub fn new(i: u64, form: KeyForm) -> Self {
        let fingerprint = keys::key(i);
        let mut bytes = [0; 36];
        let len = match form {
            KeyForm::Binary => {
                bytes[..16].copy_from_slice(&fingerprint);
                16
            }
            KeyForm::Text => {
                bytes = uuid(&fingerprint);
                36
            }
        };
        Asked { bytes, len, fingerprint }
    }

    #[inline]
    pub fn key(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

fn uuid(raw: &[u8; 16]) -> [u8; 36] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = [b'-'; 36];
    let mut at = 0;
    for (i, byte) in raw.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            at += 1;
        }
        text[at] = DIGITS[usize::from(byte >> 4)];
        text[at + 1] = DIGITS[usize::from(byte & 15)];
        at += 2;
    }
    text
}

/// Answers of one length: windows of a pool of random bytes, so that nothing gains from compressing them.
///
/// The pool stays in the second-level cache next to answers of up to 1 KiB.
pub struct Answers {
    pool: Vec<u8>,
    len: usize,
}

const POOL: usize = 128 * 1024;

impl Answers {
    pub fn new(len: usize) -> Self {
        let mut pool = vec![0; POOL + len];
        fastrand::Rng::with_seed(7).fill(&mut pool);
        Answers { pool, len }
    }

    /// The answer to key number `i`.
    #[inline]
    pub fn answer(&self, i: u64) -> &[u8] {
        let at = (mix(i ^ 0x5bd1_e995) as usize % POOL) & !7;
        &self.pool[at..at + self.len]
    }
}

/// Reads one word of each cache line.
#[inline]
pub fn touch(answer: &[u8]) -> u64 {
    answer.chunks(64).fold(0, |sum: u64, line| match line.first_chunk() {
        Some(word) => sum.wrapping_add(u64::from_le_bytes(*word)),
        None => sum.wrapping_add(u64::from(line[0])),
    })
}

/// Ranks by Zipf's law with exponent 0.99, drawn before the time is taken: ranks of `0..keys`, the lowest most often.
///
/// Drawn as in Gray et al., "Quickly generating billion-record synthetic databases" (1994).
pub struct Zipf {
    ranks: Vec<u32>,
}

impl Zipf {
    pub fn new(keys: u64, draws: usize) -> Self {
        const EXPONENT: f64 = 0.99;
        let zeta = |n: u64| zeta(n, EXPONENT);
        let (n, zeta_n, zeta_2) = (keys as f64, zeta(keys), zeta(2));
        let alpha = 1.0 / (1.0 - EXPONENT);
        let eta = (1.0 - (2.0 / n).powf(1.0 - EXPONENT)) / (1.0 - zeta_2 / zeta_n);
        let mut random = fastrand::Rng::with_seed(11);
        let mut rank = || {
            let u = random.f64();
            let uz = u * zeta_n;
            if uz < 1.0 {
                0
            } else if uz < 1.0 + 0.5_f64.powf(EXPONENT) {
                1.min(keys - 1)
            } else {
                ((n * (eta * u - eta + 1.0).powf(alpha)) as u64).min(keys - 1)
            }
        };
        Zipf { ranks: (0..draws).map(|_| rank() as u32).collect() }
    }

    /// The draw for turn number `turn`; they come round again.
    #[inline]
    pub fn rank(&self, turn: u64) -> u64 {
        u64::from(self.ranks[turn as usize % self.ranks.len()])
    }
}

/// Sum of `1 / i^s` for `i` in `1..=n`; beyond a million terms by Euler's and Maclaurin's formula.
fn zeta(n: u64, s: f64) -> f64 {
    let exact = n.min(1_000_000);
    let sum: f64 = (1..=exact).map(|i| (i as f64).powf(-s)).sum();
    let (from, to) = (exact as f64, n as f64);
    sum + (to.powf(1.0 - s) - from.powf(1.0 - s)) / (1.0 - s) + (to.powf(-s) - from.powf(-s)) / 2.0
}

/// Time as the peers see it, which a measurement of expiry can move; reads the clock that oncekey reads by default.
pub struct Watch {
    clock: SystemClock,
    ahead_ms: AtomicU64,
    /// When answers fall due instead of after their retention; `u64::MAX` for peers whose clock can be moved.
    due_ms: AtomicU64,
}

impl Watch {
    pub fn new() -> Self {
        Watch { clock: SystemClock::new(), ahead_ms: AtomicU64::new(0), due_ms: AtomicU64::new(u64::MAX) }
    }

    /// Moves time on until all that was completed is due.
    pub fn pass_retention(&self) {
        // Relaxed: the sweeper that has to see it is started afterwards.
        self.ahead_ms.fetch_add(RETENTION.as_millis() as u64 + 1000, Ordering::Relaxed);
    }

    /// What is completed from now on falls due at one time of the wall clock, so long from now.
    pub fn all_due_in(&self, fill_ms: u64) {
        self.due_ms.store(self.now_ms() + fill_ms, Ordering::Relaxed);
    }

    /// Sleeps until that time; what is completed afterwards is kept again.
    pub fn wait_until_due(&self) {
        let left_ms = self.due_ms.swap(u64::MAX, Ordering::Relaxed).saturating_sub(self.now_ms());
        std::thread::sleep(Duration::from_millis(left_ms + 10));
    }

    /// When an answer that is stored now falls due.
    #[inline]
    pub fn kept_until_ms(&self) -> u64 {
        match self.due_ms.load(Ordering::Relaxed) {
            u64::MAX => self.now_ms() + RETENTION.as_millis() as u64,
            due_ms => due_ms,
        }
    }
}

impl Clock for Watch {
    #[inline]
    fn now_ms(&self) -> u64 {
        self.clock.now_ms() + self.ahead_ms.load(Ordering::Relaxed)
    }
}
