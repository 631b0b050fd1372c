//! An answer that is still being made: one task appends to it, and any number of clients read it from its beginning.
//!
//! Up to a cap everything is kept, so a reader of any pace, or one that comes late, gets it all. Past the cap only the first
//! client counts: pieces go as it has read them, the appender waits while it is more than a window behind, and a
//! duplicate that falls behind is cut off.
//!
//! - R1 What was handed out stays in order: a reader gets pieces `0, 1, 2, …` without a gap, or an error.
//! - R2 Nobody sees the end before the end was set, which its appender does after the answer is stored.
//! - R3 Wakers are called without the lock.

use super::BoxError;
use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode};
use http_body::{Frame, SizeHint};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

/// How far the first client may be behind once an answer is too large to be kept, in bytes.
const WINDOW: usize = 256 * 1024;

#[derive(Debug)]
pub(super) struct Recording {
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
    /// How many pieces the first client took; `None` once it is gone.
    first_client: Option<usize>,
    end: Option<End>,
    readers: Vec<Waker>,
    appender: Option<Waker>,
}

#[derive(Debug, Clone)]
enum End {
    Whole(Option<HeaderMap>),
    Broken,
}

/// The service's answer ended before it was whole; whether the operation took effect is unknown.
#[derive(Debug, thiserror::Error)]
#[error("the answer broke off")]
struct BrokeOff;

/// A duplicate was too slow for an answer that is too large to be kept.
#[derive(Debug, thiserror::Error)]
#[error("the answer is too large to be kept for a slow reader")]
struct FellBehind;

impl Recording {
    pub(super) fn new(status: StatusCode, headers: HeaderMap, exact: Option<u64>, cap: usize) -> Arc<Self> {
        let tape = Tape { first_client: Some(0), ..Tape::default() };
        Arc::new(Recording { status, headers, exact, cap, tape: Mutex::new(tape) })
    }

    /// The body that the first client reads.
    pub(super) fn first_client(self: &Arc<Self>) -> Follower {
        Follower { recording: Arc::clone(self), next: 0, is_first: true, has_ended: false }
    }

    /// The answer for a duplicate; `None` if its beginning is gone.
    pub(super) fn attach(self: &Arc<Self>) -> Option<Response<super::Body>> {
        if self.tape.lock().start > 0 {
            return None;
        }
        let follower = Follower { recording: Arc::clone(self), next: 0, is_first: false, has_ended: false };
        let mut response = Response::new(super::Body::followed(follower));
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers.clone();
        Some(response)
    }

    pub(super) fn push(&self, piece: Bytes) {
        if piece.is_empty() {
            return;
        }
        let mut tape = self.tape.lock();
        tape.len += piece.len();
        tape.pieces.push_back(piece);
        tape.is_over_cap |= tape.len > self.cap;
        tape.forget();
        tape.wake_readers().unlocked(tape);
    }

    /// Waits until there is room for another piece.
    pub(super) async fn room(&self) {
        poll_fn(|context| {
            let mut tape = self.tape.lock();
            if !tape.is_over_cap || tape.len <= WINDOW {
                return Poll::Ready(());
            }
            tape.appender = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Goes on without the first client.
    pub(super) fn leave_first_client(&self) {
        let mut tape = self.tape.lock();
        tape.first_client = None;
        tape.forget();
        tape.wake_readers().unlocked(tape);
    }

    /// All pieces, if all are kept.
    pub(super) fn pieces(&self) -> Option<Vec<Bytes>> {
        let tape = self.tape.lock();
        (!tape.is_over_cap).then(|| tape.pieces.iter().cloned().collect())
    }

    pub(super) fn end(&self, trailers: Option<HeaderMap>) {
        self.set_end(End::Whole(trailers));
    }

    pub(super) fn break_off(&self) {
        self.set_end(End::Broken);
    }

    fn set_end(&self, end: End) {
        let mut tape = self.tape.lock();
        tape.end.get_or_insert(end);
        tape.wake_readers().unlocked(tape);
    }
}

impl Tape {
    /// Past the cap, lets go what the first client has read.
    fn forget(&mut self) {
        if !self.is_over_cap {
            return;
        }
        let end = self.start + self.pieces.len();
        let read = self.first_client.unwrap_or(end);
        while self.start < read {
            let Some(piece) = self.pieces.pop_front() else { return };
            self.len -= piece.len();
            self.start += 1;
        }
    }

    fn wake_readers(&mut self) -> Wakers {
        Wakers(std::mem::take(&mut self.readers))
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
    next: usize,
    is_first: bool,
    has_ended: bool,
}

impl Follower {
    pub(super) fn poll_frame(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.has_ended {
            return Poll::Ready(None);
        }
        let mut tape = self.recording.tape.lock();
        let Some(at) = self.next.checked_sub(tape.start).filter(|_| !self.is_first || tape.first_client.is_some())
        else {
            self.has_ended = true;
            return Poll::Ready(Some(Err(FellBehind.into())));
        };
        if let Some(piece) = tape.pieces.get(at).cloned() {
            self.next += 1;
            if self.is_first {
                tape.first_client = Some(self.next);
                tape.forget();
                let appender = tape.appender.take();
                Wakers(appender.into_iter().collect()).unlocked(tape);
            }
            return Poll::Ready(Some(Ok(Frame::data(piece))));
        }
        match tape.end.clone() {
            Some(end) => {
                self.has_ended = true;
                Poll::Ready(match end {
                    End::Whole(trailers) => trailers.map(|trailers| Ok(Frame::trailers(trailers))),
                    End::Broken => Some(Err(BrokeOff.into())),
                })
            }
            None => {
                if !tape.readers.iter().any(|waker| waker.will_wake(context.waker())) {
                    tape.readers.push(context.waker().clone());
                }
                Poll::Pending
            }
        }
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        match self.recording.exact {
            // Only what was not read yet counts, and that is known before the first piece.
            Some(exact) if self.next == 0 => SizeHint::with_exact(exact),
            Some(_) | None => SizeHint::default(),
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        if self.is_first {
            let mut tape = self.recording.tape.lock();
            tape.first_client = None;
            tape.forget();
            let appender = tape.appender.take();
            Wakers(appender.into_iter().collect()).unlocked(tape);
        }
    }
}
