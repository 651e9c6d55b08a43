//! Lento: cache manager and file server as pure state machines. No socket, no clock, no file:
//! events go in by `on_*` with `now` as an argument, effects come out by `poll`.

pub mod intake;
pub mod message;
pub mod promises;
pub mod reint;
pub mod server;
