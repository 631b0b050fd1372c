//! A store that is full, closed or broken.

use crate::service::{around, echo, layer, post, send, until};
use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::Full;
use oncekey::http::{EventKind, InFlight, Interrupted, Policy, Reconciled, WhenUnavailable};
use oncekey::testing::SimDisk;
use oncekey::{Durability, Outcome, Request as Key, Store};
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

#[tokio::test]
async fn what_is_known_to_run_or_to_be_interrupted_never_passes() {
    let store = Store::builder().durability(Durability::Buffered).in_memory().unwrap();
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let inside = Arc::clone(&gate);
    let policy = Policy::new().in_flight(InFlight::Wait(Duration::MAX)).when_unavailable(WhenUnavailable::Pass);
    let (service, log) = around(layer(&store, policy), move |_| {
        let gate = Arc::clone(&inside);
        async move {
            gate.acquire().await.unwrap().forget();
            Response::new(Full::new(Bytes::from_static(b"charged")))
        }
    });
    let ask = || {
        let service = service.clone();
        tokio::spawn(async move { send(&service, post("a", "")).await })
    };
    let first = ask();
    until(|| log.runs() == 1).await;
    let second = ask();
    until(|| store.stats().in_flight == 1).await;
    store.close().unwrap();
    second.await.unwrap().assert_problem(503, "store-unavailable");
    assert_eq!(log.runs(), 1);
    gate.add_permits(1);
    assert_eq!(first.await.unwrap().text(), "charged");
}

#[tokio::test]
async fn what_is_to_be_reconciled_does_not_pass_while_the_store_is_full() {
    let builder = Store::builder().durability(Durability::Buffered).background(false);
    let store = builder.segment_size(64 * 1024).max_bytes(1024 * 1024).in_memory().unwrap();
    let policy = Policy::new()
        .interrupted(Interrupted::reconcile(|_| async { Ok(Reconciled::DidNotHappen) }))
        .when_unavailable(WhenUnavailable::Pass);
    let (service, log) = around(layer(&store, policy), |_| async {
        if true {
            panic!("the handler fails, as this test wants it to");
        }
        Response::new(Full::new(Bytes::new()))
    });
    send(&service, post("a", "")).await.assert_problem(500, "outcome-unknown");
    // Large ones until there is no room for them, and then small ones.
    for len in [2000, 1] {
        for nth in 0_u32.. {
            let Ok(Outcome::Reserved(owner)) = store.reserve(&Key::new(&nth.to_le_bytes()).scope(&[len as u8])) else {
                break;
            };
            if owner.complete(vec![0; len]).is_err() {
                break;
            }
        }
    }
    send(&service, post("a", "")).await.assert_problem(503, "store-unavailable");
    assert_eq!(log.runs(), 1);
}

#[tokio::test]
async fn once_an_answer_finds_no_room_no_further_operation_is_begun() {
    let disk = SimDisk::new();
    let builder = Store::builder().durability(Durability::Buffered).background(false).segment_size(64 * 1024);
    let store = builder.open_simulated(&disk).unwrap();
    let (service, log) =
        around(layer(&store, Policy::new()), |_| async { Response::new(Full::new(Bytes::from(vec![b'x'; 8000]))) });
    assert_eq!(send(&service, post("first", "")).await.status, StatusCode::OK);
    // What is allocated stays; no segment is added to it.
    disk.set_capacity(Some(0));
    let mut last = None;
    for nth in 0..1000 {
        let answer = send(&service, post(&format!("order-{nth}"), "")).await;
        assert_eq!(answer.body.len(), 8000);
        if answer.header("idempotency-replay-unavailable") == Some("not-stored") {
            last = Some(nth);
            break;
        }
    }
    assert!(last.is_some(), "the disk is full");
    assert!(store.stats().is_full);
    let runs = log.runs();
    for nth in 0..10 {
        send(&service, post(&format!("later-{nth}"), "")).await.assert_problem(503, "store-unavailable");
    }
    assert!(send(&service, post("first", "")).await.is_replay());
    assert_eq!(log.runs(), runs);
}
