//! The replica: a tree of ordinary files, and what imz knows of each of them.
//!
//! The tree mirrors the volume's names one to one. What imz knows of an object sits in one
//! extended attribute on the object itself; the index from fid to name can be rebuilt from the
//! tree at any time. There is no database of truth.

pub mod apply;
mod certify;
mod conflict;
pub mod index;
pub mod meta;
mod nodes;
pub mod ops;
mod redo;
mod spool;
pub mod state;
pub mod tree;
pub mod volume;
