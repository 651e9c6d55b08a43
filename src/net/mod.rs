//! The outside world: sockets, timers, and the effects of lento's decisions.

pub mod answer;
pub mod client;
pub mod conflicts;
pub mod conn;
pub mod control;
pub mod frame;
pub mod handle;
pub mod poll;
pub mod room;
pub mod server;
pub mod volumes;
