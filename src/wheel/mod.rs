//! A hierarchical timing wheel: deadlines in, due entries out, in constant work each.
//!
//! The scheme is the one of Varghese and Lauck, "Hashed and hierarchical timing wheels" (SOSP 1987). A tick is one
//! millisecond. Read a deadline as a number of base-64 digits, most significant first. An entry is filed under the
//! first digit in which its deadline differs from `elapsed`, the time that the wheel has reached: the digit's place
//! is the level, its value is the slot. When time reaches the start of that slot, the entry moves to a lower level,
//! or fires if its deadline is the start itself.
//!
//! ```text
//! level 0   64 slots of  1 ms       what is due within the current 64 ms
//! level 1   64 slots of 64 ms       ... within the current 4.1 s
//! level 2   64 slots of 4.1 s       ... within the current 4.4 min
//!   :
//! level 10  16 slots of 36.6 My     any u64
//! ```
//!
//! Eleven levels cover every `u64`. So no slot stands for two times, a bitmap's lowest bit is its level's earliest
//! slot, and there is no wrapping round or clamping: a deadline of `u64::MAX`, or a clock that leaps there, costs an
//! entry at most ten moves. A level is allocated when it is first used; nearly all wheels have four or five.
//!
//! No step does more than a constant amount of work, however many entries share a slot: a slot that is reached
//! becomes the *pending* list by a move of its head, and each [`Wheel::step`] takes one entry off that list. An entry
//! set to a time that is already reached goes to the front of the same list.
//!
//! # Invariants
//!
//! - `W1` Each entry is on exactly one list: that of one slot, or pending. Lists are doubly linked; a head has no
//!   `prev`. An entry with no `prev` that is not the head of pending is the head of its slot's list.
//! - `W2` An entry in a slot is due later than `elapsed`, and the slot is where [`place`] puts it. This holds for
//!   every `elapsed` before the start of the earliest slot in use, so time may move up to there without a look at
//!   any entry; and of all slots in use, the earliest is the lowest slot of the lowest level.
//! - `W3` A slot's bit is set if and only if its list is not empty; a level's bit, if and only if one of its slots'
//!   is.
//! - `W4` `elapsed` never goes back, and does not move while an entry is pending. So each entry fires when `elapsed`
//!   equals its deadline, or the `elapsed` of the moment in which it was set if that was later.
//!
//! From `W4` follows the order: entries fire by deadline, save that one set to a time already reached fires before
//! all that are still ahead. Entries with one deadline fire in no particular order.
//!
//! The wheel holds no clock and no lock: time is what the caller says it is.

use std::fmt;
use std::mem;

use slab::Slab;

pub use slab::TimerId;

mod slab;

/// Entries by deadline; each operation is constant work.
///
/// An entry is a `u32` of the caller's. Time is in milliseconds from any epoch, the same for all calls.
pub struct Wheel {
    elapsed_ms: u64,
    slab: Slab,
    levels: [Option<Box<Level>>; LEVELS],
    pending: TimerId,
    used_levels: u16,
}

/// An entry whose deadline has come; the wheel no longer holds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Due {
    /// The id it had, which may name another entry from the next insertion on.
    pub id: TimerId,
    /// What was inserted.
    pub item: u32,
    /// The deadline last set.
    pub deadline_ms: u64,
}

/// What one step did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "a fired entry has left the wheel"]
pub enum Step {
    /// An entry was due.
    Fired(Due),
    /// An entry not yet due moved to a lower level; another step may find one that is.
    Moved,
    /// Nothing is due.
    Idle,
}

impl Wheel {
    /// An empty wheel that has reached `now_ms`.
    pub const fn new(now_ms: u64) -> Wheel {
        Wheel {
            elapsed_ms: now_ms,
            slab: Slab::new(),
            levels: [const { None }; LEVELS],
            pending: TimerId::NONE,
            used_levels: 0,
        }
    }

    /// Adds an entry; one whose deadline has passed is the next to fire.
    ///
    /// # Panics
    ///
    /// When the wheel holds some 2^32 entries, all that a [`TimerId`] can tell apart.
    #[inline]
    pub fn insert(&mut self, deadline_ms: u64, item: u32) -> TimerId {
        let id = self.slab.alloc(item);
        self.link(id, deadline_ms);
        id
    }

    /// Takes out an entry before it fires, and returns it with its deadline.
    ///
    /// # Panics
    ///
    /// When the entry is gone, unless its id has been used again: then the other entry is taken.
    #[inline]
    pub fn remove(&mut self, id: TimerId) -> (u32, u64) {
        let node = self.slab.live(id);
        let (item, deadline_ms) = (node.item, node.deadline_ms());
        self.unlink(id);
        self.slab.release(id);
        (item, deadline_ms)
    }

    /// Sets another deadline, earlier or later; the entry keeps its id.
    ///
    /// # Panics
    ///
    /// As [`remove`](Wheel::remove).
    #[inline]
    pub fn reschedule(&mut self, id: TimerId, deadline_ms: u64) {
        let was_ms = self.slab.live(id).deadline_ms();
        // A lease that is renewed often stays in its slot. A pending entry may stay too, whatever slot it came from:
        // the step that takes it goes by its deadline.
        if place(self.elapsed_ms, was_ms) == place(self.elapsed_ms, deadline_ms) {
            self.slab.node_mut(id).set_deadline_ms(deadline_ms);
            return;
        }
        self.unlink(id);
        self.link(id, deadline_ms);
    }

    /// The deadline last set.
    ///
    /// # Panics
    ///
    /// As [`remove`](Wheel::remove).
    #[inline]
    pub fn deadline_ms(&self, id: TimerId) -> u64 {
        self.slab.live(id).deadline_ms()
    }

    /// Fires one entry with `deadline_ms <= now_ms`, or moves one, or finds that none is due.
    ///
    /// After [`Step::Idle`] no entry is due at `now_ms`. A `now_ms` before the time already reached counts as that
    /// time. An empty wheel that is stepped gives memory back, a chunk at a time.
    #[inline]
    pub fn step(&mut self, now_ms: u64) -> Step {
        let now_ms = now_ms.max(self.elapsed_ms);
        if self.pending == TimerId::NONE && !self.reach_earliest_slot(now_ms) {
            self.elapsed_ms = now_ms;
            if self.is_empty() {
                self.slab.trim();
            }
            return Step::Idle;
        }
        let id = self.pending;
        let node = self.slab.live(id);
        let (item, deadline_ms) = (node.item, node.deadline_ms());
        self.unlink(id);
        if deadline_ms > self.elapsed_ms {
            self.link(id, deadline_ms);
            return Step::Moved;
        }
        self.slab.release(id);
        Step::Fired(Due { id, item, deadline_ms })
    }

    /// The earliest time at which a step may do anything; `None` when the wheel is empty.
    ///
    /// A lower bound: the step at that time may only move entries, and no entry fires before it.
    #[inline]
    pub fn next_wake_ms(&self) -> Option<u64> {
        if self.pending != TimerId::NONE {
            return Some(self.elapsed_ms);
        }
        self.earliest_slot().map(|(_, start_ms)| start_ms)
    }

    /// The latest time, in Unix ms, that the wheel was told of; everything due by then is being fired.
    #[inline]
    pub fn elapsed_ms(&self) -> u64 {
        self.elapsed_ms
    }

    /// How many entries the wheel holds.
    #[inline]
    pub fn len(&self) -> usize {
        self.slab.len()
    }

    /// Whether the wheel holds no entry.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Checks all invariants, in time linear in the size of the wheel.
    ///
    /// # Panics
    ///
    /// When one does not hold.
    #[cfg(any(test, feature = "testing"))]
    pub fn validate(&self) {
        self.slab.validate();
        let mut listed = self.validate_list(self.pending, |_| true);
        for (l, level) in self.levels.iter().enumerate() {
            let used = level.as_ref().map_or(0, |level| level.used_slots);
            assert_eq!(used != 0, self.used_levels & (1 << l) != 0, "W3: level {l}");
            let Some(level) = level else { continue };
            for (slot, &head) in level.heads.iter().enumerate() {
                assert_eq!(head != TimerId::NONE, used & (1 << slot) != 0, "W3: level {l}, slot {slot}");
                let here = Some(Place { level: l, slot });
                listed += self.validate_list(head, |deadline_ms| place(self.elapsed_ms, deadline_ms) == here);
            }
        }
        assert_eq!(listed, self.len(), "W1: entries on lists and entries in all");
    }

    #[cfg(any(test, feature = "testing"))]
    fn validate_list(&self, head: TimerId, belongs: impl Fn(u64) -> bool) -> usize {
        let mut count = 0;
        let (mut prev, mut id) = (TimerId::NONE, head);
        while id != TimerId::NONE {
            let node = self.slab.live(id);
            assert_eq!(node.prev, prev, "W1: the link back from {id:?}");
            assert!(
                belongs(node.deadline_ms()),
                "W2: {id:?}, due at {}, elapsed {}",
                node.deadline_ms(),
                self.elapsed_ms
            );
            count += 1;
            assert!(count <= self.len(), "W1: a list has a cycle");
            (prev, id) = (id, node.next);
        }
        count
    }

    /// Sets the deadline of an entry that is on no list, and files it.
    #[inline]
    fn link(&mut self, id: TimerId, deadline_ms: u64) {
        let head = match place(self.elapsed_ms, deadline_ms) {
            None => &mut self.pending,
            Some(Place { level, slot }) => {
                self.used_levels |= 1 << level;
                let level = self.levels[level].get_or_insert_with(Level::boxed);
                level.used_slots |= 1 << slot;
                &mut level.heads[slot]
            }
        };
        let next = mem::replace(head, id);
        let node = self.slab.node_mut(id);
        node.set_deadline_ms(deadline_ms);
        node.prev = TimerId::NONE;
        node.next = next;
        if next != TimerId::NONE {
            self.slab.node_mut(next).prev = id;
        }
    }

    /// Takes an entry off its list.
    #[inline]
    fn unlink(&mut self, id: TimerId) {
        let node = self.slab.live(id);
        let (prev, next, deadline_ms) = (node.prev, node.next, node.deadline_ms());
        if next != TimerId::NONE {
            self.slab.node_mut(next).prev = prev;
        }
        if prev != TimerId::NONE {
            self.slab.node_mut(prev).next = next;
        } else if self.pending == id {
            self.pending = next;
        } else {
            let place = place(self.elapsed_ms, deadline_ms).expect("W2: what is due is pending");
            let head = self.replace_head(place, next);
            debug_assert_eq!(head, id, "W1: an entry with no prev heads its list");
        }
    }

    /// Puts another head in a slot in use, and keeps `W3`.
    #[inline]
    fn replace_head(&mut self, place: Place, head: TimerId) -> TimerId {
        let level = self.levels[place.level].as_mut().expect("W3: a slot in use has its level");
        if head == TimerId::NONE {
            level.used_slots &= !(1 << place.slot);
            if level.used_slots == 0 {
                self.used_levels &= !(1 << place.level);
            }
        }
        mem::replace(&mut level.heads[place.slot], head)
    }

    /// Moves time to the start of the earliest slot and makes its entries pending, if that start has come.
    #[inline]
    fn reach_earliest_slot(&mut self, now_ms: u64) -> bool {
        match self.earliest_slot() {
            Some((place, start_ms)) if start_ms <= now_ms => {
                self.elapsed_ms = start_ms;
                self.pending = self.replace_head(place, TimerId::NONE);
                true
            }
            Some(_) | None => false,
        }
    }

    /// The earliest slot in use, and the time at which it starts.
    #[inline]
    fn earliest_slot(&self) -> Option<(Place, u64)> {
        if self.used_levels == 0 {
            return None;
        }
        let level = self.used_levels.trailing_zeros() as usize;
        let used_slots = self.levels[level].as_ref().expect("W3: a level in use is there").used_slots;
        let slot = used_slots.trailing_zeros() as usize;
        let shift = level as u32 * DIGIT_BITS;
        let start_ms = (self.elapsed_ms >> shift & !DIGIT_MASK | slot as u64) << shift;
        Some((Place { level, slot }, start_ms))
    }
}

impl fmt::Debug for Wheel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wheel")
            .field("elapsed_ms", &self.elapsed_ms)
            .field("len", &self.len())
            .field("next_wake_ms", &self.next_wake_ms())
            .finish_non_exhaustive()
    }
}

/// One digit's slots.
struct Level {
    used_slots: u64,
    heads: [TimerId; SLOTS],
}

impl Level {
    #[cold]
    fn boxed() -> Box<Level> {
        Box::new(Level { used_slots: 0, heads: [TimerId::NONE; SLOTS] })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    level: usize,
    slot: usize,
}

/// Where an entry is filed: the first digit that differs. `None` when it is due.
#[inline]
fn place(elapsed_ms: u64, deadline_ms: u64) -> Option<Place> {
    if deadline_ms <= elapsed_ms {
        return None;
    }
    let level = (elapsed_ms ^ deadline_ms).ilog2() / DIGIT_BITS;
    let slot = deadline_ms >> (level * DIGIT_BITS) & DIGIT_MASK;
    Some(Place { level: level as usize, slot: slot as usize })
}

const DIGIT_BITS: u32 = 6;
const DIGIT_MASK: u64 = SLOTS as u64 - 1;
const SLOTS: usize = 1 << DIGIT_BITS;
const LEVELS: usize = u64::BITS.div_ceil(DIGIT_BITS) as usize;

// A store has a wheel for each of hundreds of shards.
const _: () = assert!(size_of::<Wheel>() <= 160);
const _: () = assert!(LEVELS <= u16::BITS as usize);
const _: () = assert!(SLOTS == u64::BITS as usize);

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const DAY_MS: u64 = 24 * 60 * 60 * 1000;

    /// Steps until nothing is due, and returns what fired.
    fn expire(wheel: &mut Wheel, now_ms: u64) -> Vec<Due> {
        let steps_max = wheel.len() * LEVELS;
        let mut fired = Vec::new();
        for _ in 0..=steps_max {
            match wheel.step(now_ms) {
                Step::Fired(due) => fired.push(due),
                Step::Moved => {}
                Step::Idle => return fired,
            }
        }
        panic!("{steps_max} steps have not made the wheel idle");
    }

    fn items(fired: &[Due]) -> Vec<u32> {
        fired.iter().map(|due| due.item).collect()
    }

    #[test]
    fn an_entry_fires_at_its_deadline_and_not_a_millisecond_before() {
        for shift in 0..64 {
            for deadline_ms in [1 << shift, (1 << shift) + 1, u64::MAX >> (63 - shift)] {
                let mut wheel = Wheel::new(0);
                let id = wheel.insert(deadline_ms, 9);
                assert_eq!(expire(&mut wheel, deadline_ms - 1), []);
                assert_eq!(expire(&mut wheel, deadline_ms), [Due { id, item: 9, deadline_ms }]);
                assert_eq!(wheel.next_wake_ms(), None);
            }
        }
    }

    #[test]
    fn a_deadline_in_the_past_fires_at_the_next_step() {
        let mut wheel = Wheel::new(1_000);
        for now_ms in [0, 1_000, 5_000] {
            for deadline_ms in [0, 999, 1_000] {
                let id = wheel.insert(deadline_ms, 1);
                assert!(wheel.next_wake_ms().is_some_and(|wake_ms| wake_ms <= now_ms.max(1_000)));
                assert_eq!(wheel.step(now_ms), Step::Fired(Due { id, item: 1, deadline_ms }));
                assert_eq!(wheel.step(now_ms), Step::Idle);
            }
            wheel = Wheel::new(1_000);
        }
    }

    #[test]
    fn a_past_deadline_does_not_wait_for_a_slot_that_is_still_being_drained() {
        let mut wheel = Wheel::new(0);
        for item in 0..100 {
            wheel.insert(4_096 + 1 + u64::from(item), item);
        }
        assert_eq!(wheel.step(10_000), Step::Moved);
        let id = wheel.insert(17, 1_000);
        assert_eq!(wheel.step(10_000), Step::Fired(Due { id, item: 1_000, deadline_ms: 17 }));
        assert_eq!(items(&expire(&mut wheel, 10_000)), (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn a_late_sweep_fires_in_the_order_of_the_deadlines() {
        let mut wheel = Wheel::new(77);
        let mut deadlines: Vec<u64> = (0..5_000u64).map(|i| 78 + i * 7_919 * 7_919 % (40 * DAY_MS)).collect();
        deadlines.iter().for_each(|&deadline_ms| _ = wheel.insert(deadline_ms, 0));
        deadlines.sort_unstable();
        let fired: Vec<u64> = expire(&mut wheel, 41 * DAY_MS).iter().map(|due| due.deadline_ms).collect();
        assert_eq!(fired, deadlines);
    }

    #[test]
    fn a_clock_that_leaps_to_the_end_of_time_costs_an_entry_at_most_ten_moves() {
        let mut wheel = Wheel::new(0);
        for deadline_ms in [1, DAY_MS, 1 << 42, u64::MAX / 3, u64::MAX - 1, u64::MAX] {
            wheel.insert(deadline_ms, 0);
        }
        let moves = (0..).take_while(|_| wheel.step(u64::MAX) != Step::Idle).take(1_000).count() - 6;
        assert!(wheel.is_empty());
        assert!(moves <= 6 * (LEVELS - 1), "{moves}");
    }

    #[test]
    fn the_last_millisecond_of_time_is_a_deadline_like_any_other() {
        let mut wheel = Wheel::new(1_700_000_000_000);
        wheel.insert(u64::MAX, 1);
        assert_eq!(expire(&mut wheel, u64::MAX - 1), []);
        wheel.validate();
        assert_eq!(wheel.next_wake_ms(), Some(u64::MAX));
        assert_eq!(items(&expire(&mut wheel, u64::MAX)), [1]);
        wheel.insert(u64::MAX, 2);
        assert_eq!(items(&expire(&mut wheel, 0)), [2]);
    }

    #[test]
    fn a_slot_of_a_hundred_thousand_is_drained_one_entry_a_step() {
        const ENTRIES: usize = 100_000;
        let mut wheel = Wheel::new(0);
        for item in 0..ENTRIES {
            // The slot of level 2 that starts at 4096, and half of them due at its start.
            wheel.insert(4_096 + (item % 2) as u64 * 100, item as u32);
        }
        assert_eq!(wheel.step(4_095), Step::Idle);

        let (mut fired, mut moved) = (0, 0);
        while fired + moved < ENTRIES {
            match wheel.step(4_096) {
                Step::Fired(due) => {
                    assert_eq!(due.deadline_ms, 4_096);
                    fired += 1;
                }
                Step::Moved => moved += 1,
                Step::Idle => panic!("idle with entries pending"),
            }
            assert_eq!(wheel.len(), ENTRIES - fired);
        }
        assert_eq!((fired, moved), (ENTRIES / 2, ENTRIES / 2));
        assert_eq!(wheel.step(4_195), Step::Moved, "slot 4160 of level 1 is reached");
        wheel.validate();
        assert_eq!(expire(&mut wheel, 4_195), []);
        assert_eq!(expire(&mut wheel, 4_196).len(), ENTRIES / 2);
    }

    /// Three entries that were in one slot and are now pending: a head, a middle and a tail. `elapsed` is 64.
    fn three_pending() -> (Wheel, [TimerId; 3]) {
        let mut wheel = Wheel::new(0);
        let ids = [70, 80, 90].map(|deadline_ms| wheel.insert(deadline_ms, deadline_ms as u32));
        // The last in is the first off the list, and the step that fires it leaves the others where they are.
        wheel.insert(64, 99);
        assert!(matches!(wheel.step(64), Step::Fired(Due { item: 99, .. })));
        (wheel, ids)
    }

    #[test]
    fn an_entry_removed_while_pending_never_fires() {
        for gone in 0..3 {
            let (mut wheel, ids) = three_pending();
            let deadline_ms = wheel.deadline_ms(ids[gone]);
            assert_eq!(wheel.remove(ids[gone]), (deadline_ms as u32, deadline_ms));
            wheel.validate();
            let mut left = vec![70, 80, 90];
            left.remove(gone);
            assert_eq!(items(&expire(&mut wheel, 1_000)), left);
        }
    }

    #[test]
    fn an_entry_rescheduled_while_pending_goes_by_its_new_deadline() {
        // Due at once, in the slot it would have moved to, in the slot it came from, and elsewhere.
        for deadline_ms in [0, 64, 71, 127, 128, 5_000, u64::MAX] {
            for moved in 0..3 {
                let (mut wheel, ids) = three_pending();
                wheel.reschedule(ids[moved], deadline_ms);
                wheel.validate();
                assert_eq!(wheel.deadline_ms(ids[moved]), deadline_ms);

                let mut expected: Vec<_> =
                    [(70, 70), (80, 80), (90, 90)].into_iter().filter(|&(_, item)| item != 70 + 10 * moved).collect();
                expected.push((deadline_ms, 70 + 10 * moved));
                expected.sort_unstable();
                let mut fired = Vec::new();
                for now_ms in [64, 69, 70, 71, 89, 90, 127, 128, 4_999, 5_000, u64::MAX] {
                    for due in expire(&mut wheel, now_ms) {
                        assert!(due.deadline_ms <= now_ms);
                        fired.push((due.deadline_ms, due.item as usize));
                    }
                }
                assert_eq!(fired, expected);
            }
        }
    }

    #[test]
    fn an_entry_rescheduled_while_pending_fires_at_once_if_it_is_now_due() {
        let (mut wheel, ids) = three_pending();
        wheel.reschedule(ids[0], 64);
        assert_eq!(wheel.step(64), Step::Fired(Due { id: ids[0], item: 70, deadline_ms: 64 }));
    }

    #[test]
    fn rescheduling_keeps_the_id_and_the_item() {
        let mut wheel = Wheel::new(0);
        let id = wheel.insert(100, 5);
        let other = wheel.insert(100, 6);
        for deadline_ms in [101, 30_000, 30_001, u64::MAX, 50] {
            wheel.reschedule(id, deadline_ms);
            wheel.validate();
        }
        assert_eq!(expire(&mut wheel, 50), [Due { id, item: 5, deadline_ms: 50 }]);
        assert!(!wheel.is_empty());
        assert_eq!(wheel.remove(other), (6, 100));
        assert!(wheel.is_empty());
    }

    #[test]
    fn time_going_backwards_neither_fires_nor_hides_anything() {
        let mut wheel = Wheel::new(10_000);
        wheel.insert(10_500, 1);
        assert_eq!(expire(&mut wheel, 10_499), []);
        assert_eq!(expire(&mut wheel, 3), []);
        wheel.insert(10_400, 2);
        assert_eq!(items(&expire(&mut wheel, 3)), [2], "10499 was reached before");
        assert_eq!(wheel.next_wake_ms(), Some(10_500));
        wheel.validate();
        assert_eq!(items(&expire(&mut wheel, 10_500)), [1]);
    }

    #[test]
    fn stepping_only_when_next_wake_says_so_misses_nothing() {
        let mut wheel = Wheel::new(5);
        for i in 0..1_000u64 {
            wheel.insert(6 + i * i * i * 31, i as u32);
        }
        let mut wakes = 0;
        while let Some(wake_ms) = wheel.next_wake_ms() {
            let due = expire(&mut wheel, wake_ms);
            assert!(due.iter().all(|due| due.deadline_ms == wake_ms));
            wakes += 1;
            assert!(wakes <= 1_000 * LEVELS);
        }
        assert!(wheel.is_empty());
    }

    #[test]
    fn a_wheel_allocates_only_the_levels_it_uses() {
        let levels = |wheel: &Wheel| wheel.levels.iter().flatten().count();
        let mut wheel = Wheel::new(64);
        assert_eq!(levels(&wheel), 0);
        let ids = [65, 1_000, 1_001].map(|deadline_ms| wheel.insert(deadline_ms, 0));
        assert_eq!(levels(&wheel), 2);
        wheel.reschedule(ids[0], u64::MAX);
        assert_eq!(levels(&wheel), 3);
        wheel.insert(0, 0);
        assert_eq!(levels(&wheel), 3, "what is due needs no level");
    }

    #[test]
    fn an_emptied_wheel_works_on_while_it_gives_its_memory_back() {
        let mut wheel = Wheel::new(0);
        for round in 1..=3u64 {
            for item in 0..10_000 {
                wheel.insert(round * 1_000 + u64::from(item) % 100, item);
            }
            assert_eq!(expire(&mut wheel, round * 1_000 + 100).len(), 10_000);
            wheel.validate();
            for _ in 0..20 {
                assert_eq!(wheel.step(0), Step::Idle);
                wheel.validate();
            }
        }
    }

    #[test]
    #[should_panic(expected = "has fired or was removed")]
    fn the_id_of_a_fired_entry_is_refused() {
        let mut wheel = Wheel::new(0);
        let id = wheel.insert(1, 1);
        wheel.insert(1_000, 2);
        assert_eq!(expire(&mut wheel, 1).len(), 1);
        wheel.reschedule(id, 2_000);
    }

    #[test]
    #[should_panic(expected = "W2: ")]
    fn validation_notices_an_entry_in_the_wrong_slot() {
        let mut wheel = Wheel::new(0);
        let id = wheel.insert(70, 1);
        wheel.slab.node_mut(id).set_deadline_ms(700);
        wheel.validate();
    }

    #[test]
    #[should_panic(expected = "W3: ")]
    fn validation_notices_a_bit_without_an_entry() {
        let mut wheel = Wheel::new(0);
        wheel.insert(70, 1);
        wheel.used_levels |= 1;
        wheel.validate();
    }

    /// What a wheel must do, as a map from item to deadline that is searched in full.
    #[derive(Default)]
    struct Model {
        entries: BTreeMap<u32, Entry>,
        // The latest time ever given to a step.
        now_ms: u64,
        // The latest time at which a step found nothing due.
        idle_ms: u64,
    }

    struct Entry {
        id: TimerId,
        deadline_ms: u64,
        // Set to a time already past, so it has no place in the order.
        late: bool,
    }

    impl Model {
        fn set(&mut self, item: u32, id: TimerId, deadline_ms: u64) {
            self.entries.insert(item, Entry { id, deadline_ms, late: deadline_ms <= self.now_ms });
        }

        /// Checks what a step at `to_ms` did.
        fn accept(&mut self, to_ms: u64, step: Step) {
            self.now_ms = self.now_ms.max(to_ms);
            match step {
                Step::Fired(due) => {
                    let entry = self.entries.remove(&due.item).expect("an entry that is not in the wheel fired");
                    assert_eq!((entry.id, entry.deadline_ms), (due.id, due.deadline_ms));
                    assert!(due.deadline_ms <= self.now_ms, "fired before its deadline");
                    let earlier = self.entries.values().find(|e| !e.late && e.deadline_ms < due.deadline_ms);
                    assert!(earlier.is_none(), "an earlier deadline was passed over");
                }
                Step::Moved => {}
                Step::Idle => {
                    self.idle_ms = self.idle_ms.max(to_ms);
                    let missed = self.entries.values().find(|entry| entry.deadline_ms <= self.idle_ms);
                    assert!(missed.is_none(), "idle with an entry due");
                }
            }
        }

        fn earliest_ms(&self) -> Option<u64> {
            self.entries.values().map(|entry| entry.deadline_ms).min()
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Insert(When),
        Remove(prop::sample::Index),
        Reschedule(prop::sample::Index, When),
        Step { to: When, steps: usize },
        StepAtWake,
    }

    /// A time, mostly told from the present one, so that small and large distances are equally likely.
    #[derive(Clone, Copy, Debug)]
    enum When {
        Ahead(u64),
        Behind(u64),
        // The present digits above a level, then zeros: the start of a slot, or of one soon to come.
        Boundary { level: u32, slots: u64 },
        At(u64),
    }

    impl When {
        fn from(self, now_ms: u64) -> u64 {
            match self {
                When::Ahead(ms) => now_ms.saturating_add(ms),
                When::Behind(ms) => now_ms.saturating_sub(ms),
                When::Boundary { level, slots } => {
                    let shift = level * DIGIT_BITS;
                    (now_ms >> shift << shift).saturating_add(slots << shift)
                }
                When::At(ms) => ms,
            }
        }
    }

    fn any_when(bits: u32) -> impl Strategy<Value = When> {
        let distance = (0..bits, any::<u64>()).prop_map(|(bits, ms)| ms & ((1 << bits) - 1));
        prop_oneof![
            12 => distance.clone().prop_map(When::Ahead),
            2 => distance.prop_map(When::Behind),
            4 => (0..bits / DIGIT_BITS, 0..3u64).prop_map(|(level, slots)| When::Boundary { level, slots }),
        ]
    }

    fn any_op() -> impl Strategy<Value = Op> {
        let extreme = prop_oneof![
            Just(When::At(0)),
            Just(When::At(u64::MAX)),
            Just(When::At(u64::MAX - 1)),
            any::<u64>().prop_map(When::At),
        ];
        let deadline = prop_oneof![8 => any_when(32), 2 => any_when(63), 1 => extreme];
        let index = any::<prop::sample::Index>;
        let steps = prop_oneof![3 => 1..4usize, 1 => Just(usize::MAX)];
        prop_oneof![
            8 => deadline.clone().prop_map(Op::Insert),
            2 => index().prop_map(Op::Remove),
            6 => (index(), deadline).prop_map(|(index, when)| Op::Reschedule(index, when)),
            6 => (any_when(26), steps).prop_map(|(to, steps)| Op::Step { to, steps }),
            3 => Just(Op::StepAtWake),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn the_wheel_agrees_with_a_sorted_map(
            start in prop_oneof![
                Just(0),
                Just(1_700_000_000_000),
                Just(u64::MAX - 100_000),
                any::<u64>(),
            ],
            ops in vec(any_op(), 1..200),
            end in prop_oneof![Just(u64::MAX), any::<u64>()],
        ) {
            let mut wheel = Wheel::new(start);
            let mut model = Model { now_ms: start, idle_ms: start, ..Model::default() };
            let (mut settings, mut moves) = (0, 0);
            let mut items = 0..;
            for op in ops {
                let nth = |index: prop::sample::Index, model: &Model| {
                    let item = (!model.entries.is_empty()).then(|| index.index(model.entries.len()))?;
                    model.entries.iter().nth(item).map(|(&item, entry)| (item, entry.id, entry.deadline_ms))
                };
                match op {
                    Op::Insert(when) => {
                        let (item, deadline_ms) = (items.next().expect("endless"), when.from(model.now_ms));
                        let id = wheel.insert(deadline_ms, item);
                        model.set(item, id, deadline_ms);
                        settings += 1;
                    }
                    Op::Remove(index) => if let Some((item, id, deadline_ms)) = nth(index, &model) {
                        prop_assert_eq!(wheel.remove(id), (item, deadline_ms));
                        model.entries.remove(&item);
                    },
                    Op::Reschedule(index, when) => if let Some((item, id, _)) = nth(index, &model) {
                        let deadline_ms = when.from(model.now_ms);
                        wheel.reschedule(id, deadline_ms);
                        model.set(item, id, deadline_ms);
                        prop_assert_eq!(wheel.deadline_ms(id), deadline_ms);
                        settings += 1;
                    },
                    Op::Step { to, steps } => {
                        let to_ms = to.from(model.now_ms);
                        for _ in 0..steps {
                            let step = wheel.step(to_ms);
                            moves += usize::from(step == Step::Moved);
                            model.accept(to_ms, step);
                            if step == Step::Idle {
                                break;
                            }
                        }
                    }
                    Op::StepAtWake => if let Some(wake_ms) = wheel.next_wake_ms() {
                        let step = wheel.step(wake_ms);
                        prop_assert_ne!(step, Step::Idle, "woken for nothing");
                        moves += usize::from(step == Step::Moved);
                        model.accept(wake_ms, step);
                    },
                }
                wheel.validate();
                prop_assert_eq!(wheel.len(), model.entries.len());
                prop_assert_eq!(wheel.next_wake_ms().is_some(), model.earliest_ms().is_some());
                // What is late may be due before the time that the wheel has reached.
                let bound_ms = model.earliest_ms().map(|ms| ms.max(model.now_ms));
                prop_assert!(wheel.next_wake_ms() <= bound_ms);
                prop_assert!(moves <= settings * (LEVELS - 1), "an entry moves down only");
            }
            let mut step = Step::Moved;
            for _ in 0..=wheel.len() * LEVELS {
                step = wheel.step(end);
                model.accept(end, step);
                if step == Step::Idle {
                    break;
                }
            }
            prop_assert_eq!(step, Step::Idle, "endless steps");
            wheel.validate();
            prop_assert_eq!(wheel.len(), model.entries.len());
        }
    }
}
