//! Random operations of the whole API against a model, with restarts, process death, power cuts and failing disks.
//!
//! `ONCEKEY_CASES` sets how many runs there are.

mod world;

use proptest::collection::vec;
use proptest::prelude::*;
use std::fmt;
use world::{OP_LEN, Op, World};

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
