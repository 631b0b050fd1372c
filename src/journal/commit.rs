//! Group commit: many callers wait for one sync.
//!
//! Syncs come in rounds. The first caller that finds none running leads one: it notes up to where records are published,
//! syncs, and wakes exactly those whom the round covers, and one of those who came too late for it, who leads the
//! next. Nobody else is woken, so that sixty-four waiters don't fight over the lock at each sync.
//!
//! - **G1** A round covers only what was published before its sync began.
//! - **G2** The first failed sync poisons the journal and wakes everybody with an error. It is never tried again: the
//!   kernel may have marked the pages clean, and a second sync would lie.
//!   Another segment's sync may be the one that failed: whoever finds out wakes the rest.
//! - **G3** Waiters of round r sleep on condition r mod 2. When r ends they are all woken, so that the condition is empty
//!   when waiters of r + 2 come to it.

use crate::error::Error;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Condvar, Mutex, MutexGuard};
use std::io;
use std::sync::OnceLock;

/// The first failure of a journal, after which it promises nothing more.
#[derive(Debug, Default)]
pub(crate) struct Poison(OnceLock<String>);

impl Poison {
    pub(crate) fn set(&self, doing: &str, error: &io::Error) {
        // Only the first failure counts; later ones follow from it.
        self.0.set(format!("{doing}: {error}")).ok();
    }

    #[inline]
    pub(crate) fn check(&self) -> Result<(), Error> {
        match self.0.get() {
            None => Ok(()),
            Some(reason) => Err(Error::poisoned(reason)),
        }
    }

    pub(crate) fn is_set(&self) -> bool {
        self.0.get().is_some()
    }
}

#[derive(Debug)]
pub(crate) struct GroupCommit {
    /// Offset below which all is durable.
    durable: AtomicU64,
    rounds: Mutex<Rounds>,
    ended: [Condvar; 2],
}

#[derive(Debug, Default)]
struct Rounds {
    round: usize,
    syncing: bool,
    /// What the running round covers.
    covers: u64,
}

impl GroupCommit {
    pub(crate) fn new(durable: u64) -> Self {
        GroupCommit { durable: AtomicU64::new(durable), rounds: Mutex::default(), ended: Default::default() }
    }

    /// Acquire pairs with the release at a round's end: who sees the offset knows that the sync returned.
    pub(crate) fn durable(&self) -> u64 {
        self.durable.load(Ordering::Acquire)
    }

    /// Returns when everything below `target` is durable, and whether this caller led a sync.
    ///
    /// `published` says up to where records are written; `target` is not beyond it.
    pub(crate) fn wait(
        &self,
        target: u64,
        poison: &Poison,
        published: impl Fn() -> u64,
        sync: impl Fn() -> io::Result<()>,
    ) -> Result<bool, Error> {
        if self.durable() >= target {
            return Ok(false);
        }
        let mut led = false;
        let mut rounds = self.rounds.lock();
        while self.durable() < target {
            poison.check().inspect_err(|_| self.wake_all())?;
            if rounds.syncing {
                let round = if target <= rounds.covers { rounds.round } else { rounds.round + 1 };
                self.ended[round % 2].wait(&mut rounds);
                continue;
            }
            led = true;
            let covers = published();
            // What could not be written counts as published too.
            poison.check().inspect_err(|_| self.wake_all())?;
            (rounds.syncing, rounds.covers) = (true, covers);
            let answer = MutexGuard::unlocked(&mut rounds, &sync);
            rounds.syncing = false;
            match &answer {
                Ok(()) => self.durable.store(rounds.covers, Ordering::Release),
                Err(_) if planted!(SyncRetried) => {}
                Err(error) => poison.set("sync", error),
            }
            self.ended[rounds.round % 2].notify_all();
            rounds.round += 1;
            // After a failure this caller is about to find the poison, and wakes the others.
            if !planted!(LeaderNotWoken) {
                self.ended[rounds.round % 2].notify_one();
            }
        }
        Ok(led)
    }

    fn wake_all(&self) {
        for ended in &self.ended {
            ended.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    /// Log with a slow "device": the sync copies what was published at its start to what is durable at its end.
    #[derive(Default)]
    struct Device {
        published: AtomicU64,
        synced: AtomicU64,
        syncs: AtomicU64,
        broken: AtomicBool,
    }

    impl Device {
        fn sync(&self) -> io::Result<()> {
            let reached = self.published.load(Ordering::SeqCst);
            self.syncs.fetch_add(1, Ordering::SeqCst);
            thread::yield_now();
            if self.broken.load(Ordering::SeqCst) {
                return Err(io::Error::other("the device is gone"));
            }
            self.synced.fetch_max(reached, Ordering::SeqCst);
            Ok(())
        }
    }

    /// What could not be written is published nevertheless, and poisons first.
    #[test]
    fn nothing_is_synced_that_was_published_by_a_write_that_failed_meanwhile() {
        let (device, commit, poison) = (Device::default(), GroupCommit::new(0), Poison::default());
        let published = || {
            poison.set("write a record", &io::Error::other("the device is gone"));
            2
        };
        assert!(commit.wait(1, &poison, published, || device.sync()).is_err());
        assert_eq!((commit.durable(), device.syncs.into_inner()), (0, 0));
    }

    #[test]
    fn nobody_returns_before_a_sync_that_covers_it() {
        let (device, commit, poison) = (Device::default(), GroupCommit::new(0), Poison::default());
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let mine = device.published.fetch_add(1, Ordering::SeqCst) + 1;
                        let published = || device.published.load(Ordering::SeqCst);
                        commit.wait(mine, &poison, published, || device.sync()).unwrap();
                        assert!(device.synced.load(Ordering::SeqCst) >= mine);
                    }
                });
            }
        });
        assert_eq!(commit.durable(), 4000);
        assert!(device.syncs.load(Ordering::SeqCst) <= 4000);
    }

    /// The one who was woken to lead the next round found the poison, and left the others of it asleep.
    #[test]
    fn poison_from_elsewhere_wakes_every_waiter() {
        for _ in 0..50 {
            let (commit, poison, published) = (&GroupCommit::new(0), &Poison::default(), &AtomicU64::new(1));
            let sync = move || {
                // Time for the others to fall asleep; if they don't, this shows less, but nothing wrong.
                while published.load(Ordering::SeqCst) < 4 {
                    thread::yield_now();
                }
                (0..200).for_each(|_| thread::yield_now());
                poison.set("elsewhere", &io::ErrorKind::Other.into());
                Ok(())
            };
            thread::scope(|scope| {
                // A round covers the first only.
                let wait = move |target| commit.wait(target, poison, || 1, sync);
                scope.spawn(move || wait(1));
                for _ in 0..3 {
                    let target = move || published.fetch_add(1, Ordering::SeqCst) + 1;
                    scope.spawn(move || assert!(wait(target()).is_err()));
                }
            });
        }
    }

    #[test]
    fn a_failed_sync_wakes_every_waiter_with_an_error() {
        let (device, commit, poison) = (Device::default(), GroupCommit::new(0), Poison::default());
        let failures = AtomicU64::new(0);
        thread::scope(|scope| {
            for thread in 0..8 {
                let (device, commit, poison, failures) = (&device, &commit, &poison, &failures);
                scope.spawn(move || {
                    for turn in 0..500 {
                        if thread == 0 && turn == 100 {
                            device.broken.store(true, Ordering::SeqCst);
                        }
                        let mine = device.published.fetch_add(1, Ordering::SeqCst) + 1;
                        let published = || device.published.load(Ordering::SeqCst);
                        match commit.wait(mine, poison, published, || device.sync()) {
                            Ok(_) => assert!(device.synced.load(Ordering::SeqCst) >= mine),
                            Err(error) => {
                                assert_eq!(error.kind(), crate::ErrorKind::Poisoned);
                                failures.fetch_add(1, Ordering::SeqCst);
                                return;
                            }
                        }
                    }
                });
            }
        });
        assert_eq!(failures.load(Ordering::SeqCst), 8);
    }
}

#[cfg(all(test, oncekey_loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// A log of which a sync makes durable what was published when it began.
    struct Log {
        commit: GroupCommit,
        poison: Poison,
        published: AtomicU64,
        synced: AtomicU64,
    }

    impl Log {
        fn sync(&self) -> io::Result<()> {
            self.synced.store(self.published.load(Ordering::Acquire), Ordering::Release);
            Ok(())
        }

        /// Publishes a record and waits for it.
        fn append(&self, sync: impl Fn() -> io::Result<()>) -> Result<(), Error> {
            let target = self.published.fetch_add(1, Ordering::AcqRel) + 1;
            let published = || self.published.load(Ordering::Acquire);
            self.commit.wait(target, &self.poison, published, sync)?;
            assert!(self.synced.load(Ordering::Acquire) >= target, "told of {target} before it was synced");
            Ok(())
        }
    }

    /// Lets three callers append at the same time. One who is not woken is a deadlock, which loom reports.
    fn model(append: impl Fn(&Log) + Copy + Send + Sync + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.max_branches = 100_000;
        model.check(move || {
            let log = Arc::new(Log {
                commit: GroupCommit::new(0),
                poison: Poison::default(),
                published: AtomicU64::new(0),
                synced: AtomicU64::new(0),
            });
            let callers: Vec<_> = (0..3)
                .map(|_| {
                    let log = Arc::clone(&log);
                    thread::spawn(move || append(&log))
                })
                .collect();
            callers.into_iter().for_each(|caller| caller.join().unwrap());
        });
    }

    #[test]
    fn every_waiter_is_woken_by_the_sync_that_covers_it_or_leads_the_next() {
        model(|log| log.append(|| log.sync()).unwrap());
    }

    #[test]
    fn every_waiter_is_woken_after_a_failed_sync() {
        model(|log| assert!(log.append(|| Err(io::ErrorKind::Other.into())).is_err()));
    }

    /// The sync succeeds for whom it covers, and meanwhile another segment's has failed.
    #[test]
    fn every_waiter_is_woken_by_poison_from_elsewhere() {
        model(|log| {
            let told = log.append(|| {
                log.poison.set("elsewhere", &io::ErrorKind::Other.into());
                log.sync()
            });
            assert!(told.is_ok() || log.poison.is_set());
        });
    }
}
