//! Inner parts, for tests, benches and fuzzing only.

pub use crate::journal::media::{DiskOp, SimDisk};
#[cfg(oncekey_planted)]
pub use crate::planted::{Bug, VARIABLE};
pub use crate::wheel::{Due, Step, TimerId, Wheel};

use crate::journal::codec::{Binding, Kind, Meta, RecordRef, encode};
use crate::key::Key;
use crate::state::Phase;
use crate::table::{Shards, Slot, Table, Word, tag_of};

/// The store's table and locks, without journal and wheel: a set of pairs of a hash and the LSN it leads to.
#[derive(Debug)]
pub struct ShardedTable(Shards<Table>);

impl ShardedTable {
    /// An empty one; `shards` is a power of two.
    pub fn new(shards: usize) -> Self {
        ShardedTable(Shards::new(shards, Table::default))
    }

    /// Adds a pair that isn't there yet; an LSN is a multiple of 8 and not 0.
    #[inline]
    pub fn insert(&self, hash: u64, lsn: u64) {
        self.0.of(hash).insert(tag_of(hash), Word::new(Phase::Completed, lsn), u32::MAX);
    }

    /// Whether the pair is there.
    #[inline]
    pub fn contains(&self, hash: u64, lsn: u64) -> bool {
        find(&self.0.of(hash), hash, lsn).is_some()
    }

    /// Takes the pair out; whether it was there.
    #[inline]
    pub fn remove(&self, hash: u64, lsn: u64) -> bool {
        let mut table = self.0.of(hash);
        let found = find(&table, hash, lsn);
        if let Some(at) = found {
            table.remove(at);
        }
        found.is_some()
    }

    /// Bytes of all slots, empty ones included.
    pub fn len_bytes(&self) -> usize {
        let slots = |table: &Table| (0..).take_while(|at| table.get(*at).is_some()).count();
        self.0.iter().map(|table| slots(&table) * size_of::<Slot>()).sum()
    }
}

#[inline]
fn find(table: &Table, hash: u64, lsn: u64) -> Option<usize> {
    table.find(tag_of(hash), |slot| slot.word().lsn() == lsn)
}

/// The bytes of an answer's record.
pub fn encode_record(store_id: [u8; 16], segment: u64, offset: u64, key: &[u8], payload: &[u8]) -> Vec<u8> {
    let key = Key { scope: b"", operation: b"", key };
    let meta = Meta::bare(Kind::Completed, 8, 1);
    let parts = [&key.prefix()[..], key.key];
    encode(Binding::new(&store_id, segment), offset, &meta, &parts, payload, |parts| parts.concat())
}

/// Key and payload of the record at an offset of a segment's bytes, if a whole one is there.
pub fn decode_record(store_id: [u8; 16], segment: u64, bytes: &[u8], offset: u64) -> Option<(Vec<u8>, Vec<u8>)> {
    let record = RecordRef::check(Binding::new(&store_id, segment), bytes, offset).ok()?;
    let key = Key::parse(record.stored_key())?;
    Some((key.key.to_vec(), record.payload().to_vec()))
}
