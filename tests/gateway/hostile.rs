//! Clients that break rules of HTTP/1.1, stop in the middle, or want more than their share.

use crate::client::{Answer, Client, ask, get, post, post_with};
use crate::process::{Gateway, Setup};
use crate::upstream::{Act, Upstream, answer};
use std::io;
use std::thread;

/// A POST with a key and whatever framing a test gives it.
fn head(key: &str, framing: &str) -> String {
    format!("POST /pay HTTP/1.1\r\nhost: a\r\nidempotency-key: {key}\r\n{framing}\r\n\r\n")
}

/// Expects nothing to be known of a key, and that it can be used for anything.
fn assert_free(gateway: &Gateway, key: &str) {
    let answer = ask(gateway.address, post("/pay", key, &format!("another body for {key}")));
    assert_eq!((answer.status, answer.header("idempotency-replayed")), (201, None), "{key}");
}

/// Sends without end until the other side has heard enough; what it says at last, if that arrives.
fn pour(gateway: &Gateway, head: &str, piece: &[u8]) -> Option<Answer> {
    let mut client = Client::connect(gateway.address);
    client.send(head);
    // Far more than any limit: if all of it is taken, there is none.
    let error = (0..256 << 20 >> piece.len().ilog2()).find_map(|_| client.try_send(piece).err());
    let kind = error.expect("it is all taken").kind();
    assert!(matches!(kind, io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset), "{kind}");
    client.try_answer(false)
}

#[test]
fn a_body_that_ends_early_leaves_the_key_free() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).flag("--body-timeout", "300ms").start();
    let bodies = [
        ("content-length: 10", "abc"),
        ("content-length: 10", ""),
        ("transfer-encoding: chunked", ""),
        ("transfer-encoding: chunked", "5\r\nab"),
        ("transfer-encoding: chunked", "2\r\nab\r\n"),
        ("transfer-encoding: chunked", "2\r\nab\r\n0\r\n"),
        ("transfer-encoding: chunked", "2\r\nab\r\n0\r\nx-sum: 1\r\n"),
    ];
    for (number, (framing, body)) in bodies.into_iter().enumerate() {
        let key = |end: &str| format!("{end}-{number}");
        // Says that it is at its end.
        let mut client = Client::connect(gateway.address);
        client.send(head(&key("finished"), framing) + body);
        client.finish();
        if let Some(answer) = client.try_answer(false) {
            assert_eq!((answer.status, answer.problem().as_str()), (400, "body-incomplete"), "{framing} {body:?}");
        }
        assert!(client.is_closed());
        // Is gone.
        let mut client = Client::connect(gateway.address);
        client.send(head(&key("gone"), framing) + body);
        drop(client);
        // Says no more.
        let mut client = Client::connect(gateway.address);
        client.send(head(&key("silent"), framing) + body);
        let answer = client.answer(false);
        assert_eq!((answer.status, answer.problem().as_str()), (408, "body-timeout"), "{framing} {body:?}");
        assert!(client.is_closed());
        assert!(upstream.seen().is_empty(), "{framing} {body:?}: {:?}", upstream.seen());
    }
    assert_eq!(gateway.metric("oncekey_http_store_keys"), 0);
    for number in 0..bodies.len() {
        for end in ["finished", "gone", "silent"] {
            assert_free(&gateway, &format!("{end}-{number}"));
        }
    }
}

#[test]
fn a_body_that_trickles_in_is_given_up_though_it_moves() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).flag("--body-timeout", "300ms").start();
    let mut client = Client::connect(gateway.address);
    client.send(head("k", "content-length: 1000000000"));
    drop(client);
    let mut client = Client::connect(gateway.address);
    client.send(head("k", "transfer-encoding: chunked"));
    // Each moves it on, and none ends it.
    let error = (0..u64::MAX).find_map(|_| {
        thread::yield_now();
        client.try_send("1\r\na\r\n").err()
    });
    assert!(error.is_some());
    assert_eq!(gateway.metric("oncekey_http_events_total{kind=\"invalid\"}"), 2);
    assert!(upstream.seen().is_empty());
    assert_free(&gateway, "k");
}

#[test]
fn a_body_without_end_is_refused_at_the_limit() {
    let upstream = Upstream::counting();
    // A million chunks take their time.
    let gateway = Setup::new(&upstream).flag("--body-timeout", "2m").start();
    let before = gateway.memory_mib();
    let chunk = format!("{:x}\r\n{}\r\n", 65_536, "x".repeat(65_536));
    let sized = "x".repeat(65_536);
    for (framing, piece) in [
        ("transfer-encoding: chunked", chunk.as_str()),
        ("transfer-encoding: chunked", "1\r\nx\r\n"),
        ("content-length: 1048577", &sized),
        ("content-length: 18446744073709551615", &sized),
    ] {
        // The answer may be lost where the connection is reset.
        if let Some(answer) = pour(&gateway, &head("k", framing), piece.as_bytes()) {
            assert_eq!(answer.status, if framing.ends_with("615") { 431 } else { 413 }, "{framing}");
        }
    }
    // Said before anything is sent, the answer is sure to arrive.
    let answer = ask(gateway.address, head("k", "content-length: 1048577"));
    assert_eq!((answer.status, answer.problem().as_str()), (413, "body-too-large"));
    assert!(upstream.seen().is_empty());
    assert!(gateway.memory_mib() < before + 32, "{} MiB after {before}", gateway.memory_mib());
    assert_free(&gateway, "k");
}

#[test]
fn chunks_that_claim_an_absurd_size_or_none_are_refused() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).flag("--body-timeout", "1s").start();
    let before = gateway.memory_mib();
    for size in [
        "10000000000000000",
        "fffffffffffffffff",
        "ffffffffffffffff",
        "7fffffffffffffff",
        "80000000",
        "-1",
        "+1",
        "0x1",
        " 1",
        "1 2",
        "g",
        "",
        "1\n",
        "1;a=\n",
        "1\r",
    ] {
        let mut client = Client::connect(gateway.address);
        client.send(head("k", "transfer-encoding: chunked") + size + "\r\nxx\r\n0\r\n\r\n");
        // Some end the connection in the middle of the body, for which there is no answer.
        if let Some(answer) = client.try_answer(false) {
            assert!([400, 408, 413].contains(&answer.status), "{size:?}: {answer:?}");
        }
        assert!(client.is_closed(), "{size:?}");
        assert!(upstream.seen().is_empty(), "{size:?}: {:?}", upstream.seen());
    }
    let mut client = Client::connect(gateway.address);
    client.send(head("k", "transfer-encoding: chunked") + "1;" + &"x".repeat(100_000));
    assert!(client.try_answer(false).is_none_or(|answer| [400, 408].contains(&answer.status)));
    assert!(gateway.memory_mib() < before + 32, "{} MiB after {before}", gateway.memory_mib());
    assert_free(&gateway, "k");
}

#[test]
fn two_requests_with_one_key_in_one_piece_run_once_and_are_answered_in_order() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).start();
    let mut client = Client::connect(gateway.address);
    let chunked = head("k", "transfer-encoding: chunked") + "2\r\n{}\r\n0\r\n\r\n";
    let other = post("/pay", "other", "{}");
    client.send(format!("{}{}{other}{}{chunked}", post("/pay", "k", "{}"), post("/pay", "k", "{}"), get("/", &[])));
    let answers = [(); 5].map(|()| client.answer(false));
    let told = answers.each_ref().map(|answer| (answer.text(), answer.header("idempotency-replayed").is_some()));
    let told = told.each_ref().map(|(text, is_replayed)| (text.as_str(), *is_replayed));
    assert_eq!(told, [("made 0", false), ("made 0", true), ("made 1", false), ("made 2", false), ("made 0", true)]);
    // Byte by byte it is the same.
    let mut client = Client::connect(gateway.address);
    (post("/pay", "k", "{}") + &chunked).as_bytes().chunks(1).for_each(|byte| client.send(byte));
    assert_eq!([(); 2].map(|()| client.answer(false).text()), ["made 0", "made 0"]);
    assert_eq!(upstream.seen().len(), 3);
}

#[test]
fn bytes_that_are_no_utf_8_are_refused_in_keys_and_targets_and_pass_in_other_fields() {
    let upstream = Upstream::start(|_| {
        Act::Send(b"HTTP/1.1 201 Made\r\nx-name: \xe9\xff\r\ncontent-length: 2\r\n\r\nok".to_vec())
    });
    let gateway = Setup::new(&upstream).start();
    let with = |before: &str, bytes: &[u8], after: &str| [before.as_bytes(), bytes, after.as_bytes()].concat();
    for bytes in [&b"\xff"[..], b"\xc3\x28", b"\xe2\x82", b"k\x80", "k\u{fc}".as_bytes(), b"\"\xff\""] {
        let request =
            with("POST /pay HTTP/1.1\r\nhost: a\r\nidempotency-key: ", bytes, "\r\ncontent-length: 0\r\n\r\n");
        let answer = ask(gateway.address, request);
        assert_eq!((answer.status, answer.problem().as_str()), (400, "key-invalid"), "{bytes:?}");
    }
    for bytes in [&b"\xff"[..], b"\xc3\x28", b"?\xe2\x82"] {
        let request = with("POST /", bytes, " HTTP/1.1\r\nhost: a\r\nidempotency-key: k\r\ncontent-length: 0\r\n\r\n");
        assert_eq!(ask(gateway.address, request).status, 400, "{bytes:?}");
    }
    assert!(upstream.seen().is_empty());
    let request = with(
        "POST /pay HTTP/1.1\r\nhost: a\r\nidempotency-key: k\r\nx-name: ",
        b"\xe9\xff",
        "\r\ncontent-length: 0\r\n\r\n",
    );
    for is_again in [false, true] {
        let answer = ask(gateway.address, &request);
        assert_eq!((answer.status, answer.header("x-name")), (201, Some("\u{e9}\u{ff}")));
        assert_eq!(answer.header("idempotency-replayed").is_some(), is_again);
    }
    assert_eq!(upstream.seen()[0].header("x-name"), Some("\u{e9}\u{ff}"));
    assert_eq!(upstream.seen().len(), 1);
}

#[test]
fn line_ends_that_servers_read_differently_make_no_second_request() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).start();
    // A line feed alone ends a line, as RFC 9112 allows; the service gets it with both characters.
    let mut client = Client::connect(gateway.address);
    client.send("POST /pay HTTP/1.1\nhost: a\nidempotency-key: k\ncontent-length: 2\n\n{}");
    assert_eq!(client.answer(false).text(), "made 0");
    let seen = upstream.seen();
    assert_eq!((seen[0].header("idempotency-key"), seen[0].body.as_slice()), (Some("k"), &b"{}"[..]));
    for request in [
        "POST /pay HTTP/1.1\r\nhost: a\r\nx: y\rtransfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n{}",
        "POST /pay HTTP/1.1\rhost: a\rcontent-length: 2\r\r{}",
        "POST /pay HTTP/1.1\r\nhost: a\r\nx: y\r\n\tz\r\ncontent-length: 2\r\n\r\n{}",
        "POST /pay HTTP/1.1\r\nhost: a\r\ncontent-length\r\n: 2\r\n\r\n{}",
        "POST /pay HTTP/1.1\r\nhost: a\r\nidempotency-key: a\0b\r\ncontent-length: 2\r\n\r\n{}",
        "POST /pay\0 HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}",
        "POST  /pay HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}",
        "POST /pay HTTP/1.1 \r\nhost: a\r\ncontent-length: 2\r\n\r\n{}",
        "POST /pay http/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}",
    ] {
        let mut client = Client::connect(gateway.address);
        client.send(request);
        assert_eq!(client.answer(false).status, 400, "{request:?}");
        assert!(client.is_closed(), "{request:?}");
    }
    assert_eq!(upstream.seen().len(), 1);
}

#[test]
fn lengths_that_say_the_same_twice_are_one_length_or_none() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).start();
    for (number, fields) in
        ["content-length: 2\r\ncontent-length: 2", "content-length: 2, 2", "content-length: 02"].into_iter().enumerate()
    {
        let answer = ask(gateway.address, head(&format!("k{number}"), fields) + "{}");
        assert!([201, 400].contains(&answer.status), "{fields}: {answer:?}");
    }
    for seen in upstream.seen() {
        let lengths: Vec<_> = seen.headers.iter().filter(|(name, _)| name == "content-length").collect();
        assert_eq!((lengths.len(), seen.body.as_slice()), (1, &b"{}"[..]), "{seen:?}");
        assert_eq!(lengths[0].1, "2", "{seen:?}");
    }
}

#[test]
fn whom_a_request_asks_for_changes_neither_where_it_goes_nor_its_key() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).start();
    let target = |target: &str, host: &str| {
        format!("POST {target} HTTP/1.1\r\nhost: {host}\r\nidempotency-key: k\r\ncontent-length: 2\r\n\r\n{{}}")
    };
    let first = ask(gateway.address, target("/pay?a=1", "evil.example"));
    assert_eq!(first.text(), "made 0");
    for request in [
        target("http://other.example/pay?a=1", "shop.example"),
        target("https://other.example:9/pay?a=1", "other.example:9"),
        target("/pay?a=1", "shop.example"),
    ] {
        let answer = ask(gateway.address, &request);
        assert_eq!(
            (answer.text().as_str(), answer.header("idempotency-replayed")),
            ("made 0", Some("true")),
            "{request}"
        );
    }
    let seen = upstream.seen();
    assert_eq!((seen.len(), seen[0].target.as_str()), (1, "/pay?a=1"));
    let own = upstream.address.to_string();
    assert_eq!(
        (seen[0].header("host"), seen[0].header("x-forwarded-host")),
        (Some(own.as_str()), Some("evil.example"))
    );
    // What the target says of the host wins, as RFC 9112 has it.
    ask(gateway.address, "GET http://said.example/a HTTP/1.1\r\nhost: other.example\r\n\r\n");
    let seen = &upstream.seen()[1];
    assert_eq!((seen.target.as_str(), seen.header("host")), ("/a", Some(own.as_str())));
    assert_eq!(seen.header("x-forwarded-host"), Some("said.example"));
}

#[test]
fn methods_that_no_key_belongs_to_are_not_run_under_one() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).start();
    for method in ["TRACE", "PURGE", "DELETE"] {
        for _ in 0..2 {
            let request = format!("{method} /a HTTP/1.1\r\nhost: a\r\nidempotency-key: k\r\ncookie: secret\r\n\r\n");
            assert_eq!(ask(gateway.address, request).header("idempotency-replayed"), None, "{method}");
        }
    }
    for target in ["example.com:443", "/pay", "*"] {
        let request = format!("CONNECT {target} HTTP/1.1\r\nhost: a\r\n\r\n");
        assert!([400, 501].contains(&ask(gateway.address, request).status), "{target}");
    }
    for request in ["POST * HTTP/1.1", "POST pay HTTP/1.1", "POST example.com:443 HTTP/1.1"] {
        assert_eq!(
            ask(gateway.address, format!("{request}\r\nhost: a\r\ncontent-length: 0\r\n\r\n")).status,
            400,
            "{request}"
        );
    }
    assert_eq!(gateway.metric("oncekey_http_store_keys"), 0);
    assert!(upstream.seen().iter().all(|seen| seen.method != "CONNECT" && seen.method != "POST"));
}

#[test]
fn clients_that_never_read_cost_no_memory_without_end() {
    const BODY: usize = 8 << 20;
    let body = "x".repeat(BODY);
    let upstream = Upstream::start(move |_| Act::Send(answer(201, &[], &body)));
    let gateway = Setup::new(&upstream).start();
    let before = gateway.memory_mib();
    let deaf: Vec<_> = (0..32)
        .map(|number| {
            let mut client = Client::connect(gateway.address);
            let key = format!("deaf-{number}");
            client.send(if number % 2 == 0 { post("/", &key, "") } else { post_with("/", &[], "") });
            client
        })
        .collect();
    upstream.wait_for(deaf.len());
    // While another one reads all of several, as much has come for them as ever will.
    for _ in 0..4 {
        assert_eq!(ask(gateway.address, post_with("/", &[], "")).body.len(), BODY);
    }
    let held = gateway.memory_mib() - before;
    // The bodies together are 256 MiB.
    assert!(held < 96, "{held} MiB");
    // They still can have them.
    for mut client in deaf {
        assert_eq!(client.answer(false).body.len(), BODY);
    }
    assert_eq!(upstream.seen().len(), 36);
}

#[test]
fn silent_connections_up_to_the_limit_make_way() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).flag("--max-connections", "64").flag("--head-timeout", "500ms").start();
    let mut silent: Vec<_> = (0..64).map(|_| Client::connect(gateway.address)).collect();
    let mut waiting: Vec<_> = (0..32)
        .map(|number| {
            let mut client = Client::connect(gateway.address);
            client.send(post("/", &format!("k{number}"), "{}"));
            client
        })
        .collect();
    for client in &mut waiting {
        assert_eq!(client.answer(false).status, 201);
    }
    assert!(silent.iter_mut().all(Client::is_closed));
    assert_eq!(upstream.seen().len(), 32);
    gateway.wait_for_log("further connections have to wait");
}

#[test]
fn keys_without_end_are_refused_and_those_held_still_replay() {
    const HELD: usize = 1000;
    const MORE: usize = 20_000;
    const AT_ONCE: usize = 100;
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).flag("--durability", "buffered").flag("--max-keys", &HELD.to_string()).start();
    let address = gateway.address;
    // Pipelined, each key its own.
    let ask_for = |keys: std::ops::Range<usize>| {
        let mut client = Client::connect(address);
        let mut answers = Vec::new();
        while answers.len() < keys.len() {
            let from = keys.start + answers.len();
            let to = keys.end.min(from + AT_ONCE);
            client.send((from..to).map(|key| post("/", &format!("key-{key}"), "{}")).collect::<String>());
            answers.extend((from..to).map(|_| client.answer(false)));
        }
        answers
    };
    let held = ask_for(0..HELD);
    assert!(held.iter().all(|answer| answer.status == 201));
    let before = gateway.memory_mib();
    thread::scope(|scope| {
        for part in 0..4 {
            scope.spawn(move || {
                let from = HELD + part * MORE / 4;
                for answer in ask_for(from..from + MORE / 4) {
                    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")));
                    assert_eq!(answer.problem(), "store-unavailable");
                }
            });
        }
    });
    let after = gateway.memory_mib();
    assert!(after < before + 16, "{after} MiB after {before} MiB");
    for (answer, first) in ask_for(0..HELD).iter().zip(&held) {
        assert_eq!((&answer.body, answer.header("idempotency-replayed")), (&first.body, Some("true")));
    }
    assert_eq!(upstream.seen().len(), HELD);
    assert_eq!(gateway.metric("oncekey_http_store_keys"), HELD as u64);
}
