//! LMDB through heed: a read transaction looks the key up, and a write transaction reserves it by `get_or_put`.
//!
//! Each commit writes its pages and a meta page with `pwrite`. With `NO_SYNC` (`kill -9` safe) they stay in the page
//! cache, which the death of the process leaves alone; without, each commit syncs. Writers take turns; there is no
//! group commit.

use crate::cell::Level;
use crate::peer::{Decision, Load, Peer, Result, Session, Setup, record};
use crate::workload::Watch;
use heed::types::Bytes;
use heed::{Database, Env, EnvFlags, EnvOpenOptions};
use oncekey::Clock;
use std::sync::Arc;

pub struct Lmdb {
    env: Env,
    keys: Database<Bytes, Bytes>,
    watch: Arc<Watch>,
}

pub struct LmdbSession<'a> {
    peer: &'a Lmdb,
    buffer: Vec<u8>,
}

impl Peer for Lmdb {
    type Session<'a> = LmdbSession<'a>;

    fn open(setup: &Setup) -> Result<Self> {
        let mut options = EnvOpenOptions::new();
        options.max_readers(128).map_size((4 * setup.data_bytes()).next_multiple_of(1 << 20) as usize + (1 << 30));
        if setup.level == Level::Kill {
            set_no_sync(&mut options);
        }
        let env = open(&options, &setup.dir)?;
        let mut txn = env.write_txn()?;
        let keys = env.database_options().types::<Bytes, Bytes>().create(&mut txn)?;
        txn.commit()?;
        Ok(Lmdb { env, keys, watch: Arc::clone(&setup.watch) })
    }

    fn load(&self, load: &Load<'_>) -> Result<()> {
        let mut write = self.env.write_txn()?;
        load.each_record(|key, record| Ok(self.keys.put(&mut write, key, record)?))?;
        Ok(write.commit()?)
    }

    fn session(&self) -> LmdbSession<'_> {
        LmdbSession { peer: self, buffer: Vec::new() }
    }
}

#[expect(unsafe_code, reason = "heed leaves the flags' consequences to its caller")]
fn set_no_sync(options: &mut EnvOpenOptions) {
    // SAFETY: without syncs a power cut may damage the file; the file is thrown away with this run.
    unsafe { options.flags(EnvFlags::NO_SYNC) };
}

#[expect(unsafe_code, reason = "heed maps a file that nobody else may change")]
fn open(options: &EnvOpenOptions, dir: &std::path::Path) -> heed::Result<Env> {
    // SAFETY: the directory is this process's own, and it opens it once.
    unsafe { options.open(dir) }
}

impl Session for LmdbSession<'_> {
    type Ticket = ();

    fn reserve(&mut self, key: &[u8], fingerprint: &[u8; 16]) -> Decision<()> {
        let Lmdb { env, keys, watch } = self.peer;
        let now_ms = watch.now_ms();
        let read = env.read_txn().expect("a reader's slot is free");
        if let Some(decision) = keys
            .get(&read, key)
            .expect("the map is readable")
            .and_then(|found| record::read(found, fingerprint, now_ms))
        {
            return decision;
        }
        drop(read);
        let mut write = env.write_txn().expect("a write transaction begins");
        let reserved = record::reserved(fingerprint, now_ms);
        let found = keys.get_or_put(&mut write, key, &reserved).expect("the map has room");
        if let Some(found) = found {
            if let Some(decision) = record::read(found, fingerprint, now_ms) {
                return decision;
            }
            keys.put(&mut write, key, &reserved).expect("the map has room");
        }
        write.commit().expect("the transaction commits");
        Decision::Fresh(())
    }

    fn complete(&mut self, _ticket: (), key: &[u8], fingerprint: &[u8; 16], answer: &[u8]) {
        let Lmdb { env, keys, watch } = self.peer;
        record::complete(&mut self.buffer, fingerprint, watch.kept_until_ms(), answer);
        let mut write = env.write_txn().expect("a write transaction begins");
        keys.put(&mut write, key, &self.buffer).expect("the map has room");
        write.commit().expect("the transaction commits");
    }

    fn holds(&mut self, key: &[u8], fingerprint: &[u8; 16], answer: &[u8]) -> bool {
        let read = self.peer.env.read_txn().expect("a reader's slot is free");
        let found = self.peer.keys.get(&read, key).expect("the map is readable");
        found.is_some_and(|found| record::holds(found, fingerprint, answer))
    }
}
