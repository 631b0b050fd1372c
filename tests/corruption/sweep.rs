//! The kinds of damage, each as cases with numbers.

use super::subject::{Files, Subject};
use super::verdict::Changes;

/// What is overwritten at once.
const STRETCH: usize = 4096;

/// All cases of one damage to one file, or to the set of files.
pub struct Sweep<'s> {
    pub name: String,
    pub subject: &'s Subject,
    pub count: usize,
    pub allowed: Allowed,
    damage: Damage<'s>,
}

/// What may come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// All of a store that was closed, or a refusal; of one that was not, what marks vouch for.
    Exact,
    /// A refusal: files are missing, or of another length.
    Refusal,
    /// A refusal in salvage too: the files are none of this store's, or not in their places.
    AnyRefusal,
    /// The store's own files, but older: nothing in them tells.
    Older,
}

enum Damage<'s> {
    InPlace { file: &'s str, how: How },
    Whole(Vec<Changes>),
}

#[derive(Clone, Copy)]
enum How {
    /// One bit.
    Flip,
    /// Every shorter length.
    Cut,
    /// Every longer length up to twice, with zeros and ones in turn.
    Extend,
    Zeros,
    Ones,
    /// With the stretch behind it.
    Swap,
}

impl Sweep<'_> {
    /// Whether it takes, swaps or replaces whole files.
    pub fn is_of_files(&self) -> bool {
        matches!(self.damage, Damage::Whole(_))
    }

    /// The files of a case; `None` if they are what they were.
    pub fn changes(&self, case: usize) -> Option<Changes> {
        let (file, how) = match &self.damage {
            Damage::Whole(cases) => return Some(cases[case].clone()),
            Damage::InPlace { file, how } => (*file, *how),
        };
        let before = &self.subject.files[file];
        let mut bytes = before.to_vec();
        let stretch = STRETCH.min(bytes.len());
        match how {
            How::Flip => bytes[case / 8] ^= 1 << (case % 8),
            How::Cut => bytes.truncate(case),
            How::Extend => bytes.resize(bytes.len() + 1 + case, if case.is_multiple_of(2) { 0 } else { 0xff }),
            How::Zeros => bytes[case..case + stretch].fill(0),
            How::Ones => bytes[case..case + stretch].fill(0xff),
            How::Swap => {
                let (one, two) = bytes[case..].split_at_mut(stretch);
                one.swap_with_slice(&mut two[..stretch]);
            }
        }
        (bytes[..] != before[..]).then(|| Changes::from([(file.to_owned(), Some(bytes))]))
    }
}

/// All sweeps over a subject; `other` is a store made alike.
pub fn all<'s>(subject: &'s Subject, other: &Subject, name: &str) -> Vec<Sweep<'s>> {
    let mut sweeps = Vec::new();
    let written = subject.segments();
    // Of spares one, as they are alike.
    let spare = subject.files.keys().find(|file| file.ends_with(".seg") && !written.contains(&file.as_str()));
    let is_swept = |file: &String| !file.ends_with(".seg") || written.contains(&file.as_str()) || Some(file) == spare;
    for (file, bytes) in subject.files.iter().filter(|(file, bytes)| !bytes.is_empty() && is_swept(file)) {
        let (len, stretch) = (bytes.len(), STRETCH.min(bytes.len()));
        let hows = [
            ("flip", How::Flip, len * 8),
            ("cut", How::Cut, len),
            ("extend", How::Extend, len.max(STRETCH)),
            ("zeros", How::Zeros, len - stretch + 1),
            ("ones", How::Ones, len - stretch + 1),
            ("swap", How::Swap, (len + 1).saturating_sub(2 * stretch)),
        ];
        for (what, how, count) in hows {
            let name = format!("{name}/{file}/{what}");
            let allowed = match how {
                // Nothing depends on it.
                _ if file == "INDEX" => Allowed::Exact,
                How::Cut => Allowed::Refusal,
                // What stands behind the header of this file is not looked at.
                How::Extend if file != "STORE" => Allowed::Refusal,
                How::Extend | How::Flip | How::Zeros | How::Ones | How::Swap => Allowed::Exact,
            };
            sweeps.push(Sweep { name, subject, count, allowed, damage: Damage::InPlace { file, how } });
        }
    }
    let whole = |what: &str, allowed, cases: Vec<Changes>| {
        let (name, count) = (format!("{name}/{what}"), cases.len());
        Sweep { name, subject, count, allowed, damage: Damage::Whole(cases) }
    };
    sweeps.push(whole("missing", Allowed::Refusal, missing(subject)));
    sweeps.push(whole("earlier", Allowed::Older, earlier(subject)));
    sweeps.push(whole("misplaced", Allowed::AnyRefusal, misplaced(subject)));
    sweeps.push(whole("foreign", Allowed::AnyRefusal, foreign(subject, &other.files)));
    sweeps.push(whole("foreign-records", Allowed::Exact, foreign_records(subject, other)));
    sweeps.retain(|sweep| sweep.count > 0);
    sweeps
}

/// Each file, each two segments, and all segments from one on.
fn missing(subject: &Subject) -> Vec<Changes> {
    let without = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), None)).collect();
    let segments = subject.segments();
    let mut cases = vec![without(&["STORE"]), without(&["SEGMENTS"]), without(&["STORE", "SEGMENTS"])];
    for (at, one) in segments.iter().enumerate() {
        cases.extend([without(&[one]), without(&segments[at..])]);
        cases.extend(segments[at + 1..].iter().map(|two| without(&[one, two])));
    }
    cases
}

/// Each file as it was before, alone.
fn earlier(subject: &Subject) -> Vec<Changes> {
    let files = subject.earlier.iter().flatten();
    let differs = files.filter(|(name, bytes)| subject.files.get(*name).is_some_and(|now| now != *bytes));
    differs.map(|(name, bytes)| Changes::from([(name.clone(), Some(bytes.to_vec()))])).collect()
}

/// Each segment in each other's place, both ways at once, and under numbers that there are none of.
fn misplaced(subject: &Subject) -> Vec<Changes> {
    let names = subject.files.keys().filter(|name| name.ends_with(".seg")).collect::<Vec<_>>();
    let there = |place: &str, from: &str| (place.to_owned(), Some(subject.files[from].to_vec()));
    let mut cases = Vec::new();
    for one in &names {
        for two in names.iter().filter(|two| *two != one) {
            cases.extend([Changes::from([there(two, one)]), Changes::from([there(two, one), there(one, two)])]);
        }
        for number in [0x20_u64, 0x777, 1 << 40] {
            cases.push(Changes::from([there(&format!("{number:016x}.seg"), one)]));
        }
    }
    cases
}

/// Another store's segments in each place, and its own file.
fn foreign(subject: &Subject, other: &Files) -> Vec<Changes> {
    let places = subject.files.keys().filter(|name| name.ends_with(".seg"));
    let segments = other.iter().filter(|(name, _)| name.ends_with(".seg"));
    let mut cases = vec![Changes::from([("STORE".to_owned(), Some(other["STORE"].to_vec()))])];
    for place in places {
        cases.extend(segments.clone().map(|(_, bytes)| Changes::from([(place.clone(), Some(bytes.to_vec()))])));
    }
    cases
}

/// Another store's records behind the right header, its list, and its index or none.
fn foreign_records(subject: &Subject, other: &Subject) -> Vec<Changes> {
    let mut cases = vec![Changes::from([("SEGMENTS".to_owned(), Some(other.files["SEGMENTS"].to_vec()))])];
    cases.extend(other.files.get("INDEX").map(|index| Changes::from([("INDEX".to_owned(), Some(index.to_vec()))])));
    cases.push(Changes::from([("INDEX".to_owned(), None)]));
    for place in subject.segments() {
        for theirs in other.segments() {
            let grafts = [64, 4096].map(|head| [&subject.files[place][..head], &other.files[theirs][head..]].concat());
            cases.extend(grafts.map(|bytes| Changes::from([(place.to_owned(), Some(bytes))])));
        }
    }
    cases
}
