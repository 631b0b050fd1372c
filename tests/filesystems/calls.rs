//! System calls that fail: one short history of a store, and for every call that it makes a run in which that call fails.
//!
//! The call is not carried out, and the power fails when the history has ended: so an error that the store passed over is
//! a loss.

use crate::child::Child;
use crate::device::{Device, Image, Kept};
use crate::ground::Ground;
use crate::life::Book;
use crate::{Result, Run, cuts};
use oncekey::{Durability, Store};
use std::path::Path;
use std::process::Command;

/// What a store asks the kernel for; each can fail with these.
const CALLS: [&str; 10] = [
    "fdatasync",
    "fsync",
    "pwrite64",
    "pread64",
    "fallocate",
    "renameat2",
    "unlinkat",
    "openat",
    "getdents64",
    "mkdir",
];
const ERRORS: [&str; 2] = ["EIO", "ENOSPC"];
/// How often each kind of call fails unless every one is to.
const SOME: u64 = 2;

/// The child's part: two openings, the second of which has to recover. What was acknowledged is told in lines.
pub fn history(ground: &Ground) -> Result<()> {
    println!("begun");
    let mut book = Book::default();
    let mut go_on = |store: &Store| -> Result<()> {
        for _ in 0..18 {
            let answer = book.live(store, Durability::Synced, 1);
            print!("{}", book.lines());
            answer?;
        }
        store.maintain(1000)?;
        Ok(())
    };
    let settings = cuts::builder().background(false);
    go_on(&settings.clone().open(ground.store())?)?;
    let store = settings.open(ground.store())?;
    go_on(&store)?;
    Ok(store.close()?)
}

impl Run {
    pub fn calls(&mut self, ground: &Ground, disk: Option<(&Device, &Image)>) -> Result<()> {
        for call in CALLS {
            let mut made = 0;
            self.on_fresh(ground, disk, "a history without failures", |run| {
                made = run.history(ground, call, None)?.1;
                Ok(())
            })?;
            let which: Vec<u64> = match self.args.every_call {
                true => (1..=made).collect(),
                false => self.random.choose_multiple(1..=made, SOME as usize),
            };
            for nth in which {
                for error in ERRORS {
                    let what = format!("{} {call} {nth} of {made} {error}", ground.kind.name());
                    self.checks += 1;
                    self.images.set_message(what.clone());
                    self.on_fresh(ground, disk, &what, |run| {
                        let (book, _) = run.history(ground, call, Some((nth, error)))?;
                        run.find_after(ground, disk.map(|(device, _)| device), &book)
                    })?;
                }
            }
        }
        Ok(())
    }

    /// Runs the history, one call of it failing if so told: what was acknowledged, and how many such calls were made.
    fn history(&mut self, ground: &Ground, call: &str, failing: Option<(u64, &str)>) -> Result<(Book, u64)> {
        let trace = self.dir.join("trace");
        let mut command = Command::new("strace");
        command.args(["-f", "--seccomp-bpf", "-qq", "-e", &format!("trace={call}"), "-o"]).arg(&trace);
        if let Some((nth, error)) = failing {
            command.args(["-e", &format!("inject={call}:error={error}:when={nth}")]);
        }
        command.arg(std::env::current_exe()?).args(["play", "history", ground.kind.name()]);
        command.arg(&ground.at).args(&ground.file);
        // What the child has to say of a failure that was made is of no interest, unless it is of the wrong sort.
        command.stderr(std::process::Stdio::null());
        let mut child = Child::start(&mut command)?;
        let mut book = Book::default();
        let mut has_begun = false;
        while let Some(line) = child.line()? {
            has_begun |= line == "begun" || book.take(&line);
        }
        let may_fail = failing.is_some();
        // The loader makes such calls too.
        if has_begun || !may_fail {
            child.end_with(if may_fail { &[0, 1] } else { &[0] })?;
        }
        let calls = std::fs::read_to_string(&trace)?;
        Ok((book, calls.lines().filter(|line| line.contains(&format!("{call}("))).count() as u64))
    }

    /// Looks for what was acknowledged, after a power cut where there is a disk.
    fn find_after(&mut self, ground: &Ground, device: Option<&Device>, book: &Book) -> Result<()> {
        if let Some(device) = device {
            let cut = device.cut();
            ground.unmount()?;
            device.load(cut.image(Kept::Nothing, |_| false, &mut self.random));
            ground.mount()?;
        }
        let ledger = self.dir.join("ledger");
        std::fs::write(&ledger, book.lines())?;
        self.check(ground, &ledger)?.end()
    }

    /// A child that compares the store with a ledger.
    pub fn check(&self, ground: &Ground, ledger: &Path) -> Result<Child> {
        Child::start(self.myself("check").arg(ground.store()).arg(ledger))
    }
}
