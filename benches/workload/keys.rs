//! Keys that look random, by number; the comparison with other stores asks for the same.

/// The finalizer of `splitmix64`: a bijection that leaves no pattern.
#[inline]
pub const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Key number `i`: 16 bytes that look random. It serves as the fingerprint too.
#[inline]
pub fn key(i: u64) -> [u8; 16] {
    let low = mix(i.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1));
    let high = mix(low ^ i);
    let mut key = [0; 16];
    key[..8].copy_from_slice(&low.to_le_bytes());
    key[8..].copy_from_slice(&high.to_le_bytes());
    key
}
