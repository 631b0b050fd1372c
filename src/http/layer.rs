//! The layer and its service: from a request to the right to run it, or to the answer that is there already.

use super::body::Body;
use super::event::{Event, EventKind, Identity};
use super::held::{Bodies, Held};
use super::policy::{InFlight, Interrupted, OperationOf, Policy, Scope, WhenUnavailable};
use super::problem::{Own, PROBLEM, Problem};
use super::recording::Recording;
use super::request::{self, Collected};
use super::run::{self, Operation, Panicked};
use super::running::Running;
use super::{answer, blocking, key};
use crate::{
    Durability, ErrorKind, Fingerprint, Outcome, Pending, Record, Request as Key, Reservation, Standing, Store, Wait,
};
use bytes::Bytes;
use dashmap::DashMap;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, Request, Response, StatusCode, response};
use std::cell::RefCell;
use std::cmp;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tower_layer::Layer;
use tower_service::Service;

/// Whether an answer was stored before.
pub(super) const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
/// Until when an answer is kept.
pub(super) const EXPIRES: HeaderName = HeaderName::from_static("idempotency-key-expires");
/// Why an answer can't be replayed as a whole.
pub(super) const UNAVAILABLE: HeaderName = HeaderName::from_static("idempotency-replay-unavailable");
/// That an answer came without protection, and why.
const UNPROTECTED: HeaderName = HeaderName::from_static("idempotency-unprotected");
/// What the service is told of its operation, in headers. Only the layer sets them.
pub(super) const ATTEMPT: HeaderName = HeaderName::from_static("idempotency-attempt");
pub(super) const FENCE: HeaderName = HeaderName::from_static("idempotency-fence");
pub(super) const RECOVERY_POINT: HeaderName = HeaderName::from_static("idempotency-recovery-point");

/// Makes a service idempotent by the keys that its clients send; see the [module](super).
#[derive(Clone)]
pub struct IdempotencyLayer(Arc<Settings>);

/// The service that [`IdempotencyLayer`] puts around another.
#[derive(Clone, Debug)]
pub struct Idempotency<S> {
    inner: S,
    settings: Arc<Settings>,
}

#[derive(Clone)]
pub(super) struct Settings {
    pub(super) store: Store,
    scope: Scope,
    policy: Arc<Policy>,
    route: Option<Arc<Route>>,
    observer: Option<Arc<Observer>>,
    documentation: Option<HeaderValue>,
    max_running: usize,
    max_buffered: usize,
    pub(super) live: Arc<Live>,
}

type Route = dyn Fn(&Parts) -> Option<Arc<Policy>> + Send + Sync;
type Observer = dyn Fn(&Event<'_>) + Send + Sync;

/// What goes on in this process.
#[derive(Default)]
pub(super) struct Live {
    /// Answers that are being made, by the identity of their operations.
    pub(super) streams: DashMap<Box<[u8]>, Arc<Recording>>,
    /// Told when one is added.
    pub(super) stream_begun: Notify,
    running: AtomicUsize,
    idle: Notify,
    bodies: Arc<Bodies>,
}

impl IdempotencyLayer {
    /// A layer that keeps its keys in this store.
    pub fn new(store: Store, scope: Scope) -> Self {
        IdempotencyLayer(Arc::new(Settings {
            store,
            scope,
            policy: Arc::default(),
            route: None,
            observer: None,
            documentation: None,
            max_running: usize::MAX,
            max_buffered: usize::MAX,
            live: Arc::default(),
        }))
    }

    /// The policy of requests for which [`route`](Self::route) gives none.
    pub fn policy(self, policy: Policy) -> Self {
        self.with(|settings| settings.policy = Arc::new(policy))
    }

    /// Gives routes policies of their own, by what the layer sees of the request: on the outermost router that is the path
    /// as it came, within `axum::Router::nest` what is left of it.
    pub fn route(self, route: impl Fn(&Parts) -> Option<Arc<Policy>> + Send + Sync + 'static) -> Self {
        self.with(|settings| settings.route = Some(Arc::new(route)))
    }

    /// Tells a function of all that happens. It is called in the middle of it, so it must not block.
    pub fn observe(self, observer: impl Fn(&Event<'_>) + Send + Sync + 'static) -> Self {
        self.with(|settings| settings.observer = Some(Arc::new(observer)))
    }

    /// How many operations run at a time, at most, those whose clients left included; no limit by default. One more is refused
    /// with 503, and its key left as it was; what needs no run is answered.
    pub fn max_running(self, operations: usize) -> Self {
        self.with(|settings| settings.max_running = operations)
    }

    /// How many bytes of memory the bodies of requests with keys take at a time, at most, from when they come in until the service
    /// has let go of them; no limit by default. A request whose body would be more is refused with 503, and its key left as it was.
    ///
    /// Less than a policy's [`max_request_body`](Policy::max_request_body) refuses what that lets through.
    pub fn max_buffered(self, bytes: usize) -> Self {
        self.with(|settings| settings.max_buffered = bytes)
    }

    /// Adds `Link: <url>; rel="describedby"` to all problems.
    ///
    /// # Errors
    ///
    /// If the URL has characters that no header may have.
    pub fn documentation(self, url: &str) -> Result<Self, http::header::InvalidHeaderValue> {
        let link = HeaderValue::from_str(&format!("<{url}>; rel=\"describedby\""))?;
        Ok(self.with(|settings| settings.documentation = Some(link)))
    }

    fn with(mut self, change: impl FnOnce(&mut Settings)) -> Self {
        change(Arc::make_mut(&mut self.0));
        self
    }

    /// How many operations run now, those whose clients left included.
    pub fn running(&self) -> usize {
        self.0.live.running.load(Ordering::Relaxed)
    }

    /// How many bytes of memory the bodies of requests with keys take now.
    pub fn buffered(&self) -> usize {
        self.0.live.bodies.bytes()
    }

    /// Waits until no operation runs; for the end of a process, after its last connection.
    pub async fn drained(&self) {
        loop {
            let idle = self.0.live.idle.notified();
            if self.running() == 0 {
                return;
            }
            idle.await;
        }
    }
}

impl<S> Layer<S> for IdempotencyLayer {
    type Service = Idempotency<S>;

    fn layer(&self, inner: S) -> Idempotency<S> {
        Idempotency { inner, settings: Arc::clone(&self.0) }
    }
}

impl<S, B, R> Service<Request<B>> for Idempotency<S>
where
    S: Service<Request<Body>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: http_body::Body + Send + 'static,
    B::Error: Into<super::BoxError>,
    R: http_body::Body + Send + 'static,
    R::Error: Into<super::BoxError>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let started = Instant::now();
        let settings = Arc::clone(&self.settings);
        // The clone isn't ready; the one that is goes with the request.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let (mut parts, body) = request.into_parts();
        remove_own(&mut parts.headers, &[ATTEMPT, FENCE, RECOVERY_POINT]);
        let body = Body::new(body);
        let policy = settings.policy_of(&parts);
        // Another layer before this one may see to it already.
        let key = if parts.extensions.get::<Running>().is_some() { Ok(None) } else { policy.key(&parts) };
        let key = match key {
            Ok(Some(key)) => key,
            Ok(None) => {
                let passed = inner.call(Request::from_parts(parts, body));
                return Box::pin(async move { settings.pass(passed, started).await });
            }
            Err(problem) => {
                let response = settings.refuse(EventKind::Invalid, &problem, is_grpc(&parts.headers), started, None);
                return Box::pin(async move { Ok(response) });
            }
        };
        Box::pin(answer(settings, policy, key, started, parts, body, inner))
    }
}

/// The answer to a request with a key.
#[expect(
    clippy::manual_async_fn,
    reason = "the future of an async fn has room for its arguments twice, and it is moved about"
)]
fn answer<S, R>(
    settings: Arc<Settings>,
    policy: Arc<Policy>,
    key: String,
    started: Instant,
    parts: Parts,
    mut body: Body,
    mut inner: S,
) -> impl Future<Output = Result<Response<Body>, S::Error>> + Send
where
    S: Service<Request<Body>, Response = Response<R>> + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    R: http_body::Body + Send + 'static,
    R::Error: Into<super::BoxError>,
{
    async move {
        let is_grpc = is_grpc(&parts.headers);
        let Some(scope) = settings.scope.of(&parts) else {
            return Ok(settings.refuse(EventKind::Invalid, &Problem::scope_missing(), is_grpc, started, None));
        };
        let held = Held::new(&settings.live.bodies, settings.max_buffered);
        let collected = match request::collect(&mut body, held, &policy, is_grpc).await {
            Ok(collected) => collected,
            Err(problem) => {
                let is_ours = problem.status().is_server_error();
                let kind = if is_ours { EventKind::Unavailable } else { EventKind::Invalid };
                return Ok(settings.refuse(kind, &problem, is_grpc, started, None));
            }
        };
        // Not awaited above, where the future would have to have room for the problem as well.
        if let Collected::Stream = collected {
            return Box::pin(settings.pass(inner.call(Request::from_parts(parts, body)), started)).await;
        }
        let asked = Arc::new(Asked {
            scope,
            operation: policy.operation_of(&parts),
            key,
            fingerprint: policy.digest.fingerprint(&parts, &body.to_bytes()),
            is_synced: policy.durability.unwrap_or(settings.store.durability()) == Durability::Synced,
            is_grpc,
            started,
            policy,
            settings,
        });
        let (claimed, counted) = match asked.decide().await {
            Decision::Answer(response) => return Ok(response),
            Decision::Run(claimed, counted) => (claimed, counted),
            Decision::Pass => {
                let request = Request::from_parts(parts, body);
                let answer = Box::pin(inner.call(request)).await.map(|response| {
                    let (mut head, body) = response.into_parts();
                    unclaim(&mut head);
                    head.headers.insert(UNPROTECTED, HeaderValue::from_static("store-unavailable"));
                    Response::from_parts(head, Body::new(body))
                });
                asked.tell(EventKind::PassedUnprotected, answer.as_ref().ok().map(Response::status));
                return answer;
            }
        };
        let operation = Operation::begin(Arc::clone(&asked), counted, claimed);
        match run::detached(operation, Request::from_parts(parts, body), inner).await {
            Ok(answer) => answer,
            Err(Panicked) => Ok(asked.problem(&Problem::panicked())),
        }
    }
}

/// One request with a key.
pub(super) struct Asked {
    pub(super) scope: Vec<u8>,
    pub(super) operation: String,
    pub(super) key: String,
    pub(super) fingerprint: Fingerprint,
    /// Whether writing to the store waits for the device.
    pub(super) is_synced: bool,
    pub(super) is_grpc: bool,
    started: Instant,
    pub(super) policy: Arc<Policy>,
    pub(super) settings: Arc<Settings>,
}

/// What is to be done about a request.
enum Decision {
    Answer(Response<Body>),
    Run(Claimed, Counted),
    Pass,
}

/// What the store says of a request.
enum Claim {
    Mine(Claimed),
    Replay(Record),
    InFlight(Pending),
    Mismatch,
    /// Interrupted, and to be left so.
    Refused,
}

/// The right to run an operation; given up before it began, the operation did not happen.
pub(super) enum Claimed {
    Fresh(Unbegun),
    /// An earlier owner vanished.
    Over(Reservation),
}

pub(super) struct Unbegun(Option<Reservation>);

impl Unbegun {
    pub(super) fn begin(mut self) -> Reservation {
        self.0.take().expect("it is taken once, here")
    }
}

impl Drop for Unbegun {
    fn drop(&mut self) {
        let Some(reservation) = self.0.take() else { return };
        // If even that can't be written, the key stays interrupted, which promises less.
        let release = move || drop(reservation.release());
        match Handle::try_current() {
            // It may wait for the device.
            Ok(runtime) => drop(runtime.spawn_blocking(release)),
            Err(_) => release(),
        }
    }
}

/// Why the store gave no answer.
struct Failed {
    kind: ErrorKind,
    /// Whether the key was used before, as far as that could be seen.
    is_used: bool,
}

/// How a wait for another's answer ended.
enum Waited {
    Replay(Record),
    Attached(Response<Body>),
    Again,
    TimedOut,
}

impl Asked {
    fn request(&self) -> Key<'_> {
        let policy = &self.policy;
        let mut request = Key::new(&self.key)
            .scope(&self.scope)
            .operation(&self.operation)
            .fingerprint(self.fingerprint)
            .auto_renew(true);
        if let Some(retention) = policy.retention {
            request = request.retention(retention);
        }
        if let Some(lease) = policy.lease {
            request = request.lease(lease);
        }
        if let Some(durability) = policy.durability {
            request = request.durability(durability);
        }
        request
    }

    /// The operation's identity as a map's key: the three parts, with their lengths where they could run together.
    pub(super) fn identity(&self) -> Box<[u8]> {
        let lens = [self.scope.len() as u64, self.operation.len() as u64].map(u64::to_le_bytes);
        [&lens[0], &lens[1], &self.scope[..], self.operation.as_bytes(), self.key.as_bytes()].concat().into()
    }

    pub(super) fn tell(&self, kind: EventKind, status: Option<StatusCode>) {
        let identity = Identity { scope: &self.scope, operation: &self.operation, key: &self.key };
        self.settings.tell(kind, status, self.started, Some(identity));
    }

    pub(super) fn refuse(&self, kind: EventKind, problem: &Problem) -> Response<Body> {
        let response = self.problem(problem);
        self.tell(kind, Some(response.status()));
        response
    }

    pub(super) fn problem(&self, problem: &Problem) -> Response<Body> {
        self.settings.problem(problem, self.is_grpc)
    }

    async fn decide(self: &Arc<Self>) -> Decision {
        let until = match self.policy.in_flight {
            InFlight::Refuse => None,
            InFlight::Wait(limit) => Some(tokio::time::Instant::now() + limit.min(LONGEST_WAIT)),
        };
        loop {
            let pending = match self.claim().await {
                Ok(Claim::Mine(claimed)) => {
                    return match Counted::new(&self.settings.live, self.settings.max_running) {
                        Some(counted) => Decision::Run(claimed, counted),
                        None => {
                            let problem = Problem::too_many_running(self.policy.retry_after);
                            Decision::Answer(self.refuse(EventKind::Unavailable, &problem))
                        }
                    };
                }
                Ok(Claim::InFlight(pending)) => pending,
                Ok(Claim::Replay(record)) => return Decision::Answer(self.replay(record)),
                Ok(Claim::Mismatch) => {
                    return Decision::Answer(self.refuse(EventKind::Mismatched, &Problem::mismatch()));
                }
                Ok(Claim::Refused) => {
                    return Decision::Answer(self.refuse(EventKind::OutcomeUnknown, &Problem::outcome_unknown()));
                }
                Err(failed) => return self.without_store(&failed),
            };
            match Box::pin(self.wait(pending, until)).await {
                Ok(Waited::Again) => {}
                Ok(Waited::Replay(record)) => return Decision::Answer(self.replay(record)),
                Ok(Waited::Attached(response)) => {
                    self.tell(EventKind::Attached, Some(response.status()));
                    return Decision::Answer(response);
                }
                Ok(Waited::TimedOut) => {
                    let problem = Problem::in_flight(self.policy.retry_after);
                    return Decision::Answer(self.refuse(EventKind::InFlight, &problem));
                }
                Err(error) => return self.without_store(&Failed { kind: error.kind(), is_used: true }),
            }
        }
    }

    /// Asks the store. What may wait for the device goes to a thread for that.
    async fn claim(self: &Arc<Self>) -> Result<Claim, Failed> {
        // Nothing is to be seen before it is decided.
        if !self.is_synced && !matches!(self.policy.interrupted, Interrupted::Refuse) {
            return self.reserve().map_err(|error| self.failed(&error));
        }
        let is_answered = match self.settings.store.lookup(&self.request()).map_err(|error| self.failed(&error))? {
            None => false,
            // The store sees to it that this is a mismatch.
            Some(found) if found.fingerprint != self.fingerprint => true,
            Some(found) => match (found.standing, &self.policy.interrupted) {
                // Left alone, for taking it over would be a write, and an attempt.
                (Standing::Interrupted { .. }, Interrupted::Refuse) => return Ok(Claim::Refused),
                (Standing::Interrupted { .. }, Interrupted::Rerun | Interrupted::Reconcile(_)) => false,
                (Standing::Running { .. }, _) => false,
                (Standing::Completed(_), _) => true,
            },
        };
        let claim = if self.is_synced && !is_answered {
            let asked = Arc::clone(self);
            blocking(move || asked.reserve()).await
        } else {
            self.reserve()
        };
        claim.map_err(|error| self.failed(&error))
    }

    /// A key of which nothing can be seen counts as unused, but for one whose record is damaged.
    fn failed(&self, error: &crate::Error) -> Failed {
        let kind = error.kind();
        let is_seen = || matches!(self.settings.store.lookup(&self.request()), Ok(Some(_)));
        Failed { kind, is_used: kind == ErrorKind::Corrupt || is_seen() }
    }

    fn reserve(&self) -> crate::Result<Claim> {
        Ok(match self.settings.store.reserve(&self.request())? {
            Outcome::Reserved(reservation) => Claim::Mine(Claimed::Fresh(Unbegun(Some(reservation)))),
            Outcome::Interrupted(reservation) => match self.policy.interrupted {
                Interrupted::Refuse => Claim::Refused,
                Interrupted::Rerun | Interrupted::Reconcile(_) => Claim::Mine(Claimed::Over(reservation)),
            },
            Outcome::Replay(record) => Claim::Replay(record),
            Outcome::InFlight(pending) => Claim::InFlight(pending),
            Outcome::Mismatch(_) => Claim::Mismatch,
        })
    }

    /// Follows the answer that is being made, if it is one that streams, or waits for its end if that is asked for.
    async fn wait(&self, pending: Pending, until: Option<tokio::time::Instant>) -> crate::Result<Waited> {
        let identity = self.identity();
        let live = &self.settings.live;
        let fence = pending.fence();
        let attach = || {
            let recording = live.streams.get(&identity)?;
            match recording.fence().cmp(&fence) {
                // Of an operation that lost its reservation; the one that was met has not begun its answer.
                cmp::Ordering::Less => None,
                cmp::Ordering::Equal => recording.attach().map(Waited::Attached),
                // Of an operation that began since, perhaps with another payload.
                cmp::Ordering::Greater => Some(Waited::Again),
            }
        };
        let Some(until) = until else {
            return Ok(attach().unwrap_or(Waited::TimedOut));
        };
        let mut over = pin!(pending.wait_async());
        loop {
            let mut begun = pin!(live.stream_begun.notified());
            if let Some(attached) = attach() {
                return Ok(attached);
            }
            let turn = poll_fn(|context| match over.as_mut().poll(context) {
                Poll::Ready(wait) => Poll::Ready(Some(wait)),
                Poll::Pending => begun.as_mut().poll(context).map(|()| None),
            });
            match tokio::time::timeout_at(until, turn).await {
                Err(_) => return Ok(Waited::TimedOut),
                Ok(None) => {}
                Ok(Some(wait)) => {
                    return Ok(match wait? {
                        Wait::Replay(record) => Waited::Replay(record),
                        Wait::Retry => Waited::Again,
                        Wait::TimedOut(_) => Waited::TimedOut,
                    });
                }
            }
        }
    }

    fn replay(&self, record: Record) -> Response<Body> {
        let expires_at = record.expires_at();
        let Some(answer) = answer::StoredAnswer::decode(Bytes::from_owner(record)) else {
            return self.refuse(EventKind::Replayed, &Problem::unreadable());
        };
        let is_whole = answer.body.is_some();
        // A call's answer can't go without its message.
        let mut response =
            if is_whole || !self.is_grpc { answer.into_response() } else { self.problem(&Problem::not_kept()) };
        let headers = response.headers_mut();
        mark_replayed(headers);
        mark_expiry(headers, expires_at);
        if !is_whole {
            headers.insert(UNAVAILABLE, HeaderValue::from_static("body-not-stored"));
        }
        self.tell(EventKind::Replayed, Some(response.status()));
        response
    }

    /// What is done while the store can't take the request.
    fn without_store(&self, failed: &Failed) -> Decision {
        match (failed.kind, self.policy.when_unavailable) {
            (ErrorKind::InvalidKey, _) => {
                let problem = Problem::key_invalid("with its scope and operation it is longer than the store allows");
                Decision::Answer(self.refuse(EventKind::Invalid, &problem))
            }
            // What became of it can't be read any more.
            (ErrorKind::Corrupt, _) => {
                Decision::Answer(self.refuse(EventKind::OutcomeUnknown, &Problem::outcome_unknown()))
            }
            (_, WhenUnavailable::Pass) if !failed.is_used => Decision::Pass,
            (_, WhenUnavailable::Pass | WhenUnavailable::Refuse) => {
                let problem = Problem::store_unavailable(self.policy.retry_after);
                Decision::Answer(self.refuse(EventKind::Unavailable, &problem))
            }
        }
    }
}

/// What can be added to any time of now.
const LONGEST_WAIT: Duration = Duration::from_secs(365 * 24 * 3600);

pub(super) fn mark_replayed(headers: &mut HeaderMap) {
    headers.insert(REPLAYED, HeaderValue::from_static("true"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
}

/// Takes out of a service's answer to a request with a key what only the layer says of keys.
pub(super) fn unclaim(answer: &mut response::Parts) {
    remove_own(&mut answer.headers, &[REPLAYED, EXPIRES, UNAVAILABLE, UNPROTECTED]);
    if answer.extensions.get::<Own>().is_none() {
        remove_own(&mut answer.headers, &[PROBLEM]);
    }
}

/// Takes out some of the layer's headers. Mostly there are none: one look at each name is cheaper than a search for each of these.
fn remove_own(headers: &mut HeaderMap, names: &[HeaderName]) {
    let is_own = |name: &&HeaderName| name.as_str().starts_with("idempotency-") && names.contains(name);
    while let Some(name) = headers.keys().find(is_own).cloned() {
        headers.remove(name);
    }
}

pub(super) fn mark_expiry(headers: &mut HeaderMap, expires_at: Option<SystemTime>) {
    let since_epoch = expires_at.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
    // No date beyond the year 9999 can be written down, nor would anybody wait for it.
    let Some(second) = since_epoch.map(|since| since.as_secs()).filter(|second| *second <= 253_402_300_799) else {
        return;
    };
    headers.insert(EXPIRES, date_of(second));
}

/// A second since 1970 as HTTP writes it.
fn date_of(second: u64) -> HeaderValue {
    thread_local! {
        // Answers of one second mostly end in one second.
        static LAST: RefCell<(u64, HeaderValue)> = const { RefCell::new((u64::MAX, HeaderValue::from_static(""))) };
    }
    LAST.with_borrow_mut(|(last, date)| {
        if *last != second {
            let text = httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + Duration::from_secs(second));
            *date = HeaderValue::from_maybe_shared(Bytes::from(text)).expect("a date is visible ASCII");
            *last = second;
        }
        date.clone()
    })
}

impl Settings {
    fn policy_of(&self, parts: &Parts) -> Arc<Policy> {
        let own = self.route.as_ref().and_then(|route| route(parts));
        own.unwrap_or_else(|| Arc::clone(&self.policy))
    }

    /// Hands on the answer to a request that passed untouched.
    async fn pass<R, E>(
        &self,
        answer: impl Future<Output = Result<Response<R>, E>>,
        started: Instant,
    ) -> Result<Response<Body>, E>
    where
        R: http_body::Body + Send + 'static,
        R::Error: Into<super::BoxError>,
    {
        let answer = answer.await.map(|response| response.map(Body::new));
        self.tell(EventKind::Passed, answer.as_ref().ok().map(Response::status), started, None);
        answer
    }

    fn tell(&self, kind: EventKind, status: Option<StatusCode>, started: Instant, identity: Option<Identity<'_>>) {
        if let Some(observer) = &self.observer {
            observer(&Event { kind, status, elapsed: started.elapsed(), identity });
        }
    }

    fn problem(&self, problem: &Problem, is_grpc: bool) -> Response<Body> {
        let problem = problem.clone().documentation(self.documentation.as_ref());
        if is_grpc { problem.grpc_response() } else { problem.response() }
    }

    fn refuse(
        &self,
        kind: EventKind,
        problem: &Problem,
        is_grpc: bool,
        started: Instant,
        identity: Option<Identity<'_>>,
    ) -> Response<Body> {
        let response = self.problem(problem, is_grpc);
        self.tell(kind, Some(response.status()), started, identity);
        response
    }
}

impl Policy {
    /// The request's key; `None` if it goes without.
    fn key(&self, parts: &Parts) -> Result<Option<String>, Problem> {
        if !self.methods.contains(&parts.method) || self.passes.as_ref().is_some_and(|test| test(parts)) {
            return Ok(None);
        }
        match key::parse(&parts.headers, &self.header)? {
            None if self.is_required => Err(Problem::key_missing(&self.header)),
            key => Ok(key),
        }
    }

    fn operation_of(&self, parts: &Parts) -> String {
        let own: Option<&OperationOf> = self.operation.as_deref();
        own.map_or_else(|| operation_of(&parts.method, parts.uri.path()), |own| shorten(own(parts)))
    }
}

/// Bytes of an operation that isn't cut down to a digest, at most.
const MAX_OPERATION_LEN: usize = 128;

/// The operation, as the store has it, that a request with this method and path is, unless the policy has a way of its own.
///
/// It is method, space and path; where that is longer than 128 bytes, ` #` and the 64 hex digits of its BLAKE3 digest stand for
/// the path.
///
/// ```
/// use http::Method;
/// assert_eq!(oncekey::http::operation_of(&Method::POST, "/v1/payments"), "POST /v1/payments");
/// ```
pub fn operation_of(method: &Method, path: &str) -> String {
    let operation = [method.as_str(), " ", path].concat();
    if operation.len() <= MAX_OPERATION_LEN {
        return operation;
    }
    format!("{:.40} {}", method.as_str(), digest_of(&operation))
}

fn shorten(operation: String) -> String {
    if operation.len() <= MAX_OPERATION_LEN { operation } else { digest_of(&operation) }
}

fn digest_of(operation: &str) -> String {
    format!("#{}", blake3::hash(operation.as_bytes()).to_hex())
}

pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|value| {
        let rest = value.as_bytes().strip_prefix(b"application/grpc");
        rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
    })
}

/// One running operation, in the count of them.
pub(super) struct Counted(Arc<Live>);

impl Counted {
    /// One more, if there may be.
    fn new(live: &Arc<Live>, most: usize) -> Option<Self> {
        // Relaxed: it is only counted, and whoever waits for zero looks again when told.
        let more = |running: usize| (running < most).then_some(running + 1);
        live.running.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Counted(Arc::clone(live)))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if self.0.running.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings").field("store", &self.store).field("policy", &self.policy).finish_non_exhaustive()
    }
}

impl fmt::Debug for IdempotencyLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IdempotencyLayer").field(&self.0).finish()
    }
}
