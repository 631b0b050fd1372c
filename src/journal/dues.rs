//! When the answers of a segment fall due, so that expiry can follow the journal's order.
//!
//! Nothing is kept for an answer, only for a *block* of 64 KiB: where its first answer begins, and a time before which none
//! of its answers is due. Answers that were written one after the other mostly fall due so, and whoever lets them expire
//! reads a block from front to back.
//!
//! Whoever lets an answer become visible notes its deadline under the lock of the answer's shard. Whoever visits a block takes its
//! time first, and then looks at its records, at those that are due under the locks of their shards. So each answer is seen by
//! the visit, or its deadline is noted after the time was taken, and leads to another one. For records that are not written, or not
//! even claimed yet, when they are looked for, this takes one order of all accesses (`SeqCst`), here and where space is claimed and
//! records are published.

use crate::sync::atomic::{AtomicU64, Ordering};
use std::ops::Range;

const BLOCK: u64 = 64 * 1024;

/// The blocks of a segment.
#[derive(Debug)]
pub(crate) struct Dues {
    /// No block has an answer that is due before.
    earliest_ms: AtomicU64,
    blocks: Box<[Block]>,
}

#[derive(Debug)]
struct Block {
    /// Offset of the first answer whose deadline was noted.
    first: AtomicU64,
    earliest_ms: AtomicU64,
}

impl Dues {
    /// For a segment of this length, without answers.
    pub(crate) fn new(len: u64) -> Self {
        let block = || Block { first: AtomicU64::new(u64::MAX), earliest_ms: AtomicU64::new(u64::MAX) };
        Dues { earliest_ms: AtomicU64::new(u64::MAX), blocks: (0..len.div_ceil(BLOCK)).map(|_| block()).collect() }
    }

    /// Notes that the answer at an offset is kept until then; `u64::MAX`: for ever.
    #[inline]
    pub(crate) fn note(&self, at: u64, deadline_ms: u64) {
        if deadline_ms == u64::MAX {
            return;
        }
        let block = &self.blocks[(at / BLOCK) as usize];
        // From the inside out: who is led here finds everything.
        lower(&block.first, at);
        lower(&block.earliest_ms, deadline_ms);
        lower(&self.earliest_ms, deadline_ms);
    }

    /// Notes what others noted, of the same segment.
    pub(crate) fn note_all(&self, others: &Dues) {
        for block in &others.blocks {
            self.note(block.first.load(Ordering::SeqCst), block.earliest_ms.load(Ordering::SeqCst));
        }
    }

    /// Whether any block may have answers due.
    pub(crate) fn is_due(&self, now_ms: u64) -> bool {
        self.earliest_ms.load(Ordering::SeqCst) <= now_ms
    }

    /// Takes the time of the first block that has answers due: offsets from its first answer to its end. Whoever takes it notes
    /// anew what is left there; one at a time.
    pub(crate) fn take_due(&self, now_ms: u64) -> Option<Range<u64>> {
        if !self.is_due(now_ms) {
            return None;
        }
        self.earliest_ms.store(u64::MAX, Ordering::SeqCst);
        let mut due = None;
        let mut earliest_ms = u64::MAX;
        for (block, end) in self.blocks.iter().zip((1..).map(|count| count * BLOCK)) {
            let block_ms = block.earliest_ms.load(Ordering::SeqCst);
            if block_ms <= now_ms && due.is_none() {
                block.earliest_ms.store(u64::MAX, Ordering::SeqCst);
                due = Some(block.first.load(Ordering::SeqCst)..end);
            } else {
                earliest_ms = earliest_ms.min(block_ms);
            }
        }
        lower(&self.earliest_ms, earliest_ms);
        due
    }
}

/// Answers written one after the other mostly fall due so: then this is a load.
#[inline]
fn lower(value: &AtomicU64, to: u64) {
    if to < value.load(Ordering::SeqCst) {
        value.fetch_min(to, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_fall_due_by_their_earliest_answer_and_from_their_first() {
        let dues = Dues::new(3 * BLOCK - 1);
        dues.note(BLOCK + 640, 70);
        dues.note(BLOCK + 64, 90);
        dues.note(2 * BLOCK, 80);
        dues.note(4096, u64::MAX);
        assert_eq!(dues.take_due(69), None);
        assert_eq!(dues.take_due(70), Some(BLOCK + 64..2 * BLOCK));
        assert_eq!(dues.take_due(79), None, "its time was taken");
        assert_eq!(dues.take_due(80), Some(2 * BLOCK..3 * BLOCK));
        assert_eq!(dues.take_due(u64::MAX - 1), None);
        dues.note(BLOCK + 64, 90);
        assert_eq!(dues.take_due(90), Some(BLOCK + 64..2 * BLOCK));
    }

    #[test]
    fn of_several_blocks_due_each_is_taken_once() {
        let dues = Dues::new(8 * BLOCK);
        (0..8).for_each(|block| dues.note(block * BLOCK + 8, 100 - block));
        let taken: Vec<_> = std::iter::from_fn(|| dues.take_due(96)).collect();
        assert_eq!(taken, (4..8).map(|block| block * BLOCK + 8..(block + 1) * BLOCK).collect::<Vec<_>>());
        assert_eq!(dues.take_due(100).map(|block| block.start), Some(8));
    }
}
