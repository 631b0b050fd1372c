//! dashmap with ahash; owned keys and answers.
//!
//! A request looks the key up first, which takes a shared lock and no copy of the key, and reserves through the entry
//! API. Expired keys are swept by `retain`.

use crate::peer::{Decision, Operation, Peer, Reclaim, Result, Session, Setup};
use crate::workload::Watch;
use ::dashmap::{DashMap, Entry};
use oncekey::Clock;
use std::sync::Arc;

pub struct Dashmap {
    keys: DashMap<Box<[u8]>, Operation, ahash::RandomState>,
    watch: Arc<Watch>,
}

impl Peer for Dashmap {
    type Session<'a> = &'a Self;

    fn open(setup: &Setup) -> Result<Self> {
        Ok(Dashmap { keys: DashMap::default(), watch: Arc::clone(&setup.watch) })
    }

    fn session(&self) -> &Self {
        self
    }

    fn reclaims(&self) -> Option<&dyn Reclaim> {
        Some(self)
    }
}

impl Session for &Dashmap {
    type Ticket = ();

    #[inline]
    fn reserve(&mut self, key: &[u8], fingerprint: &[u8; 16]) -> Decision<()> {
        let now_ms = self.watch.now_ms();
        if let Some(decision) = self.keys.get(key).and_then(|found| found.read(fingerprint, now_ms)) {
            return decision;
        }
        let reserved = Operation::reserved(fingerprint, now_ms);
        match self.keys.entry(key.into()) {
            Entry::Vacant(vacant) => {
                vacant.insert(reserved);
                Decision::Fresh(())
            }
            Entry::Occupied(mut found) => found.get().read(fingerprint, now_ms).unwrap_or_else(|| {
                found.insert(reserved);
                Decision::Fresh(())
            }),
        }
    }

    #[inline]
    fn complete(&mut self, _ticket: (), key: &[u8], _fingerprint: &[u8; 16], answer: &[u8]) {
        let until_ms = self.watch.kept_until_ms();
        self.keys.get_mut(key).expect("the key is reserved").complete(until_ms, answer);
    }

    fn holds(&mut self, key: &[u8], fingerprint: &[u8; 16], answer: &[u8]) -> bool {
        self.keys.get(key).is_some_and(|found| found.holds(fingerprint, answer))
    }
}

impl Reclaim for Dashmap {
    fn reclaim(&self, _keys: u64, _is_alone: bool) {
        let now_ms = self.watch.now_ms();
        self.keys.retain(|_, operation| operation.until_ms > now_ms);
    }
}
