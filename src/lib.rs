//! imz: a distributed file system at local-disk speed.
//!
//! The modules in reading order; each may name those after it and none before it
//! (lento uses kml's record types only):
//!
//!   modes > presto, net > lento, replica > kml > sys

pub mod cli;
pub mod modes;

pub mod net;
pub mod presto;

pub mod lento;
pub mod replica;

pub mod kml;

pub mod sys;
