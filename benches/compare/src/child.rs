//! One cell, measured in a process of its own: no peer finds the heap, the page tables or the threads of another.

use crate::cell::{Cell, Expiry, Job, Latency, Level, PeerName, Reading, Reopening, Report, Space, Subject, Workload};
use crate::peer::{Decision, Load, Peer, Result, Session, Setup};
use crate::peers;
use crate::probe;
use crate::workload::{Answers, Asked, Watch, Zipf, mix};
use hdrhistogram::Histogram;
use std::hint::black_box;
use std::mem::ManuallyDrop;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

/// Replays are over after so many; by then two in three keys of a million were asked for.
const REPLAYS: u64 = 1_000_000;
/// Keys that threads fight for where an operation takes long.
const SLOW_HERD: u64 = 20_000;
/// How long FRESH runs before keys fall due.
const BEFORE_DUE: Duration = Duration::from_secs(1);
/// Number of the first key that is written before the time is taken.
const WARM_UP: u64 = 1 << 40;
/// Number of the first key that is written when all else is measured.
const LATER: u64 = 1 << 41;
/// Bytes that are loaded at a time, and for how many times the limit.
const LOAD_BYTES: u64 = 16 << 20;
const LOAD_LIMITS: u32 = 8;
/// Keys that are looked at after a `kill -9`.
const CHECKED: u64 = 1000;

/// Carries out a child's orders.
pub fn measure(cell: &Cell) -> Result<Report> {
    match cell.subject.peer {
        PeerName::Oncekey => run::<peers::oncekey::Oncekey>(cell),
        PeerName::Floor => run::<peers::floor::Floor>(cell),
        PeerName::Dashmap => run::<peers::dashmap::Dashmap>(cell),
        PeerName::Scc => run::<peers::scc::Scc>(cell),
        PeerName::Moka => run::<peers::moka::Moka>(cell),
        PeerName::QuickCache => run::<peers::quick_cache::QuickCache>(cell),
        PeerName::Lmdb => run::<peers::lmdb::Lmdb>(cell),
        PeerName::Redb => run::<peers::redb::Redb>(cell),
        PeerName::Fjall => run::<peers::fjall::Fjall>(cell),
        PeerName::Sled => run::<peers::sled::Sled>(cell),
        PeerName::Sqlite => run::<peers::sqlite::Sqlite>(cell),
        #[cfg(feature = "rocksdb")]
        PeerName::Rocksdb => run::<peers::rocksdb::Rocksdb>(cell),
        #[cfg(not(feature = "rocksdb"))]
        PeerName::Rocksdb => Ok(Report::NotInstalled),
        PeerName::Redis if peers::redis::is_installed() => run::<peers::redis::Redis>(cell),
        PeerName::Redis => Ok(Report::NotInstalled),
    }
}

fn run<P: Peer>(cell: &Cell) -> Result<Report> {
    match &cell.job {
        Job::Run { then } => fresh_and_more::<P>(cell, then),
        Job::Latency => latency::<P>(cell),
        Job::Herd => herd::<P>(cell),
        Job::Expire => expire::<P>(cell),
        Job::Fill => fill::<P>(cell),
        Job::Reopen { filled } => reopen::<P>(cell, *filled),
    }
}

/// An open peer under a workload.
struct Bench<'a, P> {
    peer: &'a P,
    cell: &'a Cell,
    answers: &'a Answers,
    watch: &'a Watch,
}

/// What the threads got done.
struct Pass {
    ops: u64,
    /// Of each thread at least.
    turns: u64,
    seconds: f64,
    histogram: Option<Histogram<u64>>,
}

/// One thread's share of a pass.
struct Share {
    turns: u64,
    histogram: Option<Histogram<u64>>,
}

impl Pass {
    fn rate(&self) -> f64 {
        self.ops as f64 / self.seconds
    }

    fn latency(&self) -> Option<Latency> {
        self.histogram.as_ref().map(latency_of)
    }
}

fn latency_of(histogram: &Histogram<u64>) -> Latency {
    let at = |quantile| histogram.value_at_quantile(quantile);
    Latency { p50: at(0.5), p99: at(0.99), p999: at(0.999), max: histogram.max() }
}

fn histogram() -> Histogram<u64> {
    Histogram::new(3).expect("three digits are in range")
}

/// Runs `operation` for each turn until the time is up. Timed turns take one clock read each, so that what one takes
/// ends where the next begins.
fn take_turns(count: u64, limit: Duration, is_timed: bool, mut operation: impl FnMut(u64)) -> Share {
    let start = Instant::now();
    if is_timed {
        let mut histogram = histogram();
        let mut before = start;
        for turn in 0..count {
            operation(turn);
            let after = Instant::now();
            histogram.record((after - before).as_nanos() as u64).expect("the histogram resizes itself");
            before = after;
            if after - start >= limit {
                return Share { turns: turn + 1, histogram: Some(histogram) };
            }
        }
        return Share { turns: count, histogram: Some(histogram) };
    }
    for turn in 0..count {
        operation(turn);
        if turn % 256 == 255 && start.elapsed() >= limit {
            return Share { turns: turn + 1, histogram: None };
        }
    }
    Share { turns: count, histogram: None }
}

impl<P: Peer> Bench<'_, P> {
    fn limit(&self) -> Duration {
        // What is fast gets done; the limit is for the case that it isn't on this machine.
        let times = if self.cell.subject.is_slow() { 1.0 } else { 20.0 };
        Duration::from_secs_f64(times * self.cell.limit_s)
    }

    fn asked(&self, i: u64) -> Asked {
        Asked::new(i, self.cell.subject.key_form)
    }

    /// Each thread does `share` with a session of its own, all from one start.
    fn pass(&self, share: impl Fn(u64, &mut P::Session<'_>) -> Share + Sync) -> Pass {
        let threads = self.cell.subject.threads;
        let barrier = Barrier::new(threads + 1);
        let (shares, took) = std::thread::scope(|scope| {
            let handles: Vec<_> = (0..threads as u64)
                .map(|thread| {
                    let (barrier, share) = (&barrier, &share);
                    scope.spawn(move || {
                        let mut session = self.peer.session();
                        barrier.wait();
                        share(thread, &mut session)
                    })
                })
                .collect();
            barrier.wait();
            let start = Instant::now();
            let shares: Vec<Share> =
                handles.into_iter().map(|handle| handle.join().expect("a thread ends well")).collect();
            (shares, start.elapsed())
        });
        let ops = shares.iter().map(|share| share.turns).sum();
        let turns = shares.iter().map(|share| share.turns).min().unwrap_or(0);
        let histogram = shares.into_iter().filter_map(|share| share.histogram).reduce(|mut all, one| {
            all.add(one).expect("the histogram resizes itself");
            all
        });
        Pass { ops, turns, seconds: took.as_secs_f64(), histogram }
    }

    /// Reserves key number `i`, which is new, and completes it.
    #[inline]
    fn fresh_one(&self, session: &mut P::Session<'_>, i: u64) {
        let asked = self.asked(i);
        match session.reserve(asked.key(), &asked.fingerprint) {
            Decision::Fresh(ticket) => {
                session.complete(ticket, asked.key(), &asked.fingerprint, self.answers.answer(i));
            }
            Decision::InFlight | Decision::Replay(_) => panic!("key {i} is new"),
        }
    }

    #[inline]
    fn replay_one(&self, session: &mut P::Session<'_>, i: u64) -> u64 {
        let asked = self.asked(i);
        match session.reserve(asked.key(), &asked.fingerprint) {
            Decision::Replay(sum) => sum,
            Decision::Fresh(_) | Decision::InFlight => panic!("key {i} is completed"),
        }
    }

    /// New keys from number `from` on; the threads take turns.
    fn fresh(&self, from: u64, keys: u64, limit: Duration, is_timed: bool) -> Pass {
        let threads = self.cell.subject.threads as u64;
        self.pass(|thread, session| {
            take_turns(keys / threads, limit, is_timed, |turn| {
                self.fresh_one(session, from + turn * threads + thread);
            })
        })
    }

    /// Fills in the rest of the keys that are numbered from `from`, of which there are `filled`, in bulk; returns how
    /// many there are then.
    fn top_up(&self, from: u64, mut filled: u64) -> Result<u64> {
        if !self.cell.subject.is_slow() {
            return Ok(filled);
        }
        let Subject { keys, key_form, answer_len, .. } = self.cell.subject;
        let step = (LOAD_BYTES / (answer_len as u64 + 64)).min(10_000);
        let start = Instant::now();
        while filled < keys && start.elapsed() < LOAD_LIMITS * self.limit() {
            let to = keys.min(filled + step);
            let numbers = from + filled..from + to;
            self.peer.load(&Load { numbers, key_form, answers: self.answers, watch: self.watch })?;
            filled = to;
        }
        Ok(filled)
    }

    /// Fills in keys numbered from `from`, as it comes; returns how many.
    fn fill(&self, from: u64, limit: Duration) -> Result<u64> {
        if self.cell.subject.is_slow() {
            return self.top_up(from, 0);
        }
        Ok(self.fresh(from, self.cell.subject.keys, limit, false).ops)
    }

    fn replay(&self, filled: u64, count: u64, is_timed: bool) -> Pass {
        let threads = self.cell.subject.threads as u64;
        self.pass(|thread, session| {
            let mut sum: u64 = 0;
            let share = take_turns(count / threads, self.limit(), is_timed, |turn| {
                sum = sum.wrapping_add(self.replay_one(session, mix(turn * threads + thread + 1) % filled));
            });
            black_box(sum);
            share
        })
    }

    /// Four replays to one new key; new ones are numbered from `from`.
    fn mixed(&self, zipf: &Zipf, filled: u64, from: u64, count: u64, is_timed: bool) -> Pass {
        let threads = self.cell.subject.threads as u64;
        self.pass(|thread, session| {
            let mut sum: u64 = 0;
            let share = take_turns(count / threads, self.limit(), is_timed, |turn| {
                if turn % 5 == 4 {
                    self.fresh_one(session, from + (turn / 5) * threads + thread);
                } else {
                    // Popular keys lie anywhere.
                    let i = mix(zipf.rank(turn + thread * 65_537) + 1) % filled;
                    sum = sum.wrapping_add(self.replay_one(session, i));
                }
            });
            black_box(sum);
            share
        })
    }

    fn reading(&self, workload: Workload, filled: u64) -> Reading {
        Reading {
            subject: self.cell.subject,
            workload,
            round: 0,
            rate: None,
            filled,
            latency: None,
            space: None,
            expiry: None,
            reopening: None,
            one_owner_each: None,
        }
    }
}

fn setup(cell: &Cell) -> Setup {
    let subject = &cell.subject;
    let keys = match &cell.job {
        Job::Run { then } if then.contains(&Workload::Mixed) => subject.keys + REPLAYS.min(2 * subject.keys) / 4,
        Job::Expire => 2 * subject.keys + 4_000_000,
        Job::Run { .. } if subject.level == Level::Power => subject.keys + subject.keys / 10,
        Job::Run { .. } | Job::Latency | Job::Herd | Job::Fill | Job::Reopen { .. } => subject.keys,
    };
    Setup {
        dir: cell.dir.clone(),
        level: subject.level,
        capacity: keys,
        key_form: subject.key_form,
        answer_len: subject.answer_len,
        expires: cell.job == Job::Expire,
        watch: Arc::new(Watch::new()),
    }
}

/// Left open, as closing isn't measured and the process ends soon.
fn open<P: Peer>(setup: &Setup) -> Result<ManuallyDrop<P>> {
    P::open(setup).map(ManuallyDrop::new)
}

fn fresh_and_more<P: Peer>(cell: &Cell, then: &[Workload]) -> Result<Report> {
    let (subject, setup) = (&cell.subject, setup(cell));
    let answers = Answers::new(subject.answer_len);
    let is_stored = subject.level != Level::Memory;
    let is_slow = subject.is_slow();
    if is_stored {
        probe::sync_all(&cell.dir)?;
    }
    let own = process::id();
    let counts = |process| (probe::anonymous_bytes(process), probe::written_bytes(process));
    let (mut before, mut device) = (counts(own), probe::device_bytes(&cell.dir));
    let peer = open::<P>(&setup)?;
    let bench = Bench { peer: &*peer, cell, answers: &answers, watch: &setup.watch };
    let whose = peer.server().unwrap_or(own);
    if whose != own {
        before = counts(whose);
    }

    let is_synced = subject.level == Level::Power;
    if is_synced {
        // Afterwards the first files are made, and what is measured is syncs.
        bench.fresh(WARM_UP, subject.keys / 10, bench.limit() / 4, false);
        (before, device) = (counts(whose), probe::device_bytes(&cell.dir));
    }
    let (anonymous, written) = before;
    let pass = bench.fresh(0, subject.keys, bench.limit(), is_slow);
    let done = pass.turns * subject.threads as u64;
    peer.settle();
    if is_stored {
        probe::sync_all(&cell.dir)?;
    }
    let since = |now: Option<u64>, then: Option<u64>| {
        let bytes = now?.saturating_sub(then?);
        is_stored.then(|| bytes as f64 / pass.ops as f64)
    };
    let written = since(probe::written_bytes(whose), written);
    let device = since(probe::device_bytes(&cell.dir), device);

    let filled = if then.is_empty() { done } else { bench.top_up(0, done)? };
    peer.settle();
    if is_stored {
        probe::sync_all(&cell.dir)?;
    }
    // Few keys on top of those that warmed it up tell nothing.
    let each = |bytes: u64| (!is_synced).then_some(bytes as f64 / filled.max(pass.ops) as f64);
    let pair = if then.is_empty() { None } else { P::pair_bytes(&setup) };
    let space = Space {
        anonymous: each(probe::anonymous_bytes(whose).saturating_sub(anonymous)),
        disk: each(probe::allocated_bytes(&cell.dir)).filter(|_| is_stored),
        written,
        device,
        pair,
        dirtied_per_journal_byte: None,
    };
    let mut readings = vec![Reading {
        rate: Some(pass.rate()),
        latency: pass.latency(),
        space: Some(space),
        ..bench.reading(Workload::Fresh, done)
    }];

    let count = (2 * filled).min(REPLAYS);
    for workload in then {
        let (throughput, timed) = match workload {
            Workload::Replay => {
                let throughput = bench.replay(filled, count, is_slow);
                let timed = (!is_slow).then(|| bench.replay(filled, count / 8, true));
                (throughput, timed)
            }
            Workload::Mixed => {
                let zipf = Zipf::new(filled, 1 << 18);
                let from = subject.keys;
                let throughput = bench.mixed(&zipf, filled, from, count, is_slow);
                let timed = (!is_slow).then(|| bench.mixed(&zipf, filled, from + count / 5, count / 8, true));
                (throughput, timed)
            }
            other => return Err(format!("{other:?} takes a store of its own").into()),
        };
        readings.push(Reading {
            rate: Some(throughput.rate()),
            latency: timed.as_ref().unwrap_or(&throughput).latency(),
            ..bench.reading(*workload, filled)
        });
    }
    if let (Some(pair), Some(space), Level::Kill) = (pair, &mut readings[0].space, subject.level) {
        space.dirtied_per_journal_byte = dirtied_per_journal_byte(&bench, pair);
    }
    Ok(Report::Readings(readings))
}

/// Bytes dirtied per byte of journal, as the store is written to without a pause: as many spares before as after.
fn dirtied_per_journal_byte<P: Peer>(bench: &Bench<'_, P>, pair: f64) -> Option<f64> {
    let keys = bench.cell.subject.keys.min(1_000_000);
    bench.fresh(LATER, keys / 2, bench.limit(), false);
    let before = probe::written_bytes(process::id())?;
    let pass = bench.fresh(LATER + keys / 2, keys, bench.limit(), false);
    let dirtied = probe::written_bytes(process::id())? - before;
    Some(dirtied as f64 / (pass.ops as f64 * pair))
}

fn latency<P: Peer>(cell: &Cell) -> Result<Report> {
    let (setup, answers) = (setup(cell), Answers::new(cell.subject.answer_len));
    let peer = open::<P>(&setup)?;
    let bench = Bench { peer: &*peer, cell, answers: &answers, watch: &setup.watch };
    let pass = bench.fresh(0, cell.subject.keys, bench.limit(), true);
    Ok(Report::Readings(vec![Reading { latency: pass.latency(), ..bench.reading(Workload::Fresh, pass.ops) }]))
}

/// All threads walk the same new keys; whoever reserves one completes it.
fn herd<P: Peer>(cell: &Cell) -> Result<Report> {
    let (setup, answers) = (setup(cell), Answers::new(cell.subject.answer_len));
    let peer = open::<P>(&setup)?;
    let bench = Bench { peer: &*peer, cell, answers: &answers, watch: &setup.watch };
    let keys = if cell.subject.is_slow() { cell.subject.keys.min(SLOW_HERD) } else { cell.subject.keys };
    let winners = parking_lot::Mutex::new(vec![0_u8; keys as usize]);
    let pass = bench.pass(|_, session| {
        let mut won = Vec::with_capacity(keys as usize);
        let share = take_turns(keys, Duration::MAX, false, |i| {
            let asked = bench.asked(i);
            if let Decision::Fresh(ticket) = session.reserve(asked.key(), &asked.fingerprint) {
                session.complete(ticket, asked.key(), &asked.fingerprint, answers.answer(i));
                won.push(i);
            }
        });
        let mut winners = winners.lock();
        won.iter().for_each(|i| winners[*i as usize] = winners[*i as usize].saturating_add(1));
        share
    });
    let one_owner_each = winners.into_inner().iter().all(|owners| *owners == 1);
    Ok(Report::Readings(vec![Reading {
        rate: Some(keys as f64 / pass.seconds),
        one_owner_each: Some(one_owner_each),
        ..bench.reading(Workload::Herd, keys)
    }]))
}

/// Fills and reclaims twice: with nothing beside, and beside FRESH.
fn expire<P: Peer>(cell: &Cell) -> Result<Report> {
    let (setup, answers) = (setup(cell), Answers::new(cell.subject.answer_len));
    let peer = open::<P>(&setup)?;
    let bench = Bench { peer: &*peer, cell, answers: &answers, watch: &setup.watch };
    let reclaim = peer.reclaims().ok_or("it has no expiry of its own")?;
    let limit = if reclaim.follows_wall_clock() { Duration::from_secs_f64(2.0 * cell.limit_s) } else { bench.limit() };
    let fill_ms = limit.as_millis() as u64 + 1000;
    let arm = |fill_ms| {
        if reclaim.follows_wall_clock() {
            bench.watch.all_due_in(fill_ms);
        }
    };
    let fall_due = || match reclaim.follows_wall_clock() {
        true => bench.watch.wait_until_due(),
        false => bench.watch.pass_retention(),
    };

    arm(fill_ms);
    let alone = bench.fill(0, limit)?;
    peer.settle();
    fall_due();
    let start = Instant::now();
    reclaim.reclaim(alone, true);
    let ns_a_key = start.elapsed().as_nanos() as f64 / alone as f64;

    arm(fill_ms + BEFORE_DUE.as_millis() as u64);
    let beside = bench.fill(alone, limit)?;
    peer.settle();
    let from = alone + beside;
    let before = bench.fresh(from, u64::MAX / 2, BEFORE_DUE, true);
    fall_due();
    let is_over = AtomicBool::new(false);
    let start = Instant::now();
    let (during, took) = std::thread::scope(|scope| {
        let reclaiming = scope.spawn(|| {
            reclaim.reclaim(beside + before.ops, false);
            is_over.store(true, Ordering::Relaxed);
            start.elapsed()
        });
        let mut histogram = histogram();
        let mut session = peer.session();
        let mut last = Instant::now();
        let mut turn = from + before.ops;
        // At least so many that the last percentile means something.
        while !is_over.load(Ordering::Relaxed) || histogram.len() < 1000 {
            bench.fresh_one(&mut session, turn);
            let now = Instant::now();
            histogram.record((now - last).as_nanos() as u64).expect("the histogram resizes itself");
            (turn, last) = (turn + 1, now);
        }
        let ops = histogram.len();
        let pass = Pass { ops, turns: ops, seconds: start.elapsed().as_secs_f64(), histogram: Some(histogram) };
        (pass, reclaiming.join().expect("a thread ends well"))
    });
    let latency = |pass: &Pass| pass.latency().ok_or("each was timed");
    let expiry = Expiry {
        ns_a_key,
        rate_before: before.rate(),
        before: latency(&before)?,
        rate_during: during.rate(),
        during: latency(&during)?,
        took_s: took.as_secs_f64(),
    };
    Ok(Report::Readings(vec![Reading { expiry: Some(expiry), ..bench.reading(Workload::Expire, alone) }]))
}

fn fill<P: Peer>(cell: &Cell) -> Result<Report> {
    let (setup, answers) = (setup(cell), Answers::new(cell.subject.answer_len));
    let peer = open::<P>(&setup)?;
    let bench = Bench { peer: &*peer, cell, answers: &answers, watch: &setup.watch };
    let done = bench.fresh(0, cell.subject.keys, bench.limit(), false).ops;
    crate::say(&Report::Filled(bench.top_up(0, done)?));
    // Until it is killed, with all threads of the peer running.
    loop {
        std::thread::park();
    }
}

fn reopen<P: Peer>(cell: &Cell, filled: u64) -> Result<Report> {
    let answers = Answers::new(cell.subject.answer_len);
    let setup = setup(cell);
    let start = Instant::now();
    let peer = open::<P>(&setup)?;
    let bench = Bench { peer: &*peer, cell, answers: &answers, watch: &setup.watch };
    let mut session = peer.session();
    let mut holds = |i| {
        let asked = bench.asked(i);
        session.holds(asked.key(), &asked.fingerprint, answers.answer(i))
    };
    let mut numbers = std::iter::once(filled - 1).chain((1..CHECKED).map(|turn| mix(turn) % filled));
    let mut lost = 0;
    let mut seconds = None;
    for i in &mut numbers {
        if holds(i) {
            seconds.get_or_insert_with(|| start.elapsed().as_secs_f64());
        } else {
            lost += 1;
        }
    }
    let reopening = seconds.map(|seconds| Reopening { seconds, checked: CHECKED, lost });
    Ok(Report::Readings(vec![Reading { reopening, ..bench.reading(Workload::Reopen, filled) }]))
}
