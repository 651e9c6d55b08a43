//! Operations on attributes: owner, mode, times, size, extended attributes.

use super::filter::{Filter, Found, Object, Result, Spot, now_ns};
use crate::kml::record::{Change, Fid, Op, Time, XATTR_LEN_MAX};
use crate::replica::ops::{attr_of, time_of_ns};
use crate::sys::Errno;
use crate::sys::cred::Caller;
use crate::sys::fs::{Kind, Stat, xattr};

const SET_UID: u32 = 0o4000;
const SET_GID: u32 = 0o2000;
const GROUP_EXEC: u32 = 0o010;

/// What an application wants an object's attributes to be.
#[derive(Clone, Copy, Default, Debug)]
pub struct Wish {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: Option<When>,
    pub mtime: Option<When>,
}

/// A time to set.
#[derive(Clone, Copy, Debug)]
pub enum When {
    Now,
    At(Time),
}

impl Wish {
    /// The kernel's sign that set-id bits must go, for somebody writes.
    fn is_empty(&self) -> bool {
        self.mode.is_none()
            && self.uid.is_none()
            && self.gid.is_none()
            && self.size.is_none()
            && self.atime.is_none()
            && self.mtime.is_none()
    }
}

/// The mode without the bits that a write by a user takes away; `None` when it has none of them.
/// `outsider`: the user is not of the file's group.
fn without_set_id(mode: u32, outsider: bool) -> Option<u32> {
    let mut kept = mode & 0o7777 & !SET_UID;
    if mode & GROUP_EXEC != 0 || outsider {
        kept &= !SET_GID;
    }
    (kept != mode & 0o7777).then_some(kept)
}

impl Filter {
    /// Of an object that may be open and have no name any more.
    pub fn getattr(&self, fid: Fid) -> Result<Found> {
        let object = self.here(fid)?;
        Ok(self.found(object.stat, &object.meta))
    }

    pub fn setattr(&self, by: Caller, fid: Fid, wish: Wish) -> Result<Found> {
        let _object = self.cache.tree.lock_objects(&[fid]);
        let object = self.here(fid)?;
        if wish.size.is_some() && object.stat.kind() != Kind::File {
            return Err(
                if object.stat.kind() == Kind::Dir { Errno::ISDIR } else { Errno::INVAL }.into()
            );
        }
        let new = change_of(&wish, &object.stat, by);
        if new == Change::default() {
            return Ok(self.found(object.stat, &object.meta));
        }
        if object.is_nameless() {
            return self.set(&object, &new);
        }
        let op = Op::Setattr { fid, base: object.meta.stamp, new, old: old_of(&new, &object.stat) };
        self.change(by, self.path(&object), op, |_| self.set(&object, &new))
    }

    /// Sets attributes, and sees to what follows from a new size.
    fn set(&self, object: &Object, new: &Change) -> Result<Found> {
        let tree = &self.cache.tree;
        let mut meta = object.meta.clone();
        if let Some(size) = new.size
            && !meta.complete
        {
            meta.truncated(size);
            match &object.spot {
                Spot::Entry(dir, name) => tree.set_meta(dir, name, &meta)?,
                Spot::Dir(_) | Spot::Open(_) => tree.set_meta_of(object, &meta)?,
            }
        }
        tree.setattr(object, object.at(), new)?;
        let stat = object.stat_again()?;
        if new.size.is_some() {
            self.cache.note_held(stat.blocks * 512, object.stat.blocks * 512);
        }
        // The record of the attributes says it all, also that of a size.
        if let Spot::Open(open) = &object.spot {
            open.attributes_changed(&object.stat, &stat);
        }
        Ok(self.found(stat, &meta))
    }

    /// Takes set-id bits away, as a write by a user does. The caller holds the object's lock.
    pub fn drop_set_id(&self, by: Caller, fid: Fid) -> Result<()> {
        let Ok(object) = self.here(fid) else { return Ok(()) };
        let Some(mode) = without_set_id(object.stat.mode, is_outsider(by, &object.stat)) else {
            return Ok(());
        };
        let new = Change { mode: Some(mode), ..Change::default() };
        let op = Op::Setattr { fid, base: object.meta.stamp, new, old: old_of(&new, &object.stat) };
        self.change(by, self.path(&object), op, |_| self.set(&object, &new).map(drop))
    }

    /// `None`: no such attribute.
    pub fn getxattr(&self, fid: Fid, key: &[u8]) -> Result<Option<Vec<u8>>> {
        if key == self.cache.tree.own_key() {
            return Ok(None);
        }
        let object = self.here(fid)?;
        Ok(xattr::get(&object, object.at(), key)?)
    }

    pub fn listxattr(&self, fid: Fid) -> Result<Vec<Vec<u8>>> {
        let object = self.here(fid)?;
        let mut keys = xattr::list(&object, object.at())?;
        keys.retain(|key| key != self.cache.tree.own_key());
        Ok(keys)
    }

    /// `flags`: 0, XATTR_CREATE (1) or XATTR_REPLACE (2).
    pub fn setxattr(
        &self,
        by: Caller,
        fid: Fid,
        key: &[u8],
        value: &[u8],
        flags: u32,
    ) -> Result<()> {
        if key == self.cache.tree.own_key() {
            return Err(Errno::PERM.into());
        }
        if value.len() > XATTR_LEN_MAX {
            return Err(Errno::TOOBIG.into());
        }
        let _object = self.cache.tree.lock_objects(&[fid]);
        let object = self.here(fid)?;
        if object.is_nameless() {
            return Ok(xattr::set(&object, object.at(), key, value, flags)?);
        }
        let old = xattr::get(&object, object.at(), key)?;
        match (flags, &old) {
            (1, Some(_)) => return Err(Errno::EXIST.into()),
            (2, None) => return Err(Errno::NODATA.into()),
            _ => {}
        }
        let (base, name) = (object.meta.stamp, key.to_vec());
        let op = Op::Setxattr { fid, base, name, value: value.to_vec(), old };
        self.change(by, self.path(&object), op, |_| {
            xattr::set(&object, object.at(), key, value, flags)?;
            self.attributes_changed(&object)
        })
    }

    pub fn removexattr(&self, by: Caller, fid: Fid, key: &[u8]) -> Result<()> {
        if key == self.cache.tree.own_key() {
            return Err(Errno::NODATA.into());
        }
        let _object = self.cache.tree.lock_objects(&[fid]);
        let object = self.here(fid)?;
        if object.is_nameless() {
            return Ok(xattr::remove(&object, object.at(), key)?);
        }
        let old = xattr::get(&object, object.at(), key)?;
        let acl = key.starts_with(b"system.posix_acl_");
        if old.is_none() && !acl {
            return Err(Errno::NODATA.into());
        }
        let op = Op::Removexattr { fid, base: object.meta.stamp, name: key.to_vec(), old };
        self.change(by, self.path(&object), op, |_| {
            match xattr::remove(&object, object.at(), key) {
                Err(Errno::NODATA) if acl => {} // an ACL that is none may be removed
                done => done?,
            }
            self.attributes_changed(&object)
        })
    }

    fn attributes_changed(&self, object: &Object) -> Result<()> {
        if let Spot::Open(open) = &object.spot {
            open.attributes_changed(&object.stat, &object.stat_again()?);
        }
        Ok(())
    }
}

/// FUSE does not say what further groups the caller has: then a bit too many goes.
fn is_outsider(by: Caller, stat: &Stat) -> bool {
    by.uid != 0 && by.gid != stat.gid
}

/// What the wish comes to for this object.
fn change_of(wish: &Wish, stat: &Stat, by: Caller) -> Change {
    let now = time_of_ns(now_ns());
    let at = |when: Option<When>| {
        when.map(|when| match when {
            When::Now => now,
            When::At(time) => time,
        })
    };
    let mut change = Change {
        mode: wish.mode.map(|m| m & 0o7777),
        uid: wish.uid,
        gid: wish.gid,
        size: wish.size,
        atime: at(wish.atime),
        mtime: at(wish.mtime),
    };
    let cut_by_user = wish.size.is_some() && by.uid != 0;
    let loses = cut_by_user || wish.is_empty() || wish.uid.is_some() || wish.gid.is_some();
    if change.mode.is_none() && stat.kind() == Kind::File && loses {
        change.mode = without_set_id(stat.mode, is_outsider(by, stat));
    }
    // Truncation is a change of data: all nodes must get the same time for it.
    if wish.size.is_some() && change.mtime.is_none() {
        change.mtime = Some(now);
    }
    change
}

/// The attributes that `new` replaces.
fn old_of(new: &Change, stat: &Stat) -> Change {
    let old = attr_of(stat);
    Change {
        mode: new.mode.map(|_| old.mode & 0o7777),
        uid: new.uid.map(|_| old.uid),
        gid: new.gid.map(|_| old.gid),
        size: new.size.map(|_| old.size),
        atime: new.atime.map(|_| old.atime),
        mtime: new.mtime.map(|_| old.mtime),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_id_bits_go_as_posix_says() {
        for (mode, outsider, want) in [
            (0o6777, false, Some(0o777)),
            (0o4755, false, Some(0o755)),
            (0o2755, false, Some(0o755)),
            (0o2745, false, None), // no group execution: mandatory locking, stays
            (0o2745, true, Some(0o745)),
            (0o6745, false, Some(0o2745)),
            (0o755, true, None),
        ] {
            assert_eq!(without_set_id(mode, outsider), want, "{mode:o}");
        }
    }
}
