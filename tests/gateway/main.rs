//! The gateway as it is built: a process between clients and a service that a test scripts.

mod admin;
mod client;
mod crashes;
mod curl;
mod frames;
mod herd;
mod hostile;
mod keys;
mod ledger;
mod limits;
mod lives;
mod passing;
mod process;
mod resolving;
mod settings;
mod smuggling;
mod streams;
mod unknown;
mod upstream;
