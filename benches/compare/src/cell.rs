//! What is measured, and what was found: the cells of the tables, as they go to a child process and come back.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum PeerName {
    Oncekey,
    Floor,
    Dashmap,
    Scc,
    Moka,
    QuickCache,
    Lmdb,
    Redb,
    Fjall,
    Sled,
    Sqlite,
    Rocksdb,
    Redis,
}

/// What an acknowledged operation survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Nothing: it is in memory.
    Memory,
    /// The death of the process: it is in the page cache.
    Kill,
    /// Power loss: it is on the device.
    Power,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyForm {
    /// 16 random bytes.
    Binary,
    /// A UUID as text, 36 bytes.
    Text,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// Reserve a new key and complete it, from an empty store on.
    Fresh,
    /// Ask for a completed key, each as often.
    Replay,
    /// Four replays, by Zipf's law, to one new key.
    Mixed,
    /// All threads want the same new keys.
    Herd,
    /// All keys fall due at once.
    Expire,
    /// Killed, and opened again.
    Reopen,
}

/// What a table's row is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Subject {
    pub peer: PeerName,
    pub level: Level,
    pub keys: u64,
    pub key_form: KeyForm,
    pub answer_len: usize,
    pub threads: usize,
}

/// How a subject is measured, in one child process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Job {
    /// FRESH, and then others on what that filled in.
    Run {
        then: Vec<Workload>,
    },
    /// FRESH with each operation timed.
    Latency,
    Herd,
    Expire,
    /// Fills, says so, and waits to be killed.
    Fill,
    /// Opens what was filled.
    Reopen {
        filled: u64,
    },
}

/// A child's orders.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cell {
    pub subject: Subject,
    pub job: Job,
    /// Seconds that each workload of a slow peer may take.
    pub limit_s: f64,
    pub dir: PathBuf,
}

/// What one workload came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reading {
    pub subject: Subject,
    pub workload: Workload,
    pub round: usize,
    /// Operations a second; not from operations that were timed one by one if those are so short that it shows.
    pub rate: Option<f64>,
    /// Keys that were there: fewer than asked for if the time was up.
    pub filled: u64,
    pub latency: Option<Latency>,
    pub space: Option<Space>,
    pub expiry: Option<Expiry>,
    pub reopening: Option<Reopening>,
    /// Whether each key had exactly one owner.
    pub one_owner_each: Option<bool>,
}

/// Nanoseconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Latency {
    pub p50: u64,
    pub p99: u64,
    pub p999: u64,
    pub max: u64,
}

/// Bytes a key, after the filling.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Space {
    pub anonymous: Option<f64>,
    /// Allocated to files.
    pub disk: Option<f64>,
    /// Dirtied by the process, by its `write_bytes`.
    pub written: Option<f64>,
    /// Sent to the device, by whomever.
    pub device: Option<f64>,
    /// Of journal, a pair of records.
    pub pair: Option<f64>,
    /// Dirtied by the process per byte of journal, when the first segments have long been made; nothing is sent to the
    /// device that isn't dirty.
    pub dirtied_per_journal_byte: Option<f64>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Expiry {
    /// Nanoseconds that a key took to reclaim, with nothing beside.
    pub ns_a_key: f64,
    /// FRESH on the full table.
    pub rate_before: f64,
    pub before: Latency,
    /// FRESH while keys are reclaimed.
    pub rate_during: f64,
    pub during: Latency,
    /// Seconds that reclaiming took beside it.
    pub took_s: f64,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Reopening {
    /// From the call that opens to the first right answer.
    pub seconds: f64,
    pub checked: u64,
    pub lost: u64,
}

/// A child's last line.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Report {
    Readings(Vec<Reading>),
    /// Waits to be killed.
    Filled(u64),
    NotInstalled,
}

impl PeerName {
    pub fn name(self) -> &'static str {
        match self {
            PeerName::Oncekey => "oncekey",
            PeerName::Floor => "floor",
            PeerName::Dashmap => "dashmap",
            PeerName::Scc => "scc",
            PeerName::Moka => "moka",
            PeerName::QuickCache => "quick_cache",
            PeerName::Lmdb => "lmdb",
            PeerName::Redb => "redb",
            PeerName::Fjall => "fjall",
            PeerName::Sled => "sled",
            PeerName::Sqlite => "sqlite",
            PeerName::Rocksdb => "rocksdb",
            PeerName::Redis => "redis",
        }
    }

    pub fn is_ours(self) -> bool {
        matches!(self, PeerName::Oncekey | PeerName::Floor)
    }

    /// Whether it finds by itself what fell due, at a level that it has.
    pub fn reclaims(self) -> bool {
        match self {
            PeerName::Oncekey
            | PeerName::Dashmap
            | PeerName::Scc
            | PeerName::Moka
            | PeerName::Sqlite
            | PeerName::Redis => true,
            PeerName::Floor
            | PeerName::QuickCache
            | PeerName::Lmdb
            | PeerName::Redb
            | PeerName::Fjall
            | PeerName::Sled
            | PeerName::Rocksdb => false,
        }
    }
}

impl Level {
    pub fn name(self) -> &'static str {
        match self {
            Level::Memory => "memory",
            Level::Kill => "kill -9 safe",
            Level::Power => "power-loss safe",
        }
    }
}

impl Job {
    pub fn name(&self) -> &'static str {
        match self {
            Job::Run { .. } => "rates",
            Job::Latency => "latencies",
            Job::Herd => "herd",
            Job::Expire => "expiry",
            Job::Fill => "fill and kill",
            Job::Reopen { .. } => "reopening",
        }
    }
}

impl KeyForm {
    pub fn len(self) -> usize {
        match self {
            KeyForm::Binary => 16,
            KeyForm::Text => 36,
        }
    }
}

impl Workload {
    pub fn name(self) -> &'static str {
        match self {
            Workload::Fresh => "FRESH",
            Workload::Replay => "REPLAY",
            Workload::Mixed => "MIXED",
            Workload::Herd => "HERD",
            Workload::Expire => "EXPIRE",
            Workload::Reopen => "REOPEN",
        }
    }
}

impl Subject {
    /// Whether an operation takes so long that timing it doesn't show.
    pub fn is_slow(&self) -> bool {
        self.level == Level::Power || self.level == Level::Kill && !self.peer.is_ours()
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Subject { peer, level, keys, key_form, answer_len, threads } = self;
        let (peer, level, key_len) = (peer.name(), level.name(), key_form.len());
        write!(f, "{peer}, {level}, {keys} keys of {key_len} B, answers of {answer_len} B, {threads} threads")
    }
}
