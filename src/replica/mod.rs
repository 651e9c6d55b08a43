//! The replica: a tree of ordinary files, and what imz knows of each of them.
//!
//! The tree mirrors the volume's names one to one. What imz knows of an object sits in one
//! extended attribute on the object itself; the index from fid to name can be rebuilt from the
//! tree at any time. There is no database of truth.
//!
//! Reading order: what both sides share, then a client's view, then the server's, then what looks
//! after both (compare, fsck, inspect).

pub mod index;
pub mod meta;
pub mod ops;
pub mod recover;
pub mod room;
pub mod state;
pub mod tree;

pub mod cache;
pub mod evict;
pub mod hydrate;
pub mod limbo;
pub mod merge;
pub mod pending;
pub mod pins;
pub mod power;

pub mod apply;
mod behind;
pub mod certify;
mod conflict;
mod hands;
mod live;
pub mod lives;
mod nodes;
mod past;
mod redo;
pub mod replay;
pub mod resolve;
pub mod settings;
mod spool;
mod swap;
pub mod usage;
pub mod volume;

pub mod compare;
pub mod fsck;
pub mod inspect;
