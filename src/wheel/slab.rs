//! The nodes of a timing wheel, in fixed-size chunks that never move.
//!
//! A node is 20 bytes and is named by its index, so lists are linked by `u32` and nothing here is a pointer. An
//! index is the chunk's number times [`CHUNK_NODES`] plus the place in the chunk. The first chunk is shorter than
//! that, so that a nearly empty wheel is small; the indices it lacks are never handed out.
//!
//! # Invariants
//!
//! - `S1` A node is either held by a caller or free; a free node has `prev == FREED`, and no live node does.
//! - `S2` The free nodes below `fresh` are exactly the nodes on the free list, each once, linked by `next`.
//! - `S3` Nodes at and above `fresh` have not been handed out since the slab was last empty. An empty slab has
//!   `fresh == 0` and no free list, so any chunk but the first can be dropped without a look at what it holds.
//!
//! Growing allocates one chunk and copies no node (the directory of chunks, 16 bytes for each 5 KiB, does move).
//! Free nodes are reused last in, first out. Memory goes back only when the slab is empty, one chunk for each
//! [`Slab::trim`]: chunks never empty by themselves while timers live in all of them.

/// Names a timer in its wheel from insertion until it fires or is removed.
///
/// Four bytes, so that it fits in the entry that it times; [`TimerId::NONE`] stands for no timer. An id is used
/// again after its timer is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TimerId(u32);

impl TimerId {
    /// No timer.
    pub const NONE: TimerId = TimerId(u32::MAX);

    /// The id as a number, for packing into an entry.
    #[inline]
    pub const fn raw(self) -> u32 {
        self.0
    }

    /// The id that [`raw`](TimerId::raw) gave.
    #[inline]
    pub const fn from_raw(raw: u32) -> TimerId {
        TimerId(raw)
    }
}

/// One timer: when it is due, the list that it is on, and what it times.
#[derive(Clone, Copy)]
pub(super) struct Node {
    // Two halves, because a u64 would pad the node to 24 bytes.
    deadline_ms: [u32; 2],
    pub(super) next: TimerId,
    pub(super) prev: TimerId,
    pub(super) item: u32,
}

const _: () = assert!(size_of::<Node>() == 20);

impl Node {
    const UNUSED: Node = Node { deadline_ms: [0; 2], next: TimerId::NONE, prev: FREED, item: 0 };

    #[inline]
    pub(super) fn deadline_ms(&self) -> u64 {
        u64::from(self.deadline_ms[0]) | u64::from(self.deadline_ms[1]) << 32
    }

    #[inline]
    pub(super) fn set_deadline_ms(&mut self, deadline_ms: u64) {
        self.deadline_ms = [deadline_ms as u32, (deadline_ms >> 32) as u32];
    }
}

pub(super) struct Slab {
    chunks: Vec<Box<[Node]>>,
    free: TimerId,
    fresh: u32,
    len: u32,
}

impl Slab {
    pub(super) const fn new() -> Slab {
        Slab { chunks: Vec::new(), free: TimerId::NONE, fresh: 0, len: 0 }
    }

    #[inline]
    pub(super) fn len(&self) -> usize {
        self.len as usize
    }

    /// Hands out a node whose fields, but for `item`, are the caller's to set.
    ///
    /// # Panics
    ///
    /// When the slab holds all the nodes that a `u32` can name.
    #[inline]
    pub(super) fn alloc(&mut self, item: u32) -> TimerId {
        let id = if self.free == TimerId::NONE { self.take_fresh() } else { self.take_freed() };
        let node = self.node_mut(id);
        node.prev = TimerId::NONE;
        node.item = item;
        self.len += 1;
        id
    }

    /// Takes a node back.
    ///
    /// # Panics
    ///
    /// When `id` names no live node.
    #[inline]
    pub(super) fn release(&mut self, id: TimerId) {
        let free = self.free;
        let node = self.node_mut(id);
        assert!(node.prev != FREED, "S1: {id:?} has fired or was removed");
        node.prev = FREED;
        node.next = free;
        self.free = id;
        self.len -= 1;
        if self.len == 0 {
            self.free = TimerId::NONE;
            self.fresh = 0;
        }
    }

    /// A live node, for an id that comes from outside the wheel.
    ///
    /// # Panics
    ///
    /// When `id` names no live node. An id that has been handed out again since cannot be told from a live one.
    #[inline]
    pub(super) fn live(&self, id: TimerId) -> &Node {
        let node = &self.chunks[chunk_of(id)][place_in_chunk(id)];
        assert!(node.prev != FREED, "S1: {id:?} has fired or was removed");
        node
    }

    /// Any node, for an id that is known to be good.
    ///
    /// Not checked as [`live`](Slab::live) does, because a neighbour on a list is often not in the cache: to write
    /// one of its links costs little, to read it first costs the miss.
    #[inline]
    pub(super) fn node_mut(&mut self, id: TimerId) -> &mut Node {
        &mut self.chunks[chunk_of(id)][place_in_chunk(id)]
    }

    /// Gives back one chunk of an empty slab, unless it is the first.
    pub(super) fn trim(&mut self) {
        assert!(self.len == 0, "S3: only an empty slab has chunks to give back");
        if self.chunks.len() <= 1 {
            return;
        }
        self.chunks.pop();
        if self.chunks.len() == 1 {
            self.chunks.shrink_to_fit();
        }
    }

    #[cfg(any(test, feature = "testing"))]
    pub(super) fn validate(&self) {
        let mut freed = 0;
        let mut id = self.free;
        while id != TimerId::NONE {
            assert!(id.0 < self.fresh, "S2: {id:?} is on the free list but not below {}", self.fresh);
            let node = &self.chunks[chunk_of(id)][place_in_chunk(id)];
            assert!(node.prev == FREED, "S1: {id:?} is on the free list but not marked");
            freed += 1;
            assert!(freed <= self.fresh, "S2: the free list has a cycle");
            id = node.next;
        }
        let nodes = || self.chunks.iter().enumerate().flat_map(|(c, chunk)| (c * CHUNK_NODES..).zip(chunk.iter()));
        let live = nodes().filter(|(_, node)| node.prev != FREED).count();
        let below_fresh = nodes().filter(|&(index, _)| index < self.fresh as usize).count();
        assert_eq!(live, self.len(), "S1: live nodes");
        assert_eq!(live + freed as usize, below_fresh, "S2: nodes below fresh");
        assert!(self.len > 0 || (self.fresh == 0 && self.free == TimerId::NONE), "S3: an empty slab starts afresh");
        assert!(
            nodes().all(|(index, node)| index < self.fresh as usize || node.prev == FREED),
            "S3: a node above fresh is live"
        );
    }

    #[inline]
    fn take_freed(&mut self) -> TimerId {
        let id = self.free;
        self.free = self.node_mut(id).next;
        id
    }

    fn take_fresh(&mut self) -> TimerId {
        let id = TimerId(self.fresh);
        let chunk = chunk_of(id);
        if chunk == self.chunks.len() {
            self.grow();
        }
        self.fresh += 1;
        if place_in_chunk(id) + 1 == self.chunks[chunk].len() {
            self.fresh = ((chunk + 1) * CHUNK_NODES) as u32;
        }
        id
    }

    #[cold]
    fn grow(&mut self) {
        assert!(self.chunks.len() < MAX_CHUNKS, "a wheel holds at most {MAX_CHUNKS} chunks of timers");
        let nodes = if self.chunks.is_empty() { FIRST_CHUNK_NODES } else { CHUNK_NODES };
        self.chunks.push(vec![Node::UNUSED; nodes].into_boxed_slice());
    }
}

#[inline]
fn chunk_of(id: TimerId) -> usize {
    id.0 as usize / CHUNK_NODES
}

#[inline]
fn place_in_chunk(id: TimerId) -> usize {
    id.0 as usize % CHUNK_NODES
}

// 256 nodes are 5 KiB: a size class of its own in jemalloc, and far below the mmap threshold of glibc.
const CHUNK_NODES: usize = 256;
const FIRST_CHUNK_NODES: usize = 32;

// The chunk left out would hold NONE and FREED.
const MAX_CHUNKS: usize = u32::MAX as usize / CHUNK_NODES;

// Marks a free node in `prev`, where a live node has an index or NONE.
const FREED: TimerId = TimerId(u32::MAX - 1);

const _: () = assert!(MAX_CHUNKS * CHUNK_NODES <= FREED.0 as usize);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_freed_last_is_handed_out_first() {
        let mut slab = Slab::new();
        let ids: Vec<_> = (0..3).map(|item| slab.alloc(item)).collect();
        slab.release(ids[0]);
        slab.release(ids[2]);
        assert_eq!([slab.alloc(7), slab.alloc(8)], [ids[2], ids[0]]);
        slab.validate();
    }

    #[test]
    fn growing_past_the_short_first_chunk_keeps_every_node_apart() {
        let mut slab = Slab::new();
        let ids: Vec<_> = (0..1000).map(|item| slab.alloc(item)).collect();
        slab.validate();
        assert_eq!(slab.chunks.len(), 1 + (1000 - FIRST_CHUNK_NODES).div_ceil(CHUNK_NODES));
        for (item, &id) in (0..).zip(&ids) {
            assert_eq!(slab.live(id).item, item);
        }
    }

    #[test]
    fn churn_at_one_size_allocates_no_chunk() {
        let mut slab = Slab::new();
        let mut ids: Vec<_> = (0..1000).map(|item| slab.alloc(item)).collect();
        let chunks = slab.chunks.len();
        for round in 0..10_000 {
            let at = round * 7919 % ids.len();
            slab.release(ids[at]);
            ids[at] = slab.alloc(0);
        }
        slab.validate();
        assert_eq!(slab.chunks.len(), chunks);
    }

    #[test]
    fn an_empty_slab_gives_back_one_chunk_at_each_trim_down_to_the_first() {
        let mut slab = Slab::new();
        let ids: Vec<_> = (0..1000).map(|item| slab.alloc(item)).collect();
        let chunks = slab.chunks.len();
        ids.iter().for_each(|&id| slab.release(id));
        for left in (1..chunks).rev() {
            slab.trim();
            assert_eq!(slab.chunks.len(), left);
            slab.validate();
        }
        slab.trim();
        assert_eq!(slab.chunks.len(), 1);
        assert_eq!(slab.chunks.capacity(), 1, "the directory shrinks too");
        assert_eq!(slab.alloc(5), ids[0]);
    }

    #[test]
    #[should_panic(expected = "S3: ")]
    fn a_slab_in_use_does_not_give_its_chunks_back() {
        let mut slab = Slab::new();
        slab.alloc(1);
        slab.trim();
    }

    #[test]
    fn a_slab_emptied_in_any_order_hands_out_its_nodes_from_the_start() {
        let mut slab = Slab::new();
        let ids: Vec<_> = (0..600).map(|item| slab.alloc(item)).collect();
        (0..600).for_each(|i| slab.release(ids[i * 7 % 600]));
        slab.validate();
        let again: Vec<_> = (0..600).map(|item| slab.alloc(item)).collect();
        assert_eq!(again, ids);
        slab.validate();
    }

    #[test]
    fn an_id_survives_being_packed_as_a_number() {
        let mut slab = Slab::new();
        for item in 0..300 {
            let id = slab.alloc(item);
            assert_eq!(slab.live(TimerId::from_raw(id.raw())).item, item);
        }
        assert_eq!(TimerId::from_raw(TimerId::NONE.raw()), TimerId::NONE);
    }

    #[test]
    #[should_panic(expected = "S2: ")]
    fn validation_notices_a_lost_free_node() {
        let mut slab = Slab::new();
        let id = slab.alloc(1);
        slab.alloc(2);
        slab.release(id);
        slab.free = TimerId::NONE;
        slab.validate();
    }

    #[test]
    #[should_panic(expected = "has fired or was removed")]
    fn a_node_is_not_released_twice() {
        let mut slab = Slab::new();
        let id = slab.alloc(1);
        slab.alloc(2);
        slab.release(id);
        slab.release(id);
    }
}
