//! What was asked, as a digest: the same key with another fingerprint is another request.

use std::fmt;

/// 128-bit digest of a request's payload.
///
/// The default digest is BLAKE3 cut to 128 bits: finding a second payload for a given fingerprint takes about
/// 2^128 tries. Two payloads made to collide take about 2^64 and fool only their own maker's key.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 16]);

impl Fingerprint {
    /// Fingerprint of a request whose payload doesn't matter, so that every payload matches.
    pub const NONE: Fingerprint = Fingerprint([0; 16]);

    /// BLAKE3 of the payload's bytes, cut to 128 bits.
    pub fn of(payload: &[u8]) -> Self {
        Fingerprint::of_parts([payload])
    }

    /// BLAKE3 of several parts; each is length-prefixed, so `["ab", "c"]` differs from `["a", "bc"]`.
    pub fn of_parts<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut hasher = blake3::Hasher::new();
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        let mut digest = [0; 16];
        hasher.finalize_xof().fill(&mut digest);
        Fingerprint(digest)
    }

    /// A digest that the caller computed.
    pub const fn from_bytes(digest: [u8; 16]) -> Self {
        Fingerprint(digest)
    }

    /// The digest's bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({:032x})", u128::from_be_bytes(self.0))
    }
}
