//! Random operations of the whole API against a model, with restarts, process death, power cuts and failing disks.
//!
//! `ONCEKEY_CASES` sets how many runs there are.

#[path = "../sim/world.rs"]
mod world;

use oncekey::testing::DiskOp;
use proptest::collection::vec;
use proptest::prelude::*;
use std::fmt;
use world::{OP_LEN, Op, Restart, World};

/// Operations, printed one a line.
#[derive(Clone)]
struct Run(Vec<Op>);

impl fmt::Debug for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|op| write!(f, "\n    Op::{op:?},"))
    }
}

fn cases() -> u32 {
    std::env::var("ONCEKEY_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(256)
}

fn runs() -> impl Strategy<Value = Run> {
    vec(any::<[u8; OP_LEN]>().prop_map(Op::decode), 1..200).prop_map(Run)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn a_store_answers_as_its_model_whatever_happens_to_it(collide in any::<bool>(), run in runs()) {
        World::run(collide, &run.0);
    }
}

fn reserve(key: u8) -> Op {
    Op::Reserve { key, payload: 1, lease_ms: 30_000, kept_ms: Some(60_000), synced: false, auto_renew: false }
}

fn restart(how: Restart, seed: u64) -> Op {
    Op::Restart { how, seed, failing: None }
}

/// Found by the model: a segment of which no sector got through was taken for a spare.
#[test]
fn fences_grow_over_a_power_cut_that_leaves_nothing() {
    World::run(false, &[reserve(0), Op::Release { guard: 0 }, restart(Restart::Cut, 3), reserve(0)]);
}

/// Found by the model: only the last of the torn records was cut off, and the others stood behind the seal.
#[test]
fn several_torn_answers_are_no_corruption_at_the_opening_after_next() {
    for seed in 0..400 {
        let answer = Op::Complete { guard: 0, len: 3_000 };
        let [cut, death] = [restart(Restart::Cut, seed), restart(Restart::Death, 0)];
        World::run(false, &[reserve(0), reserve(1), answer, answer, cut, reserve(0), death]);
    }
}

/// Found by the model: recovery believed what an earlier failed sync had left in the page cache.
#[test]
fn a_failed_sync_before_a_restart_does_not_make_a_later_power_cut_corruption() {
    for op in [DiskOp::Sync, DiskOp::Overwrite] {
        for after in 0..8 {
            let answer = Op::Complete { guard: 0, len: 3_000 };
            let failing = Op::Restart { how: Restart::Cut, seed: 8 + after, failing: Some((op, after)) };
            World::run(false, &[reserve(0), answer, reserve(1), failing, reserve(2), restart(Restart::Cut, 3)]);
            let [failing, death] = [Op::Break { op, after }, restart(Restart::Death, 0)];
            let cut = restart(Restart::Cut, 3);
            World::run(false, &[reserve(0), answer, reserve(1), failing, Op::Sync, death, reserve(2), Op::Sync, cut]);
        }
    }
}

/// Found by the model: the last shard of a round used the budget up, and upkeep said that it was done.
#[test]
fn upkeep_that_ran_out_of_budget_says_so() {
    let short =
        Op::Reserve { key: 0, payload: 1, lease_ms: 30_000, kept_ms: Some(5), synced: false, auto_renew: false };
    let upkeep = Op::Maintain { budget: 1 };
    World::run(
        true,
        &[short, Op::Complete { guard: 0, len: 0 }, Op::Advance { ms: 5 }, upkeep, upkeep, upkeep, upkeep],
    );
}

/// Found by the model: a record whose write failed was counted out twice.
#[test]
fn a_reservation_that_could_not_be_written_leaves_the_counts_right() {
    for op in [DiskOp::Append, DiskOp::Sync] {
        for after in 0..3 {
            let synced =
                Op::Reserve { key: 1, payload: 1, lease_ms: 1_000, kept_ms: None, synced: true, auto_renew: false };
            World::run(false, &[reserve(0), Op::Break { op, after }, synced, reserve(2), restart(Restart::Death, 0)]);
        }
    }
}

/// Found by the model: upkeep failed between a removal and its sync, and the power cut brought the segment back.
#[test]
fn an_erased_key_does_not_come_back_with_a_segment_whose_removal_was_not_durable() {
    let answered = |key, kept_ms| {
        let kept_ms = Some(kept_ms);
        let reserve = Op::Reserve { key, payload: 1, lease_ms: 30_000, kept_ms, synced: false, auto_renew: false };
        [reserve, Op::Complete { guard: 0, len: 40 }]
    };
    for after in 0..6 {
        let ops = [
            &answered(5, 500)[..],
            &answered(6, 9_000),
            &answered(7, 60_000),
            &[restart(Restart::Close, 0), reserve(0), Op::Advance { ms: 100_000 }],
            &[Op::Break { op: DiskOp::Remove, after }, Op::Maintain { budget: usize::MAX }],
            &[Op::Erase { key: 5 }, Op::Erase { key: 6 }, Op::Erase { key: 7 }, restart(Restart::CloseAndCut, 3)],
        ];
        World::run(false, &ops.concat());
    }
}

/// Found by the simulation: a seal without its copy in the head, after which zeros over all records were taken for a spare.
#[test]
fn a_seal_whose_writing_was_cut_short_is_repeated_in_the_head() {
    for (after, seed) in (0..6).flat_map(|after| (0..6).map(move |seed| (after, seed))) {
        let failing = Op::Restart { how: Restart::Death, seed, failing: Some((DiskOp::Overwrite, after)) };
        let mut world = World::new(false);
        for op in [reserve(4), Op::Sync, failing, restart(Restart::Close, 0)] {
            world.step(op);
        }
        let files = world.disk.files();
        let segments = files.iter().filter(|(name, _)| name.ends_with(".seg"));
        let used = segments.map(|(name, _)| world.disk.contents(name).expect("it was just listed"));
        for bytes in used.filter(|bytes| bytes[4096..].iter().any(|byte| *byte != 0)) {
            assert_eq!(bytes[64], 0x52, "the head does not say that the segment is sealed, after {after}");
        }
    }
}

/// Found by the simulation: a note whose sync had failed was followed at the next opening before it was durable.
#[test]
fn records_are_not_overwritten_by_a_note_that_a_power_cut_may_take() {
    for (syncs, writes) in (0..12).flat_map(|syncs| (0..5).map(move |writes| (syncs, writes))) {
        for seed in 56_532..56_540 {
            let point = Op::Point { guard: 0, len: 3_000 };
            let failing = Op::Break { op: DiskOp::Sync, after: syncs };
            let reopen = Op::Restart { how: Restart::Death, seed, failing: Some((DiskOp::Overwrite, writes)) };
            let close = restart(Restart::Close, 0);
            World::run(
                false,
                &[reserve(15), point, Op::Release { guard: 0 }, close, failing, Op::Erase { key: 15 }, reopen],
            );
        }
    }
}
