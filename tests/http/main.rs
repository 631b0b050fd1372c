//! The HTTP layer, around services in this process.

mod answers;
mod buffered;
mod detached;
mod grpc;
mod in_flight;
mod interrupted;
mod keys;
mod lengths;
mod service;
mod stacked;
mod store_failures;
mod streams;
