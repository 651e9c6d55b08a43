//! Certification: whether a client's record still fits the tree it was not made on.
//!
//! Names for directories: two clients may make different names in one directory. Stamps for the
//! contents of files: a record of node n, based on a stamp, is current when nobody else has changed
//! the contents after that stamp. Attributes each for itself, by the value that was replaced. An
//! outcome that is there already is no conflict, and no change: the same object at the name, the
//! same contents, a name that is gone. imz-conflicts(7) has the table of all pairs.
//!
//! The decision is a function of the record and of what a [`View`] says of the tree, so that the
//! simulation (tests/simulation) runs it over a model. Nothing here changes the tree, but that
//! objects of a volume which are seen for the first time get a fid.

use std::os::fd::OwnedFd;

use super::apply::Content;
use super::meta::Meta;
use super::ops::attr_of;
use super::tree::{Dir, TreeError, is_own};
use super::volume::{self, Volume, VolumeError};
use crate::kml::record::{self, Attr, Fid, Name, Op, Over, Place, ROOT, Range, Record, Seq, Stamp};
use crate::sys::Errno;
use crate::sys::fs::{self, Kind};

/// Files larger than this are not compared with each other, bytes: whoever reads waits for it.
const ALIKE_LEN_MAX: u64 = 64 << 20;

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
    /// Whether nobody but `node` has changed it after the version `base`. What was lost nobody knows.
    fn is_current(&self, node: u32, base: Option<Stamp>) -> bool {
        base.is_some_and(|base| self.meta.is_current(node, base))
    }
    /// The same of its contents.
    fn has_current_data(&self, node: u32, base: Option<Stamp>) -> bool {
        base.is_some_and(|base| self.meta.has_current_data(node, base))
    }
    /// A file that loses its bytes with the name in question.
    fn is_last_name(&self) -> bool {
        self.kind() == Kind::File && self.attr.nlink == 1
    }
}

/// What certification asks of a tree.
pub trait View {
    type Error;
    /// The version that a record is based on; `None` when the server never gave it, or has lost it, with
    /// its power or by a backup that was put back: what the record's author saw in it may be different
    /// from all that there ever was.
    fn known(&self, base: Stamp) -> Option<Stamp>;
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
    /// The value of an extended attribute, or that there is none; `None` when it cannot be told.
    fn xattr(&mut self, _fid: Fid, _name: &[u8]) -> Result<Option<Option<Vec<u8>>>, Self::Error> {
        Ok(None)
    }
    /// Whether these are two files with the same bytes, owner and mode.
    fn are_alike(&mut self, _one: Fid, _other: Fid) -> Result<bool, Self::Error> {
        Ok(false)
    }
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
        Op::Create { at, fid, mode, umask } => {
            let alike = Alike::Empty { mode: mode & !umask & 0o7777, uid: record.uid };
            certify_new(view, node, at, *fid, alike)
        }
        Op::Mknod { at, fid, .. } => certify_new(view, node, at, *fid, Alike::Nothing),
        Op::Mkdir { at, fid, .. } => certify_new(view, node, at, *fid, Alike::Dir),
        Op::Symlink { at, fid, target } => {
            certify_new(view, node, at, *fid, Alike::Symlink(target))
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
        Op::Setattr { fid, base, new, old } => {
            let (there, base) = (view.find(*fid)?, view.known(*base));
            Ok(certify_there(there.as_ref(), |there| certify_attr(there, node, base, new, old)))
        }
        Op::Setxattr { fid, base, name, old, .. } | Op::Removexattr { fid, base, name, old } => {
            if name == view.own_key() {
                return Ok(Conflict(Clash::OwnName));
            }
            let value = match &record.op {
                Op::Setxattr { value, .. } => Some(value),
                _ => None,
            };
            let (now, base) = (view.xattr(*fid, name)?, view.known(*base));
            Ok(certify_there(view.find(*fid)?.as_ref(), |there| {
                let last_wins = there.kind() == Kind::Dir;
                if last_wins || now.as_ref() == Some(old) {
                    Apply
                } else if now.as_ref().is_some_and(|now| now.as_ref() == value) {
                    Same
                } else if there.is_current(node, base) {
                    Apply
                } else {
                    Conflict(Clash::Changed)
                }
            }))
        }
        Op::Store { fid, base, size, ranges, .. } => {
            let (there, base) = (view.find(*fid)?, view.known(*base));
            let verdict = certify_there(there.as_ref(), |there| {
                let fits = there.has_current_data(node, base);
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

/// Attributes of a file are certified one by one: by the value that each replaced, and where that
/// is not told, by the object's stamp. A size is contents; times belong to the contents that they
/// came with ([`fit`]). A directory's last change wins.
fn certify_attr(
    there: &Seen,
    node: u32,
    base: Option<Stamp>,
    new: &record::Change,
    old: &record::Change,
) -> Verdict {
    if there.kind() == Kind::Dir {
        return Apply;
    }
    let current = there.is_current(node, base);
    if !current && is_set(new, &there.attr) {
        return Same;
    }
    let fits = |new: Option<u32>, old: Option<u32>, now: u32| {
        current || new.is_none_or(|new| new == now || old == Some(now))
    };
    let fit = fits(new.mode, old.mode, there.attr.mode & 0o7777)
        && fits(new.uid, old.uid, there.attr.uid)
        && fits(new.gid, old.gid, there.attr.gid);
    let has_data = there.has_current_data(node, base);
    if !fit || (new.size.is_some_and(|size| size != there.attr.size) && !has_data) {
        return Conflict(Clash::Changed);
    }
    let nothing_left = without_contents(new) == Default::default();
    if nothing_left && !has_data { Same } else { Apply }
}

fn without_contents(new: &record::Change) -> record::Change {
    record::Change { size: None, atime: None, mtime: None, ..*new }
}

/// Leaves to contents that somebody else has made their size, which was to be the same, and their
/// times.
pub fn fit(new: &mut record::Change, there: &Seen, node: u32, base: Option<Stamp>) {
    if there.kind() != Kind::Dir && !there.has_current_data(node, base) {
        *new = without_contents(new);
    }
}

fn whole(size: u64) -> Range {
    Range { at: 0, len: size }
}

/// Whether a record with this verdict is about contents, and not about those that are there. Its
/// node has other contents then, and must hear so, even if what it asked for is there already (but for
/// a store of the whole file).
///
/// # Errors
/// The tree cannot be read.
pub fn is_of_others<V: View>(
    view: &mut V,
    node: u32,
    op: &Op,
    verdict: Verdict,
) -> Result<bool, V::Error> {
    let (fid, base) = match (op, verdict) {
        (Op::Store { fid, base, size, ranges, .. }, Same) if ranges[..] != [whole(*size)] => {
            (fid, base)
        }
        (Op::Setattr { fid, base, new, .. }, Apply | Same) if new.size.is_some() => (fid, base),
        _ => return Ok(false),
    };
    let (there, base) = (view.find(*fid)?, view.known(*base));
    Ok(there.is_some_and(|there| !there.has_current_data(node, base)))
}

/// What at the name counts as the outcome of a creation.
enum Alike<'a> {
    Nothing,
    Dir,
    Symlink(&'a [u8]),
    Empty { mode: u32, uid: u32 },
}

fn certify_new<V: View>(
    view: &mut V,
    node: u32,
    at: &Place,
    fid: Fid,
    alike: Alike<'_>,
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
        Alike::Nothing => false,
        Alike::Dir => there.kind() == Kind::Dir,
        Alike::Symlink(target) => {
            there.kind() == Kind::Symlink && view.target(at)?.as_deref() == Some(target)
        }
        Alike::Empty { mode, uid } => {
            let attr = &there.attr;
            there.kind() == Kind::File
                && (attr.size, attr.nlink, attr.mode & 0o7777, attr.uid) == (0, 1, mode, uid)
        }
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
        return Ok(match there || view.find(fid)?.is_some() {
            true if there => Same,
            true => Conflict(Clash::OtherObject),
            false => Conflict(Clash::Gone),
        });
    }
    let other = target.as_ref().map(|there| there.meta.fid);
    let verdict = match (over, target) {
        (Over::Nothing { .. } | Over::Replaced(_), None) => Apply,
        // two names of one object: rename(2) leaves them both
        (_, Some(there)) if there.meta.fid == fid => Apply,
        (Over::Nothing { .. }, Some(_)) => Conflict(Clash::NameTaken),
        (Over::Replaced(gone), Some(there)) => {
            let current = there.has_current_data(node, view.known(gone.base));
            match there.meta.fid == gone.fid {
                false => Conflict(Clash::NameTaken),
                true if there.is_last_name() && !current => Conflict(Clash::Changed),
                true => Apply,
            }
        }
        (Over::Exchanged { fid, .. }, Some(there)) if there.meta.fid == *fid => Apply,
        (Over::Exchanged { .. }, _) => Conflict(Clash::OtherObject),
    };
    match (verdict, other) {
        // both have put the same there, each a file of his own
        (Conflict(Clash::NameTaken | Clash::Changed), Some(other)) => {
            Ok(if view.are_alike(fid, other)? { Alias(other) } else { verdict })
        }
        _ => Ok(verdict),
    }
}

fn certify_removal<V: View>(
    view: &mut V,
    node: u32,
    at: &Place,
    gone: &record::Gone,
) -> Result<Verdict, V::Error> {
    Ok(match view.stands(at)? {
        Err(_) | Ok(None) => Same,
        // somebody else has removed it, and made another
        Ok(Some(there)) if there.meta.fid != gone.fid => match view.find(gone.fid)? {
            None => Same,
            Some(_) => Conflict(Clash::OtherObject),
        },
        Ok(Some(there)) => {
            let current = there.has_current_data(node, view.known(gone.base));
            let lost = there.is_last_name() && !current;
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

    fn known(&self, base: Stamp) -> Option<Stamp> {
        (!self.lives.is_lost(base) && base <= self.stamp()).then_some(base)
    }
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
    fn xattr(&mut self, fid: Fid, name: &[u8]) -> volume::Result<Option<Option<Vec<u8>>>> {
        let (dir, at) = match self.object_path(fid) {
            Ok(found) => found,
            Err(VolumeError::Gone(_)) => return Ok(None),
            Err(e) => return Err(e),
        };
        match fs::xattr::get(&*dir, &at, name) {
            Ok(now) => Ok(Some(now)),
            Err(e) => {
                log::debug!("{fid}: attribute {}: {e}", name.escape_ascii());
                Ok(None) // the operation itself will say so
            }
        }
    }
    fn are_alike(&mut self, one: Fid, other: Fid) -> volume::Result<bool> {
        let (Some(a), Some(b)) = (self.find(one)?, self.find(other)?) else { return Ok(false) };
        let of = |seen: &Seen| (seen.attr.mode, seen.attr.uid, seen.attr.gid, seen.attr.size);
        if a.kind() != Kind::File || of(&a) != of(&b) || a.attr.size > ALIKE_LEN_MAX {
            return Ok(false);
        }
        let flags = fs::o::RDONLY | fs::o::NONBLOCK;
        let files = (self.tree.open_object(one, flags)?, self.tree.open_object(other, flags)?);
        same_bytes(&files.0, &files.1, a.attr.size)
    }
}

/// Whether two files have the same `len` bytes.
fn same_bytes(one: &OwnedFd, other: &OwnedFd, len: u64) -> volume::Result<bool> {
    let (mut ours, mut theirs) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    let mut at = 0;
    while at < len {
        let want = (len - at).min(ours.len() as u64) as usize;
        let have = fs::pread(one, &mut ours[..want], at)?;
        // a short read of the second one takes the file for different: no harm
        if have == 0
            || fs::pread(other, &mut theirs[..have], at)? != have
            || ours[..have] != theirs[..have]
        {
            return Ok(false);
        }
        at += have as u64;
    }
    Ok(true)
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
