//! An HTTP answer as it is stored.
//!
//! Byte layout, version 1, integers little-endian:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 3 | `ohr`, so that what others stored is told apart |
//! | 3 | 1 | version, 1 |
//! | 4 | 2 | status |
//! | 6 | 1 | bit 0: there is a body; bit 1: there are trailers |
//! | 7 | 1 | zero |
//! | 8 | 4 | length of the headers, h |
//! | 12 | 4 | length of the trailers, t |
//! | 16 | h | headers, each: length of the name (2), of the value (4), name, value |
//! | 16 + h | t | trailers, likewise |
//! | 16 + h + t | to the end | body |

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode};
use std::fmt;

const MAGIC: [u8; 4] = *b"ohr\x01";
const HEAD: usize = 16;
const HAS_BODY: u8 = 1;
const HAS_TRAILERS: u8 = 2;
/// What describes a body.
const OF_BODIES: [&str; 9] = [
    "content-digest",
    "content-encoding",
    "content-md5",
    "content-range",
    "content-type",
    "digest",
    "etag",
    "repr-digest",
    "trailer",
];
/// Room for a header's two lengths.
const LENGTHS: usize = 6;
/// Bytes that the headers of most answers take, at most.
const USUAL_HEADERS: usize = 496;

/// An HTTP answer as it is stored and replayed.
///
/// It has no headers that belong to one connection or client; see [`HeaderFilter`](super::HeaderFilter).
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoredAnswer {
    /// The answer's status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body; `None` if that is not stored, such as for its size.
    pub body: Option<Bytes>,
    /// What came after the body, if anything did.
    pub trailers: Option<HeaderMap>,
}

impl StoredAnswer {
    pub(super) fn new(
        status: StatusCode,
        headers: HeaderMap,
        body: Option<Bytes>,
        trailers: Option<HeaderMap>,
    ) -> Self {
        StoredAnswer { status, headers, body, trailers }
    }

    /// Reads the bytes of a [`Record`](crate::Record) that the layer stored; the body is a part of them, without a copy.
    ///
    /// `None` for anything else.
    pub fn decode(stored: Bytes) -> Option<StoredAnswer> {
        let head: [u8; HEAD] = *stored.first_chunk()?;
        let [m0, m1, m2, m3, s0, s1, flags, zero, h0, h1, h2, h3, t0, t1, t2, t3] = head;
        if [m0, m1, m2, m3] != MAGIC || flags & !(HAS_BODY | HAS_TRAILERS) != 0 || zero != 0 {
            return None;
        }
        let headers_len = u32::from_le_bytes([h0, h1, h2, h3]) as usize;
        let trailers_len = u32::from_le_bytes([t0, t1, t2, t3]) as usize;
        let headers_end = HEAD.checked_add(headers_len)?;
        let trailers_end = headers_end.checked_add(trailers_len)?;
        let has_trailers = flags & HAS_TRAILERS != 0;
        let has_body = flags & HAS_BODY != 0;
        if trailers_end > stored.len()
            || (!has_trailers && trailers_len > 0)
            || (!has_body && trailers_end < stored.len())
        {
            return None;
        }
        let trailers = stored.slice(headers_end..trailers_end);
        Some(StoredAnswer {
            status: StatusCode::from_u16(u16::from_le_bytes([s0, s1])).ok()?,
            headers: decode_headers(&stored.slice(HEAD..headers_end))?,
            trailers: if has_trailers { Some(decode_headers(&trailers)?) } else { None },
            body: has_body.then(|| stored.slice(trailers_end..)),
        })
    }

    /// The stored form; `None` if the headers are too long for it.
    pub(super) fn encode(&self) -> Option<Vec<u8>> {
        encode(self.status, self.headers.iter(), self.body.as_deref(), self.trailers.as_ref().map(HeaderMap::iter))
    }

    /// Takes out what describes a body that isn't there.
    pub(super) fn without_body(mut self) -> Self {
        for name in OF_BODIES {
            self.headers.remove(name);
        }
        StoredAnswer { body: None, trailers: None, ..self }
    }

    /// What a client gets of it.
    pub(super) fn into_response(self) -> Response<super::Body> {
        let mut response =
            Response::new(super::Body::whole(self.body.unwrap_or_default(), self.trailers.map(Box::new)));
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        response
    }
}

impl fmt::Debug for StoredAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let body_len = self.body.as_ref().map(Bytes::len);
        f.debug_struct("StoredAnswer")
            .field("status", &self.status)
            .field("body_len", &body_len)
            .finish_non_exhaustive()
    }
}

/// A header or trailer.
type Field<'h> = (&'h HeaderName, &'h HeaderValue);

/// The stored form of an answer; `None` if the headers are too long for it.
pub(super) fn encode<'h>(
    status: StatusCode,
    headers: impl Iterator<Item = Field<'h>>,
    body: Option<&[u8]>,
    trailers: Option<impl Iterator<Item = Field<'h>>>,
) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(HEAD + USUAL_HEADERS + body.map_or(0, <[u8]>::len));
    let has_body = if body.is_some() { HAS_BODY } else { 0 };
    let has_trailers = if trailers.is_some() { HAS_TRAILERS } else { 0 };
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&status.as_u16().to_le_bytes());
    bytes.extend_from_slice(&[has_body | has_trailers, 0]);
    // The lengths, which are known once it is all there.
    bytes.extend_from_slice(&[0; 8]);
    let headers_len = encode_headers(headers, &mut bytes)?;
    let trailers_len = trailers.map_or(Some([0; 4]), |trailers| encode_headers(trailers, &mut bytes))?;
    bytes[8..12].copy_from_slice(&headers_len);
    bytes[12..16].copy_from_slice(&trailers_len);
    let body = body.unwrap_or_default();
    // Exactly, in case that the headers took some of its room.
    bytes.reserve_exact(body.len());
    bytes.extend_from_slice(body);
    Some(bytes)
}

/// Appends them, and returns how many bytes that were.
fn encode_headers<'h>(headers: impl Iterator<Item = Field<'h>>, bytes: &mut Vec<u8>) -> Option<[u8; 4]> {
    let start = bytes.len();
    for (name, value) in headers {
        bytes.extend_from_slice(&u16::try_from(name.as_str().len()).ok()?.to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(value.len()).ok()?.to_le_bytes());
        bytes.extend_from_slice(name.as_str().as_bytes());
        bytes.extend_from_slice(value.as_bytes());
    }
    u32::try_from(bytes.len() - start).ok().map(u32::to_le_bytes)
}

fn decode_headers(stored: &Bytes) -> Option<HeaderMap> {
    let mut headers = HeaderMap::new();
    let mut at = 0;
    while at < stored.len() {
        let &[n0, n1, v0, v1, v2, v3] = stored[at..].first_chunk::<LENGTHS>()?;
        let name_at = at + LENGTHS;
        let value_at = name_at.checked_add(usize::from(u16::from_le_bytes([n0, n1])))?;
        let end = value_at.checked_add(u32::from_le_bytes([v0, v1, v2, v3]) as usize)?;
        if end > stored.len() {
            return None;
        }
        let name = HeaderName::from_bytes(&stored[name_at..value_at]).ok()?;
        let value = HeaderValue::from_maybe_shared(stored.slice(value_at..end)).ok()?;
        headers.try_append(name, value).ok()?;
        at = end;
    }
    Some(headers)
}

/// Which headers of an answer are stored.
///
/// Never stored, whatever the filter says, are those that belong to one connection (RFC 9110, section 7.6.1, and those that
/// `Connection` names), `Set-Cookie`, `Authorization`, `Proxy-Authorization`, and `Content-Length`, which follows from the body;
/// so a replay to `HEAD`, or of a 304, has none.
#[derive(Clone, Debug)]
pub struct HeaderFilter {
    names: Vec<HeaderName>,
    allows: bool,
}

const NEVER: [HeaderName; 12] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::SET_COOKIE,
    HeaderName::from_static("set-cookie2"),
    header::AUTHORIZATION,
    header::CONTENT_LENGTH,
];

impl HeaderFilter {
    /// Stores all headers but these.
    pub fn deny(names: impl IntoIterator<Item = HeaderName>) -> Self {
        HeaderFilter { names: names.into_iter().collect(), allows: false }
    }

    /// Stores these headers only.
    pub fn allow(names: impl IntoIterator<Item = HeaderName>) -> Self {
        HeaderFilter { names: names.into_iter().collect(), allows: true }
    }

    /// What is to be stored of an answer's headers or trailers.
    pub(super) fn kept<'h>(&self, headers: &'h HeaderMap) -> impl Iterator<Item = Field<'h>> {
        let named: Vec<HeaderName> = headers
            .get_all(header::CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(|name| name.trim().parse().ok())
            .collect();
        let is_kept =
            move |name| !NEVER.contains(name) && !named.contains(name) && self.names.contains(name) == self.allows;
        headers.iter().filter(move |(name, _)| is_kept(name))
    }

    /// As [`kept`](Self::kept).
    pub(super) fn apply(&self, headers: &HeaderMap) -> HeaderMap {
        self.kept(headers).map(|(name, value)| (name.clone(), value.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> StoredAnswer {
        let mut headers = HeaderMap::new();
        headers.append("x-a", HeaderValue::from_static("1"));
        headers.append("x-a", HeaderValue::from_bytes(b"\xff").unwrap());
        headers.append("content-type", HeaderValue::from_static("text/plain"));
        let mut trailers = HeaderMap::new();
        trailers.append("grpc-status", HeaderValue::from_static("0"));
        StoredAnswer::new(StatusCode::CREATED, headers, Some(Bytes::from_static(b"body")), Some(trailers))
    }

    #[test]
    fn an_answer_comes_back_as_it_was_and_its_body_is_not_copied() {
        let whole = answer();
        let stored = Bytes::from(whole.encode().unwrap());
        let back = StoredAnswer::decode(stored.clone()).unwrap();
        assert_eq!(back, whole);
        assert_eq!(back.body.unwrap().as_ptr(), stored[stored.len() - 4..].as_ptr());
        let bare = StoredAnswer::new(StatusCode::NO_CONTENT, HeaderMap::new(), Some(Bytes::new()), None);
        assert_eq!(StoredAnswer::decode(bare.encode().unwrap().into()).unwrap(), bare);
        let cut = answer().without_body();
        assert_eq!(StoredAnswer::decode(cut.encode().unwrap().into()).unwrap(), cut);
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        let mut headers = HeaderMap::new();
        headers.append("a", HeaderValue::from_static("bc"));
        let answer = StoredAnswer::new(StatusCode::OK, headers, Some(Bytes::from_static(b"!")), None);
        let expected = b"ohr\x01\xc8\x00\x01\x00\x09\x00\x00\x00\x00\x00\x00\x00\x01\x00\x02\x00\x00\x00abc!";
        assert_eq!(answer.encode().unwrap(), expected);
    }

    #[test]
    fn bytes_that_are_no_answer_are_refused() {
        let whole = answer().encode().unwrap();
        for len in 0..whole.len() - 4 {
            assert!(StoredAnswer::decode(whole[..len].to_vec().into()).is_none(), "{len}");
        }
        for at in 0..HEAD {
            for bit in 0..8 {
                let mut bad = whole.clone();
                bad[at] ^= 1 << bit;
                assert!(StoredAnswer::decode(bad.into()).is_none_or(|back| back != answer()), "{at}.{bit}");
            }
        }
    }

    #[test]
    fn headers_of_a_connection_or_client_are_never_stored() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, X-Hop"),
            ("x-hop", "1"),
            ("transfer-encoding", "chunked"),
            ("set-cookie", "a=b"),
            ("authorization", "secret"),
            ("x-kept", "1"),
            ("x-denied", "1"),
        ] {
            headers.append(name, HeaderValue::from_static(value));
        }
        let kept = HeaderFilter::deny([HeaderName::from_static("x-denied")]).apply(&headers);
        assert_eq!(kept.keys().collect::<Vec<_>>(), ["x-kept"]);
        let all = headers.keys().filter(|name| *name != "x-kept").cloned();
        assert!(HeaderFilter::allow(all).apply(&headers).keys().eq(["x-denied"]));
    }
}
