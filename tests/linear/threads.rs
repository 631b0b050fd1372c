//! Threads of the machine: how they dawdle, wait and give up.

use fastrand::Rng;
use oncekey::{Pending, Result, Wait};
use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

pub type Atomic = std::sync::atomic::AtomicU64;
pub type Mutex<T> = std::sync::Mutex<T>;
pub type MutexGuard<'m, T> = std::sync::MutexGuard<'m, T>;

/// How long a wait whose end is certain may take, on a busy machine, before somebody is said to have missed his wake-up.
const PATIENCE: Duration = Duration::from_secs(20);

thread_local! {
    static READING: Cell<u64> = const { Cell::new(0) };
    static WHIM: RefCell<Rng> = const { RefCell::new(Rng::with_seed(0)) };
}

/// Notes what this thread's call read from the clock.
pub fn read(now_ms: u64) {
    READING.set(now_ms);
}

pub fn last_reading() -> u64 {
    READING.get()
}

/// Seeds how this thread dawdles.
pub fn seed(seed: u64) {
    WHIM.with_borrow_mut(|whim| whim.seed(seed));
}

/// Lets others come first, now and then.
pub fn dawdle() {
    let (whim, spins) = WHIM.with_borrow_mut(|whim| (whim.u8(..16), whim.u32(..1500)));
    match whim {
        0 => thread::yield_now(),
        1..6 => (0..spins).for_each(|_| std::hint::spin_loop()),
        _ => {}
    }
}

pub fn give_way() {
    thread::yield_now();
}

pub fn give_up(why: &str) -> ! {
    eprintln!("violated: {why}");
    std::process::exit(1);
}

/// Waits for the end of an operation that surely ends, by a condition or by a waker.
pub fn wait(pending: Pending, blocks: bool) -> Result<Wait> {
    let begun = Instant::now();
    let wait = if blocks { pending.wait(PATIENCE) } else { block_on(pending) };
    if begun.elapsed() >= PATIENCE {
        give_up(&format!("a waiter was not woken: {wait:?}"));
    }
    wait
}

struct Sleeper {
    thread: Thread,
    is_woken: AtomicBool,
}

impl Wake for Sleeper {
    fn wake(self: Arc<Self>) {
        self.is_woken.store(true, Ordering::SeqCst);
        self.thread.unpark();
    }
}

fn block_on(pending: Pending) -> Result<Wait> {
    let sleeper = Arc::new(Sleeper { thread: thread::current(), is_woken: AtomicBool::new(false) });
    let waker = Waker::from(Arc::clone(&sleeper));
    let mut wait = pin!(pending.wait_async());
    let until = Instant::now() + PATIENCE;
    loop {
        if let Poll::Ready(answer) = wait.as_mut().poll(&mut Context::from_waker(&waker)) {
            return answer;
        }
        while !sleeper.is_woken.swap(false, Ordering::SeqCst) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                give_up("a waker was not called");
            }
            thread::park_timeout(left);
        }
    }
}
