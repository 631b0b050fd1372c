//! When duplicates come far more often than usual: a client that retries in a loop, a queue that is replayed.
//!
//! Hits are requests that were recognised as duplicates. The recent rate is the mean of the last ten seconds; the usual
//! rate is the mean of the seconds before those, in which a second's weight fades by 1/600 for each that follows (ten
//! minutes, about). A spike begins when the recent rate is above ten a second and above four times the usual one; it ends
//! when the recent rate is below half of that. A rate that stays becomes the usual one.

use std::collections::VecDeque;

const RECENT_S: usize = 10;
const FADING_S: f64 = 600.0;
const LEAST_PER_S: f64 = 10.0;
const TIMES_USUAL: f64 = 4.0;

/// Hits far above what is usual.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Spike {
    pub hits_per_s: f64,
    pub usual_per_s: f64,
}

/// Follows the hits of each second.
#[derive(Debug, Default)]
pub struct Spikes {
    recent: VecDeque<u64>,
    usual: f64,
    /// Seconds that the usual rate is the mean of: a young mean isn't drawn to the zero that it began with.
    seconds: f64,
    is_on: bool,
}

impl Spikes {
    /// Takes the hits of one more second; a spike if one begins in it.
    pub fn second(&mut self, hits: u64) -> Option<Spike> {
        self.recent.push_back(hits);
        if self.recent.len() > RECENT_S {
            let past = self.recent.pop_front().unwrap_or(0);
            self.seconds = (self.seconds + 1.0).min(FADING_S);
            self.usual += (past as f64 - self.usual) / self.seconds;
        }
        let hits_per_s = self.recent.iter().sum::<u64>() as f64 / RECENT_S as f64;
        let threshold = LEAST_PER_S.max(TIMES_USUAL * self.usual);
        let begins = !self.is_on && hits_per_s > threshold;
        self.is_on = if self.is_on { hits_per_s >= threshold / 2.0 } else { begins };
        begins.then_some(Spike { hits_per_s, usual_per_s: self.usual })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begun(spikes: &mut Spikes, seconds: usize, hits: u64) -> Vec<usize> {
        (0..seconds).filter(|_| spikes.second(hits).is_some()).collect()
    }

    #[test]
    fn a_burst_begins_one_spike_and_quiet_ends_it() {
        let mut spikes = Spikes::default();
        assert!(begun(&mut spikes, 600, 2).is_empty());
        let spike = spikes.second(1000).unwrap();
        assert!((spike.usual_per_s - 2.0).abs() < 0.01 && spike.hits_per_s > 100.0, "{spike:?}");
        assert!(begun(&mut spikes, 30, 1000).is_empty());
        assert!(begun(&mut spikes, 600, 2).is_empty());
        assert!(spikes.second(1000).is_some());
    }

    #[test]
    fn a_busy_service_is_not_in_a_spike() {
        let mut spikes = Spikes::default();
        // After a start nothing is usual yet.
        assert_eq!(begun(&mut spikes, 700, 50).len(), 1);
        assert!(begun(&mut spikes, 100, 150).is_empty());
        assert_eq!(begun(&mut spikes, 30, 1000).len(), 1);
    }

    #[test]
    fn few_hits_are_no_spike_however_rare_they_were() {
        let mut spikes = Spikes::default();
        assert!(begun(&mut spikes, 600, 0).is_empty());
        assert!(begun(&mut spikes, 60, 10).is_empty());
    }

    #[test]
    fn a_rate_about_the_threshold_does_not_flicker() {
        let mut spikes = Spikes::default();
        let begun =
            (0..600).filter(|second| spikes.second(if second / 10 % 2 == 0 { 14 } else { 8 }).is_some()).count();
        assert_eq!(begun, 1);
    }
}
