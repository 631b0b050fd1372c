//! The admin address.

use crate::client::{Answer, Client, ask, get, post};
use crate::process::{Gateway, Setup};
use crate::upstream::{Act, Upstream};
use serde_json::{Value, json};

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

fn search(gateway: &Gateway, headers: &[(&str, &str)], body: &Value) -> Answer {
    let body = body.to_string();
    let fields: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let head = format!("POST /api/key HTTP/1.1\r\nhost: localhost\r\n{fields}content-length: {}\r\n\r\n", body.len());
    ask(gateway.admin, format!("{head}{body}"))
}

fn found(gateway: &Gateway, scope: &str, key: &str) -> Value {
    let body = json!({"scope": scope, "method": "POST", "path": "/v1/payments?x=1", "key": key});
    let answer = search(gateway, &[("content-type", "application/json")], &body);
    assert_eq!(answer.status, 200, "{answer:?}");
    serde_json::from_slice(&answer.body).unwrap()
}

#[test]
fn what_tells_of_requests_needs_the_token() {
    let upstream = Upstream::counting();
    let directory = tempfile::TempDir::new().unwrap();
    let file = directory.path().join("token");
    std::fs::write(&file, format!("{TOKEN}\n")).unwrap();
    for setup in [
        Setup::new(&upstream).variable("ONCEKEY_ADMIN_TOKEN", TOKEN),
        Setup::new(&upstream).flag("--admin-token-file", file.to_str().unwrap()),
    ] {
        let gateway = setup.start();
        for path in ["/", "/healthz", "/readyz"] {
            assert_eq!(ask(gateway.admin, get(path, &[("host", "any.example")])).status, 200, "{path}");
        }
        let right = format!("Bearer {TOKEN}");
        for wrong in [&[][..], &[("authorization", "Bearer x")], &[("authorization", TOKEN)]] {
            for path in ["/metrics", "/events"] {
                let answer = ask(gateway.admin, get(path, wrong));
                assert_eq!((answer.status, answer.header("www-authenticate")), (401, Some("Bearer")), "{path}");
            }
            assert_eq!(search(&gateway, wrong, &json!({})).status, 401);
        }
        assert_eq!(ask(gateway.admin, get("/metrics", &[("authorization", &right)])).status, 200);
        let headers = [("authorization", right.as_str()), ("content-type", "application/json")];
        assert_eq!(search(&gateway, &headers, &json!({"method": "POST", "path": "/", "key": "k"})).status, 200);
    }
}

#[test]
fn without_a_token_other_origins_get_nothing() {
    let gateway = Setup::for_url("http://127.0.0.1:9").start();
    for path in ["/", "/metrics", "/events", "/healthz"] {
        let answer = ask(gateway.admin, format!("GET {path} HTTP/1.1\r\nhost: rebound.example\r\n\r\n"));
        assert_eq!((answer.status, answer.problem().as_str()), (421, "host-refused"), "{path}");
    }
    let wanted = json!({"method": "POST", "path": "/", "key": "k"});
    for kind in ["text/plain", "application/x-www-form-urlencoded", ""] {
        assert_eq!(search(&gateway, &[("content-type", kind)], &wanted).status, 400, "{kind}");
    }
    let page = ask(gateway.admin, get("/", &[]));
    for (name, says) in [
        ("content-security-policy", "frame-ancestors 'none'"),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("cache-control", "no-store"),
    ] {
        assert!(page.header(name).is_some_and(|value| value.contains(says)), "{name}: {page:?}");
    }
    assert_eq!(ask(gateway.admin, get("/nothing", &[])).status, 404);
    let refused = ask(gateway.admin, post("/metrics", "k", "").replace("shop.example", "localhost"));
    assert_eq!((refused.status, refused.header("allow")), (405, Some("GET")));
    let wrong = search(&gateway, &[("content-type", "application/json")], &json!({"key": 3}));
    assert_eq!((wrong.status, wrong.problem().as_str()), (400, "request-invalid"));
    let large = search(&gateway, &[("content-type", "application/json")], &json!({"key": "k".repeat(20_000)}));
    assert_eq!(large.status, 400);
}

#[test]
fn metrics_count_what_became_of_requests() {
    let upstream =
        Upstream::start(|seen| if seen.target == "/lost" { Act::SendAndClose(vec![]) } else { Act::answer(201, "x") });
    let gateway = Setup::new(&upstream).start();
    for request in
        [post("/", "k", "{}"), post("/", "k", "{}"), post("/", "k", "{ }"), post("/lost", "k", ""), get("/", &[])]
    {
        ask(gateway.address, request);
    }
    let metrics = ask(gateway.admin, get("/metrics", &[])).text();
    for line in [
        "oncekey_http_requests_total 5",
        "oncekey_http_events_total{kind=\"started\"} 2",
        "oncekey_http_events_total{kind=\"stored\"} 1",
        "oncekey_http_events_total{kind=\"unknown\"} 1",
        "oncekey_http_events_total{kind=\"replayed\"} 1",
        "oncekey_http_events_total{kind=\"mismatched\"} 1",
        "oncekey_http_events_total{kind=\"passed\"} 1",
        "oncekey_http_upstream_failures_total{cause=\"lost\"} 1",
        "oncekey_http_answer_duration_seconds_count{outcome=\"replayed\"} 1",
        "oncekey_http_answer_duration_seconds_bucket{le=\"+Inf\",outcome=\"replayed\"} 1",
        "oncekey_http_store_keys 2",
        "oncekey_http_running 0",
        "# UNIT oncekey_http_answer_duration_seconds seconds",
        "# EOF",
    ] {
        assert!(metrics.lines().any(|known| known == line), "{line} is missing: {metrics}");
    }
    let helps = metrics.lines().filter(|line| line.starts_with("# HELP")).count();
    assert_eq!(helps, metrics.lines().filter(|line| line.starts_with("# TYPE")).count());
}

#[test]
fn a_key_is_found_with_its_state_and_history() {
    let upstream = Upstream::start(|seen| match seen.header("idempotency-key") {
        Some("done") => Act::answer(201, "made"),
        Some("lost") => Act::SendAndClose(Vec::new()),
        _ => Act::SendAndHang(Vec::new()),
    });
    let gateway = Setup::new(&upstream).flag("--scope", "authorization").start();
    let pay = |key: &str| {
        crate::client::post_with("/v1/payments", &[("idempotency-key", key), ("authorization", "Bearer a")], "{}")
    };
    assert_eq!(found(&gateway, "Bearer a", "done")["state"], "absent");
    ask(gateway.address, pay("done"));
    ask(gateway.address, pay("done"));
    ask(gateway.address, pay("lost"));
    let mut client = Client::connect(gateway.address);
    client.send(pay("running"));
    upstream.wait_for(3);

    let done = found(&gateway, "Bearer a", "done");
    assert_eq!((&done["state"], &done["status"], &done["body_bytes"]), (&json!("completed"), &json!(201), &json!(4)));
    assert_eq!(done["fingerprint"].as_str().unwrap().len(), 32);
    assert_eq!(done["attempt"], 1);
    assert!(done["expires_at_ms"].as_u64().unwrap() > done["completed_at_ms"].as_u64().unwrap());
    let history: Vec<_> =
        done["history"].as_array().unwrap().iter().map(|event| event["what"].as_str().unwrap()).collect();
    assert_eq!(history, ["started", "stored", "replayed"]);

    assert_eq!(found(&gateway, "Bearer a", "\"done\"")["state"], "completed");
    assert_eq!(found(&gateway, "Bearer a", " done ")["history"], done["history"]);
    let body = json!({"scope": "Bearer a", "method": "POST", "path": "/v1/payments", "key": "\"done"});
    assert_eq!(search(&gateway, &[("content-type", "application/json")], &body).problem(), "key-invalid");

    assert_eq!(found(&gateway, "Bearer a", "lost")["state"], "interrupted");
    let running = found(&gateway, "Bearer a", "running");
    assert_eq!(running["state"], "running");
    assert!(running["fence"].as_u64().is_some() && running["lease_left_ms"].as_u64().is_some(), "{running}");
    assert_eq!(found(&gateway, "Bearer b", "done")["state"], "absent");
    assert_eq!(found(&gateway, "Bearer b", "done")["history"], json!([]));
}

#[test]
fn samples_come_each_second_after_those_of_the_past() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).start();
    ask(gateway.address, post("/", "k", "{}"));
    let mut client = Client::connect(gateway.admin);
    client.send(get("/events", &[]));
    let head = client.head().unwrap();
    assert_eq!((head.status, head.header("content-type")), (200, Some("text/event-stream")));
    let mut event = || {
        let text = String::from_utf8(client.chunk().unwrap()).unwrap();
        let (name, data) = text.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
        (name.to_owned(), serde_json::from_str::<Value>(data.trim()).unwrap())
    };
    let (name, past) = event();
    assert_eq!(name, "history");
    assert!(past.is_array());
    let (name, sample) = event();
    assert_eq!(name, "sample");
    assert_eq!(
        (&sample["totals"]["requests"], &sample["totals"]["ran"], &sample["keys"]),
        (&json!(1), &json!(1), &json!(1))
    );
    for field in ["at_ms", "requests", "running", "p50_ms", "journal_bytes", "disk_free_bytes", "is_ready", "spike"] {
        assert!(sample.get(field).is_some(), "{field}: {sample}");
    }
}
