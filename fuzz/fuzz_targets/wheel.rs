//! The timing wheel against an ordered map.
#![no_main]

use libfuzzer_sys::fuzz_target;
use oncekey::testing::{Step, TimerId, Wheel};
use std::collections::BTreeMap;

fuzz_target!(|input: (u64, Vec<(u8, u64)>)| {
    let (start, steps) = input;
    let mut now = start;
    let mut wheel = Wheel::new(now);
    let mut model: BTreeMap<u32, (TimerId, u64)> = BTreeMap::new();
    for (item, (op, value)) in steps.into_iter().enumerate() {
        let item = item as u32;
        let pick = |model: &BTreeMap<u32, (TimerId, u64)>| {
            let at = value as usize % model.len().max(1);
            model.iter().nth(at).map(|(item, (id, deadline))| (*item, *id, *deadline))
        };
        // Mostly near deadlines, sometimes any.
        let near = if op & 128 == 0 { now.saturating_add(value % 100_000) } else { value };
        match op % 5 {
            0 | 1 => {
                model.insert(item, (wheel.insert(near, item), near));
            }
            2 => {
                if let Some((item, id, deadline)) = pick(&model) {
                    assert_eq!(wheel.remove(id), (item, deadline));
                    model.remove(&item);
                }
            }
            3 => {
                if let Some((item, id, _)) = pick(&model) {
                    wheel.reschedule(id, near);
                    model.insert(item, (id, near));
                }
            }
            _ => {
                now = now.max(near);
                loop {
                    match wheel.step(now) {
                        Step::Fired(due) => {
                            assert!(due.deadline_ms <= now);
                            assert_eq!(model.remove(&due.item), Some((due.id, due.deadline_ms)));
                        }
                        Step::Moved => {}
                        Step::Idle => break,
                    }
                }
                assert!(model.values().all(|(_, deadline)| *deadline > now), "something due was missed");
            }
        }
        wheel.validate();
        assert_eq!(wheel.len(), model.len());
    }
});
