//! Idempotency keys for HTTP: a tower layer for axum, hyper and tonic services.
//!
//! A request with the header `Idempotency-Key` runs once. Whoever sends it again gets the stored answer, follows the one that is
//! being made, or is told: 409 while it runs, 422 if the key was used for another request, 409 `outcome-unknown` if an earlier
//! run vanished. The layer follows the IETF draft [draft-ietf-httpapi-idempotency-key-header] and answers with RFC 9457 problem
//! details.
//!
//! ```
//! use http::{Request, Response, StatusCode};
//! use oncekey::http::{Body, IdempotencyLayer, Policy, Scope};
//! use oncekey::Store;
//! use tower::{Layer, ServiceExt, service_fn};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let layer = IdempotencyLayer::new(Store::in_memory()?, Scope::single_tenant()).policy(Policy::new().required(true));
//! let charge = service_fn(|_: Request<Body>| async { Ok::<_, std::convert::Infallible>(Response::new(Body::from("charged"))) });
//! let service = layer.layer(charge);
//! for replayed in [None, Some("true")] {
//!     let request = Request::post("/charges").header("idempotency-key", "order-42").body(Body::from("100 EUR"))?;
//!     let response = service.clone().oneshot(request).await?;
//!     assert_eq!(response.status(), StatusCode::OK);
//!     assert_eq!(response.headers().get("idempotency-replayed").map(|value| value.to_str()).transpose()?, replayed);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The service runs detached: a client that leaves neither ends it nor its recording. It has a [`Running`] in its request's
//! extensions. What can't be done: see the [crate]; a process that dies between an effect and its recording leaves a
//! key whose outcome is unknown, and [`Policy::interrupted`] says what becomes of that.
//!
//! It needs tokio. Operations in a [`Durability::Synced`](crate::Durability::Synced) store wait for the device on tokio's blocking threads.
//!
//! # Where to put it
//!
//! On the outermost router: inside `axum::Router::nest` a path has lost its prefix, so that two nested routers would share keys;
//! there give [`Policy::operation`], such as from `axum::extract::OriginalUri` in the request's extensions. Authentication goes before
//! the layer, or duplicates get answers without it; so do CORS, compression and rate limits, whose doings depend on the client
//! and not on the operation, and timeouts, since what ends behind the layer by a time-out has an unknown outcome. What the
//! service negotiates by `Accept` and the like is not in the fingerprint: a duplicate gets the first one's representation.
//!
//! A replay's body is sent from where it lies in the journal. As long as a client reads it, [`Store::erase`](crate::Store::erase) waits, up to its ten
//! seconds: limit the time that connections may take to read.
//!
//! An operation runs as long as it takes, whoever waits. Bound its time in the service, and how many run by
//! [`IdempotencyLayer::max_running`]. The body of a request with a key is held in memory: bound what all take by
//! [`IdempotencyLayer::max_buffered`].
//!
//! # Problems
//!
//! The `type` is [`PROBLEM_PREFIX`] and a name; it is in the header `Idempotency-Problem` too.
//!
//! | name | status | when |
//! |---|---|---|
//! | `key-missing` | 400 | there is no key where one is required |
//! | `key-invalid` | 400 | the key is repeated, empty, longer than 255 characters, or not visible ASCII |
//! | `scope-missing` | 400 | the [`Scope`] gave nothing |
//! | `body-incomplete` | 400 | the request's body ended early |
//! | `body-timeout` | 408 | it took too long |
//! | `body-too-large` | 413 | it is too large |
//! | `in-flight` | 409 | the operation is running; with `Retry-After` |
//! | `outcome-unknown` | 409, 500 | it was begun, and its end never recorded; 500 if it panicked just now |
//! | `key-reused` | 422 | the key was used for another request |
//! | `store-unavailable` | 503 | the store is full or failed; with `Retry-After` |
//! | `too-many-running` | 503 | as many operations run as may; with `Retry-After` |
//! | `too-much-buffered` | 503 | the bodies of other requests take all the memory that they may; with `Retry-After` |
//! | `answer-unreadable` | 500 | something else is stored under the key |
//! | `answer-not-kept` | gRPC only | the operation was done, and its answer was too large to be stored |
//!
//! A gRPC call gets a status instead: `ABORTED` for `in-flight`, `FAILED_PRECONDITION` for `key-reused` and `outcome-unknown`,
//! `DEADLINE_EXCEEDED` for 408, `RESOURCE_EXHAUSTED` for 413, `UNAVAILABLE` for 503, `INTERNAL` for 500, and `INVALID_ARGUMENT`.
//!
//! # Headers
//!
//! | header | in | what |
//! |---|---|---|
//! | `Idempotency-Key` | requests | the key: a structured-field string or the same without quotes |
//! | `Idempotency-Replayed: true` | answers | it was made for an earlier request; with `Cache-Control: no-store` |
//! | `Idempotency-Key-Expires` | answers | until when it is kept (an HTTP date); not on one that is still being made when its head is sent |
//! | `Idempotency-Replay-Unavailable` | answers | of a replay, `body-not-stored`: it was larger than [`Policy::max_answer`]; of a first answer that was there as a whole, `not-stored`: the store failed at the end |
//! | `Idempotency-Unprotected` | answers | the store was unavailable, and the policy lets such requests pass |
//! | `Idempotency-Problem` | answers | the problem that it is |
//! | `Idempotency-Attempt`, `-Fence`, `-Recovery-Point` | requests to the service | as [`Running`] has them; the point as a byte sequence (RFC 9651). Those of clients are taken out |
//!
//! # gRPC
//!
//! The key is the metadata `idempotency-key` of a unary call; trailers are stored, and the status in them decides. A call whose request
//! is a stream passes: it is known by its second message, or by [`Policy::pass`], which one with no end needs. A stream of answers is
//! recorded as any other. gRPC-Web is treated as plain HTTP.
//!
//! [draft-ietf-httpapi-idempotency-key-header]: https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/

mod answer;
mod body;
mod digest;
mod event;
mod held;
mod key;
mod layer;
mod policy;
mod problem;
mod recording;
mod request;
mod run;
mod running;

pub use answer::{HeaderFilter, StoredAnswer};
pub use body::Body;
pub use digest::{InvalidPointer, PayloadDigest};
pub use event::{Event, EventKind, Identity};
pub use key::key_of;
pub use layer::{Idempotency, IdempotencyLayer, operation_of};
pub use policy::{
    InFlight, Interrupted, Interruption, Policy, Reconcile, Reconciled, Scope, Verdict, Verdicts, WhenUnavailable,
};
pub use problem::{PROBLEM_PREFIX, Problem};
pub use running::Running;

/// Any error of a body.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Runs what blocks on a thread that may.
fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> impl Future<Output = T> {
    let work = tokio::task::spawn_blocking(work);
    async move {
        match work.await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime ends, and this future with it.
                Err(_) => std::future::pending().await,
            },
        }
    }
}
