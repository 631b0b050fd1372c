//! Time, which enters the store only here.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A source of milliseconds since the Unix epoch that never goes back while the process runs.
///
/// The store reads it once an operation. Deadlines are persisted as what it returns.
pub trait Clock: Send + Sync + 'static {
    /// Milliseconds since 1970-01-01T00:00:00Z.
    fn now_ms(&self) -> u64;
}

/// The wall clock at start plus the boot-time clock since: a later step of the wall clock changes nothing.
///
/// The boot-time clock counts suspended time.
#[derive(Debug)]
pub struct SystemClock {
    /// What to add to the boot-time clock to get Unix milliseconds.
    offset_ms: u64,
}

impl SystemClock {
    /// A clock that agrees with the wall clock now.
    pub fn new() -> Self {
        let wall_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
        SystemClock { offset_ms: wall_ms.saturating_sub(boot_ms()) }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        SystemClock::new()
    }
}

impl Clock for SystemClock {
    #[inline]
    fn now_ms(&self) -> u64 {
        self.offset_ms.saturating_add(boot_ms())
    }
}

#[inline]
fn boot_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

/// A clock that moves only when told to, for tests and simulation.
///
/// ```
/// use oncekey::{Clock, ManualClock};
/// use std::time::Duration;
///
/// let clock = ManualClock::new(1_000);
/// clock.advance(Duration::from_secs(2));
/// assert_eq!(clock.now_ms(), 3_000);
/// ```
#[derive(Debug)]
pub struct ManualClock(AtomicU64);

impl ManualClock {
    /// A clock that stands at `now_ms` milliseconds since the Unix epoch.
    pub fn new(now_ms: u64) -> Self {
        ManualClock(AtomicU64::new(now_ms))
    }

    /// Moves the clock forward; it stops at the last millisecond that a `u64` can hold.
    pub fn advance(&self, by: Duration) {
        // Relaxed: tests that need an order between threads have their own.
        let mut now = self.0.load(Ordering::Relaxed);
        while let Err(moved) =
            self.0.compare_exchange(now, saturating_add(now, by), Ordering::Relaxed, Ordering::Relaxed)
        {
            now = moved;
        }
    }

    /// Puts the clock to `now_ms`, also backwards: what a wall-clock step looks like across a restart.
    pub fn set(&self, now_ms: u64) {
        self.0.store(now_ms, Ordering::Relaxed);
    }
}

impl Clock for ManualClock {
    fn now_ms(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl<C: Clock + ?Sized> Clock for std::sync::Arc<C> {
    #[inline]
    fn now_ms(&self) -> u64 {
        (**self).now_ms()
    }
}

/// `now_ms + by`, stopping short of `u64::MAX`, which means "never".
pub(crate) fn saturating_add(now_ms: u64, by: Duration) -> u64 {
    let by_ms = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
    now_ms.saturating_add(by_ms).min(u64::MAX - 1)
}
