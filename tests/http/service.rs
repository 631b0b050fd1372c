//! A service with the layer around it, its clients, and what they get.

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use oncekey::http::{Body, BoxError, EventKind, IdempotencyLayer, Policy, Scope};
use oncekey::{Durability, Store};
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use tokio::sync::mpsc;
use tower::util::BoxCloneSyncService;
use tower::{Layer, ServiceExt, service_fn};

pub type Service = BoxCloneSyncService<Request<Body>, Response<Body>, Infallible>;

pub fn store() -> Store {
    Store::builder().durability(Durability::Buffered).in_memory().unwrap()
}

/// What a handler does and how often, and what the layer told of it.
#[derive(Clone, Default)]
pub struct Log {
    runs: Arc<AtomicUsize>,
    events: Arc<Mutex<Vec<EventKind>>>,
}

impl Log {
    pub fn runs(&self) -> usize {
        self.runs.load(Ordering::SeqCst)
    }

    pub fn events(&self) -> Vec<EventKind> {
        self.events.lock().unwrap().clone()
    }
}

pub fn layer(store: &Store, policy: Policy) -> IdempotencyLayer {
    IdempotencyLayer::new(store.clone(), Scope::single_tenant()).policy(policy)
}

/// A layer around a handler, which counts its runs.
pub fn around<F, R>(
    layer: IdempotencyLayer,
    handler: impl Fn(Request<Body>) -> F + Clone + Send + Sync + 'static,
) -> (Service, Log)
where
    F: Future<Output = Response<R>> + Send + 'static,
    R: http_body::Body<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    let log = Log::default();
    let events = Arc::clone(&log.events);
    let layer = layer.observe(move |event| events.lock().unwrap().push(event.kind));
    let runs = Arc::clone(&log.runs);
    let service = service_fn(move |request| {
        runs.fetch_add(1, Ordering::SeqCst);
        let response = handler(request);
        async move { Ok(response.await.map(Body::new)) }
    });
    // Of one type for all handlers, so that the layer is compiled for one.
    let service: Service = BoxCloneSyncService::new(service);
    (BoxCloneSyncService::new(layer.layer(service)), log)
}

/// Answers with its status, a number of the run, and the request's body.
pub fn echo(layer: IdempotencyLayer, status: StatusCode) -> (Service, Log) {
    let runs = Arc::new(AtomicUsize::new(0));
    around(layer, move |request| {
        let run = runs.fetch_add(1, Ordering::SeqCst) + 1;
        async move {
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let answer = [format!("run {run}: ").as_bytes(), &body].concat();
            Response::builder().status(status).body(Full::new(Bytes::from(answer))).unwrap()
        }
    })
}

pub fn post(key: &str, body: &'static str) -> Request<Body> {
    Request::post("/payments").header("idempotency-key", key).body(Body::from(body)).unwrap()
}

/// An answer that was read to its end.
#[derive(Debug, PartialEq)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub trailers: Option<HeaderMap>,
}

impl Answer {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    pub fn is_replay(&self) -> bool {
        self.header("idempotency-replayed") == Some("true") && self.header("cache-control") == Some("no-store")
    }

    /// Asserts that it is a problem of this name, with all that belongs to one.
    pub fn assert_problem(&self, status: u16, name: &str) {
        let problem: serde_json::Value = serde_json::from_slice(&self.body).unwrap();
        assert_eq!(problem["type"], format!("urn:oncekey:problem:{name}"), "{problem}");
        assert_eq!(self.status.as_u16(), status);
        assert_eq!(problem["status"], status);
        assert_eq!(self.header("content-type"), Some("application/problem+json"));
        assert!(problem["title"].as_str().is_some_and(|title| !title.is_empty()));
        assert!(problem["detail"].as_str().is_some_and(|detail| !detail.is_empty()));
        assert!(!self.is_replay());
    }
}

pub async fn send(service: &Service, request: Request<Body>) -> Answer {
    read(begin(service, request).await).await
}

/// Up to the head of the answer.
pub async fn begin(service: &Service, request: Request<Body>) -> Response<Body> {
    service.clone().oneshot(request).await.unwrap()
}

pub async fn read(response: Response<Body>) -> Answer {
    let (head, body) = response.into_parts();
    let collected = body.collect().await.unwrap();
    let trailers = collected.trailers().cloned();
    Answer { status: head.status, headers: head.headers, body: collected.to_bytes(), trailers }
}

/// The next piece of a body's data; `None` at its end, an error if it broke off.
pub async fn piece(body: &mut Body) -> Option<Result<Bytes, BoxError>> {
    let frame = body.frame().await?;
    Some(frame.map(|frame| frame.into_data().unwrap_or_default()))
}

pub type Piece = Result<Frame<Bytes>, BoxError>;

/// A body that the test feeds, frame by frame.
pub fn fed() -> (mpsc::UnboundedSender<Piece>, impl http_body::Body<Data = Bytes, Error = BoxError> + Send + 'static) {
    let (sender, receiver) = mpsc::unbounded_channel();
    (sender, StreamBody::new(Fed(receiver)))
}

pub fn data(text: &'static str) -> Piece {
    Ok(Frame::data(Bytes::from_static(text.as_bytes())))
}

struct Fed(mpsc::UnboundedReceiver<Piece>);

impl futures_core::Stream for Fed {
    type Item = Piece;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Piece>> {
        self.0.poll_recv(context)
    }
}

/// Waits for what other tasks and threads bring about.
pub async fn until(mut is_so: impl FnMut() -> bool) {
    while !is_so() {
        tokio::task::yield_now().await;
        std::thread::yield_now();
    }
}
