//! Requests with keys: one run, and its answer for every retry.

use crate::client::{Client, ask, post, post_with};
use crate::process::Setup;
use crate::upstream::{Act, Gate, Upstream, answer};

#[test]
fn a_retry_gets_the_same_bytes_and_the_service_runs_once() {
    let upstream = Upstream::start(|seen| {
        Act::Send(answer(
            201,
            &[("location", "/p/1"), ("x-number", &seen.number.to_string()), ("set-cookie", "a=b")],
            "made\0\r\n",
        ))
    });
    let gateway = Setup::new(&upstream).start();
    let first = ask(gateway.address, post("/v1/payments", "\"k-1\"", "{}"));
    assert_eq!((first.status, first.header("idempotency-replayed")), (201, None));
    assert_eq!(first.header("set-cookie"), Some("a=b"));
    for _ in 0..3 {
        // The quotes of a structured field are not part of the key.
        let again = ask(gateway.address, post("/v1/payments", "k-1", "{}"));
        assert_eq!((again.status, &again.body), (201, &first.body));
        assert_eq!(again.header("idempotency-replayed"), Some("true"));
        assert_eq!((again.header("location"), again.header("x-number")), (Some("/p/1"), Some("0")));
        assert_eq!(again.header("set-cookie"), None);
    }
    let seen = upstream.seen();
    assert_eq!(seen.len(), 1);
    assert_eq!(
        (seen[0].header("idempotency-attempt"), seen[0].header("idempotency-key")),
        (Some("1"), Some("\"k-1\""))
    );
}

#[test]
fn parallel_duplicates_run_once_and_get_identical_answers() {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = Upstream::start(move |seen| {
        Act::At(held.clone(), Vec::new(), Box::new(Act::answer(201, &format!("made {}", seen.number))))
    });
    let gateway = Setup::new(&upstream).file("[policy]\nwait = \"30s\"\n").start();
    let mut clients: Vec<_> = (0..50).map(|_| Client::connect(gateway.address)).collect();
    for client in &mut clients {
        client.send(post("/v1/payments", "k", "{}"));
    }
    upstream.wait_for(1);
    gate.open();
    for client in &mut clients {
        let answer = client.answer(false);
        assert_eq!((answer.status, answer.text().as_str()), (201, "made 0"));
    }
    assert_eq!(upstream.seen().len(), 1);
}

#[test]
fn a_duplicate_of_what_runs_is_told_to_come_back() {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = Upstream::start(move |_| Act::At(held.clone(), Vec::new(), Box::new(Act::answer(201, "made"))));
    let gateway = Setup::new(&upstream).start();
    let mut first = Client::connect(gateway.address);
    first.send(post("/", "k", "{}"));
    upstream.wait_for(1);
    let refused = ask(gateway.address, post("/", "k", "{}"));
    assert_eq!((refused.status, refused.problem().as_str()), (409, "in-flight"));
    assert!(refused.header("retry-after").is_some());
    let other = ask(gateway.address, post("/", "k", "{\"other\": true}"));
    assert_eq!((other.status, other.problem().as_str()), (422, "key-reused"));
    gate.open();
    assert_eq!(first.answer(false).text(), "made");
    assert_eq!(ask(gateway.address, post("/", "k", "{}")).header("idempotency-replayed"), Some("true"));
}

#[test]
fn what_can_not_be_run_under_its_key_is_refused_and_not_passed_on() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).flag("--max-body", "1KiB").file("[policy]\nrequired = true\n").start();
    for (request, status, problem) in [
        (post_with("/", &[], "{}"), 400, "key-missing"),
        (post_with("/", &[("idempotency-key", "a"), ("idempotency-key", "a")], "{}"), 400, "key-invalid"),
        (post("/", "", "{}"), 400, "key-invalid"),
        (post("/", &"k".repeat(256), "{}"), 400, "key-invalid"),
        (post("/", "k", &"x".repeat(1025)), 413, "body-too-large"),
    ] {
        let answer = ask(gateway.address, &request);
        assert_eq!((answer.status, answer.problem().as_str()), (status, problem), "{request}");
    }
    assert!(upstream.seen().is_empty());
    assert_eq!(ask(gateway.address, post("/", &"k".repeat(255), &"x".repeat(1024))).status, 201);
}

#[test]
fn keys_of_two_clients_are_two_keys() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).flag("--scope", "authorization").start();
    let ask_as =
        |who: &str| ask(gateway.address, post_with("/", &[("idempotency-key", "k"), ("authorization", who)], "{}"));
    assert_eq!(ask_as("Bearer a").text(), "made 0");
    assert_eq!(ask_as("Bearer b").text(), "made 1");
    assert_eq!(ask_as("Bearer a").text(), "made 0");
    let nobody = ask(gateway.address, post("/", "k", "{}"));
    assert_eq!((nobody.status, nobody.problem().as_str()), (400, "scope-missing"));
    // One that only this hop is meant to see is no credential for the upstream.
    let hop = ask(
        gateway.address,
        post_with(
            "/",
            &[("idempotency-key", "k"), ("authorization", "Bearer a"), ("connection", "authorization")],
            "{}",
        ),
    );
    assert_eq!(hop.status, 400);
    assert_eq!(upstream.seen()[0].header("authorization"), Some("Bearer a"));
}

#[test]
fn routes_have_rules_of_their_own() {
    let upstream = Upstream::counting();
    let file = r#"
        [policy]
        required = true
        [[route]]
        path = "/open/{*rest}"
        idempotent = false
        [[route]]
        path = "/pay/{id}"
        methods = ["PUT"]
        fingerprint = ["/amount"]
        max_body = 64
        [[route]]
        path = "/pay/{id}"
        required = false
    "#;
    let gateway = Setup::new(&upstream).file(file).start();
    let ask = |request: String| ask(gateway.address, request);
    for _ in 0..2 {
        assert_eq!(ask(post("/open/a/b", "k", "{}")).header("idempotency-replayed"), None);
    }
    assert_eq!(ask(post_with("/other", &[], "{}")).status, 400);
    assert_eq!(ask(post_with("/pay/1", &[], "{}")).status, 201);
    let put = |body: &str| post("/pay/1", "p", body).replacen("POST", "PUT", 1);
    assert_eq!(ask(put("{\"amount\": 1, \"at\": 1}")).status, 201);
    assert_eq!(ask(put("{\"at\": 2, \"amount\": 1}")).header("idempotency-replayed"), Some("true"));
    assert_eq!(ask(put("{\"amount\": 2}")).status, 422);
    assert_eq!(ask(put(&"x".repeat(65))).status, 413);
}

#[test]
fn another_spelling_of_a_path_is_another_route_and_falls_to_the_common_policy() {
    let upstream = Upstream::counting();
    let route = "[[route]]\npath = \"/pay/{id}\"\nrequired = true\n";
    let spellings = ["/pay/1/", "//pay/1", "/./pay/1", "/x/../pay/1", "/%70ay/1", "/Pay/1"];
    let loose = Setup::new(&upstream).file(route).start();
    let strict = Setup::new(&upstream).file(&format!("[policy]\nrequired = true\n{route}")).start();
    assert_eq!(ask(loose.address, post_with("/pay/1", &[], "{}")).problem(), "key-missing");
    for path in spellings {
        assert_eq!(ask(loose.address, post_with(path, &[], "{}")).status, 201, "{path}");
        assert_eq!(ask(strict.address, post_with(path, &[], "{}")).problem(), "key-missing", "{path}");
    }
}
