//! The side effect: a file with a line a charge, which knows nothing of idempotency keys.
//!
//! A charge is made when its line is in the file and synced; one `fdatasync` serves all threads that wait for it. A
//! process that dies may leave a line without its end, which the next one cuts off, and whole lines that nobody synced,
//! which the next one syncs before it relies on them.

use crate::Result;
use parking_lot::{Condvar, Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

/// What is to be paid: the body of a request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Charge {
    pub merchant: String,
    pub order: String,
    pub cents: u64,
}

/// A charge that was made: a line of the ledger.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Entry {
    pub charge: Charge,
    /// Random, so that no two charges share it.
    number: String,
}

impl Entry {
    /// What the client gets.
    pub fn receipt(&self) -> String {
        let Charge { merchant, order, cents } = &self.charge;
        format!("{merchant} {order} {cents} cents, receipt {}", self.number)
    }
}

pub struct Ledger {
    file: File,
    state: Mutex<State>,
    synced: Condvar,
}

struct State {
    /// The line and the receipt of each charge.
    lines: HashMap<Charge, (usize, String)>,
    written: usize,
    synced: usize,
    is_syncing: bool,
}

impl Ledger {
    /// Opens a ledger, made if need be, after cutting off what a dying process left half written.
    pub fn open(path: &Path) -> Result<Ledger> {
        let file = File::options().create(true).append(true).open(path)?;
        let bytes = fs::read(path)?;
        let whole = whole_lines(&bytes);
        file.set_len(whole.len() as u64)?;
        file.sync_all()?;
        File::open(path.parent().ok_or("a ledger without a directory")?)?.sync_all()?;

        let entries = entries(whole)?;
        let written = entries.len();
        let lines = (1..).zip(&entries).map(|(line, entry)| (entry.charge.clone(), (line, entry.receipt()))).collect();
        let state = Mutex::new(State { lines, written, synced: written, is_syncing: false });
        Ok(Ledger { file, state, synced: Condvar::new() })
    }

    /// Makes a charge, whether or not there was one for the same order, and returns its receipt.
    pub fn charge(&self, charge: &Charge) -> Result<String> {
        let number = format!("{:016x}{:016x}", getrandom::u64()?, getrandom::u64()?);
        let entry = Entry { charge: charge.clone(), number };
        let mut line = serde_json::to_string(&entry)?;
        line.push('\n');
        let receipt = entry.receipt();

        let mut state = self.state.lock();
        (&self.file).write_all(line.as_bytes())?;
        state.written += 1;
        let line = state.written;
        state.lines.insert(entry.charge, (line, receipt.clone()));
        self.sync_line(state, line)?;
        Ok(receipt)
    }

    /// The receipt of a charge, if it was made.
    pub fn find(&self, charge: &Charge) -> Result<Option<String>> {
        let state = self.state.lock();
        let Some((line, receipt)) = state.lines.get(charge).cloned() else { return Ok(None) };
        self.sync_line(state, line)?;
        Ok(Some(receipt))
    }

    /// Returns when a line is on disk: the first thread to come syncs for all whose lines are written by then.
    fn sync_line(&self, mut state: MutexGuard<'_, State>, line: usize) -> Result<()> {
        while state.synced < line {
            if state.is_syncing {
                self.synced.wait(&mut state);
                continue;
            }
            state.is_syncing = true;
            let written = state.written;
            MutexGuard::unlocked(&mut state, || self.file.sync_data())?;
            state.synced = written;
            state.is_syncing = false;
            self.synced.notify_all();
        }
        Ok(())
    }
}

fn whole_lines(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    &bytes[..end]
}

/// All charges in a ledger's bytes, but for a line without its end.
pub fn entries(bytes: &[u8]) -> Result<Vec<Entry>> {
    let lines = whole_lines(bytes).split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    Ok(lines.map(serde_json::from_slice).collect::<serde_json::Result<_>>()?)
}
