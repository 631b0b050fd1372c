//! Changes to a store's files by somebody who knows the format: what is forged carries the right checksums.
//!
//! The format is written down here a second time, from docs/design.md, so that a defect of the crate's own code is not hidden by
//! using it on both sides.

use libfuzzer_sys::arbitrary::{self, Arbitrary};

/// Files by name.
pub type Files = Vec<(String, Vec<u8>)>;

const HEAD: usize = 4096;
const HEADER: usize = 64;
/// All that the format knows, most of what it doesn't know being refused by the first byte.
const KINDS: [u8; 11] = [0x11, 0x12, 0x21, 0x22, 0x31, 0x41, 0x42, 0x51, 0x52, 0x61, 0x71];
const START_MS: u64 = 1_767_225_600_000;

/// One change to the files; what names a file, a record or a place takes the remainder, so that every input means something.
#[derive(Arbitrary, Clone, Debug)]
pub enum Change {
    Write {
        file: u8,
        at: u16,
        bytes: Vec<u8>,
    },
    Fill {
        file: u8,
        at: u16,
        len: u16,
        value: u8,
    },
    Cut {
        file: u8,
        len: u16,
    },
    Extend {
        file: u8,
        bytes: Vec<u8>,
    },
    Copy {
        from: u8,
        to: u8,
    },
    Remove {
        file: u8,
    },
    /// A header of a segment or of the store.
    Header {
        file: u8,
        field: HeaderField,
        value: Number,
    },
    /// A field of a record that is there.
    Edit {
        file: u8,
        record: u8,
        field: Field,
        value: Number,
    },
    /// A record of its own.
    Forge {
        file: u8,
        place: Place,
        record: Record,
    },
    /// A list of segments in one slot of a file that has slots of `4096 << longer` bytes.
    List {
        slot: bool,
        longer: u8,
        sequence: Number,
        upto: Number,
        numbers: Vec<Number>,
    },
}

/// A number near the one that belongs there, near either end, or any.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Number {
    Near(i16),
    Small(u16),
    Top(u16),
    Any(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum HeaderField {
    Major,
    Minor,
    Features,
    StoreId,
    Number,
    Len,
    Rest,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Field {
    Kind,
    Blank,
    KeyLen,
    PayloadLen,
    Attempt,
    Fence,
    Written,
    Deadline,
    Fingerprint,
    Sequence,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Place {
    /// At a multiple of eight.
    At(u16),
    /// In the place of a record, of whatever length.
    Over(u8),
    Behind,
}

#[derive(Arbitrary, Clone, Debug)]
pub struct Record {
    kind: u8,
    key: KeyBytes,
    payload: Payload,
    attempt: Number,
    fence: Number,
    written: Number,
    deadline: Number,
    fingerprint: u8,
    sequence: Number,
}

#[derive(Arbitrary, Clone, Debug)]
enum KeyBytes {
    /// One of the store's keys.
    Known(u8),
    Any(Vec<u8>),
}

#[derive(Arbitrary, Clone, Debug)]
enum Payload {
    Bytes(Vec<u8>),
    /// Places for an erasure's note: of a record, or any LSN.
    Records(Vec<(u8, u8, Number)>),
    Places(Vec<(Number, Number)>),
    Zeros(u16),
}

impl Number {
    fn near(self, usual: u64) -> u64 {
        match self {
            Number::Near(by) => usual.wrapping_add_signed(i64::from(by)),
            Number::Small(value) => u64::from(value),
            Number::Top(below) => u64::MAX - u64::from(below),
            Number::Any(value) => value,
        }
    }
}

/// The name that the store has for a key of a number.
pub fn known_key(number: u8) -> [u8; 2] {
    [b'k', number]
}

/// Makes one change.
pub fn change(files: &mut Files, change: &Change) {
    if files.is_empty() {
        return;
    }
    let count = files.len();
    let pick = |file: u8| usize::from(file) % count;
    let segment_len = files.iter().filter(|(name, _)| name.ends_with(".seg")).map(|(_, bytes)| bytes.len()).max();
    let segment_len = segment_len.unwrap_or(65_536) as u64;
    match change {
        Change::Write { file, at, bytes } => {
            let contents = &mut files[pick(*file)].1;
            let at = usize::from(*at).min(contents.len());
            let end = (at + bytes.len()).min(contents.len());
            contents[at..end].copy_from_slice(&bytes[..end - at]);
        }
        Change::Fill { file, at, len, value } => {
            let contents = &mut files[pick(*file)].1;
            let at = usize::from(*at).min(contents.len());
            let end = (at + usize::from(*len)).min(contents.len());
            contents[at..end].fill(*value);
        }
        Change::Cut { file, len } => files[pick(*file)].1.truncate(usize::from(*len)),
        Change::Extend { file, bytes } => files[pick(*file)].1.extend_from_slice(bytes),
        Change::Copy { from, to } => files[pick(*to)].1 = files[pick(*from)].1.clone(),
        Change::Remove { file } => {
            files.remove(pick(*file));
        }
        Change::Header { file, field, value } => {
            let contents = &mut files[pick(*file)].1;
            if let Some(header) = contents.first_chunk_mut::<HEADER>() {
                let (at, len) = match field {
                    HeaderField::Major => (8, 2),
                    HeaderField::Minor => (10, 2),
                    HeaderField::Features => (12, 4),
                    HeaderField::StoreId => (16, 8),
                    HeaderField::Number => (32, 8),
                    HeaderField::Len => (40, 8),
                    HeaderField::Rest => (48, 8),
                };
                set(&mut header[at..at + len], *value);
                let crc = crc32c::crc32c(&header[..60]);
                header[60..].copy_from_slice(&crc.to_le_bytes());
            }
        }
        Change::Edit { file, record, field, value } => {
            let id = store_id(files);
            let (name, contents) = &mut files[pick(*file)];
            let records = records(contents);
            if records.is_empty() {
                return;
            }
            let at = records[usize::from(*record) % records.len()];
            let (start, len) = match field {
                Field::Kind => (0, 1),
                Field::Blank => (1, 1),
                Field::KeyLen => (2, 2),
                Field::PayloadLen => (4, 4),
                Field::Attempt => (12, 4),
                Field::Fence => (16, 8),
                Field::Written => (24, 8),
                Field::Deadline => (32, 8),
                Field::Fingerprint => (40, 8),
                Field::Sequence => (56, 4),
            };
            set(&mut contents[at + start..at + start + len], *value);
            sign(contents, at, binding(&id, segment_number(name)));
        }
        Change::Forge { file, place, record } => {
            let id = store_id(files);
            let file = pick(*file);
            let records = records(&files[file].1);
            let at = match place {
                Place::At(word) => usize::from(*word) * 8,
                Place::Over(_) if records.is_empty() => HEAD,
                Place::Over(nth) => records[usize::from(*nth) % records.len()],
                Place::Behind => end_of_records(&files[file].1),
            };
            let number = segment_number(&files[file].0);
            let bytes = forged(files, record, number.wrapping_mul(segment_len).wrapping_add(at as u64), segment_len);
            let contents = &mut files[file].1;
            if at + bytes.len() <= contents.len() {
                contents[at..at + bytes.len()].copy_from_slice(&bytes);
                sign(contents, at, binding(&id, number));
            }
        }
        Change::List { slot, longer, sequence, upto, numbers } => {
            let id = store_id(files);
            let highest = files.iter().map(|(name, _)| segment_number(name)).max().unwrap_or(0);
            let Some((_, contents)) = files.iter_mut().find(|(name, _)| name == "SEGMENTS") else { return };
            let slot_len = HEAD << (longer % 4);
            contents.resize(2 * slot_len, 0);
            let at = if *slot { slot_len } else { 0 };
            let listed = numbers.iter().enumerate().map(|(nth, number)| number.near(nth as u64 + 1));
            let words = std::iter::once(upto.near(highest)).chain(listed);
            let payload: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
            if HEADER + payload.len() > slot_len {
                return;
            }
            contents[at..at + slot_len].fill(0);
            contents[at] = 0x71;
            contents[at + 4..at + 8].copy_from_slice(&(payload.len() as u32).to_le_bytes());
            contents[at + 16..at + 24].copy_from_slice(&sequence.near(20).to_le_bytes());
            contents[at + 32..at + 40].fill(0xff);
            contents[at + HEADER..at + HEADER + payload.len()].copy_from_slice(&payload);
            sign(contents, at, binding(&id, 0));
        }
    }
}

/// A record's bytes, without checksums.
fn forged(files: &Files, record: &Record, lsn: u64, segment_len: u64) -> Vec<u8> {
    let key = match &record.key {
        KeyBytes::Known(number) => [&[4, 0, 0, 0][..], b"fuzz", &known_key(number % 20)].concat(),
        KeyBytes::Any(bytes) => bytes.clone(),
    };
    let payload: Vec<u8> = match &record.payload {
        Payload::Bytes(bytes) => bytes.clone(),
        Payload::Zeros(len) => vec![0; usize::from(*len)],
        Payload::Places(places) => {
            places.iter().flat_map(|(at, len)| [at.near(lsn), len.near(128)]).flat_map(u64::to_le_bytes).collect()
        }
        Payload::Records(targets) => {
            let target = |(file, nth, len): &(u8, u8, Number)| {
                let (name, contents) = &files[usize::from(*file) % files.len()];
                let records = records(contents);
                let at = records.get(usize::from(*nth) % records.len().max(1)).copied().unwrap_or(HEAD);
                let usual = contents.get(at..).map_or(0, |bytes| record_len(bytes) as u64);
                [segment_number(name).wrapping_mul(segment_len).wrapping_add(at as u64), len.near(usual)]
            };
            targets.iter().flat_map(target).flat_map(u64::to_le_bytes).collect()
        }
    };
    let mut bytes = vec![0; HEADER];
    bytes[0] = if record.kind < 200 { KINDS[usize::from(record.kind) % KINDS.len()] } else { record.kind };
    bytes[2..4].copy_from_slice(&(key.len() as u16).to_le_bytes());
    bytes[4..8].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes[12..16].copy_from_slice(&(record.attempt.near(1) as u32).to_le_bytes());
    bytes[16..24].copy_from_slice(&record.fence.near(lsn).to_le_bytes());
    bytes[24..32].copy_from_slice(&record.written.near(START_MS).to_le_bytes());
    bytes[32..40].copy_from_slice(&record.deadline.near(START_MS + 40_000).to_le_bytes());
    bytes[40..56].fill(record.fingerprint);
    bytes[56..60].copy_from_slice(&(record.sequence.near(1) as u32).to_le_bytes());
    bytes.extend_from_slice(&key);
    bytes.extend_from_slice(&payload);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// Sets a field that holds a little-endian number.
fn set(field: &mut [u8], value: Number) {
    let usual = field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
    let bytes = value.near(usual).to_le_bytes();
    let len = field.len();
    field.copy_from_slice(&bytes[..len]);
}

/// Gives a record the checksums of what it says, as far as it lies in the file.
pub fn sign(contents: &mut [u8], at: usize, binding: u32) {
    let start = binding ^ (at as u32).wrapping_mul(0x9e37_79b1);
    let Some(bytes) = contents.get_mut(at..).filter(|bytes| bytes.len() >= HEADER) else { return };
    let len = record_len(bytes);
    if let Some(body) = bytes.get(HEADER..len) {
        let crc = crc32c::crc32c_append(start, body);
        bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    }
    bytes[60..64].fill(0);
    let crc = crc32c::crc32c_append(start, &bytes[..HEADER]);
    bytes[60..64].copy_from_slice(&crc.to_le_bytes());
}

/// What the checksums of a segment start from.
pub fn binding(store_id: &[u8], segment: u64) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(store_id), &segment.to_le_bytes())
}

fn store_id(files: &Files) -> Vec<u8> {
    let store = files.iter().find(|(name, bytes)| name == "STORE" && bytes.len() >= HEADER);
    store.map_or_else(|| vec![0; 16], |(_, bytes)| bytes[16..32].to_vec())
}

fn segment_number(name: &str) -> u64 {
    name.strip_suffix(".seg").and_then(|digits| u64::from_str_radix(digits, 16).ok()).unwrap_or(0)
}

/// Length of the record that begins here.
fn record_len(bytes: &[u8]) -> usize {
    let Some(header) = bytes.first_chunk::<HEADER>() else { return HEADER };
    let key = usize::from(u16::from_le_bytes([header[2], header[3]]));
    let payload = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
    (HEADER + key + payload).next_multiple_of(8)
}

/// Where records begin: the mark in the head, and all behind it.
fn records(contents: &[u8]) -> Vec<usize> {
    let mut records = Vec::new();
    if contents.len() >= 2 * HEADER && contents[HEADER] != 0 {
        records.push(HEADER);
    }
    if contents.len() == 8192 {
        records.extend([0, HEAD]);
    }
    let mut at = HEAD;
    while at + HEADER <= contents.len() && contents[at] != 0 && contents.len() != 8192 {
        records.push(at);
        at += record_len(&contents[at..]);
    }
    records
}

fn end_of_records(contents: &[u8]) -> usize {
    records(contents).last().filter(|at| **at >= HEAD).map_or(HEAD, |at| at + record_len(&contents[*at..]))
}
