//! Bodies of replies, and notices: what we tell the kernel.

use super::{LockType, OFFSET_MAX};
use crate::sys::dev_fuse::encode_dev;
use crate::sys::fs::{Kind, Stat};

/// Length of `struct fuse_out_header`.
pub const OUT_HEAD_LEN: usize = 16;
/// Length of `struct fuse_attr`.
const ATTR_LEN: usize = 88;
/// Length of `struct fuse_entry_out`.
const ENTRY_LEN: usize = 40 + ATTR_LEN;
/// Length of `struct fuse_dirent` without its name.
const DIRENT_LEN: usize = 24;

const _: () =
    assert!(ENTRY_LEN == 128 && ATTR_LEN.is_multiple_of(8) && DIRENT_LEN.is_multiple_of(8));

/// A body in the making.
#[derive(Default)]
pub(super) struct Body(pub(super) Vec<u8>);

impl Body {
    pub(super) fn with_room(len: usize) -> Body {
        Body(Vec::with_capacity(len))
    }
    pub(super) fn u16(mut self, value: u16) -> Body {
        self.0.extend(value.to_ne_bytes());
        self
    }
    pub(super) fn u32(mut self, value: u32) -> Body {
        self.0.extend(value.to_ne_bytes());
        self
    }
    pub(super) fn u64(mut self, value: u64) -> Body {
        self.0.extend(value.to_ne_bytes());
        self
    }
    /// Zeros up to `len`, and no further.
    pub(super) fn padded(mut self, len: usize) -> Vec<u8> {
        debug_assert!(self.0.len() <= len, "{} bytes of {len}", self.0.len());
        self.0.resize(len, 0);
        self.0
    }
}

/// The head of a reply to request `unique`; `error` is 0 or a negative errno.
pub fn out_head(unique: u64, error: i32, body_len: usize) -> [u8; OUT_HEAD_LEN] {
    let mut head = [0; OUT_HEAD_LEN];
    head[..4].copy_from_slice(&((OUT_HEAD_LEN + body_len) as u32).to_ne_bytes());
    head[4..8].copy_from_slice(&error.to_ne_bytes());
    head[8..].copy_from_slice(&unique.to_ne_bytes());
    head
}

/// An object as replies carry it.
pub struct Entry<'a> {
    /// 0: there is no such name, and the kernel may remember that
    pub ino: u64,
    pub stat: &'a Stat,
    /// how long the kernel may keep it, s
    pub keep: u64,
}

fn put_attr(body: Body, ino: u64, s: &Stat) -> Body {
    let sec = |time: (i64, u32)| time.0 as u64;
    let body = body.u64(ino).u64(s.size).u64(s.blocks);
    let body = body.u64(sec(s.atime)).u64(sec(s.mtime)).u64(sec(s.ctime));
    let body = body.u32(s.atime.1).u32(s.mtime.1).u32(s.ctime.1);
    let body = body.u32(s.mode).u32(s.nlink).u32(s.uid).u32(s.gid);
    body.u32(encode_dev(s.rdev)).u32(4096).u32(0)
}

fn put_entry(body: Body, entry: &Entry) -> Body {
    // Fids are never used twice: one generation.
    let body = body.u64(entry.ino).u64(0).u64(entry.keep).u64(entry.keep).u32(0).u32(0);
    put_attr(body, entry.ino, entry.stat)
}

/// `struct fuse_entry_out`: LOOKUP, MKDIR, MKNOD, SYMLINK, LINK.
pub fn entry(entry: &Entry) -> Vec<u8> {
    put_entry(Body::with_room(ENTRY_LEN), entry).padded(ENTRY_LEN)
}

/// `struct fuse_attr_out`: GETATTR, SETATTR.
pub fn attr(entry: &Entry) -> Vec<u8> {
    let body = Body::with_room(16 + ATTR_LEN).u64(entry.keep).u32(0).u32(0);
    put_attr(body, entry.ino, entry.stat).padded(16 + ATTR_LEN)
}

/// How the kernel is to treat an open file.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct OpenFlags {
    /// a close is not told
    pub no_flush: bool,
    /// pages that the kernel has are as good as before
    pub keep_cache: bool,
    /// each read and write is a request, and no page is kept
    pub direct: bool,
    /// the kernel moves the data to and from this backing file
    pub backing: Option<i32>,
}

fn put_open(body: Body, fh: u64, flags: OpenFlags) -> Body {
    const DIRECT_IO: u32 = 1 << 0;
    const KEEP_CACHE: u32 = 1 << 1;
    const NOFLUSH: u32 = 1 << 5;
    const PASSTHROUGH: u32 = 1 << 7;
    let mut bits = if flags.no_flush { NOFLUSH } else { 0 };
    match flags.backing {
        Some(_) => bits |= PASSTHROUGH, // pages are the backing file's: to keep them is an error
        None if flags.direct => {}
        None if flags.keep_cache => bits |= KEEP_CACHE,
        None => {}
    }
    // It goes before the other way of a file that is open past the daemon already, which all its
    // handles must name.
    if flags.direct {
        bits |= DIRECT_IO;
    }
    body.u64(fh).u32(bits).u32(flags.backing.unwrap_or(0) as u32)
}

/// `struct fuse_open_out`: OPEN.
pub fn open(fh: u64, flags: OpenFlags) -> Vec<u8> {
    put_open(Body::with_room(16), fh, flags).padded(16)
}

/// CREATE and TMPFILE: the entry and the open file.
pub fn created(entry: &Entry, fh: u64, flags: OpenFlags) -> Vec<u8> {
    let body = put_entry(Body::with_room(ENTRY_LEN + 16), entry);
    put_open(body, fh, flags).padded(ENTRY_LEN + 16)
}

/// One number of 32 bits and padding: WRITE, GETXATTR and LISTXATTR without room.
pub fn size(len: u32) -> Vec<u8> {
    Body::default().u32(len).padded(8)
}

/// One number of 64 bits: LSEEK, COPY_FILE_RANGE_64.
pub fn offset(at: u64) -> Vec<u8> {
    Body::default().u64(at).padded(8)
}

/// Room in a file system, as `struct fuse_kstatfs` has it.
pub struct Statfs {
    pub blocks: u64,
    pub blocks_free: u64,
    pub blocks_available: u64,
    pub files: u64,
    pub files_free: u64,
    /// bytes
    pub block_len: u32,
    pub name_len_max: u32,
}

/// STATFS.
pub fn statfs(s: &Statfs) -> Vec<u8> {
    let body = Body::with_room(80).u64(s.blocks).u64(s.blocks_free).u64(s.blocks_available);
    let body = body.u64(s.files).u64(s.files_free);
    body.u32(s.block_len).u32(s.name_len_max).u32(s.block_len).padded(80)
}

/// GETLK: the lock in the way, or none.
pub fn lock(start: u64, end: u64, kind: LockType, pid: u32) -> Vec<u8> {
    let kind = match kind {
        LockType::Read => 0,
        LockType::Write => 1,
        LockType::Unlock => 2,
    };
    let body = Body::with_room(24).u64(start.min(OFFSET_MAX)).u64(end.min(OFFSET_MAX));
    body.u32(kind).u32(pid).padded(24)
}

/// READDIR and READDIRPLUS: entries, as many as there is room for.
pub struct Listing {
    bytes: Vec<u8>,
    room: usize,
}

impl Listing {
    pub fn new(room: u32) -> Listing {
        // The kernel asks for a few pages; whoever asks for more gets them when they are filled.
        Listing { bytes: Vec::with_capacity(room.min(64 << 10) as usize), room: room as usize }
    }

    /// False, and nothing is added, when there is no room left. `plus`: how long to keep it, s.
    pub fn add(
        &mut self,
        name: &[u8],
        ino: u64,
        stat: &Stat,
        next: u64,
        plus: Option<u64>,
    ) -> bool {
        self.put(name, (ino, ino), stat, next, plus)
    }

    /// A name alone: the kernel looks it up by itself.
    pub fn add_name(&mut self, name: &[u8], stat: &Stat, next: u64, plus: bool) -> bool {
        // No object is 0; an entry with that number nobody would be shown.
        self.put(name, (0, u64::MAX), stat, next, plus.then_some(0))
    }

    fn put(
        &mut self,
        name: &[u8],
        (node, ino): (u64, u64),
        stat: &Stat,
        next: u64,
        plus: Option<u64>,
    ) -> bool {
        let before = if plus.is_some() { ENTRY_LEN } else { 0 };
        let len = before + (DIRENT_LEN + name.len()).next_multiple_of(8);
        if self.bytes.len() + len > self.room {
            return false;
        }
        let end = self.bytes.len() + len;
        let mut body = Body(std::mem::take(&mut self.bytes));
        if let Some(keep) = plus {
            body = put_entry(body, &Entry { ino: node, stat, keep });
        }
        let kind = dirent_type(stat.kind());
        body = body.u64(ino).u64(next).u32(name.len() as u32).u32(kind);
        body.0.extend(name);
        self.bytes = body.padded(end);
        true
    }

    pub fn into_body(self) -> Vec<u8> {
        self.bytes
    }
}

/// The `DT_*` of a kind: the type bits of a mode, further down.
fn dirent_type(kind: Kind) -> u32 {
    match kind {
        Kind::Fifo => 1,
        Kind::Char => 2,
        Kind::Dir => 4,
        Kind::Block => 6,
        Kind::File => 8,
        Kind::Symlink => 10,
        Kind::Socket => 12,
    }
}

fn notice(code: i32, body: &[u8]) -> Vec<u8> {
    [&out_head(0, code, body.len())[..], body].concat()
}

/// Attributes and all data of an object are stale.
pub fn inval_inode(ino: u64) -> Vec<u8> {
    notice(2, &Body::default().u64(ino).u64(0).u64(0).0)
}

/// All entries of all directories are to be looked up again (Linux 6.16 and newer).
pub fn next_epoch() -> Vec<u8> {
    notice(8, &[])
}
