//! The command `oncekey`.

#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod gateway;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Crash-safe idempotency keys.
#[derive(Parser)]
#[command(name = "oncekey", version, arg_required_else_help = true)]
struct Command {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// A reverse proxy that runs each request with an Idempotency-Key at most once and replays its answer to every retry.
    Gateway(Box<gateway::Arguments>),
}

fn main() -> ExitCode {
    let Command { what: What::Gateway(arguments) } = Command::parse();
    gateway::main(*arguments)
}
