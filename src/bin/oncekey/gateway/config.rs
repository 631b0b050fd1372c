//! What the settings mean together: defaults filled in, ranges checked, files read. Messages say what to do.

use super::routes;
use super::settings::{Keep, LogFormat, Rules, Settings, Span, Survives};
use bytesize::ByteSize;
use http::HeaderName;
use http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use http::uri::{Authority, PathAndQuery, Scheme, Uri};
use oncekey::{Durability, Retention};
use std::fmt::Display;
use std::fs::File;
use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Settings that are fit to start with.
pub struct Config {
    pub target: Target,
    pub listen: SocketAddr,
    pub data: PathBuf,
    pub durability: Durability,
    pub retention: Retention,
    pub lease: Duration,
    pub max_keys: Option<u64>,
    pub max_bytes: Option<u64>,
    pub scope: ScopeFrom,
    pub key_header: HeaderName,
    pub documentation: Option<String>,
    pub limits: Limits,
    pub timeouts: Timeouts,
    pub tls: Option<TlsFiles>,
    pub upstream_ca: Option<PathBuf>,
    pub admin_listen: SocketAddr,
    pub admin_token: Option<Token>,
    pub log_format: LogFormat,
    pub policy: Rules,
    pub routes: Vec<Rules>,
}

/// The upstream's address in the parts that each request's target is made from.
#[derive(Clone, Debug)]
pub struct Target {
    pub scheme: Scheme,
    pub authority: Authority,
    /// Goes before each path; without a slash at its end.
    pub prefix: Option<String>,
}

/// Whose namespace a key belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ScopeFrom {
    Authorization,
    Header(HeaderName),
    SingleTenant,
}

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub max_body: usize,
    pub max_buffered: usize,
    pub max_answer: usize,
    pub max_head: usize,
    pub max_headers: usize,
    pub max_connections: usize,
    pub max_running: usize,
    pub max_streams: u32,
}

#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    pub connect: Duration,
    pub head: Duration,
    pub body: Duration,
    pub answer: Duration,
    pub idle: Duration,
    pub write: Duration,
    pub keep_alive: Duration,
    pub upstream_keep_alive: Duration,
    pub tls: Duration,
    pub drain: Duration,
}

pub struct TlsFiles {
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// What the admin address asks for; never shown.
pub struct Token(String);

impl Token {
    /// Compares in a time that depends on the lengths only.
    pub fn is(&self, given: &[u8]) -> bool {
        subtle::ConstantTimeEq::ct_eq(self.0.as_bytes(), given).into()
    }

    fn new(text: &str, from: &str) -> Result<Self, String> {
        let token = text.trim_end_matches(['\r', '\n']);
        if token.len() < SHORTEST_TOKEN || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(format!(
                "{from} must hold a token of {SHORTEST_TOKEN} or more visible ASCII characters; \
                 make one with `openssl rand -hex 32`"
            ));
        }
        Ok(Token(token.to_owned()))
    }
}

/// The environment variable with the admin token: flags are seen by other users of the machine.
pub const TOKEN_VARIABLE: &str = "ONCEKEY_ADMIN_TOKEN";

const SHORTEST_TOKEN: usize = 16;
/// Of the file with the token, in bytes.
const LONGEST_TOKEN_FILE: u64 = 4096;
const LONGEST_TIME: Duration = Duration::from_secs(24 * 3600);
/// hyper reads heads into a buffer of at least this size.
const SMALLEST_HEAD: usize = 8 * 1024;
/// What the framing check has room for.
pub const MOST_HEADERS: usize = 256;

impl Config {
    /// Reads the file, lays flags and environment over it, and checks the whole.
    pub fn load(given: Settings, file: Option<&Path>) -> Result<Config, String> {
        let from_file = match file {
            None => Settings::default(),
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|error| format!("can't read the settings file {}: {error}", path.display()))?;
                Settings::parse(&text).map_err(|error| format!("settings file {}: {error}", path.display()))?
            }
        };
        let token = match std::env::var(TOKEN_VARIABLE) {
            Ok(token) => Some(token),
            Err(std::env::VarError::NotPresent) => None,
            // The error itself shows the value.
            Err(std::env::VarError::NotUnicode(_)) => return Err(format!("{TOKEN_VARIABLE} is not UTF-8")),
        };
        Config::of(given.or(from_file), token)
    }

    fn of(settings: Settings, token: Option<String>) -> Result<Config, String> {
        let upstream = settings.upstream.ok_or("say where the service is: --upstream http://127.0.0.1:9000")?;
        let retention = settings.retention.unwrap_or(Keep(Retention::For(Duration::from_secs(24 * 3600)))).0;
        let lease = time("lease", settings.lease, Duration::from_secs(30), oncekey::MAX_LEASE)?;
        let timeouts = Timeouts {
            connect: time("connect_timeout", settings.connect_timeout, Duration::from_secs(5), LONGEST_TIME)?,
            head: time("head_timeout", settings.head_timeout, Duration::from_secs(10), LONGEST_TIME)?,
            body: time("body_timeout", settings.body_timeout, Duration::from_secs(30), LONGEST_TIME)?,
            answer: time("answer_timeout", settings.answer_timeout, Duration::from_secs(30), LONGEST_TIME)?,
            idle: time("idle_timeout", settings.idle_timeout, Duration::from_secs(60), LONGEST_TIME)?,
            write: time("write_timeout", settings.write_timeout, Duration::from_secs(60), LONGEST_TIME)?,
            keep_alive: time("keep_alive", settings.keep_alive, Duration::from_secs(60), LONGEST_TIME)?,
            upstream_keep_alive: time(
                "upstream_keep_alive",
                settings.upstream_keep_alive,
                Duration::from_secs(4),
                LONGEST_TIME,
            )?,
            tls: time("tls_timeout", settings.tls_timeout, Duration::from_secs(10), LONGEST_TIME)?,
            drain: time("drain_timeout", settings.drain_timeout, Duration::from_secs(30), LONGEST_TIME)?,
        };
        // The wait for the answer includes connecting: cut short in the middle of that, nothing was sent, yet the key would be
        // held as if it might have been.
        if timeouts.connect >= timeouts.answer {
            return Err(format!(
                "connect_timeout = {} must be shorter than answer_timeout = {}, which includes it",
                humantime::format_duration(timeouts.connect),
                humantime::format_duration(timeouts.answer)
            ));
        }
        let limits = Limits {
            max_body: size("max_body", settings.max_body, ByteSize::mib(1), 0, LARGEST_BODY)?,
            max_buffered: size("max_buffered", settings.max_buffered, ByteSize::mib(256), 0, usize::MAX)?,
            max_answer: size("max_answer", settings.max_answer, ByteSize::mib(1), 0, LARGEST_BODY)?,
            max_head: size("max_head", settings.max_head, ByteSize::kib(64), SMALLEST_HEAD, LARGEST_BODY)?,
            max_headers: count("max_headers", settings.max_headers, 100, MOST_HEADERS)?,
            max_connections: count("max_connections", settings.max_connections, 1024, 1_000_000)?,
            max_running: count("max_running", settings.max_running, 1024, 1_000_000)?,
            max_streams: count("max_streams", settings.max_streams, 100, 100_000)?,
        };
        let tls = match (settings.tls_cert, settings.tls_key) {
            (None, None) => None,
            (Some(cert), Some(key)) => Some(TlsFiles { cert, key }),
            (Some(_), None) => return Err("tls_cert is set without tls_key: set both, or none".to_owned()),
            (None, Some(_)) => return Err("tls_key is set without tls_cert: set both, or none".to_owned()),
        };
        let admin_listen = settings.admin_listen.unwrap_or(SocketAddr::from((Ipv4Addr::LOCALHOST, 8081)));
        let admin_token = admin_token(token, settings.admin_token_file.as_deref())?;
        if !admin_listen.ip().is_loopback() && admin_token.is_none() {
            return Err(format!(
                "admin_listen = {admin_listen} can be reached from outside: set {TOKEN_VARIABLE} or admin_token_file, \
                 or listen on 127.0.0.1"
            ));
        }
        let listen = settings.listen.unwrap_or(SocketAddr::from((Ipv4Addr::LOCALHOST, 8080)));
        if listen == admin_listen && listen.port() != 0 {
            return Err(format!(
                "listen and admin_listen are both {listen}: clients and the admin pages need an address each"
            ));
        }
        let key_header = key_header(settings.key_header.as_deref().unwrap_or("idempotency-key"))?;
        let config = Config {
            target: target(&upstream)?,
            listen,
            data: settings.data.ok_or("say where keys and answers are kept: --data ./data")?,
            durability: settings.durability.unwrap_or(Survives::Synced).into(),
            retention,
            lease,
            max_keys: settings.max_keys,
            max_bytes: settings.max_bytes.map(|size| size.as_u64()),
            scope: scope(settings.scope.as_deref().unwrap_or("authorization"), &key_header)?,
            key_header,
            documentation: settings.documentation.map(|url| documentation(&url)).transpose()?,
            limits,
            timeouts,
            tls,
            upstream_ca: settings.upstream_ca,
            admin_listen,
            admin_token,
            log_format: settings.log_format.unwrap_or(LogFormat::Json),
            policy: settings.policy,
            routes: settings.route,
        };
        if config.max_keys == Some(0) {
            return Err("max_keys = 0 leaves no room for a key: leave it out, or allow some".to_owned());
        }
        routes::Policies::new(&config)?;
        Ok(config)
    }
}

/// Bodies are held in memory, and an answer has to fit a record of the store.
const LARGEST_BODY: usize = 15 * 1024 * 1024;

fn time(name: &str, set: Option<Span>, default: Duration, longest: Duration) -> Result<Duration, String> {
    let Span(time) = set.unwrap_or(Span(default));
    if !(Duration::from_millis(1)..=longest).contains(&time) {
        return Err(format!(
            "{name} = {} must be from 1ms to {}",
            humantime::format_duration(time),
            humantime::format_duration(longest)
        ));
    }
    Ok(time)
}

/// A size in bytes within its range.
pub fn size(name: &str, set: Option<ByteSize>, default: ByteSize, least: usize, most: usize) -> Result<usize, String> {
    let size = set.unwrap_or(default);
    usize::try_from(size.as_u64()).ok().filter(|bytes| (least..=most).contains(bytes)).ok_or_else(|| {
        let [least, most] = [least, most].map(|bytes| ByteSize::b(bytes as u64));
        format!("{name} = {} bytes must be from {least} to {most}", size.as_u64())
    })
}

/// A body's size, which routes set as well.
pub fn body_size(name: &str, set: Option<ByteSize>, default: usize) -> Result<usize, String> {
    size(name, set, ByteSize::b(default as u64), 0, LARGEST_BODY)
}

fn count<T: Copy + PartialOrd + From<u8> + Display>(
    name: &str,
    set: Option<T>,
    default: T,
    most: T,
) -> Result<T, String> {
    let count = set.unwrap_or(default);
    if count < T::from(1) || count > most {
        return Err(format!("{name} = {count} must be from 1 to {most}"));
    }
    Ok(count)
}

/// A header's name as a setting says it.
pub fn header(setting: &str, name: &str) -> Result<HeaderName, String> {
    name.parse().map_err(|_| format!("{setting}: {name:?} is not a header's name"))
}

/// A key's header has to reach the layer as the client sent it, and must mean nothing else to anybody on the way.
fn key_header(name: &str) -> Result<HeaderName, String> {
    let name = header("key_header", name)?;
    let why = if is_of_one_hop(&name) {
        "it speaks of one connection, and is taken out"
    } else if is_set_by_oncekey(&name) {
        "oncekey sets it"
    } else if KEPT_FROM_KEYS.contains(&name) || name.as_str().starts_with("content-") {
        "it has a meaning of its own"
    } else {
        return Ok(name);
    };
    Err(format!("key_header = {name} can't carry keys: {why}; take a header of your own, such as Idempotency-Key"))
}

fn scope_header(name: &str, key_header: &HeaderName) -> Result<HeaderName, String> {
    let name = header("scope", name)?;
    let why = if is_of_one_hop(&name) {
        "it speaks of one connection, and is taken out"
    } else if is_set_by_oncekey(&name) {
        "oncekey sets it"
    } else if [CONTENT_LENGTH, EXPECT].contains(&name) {
        "it speaks of one request"
    } else if name == *key_header {
        "it is the header with the key"
    } else {
        return Ok(name);
    };
    Err(format!(
        "scope = header:{name} can't tell clients apart: {why}; take a header that a proxy before the gateway sets"
    ))
}

/// Headers that requests have for another reason, beside `Content-...`.
const KEPT_FROM_KEYS: [HeaderName; 4] = [HOST, AUTHORIZATION, COOKIE, EXPECT];

fn is_of_one_hop(name: &HeaderName) -> bool {
    [CONNECTION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE].contains(name)
        || name == "keep-alive"
        || name.as_str().starts_with("proxy-")
}

/// Whether the layer or the gateway sets it, in requests to the upstream or in answers.
fn is_set_by_oncekey(name: &HeaderName) -> bool {
    const SET: [&str; 12] = [
        "forwarded",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-proto",
        "idempotency-attempt",
        "idempotency-fence",
        "idempotency-key-expires",
        "idempotency-problem",
        "idempotency-recovery-point",
        "idempotency-replay-unavailable",
        "idempotency-replayed",
        "idempotency-unprotected",
    ];
    SET.contains(&name.as_str())
}

/// A link goes between `<` and `>` of a header.
fn documentation(url: &str) -> Result<String, String> {
    match url.parse::<Uri>() {
        Ok(uri) if uri.scheme().is_some() && !url.contains(['<', '>']) => Ok(url.to_owned()),
        Ok(_) | Err(_) => Err(format!("documentation = {url:?} must be a URL such as https://example.com/idempotency")),
    }
}

fn target(url: &str) -> Result<Target, String> {
    // A password must not get into a log, also where the rest is no URL.
    let shown = if url.contains('@') { String::new() } else { format!("= {url:?} ") };
    let refused =
        |why: &str| format!("upstream {shown}{why}: write it like http://127.0.0.1:9000 or https://host/prefix");
    // The parser takes a fragment off and says nothing of it.
    if url.contains('#') {
        return Err(refused("has a fragment, which is never sent"));
    }
    let uri: Uri = url.parse().map_err(|error| refused(&format!("is not a URL ({error})")))?;
    let parts = uri.into_parts();
    let scheme = parts.scheme.ok_or_else(|| refused("has no scheme"))?;
    if scheme != Scheme::HTTP && scheme != Scheme::HTTPS {
        return Err(refused("is neither http nor https"));
    }
    let authority = parts.authority.ok_or_else(|| refused("has no host"))?;
    if authority.as_str().contains('@') {
        return Err(refused("has a user or password, which are not sent"));
    }
    if authority.host().is_empty() || authority.as_str().ends_with(':') {
        return Err(refused("has no host, or an empty port"));
    }
    let has_port = authority.as_str().strip_prefix(authority.host()).is_some_and(|port| !port.is_empty());
    if has_port && authority.port_u16().is_none_or(|port| port == 0) {
        return Err(refused("has a port that is none"));
    }
    let path = parts.path_and_query.unwrap_or_else(|| PathAndQuery::from_static("/"));
    if path.query().is_some() {
        return Err(refused("has a query, which can't be added to each request's"));
    }
    let prefix = path.path().trim_end_matches('/');
    Ok(Target { scheme, authority, prefix: (!prefix.is_empty()).then(|| prefix.to_owned()) })
}

fn scope(text: &str, key_header: &HeaderName) -> Result<ScopeFrom, String> {
    match text {
        "authorization" => Ok(ScopeFrom::Authorization),
        "single-tenant" => Ok(ScopeFrom::SingleTenant),
        other => match other.strip_prefix("header:") {
            Some(name) => Ok(ScopeFrom::Header(scope_header(name, key_header)?)),
            None => Err(format!("scope = {other:?} must be authorization, single-tenant or header:NAME")),
        },
    }
}

fn admin_token(from_environment: Option<String>, file: Option<&Path>) -> Result<Option<Token>, String> {
    match (from_environment, file) {
        (Some(token), _) => Token::new(&token, TOKEN_VARIABLE).map(Some),
        (None, Some(path)) => {
            let mut text = String::new();
            // A file such as /dev/zero has no end.
            let read = File::open(path).and_then(|file| file.take(LONGEST_TOKEN_FILE + 1).read_to_string(&mut text));
            read.map_err(|error| format!("can't read the admin token's file {}: {error}", path.display()))?;
            let from = format!("the file {}", path.display());
            if text.len() as u64 > LONGEST_TOKEN_FILE {
                return Err(format!(
                    "{from} is longer than {LONGEST_TOKEN_FILE} bytes: it must hold the admin token only"
                ));
            }
            Token::new(&text, &from).map(Some)
        }
        (None, None) => Ok(None),
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Settings that a file says, beside those that every gateway needs.
    pub fn config(file: &str) -> Result<Config, String> {
        let given = Settings {
            upstream: Some("http://127.0.0.1:9000".to_owned()),
            data: Some("data".into()),
            ..Settings::default()
        };
        Config::of(given.or(Settings::parse(file).map_err(|error| error.to_string())?), None)
    }

    fn refusal(file: &str) -> String {
        config(file).err().unwrap_or_else(|| panic!("{file} is accepted"))
    }

    #[test]
    fn the_defaults_are_those_of_the_documentation() {
        let config = config("").unwrap();
        assert_eq!(config.listen.to_string(), "127.0.0.1:8080");
        assert_eq!(config.admin_listen.to_string(), "127.0.0.1:8081");
        assert_eq!(config.durability, Durability::Synced);
        assert_eq!(config.scope, ScopeFrom::Authorization);
        assert_eq!(config.limits.max_body, 1 << 20);
        assert_eq!(config.timeouts.answer, Duration::from_secs(30));
    }

    #[test]
    fn a_setting_out_of_its_range_is_refused_by_name() {
        for (file, says) in [
            ("lease = \"0s\"", "lease"),
            ("max_keys = 0", "max_keys"),
            ("max_head = 100", "max_head"),
            ("max_headers = 257", "max_headers"),
            ("max_connections = 0", "max_connections"),
            ("drain_timeout = \"2days\"", "drain_timeout"),
            ("connect_timeout = \"30s\"", "answer_timeout"),
            ("max_body = \"1GiB\"", "max_body"),
            ("max_buffered = \"1023KiB\"", "max_buffered"),
            ("max_buffered = \"2MiB\"\n[[route]]\npath = \"/\"\nmax_body = \"3MiB\"", "max_buffered"),
            ("scope = \"ip\"", "single-tenant"),
            ("scope = \"header:a b\"", "header"),
            ("key_header = \"\"", "key_header"),
            ("listen = \"127.0.0.1:8081\"", "admin_listen"),
            ("tls_cert = \"cert.pem\"", "tls_key"),
            ("tls_key = \"key.pem\"", "tls_cert"),
            ("admin_listen = \"0.0.0.0:8081\"", TOKEN_VARIABLE),
        ] {
            let message = refusal(file);
            assert!(message.contains(says), "{file}: {message}");
        }
    }

    #[test]
    fn an_upstream_that_cannot_be_meant_is_refused() {
        for url in [
            "127.0.0.1:9000",
            "ftp://host",
            "http://",
            "http://user:secret@host",
            "http://host/?a=b",
            "/path",
            "http://host:",
            "http://host#part",
            "http://host/path#part",
        ] {
            assert!(target(url).is_err(), "{url}");
        }
        assert!(!target("http://user:secret@host").unwrap_err().contains("secret"));
        assert_eq!(target("https://host/api/v2/").unwrap().prefix.as_deref(), Some("/api/v2"));
        assert_eq!(target("http://[::1]:9000").unwrap().prefix, None);
    }

    #[test]
    fn a_header_that_cannot_carry_keys_is_refused_with_the_reason() {
        for (name, why) in [
            ("Host", "meaning of its own"),
            ("Authorization", "meaning of its own"),
            ("Cookie", "meaning of its own"),
            ("Expect", "meaning of its own"),
            ("Content-Length", "meaning of its own"),
            ("Content-Type", "meaning of its own"),
            ("Proxy-Authorization", "one connection"),
            ("Transfer-Encoding", "one connection"),
            ("TE", "one connection"),
            ("Trailer", "one connection"),
            ("Upgrade", "one connection"),
            ("Connection", "one connection"),
            ("Keep-Alive", "one connection"),
            ("Idempotency-Replayed", "oncekey sets it"),
            ("X-Forwarded-For", "oncekey sets it"),
        ] {
            let message = refusal(&format!("key_header = {name:?}"));
            assert!(message.contains("key_header") && message.contains(why), "{name}: {message}");
        }
        assert_eq!(config("key_header = \"X-Request-Id\"").unwrap().key_header, "x-request-id");
    }

    #[test]
    fn a_header_that_cannot_tell_clients_apart_is_refused_with_the_reason() {
        for (name, why) in [
            ("Connection", "one connection"),
            ("Keep-Alive", "one connection"),
            ("Proxy-Authorization", "one connection"),
            ("Transfer-Encoding", "one connection"),
            ("Content-Length", "one request"),
            ("Expect", "one request"),
            ("Idempotency-Key", "the header with the key"),
            ("Idempotency-Attempt", "oncekey sets it"),
        ] {
            let message = refusal(&format!("scope = \"header:{name}\""));
            assert!(message.contains("scope") && message.contains(why), "{name}: {message}");
        }
        assert!(refusal("key_header = \"x-a\"\nscope = \"header:X-A\"").contains("the header with the key"));
        for name in ["x-tenant", "host", "cookie", "idempotency-key"] {
            assert!(config(&format!("key_header = \"x-a\"\nscope = \"header:{name}\"")).is_ok(), "{name}");
        }
    }

    #[test]
    fn a_short_token_is_refused_and_an_open_admin_address_needs_one() {
        assert!(Token::new("secret", "x").is_err());
        assert!(Token::new("0123456789abcdef\u{e9}", "x").is_err());
        let token = Token::new("0123456789abcdef\n", "x").unwrap();
        assert!(token.is(b"0123456789abcdef") && !token.is(b"0123456789abcdeF") && !token.is(b""));

        let open = Settings {
            upstream: Some("http://127.0.0.1:9000".to_owned()),
            data: Some("data".into()),
            admin_listen: Some(SocketAddr::from(([0, 0, 0, 0], 0))),
            ..Settings::default()
        };
        assert!(Config::of(open.clone(), None).is_err());
        assert!(Config::of(open, Some("0123456789abcdef".to_owned())).is_ok());
    }
}
