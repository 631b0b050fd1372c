//! A disk in memory that loses power, runs full and fails on demand.
//!
//! What a power cut leaves of bytes not yet synced is any subset of 512-byte sectors, old or new; of directory
//! operations not yet synced, any subset too. A failed sync marks its sectors clean, as kernels do: they are neither
//! written nor reported again. A sync that meets another one of the same file returns at once, before that has ended: btrfs
//! does so now and then (seen with Linux 6.18).

use super::{Blob, Region, Storage};
use crate::error::{Error, Result};
use crate::sync::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const SECTOR: usize = 512;

/// The kinds of calls that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DiskOp {
    /// Creating a segment or a small file.
    Create,
    /// Reading, at recovery and verification.
    Read,
    /// Writing a record.
    Append,
    /// Repair and erasure.
    Overwrite,
    /// Making a file's bytes durable.
    Sync,
    /// Making names durable.
    SyncNames,
    /// Removing a segment.
    Remove,
}

/// A simulated disk; clones are the same disk.
#[derive(Clone, Debug, Default)]
pub struct SimDisk(Arc<Mutex<Disk>>);

#[derive(Debug, Default)]
struct Disk {
    names: BTreeMap<String, Arc<SimFile>>,
    durable_names: BTreeMap<String, Arc<SimFile>>,
    /// Names touched since the last sync of the directory.
    unsynced_names: BTreeSet<String>,
    capacity: Option<u64>,
    calls: BTreeMap<DiskOp, u64>,
    failures: Vec<Failure>,
    locked: bool,
}

#[derive(Debug)]
struct Failure {
    op: DiskOp,
    /// Calls of that kind to let through first.
    after: u64,
    kind: io::ErrorKind,
}

#[derive(Debug)]
struct SimFile {
    images: Mutex<Images>,
}

#[derive(Debug)]
struct Images {
    /// What the store reads, once it asked for it: most copies of a disk are never opened.
    region: Option<Arc<Region>>,
    /// Shared with the copies, until one of them is written to.
    live: Arc<Vec<u8>>,
    /// What the medium still holds of sectors that it does not hold as they are now.
    older: BTreeMap<usize, Vec<u8>>,
    /// Those of them that the next sync writes: after a failed one their pages are clean.
    dirty: BTreeSet<usize>,
    is_being_synced: bool,
}

impl Images {
    fn sector(&self, sector: usize) -> Range<usize> {
        sector * SECTOR..((sector + 1) * SECTOR).min(self.live.len())
    }
}

impl SimDisk {
    /// An empty disk without limit.
    pub fn new() -> Self {
        SimDisk::default()
    }

    /// Lets `after` more calls of this kind through, then fails the next one.
    pub fn fail(&self, op: DiskOp, after: u64, kind: io::ErrorKind) {
        let mut disk = self.0.lock();
        let after = after + disk.calls.get(&op).copied().unwrap_or(0);
        disk.failures.push(Failure { op, after, kind });
    }

    /// How many calls of this kind there were.
    pub fn calls(&self, op: DiskOp) -> u64 {
        self.0.lock().calls.get(&op).copied().unwrap_or(0)
    }

    /// Bytes that all files together may take, from now on.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.0.lock().capacity = bytes;
    }

    /// The disk as the next process finds it after a `kill -9`: all that was written, synced or not.
    pub fn after_process_death(&self) -> SimDisk {
        self.image(&mut || true, None)
    }

    /// The disk after a power cut; `keep` decides for each unsynced sector and name whether it got through.
    pub fn after_power_cut(&self, mut keep: impl FnMut() -> bool) -> SimDisk {
        self.image(&mut keep, Some(1))
    }

    /// As [`after_power_cut`](SimDisk::after_power_cut), but that the sectors of a 4 KiB page get through together.
    pub fn after_power_cut_in_pages(&self, mut keep: impl FnMut() -> bool) -> SimDisk {
        self.image(&mut keep, Some(4096 / SECTOR))
    }

    /// With `torn` a power cut that decides for so many sectors at a time.
    fn image(&self, keep: &mut dyn FnMut() -> bool, torn: Option<usize>) -> SimDisk {
        let disk = self.0.lock();
        let mut names = BTreeMap::new();
        let mut durable_names = BTreeMap::new();
        let mut copies: BTreeMap<*const SimFile, Arc<SimFile>> = BTreeMap::new();
        let mut copy = |file: &Arc<SimFile>, keep: &mut dyn FnMut() -> bool| {
            let copy = copies.entry(Arc::as_ptr(file)).or_insert_with(|| Arc::new(file.image(keep, torn)));
            Arc::clone(copy)
        };
        if torn.is_some() {
            names.extend(disk.durable_names.iter().map(|(name, file)| (name.clone(), copy(file, keep))));
            for name in &disk.unsynced_names {
                if keep() {
                    match disk.names.get(name) {
                        Some(file) => names.insert(name.clone(), copy(file, keep)),
                        None => names.remove(name),
                    };
                }
            }
            durable_names.clone_from(&names);
        } else {
            names.extend(disk.names.iter().map(|(name, file)| (name.clone(), copy(file, keep))));
            durable_names.extend(disk.durable_names.iter().map(|(name, file)| (name.clone(), copy(file, keep))));
        }
        let unsynced_names = if torn.is_some() { BTreeSet::new() } else { disk.unsynced_names.clone() };
        let capacity = disk.capacity;
        SimDisk(Arc::new(Mutex::new(Disk { names, durable_names, unsynced_names, capacity, ..Disk::default() })))
    }

    /// Names and lengths of all files.
    pub fn files(&self) -> Vec<(String, u64)> {
        let disk = self.0.lock();
        disk.names.iter().map(|(name, file)| (name.clone(), file.images.lock().live.len() as u64)).collect()
    }

    /// A file's bytes, as a program that reads it would see them.
    pub fn contents(&self, name: &str) -> Option<Vec<u8>> {
        Some(self.0.lock().names.get(name)?.images.lock().live.to_vec())
    }

    /// Puts a file there, or replaces it, durably: corruption, truncation, foreign files.
    pub fn put(&self, name: &str, contents: Vec<u8>) {
        let file = Arc::new(SimFile::new(contents));
        let mut disk = self.0.lock();
        disk.names.insert(name.to_owned(), Arc::clone(&file));
        disk.durable_names.insert(name.to_owned(), file);
    }

    /// Takes a file away, durably.
    pub fn take(&self, name: &str) {
        let mut disk = self.0.lock();
        disk.names.remove(name);
        disk.durable_names.remove(name);
    }

    fn enter(&self, op: DiskOp) -> io::Result<()> {
        let mut disk = self.0.lock();
        let calls = disk.calls.entry(op).or_insert(0);
        let call = *calls;
        *calls += 1;
        match disk.failures.iter().find(|failure| failure.op == op && failure.after == call) {
            Some(failure) => Err(failure.kind.into()),
            None => Ok(()),
        }
    }
}

impl SimFile {
    fn new(contents: Vec<u8>) -> Self {
        SimFile::holding(Arc::new(contents), BTreeMap::new(), BTreeSet::new())
    }

    fn holding(live: Arc<Vec<u8>>, older: BTreeMap<usize, Vec<u8>>, dirty: BTreeSet<usize>) -> Self {
        SimFile { images: Mutex::new(Images { region: None, live, older, dirty, is_being_synced: false }) }
    }

    fn image(&self, keep: &mut dyn FnMut() -> bool, torn: Option<usize>) -> SimFile {
        let images = self.images.lock();
        let mut live = Arc::clone(&images.live);
        let Some(unit) = torn else { return SimFile::holding(live, images.older.clone(), images.dirty.clone()) };
        let mut decided = (usize::MAX, false);
        for (&sector, older) in &images.older {
            let is_dirty = images.dirty.contains(&sector);
            if is_dirty && decided.0 != sector / unit {
                decided = (sector / unit, keep());
            }
            if !is_dirty || !decided.1 {
                Arc::make_mut(&mut live)[images.sector(sector)].copy_from_slice(older);
            }
        }
        SimFile::holding(live, BTreeMap::new(), BTreeSet::new())
    }

    fn region(&self) -> Arc<Region> {
        let mut images = self.images.lock();
        let Images { region, live, .. } = &mut *images;
        let mapped = region.get_or_insert_with(|| {
            let region = Region::anonymous(live.len().max(1)).expect("memory for a simulated file");
            // The rest is zero as it is, and needs no memory.
            let is_written = |sector: &[u8]| sector != &[0; SECTOR][..sector.len()];
            let sectors = live.chunks(SECTOR).rposition(is_written).map_or(0, |last| last + 1);
            region.write(0, &live[..(sectors * SECTOR).min(live.len())]);
            Arc::new(region)
        });
        Arc::clone(mapped)
    }

    fn store(&self, at: u64, bytes: &[u8]) {
        let at = at as usize;
        let mut images = self.images.lock();
        let images = &mut *images;
        let sectors = if bytes.is_empty() { 0..0 } else { at / SECTOR..(at + bytes.len()).div_ceil(SECTOR) };
        for sector in sectors {
            let range = images.sector(sector);
            images.older.entry(sector).or_insert_with(|| images.live[range].to_vec());
            images.dirty.insert(sector);
        }
        if let Some(region) = &images.region {
            region.write(at, bytes);
        }
        Arc::make_mut(&mut images.live)[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

/// A store's view of the disk; dropping it releases the lock.
#[derive(Debug)]
pub(crate) struct SimStorage(SimDisk);

impl SimStorage {
    pub(crate) fn open(disk: &SimDisk) -> Result<Self> {
        let mut inner = disk.0.lock();
        if inner.locked {
            return Err(Error::new(crate::ErrorKind::Locked, "the simulated disk is in use"));
        }
        inner.locked = true;
        Ok(SimStorage(disk.clone()))
    }

    fn insert(&self, name: &str, contents: Vec<u8>) -> Result<Arc<SimFile>> {
        self.0.enter(DiskOp::Create).map_err(|source| Error::io("create", &self.path(name), source))?;
        let mut disk = self.0.0.lock();
        let used: u64 = disk.names.values().map(|file| file.images.lock().live.len() as u64).sum();
        if disk.capacity.is_some_and(|capacity| used + contents.len() as u64 > capacity) {
            return Err(Error::io("create", &self.path(name), io::ErrorKind::StorageFull.into()));
        }
        let file = if planted!(RenamedBeforeSync) {
            let file = SimFile::new(vec![0; contents.len()]);
            file.store(0, &contents);
            Arc::new(file)
        } else {
            Arc::new(SimFile::new(contents))
        };
        disk.names.insert(name.to_owned(), Arc::clone(&file));
        disk.unsynced_names.insert(name.to_owned());
        Ok(file)
    }
}

impl Drop for SimStorage {
    fn drop(&mut self) {
        self.0.0.lock().locked = false;
    }
}

impl Storage for SimStorage {
    fn list(&self) -> Result<Vec<String>> {
        Ok(self.0.0.lock().names.keys().cloned().collect())
    }

    fn create(&self, name: &str, len: u64, header: &[u8]) -> Result<Arc<dyn Blob>> {
        let mut contents = header.to_vec();
        contents.resize(len as usize, 0);
        let file = self.insert(name, contents)?;
        if !planted!(NewNameNotSynced) {
            self.sync_names()?;
        }
        Ok(Arc::new(SimBlob { disk: self.0.clone(), file }))
    }

    fn renew(&self, old: &str, new: &str, len: u64, void: &[u8], header: &[u8]) -> Result<Arc<dyn Blob>> {
        let blob = self.open(old)?;
        let write = |at, bytes: &[u8]| {
            let written = blob.overwrite(at, bytes).and_then(|()| blob.sync());
            written.map_err(|source| Error::io("renew", &self.path(old), source))
        };
        if !planted!(HeaderNotVoided) {
            write(0, void)?;
        }
        write(void.len() as u64, &vec![0; len as usize - void.len()])?;
        {
            let mut disk = self.0.0.lock();
            let file = disk.names.get(old).cloned().expect("it was just opened");
            disk.names.insert(new.to_owned(), file);
            disk.unsynced_names.insert(new.to_owned());
        }
        self.sync_names()?;
        self.remove(old)?;
        self.sync_names()?;
        write(0, header)?;
        Ok(blob)
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Blob>> {
        let not_found = || Error::io("open", &self.path(name), io::ErrorKind::NotFound.into());
        let file = self.0.0.lock().names.get(name).cloned().ok_or_else(not_found)?;
        Ok(Arc::new(SimBlob { disk: self.0.clone(), file }))
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.0.enter(DiskOp::Remove).map_err(|source| Error::io("remove", &self.path(name), source))?;
        let mut disk = self.0.0.lock();
        disk.names.remove(name);
        disk.unsynced_names.insert(name.to_owned());
        Ok(())
    }

    fn sync_names(&self) -> Result<()> {
        self.0.enter(DiskOp::SyncNames).map_err(|source| Error::io("sync", &self.path(""), source))?;
        let mut disk = self.0.0.lock();
        disk.durable_names = disk.names.clone();
        disk.unsynced_names.clear();
        Ok(())
    }

    fn write_file(&self, name: &str, next: &mut dyn FnMut() -> Result<Option<Vec<u8>>>) -> Result<()> {
        let mut contents = Vec::new();
        while let Some(part) = next()? {
            contents.extend(part);
        }
        self.insert(name, contents)?;
        self.sync_names()
    }

    fn read_small(&self, name: &str, limit: usize) -> Result<Option<Vec<u8>>> {
        self.0.enter(DiskOp::Read).map_err(|source| Error::io("read", &self.path(name), source))?;
        Ok(self.0.contents(name).map(|mut bytes| {
            bytes.truncate(limit);
            bytes
        }))
    }

    fn path(&self, name: &str) -> PathBuf {
        Path::new("simulated").join(name)
    }
}

#[derive(Debug)]
struct SimBlob {
    disk: SimDisk,
    file: Arc<SimFile>,
}

impl Blob for SimBlob {
    fn len(&self) -> u64 {
        self.file.images.lock().live.len() as u64
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        self.disk.enter(DiskOp::Read)?;
        let images = self.file.images.lock();
        let bytes = images.live.get(at as usize..at as usize + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    fn append(&self, mut at: u64, parts: &[&[u8]]) -> io::Result<()> {
        self.disk.enter(DiskOp::Append)?;
        for part in parts {
            self.file.store(at, part);
            at += part.len() as u64;
        }
        Ok(())
    }

    fn overwrite(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.disk.enter(DiskOp::Overwrite)?;
        self.file.store(at, bytes);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut images = self.file.images.lock();
        if std::mem::replace(&mut images.is_being_synced, true) {
            return Ok(());
        }
        let dirty = std::mem::take(&mut images.dirty);
        let covered: Vec<_> = dirty.into_iter().map(|at| (at, images.live[images.sector(at)].to_vec())).collect();
        drop(images);
        let answer = self.disk.enter(DiskOp::Sync);
        let mut images = self.file.images.lock();
        images.is_being_synced = false;
        answer?;
        for (at, bytes) in covered {
            // What was written meanwhile is for the next sync.
            match images.dirty.contains(&at) {
                true => images.older.insert(at, bytes),
                false => images.older.remove(&at),
            };
        }
        Ok(())
    }

    fn fault_in(&self, _from: u64, _to: u64) -> io::Result<()> {
        Ok(())
    }

    fn punch(&self, _from: u64, _to: u64) -> io::Result<()> {
        Ok(())
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.len())
    }

    fn map(&self) -> io::Result<Arc<Region>> {
        Ok(self.file.region())
    }
}
