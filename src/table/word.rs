//! A slot's state in one atomic word: the phase in the low three bits, the LSN of its record in the others.
//!
//! LSNs are multiples of eight, so the two don't meet. Every transition is one compare-and-swap on the whole word: a
//! writer that read an older state fails, and nothing is ever read in two halves.

use crate::state::Phase;
// Not shuttle's: a slot keeps its size, and is touched only under its shard's lock.
#[cfg(oncekey_loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(oncekey_loom))]
use std::sync::atomic::{AtomicU64, Ordering};

/// A copy of a state word.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Word(u64);

impl Word {
    pub(crate) const EMPTY: Word = Word(0);

    #[inline]
    pub(crate) fn new(phase: Phase, lsn: u64) -> Self {
        debug_assert!(lsn.is_multiple_of(8) && lsn != 0);
        Word(lsn | phase as u64)
    }

    #[inline]
    pub(crate) fn phase(self) -> Phase {
        Phase::from_bits(self.0 & 7)
    }

    #[inline]
    pub(crate) fn lsn(self) -> u64 {
        self.0 & !7
    }

    #[inline]
    pub(crate) fn is_empty(self) -> bool {
        self == Word::EMPTY
    }

    /// As [`from_raw`](Word::from_raw) reads it.
    pub(crate) fn raw(self) -> u64 {
        self.0
    }

    /// A word that was kept elsewhere, whatever is in it.
    pub(crate) fn from_raw(raw: u64) -> Self {
        Word(raw)
    }

    /// The same record in another phase.
    #[inline]
    pub(crate) fn with(self, phase: Phase) -> Self {
        Word::new(phase, self.lsn())
    }
}

impl std::fmt::Debug for Word {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}@{}", self.phase(), self.lsn())
    }
}

/// The word in its slot.
#[derive(Debug)]
pub(super) struct StateWord(AtomicU64);

impl StateWord {
    pub(super) fn new(word: Word) -> Self {
        StateWord(AtomicU64::new(word.0))
    }

    /// Acquire pairs with the release of [`advance`](StateWord::advance): who sees a word sees its record's bytes.
    #[inline]
    pub(super) fn load(&self) -> Word {
        Word(self.0.load(Ordering::Acquire))
    }

    #[inline]
    pub(super) fn advance(&self, from: Word, to: Word) -> bool {
        self.0.compare_exchange(from.0, to.0, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

#[cfg(all(test, oncekey_loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    #[test]
    fn of_two_writers_who_saw_the_same_word_exactly_one_wins() {
        loom::model(|| {
            let seen = Word::new(Phase::Reserved, 64);
            let word = Arc::new(StateWord::new(seen));
            let writers = [Word::new(Phase::Completing, 64), Word::new(Phase::Interrupted, 64)].map(|to| {
                let word = Arc::clone(&word);
                (to, thread::spawn(move || word.advance(seen, to)))
            });
            let won = writers.map(|(to, writer)| writer.join().unwrap().then_some(to));
            let winners = won.into_iter().flatten().collect::<Vec<_>>();
            assert_eq!(winners.len(), 1);
            assert_eq!(word.load(), winners[0]);
        });
    }

    #[test]
    fn a_reader_who_sees_a_word_sees_the_bytes_of_its_record() {
        loom::model(|| {
            let reserved = Word::new(Phase::Reserved, 64);
            let completed = Word::new(Phase::Completed, 128);
            let interrupted = reserved.with(Phase::Interrupted);
            // Stands for the record's bytes: without an order of its own.
            let bytes = Arc::new(AtomicU64::new(0));
            let word = Arc::new(StateWord::new(reserved));
            let owner = {
                let (word, bytes) = (Arc::clone(&word), Arc::clone(&bytes));
                thread::spawn(move || {
                    bytes.store(7, Ordering::Relaxed);
                    word.advance(reserved, completed)
                })
            };
            let other = {
                let word = Arc::clone(&word);
                thread::spawn(move || word.advance(reserved, interrupted))
            };
            // In a thread of its own: the model's main thread is not interleaved with them.
            let reader = {
                let (word, bytes) = (Arc::clone(&word), Arc::clone(&bytes));
                thread::spawn(move || {
                    if word.load() == completed {
                        assert_eq!(bytes.load(Ordering::Relaxed), 7);
                    }
                })
            };
            reader.join().unwrap();
            assert_ne!(owner.join().unwrap(), other.join().unwrap());
        });
    }
}
