//! Answers that are still being made when their first client has their head.

use crate::service::{Log, Piece, Service, around, begin, data, fed, layer, piece, post, read, send, store, until};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::{BodyExt, Full};
use oncekey::http::{Body, BoxError, EventKind, InFlight, Policy, Running, Verdict};
use oncekey::{Durability, Request as Key, Standing, Store};
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

fn key() -> Key<'static> {
    Key::new("a").operation("POST /payments")
}

/// A service whose one answer the test feeds.
fn streaming(store: &Store, policy: Policy) -> (UnboundedSender<Piece>, Service, Log) {
    let (frames, body) = fed();
    let body = Arc::new(Mutex::new(Some(body)));
    let handler = move |_| {
        let body = body.lock().unwrap().take().unwrap();
        async move {
            Response::builder()
                .header("content-type", "text/event-stream")
                .header("set-cookie", "a=b")
                .body(body)
                .unwrap()
        }
    };
    let (service, log) = around(layer(store, policy), handler);
    (frames, service, log)
}

/// A service whose runs the test answers, by their number.
fn by_hand(store: &Store, policy: Policy) -> (Service, Log, impl Fn(usize, Body) + use<>) {
    let waiting = Arc::new(Mutex::new(Vec::new()));
    let runs = Arc::clone(&waiting);
    let (service, log) = around(layer(store, policy), move |_| {
        let (answer, answered) = oneshot::channel();
        runs.lock().unwrap().push(Some(answer));
        async move { Response::new(answered.await.unwrap()) }
    });
    let answer = move |run: usize, body| {
        let answer: oneshot::Sender<Body> = waiting.lock().unwrap()[run].take().unwrap();
        answer.send(body).unwrap();
    };
    (service, log, answer)
}

fn asked(service: &Service) -> tokio::task::JoinHandle<Response<Body>> {
    let service = service.clone();
    tokio::spawn(async move { begin(&service, post("a", "")).await })
}

#[tokio::test]
async fn pieces_pass_as_they_come_and_a_duplicate_gets_them_from_the_first() {
    let store = store();
    let (frames, service, log) = streaming(&store, Policy::new());
    let first = begin(&service, post("a", "")).await;
    assert_eq!(first.headers()["set-cookie"], "a=b");
    let mut first = first.into_body();
    frames.send(data("one ")).unwrap();
    assert_eq!(piece(&mut first).await.unwrap().unwrap(), "one ");
    let second = begin(&service, post("a", "")).await;
    assert_eq!(second.headers()["idempotency-replayed"], "true");
    assert_eq!(second.headers()["cache-control"], "no-store");
    assert_eq!(second.headers()["content-type"], "text/event-stream");
    assert!(second.headers().get("set-cookie").is_none());
    let mut second = second.into_body();
    assert_eq!(piece(&mut second).await.unwrap().unwrap(), "one ");
    frames.send(data("two ")).unwrap();
    for body in [&mut second, &mut first] {
        assert_eq!(piece(body).await.unwrap().unwrap(), "two ");
    }
    send(&service, post("a", "other")).await.assert_problem(422, "key-reused");
    let mut trailers = HeaderMap::new();
    trailers.append("x-end", "1".parse().unwrap());
    frames.send(Ok(Frame::trailers(trailers.clone()))).unwrap();
    drop(frames);
    for body in [first, second] {
        let rest = body.collect().await.unwrap();
        // Who sees the end sees the answer stored.
        assert!(matches!(store.lookup(&key()).unwrap().unwrap().standing, Standing::Completed(_)));
        assert_eq!(rest.trailers(), Some(&trailers));
    }
    let replay = send(&service, post("a", "")).await;
    assert_eq!((replay.text(), &replay.trailers), ("one two ", &Some(trailers)));
    let expected =
        [EventKind::Started, EventKind::Attached, EventKind::Mismatched, EventKind::Stored, EventKind::Replayed];
    assert_eq!((log.runs(), log.events()), (1, expected.to_vec()));
}

#[tokio::test]
async fn who_waits_for_an_answer_follows_it_once_it_begins() {
    let store = store();
    let (frames, body) = fed();
    let (service, log, answer) = by_hand(&store, Policy::new().in_flight(InFlight::Wait(Duration::from_secs(600))));
    let first = asked(&service);
    until(|| log.runs() == 1).await;
    let second = asked(&service);
    until(|| store.stats().in_flight == 1).await;
    answer(0, Body::new(body));
    let (first, second) = (first.await.unwrap(), second.await.unwrap());
    assert_eq!(second.headers()["idempotency-replayed"], "true");
    frames.send(data("tokens")).unwrap();
    drop(frames);
    assert_eq!(read(first).await.text(), "tokens");
    assert_eq!(read(second).await.text(), "tokens");
    assert_eq!(log.runs(), 1);
}

#[tokio::test]
async fn a_stream_that_breaks_is_told_to_all_and_its_outcome_is_unknown() {
    let store = store();
    let (frames, service, log) = streaming(&store, Policy::new());
    let mut first = begin(&service, post("a", "")).await.into_body();
    frames.send(data("one ")).unwrap();
    let mut second = begin(&service, post("a", "")).await.into_body();
    frames.send(Err(BoxError::from("reset"))).unwrap();
    for body in [&mut first, &mut second] {
        assert_eq!(piece(body).await.unwrap().unwrap(), "one ");
        assert!(piece(body).await.unwrap().is_err());
        assert!(piece(body).await.is_none());
    }
    send(&service, post("a", "")).await.assert_problem(409, "outcome-unknown");
    assert_eq!((log.runs(), log.events()[2]), (1, EventKind::Unknown));
}

#[tokio::test]
async fn an_answer_that_breaks_before_anything_was_passed_on_is_unknown_too() {
    let store = store();
    let (frames, service, log) = streaming(&store, Policy::new());
    frames.send(data("one ")).unwrap();
    frames.send(Err(BoxError::from("reset"))).unwrap();
    let mut first = begin(&service, post("a", "")).await.into_body();
    assert_eq!(piece(&mut first).await.unwrap().unwrap(), "one ");
    assert!(piece(&mut first).await.unwrap().is_err());
    send(&service, post("a", "")).await.assert_problem(409, "outcome-unknown");
    assert_eq!(log.runs(), 1);
}

/// A body that tells its length, and gives one piece when it is polled the second time.
struct Sized {
    len: usize,
    polls: usize,
    is_broken: bool,
}

impl http_body::Body for Sized {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.polls += 1;
        match self.polls {
            2 => Poll::Ready(Some(Ok(Frame::data(Bytes::from(vec![b'x'; self.len]))))),
            4 if self.is_broken => Poll::Ready(Some(Err(BoxError::from("reset")))),
            1 | 3 => {
                context.waker().wake_by_ref();
                Poll::Pending
            }
            _ => Poll::Ready(None),
        }
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.len as u64)
    }
}

#[tokio::test]
async fn an_answer_that_tells_its_length_is_stored_before_its_last_byte_is_sent() {
    for len in [10, 100_000] {
        let store = store();
        let handler = move |_| async move { Response::new(Sized { len, polls: 0, is_broken: false }) };
        let (service, log) = around(layer(&store, Policy::new()), handler);
        let response = begin(&service, post("a", "")).await;
        assert_eq!(response.body().size_hint().exact(), Some(len as u64));
        let mut body = response.into_body();
        assert_eq!(piece(&mut body).await.unwrap().unwrap().len(), len);
        assert!(matches!(store.lookup(&key()).unwrap().unwrap().standing, Standing::Completed(_)));
        assert!(piece(&mut body).await.is_none());
        assert_eq!((send(&service, post("a", "")).await.body.len(), log.runs()), (len, 1));
    }
}

#[tokio::test]
async fn an_answer_over_the_cap_that_tells_its_length_is_stored_before_its_last_byte_is_sent() {
    let store = store();
    let handler = |_| async { Response::new(Full::new(Bytes::from(vec![b'x'; 4 * PIECE]))) };
    let (service, _) = around(layer(&store, Policy::new().max_answer(PIECE)), handler);
    let mut body = begin(&service, post("a", "")).await.into_body();
    assert_eq!(piece(&mut body).await.unwrap().unwrap().len(), 4 * PIECE);
    assert!(matches!(store.lookup(&key()).unwrap().unwrap().standing, Standing::Completed(_)));
}

#[tokio::test]
async fn the_last_byte_of_an_answer_that_breaks_after_it_is_not_sent() {
    let handler = move |_| async move { Response::new(Sized { len: 100_000, polls: 0, is_broken: true }) };
    let (service, _) = around(layer(&store(), Policy::new()), handler);
    let mut body = begin(&service, post("a", "")).await.into_body();
    assert!(piece(&mut body).await.unwrap().is_err());
}

#[tokio::test]
async fn a_handler_can_decide_at_the_end_of_its_stream() {
    for (verdict, status) in [(Verdict::Release, None), (Verdict::Unknown, Some(409))] {
        let store = store();
        let (frames, body) = fed();
        let kept = Arc::new(Mutex::new((Some(body), None)));
        let inside = Arc::clone(&kept);
        let handler = move |request: Request<oncekey::http::Body>| {
            let mut kept = inside.lock().unwrap();
            kept.1 = request.extensions().get::<Running>().cloned();
            let body = kept.0.take();
            async move {
                body.map_or_else(
                    || Response::new(oncekey::http::Body::empty()),
                    |body| Response::new(oncekey::http::Body::new(body)),
                )
            }
        };
        let (service, log) = around(layer(&store, Policy::new()), handler);
        let first = begin(&service, post("a", "")).await;
        frames.send(data("one")).unwrap();
        let running = kept.lock().unwrap().1.clone().unwrap();
        running.set_recovery_point("half").await.unwrap();
        running.set_verdict(verdict);
        drop(frames);
        assert_eq!(read(first).await.text(), "one");
        let again = send(&service, post("a", "")).await;
        match status {
            None => assert_eq!(log.runs(), 2),
            Some(status) => again.assert_problem(status, "outcome-unknown"),
        }
    }
}

const PIECE: usize = 64 * 1024;

fn large() -> Piece {
    Ok(Frame::data(Bytes::from(vec![b'x'; PIECE])))
}

#[tokio::test]
async fn past_the_cap_memory_is_bounded_and_only_the_first_client_counts() {
    let store = store();
    let (frames, service, log) = streaming(&store, Policy::new().max_answer(2 * PIECE));
    let mut first = begin(&service, post("a", "")).await.into_body();
    frames.send(large()).unwrap();
    assert_eq!(piece(&mut first).await.unwrap().unwrap().len(), PIECE);
    let mut slow = begin(&service, post("a", "")).await.into_body();
    for _ in 0..100 {
        frames.send(large()).unwrap();
        assert_eq!(piece(&mut first).await.unwrap().unwrap().len(), PIECE);
    }
    // One that is far behind is cut off, and one that comes now is told to come back.
    let mut got = 0;
    let error = loop {
        match piece(&mut slow).await {
            Some(Ok(bytes)) => got += bytes.len(),
            Some(Err(error)) => break error,
            None => panic!("the answer isn't over"),
        }
    };
    assert!(got <= 2 * PIECE, "{got}: {error}");
    send(&service, post("a", "")).await.assert_problem(409, "in-flight");
    // Without anybody reading, no more is taken from the service than a window holds.
    for _ in 0..100 {
        frames.send(large()).unwrap();
    }
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    drop(frames);
    let mut rest = 0;
    while let Some(bytes) = piece(&mut first).await {
        rest += bytes.unwrap().len();
    }
    assert_eq!(rest, 100 * PIECE);
    let later = send(&service, post("a", "")).await;
    assert_eq!(later.header("idempotency-replay-unavailable"), Some("body-not-stored"));
    assert_eq!((log.runs(), later.body.len()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_first_client_that_takes_nothing_holds_an_answer_past_the_cap_up_for_a_while_only() {
    let store = store();
    let (frames, service, log) = streaming(&store, Policy::new().max_answer(PIECE));
    let mut first = begin(&service, post("a", "")).await.into_body();
    for _ in 0..100 {
        frames.send(large()).unwrap();
    }
    drop(frames);
    while !log.events().contains(&EventKind::StoredWithoutBody) {
        tokio::time::advance(Duration::from_secs(1)).await;
    }
    while let Some(Ok(_)) = piece(&mut first).await {}
    assert!(piece(&mut first).await.is_none());
    let later = send(&service, post("a", "")).await;
    assert_eq!(later.header("idempotency-replay-unavailable"), Some("body-not-stored"));
    assert_eq!(log.runs(), 1);
}

#[tokio::test]
async fn a_first_client_that_leaves_past_the_cap_holds_nothing_up() {
    let store = store();
    let (frames, service, log) = streaming(&store, Policy::new().max_answer(PIECE));
    let first = begin(&service, post("a", "")).await;
    for _ in 0..100 {
        frames.send(large()).unwrap();
    }
    drop((frames, first));
    until(|| log.events().contains(&EventKind::StoredWithoutBody)).await;
    assert_eq!(log.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_first_client_that_reads_slowly_but_steadily_gets_an_answer_past_the_cap_whole() {
    let (frames, service, _) = streaming(&store(), Policy::new().max_answer(PIECE));
    let mut first = begin(&service, post("a", "")).await.into_body();
    for _ in 0..40 {
        frames.send(large()).unwrap();
    }
    drop(frames);
    let mut got = 0;
    loop {
        tokio::time::advance(Duration::from_secs(4)).await;
        tokio::task::yield_now().await;
        let Some(bytes) = piece(&mut first).await else { break };
        bytes.unwrap();
        got += 1;
    }
    assert_eq!(got, 40);
}

#[tokio::test]
async fn a_duplicate_outlives_a_first_client_that_leaves_past_the_cap() {
    let (frames, service, _) = streaming(&store(), Policy::new().max_answer(10));
    let first = begin(&service, post("a", "")).await;
    frames.send(data("12345")).unwrap();
    let mut second = begin(&service, post("a", "")).await.into_body();
    assert_eq!(piece(&mut second).await.unwrap().unwrap(), "12345");
    drop(first);
    for text in ["6789a", "bcdef"] {
        frames.send(data(text)).unwrap();
        assert_eq!(piece(&mut second).await.unwrap().unwrap(), text);
    }
    drop(frames);
    assert!(piece(&mut second).await.is_none());
}

/// A waker whose being held can be seen.
struct Seen;

impl std::task::Wake for Seen {
    fn wake(self: Arc<Self>) {}
}

#[tokio::test]
async fn duplicates_that_left_leave_nothing_behind() {
    let (frames, service, _) = streaming(&store(), Policy::new());
    let _first = begin(&service, post("a", "")).await;
    frames.send(data("one")).unwrap();
    let seen = Arc::new(Seen);
    for _ in 0..1000 {
        let mut body = begin(&service, post("a", "")).await.into_body();
        assert_eq!(piece(&mut body).await.unwrap().unwrap(), "one");
        let waker = Arc::clone(&seen).into();
        assert!(Pin::new(&mut body).poll_frame(&mut Context::from_waker(&waker)).is_pending());
    }
    assert_eq!(Arc::strong_count(&seen), 1);
}

#[tokio::test]
async fn a_rerun_has_nothing_of_the_attempt_that_broke() {
    let (frames, body) = fed();
    let body = Arc::new(Mutex::new(Some(body)));
    let policy = Policy::new().interrupted(oncekey::http::Interrupted::Rerun);
    let (service, _) = around(layer(&store(), policy), move |_| {
        let body = body.lock().unwrap().take();
        async move { Response::new(body.map_or_else(|| oncekey::http::Body::from("second"), oncekey::http::Body::new)) }
    });
    let mut first = begin(&service, post("a", "")).await.into_body();
    frames.send(data("one")).unwrap();
    assert_eq!(piece(&mut first).await.unwrap().unwrap(), "one");
    frames.send(Err(BoxError::from("reset"))).unwrap();
    assert!(piece(&mut first).await.unwrap().is_err());
    assert_eq!(send(&service, post("a", "")).await.text(), "second");
}

#[test]
fn a_duplicate_never_follows_the_answer_to_another_payload() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
    runtime.block_on(async {
        let store = store();
        let (frames, body) = fed();
        let kept = Arc::new(Mutex::new(Some(body)));
        let handler = move |request: Request<oncekey::http::Body>| {
            let kept = Arc::clone(&kept);
            async move {
                if request.into_body().collect().await.unwrap().to_bytes() == "x" {
                    return Response::builder().status(503).body(oncekey::http::Body::from("busy")).unwrap();
                }
                Response::new(oncekey::http::Body::new(kept.lock().unwrap().take().unwrap()))
            }
        };
        let (service, _) = around(layer(&store, Policy::new().durability(Durability::Synced)), handler);
        // The only thread for the store is busy, so that both get to it before either goes on.
        let (go, gate) = std::sync::mpsc::channel::<()>();
        tokio::task::spawn_blocking(move || gate.recv().unwrap());
        let mut first = pin!(begin(&service, post("a", "x")));
        let mut second = pin!(begin(&service, post("a", "x")));
        for request in [&mut first, &mut second] {
            assert!(request.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        }
        go.send(()).unwrap();
        tokio::task::spawn_blocking(|| ()).await.unwrap();
        assert_eq!(store.stats().in_flight, 1);
        // The second was told that the first runs. That one ends, and another payload takes the key.
        assert_eq!(first.await.status(), 503);
        let _other = begin(&service, post("a", "y")).await;
        frames.send(data("the answer to y")).unwrap();
        read(second.await).await.assert_problem(422, "key-reused");
    });
}

/// Plays a scene on a runtime of one thread, and fails if that thread is never let go.
fn alone(scene: impl Future<Output = ()> + Send + 'static) {
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(scene);
        done.send(()).unwrap();
    });
    ended.recv_timeout(Duration::from_secs(60)).unwrap();
}

#[test]
fn a_stream_whose_key_was_erased_is_not_taken_for_the_answer_of_who_has_the_key_now() {
    for waits in [false, true] {
        alone(async move {
            let store = store();
            let in_flight = if waits { InFlight::Wait(Duration::from_secs(600)) } else { InFlight::Refuse };
            let (service, log, answer) = by_hand(&store, Policy::new().in_flight(in_flight));
            let first = asked(&service);
            until(|| log.runs() == 1).await;
            let (_frames, body) = fed();
            answer(0, Body::new(body));
            let _streaming = first.await.unwrap();
            store.erase(&key()).unwrap();
            let second = asked(&service);
            until(|| log.runs() == 2).await;
            let third = asked(&service);
            if waits {
                // Its turn, and some more.
                for _ in 0..10 {
                    tokio::task::yield_now().await;
                }
                assert!(!third.is_finished());
                answer(1, Body::from("two"));
                assert_eq!(read(third.await.unwrap()).await.text(), "two");
            } else {
                read(third.await.unwrap()).await.assert_problem(409, "in-flight");
                answer(1, Body::from("two"));
            }
            assert_eq!(read(second.await.unwrap()).await.text(), "two");
            assert_eq!(log.runs(), 2);
        });
    }
}

#[test]
fn a_stream_that_begins_after_its_key_was_erased_hides_no_other() {
    alone(async {
        let store = store();
        let (service, log, answer) = by_hand(&store, Policy::new());
        let first = asked(&service);
        until(|| log.runs() == 1).await;
        store.erase(&key()).unwrap();
        let second = asked(&service);
        until(|| log.runs() == 2).await;
        let [(_one, late), (two, body)] = [fed(), fed()];
        answer(1, Body::new(body));
        let second = second.await.unwrap();
        answer(0, Body::new(late));
        let _late = first.await.unwrap();
        let third = begin(&service, post("a", "")).await;
        two.send(data("two")).unwrap();
        drop(two);
        for response in [second, third] {
            assert_eq!(read(response).await.text(), "two");
        }
    });
}

#[test]
fn a_body_of_empty_frames_without_end_leaves_the_thread_to_others() {
    alone(async {
        let endless = || Body::new(Endless);
        let policy = Policy::new().request_body_timeout(Duration::from_millis(1));
        let (service, log, answer) = by_hand(&store(), policy);
        let request = Request::post("/payments").header("idempotency-key", "b").body(endless()).unwrap();
        send(&service, request).await.assert_problem(408, "body-timeout");
        let first = asked(&service);
        until(|| log.runs() == 1).await;
        answer(0, endless());
        // It goes on for ever, and so do others.
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        first.abort();
    });
}

/// Always ready, with nothing.
struct Endless;

impl http_body::Body for Endless {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Piece>> {
        Poll::Ready(Some(Ok(Frame::data(Bytes::new()))))
    }
}

/// What a piece was read into.
struct Buffer {
    bytes: [u8; 8192],
    _open: Arc<()>,
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[tokio::test]
async fn small_pieces_do_not_keep_what_they_were_read_into() {
    let (frames, service, _) = streaming(&store(), Policy::new());
    let open = Arc::new(());
    let mut first = begin(&service, post("a", "")).await.into_body();
    for _ in 0..100 {
        let buffer = Bytes::from_owner(Buffer { bytes: [b'x'; 8192], _open: Arc::clone(&open) });
        frames.send(Ok(Frame::data(buffer.slice(..3)))).unwrap();
        drop(buffer);
        assert_eq!(piece(&mut first).await.unwrap().unwrap(), "xxx");
    }
    assert_eq!(Arc::strong_count(&open), 1);
    let mut second = begin(&service, post("a", "")).await.into_body();
    assert_eq!(piece(&mut second).await.unwrap().unwrap(), "xxx");
}
