//! Erasure: a key is forgotten, and its bytes are overwritten wherever the journal holds them.
//!
//! 1. All claims made so far are published, so that every record of the key can be found.
//! 2. Its slot goes, unless the key was free since the erasure began and is used anew: from here on its owner is fenced, and
//!    no new handle to its records can be taken. A verdict that its owner claimed space for before is waited for.
//! 3. Every segment is read for records of the key, of any age.
//! 4. In batches: what they consist of is made durable, and then a note of where they are; the note holds no key. From here
//!    on a crash is followed by the rest of the batch. The records are overwritten, and that is synced.
//! 5. Those that somebody holds a handle to are waited for, and if that takes too long left to upkeep, which until then
//!    keeps their segments, and the note in the journal.
//!
//! - **E1** Of a key's records the one that recovery would choose goes last, so that a crash between two batches leaves each
//!   key as it was, or gone.
//!
//! All of it holds the `space` lock, so that no record is moved or removed meanwhile.

use crate::error::{Error, ErrorKind, Result};
use crate::journal::codec::{HEADER, Kind, Meta};
use crate::journal::reader::Target;
use crate::journal::segment::Segment;
use crate::journal::{Journal, Stream, codec};
use crate::key::{Key, Request};
use crate::shard::Wakers;
use crate::state::{self, Event, Phase, Transition};
use crate::store::{Engine, Erasure};
use crate::sync::{self, MutexGuard};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long handles to a record are waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long until they are looked at again, at the most.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);
/// Records that one note lists, at most; the least segment holds it.
const TARGETS: usize = 1024;
/// Bytes that such a note takes up, with the mark behind it.
const NOTE: u64 = (2 * HEADER + 16 * TARGETS) as u64;

impl Engine {
    pub(crate) fn erase_key(&self, request: &Request<'_>) -> Result<Erasure> {
        self.admit()?;
        Engine::check_key(&request.key)?;
        self.erase(&|key| *key == request.key, Some(&request.key))
    }

    pub(crate) fn erase_scope(&self, scope: &[u8]) -> Result<Erasure> {
        self.admit()?;
        self.erase(&|key| key.scope == scope, None)
    }

    /// Erases the keys that are meant; if it is one key, it is given too.
    fn erase(&self, is_meant: &dyn Fn(&Key<'_>) -> bool, only: Option<&Key<'_>>) -> Result<Erasure> {
        // Settled when it is dropped, which is after the lock.
        let mut wakers = Wakers::default();
        let mut space = self.space.lock();
        self.catch_up(&mut space)?;
        // Or records could be overlooked.
        self.check_all_segments()?;
        // Or keys would be gone from the table with no way to say so in the journal.
        self.ready_for_note(&space)?;
        let horizon = self.journal.horizon();
        self.journal.quiesce();
        let mut erasure = Erasure::default();
        let mut takers = Takers::default();
        let mut vacate = |key: &Key<'_>| -> Result<()> {
            if let Some(fence) = self.vacate(key, horizon, &mut wakers)? {
                erasure.keys += 1;
                if fence >= horizon {
                    takers.insert(key.stored(), fence);
                }
            }
            Ok(())
        };
        match only {
            Some(key) => vacate(key)?,
            None => {
                // Each once: what is found of a key later was reserved since, and may have been taken over since.
                let mut looked_for = BTreeSet::new();
                for segment in self.all_segments() {
                    for (_, record) in segment.records().filter(|(_, record)| record.fence() < horizon) {
                        if record.kind().phase().is_some()
                            && let Some(key) = Key::parse(record.stored_key()).filter(is_meant)
                            && (!looked_for.contains(record.stored_key()) || planted!(KeyErasedTwice))
                        {
                            if planted!(KeyErasedTwice) {
                                // Or nobody gets to store anything meanwhile, on a busy machine.
                                sync::thread::yield_now();
                            }
                            looked_for.insert(record.stored_key().to_vec());
                            vacate(&key)?;
                        }
                    }
                }
            }
        }
        // Verdicts whose space was claimed before their slots went.
        self.journal.quiesce();
        let mut targets = Vec::new();
        for segment in self.all_segments() {
            targets.extend(segment.records().filter_map(|(lsn, record)| {
                let phase = record.kind().phase()?;
                if planted!(ReleaseNotErased) && phase == Phase::Released {
                    return None;
                }
                let is_older = |taker: Option<&u64>| taker.is_some_and(|taker| record.fence() <= *taker);
                if record.fence() >= horizon && !is_older(takers.get(record.stored_key())) {
                    return None;
                }
                Key::parse(record.stored_key()).filter(is_meant)?;
                let precedence = state::precedence(record.fence(), phase, record.sequence());
                Some((precedence, Target { lsn, len: record.len() }))
            }));
        }
        targets.sort_unstable_by_key(|(precedence, _)| *precedence);
        let targets: Vec<Target> = targets.into_iter().map(|(_, target)| target).collect();
        erasure.records = targets.len() as u64;
        space.horizon = horizon;
        space.rest = targets.iter().copied().filter(|target| !space.unfinished.contains(target)).collect();
        self.overwrite_rest(&mut space).map_err(|error| match error.is_full() {
            false => error,
            true => {
                let message = format!(
                    "the keys are gone from the table, but there is no room to note where {} of their records are; \
                     upkeep overwrites them when there is, and until then a restart brings the keys back: {error}",
                    space.rest.len()
                );
                Error::new(error.kind(), message)
            }
        })?;
        MutexGuard::unlocked(&mut space, || drop(wakers));
        let until = Instant::now() + PATIENCE;
        let mut pause = Duration::from_micros(500);
        let mut held = targets;
        loop {
            held.retain(|target| space.unfinished.contains(target));
            if held.is_empty() {
                return Ok(erasure);
            }
            if Instant::now() >= until {
                return Err(Error::new(
                    ErrorKind::Busy,
                    "the key is gone, but a Record handle to one of its answers is still held; its bytes will be \
                     overwritten by the store's upkeep once that is dropped",
                ));
            }
            // Readers end without telling anybody.
            MutexGuard::unlocked(&mut space, || sync::sleep(pause));
            pause = (2 * pause).min(LONGEST_PAUSE);
            self.overwrite_unfinished(&mut space)?;
        }
    }

    pub(crate) fn all_segments(&self) -> Vec<Arc<Segment>> {
        self.journal.segments().iter().cloned().collect()
    }

    /// Takes a key's slot out, unless the key was free since the erasure began; its fence, if there was one.
    fn vacate(&self, key: &Key<'_>, horizon: u64, wakers: &mut Wakers) -> Result<Option<u64>> {
        let Some((mut shard, at)) = self.find(self.hasher.hash(key), key)? else { return Ok(None) };
        let record = self.journal.entry(&shard.segments, shard.table.slot(at).word().lsn())?;
        let fence = record.fence();
        // Who took over goes on with what is to be forgotten.
        if fence >= horizon && record.attempt() == 1 {
            return Ok(None);
        }
        let state = shard.state(shard.table.slot(at), fence, u64::MAX);
        if state::step(state, Event::Erase) == Transition::To(Phase::Vacant) {
            shard.counts.erased += 1;
            self.remove_slot(&mut shard, at);
            shard.wake(fence);
            shard.unlock_into(wakers);
        }
        Ok(Some(fence))
    }

    /// Does what was left undone; removals and further erasures come after it.
    pub(crate) fn catch_up(&self, space: &mut Space) -> Result<()> {
        self.journal.poison.check()?;
        // A removal may have been followed by an error, and a segment that comes back brings erased bytes back for a while.
        self.journal.sync_names()?;
        if !space.unfinished.is_empty() {
            self.overwrite_unfinished(space)?;
        }
        self.overwrite_rest(space)
    }

    /// Overwrites the rest, a note at a time.
    fn overwrite_rest(&self, space: &mut Space) -> Result<()> {
        while !space.rest.is_empty() {
            self.ready_for_note(space)?;
            let batch: Vec<Target> = space.rest.iter().take(TARGETS).copied().collect();
            self.overwrite(space, &batch)?;
            space.rest.drain(..batch.len());
        }
        Ok(())
    }

    /// Makes sure that there is room for a note, if need be that of earlier notes or of what is dead.
    fn ready_for_note(&self, space: &Space) -> Result<()> {
        loop {
            match self.journal.make_room(Stream::NOTES, NOTE) {
                Err(error) if error.is_full() => {
                    let has_made_room = self.recycle_notes(space)? || space.may_remove() && self.remove_dead(space)?;
                    if !has_made_room {
                        return Err(error);
                    }
                }
                answer => return answer,
            }
        }
    }

    /// Makes a spare of the segment of notes if all of them are done with; whether it did.
    pub(crate) fn recycle_notes(&self, space: &Space) -> Result<bool> {
        if !space.unfinished.is_empty() {
            return Ok(false);
        }
        self.changing_segments(|| self.journal.recycle_notes())
    }

    /// Overwrites records that no slot points to, as far as nobody holds a handle to them.
    pub(crate) fn overwrite(&self, space: &mut Space, targets: &[Target]) -> Result<()> {
        if !planted!(IndexKept) {
            // X4
            self.journal.drop_index()?;
        }
        // A record that isn't durable could be lost in a power cut, and the note would then point into nothing.
        self.journal.sync_all()?;
        // Noted first: a record that is overwritten without a note looks damaged if the power fails meanwhile.
        self.note_targets(targets)?;
        space.unfinished.extend(targets);
        self.overwrite_unfinished(space)
    }

    /// Writes down what is to be overwritten, for whoever opens the store after a crash.
    pub(crate) fn note_targets(&self, targets: &[Target]) -> Result<()> {
        for targets in targets.chunks(TARGETS) {
            let note = Target::encode(targets);
            let len = codec::record_len(0, note.len()).expect("a note is shorter than any limit");
            let mut claim = self.journal.claim_for_upkeep(Stream::NOTES, len)?;
            claim.write(&Meta::bare(Kind::Erase, 0, 0), &[], &note, !planted!(NoteNotSynced))?;
        }
        Ok(())
    }

    /// Overwrites what is noted and not held any more, durably.
    pub(crate) fn overwrite_unfinished(&self, space: &mut Space) -> Result<()> {
        let map = self.journal.segments();
        // What is noted is overwritten at the next opening.
        let poison = |doing, result: std::io::Result<()>| {
            result.or_else(|source| {
                self.journal.poison.set(doing, &source);
                self.journal.poison.check()
            })
        };
        let (held, free): (BTreeSet<Target>, BTreeSet<Target>) = space.unfinished.iter().copied().partition(|target| {
            map.get(self.journal.number_of(target.lsn)).is_some_and(|segment| segment.is_pinned(target.lsn))
        });
        for target in &free {
            let segment = self.journal.segment(&map, target.lsn)?;
            poison("overwrite a record", segment.scrub(target.lsn, target.len))?;
        }
        let changed: BTreeSet<u64> = free.iter().map(|target| self.journal.number_of(target.lsn)).collect();
        for segment in changed.iter().filter_map(|number| map.get(*number)).filter(|_| !planted!(ErasureNotSynced)) {
            poison("sync an erasure", segment.sync())?;
        }
        space.unfinished = held;
        Ok(())
    }
}

/// Fences of those who took a key over after the erasure began, by stored key: their records are overwritten too.
type Takers = BTreeMap<Vec<u8>, u64>;

/// What the `space` lock protects beside the journal's space.
#[derive(Debug, Default)]
pub(crate) struct Space {
    /// Records to overwrite as soon as no handle to them is left. Their segments stay, and so does the note of them.
    pub(crate) unfinished: BTreeSet<Target>,
    /// Records to overwrite that no note lists yet, in this order. Their segments stay.
    rest: VecDeque<Target>,
    /// Whether records were left that nothing but what is in the journal masks.
    has_left_records: bool,
    /// The erasure that `rest` is of is about fences below this; 0 if they are those that recovery found.
    horizon: u64,
}

impl Space {
    /// With what recovery found: records that others beat which may go before them.
    pub(crate) fn with_strays(strays: Vec<Target>) -> Self {
        Space { rest: strays.into(), ..Space::default() }
    }

    /// Whether nothing is left, or was ever left, to overwrite.
    pub(crate) fn is_settled(&self) -> bool {
        self.unfinished.is_empty() && self.rest.is_empty() && !self.has_left_records
    }

    /// A record was left that should have been overwritten, and no note of it.
    pub(crate) fn leave_a_record(&mut self) {
        self.has_left_records = true;
    }

    /// Whether anything may be removed before the rest is overwritten.
    fn may_remove(&self) -> bool {
        self.rest.is_empty() || self.horizon > 0
    }

    /// Numbers of the segments that hold records still to be overwritten.
    pub(crate) fn kept(&self, journal: &Journal) -> BTreeSet<u64> {
        self.unfinished.iter().chain(&self.rest).map(|target| journal.number_of(target.lsn)).collect()
    }

    /// Number of the first reservations segment that has to stay: a key of which no note says yet that it was erased may
    /// have been used anew, and what was released or expired since masks what was to be erased.
    pub(crate) fn keeps_from(&self, journal: &Journal) -> u64 {
        if self.rest.is_empty() { u64::MAX } else { journal.number_of(self.horizon) }
    }
}
