//! Runs the rigs, with and without bugs, and compares.

use crate::table::{Rig, catcher};
use clap::Parser;
use oncekey::testing::{Bug, VARIABLE};
use rustix::process::{Pid, Signal, kill_process_group};
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

#[derive(Parser)]
struct Args {
    /// Plants these only, by name.
    #[arg(long)]
    bug: Vec<String>,
    /// Rigs of one thread to run at a time; as many as there are processors by default.
    #[arg(long)]
    threads: Option<usize>,
    /// Ignored: `cargo test` and the test runners of IDEs add it.
    #[arg(long, hide = true)]
    nocapture: bool,
}

/// Far longer than any rig here takes.
const LIMIT: Duration = Duration::from_secs(150);
/// How often to look whether a rig is done.
const LOOK: Duration = Duration::from_millis(10);
/// Lines of a rig that did not do what it should.
const SHOWN: usize = 30;

/// A rig to run, with a bug or as the control.
#[derive(Clone, Copy)]
struct Job {
    rig: Rig,
    bug: Option<Bug>,
}

/// How a rig ended: by an exit code, unless its time was up or a signal came.
struct Ended {
    code: Option<i32>,
    said: String,
}

pub fn main() -> ExitCode {
    match run_all(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("planted: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether each control passed and each bug was caught.
fn run_all(args: &Args) -> Result<bool> {
    let is_wanted = |bug: &Bug| args.bug.is_empty() || args.bug.contains(&format!("{bug:?}"));
    let bugs: Vec<Bug> = Bug::ALL.iter().copied().filter(is_wanted).collect();
    if bugs.len() < args.bug.len() {
        return Err(format!("no such bug; there are {:?}", Bug::ALL).into());
    }
    let mut jobs: Vec<Job> = Vec::new();
    for rig in bugs.iter().map(|bug| catcher(*bug)) {
        if !jobs.iter().any(|job| job.rig == rig) {
            jobs.push(Job { rig, bug: None });
        }
    }
    let controls = jobs.len();
    jobs.extend(bugs.iter().map(|bug| Job { rig: catcher(*bug), bug: Some(*bug) }));
    let binaries = build()?;
    let started = Instant::now();
    // What a killed process leaves is in the page cache: tmpfs serves as well.
    let shared_memory = Path::new("/dev/shm");
    let place = if shared_memory.exists() { shared_memory } else { Path::new(env!("CARGO_TARGET_TMPDIR")) };
    let dir = tempfile::tempdir_in(place)?;
    let (threaded, single): (Vec<Job>, Vec<Job>) = jobs.into_iter().partition(|job| job.rig.is_threaded());
    let processors = thread::available_parallelism().map_or(2, usize::from);
    let good = Mutex::new(Vec::new());
    for (jobs, at_a_time) in [(single, args.threads.unwrap_or(processors)), (threaded, 1)] {
        let queue = Mutex::new(jobs.into_iter());
        let work = || -> Result<()> {
            loop {
                let Some(job) = queue.lock().expect(WHOLE).next() else { return Ok(()) };
                if try_out(job, &binaries[job.rig.target()], dir.path())? {
                    good.lock().expect(WHOLE).push(job.bug);
                }
            }
        };
        thread::scope(|scope| {
            let workers: Vec<_> = (0..at_a_time).map(|_| scope.spawn(work)).collect();
            workers.into_iter().try_for_each(|worker| worker.join().expect("a worker panicked"))
        })?;
    }
    let good = good.into_inner().expect(WHOLE);
    let caught = good.iter().flatten().count();
    let passed = good.len() - caught;
    println!("{:.0} s", started.elapsed().as_secs_f64());
    println!("planted {}, caught {caught}, controls {passed} of {controls} passed", bugs.len());
    Ok(caught == bugs.len() && passed == controls)
}

const WHOLE: &str = "nobody panics under this lock";

/// Builds the rigs as this program was built, and says where they are.
fn build() -> Result<HashMap<String, PathBuf>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["test", "--locked", "--release", "--no-run", "--message-format", "json-render-diagnostics"]);
    command.args(["--test", "sim", "--test", "linear", "--test", "torture", "--test", "all"]);
    let output = command.stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err("the rigs don't build".into());
    }
    let mut binaries = HashMap::new();
    for line in output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let message: serde_json::Value = serde_json::from_slice(line)?;
        if let (Some(name), Some(path)) = (message["target"]["name"].as_str(), message["executable"].as_str()) {
            binaries.insert(name.to_owned(), PathBuf::from(path));
        }
    }
    Ok(binaries)
}

/// Runs a rig; whether it did what it should.
fn try_out(job: Job, binary: &Path, dir: &Path) -> Result<bool> {
    let started = Instant::now();
    let ended = run(job, binary, dir)?;
    let verdict = job.rig.verdict(&ended.said);
    let (is_good, says) = match job.bug {
        None => (ended.code == Some(0), ended.said.lines().last().unwrap_or_default().to_owned()),
        Some(_) => (ended.code == Some(job.rig.code()) && verdict.is_some(), verdict.unwrap_or("nothing".to_owned())),
    };
    let name = job.bug.map_or("(control)".to_owned(), |bug| format!("{bug:?}"));
    let says: String = says.chars().take(120).collect();
    println!("{name:<24} {:<36} {:>5.1} s  {says}", job.rig.name(), started.elapsed().as_secs_f64());
    if !is_good {
        let lines: Vec<&str> = ended.said.lines().collect();
        let shown = lines[lines.len().saturating_sub(SHOWN)..].join("\n    ");
        println!("  {name} was not as it should, exit code {:?}:\n    {shown}", ended.code);
    }
    Ok(is_good)
}

fn run(job: Job, binary: &Path, dir: &Path) -> Result<Ended> {
    let mut output = tempfile::tempfile()?;
    let mut command = Command::new(binary);
    command.args(job.rig.arguments()).stdin(Stdio::null());
    command.stdout(File::try_clone(&output)?).stderr(File::try_clone(&output)?).process_group(0);
    if job.rig == Rig::Kills {
        command.arg("--dir").arg(dir);
    }
    match job.bug {
        Some(bug) => command.env(VARIABLE, format!("{bug:?}")),
        None => command.env_remove(VARIABLE),
    };
    let mut child = command.spawn()?;
    let until = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() >= until {
            kill_process_group(Pid::from_child(&child), Signal::KILL)?;
            child.wait()?;
            break None;
        }
        thread::sleep(LOOK);
    };
    let mut said = Vec::new();
    output.rewind()?;
    output.read_to_end(&mut said)?;
    let said = String::from_utf8_lossy(&said).into_owned();
    Ok(Ended { code: status.and_then(|status| status.code()), said })
}
