//! Which records of a segment are written.
//!
//! Appenders claim space with one atomic add and copy their bytes side by side, so they finish in any order, and none waits
//! for another: each sets the bit of its record's start. A process that is killed between claim and copy leaves a hole, also
//! before records that others were told of; recovery finds what is behind it.
//!
//! What a sync covers is another matter: it may only vouch for what has no hole below it. So the *watermark*, up to which every byte
//! is written, moves over the records in order, by whoever needs to know it.
//!
//! Setting a bit is a release, and so is every later one in the same word for those before it; looking at it is an acquire.
//! So a reader who sees a record as written sees its bytes, and one who sees the watermark sees every byte below it.

use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Backoff, Mutex};

/// Records are at least so long, so that of each such stretch of bytes one record begins in it at the most.
const GRANULE: u64 = 64;
const PER_WORD: u64 = GRANULE * 64;

/// A bit for each record of a segment, by where it starts.
#[derive(Debug)]
pub(crate) struct Starts(Box<[AtomicU64]>);

impl Starts {
    /// For records below `len`; none is set.
    pub(crate) fn new(len: u64) -> Self {
        Starts((0..len.div_ceil(PER_WORD)).map(|_| AtomicU64::new(0)).collect())
    }

    #[inline]
    pub(crate) fn set(&self, start: u64) {
        // Not only a release: see `dues`.
        self.0[(start / PER_WORD) as usize].fetch_or(bit(start), Ordering::SeqCst);
    }

    /// Whether it is set; `None` if there is no bit for it.
    #[inline]
    pub(crate) fn get(&self, start: u64) -> Option<bool> {
        let word = self.0.get((start / PER_WORD) as usize)?;
        Some(word.load(Ordering::SeqCst) & bit(start) != 0)
    }
}

/// The records that are written.
#[derive(Debug)]
pub(crate) struct Written {
    /// None where no more will be.
    starts: Starts,
    /// Offset up to which every byte is written.
    watermark: AtomicU64,
    /// Held by who moves it.
    moving: Mutex<()>,
}

impl Written {
    /// All below `at` is written, and nothing else up to `len`.
    pub(crate) fn new(at: u64, len: u64) -> Self {
        Written {
            starts: Starts::new(if at < len { len } else { 0 }),
            watermark: AtomicU64::new(at),
            moving: Mutex::default(),
        }
    }

    /// Says that the record at `start` is written, and is so long.
    #[inline]
    pub(crate) fn publish(&self, start: u64, len: u64) {
        if planted!(HoleAcknowledged) {
            self.watermark.fetch_max(start + len, Ordering::AcqRel);
        }
        self.starts.set(start);
    }

    /// Whether the record at `start` is written.
    #[inline]
    pub(crate) fn has(&self, start: u64) -> bool {
        self.starts.get(start).unwrap_or_else(|| start < self.watermark.load(Ordering::Acquire))
    }

    /// Waits until the record at `start`, which was claimed, is written.
    #[cold]
    pub(crate) fn wait_for(&self, start: u64) {
        let backoff = Backoff::new();
        while !self.has(start) {
            backoff.snooze();
        }
    }

    /// The watermark; `len_of` says how long a written record is, and is asked of none below it.
    pub(crate) fn watermark(&self, len_of: impl Fn(u64) -> u64) -> u64 {
        let mut at = self.watermark.load(Ordering::Acquire);
        if self.starts.get(at) != Some(true) {
            return at;
        }
        let _moving = self.moving.lock();
        at = self.watermark.load(Ordering::Acquire);
        while self.has(at) {
            at += len_of(at);
        }
        self.watermark.store(at, Ordering::Release);
        at
    }

    /// Waits until the watermark, at which it then is, is no lower than this.
    pub(crate) fn wait_for_watermark(&self, least: u64, len_of: impl Fn(u64) -> u64) {
        let backoff = Backoff::new();
        while self.watermark(&len_of) < least {
            backoff.snooze();
        }
    }
}

#[inline]
fn bit(start: u64) -> u64 {
    1 << (start / GRANULE % 64)
}

#[cfg(all(test, oncekey_loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// One word a record, which stands for its bytes: without an order of its own.
    type Records = Arc<[AtomicU64; 2]>;

    fn len_of(_: u64) -> u64 {
        GRANULE
    }

    fn append(written: &Written, records: &Records, at: u64) {
        records[at as usize].store(at + 1, Ordering::Relaxed);
        written.publish(at * GRANULE, GRANULE);
    }

    fn see(records: &Records, at: u64) {
        assert_eq!(records[at as usize].load(Ordering::Relaxed), at + 1, "record {at}");
    }

    /// Runs this in a thread of its own: the model's main thread is not interleaved with them.
    fn spawn(
        written: &Arc<Written>,
        records: &Records,
        run: impl FnOnce(&Written, &Records) + 'static,
    ) -> thread::JoinHandle<()> {
        let (written, records) = (Arc::clone(written), Arc::clone(records));
        thread::spawn(move || run(&written, &records))
    }

    /// Up to three preemptions, which is where the known bugs of this kind show; all of them take minutes.
    fn model(run: impl Fn() + Sync + Send + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.max_branches = 100_000;
        model.check(run);
    }

    fn two_records() -> (Arc<Written>, Records) {
        (Arc::new(Written::new(0, 2 * GRANULE)), Arc::new([0; 2].map(AtomicU64::new)))
    }

    #[test]
    fn a_reader_sees_the_bytes_of_what_is_written_and_all_below_the_watermark() {
        model(|| {
            let (written, records) = two_records();
            let threads = [
                spawn(&written, &records, |written, records| append(written, records, 1)),
                spawn(&written, &records, |written, records| append(written, records, 0)),
                spawn(&written, &records, |written, records| {
                    (0..2).filter(|at| written.has(at * GRANULE)).for_each(|at| see(records, at));
                    (0..written.watermark(len_of) / GRANULE).for_each(|at| see(records, at));
                }),
            ];
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            assert_eq!(written.watermark(len_of), 2 * GRANULE);
        });
    }

    #[test]
    fn the_watermark_never_goes_back_whoever_moves_it() {
        model(|| {
            let (written, records) = two_records();
            let look = |written: &Written, records: &Records| {
                let one = written.watermark(len_of);
                let two = written.watermark(len_of);
                assert!(one <= two);
                (0..two / GRANULE).for_each(|at| see(records, at));
            };
            let threads = [
                spawn(&written, &records, |written, records| {
                    append(written, records, 0);
                    append(written, records, 1);
                }),
                spawn(&written, &records, look),
                spawn(&written, &records, look),
            ];
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            assert_eq!(written.watermark(len_of), 2 * GRANULE);
        });
    }

    #[test]
    fn an_appender_sees_the_bytes_of_those_whom_it_waited_for() {
        model(|| {
            let (written, records) = two_records();
            let threads = [
                spawn(&written, &records, |written, records| {
                    append(written, records, 1);
                    written.wait_for_watermark(2 * GRANULE, len_of);
                    see(records, 0);
                }),
                spawn(&written, &records, |written, records| append(written, records, 0)),
            ];
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
    }
}
