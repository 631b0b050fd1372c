//! A disk that this process serves: one file of a FUSE file system, which a loop device turns into a block device.
//!
//! The loop device uses direct I/O, so each write and flush of the file system on top arrives here as it was issued.
//! Writes go to the live image and to the list of those that no flush has covered; a flush moves the list into the
//! durable image. A power cut keeps the durable image and any part of the list.
//!
//! Whoever serves a disk must not wait for it: only child processes touch what is mounted on it.

use crate::Result;
use fastrand::Rng;
use fuser::{
    BackgroundSession, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner,
    OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, WriteFlags,
};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

const PAGE: usize = 4096;
/// What a disk writes whole or not at all.
const SECTOR: usize = 512;
const FILE: INodeNo = INodeNo(2);
const NAME: &str = "disk";

/// What is on a disk; a clone shares its pages until one of both is written to.
#[derive(Clone)]
pub struct Image(Vec<Option<Arc<[u8; PAGE]>>>);

impl Image {
    pub fn blank(len: u64) -> Image {
        Image(vec![None; (len as usize).div_ceil(PAGE)])
    }

    fn len(&self) -> u64 {
        (self.0.len() * PAGE) as u64
    }

    fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len.min(self.len().saturating_sub(at) as usize)];
        for (page, inside, part) in pages(at, &mut bytes) {
            if let Some(stored) = &self.0[page] {
                part.copy_from_slice(&stored[inside..inside + part.len()]);
            }
        }
        bytes
    }

    fn write(&mut self, at: u64, bytes: &[u8]) {
        let mut bytes = bytes.to_vec();
        for (page, inside, part) in pages(at, &mut bytes) {
            let slot = &mut self.0[page];
            if slot.is_none() && part.iter().all(|byte| *byte == 0) {
                continue;
            }
            let stored = Arc::make_mut(slot.get_or_insert_with(|| Arc::new([0; PAGE])));
            stored[inside..inside + part.len()].copy_from_slice(part);
        }
    }
}

/// Splits bytes at a position into those of each page: its number, where in the page they start, and the bytes.
fn pages(at: u64, bytes: &mut [u8]) -> impl Iterator<Item = (usize, usize, &mut [u8])> {
    let (head, tail) = bytes.split_at_mut((at.next_multiple_of(PAGE as u64) - at).min(bytes.len() as u64) as usize);
    let first = (at as usize / PAGE, at as usize % PAGE, head);
    let next = (at as usize).div_ceil(PAGE);
    std::iter::once(first)
        .chain(tail.chunks_mut(PAGE).enumerate().map(move |(nth, part)| (next + nth, 0, part)))
        .filter(|(_, _, part)| !part.is_empty())
}

/// A write that no flush has covered yet.
#[derive(Clone)]
struct Write {
    at: u64,
    bytes: Arc<[u8]>,
}

/// A moment at which the power may have failed.
#[derive(Clone)]
pub struct Cut {
    durable: Image,
    unflushed: Vec<Write>,
}

/// What a power cut keeps of the writes that no flush covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    Nothing,
    /// Any subset of them, and of their blocks.
    Any,
}

impl Cut {
    /// What is on the disk when the power is back. `is_torn` says of which blocks any subset of sectors may be written;
    /// others are written whole, as their file system relies on.
    pub fn image(&self, kept: Kept, is_torn: impl Fn(&[u8]) -> bool, random: &mut Rng) -> Image {
        let mut image = self.durable.clone();
        // How much is kept differs from cut to cut: most of it, nearly nothing, or a half.
        let often = random.f64();
        for write in &self.unflushed {
            match kept {
                Kept::Nothing => {}
                Kept::Any => {
                    for (block, at) in write.bytes.chunks(PAGE).zip((write.at..).step_by(PAGE)) {
                        if !is_torn(block) {
                            if random.f64() < often {
                                image.write(at, block);
                            }
                            continue;
                        }
                        for (sector, at) in block.chunks(SECTOR).zip((at..).step_by(SECTOR)) {
                            if random.f64() < often {
                                image.write(at, sector);
                            }
                        }
                    }
                }
            }
        }
        image
    }

    pub fn unflushed(&self) -> usize {
        self.unflushed.len()
    }
}

/// Which requests fail: each k-th one of a kind, 0 for none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub failed: u64,
}

struct State {
    live: Image,
    durable: Image,
    unflushed: Vec<Write>,
    faults: Faults,
    counts: Counts,
    /// Flushes that wait to be answered, while they are held, and how many writes each covers.
    held: Option<Vec<(ReplyEmpty, usize)>>,
    /// A cut to be taken after so many more writes and flushes.
    cut_in: Option<u64>,
    cut: Option<Cut>,
}

impl State {
    fn new(image: Image) -> State {
        State {
            live: image.clone(),
            durable: image,
            unflushed: Vec::new(),
            faults: Faults::default(),
            counts: Counts::default(),
            held: None,
            cut_in: None,
            cut: None,
        }
    }

    fn now(&self) -> Cut {
        Cut { durable: self.durable.clone(), unflushed: self.unflushed.clone() }
    }

    /// Counts a write or flush that is about to be done, and takes the cut that was ordered for this moment.
    fn pass(&mut self) {
        match self.cut_in {
            Some(0) => {
                self.cut = Some(self.now());
                self.cut_in = None;
            }
            Some(more) => self.cut_in = Some(more - 1),
            None => {}
        }
    }

    /// Makes the first so many of the writes durable that were not.
    fn flush(&mut self, covered: usize) {
        for write in self.unflushed.drain(..covered) {
            self.durable.write(write.at, &write.bytes);
        }
    }
}

/// Whether this request, the `nth` of its kind, fails.
fn fails(each: u64, nth: u64, failed: &mut u64) -> bool {
    let hit = each != 0 && nth.is_multiple_of(each);
    *failed += u64::from(hit);
    hit
}

/// A disk, as long as it is held.
pub struct Device {
    state: Arc<Mutex<State>>,
    file: PathBuf,
    _session: BackgroundSession,
}

impl Device {
    /// Serves a disk as a file in the directory.
    pub fn serve(image: Image, dir: &Path) -> Result<Device> {
        std::fs::create_dir_all(dir)?;
        let state = Arc::new(Mutex::new(State::new(image)));
        let mut config = fuser::Config::default();
        config.mount_options = vec![fuser::MountOption::FSName("oncekey-disk".to_owned())];
        let session = fuser::spawn_mount(Server(Arc::clone(&state)), dir, &config)?;
        Ok(Device { state, file: dir.join(NAME), _session: session })
    }

    /// Where the disk's file is.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Puts another image on the disk, all of it durable; nothing may have the disk open. Faults end.
    pub fn load(&self, image: Image) {
        *lock(&self.state) = State::new(image);
    }

    /// What is on it now.
    pub fn image(&self) -> Image {
        lock(&self.state).live.clone()
    }

    pub fn cut(&self) -> Cut {
        lock(&self.state).now()
    }

    /// Orders a cut to be taken after so many more writes and flushes.
    pub fn cut_after(&self, requests: u64) {
        let mut state = lock(&self.state);
        (state.cut_in, state.cut) = (Some(requests), None);
    }

    /// The cut that was ordered, or one now if it hasn't come to it.
    pub fn ordered_cut(&self) -> Cut {
        let mut state = lock(&self.state);
        state.cut_in = None;
        state.cut.take().unwrap_or_else(|| state.now())
    }

    pub fn fail(&self, faults: Faults) {
        lock(&self.state).faults = faults;
    }

    /// Lets no flush return from now on.
    pub fn hold_flushes(&self) {
        lock(&self.state).held.get_or_insert_default();
    }

    /// Answers the flushes that were held, and holds no more.
    pub fn release_flushes(&self) {
        let mut state = lock(&self.state);
        let mut flushed = 0;
        for (reply, covered) in state.held.take().unwrap_or_default() {
            state.flush(covered - flushed);
            flushed = covered;
            state.counts.flushes += 1;
            reply.ok();
        }
    }

    /// How many flushes are being held.
    pub fn held(&self) -> usize {
        lock(&self.state).held.as_ref().map_or(0, Vec::len)
    }

    pub fn counts(&self) -> Counts {
        lock(&self.state).counts
    }
}

/// A panic elsewhere leaves the disk as it is; it has to be served on, or nothing on it can be unmounted.
fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Server(Arc<Mutex<State>>);

impl Server {
    fn attr(&self, inode: INodeNo) -> FileAttr {
        let is_file = inode == FILE;
        let size = if is_file { lock(&self.0).live.len() } else { 0 };
        FileAttr {
            ino: inode,
            size,
            blocks: size / SECTOR as u64,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_file { FileType::RegularFile } else { FileType::Directory },
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: PAGE as u32,
            flags: 0,
        }
    }
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == NAME {
            reply.entry(&Duration::ZERO, &self.attr(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&Duration::ZERO, &self.attr(inode));
    }

    /// Without the page cache of this file system: every request comes here.
    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        at: u64,
        len: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut state = lock(&self.0);
        let State { faults, counts, live, .. } = &mut *state;
        counts.reads += 1;
        if fails(faults.reads, counts.reads, &mut counts.failed) {
            reply.error(Errno::EIO);
        } else {
            reply.data(&live.read(at, len as usize));
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        at: u64,
        bytes: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut state = lock(&self.0);
        state.pass();
        let State { faults, counts, live, unflushed, .. } = &mut *state;
        counts.writes += 1;
        if fails(faults.writes, counts.writes, &mut counts.failed) {
            reply.error(Errno::EIO);
            return;
        }
        live.write(at, bytes);
        unflushed.push(Write { at, bytes: bytes.into() });
        reply.written(bytes.len() as u32);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut state = lock(&self.0);
        state.pass();
        let State { faults, counts, held, unflushed, .. } = &mut *state;
        if let Some(held) = held {
            held.push((reply, unflushed.len()));
            return;
        }
        counts.flushes += 1;
        if fails(faults.flushes, counts.flushes, &mut counts.failed) {
            reply.error(Errno::EIO);
            return;
        }
        let all = unflushed.len();
        state.flush(all);
        reply.ok();
    }

    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, _: u64, _: u64, _: i32, reply: ReplyEmpty) {
        reply.error(Errno::EOPNOTSUPP);
    }
}
