//! Arbitrary bytes as a record, also with the right checksums: no panic, and what was written reads back.
#![no_main]

#[expect(dead_code, reason = "shared with the target that changes whole directories")]
#[path = "../hostile/mod.rs"]
mod hostile;

use libfuzzer_sys::fuzz_target;
use oncekey::testing::{decode_record, encode_record};

fuzz_target!(|input: (u64, u16, Vec<u8>, Vec<u8>, Vec<u8>)| {
    let (segment, place, bytes, key, payload) = input;
    let offset = u64::from(place) * 8;
    decode_record([1; 16], segment, &bytes, offset);

    let mut file = vec![0; offset as usize];
    file.extend_from_slice(&bytes);
    hostile::sign(&mut file, offset as usize, hostile::binding(&[1; 16], segment));
    if let Some((key, payload)) = decode_record([1; 16], segment, &file, offset) {
        assert!(key.len() + payload.len() + 64 <= bytes.len(), "longer than the bytes that are there");
    }

    let key = &key[..key.len().min(1000)];
    let record = encode_record([1; 16], segment, offset, key, &payload);
    file.truncate(offset as usize);
    file.extend_from_slice(&record);
    let read = decode_record([1; 16], segment, &file, offset).expect("a record that was just written");
    assert_eq!(read, (key.to_vec(), payload));
    assert!(decode_record([2; 16], segment, &file, offset).is_none(), "valid in another store");
    assert!(decode_record([1; 16], segment ^ 1, &file, offset).is_none(), "valid in another segment");
});
