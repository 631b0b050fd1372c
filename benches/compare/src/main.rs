//! oncekey beside maps, embedded databases and Redis: the same job, given to each by whoever knows how to use it.
//!
//! ```text
//! main --> plan: groups of cells --> rounds: a child process a cell --> child: drives a peer, says what it took
//!   '----> report: tables, aims: what we want to reach, chart  <---- readings ----'
//! ```
//!
//! ```text
//! cargo run --release --manifest-path benches/compare/Cargo.toml -- --help
//! ```

mod aims;
mod cell;
mod chart;
mod child;
mod find;
mod peer;
mod peers;
mod plan;
mod probe;
mod report;
mod rounds;
mod workload;

use cell::{PeerName, Report, Workload};
use clap::{Parser, Subcommand, ValueEnum};
use peer::Result;
use plan::Choice;
use std::fs;
use std::path::PathBuf;
use std::time::Instant;

#[derive(Parser)]
#[command(about = "Compares oncekey with maps, embedded databases and Redis")]
struct Args {
    /// How much is measured.
    #[arg(long, value_enum, default_value_t = Selection::Quick)]
    selection: Selection,
    /// Only these peers.
    #[arg(long, value_enum, value_delimiter = ',')]
    peers: Vec<PeerName>,
    /// Only these workloads.
    #[arg(long, value_enum, value_delimiter = ',')]
    workloads: Vec<Workload>,
    /// Only cells with these numbers of keys, such as 1e6.
    #[arg(long, value_delimiter = ',', value_parser = parse_keys)]
    keys: Vec<u64>,
    /// Rounds of each cell, instead of what the selection says.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: Option<u64>,
    /// Where to draw FRESH and REPLAY of all peers, as SVG.
    #[arg(long)]
    chart: Option<PathBuf>,
    /// Where report.md and cells.json go, and the peers' files while they are measured.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/compare"))]
    out: PathBuf,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Selection {
    /// Each aim at a million keys, in a few minutes.
    Quick,
    /// All sizes, in hours.
    Full,
}

#[derive(Subcommand)]
enum Role {
    /// Measures one cell; the comparison starts these by itself.
    #[command(hide = true)]
    Cell { orders: String },
}

fn parse_keys(text: &str) -> std::result::Result<u64, String> {
    let keys: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if keys >= 1.0 && keys.fract() == 0.0 { Ok(keys as u64) } else { Err("a whole number of keys".to_owned()) }
}

fn main() -> Result<()> {
    let args = Args::parse();
    match &args.role {
        Some(Role::Cell { orders }) => {
            // No cell outlives the comparison.
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            say(&child::measure(&serde_json::from_str(orders)?)?);
            Ok(())
        }
        None => compare(&args),
    }
}

/// A child's answer, on a line of its own.
fn say(report: &Report) {
    println!("{}", serde_json::to_string(report).expect("numbers can be written"));
}

fn compare(args: &Args) -> Result<()> {
    let plan = match args.selection {
        Selection::Quick => plan::quick(),
        Selection::Full => plan::full(),
    };
    let choice = Choice {
        peers: args.peers.clone(),
        workloads: args.workloads.clone(),
        keys: args.keys.clone(),
        rounds: args.rounds.map(|rounds| rounds as usize),
    };
    fs::create_dir_all(&args.out)?;
    let out = args.out.canonicalize()?;
    let start = Instant::now();
    let found = rounds::measure(&choice.of(plan), &out)?;
    let report = report::markdown(&found, start.elapsed());
    print!("{report}");
    fs::write(out.join("report.md"), &report)?;
    let raw = serde_json::json!({ "readings": found.readings, "missing": found.missing, "spent": found.spent });
    fs::write(out.join("cells.json"), serde_json::to_string_pretty(&raw)?)?;
    if let Some(path) = &args.chart {
        chart::draw(&found, path)?;
    }
    eprintln!("report.md and cells.json are in {}", out.display());
    Ok(())
}
