//! sled 0.34: `compare_and_swap` reserves, and `flush` follows each write.
//!
//! Without the flush, writes stay in buffers of the process for up to half a second, which a `kill -9` takes along. The
//! flush ends in `sync_file_range`, which power-loss safety takes more than, so sled has no column there.

use crate::peer::{Decision, Load, Peer, Result, Session, Setup, record};
use crate::workload::Watch;
use ::sled::Db;
use oncekey::Clock;
use std::sync::Arc;

pub struct Sled {
    keys: Db,
    watch: Arc<Watch>,
}

pub struct SledSession<'a> {
    peer: &'a Sled,
    buffer: Vec<u8>,
}

impl Peer for Sled {
    type Session<'a> = SledSession<'a>;

    fn open(setup: &Setup) -> Result<Self> {
        let keys = ::sled::Config::new().path(setup.dir.join("sled")).flush_every_ms(None).open()?;
        Ok(Sled { keys, watch: Arc::clone(&setup.watch) })
    }

    fn load(&self, load: &Load<'_>) -> Result<()> {
        let mut batch = ::sled::Batch::default();
        load.each_record(|key, record| {
            batch.insert(key, record);
            Ok(())
        })?;
        self.keys.apply_batch(batch)?;
        self.flush();
        Ok(())
    }

    fn session(&self) -> SledSession<'_> {
        SledSession { peer: self, buffer: Vec::new() }
    }
}

impl Sled {
    fn flush(&self) {
        self.keys.flush().expect("sled is good");
    }
}

impl Session for SledSession<'_> {
    type Ticket = ();

    fn reserve(&mut self, key: &[u8], fingerprint: &[u8; 16]) -> Decision<()> {
        let Sled { keys, watch } = self.peer;
        let now_ms = watch.now_ms();
        let mut expected = keys.get(key).expect("sled is good");
        loop {
            if let Some(decision) = expected.as_ref().and_then(|found| record::read(found, fingerprint, now_ms)) {
                return decision;
            }
            let reserved = Some(&record::reserved(fingerprint, now_ms)[..]);
            match keys.compare_and_swap(key, expected.as_ref(), reserved).expect("sled is good") {
                Ok(()) => break,
                Err(changed) => expected = changed.current,
            }
        }
        self.peer.flush();
        Decision::Fresh(())
    }

    fn complete(&mut self, _ticket: (), key: &[u8], fingerprint: &[u8; 16], answer: &[u8]) {
        record::complete(&mut self.buffer, fingerprint, self.peer.watch.kept_until_ms(), answer);
        self.peer.keys.insert(key, &self.buffer[..]).expect("sled is good");
        self.peer.flush();
    }

    fn holds(&mut self, key: &[u8], fingerprint: &[u8; 16], answer: &[u8]) -> bool {
        let found = self.peer.keys.get(key).expect("sled is good");
        found.is_some_and(|found| record::holds(&found, fingerprint, answer))
    }
}
