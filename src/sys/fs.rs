//! Files by (directory descriptor, name): thin, checked names for the `*at` calls.
//!
//! No call here follows a symbolic link in the last place, and [`open_beneath`] follows none at
//! all, so that nothing leads out of a tree. What rustix has no `*at` form for (extended
//! attributes, chmod of what cannot be opened) goes through `/proc/self/fd`.

use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{
    AtFlags, FallocateFlags, FileType, Gid, Mode, OFlags, RawDir, RenameFlags, ResolveFlags,
    StatxFlags, Timespec, Timestamps, Uid, XattrFlags,
};

use super::Errno;

pub type Result<T> = std::result::Result<T, Errno>;

/// How often, and after which pause, a file is tried that somebody has a lease on: who has it for an
/// instant may lose the processor in it.
const LEASE_TRIES_MAX: u32 = 1000;
const LEASE_PAUSE: Duration = Duration::from_millis(1);

/// What statx says of an object; times as (seconds, nanoseconds) since the Unix epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stat {
    /// file type and permission bits
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub nlink: u32,
    pub rdev: u64,
    pub ino: u64,
    /// bytes
    pub size: u64,
    /// of 512 bytes
    pub blocks: u64,
    pub atime: (i64, u32),
    pub mtime: (i64, u32),
    pub ctime: (i64, u32),
    pub btime: (i64, u32),
}

impl Stat {
    pub fn kind(&self) -> Kind {
        Kind::of(self.mode)
    }
}

/// The type of an object, from its mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    File,
    Dir,
    Symlink,
    Fifo,
    Socket,
    Char,
    Block,
}

impl Kind {
    pub fn of(mode: u32) -> Kind {
        match mode & libc::S_IFMT {
            libc::S_IFDIR => Kind::Dir,
            libc::S_IFLNK => Kind::Symlink,
            libc::S_IFIFO => Kind::Fifo,
            libc::S_IFSOCK => Kind::Socket,
            libc::S_IFCHR => Kind::Char,
            libc::S_IFBLK => Kind::Block,
            _ => Kind::File,
        }
    }
}

/// A time to set: as it is, the clock's, or a given one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SetTime {
    Keep,
    Now,
    At(i64, u32),
}

impl SetTime {
    fn spec(self) -> Timespec {
        match self {
            SetTime::Keep => Timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT as _ },
            SetTime::Now => Timespec { tv_sec: 0, tv_nsec: libc::UTIME_NOW as _ },
            SetTime::At(sec, nsec) => Timespec { tv_sec: sec, tv_nsec: nsec.into() },
        }
    }
}

/// `O_*` flags that callers outside this room need.
pub mod o {
    pub const RDONLY: i32 = libc::O_RDONLY;
    pub const WRONLY: i32 = libc::O_WRONLY;
    pub const RDWR: i32 = libc::O_RDWR;
    pub const ACCMODE: i32 = libc::O_ACCMODE;
    pub const CREAT: i32 = libc::O_CREAT;
    pub const EXCL: i32 = libc::O_EXCL;
    pub const TRUNC: i32 = libc::O_TRUNC;
    pub const APPEND: i32 = libc::O_APPEND;
    pub const PATH: i32 = libc::O_PATH;
    pub const DIRECTORY: i32 = libc::O_DIRECTORY;
    pub const NOFOLLOW: i32 = libc::O_NOFOLLOW;
    pub const NONBLOCK: i32 = libc::O_NONBLOCK;
    pub const TMPFILE: i32 = libc::O_TMPFILE;
}

fn oflags(flags: i32) -> OFlags {
    let flags = OFlags::from_bits_retain(flags as u32) | OFlags::CLOEXEC;
    // openat2(2) takes few flags beside O_PATH
    if flags.contains(OFlags::PATH) { flags } else { flags | OFlags::NOCTTY }
}

/// Opens a directory by an ordinary path, following links: for roots given by the user.
pub fn open_root(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(path, oflags(o::DIRECTORY), Mode::empty())
}

/// Without root, permissions bind us to our own files as well: a file of mode 0444 takes no
/// attribute, one of mode 0 is not even listed. The kernel has checked what applications may; so
/// where a call on an object of ours is refused, the owner's bits of its directory, and then its
/// own, are set while the call is made again, and put back after it.
fn insist<T>(dir: BorrowedFd<'_>, name: &[u8], call: impl Fn() -> Result<T>) -> Result<T> {
    match call() {
        Err(Errno::ACCESS) if !super::cred::is_root() => {}
        result => return result,
    }
    opened_up(dir, b"", || match call() {
        Err(Errno::ACCESS) if !name.is_empty() => opened_up(dir, name, &call),
        result => result,
    })
}

fn opened_up<T>(dir: BorrowedFd<'_>, name: &[u8], call: impl Fn() -> Result<T>) -> Result<T> {
    let flags = if name.is_empty() { AtFlags::EMPTY_PATH } else { AtFlags::empty() };
    let Ok(stat) = of_statx(dir, name, flags) else { return call() };
    let bits = if stat.kind() == Kind::Dir { 0o700 } else { 0o600 };
    let ours = stat.uid == super::cred::own().0 && stat.kind() != Kind::Symlink;
    if !ours || stat.mode & bits == bits {
        return call();
    }
    let object = match name {
        b"" => rustix::fs::openat(dir, ".", oflags(o::PATH), Mode::empty()).or_else(|_| {
            // not searchable: by its descriptor
            rustix::io::dup(dir)
        })?,
        _ => rustix::fs::openat(dir, name, oflags(o::PATH | o::NOFOLLOW), Mode::empty())?,
    };
    chmod_fd(&object, stat.mode | bits)?;
    let result = call();
    chmod_fd(&object, stat.mode)?;
    result
}

/// Opens or creates `name` in `dir`; a symbolic link there is an error (`ELOOP`).
pub fn open(dir: impl AsFd, name: &[u8], flags: i32, mode: u32) -> Result<OwnedFd> {
    let mode = Mode::from_bits_retain(mode & 0o7777);
    let open = || rustix::fs::openat(&dir, name, oflags(flags | o::NOFOLLOW), mode);
    // `EAGAIN`: somebody has a lease on it. Ours (see `has_writer`) last for an instant.
    for _ in 0..LEASE_TRIES_MAX {
        match insist(dir.as_fd(), name, open) {
            Err(Errno::AGAIN) => std::thread::sleep(LEASE_PAUSE),
            done => return done,
        }
    }
    insist(dir.as_fd(), name, open)
}

/// Opens a path of several names below `dir`; neither links nor `..` lead out of it.
pub fn open_beneath(dir: impl AsFd, path: &[u8], flags: i32) -> Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(dir, path, oflags(flags), Mode::empty(), resolve)
}

/// Opens what `fd` refers to again, with other flags.
pub fn reopen(fd: impl AsFd, flags: i32) -> Result<OwnedFd> {
    rustix::fs::open(&*self_path(fd.as_fd(), b""), oflags(flags & !o::NOFOLLOW), Mode::empty())
}

fn self_path(fd: BorrowedFd<'_>, name: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(32 + name.len());
    // Writing to memory does not fail.
    let _ = write!(path, "/proc/self/fd/{}", fd.as_raw_fd());
    if !name.is_empty() {
        path.push(b'/');
        path.extend_from_slice(name);
    }
    path
}

fn of_statx(dir: BorrowedFd<'_>, name: &[u8], flags: AtFlags) -> Result<Stat> {
    let want = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let x = rustix::fs::statx(dir, name, flags | AtFlags::SYMLINK_NOFOLLOW, want)?;
    let time = |t: rustix::fs::StatxTimestamp| (t.tv_sec, t.tv_nsec);
    Ok(Stat {
        mode: x.stx_mode.into(),
        uid: x.stx_uid,
        gid: x.stx_gid,
        nlink: x.stx_nlink,
        rdev: libc::makedev(x.stx_rdev_major, x.stx_rdev_minor),
        ino: x.stx_ino,
        size: x.stx_size,
        blocks: x.stx_blocks,
        atime: time(x.stx_atime),
        mtime: time(x.stx_mtime),
        ctime: time(x.stx_ctime),
        btime: time(x.stx_btime),
    })
}

pub fn stat(dir: impl AsFd, name: &[u8]) -> Result<Stat> {
    insist(dir.as_fd(), b"", || of_statx(dir.as_fd(), name, AtFlags::empty()))
}

pub fn fstat(fd: impl AsFd) -> Result<Stat> {
    of_statx(fd.as_fd(), b"", AtFlags::EMPTY_PATH)
}

/// The inode number of what stands there, asked of the file system itself, not of the kernel's cache.
pub fn look_again(path: &std::path::Path) -> Result<u64> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_FORCE_SYNC;
    Ok(rustix::fs::statx(rustix::fs::CWD, path, flags, StatxFlags::BASIC_STATS)?.stx_ino)
}

pub fn mkdir(dir: impl AsFd, name: &[u8], mode: u32) -> Result<()> {
    let mode = Mode::from_bits_retain(mode & 0o7777);
    insist(dir.as_fd(), b"", || rustix::fs::mkdirat(&dir, name, mode))
}

/// `mode` with its file type bits.
pub fn mknod(dir: impl AsFd, name: &[u8], mode: u32, rdev: u64) -> Result<()> {
    let kind = FileType::from_raw_mode(mode);
    let mode = Mode::from_bits_retain(mode & 0o7777);
    insist(dir.as_fd(), b"", || rustix::fs::mknodat(&dir, name, kind, mode, rdev))
}

pub fn symlink(target: &[u8], dir: impl AsFd, name: &[u8]) -> Result<()> {
    insist(dir.as_fd(), b"", || rustix::fs::symlinkat(target, &dir, name))
}

pub fn link(from: impl AsFd, old: &[u8], to: impl AsFd, new: &[u8]) -> Result<()> {
    insist(from.as_fd(), old, || {
        let link = || rustix::fs::linkat(&from, old, &to, new, AtFlags::empty());
        insist(to.as_fd(), b"", link)
    })
}

/// Gives the open file `fd` a (further) name.
pub fn link_fd(fd: impl AsFd, to: impl AsFd, new: &[u8]) -> Result<()> {
    let path = self_path(fd.as_fd(), b"");
    rustix::fs::linkat(rustix::fs::CWD, &*path, to, new, AtFlags::SYMLINK_FOLLOW)
}

/// How a rename treats what stands at the new name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RenameMode {
    Replace,
    NoReplace,
    Exchange,
}

pub fn rename(
    from: impl AsFd,
    old: &[u8],
    to: impl AsFd,
    new: &[u8],
    mode: RenameMode,
) -> Result<()> {
    let flags = match mode {
        RenameMode::Replace => RenameFlags::empty(),
        RenameMode::NoReplace => RenameFlags::NOREPLACE,
        RenameMode::Exchange => RenameFlags::EXCHANGE,
    };
    // A directory that moves to another one gets a new `..`: it must be writable itself.
    insist(from.as_fd(), old, || {
        insist(to.as_fd(), new, || rustix::fs::renameat_with(&from, old, &to, new, flags))
    })
}

pub fn unlink(dir: impl AsFd, name: &[u8]) -> Result<()> {
    insist(dir.as_fd(), b"", || rustix::fs::unlinkat(&dir, name, AtFlags::empty()))
}

pub fn rmdir(dir: impl AsFd, name: &[u8]) -> Result<()> {
    insist(dir.as_fd(), b"", || rustix::fs::unlinkat(&dir, name, AtFlags::REMOVEDIR))
}

pub fn readlink(dir: impl AsFd, name: &[u8]) -> Result<Vec<u8>> {
    let read = || rustix::fs::readlinkat(&dir, name, Vec::new());
    Ok(insist(dir.as_fd(), b"", read)?.into_bytes())
}

/// Changes permission bits without following a link; an error for a symbolic link itself.
pub fn chmod(dir: impl AsFd, name: &[u8], mode: u32) -> Result<()> {
    let object = open(dir, name, o::PATH, 0)?;
    chmod_fd(object, mode)
}

/// Also of a descriptor opened with `O_PATH`.
pub fn chmod_fd(fd: impl AsFd, mode: u32) -> Result<()> {
    rustix::fs::chmod(&*self_path(fd.as_fd(), b""), Mode::from_bits_retain(mode & 0o7777))
}

pub fn chown(dir: impl AsFd, name: &[u8], uid: Option<u32>, gid: Option<u32>) -> Result<()> {
    let flags = if name.is_empty() { AtFlags::EMPTY_PATH } else { AtFlags::SYMLINK_NOFOLLOW };
    rustix::fs::chownat(dir, name, uid.map(Uid::from_raw), gid.map(Gid::from_raw), flags)
}

pub fn utimes(dir: impl AsFd, name: &[u8], atime: SetTime, mtime: SetTime) -> Result<()> {
    let times = Timestamps { last_access: atime.spec(), last_modification: mtime.spec() };
    let set = || rustix::fs::utimensat(&dir, name, &times, AtFlags::SYMLINK_NOFOLLOW);
    insist(dir.as_fd(), b"", set)
}

pub fn utimes_fd(fd: impl AsFd, atime: SetTime, mtime: SetTime) -> Result<()> {
    let times = Timestamps { last_access: atime.spec(), last_modification: mtime.spec() };
    rustix::fs::futimens(fd, &times)
}

pub fn truncate(fd: impl AsFd, size: u64) -> Result<()> {
    rustix::fs::ftruncate(fd, size)
}

/// `mode`: the bits of fallocate(2).
pub fn fallocate(fd: impl AsFd, mode: u32, at: u64, len: u64) -> Result<()> {
    rustix::fs::fallocate(fd, FallocateFlags::from_bits_retain(mode), at, len)
}

pub fn fsync(fd: impl AsFd) -> Result<()> {
    rustix::fs::fsync(fd)
}

pub fn fdatasync(fd: impl AsFd) -> Result<()> {
    rustix::fs::fdatasync(fd)
}

/// Makes the whole file system of `fd` durable.
pub fn syncfs(fd: impl AsFd) -> Result<()> {
    rustix::fs::syncfs(fd)
}

/// Writes all of it, but blocks of zeros that fall into a hole: a sparse file stays as sparse as it
/// was. What lies beyond the end of the file counts as a hole, and is not made longer for zeros.
pub fn pwrite_sparse(fd: impl AsFd, bytes: &[u8], at: u64) -> Result<()> {
    let fd = fd.as_fd();
    for (at, run, is_zero) in runs(bytes, at) {
        if is_zero {
            let data = seek_sparse(fd, at, false);
            if data == Err(Errno::NXIO) || data.is_ok_and(|data| data >= at + run.len() as u64) {
                continue;
            }
        }
        pwrite_all(fd, run, at)?;
    }
    Ok(())
}

/// Writes all of it; blocks of zeros become a hole, whatever was there, where the file system can.
pub fn pwrite_punching(fd: impl AsFd, bytes: &[u8], at: u64) -> Result<()> {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let fd = fd.as_fd();
    for (at, run, is_zero) in runs(bytes, at) {
        if !is_zero || rustix::fs::fallocate(fd, mode, at, run.len() as u64).is_err() {
            pwrite_all(fd, run, at)?;
        }
    }
    Ok(())
}

/// Blocks of a file that are zeros, and those that are not, as many in a row as there are.
fn runs(bytes: &[u8], at: u64) -> impl Iterator<Item = (u64, &[u8], bool)> {
    const BLOCK_LEN: usize = 4096;
    let is_zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
    let mut done = 0;
    std::iter::from_fn(move || {
        let from = done;
        let mut first = None;
        while done < bytes.len() {
            let into = ((at + done as u64) % BLOCK_LEN as u64) as usize;
            let end = (done + BLOCK_LEN - into).min(bytes.len());
            let zero = is_zero(&bytes[done..end]);
            if *first.get_or_insert(zero) != zero {
                break;
            }
            done = end;
        }
        Some((at + from as u64, &bytes[from..done], first?))
    })
}

/// The next data or hole at or after `at`.
pub fn seek_sparse(fd: impl AsFd, at: u64, hole: bool) -> Result<u64> {
    let from = if hole { rustix::fs::SeekFrom::Hole(at) } else { rustix::fs::SeekFrom::Data(at) };
    rustix::fs::seek(fd, from)
}

pub fn pread(fd: impl AsFd, into: &mut [u8], at: u64) -> Result<usize> {
    rustix::io::pread(fd, into, at)
}

/// Writes all of `bytes`, or says why not.
pub fn pwrite_all(fd: impl AsFd, mut bytes: &[u8], mut at: u64) -> Result<()> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(&fd, bytes, at) {
            Ok(0) => return Err(Errno::IO),
            Ok(n) => (bytes, at) = (&bytes[n..], at + n as u64),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Copies inside the kernel where it can; returns how much, 0 at the end of the source.
pub fn copy_range(
    from: impl AsFd,
    mut at: u64,
    to: impl AsFd,
    mut to_at: u64,
    len: usize,
) -> Result<usize> {
    rustix::fs::copy_file_range(from, Some(&mut at), to, Some(&mut to_at), len)
}

/// One entry of a directory, without `.` and `..`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DirEntry {
    pub name: Vec<u8>,
    /// the entry's `d_type`; `None` where the file system does not say
    pub kind: Option<Kind>,
}

/// The directory once more, with an offset of its own.
fn open_again(dir: BorrowedFd<'_>) -> Result<OwnedFd> {
    insist(dir, b"", || rustix::fs::openat(dir, ".", oflags(o::DIRECTORY), Mode::empty()))
}

/// All entries, in the file system's order. Opens the directory anew: no shared offset.
pub fn read_dir(dir: impl AsFd) -> Result<Vec<DirEntry>> {
    let fd = open_again(dir.as_fd())?;
    let mut buffer = vec![MaybeUninit::uninit(); 32 << 10];
    let mut raw = RawDir::new(fd, &mut buffer);
    let mut entries = Vec::new();
    while let Some(entry) = raw.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            let kind = match entry.file_type() {
                FileType::Unknown => None,
                known => Some(Kind::of(known.as_raw_mode())),
            };
            entries.push(DirEntry { name: name.to_vec(), kind });
        }
    }
    Ok(entries)
}

/// The file type bits of a directory's mode.
pub const DIR_MODE: u32 = libc::S_IFDIR;

/// Entries from `offset` on (0, or what `take` was given for an entry), `.` and `..` too, until
/// `take` says false: `take(name, kind, offset after it)`.
pub fn list_from(
    dir: impl AsFd,
    offset: i64,
    mut take: impl FnMut(&[u8], Option<Kind>, i64) -> bool,
) -> Result<()> {
    let fd = open_again(dir.as_fd())?;
    if offset != 0 {
        rustix::fs::seek(&fd, rustix::fs::SeekFrom::Start(offset as u64))?;
    }
    let mut buffer = [MaybeUninit::uninit(); 16 << 10];
    let mut raw = RawDir::new(fd, &mut buffer);
    while let Some(entry) = raw.next() {
        let entry = entry?;
        let kind = match entry.file_type() {
            FileType::Unknown => None,
            known => Some(Kind::of(known.as_raw_mode())),
        };
        if !take(entry.file_name().to_bytes(), kind, entry.next_entry_cookie() as i64) {
            break;
        }
    }
    Ok(())
}

/// Total and free room, as statvfs has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Space {
    /// bytes
    pub block_len: u32,
    pub blocks: u64,
    pub blocks_free: u64,
    pub blocks_available: u64,
    pub files: u64,
    pub files_free: u64,
}

pub fn space(fd: impl AsFd) -> Result<Space> {
    let v = rustix::fs::fstatvfs(fd)?;
    Ok(Space {
        block_len: v.f_frsize as u32,
        blocks: v.f_blocks,
        blocks_free: v.f_bfree,
        blocks_available: v.f_bavail,
        files: v.f_files,
        files_free: v.f_ffree,
    })
}

/// Extended attributes of `name` in `dir`, or of the open object `dir` itself when `name` is empty
/// (then not opened with `O_PATH`).
pub mod xattr {
    use super::*;

    /// `None` when there is no such attribute.
    pub fn get(dir: impl AsFd, name: &[u8], key: &[u8]) -> Result<Option<Vec<u8>>> {
        let get = |mut value: Vec<u8>| {
            let len = if name.is_empty() {
                rustix::fs::fgetxattr(&dir, key, &mut value[..])?
            } else {
                rustix::fs::lgetxattr(&*self_path(dir.as_fd(), name), key, &mut value[..])?
            };
            value.truncate(len);
            Ok(value)
        };
        let got = match insist(dir.as_fd(), name, || get(vec![0u8; 256])) {
            Err(Errno::RANGE) => insist(dir.as_fd(), name, || get(vec![0u8; 65536])),
            got => got,
        };
        match got {
            Err(Errno::NODATA) => Ok(None),
            got => got.map(Some),
        }
    }

    /// `flags`: 0, XATTR_CREATE (1) or XATTR_REPLACE (2).
    pub fn set(dir: impl AsFd, name: &[u8], key: &[u8], value: &[u8], flags: u32) -> Result<()> {
        let flags = XattrFlags::from_bits_retain(flags);
        insist(dir.as_fd(), name, || {
            if name.is_empty() {
                rustix::fs::fsetxattr(&dir, key, value, flags)
            } else {
                rustix::fs::lsetxattr(&*self_path(dir.as_fd(), name), key, value, flags)
            }
        })
    }

    pub fn remove(dir: impl AsFd, name: &[u8], key: &[u8]) -> Result<()> {
        insist(dir.as_fd(), name, || {
            if name.is_empty() {
                rustix::fs::fremovexattr(&dir, key)
            } else {
                rustix::fs::lremovexattr(&*self_path(dir.as_fd(), name), key)
            }
        })
    }

    /// All keys, in the file system's order.
    pub fn list(dir: impl AsFd, name: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut keys = vec![0u8; 1024];
        loop {
            let got = if name.is_empty() {
                rustix::fs::flistxattr(&dir, &mut keys[..])
            } else {
                rustix::fs::llistxattr(&*self_path(dir.as_fd(), name), &mut keys[..])
            };
            match got {
                Ok(len) => {
                    let split = keys[..len].split(|b| *b == 0);
                    return Ok(split.filter(|k| !k.is_empty()).map(<[u8]>::to_vec).collect());
                }
                Err(Errno::RANGE) if keys.len() < 65536 => keys.resize(65536, 0),
                Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
                Err(e) => return Err(e),
            }
        }
    }
}

/// Takes the exclusive lock of an open file; false when another process holds it.
pub fn try_lock(fd: impl AsFd) -> Result<bool> {
    match rustix::fs::flock(fd, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(e) => Err(e),
    }
}
