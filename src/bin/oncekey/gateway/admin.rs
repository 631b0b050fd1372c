//! The admin address: health, metrics, the dashboard with its live samples, the search for one key and its resolving.
//!
//! Without a token anybody who reaches the address may read, and resolve keys. A web page of another origin may not: it can't
//! read answers, what it sends is refused by its `Origin`, and it can't rebind its name to this address either, since only
//! loopback addresses and `localhost` are taken as a host then.

use super::config::{ScopeFrom, Token};
use super::history::{Happened, History};
use super::metrics::Sources;
use super::resolve::{self, Deed, Done, Named};
use super::routes::hashed_scope;
use super::samples::Samples;
use bytes::Bytes;
use http::header::{
    ALLOW, AUTHORIZATION, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, HeaderMap, HeaderValue, ORIGIN,
    REFERRER_POLICY, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Channel, Limited};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use oncekey::Standing;
use oncekey::http::{Body, Problem, StoredAnswer, key_of, operation_of};
use prometheus_client::registry::Registry;
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::sync::broadcast::error::RecvError;

/// What the admin address knows.
pub struct Admin {
    pub sources: Sources,
    pub registry: Registry,
    pub samples: Samples,
    pub history: Arc<History>,
    pub scope: ScopeFrom,
    pub token: Option<Token>,
    /// Places for those that follow the samples; see [`readers`].
    pub readers: Arc<Semaphore>,
    /// Whether the gateway is about to end.
    pub is_draining: AtomicBool,
}

const PAGE: &str = include_str!("dashboard.html");
/// The page brings everything with it and speaks to its own origin only.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; \
                           connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
const MOST_CONNECTIONS: usize = 512;
/// Of them, those that follow the samples: what asks for the health finds room.
const MOST_READERS: usize = 64;
const LARGEST_BODY: usize = 16 * 1024;
const PATIENCE: Duration = Duration::from_secs(10);

type Reply = Response<Body>;

pub fn readers() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(MOST_READERS))
}

/// What may be asked of a path, if there is anything there.
fn methods(path: &str) -> Option<&'static str> {
    match path {
        "/" | "/healthz" | "/readyz" => Some("GET, HEAD"),
        "/metrics" | "/events" => Some("GET"),
        "/api/key" | "/keys/release" | "/keys/erase" => Some("POST"),
        _ => None,
    }
}

impl Admin {
    /// Serves until it is dropped.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        loop {
            let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "the admin address can't accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let admin = Arc::clone(&self);
            tokio::spawn(async move {
                let service = hyper::service::service_fn(move |request| {
                    let admin = Arc::clone(&admin);
                    async move { Ok::<_, Infallible>(admin.answer(request).await) }
                });
                let connection = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(PATIENCE)
                    .serve_connection(TokioIo::new(stream), service);
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "an admin connection ended");
                }
                drop(place);
            });
        }
    }

    pub fn is_ready(&self) -> bool {
        let stats = self.sources.store.stats();
        !self.is_draining.load(Ordering::Relaxed) && !stats.is_poisoned && !stats.is_full
    }

    async fn answer(&self, request: Request<Incoming>) -> Reply {
        let methods = methods(request.uri().path());
        let mut response = match self.routed(request).await {
            Ok(response) => response,
            Err(problem) => problem.response(),
        };
        let headers = response.headers_mut();
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
        headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(PAGE_POLICY));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        match (response.status(), methods) {
            (StatusCode::UNAUTHORIZED, _) => {
                response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            (StatusCode::METHOD_NOT_ALLOWED, Some(methods)) => {
                response.headers_mut().insert(ALLOW, HeaderValue::from_static(methods));
            }
            (_, _) => (),
        }
        response
    }

    async fn routed(&self, request: Request<Incoming>) -> Result<Reply, Problem> {
        self.check_host(request.headers())?;
        match (request.method(), request.uri().path()) {
            (&Method::GET | &Method::HEAD, "/") => Ok(reply("text/html; charset=utf-8", PAGE)),
            (&Method::GET | &Method::HEAD, "/healthz") => Ok(reply("text/plain", "ok\n")),
            (&Method::GET | &Method::HEAD, "/readyz") => Ok(self.readiness()),
            (&Method::GET, "/metrics") => {
                self.check_token(request.headers())?;
                self.metrics()
            }
            (&Method::GET, "/events") => {
                self.check_token(request.headers())?;
                self.events()
            }
            (&Method::POST, "/api/key") => {
                self.check_token(request.headers())?;
                let named = self.named(request).await?;
                self.found(&named)
            }
            (&Method::POST, "/keys/release") => self.resolved(Deed::Release, request).await,
            (&Method::POST, "/keys/erase") => self.resolved(Deed::Erase, request).await,
            (_, path) => Err(match methods(path) {
                Some(_) => Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", "Not with this method"),
                None => Problem::new(StatusCode::NOT_FOUND, "not-found", "There is no such page"),
            }),
        }
    }

    fn check_host(&self, headers: &HeaderMap) -> Result<(), Problem> {
        if self.token.is_some() || headers.get(HOST).is_some_and(|host| is_local_name(host.as_bytes())) {
            return Ok(());
        }
        let problem =
            Problem::new(StatusCode::MISDIRECTED_REQUEST, "host-refused", "This host's name is not served here");
        Err(problem
            .detail("Without a token the admin address is asked for by its loopback address or as localhost only."))
    }

    fn check_token(&self, headers: &HeaderMap) -> Result<(), Problem> {
        let Some(token) = &self.token else { return Ok(()) };
        let given = headers.get(AUTHORIZATION).map(HeaderValue::as_bytes).and_then(bearer);
        if given.is_some_and(|given| token.is(given)) {
            return Ok(());
        }
        Err(Problem::new(StatusCode::UNAUTHORIZED, "token-missing", "The admin token is missing or wrong"))
    }

    fn readiness(&self) -> Reply {
        if self.is_ready() {
            return reply("text/plain", "ready\n");
        }
        let mut response = reply("text/plain", "not ready\n");
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        response
    }

    fn metrics(&self) -> Result<Reply, Problem> {
        let mut text = String::new();
        match prometheus_client::encoding::text::encode(&mut text, &self.registry) {
            Ok(()) => Ok(reply("application/openmetrics-text; version=1.0.0; charset=utf-8", text)),
            Err(std::fmt::Error) => {
                Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "metrics-failed", "The metrics can't be written"))
            }
        }
    }

    fn events(&self) -> Result<Reply, Problem> {
        let Ok(place) = Arc::clone(&self.readers).try_acquire_owned() else {
            let problem =
                Problem::new(StatusCode::SERVICE_UNAVAILABLE, "too-many-readers", "Too many dashboards are open");
            return Err(problem.detail("Close some of them."));
        };
        let (history, mut live) = self.samples.follow();
        let (mut sender, body) = Channel::<Bytes>::new(1);
        tokio::spawn(async move {
            let _place = place;
            let mut next = format!("event: history\ndata: {history}\n\n");
            // Sending fails when the reader is gone.
            while sender.send_data(Bytes::from(next)).await.is_ok() {
                next = loop {
                    match live.recv().await {
                        Ok(sample) => break format!("event: sample\ndata: {sample}\n\n"),
                        Err(RecvError::Lagged(_)) => {}
                        Err(RecvError::Closed) => return,
                    }
                };
            }
        });
        Ok(reply("text/event-stream", Body::new(body)))
    }

    /// The key that the request's body names.
    async fn named(&self, request: Request<Incoming>) -> Result<Named, Problem> {
        // Pages of other origins can't send this type without being asked about it first.
        let kind = request.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
        if !kind.split(|&byte| byte == b';').next().is_some_and(|kind| kind.eq_ignore_ascii_case(b"application/json")) {
            return Err(bad("The content type must be application/json."));
        }
        let collected = tokio::time::timeout(PATIENCE, Limited::new(request.into_body(), LARGEST_BODY).collect()).await;
        let body = match collected {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(_)) => return Err(bad("The body is too large, or broke off.")),
            Err(_) => return Err(bad("The body takes too long.")),
        };
        let wanted: Wanted = serde_json::from_slice(&body)
            .map_err(|_| bad("The body must be {\"scope\": …, \"method\": …, \"path\": …, \"key\": …}."))?;
        let method = Method::from_bytes(wanted.method.as_bytes()).map_err(|_| bad("The method is none."))?;
        let path = wanted.path.split('?').next().unwrap_or_default();
        let scope = match &self.scope {
            ScopeFrom::SingleTenant => Vec::new(),
            ScopeFrom::Authorization => hashed_scope(wanted.scope.as_bytes()),
            ScopeFrom::Header(_) => wanted.scope.into_bytes(),
        };
        Ok(Named { scope, operation: operation_of(&method, path), key: key_of(wanted.key.as_bytes())? })
    }

    /// Frees or forgets a key.
    async fn resolved(&self, deed: Deed, request: Request<Incoming>) -> Result<Reply, Problem> {
        self.check_token(request.headers())?;
        check_origin(request.headers())?;
        let named = self.named(request).await?;
        let (sources, history) = (self.sources.clone(), Arc::clone(&self.history));
        // It waits for the device, and an erasure reads the whole journal.
        let done = tokio::task::spawn_blocking(move || resolve::carry_out(deed, &named, &sources, &history)).await;
        let failed = |_| {
            Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "resolving-failed", "What became of the key is not known")
        };
        match done.map_err(failed)?.map_err(|error| unavailable(&error))? {
            Done::Released => Ok(reply("application/json", "{\"outcome\":\"released\"}")),
            Done::Erased { records } => {
                Ok(reply("application/json", format!("{{\"outcome\":\"erased\",\"records\":{records}}}")))
            }
            Done::ErasedInPart => {
                let problem = Problem::new(StatusCode::SERVICE_UNAVAILABLE, "erasure-unfinished", "The key is gone");
                Err(problem
                    .detail("Its answer is being read: its bytes are overwritten later. Ask again to wait for it."))
            }
            Done::Unknown => Err(Problem::new(StatusCode::NOT_FOUND, "key-unknown", "Nothing is known of this key")),
            Done::Refused(why) => {
                let problem = Problem::new(StatusCode::CONFLICT, "state-unfit", "The key's state does not allow it");
                Err(problem.detail(why))
            }
        }
    }

    fn found(&self, named: &Named) -> Result<Reply, Problem> {
        let lookup = self.sources.store.lookup(&named.request()).map_err(|error| unavailable(&error))?;
        let mut found =
            Found { history: self.history.of(&named.scope, &named.operation, &named.key), ..Found::default() };
        if let Some(lookup) = lookup {
            found.fingerprint = Some(format!("{:032x}", u128::from_be_bytes(*lookup.fingerprint.as_bytes())));
            found.attempt = Some(lookup.attempt);
            found.stand(&lookup.standing);
        }
        let json = serde_json::to_string(&found).map_err(|_| {
            Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "answer-failed", "The answer can't be written")
        })?;
        Ok(reply("application/json", json))
    }
}

/// What is asked of a key. Its scope may be a credential: never shown.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    #[serde(default)]
    scope: String,
    method: String,
    path: String,
    key: String,
}

#[derive(Default, serde::Serialize)]
struct Found {
    state: State,
    attempt: Option<u32>,
    fence: Option<u64>,
    lease_left_ms: Option<u64>,
    fingerprint: Option<String>,
    completed_at_ms: Option<u64>,
    expires_at_ms: Option<u64>,
    status: Option<u16>,
    body_bytes: Option<usize>,
    is_failure: bool,
    history: Vec<Happened>,
}

#[derive(Default, serde::Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    #[default]
    Absent,
    Running,
    Interrupted,
    Completed,
}

impl Found {
    fn stand(&mut self, standing: &Standing) {
        match standing {
            Standing::Running { fence, lease_left, .. } => {
                self.state = State::Running;
                self.fence = Some(*fence);
                self.lease_left_ms = lease_left.map(|left| left.as_millis() as u64);
            }
            Standing::Interrupted { fence, .. } => {
                self.state = State::Interrupted;
                self.fence = Some(*fence);
            }
            Standing::Completed(record) => {
                self.state = State::Completed;
                self.completed_at_ms = Some(unix_ms(record.completed_at()));
                self.expires_at_ms = record.expires_at().map(unix_ms);
                self.is_failure = record.is_failure();
                if let Some(answer) = StoredAnswer::decode(Bytes::copy_from_slice(record.bytes())) {
                    self.status = Some(answer.status.as_u16());
                    self.body_bytes = answer.body.map(|body| body.len());
                }
            }
            // The kinds of standing may become more.
            _ => {}
        }
    }
}

/// Milliseconds since 1970.
pub fn unix_ms(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

fn unavailable(error: &oncekey::Error) -> Problem {
    match error.kind() {
        oncekey::ErrorKind::InvalidKey => bad("Scope, path and key are empty or too long together."),
        _ => Problem::new(StatusCode::SERVICE_UNAVAILABLE, "store-unavailable", "The store is full, or failed"),
    }
}

/// Refuses what a browser sends for a page of another origin.
fn check_origin(headers: &HeaderMap) -> Result<(), Problem> {
    let host = headers.get(HOST).map(HeaderValue::as_bytes);
    let is_own = |origin: &HeaderValue| {
        let origin = origin.as_bytes();
        // The scheme is that of a TLS proxy before this address, if there is one.
        let authority = origin.strip_prefix(b"http://").or_else(|| origin.strip_prefix(b"https://"));
        authority.zip(host).is_some_and(|(authority, host)| authority.eq_ignore_ascii_case(host))
    };
    if headers.get_all(ORIGIN).iter().all(is_own) {
        return Ok(());
    }
    Err(Problem::new(StatusCode::FORBIDDEN, "origin-refused", "Pages of other origins may not ask for this"))
}

fn bad(detail: &'static str) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, "request-invalid", "The request can't be understood").detail(detail)
}

fn reply(kind: &'static str, body: impl Into<Body>) -> Reply {
    let mut response = Response::new(body.into());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

/// Whether a `Host` is a loopback address or `localhost`, with or without a port.
fn is_local_name(host: &[u8]) -> bool {
    let Ok(authority) = http::uri::Authority::try_from(host) else { return false };
    let name = authority.host();
    let address = name.trim_matches(['[', ']']).parse::<IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_be_rebound_are_not_local() {
        for host in ["127.0.0.1", "127.0.0.1:8081", "[::1]:8081", "localhost", "LOCALHOST:1", "127.9.9.9"] {
            assert!(is_local_name(host.as_bytes()), "{host}");
        }
        for host in [
            "evil.example",
            "192.0.2.1",
            "0.0.0.0:8081",
            "127.0.0.1.evil.example",
            "localhost.evil.example:8081",
            "",
            "user@",
            "[::1",
        ] {
            assert!(!is_local_name(host.as_bytes()), "{host}");
        }
    }

    #[test]
    fn only_a_page_of_the_same_origin_may_resolve_keys() {
        let check = |host: &str, origins: &[&str]| {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, host.parse().unwrap());
            for origin in origins {
                headers.append(ORIGIN, origin.parse().unwrap());
            }
            check_origin(&headers).is_ok()
        };
        assert!(check("localhost:8081", &[]));
        assert!(
            check("localhost:8081", &["http://localhost:8081"]) && check("Admin.example", &["https://admin.example"])
        );
        for origins in [
            &["null"][..],
            &["http://localhost:8082"],
            &["http://evil.example"],
            &["localhost:8081"],
            &["ftp://localhost:8081"],
            &["http://localhost:8081", "http://evil.example"],
            &[""],
        ] {
            assert!(!check("localhost:8081", origins), "{origins:?}");
        }
    }

    #[test]
    fn a_token_is_taken_from_a_bearer_value_only() {
        assert_eq!(bearer(b"Bearer abc"), Some(&b"abc"[..]));
        assert_eq!(bearer(b"bearer  abc "), Some(&b"abc"[..]));
        for value in [&b"Basic abc"[..], b"abc", b"Bearer", b""] {
            assert_eq!(bearer(value), None);
        }
    }
}
