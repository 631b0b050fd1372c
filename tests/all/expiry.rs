//! When answers are forgotten, to the millisecond, and that forgetting is final.

use crate::support::{START_MS, interrupted, manual, replay, request, reserved};
use oncekey::{Outcome, Request, Retention, Store};
use std::time::{Duration, UNIX_EPOCH};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(24 * 3600);

fn kept_for(key: &str, time: Duration) -> Request<'_> {
    request(key, 1).retention(Retention::For(time))
}

fn complete(store: &Store, request: &Request<'_>) {
    reserved(store.reserve(request).unwrap()).complete(b"answer").unwrap();
}

#[test]
fn an_answer_is_kept_to_its_last_millisecond_and_no_longer() {
    for time in [MS, 2 * MS, SECOND, 8 * SECOND, DAY, 400 * DAY] {
        for by_maintain in [false, true] {
            let (clock, builder) = manual();
            let store = builder.in_memory().unwrap();
            complete(&store, &kept_for("a", time));
            clock.advance(time - MS);
            if by_maintain {
                assert_eq!(store.maintain(usize::MAX).unwrap().expired, 0);
            }
            assert_eq!(replay(store.reserve(&kept_for("a", time)).unwrap()).bytes(), b"answer");
            assert!(matches!(store.reserve(&request("a", 2)).unwrap(), Outcome::Mismatch(_)));
            clock.advance(MS);
            if by_maintain {
                assert_eq!(store.maintain(usize::MAX).unwrap().expired, 1);
            }
            assert!(store.get(&request("a", 1)).unwrap().is_none());
            assert_eq!(
                reserved(store.reserve(&request("a", 2)).unwrap()).attempt(),
                1,
                "the payload is forgotten, too"
            );
        }
    }
}

#[test]
fn retention_counts_from_completion_and_not_from_the_reservation() {
    let (clock, builder) = manual();
    let store = builder.in_memory().unwrap();
    let owner = reserved(store.reserve(&kept_for("a", SECOND)).unwrap());
    clock.advance(20 * SECOND);
    let record = owner.complete(b"x").unwrap();
    assert_eq!(record.expires_at(), Some(UNIX_EPOCH + Duration::from_millis(START_MS) + 21 * SECOND));
    clock.advance(SECOND - MS);
    replay(store.reserve(&kept_for("a", SECOND)).unwrap());
    clock.advance(MS);
    drop(reserved(store.reserve(&kept_for("a", SECOND)).unwrap()));
}

#[test]
fn a_replay_does_not_prolong_retention() {
    let (clock, builder) = manual();
    let store = builder.in_memory().unwrap();
    complete(&store, &kept_for("a", 10 * MS));
    for _ in 0..9 {
        clock.advance(MS);
        replay(store.reserve(&kept_for("a", DAY)).unwrap());
    }
    clock.advance(MS);
    drop(reserved(store.reserve(&kept_for("a", DAY)).unwrap()));
}

#[test]
fn the_stores_own_retention_applies_where_a_request_has_none() {
    let (clock, builder) = manual();
    let store = builder.retention(Retention::For(5 * SECOND)).in_memory().unwrap();
    complete(&store, &request("a", 1));
    complete(&store, &kept_for("b", 6 * SECOND));
    clock.advance(5 * SECOND);
    assert!(store.get(&request("a", 1)).unwrap().is_none());
    assert!(store.get(&request("b", 1)).unwrap().is_some());
}

#[test]
fn maintain_gives_memory_back_and_its_budget_bounds_the_work() {
    let (clock, builder) = manual();
    let store = builder.segment_size(1 << 20).in_memory().unwrap();
    for key in 0..5_000 {
        complete(&store, &kept_for(&key.to_string(), SECOND));
    }
    assert_eq!(store.stats().keys, 5_000);
    clock.advance(SECOND);
    let (mut expired, mut calls) = (0, 0);
    loop {
        let done = store.maintain(100).unwrap();
        assert!(done.expired <= 100, "{done:?}");
        expired += done.expired;
        calls += 1;
        assert_eq!(store.stats().keys, 5_000 - expired);
        if !done.has_more {
            break;
        }
        assert!(calls < 10_000, "{expired} expired in {calls} calls");
    }
    assert_eq!(expired, 5_000);
    assert_eq!(store.maintain(0).unwrap().expired, 0);
}

/// A defect once: to find the one answer of a block that was over, the whole block was read, each time.
#[test]
fn answers_that_end_in_another_order_than_they_were_stored_keep_up_with_a_budget() {
    let (clock, builder) = manual();
    let store = builder.segment_size(1 << 20).in_memory().unwrap();
    let mut ends = Vec::new();
    for step in 0..1200u64 {
        for nth in 0..20 {
            let key = step * 20 + nth;
            let kept_ms = 1000 + key * 7919 % 7000;
            complete(&store, &kept_for(&key.to_string(), Duration::from_millis(kept_ms)));
            ends.push(step * 10 + kept_ms);
        }
        clock.advance(Duration::from_millis(10));
        store.maintain(100).unwrap();
    }
    let live = ends.iter().filter(|end| **end > 12_000).count() as u64;
    let held = store.stats().keys;
    assert!(live > 5_000 && held <= live + 100, "{held} keys are held, {live} are to be kept");
    while store.maintain(100).unwrap().has_more {}
    assert_eq!((store.stats().keys, store.maintain(1).unwrap().has_more), (live, false));
}

#[test]
fn keys_leave_after_a_clock_that_was_set_back_has_caught_up() {
    let (clock, builder) = manual();
    let store = builder.in_memory().unwrap();
    clock.advance(DAY);
    store.maintain(usize::MAX).unwrap();
    clock.set(START_MS);
    for key in 0..100 {
        complete(&store, &kept_for(&key.to_string(), SECOND));
    }
    store.maintain(usize::MAX).unwrap();
    assert_eq!(store.stats().keys, 100, "they are still to be kept for a second");
    clock.advance(2 * DAY);
    while store.maintain(10).unwrap().has_more {}
    assert_eq!(store.stats().keys, 0);
}

#[test]
fn a_budget_of_nothing_does_nothing_and_says_so() {
    let (clock, builder) = manual();
    let store = builder.in_memory().unwrap();
    complete(&store, &kept_for("a", SECOND));
    clock.advance(SECOND);
    let done = store.maintain(0).unwrap();
    assert_eq!((done.expired, done.has_more, store.stats().keys), (0, true, 1));
    assert!(store.get(&request("a", 1)).unwrap().is_none());
}

#[test]
fn every_time_to_live_fires_when_it_is_due() {
    let (clock, builder) = manual();
    let store = builder.segment_size(1 << 20).in_memory().unwrap();
    // Powers of two and their neighbours lie on the edges of whatever levels a wheel has.
    let times: Vec<u64> =
        (0..32).flat_map(|bit| [(1 << bit) - 1, 1 << bit, (1 << bit) + 1]).filter(|ms| *ms > 0).collect();
    for (at, ms) in times.iter().enumerate() {
        complete(&store, &kept_for(&at.to_string(), Duration::from_millis(*ms)));
    }
    let mut ends = times.clone();
    ends.sort_unstable();
    ends.dedup();
    for end in ends {
        for now in [end - 1, end] {
            clock.set(START_MS + now);
            while store.maintain(1_000).unwrap().has_more {}
            let alive = times.iter().filter(|ms| **ms > now).count() as u64;
            assert_eq!(store.stats().keys, alive, "{now} ms after the start");
        }
    }
}

#[test]
fn forever_never_expires() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    let store = builder.clone().open(dir.path()).unwrap();
    let forever = request("a", 1).retention(Retention::Forever);
    assert_eq!(reserved(store.reserve(&forever).unwrap()).complete(b"x").unwrap().expires_at(), None);
    for _ in 0..50 {
        clock.advance(1000 * DAY);
        while store.maintain(1_000).unwrap().has_more {}
    }
    drop(store);
    clock.set(u64::MAX - 10);
    let store = builder.open(dir.path()).unwrap();
    assert_eq!(replay(store.reserve(&forever).unwrap()).bytes(), b"x");
}

#[test]
fn an_interrupted_key_is_not_forgotten_by_time() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    let store = builder.clone().open(dir.path()).unwrap();
    drop(reserved(store.reserve(&kept_for("a", SECOND)).unwrap()));
    std::mem::forget(reserved(store.reserve(&kept_for("b", SECOND)).unwrap()));
    clock.advance(10_000 * DAY);
    while store.maintain(1_000).unwrap().has_more {}
    drop(interrupted(store.reserve(&kept_for("a", SECOND)).unwrap()));
    drop(interrupted(store.reserve(&kept_for("b", SECOND)).unwrap()));
}

#[test]
fn an_expired_key_starts_afresh_and_its_new_answer_counts() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    let store = builder.clone().open(dir.path()).unwrap();
    let mut fence = 0;
    for generation in 0..10_u8 {
        let again = request("a", generation).retention(Retention::For(SECOND));
        let owner = reserved(store.reserve(&again).unwrap());
        assert!(owner.fence() > fence);
        assert_eq!(owner.attempt(), 1);
        fence = owner.fence();
        owner.complete([generation]).unwrap();
        assert_eq!(replay(store.reserve(&again).unwrap()).bytes(), [generation]);
        clock.advance(SECOND);
        if generation % 2 == 0 {
            store.maintain(usize::MAX).unwrap();
        }
    }
    complete(&store, &request("a", 77).retention(Retention::Forever));
    drop(store);
    let store = builder.open(dir.path()).unwrap();
    assert_eq!(store.recovery().completed, 1);
    assert_eq!(replay(store.reserve(&request("a", 77)).unwrap()).bytes(), b"answer");
}

#[test]
fn deadlines_hold_across_a_restart_to_the_millisecond() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    let store = builder.clone().open(dir.path()).unwrap();
    complete(&store, &kept_for("a", 10 * SECOND));
    clock.advance(SECOND);
    complete(&store, &kept_for("b", 20 * SECOND));
    drop(store);
    clock.advance(9 * SECOND - MS);
    let store = builder.clone().open(dir.path()).unwrap();
    assert_eq!((store.recovery().completed, store.recovery().expired), (2, 0));
    replay(store.reserve(&kept_for("a", SECOND)).unwrap());
    clock.advance(MS);
    assert!(store.get(&request("a", 1)).unwrap().is_none());
    drop(store);
    let store = builder.clone().open(dir.path()).unwrap();
    assert_eq!((store.recovery().completed, store.recovery().expired), (1, 1));
    clock.advance(11 * SECOND - MS);
    assert_eq!(store.maintain(usize::MAX).unwrap().expired, 0);
    replay(store.reserve(&kept_for("b", SECOND)).unwrap());
    clock.advance(MS);
    assert_eq!(store.maintain(usize::MAX).unwrap().expired, 1);
    assert_eq!(store.stats().keys, 0);
}

#[test]
fn what_was_released_expired_or_erased_does_not_come_back() {
    for close in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (clock, builder) = manual();
        let store = builder.clone().open(dir.path()).unwrap();
        let name = |kind: &str, key: u32| format!("{kind} {key}");
        for key in 0..300 {
            complete(&store, &kept_for(&name("expired", key), SECOND));
            complete(&store, &kept_for(&name("kept", key), DAY));
            reserved(store.reserve(&request(&name("released", key), 1)).unwrap()).release().unwrap();
            // Released only at its second attempt, so that an older reservation is to be masked.
            drop(reserved(store.reserve(&request(&name("released late", key), 1)).unwrap()));
            interrupted(store.reserve(&request(&name("released late", key), 1)).unwrap()).release().unwrap();
        }
        for key in 0..5 {
            complete(&store, &kept_for(&name("erased", key), DAY));
            drop(reserved(store.reserve(&request(&name("erased unfinished", key), 1)).unwrap()));
            assert_eq!(store.erase(&request(&name("erased", key), 1)).unwrap().keys, 1);
            assert_eq!(store.erase(&request(&name("erased unfinished", key), 1)).unwrap().keys, 1);
        }
        clock.advance(SECOND);
        while store.maintain(1_000).unwrap().has_more {}
        if close {
            store.close().unwrap();
        } else {
            drop(store);
        }
        for _ in 0..3 {
            let store = builder.clone().open(dir.path()).unwrap();
            assert_eq!((store.recovery().completed, store.recovery().interrupted), (300, 0));
            for key in 0..300 {
                for kind in ["expired", "released", "released late", "erased", "erased unfinished"] {
                    assert!(store.get(&request(&name(kind, key), 1)).unwrap().is_none(), "{kind} {key}");
                }
                assert!(store.get(&request(&name("kept", key), 1)).unwrap().is_some());
            }
            while store.maintain(1_000).unwrap().has_more {}
            assert_eq!(store.stats().keys, 300);
        }
        let store = builder.clone().open(dir.path()).unwrap();
        for key in 0..5 {
            for kind in ["expired", "released", "released late", "erased", "erased unfinished"] {
                reserved(store.reserve(&request(&name(kind, key), 2)).unwrap()).release().unwrap();
            }
        }
    }
}

#[test]
fn an_expired_answer_stays_forgotten_when_the_clock_is_set_back_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, builder) = manual();
    let store = builder.clone().open(dir.path()).unwrap();
    complete(&store, &kept_for("a", SECOND));
    clock.advance(SECOND);
    // The key's next life says that the first one is over.
    reserved(store.reserve(&request("a", 2)).unwrap()).release().unwrap();
    drop(store);
    clock.set(START_MS);
    let store = builder.open(dir.path()).unwrap();
    assert!(store.get(&request("a", 1)).unwrap().is_none());
    drop(reserved(store.reserve(&request("a", 3)).unwrap()));
}
