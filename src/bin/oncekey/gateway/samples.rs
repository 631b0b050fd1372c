//! One sample a second of everything that the dashboard shows, and the last five minutes of them.

use super::latency::Counts;
use super::metrics::{Sources, Totals};
use super::spikes::{Spike, Spikes};
use parking_lot::Mutex;
use std::collections::VecDeque;
use tokio::sync::broadcast;

/// Samples that are kept.
const KEPT: usize = 300;
/// Samples that a slow reader may be behind before it loses some.
const BEHIND: usize = 16;

/// One second.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Sample {
    at_ms: u64,
    #[serde(flatten)]
    counts: Totals,
    running: usize,
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
    keys: u64,
    journal_bytes: u64,
    disk_free_bytes: Option<u64>,
    segments: u64,
    syncs: u64,
    is_poisoned: bool,
    is_ready: bool,
    totals: TotalsAndSpikes,
    pub spike: Option<Spike>,
}

#[derive(Clone, Copy, Debug, serde::Serialize)]
struct TotalsAndSpikes {
    #[serde(flatten)]
    totals: Totals,
    spikes: u64,
}

/// Makes each second's sample from what was counted since the last.
#[derive(Default)]
pub struct Sampler {
    totals: Totals,
    latencies: Counts,
    spikes: Spikes,
    spikes_begun: u64,
}

/// What is counted and measured at one time.
pub struct Measured {
    pub totals: Totals,
    pub latencies: Counts,
    pub running: usize,
    pub stats: oncekey::Stats,
    pub disk_free_bytes: Option<u64>,
    pub is_ready: bool,
}

impl Measured {
    pub fn now(sources: &Sources, is_ready: bool) -> Self {
        Measured {
            totals: sources.meter.totals(),
            latencies: sources.meter.latencies(),
            running: sources.layer.running(),
            stats: sources.store.stats(),
            disk_free_bytes: sources.disk_free_bytes(),
            is_ready,
        }
    }
}

impl Sampler {
    /// The sample of the second that ends at this time.
    pub fn second(&mut self, at_ms: u64, measured: Measured) -> Sample {
        let Measured { totals, latencies, running, stats, disk_free_bytes, is_ready } = measured;
        let counts = totals.since(&self.totals);
        let recent = latencies.since(&self.latencies);
        let spike = self.spikes.second(counts.replayed + counts.attached + counts.in_flight_refused);
        self.spikes_begun += u64::from(spike.is_some());
        self.totals = totals;
        self.latencies = latencies;
        Sample {
            at_ms,
            counts,
            running,
            p50_ms: recent.quantile_ms(0.5),
            p99_ms: recent.quantile_ms(0.99),
            keys: stats.keys,
            journal_bytes: stats.journal_bytes,
            disk_free_bytes,
            segments: stats.segments,
            syncs: stats.syncs,
            is_poisoned: stats.is_poisoned,
            is_ready,
            totals: TotalsAndSpikes { totals, spikes: self.spikes_begun },
            spike,
        }
    }
}

impl Totals {
    fn since(&self, earlier: &Totals) -> Totals {
        // Counters are read one after the other, while they go on: a sum of some of them could seem to have shrunk.
        let since = |now: u64, then: u64| now.saturating_sub(then);
        Totals {
            requests: since(self.requests, earlier.requests),
            ran: since(self.ran, earlier.ran),
            replayed: since(self.replayed, earlier.replayed),
            attached: since(self.attached, earlier.attached),
            in_flight_refused: since(self.in_flight_refused, earlier.in_flight_refused),
            mismatched: since(self.mismatched, earlier.mismatched),
            interrupted: since(self.interrupted, earlier.interrupted),
            invalid: since(self.invalid, earlier.invalid),
            passed: since(self.passed, earlier.passed),
            unavailable: since(self.unavailable, earlier.unavailable),
        }
    }
}

/// The last samples as JSON, and those to come.
pub struct Samples {
    kept: Mutex<VecDeque<String>>,
    live: broadcast::Sender<String>,
}

impl Samples {
    pub fn new() -> Self {
        Samples { kept: Mutex::default(), live: broadcast::Sender::new(BEHIND) }
    }

    pub fn push(&self, sample: &Sample) -> serde_json::Result<()> {
        let json = serde_json::to_string(sample)?;
        let mut kept = self.kept.lock();
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(json.clone());
        // An error says that nobody listens.
        self.live.send(json).ok();
        Ok(())
    }

    /// A JSON array of the last samples, and all that come after them.
    pub fn follow(&self) -> (String, broadcast::Receiver<String>) {
        let kept = self.kept.lock();
        // Under the lock, so that no sample is in neither.
        let live = self.live.subscribe();
        let history = kept.iter().map(String::as_str).collect::<Vec<_>>().join(",");
        (format!("[{history}]"), live)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(replayed: u64) -> Measured {
        Measured {
            totals: Totals { requests: replayed, replayed, ..Totals::default() },
            latencies: Counts::default(),
            running: 0,
            stats: oncekey::Stats::default(),
            disk_free_bytes: None,
            is_ready: true,
        }
    }

    #[test]
    fn a_sample_counts_its_own_second_and_the_whole() {
        let mut sampler = Sampler::default();
        sampler.second(1000, measured(5));
        let json = serde_json::to_value(sampler.second(2000, measured(12))).unwrap();
        assert_eq!(json["replayed"], 7);
        assert_eq!(json["totals"]["replayed"], 12);
        assert_eq!(json["p50_ms"], serde_json::Value::Null);
        assert_eq!(json["spike"], serde_json::Value::Null);

        let json = serde_json::to_value(sampler.second(3000, measured(1000))).unwrap();
        assert_eq!(json["totals"]["spikes"], 1);
        assert!(json["spike"]["hits_per_s"].as_f64().unwrap() > 90.0);
    }

    #[test]
    fn the_past_is_five_minutes_and_joins_what_comes() {
        let samples = Samples::new();
        let mut sampler = Sampler::default();
        for second in 0..400 {
            samples.push(&sampler.second(second, measured(0))).unwrap();
        }
        let (history, mut live) = samples.follow();
        let history: Vec<serde_json::Value> = serde_json::from_str(&history).unwrap();
        assert_eq!(history.len(), KEPT);
        assert_eq!(history[0]["at_ms"], 100);
        samples.push(&sampler.second(400, measured(0))).unwrap();
        assert!(live.try_recv().unwrap().contains("\"at_ms\":400"));
    }
}
