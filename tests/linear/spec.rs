//! What a key promises to callers who come one after the other, written from the documentation and not from the engine; and
//! whether a history of callers who came at the same time could have been such a sequence.
//!
//! The search is that of Wing and Gong, "Testing and verifying concurrent objects" (1993), with Lowe's cache, as `todc-utils`
//! has it. It wants steps that lead to one state; some of ours lead to several, so its state is the set of those that a key
//! may be in. Keys don't touch each other, so each is checked by itself: linearizability is a local property.
//!
//! - **L1** A step that nobody was told the result of may have happened, or not. It never happens in a later life of the store.
//! - **L2** What a lease or retention allows is decided by what the call itself read from the clock. Anybody else, upkeep
//!   too, may have ended it before, as soon as the clock had got there.
//! - **L3** A verdict is two steps, its begin and its end: in between nobody can take the key over, whatever the time.
//! - **L4** Fences of a key grow, over restarts and erasures too.

use std::collections::BTreeSet;
use todc_utils::linearizability::WGLChecker;
use todc_utils::linearizability::history::{Action, History};
use todc_utils::specifications::Specification;

pub const NEVER: u64 = u64::MAX;

/// A stored answer, as a caller sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Answer {
    pub id: u64,
    pub is_failure: bool,
    pub attempt: u32,
}

/// What a caller was told, or did.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Told {
    Reserved {
        payload: u8,
        lease_end_ms: u64,
        fence: u64,
    },
    TookOver {
        payload: u8,
        lease_end_ms: u64,
        fence: u64,
        attempt: u32,
        point: Option<u64>,
    },
    Replay {
        payload: u8,
        answer: Answer,
    },
    InFlight {
        payload: u8,
        fence: u64,
    },
    Mismatch {
        payload: u8,
        stored: u8,
    },
    /// The owner begins to write.
    Began {
        fence: u64,
    },
    /// A write that was refused may have been begun before.
    MayHaveBegun {
        fence: u64,
    },
    Completed {
        fence: u64,
        answer: Answer,
        kept_until_ms: u64,
    },
    Released {
        fence: u64,
    },
    Pointed {
        fence: u64,
        point: Option<u64>,
        lease_end_ms: u64,
    },
    Renewed {
        fence: u64,
        lease_end_ms: u64,
    },
    Dropped {
        fence: u64,
    },
    Fenced {
        fence: u64,
    },
    Got(Option<Answer>),
    /// The operation that was waited for goes on.
    Running {
        fence: u64,
    },
    WaitedFor {
        fence: u64,
        answer: Answer,
    },
    MayRetry {
        fence: u64,
    },
    /// Whether there was anything, if that is known.
    Erased {
        found: Option<bool>,
    },
    /// The store was closed, or its process died, and was opened again.
    Restarted,
}

/// One step of a history of one key.
#[derive(Clone, Debug)]
pub struct Step {
    pub caller: usize,
    /// When it began and ended, in the order of all such moments.
    pub called: u64,
    pub returned: u64,
    /// In which life of the store.
    pub life: u32,
    /// What the call read from the clock at last, and where the clock stood when it returned.
    pub now_ms: u64,
    pub latest_ms: u64,
    pub is_certain: bool,
    pub told: Told,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Phase {
    Vacant,
    Reserved,
    Writing,
    Completed,
    Interrupted,
}

/// Where a key stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    life: u32,
    newest_fence: u64,
    phase: Phase,
    fence: u64,
    payload: u8,
    attempt: u32,
    deadline_ms: u64,
    point: Option<u64>,
    answer: Option<Answer>,
    /// What a crash may bring back of a key whose erasure had not returned.
    ghost: Option<Box<Key>>,
}

impl Key {
    fn new() -> Self {
        Key {
            life: 0,
            newest_fence: 0,
            phase: Phase::Vacant,
            fence: 0,
            payload: 0,
            attempt: 0,
            deadline_ms: NEVER,
            point: None,
            answer: None,
            ghost: None,
        }
    }

    fn vacated(&self) -> Self {
        Key { life: self.life, newest_fence: self.newest_fence, ..Key::new() }
    }

    fn interrupted(self) -> Self {
        Key { phase: Phase::Interrupted, deadline_ms: NEVER, ..self }
    }

    fn at(self, now_ms: u64) -> Self {
        match self.phase {
            Phase::Reserved if self.deadline_ms <= now_ms => self.interrupted(),
            Phase::Completed if self.deadline_ms <= now_ms => self.vacated(),
            Phase::Vacant | Phase::Reserved | Phase::Writing | Phase::Completed | Phase::Interrupted => self,
        }
    }

    fn is_of(&self, fence: u64) -> bool {
        self.phase != Phase::Vacant && self.fence == fence
    }

    fn is_owned_by(&self, fence: u64) -> bool {
        self.fence == fence && matches!(self.phase, Phase::Reserved | Phase::Interrupted)
    }

    fn is_written_by(&self, fence: u64) -> bool {
        self.fence == fence && self.phase == Phase::Writing
    }

    fn is_running(&self, fence: u64) -> bool {
        self.fence == fence && matches!(self.phase, Phase::Reserved | Phase::Writing)
    }

    fn is_used_for(&self, payload: u8) -> bool {
        self.phase != Phase::Vacant && self.payload == payload
    }

    /// The state after a step, if the step may be told of this state.
    fn after(self, step: &Step) -> Option<Key> {
        let key = match step.told {
            Told::Reserved { .. }
            | Told::TookOver { .. }
            | Told::Replay { .. }
            | Told::InFlight { .. }
            | Told::Mismatch { .. }
            | Told::Got(_)
            | Told::Running { .. }
            | Told::WaitedFor { .. }
            | Told::MayRetry { .. } => self.at(step.now_ms),
            Told::Began { .. }
            | Told::MayHaveBegun { .. }
            | Told::Completed { .. }
            | Told::Released { .. }
            | Told::Pointed { .. }
            | Told::Renewed { .. }
            | Told::Dropped { .. }
            | Told::Fenced { .. }
            | Told::Erased { .. }
            | Told::Restarted => self,
        };
        match step.told {
            Told::Reserved { payload, lease_end_ms, fence } => {
                let granted = Key {
                    phase: Phase::Reserved,
                    newest_fence: fence,
                    fence,
                    payload,
                    attempt: 1,
                    deadline_ms: lease_end_ms,
                    ..key.vacated()
                };
                (key.phase == Phase::Vacant && fence > key.newest_fence).then_some(granted)
            }
            Told::TookOver { payload, lease_end_ms, fence, attempt, point } => {
                let is_due = key.phase == Phase::Interrupted && key.payload == payload && fence > key.newest_fence;
                let is_told = attempt == key.attempt + 1 && point == key.point;
                (is_due && is_told).then_some(Key {
                    phase: Phase::Reserved,
                    newest_fence: fence,
                    fence,
                    attempt,
                    deadline_ms: lease_end_ms,
                    ..key
                })
            }
            Told::Replay { payload, answer } => {
                (key.is_used_for(payload) && key.phase == Phase::Completed && key.answer == Some(answer)).then_some(key)
            }
            Told::InFlight { payload, fence } => (key.is_used_for(payload) && key.is_running(fence)).then_some(key),
            Told::Mismatch { payload, stored } => (payload != stored && key.is_used_for(stored)).then_some(key),
            Told::Began { fence } => {
                key.is_owned_by(fence).then_some(Key { phase: Phase::Writing, deadline_ms: NEVER, ..key })
            }
            Told::MayHaveBegun { fence } if key.is_owned_by(fence) => {
                Some(Key { phase: Phase::Writing, deadline_ms: NEVER, ..key })
            }
            Told::MayHaveBegun { .. } => Some(key),
            Told::Completed { fence, answer, kept_until_ms } => {
                (key.is_written_by(fence) && answer.attempt == key.attempt).then_some(Key {
                    phase: Phase::Completed,
                    deadline_ms: kept_until_ms,
                    point: None,
                    answer: Some(answer),
                    ..key
                })
            }
            Told::Released { fence } => key.is_written_by(fence).then(|| key.vacated()),
            Told::Pointed { fence, point, lease_end_ms } => key.is_written_by(fence).then_some(Key {
                phase: Phase::Reserved,
                deadline_ms: lease_end_ms,
                point,
                ..key
            }),
            Told::Renewed { fence, lease_end_ms } => {
                key.is_owned_by(fence).then_some(Key { phase: Phase::Reserved, deadline_ms: lease_end_ms, ..key })
            }
            Told::Dropped { fence } if key.is_owned_by(fence) => Some(key.interrupted()),
            Told::Dropped { .. } => Some(key),
            Told::Fenced { fence } => (!key.is_owned_by(fence) && !key.is_written_by(fence)).then_some(key),
            Told::Got(answer) => {
                let stored = key.answer.filter(|_| key.phase == Phase::Completed);
                (stored == answer).then_some(key)
            }
            Told::Running { fence } => key.is_running(fence).then_some(key),
            Told::WaitedFor { fence, answer } => {
                (key.is_of(fence) && key.phase == Phase::Completed && key.answer == Some(answer)).then_some(key)
            }
            Told::MayRetry { fence } => (!key.is_of(fence) || key.phase == Phase::Interrupted).then_some(key),
            Told::Erased { found } => {
                found.is_none_or(|found| found == (key.phase != Phase::Vacant)).then(|| key.vacated())
            }
            Told::Restarted => Some(match key.phase {
                Phase::Vacant | Phase::Completed => key,
                Phase::Reserved | Phase::Writing | Phase::Interrupted => key.interrupted(),
            }),
        }
    }

    /// All states that a key may be in after a step.
    fn successors(&self, step: &Step) -> Vec<Key> {
        if step.life != self.life {
            // L1
            return if step.is_certain { Vec::new() } else { vec![self.clone()] };
        }
        let mut states = Vec::new();
        // L2
        for key in [self.clone(), self.clone().at(step.latest_ms)] {
            let Some(mut next) = key.clone().after(step) else { continue };
            if matches!(step.told, Told::Erased { .. }) && !step.is_certain {
                next.ghost = Some(Box::new(key));
            }
            if step.told == Told::Restarted {
                next.life += 1;
                if let Some(ghost) = next.ghost.take().filter(|_| next.phase == Phase::Vacant) {
                    let back = Key { life: next.life, newest_fence: next.newest_fence, ..*ghost };
                    states.push(if back.phase == Phase::Completed { back } else { back.interrupted() });
                }
            }
            states.push(next);
        }
        if !step.is_certain {
            states.push(self.clone());
        }
        states
    }
}

/// The promise, for a search that knows one state at a time.
struct Promise;

impl Specification for Promise {
    type State = Vec<Key>;
    type Operation = Step;

    fn init() -> Vec<Key> {
        vec![Key::new()]
    }

    fn apply(step: &Step, before: &Vec<Key>) -> (bool, Vec<Key>) {
        let mut after: Vec<Key> = Vec::new();
        for key in before.iter().flat_map(|key| key.successors(step)) {
            if !after.contains(&key) {
                after.push(key);
            }
        }
        (!after.is_empty(), after)
    }
}

/// Whether the steps of one key could have been taken one after the other.
pub fn is_linearizable(steps: &[Step]) -> bool {
    let mut moments: Vec<(u64, bool, usize)> = Vec::with_capacity(2 * steps.len());
    for (at, step) in steps.iter().enumerate() {
        moments.push((step.called, false, at));
        moments.push((step.returned, true, at));
    }
    if moments.is_empty() {
        return true;
    }
    moments.sort_unstable();
    // To the search each step is a process of its own; the moments say what it needs of the order.
    let actions = moments.into_iter().map(|(_, is_return, at)| {
        let step = steps[at].clone();
        (at, if is_return { Action::Response(step) } else { Action::Call(step) })
    });
    WGLChecker::<Promise>::is_linearizable(History::from_actions(actions.collect()))
}

/// A history that could not have been, cut where that shows first and without the reads that don't matter.
pub fn shrink(steps: &[Step]) -> Vec<Step> {
    let ends: BTreeSet<u64> = steps.iter().map(|step| step.returned).collect();
    let until = |end: u64| -> Vec<Step> {
        let begun = steps.iter().filter(|step| step.called < end).cloned();
        let open = |step: Step| match step.returned > end {
            true => Step { returned: NEVER, is_certain: false, ..step },
            false => step,
        };
        begun.map(open).collect()
    };
    let mut short = ends.into_iter().map(until).find(|steps| !is_linearizable(steps)).unwrap_or_else(|| steps.to_vec());
    let mut at = 0;
    while at < short.len() {
        let without = [&short[..at], &short[at + 1..]].concat();
        if (short[at].told.is_read() || !short[at].is_certain) && !is_linearizable(&without) {
            short = without;
        } else {
            at += 1;
        }
    }
    short
}

impl Told {
    /// Whether it changes nothing but what the time changes anyway.
    pub fn is_read(&self) -> bool {
        matches!(
            self,
            Told::Replay { .. }
                | Told::InFlight { .. }
                | Told::Mismatch { .. }
                | Told::Fenced { .. }
                | Told::Got(_)
                | Told::Running { .. }
                | Told::WaitedFor { .. }
                | Told::MayRetry { .. }
        )
    }
}
