//! What callers, disks and directories can get wrong, and what each gets for an answer.

use crate::support::{START_MS, interrupted, manual, replay, request, reserved};
use oncekey::testing::{DiskOp, SimDisk};
use oncekey::{Builder, Error, ErrorKind, MAX_LEASE, Outcome, RecoveryMode, Request, Retention, Store};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);
const SEGMENT: u64 = 64 * 1024;
/// Tells a child process which directory to work in.
const CHILD_DIR: &str = "ONCEKEY_TEST_BAD_INPUT_DIR";

#[track_caller]
fn assert_kind<T: Debug, E: Into<Error>>(result: Result<T, E>, kind: ErrorKind) {
    let error: Error = result.map_err(Into::into).unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
}

fn in_memory() -> Store {
    manual().1.in_memory().unwrap()
}

/// Every file below a directory with its bytes, its lock excluded.
fn snapshot(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap() != "LOCK" && fs::symlink_metadata(&path).unwrap().is_file() {
            files.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    files
}

fn segments(dir: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|name| name == "seg")).collect();
    paths.sort();
    paths
}

/// A closed store with some keys of each kind in it.
fn closed_store(builder: &Builder, dir: &Path) {
    let store = builder.clone().open(dir).unwrap();
    for key in 0..20 {
        let owner = reserved(store.reserve(&request(&key.to_string(), 1)).unwrap());
        match key % 3 {
            0 => drop(owner),
            1 => drop(owner.complete(b"answer").unwrap()),
            _ => owner.release().unwrap(),
        }
    }
    store.close().unwrap();
}

/// This test binary, to run one of its tests as another process.
fn child(test: &str, dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(CHILD_DIR, dir);
    command
}

#[track_caller]
fn assert_succeeds(command: &mut Command) {
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&text));
}

#[test]
fn an_empty_key_is_refused_whatever_its_scope() {
    let store = in_memory();
    for empty in [Request::new(""), Request::new("").scope("acme"), Request::new("").operation("charge")] {
        assert_kind(store.reserve(&empty), ErrorKind::InvalidKey);
        assert_kind(store.get(&empty), ErrorKind::InvalidKey);
        assert_kind(store.erase(&empty), ErrorKind::InvalidKey);
    }
    assert_eq!(store.stats().keys, 0);
}

#[test]
fn a_key_may_be_as_long_as_the_limit_and_no_longer() {
    let store = manual().1.max_key_len(100).in_memory().unwrap();
    let key = "k".repeat(80);
    let longest = Request::new(&key).scope("0123456789").operation("0123456789");
    reserved(store.reserve(&longest).unwrap()).complete(b"x").unwrap();
    assert_eq!(replay(store.reserve(&longest).unwrap()).bytes(), b"x");
    for longer in [longest.scope("0123456789+"), longest.operation("0123456789+")] {
        assert_kind(store.reserve(&longer), ErrorKind::InvalidKey);
        assert!(store.get(&longer).unwrap().is_none());
        assert_eq!(store.erase(&longer).unwrap().keys, 0);
    }
    let key = "k".repeat(1 << 20);
    assert_kind(store.reserve(&Request::new(&key)), ErrorKind::InvalidKey);
    assert_eq!(store.stats().keys, 1);
}

#[test]
fn a_key_longer_than_a_lowered_limit_can_be_looked_up_and_erased() {
    let dir = tempfile::tempdir().unwrap();
    let key = "k".repeat(100);
    let request = request(&key, 1);
    let store = manual().1.open(dir.path()).unwrap();
    reserved(store.reserve(&request).unwrap()).complete(b"x").unwrap();
    drop(store);
    let store = manual().1.max_key_len(99).open(dir.path()).unwrap();
    assert_kind(store.reserve(&request), ErrorKind::InvalidKey);
    assert_eq!(store.get(&request).unwrap().unwrap().bytes(), b"x");
    assert_eq!(store.erase(&request).unwrap().keys, 1);
    assert!(store.get(&request).unwrap().is_none());
}

#[test]
fn the_longest_key_with_the_longest_record_fits_the_smallest_segment() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    let builder = builder.max_key_len(32 * 1024);
    let key = vec![b'k'; 32 * 1024];
    let longest = Request::new(&key);
    let store = builder.clone().open(dir.path()).unwrap();
    let answer = vec![b'a'; SEGMENT as usize - 8 * 1024 - 32 * 1024 - 4];
    let mut owner = reserved(store.reserve(&longest).unwrap());
    owner.recovery_point(&answer).unwrap();
    drop(owner);
    let owner = interrupted(store.reserve(&longest).unwrap());
    assert_eq!(owner.last_recovery_point(), Some(&answer[..]));
    let too_long = [&answer[..], b"+"].concat();
    let refused = owner.complete(&too_long).unwrap_err();
    assert_eq!(refused.error.kind(), ErrorKind::RecordTooLarge);
    refused.reservation.complete(&answer).unwrap();
    drop(store);
    let store = builder.open(dir.path()).unwrap();
    assert_eq!(replay(store.reserve(&longest).unwrap()).bytes(), answer);
}

#[test]
fn an_answer_over_the_limit_is_refused_and_its_owner_goes_on() {
    let store = manual().1.max_record_len(100).in_memory().unwrap();
    let mut owner = reserved(store.reserve(&request("a", 1)).unwrap());
    assert_kind(owner.recovery_point([0; 101]), ErrorKind::RecordTooLarge);
    owner.recovery_point([0; 100]).unwrap();
    let owner = owner.complete([1; 101]).unwrap_err().reservation;
    let refused = owner.fail([1; 101]).unwrap_err();
    assert_eq!(refused.error.kind(), ErrorKind::RecordTooLarge);
    assert!(matches!(store.reserve(&request("a", 1)).unwrap(), Outcome::InFlight(_)));
    refused.reservation.complete([2; 100]).unwrap();
    assert_eq!(replay(store.reserve(&request("a", 1)).unwrap()).bytes(), [2; 100]);
}

#[test]
fn leases_out_of_range_are_refused() {
    let store = in_memory();
    let too_short = [Duration::ZERO, Duration::from_micros(999)];
    let too_long = [MAX_LEASE + Duration::from_nanos(1), Duration::MAX];
    for lease in too_short.into_iter().chain(too_long) {
        assert_kind(store.reserve(&request("a", 1).lease(lease)), ErrorKind::InvalidArgument);
        assert_kind(Store::builder().lease(lease).in_memory(), ErrorKind::InvalidArgument);
    }
    let mut owner = reserved(store.reserve(&request("a", 1).lease(MAX_LEASE)).unwrap());
    assert_kind(owner.renew_for(Duration::ZERO), ErrorKind::InvalidArgument);
    assert_kind(owner.renew_for(Duration::MAX), ErrorKind::InvalidArgument);
    owner.renew_for(Duration::from_millis(1)).unwrap();
    owner.complete(b"x").unwrap();
}

#[test]
fn retentions_of_nothing_are_refused_and_endless_ones_saturate() {
    let (clock, builder) = manual();
    let dir = tempfile::tempdir().unwrap();
    let store = builder.clone().open(dir.path()).unwrap();
    for short in [Duration::ZERO, Duration::from_nanos(1), Duration::from_micros(999)] {
        let short = Retention::For(short);
        assert_kind(store.reserve(&request("a", 1).retention(short)), ErrorKind::InvalidArgument);
        assert_kind(builder.clone().retention(short).in_memory(), ErrorKind::InvalidArgument);
    }
    let endless = [Duration::MAX, Duration::from_millis(u64::MAX), Duration::from_secs(u64::MAX / 1000)];
    for (at, time) in endless.into_iter().enumerate() {
        let key = at.to_string();
        let kept = request(&key, 1).retention(Retention::For(time));
        let record = reserved(store.reserve(&kept).unwrap()).complete(b"x").unwrap();
        assert!(record.expires_at().is_none_or(|end| end > record.completed_at()));
    }
    clock.advance(Duration::from_secs(1 << 45));
    store.maintain(usize::MAX).unwrap();
    assert_eq!(store.stats().keys, 3);
    drop(store);
    let store = builder.open(dir.path()).unwrap();
    assert_eq!(store.recovery().completed, 3);
    for key in ["0", "1", "2"] {
        assert_eq!(replay(store.reserve(&request(key, 1)).unwrap()).bytes(), b"x");
    }
}

#[test]
fn a_clock_at_the_end_of_time_is_no_reason_to_panic() {
    let (clock, builder) = manual();
    let dir = tempfile::tempdir().unwrap();
    let store = builder.clone().open(dir.path()).unwrap();
    for now_ms in [u64::MAX - 2, u64::MAX - 1, u64::MAX] {
        clock.set(now_ms);
        let key = now_ms.to_string();
        let owner = reserved(store.reserve(&request(&key, 1)).unwrap());
        assert!(matches!(store.reserve(&request(&key, 1)).unwrap(), Outcome::InFlight(_) | Outcome::Interrupted(_)));
        owner.complete(b"x").unwrap_or_else(|_| panic!("the key was taken over at {now_ms}"));
        store.maintain(1 << 20).unwrap();
    }
    drop(store);
    builder.open(dir.path()).unwrap().maintain(1 << 20).unwrap();
}

#[test]
fn settings_out_of_range_are_refused() {
    let builder = || manual().1;
    let refused = [
        builder().segment_size(0),
        builder().segment_size(SEGMENT - 1),
        builder().segment_size(SEGMENT + 8),
        builder().segment_size(512 << 20),
        builder().segment_size(u64::MAX),
        builder().max_key_len(0),
        builder().max_key_len(32 * 1024 + 1),
        builder().max_key_len(usize::MAX),
        builder().max_keys(0),
        builder().max_bytes(16 * SEGMENT - 1),
        builder().max_record_len(SEGMENT as usize),
        builder().max_record_len(usize::MAX),
    ];
    for (at, builder) in refused.into_iter().enumerate() {
        let error = builder.in_memory().map(|_| at).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{at}: {error}");
    }
}

#[test]
fn settings_that_are_refused_leave_no_directory_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    assert_kind(manual().1.max_keys(0).open(&path), ErrorKind::InvalidArgument);
    assert!(!path.exists());
    assert_kind(manual().1.max_record_len(SEGMENT as usize).open(&path), ErrorKind::InvalidArgument);
    manual().1.open(&path).unwrap();
}

#[test]
fn max_bytes_is_held_against_the_stores_own_segments() {
    for (segment_len, max_bytes, fits) in [(SEGMENT, 16 * SEGMENT, true), (1 << 20, 16 * SEGMENT, false)] {
        let dir = tempfile::tempdir().unwrap();
        drop(Store::builder().segment_size(segment_len).open(dir.path()).unwrap());
        let before = snapshot(dir.path());
        match Store::builder().max_bytes(max_bytes).open(dir.path()) {
            Ok(_) => assert!(fits),
            Err(error) => {
                assert_eq!((error.kind(), fits), (ErrorKind::InvalidArgument, false), "{error}");
                assert_eq!(snapshot(dir.path()), before);
            }
        }
    }
}

#[test]
fn another_segment_size_than_the_stores_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    closed_store(&builder, dir.path());
    let before = snapshot(dir.path());
    assert_kind(builder.clone().segment_size(2 * SEGMENT).open(dir.path()), ErrorKind::InvalidArgument);
    assert_eq!(snapshot(dir.path()), before);
    Store::builder().background(false).open(dir.path()).unwrap();
}

#[test]
fn a_full_table_refuses_new_keys_and_keeps_the_old_ones() {
    let (clock, builder) = manual();
    let store = builder.max_keys(10).retention(Retention::For(SECOND)).in_memory().unwrap();
    let owner = reserved(store.reserve(&request("owner", 1)).unwrap());
    drop(reserved(store.reserve(&request("dropped", 1)).unwrap()));
    for key in 0..8 {
        reserved(store.reserve(&request(&key.to_string(), 1)).unwrap()).complete(b"x").unwrap();
    }
    for key in ["new", "newer"] {
        let error = store.reserve(&request(key, 1)).unwrap_err();
        assert!(error.is_full() && error.kind() == ErrorKind::Full, "{error}");
    }
    for key in 0..8 {
        assert_eq!(replay(store.reserve(&request(&key.to_string(), 1)).unwrap()).bytes(), b"x");
    }
    interrupted(store.reserve(&request("dropped", 1)).unwrap()).release().unwrap();
    let fresh = reserved(store.reserve(&request("new", 1)).unwrap());
    assert_kind(store.reserve(&request("newer", 1)), ErrorKind::Full);
    owner.complete(b"y").unwrap();
    fresh.complete(b"z").unwrap();
    clock.advance(SECOND);
    store.maintain(usize::MAX).unwrap();
    assert_eq!(store.stats().keys, 0);
    for key in 0..10 {
        reserved(store.reserve(&request(&key.to_string(), 2)).unwrap()).complete(b"again").unwrap();
    }
    assert_kind(store.reserve(&request("one too many", 1)), ErrorKind::Full);
    store.erase(&request("3", 2)).unwrap();
    drop(reserved(store.reserve(&request("one too many", 1)).unwrap()));
}

#[test]
fn max_keys_counts_what_was_recovered() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    let builder = builder.max_keys(3);
    let store = builder.clone().open(dir.path()).unwrap();
    for key in ["a", "b", "c"] {
        reserved(store.reserve(&request(key, 1)).unwrap()).complete(b"x").unwrap();
    }
    drop(store);
    let store = builder.open(dir.path()).unwrap();
    assert_kind(store.reserve(&request("d", 1)), ErrorKind::Full);
    store.erase(&request("a", 1)).unwrap();
    drop(reserved(store.reserve(&request("d", 1)).unwrap()));
}

#[test]
fn a_journal_at_max_bytes_lets_owners_finish_and_is_usable_again_after_expiry() {
    let (clock, builder) = manual();
    let store = builder.max_bytes(16 * SEGMENT).retention(Retention::For(HOUR)).lease(MAX_LEASE).in_memory().unwrap();
    let mut owners = Vec::new();
    let mut refused = 0;
    let mut answers = 0;
    for key in 0..100_000 {
        match store.reserve(&request(&key.to_string(), 1)) {
            Ok(outcome) => owners.push(reserved(outcome)),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Full, "{error}");
                refused += 1;
                if refused == 3 {
                    break;
                }
            }
        }
        if owners.len() == 8 {
            for owner in owners.drain(..) {
                owner.complete([7; 500]).unwrap_or_else(|refused| panic!("an owner is stuck: {}", refused.error));
                answers += 1;
            }
        }
    }
    assert_eq!(refused, 3, "the limit was never reached");
    assert!(store.stats().journal_bytes <= 16 * SEGMENT);
    for owner in owners.drain(..) {
        owner.complete([7; 500]).unwrap();
        answers += 1;
    }
    assert_eq!(store.stats().keys, answers);
    assert_eq!(replay(store.reserve(&request("0", 1)).unwrap()).bytes(), [7; 500]);
    clock.advance(HOUR);
    while store.maintain(1 << 20).unwrap().has_more {}
    for key in 0..200 {
        reserved(store.reserve(&request(&key.to_string(), 2)).unwrap()).complete([8; 500]).unwrap();
    }
}

/// A defect once: a segment in use for each lifetime was all that a small limit allowed, for good.
#[test]
fn answers_of_all_lifetimes_have_room_under_the_least_max_bytes_and_what_fills_it_can_be_erased() {
    let (_, builder) = manual();
    let store = builder.max_bytes(16 * SEGMENT).lease(MAX_LEASE).in_memory().unwrap();
    let lifetimes = (0..12).map(|power| Retention::For(SECOND * 10_u32.pow(power.min(9))));
    for round in 0..3 {
        let mut refused = 0;
        for (key, retention) in lifetimes.clone().cycle().enumerate() {
            let name = key.to_string();
            match store.reserve(&request(&name, 1).scope("all").retention(retention)) {
                Ok(outcome) => drop(reserved(outcome).complete([7; 3000]).unwrap()),
                Err(error) if refused < 3 => {
                    assert_eq!(error.kind(), ErrorKind::Full, "{error}");
                    refused += 1;
                    while store.maintain(1 << 20).unwrap().has_more {}
                }
                Err(_) => {
                    assert!(key > 50, "no room for answer {key} of round {round}");
                    break;
                }
            }
        }
        store.erase_scope("all").unwrap();
        while store.maintain(1 << 20).unwrap().has_more {}
    }
}

#[test]
fn a_journal_at_max_bytes_with_interrupted_keys_in_it_comes_back_after_expiry() {
    let (clock, builder) = manual();
    let store = builder.max_bytes(16 * SEGMENT).retention(Retention::For(HOUR)).in_memory().unwrap();
    for key in 0..40 {
        drop(reserved(store.reserve(&request(&format!("interrupted {key}"), 1)).unwrap()));
    }
    for generation in 0..3 {
        let mut key = 0;
        while let Ok(outcome) = store.reserve(&request(&format!("{generation}/{key}"), 1)) {
            if reserved(outcome).complete([7; 500]).is_err() {
                break;
            }
            key += 1;
        }
        assert!(key > 100, "generation {generation} had room for {key} keys only");
        clock.advance(HOUR);
        while store.maintain(1 << 20).unwrap().has_more {}
    }
    for key in 0..40 {
        assert_eq!(interrupted(store.reserve(&request(&format!("interrupted {key}"), 1)).unwrap()).attempt(), 2);
    }
}

#[test]
fn a_full_disk_loses_nothing_and_its_owners_complete_once_there_is_space() {
    let (_, builder) = manual();
    let disk = SimDisk::new();
    let store = builder.clone().open_simulated(&disk).unwrap();
    disk.set_capacity(Some(6 * SEGMENT));
    let mut owners = Vec::new();
    let mut completed = 0_u32;
    let stuck = 'full: loop {
        for key in 0.. {
            let key = format!("{completed}/{key}");
            match store.reserve(&request(&key, 1)) {
                Ok(outcome) => owners.push((key, reserved(outcome))),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
                    assert!(error.is_full());
                    break;
                }
            }
            if owners.len() >= 20 {
                break;
            }
        }
        while let Some((key, owner)) = owners.pop() {
            match owner.complete([completed as u8; 700]) {
                Ok(_) => completed += 1,
                Err(refused) => {
                    assert_eq!(refused.error.kind(), ErrorKind::StorageFull);
                    break 'full (key, refused.reservation);
                }
            }
        }
    };
    assert!(completed > 50 && !store.stats().is_poisoned);
    let (key, owner) = stuck;
    assert!(matches!(store.reserve(&request(&key, 1)).unwrap(), Outcome::InFlight(_)), "the owner keeps its key");
    let owner = owner.complete([1; 700]).unwrap_err().reservation;
    store.verify().unwrap();
    disk.set_capacity(None);
    owner.complete(b"after all").unwrap();
    for (_, owner) in owners {
        owner.release().unwrap();
    }
    drop(store);
    let store = builder.open_simulated(&disk).unwrap();
    assert_eq!(store.recovery().completed, u64::from(completed) + 1);
    assert_eq!(store.recovery().interrupted, 0);
    assert_eq!(replay(store.reserve(&request(&key, 1)).unwrap()).bytes(), b"after all");
}

#[test]
fn on_a_full_disk_no_operation_is_begun_whose_answer_would_find_no_room() {
    let (_, builder) = manual();
    let disk = SimDisk::new();
    let store = builder.clone().open_simulated(&disk).unwrap();
    let mut kept = reserved(store.reserve(&request("under way", 1)).unwrap());
    kept.set_retention(Retention::For(Duration::from_secs(1))).unwrap();
    reserved(store.reserve(&request("done", 1)).unwrap()).complete(b"").unwrap();
    store.maintain(1 << 20).unwrap();
    disk.set_capacity(Some(0));
    let mut completed = 0;
    let refusal = loop {
        match store.reserve(&request(&completed.to_string(), 1)) {
            Ok(outcome) => reserved(outcome).complete([7; 700]).unwrap(),
            Err(error) => break error,
        };
        completed += 1;
        if let Err(error) = store.maintain(1 << 20) {
            assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
        }
    };
    assert_eq!(refusal.kind(), ErrorKind::StorageFull, "{refusal}");
    assert!(completed > 50 && store.stats().is_full, "{completed}");
    kept.complete(b"goes where there is room").unwrap();
    assert_kind(store.reserve(&request("refused as well", 1)), ErrorKind::StorageFull);
    drop(store);
    let store = builder.open_simulated(&disk).unwrap();
    assert_kind(store.reserve(&request("refused after a restart", 1)), ErrorKind::StorageFull);
    assert!(store.stats().is_full);
    disk.set_capacity(None);
    reserved(store.reserve(&request("at once", 1)).unwrap()).complete(b"").unwrap();
    assert!(!store.stats().is_full);
}

#[test]
fn a_full_disk_gives_its_space_back_by_expiry_alone() {
    let (clock, builder) = manual();
    let disk = SimDisk::new();
    let store = builder.retention(Retention::For(HOUR)).open_simulated(&disk).unwrap();
    disk.set_capacity(Some(16 * SEGMENT));
    for key in 0..40 {
        drop(reserved(store.reserve(&request(&format!("interrupted {key}"), 1)).unwrap()));
    }
    for generation in 0..3 {
        let mut key = 0;
        while let Ok(outcome) = store.reserve(&request(&format!("{generation}/{key}"), 1)) {
            if reserved(outcome).complete([7; 700]).is_err() {
                break;
            }
            key += 1;
        }
        assert!(key > 100, "generation {generation} had room for {key} keys only");
        clock.advance(HOUR);
        for _ in 0..10 {
            // It may report the full disk as long as it gets on.
            if let Err(error) = store.maintain(1 << 20) {
                assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
            }
        }
    }
}

#[test]
fn a_file_system_that_fills_up_is_an_error_and_not_a_signal() {
    let dir = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "oncekey-test"])
        .arg(dir.path())
        .output()
        .is_ok_and(|output| output.status.success());
    if !mounted {
        println!("not run: mounting a tmpfs needs a privilege that this process doesn't have");
        return;
    }
    let _mounted = Mounted(dir.path());
    let (clock, builder) = manual();
    let path = dir.path().join("store");
    let store = builder.clone().retention(Retention::For(HOUR)).open(&path).unwrap();
    let mut completed = 0;
    let mut refused = 0;
    while refused < 3 {
        let key = completed.to_string();
        let owner = match store.reserve(&request(&key, 1)) {
            Ok(Outcome::Reserved(owner) | Outcome::Interrupted(owner)) => owner,
            Ok(other) => panic!("{other:?}"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
                refused += 1;
                continue;
            }
        };
        match owner.complete([9; 400]) {
            Ok(_) => completed += 1,
            Err(refusal) => {
                assert_eq!(refusal.error.kind(), ErrorKind::StorageFull, "{}", refusal.error);
                refused += 1;
            }
        }
    }
    assert!(completed > 200);
    let unborn = fs::read_dir(&path).unwrap().filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_string_lossy().ends_with(".new")
    });
    assert_eq!(unborn.count(), 0, "what could not be made was left behind");
    drop(store);
    // To the last block.
    fs::write(dir.path().join("other"), vec![1; 1 << 20]).unwrap_err();
    let store = builder.retention(Retention::For(HOUR)).open(&path).unwrap();
    assert_eq!(store.recovery().completed, completed);
    for key in 0..completed {
        assert_eq!(replay(store.reserve(&request(&key.to_string(), 1)).unwrap()).bytes(), [9; 400]);
    }
    assert_eq!(store.erase(&request("0", 1)).unwrap().keys, 1);
    clock.advance(HOUR);
    while store.maintain(1 << 20).unwrap().has_more {}
    reserved(store.reserve(&request("afterwards", 1)).unwrap()).complete([9; 400]).unwrap();
}

struct Mounted<'p>(&'p Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(self.0).status();
        assert!(unmounted.is_ok_and(|status| status.success()));
    }
}

#[test]
fn a_read_only_directory_is_an_error_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let run = |args: &[&str]| {
        let status = Command::new("mount").args(args).arg(dir.path()).output();
        status.is_ok_and(|output| output.status.success())
    };
    if !run(&["-t", "tmpfs", "-o", "size=4m", "oncekey-test"]) {
        println!("not run: mounting a tmpfs needs a privilege that this process doesn't have");
        return;
    }
    let _mounted = Mounted(dir.path());
    let (_, builder) = manual();
    let path = dir.path().join("store");
    closed_store(&builder, &path);
    let before = snapshot(&path);
    assert!(run(&["-o", "remount,ro"]));
    let error = builder.clone().open(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io, "{error}");
    assert!(error.path().is_some_and(|at| at.starts_with(&path)), "{error}");
    assert_kind(builder.clone().open(dir.path().join("new")), ErrorKind::Io);
    assert_eq!(snapshot(&path), before);
    assert!(run(&["-o", "remount,rw"]));
    assert_eq!(builder.open(&path).unwrap().recovery().completed, 7);
}

#[test]
fn a_file_size_limit_is_an_error_and_not_a_signal() {
    let dir = tempfile::tempdir().unwrap();
    let exe = std::env::current_exe().unwrap();
    // 64 blocks of 512 bytes (in bash, of 1024): less than a segment either way.
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -f 63; exec \"$@\"", "sh"]).arg(exe).env(CHILD_DIR, dir.path());
    limited.args(["--exact", "bad_input::child_under_a_file_size_limit", "--nocapture"]);
    assert_succeeds(&mut limited);
    assert!(dir.path().join("store").join("STORE").exists(), "the child did not run");
    assert!(segments(&dir.path().join("store")).is_empty());
}

/// Found by the rig for file systems: a process under a smaller limit than the store's maker died by SIGXFSZ.
#[test]
fn a_store_whose_segments_are_over_the_file_size_limit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let builder = manual().1;
    closed_store(&builder, &path);
    let before = snapshot(&path);
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -f 63; exec \"$@\"", "sh"]).arg(std::env::current_exe().unwrap());
    limited.env(CHILD_DIR, dir.path());
    limited.args(["--exact", "bad_input::child_that_opens_a_store_under_a_file_size_limit", "--nocapture"]);
    assert_succeeds(&mut limited);
    assert_eq!(snapshot(&path), before);
    assert_eq!(builder.open(&path).unwrap().recovery().completed, 7);
}

#[test]
fn child_that_opens_a_store_under_a_file_size_limit() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    let error = manual().1.open(Path::new(&dir).join("store")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
    assert!(error.to_string().contains("ulimit"), "{error}");
}

#[test]
fn child_under_a_file_size_limit() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    let store = manual().1.open(Path::new(&dir).join("store")).unwrap();
    for _ in 0..3 {
        let error = store.reserve(&request("a", 1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
        assert_kind(store.maintain(1), ErrorKind::StorageFull);
    }
    assert_eq!(store.stats().keys, 0);
    assert!(!store.stats().is_poisoned);
}

/// A defect once: those of the store's threads that could be started went on, and kept the store locked.
#[test]
fn a_store_whose_threads_cannot_be_started_leaves_none_behind() {
    let exe = std::env::current_exe().unwrap();
    let mut refused = 0;
    // In KiB, for threads with stacks of 600 MiB.
    for limit in (500_000..5_000_000).step_by(300_000) {
        let dir = tempfile::tempdir().unwrap();
        let mut limited = Command::new("sh");
        limited.args(["-c", &format!("ulimit -v {limit}; exec \"$@\""), "sh"]).arg(&exe);
        limited.args(["--exact", "bad_input::child_that_can_start_few_threads", "--nocapture", "--test-threads=1"]);
        let output =
            limited.env(CHILD_DIR, dir.path()).env("RUST_MIN_STACK", (600 << 20).to_string()).output().unwrap();
        // With too little the child may not even get that far.
        if output.status.success() && dir.path().join("refused").exists() {
            refused += 1;
        }
        assert!(!dir.path().join("left behind").exists(), "{output:?}");
    }
    assert!(refused >= 3, "{refused}");
}

#[test]
fn child_that_can_start_few_threads() {
    let Some(dir) = std::env::var_os(CHILD_DIR).map(PathBuf::from) else { return };
    let (_, builder) = manual();
    if let Err(error) = builder.clone().background(true).open(dir.join("store")) {
        assert_eq!(error.kind(), ErrorKind::Io, "{error}");
        fs::write(dir.join("refused"), error.to_string()).unwrap();
        if let Err(error) = builder.open(dir.join("store")) {
            fs::write(dir.join("left behind"), error.to_string()).unwrap();
        }
    }
}

#[test]
fn a_file_in_place_of_the_directory_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, b"mine").unwrap();
    assert_kind(manual().1.open(&path), ErrorKind::Io);
    assert_kind(manual().1.open(path.join("below")), ErrorKind::Io);
    assert_eq!(fs::read(&path).unwrap(), b"mine");
    symlink(dir.path().join("nowhere"), dir.path().join("dangling")).unwrap();
    assert_kind(manual().1.open(dir.path().join("dangling")), ErrorKind::Io);
    assert_kind(manual().1.open(""), ErrorKind::Io);
    assert_kind(manual().1.open("nul\0byte"), ErrorKind::Io);
}

#[test]
fn a_second_opener_gets_locked_by_whatever_path_it_comes() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    let path = dir.path().join("store");
    let store = builder.clone().open(&path).unwrap();
    symlink(&path, dir.path().join("link")).unwrap();
    let before = snapshot(&path);
    let paths = [path.clone(), dir.path().join("link"), dir.path().join("store/../store"), path.join(".")];
    for path in &paths {
        assert_kind(builder.clone().open(path), ErrorKind::Locked);
        assert_kind(builder.clone().recovery(RecoveryMode::Salvage).open(path), ErrorKind::Locked);
    }
    assert_succeeds(&mut child("bad_input::child_that_finds_the_store_locked", &path));
    assert_eq!(snapshot(&path), before);
    let owner = reserved(store.reserve(&request("a", 1)).unwrap());
    store.close().unwrap();
    assert_kind(builder.clone().open(&path), ErrorKind::Locked);
    drop(owner);
    for path in &paths {
        let store = builder.clone().open(path).unwrap();
        store.close().unwrap();
    }
}

#[test]
fn child_that_finds_the_store_locked() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    for _ in 0..2 {
        assert_kind(manual().1.open(&dir), ErrorKind::Locked);
    }
}

#[test]
fn a_store_that_could_not_be_opened_is_not_left_locked() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    closed_store(&builder, dir.path());
    let segment = segments(dir.path()).remove(0);
    let whole = fs::read(&segment).unwrap();
    fs::write(&segment, &whole[..100]).unwrap();
    assert_kind(builder.clone().open(dir.path()), ErrorKind::Corrupt);
    assert_kind(builder.clone().open(dir.path()), ErrorKind::Corrupt);
    fs::write(&segment, &whole).unwrap();
    builder.open(dir.path()).unwrap();
}

#[test]
#[expect(unsafe_code, reason = "to run code in a forked child")]
fn a_forked_child_is_refused_and_harms_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    let store = builder.clone().open(dir.path()).unwrap();
    reserved(store.reserve(&request("a", 1)).unwrap()).complete(b"x").unwrap();
    let mut owner = Some(reserved(store.reserve(&request("b", 1)).unwrap()));
    let pending = match store.reserve(&request("b", 1)).unwrap() {
        Outcome::InFlight(pending) => Some(pending),
        other => panic!("{other:?}"),
    };
    let mut pending = pending;
    let mut command = Command::new("true");
    let in_child = {
        let store = store.clone();
        let owner = std::sync::Arc::new(std::sync::Mutex::new(owner.take()));
        let kept = std::sync::Arc::clone(&owner);
        let (other, path) = (builder.clone(), dir.path().to_owned());
        let check = move || {
            let mut kinds = vec![
                store.reserve(&request("a", 1)).unwrap_err().kind(),
                store.reserve(&request("c", 1)).unwrap_err().kind(),
                store.get(&request("a", 1)).unwrap_err().kind(),
                store.sync().unwrap_err().kind(),
                store.maintain(1).unwrap_err().kind(),
                store.erase(&request("a", 1)).unwrap_err().kind(),
                store.verify().unwrap_err().kind(),
                store.clone().close().unwrap_err().kind(),
            ];
            let mut owner = owner.lock().unwrap().take().unwrap();
            kinds.push(owner.renew().unwrap_err().kind());
            let refused = owner.complete(b"child").unwrap_err();
            kinds.push(refused.error.kind());
            kinds.push(pending.take().unwrap().wait(SECOND).unwrap_err().kind());
            let all_forked = kinds.iter().all(|kind| *kind == ErrorKind::Forked);
            // It is the parent who has it open, not this process.
            let locked = other.clone().open(&path).unwrap_err().to_string();
            if all_forked && locked.contains("another process") { Ok(()) } else { Err(io::Error::from_raw_os_error(1)) }
        };
        // SAFETY: no other thread of this process holds a lock that the closure takes: it uses this test's own store,
        // which has no threads, and an allocator that is usable after `fork`.
        unsafe { command.pre_exec(check) };
        kept
    };
    let status = command.status().expect("every call of the child is refused");
    assert!(status.success());
    let owner = in_child.lock().unwrap().take().unwrap();
    owner.complete(b"parent").unwrap();
    assert_eq!(replay(store.reserve(&request("b", 1)).unwrap()).bytes(), b"parent");
    drop(command);
    drop(store);
    let store = builder.open(dir.path()).unwrap();
    assert_eq!(replay(store.reserve(&request("b", 1)).unwrap()).bytes(), b"parent");
    drop(reserved(store.reserve(&request("c", 1)).unwrap()));
}

#[test]
#[expect(unsafe_code, reason = "to run code in a forked child")]
fn a_forked_child_may_drop_a_store_with_threads() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::builder().segment_size(SEGMENT).open(dir.path()).unwrap();
    reserved(store.reserve(&request("a", 1)).unwrap()).complete(b"x").unwrap();
    let mut last = Some(store);
    let mut command = Command::new("true");
    let (said, heard) = std::sync::mpsc::channel();
    let spawner = std::thread::spawn(move || {
        let drop_it = move || {
            drop(last.take());
            Ok(())
        };
        // SAFETY: the allocator is usable after `fork`; the store's threads hold locks of their own for moments only.
        unsafe { command.pre_exec(drop_it) };
        said.send(command.status().map(|status| status.success())).ok();
    });
    let answer = heard.recv_timeout(Duration::from_secs(10)).expect("the child hangs when it drops the store");
    assert!(answer.unwrap());
    spawner.join().unwrap();
    assert_eq!(Store::open(dir.path()).unwrap().recovery().completed, 1);
}

#[test]
#[expect(unsafe_code, reason = "to hold a forked child before it runs its program")]
fn a_dropped_store_can_be_opened_while_another_thread_starts_a_process() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    let store = builder.clone().open(dir.path()).unwrap();
    let (mut is_forked, forked) = io::pipe().unwrap();
    let (may_go_on, go_on) = io::pipe().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut command = Command::new("true");
            let hold = move || {
                (&forked).write_all(b"!")?;
                (&may_go_on).read_exact(&mut [0])
            };
            // SAFETY: the closure only reads and writes pipes.
            unsafe { command.pre_exec(hold) };
            assert!(command.status().unwrap().success());
        });
        is_forked.read_exact(&mut [0]).unwrap();
        drop(store);
        let reopened = builder.open(dir.path());
        (&go_on).write_all(b"!").unwrap();
        reopened.unwrap();
    });
}

/// Bitwise CRC-32C, so that a header can be changed and still be whole.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

#[test]
fn a_newer_format_is_refused_untouched_in_every_mode() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    closed_store(&builder, dir.path());
    let mut files = segments(dir.path());
    files.push(dir.path().join("STORE"));
    for file in files {
        let whole = fs::read(&file).unwrap();
        // Major version; feature bits, of which the second is the store's own file's only.
        let is_segment = !file.ends_with("STORE");
        for (at, value) in [(8, 2), (8, 255), (12, if is_segment { 2 } else { 4 }), (15, 128)] {
            let mut newer = whole.clone();
            newer[at] = value;
            let crc = crc32c(&newer[..60]);
            newer[60..64].copy_from_slice(&crc.to_le_bytes());
            fs::write(&file, &newer).unwrap();
            let before = snapshot(dir.path());
            for mode in [RecoveryMode::Strict, RecoveryMode::Salvage] {
                let error = builder.clone().recovery(mode).open(dir.path()).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::UnsupportedVersion, "{error}");
                assert_eq!(error.path(), Some(&*file));
            }
            assert_eq!(snapshot(dir.path()), before);
        }
        // A newer minor version is read.
        let mut minor = whole.clone();
        minor[10] = 7;
        let crc = crc32c(&minor[..60]);
        minor[60..64].copy_from_slice(&crc.to_le_bytes());
        fs::write(&file, &minor).unwrap();
        assert_eq!(builder.clone().open(dir.path()).unwrap().recovery().completed, 7);
        fs::write(&file, &whole).unwrap();
    }
    builder.open(dir.path()).unwrap();
}

#[test]
fn foreign_files_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    closed_store(&builder, dir.path());
    let foreign = [
        "README",
        "notes.new",
        "1.seg",
        "000000000000000g.seg",
        "00000000000000001.seg",
        "STORE.bak",
        ".hidden",
        "0000000000000001.seg~",
        "0000000000000001.SEG",
        "LOCK.new",
    ];
    for name in foreign {
        fs::write(dir.path().join(name), name).unwrap();
    }
    fs::create_dir(dir.path().join("directory")).unwrap();
    symlink("/etc/passwd", dir.path().join("link")).unwrap();
    let store = builder.clone().open(dir.path()).unwrap();
    assert_eq!(store.recovery().completed, 7);
    clock.advance(Duration::from_secs(48 * 3600));
    store.maintain(usize::MAX).unwrap();
    store.close().unwrap();
    builder.open(dir.path()).unwrap();
    for name in foreign {
        assert_eq!(fs::read_to_string(dir.path().join(name)).unwrap(), name);
    }
    assert!(dir.path().join("directory").is_dir() && dir.path().join("link").is_symlink());
}

#[test]
fn what_a_crash_left_half_made_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    closed_store(&builder, dir.path());
    for name in ["STORE.new", "0000000000000009.seg.new"] {
        fs::write(dir.path().join(name), b"half").unwrap();
    }
    let store = builder.open(dir.path()).unwrap();
    assert_eq!(store.recovery().completed, 7);
    assert!(!dir.path().join("STORE.new").exists() && !dir.path().join("0000000000000009.seg.new").exists());
}

#[test]
fn something_else_in_place_of_a_file_is_refused_and_not_followed() {
    let (_, builder) = manual();
    for victim in ["segment", "STORE", "LOCK"] {
        for kind in ["symlink", "fifo", "directory"] {
            let dir = tempfile::tempdir().unwrap();
            closed_store(&builder, dir.path());
            let path = match victim {
                "segment" => segments(dir.path()).remove(0),
                name => dir.path().join(name),
            };
            let elsewhere = dir.path().join("elsewhere");
            fs::rename(&path, &elsewhere).unwrap();
            match kind {
                "symlink" => symlink(&elsewhere, &path).unwrap(),
                "fifo" => assert!(Command::new("mkfifo").arg(&path).status().unwrap().success()),
                _ => fs::create_dir(&path).unwrap(),
            }
            let before = snapshot(dir.path());
            for mode in [RecoveryMode::Strict, RecoveryMode::Salvage] {
                let error = builder.clone().recovery(mode).open(dir.path()).unwrap_err();
                assert!(matches!(error.kind(), ErrorKind::Io | ErrorKind::Corrupt), "{victim} {kind}: {error}");
                assert_eq!(error.path(), Some(&*path), "{victim} {kind}: {error}");
            }
            assert_eq!(snapshot(dir.path()), before, "{victim} {kind}");
        }
    }
}

#[test]
fn segments_without_their_store_file_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    closed_store(&builder, dir.path());
    fs::remove_file(dir.path().join("STORE")).unwrap();
    let before = snapshot(dir.path());
    let error = builder.clone().open(dir.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_eq!(error.path(), Some(&*dir.path().join("STORE")));
    assert_eq!(snapshot(dir.path()), before);
}

#[test]
fn a_segment_of_another_store_is_refused() {
    let (_, builder) = manual();
    let (mine, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    closed_store(&builder, mine.path());
    closed_store(&builder, other.path());
    let stranger = segments(other.path()).pop().unwrap();
    fs::copy(&stranger, mine.path().join(stranger.file_name().unwrap())).unwrap();
    let before = snapshot(mine.path());
    assert_kind(builder.open(mine.path()), ErrorKind::Corrupt);
    assert_eq!(snapshot(mine.path()), before);
}

#[test]
fn a_clock_set_back_over_a_restart_stops_until_it_has_caught_up() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    let builder = builder.retention(Retention::For(HOUR)).lease(SECOND);
    let store = builder.clone().open(dir.path()).unwrap();
    reserved(store.reserve(&request("early", 1)).unwrap()).complete(b"x").unwrap();
    clock.advance(Duration::from_secs(3599));
    reserved(store.reserve(&request("late", 1)).unwrap()).complete(b"y").unwrap();
    drop(store);
    clock.set(START_MS - 1_000_000);
    let store = builder.clone().open(dir.path()).unwrap();
    assert_eq!(store.recovery().clock_behind, Duration::from_secs(3599 + 1000));
    assert_eq!(store.recovery().clock_ahead, Duration::ZERO);
    replay(store.reserve(&request("early", 1)).unwrap());
    clock.advance(SECOND);
    assert!(store.get(&request("early", 1)).unwrap().is_none(), "time goes on from the newest record");
    replay(store.reserve(&request("late", 1)).unwrap());
    let record = reserved(store.reserve(&request("new", 1)).unwrap()).complete(b"z").unwrap();
    assert_eq!(record.completed_at(), std::time::UNIX_EPOCH + Duration::from_millis(START_MS + 3_600_000));
    clock.advance(HOUR);
    assert!(store.get(&request("late", 1)).unwrap().is_none());
    assert!(store.get(&request("new", 1)).unwrap().is_none());
}

#[test]
fn a_clock_set_forward_over_a_restart_is_reported_and_can_be_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    let builder = builder.retention(Retention::For(HOUR));
    closed_store(&builder, dir.path());
    let before = snapshot(dir.path());
    let limited = builder.clone().clock_jump_limit(Duration::from_secs(600));
    clock.advance(Duration::from_secs(601));
    assert_kind(limited.clone().open(dir.path()), ErrorKind::InvalidArgument);
    assert_eq!(snapshot(dir.path()), before, "nothing was expired");
    clock.set(START_MS + 600_000);
    let store = limited.open(dir.path()).unwrap();
    assert_eq!(store.recovery().clock_ahead, Duration::from_secs(600));
    assert_eq!((store.recovery().completed, store.recovery().expired), (7, 0));
    drop(store);
    clock.advance(HOUR);
    let store = builder.index(false).open(dir.path()).unwrap();
    assert_eq!((store.recovery().completed, store.recovery().expired), (0, 7));
    assert_eq!(store.recovery().interrupted, 7, "what may have happened is not forgotten by time");
    assert_eq!(store.recovery().clock_behind, Duration::ZERO);
}

#[test]
fn a_failing_disk_is_reported_at_open_and_opens_later() {
    let (_, builder) = manual();
    let disk = SimDisk::new();
    let store = builder.clone().open_simulated(&disk).unwrap();
    reserved(store.reserve(&request("a", 1)).unwrap()).complete(b"x").unwrap();
    drop(store);
    for op in [DiskOp::Read, DiskOp::Overwrite, DiskOp::Sync, DiskOp::SyncNames] {
        let disk = disk.after_process_death();
        disk.fail(op, 0, io::ErrorKind::Other);
        let error = builder.clone().open_simulated(&disk).map(|_| op).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io, "{op:?}: {error}");
        let store = builder.clone().open_simulated(&disk).unwrap();
        assert_eq!(replay(store.reserve(&request("a", 1)).unwrap()).bytes(), b"x", "after {op:?}");
    }
}

#[test]
fn a_failed_write_poisons_every_later_write_and_no_read() {
    let (_, builder) = manual();
    let disk = SimDisk::new();
    let store = builder.clone().open_simulated(&disk).unwrap();
    reserved(store.reserve(&request("a", 1)).unwrap()).complete(b"x").unwrap();
    let owner = reserved(store.reserve(&request("b", 1)).unwrap());
    let mut other = reserved(store.reserve(&request("c", 1)).unwrap());
    disk.fail(DiskOp::Append, 0, io::ErrorKind::Other);
    let refused = owner.complete(b"unknown").unwrap_err();
    assert_eq!(refused.error.kind(), ErrorKind::Poisoned);
    assert!(store.stats().is_poisoned);
    assert_kind(store.reserve(&request("d", 1)), ErrorKind::Poisoned);
    assert_kind(other.recovery_point(b"p"), ErrorKind::Poisoned);
    let other = other.complete(b"y").unwrap_err();
    assert_eq!(other.error.kind(), ErrorKind::Poisoned);
    let other = other.reservation.release().unwrap_err();
    assert_eq!(other.error.kind(), ErrorKind::Poisoned);
    assert_kind(store.sync(), ErrorKind::Poisoned);
    assert_kind(store.erase(&request("a", 1)), ErrorKind::Poisoned);
    assert_eq!(replay(store.reserve(&request("a", 1)).unwrap()).bytes(), b"x", "reads go on");
    assert_eq!(store.get(&request("a", 1)).unwrap().unwrap().bytes(), b"x");
    assert!(matches!(store.reserve(&request("a", 2)).unwrap(), Outcome::Mismatch(_)));
    assert!(store.get(&request("b", 1)).unwrap().is_none());
    drop((refused, other));
    assert_kind(store.close(), ErrorKind::Poisoned);
    let store = builder.open_simulated(&disk).unwrap();
    assert_eq!(replay(store.reserve(&request("a", 1)).unwrap()).bytes(), b"x");
    drop(interrupted(store.reserve(&request("b", 1)).unwrap()));
    drop(interrupted(store.reserve(&request("c", 1)).unwrap()));
    drop(reserved(store.reserve(&request("d", 1)).unwrap()));
}

#[test]
fn keys_that_share_one_hash_stay_apart() {
    // Every step looks at all keys before: 10^5 of them take minutes.
    let keys: u32 = if std::env::var_os("ONCEKEY_FULL").is_some() { 100_000 } else { 10_000 };
    let (clock, builder) = manual();
    let dir = tempfile::tempdir().unwrap();
    let builder = builder.segment_size(1 << 20).fixed_hash(0x1234_5678_9abc_def0);
    let started = Instant::now();
    let store = builder.clone().open(dir.path()).unwrap();
    for key in 0..keys {
        let bytes = key.to_le_bytes();
        let retention = if key % 2 == 0 { Retention::Forever } else { Retention::For(HOUR) };
        let owner = reserved(store.reserve(&Request::new(&bytes).retention(retention)).unwrap());
        match key % 10 {
            8 => drop(owner),
            9 => owner.release().unwrap(),
            _ => drop(owner.complete(bytes).unwrap()),
        }
    }
    let check = |store: &Store| {
        for key in (0..keys).step_by(7) {
            let bytes = key.to_le_bytes();
            let answer = store.get(&Request::new(&bytes)).unwrap();
            let expected = (key % 10 < 8).then_some(&bytes[..]);
            assert_eq!(answer.as_ref().map(|record| record.bytes()), expected, "{key}");
        }
    };
    check(&store);
    drop(store);
    let store = builder.open(dir.path()).unwrap();
    assert_eq!(store.recovery().completed, u64::from(keys / 10 * 8));
    assert_eq!(store.recovery().interrupted, u64::from(keys / 10));
    check(&store);
    clock.advance(HOUR);
    let mut expired = 0;
    loop {
        let done = store.maintain(1 << 20).unwrap();
        expired += done.expired;
        if !done.has_more {
            break;
        }
    }
    assert_eq!(expired, u64::from(keys / 10 * 4));
    for key in (0..keys).step_by(5) {
        let bytes = key.to_le_bytes();
        let is_kept = key % 2 == 0 && key % 10 < 8;
        assert_eq!(store.get(&Request::new(&bytes)).unwrap().is_some(), is_kept, "{key}");
    }
    println!("{keys} keys of one hash took {:?}", started.elapsed());
}

#[test]
fn files_are_private_whatever_the_umask() {
    let dir = tempfile::tempdir().unwrap();
    for umask in ["000", "777", "077"] {
        let parent = dir.path().join(umask);
        let exe = std::env::current_exe().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "umask $0; exec \"$@\"", umask]).arg(exe).env(CHILD_DIR, &parent);
        command.args(["--exact", "bad_input::child_with_another_umask", "--nocapture"]);
        assert_succeeds(&mut command);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&parent), 0o700, "a parent that was made, too");
        assert_eq!(mode(&parent.join("store")), 0o700);
        let mut files = 0;
        for entry in fs::read_dir(parent.join("store")).unwrap() {
            let path = entry.unwrap().path();
            assert_eq!(mode(&path), 0o600, "{}", path.display());
            files += 1;
        }
        assert!(files >= 4, "lock, store file and segments");
    }
}

#[test]
fn child_with_another_umask() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    closed_store(&manual().1, &Path::new(&dir).join("store"));
}
