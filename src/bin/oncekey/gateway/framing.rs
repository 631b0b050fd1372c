//! Where the messages of an HTTP/1 connection begin and end, to find the shapes that hyper hides: both lengths, and a length written
//! oddly beside the same one written plainly.
//!
//! A request with `Content-Length` and `Transfer-Encoding` is read one way here and another way there by servers that
//! disagree, which is how requests are smuggled past a proxy (RFC 9112, 6.1 and 11.2). hyper takes the chunked reading and
//! drops the other header before a service sees it, so the bytes have to be looked at on their way in. Heads are read by the
//! parser that hyper uses, so that both find the same ends. What neither can read is left alone: hyper refuses it.
//!
//! Bytes are never changed or held back here, and nothing is kept but the beginning of a head that isn't all there yet.

use super::config::MOST_HEADERS;
use super::forward;
use std::mem::MaybeUninit;

/// The state of one connection's incoming bytes.
pub struct Framing {
    state: State,
    /// The head so far, where it comes in pieces.
    partial: Vec<u8>,
    max_head: usize,
    /// Heads that ended.
    heads: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// In a head, or before one.
    Head,
    /// So many bytes of body are left.
    Sized(u64),
    Chunked(Chunk),
    /// HTTP/2, or what hyper refuses.
    Unread,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chunk {
    Size(u64),
    /// After the digits of the size, to the end of the line.
    Extension(u64),
    Data(u64),
    DataEnd,
    /// At the beginning of a line of trailers, or in one.
    TrailerStart,
    Trailer,
}

/// What a head says of the body.
enum Body {
    None,
    Sized(u64),
    Chunked,
    Ambiguous,
}

/// What an HTTP/2 client sends first (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

impl Framing {
    pub fn new(max_head: usize) -> Self {
        Framing { state: State::Head, partial: Vec::new(), max_head, heads: 0 }
    }

    /// Whether a head has begun and isn't all there.
    pub fn is_in_head(&self) -> bool {
        !self.partial.is_empty()
    }

    /// Heads that ended so far.
    pub fn heads(&self) -> u64 {
        self.heads
    }

    /// Whether the bytes are no longer followed.
    pub fn is_unread(&self) -> bool {
        self.state == State::Unread
    }

    /// Takes the next bytes of the connection; the number (from 0) of a head with both lengths, if one ended.
    pub fn take(&mut self, mut bytes: &[u8]) -> Option<u64> {
        while !bytes.is_empty() {
            match self.state {
                State::Unread => return None,
                State::Sized(left) => {
                    let len = left.min(bytes.len() as u64);
                    bytes = &bytes[len as usize..];
                    self.state = if left == len { State::Head } else { State::Sized(left - len) };
                }
                State::Chunked(chunk) => bytes = self.take_chunk(chunk, bytes),
                State::Head => {
                    let (body, rest) = self.take_head(bytes)?;
                    bytes = rest;
                    self.heads += 1;
                    self.state = match body {
                        Body::None | Body::Sized(0) => State::Head,
                        Body::Sized(len) => State::Sized(len),
                        Body::Chunked => State::Chunked(Chunk::Size(0)),
                        Body::Ambiguous => {
                            self.state = State::Unread;
                            return Some(self.heads - 1);
                        }
                    };
                }
            }
        }
        None
    }

    /// The body that a head announces and the bytes after it; `None` where the head isn't all there.
    fn take_head<'b>(&mut self, bytes: &'b [u8]) -> Option<(Body, &'b [u8])> {
        if self.heads == 0 && self.may_be_http_2(bytes) {
            return None;
        }
        if self.partial.is_empty() {
            return match parse(bytes) {
                Parsed::Head(body, len) => Some((body, &bytes[len..])),
                Parsed::Partial => {
                    self.partial.extend_from_slice(bytes);
                    self.give_up_if(self.partial.len() > self.max_head)
                }
                Parsed::Refused => self.give_up_if(true),
            };
        }
        let known = self.partial.len();
        self.partial.extend_from_slice(bytes);
        // Parsing from the start for each byte that trickles in would be quadratic work for a client's linear one.
        if !has_end(&self.partial[known.saturating_sub(3)..]) {
            return self.give_up_if(self.partial.len() > self.max_head);
        }
        match parse(&self.partial) {
            Parsed::Head(body, len) => {
                self.partial = Vec::new();
                Some((body, &bytes[len - known..]))
            }
            Parsed::Partial => self.give_up_if(self.partial.len() > self.max_head),
            Parsed::Refused => self.give_up_if(true),
        }
    }

    /// Whether the connection has begun as those of HTTP/2 do. Until that is certain its bytes are those of a head, with the
    /// time limit of one: hyper has none for a beginning that doesn't go on.
    fn may_be_http_2(&mut self, bytes: &[u8]) -> bool {
        let known = self.partial.len();
        let Some(expected) = PREFACE.get(known..).filter(|_| PREFACE.starts_with(&self.partial)) else { return false };
        if bytes.starts_with(expected) {
            self.partial = Vec::new();
            self.state = State::Unread;
            return true;
        }
        let may_be = expected.starts_with(bytes);
        if may_be {
            self.partial.extend_from_slice(bytes);
        }
        may_be
    }

    fn give_up_if<T>(&mut self, is_hopeless: bool) -> Option<T> {
        if is_hopeless {
            self.partial = Vec::new();
            self.state = State::Unread;
        }
        None
    }

    fn take_chunk<'b>(&mut self, chunk: Chunk, bytes: &'b [u8]) -> &'b [u8] {
        let (byte, rest) = (bytes[0], &bytes[1..]);
        if let Chunk::Data(left) = chunk {
            let len = left.min(bytes.len() as u64);
            self.state = State::Chunked(if left == len { Chunk::DataEnd } else { Chunk::Data(left - len) });
            return &bytes[len as usize..];
        }
        let next = match (chunk, byte) {
            (Chunk::Size(size) | Chunk::Extension(size), b'\n') => {
                Some(if size == 0 { Chunk::TrailerStart } else { Chunk::Data(size) })
            }
            (Chunk::Size(size), _) => match (byte as char).to_digit(16) {
                Some(digit) => size.checked_mul(16).map(|size| Chunk::Size(size | u64::from(digit))),
                None => Some(Chunk::Extension(size)),
            },
            (Chunk::Extension(size), _) => Some(Chunk::Extension(size)),
            (Chunk::DataEnd, b'\r') => Some(Chunk::DataEnd),
            (Chunk::DataEnd, b'\n') => Some(Chunk::Size(0)),
            (Chunk::DataEnd, _) => None,
            (Chunk::TrailerStart, b'\r') => Some(Chunk::TrailerStart),
            (Chunk::TrailerStart, b'\n') => {
                self.state = State::Head;
                return rest;
            }
            (Chunk::Trailer, b'\n') => Some(Chunk::TrailerStart),
            (Chunk::TrailerStart | Chunk::Trailer, _) => Some(Chunk::Trailer),
            (Chunk::Data(_), _) => unreachable!("data is taken above"),
        };
        self.state = next.map_or(State::Unread, State::Chunked);
        rest
    }
}

/// Whether an empty line ends in here, as lines of `\r\n` or `\n` end.
fn has_end(bytes: &[u8]) -> bool {
    bytes.iter().enumerate().any(|(at, &byte)| {
        byte == b'\n' && (bytes[at + 1..].starts_with(b"\n") || bytes[at + 1..].starts_with(b"\r\n"))
    })
}

enum Parsed {
    Head(Body, usize),
    Partial,
    Refused,
}

fn parse(bytes: &[u8]) -> Parsed {
    let mut headers = [const { MaybeUninit::uninit() }; MOST_HEADERS];
    let mut request = httparse::Request::new(&mut []);
    let len = match request.parse_with_uninit_headers(bytes, &mut headers) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Parsed::Partial,
        Err(_) => return Parsed::Refused,
    };
    let (mut length, mut is_encoded, mut is_odd) = (None, false, false);
    for header in request.headers.iter() {
        // Most names differ in length already.
        if header.name.len() == 14 && header.name.eq_ignore_ascii_case("content-length") {
            match std::str::from_utf8(header.value).ok().and_then(|value| value.parse::<u64>().ok()) {
                Some(value) => length = Some(value),
                None => return Parsed::Refused,
            }
            // Of two that are the same number hyper shows one only.
            is_odd |= !forward::is_length_plain(header.value);
        } else if header.name.len() == 17 && header.name.eq_ignore_ascii_case("transfer-encoding") {
            is_encoded = true;
        }
    }
    let body = match (length, is_encoded) {
        (None, false) => Body::None,
        (Some(length), false) if !is_odd => Body::Sized(length),
        (None, true) => Body::Chunked,
        (Some(_), _) => Body::Ambiguous,
    };
    Parsed::Head(body, len)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: &str = "POST / HTTP/1.1\r\nHost: a\r\ncontent-LENGTH: 3\r\nTransfer-Encoding: chunked\r\n\r\n";

    /// What is found when the bytes come in pieces of this size.
    fn found(bytes: &[u8], piece: usize) -> (Option<u64>, u64, bool) {
        let mut framing = Framing::new(8192);
        let found = bytes.chunks(piece).find_map(|piece| framing.take(piece));
        (found, framing.heads(), framing.is_in_head())
    }

    #[test]
    fn a_request_with_both_lengths_is_found_wherever_it_begins() {
        let get = "GET / HTTP/1.1\r\n\r\n";
        let sized = "POST / HTTP/1.1\r\nContent-Length: 20\r\n\r\nGET / HTTP/1.1\r\n\r\n..";
        let chunked = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n\
                       1a;name=value\r\ncontent-length: 3\r\n\r\n12345\r\n0\r\nTrailer: x\r\n\r\n";
        for (number, before) in [
            (0, String::new()),
            (1, get.to_owned()),
            (1, sized.to_owned()),
            (1, chunked.to_owned()),
            (4, format!("{sized}{chunked}\r\n{get}{chunked}")),
        ] {
            let bytes = format!("{before}{BOTH}");
            for piece in [1, 2, 3, 7, 50, 10_000] {
                let (found, heads, _) = found(bytes.as_bytes(), piece);
                assert_eq!((found, heads), (Some(number), number + 1), "{piece} bytes at a time: {bytes}");
            }
        }
    }

    #[test]
    fn a_body_that_looks_like_such_a_request_is_not_one() {
        let len = BOTH.len();
        let sized = format!("POST / HTTP/1.1\r\nContent-Length: {len}\r\n\r\n{BOTH}GET / HTTP/1.1\r\n\r\n");
        let chunked = format!(
            "POST / HTTP/1.1\nTransfer-Encoding: chunked\n\n{len:X}\r\n{BOTH}\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n"
        );
        for bytes in [sized, chunked] {
            for piece in [1, 5, 10_000] {
                assert_eq!(found(bytes.as_bytes(), piece), (None, 2, false), "{piece} bytes at a time: {bytes}");
            }
        }
    }

    #[test]
    fn a_head_that_never_ends_is_not_kept() {
        let mut framing = Framing::new(8192);
        assert_eq!(framing.take(b"GET / HTTP/1.1\r\nx: "), None);
        assert!(framing.is_in_head());
        for _ in 0..100 {
            assert_eq!(framing.take(&[b'a'; 1000]), None);
            assert!(framing.partial.len() <= 8192 + 1000);
        }
        assert!(framing.is_unread() && !framing.is_in_head());
    }

    #[test]
    fn http_2_is_left_alone_once_its_preface_is_there() {
        for piece in 1..PREFACE.len() + 1 {
            let mut framing = Framing::new(8192);
            for (number, part) in PREFACE.chunks(piece).enumerate() {
                assert!(number == 0 || framing.is_in_head());
                assert_eq!(framing.take(part), None);
            }
            assert!(framing.is_unread() && !framing.is_in_head());
        }
        // Methods that begin like it.
        for method in ["P", "PRO", "PRIOR"] {
            let bytes = BOTH.replacen("POST", method, 1);
            for piece in [1, 2, 50, 10_000] {
                assert_eq!(found(bytes.as_bytes(), piece).0, Some(0), "{piece} bytes at a time: {bytes}");
            }
        }
    }
}
