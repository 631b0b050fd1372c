//! What happened to single keys lately, in a bounded ring.
//!
//! Keys are not kept: an event is found by a digest of its key's identity under a secret that is drawn at the start, so that
//! a dump of this memory can't be searched for a key.

use parking_lot::Mutex;
use std::collections::VecDeque;

/// The last events of all keys together.
pub struct History {
    secret: [u8; 32],
    events: Mutex<VecDeque<(Digest, Happened)>>,
    most: usize,
}

type Digest = [u8; 16];

/// One event of a key.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Happened {
    pub at_ms: u64,
    pub what: &'static str,
    pub status: Option<u16>,
    pub elapsed_ms: f64,
}

impl History {
    /// Keeps this many events.
    pub fn new(most: usize) -> Result<Self, getrandom::Error> {
        let mut secret = [0; 32];
        getrandom::fill(&mut secret)?;
        Ok(History { secret, events: Mutex::new(VecDeque::new()), most })
    }

    pub fn push(&self, scope: &[u8], operation: &str, key: &str, happened: Happened) {
        let digest = self.digest(scope, operation, key);
        let mut events = self.events.lock();
        if events.len() == self.most {
            events.pop_front();
        }
        events.push_back((digest, happened));
    }

    /// The events of a key that are still known, oldest first.
    pub fn of(&self, scope: &[u8], operation: &str, key: &str) -> Vec<Happened> {
        let digest = self.digest(scope, operation, key);
        let events = self.events.lock();
        events.iter().filter(|(of, _)| *of == digest).map(|(_, happened)| *happened).collect()
    }

    /// Forgets the events of a key.
    pub fn forget(&self, scope: &[u8], operation: &str, key: &str) {
        let digest = self.digest(scope, operation, key);
        self.events.lock().retain(|(of, _)| *of != digest);
    }

    fn digest(&self, scope: &[u8], operation: &str, key: &str) -> Digest {
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        // Lengths first, so that no two identities are the same bytes.
        hasher.update(&(scope.len() as u64).to_le_bytes()).update(&(operation.len() as u64).to_le_bytes());
        hasher.update(scope).update(operation.as_bytes()).update(key.as_bytes());
        let mut digest = Digest::default();
        hasher.finalize_xof().fill(&mut digest);
        digest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn happened(at_ms: u64) -> Happened {
        Happened { at_ms, what: "started", status: None, elapsed_ms: 0.5 }
    }

    #[test]
    fn a_key_is_told_its_own_events_only() {
        let history = History::new(100).unwrap();
        history.push(b"ab", "POST /", "c", happened(1));
        history.push(b"a", "POST /", "bc", happened(2));
        history.push(b"ab", "POST /", "c", happened(3));
        assert_eq!(history.of(b"ab", "POST /", "c"), [happened(1), happened(3)]);
        assert_eq!(history.of(b"a", "POST /", "bc"), [happened(2)]);
        assert_eq!(history.of(b"", "aPOST /", "bc"), []);
    }

    #[test]
    fn only_the_events_of_the_key_that_is_meant_are_forgotten() {
        let history = History::new(100).unwrap();
        history.push(b"", "POST /", "a", happened(1));
        history.push(b"", "POST /", "b", happened(2));
        history.forget(b"", "POST /", "a");
        assert_eq!(history.of(b"", "POST /", "a"), []);
        assert_eq!(history.of(b"", "POST /", "b"), [happened(2)]);
    }

    #[test]
    fn the_oldest_events_make_room() {
        let history = History::new(10).unwrap();
        for at_ms in 0..25 {
            history.push(b"", "POST /", if at_ms % 2 == 0 { "even" } else { "odd" }, happened(at_ms));
        }
        let kept: Vec<_> = history.of(b"", "POST /", "even").iter().map(|happened| happened.at_ms).collect();
        assert_eq!(kept, [16, 18, 20, 22, 24]);
        assert_eq!(history.events.lock().len(), 10);
    }
}
