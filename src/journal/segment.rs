//! One segment: claim space, copy, publish; and the handles that keep its bytes in place.
//!
//! - **J1** Space is claimed by one atomic add. The claim that first overruns the end fixes `end`; all later ones overrun
//!   it too, so `end` is written once.
//! - **J2** A claim is always published, as a record or as a pad: nothing waits behind it for ever.
//! - **J3** Only records that are `written` are read (see `watermark`), and a sync vouches for what is below the watermark.
//! - **J4** The last 64 bytes are kept free for the seal.

use super::Stream;
use super::codec::{self, Binding, HEAD_MARK, HEADER, Kind, Meta, RecordRef, SEGMENT_HEAD};
use super::commit::{GroupCommit, Poison};
use super::dues::Dues;
use super::media::{Blob, Storage};
use super::reader;
use super::watermark::{Starts, Written};
use crate::error::Error;
use crate::mmap::Region;
use crate::record::Record;
use crate::sync::atomic::{self, AtomicBool, AtomicU64, Ordering};
use crate::sync::{Backoff, Mutex, thread};
use crossbeam_utils::CachePadded;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// Handles to a segment's bytes are counted in so many groups, so that an erasure waits for few of them.
const STRIPES: u64 = 64;
/// How much is faulted in by one call: a huge page, and short enough to not hold the address space's lock for long.
const FAULT_STEP: u64 = 2 << 20;
const UNSET: u64 = u64::MAX;
/// More than any segment is long: a claim that fills it.
const FILL: u64 = 1 << 40;

/// Keeps a record's bytes in place: mapped, also after its segment was removed, and not scrubbed.
#[derive(Clone, Debug)]
pub(crate) struct Pin(Arc<Stripe>);

/// Some of a segment's records; handles to them share its count.
#[derive(Debug)]
struct Stripe {
    region: Arc<Region>,
    /// Keeps the store locked: the next owner may overwrite what is read here.
    _storage: Arc<dyn Storage>,
}

impl Pin {
    pub(crate) fn bytes(&self, range: std::ops::Range<usize>) -> Option<&[u8]> {
        self.0.region.bytes(range)
    }
}

#[derive(Debug)]
pub(crate) struct Segment {
    number: u64,
    /// LSN of its first byte.
    base: u64,
    len: u64,
    binding: Binding,
    blob: Arc<dyn Blob>,
    region: Arc<Region>,
    stripes: Box<[Arc<Stripe>]>,
    tail: CachePadded<AtomicU64>,
    written: CachePadded<Written>,
    dues: Dues,
    /// How far memory was readied for appends.
    faulted_in: AtomicU64,
    /// Held while it is, and while what nothing was written to is given back.
    faulting: Mutex<()>,
    accounted: AtomicU64,
    /// The records that the table points to: their number in the upper half, their bytes by eight in the lower one.
    live: CachePadded<AtomicU64>,
    end: AtomicU64,
    sealed: AtomicBool,
    /// The stream that it was taken for.
    stream: OnceLock<Stream>,
    moved: AtomicBool,
    /// Whether some caller was promised that its records here survive a power cut.
    promised: AtomicBool,
    commit: GroupCommit,
    /// Held while it is synced; whether that ever failed.
    syncing: Mutex<bool>,
    /// End of the last mark that nothing was written before or after since.
    marked: AtomicU64,
    /// How far the mark in the head says that all is durable.
    noted: AtomicU64,
    /// For answers: the newest reservations segment whose records these may mask; it has to go first.
    masks: AtomicU64,
    /// Where the first record starts that could not be written, and where all such do, with their lengths. Nothing may be
    /// read there: no page may stand behind it. Zero too while each record has to be checked when it is read.
    suspect: AtomicU64,
    all_unwritten: Mutex<BTreeMap<u64, u64>>,
    /// Whether all records were checked since the segment was opened; not if an index stood for them.
    checked: AtomicBool,
    /// Until then, the records that were checked by themselves.
    looked_at: OnceLock<Starts>,
    /// Where such a one was found damaged.
    damaged: Mutex<BTreeSet<u64>>,
    /// Where it was found damaged then.
    damage: OnceLock<u64>,
    /// Whether it couldn't be checked, and is left to who needs it.
    passed_over: AtomicBool,
}

impl Segment {
    /// A segment that nothing was written to.
    pub(crate) fn fresh(
        number: u64,
        base: u64,
        binding: Binding,
        storage: Arc<dyn Storage>,
        blob: Arc<dyn Blob>,
    ) -> io::Result<Self> {
        Segment::with(number, base, binding, storage, blob, SEGMENT_HEAD, None)
    }

    /// A segment that takes no more records; `end` is where its seal stands.
    pub(crate) fn sealed(
        number: u64,
        base: u64,
        binding: Binding,
        storage: Arc<dyn Storage>,
        blob: Arc<dyn Blob>,
        end: u64,
    ) -> io::Result<Self> {
        Segment::with(number, base, binding, storage, blob, end + HEADER as u64, Some(end))
    }

    fn with(
        number: u64,
        base: u64,
        binding: Binding,
        storage: Arc<dyn Storage>,
        blob: Arc<dyn Blob>,
        published: u64,
        end: Option<u64>,
    ) -> io::Result<Self> {
        let region = blob.map()?;
        let len = blob.len();
        let accounted = if end.is_some() { kept_bytes(&*blob) } else { len };
        let stripes = (0..STRIPES)
            .map(|_| Arc::new(Stripe { region: Arc::clone(&region), _storage: Arc::clone(&storage) }))
            .collect();
        Ok(Segment {
            number,
            base,
            len,
            binding,
            blob,
            region,
            stripes,
            tail: CachePadded::new(AtomicU64::new(if end.is_some() { FILL } else { published })),
            written: CachePadded::new(Written::new(published, if end.is_some() { 0 } else { len })),
            dues: Dues::new(len),
            faulted_in: AtomicU64::new(0),
            faulting: Mutex::default(),
            accounted: AtomicU64::new(accounted),
            live: CachePadded::default(),
            end: AtomicU64::new(end.unwrap_or(UNSET)),
            sealed: AtomicBool::new(end.is_some()),
            stream: OnceLock::new(),
            moved: AtomicBool::new(false),
            promised: AtomicBool::new(end.is_some()),
            commit: GroupCommit::new(published),
            syncing: Mutex::default(),
            marked: AtomicU64::new(published),
            noted: AtomicU64::new(published),
            masks: AtomicU64::new(0),
            suspect: AtomicU64::new(u64::MAX),
            all_unwritten: Mutex::default(),
            checked: AtomicBool::new(true),
            looked_at: OnceLock::new(),
            damaged: Mutex::default(),
            damage: OnceLock::new(),
            passed_over: AtomicBool::new(false),
        })
    }

    /// Says that an index stood for the records of a sealed segment, of which so many are alive, with so many bytes at the most.
    pub(crate) fn set_indexed(&self, records: u64, bytes: u64) {
        self.live.store((records << 32) | (bytes / 8), Ordering::Relaxed);
        self.checked.store(false, Ordering::Relaxed);
        self.suspect.store(0, Ordering::Relaxed);
    }

    /// Whether all records were checked since the segment was opened.
    pub(crate) fn is_checked(&self) -> bool {
        self.checked.load(Ordering::Acquire)
    }

    /// Where it was found damaged.
    pub(crate) fn damage(&self) -> Option<u64> {
        self.damage.get().copied()
    }

    /// Checks all records of a sealed segment, so that not each has to be when it is read; nobody overwrites any meanwhile.
    /// The inner error says where one is damaged.
    pub(crate) fn check(&self) -> io::Result<Result<(), u64>> {
        if self.is_checked() {
            return Ok(Ok(()));
        }
        if let Some(at) = self.damage() {
            return Ok(Err(at));
        }
        let end = self.published() - HEADER as u64;
        match reader::check(&*self.blob, self.binding, self.base, end)? {
            Ok(dues) => self.dues.note_all(&dues),
            Err(at) => return Ok(Err(*self.damage.get_or_init(|| at))),
        }
        self.suspect.store(u64::MAX, Ordering::Relaxed);
        self.checked.store(true, Ordering::Release);
        Ok(Ok(()))
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// LSN of its first record.
    pub(crate) fn first_lsn(&self) -> u64 {
        self.base + SEGMENT_HEAD
    }

    /// An LSN above every claim made so far, and not above any to come in this segment.
    pub(crate) fn horizon(&self) -> u64 {
        self.base + self.tail.load(Ordering::Acquire).min(self.len)
    }

    pub(crate) fn binding(&self) -> Binding {
        self.binding
    }

    pub(crate) fn blob(&self) -> &dyn Blob {
        &*self.blob
    }

    /// Where what is written without a hole ends.
    pub(crate) fn published(&self) -> u64 {
        self.written.watermark(|at| self.len_at(at))
    }

    /// Whether the record at an offset can be read.
    #[inline]
    pub(crate) fn is_published(&self, at: u64) -> bool {
        self.written.has(at)
    }

    /// Length of the published record at an offset.
    fn len_at(&self, at: u64) -> u64 {
        match self.record(self.base + at) {
            Some(record) => record.len(),
            None => self.unwritten_len(at).expect("what is published has a header, or failed"),
        }
    }

    /// Length of the record at an offset, if it is one that could not be written.
    fn unwritten_len(&self, at: u64) -> Option<u64> {
        self.all_unwritten.lock().get(&at).copied()
    }

    /// Where what was claimed ends.
    fn claimed(&self) -> u64 {
        let tail = self.tail.load(Ordering::Acquire);
        if tail <= self.len - HEADER as u64 {
            return tail;
        }
        // The claim that overran the end is just about to say where that was (J1).
        let backoff = Backoff::new();
        loop {
            match self.end() {
                Some(end) => break end,
                None => backoff.snooze(),
            }
        }
    }

    /// Where the last record ends, once no more can come.
    pub(crate) fn end(&self) -> Option<u64> {
        // Acquire pairs with the release in `claim`; the value itself says all.
        Some(self.end.load(Ordering::Acquire)).filter(|end| *end != UNSET)
    }

    pub(crate) fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Acquire)
    }

    /// Whether some caller was promised that its records here survive a power cut.
    pub(crate) fn promise(&self) {
        self.promised.store(true, Ordering::Release);
    }

    pub(crate) fn is_promised(&self) -> bool {
        self.promised.load(Ordering::Acquire)
    }

    /// Whether records were copied out of it, so that the copies have to be durable before it goes.
    pub(crate) fn has_moved(&self) -> bool {
        self.moved.load(Ordering::Acquire)
    }

    pub(crate) fn set_moved(&self) {
        self.moved.store(true, Ordering::Release);
    }

    /// Bytes that it counts for under `max_bytes`: once sealed, what it did not give back.
    pub(crate) fn accounted_bytes(&self) -> u64 {
        // Relaxed: a count, which orders nothing.
        self.accounted.load(Ordering::Relaxed)
    }

    /// Says which stream it belongs to, once.
    pub(crate) fn set_stream(&self, stream: Stream) {
        self.stream.get_or_init(|| stream);
    }

    /// Whether this is a segment of the reservations stream.
    pub(crate) fn has_reservations(&self) -> bool {
        self.stream.get() == Some(&Stream::RESERVATIONS)
    }

    /// Whether this is a segment of the notes stream.
    pub(crate) fn has_notes(&self) -> bool {
        self.stream.get() == Some(&Stream::NOTES)
    }

    pub(crate) fn masks(&self) -> u64 {
        self.masks.load(Ordering::Acquire)
    }

    /// Says which reservations segments have to go before it; notes wait for none.
    pub(crate) fn set_masks(&self, number: u64) {
        if !self.has_notes() {
            self.masks.fetch_max(number, Ordering::AcqRel);
        }
    }

    /// How much further memory is readied than appends are; `None` if nothing is left to ready.
    pub(crate) fn lead(&self) -> Option<u64> {
        // Relaxed: an appender that comes first only takes the faults itself.
        let faulted_in = self.faulted_in.load(Ordering::Relaxed);
        let is_ready = faulted_in >= self.len || self.end().is_some();
        (!is_ready).then(|| faulted_in.saturating_sub(self.tail.load(Ordering::Relaxed)))
    }

    /// Readies some more memory for appends, ahead of them.
    pub(crate) fn fault_in(&self) -> io::Result<()> {
        let _faulting = self.faulting.lock();
        let from = self.faulted_in.fetch_add(FAULT_STEP, Ordering::Relaxed);
        if from >= self.len || self.end().is_some() {
            return Ok(());
        }
        self.blob.fault_in(from, (from + FAULT_STEP).min(self.len))
    }

    pub(crate) fn has_room_for(&self, len: u64) -> bool {
        self.tail.load(Ordering::Relaxed) + len <= self.len - HEADER as u64
    }

    /// Claims `len` bytes (a multiple of 8); `None` when the segment is full (J1).
    #[inline]
    pub(crate) fn claim(&self, len: u64) -> Option<u64> {
        let limit = self.len - HEADER as u64;
        // The add only divides space up, and bytes are handed over by `written`; but see `dues`.
        let start = self.tail.fetch_add(len, Ordering::SeqCst);
        if start + len <= limit {
            return Some(start);
        }
        if start <= limit {
            self.end.store(start, Ordering::Release);
        }
        None
    }

    /// Lets no more claims succeed.
    pub(crate) fn fill(&self) {
        if self.end().is_none() {
            self.claim(FILL);
        }
    }

    /// Writes a record into claimed space and publishes it (J2), also when the write failed: then all is poisoned.
    #[inline]
    pub(crate) fn put(&self, start: u64, meta: &Meta, key: &[&[u8]], payload: &[u8], poison: &Poison) {
        if planted!(HoleAcknowledged) {
            // Or there is hardly ever a hole when the process is killed.
            thread::yield_now();
        }
        let (len, written) = codec::encode(self.binding, start, meta, key, payload, |parts| {
            let len = parts.iter().map(|part| part.len() as u64).sum::<u64>();
            if planted!(PublishedBeforeWritten) {
                self.written.publish(start, len);
            }
            (len, self.blob.append(start, parts))
        });
        if let Err(error) = written {
            self.all_unwritten.lock().insert(start, len);
            self.suspect.fetch_min(start, Ordering::Relaxed);
            poison.set("write a record", &error);
        }
        if !planted!(PublishedBeforeWritten) {
            self.written.publish(start, len);
        }
    }

    /// Fills claimed space that isn't needed with a pad (J2).
    #[cold]
    pub(crate) fn put_pad(&self, start: u64, len: u64, poison: &Poison) {
        let payload = vec![0; len as usize - HEADER];
        self.put(start, &Meta::bare(Kind::Pad, 0, 0), &[], &payload, poison);
    }

    /// Waits until the record at an offset, which was claimed, is readable.
    pub(crate) fn wait_published(&self, at: u64) {
        self.written.wait_for(at);
    }

    /// Waits until all below `upto`, which was claimed, is published.
    fn wait_without_holes(&self, upto: u64) {
        self.written.wait_for_watermark(upto, |at| self.len_at(at));
    }

    /// Waits until every claim made so far is published.
    pub(crate) fn quiesce(&self) {
        self.wait_without_holes(self.claimed());
    }

    /// Returns when all that was claimed before the call survives a power cut.
    pub(crate) fn make_all_durable(&self, poison: &Poison) -> Result<(), Error> {
        let claimed = self.claimed();
        // Nothing but a mark may be new.
        if claimed > self.commit.durable() && claimed != self.marked.load(Ordering::Acquire) {
            self.make_durable(claimed, poison)?;
        }
        Ok(())
    }

    /// Whether everything below `upto` is known to survive a power cut.
    #[inline]
    pub(crate) fn is_durable(&self, upto: u64) -> bool {
        self.commit.durable() >= upto
    }

    /// Returns when everything below `upto`, which was claimed, survives a power cut.
    pub(crate) fn make_durable(&self, upto: u64, poison: &Poison) -> Result<(), Error> {
        if self.is_durable(upto) {
            return Ok(());
        }
        self.wait_without_holes(upto);
        let led = self.commit.wait(upto, poison, || self.published(), || self.sync())?;
        if led {
            self.mark(poison);
        }
        Ok(())
    }

    /// Makes all that was written before the call durable.
    ///
    /// One at a time: of two that overlap btrfs may let the second return before the first has ended (seen with Linux 6.18).
    /// And none after one that failed: the kernel tells of a failure once, to whoever syncs first.
    pub(crate) fn sync(&self) -> io::Result<()> {
        let mut has_failed = self.syncing.lock();
        if *has_failed && !planted!(SyncRetried) {
            return Err(io::Error::other("an earlier sync of the segment failed"));
        }
        self.blob.sync().inspect_err(|_| *has_failed = true)
    }

    /// Notes how far the segment is durable, so that damage below can be told from a torn tail.
    fn mark(&self, poison: &Poison) {
        let durable = self.commit.durable();
        if let Some(start) = self.claim(HEADER as u64) {
            self.put(start, &Meta::bare(Kind::Mark, self.base + durable, 0), &[], b"", poison);
            if start == durable {
                self.marked.store(start + HEADER as u64, Ordering::Release);
            }
        }
    }

    /// Repeats in the segment's head how far it is durable, if that is further than when it was last repeated.
    pub(crate) fn note_durable(&self) -> io::Result<()> {
        if self.is_sealed() {
            return Ok(());
        }
        // Moves the watermark, so that a sync after much that wasn't synced has little to go over.
        self.published();
        let durable = self.commit.durable();
        if self.noted.fetch_max(durable, Ordering::AcqRel) >= durable {
            return Ok(());
        }
        self.write_head_mark(Kind::Mark, durable)
    }

    fn write_head_mark(&self, kind: Kind, durable: u64) -> io::Result<()> {
        let mark = codec::encode_mark(self.binding, HEAD_MARK, kind, self.base + durable);
        self.blob.overwrite(HEAD_MARK, &mark)
    }

    /// Ends a full segment: all its records are durable, and its seal says so.
    pub(crate) fn seal(&self, poison: &Poison) -> Result<(), Error> {
        let Some(end) = self.end() else { return Ok(()) };
        if self.is_sealed() {
            return Ok(());
        }
        self.wait_without_holes(end);
        poison.check()?;
        self.commit.wait(end, poison, || self.published(), || self.sync())?;
        if let Err(error) = self.write_head_mark(Kind::Seal, end) {
            poison.set("seal a segment", &error);
            return poison.check();
        }
        self.put(end, &Meta::bare(Kind::Seal, self.base + end, 0), &[], b"", poison);
        let sealed_end = end + HEADER as u64;
        self.commit.wait(sealed_end, poison, || self.published(), || self.sync())?;
        self.sealed.store(true, Ordering::Release);
        // Whether blocks come back decides nothing but what the segment counts for.
        self.give_rest_back().ok();
        Ok(())
    }

    /// Gives the blocks behind the seal back.
    pub(crate) fn give_rest_back(&self) -> io::Result<()> {
        // Or a fault could take them once more.
        let _faulting = self.faulting.lock();
        let given = self.blob.punch(self.published(), self.len);
        self.accounted.store(kept_bytes(&*self.blob), Ordering::Relaxed);
        given
    }

    /// The record at an LSN of this segment, which the caller knows to be published.
    #[inline(always)]
    pub(crate) fn record(&self, lsn: u64) -> Option<RecordRef<'_>> {
        let at = lsn.checked_sub(self.base)?;
        // Relaxed: whoever may read the record has seen it published, which was after.
        if at >= self.suspect.load(Ordering::Relaxed) && self.is_unreadable(at) {
            return None;
        }
        let at = at as usize;
        // No more of it at a time than is published: others write behind it.
        let len = codec::span(self.region.bytes(at..at + HEADER)?.first_chunk()?);
        RecordRef::parse(self.region.bytes(at..at + len)?)
    }

    /// Leaves it to who needs it.
    pub(crate) fn pass_over(&self) {
        self.passed_over.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_passed_over(&self) -> bool {
        self.passed_over.load(Ordering::Relaxed)
    }

    /// Whether a record could not be written, has yet to be looked at, or is damaged.
    #[cold]
    fn is_unreadable(&self, at: u64) -> bool {
        self.unwritten_len(at).is_some() || !self.is_checked() && !self.was_looked_at(at)
    }

    fn was_looked_at(&self, at: u64) -> bool {
        self.looked_at.get().and_then(|starts| starts.get(at)).unwrap_or(false)
    }

    /// Whether the record at an offset has to be checked before it is read.
    pub(crate) fn has_to_be_looked_at(&self, at: u64) -> bool {
        !self.is_checked() && !self.was_looked_at(at) && !self.damaged.lock().contains(&at)
    }

    /// Checks the record at an offset that a slot led to. If it is damaged, or none that a slot may lead to, it is not read; if it was
    /// just being overwritten, no slot leads there any more.
    ///
    /// It is not read through the mapping: a device that can't is an error so, and the page is in memory then.
    pub(crate) fn look_at(&self, at: u64) -> io::Result<()> {
        if self.is_whole(at)? {
            self.looked_at.get_or_init(|| Starts::new(self.len)).set(at);
        } else {
            self.damaged.lock().insert(at);
        }
        Ok(())
    }

    fn is_whole(&self, at: u64) -> io::Result<bool> {
        let left = self.published().saturating_sub(at);
        let mut header = [0; HEADER];
        if left < HEADER as u64 {
            return Ok(false);
        }
        self.blob.read_at(at, &mut header)?;
        let Some((_, len)) = codec::header_says(self.binding, at, &header).filter(|(_, len)| *len <= left) else {
            return Ok(false);
        };
        let mut bytes = vec![0; len as usize];
        self.blob.read_at(at, &mut bytes)?;
        Ok(RecordRef::check_first(self.binding, &bytes, at).is_ok_and(|record| record.kind().is_live_kind()))
    }

    /// Begins to fetch what stands behind the header of the record at an LSN, at the same time as that.
    #[inline]
    pub(crate) fn prefetch(&self, lsn: u64) {
        let at = (lsn - self.base) as usize;
        (1..4).for_each(|line| self.region.prefetch(at + line * 64));
    }

    /// The published records in order, each with its LSN.
    pub(crate) fn records(&self) -> impl Iterator<Item = (u64, RecordRef<'_>)> {
        self.records_from(self.first_lsn())
    }

    /// The published records from the one at an LSN on.
    pub(crate) fn records_from(&self, lsn: u64) -> impl Iterator<Item = (u64, RecordRef<'_>)> {
        self.records_between(lsn, self.published())
    }

    /// The records of a segment that takes no more, but for its seal, which may still be written.
    pub(crate) fn records_before_end(&self) -> impl Iterator<Item = (u64, RecordRef<'_>)> {
        self.records_between(self.first_lsn(), self.end().unwrap_or(0))
    }

    fn records_between(&self, lsn: u64, end: u64) -> impl Iterator<Item = (u64, RecordRef<'_>)> {
        let mut at = lsn - self.base;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let lsn = self.base + at;
            let record = self.record(lsn)?;
            at += record.len();
            Some((lsn, record))
        })
    }

    /// Notes until when the answer at an offset is kept, which just became visible; under its shard's lock.
    #[inline]
    pub(crate) fn note_deadline(&self, at: u64, deadline_ms: u64) {
        self.dues.note(at, deadline_ms);
    }

    /// Whether answers may be due.
    pub(crate) fn is_due(&self, now_ms: u64) -> bool {
        self.dues.is_due(now_ms)
    }

    /// Takes a block that has answers due; what is left in it has to be noted anew.
    pub(crate) fn take_due(&self, now_ms: u64) -> Option<Due<'_>> {
        let Range { start, end } = self.dues.take_due(now_ms)?;
        Some(Due { segment: self, start, at: start, end })
    }

    fn stripe(&self, lsn: u64) -> &Arc<Stripe> {
        let stripe = (lsn / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58;
        &self.stripes[stripe as usize]
    }

    /// A handle to the payload of the record at an LSN.
    #[inline]
    pub(crate) fn handle(&self, lsn: u64, meta: &Meta, key_len: usize, payload_len: usize) -> Record {
        let start = (lsn - self.base) as usize + HEADER + key_len;
        Record::new(Pin(Arc::clone(self.stripe(lsn))), start, payload_len, meta)
    }

    /// Whether a handle to this record, or to another of its stripe, is out.
    pub(crate) fn is_pinned(&self, lsn: u64) -> bool {
        let count = Arc::strong_count(self.stripe(lsn));
        // Pairs with the release in the drop of the last handle: its reads came before.
        atomic::fence(Ordering::Acquire);
        count > 1
    }

    /// Overwrites the record's key, payload and fingerprint with zeros (M3 of `mmap`: the caller excluded readers).
    pub(crate) fn scrub(&self, lsn: u64, len: u64) -> io::Result<()> {
        let at = lsn - self.base;
        // Whoever moves the watermark reads what is behind it.
        self.wait_without_holes(at + len);
        self.blob.overwrite(at, &codec::encode_blank(self.binding, at, Kind::Scrubbed, len))
    }

    /// Counts a record of so many bytes as one that a slot points to.
    #[inline]
    pub(crate) fn add_live(&self, len: u64) {
        self.live.fetch_add(one_record(len), Ordering::Relaxed);
    }

    /// The record at an LSN is one that no slot points to any more.
    #[inline]
    pub(crate) fn sub_live(&self, lsn: u64) {
        // One that can't be read was never written: then all is poisoned, and nothing is decided by the count.
        if let Some(record) = self.record(lsn) {
            self.sub_live_bytes(record.len());
        }
    }

    /// A record of so many bytes is one that no slot points to any more.
    #[inline]
    pub(crate) fn sub_live_bytes(&self, len: u64) {
        // Release: who sees that nothing lives here any more sees the claim of what took its place.
        let before = self.live.fetch_sub(one_record(len), Ordering::Release);
        let (records, bytes) = (before >> 32, (before & u64::from(u32::MAX)) * 8);
        debug_assert!(records > 0 && bytes >= len, "segment {} has fewer than no live records", self.number);
    }

    /// Whether the table points to no record of it.
    pub(crate) fn is_dead(&self) -> bool {
        // Acquire pairs with the release of the last that died.
        self.live.load(Ordering::Acquire) >> 32 == 0
    }

    /// Bytes of the records that the table points to; after an index was read, of some more.
    pub(crate) fn live_bytes(&self) -> u64 {
        let live = self.live.load(Ordering::Acquire);
        if live >> 32 == 0 { 0 } else { (live & u64::from(u32::MAX)) * 8 }
    }
}

/// The records of a block, each with its LSN, from its first answer up to one that isn't written yet.
#[derive(Debug)]
pub(crate) struct Due<'s> {
    segment: &'s Segment,
    start: u64,
    at: u64,
    end: u64,
}

impl Due<'_> {
    /// Notes that of those seen none is due before `earliest_ms`.
    pub(crate) fn leave(self, earliest_ms: u64, now_ms: u64) {
        let Due { segment, start, at, end } = self;
        let claimed = segment.end().unwrap_or_else(|| segment.tail.load(Ordering::SeqCst));
        // One that is being written hides what is behind it.
        let hidden_ms = if at < end.min(claimed) { now_ms.saturating_add(1) } else { u64::MAX };
        segment.note_deadline(start, earliest_ms.min(hidden_ms));
    }
}

impl<'s> Iterator for Due<'s> {
    type Item = (u64, RecordRef<'s>);

    fn next(&mut self) -> Option<Self::Item> {
        while self.at < self.end && self.segment.is_published(self.at) {
            let lsn = self.segment.base + self.at;
            match self.segment.record(lsn) {
                Some(record) => {
                    self.at += record.len();
                    return Some((lsn, record));
                }
                // Or another program changed it, and nobody knows where the next one begins.
                None => self.at += self.segment.unwritten_len(self.at).unwrap_or(self.end - self.at),
            }
        }
        None
    }
}

/// One record of so many bytes, as `live` counts it.
#[inline]
fn one_record(len: u64) -> u64 {
    (1 << 32) | (len / 8)
}

/// Bytes of the disk that a sealed segment takes: not every file system gives the blocks of a hole back, and a process may have
/// died before it asked.
fn kept_bytes(blob: &dyn Blob) -> u64 {
    blob.allocated().map_or(blob.len(), |bytes| bytes.min(blob.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::codec::SegmentHeader;
    use crate::journal::media::{AnonMedia, DiskOp, SimDisk, SimStorage};

    fn fresh(disk: &SimDisk) -> Segment {
        let storage: Arc<dyn Storage> = Arc::new(SimStorage::open(disk).unwrap());
        let header = SegmentHeader::new([7; 16], 1, 64 * 1024).encode();
        let blob = storage.create("1", 64 * 1024, &header).unwrap();
        Segment::fresh(1, 64 * 1024, Binding::new(&[7; 16], 1), storage, blob).unwrap()
    }

    /// The kernel tells of a failure once, and an erasure may be the one to be told while others wait to sync.
    #[test]
    fn no_sync_after_one_that_failed_succeeds_whoever_asks() {
        let disk = SimDisk::new();
        let (segment, poison) = (fresh(&disk), Poison::default());
        let start = segment.claim(128).unwrap();
        segment.put_pad(start, 128, &poison);
        disk.fail(DiskOp::Sync, 0, io::ErrorKind::Other);
        assert!(segment.sync().is_err());
        assert!(!poison.is_set(), "who synced has not said so yet");
        assert!(segment.make_durable(start + 128, &poison).is_err());
        assert!(segment.sync().is_err() && poison.is_set());
    }

    #[test]
    fn the_watermark_passes_over_what_could_not_be_written_and_no_sync_vouches_for_it() {
        let disk = SimDisk::new();
        let (segment, poison) = (fresh(&disk), Poison::default());
        let starts = [128, 192, 128].map(|len| (segment.claim(len).unwrap(), len));
        segment.put_pad(starts[2].0, 128, &poison);
        assert!(segment.is_published(starts[2].0) && segment.published() == SEGMENT_HEAD);
        disk.fail(DiskOp::Append, 0, io::ErrorKind::Other);
        starts[..2].iter().for_each(|(start, len)| segment.put_pad(*start, *len, &poison));
        assert_eq!(segment.published(), starts[2].0 + 128);
        assert!(segment.make_durable(starts[2].0 + 128, &poison).is_err());
        assert_eq!(segment.commit.durable(), SEGMENT_HEAD);
    }

    #[test]
    fn memory_is_readied_from_the_start_on_and_what_is_ready_is_not_asked_for_again() {
        let storage: Arc<dyn Storage> = Arc::new(AnonMedia);
        let blob = storage.create("1", 4 * FAULT_STEP, &[]).unwrap();
        let segment = Segment::fresh(1, 0, Binding::new(&[7; 16], 1), storage, blob).unwrap();
        assert_eq!(segment.lead(), Some(0));
        segment.fault_in().unwrap();
        assert_eq!(segment.lead(), Some(FAULT_STEP - SEGMENT_HEAD));
        segment.claim(FAULT_STEP).unwrap();
        assert_eq!(segment.lead(), Some(0), "an append came first");
        (0..3).for_each(|_| segment.fault_in().unwrap());
        assert_eq!(segment.lead(), None);
        segment.fault_in().unwrap();
    }

    #[test]
    fn a_record_that_could_not_be_written_is_not_read_and_its_neighbours_are() {
        let disk = SimDisk::new();
        let (segment, poison) = (fresh(&disk), Poison::default());
        let lens: Vec<u64> = [1, 2, 3].iter().map(|n| codec::record_len(0, n * 100).unwrap()).collect();
        let starts: Vec<u64> = lens.iter().map(|len| segment.claim(*len).unwrap()).collect();
        disk.fail(DiskOp::Append, 1, io::ErrorKind::Other);
        for (start, n) in starts.iter().zip([1, 2, 3]) {
            segment.put(*start, &Meta::bare(Kind::Pad, 0, 0), &[], &vec![9; n * 100], &poison);
        }
        assert!(poison.is_set());
        let found: Vec<bool> = starts.iter().map(|start| segment.record(64 * 1024 + start).is_some()).collect();
        assert_eq!(found, [true, false, true]);
        assert_eq!(segment.records().count(), 1);
    }
}
