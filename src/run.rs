//! The whole dance in one call: reserve, run, store; or wait, and replay.

use crate::error::Error;
use crate::key::Request;
use crate::pending::{self, Pending, Wait};
use crate::record::Record;
use crate::reservation::Reservation;
use crate::store::{Mismatch, Outcome, Store};
use std::time::Instant;

/// What came of an operation, in the words of the one who ran it.
///
/// A `Result` converts: `Ok` is complete, and `Err` is *unknown*, since an error seldom proves that nothing happened.
#[derive(Debug)]
pub enum Verdict<T, E> {
    /// It was done; store this answer.
    Complete(T),
    /// It definitively failed; store this answer, it would come out the same again.
    Fail(T),
    /// It did not happen; the next caller may try again freely.
    Release(E),
    /// Nobody knows whether it happened; the key is left interrupted.
    Unknown(E),
}

impl<T, E> From<Result<T, E>> for Verdict<T, E> {
    fn from(result: Result<T, E>) -> Self {
        match result {
            Ok(answer) => Verdict::Complete(answer),
            Err(error) => Verdict::Unknown(error),
        }
    }
}

/// Why [`Store::run`] has no answer to give.
#[derive(Debug, thiserror::Error)]
pub enum RunError<E> {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] Error),
    /// The operation ran and said so.
    #[error("the operation failed: {0}")]
    Operation(E),
    /// An earlier owner vanished: find out whether its side effect happened, then complete or release.
    ///
    /// The key is the caller's, and in flight to others, as long as this value lives.
    #[error("an earlier owner of the key vanished; whether its operation happened is unknown")]
    Interrupted(Reservation),
    /// The key was used for another payload.
    #[error("the key was used for another payload")]
    Mismatch(Mismatch),
    /// Another caller still runs the operation.
    #[error("another caller still runs the operation")]
    InFlight(Pending),
}

/// An answer, and whose it is.
#[derive(Clone, Debug)]
pub enum Ran {
    /// This call ran the operation.
    Fresh(Record),
    /// An earlier or concurrent call ran it.
    Replay(Record),
}

impl Ran {
    /// The answer.
    pub fn record(&self) -> &Record {
        match self {
            Ran::Fresh(record) | Ran::Replay(record) => record,
        }
    }

    /// The answer's bytes.
    pub fn bytes(&self) -> &[u8] {
        self.record().bytes()
    }

    /// Whether an earlier or concurrent call ran the operation.
    pub fn is_replay(&self) -> bool {
        matches!(self, Ran::Replay(_))
    }
}

/// What a reservation attempt means to `run`.
enum Turn<E> {
    Run(Reservation),
    Wait(Pending),
    Over(Result<Ran, RunError<E>>),
}

fn turn<E>(outcome: Outcome) -> Turn<E> {
    match outcome {
        Outcome::Reserved(reservation) => Turn::Run(reservation),
        Outcome::InFlight(pending) => Turn::Wait(pending),
        Outcome::Replay(record) => Turn::Over(Ok(Ran::Replay(record))),
        Outcome::Interrupted(reservation) => Turn::Over(Err(RunError::Interrupted(reservation))),
        Outcome::Mismatch(mismatch) => Turn::Over(Err(RunError::Mismatch(mismatch))),
    }
}

fn store_verdict<T: AsRef<[u8]>, E>(reservation: Reservation, verdict: Verdict<T, E>) -> Result<Ran, RunError<E>> {
    let written = match verdict {
        Verdict::Complete(answer) => reservation.complete(answer),
        Verdict::Fail(answer) => reservation.fail(answer),
        Verdict::Release(error) => {
            reservation.release().map_err(Error::from)?;
            return Err(RunError::Operation(error));
        }
        Verdict::Unknown(error) => {
            drop(reservation);
            return Err(RunError::Operation(error));
        }
    };
    Ok(Ran::Fresh(written.map_err(Error::from)?))
}

impl Store {
    /// Runs an operation once: this caller runs it, or gets the answer of the one who did.
    ///
    /// While another caller runs it, this one waits, as long as [`Request::wait`] or the store's setting says. If
    /// `operation` panics, the key is left interrupted.
    ///
    /// ```
    /// use oncekey::{Request, Store};
    ///
    /// let store = Store::in_memory()?;
    /// let request = Request::new("order-42");
    /// let charge = |_: &mut oncekey::Reservation| Ok::<_, std::io::Error>(b"charged");
    /// assert!(!store.run(&request, charge)?.is_replay());
    /// assert!(store.run(&request, charge)?.is_replay());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// See [`RunError`]. An error of kind `Store` after the operation ran leaves the key interrupted.
    pub fn run<T, E, V>(
        &self,
        request: &Request<'_>,
        operation: impl FnOnce(&mut Reservation) -> V,
    ) -> Result<Ran, RunError<E>>
    where
        T: AsRef<[u8]>,
        V: Into<Verdict<T, E>>,
    {
        let wait = request.wait.unwrap_or(self.engine().limits.wait);
        let until = pending::deadline(wait);
        loop {
            match turn(self.reserve(request)?) {
                Turn::Over(answer) => return answer,
                Turn::Run(mut reservation) => {
                    let verdict = operation(&mut reservation);
                    return store_verdict(reservation, verdict.into());
                }
                Turn::Wait(pending) => match pending.wait(until.saturating_duration_since(Instant::now()))? {
                    Wait::Replay(record) => return Ok(Ran::Replay(record)),
                    Wait::Retry => {}
                    Wait::TimedOut(pending) => return Err(RunError::InFlight(pending)),
                },
            }
        }
    }

    /// As [`run`](Store::run), for an operation that is a future.
    ///
    /// Waiting for another caller needs no particular executor and has no time limit of its own. A future dropped
    /// before its end leaves the key interrupted. Writing the reservation and the answer is not awaited: with
    /// `Durability::Synced` each blocks the thread for one shared `fdatasync`.
    ///
    /// # Errors
    ///
    /// As [`run`](Store::run), but for `InFlight`.
    pub async fn run_async<T, E, V>(
        &self,
        request: &Request<'_>,
        operation: impl AsyncFnOnce(&mut Reservation) -> V,
    ) -> Result<Ran, RunError<E>>
    where
        T: AsRef<[u8]>,
        V: Into<Verdict<T, E>>,
    {
        loop {
            match turn(self.reserve(request)?) {
                Turn::Over(answer) => return answer,
                Turn::Run(mut reservation) => {
                    let verdict = operation(&mut reservation).await;
                    return store_verdict(reservation, verdict.into());
                }
                Turn::Wait(pending) => match pending.wait_async().await? {
                    Wait::Replay(record) => return Ok(Ran::Replay(record)),
                    Wait::Retry => {}
                    Wait::TimedOut(pending) => return Err(RunError::InFlight(pending)),
                },
            }
        }
    }
}
