//! What happens to a key from beginning to end, by its number, and what of it has to be found again.
//!
//! Each step that the store acknowledges leads to the next stage. After whatever went wrong, a key has to be in the stage
//! that was acknowledged last, or in a later one: steps that were under way may have been done.

use oncekey::{Durability, Error, ErrorKind, Outcome, Request, Retention, Store};
use std::collections::BTreeMap;
use std::time::Duration;

/// Stands in every key and answer of the rig, so that their blocks are known on the disk.
pub const MARK: &str = "rig:";

/// How a key can be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// As if it had never been used.
    Vacant,
    /// Reserved, or left by its owner.
    Held,
    /// Held, with a recovery point.
    Noted,
    Done,
    Failed,
}

/// One key of the rig.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Life {
    pub who: String,
    pub number: u64,
}

impl Life {
    pub fn parse(name: &str) -> Option<Life> {
        let (who, number) = name.strip_prefix(MARK)?.rsplit_once('/')?;
        Some(Life { who: who.to_owned(), number: number.parse().ok()? })
    }

    pub fn name(&self) -> String {
        format!("{MARK}{}/{}", self.who, self.number)
    }

    /// All stages, the one before its first step included.
    fn stages(&self) -> &'static [Stage] {
        use Stage::{Done, Failed, Held, Noted, Vacant};
        match self.number % 16 {
            0 | 8 => &[Vacant, Held, Vacant],
            1 => &[Vacant, Held],
            2 | 15 => &[Vacant, Held, Done, Vacant],
            3 => &[Vacant, Held, Failed],
            4 => &[Vacant, Held, Noted, Done],
            5 => &[Vacant, Held, Noted],
            _ => &[Vacant, Held, Done],
        }
    }

    /// Whether its answer expires nearly at once, which is its last step.
    fn expires(&self) -> bool {
        self.number % 16 == 15
    }

    fn request<'k>(&self, name: &'k str) -> Request<'k> {
        let retention = if self.expires() { Duration::from_millis(50) } else { Duration::from_secs(24 * 3600) };
        Request::new(name).fingerprint_of(name).retention(Retention::For(retention)).lease(Duration::from_secs(3600))
    }

    fn answer(&self) -> Vec<u8> {
        let times = 1 + self.number % 7 * (self.number % 5) * 4;
        format!("the answer to {} ", self.name()).repeat(times as usize).into_bytes()
    }

    /// Lives it through; `say` is told of each stage reached, with the fence.
    pub fn live(&self, store: &Store, durability: Durability, mut say: impl FnMut(usize, u64)) -> Result<(), Error> {
        let name = self.name();
        let request = self.request(&name).durability(durability);
        let mut owner = match store.reserve(&request)? {
            Outcome::Reserved(owner) => owner,
            other => panic!("{name} is new, and {other:?}"),
        };
        let fence = owner.fence();
        say(1, fence);
        let stages = self.stages();
        let last = stages.len() - 1;
        for (at, stage) in stages.iter().enumerate().skip(2) {
            match stage {
                Stage::Vacant if at == 2 => return owner.release().map_err(Error::from).inspect(|()| say(2, fence)),
                Stage::Noted => {
                    owner.recovery_point(&name)?;
                    say(at, fence);
                }
                Stage::Failed => {
                    owner.fail(self.answer()).map_err(Error::from)?;
                    say(at, fence);
                    return Ok(());
                }
                Stage::Done => {
                    owner.complete(self.answer()).map_err(Error::from)?;
                    say(at, fence);
                    if at == last || self.expires() {
                        return Ok(());
                    }
                    store.erase(&request)?;
                    say(last, fence);
                    return Ok(());
                }
                Stage::Vacant | Stage::Held => unreachable!("no life goes on so"),
            }
        }
        Ok(())
    }

    /// What of the acknowledged stage a look at the answer can show to be lost or wrong; changes nothing.
    fn look(&self, store: &Store, reached: usize) -> Result<(), String> {
        let name = self.name();
        let may = &self.stages()[reached..];
        let answer = store.get(&self.request(&name)).map_err(|error| format!("{name}: {error}"))?;
        match answer {
            None if may.iter().all(|stage| matches!(stage, Stage::Done | Stage::Failed)) => {
                Err(format!("{name} is lost: stage {reached} was acknowledged, and there is no answer"))
            }
            Some(_) if may.iter().all(|stage| *stage == Stage::Vacant) && !self.expires() => {
                Err(format!("{name} was released or erased, and has an answer"))
            }
            Some(record) if record.bytes() != self.answer() => Err(format!("{name} has another answer than its own")),
            Some(record) if record.is_failure() != may.contains(&Stage::Failed) => {
                Err(format!("{name} took its success for a failure, or the other way round"))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// As `look`, and also what asking for the key shows; the key is left as if nobody had asked.
    fn ask(&self, store: &Store, reached: usize, newest_fence: u64) -> Result<(), String> {
        self.look(store, reached)?;
        let name = self.name();
        let request = self.request(&name).durability(Durability::Buffered);
        let found = match store.reserve(&request).map_err(|error| format!("{name}: {error}"))? {
            Outcome::Reserved(owner) | Outcome::Interrupted(owner) if owner.fence() <= newest_fence => {
                return Err(format!("{name} has fence {}, after one of {newest_fence}", owner.fence()));
            }
            Outcome::Reserved(owner) => {
                owner.release().map_err(|error| format!("{name}: {error}"))?;
                Stage::Vacant
            }
            Outcome::Interrupted(owner) => match owner.last_recovery_point() {
                None => Stage::Held,
                Some(point) if point == name.as_bytes() => Stage::Noted,
                Some(_) => return Err(format!("{name} has another recovery point than its own")),
            },
            Outcome::Replay(record) if record.is_failure() => Stage::Failed,
            Outcome::Replay(_) => Stage::Done,
            other => return Err(format!("{name} is {other:?}")),
        };
        let may = &self.stages()[reached..];
        if may.contains(&found) {
            return Ok(());
        }
        Err(format!("{name} is {found:?}; acknowledged was {:?}, to come {:?}", may[0], &may[1..]))
    }
}

/// What was acknowledged.
#[derive(Clone, Debug, Default)]
pub struct Book {
    who: String,
    reached: BTreeMap<Life, usize>,
    pub newest_fence: u64,
}

impl Book {
    /// One whose keys are apart from those of others.
    pub fn of(who: &str) -> Book {
        Book { who: who.to_owned(), ..Book::default() }
    }

    pub fn note(&mut self, life: Life, stage: usize, fence: u64) {
        self.reached.insert(life, stage);
        self.newest_fence = self.newest_fence.max(fence);
    }

    /// Lives through so many keys more; stops at the first error.
    pub fn live(&mut self, store: &Store, durability: Durability, keys: u64) -> Result<(), Error> {
        for _ in 0..keys {
            let life = Life { who: self.who.clone(), number: self.reached.len() as u64 };
            let answer = life.live(store, durability, |stage, fence| self.note(life.clone(), stage, fence));
            // A key that failed is noted too, so that no number is used twice.
            self.reached.entry(life).or_insert(0);
            answer?;
        }
        Ok(())
    }

    /// Looks at all answers, which works in a store that only reads.
    pub fn look(&self, store: &Store) -> Result<(), String> {
        self.reached.iter().try_for_each(|(life, reached)| life.look(store, *reached))
    }

    /// Asks for all keys. Acknowledged fences have to stay below all new ones.
    pub fn ask(&self, store: &Store) -> Result<(), String> {
        self.reached.iter().try_for_each(|(life, reached)| life.ask(store, *reached, self.newest_fence))?;
        match store.verify() {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("verify: {error}")),
        }
    }

    /// One line a key, as it was acknowledged.
    pub fn lines(&self) -> String {
        self.reached
            .iter()
            .map(|(life, reached)| format!("{} {reached} {}\n", life.name(), self.newest_fence))
            .collect()
    }

    /// Takes a line of `lines`, or of what a worker acknowledges; whether it is one.
    pub fn take(&mut self, line: &str) -> bool {
        let mut words = line.split(' ');
        let (Some(name), Some(stage), Some(fence)) = (words.next(), words.next(), words.next()) else { return false };
        let (Some(life), Ok(stage), Ok(fence)) = (Life::parse(name), stage.parse(), fence.parse()) else {
            return false;
        };
        self.note(life, stage, fence);
        true
    }
}

/// Whether an error says that there is no room, as it should on a full disk.
pub fn is_full(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::Full)
}
