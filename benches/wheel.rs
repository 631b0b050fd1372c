//! The timing wheel alone: what a key pays for its lease and its retention, and what the sweep pays to expire it.
//!
//! `cargo bench --features testing --bench wheel`. Each figure is for a batch of 100_000 entries, so 1 ms a batch
//! is 10 ns an entry. Entries are touched in an order unlike that of their insertion, as keys are, and the wheel
//! (2 MB) does not fit in a level 2 cache.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use oncekey::testing::{Step, TimerId, Wheel};

const ENTRIES: u32 = 100_000;
const NOW_MS: u64 = 1_700_000_000_000;
const LEASE_MS: u64 = 30_000;
const RETENTION_MS: u64 = 24 * 60 * 60 * 1000;

fn wheel(c: &mut Criterion) {
    let mut group = c.benchmark_group("wheel");
    group.throughput(Throughput::Elements(u64::from(ENTRIES)));
    let leases = deadlines(LEASE_MS);
    let retentions = deadlines(RETENTION_MS);

    group.bench_function("insert into a new wheel", |b| {
        b.iter_batched_ref(|| Wheel::new(NOW_MS), |wheel| fill(wheel, &leases), BatchSize::LargeInput);
    });

    group.bench_function("insert and remove beside 100_000 others", |b| {
        let (mut wheel, _) = filled(&retentions);
        b.iter(|| {
            for &deadline_ms in &leases {
                let id = wheel.insert(deadline_ms, 0);
                black_box(wheel.remove(id));
            }
        });
    });

    group.bench_function("reschedule from lease to retention", |b| {
        let order = shuffled();
        b.iter_batched_ref(
            || filled(&leases),
            |(wheel, ids)| {
                for (&at, &deadline_ms) in order.iter().zip(&retentions) {
                    wheel.reschedule(ids[at], deadline_ms);
                }
            },
            BatchSize::LargeInput,
        );
    });

    group.bench_function("reschedule within a slot", |b| {
        let (mut wheel, ids) = filled(&retentions);
        let order: Vec<_> = shuffled().into_iter().map(|at| (ids[at], retentions[at] ^ 1)).collect();
        b.iter(|| {
            for &(id, deadline_ms) in &order {
                wheel.reschedule(id, deadline_ms);
            }
        });
    });

    group.bench_function("expire, stepped at each wake", |b| {
        b.iter_batched_ref(
            || filled(&leases),
            |(wheel, _)| {
                while let Some(wake_ms) = wheel.next_wake_ms() {
                    expire(wheel, wake_ms);
                }
            },
            BatchSize::LargeInput,
        );
    });

    group.bench_function("expire, one late sweep over a day", |b| {
        b.iter_batched_ref(
            || filled(&retentions),
            |(wheel, _)| expire(wheel, NOW_MS + 2 * RETENTION_MS),
            BatchSize::LargeInput,
        );
    });

    group.bench_function("expire one full slot", |b| {
        let one_slot = vec![NOW_MS + LEASE_MS; ENTRIES as usize];
        b.iter_batched_ref(|| filled(&one_slot), |(wheel, _)| expire(wheel, NOW_MS + LEASE_MS), BatchSize::LargeInput);
    });

    group.bench_function("cascade from 2^50 ms ahead down to level 0", |b| {
        let far = deadlines(1 << 50);
        b.iter_batched_ref(|| filled(&far), |(wheel, _)| expire(wheel, u64::MAX), BatchSize::LargeInput);
    });

    group.bench_function("step with nothing due", |b| {
        let (mut wheel, _) = filled(&retentions);
        b.iter(|| {
            for _ in 0..ENTRIES {
                assert_eq!(wheel.step(black_box(NOW_MS)), Step::Idle);
            }
        });
    });

    group.finish();
}

/// Deadlines between one and two spans ahead, in no order.
fn deadlines(span_ms: u64) -> Vec<u64> {
    let offset_ms = |item: u64| item.wrapping_mul(0x9e37_79b9_7f4a_7c15) % span_ms;
    (0..u64::from(ENTRIES)).map(|item| NOW_MS + span_ms + offset_ms(item)).collect()
}

/// All positions once, each far from the last: 61_803 and 100_000 have no common factor.
fn shuffled() -> Vec<usize> {
    (0..u64::from(ENTRIES)).map(|i| (i * 61_803 % u64::from(ENTRIES)) as usize).collect()
}

fn filled(deadlines: &[u64]) -> (Wheel, Vec<TimerId>) {
    let mut wheel = Wheel::new(NOW_MS);
    let ids = fill(&mut wheel, deadlines);
    (wheel, ids)
}

fn fill(wheel: &mut Wheel, deadlines: &[u64]) -> Vec<TimerId> {
    (0..).zip(deadlines).map(|(item, &deadline_ms)| wheel.insert(deadline_ms, item)).collect()
}

fn expire(wheel: &mut Wheel, now_ms: u64) {
    loop {
        match wheel.step(now_ms) {
            Step::Fired(due) => _ = black_box(due),
            Step::Moved => {}
            Step::Idle => return,
        }
    }
}

criterion_group!(benches, wheel);
criterion_main!(benches);
