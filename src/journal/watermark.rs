//! The contiguous published watermark of a segment.
//!
//! Appenders claim space with one atomic add and copy their bytes side by side, so they finish in any order. A record
//! counts as written only once everything before it is: a process killed between claim and copy then leaves a hole only
//! behind the last record that anybody was told of. Each appender waits for its predecessor's copy, a few dozen
//! nanoseconds, before it moves the watermark.
//!
//! The load that sees the predecessor's store acquires what it released, and our store releases both, so that a
//! reader who acquires the watermark sees every byte below it, whoever wrote it.

use crate::sync::Backoff;
use crate::sync::atomic::{AtomicU64, Ordering};

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
        if planted!(HoleAcknowledged) {
            self.0.fetch_max(to, Ordering::Release);
            return;
        }
        if self.0.load(Ordering::Acquire) != from {
            self.wait_for(from);
        }
        self.0.store(to, Ordering::Release);
    }

    /// Waits until everything below `at` is written.
    #[cold]
    pub(crate) fn wait_for(&self, at: u64) {
        let backoff = Backoff::new();
        while self.0.load(Ordering::Acquire) < at {
            backoff.snooze();
        }
    }
}

#[cfg(all(test, oncekey_loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// One word a record, which stands for its bytes: without an order of its own.
    type Records = Arc<[AtomicU64; 2]>;

    fn append(watermark: &Watermark, records: &Records, at: u64) {
        records[at as usize].store(at + 1, Ordering::Relaxed);
        watermark.publish(at, at + 1);
    }

    fn see(records: &Records, upto: u64) {
        for at in 0..upto {
            assert_eq!(records[at as usize].load(Ordering::Relaxed), at + 1, "below a watermark of {upto}");
        }
    }

    /// Runs this in a thread of its own: the model's main thread is not interleaved with them.
    fn spawn(
        watermark: &Arc<Watermark>,
        records: &Records,
        run: impl FnOnce(&Watermark, &Records) + 'static,
    ) -> thread::JoinHandle<()> {
        let (watermark, records) = (Arc::clone(watermark), Arc::clone(records));
        thread::spawn(move || run(&watermark, &records))
    }

    /// Up to three preemptions, which is where the known bugs of this kind show; all of them take minutes.
    fn model(run: impl Fn() + Sync + Send + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.max_branches = 100_000;
        model.check(run);
    }

    #[test]
    fn a_reader_sees_all_bytes_below_the_watermark_whoever_wrote_them() {
        model(|| {
            let (watermark, records) = (Arc::new(Watermark::new(0)), Arc::new([0; 2].map(AtomicU64::new)));
            let threads = [
                spawn(&watermark, &records, |watermark, records| append(watermark, records, 1)),
                spawn(&watermark, &records, |watermark, records| append(watermark, records, 0)),
                spawn(&watermark, &records, |watermark, records| see(records, watermark.get())),
            ];
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            assert_eq!(watermark.get(), 2);
        });
    }

    #[test]
    fn an_appender_sees_the_bytes_of_those_whom_it_waited_for() {
        model(|| {
            let (watermark, records) = (Arc::new(Watermark::new(0)), Arc::new([0; 2].map(AtomicU64::new)));
            let threads = [
                spawn(&watermark, &records, |watermark, records| {
                    append(watermark, records, 1);
                    see(records, 2);
                }),
                spawn(&watermark, &records, |watermark, records| append(watermark, records, 0)),
            ];
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            assert_eq!(watermark.get(), 2);
        });
    }
}
