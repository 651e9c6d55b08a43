//! Conflicts: the tree keeps its own version, the client's is kept aside, and nothing is blocked.
//!
//! ```text
//!   .imz-conflicts/NODE-SEQ/record.json   who, when, what, why, and both versions
//!   .imz-conflicts/NODE-SEQ/record        the record in the journal's encoding
//!   .imz-conflicts/NODE-SEQ/record.SEQ    a later one of the same client that it takes along
//!   .imz-conflicts/NODE-SEQ/data          the bytes of a store, each range at its place
//!   .imz-conflicts/NODE-SEQ/kept/NAME     an object that found its name taken
//! ```
//!
//! An object that was made under a taken name is made in `kept` instead, with its own fid: what the
//! client does with it later finds it there ([`Volume::follow`]). So is a file that was renamed to
//! a taken name, and a further link. What does not fit of an object of which the client has a
//! conflict already goes to that one. A conflict ends when somebody decides (resolve.rs); by itself
//! when the client takes its version away again, or turns out to have written the same.
//! imz-conflicts(7) says what becomes of each pair of changes.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde_json::{Value, json};

use super::apply::{Applied, Content};
use super::certify::{Clash, View};
use super::meta::Meta;
use super::spool::Spool;
use super::swap;
use super::tree::{CONFLICTS_NAME, Dir, TreeError};
use super::volume::{Result, Volume, VolumeError};
use crate::kml::codec::{self, Outcome};
use crate::kml::record::{
    Attr, Fid, Gone, Name, Op, Origin, Over, Place, Range, Record, Seq, Stamp,
};
use crate::sys::{Errno, crash, fs};

/// Newest records that are looked through, a batch, for who removed what a conflict is about.
const LOOK_BACK_MAX: usize = 4096;
/// Entries of a directory that cannot be removed that are looked at for a conflict to join.
const LEFT_BEHIND_MAX: usize = 64;
/// A conflict that was decided has this before its name until all of it is gone.
const GOING: &[u8] = b".gone-";

/// The conflicts of a volume, as its directory has them.
#[derive(Default)]
pub(super) struct Kept {
    pub count: u64,
    /// by client and object: what else does not fit goes there
    by_object: HashMap<(u32, Fid), String>,
    /// by the fid of `kept`
    by_dir: HashMap<Fid, String>,
    /// see [`LOOK_BACK_MAX`]
    pub looked_back: usize,
}

impl Volume {
    /// A record does not fit.
    pub(super) fn conflict(
        &mut self,
        mut record: Record,
        content: Content<'_>,
        clash: Clash,
        out: &mut Applied,
    ) -> Result<()> {
        let origin = record.origin;
        out.conflicts.extend(record.op.touched());
        let dir = self.keep_aside(&record, content, clash)?;
        let moves = self.is_moved_aside(&record.op, clash)?;
        if let (true, Op::Rename { over, .. }) = (moves, &mut record.op) {
            *over = Over::Nothing { noreplace: true };
        }
        let place = match &mut record.op {
            Op::Create { at, .. }
            | Op::Mkdir { at, .. }
            | Op::Symlink { at, .. }
            | Op::Mknod { at, .. }
            | Op::Link { at, .. }
            | Op::Rename { to: at, .. }
                if moves =>
            {
                at
            }
            _ => return self.note_seq(origin.node, origin.seq, record.path),
        };
        let kept = self.subdir(&dir, b"kept")?;
        self.kept.by_dir.insert(kept.fid, id_of(origin));
        place.dir = kept.fid;
        place.name = self.free_name(&kept, &place.name)?;
        out.also.push(kept.fid);
        let op = record.op.clone();
        self.carry_out(record, content, out)?;
        self.after_change((origin.node, origin.seq), &op, out)
    }

    /// Whether the object of a record that does not fit is put (or gets a name) among what is kept.
    /// A directory that was renamed stays where it is, under its old name.
    fn is_moved_aside(&mut self, op: &Op, clash: Clash) -> Result<bool> {
        let taken = matches!(clash, Clash::NameTaken | Clash::Changed);
        Ok(match op {
            Op::Create { .. } | Op::Mkdir { .. } | Op::Symlink { .. } | Op::Mknod { .. } => {
                clash != Clash::ForeignFid
            }
            Op::Rename { from, .. } => match self.standing(from)? {
                Ok(Some((_, stat))) => taken && stat.kind() != fs::Kind::Dir,
                _ => false,
            },
            Op::Link { fid, .. } => {
                (taken || clash == Clash::DirGone) && self.find(*fid)?.is_some()
            }
            _ => false,
        })
    }

    /// Keeps what a client wanted, whole. Doing it again changes nothing.
    pub(super) fn keep_aside(
        &mut self,
        record: &Record,
        content: Content<'_>,
        clash: Clash,
    ) -> Result<Arc<Dir>> {
        let origin = record.origin;
        let object = record.op.fid().map(|fid| (origin.node, fid));
        let id = self.belongs_to(record, clash)?.unwrap_or_else(|| id_of(origin));
        log::warn!(
            "{}: conflict {id}: record {} of {}, {}: {clash}",
            self.name,
            origin.seq.0,
            self.who(origin.node),
            record.path.escape_ascii()
        );
        let root = self.tree.root().clone();
        let all = self.subdir(&root, CONFLICTS_NAME)?;
        let is_new = fs::stat(&*all, id.as_bytes()) == Err(Errno::NOENT);
        let is_first = id == id_of(origin);
        let told = if is_first { self.told(record, clash)? } else { Value::Null };
        let dir = self.subdir(&all, id.as_bytes())?;
        if let (Op::Store { size, ranges, .. }, true) = (&record.op, content != Content::Gone) {
            self.keep_data(&dir, (origin, *size, ranges), content)?;
        }
        crash::point("conflict-data");
        let name = match is_first {
            true => b"record".to_vec(),
            false => format!("record.{}", origin.seq.0).into_bytes(),
        };
        match codec::encode_wire(record, origin.seq) {
            Ok(bytes) => write(&dir, &name, &bytes)?,
            Err(e) => log::warn!("{id}: the record itself is not kept: {e}"),
        }
        crash::point("conflict-record");
        if is_first {
            write(&dir, b"record.json", format!("{told:#}\n").as_bytes())?;
        }
        if let Some(object) = object {
            self.kept.by_object.insert(object, id);
        }
        self.kept.count += u64::from(is_new);
        Ok(dir)
    }

    /// The conflict that the same client has of the object already, of what is in its way, or of
    /// something in the directory that it could not remove for that.
    fn belongs_to(&mut self, record: &Record, clash: Clash) -> Result<Option<String>> {
        if self.kept.by_object.is_empty() {
            return Ok(None);
        }
        let node = record.origin.node;
        let mut about: Vec<Fid> = record.op.fid().into_iter().collect();
        about.extend(self.subject(&record.op, clash)?.map(|(meta, _)| meta.fid));
        if let (Op::Rmdir { gone, .. }, Clash::Refused(Errno::NOTEMPTY)) = (&record.op, clash) {
            let dir = self.dir(gone.fid)?;
            for entry in fs::read_dir(&*dir)?.into_iter().take(LEFT_BEHIND_MAX) {
                let Ok(name) = Name::new(&entry.name) else { continue };
                about.extend(self.at(&dir, &name)?.map(|(meta, _)| meta.fid));
            }
        }
        let known = |fid: Fid| self.kept.by_object.get(&(node, fid));
        Ok(about.into_iter().find_map(known).cloned())
    }

    /// Puts the bytes of a store to those that are kept of the same file already.
    fn keep_data(
        &mut self,
        dir: &Dir,
        (Origin { node, seq }, size, ranges): (Origin, u64, &[Range]),
        content: Content<'_>,
    ) -> Result<()> {
        if content == Content::Spooled {
            let file = self.spool.get(node, seq).map_err(TreeError::from)?;
            if fs::stat(dir, b"data") == Err(Errno::NOENT) {
                fs::truncate(&file, size).map_err(TreeError::from)?;
                let (from, to) = (Spool::name(node, seq), b"data");
                fs::rename(&self.spool, &from, dir, to, fs::RenameMode::Replace)
                    .map_err(TreeError::from)?;
                return Ok(());
            }
            let data = open(dir, b"data")?;
            let finish = || Ok(fs::truncate(&data, size).map_err(TreeError::from)?);
            return swap::in_place(&file, &data, ranges, finish);
        }
        let file = open(dir, b"data")?;
        if let Content::Inline(bytes) = content {
            super::apply::write_ranges(&file, ranges, bytes).map_err(TreeError::from)?;
        }
        Ok(fs::truncate(&file, size).map_err(TreeError::from)?)
    }

    /// What `record.json` says.
    fn told(&mut self, record: &Record, clash: Clash) -> Result<Value> {
        let Origin { node, seq } = record.origin;
        let mut told = json!({
            "id": id_of(record.origin),
            "node": node,
            "seq": seq.0,
            "time_ns": record.time_ns,
            "uid": record.uid,
            "gid": record.gid,
            "path": String::from_utf8_lossy(&record.path),
            "kind": codec::kind_name(&record.op),
            "what": format!("{:?}", record.op),
            "why": clash.to_string(),
            "mine": {
                "node": node,
                "host": self.who(node),
                "time_ns": record.time_ns,
                "stamp": base_of(&record.op).0,
            },
            "theirs": self.theirs(&record.op, clash)?,
        });
        if let Op::Store { ranges, size, .. } = &record.op {
            let covered: u64 = ranges.iter().map(|range| range.len).sum();
            told["mine"]["size"] = json!(size);
            told["mine"]["whole"] = json!(covered >= *size);
        }
        Ok(told)
    }

    /// The tree's version of what a record is about, and who made it, as far as that is known.
    fn theirs(&mut self, op: &Op, clash: Clash) -> Result<Value> {
        let (mut found, mut stamp, mut by) = (json!({ "gone": true }), None, None);
        if let Some((meta, stat)) = self.subject(op, clash)? {
            (stamp, by) = (Some(meta.stamp), Some(meta.author));
            let (size, kind) = (stat.size, format!("{:?}", stat.kind()).to_lowercase());
            found = json!({ "fid": meta.fid.0, "kind": kind, "size": size });
        }
        let gone = match (clash, op.places().into_iter().flatten().last()) {
            (Clash::DirGone, Some(place)) => Some(place.dir),
            _ => op.fid(),
        };
        let entry = match (stamp, gone) {
            (Some(Stamp(0)), _) => None, // as it was found when it was first served
            (Some(stamp), _) => self.lives.seq(stamp).and_then(|seq| self.log.entries(seq).next()),
            (None, Some(fid)) => self.removal(fid).map(Ok),
            (None, None) => None,
        };
        if let Some(Ok(entry)) = entry {
            let record = entry.record;
            (stamp, by) = (Some(self.lives.stamp(entry.seq)), Some(record.origin.node));
            found["time_ns"] = json!(record.time_ns);
            found["change"] = json!(codec::kind_name(&record.op));
        }
        found["stamp"] = json!(stamp.map(|stamp| stamp.0));
        found["node"] = json!(by);
        found["host"] = json!(by.map(|node| self.who(node)));
        Ok(found)
    }

    /// The record that took the object's name, if it is among the newest.
    fn removal(&mut self, fid: Fid) -> Option<codec::Entry> {
        let left = LOOK_BACK_MAX.saturating_sub(self.kept.looked_back);
        for entry in self.log.entries_back(self.log.last()).take(left) {
            let entry = entry.ok()?;
            self.kept.looked_back += 1;
            let removes = match &entry.record.op {
                Op::Unlink { gone, .. } | Op::Rmdir { gone, .. } => gone.fid == fid,
                Op::Rename { over: Over::Replaced(gone), .. } => gone.fid == fid,
                _ => false,
            };
            if removes && entry.outcome == Outcome::Done {
                return Some(entry);
            }
        }
        None
    }

    /// What in the tree is in the way of a record: the object at the place, or the one that the
    /// record is about.
    pub(super) fn subject(&mut self, op: &Op, clash: Clash) -> Result<Option<(Meta, fs::Stat)>> {
        let place = match op {
            _ if clash == Clash::Gone => None,
            Op::Rename { .. } if clash == Clash::OtherObject => None,
            Op::Rename { to, .. } => Some(to),
            _ => op.places()[0],
        };
        if let Some(place) = place {
            return Ok(self.standing(place)?.ok().flatten());
        }
        match op.fid() {
            Some(fid) => self.object_of(fid),
            None => Ok(None),
        }
    }

    /// What is known of an object, wherever it stands; `None` when it has no name.
    pub(super) fn object_of(&mut self, fid: Fid) -> Result<Option<(Meta, fs::Stat)>> {
        match self.tree.place(fid) {
            Ok((dir, name)) => self.at(&dir, &name),
            Err(TreeError::Gone(_)) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// A client, for people.
    pub(super) fn who(&self, node: u32) -> String {
        match (node, self.nodes.host(node)) {
            (0, _) => "the server".to_owned(),
            (_, "") => format!("client {node}"),
            (_, host) => host.to_owned(),
        }
    }

    // ---- what comes after ----

    /// An object that was kept aside is where it was put, whatever place its client names.
    pub(super) fn follow(&mut self, node: u32, op: &mut Op) -> Result<()> {
        if self.kept.by_dir.is_empty() {
            return Ok(());
        }
        match op {
            Op::Unlink { at, gone } | Op::Rmdir { at, gone } => self.follow_to(node, at, gone.fid),
            Op::Rename { from, to, fid, over, .. } => {
                self.follow_to(node, from, *fid)?;
                match over {
                    Over::Nothing { .. } => Ok(()),
                    Over::Replaced(gone) => self.follow_to(node, to, gone.fid),
                    Over::Exchanged { fid, .. } => self.follow_to(node, to, *fid),
                }
            }
            _ => Ok(()),
        }
    }

    fn follow_to(&mut self, node: u32, place: &mut Place, fid: Fid) -> Result<()> {
        let is_there = |found: Option<(Meta, fs::Stat)>| found.is_some_and(|it| it.0.fid == fid);
        if is_there(self.standing(place)?.ok().flatten()) {
            return Ok(());
        }
        match self.tree.place(fid) {
            Ok(_) => {}
            Err(TreeError::Gone(_)) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
        let own = format!("{node}-");
        for (dir, name) in self.tree.names(fid)? {
            let is_own = self.kept.by_dir.get(&dir).is_some_and(|id| id.starts_with(&own));
            let kept = Place { dir, base: place.base, name };
            if is_own && is_there(self.standing(&kept)?.ok().flatten()) {
                *place = kept;
                return Ok(());
            }
        }
        Ok(())
    }

    /// A change was made: it may have ended a conflict.
    pub(super) fn after_change(
        &mut self,
        from: (u32, Seq),
        op: &Op,
        out: &mut Applied,
    ) -> Result<()> {
        if self.kept.by_dir.is_empty() {
            return Ok(());
        }
        if let Op::Store { fid, .. } = op {
            self.unless_alike(from, *fid, out)?;
        }
        let dirs = op.places().into_iter().flatten().map(|place| place.dir);
        let ids: Vec<String> = dirs.filter_map(|dir| self.kept.by_dir.get(&dir)).cloned().collect();
        for id in ids {
            self.end_if_empty(&id)?;
        }
        Ok(())
    }

    /// A file that was made under a taken name has its contents now: if the one that has the name
    /// is the same, there is no conflict, and the client's is that one.
    fn unless_alike(&mut self, from: (u32, Seq), fid: Fid, out: &mut Applied) -> Result<()> {
        let (node, seq) = from;
        let (kept, name) = self.tree.place(fid)?;
        let Some(id) = self.kept.by_dir.get(&kept.fid).cloned() else { return Ok(()) };
        let Some(dir) = self.entry(&id)? else { return Ok(()) };
        let at = self.records(&dir)?.into_iter().find_map(|record| match record.op {
            Op::Create { at, fid: made, .. } if made == fid => Some(at),
            _ => None,
        });
        let Some(at) = at else { return Ok(()) };
        let Some((there, _)) = self.standing(&at)?.ok().flatten() else { return Ok(()) };
        if !self.are_alike(fid, there.fid)? {
            return Ok(());
        }
        let at = Place { dir: kept.fid, base: Stamp(0), name };
        let gone = Gone { fid, base: Stamp(0), attr: Attr::default(), target: None };
        let origin = Origin { node, seq };
        let path = self.tree.path_of(&kept, &at.name);
        let (op, time_ns) = (Op::Unlink { at, gone }, 0);
        let record = Record { time_ns, origin, uid: 0, gid: 0, path, op };
        self.carry_out(record, Content::None, out)?;
        self.nodes.add_alias(node, fid, there.fid);
        out.also.push(there.fid);
        out.conflicts.extend([fid, there.fid]);
        self.end_if_empty(&id)
    }

    /// Forgets a conflict of which nothing is kept any more.
    fn end_if_empty(&mut self, id: &str) -> Result<()> {
        let Some(dir) = self.entry(id)? else { return Ok(()) };
        let kept = fs::open(&*dir, b"kept", fs::o::DIRECTORY, 0);
        let is_empty = |kept: OwnedFd| fs::read_dir(kept).map(|entries| entries.is_empty());
        match kept.and_then(is_empty) {
            Ok(true) if fs::stat(&*dir, b"data") == Err(Errno::NOENT) => self.forget_conflict(id),
            Ok(_) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Removes a conflict with all that it keeps. A crash on the way leaves it removed.
    pub(super) fn forget_conflict(&mut self, id: &str) -> Result<()> {
        let root = self.tree.root().clone();
        let all = self.subdir(&root, CONFLICTS_NAME)?;
        let Some(dir) = self.entry(id)? else { return Ok(()) };
        let going = [GOING, id.as_bytes()].concat();
        fs::rename(&*all, id.as_bytes(), &*all, &going, fs::RenameMode::Replace)?;
        self.tree.moved();
        self.kept.by_object.retain(|_, of| of != id);
        let kept: Vec<Fid> = self.kept.by_dir.extract_if(|_, of| of == id).map(|it| it.0).collect();
        for fid in kept.into_iter().chain([dir.fid]) {
            self.tree.close_dir(fid);
            for (parent, name) in self.tree.names(fid)? {
                self.tree.index.remove(fid, parent, &name).map_err(TreeError::from)?;
            }
        }
        self.kept.count = self.kept.count.saturating_sub(1);
        remove_all(&all, &going)
    }

    // ---- the directory of conflicts ----

    /// The directory of a conflict; `None` when there is none of this name.
    pub(super) fn entry(&mut self, id: &str) -> Result<Option<Arc<Dir>>> {
        if !is_id(id.as_bytes()) {
            return Ok(None);
        }
        let root = self.tree.root().clone();
        let (Ok(all), Ok(name)) = (Name::new(CONFLICTS_NAME), Name::new(id.as_bytes())) else {
            return Ok(None);
        };
        let found = self.seen(&root, &all).and_then(|_| {
            let all = self.tree.open_dir(&root, &all)?;
            self.seen(&all, &name)?;
            Ok(self.tree.open_dir(&all, &name)?)
        });
        match found {
            Ok(dir) => Ok(Some(dir)),
            Err(VolumeError::Os(Errno::NOENT)) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The records of a conflict, in order: the one that it is about, and those that joined it.
    pub(super) fn records(&self, dir: &Dir) -> Result<Vec<Record>> {
        let mut records = Vec::new();
        for entry in fs::read_dir(dir)? {
            if entry.name != b"record" && !entry.name.starts_with(b"record.") {
                continue;
            }
            let bytes = read_file(dir, &entry.name, codec::RECORD_LEN_MAX)?.unwrap_or_default();
            // record.json is none
            if let Ok((seq, record)) = codec::decode_wire(&bytes) {
                records.push((seq, record));
            }
        }
        records.sort_unstable_by_key(|(seq, _)| *seq);
        Ok(records.into_iter().map(|(_, record)| record).collect())
    }

    /// A directory of imz's own in the tree, made if it is not there.
    fn subdir(&mut self, dir: &Arc<Dir>, name: &[u8]) -> Result<Arc<Dir>> {
        let before = fs::fstat(&**dir)?.mtime;
        match fs::mkdir(&**dir, name, 0o700) {
            Ok(()) if dir.fid == crate::kml::record::ROOT => {
                // the root looks to clients as if nothing had happened
                let keep = fs::SetTime::At(before.0, before.1);
                fs::utimes_fd(&**dir, fs::SetTime::Keep, keep)?;
            }
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(TreeError::from(e).into()),
        }
        // the names given here are names
        let name = Name::new(name).map_err(|_| Errno::INVAL)?;
        self.seen(dir, &name)?;
        Ok(self.tree.open_dir(dir, &name)?)
    }

    /// The name itself, or where another object has it, one with a number behind it.
    fn free_name(&mut self, dir: &Dir, name: &Name) -> Result<Name> {
        let mut free = name.clone();
        for no in 2.. {
            if fs::stat(dir, free.as_bytes()) == Err(Errno::NOENT) {
                break;
            }
            free = with_suffix(name, &format!(".{no}"));
        }
        Ok(free)
    }

    /// Finds what there is, when the volume is opened, and ends what a crash left half ended.
    pub(super) fn find_conflicts(&mut self) -> Result<()> {
        let root = self.tree.root().clone();
        let names = match fs::open(&*root, CONFLICTS_NAME, fs::o::DIRECTORY, 0) {
            Ok(all) => fs::read_dir(all)?,
            Err(Errno::NOENT) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let all = self.subdir(&root, CONFLICTS_NAME)?;
        for entry in names {
            if entry.name.starts_with(GOING) {
                remove_all(&all, &entry.name)?;
                continue;
            }
            let Some(id) = String::from_utf8(entry.name).ok().filter(|id| is_id(id.as_bytes()))
            else {
                continue; // somebody else's
            };
            self.kept.count += 1;
            let Some(dir) = self.entry(&id)? else { continue };
            let records = self.records(&dir)?;
            let is_data = matches!(records.first(), Some(Record { op: Op::Store { .. }, .. }));
            let has = |name: &[u8]| fs::stat(&*dir, name).is_ok();
            if is_data && !has(b"data") && !has(b"kept") {
                self.forget_conflict(&id)?; // it has its place in the tree already
                continue;
            }
            for record in records {
                if let Some(fid) = record.op.fid() {
                    self.kept.by_object.insert((node_of(&id), fid), id.clone());
                }
            }
            if fs::stat(&*dir, b"kept").is_ok() {
                let kept = self.subdir(&dir, b"kept")?;
                self.kept.by_dir.insert(kept.fid, id.clone());
                self.end_if_empty(&id)?;
            }
        }
        Ok(())
    }
}

/// A conflict is named after the record that it is about.
fn id_of(origin: Origin) -> String {
    format!("{}-{}", origin.node, origin.seq.0)
}

/// The client and its record that a conflict is named after.
pub(super) fn id_parts(id: &[u8]) -> Option<(u32, u64)> {
    let (node, seq) = std::str::from_utf8(id).ok()?.split_once('-')?;
    let plain = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    (plain(node) && plain(seq)).then_some(())?;
    Some((node.parse().ok()?, seq.parse().ok()?))
}

fn is_id(id: &[u8]) -> bool {
    id_parts(id).is_some()
}

fn node_of(id: &str) -> u32 {
    id_parts(id.as_bytes()).map_or(0, |(node, _)| node)
}

/// The version of the object that a record was made on.
fn base_of(op: &Op) -> Stamp {
    match op {
        Op::Link { base, .. }
        | Op::Rename { base, .. }
        | Op::Setattr { base, .. }
        | Op::Setxattr { base, .. }
        | Op::Removexattr { base, .. }
        | Op::Store { base, .. } => *base,
        Op::Unlink { gone, .. } | Op::Rmdir { gone, .. } => gone.base,
        _ => op.places()[0].map_or(Stamp(0), |place| place.base),
    }
}

/// A name with something behind it, cut so that it is still a name.
pub(super) fn with_suffix(name: &Name, suffix: &str) -> Name {
    let room = crate::kml::record::NAME_LEN_MAX.saturating_sub(suffix.len());
    let stem = &name.as_bytes()[..name.as_bytes().len().min(room)];
    Name::new(&[stem, suffix.as_bytes()].concat()).unwrap_or_else(|_| name.clone())
}

/// Removes a directory and all below it: what it keeps nobody wants.
fn remove_all(dir: &Dir, name: &[u8]) -> Result<()> {
    let mut stack = vec![name.to_vec()];
    while let Some(path) = stack.last().cloned() {
        let open = fs::open_beneath(dir, &path, fs::o::RDONLY | fs::o::DIRECTORY)?;
        let mut below = None;
        for entry in fs::read_dir(&open)? {
            if fs::stat(&open, &entry.name)?.kind() == fs::Kind::Dir {
                below = Some([&path[..], b"/", &entry.name].concat());
            } else {
                fs::unlink(&open, &entry.name)?;
            }
        }
        match below {
            Some(path) => stack.push(path),
            None => {
                stack.pop();
                let at = path.iter().rposition(|byte| *byte == b'/');
                match at {
                    Some(at) => {
                        let flags = fs::o::RDONLY | fs::o::DIRECTORY;
                        let parent = fs::open_beneath(dir, &path[..at], flags)?;
                        fs::rmdir(parent, &path[at + 1..])?;
                    }
                    None => fs::rmdir(dir, &path)?,
                }
            }
        }
    }
    Ok(())
}

fn open(dir: &Dir, name: &[u8]) -> Result<OwnedFd> {
    let flags = fs::o::CREAT | fs::o::RDWR;
    Ok(fs::open(dir, name, flags, 0o600).map_err(TreeError::from)?)
}

fn write(dir: &Dir, name: &[u8], bytes: &[u8]) -> Result<()> {
    let file = open(dir, name)?;
    fs::truncate(&file, 0)?;
    Ok(fs::pwrite_all(file, bytes, 0).map_err(TreeError::from)?)
}

/// A small file of a conflict; `None` when it is not there. What is longer is cut.
pub(super) fn read_file(dir: &Dir, name: &[u8], len_max: usize) -> Result<Option<Vec<u8>>> {
    let file = match fs::open(dir, name, fs::o::RDONLY | fs::o::NONBLOCK, 0) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let mut bytes = vec![0; (fs::fstat(&file)?.size as usize).min(len_max)];
    let mut have = 0;
    while have < bytes.len() {
        match fs::pread(&file, &mut bytes[have..], have as u64)? {
            0 => break,
            count => have += count,
        }
    }
    bytes.truncate(have);
    Ok(Some(bytes))
}
