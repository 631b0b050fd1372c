//! The payment service: puts every order through the store, and charges it if that is what the store says.

use crate::ledger::{Charge, Ledger};
use crate::{Durability, Result};
use oncekey::{Outcome, Request, Store, Wait};
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{fs, process, thread};

/// Orders are small, and a service that is restarted often doesn't want to prepare 32 MiB at a time.
const SEGMENT_LEN: u64 = 4 * 1024 * 1024;

/// A line back to the client.
#[derive(Serialize, Deserialize)]
pub enum Reply {
    Receipt { receipt: String, how: How },
    Retry,
    Refused(String),
}

/// Where a receipt comes from.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub enum How {
    Charged,
    Replayed,
    /// An earlier attempt was interrupted; it may have charged the order or not.
    Reconciled {
        was_charged: bool,
    },
}

pub fn socket(home: &Path) -> PathBuf {
    home.join("socket")
}

pub fn store_dir(home: &Path) -> PathBuf {
    home.join("store")
}

pub fn ledger_file(home: &Path) -> PathBuf {
    home.join("ledger")
}

/// The order is the key, the merchant the scope, and the whole body has to be the same each time.
pub fn request_for<'a>(charge: &'a Charge, body: &[u8]) -> Request<'a> {
    Request::new(&charge.order).scope(&charge.merchant).operation("charge").fingerprint_of(body)
}

/// Serves until its standard input ends, or until it is killed.
pub fn serve(home: &Path, durability: Durability) -> Result<()> {
    thread::spawn(|| {
        let ended = io::stdin().read_to_end(&mut Vec::new());
        process::exit(if ended.is_ok() { 0 } else { 1 });
    });
    let durability = match durability {
        Durability::Synced => oncekey::Durability::Synced,
        Durability::Buffered => oncekey::Durability::Buffered,
    };
    let store = Store::builder().durability(durability).segment_size(SEGMENT_LEN).open(store_dir(home))?;
    let till = Arc::new(Till { store, ledger: Ledger::open(&ledger_file(home))? });

    let socket = socket(home);
    match fs::remove_file(&socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        Ok(()) | Err(_) => {}
    }
    for connection in UnixListener::bind(&socket)?.incoming() {
        let connection = connection?;
        let till = Arc::clone(&till);
        // Clients hang up as they like: an error on the connection ends just that.
        thread::spawn(move || till.converse(&connection).ok());
    }
    Ok(())
}

struct Till {
    store: Store,
    ledger: Ledger,
}

impl Till {
    fn converse(&self, connection: &UnixStream) -> io::Result<()> {
        for body in BufReader::new(connection).lines() {
            let reply = self.answer(body?.as_bytes()).unwrap_or_else(|error| {
                // Neither the store nor the ledger can be relied on any more.
                eprintln!("checkout service: {error}");
                process::exit(1)
            });
            let mut line = serde_json::to_vec(&reply)?;
            line.push(b'\n');
            (&*connection).write_all(&line)?;
        }
        Ok(())
    }

    fn answer(&self, body: &[u8]) -> Result<Reply> {
        let charge: Charge = match serde_json::from_slice(body) {
            Ok(charge) => charge,
            Err(error) => return Ok(Reply::Refused(error.to_string())),
        };
        let request = request_for(&charge, body);
        let (record, how) = loop {
            match self.store.reserve(&request)? {
                Outcome::Reserved(reservation) => {
                    let receipt = self.ledger.charge(&charge)?;
                    break (reservation.complete(receipt)?, How::Charged);
                }
                Outcome::Interrupted(reservation) => {
                    let found = self.ledger.find(&charge)?;
                    let how = How::Reconciled { was_charged: found.is_some() };
                    let receipt = found.map_or_else(|| self.ledger.charge(&charge), Ok)?;
                    break (reservation.complete(receipt)?, how);
                }
                Outcome::Replay(record) => break (record, How::Replayed),
                Outcome::InFlight(pending) => match pending.wait(Duration::from_secs(5))? {
                    Wait::Replay(record) => break (record, How::Replayed),
                    Wait::Retry => {}
                    Wait::TimedOut(_) => return Ok(Reply::Retry),
                },
                Outcome::Mismatch(_) => return Ok(Reply::Refused("the order was sent with another body".to_owned())),
            }
        };
        Ok(Reply::Receipt { receipt: String::from_utf8(record.bytes().to_vec())?, how })
    }
}
