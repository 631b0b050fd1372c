//! The table without journal and wheel, against dashmap and against hashbrown under the same locks.
//!
//! Each maps 64-bit hashes to the 16 bytes of a slot. A million keys, medians of interleaved rounds.

#![allow(missing_docs, reason = "benches are not documented")]

use dashmap::DashMap;
use hashbrown::HashTable;
use oncekey::testing::ShardedTable;
use parking_lot::Mutex;
use std::hash::{BuildHasherDefault, Hasher};
use std::time::Instant;

const SHARDS: usize = 256;

/// What a slot holds, in maps that are not ours.
#[derive(Clone, Copy)]
struct Slot {
    lsn: u64,
    tag: u32,
    #[expect(dead_code, reason = "it takes up the place of a timer")]
    timer: u32,
}

trait Map {
    const NAME: &'static str;

    fn new() -> Self;
    fn insert(&self, hash: u64, lsn: u64);
    fn contains(&self, hash: u64, lsn: u64) -> bool;
    fn remove(&self, hash: u64, lsn: u64) -> bool;
    fn len_bytes(&self) -> usize;
}

impl Map for ShardedTable {
    const NAME: &'static str = "oncekey";

    fn new() -> Self {
        ShardedTable::new(SHARDS)
    }

    #[inline]
    fn insert(&self, hash: u64, lsn: u64) {
        ShardedTable::insert(self, hash, lsn);
    }

    #[inline]
    fn contains(&self, hash: u64, lsn: u64) -> bool {
        ShardedTable::contains(self, hash, lsn)
    }

    #[inline]
    fn remove(&self, hash: u64, lsn: u64) -> bool {
        ShardedTable::remove(self, hash, lsn)
    }

    fn len_bytes(&self) -> usize {
        ShardedTable::len_bytes(self)
    }
}

/// The keys are hashes already.
#[derive(Default)]
struct AsIs(u64);

impl Hasher for AsIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("only u64 is hashed");
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

type Dashmap = DashMap<u64, Slot, BuildHasherDefault<AsIs>>;

impl Map for Dashmap {
    const NAME: &'static str = "dashmap";

    fn new() -> Self {
        DashMap::default()
    }

    #[inline]
    fn insert(&self, hash: u64, lsn: u64) {
        DashMap::insert(self, hash, slot(hash, lsn));
    }

    #[inline]
    fn contains(&self, hash: u64, lsn: u64) -> bool {
        self.get(&hash).is_some_and(|slot| slot.lsn == lsn)
    }

    #[inline]
    fn remove(&self, hash: u64, lsn: u64) -> bool {
        self.remove_if(&hash, |_, slot| slot.lsn == lsn).is_some()
    }

    fn len_bytes(&self) -> usize {
        // Seven of eight buckets may be used; each has a control byte.
        self.capacity() / 7 * 8 * (size_of::<(u64, Slot)>() + 1)
    }
}

fn slot(hash: u64, lsn: u64) -> Slot {
    Slot { lsn, tag: (hash >> 32) as u32, timer: 0 }
}

/// Of the tag, which is all that is known when a table grows.
fn spread(tag: u32) -> u64 {
    u64::from(tag).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

struct Hashbrown(Box<[Mutex<HashTable<Slot>>]>);

impl Hashbrown {
    fn shard(&self, hash: u64) -> &Mutex<HashTable<Slot>> {
        &self.0[hash as usize % SHARDS]
    }
}

impl Map for Hashbrown {
    const NAME: &'static str = "hashbrown";

    fn new() -> Self {
        Hashbrown((0..SHARDS).map(|_| Mutex::default()).collect())
    }

    #[inline]
    fn insert(&self, hash: u64, lsn: u64) {
        let slot = slot(hash, lsn);
        self.shard(hash).lock().insert_unique(spread(slot.tag), slot, |slot| spread(slot.tag));
    }

    #[inline]
    fn contains(&self, hash: u64, lsn: u64) -> bool {
        let tag = (hash >> 32) as u32;
        self.shard(hash).lock().find(spread(tag), |slot| slot.tag == tag && slot.lsn == lsn).is_some()
    }

    #[inline]
    fn remove(&self, hash: u64, lsn: u64) -> bool {
        let tag = (hash >> 32) as u32;
        let mut shard = self.shard(hash).lock();
        let found = shard.find_entry(spread(tag), |slot| slot.tag == tag && slot.lsn == lsn);
        found.map(|found| found.remove()).is_ok()
    }

    fn len_bytes(&self) -> usize {
        self.0.iter().map(|shard| shard.lock().allocation_size()).sum()
    }
}

fn hash(i: u64) -> u64 {
    let mut z = (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn lsn(i: u64) -> u64 {
    (i + 1) * 8
}

const COLUMNS: [&str; 5] = ["insert", "hit", "miss", "remove", "B/key"];

/// One round: nanoseconds of each operation, and the bytes of a key when all are in.
fn measure<M: Map>(keys: u64) -> [f64; COLUMNS.len()] {
    let map = M::new();
    // Keys in another order than they were inserted in, each once where `keys` is a power of ten.
    let shuffled = |turn: u64| turn.wrapping_mul(0x9e37_79b1) % keys;
    let each = |operation: &mut dyn FnMut(u64)| {
        let start = Instant::now();
        (0..keys).for_each(operation);
        start.elapsed().as_nanos() as f64 / keys as f64
    };
    let insert = each(&mut |i| map.insert(hash(i), lsn(i)));
    let len_bytes = map.len_bytes() as f64 / keys as f64;
    let hit = each(&mut |turn| assert!(map.contains(hash(shuffled(turn)), lsn(shuffled(turn)))));
    let miss = each(&mut |turn| assert!(!map.contains(hash(keys + turn), lsn(keys + turn))));
    let remove = each(&mut |turn| assert!(map.remove(hash(shuffled(turn)), lsn(shuffled(turn)))));
    [insert, hit, miss, remove, len_bytes]
}

fn print<M: Map>(rounds: &[[f64; COLUMNS.len()]]) {
    print!("{:10}", M::NAME);
    for column in 0..COLUMNS.len() {
        let mut values: Vec<f64> = rounds.iter().map(|round| round[column]).collect();
        values.sort_by(f64::total_cmp);
        print!(" {:9.1}", values[values.len() / 2]);
    }
    println!();
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        return;
    }
    let measures = arguments.iter().any(|argument| argument == "--bench");
    let quick = !measures || arguments.iter().any(|argument| argument == "--test");
    let (keys, rounds) = if quick { (1_000, 1) } else { (1_000_000, 7) };
    let mut all: [Vec<_>; 3] = Default::default();
    for _ in 0..rounds {
        all[0].push(measure::<ShardedTable>(keys));
        all[1].push(measure::<Dashmap>(keys));
        all[2].push(measure::<Hashbrown>(keys));
    }
    println!("{keys} keys, 1 thread, median of {rounds} rounds; ns an operation");
    println!("{:10} {}", "", COLUMNS.map(|column| format!("{column:>9}")).join(" "));
    print::<ShardedTable>(&all[0]);
    print::<Dashmap>(&all[1]);
    print::<Hashbrown>(&all[2]);
}
