//! FRESH and REPLAY of all peers at a million keys, as bars on a logarithmic scale.

use crate::cell::{Level, Subject, Workload};
use crate::peer::Result;
use crate::plan::MILLION;
use crate::report::rate;
use crate::rounds::Found;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::path::Path;

const SLOWEST: f64 = 1e3;
const FASTEST: f64 = 1e7;
const ROW: i32 = 46;
const BAR: i32 = 18;
const LEFT: i32 = 190;
const WIDTH: i32 = 960;
const TOP: i32 = 64;
const FRESH: RGBColor = RGBColor(0x1f, 0x6f, 0xb4);
const REPLAY: RGBColor = RGBColor(0xf2, 0x8e, 0x2b);
const GRID: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);
const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);

struct Row {
    subject: Subject,
    fresh: Option<f64>,
    replay: Option<f64>,
}

pub fn draw(found: &Found, path: &Path) -> Result<()> {
    let mut rows: Vec<Row> = Vec::new();
    for reading in found.readings.iter().filter(|reading| reading.workload == Workload::Fresh) {
        let subject = reading.subject;
        let is_shown = subject == crate::plan::subject(subject.peer, subject.level, MILLION, 1);
        if is_shown && subject.level != Level::Power && rows.iter().all(|row| row.subject != subject) {
            let of = |workload| found.rate(&subject, workload);
            rows.push(Row { subject, fresh: of(Workload::Fresh), replay: of(Workload::Replay) });
        }
    }
    rows.sort_by(|one, other| {
        (one.subject.level.cmp(&other.subject.level))
            .then(other.fresh.unwrap_or(0.0).total_cmp(&one.fresh.unwrap_or(0.0)))
    });
    let height = TOP + ROW * rows.len() as i32 + 40;
    let area = SVGBackend::new(path, (WIDTH as u32, height as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    let font = |size| ("sans-serif", size).into_font().color(&INK);
    let title = "Operations a second, 1,000,000 keys, 1 thread: FRESH (reserve and complete), REPLAY";
    area.draw(&Text::new(title, (12, 14), font(20)))?;
    for (i, (name, color)) in [("FRESH", FRESH), ("REPLAY", REPLAY)].into_iter().enumerate() {
        let x = LEFT + 110 * i as i32;
        area.draw(&Rectangle::new([(x, 40), (x + 12, 52)], color.filled()))?;
        area.draw(&Text::new(name, (x + 18, 39), font(17)))?;
    }

    let x_of = |value: f64| {
        let share = (value.clamp(SLOWEST, FASTEST) / SLOWEST).log10() / (FASTEST / SLOWEST).log10();
        LEFT + (share * f64::from(WIDTH - LEFT - 90)) as i32
    };
    let bottom = height - 36;
    for power in SLOWEST.log10() as i32..=FASTEST.log10() as i32 {
        let value = 10_f64.powi(power);
        let x = x_of(value);
        area.draw(&PathElement::new([(x, TOP), (x, bottom)], GRID))?;
        let label = font(16).pos(Pos::new(HPos::Center, VPos::Top));
        area.draw(&Text::new(rate(value).replace(".00", "").replace(".0", ""), (x, bottom + 6), label))?;
    }
    for (i, row) in rows.iter().enumerate() {
        let y = TOP + ROW * i as i32 + 4;
        let name = format!("{}, {}", row.subject.peer.name(), row.subject.level.name());
        let right = Pos::new(HPos::Right, VPos::Center);
        area.draw(&Text::new(name, (LEFT - 8, y + BAR), font(16).pos(right)))?;
        for (offset, value, color) in [(0, row.fresh, FRESH), (BAR, row.replay, REPLAY)] {
            let Some(value) = value else { continue };
            let (y, end) = (y + offset, x_of(value));
            area.draw(&Rectangle::new([(LEFT, y), (end, y + BAR - 2)], color.filled()))?;
            area.draw(&Text::new(rate(value), (end + 5, y + 2), font(15)))?;
        }
    }
    area.present()?;
    Ok(())
}
