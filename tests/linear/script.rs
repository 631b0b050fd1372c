//! What the callers of one history are to do, by chance.

use crate::caller::{KEYS, Op};
use fastrand::Rng;

/// What a history may contain beside the calls.
#[derive(Clone, Copy, Debug)]
pub struct Taste {
    pub callers: usize,
    pub steps: usize,
    /// Whether the store may be closed or die in the middle.
    pub restarts: Option<Restarts>,
    /// Whether callers do upkeep themselves.
    pub maintains: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restarts {
    Close,
    CloseOrDie,
}

/// What each caller is to do.
pub type Script = Vec<Vec<Op>>;

/// Writes a script; one of the callers restarts the store at most once.
pub fn write(rng: &mut Rng, taste: Taste) -> Script {
    let callers = rng.usize(2..=taste.callers);
    // One key for most histories: there they meet.
    let keys = if rng.u8(..5) == 0 { KEYS } else { 1 };
    let steps = taste.steps.min(14 / callers);
    let mut scripts: Script = (0..callers)
        .map(|_| {
            let reserve = op_reserve(rng, keys);
            let rest = rng.usize(1..steps);
            std::iter::once(reserve).chain((0..rest).map(|_| op(rng, keys, taste.maintains))).collect()
        })
        .collect();
    if let Some(restarts) = taste.restarts
        && rng.u8(..4) == 0
    {
        let (caller, dies) = (rng.usize(..callers), restarts == Restarts::CloseOrDie && rng.bool());
        let at = rng.usize(..=scripts[caller].len());
        scripts[caller].insert(at, if dies { Op::Die } else { Op::Close });
    }
    scripts
}

fn op_reserve(rng: &mut Rng, keys: u8) -> Op {
    Op::Reserve {
        key: rng.u8(..keys),
        payload: u8::from(rng.u8(..5) == 0),
        has_short_lease: rng.u8(..5) < 2,
        is_renewed: rng.u8(..16) == 0,
        is_kept: rng.u8(..3) > 0,
    }
}

fn op(rng: &mut Rng, keys: u8, maintains: bool) -> Op {
    match rng.u8(..100) {
        0..28 => op_reserve(rng, keys),
        28..40 => Op::Complete,
        40..43 => Op::Fail,
        43..52 => Op::Release,
        52..56 => Op::Renew { is_short: rng.bool() },
        56..61 => Op::Point { is_empty: rng.u8(..4) == 0 },
        61..64 => Op::Drop,
        64..71 => Op::Get { key: rng.u8(..keys) },
        71..74 => Op::Erase { key: rng.u8(..keys) },
        74 => Op::EraseScope,
        75..85 => Op::Wait,
        85..88 => Op::Poll,
        88..91 if maintains => Op::Maintain,
        88.. => Op::Advance { ms: *rng.choice(&[1, 4, 5, 20]).expect("one of them") },
    }
}
