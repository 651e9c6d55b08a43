//! Files without a name: O_TMPFILE, and the link(2) that may give one its name later.
//!
//! Until then nothing is journaled: the file is nobody's but its holders'. The link is journaled as
//! what it is for others: a file is created, with these attributes and these data. Names are given
//! to no other files without one: the kernel refuses that for those that have lost theirs.

use super::filter::{Filter, Found, Object, Result, Spot, done};
use super::open::{Grip, Open};
use crate::kml::record::{Change, Fid, Name, Op, Stamp};
use crate::replica::ops::attr_of;
use crate::replica::tree::Dir;
use crate::sys::Errno;
use crate::sys::cred::{Caller, as_caller};
use crate::sys::fs::{self, o, xattr};

impl Filter {
    /// Makes a regular file without a name on the file system of `parent`, and opens it.
    pub fn tmpfile(&self, by: Caller, parent: Fid, mode: u32, flags: i32) -> Result<(Found, Grip)> {
        self.changeable()?;
        let dir = self.dir_here(parent)?;
        self.room_heard()?;
        let meta = self.new_meta()?;
        let fd = as_caller(by, || fs::open(&*dir, b".", o::RDWR | o::TMPFILE, mode))?;
        self.cache.tree.set_meta_of(&fd, &meta)?;
        let made = self.open_new(fd, &meta, flags)?;
        made.1.open.state().may_be_named = true;
        Ok(made)
    }

    /// Gives a file that was made without a name its first one. The caller holds the locks of
    /// directory and object, and stores the data when it has let go of them.
    pub(super) fn link_nameless(&self, object: &Object, dir: &Dir, name: &Name) -> Result<Found> {
        let Spot::Open(open) = &object.spot else { return Err(Errno::NOENT.into()) };
        let (fid, stat, path) = (open.fid, object.stat, self.cache.tree.path_of(dir, name));
        let by = Caller { uid: stat.uid, gid: stat.gid, umask: 0 };
        let op = Op::Create { at: self.place(dir, name), fid, mode: stat.mode & 0o7777, umask: 0 };
        self.change(by, path, op, |when| {
            Ok(self.cache.tree.link_nameless(&open.fd, fid, dir, name, when)?)
        })?;
        // From here on it has its name: what is left is journaled in any case.
        done(|| self.as_it_is(open, dir, name))?;
        let mut state = open.state();
        (state.changed, state.may_be_named) = (true, false);
        drop(state);
        let stat = fs::fstat(&open.fd)?;
        Ok(self.found(stat, &object.meta))
    }

    /// Journals the attributes and extended attributes of a file that got its name just now: the
    /// directory's default list and set-gid bit, which count for others, did not count here.
    fn as_it_is(&self, open: &Open, dir: &Dir, name: &Name) -> Result<()> {
        let (fid, stat, base) = (open.fid, fs::fstat(&open.fd)?, Stamp(0));
        let (attr, path) = (attr_of(&stat), self.cache.tree.path_of(dir, name));
        let by = Caller { uid: stat.uid, gid: stat.gid, umask: 0 };
        let new = Change {
            mode: Some(attr.mode & 0o7777),
            uid: Some(attr.uid),
            gid: Some(attr.gid),
            size: None,
            atime: Some(attr.atime),
            mtime: Some(attr.mtime),
        };
        self.change(by, path.clone(), Op::Setattr { fid, base, new, old: new }, |_| Ok(()))?;
        for key in xattr::list(&open.fd, b"")? {
            if key == self.cache.tree.own_key() {
                continue;
            }
            let Some(value) = xattr::get(&open.fd, b"", &key)? else { continue };
            let op = Op::Setxattr { fid, base, name: key, value, old: None };
            self.change(by, path.clone(), op, |_| Ok(()))?;
        }
        Ok(())
    }
}
