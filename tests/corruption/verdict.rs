//! What a damaged store may do, and what it did.
//!
//! In strict mode it is refused, with the file and the offset and nothing changed, or opens with the state of every key as the whole
//! records say, and without a record that any mark or seal which is still whole vouches for. In salvage it opens, and what
//! it reports is lost is what was damaged: no more than the records that were, no less than those that were durable.
//!
//! Opened by its index, which stands for what may be damaged, it says of each key what is so or that it is damaged, and a
//! verification finds the damage.

use super::subject::{End, Files, HEAD, Is, Kind, Subject, key, open, open_indexed};
use oncekey::testing::{DiskOp, SimDisk};
use oncekey::{Durability, Error, ErrorKind, Outcome, RecoveryMode, RecoveryReport, Request, Store};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// What came of a damaged store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    Whole,
    /// Without records that no whole mark vouched for.
    Short {
        /// Whether one of them was durable, and its mark lost with it.
        of_durable: bool,
    },
    Refused,
}

/// Files in the place of others, or in none.
pub type Changes = BTreeMap<String, Option<Vec<u8>>>;

/// How closely to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// At every answer, but only at the number of keys and at the fingerprints of interrupted ones: nothing is written.
    Quick,
    /// At recovery points and vacant keys too.
    Thorough,
}

/// A subject, and a disk that holds its files but for the last changes.
pub struct Bench<'s> {
    subject: &'s Subject,
    disk: Option<(SimDisk, BTreeSet<String>)>,
}

impl<'s> Bench<'s> {
    pub fn new(subject: &'s Subject) -> Self {
        Bench { subject, disk: None }
    }

    /// Holds a damaged store to its promises.
    ///
    /// # Panics
    ///
    /// When it broke one.
    pub fn check(&mut self, changes: &Changes, look: Look) -> Opened {
        let damage = Damage::new(self.subject, changes);
        let opened = self.strict(&damage, look);
        self.salvage(&damage, opened, look);
        self.indexed(&damage, opened);
        opened
    }

    /// Opens it by its index, if it has one, after what strict mode said of all files; whether that was possible.
    pub fn indexed(&mut self, damage: &Damage<'_>, strict: Opened) -> bool {
        let disk = self.lay(damage.changes);
        let before = writes(&disk);
        let is_indexed = match open_indexed(&disk) {
            Ok(store) if store.recovery().indexed > 0 => {
                let found = store.verify();
                let is_damaged = |error: &Error| error.kind() == ErrorKind::Corrupt && error.offset().is_some();
                assert!(found.as_ref().err().is_none_or(is_damaged), "{found:?}");
                assert!(
                    strict != Opened::Refused || found.is_err(),
                    "refused without an index, and with it nothing is found"
                );
                for (number, state) in self.subject.states.iter().enumerate() {
                    look_at_damaged(&store, number, state, strict == Opened::Refused);
                }
                true
            }
            Ok(_) => {
                assert_ne!(strict, Opened::Refused, "read without its index, and whole all the same");
                false
            }
            Err(error) => {
                assert_eq!((error.kind(), strict), (ErrorKind::Corrupt, Opened::Refused), "{error:?}");
                assert_eq!(writes(&disk), before, "a refused store was written to");
                false
            }
        };
        self.keep(disk, damage.changes, before);
        is_indexed
    }

    /// Holds it to strict mode only.
    pub fn strict(&mut self, damage: &Damage<'_>, look: Look) -> Opened {
        let disk = self.lay(damage.changes);
        let before = writes(&disk);
        let opened = match open(&disk, RecoveryMode::Strict) {
            Ok(store) => {
                let opened = damage.may_open();
                damage.compare(&store, look);
                if look == Look::Thorough {
                    store.verify().expect("what opens is whole");
                }
                store.close().expect("closing");
                opened
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
                let path = error.path().unwrap_or_else(|| panic!("no path: {error:?}"));
                let offset = error.offset().unwrap_or_else(|| panic!("no offset: {error:?}"));
                damage.is_at(path.file_name().and_then(|name| name.to_str()).unwrap_or_default(), offset);
                assert_eq!(writes(&disk), before, "a refused store was written to");
                if look == Look::Thorough {
                    damage.are_untouched(&disk);
                }
                Opened::Refused
            }
        };
        self.keep(disk, damage.changes, before);
        opened
    }

    /// Holds it to salvage, after what strict mode said.
    pub fn salvage(&mut self, damage: &Damage<'_>, strict: Opened, look: Look) {
        let disk = self.lay(damage.changes);
        let before = writes(&disk);
        let store = open(&disk, RecoveryMode::Salvage).unwrap_or_else(|error| panic!("salvage refuses: {error:?}"));
        damage.is_reported_by(store.recovery(), strict);
        damage.compare(&store, look);
        if look == Look::Thorough {
            store.verify().unwrap_or_else(|error| panic!("salvaged: {error:?}"));
        }
        store.close().expect("closing what was salvaged");
        let again = open(&disk, RecoveryMode::Strict).unwrap_or_else(|error| panic!("salvaged, again: {error:?}"));
        let RecoveryReport { lost, cut, .. } = again.recovery();
        assert!(lost.is_empty() && cut.is_empty(), "salvaged, again: {lost:?} {cut:?}");
        damage.compare(&again, Look::Quick);
        drop(again);
        self.keep(disk, damage.changes, before);
    }

    /// Both modes refuse, and change nothing.
    pub fn check_refused(&mut self, changes: &Changes) {
        let damage = Damage::new(self.subject, changes);
        for mode in [RecoveryMode::Strict, RecoveryMode::Salvage] {
            let disk = self.lay(changes);
            let error = open(&disk, mode).err().unwrap_or_else(|| panic!("{mode:?} opens"));
            assert_eq!((error.kind(), error.offset()), (ErrorKind::Corrupt, Some(0)), "{error:?}");
            damage.are_untouched(&disk);
        }
    }

    /// A disk with the subject's files, changed; from the last one if nothing was written to it.
    fn lay(&mut self, changes: &Changes) -> SimDisk {
        let (disk, changed) = self.disk.take().unwrap_or_else(|| {
            let disk = SimDisk::new();
            self.subject.files.iter().for_each(|(name, bytes)| disk.put(name, bytes.to_vec()));
            (disk, BTreeSet::new())
        });
        for name in changed.iter().filter(|name| !changes.contains_key(*name)) {
            match self.subject.files.get(name) {
                Some(bytes) => disk.put(name, bytes.to_vec()),
                None => disk.take(name),
            }
        }
        for (name, bytes) in changes {
            match bytes {
                Some(bytes) => disk.put(name, bytes.clone()),
                None => disk.take(name),
            }
        }
        disk
    }

    fn keep(&mut self, disk: SimDisk, changes: &Changes, writes_before: u64) {
        let changed = if writes(&disk) == writes_before {
            changes.keys().cloned().collect()
        } else {
            let names = disk.files().into_iter().map(|(name, _)| name).chain(self.subject.files.keys().cloned());
            names
                .filter(|name| disk.contents(name).as_deref() != self.subject.files.get(name).map(|bytes| &**bytes))
                .collect()
        };
        self.disk = Some((disk, changed));
    }
}

fn writes(disk: &SimDisk) -> u64 {
    [DiskOp::Create, DiskOp::Append, DiskOp::Overwrite, DiskOp::Sync, DiskOp::Remove]
        .map(|op| disk.calls(op))
        .iter()
        .sum()
}

/// What changes did to a subject.
pub struct Damage<'d> {
    subject: &'d Subject,
    changes: &'d Changes,
    /// The records that aren't there as they were written.
    broken: Vec<usize>,
}

impl<'d> Damage<'d> {
    pub fn new(subject: &'d Subject, changes: &'d Changes) -> Self {
        let is_whole = |at: &usize| {
            let placed = &subject.records[*at];
            let Some(changed) = changes.get(&placed.file) else { return placed.was_left };
            let Some(bytes) = changed else { return false };
            let range = placed.range.start.min(bytes.len())..placed.range.end.min(bytes.len());
            let (there, beyond) = subject.written[&placed.file][placed.range.clone()].split_at(range.len());
            // The zeros that a record ends with may be cut off: nothing is missed.
            bytes[range] == *there && beyond.iter().all(|byte| *byte == 0)
        };
        let broken = (0..subject.records.len()).filter(|at| !is_whole(at)).collect();
        Damage { subject, changes, broken }
    }

    fn is_whole(&self, record: usize) -> bool {
        self.broken.binary_search(&record).is_err()
    }

    /// Whether a mark that is whole says that the record is durable.
    fn is_vouched_for(&self, record: usize) -> bool {
        let placed = &self.subject.records[record];
        self.subject.records.iter().enumerate().any(|(at, other)| match other.kind {
            Kind::Mark { durable } => other.file == placed.file && durable > placed.range.start && self.is_whole(at),
            Kind::Of { .. } | Kind::Scrubbed | Kind::Other => false,
        })
    }

    /// Whether it has to be noticed that the record isn't there.
    fn is_a_loss(&self, record: usize) -> bool {
        let placed = &self.subject.records[record];
        placed.kind != Kind::Scrubbed && placed.range.start >= HEAD && self.is_vouched_for(record)
    }

    /// Says what an opening in strict mode lacks.
    fn may_open(&self) -> Opened {
        let was_of_a_key = |at: &&usize| matches!(self.subject.records[**at].kind, Kind::Of { .. });
        for at in &self.broken {
            assert!(!self.is_a_loss(*at), "opened without an error, and without {:?}", self.subject.records[*at]);
        }
        let was_left = |at: &&usize| self.subject.records[**at].was_left;
        let mut short = self.broken.iter().filter(was_of_a_key).filter(was_left).peekable();
        match short.peek() {
            None => Opened::Whole,
            Some(_) => Opened::Short { of_durable: short.any(|at| self.subject.records[*at].was_durable) },
        }
    }

    /// What a key has to be.
    fn state(&self, number: usize) -> Is {
        let is_touched = self.broken.iter().any(|at| match self.subject.records[*at].kind {
            Kind::Of { key, .. } => key == number,
            Kind::Mark { .. } | Kind::Scrubbed | Kind::Other => false,
        });
        if is_touched {
            self.subject.state(number, |at| self.is_whole(at))
        } else {
            self.subject.states[number].clone()
        }
    }

    fn compare(&self, store: &Store, how: Look) {
        let states: Vec<Is> = (0..self.subject.states.len()).map(|number| self.state(number)).collect();
        let there = states.iter().filter(|state| **state != Is::Vacant).count() as u64;
        assert_eq!(store.stats().keys, there, "keys");
        for (number, state) in states.iter().enumerate() {
            look(store, number, state, how);
        }
    }

    /// What strict mode says is wrong has to be where the damage is.
    fn is_at(&self, name: &str, offset: u64) {
        let [(changed, Some(bytes))] = &self.changes.iter().collect::<Vec<_>>()[..] else { return };
        let Some(before) = self.subject.files.get(*changed).filter(|_| changed.ends_with(".seg")) else { return };
        assert_eq!(name, *changed, "the error names another file");
        let same = before.iter().zip(bytes.iter()).take_while(|(one, two)| one == two).count();
        let is_before = |at: &usize| {
            let placed = &self.subject.records[*at];
            placed.file == name && placed.range.start >= HEAD && placed.range.end <= same && self.is_whole(*at)
        };
        let whole =
            (0..self.subject.records.len()).filter(is_before).map(|at| self.subject.records[at].range.end).max();
        let from = if same < HEAD { 0 } else { whole.unwrap_or(HEAD) };
        let differ = before.iter().zip(bytes.iter()).rposition(|(one, two)| one != two);
        let to = if before.len() == bytes.len() { differ.unwrap_or(0) } else { before.len().max(bytes.len()) };
        assert!((from as u64..=to as u64).contains(&offset), "the error names offset {offset}, not in {from}..={to}");
    }

    fn is_reported_by(&self, report: &RecoveryReport, strict: Opened) {
        let RecoveryReport { lost, .. } = report;
        assert_eq!(strict == Opened::Refused, !lost.is_empty(), "strict says {strict:?}, salvage {report:?}");
        let is_lost = |file: &str, range: &Range<usize>| {
            lost.iter().any(|one| {
                let there = one.offset as usize..(one.offset + one.len) as usize;
                one.path.ends_with(file) && there.start < range.end && range.start < there.end
            })
        };
        for (at, placed) in self.subject.records.iter().enumerate().filter(|(_, placed)| placed.range.start >= HEAD) {
            if self.is_whole(at) {
                // The zeros that it ends with may be missing.
                let bytes = &self.subject.written[&placed.file][placed.range.clone()];
                let filled = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
                assert!(
                    !is_lost(&placed.file, &(placed.range.start..placed.range.start + filled)),
                    "reported lost, and whole: {placed:?}; {lost:?}"
                );
            } else if self.is_a_loss(at) {
                assert!(is_lost(&placed.file, &placed.range), "not reported: {placed:?}; {lost:?}");
            }
        }
    }

    fn are_untouched(&self, disk: &SimDisk) {
        let mut wanted: Files = self.subject.files.clone();
        for (name, bytes) in self.changes {
            match bytes {
                Some(bytes) => wanted.insert(name.clone(), bytes.as_slice().into()),
                None => wanted.remove(name),
            };
        }
        assert!(super::subject::files(disk) == wanted, "the files of a refused store were changed");
    }
}

/// Looks whether a key is what it should be.
fn look(store: &Store, number: usize, state: &Is, how: Look) {
    let name = key(number);
    let request = Request::new(&name);
    if let Is::Answered { bytes, is_failure } = state {
        let record = store.get(&request).expect("a look").unwrap_or_else(|| panic!("key {number} has no answer"));
        assert!(record.bytes() == bytes && record.is_failure() == *is_failure, "key {number} has another answer");
        return;
    }
    let unlike = request.fingerprint_of(b"a payload that nobody used").durability(Durability::Buffered);
    match (state, how) {
        (Is::Interrupted { asked, .. }, Look::Quick) => match store.reserve(&unlike).expect("a look") {
            Outcome::Mismatch(mismatch) => assert_eq!(mismatch.stored, *asked, "key {number}"),
            other => panic!("key {number} is interrupted, and the store says {other:?}"),
        },
        (Is::Interrupted { asked, point }, Look::Thorough) => {
            match store.reserve(&request.fingerprint(*asked).durability(Durability::Buffered)).expect("a look") {
                Outcome::Interrupted(guard) => {
                    assert_eq!(guard.last_recovery_point(), point.as_deref(), "key {number}");
                }
                other => panic!("key {number} is interrupted, and the store says {other:?}"),
            }
        }
        (Is::Vacant, Look::Thorough) => match store.reserve(&unlike).expect("a look") {
            Outcome::Reserved(guard) => guard.release().expect("a release"),
            other => panic!("key {number} is vacant, and the store says {other:?}"),
        },
        (Is::Vacant, Look::Quick) => assert!(store.get(&request).expect("a look").is_none(), "key {number} is back"),
        (Is::Answered { .. }, _) => unreachable!("looked at above"),
    }
}

/// Looks at a key of a store of which not all was read: it is what it should be or, in one that is damaged, said to be damaged.
fn look_at_damaged(store: &Store, number: usize, state: &Is, is_damaged: bool) {
    let name = key(number);
    let request = Request::new(&name).durability(Durability::Buffered);
    let excused = |error: Error| {
        assert!(is_damaged && error.kind() == ErrorKind::Corrupt && error.path().is_some(), "key {number}: {error:?}");
    };
    match store.get(&request) {
        Ok(answer) => match (state, answer) {
            (Is::Answered { bytes, is_failure }, Some(record)) => {
                assert!(
                    record.bytes() == bytes && record.is_failure() == *is_failure,
                    "key {number} has another answer"
                );
            }
            (Is::Vacant | Is::Interrupted { .. }, None) => {}
            (_, answer) => panic!("key {number} is {state:?}, and the store says {answer:?}"),
        },
        Err(error) => excused(error),
    }
    match (store.reserve(&request.fingerprint_of(b"a payload that nobody used")), state) {
        (Ok(Outcome::Reserved(guard)), Is::Vacant) => guard.release().expect("a release"),
        (Ok(Outcome::Mismatch(mismatch)), Is::Interrupted { asked, .. }) => assert_eq!(mismatch.stored, *asked),
        (Ok(Outcome::Mismatch(_)), Is::Answered { .. }) => {}
        (Ok(outcome), _) => panic!("key {number} is {state:?}, and the store says {outcome:?}"),
        (Err(error), _) => excused(error),
    }
}

impl Opened {
    /// Of a store that was closed everything is vouched for, in two places at least.
    pub fn may_come_of(self, end: End) {
        let is_short = matches!(self, Opened::Short { .. });
        assert!(!is_short || end != End::Closed, "a closed store opened without a record of a key");
    }
}

/// Whether undamaged files say what was done; of a store that lost its power what was durable.
pub fn check_subject(subject: &Subject) {
    let end = subject.end;
    for (number, state) in subject.states.iter().enumerate() {
        let mut of_key =
            subject.records.iter().filter(|placed| matches!(placed.kind, Kind::Of { key, .. } if key == number));
        if end != End::Cut || of_key.all(|placed| placed.was_durable) {
            assert_eq!(*state, super::subject::expected(number), "key {number} of a store that was {end:?}");
        }
    }
    let opened = Bench::new(subject).check(&Changes::new(), Look::Thorough);
    assert_eq!(opened, Opened::Whole, "an undamaged store that was {end:?}");
}
