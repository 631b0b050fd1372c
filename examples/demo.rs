//! Runs the examples of the HTTP layer one after the other. Each tells what it counted, and fails if anything ran twice or was
//! answered differently.

use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let programs =
        [env!("CARGO_BIN_EXE_axum_payments"), env!("CARGO_BIN_EXE_llm_stream"), env!("CARGO_BIN_EXE_tonic_orders")];
    for program in programs {
        match Command::new(program).status() {
            Ok(status) if status.success() => {}
            Ok(status) => {
                eprintln!("{program}: {status}");
                return ExitCode::FAILURE;
            }
            Err(error) => {
                eprintln!("can't run {program}: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
