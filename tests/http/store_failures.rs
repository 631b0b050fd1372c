//! A store that is full, closed or broken.

use crate::service::{around, echo, layer, post, send};
use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::Full;
use oncekey::Store;
use oncekey::http::{EventKind, Policy, WhenUnavailable};
use std::sync::Arc;
use std::time::Duration;

#[tokio::test]
async fn a_full_store_refuses_new_operations_and_still_replays_old_ones() {
    let store = Store::builder().max_keys(1).in_memory().unwrap();
    let (service, log) = echo(layer(&store, Policy::new().retry_after(Duration::from_secs(7))), StatusCode::OK);
    send(&service, post("a", "x")).await;
    let refused = send(&service, post("b", "x")).await;
    refused.assert_problem(503, "store-unavailable");
    assert_eq!(refused.header("retry-after"), Some("7"));
    assert!(send(&service, post("a", "x")).await.is_replay());
    assert_eq!((log.runs(), log.events()[2]), (1, EventKind::Unavailable));
}

#[tokio::test]
async fn by_choice_requests_pass_while_the_store_is_unavailable_and_their_answers_say_so() {
    let store = Store::builder().max_keys(1).in_memory().unwrap();
    let (service, log) = echo(layer(&store, Policy::new().when_unavailable(WhenUnavailable::Pass)), StatusCode::OK);
    send(&service, post("a", "x")).await;
    for run in 2..4 {
        let answer = send(&service, post("b", "x")).await;
        assert_eq!(answer.text(), format!("run {run}: x"));
        assert_eq!(answer.header("idempotency-unprotected"), Some("store-unavailable"));
    }
    assert_eq!(log.events()[2..], [EventKind::PassedUnprotected; 2]);
    store.close().unwrap();
    assert_eq!(send(&service, post("a", "x")).await.header("idempotency-unprotected"), Some("store-unavailable"));
}

#[tokio::test]
async fn a_closed_store_refuses_everything() {
    let store = crate::service::store();
    let (service, log) = echo(layer(&store, Policy::new()), StatusCode::OK);
    store.close().unwrap();
    send(&service, post("a", "x")).await.assert_problem(503, "store-unavailable");
    assert_eq!(log.runs(), 0);
}

#[tokio::test]
async fn an_answer_that_cannot_be_stored_still_gets_to_its_client() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let to_close = Arc::new(std::sync::Mutex::new(Some(store.clone())));
    let handler = move |_| {
        if let Some(store) = to_close.lock().unwrap().take() {
            store.close().unwrap();
        }
        async { Response::new(Full::new(Bytes::from_static(b"charged"))) }
    };
    let (service, log) = around(layer(&store, Policy::new()), handler);
    let answer = send(&service, post("a", "x")).await;
    assert_eq!((answer.status, answer.text()), (StatusCode::OK, "charged"));
    assert_eq!(answer.header("idempotency-replay-unavailable"), Some("not-stored"));
    assert_eq!(log.events(), [EventKind::Started, EventKind::NotStored]);
    drop((service, store));
    let (service, log) = around(layer(&Store::open(dir.path()).unwrap(), Policy::new()), |_| async {
        Response::new(Full::new(Bytes::new()))
    });
    send(&service, post("a", "x")).await.assert_problem(409, "outcome-unknown");
    assert_eq!(log.runs(), 0);
}

#[tokio::test]
async fn a_key_that_the_store_finds_too_long_is_the_clients_error() {
    let store = Store::builder().max_key_len(40).in_memory().unwrap();
    let (service, _) = echo(layer(&store, Policy::new().when_unavailable(WhenUnavailable::Pass)), StatusCode::OK);
    send(&service, post(&"x".repeat(30), "x")).await.assert_problem(400, "key-invalid");
    assert_eq!(send(&service, post("x", "x")).await.status, StatusCode::OK);
}
