//! What we want to reach, and whether we do: ratios within one run, medians over its rounds.

use crate::cell::{Level, PeerName, Reading, Space, Subject, Workload};
use crate::plan::{DURABLE, KIB, MILLION, STORES, subject};
use crate::rounds::Found;
use std::fmt::Write;

#[derive(Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

struct Aim {
    what: String,
    unit: &'static str,
    /// `None` where there is only a stretch.
    bound: Option<Bound>,
    stretch: Option<Bound>,
    /// `None` if this run didn't measure it.
    reached: Option<f64>,
}

impl Bound {
    fn holds(self, value: f64) -> bool {
        match self {
            Bound::AtLeast(bound) => value >= bound,
            Bound::AtMost(bound) => value <= bound,
        }
    }

    fn show(self, unit: &str) -> String {
        match self {
            Bound::AtLeast(bound) => format!(">= {bound}{unit}"),
            Bound::AtMost(bound) => format!("<= {bound}{unit}"),
        }
    }
}

/// The table of aims, in markdown.
pub fn table(found: &Found) -> String {
    let mut text = String::from("| aim | reached | target | | stretch | |\n|---|---|---|---|---|---|\n");
    for Aim { what, unit, bound, stretch, reached } in aims(found) {
        let holds = |bound: Bound| reached.map(|value| bound.holds(value));
        let (target, verdict) = match bound {
            None => (String::new(), ""),
            Some(bound) => match holds(bound) {
                None => (bound.show(unit), "not measured"),
                Some(true) => (bound.show(unit), "met"),
                Some(false) => (bound.show(unit), "MISSED"),
            },
        };
        let (stretch, further) = match stretch {
            None => (String::new(), ""),
            Some(stretch) => (stretch.show(unit), if holds(stretch) == Some(true) { "met" } else { "" }),
        };
        let value = reached.map_or("-".to_owned(), |value| format!("{}{unit}", short(value)));
        writeln!(text, "| {what} | {value} | {target} | {verdict} | {stretch} | {further} |")
            .expect("a string can be written to");
    }
    text
}

fn short(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value if value >= 0.1 => format!("{value:.2}"),
        value => format!("{value:.4}"),
    }
}

const ONCEKEY: PeerName = PeerName::Oncekey;

fn aims(found: &Found) -> Vec<Aim> {
    use Bound::{AtLeast, AtMost};
    let memory = |peer, keys, threads| subject(peer, Level::Memory, keys, threads);
    let kill = |peer, keys, threads| subject(peer, Level::Kill, keys, threads);
    let times = |what: String, bound, stretch: Option<f64>, reached| Aim {
        what,
        unit: "x",
        bound: Some(AtLeast(bound)),
        stretch: stretch.map(AtLeast),
        reached,
    };
    let mut aims = Vec::new();

    for threads in [1, 2] {
        let ours = kill(ONCEKEY, MILLION, threads);
        let rivals = [
            ("dashmap in memory", memory(PeerName::Dashmap, MILLION, threads), 1.0, Some(1.5)),
            ("lmdb", kill(PeerName::Lmdb, MILLION, threads), 10.0, None),
            ("the floor journaled", kill(PeerName::Floor, MILLION, threads), 0.5, Some(0.75)),
        ];
        for (name, rival, bound, stretch) in rivals {
            let what = format!("FRESH `Buffered`, 1e6 keys, threads: {threads}; against {name}");
            aims.push(times(what, bound, stretch, found.ratio(&ours, &rival, Workload::Fresh)));
        }
    }
    let long = |of: Subject| Subject { answer_len: KIB, ..of };
    let ratio =
        found.ratio(&long(kill(ONCEKEY, MILLION, 1)), &long(memory(PeerName::Dashmap, MILLION, 1)), Workload::Fresh);
    aims.push(times("FRESH `Buffered`, 1 KiB answers; against dashmap in memory".into(), 2.0, Some(4.0), ratio));
    for (peer, bound, stretch) in [(PeerName::Dashmap, 1.3, Some(2.0)), (PeerName::Scc, 1.1, None)] {
        let what = format!("FRESH in memory; against {}", peer.name());
        let ratio = found.ratio(&memory(ONCEKEY, MILLION, 1), &memory(peer, MILLION, 1), Workload::Fresh);
        aims.push(times(what, bound, stretch, ratio));
    }
    let ours = kill(ONCEKEY, MILLION, 1);
    for workload in [Workload::Replay, Workload::Mixed] {
        let name = workload.name();
        let ratio = found.ratio(&ours, &memory(PeerName::Scc, MILLION, 1), workload);
        aims.push(times(format!("{name} `Buffered`; against scc in memory"), 1.0, Some(1.25), ratio));
        let ratio = found.ratio_to_best(&ours, &STORES.map(|peer| kill(peer, MILLION, 1)), workload);
        aims.push(times(format!("{name} `Buffered`; against the best persistent peer"), 2.0, None, ratio));
    }

    let dashmap = memory(PeerName::Dashmap, MILLION, 1);
    let scc = memory(PeerName::Scc, MILLION, 1);
    let p999 = |of| found.latency(of, Workload::Fresh, |latency| latency.p999);
    let worst = |of| found.latency(of, Workload::Fresh, |latency| latency.max);
    let divide = |one: Option<f64>, other: Option<f64>| Some(one? / other?);
    let at_most = |what: &str, unit, bound, stretch: Option<f64>, reached| Aim {
        what: what.to_owned(),
        unit,
        bound: Some(AtMost(bound)),
        stretch: stretch.map(AtMost),
        reached,
    };
    let against = |other| divide(p999(&ours), p999(other));
    aims.push(at_most("p99.9 of FRESH `Buffered`; against dashmap's", "x", 1.0, None, against(&dashmap)));
    let us = |ns: Option<f64>| ns.map(|ns| ns / 1e3);
    aims.push(stretch_only("p99.9 of FRESH `Buffered`", " us", 3.0, us(p999(&ours))));
    let ms = |ns: Option<f64>| ns.map(|ns| ns / 1e6);
    aims.push(stretch_only("worst FRESH `Buffered`", " ms", 1.0, ms(worst(&ours))));

    for (threads, bound, stretch) in [(1, 0.95, 1.1), (8, 1.2, 1.5), (64, 1.8, 2.5)] {
        let of = |keys| {
            let at = |peer| subject(peer, Level::Power, keys, threads);
            found.ratio_to_best(&at(ONCEKEY), &DURABLE.map(at), Workload::Fresh)
        };
        let what = format!("FRESH `Synced`, threads: {threads}; against the best peer");
        aims.push(times(what, bound, Some(stretch), of(MILLION).or_else(|| of(100_000))));
    }
    for (level, name) in [(Level::Memory, "in memory"), (Level::Kill, "`Buffered`")] {
        let ours = subject(ONCEKEY, level, MILLION, 2);
        let ratio = found.ratio(&ours, &memory(PeerName::Scc, MILLION, 2), Workload::Herd);
        aims.push(times(format!("HERD {name}; against scc"), 1.0, None, ratio));
    }
    for workload in [Workload::Fresh, Workload::Replay] {
        let (ours, name) = (kill(ONCEKEY, 10 * MILLION, 1), workload.name());
        let ratio = found.ratio(&ours, &memory(PeerName::Dashmap, 10 * MILLION, 1), workload);
        aims.push(times(format!("{name} `Buffered`, 1e7 keys; against dashmap in memory"), 1.2, None, ratio));
        let own = divide(found.rate(&ours, workload), found.rate(&kill(ONCEKEY, MILLION, 1), workload));
        let what = format!("{name} `Buffered`, 1e7 keys; against itself at 1e6");
        aims.push(Aim { what, unit: "x", bound: None, stretch: Some(AtLeast(0.75)), reached: own });
    }

    let space = |of: fn(&Space) -> Option<f64>| {
        found.value(&ours, Workload::Fresh, |reading| reading.space.as_ref().and_then(of))
    };
    aims.push(at_most("anonymous memory a key", " B", 48.0, Some(32.0), space(|space| space.anonymous)));
    aims.push(at_most("disk a pair of records", " B", 320.0, Some(256.0), space(|space| space.pair)));
    let sent = space(|space| space.dirtied_per_journal_byte);
    aims.push(at_most("bytes to the device (at most, as dirtied) per journal byte", "", 1.2, Some(1.05), sent));
    for (keys, name, bound, stretch) in [(MILLION, "1e6", 0.3, 0.02), (10 * MILLION, "1e7", 3.0, 0.1)] {
        let seconds = |reading: &Reading| reading.reopening.as_ref().map(|reopening| reopening.seconds);
        let reached = found.value(&kill(ONCEKEY, keys, 1), Workload::Reopen, seconds);
        aims.push(at_most(&format!("reopening after `kill -9`, {name} keys"), " s", bound, Some(stretch), reached));
    }
    let expiry = |of: fn(&crate::cell::Expiry) -> f64| {
        found.value(&ours, Workload::Expire, |reading| reading.expiry.as_ref().map(of))
    };
    aims.push(at_most("reclaiming 1e6 expired keys, each", " ns", 150.0, Some(50.0), expiry(|it| it.ns_a_key)));
    let meanwhile = expiry(|expiry| expiry.rate_during / expiry.rate_before);
    aims.push(times("FRESH meanwhile; against before".into(), 0.7, Some(0.9), meanwhile));
    let tail = expiry(|expiry| expiry.during.p999 as f64 / expiry.before.p999 as f64);
    aims.push(at_most("p99.9 of FRESH meanwhile; against before", "x", 2.0, None, tail));
    aims.push(at_most("worst FRESH meanwhile", " ms", 2.0, None, ms(expiry(|it| it.during.max as f64))));
    for (name, other, bound) in [("scc", &scc, 0.25), ("dashmap", &dashmap, 0.1)] {
        let what = format!("worst operation while tables grow; against {name}'s");
        aims.push(at_most(&what, "x", bound, None, divide(worst(&ours), worst(other))));
    }
    aims.push(stretch_only("worst operation while tables grow", " ms", 0.3, ms(worst(&ours))));
    aims
}

fn stretch_only(what: &str, unit: &'static str, stretch: f64, reached: Option<f64>) -> Aim {
    Aim { what: what.to_owned(), unit, bound: None, stretch: Some(Bound::AtMost(stretch)), reached }
}
