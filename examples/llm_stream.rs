//! A token stream on axum: however many clients leave and come, a prompt is inferred once, and all who stay get the same tokens.
//!
//! For each prompt, a client reads a part of the stream and is killed; the model goes on without it. Meanwhile others attach with
//! the same key: they get the stream from its beginning, and then follow it live. One of them is killed too. Those who come later
//! get it from the store. The model draws its tokens by chance, so a second inference would show: all that was read has to be
//! equal to the byte.
//!
//! One prompt in four breaks off in the middle at first. Whoever followed it is told by an error, never by an end; an inference does
//! no harm if it is made again, so that is what the policy says.
//!
//! ```text
//! cargo run --features http --example llm_stream
//! ```

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::sse::{Event, Sse};
use axum::{Extension, Router, routing::post};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;
use oncekey::Store;
use oncekey::http::{BoxError, EventKind, IdempotencyLayer, InFlight, Interrupted, Policy, Running, Scope};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_stream::{Stream, StreamExt};

type Result<T> = std::result::Result<T, BoxError>;

const PROMPTS: usize = 16;
const TOKENS: usize = 40;
const EACH: Duration = Duration::from_millis(5);
/// Clients that attach to a stream and stay.
const FOLLOWERS: usize = 4;
/// Clients that come when all is done.
const LATECOMERS: usize = 2;

// ---- The service ---------------------------------------------------------------------------------------------------------------

fn idempotency(store: Store) -> IdempotencyLayer {
    let policy = Policy::new()
        .required(true)
        // Until the first token there is nothing to follow.
        .in_flight(InFlight::Wait(Duration::from_secs(10)))
        .interrupted(Interrupted::Rerun);
    IdempotencyLayer::new(store, Scope::single_tenant()).policy(policy)
}

fn router(model: Arc<Model>, idempotency: IdempotencyLayer) -> Router {
    Router::new().route("/completions", post(complete)).with_state(model).layer(idempotency)
}

async fn complete(
    State(model): State<Arc<Model>>,
    Extension(running): Extension<Running>,
    prompt: String,
) -> Sse<impl Stream<Item = io::Result<Event>>> {
    let tokens = model.infer(prompt, running.attempt());
    let done = tokio_stream::once(Ok(Event::default().data("[DONE]")));
    Sse::new(tokens.map(|token| Ok(Event::default().data(token?))).chain(done))
}

// ---- The model -----------------------------------------------------------------------------------------------------------------

#[derive(Default)]
struct Model {
    inferences: Mutex<HashMap<String, u32>>,
}

impl Model {
    /// Tokens drawn by chance, one after the other; unlucky prompts break off at the first attempt.
    fn infer(&self, prompt: String, attempt: u32) -> impl Stream<Item = io::Result<String>> + use<> {
        let breaks_off = is_unlucky(&prompt) && attempt == 1;
        *self.inferences.lock().entry(prompt).or_default() += 1;
        let token = move |n| match n {
            _ if breaks_off && n == TOKENS * 3 / 4 => Err(io::Error::other("the model broke off")),
            _ => Ok(format!("{:08x}", fastrand::u32(..))),
        };
        tokio_stream::iter(0..TOKENS).map(token).throttle(EACH)
    }
}

fn is_unlucky(prompt: &str) -> bool {
    prompt.ends_with("unlucky")
}

// ---- The clients ---------------------------------------------------------------------------------------------------------------

#[derive(Clone)]
struct Reader {
    http: Client<HttpConnector, Full<Bytes>>,
    service: SocketAddr,
    key: String,
    prompt: String,
}

/// What the clients of one prompt read.
#[derive(Default)]
struct Read {
    /// Whole streams.
    whole: Vec<Bytes>,
    broken: u32,
}

impl Reader {
    async fn open(&self) -> Result<Body> {
        let request = Request::post(format!("http://{}/completions", self.service))
            .header("idempotency-key", &self.key)
            .body(Full::from(self.prompt.clone()))?;
        let response = self.http.request(request).await?;
        let status = response.status();
        if status.is_success() {
            Ok(Body::new(response.into_body()))
        } else {
            Err(format!("answered with {status}").into())
        }
    }

    /// Reads some tokens, and is gone: the connection closes.
    async fn read_some_and_die(&self, tokens: usize) -> Result<()> {
        let mut body = self.open().await?;
        for _ in 0..tokens {
            body.frame().await.ok_or("the stream ended early")??;
        }
        Ok(())
    }

    /// Reads to the end, from the beginning again if the stream breaks off. Returns how often it did.
    async fn read_to_the_end(&self) -> Result<(Bytes, u32)> {
        for broken in 0..10 {
            let body = self.open().await?;
            if let Ok(whole) = body.collect().await {
                return Ok((whole.to_bytes(), broken));
            }
        }
        Err("no stream got to its end".into())
    }

    async fn run(self, number: usize) -> Result<Read> {
        let mut read = Read::default();
        self.read_some_and_die(1 + number % (TOKENS / 4)).await?;
        let mut followers = JoinSet::new();
        for n in 0..FOLLOWERS {
            let reader = self.clone();
            followers.spawn(async move {
                tokio::time::sleep(EACH * n as u32).await;
                reader.read_to_the_end().await
            });
        }
        self.read_some_and_die(TOKENS / 2).await?;
        for followed in followers.join_all().await {
            let (whole, broken) = followed?;
            read.whole.push(whole);
            read.broken += broken;
        }
        for _ in 0..LATECOMERS {
            read.whole.push(self.read_to_the_end().await?.0);
        }
        Ok(read)
    }
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let dir = tempfile::tempdir()?;
    let counts = Arc::new(Mutex::new(HashMap::<EventKind, u32>::new()));
    let observed = Arc::clone(&counts);
    let idempotency = idempotency(Store::open(dir.path().join("completions"))?)
        .observe(move |event| *observed.lock().entry(event.kind).or_default() += 1);
    let model = Arc::new(Model::default());
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let service = listener.local_addr()?;
    tokio::spawn(axum::serve(listener, router(Arc::clone(&model), idempotency.clone())).into_future());

    let http = Client::builder(TokioExecutor::new()).build_http();
    let mut readers = JoinSet::new();
    for number in 0..PROMPTS {
        let luck = if number.is_multiple_of(4) { "unlucky" } else { "lucky" };
        let (key, prompt) = (format!("completion-{number}"), format!("What is {number}? Be {luck}"));
        let reader = Reader { http: http.clone(), service, key, prompt: prompt.clone() };
        readers.spawn(async move { (prompt, reader.run(number).await) });
    }
    let (mut streams, mut broken, mut unfinished, mut contradicted, mut double) = (0, 0, 0, 0, 0);
    for (prompt, read) in readers.join_all().await {
        let read = read?;
        streams += read.whole.len();
        broken += read.broken;
        unfinished += read.whole.iter().filter(|whole| !whole.ends_with(b"data: [DONE]\n\n")).count();
        contradicted += read.whole.iter().filter(|whole| *whole != &read.whole[0]).count();
        let expected = if is_unlucky(&prompt) { 2 } else { 1 };
        double += u32::from(model.inferences.lock().get(&prompt) != Some(&expected));
    }
    idempotency.drained().await;

    let counts = counts.lock();
    let count = |kind| counts.get(&kind).copied().unwrap_or_default();
    let (inferences, broke_off) = (model.inferences.lock().values().sum::<u32>(), count(EventKind::Unknown));
    println!(
        "llm_stream: {PROMPTS} prompts, {inferences} inferences, {broke_off} of them broke off, {double} double; {} clients killed, \
         {streams} whole streams, {broken} told of the break, {} attached, {} replayed, {unfinished} unfinished, {contradicted} contradicted",
        2 * PROMPTS,
        count(EventKind::Attached),
        count(EventKind::Replayed),
    );
    let is_good = double == 0 && unfinished == 0 && contradicted == 0 && count(EventKind::Attached) > 0;
    Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
