//! Crash-safe idempotency keys: one caller runs an operation, every retry gets the stored answer.
//!
//! A payment, an order, an inference, a queue message is retried by a client, a load balancer, a broker. A [`Store`]
//! decides whether it was done before, lets exactly one caller run it, and gives everyone else the stored answer, or a
//! clear "in progress", "another payload", "an earlier owner vanished". It forgets the answer when its time is over, and
//! loses nothing at `kill -9` or a power cut.
//!
//! ```
//! use oncekey::{Outcome, Request, Store};
//!
//! # fn charge() -> oncekey::Result<Vec<u8>> { Ok(b"receipt 7".to_vec()) }
//! # fn answer(_: &[u8]) {}
//! # let dir = tempfile::tempdir().unwrap();
//! # let path = dir.path().join("idempotency");
//! # let body = br#"{"amount": 100}"#;
//! let store = Store::open(&path)?;
//! let request = Request::new("order-42").scope("acme").fingerprint_of(body);
//! match store.reserve(&request)? {
//!     Outcome::Reserved(reservation) => {
//!         let receipt = charge()?;
//!         answer(reservation.complete(&receipt)?.bytes());
//!     }
//!     Outcome::Interrupted(reservation) => {
//!         // An earlier owner vanished: look up whether it charged, then complete or release.
//!         # drop(reservation);
//!     }
//!     Outcome::Replay(record) => answer(record.bytes()),
//!     Outcome::InFlight(pending) => {
//!         // Answer 409 with Retry-After, or wait.
//!         # drop(pending);
//!     }
//!     Outcome::Mismatch(_) => { /* 422: the key was used for another payload */ }
//! }
//! # Ok::<(), oncekey::Error>(())
//! ```
//!
//! What the store can't do: make an effect outside of it happen exactly once. Between the effect and its recording a
//! process may die; then the key comes back as [`Outcome::Interrupted`], and only the caller can find out.
//!
//! # Features
//!
//! - `http`: an `Idempotency-Key` layer for tower services, such as those of axum, hyper and tonic.
//! - `gateway`: the binary `oncekey`, whose subcommand `gateway` puts the same before any HTTP service.
//! - `testing`: a simulated disk with power cuts, and the parts that benches and fuzzing drive. No promise of stability.

#![warn(missing_docs)]
#![warn(clippy::wildcard_enum_match_arm)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

#[macro_use]
mod planted;

mod builder;
mod checkpoint;
mod clock;
mod erase;
mod error;
mod fingerprint;
#[cfg(feature = "http")]
pub mod http;
mod journal;
mod key;
mod maintain;
mod mmap;
mod pending;
mod record;
mod recovery;
mod reservation;
mod run;
mod shard;
mod state;
mod stats;
mod store;
mod sync;
mod table;
mod wheel;

pub use builder::{Builder, LEAST_MAX_BYTES};
pub use clock::{Clock, ManualClock, SystemClock};
pub use error::{Error, ErrorKind, Result};
pub use fingerprint::Fingerprint;
pub use journal::media::Media;
pub use key::{Durability, Request, Retention};
pub use maintain::Maintained;
pub use pending::{Pending, Wait};
pub use record::Record;
pub use recovery::{Damage, RecoveryMode, RecoveryReport};
pub use reservation::{Reservation, Unwritten};
pub use run::{Ran, RunError, Verdict};
pub use stats::Stats;
pub use store::{Erasure, Lookup, MAX_LEASE, Mismatch, Outcome, Standing, Store};

/// Inner parts, for tests, benches and fuzzing only.
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;

// With all features, as its examples need.
#[cfg(all(doctest, feature = "http"))]
#[doc = include_str!("../README.md")]
struct Readme;
