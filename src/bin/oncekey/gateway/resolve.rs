//! What an operator does about one key: frees it, or has it forgotten.
//!
//! Nobody else may begin the operation meanwhile, or another run than the one that was looked at would lose its key. So the key
//! is reserved first, as by a client with the same payload; what is running is left alone.

use super::admin::unix_ms;
use super::history::{Happened, History};
use super::metrics::{Resolution, Sources};
use oncekey::{ErrorKind, Outcome, Request, Standing, Store};
use std::time::SystemTime;

/// A key with what it belongs to. Not to be shown or logged.
pub struct Named {
    pub scope: Vec<u8>,
    pub operation: String,
    pub key: String,
}

impl Named {
    pub fn request(&self) -> Request<'_> {
        // An erasure may take longer than a lease.
        Request::new(&self.key).scope(&self.scope).operation(&self.operation).auto_renew(true)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// An interrupted key becomes free: its operation did not happen, or may happen again.
    Release,
    /// A key that nobody runs is forgotten, and its bytes are overwritten.
    Erase,
}

pub enum Done {
    Released,
    Erased {
        /// How many records were overwritten.
        records: u64,
    },
    /// The key is gone, but a client still reads its answer: its bytes are overwritten later.
    ErasedInPart,
    /// There is no such key.
    Unknown,
    /// Nothing was changed, for this reason.
    Refused(&'static str),
}

/// Blocks until it is done, in a synced store on the device as well. It is logged and counted though nobody may wait for it any
/// more.
pub fn carry_out(deed: Deed, named: &Named, sources: &Sources, history: &History) -> oncekey::Result<Done> {
    let done = match deed {
        Deed::Release => release(&sources.store, named),
        Deed::Erase => erase(&sources.store, named),
    };
    let operation = &named.operation;
    let resolution = match &done {
        Ok(Done::Released) => {
            let at_ms = unix_ms(SystemTime::now());
            let happened = Happened { at_ms, what: "released_by_operator", status: None, elapsed_ms: 0.0 };
            history.push(&named.scope, operation, &named.key, happened);
            Resolution::Released
        }
        Ok(Done::Erased { .. } | Done::ErasedInPart) => {
            history.forget(&named.scope, operation, &named.key);
            Resolution::Erased
        }
        Ok(Done::Unknown | Done::Refused(_)) => Resolution::Refused,
        Err(_) => Resolution::Failed,
    };
    sources.meter.resolved(resolution);
    let outcome = resolution.name();
    match &done {
        Ok(_) => tracing::info!(operation, ?deed, outcome, "an operator resolved a key"),
        Err(error) => tracing::warn!(operation, ?deed, outcome, %error, "an operator could not resolve a key"),
    }
    done
}

const RUNNING: &str = "Its operation is running.";
const CHANGED: &str = "Its state has changed in this moment; look at it again.";

fn release(store: &Store, named: &Named) -> oncekey::Result<Done> {
    let request = named.request();
    let Some(found) = store.lookup(&request)? else {
        return Ok(Done::Refused("Nothing is known of it, so that it is free."));
    };
    match found.standing {
        Standing::Interrupted { .. } => {}
        Standing::Running { .. } => return Ok(Done::Refused(RUNNING)),
        Standing::Completed(_) => return Ok(Done::Refused("Its operation was done, and the answer is stored.")),
        // The kinds of standing may become more.
        _ => return Ok(Done::Refused("Its state is not known here.")),
    }
    match store.reserve(&request.fingerprint(found.fingerprint))? {
        Outcome::Interrupted(reservation) => {
            reservation.release()?;
            Ok(Done::Released)
        }
        Outcome::Reserved(reservation) => {
            reservation.release()?;
            Ok(Done::Refused(CHANGED))
        }
        Outcome::Replay(_) | Outcome::InFlight(_) | Outcome::Mismatch(_) => Ok(Done::Refused(CHANGED)),
    }
}

/// Not of a key of which nothing is known: to keep clients from beginning it meanwhile it would have to be reserved, and for what
/// payload can't be said.
fn erase(store: &Store, named: &Named) -> oncekey::Result<Done> {
    let request = named.request();
    let fingerprint = match store.lookup(&request)? {
        None => return Ok(Done::Unknown),
        Some(found) => match found.standing {
            Standing::Running { .. } => return Ok(Done::Refused(RUNNING)),
            // The kinds of standing may become more; what they have in common is that nobody runs.
            _ => found.fingerprint,
        },
    };
    let interrupted = match store.reserve(&request.fingerprint(fingerprint))? {
        Outcome::Interrupted(reservation) => Some(reservation),
        // Nobody runs what is done, unless its retention ends right now. The handle goes at once: the erasure waits for it.
        Outcome::Replay(_) => None,
        Outcome::Reserved(reservation) => {
            reservation.release()?;
            return Ok(Done::Refused(CHANGED));
        }
        Outcome::InFlight(_) | Outcome::Mismatch(_) => return Ok(Done::Refused(CHANGED)),
    };
    let erased = store.erase(&request);
    drop(interrupted);
    match erased {
        Ok(erasure) => Ok(Done::Erased { records: erasure.records }),
        Err(error) if error.kind() == ErrorKind::Busy => Ok(Done::ErasedInPart),
        Err(error) => Err(error),
    }
}
