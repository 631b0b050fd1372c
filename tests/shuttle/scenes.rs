//! Scenes: what scripts meet too rarely or can't see, each with an end of its own to look at.

use crate::schedules::{self, Stage};
use crate::threads;
use fastrand::Rng;
use oncekey::testing::SimDisk;
use oncekey::{Durability, ErrorKind, ManualClock, Outcome, Request, Reservation, Retention, Store};
use shuttle::thread;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Records that upkeep moved beside callers.
pub static MOVED: AtomicU64 = AtomicU64::new(0);

/// Plays one of the scenes; `random` is the same for all schedules of it.
pub fn play(number: usize, stage: Stage, random: &mut Rng) {
    match number % 6 {
        0 => close_while_others_wait(stage),
        1 => expire_while_it_is_written(stage),
        2 => erase_while_it_is_answered(),
        3 => erase_while_it_is_taken_over(),
        4 => move_while_it_is_answered(random),
        _ => cut_while_others_sync(random),
    }
}

const NAME: &str = "needle";

fn open(disk: &SimDisk, durability: Durability) -> Store {
    let builder = Store::builder().clock(ManualClock::new(1_767_225_600_000)).background(false).durability(durability);
    builder.segment_size(64 * 1024).fixed_hash(1 << 40).open_simulated(disk).expect("no crash is corruption")
}

fn reserve(store: &Store, name: &str) -> Reservation {
    match store.reserve(&Request::new(name).retention(Retention::Forever)) {
        Ok(Outcome::Reserved(owner)) => owner,
        other => panic!("nobody was before: {other:?}"),
    }
}

fn leaves_a_trace(disk: &SimDisk) -> bool {
    let has_it = |bytes: Vec<u8>| bytes.windows(NAME.len()).any(|part| part == NAME.as_bytes());
    disk.files().iter().any(|(file, _)| disk.contents(file).is_some_and(has_it))
}

/// Closing a store wakes those who wait for an owner, who keeps what he has: scripts don't show it, since there he lets go.
fn close_while_others_wait(stage: Stage) {
    let store = schedules::make(stage).ground().store.expect("a new world has a store");
    let request = Request::new("a");
    let Ok(Outcome::Reserved(owner)) = store.reserve(&request) else { panic!("nobody was before") };
    let waiters = [true, false].map(|blocks| {
        let Ok(Outcome::InFlight(pending)) = store.reserve(&request) else { panic!("the owner has it") };
        shuttle::thread::spawn(move || threads::wait(pending, blocks).map_err(|error| error.kind()).map(drop))
    });
    store.close().expect("nothing failed");
    for waiter in waiters {
        assert_eq!(waiter.join().expect("a waiter panicked"), Err(ErrorKind::Closed));
    }
    drop(owner);
}

/// A lease that runs out while its record is written ends when it was to end, though upkeep comes by before it can end it.
/// Found by a script: the key was in flight a millisecond longer.
fn expire_while_it_is_written(stage: Stage) {
    let world = Arc::new(schedules::make(stage));
    let store = world.ground().store.expect("a new world has a store");
    let request = Request::new("a").lease(Duration::from_millis(1));
    let owner = {
        let (store, request) = (store.clone(), request.clone());
        shuttle::thread::spawn(move || (store.reserve(&request), threads::last_reading()))
    };
    world.clock.advance(1);
    store.maintain(64).expect("nothing failed");
    let (owner, reserved_ms) = owner.join().expect("the owner panicked");
    assert!(matches!(owner, Ok(Outcome::Reserved(_))), "nobody was before: {owner:?}");
    let next = store.reserve(&request);
    match world.clock.look() > reserved_ms {
        true => assert!(matches!(next, Ok(Outcome::Interrupted(_))), "the lease is over: {next:?}"),
        false => assert!(matches!(next, Ok(Outcome::InFlight(_))), "the lease has just begun: {next:?}"),
    }
}

/// An answer that an erasure overtakes is told as fenced, or it was there before; nothing of it is left either way.
fn erase_while_it_is_answered() {
    let disk = SimDisk::new();
    let store = open(&disk, Durability::Buffered);
    let owner = reserve(&store, NAME);
    let answering =
        thread::spawn(move || owner.complete("needle in an answer").map(drop).map_err(|refused| refused.error.kind()));
    let erased = store.erase(&Request::new(NAME)).expect("nothing failed");
    let answered = answering.join().expect("the owner panicked");
    assert_eq!(erased.keys, 1);
    assert!(matches!(answered, Ok(()) | Err(ErrorKind::Fenced)), "{answered:?}");
    is_gone(&disk, store);
}

/// Who took a key over while it was erased is erased too.
fn erase_while_it_is_taken_over() {
    let disk = SimDisk::new();
    let store = open(&disk, Durability::Buffered);
    drop(reserve(&store, NAME));
    let taking = {
        let store = store.clone();
        thread::spawn(move || store.reserve(&Request::new(NAME)))
    };
    store.erase(&Request::new(NAME)).expect("nothing failed");
    match taking.join().expect("the next owner panicked") {
        Ok(Outcome::Interrupted(mut owner)) => {
            let renewed = owner.renew().map_err(|error| error.kind());
            assert_eq!(renewed, Err(ErrorKind::Fenced));
            drop(owner);
            is_gone(&disk, store);
        }
        // Reserved after it was erased.
        Ok(Outcome::Reserved(owner)) => assert_eq!(owner.attempt(), 1),
        other => panic!("{other:?}"),
    }
}

/// Neither files nor the next process know the key.
fn is_gone(disk: &SimDisk, store: Store) {
    assert!(!leaves_a_trace(disk), "bytes of an erased key are left");
    let left = disk.after_process_death();
    drop(store);
    let store = open(&left, Durability::Buffered);
    assert!(store.get(&Request::new(NAME)).expect("reads go on").is_none(), "an erased answer is back");
    drop(reserve(&store, NAME));
}

/// Upkeep moves the records of an owner who is about to say something; he is the owner still, and what he says is kept.
fn move_while_it_is_answered(random: &mut Rng) {
    let disk = SimDisk::new();
    let store = open(&disk, Durability::Buffered);
    let mut owner = reserve(&store, NAME);
    // Its copy may need another segment than what the owner says.
    owner.recovery_point(vec![6; 30_000]).expect("nothing failed");
    churn(&store);
    let says = random.u8(..3);
    let answering = thread::spawn(move || match says {
        0 => owner.complete("answer").map(drop).map_err(|refused| refused.error),
        1 => owner.release().map_err(|refused| refused.error),
        _ => owner.recovery_point("point"),
    });
    let moved = store.maintain(1 << 20).expect("nothing failed").relocated;
    MOVED.fetch_add(moved, Ordering::Relaxed);
    answering.join().expect("the owner panicked").expect("he is the owner");
    // What was moved in vain is not there any more when what it was masked by goes.
    churn(&store);
    store.maintain(1 << 20).expect("nothing failed");
    let left = disk.after_process_death();
    drop(store);
    let store = open(&left, Durability::Buffered);
    let next = store.reserve(&Request::new(NAME));
    let is_kept = match (says, &next) {
        (0, Ok(Outcome::Replay(answer))) => answer.bytes() == b"answer",
        (1, Ok(Outcome::Reserved(next))) => next.attempt() == 1,
        (2, Ok(Outcome::Interrupted(next))) => next.attempt() == 2 && next.last_recovery_point() == Some(b"point"),
        _ => false,
    };
    assert!(is_kept, "{next:?} after verdict {says}");
}

/// Writes so much that dies at once that what lives among it has to move.
fn churn(store: &Store) {
    let mut owner = reserve(store, "other");
    for _ in 0..12 {
        owner.recovery_point(vec![7; 20_000]).expect("nothing failed");
    }
    owner.release().expect("nothing failed");
}

/// Some wait for their own syncs, another syncs the store or erases a key, and the power fails meanwhile: what they were told
/// is there. That syncs of one file must not overlap was found on btrfs, where the second may return before the first.
fn cut_while_others_sync(random: &mut Rng) {
    let disk = SimDisk::new();
    let store = open(&disk, Durability::Buffered);
    let told: Arc<shuttle::sync::Mutex<Vec<&str>>> = Arc::default();
    // Longer than a sector, or a power cut would take neighbours together.
    let syncs_all = random.bool();
    reserve(&store, NAME).complete("needle in an answer").map(drop).expect("nothing failed");
    let erasing = {
        let (store, told) = (store.clone(), Arc::clone(&told));
        thread::spawn(move || {
            store.erase(&Request::new(NAME)).expect("nothing failed");
            told.lock().expect("nobody panicked").push(NAME);
        })
    };
    let owners: Vec<_> = [("a", true), ("b", false), ("c", true)]
        .map(|(name, by_itself)| {
            let (store, told) = (store.clone(), Arc::clone(&told));
            thread::spawn(move || {
                let durability = if by_itself { Durability::Synced } else { Durability::Buffered };
                let request = Request::new(name).retention(Retention::Forever).durability(durability);
                let Ok(Outcome::Reserved(owner)) = store.reserve(&request) else { panic!("nobody was before") };
                owner.complete([7; 700]).expect("nothing failed");
                if !by_itself && syncs_all {
                    store.sync().expect("nothing failed");
                }
                if !by_itself && !syncs_all {
                    return;
                }
                told.lock().expect("nobody panicked").push(name);
            })
        })
        .into();
    let seed = random.u64(..);
    let look = |told: Vec<&str>| {
        let mut random = Rng::with_seed(seed);
        // What got through is chance; some more chances cost less than the way here.
        for _ in 0..4 {
            let left = open(&disk.after_power_cut(|| random.bool()), Durability::Buffered);
            for name in &told {
                let answer = left.get(&Request::new(*name)).expect("reads go on");
                if *name == NAME {
                    assert!(answer.is_none(), "an erased answer is back");
                    continue;
                }
                assert!(answer.is_some_and(|answer| answer.bytes() == [7; 700]), "the answer of {name} is lost");
            }
        }
    };
    look(told.lock().expect("nobody panicked").clone());
    owners.into_iter().for_each(|owner| owner.join().expect("an owner panicked"));
    erasing.join().expect("the erasing thread panicked");
    look(told.lock().expect("nobody panicked").clone());
}
