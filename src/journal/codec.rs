//! Bytes of a segment: its header, and the records in it (format version 1). The list of segments is such a record too.
//!
//! Segment header, at offset 0. Right behind it may stand a record of kind mark or seal, which repeats how far the segment is
//! durable, so that damage at the end of its records can't hide the note of it; the first builds put it at 512. All else
//! below 4096 is zero.
//!
//! ```text
//! offset size
//!      0    8  magic "ONCEKEY\x01"
//!      8    2  major version: a reader refuses any other
//!     10    2  minor version: a reader ignores it
//!     12    4  feature bits: a reader refuses any that it doesn't know. Bit 0: all behind the header is void;
//!              bit 1, of the store's own file only: its segments are listed
//!     16   16  store id
//!     32    8  segment number
//!     40    8  segment length in bytes
//!     48   12  zero
//!     60    4  CRC-32C of the above
//! ```
//!
//! Record, at a multiple of 8:
//!
//! ```text
//! offset size
//!      0    1  kind
//!      1    1  zero
//!      2    2  length of the stored key
//!      4    4  length of the payload
//!      8    4  CRC-32C of all that follows this header
//!     12    4  attempt: 1 for the first reservation of a key (list: its slot's length in units of 4 KiB; 0: not said)
//!     16    8  fence (mark and seal: LSN below which all is durable; list: its sequence number)
//!     24    8  when it was written, Unix ms
//!     32    8  end of the lease or of the retention, Unix ms; all ones: never
//!     40   16  fingerprint
//!     56    4  recovery points before this record within the reservation
//!     60    4  CRC-32C of this header with zero in this field
//!     64       stored key (two u16 lengths, scope, operation, key), payload, zeros to a multiple of 8
//! ```
//!
//! All integers are little-endian.
//!
//! - **F1** Both CRCs start from a value made of store id, segment number and offset: a record copied to another place,
//!   segment or store is not valid there.
//! - **F2** A kind is never zero, and zeros never are a record: space not yet written reads as such.
//! - **F3** Nothing is allocated, and no offset followed, by a length that the header's CRC doesn't cover.

use crate::fingerprint::Fingerprint;
use crate::key::Key;
use crate::state::Phase;

/// Bytes at the start of a segment that hold no records.
pub(crate) const SEGMENT_HEAD: u64 = 4096;
/// Bytes of a segment's header.
pub(crate) const SEGMENT_HEADER: usize = 64;
/// Where the head's mark stands: next to the header, so that what takes the mark and all records can hardly spare the header.
pub(crate) const HEAD_MARK: u64 = SEGMENT_HEADER as u64;
/// Where the first builds wrote it.
pub(crate) const OLD_HEAD_MARK: u64 = 512;
/// Bytes of a record's header.
pub(crate) const HEADER: usize = 64;
const MAGIC: [u8; 8] = *b"ONCEKEY\x01";
const MAJOR: u16 = 1;
const MINOR: u16 = 0;
/// Feature bit of a segment that is being made a spare again: nothing behind its header counts.
const VOID: u32 = 1;
/// Feature bit of a store that lists its segments, in its own file only.
const LISTED: u32 = 2;
const KNOWN_FEATURES: u32 = VOID | LISTED;

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum Kind {
    /// A key is reserved; the payload is the recovery point taken over from an interrupted owner.
    Reserved = 0x11,
    /// The payload is a recovery point of the reservation.
    Point = 0x12,
    /// The payload is the answer.
    Completed = 0x21,
    /// The payload is the answer, a definitive failure.
    Failed = 0x22,
    /// The reservation was released.
    Released = 0x31,
    /// A record whose key and payload were erased.
    Scrubbed = 0x41,
    /// The payload lists records to scrub: LSN and length, 8 bytes each.
    Erase = 0x42,
    /// Everything in this segment below the LSN in `fence` is durable.
    Mark = 0x51,
    /// The same, and nothing follows.
    Seal = 0x52,
    /// Space that was claimed and not used.
    Pad = 0x61,
    /// Which segments there are; never in a segment.
    List = 0x71,
}

impl Kind {
    #[inline]
    fn from_byte(byte: u8) -> Option<Kind> {
        Some(match byte {
            0x11 => Kind::Reserved,
            0x12 => Kind::Point,
            0x21 => Kind::Completed,
            0x22 => Kind::Failed,
            0x31 => Kind::Released,
            0x41 => Kind::Scrubbed,
            0x42 => Kind::Erase,
            0x51 => Kind::Mark,
            0x52 => Kind::Seal,
            0x61 => Kind::Pad,
            0x71 => Kind::List,
            _ => return None,
        })
    }

    /// Whether a table slot can stand for the record.
    pub(crate) fn is_live_kind(self) -> bool {
        self.phase().is_some_and(|phase| phase != Phase::Released)
    }

    /// What a record that carries a key in clear says of it.
    pub(crate) fn phase(self) -> Option<Phase> {
        match self {
            Kind::Reserved | Kind::Point => Some(Phase::Reserved),
            Kind::Completed | Kind::Failed => Some(Phase::Completed),
            Kind::Released => Some(Phase::Released),
            Kind::Scrubbed | Kind::Erase | Kind::Mark | Kind::Seal | Kind::Pad | Kind::List => None,
        }
    }
}

/// The header's fields, without lengths and checksums.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Meta {
    pub(crate) kind: Kind,
    pub(crate) fence: u64,
    pub(crate) written_ms: u64,
    pub(crate) deadline_ms: u64,
    pub(crate) attempt: u32,
    pub(crate) sequence: u32,
    pub(crate) fingerprint: Fingerprint,
}

impl Meta {
    /// A record about the segment and not about a key.
    pub(crate) fn bare(kind: Kind, fence: u64, written_ms: u64) -> Self {
        let fingerprint = Fingerprint::NONE;
        Meta { kind, fence, written_ms, deadline_ms: u64::MAX, attempt: 0, sequence: 0, fingerprint }
    }
}

/// Bytes that a record takes up, or `None` if its lengths don't fit the format.
pub(crate) fn record_len(key_len: usize, payload_len: usize) -> Option<u64> {
    u16::try_from(key_len).ok()?;
    u32::try_from(payload_len).ok()?;
    Some(((HEADER + key_len + payload_len) as u64).next_multiple_of(8))
}

/// The starting value of a segment's CRCs (F1).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Binding(u32);

impl Binding {
    pub(crate) fn new(store_id: &[u8; 16], segment: u64) -> Self {
        let segment = if planted!(SegmentUnbound) { 0 } else { segment };
        Binding(crc32c::crc32c_append(crc32c::crc32c(store_id), &segment.to_le_bytes()))
    }

    /// Distinct for all offsets of a segment, as they are below 2^32 and the factor is odd.
    #[inline]
    fn at(self, offset: u64) -> u32 {
        self.0 ^ (offset as u32).wrapping_mul(0x9e37_79b1)
    }
}

/// Records up to this length are put together in one place first: one checksum over whole words, one copy.
const SMALL: usize = 384;
/// Most records without a payload are no longer than this, and are spared the clearing of more.
const SMALLEST: usize = 128;

/// Aligned, so that checksums are taken by whole words.
#[repr(align(8))]
struct Buffer<const N: usize>([u8; N]);

/// Encodes a record, and hands it to `write` in one piece or several.
///
/// `key` is the stored key, in up to four pieces.
#[inline]
pub(crate) fn encode<T>(
    binding: Binding,
    offset: u64,
    meta: &Meta,
    key: &[&[u8]],
    payload: &[u8],
    write: impl FnOnce(&[&[u8]]) -> T,
) -> T {
    let key_len = key.iter().map(|part| part.len()).sum::<usize>();
    let len = (HEADER + key_len + payload.len()).next_multiple_of(8);
    let start = binding.at(offset);
    if len <= SMALLEST {
        let mut buffer = Buffer([0; SMALLEST]);
        return write(&[put_together(&mut buffer.0, start, meta, key, payload)]);
    }
    if len <= SMALL {
        let mut buffer = Buffer([0; SMALL]);
        return write(&[put_together(&mut buffer.0, start, meta, key, payload)]);
    }
    let padding = &[0; 8][..len - HEADER - key_len - payload.len()];
    let crc = key.iter().fold(start, |crc, part| crc32c::crc32c_append(crc, part));
    let body_crc = crc32c::crc32c_append(crc32c::crc32c_append(crc, payload), padding);
    let mut header = Buffer([0; HEADER]);
    fill_header(&mut header.0, start, meta, (key_len, payload.len()), body_crc);
    let mut parts: [&[u8]; 7] = [b""; 7];
    parts[0] = &header.0;
    parts[1..=key.len()].copy_from_slice(key);
    parts[key.len() + 1] = payload;
    parts[key.len() + 2] = padding;
    write(&parts[..key.len() + 3])
}

/// Puts a record together in a zeroed buffer that holds it.
#[inline]
fn put_together<'b>(bytes: &'b mut [u8], start: u32, meta: &Meta, key: &[&[u8]], payload: &[u8]) -> &'b [u8] {
    let mut at = HEADER;
    for part in key.iter().filter(|part| !part.is_empty()) {
        bytes[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    let key_len = at - HEADER;
    if !payload.is_empty() {
        bytes[at..at + payload.len()].copy_from_slice(payload);
    }
    let bytes = &mut bytes[..(at + payload.len()).next_multiple_of(8)];
    let body_crc = crc32c::crc32c_append(start, &bytes[HEADER..]);
    let header = bytes.first_chunk_mut().expect("a record is no shorter than its header");
    fill_header(header, start, meta, (key_len, payload.len()), body_crc);
    bytes
}

/// Fills a zeroed header; `lens` are those of key and payload.
#[inline]
fn fill_header(bytes: &mut [u8; HEADER], start: u32, meta: &Meta, lens: (usize, usize), body_crc: u32) {
    bytes[0] = meta.kind as u8;
    bytes[2..4].copy_from_slice(&(lens.0 as u16).to_le_bytes());
    bytes[4..8].copy_from_slice(&(lens.1 as u32).to_le_bytes());
    bytes[8..12].copy_from_slice(&body_crc.to_le_bytes());
    bytes[12..16].copy_from_slice(&meta.attempt.to_le_bytes());
    bytes[16..24].copy_from_slice(&meta.fence.to_le_bytes());
    bytes[24..32].copy_from_slice(&meta.written_ms.to_le_bytes());
    bytes[32..40].copy_from_slice(&meta.deadline_ms.to_le_bytes());
    bytes[40..56].copy_from_slice(meta.fingerprint.as_bytes());
    bytes[56..60].copy_from_slice(&meta.sequence.to_le_bytes());
    let crc = crc32c::crc32c_append(start, bytes);
    bytes[60..64].copy_from_slice(&crc.to_le_bytes());
}

/// A record of this length (a multiple of 8) whose payload is zeros.
pub(crate) fn encode_blank(binding: Binding, offset: u64, kind: Kind, len: u64) -> Vec<u8> {
    let payload = vec![0; len as usize - HEADER];
    encode(binding, offset, &Meta::bare(kind, 0, 0), &[], &payload, |parts| parts.concat())
}

/// A mark or seal that says: all below this LSN is durable.
pub(crate) fn encode_mark(binding: Binding, offset: u64, kind: Kind, durable_lsn: u64) -> Vec<u8> {
    encode(binding, offset, &Meta::bare(kind, durable_lsn, 0), &[], b"", |parts| parts.concat())
}

/// Kind and length of a record, by its header at that offset; `None` if it is no header.
pub(crate) fn header_says(binding: Binding, offset: u64, header: &[u8; HEADER]) -> Option<(Kind, u64)> {
    let kind = Kind::from_byte(header[0]).filter(|_| header[1] == 0)?;
    if header_crc(binding.at(offset), header) != field(header, 60) && !planted!(HeaderUnchecked) {
        return None;
    }
    let len = record_len(key_len(header), field(header, 4) as usize)?;
    let is_bare = !matches!(kind, Kind::Mark | Kind::Seal) || len == HEADER as u64;
    is_bare.then_some((kind, len))
}

fn header_crc(start: u32, header: &[u8; HEADER]) -> u32 {
    let mut zeroed = Buffer(*header);
    zeroed.0[60..].fill(0);
    crc32c::crc32c_append(start, &zeroed.0)
}

fn key_len(header: &[u8; HEADER]) -> usize {
    usize::from(u16::from_le_bytes([header[2], header[3]]))
}

/// Bytes of header, key and payload, by the header.
#[inline]
pub(crate) fn span(header: &[u8; HEADER]) -> usize {
    HEADER + key_len(header) + field(header, 4) as usize
}

/// A record in memory whose lengths are known to fit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RecordRef<'a> {
    kind: Kind,
    header: &'a [u8; HEADER],
    body: &'a [u8],
}

/// Why bytes are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unreadable {
    /// The header is damaged, so the record's length is not known.
    Header,
    /// The header is whole; the key or the payload is damaged.
    Body {
        /// Bytes that the record takes up.
        len: u64,
    },
}

impl<'a> RecordRef<'a> {
    /// Takes a record apart without checking its CRCs; `None` if its lengths overrun `bytes`.
    #[inline(always)]
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let header = bytes.first_chunk::<HEADER>()?;
        let kind = Kind::from_byte(header[0])?;
        let body = bytes.get(HEADER..span(header))?;
        Some(RecordRef { kind, header, body })
    }

    /// Reads and checks the record at `offset` of a segment's bytes.
    pub(crate) fn check(binding: Binding, segment: &'a [u8], offset: u64) -> Result<Self, Unreadable> {
        RecordRef::check_first(binding, segment.get(offset as usize..).ok_or(Unreadable::Header)?, offset)
    }

    /// Reads and checks the record that some bytes begin with, which are those of a segment from `offset` on.
    pub(crate) fn check_first(binding: Binding, bytes: &'a [u8], offset: u64) -> Result<Self, Unreadable> {
        let header = bytes.first_chunk::<HEADER>().ok_or(Unreadable::Header)?;
        let (_, len) = header_says(binding, offset, header).ok_or(Unreadable::Header)?;
        let record = RecordRef::parse(bytes).ok_or(Unreadable::Header)?;
        let start = binding.at(offset);
        let padded = bytes.get(HEADER..len as usize).ok_or(Unreadable::Header)?;
        let key_is_whole = record.kind.phase().is_none() || Key::parse(record.stored_key()).is_some();
        let body_is_whole = crc32c::crc32c_append(start, padded) == field(header, 8) || planted!(BodyUnchecked);
        if !body_is_whole || !key_is_whole {
            return Err(Unreadable::Body { len });
        }
        Ok(record)
    }

    /// Bytes that the record takes up.
    pub(crate) fn len(&self) -> u64 {
        ((HEADER + self.body.len()) as u64).next_multiple_of(8)
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    #[inline]
    pub(crate) fn fence(&self) -> u64 {
        long(self.header, 16)
    }

    pub(crate) fn written_ms(&self) -> u64 {
        long(self.header, 24)
    }

    #[inline]
    pub(crate) fn deadline_ms(&self) -> u64 {
        long(self.header, 32)
    }

    pub(crate) fn attempt(&self) -> u32 {
        field(self.header, 12)
    }

    pub(crate) fn sequence(&self) -> u32 {
        field(self.header, 56)
    }

    #[inline]
    pub(crate) fn fingerprint(&self) -> Fingerprint {
        let mut digest = [0; 16];
        digest.copy_from_slice(&self.header[40..56]);
        Fingerprint::from_bytes(digest)
    }

    #[inline]
    pub(crate) fn stored_key(&self) -> &'a [u8] {
        &self.body[..key_len(self.header)]
    }

    #[inline]
    pub(crate) fn payload(&self) -> &'a [u8] {
        &self.body[key_len(self.header)..]
    }

    pub(crate) fn meta(&self) -> Meta {
        Meta {
            kind: self.kind,
            fence: self.fence(),
            written_ms: self.written_ms(),
            deadline_ms: self.deadline_ms(),
            attempt: self.attempt(),
            sequence: self.sequence(),
            fingerprint: self.fingerprint(),
        }
    }
}

/// The four bytes at an offset as a number; the caller knows that they are there.
#[inline]
pub(super) fn field(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The eight bytes at an offset as a number; the caller knows that they are there.
#[inline]
pub(super) fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(field(bytes, at)) | u64::from(field(bytes, at + 4)) << 32
}

/// What a segment is called, and where it belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub(crate) store_id: [u8; 16],
    pub(crate) number: u64,
    pub(crate) len: u64,
    /// Whether it is on its way to another number, and what stands behind the header is void.
    pub(crate) is_void: bool,
    /// Of the store's own file: whether its segments are listed.
    pub(crate) is_listed: bool,
}

/// Why a segment or store header can't be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BadHeader {
    /// It is not what was written.
    Damaged,
    /// It was written by a version that this build doesn't read.
    Newer {
        /// Its major version.
        major: u16,
        /// Its feature bits.
        features: u32,
    },
}

impl SegmentHeader {
    pub(crate) fn new(store_id: [u8; 16], number: u64, len: u64) -> Self {
        SegmentHeader { store_id, number, len, is_void: false, is_listed: false }
    }

    pub(crate) fn encode(&self) -> [u8; SEGMENT_HEADER] {
        let mut bytes = [0; SEGMENT_HEADER];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&MAJOR.to_le_bytes());
        bytes[10..12].copy_from_slice(&MINOR.to_le_bytes());
        let features = if self.is_void { VOID } else { 0 } | if self.is_listed { LISTED } else { 0 };
        bytes[12..16].copy_from_slice(&features.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.store_id);
        bytes[32..40].copy_from_slice(&self.number.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.len.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, BadHeader> {
        let bytes = bytes.first_chunk::<SEGMENT_HEADER>().ok_or(BadHeader::Damaged)?;
        if bytes[..8] != MAGIC || crc32c::crc32c(&bytes[..60]) != field(bytes, 60) {
            return Err(BadHeader::Damaged);
        }
        let major = u16::from_le_bytes([bytes[8], bytes[9]]);
        let features = field(bytes, 12);
        let number = long(bytes, 32);
        let known = if number == 0 { KNOWN_FEATURES } else { KNOWN_FEATURES & !LISTED };
        if major != MAJOR || features & !known != 0 {
            return Err(BadHeader::Newer { major, features });
        }
        let mut store_id = [0; 16];
        store_id.copy_from_slice(&bytes[16..32]);
        let (is_void, is_listed) = (features & VOID != 0, features & LISTED != 0);
        Ok(SegmentHeader { store_id, number, len: long(bytes, 40), is_void, is_listed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STORE: [u8; 16] = [7; 16];

    fn meta(kind: Kind) -> Meta {
        Meta {
            kind,
            fence: 1 << 40,
            written_ms: 1_700_000_000_000,
            deadline_ms: u64::MAX,
            attempt: 3,
            sequence: 2,
            fingerprint: Fingerprint::of(b"payload"),
        }
    }

    /// A segment of 8 KiB with one record at `offset`.
    fn segment(binding: Binding, offset: u64, kind: Kind, key: &Key<'_>, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 8192];
        let prefix = key.prefix();
        let parts = [&prefix[..], key.scope, key.operation, key.key];
        let record = encode(binding, offset, &meta(kind), &parts, payload, |parts| parts.concat());
        bytes[offset as usize..offset as usize + record.len()].copy_from_slice(&record);
        bytes
    }

    const KEY: Key<'static> = Key { scope: b"acme", operation: b"charge", key: b"order-42" };

    proptest! {
        #[test]
        fn a_record_reads_back_as_it_was_written(payload in prop::collection::vec(any::<u8>(), 0..3000), at in 0u64..100) {
            let binding = Binding::new(&STORE, 9);
            let offset = at * 8;
            let bytes = segment(binding, offset, Kind::Completed, &KEY, &payload);
            let record = RecordRef::check(binding, &bytes, offset).unwrap();
            prop_assert!(KEY.matches(record.stored_key()));
            prop_assert_eq!(record.payload(), &payload[..]);
            prop_assert_eq!(record.len(), record_len(KEY.stored_len(), payload.len()).unwrap());
            prop_assert_eq!(format!("{:?}", record.meta()), format!("{:?}", meta(Kind::Completed)));
        }

        #[test]
        fn a_record_is_valid_in_its_own_place_only(from in 0u64..100, to in 0u64..100, segment_no in 0u64..4, other in 0u8..2) {
            let binding = Binding::new(&STORE, 1);
            let bytes = segment(binding, from * 8, Kind::Reserved, &KEY, b"");
            let mut moved = vec![0; 8192];
            let len = record_len(KEY.stored_len(), 0).unwrap() as usize;
            let (from, to) = (from as usize * 8, to as usize * 8);
            moved[to..to + len].copy_from_slice(&bytes[from..from + len]);
            let there = Binding::new(&[7 + other; 16], segment_no);
            let stays = from == to && segment_no == 1 && other == 0;
            prop_assert_eq!(RecordRef::check(there, &moved, to as u64).is_ok(), stays);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), at in 0u64..40) {
            prop_assert!(RecordRef::check(Binding::new(&STORE, 0), &bytes, at * 8).is_err());
            let _ = RecordRef::parse(&bytes);
            prop_assert!(SegmentHeader::decode(&bytes).is_err());
        }
    }

    #[test]
    fn a_kind_is_read_back_from_its_byte() {
        use Kind::*;
        for kind in [Reserved, Point, Completed, Failed, Released, Scrubbed, Erase, Mark, Seal, Pad, List] {
            assert_eq!(Kind::from_byte(kind as u8), Some(kind));
        }
        assert_eq!((0..=255).filter_map(Kind::from_byte).count(), 11);
    }

    #[test]
    fn every_flipped_bit_of_a_record_is_noticed() {
        let binding = Binding::new(&STORE, 1);
        let good = segment(binding, 64, Kind::Completed, &KEY, b"the answer");
        let len = record_len(KEY.stored_len(), 10).unwrap() as usize;
        for bit in 64 * 8..(64 + len) * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(RecordRef::check(binding, &bytes, 64).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn zeros_are_no_record() {
        assert_eq!(RecordRef::check(Binding::new(&[0; 16], 0), &[0; 4096], 0).unwrap_err(), Unreadable::Header);
    }

    #[test]
    fn a_header_of_a_newer_version_says_so() {
        let header = SegmentHeader::new(STORE, 3, 65536);
        let reseal = |mut bytes: [u8; 64]| {
            let crc = crc32c::crc32c(&bytes[..60]);
            bytes[60..].copy_from_slice(&crc.to_le_bytes());
            bytes
        };
        let mut newer = header.encode();
        newer[8] = 2;
        assert_eq!(SegmentHeader::decode(&reseal(newer)), Err(BadHeader::Newer { major: 2, features: 0 }));
        let mut featured = header.encode();
        featured[15] = 0x80;
        assert_eq!(SegmentHeader::decode(&reseal(featured)), Err(BadHeader::Newer { major: 1, features: 1 << 31 }));
        let mut minor = header.encode();
        minor[10] = 9;
        assert_eq!(SegmentHeader::decode(&reseal(minor)), Ok(header));
    }
}
