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
//! An [`Arena`] gives memory out for values, each [`Part`] to one owner:
//!
//! - **M5** Parts of a stretch don't overlap, and none is given out twice; the stretch is mapped as long as a part of it is left.
//! - **M6** Their values are of a type for which zeros are a value and that has nothing to drop.
//!
//! What remains is outside the process: another program that truncates a segment file, or a device that fails to read
//! a page back, makes the kernel raise SIGBUS; one that writes into it changes bytes under a `&[u8]`.
#![allow(unsafe_code)]

use crate::sync::Mutex;
use crate::table::Slot;
use memmap2::{Advice, MmapOptions, MmapRaw};
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::mem::needs_drop;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::Arc;

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

/// A huge page of the usual size.
const HUGE: usize = 2 << 20;
/// How many parts of a size are needed at about the same time.
const PARTS: usize = 256;

/// Memory for values that as many of are needed at about the same time as there are tables.
///
/// In huge pages where the kernel has them, since a page that isn't in the TLB costs more than a line that isn't in the cache;
/// but to clear one takes up to milliseconds, so what needs memory gets only those that were faulted in ahead, and small pages
/// if there are none. What is given back stays mapped until all of a stretch is.
#[derive(Debug, Default)]
pub(crate) struct Arena(Mutex<Stretches>);

#[derive(Debug, Default)]
struct Stretches {
    /// In huge pages, of which some are faulted in.
    huge: Option<Stretch>,
    small: Option<Stretch>,
    /// Bytes of parts that will be needed soon; 0 if that is seen to.
    expected: usize,
}

#[derive(Debug)]
struct Stretch {
    region: Arc<Region>,
    /// Bytes of the parts that it was made for.
    part: usize,
    used: usize,
    /// Up to where it may be given out.
    ready: usize,
}

/// Types of which zeros are a value (M6).
///
/// # Safety
///
/// That is to be so.
pub(crate) unsafe trait Zeroed {}

// SAFETY: it consists of integers, one of them atomic.
unsafe impl Zeroed for Slot {}

/// Some values of an arena.
pub(crate) struct Part<T> {
    start: NonNull<T>,
    len: usize,
    home: Home,
    _values: PhantomData<T>,
}

/// Where the values of a part are.
enum Home {
    /// There are none.
    Nowhere,
    /// In a stretch that stays mapped for it.
    Mapped { _region: Arc<Region> },
    /// In memory of the program's allocator.
    Allocated(Layout),
}

// SAFETY: a part is the only way to its values (M5).
unsafe impl<T: Send> Send for Part<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Part<T> {}

impl Arena {
    /// An arena with room for parts of this many values, to be faulted in by whoever comes there first.
    pub(crate) fn with_room_for<T: Zeroed>(len: usize) -> Self {
        let huge = if len > 0 { Stretch::huge(bytes_of::<T>(len)).ok() } else { None };
        let huge = huge.map(|stretch| Stretch { ready: stretch.region.len(), ..stretch });
        Arena(Mutex::new(Stretches { huge, ..Stretches::default() }))
    }

    /// So many values of zeros. As with other memory, the process ends if there is none, from the program's allocator neither.
    pub(crate) fn zeroed<T: Zeroed>(&self, len: usize) -> Part<T> {
        const { assert!(!needs_drop::<T>() && align_of::<T>() <= 64 && size_of::<T>() > 0) }
        if len == 0 {
            return Part::default();
        }
        let bytes = bytes_of::<T>(len);
        let mut stretches = self.0.lock();
        let Stretches { huge, small, .. } = &mut *stretches;
        let stretch = match huge.as_mut().filter(|huge| huge.has_room_for(bytes)) {
            Some(huge) => huge,
            None => {
                if small.as_ref().is_none_or(|small| !small.has_room_for(bytes)) {
                    *small = Stretch::new(bytes, bytes).ok();
                }
                match small {
                    Some(small) => small,
                    None => return Part::allocated(len, bytes),
                }
            }
        };
        let from = stretch.used;
        assert!(stretch.has_room_for(bytes));
        stretch.used += bytes;
        // SAFETY: by the assertion, `bytes` from there on lie in the mapping; nobody else gets them (M5), as the lock is held.
        let start = unsafe { NonNull::new_unchecked(stretch.region.map.as_mut_ptr().add(from)).cast() };
        Part { start, len, home: Home::Mapped { _region: Arc::clone(&stretch.region) }, _values: PhantomData }
    }

    /// Says that parts of this many values will soon be needed.
    pub(crate) fn expect<T: Zeroed>(&self, len: usize) {
        let bytes = bytes_of::<T>(len);
        let mut stretches = self.0.lock();
        // One of the same size was made when the first of them was expected.
        let is_for = |huge: &Stretch| huge.part == bytes || huge.part > bytes && huge.region.len() - huge.used >= bytes;
        let is_there = stretches.huge.as_ref().is_some_and(is_for);
        if !is_there && bytes * PARTS >= HUGE {
            stretches.expected = stretches.expected.max(bytes);
        }
    }

    /// Maps what is expected, or faults some of it in; `true` if there was anything to do. By one thread at a time.
    pub(crate) fn work_ahead(&self) -> bool {
        let mut stretches = self.0.lock();
        let expected = std::mem::take(&mut stretches.expected);
        if expected > 0
            && let Ok(huge) = Stretch::huge(expected)
        {
            stretches.huge = Some(huge);
        }
        let Some(huge) = stretches.huge.as_ref().filter(|huge| huge.ready < huge.region.len()) else { return false };
        let (region, from) = (Arc::clone(&huge.region), huge.ready);
        drop(stretches);
        // What fails here is want of memory: then it is for whoever comes there to do.
        region.populate(from..from + HUGE).ok();
        if let Some(huge) = self.0.lock().huge.as_mut().filter(|huge| Arc::ptr_eq(&huge.region, &region)) {
            huge.ready = from + HUGE;
        }
        true
    }
}

/// Whole cache lines for so many values.
fn bytes_of<T>(len: usize) -> usize {
    len.checked_mul(size_of::<T>()).expect("less than can be addressed").next_multiple_of(64)
}

impl Stretch {
    fn huge(bytes: usize) -> io::Result<Self> {
        let stretch = Stretch::new(bytes, bytes.saturating_mul(PARTS))?;
        // Only advice: without huge pages lookups are slower, not wrong.
        stretch.region.advise_huge().ok();
        Ok(Stretch { ready: 0, ..stretch })
    }

    fn new(part: usize, len: usize) -> io::Result<Self> {
        let len = len.next_multiple_of(HUGE);
        Ok(Stretch { region: Arc::new(Region::anonymous(len)?), part, used: 0, ready: len })
    }

    fn has_room_for(&self, bytes: usize) -> bool {
        self.ready.saturating_sub(self.used) >= bytes
    }
}

impl<T> Part<T> {
    /// Zeros where no stretch could be mapped; `bytes` is more than none.
    #[cold]
    fn allocated(len: usize, bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes, 64).expect("less than can be addressed");
        // SAFETY: the layout is not of nothing.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| handle_alloc_error(layout));
        Part { start: start.cast(), len, home: Home::Allocated(layout), _values: PhantomData }
    }
}

impl<T> Drop for Part<T> {
    fn drop(&mut self) {
        if let Home::Allocated(layout) = self.home {
            // SAFETY: it was allocated so, and nobody else has it (M5).
            unsafe { dealloc(self.start.as_ptr().cast(), layout) }
        }
    }
}

impl<T> Default for Part<T> {
    fn default() -> Self {
        Part { start: NonNull::dangling(), len: 0, home: Home::Nowhere, _values: PhantomData }
    }
}

impl<T> Deref for Part<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: the values are in memory that lives as long as `self`; zeros were values (M6), and so is what was
        // written since. Only `self` leads to them (M5). An empty part has none.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Part<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed by nobody else.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T> fmt::Debug for Part<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Part({})", self.len)
    }
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

    struct Value(u64);

    // SAFETY: it is an integer.
    unsafe impl Zeroed for Value {}

    /// Writes to all of a part's values, which have to be zeros.
    fn fill(part: &mut Part<Value>, with: u64) {
        assert!(part.iter().all(|value| value.0 == 0));
        part.iter_mut().for_each(|value| value.0 = with);
    }

    #[test]
    fn parts_are_zeros_and_do_not_overlap_and_outlive_the_arena() {
        for arena in [Arena::default(), Arena::with_room_for::<Value>(20_000)] {
            let mut parts: Vec<Part<Value>> = Vec::new();
            for nth in 0..300 {
                let mut part = arena.zeroed(nth * 100);
                assert_eq!(part.len(), nth * 100);
                fill(&mut part, nth as u64);
                parts.push(part);
            }
            parts.retain(|part| part.len() % 200 == 0);
            drop(arena);
            assert!(parts.iter().all(|part| part.iter().all(|value| value.0 == part.len() as u64 / 100)));
        }
    }

    #[test]
    fn what_can_not_be_mapped_is_allocated() {
        let mut part = Part::allocated(1000, bytes_of::<Value>(1000));
        assert_eq!(part.len(), 1000);
        fill(&mut part, 7);
    }

    #[test]
    fn what_is_expected_is_made_ready_ahead_and_given_out_then() {
        let arena = Arena::default();
        arena.expect::<Value>(10);
        assert!(!arena.work_ahead(), "too little for a huge page");
        arena.expect::<Value>(5000);
        // Nobody waits for what isn't ready.
        fill(&mut arena.zeroed(5000), 1);
        assert!(arena.work_ahead());
        while arena.work_ahead() {}
        let used = || arena.0.lock().huge.as_ref().map(|huge| huge.used);
        assert_eq!(used(), Some(0));
        let mut parts: Vec<Part<Value>> = (0..PARTS).map(|_| arena.zeroed(5000)).collect();
        assert_eq!(used(), Some(PARTS * 40_000));
        parts.iter_mut().for_each(|part| fill(part, 7));
        // One more than there was room for.
        parts.extend((0..100).map(|_| arena.zeroed(5000)));
        assert!(parts[PARTS + 60..].iter().all(|part| part.iter().all(|value| value.0 == 0)));
    }

    #[test]
    #[should_panic(expected = "assertion failed")]
    fn a_write_outside_the_region_panics() {
        Region::anonymous(4096).unwrap().write(4095, b"ab");
    }
}
