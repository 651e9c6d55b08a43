//! After a power cut at a client: tree, attributes, index and journal are made to agree again.
//!
//! What the parts may be after a cut follows from the order of syncs:
//!
//! ```text
//!   worker     journal up to T with outcomes > tree (syncfs) > note T as `tree` > ship up to T
//!   keep       index > journal > tree > cursors: `tree`, `kept_at`, `acked`, `current`
//!   fsync      the file > its record > directories on its way > journal
//!   open to    what came of the file from the server > then it may be changed
//!   write
//! ```
//!
//! 1. What the server has was durable here, contents and all, before it left.
//! 2. Up to the cursor `tree` records stand in the tree. Records behind it, which the server never
//!    saw, are *in doubt*: their effects may be missing. They are redone in order, each where it is
//!    missing and where it says enough (redo.rs). What it does not say is contents: a new file whose
//!    contents are gone is not made again as an empty one, its records are void.
//! 3. Effects may be there whose record is missing: the file system commits its names every few
//!    seconds, the journal's pages are its own matter. They are found by a walk over the tree
//!    (compare.rs), which holds every name against the index and the journal: new objects, new
//!    places and further names are journaled. A name that is gone without a record, and attributes
//!    that are other than the server's, are the server's again when they are fetched.
//! 4. A file whose contents pend is as it is on the disk, as on any local file system: short, old or
//!    with holes if it was not synced. When it is not what its newest record announced, it is
//!    stored anew, and the old record with it gets its end.
//! 5. Contents that the server has, and that came or changed here since all was last durable
//!    (`kept_at`, by the file's ctime), are not believed: the file is a stub again. What somebody
//!    may have written there without a record is kept in `lost+found`.
//! 6. Everything is asked for again before it is believed: the epoch is another one.
//!
//! This is done at the first start after the cut, before anything else, and all over again if that
//! is cut, too: each step is found done. A process that was killed keeps its pages: whether power was
//! lost says the machine's boot id in the state. Bounded: memory for what differs, one walk.
//!
//! Absent on purpose: belief in the order in which a file system commits, but for (3), where another
//! order costs names that nobody had synced.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::cache::{ACKED, CURRENT, CacheError, KEPT_AT, TREE};
use super::ops::attr_of;
use super::recover;
use super::tree::{Tree, TreeError};
use crate::kml::codec::Outcome;
use crate::kml::log::Log;
use crate::kml::record::{Fid, Name, Op, Seq, Stamp, Time};
use crate::sys::{Errno, fs};

mod compare;
mod redo;
#[cfg(test)]
mod tests;

/// A file's ctime is taken at most this long before the clock that `kept_at` was read from.
const CLOCK_STEP: Duration = Duration::from_secs(2);

/// What was found and done.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// names that the walk looked at
    pub looked_at: u64,
    /// records in doubt, of these done again, and void because too much is missing
    pub in_doubt: u64,
    pub redone: u64,
    pub void: u64,
    /// records written for effects that had none
    pub journaled: u64,
    /// half-made objects that were taken away
    pub half_made: u64,
    /// files whose contents are fetched again, and versions that were kept aside
    pub distrusted: u64,
    pub kept_aside: u64,
    /// files that are to be stored as they are now
    pub store: Vec<Fid>,
}

/// What a file was when its newest record was made: size, and time if the record says one.
type Announced = HashMap<Fid, (u64, Option<Time>)>;

/// The parts that are to agree, and what is known.
pub(super) struct Job<'a> {
    tree: &'a Tree,
    log: &'a Log,
    /// the epoch from now on
    epoch: u32,
    /// our number
    node: u32,
    /// of the version of the volume that all here was at least
    current: Stamp,
    /// contents changed before this time, nanoseconds since the Unix epoch, are durable
    kept_at: u64,
    /// files whose contents pend, and what was announced of them
    announced: Announced,
    /// objects that records without outcome put to these places after all; few
    settled: Vec<(Fid, (Fid, Name))>,
    /// objects that are nowhere because records in doubt removed them
    removed: HashSet<Fid>,
    /// directory for what is not believed and not at the server either
    aside: &'a Path,
    report: Report,
}

/// Makes the cache agree with itself. Durable on return: no; the caller makes it so, and only then
/// notes that this start of the machine found it in order.
///
/// # Errors
/// The tree or the journal cannot be read or written: nothing may be believed.
pub fn recover(
    tree: &Tree,
    log: &Log,
    (epoch, node): (u32, u32),
    aside: &Path,
) -> Result<Report, CacheError> {
    log::warn!("the machine lost its power, or was reset: the cache is compared with its journal");
    let mut job = Job {
        tree,
        log,
        epoch,
        node,
        current: Stamp(log.cursor(CURRENT)),
        kept_at: log.cursor(KEPT_AT).saturating_sub(CLOCK_STEP.as_nanos() as u64),
        announced: Announced::new(),
        settled: Vec::new(),
        removed: HashSet::new(),
        aside,
        report: Report::default(),
    };
    for entry in log.entries(log.first()) {
        let entry = entry?;
        if entry.outcome == Outcome::Done {
            recover::note(&tree.index, &entry.record.op)?;
        }
        if entry.seq > Seq(log.cursor(ACKED)) && entry.outcome != Outcome::Void {
            announce(&mut job.announced, &entry.record.op);
        }
    }
    let differing = job.walk()?;
    job.redo_all(Seq(log.cursor(TREE)))?;
    job.journal(differing)?;
    job.look_at_contents()?;
    let r = &job.report;
    log::warn!(
        "of {} names and {} records in doubt: {} done again, {} void, {} journaled, {} half made, \
         {} files to be fetched again, {} stored as they are, {} kept in {}",
        r.looked_at,
        r.in_doubt,
        r.redone,
        r.void,
        r.journaled,
        r.half_made,
        r.distrusted,
        r.store.len(),
        r.kept_aside,
        aside.display()
    );
    Ok(job.report)
}

/// Nanoseconds since the Unix epoch, by the clock that files get their ctime from.
pub(super) fn clock_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    since.as_nanos() as u64
}

/// Notes what a record says of a file's contents.
fn announce(known: &mut Announced, op: &Op) {
    match op {
        Op::Create { fid, .. } => {
            known.insert(*fid, (0, None));
        }
        Op::Store { fid, size, mtime, .. } => {
            known.insert(*fid, (*size, Some(*mtime)));
        }
        Op::Setattr { fid, new, .. } => {
            if let Some(size) = new.size {
                known.insert(*fid, (size, new.mtime));
            } else if let (Some((_, mtime)), Some(new)) = (known.get_mut(fid), new.mtime) {
                *mtime = Some(new);
            }
        }
        _ => {}
    }
}

impl Job<'_> {
    /// Finds the files that are not what was announced of them.
    fn look_at_contents(&mut self) -> Result<(), CacheError> {
        for (fid, (size, mtime)) in &self.announced {
            let (dir, name, meta) = match self.tree.find(*fid) {
                Ok(found) => found,
                Err(TreeError::Gone(_)) => continue,
                Err(e) => return Err(e.into()),
            };
            let stat = match fs::stat(&*dir, name.as_bytes()) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => continue,
                Err(e) => return Err(TreeError::from(e).into()),
            };
            let attr = attr_of(&stat);
            // Of a file that is not all here only the records know which bytes are ours.
            let is_file = stat.kind() == fs::Kind::File && meta.complete;
            if is_file && (attr.size != *size || mtime.is_some_and(|mtime| mtime != attr.mtime)) {
                self.report.store.push(*fid);
            }
        }
        self.report.store.sort_unstable();
        Ok(())
    }

    /// Objects that are about to be, or were, changed by records from `from` on: what is here of
    /// them may be ours.
    fn pending_ranges(&self, wanted: &HashSet<Fid>) -> Result<Vec<(Fid, u64, u64)>, CacheError> {
        let mut found = Vec::new();
        for entry in self.log.entries(Seq(self.log.cursor(ACKED) + 1).max(self.log.first())) {
            let entry = entry?;
            if let Op::Store { fid, ranges, .. } = &entry.record.op
                && wanted.contains(fid)
                && entry.outcome != Outcome::Void
            {
                found.extend(ranges.iter().map(|range| (*fid, range.at, range.len)));
            }
        }
        Ok(found)
    }
}
