//! Erasure: a key is forgotten, and its bytes are overwritten wherever the journal holds them.
//!
//! 1. All claims made so far are published, so that every record of the key can be found.
//! 2. Its slot goes, if it is older than the erasure: from here on its owner is fenced, and no new handle to its records
//!    can be taken. A verdict that its owner claimed space for before is waited for.
//! 3. Every segment is read for records of the key, of any age. What they consist of is made durable, and then a note of
//!    where they are; the note holds no key. From here on a crash is followed by the rest of the work.
//! 4. The records are overwritten, and that is synced. Those that somebody holds a handle to are waited for, and if that
//!    takes too long left to upkeep, which until then keeps their segments, and the note in the journal.
//!
//! All of it holds the `space` lock, so that no record is moved or removed meanwhile.

use crate::error::{Error, ErrorKind, Result};
use crate::journal::codec::{Kind, Meta};
use crate::journal::reader::Target;
use crate::journal::segment::Segment;
use crate::journal::{Stream, codec};
use crate::key::{Key, Request};
use crate::state::{self, Event, Phase, Transition};
use crate::store::{Engine, Erasure};
use crate::table::{Probe, tag_of};
use parking_lot::MutexGuard;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long handles to a record are waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// Records that one note lists, at most; the least segment holds it.
const TARGETS: usize = 1024;

impl Engine {
    pub(crate) fn erase_key(&self, request: &Request<'_>) -> Result<Erasure> {
        self.admit()?;
        self.check_key(&request.key)?;
        self.erase(&|key| *key == request.key, Some(&request.key))
    }

    pub(crate) fn erase_scope(&self, scope: &[u8]) -> Result<Erasure> {
        self.admit()?;
        self.erase(&|key| key.scope == scope, None)
    }

    /// Erases the keys that are meant; if it is one key, it is given too.
    fn erase(&self, is_meant: &dyn Fn(&Key<'_>) -> bool, only: Option<&Key<'_>>) -> Result<Erasure> {
        let mut space = self.space.lock();
        self.journal.poison.check()?;
        // Or a segment that was removed could bring the key back.
        self.journal.sync_names()?;
        let horizon = self.journal.horizon();
        self.journal.quiesce();
        let mut erasure = Erasure::default();
        match only {
            Some(key) => erasure.keys += u64::from(self.vacate(key, horizon)?),
            None => {
                for segment in self.all_segments() {
                    for (_, record) in segment.records().filter(|(_, record)| record.fence() < horizon) {
                        if record.kind().has_key()
                            && let Some(key) = Key::parse(record.stored_key()).filter(is_meant)
                        {
                            erasure.keys += u64::from(self.vacate(&key, horizon)?);
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
                let is_older = record.kind().has_key() && record.fence() < horizon;
                let is_one = is_older && Key::parse(record.stored_key()).is_some_and(|key| is_meant(&key));
                is_one.then_some(Target { lsn, len: record.len() })
            }));
        }
        erasure.records = targets.len() as u64;
        let news: Vec<Target> = targets.iter().copied().filter(|target| !space.unfinished.contains(target)).collect();
        self.overwrite(&mut space, &news)?;
        let until = Instant::now() + PATIENCE;
        while targets.iter().any(|target| space.unfinished.contains(target)) {
            if Instant::now() >= until {
                return Err(Error::new(
                    ErrorKind::Busy,
                    "the key is gone, but a Record handle to one of its answers is still held; its bytes will be \
                     overwritten by the store's upkeep once that is dropped",
                ));
            }
            // Readers end without telling anybody.
            MutexGuard::unlocked(&mut space, || std::thread::sleep(Duration::from_micros(500)));
            self.overwrite_unfinished(&mut space)?;
        }
        Ok(erasure)
    }

    fn all_segments(&self) -> Vec<Arc<Segment>> {
        self.journal.segments().iter().cloned().collect()
    }

    /// Takes a key's slot out if it is older than the erasure; whether there was one.
    fn vacate(&self, key: &Key<'_>, horizon: u64) -> Result<bool> {
        let hash = self.hasher.hash(key);
        let tag = tag_of(hash);
        loop {
            let mut shard = self.shards.of(hash);
            let map = self.journal.segments();
            let at = match shard.find_key(&self.journal, &map, tag, key)? {
                Probe::Found(at) => at,
                Probe::Absent => return Ok(false),
                Probe::Unsettled(word) => {
                    drop(shard);
                    self.journal.wait_published(word.lsn());
                    continue;
                }
            };
            let fence = self.journal.record(&map, shard.table.slot(at).word().lsn())?.fence();
            if fence >= horizon {
                return Ok(false);
            }
            let state = shard.state(shard.table.slot(at), fence, u64::MAX);
            if state::step(state, Event::Erase) == Transition::To(Phase::Vacant) {
                shard.counts.erased += 1;
                self.remove_slot(&mut shard, at);
                shard.wake(fence);
            }
            return Ok(true);
        }
    }

    /// Overwrites records that no slot points to, as far as nobody holds a handle to them.
    pub(crate) fn overwrite(&self, space: &mut Space, targets: &[Target]) -> Result<()> {
        // A record that isn't durable could be lost in a power cut, and the note would then point into nothing.
        self.journal.sync_all()?;
        // Noted first: a record that is overwritten without a note looks damaged if the power fails meanwhile.
        self.note_targets(targets)?;
        space.unfinished.extend_from_slice(targets);
        self.overwrite_unfinished(space)
    }

    /// Writes down what is to be overwritten, for whoever opens the store after a crash.
    pub(crate) fn note_targets(&self, targets: &[Target]) -> Result<()> {
        for targets in targets.chunks(TARGETS) {
            let note = Target::encode(targets);
            let len = codec::record_len(0, note.len()).expect("a note is shorter than any limit");
            let claim = self.journal.claim_for_upkeep(Stream::RESERVATIONS, len)?;
            claim.write(&Meta::bare(Kind::Erase, 0, 0), &[], &note, true)?;
        }
        Ok(())
    }

    /// Overwrites what is noted and not held any more, durably.
    pub(crate) fn overwrite_unfinished(&self, space: &mut Space) -> Result<()> {
        let map = self.journal.segments();
        let poisoned = |doing: &'static str, lsn: u64| {
            move |source: std::io::Error| {
                self.journal.poison.set(doing, &source);
                Error::io(doing, &self.journal.path_of(lsn), source)
            }
        };
        let (held, free): (Vec<Target>, Vec<Target>) = space.unfinished.iter().copied().partition(|target| {
            map.get(self.journal.number_of(target.lsn)).is_some_and(|segment| segment.is_pinned(target.lsn))
        });
        for target in &free {
            let segment = self.journal.segment(&map, target.lsn)?;
            segment.scrub(target.lsn, target.len).map_err(poisoned("overwrite a record", target.lsn))?;
        }
        let mut lsns: Vec<u64> = free.iter().map(|target| target.lsn).collect();
        lsns.dedup_by_key(|lsn| self.journal.number_of(*lsn));
        for lsn in lsns {
            self.journal.segment(&map, lsn)?.blob().sync().map_err(poisoned("sync an erasure", lsn))?;
        }
        space.unfinished = held;
        Ok(())
    }
}

/// What the `space` lock protects beside the journal's space.
#[derive(Debug, Default)]
pub(crate) struct Space {
    /// Records to overwrite as soon as no handle to them is left. Their segments stay, and so does the note of them.
    pub(crate) unfinished: Vec<Target>,
    /// Copies that recovery found and that have to be overwritten before anything is removed.
    pub(crate) strays: Vec<Target>,
}
