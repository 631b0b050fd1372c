//! Questions to what was measured: medians over rounds, and of ratios within a round.

use crate::cell::{Latency, Reading, Subject, Workload};
use crate::rounds::Found;
use std::collections::BTreeMap;

/// The middle of some values, the lower of two; `None` of none.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied()
}

impl Found {
    pub fn of(&self, subject: &Subject, workload: Workload) -> impl Iterator<Item = &Reading> {
        self.readings.iter().filter(move |reading| reading.subject == *subject && reading.workload == workload)
    }

    /// Median over rounds.
    pub fn value(&self, subject: &Subject, workload: Workload, value: impl Fn(&Reading) -> Option<f64>) -> Option<f64> {
        median(self.of(subject, workload).filter_map(value))
    }

    pub fn rate(&self, subject: &Subject, workload: Workload) -> Option<f64> {
        self.value(subject, workload, |reading| reading.rate)
    }

    pub fn latency(&self, subject: &Subject, workload: Workload, of: impl Fn(&Latency) -> u64) -> Option<f64> {
        self.value(subject, workload, |reading| reading.latency.as_ref().map(|latency| of(latency) as f64))
    }

    fn rates(&self, subject: &Subject, workload: Workload) -> BTreeMap<usize, f64> {
        self.of(subject, workload).filter_map(|reading| Some((reading.round, reading.rate?))).collect()
    }

    /// How many times as fast the one is as the other: median of the ratios within a round.
    pub fn ratio(&self, one: &Subject, other: &Subject, workload: Workload) -> Option<f64> {
        self.ratio_to_best(one, std::slice::from_ref(other), workload)
    }

    /// As [`ratio`](Found::ratio), to the fastest of several, in rounds that measured all of them that were ever
    /// measured.
    pub fn ratio_to_best(&self, one: &Subject, others: &[Subject], workload: Workload) -> Option<f64> {
        let others: Vec<_> =
            others.iter().map(|other| self.rates(other, workload)).filter(|rates| !rates.is_empty()).collect();
        if others.is_empty() {
            return None;
        }
        median(self.rates(one, workload).into_iter().filter_map(|(round, rate)| {
            let rivals: Option<Vec<f64>> = others.iter().map(|rates| rates.get(&round).copied()).collect();
            Some(rate / rivals?.into_iter().fold(0.0, f64::max))
        }))
    }
}
