//! What each operation does: unpack, call the filter, encode.
//!
//! Entries and attributes are given to the kernel for good; `device::Kernel` takes them back when
//! a promise is broken. OPENDIR and what else is not known is answered with ENOSYS, so that the
//! kernel opens and lists directories from its own cache, and checks permissions by itself.

use super::abi::reply::{self, Entry, Listing};
use super::abi::{Op, Request, SetTime, Setattr};
use super::adapter::Adapter;
use super::attrs::{When, Wish};
use super::filter::{Filter, Found, Result, Stop};
use super::names::UNKNOWN;
use super::open::Grip;
use super::stop::CAPABILITY_LEN;
use crate::kml::record::{Fid, NAME_LEN_MAX, Time};
use crate::replica::hydrate::CAPABILITY;
use crate::sys::Errno;
use crate::sys::cred::Caller;
use crate::sys::dev_fuse::{SEEK_HOLE, decode_dev};
use crate::sys::fs::{RenameMode, o};

/// How long the kernel keeps what it was given, unless told: a year, s.
const KEEP: u64 = 365 * 86400;
/// Flags of renameat2(2).
const RENAME_NOREPLACE: u32 = 1;
const RENAME_EXCHANGE: u32 = 2;

impl Adapter {
    /// Carries an operation out. Called again, from the start, when it missed; so what must happen
    /// once (a new handle) comes after all that can miss.
    pub(super) fn perform(&self, request: &Request) -> Result<Vec<u8>> {
        let (filter, head) = (&*self.filter, &request.head);
        let fid = Fid(head.nodeid);
        let by = |umask| Caller { uid: head.uid, gid: head.gid, umask };
        match request.op {
            Op::Lookup { name } => lookup(filter, fid, name),
            Op::Getattr => filter.getattr(fid).map(attributes),
            Op::Setattr(set) => filter.setattr(by(0), fid, wish(&set)).map(attributes),
            Op::Readlink => filter.readlink(fid),
            Op::Symlink { name, target } => filter.symlink(by(0), fid, name, target).map(entry),
            Op::Mknod { mode, rdev, umask, name } => {
                filter.mknod(by(umask), fid, name, mode, decode_dev(rdev)).map(entry)
            }
            Op::Mkdir { mode, umask, name } => filter.mkdir(by(umask), fid, name, mode).map(entry),
            Op::Unlink { name } => filter.unlink(by(0), fid, name).map(nothing),
            Op::Rmdir { name } => filter.rmdir(by(0), fid, name).map(nothing),
            Op::Rename { new_dir, flags, name, new_name } => {
                let to = (Fid(new_dir), new_name);
                filter.rename(by(0), (fid, name), to, rename_mode(flags)?).map(nothing)
            }
            Op::Link { old, name } => filter.link(by(0), Fid(old), fid, name).map(entry),
            Op::Open { flags } => {
                let (fh, flags) = self.add(filter.open(by(0), fid, flags)?);
                Ok(reply::open(fh, flags))
            }
            Op::Create { flags, mode, umask, name } => {
                let made = create(filter, by(umask), fid, name, flags, mode)?;
                Ok(self.opened(made))
            }
            Op::Tmpfile { flags, mode, umask } => {
                let made = filter.tmpfile(by(umask), fid, mode, flags)?;
                Ok(self.opened(made))
            }
            Op::Read { fh, at, len } => filter.read(&self.handle(fh)?.open, at, len),
            Op::Write { fh, at, kill, page, data } => {
                let open = &self.handle(fh)?.open;
                filter.write(by(0), open, at, data, (kill, page)).map(reply::size)
            }
            Op::Statfs => Ok(statfs(filter)),
            Op::Flush { fh, .. } => {
                let handle = self.handle(fh)?;
                if handle.writer { filter.store(&handle.open) } else { Ok(()) }.map(nothing)
            }
            Op::Release { fh, .. } => self.close(fh).map(nothing),
            Op::Fsync { fh } => filter.fsync(&self.handle(fh)?.open).map(nothing),
            Op::Fsyncdir => filter.fsync_dir(fid).map(nothing),
            Op::Setxattr { flags, name, value } => {
                filter.setxattr(by(0), fid, name, value, flags).map(nothing)
            }
            // before a write that is to be stopped: then it asks to have the attribute removed
            Op::Getxattr { room: 0, name: CAPABILITY } if filter.stops_kernel(fid) => {
                Ok(reply::size(CAPABILITY_LEN))
            }
            Op::Getxattr { room, name } => {
                value(filter.getxattr(fid, name)?.ok_or(Errno::NODATA)?, room)
            }
            Op::Listxattr { room } => {
                let keys = filter.listxattr(fid)?;
                value(keys.iter().flat_map(|k| k.iter().copied().chain([0])).collect(), room)
            }
            Op::Removexattr { name: CAPABILITY } => {
                filter.let_kernel_write(fid)?;
                match filter.removexattr(by(0), fid, CAPABILITY) {
                    // it was said to be there for that reason alone
                    Err(Stop::Errno(Errno::NODATA)) if filter.is_by_kernel(fid) => Ok(nothing(())),
                    done => done.map(nothing),
                }
            }
            Op::Removexattr { name } => filter.removexattr(by(0), fid, name).map(nothing),
            Op::Readdir { at, room, plus } => list(filter, fid, at, room, plus),
            Op::Fallocate { fh, at, len, mode } => {
                filter.fallocate(&self.handle(fh)?.open, mode, at, len).map(nothing)
            }
            Op::Lseek { fh, at, whence } => {
                let hole = whence == SEEK_HOLE as u32;
                filter.seek(&self.handle(fh)?.open, at, hole).map(reply::offset)
            }
            Op::CopyRange { from, to, len, wide } => {
                let (source, target) = (self.handle(from.0)?, self.handle(to.0)?);
                let copied =
                    filter.copy_range((&source.open, from.1), (&target.open, to.1), len)?;
                Ok(if wide { reply::offset(copied.into()) } else { reply::size(copied) })
            }
            Op::Destroy => Ok(Vec::new()),
            Op::Unknown { .. } => Err(Errno::NOSYS.into()),
            // what the adapter sees to itself
            Op::Forget | Op::Interrupt { .. } | Op::Lock(_) => Err(Errno::IO.into()),
        }
    }

    /// A new object with its first handle.
    fn opened(&self, (found, grip): (Found, Grip)) -> Vec<u8> {
        let (fh, flags) = self.add(grip);
        reply::created(&as_entry(&found), fh, flags)
    }
}

fn as_entry(found: &Found) -> Entry<'_> {
    Entry { ino: found.fid.0, stat: &found.stat, keep: if found.keep { KEEP } else { 0 } }
}

fn entry(found: Found) -> Vec<u8> {
    reply::entry(&as_entry(&found))
}

fn attributes(found: Found) -> Vec<u8> {
    reply::attr(&as_entry(&found))
}

fn nothing((): ()) -> Vec<u8> {
    Vec::new()
}

fn lookup(filter: &Filter, dir: Fid, name: &[u8]) -> Result<Vec<u8>> {
    match filter.lookup(dir, name) {
        // Inode 0: the kernel may keep the absence, too.
        Err(Stop::Errno(Errno::NOENT)) if filter.may_keep_absence(dir) => {
            Ok(reply::entry(&Entry { ino: 0, stat: &Default::default(), keep: KEEP }))
        }
        result => result.map(entry),
    }
}

fn create(
    filter: &Filter,
    by: Caller,
    dir: Fid,
    name: &[u8],
    flags: i32,
    mode: u32,
) -> Result<(Found, Grip)> {
    match filter.create(by, dir, name, mode, flags) {
        // Somebody else made it meanwhile: then it is an open, unless that was forbidden.
        Err(Stop::Errno(Errno::EXIST)) if flags & o::EXCL == 0 => {
            let found = filter.lookup(dir, name)?;
            let grip = filter.open(by, found.fid, flags)?;
            Ok((found, grip))
        }
        done => done,
    }
}

fn list(filter: &Filter, dir: Fid, at: u64, room: u32, plus: bool) -> Result<Vec<u8>> {
    let mut listing = Listing::new(room);
    filter.list(dir, at as i64, |e| {
        let keep = if e.found.keep { KEEP } else { 0 };
        let plus = plus.then_some(keep);
        if e.found.fid == UNKNOWN {
            return listing.add_name(&e.name, &e.found.stat, e.next as u64, plus.is_some());
        }
        listing.add(&e.name, e.found.fid.0, &e.found.stat, e.next as u64, plus)
    })?;
    Ok(listing.into_body())
}

/// A value of an extended attribute, or its length when the application asks with no room.
fn value(value: Vec<u8>, room: u32) -> Result<Vec<u8>> {
    match room as usize {
        0 => Ok(reply::size(value.len() as u32)),
        room if value.len() > room => Err(Errno::RANGE.into()),
        _ => Ok(value),
    }
}

fn rename_mode(flags: u32) -> Result<RenameMode> {
    match flags {
        0 => Ok(RenameMode::Replace),
        RENAME_NOREPLACE => Ok(RenameMode::NoReplace),
        RENAME_EXCHANGE => Ok(RenameMode::Exchange),
        _ => Err(Errno::INVAL.into()),
    }
}

fn wish(set: &Setattr) -> Wish {
    let when = |time| match time {
        SetTime::Now => When::Now,
        SetTime::At(sec, nsec) => When::At(Time { sec, nsec }),
    };
    let Setattr { mode, uid, gid, size, atime, mtime } = *set;
    Wish { mode, uid, gid, size, atime: atime.map(when), mtime: mtime.map(when) }
}

fn statfs(filter: &Filter) -> Vec<u8> {
    let s = filter.lento.space();
    reply::statfs(&reply::Statfs {
        blocks: s.blocks,
        blocks_free: s.blocks_free,
        blocks_available: s.blocks_available,
        files: s.files,
        files_free: s.files_free,
        block_len: s.block_len,
        name_len_max: NAME_LEN_MAX as u32,
    })
}
