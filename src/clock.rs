//! Time, which enters the store only here.

use crate::sync::atomic::{AtomicU64, Ordering};
use rustix::time::ClockId;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A source of milliseconds since the Unix epoch that never goes back while the process runs.
///
/// The store reads it once an operation. Deadlines are persisted as what it returns. It must not panic: upkeep's threads end
/// with a panic, and [`maintain`](crate::Store::maintain) is then left to you.
pub trait Clock: Send + Sync + 'static {
    /// Milliseconds since 1970-01-01T00:00:00Z.
    fn now_ms(&self) -> u64;
}

/// The wall clock at start plus the boot-time clock since: a later step of the wall clock changes nothing.
///
/// It reads the kernel's coarse monotonic clock, four times faster than the exact one and at most one timer tick (1 to
/// 10 ms) behind it. That clock stands still while the machine is suspended, so the boot-time clock is read too, once a
/// second.
#[derive(Debug)]
pub struct SystemClock {
    /// What to add to the boot-time clock to get Unix milliseconds.
    wall_offset_ms: u64,
    /// What to add to the coarse clock to get the boot-time clock; grows by each suspension.
    suspended_ms: AtomicU64,
    /// When, by the coarse clock, that was last found out.
    checked_ms: AtomicU64,
}

/// How long a suspension may go unnoticed, in milliseconds awake.
const CHECK_EVERY_MS: u64 = 1000;

impl SystemClock {
    /// A clock that agrees with the wall clock now.
    pub fn new() -> Self {
        let wall_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
        let clock = SystemClock {
            wall_offset_ms: wall_ms.saturating_sub(read_ms(ClockId::Boottime)),
            suspended_ms: AtomicU64::new(0),
            checked_ms: AtomicU64::new(0),
        };
        clock.check_suspension(read_ms(ClockId::MonotonicCoarse));
        clock
    }

    #[cold]
    fn check_suspension(&self, awake_ms: u64) {
        // The coarse clock lags by up to a tick; rounding that into the offset would let time run ahead and back. The
        // offset only grows, so threads that race here agree on the larger.
        let suspended_ms = read_ms(ClockId::Boottime).saturating_sub(read_ms(ClockId::Monotonic));
        self.suspended_ms.fetch_max(suspended_ms, Ordering::Relaxed);
        self.checked_ms.store(awake_ms, Ordering::Relaxed);
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
        let awake_ms = read_ms(ClockId::MonotonicCoarse);
        // Relaxed: any thread may be the one to check, and an older offset is at most a second old.
        if awake_ms.wrapping_sub(self.checked_ms.load(Ordering::Relaxed)) >= CHECK_EVERY_MS {
            self.check_suspension(awake_ms);
        }
        self.wall_offset_ms.saturating_add(awake_ms).saturating_add(self.suspended_ms.load(Ordering::Relaxed))
    }
}

#[inline]
fn read_ms(clock: ClockId) -> u64 {
    let now = rustix::time::clock_gettime(clock);
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
    if planted!(DeadlineWraps) {
        return now_ms.wrapping_add(by_ms);
    }
    now_ms.saturating_add(by_ms).min(u64::MAX - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_clock_agrees_with_the_wall_clock_and_never_goes_back() {
        let clock = SystemClock::new();
        let mut last = clock.now_ms();
        let wall_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
        assert!(last.abs_diff(wall_ms) < 5_000, "{last} against {wall_ms}");
        for turn in 0..100_000 {
            if turn % 1000 == 0 {
                clock.checked_ms.store(0, Ordering::Relaxed);
            }
            let now = clock.now_ms();
            assert!(now >= last);
            last = now;
        }
    }

    #[test]
    fn a_manual_clock_stops_before_the_end_of_time() {
        let clock = ManualClock::new(u64::MAX - 10);
        clock.advance(Duration::MAX);
        assert_eq!(clock.now_ms(), u64::MAX - 1);
        clock.set(5);
        assert_eq!(clock.now_ms(), 5);
    }
}
