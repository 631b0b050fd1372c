//! What is looked at between two processes: every key, every record, every file.

use crate::Result;
use crate::client::{Asked, Asking, Client};
use crate::oracle::{Breach, Oracle, Violation};
use crate::process::Orders;
use crate::story::{Line, Log, MAGIC};
use oncekey::{Clock, Durability};
use parking_lot::Mutex;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

/// A fingerprint that nobody asks with: what is held or done answers with a mismatch, and stays as it is.
const NOBODYS: u8 = 0xff;
/// What a store may take up beside twice what lives in it: a segment in use and one a step behind for each of the ten
/// streams, five spares, and sixteen small ones that restarts left and upkeep puts up with.
const SEGMENTS_BESIDE: u64 = 2 * 10 + 5 + 16;

/// The story of the process at hand, straight to the oracle.
struct Heard<'o>(Mutex<(&'o mut Oracle, Option<Violation>)>);

impl Log for Heard<'_> {
    fn line(&self, line: Line) {
        let (oracle, violation) = &mut *self.0.lock();
        if let Err(found) = oracle.hear(line) {
            violation.get_or_insert(found);
        }
    }
}

/// Opens the store that a kill left, compares all of it with what the oracle says, and leaves it in turn without closing
/// it.
pub fn audit(orders: &Orders, clock: Arc<dyn Clock>, oracle: &mut Oracle, first_op: u64) -> Result<()> {
    let dir = &orders.store;
    // What is only looked at is not counted.
    let (acks, errors) = (oracle.acks, oracle.errors);
    oracle.tolerates_errors = false;
    let shared = 0..orders.shared_keys();
    let others = oracle.keys().into_iter().filter(|key| !shared.contains(key));
    let keys: Vec<u64> = shared.clone().chain(others).collect();
    let heard = Heard(Mutex::new((oracle, None)));
    let client = Client::open(orders.builder().background(false), dir, Arc::clone(&clock), &heard, first_op)?;
    for key in keys {
        client.get(key);
        // Not all that are free, since each probe is two records.
        let (is_vacant, seed) = (heard.0.lock().0.is_vacant(key), first_op ^ key);
        if !is_vacant || seed.is_multiple_of(16) {
            let asking = Asking { print: NOBODYS, lease: Some(1 << 20), durability: Durability::Buffered };
            if let Asked::Owned(owned) = client.reserve(key, asking) {
                client.release(owned);
            }
        }
    }
    while client.store.maintain(10_000)?.has_more {}
    client.store.verify()?;
    drop(client);
    let (oracle, violation) = heard.0.into_inner();
    oracle.crash(clock.now_ms());
    (oracle.acks, oracle.errors) = (acks, errors);
    if let Some(violation) = violation {
        return Err(violation.into());
    }
    search(dir, oracle)?;
    let (taken, live) = (disk(dir)?, oracle.live_bytes());
    let most = 2 * live + SEGMENTS_BESIDE * orders.segment_len;
    if taken > most {
        let text = format!("{taken} bytes on disk for {live} that live, more than {most}");
        return Err(Violation { breach: Breach::Lost, text }.into());
    }
    Ok(())
}

/// Looks for traces of what was erased.
fn search(dir: &Path, oracle: &mut Oracle) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let bytes = fs::read(&path)?;
        for at in memchr::memmem::find_iter(&bytes, &MAGIC) {
            let Some(number) = bytes.get(at + 8..).and_then(|rest| rest.first_chunk()) else { continue };
            let number = u64::from_le_bytes(*number);
            if oracle.erased.contains(&number) {
                let text = format!("{number} was erased, and is in {} at {at}", path.display());
                return Err(Violation { breach: Breach::Lost, text }.into());
            }
        }
    }
    // What is in no file now does not come back by itself.
    oracle.erased.clear();
    Ok(())
}

/// Bytes that a directory's files take up on the device.
pub fn disk(dir: &Path) -> Result<u64> {
    fs::read_dir(dir)?.map(|entry| Ok(entry?.metadata()?.blocks() * 512)).sum()
}
