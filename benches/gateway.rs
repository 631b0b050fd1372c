//! The gateway beside a bare proxy, by wrk on loopback: `cargo bench --features gateway --bench gateway`.
//!
//! Each round drives all subjects one after the other, and ratios are taken within a round; what is told is their median.
//! Servers are processes of their own, with as many threads as there are cores.
//!
//! With `--distinct-keys 1000000` it measures no rates: it sends that many keys to a gateway that may hold a tenth of them, and
//! ends with an error if one ran that wasn't answered so, or memory grew beyond what the keys held account for.

use bytes::Bytes;
use clap::{Parser, ValueEnum};
use http::{Request, Response, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::future::Future;
use std::io::{self, BufRead, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;
use tokio::net::TcpListener;

type AnyError = Box<dyn std::error::Error + Send + Sync>;

#[derive(Parser)]
struct Args {
    /// Rounds; of the ratios of each the median is told.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Seconds that each subject is driven in a round.
    #[arg(long, default_value_t = 3)]
    seconds: u32,
    /// Connections of wrk.
    #[arg(long, default_value_t = 32)]
    connections: u32,
    /// Keys that are sent once each to a gateway with `--max-keys`, instead of measuring.
    #[arg(long)]
    distinct_keys: Option<u64>,
    /// Keys that the gateway may hold then.
    #[arg(long, default_value_t = 100_000)]
    max_keys: u64,
    /// What this process is to serve, instead of measuring.
    #[arg(long)]
    serve: Option<Part>,
    #[arg(long)]
    upstream: Option<Uri>,
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Part {
    Upstream,
    Proxy,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match (args.serve, args.distinct_keys) {
        (None, None) => measure(&args),
        (None, Some(keys)) => flood(keys, &args),
        (Some(part), _) => serve(part, args.upstream),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gateway bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What clients get: about the size of an answer of an API.
const ANSWER: &str = r#"{"id":"pay_01JC9W3QK2","status":"succeeded","amount":100,"currency":"EUR"}"#;

#[tokio::main]
async fn serve(part: Part, upstream: Option<Uri>) -> Result<(), AnyError> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("listening on http://{}", listener.local_addr()?);
    match part {
        Part::Upstream => {
            accept(listener, |request: Request<Incoming>| async {
                request.into_body().collect().await.ok();
                Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(ANSWER.as_bytes()))))
            })
            .await
        }
        Part::Proxy => {
            let upstream = upstream.ok_or("a proxy needs --upstream")?;
            let mut connector = HttpConnector::new();
            connector.set_nodelay(true);
            let client: Client<_, Incoming> = Client::builder(TokioExecutor::new()).build(connector);
            accept(listener, move |mut request: Request<Incoming>| {
                let mut target = upstream.clone().into_parts();
                target.path_and_query = request.uri().path_and_query().cloned();
                *request.uri_mut() = Uri::from_parts(target).expect("the upstream with another path");
                request.headers_mut().remove("host");
                let client = client.clone();
                async move { client.request(request).await }
            })
            .await
        }
    }
}

async fn accept<F, B, E>(
    listener: TcpListener,
    answer: impl Fn(Request<Incoming>) -> F + Clone + Send + 'static,
) -> Result<(), AnyError>
where
    F: Future<Output = Result<Response<B>, E>> + Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<AnyError>,
    E: Into<AnyError>,
{
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let service = service_fn(answer.clone());
        // A client that leaves is no matter of the server's.
        tokio::spawn(async {
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await.ok()
        });
    }
}

/// A server, until it is dropped.
struct Server {
    child: Child,
    url: String,
    // Kept open, so that it can go on writing.
    _stdout: BufReader<ChildStdout>,
}

impl Server {
    fn start(command: &mut Command) -> Result<Self, AnyError> {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let mut stdout = BufReader::new(child.stdout.take().ok_or("no output of the server")?);
        let mut line = String::new();
        stdout.read_line(&mut line)?;
        let url =
            line.trim().strip_prefix("listening on ").ok_or("the server doesn't say where it listens")?.to_owned();
        Ok(Server { child, url, _stdout: stdout })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A gateway whose data is in a new directory.
fn gateway(upstream: &str, dir: &Path, more: &[&str]) -> Result<Server, AnyError> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oncekey"));
    command.args(["gateway", "--upstream", upstream, "--scope", "single-tenant"]).args(more);
    command.args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--data"]);
    Server::start(command.arg(tempfile::tempdir_in(dir)?.keep()))
}

/// What is asked of a subject.
#[derive(Clone, Copy)]
enum Load {
    /// Without a key.
    Plain,
    /// All with the same key.
    Replay,
    /// Each with a key of its own.
    Fresh,
}

/// What clients send.
const BODY: &str = r#"{"amount":100,"currency":"EUR"}"#;

impl Load {
    fn script(self) -> String {
        let body =
            format!(r#"wrk.method = "POST" wrk.body = '{BODY}' wrk.headers["Content-Type"] = "application/json""#);
        let key = match self {
            Load::Plain => "",
            Load::Replay => r#"wrk.headers["Idempotency-Key"] = "order-42""#,
            Load::Fresh => {
                r#"
                local thread = 0
                function setup(t) t:set("id", thread) thread = thread + 1 end
                local run = os.time() .. string.gsub(tostring({}), "%W", "")
                local n = 0
                function request()
                    n = n + 1
                    wrk.headers["Idempotency-Key"] = run .. "-" .. id .. "-" .. n
                    return wrk.format()
                end"#
            }
        };
        format!("{body}\n{key}\n")
    }
}

/// Answers a second that wrk counted; an error if any was no success.
fn wrk(dir: &Path, url: &str, load: Load, args: &Args) -> Result<f64, AnyError> {
    let script = dir.join("load.lua");
    fs::write(&script, load.script())?;
    let output = Command::new("wrk")
        .args(["--threads", "2", "--connections", &args.connections.to_string()])
        .args(["--duration", &format!("{}s", args.seconds), "--script"])
        .args([script.as_os_str(), url.as_ref()])
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => "wrk is missing: apt-get install wrk".into(),
            _ => AnyError::from(error),
        })?;
    let text = String::from_utf8_lossy(&output.stdout);
    if text.contains("Non-2xx") || text.contains("Socket errors") || !output.status.success() {
        return Err(format!("wrk was not answered well by {url}:\n{text}").into());
    }
    let rate = text.lines().find_map(|line| line.trim().strip_prefix("Requests/sec:"));
    Ok(rate.ok_or("wrk tells no rate")?.trim().parse()?)
}

/// Has the answer made that is replayed: many who ask for it at once would be told that it is on its way.
fn prime(server: &Server) -> Result<(), AnyError> {
    let address = server.url.trim_start_matches("http://");
    let head = "POST / HTTP/1.1\r\nConnection: close\r\nContent-Type: application/json\r\nIdempotency-Key: order-42";
    let mut stream = TcpStream::connect(address)?;
    write!(stream, "{head}\r\nHost: {address}\r\nContent-Length: {}\r\n\r\n{BODY}", BODY.len())?;
    let answer = io::read_to_string(stream)?;
    if answer.starts_with("HTTP/1.1 200") { Ok(()) } else { Err(answer.into()) }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn measure(args: &Args) -> Result<(), AnyError> {
    let dir = tempfile::tempdir()?;
    let own = std::env::current_exe()?;
    let upstream = Server::start(Command::new(&own).args(["--serve", "upstream"]))?;
    let proxy = Server::start(Command::new(&own).args(["--serve", "proxy", "--upstream", &upstream.url]))?;
    let gateway = |durability| gateway(&upstream.url, dir.path(), &["--durability", durability]);
    let buffered = gateway("buffered")?;
    let synced = gateway("synced")?;
    for server in [&buffered, &synced] {
        prime(server)?;
    }
    let subjects = [
        ("upstream alone", &upstream, Load::Plain),
        ("bare proxy", &proxy, Load::Plain),
        ("gateway, no key", &buffered, Load::Plain),
        ("gateway, replay", &buffered, Load::Replay),
        ("gateway, fresh, buffered", &buffered, Load::Fresh),
        ("gateway, replay, synced", &synced, Load::Replay),
        ("gateway, fresh, synced", &synced, Load::Fresh),
    ];
    let mut rates = vec![Vec::new(); subjects.len()];
    for round in 0..args.rounds {
        for (rates, (_, server, load)) in rates.iter_mut().zip(&subjects) {
            rates.push(wrk(dir.path(), &server.url, *load, args)?);
        }
        eprintln!("round {} of {}", round + 1, args.rounds);
    }
    let ratio = |of: usize, to: usize| median(rates[of].iter().zip(&rates[to]).map(|(of, to)| of / to).collect());
    println!("| subject | answers a second | of a bare proxy | of passing through |\n|---|---|---|---|");
    for (at, (name, ..)) in subjects.iter().enumerate() {
        println!("| {name} | {:.0} | {:.2}x | {:.2}x |", median(rates[at].clone()), ratio(at, 1), ratio(at, 2));
    }
    for (what, ratio, aim) in
        [("pass-through of a bare proxy", ratio(2, 1), 0.6), ("replays of pass-through", ratio(3, 2), 1.5)]
    {
        println!("{what}: {ratio:.2}x (aim >= {aim}x, {})", if ratio >= aim { "met" } else { "MISSED" });
    }
    Ok(())
}

/// Requests that are sent in one piece.
const AT_ONCE: u64 = 64;
/// What a gateway takes that holds no keys, the files that it has mapped included.
const BASE_BYTES: u64 = 64 << 20;
/// What a key may take beside: its slot, its records in the mapped journal, its answer there.
const KEY_BYTES: u64 = 1 << 10;

/// Sends each key once, pipelined, and compares what was answered with what ran and with what the gateway took of memory.
fn flood(keys: u64, args: &Args) -> Result<(), AnyError> {
    let dir = tempfile::tempdir()?;
    let runs = Arc::new(AtomicU64::new(0));
    let runtime = tokio::runtime::Runtime::new()?;
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
    let upstream = format!("http://{}", listener.local_addr()?);
    let counted = Arc::clone(&runs);
    runtime.spawn(accept(listener, move |request: Request<Incoming>| {
        counted.fetch_add(1, Ordering::Relaxed);
        async {
            request.into_body().collect().await.ok();
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(ANSWER.as_bytes()))))
        }
    }));
    let most = args.max_keys.to_string();
    let server = gateway(&upstream, dir.path(), &["--durability", "buffered", "--max-keys", &most])?;
    let address = server.url.trim_start_matches("http://");

    let (began, next) = (Instant::now(), AtomicU64::new(0));
    let mut answers = BTreeMap::<u16, u64>::new();
    thread::scope(|scope| {
        let clients: Vec<_> = (0..args.connections).map(|_| scope.spawn(|| client(address, &next, keys))).collect();
        for client in clients {
            for (status, count) in client.join().map_err(|_| "a client panicked")?? {
                *answers.entry(status).or_default() += count;
            }
        }
        Ok::<_, AnyError>(())
    })?;
    let elapsed_s = began.elapsed().as_secs_f64();
    let peak = peak_bytes(server.child.id())?;
    let bound = BASE_BYTES + args.max_keys * KEY_BYTES;
    let ran = runs.load(Ordering::Relaxed);
    println!(
        "{keys} keys, {most} held at most: answers {answers:?}, {ran} runs, peak memory {} MiB (bound {} MiB), {elapsed_s:.0} s",
        peak >> 20,
        bound >> 20
    );
    let made: u64 = answers.range(200..300).map(|(_, count)| count).sum();
    let refused = answers.get(&503).copied().unwrap_or(0);
    let mut wrong = Vec::new();
    if made + refused != keys {
        wrong.push("there are other answers than 2xx and 503");
    }
    if made != ran {
        wrong.push("not as many ran as were answered so");
    }
    if made != keys.min(args.max_keys) {
        wrong.push("it holds another number of keys than it may");
    }
    if peak > bound {
        wrong.push("it took too much memory");
    }
    let mut stream = BufReader::new(TcpStream::connect(address)?);
    send(stream.get_mut(), address, 0..1)?;
    let (status, is_replay) = answer(&mut stream)?;
    if (status, is_replay, runs.load(Ordering::Relaxed)) != (200, true, ran) {
        wrong.push("an early key is not replayed");
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("; ").into()) }
}

/// How often which status was answered to one connection.
fn client(address: &str, next: &AtomicU64, keys: u64) -> Result<BTreeMap<u16, u64>, AnyError> {
    let mut stream = BufReader::new(TcpStream::connect(address)?);
    let mut answers = BTreeMap::new();
    loop {
        let from = next.fetch_add(AT_ONCE, Ordering::Relaxed);
        let to = keys.min(from + AT_ONCE);
        if from >= to {
            return Ok(answers);
        }
        send(stream.get_mut(), address, from..to)?;
        for _ in from..to {
            *answers.entry(answer(&mut stream)?.0).or_default() += 1;
        }
    }
}

fn send(stream: &mut TcpStream, host: &str, keys: std::ops::Range<u64>) -> io::Result<()> {
    let request = |key| {
        let head = format!("POST / HTTP/1.1\r\nHost: {host}\r\nIdempotency-Key: key-{key}\r\n");
        format!("{head}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{BODY}", BODY.len())
    };
    stream.write_all(keys.map(request).collect::<String>().as_bytes())
}

/// Status of the next answer, and whether it is a replay.
fn answer(stream: &mut impl BufRead) -> Result<(u16, bool), AnyError> {
    let mut line = String::new();
    stream.read_line(&mut line)?;
    let status = line.split(' ').nth(1).ok_or("the connection ended before an answer")?.parse()?;
    let (mut len, mut is_replay) = (0, false);
    loop {
        line.clear();
        stream.read_line(&mut line)?;
        match line.trim_end().split_once(": ") {
            Some(("content-length", value)) => len = value.parse()?,
            Some(("idempotency-replayed", value)) => is_replay = value == "true",
            Some(_) => {}
            None => break,
        }
    }
    io::copy(&mut stream.take(len), &mut io::sink())?;
    Ok((status, is_replay))
}

/// The most memory that a process had at a time.
fn peak_bytes(process: u32) -> Result<u64, AnyError> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no peak of memory is told")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}
