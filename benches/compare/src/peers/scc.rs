//! scc's `HashMap` with ahash; owned keys and answers.
//!
//! A request looks the key up first, which takes a shared lock and no copy of the key, and reserves through the entry
//! API. Expired keys are swept by `retain_sync`.

use crate::peer::{Decision, Operation, Peer, Reclaim, Result, Session, Setup};
use crate::workload::Watch;
use ::scc::HashMap;
use ::scc::hash_map::Entry;
use oncekey::Clock;
use std::sync::Arc;

pub struct Scc {
    keys: HashMap<Box<[u8]>, Operation, ahash::RandomState>,
    watch: Arc<Watch>,
}

impl Peer for Scc {
    type Session<'a> = &'a Self;

    fn open(setup: &Setup) -> Result<Self> {
        Ok(Scc { keys: HashMap::default(), watch: Arc::clone(&setup.watch) })
    }

    fn session(&self) -> &Self {
        self
    }

    fn reclaims(&self) -> Option<&dyn Reclaim> {
        Some(self)
    }
}

impl Session for &Scc {
    type Ticket = ();

    #[inline]
    fn reserve(&mut self, key: &[u8], fingerprint: &[u8; 16]) -> Decision<()> {
        let now_ms = self.watch.now_ms();
        if let Some(decision) = self.keys.read_sync(key, |_, found| found.read(fingerprint, now_ms)).flatten() {
            return decision;
        }
        let reserved = Operation::reserved(fingerprint, now_ms);
        match self.keys.entry_sync(key.into()) {
            Entry::Vacant(vacant) => {
                vacant.insert_entry(reserved);
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
        self.keys.update_sync(key, |_, operation| operation.complete(until_ms, answer)).expect("the key is reserved");
    }

    fn holds(&mut self, key: &[u8], fingerprint: &[u8; 16], answer: &[u8]) -> bool {
        self.keys.read_sync(key, |_, found| found.holds(fingerprint, answer)).unwrap_or(false)
    }
}

impl Reclaim for Scc {
    fn reclaim(&self, _keys: u64, _is_alone: bool) {
        let now_ms = self.watch.now_ms();
        self.keys.retain_sync(|_, operation| operation.until_ms > now_ms);
    }
}
