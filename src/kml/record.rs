//! What a journal record says: who changed which object, how, and from which version.
//!
//! A record names objects by fid, never by path: a rename in between does not break it. `path` is
//! there for people and tools. Each record carries the stamps it was based on, so that the server
//! can certify it, and what it replaced, so that it can be undone. Absent on purpose: file
//! contents. A `Store` announces ranges; their bytes travel beside the record.
//!
//! Source: InterMezzo's KML, whose records named paths, which is what broke its reintegration.

use std::fmt;

use minicbor::{Decode, Encode};

/// Bits of a fid that hold the creating node's counter; the node's number stands above them.
pub const FID_COUNTER_BITS: u32 = 40;
/// Largest node number: fids stay below 2^63, so that they are inode numbers everywhere.
pub const NODE_MAX: u32 = (1 << 23) - 1;
/// Longest name of a directory entry, bytes.
pub const NAME_LEN_MAX: usize = 255;
/// Longest target of a symbolic link, bytes.
pub const TARGET_LEN_MAX: usize = 4095;
/// Largest value of an extended attribute, bytes.
pub const XATTR_LEN_MAX: usize = 65536;
/// Longest path kept in a record, bytes; a longer one keeps its end.
pub const PATH_LEN_MAX: usize = 4096;
/// Most ranges that one store names; more are merged into one that covers them.
pub const RANGES_MAX: usize = 256;

/// An object's identity for ever: creating node's number and its counter. Never reused.
#[derive(Encode, Decode, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
#[cbor(transparent)]
pub struct Fid(pub u64);

/// The root directory of every volume.
pub const ROOT: Fid = Fid(1);

impl Fid {
    /// The fid that `node` gives to its `counter`th object. Panics beyond the ranges above.
    pub fn new(node: u32, counter: u64) -> Fid {
        assert!(node <= NODE_MAX && counter < 1 << FID_COUNTER_BITS);
        Fid((u64::from(node) << FID_COUNTER_BITS) | counter)
    }
    /// The node that created the object; 0 is the server.
    pub fn node(self) -> u32 {
        (self.0 >> FID_COUNTER_BITS) as u32
    }
    /// The creating node's counter.
    pub fn counter(self) -> u64 {
        self.0 & ((1 << FID_COUNTER_BITS) - 1)
    }
}

impl fmt::Debug for Fid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}.{:x}", self.node(), self.counter())
    }
}

impl fmt::Display for Fid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Position of a record in one node's journal; the first record is 1, 0 means none.
#[derive(Encode, Decode, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Debug)]
#[cbor(transparent)]
pub struct Seq(pub u64);

impl Seq {
    pub fn next(self) -> Seq {
        Seq(self.0 + 1)
    }
}

/// An object's version: it names the last record of the server's journal that changed it, and none
/// other, ever (`replica::lives`); 0 means that the server has not seen it changed since it was first
/// served.
#[derive(Encode, Decode, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Debug)]
#[cbor(transparent)]
pub struct Stamp(pub u64);

/// A time of a file: seconds since the Unix epoch (may be negative) and nanoseconds, 0..1e9.
#[derive(Encode, Decode, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
pub struct Time {
    #[n(0)]
    pub sec: i64,
    #[n(1)]
    pub nsec: u32,
}

/// Why bytes are not a name: empty, too long, `.` or `..`, or with a slash or a NUL in them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a name of a directory entry")]
pub struct BadName;

/// The name of one directory entry: 1..=255 bytes, neither `.` nor `..`, no slash, no NUL.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Box<[u8]>);

impl Name {
    /// # Errors
    /// [`BadName`] when the bytes could not stand in a directory, or could lead out of it.
    pub fn new(bytes: &[u8]) -> Result<Name, BadName> {
        let bad = bytes.is_empty()
            || bytes.len() > NAME_LEN_MAX
            || bytes == b"."
            || bytes == b".."
            || bytes.iter().any(|b| matches!(b, 0 | b'/'));
        if bad { Err(BadName) } else { Ok(Name(bytes.into())) }
    }
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

/// Where an entry stands: its directory, the directory's version that was seen, and the name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    pub dir: Fid,
    pub base: Stamp,
    pub name: Name,
}

/// The attributes that a removed object had: what undo and certification need of it.
#[derive(Encode, Decode, Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Attr {
    /// file type and permission bits, as in `st_mode`
    #[n(0)]
    pub mode: u32,
    #[n(1)]
    pub uid: u32,
    #[n(2)]
    pub gid: u32,
    #[n(3)]
    pub nlink: u32,
    /// device number of a character or block device, as in `st_rdev`
    #[n(4)]
    pub rdev: u64,
    /// bytes
    #[n(5)]
    pub size: u64,
    #[n(6)]
    pub atime: Time,
    #[n(7)]
    pub mtime: Time,
}

/// An object that lost the name in question, as it was before.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Gone {
    pub fid: Fid,
    pub base: Stamp,
    pub attr: Attr,
    /// where it led, if it was a symbolic link
    pub target: Option<Vec<u8>>,
}

/// New (or replaced) attributes: `None` leaves one as it is.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Change {
    /// permission bits only (07777)
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    /// bytes: truncation or extension by a hole
    pub size: Option<u64>,
    pub atime: Option<Time>,
    pub mtime: Option<Time>,
}

/// Bytes `at..at + len` of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    pub at: u64,
    pub len: u64,
}

/// What a rename does with an object that has the new name already.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Over {
    /// nothing stood there (and with `RENAME_NOREPLACE` nothing was allowed to)
    Nothing { noreplace: bool },
    /// this was replaced
    Replaced(Gone),
    /// `RENAME_EXCHANGE`: this now has the old name
    Exchanged { fid: Fid, base: Stamp },
}

/// The change itself. The discriminants are the kinds of the journal's format.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// nothing: a place that a cancelled or padded record held
    Noop,
    /// a regular file; `mode` as the caller asked for it, masked by `umask` or the directory's
    /// default ACL, as open(2) has it; owner and group are the record's uid and gid
    Create {
        at: Place,
        fid: Fid,
        mode: u32,
        umask: u32,
    },
    Mkdir {
        at: Place,
        fid: Fid,
        mode: u32,
        umask: u32,
    },
    Symlink {
        at: Place,
        fid: Fid,
        target: Vec<u8>,
    },
    /// a fifo, socket or device; `mode` with its file type bits
    Mknod {
        at: Place,
        fid: Fid,
        mode: u32,
        umask: u32,
        rdev: u64,
    },
    Link {
        at: Place,
        fid: Fid,
        base: Stamp,
    },
    Rename {
        from: Place,
        to: Place,
        fid: Fid,
        base: Stamp,
        over: Over,
    },
    Unlink {
        at: Place,
        gone: Gone,
    },
    Rmdir {
        at: Place,
        gone: Gone,
    },
    Setattr {
        fid: Fid,
        base: Stamp,
        new: Change,
        old: Change,
    },
    /// `old`: the value it replaced, if there was one
    Setxattr {
        fid: Fid,
        base: Stamp,
        name: Vec<u8>,
        value: Vec<u8>,
        old: Option<Vec<u8>>,
    },
    Removexattr {
        fid: Fid,
        base: Stamp,
        name: Vec<u8>,
        old: Option<Vec<u8>>,
    },
    /// the data of a file changed (InterMezzo's CLOSE): these ranges have new bytes, and the file
    /// now ends at `size`
    Store {
        fid: Fid,
        base: Stamp,
        size: u64,
        mtime: Time,
        ranges: Vec<Range>,
        old_size: u64,
    },
}

/// Who made a change: (node, seq) names a record for ever, since a node number stands for one
/// incarnation of one journal.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct Origin {
    pub node: u32,
    pub seq: Seq,
}

/// One journal record. Its own seq is given by the journal on append and is no part of this.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// nanoseconds since the Unix epoch; also the mtime that touched directories get, on all nodes
    pub time_ns: u64,
    /// all zero in the journal of the node that made the change; at the server the client's
    pub origin: Origin,
    pub uid: u32,
    pub gid: u32,
    /// from the volume's root, without a leading slash; for people and tools
    pub path: Vec<u8>,
    pub op: Op,
}

/// Path of a noop that stands for a record which was damaged and could not be read any more.
pub const LOST_PATH: &[u8] = b"(lost)";

impl Record {
    /// A place in a repaired journal: what was here is not known.
    pub fn lost(time_ns: u64) -> Record {
        let origin = Origin::default();
        Record { time_ns, origin, uid: 0, gid: 0, path: LOST_PATH.to_vec(), op: Op::Noop }
    }
    /// Whether this is such a place. (At a server, noops of clients have an origin.)
    pub fn is_lost(&self) -> bool {
        self.op == Op::Noop && self.origin == Origin::default() && self.path == LOST_PATH
    }
}

impl Op {
    /// The object that the change is about; none for a noop.
    pub fn fid(&self) -> Option<Fid> {
        match self {
            Op::Noop => None,
            Op::Create { fid, .. }
            | Op::Mkdir { fid, .. }
            | Op::Symlink { fid, .. }
            | Op::Mknod { fid, .. }
            | Op::Link { fid, .. }
            | Op::Rename { fid, .. }
            | Op::Setattr { fid, .. }
            | Op::Setxattr { fid, .. }
            | Op::Removexattr { fid, .. }
            | Op::Store { fid, .. } => Some(*fid),
            Op::Unlink { gone, .. } | Op::Rmdir { gone, .. } => Some(gone.fid),
        }
    }
    /// The places whose entries change: none, one, or two for a rename.
    pub fn places(&self) -> [Option<&Place>; 2] {
        match self {
            Op::Create { at, .. }
            | Op::Mkdir { at, .. }
            | Op::Symlink { at, .. }
            | Op::Mknod { at, .. }
            | Op::Link { at, .. }
            | Op::Unlink { at, .. }
            | Op::Rmdir { at, .. } => [Some(at), None],
            Op::Rename { from, to, .. } => [Some(from), Some(to)],
            _ => [None, None],
        }
    }
    /// The object that a rename replaced or exchanged.
    pub fn other(&self) -> Option<Fid> {
        match self {
            Op::Rename { over: Over::Replaced(gone), .. } => Some(gone.fid),
            Op::Rename { over: Over::Exchanged { fid, .. }, .. } => Some(*fid),
            _ => None,
        }
    }
    /// Every object whose state the change touches: at most four, directories included.
    pub fn touched(&self) -> impl Iterator<Item = Fid> + '_ {
        let dirs = self.places().into_iter().flatten().map(|place| place.dir);
        self.fid().into_iter().chain(self.other()).chain(dirs)
    }
}
