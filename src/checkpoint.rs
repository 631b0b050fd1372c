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
use crate::journal::index::{Chunk, Covered, Directory, Holds, INDEX_NAME, put_entry};
use crate::journal::segment::Segment;
use crate::journal::{SegmentMap, Stream};
use crate::state::Phase;
use crate::store::Engine;
use crate::sync::{self, Mutex};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// Segments that an index is to spare the next opening, at the least.
const WORTHWHILE: usize = 4;
/// How long, and how often, a verdict under way is waited for.
const PAUSE: Duration = Duration::from_millis(1);
const PATIENCE: usize = 1000;

/// Whether indexes are written, and which segments the last one was to spare the next opening.
#[derive(Debug)]
pub(crate) struct Checkpoints {
    is_wanted: bool,
    spared: Mutex<BTreeSet<u64>>,
}

impl Checkpoints {
    /// `spared`: the segments that the store's own opening was spared.
    pub(crate) fn new(is_wanted: bool, spared: BTreeSet<u64>) -> Self {
        Checkpoints { is_wanted, spared: Mutex::new(spared) }
    }
}

impl Engine {
    /// Writes an index if there is enough that the last one does not cover: at least a third of all, so that a store that grows
    /// writes each key's entry some three times. One that mostly covers what is gone is dropped.
    pub(crate) fn tend_index(&self, space: &Space) -> Result<()> {
        let sealed: Vec<_> = self.all_segments().into_iter().filter(|segment| segment.is_sealed()).collect();
        let more = self.more_to_spare(&sealed);
        {
            let mut spared = self.checkpoints.spared.lock();
            if (sealed.len() - more) * 2 < spared.len() {
                spared.clear();
                self.journal.drop_index()?;
            }
        }
        if more < WORTHWHILE || more * 3 < sealed.len() || !self.checkpoints.is_wanted {
            return Ok(());
        }
        if self.journal.coverable().len() < sealed.len() {
            // X1: of long answers there are many segments to one of reservations.
            self.journal.cut(Stream::RESERVATIONS)?;
            while self.journal.seal_one()? {}
        }
        match self.write_index(space, self.journal.coverable()) {
            Err(error) if error.kind() != ErrorKind::Poisoned => {
                self.upkeep.count_failure();
                Ok(())
            }
            answer => answer,
        }
    }

    /// Writes an index of all that there is, unless the last one says the same.
    pub(crate) fn write_last_index(&self, space: &Space) -> Result<()> {
        let coverable = self.journal.coverable();
        match self.more_to_spare(&coverable) == 0 && self.journal.has_index() {
            true => Ok(()),
            false => self.write_index(space, coverable),
        }
    }

    /// How many of these segments the last index does not cover.
    fn more_to_spare(&self, segments: &[Arc<Segment>]) -> usize {
        let spared = self.checkpoints.spared.lock();
        segments.iter().filter(|segment| !spared.contains(&segment.number())).count()
    }

    fn write_index(&self, space: &Space, covered: Vec<Arc<Segment>>) -> Result<()> {
        let Some((store_id, upto)) = self.journal.identity() else { return Ok(()) };
        if !self.checkpoints.is_wanted || !space.is_settled() || covered.is_empty() {
            return Ok(());
        }
        self.journal.poison.check()?;
        // Also if it fails: a full disk, say, has other worries for now.
        *self.checkpoints.spared.lock() = covered.iter().map(|segment| segment.number()).collect();
        let written_ms = self.clock.now_ms();
        // Before the slots are copied: no fewer than those will point to.
        let segments = covered.iter().map(|segment| segment.covered()).collect();
        let covered = SegmentMap::new(0, covered);
        let mut directory = Directory {
            store_id,
            segment_len: self.journal.segment_len(),
            upto,
            written_ms,
            hash_keys: self.hasher.keys(),
            hash_check: self.hasher.check(),
            chunks: Vec::new(),
            segments,
        };
        let mut digest = None;
        self.journal.write_file(INDEX_NAME, &mut || {
            if directory.chunks.len() < self.shards.count() {
                let chunk = self.copy_slots(directory.chunks.len(), &covered)?;
                directory.chunks.push(Chunk::of(&chunk));
                return Ok(Some(chunk));
            }
            if digest.is_some() {
                return Ok(None);
            }
            let mut bytes = directory.encode();
            digest = Some(Fingerprint::of(&bytes));
            let trailer = Directory::trailer(&bytes);
            bytes.extend_from_slice(&trailer);
            Ok(Some(bytes))
        })?;
        if !planted!(IndexBeforeSync) {
            self.journal.sync_all()?;
        }
        self.journal.commit_index(digest.expect("the directory was the last part"))
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

    /// Checks a segment that was not read at the opening; `true` if there was one.
    ///
    /// A damaged one is told of once.
    pub(crate) fn check_one(&self) -> Result<bool> {
        let is_next = |segment: &&Arc<Segment>| !segment.is_checked() && segment.damage().is_none();
        let map = self.journal.segments();
        match map.iter().filter(is_next).min_by_key(|segment| segment.number()) {
            None => Ok(false),
            Some(_) => {
                // It may be gone by the time that nobody removes any.
                let _space = self.space.lock();
                let map = self.journal.segments();
                let next = map.iter().filter(is_next).min_by_key(|segment| segment.number());
                next.map_or(Ok(()), |segment| self.check_segment(segment))?;
                Ok(next.is_some())
            }
        }
    }

    /// Checks a segment if it was not read since the opening; nobody overwrites records meanwhile.
    pub(crate) fn check_segment(&self, segment: &Segment) -> Result<()> {
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
