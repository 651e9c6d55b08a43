//! What changed in a served tree while no server looked after it: found at the start, and journaled,
//! so that clients hear of it.
//!
//! One walk over the tree (compare.rs), before anybody is served:
//!
//! ```text
//!   the last server    the tree shows                             then
//!   stopped cleanly    a file's mtime behind the stop             store, of all of it
//!                      a ctime behind it                          setattr; of a directory, its
//!                                                                 entries are looked at anew
//!   was killed, or     a name without a fid; an object elsewhere, setattr of the directories
//!   lost its power     or nowhere, or two with one fid
//!   lost its power     a version that may be lost (lives.rs)      the stamp of the new life
//! ```
//!
//! Nobody can set a ctime. It shows that a file was changed; a changed mtime shows that its contents
//! were: who gives other contents the old size and the old mtime is not found out. Each copy of a file
//! has a ctime of its own: where the root is not the one that the last server had (it was made at
//! another time), the tree was put back from a copy, and mtimes alone are looked at. After a kill the
//! journal does not say what was changed later, and a ctime may be of imz's own last change, so that
//! only names are looked at: `imz fsck` names what else it finds. (A change within the same step of
//! the file system's clock as the stop, some milliseconds, is not found either.)
//!
//! The author of these records is the server. What no client has seen yet (it has no fid) needs no
//! record. A start that ends in the midst of this is done again by the next one.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::apply::{noted, restamped};
use super::compare::{CompareError, Difference, Found, Knowledge, Spot, compare};
use super::hands;
use super::index::At;
use super::power::clock_ns;
use super::tree::TreeError;
use super::volume::{Result, Volume, VolumeError};
use crate::kml::codec::Outcome;
use crate::kml::record::{Change, Fid, Name, Op, Origin, ROOT, Range, Record, Stamp, Time};
use crate::sys::Errno;
use crate::sys::fs::{self, Kind, Stat};

/// How often a long walk says how far it is.
const TELL_EVERY: Duration = Duration::from_secs(2);

/// What the last life left to be looked for.
#[derive(Default)]
pub(super) struct Past {
    /// when it stopped cleanly, nanoseconds since 1970; 0: it did not
    pub stopped_at: u64,
    /// of the root, before anything of this life
    pub root_ctime: (i64, u32),
    /// the tree is a copy of the one that was served
    pub is_copy: bool,
    /// versions between these, exclusively, may be lost: they become the second one
    pub lost: Option<(Stamp, Stamp)>,
}

/// What the walk found. True: a file's contents.
#[derive(Default)]
struct Behind {
    changed: BTreeMap<Fid, bool>,
    relabel: Vec<Fid>,
    /// places that the index does not know of an object, or of two with one fid, and what was changed
    /// there
    elsewhere: Vec<(At, Option<(Fid, bool)>)>,
    /// of the object that the walk came by last, until it is known whether it is a copy
    newest: Option<(Fid, bool)>,
    /// an object that the walk did not come by, and a place where it was
    nowhere: Vec<(Fid, Fid, Name)>,
}

impl Behind {
    fn object(&mut self, past: &Past, spot: &Spot) {
        self.settle();
        let Some(meta) = &spot.meta else { return };
        if past.is_lost(meta.stamp) || past.is_lost(meta.data) {
            self.relabel.push(meta.fid);
        }
        let written = past.is_behind(spot.stat.mtime);
        let changed = match past.is_copy {
            // a time to come was set by somebody, whenever that was
            true => written && ns(spot.stat.mtime) <= clock_ns(),
            false => past.is_behind(spot.stat.ctime),
        };
        if changed {
            let contents = written && spot.stat.kind() == Kind::File;
            self.newest = Some((meta.fid, contents));
        }
    }
    /// What the walk came by last is what its fid says.
    fn settle(&mut self) {
        if let Some((fid, contents)) = self.newest.take() {
            *self.changed.entry(fid).or_default() |= contents;
        }
    }
    fn differs(&mut self, past: &Past, spot: Option<&Spot>, difference: Difference) {
        let mut dirs = Vec::new();
        match (difference, spot) {
            (Difference::New, Some(spot)) => dirs.extend(spot.dir),
            (Difference::Moved { was }, Some(spot)) => {
                let Some(dir) = spot.dir else { return };
                self.elsewhere.push(((dir, spot.name.clone()), self.newest.take()));
                dirs.extend(was.into_iter().map(|(dir, _)| dir).chain([dir]));
            }
            (Difference::Copied, Some(spot)) => {
                let newest = self.newest.take();
                let Some(dir) = spot.dir else { return };
                self.elsewhere.push(((dir, spot.name.clone()), newest));
                dirs.push(dir);
            }
            (Difference::Missing { fid, was }, _) => {
                self.nowhere.extend(was.into_iter().map(|(dir, name)| (fid, dir, name)));
            }
            _ => {}
        }
        if past.stopped_at == 0 {
            dirs.into_iter().for_each(|dir| _ = self.changed.entry(dir).or_default());
        }
    }
}

impl Past {
    fn is_behind(&self, time: (i64, u32)) -> bool {
        self.stopped_at > 0 && ns(time) > self.stopped_at
    }
    fn is_lost(&self, stamp: Stamp) -> bool {
        self.lost.is_some_and(|(kept, mark)| stamp > kept && stamp < mark)
    }
}

fn ns((sec, nsec): (i64, u32)) -> u64 {
    u64::try_from(sec).unwrap_or(0).saturating_mul(1_000_000_000) + u64::from(nsec)
}

impl Volume {
    pub(super) fn look_behind(&mut self, past: &Past) -> Result<()> {
        let begun = Instant::now();
        let mut found = Behind::default();
        if past.is_lost(self.tree.root().meta().stamp) {
            found.relabel.push(ROOT);
        }
        if past.is_behind(past.root_ctime) && !past.is_copy {
            found.changed.insert(ROOT, false);
        }
        let count = self.walk_behind(past, &mut found)?;
        found.settle();
        for ((dir, name), changed) in std::mem::take(&mut found.elsewhere) {
            // a copy, attribute and all, is another object
            let seen = self.dir(dir).and_then(|dir| self.seen(&dir, &name));
            let is = if_possible(&self.name, dir, seen)?.map(|(meta, _)| meta.fid);
            found.newest = changed.filter(|(fid, _)| is == Some(*fid));
            found.settle();
        }
        // All are looked at before any is forgotten: children are found by their parents' places.
        let mut gone = Vec::new();
        for (fid, dir, name) in found.nowhere {
            if !self.may_stand(fid, dir, &name)? {
                gone.push((fid, dir, name));
            }
        }
        for (fid, dir, name) in gone {
            self.tree.index.remove(fid, dir, &name).map_err(TreeError::from)?;
            if past.stopped_at == 0 {
                found.changed.entry(dir).or_default();
            }
        }
        if let Some((kept, mark)) = past.lost {
            let renew = |stamp: &mut Stamp| {
                if *stamp > kept && *stamp < mark {
                    *stamp = mark;
                }
            };
            for fid in &found.relabel {
                let renewed = self.tree.edit_meta(*fid, |meta| {
                    renew(&mut meta.stamp);
                    renew(&mut meta.data);
                });
                if_possible(&self.name, *fid, renewed.map_err(VolumeError::from))?;
            }
        }
        let mut changed = 0;
        for (fid, contents) in found.changed {
            let noted = match self.note_behind(fid, contents) {
                // of all of a large tree: the history before it may go
                Err(VolumeError::NoRoom) => {
                    self.save_nodes()?;
                    self.log.trim(self.log.settled_through())?;
                    self.note_behind(fid, contents)
                }
                noted => noted,
            };
            changed += u64::from(if_possible(&self.name, fid, noted)?.is_some());
        }
        if self.log.bytes() > self.history_len_max {
            self.trim()?;
        }
        let ms = begun.elapsed().as_millis();
        let (name, versions) = (&self.name, found.relabel.len());
        match (changed, versions) {
            (0, 0) => log::info!("{name}: {count} objects are as they were ({ms} ms)"),
            _ => log::warn!(
                "{name}: of {count} objects {changed} were changed while it was not served, and of \
                 {versions} a version may be lost ({ms} ms): clients ask for them anew"
            ),
        }
        Ok(())
    }

    fn walk_behind(&self, past: &Past, found: &mut Behind) -> Result<u64> {
        let root = fs::open(&**self.tree.root(), b".", fs::o::DIRECTORY, 0)?;
        let places = Some(&self.tree.index as _);
        let known = Knowledge { places, facts: Default::default(), stopped_at: None };
        let (mut count, mut told) = (0, Instant::now());
        let walked = compare(root, &known, &mut |what| {
            match what {
                Found::Object(spot, _) => {
                    count += 1;
                    if told.elapsed() >= TELL_EVERY {
                        told = Instant::now();
                        log::warn!("{}: {count} objects compared", self.name);
                    }
                    found.object(past, spot);
                }
                Found::Differs(spot, difference) => found.differs(past, spot, difference),
                Found::Failed { path, error } => {
                    log::warn!("{}: {}: {error}", self.name, path.escape_ascii());
                }
            }
            true
        });
        walked.map_err(|e| match e {
            CompareError::Root(e) => VolumeError::Os(e),
            CompareError::Index(e) => VolumeError::Tree(e.into()),
            CompareError::Stopped => VolumeError::Os(Errno::INTR), // never: it is told to go on
        })?;
        Ok(count)
    }

    /// Whether an object that the walk did not come by stands at a place all the same: it is kept
    /// for a conflict, or lies where nobody can look.
    fn may_stand(&self, fid: Fid, dir: Fid, name: &Name) -> Result<bool> {
        let meta = self.dir(dir).and_then(|dir| Ok(self.tree.meta(&dir, name)?));
        match meta {
            Ok(meta) => Ok(meta.is_some_and(|meta| meta.fid == fid)),
            Err(VolumeError::Gone(_) | VolumeError::NotADir) => Ok(false),
            Err(VolumeError::Tree(TreeError::BadMeta(_))) => Ok(false),
            Err(VolumeError::Os(e)) => Ok(!matches!(e, Errno::NOENT | Errno::NOTDIR)),
            Err(e) => Err(e),
        }
    }

    /// Journals what somebody else has done to an object, as far as it can be seen.
    fn note_behind(&mut self, fid: Fid, contents: bool) -> Result<()> {
        let (dir, name) = hands::object_path(&self.tree, fid)?;
        let stat = if name.is_empty() { fs::fstat(&*dir)? } else { fs::stat(&*dir, &name)? };
        let base = match fid {
            ROOT => dir.meta().stamp,
            _ => self.tree.find(fid)?.2.stamp,
        };
        let op = match contents {
            true => {
                let Stat { size, mtime: (sec, nsec), .. } = stat;
                let ranges = Vec::from_iter((size > 0).then_some(Range { at: 0, len: size }));
                Op::Store { fid, base, size, mtime: Time { sec, nsec }, ranges, old_size: 0 }
            }
            false => Op::Setattr { fid, base, new: attributes(&stat), old: Change::default() },
        };
        let path = self.tree.path_by_fid(fid);
        log::info!("{}: /{} was changed while it was not served", self.name, path.escape_ascii());
        let (time_ns, origin) = (clock_ns(), Origin::default());
        let record = Record { time_ns, origin, uid: stat.uid, gid: stat.gid, path, op };
        let ticket = self.log.append(&record)?;
        let stamp = self.lives.stamp(ticket.seq);
        let done = self.tree.edit_meta(fid, |meta| match contents {
            true => restamped(meta, 0, stamp),
            false => noted(meta, 0, stamp),
        });
        // where it cannot be stamped, its clients are to hear of it all the same
        self.log.settle(ticket, Outcome::Done);
        Ok(done?)
    }
}

fn attributes(stat: &Stat) -> Change {
    match stat.kind() {
        Kind::File | Kind::Dir => Change {
            mode: Some(stat.mode & 0o7777),
            uid: Some(stat.uid),
            gid: Some(stat.gid),
            ..Change::default()
        },
        _ => Change::default(),
    }
}

/// What is gone, or cannot be looked at or stamped, is passed over: one object does not keep all the
/// others from being served.
fn if_possible<T>(volume: &str, fid: Fid, done: Result<T>) -> Result<Option<T>> {
    match done {
        Ok(done) => Ok(Some(done)),
        Err(VolumeError::Gone(_) | VolumeError::NotADir | VolumeError::Os(Errno::NOENT)) => {
            Ok(None)
        }
        Err(e @ (VolumeError::Os(_) | VolumeError::Tree(TreeError::BadMeta(_)))) => {
            log::warn!("{volume}: object {fid}, changed while it was not served: {e}");
            Ok(None)
        }
        Err(e) => Err(e),
    }
}
