//! quick_cache with ahash, with room for all keys.
//!
//! `get_value_or_guard` reserves: whoever gets the guard puts the reservation in. It has no expiry of its own.

use crate::peer::{Decision, Operation, Peer, Result, Session, Setup};
use crate::workload::Watch;
use ::quick_cache::sync::{Cache, DefaultLifecycle, GuardResult};
use ::quick_cache::{OptionsBuilder, UnitWeighter};
use oncekey::Clock;
use std::sync::Arc;

type Keys = Cache<Vec<u8>, Arc<Operation>, UnitWeighter, ahash::RandomState>;

pub struct QuickCache {
    keys: Keys,
    watch: Arc<Watch>,
}

impl Peer for QuickCache {
    type Session<'a> = &'a Self;

    fn open(setup: &Setup) -> Result<Self> {
        // Its shards don't fill evenly; it must not evict.
        let options = OptionsBuilder::new()
            .estimated_items_capacity(setup.capacity as usize)
            .weight_capacity(2 * setup.capacity)
            .build()
            .map_err(|error| format!("{error:?}"))?;
        let keys = Keys::with_options(options, UnitWeighter, ahash::RandomState::new(), DefaultLifecycle::default());
        Ok(QuickCache { keys, watch: Arc::clone(&setup.watch) })
    }

    fn session(&self) -> &Self {
        self
    }
}

impl Session for &QuickCache {
    type Ticket = ();

    #[inline]
    fn reserve(&mut self, key: &[u8], fingerprint: &[u8; 16]) -> Decision<()> {
        let now_ms = self.watch.now_ms();
        loop {
            match self.keys.get_value_or_guard(key, None) {
                GuardResult::Guard(guard) => {
                    // Fails only if the key was removed meanwhile, which nobody does.
                    return match guard.insert(Arc::new(Operation::reserved(fingerprint, now_ms))) {
                        Ok(()) => Decision::Fresh(()),
                        Err(_) => Decision::InFlight,
                    };
                }
                GuardResult::Value(found) => match found.read(fingerprint, now_ms) {
                    Some(decision) => return decision,
                    None => drop(self.keys.remove(key)),
                },
                GuardResult::Timeout => unreachable!("no limit was set"),
            }
        }
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
