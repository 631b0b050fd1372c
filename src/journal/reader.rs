//! Reads a segment's bytes back, whatever state they are in.
//!
//! The scan goes from record to record. Where none can be read it looks for the next one at every multiple of eight: both
//! CRCs of a record are bound to its place, so bytes that only look like one don't pass. What lies between is a gap; what
//! a gap means is for recovery to say. Zeros up to the segment's end are not a gap but space that was never written.

use super::codec::{
    Binding, HEAD_MARK, HEADER, Kind, OLD_HEAD_MARK, RecordRef, SEGMENT_HEAD, SEGMENT_HEADER, Unreadable, long,
};
use super::dues::Dues;
use super::media::Blob;
use crate::state::Phase;
use std::io;

/// A stretch that holds no readable record although something follows or stands in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gap {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Whether the header of a record at `start` is whole, so that just this record is damaged.
    pub(crate) header_is_whole: bool,
}

/// A record that an erasure set out to overwrite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Target {
    pub(crate) lsn: u64,
    pub(crate) len: u64,
}

impl Target {
    pub(crate) fn encode(targets: &[Target]) -> Vec<u8> {
        targets.iter().flat_map(|target| [target.lsn.to_le_bytes(), target.len.to_le_bytes()]).flatten().collect()
    }

    fn decode_all(payload: &[u8]) -> impl Iterator<Item = Target> + '_ {
        payload.chunks_exact(16).map(|pair| Target { lsn: long(pair, 0), len: long(pair, 8) })
    }
}

/// What a segment holds.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    pub(crate) records: u64,
    /// Where the last readable record ends, seal not counted; the segment's head if there is none.
    pub(crate) end: u64,
    /// Offset below which a mark or seal says that all is durable.
    pub(crate) durable: u64,
    pub(crate) is_sealed: bool,
    /// Whether the segment's head repeats the seal.
    pub(crate) head_is_sealed: bool,
    /// In order of offset; the last may end at the last byte that isn't zero.
    pub(crate) gaps: Vec<Gap>,
    /// Whether it holds records of the reservations stream.
    pub(crate) has_reservations: bool,
    /// Reservations that it holds, taken over or not.
    pub(crate) reservations: u64,
    pub(crate) answers: u64,
    pub(crate) newest_ms: u64,
    /// The highest fence of its keys' records.
    pub(crate) newest_fence: u64,
    pub(crate) targets: Vec<Target>,
}

/// Where a head may have a mark.
const HEAD_MARKS: [u64; 2] = [HEAD_MARK, OLD_HEAD_MARK];

impl Scan {
    /// What a scan of zeros finds.
    pub(crate) fn blank() -> Self {
        Scan { end: SEGMENT_HEAD, durable: SEGMENT_HEAD, ..Scan::default() }
    }

    /// What the head's marks say.
    pub(crate) fn of_head(bytes: &[u8], binding: Binding, base: u64) -> Self {
        let mut scan = Scan::blank();
        for mark in HEAD_MARKS.iter().filter_map(|at| RecordRef::check(binding, bytes, *at).ok()) {
            scan.durable = scan.durable.max(mark.fence().saturating_sub(base));
            scan.head_is_sealed |= mark.kind() == Kind::Seal;
        }
        scan
    }

    /// Whether nothing was ever written.
    pub(crate) fn is_blank(&self) -> bool {
        self.end == SEGMENT_HEAD && self.gaps.is_empty() && !self.is_sealed
    }
}

/// As [`scan`], a piece at a time, which stays in the cache; `None` if there is a gap, or a record longer than a piece.
///
/// `visit` is shown each record, with its offset.
pub(crate) fn scan_in_pieces(
    blob: &dyn Blob,
    binding: Binding,
    base: u64,
    piece: &mut Vec<u8>,
    mut visit: impl FnMut(u64, &RecordRef<'_>),
) -> io::Result<Option<Scan>> {
    let len = blob.len();
    // Before anything is read, and ahead of that more.
    let data_end = blob.data_end()?;
    let read = |from: u64, piece: &mut Vec<u8>| {
        piece.resize(PIECE.min(len - from) as usize, 0);
        blob.read_at(from, piece)
    };
    read(0, piece)?;
    let mut scan = Scan::of_head(piece, binding, base);
    let (mut start, mut at) = (0, SEGMENT_HEAD);
    let mut has_ended = false;
    loop {
        let rest = &piece[(at - start) as usize..];
        let is_last = start + piece.len() as u64 == len;
        has_ended |= scan.is_sealed || !rest.is_empty() && rest.iter().take(8).all(|byte| *byte == 0);
        if has_ended && !rest.is_empty() {
            if !is_zero(rest) {
                return Ok(None);
            }
            at += rest.len() as u64;
        } else if has_ended && at >= data_end {
            // Most of a spare was never written.
            return Ok(Some(scan));
        } else if let Ok(record) = RecordRef::check_first(binding, rest, at) {
            scan.note(&record, at, base);
            visit(at, &record);
            at += record.len();
        } else if is_last && rest.is_empty() {
            return Ok(Some(scan));
        } else if is_last || at == start {
            return Ok(None);
        } else {
            // All of it may be in the next piece.
            start = at;
            read(start, piece)?;
        }
    }
}

/// Checks all records of a segment that is sealed at `end`, and says when its answers fall due; the inner error says where the
/// first is that is none.
pub(crate) fn check(blob: &dyn Blob, binding: Binding, base: u64, end: u64) -> io::Result<Result<Dues, u64>> {
    let mut bytes = Vec::new();
    let dues = Dues::new(blob.len());
    let note = |at, record: &RecordRef<'_>| {
        if record.kind().phase() == Some(Phase::Completed) {
            dues.note(at, record.deadline_ms());
        }
    };
    let scan = match scan_in_pieces(blob, binding, base, &mut bytes, note)? {
        Some(scan) => scan,
        // Or a record is longer than a piece.
        None => {
            bytes.resize(blob.len() as usize, 0);
            blob.read_at(0, &mut bytes)?;
            scan_visiting(&bytes, binding, base, note)
        }
    };
    // Behind the seal nothing counts.
    let damaged_at = match scan.gaps.first().filter(|gap| gap.start < end) {
        Some(gap) => Some(gap.start),
        None => (!scan.is_sealed || scan.end != end).then_some(scan.end),
    };
    Ok(damaged_at.map_or(Ok(dues), Err))
}

/// Reads all of a segment's bytes.
pub(crate) fn scan(bytes: &[u8], binding: Binding, base: u64) -> Scan {
    scan_visiting(bytes, binding, base, |_, _| {})
}

/// As [`scan`]; `visit` is shown each record, with its offset.
fn scan_visiting(bytes: &[u8], binding: Binding, base: u64, mut visit: impl FnMut(u64, &RecordRef<'_>)) -> Scan {
    let mut scan = Scan::of_head(bytes, binding, base);
    let mut at = SEGMENT_HEAD;
    while let Some(found) = next_written(bytes, at) {
        let gap_start = at;
        match RecordRef::check(binding, bytes, at) {
            Ok(record) => {
                scan.note(&record, at, base);
                visit(at, &record);
                at += record.len();
                if scan.is_sealed {
                    // Nothing was ever written behind a seal.
                    let end = last_written(bytes);
                    if end > at {
                        scan.gaps.push(Gap { start: at, end, header_is_whole: false });
                    }
                    break;
                }
                continue;
            }
            Err(Unreadable::Body { len }) => {
                scan.gaps.push(Gap { start: at, end: at + len, header_is_whole: true });
                at += len;
                continue;
            }
            Err(Unreadable::Header) => {}
        }
        let from = found.max(at + 8);
        match next_record(bytes, binding, from) {
            Some(next) => {
                scan.gaps.push(Gap { start: gap_start, end: next, header_is_whole: false });
                at = next;
            }
            None => {
                let end = last_written(bytes);
                scan.gaps.push(Gap { start: gap_start, end, header_is_whole: false });
                break;
            }
        }
    }
    scan
}

impl Scan {
    fn note(&mut self, record: &RecordRef<'_>, at: u64, base: u64) {
        match record.kind() {
            // It can't vouch for what stands behind it.
            Kind::Mark => self.durable = self.durable.max(record.fence().saturating_sub(base).min(at)),
            Kind::Seal => {
                self.durable = self.durable.max(record.fence().saturating_sub(base).min(at));
                self.is_sealed = true;
                self.end = at;
                return;
            }
            Kind::Erase => self.targets.extend(Target::decode_all(record.payload())),
            Kind::Reserved | Kind::Point | Kind::Released => {
                self.has_reservations = true;
                self.reservations += u64::from(record.kind() == Kind::Reserved);
            }
            Kind::Completed | Kind::Failed => self.answers += 1,
            Kind::Scrubbed | Kind::Pad | Kind::List => {}
        }
        if record.kind().phase().is_some() {
            self.newest_fence = self.newest_fence.max(record.fence());
        }
        self.records += 1;
        self.end = at + record.len();
        self.newest_ms = self.newest_ms.max(record.written_ms());
    }
}

/// Whether anything but a header and a mark stands below the first record.
pub(crate) fn head_is_dirty(bytes: &[u8], binding: Binding) -> bool {
    let whole = HEAD_MARKS.map(|at| RecordRef::check(binding, bytes, at).is_ok().then_some(at as usize));
    let is_mark = |byte| whole.iter().flatten().any(|at| (*at..at + HEADER).contains(&byte));
    (SEGMENT_HEADER..SEGMENT_HEAD as usize).any(|at| bytes[at] != 0 && !is_mark(at))
}

/// The first multiple of eight from `at` on where not all eight bytes are zero.
fn next_written(bytes: &[u8], at: u64) -> Option<u64> {
    let rest = bytes.get(at as usize..)?;
    if rest.first().is_some_and(|byte| *byte != 0) {
        // As in most cases: the next record's kind.
        return Some(at);
    }
    let zero_blocks = rest.chunks(ZERO_BLOCK).take_while(|block| is_zero(block)).count();
    let from = zero_blocks * ZERO_BLOCK;
    let words = rest.get(from..)?.chunks(8).take_while(|word| is_zero(word)).count();
    let found = from + words * 8;
    (found < rest.len()).then_some(at + found as u64)
}

/// The end of the last eight bytes that aren't all zero.
fn last_written(bytes: &[u8]) -> u64 {
    let zeros: usize = bytes.rchunks(ZERO_BLOCK).take_while(|block| is_zero(block)).map(<[u8]>::len).sum();
    let last = bytes[..bytes.len() - zeros].iter().rposition(|byte| *byte != 0).map_or(0, |at| at + 1);
    last.next_multiple_of(8).min(bytes.len()) as u64
}

/// Bytes that are read together.
const PIECE: u64 = 256 * 1024;

/// Bytes that are looked at together, most of them being zero behind the records.
const ZERO_BLOCK: usize = 4096;

/// Without a way out in the middle, so that it takes vectors of bytes at a time.
fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0, |all, byte| all | byte) == 0
}

fn next_record(bytes: &[u8], binding: Binding, from: u64) -> Option<u64> {
    let last = (bytes.len() as u64).checked_sub(HEADER as u64)?;
    (from..=last).step_by(8).find(|at| match RecordRef::check(binding, bytes, *at) {
        Ok(_) | Err(Unreadable::Body { .. }) => true,
        Err(Unreadable::Header) => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::codec::{Meta, encode};
    use crate::journal::media::{AnonMedia, Storage};
    use proptest::prelude::*;

    const LEN: usize = 16 * 1024;
    const BASE: u64 = 1 << 20;

    fn binding() -> Binding {
        Binding::new(&[1; 16], 1)
    }

    /// A segment with bare records of the given kinds, and where each begins.
    fn segment(kinds: &[(Kind, u64)]) -> (Vec<u8>, Vec<u64>) {
        let mut bytes = vec![0; LEN];
        let mut at = SEGMENT_HEAD;
        let mut starts = Vec::new();
        for &(kind, fence) in kinds {
            let payload = vec![at as u8; if matches!(kind, Kind::Mark | Kind::Seal) { 0 } else { 16 }];
            let meta = Meta::bare(kind, fence, 5);
            let record = encode(binding(), at, &meta, &[], &payload, |parts| parts.concat());
            bytes[at as usize..][..record.len()].copy_from_slice(&record);
            starts.push(at);
            at += record.len() as u64;
        }
        starts.push(at);
        (bytes, starts)
    }

    #[test]
    fn an_unwritten_segment_is_blank() {
        assert!(scan(&vec![0; LEN], binding(), BASE).is_blank());
    }

    #[test]
    fn a_hole_is_a_gap_and_what_follows_it_is_found() {
        let (mut bytes, starts) = segment(&[(Kind::Pad, 0); 5]);
        bytes[starts[1] as usize..starts[3] as usize].fill(0);
        let found = scan(&bytes, binding(), BASE);
        assert_eq!(found.gaps, [Gap { start: starts[1], end: starts[3], header_is_whole: false }]);
        assert_eq!((found.records, found.end), (3, starts[5]));
    }

    #[test]
    fn damage_at_the_end_is_a_gap_up_to_the_last_byte() {
        let (mut bytes, starts) = segment(&[(Kind::Pad, 0), (Kind::Mark, BASE + 8192), (Kind::Pad, 0)]);
        bytes[starts[2] as usize] ^= 1;
        let found = scan(&bytes, binding(), BASE);
        assert_eq!(found.gaps, [Gap { start: starts[2], end: starts[3], header_is_whole: false }]);
        // The mark says 8192, and can't know that of what came after it.
        assert_eq!((found.records, found.end, found.durable), (2, starts[2], starts[1]));
    }

    #[test]
    fn a_damaged_payload_costs_no_more_than_its_record() {
        let (mut bytes, starts) = segment(&[(Kind::Pad, 0); 3]);
        bytes[starts[1] as usize + 70] ^= 1;
        let found = scan(&bytes, binding(), BASE);
        assert_eq!(found.gaps, [Gap { start: starts[1], end: starts[2], header_is_whole: true }]);
        assert_eq!(found.records, 2);
    }

    /// In pieces and at once the same is found, unless there is a gap.
    fn check_pieces(bytes: &[u8], found: &Scan) {
        let blob = AnonMedia.create("any", bytes.len() as u64, bytes).unwrap();
        let in_pieces = scan_in_pieces(&*blob, binding(), BASE, &mut Vec::new(), |_, _| {}).unwrap();
        assert_eq!(in_pieces.is_some(), found.gaps.is_empty());
        if let Some(in_pieces) = in_pieces {
            assert_eq!(format!("{in_pieces:?}"), format!("{found:?}"));
        }
    }

    #[test]
    fn a_segment_of_many_pieces_is_read_to_its_end() {
        for (records, is_sealed) in [(0, false), (5, false), (5, true), (4000, false), (4000, true), (100_000, true)] {
            let mut bytes = vec![0; 8 << 20];
            let mut at = SEGMENT_HEAD;
            let mut put = |kind, fence, len: usize| {
                let meta = Meta::bare(kind, fence, 5);
                let record = encode(binding(), at, &meta, &[], &vec![7; len], |parts| parts.concat());
                if kind == Kind::Seal || (at as usize + record.len()) < bytes.len() - HEADER {
                    bytes[at as usize..][..record.len()].copy_from_slice(&record);
                    at += record.len() as u64;
                }
                at
            };
            let end = (0..records).map(|nth| put(Kind::Pad, 0, nth % 1000)).last().unwrap_or(SEGMENT_HEAD);
            if is_sealed {
                put(Kind::Seal, BASE + end, 0);
            }
            let found = scan(&bytes, binding(), BASE);
            assert_eq!((found.is_sealed, found.gaps.len()), (is_sealed, 0));
            check_pieces(&bytes, &found);
        }
    }

    proptest! {
        #[test]
        fn gaps_and_records_cover_the_segment_without_overlap(
            damage in prop::collection::vec((SEGMENT_HEAD as usize..LEN, any::<u8>(), 1usize..200), 0..12),
        ) {
            let (mut bytes, _) = segment(&[(Kind::Pad, 0); 100]);
            for (at, value, len) in damage {
                let end = (at + len).min(LEN);
                bytes[at..end].fill(value);
            }
            let found = scan(&bytes, binding(), BASE);
            check_pieces(&bytes, &found);
            let mut last = SEGMENT_HEAD;
            for gap in &found.gaps {
                prop_assert!(gap.start >= last && gap.end > gap.start && gap.end <= LEN as u64);
                prop_assert_eq!((gap.start % 8, gap.end % 8), (0, 0));
                last = gap.end;
            }
            let in_gaps: u64 = found.gaps.iter().map(|gap| gap.end - gap.start).sum();
            let covered = found.end.max(last) - SEGMENT_HEAD;
            prop_assert_eq!(covered, in_gaps + found.records * 80);
        }
    }
}
