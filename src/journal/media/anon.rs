//! Storage that lives and dies with the store: anonymous mappings.

use super::{Blob, Region, Storage};
use crate::error::{Error, Result};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[derive(Debug)]
pub(crate) struct AnonMedia;

impl Storage for AnonMedia {
    fn list(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn create(&self, name: &str, len: u64, header: &[u8]) -> Result<Arc<dyn Blob>> {
        let region = Region::anonymous(len as usize)
            .map_err(|source| Error::io("map memory for a segment", &self.path(name), source))?;
        // Only advice: without huge pages the store is slower, not wrong.
        region.advise_huge().ok();
        region.write(0, header);
        Ok(Arc::new(AnonBlob(Arc::new(region))))
    }

    fn renew(&self, _old: &str, new: &str, len: u64, _void: &[u8], header: &[u8]) -> Result<Arc<dyn Blob>> {
        self.create(new, len, header)
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Blob>> {
        Err(Error::io("open", &self.path(name), io::ErrorKind::NotFound.into()))
    }

    fn remove(&self, _name: &str) -> Result<()> {
        Ok(())
    }

    fn sync_names(&self) -> Result<()> {
        Ok(())
    }

    fn write_file(&self, _name: &str, _next: &mut dyn FnMut() -> Result<Option<Vec<u8>>>) -> Result<()> {
        Ok(())
    }

    fn read_small(&self, _name: &str, _limit: usize) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }

    fn path(&self, name: &str) -> PathBuf {
        Path::new("memory").join(name)
    }
}

#[derive(Debug)]
struct AnonBlob(Arc<Region>);

impl Blob for AnonBlob {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        let at = at as usize;
        let bytes = self.0.bytes(at..at + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    #[inline]
    fn append(&self, at: u64, parts: &[&[u8]]) -> io::Result<()> {
        let mut at = at as usize;
        for part in parts {
            self.0.write(at, part);
            at += part.len();
        }
        Ok(())
    }

    fn overwrite(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.append(at, &[bytes])
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn fault_in(&self, from: u64, to: u64) -> io::Result<()> {
        self.0.populate(from as usize..to as usize)
    }

    fn punch(&self, _from: u64, _to: u64) -> io::Result<()> {
        Ok(())
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.len())
    }

    fn map(&self) -> io::Result<Arc<Region>> {
        Ok(Arc::clone(&self.0))
    }
}
