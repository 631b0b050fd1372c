//! Which answers are kept, and that they come back as they were.

use crate::service::{around, echo, layer, post, send, store};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use oncekey::http::{Body, BoxError, EventKind, HeaderFilter, Policy, Running, StoredAnswer, Verdict, Verdicts};
use oncekey::{Durability, ManualClock, Request as Key, Retention, Standing, Store};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

fn key(key: &str) -> Key<'_> {
    Key::new(key).operation("POST /payments")
}

/// A body of these pieces, with trailers if there are any, all there at once.
fn ready(
    pieces: Vec<Bytes>,
    trailers: Option<HeaderMap>,
) -> impl http_body::Body<Data = Bytes, Error = BoxError> + Send {
    let frames = pieces.into_iter().map(Frame::data).chain(trailers.map(Frame::trailers));
    StreamBody::new(Ready(frames.map(Ok).collect::<Vec<_>>().into_iter()))
}

struct Ready(std::vec::IntoIter<Result<Frame<Bytes>, BoxError>>);

impl futures_core::Stream for Ready {
    type Item = Result<Frame<Bytes>, BoxError>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        std::task::Poll::Ready(self.0.next())
    }
}

#[tokio::test]
async fn a_replay_has_status_headers_body_and_trailers_as_they_were() {
    let handler = |_| async {
        let mut trailers = HeaderMap::new();
        trailers.append("x-checksum", "1".parse().unwrap());
        trailers.append("set-cookie", "a=b".parse().unwrap());
        let body = ready(vec![Bytes::from_static(b"\x00\xff"), Bytes::from_static(b"end")], Some(trailers));
        let response = Response::builder().status(StatusCode::CREATED).header("x-a", "1").header("x-a", "2");
        let response = response
            .header("trailer", "x-checksum")
            .header("location", "/payments/1")
            .header("set-cookie", "session=1");
        response.header("connection", "x-hop").header("x-hop", "1").body(body).unwrap()
    };
    let store = store();
    let (service, log) = around(layer(&store, Policy::new()), handler);
    let first = send(&service, post("a", "")).await;
    assert_eq!(first.header("set-cookie"), Some("session=1"));
    assert!(first.header("idempotency-replayed").is_none() && first.header("cache-control").is_none());
    let expires = first.header("idempotency-key-expires").unwrap().to_owned();
    let record = store.get(&key("a")).unwrap().unwrap();
    let until = httpdate::parse_http_date(&expires).unwrap();
    assert!(record.expires_at().unwrap().duration_since(until).unwrap() < Duration::from_secs(1));
    drop(record);
    let replay = send(&service, post("a", "")).await;
    assert!(replay.is_replay());
    assert_eq!((replay.status, &replay.body), (StatusCode::CREATED, &first.body));
    assert_eq!(replay.headers.get_all("x-a").iter().collect::<Vec<_>>(), ["1", "2"]);
    assert_eq!(replay.header("location"), Some("/payments/1"));
    // Without it HTTP/1.1 sends no trailers.
    assert_eq!(replay.header("trailer"), Some("x-checksum"));
    assert_eq!(replay.header("idempotency-key-expires"), Some(&*expires));
    for name in ["set-cookie", "connection", "x-hop"] {
        assert!(replay.header(name).is_none(), "{name}");
    }
    let trailers = replay.trailers.unwrap();
    assert_eq!((trailers.len(), &trailers["x-checksum"]), (1, &"1".parse().unwrap()));
    assert_eq!(log.runs(), 1);
}

#[tokio::test]
async fn a_replayed_body_lies_in_the_journal() {
    let store = store();
    let (service, _) = echo(layer(&store, Policy::new()), StatusCode::OK);
    send(&service, post("a", "some text")).await;
    let replay = send(&service, post("a", "some text")).await;
    let record = store.get(&key("a")).unwrap().unwrap();
    assert!(record.bytes().as_ptr_range().contains(&replay.body.as_ptr()));
    assert!(replay.text().ends_with("some text"));
}

#[tokio::test]
async fn verdicts_are_those_that_the_docs_list() {
    let judge = |verdicts: &Verdicts, status: u16| {
        let (head, ()) = Response::builder().status(status).body(()).unwrap().into_parts();
        verdicts.verdict(&head)
    };
    for (verdicts, released) in [
        (Verdicts::ietf(), &[401, 403, 408, 425, 429, 500, 501, 502, 503, 504, 599][..]),
        (Verdicts::stripe(), &[400, 401, 403, 409, 429]),
    ] {
        for status in (200..300).chain([301, 303, 307]).chain(400..600) {
            let expected = match status {
                500..600 if released.contains(&500) => Verdict::Release,
                _ if released.contains(&status) => Verdict::Release,
                _ => Verdict::Store,
            };
            assert_eq!(judge(&verdicts, status), expected, "{status}");
        }
    }
}

#[tokio::test]
async fn what_is_released_runs_again_also_with_another_payload() {
    for (status, runs) in [(200, 1), (204, 1), (404, 1), (422, 1), (429, 2), (401, 2), (500, 2), (503, 2)] {
        let (service, log) = echo(layer(&store(), Policy::new()), StatusCode::from_u16(status).unwrap());
        assert_eq!(send(&service, post("a", "x")).await.status.as_u16(), status);
        let again = send(&service, post("a", if runs == 1 { "x" } else { "y" })).await;
        assert_eq!((again.status.as_u16(), again.is_replay(), log.runs()), (status, runs == 1, runs));
    }
}

#[tokio::test]
async fn a_client_error_is_stored_as_a_failure() {
    let store = store();
    let (service, _) = echo(layer(&store, Policy::new()), StatusCode::NOT_FOUND);
    send(&service, post("a", "x")).await;
    assert!(store.get(&key("a")).unwrap().unwrap().is_failure());
}

#[tokio::test]
async fn an_unknown_outcome_is_held_until_somebody_who_knows_erases_it() {
    let store = store();
    let policy = Policy::new().verdicts(Verdicts::of(|_| Verdict::Unknown));
    let (service, log) = echo(layer(&store, policy), StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(send(&service, post("a", "x")).await.status, StatusCode::GATEWAY_TIMEOUT);
    for _ in 0..3 {
        send(&service, post("a", "x")).await.assert_problem(409, "outcome-unknown");
    }
    send(&service, post("a", "y")).await.assert_problem(422, "key-reused");
    assert_eq!(store.lookup(&key("a")).unwrap().unwrap().attempt, 1);
    assert_eq!(log.runs(), 1);
    store.erase(&key("a")).unwrap();
    assert_eq!(send(&service, post("a", "y")).await.text(), "run 2: y");
}

fn running(request: &Request<Body>) -> Running {
    request.extensions().get::<Running>().unwrap().clone()
}

#[tokio::test]
async fn the_handler_can_decide_verdict_and_retention() {
    let clock = Arc::new(ManualClock::new(1_000_000));
    let store = Store::builder().background(false).clock(Arc::clone(&clock)).in_memory().unwrap();
    let handler = |request: Request<Body>| async move {
        let running = running(&request);
        running.set_retention(Retention::For(Duration::from_secs(10))).unwrap();
        assert!(running.set_retention(Retention::For(Duration::ZERO)).is_err());
        running.set_verdict(Verdict::Store);
        Response::builder().status(503).body(Full::new(Bytes::from_static(b"no"))).unwrap()
    };
    let (service, log) = around(layer(&store, Policy::new()), handler);
    assert_eq!(send(&service, post("a", "x")).await.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(send(&service, post("a", "x")).await.is_replay());
    clock.advance(Duration::from_secs(11));
    assert!(!send(&service, post("a", "x")).await.is_replay());
    assert_eq!(log.runs(), 2);
}

#[tokio::test]
async fn permanent_answers_tell_no_end() {
    let (service, _) = echo(layer(&store(), Policy::new().retention(Retention::Forever)), StatusCode::OK);
    for _ in 0..2 {
        assert!(send(&service, post("a", "x")).await.header("idempotency-key-expires").is_none());
    }
}

#[tokio::test]
async fn a_handle_of_an_operation_that_is_over_is_fenced() {
    let kept = Arc::new(std::sync::Mutex::new(None));
    let inside = Arc::clone(&kept);
    let handler = move |request: Request<Body>| {
        *inside.lock().unwrap() = Some(running(&request));
        async { Response::new(Full::new(Bytes::new())) }
    };
    let (service, _) = around(layer(&store(), Policy::new()), handler);
    send(&service, post("a", "x")).await;
    let running = kept.lock().unwrap().take().unwrap();
    assert!(running.set_recovery_point("late").await.unwrap_err().is_fenced());
    assert!(running.set_retention(Retention::Forever).unwrap_err().is_fenced());
    running.set_verdict(Verdict::Release);
    assert!(send(&service, post("a", "x")).await.is_replay());
}

#[tokio::test]
async fn headers_can_be_chosen_and_answers_redacted_before_they_are_stored() {
    let handler = |_| async {
        let response = Response::builder().header("x-a", "1").header("x-b", "2").header("content-type", "text/plain");
        response.body(Full::new(Bytes::from_static(b"card 4242"))).unwrap()
    };
    let redact = |answer: &mut StoredAnswer| {
        answer.body = Some(Bytes::from_static(b"card ****"));
        answer.headers.remove("content-type");
    };
    let names = ["x-b"].map(HeaderName::from_static);
    for (filter, kept) in [(HeaderFilter::deny(names.clone()), "x-a"), (HeaderFilter::allow(names), "x-b")] {
        let (service, _) = around(layer(&store(), Policy::new().stored_headers(filter).redact(redact)), handler);
        assert_eq!(send(&service, post("a", "")).await.text(), "card 4242");
        let replay = send(&service, post("a", "")).await;
        assert_eq!(replay.text(), "card ****");
        let own = replay.headers.keys().filter(|name| name.as_str().starts_with("x-") || *name == "content-type");
        assert_eq!(own.collect::<Vec<_>>(), [kept]);
    }
}

#[tokio::test]
async fn of_an_answer_over_the_cap_the_first_client_gets_all_and_later_ones_the_status() {
    // In one piece, and in pieces that the layer passes on before it has all.
    for pieces in [1, 40] {
        let handler = move |_| async move {
            let body = ready(vec![Bytes::from(vec![b'x'; 400_000 / pieces]); pieces], None);
            Response::builder().status(201).header("x-a", "1").header("etag", "\"e\"").body(body).unwrap()
        };
        let (service, log) = around(layer(&store(), Policy::new().max_answer(100_000)), handler);
        let first = send(&service, post("a", "")).await;
        assert_eq!((first.status.as_u16(), first.body.len()), (201, 400_000));
        for _ in 0..2 {
            let later = send(&service, post("a", "")).await;
            assert!(later.is_replay());
            assert_eq!((later.status.as_u16(), later.body.len()), (201, 0));
            assert_eq!((later.header("x-a"), later.header("etag")), (Some("1"), None));
            assert_eq!(later.header("idempotency-replay-unavailable"), Some("body-not-stored"));
        }
        assert_eq!(log.runs(), 1);
        assert_eq!(log.events()[1], EventKind::StoredWithoutBody);
    }
}

#[tokio::test]
async fn an_answer_that_the_store_refuses_as_too_large_is_kept_without_its_body() {
    let store = Store::builder().max_record_len(1000).in_memory().unwrap();
    let handler = |_| async { Response::new(Full::new(Bytes::from(vec![b'x'; 2000]))) };
    let (service, log) = around(layer(&store, Policy::new()), handler);
    assert_eq!(send(&service, post("a", "")).await.body.len(), 2000);
    let later = send(&service, post("a", "")).await;
    assert_eq!(later.header("idempotency-replay-unavailable"), Some("body-not-stored"));
    assert_eq!(log.runs(), 1);
}

#[tokio::test]
async fn what_another_program_stored_under_the_key_is_an_error_and_runs_nothing() {
    let store = store();
    let (service, log) = echo(layer(&store, Policy::new()), StatusCode::OK);
    send(&service, post("a", "x")).await;
    let fingerprint = store.lookup(&key("a")).unwrap().unwrap().fingerprint;
    let foreign = key("b").fingerprint(fingerprint);
    let oncekey::Outcome::Reserved(owner) = store.reserve(&foreign).unwrap() else { panic!("it is new") };
    owner.complete(b"no HTTP answer").unwrap();
    send(&service, post("b", "x")).await.assert_problem(500, "answer-unreadable");
    assert_eq!(log.runs(), 1);
}

#[tokio::test]
async fn a_synced_store_keeps_answers_across_a_reopening() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..2 {
        let store = Store::builder().durability(Durability::Synced).open(dir.path()).unwrap();
        let (service, log) = echo(layer(&store, Policy::new()), StatusCode::OK);
        let answer = send(&service, post("a", "x")).await;
        assert_eq!((answer.text(), answer.is_replay(), log.runs()), ("run 1: x", round == 1, 1 - round));
        drop((answer, service));
        store.close().unwrap();
    }
}

#[tokio::test]
async fn the_inner_services_error_leaves_the_outcome_unknown() {
    use tower::{Layer, ServiceExt};
    let store = store();
    let runs = Arc::new(AtomicUsize::new(0));
    let inside = Arc::clone(&runs);
    let failing = tower::service_fn(move |_: Request<Body>| {
        inside.fetch_add(1, Ordering::SeqCst);
        async { Err::<Response<Body>, _>(std::io::Error::other("broken")) }
    });
    let service = layer(&store, Policy::new()).layer(failing);
    assert_eq!(service.clone().oneshot(post("a", "x")).await.unwrap_err().to_string(), "broken");
    let answer = service.oneshot(post("a", "x")).await.unwrap();
    assert_eq!(answer.status(), StatusCode::CONFLICT);
    assert!(answer.into_body().collect().await.unwrap().to_bytes().windows(15).any(|text| text == b"outcome-unknown"));
    assert!(matches!(store.lookup(&key("a")).unwrap().unwrap().standing, Standing::Interrupted { .. }));
    assert_eq!(runs.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn what_only_the_layer_says_of_keys_is_not_taken_from_a_service() {
    const OURS: [&str; 5] = [
        "idempotency-replayed",
        "idempotency-replay-unavailable",
        "idempotency-key-expires",
        "idempotency-unprotected",
        "idempotency-problem",
    ];
    for streams in [false, true] {
        let handler = move |_| async move {
            let response = OURS.iter().fold(Response::builder(), |response, name| response.header(*name, "said"));
            let (frames, body) = crate::service::fed();
            frames.send(crate::service::data("made")).unwrap();
            let late = async move {
                tokio::task::yield_now().await;
                drop(frames);
            };
            if streams {
                drop(tokio::spawn(late))
            } else {
                late.await
            }
            response.header("x-own", "1").body(body).unwrap()
        };
        let (service, _) = around(layer(&store(), Policy::new().retention(Retention::Forever)), handler);
        let [first, second] = [send(&service, post("a", "")).await, send(&service, post("a", "")).await];
        assert!(second.is_replay());
        for answer in [first, second] {
            assert!(OURS.iter().all(|name| answer.header(name) != Some("said")), "{answer:?}");
            assert_eq!((answer.text(), answer.header("x-own")), ("made", Some("1")));
        }
    }
}

#[tokio::test]
async fn a_header_of_problems_does_not_make_a_success_one() {
    for (status, claim, runs) in [
        (200, "none", 1),
        (200, "urn:oncekey:problem:in-flight", 1),
        (409, "none", 1),
        (409, "urn:oncekey:problem:in-flight", 2),
    ] {
        let handler = move |_| async move {
            let response = Response::builder().status(status).header("idempotency-problem", claim);
            response.body(Full::new(Bytes::from_static(b"done"))).unwrap()
        };
        let (service, log) = around(layer(&store(), Policy::new()), handler);
        for _ in 0..2 {
            let answer = send(&service, post("a", "")).await;
            assert_eq!((answer.status.as_u16(), answer.text()), (status, "done"));
        }
        assert_eq!(log.runs(), runs, "{status} {claim}");
    }
}
