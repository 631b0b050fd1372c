//! One clock for all processes of a run.

use oncekey::Clock;
use rustix::time::{ClockId, clock_gettime};

/// How many of the store's milliseconds pass in one of ours, so that answers of several lifetimes end within a run.
const SPEED: u64 = 64;
/// 2026-01-01, when all clocks of the rig start.
pub const EPOCH_MS: u64 = 1_767_225_600_000;

/// The kernel's monotonic clock, sped up.
///
/// It is the same in all processes, so what one of them saw expire is expired to the next one: the deadlines that the
/// oracle computes are exact, and there is no zone of doubt but the duration of each call.
#[derive(Clone, Copy)]
pub struct FastClock {
    start_ns: u64,
}

impl FastClock {
    pub fn started_now() -> FastClock {
        FastClock { start_ns: monotonic_ns() }
    }

    pub fn started_at(start_ns: u64) -> FastClock {
        FastClock { start_ns }
    }

    pub fn start_ns(self) -> u64 {
        self.start_ns
    }
}

impl Clock for FastClock {
    fn now_ms(&self) -> u64 {
        EPOCH_MS + (monotonic_ns() - self.start_ns) * SPEED / 1_000_000
    }
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
