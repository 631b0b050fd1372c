//! Erased bytes are nowhere any more.

use crate::support::{interrupted, manual, replay, request, reserved};
use oncekey::testing::{DiskOp, SimDisk};
use oncekey::{Durability, ErrorKind, ManualClock, Outcome, Request, Retention, Store};
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

const DAY: Duration = Duration::from_secs(24 * 3600);
const KEY: &str = "KEY-TO-BE-FORGOTTEN";
const ANSWER: &[u8] = b"ANSWER-TO-BE-FORGOTTEN";
const POINT: &[u8] = b"POINT-TO-BE-FORGOTTEN";

fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    bytes.windows(needle.len()).any(|window| window == needle)
}

/// How many files of a directory hold these bytes.
fn files_with(dir: &Path, needle: &[u8]) -> usize {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| contains(&fs::read(path).unwrap(), needle)).count()
}

#[track_caller]
fn assert_gone(dir: &Path) {
    for needle in [KEY.as_bytes(), ANSWER, POINT] {
        assert_eq!(files_with(dir, needle), 0, "{} is still there", String::from_utf8_lossy(needle));
    }
}

fn disk_contains(disk: &SimDisk, needle: &[u8]) -> bool {
    disk.files().iter().any(|(name, _)| contains(&disk.contents(name).unwrap(), needle))
}

fn complete(store: &Store, key: &str, answer: &[u8]) {
    reserved(store.reserve(&request(key, 1)).unwrap()).complete(answer).unwrap();
}

#[test]
fn an_erased_key_and_its_answer_are_in_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    let store = builder.clone().open(dir.path()).unwrap();
    complete(&store, "neighbour before", b"kept before");
    complete(&store, KEY, ANSWER);
    complete(&store, "neighbour after", b"kept after");
    assert!(files_with(dir.path(), KEY.as_bytes()) > 0 && files_with(dir.path(), ANSWER) > 0, "the search works");
    let erasure = store.erase(&request(KEY, 9)).unwrap();
    assert_eq!((erasure.keys, erasure.records), (1, 2));
    assert_gone(dir.path());
    assert!(store.get(&request(KEY, 1)).unwrap().is_none());
    assert_eq!(store.erase(&request(KEY, 1)).unwrap().keys, 0, "there is nothing left to erase");
    store.verify().unwrap();
    for reopened in [false, true] {
        if reopened {
            let store = builder.clone().open(dir.path());
            assert_eq!(store.unwrap_err().kind(), ErrorKind::Locked);
        }
        assert_eq!(replay(store.reserve(&request("neighbour before", 1)).unwrap()).bytes(), b"kept before");
        assert_eq!(replay(store.reserve(&request("neighbour after", 1)).unwrap()).bytes(), b"kept after");
    }
    drop(store);
    let store = builder.open(dir.path()).unwrap();
    assert_gone(dir.path());
    assert_eq!(store.recovery().completed, 2);
    assert!(store.recovery().cut.is_empty() && store.recovery().lost.is_empty());
    let fresh = reserved(store.reserve(&request(KEY, 2)).unwrap());
    assert_eq!((fresh.attempt(), fresh.last_recovery_point()), (1, None));
}

#[test]
fn all_earlier_lives_of_an_erased_key_are_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    for generation in 0..4 {
        let store = builder.clone().open(dir.path()).unwrap();
        for life in 0..3 {
            let brief = request(KEY, life).retention(Retention::For(Duration::from_secs(1)));
            let mut owner = reserved(store.reserve(&brief).unwrap());
            owner.recovery_point(POINT).unwrap();
            drop(owner);
            let owner = interrupted(store.reserve(&brief).unwrap());
            match life {
                0 => owner.release().unwrap(),
                1 => drop(owner.fail(ANSWER).unwrap()),
                _ => drop(owner.complete(ANSWER).unwrap()),
            }
            clock.advance(Duration::from_secs(1));
            // Fills segments in between, and keeps them.
            for key in 0..60 {
                complete(&store, &format!("{generation}/{life}/{key}"), &[7; 500]);
            }
        }
        if generation % 2 == 0 {
            store.close().unwrap();
        }
    }
    assert!(files_with(dir.path(), KEY.as_bytes()) > 4);
    let store = builder.clone().open(dir.path()).unwrap();
    let erasure = store.erase(&request(KEY, 1)).unwrap();
    assert_eq!(erasure.keys, 0, "the last life was over");
    assert!(erasure.records >= 4 * 3 * 4, "{erasure:?}");
    assert_gone(dir.path());
    store.verify().unwrap();
    drop(store);
    let store = builder.open(dir.path()).unwrap();
    assert_gone(dir.path());
    assert_eq!(store.recovery().completed, 4 * 3 * 60);
    store.verify().unwrap();
}

#[test]
fn an_erased_interrupted_key_is_vacant_and_its_recovery_point_gone() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    let store = builder.clone().open(dir.path()).unwrap();
    let mut owner = reserved(store.reserve(&request(KEY, 1)).unwrap());
    owner.recovery_point(POINT).unwrap();
    drop(owner);
    store.erase(&request(KEY, 1)).unwrap();
    assert_gone(dir.path());
    drop(store);
    let store = builder.open(dir.path()).unwrap();
    assert_eq!(store.recovery().interrupted, 0);
    drop(reserved(store.reserve(&request(KEY, 2)).unwrap()));
}

#[test]
fn erasing_a_running_operation_fences_its_owner() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    let store = builder.clone().open(dir.path()).unwrap();
    let mut owner = reserved(store.reserve(&request(KEY, 1)).unwrap());
    owner.recovery_point(POINT).unwrap();
    assert_eq!(store.erase(&request(KEY, 1)).unwrap().keys, 1);
    assert!(owner.renew().unwrap_err().is_fenced());
    assert!(owner.recovery_point(POINT).unwrap_err().is_fenced());
    let refused = owner.complete(ANSWER).unwrap_err();
    assert!(refused.error.is_fenced());
    assert_gone(dir.path());
    let next = reserved(store.reserve(&request(KEY, 2)).unwrap());
    assert!(next.fence() > refused.reservation.fence());
    drop(refused);
    assert!(matches!(store.reserve(&request(KEY, 2)).unwrap(), Outcome::InFlight(_)));
    next.complete(b"new life").unwrap();
    drop(store);
    let store = builder.open(dir.path()).unwrap();
    assert_eq!(replay(store.reserve(&request(KEY, 2)).unwrap()).bytes(), b"new life");
}

#[test]
fn erasing_a_scope_takes_that_scope_only() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    let store = builder.clone().open(dir.path()).unwrap();
    let scopes = ["", "a", "ab", "abc", "b", "abcd"];
    for scope in scopes {
        for key in 0..50 {
            let (name, answer) = (format!("{scope}-key-{key}"), format!("<{scope}>answer"));
            let owner = reserved(store.reserve(&Request::new(&name).scope(scope).operation("ab")).unwrap());
            match key % 4 {
                0 => drop(owner),
                1 => owner.release().unwrap(),
                _ => drop(owner.complete(answer).unwrap()),
            }
        }
    }
    let mut gone: Vec<&str> = Vec::new();
    for scope in ["ab", "", "abcd"] {
        let erasure = store.erase_scope(scope).unwrap();
        gone.push(scope);
        // Of fifty keys thirteen are released and leave two records each; thirteen have one.
        assert_eq!(erasure.keys, 50 - 13, "{scope:?}");
        assert_eq!(erasure.records, 50 + 37, "{scope:?}");
        for other in scopes {
            let answer = format!("<{other}>answer");
            assert_eq!(files_with(dir.path(), answer.as_bytes()) == 0, gone.contains(&other), "{other:?} by {scope:?}");
            let kept = Request::new(&format!("{other}-key-2")).scope(other).operation("ab").to_owned_answer(&store);
            assert_eq!(kept.is_none(), gone.contains(&other), "{other:?} after {scope:?}");
        }
        assert_eq!(store.erase_scope(scope).unwrap().keys, 0);
    }
    assert_eq!(store.erase_scope("nobody's").unwrap().records, 0);
    drop(store);
    let store = builder.open(dir.path()).unwrap();
    assert_eq!((store.recovery().completed, store.recovery().interrupted), (3 * 24, 3 * 13));
    store.verify().unwrap();
}

trait OwnedAnswer {
    fn to_owned_answer(&self, store: &Store) -> Option<Vec<u8>>;
}

impl OwnedAnswer for Request<'_> {
    fn to_owned_answer(&self, store: &Store) -> Option<Vec<u8>> {
        store.get(self).unwrap().map(|record| record.bytes().to_vec())
    }
}

#[test]
fn a_scope_may_have_more_records_than_one_note_lists() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    let store = builder.clone().open(dir.path()).unwrap();
    for key in 0..3_000_u32 {
        let name = format!("KEY-TO-BE-FORGOTTEN {key}");
        reserved(store.reserve(&Request::new(&name).scope("big")).unwrap()).complete(ANSWER).unwrap();
    }
    complete(&store, "kept", b"kept");
    let erasure = store.erase_scope("big").unwrap();
    assert_eq!((erasure.keys, erasure.records), (3_000, 6_000));
    assert_gone(dir.path());
    drop(store);
    let store = builder.open(dir.path()).unwrap();
    assert_gone(dir.path());
    assert_eq!(store.recovery().completed, 1);
}

#[test]
fn erasure_reaches_records_that_upkeep_moved() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    let store = builder.clone().open(dir.path()).unwrap();
    let forever = request(KEY, 1).retention(Retention::Forever);
    reserved(store.reserve(&forever).unwrap()).complete(ANSWER).unwrap();
    let mut owner = reserved(store.reserve(&request("KEY-TO-BE-FORGOTTEN too", 1)).unwrap());
    owner.recovery_point(POINT).unwrap();
    drop(owner);
    let mut relocated = 0;
    for generation in 0..8 {
        for key in 0..200 {
            let name = format!("{generation}/{key}");
            let brief = request(&name, 1).retention(Retention::For(30 * DAY));
            reserved(store.reserve(&brief).unwrap()).complete([7; 500]).unwrap();
        }
        clock.advance(30 * DAY);
        loop {
            let done = store.maintain(1_000).unwrap();
            relocated += done.relocated;
            if !done.has_more {
                break;
            }
        }
    }
    assert!(relocated >= 2, "nothing was moved, so this test shows nothing");
    assert_eq!(replay(store.reserve(&forever).unwrap()).bytes(), ANSWER);
    store.erase(&forever).unwrap();
    store.erase(&request("KEY-TO-BE-FORGOTTEN too", 1)).unwrap();
    assert_gone(dir.path());
    drop(store);
    let store = builder.open(dir.path()).unwrap();
    assert_gone(dir.path());
    assert_eq!((store.recovery().completed, store.recovery().interrupted), (0, 0));
}

#[test]
fn an_erasure_waits_for_a_reader_and_no_longer() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    let store = builder.open(dir.path()).unwrap();
    complete(&store, KEY, ANSWER);
    let record = replay(store.reserve(&request(KEY, 1)).unwrap());
    let eraser = {
        let store = store.clone();
        std::thread::spawn(move || store.erase(&request(KEY, 1)))
    };
    // The key goes first; its bytes stay as long as they are read.
    while store.get(&request(KEY, 1)).unwrap().is_some() {
        std::thread::yield_now();
    }
    for _ in 0..1_000 {
        assert_eq!(record.bytes(), ANSWER);
        std::thread::yield_now();
    }
    drop(record);
    assert_eq!(eraser.join().unwrap().unwrap().records, 2);
    assert_gone(dir.path());
}

#[test]
fn a_reader_that_never_goes_makes_an_erasure_busy_but_not_undone() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    let store = builder.clone().open(dir.path()).unwrap();
    // Its segment stays, for other answers live in it.
    complete(&store, "neighbour", b"kept");
    let record =
        reserved(store.reserve(&request(KEY, 1).retention(Retention::Forever)).unwrap()).complete(ANSWER).unwrap();
    reserved(store.reserve(&request("forever", 1).retention(Retention::Forever)).unwrap()).complete([1; 200]).unwrap();
    assert_eq!(store.erase(&request(KEY, 1)).unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(record.bytes(), ANSWER);
    assert!(store.get(&request(KEY, 1)).unwrap().is_none(), "the key is gone");
    drop(reserved(store.reserve(&request(KEY, 2)).unwrap()));
    interrupted(store.reserve(&request(KEY, 2)).unwrap()).release().unwrap();
    // Time passes; the note of the erasure goes with its segment, under those of later ones.
    for generation in 0..4 {
        for key in 0..800 {
            let name = format!("{generation}/{key}");
            let brief = request(&name, 1).retention(Retention::For(Duration::from_secs(1)));
            reserved(store.reserve(&brief).unwrap()).complete(b"x").unwrap();
            if key % 5 == 0 {
                store.erase(&brief).unwrap();
            }
        }
        clock.advance(Duration::from_secs(60));
        while store.maintain(1_000).unwrap().has_more {}
    }
    let crashed = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(dir.path()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, crashed.path().join(path.file_name().unwrap())).unwrap();
    }
    let reopened = builder.open(crashed.path()).unwrap();
    assert!(reopened.get(&request(KEY, 1)).unwrap().is_none(), "an erased key came back");
    assert!(reopened.get(&request("forever", 1)).unwrap().is_some());
    drop(record);
    store.erase(&request(KEY, 1)).unwrap();
    assert_gone(dir.path());
}

/// Whether each further sector gets through, from a seed.
fn sectors(mut state: u64) -> impl FnMut() -> bool {
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state & 1 == 1
    }
}

#[test]
fn an_erasure_cut_short_is_finished_at_the_next_opening() {
    let (_, builder) = manual();
    for failing in 0..6 {
        let disk = SimDisk::new();
        let store = builder.clone().open_simulated(&disk).unwrap();
        complete(&store, "before", b"kept");
        let mut owner = reserved(store.reserve(&request(KEY, 1)).unwrap());
        owner.recovery_point(POINT).unwrap();
        owner.recovery_point([POINT, &[b'+'; 2_000]].concat()).unwrap();
        drop(owner);
        let answer = [ANSWER, &[b'+'; 3_000], ANSWER].concat();
        interrupted(store.reserve(&request(KEY, 1)).unwrap()).complete(&answer).unwrap();
        complete(&store, "after", b"kept");
        let why = if failing % 2 == 0 { io::ErrorKind::Other } else { io::ErrorKind::StorageFull };
        disk.fail(DiskOp::Overwrite, failing, why);
        let erased = store.erase(&request(KEY, 1));
        let is_cut_short = failing < 5;
        assert_eq!(erased.is_err(), is_cut_short, "{failing}: {erased:?}");
        if let Err(error) = erased {
            assert_eq!(error.kind(), ErrorKind::Poisoned, "{failing}: {error}");
            assert!(store.get(&request(KEY, 1)).unwrap().is_none());
            assert!(store.stats().is_poisoned);
        }
        drop(store);
        let mut images =
            vec![disk.after_process_death(), disk.after_power_cut(|| false), disk.after_power_cut(|| true)];
        images.extend((1..30).map(|seed| disk.after_power_cut(sectors(seed * 0x9e37_79b9))));
        for (at, image) in images.into_iter().enumerate() {
            let store =
                builder.clone().open_simulated(&image).unwrap_or_else(|error| panic!("{failing}/{at}: {error}"));
            for needle in [KEY.as_bytes(), ANSWER, POINT] {
                assert!(!disk_contains(&image, needle), "{failing}/{at}: erased bytes are still there");
            }
            assert!(store.get(&request(KEY, 1)).unwrap().is_none());
            store.verify().unwrap();
            drop(reserved(store.reserve(&request(KEY, 2)).unwrap()));
            if at != 1 {
                continue;
            }
            assert_eq!(replay(store.reserve(&request("before", 1)).unwrap()).bytes(), b"kept");
            assert_eq!(replay(store.reserve(&request("after", 1)).unwrap()).bytes(), b"kept");
        }
    }
}

/// What happened to a key before its scope was erased.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Past {
    Released,
    Completed,
    Vanished,
}

const PASTS: [Past; 3] = [Past::Released, Past::Completed, Past::Vanished];

fn of_scope(name: &str) -> Request<'_> {
    Request::new(name).scope("big").retention(Retention::Forever)
}

/// Gives a key a life that is over and whose records are still there, and then another.
fn live_through(store: &Store, clock: &ManualClock, name: &str, past: Past) {
    let brief = of_scope(name).retention(Retention::For(Duration::from_millis(1)));
    reserved(store.reserve(&brief).unwrap()).complete(b"earlier").unwrap();
    clock.advance(Duration::from_millis(1));
    let mut owner = reserved(store.reserve(&of_scope(name)).unwrap());
    match past {
        Past::Released => owner.release().unwrap(),
        Past::Completed => drop(owner.complete(name).unwrap()),
        Past::Vanished => owner.recovery_point(b"first").and_then(|()| owner.recovery_point(name)).unwrap(),
    }
}

/// Whether the key is gone; if it isn't, it is as its past left it.
fn is_gone(store: &Store, name: &str, past: Past) -> bool {
    match store.reserve(&of_scope(name)).unwrap() {
        Outcome::Reserved(owner) => {
            assert_eq!((owner.attempt(), owner.last_recovery_point()), (1, None));
            true
        }
        Outcome::Replay(record) => {
            assert_eq!((past, record.bytes()), (Past::Completed, name.as_bytes()));
            false
        }
        Outcome::Interrupted(owner) => {
            assert_eq!((past, owner.last_recovery_point()), (Past::Vanished, Some(name.as_bytes())), "{name}");
            false
        }
        other => panic!("{other:?}"),
    }
}

/// A defect once: released keys came back as interrupted, since their releases were overwritten first.
#[test]
fn an_erasure_of_a_scope_cut_short_leaves_each_key_as_it_was_or_gone() {
    let (clock, builder) = manual();
    let builder = builder.durability(Durability::Synced);
    let names: Vec<String> = (0..500).map(|key| key.to_string()).collect();
    let (mut gone, mut kept) = (0, 0);
    for (op, step) in [(DiskOp::Overwrite, 173), (DiskOp::Sync, 1), (DiskOp::Append, 1), (DiskOp::Create, 1)] {
        for failing in (0..).step_by(step) {
            let disk = SimDisk::new();
            let store = builder.clone().open_simulated(&disk).unwrap();
            for (name, past) in names.iter().zip(PASTS.into_iter().cycle()) {
                live_through(&store, &clock, name, past);
            }
            disk.fail(op, failing, io::ErrorKind::Other);
            let is_cut_short = store.erase_scope("big").is_err();
            for image in [disk.after_process_death(), disk.after_power_cut(sectors(failing + 1))] {
                let store = builder.clone().open_simulated(&image).unwrap();
                for (name, past) in
                    names.iter().zip(PASTS.into_iter().cycle()).filter(|(_, past)| *past != Past::Released)
                {
                    let is_gone = is_gone(&store, name, past);
                    assert!(is_cut_short || is_gone);
                    *(if is_gone { &mut gone } else { &mut kept }) += 1;
                }
                names.iter().step_by(3).for_each(|name| assert!(is_gone(&store, name, Past::Released), "{name}"));
            }
            if !is_cut_short {
                break;
            }
        }
    }
    assert!(gone > 1_000 && kept > 1_000, "{gone} keys were gone, {kept} kept");
}

/// A defect once: upkeep removed what masked the old answer, and the next restart brought that back.
#[test]
fn a_key_used_anew_during_an_erasure_that_was_cut_short_stays_as_its_new_owner_left_it() {
    let (clock, builder) = manual();
    let builder = builder.retention(Retention::Forever);
    let open = |disk: &SimDisk| builder.clone().open_simulated(disk).unwrap();
    let disk = SimDisk::new();
    let store = open(&disk);
    complete(&store, KEY, ANSWER);
    complete(&store, "KEY-TO-BE-FORGOTTEN too", ANSWER);
    // Keeps the old answers' segment.
    complete(&store, "neighbour", b"kept");
    store.close().unwrap();
    // As it is between the moment when the erasure took the keys out of the table and its note: what it overwrites
    // later is still there, and the note isn't.
    let before: Vec<_> = disk.files().into_iter().map(|(name, _)| (disk.contents(&name).unwrap(), name)).collect();
    let store = open(&disk);
    store.erase(&request(KEY, 1)).unwrap();
    store.erase(&request("KEY-TO-BE-FORGOTTEN too", 1)).unwrap();
    let note = disk.files().into_iter().map(|(name, _)| name).find(|name| {
        let bytes = disk.contents(name).unwrap();
        bytes.len() > 4096 && bytes[4096] == 0x42
    });
    reserved(store.reserve(&request(KEY, 2)).unwrap()).release().unwrap();
    let brief = Retention::For(Duration::from_secs(1));
    let again = request("KEY-TO-BE-FORGOTTEN too", 2).retention(brief);
    reserved(store.reserve(&again).unwrap()).complete(b"new").unwrap();
    let mut disk = disk.after_process_death();
    let note = note.unwrap();
    let mut bytes = disk.contents(&note).unwrap();
    bytes[64..].fill(0);
    disk.put(&note, bytes);
    for (bytes, name) in before {
        if disk.contents(&name).is_some() && name.ends_with(".seg") {
            disk.put(&name, bytes);
        }
    }
    assert!(disk_contains(&disk, ANSWER));
    for round in 0..4 {
        let store = open(&disk);
        assert!(store.get(&request(KEY, 1)).unwrap().is_none(), "round {round}");
        reserved(store.reserve(&request(KEY, 2)).unwrap()).release().unwrap();
        match store.get(&again).unwrap() {
            Some(record) => assert_eq!((record.bytes(), round), (&b"new"[..], 0)),
            None => assert!(round > 0),
        }
        for key in 0..1_500 {
            let name = format!("{round}/{key}");
            reserved(store.reserve(&request(&name, 1).retention(brief)).unwrap()).complete([7; 100]).unwrap();
        }
        clock.advance(DAY);
        while store.maintain(1_000).unwrap().has_more {}
        assert!(!disk_contains(&disk, ANSWER), "round {round}");
        store.close().unwrap();
        disk = disk.after_process_death();
    }
}

#[test]
fn a_full_journal_can_be_emptied_by_erasing_a_scope() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    let builder = builder.max_bytes(24 * 64 * 1024);
    let store = builder.clone().open(dir.path()).unwrap();
    for key in 0.. {
        match store.reserve(&of_scope(&key.to_string())) {
            Ok(outcome) => drop(reserved(outcome).complete(b"answer").unwrap()),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Full);
                break;
            }
        }
    }
    assert!(store.erase_scope("big").unwrap().records > 10_000);
    while store.maintain(1_000).unwrap().has_more {}
    reserved(store.reserve(&of_scope("again")).unwrap()).release().unwrap();
    drop(store);
    let store = builder.open(dir.path()).unwrap();
    assert_eq!((store.recovery().completed, store.recovery().interrupted), (0, 0));
}

/// A defect once: the key was gone until the next restart, and used anew meanwhile.
#[test]
fn an_erasure_without_room_for_its_note_changes_nothing() {
    let (_, builder) = manual();
    let mut disk = SimDisk::new();
    let store = builder.clone().open_simulated(&disk).unwrap();
    complete(&store, KEY, ANSWER);
    store.close().unwrap();
    // Without the spare that is held back for upkeep, which no list has after a restart.
    drop(builder.clone().open_simulated(&disk).unwrap());
    disk = disk.after_process_death();
    let newest = disk.files().into_iter().map(|(name, _)| name).filter(|name| name.ends_with(".seg")).max().unwrap();
    disk.take(&newest);
    disk.set_capacity(Some(0));
    let store = builder.clone().open_simulated(&disk).unwrap();
    let error = store.erase(&request(KEY, 1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
    assert_eq!(replay(store.reserve(&request(KEY, 1)).unwrap()).bytes(), ANSWER);
    disk.set_capacity(None);
    assert_eq!(store.erase(&request(KEY, 1)).unwrap().keys, 1);
    assert!(!disk_contains(&disk, ANSWER));
}

/// A defect once: the spare that is held back for upkeep was given up by the restart.
#[test]
fn a_full_disk_can_be_emptied_after_a_restart() {
    let (clock, builder) = manual();
    let disk = SimDisk::new();
    let builder = builder.retention(Retention::Forever);
    let store = builder.clone().open_simulated(&disk).unwrap();
    disk.set_capacity(Some(12 * 64 * 1024));
    let mut names = Vec::new();
    for key in 0.. {
        let name = key.to_string();
        match store.reserve(&request(&name, 1)) {
            Ok(outcome) => match reserved(outcome).complete([7; 900]) {
                Ok(_) => names.push(name),
                Err(unwritten) => drop(unwritten),
            },
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::StorageFull);
                break;
            }
        }
    }
    drop(store);
    for _ in 0..3 {
        drop(builder.clone().open_simulated(&disk).unwrap());
    }
    let store = builder.clone().open_simulated(&disk).unwrap();
    for name in &names {
        assert_eq!(store.erase(&request(name, 1)).unwrap().keys, 1);
    }
    while store.maintain(1_000).unwrap().has_more {}
    for name in &names {
        complete(&store, name, &[8; 100]);
    }
    drop(store);
    clock.advance(DAY);
    let store = builder.open_simulated(&disk).unwrap();
    assert_eq!(store.recovery().completed, names.len() as u64);
}

/// Where the notes of erasures take each other's place, for want of any other.
#[test]
fn an_erasure_on_a_full_disk_may_be_cut_off_at_any_point() {
    let (clock, builder) = manual();
    let builder = builder.durability(Durability::Synced).retention(Retention::Forever);
    let names: Vec<String> = (0..450).map(|key| key.to_string()).collect();
    let mut cuts = 0;
    for (op, step) in [(DiskOp::Overwrite, 61), (DiskOp::Sync, 67), (DiskOp::SyncNames, 1), (DiskOp::Remove, 1)] {
        for failing in (0..).step_by(step) {
            let disk = SimDisk::new();
            let store = builder.clone().open_simulated(&disk).unwrap();
            for (name, past) in names.iter().zip(PASTS.into_iter().cycle()) {
                live_through(&store, &clock, name, past);
            }
            let used = disk.files().iter().map(|(_, len)| len).sum();
            disk.set_capacity(Some(used));
            disk.fail(op, failing, io::ErrorKind::Other);
            let erased = names.iter().take_while(|name| store.erase(&of_scope(name)).is_ok()).count();
            cuts += u64::from(erased < names.len());
            for image in [disk.after_process_death(), disk.after_power_cut(sectors(failing + 1))] {
                let store = builder.clone().open_simulated(&image).unwrap();
                image.set_capacity(None);
                for (at, (name, past)) in names.iter().zip(PASTS.into_iter().cycle()).enumerate() {
                    let is_gone = is_gone(&store, name, past);
                    assert!(is_gone || at >= erased && past != Past::Released, "{op:?} {failing}: {past:?} {name}");
                }
            }
            if erased == names.len() {
                break;
            }
        }
    }
    assert!(cuts > 20, "{cuts} cuts");
}

#[test]
fn the_note_of_a_held_record_stays_on_a_full_disk() {
    let (_, builder) = manual();
    let builder = builder.retention(Retention::Forever);
    let disk = SimDisk::new();
    let store = builder.clone().open_simulated(&disk).unwrap();
    let record = reserved(store.reserve(&request(KEY, 1)).unwrap()).complete(ANSWER).unwrap();
    for key in 0..2_500 {
        let name = key.to_string();
        reserved(store.reserve(&of_scope(&name)).unwrap()).complete(b"answer").unwrap();
    }
    disk.set_capacity(Some(disk.files().iter().map(|(_, len)| len).sum()));
    assert_eq!(store.erase(&request(KEY, 1)).unwrap_err().kind(), ErrorKind::Busy);
    // More notes than one segment holds; some of the records share the held one's count of handles.
    let error = store.erase_scope("big").unwrap_err();
    assert!(error.is_full() || error.kind() == ErrorKind::Busy, "{error}");
    assert_eq!(record.bytes(), ANSWER);
    let image = disk.after_process_death();
    let store = builder.open_simulated(&image).unwrap();
    assert!(store.get(&request(KEY, 1)).unwrap().is_none());
    assert!(!disk_contains(&image, ANSWER));
}

#[test]
fn an_erasure_that_returned_survives_every_power_cut() {
    let (_, builder) = manual();
    let disk = SimDisk::new();
    let store = builder.clone().open_simulated(&disk).unwrap();
    for key in 0..30 {
        complete(&store, &format!("{key}"), &[7; 300]);
    }
    complete(&store, KEY, ANSWER);
    store.erase(&request(KEY, 1)).unwrap();
    for seed in 1..60 {
        let image = disk.after_power_cut(sectors(seed * 0x9e37_79b9));
        assert!(!disk_contains(&image, KEY.as_bytes()) && !disk_contains(&image, ANSWER), "before recovery, too");
        let store = builder.clone().open_simulated(&image).unwrap();
        assert!(store.get(&request(KEY, 1)).unwrap().is_none());
        assert_eq!(store.recovery().completed, 30);
    }
}

/// A defect once: the next owner overwrote bytes that a record of the one before still showed.
#[test]
fn a_held_record_keeps_the_next_opener_out_and_its_bytes_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    let store = builder.clone().open(dir.path()).unwrap();
    let record = reserved(store.reserve(&request(KEY, 1)).unwrap()).complete(ANSWER).unwrap();
    store.close().unwrap();
    assert_eq!(builder.clone().open(dir.path()).unwrap_err().kind(), ErrorKind::Locked);
    assert_eq!(record.bytes(), ANSWER);
    drop(record);
    let store = builder.open(dir.path()).unwrap();
    store.erase(&request(KEY, 1)).unwrap();
    assert_gone(dir.path());
}

/// Found by the torture rig: each old record of a key had the key taken out again, with the answer that was stored meanwhile.
#[test]
fn an_answer_stored_while_its_scope_is_erased_stays() {
    let (_, builder) = manual();
    let store = builder.in_memory().unwrap();
    let request = Request::new(KEY).scope("red");
    for round in 0..20 {
        let mut owner = reserved(store.reserve(&request).unwrap());
        (0..2_000).for_each(|_| owner.recovery_point(POINT).unwrap());
        owner.complete(ANSWER).unwrap();
        std::thread::scope(|scope| {
            let erasing = scope.spawn(|| store.erase_scope("red").unwrap());
            let owner = loop {
                match store.reserve(&request).unwrap() {
                    Outcome::Reserved(owner) => break owner,
                    outcome => drop(replay(outcome)),
                }
            };
            drop(owner);
            interrupted(store.reserve(&request).unwrap()).complete(b"new").unwrap();
            assert_eq!(erasing.join().unwrap().keys, 1);
        });
        assert_eq!(store.get(&request).unwrap().expect("it was stored").bytes(), b"new", "round {round}");
        store.erase_scope("red").unwrap();
    }
}
