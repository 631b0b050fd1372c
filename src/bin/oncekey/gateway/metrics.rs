//! What is counted, and its exposition for Prometheus.
//!
//! Counting is an atomic addition to a place that is known beforehand; everything else happens when somebody asks.

use super::latency::{Counts, Latency};
use oncekey::Store;
use oncekey::http::{Event, EventKind, IdempotencyLayer};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Counters of the whole gateway.
#[derive(Default)]
pub struct Meter {
    kinds: [Kind; KINDS.len()],
    failures: [AtomicU64; Failure::ALL.len()],
    refused: [AtomicU64; Refused::ALL.len()],
    resolved: [AtomicU64; Resolution::ALL.len()],
    connections: AtomicUsize,
    spikes: AtomicU64,
}

#[derive(Default)]
struct Kind {
    count: AtomicU64,
    latency: Latency,
}

/// Every kind of event that is known here, with its name; the most frequent ones first.
const KINDS: [(EventKind, &str); 16] = [
    (EventKind::Passed, "passed"),
    (EventKind::Replayed, "replayed"),
    (EventKind::Started, "started"),
    (EventKind::Stored, "stored"),
    (EventKind::StoredWithoutBody, "stored_without_body"),
    (EventKind::Released, "released"),
    (EventKind::Unknown, "unknown"),
    (EventKind::NotStored, "not_stored"),
    (EventKind::TakenOver, "taken_over"),
    (EventKind::Attached, "attached"),
    (EventKind::InFlight, "in_flight"),
    (EventKind::Mismatched, "mismatched"),
    (EventKind::OutcomeUnknown, "outcome_unknown"),
    (EventKind::Invalid, "invalid"),
    (EventKind::Unavailable, "unavailable"),
    (EventKind::PassedUnprotected, "passed_unprotected"),
];

/// The name of a kind of event.
pub fn name(kind: EventKind) -> &'static str {
    KINDS.iter().find(|(known, _)| *known == kind).map_or("other", |(_, name)| name)
}

/// Whether an event of this kind is the beginning of an operation, and so no answer yet.
fn is_begin(kind: EventKind) -> bool {
    matches!(kind, EventKind::Started | EventKind::TakenOver)
}

/// Why the upstream gave no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    Unreachable,
    Lost,
    Timeout,
}

impl Failure {
    const ALL: [Failure; 3] = [Failure::Unreachable, Failure::Lost, Failure::Timeout];

    pub fn name(self) -> &'static str {
        match self {
            Failure::Unreachable => "unreachable",
            Failure::Lost => "lost",
            Failure::Timeout => "timeout",
        }
    }
}

/// Why the gateway refused a request before its key was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    Framing,
    Head,
    Method,
}

impl Refused {
    const ALL: [Refused; 3] = [Refused::Framing, Refused::Head, Refused::Method];

    pub fn name(self) -> &'static str {
        match self {
            Refused::Framing => "framing",
            Refused::Head => "head",
            Refused::Method => "method",
        }
    }
}

/// What came of an operator's word on a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    Released,
    Erased,
    Refused,
    Failed,
}

impl Resolution {
    const ALL: [Resolution; 4] = [Resolution::Released, Resolution::Erased, Resolution::Refused, Resolution::Failed];

    pub fn name(self) -> &'static str {
        match self {
            Resolution::Released => "released",
            Resolution::Erased => "erased",
            Resolution::Refused => "refused",
            Resolution::Failed => "failed",
        }
    }
}

/// Requests since the start, by what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Totals {
    pub requests: u64,
    pub ran: u64,
    pub replayed: u64,
    pub attached: u64,
    pub in_flight_refused: u64,
    pub mismatched: u64,
    /// Operations that were left interrupted, and requests refused for that.
    pub interrupted: u64,
    pub invalid: u64,
    pub passed: u64,
    pub unavailable: u64,
}

// All orderings are relaxed: a counter tells of nothing but itself.
impl Meter {
    pub fn happened(&self, event: &Event<'_>) {
        let Some(slot) = KINDS.iter().position(|(kind, _)| *kind == event.kind) else { return };
        self.kinds[slot].count.fetch_add(1, Ordering::Relaxed);
        if !is_begin(event.kind) {
            self.kinds[slot].latency.add(event.elapsed);
        }
    }

    pub fn failed(&self, failure: Failure) {
        self.failures[failure as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub fn refused(&self, why: Refused) {
        self.refused[why as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub fn resolved(&self, resolution: Resolution) {
        self.resolved[resolution as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub fn spike(&self) {
        self.spikes.fetch_add(1, Ordering::Relaxed);
    }

    pub fn spikes(&self) -> u64 {
        self.spikes.load(Ordering::Relaxed)
    }

    /// Counts a connection until what is returned is dropped.
    pub fn connection(self: &Arc<Self>) -> Connection {
        self.connections.fetch_add(1, Ordering::Relaxed);
        Connection(Arc::clone(self))
    }

    pub fn totals(&self) -> Totals {
        let of = |kind| self.count(kind);
        let refused: u64 = self.refused.iter().map(|count| count.load(Ordering::Relaxed)).sum();
        let mut totals = Totals {
            requests: 0,
            ran: of(EventKind::Started) + of(EventKind::TakenOver),
            replayed: of(EventKind::Replayed),
            attached: of(EventKind::Attached),
            in_flight_refused: of(EventKind::InFlight),
            mismatched: of(EventKind::Mismatched),
            interrupted: of(EventKind::OutcomeUnknown),
            invalid: of(EventKind::Invalid) + refused,
            passed: of(EventKind::Passed) + of(EventKind::PassedUnprotected),
            unavailable: of(EventKind::Unavailable),
        };
        totals.requests = totals.ran
            + totals.replayed
            + totals.attached
            + totals.in_flight_refused
            + totals.mismatched
            + totals.interrupted
            + totals.invalid
            + totals.passed
            + totals.unavailable;
        // These are of requests that are counted as run.
        totals.interrupted += of(EventKind::Unknown) + of(EventKind::NotStored);
        totals
    }

    /// Times of all answers.
    pub fn latencies(&self) -> Counts {
        self.kinds.iter().fold(Counts::default(), |sum, kind| sum.and(&kind.latency.counts()))
    }

    fn count(&self, kind: EventKind) -> u64 {
        KINDS
            .iter()
            .zip(&self.kinds)
            .filter(|((of, _), _)| *of == kind)
            .map(|(_, kind)| kind.count.load(Ordering::Relaxed))
            .sum()
    }
}

/// An open connection of a client.
pub struct Connection(Arc<Meter>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where the numbers come from when somebody asks.
#[derive(Clone)]
pub struct Sources {
    pub meter: Arc<Meter>,
    pub layer: IdempotencyLayer,
    pub store: Store,
    pub data: PathBuf,
}

impl Sources {
    /// Bytes that the file system of the data directory has left for this process.
    pub fn disk_free_bytes(&self) -> Option<u64> {
        let free = rustix::fs::statvfs(&self.data).ok()?;
        Some(free.f_bavail * free.f_frsize)
    }

    /// A registry with all metrics.
    pub fn registry(&self) -> Registry {
        let mut registry = Registry::with_prefix("oncekey_http");
        registry.register_collector(Box::new(self.clone()));
        registry
    }
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources").field("data", &self.data).finish_non_exhaustive()
    }
}

impl Collector for Sources {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let meter = &self.meter;

        let kinds = KINDS.iter().zip(&meter.kinds).map(|((_, name), kind)| (*name, load(&kind.count)));
        counters(&mut to, "events", "What became of requests and operations", "kind", kinds)?;
        let failures = Failure::ALL.iter().zip(&meter.failures).map(|(failure, count)| (failure.name(), load(count)));
        counters(&mut to, "upstream_failures", "Requests that the upstream gave no answer to", "cause", failures)?;
        let refused = Refused::ALL.iter().zip(&meter.refused).map(|(why, count)| (why.name(), load(count)));
        counters(&mut to, "refused", "Requests refused before their key was looked at", "reason", refused)?;
        let resolved = Resolution::ALL.iter().zip(&meter.resolved).map(|(what, count)| (what.name(), load(count)));
        counters(&mut to, "resolved", "Keys that an operator wanted to release or erase", "outcome", resolved)?;
        counter(&mut to, "requests", "Requests that arrived", None, meter.totals().requests)?;
        counter(&mut to, "spikes", "Times that duplicates came far more often than usual", None, meter.spikes())?;
        let unprotected = meter.count(EventKind::PassedUnprotected);
        counter(&mut to, "passed_unprotected", "Requests with a key that passed without the store", None, unprotected)?;

        {
            let help = "Time from a request to its answer, or to the end of the operation that it ran";
            let mut family =
                to.encode_descriptor("answer_duration", help, Some(&Unit::Seconds), MetricType::Histogram)?;
            for ((_, name), of) in KINDS.iter().zip(&meter.kinds).filter(|((kind, _), _)| !is_begin(*kind)) {
                let counts = of.latency.counts();
                family.encode_family(&[("outcome", *name)])?.encode_histogram::<NoLabelSet>(
                    counts.sum_s(),
                    counts.total(),
                    &counts.octaves(),
                    None,
                )?;
            }
        }

        gauge(&mut to, "running", "Operations that run now", None, self.layer.running() as u64)?;
        let buffered = self.layer.buffered() as u64;
        gauge(&mut to, "buffered", "Memory that bodies of requests with keys take", Some(Unit::Bytes), buffered)?;
        let connections = meter.connections.load(Ordering::Relaxed) as u64;
        gauge(&mut to, "connections", "Open connections of clients", None, connections)?;

        let stats = self.store.stats();
        gauge(&mut to, "store_keys", "Keys that the store holds", None, stats.keys)?;
        gauge(&mut to, "store_journal", "Size of the journal on the device", Some(Unit::Bytes), stats.journal_bytes)?;
        gauge(&mut to, "store_segments", "Segments of the journal", None, stats.segments)?;
        gauge(
            &mut to,
            "store_poisoned",
            "1 if a write failed, so that the store only reads",
            None,
            stats.is_poisoned.into(),
        )?;
        gauge(&mut to, "store_damaged_segments", "Segments found damaged", None, stats.damaged_segments)?;
        counter(&mut to, "store_syncs", "Calls that waited for the device", None, stats.syncs)?;
        counter(&mut to, "store_expired", "Answers whose retention ended", None, stats.expired)?;
        counter(
            &mut to,
            "store_interrupted",
            "Keys whose owner vanished or ran out of its lease",
            None,
            stats.interrupted,
        )?;
        counter(&mut to, "store_upkeep_failures", "Steps of upkeep that failed", None, stats.upkeep_failures)?;
        if let Some(free) = self.disk_free_bytes() {
            gauge(&mut to, "disk_free", "Room on the data directory's device", Some(Unit::Bytes), free)?;
        }
        Ok(())
    }
}

fn counter(to: &mut DescriptorEncoder<'_>, name: &str, help: &str, unit: Option<Unit>, value: u64) -> fmt::Result {
    ConstCounter::new(value).encode(to.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?)
}

fn gauge(to: &mut DescriptorEncoder<'_>, name: &str, help: &str, unit: Option<Unit>, value: u64) -> fmt::Result {
    ConstGauge::new(value).encode(to.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?)
}

fn counters(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    label: &str,
    values: impl Iterator<Item = (&'static str, u64)>,
) -> fmt::Result {
    let mut family = to.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (value, count) in values {
        ConstCounter::new(count).encode(family.encode_family(&[(label, value)])?)?;
    }
    Ok(())
}
