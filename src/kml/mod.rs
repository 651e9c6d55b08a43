//! The KML: the journal of what was changed, in memory-mapped, checksummed segments.

pub mod record;
