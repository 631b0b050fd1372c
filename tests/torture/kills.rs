//! One store, and processes that are killed while they use it or open it.

use crate::audit::audit;
use crate::clock::FastClock;
use crate::oracle::Oracle;
use crate::process::{Orders, Part, follow};
use crate::random::Random;
use crate::watchdog::Watchdog;
use crate::{Args, Durable, Figures, Result};
use indicatif::{ProgressBar, ProgressStyle};
use oncekey::Clock;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How many kills there are to a look at all keys and files; the others are looked into by the next child's callers.
const AUDIT_EVERY: u64 = 4;

pub fn run(args: &Args, dir: &Path, seed: u64, watchdog: &Watchdog, figures: &mut Figures) -> Result<()> {
    let mut random = Random::new(seed);
    let segment_len = (64 * 1024) << random.below(3);
    let clock = FastClock::started_now();
    let mut oracle = Oracle::default();
    let style = ProgressStyle::with_template("{elapsed:>4} {bar:40} {pos}/{len} kills, {msg}")?;
    let bar = ProgressBar::new(args.cycles).with_style(style);
    let mut cycle = 0;
    while cycle < args.cycles || oracle.acks < args.acks {
        cycle += 1;
        let orders = Orders {
            store: dir.join("store"),
            part: Part::Work,
            child_seed: random.draw(),
            number: 2 * cycle,
            segment_len,
            durable: if random.one_in(3) { Durable::Synced } else { Durable::Buffered },
            pwrite: random.one_in(3),
            time: clock.start_ns(),
        };
        // A third while the process starts and recovers, or just after.
        let longest_us = if random.one_in(3) { 20_000 } else { args.longest_ms * 1000 };
        let delay = Duration::from_micros(random.below(longest_us));
        let ended = follow(orders.command(&[])?, &mut oracle, Some(delay), watchdog)?;
        if ended.status.signal() != Some(9) {
            return Err(format!("process {} ended by itself: {}", orders.number, ended.status).into());
        }
        oracle.crash(clock.now_ms());
        figures.kills += 1;
        figures.kills_before_open += u64::from(!ended.has_opened);
        if random.one_in(AUDIT_EVERY) {
            watchdog.mind(None);
            audit(&orders, Arc::new(clock), &mut oracle, orders.first_op() + (1 << 32))?;
            figures.audits += 1;
        }
        figures.acks = oracle.acks;
        bar.set_position(cycle);
        bar.set_message(format!("{} acks", oracle.acks));
    }
    bar.finish_and_clear();
    Ok(())
}
