//! Where segments live: the one seam between the journal and storage.
//!
//! Three kinds of it: files written through a mapping, files written with `pwrite` and read through a mapping (both in
//! `file`), and the simulated disk of the tests (`sim`). In-memory stores use anonymous mappings (`anon`).

mod anon;
mod file;
#[cfg(any(test, feature = "testing"))]
mod sim;

pub(crate) use anon::AnonMedia;
pub(crate) use file::FileMedia;
#[cfg(any(test, feature = "testing"))]
pub use sim::{DiskOp, SimDisk};

use crate::error::Result;
use crate::mmap::Region;
use std::fmt::Debug;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// How a store on disk writes its segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Media {
    /// `Pwrite` where the file system copies on write or is not local, `Mmap` elsewhere.
    #[default]
    Auto,
    /// Stores into a shared mapping: the fastest, for file systems that overwrite in place (ext4, tmpfs).
    Mmap,
    /// `pwrite`: a full disk is an error there even where overwriting allocates (btrfs, reflinked files).
    Pwrite,
}

/// A directory of blobs.
pub(crate) trait Storage: Debug + Send + Sync {
    /// Names of all that is there.
    fn list(&self) -> Result<Vec<String>>;

    /// Makes a blob of `len` bytes, zero but for `header` at its start.
    ///
    /// On return its space is allocated, and its name and contents are durable; on error nothing of it is left.
    fn create(&self, name: &str, len: u64, header: &[u8]) -> Result<Arc<dyn Blob>>;

    /// Turns a blob into what `create` would have made, under another name and in the same space.
    ///
    /// It starts with `void` until that is done; on error the blob is there under either name, or both.
    fn renew(&self, old: &str, new: &str, len: u64, void: &[u8], header: &[u8]) -> Result<Arc<dyn Blob>>;

    /// Opens a blob for recovery.
    fn open(&self, name: &str) -> Result<Arc<dyn Blob>>;

    /// Takes a name away; durable after [`sync_names`](Storage::sync_names).
    fn remove(&self, name: &str) -> Result<()>;

    fn sync_names(&self) -> Result<()>;

    /// Durably replaces a file, whole or not at all, by parts that are asked for until there are no more.
    fn write_file(&self, name: &str, next: &mut dyn FnMut() -> Result<Option<Vec<u8>>>) -> Result<()>;

    /// Durably replaces a small file, whole or not at all.
    fn write_small(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut bytes = Some(bytes.to_vec());
        self.write_file(name, &mut || Ok(bytes.take()))
    }

    /// Reads a small file, at most `limit` bytes of it; `None` if it doesn't exist.
    fn read_small(&self, name: &str, limit: usize) -> Result<Option<Vec<u8>>>;

    /// What to call a blob in a message.
    fn path(&self, name: &str) -> PathBuf;
}

/// A stretch of storage with a fixed length.
pub(crate) trait Blob: Debug + Send + Sync {
    fn len(&self) -> u64;

    /// Fills `buf` from `at` on, with reads that can fail and not through the mapping.
    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()>;

    /// From where on there is nothing but zeros, as far as that is known without reading.
    fn data_end(&self) -> io::Result<u64> {
        Ok(self.len())
    }

    /// Writes the parts one after the other into a claimed range.
    fn append(&self, at: u64, parts: &[&[u8]]) -> io::Result<()>;

    /// Writes over what was written before: repair and erasure.
    fn overwrite(&self, at: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes all that was written before the call durable.
    fn sync(&self) -> io::Result<()>;

    /// Readies memory of a range for `append`, so that it needn't. Nothing was appended to a new blob before its start is.
    fn fault_in(&self, from: u64, to: u64) -> io::Result<()>;

    /// Gives the blocks of a range back that nothing was written to; the length stays.
    fn punch(&self, from: u64, to: u64) -> io::Result<()>;

    /// Bytes that the blob takes up on the device.
    fn allocated(&self) -> io::Result<u64>;

    /// The blob's contents as memory.
    fn map(&self) -> io::Result<Arc<Region>>;
}

#[cfg(any(test, feature = "testing"))]
pub(crate) use sim::SimStorage;
