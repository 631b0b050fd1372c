//! A store on a simulated disk, next to a model that knows what it may answer.
//!
//! The model keeps for each key the states that it may be in. Most of the time that is one. After a crash it is several:
//! of the records written since the last opening, those with a promise to survive this kind of crash did, and any of
//! the others may have. The next look at the key narrows them down; an answer that fits none of them is a bug.
//!
//! The same code runs in the simulation, under proptest and under the fuzzer, so an operation is decoded from a few bytes.

use fastrand::Rng;
use oncekey::testing::{DiskOp, SimDisk};
use oncekey::{
    Builder, Clock, Durability, Error, ErrorKind, Fingerprint, MAX_LEASE, ManualClock, Mismatch, Outcome, Pending,
    Record, RecoveryMode, Request, Reservation, Retention, Store, Wait,
};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, UNIX_EPOCH};

/// Bytes that one operation is decoded from.
pub const OP_LEN: usize = 6;

const KEYS: u8 = 16;
const SEGMENT_LEN: u64 = 64 * 1024;
const START_MS: u64 = 1_767_225_600_000;
/// Times that the files of one closed store are damaged, each time as they were.
const DAMAGES: usize = 4;
const SCOPES: [&str; 3] = ["", "red", "blue"];
const HELD_RECORDS: usize = 8;
/// The last but one ends later than time does.
const KEPT_MS: [Option<u64>; 7] =
    [Some(60_000), Some(5), Some(500), Some(9_000), Some(3_600_000), Some(u64::MAX), None];
/// Limits that restarts choose from, keys and segments; none most of the time.
const LIMITS: [(Option<u64>, Option<u64>); 8] = [
    (None, None),
    (None, None),
    (None, None),
    (Some(3), None),
    (Some(9), None),
    (None, Some(LEAST_SEGMENTS)),
    (None, Some(30)),
    (Some(12), Some(20)),
];
/// One in use a stream, spares, and what a restart sealed before it was full.
const MOST_SEGMENTS: u64 = 40;
/// Segments beyond `max_bytes` that upkeep may take.
const ROOM_FOR_UPKEEP: u64 = 2;
/// What `max_bytes` has to allow at least, in segments.
const LEAST_SEGMENTS: u64 = 16;

/// One step of a run.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    Reserve {
        key: u8,
        payload: u8,
        lease_ms: u64,
        kept_ms: Option<u64>,
        synced: bool,
        auto_renew: bool,
    },
    Complete {
        guard: u8,
        len: usize,
    },
    Fail {
        guard: u8,
        len: usize,
    },
    Release {
        guard: u8,
    },
    Renew {
        guard: u8,
    },
    Point {
        guard: u8,
        len: usize,
    },
    Drop {
        guard: u8,
    },
    Get {
        key: u8,
    },
    Poll {
        waiter: u8,
    },
    Erase {
        key: u8,
    },
    EraseScope {
        scope: u8,
    },
    Advance {
        ms: u64,
    },
    Maintain {
        budget: usize,
    },
    Sync,
    Verify,
    Break {
        op: DiskOp,
        after: u64,
    },
    /// The disk takes so many more segments, and no more than that.
    Tighten {
        segments: u64,
    },
    Loosen,
    /// Closed, damaged at rest, and opened; then the undamaged files are opened.
    Rot {
        seed: u64,
    },
    Restart {
        how: Restart,
        seed: u64,
        failing: Option<(DiskOp, u64)>,
    },
}

/// How a store ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// Closed, and the same disk opened again.
    Close,
    /// Closed; then the power fails.
    CloseAndCut,
    /// Killed: all that was written is there.
    Death,
    /// The power fails.
    Cut,
}

impl Op {
    /// Every input is some operation.
    pub fn decode(bytes: [u8; OP_LEN]) -> Op {
        let [op, a, b, c, d, e] = bytes;
        let lens = [0, 1, 12, 25, 40, 70, 200, 900, 3_000, 9_000, 20_000, 40_000];
        let len = if b == 255 { 60_000 } else { lens[usize::from(b) % lens.len()] };
        match op {
            0..=79 => Op::Reserve {
                key: a % KEYS,
                payload: [1, 1, 1, 1, 1, 1, 2, 0][usize::from(b) % 8],
                lease_ms: [30_000, 1, 20, 1_000][usize::from(c) % 4],
                kept_ms: KEPT_MS[usize::from(d) % KEPT_MS.len()],
                synced: e % 4 == 1,
                auto_renew: e % 16 == 2,
            },
            80..=119 => Op::Complete { guard: a, len },
            120..=127 => Op::Fail { guard: a, len },
            128..=139 => Op::Release { guard: a },
            140..=147 => Op::Renew { guard: a },
            148..=157 => Op::Point { guard: a, len: len.max(1) },
            158..=167 => Op::Drop { guard: a },
            168..=177 => Op::Get { key: a % KEYS },
            178..=183 => Op::Poll { waiter: a },
            184..=189 => Op::Erase { key: a % KEYS },
            190..=191 => Op::EraseScope { scope: a % SCOPES.len() as u8 },
            192..=207 => Op::Advance { ms: [1, 5, 50, 400, 1_000, 10_000, 100_000, 36_000_000][usize::from(a) % 8] },
            208..=223 => Op::Maintain { budget: [usize::MAX, usize::MAX, 0, 1, 7, 40][usize::from(a) % 6] },
            224..=229 => Op::Sync,
            230..=232 => Op::Verify,
            233..=237 => Op::Break { op: disk_op(a), after: u64::from(b % 12) },
            238..=239 => match a % 8 {
                7 => Op::Loosen,
                segments => Op::Tighten { segments: u64::from(segments % 4) },
            },
            240..=241 => Op::Rot { seed: u64::from_le_bytes([a, b, c, d, e, 0, 0, 0]) },
            242..=255 => Op::Restart {
                how: [Restart::Cut, Restart::Death, Restart::Close, Restart::CloseAndCut][usize::from(a) % 4],
                seed: u64::from(b) << 8 | u64::from(c),
                failing: (d % 3 > 0).then(|| (disk_op(e), u64::from(e / 8 % 8))),
            },
        }
    }
}

fn disk_op(choice: u8) -> DiskOp {
    use DiskOp::*;
    [Append, Sync, Overwrite, Create, SyncNames, Remove, Sync, Append][usize::from(choice) % 8]
}

/// What a key may be.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Vacant,
    Reserved { claim: Claim, lease_until_ms: u64, auto_renew: bool },
    Interrupted { claim: Claim },
    Completed(Answer),
}

/// Who has the key, or had it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Claim {
    /// `None` if the call that made it failed, so that nobody was told.
    fence: Option<u64>,
    fingerprint: Fingerprint,
    attempt: u32,
    point: Option<Vec<u8>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Answer {
    fence: Option<u64>,
    fingerprint: Fingerprint,
    attempt: u32,
    bytes: Vec<u8>,
    is_failure: bool,
    written_ms: u64,
    until_ms: u64,
}

impl State {
    /// The state when somebody looks at it now.
    fn at(&self, now_ms: u64) -> State {
        match self {
            State::Reserved { claim, lease_until_ms, auto_renew: false } if *lease_until_ms <= now_ms => {
                State::Interrupted { claim: claim.clone() }
            }
            State::Completed(answer) if answer.until_ms <= now_ms => State::Vacant,
            State::Vacant | State::Reserved { .. } | State::Interrupted { .. } | State::Completed(_) => self.clone(),
        }
    }

    /// What is left of it when its process is gone.
    fn without_owner(self) -> State {
        match self {
            State::Reserved { claim, .. } => State::Interrupted { claim },
            State::Vacant | State::Interrupted { .. } | State::Completed(_) => self,
        }
    }

    fn is_owned_by(&self, guard_fence: u64) -> bool {
        self.claim().is_some_and(|claim| claim.fence == Some(guard_fence))
    }

    fn claim(&self) -> Option<&Claim> {
        match self {
            State::Reserved { claim, .. } | State::Interrupted { claim } => Some(claim),
            State::Vacant | State::Completed(_) => None,
        }
    }

    fn fingerprint(&self) -> Option<Fingerprint> {
        match self {
            State::Vacant => None,
            State::Reserved { claim, .. } | State::Interrupted { claim } => Some(claim.fingerprint),
            State::Completed(answer) => Some(answer.fingerprint),
        }
    }

    fn is_answered_by(&self, record: &Record) -> bool {
        let State::Completed(answer) = self else { return false };
        let until = (answer.until_ms != u64::MAX).then(|| UNIX_EPOCH + Duration::from_millis(answer.until_ms));
        record.bytes() == answer.bytes
            && record.is_failure() == answer.is_failure
            && record.attempt() == answer.attempt
            && record.completed_at() == UNIX_EPOCH + Duration::from_millis(answer.written_ms)
            && record.expires_at() == until
    }
}

/// A record written since the last opening, as the state that it stands for.
#[derive(Clone, Debug)]
struct Written {
    state: State,
    /// Promised to survive a power cut.
    synced: bool,
    /// Promised at all: its call returned without an error.
    certain: bool,
}

#[derive(Clone, Debug, Default)]
struct KeyModel {
    /// What it may be now.
    states: Vec<State>,
    /// What the last opening may have found.
    bases: Vec<State>,
    log: Vec<Written>,
    /// Answers that are over, and come back if a restart finds the clock set back and nothing newer of the key is left.
    over: Vec<State>,
    /// Erased, and not asked for since.
    is_erased: bool,
}

impl KeyModel {
    fn new() -> Self {
        KeyModel { states: vec![State::Vacant], bases: vec![State::Vacant], ..KeyModel::default() }
    }

    /// Keeps the states that an answer of the store fits to.
    #[track_caller]
    fn narrow(&mut self, now_ms: u64, seen: &str, fits: impl Fn(&State) -> bool) {
        let before = std::mem::take(&mut self.states);
        self.states = before.iter().filter(|state| fits(&state.at(now_ms))).cloned().collect();
        assert!(!self.states.is_empty(), "{seen}, but at {now_ms} the key can only be {before:#?}");
        if self.log.is_empty() {
            self.bases.clone_from(&self.states);
        }
    }

    fn wrote(&mut self, state: State, synced: bool) {
        self.log.push(Written { state: state.clone(), synced, certain: true });
        self.states = vec![state];
    }

    /// A caller was given the answer, with the promise that no power cut takes it.
    fn is_synced(&mut self) {
        for written in &mut self.log {
            written.synced |= self.states.contains(&written.state);
        }
    }

    fn may_have_written(&mut self, state: State) {
        self.log.push(Written { state, synced: false, certain: false });
    }

    /// What is over is dropped.
    fn forget(&mut self, now_ms: u64) {
        for state in &mut self.states {
            let left = state.at(now_ms);
            if left == State::Vacant && *state != left && !self.over.contains(state) {
                self.over.push(state.clone());
            }
            *state = left;
        }
    }

    /// `latest_ms` is the highest time that there was: by then an answer may have been forgotten that the clock, set back,
    /// would still have kept.
    fn crash(&mut self, power_cut: bool, latest_ms: u64) {
        let survives = |written: &Written| written.certain && (written.synced || !power_cut);
        let floor = self.log.iter().rposition(survives);
        let mut found = match floor {
            Some(at) => self.log[at..].iter().map(|written| written.state.clone()).collect(),
            None => {
                let maybe = self.log.iter().map(|written| written.state.clone());
                self.bases.iter().cloned().chain(maybe).collect::<Vec<_>>()
            }
        };
        found = found.into_iter().map(State::without_owner).collect();
        let is_over = |state: &&State| matches!(state, State::Completed(_)) && state.at(latest_ms) == State::Vacant;
        let over = self.bases.iter().chain(self.log.iter().map(|written| &written.state)).filter(is_over);
        self.over.extend(over.filter(|state| !self.over.contains(state)).cloned().collect::<Vec<_>>());
        if found.iter().any(|state| is_over(&state)) {
            found.push(State::Vacant);
        }
        if found.contains(&State::Vacant) {
            found.extend(self.over.iter().cloned());
        }
        found.dedup();
        self.states = found.clone();
        self.bases = found;
        self.log.clear();
    }
}

struct Guard {
    reservation: Reservation,
    key: u8,
    lease_ms: u64,
    kept_ms: Option<u64>,
    synced: bool,
    auto_renew: bool,
}

/// A caller who waits for the end of a reservation.
struct Waiter {
    key: u8,
    fence: u64,
    synced: bool,
    wait: Pin<Box<dyn Future<Output = Result<Wait, Error>>>>,
    bell: Arc<Bell>,
}

/// Whether the waker was called since it was last looked at.
#[derive(Default)]
struct Bell(AtomicBool);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Waiter {
    fn new(key: u8, pending: Pending, synced: bool) -> Waiter {
        let fence = pending.fence();
        Waiter { key, fence, synced, wait: Box::pin(pending.wait_async()), bell: Arc::default() }
    }

    /// With another waker each time, of which the newest has to be called.
    fn look(&mut self) -> Poll<Result<Wait, Error>> {
        self.bell = Arc::default();
        let waker = Waker::from(Arc::clone(&self.bell));
        self.wait.as_mut().poll(&mut Context::from_waker(&waker))
    }

    fn was_woken(&self) -> bool {
        self.bell.0.swap(false, Ordering::SeqCst)
    }
}

/// The store and its model.
pub struct World {
    pub disk: SimDisk,
    clock: Arc<ManualClock>,
    store: Option<Store>,
    /// The store's time: the clock's, but that it goes on from the newest record if the clock was behind that.
    now_ms: u64,
    latest_ms: u64,
    collide: bool,
    /// Whether the next store to be opened uses an index.
    is_indexed: bool,
    keys: Vec<KeyModel>,
    guards: Vec<Guard>,
    waiters: Vec<Waiter>,
    records: Vec<(Record, Vec<u8>)>,
    newest_fence: u64,
    serial: u64,
    /// A failure was asked for and may strike.
    is_armed: bool,
    /// The disk may be full.
    is_tight: bool,
    max_keys: Option<u64>,
    max_bytes: Option<u64>,
    /// What the store had before it was held to its limit, as far as it is not yet below that.
    found_bytes: u64,
    pub tally: Tally,
}

/// What a run went through.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub steps: u64,
    /// Disks opened as a power cut left them.
    pub power_cuts: u64,
    /// Disks opened as a dead process left them.
    pub deaths: u64,
    /// Recoveries that were cut short, each followed by another.
    pub cut_recoveries: u64,
    /// Openings that an index made shorter.
    pub indexed: u64,
    /// Disks opened after damage at rest, and how many of them were refused.
    pub damaged: u64,
    pub refused: u64,
}

/// Half of the keys differ in their name, and half of them in their operation only.
fn name(key: u8) -> String {
    if key % 4 < 2 { needle(key) + "in-a-haystack" } else { "haystack".to_owned() }
}

fn scope(key: u8) -> &'static str {
    SCOPES[usize::from(key) % SCOPES.len()]
}

fn operation(key: u8) -> String {
    match key % 4 {
        0 => String::new(),
        1 => "charge".to_owned(),
        _ => needle(key) + "charge",
    }
}

/// What only this key's records hold.
fn needle(key: u8) -> String {
    format!("needle-{key:02}-")
}

fn fingerprint(payload: u8) -> Fingerprint {
    if payload == 0 { Fingerprint::NONE } else { Fingerprint::of(&[payload]) }
}

fn leaves_a_trace(disk: &SimDisk, key: u8) -> bool {
    let needle = needle(key);
    let is_in = |bytes: Vec<u8>| memchr::memmem::find(&bytes, needle.as_bytes()).is_some();
    disk.files().iter().any(|(file, _)| disk.contents(file).is_some_and(is_in))
}

fn segment_bytes(disk: &SimDisk) -> u64 {
    disk.files().iter().filter(|(name, _)| name.ends_with(".seg")).map(|(_, len)| len).sum()
}

impl World {
    /// A new store; `collide` gives all keys the same hash.
    pub fn new(collide: bool) -> World {
        let mut world = World {
            disk: SimDisk::new(),
            clock: Arc::new(ManualClock::new(START_MS)),
            store: None,
            now_ms: START_MS,
            latest_ms: START_MS,
            collide,
            is_indexed: true,
            keys: vec![KeyModel::new(); usize::from(KEYS)],
            guards: Vec::new(),
            waiters: Vec::new(),
            records: Vec::new(),
            newest_fence: 0,
            serial: 0,
            is_armed: false,
            is_tight: false,
            max_keys: None,
            max_bytes: None,
            found_bytes: 0,
            tally: Tally::default(),
        };
        world.store = Some(world.open().expect("a new store opens"));
        world
    }

    /// Carries out the operations, one after the other, and then closes and reopens the store.
    pub fn run(collide: bool, ops: &[Op]) -> Tally {
        let mut world = World::new(collide);
        for op in ops {
            world.step(*op);
        }
        world.step(Op::Restart { how: Restart::Death, seed: 0, failing: None });
        world.step(Op::Verify);
        world.step(Op::Restart { how: Restart::CloseAndCut, seed: 3, failing: None });
        for key in 0..KEYS {
            world.step(Op::Get { key });
            let lease_ms = 1_000;
            world.step(Op::Reserve { key, payload: 1, lease_ms, kept_ms: None, synced: false, auto_renew: false });
        }
        world.tally
    }

    /// Carries out one operation, and compares.
    pub fn step(&mut self, op: Op) {
        let (guards, waiters) = (self.guards.len(), self.waiters.len());
        self.tally.steps += 1;
        match op {
            Op::Reserve { key, payload, lease_ms, kept_ms, synced, auto_renew } => {
                self.reserve(key, payload, lease_ms, kept_ms, synced, auto_renew);
            }
            Op::Complete { guard, len } if guards > 0 => self.answer(usize::from(guard) % guards, len, false),
            Op::Fail { guard, len } if guards > 0 => self.answer(usize::from(guard) % guards, len, true),
            Op::Release { guard } if guards > 0 => self.release(usize::from(guard) % guards),
            Op::Renew { guard } if guards > 0 => self.renew(usize::from(guard) % guards, guard >= 128),
            Op::Point { guard, len } if guards > 0 => self.point(usize::from(guard) % guards, len),
            Op::Drop { guard } if guards > 0 => {
                let guard = self.guards.swap_remove(usize::from(guard) % guards);
                self.drop_guard(guard);
            }
            Op::Complete { .. }
            | Op::Fail { .. }
            | Op::Release { .. }
            | Op::Renew { .. }
            | Op::Point { .. }
            | Op::Drop { .. } => {}
            Op::Get { key } => self.get(key),
            Op::Poll { waiter } => {
                if waiters > 0 {
                    self.poll(usize::from(waiter) % waiters);
                }
            }
            Op::Erase { key } => self.erase(key),
            Op::EraseScope { scope } => self.erase_scope(scope),
            Op::Advance { ms } => {
                self.clock.advance(Duration::from_millis(ms));
                self.now_ms += ms;
                self.latest_ms = self.latest_ms.max(self.now_ms);
            }
            Op::Maintain { budget } => self.maintain(budget),
            Op::Sync => match self.store().sync() {
                Ok(()) => {
                    assert!(!self.is_poisoned(), "a poisoned store synced");
                    self.all_is_synced();
                }
                Err(error) => self.expect_failure(&error),
            },
            Op::Verify => {
                if !self.is_poisoned() {
                    self.store().verify().expect("what the store wrote reads back");
                }
            }
            Op::Break { op, after } => {
                self.disk.fail(op, after, io::ErrorKind::Other);
                self.is_armed = true;
            }
            Op::Tighten { segments } => {
                let used: u64 = self.disk.files().iter().map(|(_, len)| len).sum();
                self.disk.set_capacity(Some(used + segments * SEGMENT_LEN));
                self.is_tight = true;
            }
            Op::Loosen => {
                self.disk.set_capacity(None);
                self.is_tight = false;
            }
            Op::Rot { seed } => {
                let ends_well = !self.is_armed;
                self.stop(Restart::Close, seed);
                let files = self.disk.after_process_death();
                self.start(false, seed, None);
                let mut random = Rng::with_seed(seed);
                // With a clock behind the newest record its loss would be time lost.
                let clock_ms = self.clock.now_ms();
                self.clock.set(self.now_ms);
                for _ in 0..if ends_well { DAMAGES } else { 0 } {
                    self.rot(&files.after_process_death(), &mut random);
                }
                self.clock.set(clock_ms);
            }
            Op::Restart { how, seed, failing } => self.restart(how, seed, failing),
        }
        for (record, bytes) in &self.records {
            assert_eq!(record.bytes(), bytes, "the bytes of a record changed while it was held");
        }
        self.check_limit();
    }

    pub fn store(&self) -> &Store {
        self.store.as_ref().expect("the store is open between operations")
    }

    fn is_poisoned(&self) -> bool {
        self.store().stats().is_poisoned
    }

    /// An error that only a failing disk explains.
    #[track_caller]
    fn expect_failure(&self, error: &Error) {
        let is_explained = match error.kind() {
            ErrorKind::Io | ErrorKind::Poisoned => self.is_armed,
            ErrorKind::StorageFull => self.is_tight,
            ErrorKind::Full => self.max_bytes.is_some(),
            _ => false,
        };
        assert!(is_explained, "no disk failed, and yet: {error:?}");
    }

    /// An answer or a recovery point, different from all others.
    fn payload(&mut self, key: u8, len: usize) -> Vec<u8> {
        self.serial += 1;
        let mut bytes = format!("{}{:06}-", needle(key), self.serial).into_bytes();
        bytes.resize(bytes.len().max(len), self.serial as u8);
        bytes.truncate(len);
        bytes
    }

    fn open(&self) -> Result<Store, Error> {
        let mut builder = self.builder();
        if let Some(keys) = self.max_keys {
            builder = builder.max_keys(keys);
        }
        if let Some(bytes) = self.max_bytes {
            builder = builder.max_bytes(bytes);
        }
        builder.open_simulated(&self.disk)
    }

    /// A store without limits.
    fn builder(&self) -> Builder {
        let mut builder = Store::builder()
            .clock(Arc::clone(&self.clock))
            .background(false)
            .durability(Durability::Buffered)
            .segment_size(SEGMENT_LEN)
            .index(self.is_indexed)
            .seed(1);
        if self.collide {
            builder = builder.fixed_hash(0x0123_4567_89ab_cdef);
        }
        builder
    }

    fn reserve(&mut self, key: u8, payload: u8, lease_ms: u64, kept_ms: Option<u64>, synced: bool, auto_renew: bool) {
        let (name, operation) = (name(key), operation(key));
        let asked = fingerprint(payload);
        let durability = if synced { Durability::Synced } else { Durability::Buffered };
        let kept = kept_ms.map_or(Retention::Forever, |ms| Retention::For(Duration::from_millis(ms)));
        let request = Request::new(&name)
            .scope(scope(key))
            .operation(&operation)
            .fingerprint(asked)
            .lease(Duration::from_millis(lease_ms))
            .retention(kept)
            .durability(durability)
            .auto_renew(auto_renew);
        let was_poisoned = self.is_poisoned();
        let mut outcome = self.store().reserve(&request);
        if outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::Full) && self.make_room() {
            outcome = self.store().reserve(&request);
            let is_full = outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::Full);
            assert!(!is_full, "there is room after upkeep, and yet: {outcome:?}");
        }
        let is_poisoned = self.is_poisoned();
        let now_ms = self.now_ms;
        let model = &mut self.keys[usize::from(key)];
        model.is_erased = false;
        match outcome {
            Ok(Outcome::Reserved(reservation)) => {
                assert!(!was_poisoned, "a poisoned store reserved");
                model.narrow(now_ms, "the key was free", |state| *state == State::Vacant);
                assert_eq!((reservation.attempt(), reservation.last_recovery_point()), (1, None));
                self.claimed(reservation, key, asked, lease_ms, kept_ms, synced, auto_renew);
                let held = self.store().stats().keys;
                assert!(self.max_keys.is_none_or(|most| held <= most), "{held} keys, and at most {:?}", self.max_keys);
            }
            Ok(Outcome::Interrupted(reservation)) => {
                assert!(!was_poisoned, "a poisoned store reserved");
                let seen = format!("interrupted: {reservation:?}");
                model.narrow(now_ms, &seen, |state| {
                    let State::Interrupted { claim } = state else { return false };
                    claim.fingerprint == asked
                        && claim.attempt + 1 == reservation.attempt()
                        && claim.point.as_deref() == reservation.last_recovery_point()
                });
                self.claimed(reservation, key, asked, lease_ms, kept_ms, synced, auto_renew);
            }
            Ok(Outcome::Replay(record)) => {
                let seen = format!(
                    "a replay of {record:?} {:?}",
                    String::from_utf8_lossy(&record.bytes()[..record.bytes().len().min(30)])
                );
                model
                    .narrow(now_ms, &seen, |state| state.fingerprint() == Some(asked) && state.is_answered_by(&record));
                if synced {
                    model.is_synced();
                }
                self.hold(record);
            }
            Ok(Outcome::InFlight(pending)) => {
                model.narrow(now_ms, &format!("in flight: {pending:?}"), |state| {
                    let State::Reserved { claim, lease_until_ms, auto_renew } = state else { return false };
                    let left = Some(Duration::from_millis(lease_until_ms.saturating_sub(now_ms)));
                    claim.fingerprint == asked
                        && claim.fence == Some(pending.fence())
                        && (*auto_renew || pending.lease_left() == left)
                });
                let waited = pending.wait(Duration::ZERO).expect("reads go on");
                let Wait::TimedOut(pending) = waited else { panic!("in flight, and yet over: {waited:?}") };
                let mut waiter = Waiter::new(key, pending, synced);
                assert!(waiter.look().is_pending(), "in flight, and yet over");
                self.waiters.push(waiter);
            }
            Ok(Outcome::Mismatch(Mismatch { stored, asked: also_asked, .. })) => {
                assert_eq!(asked, also_asked);
                assert_ne!(stored, asked);
                model.narrow(now_ms, "a mismatch", |state| state.fingerprint() == Some(stored));
            }
            Err(error) => {
                let may_need_sync = synced && matches!(error.kind(), ErrorKind::Io | ErrorKind::Poisoned);
                model.narrow(now_ms, "a reservation that failed", |state| match state {
                    State::Vacant => true,
                    State::Interrupted { claim } => claim.fingerprint == asked,
                    State::Completed(answer) => may_need_sync && answer.fingerprint == asked,
                    State::Reserved { .. } => false,
                });
                if is_poisoned && !was_poisoned {
                    for state in model.states.clone() {
                        let before = state.at(now_ms);
                        if matches!(before, State::Completed(_)) {
                            continue;
                        }
                        let (attempt, point) = before.claim().map_or((1, None), |c| (c.attempt + 1, c.point.clone()));
                        let claim = Claim { fence: None, fingerprint: asked, attempt, point };
                        model.may_have_written(State::Interrupted { claim });
                    }
                }
                let held = self.store().stats().keys;
                if error.kind() == ErrorKind::Full && self.max_keys.is_some_and(|most| held >= most) {
                    // One that is taken over needs no other place.
                    let is_sure = self.max_bytes.is_none();
                    let model = &mut self.keys[usize::from(key)];
                    model.narrow(now_ms, "no place for a key", |state| !is_sure || *state == State::Vacant);
                } else {
                    self.expect_failure(&error);
                }
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "all that a reservation was asked with")]
    fn claimed(
        &mut self,
        reservation: Reservation,
        key: u8,
        fingerprint: Fingerprint,
        lease_ms: u64,
        kept_ms: Option<u64>,
        synced: bool,
        auto_renew: bool,
    ) {
        let fence = reservation.fence();
        assert!(fence > self.newest_fence, "fence {fence} after {}", self.newest_fence);
        self.newest_fence = fence;
        let claim = Claim {
            fence: Some(fence),
            fingerprint,
            attempt: reservation.attempt(),
            point: reservation.last_recovery_point().map(<[u8]>::to_vec),
        };
        let lease_until_ms = self.now_ms + lease_ms;
        self.keys[usize::from(key)].wrote(State::Reserved { claim, lease_until_ms, auto_renew }, synced);
        self.guards.push(Guard { reservation, key, lease_ms, kept_ms, synced, auto_renew });
    }

    fn hold(&mut self, record: Record) {
        if self.records.len() < HELD_RECORDS {
            let bytes = record.bytes().to_vec();
            self.records.push((record, bytes));
        }
    }

    /// Takes a guard out, with the only state in which it can do anything, if it may own its key.
    fn take_guard(&mut self, at: usize) -> (Guard, Option<Claim>) {
        let guard = self.guards.swap_remove(at);
        let fence = guard.reservation.fence();
        let states = &self.keys[usize::from(guard.key)].states;
        let owned = states.iter().find(|state| state.is_owned_by(fence));
        let claim = owned.and_then(State::claim).cloned();
        (guard, claim)
    }

    fn answer(&mut self, at: usize, len: usize, is_failure: bool) {
        let (guard, claim) = self.take_guard(at);
        let bytes = self.payload(guard.key, len);
        let Guard { reservation, key, lease_ms, kept_ms, synced, auto_renew } = guard;
        let fence = reservation.fence();
        let was_poisoned = self.is_poisoned();
        let now_ms = self.now_ms;
        let told = if is_failure { reservation.fail(&bytes) } else { reservation.complete(&bytes) };
        let until_ms = kept_ms.map_or(u64::MAX, |kept_ms| now_ms.saturating_add(kept_ms).min(u64::MAX - 1));
        let answer = claim.map(|claim| {
            let Claim { fingerprint, attempt, .. } = claim;
            let fence = Some(fence);
            State::Completed(Answer { fence, fingerprint, attempt, bytes, is_failure, written_ms: now_ms, until_ms })
        });
        match told {
            Ok(record) => {
                assert!(!was_poisoned, "a poisoned store stored an answer");
                let model = &mut self.keys[usize::from(key)];
                model.narrow(now_ms, "an answer was stored", |state| state.is_owned_by(fence));
                let answer = answer.expect("narrowed to an owner");
                assert!(answer.is_answered_by(&record), "{record:?} was made of {answer:?}");
                model.wrote(answer, synced);
                self.hold(record);
            }
            Err(unwritten) => {
                let guard = Guard { reservation: unwritten.reservation, key, lease_ms, kept_ms, synced, auto_renew };
                self.unwritten(&unwritten.error, guard, answer, len, was_poisoned);
            }
        }
    }

    fn release(&mut self, at: usize) {
        let (guard, claim) = self.take_guard(at);
        let Guard { reservation, key, lease_ms, kept_ms, synced, auto_renew } = guard;
        let fence = reservation.fence();
        let was_poisoned = self.is_poisoned();
        match reservation.release() {
            Ok(()) => {
                assert!(!was_poisoned, "a poisoned store released");
                let model = &mut self.keys[usize::from(key)];
                model.narrow(self.now_ms, "a release", |state| state.is_owned_by(fence));
                model.wrote(State::Vacant, synced);
            }
            Err(unwritten) => {
                let guard = Guard { reservation: unwritten.reservation, key, lease_ms, kept_ms, synced, auto_renew };
                self.unwritten(&unwritten.error, guard, claim.map(|_| State::Vacant), 0, was_poisoned);
            }
        }
    }

    fn point(&mut self, at: usize, len: usize) {
        let (mut guard, claim) = self.take_guard(at);
        let bytes = self.payload(guard.key, len);
        let fence = guard.reservation.fence();
        let was_poisoned = self.is_poisoned();
        let told = guard.reservation.recovery_point(&bytes);
        let state = claim.map(|claim| State::Reserved {
            claim: Claim { point: Some(bytes.clone()), ..claim },
            lease_until_ms: self.now_ms + guard.lease_ms,
            auto_renew: guard.auto_renew,
        });
        match told {
            Ok(()) => {
                assert!(!was_poisoned, "a poisoned store wrote a recovery point");
                let model = &mut self.keys[usize::from(guard.key)];
                model.narrow(self.now_ms, "a recovery point", |state| state.is_owned_by(fence));
                model.wrote(state.expect("narrowed to an owner"), guard.synced);
                assert_eq!(guard.reservation.last_recovery_point(), Some(&bytes[..]));
                self.guards.push(guard);
            }
            Err(error) => self.unwritten(&error, guard, state, len, was_poisoned),
        }
    }

    /// A verdict or recovery point that was refused; `state` is what it would have made of the key.
    fn unwritten(&mut self, error: &Error, guard: Guard, state: Option<State>, len: usize, was_poisoned: bool) {
        let fence = guard.reservation.fence();
        let is_poisoned = self.is_poisoned();
        let now_ms = self.now_ms;
        let model = &mut self.keys[usize::from(guard.key)];
        match error.kind() {
            ErrorKind::RecordTooLarge => assert!(len > 50_000, "{len} bytes are too many"),
            ErrorKind::Fenced => {
                assert!(!was_poisoned);
                model.narrow(now_ms, "fenced", |state| !state.is_owned_by(fence));
            }
            ErrorKind::Io | ErrorKind::Poisoned => {
                self.expect_failure(error);
                let model = &mut self.keys[usize::from(guard.key)];
                if !was_poisoned {
                    model.narrow(now_ms, "a verdict that failed", |state| state.is_owned_by(fence));
                }
                if is_poisoned && !was_poisoned {
                    let claim = model.states[0].claim().expect("narrowed to an owner").clone();
                    let lease_until_ms = now_ms + guard.lease_ms;
                    model.may_have_written(state.expect("narrowed to an owner"));
                    // As it was, if it was the segment for it that could not be made.
                    model.states.push(State::Reserved { claim, lease_until_ms, auto_renew: guard.auto_renew });
                }
            }
            ErrorKind::StorageFull | ErrorKind::Full => {
                self.expect_failure(error);
                let model = &mut self.keys[usize::from(guard.key)];
                model.narrow(now_ms, "a verdict without room", |state| state.is_owned_by(fence));
            }
            kind => panic!("{kind:?}: {error:?}"),
        }
        self.guards.push(guard);
    }

    fn renew(&mut self, at: usize, to_longer: bool) {
        let guard = &mut self.guards[at];
        let fence = guard.reservation.fence();
        let told = if to_longer {
            guard.lease_ms = (3 * guard.lease_ms).min(MAX_LEASE.as_millis() as u64);
            guard.reservation.renew_for(Duration::from_millis(guard.lease_ms))
        } else {
            guard.reservation.renew()
        };
        let (lease_until_ms, auto_renew) = (self.now_ms + guard.lease_ms, guard.auto_renew);
        let model = &mut self.keys[usize::from(guard.key)];
        match told {
            Ok(()) => {
                model.narrow(self.now_ms, "a renewal", |state| state.is_owned_by(fence));
                let claim = model.states[0].claim().expect("narrowed to an owner").clone();
                model.states = vec![State::Reserved { claim, lease_until_ms, auto_renew }];
            }
            Err(error) => {
                assert!(error.is_fenced(), "{error:?}");
                model.narrow(self.now_ms, "fenced", |state| !state.is_owned_by(fence));
            }
        }
    }

    fn drop_guard(&mut self, guard: Guard) {
        let fence = guard.reservation.fence();
        drop(guard.reservation);
        for state in &mut self.keys[usize::from(guard.key)].states {
            if state.is_owned_by(fence) {
                *state = state.clone().without_owner();
            }
        }
    }

    fn get(&mut self, key: u8) {
        let (name, operation) = (name(key), operation(key));
        let request = Request::new(&name).scope(scope(key)).operation(&operation);
        let found = self.store().get(&request).expect("reads go on");
        let now_ms = self.now_ms;
        let model = &mut self.keys[usize::from(key)];
        match found {
            Some(record) => {
                let seen = format!("{record:?}");
                model.narrow(now_ms, &seen, |state| state.is_answered_by(&record));
                self.hold(record);
            }
            None => model.narrow(now_ms, "no answer", |state| !matches!(state, State::Completed(_))),
        }
    }

    fn poll(&mut self, at: usize) {
        let mut waiter = self.waiters.swap_remove(at);
        let (was_woken, now_ms, fence) = (waiter.was_woken(), self.now_ms, waiter.fence);
        let model = &mut self.keys[usize::from(waiter.key)];
        let wait = match waiter.look() {
            Poll::Pending => {
                let is_it = |claim: &Claim| claim.fence == Some(fence);
                model.narrow(
                    now_ms,
                    "still in flight",
                    |state| matches!(state, State::Reserved { claim, .. } if is_it(claim)),
                );
                return self.waiters.push(waiter);
            }
            Poll::Ready(Ok(wait)) => wait,
            Poll::Ready(Err(error)) => {
                assert!(waiter.synced, "reads go on, and yet: {error:?}");
                model.narrow(now_ms, "an answer that can't be synced", |state| matches!(state, State::Completed(_)));
                return self.expect_failure(&error);
            }
        };
        // That a lease ran out is noticed by whoever looks.
        let is_due = |state: &State| matches!(state, State::Reserved { .. }) && state.at(now_ms) != *state;
        assert!(was_woken || model.states.iter().any(is_due), "{wait:?}, and nobody woke who waited for {fence}");
        match wait {
            Wait::Replay(record) => {
                model.narrow(now_ms, "a replay after a wait", |state| {
                    matches!(state, State::Completed(answer) if answer.fence == Some(fence))
                        && state.is_answered_by(&record)
                });
                if waiter.synced {
                    model.is_synced();
                }
            }
            Wait::TimedOut(_) => panic!("a wait without a limit timed out"),
            Wait::Retry => model.narrow(now_ms, "over", |state| match state {
                State::Vacant | State::Interrupted { .. } => true,
                State::Reserved { claim, .. } => claim.fence != Some(fence),
                State::Completed(answer) => answer.fence != Some(fence),
            }),
        }
    }

    fn erase(&mut self, key: u8) {
        // An erasure waits for handles.
        self.records.clear();
        let (name, operation) = (name(key), operation(key));
        let request = Request::new(&name).scope(scope(key)).operation(&operation);
        let was_poisoned = self.is_poisoned();
        let told = self.store().erase(&request);
        let now_ms = self.now_ms;
        match told {
            Ok(erasure) => {
                assert!(!was_poisoned, "a poisoned store erased");
                let (least, most) = self.count_keys(&[key], now_ms);
                assert!((least..=most).contains(&erasure.keys), "{erasure:?}, not {least} to {most} keys");
                self.erased(key);
            }
            Err(error) => {
                self.expect_failure(&error);
                if !was_poisoned {
                    self.may_be_erased(key);
                }
            }
        }
    }

    fn erase_scope(&mut self, at: u8) {
        self.records.clear();
        let scope_name = SCOPES[usize::from(at)];
        let keys: Vec<u8> = (0..KEYS).filter(|key| scope(*key) == scope_name).collect();
        let was_poisoned = self.is_poisoned();
        match self.store().erase_scope(scope_name) {
            Ok(erasure) => {
                assert!(!was_poisoned, "a poisoned store erased");
                let (least, most) = self.count_keys(&keys, self.now_ms);
                assert!((least..=most).contains(&erasure.keys), "{erasure:?}, not {least} to {most} keys");
                keys.into_iter().for_each(|key| self.erased(key));
            }
            Err(error) => {
                self.expect_failure(&error);
                if !was_poisoned {
                    keys.into_iter().for_each(|key| self.may_be_erased(key));
                }
            }
        }
    }

    fn erased(&mut self, key: u8) {
        self.keys[usize::from(key)] = KeyModel { is_erased: true, ..KeyModel::new() };
        assert!(!leaves_a_trace(&self.disk, key), "key {key} was erased, and bytes of it are left");
    }

    fn may_be_erased(&mut self, key: u8) {
        let model = &mut self.keys[usize::from(key)];
        model.may_have_written(State::Vacant);
        if !model.states.contains(&State::Vacant) {
            model.states.push(State::Vacant);
        }
    }

    /// How many of these keys the table holds, at least and at most: what is over may not have been noticed.
    fn count_keys(&self, keys: &[u8], now_ms: u64) -> (u64, u64) {
        let models = || keys.iter().map(|key| &self.keys[usize::from(*key)].states);
        let least = models().filter(|states| states.iter().all(|state| state.at(now_ms) != State::Vacant)).count();
        let most = models().filter(|states| states.iter().any(|state| *state != State::Vacant)).count();
        (least as u64, most as u64)
    }

    fn maintain(&mut self, budget: usize) {
        let was_poisoned = self.is_poisoned();
        match self.store().maintain(budget) {
            Ok(done) => {
                assert!(!was_poisoned, "a poisoned store did upkeep");
                if !done.has_more {
                    self.keys.iter_mut().for_each(|model| model.forget(self.now_ms));
                }
            }
            Err(error) => self.expect_failure(&error),
        }
        self.check_count();
        self.check_space(budget);
    }

    /// Whether upkeep has to find room for another reservation, once it ran.
    fn make_room(&mut self) -> bool {
        let has_place = self.max_keys.is_none_or(|most| self.store().stats().keys < most);
        let Some(limit) = self.max_bytes.filter(|_| has_place && !self.is_armed && !self.is_tight) else {
            return false;
        };
        // Handles keep segments.
        self.records.clear();
        self.maintain(usize::MAX);
        limit >= LEAST_SEGMENTS * SEGMENT_LEN + 2 * self.live_bytes()
    }

    fn live_bytes(&self) -> u64 {
        let answers = self.keys.iter().flat_map(|model| &model.states).map(|state| match state {
            State::Completed(answer) => answer.bytes.len() as u64,
            State::Vacant | State::Reserved { .. } | State::Interrupted { .. } => 0,
        });
        answers.sum()
    }

    /// Upkeep that ran to its end leaves a bounded number of segments, however many there were.
    fn check_space(&self, budget: usize) {
        if self.is_armed || self.is_tight || budget < usize::MAX {
            return;
        }
        let (live, used) = (self.live_bytes(), self.disk.files().iter().map(|(_, len)| len).sum::<u64>());
        let bound = 2 * live + MOST_SEGMENTS * SEGMENT_LEN;
        assert!(used <= bound, "{used} bytes on disk for {live} of answers");
    }

    fn check_limit(&mut self) {
        // A segment whose renaming failed has two names, and counts once.
        if self.is_armed {
            return;
        }
        let (used, limit) = (segment_bytes(&self.disk), self.max_bytes.unwrap_or(u64::MAX));
        let most = limit.max(self.found_bytes).saturating_add(ROOM_FOR_UPKEEP * SEGMENT_LEN);
        assert!(used <= most, "{used} bytes of {limit}, and {} were found", self.found_bytes);
        self.found_bytes = self.found_bytes.min(used);
    }

    fn check_count(&self) {
        let keys: Vec<u8> = (0..KEYS).collect();
        let (least, most) = self.count_keys(&keys, self.now_ms);
        let held = self.store().stats().keys;
        assert!((least..=most).contains(&held), "{held} keys, not {least} to {most}");
    }

    fn all_is_synced(&mut self) {
        for written in self.keys.iter_mut().flat_map(|model| &mut model.log) {
            written.synced = true;
        }
    }

    fn restart(&mut self, how: Restart, seed: u64, failing: Option<(DiskOp, u64)>) {
        self.stop(how, seed);
        self.start(matches!(how, Restart::Cut | Restart::CloseAndCut), seed, failing);
    }

    /// Ends the store; the disk is then as the next process finds it.
    fn stop(&mut self, how: Restart, seed: u64) {
        let store = self.store.take().expect("the store is open between operations");
        let image = match how {
            Restart::Death => self.disk.after_process_death(),
            Restart::Cut => cut(&self.disk, seed),
            Restart::Close | Restart::CloseAndCut => {
                let was_poisoned = store.stats().is_poisoned;
                match store.clone().close() {
                    Ok(()) if !was_poisoned => self.all_is_synced(),
                    Ok(()) => {}
                    Err(error) => assert!(self.is_armed, "no disk failed, and yet: {error:?}"),
                }
                for waiter in &mut self.waiters {
                    assert!(waiter.was_woken(), "closed, and nobody woke who waited for {}", waiter.fence);
                }
                for guard in &mut self.guards {
                    let kind = guard.reservation.renew().expect_err("the store is closed").kind();
                    assert_eq!(kind, ErrorKind::Closed);
                }
                if how == Restart::CloseAndCut {
                    cut(&self.disk, seed)
                } else if self.is_armed {
                    // The same, without the failures still to come.
                    self.disk.after_process_death()
                } else {
                    self.disk.clone()
                }
            }
        };
        // The old store's guards go when its disk can't change any more, or after the store was closed.
        self.guards.clear();
        self.waiters.clear();
        drop(store);
        // They outlive the store; whoever wants the same disk has to wait for them.
        for (record, bytes) in self.records.drain(..) {
            assert_eq!(record.bytes(), bytes);
        }
        self.disk = image;
        self.is_armed = false;
        let (max_keys, max_segments) = LIMITS[(seed / 32 % 8) as usize];
        self.max_keys = max_keys;
        self.max_bytes = max_segments.map(|segments| segments * SEGMENT_LEN);
        self.is_indexed = !(seed / 256).is_multiple_of(4);
        if seed % 8 == 5 {
            let by_ms = [5, 1_000, 100_000, 3_600_000][(seed / 8 % 4) as usize];
            self.clock.set(self.clock.now_ms() - by_ms);
        }
    }

    /// Opens the disk that a store left; `power_cut` if more than its process was lost. A recovery may be cut short, and so is,
    /// now and then, the one after that.
    fn start(&mut self, mut power_cut: bool, seed: u64, mut failing: Option<(DiskOp, u64)>) {
        let mut random = Rng::with_seed(seed);
        let mut was_cut = power_cut;
        let mut found;
        let store = loop {
            found = self.disk.after_process_death();
            *if was_cut { &mut self.tally.power_cuts } else { &mut self.tally.deaths } += 1;
            if let Some((op, after)) = failing {
                self.disk.fail(op, after, io::ErrorKind::Other);
                self.is_armed = true;
            }
            let error = match self.open() {
                Ok(store) => break store,
                Err(error) if failing.is_some() => error,
                Err(error) => panic!("no crash is corruption, and yet: {error:?}"),
            };
            self.expect_failure(&error);
            self.is_armed = false;
            self.tally.cut_recoveries += 1;
            failing = random.bool().then(|| (disk_op(random.u8(..)), random.u64(..8)));
            was_cut = random.bool();
            power_cut |= was_cut;
            self.disk = if was_cut { cut(&self.disk, random.u64(..)) } else { self.disk.after_process_death() };
        };
        let report = store.recovery();
        self.now_ms = self.clock.now_ms() + report.clock_behind.as_millis() as u64;
        assert!(self.now_ms <= self.latest_ms, "the store is ahead of all times that there were: {report:?}");
        for model in &mut self.keys {
            model.crash(power_cut, self.latest_ms);
            // What is over and in an index is for upkeep to forget.
            if report.indexed == 0 {
                model.forget(self.now_ms);
            }
        }
        assert!(report.lost.is_empty(), "no crash loses what was durable: {report:?}");
        assert_eq!(report.completed + report.interrupted, store.stats().keys);
        self.found_bytes = segment_bytes(&self.disk);
        self.tally.indexed += u64::from(report.indexed > 0);
        // What was over when an index was written is in the journal still, and comes back from there if it was ever later
        // than now. It costs two openings more.
        if report.indexed > 0 && !self.is_armed && self.now_ms == self.latest_ms && seed.is_multiple_of(3) {
            self.check_index(&found);
        }
        self.store = Some(store);
        self.check_count();
        let erased = (0..KEYS).find(|key| self.keys[usize::from(*key)].is_erased);
        if let Some(key) = erased {
            assert!(!leaves_a_trace(&self.disk, key), "key {key} was erased, and bytes of it are back");
        }
    }

    /// Opens the files that a store was opened with once more, twice: with its index and with all that the journal says.
    fn check_index(&self, found: &SimDisk) {
        found.set_capacity(None);
        let open = |index| {
            let store = self.builder().index(index).open_simulated(&found.after_process_death());
            store.expect("it was opened before")
        };
        let (indexed, read) = (open(true), open(false));
        assert!(indexed.recovery().indexed > 0 && read.recovery().indexed == 0);
        // The newest record may have been erased since the index took its time; with another time other answers are over.
        if indexed.recovery().clock_behind != read.recovery().clock_behind {
            return;
        }
        indexed.verify().expect("nothing is damaged");
        for key in 0..KEYS {
            let [one, other] = [&indexed, &read].map(|store| look(store, key));
            assert_eq!(one, other, "key {key} by the index, and by the journal");
        }
        // So that what is counted by the index is what there is.
        for store in [&indexed, &read] {
            while store.maintain(usize::MAX).expect("no disk fails").has_more {}
        }
        assert_eq!(indexed.stats().keys, read.stats().keys);
    }

    /// Opens files of a closed store that were damaged at rest: exact answers, or a refusal that changes nothing.
    fn rot(&mut self, files: &SimDisk, random: &mut Rng) {
        let what = damage(files, random);
        files.set_capacity(None);
        self.tally.damaged += 1;
        let is_refused = self.open_damaged(&files.after_process_death(), &what);
        // An index may stand for what is damaged, until somebody looks there.
        if let Ok(store) = self.builder().index(true).open_simulated(files)
            && store.recovery().indexed > 0
        {
            let exactness = if is_refused { Exactness::OrCorrupt } else { Exactness::Exact };
            let is_verified = store.verify().is_ok();
            assert!(!is_verified || !is_refused, "{what}: refused without an index, and nothing is damaged with it");
            self.check_damaged(&store, &what, exactness);
        }
    }

    /// Whether it is refused to open them without an index.
    fn open_damaged(&mut self, files: &SimDisk, what: &str) -> bool {
        let before = all_bytes(files);
        let builder = || self.builder().index(false);
        match builder().open_simulated(files) {
            Ok(store) => {
                self.check_damaged(&store, what, Exactness::Exact);
                false
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error:?}");
                assert!(before == all_bytes(files), "{what}: refused, and yet files were changed");
                // What is missing then is named; what is there is right.
                match builder().recovery(RecoveryMode::Salvage).open_simulated(files) {
                    Ok(store) => {
                        assert!(
                            !store.recovery().lost.is_empty(),
                            "{what}: salvage lost nothing, strict said {error:?}"
                        );
                        self.check_damaged(&store, what, Exactness::OrMissing);
                    }
                    Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: salvage: {error:?}"),
                }
                self.tally.refused += 1;
                true
            }
        }
    }

    /// Compares all keys with the model.
    fn check_damaged(&self, store: &Store, what: &str, exactness: Exactness) {
        let is_exact = exactness != Exactness::OrMissing;
        for key in 0..KEYS {
            let (name, operation) = (name(key), operation(key));
            let states: Vec<State> = self.keys[usize::from(key)].states.iter().map(|s| s.at(self.now_ms)).collect();
            let request = Request::new(&name).scope(scope(key)).operation(&operation);
            let may_be = |error: &Error| exactness == Exactness::OrCorrupt && error.kind() == ErrorKind::Corrupt;
            let answer = match store.get(&request) {
                Ok(answer) => answer,
                Err(error) if may_be(&error) => continue,
                Err(error) => panic!("{what}: key {key}: {error:?}"),
            };
            let fits = |state: &State| match &answer {
                Some(record) => state.is_answered_by(record),
                None => !is_exact || !matches!(state, State::Completed(_)),
            };
            assert!(states.iter().any(fits), "{what}: key {key} is {answer:?}, and can only be {states:#?}");
            let Some(asked) = states.iter().find_map(State::fingerprint) else { continue };
            let outcome = match store.reserve(&request.fingerprint(asked)) {
                Ok(outcome) => outcome,
                Err(error) if may_be(&error) => continue,
                Err(error) => panic!("{what}: key {key}: {error:?}"),
            };
            let fits = |state: &State| match &outcome {
                Outcome::Replay(record) => state.is_answered_by(record),
                Outcome::InFlight(_) => false,
                // In salvage the record that says otherwise may be what was lost.
                Outcome::Reserved(_) | Outcome::Interrupted(_) | Outcome::Mismatch(_) if !is_exact => true,
                Outcome::Reserved(_) => *state == State::Vacant,
                Outcome::Interrupted(guard) => {
                    matches!(state, State::Interrupted { claim } if guard.attempt() == claim.attempt + 1)
                }
                Outcome::Mismatch(mismatch) => state.fingerprint() == Some(mismatch.stored),
            };
            assert!(states.iter().any(fits), "{what}: key {key}: {outcome:?}, and can only be {states:#?}");
        }
    }
}

/// What a damaged store may say of its keys.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Exactness {
    /// What is so.
    Exact,
    /// That, or that it is damaged.
    OrCorrupt,
    /// That, or less.
    OrMissing,
}

/// What a store says of a key, told to whoever asks for it with one payload and another.
fn look(store: &Store, key: u8) -> String {
    let (name, operation) = (name(key), operation(key));
    let request = Request::new(&name).scope(scope(key)).operation(&operation);
    let answer = store.get(&request).expect("nothing is damaged");
    let answer = answer.map(|record| (record.bytes().to_vec(), record.attempt(), record.expires_at()));
    let asked = [1, 2].map(|payload| {
        match store.reserve(&request.fingerprint(fingerprint(payload))).expect("nothing is full") {
            Outcome::Reserved(_) => "vacant".to_owned(),
            Outcome::Interrupted(guard) => {
                format!("interrupted: {} {:?}", guard.attempt(), guard.last_recovery_point())
            }
            Outcome::Replay(record) => format!("{record:?}"),
            Outcome::InFlight(_) => "in flight".to_owned(),
            Outcome::Mismatch(mismatch) => format!("{:?}", mismatch.stored),
        }
    });
    format!("{answer:?} {asked:?}")
}

/// The disk after a power cut that tears sectors or, as often, whole pages.
fn cut(disk: &SimDisk, seed: u64) -> SimDisk {
    let mut random = Rng::with_seed(seed);
    // Some cuts keep nearly nothing, some nearly all.
    let kept_of_16 = [8, 1, 15, 0][(seed % 4) as usize];
    let keep = || random.u8(..16) < kept_of_16;
    if seed & 4 == 0 { disk.after_power_cut(keep) } else { disk.after_power_cut_in_pages(keep) }
}

fn all_bytes(disk: &SimDisk) -> Vec<(String, Vec<u8>)> {
    disk.files().into_iter().map(|(name, _)| (name.clone(), disk.contents(&name).unwrap_or_default())).collect()
}

/// Some bytes of a segment's last records, and its seal.
const TAIL: usize = 300;
/// Where a segment's records begin.
const RECORDS: usize = 4096;

/// Damages one file, or two, and says how.
fn damage(disk: &SimDisk, random: &mut Rng) -> String {
    let mut files = all_bytes(disk);
    files.retain(|(_, bytes)| !bytes.is_empty());
    let kind = random.usize(..10);
    let at = random.usize(..files.len());
    let other = random.usize(..files.len());
    let (name, mut bytes) = files[at].clone();
    let used = bytes.iter().rposition(|byte| *byte != 0).map_or(1, |last| last + 1);
    let len = bytes.len();
    // Damage hides best where records end.
    let start = if random.bool() { random.usize(..used) } else { used - 1 - random.usize(..used.min(TAIL)) };
    // More zeros, from a segment's header to its last record's end, would make it a spare (docs/design.md, Known limits).
    let end = (start + 1 + random.usize(..4096)).min(len);
    let what = match kind {
        0 | 1 => {
            let bit = random.usize(..8);
            bytes[start] ^= 1 << bit;
            format!("bit {bit} of byte {start} flipped")
        }
        2 => {
            bytes[start..end].fill(0);
            format!("bytes {start} to {end} zeroed")
        }
        3 => {
            bytes[start..end].fill(0xff);
            format!("bytes {start} to {end} set to ones")
        }
        4 => {
            let (from, to) = (start / 512 * 512, random.usize(..used) / 512 * 512);
            let sector = |at: usize| at..(at + 512).min(len);
            let moved = bytes[sector(from)].to_vec();
            let there = to..(to + moved.len()).min(len);
            bytes[there.clone()].copy_from_slice(&moved[..there.len()]);
            format!("sector at {from} written to {to}")
        }
        5 => {
            bytes.truncate(start);
            format!("truncated to {start}")
        }
        6 => {
            bytes.extend([7; 64]);
            "64 bytes longer".to_owned()
        }
        7 => {
            disk.take(&name);
            return format!("{name}: taken away");
        }
        8 => {
            let (other, theirs) = &files[other];
            let end = len.min(theirs.len());
            let records = RECORDS.min(end)..end;
            bytes[records.clone()].copy_from_slice(&theirs[records]);
            format!("records of {other} written over it")
        }
        _ => {
            let (other, theirs) = &files[other];
            disk.put(other, bytes);
            bytes = theirs.clone();
            format!("swapped with {other}")
        }
    };
    disk.put(&name, bytes);
    format!("{name}: {what}")
}
