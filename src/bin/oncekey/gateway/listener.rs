//! Where clients connect: accepting, TLS, limits, what is refused before anything else looks at a request, and the end.

use super::config::{Config, Limits, Timeouts, TlsFiles};
use super::forward;
use super::metrics::{Meter, Refused};
use super::upstream::{Upstream, own_answer};
use super::wire::{Ambiguous, Wire};
use http::header::{CONNECTION, HeaderValue};
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use oncekey::http::{Body, Idempotency, Problem};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tower_service::Service as _;

/// The gateway's side towards its clients.
pub struct Listener {
    front: Arc<Front>,
    tls: Option<TlsAcceptor>,
    room: Arc<Semaphore>,
}

/// What all connections share.
struct Front {
    service: Idempotency<Upstream>,
    server: auto::Builder<TokioExecutor>,
    limits: Limits,
    timeouts: Timeouts,
    meter: Arc<Meter>,
}

/// Reads certificate and key; says what is wrong with them.
pub fn tls(files: Option<&TlsFiles>) -> Result<Option<TlsAcceptor>, String> {
    let Some(TlsFiles { cert, key }) = files else { return Ok(None) };
    let chain = CertificateDer::pem_file_iter(cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| format!("tls_cert {}: {error}", cert.display()))?;
    if chain.is_empty() {
        return Err(format!("tls_cert {}: there is no certificate in it", cert.display()));
    }
    let secret = PrivateKeyDer::from_pem_file(key).map_err(|error| format!("tls_key {}: {error}", key.display()))?;
    let mut server = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(chain, secret)
        .map_err(|error| format!("tls_cert {} and tls_key {}: {error}", cert.display(), key.display()))?;
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Some(TlsAcceptor::from(Arc::new(server))))
}

impl Listener {
    pub fn new(config: &Config, service: Idempotency<Upstream>, tls: Option<TlsAcceptor>, meter: Arc<Meter>) -> Self {
        let (limits, timeouts) = (config.limits, config.timeouts);
        let mut server = auto::Builder::new(TokioExecutor::new());
        server
            .http1()
            .timer(TokioTimer::new())
            // Runs from the end of the last request on; a head that has begun has a limit of its own in `Wire`.
            .header_read_timeout(timeouts.keep_alive)
            .max_buf_size(limits.max_head)
            .max_headers(limits.max_headers);
        server
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.max_streams)
            .max_header_list_size(limits.max_head as u32)
            // A peer that is gone without a word is found out.
            .keep_alive_interval(timeouts.keep_alive)
            .keep_alive_timeout(timeouts.head);
        let front = Arc::new(Front { service, server, limits, timeouts, meter });
        Listener { front, tls, room: Arc::new(Semaphore::new(limits.max_connections)) }
    }

    /// Accepts until `end` is done; then connections finish what they have begun, which is waited for.
    pub async fn serve(self, tcp: TcpListener, end: impl Future<Output = ()>) {
        let graceful = GracefulShutdown::new();
        tokio::select! {
            () = end => {}
            () = self.accept(&tcp, &graceful) => {}
        }
        drop(tcp);
        graceful.shutdown().await;
    }

    async fn accept(&self, tcp: &TcpListener, graceful: &GracefulShutdown) {
        loop {
            if self.room.available_permits() == 0 {
                tracing::warn!(max_connections = self.front.limits.max_connections, "further connections have to wait");
            }
            let Ok(place) = Arc::clone(&self.room).acquire_owned().await else { return };
            let (stream, peer) = match tcp.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Such as too many open files: it passes, and spinning would not help.
                    tracing::warn!(%error, "can't accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let (front, tls, watcher) = (Arc::clone(&self.front), self.tls.clone(), graceful.watcher());
            tokio::spawn(async move {
                let _counted = front.meter.connection();
                let address = peer.ip();
                if let Err(error) = connection(front, tls, watcher, stream, peer).await {
                    tracing::debug!(%address, %error, "a connection ended early");
                }
                drop(place);
            });
        }
    }
}

type AnyError = Box<dyn std::error::Error + Send + Sync>;

async fn connection(
    front: Arc<Front>,
    tls: Option<TlsAcceptor>,
    watcher: Watcher,
    stream: TcpStream,
    peer: SocketAddr,
) -> Result<(), AnyError> {
    stream.set_nodelay(true)?;
    let client = forward::Client::new(peer.ip(), tls.is_some());
    let Some(tls) = tls else { return speak(front, watcher, stream, client).await };
    let stream = tokio::time::timeout(front.timeouts.tls, tls.accept(stream))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the TLS handshake takes too long"))??;
    speak(front, watcher, stream, client).await
}

async fn speak<S>(front: Arc<Front>, watcher: Watcher, stream: S, client: forward::Client) -> Result<(), AnyError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (wire, ambiguous) = Wire::new(stream, front.limits.max_head, front.timeouts.head, front.timeouts.write);
    let requests = Requests { front: Arc::clone(&front), client, ambiguous, number: AtomicU64::new(0) };
    watcher.watch(front.server.serve_connection(TokioIo::new(wire), requests)).await
}

/// The requests of one connection.
struct Requests {
    front: Arc<Front>,
    client: forward::Client,
    ambiguous: Ambiguous,
    number: AtomicU64,
}

type Answering = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

impl hyper::service::Service<Request<Incoming>> for Requests {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answering;

    fn call(&self, mut request: Request<Incoming>) -> Answering {
        if let Some((why, response)) = self.refusal(&request) {
            self.front.meter.refused(why);
            tracing::warn!(reason = why.name(), status = response.status().as_u16(), "a request was refused");
            return Box::pin(std::future::ready(Ok(response)));
        }
        if let Some(response) = own_answer(request.method(), request.uri()) {
            if !response.status().is_success() {
                self.front.meter.refused(Refused::Method);
            }
            return Box::pin(std::future::ready(Ok(response)));
        }
        let authority = request.uri().authority().and_then(|authority| HeaderValue::from_str(authority.as_str()).ok());
        forward::request(request.headers_mut(), &self.client, authority);
        if tracing::enabled!(tracing::Level::DEBUG) {
            return self.logged(request);
        }
        // `Upstream` is always ready, and the layer as its inner service is.
        self.front.service.clone().call(request)
    }
}

impl Requests {
    /// What is said to a request that goes no further.
    fn refusal(&self, request: &Request<Incoming>) -> Option<(Refused, Response<Body>)> {
        let headers = request.headers();
        // First, for each head that ended counts.
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        if headers.len() > self.front.limits.max_headers {
            let problem = Problem::new(
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "head-too-large",
                "There are too many headers",
            );
            return Some((Refused::Head, problem.response()));
        }
        if self.ambiguous.is(number) || !forward::is_framing_plain(headers) {
            return Some((
                Refused::Framing,
                closing("framing-ambiguous", "Where the request's body ends is ambiguous"),
            ));
        }
        if !forward::is_host_plain(request) {
            return Some((Refused::Head, closing("host-invalid", "A request has one host, and no user")));
        }
        None
    }

    fn logged(&self, request: Request<Incoming>) -> Answering {
        let began = Instant::now();
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let answering = self.front.service.clone().call(request);
        Box::pin(async move {
            let response = answering.await?;
            let status = response.status().as_u16();
            let elapsed_ms = began.elapsed().as_secs_f64() * 1e3;
            tracing::debug!(%method, path, status, elapsed_ms, "answered");
            Ok(response)
        })
    }
}

/// A refusal after which nothing more is read from the connection.
fn closing(name: &'static str, title: &'static str) -> Response<Body> {
    let mut response = Problem::new(StatusCode::BAD_REQUEST, name, title).response();
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}
