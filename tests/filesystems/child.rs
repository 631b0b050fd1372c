//! Processes of the rig that do the work, so that a signal or a hang is seen and told by name.
//!
//! They talk in lines: what a child prints, and for each line that begins with `?` (an order to its disk) one in return.

use crate::Result;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// After which a child hangs; generous, as the machine may be slow.
const PATIENCE: Duration = Duration::from_secs(150);
const SIGKILL: i32 = 9;

pub struct Child {
    process: std::process::Child,
    lines: mpsc::Receiver<String>,
    give_up: Instant,
    was_killed: bool,
}

impl Child {
    pub fn start(command: &mut Command) -> Result<Child> {
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let output = process.stdout.take().ok_or("a child without output")?;
        let (line_in, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(std::result::Result::ok) {
                if line_in.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Child { process, lines, give_up: Instant::now() + PATIENCE, was_killed: false })
    }

    /// What it prints next; `None` at its end.
    pub fn line(&mut self) -> Result<Option<String>> {
        match self.lines.recv_timeout(self.give_up.saturating_duration_since(Instant::now())) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                self.process.kill()?;
                Err(format!("a child hung: it was killed after {PATIENCE:?}").into())
            }
        }
    }

    pub fn answer(&mut self, line: &str) -> Result<()> {
        let input = self.process.stdin.as_mut().ok_or("a child without input")?;
        Ok(writeln!(input, "{line}")?)
    }

    pub fn kill(&mut self) -> Result<()> {
        self.was_killed = true;
        Ok(self.process.kill()?)
    }

    /// Waits for its end; an error unless that was a success, or what `kill` did.
    pub fn end(self) -> Result<()> {
        self.end_with(&[0])
    }

    /// As `end`, with these exit codes for a success.
    pub fn end_with(mut self, codes: &[i32]) -> Result<()> {
        while self.line()?.is_some() {}
        let status = self.process.wait()?;
        match status.code() {
            Some(code) if codes.contains(&code) => Ok(()),
            Some(_) => Err(format!("a child ended with {status}").into()),
            None if self.was_killed && status.signal() == Some(SIGKILL) => Ok(()),
            None => Err(Box::new(Died(status.to_string()))),
        }
    }
}

/// The death of a child by a signal that nobody sent.
#[derive(Debug)]
pub struct Died(String);

impl std::fmt::Display for Died {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a child died: {}", self.0)
    }
}

impl std::error::Error for Died {}

/// The child's side: has the rig do something to the disk.
pub fn order(what: &str) -> Result<String> {
    println!("? {what}");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(answer.trim().to_owned())
}
