//! What was asked, as a digest: the same key with another fingerprint is another request.

use std::fmt;

/// Bytes of short parts that are hashed together: half of what BLAKE3 takes at a time.
const GATHERED: usize = 512;

/// 128-bit digest of a request's payload.
///
/// The default digest is BLAKE3 cut to 128 bits: finding a second payload for a given fingerprint takes about
/// 2^128 tries. Two payloads made to collide take about 2^64 and fool only their own maker's key.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 16]);

impl Fingerprint {
    /// What requests without a payload to compare have: it matches itself and no other fingerprint.
    pub const NONE: Fingerprint = Fingerprint([0; 16]);

    /// BLAKE3 of the payload's bytes, cut to 128 bits.
    pub fn of(payload: &[u8]) -> Self {
        Fingerprint::cut(blake3::Hasher::new().update(payload))
    }

    /// BLAKE3 of several parts, cut to 128 bits; before each part goes its length as a little-endian `u64`, so that
    /// `["ab", "c"]` differs from `["a", "bc"]`.
    pub fn of_parts<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut hasher = blake3::Hasher::new();
        // Short parts go together: each call costs more than it hashes.
        let mut gathered = [0; GATHERED];
        let mut len = 0;
        for part in parts {
            for piece in [&(part.len() as u64).to_le_bytes(), part] {
                if piece.len() > GATHERED - len {
                    hasher.update(&gathered[..len]);
                    len = 0;
                }
                if piece.len() > GATHERED {
                    hasher.update(piece);
                } else {
                    gathered[len..len + piece.len()].copy_from_slice(piece);
                    len += piece.len();
                }
            }
        }
        Fingerprint::cut(hasher.update(&gathered[..len]))
    }

    fn cut(hasher: &blake3::Hasher) -> Self {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_the_published_digest_cut_to_128_bits() {
        // The digest of no bytes, from the BLAKE3 paper's test vectors.
        let expected = [0xaf, 0x13, 0x49, 0xb9, 0xf5, 0xf9, 0xa1, 0xa6, 0xa0, 0x40, 0x4d, 0xea, 0x36, 0xdc, 0xc9, 0x49];
        assert_eq!(Fingerprint::of(b"").as_bytes(), &expected);
    }

    #[test]
    fn parts_of_any_length_are_hashed_as_documented() {
        let lens = [0, 1, 7, 200, 503, 504, 505, 512, 513, 5000];
        for first in lens {
            for second in lens {
                let parts = [vec![1; first], vec![2; second], vec![3; 9]];
                let whole = parts.iter().flat_map(|part| [&(part.len() as u64).to_le_bytes()[..], part].concat());
                let whole: Vec<u8> = whole.collect();
                assert_eq!(Fingerprint::of_parts(parts.iter().map(Vec::as_slice)), Fingerprint::of(&whole));
            }
        }
    }

    #[test]
    fn parts_are_told_apart() {
        assert_ne!(Fingerprint::of_parts([&b"ab"[..], b"c"]), Fingerprint::of_parts([&b"a"[..], b"bc"]));
        assert_ne!(Fingerprint::of_parts([&b"ab"[..]]), Fingerprint::of(b"ab"));
    }
}
