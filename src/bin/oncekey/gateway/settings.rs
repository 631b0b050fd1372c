//! Settings as they are written: by flag, by environment variable, or in the file.
//!
//! Each is optional here, so that one place can be laid over another: flags win over the environment, which wins over the
//! file. What they mean together, and their defaults, is in [`config`](super::config).

use bytesize::ByteSize;
use oncekey::{Durability, Retention};
use serde::{Deserialize, Deserializer, de};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// The gateway's settings; the keys of the file are the flags' names with `_` for `-`.
#[derive(Clone, Debug, Default, clap::Args, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The service behind the gateway, such as http://127.0.0.1:9000 or https://api.internal/prefix.
    #[arg(long, env = "ONCEKEY_UPSTREAM", value_name = "URL")]
    pub upstream: Option<String>,
    /// Where clients connect [default: 127.0.0.1:8080]; port 0 takes a free one.
    #[arg(long, env = "ONCEKEY_LISTEN", value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
    /// Directory of the keys and answers, made if need be; one gateway at a time uses it.
    #[arg(long, env = "ONCEKEY_DATA", value_name = "DIRECTORY")]
    pub data: Option<PathBuf>,
    /// What stored answers survive: `synced` a power cut, `buffered` the death of the process [default: synced].
    #[arg(long, env = "ONCEKEY_DURABILITY", value_name = "synced|buffered")]
    pub durability: Option<Survives>,
    /// How long answers are kept: a time such as `24h`, or `forever` [default: 24h].
    #[arg(long, env = "ONCEKEY_RETENTION", value_name = "TIME|forever")]
    pub retention: Option<Keep>,
    /// How long a key stays reserved without a sign of life of its owner [default: 30s].
    #[arg(long, env = "ONCEKEY_LEASE", value_name = "TIME")]
    pub lease: Option<Span>,
    /// Keys held at most; further ones are answered 503 [default: no limit].
    #[arg(long, env = "ONCEKEY_MAX_KEYS", value_name = "COUNT")]
    pub max_keys: Option<u64>,
    /// Bytes of the journal at most, such as `10GiB` [default: no limit].
    #[arg(long, env = "ONCEKEY_MAX_BYTES", value_name = "SIZE")]
    pub max_bytes: Option<ByteSize>,
    /// Whose keys are whose: by `authorization` (the header's value, hashed; requests without one are answered 400), by
    /// `header:NAME`, or `single-tenant` [default: authorization].
    #[arg(long, env = "ONCEKEY_SCOPE", value_name = "SCOPE")]
    pub scope: Option<String>,
    /// Name of the header with the key [default: Idempotency-Key].
    #[arg(long, env = "ONCEKEY_KEY_HEADER", value_name = "NAME")]
    pub key_header: Option<String>,
    /// A page about keys for clients' developers, linked from every problem of the layer.
    #[arg(long, env = "ONCEKEY_DOCUMENTATION", value_name = "URL")]
    pub documentation: Option<String>,

    /// Body of a request with a key at most [default: 1MiB].
    #[arg(long, env = "ONCEKEY_MAX_BODY", value_name = "SIZE")]
    pub max_body: Option<ByteSize>,
    /// Memory that the bodies of requests with keys take together at most; further ones are answered 503 [default: 256MiB].
    #[arg(long, env = "ONCEKEY_MAX_BUFFERED", value_name = "SIZE")]
    pub max_buffered: Option<ByteSize>,
    /// Body of an answer that is stored at most; longer ones pass and can't be replayed [default: 1MiB].
    #[arg(long, env = "ONCEKEY_MAX_ANSWER", value_name = "SIZE")]
    pub max_answer: Option<ByteSize>,
    /// Request line and headers at most [default: 64KiB].
    #[arg(long, env = "ONCEKEY_MAX_HEAD", value_name = "SIZE")]
    pub max_head: Option<ByteSize>,
    /// Header lines of a request at most [default: 100].
    #[arg(long, env = "ONCEKEY_MAX_HEADERS", value_name = "COUNT")]
    pub max_headers: Option<usize>,
    /// Connections of clients at most; further ones wait to be accepted [default: 1024].
    #[arg(long, env = "ONCEKEY_MAX_CONNECTIONS", value_name = "COUNT")]
    pub max_connections: Option<usize>,
    /// Operations under a key that run at a time at most, those whose clients left included [default: 1024].
    #[arg(long, env = "ONCEKEY_MAX_RUNNING", value_name = "COUNT")]
    pub max_running: Option<usize>,
    /// Requests at a time on one HTTP/2 connection [default: 100].
    #[arg(long, env = "ONCEKEY_MAX_STREAMS", value_name = "COUNT")]
    pub max_streams: Option<u32>,

    /// To connect to the upstream, TLS included [default: 5s].
    #[arg(long, env = "ONCEKEY_CONNECT_TIMEOUT", value_name = "TIME")]
    pub connect_timeout: Option<Span>,
    /// For the head of a request to arrive [default: 10s].
    #[arg(long, env = "ONCEKEY_HEAD_TIMEOUT", value_name = "TIME")]
    pub head_timeout: Option<Span>,
    /// For the body of a request with a key; between two parts of any other body [default: 30s].
    #[arg(long, env = "ONCEKEY_BODY_TIMEOUT", value_name = "TIME")]
    pub body_timeout: Option<Span>,
    /// For the upstream to begin its answer [default: 30s].
    #[arg(long, env = "ONCEKEY_ANSWER_TIMEOUT", value_name = "TIME")]
    pub answer_timeout: Option<Span>,
    /// Between two parts of an answer's body [default: 60s].
    #[arg(long, env = "ONCEKEY_IDLE_TIMEOUT", value_name = "TIME")]
    pub idle_timeout: Option<Span>,
    /// For a client to take what it is sent, without any progress [default: 60s].
    #[arg(long, env = "ONCEKEY_WRITE_TIMEOUT", value_name = "TIME")]
    pub write_timeout: Option<Span>,
    /// How long a client's connection stays open without a request [default: 60s].
    #[arg(long, env = "ONCEKEY_KEEP_ALIVE", value_name = "TIME")]
    pub keep_alive: Option<Span>,
    /// How long an unused connection to the upstream is kept: less than the upstream keeps it [default: 4s].
    #[arg(long, env = "ONCEKEY_UPSTREAM_KEEP_ALIVE", value_name = "TIME")]
    pub upstream_keep_alive: Option<Span>,
    /// For a client's TLS handshake [default: 10s].
    #[arg(long, env = "ONCEKEY_TLS_TIMEOUT", value_name = "TIME")]
    pub tls_timeout: Option<Span>,
    /// For requests to finish after SIGTERM or SIGINT [default: 30s].
    #[arg(long, env = "ONCEKEY_DRAIN_TIMEOUT", value_name = "TIME")]
    pub drain_timeout: Option<Span>,

    /// Certificate chain of the listener (PEM); with `tls-key` clients speak TLS.
    #[arg(long, env = "ONCEKEY_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of the listener (PEM).
    #[arg(long, env = "ONCEKEY_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Certificates that an https upstream is checked against, instead of the system's (PEM).
    #[arg(long, env = "ONCEKEY_UPSTREAM_CA", value_name = "FILE")]
    pub upstream_ca: Option<PathBuf>,

    /// Where metrics, health and the dashboard are [default: 127.0.0.1:8081].
    #[arg(long, env = "ONCEKEY_ADMIN_LISTEN", value_name = "ADDRESS")]
    pub admin_listen: Option<SocketAddr>,
    /// File with the token that the admin address asks for; the variable ONCEKEY_ADMIN_TOKEN can hold the token itself.
    #[arg(long, env = "ONCEKEY_ADMIN_TOKEN_FILE", value_name = "FILE")]
    pub admin_token_file: Option<PathBuf>,
    /// Form of the log on standard error [default: json]; ONCEKEY_LOG says what is logged, such as `info` or `debug`.
    #[arg(long, env = "ONCEKEY_LOG_FORMAT", value_name = "json|text")]
    pub log_format: Option<LogFormat>,

    /// What holds for requests that no route says otherwise for.
    #[arg(skip)]
    #[serde(default)]
    pub policy: Rules,
    /// Rules of single routes.
    #[arg(skip)]
    #[serde(default)]
    pub route: Vec<Rules>,
}

/// How requests with keys are treated; what isn't said comes from `[policy]`, then from the defaults.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rules {
    /// In routes only: a path such as `/v1/payments/{id}` or `/v1/{*rest}`.
    pub path: Option<String>,
    /// In routes only: `false` passes everything on untouched.
    pub idempotent: Option<bool>,
    pub methods: Option<Vec<String>>,
    pub required: Option<bool>,
    pub preset: Option<Preset>,
    pub in_flight: Option<Refuse>,
    pub wait: Option<Span>,
    pub interrupted: Option<Interrupted>,
    pub retention: Option<Keep>,
    /// JSON pointers of the parts of the body that tell two requests apart.
    pub fingerprint: Option<Vec<String>>,
    pub max_body: Option<ByteSize>,
    pub max_answer: Option<ByteSize>,
    pub when_unavailable: Option<WhenUnavailable>,
    /// The only headers of an answer that are stored.
    pub store_headers: Option<Vec<String>>,
    /// Headers of an answer that are not stored, beside those that never are.
    pub deny_headers: Option<Vec<String>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    Ietf,
    Stripe,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refuse {
    Refuse,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interrupted {
    Refuse,
    Rerun,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhenUnavailable {
    Refuse,
    Pass,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    Json,
    Text,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Survives {
    Synced,
    Buffered,
}

impl From<Survives> for Durability {
    fn from(survives: Survives) -> Self {
        match survives {
            Survives::Synced => Durability::Synced,
            Survives::Buffered => Durability::Buffered,
        }
    }
}

/// A time such as `10s`, `1m 30s` or `24h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        humantime::parse_duration(text).map(Span).map_err(|error| format!("{error}: write it like 10s, 5m or 24h"))
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(de::Error::custom)
    }
}

/// A time that answers are kept, or `forever`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep(pub Retention);

impl FromStr for Keep {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "forever" {
            return Ok(Keep(Retention::Forever));
        }
        let Span(time) = text.parse().map_err(|error| format!("{error}, or forever"))?;
        if time < Duration::from_millis(1) {
            return Err("a retention is at least 1ms".to_owned());
        }
        Ok(Keep(Retention::For(time)))
    }
}

impl<'de> Deserialize<'de> for Keep {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(de::Error::custom)
    }
}

impl Settings {
    /// Reads a settings file; messages name the line and the key.
    pub fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }

    /// What is set here, and for the rest what is set there.
    pub fn or(self, there: Settings) -> Settings {
        macro_rules! each {
            ($($name:ident)*) => {
                Settings { $($name: self.$name.or(there.$name),)* policy: there.policy, route: there.route }
            };
        }
        each! {
            upstream listen data durability retention lease max_keys max_bytes scope key_header documentation
            max_body max_buffered max_answer max_head max_headers max_connections max_running max_streams
            connect_timeout head_timeout body_timeout answer_timeout idle_timeout write_timeout keep_alive upstream_keep_alive
            tls_timeout drain_timeout tls_cert tls_key upstream_ca admin_listen admin_token_file log_format
        }
    }
}

impl Rules {
    /// What a route says, and for the rest what `[policy]` says.
    pub fn or(&self, policy: &Rules) -> Rules {
        let (own, common) = (self.clone(), policy.clone());
        // Two ways to say the same thing: the route's word is the only one, whichever it is.
        let says_in_flight = own.in_flight.is_some() || own.wait.is_some();
        let says_headers = own.store_headers.is_some() || own.deny_headers.is_some();
        Rules {
            path: own.path,
            idempotent: own.idempotent,
            methods: own.methods.or(common.methods),
            required: own.required.or(common.required),
            preset: own.preset.or(common.preset),
            in_flight: if says_in_flight { own.in_flight } else { common.in_flight },
            wait: if says_in_flight { own.wait } else { common.wait },
            interrupted: own.interrupted.or(common.interrupted),
            retention: own.retention.or(common.retention),
            fingerprint: own.fingerprint.or(common.fingerprint),
            max_body: own.max_body.or(common.max_body),
            max_answer: own.max_answer.or(common.max_answer),
            when_unavailable: own.when_unavailable.or(common.when_unavailable),
            store_headers: if says_headers { own.store_headers } else { common.store_headers },
            deny_headers: if says_headers { own.deny_headers } else { common.deny_headers },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_is_refused_with_its_line() {
        let error = Settings::parse("upstream = \"http://127.0.0.1:9000\"\nlisten_on = \"127.0.0.1:1\"\n").unwrap_err();
        let text = error.to_string();
        assert!(text.contains("line 2") && text.contains("listen_on"), "{text}");

        let error = Settings::parse("[[route]]\npath = \"/a\"\nretries = 3\n").unwrap_err();
        assert!(error.to_string().contains("line 3"), "{error}");
    }

    #[test]
    fn what_is_set_nearer_wins() {
        let flags = Settings { max_keys: Some(1), ..Settings::default() };
        let file = Settings::parse("max_keys = 2\nlease = \"1m\"\n[policy]\nrequired = true\n").unwrap();
        let both = flags.or(file);
        assert_eq!(both.max_keys, Some(1));
        assert_eq!(both.lease, Some(Span(Duration::from_secs(60))));
        assert_eq!(both.policy.required, Some(true));
    }

    #[test]
    fn sizes_and_times_are_read_in_words_and_numbers() {
        let settings = Settings::parse("max_body = \"2MiB\"\nmax_answer = 4096\nretention = \"forever\"\n").unwrap();
        assert_eq!(settings.max_body, Some(ByteSize::mib(2)));
        assert_eq!(settings.max_answer, Some(ByteSize::b(4096)));
        assert_eq!(settings.retention, Some(Keep(Retention::Forever)));
        for wrong in ["lease = \"10\"", "lease = 10", "retention = \"0s\"", "max_body = \"much\"", "max_keys = -1"] {
            assert!(Settings::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_route_that_waits_is_not_told_to_refuse_by_the_common_policy() {
        let file = "[policy]\nin_flight = \"refuse\"\nrequired = true\n[[route]]\npath = \"/a\"\nwait = \"5s\"\n";
        let settings = Settings::parse(file).unwrap();
        let rules = settings.route[0].or(&settings.policy);
        assert_eq!((rules.in_flight, rules.wait), (None, Some(Span(Duration::from_secs(5)))));
        assert_eq!(rules.required, Some(true));
    }
}
