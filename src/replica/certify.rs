//! Certification: whether a client's record still fits the tree it was not made on.
//!
//! Names for directories: two clients may make different names in one directory. Stamps for the
//! contents and attributes of everything else: a record of node n, based on a stamp, is current
//! when nobody else has changed the object after that stamp. An outcome that is there already is no
//! conflict, and no change: the same object at the name, the same contents, a name that is gone.
//!
//! The decision is a function of the record and of what a [`View`] says of the tree, so that the
//! simulation (tests/simulation) runs it over a model. Nothing here changes the tree, but that
//! objects of a volume which are seen for the first time get a fid.

use super::apply::Content;
use super::meta::Meta;
use super::ops::attr_of;
use super::tree::{Dir, TreeError, is_own};
use super::volume::{self, Volume, VolumeError};
use crate::kml::record::{self, Attr, Fid, Name, Op, Over, Place, ROOT, Range, Record, Seq, Stamp};
use crate::sys::Errno;
use crate::sys::fs::{self, Kind};

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

/// An object as it is at the server now.
#[derive(Clone, PartialEq, Debug)]
pub struct Seen {
    pub meta: Meta,
    pub attr: Attr,
}

impl Seen {
    fn kind(&self) -> Kind {
        Kind::of(self.attr.mode)
    }
    /// A file that loses its bytes with the name in question.
    fn is_last_name(&self) -> bool {
        self.kind() == Kind::File && self.attr.nlink == 1
    }
}

/// What certification asks of a tree.
pub trait View {
    type Error;
    /// What stands at a place; a clash when its directory is not there.
    fn stands(&mut self, at: &Place) -> Result<Result<Option<Seen>, Clash>, Self::Error>;
    /// The object, wherever it stands; `None` when it has no name.
    fn find(&mut self, fid: Fid) -> Result<Option<Seen>, Self::Error>;
    /// Where the symbolic link at a place leads.
    fn target(&mut self, at: &Place) -> Result<Option<Vec<u8>>, Self::Error>;
    /// Whether the file's bytes are those of the content, which record (node, seq) announced.
    fn holds(
        &mut self,
        fid: Fid,
        of: (u32, Seq),
        ranges: &[Range],
        content: Content<'_>,
    ) -> Result<bool, Self::Error>;
    /// The name of the attribute that is imz's own.
    fn own_key(&self) -> &[u8];
}

/// Whether nobody but `node` has changed the object after `base`.
fn is_current(meta: &Meta, node: u32, base: Stamp) -> bool {
    base >= if meta.author == node { meta.foreign } else { meta.stamp }
}

/// What becomes of a record of `node`.
///
/// # Errors
/// The tree cannot be read; nothing is decided.
pub fn certify<V: View>(
    view: &mut V,
    (node, seq): (u32, Seq),
    record: &Record,
    content: Content<'_>,
) -> Result<Verdict, V::Error> {
    for place in record.op.places().into_iter().flatten() {
        if place.dir == ROOT && is_own(place.name.as_bytes()) {
            return Ok(Conflict(Clash::OwnName));
        }
    }
    match &record.op {
        Op::Noop => Ok(Same),
        Op::Create { at, fid, .. } | Op::Mknod { at, fid, .. } => {
            certify_new(view, node, at, *fid, None)
        }
        Op::Mkdir { at, fid, .. } => certify_new(view, node, at, *fid, Some((Kind::Dir, b""))),
        Op::Symlink { at, fid, target } => {
            certify_new(view, node, at, *fid, Some((Kind::Symlink, target)))
        }
        Op::Link { at, fid, .. } => match view.stands(at)? {
            Err(clash) => Ok(Conflict(clash)),
            Ok(Some(there)) if there.meta.fid == *fid => Ok(Same),
            Ok(Some(_)) => Ok(Conflict(Clash::NameTaken)),
            Ok(None) => Ok(certify_there(view.find(*fid)?.as_ref(), |_| Apply)),
        },
        Op::Rename { from, to, fid, over, .. } => {
            certify_rename(view, node, (from, to), *fid, over)
        }
        Op::Unlink { at, gone } | Op::Rmdir { at, gone } => certify_removal(view, node, at, gone),
        Op::Setattr { fid, base, new, .. } => {
            Ok(certify_there(view.find(*fid)?.as_ref(), |there| {
                let last_wins = there.kind() == Kind::Dir;
                if last_wins || is_current(&there.meta, node, *base) {
                    Apply
                } else if is_set(new, &there.attr) {
                    Same
                } else {
                    Conflict(Clash::Changed)
                }
            }))
        }
        Op::Setxattr { fid, base, name, .. } | Op::Removexattr { fid, base, name, .. } => {
            if name == view.own_key() {
                return Ok(Conflict(Clash::OwnName));
            }
            Ok(certify_there(view.find(*fid)?.as_ref(), |there| {
                let last_wins = there.kind() == Kind::Dir;
                let fits = last_wins || is_current(&there.meta, node, *base);
                if fits { Apply } else { Conflict(Clash::Changed) }
            }))
        }
        Op::Store { fid, base, size, ranges, .. } => {
            let there = view.find(*fid)?;
            let verdict = certify_there(there.as_ref(), |there| {
                let fits = is_current(&there.meta, node, *base);
                if fits { Apply } else { Conflict(Clash::Changed) }
            });
            match (verdict, there) {
                (Conflict(Clash::Gone), _) if content == Content::Gone => Ok(Same),
                (Conflict(Clash::Changed), Some(there)) if there.attr.size == *size => {
                    let same = view.holds(*fid, (node, seq), ranges, content)?;
                    Ok(if same { Same } else { verdict })
                }
                _ => Ok(verdict),
            }
        }
    }
}

fn certify_there(there: Option<&Seen>, judge: impl FnOnce(&Seen) -> Verdict) -> Verdict {
    there.map_or(Conflict(Clash::Gone), judge)
}

fn certify_new<V: View>(
    view: &mut V,
    node: u32,
    at: &Place,
    fid: Fid,
    alike: Option<(Kind, &[u8])>,
) -> Result<Verdict, V::Error> {
    if fid.node() != node || fid.counter() == 0 {
        return Ok(Conflict(Clash::ForeignFid));
    }
    if view.find(fid)?.is_some() {
        return Ok(Same);
    }
    let there = match view.stands(at)? {
        Err(clash) => return Ok(Conflict(clash)),
        Ok(None) => return Ok(Apply),
        Ok(Some(there)) => there,
    };
    let same = match alike {
        _ if there.meta.fid == fid => return Ok(Same),
        Some((Kind::Dir, _)) => there.kind() == Kind::Dir,
        Some((Kind::Symlink, target)) => {
            there.kind() == Kind::Symlink && view.target(at)?.as_deref() == Some(target)
        }
        _ => false,
    };
    Ok(if same { Alias(there.meta.fid) } else { Conflict(Clash::NameTaken) })
}

fn certify_rename<V: View>(
    view: &mut V,
    node: u32,
    (from, to): (&Place, &Place),
    fid: Fid,
    over: &Over,
) -> Result<Verdict, V::Error> {
    let target = match view.stands(to)? {
        Err(clash) => return Ok(Conflict(clash)),
        Ok(target) => target,
    };
    let source = match view.stands(from)? {
        Ok(Some(there)) => Some(there.meta.fid),
        _ => None,
    };
    if source != Some(fid) {
        let there = target.is_some_and(|there| there.meta.fid == fid);
        return Ok(if there { Same } else { Conflict(Clash::OtherObject) });
    }
    Ok(match (over, target) {
        (Over::Nothing { .. } | Over::Replaced(_), None) => Apply,
        // two names of one object: rename(2) leaves them both
        (_, Some(there)) if there.meta.fid == fid => Apply,
        (Over::Nothing { .. }, Some(_)) => Conflict(Clash::NameTaken),
        (Over::Replaced(gone), Some(there)) => {
            let current = is_current(&there.meta, node, gone.base);
            match there.meta.fid == gone.fid {
                false => Conflict(Clash::NameTaken),
                true if there.is_last_name() && !current => Conflict(Clash::Changed),
                true => Apply,
            }
        }
        (Over::Exchanged { fid, .. }, Some(there)) if there.meta.fid == *fid => Apply,
        (Over::Exchanged { .. }, _) => Conflict(Clash::OtherObject),
    })
}

fn certify_removal<V: View>(
    view: &mut V,
    node: u32,
    at: &Place,
    gone: &record::Gone,
) -> Result<Verdict, V::Error> {
    Ok(match view.stands(at)? {
        Err(_) | Ok(None) => Same,
        Ok(Some(there)) if there.meta.fid != gone.fid => Conflict(Clash::OtherObject),
        Ok(Some(there)) => {
            let lost = there.is_last_name() && !is_current(&there.meta, node, gone.base);
            if lost { Conflict(Clash::Changed) } else { Apply }
        }
    })
}

/// Whether the attributes have these values already.
fn is_set(new: &record::Change, attr: &Attr) -> bool {
    new.mode.is_none_or(|mode| mode == attr.mode & 0o7777)
        && new.uid.is_none_or(|uid| uid == attr.uid)
        && new.gid.is_none_or(|gid| gid == attr.gid)
        && new.size.is_none_or(|size| size == attr.size)
        && new.atime.is_none_or(|t| t == attr.atime)
        && new.mtime.is_none_or(|t| t == attr.mtime)
}

impl View for Volume {
    type Error = VolumeError;

    fn stands(&mut self, at: &Place) -> volume::Result<Result<Option<Seen>, Clash>> {
        Ok(self.standing(at)?.map(|there| there.map(seen)))
    }
    fn find(&mut self, fid: Fid) -> volume::Result<Option<Seen>> {
        if fid == ROOT {
            let root = self.tree.root();
            return Ok(Some(seen((root.meta(), fs::fstat(&**root)?))));
        }
        match self.tree.place(fid) {
            Ok((dir, name)) => Ok(self.at(&dir, &name)?.map(seen)),
            Err(TreeError::Gone(_)) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
    fn target(&mut self, at: &Place) -> volume::Result<Option<Vec<u8>>> {
        let dir = self.dir(at.dir)?;
        Ok(fs::readlink(&*dir, at.name.as_bytes()).ok())
    }
    fn holds(
        &mut self,
        fid: Fid,
        (node, seq): (u32, Seq),
        ranges: &[Range],
        content: Content<'_>,
    ) -> volume::Result<bool> {
        let file = &self.tree.open_object(fid, fs::o::RDONLY | fs::o::NONBLOCK)?;
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
    fn own_key(&self) -> &[u8] {
        self.tree.own_key()
    }
}

fn seen((meta, stat): (Meta, fs::Stat)) -> Seen {
    Seen { meta, attr: attr_of(&stat) }
}

impl Volume {
    /// What stands at a place now; a clash when its directory is not there.
    #[allow(clippy::type_complexity)] // once a verdict, once an object: a type would say no more
    pub(super) fn standing(
        &mut self,
        at: &Place,
    ) -> volume::Result<Result<Option<(Meta, fs::Stat)>, Clash>> {
        let dir = match self.dir(at.dir) {
            Ok(dir) => dir,
            Err(VolumeError::Gone(_) | VolumeError::NotADir) => return Ok(Err(Clash::DirGone)),
            Err(e) => return Err(e),
        };
        self.at(&dir, &at.name).map(Ok)
    }
    pub(super) fn at(
        &mut self,
        dir: &Dir,
        name: &Name,
    ) -> volume::Result<Option<(Meta, fs::Stat)>> {
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
}
