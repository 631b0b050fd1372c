//! Several layers over one service, and limits of others.

use crate::service::{around, data, echo, fed, layer, post, send, store};
use http::{Request, Response, StatusCode};
use http_body_util::Limited;
use oncekey::Store;
use oncekey::http::{Body, Policy, Problem};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tower::Layer;
use tower::util::BoxCloneSyncService;

#[tokio::test]
async fn of_two_layers_over_one_service_the_outer_one_does_the_work() {
    let store = store();
    let (inner, inner_log) = echo(layer(&store, Policy::new()), StatusCode::OK);
    let service = BoxCloneSyncService::new(layer(&store, Policy::new()).layer(inner));
    assert_eq!(send(&service, post("a", "x")).await.text(), "run 1: x");
    assert!(send(&service, post("a", "x")).await.is_replay());
    assert_eq!(inner_log.runs(), 1);
}

#[tokio::test]
async fn what_another_layer_behind_answers_for_itself_is_not_final() {
    for problem in [
        Problem::new(StatusCode::CONFLICT, "in-flight", "It runs").retry_after(Duration::from_secs(1)),
        Problem::new(StatusCode::CONFLICT, "outcome-unknown", "Nobody knows"),
    ] {
        let runs = Arc::new(AtomicUsize::new(0));
        let (service, log) = around(layer(&store(), Policy::new()), move |_| {
            let is_first = runs.fetch_add(1, Ordering::SeqCst) == 0;
            let problem = problem.clone();
            async move { if is_first { problem.response() } else { Response::new(Body::from("charged")) } }
        });
        assert_eq!(send(&service, post("a", "")).await.status, StatusCode::CONFLICT);
        assert_eq!(send(&service, post("a", "")).await.text(), "charged");
        assert!(send(&service, post("a", "")).await.is_replay());
        assert_eq!(log.runs(), 2);
    }
}

#[tokio::test]
async fn a_conflict_that_asks_for_a_retry_is_not_final() {
    let runs = Arc::new(AtomicUsize::new(0));
    let (service, _) = around(layer(&store(), Policy::new()), move |_| {
        let is_first = runs.fetch_add(1, Ordering::SeqCst) == 0;
        async move {
            let answer =
                if is_first { Response::builder().status(409).header("retry-after", "1") } else { Response::builder() };
            answer.body(Body::empty()).unwrap()
        }
    });
    assert_eq!(send(&service, post("a", "")).await.status, StatusCode::CONFLICT);
    assert_eq!(send(&service, post("a", "")).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_limit_of_a_layer_before_is_told_as_one() {
    let (service, log) = echo(layer(&store(), Policy::new()), StatusCode::OK);
    let (frames, body) = fed();
    frames.send(data("0123456789")).unwrap();
    drop(frames);
    let request = Request::post("/").header("idempotency-key", "a").body(Body::new(Limited::new(body, 5))).unwrap();
    send(&service, request).await.assert_problem(413, "body-too-large");
    assert_eq!(log.runs(), 0);
}

#[tokio::test]
async fn a_passed_request_whose_service_fails_is_told_of() {
    use tower::{ServiceExt, service_fn};
    let kinds = Arc::new(std::sync::Mutex::new(Vec::new()));
    let inside = Arc::clone(&kinds);
    let layer = layer(&Store::in_memory().unwrap(), Policy::new())
        .observe(move |event| inside.lock().unwrap().push((event.kind, event.status)));
    let service =
        layer.layer(service_fn(|_: Request<Body>| async { Err::<Response<Body>, _>(std::io::Error::other("broken")) }));
    service.oneshot(Request::get("/").body(Body::empty()).unwrap()).await.unwrap_err();
    assert_eq!(*kinds.lock().unwrap(), [(oncekey::http::EventKind::Passed, None)]);
}
