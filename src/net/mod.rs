//! The outside world: sockets, timers, and the effects of lento's decisions.

pub mod control;
