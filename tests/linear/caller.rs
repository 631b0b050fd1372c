//! One of several callers: takes the steps of its script on the store, and writes down what it was told and when.

use crate::spec::{Answer, NEVER, Step, Told};
use crate::threads;
use crate::world::{Ground, World};
use oncekey::{
    Error, ErrorKind, Fingerprint, Outcome, Pending, Record, Request, Reservation, Retention, Unwritten, Wait,
};
use std::time::Duration;

/// What a caller is to do next. What needs a reservation takes one of the caller's, and reserves if it has none.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    Reserve { key: u8, payload: u8, has_short_lease: bool, is_renewed: bool, is_kept: bool },
    Complete,
    Fail,
    Release,
    Renew { is_short: bool },
    Point { is_empty: bool },
    Drop,
    Get { key: u8 },
    Erase { key: u8 },
    EraseScope,
    Poll,
    Wait,
    Advance { ms: u64 },
    Maintain,
    Close,
    Die,
}

/// A history's keys, at most.
pub const KEYS: u8 = 2;
pub const SHORT: Duration = Duration::from_millis(5);
const LONG: Duration = Duration::from_secs(3600);

/// A reservation or a wait, with the key that it is for.
struct Held<T> {
    key: u8,
    has_short_lease: bool,
    is_renewed: bool,
    is_kept: bool,
    what: T,
}

pub struct Caller<'w> {
    world: &'w World,
    /// The history's: its keys are nobody else's.
    scope: String,
    number: usize,
    ground: Ground,
    owned: Vec<Held<Reservation>>,
    met: Vec<Held<Pending>>,
    /// Each with its key.
    pub steps: Vec<(u8, Step)>,
}

/// When a call began.
struct Called {
    at: u64,
    life: u32,
}

/// A call that should never be answered so.
fn unexpected(error: &Error) -> ! {
    threads::give_up(&format!("no call may fail so: {error} ({:?})", error.kind()))
}

fn answer(record: &Record) -> Answer {
    let id = id_of(record.bytes());
    Answer { id, is_failure: record.is_failure(), attempt: record.attempt() }
}

fn id_of(bytes: &[u8]) -> u64 {
    match bytes.try_into() {
        Ok(bytes) => u64::from_le_bytes(bytes),
        Err(_) => threads::give_up(&format!("an answer of {bytes:?}, which nobody gave")),
    }
}

impl<'w> Caller<'w> {
    pub fn new(world: &'w World, history: usize, number: usize) -> Self {
        let ground = world.ground();
        let scope = history.to_string();
        Caller { world, scope, number, ground, owned: Vec::new(), met: Vec::new(), steps: Vec::new() }
    }

    /// Takes all steps, and lets go of what is left.
    pub fn play(mut self, script: &[Op]) -> Vec<(u8, Step)> {
        for op in script {
            self.keep_up();
            self.take(*op);
        }
        self.keep_up();
        self.let_go();
        self.steps
    }

    /// Goes over to the next life of the store if there is one.
    fn keep_up(&mut self) {
        if self.world.life() != self.ground.life {
            self.let_go();
            self.ground.store = None;
            self.ground = self.world.ground();
        }
    }

    fn let_go(&mut self) {
        self.met.clear();
        while let Some(held) = self.owned.pop() {
            self.drop_reservation(held.key, held.what);
        }
    }

    fn call(&self) -> Called {
        Called { at: self.world.moment(), life: self.ground.life }
    }

    fn tell(&mut self, key: u8, called: &Called, told: Told) {
        self.tell_all(key, called, [told]);
    }

    fn tell_all<const N: usize>(&mut self, key: u8, called: &Called, told: [Told; N]) {
        let now_ms = threads::last_reading();
        let (latest_ms, returned) = (self.world.clock.look(), self.world.moment());
        for told in told {
            let step = Step {
                caller: self.number,
                called: called.at,
                returned,
                life: called.life,
                now_ms,
                latest_ms,
                is_certain: true,
                told,
            };
            self.steps.push((key, step));
        }
    }

    fn drop_reservation(&mut self, key: u8, reservation: Reservation) {
        let (called, fence) = (self.call(), reservation.fence());
        drop(reservation);
        self.tell(key, &called, Told::Dropped { fence });
    }

    fn take(&mut self, op: Op) {
        match op {
            Op::Reserve { key, payload, has_short_lease, is_renewed, is_kept } => {
                self.reserve(Held { key, has_short_lease, is_renewed, is_kept, what: payload });
            }
            Op::Complete | Op::Fail => self.answer(matches!(op, Op::Fail)),
            Op::Release => self.release(),
            Op::Renew { is_short } => self.renew(is_short),
            Op::Point { is_empty } => self.point(is_empty),
            Op::Drop => {
                if let Some(held) = self.owned.pop() {
                    self.drop_reservation(held.key, held.what);
                }
            }
            Op::Get { key } => self.get(key),
            Op::Erase { key } => self.erase(key),
            Op::EraseScope => self.erase_scope(),
            Op::Poll => self.wait(false),
            // Who owns a key and waits for another could wait for ever.
            Op::Wait => self.wait(self.owned.is_empty()),
            Op::Advance { ms } => self.world.clock.advance(ms),
            Op::Maintain => {
                let answer = self.ground.store().maintain(64);
                if let Err(error) = answer.map(drop).or_else(if_closed) {
                    unexpected(&error);
                }
            }
            Op::Close | Op::Die => {
                self.let_go();
                self.ground.store = None;
                let dies = matches!(op, Op::Die);
                let life = self.ground.life;
                if let Some(restart) = self.world.restart(life, dies) {
                    for key in 0..KEYS {
                        self.tell(key, &Called { at: restart.called, life }, Told::Restarted);
                        self.steps.last_mut().expect("just told").1.returned = restart.returned;
                    }
                }
                self.ground = self.world.ground();
            }
        }
    }

    fn request<'r>(&'r self, key: &'r u8) -> Request<'r> {
        Request::new(std::slice::from_ref(key)).scope(&self.scope)
    }

    fn reserve(&mut self, terms: Held<u8>) {
        let Held { key, has_short_lease, is_renewed, is_kept, what: payload } = terms;
        let request = self
            .request(&key)
            .fingerprint(Fingerprint::of(&[payload]))
            .lease(if has_short_lease { SHORT } else { LONG })
            .retention(if is_kept { Retention::Forever } else { Retention::For(SHORT) })
            .auto_renew(is_renewed);
        let called = self.call();
        let outcome = match self.ground.store().reserve(&request) {
            Ok(outcome) => outcome,
            Err(error) if error.kind() == ErrorKind::Closed => return,
            Err(error) => unexpected(&error),
        };
        let lease_end_ms = lease_end(has_short_lease, is_renewed);
        let hold = |what| Held { key, has_short_lease, is_renewed, is_kept, what };
        match outcome {
            Outcome::Reserved(owner) => {
                let fence = owner.fence();
                let point = owner.last_recovery_point().map(id_of);
                if point.is_some() || owner.attempt() != 1 {
                    threads::give_up("a fresh reservation with a past");
                }
                self.tell(key, &called, Told::Reserved { payload, lease_end_ms, fence });
                self.owned.push(hold(owner));
            }
            Outcome::Interrupted(owner) => {
                let (fence, attempt) = (owner.fence(), owner.attempt());
                let point = owner.last_recovery_point().map(id_of);
                self.tell(key, &called, Told::TookOver { payload, lease_end_ms, fence, attempt, point });
                self.owned.push(hold(owner));
            }
            Outcome::Replay(record) => {
                let answer = answer(&record);
                drop(record);
                self.tell(key, &called, Told::Replay { payload, answer });
            }
            Outcome::InFlight(pending) => {
                self.tell(key, &called, Told::InFlight { payload, fence: pending.fence() });
                self.met.push(Held { key, has_short_lease, is_renewed, is_kept, what: pending });
            }
            Outcome::Mismatch(mismatch) => {
                let is = |payload: &u8| Fingerprint::of(&[*payload]) == mismatch.stored;
                let stored = (0..2).find(is).unwrap_or(u8::MAX);
                self.tell(key, &called, Told::Mismatch { payload, stored });
            }
        }
    }

    /// What a refused write says of its owner, whose reservation is then let go.
    fn refuse(&mut self, key: u8, called: &Called, refused: Unwritten) {
        let Unwritten { error, reservation } = refused;
        let fence = reservation.fence();
        match error.kind() {
            ErrorKind::Fenced => self.tell_all(key, called, [Told::MayHaveBegun { fence }, Told::Fenced { fence }]),
            ErrorKind::Closed => {}
            _ => unexpected(&error),
        }
        self.drop_reservation(key, reservation);
    }

    fn answer(&mut self, is_failure: bool) {
        let Some(held) = self.owned.pop() else { return };
        let (fence, id) = (held.what.fence(), self.world.moment());
        let called = self.call();
        let verdict = match is_failure {
            true => held.what.fail(id.to_le_bytes()),
            false => held.what.complete(id.to_le_bytes()),
        };
        match verdict {
            Ok(record) => {
                let answer = answer(&record);
                if (answer.id, answer.is_failure) != (id, is_failure) {
                    threads::give_up("the stored answer is another one");
                }
                drop(record);
                let kept_until_ms = if held.is_kept { NEVER } else { after(SHORT) };
                let told = [Told::Began { fence }, Told::Completed { fence, answer, kept_until_ms }];
                self.tell_all(held.key, &called, told);
            }
            Err(refused) => self.refuse(held.key, &called, *refused),
        }
    }

    fn release(&mut self) {
        let Some(held) = self.owned.pop() else { return };
        let fence = held.what.fence();
        let called = self.call();
        match held.what.release() {
            Ok(()) => self.tell_all(held.key, &called, [Told::Began { fence }, Told::Released { fence }]),
            Err(refused) => self.refuse(held.key, &called, *refused),
        }
    }

    fn renew(&mut self, is_short: bool) {
        let Some(mut held) = self.owned.pop() else { return };
        let (fence, called) = (held.what.fence(), self.call());
        match held.what.renew_for(if is_short { SHORT } else { LONG }) {
            Ok(()) => {
                held.has_short_lease = is_short;
                let lease_end_ms = lease_end(is_short, held.is_renewed);
                self.tell(held.key, &called, Told::Renewed { fence, lease_end_ms });
            }
            Err(error) if error.is_fenced() => self.tell(held.key, &called, Told::Fenced { fence }),
            Err(error) if error.kind() == ErrorKind::Closed => {}
            Err(error) => unexpected(&error),
        }
        self.owned.push(held);
    }

    fn point(&mut self, is_empty: bool) {
        let Some(mut held) = self.owned.pop() else { return };
        let (fence, id) = (held.what.fence(), self.world.moment());
        let bytes = id.to_le_bytes();
        let called = self.call();
        match held.what.recovery_point(if is_empty { &[][..] } else { &bytes[..] }) {
            Ok(()) => {
                let lease_end_ms = lease_end(held.has_short_lease, held.is_renewed);
                let point = (!is_empty).then_some(id);
                let told = [Told::Began { fence }, Told::Pointed { fence, point, lease_end_ms }];
                self.tell_all(held.key, &called, told);
            }
            Err(error) if error.is_fenced() => {
                self.tell_all(held.key, &called, [Told::MayHaveBegun { fence }, Told::Fenced { fence }]);
            }
            Err(error) if error.kind() == ErrorKind::Closed => {}
            Err(error) => unexpected(&error),
        }
        self.owned.push(held);
    }

    fn get(&mut self, key: u8) {
        let called = self.call();
        match self.ground.store().get(&self.request(&key)) {
            Ok(record) => {
                let answer = record.as_ref().map(answer);
                drop(record);
                self.tell(key, &called, Told::Got(answer));
            }
            Err(error) if error.kind() == ErrorKind::Closed => {}
            Err(error) => unexpected(&error),
        }
    }

    fn erase(&mut self, key: u8) {
        let called = self.call();
        match self.ground.store().erase(&self.request(&key)) {
            Ok(erasure) => self.tell(key, &called, Told::Erased { found: Some(erasure.keys == 1) }),
            Err(error) if error.kind() == ErrorKind::Closed => {}
            Err(error) => unexpected(&error),
        }
    }

    /// Each key is erased at some moment of the call, not all at the same.
    fn erase_scope(&mut self) {
        let called = self.call();
        match self.ground.store().erase_scope(&self.scope) {
            Ok(erasure) => {
                let found = match erasure.keys {
                    0 => Some(false),
                    1 => None,
                    _ => Some(true),
                };
                (0..KEYS).for_each(|key| self.tell(key, &called, Told::Erased { found }));
            }
            Err(error) if error.kind() == ErrorKind::Closed => {}
            Err(error) => unexpected(&error),
        }
    }

    fn wait(&mut self, until_its_end: bool) {
        let Some(held) = self.met.pop() else { return };
        let fence = held.what.fence();
        let called = self.call();
        let wait = match until_its_end {
            true => threads::wait(held.what, called.at.is_multiple_of(2)),
            false => held.what.wait(Duration::ZERO),
        };
        match wait {
            Ok(Wait::Replay(record)) => {
                let answer = answer(&record);
                drop(record);
                self.tell(held.key, &called, Told::WaitedFor { fence, answer });
            }
            Ok(Wait::Retry) => self.tell(held.key, &called, Told::MayRetry { fence }),
            Ok(Wait::TimedOut(pending)) => {
                self.tell(held.key, &called, Told::Running { fence });
                self.met.push(Held { what: pending, ..held });
            }
            Err(error) if error.kind() == ErrorKind::Closed => {}
            Err(error) => unexpected(&error),
        }
    }
}

fn if_closed(error: Error) -> Result<(), Error> {
    if error.kind() == ErrorKind::Closed { Ok(()) } else { Err(error) }
}

/// When what begins at the call's last look at the clock is over.
fn after(time: Duration) -> u64 {
    threads::last_reading() + time.as_millis() as u64
}

fn lease_end(is_short: bool, is_renewed: bool) -> u64 {
    match (is_renewed, is_short) {
        (true, _) => NEVER,
        (false, true) => after(SHORT),
        (false, false) => after(LONG),
    }
}
