//! What the last life of a server left open: found in the journal, and brought to an end.
//!
//! After the death of the process the page cache is as it was: everything that is settled stands in
//! the tree, and at most one record is not settled. After a loss of power, what lies behind the
//! journal's cursor `tree` may be in the tree or not: its changes of names and attributes are done
//! again, in order, each only where it is missing; contents are not here any more, so the client is
//! asked for all of it again (none of it was acknowledged), and what is in the tree then is passed
//! over. Doing all of this twice changes nothing.
//! A backup that was taken while its volume was served is one of those, too: its files were not all
//! copied at one time.
//!
//! What clients were shown of it is no version any more, whether its record is lost, its effect, or
//! neither (lives.rs): the history goes on with a record that says so, objects of which the tree has
//! a version from behind the cursor get a new stamp (behind.rs), and so does a file that a store may
//! have left half written, after a kill, too. Authors stay as they are: what comes again still fits.

use super::apply::{Content, restamped};
use super::meta::Meta;
use super::ops::time_of_ns;
use super::power::clock_ns;
use super::recover::note;
use super::tree::TreeError;
use super::volume::{CURSOR, Result, Volume, VolumeError};
use crate::kml::codec::{Entry, Outcome};
use crate::kml::record::{Change, Fid, Op, Origin, Over, Place, Record, Seq, Stamp};
use crate::sys::{Errno, crash, cred, fs};

impl Volume {
    /// `clean`: the last life ended as it should. `cut`: it ended with the power; then stamps between
    /// the two that are returned may be lost.
    pub(super) fn recover(&mut self, clean: bool, cut: bool) -> Result<Option<(Stamp, Stamp)>> {
        let log = self.log.clone();
        let (kept, last) = (Seq(log.cursor(CURSOR)), log.last());
        let (mut redone, mut half_written) = (0, Vec::new());
        if cut {
            let ticket = log.append(&Record::lost(clock_ns()))?;
            log.settle(ticket, Outcome::Done);
        }
        for entry in log.entries(self.nodes.as_of().next().max(log.first())) {
            let entry = entry?;
            if entry.seq > last {
                break;
            }
            let origin = entry.record.origin;
            let in_doubt = cut && entry.seq > kept;
            let done = match entry.outcome {
                Outcome::Void => continue,
                Outcome::Done if !in_doubt => {
                    if !clean && !cred::is_root() {
                        let restored = self.restore_loose(&entry);
                        self.if_possible(&entry, restored)?;
                    }
                    true
                }
                _ => {
                    redone += 1;
                    let redone = self.redo(&entry);
                    self.if_possible(&entry, redone)?.unwrap_or(false) // it comes again
                }
            };
            if let (Op::Store { fid, .. }, false) = (&entry.record.op, done) {
                half_written.push((*fid, origin.node));
            }
            if entry.outcome == Outcome::Intended {
                let outcome = if done { Outcome::Done } else { Outcome::Void };
                log.settle_seq(entry.seq, outcome)?;
                crash::point("recover-settled");
            }
            if done || in_doubt {
                self.nodes.note(origin.node, origin.seq, done && !in_doubt);
            }
            if done && !clean {
                note(&self.tree.index, &entry.record.op)?; // it may have forgotten the newest
            }
        }
        if redone > 0 {
            log::info!("{}: {redone} records of the last life were looked at again", self.name);
        }
        let flushed = self.flush_touched();
        unless_refused(&self.name, flushed)?;
        for (fid, node) in half_written {
            self.label(fid, node)?;
        }
        Ok(cut.then(|| (self.lives.stamp(kept), self.lives.stamp(last.next()))))
    }
    /// What cannot be looked at, or is damaged, is passed over: one object does not keep all the others
    /// from being served.
    fn if_possible<T>(&self, entry: &Entry, done: Result<T>) -> Result<Option<T>> {
        match done {
            Err(e @ (VolumeError::Os(_) | VolumeError::Tree(TreeError::BadMeta(_)))) => {
                let path = entry.record.path.escape_ascii();
                log::warn!("{}: record {}, of /{path}: {e}", self.name, entry.seq.0);
                Ok(None)
            }
            done => done.map(Some),
        }
    }
    /// A file is not what anybody was told of it. Its author's record comes again, and fits.
    fn label(&mut self, fid: Fid, node: u32) -> Result<()> {
        let meta = match self.tree.find(fid) {
            Ok((_, _, meta)) => meta,
            // what cannot be read is not shown to anybody
            Err(TreeError::Gone(_) | TreeError::Os(_) | TreeError::BadMeta(_)) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let (new, old) = (Change::default(), Change::default());
        let op = Op::Setattr { fid, base: meta.stamp, new, old };
        let (path, origin) = (self.tree.path_by_fid(fid), Origin::default());
        let record = Record { time_ns: clock_ns(), origin, uid: 0, gid: 0, path, op };
        let ticket = self.log.append(&record)?;
        let stamp = self.lives.stamp(ticket.seq);
        let done = self.tree.edit_meta(fid, |meta| restamped(meta, node, stamp));
        self.log.settle(ticket, Outcome::Done);
        unless_refused(&self.name, done.map_err(VolumeError::from))
    }

    /// Does a record once more, where it is missing; true if it stands in the tree now.
    fn redo(&mut self, entry: &Entry) -> Result<bool> {
        let stamp = self.lives.stamp(entry.seq);
        let record = &entry.record;
        let missing = match &record.op {
            Op::Noop => false,
            Op::Store { fid, .. } => return self.is_stamped(*fid, stamp),
            Op::Create { at, fid, .. }
            | Op::Mkdir { at, fid, .. }
            | Op::Symlink { at, fid, .. }
            | Op::Mknod { at, fid, .. } => {
                let adopted = self.adopt(at, *fid, (record.origin.node, stamp))?;
                let half_made =
                    entry.outcome == Outcome::Intended && self.fid_at(at)? == Some(*fid);
                if adopted || half_made {
                    // the last step of its making
                    let dir = self.dir(at.dir)?;
                    self.tree.set_times(&dir, &at.name, time_of_ns(record.time_ns))?;
                    self.tree.touch(&dir, time_of_ns(record.time_ns))?;
                    return Ok(true);
                }
                self.fid_at(at)?.is_none() && self.is_gone(*fid)
            }
            Op::Link { at, .. } => self.fid_at(at)?.is_none(),
            Op::Rename { from, fid, .. } => self.fid_at(from)? == Some(*fid),
            Op::Unlink { at, gone } | Op::Rmdir { at, gone } => self.fid_at(at)? == Some(gone.fid),
            Op::Setattr { .. } | Op::Setxattr { .. } | Op::Removexattr { .. } => true,
        };
        if !missing {
            // An older record that was done again may have set its directory's time since.
            self.touch_again(record)?;
            return Ok(true);
        }
        match self.perform(record, Content::None, stamp) {
            Ok(()) => Ok(true),
            Err(e @ (VolumeError::NoRoom | VolumeError::Log(_) | VolumeError::State(_))) => Err(e),
            Err(e) => {
                // a later record took away what it needs, or it had failed before as well
                log::info!("{}: record {}: {e}", self.name, entry.seq.0);
                Ok(false)
            }
        }
    }
    /// Sets the times of a record's directories, where all else of it stands.
    pub(super) fn touch_again(&mut self, record: &Record) -> Result<()> {
        for place in record.op.places().into_iter().flatten() {
            match self.dir(place.dir) {
                Ok(dir) => self.tree.touch(&dir, time_of_ns(record.time_ns))?,
                Err(VolumeError::Gone(_) | VolumeError::NotADir) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
    /// Objects that carry no attribute have their fid in the index alone, whose newest entries died
    /// with the process. Record by record, the last word on each name is the journal's.
    fn restore_loose(&mut self, entry: &Entry) -> Result<()> {
        let stamp = self.lives.stamp(entry.seq);
        let node = entry.record.origin.node;
        let named: [Option<(&Place, Fid)>; 2] = match &entry.record.op {
            Op::Symlink { at, fid, .. } | Op::Mknod { at, fid, .. } | Op::Link { at, fid, .. } => {
                [Some((at, *fid)), None]
            }
            Op::Rename { from, to, fid, over: Over::Exchanged { fid: other, .. }, .. } => {
                [Some((to, *fid)), Some((from, *other))]
            }
            Op::Rename { to, fid, .. } => [Some((to, *fid)), None],
            _ => return Ok(()),
        };
        for (at, fid) in named.into_iter().flatten() {
            let Ok(dir) = self.dir(at.dir) else { continue };
            let name = at.name.as_bytes();
            let Ok(stat) = fs::stat(&*dir, name) else { continue };
            if !matches!(stat.kind(), fs::Kind::File | fs::Kind::Dir) {
                let meta = Meta { author: node, stamp, ..Meta::whole(fid) };
                self.tree.set_meta(&dir, &at.name, &meta)?;
                self.tree.index.add(fid, at.dir, &at.name).map_err(TreeError::from)?;
            }
        }
        Ok(())
    }
    /// A crash came between the making of an object and the noting of its fid.
    fn adopt(&mut self, at: &Place, fid: Fid, (node, stamp): (u32, Stamp)) -> Result<bool> {
        let Ok(dir) = self.dir(at.dir) else { return Ok(false) };
        let there = fs::stat(&*dir, at.name.as_bytes()).is_ok();
        if !there || self.tree.meta(&dir, &at.name)?.is_some() {
            return Ok(false);
        }
        let meta = Meta { author: node, stamp, ..Meta::whole(fid) };
        self.tree.set_meta(&dir, &at.name, &meta)?;
        self.tree.index.set(fid, at.dir, &at.name);
        Ok(true)
    }
    fn fid_at(&mut self, at: &Place) -> Result<Option<Fid>> {
        Ok(self.standing(at)?.ok().flatten().map(|(meta, _)| meta.fid))
    }
    fn is_gone(&self, fid: Fid) -> bool {
        self.tree.place(fid).is_err()
    }
    fn is_stamped(&self, fid: Fid, stamp: Stamp) -> Result<bool> {
        let (dir, name) = match self.tree.place(fid) {
            Ok(place) => place,
            Err(TreeError::Gone(_)) => return Ok(false),
            Err(e) => return Err(e.into()),
        };
        match self.tree.meta(&dir, &name) {
            Ok(meta) => Ok(meta.is_some_and(|meta| meta.stamp >= stamp)),
            Err(TreeError::Os(Errno::NOENT)) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }
}

/// An object that takes no stamp.
fn unless_refused(volume: &str, done: Result<()>) -> Result<()> {
    match done {
        Err(VolumeError::Os(e)) => {
            log::warn!("{volume}: an object cannot be stamped: {e}");
            Ok(())
        }
        done => done,
    }
}
