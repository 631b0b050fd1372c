//! Which requests are one, and which are refused before anything is decided.

use crate::service::{Answer, Service, around, data, echo, fed, layer, post, send, store};
use bytes::Bytes;
use http::{HeaderName, Method, Request, Response, StatusCode};
use http_body_util::Full;
use oncekey::http::{Body, BoxError, EventKind, IdempotencyLayer, PayloadDigest, Policy, Scope};
use oncekey::{Fingerprint, Store};
use std::sync::Arc;
use std::time::Duration;

fn at(path: &str, key: &str) -> Request<Body> {
    Request::post(path).header("idempotency-key", key).body(Body::empty()).unwrap()
}

#[tokio::test]
async fn quoted_and_bare_forms_are_one_key() {
    let (service, log) = echo(layer(&store(), Policy::new()), StatusCode::OK);
    assert!(!send(&service, post("\"a-1\"", "")).await.is_replay());
    assert!(send(&service, post("a-1", "")).await.is_replay());
    assert_eq!(log.runs(), 1);
}

#[tokio::test]
async fn a_missing_key_is_refused_where_it_is_required_and_passes_where_not() {
    let bare = || Request::post("/payments").body(Body::empty()).unwrap();
    let (service, log) = echo(layer(&store(), Policy::new().required(true)), StatusCode::OK);
    send(&service, bare()).await.assert_problem(400, "key-missing");
    assert_eq!((log.runs(), log.events()), (0, vec![EventKind::Invalid]));
    let (service, log) = echo(layer(&store(), Policy::new()), StatusCode::OK);
    for _ in 0..2 {
        assert!(!send(&service, bare()).await.is_replay());
    }
    assert_eq!((log.runs(), log.events()), (2, vec![EventKind::Passed; 2]));
}

#[tokio::test]
async fn bad_keys_are_refused_and_reserve_nothing() {
    let store = store();
    let (service, log) = echo(layer(&store, Policy::new()), StatusCode::OK);
    let long = "x".repeat(256);
    for key in ["", "\"\"", "a b", "\"a", "a,b", &long] {
        send(&service, post(key, "")).await.assert_problem(400, "key-invalid");
    }
    let mut twice = post("a", "");
    twice.headers_mut().append("idempotency-key", "a".parse().unwrap());
    send(&service, twice).await.assert_problem(400, "key-invalid");
    assert_eq!((log.runs(), store.stats().keys), (0, 0));
    assert_eq!(send(&service, post(&"x".repeat(255), "")).await.status, StatusCode::OK);
}

#[tokio::test]
async fn other_methods_pass_whatever_their_headers() {
    let (service, log) = echo(layer(&store(), Policy::new().required(true)), StatusCode::OK);
    for _ in 0..2 {
        let get = Request::get("/payments").header("idempotency-key", "a").body(Body::empty()).unwrap();
        assert!(!send(&service, get).await.is_replay());
    }
    assert_eq!(log.runs(), 2);
    let (service, log) = echo(layer(&store(), Policy::new().methods([Method::PUT])), StatusCode::OK);
    for _ in 0..2 {
        let put = Request::put("/payments").header("idempotency-key", "a").body(Body::empty()).unwrap();
        send(&service, put).await;
    }
    assert_eq!(log.runs(), 1);
}

#[tokio::test]
async fn the_headers_name_can_be_chosen() {
    let policy = Policy::new().header(HeaderName::from_static("x-request-id"));
    let (service, log) = echo(layer(&store(), policy), StatusCode::OK);
    for _ in 0..2 {
        send(&service, Request::post("/").header("x-request-id", "a").body(Body::empty()).unwrap()).await;
    }
    assert_eq!(log.runs(), 1);
}

fn by_tenant(store: &Store) -> IdempotencyLayer {
    let scope = |parts: &http::request::Parts| Some(parts.headers.get("x-tenant")?.as_bytes().to_vec());
    IdempotencyLayer::new(store.clone(), Scope::from_request(scope))
}

fn of_tenant(tenant: &str) -> Request<Body> {
    let mut request = post("a", "");
    request.headers_mut().insert("x-tenant", tenant.parse().unwrap());
    request
}

#[tokio::test]
async fn tenants_have_keys_of_their_own() {
    let (service, log) = echo(by_tenant(&store()), StatusCode::OK);
    assert_eq!(send(&service, of_tenant("acme")).await.text(), "run 1: ");
    assert_eq!(send(&service, of_tenant("globex")).await.text(), "run 2: ");
    assert_eq!(send(&service, of_tenant("acme")).await.text(), "run 1: ");
    assert_eq!(log.runs(), 2);
}

#[tokio::test]
async fn a_request_without_a_scope_never_gets_into_a_shared_one() {
    let (service, log) = echo(by_tenant(&store()), StatusCode::OK);
    send(&service, post("a", "")).await.assert_problem(400, "scope-missing");
    send(&service, of_tenant("")).await.assert_problem(400, "scope-missing");
    send(&service, of_tenant(&"x".repeat(129))).await.assert_problem(400, "scope-missing");
    assert_eq!(log.runs(), 0);
}

#[tokio::test]
async fn a_key_counts_for_its_operation_only() {
    let (service, log) = echo(layer(&store(), Policy::new()), StatusCode::OK);
    let long = format!("/{}", "p".repeat(5000));
    let longer = format!("{long}p");
    for path in ["/payments", "/refunds", &long, &longer, "/payments", "/refunds", &long, &longer] {
        send(&service, at(path, "a")).await;
    }
    assert_eq!(log.runs(), 4);
    let policy =
        Policy::new().operation(|_| "one for all".to_owned()).fingerprint(PayloadDigest::of(|_, _| Fingerprint::NONE));
    let (service, log) = echo(layer(&store(), policy), StatusCode::OK);
    for path in ["/payments", "/refunds"] {
        send(&service, at(path, "a")).await;
    }
    assert_eq!(log.runs(), 1);
}

async fn is_mismatch(service: &Service, request: Request<Body>) -> bool {
    let answer: Answer = send(service, request).await;
    if answer.status == StatusCode::UNPROCESSABLE_ENTITY {
        answer.assert_problem(422, "key-reused");
        return true;
    }
    assert!(answer.is_replay());
    false
}

fn json(uri: &str, content_type: &str, body: &'static str) -> Request<Body> {
    let request = Request::post(uri).header("idempotency-key", "a").header("content-type", content_type);
    request.body(Body::from(body)).unwrap()
}

#[tokio::test]
async fn body_query_and_content_type_make_up_a_request() {
    let (service, log) = echo(layer(&store(), Policy::new()), StatusCode::OK);
    send(&service, json("/p?x=1", "application/json", "{}")).await;
    assert!(!is_mismatch(&service, json("/p?x=1", "application/json", "{}")).await);
    assert!(is_mismatch(&service, json("/p?x=2", "application/json", "{}")).await);
    assert!(is_mismatch(&service, json("/p?x=1", "text/plain", "{}")).await);
    assert!(is_mismatch(&service, json("/p?x=1", "application/json", "{ }")).await);
    assert_eq!(log.runs(), 1);
}

#[tokio::test]
async fn chosen_members_of_a_json_body_make_up_a_request() {
    let digest = PayloadDigest::json_pointers(["/amount", "/to/account"]).unwrap();
    let (service, log) = echo(layer(&store(), Policy::new().fingerprint(digest)), StatusCode::OK);
    let send_json = |body| json("/p", "application/json", body);
    send(&service, send_json(r#"{"amount": 1, "to": {"account": {"a": 1, "b": 2}}, "sent": 1}"#)).await;
    assert!(!is_mismatch(&service, send_json(r#"{"sent":2,"to":{"account":{"b":2,"a":1}},"amount":1}"#)).await);
    assert!(is_mismatch(&service, send_json(r#"{"amount": 2, "to": {"account": {"a": 1, "b": 2}}}"#)).await);
    assert!(is_mismatch(&service, send_json(r#"{"amount": 1, "to": {}}"#)).await);
    assert!(is_mismatch(&service, send_json(r#"{"amount": 1, "to": {"account": null}}"#)).await);
    assert!(is_mismatch(&service, send_json("no json")).await);
    assert_eq!(log.runs(), 1);
    assert!(PayloadDigest::json_pointers(["amount"]).is_err());
}

#[tokio::test]
async fn a_request_body_over_the_limit_is_refused_told_or_not() {
    let store = store();
    let (service, log) = echo(layer(&store, Policy::new().max_request_body(4)), StatusCode::OK);
    send(&service, post("a", "12345")).await.assert_problem(413, "body-too-large");
    let (frames, body) = fed();
    frames.send(data("123")).unwrap();
    frames.send(data("45")).unwrap();
    let request = Request::post("/").header("idempotency-key", "a").body(Body::new(body)).unwrap();
    send(&service, request).await.assert_problem(413, "body-too-large");
    assert_eq!((log.runs(), store.stats().keys), (0, 0));
    assert_eq!(send(&service, post("a", "1234")).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_request_body_that_ends_early_leaves_nothing_behind() {
    let store = store();
    let (service, log) = echo(layer(&store, Policy::new()), StatusCode::OK);
    let (frames, body) = fed();
    frames.send(data("123")).unwrap();
    frames.send(Err(BoxError::from("reset"))).unwrap();
    let request = Request::post("/").header("idempotency-key", "a").body(Body::new(body)).unwrap();
    send(&service, request).await.assert_problem(400, "body-incomplete");
    assert_eq!((log.runs(), store.stats().keys), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_request_body_that_stalls_is_given_up() {
    let store = store();
    let (service, log) =
        echo(layer(&store, Policy::new().request_body_timeout(Duration::from_secs(7))), StatusCode::OK);
    let (frames, body) = fed();
    frames.send(data("123")).unwrap();
    let request = Request::post("/").header("idempotency-key", "a").body(Body::new(body)).unwrap();
    send(&service, request).await.assert_problem(408, "body-timeout");
    assert_eq!((log.runs(), store.stats().keys), (0, 0));
    drop(frames);
}

#[tokio::test]
async fn a_body_that_comes_in_pieces_is_the_same_request() {
    let (service, log) = echo(layer(&store(), Policy::new()), StatusCode::OK);
    send(&service, post("a", "12345")).await;
    let (frames, body) = fed();
    for text in ["1", "", "23", "45"] {
        frames.send(data(text)).unwrap();
    }
    drop(frames);
    let request = Request::post("/payments").header("idempotency-key", "a").body(Body::new(body)).unwrap();
    assert_eq!(send(&service, request).await.text(), "run 1: 12345");
    assert_eq!(log.runs(), 1);
}

#[tokio::test]
async fn headers_that_only_the_layer_may_set_are_taken_out_of_every_request() {
    let handler = |request: Request<Body>| async move {
        let seen = request.headers().iter().filter(|(name, _)| name.as_str().starts_with("idempotency-"));
        let seen: Vec<String> = seen.map(|(name, value)| format!("{name}={}", value.to_str().unwrap())).collect();
        Response::new(Full::new(Bytes::from(seen.join(" "))))
    };
    let (service, _) = around(layer(&store(), Policy::new()), handler);
    let forged = |request: http::request::Builder| {
        let request = request.header("idempotency-attempt", "9").header("idempotency-fence", "9");
        request.header("idempotency-recovery-point", ":AA==:").body(Body::empty()).unwrap()
    };
    assert_eq!(send(&service, forged(Request::get("/"))).await.text(), "");
    let answer = send(&service, forged(Request::post("/").header("idempotency-key", "a"))).await;
    assert!(
        answer.text().starts_with("idempotency-key=a idempotency-attempt=1 idempotency-fence="),
        "{}",
        answer.text()
    );
    assert!(!answer.text().contains("=9") && !answer.text().contains("recovery"), "{}", answer.text());
}

#[tokio::test]
async fn routes_have_policies_of_their_own_and_problems_link_to_documentation() {
    let strict = Arc::new(Policy::new().required(true));
    let layer = layer(&store(), Policy::new()).documentation("https://example.com/idempotency").unwrap();
    let layer = layer.route(move |parts| (parts.uri.path() == "/strict").then(|| Arc::clone(&strict)));
    let (service, _) = echo(layer, StatusCode::OK);
    let bare = |path| Request::post(path).body(Body::empty()).unwrap();
    assert_eq!(send(&service, bare("/lax")).await.status, StatusCode::OK);
    let answer = send(&service, bare("/strict")).await;
    answer.assert_problem(400, "key-missing");
    assert_eq!(answer.header("link"), Some("<https://example.com/idempotency>; rel=\"describedby\""));
}
