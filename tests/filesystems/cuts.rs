//! Power cuts below the file system: several threads work on a store, the power fails at random moments, and whatever the
//! disk may have kept is mounted, recovered strictly and compared with what had been acknowledged.
//!
//! One run of the workers is cut many times, since a cut is a copy of the disk's state that disturbs nobody. What was
//! acknowledged is what this process had read from the workers before it took the copy.

use crate::child::Child;
use crate::device::{Cut, Device, Image, Kept};
use crate::ground::Ground;
use crate::life::{Book, Life, MARK};
use crate::{Result, Run};
use fastrand::Rng;
use oncekey::{Durability, Store};
use std::path::Path;

/// Images made of one cut, and cuts of one run of the workers.
const IMAGES_A_CUT: u64 = 5;
const CUTS_A_RUN: u64 = 5;
const SYNCED_WORKERS: u64 = 4;

/// Settings of the stores here: small segments, so that names come and go.
pub fn builder() -> oncekey::Builder {
    Store::builder().segment_size(64 * 1024)
}

/// Workers on a store until they are killed; each acknowledgement is one line. One more of them works with no syncs and
/// tells nothing: its writes are between the others'.
pub fn work(dir: &Path) -> Result<()> {
    let store = builder().open(dir)?;
    std::thread::scope(|scope| {
        for worker in 0..=SYNCED_WORKERS {
            let store = &store;
            scope.spawn(move || {
                let is_synced = worker < SYNCED_WORKERS;
                let durability = if is_synced { Durability::Synced } else { Durability::Buffered };
                for number in 0.. {
                    let life = Life { who: worker.to_string(), number };
                    let say = |stage, fence| {
                        if is_synced {
                            println!("{} {stage} {fence}", life.name());
                        }
                    };
                    // A full disk ends this worker, and the others go on as far as they come.
                    if let Err(error) = life.live(store, durability, say) {
                        assert!(crate::life::is_full(&error), "{error}");
                        return;
                    }
                }
            });
        }
    });
    // The disk is full; the cut is still to come.
    std::thread::park();
    Ok(())
}

/// Opens what a cut left, and looks for everything that the ledger says.
pub fn check(dir: &Path, ledger: &Path) -> Result<()> {
    let mut book = Book::default();
    for line in std::fs::read_to_string(ledger)?.lines() {
        if !book.take(line) {
            return Err(format!("a strange line in the ledger: {line}").into());
        }
    }
    let store = builder().open(dir).map_err(|error| format!("a strict opening: {error:?}"))?;
    println!("opened");
    if !store.recovery().lost.is_empty() {
        return Err(format!("recovery lost something: {:?}", store.recovery()).into());
    }
    book.ask(&store)?;
    // It takes operations again.
    let life = Life { who: "after".to_owned(), number: 6 };
    life.live(&store, Durability::Synced, |_, _| {}).map_err(|error| format!("after the cut: {error}"))?;
    store.close()?;
    let again = builder().open(dir).map_err(|error| format!("a second opening: {error:?}"))?;
    book.note(life, 2, 0);
    Ok(book.look(&again)?)
}

/// Blocks of the store: the rig's own records, or the head of a segment.
fn is_ours(block: &[u8]) -> bool {
    block.starts_with(b"ONCEKEY") || block.windows(MARK.len()).any(|bytes| bytes == MARK.as_bytes())
}

pub fn cut_power(run: &mut Run, ground: &Ground, device: &Device, fresh: &Image, images: u64) -> Result<()> {
    let mut made = 0;
    while made < images {
        let seed = run.random.u64(..);
        let cuts = cut_workers(run, ground, device, fresh, &mut Rng::with_seed(seed))?;
        for (cut, book) in &cuts {
            for nth in 0..IMAGES_A_CUT {
                if made >= images {
                    return Ok(());
                }
                let kept = if nth == 0 { Kept::Nothing } else { Kept::Any };
                made += 1 + run.recover(ground, device, cut, kept, book)?;
                run.images.set_position(run.images.position() + 1);
            }
        }
    }
    Ok(())
}

/// Cuts taken while workers were at it, each with what had been acknowledged before.
fn cut_workers(
    run: &mut Run,
    ground: &Ground,
    device: &Device,
    fresh: &Image,
    random: &mut Rng,
) -> Result<Vec<(Cut, Book)>> {
    device.load(fresh.clone());
    ground.mount()?;
    let mut child = Child::start(run.myself("work").arg(ground.store()))?;
    let mut book = Book::default();
    let mut cuts = Vec::new();
    let mut heard = 0;
    let mut next = random.u64(0..200);
    while (cuts.len() as u64) < CUTS_A_RUN {
        let line = child.line()?.ok_or("the workers ended by themselves")?;
        if !book.take(&line) {
            return Err(format!("the workers said {line}").into());
        }
        heard += 1;
        if heard >= next {
            cuts.push((device.cut(), book.clone()));
            next = heard + random.u64(1..400);
        }
    }
    child.kill()?;
    child.end()?;
    ground.unmount()?;
    Ok(cuts)
}

impl Run {
    /// Lets a store recover from what a cut left, cut again meanwhile one time in three; returns how many further images
    /// that made.
    fn recover(&mut self, ground: &Ground, device: &Device, cut: &Cut, kept: Kept, book: &Book) -> Result<u64> {
        let ledger = self.dir.join("ledger");
        std::fs::write(&ledger, book.lines())?;
        device.load(cut.image(kept, is_ours, &mut self.random));
        let is_cut_again = self.random.u8(..3) == 0;
        let more_requests = self.random.u64(0..120);
        device.cut_after(more_requests);
        let again =
            self.mount_and_check(ground, device, &ledger, &format!("{kept:?} of {} writes", cut.unflushed()))?;
        if !is_cut_again {
            return Ok(0);
        }
        let Some(again) = again else { return Ok(0) };
        device.load(again.image(Kept::Any, is_ours, &mut self.random));
        let what = format!("a cut {more_requests} requests into recovery, any of {} writes", again.unflushed());
        self.mount_and_check(ground, device, &ledger, &what)?;
        Ok(1)
    }

    /// Returns the cut that was taken before the store was open.
    fn mount_and_check(&mut self, ground: &Ground, device: &Device, ledger: &Path, what: &str) -> Result<Option<Cut>> {
        self.images_checked += 1;
        ground.mount().map_err(|error| format!("{what}: {error}"))?;
        let mut child = self.check(ground, ledger)?;
        let mut again = None;
        while let Some(line) = child.line()? {
            if line == "opened" {
                again = Some(device.ordered_cut());
            }
        }
        let ended = child.end();
        ground.unmount()?;
        if let Err(error) = ended {
            self.violated(
                &format!("power cut, {}: {what}, {} keys", ground.kind.name(), self.keys_of(ledger)?),
                &*error,
            );
        }
        Ok(again)
    }

    fn keys_of(&self, ledger: &Path) -> Result<usize> {
        Ok(std::fs::read_to_string(ledger)?.lines().count())
    }
}
