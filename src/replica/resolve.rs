//! What people decide about conflicts: looking at them, and ending them.
//!
//! A decision is planned from what is kept and what the tree has now ([`Volume::plan`]), then done
//! as changes of the server's own, which are journaled as all others are, then made durable; only
//! then the conflict is forgotten. After a crash on the way it is still there, and the same
//! decision has the same outcome. The caller tells the clients: the plan says what is touched.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::SystemTime;

use serde_json::{Value, json};

use super::apply::{Applied, Content};
use super::conflict::{id_parts, read_file, with_suffix};
use super::meta::Meta;
use super::tree::{CONFLICTS_NAME, Dir, TreeError, is_own};
use super::volume::{Piece, Result, Volume, VolumeError};
use crate::kml::record::{Attr, Fid, Gone, Name, Op, Origin, Over, Place, Range, Record, Stamp};
use crate::sys::{Errno, fs};

/// Most conflicts in one page of a list, and about how long it is then, bytes.
const PAGE_COUNT: usize = 64;
const PAGE_LEN: usize = 256 << 10;
/// Longest `record.json` that is read, bytes.
const TOLD_LEN_MAX: usize = 64 << 10;

/// What becomes of a preserved version.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Choice {
    /// it takes the place of the tree's
    Mine,
    /// it is dropped
    Theirs,
    /// it is put beside the tree's, under a name that says whose it is
    Both,
    /// it is put there: a path from the volume's root
    Keep(Vec<u8>),
}

/// A conflict as it is listed: its name, and JSON that says all about it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listed {
    pub id: String,
    pub told: String,
}

/// One of the two versions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    Mine,
    Theirs,
}

/// What a conflict keeps, and where it belongs.
enum Part {
    /// contents of a file, which may be gone
    Data { fid: Fid, record: Record },
    /// an object, and the place that it was to have
    Object { kept: Place, fid: Fid, is_dir: bool, place: Place, record: Record },
}

/// A change to be made.
struct Step {
    op: Op,
    /// by whom it was wanted
    record: Record,
    /// its contents are in `data`
    is_data: bool,
}

/// What a decision does.
#[derive(Default)]
struct Plan {
    steps: Vec<Step>,
    said: String,
}

fn refuse<T>(what: impl Into<String>) -> Result<T> {
    Err(VolumeError::Undecided { what: what.into() })
}

impl Volume {
    /// The conflicts behind the one called `after` (all, if that is empty), in the order of clients
    /// and their records; and whether there are more.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list_conflicts(&mut self, after: &str) -> Result<(Vec<Listed>, bool)> {
        let root = self.tree.root().clone();
        let entries = match fs::open(&*root, CONFLICTS_NAME, fs::o::DIRECTORY, 0) {
            Ok(all) => fs::read_dir(all)?,
            Err(Errno::NOENT) => return Ok((Vec::new(), false)),
            Err(e) => return Err(e.into()),
        };
        let after = id_parts(after.as_bytes());
        let ids = entries.iter().filter_map(|entry| id_parts(&entry.name));
        let mut ids: Vec<(u32, u64)> = ids.filter(|id| Some(*id) > after).collect();
        ids.sort_unstable();
        let (mut page, mut len, mut count) = (Vec::new(), 0, 0);
        for (node, seq) in &ids {
            if page.len() == PAGE_COUNT || len >= PAGE_LEN {
                break;
            }
            count += 1;
            let id = format!("{node}-{seq}");
            let told = self.conflict_told(&id)?.to_string();
            len += told.len();
            page.push(Listed { id, told });
        }
        Ok((page, count < ids.len()))
    }

    /// What is known of a conflict, and what the tree has now.
    fn conflict_told(&mut self, id: &str) -> Result<Value> {
        let Some(dir) = self.entry(id)? else {
            return Err(VolumeError::NoConflict { id: id.to_owned() });
        };
        let bytes = read_file(&dir, b"record.json", TOLD_LEN_MAX)?.unwrap_or_default();
        // what cannot be read is told as far as it is known from elsewhere
        let mut told: Value = serde_json::from_slice(&bytes).unwrap_or_else(|_| json!({}));
        let (records, parts) = (self.records(&dir)?, self.parts(&dir)?);
        told["id"] = json!(id);
        told["changes"] = json!(records.len());
        told["holds"] = json!(match parts.first() {
            Some(Part::Data { .. }) => "data",
            Some(Part::Object { .. }) => "object",
            None => "record",
        });
        told["preserved"] = match self.preserved(&dir, &parts)? {
            Some(stat) => {
                let kind = format!("{:?}", stat.kind()).to_lowercase();
                json!({ "size": stat.size, "kind": kind })
            }
            None => Value::Null,
        };
        told["now"] = match self.now(&records, &parts)? {
            Some((meta, stat)) => {
                let kind = format!("{:?}", stat.kind()).to_lowercase();
                let path = self.tree.path_by_fid(meta.fid);
                let path = String::from_utf8_lossy(&path).into_owned();
                json!({ "stamp": meta.stamp.0, "size": stat.size, "kind": kind, "path": path })
            }
            None => Value::Null,
        };
        Ok(told)
    }

    /// Bytes of one of the two versions, if it is a file's.
    ///
    /// # Errors
    /// `NoConflict`, `NotAFile`.
    pub fn read_conflict(&mut self, id: &str, side: Side, at: u64, len: u32) -> Result<Piece> {
        let Some(dir) = self.entry(id)? else {
            return Err(VolumeError::NoConflict { id: id.to_owned() });
        };
        let (records, parts) = (self.records(&dir)?, self.parts(&dir)?);
        let flags = fs::o::RDONLY | fs::o::NONBLOCK;
        let file = match (side, parts.last()) {
            (Side::Mine, Some(Part::Data { .. })) => fs::open(&*dir, b"data", flags, 0)?,
            (Side::Mine, Some(Part::Object { fid, is_dir: false, .. })) => self.open_file(*fid)?,
            (Side::Theirs, _) => match self.now(&records, &parts)? {
                Some((meta, stat)) if stat.kind() == fs::Kind::File => self.open_file(meta.fid)?,
                _ => return Err(VolumeError::NotAFile),
            },
            _ => return Err(VolumeError::NotAFile),
        };
        let size = fs::fstat(&file)?.size;
        let mut bytes = vec![0; size.saturating_sub(at).min(len.into()) as usize];
        let mut have = 0;
        while have < bytes.len() {
            match fs::pread(&file, &mut bytes[have..], at + have as u64)? {
                0 => break,
                count => have += count,
            }
        }
        bytes.truncate(have);
        Ok(Piece { bytes, size, token: 0 })
    }

    fn open_file(&self, fid: Fid) -> Result<OwnedFd> {
        match self.object_kind(fid)? {
            fs::Kind::File => Ok(self.tree.open_object(fid, fs::o::RDONLY | fs::o::NONBLOCK)?),
            _ => Err(VolumeError::NotAFile),
        }
    }

    fn object_kind(&self, fid: Fid) -> Result<fs::Kind> {
        let (dir, name) = self.tree.place(fid)?;
        Ok(fs::stat(&*dir, name.as_bytes())?.kind())
    }

    /// What a decision touches: whoever has these must be told before it is made.
    ///
    /// # Errors
    /// `NoConflict`, `Undecided` when it cannot be done.
    pub fn conflict_touches(&mut self, id: &str, choice: &Choice) -> Result<Vec<Fid>> {
        let plan = self.plan(id, choice)?;
        let mut fids: Vec<Fid> = plan.steps.iter().flat_map(|step| step.op.touched()).collect();
        fids.sort_unstable();
        fids.dedup();
        Ok(fids)
    }

    /// Carries out a decision, unless the tree's version is another than at `stamp` (0: there was
    /// none). Returns what was done, for people. Durable on return: yes.
    ///
    /// # Errors
    /// `NoConflict`, `Undecided`, and those of the file system; the conflict stays then.
    pub fn resolve(
        &mut self,
        id: &str,
        choice: &Choice,
        stamp: Option<Stamp>,
        out: &mut Applied,
    ) -> Result<String> {
        let Some(dir) = self.entry(id)? else {
            return Err(VolumeError::NoConflict { id: id.to_owned() });
        };
        let (records, parts) = (self.records(&dir)?, self.parts(&dir)?);
        let now = self.now(&records, &parts)?.map_or(Stamp(0), |(meta, _)| meta.stamp);
        if let Some(seen) = stamp.filter(|seen| *seen != now) {
            let what = format!(
                "the tree's version has changed since it was looked at (it was at {}, it is at {}): \
                 look again",
                seen.0, now.0
            );
            return refuse(what);
        }
        let plan = self.plan(id, choice)?;
        for step in plan.steps {
            out.also.extend(step.op.touched());
            self.take_step(&dir, step)?;
        }
        self.flush_touched()?;
        self.sync_job().run()?;
        self.synced();
        self.forget_conflict(id)?;
        log::info!("{}: conflict {id} is decided: {}", self.name, plan.said);
        Ok(plan.said)
    }

    fn take_step(&mut self, dir: &Dir, step: Step) -> Result<()> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let origin = Origin::default(); // the journal is its own
        let Record { uid, gid, path, .. } = step.record;
        let record = Record { time_ns: now.as_nanos() as u64, origin, uid, gid, path, op: step.op };
        let content = match (&record.op, step.is_data) {
            (Op::Store { size, .. }, true) => {
                let from = fs::open(dir, b"data", fs::o::RDONLY, 0)?;
                let to = self.spool.get(origin.node, origin.seq).map_err(TreeError::from)?;
                let all = [Range { at: 0, len: *size }];
                super::apply::copy_ranges(&from, &to, &all).map_err(TreeError::from)?;
                fs::truncate(&to, *size).map_err(TreeError::from)?;
                fs::fsync(&to)?;
                Content::Spooled
            }
            _ => Content::None,
        };
        let done = self.journaled(&record, content);
        self.spool.remove(origin.node, origin.seq);
        done.map(drop)
    }

    // ---- what there is ----

    /// What a conflict keeps, in the order in which it came.
    fn parts(&mut self, dir: &Arc<Dir>) -> Result<Vec<Part>> {
        let mut parts = Vec::new();
        let records = self.records(dir)?;
        let has_data = fs::stat(&**dir, b"data").is_ok();
        let store = records.iter().rev().find(|record| matches!(record.op, Op::Store { .. }));
        if let (true, Some(record)) = (has_data, store)
            && let Some(fid) = record.op.fid()
        {
            parts.push(Part::Data { fid, record: record.clone() });
        }
        let Ok(name) = Name::new(b"kept") else { return Ok(parts) };
        let kept = match self.at(dir, &name)? {
            Some(_) => self.tree.open_dir(dir, &name)?,
            None => return Ok(parts),
        };
        for entry in fs::read_dir(&*kept)? {
            let Ok(name) = Name::new(&entry.name) else { continue };
            let (meta, stat) = self.seen(&kept, &name)?;
            let belongs = |record: &&Record| {
                let place = record.op.places().into_iter().flatten().last();
                record.op.fid() == Some(meta.fid) && place.is_some()
            };
            // a file that was renamed onto the object that stood here is in its place
            let record = records.iter().rev().find(belongs).or(records.first());
            let Some(record) = record.cloned() else { continue };
            let Some(place) = record.op.places().into_iter().flatten().last().cloned() else {
                continue;
            };
            let is_dir = stat.kind() == fs::Kind::Dir;
            let kept = Place { dir: kept.fid, base: Stamp(0), name };
            parts.push(Part::Object { kept, fid: meta.fid, is_dir, place, record });
        }
        Ok(parts)
    }

    /// The tree's version, as it is now.
    fn now(&mut self, records: &[Record], parts: &[Part]) -> Result<Option<(Meta, fs::Stat)>> {
        match (parts.last(), records.first()) {
            (Some(Part::Data { fid, .. }), _) => self.object_of(*fid),
            (Some(Part::Object { place, .. }), _) => Ok(self.standing(place)?.ok().flatten()),
            (None, Some(record)) => match (&record.op, record.op.fid()) {
                (Op::Unlink { at, .. } | Op::Rmdir { at, .. }, _) => {
                    Ok(self.standing(at)?.ok().flatten())
                }
                (_, Some(fid)) => self.object_of(fid),
                (_, None) => Ok(None),
            },
            (None, None) => Ok(None),
        }
    }

    fn preserved(&mut self, dir: &Dir, parts: &[Part]) -> Result<Option<fs::Stat>> {
        Ok(match parts.last() {
            Some(Part::Data { .. }) => Some(fs::stat(dir, b"data")?),
            Some(Part::Object { fid, .. }) => self.object_of(*fid)?.map(|(_, stat)| stat),
            None => None,
        })
    }

    // ---- what is to be done ----

    fn plan(&mut self, id: &str, choice: &Choice) -> Result<Plan> {
        let Some(dir) = self.entry(id)? else {
            return Err(VolumeError::NoConflict { id: id.to_owned() });
        };
        let (records, parts) = (self.records(&dir)?, self.parts(&dir)?);
        let mut plan = Plan::default();
        match choice {
            Choice::Theirs => {
                plan.said = "the preserved version is dropped; the tree's stays".to_owned();
            }
            Choice::Mine if parts.is_empty() => {
                for record in records {
                    self.plan_again(record, &mut plan)?;
                }
                plan.said = "the change was made again".to_owned();
            }
            Choice::Mine => {
                for part in parts {
                    self.plan_mine(&dir, part, &mut plan)?;
                }
            }
            Choice::Both | Choice::Keep(_) if parts.is_empty() => {
                return refuse(
                    "no contents are kept that could be put anywhere: mine makes the \
                               change again, theirs drops it",
                );
            }
            Choice::Both => {
                for (nth, part) in parts.into_iter().enumerate() {
                    let to = self.beside(id, &part, nth)?;
                    self.plan_put(&dir, part, to, Over::Nothing { noreplace: true }, &mut plan)?;
                }
            }
            Choice::Keep(path) => {
                for (nth, part) in parts.into_iter().enumerate() {
                    let mut to = self.by_path(path)?;
                    if nth > 0 {
                        to.name = with_suffix(&to.name, &format!(".{}", nth + 1));
                    }
                    if self.standing(&to)?.is_ok_and(|there| there.is_some()) {
                        return refuse("there is something at that path already");
                    }
                    self.plan_put(&dir, part, to, Over::Nothing { noreplace: true }, &mut plan)?;
                }
            }
        }
        Ok(plan)
    }

    /// The preserved version takes the place of the tree's.
    fn plan_mine(&mut self, dir: &Arc<Dir>, part: Part, plan: &mut Plan) -> Result<()> {
        match part {
            Part::Data { fid, record } => {
                let Some((meta, stat)) = self.object_of(fid)? else {
                    let to = self.by_path(&record.path)?;
                    if self.standing(&to)?.is_ok_and(|there| there.is_some()) {
                        return refuse(
                            "the file is gone, and another has its name: both puts it \
                                       beside that, keep PATH elsewhere",
                        );
                    }
                    let (part, free) =
                        (Part::Data { fid, record }, Over::Nothing { noreplace: true });
                    return self.plan_put(dir, part, to, free, plan);
                };
                let Op::Store { mtime, size, ref ranges, .. } = record.op else { return Ok(()) };
                let is_whole = ranges.iter().map(|range| range.len).sum::<u64>() >= size;
                if stat.kind() != fs::Kind::File || !is_whole {
                    return refuse(
                        "only changed parts of the file came: keep PATH puts them into \
                                   a file of their own",
                    );
                }
                let size = fs::stat(&**dir, b"data")?.size;
                let ranges = vec![Range { at: 0, len: size }];
                let base = meta.stamp;
                let op = Op::Store { fid, base, size, mtime, ranges, old_size: stat.size };
                plan.said = "the preserved contents are in the file".to_owned();
                plan.steps.push(Step { op, record, is_data: true });
                Ok(())
            }
            Part::Object { ref place, is_dir, .. } => {
                let over = match self.standing(place)? {
                    Err(_) => {
                        return refuse("its directory is gone: keep PATH puts it elsewhere");
                    }
                    Ok(None) => Over::Nothing { noreplace: true },
                    Ok(Some((_, stat))) if is_dir || stat.kind() == fs::Kind::Dir => {
                        return refuse(
                            "a directory cannot be replaced: both puts it beside, \
                                       keep PATH elsewhere",
                        );
                    }
                    Ok(Some((meta, stat))) => Over::Replaced(gone(&meta, &stat)),
                };
                let to = place.clone();
                self.plan_put(dir, part, to, over, plan)
            }
        }
    }

    /// What is kept gets a place in the tree.
    fn plan_put(
        &mut self,
        dir: &Arc<Dir>,
        part: Part,
        to: Place,
        over: Over,
        plan: &mut Plan,
    ) -> Result<()> {
        let parent = match self.dir(to.dir) {
            Ok(parent) => parent,
            Err(VolumeError::Gone(_) | VolumeError::NotADir) => {
                return refuse("its directory is gone: keep PATH puts it elsewhere");
            }
            Err(e) => return Err(e),
        };
        let path = self.tree.path_of(&parent, &to.name);
        plan.said = format!("the preserved version is at {}", path.escape_ascii());
        let (from, fid, record) = match part {
            Part::Object { kept, fid, record, .. } => (kept, fid, record),
            Part::Data { fid, record } => {
                let name = Name::new(b"data").map_err(|_| Errno::INVAL)?;
                let like = self.object_of(fid)?.map(|(_, stat)| stat);
                let fid = self.dress_data(dir, &name, &record, like)?;
                (Place { dir: dir.fid, base: Stamp(0), name }, fid, record)
            }
        };
        let op = Op::Rename { from, to, fid, base: Stamp(0), over };
        plan.steps.push(Step { op, record: Record { path, ..record }, is_data: false });
        Ok(())
    }

    /// Contents become a file like the one that they were of.
    fn dress_data(
        &mut self,
        dir: &Dir,
        name: &Name,
        record: &Record,
        like: Option<fs::Stat>,
    ) -> Result<Fid> {
        let (meta, _) = self.seen(dir, name)?;
        let (uid, gid, mode) = match like {
            Some(stat) => (stat.uid, stat.gid, stat.mode & 0o777),
            None => (record.uid, record.gid, 0o600),
        };
        match fs::chown(dir, name.as_bytes(), Some(uid), Some(gid)) {
            Err(Errno::PERM) if !crate::sys::cred::is_root() => {}
            done => done?,
        }
        fs::chmod(dir, name.as_bytes(), mode)?;
        if let Op::Store { mtime, .. } = &record.op {
            let at = fs::SetTime::At(mtime.sec, mtime.nsec.min(999_999_999));
            fs::utimes(dir, name.as_bytes(), fs::SetTime::Keep, at)?;
        }
        Ok(meta.fid)
    }

    /// A change that has no contents, once more, on what is there now.
    fn plan_again(&mut self, record: Record, plan: &mut Plan) -> Result<()> {
        let is_gone = "the object is gone: theirs drops the change";
        let current = match record.op.fid() {
            Some(fid) if !matches!(record.op, Op::Unlink { .. } | Op::Rmdir { .. }) => {
                let Some((meta, _)) = self.object_of(fid)? else { return refuse(is_gone) };
                meta.stamp
            }
            _ => Stamp(0),
        };
        let mut op = record.op.clone();
        match &mut op {
            Op::Setattr { base, .. } | Op::Setxattr { base, .. } | Op::Removexattr { base, .. } => {
                *base = current
            }
            Op::Unlink { at, gone: of } | Op::Rmdir { at, gone: of } => {
                let Some((meta, stat)) = self.standing(at)?.ok().flatten() else { return Ok(()) };
                let is_dir = matches!(record.op, Op::Rmdir { .. });
                if is_dir != (stat.kind() == fs::Kind::Dir) {
                    return refuse("something of another kind has the name now");
                }
                if is_dir && !fs::read_dir(&*self.dir(meta.fid)?)?.is_empty() {
                    return refuse("the directory is not empty");
                }
                *of = gone(&meta, &stat);
            }
            Op::Rename { from, to, fid, over, .. } => {
                let (dir, name) = self.tree.place(*fid)?;
                *from = Place { dir: dir.fid, base: Stamp(0), name };
                *over = Over::Nothing { noreplace: true };
                self.must_be_free(to)?;
            }
            Op::Link { at, .. } => self.must_be_free(at)?,
            _ => return refuse("nothing of it is kept: theirs drops it"),
        }
        plan.steps.push(Step { op, record, is_data: false });
        Ok(())
    }

    fn must_be_free(&mut self, place: &Place) -> Result<()> {
        match self.standing(place)? {
            Ok(None) => Ok(()),
            Ok(Some(_)) => refuse(
                "another object has the name: rename that first, or drop this \
                                   one with theirs",
            ),
            Err(_) => refuse("the directory is gone: theirs drops the change"),
        }
    }

    /// NAME.conflict-HOST-DATE beside the tree's version; the same at every call, unless that is
    /// taken.
    fn beside(&mut self, id: &str, part: &Part, nth: usize) -> Result<Place> {
        let (place, record) = match part {
            Part::Object { place, record, .. } => (place.clone(), record),
            Part::Data { fid, record } => match self.tree.place(*fid) {
                Ok((dir, name)) => (Place { dir: dir.fid, base: Stamp(0), name }, record),
                Err(TreeError::Gone(_)) => (self.by_path(&record.path)?, record),
                Err(e) => return Err(e.into()),
            },
        };
        let node = id_parts(id.as_bytes()).map_or(0, |(node, _)| node);
        let host: String = self
            .who(node)
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' })
            .take(64)
            .collect();
        let when = SystemTime::UNIX_EPOCH + std::time::Duration::from_nanos(record.time_ns);
        let date = humantime::format_rfc3339_seconds(when).to_string().replace(':', "-");
        let suffix = format!(".conflict-{host}-{date}");
        let mut to = Place { name: with_suffix(&place.name, &suffix), ..place.clone() };
        for no in nth + 2.. {
            if !self.standing(&to)?.is_ok_and(|there| there.is_some()) {
                break;
            }
            to.name = with_suffix(&place.name, &format!("{suffix}.{no}"));
        }
        Ok(to)
    }

    /// The place that a path from the root means; its last name may be free.
    fn by_path(&mut self, path: &[u8]) -> Result<Place> {
        let mut names: Vec<&[u8]> =
            path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()).collect();
        let Some(last) = names.pop() else { return refuse("a path is needed") };
        let bad = |_| VolumeError::Undecided { what: "that is no path in the volume".to_owned() };
        let last = Name::new(last).map_err(bad)?;
        if names.first().copied().or(Some(last.as_bytes())).is_some_and(is_own) {
            return refuse("that name belongs to imz");
        }
        let mut dir = self.tree.root().clone();
        for name in names {
            let name = Name::new(name).map_err(bad)?;
            dir = match self.seen(&dir, &name).and_then(|_| Ok(self.tree.open_dir(&dir, &name)?)) {
                Ok(below) => below,
                Err(VolumeError::Os(Errno::NOENT | Errno::NOTDIR | Errno::LOOP)) => {
                    let path = path.escape_ascii();
                    return refuse(format!(
                        "{path}: its directory is not there; make it, or keep PATH puts it elsewhere"
                    ));
                }
                Err(e) => return Err(e),
            };
        }
        Ok(Place { dir: dir.fid, base: Stamp(0), name: last })
    }
}

fn gone(meta: &Meta, stat: &fs::Stat) -> Gone {
    let attr: Attr = super::ops::attr_of(stat);
    Gone { fid: meta.fid, base: meta.stamp, attr, target: None }
}
