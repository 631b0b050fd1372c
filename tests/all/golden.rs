//! Journals of format version 1, as bytes that are never made anew: what was written once stays readable.
//!
//! `tests/fixtures/v1-*/` hold a store's files without the zeros at their ends. A new format gets new directories, made by
//! `ONCEKEY_MAKE_FIXTURES=1 cargo test --test all golden` (which leaves those alone that exist).

use crate::support::{START_MS, interrupted, manual, reserved};
use oncekey::testing::{DiskOp, SimDisk};
use oncekey::{
    Builder, Durability, ErrorKind, ManualClock, Media, Mismatch, Outcome, RecoveryMode, Request, Reservation,
    Retention, Store,
};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

const SEGMENT_LEN: usize = 64 * 1024;
const HOUR: Duration = Duration::from_secs(3600);
/// When the stores are opened: the short answer is over, the long ones aren't.
const OPENED_MS: u64 = START_MS + 60_000;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn long_answer() -> Vec<u8> {
    (0..3000_u32).map(|at| (at * 7 % 251) as u8).collect()
}

fn binary_key() -> Vec<u8> {
    (0..=255).collect()
}

/// A copy of a fixture, with the zeros back at the segments' ends.
fn unpack(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let file = entry.unwrap().file_name().into_string().unwrap();
        let mut bytes = fs::read(fixture(name).join(&file)).unwrap();
        pad(&file, &mut bytes);
        fs::write(dir.path().join(file), bytes).unwrap();
    }
    dir
}

/// Puts back the zeros at a file's end.
fn pad(file: &str, bytes: &mut Vec<u8>) {
    if file.ends_with(".seg") {
        bytes.resize(SEGMENT_LEN, 0);
    } else if file == "SEGMENTS" {
        bytes.resize(8192, 0);
    }
}

/// The same on a simulated disk.
fn unpack_simulated(name: &str) -> SimDisk {
    let disk = SimDisk::new();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let file = entry.unwrap().file_name().into_string().unwrap();
        let mut bytes = fs::read(fixture(name).join(&file)).unwrap();
        pad(&file, &mut bytes);
        disk.put(&file, bytes);
    }
    disk
}

fn builder() -> Builder {
    Store::builder().clock(Arc::new(ManualClock::new(OPENED_MS))).background(false)
}

/// What a key of the fixture has to be.
enum Is {
    Answer { bytes: Vec<u8>, is_failure: bool, attempt: u32, expires_ms: Option<u64> },
    Interrupted { attempt: u32, point: Option<&'static [u8]> },
    Vacant,
}

fn answer(bytes: impl Into<Vec<u8>>) -> Is {
    let expires_ms = Some(START_MS + HOUR.as_millis() as u64);
    Is::Answer { bytes: bytes.into(), is_failure: false, attempt: 1, expires_ms }
}

#[track_caller]
fn check(store: &Store, request: Request<'_>, is: Is) {
    let request = request.lease(HOUR);
    match is {
        Is::Answer { bytes, is_failure, attempt, expires_ms } => {
            let record = match store.reserve(&request).unwrap() {
                Outcome::Replay(record) => record,
                other => panic!("{request:?}: {other:?}"),
            };
            assert_eq!(record.bytes(), bytes);
            assert_eq!((record.is_failure(), record.attempt()), (is_failure, attempt));
            assert_eq!(record.completed_at(), UNIX_EPOCH + Duration::from_millis(START_MS));
            assert_eq!(record.expires_at(), expires_ms.map(|ms| UNIX_EPOCH + Duration::from_millis(ms)));
        }
        Is::Interrupted { attempt, point } => {
            let other = request.fingerprint_of(b"another payload");
            assert!(matches!(store.reserve(&other).unwrap(), Outcome::Mismatch(Mismatch { .. })));
            let guard = interrupted(store.reserve(&request).unwrap());
            assert_eq!((guard.attempt(), guard.last_recovery_point()), (attempt + 1, point));
        }
        Is::Vacant => reserved(store.reserve(&request).unwrap()).release().unwrap(),
    }
}

/// What every fixture holds; those made by a crash hold some more.
fn check_history(store: &Store) {
    let by = |key: &'static str| Request::new(key).fingerprint_of(b"payload");
    check(store, by("plain"), answer(*b"an answer"));
    check(store, by("plain").scope("acme"), answer(*b"acme's answer"));
    check(store, by("plain").scope("acme").operation("charge"), answer(*b"acme's charge"));
    check(store, by("empty"), answer(*b""));
    check(store, by("long"), answer(long_answer()));
    check(store, Request::new(&binary_key()).fingerprint_of(b"payload"), answer(*b"a key of all bytes"));
    check(store, Request::new("no fingerprint"), answer(*b"whatever was asked"));
    let forever = Is::Answer { bytes: b"for good".to_vec(), is_failure: false, attempt: 1, expires_ms: None };
    check(store, by("forever"), forever);
    let Is::Answer { bytes, attempt, expires_ms, .. } = answer(*b"no such account") else { unreachable!() };
    check(store, by("failed"), Is::Answer { bytes, is_failure: true, attempt, expires_ms });
    let Is::Answer { bytes, is_failure, expires_ms, .. } = answer(*b"at last") else { unreachable!() };
    check(store, by("second attempt"), Is::Answer { bytes, is_failure, attempt: 2, expires_ms });
    check(store, by("reserved"), Is::Interrupted { attempt: 1, point: None });
    check(store, by("pointed"), Is::Interrupted { attempt: 1, point: Some(b"step 2") });
    check(store, by("pointed, taken over"), Is::Interrupted { attempt: 2, point: Some(b"step 1") });
    check(store, by("released"), Is::Vacant);
    check(store, by("erased"), Is::Vacant);
    check(store, by("expired"), Is::Vacant);
    check(store, by("never heard of"), Is::Vacant);
}

/// Opens a fixture with each way of writing, checks it, and once more after a close.
fn open(name: &str, check: impl Fn(&Store)) {
    for media in [Media::Mmap, Media::Pwrite] {
        let dir = unpack(name);
        let store = builder().media(media).open(dir.path()).unwrap();
        assert!(store.recovery().lost.is_empty());
        check(&store);
        store.verify().unwrap();
        store.close().unwrap();
        let store = builder().media(media).open(dir.path()).unwrap();
        let kept = store.get(&Request::new("long")).unwrap().unwrap();
        assert_eq!(kept.bytes(), long_answer());
        store.verify().unwrap();
    }
}

#[test]
fn a_closed_store_of_version_1_is_readable() {
    open("v1-closed", |store| {
        assert!(store.recovery().cut.is_empty());
        assert_eq!((store.recovery().completed, store.recovery().interrupted), (10, 3));
        check_history(store);
    });
}

#[test]
fn a_killed_store_of_version_1_is_readable() {
    open("v1-killed", |store| {
        assert!(store.recovery().cut.is_empty());
        assert_eq!((store.recovery().completed, store.recovery().interrupted), (10, 3));
        check_history(store);
    });
}

#[test]
fn a_torn_store_of_version_1_is_cut_and_readable() {
    open("v1-torn", |store| {
        assert_eq!(store.recovery().cut.len(), 2, "{:?}", store.recovery().cut);
        check_history(store);
        let by = |key: &'static str| Request::new(key).fingerprint_of(b"payload");
        check(store, by("lost in a hole"), Is::Interrupted { attempt: 1, point: None });
        check(store, by("behind the hole"), answer(*b"behind the hole's answer"));
        check(store, by("torn"), Is::Interrupted { attempt: 1, point: None });
    });
}

#[test]
fn an_erasure_that_version_1_did_not_finish_is_finished() {
    open("v1-erasing", |store| {
        assert_eq!(store.recovery().scrubbed, 2);
        check_history(store);
        check(store, Request::new("half erased").fingerprint_of(b"payload"), Is::Vacant);
    });
    let dir = unpack("v1-erasing");
    let holds = |dir: &Path| {
        fs::read_dir(dir).unwrap().any(|entry| {
            let bytes = fs::read(entry.unwrap().path()).unwrap();
            bytes.windows(11).any(|bytes| bytes == b"half erased")
        })
    };
    assert!(holds(dir.path()));
    drop(builder().open(dir.path()).unwrap());
    assert!(!holds(dir.path()));
}

#[test]
fn a_store_of_version_1_with_a_list_of_its_segments_is_readable() {
    open("v1-listed", |store| {
        assert!(store.recovery().cut.is_empty());
        assert_eq!((store.recovery().completed, store.recovery().interrupted), (10, 3));
        check_history(store);
    });
    for number in 1..=5 {
        let dir = unpack("v1-listed");
        let missing = dir.path().join(format!("{number:016x}.seg"));
        fs::remove_file(&missing).unwrap();
        let error = builder().open(dir.path()).unwrap_err();
        assert_eq!((error.kind(), error.path()), (ErrorKind::Corrupt, Some(&*missing)));
    }
}

/// Those made before there were lists get one; whatever cuts that short, the next opening goes on.
#[test]
fn a_store_without_a_list_of_segments_gets_one() {
    let mut cut_off = 0;
    for name in ["v1-closed", "v1-killed", "v1-torn", "v1-erasing"] {
        for op in [DiskOp::Create, DiskOp::Overwrite, DiskOp::Sync, DiskOp::SyncNames, DiskOp::Remove] {
            for call in 0.. {
                let disk = unpack_simulated(name);
                assert_eq!((disk.contents("SEGMENTS"), disk.contents("STORE").unwrap()[12]), (None, 0));
                disk.fail(op, call, std::io::ErrorKind::Other);
                let is_cut_off = builder().open_simulated(&disk).is_err();
                cut_off += u32::from(is_cut_off);
                for seed in 0..8_u32 {
                    let mut at = 0;
                    let image = disk.after_power_cut(|| {
                        at += 1;
                        seed.rotate_right(at) & 1 == 1
                    });
                    let store = builder().open_simulated(&image).unwrap();
                    assert!(store.recovery().lost.is_empty());
                    check_history(&store);
                    store.verify().unwrap();
                    store.close().unwrap();
                    assert_eq!(image.contents("STORE").unwrap()[12], 2, "marked as having a list");
                    let victim = image.files().into_iter().map(|(name, _)| name).find(|name| name.ends_with(".seg"));
                    image.take(&victim.unwrap());
                    assert_eq!(builder().open_simulated(&image).unwrap_err().kind(), ErrorKind::Corrupt);
                }
                if !is_cut_off {
                    break;
                }
            }
        }
    }
    assert!(cut_off > 30, "{cut_off}");
}

/// Found by fuzzing: the first builds' head marks stayed, and said for ever that more was durable than salvage had left.
#[test]
fn what_salvage_left_of_a_store_of_the_first_builds_opens() {
    let mut salvaged = 0;
    for name in ["v1-closed", "v1-killed", "v1-listed"] {
        for (segment, _) in unpack_simulated(name).files().into_iter().filter(|(name, _)| name.ends_with(".seg")) {
            let disk = unpack_simulated(name);
            let mut bytes = disk.contents(&segment).unwrap();
            let Some(last) = bytes[4096..].iter().rposition(|byte| *byte != 0) else { continue };
            bytes[4096 + last / 2..].fill(0);
            disk.put(&segment, bytes);
            salvaged += u32::from(builder().open_simulated(&disk).is_err());
            builder().recovery(RecoveryMode::Salvage).open_simulated(&disk).unwrap().close().unwrap();
            let store = builder().open_simulated(&disk).unwrap();
            assert!(store.recovery().lost.is_empty(), "{name}/{segment}: {:?}", store.recovery());
        }
    }
    assert!(salvaged > 3, "{salvaged}");
}

/// Writes what [`check_history`] expects; returns the guards of those who are to vanish.
fn write_history(store: &Store) -> Vec<Reservation> {
    let reserve = |request: Request<'_>| match store.reserve(&request.retention(Retention::For(HOUR))).unwrap() {
        Outcome::Reserved(guard) | Outcome::Interrupted(guard) => guard,
        other => panic!("{other:?}"),
    };
    let by = |key: &'static str| Request::new(key).fingerprint_of(b"payload");
    reserve(by("plain")).complete(b"an answer").unwrap();
    reserve(by("plain").scope("acme")).complete(b"acme's answer").unwrap();
    reserve(by("plain").scope("acme").operation("charge")).complete(b"acme's charge").unwrap();
    reserve(by("empty").durability(Durability::Buffered)).complete(b"").unwrap();
    reserve(by("long")).complete(long_answer()).unwrap();
    reserve(Request::new(&binary_key()).fingerprint_of(b"payload")).complete(b"a key of all bytes").unwrap();
    reserve(Request::new("no fingerprint")).complete(b"whatever was asked").unwrap();
    let mut forever = reserve(by("forever"));
    forever.set_retention(Retention::Forever).unwrap();
    forever.complete(b"for good").unwrap();
    reserve(by("failed")).fail(b"no such account").unwrap();
    drop(reserve(by("second attempt")));
    reserve(by("second attempt")).complete(b"at last").unwrap();
    reserve(by("released")).release().unwrap();
    reserve(by("erased")).complete(b"an answer to be forgotten").unwrap();
    store.erase(&by("erased")).unwrap();
    let mut expired = reserve(by("expired"));
    expired.set_retention(Retention::For(Duration::from_millis(5))).unwrap();
    expired.complete(b"an answer for a moment").unwrap();
    let mut first = reserve(by("pointed, taken over"));
    first.recovery_point(b"step 1").unwrap();
    drop(first);
    let mut pointed = reserve(by("pointed"));
    pointed.recovery_point(b"step 1").unwrap();
    pointed.recovery_point(b"step 2").unwrap();
    vec![reserve(by("reserved")), pointed, reserve(by("pointed, taken over"))]
}

/// Writes a disk's files, without the zeros at their ends, unless there are such.
fn keep(disk: &SimDisk, name: &str) {
    let dir = fixture(name);
    if dir.exists() {
        return;
    }
    fs::create_dir_all(&dir).unwrap();
    for (file, _) in disk.files() {
        let mut bytes = disk.contents(&file).unwrap();
        bytes.truncate(bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
        fs::write(dir.join(file), bytes).unwrap();
    }
}

#[test]
fn fixtures_are_made_when_asked_for() {
    if std::env::var_os("ONCEKEY_MAKE_FIXTURES").is_none() {
        return;
    }
    let make = || {
        let disk = SimDisk::new();
        let store = manual().1.durability(Durability::Synced).open_simulated(&disk).unwrap();
        let guards = write_history(&store);
        (disk, store, guards)
    };

    let (disk, store, guards) = make();
    keep(&disk.after_process_death(), "v1-killed");
    keep(&disk.after_process_death(), "v1-listed");
    store.close().unwrap();
    drop(guards);
    keep(&disk, "v1-closed");

    let (disk, store, _guards) = make();
    let by = |key: &'static str| {
        Request::new(key).fingerprint_of(b"payload").durability(Durability::Buffered).retention(Retention::For(HOUR))
    };
    for key in ["lost in a hole", "behind the hole", "torn"] {
        reserved(store.reserve(&by(key)).unwrap()).complete(format!("{key}'s answer")).unwrap();
    }
    let image = disk.after_process_death();
    for (file, _) in image.files() {
        let mut bytes = image.contents(&file).unwrap();
        let find = |bytes: &[u8], text: &[u8]| bytes.windows(text.len()).position(|found| found == text);
        if let (Some(hole), Some(torn)) = (find(&bytes, b"lost in a hole's"), find(&bytes, b"torn's answer")) {
            let start = hole - 14 - 4 - 64;
            let end = (hole + 23).next_multiple_of(8);
            bytes[start..end].fill(0);
            bytes[torn..].fill(0);
            image.put(&file, bytes);
        }
    }
    keep(&image, "v1-torn");

    let (disk, store, _guards) = make();
    reserved(store.reserve(&by("half erased")).unwrap()).complete(b"half erased's answer").unwrap();
    disk.fail(DiskOp::Overwrite, 0, std::io::ErrorKind::Other);
    store.erase(&by("half erased")).unwrap_err();
    keep(&disk.after_process_death(), "v1-erasing");
}
