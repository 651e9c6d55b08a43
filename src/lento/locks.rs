//! Locks of files: what is asked for, and what stands in the way.
//!
//! Two families that never see each other, as on Linux: flock locks cover a whole object and belong
//! to an open file, fcntl locks cover ranges of bytes and belong to a process.

use minicbor::{Decode, Encode};

use crate::kml::record::Fid;

/// What a lock allows others.
#[derive(Encode, Decode, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[cbor(index_only)]
pub enum LockKind {
    /// shared: other readers
    #[n(0)]
    Read,
    /// exclusive: nobody
    #[n(1)]
    Write,
    /// asked for only: what is held there ends
    #[n(2)]
    Unlock,
}

/// What an application asks of a lock.
#[derive(Encode, Decode, Clone, PartialEq, Eq, Debug)]
pub struct LockAsk {
    #[n(0)]
    pub fid: Fid,
    /// the kernel's number for who holds it: a process (fcntl), an open file (flock)
    #[n(1)]
    pub owner: u64,
    /// flock, not fcntl: the range is the whole object, whatever it says
    #[n(2)]
    pub flock: bool,
    /// first byte
    #[n(3)]
    pub start: u64,
    /// last byte, inclusive; `u64::MAX`: to the end, wherever that will be
    #[n(4)]
    pub end: u64,
    #[n(5)]
    pub kind: LockKind,
    /// for people, and for `F_GETLK`
    #[n(6)]
    pub pid: u32,
    /// wait until it is granted; else it is granted now or not at all
    #[n(7)]
    pub wait: bool,
    /// only say who is in the way (`F_GETLK`)
    #[n(8)]
    pub test: bool,
}

/// A lock that somebody holds.
#[derive(Encode, Decode, Clone, Copy, PartialEq, Eq, Debug)]
pub struct LockHeld {
    #[n(0)]
    pub kind: LockKind,
    #[n(1)]
    pub start: u64,
    /// inclusive
    #[n(2)]
    pub end: u64,
    /// on the machine of its holder
    #[n(3)]
    pub pid: u32,
}
