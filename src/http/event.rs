//! What the layer tells of its doings, for metrics and logs.

use http::StatusCode;
use std::time::Duration;

/// Something that became of a request or an operation.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Event<'a> {
    /// What.
    pub kind: EventKind,
    /// The status that the client gets; `None` where that isn't known yet.
    pub status: Option<StatusCode>,
    /// Since the request arrived.
    pub elapsed: Duration,
    /// Which operation; `None` for a request without a valid key.
    pub identity: Option<Identity<'a>>,
}

/// The identity of an operation. The key is the client's: don't log it.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Identity<'a> {
    /// The tenant; empty if there is but one.
    pub scope: &'a [u8],
    /// The operation within the scope.
    pub operation: &'a str,
    /// The client's key.
    pub key: &'a str,
}

impl std::fmt::Debug for Identity<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("operation", &self.operation).finish_non_exhaustive()
    }
}

/// The kinds of events.
///
/// A request, unless its client left before, has one of `Passed`, `Invalid`, `Started`, `TakenOver`, `Replayed`, `Attached`, `InFlight`, `Mismatched`,
/// `OutcomeUnknown`, `Unavailable`, `PassedUnprotected`. An operation that was started or taken over has one more, of how it ended:
/// `Stored`, `StoredWithoutBody`, `Released`, `Unknown`, `NotStored`.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// Passed on untouched, since it needs no key.
    Passed,
    /// Its key, scope or body was refused.
    Invalid,
    /// Its operation begins to run.
    Started,
    /// Its operation begins to run, or is reconciled, after an earlier owner vanished.
    TakenOver,
    /// The operation ended, and its answer is stored.
    Stored,
    /// The operation ended, and of its answer only status and headers are stored.
    StoredWithoutBody,
    /// The operation did not happen; its key is free.
    Released,
    /// Whether the operation happened is unknown; its key is held as interrupted.
    Unknown,
    /// The operation ended, and its answer could not be stored; its key is held as interrupted.
    NotStored,
    /// Answered with the stored answer.
    Replayed,
    /// Answered with the answer that is still being made.
    Attached,
    /// Refused, since its operation is running.
    InFlight,
    /// Refused, since its key was used for another request.
    Mismatched,
    /// Refused, since whether its operation happened is unknown.
    OutcomeUnknown,
    /// Refused, since the store can't take it, too many operations run, or there is no room for its body.
    Unavailable,
    /// Passed on though the store can't take it.
    PassedUnprotected,
}
