//! What an operator does about a key, through the admin address.

use crate::client::{Answer, Client, ask, post};
use crate::process::{Gateway, Setup};
use crate::upstream::{Act, Upstream};
use serde_json::{Value, json};

const JSON: (&str, &str) = ("content-type", "application/json");

/// Names a key of `/` to one of the paths of the admin address.
fn name(gateway: &Gateway, path: &str, headers: &[(&str, &str)], key: &str) -> Answer {
    let body = json!({"method": "POST", "path": "/", "key": key}).to_string();
    let fields: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\n{fields}content-length: {}\r\n\r\n", body.len());
    ask(gateway.admin, format!("{head}{body}"))
}

fn resolve(gateway: &Gateway, deed: &str, key: &str) -> Answer {
    name(gateway, &format!("/keys/{deed}"), &[JSON], key)
}

fn found(gateway: &Gateway, key: &str) -> Value {
    serde_json::from_slice(&name(gateway, "/api/key", &[JSON], key).body).unwrap()
}

/// Loses the first request of the key `lost`, never ends `running`, and answers the rest.
fn upstream() -> Upstream {
    Upstream::start(|seen| match seen.header("idempotency-key") {
        Some("running") => Act::SendAndHang(Vec::new()),
        Some("lost") if seen.number == 0 => Act::SendAndClose(Vec::new()),
        _ => Act::answer(201, &format!("made {}", seen.number)),
    })
}

#[test]
fn an_interrupted_key_that_is_released_runs_anew() {
    let upstream = upstream();
    let gateway = Setup::new(&upstream).start();
    assert_eq!(ask(gateway.address, post("/", "lost", "{}")).status, 502);
    assert_eq!(ask(gateway.address, post("/", "lost", "{}")).problem(), "outcome-unknown");
    let released = resolve(&gateway, "release", "\"lost\"");
    assert_eq!((released.status, released.text().as_str()), (200, "{\"outcome\":\"released\"}"));
    let after = found(&gateway, "lost");
    assert_eq!(after["state"], "absent");
    assert_eq!(after["history"].as_array().unwrap().last().unwrap()["what"], "released_by_operator");
    // It is free also for another payload.
    let anew = ask(gateway.address, post("/", "lost", "{ }"));
    assert_eq!((anew.status, anew.text().as_str(), anew.header("idempotency-replayed")), (201, "made 1", None));
    assert_eq!(ask(gateway.address, post("/", "lost", "{ }")).header("idempotency-replayed"), Some("true"));
    assert_eq!(upstream.seen().len(), 2);
}

#[test]
fn a_release_outlives_a_kill() {
    let upstream = upstream();
    let gateway = Setup::new(&upstream).start();
    assert_eq!(ask(gateway.address, post("/", "lost", "{}")).status, 502);
    let gateway = gateway.kill_and_restart();
    assert_eq!(found(&gateway, "lost")["state"], "interrupted");
    assert_eq!(resolve(&gateway, "release", "lost").status, 200);
    let gateway = gateway.kill_and_restart();
    assert_eq!(found(&gateway, "lost")["state"], "absent");
    assert_eq!(ask(gateway.address, post("/", "lost", "{}")).status, 201);
}

#[test]
fn a_key_that_is_not_interrupted_is_not_released() {
    let upstream = upstream();
    let gateway = Setup::new(&upstream).start();
    ask(gateway.address, post("/", "done", "{}"));
    let mut client = Client::connect(gateway.address);
    client.send(post("/", "running", "{}"));
    upstream.wait_for(2);
    for (key, state) in [("done", "completed"), ("running", "running"), ("unknown", "absent")] {
        let before = found(&gateway, key);
        assert_eq!(before["state"], state);
        let answer = resolve(&gateway, "release", key);
        assert_eq!((answer.status, answer.problem().as_str()), (409, "state-unfit"), "{key}");
        let after = found(&gateway, key);
        assert_eq!((&before["state"], &before["fence"]), (&after["state"], &after["fence"]), "{key}");
    }
    assert_eq!(ask(gateway.address, post("/", "done", "{}")).text(), "made 0");
}

#[test]
fn an_erased_key_leaves_nothing_behind() {
    let upstream = upstream();
    let setup = Setup::new(&upstream);
    let gateway = setup.start();
    assert_eq!(ask(gateway.address, post("/", "lost", "{}")).status, 502);
    let key = "key-of-mr-smith";
    assert_eq!(ask(gateway.address, post("/", key, "{}")).text(), "made 1");
    let data = setup.data();
    // A file of a segment to come may be renamed meanwhile.
    let files = || std::fs::read_dir(&data).unwrap().filter_map(|entry| std::fs::read(entry.unwrap().path()).ok());
    let is_held = |bytes: &str| files().any(|file| memchr::memmem::find(&file, bytes.as_bytes()).is_some());
    assert!(is_held(key) && is_held("made 1"));
    for key in [key, "lost"] {
        let erased = resolve(&gateway, "erase", key);
        assert_eq!(erased.status, 200, "{erased:?}");
        let answer: Value = serde_json::from_slice(&erased.body).unwrap();
        assert_eq!(answer["outcome"], "erased");
        assert!(answer["records"].as_u64().unwrap() >= 2, "{answer}");
        assert_eq!((&found(&gateway, key)["state"], &found(&gateway, key)["history"]), (&json!("absent"), &json!([])));
    }
    assert!(!is_held(key) && !is_held("made 1"));
    assert_eq!(ask(gateway.address, post("/", key, "{}")).text(), "made 2");
    // What is gone already is not brought back.
    let gone = resolve(&gateway, "erase", "lost");
    assert_eq!((gone.status, gone.problem().as_str()), (404, "key-unknown"));
    assert_eq!(found(&gateway, "lost")["state"], "absent");
}

#[test]
fn a_key_that_runs_is_not_erased() {
    let upstream = upstream();
    let gateway = Setup::new(&upstream).start();
    let mut client = Client::connect(gateway.address);
    client.send(post("/", "running", "{}"));
    upstream.wait_for(1);
    let answer = resolve(&gateway, "erase", "running");
    assert_eq!((answer.status, answer.problem().as_str()), (409, "state-unfit"));
    assert_eq!(found(&gateway, "running")["state"], "running");
}

#[test]
fn keys_are_resolved_by_who_has_the_token_and_by_no_other_page() {
    const TOKEN: &str = "Bearer 0123456789abcdef";
    let open = Setup::for_url("http://127.0.0.1:9").start();
    let guarded = Setup::for_url("http://127.0.0.1:9").variable("ONCEKEY_ADMIN_TOKEN", &TOKEN[7..]).start();
    for path in ["/keys/release", "/keys/erase"] {
        for headers in [&[JSON][..], &[JSON, ("authorization", "Bearer 0123456789abcdee")]] {
            assert_eq!(name(&guarded, path, headers, "k").status, 401);
        }
        assert_eq!(name(&guarded, path, &[JSON, ("authorization", TOKEN), ("origin", "null")], "k").status, 403);
        for (headers, status, problem) in [
            (&[JSON, ("origin", "http://evil.example")][..], 403, "origin-refused"),
            (&[JSON, ("origin", "http://localhost:1")], 403, "origin-refused"),
            (&[("content-type", "text/plain")], 400, "request-invalid"),
            (&[("content-type", "application/x-www-form-urlencoded")], 400, "request-invalid"),
            (&[], 400, "request-invalid"),
        ] {
            let answer = name(&open, path, headers, "k");
            assert_eq!((answer.status, answer.problem().as_str()), (status, problem), "{path} {headers:?}");
        }
        let rebound = format!("POST {path} HTTP/1.1\r\nhost: rebound.example\r\ncontent-length: 0\r\n\r\n");
        assert_eq!(ask(open.admin, rebound).problem(), "host-refused");
        let refused = ask(open.admin, crate::client::get(path, &[]));
        assert_eq!((refused.status, refused.header("allow")), (405, Some("POST")));
        assert_ne!(name(&open, path, &[JSON, ("origin", "http://localhost")], "k").status, 403);
    }
}

#[test]
fn what_operators_do_is_counted_and_logged_without_the_key() {
    let upstream = upstream();
    let gateway = Setup::new(&upstream).variable("ONCEKEY_LOG", "trace").start();
    ask(gateway.address, post("/", "secret", "{}"));
    assert_eq!(resolve(&gateway, "release", "secret").status, 409);
    assert_eq!(resolve(&gateway, "erase", "secret").status, 200);
    let count = |outcome: &str| gateway.metric(&format!("oncekey_http_resolved_total{{outcome=\"{outcome}\"}}"));
    assert_eq!(["released", "erased", "refused", "failed"].map(count), [0, 1, 1, 0]);
    gateway.term();
    let (_, log) = gateway.wait();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("an operator resolved a key")).collect();
    assert!(matches!(lines[..], [refused, erased] if refused.contains("\"refused\"") && erased.contains("\"erased\"")));
    assert!(lines.iter().all(|line| line.contains("\"operation\":\"POST /\"")), "{lines:?}");
    assert!(!log.contains("secret"), "{}", log.lines().find(|line| line.contains("secret")).unwrap_or_default());
}
