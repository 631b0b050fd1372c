//! Settings of a store.

use crate::checkpoint::Checkpoints;
use crate::clock::{Clock, SystemClock};
use crate::erase::Space;
use crate::error::{Error, ErrorKind, Result};
use crate::journal::media::{AnonMedia, FileMedia, Media, Storage};
use crate::key::{Durability, KEY_PREFIX, Retention};
use crate::mmap::ForkMark;
use crate::recovery::{Plan, Recovery, RecoveryMode, check_max_bytes, recover};
use crate::store::{Engine, KeyHasher, Store, StoreClock, check_retention, lease_ms};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU64};
use dashmap::DashMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const KIB: usize = 1024;
const MIB: u64 = 1024 * 1024;
const SHORTEST_SEGMENT: u64 = 64 * KIB as u64;
const LONGEST_SEGMENT: u64 = 256 * MIB;
/// Segment head, seal and a record's header, rounded up.
const SEGMENT_OVERHEAD: u64 = 8 * KIB as u64;
// Few under a checker, to which each lock is a step.
const SHARDS: usize = if cfg!(oncekey_shuttle) { 4 } else { 256 };

/// Settings to open a [`Store`] with.
///
/// ```
/// use oncekey::{Durability, Retention, Store};
/// use std::time::Duration;
///
/// # let dir = tempfile::tempdir()?;
/// let store = Store::builder()
///     .durability(Durability::Buffered)
///     .retention(Retention::For(Duration::from_secs(24 * 3600)))
///     .max_keys(10_000_000)
///     .open(dir.path().join("idempotency"))?;
/// # store.close()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
#[must_use = "a builder does nothing until `open` or `in_memory`"]
pub struct Builder {
    durability: Durability,
    retention: Retention,
    lease: Duration,
    wait: Duration,
    max_keys: Option<u64>,
    max_bytes: Option<u64>,
    max_key_len: usize,
    max_record_len: Option<usize>,
    segment_len: Option<u64>,
    media: Media,
    recovery: RecoveryMode,
    clock: Option<Arc<dyn Clock>>,
    clock_jump_limit: Option<Duration>,
    background: bool,
    index: bool,
    #[cfg(any(test, feature = "testing"))]
    fixed_hash: Option<u64>,
    #[cfg(any(test, feature = "testing"))]
    seed: Option<u64>,
}

/// What requests are held to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) durability: Durability,
    pub(crate) retention: Retention,
    pub(crate) lease_ms: u64,
    pub(crate) wait: Duration,
    pub(crate) max_keys: Option<u64>,
    pub(crate) max_key_len: usize,
    pub(crate) max_record_len: usize,
}

/// Whether segments may have this length in bytes.
pub(crate) fn is_segment_len(len: u64) -> bool {
    len.is_power_of_two() && (SHORTEST_SEGMENT..=LONGEST_SEGMENT).contains(&len)
}

impl Default for Builder {
    fn default() -> Self {
        Builder::new()
    }
}

impl Builder {
    /// The defaults: synced, answers kept for 24 hours, leases of 30 seconds, no limit but the disk.
    pub fn new() -> Self {
        Builder {
            durability: Durability::Synced,
            retention: Retention::For(Duration::from_secs(24 * 3600)),
            lease: Duration::from_secs(30),
            wait: Duration::from_secs(30),
            max_keys: None,
            max_bytes: None,
            max_key_len: 512,
            max_record_len: None,
            segment_len: None,
            media: Media::Auto,
            recovery: RecoveryMode::Strict,
            clock: None,
            clock_jump_limit: None,
            background: true,
            index: true,
            #[cfg(any(test, feature = "testing"))]
            fixed_hash: None,
            #[cfg(any(test, feature = "testing"))]
            seed: None,
        }
    }

    /// What acknowledged operations survive, unless a request says otherwise; `Synced` by default.
    pub fn durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }

    /// How long answers are kept, unless a request says otherwise; 24 hours by default.
    pub fn retention(mut self, retention: Retention) -> Self {
        self.retention = retention;
        self
    }

    /// How long reservations hold, unless a request says otherwise; 30 s by default, 1 ms to [`MAX_LEASE`](crate::MAX_LEASE).
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// How long [`Store::run`] waits for another caller, unless a request says otherwise; 30 s by default.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// How many keys are held at most, in any state; no limit by default. Live keys are never evicted to make room.
    pub fn max_keys(mut self, keys: u64) -> Self {
        self.max_keys = Some(keys);
        self
    }

    /// How many bytes all segments take at most, at least sixteen segments of the store; no limit by default.
    ///
    /// New reservations are refused three segments before that, which leaves two for the answers of operations under way and one
    /// for upkeep. Up to ten are in use though they hold little: answers of like lifetimes go to one. A store that is opened
    /// with no room left takes up to two segments more than it had for a while, to move what lives out of what is mostly dead.
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.max_bytes = Some(bytes);
        self
    }

    /// Bytes of scope, operation and key together that can be reserved, at most; 512 by default, 1 to 32,768. Longer keys that
    /// the store has can still be looked up and erased.
    pub fn max_key_len(mut self, len: usize) -> Self {
        self.max_key_len = len;
        self
    }

    /// Bytes of an answer or recovery point, at most; 16 MiB by default. A segment has to hold one.
    ///
    /// Where a smaller segment is asked for and this is not, it is what such a segment holds.
    pub fn max_record_len(mut self, len: usize) -> Self {
        self.max_record_len = Some(len);
        self
    }

    /// Bytes of a segment: a power of two from 64 KiB to 256 MiB, 32 MiB by default; fixed when a store is made.
    pub fn segment_size(mut self, len: u64) -> Self {
        self.segment_len = Some(len);
        self
    }

    /// How segments are written; found out by default.
    pub fn media(mut self, media: Media) -> Self {
        self.media = media;
        self
    }

    /// What to do about damage; refuse by default.
    pub fn recovery(mut self, mode: RecoveryMode) -> Self {
        self.recovery = mode;
        self
    }

    /// Where time comes from; [`SystemClock`] by default.
    pub fn clock(mut self, clock: impl Clock) -> Self {
        self.clock = Some(Arc::new(clock));
        self
    }

    /// Refuses to open if the clock is further ahead of the newest record than this; no limit by default.
    ///
    /// A clock that jumped forward would expire every answer at once.
    pub fn clock_jump_limit(mut self, limit: Duration) -> Self {
        self.clock_jump_limit = Some(limit);
        self
    }

    /// Whether threads of the store do its upkeep; they do by default.
    ///
    /// Without them the caller has to call [`Store::maintain`] now and then: nothing expires out of memory and no space
    /// comes back otherwise. Answers are right either way.
    pub fn background(mut self, on: bool) -> Self {
        self.background = on;
        self
    }

    /// Whether an index is written, at close and now and then, and read at the next opening; it is by default.
    ///
    /// With it an opening reads and checks only the segments that the index does not cover, and upkeep checks the others
    /// afterwards; until then each record is checked when it is used. Without it an opening reads and checks everything, so that
    /// a store with damage is refused at once. The index takes 12 bytes a key on disk, beside what
    /// [`max_bytes`](Builder::max_bytes) allows.
    pub fn index(mut self, on: bool) -> Self {
        self.index = on;
        self
    }

    /// Gives every key the same hash, to test that keys are told apart by their bytes.
    #[cfg(any(test, feature = "testing"))]
    #[doc(hidden)]
    pub fn fixed_hash(mut self, hash: u64) -> Self {
        self.fixed_hash = Some(hash);
        self
    }

    /// Takes what is drawn at random, the hash keys and a new store's id, from a number: the same run twice.
    #[cfg(any(test, feature = "testing"))]
    #[doc(hidden)]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Opens the store in a directory, made if need be, after recovering what is there.
    ///
    /// # Errors
    ///
    /// `Locked` if it is open already, here or elsewhere; `Corrupt` with file and offset if what was durable is damaged
    /// (nothing is changed; see [`RecoveryMode::Salvage`]); `UnsupportedVersion`; `InvalidArgument` for settings out of
    /// range; `StorageFull` and other I/O errors.
    pub fn open(self, dir: impl AsRef<Path>) -> Result<Store> {
        let segment_len = self.check_ranges()?;
        let for_syncs = self.durability == Durability::Synced;
        let storage = FileMedia::open(dir.as_ref(), self.media, for_syncs)?;
        self.open_on(Arc::new(storage), segment_len, true)
    }

    /// A store that lives in memory only; nothing of it survives the process, so operations are `Buffered` unless they say
    /// otherwise.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` for settings out of range; `StorageFull` if memory can't be mapped.
    pub fn in_memory(mut self) -> Result<Store> {
        self.durability = Durability::Buffered;
        let segment_len = self.check_ranges()?;
        self.open_on(Arc::new(AnonMedia), segment_len, false)
    }

    /// Opens the store on a simulated disk.
    ///
    /// # Errors
    ///
    /// As [`open`](Builder::open).
    #[cfg(any(test, feature = "testing"))]
    pub fn open_simulated(self, disk: &crate::testing::SimDisk) -> Result<Store> {
        let segment_len = self.check_ranges()?;
        let storage = crate::journal::media::SimStorage::open(disk)?;
        self.open_on(Arc::new(storage), segment_len, true)
    }

    /// Whether a new store could be opened with these settings; nothing is opened.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` for settings out of range.
    pub fn check(&self) -> Result<()> {
        let segment_len = self.check_ranges()?;
        self.limits(segment_len)?;
        check_max_bytes(self.max_bytes, segment_len)
    }

    /// Checks what depends on nothing but the settings; returns the segments' length.
    fn check_ranges(&self) -> Result<u64> {
        let out_of_range = |message: String| Err(Error::new(ErrorKind::InvalidArgument, message));
        lease_ms(self.lease)?;
        check_retention(self.retention)?;
        let segment_len = self.segment_len.unwrap_or(32 * MIB);
        if !is_segment_len(segment_len) {
            return out_of_range(format!(
                "segment_size = {segment_len} is not a power of two from {SHORTEST_SEGMENT} to {LONGEST_SEGMENT}"
            ));
        }
        if !(1..=32 * KIB).contains(&self.max_key_len) {
            return out_of_range(format!("max_key_len = {} is not in 1 to {}", self.max_key_len, 32 * KIB));
        }
        if self.max_keys == Some(0) {
            return out_of_range("max_keys = 0 leaves no room for a key".to_owned());
        }
        Ok(segment_len)
    }

    fn open_on(self, storage: Arc<dyn Storage>, segment_len: u64, persistent: bool) -> Result<Store> {
        #[cfg(not(any(test, feature = "testing")))]
        let (hasher, new_store_id) = (KeyHasher::new(), None);
        #[cfg(any(test, feature = "testing"))]
        let (hasher, new_store_id) = (
            self.seed.map_or_else(KeyHasher::new, KeyHasher::seeded).fixed(self.fixed_hash),
            self.seed.map(|seed| u128::from(seed).to_le_bytes()),
        );
        let clock = self.clock.clone().unwrap_or_else(|| Arc::new(SystemClock::new()));
        let fork = ForkMark::new().map_err(|source| Error::io("map", Path::new("memory"), source))?;
        let plan = Plan {
            mode: self.recovery,
            segment_len,
            segment_len_is_set: self.segment_len.is_some(),
            max_bytes: self.max_bytes,
            persistent,
            shards: SHARDS,
            threads: self.recovery_threads(),
            hasher,
            index: self.index,
            new_store_id,
            now_ms: clock.now_ms(),
            clock_jump_limit: self.clock_jump_limit,
        };
        let Recovery { journal, hasher, shards, arena, report, newest_ms, keys, strays, spared } =
            recover(storage, &plan)?;
        let limits = self.limits(journal.segment_len())?;
        let engine = Engine {
            limits,
            clock: StoreClock::not_before(clock, newest_ms),
            hasher,
            shards,
            arena,
            journal,
            space: Mutex::new(Space::with_strays(strays)),
            auto_renewed: DashMap::new(),
            keys: AtomicU64::new(keys),
            report,
            closed: AtomicBool::new(false),
            fork,
            upkeep: crate::maintain::Upkeep::default(),
            checkpoints: Checkpoints::new(self.index && persistent, spared),
        };
        Store::start(engine, self.background)
    }

    /// One where the caller drives everything, and under a checker, which would not follow others.
    fn recovery_threads(&self) -> usize {
        if !self.background || cfg!(oncekey_shuttle) {
            return 1;
        }
        std::thread::available_parallelism().map_or(1, usize::from)
    }

    fn limits(&self, segment_len: u64) -> Result<Limits> {
        let room = (segment_len - SEGMENT_OVERHEAD) as usize - self.max_key_len - KEY_PREFIX;
        let max_record_len = self.max_record_len.unwrap_or_else(|| room.min(16 * MIB as usize));
        if max_record_len > room {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "max_record_len = {max_record_len} does not fit a segment of {segment_len} bytes: {room} at most"
                ),
            ));
        }
        Ok(Limits {
            durability: self.durability,
            retention: self.retention,
            lease_ms: lease_ms(self.lease)?,
            wait: self.wait,
            max_keys: self.max_keys,
            max_key_len: self.max_key_len,
            max_record_len,
        })
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("durability", &self.durability)
            .field("retention", &self.retention)
            .field("lease", &self.lease)
            .field("max_keys", &self.max_keys)
            .field("max_bytes", &self.max_bytes)
            .field("media", &self.media)
            .field("recovery", &self.recovery)
            .field("background", &self.background)
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}
