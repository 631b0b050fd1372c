//! Operations on a store, each between its two lines of the story.

use crate::story::{Act, Answer, Came, Content, Grant, Line, Log, name_of, scope_of};
use oncekey::{
    Builder, Clock, Durability, Error, ErrorKind, Fingerprint, Outcome, Pending, Record, Request, Reservation,
    Retention, Store, Wait,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, UNIX_EPOCH};

pub struct Client<'l> {
    pub store: Store,
    pub clock: Arc<dyn Clock>,
    log: &'l dyn Log,
    next_op: AtomicU64,
}

/// A key that is ours, and what we asked for it with.
pub struct Owned {
    reservation: Reservation,
    pub key: u64,
    lease: Option<u64>,
}

/// How to ask for a key.
#[derive(Clone, Copy)]
pub struct Asking {
    pub print: u8,
    pub lease: Option<u64>,
    pub durability: Durability,
}

/// What came of asking.
pub enum Asked {
    Owned(Owned),
    Answer(Answer),
    Pending(Pending),
    Neither,
}

impl<'l> Client<'l> {
    /// Opens the store. Operations are numbered from `first_op` on.
    pub fn open(
        builder: Builder,
        dir: &std::path::Path,
        clock: Arc<dyn Clock>,
        log: &'l dyn Log,
        first_op: u64,
    ) -> oncekey::Result<Client<'l>> {
        let store = builder.clock(Arc::clone(&clock)).open(dir)?;
        let recovery = store.recovery();
        if !recovery.lost.is_empty() || !recovery.clock_behind.is_zero() {
            log.line(Line::Wrong(format!("{} lost, e.g. {:?}", recovery.lost.len(), recovery.lost.first())));
        }
        log.line(Line::Open);
        Ok(Client { store, clock, log, next_op: AtomicU64::new(first_op) })
    }

    pub fn reserve(&self, key: u64, asking: Asking) -> Asked {
        let act = Act::Reserve { print: asking.print, lease: asking.lease };
        self.tell(key, act, |_| {
            let (name, scope) = (name_of(key), scope_of(key));
            let mut request = request(&name, &scope).fingerprint(Fingerprint::from_bytes([asking.print; 16]));
            request = match asking.lease {
                Some(lease) => request.lease(Duration::from_millis(lease)),
                None => request.lease(Duration::from_secs(1)).auto_renew(true),
            };
            let owned = |reservation| Asked::Owned(Owned { reservation, key, lease: asking.lease });
            match self.store.reserve(&request.durability(asking.durability)) {
                Ok(Outcome::Reserved(reservation)) => (said(grant(&reservation), Came::Reserved), owned(reservation)),
                Ok(Outcome::Interrupted(reservation)) => {
                    (said(grant(&reservation), Came::Interrupted), owned(reservation))
                }
                Ok(Outcome::Replay(record)) => match answer(&record) {
                    Ok(answer) => (Came::Replay(answer), Asked::Answer(answer)),
                    Err(why) => (Came::Failed(why), Asked::Neither),
                },
                Ok(Outcome::InFlight(pending)) => (Came::InFlight { fence: pending.fence() }, Asked::Pending(pending)),
                Ok(Outcome::Mismatch(mismatch)) => (Came::Mismatch(mismatch.stored.as_bytes()[0]), Asked::Neither),
                Err(error) => (failed(&error), Asked::Neither),
            }
        })
    }

    pub fn get(&self, key: u64) {
        self.tell(key, Act::Get, |_| {
            let came = match self.store.get(&request(&name_of(key), &scope_of(key))) {
                Ok(Some(record)) => said(answer(&record), Came::Replay),
                Ok(None) => Came::Nothing,
                Err(error) => failed(&error),
            };
            (came, ())
        });
    }

    pub fn wait(&self, key: u64, pending: Pending, at_most: Duration) {
        self.tell(key, Act::Wait { fence: pending.fence() }, |_| {
            let came = match pending.wait(at_most) {
                Ok(Wait::Replay(record)) => said(answer(&record), Came::Replay),
                Ok(Wait::Retry) => Came::Retry,
                Ok(Wait::TimedOut(_)) => Came::TimedOut,
                Err(error) => failed(&error),
            };
            (came, ())
        });
    }

    /// Stores an answer; a reservation that could not be used for that is dropped.
    pub fn answer(&self, owned: Owned, len: usize, failure: bool, keep: Option<u64>) {
        let Owned { mut reservation, key, .. } = owned;
        let act = Act::Answer { fence: reservation.fence(), len, failure, keep };
        let retention = keep.map_or(Retention::Forever, |keep| Retention::For(Duration::from_millis(keep)));
        reservation.set_retention(retention).expect("a retention in range");
        let left = self.tell(key, act, |op| {
            let bytes = Content::of(op, len).bytes();
            let stored = if failure { reservation.fail(bytes) } else { reservation.complete(bytes) };
            match stored {
                Ok(record) => (said(answer(&record), |answer| Came::Stored(answer.until)), None),
                Err(unwritten) => (failed(&unwritten.error), Some(unwritten.reservation)),
            }
        });
        self.let_go(key, left);
    }

    pub fn release(&self, owned: Owned) {
        let Owned { reservation, key, .. } = owned;
        let left = self.tell(key, Act::Release { fence: reservation.fence() }, |_| match reservation.release() {
            Ok(()) => (Came::Done, None),
            Err(unwritten) => (failed(&unwritten.error), Some(unwritten.reservation)),
        });
        self.let_go(key, left);
    }

    pub fn point(&self, owned: &mut Owned, len: usize) {
        let act = Act::Point { fence: owned.reservation.fence(), len, lease: owned.lease };
        self.tell(owned.key, act, |op| {
            (done(owned.reservation.recovery_point(Content::of(op, len).bytes()).map(drop)), ())
        });
    }

    pub fn renew(&self, owned: &mut Owned, lease: u64) {
        // One that renews itself stays as it is.
        owned.lease = owned.lease.map(|_| lease);
        self.tell(owned.key, Act::Renew { fence: owned.reservation.fence(), lease: owned.lease }, |_| {
            (done(owned.reservation.renew_for(Duration::from_millis(lease))), ())
        });
    }

    pub fn drop(&self, owned: Owned) {
        self.let_go(owned.key, Some(owned.reservation));
    }

    fn let_go(&self, key: u64, left: Option<Reservation>) {
        let Some(reservation) = left else { return };
        self.tell(key, Act::Drop { fence: reservation.fence() }, |_| {
            drop(reservation);
            (Came::Done, ())
        });
    }

    pub fn erase(&self, key: u64) {
        self.tell(key, Act::Erase, |_| {
            (done(self.store.erase(&request(&name_of(key), &scope_of(key))).map(|_| ())), ())
        });
    }

    pub fn erase_scope(&self, key: u64) {
        self.tell(key, Act::EraseScope, |_| (done(self.store.erase_scope(&scope_of(key)).map(|_| ())), ()));
    }

    fn tell<T>(&self, key: u64, act: Act, call: impl FnOnce(u64) -> (Came, T)) -> T {
        // Relaxed: only that no number comes twice counts.
        let op = self.next_op.fetch_add(1, Ordering::Relaxed);
        self.log.line(Line::Do { op, at: self.clock.now_ms(), key, act });
        let (came, rest) = call(op);
        self.log.line(Line::Did { op, at: self.clock.now_ms(), came });
        rest
    }
}

fn request<'a>(name: &'a [u8], scope: &'a str) -> Request<'a> {
    Request::new(name).scope(scope)
}

fn grant(reservation: &Reservation) -> Result<Grant, String> {
    let point = match reservation.last_recovery_point() {
        None => None,
        Some(bytes) => Some(Content::read(bytes).ok_or("a recovery point with other bytes than were written")?),
    };
    Ok(Grant { fence: reservation.fence(), attempt: reservation.attempt(), point })
}

fn answer(record: &Record) -> Result<Answer, String> {
    let content = Content::read(record.bytes()).ok_or("an answer with other bytes than were written")?;
    let until = record.expires_at().map(|at| at.duration_since(UNIX_EPOCH).expect("after 1970").as_millis() as u64);
    Ok(Answer { content, failure: record.is_failure(), attempt: record.attempt(), until })
}

fn said<T>(read: Result<T, String>, came: impl FnOnce(T) -> Came) -> Came {
    read.map_or_else(Came::Failed, came)
}

fn done(result: oncekey::Result<()>) -> Came {
    result.map_or_else(|error| failed(&error), |()| Came::Done)
}

fn failed(error: &Error) -> Came {
    if error.kind() == ErrorKind::Fenced { Came::Fenced } else { Came::Failed(format!("{error:?}")) }
}
