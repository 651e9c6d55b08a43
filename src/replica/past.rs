//! What a record replaces, as the served tree has it: the history's undo data are the tree's.
//!
//! A client's record says what the client had. Its optimiser leaves out what it made void: a file
//! whose mode was changed and that was then removed is just removed, and the record has the mode
//! that the server never saw. Undoing the history (replay) must end where the history began.

use super::ops::attr_of;
use super::tree::TreeError;
use super::volume::{Result, Volume, VolumeError};
use crate::kml::record::{Change, Fid, Gone, Op, Over, Place, ROOT, Record};
use crate::sys::fs::{self, Kind};

impl Volume {
    /// Puts what the tree has now for what the client had.
    ///
    /// # Errors
    /// The tree cannot be read. What is not there is no error: the operation itself will say so.
    pub(super) fn note_past(&mut self, record: &mut Record) -> Result<()> {
        match &mut record.op {
            Op::Unlink { at, gone } | Op::Rmdir { at, gone } => self.note_gone(at, gone),
            Op::Rename { to, over: Over::Replaced(gone), .. } => self.note_gone(to, gone),
            Op::Setattr { fid, new, old, .. } => {
                let Some(stat) = self.stat_of(*fid)? else { return Ok(()) };
                let was = attr_of(&stat);
                *old = Change {
                    mode: new.mode.map(|_| was.mode & 0o7777),
                    uid: new.uid.map(|_| was.uid),
                    gid: new.gid.map(|_| was.gid),
                    size: new.size.map(|_| was.size),
                    atime: new.atime.map(|_| was.atime),
                    mtime: new.mtime.map(|_| was.mtime),
                };
                Ok(())
            }
            Op::Setxattr { fid, name, old, .. } | Op::Removexattr { fid, name, old, .. } => {
                if let Ok((dir, at)) = self.object_path(*fid)
                    && let Ok(was) = fs::xattr::get(&*dir, &at, name)
                {
                    *old = was;
                }
                Ok(())
            }
            Op::Store { fid, old_size, .. } => {
                if let Some(stat) = self.stat_of(*fid)? {
                    *old_size = stat.size;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn note_gone(&mut self, at: &Place, gone: &mut Gone) -> Result<()> {
        let Ok(Some((meta, stat))) = self.standing(at)? else { return Ok(()) };
        if meta.fid == gone.fid {
            gone.attr = attr_of(&stat);
            if stat.kind() == Kind::Symlink {
                let dir = self.dir(at.dir)?;
                gone.target = Some(fs::readlink(&*dir, at.name.as_bytes())?);
            }
        }
        Ok(())
    }

    fn stat_of(&self, fid: Fid) -> Result<Option<fs::Stat>> {
        if fid == ROOT {
            return Ok(Some(fs::fstat(&**self.tree.root())?));
        }
        match self.tree.place(fid) {
            Ok((dir, name)) => Ok(fs::stat(&*dir, name.as_bytes()).ok()),
            Err(TreeError::Gone(_)) => Ok(None),
            Err(e) => Err(VolumeError::from(e)),
        }
    }
}
