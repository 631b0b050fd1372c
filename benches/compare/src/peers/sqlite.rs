//! SQLite through rusqlite, in WAL mode, with prepared statements.
//!
//! Threads read on connections of their own and share one that writes behind a mutex, which is better than their
//! waiting for each other's transactions. `INSERT` reserves; on a conflict it takes over what has expired, and else
//! does nothing. `synchronous` is `OFF` at the `kill -9` level (the log is in the page cache) and `FULL` at the other:
//! a sync a transaction, no group commit. The table has an index on the expiry only where expiry is measured; then
//! batches of a thousand are deleted through it.

use crate::cell::Level;
use crate::peer::{Completed, Decision, Load, Peer, Reclaim, Result, Session, Setup, record};
use crate::workload::{Watch, touch};
use oncekey::Clock;
use parking_lot::Mutex;
use rusqlite::{CachedStatement, Connection, OptionalExtension, params};
use std::path::PathBuf;
use std::sync::Arc;

const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS keys (
    key BLOB PRIMARY KEY, fingerprint BLOB NOT NULL, until_ms INTEGER NOT NULL, answer BLOB
) WITHOUT ROWID";
const LOOK_UP: &str = "SELECT fingerprint, until_ms, answer FROM keys WHERE key = ?1";
const RESERVE: &str = "INSERT INTO keys (key, fingerprint, until_ms) VALUES (?1, ?2, ?3)
    ON CONFLICT DO UPDATE SET fingerprint = ?2, until_ms = ?3, answer = NULL WHERE until_ms <= ?4";
const COMPLETE: &str = "UPDATE keys SET until_ms = ?2, answer = ?3 WHERE key = ?1";
const LOAD: &str = "INSERT OR REPLACE INTO keys VALUES (?1, ?2, ?3, ?4)";
const SWEEP: &str = "DELETE FROM keys WHERE key IN (SELECT key FROM keys WHERE until_ms <= ?1 LIMIT 1000)";

pub struct Sqlite {
    path: PathBuf,
    writer: Mutex<Connection>,
    watch: Arc<Watch>,
}

pub struct SqliteSession<'a> {
    peer: &'a Sqlite,
    reader: Connection,
}

impl Peer for Sqlite {
    type Session<'a> = SqliteSession<'a>;

    fn open(setup: &Setup) -> Result<Self> {
        let path = setup.dir.join("sqlite");
        let writer = Connection::open(&path)?;
        writer.pragma_update(None, "journal_mode", "WAL")?;
        writer.pragma_update(None, "synchronous", if setup.level == Level::Power { "FULL" } else { "OFF" })?;
        writer.execute(SCHEMA, [])?;
        if setup.expires {
            writer.execute("CREATE INDEX IF NOT EXISTS due ON keys (until_ms)", [])?;
        }
        Ok(Sqlite { path, writer: Mutex::new(writer), watch: Arc::clone(&setup.watch) })
    }

    fn load(&self, load: &Load<'_>) -> Result<()> {
        let mut writer = self.writer.lock();
        let transaction = writer.transaction()?;
        let mut insert = transaction.prepare_cached(LOAD)?;
        load.each(|Completed { key, fingerprint, until_ms, answer }| {
            insert.execute(params![key, fingerprint, until_ms as i64, answer])?;
            Ok(())
        })?;
        drop(insert);
        Ok(transaction.commit()?)
    }

    fn session(&self) -> SqliteSession<'_> {
        let reader = Connection::open(&self.path).expect("the file opens");
        reader.pragma_update(None, "query_only", true).expect("a connection can be made to read only");
        SqliteSession { peer: self, reader }
    }

    fn reclaims(&self) -> Option<&dyn Reclaim> {
        Some(self)
    }
}

fn prepared<'c>(connection: &'c Connection, sql: &str) -> CachedStatement<'c> {
    connection.prepare_cached(sql).expect("the statement is right")
}

/// What the table says; `None` if the key is vacant.
fn look_up(connection: &Connection, key: &[u8], fingerprint: &[u8; 16], now_ms: u64) -> Option<Decision<()>> {
    let decision = prepared(connection, LOOK_UP).query_row([key], |row| {
        if row.get::<_, i64>(1)? <= now_ms as i64 {
            return Ok(None);
        }
        assert!(row.get_ref(0)?.as_blob()? == fingerprint, "the key was used for another payload");
        let answer = row.get_ref(2)?.as_blob_or_null()?;
        Ok(Some(answer.map_or(Decision::InFlight, |answer| Decision::Replay(touch(answer)))))
    });
    decision.optional().expect("the table is readable").flatten()
}

impl Session for SqliteSession<'_> {
    type Ticket = ();

    fn reserve(&mut self, key: &[u8], fingerprint: &[u8; 16]) -> Decision<()> {
        let now_ms = self.peer.watch.now_ms();
        if let Some(decision) = look_up(&self.reader, key, fingerprint, now_ms) {
            return decision;
        }
        let record = record::reserved(fingerprint, now_ms);
        let until_ms = u64::from_le_bytes(*record[17..].first_chunk().expect("a record has a head"));
        let writer = self.peer.writer.lock();
        let rows = prepared(&writer, RESERVE)
            .execute(params![key, fingerprint, until_ms as i64, now_ms as i64])
            .expect("the table takes a row");
        if rows == 1 {
            return Decision::Fresh(());
        }
        look_up(&writer, key, fingerprint, now_ms).expect("the row that was in the way")
    }

    fn complete(&mut self, _ticket: (), key: &[u8], _fingerprint: &[u8; 16], answer: &[u8]) {
        let until_ms = self.peer.watch.kept_until_ms();
        let writer = self.peer.writer.lock();
        let rows = prepared(&writer, COMPLETE).execute(params![key, until_ms as i64, answer]);
        assert_eq!(rows.expect("the table takes the answer"), 1, "the key is reserved");
    }

    fn holds(&mut self, key: &[u8], fingerprint: &[u8; 16], answer: &[u8]) -> bool {
        let held = prepared(&self.reader, LOOK_UP).query_row([key], |row| {
            let same = row.get_ref(0)?.as_blob()? == fingerprint;
            Ok(same && row.get_ref(2)?.as_blob_or_null()? == Some(answer))
        });
        held.optional().expect("the table is readable").unwrap_or(false)
    }
}

impl Reclaim for Sqlite {
    fn reclaim(&self, _keys: u64, _is_alone: bool) {
        let now_ms = self.watch.now_ms() as i64;
        loop {
            let writer = self.writer.lock();
            let rows = prepared(&writer, SWEEP).execute([now_ms]).expect("rows can be deleted");
            parking_lot::MutexGuard::unlock_fair(writer);
            if rows == 0 {
                return;
            }
        }
    }
}
