//! Answers that take long to be made: followed by duplicates, left by clients, broken off.

use crate::client::{Answer, Client, ask, post};
use crate::herd;
use crate::process::{Gateway, Setup};
use crate::upstream::{Act, Gate, Upstream};
use http_body_util::BodyExt;

const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

fn event(number: usize) -> String {
    format!("id: {number}\ndata: token {number}\n\n")
}

fn chunk(event: &str) -> String {
    format!("{:x}\r\n{event}\r\n", event.len())
}

/// Server-sent events, each of which waits for its gate, and then an end.
fn events(gates: &[Gate], end: impl Fn() -> Act + Send + Sync + 'static) -> Upstream {
    let gates = gates.to_vec();
    Upstream::start(move |_| {
        let mut act = end();
        for (number, gate) in gates.iter().enumerate().rev() {
            let first = if number == 0 { HEAD.to_owned() } else { String::new() };
            act = Act::At(gate.clone(), (first + &chunk(&event(number))).into_bytes(), Box::new(act));
        }
        act
    })
}

fn end() -> Act {
    Act::Send(b"0\r\n\r\n".to_vec())
}

fn begin(gateway: &Gateway) -> (Client, Answer) {
    let mut client = Client::connect(gateway.address);
    client.send(post("/chat", "k", "{}"));
    let head = client.head().unwrap();
    assert_eq!((head.status, head.header("content-type")), (200, Some("text/event-stream")));
    (client, head)
}

/// Reads so many events, however they are cut into chunks.
fn read(client: &mut Client, events: std::ops::Range<usize>) {
    let wanted: String = events.map(event).collect();
    let mut text = String::new();
    while text.len() < wanted.len() {
        let chunk = client.chunk().expect("another chunk");
        assert!(!chunk.is_empty(), "it ends after {text}");
        text.push_str(str::from_utf8(&chunk).unwrap());
    }
    assert_eq!(text, wanted);
}

fn assert_ends(client: &mut Client) {
    assert_eq!(client.chunk().as_deref(), Some(&[][..]));
}

fn assert_broken(client: &mut Client) {
    assert_eq!(client.chunk(), None);
}

fn assert_unknown(gateway: &Gateway, upstream: &Upstream) {
    let answer = ask(gateway.address, post("/chat", "k", "{}"));
    assert_eq!((answer.status, answer.problem().as_str()), (409, "outcome-unknown"));
    assert_eq!(upstream.seen().len(), 1);
}

#[test]
fn a_duplicate_that_comes_in_the_middle_follows_from_the_beginning() {
    let gates = [(); 4].map(|()| Gate::default());
    let upstream = events(&gates, end);
    let gateway = Setup::new(&upstream).start();
    let (mut first, _) = begin(&gateway);
    read(&mut first, 0..1);
    gates[0].open();
    read(&mut first, 1..2);
    let (mut second, head) = begin(&gateway);
    assert_eq!(head.header("idempotency-replayed"), Some("true"));
    read(&mut second, 0..2);
    gates[1].open();
    for client in [&mut first, &mut second] {
        read(client, 2..3);
    }
    gates[2].open();
    gates[3].open();
    for client in [&mut first, &mut second] {
        read(client, 3..4);
        assert_ends(client);
    }
    let later = ask(gateway.address, post("/chat", "k", "{}"));
    assert_eq!(later.text(), (0..4).map(event).collect::<String>());
    assert_eq!(later.header("content-type"), Some("text/event-stream"));
    assert_eq!(upstream.seen().len(), 1);
}

#[test]
fn a_stream_goes_on_without_its_client() {
    let gates = [(); 3].map(|()| Gate::default());
    let upstream = events(&gates, end);
    let gateway = Setup::new(&upstream).start();
    let (mut first, _) = begin(&gateway);
    read(&mut first, 0..1);
    let (mut second, _) = begin(&gateway);
    read(&mut second, 0..1);
    drop(first);
    gates[0].open();
    read(&mut second, 1..2);
    drop(second);
    // Nobody follows it now.
    gates[1].open();
    gates[2].open();
    let (mut third, _) = begin(&gateway);
    read(&mut third, 0..3);
    assert_eq!(upstream.seen().len(), 1);
}

#[tokio::test]
async fn a_stream_that_breaks_off_is_broken_for_all_and_its_key_is_held() {
    let gates = [Gate::default()];
    let upstream = events(&gates, || Act::SendAndClose(Vec::new()));
    let gateway = Setup::new(&upstream).start();
    let (mut first, _) = begin(&gateway);
    read(&mut first, 0..1);
    let (mut second, _) = begin(&gateway);
    read(&mut second, 0..1);
    let mut third = herd::connect(gateway.address).await;
    let mut third = third.send_request(herd::keyed(gateway.address, "/chat", "k")).await.unwrap().into_body();
    assert_eq!(third.frame().await.unwrap().unwrap().into_data().unwrap(), event(0));
    gates[0].open();
    assert_broken(&mut first);
    assert_broken(&mut second);
    assert!(third.frame().await.unwrap().is_err());
    assert_unknown(&gateway, &upstream);
}

#[test]
fn a_gateway_that_is_killed_in_a_stream_breaks_it_for_all_and_its_key_is_held() {
    let gates = [Gate::default()];
    let upstream = events(&gates, end);
    let gateway = Setup::new(&upstream).start();
    let (mut first, _) = begin(&gateway);
    let (mut second, _) = begin(&gateway);
    read(&mut first, 0..1);
    read(&mut second, 0..1);
    let gateway = gateway.kill_and_restart();
    assert_broken(&mut first);
    assert_broken(&mut second);
    gates[0].open();
    assert_unknown(&gateway, &upstream);
}

#[test]
fn a_stream_over_the_cap_passes_as_a_whole_and_never_again() {
    let gates = [(); 3].map(|()| Gate::default());
    let upstream = events(&gates, end);
    let cap = event(0).len() + event(1).len() - 1;
    let gateway = Setup::new(&upstream).flag("--max-answer", &format!("{cap}B")).start();
    let (mut first, _) = begin(&gateway);
    let (mut second, _) = begin(&gateway);
    read(&mut second, 0..1);
    for (number, gate) in gates.iter().enumerate() {
        read(&mut first, number..number + 1);
        if number == 1 {
            // Its beginning is no longer there for another one.
            assert_eq!(ask(gateway.address, post("/chat", "k", "{}")).problem(), "in-flight");
        }
        gate.open();
    }
    assert_ends(&mut first);
    // The duplicate got it as well or was cut off, but never an end before the end.
    let mut text = event(0);
    let is_whole = loop {
        match second.chunk() {
            Some(chunk) if chunk.is_empty() => break true,
            Some(chunk) => text.push_str(str::from_utf8(&chunk).unwrap()),
            None => break false,
        }
    };
    let whole: String = (0..gates.len()).map(event).collect();
    assert!(if is_whole { text == whole } else { whole.starts_with(&text) }, "{text}");
    let later = ask(gateway.address, post("/chat", "k", "{}"));
    assert_eq!((later.status, later.text().as_str()), (200, ""));
    assert_eq!(later.header("idempotency-replay-unavailable"), Some("body-not-stored"));
    assert_eq!(upstream.seen().len(), 1);
}
