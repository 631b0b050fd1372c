//! Checkpoints: the index is written, and what it stood for at the opening is checked.
//!
//! An index covers sealed segments only: entries for the slots that point into them. Whatever else the table says is for the other
//! segments to tell, which the next opening reads (`journal::index`, `recovery`).
//!
//! - **X1** Of the sealed segments those are left out whose records mask what a segment that isn't sealed may hold
//!   (`Journal::coverable`): of what they say there may be no slot.
//! - **X2** A slot whose owner's verdict may be in a segment that the index covers is waited for: it points to the verdict then.
//! - **X3** All that the table said when its slots were copied is durable before the index counts: no power cut takes a record
//!   that a slot pointed to, and leaves the index without what it pointed to before.
//! - **X4** No index counts when records are overwritten: its entries would lead to them.
//!
//! All of it holds the `space` lock, so that no record is moved, removed or overwritten meanwhile.

use crate::erase::Space;
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::Fingerprint;
use crate::journal::index::{Chunk, Covered, Directory, Holds, put_entry};
use crate::journal::segment::Segment;
use crate::journal::{SegmentMap, Stream};
use crate::state::Phase;
use crate::store::Engine;
use crate::sync::{self, Mutex};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// Segments that an index is to spare the next opening, at the least.
const WORTHWHILE: usize = 4;
/// How long, and how often, a verdict under way is waited for.
const PAUSE: Duration = Duration::from_millis(1);
const PATIENCE: usize = 1000;

/// Whether indexes are written, and which segments the last one covers.
#[derive(Debug)]
pub(crate) struct Checkpoints {
    is_wanted: bool,
    spared: Mutex<Spared>,
}

/// Numbers of segments that the next opening need not read.
#[derive(Debug, Default)]
struct Spared {
    by_index: BTreeSet<u64>,
    /// Those for which writing one failed: that is not tried again for them alone.
    in_vain: BTreeSet<u64>,
}

impl Checkpoints {
    /// `spared`: the segments that the store's own opening was spared.
    pub(crate) fn new(is_wanted: bool, spared: BTreeSet<u64>) -> Self {
        Checkpoints { is_wanted, spared: Mutex::new(Spared { by_index: spared, in_vain: BTreeSet::new() }) }
    }
}

impl Engine {
    /// Writes an index if enough was sealed that the last one does not cover: at least a third of all, so that a store that grows
    /// writes each key's entry some three times. One that mostly covers what is gone is dropped.
    pub(crate) fn checkpoint(&self) -> Result<()> {
        if !self.is_checkpoint_due() {
            return Ok(());
        }
        let space = self.space.lock();
        if self.mostly_gone() {
            self.journal.drop_index()?;
            *self.checkpoints.spared.lock() = Spared::default();
        }
        if !self.is_checkpoint_due() || !space.is_settled() {
            return Ok(());
        }
        let is_short = self.journal.coverable().len() * 3 < self.sealed().len() * 2;
        if is_short && self.journal.has_spare_for_callers() {
            // X1: of long answers there are many segments to one of reservations.
            self.journal.cut(Stream::RESERVATIONS)?;
            while self.journal.seal_one()? {}
        }
        let coverable = self.journal.coverable();
        if self.uncovered(&coverable) < WORTHWHILE {
            return Ok(());
        }
        match self.write_index(&space, coverable) {
            Err(error) if error.kind() != ErrorKind::Poisoned => {
                self.upkeep.count_failure();
                Ok(())
            }
            answer => answer,
        }
    }

    /// Writes an index of all that there is, unless the one that counts covers the same.
    pub(crate) fn write_last_index(&self, space: &Space) -> Result<()> {
        let coverable = self.journal.coverable();
        let is_covered = {
            let spared = self.checkpoints.spared.lock();
            coverable.iter().all(|segment| spared.by_index.contains(&segment.number()))
        };
        if is_covered && self.journal.has_index() { Ok(()) } else { self.write_index(space, coverable) }
    }

    fn sealed(&self) -> Vec<Arc<Segment>> {
        self.all_segments().into_iter().filter(|segment| segment.is_sealed()).collect()
    }

    pub(crate) fn is_checkpoint_due(&self) -> bool {
        if !self.checkpoints.is_wanted || self.journal.poison.is_set() {
            return false;
        }
        let sealed = self.sealed();
        let uncovered = self.uncovered(&sealed);
        self.mostly_gone() || uncovered >= WORTHWHILE && uncovered * 3 >= sealed.len()
    }

    /// Whether of what the index covers less than half is left.
    fn mostly_gone(&self) -> bool {
        let map = self.journal.segments();
        let spared = self.checkpoints.spared.lock();
        let left = spared.by_index.iter().filter(|number| map.get(**number).is_some()).count();
        left * 2 < spared.by_index.len()
    }

    /// How many of these segments no index covers, nor would have.
    fn uncovered(&self, segments: &[Arc<Segment>]) -> usize {
        let spared = self.checkpoints.spared.lock();
        let is_spared = |number| spared.by_index.contains(&number) || spared.in_vain.contains(&number);
        segments.iter().filter(|segment| !is_spared(segment.number())).count()
    }

    fn write_index(&self, space: &Space, covered: Vec<Arc<Segment>>) -> Result<()> {
        let Some((store_id, upto)) = self.journal.identity() else { return Ok(()) };
        if !self.checkpoints.is_wanted || !space.is_settled() || covered.is_empty() {
            return Ok(());
        }
        self.journal.poison.check()?;
        let numbers = covered.iter().map(|segment| segment.number()).collect();
        *self.checkpoints.spared.lock() = Spared { by_index: BTreeSet::new(), in_vain: numbers };
        let newest_ms = self.journal.newest_ms();
        // Before the slots are copied: no fewer than those will point to.
        let segments = covered.iter().map(|segment| segment.covered()).collect();
        let covered = SegmentMap::new(0, covered);
        let mut directory = Directory {
            store_id,
            segment_len: self.journal.segment_len(),
            upto,
            newest_ms,
            hash_keys: self.hasher.keys(),
            hash_check: self.hasher.check(),
            chunks: Vec::new(),
            segments,
            in_use: Vec::new(),
        };
        let digest = Cell::new(None);
        let mut next = || {
            if directory.chunks.len() < self.shards.count() {
                let chunk = self.copy_slots(directory.chunks.len(), &covered)?;
                directory.chunks.push(Chunk::of(&chunk));
                return Ok(Some(chunk));
            }
            if digest.get().is_some() {
                return Ok(None);
            }
            // The next opening has to find all that the slots were copied after.
            let others = self.all_segments().into_iter().filter(|segment| covered.get(segment.number()).is_none());
            let written = |segment: Arc<Segment>| {
                let published = segment.published();
                (segment.number(), segment.end().map_or(published, |end| end.min(published)))
            };
            directory.in_use = others.map(written).collect();
            let mut bytes = directory.encode();
            digest.set(Some(Fingerprint::of(&bytes)));
            let trailer = Directory::trailer(&bytes);
            bytes.extend_from_slice(&trailer);
            Ok(Some(bytes))
        };
        self.journal.write_index(&mut next, || digest.get().expect("the directory was the last part"))?;
        let mut spared = self.checkpoints.spared.lock();
        spared.by_index = std::mem::take(&mut spared.in_vain);
        Ok(())
    }

    /// The slots of a shard that point into segments that an index covers.
    fn copy_slots(&self, at: usize, covered: &SegmentMap) -> Result<Vec<u8>> {
        let mut chunk = Vec::new();
        let mut awaited: Option<Vec<_>> = None;
        for _ in 0..PATIENCE {
            chunk.clear();
            let mut completing = Vec::new();
            {
                let shard = self.shards.get(at);
                for (tag, slot) in shard.table.iter() {
                    let word = slot.word();
                    if word.phase() == Phase::Completing {
                        completing.push((tag, word));
                    }
                    if covered.get(self.journal.number_of(word.lsn())).is_some() {
                        let phase = match word.phase() {
                            Phase::Completed => Phase::Completed,
                            // Its owner will be gone.
                            Phase::Reserved | Phase::Completing | Phase::Interrupted => Phase::Reserved,
                            Phase::Vacant | Phase::Released => continue,
                        };
                        put_entry(&mut chunk, tag, word.with(phase).raw());
                    }
                }
            }
            // Those that began since the first look have claimed space in segments that the index doesn't cover.
            match &mut awaited {
                None => awaited = Some(completing),
                Some(awaited) => awaited.retain(|one| completing.contains(one)),
            }
            if awaited.as_ref().is_some_and(Vec::is_empty) || planted!(VerdictNotAwaited) {
                return Ok(chunk);
            }
            sync::sleep(PAUSE);
        }
        Err(Error::new(ErrorKind::Busy, "a verdict took too long to be written for an index to be"))
    }

    /// Checks a segment that was not read at the opening; `true` if there was one. One that can't be read or is damaged is told of
    /// once.
    pub(crate) fn check_one(&self) -> Result<bool> {
        let next = || {
            let to_check = |segment: &Arc<Segment>| !segment.is_checked() && !segment.is_passed_over();
            self.all_segments().into_iter().filter(to_check).min_by_key(|segment| segment.number())
        };
        if next().is_none() {
            return Ok(false);
        }
        // It may be gone by the time that nobody removes any.
        let _space = self.space.lock();
        let Some(segment) = next() else { return Ok(false) };
        self.check_segment(&segment).inspect_err(|_| segment.pass_over())?;
        Ok(true)
    }

    /// Checks all segments that were not read since the opening; nobody overwrites records meanwhile.
    pub(crate) fn check_all_segments(&self) -> Result<()> {
        self.all_segments().iter().try_for_each(|segment| self.check_segment(segment))
    }

    fn check_segment(&self, segment: &Segment) -> Result<()> {
        let path = || self.journal.path_of(segment.base());
        match segment.check().map_err(|source| Error::io("read a segment", &path(), source))? {
            Ok(()) => Ok(()),
            Err(at) => Err(Error::corrupt(&path(), at, "bytes of a sealed segment are no record")),
        }
    }
}

impl Segment {
    /// What an index says of it.
    fn covered(&self) -> Covered {
        let holds = match (self.has_reservations(), self.has_notes()) {
            (true, _) => Holds::Reservations,
            (_, true) => Holds::Notes,
            (false, false) => Holds::Answers,
        };
        let end = self.end().expect("a sealed segment has an end");
        Covered { number: self.number(), end, live_bytes: self.live_bytes(), holds }
    }
}
