//! Many duplicates at once, over HTTP/1.1 and HTTP/2.

use crate::client::{Answer, Client, post};
use crate::process::{Gateway, Setup};
use crate::upstream::{Act, Gate, Upstream, answer};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper::{Request, Response, body::Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::net::SocketAddr;
use std::thread;
use tokio::net::TcpStream;

const HERD: usize = 50;

/// A connection that speaks HTTP/2.
pub async fn connect(address: SocketAddr) -> SendRequest<Full<Bytes>> {
    let stream = TcpStream::connect(address).await.unwrap();
    let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(async {
        // How it ends is seen by those who ask.
        connection.await.ok();
    });
    sender
}

pub fn keyed(address: SocketAddr, path: &str, key: &str) -> Request<Full<Bytes>> {
    let uri = format!("http://{address}{path}");
    Request::post(uri).header("idempotency-key", key).body(Full::from("{}")).unwrap()
}

/// An answer over HTTP/2, in the form of one over HTTP/1.1.
pub async fn whole(response: Response<Incoming>) -> Answer {
    let status = response.status().as_u16();
    let fields = |map: &http::HeaderMap| {
        let text = |value: &http::HeaderValue| value.to_str().unwrap().to_owned();
        map.iter().map(|(name, value)| (name.to_string(), text(value))).collect()
    };
    let headers = fields(response.headers());
    let (body, trailers, is_whole) = match response.into_body().collect().await {
        Ok(body) => {
            let trailers = body.trailers().map_or(Vec::new(), fields);
            (body.to_bytes().to_vec(), trailers, true)
        }
        Err(_) => (Vec::new(), Vec::new(), false),
    };
    Answer { status, headers, body, trailers, is_whole }
}

/// A gateway before a service that answers when the gate is open.
fn held(policy: &str, body: &'static str) -> (Upstream, Gateway, Gate) {
    let gate = Gate::default();
    let opened = gate.clone();
    let upstream = Upstream::start(move |seen| {
        let made = answer(201, &[("x-run", &seen.number.to_string()), ("location", "/made")], body);
        Act::At(opened.clone(), Vec::new(), Box::new(Act::Send(made)))
    });
    let gateway = Setup::new(&upstream).file(policy).start();
    (upstream, gateway, gate)
}

/// Half of the herd over connections of their own, the other half over one that speaks HTTP/2; the answers as they come.
fn herd(address: SocketAddr, each: impl Fn(Answer) + Sync) {
    let each = &each;
    thread::scope(|scope| {
        for _ in 0..HERD / 2 {
            scope.spawn(move || each(Client::connect(address).ask(post("/pay", "k", "{}"))));
        }
        scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let sender = connect(address).await;
                let mut all = tokio::task::JoinSet::new();
                for _ in 0..HERD / 2 {
                    let mut sender = sender.clone();
                    let mut request = keyed(address, "/pay", "k");
                    // The fingerprint is of what both send.
                    *request.version_mut() = http::Version::HTTP_2;
                    all.spawn(async move { whole(sender.send_request(request).await.unwrap()).await });
                }
                while let Some(answer) = all.join_next().await {
                    each(answer.unwrap());
                }
            });
        });
    });
}

#[test]
fn a_herd_that_waits_gets_the_one_answer() {
    static LONG: [u8; 300_000] = [b'x'; 300_000];
    for body in ["made", str::from_utf8(&LONG).unwrap()] {
        let (upstream, gateway, gate) = held("[policy]\nwait = \"30s\"\n", body);
        let answers = std::sync::Mutex::new(Vec::new());
        thread::scope(|scope| {
            let herd = scope.spawn(|| herd(gateway.address, |answer| answers.lock().unwrap().push(answer)));
            upstream.wait_for(1);
            gate.open();
            herd.join().unwrap();
        });
        let answers = answers.into_inner().unwrap();
        assert_eq!(answers.len(), HERD);
        for answer in &answers {
            assert_eq!((answer.status, answer.is_whole), (201, true));
            assert!(answer.body == body.as_bytes(), "{} bytes", answer.body.len());
            assert_eq!((answer.header("x-run"), answer.header("location")), (Some("0"), Some("/made")));
        }
        let first = answers.iter().filter(|answer| answer.header("idempotency-replayed").is_none()).count();
        assert_eq!((first, upstream.seen().len()), (1, 1));
    }
}

#[test]
fn a_herd_that_does_not_wait_is_told_to_come_back() {
    let (upstream, gateway, gate) = held("", "made");
    let answers = std::sync::Mutex::new(Vec::new());
    herd(gateway.address, |answer| {
        let mut answers = answers.lock().unwrap();
        answers.push(answer);
        // All but the one that runs are answered while it does.
        if answers.len() == HERD - 1 {
            gate.open();
        }
    });
    let mut answers = answers.into_inner().unwrap();
    let made = answers.pop().unwrap();
    assert_eq!((made.status, made.text().as_str(), made.header("idempotency-replayed")), (201, "made", None));
    for answer in &answers {
        assert_eq!((answer.status, answer.problem().as_str()), (409, "in-flight"));
        assert_eq!(answer.header("retry-after"), Some("1"));
    }
    assert_eq!((answers.len(), upstream.seen().len()), (HERD - 1, 1));
    assert_eq!(gateway.metric("oncekey_http_events_total{kind=\"in_flight\"}"), HERD as u64 - 1);
    herd(gateway.address, |answer| {
        assert_eq!((answer.text().as_str(), answer.header("idempotency-replayed")), ("made", Some("true")));
    });
    assert_eq!(upstream.seen().len(), 1);
}
