//! The key that a client sends.

use super::problem::Problem;
use http::header::{AsHeaderName, HeaderMap};
use sfv::{BareItem, Item, Parser};

/// Characters of a key, at most.
pub(super) const MAX_LEN: usize = 255;

/// The key in a request's headers; `None` if there is no such header.
///
/// It is a structured-field string (RFC 9651, section 3.3.3), as the IETF draft for the header has it, or the same characters
/// without quotes, as most clients send it.
///
/// # Errors
///
/// A header that is repeated, empty, too long, or neither form.
pub(super) fn parse(headers: &HeaderMap, name: impl AsHeaderName) -> Result<Option<String>, Problem> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Problem::key_invalid("the header is there more than once"));
    }
    key_of(value.as_bytes()).map(Some)
}

/// The key that a header's value stands for, with or without quotes.
///
/// # Errors
///
/// `key-invalid` for what no request with such a header would be let through with.
///
/// ```
/// # fn main() -> Result<(), oncekey::http::Problem> {
/// assert_eq!(oncekey::http::key_of(b"\"order-42\"")?, oncekey::http::key_of(b"order-42")?);
/// # Ok(())
/// # }
/// ```
pub fn key_of(value: &[u8]) -> Result<String, Problem> {
    let value = value.trim_ascii();
    let key = match value.first() {
        None => return Err(Problem::key_invalid("it is empty")),
        Some(b'"') => unquote(value)?,
        Some(_) if any(value, |byte| matches!(byte, b'"' | b'\\' | b',' | b';')) => {
            return Err(Problem::key_invalid("a quote, backslash, comma or semicolon is only allowed within quotes"));
        }
        Some(_) => match std::str::from_utf8(value) {
            Ok(key) => key.to_owned(),
            Err(_) => return Err(Problem::key_invalid(NOT_VISIBLE)),
        },
    };
    match key.len() {
        0 => Err(Problem::key_invalid("it is empty")),
        1..=MAX_LEN if any(key.as_bytes(), |byte| !byte.is_ascii_graphic()) => Err(Problem::key_invalid(NOT_VISIBLE)),
        1..=MAX_LEN => Ok(key),
        _ => Err(Problem::key_invalid("it is longer than 255 characters")),
    }
}

/// Looks at each byte, which is done to many at a time where a search that ends at the first would go one by one.
fn any(bytes: &[u8], is_it: impl Fn(u8) -> bool) -> bool {
    bytes.iter().fold(false, |any, byte| any | is_it(*byte))
}

const NOT_VISIBLE: &str = "only visible ASCII characters are allowed";

fn unquote(value: &[u8]) -> Result<String, Problem> {
    match Parser::new(value).parse::<Item>() {
        Ok(Item { bare_item: BareItem::String(key), params }) if params.is_empty() => Ok(key.into()),
        Ok(_) => Err(Problem::key_invalid("parameters are not allowed")),
        Err(_) => Err(Problem::key_invalid("it opens with a quote and is no structured-field string")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn parse_one(value: &[u8]) -> Result<Option<String>, Problem> {
        let mut headers = HeaderMap::new();
        headers.insert("idempotency-key", HeaderValue::from_bytes(value).unwrap());
        parse(&headers, "idempotency-key")
    }

    #[test]
    fn with_and_without_quotes_it_is_one_key() {
        for value in [r#""8e03978e-40d5""#, "8e03978e-40d5", "  8e03978e-40d5  "] {
            assert_eq!(parse_one(value.as_bytes()).unwrap().as_deref(), Some("8e03978e-40d5"));
        }
        assert_eq!(parse_one(br#""a\"b\\c,;""#).unwrap().as_deref(), Some(r#"a"b\c,;"#));
        assert_eq!(parse_one(&[b'x'; 255]).unwrap().map(|key| key.len()), Some(255));
        assert!(parse(&HeaderMap::new(), "idempotency-key").unwrap().is_none());
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let long = [&b"\""[..], &[b'x'; 256], b"\""].concat();
        let bad: [&[u8]; 16] = [
            b"",
            b"  ",
            b"\"\"",
            b"\"",
            b"\"a",
            b"\"a\"b",
            b"\"a\";p=1",
            b"\"a\", \"b\"",
            b"a,b",
            b"a b",
            b"\"a b\"",
            b"a;p",
            b"a\"",
            b"a\xffb",
            b"a\tb",
            &long,
        ];
        for value in bad {
            assert!(parse_one(value).is_err(), "{}", value.escape_ascii());
        }
        assert!(parse_one(&[b'x'; 256]).is_err());
    }

    #[test]
    fn a_repeated_header_is_refused_even_if_both_say_the_same() {
        let mut headers = HeaderMap::new();
        headers.append("idempotency-key", HeaderValue::from_static("a"));
        headers.append("idempotency-key", HeaderValue::from_static("a"));
        assert!(parse(&headers, "idempotency-key").is_err());
    }
}
