//! The gateway as it is built: a process between clients and a service that a test scripts.

mod admin;
mod client;
mod keys;
mod limits;
mod lives;
mod passing;
mod process;
mod settings;
mod smuggling;
mod unknown;
mod upstream;
