//! Segments as files of one directory, written through a mapping or with `pwrite`.
//!
//! Files are named relative to the directory's handle, not to its path: a store stays with the directory that it locked,
//! whatever is renamed and wherever the process changes to.

use super::{Blob, Media, Region, Storage};
use crate::error::{Error, ErrorKind, Result};
use crate::mmap::ForkMark;
use parking_lot::Mutex;
use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags, RenameFlags, SeekFrom};
use rustix::io::Errno;
use std::collections::HashSet;
use std::fs::{DirBuilder, File, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const LOCK_NAME: &str = "LOCK";
const PAGE: usize = 4096;
const OWNER_ONLY: Mode = Mode::from_bits_truncate(0o600);

/// A locked directory.
#[derive(Debug)]
pub(crate) struct FileMedia {
    dir: PathBuf,
    handle: File,
    /// Held while the directory is synced: of two that overlap btrfs may let the second return too early.
    syncing: Mutex<()>,
    mapped_writes: bool,
    knows_holes: bool,
    /// Blocks are zero-filled ahead in single pages, so that a sync writes no more than what was stored.
    zero_fill: bool,
    _lock: DirLock,
}

impl FileMedia {
    /// Makes the directory if need be, and locks it.
    ///
    /// `for_syncs` prepares segments for small, frequent syncs at the price of writing them twice.
    pub(crate) fn open(dir: &Path, media: Media, for_syncs: bool) -> Result<Self> {
        make_dir(dir)?;
        let handle = open_directory(dir).map_err(|source| Error::io("open the store's directory", dir, source))?;
        let lock = DirLock::take(&handle, dir)?;
        let mapped_writes = match media {
            Media::Mmap => true,
            Media::Pwrite => false,
            Media::Auto => overwrites_in_place(dir, &handle)?,
        };
        Ok(FileMedia {
            dir: dir.to_owned(),
            syncing: Mutex::default(),
            mapped_writes,
            knows_holes: knows_holes(dir, &handle)?,
            handle,
            zero_fill: for_syncs,
            _lock: lock,
        })
    }

    fn build(&self, name: &str, len: u64, header: &[u8]) -> Result<FileBlob> {
        let path = &self.path(name);
        check_file_size_limit(path, len)?;
        let fail = |doing| move |source| Error::io(doing, path, source);
        let file = create_private(&self.handle, name).map_err(fail("create a segment"))?;
        file.write_all_at(header, 0).map_err(fail("write a segment's header"))?;
        self.prepare(path, file, len)
    }

    /// Allocates all that follows the header, and maps it.
    fn prepare(&self, path: &Path, file: File, len: u64) -> Result<FileBlob> {
        let fail = |doing| move |source| Error::io(doing, path, source);
        self.allocate(&file, len).map_err(fail("allocate a segment"))?;
        if !planted!(RenamedBeforeSync) {
            file.sync_all().map_err(fail("sync a new segment"))?;
        }
        if !self.mapped_writes {
            let region = Region::read_only(&file).map_err(fail("map a segment"))?;
            return Ok(FileBlob {
                file,
                len,
                region: Some(Arc::new(region)),
                write_through: false,
                faults_ahead: false,
                knows_holes: false,
            });
        }
        let region = Region::writable(&file, self.zero_fill).map_err(fail("map a segment"))?;
        let region = Some(Arc::new(region));
        Ok(FileBlob { file, len, region, write_through: true, faults_ahead: !self.zero_fill, knows_holes: false })
    }

    /// Makes sure that no later store into the file has to find space for it.
    fn allocate(&self, file: &File, len: u64) -> io::Result<()> {
        let allocated = match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, len) {
            Ok(()) => true,
            Err(Errno::OPNOTSUPP) => false,
            Err(errno) => return Err(errno.into()),
        };
        if self.zero_fill || !allocated {
            write_zero_pages(file, PAGE as u64, len)?;
        }
        Ok(())
    }
}

impl Storage for FileMedia {
    fn list(&self) -> Result<Vec<String>> {
        let fail = |source| Error::io("list the store's directory", &self.dir, source);
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.handle).map_err(|errno| fail(errno.into()))? {
            let entry = entry.map_err(|errno| fail(errno.into()))?;
            // A name that isn't UTF-8 is none of ours.
            if let Ok(name) = entry.file_name().to_str() {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    fn create(&self, name: &str, len: u64, header: &[u8]) -> Result<Arc<dyn Blob>> {
        let unborn = format!("{name}.new");
        let built = self.build(&unborn, len, header).and_then(|blob| {
            rename_new(&self.handle, &unborn, name)
                .map_err(|source| Error::io("name a new segment", &self.path(name), source))
                .map(|()| blob)
        });
        match built {
            Ok(blob) => {
                if !planted!(NewNameNotSynced) {
                    self.sync_names()?;
                }
                Ok(Arc::new(blob))
            }
            Err(error) => {
                // ext4 keeps what a failed fallocate got. The error to report is the first one.
                remove(&self.handle, &unborn).ok();
                Err(error)
            }
        }
    }

    fn renew(&self, old: &str, new: &str, len: u64, void: &[u8], header: &[u8]) -> Result<Arc<dyn Blob>> {
        let path = &self.path(old);
        let fail = |source| Error::io("renew a segment", path, source);
        check_file_size_limit(path, len)?;
        let file = open_regular(&self.handle, old, OFlags::RDWR).map_err(fail)?;
        if !planted!(HeaderNotVoided) {
            file.write_all_at(void, 0).and_then(|()| file.sync_data()).map_err(fail)?;
        }
        zero(&file, void.len() as u64, len).map_err(fail)?;
        // What reads left in memory is in larger folios than new pages come in; this is only advice.
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).ok();
        let blob = self.prepare(path, file, len)?;
        rename_new(&self.handle, old, new).map_err(fail)?;
        self.sync_names()?;
        blob.overwrite(0, header).and_then(|()| blob.sync()).map_err(fail)?;
        Ok(Arc::new(blob))
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Blob>> {
        let path = self.path(name);
        let fail = |source| Error::io("open a segment", &path, source);
        let file = open_regular(&self.handle, name, OFlags::RDWR).map_err(fail)?;
        let len = file.metadata().map_err(fail)?.len();
        check_file_size_limit(&path, len)?;
        let knows_holes = self.knows_holes;
        Ok(Arc::new(FileBlob { file, len, region: None, write_through: false, faults_ahead: false, knows_holes }))
    }

    fn remove(&self, name: &str) -> Result<()> {
        remove(&self.handle, name).map_err(|source| Error::io("remove", &self.path(name), source))
    }

    fn sync_names(&self) -> Result<()> {
        let _syncing = self.syncing.lock();
        self.handle.sync_all().map_err(|source| Error::io("sync the store's directory", &self.dir, source))
    }

    fn write_file(&self, name: &str, next: &mut dyn FnMut() -> Result<Option<Vec<u8>>>) -> Result<()> {
        let unborn = format!("{name}.new");
        let fail = |doing| move |source| Error::io(doing, &self.path(name), source);
        let mut write = || {
            let file = create_private(&self.handle, &unborn).map_err(fail("create a file"))?;
            let mut at = 0;
            while let Some(part) = next()? {
                write_limited(&file, at, &part).map_err(fail("write"))?;
                at += part.len() as u64;
            }
            if !planted!(RenamedBeforeSync) {
                file.sync_all().map_err(fail("sync"))?;
            }
            rustix::fs::renameat(&self.handle, &unborn, &self.handle, name)
                .map_err(|errno| fail("rename")(errno.into()))
        };
        // The error to report is the first one.
        write().inspect_err(|_| {
            remove(&self.handle, &unborn).ok();
        })?;
        self.sync_names()
    }

    fn read_small(&self, name: &str, limit: usize) -> Result<Option<Vec<u8>>> {
        let path = self.path(name);
        let fail = |source| Error::io("read", &path, source);
        let file = match open_regular(&self.handle, name, OFlags::RDONLY) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(fail(error)),
        };
        let mut bytes = Vec::new();
        file.take(limit as u64).read_to_end(&mut bytes).map_err(fail)?;
        Ok(Some(bytes))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

#[derive(Debug)]
struct FileBlob {
    file: File,
    len: u64,
    region: Option<Arc<Region>>,
    write_through: bool,
    /// Not where a sync is to write no more than was stored: a write fault dirties its page.
    faults_ahead: bool,
    /// Whether the file system can be asked where nothing was ever written.
    knows_holes: bool,
}

impl Blob for FileBlob {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, at)
    }

    fn data_end(&self) -> io::Result<u64> {
        if !self.knows_holes {
            return Ok(self.len);
        }
        let mut at = 0;
        // Segments have one or two stretches that were written.
        for _ in 0..8 {
            let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(at))?;
            match rustix::fs::seek(&self.file, SeekFrom::Data(hole)) {
                Ok(next) => at = next,
                Err(Errno::NXIO) => return Ok(hole),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(self.len)
    }

    #[inline]
    fn append(&self, mut at: u64, parts: &[&[u8]]) -> io::Result<()> {
        match &self.region {
            Some(region) if self.write_through => {
                for part in parts {
                    region.write(at as usize, part);
                    at += part.len() as u64;
                }
                Ok(())
            }
            _ => self.overwrite(at, &parts.concat()),
        }
    }

    fn overwrite(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        // The limit may have fallen since the segment was opened.
        write_limited(&self.file, at, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn fault_in(&self, from: u64, to: u64) -> io::Result<()> {
        let Some(region) = self.region.as_ref().filter(|_| self.faults_ahead) else { return Ok(()) };
        if from == 0 {
            // The header's page, which is synced, would keep the rest of its folio small; this is only advice.
            rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed).ok();
        }
        region.populate(from as usize..to as usize)
    }

    fn punch(&self, from: u64, to: u64) -> io::Result<()> {
        let from = from.next_multiple_of(PAGE as u64);
        if from >= to {
            return Ok(());
        }
        match rustix::fs::fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, from, to - from)
        {
            Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }

    fn map(&self) -> io::Result<Arc<Region>> {
        match &self.region {
            Some(region) => Ok(Arc::clone(region)),
            None => Ok(Arc::new(Region::read_only(&self.file)?)),
        }
    }
}

/// Makes the directory with all its missing parents, private, and durably.
fn make_dir(dir: &Path) -> Result<()> {
    let fail = |source| Error::io("create the store's directory", dir, source);
    match std::fs::metadata(dir) {
        Ok(found) if found.is_dir() => return Ok(()),
        Ok(_) => return Err(fail(io::ErrorKind::NotADirectory.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(fail(error)),
    }
    let parent = match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    make_dir(parent)?;
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(error) => return Err(fail(error)),
    }
    std::fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(fail)?;
    File::open(parent).and_then(|parent| parent.sync_all()).map_err(fail)
}

fn open_directory(dir: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(dir, flags, Mode::empty())?.into())
}

/// Opens a file of the directory without following a link, and without waiting on a pipe.
fn open_regular(dir: &File, name: &str, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(dir, name, flags, OWNER_ONLY)?);
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"))
    }
}

/// A new file that only its owner can read, in place of what a crash may have left under that name.
fn create_private(dir: &File, name: &str) -> io::Result<File> {
    remove(dir, name)?;
    let file = open_regular(dir, name, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)?;
    // Whatever the umask took away.
    file.set_permissions(Permissions::from_mode(0o600))?;
    Ok(file)
}

/// Fills a range with zeros, in blocks that it keeps.
fn zero(file: &File, from: u64, to: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::ZERO_RANGE, from, to - from) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP) => {
            let whole = from.next_multiple_of(PAGE as u64);
            file.write_all_at(&vec![0; (whole - from) as usize], from)?;
            write_zero_pages(file, whole, to)
        }
        Err(errno) => Err(errno.into()),
    }
}

fn write_zero_pages(file: &File, from: u64, to: u64) -> io::Result<()> {
    (from..to).step_by(PAGE).try_for_each(|at| file.write_all_at(&[0; PAGE], at))
}

/// Takes a name away, if it is there.
fn remove(dir: &File, name: &str) -> io::Result<()> {
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Gives a file a name that must not be taken.
fn rename_new(dir: &File, from: &str, to: &str) -> io::Result<()> {
    match rustix::fs::renameat_with(dir, from, dir, to, RenameFlags::NOREPLACE) {
        // Not every file system can check and rename in one step.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => match rustix::fs::statat(dir, to, AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(rustix::fs::renameat(dir, from, dir, to)?),
            Ok(_) => Err(Errno::EXIST.into()),
            Err(errno) => Err(errno.into()),
        },
        answer => Ok(answer?),
    }
}

/// Writes, but not beyond the process's limit: that would kill it by SIGXFSZ.
fn write_limited(file: &File, at: u64, bytes: &[u8]) -> io::Result<()> {
    if file_size_limit().is_some_and(|limit| limit < at + bytes.len() as u64) {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    file.write_all_at(bytes, at)
}

fn file_size_limit() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Fsize).current
}

/// A write beyond the limit would kill the process by SIGXFSZ.
fn check_file_size_limit(path: &Path, len: u64) -> Result<()> {
    match file_size_limit() {
        Some(limit) if limit < len => Err(Error::new(
            ErrorKind::StorageFull,
            format!("a segment of {len} bytes is over this process's file-size limit (ulimit -f) of {limit} bytes"),
        )
        .at(path, None)),
        Some(_) | None => Ok(()),
    }
}

/// The file system's magic number.
fn file_system(dir: &Path, handle: &File) -> Result<i64> {
    let found = rustix::fs::fstatfs(handle);
    let found = found.map_err(|errno| Error::io("probe the file system of", dir, errno.into()))?;
    Ok(found.f_type & 0xffff_ffff)
}

/// Whether `SEEK_DATA` can be relied on: it counts pages in memory as data on these, whether they were written back or not.
fn knows_holes(dir: &Path, handle: &File) -> Result<bool> {
    const EXT: i64 = 0xef53;
    const XFS: i64 = 0x5846_5342;
    Ok([EXT, XFS].contains(&file_system(dir, handle)?))
}

/// Whether storing into allocated blocks can't run out of space later.
///
/// Where a file can be cloned, its blocks can come to be shared, and a store through the mapping then has to allocate.
/// Network and user-space file systems promise nothing either.
fn overwrites_in_place(dir: &Path, handle: &File) -> Result<bool> {
    const BTRFS: i64 = 0x9123_683e;
    const OVERLAY: i64 = 0x794c_7630;
    const NFS: i64 = 0x6969;
    const FUSE: i64 = 0x6573_5546;
    const SMB2: i64 = 0xfe53_4d42;
    const NINE_P: i64 = 0x0102_1997;
    const ZFS: i64 = 0x2fc1_2fc1;
    const BCACHEFS: i64 = 0xca45_1a4e;
    let fail = |source: io::Error| Error::io("probe the file system of", dir, source);
    if [BTRFS, OVERLAY, NFS, FUSE, SMB2, NINE_P, ZFS, BCACHEFS].contains(&file_system(dir, handle)?) {
        return Ok(false);
    }
    let probes = ["probe-a.new", "probe-b.new"];
    let clones = || -> io::Result<bool> {
        let (from, to) = (create_private(handle, probes[0])?, create_private(handle, probes[1])?);
        from.write_all_at(&[1; PAGE], 0)?;
        Ok(rustix::fs::ioctl_ficlone(&to, &from).is_ok())
    };
    let answer = clones();
    for probe in probes {
        remove(handle, probe).map_err(fail)?;
    }
    match answer {
        Ok(clones) => Ok(!clones),
        // Not a block is left to find out with.
        Err(error) if error.kind() == io::ErrorKind::StorageFull => Ok(false),
        Err(error) => Err(fail(error)),
    }
}

/// Directories that this process has open.
///
/// `flock` alone would do on a local file system; over NFS it is a byte-range lock, which a process doesn't hold
/// against itself.
static OPEN_HERE: Mutex<Option<HashSet<OpenDir>>> = Mutex::new(None);

/// Device, inode, and the process that opened it: a child finds its parent's in its copy of the set.
type OpenDir = (u64, u64, u32);

/// Keeps every other opener out. The lock file is never removed: a new one would be another lock.
#[derive(Debug)]
struct DirLock {
    file: File,
    id: OpenDir,
    fork: ForkMark,
}

impl DirLock {
    fn take(handle: &File, dir: &Path) -> Result<Self> {
        let path = dir.join(LOCK_NAME);
        let fail = |source| Error::io("lock the store", &path, source);
        let held = |by: &str| Error::new(ErrorKind::Locked, format!("the store is open in {by}")).at(&path, None);
        let file = open_regular(handle, LOCK_NAME, OFlags::RDWR | OFlags::CREATE).map_err(fail)?;
        let found = file.metadata().map_err(fail)?;
        let id = (found.dev(), found.ino(), std::process::id());
        let mut open_here = OPEN_HERE.lock();
        let open_here = open_here.get_or_insert_default();
        if open_here.contains(&id) {
            return Err(held("this process, or a Reservation, Pending or Record of it is still held"));
        }
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(held("another process")),
            Err(std::fs::TryLockError::Error(error)) => return Err(fail(error)),
        }
        file.set_permissions(Permissions::from_mode(0o600)).map_err(fail)?;
        let fork = ForkMark::new().map_err(fail)?;
        open_here.insert(id);
        Ok(DirLock { file, id, fork })
    }
}

impl Drop for DirLock {
    fn drop(&mut self) {
        // A child that inherited the lock must not undo its parent's.
        if !self.fork.is_ours() {
            return;
        }
        // Closing the file is not enough while a child that is about to start a program has a copy of it.
        self.file.unlock().ok();
        if let Some(open_here) = OPEN_HERE.lock().as_mut() {
            open_here.remove(&self.id);
        }
    }
}
