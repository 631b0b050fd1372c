//! Ends the run when nothing moves any more: a hang is a failure too.

use rustix::process::{Pid, Signal, kill_process_group};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::Duration;

/// Far longer than any process should take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Relaxed throughout: a look that comes a little late is good enough.
#[derive(Clone, Default)]
pub struct Watchdog(Arc<Seen>);

#[derive(Default)]
struct Seen {
    processes: AtomicU64,
    child: AtomicI32,
}

impl Watchdog {
    /// Watches from now on; `note` is said when it gives up.
    pub fn start(note: String) -> Watchdog {
        let watchdog = Watchdog::default();
        let seen = Arc::clone(&watchdog.0);
        std::thread::spawn(move || {
            let mut before = 0;
            loop {
                std::thread::sleep(PATIENCE);
                let now = seen.processes.load(Ordering::Relaxed);
                if now == before {
                    eprintln!("torture: nothing moved for {PATIENCE:?}; {note}");
                    if let Some(child) = Pid::from_raw(seen.child.load(Ordering::Relaxed)) {
                        kill_process_group(child, Signal::KILL).ok();
                    }
                    std::process::exit(1);
                }
                before = now;
            }
        });
        watchdog
    }

    /// A child, the leader of its process group, was started, or has ended.
    pub fn mind(&self, child: Option<Pid>) {
        self.0.processes.fetch_add(1, Ordering::Relaxed);
        self.0.child.store(Pid::as_raw(child), Ordering::Relaxed);
    }
}
