//! Carrying out records on a tree: of a volume (apply.rs), or of any other (replay.rs).
//!
//! What a record says is done, and stamped on what it touches; whether it fits was decided before.
//! Objects are made as the record's user. Contents are the caller's: of a store only the stamp is
//! noted here.

use std::collections::HashMap;
use std::sync::Arc;

use super::apply::{noted, restamped};
use super::meta::Meta;
use super::ops::time_of_ns;
use super::tree::{self, Dir, Tree, TreeError};
use super::volume::{Result, VolumeError};
use crate::kml::record::{Change, Fid, Op, Over, Place, ROOT, Record, Stamp, Time};
use crate::sys::cred::{self, Caller};
use crate::sys::{Errno, fs};

/// What is needed to carry out records.
pub(super) struct Hands<'a> {
    pub tree: &'a Tree,
    /// directories whose entries were changed, by whom and at which stamp
    pub touched: &'a mut HashMap<Fid, (u32, Stamp)>,
}

impl Hands<'_> {
    /// Does what a record says. The parent directories get their stamps later.
    pub fn perform(&mut self, record: &Record, stamp: Stamp) -> Result<()> {
        let node = record.origin.node;
        let when = time_of_ns(record.time_ns);
        match &record.op {
            Op::Noop => {}
            Op::Create { at, fid, .. }
            | Op::Mkdir { at, fid, .. }
            | Op::Symlink { at, fid, .. }
            | Op::Mknod { at, fid, .. } => self.make(record, at, *fid, stamp)?,
            Op::Link { at, fid, .. } => {
                let (from, old) = self.tree.place(*fid)?;
                let dir = self.dir(at.dir)?;
                self.tree.link((&from, &old), *fid, &dir, &at.name, when)?;
                self.tree.edit_meta(*fid, |meta| noted(meta, node, stamp))?;
            }
            Op::Rename { from, to, fid, over, .. } => {
                self.rename((from, to), *fid, over, when)?;
                self.tree.edit_meta(*fid, |meta| noted(meta, node, stamp))?;
                if let Some(other) = record.op.other() {
                    self.restamp_rest(other, node, stamp)?;
                }
            }
            Op::Unlink { at, gone } => {
                let dir = self.dir(at.dir)?;
                self.tree.unlink(&dir, &at.name, gone.fid, when)?;
                self.restamp_rest(gone.fid, node, stamp)?;
            }
            Op::Rmdir { at, gone } => {
                let dir = self.dir(at.dir)?;
                self.tree.rmdir(&dir, &at.name, gone.fid, when)?;
            }
            Op::Setattr { fid, new, .. } => {
                let (dir, name) = object_path(self.tree, *fid)?;
                let new = if cred::is_root() {
                    *new
                } else {
                    Change { uid: None, gid: None, ..*new } // owners are root's to change
                };
                self.tree.setattr(&*dir, &name, &new)?;
                let is_data = new.size.is_some();
                self.tree.edit_meta(*fid, |meta| match is_data {
                    true => restamped(meta, node, stamp),
                    false => noted(meta, node, stamp),
                })?;
            }
            Op::Setxattr { fid, name, value, .. } => {
                let (dir, at) = object_path(self.tree, *fid)?;
                fs::xattr::set(&*dir, &at, name, value, 0).map_err(TreeError::from)?;
                self.tree.edit_meta(*fid, |meta| noted(meta, node, stamp))?;
            }
            Op::Removexattr { fid, name, .. } => {
                let (dir, at) = object_path(self.tree, *fid)?;
                match fs::xattr::remove(&*dir, &at, name) {
                    Ok(()) | Err(Errno::NODATA) => {}
                    Err(e) => return Err(e.into()),
                }
                self.tree.edit_meta(*fid, |meta| noted(meta, node, stamp))?;
            }
            Op::Store { fid, .. } => self.tree.edit_meta(*fid, |m| restamped(m, node, stamp))?,
        }
        for place in record.op.places().into_iter().flatten() {
            self.touched.insert(place.dir, (node, stamp));
        }
        Ok(())
    }

    /// Both times of a new object are the record's, as on the node that made it.
    fn make(&mut self, record: &Record, at: &Place, fid: Fid, stamp: Stamp) -> Result<()> {
        let dir = self.dir(at.dir)?;
        let meta = Meta::made(fid, record.origin.node, stamp);
        let by = |umask: u32| Caller { uid: record.uid, gid: record.gid, umask: umask & 0o777 };
        let when = time_of_ns(record.time_ns);
        let (tree, name) = (self.tree, &at.name);
        match &record.op {
            Op::Create { mode, umask, .. } => {
                tree.create(&dir, name, by(*umask), *mode, &meta, when).map(drop)
            }
            Op::Mkdir { mode, umask, .. } => {
                tree.mkdir(&dir, name, by(*umask), *mode, &meta, when).map(drop)
            }
            Op::Symlink { target, .. } => tree.symlink(&dir, name, by(0), target, &meta, when),
            Op::Mknod { mode, umask, rdev, .. } => {
                tree.mknod(&dir, name, by(*umask), *mode, *rdev, &meta, when)
            }
            _ => Ok(()),
        }?;
        Ok(())
    }

    fn rename(
        &mut self,
        (from, to): (&Place, &Place),
        fid: Fid,
        over: &Over,
        when: Time,
    ) -> Result<()> {
        let (old, new) = (self.dir(from.dir)?, self.dir(to.dir)?);
        let other = match self.tree.meta(&new, &to.name) {
            Err(TreeError::Os(Errno::NOENT)) => None,
            there => there?.map(|meta| meta.fid),
        };
        let mode = match over {
            Over::Nothing { .. } => fs::RenameMode::NoReplace,
            Over::Replaced(_) => fs::RenameMode::Replace,
            Over::Exchanged { .. } => fs::RenameMode::Exchange,
        };
        Ok(self.tree.rename((&old, &from.name), (&new, &to.name), fid, other, mode, when)?)
    }

    fn dir(&self, fid: Fid) -> Result<Arc<Dir>> {
        match self.tree.dir(fid) {
            Err(TreeError::Os(Errno::NOTDIR)) => Err(VolumeError::NotADir),
            found => Ok(found?),
        }
    }
    /// An object lost one of its names; it may have others.
    fn restamp_rest(&self, fid: Fid, node: u32, stamp: Stamp) -> Result<()> {
        if self.tree.names(fid)?.is_empty() {
            return Ok(());
        }
        match self.tree.edit_meta(fid, |meta| noted(meta, node, stamp)) {
            Ok(()) | Err(TreeError::Gone(_)) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
    /// Gives the directories whose entries changed the stamp of the last change.
    pub fn flush_touched(&mut self) -> Result<()> {
        let mut all = Ok(());
        for (fid, (node, stamp)) in std::mem::take(self.touched) {
            match self.tree.edit_meta(fid, |meta| restamped(meta, node, stamp)) {
                Ok(()) | Err(TreeError::Gone(_)) => {} // it was removed later on
                Err(e) => all = all.and(Err(e.into())),
            }
        }
        all
    }
}

/// Where an object is, for calls that take a directory and a name (empty: the directory).
pub(super) fn object_path(tree: &Tree, fid: Fid) -> tree::Result<(Arc<Dir>, Vec<u8>)> {
    if fid == ROOT {
        return Ok((tree.root().clone(), Vec::new()));
    }
    let (dir, name) = tree.place(fid)?;
    Ok((dir, name.as_bytes().to_vec()))
}
