//! Operations on the entries of directories: look up, list, make, link, rename, remove.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::filter::{Filter, Found, Result, Spot, done, shown};
use super::open::Grip;
use crate::kml::record::{Fid, Gone, Name, Op, Over, TARGET_LEN_MAX};
use crate::lento::rights::Mode;
use crate::replica::meta::Meta;
use crate::replica::ops::attr_of;
use crate::replica::tree::{Dir, LIMBO, TreeError};
use crate::sys::Errno;
use crate::sys::cred::Caller;
use crate::sys::fs::{self, Kind, RenameMode, Stat};

/// The fid of what stands in a listing and cannot be told: none that is ever given.
pub const UNKNOWN: Fid = LIMBO;

/// One entry of a listing.
pub struct Listed {
    pub name: Vec<u8>,
    pub found: Found,
    /// where the listing goes on after this entry
    pub next: i64,
}

impl Filter {
    /// `ENOENT` from a directory that is all here is as good as an entry: it may be kept.
    pub fn lookup(&self, parent: Fid, name: &[u8]) -> Result<Found> {
        let dir = self.dir_here(parent)?;
        // imz's own names are not there for anybody.
        let name = self.name(parent, name).map_err(hide)?;
        let (stat, meta) = self.entry_here(&dir, &name)?;
        self.whole_for_kernel(&meta)?;
        let found = self.found(stat, &meta);
        Ok(Found { keep: found.keep && self.keeps(&dir), ..found })
    }

    /// Whether the kernel may keep what the directory contains.
    fn keeps(&self, dir: &Dir) -> bool {
        self.cache.current(&dir.meta()) && self.may(dir.fid, Mode::Read)
    }

    /// Whether the kernel may be told for good that a name is not in the directory.
    pub fn may_keep_absence(&self, dir: Fid) -> bool {
        self.forgets_names.load(Ordering::Relaxed)
            && self.cache.tree.dir(dir).is_ok_and(|dir| self.keeps(&dir))
    }

    /// Entries of the directory from `offset` on, until `take` says false. `.` and `..` too.
    pub fn list(&self, fid: Fid, offset: i64, mut take: impl FnMut(Listed) -> bool) -> Result<()> {
        let dir = self.dir_here(fid)?;
        let (mut stop, mut any) = (None, false);
        fs::list_from(&*dir, offset, |name, kind, next| {
            let listed = self.listed(&dir, name, kind, next);
            match listed {
                Ok(Some(listed)) => {
                    any = true;
                    take(listed)
                }
                Ok(None) => true,
                Err(e) => {
                    stop = Some(e);
                    false
                }
            }
        })?;
        // What was listed counts; the error comes again with the next call, as its first.
        stop.filter(|_| !any).map_or(Ok(()), Err)
    }

    fn listed(
        &self,
        dir: &Dir,
        name: &[u8],
        kind: Option<Kind>,
        next: i64,
    ) -> Result<Option<Listed>> {
        let found = match name {
            b"." => self.found(fs::fstat(dir)?, &dir.meta()),
            b".." => {
                let up = self.cache.tree.names(dir.fid)?.pop().map_or(dir.fid, |(up, _)| up);
                let stat = Stat { ino: up.0, mode: fs::DIR_MODE, ..Stat::default() };
                Found { fid: up, stat, keep: false }
            }
            _ => {
                let Ok(name) = self.name(dir.fid, name) else { return Ok(None) };
                let tree = &self.cache.tree;
                let meta = match tree.meta(dir, &name) {
                    Ok(Some(meta)) => Some(meta),
                    Ok(None) => return Ok(None),
                    Err(TreeError::BadMeta(_)) => None,
                    Err(e) => return Err(e.into()),
                };
                let stat = match fs::stat(dir, name.as_bytes()) {
                    Ok(stat) => stat,
                    Err(Errno::NOENT) => return Ok(None),
                    Err(e) => return Err(e.into()),
                };
                let placed = |meta: &Meta| tree.is_placed(dir, &name, meta.fid, stat.ino);
                let known = match meta {
                    Some(meta) => placed(&meta)?.then_some(meta),
                    None => None,
                };
                let Some(meta) = known else {
                    // One that is damaged is named; who looks at it hears of it.
                    let found = Found { fid: UNKNOWN, stat, keep: false };
                    return Ok(Some(Listed { name: name.as_bytes().to_vec(), found, next }));
                };
                let found = self.found(stat, &meta);
                let is_same = kind.is_none_or(|k| k == found.stat.kind());
                let keep = found.keep && is_same && self.keeps(dir);
                Found { keep, ..found }
            }
        };
        Ok(Some(Listed { name: name.to_vec(), found, next }))
    }

    /// Makes a regular file and opens it.
    pub fn create(
        &self,
        by: Caller,
        parent: Fid,
        name: &[u8],
        mode: u32,
        flags: i32,
    ) -> Result<(Found, Grip)> {
        let _names = self.cache.tree.lock(&[parent]);
        let (dir, name) = self.new_place(parent, name)?;
        let meta = self.new_meta()?;
        let op = Op::Create { at: self.place(&dir, &name), fid: meta.fid, mode, umask: by.umask };
        let path = self.cache.tree.path_of(&dir, &name);
        self.change(by, path, op, |when| {
            let fd = self.cache.tree.create(&dir, &name, by, mode, &meta, when)?;
            self.open_new(fd, &meta, flags)
        })
    }

    /// A directory that is all here, and a name for it. Whether the name is taken says the tree.
    fn new_place(&self, parent: Fid, name: &[u8]) -> Result<(Arc<Dir>, Name)> {
        Ok((self.dir_here(parent)?, self.name(parent, name)?))
    }

    pub fn mkdir(&self, by: Caller, parent: Fid, name: &[u8], mode: u32) -> Result<Found> {
        let _names = self.cache.tree.lock(&[parent]);
        let (dir, name) = self.new_place(parent, name)?;
        let meta = self.new_meta()?;
        let op = Op::Mkdir { at: self.place(&dir, &name), fid: meta.fid, mode, umask: by.umask };
        let path = self.cache.tree.path_of(&dir, &name);
        self.change(by, path, op, |when| {
            let made = self.cache.tree.mkdir(&dir, &name, by, mode, &meta, when)?;
            Ok(self.found(fs::fstat(&*made)?, &meta))
        })
    }

    pub fn symlink(&self, by: Caller, parent: Fid, name: &[u8], target: &[u8]) -> Result<Found> {
        if target.len() > TARGET_LEN_MAX {
            return Err(Errno::NAMETOOLONG.into());
        }
        let _names = self.cache.tree.lock(&[parent]);
        let (dir, name) = self.new_place(parent, name)?;
        let meta = self.new_meta()?;
        let (at, fid) = (self.place(&dir, &name), meta.fid);
        let op = Op::Symlink { at, fid, target: target.to_vec() };
        let path = self.cache.tree.path_of(&dir, &name);
        self.change(by, path, op, |when| {
            self.cache.tree.symlink(&dir, &name, by, target, &meta, when)?;
            Ok(self.found(fs::stat(&*dir, name.as_bytes())?, &meta))
        })
    }

    /// `mode` with its file type bits; a regular file is a create.
    pub fn mknod(
        &self,
        by: Caller,
        parent: Fid,
        name: &[u8],
        mode: u32,
        rdev: u64,
    ) -> Result<Found> {
        let _names = self.cache.tree.lock(&[parent]);
        let (dir, name) = self.new_place(parent, name)?;
        let meta = self.new_meta()?;
        let (at, fid, umask) = (self.place(&dir, &name), meta.fid, by.umask);
        let op = match Kind::of(mode) {
            Kind::File => Op::Create { at, fid, mode: mode & 0o7777, umask },
            _ => Op::Mknod { at, fid, mode, umask, rdev },
        };
        let path = self.cache.tree.path_of(&dir, &name);
        self.change(by, path, op, |when| {
            self.cache.tree.mknod(&dir, &name, by, mode, rdev, &meta, when)?;
            Ok(self.found(fs::stat(&*dir, name.as_bytes())?, &meta))
        })
    }

    pub fn link(&self, by: Caller, fid: Fid, parent: Fid, name: &[u8]) -> Result<Found> {
        let names = self.cache.tree.lock(&[parent]);
        let locked = self.cache.tree.lock_objects(&[fid]);
        let object = self.here(fid)?;
        let (dir, name) = self.new_place(parent, name)?;
        if object.is_nameless() {
            let found = self.link_nameless(&object, &dir, &name)?;
            drop((names, locked));
            return match &object.spot {
                Spot::Open(open) => done(|| self.store(open)).map(|()| found),
                _ => Ok(found),
            };
        }
        if object.stat.kind() == Kind::Dir {
            return Err(Errno::PERM.into());
        }
        let (old_dir, old) = self.cache.tree.place(fid).map_err(|_| Errno::NOENT)?;
        let (at, base) = (self.place(&dir, &name), object.meta.stamp);
        let path = self.cache.tree.path_of(&dir, &name);
        self.change(by, path, Op::Link { at, fid, base }, |when| {
            self.cache.tree.link((&old_dir, &old), fid, &dir, &name, when)?;
            let meta = self.count_names(&dir, &name, 1)?;
            Ok(self.found(fs::stat(&*dir, name.as_bytes())?, &meta))
        })
    }

    /// Keeps the server's count of names in step, where it is kept.
    fn count_names(&self, dir: &Dir, name: &Name, by: i32) -> Result<Meta> {
        let tree = &self.cache.tree;
        let mut meta = tree.meta(dir, name)?.ok_or(Errno::STALE)?;
        if meta.nlink > 0 {
            meta.nlink = meta.nlink.saturating_add_signed(by);
            tree.set_meta(dir, name, &meta)?;
        }
        Ok(meta)
    }

    pub fn unlink(&self, by: Caller, parent: Fid, name: &[u8]) -> Result<()> {
        let _names = self.cache.tree.lock(&[parent]);
        let dir = self.dir_here(parent)?;
        let name = self.name(parent, name)?;
        let (stat, meta) = self.entry_here(&dir, &name)?;
        if stat.kind() == Kind::Dir {
            return Err(Errno::ISDIR.into());
        }
        let _object = self.cache.tree.lock_objects(&[meta.fid]);
        let gone = self.gone(&dir, &name, &stat, &meta)?;
        let op = Op::Unlink { at: self.place(&dir, &name), gone };
        let path = self.cache.tree.path_of(&dir, &name);
        self.change(by, path, op, |when| {
            self.before_loss(&dir, &name, &stat, &meta)?;
            self.cache.tree.unlink(&dir, &name, meta.fid, when)?;
            self.note_gone(&stat);
            Ok(())
        })
    }

    /// An object that is about to lose a name, as undo needs it.
    fn gone(&self, dir: &Dir, name: &Name, stat: &Stat, meta: &Meta) -> Result<Gone> {
        let target = match stat.kind() {
            Kind::Symlink => Some(fs::readlink(dir, name.as_bytes())?),
            _ => None,
        };
        // With the server's count of names: what is no last name must not pass for one.
        let attr = attr_of(&shown(*stat, meta));
        Ok(Gone { fid: meta.fid, base: meta.stamp, attr, target })
    }

    pub fn rmdir(&self, by: Caller, parent: Fid, name: &[u8]) -> Result<()> {
        let _names = self.cache.tree.lock(&[parent]);
        let dir = self.dir_here(parent)?;
        let name = self.name(parent, name)?;
        let (stat, meta) = self.entry_here(&dir, &name)?;
        if stat.kind() != Kind::Dir {
            return Err(Errno::NOTDIR.into());
        }
        self.dir_here(meta.fid)?; // whether it is empty can be seen only when all is here
        let _object = self.cache.tree.lock_objects(&[meta.fid]);
        let gone = self.gone(&dir, &name, &stat, &meta)?;
        let op = Op::Rmdir { at: self.place(&dir, &name), gone };
        let path = self.cache.tree.path_of(&dir, &name);
        self.change(by, path, op, |when| Ok(self.cache.tree.rmdir(&dir, &name, meta.fid, when)?))
    }

    pub fn rename(
        &self,
        by: Caller,
        from: (Fid, &[u8]),
        to: (Fid, &[u8]),
        mode: RenameMode,
    ) -> Result<()> {
        let _names = self.cache.tree.lock(&[from.0, to.0]);
        let (old_dir, new_dir) = (self.dir_here(from.0)?, self.dir_here(to.0)?);
        let (old, new) = (self.name(from.0, from.1)?, self.name(to.0, to.1)?);
        let (stat, meta) = self.entry_here(&old_dir, &old)?;
        let fid = meta.fid;
        let there = match self.entry(&new_dir, &new)? {
            Some(_) => Some(self.entry_here(&new_dir, &new)?),
            None => None,
        };
        let other = there.as_ref().map(|(_, meta)| meta.fid);
        if other == Some(fid) {
            return Ok(()); // two names of one object: POSIX leaves both
        }
        let over = match (&there, mode) {
            (None, RenameMode::Exchange) => return Err(Errno::NOENT.into()),
            (None, _) => Over::Nothing { noreplace: mode == RenameMode::NoReplace },
            (Some(_), RenameMode::NoReplace) => return Err(Errno::EXIST.into()),
            (Some((_, m)), RenameMode::Exchange) => Over::Exchanged { fid: m.fid, base: m.stamp },
            (Some((s, m)), RenameMode::Replace) => {
                if s.kind() == Kind::Dir && stat.kind() == Kind::Dir {
                    self.dir_here(m.fid)?; // only an empty directory is replaced
                }
                Over::Replaced(self.gone(&new_dir, &new, s, m)?)
            }
        };
        let _objects = self.cache.tree.lock_objects(&[fid, other.unwrap_or(fid)]);
        let (at, dest) = (self.place(&old_dir, &old), self.place(&new_dir, &new));
        let op = Op::Rename { from: at, to: dest, fid, base: meta.stamp, over };
        let path = self.cache.tree.path_of(&old_dir, &old);
        self.change(by, path, op, |when| {
            if let (RenameMode::Replace, Some((s, m))) = (mode, &there) {
                self.before_loss(&new_dir, &new, s, m)?;
            }
            let (from, to) = ((&*old_dir, &old), (&*new_dir, &new));
            self.cache.tree.rename(from, to, fid, other, mode, when)?;
            if let (RenameMode::Replace, Some((stat, _))) = (mode, &there) {
                self.note_gone(stat);
            }
            Ok(())
        })
    }

    /// An object is about to lose a name, and the server has others. It is counted also on what then
    /// has no name here: it may come back by another one. Of the contents, what the server lacks is
    /// kept until it is shipped.
    fn before_loss(&self, dir: &Dir, name: &Name, stat: &Stat, meta: &Meta) -> Result<()> {
        if stat.kind() == Kind::Dir || meta.nlink <= 1 {
            return Ok(());
        }
        self.count_names(dir, name, -1)?;
        let is_last = stat.kind() == Kind::File && stat.nlink == 1;
        let is_wanted =
            || self.cache.written(meta.fid).is_some() || self.cache.pending().is_dirty(meta.fid);
        if is_last && is_wanted() {
            self.cache.keep(dir, name, meta.fid)?;
        }
        Ok(())
    }

    /// A name went: with the last one the room is free again.
    fn note_gone(&self, before: &Stat) {
        if before.nlink == 1 && before.kind() == Kind::File {
            self.cache.note_held(0, before.blocks * 512);
        }
    }

    pub fn readlink(&self, fid: Fid) -> Result<Vec<u8>> {
        let object = self.here(fid)?;
        Ok(fs::readlink(&object, object.at())?)
    }
}

/// A name that nobody may use does not exist for who asks.
fn hide(stop: super::filter::Stop) -> super::filter::Stop {
    match stop {
        super::filter::Stop::Errno(Errno::ACCESS) => Errno::NOENT.into(),
        other => other,
    }
}
