//! The KML: the journal of what was changed, in memory-mapped, checksummed segments.
//!
//! Reading order: what a record says, its bytes, the log that holds records, what is below the log
//! (recovery, store, map), then what works on records (optimise, dump), what is left of a damaged
//! journal (salvage), and the table of writers.

pub mod record;

pub mod codec;
pub mod dump;
pub mod log;
pub mod optimise;
pub mod recover;
pub mod salvage;
pub mod store;
pub mod writers;

mod map;
#[cfg(test)]
mod samples;
#[cfg(test)]
mod sim;
