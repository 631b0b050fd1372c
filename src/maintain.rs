//! Upkeep: expiry, seals, space, and a segment ahead. One bounded step at a time, by threads of the store or by callers.
//!
//! When a segment may go:
//!
//! - **U1** Only a sealed segment without live records goes, and never the one with the highest number, so that numbers
//!   and with them fences can't go back. One of notes that are done with may be made a spare of a higher number instead.
//! - **U2** Reservations segments go oldest first: a release in a younger one masks reservations in older ones.
//! - **U3** An answers segment goes only after all reservations segments that were there when it was sealed, durably:
//!   its answers mask their reservations.
//! - **U4** A reservations segment that somebody was promised to find after a power cut goes only when the answers that
//!   took the place of its records are durable too, and then those are promised.
//! - **U5** A copy is durable before its original goes. A copied reservation whose original was superseded while it was
//!   being copied is overwritten at once, since what masks the original need not outlive the copy.

use crate::erase::Space;
use crate::error::{Error, Result};
use crate::journal::Stream;
use crate::journal::reader::Target;
use crate::journal::segment::{Due, Segment};
use crate::key::{Durability, Key};
use crate::mmap::prefetch;
use crate::shard::Locked;
use crate::state::{self, Event, Phase, State, Transition};
use crate::store::Engine;
use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Mutex, MutexGuard};
use crate::table::{Word, tag_of};
use crate::wheel::{self, Step, TimerId};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Wheel steps under one shard lock.
const BATCH: usize = 64;
/// Bytes of a segment that are checked in a step.
const CHECKED_A_STEP: usize = 8 * 1024;
/// What is due within this time makes a block worth another visit.
const SOON_MS: u64 = 100;
/// Slots that are fetched at the same time.
const TOGETHER: usize = 32;
/// How often the upkeep thread looks at the clock.
const TICK: Duration = Duration::from_millis(10);
/// Rounds of expiry before segments are looked at, while more has expired.
const ROUNDS: usize = 64;
/// How often memory is looked at while nothing is needed: appends have ready what they may use meanwhile.
const LONGEST_PAUSE: Duration = Duration::from_millis(40);
/// How long without work means that there is little.
const IDLE: Duration = Duration::from_secs(1);
/// How long an index may wait for a second in which no segment was filled: its sync would write and dirty what is readied ahead of
/// appends.
const LONGEST_RUSH: Duration = Duration::from_secs(10);
/// How long to leave a failing disk alone.
const BACK_OFF: Duration = Duration::from_millis(200);
/// Small sealed segments, as left by restarts, to put up with before they are merged.
const SMALL_SEGMENTS: usize = 16;

/// What upkeep did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Maintained {
    /// Answers whose retention was over.
    pub expired: u64,
    /// Reservations whose lease was over.
    pub interrupted: u64,
    /// Full segments that were synced and sealed.
    pub sealed: u64,
    /// Records that were moved ahead out of mostly dead segments.
    pub relocated: u64,
    /// Segments whose space was given back.
    pub removed: u64,
    /// Whether the budget ran out before the work did.
    pub has_more: bool,
}

/// Where upkeep stands.
#[derive(Debug, Default)]
pub(crate) struct Upkeep {
    next_shard: AtomicUsize,
    failures: AtomicU64,
    /// The segment being emptied, and the LSN to go on from.
    relocation: Mutex<Option<(u64, u64)>>,
}

impl Upkeep {
    pub(crate) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    pub(crate) fn count_failure(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }

    fn back_off(&self) {
        self.count_failure();
        thread::park_timeout(BACK_OFF);
    }
}

/// What letting a block's answers expire came to.
#[derive(Default)]
struct Removed {
    keys: u64,
    steps: usize,
}

/// An answer whose retention is over.
struct Expired {
    hash: u64,
    lsn: u64,
    len: u64,
}

impl Engine {
    pub(crate) fn maintain(&self, budget: usize) -> Result<Maintained> {
        let mut done = Maintained::default();
        while self.journal.seal_one()? {
            done.sealed += 1;
        }
        // Some of the budget is for the rest, however much has expired.
        let rest = budget / 4;
        // What can't be read keeps nothing else from being done.
        let unread = self.check_some(rest);
        let left = self.expire(budget - rest, &mut done)?;
        self.journal.note_durable()?;
        self.reclaim(self.space.lock(), rest + left, &mut done)?;
        self.checkpoint()?;
        // Whoever drives upkeep by hand does so at a pace that one spare is enough for.
        self.journal.want_fewer_spares();
        while self.journal.prepare_spare()? {}
        while self.work_ahead() {}
        done.has_more |= unread?;
        Ok(done)
    }

    /// Checks segments that were not read at the opening, up to some steps; `true` if some are left.
    fn check_some(&self, mut steps: usize) -> Result<bool> {
        while self.check_one()? {
            match steps.checked_sub(self.journal.segment_len() as usize / CHECKED_A_STEP) {
                Some(left) => steps = left,
                None => return Ok(true),
            }
        }
        Ok(false)
    }

    /// Readies some memory; `true` if there was any need.
    fn work_ahead(&self) -> bool {
        self.arena.work_ahead() || self.journal.work_ahead()
    }

    /// Lets what is due end, up to `budget` steps; returns what is left of it.
    fn expire(&self, budget: usize, done: &mut Maintained) -> Result<usize> {
        let left = self.end_leases(budget, done)?;
        let left = self.expire_answers(left, done);
        done.has_more |= left == 0 && self.has_due();
        Ok(left)
    }

    /// Whether anything may end now.
    fn has_due(&self) -> bool {
        let now_ms = self.clock.now_ms();
        let is_due = |segment: &Arc<Segment>| segment.is_due(now_ms);
        self.journal.segments().iter().any(is_due)
            || self.shards.iter().any(|shard| shard.wheel.next_wake_ms().is_some_and(|wake_ms| wake_ms <= now_ms))
    }

    /// Lets answers expire in the order of the journal, block by block; returns what is left of the budget.
    fn expire_answers(&self, budget: usize, done: &mut Maintained) -> usize {
        let mut left = budget;
        let now_ms = self.clock.now_ms();
        for segment in self.journal.segments().iter() {
            while left > 0 {
                // So that no record is overwritten while it is read. Leases don't wait for who takes longer.
                let Some(_space) = self.space.try_lock() else { return left };
                let Some(due) = segment.take_due(now_ms) else { break };
                let removed = self.expire_block(segment, due, now_ms, left);
                done.expired += removed.keys;
                left = left.saturating_sub(removed.steps);
            }
        }
        left
    }

    /// Lets up to `most` answers of a block expire that are over.
    fn expire_block(&self, segment: &Segment, mut due: Due<'_>, now_ms: u64, most: usize) -> Removed {
        let mut removed = Removed::default();
        let mut expired = Vec::with_capacity(TOGETHER);
        let mut earliest_ms = u64::MAX;
        // Those that are kept on, and how many of them not for long.
        let (mut kept, mut soon) = (Vec::new(), 0);
        let mut seen = 0;
        for (lsn, record) in &mut due {
            seen += 1;
            if record.kind().phase() != Some(Phase::Completed) {
                continue;
            }
            let deadline_ms = record.deadline_ms();
            if !state::is_over(deadline_ms, now_ms) {
                earliest_ms = earliest_ms.min(deadline_ms);
                soon += usize::from(deadline_ms <= now_ms.saturating_add(SOON_MS));
                kept.push((lsn, deadline_ms));
            } else if let Some(key) = Key::parse(record.stored_key()) {
                expired.push(Expired { hash: self.hasher.hash(&key), lsn, len: record.len() });
            }
            if expired.len() == TOGETHER.min(most - removed.keys as usize) {
                removed.keys += self.remove_expired(segment, &mut expired);
                if removed.keys as usize == most {
                    // Those before are looked at again then, and are gone.
                    due.leave(now_ms, now_ms);
                    removed.steps = most;
                    return removed;
                }
            }
        }
        removed.keys += self.remove_expired(segment, &mut expired);
        // What was replaced before it was over takes a look, too.
        removed.steps = (removed.keys as usize).max(1 + seen / TOGETHER);
        if (removed.keys as usize + soon) * 4 < kept.len() {
            // They end one by one, and to read the block for each would cost too much.
            removed.steps += kept.len() / 8;
            self.set_timers(segment, &kept);
            earliest_ms = u64::MAX;
        }
        due.leave(earliest_ms, now_ms);
        removed
    }

    /// Gives answers that are keys' newest a timer each, where they have none.
    fn set_timers(&self, segment: &Segment, kept: &[(u64, u64)]) {
        for (lsn, deadline_ms) in kept {
            let record = segment.record(*lsn);
            let Some(key) = record.and_then(|record| Key::parse(record.stored_key())) else { continue };
            let hash = self.hasher.hash(&key);
            let (tag, word) = (tag_of(hash), Word::new(Phase::Completed, *lsn));
            let mut shard = self.shards.of(hash);
            if let Some(at) = shard.find_word(tag, word) {
                shard.advance(at, tag, word, *deadline_ms);
            }
        }
    }

    /// Takes the slots of answers out of the table that are over, where they are the keys' newest; returns how many.
    fn remove_expired(&self, segment: &Segment, expired: &mut Vec<Expired>) -> u64 {
        // Of all first, so that they are waited for at the same time.
        for Expired { hash, .. } in expired.iter() {
            if let Some(start) = self.shards.of(*hash).table.start_of(tag_of(*hash)) {
                prefetch(start);
            }
        }
        let mut removed = 0;
        for Expired { hash, lsn, len } in expired.drain(..) {
            let mut shard = self.shards.of(hash);
            if let Some(at) = shard.find_word(tag_of(hash), Word::new(Phase::Completed, lsn)) {
                shard.counts.expired += 1;
                shard.remove(at);
                segment.sub_live_bytes(len);
                self.uncount_removed();
                removed += 1;
            }
        }
        removed
    }

    /// Ends leases that ran out, up to `budget` steps of the wheels; returns what is left of it.
    fn end_leases(&self, budget: usize, done: &mut Maintained) -> Result<usize> {
        let mut left = budget;
        let count = self.shards.count();
        let first = self.upkeep.next_shard.load(Ordering::Relaxed);
        for at in first..first + count {
            loop {
                if left == 0 {
                    self.upkeep.next_shard.store(at % count, Ordering::Relaxed);
                    return Ok(0);
                }
                let (steps, is_idle) = self.expire_batch(at, left.min(BATCH), done)?;
                left -= steps;
                if is_idle {
                    break;
                }
            }
        }
        self.upkeep.next_shard.store((first + 1) % count, Ordering::Relaxed);
        Ok(left)
    }

    /// Up to `most` steps of one shard's wheel: how many there were, and whether nothing more can end now.
    fn expire_batch(&self, at: usize, most: usize, done: &mut Maintained) -> Result<(usize, bool)> {
        let now_ms = self.clock.now_ms();
        let mut shard = Locked::new(self.shards.get(at));
        for steps in 0..most {
            match shard.wheel.step(now_ms) {
                Step::Idle => return Ok((steps, true)),
                Step::Moved => {}
                Step::Fired(due) => {
                    if !self.fire(&mut shard, &due, now_ms, done)? {
                        return Ok((steps, true));
                    }
                }
            }
        }
        Ok((most, false))
    }

    /// Ends what a timer was set for. False if it is too early, and the timer is the next to fire again.
    fn fire(&self, shard: &mut Locked<'_>, due: &wheel::Due, now_ms: u64, done: &mut Maintained) -> Result<bool> {
        let tag = due.item;
        let Some(at) = shard.find_timer(tag, due.id) else { return Ok(true) };
        shard.table.slot_mut(at).timer = TimerId::NONE.raw();
        let word = shard.table.slot(at).word();
        let state = State { phase: word.phase(), fence: 0, deadline_ms: due.deadline_ms };
        match state::step(state, Event::Elapse(now_ms)) {
            Transition::To(Phase::Vacant) => {
                shard.counts.expired += 1;
                done.expired += 1;
                self.remove_slot(shard, at);
            }
            Transition::To(Phase::Interrupted) => {
                let map = self.journal.segments();
                if self.journal.is_published(&map, word.lsn()) {
                    let fence = self.journal.entry(&map, word.lsn())?.fence();
                    done.interrupted += u64::from(self.lapse(shard, at, tag, fence, now_ms));
                } else {
                    // Its owner is just writing it. The lease ends when it was to end, whoever sees that first.
                    shard.advance(at, tag, word, due.deadline_ms);
                    return Ok(false);
                }
            }
            // The clock was set back: the wheel turns on when the time is again what it was.
            Transition::Stay if due.deadline_ms > now_ms => {
                let again_ms = shard.wheel.elapsed_ms() + 1;
                shard.advance(at, tag, word, again_ms);
            }
            Transition::To(_)
            | Transition::Stay
            | Transition::Replay
            | Transition::InFlight
            | Transition::Mismatch
            | Transition::Fenced => {}
        }
        Ok(true)
    }

    /// Ends a lease that ran out, unless its owner lives and wants it renewed; whether it ended.
    pub(crate) fn lapse(&self, shard: &mut Locked<'_>, at: usize, tag: u32, fence: u64, now_ms: u64) -> bool {
        let word = shard.table.slot(at).word();
        if let Some(lease_ms) = self.auto_renewed.get(&fence) {
            shard.advance(at, tag, word, now_ms.saturating_add(*lease_ms));
            return false;
        }
        shard.advance(at, tag, word.with(Phase::Interrupted), u64::MAX);
        shard.counts.interrupted += 1;
        shard.wake(fence);
        true
    }

    /// Gives space back: removes what is dead, and moves survivors out of what is mostly dead.
    fn reclaim(&self, mut space: MutexGuard<'_, Space>, budget: usize, done: &mut Maintained) -> Result<()> {
        self.catch_up(&mut space)?;
        let mut left = budget;
        loop {
            self.remove_dead_reservations(&space, done)?;
            let pinned = self.remove_dead_answers(&space, done)?;
            if pinned.is_some_and(|masks| masks >= self.journal.active_number(Stream::RESERVATIONS))
                && self.journal.active_number(Stream::RESERVATIONS) > 0
            {
                self.journal.cut(Stream::RESERVATIONS)?;
                while self.journal.seal_one()? {
                    done.sealed += 1;
                }
                continue;
            }
            let Some(victim) = self.choose_victim(pinned.is_some()) else { return Ok(()) };
            if left == 0 {
                done.has_more = true;
                return Ok(());
            }
            if !self.relocate(&mut space, &victim, &mut left, done)? {
                return Ok(());
            }
        }
    }

    fn sealed_segments(&self, reservations: bool) -> Vec<Arc<Segment>> {
        let map = self.journal.segments();
        let newest = map.iter().map(|segment| segment.number()).max();
        let mut segments: Vec<_> = map
            .iter()
            .filter(|segment| segment.is_sealed() && segment.has_reservations() == reservations)
            .filter(|segment| Some(segment.number()) != newest)
            .cloned()
            .collect();
        segments.sort_by_key(|segment| segment.number());
        segments
    }

    /// Removes what needs nothing moved for that; whether there was any.
    pub(crate) fn remove_dead(&self, space: &Space) -> Result<bool> {
        let mut done = Maintained::default();
        while self.journal.seal_one()? {}
        self.remove_dead_reservations(space, &mut done)?;
        self.remove_dead_answers(space, &mut done)?;
        Ok(done.removed > 0)
    }

    fn remove_dead_reservations(&self, space: &Space, done: &mut Maintained) -> Result<()> {
        let (oldest, kept) = (self.oldest_reservations(), space.kept(&self.journal));
        if planted!(ReleaseDroppedEarly) {
            let mut dead = self.sealed_segments(true);
            dead.retain(|segment| segment.is_dead() && !kept.contains(&segment.number()));
            return self.remove_segments(&dead.iter().map(|segment| segment.number()).collect::<Vec<_>>());
        }
        let keeps_from = space.keeps_from(&self.journal);
        let dead: Vec<_> = self
            .sealed_segments(true)
            .into_iter()
            .take_while(|segment| segment.number() < keeps_from)
            .take_while(|segment| segment.is_dead() && !kept.contains(&segment.number()))
            .collect();
        // U2: nothing older may be left behind, such as one that waits for its seal.
        if dead.first().is_none_or(|first| Some(first.number()) != oldest) {
            return Ok(());
        }
        if dead.iter().any(|segment| segment.is_promised() && !planted!(PromiseForgotten) || segment.has_moved()) {
            // What takes the place of promised records is promised itself from here on.
            if planted!(PromiseNotInherited) { self.journal.sync_all()? } else { self.journal.promise_all()? }
        }
        let mut oldest: Vec<u64> = self.journal.segments().reservations().collect();
        oldest.sort_unstable();
        // Together, so that no power cut takes the younger ones and leaves the older.
        let dead: Vec<u64> = dead
            .iter()
            .map(|segment| segment.number())
            .zip(oldest)
            .take_while(|(a, b)| a == b)
            .map(|(a, _)| a)
            .collect();
        self.remove_segments(&dead)?;
        done.removed += dead.len() as u64;
        self.journal.sync_names()
    }

    fn remove_segments(&self, numbers: &[u64]) -> Result<()> {
        if numbers.is_empty() { Ok(()) } else { self.changing_segments(|| self.journal.remove(numbers)) }
    }

    /// Brings all shards up to date after a change that takes segments away, so that nothing keeps those.
    pub(crate) fn changing_segments<T>(&self, change: impl FnOnce() -> T) -> T {
        // Dropped last, or a segment could be unmapped under a shard's lock.
        let _before = Arc::clone(&self.journal.segments());
        let answer = change();
        for mut shard in self.shards.iter() {
            self.journal.refresh(&mut shard.segments);
        }
        answer
    }

    fn oldest_reservations(&self) -> Option<u64> {
        self.journal.segments().reservations().min()
    }

    /// Removes what may go; returns the highest `masks` of the dead that may not go yet.
    fn remove_dead_answers(&self, space: &Space, done: &mut Maintained) -> Result<Option<u64>> {
        let (oldest, kept) = (self.oldest_reservations(), space.kept(&self.journal));
        let mut pinned = None;
        let mut is_noted = space.unfinished.is_empty();
        let mut dead = Vec::new();
        for segment in self.sealed_segments(false) {
            if !segment.is_dead() || kept.contains(&segment.number()) {
                continue;
            }
            if oldest.is_some_and(|oldest| oldest <= segment.masks()) && !planted!(AnswerDroppedEarly) {
                pinned = pinned.max(Some(segment.masks()));
                continue;
            }
            if segment.has_moved() {
                self.journal.sync_all()?;
            }
            if segment.has_notes() && !is_noted {
                // The note of what is still to be overwritten may go with it.
                self.note_targets(&space.unfinished.iter().copied().collect::<Vec<_>>())?;
                is_noted = true;
            }
            dead.push(segment.number());
        }
        self.remove_segments(&dead)?;
        done.removed += dead.len() as u64;
        self.journal.sync_names()?;
        Ok(pinned)
    }

    /// The segment whose survivors should be moved ahead, if any should.
    fn choose_victim(&self, answers_are_pinned: bool) -> Option<Arc<Segment>> {
        let map = self.journal.segments();
        if let Some((number, _)) = *self.upkeep.relocation.lock()
            && let Some(segment) = map.get(number)
        {
            return Some(Arc::clone(segment));
        }
        let reservations = self.sealed_segments(true);
        if let Some(oldest) = reservations.first()
            && Some(oldest.number()) == self.oldest_reservations()
            && oldest.is_checked()
            && (answers_are_pinned || self.is_wasteful(&reservations))
        {
            return Some(Arc::clone(oldest));
        }
        // To move survivors of others brings none of the dead away.
        let mut living = self.sealed_segments(false);
        living.retain(|segment| !segment.is_dead() && segment.is_checked());
        if self.is_wasteful(&living) {
            let density = |segment: &Arc<Segment>| segment.live_bytes() * 1000 / segment.published();
            return living.into_iter().min_by_key(density);
        }
        let small: Vec<_> = living.iter().filter(|segment| segment.published() < segment.len() / 8).collect();
        let small_bytes: u64 = small.iter().map(|segment| segment.accounted_bytes()).sum();
        let are_too_many = small.len() > SMALL_SEGMENTS || small_bytes > self.journal.segment_len();
        let should_merge = are_too_many || (small.len() > 1 && !self.journal.has_room());
        if should_merge { small.first().map(|segment| Arc::clone(segment)) } else { None }
    }

    /// Whether segments take more than twice what lives in them, and one segment where there is room for that.
    fn is_wasteful(&self, segments: &[Arc<Segment>]) -> bool {
        let used: u64 = segments.iter().map(|segment| segment.published()).sum();
        let live: u64 = segments.iter().map(|segment| segment.live_bytes()).sum();
        let allowance = if self.journal.has_room() { self.journal.segment_len() } else { 0 };
        used > 2 * live + allowance
    }

    /// Moves live records of a segment to the ends of their streams; whether it is empty now.
    fn relocate(&self, space: &mut Space, victim: &Segment, left: &mut usize, done: &mut Maintained) -> Result<bool> {
        let from = match *self.upkeep.relocation.lock() {
            Some((number, lsn)) if number == victim.number() => lsn,
            Some(_) | None => victim.first_lsn(),
        };
        for (lsn, _) in victim.records_from(from) {
            if *left == 0 {
                *self.upkeep.relocation.lock() = Some((victim.number(), lsn));
                done.has_more = true;
                return Ok(false);
            }
            *left -= 1;
            done.relocated += u64::from(self.relocate_record(space, victim, lsn)?);
        }
        *self.upkeep.relocation.lock() = None;
        Ok(victim.is_dead())
    }

    fn relocate_record(&self, space: &mut Space, victim: &Segment, lsn: u64) -> Result<bool> {
        let Some(record) = victim.record(lsn) else { return Ok(false) };
        if !record.kind().is_live_kind() {
            return Ok(false);
        }
        let Some(key) = Key::parse(record.stored_key()) else { return Ok(false) };
        let hash = self.hasher.hash(&key);
        let tag = tag_of(hash);
        {
            let shard = self.shards.of(hash);
            let Some(at) = shard.find_lsn(tag, lsn) else { return Ok(false) };
            if shard.table.slot(at).word().phase() == Phase::Completing {
                return Ok(false);
            }
        }
        let meta = record.meta();
        let stream = if victim.has_reservations() {
            Stream::RESERVATIONS
        } else {
            Stream::of_answers(meta.deadline_ms.saturating_sub(self.clock.now_ms()))
        };
        // U5: whoever removes the victim syncs first.
        if !planted!(CopyNotSynced) {
            victim.set_moved();
        }
        let mut claim = match self.journal.claim_for_upkeep(stream, record.len()) {
            Err(error) if error.is_full() && self.recycle_notes(space)? => {
                self.journal.claim_for_upkeep(stream, record.len())?
            }
            Err(error) if error.is_full() && stream != Stream::RESERVATIONS => {
                self.journal.claim_any_for_answer(record.len()).ok_or(error)?
            }
            answer => answer?,
        };
        let copy = claim.lsn();
        if !planted!(CopyNotCounted) {
            claim.add_live();
        }
        claim.write(&meta, &[record.stored_key()], record.payload(), false)?;
        {
            let mut shard = self.shards.of(hash);
            let at = shard.find_lsn(tag, lsn).filter(|at| shard.table.slot(*at).word().phase() != Phase::Completing);
            if let Some(at) = at {
                let slot = shard.table.slot_mut(at);
                let word = slot.word();
                let moved = slot.advance(word, Word::new(word.phase(), copy));
                debug_assert!(moved, "slots change only under their shard's lock");
                if word.phase() == Phase::Completed {
                    claim.note_deadline(meta.deadline_ms);
                }
                self.sub_live(lsn);
                return Ok(true);
            }
        }
        self.sub_live(copy);
        if victim.has_reservations() {
            let copy = Target { lsn: copy, len: record.len() };
            self.overwrite(space, &[copy]).inspect_err(|_| space.leave_a_record())?;
        }
        Ok(false)
    }
}

/// The store's threads.
#[derive(Debug)]
pub(crate) struct Workers {
    stop: Arc<AtomicBool>,
    engine: Arc<Engine>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Workers {
    pub(crate) fn start(engine: &Arc<Engine>, background: bool) -> Result<Workers> {
        let workers = Workers { stop: Arc::default(), engine: Arc::clone(engine), threads: Mutex::new(Vec::new()) };
        if background {
            // The first callers needn't wait for what is quickly made. If it can't be, they get to know.
            if engine.limits.durability == Durability::Buffered {
                while let Ok(true) = engine.journal.prepare_spare() {}
            }
            workers.spawn("oncekey-ahead", tend_spares)?;
            workers.spawn("oncekey-memory", tend_memory)?;
            workers.spawn("oncekey-seal", tend_seals)?;
            workers.spawn("oncekey-upkeep", tend_table)?;
        }
        Ok(workers)
    }

    fn spawn(&self, name: &str, tend: fn(&Engine, &AtomicBool)) -> Result<()> {
        let (engine, stop) = (Arc::clone(&self.engine), Arc::clone(&self.stop));
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || tend(&engine, &stop))
            .map_err(|source| Error::io("start a thread for", std::path::Path::new(name), source))?;
        self.threads.lock().push(thread);
        Ok(())
    }

    pub(crate) fn stop(&self) {
        // In a child the threads aren't there to be joined.
        if !self.engine.fork.is_ours() {
            return;
        }
        self.stop.store(true, Ordering::Release);
        self.engine.journal.spare_bell.ring();
        self.engine.journal.memory_bell.ring();
        self.engine.journal.seal_bell.ring();
        // Not under the lock: one of them may come here too, by a waker that closes or drops the store.
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            thread.thread().unpark();
            if thread.thread().id() != thread::current().id() {
                // A thread of ours that panicked has said so on standard error.
                thread.join().ok();
            }
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Keeps spares ready.
fn tend_spares(engine: &Engine, stop: &AtomicBool) {
    while !stop.load(Ordering::Acquire) {
        match engine.journal.prepare_spare() {
            Ok(true) => {}
            Ok(false) => {
                if !engine.journal.spare_bell.wait(IDLE) {
                    engine.journal.want_fewer_spares();
                }
            }
            Err(_) => engine.upkeep.back_off(),
        }
    }
}

/// Readies memory ahead of who needs it. It never waits for a disk, which others may do for longer than what is ready lasts.
fn tend_memory(engine: &Engine, stop: &AtomicBool) {
    let mut pause = TICK;
    while !stop.load(Ordering::Acquire) {
        if engine.work_ahead() {
            pause = TICK;
        } else {
            engine.journal.memory_bell.wait(pause);
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }
}

/// Seals what is full, writes indexes, and checks what one stood for; all of that takes long, so nothing else waits for it.
fn tend_seals(engine: &Engine, stop: &AtomicBool) {
    let mut due_since: Option<Instant> = None;
    let mut is_calm = false;
    while !stop.load(Ordering::Acquire) {
        due_since = if engine.is_checkpoint_due() { due_since.or_else(|| Some(Instant::now())) } else { None };
        let is_time = due_since.is_some_and(|since| is_calm || since.elapsed() >= LONGEST_RUSH);
        let step = match engine.journal.seal_one() {
            Ok(true) => continue,
            Ok(false) if is_time => engine.checkpoint().and_then(|()| engine.check_one()),
            Ok(false) => engine.check_one(),
            Err(error) => Err(error),
        };
        match step {
            // Not without a pause: others need the processor and the disk.
            Ok(is_at_it) => is_calm = !engine.journal.seal_bell.wait(if is_at_it { TICK } else { IDLE }) && !is_at_it,
            Err(_) => engine.upkeep.back_off(),
        }
    }
}

/// Lets keys expire and gives space back.
fn tend_table(engine: &Engine, stop: &AtomicBool) {
    let mut rounds = 0;
    while !stop.load(Ordering::Acquire) {
        let mut done = Maintained::default();
        let expired = engine.expire(16 * 1024, &mut done);
        if stop.load(Ordering::Acquire) {
            // By a waker that closed the store just now.
            return;
        }
        let noted = expired.and_then(|_| engine.journal.note_durable());
        // Many keys go faster than files do; so first up to a million of them.
        rounds += 1;
        if noted.is_ok() && done.has_more && rounds % ROUNDS > 0 {
            continue;
        }
        let step = noted.and_then(|()| match engine.space.try_lock() {
            Some(space) => engine.reclaim(space, 1024, &mut done),
            None => Ok(()),
        });
        match step {
            Ok(()) if done.has_more => {}
            Ok(()) => thread::park_timeout(TICK),
            Err(_) => engine.upkeep.back_off(),
        }
    }
}
