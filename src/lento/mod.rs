//! Lento: cache manager and file server as pure state machines. No socket, no clock, no file:
//! events go in by `on_*` with `now` as an argument, effects come out by `poll`.

mod asking;
pub mod charge;
pub mod client;
pub mod faults;
mod fetch;
pub mod grant;
pub mod granting;
pub mod intake;
pub mod ledger;
mod locker;
mod locking;
pub mod locks;
pub mod message;
mod permits;
pub mod policy;
pub mod promises;
pub mod reint;
pub mod rights;
pub mod room;
pub mod server;
pub mod serving;
pub mod ship;
