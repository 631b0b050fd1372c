//! Real processes, really killed.

use crate::support::request;
use oncekey::{Durability, ErrorKind, Outcome, Store};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

const CHILD: &str = "ONCEKEY_PROCESS_CHILD";
const THREADS: u64 = 4;

fn builder(durability: Durability) -> oncekey::Builder {
    Store::builder().durability(durability).segment_size(256 * 1024)
}

fn answer(key: &str) -> Vec<u8> {
    format!("the answer to {key} ").repeat(8).into_bytes()
}

/// Does nothing but in the processes that the tests below start: reserves and completes until it is killed, and says
/// what was acknowledged.
#[test]
fn child_entry() {
    let Some(orders) = std::env::var_os(CHILD) else { return };
    let orders = orders.into_string().unwrap();
    let mut words = orders.splitn(3, ' ');
    let durability = if words.next() == Some("synced") { Durability::Synced } else { Durability::Buffered };
    let round = words.next().unwrap();
    let store = builder(durability).open(words.next().unwrap()).unwrap();
    let say = |what: &str, key: &str| {
        // One write a line: lines of several threads don't mix.
        std::io::stdout().write_all(format!("\nACK {what} {key}\n").as_bytes()).unwrap();
    };
    say("open", "-");
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (store, say) = (&store, &say);
            scope.spawn(move || {
                for number in 0_u64.. {
                    let key = format!("{round}/{thread}/{number}");
                    let Ok(Outcome::Reserved(owner)) = store.reserve(&request(&key, 1)) else { panic!("{key}") };
                    say("reserved", &key);
                    match number % 8 {
                        0 => {
                            owner.release().unwrap();
                            say("released", &key);
                        }
                        // Held until the end.
                        1 => std::mem::forget(owner),
                        _ => {
                            owner.complete(answer(&key)).unwrap();
                            say("completed", &key);
                        }
                    }
                }
            });
        }
    });
}

fn start(durability: &str, round: usize, dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "processes::child_entry", "--nocapture"])
        .env(CHILD, format!("{durability} {round} {}", dir.display()))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Notes what the child acknowledges; kills it after so many acknowledgements, and reads on to the end.
fn run_and_kill(mut child: Child, after: usize, acknowledged: &mut BTreeMap<String, String>) -> usize {
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut count = 0;
    for line in lines {
        let line = line.unwrap();
        let Some(rest) = line.strip_prefix("ACK ") else { continue };
        let (what, key) = rest.split_once(' ').expect("what and key");
        if what != "open" {
            acknowledged.insert(key.to_owned(), what.to_owned());
            count += 1;
        }
        if count == after {
            child.kill().unwrap();
        }
    }
    child.wait().unwrap();
    count
}

fn nothing_is_lost(name: &str, durability: Durability, rounds: usize, acks: usize) {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = BTreeMap::new();
    for round in 0..rounds {
        let count = run_and_kill(start(name, round, dir.path()), acks + round * 97, &mut acknowledged);
        assert!(count >= acks, "the child ended by itself after {count} acknowledgements");
        // What is asked for every round is not changed by asking: completed keys only.
        let store = builder(durability).open(dir.path()).unwrap();
        assert!(store.recovery().lost.is_empty(), "{:?}", store.recovery());
        for (key, what) in &acknowledged {
            if what == "completed" {
                let record = store.get(&request(key, 1)).unwrap().unwrap_or_else(|| panic!("{key} is lost"));
                assert_eq!(record.bytes(), answer(key));
            }
        }
        store.verify().unwrap();
    }
    let store = builder(durability).open(dir.path()).unwrap();
    for (key, what) in &acknowledged {
        let outcome = store.reserve(&request(key, 1)).unwrap();
        match (what.as_str(), &outcome) {
            ("completed", Outcome::Replay(record)) => assert_eq!(record.bytes(), answer(key)),
            ("released", Outcome::Reserved(_)) | ("reserved", Outcome::Interrupted(_) | Outcome::Replay(_)) => {}
            // The release was written, and its acknowledgement was not.
            ("reserved", Outcome::Reserved(_)) if key.rsplit('/').next().unwrap().parse::<u64>().unwrap() % 8 == 0 => {}
            (what, outcome) => panic!("{key} was {what}, and is {outcome:?}"),
        }
    }
}

#[test]
fn kill_9_loses_nothing_that_was_acknowledged_as_buffered() {
    nothing_is_lost("buffered", Durability::Buffered, 6, 4_000);
}

#[test]
fn kill_9_loses_nothing_that_was_acknowledged_as_synced() {
    nothing_is_lost("synced", Durability::Synced, 4, 400);
}

#[test]
fn a_second_process_is_locked_out_until_the_first_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = start("buffered", 0, dir.path());
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    while lines.next().expect("the child opens the store").unwrap() != "ACK open -" {}
    let refused = Store::open(dir.path()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Locked, "{refused}");
    child.kill().unwrap();
    child.wait().unwrap();
    builder(Durability::Buffered).open(dir.path()).unwrap();
}

/// Does nothing but in the processes that the test below starts: opens the store, again and again, until it is killed.
#[test]
fn child_that_recovers() {
    let Some(dir) = std::env::var_os("ONCEKEY_RECOVERING_CHILD") else { return };
    std::io::stdout().write_all(b"\nACK start -\n").unwrap();
    let store = builder(Durability::Buffered).open(dir).unwrap();
    std::io::stdout().write_all(b"\nACK open -\n").unwrap();
    drop(store);
}

/// What of a store's state can be seen: completed keys with their answers, interrupted ones, and how many of each.
fn state_of(dir: &Path, keys: &[String]) -> (u64, u64, BTreeMap<String, Vec<u8>>) {
    let store = builder(Durability::Buffered).open(dir).unwrap();
    assert!(store.recovery().lost.is_empty(), "{:?}", store.recovery());
    store.verify().unwrap();
    let answers = keys.iter().filter_map(|key| {
        let record = store.get(&request(key, 1)).unwrap()?;
        Some((key.clone(), record.bytes().to_vec()))
    });
    (store.recovery().completed, store.recovery().interrupted, answers.collect())
}

fn copy_files(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

#[test]
fn kill_9_during_recovery_changes_nothing_that_the_next_recovery_finds() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = BTreeMap::new();
    run_and_kill(start("buffered", 0, dir.path()), 6_000, &mut acknowledged);
    let keys: Vec<String> = acknowledged.keys().cloned().collect();
    let undisturbed = tempfile::tempdir().unwrap();
    copy_files(dir.path(), undisturbed.path());
    let expected = state_of(undisturbed.path(), &keys);
    assert!(expected.0 > 0 && expected.1 > 0, "{expected:?}");
    let (mut killed, mut opened) = (0, 0);
    for round in 0..30_u64 {
        let crashed = tempfile::tempdir().unwrap();
        copy_files(dir.path(), crashed.path());
        // Two in a row: a recovery cut short of what a recovery cut short left.
        for again in 0..2 {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "processes::child_that_recovers", "--nocapture"])
                .env("ONCEKEY_RECOVERING_CHILD", crashed.path())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            while lines.next().expect("the child starts").unwrap() != "ACK start -" {}
            // Not waiting for anything: just some time that differs from round to round.
            for _ in 0..(round * 2 + again) * 4_000 {
                std::hint::spin_loop();
            }
            child.kill().unwrap();
            child.wait().unwrap();
            if lines.any(|line| line.unwrap() == "ACK open -") {
                opened += 1;
            } else {
                killed += 1;
            }
        }
        assert_eq!(state_of(crashed.path(), &keys), expected, "round {round}");
    }
    println!("{killed} recoveries were cut short, {opened} were not");
    assert!(killed >= 5, "only {killed} recoveries were cut short");
}
