//! A client's connection as bytes: deadlines that hyper doesn't keep, and the check of its framing.
//!
//! hyper closes a connection that is idle for too long between requests. Not limited by it, and so limited here: the time
//! for a head that has begun, or for the first byte of a fresh connection; and the time that a client may take nothing of
//! what it is sent. Timers are set up only where there is something to wait for.

use super::framing::Framing;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// A stream whose reads and writes are watched.
pub struct Wire<S> {
    stream: S,
    framing: Framing,
    ambiguous: Ambiguous,
    head: Deadline,
    write: Deadline,
}

/// The number of the request on this connection that says its length in two ways, if there was one.
#[derive(Clone)]
pub struct Ambiguous(Arc<AtomicU64>);

const NONE: u64 = u64::MAX;

impl Ambiguous {
    /// Whether the request of this number is the one. It is known before the request's head reaches the service, by the
    /// same task: the order of the two needs no more than that.
    pub fn is(&self, number: u64) -> bool {
        self.0.load(Ordering::Relaxed) == number
    }
}

/// A time limit that runs only while something is waited for.
struct Deadline {
    limit: Duration,
    sleep: Option<Pin<Box<Sleep>>>,
    is_running: bool,
}

impl Deadline {
    fn new(limit: Duration) -> Self {
        Deadline { limit, sleep: None, is_running: false }
    }

    fn stop(&mut self) {
        self.is_running = false;
    }

    /// Ready when the limit has passed since the first call after a stop.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let limit = self.limit;
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        if !self.is_running {
            self.is_running = true;
            sleep.as_mut().reset(Instant::now() + limit);
        }
        sleep.as_mut().poll(cx)
    }
}

impl<S> Wire<S> {
    pub fn new(stream: S, max_head: usize, head: Duration, write: Duration) -> (Self, Ambiguous) {
        let ambiguous = Ambiguous(Arc::new(AtomicU64::new(NONE)));
        let wire = Wire {
            stream,
            framing: Framing::new(max_head),
            ambiguous: ambiguous.clone(),
            head: Deadline::new(head),
            write: Deadline::new(write),
        };
        (wire, ambiguous)
    }

    fn is_waiting_for_a_head(&self) -> bool {
        let is_fresh = self.framing.heads() == 0 && !self.framing.is_unread();
        is_fresh || self.framing.is_in_head()
    }

    fn written<T>(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match result {
            Poll::Ready(result) => {
                self.write.stop();
                Poll::Ready(result)
            }
            Poll::Pending => {
                ready!(self.write.poll(cx));
                Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing of its answer")))
            }
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let wire = &mut *self;
        let known = buffer.filled().len();
        match Pin::new(&mut wire.stream).poll_read(cx, buffer) {
            Poll::Ready(result) => {
                if let Some(number) = wire.framing.take(&buffer.filled()[known..]) {
                    wire.ambiguous.0.store(number, Ordering::Relaxed);
                }
                if !wire.is_waiting_for_a_head() {
                    wire.head.stop();
                }
                Poll::Ready(result)
            }
            Poll::Pending if wire.is_waiting_for_a_head() => {
                ready!(wire.head.poll(cx));
                Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the request's head takes too long")))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.written(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.written(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_flush(cx);
        self.written(cx, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.written(cx, result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    const HEAD: Duration = Duration::from_secs(10);
    const WRITE: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn a_head_that_trickles_is_cut_off_in_time() {
        let (mut client, server) = duplex(1024);
        let (mut wire, _) = Wire::new(server, 8192, HEAD, WRITE);
        let begun = Instant::now();
        let trickle = async {
            loop {
                client.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        let read = async {
            let mut bytes = [0; 64];
            loop {
                if let Err(error) = wire.read(&mut bytes).await {
                    return error;
                }
            }
        };
        let error = tokio::select! {
            () = trickle => unreachable!("it never ends"),
            error = read => error,
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(begun.elapsed().as_secs(), HEAD.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn between_requests_and_in_bodies_this_sets_no_limit() {
        let (mut client, server) = duplex(1024);
        let (mut wire, _) = Wire::new(server, 8192, HEAD, WRITE);
        let mut bytes = [0; 256];
        client.write_all(b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\n").await.unwrap();
        assert!(wire.read(&mut bytes).await.unwrap() > 0);
        for part in [&b"a"[..], b"b", b"GET / HTTP/1.1\r\n\r\n"] {
            assert!(tokio::time::timeout(HEAD * 10, wire.read(&mut bytes)).await.is_err());
            client.write_all(part).await.unwrap();
            assert_eq!(wire.read(&mut bytes).await.unwrap(), part.len());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_cut_off_and_one_that_is_slow_is_not() {
        let (mut client, server) = duplex(16);
        let (mut wire, _) = Wire::new(server, 8192, HEAD, WRITE);
        let begun = Instant::now();
        let slow = async {
            let mut byte = [0; 16];
            for _ in 0..4 {
                tokio::time::sleep(WRITE / 2).await;
                client.read_exact(&mut byte).await.unwrap();
            }
            client
        };
        let (client, error) = tokio::join!(slow, async { wire.write_all(&[b'a'; 1000]).await.unwrap_err() });
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(begun.elapsed(), WRITE / 2 * 4 + WRITE);
        drop(client);
    }
}
