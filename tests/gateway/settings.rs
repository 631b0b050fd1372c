//! Settings: where they come from, and what is refused.

use crate::client::{ask, post};
use crate::process::Setup;
use crate::upstream::Upstream;

#[test]
fn a_flag_wins_over_the_environment_and_that_over_the_file() {
    let upstream = Upstream::counting();
    let three = Setup::new(&upstream).file("max_body = 10\n");
    let two = three.clone().variable("ONCEKEY_MAX_BODY", "20");
    let one = two.clone().flag("--max-body", "30B");
    for (setup, limit) in [(three, 10), (two, 20), (one, 30)] {
        let gateway = setup.start();
        assert_eq!(ask(gateway.address, post("/", "a", &"x".repeat(limit + 1))).status, 413, "{limit}");
        assert_eq!(ask(gateway.address, post("/", &limit.to_string(), &"x".repeat(limit))).status, 201, "{limit}");
    }
}

#[test]
fn wrong_settings_are_refused_with_the_place_and_what_to_do() {
    let setup = || Setup::for_url("http://127.0.0.1:9");
    for (setup, says) in [
        (setup().file("lease = \"30s\"\nlisten_at = 3\n"), "line 2"),
        (setup().file("[[route]]\npath = \"v1\"\n"), "must begin with /"),
        (setup().file("lease = 30\n"), "line 1"),
        (setup().flag("--scope", "tenant"), "single-tenant"),
        (setup().flag("--lease", "0s"), "lease"),
        (setup().flag("--no-such-flag", "1"), "--no-such-flag"),
        (setup().flag("--admin-listen", "0.0.0.0:0"), "ONCEKEY_ADMIN_TOKEN"),
        (setup().variable("ONCEKEY_ADMIN_TOKEN", "short"), "openssl rand"),
        (setup().flag("--admin-token-file", "/nonexistent"), "/nonexistent"),
        (setup().flag("--config", "/nonexistent.toml"), "/nonexistent.toml"),
        (setup().flag("--tls-cert", "/nonexistent").flag("--tls-key", "/nonexistent"), "tls_cert"),
        (setup().flag("--upstream-ca", "/nonexistent"), "upstream_ca"),
        (setup().flag("--max-bytes", "1MiB"), "max_bytes"),
        (setup().flag("--max-bytes", "1MiB").flag("--check", "--lease=1s"), "max_bytes"),
        (setup().variable("ONCEKEY_LOG", "=loud=").flag("--check", "--lease=1s"), "ONCEKEY_LOG"),
        (setup().flag("--admin-token-file", "/dev/zero"), "/dev/zero"),
        (setup().file("[[route]]\npath = \"/v1?a=b\"\n"), "query"),
        (setup().file("[[route]]\npath = \"/v 1\"\n"), "%xx"),
        (Setup::for_url("127.0.0.1:9000"), "http://127.0.0.1:9000"),
    ] {
        let (code, out, error) = setup.refused();
        assert_eq!((code, out.as_str()), (2, ""), "{says}: {error}");
        assert!(error.contains(says), "{says}: {error}");
    }
}

#[test]
fn settings_are_checked_without_starting() {
    let setup = Setup::for_url("http://127.0.0.1:9").flag("--check", "--lease").flag("10s", "--retention=forever");
    let (code, out, error) = setup.refused();
    assert_eq!((code, out.as_str()), (0, "the settings are fine\n"), "{error}");
    assert!(!setup.data().exists());
}

#[test]
fn a_variable_that_is_no_setting_is_warned_of_without_its_value() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream)
        .variable("ONCEKEY_MAX_BODDY", "1MiB-of-secrets")
        .variable("ONCEKEY_SERVICE_HOST", "10.0.0.1")
        .start();
    gateway.wait_for_log("ONCEKEY_MAX_BODDY");
    gateway.term();
    let (_, log) = gateway.wait();
    assert!(!log.contains("secrets") && !log.contains("ONCEKEY_SERVICE_HOST"), "{log}");
    assert!(!log.contains("\"ONCEKEY_LOG"), "{log}");
}

#[test]
fn no_secret_is_logged() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).flag("--scope", "authorization").variable("ONCEKEY_LOG", "trace").start();
    let headers = [("idempotency-key", "secret-key"), ("authorization", "Bearer secret-token")];
    let request = crate::client::post_with("/path?q=secret-query", &headers, "secret-body");
    assert_eq!(ask(gateway.address, &request).status, 201);
    assert_eq!(ask(gateway.address, &request).status, 201);
    gateway.term();
    let (_, log) = gateway.wait();
    assert!(log.contains("\"path\":\"/path\""), "{log}");
    assert!(!log.contains("secret"), "{}", log.lines().find(|line| line.contains("secret")).unwrap_or_default());
}
