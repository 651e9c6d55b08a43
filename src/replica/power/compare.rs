//! The walk: every name in the tree against the index, and records for what differs.
//!
//! ```text
//!  a name whose object       the index has it           then
//!  has no fid                -                          half made: taken away; with data: aside
//!  is ours, never shipped    nowhere                    journal its making, attributes and all
//!  is the server's           nowhere                    noted: it came just before the cut
//!  any                       here                       -
//!  any                       elsewhere, not there now   journal a rename
//!  any                       elsewhere, and is there    journal a link
//! ```
//!
//! What is journaled needs an order: a directory before what is in it, and a place must be free
//! before somebody else comes there. So the list is gone through until nothing more fits. What the
//! index had at such a place, and is nowhere now, was replaced or removed.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::super::cache::CacheError;
use super::super::meta::Meta;
use super::super::ops::attr_of;
use super::super::tree::{Dir, Tree, TreeError, is_own};
use super::{Job, clock_ns};
use crate::kml::codec::Outcome;
use crate::kml::record::{
    Attr, Change, Fid, Gone, Name, Op, Origin, Over, Place, ROOT, Record, Stamp,
};
use crate::sys::fs::{self, Kind, RenameMode, Stat, o, xattr};
use crate::sys::{Errno, crash};

type Result<T> = std::result::Result<T, CacheError>;

/// Names between two words of progress.
const PROGRESS_STEP: u64 = 20_000;
/// Longest version that is kept aside, bytes.
const ASIDE_LEN_MAX: u64 = 64 << 20;

/// A name that the index does not have.
pub(super) struct Differing {
    dir: Fid,
    name: Name,
    fid: Fid,
    /// where the index has the object; empty: nowhere
    known: Vec<(Fid, Name)>,
}

impl Job<'_> {
    /// Looks at every name; what the index does not know it knows afterwards.
    pub(super) fn walk(&mut self) -> Result<Vec<Differing>> {
        let mut differing = Vec::new();
        let mut partly = HashMap::new();
        let mut dirs = vec![ROOT];
        while let Some(fid) = dirs.pop() {
            let dir = self.tree.dir(fid)?;
            for entry in fs::read_dir(&*dir).map_err(TreeError::from)? {
                let Ok(name) = Name::new(&entry.name) else { continue };
                if fid == ROOT && is_own(name.as_bytes()) {
                    continue;
                }
                self.report.looked_at += 1;
                if self.report.looked_at.is_multiple_of(PROGRESS_STEP) {
                    log::warn!("{} names compared", self.report.looked_at);
                }
                let stat = fs::stat(&*dir, name.as_bytes()).map_err(TreeError::from)?;
                let Some(meta) = self.tree.meta(&dir, &name)? else {
                    self.half_made(&dir, &name, &stat)?;
                    continue;
                };
                self.compare(&dir, name.clone(), &meta, &mut differing)?;
                match stat.kind() {
                    Kind::Dir => dirs.push(self.tree.open_dir(&dir, &name)?.fid),
                    Kind::File => self.doubt_contents(&dir, &name, meta, &stat, &mut partly)?,
                    _ => {}
                }
            }
        }
        self.doubt_granules(partly)?;
        Ok(differing)
    }

    /// Made when the power went, and not yet told who it is. A record that knows it adopts it.
    fn half_made(&mut self, dir: &Dir, name: &Name, stat: &Stat) -> Result<()> {
        let raw = name.as_bytes();
        let in_doubt = self.log.entries(self.log.first()).any(|entry| {
            entry.is_ok_and(|entry| {
                let mut places = entry.record.op.places().into_iter().flatten();
                places.any(|at| at.dir == dir.fid && at.name == *name)
            })
        });
        if in_doubt {
            return Ok(());
        }
        let done = match stat.kind() {
            Kind::Dir => fs::rmdir(dir, raw),
            Kind::File if stat.size > 0 => {
                self.report.kept_aside += 1;
                let to = format!("nameless-{:x}-{}", dir.fid.0, self.report.kept_aside);
                let aside = self.aside_dir()?;
                fs::rename(dir, raw, &aside, to.as_bytes(), RenameMode::NoReplace)
            }
            _ => fs::unlink(dir, raw),
        };
        self.report.half_made += 1;
        match done {
            Ok(()) => Ok(()),
            Err(e) => {
                log::warn!("{name:?}: was half made, and cannot be taken away: {e}");
                Ok(())
            }
        }
    }

    fn compare(
        &mut self,
        dir: &Dir,
        name: Name,
        meta: &Meta,
        differing: &mut Vec<Differing>,
    ) -> Result<()> {
        let known = self.tree.names(meta.fid)?;
        if known.iter().any(|(parent, at)| *parent == dir.fid && *at == name) {
            return Ok(());
        }
        self.tree.index.add(meta.fid, dir.fid, &name).map_err(TreeError::from)?;
        let ours = meta.fid.node() == self.node && meta.stamp == Stamp(0);
        if known.is_empty() && !ours {
            return Ok(());
        }
        differing.push(Differing { dir: dir.fid, name, fid: meta.fid, known });
        Ok(())
    }

    /// A file's bytes may not have reached the disk although it is said that they are here.
    fn doubt_contents(
        &mut self,
        dir: &Dir,
        name: &Name,
        mut meta: Meta,
        stat: &Stat,
        partly: &mut HashMap<Fid, Meta>,
    ) -> Result<()> {
        let ns = |(sec, nsec): (i64, u32)| {
            u64::try_from(sec).unwrap_or(0).saturating_mul(1_000_000_000) + u64::from(nsec)
        };
        let nothing =
            if meta.complete { stat.size == 0 } else { meta.have.iter().all(|b| *b == 0) };
        let ours = meta.fid.node() == self.node && meta.stamp == Stamp(0);
        if ours || nothing || ns(stat.ctime) <= self.kept_at {
            return Ok(());
        }
        if self.announced.contains_key(&meta.fid) {
            if !meta.complete {
                partly.insert(meta.fid, meta);
            }
            return Ok(());
        }
        if meta.complete && ns(stat.mtime) > self.kept_at && stat.size <= ASIDE_LEN_MAX {
            self.keep_aside(dir, name, meta.fid, stat)?;
        }
        let stub = Meta::stub(meta.fid, meta.stamp, stat.size);
        let size = if meta.complete { stat.size } else { meta.base_size };
        (meta.complete, meta.stale, meta.base_size) = (false, true, size);
        meta.have = if size == stat.size { stub.have } else { vec![0; meta.have.len()] };
        self.tree.set_meta(dir, name, &meta)?;
        self.report.distrusted += 1;
        Ok(())
    }

    /// Files of which a part came and a part was written here: the granules that have nothing of
    /// ours are fetched again. (Before something is written, what came is made durable.)
    fn doubt_granules(&mut self, partly: HashMap<Fid, Meta>) -> Result<()> {
        if partly.is_empty() {
            return Ok(());
        }
        let ranges = self.pending_ranges(&partly.keys().copied().collect::<HashSet<Fid>>())?;
        for (fid, meta) in partly {
            let granule = meta.granule_len();
            let mut have = vec![0; meta.have.len()];
            for (_, at, len) in ranges.iter().filter(|(of, _, _)| *of == fid) {
                let past = at.saturating_add(*len).min(meta.base_size).div_ceil(granule);
                for g in (at / granule)..past {
                    if let Some(byte) = have.get_mut((g / 8) as usize) {
                        *byte |= meta.have[(g / 8) as usize] & (1 << (g % 8));
                    }
                }
            }
            self.report.distrusted += 1;
            self.tree.edit_meta(fid, |meta| meta.have = have)?;
        }
        Ok(())
    }

    /// A copy of what somebody may have written without a record.
    fn keep_aside(&mut self, dir: &Dir, name: &Name, fid: Fid, stat: &Stat) -> Result<()> {
        let aside = self.aside_dir()?;
        let to = format!("{:x}-{}", fid.0, stat.mtime.0);
        let copy = || -> fs::Result<()> {
            let from = fs::open(dir, name.as_bytes(), o::RDONLY | o::NONBLOCK, 0)?;
            let flags = o::WRONLY | o::CREAT | o::TRUNC;
            let into = fs::open(&aside, to.as_bytes(), flags, 0o600)?;
            let mut at = 0;
            while at < stat.size {
                match fs::copy_range(&from, at, &into, at, (stat.size - at) as usize)? {
                    0 => break,
                    count => at += count as u64,
                }
            }
            Ok(())
        };
        match copy() {
            Ok(()) => self.report.kept_aside += 1,
            Err(e) => log::warn!("{name:?}: what stands there is not kept: {e}"),
        }
        Ok(())
    }

    fn aside_dir(&self) -> Result<std::os::fd::OwnedFd> {
        let at = |source: Errno| CacheError::Limbo { path: self.aside.to_owned(), source };
        std::fs::create_dir_all(self.aside)
            .map_err(|e| at(Errno::from_io_error(&e).unwrap_or(Errno::IO)))?;
        fs::open_root(self.aside).map_err(at)
    }

    /// Writes records for what differs still.
    pub(super) fn journal(&mut self, differing: Vec<Differing>) -> Result<()> {
        let mut left = Vec::new();
        for one in differing {
            // what was redone meanwhile is where it belongs
            let place = (one.dir, one.name.clone());
            if stands(self.tree, one.fid, &place)? && !self.was_settled(one.fid, &place) {
                left.push(one);
            }
        }
        let mut occupied = self.before(&left)?;
        let mut made: HashSet<Fid> = HashSet::new();
        while !left.is_empty() {
            let unmade: HashSet<Fid> =
                left.iter().filter(|d| d.known.is_empty()).map(|d| d.fid).collect();
            let moving: HashMap<(Fid, Name), Fid> =
                left.iter().flat_map(|d| d.known.iter().map(|at| (at.clone(), d.fid))).collect();
            let (now, later): (Vec<_>, Vec<_>) = left.into_iter().partition(|d| {
                let place = (d.dir, d.name.clone());
                !unmade.contains(&d.dir) && moving.get(&place).is_none_or(|fid| *fid == d.fid)
            });
            if now.is_empty() {
                for d in &later {
                    log::warn!(
                        "{:?} in {}: stands in a circle, and is not journaled",
                        d.name,
                        d.dir
                    );
                }
                break;
            }
            for d in now {
                let replaced = occupied.remove(&(d.dir, d.name.clone()));
                self.journal_one(d, replaced, &mut made)?;
                crash::point("power-journaled");
            }
            left = later;
        }
        Ok(())
    }

    /// What the index had at these places, as far as it is nowhere in the tree now.
    fn before(&self, differing: &[Differing]) -> Result<HashMap<(Fid, Name), Fid>> {
        let mut found = HashMap::new();
        if differing.is_empty() {
            return Ok(found);
        }
        let wanted: HashMap<(Fid, Name), Fid> =
            differing.iter().map(|d| ((d.dir, d.name.clone()), d.fid)).collect();
        let mut candidates = Vec::new();
        let each = self.tree.index.each(|fid, at| {
            if wanted.get(at).is_some_and(|now| *now != fid) {
                candidates.push((at.clone(), fid));
            }
            true
        });
        each.map_err(TreeError::from)?;
        for (at, fid) in candidates {
            if matches!(self.tree.find(fid), Err(TreeError::Gone(_))) {
                found.insert(at, fid);
            }
        }
        Ok(found)
    }

    fn journal_one(
        &mut self,
        one: Differing,
        replaced: Option<Fid>,
        made: &mut HashSet<Fid>,
    ) -> Result<()> {
        let dir = self.tree.dir(one.dir)?;
        let stat = fs::stat(&*dir, one.name.as_bytes()).map_err(TreeError::from)?;
        let base = dir.meta().stamp;
        let at = Place { dir: one.dir, base, name: one.name.clone() };
        let gone = replaced.map(|fid| self.gone(fid, &stat));
        let elsewhere = match one.known.first() {
            Some(place) if stands(self.tree, one.fid, place)? => None,
            known => known.cloned(),
        };
        if let Some((from, name)) = elsewhere {
            let meta = self.tree.meta(&dir, &one.name)?.unwrap_or_default();
            let over = gone.map_or(Over::Nothing { noreplace: false }, Over::Replaced);
            let from = Place { dir: from, base: Stamp(0), name };
            let op = Op::Rename { from, to: at, fid: one.fid, base: meta.stamp, over };
            return self.append(&dir, &one.name, &stat, op);
        }
        if let Some(gone) = gone {
            self.append(&dir, &one.name, &stat, Op::Unlink { at: at.clone(), gone })?;
        }
        if !one.known.is_empty() || !made.insert(one.fid) {
            let op = Op::Link { at, fid: one.fid, base: Stamp(0) };
            return self.append(&dir, &one.name, &stat, op);
        }
        self.journal_new(&dir, &one.name, &stat, at, one.fid)
    }

    /// An object that stood in the way of another and is nowhere: nobody has changed it since
    /// `current`, or the server says so.
    fn gone(&self, fid: Fid, like: &Stat) -> Gone {
        let attr = Attr { mode: like.mode, nlink: 1, ..Attr::default() };
        Gone { fid, base: self.current, attr, target: None }
    }

    fn journal_new(
        &mut self,
        dir: &Arc<Dir>,
        name: &Name,
        stat: &Stat,
        at: Place,
        fid: Fid,
    ) -> Result<()> {
        let (mode, umask) = (stat.mode & 0o7777, 0);
        let op = match stat.kind() {
            Kind::File => Op::Create { at, fid, mode, umask },
            Kind::Dir => Op::Mkdir { at, fid, mode, umask },
            Kind::Symlink => {
                let target = fs::readlink(&**dir, name.as_bytes()).map_err(TreeError::from)?;
                return self.append(dir, name, stat, Op::Symlink { at, fid, target });
            }
            _ => Op::Mknod { at, fid, mode: stat.mode, umask, rdev: stat.rdev },
        };
        self.append(dir, name, stat, op)?;
        let (attr, base) = (attr_of(stat), Stamp(0));
        let new = Change {
            mode: Some(mode),
            uid: Some(attr.uid),
            gid: Some(attr.gid),
            size: None,
            atime: Some(attr.atime),
            mtime: Some(attr.mtime),
        };
        self.append(dir, name, stat, Op::Setattr { fid, base, new, old: new })?;
        let raw = name.as_bytes();
        for key in xattr::list(&**dir, raw).map_err(TreeError::from)? {
            if key == self.tree.own_key() {
                continue;
            }
            let value = xattr::get(&**dir, raw, &key).map_err(TreeError::from)?;
            if let Some(value) = value {
                let op = Op::Setxattr { fid, base, name: key, value, old: None };
                self.append(dir, name, stat, op)?;
            }
        }
        if stat.kind() == Kind::File && stat.size > 0 {
            // no record has announced these bytes
            self.announced.insert(fid, (0, None));
        }
        Ok(())
    }

    fn append(&mut self, dir: &Dir, name: &Name, stat: &Stat, op: Op) -> Result<()> {
        let path = self.tree.path_of(dir, name);
        log::info!("{}: journaled after the fact", path.escape_ascii());
        let (time_ns, origin) = (clock_ns(), Origin::default());
        let record = Record { time_ns, origin, uid: stat.uid, gid: stat.gid, path, op };
        let ticket = self.log.append(&record)?;
        self.log.settle(ticket, Outcome::Done);
        super::recover::note(&self.tree.index, &record.op)?;
        self.report.journaled += 1;
        Ok(())
    }
}

/// Whether the object stands at a place now.
fn stands(tree: &Tree, fid: Fid, (parent, name): &(Fid, Name)) -> Result<bool> {
    let dir = match tree.dir(*parent) {
        Ok(dir) => dir,
        Err(TreeError::Gone(_)) => return Ok(false),
        Err(e) => return Err(e.into()),
    };
    match tree.meta(&dir, name) {
        Ok(meta) => Ok(meta.is_some_and(|meta| meta.fid == fid)),
        Err(TreeError::Os(Errno::NOENT)) => Ok(false),
        Err(e) => Err(e.into()),
    }
}
