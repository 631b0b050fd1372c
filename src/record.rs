//! A stored answer, in place.

use crate::journal::codec::{Kind, Meta};
use crate::journal::segment::Pin;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A stored answer; its bytes are read where the journal has them, without a copy.
///
/// A record stays readable while it is held: after its retention, after its segment was removed, after the store was
/// closed. [`Store::erase`](crate::Store::erase) waits for it to be dropped, and so does the next opener of the store, who
/// gets `Locked` until then; copy the bytes to keep them longer.
#[derive(Clone)]
pub struct Record {
    pin: Pin,
    /// Where the payload lies in the segment, whose offsets fit (see `Binding::at`).
    start: u32,
    len: u32,
    completed_ms: u64,
    kept_until_ms: u64,
    attempt: u32,
    is_failure: bool,
}

impl Record {
    /// A handle to a payload in the segment that `pin` keeps.
    #[inline]
    pub(crate) fn new(pin: Pin, start: usize, len: usize, meta: &Meta) -> Self {
        Record {
            pin,
            start: start as u32,
            len: len as u32,
            is_failure: meta.kind == Kind::Failed,
            completed_ms: meta.written_ms,
            kept_until_ms: meta.deadline_ms,
            attempt: meta.attempt,
        }
    }

    /// The answer's bytes.
    pub fn bytes(&self) -> &[u8] {
        let start = self.start as usize;
        self.pin.bytes(start..start + self.len as usize).expect("a record lies inside its segment")
    }

    /// Whether the operation was stored by [`fail`](crate::Reservation::fail): a definitive failure.
    pub fn is_failure(&self) -> bool {
        self.is_failure
    }

    /// When the answer was stored, to the millisecond.
    pub fn completed_at(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.completed_ms)
    }

    /// When the answer is forgotten; `None` if it is kept until erased.
    pub fn expires_at(&self) -> Option<SystemTime> {
        if self.kept_until_ms == u64::MAX {
            return None;
        }
        UNIX_EPOCH.checked_add(Duration::from_millis(self.kept_until_ms))
    }

    /// Number of the attempt that produced the answer, from 1.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }
}

impl AsRef<[u8]> for Record {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Record")
            .field("len", &self.len)
            .field("is_failure", &self.is_failure)
            .field("attempt", &self.attempt)
            .field("completed_ms", &self.completed_ms)
            .field("kept_until_ms", &self.kept_until_ms)
            .finish_non_exhaustive()
    }
}
