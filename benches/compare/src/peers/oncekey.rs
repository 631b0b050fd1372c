//! oncekey with its default settings; the reservation is the ticket.
//!
//! Only the clock is another one where expiry is measured.

use crate::cell::Level;
use crate::peer::{Decision, Peer, Reclaim, Result, Session, Setup};
use crate::workload::{Answers, Asked, touch};
use oncekey::{Durability, Fingerprint, Outcome, Request, Reservation, Store};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub struct Oncekey {
    store: Store,
    level: Level,
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
        Ok(Oncekey { store, level: setup.level, reclaimed: AtomicU64::new(0) })
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

    /// A reservation's fence is its position in the journal, which its answers and the reservations share. From the first
    /// reservation of one segment to that of another, all in between was written: exact to a segment, so those are small.
    fn pair_bytes(setup: &Setup) -> Option<f64> {
        const BYTES: u64 = 64 << 20;
        const SEGMENT: u64 = 1 << 20;
        let pairs = BYTES / (setup.answer_len as u64 + 128);
        let store = Store::builder().durability(Durability::Buffered).segment_size(SEGMENT).in_memory().ok()?;
        let (mut session, answers) = (&store, Answers::new(setup.answer_len));
        let (mut segment, mut turns) = (None, Vec::new());
        for i in 0..pairs {
            let asked = Asked::new(i, setup.key_form);
            let decision = Session::reserve(&mut session, asked.key(), &asked.fingerprint);
            let Decision::Fresh(reservation) = decision else { return None };
            let fence = reservation.fence();
            if segment.replace(fence / SEGMENT).is_some_and(|before| before != fence / SEGMENT) {
                turns.push((i, fence));
            }
            reservation.complete(answers.answer(i)).ok()?;
        }
        let ((first, from), (last, to)) = (turns.first()?, turns.last()?);
        (last > first).then(|| (to - from) as f64 / (last - first) as f64)
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
    fn reclaim(&self, keys: u64, _is_alone: bool) {
        let until = self.reclaimed.fetch_add(keys, Ordering::Relaxed) + keys;
        while self.store.stats().expired < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
