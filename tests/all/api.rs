//! The state table, through the public API only.

use crate::support::{START_MS, interrupted, manual, replay, request, reserved};
use oncekey::testing::{DiskOp, SimDisk};
use oncekey::{
    Durability, ErrorKind, Fingerprint, ManualClock, Outcome, Pending, Ran, Request, Reservation, Retention, RunError,
    Store, Unwritten, Verdict, Wait,
};
use std::cell::Cell;
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, UNIX_EPOCH};

const SECOND: Duration = Duration::from_secs(1);
/// Longer than the default lease.
const MINUTE: Duration = Duration::from_secs(60);

fn store() -> (Arc<ManualClock>, Store) {
    let (clock, builder) = manual();
    (clock, builder.in_memory().unwrap())
}

#[track_caller]
fn in_flight(outcome: Outcome) -> Pending {
    match outcome {
        Outcome::InFlight(pending) => pending,
        other => panic!("expected an operation in flight, got {other:?}"),
    }
}

#[track_caller]
fn assert_mismatch(outcome: Outcome, stored: u8, asked: u8) {
    match outcome {
        Outcome::Mismatch(mismatch) => {
            assert_eq!(mismatch.stored, Fingerprint::of(&[stored]));
            assert_eq!(mismatch.asked, Fingerprint::of(&[asked]));
        }
        other => panic!("expected a mismatch, got {other:?}"),
    }
}

/// The reservation that comes back with a refusal.
#[track_caller]
fn unwritten<T: std::fmt::Debug>(result: Result<T, Box<Unwritten>>, kind: ErrorKind) -> Reservation {
    let unwritten = result.unwrap_err();
    assert_eq!(unwritten.error.kind(), kind, "{}", unwritten.error);
    unwritten.reservation
}

#[test]
fn a_vacant_key_is_reserved_and_then_in_flight_to_everybody_else() {
    let (_, store) = store();
    let owner = reserved(store.reserve(&request("a", 1)).unwrap());
    assert_eq!((owner.attempt(), owner.last_recovery_point()), (1, None));
    let pending = in_flight(store.reserve(&request("a", 1)).unwrap());
    assert_eq!(pending.fence(), owner.fence());
    assert_eq!(pending.lease_left(), Some(Duration::from_secs(30)));
    assert!(store.get(&request("a", 1)).unwrap().is_none(), "there is no answer yet");
    let other = reserved(store.reserve(&request("b", 1)).unwrap());
    assert!(other.fence() > owner.fence());
}

#[test]
fn a_completed_key_is_replayed_byte_for_byte() {
    let (clock, store) = store();
    let owner = reserved(store.reserve(&request("a", 1)).unwrap());
    clock.advance(SECOND);
    let stored = owner.complete(b"answer \0\xff").unwrap();
    assert_eq!(stored.bytes(), b"answer \0\xff");
    let record = replay(store.reserve(&request("a", 1)).unwrap());
    assert_eq!(record.bytes(), b"answer \0\xff");
    assert!(!record.is_failure());
    assert_eq!(record.attempt(), 1);
    assert_eq!(record.completed_at(), UNIX_EPOCH + Duration::from_millis(START_MS + 1000));
    assert_eq!(record.expires_at(), Some(record.completed_at() + Duration::from_secs(24 * 3600)));
    assert_eq!(store.get(&request("a", 7)).unwrap().unwrap().bytes(), b"answer \0\xff", "get ignores the payload");
    assert!(store.get(&request("b", 1)).unwrap().is_none());
}

#[test]
fn an_empty_answer_is_an_answer() {
    let (_, store) = store();
    reserved(store.reserve(&request("a", 1)).unwrap()).complete(b"").unwrap();
    assert_eq!(replay(store.reserve(&request("a", 1)).unwrap()).bytes(), b"");
    assert!(store.get(&request("a", 1)).unwrap().is_some());
}

#[test]
fn a_definitive_failure_is_replayed_as_a_failure() {
    let (_, store) = store();
    let stored = reserved(store.reserve(&request("a", 1)).unwrap()).fail(b"card expired").unwrap();
    assert!(stored.is_failure());
    let record = replay(store.reserve(&request("a", 1)).unwrap());
    assert_eq!((record.bytes(), record.is_failure()), (&b"card expired"[..], true));
    assert_eq!((store.stats().failed, store.stats().completed), (1, 0));
}

#[test]
fn a_released_key_is_vacant_and_its_payload_forgotten() {
    let (_, store) = store();
    let owner = reserved(store.reserve(&request("a", 1)).unwrap());
    let fence = owner.fence();
    owner.release().unwrap();
    assert!(store.get(&request("a", 1)).unwrap().is_none());
    assert_eq!(store.stats().keys, 0);
    let next = reserved(store.reserve(&request("a", 2)).unwrap());
    assert!(next.fence() > fence);
    assert_eq!(next.attempt(), 1);
    assert_mismatch(store.reserve(&request("a", 1)).unwrap(), 2, 1);
}

#[test]
fn another_payload_is_a_mismatch_in_every_state_that_has_one() {
    let (_, store) = store();
    let owner = reserved(store.reserve(&request("a", 1)).unwrap());
    assert_mismatch(store.reserve(&request("a", 2)).unwrap(), 1, 2);
    drop(owner);
    assert_mismatch(store.reserve(&request("a", 2)).unwrap(), 1, 2);
    let second = interrupted(store.reserve(&request("a", 1)).unwrap());
    second.complete(b"x").unwrap();
    assert_mismatch(store.reserve(&request("a", 2)).unwrap(), 1, 2);
    assert_eq!(replay(store.reserve(&request("a", 1)).unwrap()).bytes(), b"x", "a mismatch changes nothing");
    assert_eq!(store.stats().mismatched, 3);
}

#[test]
fn a_request_without_payload_differs_from_one_with() {
    let (_, store) = store();
    reserved(store.reserve(&Request::new("a")).unwrap()).complete(b"x").unwrap();
    assert!(matches!(store.reserve(&request("a", 1)).unwrap(), Outcome::Mismatch(_)));
    assert!(matches!(store.reserve(&Request::new("a")).unwrap(), Outcome::Replay(_)));
}

#[test]
fn scopes_and_operations_keep_keys_apart() {
    let (_, store) = store();
    let requests = [
        Request::new("c").scope("ab"),
        Request::new("bc").scope("a"),
        Request::new("abc"),
        Request::new("c").operation("ab"),
        Request::new("c").scope("a").operation("b"),
        Request::new("b").scope("a").operation("c"),
        Request::new(b"c\0").scope("ab"),
    ];
    for (at, request) in requests.iter().enumerate() {
        reserved(store.reserve(request).unwrap()).complete([at as u8]).unwrap();
    }
    for (at, request) in requests.iter().enumerate() {
        assert_eq!(replay(store.reserve(request).unwrap()).bytes(), [at as u8]);
    }
}

#[test]
fn a_dropped_guard_leaves_its_key_interrupted() {
    let (_, store) = store();
    let owner = reserved(store.reserve(&request("a", 1)).unwrap());
    let fence = owner.fence();
    drop(owner);
    assert!(store.get(&request("a", 1)).unwrap().is_none());
    let next = interrupted(store.reserve(&request("a", 1)).unwrap());
    assert!(next.fence() > fence);
    assert_eq!(next.attempt(), 2);
    in_flight(store.reserve(&request("a", 1)).unwrap());
    next.complete(b"x").unwrap();
    assert_eq!(replay(store.reserve(&request("a", 1)).unwrap()).attempt(), 2);
}

#[test]
fn a_lease_holds_to_its_last_millisecond_and_no_longer() {
    let (clock, store) = store();
    let owner = reserved(store.reserve(&request("a", 1).lease(SECOND)).unwrap());
    clock.advance(Duration::from_millis(999));
    let pending = in_flight(store.reserve(&request("a", 1)).unwrap());
    assert_eq!(pending.lease_left(), Some(Duration::from_millis(1)));
    clock.advance(Duration::from_millis(1));
    let next = interrupted(store.reserve(&request("a", 1)).unwrap());
    assert_eq!(next.attempt(), 2);
    drop(owner);
    in_flight(store.reserve(&request("a", 1)).unwrap());
}

#[test]
fn an_owner_whose_lease_ran_out_may_complete_while_nobody_took_its_key() {
    let (clock, store) = store();
    let first = reserved(store.reserve(&request("a", 1)).unwrap());
    let second = reserved(store.reserve(&request("b", 1)).unwrap());
    let mut third = reserved(store.reserve(&request("c", 1)).unwrap());
    let fourth = reserved(store.reserve(&request("d", 1)).unwrap());
    clock.advance(MINUTE);
    assert_eq!(store.maintain(usize::MAX).unwrap().interrupted, 4);
    first.complete(b"late").unwrap();
    second.release().unwrap();
    third.renew().unwrap();
    fourth.fail(b"no").unwrap();
    assert_eq!(replay(store.reserve(&request("a", 1)).unwrap()).bytes(), b"late");
    drop(reserved(store.reserve(&request("b", 2)).unwrap()));
    in_flight(store.reserve(&request("c", 1)).unwrap());
    assert!(replay(store.reserve(&request("d", 1)).unwrap()).is_failure());
    third.complete(b"renewed").unwrap();
}

#[test]
fn a_stale_owner_is_fenced_in_whatever_it_writes() {
    let (clock, store) = store();
    let mut stale = reserved(store.reserve(&request("a", 1)).unwrap());
    clock.advance(MINUTE);
    let owner = interrupted(store.reserve(&request("a", 1)).unwrap());
    assert!(owner.fence() > stale.fence());
    assert!(stale.renew().unwrap_err().is_fenced());
    assert!(stale.renew_for(SECOND).unwrap_err().is_fenced());
    assert!(stale.recovery_point(b"point").unwrap_err().is_fenced());
    assert_eq!(stale.last_recovery_point(), None, "a refused point is not kept");
    let stale = unwritten(stale.complete(b"stale"), ErrorKind::Fenced);
    let stale = unwritten(stale.fail(b"stale"), ErrorKind::Fenced);
    let stale = unwritten(stale.release(), ErrorKind::Fenced);
    drop(stale);
    assert_eq!(store.stats().fenced, 6);
    let pending = in_flight(store.reserve(&request("a", 1)).unwrap());
    assert_eq!(pending.fence(), owner.fence(), "nothing that a stale owner does touches the key");
    owner.complete(b"owner's").unwrap();
    assert_eq!(replay(store.reserve(&request("a", 1)).unwrap()).bytes(), b"owner's");
}

#[test]
fn a_stale_owner_is_fenced_after_the_next_one_completed_or_released() {
    let (clock, store) = store();
    for (key, release) in [("a", false), ("b", true)] {
        let stale = reserved(store.reserve(&request(key, 1)).unwrap());
        clock.advance(MINUTE);
        let owner = interrupted(store.reserve(&request(key, 1)).unwrap());
        if release {
            owner.release().unwrap();
        } else {
            owner.complete(b"owner's").unwrap();
        }
        drop(unwritten(stale.complete(b"stale"), ErrorKind::Fenced));
    }
    assert_eq!(replay(store.reserve(&request("a", 1)).unwrap()).bytes(), b"owner's");
    drop(reserved(store.reserve(&request("b", 1)).unwrap()));
}

#[test]
fn a_renewal_starts_the_lease_anew() {
    let (clock, store) = store();
    let mut owner = reserved(store.reserve(&request("a", 1).lease(SECOND)).unwrap());
    for _ in 0..10 {
        clock.advance(Duration::from_millis(900));
        owner.renew().unwrap();
    }
    let pending = in_flight(store.reserve(&request("a", 1)).unwrap());
    assert_eq!(pending.lease_left(), Some(SECOND));
    owner.renew_for(MINUTE).unwrap();
    clock.advance(MINUTE - Duration::from_millis(1));
    in_flight(store.reserve(&request("a", 1)).unwrap());
    clock.advance(Duration::from_millis(1));
    drop(interrupted(store.reserve(&request("a", 1)).unwrap()));
}

#[test]
fn an_auto_renewed_lease_holds_until_its_guard_is_dropped() {
    let (clock, store) = store();
    let owner = reserved(store.reserve(&request("a", 1).lease(SECOND).auto_renew(true)).unwrap());
    for turn in 0..20 {
        clock.advance(Duration::from_secs(5));
        if turn % 2 == 0 {
            assert_eq!(store.maintain(usize::MAX).unwrap().interrupted, 0);
        }
        in_flight(store.reserve(&request("a", 1)).unwrap());
    }
    drop(owner);
    let next = interrupted(store.reserve(&request("a", 1).lease(SECOND).auto_renew(true)).unwrap());
    next.complete(b"x").unwrap();
    assert_eq!(replay(store.reserve(&request("a", 1)).unwrap()).bytes(), b"x");
}

#[test]
fn the_newest_recovery_point_reaches_the_next_owner_and_the_one_after() {
    let (_, store) = store();
    let mut owner = reserved(store.reserve(&request("a", 1)).unwrap());
    owner.recovery_point(b"one").unwrap();
    owner.recovery_point(b"two").unwrap();
    assert_eq!(owner.last_recovery_point(), Some(&b"two"[..]));
    in_flight(store.reserve(&request("a", 1)).unwrap());
    drop(owner);
    let second = interrupted(store.reserve(&request("a", 1)).unwrap());
    assert_eq!(second.last_recovery_point(), Some(&b"two"[..]));
    drop(second);
    let mut third = interrupted(store.reserve(&request("a", 1)).unwrap());
    assert_eq!((third.last_recovery_point(), third.attempt()), (Some(&b"two"[..]), 3));
    third.recovery_point(b"three").unwrap();
    third.recovery_point(b"").unwrap();
    assert_eq!(third.last_recovery_point(), None, "an empty one takes it back");
    drop(third);
    let fourth = interrupted(store.reserve(&request("a", 1)).unwrap());
    assert_eq!((fourth.last_recovery_point(), fourth.attempt()), (None, 4));
    fourth.release().unwrap();
    let fresh = reserved(store.reserve(&request("a", 1)).unwrap());
    assert_eq!((fresh.last_recovery_point(), fresh.attempt()), (None, 1), "a release forgets the points");
}

#[test]
fn recovery_points_and_attempts_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    let store = builder.clone().open(dir.path()).unwrap();
    let mut owner = reserved(store.reserve(&request("a", 1)).unwrap());
    owner.recovery_point(b"one").unwrap();
    owner.recovery_point(b"two").unwrap();
    let mut fence = owner.fence();
    drop((owner, store));
    for attempt in 2..6 {
        let store = builder.clone().open(dir.path()).unwrap();
        assert_eq!(store.recovery().interrupted, 1);
        let owner = interrupted(store.reserve(&request("a", 1)).unwrap());
        assert_eq!((owner.attempt(), owner.last_recovery_point()), (attempt, Some(&b"two"[..])));
        assert!(owner.fence() > fence);
        fence = owner.fence();
        if attempt == 5 {
            owner.complete(b"done").unwrap();
        }
    }
    let store = builder.open(dir.path()).unwrap();
    let record = replay(store.reserve(&request("a", 1)).unwrap());
    assert_eq!((record.bytes(), record.attempt()), (&b"done"[..], 5));
}

#[test]
fn a_recovery_point_starts_the_lease_anew() {
    let (clock, store) = store();
    let mut owner = reserved(store.reserve(&request("a", 1).lease(SECOND)).unwrap());
    clock.advance(Duration::from_millis(900));
    owner.recovery_point(b"point").unwrap();
    clock.advance(Duration::from_millis(999));
    in_flight(store.reserve(&request("a", 1)).unwrap());
    clock.advance(Duration::from_millis(1));
    drop(interrupted(store.reserve(&request("a", 1)).unwrap()));
}

#[test]
fn a_lease_keeps_the_length_that_it_was_last_given() {
    let (_, store) = store();
    let mut owner = reserved(store.reserve(&request("a", 1).lease(SECOND)).unwrap());
    owner.renew_for(MINUTE).unwrap();
    owner.recovery_point(b"point").unwrap();
    assert_eq!(in_flight(store.reserve(&request("a", 1)).unwrap()).lease_left(), Some(MINUTE));
    owner.renew().unwrap();
    assert_eq!(in_flight(store.reserve(&request("a", 1)).unwrap()).lease_left(), Some(MINUTE));
}

/// In memory and from the journal: all bytes of a fingerprint count.
#[test]
fn fingerprints_that_differ_in_one_bit_are_a_mismatch() {
    let dir = tempfile::tempdir().unwrap();
    let request = |bit: usize| {
        let mut digest = [0x5a; 16];
        digest[bit / 8] ^= 1 << (bit % 8);
        Request::new("a").fingerprint(Fingerprint::from_bytes(digest))
    };
    for stored in [0, 67, 127] {
        let open = || manual().1.open(dir.path()).unwrap();
        let store = open();
        reserved(store.reserve(&request(stored)).unwrap()).complete(b"x").unwrap();
        drop(store);
        let store = open();
        for asked in 0..128 {
            let is_replay = matches!(store.reserve(&request(asked)).unwrap(), Outcome::Replay(_));
            assert_eq!(is_replay, asked == stored, "bit {stored} is stored, {asked} asked for");
        }
        store.erase(&request(stored)).unwrap();
    }
}

#[test]
fn a_replay_to_a_synced_request_survives_a_power_cut_whoever_stored_it() {
    let asks: [fn(&Store, Request<'_>); 3] = [
        |store, request| drop(replay(store.reserve(&request).unwrap())),
        |store, request| assert!(store.get(&request).unwrap().is_some()),
        |store, request| {
            let again = request.scope("wait").durability(Durability::Buffered);
            let owner = reserved(store.reserve(&again).unwrap());
            let pending = in_flight(store.reserve(&request.scope("wait")).unwrap());
            drop(owner.complete(b"x").unwrap());
            assert!(matches!(pending.wait(Duration::ZERO).unwrap(), Wait::Replay(_)));
        },
    ];
    for ask in asks {
        let disk = SimDisk::new();
        let store = manual().1.open_simulated(&disk).unwrap();
        drop(reserved(store.reserve(&request("a", 1)).unwrap()).complete(b"x").unwrap());
        ask(&store, request("a", 1).durability(Durability::Synced));
        let left = manual().1.open_simulated(&disk.after_power_cut(|| false)).unwrap();
        drop(replay(left.reserve(&request("a", 1)).unwrap()));
    }
}

#[test]
fn a_replay_that_can_not_be_made_durable_is_an_error_to_a_synced_request_only() {
    let disk = SimDisk::new();
    let store = manual().1.open_simulated(&disk).unwrap();
    drop(reserved(store.reserve(&request("a", 1)).unwrap()).complete(b"x").unwrap());
    disk.fail(DiskOp::Sync, 0, std::io::ErrorKind::Other);
    for _ in 0..2 {
        let error = store.reserve(&request("a", 1).durability(Durability::Synced)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Poisoned, "{error}");
    }
    drop(replay(store.reserve(&request("a", 1)).unwrap()));
}

#[test]
fn every_state_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    let store = builder.clone().open(dir.path()).unwrap();
    let held = reserved(store.reserve(&request("held", 1)).unwrap());
    drop(reserved(store.reserve(&request("dropped", 1)).unwrap()));
    reserved(store.reserve(&request("completed", 1)).unwrap()).complete(b"answer").unwrap();
    reserved(store.reserve(&request("failed", 1)).unwrap()).fail(b"failure").unwrap();
    reserved(store.reserve(&request("released", 1)).unwrap()).release().unwrap();
    let newest = held.fence().max(reserved(store.reserve(&request("last", 1)).unwrap()).fence());
    drop((held, store));

    let store = builder.open(dir.path()).unwrap();
    let report = store.recovery();
    assert_eq!((report.completed, report.interrupted, report.expired), (2, 3, 0));
    assert!(report.lost.is_empty() && report.cut.is_empty());
    assert_mismatch(store.reserve(&request("held", 2)).unwrap(), 1, 2);
    assert!(interrupted(store.reserve(&request("held", 1)).unwrap()).fence() > newest);
    assert!(interrupted(store.reserve(&request("dropped", 1)).unwrap()).fence() > newest);
    let record = replay(store.reserve(&request("completed", 1)).unwrap());
    assert_eq!((record.bytes(), record.is_failure()), (&b"answer"[..], false));
    assert_eq!(record.completed_at(), UNIX_EPOCH + Duration::from_millis(START_MS));
    let record = replay(store.reserve(&request("failed", 1)).unwrap());
    assert_eq!((record.bytes(), record.is_failure()), (&b"failure"[..], true));
    assert_mismatch(store.reserve(&request("failed", 2)).unwrap(), 1, 2);
    let released = reserved(store.reserve(&request("released", 2)).unwrap());
    assert!(released.fence() > newest);
    store.verify().unwrap();
}

#[test]
fn an_owner_sets_how_long_its_answer_is_kept() {
    let (clock, store) = store();
    let mut owner = reserved(store.reserve(&request("a", 1)).unwrap());
    assert_eq!(owner.set_retention(Retention::For(Duration::ZERO)).unwrap_err().kind(), ErrorKind::InvalidArgument);
    owner.set_retention(Retention::For(SECOND)).unwrap();
    owner.complete(b"x").unwrap();
    let mut forever = reserved(store.reserve(&request("b", 1).retention(Retention::For(SECOND))).unwrap());
    forever.set_retention(Retention::Forever).unwrap();
    assert_eq!(forever.complete(b"y").unwrap().expires_at(), None);
    clock.advance(SECOND);
    assert!(store.get(&request("a", 1)).unwrap().is_none());
    clock.advance(Duration::from_secs(1 << 40));
    assert_eq!(store.get(&request("b", 1)).unwrap().unwrap().bytes(), b"y");
}

#[test]
fn durability_is_chosen_by_request() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    let store = builder.open(dir.path()).unwrap();
    reserved(store.reserve(&request("a", 1)).unwrap()).complete(b"x").unwrap();
    assert_eq!(store.stats().syncs, 0, "buffered operations wait for no sync");
    let synced = request("b", 1).durability(Durability::Synced);
    let owner = reserved(store.reserve(&synced).unwrap());
    assert_eq!(store.stats().syncs, 1);
    owner.complete(b"y").unwrap();
    assert_eq!(store.stats().syncs, 2);
    replay(store.reserve(&synced).unwrap());
    assert_eq!(store.stats().syncs, 2, "a replay writes nothing");
}

#[test]
fn clones_share_one_store() {
    let (_, store) = store();
    let clone = store.clone();
    let owner = reserved(store.reserve(&request("a", 1)).unwrap());
    in_flight(clone.reserve(&request("a", 1)).unwrap());
    drop(store);
    owner.complete(b"x").unwrap();
    assert_eq!(replay(clone.reserve(&request("a", 1)).unwrap()).bytes(), b"x");
    assert_eq!(clone.stats().keys, 1);
}

#[test]
fn two_replays_read_the_same_bytes_in_place() {
    let (_, store) = store();
    let first = reserved(store.reserve(&request("a", 1)).unwrap()).complete(vec![7; 10_000]).unwrap();
    let second = replay(store.reserve(&request("a", 1)).unwrap());
    let third = store.get(&request("a", 1)).unwrap().unwrap();
    assert_eq!(first.bytes().as_ptr(), second.bytes().as_ptr());
    assert_eq!(first.bytes().as_ptr(), third.bytes().as_ptr());
    assert_eq!(third.clone().as_ref(), [7; 10_000]);
}

#[test]
fn a_record_outlives_its_store() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    let on_disk = builder.clone().open(dir.path()).unwrap();
    for store in [builder.in_memory().unwrap(), on_disk] {
        let record = reserved(store.reserve(&request("a", 1)).unwrap()).complete(b"still here").unwrap();
        store.close().unwrap();
        assert_eq!(record.bytes(), b"still here");
    }
}

#[test]
fn after_close_every_call_is_refused_and_the_owner_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    let store = builder.clone().open(dir.path()).unwrap();
    let clone = store.clone();
    let mut owner = reserved(store.reserve(&request("a", 1)).unwrap());
    reserved(store.reserve(&request("b", 1)).unwrap()).complete(b"x").unwrap();
    let pending = in_flight(store.reserve(&request("a", 1)).unwrap());
    store.close().unwrap();
    assert_eq!(clone.reserve(&request("b", 1)).unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(clone.get(&request("b", 1)).unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(clone.erase(&request("b", 1)).unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(clone.erase_scope("").unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(clone.sync().unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(clone.maintain(1).unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(clone.verify().unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(pending.wait(MINUTE).unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(owner.renew().unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(owner.recovery_point(b"p").unwrap_err().kind(), ErrorKind::Closed);
    let owner = unwritten(owner.complete(b"late"), ErrorKind::Closed);
    assert_eq!(clone.clone().close().unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(builder.clone().open(dir.path()).unwrap_err().kind(), ErrorKind::Locked, "the guard is still out");
    drop((owner, clone));
    let store = builder.open(dir.path()).unwrap();
    drop(interrupted(store.reserve(&request("a", 1)).unwrap()));
    assert_eq!(replay(store.reserve(&request("b", 1)).unwrap()).bytes(), b"x");
}

#[test]
fn stats_count_what_happened() {
    let (clock, store) = store();
    let brief = request("a", 1).retention(Retention::For(SECOND));
    reserved(store.reserve(&brief).unwrap()).complete(b"x").unwrap();
    replay(store.reserve(&brief).unwrap());
    reserved(store.reserve(&request("b", 1)).unwrap()).fail(b"x").unwrap();
    reserved(store.reserve(&request("c", 1)).unwrap()).release().unwrap();
    drop(reserved(store.reserve(&request("d", 1)).unwrap()));
    let owner = interrupted(store.reserve(&request("d", 1)).unwrap());
    in_flight(store.reserve(&request("d", 1)).unwrap());
    clock.advance(SECOND);
    store.maintain(usize::MAX).unwrap();
    store.erase(&request("b", 1)).unwrap();
    let stats = store.stats();
    assert_eq!(stats.keys, 1);
    assert_eq!((stats.reserved, stats.taken_over, stats.in_flight, stats.replayed), (4, 1, 1, 1));
    assert_eq!((stats.completed, stats.failed, stats.released, stats.interrupted), (1, 1, 1, 1));
    assert_eq!((stats.expired, stats.erased, stats.fenced, stats.mismatched), (1, 1, 0, 0));
    assert!(stats.segments > 0 && stats.journal_bytes > 0 && !stats.is_poisoned);
    drop(owner);
}

#[test]
fn run_does_the_operation_once_and_replays_its_answer() {
    let (_, store) = store();
    let runs = Cell::new(0);
    let operation = |_: &mut Reservation| {
        runs.set(runs.get() + 1);
        Ok::<_, Infallible>(format!("run {}", runs.get()))
    };
    let first = store.run(&request("a", 1), operation).unwrap();
    assert!(!first.is_replay() && matches!(first, Ran::Fresh(_)));
    let second = store.run(&request("a", 1), operation).unwrap();
    assert!(second.is_replay());
    assert_eq!((first.bytes(), second.record().bytes()), (&b"run 1"[..], &b"run 1"[..]));
    assert_eq!(runs.get(), 1);
    match store.run(&request("a", 2), operation) {
        Err(RunError::Mismatch(mismatch)) => assert_eq!(mismatch.asked, Fingerprint::of(&[2])),
        other => panic!("{other:?}"),
    }
    assert_eq!(runs.get(), 1);
}

#[test]
fn run_stores_what_the_verdict_says() {
    let (_, store) = store();
    let run = |key, verdict: Verdict<&'static [u8], &'static str>| store.run(&request(key, 1), |_| verdict);
    assert_eq!(run("complete", Verdict::Complete(b"done")).unwrap().bytes(), b"done");
    assert!(run("fail", Verdict::Fail(b"no")).unwrap().record().is_failure());
    assert!(matches!(run("release", Verdict::Release("later")), Err(RunError::Operation("later"))));
    assert!(matches!(run("unknown", Verdict::Unknown("timed out")), Err(RunError::Operation("timed out"))));
    assert!(!replay(store.reserve(&request("complete", 1)).unwrap()).is_failure());
    assert!(replay(store.reserve(&request("fail", 1)).unwrap()).is_failure());
    drop(reserved(store.reserve(&request("release", 1)).unwrap()));
    drop(interrupted(store.reserve(&request("unknown", 1)).unwrap()));
}

#[test]
fn run_takes_an_error_as_unknown_and_does_not_run_over_it() {
    let (_, store) = store();
    let failed = store.run(&request("a", 1), |_| Err::<&[u8], _>("connection lost"));
    assert!(matches!(failed, Err(RunError::Operation("connection lost"))));
    let again = store.run(&request("a", 1), |_| -> Result<&[u8], &str> { panic!("ran what may have happened") });
    match again {
        Err(RunError::Interrupted(reservation)) => {
            assert_eq!(reservation.attempt(), 2);
            reservation.complete(b"reconciled").unwrap();
        }
        other => panic!("{other:?}"),
    }
    let last = store.run(&request("a", 1), |_| Ok::<_, Infallible>("again")).unwrap();
    assert_eq!(last.bytes(), b"reconciled");
}

#[test]
fn an_operation_that_panics_leaves_its_key_interrupted() {
    let (_, store) = store();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        store.run(&request("a", 1), |reservation| -> Result<&[u8], Infallible> {
            reservation.recovery_point(b"half way").unwrap();
            std::panic::resume_unwind(Box::new("bug"))
        })
    }));
    assert!(panicked.is_err());
    let next = interrupted(store.reserve(&request("a", 1)).unwrap());
    assert_eq!(next.last_recovery_point(), Some(&b"half way"[..]));
}

#[test]
fn run_gives_up_waiting_when_told_to() {
    let (_, store) = store();
    let owner = reserved(store.reserve(&request("a", 1)).unwrap());
    let impatient = request("a", 1).wait(Duration::ZERO);
    match store.run(&impatient, |_| -> Result<&[u8], Infallible> { panic!("two owners") }) {
        Err(RunError::InFlight(pending)) => assert_eq!(pending.fence(), owner.fence()),
        other => panic!("{other:?}"),
    }
    assert!(matches!(in_flight(store.reserve(&impatient).unwrap()).wait(Duration::ZERO), Ok(Wait::TimedOut(_))));
    owner.complete(b"x").unwrap();
    assert!(store.run(&impatient, |_| Ok::<_, Infallible>("y")).unwrap().is_replay());
}

#[test]
fn many_callers_of_run_share_one_operation() {
    let (_, store) = store();
    let runs = AtomicU32::new(0);
    let fresh = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for key in 0..200 {
                    let key = key.to_string();
                    let ran = store.run(&request(&key, 1), |reservation| {
                        runs.fetch_add(1, Ordering::Relaxed);
                        std::thread::yield_now();
                        Ok::<_, Infallible>(reservation.fence().to_string())
                    });
                    let ran = ran.unwrap();
                    fresh.fetch_add(u32::from(!ran.is_replay()), Ordering::Relaxed);
                    assert_eq!(ran.bytes(), store.get(&request(&key, 1)).unwrap().unwrap().bytes());
                }
            });
        }
    });
    assert_eq!((runs.into_inner(), fresh.into_inner()), (200, 200));
}

#[test]
fn many_callers_of_run_async_share_one_operation() {
    let (_, store) = store();
    let runs = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for key in 0..200 {
                    let key = key.to_string();
                    let request = request(&key, 1);
                    let ran = pollster::block_on(store.run_async(&request, async |_| {
                        runs.fetch_add(1, Ordering::Relaxed);
                        std::thread::yield_now();
                        Ok::<_, Infallible>(b"answer")
                    }));
                    assert_eq!(ran.unwrap().bytes(), b"answer");
                }
            });
        }
    });
    assert_eq!(runs.into_inner(), 200);
}

#[test]
fn run_async_stores_what_the_verdict_says() {
    let (_, store) = store();
    let run = |key: &'static str, verdict: Verdict<&'static [u8], &'static str>| {
        pollster::block_on(store.run_async(&request(key, 1), async |_| verdict))
    };
    assert_eq!(run("complete", Verdict::Complete(b"done")).unwrap().bytes(), b"done");
    assert!(run("complete", Verdict::Unknown("not run")).unwrap().is_replay());
    assert!(run("fail", Verdict::Fail(b"no")).unwrap().record().is_failure());
    assert!(matches!(run("release", Verdict::Release("later")), Err(RunError::Operation("later"))));
    assert!(matches!(run("unknown", Verdict::Unknown("lost")), Err(RunError::Operation("lost"))));
    drop(reserved(store.reserve(&request("release", 1)).unwrap()));
    assert!(matches!(run("unknown", Verdict::Complete(b"x")), Err(RunError::Interrupted(_))));
    let other = pollster::block_on(store.run_async(&request("complete", 2), async |_| Ok::<_, &str>(b"x")));
    assert!(matches!(other, Err(RunError::Mismatch(_))));
}

#[test]
fn a_future_dropped_half_way_leaves_its_key_interrupted() {
    let (_, store) = store();
    let request = request("a", 1);
    {
        let mut run = Box::pin(store.run_async(&request, async |_| {
            std::future::pending::<()>().await;
            Ok::<_, Infallible>(b"never")
        }));
        let mut context = Context::from_waker(Waker::noop());
        assert!(matches!(run.as_mut().poll(&mut context), Poll::Pending));
        in_flight(store.reserve(&request).unwrap());
    }
    drop(interrupted(store.reserve(&request).unwrap()));
}

#[test]
fn a_dropped_future_that_only_waited_changes_nothing() {
    let (_, store) = store();
    let request = request("a", 1);
    let owner = reserved(store.reserve(&request).unwrap());
    {
        let mut run = Box::pin(store.run_async(&request, async |_| Ok::<_, Infallible>(b"never")));
        let mut context = Context::from_waker(Waker::noop());
        assert!(matches!(run.as_mut().poll(&mut context), Poll::Pending));
    }
    in_flight(store.reserve(&request).unwrap());
    owner.complete(b"x").unwrap();
    replay(store.reserve(&request).unwrap());
}

#[test]
fn fences_grow_over_the_whole_life_of_a_store() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    let mut newest = 0;
    for generation in 0..6 {
        let store = builder.clone().open(dir.path()).unwrap();
        for key in 0..300 {
            let key = format!("{generation}/{}", key % 50);
            let brief = request(&key, 1).retention(Retention::For(SECOND));
            let owner = match store.reserve(&brief).unwrap() {
                Outcome::Reserved(owner) | Outcome::Interrupted(owner) => owner,
                Outcome::Replay(_) => continue,
                other => panic!("{other:?}"),
            };
            assert!(owner.fence() > newest);
            newest = owner.fence();
            match newest / 8 % 4 {
                0 => drop(owner),
                1 => owner.release().unwrap(),
                2 => drop(owner.complete([0; 500]).unwrap()),
                _ => drop(owner.fail([0; 500]).unwrap()),
            }
            clock.advance(Duration::from_millis(30));
            store.maintain(usize::MAX).unwrap();
        }
        if generation % 2 == 0 {
            store.close().unwrap();
        }
    }
}
