//! Duplicates that arrive while the first request runs.

use crate::service::{around, begin, layer, post, send, store, until};
use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::Full;
use oncekey::http::{EventKind, InFlight, Policy};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

/// A handler that ends when it gets a permit.
fn gated()
-> (Arc<Semaphore>, impl Fn(http::Request<oncekey::http::Body>) -> GatedFuture + Clone + Send + Sync + 'static) {
    let gate = Arc::new(Semaphore::new(0));
    let inside = Arc::clone(&gate);
    let handler = move |_| {
        let gate = Arc::clone(&inside);
        Box::pin(async move {
            gate.acquire().await.unwrap().forget();
            Response::builder().status(StatusCode::CREATED).body(Full::new(Bytes::from_static(b"done"))).unwrap()
        }) as GatedFuture
    };
    (gate, handler)
}

type GatedFuture = std::pin::Pin<Box<dyn Future<Output = Response<Full<Bytes>>> + Send>>;

#[tokio::test]
async fn a_duplicate_is_told_at_once_to_come_back() {
    let (gate, handler) = gated();
    let (service, log) = around(layer(&store(), Policy::new().retry_after(Duration::from_millis(1500))), handler);
    let first = tokio::spawn({
        let service = service.clone();
        async move { send(&service, post("a", "x")).await }
    });
    until(|| log.runs() == 1).await;
    let answer = send(&service, post("a", "x")).await;
    answer.assert_problem(409, "in-flight");
    assert_eq!(answer.header("retry-after"), Some("2"));
    send(&service, post("a", "y")).await.assert_problem(422, "key-reused");
    gate.add_permits(1);
    assert_eq!(first.await.unwrap().status, StatusCode::CREATED);
    assert!(send(&service, post("a", "x")).await.is_replay());
    let expected =
        [EventKind::Started, EventKind::InFlight, EventKind::Mismatched, EventKind::Stored, EventKind::Replayed];
    assert_eq!(log.events(), expected);
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_that_waits_gets_the_answer_or_409_at_the_limit() {
    let (gate, handler) = gated();
    let (service, log) =
        around(layer(&store(), Policy::new().in_flight(InFlight::Wait(Duration::from_secs(5)))), handler);
    let ask = || {
        let service = service.clone();
        tokio::spawn(async move { send(&service, post("a", "x")).await })
    };
    let first = ask();
    until(|| log.runs() == 1).await;
    send(&service, post("a", "x")).await.assert_problem(409, "in-flight");
    let waiting = ask();
    until(|| log.events().len() >= 2).await;
    gate.add_permits(1);
    assert!(!first.await.unwrap().is_replay());
    let answer = waiting.await.unwrap();
    assert!(answer.is_replay());
    assert_eq!((answer.status, answer.text()), (StatusCode::CREATED, "done"));
    assert_eq!(log.runs(), 1);
}

#[tokio::test]
async fn who_waited_for_an_answer_that_is_not_kept_runs_the_operation_next() {
    let (gate, handler) = gated();
    let policy = Policy::new()
        .in_flight(InFlight::Wait(Duration::MAX))
        .verdicts(oncekey::http::Verdicts::of(|_| oncekey::http::Verdict::Release));
    let (service, log) = around(layer(&store(), policy), handler);
    let asked: Vec<_> = (0..3)
        .map(|_| {
            let service = service.clone();
            tokio::spawn(async move { send(&service, post("a", "x")).await })
        })
        .collect();
    until(|| log.runs() == 1).await;
    gate.add_permits(3);
    for answer in asked {
        assert!(!answer.await.unwrap().is_replay());
    }
    assert_eq!(log.runs(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn fifty_parallel_duplicates_run_once_and_get_the_same_bytes() {
    for round in 0..20 {
        let (gate, handler) = gated();
        gate.add_permits(50);
        let (service, log) = around(layer(&store(), Policy::new().in_flight(InFlight::Wait(Duration::MAX))), handler);
        let asked: Vec<_> = (0..50)
            .map(|_| {
                let service = service.clone();
                tokio::spawn(async move { send(&service, post("a", "x")).await })
            })
            .collect();
        let mut bodies = HashSet::new();
        let mut replays = 0;
        for answer in asked {
            let answer = answer.await.unwrap();
            assert_eq!(answer.status, StatusCode::CREATED);
            replays += usize::from(answer.is_replay());
            bodies.insert(answer.body);
        }
        assert_eq!((log.runs(), bodies.len(), replays), (1, 1, 49), "round {round}");
    }
}

#[tokio::test]
async fn a_duplicate_that_leaves_while_it_waits_disturbs_nobody() {
    let (gate, handler) = gated();
    let (service, log) = around(layer(&store(), Policy::new().in_flight(InFlight::Wait(Duration::MAX))), handler);
    let first = tokio::spawn({
        let service = service.clone();
        async move { send(&service, post("a", "x")).await }
    });
    until(|| log.runs() == 1).await;
    let mut waiting = Box::pin(begin(&service, post("a", "x")));
    assert!(futures_poll(&mut waiting).await);
    drop(waiting);
    gate.add_permits(1);
    assert_eq!(first.await.unwrap().text(), "done");
    assert_eq!(log.runs(), 1);
}

/// Polls once; whether it is still pending.
async fn futures_poll<F: Future + Unpin>(future: &mut F) -> bool {
    std::future::poll_fn(|context| std::task::Poll::Ready(std::pin::Pin::new(&mut *future).poll(context).is_pending()))
        .await
}
