//! Instructions that each operation takes, as callgrind counts them: a guard against regressions that needs no clock.
//!
//! Each operation runs in a process of its own under valgrind, which counts what [`counted`] does and nothing before or
//! after it. Clock, hash keys and the journal's media are fixed, the store has no threads, and no segment's turn falls into
//! what is counted: so two runs differ by less than a thousandth. What another compiler, C library or processor makes of the
//! same source may be a few percent.

#![allow(missing_docs, reason = "benches are not documented")]

#[path = "../workload/mod.rs"]
mod workload;

use oncekey::{Durability, Fingerprint, ManualClock, Media, Outcome, Request, Store};
use std::hint::black_box;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use workload::{ANSWER, builder, fresh, key, reserve};

struct Operation {
    name: &'static str,
    /// Instructions of one, as they were last recorded.
    recorded: u64,
    on_disk: bool,
    run: fn(&Scene),
}

/// Recorded on 2026-11-27 with the release profile, as users build: rustc 1.95.0, valgrind 3.19.0, glibc 2.36, x86-64 with AVX2. `make instructions` prints what to put here.
const OPERATIONS: [Operation; 8] = [
    Operation { name: "reserve, Buffered", recorded: 1611, on_disk: true, run: reserve_new },
    Operation { name: "complete, Buffered", recorded: 1700, on_disk: true, run: complete },
    Operation { name: "FRESH, Buffered", recorded: 3269, on_disk: true, run: fresh_pair },
    Operation { name: "FRESH, in memory", recorded: 3257, on_disk: false, run: fresh_pair },
    Operation { name: "replay, Buffered", recorded: 636, on_disk: true, run: replay },
    Operation { name: "in flight, Buffered", recorded: 607, on_disk: true, run: in_flight },
    Operation { name: "mismatch, Buffered", recorded: 543, on_disk: true, run: mismatch },
    Operation { name: "expiry, Buffered", recorded: 488, on_disk: true, run: expire },
];

/// Share of the recorded count that a count may be off by, either way.
const TOLERANCE: f64 = 0.05;
/// Operations of one kind that are counted.
const COUNT: u64 = 20_000;
/// Holds all answers of a scene.
const SEGMENT_LEN: u64 = 16 * 1024 * 1024;
const NOW_MS: u64 = 1_700_000_000_000;
/// Longer than answers are kept.
const TWO_DAYS: Duration = Duration::from_secs(2 * 24 * 3600);

/// Runs one operation, by its name, and counts nothing: what valgrind is started with.
const RUN: &str = "--run";

/// A store with as many completed keys as operations are counted, and as many keys that it doesn't know.
struct Scene {
    store: Store,
    clock: Arc<ManualClock>,
    completed: Vec<[u8; 16]>,
    new: Vec<[u8; 16]>,
    _dir: TempDir,
}

impl Scene {
    fn new(on_disk: bool) -> Scene {
        let program = std::env::current_exe().expect("Linux says which program this is");
        let dir = tempfile::tempdir_in(program.parent().expect("a file is in a directory"));
        let dir = dir.expect("the target directory is writable");
        let clock = Arc::new(ManualClock::new(NOW_MS));
        let settings = builder(Durability::Buffered)
            .segment_size(SEGMENT_LEN)
            .media(Media::Mmap)
            .clock(Arc::clone(&clock))
            .background(false)
            .seed(1);
        let store = if on_disk { settings.open(dir.path()) } else { settings.in_memory() }.expect("a store opens");
        let completed: Vec<_> = (0..COUNT).map(key).collect();
        for (i, key) in completed.iter().enumerate() {
            // Deadlines differ, as they do beside a clock that runs.
            clock.set(NOW_MS + i as u64 / 16);
            fresh(&store, key);
        }
        store.maintain(usize::MAX).expect("the store is good");
        Scene { store, clock, completed, new: (COUNT..2 * COUNT).map(key).collect(), _dir: dir }
    }

    fn ask(&self, key: &[u8; 16], fingerprint: [u8; 16]) -> Outcome {
        let request = Request::new(key).fingerprint(Fingerprint::from_bytes(fingerprint));
        self.store.reserve(&request).expect("the store is good")
    }
}

/// What callgrind collects: it goes by this function's name.
#[inline(never)]
fn counted(operations: impl FnOnce()) {
    operations();
}

fn reserve_new(scene: &Scene) {
    let mut reservations = Vec::with_capacity(scene.new.len());
    counted(|| reservations.extend(scene.new.iter().map(|key| reserve(&scene.store, key))));
}

fn complete(scene: &Scene) {
    let reservations: Vec<_> = scene.new.iter().map(|key| reserve(&scene.store, key)).collect();
    counted(|| {
        for reservation in reservations {
            reservation.complete(ANSWER).expect("the store is good");
        }
    });
}

fn fresh_pair(scene: &Scene) {
    counted(|| scene.new.iter().for_each(|key| fresh(&scene.store, key)));
}

fn replay(scene: &Scene) {
    counted(|| {
        for key in &scene.completed {
            match scene.ask(key, *key) {
                Outcome::Replay(record) => _ = black_box(record.bytes()),
                other => panic!("a completed key is {other:?}"),
            }
        }
    });
}

fn in_flight(scene: &Scene) {
    let _reservations: Vec<_> = scene.new.iter().map(|key| reserve(&scene.store, key)).collect();
    counted(|| {
        for key in &scene.new {
            match scene.ask(key, *key) {
                Outcome::InFlight(_) => {}
                other => panic!("a reserved key is {other:?}"),
            }
        }
    });
}

fn mismatch(scene: &Scene) {
    counted(|| {
        for key in &scene.completed {
            match scene.ask(key, [0; 16]) {
                Outcome::Mismatch(_) => {}
                other => panic!("a key with another fingerprint is {other:?}"),
            }
        }
    });
}

fn expire(scene: &Scene) {
    scene.clock.advance(TWO_DAYS);
    counted(|| _ = black_box(scene.store.maintain(usize::MAX)));
    assert_eq!(scene.store.stats().expired, COUNT);
}

impl Operation {
    fn run(&self) {
        let scene = Scene::new(self.on_disk);
        let segments = scene.store.stats().segments;
        (self.run)(&scene);
        assert_eq!(scene.store.stats().segments, segments, "a segment was made meanwhile");
    }

    fn start(&self) -> Child {
        Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=*instructions::counted*"])
            .arg(std::env::current_exe().expect("Linux says which program this is"))
            .args([RUN, self.name])
            .stderr(Stdio::piped())
            .spawn()
            .expect("valgrind is there, as `make setup` sees to")
    }

    /// Instructions of one operation, once the process has ended.
    fn count(&self, child: Child) -> f64 {
        let output = child.wait_with_output().expect("the process can be waited for");
        let report = String::from_utf8_lossy(&output.stderr);
        let collected = report.lines().find_map(|line| line.split_once("Collected :"));
        match collected.and_then(|(_, count)| count.trim().parse::<u64>().ok()) {
            Some(count) if output.status.success() => count as f64 / COUNT as f64,
            _ => panic!("{}: {}\n{report}", self.name, output.status),
        }
    }

    /// What is wrong with a count, and what to do about it.
    fn objection(&self, count: f64) -> Option<String> {
        let (name, ratio) = (self.name, count / self.recorded as f64);
        if ratio > 1.0 + TOLERANCE {
            Some(format!(
                "{name} takes {ratio:.3} times what is recorded. See what the change adds; if it is worth that, record {count:.0}."
            ))
        } else if ratio < 1.0 - TOLERANCE {
            Some(format!("{name} takes {ratio:.3} times what is recorded. Record {count:.0}, so that the gain stays."))
        } else {
            None
        }
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    if has("--list") {
        return ExitCode::SUCCESS;
    }
    // As criterion has it: with `--test` everything runs once and nothing is measured, nor in a build with assertions.
    if has(RUN) || has("--test") || cfg!(debug_assertions) {
        OPERATIONS.iter().filter(|operation| !has(RUN) || has(operation.name)).for_each(Operation::run);
        return ExitCode::SUCCESS;
    }
    // All at once: the kernel spreads them over the cores.
    let children = OPERATIONS.each_ref().map(Operation::start);
    println!("instructions an operation, {COUNT} operations each\n");
    println!("{:22} {:>8} {:>10} {:>8}", "", "now", "recorded", "ratio");
    let mut objections = Vec::new();
    for (operation, child) in OPERATIONS.iter().zip(children) {
        let count = operation.count(child);
        let ratio = count / operation.recorded as f64;
        println!("{:22} {count:8.0} {:10} {ratio:8.3}", operation.name, operation.recorded);
        objections.extend(operation.objection(count));
    }
    if objections.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("\n{}\nThe counts are recorded in {}.", objections.join("\n"), file!());
    ExitCode::FAILURE
}
