//! Disk space comes back, and nothing else goes with it.

use crate::support::{interrupted, manual, replay, request, reserved};
use oncekey::testing::SimDisk;
use oncekey::{Durability, MAX_LEASE, Outcome, Retention, Store};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

const SEGMENT: u64 = 64 * 1024;
/// What may be there beside twice what lives: four segments, and the list of segments.
const BESIDE: u64 = 4 * SEGMENT + 8192;
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Bytes that the directory's files take up on the device.
fn disk(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512).sum()
}

fn segments(dir: &Path) -> usize {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().ends_with(".seg")).count()
}

/// What a key with its answer can't do without: 64 bytes of header, the lengths of the key's parts, and the two.
fn live_bytes(key: &str, answer: usize) -> u64 {
    (64 + 4 + key.len() + answer).next_multiple_of(8) as u64
}

fn maintain(store: &Store) {
    while store.maintain(1_000).unwrap().has_more {}
}

fn complete(store: &Store, key: &str, retention: Retention, len: usize) {
    let owner = reserved(store.reserve(&request(key, 1).retention(retention)).unwrap());
    owner.complete(vec![7; len]).unwrap();
}

#[test]
fn with_a_hundredth_kept_for_ever_the_disk_holds_twice_what_lives_and_four_segments() {
    const ANSWER: usize = 300;
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    let store = builder.clone().open(dir.path()).unwrap();
    let (mut forever, mut highest, mut relocated) = (0, 0, 0);
    for generation in 0..50 {
        let mut brief = 0;
        for key in 0..1_000 {
            let name = format!("{generation}/{key}");
            if key % 100 == 50 {
                complete(&store, &name, Retention::Forever, ANSWER);
                forever += live_bytes(&name, ANSWER);
            } else {
                complete(&store, &name, Retention::For(MINUTE), ANSWER);
                brief += live_bytes(&name, ANSWER);
            }
            if key % 50 == 0 {
                relocated += store.maintain(1_000).unwrap().relocated;
            }
        }
        maintain(&store);
        let used = disk(dir.path());
        assert!(used <= 2 * (forever + brief) + BESIDE, "{used} bytes for {} in {generation}", forever + brief);
        clock.advance(MINUTE);
        maintain(&store);
        let used = disk(dir.path());
        assert!(used <= 2 * forever + BESIDE, "{used} bytes for {forever} after generation {generation}");
        highest = highest.max(used);
    }
    println!("at most {highest} bytes between generations, {forever} live at the end, {relocated} records moved");
    assert_eq!(store.stats().keys, 500);
    drop(store);
    let store = builder.open(dir.path()).unwrap();
    assert_eq!((store.recovery().completed, store.recovery().interrupted), (500, 0));
    for generation in 0..50 {
        let record = replay(store.reserve(&request(&format!("{generation}/50"), 1)).unwrap());
        assert_eq!(record.bytes(), [7; ANSWER]);
        assert!(store.get(&request(&format!("{generation}/51"), 1)).unwrap().is_none());
    }
}

#[test]
fn uniform_times_to_live_are_written_once() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    let store = builder.open(dir.path()).unwrap();
    let mut relocated = 0;
    for generation in 0..20 {
        for key in 0..500 {
            complete(&store, &format!("{generation}/{key}"), Retention::For(MINUTE), 300);
            clock.advance(Duration::from_millis(120));
            if key % 20 == 0 {
                relocated += store.maintain(1_000).unwrap().relocated;
            }
        }
    }
    assert!(relocated <= 200, "{relocated} of 10,000 answers were moved");
    assert!(disk(dir.path()) <= 2 * 500 * live_bytes("10/100", 300) + 4 * SEGMENT);
}

#[test]
fn mixed_times_to_live_give_their_space_back() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    let store = builder.open(dir.path()).unwrap();
    // By end, with the bytes that live until then.
    let mut live: BTreeMap<u64, u64> = BTreeMap::new();
    let mut random = 88_172_645_463_325_252_u64;
    let mut now = 0;
    for turn in 0..20_000_u64 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let ms = 1_000 << (random % 20);
        let name = turn.to_string();
        complete(&store, &name, Retention::For(Duration::from_millis(ms)), 200);
        *live.entry(now + ms).or_default() += live_bytes(&name, 200);
        now += 500;
        clock.advance(Duration::from_millis(500));
        if turn % 100 == 0 {
            maintain(&store);
            live = live.split_off(&(now + 1));
            let (bytes, used): (u64, u64) = (live.values().sum(), disk(dir.path()));
            // One open segment for each of eight streams, beside what is promised for one.
            assert!(used <= 2 * bytes + 12 * SEGMENT, "{used} bytes for {bytes} after {turn}");
        }
    }
    clock.advance(30 * DAY);
    maintain(&store);
    assert_eq!(store.stats().keys, 0);
    assert!(disk(dir.path()) <= 12 * SEGMENT, "{} bytes for nothing", disk(dir.path()));
}

#[test]
fn small_survivors_do_not_keep_the_space_of_large_neighbours() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    let store = builder.open(dir.path()).unwrap();
    let mut live = 0;
    for key in 0..200 {
        // The two live long enough to share a stream.
        complete(&store, &format!("large {key}"), Retention::For(30 * DAY), 8_000);
        for small in 0..2 {
            let name = format!("small {key}/{small}");
            complete(&store, &name, Retention::Forever, 10);
            live += live_bytes(&name, 10);
        }
        store.maintain(100).unwrap();
    }
    assert!(disk(dir.path()) > 1_600_000);
    clock.advance(30 * DAY);
    maintain(&store);
    let used = disk(dir.path());
    // Two segments in use, two ahead, and one that sealed ones may take beyond twice what lives in them.
    assert!(used <= 2 * live + BESIDE + SEGMENT, "{used} bytes for {live}");
    assert_eq!(store.stats().keys, 400);
    store.verify().unwrap();
}

#[test]
fn erased_answers_give_their_space_back() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    let store = builder.open(dir.path()).unwrap();
    for key in 0..200 {
        let (name, scope) = (key.to_string(), if key % 10 == 0 { "kept" } else { "gone" });
        let forever = request(&name, 1).scope(scope).retention(Retention::Forever);
        reserved(store.reserve(&forever).unwrap()).complete([7; 5_000]).unwrap();
    }
    maintain(&store);
    assert!(disk(dir.path()) > 1_000_000);
    assert_eq!(store.erase_scope("gone").unwrap().keys, 180);
    maintain(&store);
    let live = 20 * live_bytes("100kept", 5_000);
    let used = disk(dir.path());
    assert!(used <= 2 * live + BESIDE, "{used} bytes for {live}");
}

#[test]
fn long_leases_and_interrupted_keys_pin_no_space() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    let store = builder.clone().lease(MAX_LEASE).open(dir.path()).unwrap();
    let mut held = Vec::new();
    let mut highest = 0;
    for generation in 0..30 {
        for key in 0..400 {
            let name = format!("{generation}/{key}");
            match key {
                7 => held.push((name.clone(), reserved(store.reserve(&request(&name, 1)).unwrap()))),
                77 => drop(reserved(store.reserve(&request(&name, 1)).unwrap())),
                _ => complete(&store, &name, Retention::For(SECOND), 300),
            }
        }
        clock.advance(2 * SECOND);
        maintain(&store);
        highest = highest.max(disk(dir.path()));
    }
    assert!(highest <= 6 * SEGMENT, "{highest} bytes while 60 keys live");
    assert_eq!(store.stats().keys, 60);
    // Owners whose records were moved still own their keys.
    for (name, mut owner) in held.drain(..15) {
        assert!(matches!(store.reserve(&request(&name, 1)).unwrap(), Outcome::InFlight(_)));
        owner.renew().unwrap();
        owner.recovery_point(b"point").unwrap();
        owner.complete(name.as_bytes()).unwrap();
        assert_eq!(replay(store.reserve(&request(&name, 1)).unwrap()).bytes(), name.as_bytes());
    }
    let fences: Vec<(String, u64)> = held.iter().map(|(name, owner)| (name.clone(), owner.fence())).collect();
    store.verify().unwrap();
    drop((held, store));
    let store = builder.open(dir.path()).unwrap();
    assert_eq!((store.recovery().completed, store.recovery().interrupted), (15, 45));
    for (name, fence) in fences {
        let owner = interrupted(store.reserve(&request(&name, 1)).unwrap());
        assert!(owner.fence() > fence);
        assert_eq!(owner.attempt(), 2);
    }
}

#[test]
fn opening_again_and_again_changes_nothing_and_takes_no_space() {
    for close in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (_, builder) = manual();
        let store = builder.clone().open(dir.path()).unwrap();
        for key in 0..500 {
            complete(&store, &key.to_string(), Retention::Forever, 300);
        }
        drop(store);
        let reopen = || {
            let store = builder.clone().open(dir.path()).unwrap();
            assert_eq!(store.recovery().completed, 500);
            if close {
                store.close().unwrap();
            }
        };
        reopen();
        let files = || {
            let paths = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
            paths.map(|path| (path.clone(), fs::read(&path).unwrap())).collect::<BTreeMap<_, _>>()
        };
        let (before, used) = (files(), disk(dir.path()));
        for _ in 0..30 {
            reopen();
        }
        assert!(files() == before, "opening a whole store wrote something");
        assert_eq!(disk(dir.path()), used);
    }
}

#[test]
fn restarts_with_little_work_in_between_do_not_pile_segments_up() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    let mut highest = 0;
    for restart in 0..120 {
        let store = builder.clone().open(dir.path()).unwrap();
        complete(&store, &format!("forever {restart}"), Retention::Forever, 100);
        complete(&store, &format!("brief {restart}"), Retention::For(SECOND), 100);
        clock.advance(MINUTE);
        maintain(&store);
        highest = highest.max(segments(dir.path()));
    }
    assert!(highest <= 30, "{highest} segments");
    let store = builder.open(dir.path()).unwrap();
    assert_eq!(store.recovery().completed, 120);
}

#[test]
fn fences_grow_after_every_segment_with_a_record_was_removed() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    let mut newest = 0;
    for round in 0..8 {
        let store = builder.clone().open(dir.path()).unwrap();
        for key in 0..1_000 {
            let name = format!("{round}/{key}");
            let owner = reserved(store.reserve(&request(&name, 1).retention(Retention::For(SECOND))).unwrap());
            assert!(owner.fence() > newest, "{} after {newest} in round {round}", owner.fence());
            newest = owner.fence();
            owner.complete([7; 100]).unwrap();
        }
        clock.advance(MINUTE);
        maintain(&store);
        assert_eq!(store.stats().keys, 0);
        if round % 2 == 0 {
            store.close().unwrap();
        } else {
            drop(store);
        }
        // With nothing left to keep, upkeep after a restart may remove all it likes.
        for _ in 0..round % 3 {
            let store = builder.clone().open(dir.path()).unwrap();
            maintain(&store);
        }
    }
    assert!(segments(dir.path()) <= 6, "{} segments for nothing", segments(dir.path()));
}

#[test]
fn a_record_is_readable_after_its_segment_was_removed() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    for store in [builder.clone().open(dir.path()).unwrap(), builder.in_memory().unwrap()] {
        let mut records = Vec::new();
        for key in 0..600_u32 {
            let name = key.to_string();
            let brief = request(&name, 1).retention(Retention::For(SECOND));
            let record = reserved(store.reserve(&brief).unwrap()).complete(key.to_le_bytes().repeat(100)).unwrap();
            if key % 50 == 0 {
                records.push((key, record));
            }
        }
        clock.advance(SECOND);
        let mut removed = 0;
        loop {
            let done = store.maintain(1_000).unwrap();
            removed += done.removed;
            if !done.has_more {
                break;
            }
        }
        assert!(removed >= 3, "{removed} segments were removed");
        for (key, record) in &records {
            assert_eq!(record.bytes(), key.to_le_bytes().repeat(100));
        }
        // New records don't get the place of those that are held.
        for key in 0..600 {
            complete(&store, &format!("again {key}"), Retention::For(SECOND), 400);
        }
        store.close().unwrap();
        for (key, record) in &records {
            assert_eq!(record.bytes(), key.to_le_bytes().repeat(100));
        }
    }
}

#[test]
fn a_budget_bounds_how_much_is_moved_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    let store = builder.open(dir.path()).unwrap();
    for key in 0..2_000 {
        let retention = if key % 8 == 0 { Retention::Forever } else { Retention::For(30 * DAY) };
        complete(&store, &key.to_string(), retention, 300);
    }
    clock.advance(30 * DAY);
    let (mut moved, mut calls) = (0, 0);
    loop {
        let done = store.maintain(10).unwrap();
        assert!(done.relocated <= 10, "{done:?}");
        moved += done.relocated;
        calls += 1;
        if !done.has_more {
            break;
        }
        assert!(calls < 100_000);
    }
    assert!(moved > 100, "{moved}");
    assert!(disk(dir.path()) <= 2 * 250 * live_bytes("1000", 300) + 4 * SEGMENT);
    for key in (0..2_000).step_by(8) {
        replay(store.reserve(&request(&key.to_string(), 1)).unwrap());
    }
    store.verify().unwrap();
}

#[test]
fn restarts_do_not_use_max_bytes_up() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    let builder = builder.max_bytes(16 * SEGMENT);
    for restart in 0..100 {
        let store = builder.clone().open(dir.path()).unwrap();
        // A little that stays, a little that goes, and an owner that vanishes and is seen to.
        complete(&store, &format!("forever {restart}"), Retention::Forever, 100);
        complete(&store, &format!("brief {restart}"), Retention::For(SECOND), 100);
        drop(reserved(store.reserve(&request("unfinished", 1)).unwrap()));
        interrupted(store.reserve(&request("unfinished", 1)).unwrap()).release().unwrap();
        clock.advance(MINUTE);
        maintain(&store);
        assert!(disk(dir.path()) <= 8 * SEGMENT + 4096, "{} bytes after restart {restart}", disk(dir.path()));
        if restart % 2 == 0 {
            store.close().unwrap();
        }
    }
    assert_eq!(builder.open(dir.path()).unwrap().recovery().completed, 100);
}

/// A defect once: a segment that was sealed when `sync` was called counted as promised to nobody.
#[test]
fn what_sync_promised_of_a_sealed_segment_is_not_removed_before_what_took_its_place_is_durable() {
    let disk = SimDisk::new();
    let (_, builder) = manual();
    let store = builder.clone().open_simulated(&disk).unwrap();
    let owner = reserved(store.reserve(&request("promised", 1)).unwrap());
    let mut done = store.maintain(0).unwrap();
    for key in 0.. {
        reserved(store.reserve(&request(&key.to_string(), 1)).unwrap()).release().unwrap();
        done = store.maintain(0).unwrap();
        if done.sealed > 0 {
            break;
        }
    }
    assert_eq!((done.sealed, done.removed), (1, 0));
    store.sync().unwrap();
    owner.complete("answer").unwrap();
    assert_eq!(store.maintain(1_000).unwrap().removed, 1);
    let store = builder.open_simulated(&disk.after_power_cut(|| false)).unwrap();
    let outcome = store.reserve(&request("promised", 1)).unwrap();
    assert!(!matches!(outcome, Outcome::Reserved(_)), "{outcome:?}");
}

/// A defect once: a segment that died while it was being emptied went before the copies made so far were durable.
#[test]
fn a_segment_that_dies_while_it_is_emptied_does_not_go_before_the_copies_are_durable() {
    let disk = SimDisk::new();
    let (clock, builder) = manual();
    let builder = builder.durability(Durability::Synced);
    let store = builder.clone().open_simulated(&disk).unwrap();
    // All of one stream. In each segment the few that stay come first, so that they are moved first.
    let mut stay = Vec::new();
    for key in 0..400 {
        let name = format!("{key:03}");
        let seconds = match key % 57 {
            0..5 => 60,
            5..20 => 20,
            _ => 10,
        };
        complete(&store, &name, Retention::For(seconds * SECOND), 1_000);
        if seconds == 60 {
            stay.push(name);
        }
    }
    clock.advance(11 * SECOND);
    let mut moved = 0;
    while moved < 5 {
        let done = store.maintain(1).unwrap();
        moved += done.relocated;
        assert!(done.has_more, "{moved} were moved");
    }
    clock.advance(10 * SECOND);
    let mut removed = 0;
    loop {
        let done = store.maintain(1).unwrap();
        removed += done.removed;
        if done.removed > 0 {
            let after = builder.clone().open_simulated(&disk.after_power_cut(|| false)).unwrap();
            for name in &stay {
                replay(after.reserve(&request(name, 1)).unwrap());
            }
        }
        if !done.has_more {
            break;
        }
    }
    assert!(removed > 5, "{removed} segments were removed");
}

/// Found by the simulation: a copy of what was durable went, once its key was taken over, before that was durable.
#[test]
fn a_key_whose_copy_is_taken_over_survives_the_removal_of_the_copy() {
    let disk = SimDisk::new();
    let builder = manual().1.durability(Durability::Buffered);
    let store = builder.clone().open_simulated(&disk).unwrap();
    let kept = request("kept", 1);
    drop(reserved(store.reserve(&kept.durability(Durability::Synced)).unwrap()));
    let mut removed = 0;
    for round in 0..60 {
        let mut filler = reserved(store.reserve(&request("filler", 1)).unwrap());
        filler.recovery_point([7; 20_000]).unwrap();
        filler.release().unwrap();
        removed += store.maintain(usize::MAX).unwrap().removed;
        let after = builder.clone().open_simulated(&disk.after_power_cut(|| false)).unwrap();
        drop(interrupted(after.reserve(&kept).unwrap()));
        if round % 4 == 0 {
            drop(interrupted(store.reserve(&kept).unwrap()));
        }
    }
    assert!(removed > 5, "{removed} segments were removed");
}

/// Where a kill leaves both a record and its copy, neither may outlive what beats the two.
#[test]
fn a_process_killed_at_any_step_of_upkeep_loses_no_key_and_brings_none_back() {
    let disk = SimDisk::new();
    let (clock, builder) = manual();
    let builder = builder.durability(Durability::Synced);
    let open = |disk: &SimDisk| builder.clone().open_simulated(disk).unwrap();
    let store = open(&disk);
    let (mut owners, mut answered, mut released) = (Vec::new(), Vec::new(), Vec::new());
    for key in 0..600 {
        let name = format!("{key:0300}");
        match key % 60 {
            7 | 30 => owners.push((reserved(store.reserve(&request(&name, 1)).unwrap()), name)),
            11 => {
                complete(&store, &name, Retention::Forever, 300);
                answered.push(name);
            }
            at if at % 5 == 0 => {
                reserved(store.reserve(&request(&name, 1)).unwrap()).release().unwrap();
                released.push(name);
            }
            _ => complete(&store, &name, Retention::For(SECOND), 300),
        }
    }
    clock.advance(2 * SECOND);
    let (mut relocated, mut removed) = (0, 0);
    let mut has_more = true;
    while has_more {
        let done = store.maintain(1).unwrap();
        (relocated, removed) = (relocated + done.relocated, removed + done.removed);
        has_more = done.has_more;
        if done.relocated + done.removed == 0 {
            continue;
        }
        let mut at = 0;
        let every_other = disk.after_power_cut(|| {
            at += 1;
            at % 2 == 0
        });
        for image in [disk.after_process_death(), disk.after_power_cut(|| false), every_other] {
            let after = open(&image);
            assert_eq!(after.recovery().interrupted, owners.len() as u64);
            answered.iter().for_each(|name| drop(replay(after.reserve(&request(name, 1)).unwrap())));
            for (_, name) in &owners {
                interrupted(after.reserve(&request(name, 1)).unwrap()).release().unwrap();
            }
            // What may go is decided anew by what is left to do, and by a second death half-way.
            let half = after.maintain(20).unwrap();
            let second = open(&image.after_process_death());
            if half.has_more {
                maintain(&second);
            }
            let last = open(&image.after_process_death());
            for store in [&second, &last] {
                for name in owners.iter().map(|(_, name)| name).chain(&released) {
                    assert!(store.get(&request(name, 1)).unwrap().is_none());
                    reserved(store.reserve(&request(name, 1)).unwrap()).release().unwrap();
                }
                answered.iter().for_each(|name| drop(replay(store.reserve(&request(name, 1)).unwrap())));
            }
        }
    }
    assert!(relocated >= 20 && removed >= 5, "{relocated} records were moved, {removed} segments removed");
    for (owner, name) in owners {
        owner.complete(name.as_bytes()).unwrap();
        assert_eq!(replay(store.reserve(&request(&name, 1)).unwrap()).bytes(), name.as_bytes());
    }
}

/// A defect once: the living were moved again and again, as if that brought segments away that have to stay.
#[test]
fn upkeep_comes_to_rest_while_records_of_erased_keys_are_held() {
    let disk = SimDisk::new();
    let (_, builder) = manual();
    let store = builder.retention(Retention::Forever).open_simulated(&disk).unwrap();
    let put = |name: String, scope| {
        let owner = reserved(store.reserve(&request(&name, 1).scope(scope)).unwrap());
        owner.complete([7; 1_000]).unwrap()
    };
    let mut held: Vec<_> = (0..600).map(|key| put(format!("{key}"), "gone")).collect();
    (0..220).for_each(|key| drop(put(format!("{key}"), "stays")));
    let mut at = 0;
    held.retain(|_| {
        at += 1;
        at % 50 == 27
    });
    assert_eq!(store.erase_scope("gone").unwrap_err().kind(), oncekey::ErrorKind::Busy);
    // All that is worth moving is moved by then.
    for _ in 0..20 {
        store.maintain(1_000).unwrap();
    }
    for _ in 0..20 {
        let done = store.maintain(1_000).unwrap();
        assert_eq!((done.relocated, done.has_more), (0, false));
    }
    drop(held);
    maintain(&store);
    assert!(disk.files().len() <= 12, "{} files", disk.files().len());
    store.verify().unwrap();
}

/// A defect once: segments made after the directory got another name went to whatever had its name by then.
#[test]
fn a_store_stays_in_its_directory_whatever_that_is_called_meanwhile() {
    let parent = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| parent.path().join(name));
    let (_, builder) = manual();
    let fill = |store: &Store, prefix: &str| {
        for key in 0..500 {
            complete(store, &format!("{prefix} {key}"), Retention::Forever, 300);
        }
        maintain(store);
    };
    let store = builder.clone().open(&first).unwrap();
    complete(&store, "before", Retention::Forever, 300);
    fs::rename(&first, &second).unwrap();
    let other = builder.clone().open(&first).unwrap();
    fill(&other, "other");
    fill(&store, "store");
    store.verify().unwrap();
    other.verify().unwrap();
    drop((store, other));
    for (dir, prefix, keys) in [(&second, "store", 501), (&first, "other", 500)] {
        let store = builder.clone().open(dir).unwrap();
        assert_eq!(store.recovery().completed, keys);
        replay(store.reserve(&request(&format!("{prefix} 499"), 1)).unwrap());
    }
}
