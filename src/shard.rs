//! What one shard lock protects: a table, its wheel, and the callers who wait for a key's owner.

use crate::error::Result;
use crate::journal::{Entry, Journal, SegmentMap};
use crate::key::Key;
use crate::mmap::Arena;
use crate::state::{Phase, State};
use crate::sync::MutexGuard;
use crate::table::{Slot, Table, Word};
use crate::wheel::{TimerId, Wheel};
use std::collections::{BTreeMap, HashMap};
use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::Waker;

/// Counts of what a shard was asked and what it did, since the store was opened.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) reserved: u64,
    pub(crate) taken_over: u64,
    pub(crate) replayed: u64,
    pub(crate) in_flight: u64,
    pub(crate) mismatched: u64,
    pub(crate) completed: u64,
    pub(crate) failed: u64,
    pub(crate) released: u64,
    pub(crate) interrupted: u64,
    pub(crate) expired: u64,
    pub(crate) erased: u64,
    pub(crate) fenced: u64,
}

/// Where the look for a key ended.
#[derive(Debug)]
pub(crate) enum Sought<'m> {
    /// The key's slot, and the record that it points to.
    Found(usize, Entry<'m>),
    Absent,
    /// This slot's record can't be read yet, or has yet to be checked; it may be another key's.
    Unsettled(Word),
}

#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) table: Table,
    pub(crate) wheel: Wheel,
    pub(crate) counts: Counts,
    /// The journal's segments, which are at least all those that the table's records lie in (J6).
    pub(crate) segments: Arc<SegmentMap>,
    /// Who waits for a reservation's end: by fence, and then by ticket, in the order they came.
    parked: HashMap<u64, BTreeMap<u64, Waker>>,
    tickets: u64,
}

/// A shard under its lock, and the wakers to settle once that is let go.
#[derive(Debug)]
pub(crate) struct Locked<'s> {
    shard: MutexGuard<'s, Shard>,
    /// Rarely any: boxed, so that an empty one costs nothing.
    wakers: Option<Box<Wakers>>,
}

/// Wakers to call or to drop, which is done when this is dropped: with no lock held, since both run code of the user.
#[derive(Debug, Default)]
pub(crate) struct Wakers {
    called: Vec<Waker>,
    dropped: Vec<Waker>,
}

impl Wakers {
    fn append(&mut self, mut more: Wakers) {
        self.called.append(&mut more.called);
        self.dropped.append(&mut more.dropped);
    }
}

impl Drop for Wakers {
    fn drop(&mut self) {
        // One that panics, which the panic hook has told, is no matter of the others, nor of who wakes them.
        for waker in self.called.drain(..) {
            catch_unwind(AssertUnwindSafe(|| waker.wake())).ok();
        }
        for waker in self.dropped.drain(..) {
            catch_unwind(AssertUnwindSafe(|| drop(waker))).ok();
        }
    }
}

impl<'s> Locked<'s> {
    #[inline]
    pub(crate) fn new(shard: MutexGuard<'s, Shard>) -> Self {
        Locked { shard, wakers: None }
    }

    /// Lets the lock go, and leaves the wakers to somebody who holds another.
    pub(crate) fn unlock_into(mut self, wakers: &mut Wakers) {
        if let Some(more) = self.wakers.take() {
            wakers.append(*more);
        }
    }

    #[cold]
    fn wakers(&mut self) -> &mut Wakers {
        self.wakers.get_or_insert_default()
    }

    /// Lets a waker be called when this reservation ends, in place of the one that the ticket stands for.
    pub(crate) fn park(&mut self, fence: u64, ticket: Option<u64>, waker: Waker) -> u64 {
        let shard = &mut *self.shard;
        let ticket = ticket.unwrap_or_else(|| {
            shard.tickets += 1;
            shard.tickets
        });
        let before = shard.parked.entry(fence).or_default().insert(ticket, waker);
        if let Some(before) = before {
            self.wakers().dropped.push(before);
        }
        ticket
    }

    /// Takes a waker back that may have been called meanwhile.
    pub(crate) fn unpark(&mut self, fence: u64, ticket: u64) {
        if let Some(waiters) = self.shard.parked.get_mut(&fence) {
            let waker = waiters.remove(&ticket);
            if waiters.is_empty() {
                self.shard.parked.remove(&fence);
            }
            if let Some(waker) = waker {
                self.wakers().dropped.push(waker);
            }
        }
    }

    /// Wakes all who wait for this reservation.
    #[inline]
    pub(crate) fn wake(&mut self, fence: u64) {
        if !self.shard.parked.is_empty()
            && let Some(waiters) = self.shard.parked.remove(&fence)
        {
            self.wakers().called.extend(waiters.into_values());
        }
    }

    /// Wakes everybody, at close.
    pub(crate) fn wake_all(&mut self) {
        let waiters: Vec<_> = self.shard.parked.drain().flat_map(|(_, waiters)| waiters.into_values()).collect();
        self.wakers().called.extend(waiters);
    }
}

impl Deref for Locked<'_> {
    type Target = Shard;

    #[inline]
    fn deref(&self) -> &Shard {
        &self.shard
    }
}

impl DerefMut for Locked<'_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut Shard {
        &mut self.shard
    }
}

impl Drop for Locked<'_> {
    #[inline]
    fn drop(&mut self) {
        if let Some(wakers) = self.wakers.take() {
            MutexGuard::unlocked(&mut self.shard, || drop(wakers));
        }
    }
}

impl Shard {
    /// A shard whose table has so many slots.
    pub(crate) fn with_capacity(capacity: usize, arena: &Arc<Arena>, now_ms: u64) -> Self {
        Shard {
            table: Table::with_capacity(capacity, arena),
            wheel: Wheel::new(now_ms),
            counts: Counts::default(),
            segments: Arc::default(),
            parked: HashMap::new(),
            tickets: 0,
        }
    }

    /// The state of a slot whose record has this fence and deadline.
    pub(crate) fn state(&self, slot: &Slot, fence: u64, kept_until_ms: u64) -> State {
        let phase = slot.word().phase();
        let deadline_ms = match phase {
            Phase::Reserved if slot.timer != TimerId::NONE.raw() => {
                self.wheel.deadline_ms(TimerId::from_raw(slot.timer))
            }
            Phase::Completed => kept_until_ms,
            Phase::Reserved | Phase::Vacant | Phase::Completing | Phase::Interrupted | Phase::Released => u64::MAX,
        };
        State { phase, fence, deadline_ms }
    }

    /// Adds a key's slot with its timer.
    #[inline]
    pub(crate) fn insert(&mut self, tag: u32, word: Word, deadline_ms: u64) -> usize {
        let timer = if deadline_ms == u64::MAX { TimerId::NONE } else { self.wheel.insert(deadline_ms, tag) };
        self.table.insert(tag, word, timer.raw())
    }

    /// Moves a slot's state on, and its timer with it.
    #[inline]
    pub(crate) fn advance(&mut self, at: usize, tag: u32, to: Word, deadline_ms: u64) {
        let slot = self.table.slot_mut(at);
        let moved = slot.advance(slot.word(), to);
        debug_assert!(moved, "slots change only under their shard's lock");
        let timer = TimerId::from_raw(slot.timer);
        if deadline_ms == u64::MAX {
            slot.timer = TimerId::NONE.raw();
            if timer != TimerId::NONE {
                self.wheel.remove(timer);
            }
        } else if timer == TimerId::NONE {
            slot.timer = self.wheel.insert(deadline_ms, tag).raw();
        } else {
            self.wheel.reschedule(timer, deadline_ms);
        }
    }

    /// Takes a slot out, with its timer.
    pub(crate) fn remove(&mut self, at: usize) {
        let timer = TimerId::from_raw(self.table.slot(at).timer);
        if timer != TimerId::NONE {
            self.wheel.remove(timer);
        }
        self.table.remove(at);
    }

    /// Looks a key up by its real bytes.
    #[inline(always)]
    pub(crate) fn find_key<'m>(
        &self,
        journal: &Journal,
        map: &'m SegmentMap,
        tag: u32,
        key: &Key<'_>,
    ) -> Result<Sought<'m>> {
        let mut failure = None;
        for (at, slot) in self.table.tagged(tag) {
            let word = slot.word();
            let Some(segment) = map.get(journal.number_of(word.lsn())) else {
                failure = Some(word.lsn());
                continue;
            };
            segment.prefetch(word.lsn());
            // Only a reservation is in the table before its record is in the journal.
            if word.phase() == Phase::Reserved && !segment.is_published(journal.offset_of(word.lsn())) {
                return Ok(Sought::Unsettled(word));
            }
            match Entry::read(segment, word.lsn()) {
                Some(entry) if key.matches(entry.stored_key()) || planted!(HashTrusted) => {
                    return Ok(Sought::Found(at, entry));
                }
                Some(_) => {}
                // Or it was just looked at.
                None if segment.has_to_be_looked_at(journal.offset_of(word.lsn()))
                    || Entry::read(segment, word.lsn()).is_some() =>
                {
                    return Ok(Sought::Unsettled(word));
                }
                None => failure = Some(word.lsn()),
            }
        }
        match failure {
            None => Ok(Sought::Absent),
            Some(lsn) => Err(journal.vanished(lsn)),
        }
    }

    /// The slot that holds exactly this word, which it did at `hint` a moment ago.
    #[inline]
    pub(crate) fn find_word_near(&self, hint: usize, tag: u32, word: Word) -> Option<usize> {
        match self.table.get(hint) {
            Some(slot) if slot.word() == word => Some(hint),
            Some(_) | None => self.find_word(tag, word),
        }
    }

    /// The slot that holds exactly this word.
    #[inline]
    pub(crate) fn find_word(&self, tag: u32, word: Word) -> Option<usize> {
        self.table.find(tag, |slot| slot.word() == word)
    }

    /// The slot that points to this record.
    #[inline]
    pub(crate) fn find_lsn(&self, tag: u32, lsn: u64) -> Option<usize> {
        self.table.find(tag, |slot| slot.word().lsn() == lsn)
    }

    /// The slot that this timer belongs to.
    pub(crate) fn find_timer(&self, tag: u32, timer: TimerId) -> Option<usize> {
        self.table.find(tag, |slot| slot.timer == timer.raw())
    }

    /// The slot whose record was written under this fence.
    pub(crate) fn find_fence(&self, tag: u32, fence: u64, journal: &Journal, map: &SegmentMap) -> Option<usize> {
        self.table.find(tag, |slot| {
            let lsn = slot.word().lsn();
            // A record that isn't readable yet belongs to a newer reservation.
            let record = if journal.is_published(map, lsn) { journal.entry(map, lsn).ok() } else { None };
            record.is_some_and(|record| record.fence() == fence || planted!(FenceUnchecked))
        })
    }
}

#[cfg(all(test, oncekey_loom))]
mod loom_tests {
    use super::*;
    use crate::journal::Bell;
    use crate::sync::Mutex;
    use loom::sync::Arc;
    use loom::thread;
    use std::time::Duration;

    const FENCE: u64 = 64;
    const DAY: Duration = Duration::from_secs(24 * 3600);

    /// A shard of one key, whose reservation its owner ends while others wait for that.
    struct Room {
        shard: Mutex<Shard>,
    }

    impl Room {
        fn new() -> Arc<Room> {
            let mut shard = Shard::with_capacity(0, &Arc::default(), 0);
            shard.insert(7, Word::new(Phase::Reserved, FENCE), u64::MAX);
            Arc::new(Room { shard: Mutex::new(shard) })
        }

        fn lock(&self) -> Locked<'_> {
            Locked::new(self.shard.lock())
        }

        /// As a waiter does: look, let the lock go, and sleep until the bell rings.
        fn wait(&self) {
            // Loom does not follow the count of the waker, nor need it.
            let bell = std::sync::Arc::new(Bell::default());
            let waker = Waker::from(std::sync::Arc::clone(&bell));
            let mut ticket = None;
            loop {
                let mut shard = self.lock();
                if shard.find_word(7, Word::new(Phase::Reserved, FENCE)).is_none() {
                    break;
                }
                ticket = Some(shard.park(FENCE, ticket, waker.clone()));
                drop(shard);
                bell.wait(DAY);
            }
            if let Some(ticket) = ticket {
                self.lock().unpark(FENCE, ticket);
            }
        }

        fn end(&self) {
            let mut shard = self.lock();
            let at = shard.find_lsn(7, FENCE).expect("the key is there");
            shard.advance(at, 7, Word::new(Phase::Interrupted, FENCE), u64::MAX);
            shard.wake(FENCE);
        }
    }

    /// One who is not woken is a deadlock, which loom reports.
    fn model(waiters: usize, end: impl Fn(&Room) + Copy + Send + Sync + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.max_branches = 100_000;
        model.check(move || {
            let room = Room::new();
            let mut threads: Vec<_> = (0..waiters)
                .map(|_| {
                    let room = Arc::clone(&room);
                    thread::spawn(move || room.wait())
                })
                .collect();
            let owner = Arc::clone(&room);
            threads.push(thread::spawn(move || end(&owner)));
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            assert!(room.lock().shard.parked.is_empty());
        });
    }

    #[test]
    fn all_who_wait_for_a_reservation_are_woken_by_its_end() {
        model(2, Room::end);
    }

    #[test]
    fn a_waiter_whose_bell_rang_for_nothing_sleeps_on_and_is_woken() {
        model(1, |room| {
            room.lock().wake_all();
            room.end();
        });
    }
}
