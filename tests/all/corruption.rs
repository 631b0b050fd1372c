//! Damage to closed stores: opening gives either every key's exact state or an error that says where, never a panic and
//! never a store with keys silently missing.
//!
//! Some places only; `make corruption` takes all of them.

#[path = "../corruption/subject.rs"]
mod subject;
#[path = "../corruption/verdict.rs"]
mod verdict;

use oncekey::Retention;
use std::sync::OnceLock;
use std::time::Duration;
use subject::{End, HEAD, Kind, Placed, SEGMENT_LEN, Subject};
use verdict::{Bench, Changes, Look, Opened};

/// A cleanly closed store, whose answers are in two streams.
fn closed() -> &'static Subject {
    static CLOSED: OnceLock<Subject> = OnceLock::new();
    CLOSED.get_or_init(|| make(End::Closed, 1))
}

fn make(end: End, seed: u64) -> Subject {
    Subject::new(end, 48, &[Retention::Forever, Retention::For(Duration::from_secs(3600))], seed)
}

/// Holds a damaged store to what it may do.
#[track_caller]
fn check(changes: &Changes, what: &str) -> Opened {
    println!("{what}");
    let opened = Bench::new(closed()).check(changes, Look::Thorough);
    opened.may_come_of(End::Closed);
    opened
}

/// Both modes refuse, and change nothing.
#[track_caller]
fn check_refused(changes: &Changes, what: &str) {
    println!("{what}");
    Bench::new(closed()).check_refused(changes);
}

fn changed(name: &str, bytes: Vec<u8>) -> Changes {
    Changes::from([(name.to_owned(), Some(bytes))])
}

fn damaged(name: &str, damage: impl FnOnce(&mut Vec<u8>)) -> Changes {
    let mut bytes = closed().files[name].to_vec();
    damage(&mut bytes);
    changed(name, bytes)
}

/// Whether a change is none: damage that hits bytes which are so already.
fn changes_nothing(changes: &Changes) -> bool {
    changes.iter().all(|(name, bytes)| bytes.as_deref() == closed().files.get(name).map(|bytes| &**bytes))
}

/// How far a segment is written.
fn written(name: &str) -> usize {
    closed().files[name].iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
}

#[test]
fn an_undamaged_store_opens_whole() {
    for end in [End::Closed, End::Killed, End::Cut] {
        verdict::check_subject(&make(end, 1));
    }
    assert!(closed().segments().len() >= 3, "{:?}", closed().segments());
}

#[test]
fn every_flipped_bit_is_harmless_or_refused() {
    let mut refused = 0;
    for name in closed().segments() {
        let written = written(name);
        for at in (0..written).step_by(97) {
            let bit = at % 8;
            let files = damaged(name, |bytes| bytes[at] ^= 1 << bit);
            refused += u32::from(check(&files, &format!("{name}: bit {bit} of byte {at}")) == Opened::Refused);
        }
        for at in (written..SEGMENT_LEN).step_by(4001) {
            check(&damaged(name, |bytes| bytes[at] ^= 0x80), &format!("{name}: byte {at} behind the seal"));
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
    let segments = closed().segments();
    for (at, one) in segments.iter().enumerate() {
        let mut files = Changes::from([((*one).to_owned(), None)]);
        assert_eq!(check(&files, &format!("without {one}")), Opened::Refused);
        for two in &segments[at + 1..] {
            files.insert((*two).to_owned(), None);
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
    for name in closed().segments() {
        for (len, stride) in [(120, 1009), (512, 512 * 5), (4096, 4096 * 2), (8, 3001)] {
            for at in (0..SEGMENT_LEN - len).step_by(stride) {
                for value in [0, 0xff] {
                    let files = damaged(name, |bytes| bytes[at..at + len].fill(value));
                    let opened = check(&files, &format!("{name}: {len} bytes of {value:#x} at {at}"));
                    if changes_nothing(&files) {
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
    for name in closed().segments() {
        for at in (HEAD..written(name) - 120).step_by(211) {
            check(&damaged(name, |bytes| bytes[at..at + 120].fill(0)), &format!("{name}: zeros at {at}"));
        }
    }
}

/// A defect once: the gap counted as covered by the erasure's note, and was then left as it was.
#[test]
fn zeros_in_the_place_of_an_erased_record_leave_no_hole() {
    let is_scrubbed = |placed: &&Placed| placed.kind == Kind::Scrubbed;
    let erased: Vec<&Placed> = closed().records.iter().filter(is_scrubbed).collect();
    for Placed { file, range, .. } in &erased {
        for more in [0, 8, 64] {
            let files = damaged(file, |bytes| bytes[range.start..range.end + more].fill(0));
            check(&files, &format!("{file}: zeros over the erased record at {range:?} and {more} bytes more"));
        }
    }
    assert!(erased.len() >= 8, "{}", erased.len());
}

#[test]
fn files_of_another_length_are_refused() {
    for name in closed().segments() {
        for len in
            (0..SEGMENT_LEN).step_by(2999).chain([1, 63, 64, 511, 512, 575, 576, 4095, 4096, 4160, SEGMENT_LEN - 1])
        {
            let files = damaged(name, |bytes| bytes.truncate(len));
            assert_eq!(check(&files, &format!("{name} cut to {len} bytes")), Opened::Refused);
        }
        for more in [1, 7, 8, 64, 512, 4096, SEGMENT_LEN, 1 << 20] {
            for value in [0, 0xff] {
                let files = damaged(name, |bytes| bytes.resize(SEGMENT_LEN + more, value));
                assert_eq!(check(&files, &format!("{name} with {more} bytes more")), Opened::Refused);
            }
        }
    }
}

#[test]
fn segments_in_the_wrong_place_are_refused() {
    let names = closed().segments();
    let contents = |name: &str| Some(closed().files[name].to_vec());
    for (at, one) in names.iter().enumerate() {
        for two in &names[at + 1..] {
            let mut files = Changes::from([((*one).to_owned(), contents(two))]);
            check_refused(&files, &format!("{two} in the place of {one}"));
            files.insert((*two).to_owned(), contents(one));
            check_refused(&files, &format!("{one} and {two} swapped"));
        }
        let files = Changes::from([("0000000000000777.seg".to_owned(), contents(one))]);
        check_refused(&files, &format!("a copy of {one} under another number"));
    }
}

#[test]
fn segments_of_another_store_are_refused() {
    let other = make(End::Closed, 2).files;
    for name in closed().segments() {
        check_refused(&changed(name, other[name].to_vec()), &format!("{name} of another store"));
        // Its records alone, behind the right header.
        let files = damaged(name, |bytes| bytes[HEAD..].copy_from_slice(&other[name][HEAD..]));
        assert_eq!(check(&files, &format!("the records of {name} of another store")), Opened::Refused);
    }
}

#[test]
fn a_record_copied_to_another_place_is_not_read_there() {
    for name in closed().segments() {
        let first = &closed().files[name][4096..4096 + 512];
        for to in [4096 + 512, 4096 + 1024, SEGMENT_LEN - 4096] {
            let files = damaged(name, |bytes| bytes[to..to + first.len()].copy_from_slice(first));
            check(&files, &format!("{name}: the first bytes again at {to}"));
        }
    }
}

#[test]
fn damage_in_several_places_is_harmless_or_refused() {
    let names = closed().segments();
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut next = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % below
    };
    for round in 0..300 {
        let mut files = Changes::new();
        for _ in 0..1 + next(6) {
            let name = names[next(names.len())];
            let undamaged = || Some(closed().files[name].to_vec());
            let bytes = files.entry(name.to_owned()).or_insert_with(undamaged).as_mut().unwrap();
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

/// Nothing in it tells: it looks as after a crash.
#[test]
fn an_older_copy_of_a_file_gives_no_answer_that_was_not_stored() {
    for (name, bytes) in closed().earlier.iter().flatten().filter(|(name, _)| closed().files.contains_key(*name)) {
        let changes = changed(name, bytes.to_vec());
        let damage = verdict::Damage::new(closed(), &changes);
        let opened = Bench::new(closed()).strict(&damage, Look::Thorough);
        Bench::new(closed()).salvage(&damage, opened, Look::Thorough);
    }
}
