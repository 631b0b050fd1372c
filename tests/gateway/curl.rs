//! The client that everybody has, and TLS on both sides.

use crate::process::{Gateway, Setup};
use crate::upstream::Upstream;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// What curl wrote: head and body, or why it failed.
fn curl(arguments: &[&str], url: &str) -> Result<String, String> {
    let mut command = Command::new("curl");
    // No settings of the machine, and no proxy.
    command.args(["-q", "--noproxy", "*", "-sS", "-i", "--max-time", "20"]).args(arguments).arg(url);
    let output = command.output().expect("curl is installed");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// A certificate for `localhost`, in files.
struct Identity {
    directory: TempDir,
}

impl Identity {
    fn new() -> Identity {
        let identity = Identity { directory: TempDir::new().unwrap() };
        let mut command = Command::new("openssl");
        command.args(["req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]);
        command.args(["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]);
        command.args(["-addext", "basicConstraints=critical,CA:FALSE", "-out", path(&identity.cert())]);
        let output = command.args(["-keyout", path(&identity.key())]).output().expect("openssl is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        identity
    }

    fn cert(&self) -> PathBuf {
        self.directory.path().join("cert.pem")
    }

    fn key(&self) -> PathBuf {
        self.directory.path().join("key.pem")
    }

    /// A gateway with this certificate.
    fn before(&self, upstream: &Upstream) -> Gateway {
        Setup::new(upstream).flag("--tls-cert", path(&self.cert())).flag("--tls-key", path(&self.key())).start()
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_key_in_quotes_and_one_without_are_the_same_for_curl() {
    let upstream = Upstream::counting();
    let gateway = Setup::new(&upstream).start();
    let url = format!("http://{}/v1/payments", gateway.address);
    for (version, status) in [("--http1.1", "HTTP/1.1 201"), ("--http2-prior-knowledge", "HTTP/2 201")] {
        let key = format!("order{version}");
        let ask = |header: String| curl(&[version, "-H", &header, "-d", "{\"amount\": 100}"], &url).unwrap();
        let first = ask(format!("Idempotency-Key: \"{key}\""));
        assert!(first.starts_with(status) && !first.contains("idempotency-replayed"), "{first}");
        for header in [format!("Idempotency-Key: \"{key}\""), format!("idempotency-key: {key}")] {
            let again = ask(header);
            assert!(again.starts_with(status) && again.contains("idempotency-replayed: true"), "{again}");
            let body = |text: &str| text.split_once("\r\n\r\n").unwrap().1.to_owned();
            assert_eq!(body(&again), body(&first));
        }
    }
    assert_eq!(upstream.seen().len(), 2);
    let refused = curl(&["-H", "Idempotency-Key: \"a\";p=1", "-d", "{}"], &url).unwrap();
    assert!(refused.starts_with("HTTP/1.1 400") && refused.contains("key-invalid"), "{refused}");
    let large = curl(&["-H", "Idempotency-Key: large", "-H", "Expect: 100-continue", "-d", "x=1"], &url).unwrap();
    assert!(large.starts_with("HTTP/1.1 100") && large.contains("HTTP/1.1 201"), "{large}");
}

#[test]
fn curl_speaks_tls_with_the_gateway() {
    let (upstream, identity) = (Upstream::counting(), Identity::new());
    let gateway = identity.before(&upstream);
    let url = format!("https://localhost:{}/pay", gateway.address.port());
    let (cert, key) = (identity.cert(), ["-H", "Idempotency-Key: k", "-d", "{}"]);
    for (version, status) in [("--http2", "HTTP/2 201"), ("--http1.1", "HTTP/1.1 201"), ("--tls-max", "HTTP/2 201")] {
        let version = if version == "--tls-max" { &[version, "1.2"][..] } else { &[version][..] };
        let arguments = [version, &["--cacert", path(&cert)], &key].concat();
        let answer = curl(&arguments, &url).unwrap();
        assert!(answer.starts_with(status) && answer.ends_with("made 0"), "{answer}");
    }
    assert_eq!(upstream.seen().len(), 1);
    assert_eq!(upstream.seen()[0].header("x-forwarded-proto"), Some("https"));
    // Without the certificate it is nobody that can be trusted.
    let stranger = Identity::new();
    assert!(curl(&["--cacert", path(&stranger.cert())], &url).unwrap_err().contains("certificate"));
    // Plain HTTP to it is no request, and it goes on.
    let plain = format!("http://localhost:{}/pay", gateway.address.port());
    assert!(curl(&key, &plain).is_err());
    assert_eq!(upstream.seen().len(), 1);
    assert!(
        curl(&[&["--cacert", path(&cert)], &key[..]].concat(), &url).unwrap().contains("idempotency-replayed: true")
    );
}

#[test]
fn an_https_upstream_is_believed_by_its_certificate_only() {
    let (upstream, identity, stranger) = (Upstream::counting(), Identity::new(), Identity::new());
    // A gateway that speaks TLS is the other one's upstream.
    let inner = identity.before(&upstream);
    let inner_url = format!("https://localhost:{}", inner.address.port());
    let outer = |ca: &Identity| Setup::for_url(&inner_url).flag("--upstream-ca", path(&ca.cert())).start();
    let ask = |gateway: &Gateway| {
        curl(&["-H", "Idempotency-Key: k", "-d", "{}"], &format!("http://{}/pay", gateway.address)).unwrap()
    };
    let distrustful = outer(&stranger);
    for _ in 0..2 {
        let answer = ask(&distrustful);
        assert!(answer.starts_with("HTTP/1.1 502") && answer.contains("upstream-unreachable"), "{answer}");
    }
    assert!(upstream.seen().is_empty());
    let trusting = outer(&identity);
    assert!(ask(&trusting).ends_with("made 0"));
    let again = ask(&trusting);
    assert!(again.contains("idempotency-replayed: true") && again.ends_with("made 0"), "{again}");
    assert_eq!(upstream.seen().len(), 1);
    assert_eq!(inner.metric("oncekey_http_requests_total"), 1);
}
