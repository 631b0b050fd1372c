//! Scenes of one child process each: a store on a file system to which something happens.
//!
//! A scene has the disk's server do things by [`order`], and mounts and unmounts itself. It fails by an error or a panic;
//! a death by signal is seen by who started it.

use crate::child::{Child, order};
use crate::device::{Cut, Device, Faults, Image, Kept};
use crate::ground::{Ground, Kind, run};
use crate::life::{Book, is_full};
use crate::{Check, Result, Run, calls};
use oncekey::Durability::{Buffered, Synced};
use oncekey::{Builder, Durability, Error, ErrorKind, ManualClock, Outcome, Request, Store};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

struct Scene {
    name: &'static str,
    check: Check,
    fits: fn(Kind) -> bool,
    play: fn(&Ground) -> Result<()>,
}

const ANY: fn(Kind) -> bool = |_| true;
const DISK: fn(Kind) -> bool = Kind::has_device;
/// Where a system call of its own shuts the file system down at once.
const STOPS: fn(Kind) -> bool = |kind| matches!(kind, Kind::Ext4 | Kind::Xfs | Kind::Reflink);
const FEW_INODES: fn(Kind) -> bool = |kind| matches!(kind, Kind::Ext4 | Kind::Tmpfs);

const SCENES: &[Scene] = &[
    Scene { name: "unflushed", check: Check::Disk, fits: DISK, play: unflushed_data_is_lost_in_a_cut },
    Scene { name: "full", check: Check::Fill, fits: ANY, play: |ground| fill(ground, 0, Relief::Ballast) },
    Scene { name: "fills-up", check: Check::Fill, fits: ANY, play: |ground| fill(ground, 4 << 20, Relief::Ballast) },
    Scene { name: "expires", check: Check::Fill, fits: ANY, play: |ground| fill(ground, 4 << 20, Relief::Expiry) },
    Scene { name: "born-full", check: Check::Fill, fits: ANY, play: no_room_for_a_new_store },
    Scene { name: "inodes", check: Check::Inodes, fits: FEW_INODES, play: no_more_names },
    Scene { name: "limited", check: Check::Ulimit, fits: ANY, play: a_new_store_over_the_file_size_limit },
    Scene { name: "limited-later", check: Check::Ulimit, fits: ANY, play: the_limit_falls_below_a_segment },
    Scene { name: "limited-at-open", check: Check::Ulimit, fits: ANY, play: an_old_store_over_the_file_size_limit },
    Scene { name: "stops", check: Check::Readonly, fits: STOPS, play: |ground| shut_down(ground, Synced) },
    Scene { name: "stops-unseen", check: Check::Readonly, fits: STOPS, play: |ground| shut_down(ground, Buffered) },
    Scene { name: "stops-at-a-page", check: Check::Readonly, fits: STOPS, play: shut_down_at_a_page },
    Scene { name: "read-only", check: Check::Readonly, fits: DISK, play: opened_on_a_read_only_mount },
    Scene { name: "writes-fail", check: Check::Eio, fits: DISK, play: |ground| fail(ground, "writes 1") },
    Scene { name: "some-writes-fail", check: Check::Eio, fits: DISK, play: |ground| fail(ground, "writes 7") },
    Scene { name: "flushes-fail", check: Check::Eio, fits: DISK, play: |ground| fail(ground, "flushes 1") },
    Scene { name: "some-flushes-fail", check: Check::Eio, fits: DISK, play: |ground| fail(ground, "flushes 5") },
    Scene { name: "reads-fail", check: Check::Eio, fits: DISK, play: reads_fail_at_opening },
    Scene { name: "slow", check: Check::Slow, fits: DISK, play: a_flush_that_takes_long },
];

pub fn play(name: &str, ground: &Ground) -> Result<()> {
    if name == "history" {
        return calls::history(ground);
    }
    let scene = SCENES.iter().find(|scene| scene.name == name).ok_or("no such scene")?;
    (scene.play)(ground)
}

impl Run {
    /// Plays all scenes that fit, each on a fresh file system.
    pub fn scenes(&mut self, ground: &Ground, disk: Option<(&Device, &Image)>) -> Result<()> {
        for scene in SCENES.iter().filter(|scene| (scene.fits)(ground.kind)) {
            if self.wants(scene.check) {
                let what = format!("{} {}", ground.kind.name(), scene.name);
                self.checks += 1;
                self.images.set_message(what.clone());
                self.on_fresh(ground, disk, &what, |run| {
                    run.stage(scene.name, ground, disk.map(|(device, _)| device))
                })?;
            }
        }
        Ok(())
    }

    /// Does something on a fresh file system, mounted before and unmounted after.
    pub fn on_fresh(
        &mut self,
        ground: &Ground,
        disk: Option<(&Device, &Image)>,
        what: &str,
        act: impl FnOnce(&mut Run) -> Result<()>,
    ) -> Result<()> {
        if let Some((device, fresh)) = disk {
            device.load(fresh.clone());
        }
        ground.mount()?;
        let started = std::time::Instant::now();
        let ended = act(self);
        if let Some((device, _)) = disk {
            device.fail(Faults::default());
            device.release_flushes();
        }
        // A scene that failed may have left it unmounted.
        let unmounted = ground.unmount();
        if ended.is_ok() {
            unmounted?;
        }
        if self.args.times {
            self.images.suspend(|| eprintln!("{what}: {:.1} s", started.elapsed().as_secs_f64()));
        }
        if let Err(error) = ended {
            self.violated(what, &*error);
        }
        Ok(())
    }

    /// Starts a scene, and does what it orders.
    fn stage(&mut self, name: &str, ground: &Ground, device: Option<&Device>) -> Result<()> {
        let mut command = self.myself("play");
        command.arg(name).arg(ground.kind.name()).arg(&ground.at).args(&ground.file);
        let mut child = Child::start(&mut command)?;
        let mut cut = None;
        loop {
            let line = match child.line() {
                Ok(Some(line)) => line,
                Ok(None) => return child.end(),
                Err(hung) => {
                    if let Some(device) = device {
                        device.release_flushes();
                    }
                    return Err(hung);
                }
            };
            if let Some(order) = line.strip_prefix("? ") {
                let device = device.ok_or("an order to no disk")?;
                let answer = self.obey(order, device, &mut cut)?;
                child.answer(&answer)?;
            }
        }
    }

    fn obey(&mut self, order: &str, device: &Device, cut: &mut Option<Cut>) -> Result<String> {
        let words: Vec<&str> = order.split(' ').collect();
        match words[..] {
            ["fail", kind, each] => {
                let each = each.parse()?;
                device.fail(match kind {
                    "reads" => Faults { reads: each, ..Faults::default() },
                    "writes" => Faults { writes: each, ..Faults::default() },
                    _ => Faults { flushes: each, ..Faults::default() },
                });
            }
            ["mend"] => device.fail(Faults::default()),
            ["hold"] => device.hold_flushes(),
            ["release"] => device.release_flushes(),
            ["held"] => return Ok(device.held().to_string()),
            ["flushes"] => return Ok(device.counts().flushes.to_string()),
            ["failed"] => return Ok(device.counts().failed.to_string()),
            ["cut"] => *cut = Some(device.cut()),
            // The disk after that cut, for who has unmounted it.
            ["power-on"] => {
                let cut = cut.take().ok_or("no cut to come back from")?;
                device.load(cut.image(Kept::Nothing, |_| false, &mut self.random));
            }
            _ => return Err(format!("an unknown order: {order}").into()),
        }
        Ok("done".to_owned())
    }
}

fn settings() -> Builder {
    Store::builder().segment_size(64 * 1024)
}

/// A store with some keys. On a file system for it, one whose blocks are all shared with a copy.
fn start(ground: &Ground, settings: &Builder, book: &mut Book) -> Result<Store> {
    let store = settings.clone().open(ground.store())?;
    book.live(&store, Synced, 60)?;
    if ground.kind != Kind::Reflink {
        return Ok(store);
    }
    store.close()?;
    let original = ground.at.join("original");
    std::fs::rename(ground.store(), &original)?;
    run(&["cp", "--recursive", "--reflink=always"], &[&original, &ground.store()])?;
    // All of it is read, and in memory when the disk fails.
    Ok(settings.clone().index(false).open(ground.store())?)
}

/// Mounts anew, so that nothing of the page cache is left, opens the store and finds everything.
fn find_again(ground: &Ground, settings: &Builder, book: &Book) -> Result<()> {
    if ground.kind.has_device() {
        ground.unmount()?;
        ground.mount()?;
    }
    let store = settings.clone().open(ground.store()).map_err(|error| format!("opening again: {error:?}"))?;
    if !store.recovery().lost.is_empty() {
        return Err(format!("recovery lost something: {:?}", store.recovery()).into());
    }
    book.ask(&store)?;
    Ok(store.close()?)
}

/// A file that takes all space but so many bytes.
fn ballast(ground: &Ground, left: u64) -> Result<()> {
    let file = File::create(ground.at.join("ballast"))?;
    let mut end = 0;
    for step in (12..28).rev().map(|bits| 1_u64 << bits) {
        while fallocate(&file, FallocateFlags::empty(), end, step).is_ok() {
            end += step;
        }
    }
    file.set_len(end.saturating_sub(left))?;
    Ok(file.sync_all()?)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Relief {
    Ballast,
    Expiry,
}

fn fill(ground: &Ground, left: u64, relief: Relief) -> Result<()> {
    let clock = Arc::new(ManualClock::new(1_767_225_600_000));
    let settings = settings().clock(Arc::clone(&clock)).background(false);
    let mut book = Book::default();
    let mut store = start(ground, &settings, &mut book)?;
    ballast(ground, left)?;
    let refusal = until_refused(&store, &mut book, Buffered)?;
    let is_poisoned = store.stats().is_poisoned;
    if !(is_full(&refusal) || refusal.kind() == ErrorKind::Poisoned && may_poison(ground.kind)) {
        return Err(format!("a full disk is {refusal:?}").into());
    }
    book.look(&store)?;
    if !is_poisoned {
        // Nor does upkeep on a full disk end in anything else.
        drain(&store)?;
        book.look(&store)?;
    }
    // Opened while the disk is full.
    drop(store);
    store = match settings.clone().open(ground.store()) {
        Ok(store) => {
            book.look(&store)?;
            store
        }
        Err(error) if is_full(&error) => {
            std::fs::remove_file(ground.at.join("ballast"))?;
            return find_again(ground, &settings, &book);
        }
        Err(error) => return Err(format!("opening on a full disk: {error:?}").into()),
    };
    if relief == Relief::Expiry {
        clock.advance(Duration::from_secs(48 * 3600));
        drain(&store)?;
        let mut later = Book::of("later");
        later.live(&store, Synced, 40).map_err(|error| format!("after everything expired: {error:?}"))?;
        drop(store);
        return find_again(ground, &settings, &later);
    }
    std::fs::remove_file(ground.at.join("ballast"))?;
    book.live(&store, Synced, 100).map_err(|error| format!("after there was room again: {error:?}"))?;
    book.look(&store)?;
    drop(store);
    find_again(ground, &settings, &book)
}

/// Whether a write into allocated blocks may find no space, as it has to go elsewhere.
fn may_poison(kind: Kind) -> bool {
    matches!(kind, Kind::Btrfs | Kind::Reflink)
}

/// Lives through keys until one is refused, and some more; each refusal has to be of the same sort.
fn until_refused(store: &Store, book: &mut Book, durability: Durability) -> Result<Error> {
    let mut refused = None;
    for _ in 0..400 {
        match book.live(store, durability, 250) {
            Ok(()) => {}
            Err(error) => {
                refused = Some(error);
                break;
            }
        }
    }
    let refused = refused.ok_or("100,000 keys, and never full")?;
    for _ in 0..50 {
        if let Err(again) = book.live(store, Synced, 1)
            && is_full(&again) != is_full(&refused)
        {
            return Err(format!("{refused}, and then {again:?}").into());
        }
    }
    Ok(refused)
}

/// Upkeep until there is nothing more to do, or no room to do it in.
fn drain(store: &Store) -> Result<()> {
    for _ in 0..1000 {
        match store.maintain(10_000) {
            Ok(done) if !done.has_more && done.removed == 0 => return Ok(()),
            Ok(_) => {}
            Err(error) if is_full(&error) => return Ok(()),
            Err(error) => return Err(format!("upkeep on a full disk: {error:?}").into()),
        }
    }
    Err("upkeep finds no end".into())
}

fn no_room_for_a_new_store(ground: &Ground) -> Result<()> {
    std::fs::create_dir(ground.store())?;
    ballast(ground, 0)?;
    let full = match settings().open(ground.store()) {
        Err(error) => error,
        Ok(store) => Book::default().live(&store, Synced, 100_000).err().ok_or("100,000 keys, and never full")?,
    };
    if !is_full(&full) {
        return Err(format!("a full disk is {full:?}").into());
    }
    std::fs::remove_file(ground.at.join("ballast"))?;
    let mut book = Book::default();
    let store = settings().open(ground.store())?;
    book.live(&store, Synced, 60)?;
    drop(store);
    find_again(ground, &settings(), &book)
}

fn no_more_names(ground: &Ground) -> Result<()> {
    let settings = settings().background(false);
    let mut book = Book::default();
    let store = start(ground, &settings, &mut book)?;
    let names = ground.at.join("names");
    std::fs::create_dir(&names)?;
    let mut made = 0;
    while made < 1_000_000 && File::create(names.join(made.to_string())).is_ok() {
        made += 1;
    }
    let refusal = until_refused(&store, &mut book, Buffered)?;
    if !is_full(&refusal) {
        return Err(format!("no more names is {refusal:?}").into());
    }
    book.look(&store)?;
    std::fs::remove_dir_all(&names)?;
    book.live(&store, Synced, 100)?;
    drop(store);
    find_again(ground, &settings, &book)
}

fn limit_files_to(bytes: u64) -> Result<()> {
    let maximum = getrlimit(Resource::Fsize).maximum;
    Ok(setrlimit(Resource::Fsize, Rlimit { current: Some(bytes), maximum })?)
}

fn a_new_store_over_the_file_size_limit(ground: &Ground) -> Result<()> {
    limit_files_to(32 * 1024)?;
    match settings().open(ground.store()).and_then(|store| Book::default().live(&store, Synced, 10)) {
        Err(error) if is_full(&error) => Ok(()),
        other => Err(format!("segments over the limit: {other:?}").into()),
    }
}

fn the_limit_falls_below_a_segment(ground: &Ground) -> Result<()> {
    let settings = settings().background(false);
    let mut book = Book::default();
    let store = start(ground, &settings, &mut book)?;
    // Segments that are there may be written on; no other is made.
    limit_files_to(64 * 1024 - 1)?;
    let refusal = until_refused(&store, &mut book, Buffered)?;
    if !is_full(&refusal) {
        return Err(format!("a limit below a segment is {refusal:?}").into());
    }
    book.look(&store)?;
    limit_files_to(1 << 30)?;
    book.live(&store, Synced, 100)?;
    drop(store);
    find_again(ground, &settings, &book)
}

fn an_old_store_over_the_file_size_limit(ground: &Ground) -> Result<()> {
    let mut book = Book::default();
    drop(start(ground, &settings(), &mut book)?);
    limit_files_to(16 * 1024)?;
    match settings().open(ground.store()) {
        Ok(store) => {
            book.look(&store)?;
            match book.live(&store, Synced, 1000) {
                Err(error) if is_full(&error) => {}
                other => return Err(format!("segments over the limit: {other:?}").into()),
            }
        }
        Err(error) if is_full(&error) => {}
        Err(error) => return Err(format!("opening over the limit: {error:?}").into()),
    }
    limit_files_to(1 << 30)?;
    find_again(ground, &settings(), &book)
}

/// What a store has to say whose disk is gone: an error by name, each time, while reads go on.
fn refuses(store: &Store, book: &mut Book, durability: Durability) -> Result<()> {
    let first = until_refused(store, book, durability)?;
    if !matches!(first.kind(), ErrorKind::Poisoned | ErrorKind::Io) {
        return Err(format!("a disk that is gone is {first:?}").into());
    }
    if first.kind() == ErrorKind::Poisoned {
        match store.reserve(&Request::new("after-poison")) {
            Err(error) if error.kind() == ErrorKind::Poisoned => {}
            other => return Err(format!("after poison: {other:?}").into()),
        }
    }
    Ok(book.look(store)?)
}

fn shut_down(ground: &Ground, durability: Durability) -> Result<()> {
    let settings = settings().durability(durability);
    let mut book = Book::default();
    let store = start(ground, &settings, &mut book)?;
    store.sync()?;
    run(&["xfs_io", "-x", "-c", "shutdown"], &[&ground.at])?;
    // Without a sync the store may not find out until it needs one; that much nobody was promised.
    let mut unpromised = Book::of("unpromised");
    let later = if durability == Synced { &mut book } else { &mut unpromised };
    refuses(&store, later, durability)?;
    book.look(&store)?;
    drop(store);
    find_again(ground, &settings, &book)
}

/// The first record of a page is refused, so that nothing is in memory where it should have been written.
fn shut_down_at_a_page(ground: &Ground) -> Result<()> {
    // It fills a page together with its record's header, the lengths before a stored key, and the mark of the sync.
    let long = "k".repeat(4096 - 64 - 4 - 64);
    let settings = settings().durability(Buffered).background(false).max_key_len(8192);
    let store = settings.clone().open(ground.store())?;
    drop(store.reserve(&Request::new(&long))?);
    store.sync()?;
    run(&["xfs_io", "-x", "-c", "shutdown"], &[&ground.at])?;
    match store.reserve(&Request::new("next").durability(Synced)) {
        Err(error) if error.kind() == ErrorKind::Poisoned => {}
        other => return Err(format!("on a file system that is shut down: {other:?}").into()),
    }
    drop(store);
    ground.unmount()?;
    ground.mount()?;
    match settings.open(ground.store())?.reserve(&Request::new(&long))? {
        Outcome::Interrupted(_) => Ok(()),
        other => Err(format!("a synced reservation is {other:?}").into()),
    }
}

fn opened_on_a_read_only_mount(ground: &Ground) -> Result<()> {
    let mut book = Book::default();
    let store = start(ground, &settings(), &mut book)?;
    if ground.remount("ro").is_ok() {
        return Err(
            "a file system with files open for writing went read-only; this scene has to be thought over".into()
        );
    }
    book.live(&store, Synced, 20)?;
    drop(store);
    ground.unmount()?;
    ground.mount_with("ro")?;
    match settings().open(ground.store()) {
        Err(error) if error.kind() == ErrorKind::Io => {}
        other => return Err(format!("on a read-only mount: {other:?}").into()),
    }
    find_again(ground, &settings(), &book)
}

fn fail(ground: &Ground, which: &str) -> Result<()> {
    let mut book = Book::default();
    let store = start(ground, &settings(), &mut book)?;
    order(&format!("fail {which}"))?;
    let mut refused = None;
    for _ in 0..2000 {
        if let Err(error) = book.live(&store, Synced, 1) {
            refused = Some(error);
            break;
        }
    }
    let refused = refused.ok_or("2,000 synced keys, and no failure")?;
    if order("failed")? == "0" {
        return Err(format!("the disk failed nothing, and the store: {refused:?}").into());
    }
    if !matches!(refused.kind(), ErrorKind::Poisoned | ErrorKind::Io) {
        return Err(format!("{which} failing is {refused:?}").into());
    }
    refuses(&store, &mut book, Synced)?;
    // The power fails as well: what was acknowledged had been flushed.
    order("cut")?;
    drop(store);
    order("mend")?;
    // What can't be written any more may fail this; the disk is replaced by what it was at the cut.
    ground.unmount()?;
    order("power-on")?;
    ground.mount()?;
    find_again(ground, &settings(), &book)
}

fn reads_fail_at_opening(ground: &Ground) -> Result<()> {
    let mut book = Book::default();
    drop(start(ground, &settings(), &mut book)?);
    let mut failed = 0;
    for each in [1, 2, 3, 5, 8, 13, 21] {
        ground.unmount()?;
        ground.mount()?;
        // The names are known, so that what fails is the store's reading.
        std::fs::read_dir(ground.store())?.try_for_each(|entry| entry?.metadata().map(|_| ()))?;
        order(&format!("fail reads {each}"))?;
        let opened = settings().background(false).open(ground.store());
        order("mend")?;
        match opened {
            Ok(store) => book.look(&store)?,
            Err(error) if error.kind() == ErrorKind::Io => failed += 1,
            Err(error) => return Err(format!("each {each}th read failing is {error:?}").into()),
        }
    }
    if failed == 0 {
        return Err("no opening met a read that failed".into());
    }
    find_again(ground, &settings(), &book)
}

/// While the disk holds a flush back nobody who waits for it is told that it is over, and others go on.
fn a_flush_that_takes_long(ground: &Ground) -> Result<()> {
    // Large enough that no segment is made meanwhile, which would wait as well.
    let settings = Store::builder().segment_size(1 << 20).background(false);
    let mut book = Book::default();
    let store = start(ground, &settings, &mut book)?;
    // All streams have a segment with room.
    book.live(&store, Synced, 60)?;
    let is_told = AtomicBool::new(false);
    order("hold")?;
    std::thread::scope(|scope| -> Result<()> {
        let waiting = scope.spawn(|| {
            let answer = store.reserve(&Request::new("waits").durability(Synced)).map(drop);
            is_told.store(true, Ordering::SeqCst);
            answer
        });
        let went_on = go_on(&store, &book);
        let was_told = is_told.load(Ordering::SeqCst);
        order("release")?;
        waiting.join().map_err(|_| "the waiting thread panicked")??;
        went_on?;
        if was_told { Err("a synced reservation was acknowledged before the flush returned".into()) } else { Ok(()) }
    })?;
    drop(store);
    find_again(ground, &settings, &book)
}

/// Other keys' operations, once the disk holds a flush; they come to an end though it goes on holding it.
fn go_on(store: &Store, book: &Book) -> Result<()> {
    while order("held")? == "0" {
        std::thread::yield_now();
    }
    for number in 0..100 {
        let name = format!("goes-on-{number}");
        let Outcome::Reserved(owner) = store.reserve(&Request::new(&name).durability(Buffered))? else {
            return Err("a new key is not new".into());
        };
        owner.complete(&name).map_err(Error::from)?;
        book.look(store)?;
    }
    Ok(())
}

/// The rig itself: a cut that keeps nothing loses a file that nobody synced, and not one that was.
fn unflushed_data_is_lost_in_a_cut(ground: &Ground) -> Result<()> {
    let (synced, unsynced) = (ground.at.join("synced"), ground.at.join("unsynced"));
    let flushes: u64 = order("flushes")?.parse()?;
    std::fs::write(&synced, [7; 10_000])?;
    File::open(&synced)?.sync_all()?;
    File::open(&ground.at)?.sync_all()?;
    if order("flushes")?.parse::<u64>()? <= flushes {
        return Err("an fsync didn't reach the disk as a flush".into());
    }
    std::fs::write(&unsynced, [8; 10_000])?;
    order("cut")?;
    ground.unmount()?;
    order("power-on")?;
    ground.mount()?;
    if std::fs::read(&synced)? != [7; 10_000] {
        return Err("a synced file is damaged".into());
    }
    if std::fs::read(&unsynced).is_ok_and(|bytes| bytes == [8; 10_000]) {
        return Err("a file that was never synced survived a cut that keeps nothing".into());
    }
    Ok(())
}
