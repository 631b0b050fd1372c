//! What makes two requests with one key the same request.

use crate::Fingerprint;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::request::Parts;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What makes two requests with one key the same request.
#[derive(Clone)]
pub struct PayloadDigest(DigestOf);

#[derive(Clone)]
enum DigestOf {
    Whole,
    Pointers(Arc<[String]>),
    Own(Arc<FingerprintOf>),
}

type FingerprintOf = dyn Fn(&Parts, &Bytes) -> Fingerprint + Send + Sync;

/// A JSON pointer that RFC 6901 doesn't allow.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no JSON pointer: it has to be empty or begin with a slash, and after a tilde comes 0 or 1")]
pub struct InvalidPointer(String);

/// Opens what is digested, so that a later way of doing it can't be mistaken for this one.
const VERSION: &[u8] = b"oncekey http 1";
/// Levels of a JSON body that are looked into.
const MAX_DEPTH: usize = 64;

impl PayloadDigest {
    /// Method, path, query, content type and body, byte for byte; an empty query or content type is as none.
    pub fn whole() -> Self {
        PayloadDigest(DigestOf::Whole)
    }

    /// Method, path and query, and of a JSON body the values at these pointers (RFC 6901), whatever the order of members
    /// and the space between them. Numbers count as they are written: 1.0 is not 1.
    ///
    /// A body that isn't JSON, or is nested more than 64 levels deep, counts as a whole.
    ///
    /// # Errors
    ///
    /// A text that is no pointer.
    pub fn json_pointers<P: Into<String>>(pointers: impl IntoIterator<Item = P>) -> Result<Self, InvalidPointer> {
        let pointers: Vec<String> = pointers.into_iter().map(Into::into).collect();
        match pointers.iter().find(|pointer| !is_pointer(pointer)) {
            Some(wrong) => Err(InvalidPointer(wrong.clone())),
            None => Ok(PayloadDigest(DigestOf::Pointers(pointers.into()))),
        }
    }

    /// A digest of your own.
    pub fn of(digest: impl Fn(&Parts, &Bytes) -> Fingerprint + Send + Sync + 'static) -> Self {
        PayloadDigest(DigestOf::Own(Arc::new(digest)))
    }

    pub(super) fn fingerprint(&self, parts: &Parts, body: &Bytes) -> Fingerprint {
        let target =
            [parts.method.as_str(), parts.uri.path(), parts.uri.query().unwrap_or_default()].map(str::as_bytes);
        let selected = match &self.0 {
            DigestOf::Own(digest) => return digest(parts, body),
            DigestOf::Whole => None,
            DigestOf::Pointers(pointers) => select(pointers, body),
        };
        if let Some(selected) = selected {
            let parts = selected.iter().map(Vec::as_slice);
            return Fingerprint::of_parts([VERSION, b"json"].into_iter().chain(target).chain(parts));
        }
        let mut types = parts.headers.get_all(CONTENT_TYPE).iter().map(HeaderValue::as_bytes);
        let first_type = types.next().unwrap_or_default();
        let body: &[u8] = body;
        Fingerprint::of_parts([VERSION].into_iter().chain(target).chain([first_type]).chain(types).chain([body]))
    }
}

fn is_pointer(pointer: &str) -> bool {
    (pointer.is_empty() || pointer.starts_with('/'))
        && pointer.split('~').skip(1).all(|rest| rest.starts_with(['0', '1']))
}

/// Each pointer with what is there, if anything is; `None` if the body isn't JSON that can be looked into.
fn select(pointers: &[String], body: &[u8]) -> Option<Vec<Vec<u8>>> {
    let json: &RawValue = serde_json::from_slice(body).ok()?;
    let mut selected = Vec::with_capacity(2 * pointers.len());
    for pointer in pointers {
        let mut value = Vec::new();
        if let Some(found) = find(json, pointer)? {
            write_canonical(found, &mut value, MAX_DEPTH)?;
        }
        selected.push(pointer.clone().into_bytes());
        // Nothing is told from `null`, and from the empty string, which has its quotes.
        selected.push(value);
    }
    Some(selected)
}

type Members<'j> = BTreeMap<Cow<'j, str>, &'j RawValue>;

/// The value that a pointer leads to; the outer `None` if there is something unreadable on the way.
fn find<'j>(json: &'j RawValue, pointer: &str) -> Option<Option<&'j RawValue>> {
    let mut at = json;
    for token in pointer.split('/').skip(1) {
        let next = match at.get().as_bytes().first()? {
            b'{' => {
                let members: Members<'j> = serde_json::from_str(at.get()).ok()?;
                members.get(&*token.replace("~1", "/").replace("~0", "~")).copied()
            }
            b'[' => {
                let items: Vec<&'j RawValue> = serde_json::from_str(at.get()).ok()?;
                let is_index = token == "0" || !token.starts_with('0');
                token.parse().ok().filter(|_: &usize| is_index).and_then(|index: usize| items.get(index).copied())
            }
            _ => None,
        };
        let Some(next) = next else { return Some(None) };
        at = next;
    }
    Some(Some(at))
}

/// Writes a value without space between its parts and with its members in order; `None` if it is nested too deep.
fn write_canonical(json: &RawValue, out: &mut Vec<u8>, depth: usize) -> Option<()> {
    let depth = depth.checked_sub(1)?;
    let text = json.get();
    match text.as_bytes().first()? {
        b'{' => {
            let members: Members<'_> = serde_json::from_str(text).ok()?;
            out.push(b'{');
            for (name, value) in members {
                serde_json::to_writer(&mut *out, &name).ok()?;
                out.push(b':');
                write_canonical(value, out, depth)?;
                out.push(b',');
            }
            out.push(b'}');
        }
        b'[' => {
            let items: Vec<&RawValue> = serde_json::from_str(text).ok()?;
            out.push(b'[');
            for item in items {
                write_canonical(item, out, depth)?;
                out.push(b',');
            }
            out.push(b']');
        }
        b'"' => {
            let text: Cow<'_, str> = serde_json::from_str(text).ok()?;
            serde_json::to_writer(&mut *out, &text).ok()?;
        }
        _ => out.extend(text.as_bytes()),
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(json: &str, pointer: &str) -> Option<String> {
        let mut selected = select(&[pointer.to_owned()], json.as_bytes())?;
        Some(String::from_utf8(selected.remove(1)).unwrap())
    }

    #[test]
    fn values_are_found_as_the_rfc_has_it() {
        // The examples of RFC 6901, section 5.
        let json = r#"{"foo": ["bar", "baz"], "": 0, "a/b": 1, "c%d": 2, "m~n": 8, " ": 7, "k\"l": 6}"#;
        for (pointer, expected) in [
            ("/foo", r#"["bar","baz",]"#),
            ("/foo/0", r#""bar""#),
            ("/foo/00", ""),
            ("/foo/-", ""),
            ("/foo/2", ""),
            ("/", "0"),
            ("/a~1b", "1"),
            ("/c%d", "2"),
            ("/m~0n", "8"),
            ("/ ", "7"),
            ("/k\"l", "6"),
            ("/a~1b/x", ""),
        ] {
            assert_eq!(at(json, pointer).unwrap(), expected, "{pointer}");
        }
        assert_eq!(at(r#" {"b" : [1 , {}], "a": "\u0041" } "#, "").unwrap(), r#"{"a":"A","b":[1,{},],}"#);
    }

    #[test]
    fn long_numbers_are_told_apart() {
        let amounts = ["100000000000000000001", "100000000000000000002", "1.0", "1", "1e0", "0.1000000000000000055"];
        for (nth, amount) in amounts.iter().enumerate() {
            assert_eq!(at(&format!("[{amount}]"), "/0").unwrap(), amounts[nth]);
        }
    }

    #[test]
    fn what_cannot_be_looked_into_counts_as_a_whole() {
        let nested = |depth: usize| [&*"[".repeat(depth), &*"]".repeat(depth)].concat();
        assert!(at(&nested(64), "").is_some());
        assert!(at(&nested(65), "").is_none());
        assert!(at(&nested(200_000), "").is_none());
        for no_json in ["", "{", "nul", "[1] 2", "{\"a\": \u{1}}"] {
            assert!(at(no_json, "").is_none(), "{no_json}");
        }
    }

    #[test]
    fn every_line_of_content_type_counts() {
        let fingerprint = |types: &[&str]| {
            let request =
                types.iter().fold(http::Request::post("/"), |request, &line| request.header(CONTENT_TYPE, line));
            PayloadDigest::whole().fingerprint(&request.body(()).unwrap().into_parts().0, &Bytes::from("b"))
        };
        assert_eq!(fingerprint(&[]), fingerprint(&[""]));
        for other in [&["a/b", "c/d"][..], &["a/bc/d"], &["a/b", ""], &["c/d", "a/b"], &[]] {
            assert_ne!(fingerprint(&["a/b"]), fingerprint(other), "{other:?}");
        }
    }

    #[test]
    fn what_is_no_pointer_is_refused() {
        for wrong in ["amount", "/a~2", "/a~", "~0"] {
            assert!(PayloadDigest::json_pointers([wrong]).is_err(), "{wrong}");
        }
        assert!(PayloadDigest::json_pointers(["", "/", "/a~0~1b"]).is_ok());
    }
}
