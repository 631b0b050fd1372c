//! Clients that take their time, or send more than is good for anybody.

use crate::client::{Client, ask, get, post};
use crate::process::Setup;
use crate::upstream::{Act, Upstream};

#[test]
fn a_head_that_is_too_large_is_refused() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).flag("--max-head", "16KiB").flag("--max-headers", "20").start();
    let large = "x".repeat(17 * 1024);
    assert_eq!(ask(gateway.address, get("/", &[("x", &large)])).status, 431);
    let many: Vec<_> = (0..20).map(|_| ("x", "y")).collect();
    assert_eq!(ask(gateway.address, get("/", &many)).status, 431);
    assert!(upstream.seen().is_empty());
    assert_eq!(ask(gateway.address, get("/", &many[1..])).status, 201);
}

#[test]
fn slow_heads_and_idle_connections_are_closed() {
    let gateway =
        Setup::for_url("http://127.0.0.1:9").flag("--head-timeout", "200ms").flag("--keep-alive", "300ms").start();
    for begin in ["", "G", "PRI * HTTP/2.0\r\n", "GET / HTTP/1.1\r\nhost: a\r\n", &(get("/", &[]) + "GET ")] {
        let mut client = Client::connect(gateway.address);
        client.send(begin);
        client.try_answer(false);
        assert!(client.is_closed(), "{begin:?}");
    }
    let mut silent = Client::connect(gateway.address);
    silent.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    // Its settings, a ping that isn't answered, the end.
    assert!(silent.rest().is_some());
    let mut idle = Client::connect(gateway.address);
    assert_eq!(idle.ask(get("/", &[])).status, 502);
    assert!(idle.is_closed());
}

#[test]
fn a_body_that_does_not_come_is_given_up() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).flag("--body-timeout", "300ms").start();
    for key in ["", "idempotency-key: k\r\n"] {
        let mut client = Client::connect(gateway.address);
        let answer = client.ask(format!("POST / HTTP/1.1\r\nhost: a\r\n{key}content-length: 5\r\n\r\nabc"));
        assert_eq!((answer.status, answer.problem().as_str()), (408, "body-timeout"), "{key:?}");
    }
    for key in ["", "idempotency-key: k\r\n"] {
        let mut client = Client::connect(gateway.address);
        client.send(format!("POST / HTTP/1.1\r\nhost: a\r\n{key}content-length: 5\r\n\r\nabc"));
        client.finish();
        // hyper may end the connection without an answer where the body ends early.
        if let Some(answer) = client.try_answer(false) {
            assert_eq!((answer.status, answer.problem().as_str()), (400, "body-incomplete"), "{key:?}");
        }
    }
    assert!(upstream.seen().is_empty());
    // Nothing of that is kept under the key.
    assert_eq!(ask(gateway.address, post("/", "k", "abcde")).status, 201);
}

#[test]
fn connections_over_the_limit_wait_for_their_turn() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).flag("--max-connections", "2").start();
    let mut served: Vec<_> = (0..2).map(|_| Client::connect(gateway.address)).collect();
    for client in &mut served {
        assert_eq!(client.ask(get("/", &[])).status, 201);
    }
    let mut waiting = Client::connect(gateway.address);
    waiting.send(get("/", &[]));
    assert_eq!(served[0].ask(get("/", &[])).status, 201);
    assert_eq!(upstream.seen().len(), 3);
    drop(served);
    assert_eq!(waiting.answer(false).status, 201);
}

#[test]
fn an_answer_over_the_limit_passes_and_is_not_run_again() {
    let upstream = Upstream::start(|_| Act::answer(201, &"x".repeat(100)));
    let gateway = Setup::new(&upstream).flag("--max-answer", "99B").start();
    assert_eq!(ask(gateway.address, post("/", "k", "")).body.len(), 100);
    // The client has its answer a moment before the store has.
    let again = loop {
        let again = ask(gateway.address, post("/", "k", ""));
        if again.status != 409 {
            break again;
        }
        assert_eq!(again.problem(), "in-flight");
    };
    assert_eq!((again.status, again.body.len()), (201, 0));
    assert_eq!(again.header("idempotency-replay-unavailable"), Some("body-not-stored"));
    assert_eq!(upstream.seen().len(), 1);
}

#[test]
fn keys_over_the_limit_are_refused_and_those_held_still_replay() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).flag("--max-keys", "2").start();
    for key in ["a", "b"] {
        assert_eq!(ask(gateway.address, post("/", key, "")).status, 201);
    }
    let refused = ask(gateway.address, post("/", "c", ""));
    assert_eq!((refused.status, refused.problem().as_str()), (503, "store-unavailable"));
    assert_eq!(ask(gateway.address, post("/", "a", "")).header("idempotency-replayed"), Some("true"));
    assert_eq!(ask(gateway.address, get("/", &[])).status, 201);
    assert_eq!(upstream.seen().len(), 3);
}
