//! What passes the gateway, and how it looks on the other side.

use crate::client::{Client, ask, get};
use crate::herd;
use crate::process::Setup;
use crate::upstream::{Act, Gate, Upstream, answer};
use http::Request;
use http_body_util::Full;

#[test]
fn a_request_without_a_key_passes_as_it_is() {
    let upstream = Upstream::start(|_| Act::Send(answer(207, &[("x-kind", "a"), ("x-kind", "b")], "answer")));
    let gateway = Setup::new(&upstream).start();
    let target = "/a%2Fb//c/../d;x=%20?q=%C3%A4&&r=a+b%";
    let request = format!(
        "PUT {target} HTTP/1.1\r\nhost: shop.example\r\nx-one: 1\r\nx-one: 2\r\ncontent-length: 4\r\n\r\n\0\x01\r\n"
    );
    for _ in 0..2 {
        let answer = ask(gateway.address, &request);
        assert_eq!((answer.status, answer.text().as_str()), (207, "answer"));
        let kinds: Vec<_> =
            answer.headers.iter().filter(|(name, _)| name == "x-kind").map(|(_, value)| value.as_str()).collect();
        assert_eq!(kinds, ["a", "b"]);
        assert_eq!(answer.header("idempotency-replayed"), None);
    }
    let seen = upstream.seen();
    assert_eq!(seen.len(), 2, "nothing is replayed without a key");
    assert_eq!((seen[0].method.as_str(), seen[0].target.as_str()), ("PUT", target));
    assert_eq!(seen[0].body, b"\0\x01\r\n");
    assert_eq!(seen[0].headers.iter().filter(|(name, _)| name == "x-one").count(), 2);
}

#[test]
fn headers_of_one_hop_stay_and_forwarding_is_told() {
    let upstream = Upstream::start(|_| {
        Act::Send(answer(
            200,
            &[("connection", "x-hop"), ("x-hop", "1"), ("keep-alive", "timeout=9"), ("x-end", "1")],
            "",
        ))
    });
    let gateway = Setup::new(&upstream).start();
    let answer = ask(
        gateway.address,
        get(
            "/",
            &[
                ("connection", "x-secret, keep-alive"),
                ("x-secret", "1"),
                ("proxy-authorization", "Basic x"),
                ("x-forwarded-for", "203.0.113.9"),
                ("x-forwarded-proto", "https"),
                ("forwarded", "for=evil"),
                ("idempotency-attempt", "7"),
            ],
        ),
    );
    assert_eq!((answer.header("x-hop"), answer.header("keep-alive"), answer.header("x-end")), (None, None, Some("1")));
    let seen = &upstream.seen()[0];
    assert_eq!(seen.header("host"), Some(upstream.address.to_string().as_str()));
    assert_eq!(seen.header("x-forwarded-for"), Some("203.0.113.9, 127.0.0.1"));
    assert_eq!(seen.header("x-forwarded-proto"), Some("http"));
    assert_eq!(seen.header("x-forwarded-host"), Some("localhost"));
    for name in ["x-secret", "proxy-authorization", "forwarded", "connection", "idempotency-attempt"] {
        assert_eq!(seen.header(name), None, "{name}");
    }
}

#[test]
fn a_prefix_of_the_upstream_goes_before_each_path() {
    let upstream = Upstream::counting();
    let gateway = Setup::for_url(&format!("{}/api/v2/", upstream.url())).start();
    ask(gateway.address, get("/orders?id=7", &[]));
    ask(gateway.address, get("http://other.example/absolute?x", &[]));
    let targets: Vec<_> = upstream.seen().into_iter().map(|seen| seen.target).collect();
    assert_eq!(targets, ["/api/v2/orders?id=7", "/api/v2/absolute?x"]);
}

#[test]
fn what_asks_for_no_path_is_answered_by_the_gateway() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).start();
    assert_eq!(ask(gateway.address, "OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n").status, 204);
    let answer = ask(gateway.address, "CONNECT example.com:443 HTTP/1.1\r\nhost: example.com:443\r\n\r\n");
    assert_eq!((answer.status, answer.problem().as_str()), (501, "connect-unsupported"));
    assert!(upstream.seen().is_empty());
}

#[test]
fn trailers_pass_both_ways() {
    let upstream = Upstream::start(|_| {
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n";
        Act::Send(format!("{head}3\r\nabc\r\n0\r\nx-sum: 9\r\n\r\n").into_bytes())
    });
    let gateway = Setup::new(&upstream).start();
    let head = "PUT / HTTP/1.1\r\nhost: a\r\nte: trailers\r\ntrailer: x-end\r\ntransfer-encoding: chunked\r\n\r\n";
    let answer = ask(gateway.address, format!("{head}2\r\nhi\r\n0\r\nx-end: 1\r\n\r\n"));
    assert_eq!(answer.text(), "abc");
    assert_eq!(answer.trailers, [("x-sum".to_owned(), "9".to_owned())]);
    let seen = &upstream.seen()[0];
    assert_eq!(seen.body, b"hi");
    assert_eq!(seen.trailers, [("x-end".to_owned(), "1".to_owned())]);
}

#[test]
fn an_answer_flows_while_it_is_made() {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = Upstream::start(move |_| {
        let begin = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n".to_vec();
        Act::At(held.clone(), begin, Box::new(Act::Send(b"4\r\nlast\r\n0\r\n\r\n".to_vec())))
    });
    let gateway = Setup::new(&upstream).start();
    for key in [None, Some("k")] {
        let mut client = Client::connect(gateway.address);
        let key = key.map_or(String::new(), |key| format!("idempotency-key: {key}\r\n"));
        client.send(format!("POST / HTTP/1.1\r\nhost: a\r\n{key}content-length: 0\r\n\r\n"));
        assert_eq!(client.head().unwrap().status, 200);
        assert_eq!(client.chunk().unwrap(), b"first");
        gate.open();
        assert_eq!(client.chunk().unwrap(), b"last");
    }
}

#[test]
fn the_gateway_itself_tells_a_client_to_continue() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).start();
    let mut client = Client::connect(gateway.address);
    client
        .send("POST / HTTP/1.1\r\nhost: a\r\nidempotency-key: k\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n");
    assert_eq!(client.head().unwrap().status, 100);
    client.send("hi");
    assert_eq!(client.answer(false).status, 201);
    assert_eq!(upstream.seen()[0].header("expect"), None);
}

#[test]
fn answers_without_a_body_keep_their_headers() {
    let upstream = Upstream::start(|seen| match seen.method.as_str() {
        "HEAD" => Act::Send(b"HTTP/1.1 200 OK\r\ncontent-length: 12345\r\n\r\n".to_vec()),
        _ => Act::Send(b"HTTP/1.1 304 Not Modified\r\netag: \"x\"\r\n\r\n".to_vec()),
    });
    let gateway = Setup::new(&upstream).start();
    let mut client = Client::connect(gateway.address);
    client.send("HEAD / HTTP/1.1\r\nhost: a\r\n\r\n");
    assert_eq!(client.answer(true).header("content-length"), Some("12345"));
    client.send(get("/", &[]));
    let answer = client.answer(false);
    assert_eq!((answer.status, answer.header("etag")), (304, Some("\"x\"")));
}

#[test]
fn http_2_without_tls_is_spoken_where_the_client_begins_with_it() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).start();
    let ask = || {
        let output = std::process::Command::new("curl")
            .args(["-sS", "--http2-prior-knowledge", "-i", "-H", "idempotency-key: k", "-d", "x"])
            .arg(format!("http://{}/a", gateway.address))
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let (first, second) = (ask(), ask());
    assert!(first.starts_with("HTTP/2 201") && first.ends_with("made 0"), "{first}");
    assert!(second.contains("idempotency-replayed: true") && second.ends_with("made 0"), "{second}");
    assert_eq!(upstream.seen().len(), 1);
}

#[tokio::test]
async fn trailers_that_belong_into_a_head_end_no_answer_and_are_not_stored() {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = Upstream::start(move |_| {
        let begin = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n2\r\nok\r\n";
        let misplaced = "connection: close\r\ntransfer-encoding: chunked\r\ncontent-length: 7\r\nset-cookie: a=b\r\n";
        let end = format!("0\r\nx-sum: 1\r\n{misplaced}host: a\r\ncontent-type: text/html\r\n\r\n");
        Act::At(held.clone(), begin.into(), Box::new(Act::Send(end.into())))
    });
    let gateway = Setup::new(&upstream).start();
    let mut sender = herd::connect(gateway.address).await;
    for key in [None, Some("live"), Some("live"), Some("at-once")] {
        let mut request = herd::keyed(gateway.address, "/", key.unwrap_or_default());
        if key.is_none() {
            request.headers_mut().clear();
        }
        let response = sender.send_request(request).await.unwrap();
        gate.open();
        let answer = herd::whole(response).await;
        assert_eq!((answer.is_whole, answer.text().as_str()), (true, "ok"), "{key:?} {answer:?}");
        assert_eq!(answer.trailers, [("x-sum".to_owned(), "1".to_owned())], "{key:?}");
    }
    assert_eq!(upstream.seen().len(), 3);
}

#[tokio::test]
async fn over_http_2_the_host_is_that_of_the_authority_and_no_other() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).flag("--scope", "header:Host").start();
    let mut sender = herd::connect(gateway.address).await;
    let mut ask = async |authority: &str, host: Option<&str>| {
        let mut request = Request::post(format!("http://{authority}/")).header("idempotency-key", "k");
        if let Some(host) = host {
            request = request.header("host", host);
        }
        herd::whole(sender.send_request(request.body(Full::default()).unwrap()).await.unwrap()).await
    };
    assert_eq!(ask("a.example", None).await.text(), "made 0");
    assert_eq!(ask("b.example", None).await.text(), "made 1");
    assert_eq!(ask("a.example", Some("A.example")).await.text(), "made 0");
    for (authority, host) in [("a.example", "b.example"), ("a.example", "a.example:81"), ("user:secret@a.example", "")]
    {
        let answer = ask(authority, Some(host).filter(|host| !host.is_empty())).await;
        assert_eq!((answer.status, answer.problem().as_str()), (400, "host-invalid"), "{authority} {host}");
    }
    let seen = upstream.seen();
    let hosts: Vec<_> = seen.iter().map(|seen| seen.header("x-forwarded-host")).collect();
    assert_eq!(hosts, [Some("a.example"), Some("b.example")]);
}
