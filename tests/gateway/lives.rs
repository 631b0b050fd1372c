//! The gateway's ends: killed, asked to end, started again.

use crate::client::{Client, ask, get, post};
use crate::process::Setup;
use crate::upstream::{Act, Gate, Upstream};
use std::net::TcpStream;

#[test]
fn answers_survive_a_kill() {
    let upstream = Upstream::counting();
    let mut gateway = Setup::new(&upstream).start();
    for number in 0..5 {
        assert_eq!(ask(gateway.address, post("/", &format!("k{number}"), "{}")).text(), format!("made {number}"));
        gateway = gateway.kill_and_restart();
        for before in 0..=number {
            let again = ask(gateway.address, post("/", &format!("k{before}"), "{}"));
            assert_eq!((again.text(), again.header("idempotency-replayed")), (format!("made {before}"), Some("true")));
        }
    }
    assert_eq!(upstream.seen().len(), 5);
}

#[test]
fn what_ran_at_a_kill_is_unknown_after_it() {
    let upstream = Upstream::start(|_| Act::SendAndHang(Vec::new()));
    let gateway = Setup::new(&upstream).start();
    let mut client = Client::connect(gateway.address);
    client.send(post("/", "k", "{}"));
    upstream.wait_for(1);
    let gateway = gateway.kill_and_restart();
    let answer = ask(gateway.address, post("/", "k", "{}"));
    assert_eq!((answer.status, answer.problem().as_str()), (409, "outcome-unknown"));
    assert_eq!(upstream.seen().len(), 1);
}

#[test]
fn asked_to_end_it_finishes_what_runs() {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = Upstream::start(move |_| Act::At(held.clone(), Vec::new(), Box::new(Act::answer(201, "made"))));
    let setup = Setup::new(&upstream);
    let gateway = setup.start();
    let (mut stays, mut leaves, mut idle) =
        (Client::connect(gateway.address), Client::connect(gateway.address), Client::connect(gateway.address));
    stays.send(post("/", "stays", "{}"));
    leaves.send(post("/", "leaves", "{}"));
    upstream.wait_for(2);
    drop(leaves);
    assert_eq!(ask(gateway.admin, get("/readyz", &[])).status, 200);
    gateway.term();
    while ask(gateway.admin, get("/readyz", &[])).status != 503 {
        std::thread::yield_now();
    }
    assert!(idle.is_closed());
    while TcpStream::connect(gateway.address).is_ok() {
        std::thread::yield_now();
    }
    gate.open();
    assert_eq!(stays.answer(false).text(), "made");
    let (status, log) = gateway.wait();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(log.contains("\"ended\""), "{log}");

    let gateway = setup.start();
    for key in ["stays", "leaves"] {
        assert_eq!(ask(gateway.address, post("/", key, "{}")).header("idempotency-replayed"), Some("true"), "{key}");
    }
    assert_eq!(upstream.seen().len(), 2);
}

#[test]
fn the_time_to_finish_is_limited_and_a_second_signal_ends_it_at_once() {
    for (drain, signals, code) in [("300ms", 1, 0), ("1h", 2, 1)] {
        let upstream = Upstream::start(|_| Act::SendAndHang(Vec::new()));
        let setup = Setup::new(&upstream).flag("--drain-timeout", drain);
        let mut gateway = setup.start();
        let mut client = Client::connect(gateway.address);
        client.send(post("/", "k", "{}"));
        upstream.wait_for(1);
        gateway.term();
        while signals == 2 && !gateway.has_ended() {
            gateway.term();
            std::thread::yield_now();
        }
        let (status, log) = gateway.wait();
        assert_eq!(status.code(), Some(code), "{log}");
        let answer = ask(setup.start().address, post("/", "k", "{}"));
        assert_eq!(answer.problem(), "outcome-unknown");
    }
}

#[test]
fn a_second_gateway_on_the_same_data_is_refused() {
    let upstream = Upstream::counting();
    let setup = Setup::new(&upstream);
    let _first = setup.start();
    let (code, _, error) = setup.refused();
    assert_eq!(code, 1);
    assert!(error.contains("another gateway uses it"), "{error}");
}
