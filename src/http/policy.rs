//! What holds for a request: which need a key, what makes two the same, which answers are kept, and what becomes of the rest.

use super::answer::{HeaderFilter, StoredAnswer};
use super::digest::PayloadDigest;
use super::{Body, BoxError};
use crate::{Durability, MAX_LEASE, Retention};
use bytes::Bytes;
use http::header::{HeaderName, RETRY_AFTER};
use http::request::Parts;
use http::{Method, Response, StatusCode, response};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

/// Whose keys a request's key is one of.
///
/// Equal keys of two scopes are two keys. There is no default: a service with several tenants and one namespace would give
/// one tenant's answers to another.
#[derive(Clone)]
pub struct Scope(Arc<ScopeOf>);

type ScopeOf = dyn Fn(&Parts) -> Option<Vec<u8>> + Send + Sync;

/// Bytes of a scope, at most.
pub(super) const MAX_SCOPE_LEN: usize = 128;

impl Scope {
    /// All clients are one tenant, or keys are unique across tenants and can't be guessed.
    pub fn single_tenant() -> Scope {
        Scope(Arc::new(|_| Some(Vec::new())))
    }

    /// The tenant as the request tells it, such as from verified credentials: 1 to 128 bytes.
    ///
    /// Where it gives nothing, or something of another length, the request is refused with 400.
    pub fn from_request<T: Into<Vec<u8>>>(scope: impl Fn(&Parts) -> Option<T> + Send + Sync + 'static) -> Scope {
        Scope(Arc::new(move |parts| {
            scope(parts).map(Into::into).filter(|scope| (1..=MAX_SCOPE_LEN).contains(&scope.len()))
        }))
    }

    pub(super) fn of(&self, parts: &Parts) -> Option<Vec<u8>> {
        (self.0)(parts)
    }
}

/// What becomes of a key once there is an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The answer is final: it is stored, and replayed to whoever asks again.
    Store,
    /// The operation did not happen: the next request runs it, also with another payload.
    Release,
    /// Nobody knows whether it happened: the key is held as interrupted.
    Unknown,
}

/// How answers are judged.
#[derive(Clone)]
pub struct Verdicts(Arc<dyn Fn(&response::Parts) -> Verdict + Send + Sync>);

impl Verdicts {
    /// Answers that would come out the same again are stored: up to 4xx. Released are 401, 403, 408, 425, 429 and 5xx, and
    /// 409 with `Retry-After`, which is how a service says that it still works on it.
    pub fn ietf() -> Self {
        Verdicts::of(|answer| match answer.status {
            StatusCode::CONFLICT if answer.headers.contains_key(RETRY_AFTER) => Verdict::Release,
            StatusCode::UNAUTHORIZED
            | StatusCode::FORBIDDEN
            | StatusCode::REQUEST_TIMEOUT
            | StatusCode::TOO_EARLY
            | StatusCode::TOO_MANY_REQUESTS => Verdict::Release,
            status if status.is_server_error() => Verdict::Release,
            _ => Verdict::Store,
        })
    }

    /// As Stripe's API does it: every answer of an operation that began is stored, 5xx too. Released is what comes
    /// before it begins: 400, 401, 403, 409 and 429.
    pub fn stripe() -> Self {
        Verdicts::of(|answer| match answer.status {
            StatusCode::BAD_REQUEST
            | StatusCode::UNAUTHORIZED
            | StatusCode::FORBIDDEN
            | StatusCode::CONFLICT
            | StatusCode::TOO_MANY_REQUESTS => Verdict::Release,
            _ => Verdict::Store,
        })
    }

    /// A judgement of your own, from status, headers and extensions.
    pub fn of(verdict: impl Fn(&response::Parts) -> Verdict + Send + Sync + 'static) -> Self {
        Verdicts(Arc::new(verdict))
    }

    /// What becomes of the key after this answer.
    pub fn verdict(&self, answer: &response::Parts) -> Verdict {
        (self.0)(answer)
    }
}

/// What a gRPC status says: HTTP's is always 200. `None` where it isn't known yet.
pub(super) fn grpc_verdict(headers: &http::HeaderMap) -> Option<Verdict> {
    let status: u16 = headers.get("grpc-status")?.to_str().ok()?.parse().ok()?;
    Some(match status {
        // OK; and what is as wrong the next time: INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, FAILED_PRECONDITION,
        // OUT_OF_RANGE, UNIMPLEMENTED.
        0 | 3 | 5 | 6 | 9 | 11 | 12 => Verdict::Store,
        // PERMISSION_DENIED, RESOURCE_EXHAUSTED, ABORTED, INTERNAL, UNAVAILABLE, UNAUTHENTICATED.
        7 | 8 | 10 | 13 | 14 | 16 => Verdict::Release,
        // CANCELLED, UNKNOWN, DEADLINE_EXCEEDED, DATA_LOSS, and those that there aren't.
        _ => Verdict::Unknown,
    })
}

/// What a request gets whose operation is running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InFlight {
    /// 409 with `Retry-After`, at once.
    Refuse,
    /// The answer when it is there, or 409 after this time.
    Wait(Duration),
}

/// What becomes of a request whose operation was begun by an owner that vanished.
#[derive(Clone)]
pub enum Interrupted {
    /// 409, `outcome-unknown`, until somebody who knows erases the key.
    Refuse,
    /// The operation runs again; it sees the number of the attempt and the last recovery point.
    Rerun,
    /// Somebody finds out; see [`Interrupted::reconcile`].
    Reconcile(Reconcile),
}

/// A function that finds out what became of an operation.
#[derive(Clone)]
pub struct Reconcile(Arc<dyn Fn(Interruption) -> ReconcileFuture + Send + Sync>);

type ReconcileFuture = Pin<Box<dyn Future<Output = Result<Reconciled, BoxError>> + Send>>;

impl Interrupted {
    /// Asks this function; an error of it is as [`Reconciled::StillUnknown`].
    pub fn reconcile<F>(find_out: impl Fn(Interruption) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<Reconciled, BoxError>> + Send + 'static,
    {
        Interrupted::Reconcile(Reconcile(Arc::new(move |interruption| Box::pin(find_out(interruption)))))
    }
}

impl Reconcile {
    pub(super) fn ask(&self, interruption: Interruption) -> ReconcileFuture {
        (self.0)(interruption)
    }
}

/// What is known of an operation whose owner vanished.
#[derive(Clone)]
#[non_exhaustive]
pub struct Interruption {
    /// The tenant; empty if there is but one.
    pub scope: Vec<u8>,
    /// The operation within the scope.
    pub operation: String,
    /// The client's key.
    pub key: String,
    /// Number of this attempt, from 2.
    pub attempt: u32,
    /// What the owner left for the next.
    pub recovery_point: Option<Bytes>,
    /// Body of this request; it is the first's as far as the [`PayloadDigest`] tells.
    pub body: Bytes,
}

impl fmt::Debug for Interruption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interruption")
            .field("operation", &self.operation)
            .field("attempt", &self.attempt)
            .field("body_len", &self.body.len())
            .finish_non_exhaustive()
    }
}

/// What was found out about an operation whose owner vanished.
#[derive(Debug)]
pub enum Reconciled {
    /// It happened, and this is its answer, which is stored whatever its status. One of gRPC without a status gets `OK`.
    Happened(Response<Body>),
    /// It did not happen: it runs now.
    DidNotHappen,
    /// 409, `outcome-unknown`; the next request asks again.
    StillUnknown,
}

/// What becomes of a request while the store can't take it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenUnavailable {
    /// 503 with `Retry-After`; nothing runs.
    Refuse,
    /// It is passed on without protection against a second run; the answer says so (`Idempotency-Unprotected`).
    Pass,
}

pub(super) type OperationOf = dyn Fn(&Parts) -> String + Send + Sync;
pub(super) type PartsTest = dyn Fn(&Parts) -> bool + Send + Sync;
pub(super) type Redact = dyn Fn(&mut StoredAnswer) + Send + Sync;

/// What holds for the requests of a route.
///
/// ```
/// use oncekey::Retention;
/// use oncekey::http::{InFlight, PayloadDigest, Policy, Verdicts};
/// use std::time::Duration;
///
/// let payments = Policy::new()
///     .required(true)
///     .fingerprint(PayloadDigest::json_pointers(["/amount", "/currency"])?)
///     .in_flight(InFlight::Wait(Duration::from_secs(10)))
///     .verdicts(Verdicts::stripe())
///     .retention(Retention::For(Duration::from_secs(7 * 24 * 3600)));
/// # let _ = payments;
/// # Ok::<(), oncekey::http::InvalidPointer>(())
/// ```
#[derive(Clone)]
#[must_use]
pub struct Policy {
    pub(super) header: HeaderName,
    pub(super) methods: Vec<Method>,
    pub(super) is_required: bool,
    pub(super) passes: Option<Arc<PartsTest>>,
    pub(super) operation: Option<Arc<OperationOf>>,
    pub(super) digest: PayloadDigest,
    pub(super) max_request_body: usize,
    pub(super) request_body_timeout: Duration,
    pub(super) in_flight: InFlight,
    pub(super) retry_after: Duration,
    pub(super) verdicts: Verdicts,
    pub(super) interrupted: Interrupted,
    pub(super) retention: Option<Retention>,
    pub(super) lease: Option<Duration>,
    pub(super) durability: Option<Durability>,
    pub(super) max_answer: usize,
    pub(super) stored_headers: HeaderFilter,
    pub(super) redact: Option<Arc<Redact>>,
    pub(super) when_unavailable: WhenUnavailable,
}

const MIB: usize = 1024 * 1024;

impl Policy {
    /// The defaults: `Idempotency-Key` on POST and PATCH, not required; everything that makes up a request counts; a
    /// duplicate gets 409 while the first runs; verdicts as in the IETF draft; an unknown outcome is refused.
    pub fn new() -> Self {
        Policy {
            header: HeaderName::from_static("idempotency-key"),
            methods: vec![Method::POST, Method::PATCH],
            is_required: false,
            passes: None,
            operation: None,
            digest: PayloadDigest::whole(),
            max_request_body: MIB,
            request_body_timeout: Duration::from_secs(30),
            in_flight: InFlight::Refuse,
            retry_after: Duration::from_secs(1),
            verdicts: Verdicts::ietf(),
            interrupted: Interrupted::Refuse,
            retention: None,
            lease: None,
            durability: None,
            max_answer: MIB,
            stored_headers: HeaderFilter::deny([]),
            redact: None,
            when_unavailable: WhenUnavailable::Refuse,
        }
    }

    /// The header with the key; `idempotency-key` by default.
    pub fn header(mut self, name: HeaderName) -> Self {
        self.header = name;
        self
    }

    /// Methods whose requests may have a key; POST and PATCH by default. Others pass untouched.
    pub fn methods(mut self, methods: impl IntoIterator<Item = Method>) -> Self {
        self.methods = methods.into_iter().collect();
        self
    }

    /// Whether a request without a key is refused with 400; by default it passes untouched.
    pub fn required(mut self, on: bool) -> Self {
        self.is_required = on;
        self
    }

    /// Requests that pass untouched whatever their headers, such as gRPC calls whose requests are streams.
    pub fn pass(mut self, test: impl Fn(&Parts) -> bool + Send + Sync + 'static) -> Self {
        self.passes = Some(Arc::new(test));
        self
    }

    /// The operation that a request is, within its scope; [`operation_of`](super::operation_of) method and path by default.
    ///
    /// One that is longer than 128 bytes is cut down to a digest.
    pub fn operation(mut self, operation: impl Fn(&Parts) -> String + Send + Sync + 'static) -> Self {
        self.operation = Some(Arc::new(operation));
        self
    }

    /// What makes two requests the same; [`PayloadDigest::whole`] by default.
    ///
    /// Retries of what was stored under another one are told apart from it, and answered 422: change it once nobody retries that any more.
    pub fn fingerprint(mut self, digest: PayloadDigest) -> Self {
        self.digest = digest;
        self
    }

    /// Bytes of a request's body, at most; 1 MiB by default. The body of a request with a key is held in memory; what all take is bound
    /// by [`max_buffered`](super::IdempotencyLayer::max_buffered).
    pub fn max_request_body(mut self, bytes: usize) -> Self {
        self.max_request_body = bytes;
        self
    }

    /// How long the body of a request with a key may take; 30 s by default.
    pub fn request_body_timeout(mut self, limit: Duration) -> Self {
        self.request_body_timeout = limit;
        self
    }

    /// What a duplicate gets while the first request runs; 409 at once by default.
    ///
    /// An answer that streams is followed by duplicates either way.
    pub fn in_flight(mut self, in_flight: InFlight) -> Self {
        self.in_flight = in_flight;
        self
    }

    /// What `Retry-After` says; 1 s by default, in whole seconds.
    pub fn retry_after(mut self, after: Duration) -> Self {
        self.retry_after = after;
        self
    }

    /// How answers are judged; [`Verdicts::ietf`] by default. Answers to gRPC calls are judged by their gRPC status, if they have one, and
    /// problems of another layer of this kind behind this one are released.
    pub fn verdicts(mut self, verdicts: Verdicts) -> Self {
        self.verdicts = verdicts;
        self
    }

    /// What becomes of a request whose earlier owner vanished; refused by default.
    pub fn interrupted(mut self, interrupted: Interrupted) -> Self {
        self.interrupted = interrupted;
        self
    }

    /// How long answers are kept; the store's setting by default. Less than 1 ms counts as 1 ms.
    pub fn retention(mut self, retention: Retention) -> Self {
        self.retention = Some(match retention {
            Retention::For(time) => Retention::For(time.max(Duration::from_millis(1))),
            Retention::Forever => Retention::Forever,
        });
        self
    }

    /// Length of the lease, which is renewed as long as the operation runs; the store's setting by default. It is cut to
    /// 1 ms to [`MAX_LEASE`].
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = Some(lease.clamp(Duration::from_millis(1), MAX_LEASE));
        self
    }

    /// What operations survive; the store's setting by default.
    pub fn durability(mut self, durability: Durability) -> Self {
        self.durability = Some(durability);
        self
    }

    /// Bytes of an answer's body that are stored, at most; 1 MiB by default. Of a larger one the status and headers are.
    pub fn max_answer(mut self, bytes: usize) -> Self {
        self.max_answer = bytes;
        self
    }

    /// Which headers of answers are stored; all that may be by default.
    pub fn stored_headers(mut self, filter: HeaderFilter) -> Self {
        self.stored_headers = filter;
        self
    }

    /// Changes what is stored of an answer, such as to take personal data out; without a body only status and headers are. The first client gets the answer as it is,
    /// and so do duplicates that follow it while it streams.
    pub fn redact(mut self, redact: impl Fn(&mut StoredAnswer) + Send + Sync + 'static) -> Self {
        self.redact = Some(Arc::new(redact));
        self
    }

    /// What becomes of requests while the store can't take them; refused by default. One whose key is known to be used is
    /// refused either way.
    pub fn when_unavailable(mut self, when: WhenUnavailable) -> Self {
        self.when_unavailable = when;
        self
    }
}

impl Default for Policy {
    fn default() -> Self {
        Policy::new()
    }
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy")
            .field("header", &self.header)
            .field("methods", &self.methods)
            .field("is_required", &self.is_required)
            .finish_non_exhaustive()
    }
}
