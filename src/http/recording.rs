//! An answer that is still being made: one task appends to it, and any number of clients read it from its beginning.
//!
//! Up to a cap everything is kept, so a reader of any pace, or one that comes late, gets it all. Past the cap one of them
//! leads: the first client, and once that is gone whoever read the most. Pieces go as the leader has read them, the appender waits while
//! it is more than a window behind, and readers that fall behind it are cut off.
//!
//! - R1 What was handed out stays in order: a reader gets pieces `0, 1, 2, …` without a gap, or an error.
//! - R2 Nobody sees the end before the end was set, which its appender does after the answer is stored.
//! - R3 Wakers are called without the lock.

use super::BoxError;
use super::body::Trailers;
use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode};
use http_body::{Frame, SizeHint};
use parking_lot::Mutex;
use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// How far the leader may be behind once an answer is too large to be kept, in bytes.
const WINDOW: usize = 256 * 1024;
/// How long the leader may take nothing then, before it is cut off.
const STALL: Duration = Duration::from_secs(30);
/// The reader that leads as long as it is there.
const FIRST: u64 = 0;

#[derive(Debug)]
pub(super) struct Recording {
    /// Number of the reservation whose answer it is.
    fence: u64,
    status: StatusCode,
    /// What duplicates get.
    headers: HeaderMap,
    /// Length of the whole body, if the service said.
    exact: Option<u64>,
    cap: usize,
    tape: Mutex<Tape>,
}

#[derive(Debug, Default)]
struct Tape {
    pieces: VecDeque<Bytes>,
    /// Number of the first of `pieces`.
    start: usize,
    /// Bytes of `pieces`.
    len: usize,
    is_over_cap: bool,
    end: Option<End>,
    readers: BTreeMap<u64, Reader>,
    next_reader: u64,
    appender: Option<Waker>,
}

#[derive(Debug, Default)]
struct Reader {
    /// Number of the piece that it gets next.
    next: usize,
    waker: Option<Waker>,
}

#[derive(Debug, Clone)]
enum End {
    Whole(Trailers),
    Broken,
}

/// The service's answer ended before it was whole; whether the operation took effect is unknown.
#[derive(Debug, thiserror::Error)]
#[error("the answer broke off")]
struct BrokeOff;

/// A reader was too slow for an answer that is too large to be kept.
#[derive(Debug, thiserror::Error)]
#[error("the answer is too large to be kept for a slow reader")]
struct FellBehind;

impl Recording {
    pub(super) fn new(fence: u64, status: StatusCode, headers: HeaderMap, exact: Option<u64>, cap: usize) -> Arc<Self> {
        Arc::new(Recording { fence, status, headers, exact, cap, tape: Mutex::default() })
    }

    pub(super) fn fence(&self) -> u64 {
        self.fence
    }

    /// A body from the beginning; the first that is asked for is that of the first client.
    pub(super) fn follow(self: &Arc<Self>) -> Follower {
        let mut tape = self.tape.lock();
        let number = tape.next_reader;
        tape.next_reader += 1;
        tape.readers.insert(number, Reader::default());
        Follower { recording: Arc::clone(self), number, has_begun: false, has_ended: false }
    }

    /// The answer for a duplicate; `None` if its beginning is gone.
    pub(super) fn attach(self: &Arc<Self>) -> Option<Response<super::Body>> {
        let follower = self.follow();
        if self.tape.lock().start > 0 {
            return None;
        }
        let mut response = Response::new(super::Body::followed(follower));
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers.clone();
        Some(response)
    }

    pub(super) fn push(&self, piece: Bytes) {
        let mut tape = self.tape.lock();
        tape.len += piece.len();
        tape.pieces.push_back(piece);
        tape.is_over_cap |= tape.len > self.cap;
        tape.forget();
        tape.readers_to_wake().unlocked(tape);
    }

    /// Waits until there is room for another piece. A leader that takes nothing for [`STALL`] is cut off.
    pub(super) async fn room(&self) {
        let mut before = 0;
        loop {
            let progress = poll_fn(|context| {
                let mut tape = self.tape.lock();
                if !tape.is_over_cap || tape.len <= WINDOW {
                    return Poll::Ready(None);
                }
                if tape.start != before {
                    return Poll::Ready(Some(tape.start));
                }
                tape.appender = Some(context.waker().clone());
                Poll::Pending
            });
            match tokio::time::timeout(STALL, progress).await {
                Ok(None) => return,
                Ok(Some(start)) => before = start,
                Err(_) => self.cut_leader_off(),
            }
        }
    }

    fn cut_leader_off(&self) {
        let mut tape = self.tape.lock();
        let leader = tape.leader().map(|(number, _)| number);
        let waker = leader.and_then(|leader| tape.readers.remove(&leader)).and_then(|reader| reader.waker);
        tape.forget();
        Wakers(waker.into_iter().collect()).unlocked(tape);
    }

    /// All pieces, if all are kept.
    pub(super) fn pieces(&self) -> Option<Vec<Bytes>> {
        let tape = self.tape.lock();
        (!tape.is_over_cap).then(|| tape.pieces.iter().cloned().collect())
    }

    pub(super) fn end(&self, trailers: Trailers) {
        self.set_end(End::Whole(trailers));
    }

    pub(super) fn break_off(&self) {
        self.set_end(End::Broken);
    }

    fn set_end(&self, end: End) {
        let mut tape = self.tape.lock();
        tape.end.get_or_insert(end);
        tape.readers_to_wake().unlocked(tape);
    }
}

impl Tape {
    /// Who decides what is still needed, and what it gets next.
    fn leader(&self) -> Option<(u64, usize)> {
        let first = self.readers.get_key_value(&FIRST);
        let leader = first.or_else(|| self.readers.iter().max_by_key(|(_, reader)| reader.next));
        leader.map(|(number, reader)| (*number, reader.next))
    }

    /// Past the cap, lets go what the leader has read.
    fn forget(&mut self) {
        if !self.is_over_cap {
            return;
        }
        let end = self.start + self.pieces.len();
        let read = self.leader().map_or(end, |(_, next)| next);
        while self.start < read {
            let Some(piece) = self.pieces.pop_front() else { return };
            self.len -= piece.len();
            self.start += 1;
        }
    }

    fn readers_to_wake(&mut self) -> Wakers {
        Wakers(self.readers.values_mut().filter_map(|reader| reader.waker.take()).collect())
    }

    /// To be called after a reader went on, or went.
    fn appender_to_wake(&mut self) -> Wakers {
        self.forget();
        Wakers(self.appender.take().into_iter().collect())
    }
}

/// Who is to be woken once the lock is let go.
struct Wakers(Vec<Waker>);

impl Wakers {
    fn unlocked<G>(self, lock: G) {
        drop(lock);
        for waker in self.0 {
            waker.wake();
        }
    }
}

/// One client's reading of a recording.
#[derive(Debug)]
pub(super) struct Follower {
    recording: Arc<Recording>,
    number: u64,
    has_begun: bool,
    has_ended: bool,
}

impl Follower {
    pub(super) fn poll_frame(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.has_ended {
            return Poll::Ready(None);
        }
        self.has_begun = true;
        let mut lock = self.recording.tape.lock();
        let tape = &mut *lock;
        let reader = tape.readers.get_mut(&self.number);
        let Some((reader, at)) = reader.and_then(|reader| {
            let at = reader.next.checked_sub(tape.start)?;
            Some((reader, at))
        }) else {
            self.has_ended = true;
            return Poll::Ready(Some(Err(FellBehind.into())));
        };
        if let Some(piece) = tape.pieces.get(at).cloned() {
            reader.next += 1;
            tape.appender_to_wake().unlocked(lock);
            return Poll::Ready(Some(Ok(Frame::data(piece))));
        }
        match tape.end.clone() {
            Some(end) => {
                self.has_ended = true;
                Poll::Ready(match end {
                    End::Whole(trailers) => trailers.map(|trailers| Ok(Frame::trailers(*trailers))),
                    End::Broken => Some(Err(BrokeOff.into())),
                })
            }
            None => {
                reader.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        match self.recording.exact {
            // Of what is left, which is known before the first piece.
            Some(exact) if !self.has_begun => SizeHint::with_exact(exact),
            Some(_) | None => SizeHint::default(),
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let mut tape = self.recording.tape.lock();
        tape.readers.remove(&self.number);
        tape.appender_to_wake().unlocked(tape);
    }
}
