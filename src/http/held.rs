//! The body of a request in memory, within what the bodies of all requests together may take.
//!
//! - H1 What is counted is what is allocated, and it is counted before it is allocated.
//! - H2 A body counts until the last handle to its bytes is dropped, wherever the service has put them.
//! - H3 It takes twice what has come of it, at most: what is only announced counts nothing.

use bytes::Bytes;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// All bodies together.
#[derive(Debug, Default)]
pub(super) struct Bodies {
    bytes: AtomicUsize,
}

impl Bodies {
    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    // Relaxed, here and where it is given back: it is only counted.
    fn take(&self, more: usize, most: usize) -> bool {
        let sum = |bytes: usize| bytes.checked_add(more).filter(|sum| *sum <= most);
        self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, sum).is_ok()
    }
}

/// One body, as far as it has come.
pub(super) struct Held {
    bytes: Vec<u8>,
    counted: usize,
    all: Arc<Bodies>,
    /// What all may take.
    most: usize,
}

/// There is no room for more of the body.
#[derive(Debug)]
pub(super) struct NoRoom;

impl Held {
    pub(super) fn new(all: &Arc<Bodies>, most: usize) -> Self {
        Held { bytes: Vec::new(), counted: 0, all: Arc::clone(all), most }
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Adds a piece to a body that will have `longest` bytes at most. It is copied, for it may be the only one that is left of a
    /// far larger buffer.
    pub(super) fn push(&mut self, piece: &[u8], longest: usize) -> Result<(), NoRoom> {
        let needed = self.bytes.len() + piece.len();
        if needed > self.counted {
            let grown = needed.max(self.counted.saturating_mul(2).min(longest));
            if !self.all.take(grown - self.counted, self.most) {
                return Err(NoRoom);
            }
            self.counted = grown;
            self.bytes.reserve_exact(grown - self.bytes.len());
        }
        self.bytes.extend_from_slice(piece);
        Ok(())
    }

    pub(super) fn finish(self) -> Bytes {
        if self.bytes.is_empty() { Bytes::new() } else { Bytes::from_owner(self) }
    }
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.all.bytes.fetch_sub(self.counted, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_what_is_allocated_and_no_more_than_twice_what_came() {
        let all = Arc::default();
        let mut held = Held::new(&all, usize::MAX);
        for _ in 0..1000 {
            held.push(b"0123456", 5000).unwrap_or_else(|NoRoom| panic!("there is room"));
            assert_eq!((all.bytes(), held.bytes.capacity()), (held.counted, held.counted));
            assert!(held.counted <= 2 * held.len() && held.counted <= held.len().max(5000));
        }
    }

    #[test]
    fn a_body_counts_until_its_last_handle_is_gone() {
        let all = Arc::default();
        let mut held = Held::new(&all, 10);
        held.push(b"012345", 10).unwrap_or_else(|NoRoom| panic!("there is room"));
        let mut other = Held::new(&all, 10);
        assert!(other.push(b"01234", 10).is_err());
        assert_eq!(all.bytes(), 6);
        assert!(other.push(b"0123", 10).is_ok());
        drop(other);
        let bytes = held.finish();
        let part = bytes.slice(2..3);
        drop(bytes);
        assert_eq!((&part[..], all.bytes()), (&b"2"[..], 6));
        drop(part);
        assert_eq!(all.bytes(), 0);
    }
}
