//! fjall 3: a lock on the key's stripe around `get` and `insert`, cheaper than a transaction of its own.
//!
//! Each insert reaches the page cache before it returns (`kill -9` safe, the default). Power-loss safe is
//! `persist(SyncData)` after it, outside of the lock; concurrent callers each sync, as fjall has no group commit.

use crate::cell::Level;
use crate::peer::{Decision, Load, Peer, Result, Session, Setup, Stripes, record};
use crate::workload::Watch;
use ::fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};
use oncekey::Clock;
use std::sync::Arc;

pub struct Fjall {
    database: Database,
    keys: Keyspace,
    stripes: Stripes,
    is_synced: bool,
    watch: Arc<Watch>,
}

pub struct FjallSession<'a> {
    peer: &'a Fjall,
    buffer: Vec<u8>,
}

impl Peer for Fjall {
    type Session<'a> = FjallSession<'a>;

    fn open(setup: &Setup) -> Result<Self> {
        let database = Database::builder(setup.dir.join("fjall")).open()?;
        let keys = database.keyspace("keys", KeyspaceCreateOptions::default)?;
        let is_synced = setup.level == Level::Power;
        Ok(Fjall { database, keys, stripes: Stripes::new(), is_synced, watch: Arc::clone(&setup.watch) })
    }

    fn load(&self, load: &Load<'_>) -> Result<()> {
        let mut batch = self.database.batch();
        load.each_record(|key, record| {
            batch.insert(&self.keys, key, record);
            Ok(())
        })?;
        Ok(batch.commit()?)
    }

    fn session(&self) -> FjallSession<'_> {
        FjallSession { peer: self, buffer: Vec::new() }
    }
}

impl Fjall {
    fn make_durable(&self) {
        if self.is_synced {
            self.database.persist(PersistMode::SyncData).expect("fjall is good");
        }
    }
}

impl Session for FjallSession<'_> {
    type Ticket = ();

    fn reserve(&mut self, key: &[u8], fingerprint: &[u8; 16]) -> Decision<()> {
        let peer = self.peer;
        let now_ms = peer.watch.now_ms();
        let lock = peer.stripes.lock(key);
        let found = peer.keys.get(key).expect("fjall is good");
        if let Some(decision) = found.and_then(|found| record::read(&found, fingerprint, now_ms)) {
            return decision;
        }
        peer.keys.insert(key, record::reserved(fingerprint, now_ms)).expect("fjall is good");
        drop(lock);
        peer.make_durable();
        Decision::Fresh(())
    }

    fn complete(&mut self, _ticket: (), key: &[u8], fingerprint: &[u8; 16], answer: &[u8]) {
        record::complete(&mut self.buffer, fingerprint, self.peer.watch.kept_until_ms(), answer);
        self.peer.keys.insert(key, &self.buffer[..]).expect("fjall is good");
        self.peer.make_durable();
    }

    fn holds(&mut self, key: &[u8], fingerprint: &[u8; 16], answer: &[u8]) -> bool {
        let found = self.peer.keys.get(key).expect("fjall is good");
        found.is_some_and(|found| record::holds(&found, fingerprint, answer))
    }
}
