//! The in-process table: shards, each an open-addressing table of 16-byte slots.
//!
//! A slot holds no key: only its state word (phase and the LSN of the record that justifies it), 32 bits of the key's
//! hash, and the number of its timer. The caller compares real keys where the LSN leads. This module knows neither
//! the journal nor the wheel.
//!
//! - **T1** A slot lies between its home position and the next empty slot, so that a probe may stop at an empty one.
//!   Removal moves later slots back instead of leaving a tombstone (Knuth, TAOCP 3, 6.4, algorithm R).
//! - **T2** Home positions grow with the tag (`tag * capacity / 2^32`; Lemire, "Fast random integer generation in an
//!   interval", 2019), so any capacity works, growth is by half instead of by doubling, and it reads and writes in order.
//! - **T3** Equal hashes make a run, never a wrong answer: a probe ends only at a key that the caller confirmed or at an
//!   empty slot.
//! - **T4** A table moves to another size some slots with each change, so that no change moves many. Of the table of before all
//!   slots below `moved` are empty, and a slot at or above it has its home there too: what was moved last ended at an empty slot,
//!   and what had wrapped round its end went first.

mod word;

pub(crate) use word::Word;

use crate::mmap::{Arena, Part};
use crate::sync::{Mutex, MutexGuard};
use crossbeam_utils::CachePadded;
use std::sync::Arc;
use word::StateWord;

/// A key's place in the table.
#[derive(Debug)]
pub(crate) struct Slot {
    word: StateWord,
    tag: u32,
    /// Raw number of the key's timer.
    pub(crate) timer: u32,
}

const _: () = assert!(size_of::<Slot>() == 16);

impl Slot {
    /// All zeros.
    fn empty() -> Self {
        Slot { word: StateWord::new(Word::EMPTY), tag: 0, timer: 0 }
    }

    #[inline]
    pub(crate) fn word(&self) -> Word {
        self.word.load()
    }

    /// Moves the state on if it still is `from`.
    #[inline]
    pub(crate) fn advance(&self, from: Word, to: Word) -> bool {
        self.word.advance(from, to)
    }
}

/// A table that moves to another size step by step: the slots that are still to be moved stand in the one of before.
#[derive(Debug, Default)]
pub(crate) struct Table {
    now: Flat,
    /// Without slots unless there is a move.
    before: Flat,
    /// Up to where they are moved (T4).
    moved: usize,
    arena: Arc<Arena>,
}

const FIRST_CAPACITY: usize = 8;
/// Slots to move with each change, at the least: few enough for the step to be short, and enough for few tables to have both
/// sizes at a time, though all grow at about the same time.
const STEP: usize = if cfg!(test) { 4 } else { 256 };

impl Table {
    /// A table with so many slots.
    pub(crate) fn with_capacity(capacity: usize, arena: &Arc<Arena>) -> Self {
        Table { now: Flat::new(arena, capacity), arena: Arc::clone(arena), ..Table::default() }
    }

    pub(crate) fn len(&self) -> usize {
        self.now.len + self.before.len
    }

    /// The slots with this tag, each with its place, in the order of a probe.
    #[inline(always)]
    pub(crate) fn tagged(&self, tag: u32) -> impl Iterator<Item = (usize, &Slot)> {
        let (mut flat, mut offset) = (&self.now, 0);
        let mut before = Some(&self.before).filter(|before| !before.slots.is_empty());
        let mut next = flat.home(tag);
        std::iter::from_fn(move || {
            loop {
                // Of a table without slots there is not even the first.
                match flat.slots.get(next).filter(|slot| !slot.word().is_empty()) {
                    Some(slot) => {
                        let at = next;
                        next = flat.after(at);
                        if slot.tag == tag {
                            return Some((offset + at, slot));
                        }
                    }
                    None => {
                        (flat, offset) = (before.take()?, self.now.slots.len());
                        next = flat.home(tag);
                    }
                }
            }
        })
    }

    /// Looks for the slot with this tag that `is` confirms.
    #[inline]
    pub(crate) fn find(&self, tag: u32, mut is: impl FnMut(&Slot) -> bool) -> Option<usize> {
        self.tagged(tag).find(|(_, slot)| is(slot)).map(|(at, _)| at)
    }

    /// Where a look for this tag begins, to be fetched ahead; `None` in an empty table.
    #[inline]
    pub(crate) fn start_of(&self, tag: u32) -> Option<*const Slot> {
        self.now.slots.get(self.now.home(tag)).map(std::ptr::from_ref)
    }

    #[inline]
    pub(crate) fn slot(&self, at: usize) -> &Slot {
        self.get(at).expect("the place of a slot is in the table")
    }

    /// The slot there, if the table still is that large.
    #[inline]
    pub(crate) fn get(&self, at: usize) -> Option<&Slot> {
        match at.checked_sub(self.now.slots.len()) {
            None => Some(&self.now.slots[at]),
            Some(at) => self.before.slots.get(at),
        }
    }

    #[inline]
    pub(crate) fn slot_mut(&mut self, at: usize) -> &mut Slot {
        match at.checked_sub(self.now.slots.len()) {
            None => &mut self.now.slots[at],
            Some(at) => &mut self.before.slots[at],
        }
    }

    /// Adds a slot for a key that [`find`](Table::find) said is absent. Slots may change their places.
    #[inline]
    pub(crate) fn insert(&mut self, tag: u32, word: Word, timer: u32) -> usize {
        debug_assert!(!word.is_empty());
        let capacity = self.now.slots.len();
        // At 7/10 a probe for an absent key reads 6 slots on average, two cache lines.
        if (self.len() + 1) * 10 > capacity * 7 {
            self.resize(grown(capacity));
        } else if !self.before.slots.is_empty() {
            self.step();
        }
        if self.len() + 1 == capacity * 2 / 3 {
            self.arena.expect::<Slot>(grown(capacity));
        }
        self.now.place(Slot { word: StateWord::new(word), tag, timer })
    }

    /// Begins to move to a table of another size, which has room for all.
    #[cold]
    fn resize(&mut self, capacity: usize) {
        self.end_move();
        self.before = std::mem::replace(&mut self.now, Flat::new(&self.arena, capacity));
        self.moved = 0;
        self.step();
    }

    /// Gives back what is more than twice the room that is needed, at once.
    pub(crate) fn fit(&mut self) {
        let capacity = capacity_for(self.len());
        if self.now.slots.len() > 2 * capacity {
            self.resize(capacity);
        }
        self.end_move();
    }

    /// Moves all that is left.
    fn end_move(&mut self) {
        while !self.before.slots.is_empty() {
            self.step();
        }
    }

    /// Moves some more slots, in order, up to an empty one (T4).
    #[cold]
    fn step(&mut self) {
        let Flat { slots, len } = &mut self.before;
        let least = self.moved + STEP;
        while let Some(slot) = slots.get_mut(self.moved).filter(|slot| self.moved < least || !slot.word().is_empty()) {
            if !slot.word().is_empty() {
                self.now.place(std::mem::replace(slot, Slot::empty()));
                *len -= 1;
            }
            self.moved += 1;
        }
        if self.moved >= slots.len() {
            self.before = Flat::default();
        }
    }

    /// Takes a slot out. Others may change their places.
    pub(crate) fn remove(&mut self, at: usize) {
        match at.checked_sub(self.now.slots.len()) {
            None => self.now.remove(at),
            Some(at) => self.before.remove(at),
        }
        if !self.before.slots.is_empty() {
            self.step();
        }
        self.shrink();
    }

    /// Gives memory back if there is much more than is needed.
    fn shrink(&mut self) {
        let capacity = self.now.slots.len();
        // Growth is by half at 7/10; this is far enough below to not swing between the two.
        if capacity > 64 && self.len() * 5 < capacity {
            self.resize((self.len() * 5 / 2).max(FIRST_CAPACITY));
        }
    }

    /// Every slot with its tag.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Slot)> {
        let slots = self.now.slots.iter().chain(self.before.slots.iter());
        slots.filter(|slot| !slot.word().is_empty()).map(|slot| (slot.tag, slot))
    }

    /// Checks T1, T4 and the counts.
    #[cfg(test)]
    pub(crate) fn validate(&self) {
        self.now.validate();
        self.before.validate();
        assert!(self.before.slots.iter().take(self.moved).all(|slot| slot.word().is_empty()), "T4: not all is moved");
    }
}

/// The capacity after this one.
fn grown(capacity: usize) -> usize {
    (capacity * 3 / 2).max(FIRST_CAPACITY)
}

/// Slots for so many keys.
pub(crate) fn capacity_for(len: usize) -> usize {
    if len == 0 { 0 } else { len * 10 / 7 + 1 }
}

/// One open-addressing table of a fixed size.
#[derive(Debug, Default)]
struct Flat {
    slots: Part<Slot>,
    len: usize,
}

impl Flat {
    fn new(arena: &Arena, capacity: usize) -> Self {
        #[cfg_attr(not(oncekey_loom), expect(unused_mut, reason = "zeros are empty slots, but no atomics of loom's"))]
        let mut slots: Part<Slot> = arena.zeroed(capacity);
        #[cfg(oncekey_loom)]
        slots.iter_mut().for_each(|slot| *slot = Slot::empty());
        Flat { slots, len: 0 }
    }

    #[inline]
    fn home(&self, tag: u32) -> usize {
        ((u64::from(tag) * self.slots.len() as u64) >> 32) as usize
    }

    #[inline]
    fn after(&self, at: usize) -> usize {
        if at + 1 == self.slots.len() { 0 } else { at + 1 }
    }

    #[inline]
    fn place(&mut self, slot: Slot) -> usize {
        let mut at = self.home(slot.tag);
        while !self.slots[at].word().is_empty() {
            at = self.after(at);
        }
        self.slots[at] = slot;
        self.len += 1;
        at
    }

    /// Takes a slot out; the slots behind it that may move forward do (T1).
    fn remove(&mut self, at: usize) {
        debug_assert!(!self.slots[at].word().is_empty());
        let mut hole = at;
        let mut next = at;
        loop {
            next = self.after(next);
            if self.slots[next].word().is_empty() {
                break;
            }
            let home = self.home(self.slots[next].tag);
            let stays = if hole < next { hole < home && home <= next } else { hole < home || home <= next };
            if !stays {
                self.slots.swap(hole, next);
                hole = next;
            }
        }
        self.slots[hole] = Slot::empty();
        self.len -= 1;
    }

    #[cfg(test)]
    fn validate(&self) {
        let mut filled = 0;
        for at in 0..self.slots.len() {
            let slot = &self.slots[at];
            if slot.word().is_empty() {
                continue;
            }
            filled += 1;
            let mut between = self.home(slot.tag);
            while between != at {
                assert!(!self.slots[between].word().is_empty(), "T1: slot {at} is cut off from its home");
                between = self.after(between);
            }
        }
        assert_eq!(filled, self.len);
    }
}

/// Locks striped by hash, each on its own cache lines, over whatever a shard consists of.
#[derive(Debug)]
pub(crate) struct Shards<T>(Box<[CachePadded<Mutex<T>>]>);

impl<T> Shards<T> {
    /// `count` is a power of two.
    pub(crate) fn new(count: usize, each: impl FnMut() -> T) -> Self {
        assert!(count.is_power_of_two() && count <= 1 << 16);
        Shards(std::iter::repeat_with(each).map(Mutex::new).map(CachePadded::new).take(count).collect())
    }

    /// The number of a hash's shard. It uses the low half, and the tag is the high one.
    #[inline]
    pub(crate) fn index(&self, hash: u64) -> usize {
        hash as usize & (self.0.len() - 1)
    }

    /// The shard of a hash.
    #[inline]
    pub(crate) fn of(&self, hash: u64) -> MutexGuard<'_, T> {
        self.0[self.index(hash)].lock()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = MutexGuard<'_, T>> {
        self.0.iter().map(|shard| shard.lock())
    }

    pub(crate) fn get(&self, at: usize) -> MutexGuard<'_, T> {
        self.0[at & (self.0.len() - 1)].lock()
    }

    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }
}

/// The part of a hash that a slot keeps.
#[inline]
pub(crate) fn tag_of(hash: u64) -> u32 {
    (hash >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Phase;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn word(id: u64) -> Word {
        Word::new(Phase::Completed, (id + 1) * 8)
    }

    fn find(table: &Table, tag: u32, id: u64) -> Option<usize> {
        table.find(tag, |slot| slot.word() == word(id))
    }

    proptest! {
        #[test]
        fn a_table_holds_what_a_set_holds(steps in prop::collection::vec((any::<bool>(), 0u64..60, 0u32..6), 1..400)) {
            let mut table = Table::default();
            let mut model = BTreeSet::new();
            // Six tags, some at the very end of the range, so that runs wrap around and collide.
            let tags = [0, 1, u32::MAX, u32::MAX - 1, u32::MAX / 2, 7];
            for (add, id, tag) in steps {
                let tag_value = tags[tag as usize];
                let id = id * 8 + u64::from(tag);
                let found = find(&table, tag_value, id);
                prop_assert_eq!(found.is_some(), model.contains(&id));
                match found {
                    None if add => {
                        table.insert(tag_value, word(id), 0);
                        model.insert(id);
                    }
                    Some(at) if !add => {
                        table.remove(at);
                        model.remove(&id);
                    }
                    None | Some(_) => {}
                }
                table.validate();
                prop_assert_eq!(table.len(), model.len());
            }
            for (tag, slot) in table.iter() {
                let id = slot.word().lsn() / 8 - 1;
                prop_assert!(model.contains(&id));
                prop_assert_eq!(tag, tags[(id % 8) as usize]);
            }
        }
    }

    #[test]
    fn a_table_with_more_room_than_it_needs_gives_it_back_and_finds_what_is_there() {
        for keys in [0, 1, 10] {
            let mut table = Table::with_capacity(1500, &Arc::default());
            for id in 0..keys {
                table.insert(id as u32 * 1000, word(id), 0);
            }
            table.fit();
            table.validate();
            assert!(table.get(40).is_none());
            assert_eq!(find(&table, 7, 99), None);
            assert!((0..keys).all(|id| find(&table, id as u32 * 1000, id).is_some()));
            // Down to nothing, one by one.
            for id in 0..keys {
                let at = find(&table, id as u32 * 1000, id).expect("it is there");
                table.remove(at);
                table.validate();
            }
            assert_eq!(find(&table, 0, 0), None);
        }
    }

    #[test]
    fn a_table_that_empties_gives_its_memory_back() {
        let mut table = Table::default();
        let tag = |id: u64| (id as u32).wrapping_mul(0x9e37_79b9);
        for id in 0..10_000 {
            table.insert(tag(id), word(id), 0);
        }
        let full = table.now.slots.len();
        for id in 0..9_990 {
            let Some(at) = find(&table, tag(id), id) else { panic!("{id} is gone") };
            table.remove(at);
        }
        table.validate();
        let left = table.now.slots.len() + table.before.slots.len();
        assert!(left * 50 < full, "{left} of {full} slots are left for 10 keys");
        for id in 9_990..10_000 {
            assert!(find(&table, tag(id), id).is_some());
        }
    }
}
