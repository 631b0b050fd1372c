//! A histogram of times that many threads add to without a lock.
//!
//! Four buckets an octave, from 16 us to 67 s: a percentile read from it is at most a fifth too high.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const OCTAVES: usize = 22;
const PER_OCTAVE: usize = 4;
/// One more for what is longer than the last bound.
const BUCKETS: usize = OCTAVES * PER_OCTAVE + 1;
const FIRST_BOUND_NS: u64 = 1 << 14;

/// The histogram; its counts only grow.
pub struct Latency {
    buckets: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
}

/// Counts at one time.
#[derive(Clone)]
pub struct Counts {
    buckets: [u64; BUCKETS],
    sum_ns: u64,
}

impl Default for Latency {
    fn default() -> Self {
        Latency { buckets: [const { AtomicU64::new(0) }; BUCKETS], sum_ns: AtomicU64::new(0) }
    }
}

impl Default for Counts {
    fn default() -> Self {
        Counts { buckets: [0; BUCKETS], sum_ns: 0 }
    }
}

/// The bucket of a time: each octave from its power of two, in four equal steps.
fn bucket(ns: u64) -> usize {
    if ns <= FIRST_BOUND_NS {
        return 0;
    }
    let below = ns - 1;
    let octave = (below.ilog2() - FIRST_BOUND_NS.ilog2()) as usize;
    let step = (below >> (below.ilog2() - 2)) as usize & (PER_OCTAVE - 1);
    (1 + octave * PER_OCTAVE + step).min(BUCKETS - 1)
}

/// The longest time in a bucket.
fn bound_ns(bucket: usize) -> u64 {
    let Some(past_first) = bucket.checked_sub(1) else { return FIRST_BOUND_NS };
    let octave = FIRST_BOUND_NS << (past_first / PER_OCTAVE);
    octave + octave / PER_OCTAVE as u64 * (past_first % PER_OCTAVE + 1) as u64
}

impl Latency {
    pub fn add(&self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        // Counters tell of nothing but themselves, so no order is needed.
        self.buckets[bucket(ns)].fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }

    pub fn counts(&self) -> Counts {
        Counts {
            buckets: std::array::from_fn(|bucket| self.buckets[bucket].load(Ordering::Relaxed)),
            sum_ns: self.sum_ns.load(Ordering::Relaxed),
        }
    }
}

impl Counts {
    pub fn total(&self) -> u64 {
        self.buckets.iter().sum()
    }

    pub fn sum_s(&self) -> f64 {
        self.sum_ns as f64 / 1e9
    }

    /// What was added since an earlier time.
    pub fn since(&self, earlier: &Counts) -> Counts {
        Counts {
            buckets: std::array::from_fn(|bucket| self.buckets[bucket] - earlier.buckets[bucket]),
            sum_ns: self.sum_ns.wrapping_sub(earlier.sum_ns),
        }
    }

    pub fn and(mut self, other: &Counts) -> Counts {
        self.buckets.iter_mut().zip(other.buckets).for_each(|(count, other)| *count += other);
        self.sum_ns = self.sum_ns.wrapping_add(other.sum_ns);
        self
    }

    /// The time that this share of all didn't exceed, in milliseconds; `None` without any.
    pub fn quantile_ms(&self, share: f64) -> Option<f64> {
        let rank = (self.total() as f64 * share).ceil().max(1.0) as u64;
        let mut seen = 0;
        let bucket = self.buckets.iter().position(|count| {
            seen += count;
            seen >= rank
        })?;
        Some(bound_ns(bucket.min(BUCKETS - 2)) as f64 / 1e6)
    }

    /// For exposition: an upper bound in seconds and a count for each octave; the last has no bound.
    pub fn octaves(&self) -> Vec<(f64, u64)> {
        let bounded = (0..BUCKETS - 1).step_by(PER_OCTAVE).map(|bucket| {
            let first = bucket.saturating_sub(PER_OCTAVE - 1);
            (bound_ns(bucket) as f64 / 1e9, self.buckets[first..=bucket].iter().sum())
        });
        let rest = self.buckets[BUCKETS - PER_OCTAVE..].iter().sum();
        bounded.chain([(f64::MAX, rest)]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_is_in_the_bucket_whose_bound_is_the_first_not_below_it() {
        for bucket_number in 0..BUCKETS - 1 {
            let bound = bound_ns(bucket_number);
            assert_eq!(bucket(bound), bucket_number, "{bound}");
            assert_eq!(bucket(bound + 1), bucket_number + 1, "{bound}");
        }
        assert_eq!(bucket(0), 0);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn every_time_is_in_one_octave() {
        let latency = Latency::default();
        for bucket in 0..BUCKETS - 1 {
            latency.add(Duration::from_nanos(bound_ns(bucket)));
        }
        latency.add(Duration::from_secs(1000));
        let counts = latency.counts();
        let octaves = counts.octaves();
        assert_eq!(octaves.iter().map(|(_, count)| count).sum::<u64>(), BUCKETS as u64);
        assert!(octaves.is_sorted_by(|(one, _), (next, _)| one < next));
        assert_eq!(octaves.last().unwrap(), &(f64::MAX, PER_OCTAVE as u64));
    }

    #[test]
    fn percentiles_are_a_fifth_too_high_at_most() {
        let latency = Latency::default();
        assert_eq!(latency.counts().quantile_ms(0.5), None);
        for us in 1..=1000 {
            latency.add(Duration::from_micros(us * 10));
        }
        for (share, exact_ms) in [(0.5, 5.0), (0.99, 9.9)] {
            let told = latency.counts().quantile_ms(share).unwrap();
            assert!((exact_ms..=exact_ms * 1.2).contains(&told), "{share}: {told}");
        }
    }
}
