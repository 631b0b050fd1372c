//! The journal: one endless log, in segments of fixed length, written to several streams.
//!
//! An LSN is a byte position in the endless log: segment number times segment length, plus the offset. Segment numbers
//! only grow, and a stream takes segments in order of number, so the LSN of a reservation's record serves as its fence.
//!
//! Reservations have a stream of their own; answers go to one of eight streams by how long they will live, so that
//! the records of a segment die at about the same time and the segment can be removed whole. So have the notes of erasures:
//! nobody else fills their segment, and it is dead when what they say is done.
//!
//! - **J5** No lock is held across I/O but `turn`, `next_number`, `sealing`, `syncing`, `faulting`, `writing_index` and `list`: whoever
//!   takes them waits for that I/O.
//! - **J6** A segment is in the map from before its first record is written until after its removal was decided. Each shard keeps the
//!   map as it was when the shard's lock was last taken, and so the segments in it; who removes some brings all shards up to date.
//! - **J7** After the first failed write or sync nothing is acknowledged any more (`poison`).

pub(crate) mod codec;
pub(crate) mod commit;
pub(crate) mod dues;
pub(crate) mod index;
pub(crate) mod list;
pub(crate) mod media;
pub(crate) mod reader;
pub(crate) mod segment;
pub(crate) mod watermark;

use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::Fingerprint;
use crate::record::Record;
use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex};
use arc_swap::{ArcSwap, Guard};
use codec::{Binding, HEADER, Meta, RecordRef, SEGMENT_HEAD, SegmentHeader};
use commit::Poison;
use crossbeam_utils::CachePadded;
use list::SegmentList;
use media::Storage;
use segment::Segment;
use std::collections::{BTreeSet, VecDeque};
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

/// A sequence of segments whose records live about equally long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stream(usize);

const STREAMS: usize = 10;

impl Stream {
    pub(crate) const RESERVATIONS: Stream = Stream(0);
    /// The last of those for answers.
    pub(crate) const ANSWERS: Stream = Stream(8);
    pub(crate) const NOTES: Stream = Stream(9);

    /// The stream of answers that have so long to live: up to 8 s, 64 s, 8.5 min, 68 min, 9 h, 3 d, 24 d, longer.
    pub(crate) fn of_answers(lifetime_ms: u64) -> Stream {
        let seconds = lifetime_ms.div_ceil(1000).max(1);
        let octave = (seconds - 1).checked_ilog2().map_or(0, |log| log as usize / 3);
        Stream((1 + octave).min(Stream::ANSWERS.0))
    }
}

/// Spares that only upkeep may take, so that a full disk can be emptied by moving survivors.
const HELD_BACK: usize = 1;
/// Spares beside that, at the most.
const MOST_SPARES: usize = 4;
/// Memory to ready in a spare.
const LEAST_LEAD: u64 = 3 << 20;
/// Memory to keep ready ahead of appends: what may come between two looks.
const LEAD: u64 = 15 << 20;
/// Segments below `max_bytes` that no reservation is granted for, so that operations under way can store their answers.
const ROOM_FOR_ANSWERS: usize = 2;
/// The same in spares, on a disk that has no room for another.
const SPARES_FOR_ANSWERS: usize = 1;
/// Without any, the part of a segment that has to be left.
const LEAST_SHARE: u64 = 8;
/// Segments beyond `max_bytes` that upkeep may take for a while, to move survivors of reservations and of answers: a store may
/// be opened with no room left under its limit.
const ROOM_FOR_UPKEEP: u64 = 2;
/// The least that `max_bytes` may allow, in segments: one in use a stream and those held back, and three for what is full.
pub(crate) const LEAST_SEGMENTS: u64 = (STREAMS + HELD_BACK + ROOM_FOR_ANSWERS + 3) as u64;

/// Who needs a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Callers that begin an operation.
    Begin,
    /// Callers that have begun one: answers, releases, recovery points.
    GoOn,
    Upkeep,
}

/// All segments that exist, by number.
#[derive(Debug)]
pub(crate) struct SegmentMap {
    version: u64,
    /// Open addressing by the number itself: most numbers follow each other. A power of two of places, half of them empty.
    places: Box<[Option<Arc<Segment>>]>,
}

impl Default for SegmentMap {
    fn default() -> Self {
        SegmentMap::new(0, Vec::new())
    }
}

impl SegmentMap {
    pub(crate) fn new(version: u64, segments: Vec<Arc<Segment>>) -> Self {
        let count = (segments.len() * 2).next_power_of_two();
        let mut places: Box<[Option<Arc<Segment>>]> = std::iter::repeat_with(|| None).take(count).collect();
        for segment in segments {
            let mut at = segment.number() as usize & (count - 1);
            while places[at].is_some() {
                at = (at + 1) & (count - 1);
            }
            places[at] = Some(segment);
        }
        SegmentMap { version, places }
    }

    #[inline]
    pub(crate) fn get(&self, number: u64) -> Option<&Arc<Segment>> {
        let mask = self.places.len() - 1;
        let mut at = number as usize & mask;
        loop {
            let segment = self.places[at].as_ref()?;
            if segment.number() == number {
                return Some(segment);
            }
            at = (at + 1) & mask;
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Segment>> {
        self.places.iter().flatten()
    }

    /// Numbers of the reservations stream's segments.
    pub(crate) fn reservations(&self) -> impl Iterator<Item = u64> {
        self.iter().filter(|segment| segment.has_reservations()).map(|segment| segment.number())
    }
}

/// What a new journal needs to know.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) store_id: [u8; 16],
    pub(crate) segment_len: u64,
    pub(crate) max_bytes: Option<u64>,
    /// Whether syncs mean anything: not for a store in memory.
    pub(crate) persistent: bool,
}

#[derive(Debug)]
pub(crate) struct Journal {
    storage: Arc<dyn Storage>,
    options: Options,
    /// Which segments there are; none for a store in memory. The last lock to be taken.
    list: Option<Mutex<SegmentList>>,
    /// Held while an index is written.
    writing_index: Mutex<()>,
    map: ArcSwap<SegmentMap>,
    /// That of `map`, for who has a copy of it.
    map_version: CachePadded<AtomicU64>,
    /// Serializes changes of `map`.
    map_writer: Mutex<()>,
    streams: [StreamHead; STREAMS],
    spares: Mutex<VecDeque<Arc<Segment>>>,
    /// Number of a segment that recovery found blank, or that could not be listed; 0 once it was made a spare, if there was
    /// one. Under its own number it can't be: a power cut may have taken reservations in it, whose fences must not be
    /// given out again.
    blank: AtomicU64,
    /// The number of the next segment; held while one is made.
    next_number: Mutex<u64>,
    /// What all segments count for under `max_bytes`.
    used_bytes: AtomicU64,
    /// What they counted for at the opening.
    opened_bytes: u64,
    /// Whether a name was taken away that a power cut could bring back.
    has_dirty_names: AtomicBool,
    /// Whether the disk had no room when a segment was last to be made.
    is_disk_full: AtomicBool,
    /// Spares to keep beside those held back: more while they are used up faster than made.
    wanted_spares: AtomicUsize,
    /// Full segments that wait for their seal.
    retired: Mutex<VecDeque<Arc<Segment>>>,
    /// Held while one is sealed.
    sealing: Mutex<()>,
    pub(crate) poison: Poison,
    /// Rung when a spare was used.
    pub(crate) spare_bell: Bell,
    /// Rung when appends go on in another segment.
    pub(crate) memory_bell: Bell,
    /// Rung when a segment filled up.
    pub(crate) seal_bell: Bell,
    syncs: AtomicU64,
    /// When the newest record was written.
    newest_ms: CachePadded<AtomicU64>,
}

#[derive(Debug)]
struct StreamHead {
    /// The segment that takes records; a full one before the first.
    active: ArcSwap<Segment>,
    turn: Mutex<()>,
}

impl Journal {
    /// A journal over segments that recovery has checked, none of which takes records; `blank` may be made a spare again.
    pub(crate) fn new(
        storage: Arc<dyn Storage>,
        options: Options,
        list: Option<SegmentList>,
        segments: &[Arc<Segment>],
        blank: Option<u64>,
        next_number: u64,
        newest_ms: u64,
    ) -> Result<Self> {
        let full = Arc::new(full_segment()?);
        let head = || StreamHead { active: ArcSwap::from(Arc::clone(&full)), turn: Mutex::default() };
        let mut journal = Journal {
            storage,
            options,
            list: list.map(Mutex::new),
            writing_index: Mutex::default(),
            map: ArcSwap::from_pointee(SegmentMap::new(1, segments.to_vec())),
            map_version: CachePadded::new(AtomicU64::new(1)),
            map_writer: Mutex::default(),
            streams: std::array::from_fn(|_| head()),
            spares: Mutex::default(),
            blank: AtomicU64::new(blank.unwrap_or(0)),
            next_number: Mutex::new(next_number),
            used_bytes: AtomicU64::new(0),
            opened_bytes: 0,
            has_dirty_names: AtomicBool::new(false),
            is_disk_full: AtomicBool::new(false),
            // One for each of the two streams that every operation writes to.
            wanted_spares: AtomicUsize::new(2),
            retired: Mutex::default(),
            sealing: Mutex::default(),
            poison: Poison::default(),
            spare_bell: Bell::default(),
            memory_bell: Bell::default(),
            seal_bell: Bell::default(),
            syncs: AtomicU64::new(0),
            newest_ms: CachePadded::new(AtomicU64::new(newest_ms)),
        };
        journal.count_again();
        Ok(journal)
    }

    pub(crate) fn segment_len(&self) -> u64 {
        self.options.segment_len
    }

    /// Counts anew what all segments take up, some of which gave something back, before anybody else has the journal.
    pub(crate) fn count_again(&mut self) {
        let blank = if self.has_blank() { self.options.segment_len } else { 0 };
        self.opened_bytes = self.map.load().iter().map(|segment| segment.accounted_bytes()).sum::<u64>() + blank;
        self.used_bytes = AtomicU64::new(self.opened_bytes);
    }

    /// When the newest record was written, of those that were published before the call.
    pub(crate) fn newest_ms(&self) -> u64 {
        self.newest_ms.load(Ordering::Relaxed)
    }

    /// Syncs that callers waited for.
    pub(crate) fn syncs(&self) -> u64 {
        self.syncs.load(Ordering::Relaxed)
    }

    /// Number of the segment that an LSN lies in.
    #[inline]
    pub(crate) fn number_of(&self, lsn: u64) -> u64 {
        lsn >> self.options.segment_len.trailing_zeros()
    }

    /// Where in its segment an LSN lies.
    #[inline]
    pub(crate) fn offset_of(&self, lsn: u64) -> u64 {
        lsn & (self.options.segment_len - 1)
    }

    /// The segments as they are now.
    #[inline]
    pub(crate) fn segments(&self) -> Guard<Arc<SegmentMap>> {
        self.map.load()
    }

    /// Brings what a shard has of the segments up to date: its lock is held, and was just taken.
    ///
    /// Whoever put an LSN into the shard had seen its segment in the map, and so sees whoever has the lock after that.
    #[inline]
    pub(crate) fn refresh(&self, segments: &mut Arc<SegmentMap>) {
        // Acquire pairs with the release in `change_map`: who sees the version sees the map.
        if segments.version != self.map_version.load(Ordering::Acquire) {
            self.replace(segments);
        }
    }

    #[cold]
    fn replace(&self, segments: &mut Arc<SegmentMap>) {
        *segments = self.map.load_full();
    }

    /// The record at an LSN that a slot holds, so that it is published and its segment is there.
    #[inline]
    pub(crate) fn entry<'m>(&self, map: &'m SegmentMap, lsn: u64) -> Result<Entry<'m>> {
        let found = map.get(self.number_of(lsn)).and_then(|segment| Entry::read(segment, lsn));
        found.ok_or_else(|| self.vanished(lsn))
    }

    /// The segment of an LSN that a slot holds.
    #[inline]
    pub(crate) fn segment<'m>(&self, map: &'m SegmentMap, lsn: u64) -> Result<&'m Arc<Segment>> {
        map.get(self.number_of(lsn)).ok_or_else(|| self.vanished(lsn))
    }

    /// What has to be durable so that a record survives a power cut, whoever wrote it; `None` if it does.
    pub(crate) fn unsynced(&self, map: &SegmentMap, entry: &Entry<'_>) -> Option<Unsynced> {
        let upto = self.offset_of(entry.lsn) + entry.len();
        if !self.options.persistent || entry.segment.is_durable(upto) {
            return None;
        }
        let segment = Arc::clone(map.get(entry.segment.number())?);
        Some(Unsynced { segment, upto })
    }

    /// Returns when it is durable.
    pub(crate) fn make_durable(&self, unsynced: &Unsynced) -> Result<()> {
        unsynced.segment.make_durable(unsynced.upto, &self.poison)
    }

    /// No slot points any more to the record at an LSN, which is so long.
    #[inline]
    pub(crate) fn sub_live_bytes(&self, map: &SegmentMap, lsn: u64, len: u64) {
        if let Some(segment) = map.get(self.number_of(lsn)) {
            segment.sub_live_bytes(len);
        }
    }

    /// The file that an LSN lies in.
    pub(crate) fn path_of(&self, lsn: u64) -> std::path::PathBuf {
        self.storage.path(&segment_name(self.number_of(lsn)))
    }

    #[cold]
    pub(crate) fn vanished(&self, lsn: u64) -> Error {
        // It may never have been written.
        if let Err(poisoned) = self.poison.check() {
            return poisoned;
        }
        let path = self.path_of(lsn);
        let offset = self.offset_of(lsn);
        Error::corrupt(
            &path,
            offset,
            "a record is damaged, or was changed or removed by another program while the store was open",
        )
    }

    /// Returns when the record at an LSN, which a slot led to, can be read, or is known to be damaged: its writer is at it, or it has yet
    /// to be checked.
    pub(crate) fn settle(&self, lsn: u64) -> Result<()> {
        let map = self.map.load();
        let Some(segment) = map.get(self.number_of(lsn)) else { return Ok(()) };
        let at = self.offset_of(lsn);
        if !segment.has_to_be_looked_at(at) {
            segment.wait_published(at);
            return Ok(());
        }
        segment.look_at(at).map_err(|source| Error::io("read a segment", &self.path_of(lsn), source))
    }

    /// Whether the record at an LSN can be read.
    #[inline]
    pub(crate) fn is_published(&self, map: &SegmentMap, lsn: u64) -> bool {
        match map.get(self.number_of(lsn)) {
            Some(segment) => segment.is_published(self.offset_of(lsn)),
            None => false,
        }
    }

    /// Claims space at the stream's end, without I/O; `None` if the stream needs another segment (see `turn`).
    #[inline]
    pub(crate) fn claim(&self, stream: Stream, len: u64) -> Option<Claim<'_>> {
        let segment = self.streams[stream.0].active.load();
        let start = segment.claim(len)?;
        Some(Claim { journal: self, segment, start, len, open: true })
    }

    /// Claims space for a reservation, without I/O; `None` if there is none (see `turn_to_begin`), or too little for its answer.
    #[inline]
    pub(crate) fn claim_to_begin(&self, len: u64) -> Option<Claim<'_>> {
        if self.is_out_of_disk() { None } else { self.claim(Stream::RESERVATIONS, len) }
    }

    /// Gives reservations a new segment if they need one, and looks whether a full disk has room again.
    pub(crate) fn turn_to_begin(&self) -> Result<()> {
        // Whoever has the lock may be making a segment, which nobody waits for without need.
        if self.is_out_of_disk() {
            let mut next_number = self.next_number.lock();
            if self.is_out_of_disk() {
                self.make_spare(&mut next_number, Purpose::Begin)?;
            }
        }
        self.turn(Stream::RESERVATIONS, Purpose::Begin)
    }

    /// Claims space for upkeep, fetching a new segment if need be. Not to be called under a shard lock.
    pub(crate) fn claim_for_upkeep(&self, stream: Stream, len: u64) -> Result<Claim<'_>> {
        loop {
            self.poison.check()?;
            match self.claim(stream, len) {
                Some(claim) => return Ok(claim),
                None => self.turn(stream, Purpose::Upkeep)?,
            }
        }
    }

    /// Claims space for an answer wherever answers go and there still is some.
    pub(crate) fn claim_any_for_answer(&self, len: u64) -> Option<Claim<'_>> {
        (1..=Stream::ANSWERS.0).find_map(|stream| self.claim(Stream(stream), len))
    }

    /// Gives the stream a new segment, unless another caller just did.
    pub(crate) fn turn(&self, stream: Stream, purpose: Purpose) -> Result<()> {
        let head = &self.streams[stream.0];
        let _turn = head.turn.lock();
        let full = head.active.load_full();
        if full.end().is_none() {
            return Ok(());
        }
        self.poison.check()?;
        let next = self.take_segment(purpose)?;
        next.set_stream(stream);
        head.active.store(next);
        if full.number() > 0 {
            self.retired.lock().push_back(full);
        }
        self.spare_bell.ring();
        self.memory_bell.ring();
        self.seal_bell.ring();
        Ok(())
    }

    /// Makes sure that upkeep can claim so much space at the stream's end; nobody else claims any there meanwhile.
    pub(crate) fn make_room(&self, stream: Stream, len: u64) -> Result<()> {
        let active = self.streams[stream.0].active.load_full();
        if active.has_room_for(len) {
            return Ok(());
        }
        active.fill();
        self.turn(stream, Purpose::Upkeep)
    }

    fn take_segment(&self, purpose: Purpose) -> Result<Arc<Segment>> {
        let kept_back = match purpose {
            Purpose::Begin if self.is_disk_full.load(Ordering::Relaxed) => HELD_BACK + SPARES_FOR_ANSWERS,
            Purpose::Begin | Purpose::GoOn => HELD_BACK,
            Purpose::Upkeep => 0,
        };
        // In order of number, so the one to keep back is never the one to give out.
        let take = || Some(&mut *self.spares.lock()).filter(|spares| spares.len() > kept_back)?.pop_front();
        if let Some(spare) = take() {
            return Ok(spare);
        }
        let wanted = self.wanted_spares.load(Ordering::Relaxed);
        self.wanted_spares.store((wanted + 1).min(MOST_SPARES), Ordering::Relaxed);
        let mut next_number = self.next_number.lock();
        loop {
            // Another thread may just have made one.
            if let Some(spare) = take() {
                return Ok(spare);
            }
            self.make_spare(&mut next_number, purpose)?;
        }
    }

    /// Makes a spare if there are too few, and there is room for it; `true` if it did.
    pub(crate) fn prepare_spare(&self) -> Result<bool> {
        let mut next_number = self.next_number.lock();
        let wanted = HELD_BACK + self.wanted_spares.load(Ordering::Relaxed);
        if self.spares.lock().len() >= wanted || !self.has_blank() && !self.fits_one_more(Purpose::Begin) {
            return Ok(false);
        }
        self.make_spare(&mut next_number, Purpose::Begin)?;
        Ok(true)
    }

    /// Readies some memory for appends, that they come to first; `true` if there was any need.
    pub(crate) fn work_ahead(&self) -> bool {
        fault_in(self.active(), LEAD) || {
            let spares: Vec<_> = self.spares.lock().iter().cloned().collect();
            fault_in(spares, LEAST_LEAD)
        }
    }

    fn active(&self) -> impl Iterator<Item = Arc<Segment>> {
        self.streams.iter().map(|head| head.active.load_full())
    }

    /// Notes that no segment was needed for a while: one spare is enough.
    pub(crate) fn want_fewer_spares(&self) {
        self.wanted_spares.store(1, Ordering::Relaxed);
    }

    fn has_blank(&self) -> bool {
        self.blank.load(Ordering::Relaxed) > 0
    }

    fn fits_one_more(&self, purpose: Purpose) -> bool {
        let Some(max_bytes) = self.options.max_bytes else { return true };
        let limit = match purpose {
            Purpose::Begin | Purpose::GoOn => max_bytes,
            Purpose::Upkeep => {
                self.opened_bytes.max(max_bytes).saturating_add(ROOM_FOR_UPKEEP * self.options.segment_len)
            }
        };
        self.used_bytes.load(Ordering::Relaxed) + self.options.segment_len <= limit
    }

    /// Whether `max_bytes` leaves so many segments that more reservations may be granted.
    #[inline]
    pub(crate) fn has_room(&self) -> bool {
        let Some(max_bytes) = self.options.max_bytes else { return true };
        let needed = (HELD_BACK + ROOM_FOR_ANSWERS).saturating_sub(self.spares_ahead()) as u64;
        self.used_bytes.load(Ordering::Relaxed) + needed * self.options.segment_len <= max_bytes
    }

    /// Whether the disk has none, and too little is left for more reservations and their answers.
    #[inline]
    pub(crate) fn is_out_of_disk(&self) -> bool {
        // Relaxed: whoever sees it late finds out by itself.
        self.is_disk_full.load(Ordering::Relaxed) && self.is_short()
    }

    #[cold]
    fn is_short(&self) -> bool {
        let least = self.options.segment_len / LEAST_SHARE;
        let has_room = |head: &StreamHead| head.active.load().has_room_for(least);
        let spares = self.spares_ahead().saturating_sub(HELD_BACK);
        let for_answers = spares >= SPARES_FOR_ANSWERS || self.streams[1..=Stream::ANSWERS.0].iter().any(has_room);
        // A reservation takes none of those for answers.
        let for_reservations = spares > SPARES_FOR_ANSWERS || has_room(&self.streams[Stream::RESERVATIONS.0]);
        !(for_reservations && for_answers)
    }

    fn spares_ahead(&self) -> usize {
        self.spares.lock().len() + usize::from(self.has_blank())
    }

    pub(crate) fn full(&self) -> Error {
        let (used_bytes, len) = (self.used_bytes.load(Ordering::Relaxed), self.options.segment_len);
        let max_bytes = self.options.max_bytes.unwrap_or(u64::MAX);
        Error::new(
            ErrorKind::Full,
            format!(
                "{used_bytes} bytes of the journal leave too little room for segments of {len} under max_bytes = {max_bytes}; \
                 wait for keys to expire, or erase some"
            ),
        )
    }

    fn make_spare(&self, next_number: &mut u64, purpose: Purpose) -> Result<()> {
        // It could not be listed.
        self.poison.check()?;
        let blank = self.blank.swap(0, Ordering::Relaxed);
        if blank > 0 {
            self.unlist(&[blank]).inspect_err(|_| self.blank.store(blank, Ordering::Relaxed))?;
            return self.renew(blank, next_number);
        }
        if !self.fits_one_more(purpose) {
            return Err(self.full());
        }
        let mut create = || -> Result<_> {
            let header = self.header(*next_number)?;
            // Also if this fails: when the directory could not be synced the name may be taken.
            *next_number += 1;
            Ok((header, self.storage.create(&segment_name(header.number), header.len, &header.encode())?))
        };
        let created = match create() {
            // What only makes the next opening faster gives way.
            Err(error) if error.is_full() && self.make_index_give_way() => create(),
            answer => answer,
        };
        self.is_disk_full.store(created.as_ref().is_err_and(Error::is_full), Ordering::Relaxed);
        let (header, blob) = created?;
        self.used_bytes.fetch_add(header.len, Ordering::Relaxed);
        self.enlist(header.number)?;
        self.add_spare(header.number, blob)
    }

    /// Makes a spare of a segment that nobody needs any more and that isn't listed, which takes no free space.
    ///
    /// If that fails, its file stays under either number, and the next opening has it.
    fn renew(&self, old: u64, next_number: &mut u64) -> Result<()> {
        let header = self.header(*next_number)?;
        *next_number += 1;
        let void = SegmentHeader { number: old, is_void: true, ..header };
        let names = [old, header.number].map(segment_name);
        let blob = self.storage.renew(&names[0], &names[1], header.len, &void.encode(), &header.encode())?;
        self.enlist(header.number)?;
        self.add_spare(header.number, blob)
    }

    /// Lists a new segment (L1). If that fails its file stays, as the list may say so after all, and is made another spare.
    fn enlist(&self, number: u64) -> Result<()> {
        let Some(list) = &self.list else { return Ok(()) };
        list.lock().add(number, &self.poison).inspect_err(|_| self.blank.store(number, Ordering::Relaxed))
    }

    fn unlist(&self, numbers: &[u64]) -> Result<()> {
        let Some(list) = &self.list else { return Ok(()) };
        list.lock().remove(numbers, &self.poison)
    }

    /// Sealed segments that an index can stand for, of all that are there: what it leaves to the journal must not hold a record that
    /// is masked by one in these and by no slot, such as the reservation of an answer that is over.
    pub(crate) fn coverable(&self) -> Vec<Arc<Segment>> {
        let sealed: Vec<_> = self.map.load().iter().filter(|segment| segment.is_sealed()).cloned().collect();
        let numbers: BTreeSet<u64> = sealed.iter().map(|segment| segment.number()).collect();
        // After that: whatever a sealed segment masks is known to be a reservations segment by now.
        let open = self.map.load().reservations().filter(|number| !numbers.contains(number)).min().unwrap_or(u64::MAX);
        let is_coverable = |segment: &Arc<Segment>| {
            let newest = if segment.has_reservations() { segment.number() } else { segment.masks() };
            newest < open || planted!(MasksIgnored)
        };
        let mut coverable: Vec<_> = sealed.into_iter().filter(is_coverable).collect();
        coverable.sort_by_key(|segment| segment.number());
        coverable
    }

    /// Which store this is, and the highest number that was ever listed; `None` for a store in memory.
    pub(crate) fn identity(&self) -> Option<([u8; 16], u64)> {
        Some((self.options.store_id, self.list.as_ref()?.lock().listed().upto))
    }

    /// Writes the parts of an index, durably, and has it count once all that was published before `next` ended is durable too.
    pub(crate) fn write_index(
        &self,
        next: &mut dyn FnMut() -> Result<Option<Vec<u8>>>,
        digest: impl FnOnce() -> Fingerprint,
    ) -> Result<()> {
        let Some(list) = &self.list else { return Ok(()) };
        let _writing = self.writing_index.lock();
        self.storage.write_file(index::INDEX_NAME, next)?;
        if !planted!(IndexBeforeSync) {
            self.sync_all()?;
        }
        list.lock().set_index(digest(), &self.poison)
    }

    /// Whether an index counts.
    pub(crate) fn has_index(&self) -> bool {
        self.list.as_ref().is_some_and(|list| list.lock().index().is_some())
    }

    /// Makes no index count any more, durably, and removes it; `true` if one did. Nobody writes one meanwhile.
    pub(crate) fn drop_index(&self) -> Result<bool> {
        let Some(list) = &self.list else { return Ok(false) };
        let mut list = list.lock();
        if list.index().is_none() {
            return Ok(false);
        }
        list.drop_index(&self.poison)?;
        // What is left of it the next index takes the place of, or the next opening removes.
        index::make_unreadable(&*self.storage);
        self.storage.remove(index::INDEX_NAME).ok();
        Ok(true)
    }

    /// Whether there was an index that isn't in the way any more.
    fn make_index_give_way(&self) -> bool {
        let writing = self.writing_index.try_lock();
        writing.is_some_and(|_writing| self.drop_index().unwrap_or(false))
    }

    /// Whether there is a segment ahead for callers, and room for another one.
    pub(crate) fn has_spare_for_callers(&self) -> bool {
        self.spares.lock().len() > HELD_BACK && self.has_room()
    }

    /// Reads the list of segments back; nobody removes any meanwhile.
    pub(crate) fn verify_list(&self) -> Result<()> {
        let Some(list) = &self.list else { return Ok(()) };
        list.lock().verify()
    }

    /// Ends the active segment of notes, all of which are done with, and makes a spare of it; `false` if there is none.
    pub(crate) fn recycle_notes(&self) -> Result<bool> {
        // No mark is being written into its head meanwhile.
        let _sealing = self.sealing.lock();
        let head = &self.streams[Stream::NOTES.0];
        let _turn = head.turn.lock();
        let active = head.active.load_full();
        if active.number() == 0 {
            return Ok(false);
        }
        active.fill();
        active.quiesce();
        let full = Arc::new(full_segment()?);
        self.unlist(&[active.number()])?;
        head.active.store(full);
        self.change_map(|segments| segments.retain(|segment| segment.number() != active.number()));
        self.renew(active.number(), &mut self.next_number.lock())?;
        Ok(true)
    }

    fn header(&self, number: u64) -> Result<SegmentHeader> {
        let Options { store_id, segment_len: len, .. } = self.options;
        if number >= numbers_end(len) {
            let message = format!("the store's segment numbers are used up at {number}; move its keys to another one");
            return Err(Error::new(ErrorKind::Full, message));
        }
        Ok(SegmentHeader::new(store_id, number, len))
    }

    /// Makes a new segment a spare. If that fails its file stays, and is made another spare.
    fn add_spare(&self, number: u64, blob: Arc<dyn media::Blob>) -> Result<()> {
        let segment = self.ready(number, blob).inspect_err(|_| self.blank.store(number, Ordering::Relaxed))?;
        self.change_map(|segments| segments.push(Arc::clone(&segment)));
        self.spares.lock().push_back(segment);
        Ok(())
    }

    fn ready(&self, number: u64, blob: Arc<dyn media::Blob>) -> Result<Arc<Segment>> {
        let binding = Binding::new(&self.options.store_id, number);
        let base = number << self.options.segment_len.trailing_zeros();
        let fail = |doing| move |source| Error::io(doing, &self.storage.path(&segment_name(number)), source);
        let segment = Segment::fresh(number, base, binding, Arc::clone(&self.storage), blob);
        let segment = segment.map_err(fail("map a segment"))?;
        segment.fault_in().map_err(fail("fault a segment in"))?;
        Ok(Arc::new(segment))
    }

    fn change_map(&self, change: impl FnOnce(&mut Vec<Arc<Segment>>)) {
        let _writer = self.map_writer.lock();
        let map = self.map.load();
        let mut segments = map.iter().cloned().collect();
        change(&mut segments);
        let version = map.version + 1;
        self.map.store(Arc::new(SegmentMap::new(version, segments)));
        self.map_version.store(version, Ordering::Release);
    }

    /// Seals one full segment; `true` if there was one. All reservations segments of now have to go before it.
    pub(crate) fn seal_one(&self) -> Result<bool> {
        let _sealing = self.sealing.lock();
        let Some(segment) = self.retired.lock().front().cloned() else { return Ok(false) };
        segment.set_masks(self.map.load().reservations().max().unwrap_or(0));
        segment.seal(&self.poison)?;
        self.used_bytes.fetch_sub(segment.len() - segment.accounted_bytes(), Ordering::Relaxed);
        self.retired.lock().pop_front();
        Ok(true)
    }

    /// Keeps every segment's mark and seal as they are.
    pub(crate) fn sealing(&self) -> crate::sync::MutexGuard<'_, ()> {
        self.sealing.lock()
    }

    /// Number of the stream's active segment; 0 before the first.
    pub(crate) fn active_number(&self, stream: Stream) -> u64 {
        self.streams[stream.0].active.load().number()
    }

    /// Ends the stream's active segment before it is full; the next record opens another.
    pub(crate) fn cut(&self, stream: Stream) -> Result<()> {
        let head = &self.streams[stream.0];
        let _turn = head.turn.lock();
        let active = head.active.load_full();
        if active.number() > 0 {
            let full = full_segment()?;
            active.fill();
            head.active.store(Arc::new(full));
            self.retired.lock().push_back(active);
        }
        Ok(())
    }

    /// Ends every stream's active segment, and seals it.
    pub(crate) fn seal_all(&self) -> Result<()> {
        for stream in 0..STREAMS {
            self.cut(Stream(stream))?;
        }
        while self.seal_one()? {}
        Ok(())
    }

    /// Repeats in the segments' heads how far each is durable.
    pub(crate) fn note_durable(&self) -> Result<()> {
        let _sealing = self.sealing.lock();
        for segment in self.map.load().iter() {
            let fail = |source| Error::io("write a segment's head", &self.path_of(segment.base()), source);
            segment.note_durable().map_err(fail)?;
        }
        Ok(())
    }

    /// Promises that all that was published before the call survives a power cut, once it returned without error.
    pub(crate) fn promise_all(&self) -> Result<()> {
        // Before the sync, so that upkeep can't slip in between and remove what the promise is about.
        for segment in self.map.load().iter() {
            segment.promise();
        }
        self.sync_all()
    }

    /// Makes all that was published before the call durable.
    pub(crate) fn sync_all(&self) -> Result<()> {
        if !self.options.persistent {
            return self.poison.check();
        }
        let segments: Vec<Arc<Segment>> = self.map.load().iter().map(Arc::clone).collect();
        for segment in segments {
            segment.make_all_durable(&self.poison)?;
        }
        self.poison.check()
    }

    /// An LSN above every reservation made before the call, and not above any made after it.
    pub(crate) fn horizon(&self) -> u64 {
        let head = &self.streams[Stream::RESERVATIONS.0];
        // Or the stream could take its next segment between the look at the old one and the look at the spares, and
        // reservations in it, made after the call, would count as made before.
        let _turn = head.turn.lock();
        let active = head.active.load_full();
        if active.number() > 0 {
            return active.horizon();
        }
        let next_number = self.next_number.lock();
        let next = self.spares.lock().front().map_or(*next_number, |spare| spare.number());
        next << self.options.segment_len.trailing_zeros()
    }

    /// Waits until every claim made before the call is published.
    pub(crate) fn quiesce(&self) {
        for segment in self.map.load().iter() {
            segment.quiesce();
        }
    }

    /// Takes segments out of the list, all or none of them durably, then off the storage and out of the map.
    ///
    /// Their names may come back after a power cut until [`sync_names`](Journal::sync_names); recovery removes them again.
    pub(crate) fn remove(&self, numbers: &[u64]) -> Result<()> {
        if numbers.is_empty() {
            return Ok(());
        }
        if !planted!(FileBeforeList) {
            self.unlist(numbers)?;
        }
        for number in numbers {
            self.has_dirty_names.store(true, Ordering::Release);
            self.storage.remove(&segment_name(*number))?;
            if let Some(removed) = self.map.load().get(*number) {
                self.change_map(|segments| segments.retain(|segment| segment.number() != *number));
                self.used_bytes.fetch_sub(removed.accounted_bytes(), Ordering::Relaxed);
            }
        }
        if planted!(FileBeforeList) {
            self.unlist(numbers)?;
        }
        Ok(())
    }

    /// Makes removals durable, if there were any. If that fails nothing may be removed any more that depends on them.
    pub(crate) fn sync_names(&self) -> Result<()> {
        if !self.has_dirty_names.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.storage.sync_names().inspect_err(|error| {
            self.poison.set("sync the directory", &std::io::Error::other(error.to_string()));
        })
    }
}

/// A segment, and up to where it is not known to survive a power cut.
#[derive(Debug)]
pub(crate) struct Unsynced {
    segment: Arc<Segment>,
    upto: u64,
}

/// A record that can be read, and where it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry<'m> {
    segment: &'m Segment,
    lsn: u64,
    record: RecordRef<'m>,
}

impl<'m> Entry<'m> {
    /// The record at an LSN of this segment, which the caller knows to be published.
    #[inline(always)]
    pub(crate) fn read(segment: &'m Segment, lsn: u64) -> Option<Self> {
        let record = segment.record(lsn)?;
        Some(Entry { segment, lsn, record })
    }

    /// A handle to the payload.
    #[inline]
    pub(crate) fn handle(&self) -> Record {
        self.segment.handle(self.lsn, &self.record.meta(), self.record.stored_key().len(), self.record.payload().len())
    }
}

impl<'m> Deref for Entry<'m> {
    type Target = RecordRef<'m>;

    #[inline]
    fn deref(&self) -> &RecordRef<'m> {
        &self.record
    }
}

/// Wakes a thread that has something to do now.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    rung: Mutex<bool>,
    ring: Condvar,
}

impl Bell {
    pub(crate) fn ring(&self) {
        *self.rung.lock() = true;
        self.ring.notify_all();
    }

    /// Sleeps until rung, at most for `limit`; whether it was rung.
    pub(crate) fn wait(&self, limit: Duration) -> bool {
        let mut rung = self.rung.lock();
        if !*rung {
            self.ring.wait_for(&mut rung, limit);
        }
        std::mem::take(&mut *rung)
    }
}

/// Readies some memory for appends where they come to the end of it first, if it is less than `lead` ahead; `true` if it did.
fn fault_in(segments: impl IntoIterator<Item = Arc<Segment>>, lead: u64) -> bool {
    let short = segments.into_iter().filter_map(|segment| Some((segment.lead()?, segment)));
    let next = short.min_by_key(|(found, _)| *found).filter(|(found, _)| *found < lead);
    // Its blocks are there: what fails here is want of memory, and the append will take the fault itself.
    next.map(|(_, segment)| segment.fault_in().ok()).is_some()
}

/// The placeholder before a stream's first segment: it has no room, and nothing in it.
fn full_segment() -> Result<Segment> {
    let storage: Arc<dyn Storage> = Arc::new(media::AnonMedia);
    let blob = storage.create("none", SEGMENT_HEAD, &[])?;
    let segment = Segment::sealed(0, 0, Binding::new(&[0; 16], 0), Arc::clone(&storage), blob, SEGMENT_HEAD);
    segment.map_err(|source| Error::io("map", &storage.path("none"), source))
}

/// Above the number of every segment of this length: LSNs have to fit a slot's word.
pub(crate) fn numbers_end(segment_len: u64) -> u64 {
    1 << 62 >> segment_len.trailing_zeros()
}

/// Name of a segment's file.
pub(crate) fn segment_name(number: u64) -> String {
    format!("{number:016x}.seg")
}

/// The number in a segment's name, if it is one.
pub(crate) fn segment_number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".seg")?;
    let number = u64::from_str_radix(digits, 16).ok()?;
    (segment_name(number) == name).then_some(number)
}

/// Space for one record.
#[derive(Debug)]
pub(crate) struct Claim<'j> {
    journal: &'j Journal,
    segment: Guard<Arc<Segment>>,
    start: u64,
    len: u64,
    open: bool,
}

impl Claim<'_> {
    #[inline]
    pub(crate) fn lsn(&self) -> u64 {
        self.segment.base() + self.start
    }

    /// Counts the record as one that a slot points to.
    #[inline]
    pub(crate) fn add_live(&self) {
        self.segment.add_live(self.len);
    }

    /// Notes until when the record, an answer that just became visible, is kept; under its shard's lock.
    #[inline]
    pub(crate) fn note_deadline(&self, deadline_ms: u64) {
        self.segment.note_deadline(self.start, deadline_ms);
    }

    /// A handle to the payload of the record that is going to be written.
    #[inline]
    pub(crate) fn handle(&self, meta: &Meta, key_len: usize, payload_len: usize) -> Record {
        self.segment.handle(self.lsn(), meta, key_len, payload_len)
    }

    /// Writes the record; with `sync` it returns when the record survives a power cut.
    ///
    /// An error means that nothing may be said of the record: it may or may not be there after a restart.
    #[inline]
    pub(crate) fn write(&mut self, meta: &Meta, key: &[&[u8]], payload: &[u8], sync: bool) -> Result<()> {
        self.open = false;
        let journal = self.journal;
        // Before the publication. It changes once a millisecond at the most, so that nobody waits for the line.
        if meta.written_ms > journal.newest_ms.load(Ordering::Relaxed) {
            journal.newest_ms.fetch_max(meta.written_ms, Ordering::Relaxed);
        }
        self.segment.put(self.start, meta, key, payload, &journal.poison);
        journal.poison.check()?;
        if sync && journal.options.persistent {
            journal.syncs.fetch_add(1, Ordering::Relaxed);
            self.segment.promise();
            if planted!(AckedBeforeSync) {
                return Ok(());
            }
            self.segment.make_durable(self.start + self.len, &journal.poison)?;
        }
        Ok(())
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if self.open {
            self.segment.put_pad(self.start, self.len, &self.journal.poison);
        }
    }
}

const _: () = assert!(HEADER as u64 <= SEGMENT_HEAD);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_found_by_its_number_whatever_others_there_are() {
        let storage: Arc<dyn Storage> = Arc::new(media::AnonMedia);
        let segment = |number| {
            let blob = storage.create("any", SEGMENT_HEAD, &[]).unwrap();
            let binding = Binding::new(&[0; 16], number);
            Arc::new(Segment::sealed(number, 0, binding, Arc::clone(&storage), blob, SEGMENT_HEAD).unwrap())
        };
        assert!(SegmentMap::default().get(0).is_none());
        // The last three want the same place, the last of all.
        let numbers = [1, 2, 3, 15, 31, u64::MAX];
        let map = SegmentMap::new(1, numbers.map(segment).to_vec());
        for number in numbers {
            assert_eq!(map.get(number).unwrap().number(), number);
        }
        assert!([0, 4, 47].iter().all(|number| map.get(*number).is_none()));
        assert_eq!(map.iter().count(), numbers.len());
    }
}
