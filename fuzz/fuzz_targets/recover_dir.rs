//! A directory of arbitrary files, or of a store's files with arbitrary damage: opened or refused, never worse.
#![no_main]

use libfuzzer_sys::fuzz_target;
use oncekey::testing::SimDisk;
use oncekey::{Durability, ManualClock, Outcome, RecoveryMode, Request, Store};
use std::sync::{Arc, OnceLock};

const SEGMENT: u64 = 64 * 1024;

fn open(disk: &SimDisk, mode: RecoveryMode) -> oncekey::Result<Store> {
    Store::builder()
        .clock(Arc::new(ManualClock::new(1_767_225_600_000)))
        .background(false)
        .durability(Durability::Synced)
        .segment_size(SEGMENT)
        .recovery(mode)
        .open_simulated(disk)
}

/// A store with some of everything, one segment sealed and one not.
fn files() -> &'static Vec<(String, Vec<u8>)> {
    static FILES: OnceLock<Vec<(String, Vec<u8>)>> = OnceLock::new();
    FILES.get_or_init(|| {
        let disk = SimDisk::new();
        let store = open(&disk, RecoveryMode::Strict).unwrap();
        for key in 0..40_u8 {
            let name = [b'k', key];
            let Ok(Outcome::Reserved(mut owner)) = store.reserve(&Request::new(&name).scope("fuzz")) else { panic!() };
            match key % 5 {
                0 => owner.release().unwrap(),
                1 => {
                    owner.recovery_point([key; 30]).unwrap();
                    owner.fail([key; 50]).unwrap();
                }
                2 => drop(owner),
                _ => {
                    owner.complete(vec![key; usize::from(key) * 20]).unwrap();
                }
            }
            if key == 20 {
                store.erase(&Request::new(&[b'k', 3]).scope("fuzz")).unwrap();
            }
        }
        store.close().unwrap();
        let store = open(&disk, RecoveryMode::Strict).unwrap();
        let Ok(Outcome::Reserved(owner)) = store.reserve(&Request::new("last")) else { panic!() };
        owner.complete(b"unsealed").unwrap();
        let names = disk.files().into_iter().map(|(name, _)| name);
        names.map(|name| (name.clone(), disk.contents(&name).unwrap())).collect()
    })
}

fuzz_target!(|input: (Vec<(u8, u16, u8, Vec<u8>)>, Vec<(u8, Vec<u8>)>)| {
    let (damages, foreign) = input;
    let mut files = files().clone();
    for (file, place, how, bytes) in damages {
        let count = files.len();
        let (_, contents) = &mut files[usize::from(file) % count];
        let at = usize::from(place).min(contents.len());
        match how % 5 {
            0 => {
                let end = (at + bytes.len()).min(contents.len());
                contents[at..end].copy_from_slice(&bytes[..end - at]);
            }
            1 => contents.truncate(at),
            2 => {
                let end = (at + bytes.len() * 64).min(contents.len());
                contents[at..end].fill(0);
            }
            3 => contents.extend_from_slice(&bytes),
            _ => {
                let other = usize::from(how) % count;
                let copy = files[other].1.clone();
                files[usize::from(file) % count].1 = copy;
            }
        }
    }
    let names = [
        "STORE",
        "LOCK",
        "SEGMENTS",
        "0000000000000001.seg",
        "00000000000000ff.seg",
        "x.seg",
        "0000000000000002.seg.new",
    ];
    for (name, contents) in foreign {
        let name = names[usize::from(name) % names.len()].to_owned();
        files.retain(|(other, _)| *other != name);
        files.push((name, contents));
    }
    for mode in [RecoveryMode::Strict, RecoveryMode::Salvage] {
        let disk = SimDisk::new();
        for (name, contents) in &files {
            disk.put(name, contents.clone());
        }
        let Ok(store) = open(&disk, mode) else { continue };
        store.verify().expect("what was opened is whole");
        store.maintain(usize::MAX).expect("upkeep");
        store.close().expect("closing");
        let again = open(&disk, RecoveryMode::Strict).expect("what was closed opens");
        assert!(again.recovery().lost.is_empty() && again.recovery().cut.is_empty());
    }
});
