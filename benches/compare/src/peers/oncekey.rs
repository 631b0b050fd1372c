//! oncekey with its default settings; the reservation is the ticket.
//!
//! Only the clock is another one where expiry is measured.

use crate::cell::Level;
use crate::peer::{Decision, Peer, Reclaim, Result, Session, Setup};
use crate::workload::{Answers, Asked, RETENTION, Watch, touch};
use oncekey::{Durability, Fingerprint, Outcome, Request, Reservation, Store};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub struct Oncekey {
    store: Store,
    level: Level,
    watch: Arc<Watch>,
    reclaimed: AtomicU64,
}

impl Peer for Oncekey {
    type Session<'a> = &'a Store;

    fn open(setup: &Setup) -> Result<Self> {
        let mut builder = Store::builder();
        if setup.expires {
            builder = builder.clock(Arc::clone(&setup.watch));
        }
        let store = match setup.level {
            Level::Memory => builder.in_memory(),
            Level::Kill => builder.durability(Durability::Buffered).open(setup.dir.join("oncekey")),
            Level::Power => builder.durability(Durability::Synced).open(setup.dir.join("oncekey")),
        }?;
        Ok(Oncekey { store, level: setup.level, watch: Arc::clone(&setup.watch), reclaimed: AtomicU64::new(0) })
    }

    fn session(&self) -> &Store {
        &self.store
    }

    fn settle(&self) {
        if self.level != Level::Memory {
            self.store.sync().expect("the store is good");
        }
    }

    fn reclaims(&self) -> Option<&dyn Reclaim> {
        Some(self)
    }

    /// A reservation's fence is its position in the journal, so the fences tell how far a number of pairs moved it.
    /// Segments of 1 MiB, so that the open ones at either end weigh little.
    fn pair_bytes(setup: &Setup) -> Option<f64> {
        const PAIRS: u64 = 300_000;
        let pairs = (PAIRS * 128 / setup.answer_len as u64).max(1_000);
        let len = (setup.answer_len as u64 * 8).next_power_of_two().max(1 << 20);
        let store = Store::builder().durability(Durability::Buffered).segment_size(len).in_memory().ok()?;
        let answers = Answers::new(setup.answer_len);
        let mut fence_of = |i| {
            let asked = Asked::new(i, setup.key_form);
            match (&mut &store).reserve(asked.key(), &asked.fingerprint) {
                Decision::Fresh(reservation) => {
                    let fence = reservation.fence();
                    reservation.complete(answers.answer(i)).ok().map(|_| fence)
                }
                Decision::InFlight | Decision::Replay(_) => None,
            }
        };
        let first = fence_of(0)?;
        let last = (1..=pairs).map(&mut fence_of).last()??;
        Some((last - first) as f64 / pairs as f64)
    }
}

impl Session for &Store {
    type Ticket = Reservation;

    #[inline]
    fn reserve(&mut self, key: &[u8], fingerprint: &[u8; 16]) -> Decision<Reservation> {
        let request = Request::new(key).fingerprint(Fingerprint::from_bytes(*fingerprint));
        match Store::reserve(self, &request).expect("the store is good") {
            Outcome::Reserved(reservation) => Decision::Fresh(reservation),
            Outcome::Replay(record) => Decision::Replay(touch(record.bytes())),
            Outcome::InFlight(_) => Decision::InFlight,
            other @ (Outcome::Interrupted(_) | Outcome::Mismatch(_)) => panic!("nobody gave up: {other:?}"),
        }
    }

    #[inline]
    fn complete(&mut self, ticket: Reservation, _key: &[u8], _fingerprint: &[u8; 16], answer: &[u8]) {
        ticket.complete(answer).expect("the store is good");
    }

    fn holds(&mut self, key: &[u8], _fingerprint: &[u8; 16], answer: &[u8]) -> bool {
        let found = self.get(&Request::new(key)).expect("the store is good");
        found.is_some_and(|record| record.bytes() == answer)
    }
}

/// By its own threads, as soon as its clock says so.
impl Reclaim for Oncekey {
    fn fall_due(&self) {
        self.watch.advance(RETENTION + Duration::from_secs(1));
    }

    fn reclaim(&self, keys: u64) {
        let until = self.reclaimed.fetch_add(keys, Ordering::Relaxed) + keys;
        while self.store.stats().expired < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
