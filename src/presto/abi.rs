//! The bytes of the FUSE protocol (7.31 and newer): requests in, replies out. Pure.
//!
//! ```text
//!  request   head (40) | fixed part of the operation | names, each with a NUL; data
//!  reply     head (16) | body
//!  notice    head (16) with the code in place of the error and 0 as its id | body
//! ```
//!
//! All integers are in the machine's own order. A request comes in one piece from /dev/fuse, in
//! three from a ring: [`Raw`] is either. Its bytes are untrusted: [`Raw::parse`] checks every
//! length, and what does not fit is [`Garbled`], never a panic. Only what imz answers is taken
//! apart; the rest is [`Op::Unknown`]. Replies are bodies
//! ([`reply`]); whoever sends them adds the head.
//! Source: include/uapi/linux/fuse.h.

pub mod init;
pub mod reply;

/// Length of `struct fuse_in_header`.
pub const HEAD_LEN: usize = 40;
/// The longest fixed part: that of SETATTR.
pub const FIXED_LEN_MAX: usize = 88;
/// Largest offset of a lock; up to here means up to the end, however far the file grows.
const OFFSET_MAX: u64 = i64::MAX as u64;

/// Bytes that are no request, or one of a length that its operation cannot have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a request of the kernel is garbled")]
pub struct Garbled;

type Result<T> = std::result::Result<T, Garbled>;

/// Who asks for what: `struct fuse_in_header`.
///
/// ```text
///  at  len  field
///   0    4  len      of all of the request
///   4    4  opcode
///   8    8  unique   the request's id
///  16    8  nodeid   the object
///  24    4  uid, gid, pid of the caller (12 bytes)
///  36    4  length of extensions, padding
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    pub len: u32,
    pub opcode: u32,
    pub unique: u64,
    pub nodeid: u64,
    pub uid: u32,
    pub gid: u32,
    pub pid: u32,
}

/// A request as it came.
#[derive(Clone, Copy)]
pub struct Raw<'a> {
    pub head: &'a [u8],
    /// starts with the operation's fixed part; from a ring it is longer
    pub fixed: &'a [u8],
    pub rest: &'a [u8],
}

/// A request that was checked.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Request<'a> {
    pub head: Head,
    pub op: Op<'a>,
}

/// What a request asks for. Names are without their NUL.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Op<'a> {
    Lookup {
        name: &'a [u8],
    },
    /// one or many; nothing is answered
    Forget,
    Getattr,
    Setattr(Setattr),
    Readlink,
    Symlink {
        name: &'a [u8],
        target: &'a [u8],
    },
    Mknod {
        mode: u32,
        rdev: u32,
        umask: u32,
        name: &'a [u8],
    },
    Mkdir {
        mode: u32,
        umask: u32,
        name: &'a [u8],
    },
    Unlink {
        name: &'a [u8],
    },
    Rmdir {
        name: &'a [u8],
    },
    Rename {
        new_dir: u64,
        flags: u32,
        name: &'a [u8],
        new_name: &'a [u8],
    },
    Link {
        old: u64,
        name: &'a [u8],
    },
    Open {
        flags: i32,
    },
    Create {
        flags: i32,
        mode: u32,
        umask: u32,
        name: &'a [u8],
    },
    Tmpfile {
        flags: i32,
        mode: u32,
        umask: u32,
    },
    Read {
        fh: u64,
        at: u64,
        len: u32,
    },
    Write {
        fh: u64,
        at: u64,
        kill: bool,
        /// a page of the kernel's, that a mapping has written
        page: bool,
        data: &'a [u8],
    },
    Statfs,
    /// `flock`: locks of the whole file by `owner` go with it
    Release {
        fh: u64,
        owner: u64,
        flock: bool,
    },
    Fsync {
        fh: u64,
    },
    Fsyncdir,
    Setxattr {
        flags: u32,
        name: &'a [u8],
        value: &'a [u8],
    },
    Getxattr {
        room: u32,
        name: &'a [u8],
    },
    Listxattr {
        room: u32,
    },
    Removexattr {
        name: &'a [u8],
    },
    Flush {
        fh: u64,
        owner: u64,
    },
    Readdir {
        at: u64,
        room: u32,
        plus: bool,
    },
    Lock(Lock),
    /// of the request with this id; nothing is answered
    Interrupt {
        unique: u64,
    },
    Fallocate {
        fh: u64,
        at: u64,
        len: u64,
        mode: u32,
    },
    Lseek {
        fh: u64,
        at: u64,
        whence: u32,
    },
    /// `wide`: the answer has 64 bits
    CopyRange {
        from: (u64, u64),
        to: (u64, u64),
        len: u64,
        wide: bool,
    },
    Destroy,
    Unknown {
        opcode: u32,
    },
}

/// A time that a SETATTR sets: seconds and nanoseconds, or the clock's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SetTime {
    Now,
    At(i64, u32),
}

/// Attributes to set; `None` leaves one as it is.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Setattr {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: Option<SetTime>,
    pub mtime: Option<SetTime>,
}

/// What a lock is to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LockType {
    Read,
    Write,
    Unlock,
}

/// GETLK, SETLK and SETLKW, of flock(2) and of fcntl(2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lock {
    pub fh: u64,
    pub owner: u64,
    /// first and last byte; `u64::MAX` is the end of every file
    pub start: u64,
    pub end: u64,
    pub kind: LockType,
    pub pid: u32,
    pub flock: bool,
    pub wait: bool,
    pub test: bool,
}

/// Numbers of operations, as in `enum fuse_opcode`.
mod code {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const READDIR: u32 = 28;
    pub const FSYNCDIR: u32 = 30;
    pub const GETLK: u32 = 31;
    pub const SETLK: u32 = 32;
    pub const SETLKW: u32 = 33;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const TMPFILE: u32 = 51;
    pub const COPY_FILE_RANGE_64: u32 = 53;
}

/// Length of the fixed part of an operation; 0 for one that has none or is not known.
fn fixed_len(opcode: u32) -> usize {
    match opcode {
        code::FORGET | code::RENAME | code::LINK | code::OPEN | code::MKDIR => 8,
        code::SETXATTR | code::GETXATTR | code::LISTXATTR | code::INTERRUPT => 8,
        code::BATCH_FORGET => 8,
        code::GETATTR | code::MKNOD | code::CREATE | code::TMPFILE | code::RENAME2 => 16,
        code::FSYNC | code::FSYNCDIR => 16,
        code::RELEASE | code::FLUSH | code::LSEEK => 24,
        code::FALLOCATE => 32,
        code::READ | code::WRITE | code::READDIR | code::READDIRPLUS => 40,
        code::GETLK | code::SETLK | code::SETLKW => 48,
        code::COPY_FILE_RANGE | code::COPY_FILE_RANGE_64 => 56,
        code::SETATTR => FIXED_LEN_MAX,
        _ => 0,
    }
}

/// Fields in turn; each is checked to be there.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk().ok_or(Garbled)?;
        self.0 = rest;
        Ok(*field)
    }
    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_ne_bytes(self.take()?))
    }
    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_ne_bytes(self.take()?))
    }
    /// Bytes up to a NUL, which must be there.
    fn name(&mut self) -> Result<&'a [u8]> {
        let len = self.0.iter().position(|&b| b == 0).ok_or(Garbled)?;
        let name = &self.0[..len];
        self.0 = &self.0[len + 1..];
        Ok(name)
    }
    fn bytes(&mut self, len: u32) -> Result<&'a [u8]> {
        let bytes = self.0.get(..len as usize).ok_or(Garbled)?;
        self.0 = &self.0[bytes.len()..];
        Ok(bytes)
    }
}

impl Head {
    pub fn parse(bytes: &[u8]) -> Result<Head> {
        let mut f = Fields(bytes.get(..HEAD_LEN).ok_or(Garbled)?);
        let (len, opcode, unique, nodeid) = (f.u32()?, f.u32()?, f.u64()?, f.u64()?);
        Ok(Head { len, opcode, unique, nodeid, uid: f.u32()?, gid: f.u32()?, pid: f.u32()? })
    }
}

impl<'a> Raw<'a> {
    /// A request in one piece, as read(2) from /dev/fuse gives it.
    ///
    /// # Errors
    /// [`Garbled`] when not even its head is whole, or when its length is another than it says.
    pub fn whole(bytes: &'a [u8]) -> Result<Raw<'a>> {
        let head = Head::parse(bytes)?;
        if head.len as usize != bytes.len() {
            return Err(Garbled);
        }
        let (head_bytes, body) = bytes.split_at(HEAD_LEN);
        // A body that is too short shows when it is taken apart.
        let (fixed, rest) = body.split_at(fixed_len(head.opcode).min(body.len()));
        Ok(Raw { head: head_bytes, fixed, rest })
    }

    /// The request in one piece, to keep.
    pub fn to_vec(self) -> Vec<u8> {
        let opcode = Head::parse(self.head).map_or(0, |head| head.opcode);
        let head = &self.head[..HEAD_LEN.min(self.head.len())];
        let fixed = &self.fixed[..fixed_len(opcode).min(self.fixed.len())];
        let mut bytes = [head, fixed, self.rest].concat();
        let len = (bytes.len() as u32).to_ne_bytes();
        if let Some(field) = bytes.first_chunk_mut() {
            *field = len;
        }
        bytes
    }

    /// # Errors
    /// [`Garbled`] when a field, a name or data are missing.
    pub fn parse(self) -> Result<Request<'a>> {
        let head = Head::parse(self.head)?;
        let fixed = self.fixed.get(..fixed_len(head.opcode)).ok_or(Garbled)?;
        let op = parse_op(head.opcode, &mut Fields(fixed), &mut Fields(self.rest))?;
        Ok(Request { head, op })
    }
}

fn parse_op<'a>(opcode: u32, f: &mut Fields<'a>, rest: &mut Fields<'a>) -> Result<Op<'a>> {
    Ok(match opcode {
        code::LOOKUP => Op::Lookup { name: rest.name()? },
        code::FORGET | code::BATCH_FORGET => Op::Forget,
        code::GETATTR => Op::Getattr,
        code::SETATTR => Op::Setattr(parse_setattr(f)?),
        code::READLINK => Op::Readlink,
        code::SYMLINK => Op::Symlink { name: rest.name()?, target: rest.name()? },
        code::MKNOD => {
            Op::Mknod { mode: f.u32()?, rdev: f.u32()?, umask: f.u32()?, name: rest.name()? }
        }
        code::MKDIR => Op::Mkdir { mode: f.u32()?, umask: f.u32()?, name: rest.name()? },
        code::UNLINK => Op::Unlink { name: rest.name()? },
        code::RMDIR => Op::Rmdir { name: rest.name()? },
        code::RENAME | code::RENAME2 => {
            let new_dir = f.u64()?;
            let flags = if opcode == code::RENAME2 { f.u32()? } else { 0 };
            Op::Rename { new_dir, flags, name: rest.name()?, new_name: rest.name()? }
        }
        code::LINK => Op::Link { old: f.u64()?, name: rest.name()? },
        code::OPEN => Op::Open { flags: f.u32()? as i32 },
        code::CREATE => {
            let flags = f.u32()? as i32;
            Op::Create { flags, mode: f.u32()?, umask: f.u32()?, name: rest.name()? }
        }
        code::TMPFILE => Op::Tmpfile { flags: f.u32()? as i32, mode: f.u32()?, umask: f.u32()? },
        code::READ => Op::Read { fh: f.u64()?, at: f.u64()?, len: f.u32()? },
        code::WRITE => {
            const CACHE: u32 = 1 << 0;
            const KILL_SUIDGID: u32 = 1 << 2;
            let (fh, at, len, flags) = (f.u64()?, f.u64()?, f.u32()?, f.u32()?);
            let (kill, page) = (flags & KILL_SUIDGID != 0, flags & CACHE != 0);
            Op::Write { fh, at, kill, page, data: rest.bytes(len)? }
        }
        code::STATFS => Op::Statfs,
        code::RELEASE => {
            const FLOCK_UNLOCK: u32 = 1 << 1;
            let (fh, _flags, release, owner) = (f.u64()?, f.u32()?, f.u32()?, f.u64()?);
            Op::Release { fh, owner, flock: release & FLOCK_UNLOCK != 0 }
        }
        code::FSYNC => Op::Fsync { fh: f.u64()? },
        code::FSYNCDIR => Op::Fsyncdir,
        code::SETXATTR => {
            let (len, flags) = (f.u32()?, f.u32()?);
            Op::Setxattr { flags, name: rest.name()?, value: rest.bytes(len)? }
        }
        code::GETXATTR => Op::Getxattr { room: f.u32()?, name: rest.name()? },
        code::LISTXATTR => Op::Listxattr { room: f.u32()? },
        code::REMOVEXATTR => Op::Removexattr { name: rest.name()? },
        code::FLUSH => {
            let (fh, _unused) = (f.u64()?, f.u64()?);
            Op::Flush { fh, owner: f.u64()? }
        }
        code::READDIR | code::READDIRPLUS => {
            let (_fh, at, room) = (f.u64()?, f.u64()?, f.u32()?);
            Op::Readdir { at, room, plus: opcode == code::READDIRPLUS }
        }
        code::GETLK | code::SETLK | code::SETLKW => Op::Lock(parse_lock(opcode, f)?),
        code::INTERRUPT => Op::Interrupt { unique: f.u64()? },
        code::FALLOCATE => {
            Op::Fallocate { fh: f.u64()?, at: f.u64()?, len: f.u64()?, mode: f.u32()? }
        }
        code::LSEEK => Op::Lseek { fh: f.u64()?, at: f.u64()?, whence: f.u32()? },
        code::COPY_FILE_RANGE | code::COPY_FILE_RANGE_64 => {
            let (from, _nodeid_out) = ((f.u64()?, f.u64()?), f.u64()?);
            let (to, len) = ((f.u64()?, f.u64()?), f.u64()?);
            Op::CopyRange { from, to, len, wide: opcode == code::COPY_FILE_RANGE_64 }
        }
        code::DESTROY => Op::Destroy,
        opcode => Op::Unknown { opcode },
    })
}

/// Bits of `fuse_setattr_in.valid`.
mod fattr {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
}

fn parse_setattr(f: &mut Fields) -> Result<Setattr> {
    let (valid, _padding, _fh) = (f.u32()?, f.u32()?, f.u64()?);
    let (size, _owner) = (f.u64()?, f.u64()?);
    let (atime, mtime, _ctime) = (f.u64()?, f.u64()?, f.u64()?);
    let (atime_ns, mtime_ns, _ctime_ns) = (f.u32()?, f.u32()?, f.u32()?);
    let (mode, _unused, uid, gid) = (f.u32()?, f.u32()?, f.u32()?, f.u32()?);
    let time = |bit, now, sec: u64, nsec: u32| match () {
        () if valid & bit == 0 => Ok(None),
        () if valid & now != 0 => Ok(Some(SetTime::Now)),
        () if nsec >= 1_000_000_000 => Err(Garbled),
        () => Ok(Some(SetTime::At(sec as i64, nsec))),
    };
    let given = |bit, value| (valid & bit != 0).then_some(value);
    Ok(Setattr {
        mode: given(fattr::MODE, mode),
        uid: given(fattr::UID, uid),
        gid: given(fattr::GID, gid),
        size: (valid & fattr::SIZE != 0).then_some(size),
        atime: time(fattr::ATIME, fattr::ATIME_NOW, atime, atime_ns)?,
        mtime: time(fattr::MTIME, fattr::MTIME_NOW, mtime, mtime_ns)?,
    })
}

fn parse_lock(opcode: u32, f: &mut Fields) -> Result<Lock> {
    const LK_FLOCK: u32 = 1 << 0;
    let (fh, owner, start, end) = (f.u64()?, f.u64()?, f.u64()?, f.u64()?);
    let (kind, pid, flags) = (f.u32()?, f.u32()?, f.u32()?);
    let kind = match kind {
        0 => LockType::Read,
        1 => LockType::Write,
        2 => LockType::Unlock,
        _ => return Err(Garbled),
    };
    let end = if end >= OFFSET_MAX { u64::MAX } else { end };
    if end < start {
        return Err(Garbled);
    }
    let (wait, test) = (opcode == code::SETLKW, opcode == code::GETLK);
    Ok(Lock { fh, owner, start, end, kind, pid, flock: flags & LK_FLOCK != 0, wait, test })
}

#[cfg(test)]
mod tests;
