//! All integration tests in one binary: one link, and modules that share their helpers.

mod api;
mod bad_input;
mod concurrency;
mod corruption;
mod erasure;
mod expiry;
mod golden;
mod index;
mod memory;
mod model;
mod processes;
mod recovery;
mod space;
mod support;
