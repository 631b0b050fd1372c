//! A body on its way through the gateway: it must not stand still, and has no trailers that belong into a head.

use super::forward;
use http_body::{Body, Frame, SizeHint};
use oncekey::http::BoxError;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, Sleep};

/// Ends with [`Stalled`] where the next frame takes longer than the limit, and marks the errors of the body within. All bodies pass
/// through one, of requests and of answers, with a key and without.
pub struct Paced<B> {
    body: B,
    limit: Duration,
    /// Set up at the first wait: most bodies are there at once.
    sleep: Option<Pin<Box<Sleep>>>,
    is_waiting: bool,
}

/// No frame came in time.
#[derive(Debug)]
pub struct Stalled;

impl fmt::Display for Stalled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no part of the body came in time")
    }
}

impl std::error::Error for Stalled {}

/// The body ended in an error of its own.
#[derive(Debug)]
pub struct Broken(BoxError);

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the body broke off: {}", self.0)
    }
}

impl std::error::Error for Broken {}

impl<B> Paced<B> {
    pub fn new(body: B, limit: Duration) -> Self {
        Paced { body, limit, sleep: None, is_waiting: false }
    }
}

impl<B> Body for Paced<B>
where
    B: Body + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = B::Data;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, BoxError>>> {
        let paced = &mut *self;
        match Pin::new(&mut paced.body).poll_frame(cx) {
            Poll::Ready(frame) => {
                paced.is_waiting = false;
                Poll::Ready(frame.map(|frame| frame.map(forward::frame).map_err(|error| Broken(error.into()).into())))
            }
            Poll::Pending => {
                let limit = paced.limit;
                let sleep = paced.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
                if !paced.is_waiting {
                    paced.is_waiting = true;
                    sleep.as_mut().reset(Instant::now() + limit);
                }
                sleep.as_mut().poll(cx).map(|()| Some(Err(Stalled.into())))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use http_body_util::{BodyExt, Channel};

    const LIMIT: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn a_body_may_take_any_time_as_long_as_it_moves() {
        let (mut sender, body) = Channel::<Bytes>::new(1);
        let mut paced = Paced::new(body, LIMIT);
        let send = async {
            for _ in 0..10 {
                tokio::time::sleep(LIMIT - Duration::from_secs(1)).await;
                sender.send_data(Bytes::from_static(b"a")).await.unwrap();
            }
            sender
        };
        let take = async {
            for _ in 0..10 {
                assert!(paced.frame().await.unwrap().is_ok());
            }
        };
        let (_open, ()) = tokio::join!(send, take);
        let stood_from = Instant::now();
        let error = paced.frame().await.unwrap().unwrap_err();
        assert!(error.is::<Stalled>());
        assert_eq!(stood_from.elapsed(), LIMIT);
    }
}
