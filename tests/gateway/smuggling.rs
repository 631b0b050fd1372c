//! Requests whose end two servers could see in different places.

use crate::client::{Client, get, post};
use crate::process::Setup;
use crate::upstream::Upstream;

const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n";

#[test]
fn what_is_ambiguous_is_refused_and_the_connection_closed() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).start();
    let body = format!("0\r\n\r\n{SMUGGLED}");
    for fields in [
        "content-length: 5\r\ntransfer-encoding: chunked",
        "transfer-encoding: chunked\r\ncontent-length: 5",
        "Transfer-Encoding: chunked\r\nx: y\r\nContent-Length: 0",
        "content-length: 5\r\ntransfer-encoding: identity",
        "content-length: 5\r\ncontent-length: 6",
        "content-length: 5, 6",
        "content-length: +5",
        "content-length: -1",
        "content-length: 0x5",
        "content-length: 99999999999999999999",
        "content-length: 5 5",
        "content-length:",
        "transfer-encoding: gzip, chunked",
        "transfer-encoding: chunked, gzip",
        "transfer-encoding: chunked\r\ntransfer-encoding: chunked",
        "transfer-encoding: chunked, chunked",
        "transfer-encoding: xchunked",
        "transfer-encoding: \"chunked\"",
        "transfer-encoding : chunked",
        " transfer-encoding: chunked",
        "transfer-encoding:\u{b}chunked",
        "content-length\0: 5",
        "x: y\r\n transfer-encoding: chunked",
        "x: y\0",
    ] {
        let mut client = Client::connect(gateway.address);
        client.send(format!("POST / HTTP/1.1\r\nhost: a\r\n{fields}\r\n\r\n{body}"));
        let answer = client.answer(false);
        assert_eq!(answer.status, 400, "{fields:?}");
        assert!(client.is_closed(), "{fields:?}");
    }
    assert!(upstream.seen().is_empty(), "{:?}", upstream.seen());
}

#[test]
fn an_ambiguous_request_is_refused_wherever_it_comes_in_a_connection() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).start();
    let bad = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n";
    let chunked = "PUT / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nx: y\r\n\r\n";
    let mut client = Client::connect(gateway.address);
    client.send(format!("{}{}{chunked}{bad}{SMUGGLED}", get("/", &[]), post("/", "k", bad)));
    let statuses = [(); 4].map(|()| client.answer(false).status);
    assert_eq!(statuses, [201, 201, 201, 400]);
    assert!(client.is_closed());
    assert_eq!(upstream.seen().len(), 3);
    assert_eq!(upstream.seen()[1].body, bad.as_bytes());
}

#[test]
fn hosts_and_versions_that_no_server_should_take_are_refused() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).start();
    for request in [
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n",
        "POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET / HTTP/9.9\r\nhost: a\r\n\r\n",
        "GET /a b HTTP/1.1\r\nhost: a\r\n\r\n",
        "GET\r\n\r\n",
        "GET http://user:secret@a/ HTTP/1.1\r\nhost: a\r\n\r\n",
        "GET http://user@a/ HTTP/1.1\r\nhost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: user:secret@a\r\n\r\n",
    ] {
        let mut client = Client::connect(gateway.address);
        client.send(request);
        assert_eq!(client.answer(false).status, 400, "{request:?}");
        assert!(client.is_closed(), "{request:?}");
    }
    assert!(upstream.seen().is_empty());
    let mut client = Client::connect(gateway.address);
    assert_eq!(client.ask("GET / HTTP/1.0\r\n\r\n").status, 201);
}
