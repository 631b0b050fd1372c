//! The store: the only place that sequences table, wheel and journal.
//!
//! A reservation goes table first: its slot is inserted, with the LSN that its record will have, under the shard lock;
//! then the lock is released and the record is written and, if asked for, synced. A caller who meets a slot whose record
//! is not readable yet lets the lock go and waits for it. A verdict goes journal first: the slot is `completing` while
//! the record is written and synced, and only then becomes visible.
//!
//! Lock order: `space`, then one shard, then nothing. No shard lock is held across I/O, a sync, the making of a
//! segment, or code of the user.

use crate::builder::{Builder, Limits};
use crate::clock::Clock;
use crate::erase::Space;
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::Fingerprint;
use crate::journal::codec::{self, Kind, Meta};
use crate::journal::{Claim, Entry, Journal, SegmentMap, Unsynced};
use crate::key::{Durability, Key, Request, Retention};
use crate::maintain::{Maintained, Workers};
use crate::mmap::{Arena, ForkMark};
use crate::pending::Pending;
use crate::record::Record;
use crate::recovery::RecoveryReport;
use crate::reservation::Reservation;
use crate::shard::{Counts, Locked, Shard, Sought};
use crate::state::{self, Event, Phase, Transition};
use crate::stats::Stats;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::table::{Shards, Slot, Word, tag_of};
use dashmap::DashMap;
use std::fmt;
use std::hash::{BuildHasher, Hasher};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// The longest lease that can be asked for, 14 days; renew it for longer work.
pub const MAX_LEASE: Duration = Duration::from_secs(14 * 24 * 3600);

/// Remembers which operations were done, and what came of them.
///
/// Clones share one store. Reservations and records may outlive all of them.
///
/// ```
/// use oncekey::{Outcome, Request, Store};
///
/// # fn main() -> oncekey::Result<()> {
/// let store = Store::in_memory()?;
/// let request = Request::new("order-42").scope("acme").fingerprint_of(b"100 EUR");
/// match store.reserve(&request)? {
///     Outcome::Reserved(reservation) => {
///         // charge the card, then:
///         reservation.complete(b"charged")?;
///     }
///     other => panic!("{other:?}"),
/// }
/// match store.reserve(&request)? {
///     Outcome::Replay(record) => assert_eq!(record.bytes(), b"charged"),
///     other => panic!("{other:?}"),
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Store(Arc<Handle>);

/// What all clones of a store share. Its threads end with the last of them.
struct Handle {
    engine: Arc<Engine>,
    workers: Workers,
}

/// What a request for a key is answered with.
#[must_use = "a reservation that is dropped leaves its key interrupted"]
#[derive(Debug)]
pub enum Outcome {
    /// The key is the caller's: run the operation, then complete, fail or release.
    Reserved(Reservation),
    /// The key is the caller's, but an earlier owner vanished: find out first whether its side effect happened.
    Interrupted(Reservation),
    /// The operation was done; this is its answer.
    Replay(Record),
    /// Somebody else runs the operation.
    InFlight(Pending),
    /// The key was used for another payload.
    Mismatch(Mismatch),
}

/// A key that was used with another fingerprint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Mismatch {
    /// The fingerprint that the key stands for.
    pub stored: Fingerprint,
    /// The fingerprint that was asked with.
    pub asked: Fingerprint,
}

/// How a key stands; see [`Store::lookup`].
#[derive(Debug)]
#[non_exhaustive]
pub struct Lookup {
    /// The fingerprint that the key stands for.
    pub fingerprint: Fingerprint,
    /// How often the operation was begun.
    pub attempt: u32,
    /// Its state.
    pub standing: Standing,
}

/// The state of a key that was used.
#[derive(Debug)]
#[non_exhaustive]
pub enum Standing {
    /// Somebody runs the operation.
    Running {
        /// Number of the owner's reservation.
        fence: u64,
        /// What is left of its lease; `None` while the answer is being written.
        lease_left: Option<Duration>,
    },
    /// An owner vanished, and nobody came by since.
    Interrupted {
        /// Number of the reservation that was lost.
        fence: u64,
        /// What its owner left for the next.
        recovery_point: Option<Record>,
    },
    /// The operation was done.
    Completed(Record),
}

/// What an erasure found and overwrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Erasure {
    /// Keys that were taken out of the table.
    pub keys: u64,
    /// Records whose bytes were overwritten, older versions included.
    pub records: u64,
}

impl Store {
    /// Opens the store in a directory, made if need be, with all settings at their defaults.
    ///
    /// # Errors
    ///
    /// As [`Builder::open`].
    pub fn open(dir: impl AsRef<Path>) -> Result<Store> {
        Builder::new().open(dir)
    }

    /// A store that lives in memory only, with all settings at their defaults.
    ///
    /// # Errors
    ///
    /// If memory can't be mapped or a thread can't be started.
    pub fn in_memory() -> Result<Store> {
        Builder::new().in_memory()
    }

    /// Settings to open a store with.
    pub fn builder() -> Builder {
        Builder::new()
    }

    pub(crate) fn start(engine: Engine, background: bool) -> Result<Store> {
        let engine = Arc::new(engine);
        let workers = Workers::start(&engine, background)?;
        Ok(Store(Arc::new(Handle { engine, workers })))
    }

    pub(crate) fn engine(&self) -> &Arc<Engine> {
        &self.0.engine
    }

    /// Decides whether the operation was done, is being done, or is the caller's to do.
    ///
    /// # Errors
    ///
    /// `InvalidKey` and `InvalidArgument` for a request outside the limits; `Full` and `StorageFull` when there is no
    /// room for another key; `Corrupt` if the key's record is damaged; `Poisoned`, `Closed`, `Forked`. Then nothing was reserved. After `Poisoned` the key may
    /// come back as interrupted once the store is reopened.
    pub fn reserve(&self, request: &Request<'_>) -> Result<Outcome> {
        self.engine().reserve(request)
    }

    /// The stored answer of a key, whatever its fingerprint; `None` if there is none (yet, or any more).
    ///
    /// # Errors
    ///
    /// `InvalidKey`, `Closed`, `Forked`, and `Corrupt` if the key's record is damaged. `Poisoned` if the request is
    /// `Synced` and the answer can't be made durable any more.
    pub fn get(&self, request: &Request<'_>) -> Result<Option<Record>> {
        let found = self.lookup(request)?;
        Ok(found.and_then(|found| match found.standing {
            Standing::Completed(record) => Some(record),
            Standing::Running { .. } | Standing::Interrupted { .. } => None,
        }))
    }

    /// How a key stands, whatever its fingerprint, without a claim to it; `None` if nobody used it.
    ///
    /// It is not counted as a request.
    ///
    /// # Errors
    ///
    /// As [`get`](Store::get).
    pub fn lookup(&self, request: &Request<'_>) -> Result<Option<Lookup>> {
        self.engine().lookup(request)
    }

    /// What operations survive that don't say so themselves.
    pub fn durability(&self) -> Durability {
        self.engine().limits.durability
    }

    /// Forgets a key whatever its state, and overwrites its bytes wherever the journal holds them.
    ///
    /// Returns when the overwriting is synced. A running owner of the key gets `Fenced`. The whole journal is read, so
    /// this takes time in proportion to it; erase many keys of one tenant by [`erase_scope`](Store::erase_scope).
    ///
    /// # Errors
    ///
    /// `Full` or `StorageFull` if there is no room for a note of what is to be overwritten: nothing was changed, or, as the
    /// message says then, some is left to upkeep.
    ///
    /// `Busy` if a [`Record`] of the key was held for ten seconds, or one of the 1 in 64 of other records that share its
    /// handle count (a steady overlap of short-lived handles counts too): the key is gone, and upkeep overwrites the
    /// rest when the handle is dropped, or the next opening does. Call again to wait for it.
    ///
    /// `Poisoned` if the overwriting failed: the key is gone, and the next opening overwrites its bytes. `Corrupt` if a segment is
    /// damaged: nothing was changed. I/O errors, `Closed`, `Forked`.
    pub fn erase(&self, request: &Request<'_>) -> Result<Erasure> {
        self.engine().erase_key(request)
    }

    /// As [`erase`](Store::erase), for all keys of a scope.
    ///
    /// Reservations of that scope made after the call began are left alone.
    ///
    /// A crash before it returns leaves each key as it was, or gone.
    ///
    /// # Errors
    ///
    /// As [`erase`](Store::erase). If `Full` or `StorageFull` comes after the first thousand records, the keys are gone from
    /// the table, and upkeep overwrites the rest when there is room; a restart before that brings keys back. Call again.
    pub fn erase_scope<S: AsRef<[u8]> + ?Sized>(&self, scope: &S) -> Result<Erasure> {
        self.engine().erase_scope(scope.as_ref())
    }

    /// Makes everything acknowledged so far survive a power cut.
    ///
    /// # Errors
    ///
    /// `Poisoned` if a write or sync failed, now or before; `Closed`, `Forked`.
    pub fn sync(&self) -> Result<()> {
        self.engine().admit()?;
        self.engine().journal.promise_all()
    }

    /// Does up to `budget` steps of upkeep: expiry, sealing, removal and relocation of segments, a spare ahead.
    ///
    /// Stores with background threads do this by themselves. One step lets one key go, or moves one record, or looks at some.
    ///
    /// # Errors
    ///
    /// What the step at hand failed with: a full disk, `Poisoned`; `Corrupt`, once, for a segment that the store's index stood for when it
    /// was opened, and that is damaged. Nothing is lost by it; the next call goes on.
    pub fn maintain(&self, budget: usize) -> Result<Maintained> {
        self.engine().admit()?;
        self.engine().maintain(budget)
    }

    /// Reads every record back from storage and compares the table with it.
    ///
    /// Returns the number of records read.
    ///
    /// # Errors
    ///
    /// `Corrupt` with file and offset of the first damage found; I/O errors; `Poisoned` if a write failed before, since
    /// what that left is for recovery to say.
    pub fn verify(&self) -> Result<u64> {
        self.engine().admit()?;
        self.engine().verify()
    }

    /// Counts and sizes as of now; in a child after `fork` only those that no lock is needed for.
    pub fn stats(&self) -> Stats {
        self.engine().stats()
    }

    /// What recovery found when the store was opened.
    pub fn recovery(&self) -> &RecoveryReport {
        &self.engine().report
    }

    /// Syncs and seals the journal. The next opener gets in once all reservations, pendings and records are
    /// dropped.
    ///
    /// Every later call on a clone, and on reservations that are still out, gets `Closed`; keys of such reservations
    /// come back as interrupted.
    ///
    /// # Errors
    ///
    /// If the last sync fails: then what was acknowledged as `Buffered` may not survive a power cut.
    pub fn close(self) -> Result<()> {
        let engine = self.engine();
        engine.admit()?;
        self.0.workers.stop();
        engine.close()
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

/// The store without its threads.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) limits: Limits,
    pub(crate) clock: StoreClock,
    pub(crate) hasher: KeyHasher,
    pub(crate) shards: Shards<Shard>,
    /// The tables' memory.
    pub(crate) arena: Arc<Arena>,
    pub(crate) journal: Journal,
    /// Taken by who removes, relocates or overwrites records.
    pub(crate) space: Mutex<Space>,
    /// Fences whose lease doesn't run out while their guard lives, with the lease's length in ms.
    pub(crate) auto_renewed: DashMap<u64, u64>,
    /// Keys in all shards, counted only where there is a limit.
    pub(crate) keys: AtomicU64,
    pub(crate) report: RecoveryReport,
    pub(crate) closed: AtomicBool,
    pub(crate) fork: ForkMark,
    pub(crate) upkeep: crate::maintain::Upkeep,
    pub(crate) checkpoints: crate::checkpoint::Checkpoints,
}

/// The caller's clock, moved forward if the journal knows of a later time.
#[derive(Clone)]
pub(crate) struct StoreClock {
    clock: Arc<dyn Clock>,
    ahead_ms: u64,
}

impl StoreClock {
    pub(crate) fn not_before(clock: Arc<dyn Clock>, newest_ms: u64) -> Self {
        let ahead_ms = newest_ms.saturating_sub(clock.now_ms());
        StoreClock { clock, ahead_ms }
    }

    #[inline]
    pub(crate) fn now_ms(&self) -> u64 {
        self.clock.now_ms().saturating_add(self.ahead_ms).min(u64::MAX - 1)
    }
}

impl fmt::Debug for StoreClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreClock").field("ahead_ms", &self.ahead_ms).finish_non_exhaustive()
    }
}

/// Keyed hash of keys: random keys for each process, or those of the index that it opened, so that nobody can choose keys of
/// operations that collide.
#[derive(Clone, Debug)]
pub(crate) struct KeyHasher {
    keys: [u64; 4],
    state: ahash::RandomState,
    /// Replaces every hash, so that tests can make keys collide.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fixed: Option<u64>,
}

impl KeyHasher {
    pub(crate) fn new() -> Self {
        let random = ahash::RandomState::new();
        KeyHasher::with_keys(std::array::from_fn(|nth| random.hash_one(nth)))
    }

    fn with_keys(keys: [u64; 4]) -> Self {
        let [a, b, c, d] = keys;
        KeyHasher {
            keys,
            state: ahash::RandomState::with_seeds(a, b, c, d),
            #[cfg(any(test, feature = "testing"))]
            fixed: None,
        }
    }

    /// The same keys each time.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn seeded(seed: u64) -> Self {
        KeyHasher::with_keys([seed, 1, 2, 3])
    }

    /// Gives every key the same hash, if one is given.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn fixed(self, fixed: Option<u64>) -> Self {
        KeyHasher { fixed, ..self }
    }

    /// One that hashes as that of an index did, if this build does so on this processor.
    #[cfg_attr(not(any(test, feature = "testing")), expect(clippy::unused_self, reason = "tests choose hashes"))]
    pub(crate) fn like(&self, keys: [u64; 4], check: u64) -> Option<Self> {
        let hasher = KeyHasher::with_keys(keys);
        #[cfg(any(test, feature = "testing"))]
        let hasher = hasher.fixed(self.fixed);
        (hasher.check() == check).then_some(hasher)
    }

    pub(crate) fn keys(&self) -> [u64; 4] {
        self.keys
    }

    /// What becomes of keys that stand for all: of each length for which a hash may have a way of its own.
    pub(crate) fn check(&self) -> u64 {
        let bytes = [0x5a; 200];
        let keys = (1..bytes.len()).map(|len| Request::new(&bytes[..len]).scope(&bytes[len..]).key);
        keys.fold(0, |all, key| all.rotate_left(1) ^ self.hash(&key))
    }

    #[inline]
    pub(crate) fn hash(&self, key: &Key<'_>) -> u64 {
        #[cfg(any(test, feature = "testing"))]
        if let Some(fixed) = self.fixed {
            return fixed;
        }
        let mut hasher = self.state.build_hasher();
        key.hash_into(&mut hasher);
        hasher.finish()
    }
}

/// A request's settings, checked and with the store's defaults filled in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    pub(crate) lease_ms: u64,
    pub(crate) retention: Retention,
    pub(crate) sync: bool,
    pub(crate) auto_renew: bool,
}

/// An answer, and what has to be durable before it is given.
pub(crate) struct Answer {
    record: Record,
    unsynced: Option<Unsynced>,
}

/// The state that a reservation takes over.
struct Interrupted {
    word: Word,
    /// Length of the record.
    len: u64,
    point: Option<Record>,
}

impl Interrupted {
    fn new(shard: &Shard, at: usize, entry: &Entry<'_>) -> Self {
        let point = match entry.payload() {
            [] => None,
            [_, ..] => Some(entry.handle()),
        };
        Interrupted { word: shard.table.slot(at).word(), len: entry.len(), point }
    }

    fn point(&self) -> &[u8] {
        self.point.as_ref().map_or(&[], Record::bytes)
    }
}

impl Engine {
    /// The shard of a key's hash, locked, with the segments of now.
    #[inline]
    pub(crate) fn lock(&self, hash: u64) -> Locked<'_> {
        let mut shard = Locked::new(self.shards.of(hash));
        self.journal.refresh(&mut shard.segments);
        shard
    }

    /// The shard of a key with the place of the key's slot, whose record can be read; `None` if there is no slot.
    pub(crate) fn find(&self, hash: u64, key: &Key<'_>) -> Result<Option<(Locked<'_>, usize)>> {
        loop {
            let shard = self.lock(hash);
            let found = match shard.find_key(&self.journal, &shard.segments, tag_of(hash), key)? {
                Sought::Found(at, _) => Ok(at),
                Sought::Absent => return Ok(None),
                Sought::Unsettled(word) => Err(word),
            };
            match found {
                Ok(at) => return Ok(Some((shard, at))),
                Err(word) => {
                    drop(shard);
                    self.journal.settle(word.lsn())?;
                }
            }
        }
    }

    /// Whether the store may be used at all.
    #[inline]
    pub(crate) fn admit(&self) -> Result<()> {
        if self.closed.load(Ordering::Relaxed) {
            return Err(Error::closed());
        }
        if !self.fork.is_ours() {
            return Err(Error::new(
                ErrorKind::Forked,
                "the store was opened before a fork; a child process has to open its own after the parent closed it",
            ));
        }
        Ok(())
    }

    /// Whether there may be such a key, also one of a time with another limit.
    pub(crate) fn check_key(key: &Key<'_>) -> Result<()> {
        match key.key {
            [] => Err(Error::new(ErrorKind::InvalidKey, "the key is empty")),
            [_, ..] => Ok(()),
        }
    }

    fn check(&self, request: &Request<'_>) -> Result<()> {
        let key = &request.key;
        Engine::check_key(key)?;
        if key.len() > self.limits.max_key_len {
            return Err(Error::new(
                ErrorKind::InvalidKey,
                format!(
                    "scope, operation and key are {} bytes long together; max_key_len is {}",
                    key.len(),
                    self.limits.max_key_len
                ),
            ));
        }
        if let Some(lease) = request.lease {
            lease_ms(lease)?;
        }
        request.retention.map_or(Ok(()), check_retention)
    }

    fn terms(&self, request: &Request<'_>) -> Result<Terms> {
        Ok(Terms {
            lease_ms: request.lease.map_or(Ok(self.limits.lease_ms), lease_ms)?,
            retention: request.retention.unwrap_or(self.limits.retention),
            sync: self.syncs(request),
            auto_renew: request.auto_renew,
        })
    }

    #[inline]
    fn syncs(&self, request: &Request<'_>) -> bool {
        request.durability.unwrap_or(self.limits.durability) == Durability::Synced
    }

    /// Finds the key's state, and claims the key if it is free; all under one lock, which is let go before any I/O.
    pub(crate) fn reserve(self: &Arc<Self>, request: &Request<'_>) -> Result<Outcome> {
        self.admit()?;
        self.check(request)?;
        let hash = self.hasher.hash(&request.key);
        let tag = tag_of(hash);
        loop {
            let now_ms = self.clock.now_ms();
            let mut shard = self.lock(hash);
            let (at, entry) = match shard.find_key(&self.journal, &shard.segments, tag, &request.key)? {
                Sought::Found(at, entry) => (at, entry),
                Sought::Absent => {
                    if planted!(LockDropped) {
                        drop(shard);
                        self.clock.now_ms();
                        shard = self.lock(hash);
                    }
                    return self.reserve_vacant(shard, request, hash, now_ms);
                }
                Sought::Unsettled(word) => {
                    drop(shard);
                    self.journal.settle(word.lsn())?;
                    continue;
                }
            };
            let state = shard.state(shard.table.slot(at), entry.fence(), entry.deadline_ms());
            if let Transition::To(phase) = state::step(state, Event::Elapse(now_ms)) {
                self.elapse(&mut shard, at, tag, state.fence, phase, now_ms);
                continue;
            }
            let stored = entry.fingerprint();
            match state::step(state, Event::Reserve { matches: stored == request.fingerprint }) {
                Transition::Replay => {
                    let answer = self.answer(&shard, &entry, self.syncs(request));
                    shard.counts.replayed += 1;
                    return Ok(Outcome::Replay(self.give(shard, answer)?));
                }
                Transition::InFlight => {
                    shard.counts.in_flight += 1;
                    let left = Duration::from_millis(state.deadline_ms.saturating_sub(now_ms));
                    let lease_left = (state.deadline_ms != u64::MAX).then_some(left);
                    let pending = Pending::new(Arc::clone(self), hash, state.fence, lease_left, self.syncs(request));
                    return Ok(Outcome::InFlight(pending));
                }
                Transition::Mismatch => {
                    shard.counts.mismatched += 1;
                    return Ok(Outcome::Mismatch(Mismatch { stored, asked: request.fingerprint }));
                }
                Transition::To(Phase::Reserved) => {
                    let attempt = entry.attempt().saturating_add(1);
                    let over = Interrupted::new(&shard, at, &entry);
                    return self.reserve_over(shard, at, request, hash, now_ms, attempt, over);
                }
                Transition::To(_) | Transition::Stay | Transition::Fenced => {
                    unreachable!("a request for a key in state {state:?} has no such answer")
                }
            }
        }
    }

    /// Reserves a key that isn't in the table: its slot is inserted, and then its record written.
    #[inline(never)]
    fn reserve_vacant(
        self: &Arc<Self>,
        mut shard: Locked<'_>,
        request: &Request<'_>,
        hash: u64,
        now_ms: u64,
    ) -> Result<Outcome> {
        let terms = self.terms(request)?;
        self.check_room()?;
        self.count_key()?;
        let len = reservation_len(&request.key, 0)?;
        let Some(claim) = self.journal.claim_to_begin(len) else {
            self.uncount_keys(1);
            drop(shard);
            self.journal.turn_to_begin()?;
            return self.reserve(request);
        };
        shard.insert(tag_of(hash), Word::new(Phase::Reserved, claim.lsn()), now_ms.saturating_add(terms.lease_ms));
        shard.counts.reserved += 1;
        claim.add_live();
        drop(shard);
        self.write_reservation(request, &terms, hash, claim, now_ms, 1, None)
    }

    /// Reserves an interrupted key, by moving its slot on.
    #[cold]
    #[expect(clippy::too_many_arguments, reason = "a part of one operation")]
    fn reserve_over(
        self: &Arc<Self>,
        mut shard: Locked<'_>,
        at: usize,
        request: &Request<'_>,
        hash: u64,
        now_ms: u64,
        attempt: u32,
        over: Interrupted,
    ) -> Result<Outcome> {
        let terms = self.terms(request)?;
        self.check_room()?;
        let len = reservation_len(&request.key, over.point().len())?;
        let Some(claim) = self.journal.claim_to_begin(len) else {
            drop(shard);
            drop(over);
            self.journal.turn_to_begin()?;
            return self.reserve(request);
        };
        let deadline_ms = now_ms.saturating_add(terms.lease_ms);
        shard.advance(at, tag_of(hash), Word::new(Phase::Reserved, claim.lsn()), deadline_ms);
        shard.counts.taken_over += 1;
        claim.add_live();
        drop(shard);
        self.write_reservation(request, &terms, hash, claim, now_ms, attempt, Some(over))
    }

    /// Puts the record of a claimed reservation into the journal; on failure the key is as it was before.
    #[expect(clippy::too_many_arguments, reason = "the second half of one operation, after the lock was released")]
    fn write_reservation(
        self: &Arc<Self>,
        request: &Request<'_>,
        terms: &Terms,
        hash: u64,
        mut claim: Claim<'_>,
        now_ms: u64,
        attempt: u32,
        over: Option<Interrupted>,
    ) -> Result<Outcome> {
        let fence = claim.lsn();
        let meta = Meta {
            kind: Kind::Reserved,
            fence,
            written_ms: now_ms,
            deadline_ms: now_ms.saturating_add(terms.lease_ms),
            attempt,
            sequence: 0,
            fingerprint: request.fingerprint,
        };
        let key = &request.key;
        let point = over.as_ref().map_or(&[][..], Interrupted::point);
        if terms.auto_renew {
            self.auto_renewed.insert(fence, terms.lease_ms);
        }
        let parts = [&key.prefix()[..], key.scope, key.operation, key.key];
        if let Err(error) = claim.write(&meta, &parts, point, terms.sync) {
            self.auto_renewed.remove(&fence);
            self.undo_reservation(hash, fence, over.map(|over| over.word));
            return Err(error);
        }
        if let Some(over) = &over {
            // It is not read any more: an erasure may be overwriting it.
            self.journal.sub_live_bytes(&self.journal.segments(), over.word.lsn(), over.len);
        }
        let interrupted = over.is_some();
        let point = over.and_then(|over| over.point).map(|point| point.bytes().into());
        let reservation = Reservation::new(Arc::clone(self), hash, fence, attempt, *terms, point);
        Ok(if interrupted { Outcome::Interrupted(reservation) } else { Outcome::Reserved(reservation) })
    }

    #[cold]
    fn undo_reservation(&self, hash: u64, fence: u64, before: Option<Word>) {
        let tag = tag_of(hash);
        let mut shard = self.lock(hash);
        let held = [Phase::Reserved, Phase::Interrupted].map(|phase| Word::new(phase, fence));
        if let Some(at) = held.into_iter().find_map(|word| shard.find_word(tag, word)) {
            match before {
                Some(word) => {
                    self.sub_live(fence);
                    shard.advance(at, tag, word, u64::MAX);
                }
                None => self.remove_slot(&mut shard, at),
            }
        }
        shard.wake(fence);
    }

    /// Ends what the time says is over, a lease or a retention. Look at the key again then.
    #[cold]
    pub(crate) fn elapse(&self, shard: &mut Locked<'_>, at: usize, tag: u32, fence: u64, to: Phase, now_ms: u64) {
        if to == Phase::Interrupted {
            self.lapse(shard, at, tag, fence, now_ms);
        } else {
            shard.counts.expired += 1;
            self.remove_slot(shard, at);
        }
    }

    /// Takes a slot out of the table, and its record out of its segment's count.
    pub(crate) fn remove_slot(&self, shard: &mut Shard, at: usize) {
        let lsn = shard.table.slot(at).word().lsn();
        shard.remove(at);
        self.sub_live(lsn);
        self.uncount_removed();
    }

    /// Takes a key that was removed from the table out of the count.
    pub(crate) fn uncount_removed(&self) {
        if !planted!(KeyNotUncounted) {
            self.uncount_keys(1);
        }
    }

    pub(crate) fn sub_live(&self, lsn: u64) {
        if let Some(segment) = self.journal.segments().get(self.journal.number_of(lsn)) {
            segment.sub_live(lsn);
        }
    }

    /// Whether another reservation may be granted at all.
    #[inline]
    fn check_room(&self) -> Result<()> {
        self.journal.poison.check()?;
        if self.journal.has_room() { Ok(()) } else { Err(self.journal.full()) }
    }

    fn count_key(&self) -> Result<()> {
        let Some(max_keys) = self.limits.max_keys else { return Ok(()) };
        // Relaxed: a count, which orders nothing.
        if self.keys.fetch_add(1, Ordering::Relaxed) >= max_keys {
            self.uncount_keys(1);
            return Err(Error::new(
                ErrorKind::Full,
                format!("max_keys = {max_keys} keys are held; wait for some to expire, or erase some"),
            ));
        }
        Ok(())
    }

    pub(crate) fn uncount_keys(&self, count: u64) {
        if self.limits.max_keys.is_some() {
            self.keys.fetch_sub(count, Ordering::Relaxed);
        }
    }

    /// An answer that was looked up, to be given; with `sync`, once it survives a power cut.
    #[inline(always)]
    pub(crate) fn answer(&self, shard: &Shard, entry: &Entry<'_>, sync: bool) -> Answer {
        let unsynced = if sync { self.journal.unsynced(&shard.segments, entry) } else { None };
        Answer { record: entry.handle(), unsynced }
    }

    #[inline(always)]
    pub(crate) fn give(&self, shard: Locked<'_>, answer: Answer) -> Result<Record> {
        drop(shard);
        if let Some(unsynced) = answer.unsynced {
            self.journal.make_durable(&unsynced)?;
        }
        Ok(answer.record)
    }

    pub(crate) fn lookup(&self, request: &Request<'_>) -> Result<Option<Lookup>> {
        self.admit()?;
        Engine::check_key(&request.key)?;
        let hash = self.hasher.hash(&request.key);
        let tag = tag_of(hash);
        loop {
            let now_ms = if planted!(ExpiredReturned) { 0 } else { self.clock.now_ms() };
            let Some((mut shard, at)) = self.find(hash, &request.key)? else { return Ok(None) };
            let slot = shard.table.slot(at);
            let entry = self.journal.entry(&shard.segments, slot.word().lsn())?;
            let state = shard.state(slot, entry.fence(), entry.deadline_ms());
            if let Transition::To(phase) = state::step(state, Event::Elapse(now_ms)) {
                self.elapse(&mut shard, at, tag, state.fence, phase, now_ms);
                continue;
            }
            let (fingerprint, attempt, fence) = (entry.fingerprint(), entry.attempt(), entry.fence());
            let standing = match state.phase {
                Phase::Completed => {
                    let answer = self.answer(&shard, &entry, self.syncs(request));
                    Standing::Completed(self.give(shard, answer)?)
                }
                Phase::Reserved | Phase::Completing => {
                    let left = Duration::from_millis(state.deadline_ms.saturating_sub(now_ms));
                    Standing::Running { fence, lease_left: (state.deadline_ms != u64::MAX).then_some(left) }
                }
                Phase::Interrupted => {
                    Standing::Interrupted { fence, recovery_point: Interrupted::new(&shard, at, &entry).point }
                }
                Phase::Vacant | Phase::Released => return Ok(None),
            };
            return Ok(Some(Lookup { fingerprint, attempt, standing }));
        }
    }

    fn verify(&self) -> Result<u64> {
        self.journal.poison.check()?;
        // Nothing is removed, relocated or overwritten meanwhile.
        let _space = self.space.lock();
        self.check_all_segments()?;
        let records = crate::recovery::verify(&self.journal)?;
        for shard in self.shards.iter() {
            let map = self.journal.segments();
            for (_, slot) in shard.table.iter() {
                self.verify_slot(&map, slot)?;
            }
        }
        Ok(records)
    }

    fn verify_slot(&self, map: &SegmentMap, slot: &Slot) -> Result<()> {
        let word = slot.word();
        if word.phase() == Phase::Reserved && !self.journal.is_published(map, word.lsn()) {
            return Ok(());
        }
        let record = self.journal.entry(map, word.lsn())?;
        let fits = match word.phase() {
            Phase::Reserved | Phase::Completing | Phase::Interrupted => {
                matches!(record.kind(), Kind::Reserved | Kind::Point)
            }
            Phase::Completed => matches!(record.kind(), Kind::Completed | Kind::Failed),
            Phase::Vacant | Phase::Released => false,
        };
        if fits {
            return Ok(());
        }
        let (path, offset) = (self.journal.path_of(word.lsn()), self.journal.offset_of(word.lsn()));
        let message = format!("the table has a {:?} key here, the journal a {:?} record", word.phase(), record.kind());
        Err(Error::corrupt(&path, offset, message))
    }

    fn close(&self) -> Result<()> {
        self.closed.store(true, Ordering::SeqCst);
        for shard in self.shards.iter().filter(|_| !planted!(CloseWakesNobody)) {
            Locked::new(shard).wake_all();
        }
        let space = self.space.lock();
        self.journal.sync_names()?;
        self.journal.seal_all()?;
        // Nothing depends on it but how long the next opening takes.
        self.write_last_index(&space).ok();
        Ok(())
    }

    fn stats(&self) -> Stats {
        let mut counts = Counts::default();
        let mut keys = 0;
        // In a child a shard may have been locked by a thread that isn't there.
        let shards = self.fork.is_ours().then(|| self.shards.iter());
        for shard in shards.into_iter().flatten() {
            counts.add(&shard.counts);
            keys += shard.table.len() as u64;
        }
        let segments = self.journal.segments();
        Stats {
            keys,
            reserved: counts.reserved,
            taken_over: counts.taken_over,
            replayed: counts.replayed,
            in_flight: counts.in_flight,
            mismatched: counts.mismatched,
            completed: counts.completed,
            failed: counts.failed,
            released: counts.released,
            interrupted: counts.interrupted,
            expired: counts.expired,
            erased: counts.erased,
            fenced: counts.fenced,
            syncs: self.journal.syncs(),
            segments: segments.iter().count() as u64,
            journal_bytes: segments.iter().map(|segment| segment.blob().allocated().unwrap_or(segment.len())).sum(),
            unchecked_segments: segments.iter().filter(|segment| !segment.is_checked()).count() as u64,
            damaged_segments: segments.iter().filter(|segment| segment.damage().is_some()).count() as u64,
            upkeep_failures: self.upkeep.failures(),
            is_full: self.journal.is_out_of_disk() || !self.journal.has_room(),
            is_poisoned: self.journal.poison.is_set(),
        }
    }
}

fn reservation_len(key: &Key<'_>, point_len: usize) -> Result<u64> {
    codec::record_len(key.stored_len(), point_len)
        .ok_or_else(|| Error::new(ErrorKind::InvalidKey, "the key is longer than the format allows"))
}

/// A lease in ms, if it is in range.
pub(crate) fn lease_ms(lease: Duration) -> Result<u64> {
    if lease < Duration::from_millis(1) || lease > MAX_LEASE {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("a lease of {lease:?} is out of range: 1 ms to {} days", MAX_LEASE.as_secs() / 86_400),
        ));
    }
    Ok(lease.as_millis() as u64)
}

pub(crate) fn check_retention(retention: Retention) -> Result<()> {
    match retention {
        Retention::For(time) if time < Duration::from_millis(1) => Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("a retention of {time:?} is too short: 1 ms is the least; release the key to keep no answer"),
        )),
        Retention::For(_) | Retention::Forever => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use crate::error::ErrorKind;

    #[test]
    fn verification_notices_a_slot_that_points_to_a_record_of_another_kind() {
        let store = Store::builder().background(false).in_memory().unwrap();
        let request = Request::new("a");
        let Outcome::Reserved(owner) = store.reserve(&request).unwrap() else { panic!("nobody was before") };
        drop(owner.complete(b"x").unwrap());
        assert_eq!(store.verify().unwrap(), 2);
        let engine = store.engine();
        let hash = engine.hasher.hash(&request.key);
        let Some((mut shard, at)) = engine.find(hash, &request.key).unwrap() else { panic!("the key is there") };
        let word = shard.table.slot(at).word();
        shard.advance(at, tag_of(hash), word.with(Phase::Interrupted), u64::MAX);
        drop(shard);
        assert_eq!(store.verify().unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn no_shard_keeps_a_segment_that_was_removed() {
        let clock = Arc::new(ManualClock::new(1_000_000));
        let builder = Store::builder().background(false).segment_size(64 * 1024).clock(Arc::clone(&clock));
        let store = builder.retention(Retention::For(Duration::from_secs(1))).in_memory().unwrap();
        for key in 0..2000u32 {
            let reserved = store.reserve(&Request::new(&key.to_le_bytes())).unwrap();
            let Outcome::Reserved(owner) = reserved else { panic!("nobody was before") };
            drop(owner.complete([7; 100]).unwrap());
        }
        let journal = &store.engine().journal;
        let before: Vec<_> = journal.segments().iter().map(Arc::downgrade).collect();
        clock.advance(Duration::from_secs(2));
        while store.maintain(10_000).unwrap().has_more {}
        let left: Vec<_> = before.iter().filter_map(std::sync::Weak::upgrade).collect();
        assert!(left.len() < before.len());
        assert!(left.iter().all(|segment| journal.segments().get(segment.number()).is_some()));
    }
}
