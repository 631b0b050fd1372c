//! redb: a read transaction looks the key up, and a write transaction reserves it.
//!
//! Power-loss safe is `Durability::Immediate`, the default. redb 4 has nothing between that and `Durability::None`,
//! which a `kill -9` may undo back to the last durable commit; so at the `kill -9` level commits are `Immediate` too,
//! over a backend whose `sync_data` does nothing: they are in the page cache then. Writers take turns; there is no
//! group commit.

use crate::cell::Level;
use crate::peer::{Decision, Load, Peer, Result, Session, Setup, record};
use crate::workload::Watch;
use ::redb::backends::FileBackend;
use ::redb::{Builder, Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};
use oncekey::Clock;
use std::fs::OpenOptions;
use std::io;
use std::sync::Arc;

const KEYS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("keys");

pub struct Redb {
    database: Database,
    watch: Arc<Watch>,
}

pub struct RedbSession<'a> {
    peer: &'a Redb,
    buffer: Vec<u8>,
}

/// A file whose writes stay in the page cache until the kernel writes them.
#[derive(Debug)]
struct Unsynced(FileBackend);

impl StorageBackend for Unsynced {
    fn len(&self) -> std::result::Result<u64, io::Error> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> std::result::Result<(), io::Error> {
        self.0.read(offset, out)
    }

    fn set_len(&self, len: u64) -> std::result::Result<(), io::Error> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> std::result::Result<(), io::Error> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> std::result::Result<(), io::Error> {
        self.0.write(offset, data)
    }

    fn close(&self) -> std::result::Result<(), io::Error> {
        self.0.close()
    }
}

impl Peer for Redb {
    type Session<'a> = RedbSession<'a>;

    fn open(setup: &Setup) -> Result<Self> {
        let path = setup.dir.join("redb");
        let database = match setup.level {
            Level::Memory | Level::Kill => {
                let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
                Builder::new().create_with_backend(Unsynced(FileBackend::new(file)?))?
            }
            Level::Power => Database::create(path)?,
        };
        let write = database.begin_write()?;
        write.open_table(KEYS)?;
        write.commit()?;
        Ok(Redb { database, watch: Arc::clone(&setup.watch) })
    }

    fn load(&self, load: &Load<'_>) -> Result<()> {
        let write = self.database.begin_write()?;
        let mut table = write.open_table(KEYS)?;
        load.each_record(|key, record| Ok(table.insert(key, record).map(|_| ())?))?;
        drop(table);
        Ok(write.commit()?)
    }

    fn session(&self) -> RedbSession<'_> {
        RedbSession { peer: self, buffer: Vec::new() }
    }
}

impl RedbSession<'_> {
    fn look_up<T>(&self, key: &[u8], read: impl FnOnce(&[u8]) -> T) -> Result<Option<T>> {
        let table = self.peer.database.begin_read()?.open_table(KEYS)?;
        Ok(table.get(key)?.map(|found| read(found.value())))
    }

    fn try_reserve(&self, key: &[u8], fingerprint: &[u8; 16]) -> Result<Decision<()>> {
        let now_ms = self.peer.watch.now_ms();
        if let Some(decision) = self.look_up(key, |found| record::read(found, fingerprint, now_ms))?.flatten() {
            return Ok(decision);
        }
        let write = self.peer.database.begin_write()?;
        let mut table = write.open_table(KEYS)?;
        let found = table.get(key)?.and_then(|found| record::read(found.value(), fingerprint, now_ms));
        if let Some(decision) = found {
            return Ok(decision);
        }
        table.insert(key, &record::reserved(fingerprint, now_ms)[..])?;
        drop(table);
        write.commit()?;
        Ok(Decision::Fresh(()))
    }

    fn try_complete(&mut self, key: &[u8], fingerprint: &[u8; 16], answer: &[u8]) -> Result<()> {
        record::complete(&mut self.buffer, fingerprint, self.peer.watch.kept_until_ms(), answer);
        let write = self.peer.database.begin_write()?;
        write.open_table(KEYS)?.insert(key, &self.buffer[..])?;
        Ok(write.commit()?)
    }
}

impl Session for RedbSession<'_> {
    type Ticket = ();

    fn reserve(&mut self, key: &[u8], fingerprint: &[u8; 16]) -> Decision<()> {
        self.try_reserve(key, fingerprint).expect("redb is good")
    }

    fn complete(&mut self, _ticket: (), key: &[u8], fingerprint: &[u8; 16], answer: &[u8]) {
        self.try_complete(key, fingerprint, answer).expect("redb is good");
    }

    fn holds(&mut self, key: &[u8], fingerprint: &[u8; 16], answer: &[u8]) -> bool {
        let held = self.look_up(key, |found| record::holds(found, fingerprint, answer)).expect("redb is good");
        held.unwrap_or(false)
    }
}
