//! Locks, conditions, atomics and threads: the real ones, or those of a checker that drives the interleavings.
//!
//! In ordinary builds these are re-exports. Under `cfg(oncekey_loom)` and `cfg(oncekey_shuttle)` they are those of loom and
//! of shuttle, dressed as `parking_lot`'s. Timed waits never time out there, so that a wake-up that was missed is a deadlock,
//! which both report.

#[cfg(not(oncekey_shuttle))]
pub(crate) use std::thread::{self, sleep};
#[cfg(not(any(oncekey_loom, oncekey_shuttle)))]
pub(crate) use {
    crossbeam_utils::Backoff,
    parking_lot::{Condvar, Mutex, MutexGuard},
    std::sync::atomic,
};

#[cfg(any(oncekey_loom, oncekey_shuttle))]
pub(crate) use checked::{Backoff, Condvar, Mutex, MutexGuard};
#[cfg(oncekey_loom)]
pub(crate) use loom::sync::atomic;
#[cfg(oncekey_shuttle)]
pub(crate) use {
    checked::sleep,
    shuttle::{sync::atomic, thread},
};

#[cfg(any(oncekey_loom, oncekey_shuttle))]
mod checked {
    #[cfg(oncekey_loom)]
    use loom as checker;
    #[cfg(oncekey_shuttle)]
    use shuttle as checker;
    use std::fmt;
    use std::ops::{Deref, DerefMut};
    use std::time::Duration;

    #[derive(Default)]
    pub(crate) struct Mutex<T>(checker::sync::Mutex<T>);

    /// Without its inner guard only while the lock is lent out.
    pub(crate) struct MutexGuard<'m, T> {
        mutex: &'m Mutex<T>,
        guard: Option<checker::sync::MutexGuard<'m, T>>,
    }

    #[derive(Debug, Default)]
    pub(crate) struct Condvar(checker::sync::Condvar);

    /// Gives way each time: a checker decides who goes on.
    pub(crate) struct Backoff;

    const HELD: &str = "the lock is held";
    /// A thread that panicked has ended the run.
    const SOUND: &str = "nobody panicked under the lock";

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Mutex(checker::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            MutexGuard { mutex: self, guard: Some(self.0.lock().expect(SOUND)) }
        }

        pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            Some(MutexGuard { mutex: self, guard: Some(self.0.try_lock().ok()?) })
        }
    }

    impl<T> MutexGuard<'_, T> {
        pub(crate) fn unlocked<U>(lent: &mut Self, run: impl FnOnce() -> U) -> U {
            lent.guard = None;
            let answer = run();
            lent.guard = Some(lent.mutex.0.lock().expect(SOUND));
            answer
        }
    }

    impl<T> Deref for MutexGuard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            self.guard.as_ref().expect(HELD)
        }
    }

    impl<T> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.guard.as_mut().expect(HELD)
        }
    }

    impl<T> fmt::Debug for Mutex<T> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Mutex")
        }
    }

    impl<T: fmt::Debug> fmt::Debug for MutexGuard<'_, T> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            fmt::Debug::fmt(&**self, f)
        }
    }

    impl Condvar {
        pub(crate) fn wait<T>(&self, lent: &mut MutexGuard<'_, T>) {
            let guard = lent.guard.take().expect(HELD);
            lent.guard = Some(self.0.wait(guard).expect(SOUND));
        }

        pub(crate) fn wait_for<T>(&self, lent: &mut MutexGuard<'_, T>, _limit: Duration) {
            self.wait(lent);
        }

        pub(crate) fn notify_one(&self) {
            self.0.notify_one();
        }

        pub(crate) fn notify_all(&self) {
            self.0.notify_all();
        }
    }

    /// Shuttle's own gives no way to others, and what is slept for is their doing.
    #[cfg(oncekey_shuttle)]
    pub(crate) fn sleep(_time: Duration) {
        checker::thread::yield_now();
    }

    impl Backoff {
        pub(crate) fn new() -> Self {
            Backoff
        }

        pub(crate) fn snooze(&self) {
            checker::thread::yield_now();
        }
    }
}
