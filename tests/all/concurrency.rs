//! Many threads: one winner, no lost wake-up, no stale write.

use crate::support::{START_MS, interrupted, manual, replay, request, reserved};
use oncekey::testing::{DiskOp, SimDisk};
use oncekey::{Builder, Clock, Durability, ErrorKind, ManualClock, Outcome, Pending, Reservation, Store, Wait};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Barrier, Mutex, OnceLock};
use std::task::{Context, Wake, Waker};
use std::time::{Duration, Instant};

/// How long anything that has to happen may take, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
const MINUTE: Duration = Duration::from_secs(60);

fn in_flight(store: &Store, key: &str) -> Pending {
    match store.reserve(&request(key, 1)).unwrap() {
        Outcome::InFlight(pending) => pending,
        other => panic!("expected an operation in flight, got {other:?}"),
    }
}

#[test]
fn one_of_many_callers_wins_in_each_of_ten_thousand_rounds() {
    const THREADS: u64 = 4;
    const ROUNDS: u64 = 10_000;
    let (_, builder) = manual();
    let store = builder.segment_size(1 << 20).in_memory().unwrap();
    let (wins, barrier) = (AtomicU64::new(0), Barrier::new(THREADS as usize));
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (store, wins, barrier) = (&store, &wins, &barrier);
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let key = round.to_string();
                    // Together at times; in between the threads drift apart, for other interleavings.
                    if round % 16 == 0 {
                        barrier.wait();
                    }
                    match store.reserve(&request(&key, 1)).unwrap() {
                        Outcome::Reserved(owner) => {
                            wins.fetch_add(1, Ordering::Relaxed);
                            owner.complete(thread.to_le_bytes()).unwrap();
                        }
                        Outcome::InFlight(pending) => {
                            assert!(matches!(pending.wait(PATIENCE).unwrap(), Wait::Replay(_)));
                        }
                        Outcome::Replay(record) => assert_eq!(record.bytes().len(), 8),
                        other => panic!("{other:?}"),
                    }
                }
            });
        }
    });
    assert_eq!(wins.into_inner(), ROUNDS);
    let stats = store.stats();
    assert_eq!((stats.reserved, stats.completed, stats.interrupted), (ROUNDS, ROUNDS, 0));
}

#[test]
fn under_contention_no_write_of_a_stale_owner_counts() {
    const TURNS: usize = 4_000;
    let (clock, builder) = manual();
    let store = builder.lease(Duration::from_millis(2)).in_memory().unwrap();
    // All that ever were owners of the one key, to be tried again at any time.
    let stale: Mutex<Vec<Reservation>> = Mutex::default();
    let newest = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (store, stale, clock, newest) = (&store, &stale, &clock, &newest);
            scope.spawn(move || {
                for turn in 0..TURNS {
                    match store.reserve(&request("a", 1)).unwrap() {
                        Outcome::Reserved(owner) | Outcome::Interrupted(owner) => {
                            let before = newest.fetch_max(owner.fence(), Ordering::SeqCst);
                            assert_ne!(before, owner.fence());
                            stale.lock().unwrap().push(owner);
                        }
                        Outcome::InFlight(_) => clock.advance(Duration::from_millis(1)),
                        other => panic!("{other:?}"),
                    }
                    let mut guards = stale.lock().unwrap();
                    if guards.is_empty() {
                        continue;
                    }
                    let at = (turn * 7 + thread) % guards.len();
                    let mut owner = guards.swap_remove(at);
                    drop(guards);
                    let newest_before = newest.load(Ordering::SeqCst);
                    let fence = owner.fence();
                    let kept = match turn % 16 {
                        0 | 5 => owner.renew().map(|()| Some(owner)),
                        3 | 10 => owner.recovery_point(b"point").map(|()| Some(owner)),
                        7 => owner.release().map(|()| None).map_err(|refused| refused.error),
                        _ => Ok(Some(owner)),
                    };
                    match kept {
                        Ok(owner) => {
                            let wrote = matches!(turn % 16, 0 | 3 | 5 | 7 | 10);
                            assert!(
                                !wrote || fence >= newest_before,
                                "{fence} wrote after {newest_before} was handed out"
                            );
                            stale.lock().unwrap().extend(owner);
                        }
                        Err(error) => assert!(error.is_fenced(), "{error}"),
                    }
                }
            });
        }
    });
    let stats = store.stats();
    assert!(stats.taken_over > 100 && stats.fenced > 100, "{stats:?}");
    store.verify().unwrap();
    let newest = newest.into_inner();
    let mut may_write = 0;
    for owner in stale.into_inner().unwrap() {
        let fence = owner.fence();
        match owner.complete(fence.to_string()) {
            Ok(_) => {
                assert_eq!(fence, newest);
                may_write += 1;
            }
            Err(refused) => assert!(refused.error.is_fenced()),
        }
    }
    assert!(may_write <= 1);
}

/// Waiters of both sorts for the key `a`, each in a thread of its own.
struct Waiters {
    answers: Receiver<Result<&'static str, ErrorKind>>,
    count: usize,
}

impl Waiters {
    fn park(store: &Store) -> Waiters {
        let (said, answers) = channel();
        let count = 6;
        for at in 0..count {
            let (said, pending) = (said.clone(), in_flight(store, "a"));
            std::thread::spawn(move || {
                let wait =
                    if at % 2 == 0 { pending.wait(10 * MINUTE) } else { pollster::block_on(pending.wait_async()) };
                let answer = wait.map_err(|error| error.kind()).map(|wait| match wait {
                    Wait::Replay(_) => "replay",
                    Wait::Retry => "retry",
                    Wait::TimedOut(_) => "timed out",
                });
                said.send(answer).ok();
            });
        }
        Waiters { answers, count }
    }

    /// Every one of them has to come back with this.
    #[track_caller]
    fn all_get(self, expected: Result<&'static str, ErrorKind>) {
        for at in 0..self.count {
            let answer = self.answers.recv_timeout(PATIENCE);
            assert_eq!(answer.unwrap_or_else(|_| panic!("{} of {} sleep on", self.count - at, self.count)), expected);
        }
    }
}

/// Lets waiters wait for a key's owner, ends the wait by `act`, and looks at what they get.
///
/// They get it whether they were asleep already or not: rounds without and with a pause cover both.
#[track_caller]
fn assert_woken(
    builder: &Builder,
    act: impl Fn(&Store, &ManualClock, Reservation),
    clock: &ManualClock,
    expected: Result<&'static str, ErrorKind>,
) {
    for round in 0..20 {
        let store = builder.clone().in_memory().unwrap();
        let owner = reserved(store.reserve(&request("a", 1)).unwrap());
        let waiters = Waiters::park(&store);
        for _ in 0..round * 20 {
            std::thread::yield_now();
        }
        act(&store, clock, owner);
        waiters.all_get(expected);
    }
}

#[test]
fn waiters_are_woken_by_an_answer() {
    let (clock, builder) = manual();
    assert_woken(&builder, |_, _, owner| drop(owner.complete(b"x").unwrap()), &clock, Ok("replay"));
    assert_woken(&builder, |_, _, owner| drop(owner.fail(b"x").unwrap()), &clock, Ok("replay"));
}

#[test]
fn waiters_are_woken_by_a_release() {
    let (clock, builder) = manual();
    assert_woken(&builder, |_, _, owner| owner.release().unwrap(), &clock, Ok("retry"));
}

#[test]
fn waiters_are_woken_by_an_owner_that_vanishes() {
    let (clock, builder) = manual();
    assert_woken(&builder, |_, _, owner| drop(owner), &clock, Ok("retry"));
}

#[test]
fn waiters_are_woken_by_the_end_of_the_lease() {
    let (clock, builder) = manual();
    let lapse = |store: &Store, clock: &ManualClock, owner: Reservation| {
        clock.advance(MINUTE);
        store.maintain(usize::MAX).unwrap();
        assert!(matches!(store.reserve(&request("a", 1)).unwrap(), Outcome::Interrupted(_)));
        drop(owner);
    };
    assert_woken(&builder, lapse, &clock, Ok("retry"));
}

#[test]
fn waiters_are_woken_by_the_next_caller_who_finds_the_lease_over() {
    let (clock, builder) = manual();
    let take_over = |store: &Store, clock: &ManualClock, owner: Reservation| {
        clock.advance(MINUTE);
        let next = interrupted(store.reserve(&request("a", 1)).unwrap());
        drop(owner);
        next.complete(b"x").unwrap();
    };
    // They waited for the first owner, so they are to look again, whatever became of the second.
    assert_woken(&builder, take_over, &clock, Ok("retry"));
}

#[test]
fn waiters_are_woken_by_an_erasure() {
    let (clock, builder) = manual();
    let erase = |store: &Store, _: &ManualClock, owner: Reservation| {
        store.erase(&request("a", 1)).unwrap();
        assert!(owner.complete(b"x").unwrap_err().error.is_fenced());
    };
    assert_woken(&builder, erase, &clock, Ok("retry"));
}

#[test]
fn waiters_are_woken_by_close_though_the_owner_stays() {
    let (_, builder) = manual();
    for round in 0..100 {
        let store = builder.clone().in_memory().unwrap();
        let owner = reserved(store.reserve(&request("a", 1)).unwrap());
        let waiters = Waiters::park(&store);
        for _ in 0..round {
            std::thread::yield_now();
        }
        store.close().unwrap();
        waiters.all_get(Err(ErrorKind::Closed));
        drop(owner);
    }
}

#[test]
fn the_last_handle_may_be_dropped_while_others_wait() {
    let (_, builder) = manual();
    let store = builder.background(true).in_memory().unwrap();
    let owner = reserved(store.reserve(&request("a", 1)).unwrap());
    let waiters = Waiters::park(&store);
    drop(store);
    owner.complete(b"x").unwrap();
    waiters.all_get(Ok("replay"));
}

/// Runs this in a thread of its own, which may hang.
#[track_caller]
fn within_patience(what: &str, run: impl FnOnce() + Send + 'static) {
    let (said, done) = channel();
    std::thread::spawn(move || {
        run();
        said.send(()).unwrap();
    });
    assert_eq!(done.recv_timeout(PATIENCE), Ok(()), "{what}");
}

/// Without upkeep, and without anybody who asks for the key meanwhile.
#[test]
fn a_wait_ends_with_the_lease_that_it_waits_for() {
    within_patience("a wait outlasts the lease", || {
        let store = Store::builder().background(false).in_memory().unwrap();
        let owner = reserved(store.reserve(&request("a", 1).lease(Duration::from_millis(20))).unwrap());
        let wait = in_flight(&store, "a").wait(100 * PATIENCE).unwrap();
        assert!(matches!(wait, Wait::Retry), "{wait:?}");
        drop(owner);
    });
}

#[test]
fn the_newest_waker_is_called_and_none_is_kept() {
    struct Counts(AtomicU64);
    impl Wake for Counts {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let store = manual().1.in_memory().unwrap();
    let owner = reserved(store.reserve(&request("a", 1)).unwrap());
    let wakers = [(); 3].map(|()| Arc::new(Counts(AtomicU64::new(0))));
    let mut wait = Box::pin(in_flight(&store, "a").wait_async());
    let mut given_up = Box::pin(in_flight(&store, "a").wait_async());
    for waker in &wakers[..2] {
        let waker = Waker::from(Arc::clone(waker));
        assert!(wait.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    }
    assert!(given_up.as_mut().poll(&mut Context::from_waker(&Waker::from(Arc::clone(&wakers[2])))).is_pending());
    drop(given_up);
    assert_eq!(wakers.each_ref().map(Arc::strong_count), [1, 2, 1]);
    owner.release().unwrap();
    assert_eq!(wakers.each_ref().map(|waker| waker.0.load(Ordering::SeqCst)), [0, 1, 0]);
    assert_eq!(wakers.each_ref().map(Arc::strong_count), [1; 3]);
}

/// A waker that uses the store when it is called and when it is dropped.
struct Looks(Store);

impl Looks {
    fn look(&self) {
        self.0.stats();
        drop(self.0.get(&request("a", 1)));
        // Those that keep upkeep out meanwhile.
        drop(self.0.verify());
        drop(self.0.erase(&request("another", 1)));
    }
}

impl Wake for Looks {
    fn wake(self: Arc<Self>) {
        self.look();
    }
}

impl Drop for Looks {
    fn drop(&mut self) {
        self.look();
    }
}

/// A waker that panics, which is no matter of the others.
struct Panics;

impl Wake for Panics {
    fn wake(self: Arc<Self>) {
        panic!("a waker that panics, as the test wants it");
    }
}

/// An executor that polls its future in `wake`.
struct Inline(Mutex<Option<Pin<Box<dyn Future<Output = ()> + Send>>>>);

impl Wake for Inline {
    fn wake(self: Arc<Self>) {
        let waker = Waker::from(Arc::clone(&self));
        let mut slot = self.0.lock().unwrap();
        if slot.as_mut().is_some_and(|future| future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready()) {
            *slot = None;
        }
    }
}

/// A defect once: wakers were called under a lock of the store.
#[test]
fn wakers_may_use_the_store_however_the_wait_ends() {
    type End = fn(&Store, &ManualClock, Reservation);
    let ends: [(&str, End); 6] = [
        ("complete", |_, _, owner| drop(owner.complete(b"x").unwrap())),
        ("release", |_, _, owner| owner.release().unwrap()),
        ("drop", |_, _, owner| drop(owner)),
        ("erase", |store, _, _owner| assert_eq!(store.erase(&request("a", 1)).unwrap().keys, 1)),
        ("the lease's end", |store, clock, owner| {
            clock.advance(MINUTE);
            store.maintain(usize::MAX).unwrap();
            drop(owner);
        }),
        ("close", |store, _, owner| {
            store.clone().close().unwrap();
            drop(owner);
        }),
    ];
    for (end, run) in ends {
        within_patience(end, move || {
            let (clock, builder) = manual();
            let store = builder.lease(MINUTE).in_memory().unwrap();
            let owner = reserved(store.reserve(&request("a", 1)).unwrap());
            let inline = Arc::new(Inline(Mutex::new(None)));
            let pending = in_flight(&store, "a");
            *inline.0.lock().unwrap() = Some(Box::pin(async move { drop(pending.wait_async().await) }));
            Waker::from(Arc::clone(&inline)).wake();
            let mut waits = [(); 3].map(|()| Box::pin(in_flight(&store, "a").wait_async()));
            for wait in &mut waits {
                // Twice, so that the second waker takes the first one's place.
                for _ in 0..2 {
                    let waker = Waker::from(Arc::new(Looks(store.clone())));
                    assert!(wait.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
                }
            }
            let [first, mut second, third] = waits;
            assert!(second.as_mut().poll(&mut Context::from_waker(&Waker::from(Arc::new(Panics)))).is_pending());
            let mut given_up = Box::pin(in_flight(&store, "a").wait_async());
            let waker = Waker::from(Arc::new(Looks(store.clone())));
            assert!(given_up.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            drop(given_up);
            run(&store, &clock, owner);
            assert!(inline.0.lock().unwrap().is_none(), "the inline executor's future has ended");
            for wait in [first, second, third] {
                drop(pollster::block_on(wait));
            }
        });
    }
}

/// A defect once: a key that was just being written hid those behind it that share its hash.
#[test]
fn a_completed_key_is_always_found_beside_one_of_its_hash_that_is_being_taken_over() {
    let (_, builder) = manual();
    let store = builder.segment_size(1 << 20).fixed_hash(7).in_memory().unwrap();
    drop(reserved(store.reserve(&request("taken over", 1)).unwrap()));
    for key in ["a", "b", "c"] {
        reserved(store.reserve(&request(key, 1)).unwrap()).complete(b"x").unwrap();
    }
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let mut owner = interrupted(store.reserve(&request("taken over", 1)).unwrap());
                owner.recovery_point([7; 50_000]).unwrap();
                drop(owner);
                store.maintain(100).unwrap();
            }
        });
        for turn in 0..20_000 {
            let found = store.get(&request(["a", "b", "c"][turn % 3], 1)).unwrap().is_some();
            if !found {
                is_over.store(true, Ordering::Relaxed);
            }
            assert!(found, "in turn {turn}");
        }
        is_over.store(true, Ordering::Relaxed);
    });
}

/// A defect once: the store's own thread waited for itself.
#[test]
fn the_last_handle_may_go_in_a_waker_that_the_stores_own_thread_calls() {
    for closes in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (clock, builder) = manual();
        let store = builder.clone().background(true).lease(MINUTE).open(dir.path()).unwrap();
        let owner = reserved(store.reserve(&request("a", 1)).unwrap());
        let pending = in_flight(&store, "a");
        let (said, done) = channel();
        let inline = Arc::new(Inline(Mutex::new(None)));
        *inline.0.lock().unwrap() = Some(Box::pin(async move {
            drop(pending.wait_async().await);
            if closes {
                store.close().unwrap();
            } else {
                drop(store);
            }
            said.send(()).unwrap();
        }));
        Waker::from(Arc::clone(&inline)).wake();
        clock.advance(MINUTE);
        assert_eq!(done.recv_timeout(PATIENCE), Ok(()));
        drop((owner, inline));
        // The thread that called the waker is just about to end.
        let until = Instant::now() + PATIENCE;
        let store = loop {
            match builder.clone().open(dir.path()) {
                Ok(store) => break store,
                Err(error) => assert!(error.kind() == ErrorKind::Locked && Instant::now() < until, "{error}"),
            }
            std::thread::yield_now();
        };
        assert_eq!(store.recovery().interrupted, 1);
    }
}

/// A clock that uses the store it belongs to.
#[derive(Default)]
struct Nosy(OnceLock<Store>);

impl Clock for Nosy {
    fn now_ms(&self) -> u64 {
        if let Some(store) = self.0.get() {
            store.stats();
        }
        START_MS
    }
}

#[test]
fn a_clock_may_use_the_store() {
    within_patience("every operation reads the clock", || {
        let clock = Arc::new(Nosy::default());
        let store = Store::builder().clock(Arc::clone(&clock)).background(false).in_memory().unwrap();
        clock.0.set(store.clone()).unwrap();
        let mut owner = reserved(store.reserve(&request("a", 1)).unwrap());
        owner.renew().unwrap();
        owner.recovery_point(b"x").unwrap();
        drop(in_flight(&store, "a").wait(Duration::ZERO).unwrap());
        owner.complete(b"x").unwrap();
        replay(store.reserve(&request("a", 1)).unwrap());
        store.get(&request("a", 1)).unwrap().unwrap();
        store.erase(&request("a", 1)).unwrap();
        store.maintain(usize::MAX).unwrap();
        store.verify().unwrap();
    });
}

#[test]
fn many_threads_share_syncs_and_lose_nothing() {
    const THREADS: usize = 16;
    const KEYS: usize = 40;
    let dir = tempfile::tempdir().unwrap();
    let (_, builder) = manual();
    let builder = builder.durability(Durability::Synced).background(true);
    let store = builder.clone().open(dir.path()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let store = &store;
            scope.spawn(move || {
                for key in 0..KEYS {
                    let key = format!("{thread}/{key}");
                    reserved(store.reserve(&request(&key, 1)).unwrap()).complete(key.repeat(50)).unwrap();
                }
            });
        }
    });
    assert_eq!(store.stats().completed, (THREADS * KEYS) as u64);
    drop(store);
    let store = builder.open(dir.path()).unwrap();
    for thread in 0..THREADS {
        for key in 0..KEYS {
            let key = format!("{thread}/{key}");
            assert_eq!(replay(store.reserve(&request(&key, 1)).unwrap()).bytes(), key.repeat(50).as_bytes());
        }
    }
    store.verify().unwrap();
}

#[test]
fn a_failed_sync_wakes_everybody_with_poisoned_and_reads_go_on() {
    for failing in 0..6 {
        let (_, builder) = manual();
        let disk = SimDisk::new();
        let store = builder.clone().durability(Durability::Synced).open_simulated(&disk).unwrap();
        reserved(store.reserve(&request("before", 1)).unwrap()).complete(b"x").unwrap();
        disk.fail(DiskOp::Sync, failing * 3, io::ErrorKind::Other);
        let acknowledged: Mutex<Vec<String>> = Mutex::default();
        let (said, answers) = channel();
        for thread in 0..12 {
            let (said, store) = (said.clone(), store.clone());
            std::thread::spawn(move || {
                let mut done = Vec::new();
                let error = loop {
                    let key = format!("{thread}/{}", done.len());
                    let owner = match store.reserve(&request(&key, 1)) {
                        Ok(Outcome::Reserved(owner)) => owner,
                        Ok(other) => panic!("{other:?}"),
                        Err(error) => break error,
                    };
                    match owner.complete(key.as_bytes()) {
                        Ok(_) => done.push(key),
                        Err(refused) => break refused.error,
                    }
                };
                said.send((error.kind(), done)).ok();
            });
        }
        for _ in 0..12 {
            let (kind, done) = answers.recv_timeout(PATIENCE).expect("a waiter sleeps on after a failed sync");
            assert_eq!(kind, ErrorKind::Poisoned);
            acknowledged.lock().unwrap().extend(done);
        }
        assert!(store.stats().is_poisoned);
        assert_eq!(store.reserve(&request("after", 1)).unwrap_err().kind(), ErrorKind::Poisoned);
        assert_eq!(store.sync().unwrap_err().kind(), ErrorKind::Poisoned);
        let acknowledged = acknowledged.into_inner().unwrap();
        for key in &acknowledged {
            assert_eq!(replay(store.reserve(&request(key, 1)).unwrap()).bytes(), key.as_bytes());
        }
        assert_eq!(store.get(&request("before", 1)).unwrap().unwrap().bytes(), b"x");
        assert!(store.get(&request("after", 1)).unwrap().is_none());
        drop(store);
        // What was acknowledged survives the power cut that may follow, too.
        for keep in [false, true] {
            let store = builder.clone().open_simulated(&disk.after_power_cut(|| keep)).unwrap();
            for key in &acknowledged {
                assert_eq!(replay(store.reserve(&request(key, 1)).unwrap()).bytes(), key.as_bytes());
            }
        }
    }
}

#[test]
fn callers_waiting_for_an_answer_return_when_its_write_fails() {
    let (_, builder) = manual();
    let disk = SimDisk::new();
    let store = builder.open_simulated(&disk).unwrap();
    let owner = reserved(store.reserve(&request("a", 1)).unwrap());
    let waiters = Waiters::park(&store);
    disk.fail(DiskOp::Append, 0, io::ErrorKind::Other);
    let refused = owner.complete(b"x").unwrap_err();
    assert_eq!(refused.error.kind(), ErrorKind::Poisoned);
    drop(refused);
    waiters.all_get(Ok("retry"));
}

#[test]
fn upkeep_erasure_and_callers_get_along() {
    let (clock, builder) = manual();
    let dir = tempfile::tempdir().unwrap();
    let store = builder.clone().lease(Duration::from_secs(5)).open(dir.path()).unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..3)
            .map(|thread| {
                let store = &store;
                scope.spawn(move || {
                    for turn in 0..6_000_u32 {
                        let key = format!("{}/{}", thread, turn % 97);
                        let scoped = request(&key, 1)
                            .scope(if turn % 2 == 0 { "kept" } else { "erased" })
                            .retention(oncekey::Retention::For(Duration::from_secs(u64::from(turn % 50) + 1)));
                        match store.reserve(&scoped).unwrap() {
                            Outcome::Reserved(owner) | Outcome::Interrupted(owner) => match turn % 5 {
                                0 => drop(owner),
                                1 => {
                                    owner.release().unwrap_or_else(|refused| assert!(refused.error.is_fenced()));
                                }
                                _ => match owner.complete([turn as u8; 300]) {
                                    Ok(record) => assert_eq!(record.bytes(), [turn as u8; 300]),
                                    Err(refused) => assert!(refused.error.is_fenced(), "{}", refused.error),
                                },
                            },
                            Outcome::Replay(record) => {
                                assert!(record.bytes().iter().all(|byte| *byte == record.bytes()[0]));
                                assert_eq!(record.bytes().len(), 300);
                            }
                            other => panic!("{other:?}"),
                        }
                    }
                })
            })
            .collect();
        let (store, clock, is_over) = (&store, &clock, &is_over);
        scope.spawn(move || {
            while !is_over.load(Ordering::Acquire) {
                clock.advance(Duration::from_millis(20));
                store.maintain(500).unwrap();
            }
        });
        scope.spawn(move || {
            while !is_over.load(Ordering::Acquire) {
                store.erase_scope("erased").unwrap();
                store.erase(&request("0/2", 1).scope("kept")).unwrap();
                store.verify().unwrap();
            }
        });
        for caller in callers {
            let answer = caller.join();
            if answer.is_err() {
                is_over.store(true, Ordering::Release);
            }
            answer.unwrap();
        }
        is_over.store(true, Ordering::Release);
    });
    store.erase_scope("erased").unwrap();
    // Let go of what is over, so that all that is counted lives. Records of keys that ended earlier may still be in the
    // journal, where recovery finds them expired.
    while store.maintain(usize::MAX).unwrap().has_more {}
    let keys = store.stats().keys;
    drop(store);
    let store = builder.open(dir.path()).unwrap();
    assert_eq!(store.recovery().completed + store.recovery().interrupted, keys);
    assert_eq!(store.stats().keys, keys);
    assert_eq!(store.erase_scope("erased").unwrap().keys, 0);
}

#[test]
fn handles_can_go_to_other_threads() {
    fn is_send<T: Send>() {}
    fn is_sync<T: Sync>() {}
    is_send::<Store>();
    is_sync::<Store>();
    is_send::<Reservation>();
    is_send::<Pending>();
    is_send::<oncekey::Record>();
    is_sync::<oncekey::Record>();
    is_send::<Arc<oncekey::Error>>();
}
