//! Applying a client's records to a served tree.
//!
//! Each record is certified (certify.rs), appended to the volume's history, carried out, and
//! settled. Its seq there is the stamp of everything that it touched. Objects are made as the
//! record's user; what is replaced keeps owner, mode and attributes of the old file. A record that
//! does not fit is kept aside (conflict.rs), and stops nothing. Lack of room, or a disk that fails,
//! ends the batch: what was applied before stays.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::certify::{self, Clash, Verdict, View, certify};
use super::hands::{self, Hands};
use super::meta::Meta;
use super::spool::Spool;
use super::swap;
use super::tree::{Dir, TreeError};
use super::volume::{Result, Volume, VolumeError};
use crate::kml::codec::Outcome;
use crate::kml::record::{
    Attr, Fid, Gone, Name, Op, Origin, Over, Place, ROOT, Range, Record, Seq, Stamp, Time,
};
use crate::sys::cred;
use crate::sys::{Errno, crash, fs};

/// The bytes of a store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content<'a> {
    /// the record has none
    None,
    /// of all its ranges in a row
    Inline(&'a [u8]),
    /// in the spool, each range at its place in the file
    Spooled,
    /// nobody has them any more: the file's data stay as they are
    Gone,
}

/// One record of a client.
#[derive(Clone, Copy, Debug)]
pub struct Incoming<'a> {
    pub seq: Seq,
    pub record: &'a Record,
    pub content: Content<'a>,
}

/// What became of some records.
#[derive(Debug, Default)]
pub struct Applied {
    /// the newest that needs not be sent again; 0 for none
    pub upto: Seq,
    /// new stamps of the objects that were touched
    pub stamps: Vec<(Fid, Stamp)>,
    /// objects of which the tree has another version than the client
    pub conflicts: Vec<Fid>,
    /// objects that changed although the client's records do not name them
    pub also: Vec<Fid>,
    /// objects that lost their last name: nobody will see them again
    pub gone: Vec<Fid>,
    /// why the rest was not applied
    pub failure: Option<VolumeError>,
}

/// Errors that the same record meets again whenever it is tried: no reason to try again.
pub(super) fn is_final(e: Errno) -> bool {
    matches!(
        e,
        Errno::EXIST
            | Errno::NOTEMPTY
            | Errno::NOENT
            | Errno::NOTDIR
            | Errno::ISDIR
            | Errno::INVAL
            | Errno::PERM
            | Errno::ACCESS
            | Errno::LOOP
            | Errno::MLINK
            | Errno::NAMETOOLONG
            | Errno::OPNOTSUPP
            | Errno::TOOBIG
            | Errno::FBIG
            | Errno::RANGE
            | Errno::XDEV
            | Errno::BUSY
            | Errno::NODATA
            | Errno::STALE
            | Errno::TXTBSY
            | Errno::OVERFLOW
    )
}

impl Volume {
    /// Applies records of `node`, which come in order and cover its journal up to `upto`. Those
    /// that were applied before are passed over. Durable on return: no.
    pub fn apply(&mut self, node: u32, upto: Seq, changes: &[Incoming<'_>]) -> Applied {
        let mut out = Applied::default();
        self.kept.looked_back = 0;
        for change in changes {
            match self.apply_one(node, change, &mut out) {
                Ok(()) => out.upto = change.seq,
                Err(e) => {
                    log::warn!("{}: node {node}: record {}: {e}", self.name, change.seq.0);
                    out.failure = Some(e);
                    break;
                }
            }
        }
        if out.failure.is_none() {
            out.upto = upto;
        } else {
            // it comes again, and room may be what was missing
            let has_bytes = |change: &&Incoming<'_>| {
                matches!(change.content, Content::Spooled | Content::Inline(_))
            };
            changes.iter().filter(has_bytes).for_each(|it| self.spool.remove(node, it.seq));
        }
        if let Err(e) = self.finish(node, &mut out) {
            log::warn!("{}: node {node}: {e}", self.name);
            out.upto = self.nodes.last(node).min(out.upto);
            out.failure.get_or_insert(e);
        }
        out.stamps.sort_unstable();
        out.stamps.reverse(); // the newest of each object first
        out.stamps.dedup_by_key(|(fid, _)| *fid);
        out.conflicts.sort_unstable();
        out.conflicts.dedup();
        out
    }
    /// Notes how far the client is, where its last records left none of their own.
    fn finish(&mut self, node: u32, out: &mut Applied) -> Result<()> {
        self.flush_touched()?;
        crash::point("apply-stamped");
        if self.nodes.last(node) < out.upto {
            self.note_seq(node, out.upto, Vec::new())?;
        }
        if !out.also.is_empty() {
            self.save_nodes()?; // the aliases must outlive what is acknowledged under them
        }
        Ok(())
    }
    pub(super) fn note_seq(&mut self, node: u32, seq: Seq, path: Vec<u8>) -> Result<()> {
        let origin = Origin { node, seq };
        let record = Record { time_ns: 0, origin, uid: 0, gid: 0, path, op: Op::Noop };
        let ticket = self.log.append(&record)?;
        self.log.settle(ticket, Outcome::Done);
        self.nodes.note(node, seq, true);
        Ok(())
    }

    fn apply_one(&mut self, node: u32, change: &Incoming<'_>, out: &mut Applied) -> Result<()> {
        let Incoming { seq, content, .. } = *change;
        if seq <= self.nodes.last(node) {
            self.spool.remove(node, seq);
            return Ok(());
        }
        let mut record = change.record.clone();
        record.origin = Origin { node, seq };
        if self.nodes.has_aliases(node) {
            map_fids(&mut record.op, |fid| self.nodes.alias(node, fid));
            if record.op != change.record.op {
                // nor does the author have in its own objects what others gave to these
                out.also.extend(record.op.touched());
                let own = |fid: &Fid| change.record.op.touched().any(|own| own == *fid);
                out.conflicts.extend(record.op.touched().filter(|fid| !own(fid)));
            }
        }
        if seq <= self.nodes.seen(node) && !self.comes_again(&record.op)? {
            return Ok(());
        }
        self.follow(node, &mut record.op)?;
        let verdict = match certify(self, (node, seq), &record, content)? {
            Verdict::Conflict(Clash::OtherObject)
                if self.has_outlived((node, seq), &record.op)? =>
            {
                Verdict::Same
            }
            verdict => verdict,
        };
        log::trace!("{}: {node}:{} {:?}: {verdict:?}", self.name, seq.0, record.op);
        crash::point("apply-certified");
        if certify::is_of_others(self, node, &record.op, verdict)? {
            out.conflicts.extend(record.op.touched());
        }
        match verdict {
            Verdict::Apply => {
                self.fit(node, &mut record.op)?;
                let op = record.op.clone();
                self.carry_out(record, content, out)?;
                self.after_change((node, seq), &op, out)?;
            }
            // The last power cut may have left it without its record, and without its last step.
            Verdict::Same if self.mark.is_some() => self.touch_again(&record)?,
            Verdict::Same => {}
            Verdict::Alias(to) => {
                if let Op::Rename { from, fid, .. } = &record.op {
                    // what it was to put there is there: its own goes
                    let gone =
                        Gone { fid: *fid, base: from.base, attr: Attr::default(), target: None };
                    let op = Op::Unlink { at: from.clone(), gone };
                    self.carry_out(Record { op, ..record.clone() }, Content::None, out)?;
                    self.after_change((node, seq), &record.op, out)?;
                }
                if let Some(from) = change.record.op.fid() {
                    self.nodes.add_alias(node, from, to);
                }
                out.also.push(to);
                out.conflicts.extend(change.record.op.touched());
            }
            Verdict::Conflict(clash) => self.conflict(record, content, clash, out)?,
        }
        self.spool.remove(node, seq);
        Ok(())
    }

    /// Whether the object, or what stands in its place, shows what the client itself did later, of
    /// which a power cut took the record and left the effect: that comes again, too. File systems
    /// keep a sequence of changes up to some point: what came before it was there, and is over. What
    /// the client did since it first came after the cut is no part of that.
    fn has_outlived(&mut self, (node, seq): (u32, Seq), op: &Op) -> Result<bool> {
        let Some(mark) = self.mark else { return Ok(false) };
        if self.brought.get(&node).is_none_or(|newest| seq > *newest) {
            return Ok(false);
        }
        let is_its = |meta: &Meta| meta.author == node && meta.stamp == mark;
        if let Some(fid) = op.fid()
            && self.find(fid)?.is_some_and(|there| is_its(&there.meta))
        {
            return Ok(true);
        }
        for place in op.places().into_iter().flatten() {
            if self.standing(place)?.ok().flatten().is_some_and(|(meta, _)| is_its(&meta)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What belongs to other contents than those that are there is not set.
    fn fit(&mut self, node: u32, op: &mut Op) -> Result<()> {
        if let Op::Setattr { fid, base, new, .. } = op
            && (new.size.is_some() || new.atime.is_some() || new.mtime.is_some())
            && let Some(there) = self.find(*fid)?
        {
            certify::fit(new, &there, node, self.known(*base));
        }
        Ok(())
    }

    /// Whether a record that was lost with the power, and redone at open, is to be applied when it
    /// comes once more: contents are, and so is what was set after them, size and times above all,
    /// which they would undo.
    fn comes_again(&self, op: &Op) -> Result<bool> {
        match op {
            Op::Store { .. } => Ok(true),
            Op::Setattr { fid, .. } | Op::Setxattr { fid, .. } | Op::Removexattr { fid, .. } => {
                match self.tree.find(*fid) {
                    // a directory has no contents, and its time is that of a later record
                    Ok((dir, name, _)) => {
                        Ok(fs::stat(&*dir, name.as_bytes())?.kind() == fs::Kind::File)
                    }
                    Err(TreeError::Gone(_)) => Ok(false), // redone as well: it was removed
                    Err(e) => Err(e.into()),
                }
            }
            _ => Ok(false),
        }
    }

    /// Journals the record, does it, and settles it. One that the file system refuses becomes a
    /// conflict.
    pub(super) fn carry_out(
        &mut self,
        mut record: Record,
        content: Content<'_>,
        out: &mut Applied,
    ) -> Result<()> {
        self.note_past(&mut record)?;
        let done = self.journaled(&record, content);
        match done {
            Ok(stamp) => {
                self.nodes.note(record.origin.node, record.origin.seq, true);
                for fid in record.op.touched() {
                    match fid == ROOT || self.tree.names(fid).is_ok_and(|n| !n.is_empty()) {
                        true => out.stamps.push((fid, stamp)),
                        false => out.gone.push(fid),
                    }
                }
                Ok(())
            }
            Err(VolumeError::Os(e)) if is_final(e) => {
                self.keep_aside(&record, content, Clash::Refused(e))?;
                out.conflicts.extend(record.op.touched());
                Ok(())
            }
            Err(VolumeError::Gone(_) | VolumeError::NotADir) => {
                self.keep_aside(&record, content, Clash::Gone)?;
                out.conflicts.extend(record.op.touched());
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    /// Journals a record, does it, and settles it.
    pub(super) fn journaled(&mut self, record: &Record, content: Content<'_>) -> Result<Stamp> {
        let ticket = self.log.append(record)?;
        crash::point("apply-journaled");
        let stamp = self.lives.stamp(ticket.seq);
        let before = self.weigh(&record.op);
        let done = match self.perform(record, content, stamp) {
            // a file system says the same when an attribute is too large for it
            Err(VolumeError::NoRoom)
                if matches!(record.op, Op::Setxattr { .. }) && self.has_room() =>
            {
                Err(Errno::TOOBIG.into())
            }
            done => done,
        };
        let after = self.weigh(&record.op);
        self.note_usage(before, after);
        let outcome = if done.is_ok() { Outcome::Done } else { Outcome::Void };
        crash::point("apply-done");
        self.log.settle(ticket, outcome);
        crash::point("apply-settled");
        if let (Err(VolumeError::Mixed(_)), Op::Store { fid, .. }) = (&done, &record.op) {
            // no version that anybody knows: the old stamp must not name it
            let restamp = |meta: &mut Meta| restamped(meta, record.origin.node, stamp);
            if let Err(e) = self.tree.edit_meta(*fid, restamp) {
                log::error!("{}: {fid} is half written under its old stamp: {e}", self.name);
            }
        }
        done.map(|()| stamp)
    }

    fn has_room(&self) -> bool {
        let enough =
            |s: fs::Space| u64::from(s.block_len).saturating_mul(s.blocks_available) > 16 << 20;
        self.space().is_ok_and(enough)
    }

    /// Does what a record says. The parent directories get their stamps later.
    pub(super) fn perform(
        &mut self,
        record: &Record,
        content: Content<'_>,
        stamp: Stamp,
    ) -> Result<()> {
        match &record.op {
            Op::Store { fid, size, mtime, ranges, .. } => {
                let data = (*size, *mtime, &ranges[..]);
                self.store(record.origin, *fid, data, content, stamp)
            }
            Op::Rename { to, .. } => {
                let dir = self.dir(to.dir)?;
                self.at(&dir, &to.name)?; // what stands there has a fid from now on
                self.hands().perform(record, stamp)
            }
            _ => self.hands().perform(record, stamp),
        }
    }
    pub(super) fn hands(&mut self) -> Hands<'_> {
        Hands { tree: &self.tree, touched: &mut self.touched }
    }
    /// Gives the directories whose entries changed the stamp of the last change.
    pub(super) fn flush_touched(&mut self) -> Result<()> {
        self.hands().flush_touched()
    }
    pub(super) fn object_path(&self, fid: Fid) -> Result<(Arc<Dir>, Vec<u8>)> {
        Ok(hands::object_path(&self.tree, fid)?)
    }

    /// New data of a file: beside it and by rename where it is all of a file that has some already;
    /// in place otherwise, with a way back (swap.rs).
    fn store(
        &mut self,
        origin: Origin,
        fid: Fid,
        (size, mtime, ranges): (u64, Time, &[Range]),
        content: Content<'_>,
        stamp: Stamp,
    ) -> Result<()> {
        let (dir, name) = self.tree.place(fid)?;
        let stat = fs::stat(&*dir, name.as_bytes())?;
        if stat.kind() != fs::Kind::File {
            return Err(Errno::INVAL.into());
        }
        let old = self.tree.meta(&dir, &name)?.unwrap_or_else(|| Meta::whole(fid));
        let mut meta = old.clone();
        restamped(&mut meta, origin.node, stamp);
        let times = (fs::SetTime::Keep, fs::SetTime::At(mtime.sec, mtime.nsec.min(999_999_999)));
        if content == Content::Gone {
            return Ok(self.tree.set_meta(&dir, &name, &meta)?);
        }
        let whole = covers(ranges, size) && stat.nlink == 1;
        if whole && (stat.size > 0 || content == Content::Spooled) {
            let file = self.spool.get(origin.node, origin.seq).map_err(TreeError::from)?;
            if let Content::Inline(bytes) = content {
                fs::truncate(&file, 0)?;
                write_ranges(&file, ranges, bytes).map_err(TreeError::from)?;
            }
            fs::truncate(&file, size).map_err(TreeError::from)?;
            self.dress(&file, &dir, &name, &stat)?;
            crash::point("store-dressed");
            self.tree.set_meta_of(&file, &meta)?;
            fs::utimes_fd(&file, fs::SetTime::At(stat.atime.0, stat.atime.1), times.1)?;
            let spooled = Spool::name(origin.node, origin.seq);
            // Contents are no change of the directory: its time stays.
            let (sec, nsec) = fs::fstat(&*dir)?.mtime;
            fs::rename(&self.spool, &spooled, &*dir, name.as_bytes(), fs::RenameMode::Replace)?;
            crash::point("store-renamed");
            // The contents have left the spool, and could not be kept aside any more.
            if let Err(e) = self.tree.touch(&dir, Time { sec, nsec }) {
                log::warn!("{}: the time of the directory of {fid}: {e}", self.name);
            }
            return Ok(());
        }
        let file = fs::open(&*dir, name.as_bytes(), fs::o::RDWR | fs::o::NONBLOCK, 0)?;
        let set_times = || fs::utimes_fd(&file, times.0, times.1);
        // Bytes that are cut off nobody can put back: what may fail is tried before. The stamp comes
        // last, for it says that all else is done.
        let finish = || -> Result<()> {
            self.tree.set_meta_of(&file, &old)?;
            set_times()?;
            fs::truncate(&file, size).map_err(TreeError::from)?;
            let done = set_times().map_err(TreeError::from);
            match done.and_then(|()| self.tree.set_meta_of(&file, &meta)) {
                Err(e) if size < stat.size => Err(VolumeError::Mixed(e.errno())),
                done => Ok(done?),
            }
        };
        match content {
            Content::None | Content::Gone => finish(),
            Content::Inline(bytes) if stat.size == 0 => {
                let written = write_ranges(&file, ranges, bytes).map_err(TreeError::from);
                let done = written.map_err(VolumeError::from).and_then(|()| finish());
                if done.is_err() {
                    fs::truncate(&file, 0)?; // as it was
                }
                done
            }
            Content::Inline(_) | Content::Spooled => {
                let from = self.spool.get(origin.node, origin.seq).map_err(TreeError::from)?;
                if let Content::Inline(bytes) = content {
                    fs::truncate(&from, 0)?;
                    write_ranges(&from, ranges, bytes).map_err(TreeError::from)?;
                }
                swap::in_place(&from, &file, ranges, finish)
            }
        }
    }
    /// Makes a new file look like the one that it replaces.
    fn dress(&self, file: &OwnedFd, dir: &Dir, name: &Name, stat: &fs::Stat) -> Result<()> {
        match fs::chown(file, b"", Some(stat.uid), Some(stat.gid)) {
            Err(Errno::PERM) if !cred::is_root() => {}
            done => done?,
        }
        for key in fs::xattr::list(dir, name.as_bytes())? {
            // a change of the data ends a file's capabilities
            if key == self.tree.own_key() || key == b"security.capability" {
                continue;
            }
            if let Some(value) = fs::xattr::get(dir, name.as_bytes(), &key)? {
                fs::xattr::set(file, b"", &key, &value, 0).map_err(TreeError::from)?;
            }
        }
        Ok(fs::chmod_fd(file, stat.mode & 0o7777)?)
    }
}

/// Notes a change of the object's contents; an older one than the last is no news.
pub fn restamped(meta: &mut Meta, node: u32, stamp: Stamp) {
    if stamp > meta.data {
        if meta.data_author != node {
            (meta.data_foreign, meta.data_author) = (meta.data, node);
        }
        meta.data = stamp;
    }
    noted(meta, node, stamp);
}

/// Notes a change of the object that leaves its contents as they are.
pub fn noted(meta: &mut Meta, node: u32, stamp: Stamp) {
    if stamp <= meta.stamp {
        return;
    }
    if meta.author != node {
        (meta.foreign, meta.author) = (meta.stamp, node);
    }
    meta.stamp = stamp;
}

/// Whether ranges in a row are all of a file.
fn covers(ranges: &[Range], size: u64) -> bool {
    let mut end = 0;
    for range in ranges {
        if range.at > end {
            return false;
        }
        end = end.max(range.at + range.len);
    }
    size > 0 && end >= size
}

pub(super) fn write_ranges(file: &OwnedFd, ranges: &[Range], mut bytes: &[u8]) -> fs::Result<()> {
    for range in ranges {
        let (piece, rest) = bytes.split_at_checked(range.len as usize).ok_or(Errno::INVAL)?;
        fs::pwrite_sparse(file, piece, range.at)?;
        bytes = rest;
    }
    Ok(())
}

/// What lies beyond the source's end is left out: the file has become shorter since.
pub(super) fn copy_ranges(from: &OwnedFd, to: &OwnedFd, ranges: &[Range]) -> fs::Result<()> {
    let mut buf = vec![0; 1 << 20];
    for range in ranges {
        let mut into = 0;
        while into < range.len {
            let want = (range.len - into).min(buf.len() as u64) as usize;
            let have = match fs::pread(from.as_fd(), &mut buf[..want], range.at + into) {
                Ok(0) => break,
                Err(Errno::INTR) => continue,
                other => other?,
            };
            fs::pwrite_sparse(to, &buf[..have], range.at + into)?;
            into += have as u64;
        }
    }
    Ok(())
}

/// Puts other fids for those that a record names: what a client calls by its own, by the tree's.
pub fn map_fids(op: &mut Op, map: impl Fn(Fid) -> Fid) {
    let at_map = |place: &mut Place| place.dir = map(place.dir);
    match op {
        Op::Noop => {}
        Op::Create { at, fid, .. }
        | Op::Mkdir { at, fid, .. }
        | Op::Symlink { at, fid, .. }
        | Op::Mknod { at, fid, .. }
        | Op::Link { at, fid, .. } => {
            at_map(at);
            *fid = map(*fid);
        }
        Op::Rename { from, to, fid, over, .. } => {
            at_map(from);
            at_map(to);
            *fid = map(*fid);
            match over {
                Over::Nothing { .. } => {}
                Over::Replaced(gone) => gone.fid = map(gone.fid),
                Over::Exchanged { fid, .. } => *fid = map(*fid),
            }
        }
        Op::Unlink { at, gone } | Op::Rmdir { at, gone } => {
            at_map(at);
            gone.fid = map(gone.fid);
        }
        Op::Setattr { fid, .. }
        | Op::Setxattr { fid, .. }
        | Op::Removexattr { fid, .. }
        | Op::Store { fid, .. } => *fid = map(*fid),
    }
}
