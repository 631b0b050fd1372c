//! Clients that leave.

use crate::service::{around, begin, data, fed, layer, piece, post, send, store, until};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use oncekey::http::{Body, EventKind, Policy, Running};
use oncekey::{Durability, ManualClock, Request as Key, Standing, Store};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::sync::Semaphore;

fn key() -> Key<'static> {
    Key::new("a").operation("POST /payments")
}

/// Polls a future once, and lets it go.
async fn touch<F: Future>(future: F) {
    let mut future = pin!(future);
    std::future::poll_fn(|context| {
        assert!(future.as_mut().poll(context).is_pending());
        Poll::Ready(())
    })
    .await;
}

#[tokio::test]
async fn a_client_that_leaves_ends_neither_the_handler_nor_its_recording() {
    let gate = Arc::new(Semaphore::new(0));
    let inside = Arc::clone(&gate);
    let handler = move |_| {
        let gate = Arc::clone(&inside);
        async move {
            gate.acquire().await.unwrap().forget();
            Response::builder().status(StatusCode::CREATED).body(Full::new(Bytes::from_static(b"done"))).unwrap()
        }
    };
    let idempotency = layer(&store(), Policy::new());
    let (service, log) = around(idempotency.clone(), handler);
    touch(begin(&service, post("a", ""))).await;
    assert_eq!((log.runs(), idempotency.running()), (1, 1));
    send(&service, post("a", "")).await.assert_problem(409, "in-flight");
    let mut drained = Box::pin(idempotency.drained());
    std::future::poll_fn(|context| {
        assert!(drained.as_mut().poll(context).is_pending());
        Poll::Ready(())
    })
    .await;
    gate.add_permits(1);
    drained.await;
    let answer = send(&service, post("a", "")).await;
    assert!(answer.is_replay());
    assert_eq!((answer.status, answer.text(), log.runs()), (StatusCode::CREATED, "done", 1));
    assert_eq!(idempotency.running(), 0);
}

#[tokio::test]
async fn a_client_that_leaves_a_stream_does_not_end_its_recording() {
    let (frames, body) = fed();
    let body = Arc::new(std::sync::Mutex::new(Some(body)));
    let handler = move |_| {
        let body = body.lock().unwrap().take().unwrap();
        async move { Response::new(body) }
    };
    let (service, log) = around(layer(&store(), Policy::new()), handler);
    frames.send(data("one ")).unwrap();
    let mut first = begin(&service, post("a", "")).await.into_body();
    assert_eq!(piece(&mut first).await.unwrap().unwrap(), "one ");
    drop(first);
    frames.send(data("two")).unwrap();
    drop(frames);
    until(|| log.events().contains(&EventKind::Stored)).await;
    let replay = send(&service, post("a", "")).await;
    assert!(replay.is_replay());
    assert_eq!((replay.text(), log.runs()), ("one two", 1));
}

#[tokio::test]
async fn a_client_that_leaves_before_its_operation_began_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::builder().durability(Durability::Synced).open(dir.path()).unwrap();
    let handler = |_| async { Response::new(Full::new(Bytes::new())) };
    let (service, log) = around(layer(&store, Policy::new()), handler);
    for begun in 1..=20 {
        // The reservation is being synced on another thread.
        touch(begin(&service, post("a", ""))).await;
        until(|| (store.stats().reserved, store.stats().released) == (begun, begun)).await;
        assert!(store.lookup(&key()).unwrap().is_none());
    }
    assert_eq!(log.runs(), 0);
    assert_eq!(send(&service, post("a", "")).await.status, StatusCode::OK);
}

#[tokio::test]
async fn operations_whose_clients_left_count_against_the_limit_of_those_that_run() {
    let gate = Arc::new(Semaphore::new(0));
    let inside = Arc::clone(&gate);
    let store = store();
    let idempotency = layer(&store, Policy::new()).max_running(2);
    let (service, log) = around(idempotency.clone(), move |_| {
        let gate = Arc::clone(&inside);
        async move {
            gate.acquire().await.unwrap().forget();
            Response::new(Full::new(Bytes::from_static(b"done")))
        }
    });
    for key in ["a", "b"] {
        touch(begin(&service, post(key, ""))).await;
    }
    let refused = send(&service, post("c", "")).await;
    refused.assert_problem(503, "too-many-running");
    assert_eq!(refused.header("retry-after"), Some("1"));
    send(&service, post("a", "")).await.assert_problem(409, "in-flight");
    gate.add_permits(3);
    idempotency.drained().await;
    // Its key was left free.
    until(|| store.stats().released == 1).await;
    assert_eq!(send(&service, post("c", "")).await.text(), "done");
    assert_eq!(log.runs(), 3);
}

#[tokio::test]
async fn a_lease_does_not_run_out_while_the_handler_runs() {
    let clock = Arc::new(ManualClock::new(1_000_000));
    let store = Store::builder().background(false).clock(Arc::clone(&clock)).in_memory().unwrap();
    let inside = (store.clone(), Arc::clone(&clock));
    let handler = move |_: Request<Body>| {
        let (store, clock) = inside.clone();
        async move {
            clock.advance(Duration::from_secs(3600));
            store.maintain(1000).unwrap();
            let found = store.lookup(&key()).unwrap().unwrap();
            assert!(matches!(found.standing, Standing::Running { .. }), "{found:?}");
            Response::new(Full::new(Bytes::from_static(b"done")))
        }
    };
    let (service, _) = around(layer(&store, Policy::new().lease(Duration::from_millis(1))), handler);
    assert_eq!(send(&service, post("a", "")).await.status, StatusCode::OK);
    assert!(send(&service, post("a", "")).await.is_replay());
}

#[test]
fn a_runtime_that_ends_leaves_its_operations_interrupted() {
    let store = store();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // Even if somebody keeps the handle.
    let kept = Arc::new(std::sync::Mutex::new(None));
    let inside = Arc::clone(&kept);
    let (service, _) = around(layer(&store, Policy::new()), move |request| {
        *inside.lock().unwrap() = request.extensions().get::<Running>().cloned();
        async {
            std::future::pending::<()>().await;
            Response::new(Full::new(Bytes::new()))
        }
    });
    let first = runtime();
    first.block_on(touch(begin(&service, post("a", ""))));
    assert!(matches!(store.lookup(&key()).unwrap().unwrap().standing, Standing::Running { .. }));
    drop(first);
    assert!(kept.lock().unwrap().is_some());
    assert!(matches!(store.lookup(&key()).unwrap().unwrap().standing, Standing::Interrupted { .. }));
    runtime().block_on(async { send(&service, post("a", "")).await.assert_problem(409, "outcome-unknown") });
}
