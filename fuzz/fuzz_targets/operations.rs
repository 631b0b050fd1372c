//! Operations of the whole API against a model, with crashes, failing disks and reopening.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[allow(dead_code, reason = "shared with the integration tests, which use more of it")]
#[path = "../../tests/sim/world.rs"]
mod world;

use world::{OP_LEN, Op, World};

fuzz_target!(|input: &[u8]| {
    let Some((first, rest)) = input.split_first() else { return };
    let ops: Vec<Op> = rest.as_chunks::<OP_LEN>().0.iter().take(400).map(|bytes| Op::decode(*bytes)).collect();
    World::run(first & 1 == 1, &ops);
});
