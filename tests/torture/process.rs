//! Child processes: this binary, started anew with other orders.

use crate::caller::{Caller, KEYS};
use crate::client::Client;
use crate::clock::FastClock;
use crate::oracle::Oracle;
use crate::random::Random;
use crate::story::{Line, Log, Pipe};
use crate::watchdog::Watchdog;
use crate::{Durable, Result};
use oncekey::{Builder, Clock, ManualClock, Media, Store};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, mpsc};
use std::time::Duration;

const THREADS: u64 = 4;
/// Operations of a script, and how many of them there are between two rounds of upkeep.
const SCRIPT: u64 = 240;
const UPKEEP_EVERY: u64 = 16;
/// Few, so that each is used several times in a script.
const SCRIPT_KEYS: u64 = 24;
/// Operations after a recovery that is to be cut short.
const AFTERMATH: u64 = 6;

/// What a child does with the store.
#[derive(Clone, Debug, clap::Args)]
pub struct Orders {
    #[arg(long)]
    pub store: PathBuf,
    #[arg(long, value_enum)]
    pub part: Part,
    #[arg(long)]
    pub child_seed: u64,
    /// Number of the process, from which those of its operations and keys follow.
    #[arg(long)]
    pub number: u64,
    #[arg(long)]
    pub segment_len: u64,
    #[arg(long, value_enum)]
    pub durable: Durable,
    #[arg(long)]
    pub pwrite: bool,
    /// When the clock started, or where it stands.
    #[arg(long)]
    pub time: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// Several threads, until killed.
    Work,
    /// One thread on a clock that it moves itself: the same system calls each time.
    Script,
    /// As a script, but next to nothing after the store is open.
    Reopen,
}

impl Orders {
    pub fn builder(&self) -> Builder {
        Store::builder()
            .durability(self.durable.into())
            .media(if self.pwrite { Media::Pwrite } else { Media::Mmap })
            .segment_size(self.segment_len)
    }

    /// The keys that callers share are those below this.
    pub fn shared_keys(&self) -> u64 {
        match self.part {
            Part::Work => KEYS,
            Part::Script | Part::Reopen => SCRIPT_KEYS,
        }
    }

    pub fn first_op(&self) -> u64 {
        self.number << 32 | 1
    }

    /// What follows the name of a program that starts this binary.
    pub fn arguments(&self) -> Result<Vec<std::ffi::OsString>> {
        fn word(value: impl clap::ValueEnum) -> String {
            value.to_possible_value().expect("no value is hidden").get_name().to_owned()
        }
        let mut words =
            vec![std::env::current_exe()?.into(), "child".into(), "--store".into(), self.store.clone().into()];
        for (name, word) in [
            ("--part", word(self.part)),
            ("--durable", word(self.durable)),
            ("--child-seed", self.child_seed.to_string()),
            ("--number", self.number.to_string()),
            ("--segment-len", self.segment_len.to_string()),
            ("--time", self.time.to_string()),
        ] {
            words.extend([name.into(), word.into()]);
        }
        words.extend(self.pwrite.then(|| "--pwrite".into()));
        Ok(words)
    }

    /// The command that starts the child, after `before`.
    pub fn command(&self, before: &[String]) -> Result<Command> {
        let words: Vec<std::ffi::OsString> = before.iter().map(Into::into).chain(self.arguments()?).collect();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::piped());
        Ok(command)
    }

    /// The child's side.
    pub fn carry_out(&self) {
        Pipe.line(Line::Start);
        match self.part {
            Part::Work => self.work(),
            Part::Script => self.script(SCRIPT),
            Part::Reopen => self.script(AFTERMATH),
        }
    }

    fn work(&self) {
        let clock = Arc::new(FastClock::started_at(self.time));
        let client = match Client::open(self.builder(), &self.store, clock, &Pipe, self.first_op()) {
            Ok(client) => client,
            Err(error) => return Pipe.line(Line::Refused(format!("{error:?}"))),
        };
        let mut random = Random::new(self.child_seed);
        // Some time that some leases don't last.
        let stall = |random: &mut Random| std::thread::sleep(Duration::from_micros(random.of_any_size(8, 13)));
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (client, random, stall) = (&client, Random::new(random.draw()), &stall);
                scope.spawn(move || {
                    let mut caller =
                        Caller::new(client, random, self.number * THREADS + thread, (self.shared_keys(), false), stall);
                    loop {
                        caller.step();
                    }
                });
            }
        });
    }

    /// Goes on after errors, which are told as any other outcome.
    fn script(&self, steps: u64) {
        let clock = Arc::new(ManualClock::new(self.time));
        let builder = self.builder().background(false);
        let client = match Client::open(builder, &self.store, clock.clone() as Arc<dyn Clock>, &Pipe, self.first_op()) {
            Ok(client) => client,
            Err(error) => return Pipe.line(Line::Refused(format!("{error:?}"))),
        };
        let mut random = Random::new(self.child_seed);
        let stall = |random: &mut Random| clock.advance(Duration::from_millis(random.of_any_size(5, 17)));
        let mut caller =
            Caller::new(&client, Random::new(random.draw()), self.number * THREADS, (self.shared_keys(), true), &stall);
        for step in 1..=steps {
            caller.step();
            clock.advance(Duration::from_millis(random.of_any_size(3, 12)));
            if step % UPKEEP_EVERY == 0 {
                // It is called again, whatever it says.
                if let Err(error) = client.store.maintain(1_000) {
                    Pipe.line(Line::Refused(format!("{error:?}")));
                }
            }
        }
    }
}

/// How a child came to its end.
pub struct Ended {
    pub status: ExitStatus,
    pub has_started: bool,
    pub has_opened: bool,
}

/// Starts a child, tells the oracle its story to the end, and kills it meanwhile if a time for that is given.
pub fn follow(
    mut command: Command,
    oracle: &mut Oracle,
    kill_after: Option<Duration>,
    watchdog: &Watchdog,
) -> Result<Ended> {
    let mut child = command.process_group(0).spawn()?;
    let pid = Pid::from_child(&child);
    watchdog.mind(Some(pid));
    let stdout = child.stdout.take().expect("standard output is a pipe");
    let (mut has_started, mut has_opened, mut told) = (false, false, Ok(()));
    std::thread::scope(|scope| -> Result<()> {
        let (over, wait) = mpsc::channel::<()>();
        if let Some(delay) = kill_after {
            // The child has not been waited for, so its number is still its own.
            scope.spawn(move || {
                if wait.recv_timeout(delay).is_err() {
                    kill_process(pid, Signal::KILL).ok();
                }
            });
        }
        for line in BufReader::with_capacity(1 << 16, stdout).split(b'\n') {
            // What the kernel took of a line before the kill, it took whole.
            let line: Line = serde_json::from_slice(&line?)?;
            match line {
                Line::Start => has_started = true,
                Line::Open => has_opened = true,
                Line::Do { .. } | Line::Did { .. } | Line::Refused(_) | Line::Wrong(_) => {}
            }
            if told.is_ok() {
                told = oracle.hear(line);
                if told.is_err() {
                    kill_process(pid, Signal::KILL)?;
                }
            }
        }
        drop(over);
        Ok(())
    })?;
    let status = child.wait()?;
    watchdog.mind(None);
    told?;
    Ok(Ended { status, has_started, has_opened })
}
