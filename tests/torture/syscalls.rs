//! Kills and errors at each system call by which the store changes its files, by `strace`'s fault injection.
//!
//! A script of one thread makes the same calls each time, so "the third `fdatasync`" names a place. `strace` kills on
//! entry, before the call does anything: that is after all that came before it.

use crate::audit::audit;
use crate::clock::EPOCH_MS;
use crate::oracle::Oracle;
use crate::process::{Ended, Orders, Part, follow};
use crate::random::Random;
use crate::watchdog::Watchdog;
use crate::{Args, Durable, Figures, Result};
use indicatif::{ProgressBar, ProgressStyle};
use oncekey::ManualClock;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

/// All calls that change a file or a directory, whether or not the store makes them today.
const CALLS: &[&str] = &[
    "openat",
    "mkdir",
    "mkdirat",
    "fchmod",
    "chmod",
    "fchmodat",
    "write",
    "pwrite64",
    "writev",
    "pwritev",
    "fallocate",
    "ftruncate",
    "fdatasync",
    "fsync",
    "msync",
    "madvise",
    "mmap",
    "rename",
    "renameat",
    "renameat2",
    "unlink",
    "unlinkat",
    "linkat",
    "flock",
    "ioctl",
    "copy_file_range",
];
/// Those that a script has to make: what segments are made, filled, synced, sealed, overwritten and removed with.
const NEEDED: &[&str] = &["fallocate", "fdatasync", "fsync", "openat", "pwrite64", "renameat2", "unlinkat"];
/// Scripts to try until one does.
const TRIES: usize = 50;
/// The ones after whose failure somebody has to be told that nothing more is promised.
const SYNCS: &[&str] = &["fdatasync", "fsync", "msync"];
const ERRORS: &[&str] = &["EIO", "ENOSPC"];
/// How the store is used: as it may be set, and with the system calls that follow from that.
const SETTINGS: [(Durable, bool); 3] =
    [(Durable::Synced, false), (Durable::Buffered, true), (Durable::Buffered, false)];
const SEGMENT_LEN: u64 = 64 * 1024;
/// Kills of a script to one whose recovery is killed everywhere in turn.
const KILLS_A_RECOVERY: u64 = 40;

struct Rig<'r> {
    dir: &'r Path,
    every: u64,
    random: Random,
    watchdog: &'r Watchdog,
    figures: &'r mut Figures,
    bar: ProgressBar,
}

pub fn check_strace() -> Result<()> {
    match Command::new("strace").arg("--version").output() {
        Ok(output) if output.status.success() => Ok(()),
        _ => Err("strace is missing: install the package of that name, or say --strace off".into()),
    }
}

pub fn run(args: &Args, dir: &Path, seed: u64, watchdog: &Watchdog, figures: &mut Figures) -> Result<()> {
    let style = ProgressStyle::with_template("{elapsed:>4} {spinner} {pos} processes under strace, {msg}")?;
    let bar = ProgressBar::new_spinner().with_style(style);
    let mut rig = Rig { dir, every: args.strace_every, random: Random::new(seed), watchdog, figures, bar };
    for (durable, pwrite) in SETTINGS {
        rig.bar.set_message(format!("{durable:?}, {}", if pwrite { "pwrite" } else { "mapped" }));
        let orders = Orders {
            store: dir.join("script"),
            part: Part::Script,
            child_seed: 0,
            number: 1,
            segment_len: SEGMENT_LEN,
            durable,
            pwrite,
            time: EPOCH_MS,
        };
        rig.kill_and_fail_everywhere(orders)?;
    }
    rig.bar.finish_and_clear();
    Ok(())
}

impl Rig<'_> {
    fn kill_and_fail_everywhere(&mut self, mut orders: Orders) -> Result<()> {
        let mut places = Vec::new();
        for _ in 0..TRIES {
            orders.child_seed = self.random.draw();
            clear(&orders.store)?;
            places = self.places(&orders)?;
            if NEEDED.iter().all(|needed| places.iter().any(|(call, ..)| call == needed)) {
                break;
            }
        }
        if let Some(missing) = NEEDED.iter().find(|needed| places.iter().all(|(call, ..)| call != *needed)) {
            return Err(format!("no script of {TRIES} called {missing}").into());
        }
        let orders = &orders;
        for (call, first, last) in places {
            for when in self.some_of(first, last) {
                clear(&orders.store)?;
                let mut oracle = Oracle::default();
                if !self.kill(orders, call, when, &mut oracle)? {
                    return Err(format!("{orders:?} was not killed at {call} {when} of {last}").into());
                }
                if self.random.one_in(KILLS_A_RECOVERY) {
                    self.kill_recoveries(orders, &oracle)?;
                }
                self.look(orders, &mut oracle, &format!("killed at {call} {when}"))?;
                for error in ERRORS {
                    // Standard output is not the store's.
                    if call != "write" {
                        clear(&orders.store)?;
                        self.fail(orders, call, when, error)?;
                    }
                }
            }
            clear(&orders.store)?;
            if self.kill(orders, call, last + 1, &mut Oracle::default())? {
                return Err(format!(
                    "{orders:?} made more than {last} calls of {call}, so the places are not the same"
                )
                .into());
            }
        }
        Ok(())
    }

    /// Kills the recovery of the store at hand, and the recovery of what that leaves, and looks; everywhere.
    fn kill_recoveries(&mut self, orders: &Orders, oracle: &Oracle) -> Result<()> {
        let kept = self.dir.join("kept");
        copy(&orders.store, &kept)?;
        let again = |number| Orders { part: Part::Reopen, number, time: oracle.now + 1, ..orders.clone() };
        let places = self.places(&again(2))?;
        for (call, first, last) in &places {
            for when in self.some_of(*first, *last) {
                copy(&kept, &orders.store)?;
                let mut oracle = oracle.clone();
                self.figures.recovery_kills += u64::from(self.kill(&again(2), call, when, &mut oracle)?);
                let (second, first, last) = places[self.random.below(places.len() as u64) as usize];
                let second_when = first + self.random.below(last - first + 1);
                let second_time = Orders { time: oracle.now + 1, ..again(3) };
                // What was killed before may have left less to do.
                self.figures.recovery_kills += u64::from(self.kill(&second_time, second, second_when, &mut oracle)?);
                self.look(
                    orders,
                    &mut oracle,
                    &format!("recovery killed at {call} {when}, then at {second} {second_when}"),
                )?;
            }
        }
        copy(&kept, &orders.store)
    }

    /// The occurrences to try: all, or every so-manieth, but at least four of each call.
    fn some_of(&mut self, first: u64, last: u64) -> impl Iterator<Item = u64> + use<> {
        let every = self.every.min((last + 1 - first).div_ceil(4));
        (first + self.random.below(every)..=last).step_by(every as usize)
    }

    /// Whether the child got so far as to be killed.
    fn kill(&mut self, orders: &Orders, call: &str, when: u64, oracle: &mut Oracle) -> Result<bool> {
        let ended = self.inject(orders, call, &format!("signal=KILL:when={when}"), oracle)?;
        let is_killed = ended.status.signal() == Some(9);
        match ended.status.success() || is_killed {
            true => self.figures.strace_kills += u64::from(is_killed),
            false => return Err(format!("{orders:?}, to be killed at {call} {when}: {}", ended.status).into()),
        }
        oracle.crash(oracle.now);
        Ok(is_killed)
    }

    fn fail(&mut self, orders: &Orders, call: &str, when: u64, error: &str) -> Result<()> {
        let mut oracle = Oracle::default();
        oracle.tolerates_errors = true;
        let ended = self.inject(orders, call, &format!("error={error}:when={when}"), &mut oracle)?;
        let what = format!("{error} of {call} {when}");
        if ended.has_started && !ended.status.success() {
            return Err(format!("{orders:?}, {what}: {}", ended.status).into());
        }
        // A new segment that finds no room is not needed where answers of other lifetimes have some left.
        let may_be_unseen = call == "fsync" && error == "ENOSPC";
        if SYNCS.contains(&call) && ended.has_started && oracle.errors == 0 && !may_be_unseen {
            return Err(format!("{orders:?}: nobody was told of {what}").into());
        }
        oracle.crash(oracle.now);
        self.figures.errors += 1;
        self.figures.refusals += oracle.errors;
        self.look(orders, &mut oracle, &what)
    }

    fn inject(&mut self, orders: &Orders, call: &str, what: &str, oracle: &mut Oracle) -> Result<Ended> {
        let words = [
            "strace",
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            &format!("trace={call}"),
            "-e",
            &format!("inject={call}:{what}"),
        ];
        self.bar.inc(1);
        follow(orders.command(&words.map(str::to_owned))?, oracle, None, self.watchdog)
            .map_err(|error| format!("under strace, {call}:{what}, {orders:?}: {error}").into())
    }

    fn look(&mut self, orders: &Orders, oracle: &mut Oracle, what: &str) -> Result<()> {
        let clock = Arc::new(ManualClock::new(oracle.now + 1));
        let audited = audit(orders, clock, oracle, 9 << 32 | 1);
        self.figures.acks += oracle.acks;
        self.figures.audits += 1;
        audited.map_err(|error| format!("after {what}, {orders:?}: {error}").into())
    }

    /// Each system call that a child makes: the number of its first one after the start, and of its last.
    fn places(&mut self, orders: &Orders) -> Result<Vec<(&'static str, u64, u64)>> {
        let told = self.dir.join("calls");
        let trace = format!("trace={}", CALLS.iter().map(|call| format!("?{call}")).collect::<Vec<_>>().join(","));
        let words =
            ["strace".into(), "-f".into(), "-qq".into(), "-o".into(), told.display().to_string(), "-e".into(), trace];
        let output = orders.command(&words)?.output()?;
        if !output.status.success() {
            return Err(format!("{orders:?} without any fault: {}", output.status).into());
        }
        let mut counts: BTreeMap<&'static str, (u64, u64)> = BTreeMap::new();
        let mut has_started = false;
        for line in fs::read_to_string(told)?.lines() {
            let line = line.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ');
            let Some(call) =
                CALLS.iter().find(|call| line.strip_prefix(**call).is_some_and(|rest| rest.starts_with('(')))
            else {
                continue;
            };
            let (before, all) = counts.entry(call).or_default();
            *all += 1;
            *before += u64::from(!has_started);
            has_started |= line.contains(r#"\"Start\""#);
        }
        let places = counts.into_iter().filter(|(_, (before, all))| before < all);
        Ok(places.map(|(call, (before, all))| (call, before + 1, all)).collect())
    }
}

fn clear(dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir)?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    clear(to)?;
    fs::create_dir(to)?;
    if from.exists() {
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}
