//! The peers, one a file, each of which says how it is used.

pub mod dashmap;
pub mod fjall;
pub mod floor;
pub mod lmdb;
pub mod moka;
pub mod oncekey;
pub mod quick_cache;
pub mod redb;
pub mod redis;
#[cfg(feature = "rocksdb")]
pub mod rocksdb;
pub mod scc;
pub mod sled;
pub mod sqlite;
