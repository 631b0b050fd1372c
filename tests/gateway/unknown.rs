//! An upstream that gives no answer: what becomes of the key.

use crate::client::{Client, ask, post, post_with};
use crate::process::{Gateway, Setup};
use crate::upstream::{Act, Upstream, answer};
use std::net::TcpListener;

/// Expects the key to be held, and the service not to be asked again.
fn assert_held(gateway: &Gateway, upstream: &Upstream) {
    let requests = upstream.seen().len();
    let answer = ask(gateway.address, post("/", "k", "{}"));
    assert_eq!((answer.status, answer.problem().as_str()), (409, "outcome-unknown"));
    assert_eq!(upstream.seen().len(), requests);
    // A key in that state is not for another request either.
    assert_eq!(ask(gateway.address, post("/", "k", "{\"other\": 1}")).status, 422);
}

#[test]
fn a_connection_that_is_lost_leaves_the_key_held() {
    for sent in ["", "HTTP/1.1 200", "no http at all\r\n\r\n"] {
        let upstream = Upstream::start(|_| Act::SendAndClose(sent.into()));
        let gateway = Setup::new(&upstream).start();
        let answer = ask(gateway.address, post("/", "k", "{}"));
        assert_eq!((answer.status, answer.problem().as_str()), (502, "upstream-lost"), "{sent:?}");
        assert_eq!(answer.header("idempotency-problem"), Some("urn:oncekey:problem:upstream-lost"));
        assert_held(&gateway, &upstream);
        assert_eq!(upstream.seen().len(), 1, "{sent:?}");
        gateway.wait_for_log("its key is held");
    }
}

#[test]
fn an_answer_with_more_headers_than_can_be_read_leaves_the_key_held() {
    let answer = |fields: usize| {
        let fields: String = (0..fields).map(|number| format!("x-{number}: 1\r\n")).collect();
        format!("HTTP/1.1 200 Fine\r\n{fields}content-length: 0\r\n\r\n").into_bytes()
    };
    let upstream = Upstream::start(move |seen| Act::Send(answer(if seen.target == "/fits" { 99 } else { 100 })));
    let gateway = Setup::new(&upstream).start();
    assert_eq!(ask(gateway.address, post("/fits", "k", "{}")).status, 200);
    let lost = ask(gateway.address, post("/", "k", "{}"));
    assert_eq!((lost.status, lost.problem().as_str()), (502, "upstream-lost"));
    assert_held(&gateway, &upstream);
}

#[test]
fn an_answer_in_an_encoding_that_was_not_asked_for_leaves_the_key_held() {
    let chunk = "2\r\nok\r\n0\r\n\r\n";
    for encoding in ["gzip, chunked", "gzip", "chunked, gzip", "chunked, chunked", "identity", "xchunked"] {
        let sent = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: {encoding}\r\n\r\n{chunk}");
        let upstream = Upstream::start(move |_| Act::SendAndClose(sent.clone().into()));
        let gateway = Setup::new(&upstream).start();
        for request in [post("/", "k", "{}"), post_with("/", &[], "{}")] {
            let answer = ask(gateway.address, request);
            assert_eq!((answer.status, answer.problem().as_str()), (502, "upstream-lost"), "{encoding}");
        }
        assert_held(&gateway, &upstream);
    }
    let sent = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n{chunk}");
    let upstream = Upstream::start(move |_| Act::Send(sent.clone().into()));
    let gateway = Setup::new(&upstream).start();
    assert_eq!(ask(gateway.address, post("/", "k", "{}")).text(), "ok");
}

#[test]
fn an_upstream_that_is_silent_for_too_long_leaves_the_key_held() {
    let upstream = Upstream::start(|_| Act::SendAndHang(Vec::new()));
    let gateway = Setup::new(&upstream).flag("--answer-timeout", "300ms").flag("--connect-timeout", "200ms").start();
    let answer = ask(gateway.address, post("/", "k", "{}"));
    assert_eq!((answer.status, answer.problem().as_str()), (504, "upstream-timeout"));
    assert_held(&gateway, &upstream);
}

#[test]
fn another_gateways_word_leaves_the_key_held() {
    for status in [502, 504] {
        let upstream = Upstream::start(move |_| Act::answer(status, "from behind"));
        let gateway = Setup::new(&upstream).start();
        let answer = ask(gateway.address, post("/", "k", "{}"));
        assert_eq!((answer.status, answer.text().as_str()), (status, "from behind"));
        assert_held(&gateway, &upstream);
    }
}

#[test]
fn an_answer_that_breaks_off_or_stands_still_leaves_the_key_held() {
    let half = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf".to_vec();
    let chunk = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n".to_vec();
    let acts: [fn(Vec<u8>) -> Act; 2] = [Act::SendAndClose, Act::SendAndHang];
    for act in acts {
        for bytes in [half.clone(), chunk.clone()] {
            let upstream = Upstream::start(move |_| act(bytes.clone()));
            let gateway = Setup::new(&upstream).flag("--idle-timeout", "300ms").start();
            let mut client = Client::connect(gateway.address);
            client.send(post("/", "k", "{}"));
            // Where the answer breaks off at once, hyper closes the connection with what it hasn't sent yet.
            if let Some(answer) = client.try_answer(false) {
                assert!(answer.status == 200 && b"half".starts_with(&answer.body) && !answer.is_whole, "{answer:?}");
            }
            assert_held(&gateway, &upstream);
        }
    }
}

#[test]
fn a_key_may_be_told_to_run_again() {
    let upstream = Upstream::start(|seen| match seen.number {
        0 => Act::SendAndClose(Vec::new()),
        _ => Act::answer(201, "made"),
    });
    let gateway = Setup::new(&upstream).file("[policy]\ninterrupted = \"rerun\"\n").start();
    assert_eq!(ask(gateway.address, post("/", "k", "{}")).status, 502);
    assert_eq!(ask(gateway.address, post("/", "k", "{}")).text(), "made");
    assert_eq!(upstream.seen()[1].header("idempotency-attempt"), Some("2"));
}

#[test]
fn an_upstream_that_is_not_there_frees_the_key() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let gateway = Setup::for_url(&format!("http://{address}")).start();
    for _ in 0..2 {
        let answer = ask(gateway.address, post("/", "k", "{}"));
        assert_eq!((answer.status, answer.problem().as_str()), (502, "upstream-unreachable"));
    }
    let upstream = Upstream::on(address, |_| Act::answer(201, "made"));
    assert_eq!(ask(gateway.address, post("/", "k", "{}")).text(), "made");
    assert_eq!(upstream.seen().len(), 1);
}

#[test]
fn an_answer_that_says_it_was_not_done_frees_the_key() {
    let upstream = Upstream::start(|seen| match seen.number {
        0 => Act::Send(answer(503, &[("retry-after", "1")], "busy")),
        1 => Act::answer(429, "slow down"),
        2 => Act::answer(404, "no such order"),
        _ => Act::answer(201, "made"),
    });
    let gateway = Setup::new(&upstream).start();
    let statuses = [(); 4].map(|()| ask(gateway.address, post("/", "k", "{}")).status);
    assert_eq!(statuses, [503, 429, 404, 404]);
}

#[test]
fn a_pooled_connection_that_the_upstream_closed_is_no_lost_request() {
    let upstream = Upstream::start(|seen| Act::SendAndClose(answer(201, &[], &format!("made {}", seen.number))));
    let gateway = Setup::new(&upstream).start();
    for number in 0..20 {
        let answer = ask(gateway.address, post("/", &format!("k{number}"), "{}"));
        // Closed in the very moment that a request is written, it may be lost: never is it sent twice.
        assert!(answer.status == 201 || answer.problem() == "upstream-lost", "{answer:?}");
    }
    assert!(upstream.seen().len() <= 20);
}

#[test]
fn without_a_key_nothing_is_held() {
    let upstream =
        Upstream::start(|seen| if seen.number == 0 { Act::SendAndClose(Vec::new()) } else { Act::answer(200, "x") });
    let gateway = Setup::new(&upstream).start();
    assert_eq!(ask(gateway.address, post_with("/", &[], "{}")).problem(), "upstream-lost");
    assert_eq!(ask(gateway.address, post_with("/", &[], "{}")).status, 200);
}
