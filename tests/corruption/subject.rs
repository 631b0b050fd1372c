//! A store to damage: its files, every record in them, and what each key is while only some of the records are whole.
//!
//! The files are taken apart here by docs/design.md and not by the crate, so that it isn't its own judge. That is easy as long as
//! they are whole; what damage leaves is found by comparing bytes with the undamaged ones.

use oncekey::testing::SimDisk;
use oncekey::{
    Builder, Durability, Error, Fingerprint, ManualClock, Outcome, RecoveryMode, Request, Reservation, Retention, Store,
};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

pub const SEGMENT_LEN: usize = 64 * 1024;
pub const HEAD: usize = 4096;
const HEADER: usize = 64;
const START_MS: u64 = 1_767_225_600_000;

/// Files by name.
pub type Files = BTreeMap<String, Arc<[u8]>>;

/// How a store came to an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Closed,
    /// Its process died, with operations that were promised nothing against loss of power.
    Killed,
    /// The same, and the power failed.
    Cut,
}

/// What a key is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Is {
    Vacant,
    Interrupted { asked: Fingerprint, point: Option<Vec<u8>> },
    Answered { bytes: Vec<u8>, is_failure: bool },
}

/// A record where it stood before the store came to its end.
#[derive(Clone, Debug)]
pub struct Placed {
    pub file: String,
    pub range: Range<usize>,
    pub kind: Kind,
    /// Whether a sync had covered it.
    pub was_durable: bool,
    /// Whether it was there, as it was written, after the end.
    pub was_left: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Of a key, by its number, with its place in the order of the key's records.
    Of { key: usize, rank: (u64, bool, u32) },
    /// A mark or seal, which says that all below this offset of the segment is durable.
    Mark { durable: usize },
    /// Overwritten by an erasure.
    Scrubbed,
    /// A pad, or an erasure's note.
    Other,
}

pub struct Subject {
    pub end: End,
    /// As they were when the store came to its end.
    pub files: Files,
    /// As they were written.
    pub written: Files,
    pub records: Vec<Placed>,
    /// What the keys are while nothing is damaged.
    pub states: Vec<Is>,
    /// The files at some earlier moments.
    pub earlier: Vec<Files>,
}

pub fn builder(seed: u64) -> Builder {
    Store::builder()
        .clock(Arc::new(ManualClock::new(START_MS)))
        .background(false)
        .durability(Durability::Synced)
        .segment_size(SEGMENT_LEN as u64)
        .seed(seed)
}

/// Reads all files.
pub fn open(disk: &SimDisk, mode: RecoveryMode) -> Result<Store, Error> {
    builder(0).index(false).recovery(mode).open_simulated(disk)
}

/// Reads what the index leaves to the journal.
pub fn open_indexed(disk: &SimDisk) -> Result<Store, Error> {
    builder(0).open_simulated(disk)
}

pub fn key(number: usize) -> String {
    format!("key-{number:03}")
}

pub fn answer(number: usize) -> Vec<u8> {
    let len = if number.is_multiple_of(8) { 6_000 } else { number * 3 };
    (0..len).map(|at| (at * 31 + number) as u8).collect()
}

pub fn asked(number: usize) -> Fingerprint {
    Fingerprint::of(&number.to_le_bytes())
}

/// What the keys of a subject are while nothing is damaged.
pub fn expected(number: usize) -> Is {
    match number % 6 {
        0..=2 => Is::Answered { bytes: answer(number), is_failure: false },
        3 => Is::Answered { bytes: answer(number), is_failure: true },
        4 => Is::Interrupted { asked: asked(number), point: Some(answer(number)) },
        _ => Is::Vacant,
    }
}

impl Subject {
    /// A store with answers, failures, interrupted keys with recovery points, released and erased ones; the answers in as many
    /// streams as there are retentions.
    pub fn new(end: End, keys: usize, retentions: &[Retention], seed: u64) -> Subject {
        let disk = SimDisk::new();
        let store = builder(seed).open_simulated(&disk).expect("an empty disk");
        let mut earlier = Vec::new();
        for number in 0..keys {
            if number == keys / 2 {
                earlier.push(files(&disk));
                // Repeats in the segments' heads how far they are durable.
                store.maintain(usize::MAX).expect("upkeep");
            }
            // What is promised nothing, at the end and between what is promised much.
            let is_loose = end != End::Closed && (number + 3 >= keys || number % 7 == 3);
            let durability = if is_loose { Durability::Buffered } else { Durability::Synced };
            put(&store, number, retentions[number % retentions.len()], durability);
        }
        earlier.push(files(&disk));
        if end == End::Closed {
            store.close().expect("closing");
        }
        let written = files(&disk);
        let durable = files(&disk.after_power_cut(|| false));
        // Every other sector of what was not synced.
        let mut sector = 0;
        let cut = disk.after_power_cut(|| {
            sector += 1;
            sector % 2 == 0
        });
        let left = if end == End::Cut { files(&cut) } else { written.clone() };
        let records = records(&written, &durable, &left, keys);
        let mut subject = Subject { end, files: left, written, records, states: Vec::new(), earlier };
        subject.states = (0..keys).map(|number| subject.state(number, |at| subject.records[at].was_left)).collect();
        subject
    }

    /// The segments that hold records; a spare's loss loses nothing.
    pub fn segments(&self) -> Vec<&str> {
        let is_written = |file: &str| self.records.iter().any(|record| record.file == file);
        self.files.keys().map(String::as_str).filter(|file| is_written(file)).collect()
    }

    /// What a key is if of all its records only the whole ones count.
    pub fn state(&self, number: usize, is_whole: impl Fn(usize) -> bool) -> Is {
        let of_key = self.records.iter().enumerate().filter_map(|(at, record)| match record.kind {
            Kind::Of { key, rank } if key == number && is_whole(at) => Some((rank, record)),
            Kind::Of { .. } | Kind::Mark { .. } | Kind::Scrubbed | Kind::Other => None,
        });
        let Some((_, last)) = of_key.max_by_key(|(rank, _)| *rank) else { return Is::Vacant };
        let bytes = &self.written[&last.file][last.range.clone()];
        let (start, len) = (HEADER + usize::from(short(bytes, 2)), word(bytes, 4) as usize);
        let payload = bytes[start..start + len].to_vec();
        match bytes[0] {
            0x11 | 0x12 => Is::Interrupted {
                asked: asked(number),
                point: (bytes[0] == 0x12 || !payload.is_empty()).then_some(payload),
            },
            0x21 | 0x22 => Is::Answered { bytes: payload, is_failure: bytes[0] == 0x22 },
            _ => Is::Vacant,
        }
    }
}

fn put(store: &Store, number: usize, retention: Retention, durability: Durability) {
    let name = key(number);
    let request = Request::new(&name).fingerprint(asked(number)).retention(retention).durability(durability);
    let mut guard = reserve(store, &request);
    match number % 6 {
        0..=2 => drop(guard.complete(answer(number)).expect("an answer")),
        3 => drop(guard.fail(answer(number)).expect("a failure")),
        4 => guard.recovery_point(answer(number)).expect("a recovery point"),
        _ if number % 12 == 5 => guard.release().expect("a release"),
        _ => {
            drop(guard.complete(answer(number)).expect("an answer"));
            store.erase(&request).expect("an erasure");
        }
    }
}

#[track_caller]
fn reserve(store: &Store, request: &Request<'_>) -> Reservation {
    match store.reserve(request).expect("a reservation") {
        Outcome::Reserved(guard) => guard,
        other => panic!("expected a fresh reservation, got {other:?}"),
    }
}

pub fn files(disk: &SimDisk) -> Files {
    let contents = |name: String| disk.contents(&name).map(|bytes| (name, Arc::from(bytes)));
    disk.files().into_iter().filter_map(|(name, _)| contents(name)).collect()
}

/// Takes the files apart.
fn records(written: &Files, durable: &Files, left: &Files, keys: usize) -> Vec<Placed> {
    let numbers: BTreeMap<String, usize> = (0..keys).map(|number| (key(number), number)).collect();
    let mut records = Vec::new();
    for (file, bytes) in written.iter().filter(|(file, _)| file.ends_with(".seg")) {
        let number = u64::from_str_radix(file.trim_end_matches(".seg"), 16).expect("a segment's name");
        let mut place = |at: usize, len: usize| {
            let range = at..at + len;
            let bytes = &bytes[range.clone()];
            let kind = match bytes[0] {
                0x51 | 0x52 => Kind::Mark { durable: (long(bytes, 16) - number * SEGMENT_LEN as u64) as usize },
                0x41 => Kind::Scrubbed,
                0x42 | 0x61 => Kind::Other,
                kind => {
                    let stored = &bytes[HEADER..HEADER + usize::from(short(bytes, 2))];
                    let name = std::str::from_utf8(&stored[4..]).expect("a key of this subject");
                    let rank = (long(bytes, 16), !matches!(kind, 0x11 | 0x12), word(bytes, 56));
                    Kind::Of { key: numbers[name], rank }
                }
            };
            let is_in = |files: &Files| files.get(file).is_some_and(|other| other[range.clone()] == *bytes);
            let (was_durable, was_left) = (is_in(durable), is_in(left));
            records.push(Placed { file: file.clone(), range, kind, was_durable, was_left });
        };
        if bytes[HEADER] != 0 {
            place(HEADER, HEADER);
        }
        let mut at = HEAD;
        while at < bytes.len() && bytes[at] != 0 {
            let len = HEADER + usize::from(short(bytes, at + 2)) + word(bytes, at + 4) as usize;
            place(at, len.next_multiple_of(8));
            at += len.next_multiple_of(8);
        }
    }
    records
}

fn short(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from(short(bytes, at)) | u32::from(short(bytes, at + 2)) << 16
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}
