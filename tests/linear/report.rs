//! Histories for people: a line a step, with its span of moments.

use crate::spec::{NEVER, Step};
use std::fmt::Write;

/// Columns for the spans.
const WIDTH: u64 = 48;

pub fn draw(steps: &[Step]) -> String {
    let first = steps.iter().map(|step| step.called).min().unwrap_or(0);
    let ends = steps.iter().flat_map(|step| [step.called, step.returned]);
    let last = ends.filter(|end| *end != NEVER).max().unwrap_or(first);
    let column = |moment: u64| ((moment.min(last) - first) * (WIDTH - 1) / (last - first).max(1)) as usize;
    let base_ms = steps.iter().map(|step| step.now_ms).filter(|now_ms| *now_ms > 0).min().unwrap_or(0);
    let mut drawing = String::new();
    for step in steps {
        let (from, to) = (column(step.called), column(step.returned));
        let mut span = vec![' '; WIDTH as usize];
        span[from..=to].fill('-');
        span[from] = '|';
        span[to] = if step.returned == NEVER { '>' } else { '|' };
        let span: String = span.into_iter().collect();
        let doubt = if step.is_certain { "" } else { " (perhaps)" };
        let now_ms = step.now_ms.saturating_sub(base_ms);
        writeln!(
            drawing,
            "  caller {} life {} [{span}] {now_ms:>3} ms: {:?}{doubt}",
            step.caller, step.life, step.told
        )
        .expect("a string takes everything");
    }
    drawing
}
