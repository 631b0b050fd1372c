//! Random numbers that a seed repeats.

#[derive(Clone)]
pub struct Random(fastrand::Rng);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(fastrand::Rng::with_seed(seed))
    }

    pub fn draw(&mut self) -> u64 {
        self.0.u64(..)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0.u64(..end)
    }

    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// A number from `2^low` on and below `2^high`, each power of two as likely as the others.
    pub fn of_any_size(&mut self, low: u32, high: u32) -> u64 {
        let power = 1 << (u64::from(low) + self.below(u64::from(high - low)));
        power + self.below(power)
    }
}
