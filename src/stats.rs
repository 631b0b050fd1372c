//! What the store counts.

use crate::shard::Counts;

/// Counts since the store was opened, and sizes as of now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Keys held, in any state.
    pub keys: u64,
    /// Requests that reserved a vacant key.
    pub reserved: u64,
    /// Requests that took an interrupted key over.
    pub taken_over: u64,
    /// Requests answered with a stored answer: the idempotent hits.
    pub replayed: u64,
    /// Requests that met a running owner.
    pub in_flight: u64,
    /// Requests with another payload than the key's.
    pub mismatched: u64,
    /// Answers stored.
    pub completed: u64,
    /// Definitive failures stored.
    pub failed: u64,
    /// Reservations given back.
    pub released: u64,
    /// Reservations whose owner vanished or whose lease ran out.
    pub interrupted: u64,
    /// Answers whose retention ended.
    pub expired: u64,
    /// Keys erased.
    pub erased: u64,
    /// Writes refused because their owner had lost its key.
    pub fenced: u64,
    /// Calls that waited for a sync.
    pub syncs: u64,
    /// Segments of the journal, spares included.
    pub segments: u64,
    /// Bytes that they take up on the device (in memory: that are mapped).
    pub journal_bytes: u64,
    /// Segments that an index stood for when the store was opened, and that are still to be checked.
    pub unchecked_segments: u64,
    /// Segments that were found damaged since the store was opened: what is damaged in them is answered with an error.
    pub damaged_segments: u64,
    /// Steps of background upkeep that failed, such as for a full disk.
    pub upkeep_failures: u64,
    /// Whether `max_bytes`, or the disk when a segment was last to be made, leaves too little room for the answers of more operations, so that none
    /// is begun. What has been begun goes on.
    pub is_full: bool,
    /// Whether a write or sync failed, so that the store only reads.
    pub is_poisoned: bool,
}

impl Counts {
    pub(crate) fn add(&mut self, other: &Counts) {
        self.reserved += other.reserved;
        self.taken_over += other.taken_over;
        self.replayed += other.replayed;
        self.in_flight += other.in_flight;
        self.mismatched += other.mismatched;
        self.completed += other.completed;
        self.failed += other.failed;
        self.released += other.released;
        self.interrupted += other.interrupted;
        self.expired += other.expired;
        self.erased += other.erased;
        self.fenced += other.fenced;
    }
}
