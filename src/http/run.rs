//! The run of an operation, from the right to run it to its stored answer, whether or not its client stays.

use super::answer::{self, StoredAnswer};
use super::body::{Body, Trailers};
use super::event::EventKind;
use super::layer::{
    ATTEMPT, Asked, Claimed, Counted, FENCE, Live, RECOVERY_POINT, UNAVAILABLE, mark_expiry, mark_replayed, unclaim,
};
use super::policy::{Interrupted, Interruption, Reconcile, Reconciled, Verdict, grpc_verdict};
use super::problem::{GRPC_STATUS, Own, PROBLEM, PROBLEM_PREFIX, Problem, byte_sequence};
use super::recording::Recording;
use super::running::Running;
use super::{BoxError, blocking};
use crate::{ErrorKind, Reservation};
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, HeaderMap, HeaderValue};
use http::{Request, Response, StatusCode, response};
use http_body::Body as _;
use http_body_util::BodyExt;
use smallvec::SmallVec;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::SystemTime;
use tokio::runtime::Handle;
use tower_service::Service;

/// An answer that tells a length up to this, in bytes, is stored before its head is sent.
const HELD: u64 = 64 * 1024;

/// A piece of an answer up to this, in bytes, is kept as a copy: it may be all that is left of a larger buffer that it was read into.
const SMALL: usize = 16 * 1024;

/// A future that, dropped before its end, goes on as a task.
pub(super) struct Detached<T: Send + 'static> {
    future: Option<Pin<Box<dyn Future<Output = T> + Send>>>,
    runtime: Handle,
}

impl<T: Send + 'static> Detached<T> {
    fn new(future: impl Future<Output = T> + Send + 'static) -> Self {
        Detached { future: Some(Box::pin(future)), runtime: Handle::current() }
    }
}

impl<T: Send + 'static> Future for Detached<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        // One that panics is not polled again.
        let Some(mut future) = self.future.take() else { return Poll::Pending };
        let poll = future.as_mut().poll(context);
        if poll.is_pending() {
            self.future = Some(future);
        }
        poll
    }
}

impl<T: Send + 'static> Drop for Detached<T> {
    fn drop(&mut self) {
        if let Some(future) = self.future.take() {
            self.runtime.spawn(future);
        }
    }
}

/// What a service comes to.
type Answered<E> = Result<Response<Body>, E>;

/// Runs the operation to its end, whether or not its client stays for the answer.
pub(super) fn detached<S, R>(
    operation: Operation,
    request: Request<Body>,
    inner: S,
) -> Detached<Result<Answered<S::Error>, Panicked>>
where
    S: Service<Request<Body>, Response = Response<R>> + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    R: http_body::Body + Send + 'static,
    R::Error: Into<BoxError>,
{
    Detached::new(Caught { future: run(operation, request, inner) })
}

/// Runs the operation, and gives its first client the answer.
#[expect(
    clippy::manual_async_fn,
    reason = "the future of an async fn has room for its arguments twice, and it is moved about"
)]
fn run<S, R>(
    operation: Operation,
    mut request: Request<Body>,
    mut inner: S,
) -> impl Future<Output = Answered<S::Error>> + Send
where
    S: Service<Request<Body>, Response = Response<R>> + Send,
    S::Future: Send,
    R: http_body::Body + Send + 'static,
    R::Error: Into<BoxError>,
{
    async move {
        let is_over = operation.running.attempt() > 1;
        operation.asked.tell(if is_over { EventKind::TakenOver } else { EventKind::Started }, None);
        if is_over && let Interrupted::Reconcile(find_out) = &operation.asked.policy.interrupted {
            // Boxed, like all that is rare: see above.
            if let Some(answer) = Box::pin(operation.reconcile(find_out, request.body().to_bytes())).await {
                return Ok(answer);
            }
        }
        operation.introduce(&mut request);
        let (head, body) = inner.call(request).await?.into_parts();
        Ok(operation.conclude(head, Body::new(body)).await)
    }
}

/// A panic, which the hook has told of.
pub(super) struct Panicked;

pin_project_lite::pin_project! {
    /// A future whose panics are its end.
    struct Caught<F> {
        #[pin]
        future: F,
    }
}

impl<F: Future> Future for Caught<F> {
    type Output = Result<F::Output, Panicked>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let future = self.project().future;
        // After a panic it isn't polled again.
        match catch_unwind(AssertUnwindSafe(|| future.poll(context))) {
            Ok(poll) => poll.map(Ok),
            Err(_) => Poll::Ready(Err(Panicked)),
        }
    }
}

/// How much of a body came, beside what was told of its length.
#[derive(Clone, Copy)]
struct Length {
    told: Option<u64>,
    so_far: u64,
}

impl Length {
    fn of(head: &response::Parts, body: &Body) -> Self {
        let in_head = || head.headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok();
        Length { told: body.size_hint().exact().or_else(in_head), so_far: 0 }
    }

    fn is_reached(&self) -> bool {
        self.told == Some(self.so_far)
    }

    fn is_exceeded(&self) -> bool {
        self.told.is_some_and(|told| told < self.so_far)
    }

    fn may_end(&self) -> bool {
        self.told.is_none_or(|told| told == self.so_far)
    }
}

/// What goes to a recording.
struct Passing<'r> {
    recording: &'r Recording,
    length: Length,
    /// The piece with which a client has the whole answer, where its length was told.
    last: Option<Bytes>,
}

impl Passing<'_> {
    fn push(&mut self, piece: Bytes) {
        self.length.so_far += piece.len() as u64;
        if self.length.is_reached() { self.last = Some(piece) } else { self.recording.push(piece) }
    }
}

/// What was read of an answer's body before its head was sent.
struct Reading {
    pieces: SmallVec<[Bytes; 1]>,
    length: Length,
    trailers: Trailers,
}

enum Turn {
    /// Never empty.
    Data(Bytes),
    Trailers(Box<HeaderMap>),
    End,
    Broken,
    /// Nothing is there yet.
    Later,
}

/// The next frame, or, if that isn't waited for, word that there is none yet.
async fn next(body: &mut Body, waits: bool) -> Turn {
    loop {
        // So that a body that is always ready lets others have a turn, also one of empty frames.
        tokio::task::coop::consume_budget().await;
        let frame = poll_fn(|context| match Pin::new(&mut *body).poll_frame(context) {
            Poll::Pending if waits => Poll::Pending,
            Poll::Pending => Poll::Ready(None),
            Poll::Ready(frame) => Poll::Ready(Some(frame)),
        });
        let frame = match frame.await {
            None => return Turn::Later,
            Some(None) => return Turn::End,
            Some(Some(Err(_))) => return Turn::Broken,
            Some(Some(Ok(frame))) => frame,
        };
        match frame.into_data() {
            Ok(data) if data.is_empty() => {}
            Ok(data) if data.len() <= SMALL => return Turn::Data(Bytes::copy_from_slice(&data)),
            Ok(data) => return Turn::Data(data),
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    return Turn::Trailers(Box::new(trailers));
                }
            }
        }
    }
}

/// How an operation ended.
enum Ended {
    Stored { until: Option<SystemTime>, is_whole: bool },
    Released,
    Unknown,
    NotStored,
}

/// An operation that runs. If it is dropped, its key is left interrupted, whoever still has a handle to it.
pub(super) struct Operation {
    running: Running,
    asked: Arc<Asked>,
    _counted: Counted,
}

impl Operation {
    pub(super) fn begin(asked: Arc<Asked>, counted: Counted, claimed: Claimed) -> Self {
        let reservation = match claimed {
            Claimed::Fresh(unbegun) => unbegun.begin(),
            Claimed::Over(reservation) => reservation,
        };
        Operation { running: Running::new(reservation, asked.is_synced), asked, _counted: counted }
    }

    /// Finds out what became of the attempt before; the answer, unless the operation is to run.
    async fn reconcile(&self, find_out: &Reconcile, body: Bytes) -> Option<Response<Body>> {
        let asked = &self.asked;
        let interruption = Interruption {
            scope: asked.scope.clone(),
            operation: asked.operation.clone(),
            key: asked.key.clone(),
            attempt: self.running.attempt(),
            recovery_point: self.running.recovery_point(),
            body,
        };
        match find_out.ask(interruption).await {
            Ok(Reconciled::DidNotHappen) => None,
            Ok(Reconciled::Happened(response)) => Some(self.happened(response).await),
            Ok(Reconciled::StillUnknown) | Err(_) => Some(self.refuse(&Problem::outcome_unknown())),
        }
    }

    /// Tells the service what it may want to know of its operation.
    fn introduce(&self, request: &mut Request<Body>) {
        let headers = request.headers_mut();
        let attempt = match self.running.attempt() {
            1 => HeaderValue::from_static("1"),
            attempt => HeaderValue::from(attempt),
        };
        headers.insert(ATTEMPT, attempt);
        headers.insert(FENCE, HeaderValue::from(self.running.fence()));
        if let Some(point) = self.running.recovery_point().and_then(|point| byte_sequence(&point)) {
            headers.insert(RECOVERY_POINT, point);
        }
        request.extensions_mut().insert(self.running.clone());
    }

    /// Leaves the key interrupted, unless it is over already.
    fn abandon(&self, status: Option<StatusCode>) {
        if self.running.take().is_some() {
            self.asked.tell(EventKind::Unknown, status);
        }
    }

    fn refuse(&self, problem: &Problem) -> Response<Body> {
        self.abandon(Some(problem.status()));
        self.asked.problem(problem)
    }

    /// Reads the answer as far as it is there, and stores it if that is all; otherwise it is recorded on its way.
    #[expect(clippy::manual_async_fn, reason = "as of `run`")]
    fn conclude(self, mut head: response::Parts, mut body: Body) -> impl Future<Output = Response<Body>> + Send {
        async move {
            let verdict = self.verdict(&head, None);
            unclaim(&mut head);
            match verdict {
                Some(verdict @ (Verdict::Release | Verdict::Unknown)) => {
                    self.finish(verdict, &head, None, None).await;
                    return Response::from_parts(head, body);
                }
                Some(Verdict::Store) | None => {}
            }
            let cap = self.asked.policy.max_answer as u64;
            let length = Length::of(&head, &body);
            let is_short = length.told.is_some_and(|len| len <= HELD);
            let mut reading = Reading { pieces: SmallVec::new(), length, trailers: None };
            let is_whole = loop {
                let length = &mut reading.length;
                if length.is_exceeded() {
                    break false;
                }
                if length.so_far > cap && !is_short {
                    return self.record(head, body, reading);
                }
                match next(&mut body, is_short || length.is_reached()).await {
                    Turn::Data(data) => {
                        length.so_far += data.len() as u64;
                        reading.pieces.push(data);
                    }
                    Turn::Trailers(trailers) => reading.trailers = Some(trailers),
                    Turn::End => break length.may_end(),
                    Turn::Broken => break false,
                    Turn::Later => return self.record(head, body, reading),
                }
            };
            if !is_whole {
                self.abandon(Some(head.status));
                let recording = self.recording(&head, reading.length.told);
                let follower = recording.follow();
                reading.pieces.into_iter().for_each(|piece| recording.push(piece));
                recording.break_off();
                return Response::from_parts(head, Body::followed(follower));
            }
            let verdict = self.last_verdict(&head, reading.trailers.as_deref());
            let body = join(reading.pieces);
            self.finish_whole(verdict, &mut head, &body, reading.trailers.as_deref()).await;
            Response::from_parts(head, Body::whole(body, reading.trailers))
        }
    }

    /// Stores what was found out to be the answer.
    async fn happened(&self, response: Response<Body>) -> Response<Body> {
        let (mut head, body) = response.into_parts();
        unclaim(&mut head);
        let Ok(collected) = body.collect().await else { return self.refuse(&Problem::outcome_unknown()) };
        let mut trailers = collected.trailers().cloned().map(Box::new);
        let has_status =
            [Some(&head.headers), trailers.as_deref()].into_iter().flatten().any(|map| map.contains_key(GRPC_STATUS));
        if self.asked.is_grpc && !has_status {
            trailers.get_or_insert_default().insert(GRPC_STATUS, HeaderValue::from_static("0"));
        }
        let body = collected.to_bytes();
        self.finish_whole(Verdict::Store, &mut head, &body, trailers.as_deref()).await;
        Response::from_parts(head, Body::whole(body, trailers))
    }

    /// Stores an answer that is there as a whole, and marks it for the first client.
    async fn finish_whole(
        &self,
        verdict: Verdict,
        head: &mut response::Parts,
        body: &Bytes,
        trailers: Option<&HeaderMap>,
    ) {
        let stored = (body.len() <= self.asked.policy.max_answer).then_some(body);
        match self.finish(verdict, head, stored, trailers).await {
            Ended::Stored { until, .. } => mark_expiry(&mut head.headers, until),
            Ended::NotStored => {
                head.headers.insert(UNAVAILABLE, HeaderValue::from_static("not-stored"));
            }
            Ended::Released | Ended::Unknown => {}
        }
    }

    fn recording(&self, head: &response::Parts, told: Option<u64>) -> Arc<Recording> {
        let policy = &self.asked.policy;
        let mut headers = policy.stored_headers.apply(&head.headers);
        mark_replayed(&mut headers);
        Recording::new(self.running.fence(), head.status, headers, told, policy.max_answer)
    }

    /// Lets the first client follow the answer while a task records it.
    fn record(self, head: response::Parts, body: Body, reading: Reading) -> Response<Body> {
        let recording = self.recording(&head, reading.length.told);
        let first_client = recording.follow();
        let tape = Tape::begin(Arc::clone(&self.asked.settings.live), self.asked.identity(), recording);
        let first = head.clone();
        tokio::spawn(self.drive(head, body, reading, tape));
        Response::from_parts(first, Body::followed(first_client))
    }

    /// Passes the body on as it comes, and stores it before its end is told.
    async fn drive(self, head: response::Parts, mut body: Body, reading: Reading, tape: Tape) {
        let recording = &tape.recording;
        let mut passing = Passing { recording, length: Length { so_far: 0, ..reading.length }, last: None };
        let mut trailers = reading.trailers;
        reading.pieces.into_iter().for_each(|piece| passing.push(piece));
        let is_whole = loop {
            recording.room().await;
            match next(&mut body, true).await {
                Turn::Data(data) => passing.push(data),
                Turn::Trailers(more) => trailers = Some(more),
                Turn::End => break passing.length.may_end(),
                Turn::Broken | Turn::Later => break false,
            }
            if passing.length.is_exceeded() {
                break false;
            }
        };
        if !is_whole {
            self.abandon(Some(head.status));
            return recording.break_off();
        }
        let Passing { length, last, .. } = passing;
        let is_kept = length.so_far <= self.asked.policy.max_answer as u64;
        let body = recording.pieces().filter(|_| is_kept);
        let body = body.map(|pieces| join(pieces.into_iter().chain(last.clone())));
        let verdict = self.last_verdict(&head, trailers.as_deref());
        self.finish(verdict, &head, body.as_ref(), trailers.as_deref()).await;
        if let Some(last) = last {
            recording.push(last);
        }
        recording.end(trailers);
    }

    /// What becomes of the key, as far as that is known yet.
    fn verdict(&self, head: &response::Parts, trailers: Option<&HeaderMap>) -> Option<Verdict> {
        if let Some(own) = self.running.verdict() {
            return Some(own);
        }
        // Another layer behind this one answered for itself, and will do so again.
        if is_of_a_layer(head) {
            return Some(Verdict::Release);
        }
        let by_policy = || self.asked.policy.verdicts.verdict(head);
        if !self.asked.is_grpc {
            return Some(by_policy());
        }
        let status = trailers.and_then(grpc_verdict).or_else(|| grpc_verdict(&head.headers));
        // What is no answer to a call came from something in between.
        status.or_else(|| (head.status != StatusCode::OK).then(by_policy))
    }

    /// What becomes of the key once the answer is there as a whole. A gRPC answer without a status is none.
    fn last_verdict(&self, head: &response::Parts, trailers: Option<&HeaderMap>) -> Verdict {
        self.verdict(head, trailers).unwrap_or(Verdict::Unknown)
    }

    /// Does with the key as the verdict says. Without a body only status and headers are stored.
    async fn finish(
        &self,
        verdict: Verdict,
        head: &response::Parts,
        body: Option<&Bytes>,
        trailers: Option<&HeaderMap>,
    ) -> Ended {
        let ended = match self.write(verdict, head, body, trailers) {
            Ok(ended) => ended,
            Err(writing) => writing.await,
        };
        drop(self.running.take());
        let kind = match ended {
            Ended::Stored { is_whole: true, .. } => EventKind::Stored,
            Ended::Stored { is_whole: false, .. } => EventKind::StoredWithoutBody,
            Ended::Released => EventKind::Released,
            Ended::Unknown => EventKind::Unknown,
            Ended::NotStored => EventKind::NotStored,
        };
        self.asked.tell(kind, Some(head.status));
        ended
    }

    /// What is to be stored; `None` if it can't be, or the operation is over.
    fn to_store(&self, head: &response::Parts, body: Option<&Bytes>, trailers: Option<&HeaderMap>) -> Option<ToStore> {
        let policy = &self.asked.policy;
        let filter = &policy.stored_headers;
        let is_failure = head.status.is_client_error()
            || head.status.is_server_error()
            || [Some(&head.headers), trailers].into_iter().flatten().any(is_grpc_failure);
        let (encoded, is_whole) = if let (Some(body), None) = (body, &policy.redact) {
            let trailers = trailers.map(|trailers| filter.kept(trailers));
            (answer::encode(head.status, filter.kept(&head.headers), Some(body), trailers)?, true)
        } else {
            let trailers = trailers.map(|trailers| filter.apply(trailers));
            let mut answer = StoredAnswer::new(head.status, filter.apply(&head.headers), body.cloned(), trailers);
            if answer.body.is_none() {
                answer = answer.without_body();
            }
            if let Some(redact) = &policy.redact {
                redact(&mut answer);
            }
            (answer.encode()?, answer.body.is_some())
        };
        // Until here code of the policy ran, which may panic.
        Some(ToStore { own: self.running.take()?, encoded, is_whole, is_failure })
    }

    /// Writes to the store what the verdict says; where that waits for the device, on a thread that may.
    fn write(
        &self,
        verdict: Verdict,
        head: &response::Parts,
        body: Option<&Bytes>,
        trailers: Option<&HeaderMap>,
    ) -> Result<Ended, impl Future<Output = Ended>> {
        let write = match verdict {
            Verdict::Store => match self.to_store(head, body, trailers) {
                Some(answer) => Write::Answer(answer),
                None => return Ok(Ended::NotStored),
            },
            Verdict::Release => match self.running.take() {
                Some(own) => Write::Release(own),
                None => return Ok(Ended::Unknown),
            },
            Verdict::Unknown => return Ok(Ended::Unknown),
        };
        if self.running.is_synced() { Err(blocking(move || write.done())) } else { Ok(write.done()) }
    }
}

/// What is to be written at an operation's end.
enum Write {
    Answer(ToStore),
    Release(Reservation),
}

impl Write {
    fn done(self) -> Ended {
        match self {
            Write::Answer(answer) => answer.store(),
            Write::Release(own) => own.release().map_or(Ended::Unknown, |()| Ended::Released),
        }
    }
}

/// An answer on its way to the store.
struct ToStore {
    own: Reservation,
    encoded: Vec<u8>,
    /// With its body.
    is_whole: bool,
    is_failure: bool,
}

impl ToStore {
    /// Stores it, without its body where the store has too little room for that.
    fn store(self) -> Ended {
        let ToStore { own, encoded, is_whole, is_failure } = self;
        let store =
            |own: Reservation, encoded: &[u8]| if is_failure { own.fail(encoded) } else { own.complete(encoded) };
        let unwritten = match store(own, &encoded) {
            Ok(record) => return Ended::Stored { until: record.expires_at(), is_whole },
            Err(unwritten) => unwritten,
        };
        let is_too_large = unwritten.error.is_full() || unwritten.error.kind() == ErrorKind::RecordTooLarge;
        let whole = if is_whole && is_too_large { StoredAnswer::decode(encoded.into()) } else { None };
        let short = whole.and_then(|whole| whole.without_body().encode());
        match short.map(|short| store(unwritten.reservation, &short)) {
            Some(Ok(record)) => Ended::Stored { until: record.expires_at(), is_whole: false },
            Some(Err(_)) | None => Ended::NotStored,
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        self.abandon(None);
    }
}

/// Whether it is a problem of a layer: in this process, or as one that is further away says it.
fn is_of_a_layer(head: &response::Parts) -> bool {
    let is_problem = |name: &HeaderValue| name.as_bytes().starts_with(PROBLEM_PREFIX.as_bytes());
    let is_said = || !head.status.is_success() && head.headers.get(PROBLEM).is_some_and(is_problem);
    head.extensions.get::<Own>().is_some() || is_said()
}

fn is_grpc_failure(headers: &HeaderMap) -> bool {
    headers.get(GRPC_STATUS).is_some_and(|status| status != "0")
}

fn join(pieces: impl IntoIterator<Item = Bytes>) -> Bytes {
    let mut pieces = pieces.into_iter();
    match (pieces.next(), pieces.next()) {
        (None, _) => Bytes::new(),
        (Some(whole), None) => whole,
        (Some(first), Some(second)) => [first, second].into_iter().chain(pieces).collect::<Vec<_>>().concat().into(),
    }
}

/// A recording where duplicates find it, until it is let go.
struct Tape {
    live: Arc<Live>,
    identity: Box<[u8]>,
    recording: Arc<Recording>,
}

impl Tape {
    fn begin(live: Arc<Live>, identity: Box<[u8]>, recording: Arc<Recording>) -> Self {
        // One whose reservation was lost meanwhile leaves its place to who took the key.
        let mut place = live.streams.entry(identity.clone()).or_insert_with(|| Arc::clone(&recording));
        if place.fence() < recording.fence() {
            *place = Arc::clone(&recording);
        }
        drop(place);
        live.stream_begun.notify_waiters();
        Tape { live, identity, recording }
    }
}

impl Drop for Tape {
    fn drop(&mut self) {
        // Also where the task ended before its time; an end that was told stays.
        self.recording.break_off();
        self.live.streams.remove_if(&self.identity, |_, recording| Arc::ptr_eq(recording, &self.recording));
    }
}
