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
