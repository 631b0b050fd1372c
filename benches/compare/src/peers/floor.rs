//! Not an engine: the least that reserving and completing can cost on this machine, to hold the others against.
//!
//! Tables of a size that suits from the start, over records in one arena whose pages were all touched before the clock
//! started. It never grows, expires, compacts or recovers. In memory the arena is anonymous; `kill -9` safe it is a
//! mapped file and each record has a checksum; power-loss safe, callers wait for an `fdatasync` that one of them does
//! for all.
//!
//! ```text
//! slot    hash (8)  offset of the newest record (8, 0: vacant)
//! record  crc (4)  key length (2)  completed (2)  answer length (8)  fingerprint (16)  until (8)  key  answer
//! ```
//!
//! Invariants: (F1) every offset in a slot is that of a whole record in the arena, written before the slot was, under
//! the shard's lock; (F2) bytes of the arena are written once, by the thread that was given them by `next`, and only
//! read after that; (F3) a slot's index is less than its table's length.
#![allow(unsafe_code, reason = "records are written and read in place")]

use crate::cell::Level;
use crate::peer::{Decision, Peer, Result, Session, Setup};
use crate::workload::{Watch, touch};
use foldhash::fast::FixedState;
use memmap2::{Advice, MmapMut, MmapOptions, MmapRaw};
use oncekey::Clock;
use parking_lot::{Condvar, Mutex};
use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, Hasher};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const SHARDS: usize = 64;
/// What a shard takes of the arena at a time.
const CHUNK: usize = 1 << 16;
const HEAD: usize = 40;
const PAGE: usize = 4096;

struct Shard {
    slots: MmapMut,
    mask: usize,
    /// Where the next record goes, and the end of the shard's chunk.
    at: usize,
    end: usize,
}

// Two lines, for the processor prefetches them in pairs.
#[repr(align(128))]
struct Padded(Mutex<Shard>);

pub struct Floor {
    shards: Vec<Padded>,
    arena: MmapRaw,
    next: AtomicUsize,
    hash: FixedState,
    has_checksums: bool,
    commit: Option<Commit>,
    watch: Arc<Watch>,
}

/// Syncs that waiting callers share.
struct Commit {
    file: File,
    /// Tickets drawn after their records were written.
    written: AtomicUsize,
    state: Mutex<Synced>,
    done: Condvar,
}

#[derive(Default)]
struct Synced {
    /// The last ticket that is durable.
    up_to: usize,
    is_running: bool,
}

/// A record as it lies in the arena.
struct Found<'a> {
    key: &'a [u8],
    is_completed: bool,
    fingerprint: [u8; 16],
    until_ms: u64,
    answer: &'a [u8],
}

impl Shard {
    #[inline]
    fn slot(&mut self, i: usize) -> &mut (u64, u64) {
        // SAFETY: F3, and the mapping is page-aligned, zeroed, and `&mut self` is the only way to it.
        unsafe { &mut *self.slots.as_mut_ptr().cast::<(u64, u64)>().add(i) }
    }
}

impl Peer for Floor {
    type Session<'a> = &'a Self;

    fn open(setup: &Setup) -> Result<Self> {
        let key_len = setup.key_form.len();
        let pair = 2 * (HEAD + key_len).next_multiple_of(8) + setup.answer_len.next_multiple_of(8);
        let len = setup.capacity as usize * pair + 4 * SHARDS * (CHUNK + pair);
        let (arena, file) = match setup.level {
            Level::Memory => (MmapRaw::from(huge(len)?), None),
            Level::Kill | Level::Power => {
                let (arena, file) = mapped(setup, len)?;
                (arena, Some(file))
            }
        };
        let slots = (setup.capacity as usize * 2 / SHARDS).next_power_of_two().max(64);
        let shard = || Ok(Padded(Mutex::new(Shard { slots: huge(slots * 16)?, mask: slots - 1, at: 0, end: 0 })));
        let shards = (0..SHARDS).map(|_| shard()).collect::<Result<_>>()?;
        let commit = file.filter(|_| setup.level == Level::Power).map(|file| Commit {
            file,
            written: AtomicUsize::new(0),
            state: Mutex::default(),
            done: Condvar::new(),
        });
        Ok(Floor {
            shards,
            arena,
            next: AtomicUsize::new(64),
            hash: FixedState::with_seed(7),
            has_checksums: setup.level != Level::Memory,
            commit,
            watch: Arc::clone(&setup.watch),
        })
    }

    fn session(&self) -> &Self {
        self
    }
}

/// Zeroed memory, on huge pages where the kernel gives them, touched.
fn huge(len: usize) -> Result<MmapMut> {
    let map = MmapOptions::new().len(len).map_anon()?;
    map.advise(Advice::HugePage)?;
    map.advise(Advice::PopulateWrite)?;
    Ok(map)
}

/// A file of zeros, mapped, with each page touched for writing.
fn mapped(setup: &Setup, len: usize) -> Result<(MmapRaw, File)> {
    let path = setup.dir.join("floor");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
    if setup.level == Level::Power {
        // Small writes make small folios of the page cache. In a large one each record dirties up to 2 MiB, which a
        // sync has to write.
        for at in (0..len).step_by(PAGE) {
            file.write_all_at(&[0; PAGE], at as u64)?;
        }
        file.sync_all()?;
    } else {
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, len as u64)?;
    }
    let map = MmapOptions::new().len(len).populate().map_raw(&file)?;
    for at in (0..len).step_by(PAGE) {
        // SAFETY: inside of the mapping, which nobody else knows yet.
        unsafe { map.as_mut_ptr().add(at).write_volatile(0) };
    }
    file.sync_all()?;
    Ok((map, file))
}

impl Floor {
    #[inline]
    fn hash(&self, key: &[u8]) -> u64 {
        let mut hasher = self.hash.build_hasher();
        hasher.write(key);
        hasher.finish()
    }

    #[inline]
    fn shard(&self, hash: u64) -> &Mutex<Shard> {
        &self.shards[(hash >> 58) as usize].0
    }

    /// Takes `len` bytes of the arena.
    #[inline]
    fn allocate(&self, shard: &mut Shard, len: usize) -> usize {
        // With syncs all shards share one tail: what a sync writes lies in a row.
        if self.commit.is_some() || len > CHUNK {
            let at = self.next.fetch_add(len, Ordering::Relaxed);
            assert!(at + len <= self.arena.len(), "the arena is full");
            return at;
        }
        if shard.at + len > shard.end {
            shard.at = self.next.fetch_add(CHUNK, Ordering::Relaxed);
            shard.end = shard.at + CHUNK;
            assert!(shard.end <= self.arena.len(), "the arena is full");
        }
        shard.at += len;
        shard.at - len
    }

    /// Writes a record; an answer makes it a completed one.
    #[inline]
    fn append(
        &self,
        shard: &mut Shard,
        key: &[u8],
        fingerprint: &[u8; 16],
        until_ms: u64,
        answer: Option<&[u8]>,
    ) -> u64 {
        let is_completed = answer.is_some();
        let answer = answer.unwrap_or_default();
        let len = HEAD + key.len() + answer.len();
        let at = self.allocate(shard, len.next_multiple_of(8));
        // SAFETY: F2: `allocate` gave `len` bytes of the arena to this thread alone, and nobody reads them before the
        // slot says where they are.
        let record = unsafe { std::slice::from_raw_parts_mut(self.arena.as_mut_ptr().add(at), len) };
        record[4..6].copy_from_slice(&(key.len() as u16).to_le_bytes());
        record[6..8].copy_from_slice(&u16::from(is_completed).to_le_bytes());
        record[8..16].copy_from_slice(&(answer.len() as u64).to_le_bytes());
        record[16..32].copy_from_slice(fingerprint);
        record[32..40].copy_from_slice(&until_ms.to_le_bytes());
        record[HEAD..HEAD + key.len()].copy_from_slice(key);
        record[HEAD + key.len()..].copy_from_slice(answer);
        if self.has_checksums {
            let checksum = crc32c::crc32c(&record[4..]);
            record[..4].copy_from_slice(&checksum.to_le_bytes());
        }
        at as u64
    }

    #[inline]
    fn record(&self, at: u64) -> Found<'_> {
        // SAFETY: F1: a whole head lies there, and F2: nobody writes to it any more.
        let head = unsafe { &*self.arena.as_ptr().add(at as usize).cast::<[u8; HEAD]>() };
        let key_len = usize::from(u16::from_le_bytes([head[4], head[5]]));
        let answer_len = u64::from_le_bytes(*head[8..].first_chunk().expect("a head is longer")) as usize;
        // SAFETY: F1: key and answer follow the head.
        let body =
            unsafe { std::slice::from_raw_parts(self.arena.as_ptr().add(at as usize + HEAD), key_len + answer_len) };
        let (key, answer) = body.split_at(key_len);
        Found {
            key,
            is_completed: head[6] != 0,
            fingerprint: *head[16..].first_chunk().expect("a head is longer"),
            until_ms: u64::from_le_bytes(*head[32..].first_chunk().expect("a head is longer")),
            answer,
        }
    }

    /// The key's slot, with its record, or the vacant slot where it belongs.
    #[inline]
    fn find(&self, shard: &mut Shard, hash: u64, key: &[u8]) -> (usize, Option<Found<'_>>) {
        let mut i = hash as usize & shard.mask;
        loop {
            let (found, at) = *shard.slot(i);
            if at == 0 {
                return (i, None);
            }
            if found == hash {
                let record = self.record(at);
                if record.key == key {
                    return (i, Some(record));
                }
            }
            i = (i + 1) & shard.mask;
        }
    }

    /// Returns when all that this thread wrote is durable.
    fn make_durable(&self) {
        let Some(commit) = &self.commit else { return };
        // Release: the record before the ticket; pairs with the acquire of the thread that syncs.
        let mine = commit.written.fetch_add(1, Ordering::AcqRel) + 1;
        let mut state = commit.state.lock();
        while state.up_to < mine {
            if state.is_running {
                commit.done.wait(&mut state);
                continue;
            }
            state.is_running = true;
            drop(state);
            let up_to = commit.written.load(Ordering::Acquire);
            commit.file.sync_data().expect("the disk is good");
            state = commit.state.lock();
            *state = Synced { up_to, is_running: false };
            commit.done.notify_all();
        }
    }
}

impl Session for &Floor {
    type Ticket = ();

    #[inline]
    fn reserve(&mut self, key: &[u8], fingerprint: &[u8; 16]) -> Decision<()> {
        let now_ms = self.watch.now_ms();
        let hash = self.hash(key);
        {
            let shard = &mut *self.shard(hash).lock();
            let (i, found) = self.find(shard, hash, key);
            if let Some(found) = found {
                assert!(found.fingerprint == *fingerprint && found.until_ms > now_ms, "nothing expires here");
                return if found.is_completed { Decision::Replay(touch(found.answer)) } else { Decision::InFlight };
            }
            let at = self.append(shard, key, fingerprint, now_ms + crate::workload::LEASE_MS, None);
            *shard.slot(i) = (hash, at);
        }
        self.make_durable();
        Decision::Fresh(())
    }

    #[inline]
    fn complete(&mut self, _ticket: (), key: &[u8], fingerprint: &[u8; 16], answer: &[u8]) {
        let hash = self.hash(key);
        {
            let shard = &mut *self.shard(hash).lock();
            let (i, found) = self.find(shard, hash, key);
            assert!(found.is_some(), "the key is reserved");
            let at = self.append(shard, key, fingerprint, self.watch.kept_until_ms(), Some(answer));
            shard.slot(i).1 = at;
        }
        self.make_durable();
    }

    fn holds(&mut self, key: &[u8], _fingerprint: &[u8; 16], answer: &[u8]) -> bool {
        let hash = self.hash(key);
        let (_, found) = self.find(&mut self.shard(hash).lock(), hash, key);
        found.is_some_and(|found| found.is_completed && found.answer == answer)
    }
}
