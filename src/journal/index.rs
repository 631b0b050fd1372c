//! The index: where the table's slots pointed at one time, so that opening a store needn't read the segments that were sealed then.
//!
//! The file `INDEX` holds a chunk for each shard, a directory, and the directory's length in 8 bytes. It counts if the list of
//! segments names the directory's digest, and the directory vouches for the chunks by their checksums. Otherwise, or if anything
//! in it doesn't fit, it is as if there were none: the journal says all that it says.
//!
//! A chunk is a row of entries, each a slot's tag (4 bytes) and its word (8 bytes): phase, reserved or completed, in the low three
//! bits, LSN of the record in the others. The directory:
//!
//! ```text
//! offset size
//!      0    8  magic "ONCEIDX\x01"
//!      8   16  store id
//!     24    8  segment length
//!     32    8  the highest number ever listed
//!     40    8  when the newest record was written by then, Unix ms
//!     48   32  keys of the hash that the tags are from
//!     80    8  what the hash makes of a known key: another build's or processor's may be another one
//!     88    4  number of chunks
//!     92    4  number of segments covered
//!     96    4  number of segments that were in use besides
//!    100    4  zero
//!    104       of each chunk: number of entries (4), CRC-32C of them (4)
//!              of each segment: number (8), offset of its seal (8), bytes of its live records at the most (8), kind (8):
//!              0 reservations, 1 answers, 2 notes of erasures
//!              of each segment in use: number (8), offset up to which it was written (8): one that ends before is an older copy
//! ```
//!
//! All integers are little-endian.

use super::codec::{HEADER, SEGMENT_HEAD, field, long};
use super::media::{Blob, Storage};
use crate::fingerprint::Fingerprint;
use std::sync::Arc;

/// The file's name.
pub(crate) const INDEX_NAME: &str = "INDEX";
const MAGIC: [u8; 8] = *b"ONCEIDX\x01";
const FIXED: usize = 104;
/// Bytes of an entry.
const ENTRY: usize = 12;
const CHUNK: usize = 8;
const SEGMENT: usize = 32;
const IN_USE: usize = 16;
/// Bytes at the end: the directory's length.
const TRAILER: u64 = 8;
/// Bytes of a record with a key, at the least.
pub(crate) const SHORTEST_RECORD: u64 = HEADER as u64 + 8;
/// Bytes of a directory, at the most: 2^16 shards, and the segments that a list has room for.
const LONGEST: usize = FIXED + (1 << 16) * CHUNK + (1 << 20) * (SEGMENT + IN_USE);
/// Entries that are read together.
const PIECE: usize = 16 * 1024;

/// A segment that the index covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Covered {
    pub(crate) number: u64,
    /// Where its seal stands.
    pub(crate) end: u64,
    /// Bytes of its live records, at the most.
    pub(crate) live_bytes: u64,
    pub(crate) holds: Holds,
}

/// What the records of a segment are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Holds {
    Reservations = 0,
    Answers = 1,
    Notes = 2,
}

impl Holds {
    fn from_word(word: u64) -> Option<Holds> {
        [Holds::Reservations, Holds::Answers, Holds::Notes].into_iter().find(|holds| *holds as u64 == word)
    }
}

/// A shard's entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) entries: u32,
    crc: u32,
}

impl Chunk {
    pub(crate) fn of(bytes: &[u8]) -> Chunk {
        Chunk { entries: (bytes.len() / ENTRY) as u32, crc: crc32c::crc32c(bytes) }
    }
}

/// Adds a slot to a chunk.
pub(crate) fn put_entry(chunk: &mut Vec<u8>, tag: u32, word: u64) {
    chunk.extend_from_slice(&tag.to_le_bytes());
    chunk.extend_from_slice(&word.to_le_bytes());
}

/// What an index says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Directory {
    pub(crate) store_id: [u8; 16],
    pub(crate) segment_len: u64,
    /// The highest number ever listed.
    pub(crate) upto: u64,
    /// When the newest record was written by then.
    pub(crate) newest_ms: u64,
    pub(crate) hash_keys: [u64; 4],
    pub(crate) hash_check: u64,
    pub(crate) chunks: Vec<Chunk>,
    /// In order of number.
    pub(crate) segments: Vec<Covered>,
    /// Numbers of the others, and up to where each was written.
    pub(crate) in_use: Vec<(u64, u64)>,
}

impl Directory {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&self.store_id);
        let words = [self.segment_len, self.upto, self.newest_ms].into_iter().chain(self.hash_keys);
        words.chain([self.hash_check]).for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
        let mut put = |word: u32| bytes.extend_from_slice(&word.to_le_bytes());
        put(self.chunks.len() as u32);
        put(self.segments.len() as u32);
        put(self.in_use.len() as u32);
        put(0);
        self.chunks.iter().for_each(|chunk| [chunk.entries, chunk.crc].into_iter().for_each(&mut put));
        for Covered { number, end, live_bytes, holds } in &self.segments {
            [*number, *end, *live_bytes, *holds as u64]
                .iter()
                .for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
        }
        for word in self.in_use.iter().flat_map(|(number, end)| [number, end]) {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// What stands behind the directory.
    pub(crate) fn trailer(encoded: &[u8]) -> [u8; TRAILER as usize] {
        (encoded.len() as u64).to_le_bytes()
    }

    fn decode(bytes: &[u8]) -> Option<Directory> {
        let (fixed, rest) = bytes.split_first_chunk::<FIXED>()?;
        if fixed[..8] != MAGIC {
            return None;
        }
        let store_id = *fixed[8..].first_chunk()?;
        let [chunks, segments, in_use] = [88, 92, 96].map(|at| field(fixed, at) as usize);
        let (chunks, rest) = rest.split_at_checked(chunks * CHUNK)?;
        let (segments, rest) = rest.split_at_checked(segments * SEGMENT)?;
        if rest.len() != in_use * IN_USE {
            return None;
        }
        let chunks = chunks.chunks_exact(CHUNK).map(|chunk| Chunk { entries: field(chunk, 0), crc: field(chunk, 4) });
        let in_use = rest.chunks_exact(IN_USE).map(|bytes| (long(bytes, 0), long(bytes, 8)));
        let segment = |bytes: &[u8]| {
            let [number, end, live_bytes, holds] = [0, 8, 16, 24].map(|at| long(bytes, at));
            Some(Covered { number, end, live_bytes, holds: Holds::from_word(holds)? })
        };
        Some(Directory {
            store_id,
            segment_len: long(fixed, 24),
            upto: long(fixed, 32),
            newest_ms: long(fixed, 40),
            hash_keys: [48, 56, 64, 72].map(|at| long(fixed, at)),
            hash_check: long(fixed, 80),
            chunks: chunks.collect(),
            segments: segments.chunks_exact(SEGMENT).map(segment).collect::<Option<_>>()?,
            in_use: in_use.collect(),
        })
    }

    /// Whether what it says can be.
    fn makes_sense(&self) -> bool {
        let last = self.segment_len.saturating_sub(HEADER as u64);
        let fits = |segment: &Covered| {
            (SEGMENT_HEAD..=last).contains(&segment.end)
                && segment.end.is_multiple_of(8)
                && segment.live_bytes <= segment.end
                && (1..=self.upto).contains(&segment.number)
        };
        self.segments.iter().all(fits) && self.segments.is_sorted_by(|one, next| one.number < next.number)
    }

    /// Number of all entries.
    pub(crate) fn entries(&self) -> u64 {
        self.chunks.iter().map(|chunk| u64::from(chunk.entries)).sum()
    }
}

/// An index that can be read.
#[derive(Debug)]
pub(crate) struct Index {
    blob: Arc<dyn Blob>,
    pub(crate) directory: Directory,
    /// Where each chunk begins.
    starts: Vec<u64>,
}

impl Index {
    /// Opens the index of this digest; `None` if there is none that can be read.
    pub(crate) fn open(storage: &dyn Storage, digest: Fingerprint) -> Option<Index> {
        let blob = storage.open(INDEX_NAME).ok()?;
        let directory_end = blob.len().checked_sub(TRAILER)?;
        let mut trailer = [0; TRAILER as usize];
        blob.read_at(directory_end, &mut trailer).ok()?;
        let start = directory_end.checked_sub(u64::from_le_bytes(trailer))?;
        // A file may be said to be long that holds nothing.
        let len = usize::try_from(directory_end - start).ok().filter(|len| *len <= LONGEST)?;
        let mut bytes = vec![0; len];
        blob.read_at(start, &mut bytes).ok()?;
        let directory = Directory::decode(&bytes).filter(|_| Fingerprint::of(&bytes) == digest)?;
        if !directory.makes_sense() || directory.entries() * ENTRY as u64 != start {
            return None;
        }
        let starts = directory.chunks.iter().scan(0, |at, chunk| {
            let start = *at;
            *at += u64::from(chunk.entries) * ENTRY as u64;
            Some(start)
        });
        let starts = starts.collect();
        Some(Index { blob, directory, starts })
    }

    /// Hands out a chunk's entries, tag and word; `None` if they can't be read, are not those that were written, or `take`
    /// says so. What was handed out then is void.
    pub(crate) fn read_chunk(&self, nth: usize, mut take: impl FnMut(u32, u64) -> Option<()>) -> Option<()> {
        let Chunk { entries, crc } = self.directory.chunks[nth];
        let mut left = entries as usize;
        let (mut at, mut found) = (self.starts[nth], 0);
        let mut piece = vec![0; left.min(PIECE) * ENTRY];
        while left > 0 {
            let count = left.min(PIECE);
            let piece = &mut piece[..count * ENTRY];
            self.blob.read_at(at, piece).ok()?;
            found = crc32c::crc32c_append(found, piece);
            piece.chunks_exact(ENTRY).try_for_each(|entry| take(field(entry, 0), long(entry, 4)))?;
            at += piece.len() as u64;
            left -= count;
        }
        (found == crc).then_some(())
    }
}

/// Overwrites the directory of what is to be removed, as far as that can be: without the keys of the hash its entries tell nothing.
pub(crate) fn make_unreadable(storage: &dyn Storage) {
    let Ok(blob) = storage.open(INDEX_NAME) else { return };
    let mut trailer = [0; TRAILER as usize];
    let Some(end) = blob.len().checked_sub(TRAILER) else { return };
    if blob.read_at(end, &mut trailer).is_ok() {
        let start = end.saturating_sub(u64::from_le_bytes(trailer)).max(end.saturating_sub(LONGEST as u64));
        blob.overwrite(start, &vec![0; (end - start) as usize]).and_then(|()| blob.sync()).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::media::{SimDisk, SimStorage};
    use proptest::prelude::*;

    fn write(disk: &SimDisk, directory: &Directory, chunks: &[Vec<u8>]) -> Fingerprint {
        let encoded = directory.encode();
        let parts = chunks.concat().into_iter().chain(encoded.iter().copied()).chain(Directory::trailer(&encoded));
        disk.put(INDEX_NAME, parts.collect());
        Fingerprint::of(&encoded)
    }

    fn sample(entries: [usize; 2]) -> (Directory, Vec<Vec<u8>>) {
        let chunk = |count: usize| {
            let mut bytes = Vec::new();
            (0..count).for_each(|nth| put_entry(&mut bytes, nth as u32 * 7, 4096 + nth as u64 * 128 + 3));
            bytes
        };
        let chunks = entries.map(chunk).to_vec();
        let covered = |number, holds| Covered { number, end: 60_000, live_bytes: 50_000, holds };
        let directory = Directory {
            store_id: [5; 16],
            segment_len: 64 * 1024,
            upto: 9,
            newest_ms: 77,
            hash_keys: [1, 2, 3, 4],
            hash_check: 99,
            chunks: chunks.iter().map(|bytes| Chunk::of(bytes)).collect(),
            segments: vec![covered(1, Holds::Reservations), covered(4, Holds::Answers), covered(9, Holds::Notes)],
            in_use: vec![(7, 5000), (8, 4096)],
        };
        (directory, chunks)
    }

    fn read(disk: &SimDisk, digest: Fingerprint) -> Option<(Directory, Vec<Vec<u8>>)> {
        let index = Index::open(&SimStorage::open(disk).unwrap(), digest)?;
        let chunk = |nth| {
            let mut bytes = Vec::new();
            index.read_chunk(nth, |tag, word| {
                put_entry(&mut bytes, tag, word);
                Some(())
            })?;
            Some(bytes)
        };
        let chunks = (0..index.directory.chunks.len()).map(chunk).collect::<Option<_>>()?;
        Some((index.directory, chunks))
    }

    #[test]
    fn what_was_written_is_read_also_in_several_pieces() {
        let disk = SimDisk::new();
        for entries in [[0, 0], [3, 0], [700, 2]] {
            let sample = sample(entries);
            let digest = write(&disk, &sample.0, &sample.1);
            assert_eq!(read(&disk, digest), Some(sample));
        }
        assert_eq!(read(&disk, Fingerprint::NONE), None);
        disk.take(INDEX_NAME);
        assert_eq!(read(&disk, Fingerprint::NONE), None);
    }

    #[test]
    fn chunks_longer_than_what_is_read_at_a_time_are_read_whole() {
        let disk = SimDisk::new();
        let (mut directory, _) = sample([0, 0]);
        let mut chunk = Vec::new();
        (0..2 * PIECE as u32 + 1).for_each(|nth| put_entry(&mut chunk, nth, 8));
        directory.segments = (1..=9).map(|number| Covered { number, ..directory.segments[0] }).collect();
        directory.segment_len = 1 << 20;
        directory.segments.iter_mut().for_each(|segment| segment.end = 1 << 19);
        directory.chunks = vec![Chunk::of(&chunk)];
        let digest = write(&disk, &directory, std::slice::from_ref(&chunk));
        assert_eq!(read(&disk, digest), Some((directory, vec![chunk])));
    }

    #[test]
    fn directories_that_make_no_sense_are_none() {
        let disk = SimDisk::new();
        let changes: [fn(&mut Directory); 6] = [
            |directory| directory.segments[0].end = 64,
            |directory| directory.segments[0].end = 65_536,
            |directory| directory.segments[0].end += 4,
            |directory| directory.segments[0].live_bytes = 60_008,
            |directory| directory.segments[1].number = 10,
            |directory| directory.segments.swap(0, 1),
        ];
        for change in changes {
            let (mut directory, chunks) = sample([3, 4]);
            change(&mut directory);
            let digest = write(&disk, &directory, &chunks);
            assert_eq!(read(&disk, digest), None);
        }
    }

    proptest! {
        #[test]
        fn a_file_with_any_byte_changed_or_cut_off_is_none(at in any::<prop::sample::Index>(), bit in 0u8..8, is_cut in any::<bool>()) {
            let disk = SimDisk::new();
            let sample = sample([5, 6]);
            let digest = write(&disk, &sample.0, &sample.1);
            let mut bytes = disk.contents(INDEX_NAME).unwrap();
            let at = at.index(bytes.len());
            match is_cut {
                true => bytes.truncate(at),
                false => bytes[at] ^= 1 << bit,
            }
            disk.put(INDEX_NAME, bytes);
            prop_assert_eq!(read(&disk, digest), None);
        }
    }
}
