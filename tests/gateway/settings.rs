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
        (setup().flag("--max-bytes", "511MiB"), "max_bytes"),
        (setup().variable("ONCEKEY_LOG", "oncekey=loud"), "ONCEKEY_LOG"),
        (setup().flag("--admin-token-file", "/dev/zero"), "longer than 4096 bytes"),
        (setup().flag("--admin-token-file", "/dev/null"), "openssl rand"),
        (setup().flag("--key-header", "Authorization"), "key_header"),
        (setup().flag("--scope", "header:Connection"), "scope"),
        (setup().file("[[route]]\npath = \"/v1?a=b\"\n"), "/v1?a=b"),
        (setup().flag("--listen", "127.0.0.1:9").flag("--admin-listen", "127.0.0.1:9"), "admin_listen"),
        (Setup::for_url("http://127.0.0.1:9#part"), "fragment"),
        (Setup::for_url("127.0.0.1:9000"), "http://127.0.0.1:9000"),
    ] {
        let (code, out, error) = setup.refused();
        assert_eq!((code, out.as_str()), (2, ""), "{says}: {error}");
        assert!(error.contains(says), "{says}: {error}");
        assert!(!setup.data().exists(), "{says}");
        // `--check` says the same.
        assert_eq!(setup.flag("--check", "--keep-alive=60s").refused().0, 2, "{says}");
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

#[test]
fn a_variable_that_is_unknown_is_told_by_its_name_only() {
    let gateway = Setup::for_url("http://127.0.0.1:9")
        .variable("ONCEKEY_MAX_BODDY", "secret-value")
        .variable("ONCEKEY_PORT", "tcp://10.0.0.1:80")
        .variable("ONCEKEY_PORT_80_TCP_ADDR", "10.0.0.1")
        .variable("ONCEKEY_SERVICE_HOST", "10.0.0.1")
        .variable("ONCEKEY_LOG", "info")
        .variable("ONCEKEY_ADMIN_TOKEN", "0123456789abcdef")
        .variable("ONCEKEY_LEASE", "30s")
        .start();
    gateway.term();
    let (status, log) = gateway.wait();
    assert!(status.success());
    let warnings: Vec<_> = log.lines().filter(|line| line.contains("\"WARN\"")).collect();
    assert!(matches!(warnings[..], [line] if line.contains("\"variable\":\"ONCEKEY_MAX_BODDY\"")), "{warnings:?}");
    assert!(!log.contains("secret-value"), "{log}");
}
