//! Net: the event loop, frames and connections. It carries out what lento's machines decide.

pub mod conn;
pub mod frame;
pub mod poll;
