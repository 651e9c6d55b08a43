//! The journal: what is damaged in it, what pends, and what its records want of the tree.

use std::collections::{HashMap, HashSet};

use super::{Finding, Fix, Found, FsckError, House, Seen, Side, Watch, io};
use crate::kml::codec::{Entry, Outcome};
use crate::kml::record::{Fid, Name, Op, Over, Range, Record, Seq};
use crate::kml::salvage::{self, Gap, Survey, Trouble};
use crate::replica::cache::ACKED;
use crate::replica::compare::{self, Facts as Known};
use crate::replica::lives::Lives;
use crate::replica::state::Facts;
use crate::replica::volume::CURSOR;

/// So often progress is told.
const TELL_EVERY: u64 = 4096;

/// What a journal said.
#[derive(Default)]
pub(super) struct Journal {
    /// `None`: there is none
    pub survey: Option<Survey>,
    /// the newest record that the server keeps, as far as is known (a client's)
    pub acked: Seq,
    pub pending_count: u64,
    /// what the newest records say of objects (a server's)
    pub known: HashMap<Fid, Known>,
    /// what must stand at a name, by the newest record that pends
    pub names: HashMap<(Fid, Name), (Seq, Option<Fid>)>,
    /// files whose contents pend
    pub stores: HashMap<Fid, Pending>,
    /// objects that own records say are gone for good
    pub gone: HashSet<Fid>,
    /// objects that records which pend have made
    pub made: HashSet<Fid>,
    /// of each object that a record names, where it stood last
    pub last_place: HashMap<(Fid, Name), Fid>,
    /// gaps whose records the server may lack
    pub gaps: Vec<Gap>,
    /// the newest record of each client (a server's)
    pub origins: HashMap<u32, Seq>,
    pub counter_max: u64,
    /// when the oldest kept record was made, nanoseconds
    pub first_ns: u64,
}

/// The newest store of a file that pends.
pub(super) struct Pending {
    pub seq: Seq,
    pub ranges: Vec<Range>,
    pub size: u64,
    pub path: Vec<u8>,
}

pub(super) fn look(
    house: &House,
    facts: Option<&Facts>,
    found: &mut Found,
    watch: &Watch<'_>,
) -> Result<Journal, FsckError> {
    let mut journal = Journal::default();
    if !house.journal.is_dir() {
        found.add(
            Finding::error("journal-missing", &house.journal, "there is no journal")
                .advise("restore it from a backup; without it nothing that pends can be shipped"),
        );
        return Ok(journal);
    }
    // the cursors say from where on records pend
    let cursors = salvage::cursors(&house.journal);
    journal.acked = Seq(cursors.get(ACKED).unwrap_or(0));
    let own = facts.map_or(0, |facts| facts.node);
    let mut count = 0;
    let survey = salvage::survey(&house.journal, None, &mut |entry| {
        count += 1;
        if u64::is_multiple_of(count, TELL_EVERY) {
            (watch.progress)("records", count);
        }
        journal.take(house.side, own, entry);
    });
    watch.check()?;
    let survey = survey.map_err(io(&house.journal))?;
    if cursors.newest().is_none() {
        // what was trimmed was acknowledged
        journal.acked = Seq(survey.first().0 - 1);
    }
    journal.gaps = survey
        .gaps()
        .filter(|gap| gap.to > journal.acked && house.side == Side::Cache)
        .cloned()
        .collect();
    for trouble in &survey.troubles {
        found.add(tell(house, trouble, journal.acked));
    }
    if survey.segments.is_empty() {
        let what = "there are no segments in it";
        found.add(
            Finding::error("journal-missing", &house.journal, what)
                .mend(Fix::Journal, "begin a new one; what pended is found by times in the tree"),
        );
    }
    look_at_cursors(house, &survey, found);
    look_at_names(facts, &survey, found);
    journal.survey = Some(survey);
    Ok(journal)
}

fn look_at_names(facts: Option<&Facts>, survey: &Survey, found: &mut Found) {
    if let (Some(facts), Some(inside)) = (facts, survey.incarnation)
        && !survey.segments.is_empty()
        && facts.incarnation() != inside
    {
        let what = "the journal is of another life than state.json: directories were mixed up";
        found.add(
            Finding::error("journal-foreign", &survey.dir, what)
                .advise("put the journal back that belongs here"),
        );
    }
}

fn look_at_cursors(house: &House, survey: &Survey, found: &mut Found) {
    let path = house.journal.join("cursors");
    match &survey.cursors.pages {
        [Err(why), Err(_)] if !survey.segments.is_empty() => found.add(
            Finding::error("cursors-damaged", &path, format!("neither page can be read: {why}"))
                .mend(
                    Fix::Journal,
                    "write them anew: all that is in the journal is offered to the server again, \
                     which knows what it has",
                ),
        ),
        [Err(why), Ok(_)] | [Ok(_), Err(why)] => found.add(
            Finding::note("cursors-half", &path, format!("one of its two pages is no page: {why}"))
                .advise("the other one counts; the next write replaces it"),
        ),
        _ => {}
    }
    for name in [ACKED, CURSOR] {
        let value = survey.cursors.get(name).unwrap_or(0);
        let last = survey.gaps().map(|gap| gap.to).fold(survey.last, Seq::max);
        if value > last.0 {
            let what =
                format!("the cursor `{name}` says {value}, and the journal ends with {}", last.0);
            found.add(
                Finding::error("cursor-ahead", &path, what)
                    .mend(Fix::Journal, "go on behind it, so that no number is given twice"),
            );
        }
    }
}

fn tell(house: &House, trouble: &Trouble, acked: Seq) -> Finding {
    let carry = "carry over every record that verifies; the old files go to lost+found";
    let mend = |finding: Finding| finding.mend(Fix::Journal, carry);
    match trouble {
        Trouble::Head { file, why } if matches!(why, crate::kml::codec::Fault::Version(_)) => {
            Finding::error("journal-newer", file, format!("a newer imz wrote it: {why}"))
                .advise("use that one")
        }
        Trouble::Head { file, why } => {
            mend(Finding::error("segment-header", file, format!("its header is damaged: {why}")))
        }
        Trouble::Name { file, first } => mend(Finding::error(
            "segment-name",
            file,
            format!("it is the segment that begins with record {}, under a wrong name", first.0),
        )),
        Trouble::Stray { file } => mend(Finding::warning(
            "segment-stray",
            file,
            "it is a second copy of a segment, or one of another journal",
        )),
        Trouble::Length { file, found, said } => mend(Finding::error(
            "segment-length",
            file,
            format!("it has {found} bytes, and its header says {said}"),
        )),
        Trouble::Seam { file } => mend(Finding::error(
            "segment-seam",
            file,
            "its first record is not chained to the last one of the segment before",
        )),
        Trouble::Lost(gap) => {
            let records = match gap.to.0 - gap.from.0 {
                0 => format!("record {} is damaged", gap.from.0),
                _ => format!("records {} to {} are damaged or missing", gap.from.0, gap.to.0),
            };
            let at_server = match house.side {
                Side::Cache if gap.to <= acked => "; the server has what they say",
                Side::Cache => "; the server may lack what they say",
                Side::Served => "; the tree has what they did, the history lacks it",
            };
            let what = format!("{records}, from byte {} on: {}{at_server}", gap.at, gap.why);
            mend(Finding::error("records-lost", &gap.file, what))
        }
        Trouble::Torn { file, at, seq, why } => Finding::note(
            "journal-torn",
            file,
            format!(
                "record {} at byte {at} is not whole, and was never acknowledged: {why}",
                seq.0
            ),
        )
        .advise("the next start cuts it"),
        Trouble::Alien { file, at, seq, why } => Finding::error(
            "journal-newer",
            file,
            format!("record {} at byte {at} was written by a newer imz: {why}", seq.0),
        )
        .advise("use that one"),
        Trouble::Unreadable { file, why } => {
            Finding::error("unreadable", file, format!("it cannot be read: {why}"))
                .advise("look after the disk first")
        }
    }
}

impl Journal {
    fn take(&mut self, side: Side, own: u32, entry: &Entry) {
        if self.first_ns == 0 {
            self.first_ns = entry.record.time_ns;
        }
        let op = &entry.record.op;
        for fid in op.touched().filter(|fid| fid.node() == own) {
            self.counter_max = self.counter_max.max(fid.counter());
        }
        match side {
            Side::Served => {
                compare::learn(&mut self.known, entry);
                let origin = entry.record.origin;
                let newest = self.origins.entry(origin.node).or_default();
                *newest = origin.seq.max(*newest);
            }
            Side::Cache if entry.outcome == Outcome::Done => {
                self.place(entry);
                if entry.seq > self.acked {
                    self.pend(entry.seq, &entry.record);
                }
            }
            Side::Cache => {}
        }
        self.pending_count += u64::from(side == Side::Cache && entry.seq > self.acked);
    }

    /// Which object a name stands for, by the newest record: what an attribute said that is lost.
    fn place(&mut self, entry: &Entry) {
        for (place, fid) in effects(&entry.record.op) {
            match fid {
                Some(fid) => self.last_place.insert(place, fid),
                None => self.last_place.remove(&place),
            };
        }
    }

    fn pend(&mut self, seq: Seq, record: &Record) {
        for (place, fid) in effects(&record.op) {
            self.names.insert(place, (seq, fid));
        }
        match &record.op {
            Op::Create { fid, .. }
            | Op::Mkdir { fid, .. }
            | Op::Symlink { fid, .. }
            | Op::Mknod { fid, .. } => drop(self.made.insert(*fid)),
            Op::Unlink { gone, .. }
            | Op::Rmdir { gone, .. }
            | Op::Rename { over: Over::Replaced(gone), .. }
                if gone.attr.nlink <= 1 || matches!(record.op, Op::Rmdir { .. }) =>
            {
                self.gone.insert(gone.fid);
                self.stores.remove(&gone.fid);
            }
            Op::Setattr { fid, new, .. } => {
                if let (Some(pending), Some(size)) = (self.stores.get_mut(fid), new.size) {
                    pending.size = size;
                }
            }
            Op::Store { fid, size, ranges, .. } => {
                let (ranges, size, path) = (ranges.clone(), *size, record.path.clone());
                self.stores.insert(*fid, Pending { seq, ranges, size, path });
            }
            _ => {}
        }
    }

    /// Whether something that pends is about the object.
    pub fn pends(&self, fid: Fid) -> bool {
        self.made.contains(&fid) || self.stores.contains_key(&fid)
    }
}

/// What an operation leaves at the names that it changes.
fn effects(op: &Op) -> Vec<((Fid, Name), Option<Fid>)> {
    let key = |place: &crate::kml::record::Place| (place.dir, place.name.clone());
    match op {
        Op::Create { at, fid, .. }
        | Op::Mkdir { at, fid, .. }
        | Op::Symlink { at, fid, .. }
        | Op::Mknod { at, fid, .. }
        | Op::Link { at, fid, .. } => vec![(key(at), Some(*fid))],
        Op::Unlink { at, .. } | Op::Rmdir { at, .. } => vec![(key(at), None)],
        Op::Rename { from, to, fid, over, .. } => {
            let back = match over {
                Over::Exchanged { fid, .. } => Some(*fid),
                _ => None,
            };
            vec![(key(from), back), (key(to), Some(*fid))]
        }
        _ => Vec::new(),
    }
}

/// What can be said only when the tree has been seen.
pub(super) fn close(
    house: &House,
    facts: Option<&Facts>,
    journal: &Journal,
    seen: &Seen,
    found: &mut Found,
) {
    let Some(survey) = &journal.survey else { return };
    let Some(facts) = facts else { return };
    let last = survey.gaps().map(|gap| gap.to).fold(survey.last, Seq::max);
    let (mut mended, mut lives) = (facts.clone(), Lives::of(&facts.lives));
    let newest = lives.stamp(last);
    if house.side == Side::Served && seen.newest > newest {
        let what = format!(
            "objects have versions up to {}, and the journal ends with {}: its newest part is missing",
            seen.newest.0, newest.0
        );
        lives.begin_beyond(last, seen.newest);
        mended.lives = lives.table();
        let fix = Fix::State(Box::new(mended.clone()));
        let how = "go on behind that number, so that no version is given twice";
        found.add(Finding::error("journal-behind", &house.journal, what).mend(fix, how));
    }
    let counter = seen.counter_max.max(journal.counter_max);
    if facts.fid_next <= counter {
        let what = format!("it would give the fid {counter} again: its next is {}", facts.fid_next);
        mended.fid_next = counter + 1;
        let how = format!("go on with {}", mended.fid_next);
        let finding = Finding::error("fids-again", house.state.join("state.json"), what);
        found.add(finding.mend(Fix::State(Box::new(mended)), how));
    }
}
