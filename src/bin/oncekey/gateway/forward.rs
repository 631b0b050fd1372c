//! Which headers and trailers pass the gateway, and what it adds.
//!
//! Headers that speak of one connection only don't pass, in either direction: those of RFC 9110, 7.6.1, what `Connection`
//! names, and proxy credentials. `TE: trailers` passes, which gRPC asks for. What a client claims about forwarding isn't
//! believed, but for `X-Forwarded-For`, which its address is added to: whoever reads it has to count from its end.

use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, Entry, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRANSFER_ENCODING, UPGRADE,
};
use http::uri::Authority;
use http::{Request, Version, header};
use http_body::Frame;
use std::net::IpAddr;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// Of one hop, `Connection` and `TE` aside.
const OF_ONE_HOP: [HeaderName; 6] = [
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    http::header::PROXY_AUTHENTICATE,
    http::header::PROXY_AUTHORIZATION,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// What a receiver needs before the body, or what would be believed without having been checked (RFC 9110, 6.5.1). Beside these,
/// what is [`OF_ONE_HOP`], and whatever describes the body, but for its digest.
const NOT_IN_TRAILERS: [HeaderName; 33] = [
    CONNECTION,
    TE,
    header::TRAILER,
    HOST,
    header::AGE,
    header::AUTHORIZATION,
    header::CACHE_CONTROL,
    COOKIE,
    header::DATE,
    header::EXPECT,
    header::EXPIRES,
    header::FORWARDED,
    FORWARDED_FOR,
    FORWARDED_HOST,
    FORWARDED_PROTO,
    header::IF_MATCH,
    header::IF_MODIFIED_SINCE,
    header::IF_NONE_MATCH,
    header::IF_RANGE,
    header::IF_UNMODIFIED_SINCE,
    header::LOCATION,
    header::MAX_FORWARDS,
    header::PRAGMA,
    HeaderName::from_static("proxy-authentication-info"),
    header::RANGE,
    header::RETRY_AFTER,
    header::SET_COOKIE,
    HeaderName::from_static("set-cookie2"),
    header::VARY,
    header::VIA,
    header::WARNING,
    header::WWW_AUTHENTICATE,
    HeaderName::from_static("authentication-info"),
];

/// What is told of a client's connection.
#[derive(Clone, Debug)]
pub struct Client {
    address: HeaderValue,
    proto: HeaderValue,
}

impl Client {
    pub fn new(address: IpAddr, is_tls: bool) -> Self {
        let text = address.to_canonical().to_string();
        Client {
            address: HeaderValue::try_from(text).expect("an address is made of visible characters"),
            proto: HeaderValue::from_static(if is_tls { "https" } else { "http" }),
        }
    }
}

/// Whether it is clear which host a request asks for: `Host` is there once (RFC 9112, 3.2), says what `:authority` says where
/// there is both (RFC 9113, 8.3.1), and names no user, whose password would be passed on (RFC 9110, 4.2.4).
pub fn is_host_plain<B>(request: &Request<B>) -> bool {
    let mut hosts = request.headers().get_all(HOST).iter().map(HeaderValue::as_bytes);
    let (host, authority) = (hosts.next(), request.uri().authority().map(|authority| authority.as_str().as_bytes()));
    let is_said = match request.version() {
        Version::HTTP_11 => host.is_some(),
        Version::HTTP_2 => host.or(authority).is_some(),
        // Older ones.
        _ => true,
    };
    let is_one = match (host, authority) {
        // A target that is a whole URL wins in HTTP/1 (RFC 9112, 3.2.2).
        (Some(host), Some(authority)) => request.version() != Version::HTTP_2 || host.eq_ignore_ascii_case(authority),
        (Some(_), None) | (None, _) => true,
    };
    is_said && is_one && hosts.next().is_none() && host.into_iter().chain(authority).all(is_authority_plain)
}

/// Whether a length is in digits, without leading zeros, which some take for octal.
pub fn is_length_plain(length: &[u8]) -> bool {
    length.iter().all(u8::is_ascii_digit) && !matches!(length, [] | [b'0', _, ..])
}

/// Whether it is a host, with a port or without, and nothing else. HTTP/1 allows an empty one.
fn is_authority_plain(text: &[u8]) -> bool {
    let Ok(authority) = Authority::try_from(text) else { return text.is_empty() };
    let port = authority.as_str().strip_prefix(authority.host()).unwrap_or_default();
    !text.contains(&b'@') && (matches!(port, "" | ":") || authority.port_u16().is_some())
}

/// Makes a client's headers those that the layer sees, which the upstream gets but for `Host`.
///
/// `authority` is the host that the target says, if it says one.
pub fn request(headers: &mut HeaderMap, client: &Client, authority: Option<HeaderValue>) {
    if let Some(authority) = authority {
        headers.insert(HOST, authority);
    }
    let host = headers.get(HOST).cloned();
    strip(headers);
    // The server has answered `100 Continue` itself.
    headers.remove(http::header::EXPECT);
    headers.remove(http::header::FORWARDED);
    match headers.entry(FORWARDED_FOR) {
        Entry::Vacant(entry) => {
            entry.insert(client.address.clone());
        }
        Entry::Occupied(mut entry) => {
            let mut joined = Vec::new();
            for value in entry.iter().chain([&client.address]) {
                if !joined.is_empty() {
                    joined.extend_from_slice(b", ");
                }
                joined.extend_from_slice(value.as_bytes());
            }
            entry.insert(HeaderValue::from_bytes(&joined).expect("values that are joined by a comma are a value"));
        }
    }
    join(headers, COOKIE, b"; ");
    if headers.get_all(CONTENT_LENGTH).iter().nth(1).is_some() {
        // They say the same, or the server had refused them.
        let length = headers.get(CONTENT_LENGTH).cloned();
        length.map(|length| headers.insert(CONTENT_LENGTH, length));
    }
    headers.insert(FORWARDED_PROTO, client.proto.clone());
    match host {
        Some(host) => headers.insert(FORWARDED_HOST, host),
        None => headers.remove(FORWARDED_HOST),
    };
}

/// Makes the upstream's headers those that the client gets.
pub fn answer(headers: &mut HeaderMap) {
    if headers.contains_key(TRANSFER_ENCODING) {
        // The encoding is what counts (RFC 9112, 6.3), and is taken off here.
        headers.remove(CONTENT_LENGTH);
    }
    strip(headers);
    headers.remove(TE);
}

/// Takes out of trailers what belongs into heads.
pub fn frame<D>(mut frame: Frame<D>) -> Frame<D> {
    if let Some(trailers) = frame.trailers_mut() {
        let misplaced = |name: &&HeaderName| {
            let of_body = name.as_str().starts_with("content-") && *name != "content-digest";
            of_body || OF_ONE_HOP.contains(name) || NOT_IN_TRAILERS.contains(name)
        };
        let names: Vec<HeaderName> = trailers.keys().filter(misplaced).cloned().collect();
        for name in names {
            trailers.remove(name);
        }
    }
    frame
}

/// Whether the body's framing is one that everybody reads alike: a plain length, and no transfer encoding, or exactly `chunked`, once.
pub fn is_framing_plain(headers: &HeaderMap) -> bool {
    if !headers.get_all(CONTENT_LENGTH).iter().all(|length| is_length_plain(length.as_bytes())) {
        return false;
    }
    let mut encodings = headers.get_all(TRANSFER_ENCODING).iter();
    match (encodings.next(), encodings.next()) {
        (None, _) => true,
        (Some(encoding), None) => encoding.as_bytes().eq_ignore_ascii_case(b"chunked"),
        (Some(_), Some(_)) => false,
    }
}

fn strip(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        strip_named(headers);
    }
    for name in OF_ONE_HOP {
        headers.remove(name);
    }
    if headers.contains_key(TE) {
        let takes_trailers = tokens(headers, TE).any(|token| token.eq_ignore_ascii_case(b"trailers"));
        headers.remove(TE);
        if takes_trailers {
            headers.insert(TE, HeaderValue::from_static("trailers"));
        }
    }
}

/// Makes one of several values; HTTP/2 clients send each cookie in a header of its own (RFC 9113, 8.2.3).
fn join(headers: &mut HeaderMap, name: HeaderName, between: &[u8]) {
    if headers.get_all(&name).iter().nth(1).is_none() {
        return;
    }
    let values: Vec<&[u8]> = headers.get_all(&name).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(joined) = HeaderValue::from_bytes(&values.join(between)) {
        headers.insert(name, joined);
    }
}

fn strip_named(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = tokens(headers, CONNECTION)
        .filter(|token| !token.eq_ignore_ascii_case(b"te"))
        .filter_map(|token| HeaderName::from_bytes(token).ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    headers.remove(CONNECTION);
}

fn tokens(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &[u8]> {
    headers
        .get_all(name)
        .into_iter()
        .flat_map(|value| value.as_bytes().split(|&byte| byte == b','))
        .map(<[u8]>::trim_ascii)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn map(lines: &[(&str, &str)]) -> HeaderMap {
        lines
            .iter()
            .map(|(name, value)| (name.parse::<HeaderName>().unwrap(), value.parse::<HeaderValue>().unwrap()))
            .collect()
    }

    fn append(lines: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
        }
        headers
    }

    fn client() -> Client {
        Client::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 7)), true)
    }

    #[test]
    fn headers_of_one_hop_and_those_that_connection_names_do_not_pass() {
        let mut headers = append(&[
            ("connection", "close, X-Secret"),
            ("connection", "x-other"),
            ("x-secret", "1"),
            ("x-other", "2"),
            ("keep-alive", "timeout=5"),
            ("proxy-authorization", "Basic x"),
            ("proxy-connection", "close"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("expect", "100-continue"),
            ("te", "gzip"),
            ("trailer", "x-sum"),
            ("idempotency-key", "k"),
        ]);
        request(&mut headers, &client(), None);
        let left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(
            left,
            ["trailer", "idempotency-key", "x-forwarded-for", "x-forwarded-proto"].map(str::to_owned),
            "{headers:?}"
        );
    }

    #[test]
    fn that_trailers_are_taken_is_passed_on() {
        let mut headers = map(&[("te", "gzip;q=0.5, Trailers"), ("connection", "TE")]);
        request(&mut headers, &client(), None);
        assert_eq!(headers[TE], "trailers");
        answer(&mut headers);
        assert!(!headers.contains_key(TE));
    }

    #[test]
    fn a_client_cannot_claim_where_it_comes_from() {
        let mut headers = append(&[
            ("host", "shop"),
            ("x-forwarded-for", "10.0.0.1"),
            ("x-forwarded-for", "10.0.0.2"),
            ("x-forwarded-proto", "ftp"),
            ("x-forwarded-host", "evil"),
            ("forwarded", "for=10.0.0.3"),
        ]);
        request(&mut headers, &client(), None);
        let all: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        assert_eq!(
            all,
            [
                ("host", "shop"),
                ("x-forwarded-for", "10.0.0.1, 10.0.0.2, 192.0.2.7"),
                ("x-forwarded-proto", "https"),
                ("x-forwarded-host", "shop")
            ]
        );
        headers = map(&[("x-forwarded-host", "evil")]);
        request(&mut headers, &client(), None);
        assert!(!headers.contains_key(FORWARDED_HOST));
    }

    #[test]
    fn the_host_that_is_seen_and_told_is_the_one_that_the_target_says() {
        let mut headers = map(&[("host", "other")]);
        request(&mut headers, &client(), Some(HeaderValue::from_static("said")));
        assert_eq!((&headers[HOST], &headers[FORWARDED_HOST]), (&"said".parse().unwrap(), &"said".parse().unwrap()));
        headers = map(&[("host", "shop")]);
        request(&mut headers, &client(), None);
        assert_eq!((&headers[HOST], &headers[FORWARDED_HOST]), (&"shop".parse().unwrap(), &"shop".parse().unwrap()));
    }

    #[test]
    fn trailers_that_belong_into_a_head_do_not_pass() {
        let misplaced = [
            "content-length",
            "Transfer-Encoding",
            "host",
            "te",
            "trailer",
            "connection",
            "keep-alive",
            "upgrade",
            "authorization",
            "proxy-authenticate",
            "www-authenticate",
            "cookie",
            "set-cookie",
            "content-type",
            "content-encoding",
            "content-range",
            "x-forwarded-for",
            "cache-control",
            "location",
            "retry-after",
        ];
        let right = ["grpc-status", "grpc-message", "x-checksum", "content-digest", "etag", "server-timing"];
        let lines: Vec<_> = misplaced.iter().chain(&right).flat_map(|name| [(*name, "1"), (*name, "2")]).collect();
        let trailers = frame(Frame::<()>::trailers(append(&lines))).into_trailers().unwrap();
        assert!(right.iter().all(|name| trailers.get_all(*name).iter().eq(["1", "2"])), "{trailers:?}");
        assert_eq!(trailers.keys_len(), right.len());
    }

    #[test]
    fn a_host_is_said_once_and_without_a_user() {
        let is_plain = |version, uri: &str, hosts: &[&str]| {
            let request = hosts.iter().fold(Request::builder(), |request, host| request.header("host", *host));
            is_host_plain(&request.version(version).uri(uri).body(()).unwrap())
        };
        for (version, uri, hosts) in [
            (Version::HTTP_10, "/", &[][..]),
            (Version::HTTP_11, "/", &["a"]),
            (Version::HTTP_11, "/", &[""]),
            (Version::HTTP_11, "/", &["[::1]:80"]),
            (Version::HTTP_11, "http://b/", &["a"]),
            (Version::HTTP_2, "http://a:1/", &[]),
            (Version::HTTP_2, "http://a:1/", &["A:1"]),
            (Version::HTTP_2, "/", &["a"]),
        ] {
            assert!(is_plain(version, uri, hosts), "{version:?} {uri} {hosts:?}");
        }
        for (version, uri, hosts) in [
            (Version::HTTP_10, "/", &["a", "a"][..]),
            (Version::HTTP_11, "/", &[]),
            (Version::HTTP_11, "http://a/", &[]),
            (Version::HTTP_11, "/", &["a", "a"]),
            (Version::HTTP_11, "/", &["user:secret@a"]),
            (Version::HTTP_11, "/", &["a b"]),
            (Version::HTTP_11, "/", &["a, b"]),
            (Version::HTTP_11, "/", &["a/b"]),
            (Version::HTTP_11, "/", &["a:99999"]),
            (Version::HTTP_11, "http://user:secret@a/", &["a"]),
            (Version::HTTP_2, "/", &[]),
            (Version::HTTP_2, "http://a/", &["b"]),
            (Version::HTTP_2, "http://a/", &["a", "a"]),
            (Version::HTTP_2, "http://user@a/", &[]),
        ] {
            assert!(!is_plain(version, uri, hosts), "{version:?} {uri} {hosts:?}");
        }
    }

    #[test]
    fn only_chunked_once_is_a_plain_framing() {
        assert!(is_framing_plain(&append(&[])));
        assert!(is_framing_plain(&append(&[("transfer-encoding", "Chunked")])));
        for values in
            [&["gzip, chunked"][..], &["chunked", "chunked"], &["chunked, chunked"], &["identity"], &["xchunked"]]
        {
            let lines: Vec<_> = values.iter().map(|value| ("transfer-encoding", *value)).collect();
            assert!(!is_framing_plain(&append(&lines)), "{values:?}");
        }
        assert!(is_framing_plain(&append(&[("content-length", "0")])));
        for length in ["", "00", "003", "3, 3", "+3", "-1", "3 "] {
            assert!(!is_framing_plain(&append(&[("content-length", length)])), "{length}");
        }
    }
}
