//! moka's synchronous cache with ahash, with room for all keys and an expiry for each entry.
//!
//! `or_insert_with` reserves; completing is an insert, since values are immutable. It expires by a clock of its own, so
//! where expiry is measured everything falls due at one time of the wall clock, and a listener counts. Its upkeep is
//! done by whoever uses the cache, and where nobody does, by `run_pending_tasks`.

use crate::peer::{Decision, Operation, Peer, Reclaim, Result, Session, Setup};
use crate::workload::Watch;
use ::moka::Expiry;
use ::moka::notification::RemovalCause;
use ::moka::sync::Cache;
use oncekey::Clock;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

type Keys = Cache<Vec<u8>, Arc<Operation>, ahash::RandomState>;

pub struct Moka {
    keys: Keys,
    watch: Arc<Watch>,
    expired: Arc<AtomicU64>,
    reclaimed: AtomicU64,
}

/// Each operation until its own end.
struct UntilDue(Arc<Watch>);

impl UntilDue {
    fn left(&self, operation: &Operation) -> Option<Duration> {
        Some(Duration::from_millis(operation.until_ms.saturating_sub(self.0.now_ms())))
    }
}

impl Expiry<Vec<u8>, Arc<Operation>> for UntilDue {
    fn expire_after_create(&self, _: &Vec<u8>, operation: &Arc<Operation>, _: Instant) -> Option<Duration> {
        self.left(operation)
    }

    fn expire_after_update(
        &self,
        _: &Vec<u8>,
        operation: &Arc<Operation>,
        _: Instant,
        _: Option<Duration>,
    ) -> Option<Duration> {
        self.left(operation)
    }
}

impl Peer for Moka {
    type Session<'a> = &'a Self;

    fn open(setup: &Setup) -> Result<Self> {
        let expired = Arc::new(AtomicU64::new(0));
        let mut builder =
            Cache::builder().max_capacity(2 * setup.capacity).expire_after(UntilDue(Arc::clone(&setup.watch)));
        if setup.expires {
            let expired = Arc::clone(&expired);
            builder = builder.eviction_listener(move |_, _, cause| {
                if cause == RemovalCause::Expired {
                    expired.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        Ok(Moka {
            keys: builder.build_with_hasher(ahash::RandomState::new()),
            watch: Arc::clone(&setup.watch),
            expired,
            reclaimed: AtomicU64::new(0),
        })
    }

    fn session(&self) -> &Self {
        self
    }

    fn settle(&self) {
        self.keys.run_pending_tasks();
    }

    fn reclaims(&self) -> Option<&dyn Reclaim> {
        Some(self)
    }
}

impl Session for &Moka {
    type Ticket = ();

    #[inline]
    fn reserve(&mut self, key: &[u8], fingerprint: &[u8; 16]) -> Decision<()> {
        let now_ms = self.watch.now_ms();
        let entry = self.keys.entry_by_ref(key).or_insert_with(|| Arc::new(Operation::reserved(fingerprint, now_ms)));
        if entry.is_fresh() {
            return Decision::Fresh(());
        }
        // It expired between moka's look at its clock and ours.
        entry.value().read(fingerprint, now_ms).unwrap_or(Decision::InFlight)
    }

    #[inline]
    fn complete(&mut self, _ticket: (), key: &[u8], fingerprint: &[u8; 16], answer: &[u8]) {
        let completed = Operation::completed(fingerprint, self.watch.kept_until_ms(), answer);
        self.keys.insert(key.to_vec(), Arc::new(completed));
    }

    fn holds(&mut self, key: &[u8], fingerprint: &[u8; 16], answer: &[u8]) -> bool {
        self.keys.get(key).is_some_and(|found| found.holds(fingerprint, answer))
    }
}

impl Reclaim for Moka {
    fn follows_wall_clock(&self) -> bool {
        true
    }

    fn reclaim(&self, keys: u64, is_alone: bool) {
        let until = self.reclaimed.fetch_add(keys, Ordering::Relaxed) + keys;
        while self.expired.load(Ordering::Relaxed) < until {
            if is_alone {
                self.keys.run_pending_tasks();
            } else {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}
