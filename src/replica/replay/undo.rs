//! Replaying backwards: a record's inverse, made of its undo data, is a record like any other.
//!
//! ```text
//!  record                      its inverse                        what it does not tell
//!  create mkdir symlink mknod  unlink, rmdir
//!  link                        unlink
//!  rename                      rename back; what it replaced is   as unlink, rmdir
//!                              made again
//!  unlink rmdir                link, if the object has another    bytes of a file; extended
//!                              name; else it is made again        attributes
//!  setattr                     setattr of what was                bytes that were cut off
//!  setxattr removexattr        setxattr or removexattr
//!  store                       truncation, if it only appended    other bytes; the time
//! ```
//!
//! Old bytes are taken from where there are some, at the end, as forwards; without them a file keeps
//! those that it has, and a removed one does not come back. After a record is undone, the stamps of
//! what it touched are one below its own: so undoing twice is as good as once, and replaying
//! forwards begins there again. Directories and files get the time of the last record before the
//! part that says one; where the journal has none, they keep theirs.

use super::contents::{Missing, Version};
use super::survey::contents_changed;
use super::{Fate, Lost, Replay, Result, Verdict, Want, refused};
use crate::kml::codec::Entry;
use crate::kml::record::{Attr, Change, Fid, Gone, Op, Over, Place, ROOT, Record, Seq, Stamp};
use crate::replica::tree::TreeError;
use crate::sys::Errno;
use crate::sys::fs::{self, Kind, SetTime};

impl Replay {
    pub(super) fn back(&mut self, entry: &Entry) -> Result<Fate> {
        let (record, stamp) = (&entry.record, self.stamp(entry.seq));
        self.recognise_after(record)?;
        if stamp != Stamp(0) && !self.is_in_effect(&record.op, stamp) {
            self.want_again(&record.op)?;
            return Ok(Fate::Standing);
        }
        let (inverse, lost) = self.inverse(record, entry.seq);
        if inverse.is_empty()
            && let Some(lost) = lost
        {
            return Ok(Fate::Lost(lost));
        }
        let times = self.times_of(&record.op);
        let mut fate = Fate::Standing;
        for op in inverse {
            let undone = Record { op, ..record.clone() };
            fate = match self.judge(&undone, entry.seq, Stamp(0)) {
                Ok(Verdict::Misfit(why)) => Fate::Misfit(why),
                Ok(Verdict::Standing) => continue,
                Ok(Verdict::Do) if self.dry => {
                    self.made.extend(undone.op.touched());
                    Fate::Done
                }
                Ok(Verdict::Do) => self.perform(&undone, Stamp(0))?,
                Err(e) => refused(e)?,
            };
            if matches!(fate, Fate::Misfit(_)) {
                return Ok(fate);
            }
        }
        if !self.dry {
            self.touched.clear();
            for (fid, time) in times {
                self.set_time(fid, time)?;
            }
            self.lower(&record.op, stamp)?;
            if let Some(fid) = record.op.fid().filter(|fid| self.wanted.contains_key(fid)) {
                self.target
                    .tree
                    .edit_meta(fid, |meta| meta.complete = false)
                    .or_else(unless_gone)?;
            }
        }
        Ok(lost.map_or(fate, Fate::Lost))
    }

    /// Of a tree without fids: what stands there now is what the record left.
    fn recognise_after(&mut self, record: &Record) -> Result<()> {
        let named: Option<(&Place, Fid)> = match &record.op {
            Op::Create { at, fid, .. }
            | Op::Mkdir { at, fid, .. }
            | Op::Symlink { at, fid, .. }
            | Op::Mknod { at, fid, .. }
            | Op::Link { at, fid, .. } => Some((at, *fid)),
            Op::Rename { to, fid, .. } => Some((to, *fid)),
            _ => None,
        };
        self.recognise(record)?;
        match named {
            Some((at, fid)) if !self.dry && self.target.is_plain => self.try_identify_at(at, fid),
            _ => Ok(()),
        }
    }

    fn is_in_effect(&self, op: &Op, stamp: Stamp) -> bool {
        let mut dirs = op.places().into_iter().flatten().peekable();
        if dirs.peek().is_none() {
            return op.fid().is_some_and(|fid| self.object_stamp(fid) >= stamp);
        }
        dirs.all(|place| self.object_stamp(place.dir) >= stamp)
    }

    /// The inverse of a record, in steps, and what it does not bring back.
    fn inverse(&mut self, record: &Record, seq: Seq) -> (Vec<Op>, Option<Lost>) {
        let base = Stamp(0);
        let change = |fid, new| Op::Setattr { fid, base, new, old: Change::default() };
        let op = match &record.op {
            Op::Noop => return (Vec::new(), None),
            Op::Mkdir { at, fid, .. } => Op::Rmdir { at: at.clone(), gone: nothing(*fid) },
            Op::Create { at, fid, .. }
            | Op::Symlink { at, fid, .. }
            | Op::Mknod { at, fid, .. }
            | Op::Link { at, fid, .. } => Op::Unlink { at: at.clone(), gone: nothing(*fid) },
            Op::Unlink { at, gone } | Op::Rmdir { at, gone } => {
                return self.made_again(at, gone, record, seq);
            }
            Op::Rename { .. } => return self.renamed_back(record, seq),
            op if op.fid().is_some_and(|fid| self.left.contains(&fid)) => {
                return (Vec::new(), Some(Lost::Later));
            }
            Op::Setattr { fid, new, old, .. } => {
                let mut was = *old;
                if let (Some(size), Some(old_size)) = (new.size, old.size)
                    && (size < old_size || self.wanted.contains_key(fid))
                {
                    self.want_old(*fid, old_size);
                    was.size = None;
                }
                change(*fid, was)
            }
            Op::Setxattr { fid, name, old, .. } | Op::Removexattr { fid, name, old, .. } => {
                let (fid, name) = (*fid, name.clone());
                match old.clone() {
                    Some(value) => Op::Setxattr { fid, base, name, value, old: None },
                    None => Op::Removexattr { fid, base, name, old: None },
                }
            }
            Op::Store { fid, ranges, old_size, .. } => {
                let appended = ranges.iter().all(|range| range.at >= *old_size);
                let mut new = Change { size: Some(*old_size), ..Change::default() };
                if !appended || self.wanted.contains_key(fid) {
                    self.want_old(*fid, *old_size);
                    new.size = None;
                }
                change(*fid, new)
            }
        };
        (vec![op], None)
    }

    /// The bytes that a file had before are wanted; each older record says better how many.
    fn want_old(&mut self, fid: Fid, size: u64) {
        let seq = self.survey.before.get(&fid).copied().unwrap_or_default();
        self.wanted.insert(fid, Want { seq, size, mtime: None });
    }

    /// An earlier undoing did not find a file's bytes.
    fn want_again(&mut self, op: &Op) -> Result<()> {
        let Some(fid) = contents_changed(op) else { return Ok(()) };
        let size = match op {
            Op::Store { old_size, .. } => Some(*old_size),
            Op::Setattr { old, .. } => old.size,
            _ => None,
        };
        if let (Ok((_, _, meta)), Some(size)) = (self.target.tree.find(fid), size)
            && !meta.complete
        {
            self.want_old(fid, size);
            self.older.insert(fid);
        }
        Ok(())
    }

    /// What did not come back by its own record cannot be renamed; what it changed names with can.
    fn renamed_back(&mut self, record: &Record, seq: Seq) -> (Vec<Op>, Option<Lost>) {
        let Op::Rename { from, to, fid, over, .. } = &record.op else { return (Vec::new(), None) };
        let step = |fid, from: &Place, to: &Place, over| {
            let (from, to, base) = (from.clone(), to.clone(), Stamp(0));
            Op::Rename { from, to, fid, base, over }
        };
        let free = || Over::Nothing { noreplace: true };
        let is_left = self.left.contains(fid);
        let own = (!is_left).then(|| step(*fid, to, from, free()));
        let later = is_left.then_some(Lost::Later);
        match over {
            Over::Nothing { .. } => (own.into_iter().collect(), later),
            Over::Exchanged { fid: other, .. } => match self.left.contains(other) {
                true => (own.into_iter().collect(), Some(Lost::Later)),
                false if is_left => (vec![step(*other, from, to, free())], later),
                false => {
                    let over = Over::Exchanged { fid: *other, base: Stamp(0) };
                    (vec![step(*fid, to, from, over)], None)
                }
            },
            Over::Replaced(gone) => {
                let (again, lost) = self.made_again(to, gone, record, seq);
                (own.into_iter().chain(again).collect(), lost.or(later))
            }
        }
    }

    /// How a removed object comes back.
    fn made_again(
        &mut self,
        at: &Place,
        gone: &Gone,
        record: &Record,
        seq: Seq,
    ) -> (Vec<Op>, Option<Lost>) {
        let (attr, fid, base) = (&gone.attr, gone.fid, Stamp(0));
        if matches!(self.object(fid), Ok(Ok(_))) {
            return (vec![Op::Link { at: at.clone(), fid, base }], None);
        }
        let (at, mode, umask) = (at.clone(), attr.mode & 0o7777, 0);
        let made = match (Kind::of(attr.mode), gone.target.clone()) {
            (Kind::Dir, _) => Op::Mkdir { at, fid, mode, umask },
            (Kind::Symlink, Some(target)) => Op::Symlink { at, fid, target },
            (Kind::Symlink, None) => return (Vec::new(), Some(Lost::Removed(Missing::Absent))),
            (Kind::File, _) => {
                if let Err(missing) = self.old_contents(gone, &record.path, seq) {
                    self.left.insert(fid);
                    return (Vec::new(), Some(Lost::Removed(missing)));
                }
                Op::Create { at, fid, mode, umask }
            }
            _ => Op::Mknod { at, fid, mode: attr.mode, umask, rdev: attr.rdev },
        };
        let new = was(attr, Kind::of(attr.mode) == Kind::Symlink);
        (vec![made, Op::Setattr { fid, base, new, old: Change::default() }], None)
    }

    /// Looks for the bytes of a removed file, and notes that they are wanted.
    fn old_contents(
        &mut self,
        gone: &Gone,
        path: &[u8],
        last: Seq,
    ) -> std::result::Result<(), Missing> {
        let attr = &gone.attr;
        if attr.size > 0 {
            let source = self.source.as_mut().ok_or(Missing::NoSource)?;
            // as it was: by size and time, for the journal does not say which record made it
            let (stamp, mtime) = (None, None);
            let last = self.survey.lives.stamp(last);
            let want = Version { stamp, size: attr.size, beyond: None, last, mtime };
            let found = source.find(gone.fid, path, &want)?;
            if found.stat.mtime != (attr.mtime.sec, attr.mtime.nsec) {
                return Err(Missing::Newer);
            }
            if !self.dry {
                self.wanted.insert(
                    gone.fid,
                    Want { seq: Seq(0), size: attr.size, mtime: Some(attr.mtime) },
                );
            }
        }
        Ok(())
    }

    /// Times that undoing must not change: of the directories, and of a file that is cut.
    fn times_of(&mut self, op: &Op) -> Vec<(Fid, (i64, u32))> {
        let dirs = op.places().into_iter().flatten().map(|place| place.dir);
        let all: Vec<Fid> = dirs.chain(contents_changed(op)).collect();
        self.older.extend(&all);
        let time = |fid: Fid| match self.object(fid) {
            Ok(Ok(there)) => Some((fid, there.stat.mtime)),
            _ => None,
        };
        all.into_iter().filter_map(time).collect()
    }

    fn set_time(&self, fid: Fid, (sec, nsec): (i64, u32)) -> Result<()> {
        let (tree, time) = (&self.target.tree, SetTime::At(sec, nsec));
        let done = match fid {
            ROOT => fs::utimes_fd(&**tree.root(), SetTime::Keep, time),
            _ => match tree.place(fid) {
                Ok((dir, name)) => fs::utimes(&*dir, name.as_bytes(), SetTime::Keep, time),
                Err(TreeError::Gone(_)) => Ok(()),
                Err(e) => return Err(e.into()),
            },
        };
        match done {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(TreeError::from(e).into()),
        }
    }

    /// What the record touched is at a version before it now.
    fn lower(&self, op: &Op, stamp: Stamp) -> Result<()> {
        if stamp == Stamp(0) {
            return Ok(());
        }
        for fid in op.touched() {
            let lowered = self.target.tree.edit_meta(fid, |meta| {
                let before = Stamp(stamp.0 - 1);
                (meta.stamp, meta.data) = (meta.stamp.min(before), meta.data.min(before));
            });
            lowered.or_else(unless_gone)?;
        }
        Ok(())
    }

    /// The end of undoing: times as the last record before the part says.
    pub(super) fn set_older_times(&mut self) -> Result<()> {
        for fid in std::mem::take(&mut self.older) {
            let Some(time) = self.survey.times.get(&fid) else { continue };
            let time = (time.sec, time.nsec);
            if matches!(self.object(fid), Ok(Ok(_))) {
                self.set_time(fid, time)?;
            }
        }
        Ok(())
    }
}

fn unless_gone(e: TreeError) -> std::result::Result<(), TreeError> {
    if matches!(e, TreeError::Gone(_)) { Ok(()) } else { Err(e) }
}

/// The inverse of making something takes its name away; what it was is not asked.
fn nothing(fid: Fid) -> Gone {
    Gone { fid, base: Stamp(0), attr: Attr::default(), target: None }
}

fn was(attr: &Attr, is_link: bool) -> Change {
    Change {
        mode: (!is_link).then_some(attr.mode & 0o7777),
        uid: Some(attr.uid),
        gid: Some(attr.gid),
        size: None,
        atime: Some(attr.atime),
        mtime: Some(attr.mtime),
    }
}
