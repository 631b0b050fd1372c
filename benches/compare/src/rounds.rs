//! Starts a child a cell, in rounds, and gathers what they say.

use crate::cell::{Cell, Job, Reading, Report, Subject};
use crate::peer::Result;
use crate::plan::{Group, Item};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// A cell that came to nothing.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Missing {
    pub subject: Subject,
    pub job: Job,
    pub why: String,
}

/// What a cell cost us.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Spent {
    pub subject: Subject,
    pub job: Job,
    pub seconds: f64,
}

#[derive(Default)]
pub struct Found {
    pub readings: Vec<Reading>,
    pub spent: Vec<Spent>,
    pub missing: Vec<Missing>,
}

/// Measures all groups, below a directory.
pub fn measure(groups: &[Group], dir: &Path) -> Result<Found> {
    let cells = groups.iter().flat_map(|group| &group.items).map(|item| item.rounds as u64).sum();
    let bar = ProgressBar::new(cells).with_style(ProgressStyle::with_template("{pos}/{len} {elapsed} {wide_msg}")?);
    bar.enable_steady_tick(Duration::from_millis(500));
    let mut found = Found::default();
    for group in groups {
        let rounds = group.items.iter().map(|item| item.rounds).max().unwrap_or(0);
        for round in 0..rounds {
            for item in group.items.iter().filter(|item| item.rounds > round) {
                let message = format!("{}: {}", item.job.name(), item.subject);
                if bar.is_hidden() {
                    eprintln!("{}/{cells} {message}", bar.position() + 1);
                }
                bar.set_message(message);
                found.take(item, round, dir)?;
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();
    Ok(found)
}

impl Found {
    fn take(&mut self, item: &Item, round: usize, dir: &Path) -> Result<()> {
        if self.missing.iter().any(|missing| missing.subject.peer == item.subject.peer && missing.is_not_installed()) {
            return Ok(());
        }
        let dir = tempfile::Builder::new().prefix("cell-").tempdir_in(dir)?;
        let cell =
            Cell { subject: item.subject, job: item.job.clone(), limit_s: item.limit_s, dir: dir.path().to_owned() };
        let start = Instant::now();
        let report = measure_one(&cell);
        let seconds = start.elapsed().as_secs_f64();
        self.spent.push(Spent { subject: item.subject, job: item.job.clone(), seconds });
        let why = match report {
            Ok(Report::Readings(readings)) => {
                self.readings.extend(readings.into_iter().map(|reading| Reading { round, ..reading }));
                return Ok(());
            }
            Ok(Report::NotInstalled) => Missing::NOT_INSTALLED.to_owned(),
            Ok(Report::Filled(_)) => "it went on filling".to_owned(),
            Err(error) => error.to_string(),
        };
        self.missing.push(Missing { subject: item.subject, job: item.job.clone(), why });
        Ok(())
    }
}

impl Missing {
    pub const NOT_INSTALLED: &'static str = "not installed";

    pub fn is_not_installed(&self) -> bool {
        self.why == Self::NOT_INSTALLED
    }
}

fn measure_one(cell: &Cell) -> Result<Report> {
    match ask(cell)? {
        Report::Filled(filled) => {
            // Its server, if it has one, is killed with it, but by somebody else.
            std::thread::sleep(Duration::from_millis(300));
            ask(&Cell { job: Job::Reopen { filled }, ..cell.clone() })
        }
        report @ (Report::Readings(_) | Report::NotInstalled) => Ok(report),
    }
}

/// A child that is killed at the latest when it is dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Over already is fine too.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// The last line that a child says; it is killed then.
fn ask(cell: &Cell) -> Result<Report> {
    let orders = serde_json::to_string(cell)?;
    let mut child = Killed(
        Command::new(std::env::current_exe()?)
            .args(["cell", &orders])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?,
    );
    let stdout = child.0.stdout.take().ok_or("a child without output")?;
    let stderr = child.0.stderr.take().ok_or("a child without errors")?;
    let (line, said) = mpsc::channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        let read = BufReader::new(stdout).read_line(&mut text);
        // Nobody listens any more if it took too long.
        line.send(read.map(|_| text)).ok();
    });
    let complaints = std::thread::spawn(move || std::io::read_to_string(stderr).unwrap_or_default());
    let longest = Duration::from_secs_f64(120.0 + 100.0 * cell.limit_s);
    let text = said.recv_timeout(longest).map_err(|_| format!("not done within {} s", longest.as_secs()))??;
    if text.is_empty() {
        child.0.wait()?;
        let complaints = complaints.join().unwrap_or_default();
        return Err(complaints.lines().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing").into());
    }
    Ok(serde_json::from_str(&text)?)
}
