//! The body of a request with a key, which is read before anything is decided.

use super::body::Body;
use super::held::{Held, NoRoom};
use super::policy::Policy;
use super::problem::Problem;
use http_body::Body as _;
use http_body_util::{BodyExt, LengthLimitError};
use std::error::Error;
use std::future::Future;

/// How much of a request's body was read; it is in the body's place, before what may come.
pub(super) enum Collected {
    Whole,
    /// Of a gRPC request of several messages, which may have no end before its answer begins, the first.
    Stream,
}

/// Reads a body to its end, within the policy's limits and the room that there is.
///
/// # Errors
///
/// If it is too large, ends early, or takes too long, or there is no room for it.
pub(super) async fn collect(body: &mut Body, held: Held, policy: &Policy, is_grpc: bool) -> Result<Collected, Problem> {
    if body.is_end_stream() {
        *body = Body::empty();
        return Ok(Collected::Whole);
    }
    let limit = policy.max_request_body;
    if body.size_hint().lower() > limit as u64 {
        return Err(Problem::body_too_large(limit));
    }
    match tokio::time::timeout(policy.request_body_timeout, read(body, held, policy, is_grpc)).await {
        Ok(read) => read,
        Err(_) => Err(Problem::body_timeout(policy.request_body_timeout)),
    }
}

#[expect(clippy::manual_async_fn, reason = "as of `answer`")]
fn read(
    body: &mut Body,
    mut held: Held,
    policy: &Policy,
    is_grpc: bool,
) -> impl Future<Output = Result<Collected, Problem>> {
    async move {
        let limit = policy.max_request_body;
        let told = body.size_hint().upper().and_then(|told| usize::try_from(told).ok());
        let longest = told.map_or(limit, |told| told.min(limit));
        let mut trailers = None;
        loop {
            // So that a body that is always ready doesn't keep the time from running out.
            tokio::task::coop::consume_budget().await;
            let Some(frame) = body.frame().await else { break };
            let frame = frame.map_err(|error| match causes(&*error).any(|cause| cause.is::<LengthLimitError>()) {
                // A limit that was set before this layer.
                true => Problem::body_over_another_limit(),
                false => Problem::body_incomplete(),
            })?;
            match frame.into_data() {
                Ok(data) if data.len() > limit - held.len() => return Err(Problem::body_too_large(limit)),
                Ok(data) => {
                    held.push(&data, longest).map_err(|NoRoom| Problem::too_much_buffered(policy.retry_after))?;
                }
                Err(frame) => trailers = frame.into_trailers().ok().map(Box::new),
            }
            if is_grpc && holds_more_than_a_message(held.as_ref()) {
                *body = Body::resumed(held.finish(), std::mem::take(body));
                return Ok(Collected::Stream);
            }
        }
        *body = Body::whole(held.finish(), trailers);
        Ok(Collected::Whole)
    }
}

fn causes<'e>(error: &'e (dyn Error + 'static)) -> impl Iterator<Item = &'e (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
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
