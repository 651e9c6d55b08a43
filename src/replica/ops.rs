//! Changing the tree: each operation on the backing files with its metadata, index and times.
//!
//! The same functions serve the filter at a client, reintegration at a server, and recovery. All
//! of them set the times of what they make, and the modification time of the directories they
//! touch, to the record's time, so that every node ends with the same ones. The caller holds the objects' locks. None is durable on
//! return: the journal says what must be done again.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::meta::Meta;
use super::tree::{Dir, Result, Tree};
use crate::kml::record::{Attr, Change, Fid, Name, Time};
use crate::sys::crash;
use crate::sys::cred::{Caller, as_caller, is_root};
use crate::sys::fs::{self, Kind, RenameMode, SetTime, o};

/// The time of a record as a file's time.
pub fn time_of_ns(ns: u64) -> Time {
    Time { sec: (ns / 1_000_000_000) as i64, nsec: (ns % 1_000_000_000) as u32 }
}

/// A file's attributes as records and messages carry them.
pub fn attr_of(stat: &fs::Stat) -> Attr {
    Attr {
        mode: stat.mode,
        uid: stat.uid,
        gid: stat.gid,
        nlink: stat.nlink,
        rdev: stat.rdev,
        size: stat.size,
        atime: Time { sec: stat.atime.0, nsec: stat.atime.1 },
        mtime: Time { sec: stat.mtime.0, nsec: stat.mtime.1 },
    }
}

fn at(time: Time) -> SetTime {
    SetTime::At(time.sec, time.nsec)
}

impl Tree {
    /// Creates a regular file, open for reading and writing.
    pub fn create(
        &self,
        dir: &Dir,
        name: &Name,
        by: Caller,
        mode: u32,
        meta: &Meta,
        when: Time,
    ) -> Result<OwnedFd> {
        let flags = o::RDWR | o::CREAT | o::EXCL;
        let fd = as_caller(by, || fs::open(dir, name.as_bytes(), flags, mode))?;
        crash::point("tree-made");
        if let Err(e) = self.set_meta_of(&fd, meta) {
            // Not half made: what was created a moment ago goes again.
            fs::unlink(dir, name.as_bytes())?;
            return Err(e);
        }
        crash::point("tree-labelled");
        self.index.set(meta.fid, dir.fid, name);
        fs::utimes_fd(&fd, at(when), at(when))?;
        self.touch(dir, when)?;
        Ok(fd)
    }

    pub fn mkdir(
        &self,
        dir: &Dir,
        name: &Name,
        by: Caller,
        mode: u32,
        meta: &Meta,
        when: Time,
    ) -> Result<Arc<Dir>> {
        as_caller(by, || fs::mkdir(dir, name.as_bytes(), mode))?;
        self.name_made(dir, name, meta, when)?;
        self.open_dir(dir, name)
    }

    pub fn symlink(
        &self,
        dir: &Dir,
        name: &Name,
        by: Caller,
        target: &[u8],
        meta: &Meta,
        when: Time,
    ) -> Result<()> {
        as_caller(by, || fs::symlink(target, dir, name.as_bytes()))?;
        self.name_made(dir, name, meta, when)
    }

    /// `mode` with its file type bits: a regular file, too.
    #[allow(clippy::too_many_arguments)]
    pub fn mknod(
        &self,
        dir: &Dir,
        name: &Name,
        by: Caller,
        mode: u32,
        rdev: u64,
        meta: &Meta,
        when: Time,
    ) -> Result<()> {
        as_caller(by, || fs::mknod(dir, name.as_bytes(), mode, rdev))?;
        self.name_made(dir, name, meta, when)
    }

    fn name_made(&self, dir: &Dir, name: &Name, meta: &Meta, when: Time) -> Result<()> {
        if let Err(e) = self.set_meta(dir, name, meta) {
            match fs::stat(dir, name.as_bytes())?.kind() {
                Kind::Dir => fs::rmdir(dir, name.as_bytes())?,
                _ => fs::unlink(dir, name.as_bytes())?,
            }
            return Err(e);
        }
        self.index.set(meta.fid, dir.fid, name);
        self.set_times(dir, name, when)?;
        self.touch(dir, when)
    }

    /// Gives the object at `from` a further name.
    pub fn link(
        &self,
        from: (&Dir, &Name),
        fid: Fid,
        dir: &Dir,
        name: &Name,
        when: Time,
    ) -> Result<()> {
        fs::link(from.0, from.1.as_bytes(), dir, name.as_bytes())?;
        if let Some(value) = self.index.loose(from.0.fid, from.1.as_bytes())? {
            self.index.set_loose(dir.fid, name.as_bytes(), Some(value));
        }
        self.index.add(fid, dir.fid, name)?;
        self.touch(dir, when)
    }

    /// Gives a file that has no name its first one.
    pub fn link_nameless(
        &self,
        file: impl AsFd,
        fid: Fid,
        dir: &Dir,
        name: &Name,
        when: Time,
    ) -> Result<()> {
        fs::link_fd(file, dir, name.as_bytes())?;
        self.index.set(fid, dir.fid, name);
        self.touch(dir, when)
    }

    /// Renames `fid`; `other` is what stands at the new name, if anything does.
    pub fn rename(
        &self,
        from: (&Dir, &Name),
        to: (&Dir, &Name),
        fid: Fid,
        other: Option<Fid>,
        mode: RenameMode,
        when: Time,
    ) -> Result<()> {
        let (old, new) = (from.1.as_bytes(), to.1.as_bytes());
        if fid == other.unwrap_or_default() {
            return Ok(()); // two names of one object: POSIX leaves both
        }
        let moving = self.moving();
        fs::rename(from.0, old, to.0, new, mode)?;
        crash::point("tree-renamed");
        let loose = self.index.loose(from.0.fid, old)?;
        let loose_other = self.index.loose(to.0.fid, new)?;
        if loose.is_some() || loose_other.is_some() {
            let back = if mode == RenameMode::Exchange { loose_other } else { None };
            self.index.set_loose(from.0.fid, old, back);
            self.index.set_loose(to.0.fid, new, loose);
        }
        self.index.remove(fid, from.0.fid, from.1)?;
        if let Some(other) = other {
            self.index.remove(other, to.0.fid, to.1)?;
            if mode == RenameMode::Exchange {
                self.index.add(other, from.0.fid, from.1)?;
            } else {
                self.close_dir(other);
            }
        }
        self.index.add(fid, to.0.fid, to.1)?;
        drop(moving);
        self.moved();
        self.touch(from.0, when)?;
        self.touch(to.0, when)
    }

    pub fn unlink(&self, dir: &Dir, name: &Name, fid: Fid, when: Time) -> Result<()> {
        fs::unlink(dir, name.as_bytes())?;
        crash::point("tree-unlinked");
        self.name_gone(dir, name, fid, when)
    }

    pub fn rmdir(&self, dir: &Dir, name: &Name, fid: Fid, when: Time) -> Result<()> {
        fs::rmdir(dir, name.as_bytes())?;
        self.close_dir(fid);
        self.name_gone(dir, name, fid, when)
    }

    fn name_gone(&self, dir: &Dir, name: &Name, fid: Fid, when: Time) -> Result<()> {
        if !is_root() {
            self.index.set_loose(dir.fid, name.as_bytes(), None);
        }
        self.index.remove(fid, dir.fid, name)?;
        self.touch(dir, when)
    }

    /// Sets attributes of `name` in `dir`; of an open file or directory when `name` is empty.
    pub fn setattr(&self, dir: impl std::os::fd::AsFd, name: &[u8], new: &Change) -> Result<()> {
        if let Some(size) = new.size {
            if name.is_empty() {
                fs::truncate(&dir, size)?;
            } else {
                fs::truncate(fs::open(&dir, name, o::WRONLY | o::NONBLOCK, 0)?, size)?;
            }
            crash::point("tree-cut");
        }
        if new.uid.is_some() || new.gid.is_some() {
            fs::chown(&dir, name, new.uid, new.gid)?;
        }
        // After the owner: a change of owner takes set-id bits away.
        if let Some(mode) = new.mode {
            if name.is_empty() {
                fs::chmod_fd(&dir, mode)?;
            } else {
                fs::chmod(&dir, name, mode)?;
            }
        }
        if new.atime.is_some() || new.mtime.is_some() {
            let (atime, mtime) =
                (new.atime.map_or(SetTime::Keep, at), new.mtime.map_or(SetTime::Keep, at));
            if name.is_empty() {
                fs::utimes_fd(&dir, atime, mtime)?;
            } else {
                fs::utimes(&dir, name, atime, mtime)?;
            }
        }
        Ok(())
    }

    /// Gives a new object the time of its record.
    pub fn set_times(&self, dir: &Dir, name: &Name, when: Time) -> Result<()> {
        Ok(fs::utimes(dir, name.as_bytes(), at(when), at(when))?)
    }

    /// Sets a directory's modification time.
    pub fn touch(&self, dir: &Dir, when: Time) -> Result<()> {
        Ok(fs::utimes_fd(dir, SetTime::Keep, at(when))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kml::record::ROOT;

    const ME: Caller = Caller { uid: 0, gid: 0, umask: 0o022 };
    const WHEN: Time = Time { sec: 1_000_000_000, nsec: 123_456_789 };

    fn name(s: &str) -> Name {
        Name::new(s.as_bytes()).unwrap()
    }

    fn tree() -> (tempfile::TempDir, Tree) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("tree")).unwrap();
        let tree = Tree::open(&dir.path().join("tree"), &dir.path().join("index"), true).unwrap();
        (dir, tree)
    }

    #[test]
    fn objects_are_found_by_fid_wherever_they_go() {
        let (dir, tree) = tree();
        let root = tree.root().clone();
        let a = tree.mkdir(&root, &name("a"), ME, 0o755, &Meta::whole(Fid(10)), WHEN).unwrap();
        let b = tree.mkdir(&a, &name("b"), ME, 0o755, &Meta::whole(Fid(11)), WHEN).unwrap();
        tree.create(&b, &name("f"), ME, 0o666, &Meta::whole(Fid(12)), WHEN).unwrap();
        assert_eq!(tree.path_of(&b, &name("f")), b"a/b/f");
        let to = (&*root, &name("c"));
        tree.rename((&a, &name("b")), to, Fid(11), None, RenameMode::Replace, WHEN).unwrap();
        let (at, n) = tree.place(Fid(12)).unwrap();
        assert_eq!((at.fid, n), (Fid(11), name("f")));
        assert_eq!(tree.path_of(&at, &name("f")), b"c/f");
        tree.index.flush(true).unwrap();
        drop(tree);
        let index = dir.path().join("index");
        let tree = Tree::open(&dir.path().join("tree"), &index, true).unwrap();
        assert_eq!(tree.dir(Fid(11)).unwrap().fid, Fid(11));
        let stat = fs::stat(tree.dir(Fid(11)).unwrap(), b"f").unwrap();
        assert_eq!(stat.mode & 0o777, 0o644, "the umask counts");
        drop(tree);
        std::fs::remove_file(&index).unwrap();
        let tree = Tree::open(&dir.path().join("tree"), &index, true).unwrap();
        assert_eq!(tree.place(Fid(12)).unwrap().1, name("f"), "found again without an index");
        assert!(tree.place(Fid(99)).is_err());
    }

    #[test]
    fn old_places_in_the_index_hide_nothing() {
        let (_dir, tree) = tree();
        let root = tree.root().clone();
        let a = tree.mkdir(&root, &name("a"), ME, 0o755, &Meta::whole(Fid(10)), WHEN).unwrap();
        let b = tree.mkdir(&a, &name("b"), ME, 0o755, &Meta::whole(Fid(11)), WHEN).unwrap();
        tree.create(&b, &name("f"), ME, 0o666, &Meta::whole(Fid(12)), WHEN).unwrap();
        // As recovery tells it again: where they were made, and renamed since by the server's word.
        for (fid, parent, old) in [(10, 1, "was"), (11, 1, "b"), (11, 10, "c")] {
            tree.index.add(Fid(fid), Fid(parent), &name(old)).unwrap();
        }
        tree.close_dir(Fid(10));
        tree.close_dir(Fid(11));
        assert_eq!(tree.place(Fid(12)).unwrap().1, name("f"));
        assert_eq!(tree.dir(Fid(11)).unwrap().fid, Fid(11));
        assert!(tree.dir(Fid(99)).is_err());
    }

    #[test]
    fn an_object_is_found_while_it_moves() {
        let (_dir, tree) = tree();
        let root = tree.root().clone();
        let make = |n: &str, fid| {
            tree.create(&root, &name(n), ME, 0o666, &Meta::whole(Fid(fid)), WHEN).unwrap();
        };
        make("a", 10);
        make("b", 11);
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let [a, b] = [name("a"), name("b")];
                let (mut one, mut two) = (Fid(10), Fid(11));
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let (from, to) = ((&*root, &a), (&*root, &b));
                    tree.rename(from, to, one, Some(two), RenameMode::Exchange, WHEN).unwrap();
                    std::mem::swap(&mut one, &mut two);
                }
            });
            for _ in 0..3000 {
                let fd = tree.open_object(Fid(10), o::RDONLY);
                let found = fd.and_then(|fd| tree.meta_of(&fd)).map(|meta| meta.unwrap().fid);
                if !matches!(found, Ok(Fid(10))) {
                    stop.store(true, std::sync::atomic::Ordering::Relaxed);
                }
                assert_eq!(found.unwrap(), Fid(10));
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }

    #[test]
    fn directories_get_the_time_of_the_record() {
        let (_dir, tree) = tree();
        let root = tree.root().clone();
        tree.create(&root, &name("f"), ME, 0o666, &Meta::whole(Fid(12)), WHEN).unwrap();
        assert_eq!(attr_of(&fs::fstat(&*root).unwrap()).mtime, WHEN);
        let later = Time { sec: WHEN.sec + 1, nsec: 5 };
        tree.unlink(&root, &name("f"), Fid(12), later).unwrap();
        assert_eq!(attr_of(&fs::fstat(&*root).unwrap()).mtime, later);
        assert!(tree.place(Fid(12)).is_err());
    }

    #[test]
    fn objects_belong_to_their_caller() {
        if !is_root() {
            return; // another user's files need root
        }
        let (_dir, tree) = tree();
        let root = tree.root().clone();
        let by = Caller { uid: 1234, gid: 4321, umask: 0o077 };
        let made = tree.create(&root, &name("f"), by, 0o6777, &Meta::whole(Fid(12)), WHEN).unwrap();
        let stat = fs::fstat(&made).unwrap();
        assert_eq!((stat.uid, stat.gid, stat.mode & 0o7777), (1234, 4321, 0o6700));
        let sgid = tree.mkdir(&root, &name("d"), ME, 0o755, &Meta::whole(Fid(13)), WHEN).unwrap();
        fs::chown(&*sgid, b"", None, Some(77)).unwrap();
        fs::chmod_fd(&*sgid, 0o2700).unwrap();
        // The caller may not even search it: the kernel's word on that was given before.
        let made = tree.create(&sgid, &name("f"), by, 0o666, &Meta::whole(Fid(14)), WHEN).unwrap();
        assert_eq!(fs::fstat(&made).unwrap().gid, 77);
        let own = tree.create(&root, &name("g"), ME, 0o666, &Meta::whole(Fid(15)), WHEN).unwrap();
        assert_eq!(fs::fstat(&own).unwrap().uid, 0, "the thread is root again");
        assert_eq!(tree.root().fid, ROOT);
    }
}
