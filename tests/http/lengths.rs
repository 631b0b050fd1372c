//! Answers whose bodies are shorter, longer or otherwise than they were said to be.

use crate::service::{around, begin, layer, post, send, store};
use bytes::Bytes;
use http::{Response, StatusCode};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::{BodyExt, Full};
use oncekey::http::{BoxError, EventKind, Policy};
use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};

/// Pieces with a length that is told of them; none is there at once.
struct Told {
    len: u64,
    pieces: VecDeque<usize>,
    is_late: bool,
}

fn told(len: u64, pieces: &[usize]) -> Told {
    Told { len, pieces: pieces.iter().copied().collect(), is_late: true }
}

impl http_body::Body for Told {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.is_late = !self.is_late;
        if !self.is_late {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(self.pieces.pop_front().map(|len| Ok(Frame::data(Bytes::from(vec![b'x'; len])))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.len)
    }
}

#[tokio::test]
async fn empty_pieces_change_nothing() {
    // The last one is what HTTP/2 has for the end of a stream.
    for pieces in [&[600, 0, 400, 0][..], &[60_000, 0, 40_000, 0], &[0, 100_000, 0, 0]] {
        let len = pieces.iter().sum::<usize>();
        let (service, log) =
            around(layer(&store(), Policy::new()), move |_| async move { Response::new(told(len as u64, pieces)) });
        for _ in 0..2 {
            assert_eq!(send(&service, post("a", "")).await.body.len(), len);
        }
        assert_eq!(log.runs(), 1);
    }
}

#[tokio::test]
async fn a_body_of_another_length_than_was_told_is_unknown_and_not_stored() {
    for (len, pieces) in [
        (1000, &[500][..]),
        (100_000, &[50_000]),
        (1000, &[1001]),
        (100_000, &[100_000, 1]),
        (100_000, &[60_000, 60_000]),
    ] {
        let (service, log) =
            around(layer(&store(), Policy::new()), move |_| async move { Response::new(told(len, pieces)) });
        let first = begin(&service, post("a", "")).await;
        assert!(first.into_body().collect().await.is_err(), "{len} {pieces:?}");
        send(&service, post("a", "")).await.assert_problem(409, "outcome-unknown");
        assert_eq!(log.events()[1], EventKind::Unknown);
    }
}

#[tokio::test]
async fn a_length_in_the_head_counts_as_one() {
    for (len, is_right) in [("7", true), ("8", false)] {
        let handler = move |_| async move {
            let (frames, body) = crate::service::fed();
            frames.send(crate::service::data("charged")).unwrap();
            Response::builder().header("content-length", len).body(body).unwrap()
        };
        let (service, _) = around(layer(&store(), Policy::new()), handler);
        assert_eq!(begin(&service, post("a", "")).await.into_body().collect().await.is_ok(), is_right);
        let later = begin(&service, post("a", "")).await;
        assert_eq!(later.status(), if is_right { StatusCode::OK } else { StatusCode::CONFLICT });
        if is_right {
            assert_eq!(later.body().size_hint().exact(), Some(7));
        }
    }
}

#[tokio::test]
async fn an_answer_without_its_body_is_not_described_as_if_it_had_one() {
    let handler = |_| async {
        let response = Response::builder().header("content-digest", "sha-256=:x:").header("content-type", "text/plain");
        response.header("x-kept", "1").body(Full::new(Bytes::from(vec![1; 100]))).unwrap()
    };
    let (service, _) = around(layer(&store(), Policy::new().max_answer(10)), handler);
    send(&service, post("a", "")).await;
    let later = send(&service, post("a", "")).await;
    assert_eq!(
        (later.header("content-digest"), later.header("content-type"), later.header("x-kept")),
        (None, None, Some("1"))
    );
}

/// A body that is always ready and has no end.
struct Endless;

impl http_body::Body for Endless {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&[b'x'; 4096])))))
    }
}

#[tokio::test]
async fn an_endless_answer_whose_client_left_lets_others_have_their_turn() {
    let (service, log) =
        around(layer(&store(), Policy::new().max_answer(10_000)), |_| async { Response::new(Endless) });
    drop(begin(&service, post("a", "")).await);
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(log.events(), [EventKind::Started]);
}
