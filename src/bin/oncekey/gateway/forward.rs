//! Which headers pass the gateway, and what it adds.
//!
//! Headers that speak of one connection only don't pass, in either direction: those of RFC 9110, 7.6.1, what `Connection`
//! names, and proxy credentials. `TE: trailers` passes, which gRPC asks for. What a client claims about forwarding isn't
//! believed, but for `X-Forwarded-For`, which its address is added to: whoever reads it has to count from its end.

use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, Entry, HeaderMap, HeaderName, HeaderValue, TE, TRANSFER_ENCODING, UPGRADE,
};
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

/// Makes a client's headers those that the upstream gets, but for `Host`.
///
/// `host` is what the client called the gateway.
pub fn request(headers: &mut HeaderMap, client: &Client, host: Option<HeaderValue>) {
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

/// Whether the body's framing is one that every server reads alike: no encoding, or exactly `chunked`, once; and a length
/// without leading zeros, which some take for octal.
pub fn is_framing_plain(headers: &HeaderMap) -> bool {
    if headers.get_all(CONTENT_LENGTH).iter().any(|length| matches!(length.as_bytes(), [b'0', _, ..])) {
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
            ("x-forwarded-for", "10.0.0.1"),
            ("x-forwarded-for", "10.0.0.2"),
            ("x-forwarded-proto", "ftp"),
            ("x-forwarded-host", "evil"),
            ("forwarded", "for=10.0.0.3"),
        ]);
        request(&mut headers, &client(), Some(HeaderValue::from_static("shop")));
        let all: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        assert_eq!(
            all,
            [
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
    fn only_chunked_once_is_a_plain_framing() {
        assert!(is_framing_plain(&append(&[])));
        assert!(is_framing_plain(&append(&[("transfer-encoding", "Chunked")])));
        for values in
            [&["gzip, chunked"][..], &["chunked", "chunked"], &["chunked, chunked"], &["identity"], &["xchunked"]]
        {
            let lines: Vec<_> = values.iter().map(|value| ("transfer-encoding", *value)).collect();
            assert!(!is_framing_plain(&append(&lines)), "{values:?}");
        }
    }
}
