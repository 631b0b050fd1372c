//! Inner parts, for tests, benches and fuzzing only.

pub use crate::journal::media::{DiskOp, SimDisk};
pub use crate::wheel::{Due, Step, TimerId, Wheel};
