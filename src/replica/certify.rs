//! Certification: whether a client's record still fits the tree it was not made on.
//!
//! Names for directories: two clients may make different names in one directory. Stamps for the
//! contents and attributes of everything else: a record of node n, based on a stamp, is current
//! when nobody else has changed the object after that stamp. An outcome that is there already is no
//! conflict, and no change: the same object at the name, the same contents, a name that is gone.
//! Nothing here changes the tree, but that objects which are seen for the first time get a fid.

use std::os::fd::OwnedFd;

use super::apply::Content;
use super::meta::Meta;
use super::tree::{Dir, TreeError, is_own};
use super::volume::{Result, Volume, VolumeError};
use crate::kml::record::{self, Fid, Name, Op, Over, Place, ROOT, Range, Record, Seq, Stamp};
use crate::sys::{Errno, fs};

/// Why a record does not fit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Clash {
    #[error("its directory is gone")]
    DirGone,
    #[error("the object is gone")]
    Gone,
    #[error("the name is taken by another object")]
    NameTaken,
    #[error("the name stands for another object now")]
    OtherObject,
    #[error("somebody else has changed the object meanwhile")]
    Changed,
    #[error("the name belongs to imz")]
    OwnName,
    #[error("the number of the object was given by another node")]
    ForeignFid,
    #[error("the file system refuses it: {0}")]
    Refused(Errno),
}

/// What to do with a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    Apply,
    /// the outcome is there already
    Same,
    /// the client's object is this one, which stands there already
    Alias(Fid),
    Conflict(Clash),
}

use Verdict::{Alias, Apply, Conflict, Same};

/// Whether nobody but `node` has changed the object after `base`.
fn is_current(meta: &Meta, node: u32, base: Stamp) -> bool {
    base >= if meta.author == node { meta.foreign } else { meta.stamp }
}

impl Volume {
    /// # Errors
    /// The tree cannot be read; nothing is decided.
    pub(super) fn certify(
        &mut self,
        (node, seq): (u32, Seq),
        record: &Record,
        content: Content<'_>,
    ) -> Result<Verdict> {
        for place in record.op.places().into_iter().flatten() {
            if place.dir == ROOT && is_own(place.name.as_bytes()) {
                return Ok(Conflict(Clash::OwnName));
            }
        }
        match &record.op {
            Op::Noop => Ok(Same),
            Op::Create { at, fid, .. } => self.certify_new(node, at, *fid, None),
            Op::Mkdir { at, fid, .. } => {
                self.certify_new(node, at, *fid, Some((fs::Kind::Dir, b"")))
            }
            Op::Symlink { at, fid, target } => {
                self.certify_new(node, at, *fid, Some((fs::Kind::Symlink, target)))
            }
            Op::Mknod { at, fid, .. } => self.certify_new(node, at, *fid, None),
            Op::Link { at, fid, .. } => match self.standing(at)? {
                Err(clash) => Ok(Conflict(clash)),
                Ok(Some((meta, _))) if meta.fid == *fid => Ok(Same),
                Ok(Some(_)) => Ok(Conflict(Clash::NameTaken)),
                Ok(None) => Ok(self.certify_there(*fid, |_, _| Apply)?.0),
            },
            Op::Rename { from, to, fid, over, .. } => {
                self.certify_rename(node, (from, to), *fid, over)
            }
            Op::Unlink { at, gone } | Op::Rmdir { at, gone } => {
                self.certify_removal(node, at, gone)
            }
            Op::Setattr { fid, base, new, .. } => {
                let judge = |meta: &Meta, stat: &fs::Stat| {
                    let last_wins = stat.kind() == fs::Kind::Dir;
                    if last_wins || is_current(meta, node, *base) {
                        Apply
                    } else if is_set(new, stat) {
                        Same
                    } else {
                        Conflict(Clash::Changed)
                    }
                };
                Ok(self.certify_there(*fid, judge)?.0)
            }
            Op::Setxattr { fid, base, name, .. } | Op::Removexattr { fid, base, name, .. } => {
                if name == self.tree.own_key() {
                    return Ok(Conflict(Clash::OwnName));
                }
                let judge = |meta: &Meta, stat: &fs::Stat| {
                    let last_wins = stat.kind() == fs::Kind::Dir;
                    let fits = last_wins || is_current(meta, node, *base);
                    if fits { Apply } else { Conflict(Clash::Changed) }
                };
                Ok(self.certify_there(*fid, judge)?.0)
            }
            Op::Store { fid, base, size, ranges, .. } => {
                self.certify_store((node, seq), *fid, *base, (*size, ranges), content)
            }
        }
    }

    fn certify_new(
        &mut self,
        node: u32,
        at: &Place,
        fid: Fid,
        alike: Option<(fs::Kind, &[u8])>,
    ) -> Result<Verdict> {
        if fid.node() != node || fid.counter() == 0 {
            return Ok(Conflict(Clash::ForeignFid));
        }
        if !self.tree.names(fid)?.is_empty() && self.tree.place(fid).is_ok() {
            return Ok(Same);
        }
        let there = match self.standing(at)? {
            Err(clash) => return Ok(Conflict(clash)),
            Ok(None) => return Ok(Apply),
            Ok(Some(there)) => there,
        };
        match (there, alike) {
            ((meta, _), _) if meta.fid == fid => Ok(Same),
            ((meta, stat), Some((fs::Kind::Dir, _))) if stat.kind() == fs::Kind::Dir => {
                Ok(Alias(meta.fid))
            }
            ((meta, stat), Some((fs::Kind::Symlink, target)))
                if stat.kind() == fs::Kind::Symlink
                    && self.readlink(at)?.as_deref() == Some(target) =>
            {
                Ok(Alias(meta.fid))
            }
            _ => Ok(Conflict(Clash::NameTaken)),
        }
    }

    fn certify_rename(
        &mut self,
        node: u32,
        (from, to): (&Place, &Place),
        fid: Fid,
        over: &Over,
    ) -> Result<Verdict> {
        let target = match self.standing(to)? {
            Err(clash) => return Ok(Conflict(clash)),
            Ok(target) => target,
        };
        let source = match self.standing(from)? {
            Ok(Some((meta, _))) => Some(meta.fid),
            _ => None,
        };
        if source != Some(fid) {
            let there = target.is_some_and(|(meta, _)| meta.fid == fid);
            return Ok(if there { Same } else { Conflict(Clash::OtherObject) });
        }
        Ok(match (over, target) {
            (Over::Nothing { .. } | Over::Replaced(_), None) => Apply,
            // two names of one object: rename(2) leaves them both
            (_, Some((meta, _))) if meta.fid == fid => Apply,
            (Over::Nothing { .. }, Some(_)) => Conflict(Clash::NameTaken),
            (Over::Replaced(gone), Some((meta, stat))) => {
                let last = stat.nlink == 1 && stat.kind() == fs::Kind::File;
                match meta.fid == gone.fid {
                    false => Conflict(Clash::NameTaken),
                    true if last && !is_current(&meta, node, gone.base) => Conflict(Clash::Changed),
                    true => Apply,
                }
            }
            (Over::Exchanged { fid, .. }, Some((meta, _))) if meta.fid == *fid => Apply,
            (Over::Exchanged { .. }, _) => Conflict(Clash::OtherObject),
        })
    }

    fn certify_removal(&mut self, node: u32, at: &Place, gone: &record::Gone) -> Result<Verdict> {
        Ok(match self.standing(at)? {
            Err(_) | Ok(None) => Same,
            Ok(Some((meta, _))) if meta.fid != gone.fid => Conflict(Clash::OtherObject),
            Ok(Some((meta, stat))) => {
                let bytes = stat.kind() == fs::Kind::File && stat.nlink == 1;
                let lost = bytes && !is_current(&meta, node, gone.base);
                if lost { Conflict(Clash::Changed) } else { Apply }
            }
        })
    }

    fn certify_store(
        &mut self,
        (node, seq): (u32, Seq),
        fid: Fid,
        base: Stamp,
        (size, ranges): (u64, &[Range]),
        content: Content<'_>,
    ) -> Result<Verdict> {
        let judge = |meta: &Meta, _: &fs::Stat| {
            if is_current(meta, node, base) { Apply } else { Conflict(Clash::Changed) }
        };
        let (verdict, stat) = self.certify_there(fid, judge)?;
        match (verdict, stat) {
            (Conflict(Clash::Gone), _) if content == Content::Gone => Ok(Same),
            (Conflict(Clash::Changed), Some(stat)) if stat.size == size => {
                let file = self.tree.open_object(fid, fs::o::RDONLY | fs::o::NONBLOCK)?;
                let same = self.holds(&file, (node, seq), ranges, content)?;
                Ok(if same { Same } else { verdict })
            }
            _ => Ok(verdict),
        }
    }
    /// Whether the file's bytes are those of the content.
    fn holds(
        &self,
        file: &OwnedFd,
        (node, seq): (u32, Seq),
        ranges: &[Range],
        content: Content<'_>,
    ) -> Result<bool> {
        let spooled = match content {
            Content::Spooled => Some(self.spool.get(node, seq).map_err(TreeError::from)?),
            _ => None,
        };
        let mut row = 0;
        let (mut ours, mut theirs) = (vec![0; 1 << 16], vec![0; 1 << 16]);
        for range in ranges {
            let mut into = 0;
            while into < range.len {
                let want = (range.len - into).min(ours.len() as u64) as usize;
                let at = range.at + into;
                let have = fs::pread(file, &mut ours[..want], at)?;
                let same = match (&spooled, content) {
                    (Some(spooled), _) => {
                        fs::pread(spooled, &mut theirs[..want], at)? == have
                            && ours[..have] == theirs[..have]
                    }
                    (None, Content::Inline(bytes)) => {
                        bytes.get(row..row + want) == Some(&ours[..have])
                    }
                    _ => false,
                };
                if !same || have == 0 {
                    return Ok(false);
                }
                into += have as u64;
                row += have;
            }
        }
        Ok(true)
    }

    /// What stands at a place now; a clash when its directory is not there.
    #[allow(clippy::type_complexity)] // once a verdict, once an object: a type would say no more
    pub(super) fn standing(
        &mut self,
        at: &Place,
    ) -> Result<std::result::Result<Option<(Meta, fs::Stat)>, Clash>> {
        let dir = match self.dir(at.dir) {
            Ok(dir) => dir,
            Err(VolumeError::Gone(_) | VolumeError::NotADir) => return Ok(Err(Clash::DirGone)),
            Err(e) => return Err(e),
        };
        self.at(&dir, &at.name).map(Ok)
    }
    pub(super) fn at(&mut self, dir: &Dir, name: &Name) -> Result<Option<(Meta, fs::Stat)>> {
        match self.seen(dir, name) {
            Ok(there) => Ok(Some(there)),
            Err(VolumeError::Os(Errno::NOENT)) => Ok(None),
            Err(VolumeError::Os(e @ (Errno::NAMETOOLONG | Errno::INVAL))) => {
                log::debug!("{name:?}: {e}");
                Ok(None) // the operation itself will say so
            }
            Err(e) => Err(e),
        }
    }
    fn certify_there(
        &mut self,
        fid: Fid,
        judge: impl FnOnce(&Meta, &fs::Stat) -> Verdict,
    ) -> Result<(Verdict, Option<fs::Stat>)> {
        if fid == ROOT {
            let root = self.tree.root();
            return Ok((judge(&root.meta(), &fs::fstat(&**root)?), None));
        }
        let (dir, name) = match self.tree.place(fid) {
            Ok(place) => place,
            Err(TreeError::Gone(_)) => return Ok((Conflict(Clash::Gone), None)),
            Err(e) => return Err(e.into()),
        };
        match self.at(&dir, &name)? {
            Some((meta, stat)) => Ok((judge(&meta, &stat), Some(stat))),
            None => Ok((Conflict(Clash::Gone), None)),
        }
    }
    fn readlink(&self, at: &Place) -> Result<Option<Vec<u8>>> {
        let dir = self.dir(at.dir)?;
        Ok(fs::readlink(&*dir, at.name.as_bytes()).ok())
    }
}

/// Whether the attributes have these values already.
fn is_set(new: &record::Change, stat: &fs::Stat) -> bool {
    let time = |t: &record::Time, have: (i64, u32)| (t.sec, t.nsec) == have;
    new.mode.is_none_or(|mode| mode == stat.mode & 0o7777)
        && new.uid.is_none_or(|uid| uid == stat.uid)
        && new.gid.is_none_or(|gid| gid == stat.gid)
        && new.size.is_none_or(|size| size == stat.size)
        && new.atime.as_ref().is_none_or(|t| time(t, stat.atime))
        && new.mtime.as_ref().is_none_or(|t| time(t, stat.mtime))
}
