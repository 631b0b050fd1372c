//! What one history left.

use crate::caller::KEYS;
use crate::report;
use crate::script::Script;
use crate::spec::{self, NEVER, Step, Told};
use crate::world::Death;
use std::hash::{DefaultHasher, Hash, Hasher};

/// The steps of all callers of a history, each with its key.
#[derive(Debug, Default)]
pub struct Trace {
    /// The life of the store that it began in.
    pub life: u32,
    pub steps: Vec<(u8, Step)>,
}

/// What a history showed.
#[derive(Clone, Copy, Debug)]
pub struct Shown {
    /// Whether two callers were at one key at the same time.
    pub is_overlapping: bool,
    pub has_restart: bool,
    pub steps: usize,
    /// Stands for who was told what in which order.
    pub pattern: u64,
}

impl Trace {
    /// What the history showed, if it is linearizable; if not, a drawing of it.
    pub fn check(&self, deaths: &[Death], script: &Script) -> Result<Shown, String> {
        let mut is_overlapping = false;
        let mut pattern = DefaultHasher::new();
        for key in 0..KEYS {
            let steps = self.steps_of(key, deaths);
            is_overlapping |= do_overlap(&steps);
            steps.iter().for_each(|step| (step.caller, std::mem::discriminant(&step.told)).hash(&mut pattern));
            if !spec::is_linearizable(&steps) {
                let [short, whole] = [&spec::shrink(&steps), &steps].map(|steps| report::draw(steps));
                return Err(format!("not linearizable:\n{short}all of it:\n{whole}script: {script:?}"));
            }
        }
        Ok(Shown {
            is_overlapping,
            has_restart: self.steps.iter().any(|(_, step)| step.told == Told::Restarted),
            steps: self.steps.len(),
            pattern: pattern.finish(),
        })
    }

    /// The steps of one key in the order in which they were called, as those know who outlived the store's deaths.
    fn steps_of(&self, key: u8, deaths: &[Death]) -> Vec<Step> {
        let mut steps: Vec<Step> = Vec::new();
        for (_, step) in self.steps.iter().filter(|(of, _)| *of == key) {
            let mut step = step.clone();
            let death = deaths.iter().find(|death| death.life == step.life);
            if let Some(death) = death.filter(|death| step.told != Told::Restarted && step.returned > death.called) {
                // The dead heard no answer, and did nothing after.
                if step.called > death.returned || step.told.is_read() {
                    continue;
                }
                step.is_certain = false;
                step.returned = NEVER;
            }
            step.life -= self.life;
            steps.push(step);
        }
        steps.sort_by_key(|step| step.called);
        steps
    }
}

/// Whether two callers were at the key at the same time.
fn do_overlap(steps: &[Step]) -> bool {
    let others = |at: usize| steps[..at].iter().filter(move |step| step.caller != steps[at].caller);
    (0..steps.len()).any(|at| others(at).any(|step| step.returned > steps[at].called))
}
