//! A damaged journal written anew: what verifies stays, under its own numbers.
//!
//! Segments before the damage stay as they are. From there on all records are written again, in
//! order and chained anew; where records are lost, noops hold their places ([`Record::lost`]), so
//! that no number is ever given twice. The old files go aside first, each under a second name, and
//! the new ones take their places by renames: whatever a crash leaves can be repaired again.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::Survey;
use crate::kml::codec::{
    self, CursorPage, Entry, Fault, Outcome, SEGMENT_HEADER_LEN, SegmentHead, record_at,
};
use crate::kml::log::{SEGMENT_LEN, SEGMENT_LEN_MAX, SEGMENT_LEN_MIN, SETTLED, SYNCED};
use crate::kml::record::{Record, Seq};
use crate::kml::store::{CURSORS_STRIDE, segment_name};
use crate::sys::file::{allocate, sync_dir};

/// Most places that are held by noops: more than that is not one journal any more.
pub const LOST_MAX: u64 = 1 << 20;

/// What goes into the new journal beyond what the survey found.
pub struct Plan<'a> {
    /// of the journal, where no segment says it
    pub incarnation: u128,
    /// at least up to here all numbers count as given
    pub upto: Seq,
    /// records to be added at the end
    pub extra: &'a [Record],
    /// all cursors but the log's own
    pub cursors: Vec<(Vec<u8>, u64)>,
    /// where the old files go; made if it is not there
    pub aside: &'a Path,
}

/// Why the journal was not written anew.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    #[error("{} records are lost: this is not one journal any more", count)]
    TooMany { count: u64 },
    #[error("a newer imz wrote it")]
    Alien,
    #[error("a record cannot be written: {0}")]
    Unwritable(#[from] Fault),
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

fn at(path: &Path) -> impl Fn(io::Error) -> RebuildError + '_ {
    move |source| RebuildError::Io { path: path.to_owned(), source }
}

/// Writes the journal anew from its first damaged segment on; the newest seq it then has. Durable
/// on return: yes. The caller has the journal's lock.
///
/// # Errors
/// [`RebuildError`]; the old files are all still there, in their places or aside.
pub fn rebuild(survey: &Survey, plan: &Plan<'_>) -> Result<Seq, RebuildError> {
    if survey.is_alien() {
        return Err(RebuildError::Alien);
    }
    let lost = survey.gaps().map(|gap| gap.to.0 + 1 - gap.from.0).sum::<u64>();
    let more = plan.upto.0.saturating_sub(survey.last.0);
    if lost.saturating_add(more) > LOST_MAX {
        return Err(RebuildError::TooMany { count: lost.saturating_add(more) });
    }
    let fresh = survey.dir.join("fsck.new");
    let _ = fs::remove_dir_all(&fresh); // of a repair that did not end
    fs::create_dir(&fresh).map_err(at(&fresh))?;
    let kept = survey.segments.iter().take_while(|segment| !segment.touched).count();
    // the newest one may have to take more
    let kept = kept.min(survey.segments.len().saturating_sub(1));
    let mut writer = Writer::begin(survey, kept, plan.incarnation, &fresh)?;
    let (first, mut failed) = (writer.seq, None);
    let mut put = |entry: &Entry| {
        if failed.is_none() && entry.seq >= first {
            failed = writer.fill(entry).and_then(|()| writer.put(entry)).err();
        }
    };
    super::survey(&survey.dir, survey.incarnation, &mut put).map_err(at(&survey.dir))?;
    if let Some(e) = failed {
        return Err(e);
    }
    while writer.seq <= plan.upto {
        writer.lost()?;
    }
    for record in plan.extra {
        let entry = Entry { seq: writer.seq, record: record.clone(), outcome: Outcome::Done };
        writer.put(&entry)?;
    }
    let made = writer.end()?;
    let last = made.last;
    let old = survey.segments[kept..].iter().map(|segment| segment.file.clone());
    let strays = survey.troubles.iter().filter_map(|trouble| match trouble {
        super::Trouble::Stray { file } => Some(file.clone()),
        _ => None,
    });
    exchange(survey, plan, &fresh, &made, old.chain(strays).collect())?;
    Ok(last)
}

/// The old files aside, the new ones in their places, then the cursors.
fn exchange(
    survey: &Survey,
    plan: &Plan<'_>,
    fresh: &Path,
    made: &Made,
    old: Vec<PathBuf>,
) -> Result<(), RebuildError> {
    fs::create_dir_all(plan.aside).map_err(at(plan.aside))?;
    let cursors = survey.dir.join("cursors");
    for file in old.iter().chain([&cursors]) {
        let Some(name) = file.file_name() else { continue };
        match fs::hard_link(file, plan.aside.join(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(at(file)(e)),
            _ => {}
        }
    }
    sync_dir(plan.aside).map_err(at(plan.aside))?;
    for (first, file) in &made.files {
        let place = survey.dir.join(segment_name(*first));
        fs::rename(file, &place).map_err(at(&place))?;
    }
    for file in old {
        let is_new = |(first, _): &(Seq, PathBuf)| survey.dir.join(segment_name(*first)) == file;
        if !made.files.iter().any(is_new) {
            fs::remove_file(&file).map_err(at(&file))?;
        }
    }
    write_cursors(survey, plan, made.last)?;
    fs::remove_dir(fresh).map_err(at(fresh))?;
    sync_dir(&survey.dir).map_err(at(&survey.dir))
}

/// Both pages, so that neither is older than the journal, all of which is durable.
fn write_cursors(survey: &Survey, plan: &Plan<'_>, last: Seq) -> Result<(), RebuildError> {
    let generation = survey.cursors.newest().map_or(0, |page| page.generation);
    let mut cursors = plan.cursors.clone();
    cursors.retain(|(name, _)| name != SYNCED.as_bytes() && name != SETTLED.as_bytes());
    // what is settled is looked at again
    cursors.push((SYNCED.as_bytes().to_vec(), last.0));
    let path = survey.dir.join("fsck.new").join("cursors");
    let file = File::create(&path).map_err(at(&path))?;
    for slot in 0..2 {
        let page = CursorPage { generation: generation + 1 + slot, cursors: cursors.clone() };
        let page = page.encode()?;
        file.write_all_at(&page, slot * CURSORS_STRIDE as u64).map_err(at(&path))?;
    }
    file.sync_all().map_err(at(&path))?;
    let place = survey.dir.join("cursors");
    fs::rename(&path, &place).map_err(at(&place))
}

struct Made {
    files: Vec<(Seq, PathBuf)>,
    last: Seq,
}

/// Writes segments one after another.
struct Writer<'a> {
    dir: &'a Path,
    head: SegmentHead,
    bytes: Vec<u8>,
    seq: Seq,
    chain: u32,
    time_ns: u64,
    files: Vec<(Seq, PathBuf)>,
}

impl<'a> Writer<'a> {
    fn begin(
        survey: &Survey,
        kept: usize,
        incarnation: u128,
        dir: &'a Path,
    ) -> Result<Writer<'a>, RebuildError> {
        let head = survey.segments.iter().find_map(|segment| segment.head);
        let incarnation = survey.incarnation.unwrap_or(incarnation);
        let known = head.map_or(SEGMENT_LEN as u64, |head| head.len);
        let len = known.clamp(SEGMENT_LEN_MIN as u64, SEGMENT_LEN_MAX as u64);
        let begin = survey.segments.get(kept);
        let first = begin.map_or(Seq(1), |segment| segment.first);
        // where nobody knows it, any will do: there is nothing before it
        let seed = begin.and_then(|segment| segment.seed);
        let seed = seed.unwrap_or_else(|| SegmentHead::first_seed(incarnation));
        let head = SegmentHead { node: survey.node.unwrap_or(0), incarnation, first, len, seed };
        Ok(Writer {
            dir,
            head,
            bytes: head.encode().to_vec(),
            seq: first,
            chain: seed,
            time_ns: 0,
            files: Vec::new(),
        })
    }
    /// Holds the places up to the entry's.
    fn fill(&mut self, entry: &Entry) -> Result<(), RebuildError> {
        while self.seq < entry.seq {
            self.lost()?;
        }
        Ok(())
    }
    fn lost(&mut self) -> Result<(), RebuildError> {
        let record = Record::lost(self.time_ns);
        self.put(&Entry { seq: self.seq, record, outcome: Outcome::Done })
    }
    fn put(&mut self, entry: &Entry) -> Result<(), RebuildError> {
        let mut draft = codec::draft(&entry.record)?;
        if self.bytes.len() + draft.len() > self.head.len as usize {
            self.cut()?;
        }
        self.chain = codec::seal(&mut draft, entry.seq, self.chain, Seq(self.head.first.0 - 1));
        let word = entry.outcome.word().to_le_bytes();
        draft[record_at::OUTCOME..record_at::OUTCOME + word.len()].copy_from_slice(&word);
        self.bytes.extend_from_slice(&draft);
        (self.seq, self.time_ns) = (entry.seq.next(), entry.record.time_ns);
        Ok(())
    }
    /// Ends a segment and begins the next.
    fn cut(&mut self) -> Result<(), RebuildError> {
        let path = self.dir.join(segment_name(self.head.first));
        let mut file = File::create(&path).map_err(at(&path))?;
        allocate(&mut file, self.head.len).map_err(at(&path))?;
        file.write_all_at(&self.bytes, 0).map_err(at(&path))?;
        file.sync_all().map_err(at(&path))?;
        self.files.push((self.head.first, path));
        self.head = SegmentHead { first: self.seq, seed: self.chain, ..self.head };
        self.bytes.truncate(SEGMENT_HEADER_LEN);
        self.bytes.copy_from_slice(&self.head.encode());
        Ok(())
    }
    fn end(mut self) -> Result<Made, RebuildError> {
        self.cut()?;
        Ok(Made { files: self.files, last: Seq(self.seq.0 - 1) })
    }
}
