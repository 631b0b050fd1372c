//! What a caller asks with: the key, its namespace, the payload's fingerprint, and how long things hold.

use crate::fingerprint::Fingerprint;
use std::fmt;
use std::hash::Hasher;
use std::time::Duration;

/// How long an answer is kept, counted from the moment it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Retention {
    /// At least 1 ms; lengths beyond the end of time are cut to it.
    For(Duration),
    /// Until it is erased.
    Forever,
}

/// What an acknowledged operation survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Durability {
    /// The death of the process: `kill -9`, a panic, the out-of-memory killer.
    Buffered,
    /// A power cut too: the call returns after an `fdatasync` that covers it, shared by all who wait. So does a call that is
    /// given the answer of a `Buffered` one.
    Synced,
}

/// One request to run an operation at most once.
///
/// The identity of an operation is the triple of scope, operation and key; the parts are stored length-prefixed, so
/// that `("ab", "c")` and `("a", "bc")` never meet. Settings that aren't given come from the store's
/// [`Builder`](crate::Builder).
///
/// ```
/// use oncekey::{Request, Retention};
/// use std::time::Duration;
///
/// let request = Request::new("order-42")
///     .scope("acme")
///     .operation("charge")
///     .fingerprint_of(br#"{"amount": 100}"#)
///     .retention(Retention::For(Duration::from_secs(3600)));
/// # let _ = request;
/// ```
#[derive(Clone, Copy)]
pub struct Request<'a> {
    pub(crate) key: Key<'a>,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) retention: Option<Retention>,
    pub(crate) lease: Option<Duration>,
    pub(crate) durability: Option<Durability>,
    pub(crate) wait: Option<Duration>,
    pub(crate) auto_renew: bool,
}

impl<'a> Request<'a> {
    /// A request by the client's idempotency key, 1 byte to `max_key_len` bytes together with scope and operation.
    pub fn new<K: AsRef<[u8]> + ?Sized>(key: &'a K) -> Self {
        Request {
            key: Key { scope: b"", operation: b"", key: key.as_ref() },
            fingerprint: Fingerprint::NONE,
            retention: None,
            lease: None,
            durability: None,
            wait: None,
            auto_renew: false,
        }
    }

    /// The tenant: equal keys of two scopes are two keys, and [`erase_scope`](crate::Store::erase_scope) takes one.
    pub fn scope<S: AsRef<[u8]> + ?Sized>(mut self, scope: &'a S) -> Self {
        self.key.scope = scope.as_ref();
        self
    }

    /// The operation within the scope, such as a method and route.
    pub fn operation<S: AsRef<[u8]> + ?Sized>(mut self, operation: &'a S) -> Self {
        self.key.operation = operation.as_ref();
        self
    }

    /// The digest of what is asked; the same key with another fingerprint is answered with a mismatch.
    pub fn fingerprint(mut self, fingerprint: Fingerprint) -> Self {
        self.fingerprint = fingerprint;
        self
    }

    /// Takes the [`Fingerprint`] of the payload.
    pub fn fingerprint_of<P: AsRef<[u8]> + ?Sized>(self, payload: &P) -> Self {
        self.fingerprint(Fingerprint::of(payload.as_ref()))
    }

    /// How long the answer is kept.
    pub fn retention(mut self, retention: Retention) -> Self {
        self.retention = Some(retention);
        self
    }

    /// How long the reservation holds without renewal: 1 ms to [`MAX_LEASE`](crate::MAX_LEASE).
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = Some(lease);
        self
    }

    /// What the reservation and its completion survive.
    pub fn durability(mut self, durability: Durability) -> Self {
        self.durability = Some(durability);
        self
    }

    /// How long [`run`](crate::Store::run) waits for another caller's answer.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    /// Keeps the lease from running out while the reservation is alive in this process.
    ///
    /// An owner that hangs then holds its key until it is dropped or the process dies.
    pub fn auto_renew(mut self, on: bool) -> Self {
        self.auto_renew = on;
        self
    }
}

impl fmt::Debug for Request<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("key_len", &self.key.len())
            .field("fingerprint", &self.fingerprint)
            .field("retention", &self.retention)
            .field("lease", &self.lease)
            .field("durability", &self.durability)
            .finish_non_exhaustive()
    }
}

/// The identity of an operation, in parts, so that neither hashing nor comparing it needs a copy.
///
/// Stored form: scope length and operation length as two little-endian `u16`, then scope, operation, key.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key<'a> {
    pub(crate) scope: &'a [u8],
    pub(crate) operation: &'a [u8],
    pub(crate) key: &'a [u8],
}

/// Bytes that the stored form adds to the three parts.
pub(crate) const KEY_PREFIX: usize = 4;

impl<'a> Key<'a> {
    /// Bytes of the three parts.
    pub(crate) fn len(&self) -> usize {
        self.scope.len() + self.operation.len() + self.key.len()
    }

    pub(crate) fn stored_len(&self) -> usize {
        KEY_PREFIX + self.len()
    }

    /// The two lengths that open the stored form; the caller has checked that they fit.
    pub(crate) fn prefix(&self) -> [u8; KEY_PREFIX] {
        let scope = (self.scope.len() as u16).to_le_bytes();
        let operation = (self.operation.len() as u16).to_le_bytes();
        [scope[0], scope[1], operation[0], operation[1]]
    }

    pub(crate) fn stored(&self) -> Vec<u8> {
        [&self.prefix()[..], self.scope, self.operation, self.key].concat()
    }

    /// Reads the stored form back; `None` if its lengths don't fit in it.
    pub(crate) fn parse(stored: &'a [u8]) -> Option<Self> {
        let (prefix, parts) = stored.split_first_chunk::<KEY_PREFIX>()?;
        let scope_len = usize::from(u16::from_le_bytes([prefix[0], prefix[1]]));
        let operation_len = usize::from(u16::from_le_bytes([prefix[2], prefix[3]]));
        let (scope, rest) = parts.split_at_checked(scope_len)?;
        let (operation, key) = rest.split_at_checked(operation_len)?;
        Some(Key { scope, operation, key })
    }

    #[inline]
    pub(crate) fn matches(&self, stored: &[u8]) -> bool {
        let Some((prefix, parts)) = stored.split_first_chunk::<KEY_PREFIX>() else { return false };
        if *prefix != self.prefix() || parts.len() != self.len() {
            return false;
        }
        let (scope, rest) = parts.split_at(self.scope.len());
        let (operation, key) = rest.split_at(self.operation.len());
        // Most have neither scope nor operation, and no comparison is cheaper than one of nothing.
        key == self.key
            && (scope.is_empty() || scope == self.scope)
            && (operation.is_empty() || operation == self.operation)
    }

    #[inline]
    pub(crate) fn hash_into(&self, hasher: &mut impl Hasher) {
        hasher.write_u64((self.scope.len() as u64) << 32 | self.operation.len() as u64);
        if !self.scope.is_empty() {
            hasher.write(self.scope);
        }
        if !self.operation.is_empty() {
            hasher.write(self.operation);
        }
        hasher.write(self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(key: &Key<'_>) -> Vec<u8> {
        [&key.prefix()[..], key.scope, key.operation, key.key].concat()
    }

    #[test]
    fn parts_that_join_to_the_same_bytes_are_different_keys() {
        let one = Key { scope: b"ab", operation: b"", key: b"c" };
        let two = Key { scope: b"a", operation: b"b", key: b"c" };
        let three = Key { scope: b"a", operation: b"", key: b"bc" };
        assert!(one.matches(&stored(&one)));
        assert!(!one.matches(&stored(&two)));
        assert!(!one.matches(&stored(&three)));
        assert!(!two.matches(&stored(&three)));
        for other in [Key { scope: b"az", ..one }, Key { operation: b"z", ..one }, Key { key: b"z", ..one }] {
            assert!(!one.matches(&stored(&other)));
        }
    }

    #[test]
    fn a_stored_key_whose_lengths_overrun_it_is_refused() {
        assert!(Key::parse(&[1, 0, 0, 0]).is_none());
        assert!(Key::parse(&[0, 0, 2, 0, b'x']).is_none());
        assert!(Key::parse(&[0, 0, 0]).is_none());
        assert!(Key::parse(&[0, 0, 0, 0]).is_some());
    }
}
