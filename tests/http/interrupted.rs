//! Keys whose owner vanished.

use crate::service::{Log, Service, around, echo, layer, post, send, store};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use oncekey::http::{Body, BoxError, EventKind, Interrupted, Interruption, Policy, Reconciled, Running, Verdicts};
use oncekey::{Request as Key, Standing, Store};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

fn key() -> Key<'static> {
    Key::new("a").operation("POST /payments")
}

/// A service whose first run panics after it left a recovery point, and what came after in its words.
fn crashing(store: &Store, interrupted: Interrupted) -> (Service, Log) {
    let handler = |request: Request<Body>| async move {
        let running: Running = request.extensions().get::<Running>().unwrap().clone();
        if running.attempt() == 1 {
            running.set_recovery_point("charged 7").await.unwrap();
            panic!("the handler fails, as this test wants it to");
        }
        let point = request.headers().get("idempotency-recovery-point").map(|value| value.to_str().unwrap());
        let text = format!("{} {:?} {:?}", running.attempt(), running.recovery_point().unwrap(), point.unwrap());
        Response::new(Full::new(Bytes::from(text)))
    };
    around(layer(store, Policy::new().interrupted(interrupted)), handler)
}

#[tokio::test]
async fn after_a_panic_the_outcome_is_unknown() {
    let store = store();
    let (service, log) = crashing(&store, Interrupted::Refuse);
    send(&service, post("a", "x")).await.assert_problem(500, "outcome-unknown");
    for _ in 0..3 {
        send(&service, post("a", "x")).await.assert_problem(409, "outcome-unknown");
    }
    let found = store.lookup(&key()).unwrap().unwrap();
    let Standing::Interrupted { recovery_point: Some(point), .. } = found.standing else { panic!("{found:?}") };
    assert_eq!((found.attempt, point.bytes()), (1, &b"charged 7"[..]));
    assert_eq!(log.runs(), 1);
    let expected = [EventKind::Started, EventKind::Unknown, EventKind::OutcomeUnknown, EventKind::OutcomeUnknown];
    assert_eq!(log.events()[..4], expected);
}

#[tokio::test]
async fn a_rerun_sees_its_number_and_the_last_recovery_point() {
    let (service, log) = crashing(&store(), Interrupted::Rerun);
    send(&service, post("a", "x")).await;
    let answer = send(&service, post("a", "x")).await;
    assert_eq!(answer.text(), r#"2 b"charged 7" ":Y2hhcmdlZCA3:""#);
    assert!(send(&service, post("a", "x")).await.is_replay());
    assert_eq!(log.runs(), 2);
    assert!(log.events().contains(&EventKind::TakenOver));
}

#[tokio::test]
async fn reconciliation_answers_runs_or_leaves_it_open() {
    let asked = Arc::new(AtomicUsize::new(0));
    let inside = Arc::clone(&asked);
    // Open, an error, a panic, and then what the case wants.
    for happened in [true, false] {
        inside.store(0, Ordering::SeqCst);
        let inside = Arc::clone(&inside);
        let find_out = move |interruption: Interruption| {
            let times = inside.fetch_add(1, Ordering::SeqCst);
            async move {
                assert_eq!((&*interruption.key, &*interruption.operation), ("a", "POST /payments"));
                assert_eq!(interruption.recovery_point.as_deref(), Some(&b"charged 7"[..]));
                assert_eq!((interruption.attempt as usize, &*interruption.body), (times + 2, &b"x"[..]));
                match times {
                    0 => Ok(Reconciled::StillUnknown),
                    1 => Err(BoxError::from("the bank doesn't answer")),
                    2 => panic!("reconciliation fails, as this test wants it to"),
                    _ if happened => {
                        // Which would be released if the handler gave it now.
                        let answer = Response::builder().status(StatusCode::BAD_GATEWAY).body(Body::from("found"));
                        Ok(Reconciled::Happened(answer?))
                    }
                    _ => Ok(Reconciled::DidNotHappen),
                }
            }
        };
        let store = store();
        let (service, log) = crashing(&store, Interrupted::reconcile(find_out));
        send(&service, post("a", "x")).await.assert_problem(500, "outcome-unknown");
        for status in [409, 409, 500] {
            send(&service, post("a", "x")).await.assert_problem(status, "outcome-unknown");
        }
        let answer = send(&service, post("a", "x")).await;
        let expected = if happened { "found" } else { r#"5 b"charged 7" ":Y2hhcmdlZCA3:""# };
        assert_eq!(answer.text(), expected);
        let replay = send(&service, post("a", "x")).await;
        assert!(replay.is_replay());
        assert_eq!((replay.text(), replay.status), (expected, answer.status));
        assert_eq!((log.runs(), asked.load(Ordering::SeqCst)), (if happened { 1 } else { 2 }, 4));
    }
}

#[tokio::test]
async fn a_payload_that_differs_is_told_before_the_unknown_outcome() {
    let (service, _) = crashing(&store(), Interrupted::Refuse);
    send(&service, post("a", "x")).await;
    send(&service, post("a", "y")).await.assert_problem(422, "key-reused");
}

#[tokio::test]
async fn an_owner_of_another_program_that_vanished_counts_as_one() {
    let store = store();
    let (service, log) = echo(layer(&store, Policy::new()), StatusCode::OK);
    send(&service, post("b", "x")).await;
    let fingerprint = store.lookup(&Key::new("b").operation("POST /payments")).unwrap().unwrap().fingerprint;
    drop(store.reserve(&key().fingerprint(fingerprint)).unwrap());
    send(&service, post("a", "x")).await.assert_problem(409, "outcome-unknown");
    assert_eq!(log.runs(), 1);
}

#[tokio::test]
async fn code_of_the_policy_that_panics_ends_an_operation_as_the_handler_does() {
    let kept = Arc::new(std::sync::Mutex::new(None));
    for policy in [
        Policy::new().verdicts(Verdicts::of(|_| panic!("the judge fails, as this test wants it to"))),
        Policy::new().redact(|_| panic!("the redactor fails, as this test wants it to")),
    ] {
        let store = store();
        let inside = Arc::clone(&kept);
        let idempotency = layer(&store, policy);
        let (service, log) = around(idempotency.clone(), move |request: Request<Body>| {
            *inside.lock().unwrap() = request.extensions().get::<Running>().cloned();
            async { Response::new(Full::new(Bytes::from_static(b"charged"))) }
        });
        send(&service, post("a", "x")).await.assert_problem(500, "outcome-unknown");
        assert!(matches!(store.lookup(&key()).unwrap().unwrap().standing, Standing::Interrupted { .. }));
        assert_eq!((log.events(), idempotency.running()), (vec![EventKind::Started, EventKind::Unknown], 0));
    }
}

#[tokio::test]
async fn neither_key_nor_body_is_printed_for_debugging() {
    let text = Arc::new(std::sync::Mutex::new(String::new()));
    let inside = Arc::clone(&text);
    let find_out = move |interruption: Interruption| {
        *inside.lock().unwrap() = format!("{interruption:?}");
        async { Ok(Reconciled::StillUnknown) }
    };
    let (service, _) = crashing(&store(), Interrupted::reconcile(find_out));
    for _ in 0..2 {
        send(&service, post("secret-key", "card 4242")).await;
    }
    let text = text.lock().unwrap();
    assert!(text.contains("POST /payments") && !text.contains("secret") && !text.contains("42"), "{text}");
}
