//! Replaying a journal onto any tree: what `imz replay` does with each record.
//!
//! Records are carried out by the same functions as a server's (`hands::Hands`), in their order.
//! What there is to do is decided by what stands in the tree:
//!
//! ```text
//!  record                         the tree has                              so
//!  any, of a volume's history     its stamp or a newer one, on the          standing
//!                                 directories (changes of names) or on
//!                                 the object (all others)
//!  create mkdir symlink mknod     the object                                standing
//!                                 the name, for an object without a fid     it is that one
//!                                 the name, for another object              misfit
//!                                 no such name                              do it
//!  link                           the name, for the object                  standing
//!  rename                         the object at the new name, not the old   standing
//!                                 the object at the old name, and at the    do it
//!                                 new one what the record says
//!  unlink rmdir                   the object at the name                    do it
//!                                 no such name                              standing
//!  setattr setxattr removexattr   the object                                do it
//!  store                          the object                                its contents are wanted
//!  any                            not what it needs, but a later record     standing
//!                                 takes that away
//!  any                            not what it needs                         misfit
//! ```
//!
//! So twice is as good as once. Wanted contents are filled in at the end, each file once, from
//! where they are ([`contents`]); until then the object says in its attribute that it is not
//! complete, and a later replay fills it.
//!
//! Nothing outside of the tree is changed, whatever names and links say ([`target`]): every name is
//! checked, every call is relative to an open directory, no symbolic link is followed, `.imz` and
//! `.imz-conflicts` at the root are not touched, nor files that have names elsewhere.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use self::contents::{Missing, Source, Version};
use self::survey::{Part, Survey};
use self::target::Target;
use super::apply::{copy_ranges, is_final};
use super::hands::Hands;
use super::state::StateError;
use super::tree::{Dir, TreeError, is_own};
use super::volume::VolumeError;
use crate::kml::codec::{Entry, Outcome};
use crate::kml::record::{Fid, Name, Op, Over, Place, ROOT, Range, Record, Seq, Stamp, Time};
use crate::sys::Errno;
use crate::sys::fs::{self, Kind, SetTime, o};

pub mod contents;
pub mod survey;
pub mod target;
mod undo;

/// The attribute that a write of data takes away.
const CAPABILITY: &[u8] = b"security.capability";

/// Why replay stops.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error("{path}: {source}")]
    NoTarget { path: PathBuf, source: std::io::Error },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: Errno },
    #[error("{path}: is in use by an imz server, mount or replay: end it first, or take a copy")]
    InUse { path: PathBuf },
    #[error("{path}: is a cache, which its mount keeps in step: take a copy of its tree")]
    Cache { path: PathBuf },
    #[error("{path}: is a directory within a volume, not its root")]
    NotARoot { path: PathBuf },
    #[error("{0}")]
    State(StateError),
    #[error("there is no room left")]
    NoRoom,
    #[error("{0}")]
    Tree(#[from] TreeError),
}

pub type Result<T> = std::result::Result<T, ReplayError>;

/// Why a record was not carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Misfit {
    #[error("its directory is not in the tree")]
    NoDir,
    #[error("the object is not in the tree")]
    NoObject,
    #[error("the name is taken by another object")]
    NameTaken,
    #[error("the name stands for another object")]
    OtherObject,
    #[error("the name belongs to imz")]
    OwnName,
    #[error("the directory is not where it was any more")]
    Moved,
    #[error("the file has names outside of the tree as well")]
    Shared,
    #[error("the file system refuses it: {0}")]
    Refused(Errno),
}

/// What a record that is undone does not tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Lost {
    #[error("the removed file's bytes are not kept: {0}")]
    Removed(Missing),
    #[error("a later change of it could not be undone")]
    Later,
}

/// What became of one record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    Done,
    /// it had taken effect before, or (undoing) never had
    Standing,
    /// void, or a noop: there is nothing to do
    Empty,
    /// whether it ever happened the journal does not say
    Unsettled,
    Misfit(Misfit),
    /// undoing: the object stays as it is
    Lost(Lost),
}

/// How much of what there was.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Sums {
    /// records looked at
    pub records: u64,
    pub done: u64,
    pub standing: u64,
    pub empty: u64,
    pub unsettled: u64,
    pub misfits: u64,
    pub lost: u64,
    /// files whose contents were filled in, and their bytes
    pub filled: u64,
    pub filled_bytes: u64,
    /// files whose contents are missing
    pub missing: u64,
    /// records that expect a version which the tree never had
    pub gaps: u64,
}

impl Sums {
    /// Nothing was left out.
    pub fn is_whole(&self) -> bool {
        self.misfits + self.lost + self.missing + self.gaps == 0
    }
    fn count(&mut self, fate: &Fate) {
        self.records += 1;
        *match fate {
            Fate::Done => &mut self.done,
            Fate::Standing => &mut self.standing,
            Fate::Empty => &mut self.empty,
            Fate::Unsettled => &mut self.unsettled,
            Fate::Misfit(_) => &mut self.misfits,
            Fate::Lost(_) => &mut self.lost,
        } += 1;
    }
}

/// Contents that a file is to have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Want {
    /// the last change of contents
    seq: Seq,
    size: u64,
    /// `None`: the file has it already
    mtime: Option<Time>,
}

/// A file that wanted contents.
pub struct Filled {
    pub fid: Fid,
    pub path: Vec<u8>,
    /// its bytes, or why they are missing
    pub filled: std::result::Result<u64, Missing>,
}

/// What to do with a record.
enum Verdict {
    Do,
    Standing,
    Misfit(Misfit),
}

/// What stands at a name.
struct There {
    fid: Option<Fid>,
    stat: fs::Stat,
}

/// A replay under way.
pub struct Replay {
    target: Target,
    part: Part,
    survey: Survey,
    source: Option<Source>,
    /// only say what would be done
    dry: bool,
    touched: HashMap<Fid, (u32, Stamp)>,
    wanted: BTreeMap<Fid, Want>,
    /// dry: objects that would be there by now
    made: HashSet<Fid>,
    /// undoing: objects that do not come back
    left: HashSet<Fid>,
    /// undoing: what gets an older time at the end
    older: HashSet<Fid>,
    pub sums: Sums,
}

impl Replay {
    /// `survey` has seen the whole journal.
    pub fn new(target: Target, part: Part, survey: Survey, dry: bool) -> Replay {
        Replay {
            target,
            part,
            survey,
            source: None,
            dry,
            touched: HashMap::new(),
            wanted: BTreeMap::new(),
            made: HashSet::new(),
            left: HashSet::new(),
            older: HashSet::new(),
            sums: Sums::default(),
        }
    }
    /// Where contents are taken from.
    pub fn set_source(&mut self, source: Source) {
        self.source = Some(source);
    }

    /// Deals with the next record of the part (undoing: with the one before).
    ///
    /// # Errors
    /// What ends the replay: no room, a disk that fails.
    pub fn step(&mut self, entry: &Entry) -> Result<Fate> {
        let fate = match entry.outcome {
            Outcome::Void => Fate::Empty,
            Outcome::Intended => Fate::Unsettled,
            Outcome::Done if entry.record.op == Op::Noop => Fate::Empty,
            Outcome::Done if self.part.undo => self.back(entry)?,
            Outcome::Done => self.forward(entry)?,
        };
        self.sums.count(&fate);
        Ok(fate)
    }

    fn stamp(&self, seq: Seq) -> Stamp {
        if self.survey.is_history { self.survey.lives.stamp(seq) } else { Stamp(0) }
    }

    fn forward(&mut self, entry: &Entry) -> Result<Fate> {
        let (record, stamp) = (&entry.record, self.stamp(entry.seq));
        self.recognise(record)?;
        let fate = match self.judge(record, entry.seq, stamp) {
            Ok(Verdict::Misfit(why)) => Fate::Misfit(why),
            Ok(Verdict::Standing) => Fate::Standing,
            Ok(Verdict::Do) if self.dry => Fate::Done,
            Ok(Verdict::Do) => {
                self.note_gap(record);
                self.perform(record, stamp)?
            }
            Err(e) => refused(e)?,
        };
        if self.dry {
            if fate == Fate::Done {
                self.made.extend(record.op.touched());
            }
        } else if matches!(fate, Fate::Done | Fate::Standing) {
            self.note_contents(entry, fate == Fate::Standing)?;
        }
        Ok(fate)
    }

    fn perform(&mut self, record: &Record, stamp: Stamp) -> Result<Fate> {
        let done =
            Hands { tree: &self.target.tree, touched: &mut self.touched }.perform(record, stamp);
        match done {
            Ok(()) => Ok(Fate::Done),
            Err(VolumeError::Os(e)) => refused(e.into()),
            Err(VolumeError::Gone(_)) => Ok(Fate::Misfit(Misfit::NoObject)),
            Err(VolumeError::NotADir) => Ok(Fate::Misfit(Misfit::NoDir)),
            Err(VolumeError::NoRoom) => Err(ReplayError::NoRoom),
            Err(VolumeError::Tree(e)) => Err(e.into()),
            Err(e) => {
                log::warn!("{e}"); // the others are of volumes alone
                Ok(Fate::Misfit(Misfit::NoObject))
            }
        }
    }

    // ---- what stands where -------------------------------------------------------------------

    /// Gives the objects that the record names their numbers, where they have none.
    fn recognise(&mut self, record: &Record) -> Result<()> {
        if self.dry || !self.target.is_plain {
            return Ok(());
        }
        let path = &record.path;
        let parent = path.iter().rposition(|b| *b == b'/').map(|cut| &path[..cut]);
        for (nth, place) in record.op.places().into_iter().flatten().enumerate() {
            if place.dir != ROOT && self.is_gone(place.dir)? {
                let here = parent.filter(|_| nth == 0).map(<[u8]>::to_vec);
                let path = here.or_else(|| self.survey.paths.get(&place.dir).cloned());
                self.try_identify(path.as_deref(), place.dir)?;
            }
        }
        let named: [Option<(&Place, Fid)>; 2] = match &record.op {
            Op::Unlink { at, gone } | Op::Rmdir { at, gone } => [Some((at, gone.fid)), None],
            Op::Rename { from, to, fid, .. } => {
                [Some((from, *fid)), record.op.other().map(|other| (to, other))]
            }
            _ => [None, None],
        };
        for (at, fid) in named.into_iter().flatten() {
            self.try_identify_at(at, fid)?;
        }
        match &record.op {
            Op::Setattr { fid, .. }
            | Op::Setxattr { fid, .. }
            | Op::Removexattr { fid, .. }
            | Op::Store { fid, .. }
                if *fid != ROOT && self.is_gone(*fid)? =>
            {
                self.try_identify(Some(path), *fid)
            }
            Op::Link { fid, .. } if self.is_gone(*fid)? => {
                let path = self.survey.paths.get(fid).cloned();
                self.try_identify(path.as_deref(), *fid)
            }
            _ => Ok(()),
        }
    }
    fn try_identify(&mut self, path: Option<&[u8]>, fid: Fid) -> Result<()> {
        let Some(path) = path else { return Ok(()) };
        match self.target.identify(path, fid) {
            Ok(_) => Ok(()),
            Err(e) => refused(e).map(drop),
        }
    }
    fn try_identify_at(&mut self, at: &Place, fid: Fid) -> Result<()> {
        let Ok(dir) = self.target.tree.dir(at.dir) else { return Ok(()) };
        match self.target.identify_at(&dir, &at.name, fid) {
            Ok(_) => Ok(()),
            Err(e) => refused(e).map(drop),
        }
    }

    fn is_gone(&self, fid: Fid) -> Result<bool> {
        match self.target.tree.place(fid) {
            Ok(_) => Ok(false),
            Err(TreeError::Gone(_)) => Ok(true),
            Err(TreeError::Os(e)) if is_final(e) => Ok(true),
            Err(e) => Err(e.into()),
        }
    }
    fn dir(
        &self,
        fid: Fid,
    ) -> std::result::Result<std::result::Result<Arc<Dir>, Misfit>, TreeError> {
        match self.target.tree.dir(fid) {
            Ok(dir) if self.target.holds(&dir)? => Ok(Ok(dir)),
            Ok(_) => Ok(Err(Misfit::Moved)),
            Err(TreeError::Gone(_) | TreeError::Os(Errno::NOTDIR | Errno::LOOP)) => {
                Ok(Err(Misfit::NoDir))
            }
            Err(e) => Err(e),
        }
    }
    fn there(&self, dir: &Dir, name: &Name) -> std::result::Result<Option<There>, TreeError> {
        let stat = match fs::stat(dir, name.as_bytes()) {
            Err(Errno::NOENT) => return Ok(None),
            stat => stat?,
        };
        Ok(Some(There { fid: self.target.tree.meta(dir, name)?.map(|meta| meta.fid), stat }))
    }
    fn is_shared(&self, there: &There) -> bool {
        self.target.is_shared(&there.stat)
    }
    /// The object, where it stands.
    fn object(
        &self,
        fid: Fid,
    ) -> std::result::Result<std::result::Result<There, Misfit>, TreeError> {
        if fid == ROOT {
            let stat = fs::fstat(&**self.target.tree.root())?;
            return Ok(Ok(There { fid: Some(ROOT), stat }));
        }
        let (dir, name) = match self.target.tree.place(fid) {
            Ok(place) => place,
            Err(TreeError::Gone(_)) => return Ok(Err(Misfit::NoObject)),
            Err(e) => return Err(e),
        };
        if !self.target.holds(&dir)? {
            return Ok(Err(Misfit::Moved));
        }
        Ok(match self.there(&dir, &name)? {
            Some(there) if self.is_shared(&there) => Err(Misfit::Shared),
            Some(there) => Ok(there),
            None => Err(Misfit::NoObject),
        })
    }
    /// The stamp of a directory, with what is to be noted on it.
    fn dir_stamp(&self, dir: &Dir) -> Stamp {
        let noted = self.touched.get(&dir.fid).map_or(Stamp(0), |(_, stamp)| *stamp);
        dir.meta().stamp.max(noted)
    }
    fn object_stamp(&self, fid: Fid) -> Stamp {
        let tree = &self.target.tree;
        let meta = match fid {
            ROOT => Ok(tree.root().meta()),
            _ => tree.find(fid).map(|(_, _, meta)| meta),
        };
        let noted = self.touched.get(&fid).map_or(Stamp(0), |(_, stamp)| *stamp);
        meta.map_or(Stamp(0), |meta| meta.stamp).max(noted)
    }

    // ---- the table of the head ---------------------------------------------------------------

    fn judge(
        &mut self,
        record: &Record,
        seq: Seq,
        stamp: Stamp,
    ) -> std::result::Result<Verdict, TreeError> {
        let op = &record.op;
        if self.is_ours(op) {
            return Ok(Verdict::Misfit(Misfit::OwnName));
        }
        if self.dry && op.touched().any(|fid| self.made.contains(&fid)) {
            return Ok(Verdict::Do); // it depends on what would be done: as far as can be said
        }
        let mut dirs = Vec::new();
        for place in op.places().into_iter().flatten() {
            match self.dir(place.dir)? {
                Ok(dir) => dirs.push(dir),
                Err(why) => return Ok(self.unless_gone(place.dir, seq, why)),
            }
        }
        let noted = !dirs.is_empty() && dirs.iter().all(|dir| self.dir_stamp(dir) >= stamp);
        if stamp != Stamp(0) && noted {
            return Ok(Verdict::Standing);
        }
        match (op, dirs.first(), dirs.last()) {
            (Op::Rename { from, to, fid, over, .. }, Some(old), Some(new)) => {
                self.judge_rename((old, from), (new, to), *fid, over)
            }
            (Op::Unlink { at, gone } | Op::Rmdir { at, gone }, Some(dir), _) => {
                Ok(match self.there(dir, &at.name)? {
                    None => Verdict::Standing,
                    Some(there) if self.is_shared(&there) => Verdict::Misfit(Misfit::Shared),
                    Some(there) if there.fid == Some(gone.fid) => Verdict::Do,
                    Some(_) => Verdict::Misfit(Misfit::OtherObject),
                })
            }
            (_, Some(dir), _) => self.judge_new(op, dir, seq),
            _ => self.judge_object(op, seq, stamp),
        }
    }

    /// What is not there may have been there: then a later record took it away.
    fn unless_gone(&self, fid: Fid, seq: Seq, why: Misfit) -> Verdict {
        let gone_later = self.survey.gone.get(&fid).is_some_and(|gone| *gone > seq);
        if gone_later && !self.part.undo { Verdict::Standing } else { Verdict::Misfit(why) }
    }

    /// Whether it names what is imz's own: such a record is not of this world.
    fn is_ours(&self, op: &Op) -> bool {
        let own_key = match op {
            Op::Setxattr { name, .. } | Op::Removexattr { name, .. } => {
                name == self.target.tree.own_key()
            }
            _ => false,
        };
        let own_name = |place: &Place| place.dir == ROOT && is_own(place.name.as_bytes());
        own_key || op.places().into_iter().flatten().any(own_name)
    }

    fn judge_object(
        &mut self,
        op: &Op,
        seq: Seq,
        stamp: Stamp,
    ) -> std::result::Result<Verdict, TreeError> {
        let Some(fid) = op.fid() else { return Ok(Verdict::Standing) };
        let there = match self.object(fid)? {
            Ok(there) => there,
            Err(why) => return Ok(self.unless_gone(fid, seq, why)),
        };
        if stamp != Stamp(0) && self.object_stamp(fid) >= stamp {
            return Ok(Verdict::Standing);
        }
        let is_file = there.stat.kind() == Kind::File;
        let needs_file = match op {
            Op::Store { .. } => true,
            Op::Setattr { new, .. } => new.size.is_some(),
            _ => false,
        };
        let fits = is_file || !needs_file;
        Ok(if fits { Verdict::Do } else { Verdict::Misfit(Misfit::OtherObject) })
    }

    fn judge_new(
        &mut self,
        op: &Op,
        dir: &Arc<Dir>,
        seq: Seq,
    ) -> std::result::Result<Verdict, TreeError> {
        let ([Some(at), _], Some(fid)) = (op.places(), op.fid()) else {
            return Ok(Verdict::Standing);
        };
        let is_link = matches!(op, Op::Link { .. });
        let there = self.there(dir, &at.name)?;
        if there.as_ref().is_some_and(|there| there.fid == Some(fid)) {
            return Ok(Verdict::Standing);
        }
        let known = match self.object(fid)? {
            Ok(_) => true,
            Err(why @ (Misfit::Moved | Misfit::Shared)) => return Ok(Verdict::Misfit(why)),
            Err(_) => false,
        };
        match there {
            _ if known && !is_link => return Ok(Verdict::Standing),
            Some(there) if there.fid.is_none() && is_alike(op, &there.stat) => {
                let same = self.dry || self.target.identify_at(dir, &at.name, fid)?;
                return Ok(match same {
                    true => Verdict::Standing,
                    false => Verdict::Misfit(Misfit::NameTaken),
                });
            }
            Some(_) => return Ok(Verdict::Misfit(Misfit::NameTaken)),
            None => {}
        }
        Ok(match is_link && !known {
            true => self.unless_gone(fid, seq, Misfit::NoObject),
            false => Verdict::Do,
        })
    }

    fn judge_rename(
        &self,
        (old, from): (&Dir, &Place),
        (new, to): (&Dir, &Place),
        fid: Fid,
        over: &Over,
    ) -> std::result::Result<Verdict, TreeError> {
        let source = self.there(old, &from.name)?;
        let target = self.there(new, &to.name)?;
        if source.iter().chain(&target).any(|there| self.is_shared(there)) {
            return Ok(Verdict::Misfit(Misfit::Shared));
        }
        let source = source.and_then(|there| there.fid);
        let at_target = target.as_ref().and_then(|there| there.fid);
        if source != Some(fid) {
            let there = at_target == Some(fid);
            return Ok(match there {
                true => Verdict::Standing,
                false => Verdict::Misfit(Misfit::OtherObject),
            });
        }
        let fits = match over {
            Over::Nothing { .. } => target.is_none() || at_target == Some(fid),
            Over::Replaced(gone) => target.is_none() || at_target == Some(gone.fid),
            Over::Exchanged { fid, .. } => at_target == Some(*fid),
        };
        Ok(if fits { Verdict::Do } else { Verdict::Misfit(Misfit::NameTaken) })
    }

    /// The record was made on a version that never was here: something between is missing.
    fn note_gap(&mut self, record: &Record) {
        if !self.survey.is_history {
            return;
        }
        let base = match &record.op {
            Op::Setattr { fid, base, .. }
            | Op::Setxattr { fid, base, .. }
            | Op::Removexattr { fid, base, .. }
            | Op::Store { fid, base, .. } => Some((*fid, *base)),
            op => op.places()[0].map(|place| (place.dir, place.base)),
        };
        let Some((fid, base)) = base else { return };
        let have = self.object_stamp(fid);
        if have != Stamp(0) && base > have {
            self.sums.gaps += 1;
        }
    }

    // ---- contents ----------------------------------------------------------------------------

    /// Notes what a record that stands in the tree now means for the contents of its file.
    fn note_contents(&mut self, entry: &Entry, before: bool) -> Result<()> {
        let (seq, record) = (entry.seq, &entry.record);
        match &record.op {
            Op::Store { fid, size, mtime, ranges, .. } => {
                let Ok((dir, name, meta)) = self.target.tree.find(*fid) else { return Ok(()) };
                if before && meta.complete {
                    return Ok(());
                }
                let later = before && meta.stamp > self.stamp(seq);
                let mtime = (!later).then_some(*mtime);
                self.wanted.insert(*fid, Want { seq, size: *size, mtime });
                if !before {
                    if ranges.iter().any(|range| range.len > 0) {
                        // as a write of data does
                        let _ = fs::xattr::remove(&*dir, name.as_bytes(), CAPABILITY);
                    }
                    self.target.tree.edit_meta(*fid, |meta| meta.complete = false)?;
                }
            }
            Op::Setattr { fid, new, .. } => {
                if let Some(want) = self.wanted.get_mut(fid) {
                    if let Some(size) = new.size {
                        (want.seq, want.size) = (seq, size);
                    }
                    if new.mtime.is_some() || new.size.is_some() {
                        want.mtime = None;
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// How many files want contents.
    pub fn wanted_count(&self) -> u64 {
        self.wanted.len() as u64
    }

    /// Fills in the contents of the next file that wants some. `None` at the end.
    ///
    /// # Errors
    /// What ends the replay.
    pub fn fill_next(&mut self) -> Result<Option<Filled>> {
        while let Some((fid, want)) = self.wanted.pop_first().filter(|_| !self.dry) {
            let (dir, name) = match self.target.tree.place(fid) {
                Ok(place) => place,
                Err(TreeError::Gone(_)) => continue, // removed again
                Err(e) => return Err(e.into()),
            };
            if !matches!(self.object(fid), Ok(Ok(_))) {
                continue; // it was told why
            }
            let path = self.target.tree.path_of(&dir, &name);
            let filled = self.fill(fid, (&dir, &name), &path, &want);
            match filled {
                Ok(len) => {
                    self.sums.filled += 1;
                    self.sums.filled_bytes += len;
                }
                Err(Missing::Os(Errno::NOSPC | Errno::DQUOT)) => return Err(ReplayError::NoRoom),
                Err(_) => self.sums.missing += 1,
            }
            return Ok(Some(Filled { fid, path, filled }));
        }
        Ok(None)
    }

    fn fill(
        &mut self,
        fid: Fid,
        (dir, name): (&Dir, &Name),
        path: &[u8],
        want: &Want,
    ) -> std::result::Result<u64, Missing> {
        let stat = fs::stat(dir, name.as_bytes()).map_err(Missing::Os)?;
        let version = Version {
            stamp: self.survey.is_history.then(|| self.survey.lives.stamp(want.seq)),
            size: want.size,
            beyond: self.survey.beyond.get(&fid).map(|seq| self.survey.lives.stamp(*seq)),
            last: self.survey.lives.stamp(self.survey.last),
            mtime: match self.part.undo {
                true => self.survey.times.get(&fid).map(|time| (time.sec, time.nsec)),
                false => Some(want.mtime.map_or(stat.mtime, |time| (time.sec, time.nsec))),
            },
        };
        let from = match &mut self.source {
            _ if want.size == 0 => None,
            None => return Err(Missing::NoSource),
            Some(source) => Some(source.find(fid, path, &version)?),
        };
        let poured = (|| {
            let capability = fs::xattr::get(dir, name.as_bytes(), CAPABILITY)?;
            let file = fs::open(dir, name.as_bytes(), o::WRONLY | o::NONBLOCK, 0)?;
            fs::truncate(&file, 0)?;
            if let Some(from) = &from {
                copy_ranges(&from.file, &file, &[Range { at: 0, len: want.size }])?;
            }
            fs::truncate(&file, want.size)?;
            if let Some(value) = capability {
                fs::xattr::set(&file, b"", CAPABILITY, &value, 0)?;
            }
            if fs::fstat(&file)?.mode != stat.mode {
                fs::chmod_fd(&file, stat.mode & 0o7777)?;
            }
            Ok(file)
        })();
        let file = poured.map_err(Missing::Os)?;
        let (sec, nsec) = want.mtime.map_or(stat.mtime, |time| (time.sec, time.nsec));
        let keep = SetTime::At(stat.atime.0, stat.atime.1);
        fs::utimes_fd(&file, keep, SetTime::At(sec, nsec)).map_err(Missing::Os)?;
        if let Some(from) = &from {
            let now = fs::fstat(&from.file).map_err(Missing::Os)?;
            if (now.size, now.mtime, now.ctime)
                != (from.stat.size, from.stat.mtime, from.stat.ctime)
            {
                return Err(Missing::Changed);
            }
        }
        let complete = self.target.tree.edit_meta(fid, |meta| meta.complete = true);
        complete.map_err(|e| Missing::Os(e.errno()))?;
        Ok(want.size)
    }

    /// Ends it: stamps, times, and all of it durable.
    ///
    /// # Errors
    /// What could not be written.
    pub fn finish(&mut self) -> Result<()> {
        if self.dry {
            return Ok(());
        }
        let mut hands = Hands { tree: &self.target.tree, touched: &mut self.touched };
        if let Err(e) = hands.flush_touched() {
            return Err(match e {
                VolumeError::Tree(e) => e.into(),
                VolumeError::Os(e) => TreeError::from(e).into(),
                _ => ReplayError::NoRoom,
            });
        }
        self.set_older_times()?;
        Ok(self.target.sync()?)
    }
}

/// Whether an object without a fid may be what the record made.
fn is_alike(op: &Op, stat: &fs::Stat) -> bool {
    match op {
        Op::Create { .. } => stat.kind() == Kind::File,
        Op::Mkdir { .. } => stat.kind() == Kind::Dir,
        Op::Symlink { .. } => stat.kind() == Kind::Symlink,
        Op::Mknod { mode, .. } => stat.kind() == Kind::of(*mode),
        Op::Link { .. } => stat.kind() != Kind::Dir,
        _ => false,
    }
}

/// An error that the record meets whenever it is tried is the record's; others end the replay.
fn refused(e: TreeError) -> Result<Fate> {
    match e {
        TreeError::Os(Errno::NOSPC | Errno::DQUOT) => Err(ReplayError::NoRoom),
        TreeError::Os(e) if is_final(e) => Ok(Fate::Misfit(Misfit::Refused(e))),
        TreeError::BadMeta(_) => Ok(Fate::Misfit(Misfit::Refused(Errno::IO))),
        e => Err(e.into()),
    }
}

#[cfg(test)]
mod tests;
