//! The index: openings that read only what was sealed since, and say what openings say that read everything.

use crate::support::{interrupted, manual, replay, request, reserved};
use oncekey::testing::{DiskOp, SimDisk};
use oncekey::{Builder, Durability, Error, ErrorKind, Outcome, RecoveryMode, Retention, Store};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const INDEX: &str = "INDEX";
const HOUR: Duration = Duration::from_secs(3600);

fn builder() -> Builder {
    manual().1
}

fn open(disk: &SimDisk) -> Store {
    builder().open_simulated(disk).unwrap()
}

/// The store of a copy of the disk, by its index or by all that the journal says.
fn copy(disk: &SimDisk, index: bool) -> Store {
    builder().index(index).open_simulated(&disk.after_process_death()).unwrap()
}

fn complete(store: &Store, key: &str, len: usize) {
    let owner = reserved(store.reserve(&request(key, 1)).unwrap());
    owner.complete(vec![key.len() as u8; len]).unwrap();
}

/// So many answers that their segments are sealed, and upkeep until there is nothing left to do.
fn seal_some(store: &Store, prefix: &str) {
    for key in 0..12 {
        complete(store, &format!("{prefix}{key}"), 30_000);
        while store.maintain(usize::MAX).unwrap().has_more {}
    }
}

fn has_index(disk: &SimDisk) -> bool {
    disk.contents(INDEX).is_some()
}

fn change(disk: &SimDisk, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = disk.contents(name).unwrap();
    change(&mut bytes);
    disk.put(name, bytes);
}

/// A closed store with a hundred answers of 100 bytes, an interrupted key and a released one.
fn closed() -> SimDisk {
    let disk = SimDisk::new();
    let store = open(&disk);
    (0..100).for_each(|key| complete(&store, &format!("key{key}"), 100));
    drop(store.reserve(&request("interrupted", 1)).unwrap());
    reserved(store.reserve(&request("released", 1)).unwrap()).release().unwrap();
    store.close().unwrap();
    disk
}

#[track_caller]
fn check_closed(store: &Store) {
    for key in 0..100 {
        let name = format!("key{key}");
        let answer = replay(store.reserve(&request(&name, 1)).unwrap());
        assert_eq!(answer.bytes(), [name.len() as u8; 100]);
        assert!(matches!(store.reserve(&request(&name, 2)).unwrap(), Outcome::Mismatch(_)));
    }
    assert!(interrupted(store.reserve(&request("interrupted", 1)).unwrap()).attempt() > 1);
    reserved(store.reserve(&request("released", 2)).unwrap()).release().unwrap();
}

#[test]
fn a_closed_store_is_opened_without_reading_a_record() {
    let disk = closed();
    let reads = disk.calls(DiskOp::Read);
    let store = open(&disk);
    let report = store.recovery();
    assert_eq!((report.records, report.indexed, report.completed, report.interrupted), (0, 101, 100, 1));
    assert!(disk.calls(DiskOp::Read) - reads < 280, "a read a shard, and some a segment");
    check_closed(&store);
    // Upkeep reads what the opening did not.
    assert!(store.maintain(usize::MAX).is_ok_and(|done| !done.has_more));
    check_closed(&store);
    assert!(store.verify().unwrap() > 100);
    store.close().unwrap();
    // Closed again it has another index, and the same keys.
    check_closed(&open(&disk));
}

#[test]
fn what_is_over_by_the_index_is_vacant_and_upkeep_forgets_it() {
    let (clock, builder) = manual();
    let disk = SimDisk::new();
    let builder = builder.retention(Retention::For(HOUR));
    let store = builder.clone().open_simulated(&disk).unwrap();
    (0..100).for_each(|key| complete(&store, &format!("key{key}"), 100));
    store.close().unwrap();
    clock.advance(HOUR);
    let store = builder.open_simulated(&disk).unwrap();
    assert_eq!((store.recovery().indexed, store.stats().keys), (100, 100));
    assert!(store.get(&request("key7", 1)).unwrap().is_none());
    let done = store.maintain(usize::MAX).unwrap();
    assert_eq!((done.expired, done.has_more, store.stats().keys), (99, false, 0));
    while store.maintain(usize::MAX).unwrap().has_more {}
    assert_eq!(disk.files().iter().filter(|(name, _)| name.ends_with(".seg")).count(), store.stats().segments as usize);
    assert!(store.stats().segments <= 3, "{:?}", store.stats());
}

#[test]
fn an_index_that_does_not_fit_is_passed_over_and_removed() {
    let whole = closed();
    let older = {
        let disk = SimDisk::new();
        open(&disk).close().unwrap();
        let store = open(&disk);
        complete(&store, "key", 10);
        store.close().unwrap();
        disk.contents(INDEX).unwrap()
    };
    let damages: [fn(&SimDisk, &[u8]); 7] = [
        |disk, _| disk.take(INDEX),
        |disk, _| change(disk, INDEX, |bytes| bytes[3] ^= 1),
        |disk, _| change(disk, INDEX, |bytes| *bytes.last_mut().unwrap() = 0xff),
        |disk, _| change(disk, INDEX, Vec::clear),
        |disk, _| change(disk, INDEX, |bytes| bytes.truncate(bytes.len() / 2)),
        |disk, _| change(disk, INDEX, |bytes| bytes.extend([0; 4096])),
        |disk, older| disk.put(INDEX, older.to_vec()),
    ];
    for (nth, damage) in damages.into_iter().enumerate() {
        let disk = whole.after_process_death();
        damage(&disk, &older);
        let store = open(&disk);
        assert_eq!(store.recovery().indexed, 0, "damage {nth}");
        assert!(store.recovery().records > 200 && !has_index(&disk));
        check_closed(&store);
        drop(store);
        // It does not come back.
        assert_eq!(open(&disk.after_power_cut(|| false)).recovery().indexed, 0);
    }
}

#[test]
fn an_index_is_of_no_use_to_one_that_hashes_otherwise_or_reads_all() {
    let disk = closed();
    for builder in [builder().fixed_hash(7), builder().index(false), builder().recovery(RecoveryMode::Salvage)] {
        let store = builder.open_simulated(&disk.after_process_death()).unwrap();
        assert_eq!(store.recovery().indexed, 0);
        check_closed(&store);
    }
    let disk = SimDisk::new();
    let builder = builder().index(false);
    let store = builder.clone().open_simulated(&disk).unwrap();
    seal_some(&store, "key");
    store.close().unwrap();
    assert!(!has_index(&disk));
}

#[test]
fn upkeep_writes_an_index_and_a_dead_process_leaves_only_the_rest_to_be_read() {
    let disk = SimDisk::new();
    let store = open(&disk);
    seal_some(&store, "first");
    assert!(has_index(&disk));
    let in_flight = reserved(store.reserve(&request("in flight", 1)).unwrap());
    seal_some(&store, "second");
    let taken_over = request("taken over", 1);
    drop(store.reserve(&taken_over).unwrap());
    // What the index has goes on, and is found by what is read behind it.
    in_flight.complete(b"landed").unwrap();
    let mut owner = interrupted(store.reserve(&taken_over).unwrap());
    owner.recovery_point(b"half way").unwrap();
    let all = store.recovery().records + store.verify().unwrap();
    let image = disk.after_process_death();
    let store = copy(&image, true);
    let report = store.recovery();
    assert!(report.indexed > 10 && report.records > 0 && report.records < all / 2, "{report:?} of {all}");
    for key in (0..12).flat_map(|key| [format!("first{key}"), format!("second{key}")]) {
        assert_eq!(replay(store.reserve(&request(&key, 1)).unwrap()).bytes().len(), 30_000);
    }
    assert_eq!(replay(store.reserve(&request("in flight", 1)).unwrap()).bytes(), b"landed");
    let owner = interrupted(store.reserve(&taken_over).unwrap());
    assert_eq!((owner.attempt(), owner.last_recovery_point()), (3, Some(&b"half way"[..])));
    assert_eq!(copy(&image, false).stats().keys, store.stats().keys);
}

/// Every state that a key can be in when the index is written, and everything that may become of it before a crash.
#[test]
fn what_becomes_of_keys_behind_an_index_is_found() {
    let ends = ["", "complete", "release", "point", "drop", "erase", "over"];
    let starts = ["vacant", "reserved", "interrupted", "answered"];
    let (clock, builder) = manual();
    let builder = builder.retention(Retention::For(HOUR));
    let disk = SimDisk::new();
    let store = builder.clone().open_simulated(&disk).unwrap();
    let names: Vec<(String, &str, &str)> =
        starts.iter().flat_map(|start| ends.map(|end| (format!("{start} {end}"), *start, end))).collect();
    let mut owners = Vec::new();
    for (name, start, _) in &names {
        let lease = request(name, 1).lease(24 * HOUR);
        match *start {
            "reserved" => owners.push((name, reserved(store.reserve(&lease).unwrap()))),
            "interrupted" => drop(store.reserve(&lease).unwrap()),
            "answered" => complete(&store, name, 8),
            _ => {}
        }
    }
    seal_some(&store, "filler");
    assert!(has_index(&disk));
    clock.advance(HOUR / 2);
    let mut held = Vec::new();
    for (name, _, end) in &names {
        let owner = match owners.iter().position(|(reserved, _)| *reserved == name) {
            Some(at) => Some(owners.swap_remove(at).1),
            None => match store.reserve(&request(name, 1)).unwrap() {
                Outcome::Reserved(owner) | Outcome::Interrupted(owner) if !end.is_empty() => Some(owner),
                _ => None,
            },
        };
        match (*end, owner) {
            ("complete", Some(owner)) => drop(owner.complete(b"late").unwrap()),
            ("release", Some(owner)) => owner.release().unwrap(),
            ("point", Some(mut owner)) => {
                owner.recovery_point(b"so far").unwrap();
                held.push(owner);
            }
            ("drop", owner) => drop(owner),
            (_, Some(owner)) => held.push(owner),
            (_, None) => {}
        }
    }
    let looks = |store: &Store| -> Vec<String> {
        let look = |(name, ..): &(String, &str, &str)| match store.reserve(&request(name, 1)).unwrap() {
            Outcome::Replay(answer) => format!("{name}: {answer:?} {:?}", answer.bytes()),
            Outcome::Interrupted(owner) => format!("{name}: {} {:?}", owner.attempt(), owner.last_recovery_point()),
            outcome => format!("{name}: {}", if matches!(outcome, Outcome::Reserved(_)) { "free" } else { "?" }),
        };
        names.iter().map(look).collect()
    };
    let both = |disk: &SimDisk, is_indexed: bool| {
        let [one, other] = [true, false]
            .map(|index| builder.clone().index(index).open_simulated(&disk.after_process_death()).unwrap());
        assert_eq!(one.recovery().indexed > 0, is_indexed);
        assert_eq!(looks(&one), looks(&other));
        one.verify().unwrap();
    };
    both(&disk.after_process_death(), true);
    store.sync().unwrap();
    both(&disk.after_power_cut(|| false), true);
    for (name, ..) in names.iter().filter(|(_, _, end)| *end == "erase") {
        store.erase(&request(name, 1)).unwrap();
    }
    assert!(!has_index(&disk));
    both(&disk.after_power_cut(|| false), false);
    clock.advance(HOUR);
    both(&disk.after_process_death(), false);
}

/// The reservations' segment was not full and the answers' were: a record of the first is masked by one of the others only.
#[test]
fn an_answer_that_is_over_leaves_no_reservation_behind_that_the_index_does_not_cover() {
    let (clock, builder) = manual();
    let builder = builder.retention(Retention::For(HOUR));
    let disk = SimDisk::new();
    let store = builder.clone().open_simulated(&disk).unwrap();
    complete(&store, "over", 8);
    clock.advance(HOUR / 2);
    seal_some(&store, "filler");
    clock.advance(HOUR / 2);
    // The answer is forgotten, and its segment is kept by those that were stored later.
    while store.maintain(usize::MAX).unwrap().has_more {}
    seal_some(&store, "more");
    assert_eq!(store.stats().expired, 1);
    let image = disk.after_process_death();
    drop(reserved(copy(&image, false).reserve(&request("over", 2)).unwrap()));
    let store = builder.open_simulated(&image).unwrap();
    assert!(store.recovery().indexed > 0);
    drop(reserved(store.reserve(&request("over", 2)).unwrap()));
}

#[test]
fn no_power_cut_takes_an_answer_that_the_index_left_to_the_journal_and_not_what_was_before() {
    let disk = SimDisk::new();
    let store = open(&disk);
    let synced = |key| request(key, 1).durability(Durability::Synced).lease(24 * HOUR);
    let early = reserved(store.reserve(&synced("early").durability(Durability::Buffered)).unwrap());
    store.sync().unwrap();
    (0..1200).for_each(|key| drop(store.reserve(&request(&format!("{key:0200}"), 1)).unwrap()));
    // Promised nothing against a power cut, and in a segment that is not full.
    early.complete(b"late").unwrap();
    while store.maintain(usize::MAX).unwrap().has_more {}
    assert!(has_index(&disk));
    let store = open(&disk.after_power_cut(|| false));
    assert!(store.recovery().indexed > 0);
    match store.reserve(&synced("early")).unwrap() {
        Outcome::Replay(answer) => assert_eq!(answer.bytes(), b"late"),
        Outcome::Interrupted(_) => {}
        outcome => panic!("a reservation that was durable is gone: {outcome:?}"),
    }
}

#[test]
fn answers_acknowledged_while_a_store_is_closed_are_in_its_index() {
    for round in 0..40 {
        let disk = SimDisk::new();
        let store = builder().durability(Durability::Synced).open_simulated(&disk).unwrap();
        let acknowledged = AtomicUsize::new(0);
        let done: Vec<Vec<String>> = std::thread::scope(|scope| {
            let run = |thread: usize| {
                let (store, acknowledged) = (store.clone(), &acknowledged);
                move || {
                    let mut done = Vec::new();
                    for nth in 0.. {
                        let name = format!("{thread}/{nth}");
                        let Ok(Outcome::Reserved(owner)) = store.reserve(&request(&name, 1)) else { break };
                        if owner.complete(name.as_bytes()).is_err() {
                            break;
                        }
                        acknowledged.fetch_add(1, Ordering::Relaxed);
                        done.push(name);
                    }
                    done
                }
            };
            let threads: Vec<_> = (0..8).map(|thread| scope.spawn(run(thread))).collect();
            while acknowledged.load(Ordering::Relaxed) < 50 + round {
                std::thread::yield_now();
            }
            store.clone().close().unwrap();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        drop(store);
        let store = open(&disk);
        for name in done.iter().flatten() {
            assert_eq!(replay(store.reserve(&request(name, 1)).unwrap()).bytes(), name.as_bytes());
        }
    }
}

#[test]
fn damage_behind_an_index_is_told_by_who_meets_it_and_nothing_else_is_lost() {
    let whole = closed();
    let names = whole.files().into_iter().map(|(name, _)| name).filter(|name| name.ends_with(".seg"));
    let answers: Vec<String> = names.filter(|name| whole.contents(name).unwrap()[4096] == 0x21).collect();
    let [name] = &answers[..] else { panic!("{answers:?}") };
    let at = 4096 + 40 * 176 + 100;
    let disk = whole.after_process_death();
    change(&disk, name, |bytes| bytes[at] ^= 4);
    let is_told = |error: &Error| {
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert_eq!(error.path(), Some(Path::new("simulated").join(name).as_path()));
        let offset = error.offset().unwrap() as usize;
        assert!((at - 176..=at).contains(&offset), "{offset} for {at}");
    };
    is_told(&builder().index(false).open_simulated(&disk.after_process_death()).unwrap_err());
    let store = open(&disk.after_process_death());
    assert_eq!((store.recovery().indexed, store.stats().damaged_segments), (101, 0));
    let look = |key: usize| store.get(&request(&format!("key{key}"), 1));
    let bad: Vec<usize> = (0..100).filter(|key| look(*key).is_err()).collect();
    let [bad] = bad[..] else { panic!("{bad:?}") };
    is_told(&look(bad).unwrap_err());
    is_told(&store.reserve(&request(&format!("key{bad}"), 1)).unwrap_err());
    is_told(&store.verify().unwrap_err());
    // An erasure has to see all records.
    is_told(&store.erase(&request("key3", 1)).unwrap_err());
    assert!(look(3).unwrap().is_some());
    // Upkeep tells of it once, and goes on without the segment.
    let store = open(&disk.after_process_death());
    is_told(&store.maintain(usize::MAX).unwrap_err());
    assert!(!store.maintain(usize::MAX).unwrap().has_more);
    assert_eq!(store.stats().damaged_segments, 1);
    (0..100).filter(|key| *key != bad).for_each(|key| {
        assert!(store.get(&request(&format!("key{key}"), 1)).unwrap().is_some());
    });
    is_told(&store.get(&request(&format!("key{bad}"), 1)).unwrap_err());
    complete(&store, "another", 8);
    store.close().unwrap();
    // Salvage says what is lost and keeps the rest.
    let store = builder().recovery(RecoveryMode::Salvage).open_simulated(&disk).unwrap();
    assert_eq!((store.recovery().lost.len(), store.recovery().completed), (1, 99));
}

#[test]
fn an_index_gives_way_where_a_segment_finds_no_room() {
    let disk = SimDisk::new();
    let store = open(&disk);
    seal_some(&store, "key");
    assert!(has_index(&disk));
    let used: u64 = disk.files().iter().map(|(_, len)| len).sum();
    let index = disk.contents(INDEX).unwrap().len() as u64;
    // A segment more finds room only in place of the index.
    disk.set_capacity(Some(used + 64 * 1024 - index / 2));
    for key in 0.. {
        let Ok(Outcome::Reserved(owner)) = store.reserve(&request(&format!("more{key}"), 1)) else { break };
        if owner.complete(vec![1; 30_000]).is_err() {
            break;
        }
        store.maintain(usize::MAX).ok();
    }
    assert!(!has_index(&disk));
    let store = open(&disk.after_power_cut(|| false));
    assert_eq!(replay(store.reserve(&request("key3", 1)).unwrap()).bytes().len(), 30_000);
}

#[test]
fn an_index_that_cannot_be_written_harms_nobody() {
    for (op, after) in [DiskOp::Create, DiskOp::Sync, DiskOp::SyncNames, DiskOp::Overwrite, DiskOp::Remove]
        .into_iter()
        .flat_map(|op| (0..6).map(move |after| (op, after)))
    {
        let disk = closed();
        let store = open(&disk);
        complete(&store, "another", 8);
        disk.fail(op, after, io::ErrorKind::Other);
        store.close().ok();
        let store = open(&disk.after_process_death());
        check_closed(&store);
        assert!(store.get(&request("another", 1)).unwrap().is_some());
    }
}

/// As in a directory that was copied while the store was in use, file by file.
#[test]
fn an_index_with_older_copies_of_the_segments_that_were_in_use_is_passed_over() {
    let disk = SimDisk::new();
    let store = open(&disk);
    (0..1200).for_each(|key| drop(store.reserve(&request(&format!("{key:0200}"), 1)).unwrap()));
    complete(&store, "one", 8);
    let before: Vec<_> = disk.files().into_iter().map(|(name, _)| (disk.contents(&name).unwrap(), name)).collect();
    for key in 0..10 {
        interrupted(store.reserve(&request(&format!("{key:0200}"), 1)).unwrap()).complete(b"late").unwrap();
    }
    while store.maintain(usize::MAX).unwrap().has_more {}
    assert!(has_index(&disk));
    let (whole, mixed) = (disk.after_process_death(), disk.after_process_death());
    let mut older = 0;
    for (bytes, name) in before.into_iter().filter(|(_, name)| name.ends_with(".seg")) {
        older += usize::from(mixed.contents(&name).is_some_and(|now| now != bytes));
        mixed.put(&name, bytes);
    }
    assert!(older > 0);
    assert!(open(&whole).recovery().indexed > 1000);
    let store = open(&mixed);
    assert_eq!((store.recovery().indexed, store.recovery().interrupted), (0, 1200));
}

#[test]
fn an_index_says_when_the_newest_record_was_written_and_not_when_it_was_itself() {
    let (clock, builder) = manual();
    let builder = builder.retention(Retention::Forever);
    let disk = SimDisk::new();
    let store = builder.clone().index(false).open_simulated(&disk).unwrap();
    complete(&store, "key", 8);
    drop(store);
    clock.advance(1000 * HOUR);
    builder.clone().open_simulated(&disk).unwrap().close().unwrap();
    let store = builder.clone().open_simulated(&disk).unwrap();
    assert_eq!((store.recovery().indexed, store.recovery().clock_ahead), (1, 1000 * HOUR));
    drop(store);
    let limited = builder.clock_jump_limit(999 * HOUR).open_simulated(&disk);
    assert_eq!(limited.unwrap_err().kind(), ErrorKind::InvalidArgument);
}

#[test]
fn what_bears_the_name_of_an_index_and_cannot_be_removed_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let store = builder().open(dir.path()).unwrap();
    complete(&store, "key", 8);
    store.close().unwrap();
    std::fs::remove_file(dir.path().join(INDEX)).unwrap();
    std::fs::create_dir(dir.path().join(INDEX)).unwrap();
    for index in [true, false] {
        let store = builder().index(index).open(dir.path()).unwrap();
        assert!(store.get(&request("key", 1)).unwrap().is_some());
        store.close().unwrap();
    }
}

/// Answers of which a segment holds two; a reservation that is released is a record of the reservations' segment only.
#[test]
fn a_checkpoint_leaves_callers_the_room_that_they_had() {
    let releases = |index: bool| {
        let disk = SimDisk::new();
        let store = builder().index(index).open_simulated(&disk).unwrap();
        let _owners: Vec<_> =
            (0..3).map(|nth| reserved(store.reserve(&request(&format!("{nth}"), 1)).unwrap())).collect();
        (0..13).for_each(|key| complete(&store, &format!("key{key}"), 30_000));
        disk.set_capacity(Some(disk.files().iter().map(|(_, len)| len).sum()));
        // Nor is there room for a segment ahead.
        store.maintain(usize::MAX).ok();
        let mut releases = 0;
        while let Ok(Outcome::Reserved(owner)) = store.reserve(&request("again", 1)) {
            if owner.release().is_err() {
                break;
            }
            releases += 1;
        }
        releases
    };
    let (with, without) = (releases(true), releases(false));
    assert!(without > 100 && with >= without, "{with} and {without}");
}

#[test]
fn a_segment_that_cannot_be_read_keeps_upkeep_from_nothing_else() {
    let (clock, builder) = manual();
    let disk = SimDisk::new();
    let builder = builder.retention(Retention::For(HOUR));
    let store = builder.clone().open_simulated(&disk).unwrap();
    (0..12).for_each(|key| complete(&store, &format!("key{key}"), 30_000));
    store.close().unwrap();
    let store = builder.open_simulated(&disk).unwrap();
    complete(&store, "new", 8);
    disk.fail(DiskOp::Read, 0, io::ErrorKind::Other);
    clock.advance(HOUR);
    assert_eq!(store.maintain(usize::MAX).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(store.stats().expired, 1, "the one that this store made");
    while store.maintain(usize::MAX).unwrap().has_more {}
    // Those of the segment that could not be read stay, and are over all the same.
    assert!(store.stats().keys < 4, "{:?}", store.stats());
    assert!((0..12).all(|key| store.get(&request(&format!("key{key}"), 1)).unwrap().is_none()));
}

#[test]
fn stores_in_memory_have_no_index_and_end_no_segment_for_one() {
    let store = builder().in_memory().unwrap();
    (0..10).for_each(|round| seal_some(&store, &format!("{round}/")));
    // Sixty of answers, one of reservations, and those ahead.
    assert!(store.stats().segments < 66, "{:?}", store.stats());
    store.close().unwrap();
}
