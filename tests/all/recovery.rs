//! Each lettered case of recovery on purpose; recovery cut off at every step; power cuts at every step of a history.

use crate::support::{START_MS, interrupted, reserved};
use oncekey::testing::{DiskOp, SimDisk};
use oncekey::{
    Builder, Durability, Error, ErrorKind, Fingerprint, ManualClock, Outcome, RecoveryMode, Request, Retention, Store,
};
use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const SEGMENT_LEN: usize = 64 * 1024;
const FIRST_RECORD: usize = 4096;
const KINDS_WITH_KEY: [u8; 5] = [0x11, 0x12, 0x21, 0x22, 0x31];
const COMPLETED: u8 = 0x21;
const SCRUBBED: u8 = 0x41;
const ERASE: u8 = 0x42;
const MARK: u8 = 0x51;
const SEAL: u8 = 0x52;
const PAD: u8 = 0x61;

/// A store without an index: all of it is read when it is opened.
fn builder(durability: Durability) -> Builder {
    Store::builder()
        .index(false)
        .clock(Arc::new(ManualClock::new(START_MS)))
        .background(false)
        .durability(durability)
        .segment_size(SEGMENT_LEN as u64)
}

fn open(disk: &SimDisk, mode: RecoveryMode) -> Result<Store, Error> {
    builder(Durability::Synced).recovery(mode).open_simulated(disk)
}

fn strict(disk: &SimDisk) -> Store {
    open(disk, RecoveryMode::Strict).unwrap()
}

fn salvage(disk: &SimDisk) -> Store {
    open(disk, RecoveryMode::Salvage).unwrap()
}

/// Every file with its bytes.
fn files(disk: &SimDisk) -> BTreeMap<String, Vec<u8>> {
    disk.files().into_iter().map(|(name, _)| (name.clone(), disk.contents(&name).unwrap())).collect()
}

fn segments(disk: &SimDisk) -> Vec<String> {
    disk.files().into_iter().map(|(name, _)| name).filter(|name| name.ends_with(".seg")).collect()
}

/// A record as the format's description has it, found without the crate's own reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Raw {
    at: usize,
    len: usize,
    kind: u8,
}

impl Raw {
    fn range(self) -> std::ops::Range<usize> {
        self.at..self.at + self.len
    }
}

fn raw_records(bytes: &[u8]) -> Vec<Raw> {
    let mut found = Vec::new();
    let mut at = FIRST_RECORD;
    while at + 64 <= bytes.len() && bytes[at] != 0 {
        let key_len = usize::from(u16::from_le_bytes([bytes[at + 2], bytes[at + 3]]));
        let payload_len = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
        let len = (64 + key_len + payload_len).next_multiple_of(8);
        found.push(Raw { at, len, kind: bytes[at] });
        at += len;
    }
    found
}

/// The segment file that holds records with a key of this kind, and those records.
fn segment_with(disk: &SimDisk, kind: u8) -> (String, Vec<Raw>) {
    let holds = |name: &String| raw_records(&disk.contents(name).unwrap()).iter().any(|record| record.kind == kind);
    let name = segments(disk).into_iter().find(holds).expect("a segment with such a record");
    let mut records = raw_records(&disk.contents(&name).unwrap());
    records.retain(|record| KINDS_WITH_KEY.contains(&record.kind));
    (name, records)
}

fn change(disk: &SimDisk, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = disk.contents(name).unwrap();
    change(&mut bytes);
    disk.put(name, bytes);
}

fn key(number: usize) -> String {
    format!("key-{number:02}")
}

fn answer(number: usize) -> Vec<u8> {
    format!("the answer to key {number}, which is {}", "long ".repeat(number)).into_bytes()
}

fn asked(number: usize) -> Fingerprint {
    Fingerprint::of(&number.to_le_bytes())
}

fn reserve(store: &Store, number: usize) -> Result<Outcome, Error> {
    store.reserve(&Request::new(&key(number)).fingerprint(asked(number)))
}

fn complete(store: &Store, number: usize) {
    reserved(reserve(store, number).unwrap()).complete(answer(number)).unwrap();
}

/// What a key turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Found {
    Vacant,
    Interrupted,
    Answer(Vec<u8>),
}

/// What the keys are. Asks with a payload that none was used with, so that nothing but vacant keys changes.
fn found(store: &Store, keys: usize) -> Vec<Found> {
    let look = |number| {
        let name = key(number);
        if let Some(record) = store.get(&Request::new(&name)).unwrap() {
            return Found::Answer(record.bytes().to_vec());
        }
        match store.reserve(&Request::new(&name).fingerprint_of(b"a payload that nobody used")).unwrap() {
            Outcome::Mismatch(_) => Found::Interrupted,
            Outcome::Reserved(_) => Found::Vacant,
            other => panic!("{other:?}"),
        }
    };
    (0..keys).map(look).collect()
}

/// A store with keys 0 to 9 answered, 10 and 11 reserved, killed before it could end its segments.
fn killed(durability: Durability) -> SimDisk {
    let disk = SimDisk::new();
    let store = builder(durability).open_simulated(&disk).unwrap();
    (0..10).for_each(|number| complete(&store, number));
    let guards = [10, 11].map(|number| reserved(reserve(&store, number).unwrap()));
    let image = disk.after_process_death();
    drop(guards);
    image
}

fn expected() -> Vec<Found> {
    let mut expected: Vec<Found> = (0..10).map(|number| Found::Answer(answer(number))).collect();
    expected.extend([Found::Interrupted, Found::Interrupted, Found::Vacant]);
    expected
}

fn closed() -> SimDisk {
    let disk = killed(Durability::Synced);
    strict(&disk).close().unwrap();
    disk
}

/// Opening refuses with an error that names the file and the offset, and changes nothing.
#[track_caller]
fn assert_refused(disk: &SimDisk, mode: RecoveryMode, kind: ErrorKind, file: &str, offset: u64) {
    let before = files(disk);
    let error = open(disk, mode).expect_err("the damage is noticed");
    assert_eq!((error.kind(), error.offset()), (kind, Some(offset)), "{error:?}");
    assert_eq!(error.path(), Some(Path::new("simulated").join(file).as_path()), "{error:?}");
    assert!(files(disk) == before, "a refused store was changed");
    assert_eq!(disk.calls(DiskOp::Overwrite) + disk.calls(DiskOp::Remove) + disk.calls(DiskOp::Create), 0);
}

/// A copy whose calls are counted from zero.
fn copy(disk: &SimDisk) -> SimDisk {
    disk.after_power_cut(|| true)
}

#[test]
fn case_a_files_that_were_being_made_are_removed_and_other_names_left_alone() {
    let disk = closed();
    let unborn = ["STORE.new", "SEGMENTS.new", "00000000000000ff.seg.new", "probe-a.new", "probe-b.new"];
    let foreign = ["notes.new", "notes.txt", "1.seg", "00000000000000FF.seg", "lost+found"];
    for name in unborn.iter().chain(&foreign) {
        disk.put(name, b"half a file".to_vec());
    }
    let store = strict(&disk);
    assert_eq!(found(&store, 13), expected());
    for name in unborn {
        assert_eq!(disk.contents(name), None, "{name}");
    }
    for name in foreign {
        assert_eq!(disk.contents(name).as_deref(), Some(&b"half a file"[..]), "{name}");
    }
}

#[test]
fn case_b_a_segment_of_another_length_is_refused() {
    let name = &segment_with(&closed(), COMPLETED).0;
    for len in [0, 1, 100, FIRST_RECORD, SEGMENT_LEN - 1, SEGMENT_LEN + 1, 2 * SEGMENT_LEN] {
        let disk = closed();
        change(&disk, name, |bytes| bytes.resize(len, 0));
        let offset = len.min(SEGMENT_LEN) as u64;
        assert_refused(&copy(&disk), RecoveryMode::Strict, ErrorKind::Corrupt, name, offset);
    }
}

#[test]
fn case_b_a_segment_that_only_lost_its_empty_end_is_whole_again_after_salvage() {
    let disk = closed();
    let name = segment_with(&disk, COMPLETED).0;
    change(&disk, &name, |bytes| bytes.truncate(SEGMENT_LEN / 2));
    let store = salvage(&disk);
    let lost = &store.recovery().lost;
    assert_eq!(lost.len(), 1, "{lost:?}");
    assert_eq!((lost[0].offset, lost[0].len), ((SEGMENT_LEN / 2) as u64, (SEGMENT_LEN / 2) as u64));
    assert_eq!(found(&store, 13), expected());
    store.close().unwrap();
    assert_eq!(found(&strict(&disk), 12), expected()[..12]);
}

/// Found by simulation: what was beside an erasure was to be written once more, into a file that was not whole yet.
#[test]
fn case_b_a_segment_in_use_that_lost_its_end_beside_an_erasure_is_whole_again_after_salvage() {
    let disk = SimDisk::new();
    let store = builder(Durability::Buffered).open_simulated(&disk).unwrap();
    (0..4).for_each(|number| complete(&store, number));
    store.erase(&Request::new(&key(3))).unwrap();
    let image = disk.after_process_death();
    let expected = found(&strict(&copy(&image)), 4);
    // The note ends in zeros, and is whole without them.
    let name = segment_with(&image, ERASE).0;
    let bytes = image.contents(&name).unwrap();
    let end = FIRST_RECORD + raw_records(&bytes)[0].len;
    assert!(bytes[end - 7..end].iter().all(|byte| *byte == 0));
    for len in end - 7..end + 7 {
        let disk = copy(&image);
        change(&disk, &name, |bytes| bytes.truncate(len));
        let store = salvage(&disk);
        assert!(!store.recovery().lost.is_empty(), "cut to {len}");
        assert_eq!(found(&store, 4), expected, "cut to {len}");
    }
}

#[test]
fn case_b_a_damaged_header_is_refused_and_its_records_are_salvaged() {
    for at in [0, 9, 20, 33, 41, 60, 63, 64, 300, 511, 576, 4095] {
        let disk = closed();
        let name = segment_with(&disk, COMPLETED).0;
        change(&disk, &name, |bytes| bytes[at] ^= 0x40);
        assert_refused(&copy(&disk), RecoveryMode::Strict, ErrorKind::Corrupt, &name, 0);
        let store = salvage(&disk);
        assert_eq!(store.recovery().lost.len(), 1, "byte {at}");
        assert_eq!(found(&store, 13), expected(), "byte {at}");
        store.close().unwrap();
        assert_eq!(found(&strict(&disk), 12), expected()[..12]);
    }
}

#[test]
fn case_b_segments_in_each_others_place_and_of_other_stores_are_refused() {
    let disk = closed();
    let names = segments(&disk);
    let (one, two) = (&names[0], &names[1]);
    let swapped = copy(&disk);
    swapped.put(one, disk.contents(two).unwrap());
    swapped.put(two, disk.contents(one).unwrap());
    let refused = |disk: &SimDisk, file: &str| {
        for mode in [RecoveryMode::Strict, RecoveryMode::Salvage] {
            assert_refused(&copy(disk), mode, ErrorKind::Corrupt, file, 0);
        }
    };
    refused(&swapped, one);
    let mixed = copy(&disk);
    mixed.put(one, closed().contents(one).unwrap());
    refused(&mixed, one);
    let renamed = copy(&disk);
    renamed.put("00000000000000aa.seg", disk.contents(one).unwrap());
    refused(&renamed, "00000000000000aa.seg");
    let of_another = copy(&disk);
    of_another.put("STORE", closed().contents("STORE").unwrap());
    refused(&of_another, one);
    // Whose store it is can't be told by the most segments either, without writing over the others.
    of_another.take("STORE");
    of_another.put("00000000000000aa.seg", mixed.contents(one).unwrap());
    assert_eq!(open(&of_another, RecoveryMode::Salvage).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn case_c_a_newer_version_and_unknown_features_are_refused_in_salvage_too() {
    let disk = closed();
    for name in segments(&disk).into_iter().chain(["STORE".to_owned()]) {
        for at in [8, 12, 15] {
            let newer = copy(&disk);
            change(&newer, &name, |bytes| {
                bytes[at] ^= 0x80;
                let crc = crc32c::crc32c(&bytes[..60]);
                bytes[60..64].copy_from_slice(&crc.to_le_bytes());
            });
            for mode in [RecoveryMode::Strict, RecoveryMode::Salvage] {
                assert_refused(&copy(&newer), mode, ErrorKind::UnsupportedVersion, &name, 0);
            }
        }
    }
}

#[test]
fn case_d_space_that_was_not_written_is_nothing_to_report() {
    for durability in [Durability::Buffered, Durability::Synced] {
        let store = strict(&killed(durability));
        let report = store.recovery();
        assert!(report.cut.is_empty() && report.lost.is_empty(), "{report:?}");
        assert_eq!((report.completed, report.interrupted, report.expired), (10, 2, 0));
        assert_eq!(found(&store, 13), expected());
    }
}

#[test]
fn case_e_spares_do_not_pile_up_and_fences_go_on_behind_them() {
    let mut disk = SimDisk::new();
    let mut newest_fence = 0;
    let mut most = 0;
    for round in 0..12 {
        let store = strict(&disk);
        // Each makes a spare if there is none.
        store.maintain(usize::MAX).unwrap();
        store.maintain(usize::MAX).unwrap();
        if round % 3 == 0 {
            let guard = reserved(reserve(&store, round).unwrap());
            assert!(guard.fence() > newest_fence, "{} after {newest_fence}", guard.fence());
            newest_fence = guard.fence();
            guard.release().unwrap();
        }
        disk = if round % 2 == 0 { disk.after_power_cut(|| false) } else { disk.after_process_death() };
        if round == 3 {
            most = segments(&disk).len();
        } else if round > 3 {
            assert!(segments(&disk).len() <= most, "round {round}: {:?}", segments(&disk));
        }
    }
}

#[test]
fn case_e_no_fence_is_given_out_twice_wherever_a_spare_was_cut_off_on_its_way() {
    let mut points = 0;
    for op in [DiskOp::Create, DiskOp::Overwrite, DiskOp::Sync, DiskOp::SyncNames, DiskOp::Remove] {
        for call in 0.. {
            let disk = SimDisk::new();
            let store = builder(Durability::Buffered).open_simulated(&disk).unwrap();
            let newest_fence = reserved(reserve(&store, 0).unwrap()).fence();
            // The power cut takes the reservation, and leaves blank segments.
            let disk = disk.after_power_cut(|| false);
            let store = strict(&disk);
            disk.fail(op, call, io::ErrorKind::Other);
            let newest_fence = match reserve(&store, 0) {
                Ok(outcome) => {
                    let fence = reserved(outcome).fence();
                    assert!(fence > newest_fence, "{fence} after {newest_fence}");
                    fence
                }
                Err(_) => newest_fence,
            };
            let is_cut_off = store.maintain(usize::MAX).is_err() || store.stats().is_poisoned;
            points += 1;
            for image in all_cuts(&disk).into_iter().chain([disk.after_process_death()]) {
                let store = strict(&image);
                let fence = reserved(reserve(&store, 1).unwrap()).fence();
                assert!(fence > newest_fence, "{fence} after {newest_fence}: {op:?} {call}");
                assert!(store.recovery().lost.is_empty() && segments(&image).len() <= 8);
            }
            if !is_cut_off && call > 8 {
                break;
            }
        }
    }
    assert!(points > 40, "{points} points");
}

#[test]
fn case_f_an_erasure_that_was_cut_short_is_finished() {
    let mut finished = 0;
    for seed in 0..200 {
        let disk = killed(Durability::Synced);
        let store = strict(&disk);
        // With a spare at hand, the note is synced first, and then what was overwritten.
        store.maintain(usize::MAX).unwrap();
        disk.fail(DiskOp::Sync, 1 + seed % 3, io::ErrorKind::Other);
        let erased = store.erase(&Request::new(&key(9)));
        let image = disk.after_power_cut(coin(seed));
        drop(store);
        let store = strict(&image);
        let report = store.recovery();
        assert!(report.lost.is_empty(), "{report:?}");
        let mut now = found(&store, 12);
        let nine = now.remove(9);
        let mut others = expected();
        others.remove(9);
        assert_eq!(now, others[..11]);
        if report.scrubbed > 0 || erased.is_ok() {
            finished += 1;
            assert_eq!(nine, Found::Vacant);
            for (name, bytes) in files(&image) {
                let traces = bytes.windows(6).filter(|bytes| *bytes == b"key-09").count();
                // Looking for the key has reserved it once.
                assert!(traces <= 1, "{name} still holds the key");
                assert!(!bytes.windows(9).any(|bytes| bytes == b"to key 9,"), "{name} still holds the answer");
            }
        } else {
            assert!(nine == Found::Vacant || nine == Found::Answer(answer(9)));
        }
    }
    assert!(finished > 50, "only {finished} of 200 erasures were far enough to be finished");
}

#[test]
fn case_g_damage_below_the_durable_mark_is_refused_and_reported_by_salvage() {
    let disk = killed(Durability::Synced);
    let (name, records) = segment_with(&disk, COMPLETED);
    assert_eq!(records.len(), 10);
    // The last one has a mark behind it only in the head, after upkeep.
    for (number, record) in records.iter().enumerate() {
        for at in [record.at, record.at + 5, record.at + 20, record.at + 66, record.at + record.len - 9] {
            let disk = copy(&disk);
            change(&disk, &name, |bytes| bytes[at] ^= 1);
            assert_refused(&copy(&disk), RecoveryMode::Strict, ErrorKind::Corrupt, &name, record.at as u64);
            let store = salvage(&disk);
            let lost = &store.recovery().lost;
            assert!(lost.iter().all(|damage| damage.offset == record.at as u64), "{lost:?}");
            assert_eq!(lost.len(), 1);
            let mut left = expected();
            // Its reservation is there, so the key is not offered as fresh.
            left[number] = Found::Interrupted;
            assert_eq!(found(&store, 13), left);
            store.close().unwrap();
            assert!(strict(&disk).recovery().lost.is_empty());
        }
    }
}

#[test]
fn case_g_damage_in_a_sealed_segment_is_refused() {
    let disk = closed();
    let (name, records) = segment_with(&disk, COMPLETED);
    for record in records {
        for at in [record.at, record.at + 9, record.at + record.len - 9] {
            let disk = copy(&disk);
            change(&disk, &name, |bytes| bytes[at] ^= 0x10);
            assert_refused(&copy(&disk), RecoveryMode::Strict, ErrorKind::Corrupt, &name, record.at as u64);
        }
    }
}

#[test]
fn case_g_records_that_end_below_the_durable_mark_are_refused() {
    let disk = SimDisk::new();
    let store = strict(&disk);
    (0..10).for_each(|number| complete(&store, number));
    // Upkeep repeats in the heads how far the segments are durable.
    store.maintain(usize::MAX).unwrap();
    store.sync().unwrap();
    let disk = disk.after_process_death();
    let (name, records) = segment_with(&disk, COMPLETED);
    for kept in 0..9 {
        let disk = copy(&disk);
        change(&disk, &name, |bytes| bytes[records[kept].at + records[kept].len..].fill(0));
        let error = open(&copy(&disk), RecoveryMode::Strict).expect_err("nine of ten answers are gone at most");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        let store = salvage(&disk);
        assert_eq!(store.recovery().lost.len(), 1);
        let mut left = expected()[..10].to_vec();
        left[kept + 1..].fill(Found::Interrupted);
        assert_eq!(found(&store, 10), left);
    }
}

#[test]
fn case_h_a_hole_before_later_records_is_padded() {
    let disk = killed(Durability::Buffered);
    let (name, records) = segment_with(&disk, COMPLETED);
    for (number, record) in records.iter().enumerate().take(9) {
        let disk = copy(&disk);
        change(&disk, &name, |bytes| bytes[record.range()].fill(0));
        let store = strict(&disk);
        let cut = &store.recovery().cut;
        assert_eq!(cut.len(), 1, "{cut:?}");
        assert_eq!((cut[0].offset, cut[0].len), (record.at as u64, record.len as u64));
        assert_eq!(cut[0].path, Path::new("simulated").join(&name));
        assert!(store.recovery().lost.is_empty());
        let mut left = expected();
        left[number] = Found::Interrupted;
        assert_eq!(found(&store, 13), left);
        let padded = raw_records(&disk.contents(&name).unwrap());
        assert!(padded.contains(&Raw { kind: PAD, ..*record }), "{padded:?}");
        store.verify().unwrap();
    }
}

#[test]
fn case_h_a_torn_end_is_cut() {
    let killed = killed(Durability::Buffered);
    let (name, records) = segment_with(&killed, COMPLETED);
    let last = records[9];
    let whole = killed.contents(&name).unwrap();
    for kept in 1..last.len {
        let disk = copy(&killed);
        change(&disk, &name, |bytes| bytes[last.at + kept..].fill(0));
        let is_whole = disk.contents(&name).unwrap() == whole;
        let store = strict(&disk);
        let mut left = expected();
        if is_whole {
            assert!(store.recovery().cut.is_empty());
        } else {
            assert_eq!(store.recovery().cut[0].offset, last.at as u64);
            left[9] = Found::Interrupted;
            let after = raw_records(&disk.contents(&name).unwrap());
            assert_eq!(after.last().map(|record| (record.at, record.kind)), Some((last.at, SEAL)));
        }
        assert_eq!(found(&store, 13), left);
        store.verify().unwrap();
    }
}

#[test]
fn case_h_several_torn_records_at_the_end_are_all_cut() {
    let disk = killed(Durability::Buffered);
    let (name, records) = segment_with(&disk, COMPLETED);
    for torn in 1..=9 {
        let disk = copy(&disk);
        change(&disk, &name, |bytes| {
            for record in &records[10 - torn..] {
                // The header says how long it is, the rest didn't get through.
                bytes[record.at + 70..record.at + record.len].fill(0);
            }
        });
        let store = strict(&disk);
        let mut left = expected();
        left[10 - torn..10].fill(Found::Interrupted);
        assert_eq!(found(&store, 13), left);
        drop(store);
        let store = strict(&disk);
        assert!(store.recovery().cut.is_empty() && store.recovery().lost.is_empty(), "{:?}", store.recovery());
        assert_eq!(found(&store, 12), left[..12]);
        store.verify().unwrap();
    }
}

#[test]
fn case_i_a_segment_in_use_is_sealed_and_case_j_a_sealed_one_is_not_touched() {
    let disk = killed(Durability::Buffered);
    assert!(segments(&disk).iter().all(|name| {
        raw_records(&disk.contents(name).unwrap()).iter().all(|record| record.kind != SEAL && record.kind != MARK)
    }));
    let store = strict(&disk);
    drop(store);
    let mut names = segments(&disk);
    let spare = names.pop().unwrap();
    assert!(disk.contents(&spare).unwrap()[FIRST_RECORD..].iter().all(|byte| *byte == 0), "the newest is a spare");
    for name in names {
        let bytes = disk.contents(&name).unwrap();
        let records = raw_records(&bytes);
        let last = *records.last().expect("used segments only");
        assert_eq!(last.kind, SEAL, "{name}: {records:?}");
        assert!(bytes[last.at + last.len..].iter().all(|byte| *byte == 0));
        assert_eq!(bytes[64], SEAL, "the seal is repeated in the head");
    }
    let disk = copy(&disk);
    let before = files(&disk);
    let store = strict(&disk);
    drop(store);
    assert!(files(&disk) == before);
    assert_eq!(disk.calls(DiskOp::Overwrite) + disk.calls(DiskOp::Sync) + disk.calls(DiskOp::Create), 0);
}

#[test]
fn a_store_file_that_is_missing_or_damaged_is_refused() {
    let missing = closed();
    missing.take("STORE");
    assert_refused(&copy(&missing), RecoveryMode::Strict, ErrorKind::Corrupt, "STORE", 0);
    for len in [0, 10, 63] {
        let damaged = closed();
        change(&damaged, "STORE", |bytes| bytes.truncate(len));
        assert_refused(&copy(&damaged), RecoveryMode::Strict, ErrorKind::Corrupt, "STORE", 0);
    }
    for bit in 0..64 * 8 {
        let damaged = copy(&closed_once());
        change(&damaged, "STORE", |bytes| bytes[bit / 8] ^= 1 << (bit % 8));
        assert_refused(&copy(&damaged), RecoveryMode::Strict, ErrorKind::Corrupt, "STORE", 0);
    }
}

#[test]
fn salvage_takes_what_the_store_file_said_from_the_segments() {
    let whole = closed_once().contents("STORE").unwrap();
    let damage: [fn(&SimDisk); 3] = [
        |disk| disk.take("STORE"),
        |disk| change(disk, "STORE", |bytes| bytes[20] ^= 1),
        |disk| change(disk, "STORE", |bytes| bytes.clear()),
    ];
    for damage in damage {
        let disk = copy(&closed_once());
        damage(&disk);
        let store = salvage(&disk);
        let lost = &store.recovery().lost;
        assert_eq!((lost.len(), lost[0].offset, lost[0].len), (1, 0, 64), "{lost:?}");
        assert!(lost[0].path.ends_with("STORE"));
        assert_eq!(found(&store, 13), expected());
        drop(store);
        assert_eq!(disk.contents("STORE").unwrap(), whole);
        assert_eq!(found(&strict(&disk), 12), expected()[..12]);
    }
    let nothing_left = copy(&closed_once());
    nothing_left.take("STORE");
    segments(&nothing_left).iter().for_each(|name| change(&nothing_left, name, |bytes| bytes[0] ^= 1));
    assert_refused(&nothing_left, RecoveryMode::Salvage, ErrorKind::Corrupt, "STORE", 0);
    // Damage without a segment is no store.
    let empty = SimDisk::new();
    empty.put("STORE", vec![7; 64]);
    assert_refused(&empty, RecoveryMode::Strict, ErrorKind::Corrupt, "STORE", 0);
    complete(&salvage(&empty), 1);
    assert_eq!(strict(&empty).recovery().completed, 1);
}

#[test]
fn a_store_whose_segment_numbers_are_used_up_says_so_and_acknowledges_nothing_more() {
    let disk = copy(&closed_once());
    let last = format!("{:016x}.seg", (1_u64 << 62 >> SEGMENT_LEN.trailing_zeros()) - 2);
    disk.put(&last, vec![0; SEGMENT_LEN]);
    assert_refused(&disk, RecoveryMode::Strict, ErrorKind::Corrupt, &last, 0);
    let store = salvage(&disk);
    assert_eq!(reserve(&store, 20).unwrap_err().kind(), ErrorKind::Full);
    assert_eq!(store.get(&Request::new(&key(1))).unwrap().unwrap().bytes(), answer(1));
    drop(store);
    assert_eq!(strict(&disk).recovery().completed, 10);
}

fn closed_once() -> SimDisk {
    static CLOSED: std::sync::OnceLock<SimDisk> = std::sync::OnceLock::new();
    CLOSED.get_or_init(closed).clone()
}

/// Half of all sectors and names, differently for each seed.
fn coin(seed: u64) -> impl FnMut() -> bool {
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 63 == 1
    }
}

/// Holes, torn ends, an unfinished erasure, files half made, spares: all that recovery writes for.
fn battered() -> SimDisk {
    let disk = SimDisk::new();
    let store = builder(Durability::Buffered).open_simulated(&disk).unwrap();
    (0..10).for_each(|number| complete(&store, number));
    let guards = [10, 11].map(|number| reserved(reserve(&store, number).unwrap()));
    store.maintain(usize::MAX).unwrap();
    store.erase(&Request::new(&key(3))).unwrap();
    (20..26).for_each(|number| complete(&store, number));
    let image = disk.after_process_death();
    drop(guards);
    let (name, records) = segment_with(&image, COMPLETED);
    change(&image, &name, |bytes| {
        // The erased one half overwritten, as a power cut leaves it.
        let scrubbed = raw_records(bytes).into_iter().find(|record| record.kind == SCRUBBED).unwrap();
        bytes[scrubbed.at..scrubbed.at + 64].fill(0xee);
        // Those behind were not synced.
        let [.., hole, _, torn] = records[..] else { panic!("{records:?}") };
        bytes[hole.range()].fill(0);
        bytes[torn.at + 90] ^= 1;
    });
    image.put("00000000000000fe.seg.new", b"half a file".to_vec());
    copy(&image)
}

#[test]
fn recovery_cut_off_at_any_step_ends_the_same_the_next_time() {
    let reference = battered();
    let wanted = found(&strict(&copy(&reference)), 26);
    assert!(wanted.contains(&Found::Interrupted) && wanted.contains(&Found::Answer(answer(25 - 1))));
    let mut cut_off = 0;
    for op in [DiskOp::Overwrite, DiskOp::Sync, DiskOp::Remove, DiskOp::SyncNames, DiskOp::Create, DiskOp::Read] {
        for call in 0.. {
            let disk = copy(&reference);
            disk.fail(op, call, io::ErrorKind::Other);
            let opened = open(&disk, RecoveryMode::Strict);
            if disk.calls(op) <= call {
                break;
            }
            // Not of the list's second copy.
            let Err(error) = opened else { continue };
            assert_eq!(error.kind(), ErrorKind::Io, "{op:?} {call}: {error:?}");
            cut_off += 1;
            for seed in 0..12 {
                let image = match seed {
                    0 => disk.after_process_death(),
                    1 => disk.after_power_cut(|| false),
                    2 => disk.after_power_cut(|| true),
                    _ => disk.after_power_cut(coin(seed)),
                };
                let store = open(&image, RecoveryMode::Strict)
                    .unwrap_or_else(|error| panic!("{op:?} {call}, image {seed}: {error:?}"));
                assert!(store.recovery().lost.is_empty());
                store.verify().unwrap();
                assert_eq!(found(&store, 26), wanted, "{op:?} {call}, image {seed}");
                assert!(segments(&image).len() <= segments(&reference).len() + 2);
                store.close().unwrap();
                no_end_is_lost_in_silence(&image);
            }
        }
    }
    assert!(cut_off > 30, "only {cut_off} steps");
}

/// Takes the end of each segment's records away, with the seal: what was durable is then damaged.
fn no_end_is_lost_in_silence(closed: &SimDisk) {
    for (name, mut bytes) in files(closed).into_iter().filter(|(name, _)| name.ends_with(".seg")) {
        let [.., last, seal] = raw_records(&bytes)[..] else { continue };
        bytes[last.at..seal.at + seal.len].fill(0);
        let damaged = copy(closed);
        damaged.put(&name, bytes);
        let Err(refused) = open(&damaged, RecoveryMode::Strict) else {
            panic!("{name} lost its end, and nobody said so");
        };
        assert_eq!(refused.kind(), ErrorKind::Corrupt, "{name}: {refused}");
    }
}

/// Found by the model: a failed sync leaves pages clean that are not on the disk.
#[test]
fn a_failed_sync_before_a_restart_is_not_believed_after_it() {
    for call in 0.. {
        let disk = battered();
        disk.fail(DiskOp::Sync, call, io::ErrorKind::Other);
        let Err(_) = open(&disk, RecoveryMode::Strict) else { break };
        let disk = disk.after_process_death();
        let wanted = {
            let store = strict(&disk);
            store.close().unwrap();
            found(&strict(&copy(&disk)), 26)
        };
        let store = strict(&disk.after_power_cut(|| false));
        assert_eq!(found(&store, 26), wanted);
    }
}

#[test]
fn recovery_repeated_changes_nothing_and_never_grows_the_store() {
    let mut disk = battered();
    let most = disk.files().len();
    let bytes: u64 = disk.files().iter().map(|(_, len)| len).sum();
    let report = |store: &Store| (store.recovery().completed, store.recovery().interrupted);
    let first = report(&strict(&disk));
    for round in 0..6 {
        disk = if round % 2 == 0 { disk.after_process_death() } else { disk.after_power_cut(coin(round)) };
        let before = files(&disk);
        let store = strict(&disk);
        assert_eq!(report(&store), first);
        assert_eq!((store.recovery().cut.len(), store.recovery().scrubbed), (0, 0), "round {round}");
        drop(store);
        assert!(disk.files().len() <= most);
        assert!(disk.files().iter().map(|(_, len)| len).sum::<u64>() <= bytes);
        if round > 0 {
            assert!(files(&disk) == before, "round {round} changed a recovered store");
        }
    }
}

/// One acknowledged step of a history, and what it makes of its key.
#[derive(Clone, Copy, Debug)]
enum Step {
    Reserve(usize),
    Complete(usize),
    Release(usize),
    Erase(usize),
    Maintain,
    Expire(usize),
}

/// Carries a step out; an error ends the history.
fn carry_out(store: &Store, clock: &ManualClock, step: Step) -> Result<(), Error> {
    match step {
        Step::Reserve(number) => drop(reserve(store, number)?),
        Step::Complete(number) => match reserve(store, number)? {
            Outcome::Reserved(guard) | Outcome::Interrupted(guard) => drop(guard.complete(answer(number))?),
            other => panic!("{other:?}"),
        },
        Step::Release(number) => match reserve(store, number)? {
            Outcome::Reserved(guard) | Outcome::Interrupted(guard) => guard.release()?,
            other => panic!("{other:?}"),
        },
        Step::Erase(number) => drop(store.erase(&Request::new(&key(number)))?),
        Step::Maintain => drop(store.maintain(usize::MAX)?),
        Step::Expire(number) => {
            let name = key(number);
            let request =
                Request::new(&name).fingerprint(asked(number)).retention(Retention::For(Duration::from_millis(5)));
            reserved(store.reserve(&request)?).complete(answer(number))?;
            clock.advance(Duration::from_millis(5));
        }
    }
    Ok(())
}

/// What may be found of a key once the step was acknowledged, or while it was not yet.
fn outcomes(step: Step) -> Option<(usize, Found, Vec<Found>)> {
    Some(match step {
        Step::Reserve(number) => (number, Found::Interrupted, vec![]),
        Step::Complete(number) => (number, Found::Answer(answer(number)), vec![Found::Interrupted]),
        Step::Release(number) => (number, Found::Vacant, vec![Found::Interrupted]),
        Step::Erase(number) => (number, Found::Vacant, vec![]),
        Step::Expire(number) => (number, Found::Vacant, vec![Found::Interrupted, Found::Answer(answer(number))]),
        Step::Maintain => return None,
    })
}

const HISTORY: [Step; 14] = [
    Step::Reserve(0),
    Step::Complete(1),
    Step::Complete(2),
    Step::Release(3),
    Step::Maintain,
    Step::Complete(0),
    Step::Expire(4),
    Step::Reserve(5),
    Step::Erase(1),
    Step::Maintain,
    Step::Release(5),
    Step::Complete(3),
    Step::Erase(2),
    Step::Complete(2),
];

#[test]
fn no_power_cut_at_any_point_of_a_synced_history_loses_what_was_acknowledged() {
    let (mut cuts, mut points) = (0, 0);
    for steps in 1..=HISTORY.len() {
        for op in [DiskOp::Sync, DiskOp::Append, DiskOp::Overwrite, DiskOp::Create, DiskOp::SyncNames, DiskOp::Remove] {
            for call in 0.. {
                let (disk, clock) = (SimDisk::new(), Arc::new(ManualClock::new(START_MS)));
                let open = |disk: &SimDisk| builder(Durability::Synced).clock(Arc::clone(&clock)).open_simulated(disk);
                let store = open(&disk).unwrap();
                let mut known = vec![Found::Vacant; 6];
                for step in &HISTORY[..steps - 1] {
                    carry_out(&store, &clock, *step).unwrap();
                    if let Some((number, after, _)) = outcomes(*step) {
                        known[number] = after;
                    }
                }
                let last = HISTORY[steps - 1];
                disk.fail(op, call, io::ErrorKind::Other);
                let cut_off = carry_out(&store, &clock, last).is_err();
                points += 1;
                let may_be = |number: usize, found: &Found| match outcomes(last) {
                    Some((changed, after, between)) if changed == number => {
                        *found == after || cut_off && (*found == known[number] || between.contains(found))
                    }
                    Some(_) | None => *found == known[number],
                };
                for image in all_cuts(&disk) {
                    cuts += 1;
                    let store = open(&image).unwrap_or_else(|error| panic!("{last:?} {op:?} {call}: {error:?}"));
                    assert!(store.recovery().lost.is_empty());
                    for (number, found) in found(&store, 6).iter().enumerate() {
                        assert!(
                            may_be(number, found),
                            "after {steps} steps, the last of them {last:?} (cut off: {cut_off}), key {number} is \
                             {found:?}, and was {:?} before it",
                            known[number]
                        );
                    }
                }
                if !cut_off {
                    break;
                }
            }
        }
    }
    assert!(cuts > 1_000 && points > 150, "{cuts} cuts at {points} points");
}

/// The images of all power cuts, or of some if there are many.
fn all_cuts(disk: &SimDisk) -> Vec<SimDisk> {
    let mut choices = 0;
    drop(disk.after_power_cut(|| {
        choices += 1;
        true
    }));
    if choices <= 6 {
        let subset = |bits: u32| {
            let mut at = 0;
            disk.after_power_cut(move || {
                at += 1;
                bits >> (at - 1) & 1 == 1
            })
        };
        return (0..1 << choices).map(subset).collect();
    }
    let some = (0..16).map(|seed| disk.after_power_cut(coin(seed)));
    some.chain([disk.after_power_cut(|| false), disk.after_power_cut(|| true)]).collect()
}

#[test]
fn an_interrupted_key_is_told_so_with_its_recovery_point_after_a_crash() {
    let disk = SimDisk::new();
    let store = strict(&disk);
    let mut guard = reserved(reserve(&store, 1).unwrap());
    guard.recovery_point(b"charged, not yet shipped").unwrap();
    let image = disk.after_power_cut(|| false);
    drop(guard);
    let store = strict(&image);
    let guard = interrupted(reserve(&store, 1).unwrap());
    assert_eq!((guard.attempt(), guard.last_recovery_point()), (2, Some(&b"charged, not yet shipped"[..])));
}

/// A defect once: the next opening wrote into the pad that salvage had made over an erased record.
#[test]
fn an_erasure_inside_what_salvage_padded_is_not_done_again() {
    let disk = SimDisk::new();
    let store = strict(&disk);
    for number in 0..10 {
        complete(&store, number);
    }
    store.erase(&Request::new(&key(3))).unwrap();
    store.close().unwrap();
    let (name, records) = segment_with(&disk, COMPLETED);
    let (from, to) = (records[1].at + 8, records[5].at);
    change(&disk, &name, |bytes| bytes[from..to].fill(0x5a));
    let store = salvage(&disk);
    assert!(!store.recovery().lost.is_empty());
    store.verify().unwrap();
    store.close().unwrap();
    for _ in 0..3 {
        let store = strict(&disk);
        store.verify().unwrap();
        store.close().unwrap();
    }
}

const LIST: &str = "SEGMENTS";
const MISSING: &str = "the segment's file is missing";
/// All calls that change a disk.
const CHANGES: [DiskOp; 6] =
    [DiskOp::Create, DiskOp::Append, DiskOp::Overwrite, DiskOp::Sync, DiskOp::SyncNames, DiskOp::Remove];

/// A store with segments of reservations, of answers of several lifetimes and of notes, sealed and in use, and spares.
fn varied() -> (SimDisk, Store) {
    let disk = SimDisk::new();
    let store = builder(Durability::Synced).open_simulated(&disk).unwrap();
    for (number, seconds) in [5, 60, 500, 4_000, 90_000, 5_000_000].into_iter().enumerate() {
        let name = key(number);
        let request =
            Request::new(&name).fingerprint(asked(number)).retention(Retention::For(Duration::from_secs(seconds)));
        reserved(store.reserve(&request).unwrap()).complete(vec![number as u8; 40_000]).unwrap();
        if number == 2 {
            reserved(store.reserve(&request.scope("again")).unwrap()).complete(vec![7; 40_000]).unwrap();
        }
    }
    store.erase(&Request::new(&key(5))).unwrap();
    store.maintain(usize::MAX).unwrap();
    (disk, store)
}

/// What is answered, without asking for more.
fn answers(store: &Store, keys: usize) -> Vec<Option<Vec<u8>>> {
    let get = |(number, scope)| store.get(&Request::new(&key(number)).scope(scope)).unwrap();
    let keys = (0..keys).flat_map(|number| [(number, ""), (number, "again")]);
    keys.map(get).map(|record| record.map(|record| record.bytes().to_vec())).collect()
}

#[test]
fn case_l_each_segment_taken_away_is_refused_by_name_and_reported_by_salvage() {
    let (disk, store) = varied();
    let killed = disk.after_process_death();
    let all = answers(&strict(&copy(&killed)), 6);
    store.close().unwrap();
    for disk in [killed, disk] {
        assert!(segments(&disk).len() >= 9, "{:?}", segments(&disk));
        let mut lost_keys = 0;
        for name in segments(&disk) {
            let disk = copy(&disk);
            disk.take(&name);
            assert_refused(&copy(&disk), RecoveryMode::Strict, ErrorKind::Corrupt, &name, 0);
            let error = open(&copy(&disk), RecoveryMode::Strict).unwrap_err();
            assert!(error.to_string().contains(MISSING), "{error}");
            let store = salvage(&disk);
            let lost = &store.recovery().lost;
            assert_eq!(lost.len(), 1, "{name}: {lost:?}");
            assert_eq!((lost[0].offset, lost[0].len, &*lost[0].reason), (0, SEGMENT_LEN as u64, MISSING));
            assert_eq!(lost[0].path, Path::new("simulated").join(&name));
            let left = answers(&store, 6);
            lost_keys += all.iter().zip(&left).filter(|(all, left)| all != left).count();
            store.verify().unwrap();
            store.close().unwrap();
            let again = strict(&disk);
            assert!(again.recovery().lost.is_empty());
            assert!(answers(&again, 6) == left, "{name}");
        }
        assert!(lost_keys >= 5, "{lost_keys}");
    }
}

#[test]
fn case_l_several_missing_segments_are_all_reported() {
    let (disk, store) = varied();
    store.close().unwrap();
    let names = segments(&disk);
    names.iter().for_each(|name| disk.take(name));
    assert_refused(&copy(&disk), RecoveryMode::Strict, ErrorKind::Corrupt, &names[0], 0);
    let store = salvage(&disk);
    assert_eq!(store.recovery().lost.len(), names.len());
    // No fence is given out twice although nothing is left that had one.
    let last = u64::from_str_radix(&names.last().unwrap()[..16], 16).unwrap();
    assert!(reserved(reserve(&store, 0).unwrap()).fence() > last << SEGMENT_LEN.trailing_zeros());
}

#[test]
fn case_m_a_removed_segment_that_is_back_is_removed_again_and_not_read() {
    let (clock, disk) = (Arc::new(ManualClock::new(START_MS)), SimDisk::new());
    let store = builder(Durability::Synced).clock(Arc::clone(&clock) as Arc<_>).open_simulated(&disk).unwrap();
    for number in 0..3 {
        let name = key(number);
        let request = Request::new(&name).retention(Retention::For(Duration::from_secs(5)));
        reserved(store.reserve(&request).unwrap()).complete(vec![7; 40_000]).unwrap();
    }
    complete(&store, 9);
    let before = disk.after_process_death();
    clock.advance(Duration::from_secs(5));
    assert!(store.maintain(usize::MAX).unwrap().removed > 0);
    store.close().unwrap();
    let gone: Vec<String> = segments(&before).into_iter().filter(|name| disk.contents(name).is_none()).collect();
    assert!(gone.len() >= 2, "{gone:?}");
    // The clock is back where those answers still counted.
    let wanted = answers(&strict(&copy(&disk)), 10);
    assert!(answers(&strict(&copy(&before)), 10) != wanted);
    let damages: [fn(&mut Vec<u8>); 4] =
        [|_| {}, |bytes| bytes[20] ^= 1, |bytes| bytes[5_000] ^= 1, |bytes| bytes.truncate(9_000)];
    for damage in damages {
        let disk = copy(&disk);
        let left = segments(&disk);
        for name in &gone {
            let mut bytes = before.contents(name).unwrap();
            damage(&mut bytes);
            disk.put(name, bytes);
        }
        let store = strict(&disk);
        assert!(store.recovery().lost.is_empty() && store.recovery().cut.is_empty(), "{:?}", store.recovery());
        assert!(answers(&store, 10) == wanted);
        assert!(segments(&disk).iter().all(|name| left.contains(name)));
        assert!(reserved(reserve(&store, 0).unwrap()).release().is_ok(), "an answer that was over is back");
    }
    // What is not ours is not removed either.
    let foreign = copy(&disk);
    foreign.put(&gone[0], closed_once().contents(&segments(&closed_once())[0]).unwrap());
    assert_refused(&foreign, RecoveryMode::Strict, ErrorKind::Corrupt, &gone[0], 0);
}

#[test]
fn case_n_a_list_that_is_not_the_newest_is_refused_and_salvage_takes_what_is_there() {
    let disk = SimDisk::new();
    let store = builder(Durability::Synced).open_simulated(&disk).unwrap();
    let mut lists = vec![disk.contents(LIST).unwrap()];
    for number in 0..12 {
        reserved(reserve(&store, number).unwrap()).complete(vec![number as u8; 30_000]).unwrap();
        if number % 3 == 1 {
            store.erase(&Request::new(&key(number - 1))).unwrap();
        }
        if number % 2 == 0 {
            store.maintain(usize::MAX).unwrap();
        }
        let list = disk.contents(LIST).unwrap();
        if !lists.contains(&list) {
            lists.push(list);
        }
    }
    store.close().unwrap();
    let wanted = found(&strict(&copy(&disk)), 12);
    assert!(lists.len() > 6 && lists.last() == disk.contents(LIST).as_ref(), "{}", lists.len());
    let (mut never_had, mut harmless) = (0, 0);
    for stale in &lists[..lists.len() - 1] {
        let disk = copy(&disk);
        disk.put(LIST, stale.clone());
        let before = files(&disk);
        let refused = copy(&disk);
        match open(&refused, RecoveryMode::Strict) {
            // It lacks no more than spares.
            Ok(store) => {
                assert_eq!(found(&store, 12), wanted);
                harmless += 1;
            }
            Err(error) => {
                assert_eq!((error.kind(), error.offset()), (ErrorKind::Corrupt, Some(0)), "{error}");
                never_had += u32::from(error.to_string().contains("never had it"));
                assert!(files(&refused) == before);
            }
        }
        let store = salvage(&disk);
        assert_eq!(found(&store, 12), wanted);
        store.verify().unwrap();
    }
    assert!(never_had > 3 && harmless < 3, "{never_had}, {harmless}");
}

#[test]
fn case_o_a_list_that_is_missing_or_cannot_be_read_is_refused_and_written_anew_by_salvage() {
    let other = closed();
    let longer = closed_once().contents(LIST).unwrap().len() + 8;
    type Harm = Box<dyn Fn(&SimDisk)>;
    let mut damages: Vec<Harm> = vec![
        Box::new(|disk| disk.take(LIST)),
        Box::new(move |disk| disk.put(LIST, other.contents(LIST).unwrap())),
        Box::new(|disk| change(disk, LIST, |bytes| bytes.fill(0))),
        Box::new(|disk| change(disk, LIST, |bytes| [70, 4096 + 70].into_iter().for_each(|at| bytes[at] ^= 1))),
        Box::new(|disk| change(disk, LIST, |bytes| bytes.rotate_left(4096))),
    ];
    // Found by the sweep of damages: a length that a longer list would have.
    for len in [0, 1, 100, 4095, 4096, 4097, 8191, 8193, 16_384, 16_384 + 1, 1 << 20, longer] {
        damages.push(Box::new(move |disk| change(disk, LIST, |bytes| bytes.resize(len, 0))));
    }
    for damage in damages {
        let disk = copy(&closed_once());
        damage(&disk);
        assert_refused(&copy(&disk), RecoveryMode::Strict, ErrorKind::Corrupt, LIST, 0);
        let store = salvage(&disk);
        let lost = &store.recovery().lost;
        assert_eq!(lost.len(), 1, "{lost:?}");
        assert!(lost[0].path.ends_with(LIST) && lost[0].offset == 0);
        assert_eq!(found(&store, 13), expected());
        store.verify().unwrap();
        store.close().unwrap();
        let again = strict(&disk);
        assert!(again.recovery().lost.is_empty());
        assert_eq!(found(&again, 12), expected()[..12]);
    }
}

#[test]
fn case_p_damage_to_one_slot_of_the_list_does_no_harm_and_is_mended() {
    let whole = closed_once().contents(LIST).unwrap();
    let wanted = {
        let disk = copy(&closed_once());
        drop(strict(&disk));
        files(&disk)
    };
    for slot in [0, 4096] {
        // Behind it may be what is left of a longer one.
        let used = 64 + u32::from_le_bytes(whole[slot + 4..slot + 8].try_into().unwrap()) as usize;
        for bit in 0..used * 8 {
            let disk = copy(&closed_once());
            change(&disk, LIST, |bytes| bytes[slot + bit / 8] ^= 1 << (bit % 8));
            let store = strict(&disk);
            assert_eq!((store.recovery().completed, store.recovery().interrupted), (10, 2));
            drop(store);
            assert!(files(&disk.after_power_cut(|| true)) == wanted, "bit {bit} of the slot at {slot}");
        }
    }
}

#[test]
fn verification_notices_a_segment_that_was_taken_away_and_another_list() {
    let (disk, store) = varied();
    store.verify().unwrap();
    let list = disk.contents(LIST).unwrap();
    change(&disk, LIST, |bytes| bytes.fill(0));
    let error = store.verify().unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.path().unwrap().ends_with(LIST), "{error}");
    disk.put(LIST, list);
    store.verify().unwrap();
    let name = segments(&disk)[0].clone();
    disk.take(&name);
    let error = store.verify().unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.path().unwrap().ends_with(&name), "{error}");
}

#[test]
fn verification_names_each_byte_that_changed() {
    let dir = tempfile::tempdir().unwrap();
    let store = builder(Durability::Synced).open(dir.path()).unwrap();
    for number in 0..4 {
        complete(&store, number);
    }
    reserved(store.reserve(&Request::new("open")).unwrap()).release().unwrap();
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "seg") {
            continue;
        }
        let whole = std::fs::read(&path).unwrap();
        let records = raw_records(&whole);
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        for record in records {
            let key_len = usize::from(u16::from_le_bytes([whole[record.at + 2], whole[record.at + 3]]));
            let payload_len = u32::from_le_bytes(whole[record.at + 4..record.at + 8].try_into().unwrap()) as usize;
            let len = 64 + key_len + payload_len;
            for (at, byte) in whole.iter().enumerate().skip(record.at).take(len) {
                file.write_all_at(&[byte ^ 1 << (at % 8)], at as u64).unwrap();
                let error = store.verify().expect_err("a byte of a record changed");
                assert_eq!((error.kind(), error.path()), (ErrorKind::Corrupt, Some(&*path)), "{at}: {error}");
                assert_eq!(error.offset(), Some(record.at as u64), "{at}: {error}");
                file.write_all_at(&[*byte], at as u64).unwrap();
                bytes += 1;
            }
        }
    }
    store.verify().unwrap();
    assert!(bytes > 1000, "{bytes} bytes of records");
}

#[test]
fn a_new_store_whose_making_was_cut_short_is_made() {
    let mut points = 0;
    for op in [DiskOp::Create, DiskOp::Sync, DiskOp::SyncNames] {
        for call in 0.. {
            let disk = SimDisk::new();
            disk.fail(op, call, io::ErrorKind::Other);
            let Err(_) = open(&disk, RecoveryMode::Strict) else { break };
            points += 1;
            for image in all_cuts(&disk).into_iter().chain([disk.after_process_death()]) {
                let store = strict(&image);
                complete(&store, 1);
                store.close().unwrap();
                assert_eq!(strict(&image).recovery().completed, 1);
            }
        }
    }
    assert!(points >= 4, "{points}");
}

/// Segments are made, renewed and removed; wherever that is cut off, no segment seems to be missing or to be too many.
#[test]
fn segments_that_come_and_go_cut_off_at_any_step_are_no_loss() {
    let (mut cut_off, mut images) = (0, 0);
    for op in CHANGES {
        for call in 0.. {
            let (disk, clock) = (SimDisk::new(), Arc::new(ManualClock::new(START_MS)));
            let open =
                |disk: &SimDisk| builder(Durability::Synced).clock(Arc::clone(&clock) as Arc<_>).open_simulated(disk);
            let store = open(&disk).unwrap();
            complete(&store, 0);
            for number in 1..5 {
                let name = key(number);
                let request = Request::new(&name).retention(Retention::For(Duration::from_secs([5, 60][number % 2])));
                reserved(store.reserve(&request).unwrap()).complete(vec![7; 40_000]).unwrap();
            }
            clock.advance(Duration::from_secs(60));
            disk.fail(op, call, io::ErrorKind::Other);
            let is_cut_off = store.maintain(usize::MAX).is_err()
                || store.erase(&Request::new(&key(9))).is_err()
                || reserve(&store, 8).map_or(true, |outcome| reserved(outcome).complete([8; 40_000]).is_err())
                || store.maintain(usize::MAX).is_err();
            cut_off += u32::from(is_cut_off);
            for image in all_cuts(&disk).into_iter().chain([disk.after_process_death()]) {
                images += 1;
                let store = open(&image).unwrap_or_else(|error| panic!("{op:?} {call}: {error:?}"));
                assert!(store.recovery().lost.is_empty(), "{op:?} {call}");
                store.verify().unwrap();
                let keys = found(&store, 5);
                assert_eq!(keys[0], Found::Answer(answer(0)));
                assert_eq!(keys[1..], vec![Found::Vacant; 4], "{op:?} {call}");
                store.maintain(usize::MAX).unwrap();
                store.close().unwrap();
                assert!(open(&image).unwrap().recovery().lost.is_empty());
            }
            if !is_cut_off {
                break;
            }
        }
    }
    assert!(cut_off > 25 && images > 300, "{cut_off} points, {images} images");
}

/// A list that can't be written is an error of the call, and the segment that was made for it is not lost.
#[test]
fn a_spare_that_could_not_be_listed_is_used_later() {
    let disk = SimDisk::new();
    let store = builder(Durability::Buffered).open_simulated(&disk).unwrap();
    for _ in 0..8 {
        disk.fail(DiskOp::Overwrite, 0, io::ErrorKind::StorageFull);
        assert_eq!(reserve(&store, 0).unwrap_err().kind(), ErrorKind::StorageFull);
    }
    assert!(segments(&disk).len() <= 2, "{:?}", segments(&disk));
    complete(&store, 0);
    store.verify().unwrap();
    let disk = disk.after_process_death();
    assert_eq!(strict(&disk).recovery().completed, 1);
}
