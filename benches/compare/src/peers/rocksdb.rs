//! RocksDB, the shared library of Debian's librocksdb-dev: a lock on the key's stripe around `get_pinned` and `put`,
//! cheaper than an optimistic transaction.
//!
//! The log is in the page cache when `put` returns (`kill -9` safe, the default); `sync` is set for power-loss safe,
//! where concurrent writers share syncs. Bloom filters of ten bits a key, the other settings as they come.

use crate::cell::Level;
use crate::peer::{Decision, Load, Peer, Result, Session, Setup, Stripes, record};
use crate::workload::Watch;
use ::rocksdb::{BlockBasedOptions, DB, Options, WriteBatch, WriteOptions};
use oncekey::Clock;
use std::sync::Arc;

pub struct Rocksdb {
    keys: DB,
    stripes: Stripes,
    is_synced: bool,
    watch: Arc<Watch>,
}

pub struct RocksdbSession<'a> {
    peer: &'a Rocksdb,
    write: WriteOptions,
    buffer: Vec<u8>,
}

impl Peer for Rocksdb {
    type Session<'a> = RocksdbSession<'a>;

    fn open(setup: &Setup) -> Result<Self> {
        let mut blocks = BlockBasedOptions::default();
        blocks.set_bloom_filter(10.0, false);
        let mut options = Options::default();
        options.create_if_missing(true);
        options.set_block_based_table_factory(&blocks);
        let keys = DB::open(&options, setup.dir.join("rocksdb"))?;
        let is_synced = setup.level == Level::Power;
        Ok(Rocksdb { keys, stripes: Stripes::new(), is_synced, watch: Arc::clone(&setup.watch) })
    }

    fn load(&self, load: &Load<'_>) -> Result<()> {
        let mut batch = WriteBatch::default();
        load.each_record(|key, record| {
            batch.put(key, record);
            Ok(())
        })?;
        Ok(self.keys.write(batch)?)
    }

    fn session(&self) -> RocksdbSession<'_> {
        let mut write = WriteOptions::default();
        write.set_sync(self.is_synced);
        RocksdbSession { peer: self, write, buffer: Vec::new() }
    }
}

impl Session for RocksdbSession<'_> {
    type Ticket = ();

    fn reserve(&mut self, key: &[u8], fingerprint: &[u8; 16]) -> Decision<()> {
        let peer = self.peer;
        let now_ms = peer.watch.now_ms();
        let _lock = peer.stripes.lock(key);
        let found = peer.keys.get_pinned(key).expect("RocksDB is good");
        if let Some(decision) = found.and_then(|found| record::read(&found, fingerprint, now_ms)) {
            return decision;
        }
        peer.keys.put_opt(key, record::reserved(fingerprint, now_ms), &self.write).expect("RocksDB is good");
        Decision::Fresh(())
    }

    fn complete(&mut self, _ticket: (), key: &[u8], fingerprint: &[u8; 16], answer: &[u8]) {
        record::complete(&mut self.buffer, fingerprint, self.peer.watch.kept_until_ms(), answer);
        self.peer.keys.put_opt(key, &self.buffer, &self.write).expect("RocksDB is good");
    }

    fn holds(&mut self, key: &[u8], fingerprint: &[u8; 16], answer: &[u8]) -> bool {
        let found = self.peer.keys.get_pinned(key).expect("RocksDB is good");
        found.is_some_and(|found| record::holds(&found, fingerprint, answer))
    }
}
