//! Somebody else's operation, to wait for.

use crate::error::Result;
use crate::journal::Bell;
use crate::record::Record;
use crate::state::{self, Event, Phase, Transition};
use crate::store::Engine;
use crate::table::tag_of;
use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Poll, Wake, Waker};
use std::time::{Duration, Instant};

/// An operation that another caller runs.
///
/// Wait for its end, or tell the client to come back (409 with `Retry-After`).
pub struct Pending {
    engine: Arc<Engine>,
    hash: u64,
    fence: u64,
    lease_left: Option<Duration>,
    /// Whether the answer has to be durable when it is given.
    sync: bool,
}

/// How a wait for another caller's operation ended.
#[must_use]
#[derive(Debug)]
pub enum Wait {
    /// The operation was done; this is its answer.
    Replay(Record),
    /// The owner released the key, vanished, or the key was erased: reserve again to see.
    Retry,
    /// The operation goes on.
    TimedOut(Pending),
}

impl Pending {
    pub(crate) fn new(engine: Arc<Engine>, hash: u64, fence: u64, lease_left: Option<Duration>, sync: bool) -> Self {
        Pending { engine, hash, fence, lease_left, sync }
    }

    /// Number of the reservation that is waited for.
    pub fn fence(&self) -> u64 {
        self.fence
    }

    /// What was left of the owner's lease when it was met; `None` while its answer is being written.
    pub fn lease_left(&self) -> Option<Duration> {
        self.lease_left
    }

    /// Blocks until the operation ends, at most for `timeout`.
    ///
    /// # Errors
    ///
    /// `Closed`, `Forked`, and `Corrupt` if another program changed the files. `Poisoned` if the request was `Synced` and
    /// the answer can't be made durable any more.
    pub fn wait(self, timeout: Duration) -> Result<Wait> {
        let until = deadline(timeout);
        let bell = Arc::new(Bell::default());
        let waker = Waker::from(Arc::clone(&bell));
        let mut waiter = Waiter::new(&self);
        loop {
            let lease_left = match waiter.look(&waker)? {
                Look::Over(wait) => return Ok(wait),
                Look::Running(lease_left) => lease_left,
            };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(waiter);
                return Ok(Wait::TimedOut(self));
            }
            // Nobody may come by to notice that the lease ran out, so look again then.
            bell.wait(lease_left.map_or(left, |lease| left.min(lease + TICK)));
        }
    }

    /// Waits until the operation ends, without blocking and with any executor. (For a sync it blocks: where a `Synced`
    /// request waited for the answer of a `Buffered` one.)
    ///
    /// It has no time limit; wrap it in the runtime's own. That a lease ran out is noticed by the store's upkeep (its
    /// threads, or [`maintain`](crate::Store::maintain)) or by the next caller for the key. The threads end with the last
    /// handle of the store, so keep one while you wait.
    ///
    /// # Errors
    ///
    /// As [`wait`](Pending::wait).
    pub async fn wait_async(self) -> Result<Wait> {
        let mut waiter = Waiter::new(&self);
        poll_fn(|context| match waiter.look(context.waker()) {
            Ok(Look::Over(wait)) => Poll::Ready(Ok(wait)),
            Ok(Look::Running(_)) => Poll::Pending,
            Err(error) => Poll::Ready(Err(error)),
        })
        .await
    }
}

/// A caller who waits. Its waker goes with it.
struct Waiter<'p> {
    pending: &'p Pending,
    ticket: Option<u64>,
}

impl<'p> Waiter<'p> {
    fn new(pending: &'p Pending) -> Self {
        Waiter { pending, ticket: None }
    }

    /// How the operation stands. While it runs, its end wakes the waker.
    fn look(&mut self, waker: &Waker) -> Result<Look> {
        let &Pending { ref engine, hash, fence, sync, .. } = self.pending;
        let tag = tag_of(hash);
        // All code of the user comes before the lock.
        let (now_ms, waker) = (engine.clock.now_ms(), waker.clone());
        let mut shard = engine.lock(hash);
        // Under the lock: `close` says so first and then takes each shard's lock to wake its waiters.
        engine.admit()?;
        loop {
            let Some(at) = shard.find_fence(tag, fence, &engine.journal, &shard.segments) else {
                return Ok(Look::Over(Wait::Retry));
            };
            let slot = shard.table.slot(at);
            let entry = engine.journal.entry(&shard.segments, slot.word().lsn())?;
            let state = shard.state(slot, entry.fence(), entry.deadline_ms());
            if let Transition::To(phase) = state::step(state, Event::Elapse(now_ms)) {
                engine.elapse(&mut shard, at, tag, state.fence, phase, now_ms);
                continue;
            }
            return match state.phase {
                Phase::Completed => {
                    let answer = engine.answer(&shard, &entry, sync);
                    shard.counts.replayed += 1;
                    Ok(Look::Over(Wait::Replay(engine.give(shard, answer)?)))
                }
                Phase::Reserved | Phase::Completing => {
                    let left = Duration::from_millis(state.deadline_ms.saturating_sub(now_ms));
                    self.ticket = Some(shard.park(fence, self.ticket, waker));
                    Ok(Look::Running((state.deadline_ms != u64::MAX).then_some(left)))
                }
                Phase::Interrupted | Phase::Vacant | Phase::Released => Ok(Look::Over(Wait::Retry)),
            };
        }
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            self.pending.engine.lock(self.pending.hash).unpark(self.pending.fence, ticket);
        }
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.ring();
    }
}

/// When a wait ends; one that outlasts what can be expressed ends in a year.
pub(crate) fn deadline(timeout: Duration) -> Instant {
    Instant::now() + timeout.min(Duration::from_secs(365 * 24 * 3600))
}

/// Leases end on the millisecond; look just after.
const TICK: Duration = Duration::from_millis(1);

enum Look {
    Over(Wait),
    /// With what is left of the owner's lease.
    Running(Option<Duration>),
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending")
            .field("fence", &self.fence)
            .field("lease_left", &self.lease_left)
            .finish_non_exhaustive()
    }
}
