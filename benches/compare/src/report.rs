//! What was measured, as markdown.

use crate::aims;
use crate::cell::{KeyForm, Latency, Level, PeerName, Reading, Space, Subject, Workload};
use crate::rounds::Found;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

const NOTES: &str = "\
Rates are operations a second: of FRESH, pairs of reserve and complete. Each cell ran in a process of its own, and the
cells of a table took turns; rates, latencies and bytes are medians over rounds. *oncekey against it* is the median of
the ratios within a round, and at 1.00x both are as fast: `Buffered` up to the `kill -9` level, `Synced` at the other.

Latencies are those of single operations, with one clock read between two. Where an operation takes microseconds they
are of the pass that the rate is of; else of another pass, over a store of its own for FRESH, so that the clock isn't
in the rate.

*there* is the number of keys: of FRESH, those that were done when the time was up; of REPLAY and MIXED, those that
there were after the rest had been loaded in bulk, fewer than asked for where that took too long. Bytes are a key:
anonymous memory of the process (Redis: of its server) and what is allocated to its files, when all are loaded;
*written* as the process dirtied pages (`write_bytes` of `/proc/self/io`) and what went *to the device* by the block
device's own count, others' writes included, both while FRESH ran.

EXPIRE and REOPEN start from loaded tables too. Who isn't in EXPIRE has no way of its own to find what fell due.
";

/// A table's heading.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Shape {
    workload: Workload,
    is_synced: bool,
    keys: u64,
    key_form: KeyForm,
    answer_len: usize,
    threads: usize,
}

impl Shape {
    fn of(workload: Workload, subject: &Subject) -> Self {
        let Subject { level, keys, key_form, answer_len, threads, .. } = *subject;
        Shape { workload, is_synced: level == Level::Power, keys, key_form, answer_len, threads }
    }
}

pub fn markdown(found: &Found, took: Duration) -> String {
    let mut text = String::from("# Comparison\n\n");
    let mut line = |line: &str| {
        text.push_str(line);
        text.push('\n');
    };
    line(&format!("{}. Measured within {} s.\n", machine(), took.as_secs()));
    line(NOTES);

    let mut tables: BTreeMap<Shape, Vec<Subject>> = BTreeMap::new();
    for reading in &found.readings {
        let subjects = tables.entry(Shape::of(reading.workload, &reading.subject)).or_default();
        if !subjects.contains(&reading.subject) {
            subjects.push(reading.subject);
        }
    }
    for (shape, mut subjects) in tables {
        subjects.sort_by_key(|subject| (subject.level, subject.peer));
        let Shape { workload, keys, key_form, answer_len, threads, .. } = shape;
        let (name, key_len) = (workload.name(), key_form.len());
        let synced = if shape.is_synced { ", power-loss safe" } else { "" };
        line(&format!(
            "## {name}{synced}: {keys} keys of {key_len} B, answers of {answer_len} B, threads: {threads}\n"
        ));
        line(&table(found, workload, &subjects));
    }
    if !found.missing.is_empty() {
        line("## Not measured\n\n| cell | why |\n|---|---|");
        for missing in &found.missing {
            line(&format!("| {} | {} |", missing.subject, missing.why.replace('|', "/")));
        }
        line("");
    }
    line("## Aims\n");
    line(&aims::table(found));
    text
}

fn machine() -> String {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": unknown processor");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    let model = model.trim_start_matches(|c: char| c == ':' || c.is_whitespace());
    format!("{cores} cores of {model}, Linux {}, load {load} at the end", kernel.trim())
}

/// Writes a subject's columns.
type MakeRow = fn(&Found, Workload, &Subject) -> Vec<String>;

fn table(found: &Found, workload: Workload, subjects: &[Subject]) -> String {
    let (head, row): (&[&str], MakeRow) = match workload {
        Workload::Fresh => (
            &[
                "rate",
                "oncekey against it",
                "p50",
                "p99",
                "p99.9",
                "worst",
                "there",
                "memory",
                "disk",
                "written",
                "to the device",
            ],
            fresh,
        ),
        Workload::Replay | Workload::Mixed => {
            (&["rate", "oncekey against it", "p50", "p99", "p99.9", "worst", "there"], rated)
        }
        Workload::Herd => (&["keys a second", "oncekey against it", "keys", "one owner each"], herd),
        Workload::Expire => (
            &[
                "keys",
                "reclaimed alone, each",
                "FRESH before",
                "meanwhile",
                "p99.9 before",
                "meanwhile",
                "worst before",
                "meanwhile",
                "reclaimed within",
            ],
            expire,
        ),
        Workload::Reopen => (&["keys", "to the first right answer", "lost"], reopen),
    };
    let mut text = format!("| | survives | {} |\n|---|---|{}\n", head.join(" | "), "---|".repeat(head.len()));
    for subject in subjects {
        let (peer, level) = (subject.peer.name(), subject.level.name());
        writeln!(text, "| {peer} | {level} | {} |", row(found, workload, subject).join(" | "))
            .expect("a string can be written to");
    }
    text
}

fn fresh(found: &Found, workload: Workload, subject: &Subject) -> Vec<String> {
    let bytes = |of: fn(&Space) -> Option<f64>| {
        let value = found.value(subject, workload, |reading| reading.space.as_ref().and_then(of));
        value.map_or(NONE.to_owned(), |bytes| format!("{bytes:.0}"))
    };
    let mut row = rated(found, workload, subject);
    row.extend([
        bytes(|space| space.anonymous),
        bytes(|space| space.disk),
        bytes(|space| space.written),
        bytes(|space| space.device),
    ]);
    row
}

fn rated(found: &Found, workload: Workload, subject: &Subject) -> Vec<String> {
    let time = |of: fn(&Latency) -> u64| shown(found.latency(subject, workload, of), duration);
    let there = found.value(subject, workload, |reading| reading.rate.map(|_| reading.filled as f64));
    vec![
        shown(found.rate(subject, workload), rate),
        against(found, workload, subject),
        time(|latency| latency.p50),
        time(|latency| latency.p99),
        time(|latency| latency.p999),
        time(|latency| latency.max),
        shown(there, count),
    ]
}

fn herd(found: &Found, workload: Workload, subject: &Subject) -> Vec<String> {
    let all_had = found.of(subject, workload).all(|reading| reading.one_owner_each == Some(true));
    vec![
        shown(found.rate(subject, workload), rate),
        against(found, workload, subject),
        shown(found.value(subject, workload, |reading| Some(reading.filled as f64)), count),
        if all_had { "yes" } else { "NO" }.to_owned(),
    ]
}

fn expire(found: &Found, workload: Workload, subject: &Subject) -> Vec<String> {
    let value =
        |of: fn(&crate::cell::Expiry) -> f64| found.value(subject, workload, |reading| reading.expiry.as_ref().map(of));
    vec![
        shown(found.value(subject, workload, |reading| Some(reading.filled as f64)), count),
        shown(value(|expiry| expiry.ns_a_key), duration),
        shown(value(|expiry| expiry.rate_before), rate),
        shown(value(|expiry| expiry.rate_during), rate),
        shown(value(|expiry| expiry.before.p999 as f64), duration),
        shown(value(|expiry| expiry.during.p999 as f64), duration),
        shown(value(|expiry| expiry.before.max as f64), duration),
        shown(value(|expiry| expiry.during.max as f64), duration),
        shown(value(|expiry| expiry.took_s * 1e9), duration),
    ]
}

fn reopen(found: &Found, workload: Workload, subject: &Subject) -> Vec<String> {
    let of = |value: fn(&crate::cell::Reopening) -> f64| move |reading: &Reading| reading.reopening.as_ref().map(value);
    let most_lost = found.of(subject, workload).filter_map(of(|reopening| reopening.lost as f64)).reduce(f64::max);
    let checked = found.value(subject, workload, of(|reopening| reopening.checked as f64));
    let lost = most_lost.zip(checked).map(|(lost, checked)| format!("{lost} of {checked}"));
    vec![
        shown(found.value(subject, workload, |reading| Some(reading.filled as f64)), count),
        shown(found.value(subject, workload, of(|reopening| reopening.seconds * 1e9)), duration),
        lost.unwrap_or("all".to_owned()),
    ]
}

/// How many times as fast oncekey is in the same rounds, at the level that is compared.
fn against(found: &Found, workload: Workload, subject: &Subject) -> String {
    let level = if subject.level == Level::Power { Level::Power } else { Level::Kill };
    let ours = Subject { peer: PeerName::Oncekey, level, ..*subject };
    if ours == *subject {
        return NONE.to_owned();
    }
    shown(found.ratio(&ours, subject, workload), |ratio| format!("{ratio:.2}x"))
}

const NONE: &str = "-";

fn shown(value: Option<f64>, show: fn(f64) -> String) -> String {
    value.map_or(NONE.to_owned(), show)
}

pub fn rate(value: f64) -> String {
    match value {
        value if value >= 1e6 => format!("{:.2}M", value / 1e6),
        value if value >= 1e5 => format!("{:.0}k", value / 1e3),
        value if value >= 1e3 => format!("{:.1}k", value / 1e3),
        value => format!("{value:.0}"),
    }
}

fn count(value: f64) -> String {
    format!("{value}")
}

/// Nanoseconds, in the unit that suits.
fn duration(ns: f64) -> String {
    let three_digits = |value: f64| match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    };
    match ns {
        ns if ns >= 1e9 => format!("{} s", three_digits(ns / 1e9)),
        ns if ns >= 1e6 => format!("{} ms", three_digits(ns / 1e6)),
        ns if ns >= 1e3 => format!("{} us", three_digits(ns / 1e3)),
        ns => format!("{ns:.0} ns"),
    }
}
