//! gRPC, as far as it looks like HTTP.

use crate::service::{Answer, Service, around, data, fed, layer, piece, send, store};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use http_body_util::BodyExt;
use oncekey::http::{Body, EventKind, Interrupted, Policy, Reconciled};
use std::sync::{Arc, Mutex};

fn call(key: Option<&str>, message: &'static [u8]) -> Request<Body> {
    let mut request = Request::post("/orders.Orders/Place").header("content-type", "application/grpc+proto");
    if let Some(key) = key {
        request = request.header("idempotency-key", key);
    }
    request.body(Body::from(Bytes::from_static(message))).unwrap()
}

const ONE: &[u8] = b"\0\0\0\0\x01a";
const OTHER: &[u8] = b"\0\0\0\0\x01b";

fn status(answer: &Answer) -> (&str, &str) {
    (answer.header("grpc-status").unwrap(), answer.header("idempotency-problem").unwrap().rsplit(':').next().unwrap())
}

/// A service that answers with these statuses in its trailers, one after another.
fn answering(policy: Policy, statuses: &'static [u16]) -> (Service, crate::service::Log) {
    let next = Arc::new(Mutex::new(statuses.iter()));
    around(layer(&store(), policy), move |_| {
        let status = *next.lock().unwrap().next().unwrap();
        async move {
            let (frames, body) = fed();
            frames.send(data("\0\0\0\0\x01r")).unwrap();
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", status.into());
            frames.send(Ok(Frame::trailers(trailers))).unwrap();
            Response::builder().header("content-type", "application/grpc").body(body).unwrap()
        }
    })
}

#[tokio::test]
async fn the_status_in_the_trailers_decides() {
    for code in 0..=17 {
        let (service, log) = answering(Policy::new(), Box::leak(Box::new([code, code])));
        send(&service, call(Some("a"), ONE)).await;
        let again = send(&service, call(Some("a"), ONE)).await;
        match code {
            0 | 3 | 5 | 6 | 9 | 11 | 12 => {
                assert!(again.is_replay());
                assert_eq!(again.trailers.unwrap()["grpc-status"], code.to_string());
                assert_eq!(&again.body[..], b"\0\0\0\0\x01r");
            }
            7 | 8 | 10 | 13 | 14 | 16 => assert_eq!(log.runs(), 2, "{code}"),
            _ => {
                assert_eq!((status(&again), again.status.as_u16()), (("9", "outcome-unknown"), 200));
                assert_eq!(log.runs(), 1, "{code}");
            }
        }
    }
}

#[tokio::test]
async fn refusals_are_statuses_of_their_own() {
    let (service, _) = answering(Policy::new().required(true).max_request_body(10), &[0]);
    send(&service, call(Some("a"), ONE)).await;
    let missing = send(&service, call(None, ONE)).await;
    assert_eq!((status(&missing), missing.header("content-type")), (("3", "key-missing"), Some("application/grpc")));
    assert_eq!(status(&send(&service, call(Some(""), ONE)).await), ("3", "key-invalid"));
    assert_eq!(status(&send(&service, call(Some("a"), OTHER)).await), ("9", "key-reused"));
    assert_eq!(status(&send(&service, call(Some("b"), b"\0\0\0\0\x06abcdef")).await), ("8", "body-too-large"));
    let message = missing.header("grpc-message").unwrap();
    assert!(message.starts_with("An idempotency key is required. Send the header"), "{message}");
}

#[tokio::test]
async fn a_stream_of_requests_passes_though_it_has_a_key() {
    let handler = |request: Request<Body>| async move { Response::new(request.into_body()) };
    let (service, log) = around(layer(&store(), Policy::new()), handler);
    for _ in 0..2 {
        let (frames, body) = fed();
        frames.send(Ok(Frame::data(Bytes::from_static(ONE)))).unwrap();
        frames.send(Ok(Frame::data(Bytes::from_static(OTHER)))).unwrap();
        let request = Request::post("/orders.Orders/Watch").header("content-type", "application/grpc");
        let request = request.header("idempotency-key", "a").body(Body::new(body)).unwrap();
        let mut answer = crate::service::begin(&service, request).await.into_body();
        assert_eq!(piece(&mut answer).await.unwrap().unwrap(), [ONE, OTHER].concat());
        frames.send(Ok(Frame::data(Bytes::from_static(b"more")))).unwrap();
        assert_eq!(piece(&mut answer).await.unwrap().unwrap(), "more");
        drop(frames);
        assert!(answer.frame().await.is_none());
    }
    assert_eq!((log.runs(), log.events()), (2, vec![EventKind::Passed; 2]));
}

#[tokio::test]
async fn calls_that_the_policy_names_pass_unread() {
    let handler = |request: Request<Body>| async move { Response::new(request.into_body()) };
    let (service, log) =
        around(layer(&store(), Policy::new().pass(|parts| parts.uri.path().ends_with("/Place"))), handler);
    for _ in 0..2 {
        send(&service, call(Some("a"), ONE)).await;
    }
    assert_eq!(log.runs(), 2);
}

#[tokio::test]
async fn a_call_that_was_refused_by_a_status_of_http_is_judged_by_that() {
    for (status, runs) in [(401, 2), (404, 1)] {
        let (service, log) = around(layer(&store(), Policy::new()), move |_| async move {
            Response::builder().status(status).body(Body::empty()).unwrap()
        });
        for _ in 0..2 {
            assert_eq!(send(&service, call(Some("a"), ONE)).await.status.as_u16(), status);
        }
        assert_eq!(log.runs(), runs);
    }
}

#[tokio::test]
async fn an_answer_over_the_cap_is_told_as_a_status_later() {
    let (service, log) = answering(Policy::new().max_answer(3), &[0]);
    assert_eq!(send(&service, call(Some("a"), ONE)).await.body.len(), 6);
    let later = send(&service, call(Some("a"), ONE)).await;
    assert_eq!((status(&later), later.header("content-type")), (("13", "answer-not-kept"), Some("application/grpc")));
    assert_eq!(later.header("idempotency-replay-unavailable"), Some("body-not-stored"));
    assert_eq!(log.runs(), 1);
}

#[tokio::test]
async fn what_is_found_out_of_a_call_is_an_answer_with_a_status() {
    let find_out = |_| async {
        let answer = Response::builder().header("content-type", "application/grpc");
        Ok(Reconciled::Happened(answer.body(Body::from("\0\0\0\0\x01r"))?))
    };
    let policy = Policy::new().interrupted(Interrupted::reconcile(find_out));
    let (service, log) = answering(policy, &[2]);
    send(&service, call(Some("a"), ONE)).await;
    for is_replay in [false, true] {
        let answer = send(&service, call(Some("a"), ONE)).await;
        assert_eq!((&answer.body[..], answer.is_replay()), (&b"\0\0\0\0\x01r"[..], is_replay));
        assert_eq!(answer.trailers.unwrap()["grpc-status"], "0");
    }
    assert_eq!(log.runs(), 1);
}
