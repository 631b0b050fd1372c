//! Damage to closed stores: opening gives either every key's exact state or an error that says where, never a panic and
//! never a store with keys silently missing.
//!
//! `ONCEKEY_FULL=1` tries every position instead of some.

use crate::support::{START_MS, reserved};
use oncekey::testing::{DiskOp, SimDisk};
use oncekey::{
    Builder, Durability, Error, ErrorKind, Fingerprint, ManualClock, Outcome, RecoveryMode, Request, Retention, Store,
};
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

const SEGMENT_LEN: usize = 64 * 1024;
const KEYS: usize = 48;

fn is_full() -> bool {
    std::env::var_os("ONCEKEY_FULL").is_some_and(|value| value != "0")
}

/// Every position, or one in `stride` of them.
fn positions(len: usize, stride: usize) -> impl Iterator<Item = usize> {
    (0..len).step_by(if is_full() { 1 } else { stride })
}

fn builder() -> Builder {
    Store::builder()
        .clock(Arc::new(ManualClock::new(START_MS)))
        .background(false)
        .durability(Durability::Synced)
        .segment_size(SEGMENT_LEN as u64)
}

fn open(disk: &SimDisk, mode: RecoveryMode) -> Result<Store, Error> {
    builder().recovery(mode).open_simulated(disk)
}

fn key(number: usize) -> String {
    format!("key-{number:03}")
}

fn answer(number: usize) -> Vec<u8> {
    let len = if number.is_multiple_of(8) { 6_000 } else { number * 3 };
    (0..len).map(|at| (at * 31 + number) as u8).collect()
}

fn asked(number: usize) -> Fingerprint {
    Fingerprint::of(&number.to_le_bytes())
}

/// What a key is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Is {
    Vacant,
    Interrupted,
    Answered { bytes: Vec<u8>, is_failure: bool },
}

fn expected(number: usize) -> Is {
    match number % 6 {
        0..=2 => Is::Answered { bytes: answer(number), is_failure: false },
        3 => Is::Answered { bytes: answer(number), is_failure: true },
        4 => Is::Interrupted,
        _ => Is::Vacant,
    }
}

/// A cleanly closed store with answers, failures, interrupted keys with recovery points, released and erased ones.
fn closed() -> &'static BTreeMap<String, Vec<u8>> {
    static CLOSED: OnceLock<BTreeMap<String, Vec<u8>>> = OnceLock::new();
    CLOSED.get_or_init(|| files(&make()))
}

fn make() -> SimDisk {
    let disk = SimDisk::new();
    let store = open(&disk, RecoveryMode::Strict).unwrap();
    for number in 0..KEYS {
        let name = key(number);
        let retention = [Retention::Forever, Retention::For(Duration::from_secs(3600))][number % 2];
        let request = Request::new(&name).fingerprint(asked(number)).retention(retention);
        let mut guard = reserved(store.reserve(&request).unwrap());
        match number % 6 {
            0..=2 => drop(guard.complete(answer(number)).unwrap()),
            3 => drop(guard.fail(answer(number)).unwrap()),
            4 => guard.recovery_point(answer(number)).unwrap(),
            _ if number % 12 == 5 => guard.release().unwrap(),
            _ => {
                drop(guard.complete(answer(number)).unwrap());
                store.erase(&request).unwrap();
            }
        }
    }
    store.close().unwrap();
    disk
}

fn files(disk: &SimDisk) -> BTreeMap<String, Vec<u8>> {
    disk.files().into_iter().map(|(name, _)| (name.clone(), disk.contents(&name).unwrap())).collect()
}

fn disk(files: &BTreeMap<String, Vec<u8>>) -> SimDisk {
    let disk = SimDisk::new();
    files.iter().for_each(|(name, bytes)| disk.put(name, bytes.clone()));
    disk
}

/// The segments that hold records; a spare's loss loses nothing.
fn segments(files: &BTreeMap<String, Vec<u8>>) -> Vec<String> {
    let holds_records = |(name, bytes): (&String, &Vec<u8>)| {
        (name.ends_with(".seg") && bytes[4096..].iter().any(|byte| *byte != 0)).then(|| name.clone())
    };
    files.iter().filter_map(holds_records).collect()
}

/// Whether a segment's bytes here belong to erased records, the seal, or unused space: nothing can be lost there.
fn holds_nothing(name: &str, range: std::ops::Range<usize>) -> bool {
    let bytes = &closed()[name];
    let mut at = 4096;
    while at < range.end && bytes[at] != 0 {
        let key_len = usize::from(u16::from_le_bytes([bytes[at + 2], bytes[at + 3]]));
        let payload_len = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
        let end = at + (64 + key_len + payload_len).next_multiple_of(8);
        if !matches!(bytes[at], 0x41 | 0x52) && at < range.end && range.start < end {
            return false;
        }
        at = end;
    }
    range.start >= 4096
}

/// What a key is now; nothing but vacant keys changes.
fn look(store: &Store, number: usize) -> Is {
    let name = key(number);
    if let Some(record) = store.get(&Request::new(&name)).unwrap() {
        return Is::Answered { bytes: record.bytes().to_vec(), is_failure: record.is_failure() };
    }
    match store.reserve(&Request::new(&name).fingerprint_of(b"a payload that nobody used")).unwrap() {
        Outcome::Mismatch(mismatch) => {
            assert_eq!(mismatch.stored, asked(number));
            Is::Interrupted
        }
        Outcome::Reserved(_) => Is::Vacant,
        other => panic!("{other:?}"),
    }
}

/// What came of a damaged store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opened {
    Whole,
    Refused,
}

/// Strict: exact, or refused and unchanged. Salvage: opens, and reports it if a key isn't what it was.
#[track_caller]
fn check(damaged: &BTreeMap<String, Vec<u8>>, what: &str) -> Opened {
    let strict_disk = disk(damaged);
    let opened = match open(&strict_disk, RecoveryMode::Strict) {
        Ok(store) => {
            for number in 0..KEYS {
                assert_eq!(
                    look(&store, number),
                    expected(number),
                    "{what}: key {number} after an opening without error"
                );
            }
            store.verify().unwrap();
            store.close().unwrap();
            Opened::Whole
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error:?}");
            assert!(error.path().is_some() && error.offset().is_some(), "{what}: {error:?}");
            assert!(files(&strict_disk) == *damaged, "{what}: a refused store was changed");
            assert_eq!(strict_disk.calls(DiskOp::Sync) + strict_disk.calls(DiskOp::Overwrite), 0, "{what}");
            Opened::Refused
        }
    };
    let disk = disk(damaged);
    let store = open(&disk, RecoveryMode::Salvage).unwrap_or_else(|error| panic!("{what}: salvage refuses: {error:?}"));
    let lost = store.recovery().lost.clone();
    assert_eq!(opened == Opened::Refused, !lost.is_empty(), "{what}: {:?}", store.recovery());
    for number in 0..KEYS {
        let is = look(&store, number);
        assert!(is == expected(number) || !lost.is_empty(), "{what}: key {number} is {is:?}, and nothing was reported");
        if let (Is::Answered { .. }, Is::Answered { .. }) = (&is, expected(number)) {
            assert_eq!(is, expected(number), "{what}: key {number} has another answer");
        }
    }
    store.verify().unwrap_or_else(|error| panic!("{what}: {error:?}"));
    store.close().unwrap();
    let again = open(&disk, RecoveryMode::Strict).unwrap_or_else(|error| panic!("{what}, salvaged: {error:?}"));
    assert!(again.recovery().lost.is_empty(), "{what}");
    opened
}

/// Both modes refuse, and change nothing.
#[track_caller]
fn check_refused(files_there: &BTreeMap<String, Vec<u8>>, what: &str) {
    for mode in [RecoveryMode::Strict, RecoveryMode::Salvage] {
        let disk = disk(files_there);
        let error = open(&disk, mode).err().unwrap_or_else(|| panic!("{what}: {mode:?} opens"));
        assert_eq!((error.kind(), error.offset()), (ErrorKind::Corrupt, Some(0)), "{what}: {error:?}");
        assert!(files(&disk) == *files_there, "{what}: a refused store was changed");
    }
}

fn damaged(name: &str, damage: impl FnOnce(&mut Vec<u8>)) -> BTreeMap<String, Vec<u8>> {
    let mut files = closed().clone();
    damage(files.get_mut(name).unwrap());
    files
}

#[test]
fn an_undamaged_store_opens_whole() {
    assert_eq!(check(closed(), "undamaged"), Opened::Whole);
    assert!(segments(closed()).len() >= 3, "{:?}", segments(closed()));
}

#[test]
fn every_flipped_bit_is_harmless_or_refused() {
    let mut refused = 0;
    for name in segments(closed()) {
        let written = closed()[&name].iter().rposition(|byte| *byte != 0).unwrap() + 1;
        for at in positions(written, 97) {
            let bit = at % 8;
            let files = damaged(&name, |bytes| bytes[at] ^= 1 << bit);
            match check(&files, &format!("{name}: bit {bit} of byte {at}")) {
                Opened::Refused => refused += 1,
                Opened::Whole => {
                    assert!(holds_nothing(&name, at..at + 1), "{name}: bit {bit} of byte {at} was not noticed")
                }
            }
        }
        for at in (written..SEGMENT_LEN).step_by(if is_full() { 64 } else { 4001 }) {
            check(&damaged(&name, |bytes| bytes[at] ^= 0x80), &format!("{name}: byte {at} behind the seal"));
        }
    }
    assert!(refused > 300, "{refused}");
}

#[test]
fn a_flipped_bit_of_the_stores_own_file_is_refused() {
    for at in 0..64 {
        let files = damaged("STORE", |bytes| bytes[at] ^= 1 << (at % 8));
        assert_eq!(check(&files, &format!("STORE: byte {at}")), Opened::Refused);
    }
}

#[test]
fn a_segment_that_is_missing_is_refused() {
    for (at, one) in segments(closed()).iter().enumerate() {
        let mut files = closed().clone();
        files.remove(one);
        assert_eq!(check(&files, &format!("without {one}")), Opened::Refused);
        for two in &segments(closed())[at + 1..] {
            files.remove(two);
            assert_eq!(check(&files, &format!("without {one}, {two} and those between")), Opened::Refused);
        }
    }
}

#[test]
fn damage_to_the_list_of_segments_is_harmless_or_refused() {
    let mut refused = 0;
    for at in (0..8192).filter(|at| at % 4096 < 200 || at % 512 == 0) {
        let one = damaged("SEGMENTS", |bytes| bytes[at] ^= 1 << (at % 8));
        assert_eq!(check(&one, &format!("SEGMENTS: byte {at}")), Opened::Whole);
        let both = damaged("SEGMENTS", |bytes| {
            for at in [at, (at + 4096) % 8192] {
                bytes[at] ^= 1 << (at % 8);
            }
        });
        refused += u32::from(check(&both, &format!("SEGMENTS: byte {at} of both slots")) == Opened::Refused);
        let cut = damaged("SEGMENTS", |bytes| bytes.truncate(at));
        assert_eq!(check(&cut, &format!("SEGMENTS cut to {at} bytes")), Opened::Refused);
    }
    assert!(refused > 150, "{refused}");
}

#[test]
fn overwritten_stretches_are_harmless_or_refused() {
    for name in segments(closed()) {
        for (len, stride) in [(120, 1009), (512, 512 * 5), (4096, 4096 * 2), (8, 3001)] {
            for at in (0..SEGMENT_LEN - len).step_by(if is_full() { 8 } else { stride }) {
                for value in [0, 0xff] {
                    let files = damaged(&name, |bytes| bytes[at..at + len].fill(value));
                    let opened = check(&files, &format!("{name}: {len} bytes of {value:#x} at {at}"));
                    if files == *closed() {
                        assert_eq!(opened, Opened::Whole);
                    }
                }
            }
        }
    }
}

/// A published engine opens without an error here, with 499 of 1,000 keys.
#[test]
fn a_hundred_and_twenty_zeros_anywhere_in_the_records_are_refused() {
    for name in segments(closed()) {
        let seal = closed()[&name].iter().rposition(|byte| *byte != 0).unwrap();
        for at in positions(seal - 4096 - 120, 211).map(|at| 4096 + at) {
            let files = damaged(&name, |bytes| bytes[at..at + 120].fill(0));
            let opened = check(&files, &format!("{name}: zeros at {at}"));
            if files != *closed() && !holds_nothing(&name, at..at + 120) {
                assert_eq!(opened, Opened::Refused, "{name}: zeros at {at}");
            }
        }
    }
}

/// A defect once: the gap counted as covered by the erasure's note, and was then left as it was.
#[test]
fn zeros_in_the_place_of_an_erased_record_leave_no_hole() {
    let mut erased = 0;
    for name in segments(closed()) {
        let bytes = &closed()[&name];
        for at in (4096..SEGMENT_LEN - 64).step_by(8) {
            // A scrubbed record's header: kind, zero, no key, a payload shorter than a segment.
            let len = 64 + usize::from(bytes[at + 4]) + (usize::from(bytes[at + 5]) << 8);
            if bytes[at..at + 4] != [0x41, 0, 0, 0] || !holds_nothing(&name, at..at + len) {
                continue;
            }
            erased += 1;
            for more in [0, 8, 64] {
                check(
                    &damaged(&name, |bytes| bytes[at..at + len + more].fill(0)),
                    &format!("{name}: zeros over the erased record at {at} and {more} bytes more"),
                );
            }
        }
    }
    assert!(erased >= 8, "{erased}");
}

#[test]
fn files_of_another_length_are_refused() {
    for name in segments(closed()) {
        for len in
            positions(SEGMENT_LEN, 2999).chain([1, 63, 64, 511, 512, 575, 576, 4095, 4096, 4160, SEGMENT_LEN - 1])
        {
            let files = damaged(&name, |bytes| bytes.truncate(len));
            assert_eq!(check(&files, &format!("{name} cut to {len} bytes")), Opened::Refused);
        }
        for more in [1, 7, 8, 64, 512, 4096, SEGMENT_LEN, 1 << 20] {
            for value in [0, 0xff] {
                let files = damaged(&name, |bytes| bytes.resize(SEGMENT_LEN + more, value));
                assert_eq!(check(&files, &format!("{name} with {more} bytes more")), Opened::Refused);
            }
        }
    }
}

#[test]
fn segments_in_the_wrong_place_are_refused() {
    let names = segments(closed());
    for (at, one) in names.iter().enumerate() {
        for two in &names[at + 1..] {
            let mut files = closed().clone();
            files.insert(one.clone(), closed()[two].clone());
            check_refused(&files, &format!("{two} in the place of {one}"));
            files.insert(two.clone(), closed()[one].clone());
            check_refused(&files, &format!("{one} and {two} swapped"));
        }
        let mut files = closed().clone();
        files.insert("0000000000000777.seg".to_owned(), closed()[one].clone());
        check_refused(&files, &format!("a copy of {one} under another number"));
    }
}

#[test]
fn segments_of_another_store_are_refused() {
    let other = files(&make());
    for name in segments(closed()) {
        let mut files = closed().clone();
        files.insert(name.clone(), other[&name].clone());
        check_refused(&files, &format!("{name} of another store"));
        // Its records alone, behind the right header.
        let files = damaged(&name, |bytes| bytes[4096..].copy_from_slice(&other[&name][4096..]));
        assert_eq!(check(&files, &format!("the records of {name} of another store")), Opened::Refused);
    }
}

#[test]
fn a_record_copied_to_another_place_is_not_read_there() {
    for name in segments(closed()) {
        let first = &closed()[&name][4096..4096 + 512];
        for to in [4096 + 512, 4096 + 1024, SEGMENT_LEN - 4096] {
            let files = damaged(&name, |bytes| bytes[to..to + first.len()].copy_from_slice(first));
            check(&files, &format!("{name}: the first bytes again at {to}"));
        }
    }
}

#[test]
fn damage_in_several_places_is_harmless_or_refused() {
    let names = segments(closed());
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut next = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % below
    };
    for round in 0..if is_full() { 20_000 } else { 300 } {
        let mut files = closed().clone();
        for _ in 0..1 + next(6) {
            let bytes = files.get_mut(&names[next(names.len())]).unwrap();
            let at = next(SEGMENT_LEN);
            let len = (1 << next(13)).min(SEGMENT_LEN - at);
            match next(4) {
                0 => bytes[at] ^= 1 << next(8),
                1 => bytes[at..at + len].fill(0),
                2 => bytes[at..at + len].fill(0xff),
                _ => {
                    let from = next(SEGMENT_LEN - len);
                    bytes.copy_within(from..from + len, at);
                }
            }
        }
        check(&files, &format!("round {round}"));
    }
}
