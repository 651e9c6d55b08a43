//! Records in doubt: each is held against the tree, in order, and done again where it is missing.
//!
//! ```text
//!  record                        the tree shows                     then
//!  any                           outcome void                       stays void
//!  any                           outcome unknown                    as after a kill (recover.rs)
//!  any                           the object nowhere, for a later    done
//!                                record that holds removed it
//!  mkdir symlink mknod create    the fid, anywhere                  done
//!                                the name without a fid             give it the fid; done
//!                                neither fid nor name               do it; a create of contents: void
//!                                the name with another fid          void
//!  link                          the name free, the object there    do it
//!  rename                        the fid at the old name, and at    do it
//!                                the new one what it replaced, or
//!                                nothing
//!                                the fid elsewhere                  done
//!                                no fid anywhere                    void
//!  unlink rmdir                  the fid at the name                do it; never the last name of a
//!                                                                   file that had others then
//!  setattr setxattr removexattr  the object                         do it again; a size only where
//!                                                                   the file is older than the record
//!  store                         -                                  see power.rs, (4)
//!  any                           of an object that is void          void
//! ```
//!
//! Nobody was ever told more of these records than that they were done: the server never saw them.

use std::collections::HashSet;

use super::super::cache::CacheError;
use super::super::meta::Meta;
use super::super::ops::{attr_of, time_of_ns};
use super::super::recover::{self, Seen, adopt, again, at_place};
use super::super::tree::{Result, TreeError};
use super::Job;
use crate::kml::codec::{Entry, Outcome};
use crate::kml::record::{Fid, Name, Op, Over, Place, Record, Seq};
use crate::sys::cred::Caller;
use crate::sys::fs::{self, RenameMode};
use crate::sys::{Errno, crash};

/// What becomes of a record.
#[derive(PartialEq, Eq)]
enum Fate {
    /// it stood in the tree, or a later one took its effect away
    There,
    Redone,
    Void,
}

fn fid_and_places(op: &Op) -> Vec<(Fid, (Fid, Name))> {
    let fid = op.fid().unwrap_or_default();
    let places = op.places().into_iter().flatten();
    places.map(|at| (fid, (at.dir, at.name.clone()))).collect()
}

impl Job<'_> {
    /// Looks at all records behind `kept`.
    pub(super) fn redo_all(&mut self, kept: Seq) -> std::result::Result<(), CacheError> {
        let (tree, log) = (self.tree, self.log);
        self.removed = self.removed_by_records(kept)?;
        let mut void: HashSet<Fid> = HashSet::new();
        for entry in log.entries(kept.next().max(log.first())) {
            let entry = entry?;
            if entry.outcome == Outcome::Void {
                continue;
            }
            self.report.in_doubt += 1;
            let fid = entry.record.op.fid().unwrap_or_default();
            let fate = match void.contains(&fid) {
                true => Fate::Void,
                false => self.redo(&entry)?,
            };
            if fate == Fate::Void {
                if matches!(entry.record.op, Op::Create { .. } | Op::Mkdir { .. }) {
                    void.insert(fid);
                }
                self.report.void += 1;
                log::info!("record {} has no effect any more, it is void", entry.seq.0);
                log.settle_seq(entry.seq, Outcome::Void)?;
                continue;
            }
            self.report.redone += u64::from(fate == Fate::Redone);
            if entry.outcome == Outcome::Intended {
                log.settle_seq(entry.seq, Outcome::Done)?;
                self.settled.extend(fid_and_places(&entry.record.op));
                recover::note(&tree.index, &entry.record.op)?;
            }
            crash::point("power-redone");
        }
        Ok(())
    }

    /// Objects that are nowhere because a record that holds took them away: what came before is not
    /// missing. Newest first, for a record of an object that is lost takes nothing away.
    fn removed_by_records(&self, kept: Seq) -> std::result::Result<HashSet<Fid>, CacheError> {
        let mut removed: HashSet<Fid> = HashSet::new();
        for entry in self.log.entries_back(self.log.last()) {
            let entry = entry?;
            if entry.seq <= kept {
                break;
            }
            let gone = match &entry.record.op {
                _ if entry.outcome == Outcome::Void => continue,
                Op::Unlink { gone, .. } | Op::Rmdir { gone, .. } => gone.fid,
                Op::Rename { fid, over: Over::Replaced(gone), .. } => {
                    let holds = removed.contains(fid) || !self.is_lost(*fid)?;
                    if !holds {
                        continue;
                    }
                    gone.fid
                }
                _ => continue,
            };
            if matches!(self.tree.find(gone), Err(TreeError::Gone(_))) {
                removed.insert(gone);
            }
        }
        Ok(removed)
    }

    /// Whether the object is nowhere, and its contents with it.
    fn is_lost(&self, fid: Fid) -> Result<bool> {
        match self.tree.find(fid) {
            Ok(_) => Ok(false),
            Err(TreeError::Gone(_)) => {
                Ok(self.announced.get(&fid).is_none_or(|(size, _)| *size > 0))
            }
            Err(e) => Err(e),
        }
    }

    /// Whether a record whose outcome was not known put the object there.
    pub(super) fn was_settled(&self, fid: Fid, place: &(Fid, Name)) -> bool {
        self.settled.iter().any(|(of, at)| *of == fid && at == place)
    }

    fn redo(&mut self, entry: &Entry) -> Result<Fate> {
        if entry.outcome == Outcome::Intended && !matches!(entry.record.op, Op::Setattr { .. }) {
            let found = recover::settle(self.tree, &entry.record, self.epoch)?;
            return Ok(if found == Outcome::Done { Fate::There } else { Fate::Void });
        }
        match self.try_redo(&entry.record) {
            Ok(fate) => Ok(fate),
            // No room, or a disk that fails: nothing can be said of what follows.
            Err(
                e @ (TreeError::Os(Errno::NOSPC | Errno::DQUOT | Errno::IO | Errno::ROFS)
                | TreeError::Index(_)),
            ) => Err(e),
            Err(e) => {
                log::info!("record {}: {e}", entry.seq.0);
                Ok(Fate::Void)
            }
        }
    }

    fn try_redo(&mut self, record: &Record) -> Result<Fate> {
        let tree = self.tree;
        let when = time_of_ns(record.time_ns);
        match &record.op {
            Op::Noop | Op::Store { .. } => Ok(Fate::There),
            Op::Create { at, fid, .. }
            | Op::Mkdir { at, fid, .. }
            | Op::Symlink { at, fid, .. }
            | Op::Mknod { at, fid, .. } => self.make(record, at, *fid),
            Op::Link { at, fid, .. } => match at_place(tree, at)? {
                Seen::Object(there) if there == *fid => Ok(Fate::There),
                Seen::Nothing => {
                    let (from, old) = tree.place(*fid)?;
                    let dir = tree.dir(at.dir)?;
                    tree.link((&from, &old), *fid, &dir, &at.name, when)?;
                    Ok(Fate::Redone)
                }
                _ => Ok(Fate::Void),
            },
            Op::Rename { from, to, fid, over, .. } => self.rename(record, (from, to), *fid, over),
            Op::Unlink { at, gone } => {
                if at_place(tree, at)? != Seen::Object(gone.fid) {
                    return Ok(Fate::There);
                }
                let dir = tree.dir(at.dir)?;
                let stat = fs::stat(&*dir, at.name.as_bytes())?;
                if gone.attr.nlink > 1 && stat.nlink == 1 {
                    return Ok(Fate::Void); // its other names went without a record
                }
                tree.unlink(&dir, &at.name, gone.fid, when)?;
                Ok(Fate::Redone)
            }
            Op::Rmdir { at, gone } => {
                if at_place(tree, at)? != Seen::Object(gone.fid) {
                    return Ok(Fate::There);
                }
                tree.rmdir(&*tree.dir(at.dir)?, &at.name, gone.fid, when)?;
                Ok(Fate::Redone)
            }
            Op::Setattr { fid, new, .. } => {
                let mut new = *new;
                let newest = self.announced.get(fid).and_then(|(_, mtime)| *mtime);
                let done = again(tree, *fid, |dir, name| {
                    let stat = if name.is_empty() { fs::fstat(dir) } else { fs::stat(dir, name) }?;
                    let is_later = |when| attr_of(&stat).mtime >= when;
                    let superseded = newest.is_some_and(|newest| Some(newest) != new.mtime);
                    if superseded || (new.size.is_some() && new.mtime.is_none_or(is_later)) {
                        // It was cut, or written to since: that is not to be cut again.
                        (new.size, new.mtime, new.atime) = (None, None, None);
                    }
                    recover::set(tree, dir, name, &new)
                })?;
                Ok(if done { Fate::Redone } else { Fate::Void })
            }
            Op::Setxattr { .. } | Op::Removexattr { .. } => {
                let done = recover::settle(tree, record, self.epoch)?;
                Ok(if done == Outcome::Done { Fate::Redone } else { Fate::Void })
            }
        }
    }

    fn make(&mut self, record: &Record, at: &Place, fid: Fid) -> Result<Fate> {
        let tree = self.tree;
        if self.removed.contains(&fid) {
            return Ok(Fate::There);
        }
        match tree.find(fid) {
            Ok(_) => return Ok(Fate::There),
            Err(TreeError::Gone(_)) => {}
            Err(e) => return Err(e),
        }
        match at_place(tree, at)? {
            Seen::Nothing => {}
            Seen::Nameless => {
                adopt(tree, at, fid, record, self.epoch)?;
                return Ok(Fate::There);
            }
            Seen::Object(_) => return Ok(Fate::Void),
        }
        let contents_gone = self.announced.get(&fid).is_some_and(|(size, _)| *size > 0);
        if contents_gone {
            return Ok(Fate::Void);
        }
        let dir = tree.dir(at.dir)?;
        let meta = Meta { epoch: self.epoch, ..Meta::whole(fid) };
        let by = |umask: u32| Caller { uid: record.uid, gid: record.gid, umask: umask & 0o777 };
        let (when, name) = (time_of_ns(record.time_ns), &at.name);
        match &record.op {
            Op::Create { mode, umask, .. } => {
                tree.create(&dir, name, by(*umask), *mode, &meta, when).map(drop)?;
            }
            Op::Mkdir { mode, umask, .. } => {
                tree.mkdir(&dir, name, by(*umask), *mode, &meta, when).map(drop)?;
            }
            Op::Symlink { target, .. } => tree.symlink(&dir, name, by(0), target, &meta, when)?,
            Op::Mknod { mode, umask, rdev, .. } => {
                tree.mknod(&dir, name, by(*umask), *mode, *rdev, &meta, when)?;
            }
            _ => return Ok(Fate::There),
        }
        Ok(Fate::Redone)
    }

    fn rename(
        &mut self,
        record: &Record,
        (from, to): (&Place, &Place),
        fid: Fid,
        over: &Over,
    ) -> Result<Fate> {
        let tree = self.tree;
        if at_place(tree, to)? == Seen::Object(fid) {
            return Ok(Fate::There);
        }
        if at_place(tree, from)? != Seen::Object(fid) {
            let known = tree.find(fid).is_ok() || self.removed.contains(&fid);
            return Ok(if known { Fate::There } else { Fate::Void });
        }
        let there = match at_place(tree, to)? {
            Seen::Nothing => None,
            Seen::Object(there) => Some(there),
            Seen::Nameless => return Ok(Fate::Void),
        };
        let mode = match (over, there) {
            (Over::Exchanged { fid, .. }, Some(there)) if there == *fid => RenameMode::Exchange,
            (Over::Exchanged { .. }, _) => return Ok(Fate::Void),
            (_, None) => RenameMode::NoReplace,
            (Over::Replaced(gone), Some(there)) if there == gone.fid => RenameMode::Replace,
            _ => return Ok(Fate::Void),
        };
        let (old, new) = (tree.dir(from.dir)?, tree.dir(to.dir)?);
        let when = time_of_ns(record.time_ns);
        tree.rename((&old, &from.name), (&new, &to.name), fid, there, mode, when)?;
        Ok(Fate::Redone)
    }
}
