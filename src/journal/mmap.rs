//! Memory mappings: the only unsafe code of the crate.
//!
//! A [`Region`] is shared memory that some threads read while others write elsewhere in it, which no `&[u8]` over the
//! whole of it could express. It hands out slices of parts, under these rules, which the journal keeps:
//!
//! - **M1** A byte is written by one thread only: the holder of the claim over it, before the claim is published.
//! - **M2** A slice is taken only of published bytes (or by the claim's holder), and publication is a release that the
//!   reader's acquire pairs with. So no slice ever overlaps a write, but for M3.
//! - **M3** A scrub overwrites published bytes. It runs after the record's slot is gone, so that no new slice can be
//!   taken, when no handle to the record's stripe is left, and under the lock that excludes every scan.
//! - **M4** The file behind a region keeps its length: it is locked against a second owner, is never truncated, and its
//!   blocks are allocated before it is mapped for writing.
//!
//! What remains is outside the process: another program that truncates a segment file, or a device that fails to read
//! a page back, makes the kernel raise SIGBUS; one that writes into it changes bytes under a `&[u8]`.
#![allow(unsafe_code)]

use memmap2::{Advice, MmapOptions, MmapRaw};
use std::fs::File;
use std::io;
use std::ops::Range;

/// A mapped stretch of memory.
#[derive(Debug)]
pub(crate) struct Region {
    map: MmapRaw,
    writable: bool,
}

impl Region {
    /// Zeroed memory that belongs to no file.
    pub(crate) fn anonymous(len: usize) -> io::Result<Self> {
        Ok(Region { map: MmapOptions::new().len(len).map_anon()?.into(), writable: true })
    }

    /// The whole file, for reading and writing through the mapping (M4: its blocks are allocated).
    ///
    /// With `by_pages` the kernel faults single pages in. Otherwise it is asked for folios of 2 MiB, each mapped by one fault
    /// and write-protected at once for a sync; but that then writes the whole folio back for one record.
    pub(crate) fn writable(file: &File, by_pages: bool) -> io::Result<Self> {
        let region = Region { map: MmapRaw::map_raw(file)?, writable: true };
        if by_pages {
            region.map.advise(Advice::Random)?;
        } else {
            // Only advice: without huge pages the store is slower, not wrong.
            region.advise_huge().ok();
        }
        Ok(region)
    }

    /// The whole file, for reading.
    pub(crate) fn read_only(file: &File) -> io::Result<Self> {
        Ok(Region { map: MmapOptions::new().map_raw_read_only(file)?, writable: false })
    }

    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }

    /// The bytes of a published range (M2); `None` if it is not inside the region.
    #[inline]
    pub(crate) fn bytes(&self, range: Range<usize>) -> Option<&[u8]> {
        if range.start > range.end || range.end > self.map.len() {
            return None;
        }
        // SAFETY: the range lies in the mapping, which lives as long as `self`. By M2 the range is published, so by M1
        // nobody writes to it while the slice lives, and by M3 no scrub does.
        Some(unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(range.start), range.len()) })
    }

    /// Begins to fetch the cache line at an offset.
    #[inline]
    pub(crate) fn prefetch(&self, at: usize) {
        if at < self.map.len() {
            // SAFETY: the address lies in the mapping.
            prefetch(unsafe { self.map.as_ptr().add(at) });
        }
    }

    /// Copies bytes into a claimed range (M1).
    ///
    /// # Panics
    ///
    /// If the range is not inside the region, or the region is read-only.
    #[inline]
    pub(crate) fn write(&self, at: usize, bytes: &[u8]) {
        assert!(self.writable && at <= self.map.len() && bytes.len() <= self.map.len() - at);
        // SAFETY: the range lies in a writable mapping that lives as long as `self`; by M1 (or M3) no other thread reads
        // or writes it meanwhile, and `bytes` can't overlap it, as no slice of an unpublished range exists.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.map.as_mut_ptr().add(at), bytes.len()) }
    }

    /// Faults pages in, for writing where the region is writable, so that no store has to.
    ///
    /// Kernels before 5.14 can't, and then stores do it.
    pub(crate) fn populate(&self, range: Range<usize>) -> io::Result<()> {
        let advice = if self.writable { Advice::PopulateWrite } else { Advice::PopulateRead };
        match self.map.advise_range(advice, range.start, range.len()) {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            answer => answer,
        }
    }

    /// Asks for huge pages, where the kernel gives them.
    pub(crate) fn advise_huge(&self) -> io::Result<()> {
        self.map.advise(Advice::HugePage)
    }
}

/// Begins to fetch the cache line at an address, where the machine can be told to.
#[inline]
pub(crate) fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch neither faults nor changes what is read, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Tells a process that opened a store from a child that inherited it by `fork`.
///
/// The kernel replaces the page by zeros in the child (`MADV_WIPEONFORK`), so the check is one load. Where it can't, as
/// before Linux 4.14, process ids are compared.
#[derive(Debug)]
pub(crate) struct ForkMark {
    page: Option<Region>,
    process: u32,
}

impl ForkMark {
    pub(crate) fn new() -> io::Result<Self> {
        let page = Region::anonymous(rustix::param::page_size())?;
        // SAFETY: the range is exactly the mapping just made, and wiping it in a child changes nothing here.
        let advised = unsafe {
            let start = page.map.as_mut_ptr().cast();
            rustix::mm::madvise(start, page.map.len(), rustix::mm::Advice::LinuxWipeOnFork)
        };
        page.write(0, &[1]);
        Ok(ForkMark { page: advised.is_ok().then_some(page), process: std::process::id() })
    }

    /// Whether this process is the one that made the mark.
    #[inline]
    pub(crate) fn is_ours(&self) -> bool {
        match &self.page {
            // SAFETY: the page is mapped and readable as long as `self` lives; nobody writes to it after `new`.
            Some(page) => unsafe { page.map.as_ptr().read_volatile() == 1 },
            None => std::process::id() == self.process,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_outside_the_region_gives_no_slice() {
        let region = Region::anonymous(4096).unwrap();
        assert!(region.bytes(4000..4097).is_none());
        assert!(region.bytes(usize::MAX - 1..usize::MAX).is_none());
        assert_eq!(region.bytes(4096..4096), Some(&[][..]));
        region.write(10, b"abc");
        assert_eq!(region.bytes(9..14), Some(&b"\0abc\0"[..]));
    }

    #[test]
    #[should_panic(expected = "assertion failed")]
    fn a_write_outside_the_region_panics() {
        Region::anonymous(4096).unwrap().write(4095, b"ab");
    }
}
