//! What the bodies of requests take of memory, all together.

use crate::service::{around, begin, data, fed, layer, post, send, store, until};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use oncekey::http::{Body, EventKind, Policy};
use std::sync::{Arc, Mutex};

#[tokio::test]
async fn a_body_without_room_is_refused_with_nothing_begun() {
    let layer = layer(&store(), Policy::new()).max_buffered(10);
    let (service, log) = crate::service::echo(layer.clone(), http::StatusCode::OK);
    let (frames, body) = fed();
    let slow = Request::post("/payments").header("idempotency-key", "slow").body(Body::new(body)).unwrap();
    let (asked, other) = (tokio::spawn(begin_owned(service.clone(), slow)), layer.clone());
    frames.send(data("0123456")).unwrap();
    until(|| other.buffered() > 0).await;
    let refused = send(&service, post("a", "0123")).await;
    refused.assert_problem(503, "too-much-buffered");
    assert_eq!((refused.header("retry-after"), layer.buffered()), (Some("1"), 7));
    assert_eq!((log.runs(), log.events()), (0, vec![EventKind::Unavailable]));
    assert_eq!(send(&service, post("b", "012")).await.text(), "run 1: 012");
    // It leaves.
    asked.abort();
    assert!(asked.await.unwrap_err().is_cancelled());
    assert_eq!(layer.buffered(), 0);
    // Nothing is known of either key.
    for key in ["a", "slow"] {
        assert!(!send(&service, post(key, "another")).await.is_replay());
    }
    assert_eq!(layer.buffered(), 0);
}

async fn begin_owned(service: crate::service::Service, request: Request<Body>) -> Response<Body> {
    begin(&service, request).await
}

#[tokio::test]
async fn a_body_counts_until_its_service_has_let_go_of_it() {
    let kept = Arc::new(Mutex::new(None));
    let inside = Arc::clone(&kept);
    let layer = layer(&store(), Policy::new()).max_buffered(10);
    let (service, _) = around(layer.clone(), move |request: Request<Body>| {
        let inside = Arc::clone(&inside);
        async move {
            *inside.lock().unwrap() = Some(request.into_body().collect().await.unwrap().to_bytes());
            Response::new(Full::new(Bytes::new()))
        }
    });
    send(&service, post("a", "01234567")).await;
    assert_eq!(layer.buffered(), 8);
    send(&service, post("b", "0123")).await.assert_problem(503, "too-much-buffered");
    // A duplicate needs its body read as well.
    send(&service, post("a", "01234567")).await.assert_problem(503, "too-much-buffered");
    assert_eq!(kept.lock().unwrap().take().unwrap(), "01234567");
    assert_eq!(layer.buffered(), 0);
    assert!(send(&service, post("a", "01234567")).await.is_replay());
}

#[tokio::test]
async fn a_body_of_the_greatest_length_fits_where_nothing_else_is_held() {
    let layer = layer(&store(), Policy::new().max_request_body(10)).max_buffered(10);
    let (service, _) = crate::service::echo(layer, http::StatusCode::OK);
    let (frames, body) = fed();
    for piece in ["0123", "45", "6789"] {
        frames.send(data(piece)).unwrap();
    }
    drop(frames);
    let request = Request::post("/payments").header("idempotency-key", "a").body(Body::new(body)).unwrap();
    assert_eq!(send(&service, request).await.text(), "run 1: 0123456789");
}
