//! The contiguous published watermark of a segment.
//!
//! Appenders claim space with one atomic add and copy their bytes side by side, so they finish in any order. A record
//! counts as written only once everything before it is: a process killed between claim and copy then leaves a hole only
//! behind the last record that anybody was told of. Each appender waits for its predecessor's copy, a few dozen
//! nanoseconds, before it moves the watermark.
//!
//! The load that sees the predecessor's store acquires what it released, and our store releases both, so that a
//! reader who acquires the watermark sees every byte below it, whoever wrote it.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering};

/// Offset up to which every byte is written.
#[derive(Debug)]
pub(crate) struct Watermark(AtomicU64);

impl Watermark {
    pub(crate) fn new(at: u64) -> Self {
        Watermark(AtomicU64::new(at))
    }

    #[inline]
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Moves the watermark over a range that the caller has written; waits for those before it.
    #[inline]
    pub(crate) fn publish(&self, from: u64, to: u64) {
        if self.0.load(Ordering::Acquire) != from {
            self.wait_for(from);
        }
        self.0.store(to, Ordering::Release);
    }

    /// Waits until everything below `at` is written.
    #[cold]
    pub(crate) fn wait_for(&self, at: u64) {
        #[cfg(not(loom))]
        let backoff = crossbeam_utils::Backoff::new();
        while self.0.load(Ordering::Acquire) < at {
            #[cfg(not(loom))]
            backoff.snooze();
            #[cfg(loom)]
            loom::thread::yield_now();
        }
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// Lets appenders, begun in this order, each write one slot, and a reader look at all below what it acquires.
    fn append(order: &'static [u64], preemptions: usize) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(preemptions);
        model.check(move || {
            let watermark = Arc::new(Watermark::new(0));
            // Stand for the slots' bytes: without an order of their own.
            let slots = Arc::new([0; 3].map(AtomicU64::new));
            let appenders = order.iter().map(|&at| {
                let (watermark, slots) = (Arc::clone(&watermark), Arc::clone(&slots));
                thread::spawn(move || {
                    slots[at as usize].store(at + 1, Ordering::Relaxed);
                    watermark.publish(at, at + 1);
                    // Whoever published sees what is below, too: it may be told of.
                    assert!(watermark.get() > at);
                })
            });
            let appenders = appenders.collect::<Vec<_>>();
            let see = |upto: u64| {
                for at in 0..upto {
                    assert_eq!(slots[at as usize].load(Ordering::Relaxed), at + 1, "below a watermark of {upto}");
                }
            };
            let first = watermark.get();
            see(first);
            let second = watermark.get();
            assert!(second >= first);
            see(second);
            watermark.wait_for(order.len() as u64);
            see(order.len() as u64);
            for appender in appenders {
                appender.join().unwrap();
            }
        });
    }

    #[test]
    fn a_reader_sees_all_bytes_below_the_watermark_of_two_appenders() {
        append(&[0, 1], 4);
        append(&[1, 0], 4);
    }

    #[test]
    fn a_reader_sees_all_bytes_below_the_watermark_of_three_appenders() {
        append(&[2, 1, 0], 2);
        append(&[1, 0, 2], 2);
    }
}
