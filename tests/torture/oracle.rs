//! What each key may be, by what was told of the operations on it, without knowing how the store works.
//!
//! Operations on a key overlap, and a line before and a line after say only that each took effect somewhere in between.
//! So a key has a set of *ways* in which everything so far may have come about, each with the state that it leads to.
//! An acknowledgement keeps those ways that agree with it (Wing and Gong, "Testing and verifying concurrent objects",
//! 1993, done as the story comes in); if none is left, the store broke its word. A crash may or may not have carried out
//! what was under way, and nothing else.
//!
//! - **O1** An operation that changes a key is tried early, before its own acknowledgement, only when that of another one
//!   arrives. What it was taken to answer then is compared when it does.
//! - **O2** Operations that only look are compared with all states since they began.
//! - **O3** An operation that failed changed nothing that can be seen, but for an erasure, which may have taken the key out;
//!   the journal may have it all the same, and a crash bring it out, unless something written later masks it.
//! - **O4** The time at which something took effect lies between the time before the call and the time at hand.

use crate::story::{Act, Answer, Came, Content, FIRST_SINGLE, Grant, Line, keys_beside};
use std::collections::{HashMap, HashSet, VecDeque};

/// Lines kept of each key.
const REMEMBERED: usize = 300;
/// Contents whose traces are looked for after an erasure, of each key the newest.
const TRACED: usize = 256;
const FOR_EVER: u64 = u64::MAX;

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// With what an erasure under way took out, and its number: a crash can bring that back.
    Vacant(Option<(u64, Box<State>)>),
    Held(Held),
    Done(Done),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    /// The operation that it was granted to.
    owner: u64,
    /// 0 until it is told.
    fence: u64,
    attempt: u32,
    print: u8,
    point: Option<Content>,
    /// When the lease ends, at the earliest and latest.
    lease: (u64, u64),
    /// Its owner let go, or died.
    gone: bool,
    /// How many lines of the story there were when its owner was told.
    since: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Done {
    answer: Content,
    failure: bool,
    attempt: u32,
    /// When its retention ends, at the earliest and latest.
    until: (u64, u64),
    print: u8,
    fence: u64,
    since: u64,
}

/// An operation under way.
#[derive(Clone, Debug)]
struct Op {
    op: u64,
    at: u64,
    act: Act,
    /// How many lines of the story there were when it began.
    since: u64,
    /// No later grant may have a fence that isn't above this.
    floor: u64,
    /// O2: the states that were or became possible under its eyes, if those changed.
    seen: Vec<State>,
    /// Reservations whose owner had something to write under its eyes, so that their leases don't count.
    writing: Vec<u64>,
    /// Nothing else was done with the key meanwhile.
    alone: bool,
}

/// One way in which things may have come about.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Way {
    state: State,
    /// O1: operations that have taken effect in it already, and what they have to answer.
    early: Vec<(u64, Early)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Early {
    Granted { interrupted: bool, attempt: u32, point: Option<Content> },
    Carried,
}

#[derive(Clone)]
struct Key {
    ways: Vec<Way>,
    under_way: Vec<Op>,
    /// O3: what the key may be after a crash beside that.
    doubts: Vec<State>,
    /// Operations whose content may be in a file.
    written: VecDeque<u64>,
    lines: VecDeque<Line>,
    left_out: u64,
}

/// What the store did that it must not, and with what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Breach {
    /// What was acknowledged is not there, or what is there was not acknowledged.
    Lost,
    DoubleGrant,
    FenceWentBack,
}

#[derive(Clone, Debug)]
pub struct Violation {
    pub breach: Breach,
    pub text: String,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}: {}", self.breach, self.text)
    }
}

impl std::error::Error for Violation {}

#[derive(Clone, Default)]
pub struct Oracle {
    keys: HashMap<u64, Key>,
    /// The keys of each operation under way.
    ops: HashMap<u64, Vec<u64>>,
    lines: u64,
    highest_fence: u64,
    /// Fences granted by the process at hand.
    granted: HashSet<u64>,
    /// Numbers of which no trace may be in any file any more.
    pub erased: HashSet<u64>,
    pub acks: u64,
    /// The newest time told.
    pub now: u64,
    /// Errors other than `Fenced` are expected.
    pub tolerates_errors: bool,
    pub errors: u64,
}

impl Oracle {
    /// Takes in the next line of the story.
    pub fn hear(&mut self, line: Line) -> Result<(), Violation> {
        self.lines += 1;
        match line {
            Line::Start | Line::Open => Ok(()),
            Line::Refused(_) if self.tolerates_errors => {
                self.errors += 1;
                Ok(())
            }
            Line::Refused(what) | Line::Wrong(what) => Err(Violation { breach: Breach::Lost, text: what }),
            Line::Do { op, at, key, act } => {
                let keys = match act {
                    // Also those of which nothing was told yet: an erasure may take them out that come meanwhile.
                    Act::EraseScope => keys_beside(key).collect(),
                    _ => vec![key],
                };
                for key in &keys {
                    self.begin(*key, op, at, act);
                }
                self.ops.insert(op, keys);
                self.now = self.now.max(at);
                Ok(())
            }
            Line::Did { op, at, came } => {
                self.now = self.now.max(at);
                let keys = self.ops.remove(&op).expect("what ends has begun");
                if let Came::Failed(why) = &came {
                    self.errors += 1;
                    if self.tolerates_errors {
                        let now = self.now;
                        for key in keys {
                            self.keys.get_mut(&key).expect("an operation's key").fail(op, now, came.clone());
                        }
                        return Ok(());
                    }
                    return Err(self.violation(Breach::Lost, keys.first().copied(), &format!("{op} failed: {why}")));
                }
                self.acks += 1;
                keys.into_iter().try_for_each(|key| self.end(key, op, at, &came))
            }
        }
    }

    /// The process died: nothing is under way any more, and all owners are gone.
    pub fn crash(&mut self, now: u64) {
        self.now = self.now.max(now);
        self.ops.clear();
        self.granted.clear();
        for key in self.keys.values_mut() {
            let mut ways = reachable(&key.ways, &key.under_way, None, self.now);
            let mut next = 0;
            while next < ways.len() {
                if let State::Vacant(Some((_, back))) = &ways[next].state {
                    let back = Way { state: (**back).clone(), early: ways[next].early.clone() };
                    for way in reachable(&[back], &key.under_way, None, self.now) {
                        add(&mut ways, way);
                    }
                }
                next += 1;
            }
            let doubts = key.doubts.drain(..).map(|state| Way { state, early: Vec::new() });
            doubts.for_each(|way| add(&mut ways, way));
            key.under_way.clear();
            key.ways.clear();
            for Way { mut state, .. } in ways {
                match &mut state {
                    State::Held(held) => (held.gone, held.lease, held.since) = (true, (0, 0), 0),
                    State::Done(done) => done.since = 0,
                    State::Vacant(back) => *back = None,
                }
                add(&mut key.ways, Way { state, early: Vec::new() });
            }
        }
        self.forget_what_is_over();
    }

    /// All keys that were ever told of and may be anything but vacant.
    pub fn keys(&self) -> Vec<u64> {
        let mut keys: Vec<u64> = self.keys.keys().copied().collect();
        keys.sort_unstable();
        keys
    }

    /// Whether a key can only be vacant.
    pub fn is_vacant(&self, key: u64) -> bool {
        self.keys.get(&key).is_none_or(Key::is_vacant)
    }

    /// Bytes of the records that can't be done without, at most.
    pub fn live_bytes(&self) -> u64 {
        let len = |way: &Way| match &way.state {
            State::Vacant(_) => 0,
            State::Held(held) => 128 + held.point.map_or(0, |point| point.len as u64),
            State::Done(done) if done.until.1 < self.now => 0,
            State::Done(done) => 128 + done.answer.len as u64,
        };
        self.keys.values().filter_map(|key| key.ways.iter().map(len).max()).sum()
    }

    fn begin(&mut self, key: u64, op: u64, at: u64, act: Act) {
        let entry = self.keys.entry(key).or_insert_with(Key::new);
        entry.note(Line::Do { op, at, key, act });
        entry.under_way.iter_mut().for_each(|other| other.alone = false);
        if let Some(fence) = act.writes() {
            entry.under_way.iter_mut().for_each(|other| other.writing.push(fence));
            if let Act::Answer { len, .. } | Act::Point { len, .. } = act
                && len > 0
            {
                if entry.written.len() == TRACED {
                    entry.written.pop_front();
                }
                entry.written.push_back(op);
            }
        }
        entry.under_way.push(Op {
            op,
            at,
            act,
            since: self.lines,
            floor: self.highest_fence,
            seen: Vec::new(),
            writing: entry.under_way.iter().filter_map(|other| other.act.writes()).collect(),
            alone: entry.under_way.is_empty(),
        });
    }

    fn end(&mut self, key: u64, op: u64, at: u64, came: &Came) -> Result<(), Violation> {
        let entry = self.keys.get_mut(&key).expect("an operation's key");
        entry.note(Line::Did { op, at, came: came.clone() });
        let mine = entry.under_way.iter().position(|other| other.op == op).expect("an operation under way");
        let op = entry.under_way.remove(mine);
        if let Came::Reserved(Grant { fence, .. }) | Came::Interrupted(Grant { fence, .. }) = came {
            if *fence <= op.floor || !self.granted.insert(*fence) {
                let what = format!("fence {fence} was granted, after {}", op.floor);
                return Err(self.violation(Breach::FenceWentBack, Some(key), &what));
            }
            self.highest_fence = self.highest_fence.max(*fence);
        }
        let before = reachable(&entry.ways, &entry.under_way, Some(&op), at);
        let looks = !matches!(came, Came::Reserved(_) | Came::Interrupted(_)) && op.act.only_looks();
        let agrees = |state: &State| sees(state, &op, at, came);
        let mut after = Vec::new();
        if looks {
            // In those ways it did more than look.
            let only_looked = |way: &&Way| way.early.iter().all(|(early, _)| *early != op.op);
            let agreeing = before.iter().filter(only_looked).filter(|way| agrees(&way.state));
            if op.seen.is_empty() {
                agreeing.for_each(|way| add(&mut after, way.clone()));
            } else if agreeing.count() > 0 || op.seen.iter().any(agrees) {
                // It may have looked before any of the changes, so it says nothing of the state at hand.
                after = entry.ways.iter().filter(only_looked).cloned().collect();
            }
        } else {
            before.iter().for_each(|way| settle(way, &op, (at, self.lines), came, &mut after));
        }
        if after.is_empty() {
            return Err(self.no_way(key, &before, came, at));
        }
        if after != before {
            for other in entry.under_way.iter_mut().filter(|other| other.act.only_looks()) {
                for way in before.iter().chain(&after) {
                    if !other.seen.contains(&way.state) {
                        other.seen.push(way.state.clone());
                    }
                }
            }
        }
        if op.alone && matches!(op.act, Act::Erase | Act::EraseScope) {
            self.erased.extend(entry.written.drain(..));
            if key >= FIRST_SINGLE {
                self.erased.insert(key);
            }
        }
        if op.act.is_written() && !looks {
            entry.doubts.clear();
        }
        entry.ways = after;
        if key >= FIRST_SINGLE && entry.is_vacant() {
            self.keys.remove(&key);
        }
        Ok(())
    }

    fn forget_what_is_over(&mut self) {
        self.keys.retain(|key, entry| *key < FIRST_SINGLE || !entry.is_vacant());
    }

    fn no_way(&self, key: u64, before: &[Way], came: &Came, now: u64) -> Violation {
        // The one whose lease holds is told of by others under another number, or is told that it isn't the one.
        let is_robbed = |way: &Way| match (&way.state, came) {
            (State::Held(held), _) if held.gone || held.lease.0 <= now => false,
            (State::Held(_), Came::Reserved(_) | Came::Interrupted(_) | Came::Fenced) => true,
            (State::Held(held), Came::InFlight { fence }) => held.fence != *fence,
            (State::Held(_) | State::Vacant(_) | State::Done(_), _) => false,
        };
        let breach = if before.iter().any(is_robbed) { Breach::DoubleGrant } else { Breach::Lost };
        let ways: Vec<String> = before.iter().map(|way| format!("  {way:?}\n")).collect();
        self.violation(
            breach,
            Some(key),
            &format!("{came:?} at {now} agrees with nothing that it may be:\n{}", ways.concat()),
        )
    }

    fn violation(&self, breach: Breach, key: Option<u64>, what: &str) -> Violation {
        let history = key.and_then(|key| Some((key, self.keys.get(&key)?))).map_or_else(String::new, |(key, entry)| {
            let lines: Vec<String> = entry.lines.iter().map(|line| format!("  {line:?}\n")).collect();
            format!("key {key}, its history ({} older lines left out):\n{}", entry.left_out, lines.concat())
        });
        Violation { breach, text: format!("{what}\n{history}") }
    }
}

impl Key {
    fn new() -> Key {
        let vacant = Way { state: State::Vacant(None), early: Vec::new() };
        let (under_way, written, lines) = (Vec::new(), VecDeque::new(), VecDeque::new());
        Key { ways: vec![vacant], under_way, doubts: Vec::new(), written, lines, left_out: 0 }
    }

    fn fail(&mut self, op: u64, now: u64, came: Came) {
        self.note(Line::Did { op, at: now, came });
        let mine = self.under_way.iter().position(|other| other.op == op).expect("an operation under way");
        let op = self.under_way.remove(mine);
        let before: Vec<State> = self.ways.iter().map(|way| way.state.clone()).chain(self.doubts.clone()).collect();
        for state in before.iter().filter_map(|state| effect(state, &op, now)).map(|(state, _)| state) {
            if matches!(op.act, Act::Erase | Act::EraseScope) {
                add(&mut self.ways, Way { state: state.clone(), early: Vec::new() });
            }
            let doubt = match state {
                State::Held(held) => State::Held(Held { lease: (0, 0), since: 0, owner: 0, ..held }),
                State::Done(_) | State::Vacant(_) => state,
            };
            if !self.doubts.contains(&doubt) {
                self.doubts.push(doubt);
            }
        }
    }

    fn is_vacant(&self) -> bool {
        self.under_way.is_empty() && self.ways.iter().all(|way| way.state == State::Vacant(None))
    }

    fn note(&mut self, line: Line) {
        if self.lines.len() == REMEMBERED {
            self.lines.pop_front();
            self.left_out += 1;
        }
        self.lines.push_back(line);
    }
}

impl Act {
    /// The reservation whose owner has something to write.
    fn writes(self) -> Option<u64> {
        match self {
            Act::Answer { fence, .. } | Act::Release { fence } | Act::Point { fence, .. } => Some(fence),
            Act::Reserve { .. }
            | Act::Get
            | Act::Wait { .. }
            | Act::Renew { .. }
            | Act::Drop { .. }
            | Act::Erase
            | Act::EraseScope => None,
        }
    }

    /// Whether the journal tells of it.
    fn is_written(self) -> bool {
        !matches!(self, Act::Get | Act::Wait { .. } | Act::Renew { .. } | Act::Drop { .. })
    }

    /// Whether it changes nothing, or need not.
    fn only_looks(self) -> bool {
        matches!(self, Act::Reserve { .. } | Act::Get | Act::Wait { .. })
    }
}

impl State {
    /// Whether somebody who asks at `now` at the latest may find the key free.
    fn may_be_vacant(&self, now: u64) -> bool {
        match self {
            State::Vacant(_) => true,
            State::Done(done) => done.until.0 <= now,
            State::Held(_) => false,
        }
    }

    fn fence(&self) -> Option<u64> {
        match self {
            State::Vacant(_) => None,
            State::Held(held) => Some(held.fence),
            State::Done(done) => Some(done.fence),
        }
    }
}

fn add(ways: &mut Vec<Way>, way: Way) {
    if !ways.contains(&way) {
        ways.push(way);
    }
}

/// The ways, and all that they become when any of what is under way, but for `except`, takes effect now.
fn reachable(ways: &[Way], under_way: &[Op], except: Option<&Op>, now: u64) -> Vec<Way> {
    let mut all = ways.to_vec();
    let mut next = 0;
    while next < all.len() {
        for op in under_way.iter().filter(|op| except.is_none_or(|except| except.op != op.op)) {
            if all[next].early.iter().any(|(early, _)| *early == op.op) {
                continue;
            }
            if let Some((state, answer)) = effect(&all[next].state, op, now) {
                let mut early = all[next].early.clone();
                early.push((op.op, answer));
                early.sort_unstable_by_key(|(op, _)| *op);
                add(&mut all, Way { state, early });
            }
        }
        next += 1;
    }
    all
}

/// What an operation makes of a state if it takes effect by `now` and changes anything.
fn effect(state: &State, op: &Op, now: u64) -> Option<(State, Early)> {
    let ends = |from: u64, length: Option<u64>| {
        length.map_or((FOR_EVER, FOR_EVER), |length| (from.saturating_add(length), now.saturating_add(length)))
    };
    let own = |fence: u64| match state {
        State::Held(held) if held.fence == fence && !held.gone => Some(held.clone()),
        State::Held(_) | State::Vacant(_) | State::Done(_) => None,
    };
    match op.act {
        Act::Get | Act::Wait { .. } => None,
        Act::Reserve { print, lease } => {
            let fresh = Held {
                owner: op.op,
                fence: 0,
                attempt: 1,
                print,
                point: None,
                lease: ends(op.at, lease),
                gone: false,
                since: u64::MAX,
            };
            let (held, interrupted) = match state {
                State::Held(before) if before.print == print && (before.gone || before.lease.0 <= now) => {
                    (Held { attempt: before.attempt + 1, point: before.point, ..fresh }, true)
                }
                other if other.may_be_vacant(now) => (fresh, false),
                State::Held(_) | State::Vacant(_) | State::Done(_) => return None,
            };
            let early = Early::Granted { interrupted, attempt: held.attempt, point: held.point };
            Some((State::Held(held), early))
        }
        Act::Answer { fence, len, failure, keep } => own(fence).map(|held| {
            let (answer, until) = (Content::of(op.op, len), ends(op.at, keep));
            let Held { attempt, print, since, .. } = held;
            (State::Done(Done { answer, failure, attempt, until, print, fence, since }), Early::Carried)
        }),
        Act::Release { fence } => own(fence).map(|_| (State::Vacant(None), Early::Carried)),
        Act::Point { fence, len, lease } => own(fence).map(|held| {
            let point = (len > 0).then(|| Content::of(op.op, len));
            (State::Held(Held { point, lease: ends(op.at, lease), ..held }), Early::Carried)
        }),
        Act::Renew { fence, lease } => {
            own(fence).map(|held| (State::Held(Held { lease: ends(op.at, lease), ..held }), Early::Carried))
        }
        Act::Drop { fence } => own(fence).map(|held| (State::Held(Held { gone: true, ..held }), Early::Carried)),
        Act::Erase | Act::EraseScope => {
            let after = match state {
                // Erasures take turns, so an earlier one that took the key out is done with it.
                State::Vacant(_) => State::Vacant(None),
                State::Held(_) | State::Done(_) => State::Vacant(Some((op.op, Box::new(state.clone())))),
            };
            Some((after, Early::Carried))
        }
    }
}

/// What a way becomes when an operation that changes the key says what came of it; nothing if it can't have come to that.
fn settle(way: &Way, op: &Op, (now, lines): (u64, u64), came: &Came, after: &mut Vec<Way>) {
    let mut way = way.clone();
    let is_erasure = matches!(op.act, Act::Erase | Act::EraseScope);
    if let (true, State::Held(Held { since, .. }) | State::Done(Done { since, .. })) = (is_erasure, &way.state)
        && *since > op.since
        && way.early.iter().all(|(early, _)| *early != op.op)
    {
        // Whoever came after the erasure began may be left alone.
        add(after, way.clone());
    }
    let early = match way.early.iter().position(|(early, _)| *early == op.op) {
        Some(at) => Some(way.early.remove(at).1),
        None => effect(&way.state, op, now).map(|(state, early)| {
            way.state = state;
            early
        }),
    };
    let is_owner = |state: &State, fence: u64| matches!(state, State::Held(held) if held.fence == fence);
    let agrees = match (came, early) {
        (Came::Reserved(told) | Came::Interrupted(told), Some(Early::Granted { interrupted, attempt, point })) => {
            if let State::Held(held) = &mut way.state
                && held.owner == op.op
            {
                (held.fence, held.since) = (told.fence, lines);
            }
            matches!(came, Came::Interrupted(_)) == interrupted && (told.attempt, told.point) == (attempt, point)
        }
        (Came::Stored(until), Some(Early::Carried)) => {
            let exact = until.unwrap_or(FOR_EVER);
            match &mut way.state {
                State::Done(done) if Some(done.fence) == op.act.writes() => {
                    let (earliest, latest) = done.until;
                    done.until = (exact, exact);
                    (earliest..=latest).contains(&exact)
                }
                State::Done(_) | State::Held(_) | State::Vacant(_) => true,
            }
        }
        (Came::Done, Some(Early::Carried)) => {
            if let State::Vacant(back) = &mut way.state {
                back.take_if(|(by, _)| *by == op.op);
            }
            true
        }
        // A guard that is dropped says nothing, whether or not it still was the owner.
        (Came::Done, None) => matches!(op.act, Act::Drop { .. }),
        (Came::Fenced, None) => {
            let fence = op.act.writes();
            // The verdict was written, and then it turned out that an erasure had taken the key out: a crash before
            // the erasure is done may bring the verdict back.
            if let (State::Vacant(Some((by, back))), Some(fence)) = (&way.state, fence)
                && is_owner(back, fence)
                && let Some((state, _)) = effect(back, op, now)
            {
                add(after, Way { state: State::Vacant(Some((*by, Box::new(state)))), early: way.early.clone() });
            }
            true
        }
        _ => false,
    };
    if agrees {
        add(after, way);
    }
}

/// Whether somebody who only looked may have been told this of a state.
fn sees(state: &State, op: &Op, now: u64, came: &Came) -> bool {
    let (State::Held(Held { print, .. }) | State::Done(Done { print, .. })) = state else {
        return matches!(came, Came::Nothing | Came::Retry | Came::TimedOut);
    };
    let asked = match op.act {
        Act::Reserve { print, .. } => Some(print),
        _ => None,
    };
    let is_same = asked.is_none_or(|asked| asked == *print);
    let may_live = match state {
        State::Held(_) => true,
        State::Done(done) => op.at <= done.until.1,
        State::Vacant(_) => false,
    };
    match (came, state) {
        (Came::Replay(told), State::Done(done)) => {
            is_same && may_live && done.tells(told) && op.act.awaited().is_none_or(|fence| fence == done.fence)
        }
        (Came::InFlight { fence }, State::Held(held)) => {
            let is_told = held.fence == 0 || held.fence == *fence;
            is_same && is_told && !held.gone && (op.at <= held.lease.1 || op.writing.contains(fence))
        }
        (Came::Mismatch(stored), _) => !is_same && may_live && stored == print,
        (Came::Nothing, State::Held(_)) => true,
        (Came::Nothing, State::Done(_)) => state.may_be_vacant(now),
        (Came::Retry, State::Held(held)) => state.fence() != op.act.awaited() || held.gone || held.lease.0 <= now,
        (Came::Retry, State::Done(_)) => state.fence() != op.act.awaited() || state.may_be_vacant(now),
        (Came::TimedOut, _) => true,
        _ => false,
    }
}

impl Act {
    /// The reservation that is waited for.
    fn awaited(self) -> Option<u64> {
        match self {
            Act::Wait { fence } => Some(fence),
            _ => None,
        }
    }
}

impl Done {
    fn tells(&self, told: &Answer) -> bool {
        let until = told.until.unwrap_or(FOR_EVER);
        told.content == self.answer
            && told.failure == self.failure
            && told.attempt == self.attempt
            && (self.until.0..=self.until.1).contains(&until)
    }
}
