//! HTTP/2 of clients that mean no good: frames written by hand.

use crate::client::{Client, ask, get, post, post_with};
use crate::process::{Gateway, Setup};
use crate::upstream::{Act, Upstream};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const CANCEL: [u8; 4] = [0, 0, 0, 8];

struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let len = (payload.len() as u32).to_be_bytes();
    [&len[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A field as HPACK writes it without its tables; all names and values here are short.
fn field(name: &str, value: &[u8]) -> Vec<u8> {
    let len = |len: usize| u8::try_from(len).ok().filter(|len| *len < 127).unwrap();
    [&[0, len(name.len())], name.as_bytes(), &[len(value.len())], value].concat()
}

/// The head of a POST with a key, and further fields.
fn head(path: &str, key: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let fields =
        [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "a"), ("idempotency-key", key)];
    fields.iter().chain(more).flat_map(|(name, value)| field(name, value.as_bytes())).collect()
}

/// A connection on which nothing but the beginning was said.
fn connect(gateway: &Gateway) -> Client {
    let mut client = Client::connect(gateway.address);
    client.send([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(SETTINGS, 0, 0, &[])].concat());
    client
}

fn read(client: &mut Client) -> Option<Frame> {
    let head = client.bytes(9);
    let head: [u8; 9] = head.try_into().ok()?;
    let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
    let payload = client.bytes(len);
    let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
    (payload.len() == len).then_some(Frame { kind: head[3], flags: head[4], stream, payload })
}

/// How a stream ends.
#[derive(Debug, PartialEq)]
enum End {
    /// Answered; the status may be written in more than one way, so it is left out.
    Answered,
    Reset,
    /// With its connection.
    Closed,
}

fn end_of(client: &mut Client, stream: u32) -> End {
    loop {
        match read(client) {
            None | Some(Frame { kind: GOAWAY, .. }) => return End::Closed,
            Some(Frame { kind: RST_STREAM, stream: of, .. }) if of == stream => return End::Reset,
            Some(Frame { kind: HEADERS | DATA, flags, stream: of, .. }) if of == stream && flags & END_STREAM != 0 => {
                return End::Answered;
            }
            Some(_) => {}
        }
    }
}

#[test]
fn what_would_be_two_requests_over_http_1_is_none() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).start();
    let mut client = connect(&gateway);
    client.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, &head("/", "plain", &[])));
    assert_eq!(end_of(&mut client, 1), End::Answered);
    assert_eq!(upstream.seen().len(), 1);
    for (path, more) in [
        ("/", ("x", "y\r\nidempotency-key: z")),
        ("/", ("x", "y\ntransfer-encoding: chunked")),
        ("/", ("x", "y\0")),
        ("/", ("x\r\ny", "z")),
        ("/", ("x: y", "z")),
        ("/", ("X-Upper", "z")),
        ("/", ("transfer-encoding", "chunked")),
        ("/", ("connection", "idempotency-key")),
        ("/", ("content-length", "5")),
        ("/", ("content-length", "+0")),
        ("/", (":path", "/second")),
        ("/a HTTP/1.1\r\nhost: b\r\n\r\nGET /smuggled", ("x", "y")),
        ("/a b", ("x", "y")),
        ("/a\tb", ("x", "y")),
        ("", ("x", "y")),
    ] {
        let mut client = connect(&gateway);
        client.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, &head(path, "bad", &[more])));
        let end = end_of(&mut client, 1);
        assert!(end != End::Answered || upstream.seen().len() == 1, "{path:?} {more:?}: {:?}", upstream.seen());
    }
    // More or less of a body than was said.
    for body in ["abcd", "abcdef"] {
        let mut client = connect(&gateway);
        client.send(frame(HEADERS, END_HEADERS, 1, &head("/", "bad", &[("content-length", "5")])));
        client.send(frame(DATA, END_STREAM, 1, body.as_bytes()));
        end_of(&mut client, 1);
    }
    assert_eq!(upstream.seen().len(), 1);
    assert_eq!(gateway.metric("oncekey_http_store_keys"), 1);
    assert_eq!(ask(gateway.address, post("/", "bad", "fine")).text(), "made 1");
}

#[test]
fn a_burst_of_requests_taken_back_at_once_ends_its_connection() {
    const BURST: u32 = 2000;
    let upstream = Upstream::start(|_| Act::answer(201, "made"));
    let gateway = Setup::new(&upstream).start();
    let before = gateway.memory_mib();
    let mut client = connect(&gateway);
    let mut burst = Vec::new();
    for number in 0..BURST {
        let stream = 2 * number + 1;
        burst.extend(frame(HEADERS, END_HEADERS | END_STREAM, stream, &head("/", &format!("k-{number}"), &[])));
        burst.extend(frame(RST_STREAM, 0, stream, &CANCEL));
    }
    // It may end before all is sent.
    client.try_send(&burst).ok();
    let mut why = None;
    while let Some(frame) = read(&mut client) {
        if frame.kind == GOAWAY {
            why = Some(frame.payload[4..8].to_vec());
        }
    }
    assert_eq!(why.as_deref(), Some(&[0, 0, 0, 11][..]), "it is told to be calm");
    assert!(gateway.memory_mib() < before + 32, "{} MiB after {before}", gateway.memory_mib());
    assert_eq!(ask(gateway.address, get("/", &[])).status, 201);
    // Those that came through to the service did so once.
    let mut keys: Vec<_> =
        upstream.seen().iter().filter_map(|seen| seen.header("idempotency-key").map(str::to_owned)).collect();
    let all = keys.len();
    keys.sort();
    keys.dedup();
    assert!(keys.len() == all && all < BURST as usize / 2, "{all} of {BURST} ran");
}

#[test]
fn a_head_without_end_ends_its_connection() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).start();
    let before = gateway.memory_mib();
    let mut client = connect(&gateway);
    client.send(frame(HEADERS, END_STREAM, 1, &head("/", "k", &[])));
    let more = field("x", &[b'y'; 100]).repeat(100);
    let is_ended = (0..10_000).any(|_| client.try_send(frame(CONTINUATION, 0, 1, &more)).is_err());
    assert!(is_ended, "100 MiB of head are taken");
    assert!(gateway.memory_mib() < before + 16, "{} MiB after {before}", gateway.memory_mib());
    assert!(upstream.seen().is_empty());
}

#[test]
fn a_request_taken_back_while_it_runs_keeps_its_answer() {
    let gate = crate::upstream::Gate::default();
    let held = gate.clone();
    let upstream = Upstream::start(move |_| Act::At(held.clone(), Vec::new(), Box::new(Act::answer(201, "made"))));
    let gateway = Setup::new(&upstream).file("[policy]\nwait = \"20s\"\n").start();
    let mut client = connect(&gateway);
    client.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, &head("/", "k", &[])));
    upstream.wait_for(1);
    client.send(frame(RST_STREAM, 0, 1, &CANCEL));
    client.send(frame(HEADERS, END_HEADERS | END_STREAM, 3, &head("/", "k", &[])));
    gate.open();
    assert_eq!(end_of(&mut client, 3), End::Answered);
    assert_eq!(ask(gateway.address, post("/", "k", "")).header("idempotency-replayed"), Some("true"));
    assert_eq!(upstream.seen().len(), 1);
}

#[test]
fn slow_bodies_over_the_bound_are_refused_and_make_way_when_they_leave() {
    const PIECE: usize = 16 * 1024;
    const BOUND: usize = 64;
    const CONNECTIONS: usize = 16;
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).flag("--max-buffered", "1MiB").start();
    let held = || gateway.metric("oncekey_http_buffered_bytes") as usize;
    // Twice as many as fit.
    let begin = |client: &mut Client, connection: usize, more: &[(&str, &str)]| {
        for number in 0..(2 * BOUND / CONNECTIONS) as u32 {
            let key = format!("slow-{connection}-{number}");
            client.send(frame(HEADERS, END_HEADERS, 2 * number + 1, &head("/", &key, more)));
        }
    };
    let mut silent: Vec<_> = (0..CONNECTIONS).map(|_| connect(&gateway)).collect();
    for (connection, client) in silent.iter_mut().enumerate() {
        begin(client, connection, &[("content-length", "1000000")]);
    }
    // What is only announced takes nothing.
    assert_eq!(ask(gateway.address, post("/", "before", "{}")).status, 201);
    assert_eq!(held(), 0);
    let mut slow: Vec<_> = (0..CONNECTIONS).map(|_| connect(&gateway)).collect();
    for (connection, client) in slow.iter_mut().enumerate() {
        // Until then it may not send as much.
        while read(client).is_some_and(|frame| frame.kind != WINDOW_UPDATE) {}
        begin(client, connection, &[]);
        for number in 0..(2 * BOUND / CONNECTIONS) as u32 {
            client.send(frame(DATA, 0, 2 * number + 1, &[b'x'; PIECE]));
        }
    }
    while gateway.metric("oncekey_http_events_total{kind=\"unavailable\"}") < BOUND as u64 {
        std::thread::yield_now();
    }
    assert_eq!(held(), BOUND * PIECE);
    let refused = ask(gateway.address, post("/", "k", "{}"));
    assert_eq!((refused.status, refused.problem().as_str()), (503, "too-much-buffered"));
    assert_eq!(refused.header("retry-after"), Some("1"));
    // What is not held passes.
    assert_eq!(ask(gateway.address, post("/", "empty", "")).status, 201);
    assert_eq!(ask(gateway.address, post_with("/", &[], "{}")).status, 201);
    assert_eq!((gateway.metric("oncekey_http_store_keys"), upstream.seen().len()), (2, 3));
    drop((silent, slow));
    while held() > 0 {
        std::thread::yield_now();
    }
    assert_eq!(ask(gateway.address, post("/", "k", "{}")).text(), "made 3");
}
