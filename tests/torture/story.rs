//! What is told of each operation: a line before it, and a line after it was acknowledged.
//!
//! A line is one `write` to a pipe, shorter than `PIPE_BUF`, so lines of several threads don't mix, and a line that was
//! written before a kill is read after it.

use serde::{Deserialize, Serialize};
use std::io::Write;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Line {
    /// The process runs.
    Start,
    /// The store is open: recovery has ended.
    Open,
    /// An operation is about to begin. `op` is its number, never used again; `at` is the store's time in ms.
    Do { op: u64, at: u64, key: u64, act: Act },
    /// It returned.
    Did { op: u64, at: u64, came: Came },
    /// The store did not open, or its upkeep failed, for this reason.
    Refused(String),
    /// Something that must not be.
    Wrong(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Act {
    /// Without a length the lease doesn't run out while its owner lives.
    Reserve {
        print: u8,
        lease: Option<u64>,
    },
    Get,
    Wait {
        fence: u64,
    },
    /// The answer is [`content`] of this operation's number. `keep` is how long, in ms, or for ever.
    Answer {
        fence: u64,
        len: usize,
        failure: bool,
        keep: Option<u64>,
    },
    Release {
        fence: u64,
    },
    Point {
        fence: u64,
        len: usize,
        lease: Option<u64>,
    },
    Renew {
        fence: u64,
        lease: Option<u64>,
    },
    Drop {
        fence: u64,
    },
    Erase,
    /// All keys of the scope that the key is of.
    EraseScope,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Came {
    Reserved(Grant),
    Interrupted(Grant),
    Replay(Answer),
    InFlight {
        fence: u64,
    },
    /// With the fingerprint that is stored.
    Mismatch(u8),
    /// `get` found no answer.
    Nothing,
    /// Somebody's wait is over without an answer.
    Retry,
    TimedOut,
    /// With the answer's end, if it has one.
    Stored(Option<u64>),
    Done,
    Fenced,
    Failed(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    pub fence: u64,
    pub attempt: u32,
    pub point: Option<Content>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    pub content: Content,
    pub failure: bool,
    pub attempt: u32,
    pub until: Option<u64>,
}

/// Bytes by the number of the operation that wrote them; without any bytes there is no number either.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    pub op: u64,
    pub len: usize,
}

/// Where a story goes.
pub trait Log: Sync {
    fn line(&self, line: Line);
}

/// Standard output.
pub struct Pipe;

impl Log for Pipe {
    fn line(&self, line: Line) {
        let mut text = serde_json::to_vec(&line).expect("a line is plain data");
        text.push(b'\n');
        assert!(text.len() < 4096, "a line has to be written whole");
        // Without anybody to tell there is nothing left to do.
        if std::io::stdout().write_all(&text).is_err() {
            std::process::exit(2);
        }
    }
}

/// What answers, and keys that are used once, begin with, so that they can be found in a file.
pub const MAGIC: [u8; 8] = *b"\xf7torture";
/// Keys from here on are used once, and named by [`MAGIC`] and their number, which is no operation's.
pub const FIRST_SINGLE: u64 = 1 << 63;
const KEYS_A_SCOPE: u64 = 32;

/// The shortest content that isn't empty.
pub const SHORTEST: usize = 16;

impl Content {
    pub fn of(op: u64, len: usize) -> Content {
        Content { op: if len == 0 { 0 } else { op }, len }
    }

    pub fn bytes(self) -> Vec<u8> {
        assert!(self.len == 0 || self.len >= SHORTEST);
        let mut random = crate::random::Random::new(self.op);
        let mut bytes = [MAGIC, self.op.to_le_bytes()].concat();
        while bytes.len() < self.len {
            bytes.extend(random.draw().to_le_bytes());
        }
        bytes.truncate(self.len);
        bytes
    }

    /// What bytes say they are, if every one of them is as it was written.
    pub fn read(bytes: &[u8]) -> Option<Content> {
        if bytes.is_empty() {
            return Some(Content { op: 0, len: 0 });
        }
        let op = u64::from_le_bytes(*bytes.get(8..)?.first_chunk()?);
        let content = Content { op, len: bytes.len() };
        (bytes.len() >= SHORTEST && content.bytes() == bytes).then_some(content)
    }
}

pub fn name_of(key: u64) -> Vec<u8> {
    if key >= FIRST_SINGLE { [MAGIC, key.to_le_bytes()].concat() } else { format!("key-{key}").into_bytes() }
}

pub fn scope_of(key: u64) -> String {
    if key >= FIRST_SINGLE { "once".to_owned() } else { format!("scope-{}", key / KEYS_A_SCOPE) }
}

/// The keys of the scope that a key is of; none of those that are used once.
pub fn keys_beside(key: u64) -> std::ops::Range<u64> {
    assert!(key < FIRST_SINGLE);
    let first = key / KEYS_A_SCOPE * KEYS_A_SCOPE;
    first..first + KEYS_A_SCOPE
}
