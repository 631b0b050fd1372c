//! The service behind the idempotency layer: it sends each request to the upstream, once.
//!
//! What becomes of a key where the upstream gives no answer:
//!
//! | what happened | was the request sent | status | verdict |
//! |---|---|---|---|
//! | no connection, or no TLS handshake, in `connect_timeout` | no | 502 `upstream-unreachable` | release |
//! | the connection broke, or what came was no HTTP, or in an encoding that wasn't asked for | maybe | 502 `upstream-lost` | unknown |
//! | no head of an answer in `answer_timeout` | yes | 504 `upstream-timeout` | unknown |
//! | the answer's body broke off or stood still for `idle_timeout` | yes | the upstream's, and the body ends in an error | unknown |
//!
//! The client of hyper-util sends a request a second time only if it gets it back from hyper unsent, which is when the
//! connection that it waited for was closed before its dispatcher took it (`TrySendError::take_message`): a pooled
//! connection that the upstream has closed. Nothing else is retried here.

use super::config::{Config, Target};
use super::forward;
use super::metrics::{Failure, Meter};
use super::paced::{Broken, Paced, Stalled};
use http::header::{HOST, HeaderValue};
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode, Uri, Version};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use hyper_rustls::{ConfigBuilderExt, HttpsConnector};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use oncekey::http::{Body, BoxError, Problem, Running, Verdict};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tower_service::Service;

/// The upstream, with its pool of connections.
#[derive(Clone)]
pub struct Upstream(Arc<Inner>);

struct Inner {
    client: Client<InTime<HttpsConnector<HttpConnector>>, Paced<Body>>,
    target: Target,
    host: HeaderValue,
    answer_timeout: Duration,
    idle_timeout: Duration,
    body_timeout: Duration,
    meter: Arc<Meter>,
}

impl Upstream {
    /// Reads the certificates; connects to nothing yet.
    pub fn new(config: &Config, meter: Arc<Meter>) -> Result<Self, String> {
        let host = HeaderValue::from_str(config.target.authority.as_str())
            .map_err(|error| format!("upstream: its host can't be sent in a header: {error}"))?;
        let mut http = HttpConnector::new();
        http.set_nodelay(true);
        http.enforce_http(false);
        let https = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls(config)?)
            .https_or_http()
            .enable_all_versions()
            .wrap_connector(http);
        let client = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(config.timeouts.upstream_keep_alive)
            .build(InTime { connector: https, limit: config.timeouts.connect });
        Ok(Upstream(Arc::new(Inner {
            client,
            target: config.target.clone(),
            host,
            answer_timeout: config.timeouts.answer,
            idle_timeout: config.timeouts.idle,
            body_timeout: config.timeouts.body,
            meter,
        })))
    }
}

fn tls(config: &Config) -> Result<rustls::ClientConfig, String> {
    let builder = rustls::ClientConfig::builder();
    let Some(path) = &config.upstream_ca else {
        if config.target.scheme == http::uri::Scheme::HTTP {
            // The system's certificates may be missing where nobody needs them.
            return Ok(builder.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth());
        }
        let builder = builder.with_native_roots().map_err(|error| {
            format!("the system has no certificates to check an https upstream against ({error}): set upstream_ca")
        })?;
        return Ok(builder.with_no_client_auth());
    };
    let refused = |error: &dyn std::fmt::Display| format!("upstream_ca {}: {error}", path.display());
    let mut roots = rustls::RootCertStore::empty();
    for cert in CertificateDer::pem_file_iter(path).map_err(|error| refused(&error))? {
        roots.add(cert.map_err(|error| refused(&error))?).map_err(|error| refused(&error))?;
    }
    if roots.is_empty() {
        return Err(refused(&"there is no certificate in it"));
    }
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

impl Service<Request<Body>> for Upstream {
    type Response = Response<Answer>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Answer>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let inner = Arc::clone(&self.0);
        Box::pin(async move { Ok(inner.send(request).await) })
    }
}

impl Inner {
    async fn send(&self, mut request: Request<Body>) -> Response<Answer> {
        let running = request.extensions_mut().remove::<Running>();
        let Some(target) = self.target_of(request.uri()) else {
            let problem = Problem::new(StatusCode::BAD_REQUEST, "target-invalid", "The request's target is not a path");
            return refusal(&problem, running, Verdict::Release);
        };
        *request.uri_mut() = target;
        // What is spoken with the client says nothing of what is spoken here.
        *request.version_mut() = Version::HTTP_11;
        request.headers_mut().insert(HOST, self.host.clone());
        let request = request.map(|body| Paced::new(body, self.body_timeout));
        match tokio::time::timeout(self.answer_timeout, self.client.request(request)).await {
            Ok(Ok(answer)) if answer.status() == StatusCode::SWITCHING_PROTOCOLS => {
                self.failed(Failure::Lost, &"it switched protocols unasked", running)
            }
            // No `TE` was sent, so where its body ends is a guess.
            Ok(Ok(answer)) if !forward::is_framing_plain(answer.headers()) => {
                self.failed(Failure::Lost, &"where its answer ends is a guess", running)
            }
            Ok(Ok(mut answer)) => {
                forward::answer(answer.headers_mut());
                *answer.version_mut() = Version::HTTP_11;
                answer.map(|body| Answer::Passed(Paced::new(body, self.idle_timeout)))
            }
            Ok(Err(error)) => match client_fault(&error) {
                Some(problem) => refusal(&problem, running, Verdict::Unknown),
                None if error.is_connect() => self.failed(Failure::Unreachable, &Chain(&error), running),
                None => self.failed(Failure::Lost, &Chain(&error), running),
            },
            Err(_) => self.failed(Failure::Timeout, &"no answer began in time", running),
        }
    }

    /// Scheme and host of the upstream, with path and query as the client sent them; `None` for a target without a path.
    fn target_of(&self, asked: &Uri) -> Option<Uri> {
        let path = asked.path_and_query()?;
        let path = match &self.target.prefix {
            None => path.clone(),
            Some(prefix) => PathAndQuery::try_from(format!("{prefix}{path}")).ok()?,
        };
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(self.target.scheme.clone());
        parts.authority = Some(self.target.authority.clone());
        parts.path_and_query = Some(path);
        Uri::from_parts(parts).ok()
    }

    fn failed(&self, failure: Failure, why: &dyn std::fmt::Display, running: Option<Running>) -> Response<Answer> {
        self.meter.failed(failure);
        let (problem, verdict) = match failure {
            Failure::Unreachable => (
                Problem::new(StatusCode::BAD_GATEWAY, "upstream-unreachable", "The service can't be reached"),
                Verdict::Release,
            ),
            Failure::Lost => (
                Problem::new(StatusCode::BAD_GATEWAY, "upstream-lost", "The service broke off before it answered"),
                Verdict::Unknown,
            ),
            Failure::Timeout => (
                Problem::new(StatusCode::GATEWAY_TIMEOUT, "upstream-timeout", "The service didn't answer in time"),
                Verdict::Unknown,
            ),
        };
        tracing::warn!(failure = failure.name(), cause = %why, has_key = running.is_some(), "the upstream gave no answer");
        let problem = match (&running, verdict) {
            (Some(_), Verdict::Release) => problem.detail("The operation did not happen. Retry with the same key."),
            (Some(_), Verdict::Unknown | Verdict::Store) => {
                problem.detail("The operation may have happened. Its key is held until that is found out.")
            }
            (None, _) => problem,
        };
        refusal(&problem, running, verdict)
    }
}

fn refusal(problem: &Problem, running: Option<Running>, verdict: Verdict) -> Response<Answer> {
    if let Some(running) = running {
        running.set_verdict(verdict);
    }
    problem.response().map(Answer::Own)
}

/// What is to be told to a client whose own body ended the request.
fn client_fault(error: &Error) -> Option<Problem> {
    causes(error).find_map(|cause| {
        if cause.is::<Stalled>() {
            Some(Problem::new(StatusCode::REQUEST_TIMEOUT, "body-timeout", "The request's body takes too long"))
        } else if cause.is::<Broken>() {
            Some(Problem::new(StatusCode::BAD_REQUEST, "body-incomplete", "The request's body ended early"))
        } else {
            None
        }
    })
}

fn causes<'e>(
    error: &'e (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'e (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |error| error.source())
}

/// An error with its causes, which are where the reason is.
struct Chain<'e>(&'e Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (number, cause) in causes(self.0).enumerate() {
            write!(f, "{}{cause}", if number == 0 { "" } else { ": " })?;
        }
        Ok(())
    }
}

/// The body of an answer: the upstream's, or the gateway's own.
pub enum Answer {
    Passed(Paced<Incoming>),
    Own(Body),
}

impl http_body::Body for Answer {
    type Data = bytes::Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<bytes::Bytes>, BoxError>>> {
        match &mut *self {
            Answer::Passed(body) => Pin::new(body).poll_frame(cx),
            Answer::Own(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Answer::Passed(body) => body.is_end_stream(),
            Answer::Own(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Answer::Passed(body) => body.size_hint(),
            Answer::Own(body) => body.size_hint(),
        }
    }
}

/// A connector that gives up in time, TLS handshake included.
#[derive(Clone)]
struct InTime<C> {
    connector: C,
    limit: Duration,
}

impl<C> Service<Uri> for InTime<C>
where
    C: Service<Uri>,
    C::Future: Send + 'static,
    C::Error: Into<BoxError>,
    C::Response: Send + 'static,
{
    type Response = C::Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<C::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.connector.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, target: Uri) -> Self::Future {
        let connecting = self.connector.call(target);
        let limit = self.limit;
        Box::pin(async move {
            match tokio::time::timeout(limit, connecting).await {
                Ok(result) => result.map_err(Into::into),
                Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "no connection in time").into()),
            }
        })
    }
}

/// Whether the gateway answers a request itself instead of passing it on, and how.
pub fn own_answer(method: &Method, target: &Uri) -> Option<Response<Body>> {
    if method == Method::CONNECT {
        let problem = Problem::new(StatusCode::NOT_IMPLEMENTED, "connect-unsupported", "This gateway opens no tunnels");
        return Some(problem.response());
    }
    if target.path() != "*" {
        return None;
    }
    if method != Method::OPTIONS {
        let problem = Problem::new(StatusCode::BAD_REQUEST, "target-invalid", "Only OPTIONS may ask for *");
        return Some(problem.response());
    }
    // It asks of the server as a whole, which is this one.
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    Some(response)
}
