//! The body of a request with a key, which is read before anything is decided.

use super::body::Body;
use super::policy::Policy;
use super::problem::Problem;
use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::Body as _;
use http_body_util::{BodyExt, LengthLimitError};
use std::error::Error;

pub(super) enum Collected {
    Whole(Bytes, Option<HeaderMap>),
    /// A gRPC request of several messages, which may have no end before its answer begins.
    Stream(Body),
}

/// Reads a body to its end, within the policy's limits.
///
/// # Errors
///
/// If it is too large, ends early, or takes too long.
pub(super) async fn collect(body: Body, policy: &Policy, is_grpc: bool) -> Result<Collected, Problem> {
    if body.is_end_stream() {
        return Ok(Collected::Whole(Bytes::new(), None));
    }
    let limit = policy.max_request_body;
    if body.size_hint().lower() > limit as u64 {
        return Err(Problem::body_too_large(limit));
    }
    match tokio::time::timeout(policy.request_body_timeout, read(body, limit, is_grpc)).await {
        Ok(read) => read,
        Err(_) => Err(Problem::body_timeout(policy.request_body_timeout)),
    }
}

async fn read(mut body: Body, limit: usize, is_grpc: bool) -> Result<Collected, Problem> {
    let mut whole = Whole::default();
    let mut trailers = None;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| match causes(&*error).any(|cause| cause.is::<LengthLimitError>()) {
            // A limit that was set before this layer.
            true => Problem::body_over_another_limit(),
            false => Problem::body_incomplete(),
        })?;
        match frame.into_data() {
            Ok(data) if data.len() > limit - whole.len() => return Err(Problem::body_too_large(limit)),
            Ok(data) => whole.push(data),
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
        if is_grpc && holds_more_than_a_message(whole.bytes()) {
            return Ok(Collected::Stream(Body::resumed(whole.finish(), body)));
        }
    }
    Ok(Collected::Whole(whole.finish(), trailers))
}

fn causes<'e>(error: &'e (dyn Error + 'static)) -> impl Iterator<Item = &'e (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

/// Pieces put together; a single one stays as it is.
#[derive(Default)]
struct Whole {
    only: Bytes,
    joined: BytesMut,
}

impl Whole {
    fn len(&self) -> usize {
        self.bytes().len()
    }

    fn bytes(&self) -> &[u8] {
        if self.joined.is_empty() { &self.only } else { &self.joined }
    }

    fn push(&mut self, piece: Bytes) {
        if self.len() == 0 {
            self.only = piece;
            return;
        }
        if self.joined.is_empty() {
            self.joined.extend_from_slice(&std::mem::take(&mut self.only));
        }
        self.joined.extend_from_slice(&piece);
    }

    fn finish(self) -> Bytes {
        if self.joined.is_empty() { self.only } else { self.joined.freeze() }
    }
}

/// Whether a second message begins: each is a flag, a big-endian `u32` of its length, and that many bytes.
fn holds_more_than_a_message(bytes: &[u8]) -> bool {
    let Some(&[_, l0, l1, l2, l3]) = bytes.first_chunk() else { return false };
    bytes.len() - 5 > u32::from_be_bytes([l0, l1, l2, l3]) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_message_is_told_from_a_first_that_is_not_whole() {
        assert!(!holds_more_than_a_message(b""));
        assert!(!holds_more_than_a_message(b"\0\0\0\0"));
        assert!(!holds_more_than_a_message(b"\0\0\0\0\0"));
        assert!(!holds_more_than_a_message(b"\0\0\0\0\x02a"));
        assert!(!holds_more_than_a_message(b"\0\0\0\0\x02ab"));
        assert!(holds_more_than_a_message(b"\0\0\0\0\x02ab\0"));
        assert!(holds_more_than_a_message(b"\0\0\0\0\0\0"));
    }
}
