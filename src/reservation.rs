//! The right to run an operation, as a guard.

use crate::clock;
use crate::error::{Error, ErrorKind, Result};
use crate::journal::codec::{self, Kind, Meta};
use crate::journal::{Claim, Purpose, Stream};
use crate::key::Retention;
use crate::record::Record;
use crate::shard::Shard;
use crate::state::{self, Event, Phase, State, Transition};
use crate::store::{Engine, Terms, check_retention, lease_ms};
use crate::table::{Word, tag_of};
use smallvec::SmallVec;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// The right to run one operation; its key is in flight to everybody else.
///
/// It ends with [`complete`](Reservation::complete), [`fail`](Reservation::fail) or
/// [`release`](Reservation::release). Dropped without any of them (a panic, a cancelled future, a forgotten branch) it
/// leaves the key *interrupted*: the next caller is told that the operation may have happened. The same follows when its
/// lease runs out; the owner may still complete as long as nobody took the key over.
#[must_use = "a reservation that is dropped leaves its key interrupted"]
pub struct Reservation {
    engine: Arc<Engine>,
    hash: u64,
    /// LSN of the record that the slot points to: the reservation, a recovery point, or where either was moved.
    lsn: u64,
    fence: u64,
    attempt: u32,
    points: u32,
    terms: Terms,
    last_point: Option<Box<[u8]>>,
    is_over: bool,
}

/// A verdict that could not be written; the reservation is given back with it.
///
/// `?` in a function that returns an [`Error`] turns it into that, which drops the reservation and so leaves the key
/// interrupted. In one that returns another error, such as a `Box<dyn Error>`, the reservation lives as long as the error:
/// write `.map_err(oncekey::Error::from)?` to drop it at once.
#[derive(Debug)]
pub struct Unwritten {
    /// Why.
    pub error: Error,
    /// Still the owner of its key, unless the error is of kind `Fenced`, `Closed` or `Forked`.
    pub reservation: Reservation,
}

impl fmt::Display for Unwritten {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl std::error::Error for Unwritten {
    /// What is behind the error, which is itself told by `Display`.
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl From<Box<Unwritten>> for Error {
    fn from(unwritten: Box<Unwritten>) -> Error {
        unwritten.error
    }
}

/// What the owner has to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Complete,
    Fail,
    Release,
    Point,
}

/// The owner's slot as it was before it had its say.
struct Before {
    at: usize,
    word: Word,
    /// Length of the record.
    len: u64,
}

impl Reservation {
    pub(crate) fn new(
        engine: Arc<Engine>,
        hash: u64,
        fence: u64,
        attempt: u32,
        terms: Terms,
        last_point: Option<Box<[u8]>>,
    ) -> Self {
        Reservation { engine, hash, lsn: fence, fence, attempt, points: 0, terms, last_point, is_over: false }
    }

    /// Number of this reservation: greater than that of every earlier one of the store, across restarts.
    ///
    /// Hand it to systems downstream that can refuse writes with an older number.
    pub fn fence(&self) -> u64 {
        self.fence
    }

    /// How often the operation was begun, this time included; greater than 1 only after an interruption.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// The newest recovery point, of this owner or of the one that vanished.
    pub fn last_recovery_point(&self) -> Option<&[u8]> {
        self.last_point.as_deref()
    }

    /// How long the answer will be kept, for this operation only.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` if it is shorter than 1 ms.
    pub fn set_retention(&mut self, retention: Retention) -> Result<()> {
        check_retention(retention)?;
        self.terms.retention = retention;
        Ok(())
    }

    /// Stores the answer, for all who ask again.
    ///
    /// # Errors
    ///
    /// `RecordTooLarge`, `StorageFull`, `Full`: the reservation comes back with the error and is still good.
    /// `Fenced`: the key was taken over or erased, and the answer was not stored. `Poisoned`: it is unknown whether the
    /// answer will be there after a restart. `Closed`, `Forked`.
    pub fn complete(self, answer: impl AsRef<[u8]>) -> Result<Record, Box<Unwritten>> {
        self.answer(Verdict::Complete, answer.as_ref())
    }

    /// Stores a definitive failure, which is replayed like an answer.
    ///
    /// # Errors
    ///
    /// As [`complete`](Reservation::complete).
    pub fn fail(self, answer: impl AsRef<[u8]>) -> Result<Record, Box<Unwritten>> {
        self.answer(Verdict::Fail, answer.as_ref())
    }

    /// Gives the key back: the operation did not happen, and may be tried again, also with another payload.
    ///
    /// # Errors
    ///
    /// As [`complete`](Reservation::complete).
    pub fn release(mut self) -> Result<(), Box<Unwritten>> {
        match self.write(Verdict::Release, b"", false) {
            Ok(_) => {
                self.finish();
                Ok(())
            }
            Err(error) => Err(Box::new(Unwritten { error, reservation: self })),
        }
    }

    /// Starts the lease anew, with the length that it was last given.
    ///
    /// # Errors
    ///
    /// `Fenced` if the key was taken over or erased; `Closed`, `Forked`.
    pub fn renew(&mut self) -> Result<()> {
        self.renew_lease()
    }

    /// Starts the lease anew, with another length from here on: 1 ms to [`MAX_LEASE`](crate::MAX_LEASE).
    ///
    /// # Errors
    ///
    /// As [`renew`](Reservation::renew), and `InvalidArgument` for a length out of range.
    pub fn renew_for(&mut self, lease: Duration) -> Result<()> {
        self.terms.lease_ms = lease_ms(lease)?;
        self.renew_lease()
    }

    fn renew_lease(&mut self) -> Result<()> {
        self.engine.admit()?;
        let tag = tag_of(self.hash);
        let engine = &*self.engine;
        let now_ms = engine.clock.now_ms();
        let mut shard = engine.lock(self.hash);
        let Some(at) = self.own_slot(&shard, Event::Renew(self.fence)) else {
            shard.counts.fenced += 1;
            return Err(Error::fenced(self.fence));
        };
        let word = shard.table.slot(at).word().with(Phase::Reserved);
        shard.advance(at, tag, word, now_ms.saturating_add(self.terms.lease_ms));
        Ok(())
    }

    /// Notes how far the operation got, for the owner that comes after a crash.
    ///
    /// Durable like the reservation itself when it returns; the lease starts anew, with the length that it was last given. Each point replaces the one before; an
    /// empty one takes it back.
    ///
    /// # Errors
    ///
    /// As [`complete`](Reservation::complete); the reservation stays good unless it is `Fenced`.
    pub fn recovery_point(&mut self, point: impl AsRef<[u8]>) -> Result<()> {
        let point = point.as_ref();
        let (_, lsn) = self.write(Verdict::Point, point, false)?;
        self.lsn = lsn;
        if !planted!(PointsNotNumbered) {
            self.points += 1;
        }
        self.last_point = (!point.is_empty()).then(|| point.into());
        Ok(())
    }

    fn answer(mut self, verdict: Verdict, answer: &[u8]) -> Result<Record, Box<Unwritten>> {
        match self.write(verdict, answer, false) {
            Ok((record, _)) => {
                self.finish();
                Ok(record)
            }
            Err(error) => Err(Box::new(Unwritten { error, reservation: self })),
        }
    }

    /// Nothing is left to do when the guard is dropped.
    fn finish(&mut self) {
        self.is_over = true;
        self.stop_renewal();
    }

    fn stop_renewal(&self) {
        if self.terms.auto_renew {
            self.engine.auto_renewed.remove(&self.fence);
        }
    }

    /// The key's slot, if this is its owner and may do what the event says.
    #[inline]
    fn own_slot(&self, shard: &Shard, event: Event) -> Option<usize> {
        let tag = tag_of(self.hash);
        let at = match shard.find_lsn(tag, self.lsn) {
            Some(at) => at,
            // Upkeep may have moved the record; its fence went with it.
            None => shard.find_fence(tag, self.fence, &self.engine.journal, &shard.segments)?,
        };
        let phase = shard.table.slot(at).word().phase();
        match state::step(State { phase, fence: self.fence, deadline_ms: u64::MAX }, event) {
            Transition::Fenced => None,
            Transition::To(_) | Transition::Stay | Transition::Replay | Transition::InFlight | Transition::Mismatch => {
                Some(at)
            }
        }
    }

    /// Writes what the owner says: journal first, and then the table; where there is room, if an answer has to go elsewhere than to those that
    /// live as long. Returns the record, and its LSN.
    fn write(&self, verdict: Verdict, payload: &[u8], is_elsewhere: bool) -> Result<(Record, u64)> {
        let engine = &*self.engine;
        engine.admit()?;
        if payload.len() > engine.limits.max_record_len {
            return Err(Error::new(
                ErrorKind::RecordTooLarge,
                format!("{} bytes are more than max_record_len = {}", payload.len(), engine.limits.max_record_len),
            ));
        }
        engine.journal.poison.check()?;
        let now_ms = engine.clock.now_ms();
        let (stream, kept_until_ms) = self.destination(verdict, now_ms);
        let mut shard = engine.lock(self.hash);
        let own = self.own_slot(&shard, Event::Begin(self.fence)).and_then(|at| {
            let word = shard.table.slot(at).word();
            Some((at, word, engine.journal.entry(&shard.segments, word.lsn()).ok()?))
        });
        let Some((at, word, entry)) = own else {
            shard.counts.fenced += 1;
            return Err(Error::fenced(self.fence));
        };
        let len = codec::record_len(entry.stored_key().len(), payload.len())
            .ok_or_else(|| Error::new(ErrorKind::RecordTooLarge, "the record is longer than the format allows"))?;
        let claim = engine.journal.claim(stream, len);
        let claim = if is_elsewhere { claim.or_else(|| engine.journal.claim_any_for_answer(len)) } else { claim };
        let Some(mut claim) = claim else {
            drop(shard);
            return match engine.journal.turn(stream, Purpose::GoOn) {
                Ok(()) => self.write(verdict, payload, is_elsewhere),
                // Answers of other lifetimes may have room left.
                Err(error) if error.is_full() && stream != Stream::RESERVATIONS && !is_elsewhere => {
                    self.write(verdict, payload, true)
                }
                Err(error) => Err(error),
            };
        };
        let moved = shard.table.slot(at).advance(word, word.with(Phase::Completing));
        debug_assert!(moved, "slots change only under their shard's lock");
        let meta = Meta {
            kind: verdict.kind(),
            fence: self.fence,
            written_ms: now_ms,
            deadline_ms: kept_until_ms,
            attempt: self.attempt,
            sequence: self.points + u32::from(verdict == Verdict::Point),
            fingerprint: entry.fingerprint(),
        };
        // A copy, which is cheaper than what would keep the record in place without the lock.
        let key: SmallVec<[u8; 256]> = SmallVec::from_slice(entry.stored_key());
        let before = Before { at, word, len: entry.len() };
        drop(shard);
        // The slot is `completing`: its record is neither moved nor, until this claim is published, overwritten.
        if verdict.is_live() {
            claim.add_live();
        }
        let record = claim.handle(&meta, key.len(), payload.len());
        let answer = claim.write(&meta, &[&key], payload, self.terms.sync);
        self.settle(verdict, &claim, &meta, &before, answer)?;
        Ok((record, claim.lsn()))
    }

    /// Lets the table follow the journal: to the new record, or back if it could not be written.
    fn settle(
        &self,
        verdict: Verdict,
        claim: &Claim<'_>,
        meta: &Meta,
        before: &Before,
        answer: Result<()>,
    ) -> Result<()> {
        let engine = &*self.engine;
        let tag = tag_of(self.hash);
        let written = Word::new(verdict.settled_phase(), claim.lsn());
        let mut shard = engine.lock(self.hash);
        let word = before.word;
        let at = shard.find_word_near(before.at, tag, word.with(Phase::Completing));
        if verdict.is_live() && (at.is_none() || answer.is_err()) {
            engine.sub_live(written.lsn());
        }
        let Some(at) = at else {
            // Erased meanwhile: the record is there, and dead.
            shard.counts.fenced += 1;
            return Err(Error::fenced(self.fence));
        };
        let event = match &answer {
            Ok(()) => verdict.event(self.fence),
            Err(_) => Event::Resume(self.fence),
        };
        let state = State { phase: Phase::Completing, fence: self.fence, deadline_ms: u64::MAX };
        let Transition::To(phase) = state::step(state, event) else {
            unreachable!("a verdict that was begun ends in {state:?}")
        };
        let lease_end_ms = meta.written_ms.saturating_add(self.terms.lease_ms);
        if answer.is_err() {
            shard.advance(at, tag, word.with(phase), lease_end_ms);
            return answer;
        }
        let count = match verdict {
            Verdict::Complete => &mut shard.counts.completed,
            Verdict::Fail => &mut shard.counts.failed,
            Verdict::Release => &mut shard.counts.released,
            Verdict::Point => {
                shard.advance(at, tag, written, lease_end_ms);
                engine.journal.sub_live_bytes(&shard.segments, word.lsn(), before.len);
                return Ok(());
            }
        };
        *count += 1;
        if verdict == Verdict::Release && planted!(ReleaseKeepsKey) {
            shard.advance(at, tag, word.with(Phase::Interrupted), u64::MAX);
        } else if verdict == Verdict::Release {
            engine.remove_slot(&mut shard, at);
        } else {
            shard.advance(at, tag, written, u64::MAX);
            claim.note_deadline(meta.deadline_ms);
            engine.journal.sub_live_bytes(&shard.segments, word.lsn(), before.len);
        }
        shard.wake(self.fence);
        Ok(())
    }

    /// Which stream the verdict's record goes to, and until when it holds.
    fn destination(&self, verdict: Verdict, now_ms: u64) -> (Stream, u64) {
        match verdict {
            Verdict::Release | Verdict::Point => (Stream::RESERVATIONS, u64::MAX),
            Verdict::Complete | Verdict::Fail => match self.terms.retention {
                Retention::Forever => (Stream::of_answers(u64::MAX), u64::MAX),
                Retention::For(time) => {
                    let until_ms = clock::saturating_add(now_ms, time);
                    (Stream::of_answers(until_ms - now_ms), until_ms)
                }
            },
        }
    }
}

impl Verdict {
    fn kind(self) -> Kind {
        match self {
            Verdict::Complete => Kind::Completed,
            Verdict::Fail => Kind::Failed,
            Verdict::Release => Kind::Released,
            Verdict::Point => Kind::Point,
        }
    }

    /// Whether a slot points to its record.
    fn is_live(self) -> bool {
        self != Verdict::Release
    }

    fn settled_phase(self) -> Phase {
        match self {
            Verdict::Complete | Verdict::Fail => Phase::Completed,
            Verdict::Release => Phase::Released,
            Verdict::Point => Phase::Reserved,
        }
    }

    fn event(self, fence: u64) -> Event {
        match self {
            Verdict::Complete | Verdict::Fail => Event::Complete(fence),
            Verdict::Release => Event::Release(fence),
            Verdict::Point => Event::Resume(fence),
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.stop_renewal();
        if self.is_over {
            return;
        }
        let tag = tag_of(self.hash);
        let mut shard = self.engine.lock(self.hash);
        if let Some(at) = self.own_slot(&shard, Event::Abandon(self.fence)) {
            let word = shard.table.slot(at).word();
            if word.phase() == Phase::Reserved {
                shard.counts.interrupted += 1;
            }
            shard.advance(at, tag, word.with(Phase::Interrupted), u64::MAX);
            if !planted!(WaiterNotWoken) {
                shard.wake(self.fence);
            }
        }
    }
}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reservation")
            .field("fence", &self.fence)
            .field("attempt", &self.attempt)
            .finish_non_exhaustive()
    }
}
