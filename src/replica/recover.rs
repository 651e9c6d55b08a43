//! After a process died: what became of the changes that were under way.
//!
//! The journal holds an intention before the tree is touched. Each record that was left without
//! an outcome is held against the tree:
//!
//! ```text
//!  record                         the tree shows            then
//!  create mkdir symlink mknod     the name with the fid     done
//!                                 the name without a fid    give it the fid; done
//!                                 no such name              void: nobody was told of it
//!  link                           the name with the fid     done, else void
//!  rename                         the fid at the new name   done, else void
//!  unlink rmdir                   another or no fid there   done, else void
//!  setattr setxattr removexattr   the object                do it again; done
//!                                 no object                 void
//!  store noop                                               done
//! ```
//!
//! It also tells the index again what the journal's records said, for the index may have
//! forgotten what was not flushed.

use super::index::Index;
use super::meta::Meta;
use super::ops::time_of_ns;
use super::tree::{Result, Tree, TreeError};
use crate::kml::codec::Outcome;
use crate::kml::record::{Change, Fid, Op, Over, Place, Record};
use crate::sys::Errno;
use crate::sys::cred::{Caller, as_caller};
use crate::sys::fs::{self, xattr};

/// Finds the outcome of a record that has none, and finishes what was half done. `epoch`: of
/// objects that get their fid only now.
pub fn settle(tree: &Tree, record: &Record, epoch: u32) -> Result<Outcome> {
    let done = match &record.op {
        Op::Noop | Op::Store { .. } => true,
        Op::Create { at, fid, .. }
        | Op::Mkdir { at, fid, .. }
        | Op::Symlink { at, fid, .. }
        | Op::Mknod { at, fid, .. } => {
            if at_place(tree, at)? == Seen::Nameless {
                adopt(tree, at, *fid, record, epoch)?;
            }
            let made = at_place(tree, at)? == Seen::Object(*fid);
            if made {
                // the last step of its making: nobody was told of it, so nobody has changed it since
                tree.set_times(&*tree.dir(at.dir)?, &at.name, time_of_ns(record.time_ns))?;
            }
            made
        }
        Op::Link { at, fid, .. } => at_place(tree, at)? == Seen::Object(*fid),
        Op::Rename { to, fid, .. } => at_place(tree, to)? == Seen::Object(*fid),
        Op::Unlink { at, gone } | Op::Rmdir { at, gone } => {
            at_place(tree, at)? != Seen::Object(gone.fid)
        }
        Op::Setattr { fid, new, .. } => again(tree, *fid, |dir, name| set(tree, dir, name, new))?,
        Op::Setxattr { fid, name: key, value, .. } => {
            again(tree, *fid, |dir, name| Ok(xattr::set(dir, name, key, value, 0)?))?
        }
        Op::Removexattr { fid, name: key, .. } => {
            again(tree, *fid, |dir, name| match xattr::remove(dir, name, key) {
                Ok(()) | Err(Errno::NODATA) => Ok(()),
                Err(e) => Err(e.into()),
            })?
        }
    };
    if done {
        note(&tree.index, &record.op)?;
        tree.moved();
        for place in record.op.places().into_iter().flatten() {
            match tree.dir(place.dir) {
                Ok(dir) => tree.touch(&dir, time_of_ns(record.time_ns))?,
                Err(TreeError::Gone(_)) => {} // a later record removed it
                Err(e) => return Err(e),
            }
        }
    }
    Ok(if done { Outcome::Done } else { Outcome::Void })
}

/// What stands at a place.
#[derive(PartialEq, Eq)]
pub(super) enum Seen {
    Nothing,
    /// something without a fid: made, but not yet told who it is
    Nameless,
    Object(Fid),
}

pub(super) fn at_place(tree: &Tree, at: &Place) -> Result<Seen> {
    let dir = match tree.dir(at.dir) {
        Ok(dir) => dir,
        Err(TreeError::Gone(_)) => return Ok(Seen::Nothing),
        Err(e) => return Err(e),
    };
    match fs::stat(&*dir, at.name.as_bytes()) {
        Ok(_) => Ok(tree.meta(&dir, &at.name)?.map_or(Seen::Nameless, |m| Seen::Object(m.fid))),
        Err(Errno::NOENT) => Ok(Seen::Nothing),
        Err(e) => Err(e.into()),
    }
}

pub(super) fn adopt(tree: &Tree, at: &Place, fid: Fid, record: &Record, epoch: u32) -> Result<()> {
    let dir = tree.dir(at.dir)?;
    let meta = Meta { epoch, ..Meta::whole(fid) };
    let by = Caller { uid: record.uid, gid: record.gid, umask: 0 };
    tree.index.set(fid, at.dir, &at.name);
    as_caller(by, || tree.set_meta(&dir, &at.name, &meta))
}

/// Does `act` on the object; false when there is none any more.
pub(super) fn again(
    tree: &Tree,
    fid: Fid,
    act: impl FnOnce(&super::tree::Dir, &[u8]) -> Result<()>,
) -> Result<bool> {
    if let Some(dir) = tree.cached_dir(fid) {
        return act(&dir, b"").map(|()| true);
    }
    match tree.place(fid) {
        Ok((dir, name)) => act(&dir, name.as_bytes()).map(|()| true),
        Err(TreeError::Gone(_)) => Ok(false),
        Err(e) => Err(e),
    }
}

pub(super) fn set(tree: &Tree, dir: &super::tree::Dir, name: &[u8], new: &Change) -> Result<()> {
    if let Some(size) = new.size
        && !name.is_empty()
    {
        let fd = fs::open(dir, name, fs::o::RDONLY | fs::o::NONBLOCK, 0)?;
        if let Some(mut meta) = tree.meta_of(&fd)?.filter(|m| !m.complete) {
            meta.truncated(size);
            tree.set_meta_of(&fd, &meta)?;
        }
    }
    tree.setattr(dir, name, new)
}

/// Tells the index what a record that took effect changed.
pub fn note(index: &Index, op: &Op) -> Result<()> {
    match op {
        Op::Create { at, fid, .. }
        | Op::Mkdir { at, fid, .. }
        | Op::Symlink { at, fid, .. }
        | Op::Mknod { at, fid, .. }
        | Op::Link { at, fid, .. } => index.add(*fid, at.dir, &at.name)?,
        Op::Unlink { at, gone } | Op::Rmdir { at, gone } => {
            index.remove(gone.fid, at.dir, &at.name)?;
        }
        Op::Rename { from, to, fid, over, .. } => {
            index.remove(*fid, from.dir, &from.name)?;
            match over {
                Over::Nothing { .. } => {}
                Over::Replaced(gone) => index.remove(gone.fid, to.dir, &to.name)?,
                Over::Exchanged { fid, .. } => {
                    index.remove(*fid, to.dir, &to.name)?;
                    index.add(*fid, from.dir, &from.name)?;
                }
            }
            index.add(*fid, to.dir, &to.name)?;
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kml::record::{Gone, Name, Origin, ROOT, Stamp, Time};

    const ME: Caller = Caller { uid: 0, gid: 0, umask: 0 };
    const WHEN: Time = Time { sec: 5, nsec: 6 };

    fn place(name: &str) -> Place {
        Place { dir: ROOT, base: Stamp(0), name: Name::new(name.as_bytes()).unwrap() }
    }

    fn record(op: Op) -> Record {
        let time_ns = 77_000_000_001;
        Record { time_ns, origin: Origin::default(), uid: 0, gid: 0, path: vec![], op }
    }

    fn create(name: &str, fid: u64) -> Op {
        Op::Create { at: place(name), fid: Fid(fid), mode: 0o600, umask: 0 }
    }

    fn unlink(name: &str, fid: u64) -> Op {
        let attr = Default::default();
        let gone = Gone { fid: Fid(fid), base: Stamp(0), attr, target: None };
        Op::Unlink { at: place(name), gone }
    }

    fn rename(from: &str, to: &str, fid: u64) -> Op {
        let (from, to, base) = (place(from), place(to), Stamp(0));
        Op::Rename { from, to, fid: Fid(fid), base, over: Over::Nothing { noreplace: false } }
    }

    #[test]
    fn every_row_of_the_table() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("t")).unwrap();
        let tree = Tree::open(&dir.path().join("t"), &dir.path().join("i"), true).unwrap();
        let make = |name: &str, fid| {
            let root = tree.root().clone();
            let name = place(name).name;
            tree.create(&root, &name, ME, 0o600, &Meta::whole(Fid(fid)), WHEN).unwrap();
        };
        make("made", 10);
        std::fs::write(dir.path().join("t/half"), "").unwrap();
        make("moved", 12);
        make("kept", 13);
        let mode = |mode| Change { mode: Some(mode), ..Change::default() };
        let setattr = |fid, m| {
            let (base, old) = (Stamp(0), Change::default());
            Op::Setattr { fid: Fid(fid), base, new: mode(m), old }
        };
        use Outcome::{Done, Void};
        for (op, want) in [
            (create("made", 10), Done),
            (create("half", 11), Done),
            (create("never", 14), Void),
            (create("made", 15), Void),
            (rename("old", "moved", 12), Done),
            (rename("kept", "elsewhere", 13), Void),
            (unlink("gone", 16), Done),
            (unlink("made", 16), Done),
            (unlink("kept", 13), Void),
            (setattr(13, 0o640), Done),
            (setattr(99, 0o640), Void),
            (Op::Link { at: place("kept"), fid: Fid(13), base: Stamp(0) }, Done),
            (Op::Link { at: place("never"), fid: Fid(13), base: Stamp(0) }, Void),
            (Op::Noop, Done),
        ] {
            assert_eq!(settle(&tree, &record(op.clone()), 1).unwrap(), want, "{op:?}");
        }
        assert_eq!(tree.place(Fid(11)).unwrap().1, place("half").name);
        assert_eq!(fs::stat(&**tree.root(), b"kept").unwrap().mode & 0o777, 0o640);
        let mtime = fs::fstat(&**tree.root()).unwrap().mtime;
        assert_eq!(mtime, (77, 1), "the directory has the record's time");
    }
}
