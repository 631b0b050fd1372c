//! The dashboard in a real browser, before a real gateway: what the page shows has to be what the gateway says.
//!
//! Two gateways, one after the other: one that asks for a token and keeps keys by `Authorization`, and one of a single tenant
//! without a token. Clients make traffic of all sorts meanwhile. The checks of the page are in `dashboard.mjs`.

mod browser;
#[expect(dead_code, reason = "the tests of the gateway use more of it")]
#[path = "../gateway/client.rs"]
mod client;
#[expect(dead_code, reason = "the tests of the gateway use more of it")]
#[path = "../gateway/process.rs"]
mod process;
mod shop;
mod traffic;
#[expect(dead_code, reason = "the tests of the gateway use more of it")]
#[path = "../gateway/upstream.rs"]
mod upstream;

use browser::Look;
use clap::Parser;
use process::{Gateway, Setup};
use shop::Shop;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use traffic::{Customer, Traffic};

#[derive(Debug, Parser)]
struct Args {
    /// Writes here what the page looks like.
    #[arg(long)]
    screenshot: Option<PathBuf>,
    /// Seconds of traffic before the browser opens.
    #[arg(long, default_value_t = 0)]
    past: u64,
    /// Of the traffic.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

const TOKEN: &str = "0123456789abcdef0123456789abcdef";
const CREDENTIAL: &str = "Bearer shop-1";
/// What has to have happened in front of the page, by its name in the metrics.
const KINDS: [&str; 10] = [
    "started",
    "stored",
    "replayed",
    "in_flight",
    "attached",
    "mismatched",
    "invalid",
    "passed",
    "unknown",
    "outcome_unknown",
];

fn main() -> ExitCode {
    let args = Args::parse();
    let started = Instant::now();
    browser::install();
    let shop = Shop::open();
    let guarded = Setup::new(&shop.upstream)
        .file(shop::SETTINGS)
        .flag("--scope", "authorization")
        .variable("ONCEKEY_ADMIN_TOKEN", TOKEN)
        .start();
    let look = Look { token: Some(TOKEN), credential: Some(CREDENTIAL), screenshot: args.screenshot.as_deref() };
    let first = watch(&shop, guarded, &look, &args);
    let open = Setup::new(&shop.upstream).file(shop::SETTINGS).start();
    let second =
        watch(&shop, open, &Look { token: None, credential: None, screenshot: None }, &Args { past: 0, ..args });

    let tally = [&first, &second];
    let sum = |of: fn(&Watched) -> u64| tally.iter().map(|watched| of(watched)).sum::<u64>();
    let failures: Vec<&String> = tally.iter().flat_map(|watched| &watched.failures).collect();
    for failure in &failures {
        eprintln!("{failure}");
    }
    println!(
        "2 gateways, {} checks of the page, {} requests, {} spikes, failed {}, {:.0} s",
        sum(|watched| watched.checks),
        sum(|watched| watched.requests),
        sum(|watched| watched.spikes),
        failures.len(),
        started.elapsed().as_secs_f64()
    );
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What came of one gateway.
struct Watched {
    checks: u64,
    requests: u64,
    spikes: u64,
    failures: Vec<String>,
}

fn watch(shop: &Shop, gateway: Gateway, look: &Look<'_>, args: &Args) -> Watched {
    let customer = Customer { address: gateway.address, credential: look.credential };
    let traffic = Traffic::start(&customer, args.seed);
    std::thread::sleep(Duration::from_secs(args.past));
    // Late, since the gateway remembers a number of events only.
    let running = shop.make_known_keys(&customer);
    let report = look.at(gateway.admin);
    drop(running);
    let mut failures = Vec::new();
    if !report.is_success || report.passed == 0 {
        failures.push(format!("the page of the gateway {}:\n{}", look.name(), report.output));
    }
    failures.extend(traffic.end().into_iter().map(|failure| format!("the traffic {}: {failure}", look.name())));

    let metrics = Metrics::of(&gateway, look);
    for kind in KINDS {
        if metrics.value(&format!("events_total{{kind=\"{kind}\"}}")) == 0 {
            failures.push(format!("nothing of the kind {kind} happened {}", look.name()));
        }
    }
    Watched {
        checks: report.passed,
        requests: metrics.value("requests_total"),
        spikes: metrics.value("spikes_total"),
        failures,
    }
}

/// The gateway's metrics as text.
struct Metrics(String);

impl Metrics {
    fn of(gateway: &Gateway, look: &Look<'_>) -> Metrics {
        let authorization = look.token.map(|token| format!("Bearer {token}"));
        let headers: Vec<(&str, &str)> = authorization.iter().map(|value| ("authorization", value.as_str())).collect();
        Metrics(client::ask(gateway.admin, client::get("/metrics", &headers)).text())
    }

    fn value(&self, name: &str) -> u64 {
        let found =
            self.0.lines().find_map(|line| line.strip_prefix("oncekey_http_")?.strip_prefix(name)?.strip_prefix(' '));
        found.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name} in {}", self.0))
    }
}
