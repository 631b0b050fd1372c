//! The gateway: a reverse proxy with an idempotency layer in it. See docs/gateway.md.
//!
//! ```text
//! client ── Wire ── hyper ── Requests ── IdempotencyLayer ── Upstream ── pool ── the service
//!           bytes            checks,      keys, answers       targets,
//!           deadlines        headers      in the store        verdicts
//! ```

mod admin;
mod config;
mod forward;
mod framing;
mod history;
mod latency;
mod listener;
mod metrics;
mod paced;
mod resolve;
mod routes;
mod samples;
mod settings;
mod spikes;
mod upstream;
mod wire;

use admin::{Admin, unix_ms};
use clap::Args as _;
use config::Config;
use history::{Happened, History};
use listener::Listener;
use metrics::{Meter, Sources};
use oncekey::http::{Event, EventKind, IdempotencyLayer};
use oncekey::{Builder, Store};
use rustix::process::{Resource, getrlimit, setrlimit};
use samples::{Measured, Sampler, Samples};
use settings::{LogFormat, Settings};
use std::env::VarError;
use std::ffi::OsStr;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, MissedTickBehavior};
use tower_layer::Layer as _;
use tracing_subscriber::EnvFilter;

/// Each setting is also an environment variable and a key of the settings file; a flag wins over the variable, and that over the file.
#[derive(clap::Args)]
pub struct Arguments {
    /// File with settings (TOML).
    #[arg(long, env = "ONCEKEY_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Checks the settings and the files that they name, and ends.
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    settings: Settings,
}

/// Why the gateway ends with an error.
enum Failed {
    /// The settings are wrong.
    Usage(String),
    /// Something else is.
    Run(String),
}

const USAGE: u8 = 2;
/// The environment variable that says what is logged.
const LOG_VARIABLE: &str = "ONCEKEY_LOG";
/// Events of single keys that are kept for the dashboard.
const MOST_EVENTS: usize = 10_000;

pub fn main(arguments: Arguments) -> ExitCode {
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failed::Usage(message)) => {
            eprintln!("error: {message}");
            ExitCode::from(USAGE)
        }
        Err(Failed::Run(message)) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<(), Failed> {
    let config = Config::load(arguments.settings, arguments.config.as_deref()).map_err(Failed::Usage)?;
    let meter = Arc::new(Meter::default());
    let upstream = upstream::Upstream::new(&config, Arc::clone(&meter)).map_err(Failed::Usage)?;
    let tls = listener::tls(config.tls.as_ref()).map_err(Failed::Usage)?;
    let policies = routes::Policies::new(&config).map_err(Failed::Usage)?;
    let filter = log_filter().map_err(Failed::Usage)?;
    builder(&config).check().map_err(|error| Failed::Usage(error.to_string()))?;
    if arguments.check {
        return say("the settings are fine");
    }
    log_to_stderr(config.log_format, filter);
    warn_of_unknown_variables();
    raise_file_limit();
    let store = open(&config)?;
    let history =
        History::new(MOST_EVENTS).map_err(|error| Failed::Run(format!("the system gives no random bytes: {error}")))?;
    let history = Arc::new(history);
    let mut layer = IdempotencyLayer::new(store.clone(), routes::scope(&config.scope));
    if let Some(url) = &config.documentation {
        layer = layer.documentation(url).map_err(|error| Failed::Usage(format!("documentation: {error}")))?;
    }
    let layer = layer.max_running(config.limits.max_running).max_buffered(config.limits.max_buffered);
    let layer = policies.on(layer).observe(observer(Arc::clone(&meter), Arc::clone(&history)));
    let sources =
        Sources { meter: Arc::clone(&meter), layer: layer.clone(), store: store.clone(), data: config.data.clone() };
    let listener = Listener::new(&config, layer.layer(upstream), tls, meter);
    let gateway = Gateway {
        listen: config.listen,
        admin_listen: config.admin_listen,
        is_tls: config.tls.is_some(),
        drain: config.timeouts.drain,
        listener,
        admin: Arc::new(Admin {
            registry: sources.registry(),
            sources,
            samples: Samples::new(),
            history,
            scope: config.scope,
            token: config.admin_token,
            readers: admin::readers(),
            is_draining: AtomicBool::new(false),
        }),
    };
    let runtime =
        tokio::runtime::Runtime::new().map_err(|error| Failed::Run(format!("can't start threads: {error}")))?;
    let served = runtime.block_on(gateway.serve());
    // What still runs was given its time.
    runtime.shutdown_timeout(Duration::from_millis(100));
    let closed = store.close().map_err(|error| Failed::Run(format!("can't close the data directory: {error}")));
    served.and(closed)?;
    tracing::info!("ended");
    Ok(())
}

fn builder(config: &Config) -> Builder {
    let mut builder = Store::builder()
        .durability(config.durability)
        .retention(config.retention)
        .lease(config.lease)
        // A scope, an operation and a key of the greatest lengths that the layer lets through fit.
        .max_key_len(1024);
    if let Some(keys) = config.max_keys {
        builder = builder.max_keys(keys);
    }
    if let Some(bytes) = config.max_bytes {
        builder = builder.max_bytes(bytes);
    }
    builder
}

fn open(config: &Config) -> Result<Store, Failed> {
    builder(config).open(&config.data).map_err(|error| match error.kind() {
        oncekey::ErrorKind::InvalidArgument => Failed::Usage(error.to_string()),
        oncekey::ErrorKind::Locked => {
            Failed::Run(format!("{error}: another gateway uses it; end that one, or name another directory by --data"))
        }
        _ => Failed::Run(format!("can't open the data directory {}: {error}", config.data.display())),
    })
}

/// Each connection, to clients and to the upstream, holds a file descriptor, and the usual soft limit of 1024 is for programs
/// that use `select`.
fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit of open files can't be raised");
    }
}

fn log_filter() -> Result<EnvFilter, String> {
    match std::env::var(LOG_VARIABLE) {
        Ok(words) => EnvFilter::try_new(&words).map_err(|error| format!("{LOG_VARIABLE}={words}: {error}")),
        Err(VarError::NotPresent) => Ok(EnvFilter::new("info")),
        Err(error @ VarError::NotUnicode(_)) => Err(format!("{LOG_VARIABLE}: {error}")),
    }
}

fn log_to_stderr(format: LogFormat, filter: EnvFilter) {
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Json => builder.json().flatten_event(true).init(),
        LogFormat::Text => builder.with_ansi(false).init(),
    }
}

/// A misspelt variable would go unnoticed. It is no error: Kubernetes sets some for every service by its name.
fn warn_of_unknown_variables() {
    let known = Arguments::augment_args(clap::Command::new("gateway"));
    let is_known = |name: &OsStr| {
        [config::TOKEN_VARIABLE, LOG_VARIABLE].iter().any(|own| name == *own)
            || known.get_arguments().any(|argument| argument.get_env() == Some(name))
    };
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let is_of_kubernetes = ["ONCEKEY_PORT", "ONCEKEY_SERVICE_"].iter().any(|start| text.starts_with(start));
        if text.starts_with("ONCEKEY_") && !is_of_kubernetes && !is_known(&name) {
            tracing::warn!(variable = &*text, "no setting has this name");
        }
    }
}

/// A line on standard output, where scripts look for it.
fn say(line: &str) -> Result<(), Failed> {
    let mut out = std::io::stdout();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .map_err(|error| Failed::Run(format!("can't write to standard output: {error}")))
}

/// Counts what the layer tells, and notes it for the search of keys.
fn observer(meter: Arc<Meter>, history: Arc<History>) -> impl Fn(&Event<'_>) + Send + Sync + 'static {
    move |event| {
        meter.happened(event);
        let Some(identity) = &event.identity else { return };
        let status = event.status.map(|status| status.as_u16());
        let happened = Happened {
            at_ms: unix_ms(SystemTime::now()),
            what: metrics::name(event.kind),
            status,
            elapsed_ms: event.elapsed.as_secs_f64() * 1e3,
        };
        history.push(identity.scope, identity.operation, identity.key, happened);
        match event.kind {
            EventKind::Unknown => {
                tracing::warn!(
                    operation = identity.operation,
                    status,
                    "whether an operation happened is unknown: its key is held"
                );
            }
            EventKind::NotStored => {
                tracing::error!(
                    operation = identity.operation,
                    status,
                    "an answer could not be stored: its key is held"
                );
            }
            EventKind::TakenOver => {
                tracing::info!(operation = identity.operation, "an interrupted operation runs again");
            }
            // The others are counted; they say nothing that needs somebody's eyes.
            _ => {}
        }
    }
}

struct Gateway {
    listen: SocketAddr,
    admin_listen: SocketAddr,
    is_tls: bool,
    drain: Duration,
    listener: Listener,
    admin: Arc<Admin>,
}

impl Gateway {
    async fn serve(self) -> Result<(), Failed> {
        let bind = async |name: &str, address: SocketAddr| {
            let listener = TcpListener::bind(address).await;
            listener.map_err(|error| Failed::Run(format!("can't listen on {name} = {address}: {error}")))
        };
        let tcp = bind("listen", self.listen).await?;
        let admin_tcp = bind("admin_listen", self.admin_listen).await?;
        let signals = || signal(SignalKind::terminate()).and_then(|term| Ok((term, signal(SignalKind::interrupt())?)));
        let (mut term, mut interrupt) =
            signals().map_err(|error| Failed::Run(format!("can't wait for signals: {error}")))?;
        let bound = |tcp: &TcpListener| {
            tcp.local_addr().map_err(|error| Failed::Run(format!("can't tell the address: {error}")))
        };
        let (address, admin_address) = (bound(&tcp)?, bound(&admin_tcp)?);
        say(&format!("listening on {}://{address}", if self.is_tls { "https" } else { "http" }))?;
        say(&format!("admin on http://{admin_address}"))?;
        tracing::info!(%address, %admin_address, version = env!("CARGO_PKG_VERSION"), "started");

        let admin_task = tokio::spawn(Arc::clone(&self.admin).serve(admin_tcp));
        let sampling = tokio::spawn(sample(Arc::clone(&self.admin)));
        let layer = self.admin.sources.layer.clone();
        let (ended, end) = tokio::sync::oneshot::channel();
        let serving = tokio::spawn(self.listener.serve(tcp, async {
            // An error says that the sender is gone, which is the end as well.
            end.await.ok();
        }));

        any(&mut term, &mut interrupt).await;
        self.admin.is_draining.store(true, Ordering::Relaxed);
        tracing::info!(running = layer.running(), "ending: no new connections are taken");
        ended.send(()).ok();
        let drained = tokio::time::timeout(self.drain, async {
            serving.await.ok();
            layer.drained().await;
        });
        tokio::select! {
            result = drained => {
                if result.is_err() {
                    tracing::warn!(running = layer.running(), "the time to finish is over: what runs is left interrupted");
                }
            }
            () = any(&mut term, &mut interrupt) => {
                tracing::warn!(running = layer.running(), "a second signal: ending at once");
                std::process::exit(1);
            }
        }
        admin_task.abort();
        sampling.abort();
        Ok(())
    }
}

async fn any(term: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = term.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Takes a sample each second, forever.
async fn sample(admin: Arc<Admin>) {
    let mut sampler = Sampler::default();
    let (mut was_poisoned, mut was_full) = (false, false);
    let second = Duration::from_secs(1);
    let mut ticks = tokio::time::interval_at(Instant::now() + second, second);
    // Two at once would make one second look twice as busy.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let measured = Measured::now(&admin.sources, admin.is_ready());
        let (is_poisoned, is_full) = (measured.stats.is_poisoned, measured.stats.is_full);
        let sample = sampler.second(unix_ms(SystemTime::now()), measured);
        if let Some(spike) = sample.spike {
            admin.sources.meter.spike();
            tracing::warn!(spike.hits_per_s, spike.usual_per_s, "duplicates come far more often than usual");
        }
        if is_poisoned && !was_poisoned {
            tracing::error!("the store failed and only reads: restart the gateway when its device is well");
        }
        was_poisoned = is_poisoned;
        if is_full != was_full {
            match is_full {
                true => tracing::warn!(
                    "the store has no room: new keys are refused, until some expire or there is more room"
                ),
                false => tracing::info!("the store has room again"),
            }
        }
        was_full = is_full;
        if let Err(error) = admin.samples.push(&sample) {
            tracing::error!(%error, "a sample can't be written");
        }
    }
}
