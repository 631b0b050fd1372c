//! The one interface that every peer is driven through.

use crate::cell::{KeyForm, Level};
use crate::workload::{Answers, Asked, LEASE_MS, Watch, touch};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// What a request for a key is told.
#[derive(Debug)]
pub enum Decision<T> {
    /// The key is the caller's.
    Fresh(T),
    /// Somebody else has it.
    InFlight,
    /// It was completed; the sum of a word of each of the answer's cache lines.
    Replay(u64),
}

/// An engine that can hold the keys, shared by all threads.
///
/// Generic rather than dynamic, so that no peer pays for a call that its users don't make.
pub trait Peer: Sync + Sized {
    /// A thread's own part, such as a connection.
    type Session<'a>: Session
    where
        Self: 'a;

    fn open(setup: &Setup) -> Result<Self>;

    fn session(&self) -> Self::Session<'_>;

    /// Returns when what was acknowledged is written, so that the next workload doesn't pay for the last.
    fn settle(&self) {}

    /// Completes many keys as fast as it can, for what is measured on a full table.
    fn load(&self, load: &Load<'_>) -> Result<()> {
        let mut session = self.session();
        load.each(|record| match session.reserve(record.key, record.fingerprint) {
            Decision::Fresh(ticket) => {
                session.complete(ticket, record.key, record.fingerprint, record.answer);
                Ok(())
            }
            Decision::InFlight | Decision::Replay(_) => Ok(()),
        })
    }

    /// The process whose memory and writes are the peer's, where that isn't the caller's.
    fn server(&self) -> Option<u32> {
        None
    }

    /// How it gives back what fell due; `None` where it has no way of its own to find it.
    fn reclaims(&self) -> Option<&dyn Reclaim> {
        None
    }

    /// Bytes that the journal grows by with each reservation and its answer, where that is known.
    fn pair_bytes(_setup: &Setup) -> Option<f64> {
        None
    }
}

/// Asks on behalf of one thread.
pub trait Session {
    /// What the owner of a key holds until it completes.
    type Ticket;

    fn reserve(&mut self, key: &[u8], fingerprint: &[u8; 16]) -> Decision<Self::Ticket>;

    /// Stores the answer of a key that is the caller's.
    fn complete(&mut self, ticket: Self::Ticket, key: &[u8], fingerprint: &[u8; 16], answer: &[u8]);

    /// Whether the key is completed with this answer, byte for byte.
    fn holds(&mut self, key: &[u8], fingerprint: &[u8; 16], answer: &[u8]) -> bool;
}

/// Expiry of what was completed.
pub trait Reclaim: Sync {
    /// Whether it has to be told when keys fall due before they are filled in, as its clock can't be moved.
    fn follows_wall_clock(&self) -> bool {
        false
    }

    /// Returns when `keys` more keys were reclaimed than at the last call; alone, or beside callers.
    fn reclaim(&self, keys: u64, is_alone: bool);
}

/// Keys to complete in bulk.
pub struct Load<'a> {
    pub numbers: Range<u64>,
    pub key_form: KeyForm,
    pub answers: &'a Answers,
    pub watch: &'a Watch,
}

pub struct Completed<'a> {
    pub key: &'a [u8],
    pub fingerprint: &'a [u8; 16],
    pub until_ms: u64,
    pub answer: &'a [u8],
}

impl Load<'_> {
    pub fn each(&self, mut complete: impl FnMut(Completed<'_>) -> Result<()>) -> Result<()> {
        self.numbers.clone().try_for_each(|i| {
            let asked = Asked::new(i, self.key_form);
            complete(Completed {
                key: asked.key(),
                fingerprint: &asked.fingerprint,
                until_ms: self.watch.kept_until_ms(),
                answer: self.answers.answer(i),
            })
        })
    }

    /// As [`each`](Load::each), with the record as byte-oriented engines hold it.
    pub fn each_record(&self, mut put: impl FnMut(&[u8], &[u8]) -> Result<()>) -> Result<()> {
        let mut buffer = Vec::new();
        self.each(|Completed { key, fingerprint, until_ms, answer }| {
            record::complete(&mut buffer, fingerprint, until_ms, answer);
            put(key, &buffer)
        })
    }
}

/// What a peer is opened with.
#[derive(Clone)]
pub struct Setup {
    pub dir: PathBuf,
    pub level: Level,
    /// Keys that will be there at most; for those who have to know.
    pub capacity: u64,
    pub key_form: KeyForm,
    pub answer_len: usize,
    /// Whether expiry is what is measured.
    pub expires: bool,
    pub watch: Arc<Watch>,
}

impl Setup {
    /// Bytes of all keys and answers.
    pub fn data_bytes(&self) -> u64 {
        self.capacity * (self.answer_len as u64 + 64)
    }
}

/// A record as byte-oriented engines hold it: state, fingerprint, expiry, answer.
pub mod record {
    use super::*;

    pub const HEAD: usize = 1 + 16 + 8;

    pub fn reserved(fingerprint: &[u8; 16], now_ms: u64) -> [u8; HEAD] {
        let mut record = [0; HEAD];
        record[1..17].copy_from_slice(fingerprint);
        record[17..].copy_from_slice(&(now_ms + LEASE_MS).to_le_bytes());
        record
    }

    /// Writes a completed record into `buffer`.
    pub fn complete(buffer: &mut Vec<u8>, fingerprint: &[u8; 16], until_ms: u64, answer: &[u8]) {
        buffer.clear();
        buffer.push(1);
        buffer.extend_from_slice(fingerprint);
        buffer.extend_from_slice(&until_ms.to_le_bytes());
        buffer.extend_from_slice(answer);
    }

    /// What a stored record tells the caller; `None` if it is over, and the key is vacant.
    #[inline]
    pub fn read<T>(record: &[u8], fingerprint: &[u8; 16], now_ms: u64) -> Option<Decision<T>> {
        let until_ms = u64::from_le_bytes(*record[17..].first_chunk().expect("a record has a head"));
        if until_ms <= now_ms {
            return None;
        }
        assert!(record[1..17] == fingerprint[..], "the key was used for another payload");
        Some(if record[0] == 1 { Decision::Replay(touch(&record[HEAD..])) } else { Decision::InFlight })
    }

    pub fn holds(record: &[u8], fingerprint: &[u8; 16], answer: &[u8]) -> bool {
        record[0] == 1 && record[1..17] == fingerprint[..] && &record[HEAD..] == answer
    }
}

/// Where an operation stands, as maps hold it.
pub struct Operation {
    fingerprint: [u8; 16],
    /// End of the lease or of the retention, Unix ms.
    pub until_ms: u64,
    answer: Option<Box<[u8]>>,
}

impl Operation {
    pub fn reserved(fingerprint: &[u8; 16], now_ms: u64) -> Self {
        Operation { fingerprint: *fingerprint, until_ms: now_ms + LEASE_MS, answer: None }
    }

    pub fn completed(fingerprint: &[u8; 16], until_ms: u64, answer: &[u8]) -> Self {
        Operation { fingerprint: *fingerprint, until_ms, answer: Some(answer.into()) }
    }

    pub fn complete(&mut self, until_ms: u64, answer: &[u8]) {
        self.until_ms = until_ms;
        self.answer = Some(answer.into());
    }

    /// As [`record::read`].
    #[inline]
    pub fn read<T>(&self, fingerprint: &[u8; 16], now_ms: u64) -> Option<Decision<T>> {
        if self.until_ms <= now_ms {
            return None;
        }
        assert!(self.fingerprint == *fingerprint, "the key was used for another payload");
        Some(self.answer.as_deref().map_or(Decision::InFlight, |answer| Decision::Replay(touch(answer))))
    }

    pub fn holds(&self, fingerprint: &[u8; 16], answer: &[u8]) -> bool {
        self.fingerprint == *fingerprint && self.answer.as_deref() == Some(answer)
    }
}

/// Locks for engines without a conditional insert: whoever looks a key up in order to reserve it holds its lock.
pub struct Stripes {
    locks: Vec<parking_lot::Mutex<()>>,
    hash: ahash::RandomState,
}

impl Stripes {
    pub fn new() -> Self {
        Stripes { locks: (0..1024).map(|_| parking_lot::Mutex::new(())).collect(), hash: ahash::RandomState::new() }
    }

    #[inline]
    pub fn lock(&self, key: &[u8]) -> parking_lot::MutexGuard<'_, ()> {
        self.locks[self.hash.hash_one(key) as usize % self.locks.len()].lock()
    }
}
