//! The run of an operation, from the right to run it to its stored answer, whether or not its client stays.

use super::answer::StoredAnswer;
use super::body::Body;
use super::event::EventKind;
use super::layer::{
    ATTEMPT, Asked, Claimed, Counted, FENCE, Live, RECOVERY_POINT, TOO_LARGE, UNAVAILABLE, mark_expiry, mark_replayed,
};
use super::policy::{Interrupted, Interruption, Reconciled, Verdict, grpc_verdict};
use super::problem::{Problem, byte_sequence};
use super::recording::Recording;
use super::running::Running;
use super::{BoxError, blocking};
use crate::{ErrorKind, Record, Reservation, Unwritten};
use bytes::Bytes;
use http::header::{HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Request, Response, response};
use http_body::{Body as _, Frame};
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};
use tokio::runtime::Handle;
use tower_service::Service;

/// An answer that tells a length up to this, in bytes, is stored before its head is sent.
const HELD: u64 = 64 * 1024;
/// How long a client may take nothing of an answer that is too large to be kept, before the operation goes on without it.
const STALL: Duration = Duration::from_secs(30);

/// A future that, dropped before its end, goes on as a task.
pub(super) struct Detached<T: Send + 'static> {
    future: Option<Pin<Box<dyn Future<Output = T> + Send>>>,
    runtime: Handle,
}

impl<T: Send + 'static> Detached<T> {
    pub(super) fn new(future: impl Future<Output = T> + Send + 'static) -> Self {
        Detached { future: Some(Box::pin(future)), runtime: Handle::current() }
    }
}

impl<T: Send + 'static> Future for Detached<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let Some(future) = &mut self.future else { return Poll::Pending };
        let output = std::task::ready!(future.as_mut().poll(context));
        self.future = None;
        Poll::Ready(output)
    }
}

impl<T: Send + 'static> Drop for Detached<T> {
    fn drop(&mut self) {
        if let Some(future) = self.future.take() {
            self.runtime.spawn(future);
        }
    }
}

/// Runs the operation, and gives its first client the answer.
pub(super) async fn run<S, R>(
    asked: Arc<Asked>,
    claimed: Claimed,
    parts: Parts,
    body: Bytes,
    trailers: Option<HeaderMap>,
    mut inner: S,
) -> Result<Response<Body>, S::Error>
where
    S: Service<Request<Body>, Response = Response<R>> + Send,
    S::Future: Send,
    R: http_body::Body + Send + 'static,
    R::Error: Into<BoxError>,
{
    let counted = Counted::new(&asked.settings.live);
    let (reservation, is_over) = match claimed {
        Claimed::Fresh(unbegun) => (unbegun.begin(), false),
        Claimed::Over(reservation) => (reservation, true),
    };
    asked.tell(if is_over { EventKind::TakenOver } else { EventKind::Started }, None);
    let find_out = match &asked.policy.interrupted {
        Interrupted::Reconcile(find_out) if is_over => Some(find_out.clone()),
        Interrupted::Reconcile(_) | Interrupted::Refuse | Interrupted::Rerun => None,
    };
    let point = reservation.last_recovery_point().map(Bytes::copy_from_slice);
    let operation = Operation { running: Running::new(reservation, asked.is_synced), asked, _counted: counted };
    if let Some(find_out) = find_out {
        let asked = &operation.asked;
        let interruption = Interruption {
            scope: asked.scope.clone(),
            operation: asked.operation.clone(),
            key: asked.key.clone(),
            attempt: operation.running.attempt(),
            recovery_point: point.clone(),
            body: body.clone(),
        };
        match caught(async move { find_out.ask(interruption).await }).await {
            Ok(Ok(Reconciled::DidNotHappen)) => {}
            Ok(Ok(Reconciled::Happened(response))) => {
                let (head, body) = response.into_parts();
                return Ok(operation.finish_whole(Verdict::Store, head, body, None).await);
            }
            Ok(Ok(Reconciled::StillUnknown) | Err(_)) | Err(Panicked) => {
                return Ok(operation.refuse(&Problem::outcome_unknown()));
            }
        }
    }
    let mut request = Request::from_parts(parts, Body::whole(body, trailers));
    operation.introduce(&mut request, point.as_deref());
    match caught(async move { inner.call(request).await }).await {
        Ok(Ok(response)) => Ok(operation.conclude(response.map(Body::new)).await),
        Ok(Err(error)) => {
            operation.abandon(None);
            Err(error)
        }
        Err(Panicked) => Ok(operation.refuse(&Problem::panicked())),
    }
}

/// A panic, which the hook has told of.
struct Panicked;

async fn caught<F: Future>(future: F) -> Result<F::Output, Panicked> {
    let mut future = pin!(future);
    // After a panic it isn't polled again.
    poll_fn(|context| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context))) {
        Ok(poll) => poll.map(Ok),
        Err(_) => Poll::Ready(Err(Panicked)),
    })
    .await
}

/// What was read of an answer's body.
#[derive(Default)]
struct Reading {
    pieces: Vec<Bytes>,
    len: u64,
    trailers: Option<HeaderMap>,
}

enum Turn {
    Frame(Frame<Bytes>),
    End,
    Broken,
    /// Nothing is there yet.
    Later,
}

impl Reading {
    fn take(&mut self, frame: Frame<Bytes>) {
        match frame.into_data() {
            Ok(data) => {
                self.len += data.len() as u64;
                self.pieces.push(data);
            }
            Err(frame) => self.trailers = frame.into_trailers().ok(),
        }
    }
}

/// The next frame, or, if that isn't waited for, word that there is none yet.
async fn next(body: &mut Body, waits: bool) -> Turn {
    let next = poll_fn(|context| match Pin::new(&mut *body).poll_frame(context) {
        Poll::Pending if waits => Poll::Pending,
        Poll::Pending => Poll::Ready(Turn::Later),
        Poll::Ready(Some(Ok(frame))) => Poll::Ready(Turn::Frame(frame)),
        Poll::Ready(Some(Err(_))) => Poll::Ready(Turn::Broken),
        Poll::Ready(None) => Poll::Ready(Turn::End),
    });
    caught(next).await.unwrap_or(Turn::Broken)
}

/// How an operation ended.
enum Ended {
    Stored { until: Option<SystemTime>, is_whole: bool },
    Released,
    Unknown,
    NotStored,
}

/// An operation that runs. If it is dropped, its key is left interrupted, whoever still has a handle to it.
struct Operation {
    running: Running,
    asked: Arc<Asked>,
    _counted: Counted,
}

impl Operation {
    /// Tells the service what it may want to know of its operation.
    fn introduce(&self, request: &mut Request<Body>, point: Option<&[u8]>) {
        let headers = request.headers_mut();
        headers.insert(ATTEMPT, HeaderValue::from(self.running.attempt()));
        headers.insert(FENCE, HeaderValue::from(self.running.fence()));
        if let Some(point) = point.and_then(byte_sequence) {
            headers.insert(RECOVERY_POINT, point);
        }
        request.extensions_mut().insert(self.running.clone());
    }

    /// Leaves the key interrupted.
    fn abandon(&self, status: Option<http::StatusCode>) {
        drop(self.running.take());
        self.asked.tell(EventKind::Unknown, status);
    }

    fn refuse(&self, problem: &Problem) -> Response<Body> {
        self.abandon(Some(problem.status()));
        self.asked.problem(problem)
    }

    /// Reads the answer as far as it is there, and stores it if that is all; otherwise it is recorded on its way.
    async fn conclude(self, response: Response<Body>) -> Response<Body> {
        let (head, mut body) = response.into_parts();
        match self.verdict(&head, None) {
            Some(verdict @ (Verdict::Release | Verdict::Unknown)) => {
                self.finish(verdict, &head, None, None).await;
                return Response::from_parts(head, body);
            }
            Some(Verdict::Store) | None => {}
        }
        let cap = self.asked.policy.max_answer as u64;
        let exact = body.size_hint().exact();
        let is_short = exact.is_some_and(|len| len <= HELD);
        let mut reading = Reading::default();
        let is_broken = loop {
            if reading.len > cap && !is_short {
                return self.record(head, body, reading, exact);
            }
            match next(&mut body, is_short || exact == Some(reading.len)).await {
                Turn::Frame(frame) => reading.take(frame),
                Turn::End => break false,
                Turn::Broken => break true,
                Turn::Later => return self.record(head, body, reading, exact),
            }
        };
        if is_broken {
            self.abandon(Some(head.status));
            let recording = Recording::new(head.status, HeaderMap::new(), exact, usize::MAX);
            reading.pieces.into_iter().for_each(|piece| recording.push(piece));
            recording.break_off();
            return Response::from_parts(head, Body::followed(recording.first_client()));
        }
        let verdict = self.last_verdict(&head, reading.trailers.as_ref());
        self.finish_whole(verdict, head, join(reading.pieces), reading.trailers).await
    }

    /// Stores an answer that is there as a whole, and gives it to the first client.
    async fn finish_whole(
        self,
        verdict: Verdict,
        mut head: response::Parts,
        body: Bytes,
        trailers: Option<HeaderMap>,
    ) -> Response<Body> {
        let stored = (body.len() <= self.asked.policy.max_answer).then(|| body.clone());
        let ended = self.finish(verdict, &head, stored, trailers.as_ref()).await;
        match ended {
            Ended::Stored { until, is_whole } => {
                mark_expiry(&mut head.headers, until);
                if !is_whole {
                    head.headers.insert(UNAVAILABLE, TOO_LARGE);
                }
            }
            Ended::NotStored => {
                head.headers.insert(UNAVAILABLE, HeaderValue::from_static("not-stored"));
            }
            Ended::Released | Ended::Unknown => {}
        }
        Response::from_parts(head, Body::whole(body, trailers))
    }

    /// Lets the first client follow the answer while a task records it.
    fn record(self, head: response::Parts, body: Body, reading: Reading, exact: Option<u64>) -> Response<Body> {
        let mut headers = self.asked.policy.stored_headers.apply(&head.headers);
        mark_replayed(&mut headers);
        let recording = Recording::new(head.status, headers, exact, self.asked.policy.max_answer);
        let first_client = recording.first_client();
        let tape = Tape::begin(Arc::clone(&self.asked.settings.live), self.asked.identity(), recording);
        let first = head.clone();
        tokio::spawn(self.drive(head, body, reading, exact, tape));
        Response::from_parts(first, Body::followed(first_client))
    }

    /// Passes the body on as it comes, and stores it before its end is told.
    async fn drive(self, head: response::Parts, mut body: Body, reading: Reading, exact: Option<u64>, tape: Tape) {
        let recording = &tape.recording;
        let (mut len, mut last, mut trailers) = (0, None, reading.trailers);
        let mut take = |piece: Bytes| {
            len += piece.len() as u64;
            // With it a client has the whole answer.
            if exact == Some(len) { last = Some(piece) } else { recording.push(piece) }
        };
        reading.pieces.into_iter().for_each(&mut take);
        loop {
            if tokio::time::timeout(STALL, recording.room()).await.is_err() {
                recording.leave_first_client();
            }
            match next(&mut body, true).await {
                Turn::End => break,
                Turn::Broken | Turn::Later => {
                    self.abandon(Some(head.status));
                    return recording.break_off();
                }
                Turn::Frame(frame) => match frame.into_data() {
                    Ok(data) => take(data),
                    Err(frame) => trailers = frame.into_trailers().ok(),
                },
            }
        }
        let is_kept = len <= self.asked.policy.max_answer as u64;
        let body = recording.pieces().filter(|_| is_kept).map(|mut pieces| {
            pieces.extend(last.clone());
            join(pieces)
        });
        let verdict = self.last_verdict(&head, trailers.as_ref());
        self.finish(verdict, &head, body, trailers.as_ref()).await;
        if let Some(last) = last {
            recording.push(last);
        }
        recording.end(trailers);
    }

    /// What becomes of the key, as far as that is known yet.
    fn verdict(&self, head: &response::Parts, trailers: Option<&HeaderMap>) -> Option<Verdict> {
        let own = self.running.verdict();
        own.or_else(|| match trailers {
            _ if !self.asked.is_grpc => Some(self.asked.policy.verdicts.verdict(head)),
            Some(trailers) => grpc_verdict(trailers).or_else(|| grpc_verdict(&head.headers)),
            None => grpc_verdict(&head.headers),
        })
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
        body: Option<Bytes>,
        trailers: Option<&HeaderMap>,
    ) -> Ended {
        let ended = match self.running.take() {
            None => Ended::NotStored,
            Some(reservation) => match verdict {
                Verdict::Store => self.store(reservation, head, body, trailers).await,
                Verdict::Release => match self.write(move || reservation.release()).await {
                    Ok(()) => Ended::Released,
                    Err(_) => Ended::Unknown,
                },
                Verdict::Unknown => Ended::Unknown,
            },
        };
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

    async fn store(
        &self,
        reservation: Reservation,
        head: &response::Parts,
        body: Option<Bytes>,
        trailers: Option<&HeaderMap>,
    ) -> Ended {
        let policy = &self.asked.policy;
        let filter = &policy.stored_headers;
        let is_failure = head.status.is_client_error()
            || head.status.is_server_error()
            || [Some(&head.headers), trailers].into_iter().flatten().any(is_grpc_failure);
        let headers = filter.apply(&head.headers);
        let mut answer = StoredAnswer::new(head.status, headers, body, trailers.map(|trailers| filter.apply(trailers)));
        if answer.body.is_none() {
            answer = answer.without_body();
        }
        if let Some(redact) = &policy.redact {
            redact(&mut answer);
        }
        let Some(payload) = answer.encode() else { return Ended::NotStored };
        let mut is_whole = answer.body.is_some();
        let mut written = self.write_answer(reservation, payload, is_failure).await;
        if let Err(unwritten) = written {
            let is_too_large =
                matches!(unwritten.error.kind(), ErrorKind::RecordTooLarge | ErrorKind::StorageFull | ErrorKind::Full);
            let short = if is_whole && is_too_large { answer.without_body().encode() } else { None };
            let Some(payload) = short else { return Ended::NotStored };
            is_whole = false;
            written = self.write_answer(unwritten.reservation, payload, is_failure).await;
        }
        match written {
            Ok(record) => Ended::Stored { until: record.expires_at(), is_whole },
            Err(_) => Ended::NotStored,
        }
    }

    async fn write_answer(
        &self,
        reservation: Reservation,
        payload: Vec<u8>,
        is_failure: bool,
    ) -> Result<Record, Box<Unwritten>> {
        self.write(move || if is_failure { reservation.fail(payload) } else { reservation.complete(payload) }).await
    }

    /// Writes to the store; where that waits for the device, on a thread that may.
    async fn write<T: Send + 'static>(&self, write: impl FnOnce() -> T + Send + 'static) -> T {
        if self.running.is_synced() { blocking(write).await } else { write() }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        drop(self.running.take());
    }
}

fn is_grpc_failure(headers: &HeaderMap) -> bool {
    headers.get("grpc-status").is_some_and(|status| status != "0")
}

fn join(mut pieces: Vec<Bytes>) -> Bytes {
    match pieces.len() {
        0 => Bytes::new(),
        1 => pieces.remove(0),
        _ => pieces.concat().into(),
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
        live.streams.insert(identity.clone(), Arc::clone(&recording));
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
