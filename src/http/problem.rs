//! Answers of the layer itself: RFC 9457 problem details, or a gRPC status for those who speak that.

use super::body::Body;
use base64::Engine as _;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue, LINK, RETRY_AFTER};
use http::{HeaderName, Response, StatusCode};
use std::borrow::Cow;
use std::time::Duration;

/// What the `type` of every problem begins with; its name follows.
pub const PROBLEM_PREFIX: &str = "urn:oncekey:problem:";
/// The type of a problem, in a header, for those who don't read bodies.
pub(super) const PROBLEM: HeaderName = HeaderName::from_static("idempotency-problem");
pub(super) const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// Why a request got no answer of the service, as `application/problem+json`.
///
/// ```
/// use http::StatusCode;
/// use oncekey::http::Problem;
///
/// let problem = Problem::new(StatusCode::BAD_GATEWAY, "upstream-unreachable", "The upstream can't be reached");
/// let response = problem.detail("Nothing was sent; try again.").response();
/// assert_eq!(response.headers()["content-type"], "application/problem+json");
/// ```
#[derive(Clone, Debug)]
pub struct Problem {
    status: StatusCode,
    name: &'static str,
    title: &'static str,
    detail: Cow<'static, str>,
    retry_after: Option<Duration>,
    documentation: Option<HeaderValue>,
}

impl Problem {
    /// A problem of the type `urn:oncekey:problem:` and `name`; the title says the same for people.
    pub fn new(status: StatusCode, name: &'static str, title: &'static str) -> Problem {
        Problem { status, name, title, detail: Cow::Borrowed(""), retry_after: None, documentation: None }
    }

    /// What is the matter this time, and what to do.
    pub fn detail(mut self, detail: impl Into<Cow<'static, str>>) -> Self {
        self.detail = detail.into();
        self
    }

    /// When to try again, in whole seconds, rounded up.
    pub fn retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// Adds a `Link` to documentation, if there is one.
    pub(super) fn documentation(mut self, link: Option<&HeaderValue>) -> Self {
        self.documentation = link.cloned();
        self
    }

    /// The answer's status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The answer.
    pub fn response(&self) -> Response<Body> {
        let mut problem = serde_json::json!({
            "type": format!("{PROBLEM_PREFIX}{}", self.name),
            "title": self.title,
            "status": self.status.as_u16(),
        });
        if !self.detail.is_empty() {
            problem["detail"] = self.detail.as_ref().into();
        }
        let mut response = Response::new(Body::from(problem.to_string()));
        *response.status_mut() = self.status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        self.mark(response)
    }

    /// The answer to a gRPC call: a response of trailers only, with the status that stands for the problem.
    pub(super) fn grpc_response(&self) -> Response<Body> {
        let mut response = Response::new(Body::empty());
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(GRPC_STATUS, HeaderValue::from(self.grpc_code()));
        let message = format!("{}. {}", self.title, self.detail);
        if let Ok(message) = HeaderValue::from_str(&percent_encode(&message)) {
            headers.insert("grpc-message", message);
        }
        self.mark(response)
    }

    fn mark(&self, mut response: Response<Body>) -> Response<Body> {
        response.extensions_mut().insert(Own);
        let headers = response.headers_mut();
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Ok(name) = HeaderValue::from_str(&format!("{PROBLEM_PREFIX}{}", self.name)) {
            headers.insert(PROBLEM, name);
        }
        if let Some(after) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(after.as_millis().div_ceil(1000) as u64));
        }
        if let Some(link) = &self.documentation {
            headers.insert(LINK, link.clone());
        }
        response
    }

    /// Codes as the gRPC documentation describes their use: what may be retried as it is, is `ABORTED` or `UNAVAILABLE`.
    fn grpc_code(&self) -> u16 {
        const INVALID_ARGUMENT: u16 = 3;
        const DEADLINE_EXCEEDED: u16 = 4;
        const RESOURCE_EXHAUSTED: u16 = 8;
        const FAILED_PRECONDITION: u16 = 9;
        const ABORTED: u16 = 10;
        const INTERNAL: u16 = 13;
        const UNAVAILABLE: u16 = 14;
        match self.status {
            StatusCode::REQUEST_TIMEOUT => DEADLINE_EXCEEDED,
            StatusCode::PAYLOAD_TOO_LARGE => RESOURCE_EXHAUSTED,
            StatusCode::UNPROCESSABLE_ENTITY => FAILED_PRECONDITION,
            StatusCode::CONFLICT if self.retry_after.is_some() => ABORTED,
            StatusCode::CONFLICT => FAILED_PRECONDITION,
            StatusCode::SERVICE_UNAVAILABLE => UNAVAILABLE,
            status if status.is_client_error() => INVALID_ARGUMENT,
            _ => INTERNAL,
        }
    }
}

/// In the extensions of an answer that is a problem of this process, and not one that a service heard from another.
#[derive(Clone)]
pub(super) struct Own;

/// The layer's own problems.
impl Problem {
    pub(super) fn key_missing(header: &HeaderName) -> Problem {
        Problem::new(StatusCode::BAD_REQUEST, "key-missing", "An idempotency key is required").detail(format!(
            "Send the header {header} with a key that is new for each operation, and the same for its retries."
        ))
    }

    pub(super) fn key_invalid(why: &'static str) -> Problem {
        Problem::new(StatusCode::BAD_REQUEST, "key-invalid", "The idempotency key is not valid").detail(format!(
            "The key has to be 1 to 255 visible ASCII characters, with or without quotes around: {why}."
        ))
    }

    pub(super) fn scope_missing() -> Problem {
        Problem::new(StatusCode::BAD_REQUEST, "scope-missing", "Whose idempotency key it is can't be told").detail(
            "The request doesn't say for whom it is sent, such as by credentials, or not in 1 to 128 bytes, so that its key could be taken for another's.",
        )
    }

    pub(super) fn body_too_large(limit: usize) -> Problem {
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "body-too-large", "The request's body is too large")
            .detail(format!("A request with an idempotency key may have a body of {limit} bytes at most."))
    }

    pub(super) fn body_over_another_limit() -> Problem {
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "body-too-large", "The request's body is too large")
            .detail("It is over a limit of the service.")
    }

    pub(super) fn body_incomplete() -> Problem {
        Problem::new(StatusCode::BAD_REQUEST, "body-incomplete", "The request's body ended early")
            .detail("Nothing was done; send the whole request again.")
    }

    pub(super) fn body_timeout(limit: Duration) -> Problem {
        Problem::new(StatusCode::REQUEST_TIMEOUT, "body-timeout", "The request's body took too long")
            .detail(format!("It has to be there within {} ms. Nothing was done; send it again.", limit.as_millis()))
    }

    pub(super) fn in_flight(retry_after: Duration) -> Problem {
        Problem::new(StatusCode::CONFLICT, "in-flight", "A request with this idempotency key is being processed")
            .detail("Send it again later, to get its answer.")
            .retry_after(retry_after)
    }

    pub(super) fn mismatch() -> Problem {
        Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "key-reused", "The idempotency key was used for another request")
            .detail(
                "It differs from the first request with this key in what makes up a request here, such as its body.",
            )
    }

    pub(super) fn outcome_unknown() -> Problem {
        Problem::new(
            StatusCode::CONFLICT,
            "outcome-unknown",
            "Whether an earlier request with this key took effect is unknown",
        )
        .detail("It was begun, and its end was never recorded. Find out whether it took effect before using a new key.")
    }

    pub(super) fn store_unavailable(retry_after: Duration) -> Problem {
        Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "store-unavailable",
            "The request can't be made safe to retry now",
        )
        .detail("Nothing was done; send it again later with the same key.")
        .retry_after(retry_after)
    }

    pub(super) fn too_many_running(retry_after: Duration) -> Problem {
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, "too-many-running", "Too many operations are running")
            .detail("It was not passed on; send it again later with the same key.")
            .retry_after(retry_after)
    }

    pub(super) fn too_much_buffered(retry_after: Duration) -> Problem {
        Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "too-much-buffered",
            "The bodies of other requests take all memory that they may",
        )
        .detail("It was not passed on; send it again later with the same key.")
        .retry_after(retry_after)
    }

    pub(super) fn unreadable() -> Problem {
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "answer-unreadable", "The stored answer can't be read")
            .detail("It was not stored as an HTTP answer, or by a newer version. The operation was done.")
    }

    pub(super) fn not_kept() -> Problem {
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "answer-not-kept", "The answer was too large to be kept")
            .detail("The operation was done, and its answer given to the first who asked.")
    }

    pub(super) fn panicked() -> Problem {
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "outcome-unknown", "The operation failed midway")
            .detail("Whether it took effect is unknown. Find out before using a new key.")
    }
}

/// Percent-encoding of a gRPC status message: all but printable ASCII, and the percent sign.
fn percent_encode(message: &str) -> String {
    let mut encoded = String::with_capacity(message.len());
    for byte in message.bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => encoded.push(char::from(byte)),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// A byte sequence as a structured field has it (RFC 9651, section 3.3.5).
pub(super) fn byte_sequence(bytes: &[u8]) -> Option<HeaderValue> {
    HeaderValue::from_str(&format!(":{}:", base64::engine::general_purpose::STANDARD.encode(bytes))).ok()
}
