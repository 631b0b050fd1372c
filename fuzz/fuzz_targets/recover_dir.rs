//! A store's files after hostile changes, most of them with the right checksums: refused and left alone, or opened.
//!
//! What opened goes on as a store: it is whole, its answers stay the same whatever else is done and after it was closed, killed or
//! cut off and opened again, and what is done now is there then.
#![no_main]

#[path = "../hostile/mod.rs"]
mod hostile;

use hostile::{Change, Files, change, known_key};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use oncekey::testing::{DiskOp, SimDisk};
use oncekey::{Durability, ErrorKind, Fingerprint, ManualClock, Outcome, RecoveryMode, Request, Retention, Store};
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const SEGMENT: u64 = 64 * 1024;
const NOW_MS: u64 = 1_767_225_600_000;
const KEYS: u8 = 20;
/// Longer segments than this, which a forged header can ask for, are a matter of patience.
const LONGEST: u64 = 256 * 1024;

#[derive(Arbitrary, Debug)]
struct Input {
    changes: Vec<Change>,
    foreign: Vec<(u8, Vec<u8>)>,
    steps: Vec<Step>,
    end: End,
    salvages: bool,
    takes_any_length: bool,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Step {
    Complete(u8),
    Release(u8),
    Leave(u8),
    Erase(u8),
    EraseAll,
    Maintain,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum End {
    Close,
    Death,
    Cut,
}

/// What a key is, as far as a look tells that changes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Is {
    Answered { bytes: Vec<u8>, is_failure: bool, attempt: u32, at: SystemTime, until: Option<SystemTime> },
    Interrupted(Fingerprint),
    Vacant,
}

fn open(disk: &SimDisk, mode: RecoveryMode, takes_any_length: bool) -> oncekey::Result<Store> {
    let builder = Store::builder()
        .clock(Arc::new(ManualClock::new(NOW_MS)))
        .background(false)
        .durability(Durability::Synced)
        .retention(Retention::Forever)
        .seed(1)
        // All of it is read; `by_index` does otherwise.
        .index(false)
        .recovery(mode);
    if takes_any_length { builder } else { builder.segment_size(SEGMENT) }.open_simulated(disk)
}

fn request(key: &[u8]) -> Request<'_> {
    Request::new(key).scope("fuzz")
}

/// A store with some of everything, one segment sealed and one not.
fn files() -> &'static Files {
    static FILES: OnceLock<Files> = OnceLock::new();
    FILES.get_or_init(|| {
        let disk = SimDisk::new();
        let store = open(&disk, RecoveryMode::Strict, false).unwrap();
        for key in 0..KEYS {
            let name = known_key(key);
            let kept = [Retention::Forever, Retention::For(Duration::from_secs(3600))][usize::from(key % 2)];
            let Ok(Outcome::Reserved(mut owner)) = store.reserve(&request(&name).retention(kept)) else { panic!() };
            match key % 5 {
                0 => owner.release().unwrap(),
                1 => {
                    owner.recovery_point([key; 30]).unwrap();
                    owner.fail([key; 50]).unwrap();
                }
                2 => drop(owner),
                _ => {
                    owner.complete(vec![key; usize::from(key) * 40]).unwrap();
                }
            }
            if key == 10 {
                store.erase(&request(&known_key(3))).unwrap();
            }
        }
        store.close().unwrap();
        let store = open(&disk, RecoveryMode::Strict, false).unwrap();
        let Ok(Outcome::Reserved(owner)) = store.reserve(&Request::new("last")) else { panic!() };
        owner.complete(b"unsealed").unwrap();
        contents(&disk)
    })
}

fn contents(disk: &SimDisk) -> Files {
    disk.files().into_iter().map(|(name, _)| (name.clone(), disk.contents(&name).unwrap())).collect()
}

/// The files that an input makes.
fn changed(input: &Input) -> Files {
    let mut files = files().clone();
    input.changes.iter().take(12).for_each(|one| change(&mut files, one));
    let names = [
        "STORE",
        "LOCK",
        "SEGMENTS",
        "0000000000000001.seg",
        "00000000000000ff.seg",
        "x.seg",
        "0000000000000002.seg.new",
        "ffffffffffffffff.seg",
    ];
    for (name, contents) in input.foreign.iter().take(4) {
        let name = names[usize::from(*name) % names.len()].to_owned();
        files.retain(|(other, _)| *other != name);
        files.push((name, contents.clone()));
    }
    files.sort();
    files
}

fuzz_target!(|input: Input| {
    let files = changed(&input);
    let says_len = files.iter().find(|(name, bytes)| name == "STORE" && bytes.len() >= 64);
    let says_len = says_len.map_or(0, |(_, bytes)| u64::from_le_bytes(bytes[40..48].try_into().unwrap()));
    let takes_any_length = input.takes_any_length && says_len <= LONGEST;
    let mode = if input.salvages { RecoveryMode::Salvage } else { RecoveryMode::Strict };
    let lay = || {
        let disk = SimDisk::new();
        files.iter().for_each(|(name, contents)| disk.put(name, contents.clone()));
        disk
    };
    by_index(&lay());
    let disk = lay();
    match open(&disk, mode, takes_any_length) {
        Ok(store) => go_on(store, disk, &input, takes_any_length),
        Err(error) => {
            let is_typed = matches!(
                error.kind(),
                ErrorKind::Corrupt | ErrorKind::UnsupportedVersion | ErrorKind::InvalidArgument | ErrorKind::Full
            );
            assert!(is_typed && error.path().is_some(), "{error:?}");
            // Salvage refuses what it must not write over; what it can't mend it may have begun to.
            if mode == RecoveryMode::Strict || error.kind() == ErrorKind::UnsupportedVersion {
                assert!(contents(&disk) == files, "a refused store was changed: {error:?}");
                assert_eq!(disk.calls(DiskOp::Sync) + disk.calls(DiskOp::Overwrite), 0);
            }
        }
    }
});

/// Opens it by its index, if it has one: what that stands for may be damaged, and is told of.
fn by_index(disk: &SimDisk) {
    let builder = Store::builder().clock(Arc::new(ManualClock::new(NOW_MS))).background(false).seed(1);
    let Ok(store) = builder.segment_size(SEGMENT).open_simulated(disk) else { return };
    let is_damage = |error: &oncekey::Error| error.kind() == ErrorKind::Corrupt && error.path().is_some();
    let verified = store.verify();
    assert!(verified.as_ref().err().is_none_or(is_damage), "{verified:?}");
    assert!(verified.is_ok() || store.recovery().indexed > 0, "{verified:?}");
    for key in 0..KEYS {
        let name = known_key(key);
        let answer = store.get(&request(&name));
        assert!(answer.as_ref().err().is_none_or(is_damage), "{answer:?}");
    }
    store.maintain(usize::MAX).ok();
}

fn go_on(store: Store, disk: SimDisk, input: &Input, takes_any_length: bool) {
    store.verify().expect("what was opened is whole");
    let newest = UNIX_EPOCH.checked_add(Duration::from_millis(NOW_MS) + store.recovery().clock_behind);
    let mut known: BTreeMap<u8, Is> = (0..KEYS).map(|key| (key, look(&store, key))).collect();
    for step in input.steps.iter().take(8) {
        take(&store, *step, &mut known);
    }
    store.verify().expect("what was written is whole");
    let seen = |store: &Store, when: &str| {
        for (key, was) in &known {
            let is = look(store, *key);
            // What expired before the newest record may be back once that record is gone.
            let is_back = matches!((&is, was), (Is::Answered { until: Some(until), .. }, Is::Vacant)
                if newest.is_none_or(|newest| *until <= newest));
            assert!(is == *was || is_back, "key {key} was {was:?} and is {is:?}, {when}");
        }
    };
    seen(&store, "before the store was ended");
    let disk = match input.end {
        End::Close => {
            store.close().expect("closing");
            disk
        }
        End::Death => disk.after_process_death(),
        End::Cut => disk.after_power_cut(|| false),
    };
    for round in ["opened again", "and once more"] {
        let again = open(&disk, RecoveryMode::Strict, takes_any_length).expect("what was opened opens again");
        assert!(again.recovery().lost.is_empty(), "{:?}", again.recovery());
        again.verify().expect("what was opened again is whole");
        seen(&again, round);
        again.maintain(usize::MAX).expect("upkeep");
        again.close().expect("closing again");
    }
}

/// Says what a key is. One that is vacant is reserved for a moment, and released.
fn look(store: &Store, key: u8) -> Is {
    let name = known_key(key);
    if let Some(record) = store.get(&request(&name)).expect("a look") {
        return Is::Answered {
            bytes: record.bytes().to_vec(),
            is_failure: record.is_failure(),
            attempt: record.attempt(),
            at: record.completed_at(),
            until: record.expires_at(),
        };
    }
    let unlike = request(&name).fingerprint_of(b"a payload that nobody used").durability(Durability::Buffered);
    match store.reserve(&unlike).expect("a look") {
        Outcome::Mismatch(mismatch) => Is::Interrupted(mismatch.stored),
        Outcome::Reserved(owner) => {
            owner.release().expect("a release");
            Is::Vacant
        }
        other => panic!("{other:?}"),
    }
}

/// Does one thing to the store, and notes what it has to be now.
fn take(store: &Store, step: Step, known: &mut BTreeMap<u8, Is>) {
    let (Step::Complete(key) | Step::Release(key) | Step::Leave(key) | Step::Erase(key)) = step else {
        match step {
            Step::EraseAll => {
                store.erase_scope("fuzz").expect("an erasure");
                known.values_mut().for_each(|is| *is = Is::Vacant);
            }
            _ => {
                store.maintain(usize::MAX).expect("upkeep");
            }
        }
        return;
    };
    let key = key % KEYS;
    let name = known_key(key);
    if let Step::Erase(_) = step {
        store.erase(&request(&name)).expect("an erasure");
        known.insert(key, Is::Vacant);
        return;
    }
    let asked = match known[&key] {
        Is::Interrupted(fingerprint) => fingerprint,
        Is::Answered { .. } => return,
        Is::Vacant => Fingerprint::of(b"now"),
    };
    let owner = match store.reserve(&request(&name).fingerprint(asked)).expect("a reservation") {
        Outcome::Reserved(owner) | Outcome::Interrupted(owner) => owner,
        other => panic!("key {key} was {:?}, and the store says {other:?}", known[&key]),
    };
    let is = match step {
        Step::Complete(_) => {
            drop(owner.complete(b"now").expect("an answer"));
            look(store, key)
        }
        Step::Release(_) => {
            owner.release().expect("a release");
            Is::Vacant
        }
        _ => {
            drop(owner);
            Is::Interrupted(asked)
        }
    };
    known.insert(key, is);
}
