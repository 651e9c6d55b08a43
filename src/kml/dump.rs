//! A journal for people and for tools: entries as lines or as JSON, and where and why it stops.
//!
//! Reads files and nothing else: no lock, no mapping, no write, so that a live journal does not
//! notice and a damaged one is shown as far as it goes. What stands behind damage is not guessed
//! at. The mount is never asked.
//!
//! ```text
//!   let mut dump = Dump::open(path, options)?;     // a journal's directory, or one segment
//!   for entry in &mut dump { println!("{}", render::line(&entry)) }
//!   println!("{}", dump.end())                     // and where it ended
//!   // following: sleep, and iterate again; `end().is_final()` says when that is in vain
//! ```
//!
//! Absent on purpose: clocks and sleeping (the caller's), and colours.

use std::collections::VecDeque;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::kml::codec::{CursorPage, Entry, Fault, SEGMENT_HEADER_LEN, SegmentHead};
use crate::kml::log::SYNCED;
use crate::kml::record::Seq;
use crate::kml::recover::{self, Spot, Stop};
use crate::kml::store::{
    Bytes, CURSORS_STRIDE, FileBytes, segment_first, segment_name, segments_in,
};

pub mod render;

/// How often a torn tail is read again: a live writer may be in the middle of a record.
const TRIES: u32 = 100;
/// One place in so many records is remembered for reading in reverse.
const STRIDE: usize = 64;

/// One end of what is shown, itself included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bound {
    Seq(Seq),
    /// nanoseconds since the Unix epoch
    TimeNs(u64),
}

/// What to show, and in which order.
#[derive(Clone, Default, Debug)]
pub struct Options {
    /// newest first
    pub reverse: bool,
    pub from: Option<Bound>,
    pub to: Option<Bound>,
    /// this path and what is below it; slashes around it do not matter
    pub path: Option<Vec<u8>>,
    /// nobody writes to it: a torn record is not waited for
    pub still: bool,
}

/// Why there is nothing to read at all.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    #[error("cannot read {}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("no journal in {}", path.display())]
    Empty { path: PathBuf },
}

/// Why the reading ended.
#[derive(Debug)]
pub enum Why {
    Stop(Stop),
    Unreadable(io::Error),
}

/// Where and why the reading ended: record `seq` would begin at byte `at` of `file`.
#[derive(Debug)]
pub struct End {
    pub file: PathBuf,
    pub at: u64,
    pub seq: Seq,
    pub why: Why,
}

impl End {
    /// Whether there is damage, as against an end that a journal may have at any time.
    pub fn is_damage(&self) -> bool {
        !matches!(self.why, Why::Stop(Stop::End | Stop::Torn(_)))
    }
    /// Whether iterating again is in vain.
    pub fn is_final(&self) -> bool {
        self.is_damage()
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.why {
            Why::Stop(Stop::End) => write!(f, "end")?,
            Why::Stop(Stop::Torn(why)) => write!(f, "torn (never acknowledged): {why};")?,
            Why::Stop(Stop::Corrupt(why)) => write!(f, "corrupt: {why};")?,
            Why::Stop(Stop::Alien(why)) => write!(f, "written by a newer imz: {why};")?,
            Why::Unreadable(why) => write!(f, "unreadable: {why};")?,
        }
        write!(f, " at byte {} of {}, before record {}", self.at, self.file.display(), self.seq.0)
    }
}

/// A journal being read.
pub struct Dump {
    /// the directory, unless it is a single segment
    dir: Option<PathBuf>,
    /// segments not opened yet
    ahead: VecDeque<(Seq, PathBuf)>,
    current: Option<Current>,
    /// newest record that the cursors say was durable
    synced: Seq,
    options: Options,
    /// reading in reverse: places in the order of reading, and the block in hand
    marks: Vec<(PathBuf, Spot)>,
    until: Seq,
    block: Vec<Entry>,
    end: End,
    buf: Vec<u8>,
}

struct Current {
    path: PathBuf,
    head: SegmentHead,
    bytes: FileBytes,
    spot: Spot,
}

impl Current {
    fn open(path: &Path) -> Result<Current, (u64, Why)> {
        let bytes = FileBytes::open(path).map_err(|why| (0, Why::Unreadable(why)))?;
        let mut header = vec![0; SEGMENT_HEADER_LEN.min(bytes.size())];
        bytes.read(0, &mut header);
        let head = SegmentHead::verify(&header).map_err(|why| (0, Why::Stop(bad(why))))?;
        let spot = Spot { at: 0, seq: head.first, chain: head.seed };
        let mut current = Current { path: path.into(), head, bytes, spot };
        current.spot = current.begin();
        Ok(current)
    }
    /// Gives a writer time to end what looks torn. Looks at the one record only: what lies behind
    /// it is much to read.
    fn wait(&self, buf: &mut Vec<u8>) {
        let is_torn = |buf: &mut Vec<u8>| {
            let suspect = recover::look(&self.bytes, self.spot.at, buf);
            suspect.verify(self.spot.chain, self.spot.seq).is_err()
        };
        for _ in 0..TRIES {
            if !is_torn(buf) {
                return;
            }
            std::thread::yield_now();
        }
    }
    fn begin(&self) -> Spot {
        Spot { at: SEGMENT_HEADER_LEN, seq: self.head.first, chain: self.head.seed }
    }
}

fn bad(why: Fault) -> Stop {
    match why {
        Fault::Version(_) => Stop::Alien(why),
        _ => Stop::Corrupt(why),
    }
}

impl Dump {
    /// A journal's directory, or one segment of it.
    ///
    /// # Errors
    /// [`DumpError`] if there is nothing to read; damage is no error, but an [`End`].
    pub fn open(path: &Path, options: Options) -> Result<Dump, DumpError> {
        let io = |source| DumpError::Io { path: path.into(), source };
        let is_dir = fs::metadata(path).map_err(io)?.is_dir();
        let mut ahead = VecDeque::new();
        if is_dir {
            let firsts = segments_in(path).map_err(io)?;
            if firsts.is_empty() {
                return Err(DumpError::Empty { path: path.into() });
            }
            let skipped = match options.from {
                Some(Bound::Seq(from)) => firsts.partition_point(|first| *first <= from).max(1) - 1,
                _ => 0,
            };
            let wanted = firsts.into_iter().skip(skipped);
            ahead.extend(wanted.map(|first| (first, path.join(segment_name(first)))));
        } else {
            File::open(path).map_err(io)?;
            let name = path.file_name().and_then(|name| name.to_str());
            ahead.push_back((name.and_then(segment_first).unwrap_or_default(), path.into()));
        }
        let (seq, file) = ahead.front().cloned().unwrap_or_default();
        let mut dump = Dump {
            dir: is_dir.then(|| path.to_path_buf()),
            ahead,
            current: None,
            synced: if is_dir { synced_mark(path) } else { Seq(0) },
            options,
            marks: Vec::new(),
            until: Seq(0),
            block: Vec::new(),
            end: End { file, at: 0, seq, why: Why::Stop(Stop::End) },
            buf: Vec::new(),
        };
        if dump.options.reverse {
            dump.walk();
        }
        Ok(dump)
    }

    /// Where and why it ended. Of use once the iterator has returned `None` (in reverse: at once).
    pub fn end(&self) -> &End {
        &self.end
    }

    /// The same, once nothing more is read.
    pub fn into_end(self) -> End {
        self.end
    }

    /// The next record forwards, or `None` with `end` set. After a benign end it goes on when there
    /// is more.
    fn forward(&mut self) -> Option<Entry> {
        if self.end.is_final() {
            return None;
        }
        let mut waited = false;
        loop {
            if !self.settle_segment() {
                return None;
            }
            let limit = self.ahead.front().map(|(first, _)| *first);
            let current = self.current.as_mut()?;
            // a segment is begun only when all before it is durable
            let synced = self.synced.max(Seq(current.head.first.0 - 1));
            let synced = limit.map_or(synced, |limit| synced.max(Seq(limit.0.saturating_sub(1))));
            let before = current.spot;
            match recover::next(&current.bytes, &mut current.spot, synced, &mut self.buf) {
                Ok(entry) => return Some(entry),
                Err(Stop::Torn(_)) if !waited && !self.options.still => {
                    current.wait(&mut self.buf);
                    waited = true;
                }
                Err(Stop::End | Stop::Torn(_)) if self.more_segments(before.seq) => {}
                Err(stop) => {
                    let current = self.current.as_ref()?;
                    let file = current.path.clone();
                    // a file that lost its tail ends in zeros, and looks like an end
                    let short = current.head.len != current.bytes.size() as u64;
                    let why = match stop {
                        Stop::End | Stop::Torn(_) if short => Stop::Corrupt(Fault::Short),
                        stop => stop,
                    };
                    let why = Why::Stop(why);
                    self.end = End { file, at: before.at as u64, seq: before.seq, why };
                    return None;
                }
            }
        }
    }

    /// Goes to the next segment where this one ends. `false`: it ends here, for good.
    fn settle_segment(&mut self) -> bool {
        let due = self.current.as_ref().map(|current| (current.spot, current.head));
        let Some((first, path)) = self.ahead.front().cloned() else { return due.is_some() };
        if due.is_some_and(|(spot, _)| spot.seq < first) {
            return true;
        }
        self.ahead.pop_front();
        let opened = Current::open(&path).and_then(|next| {
            let named = self.dir.is_none() || next.head.first == first;
            let chained = due.is_none_or(|(spot, head)| {
                (spot.seq, spot.chain) == (next.head.first, next.head.seed)
                    && head.incarnation == next.head.incarnation
            });
            match named && chained {
                true => Ok(next),
                false => Err((0, Why::Stop(Stop::Corrupt(Fault::Chain)))),
            }
        });
        match opened {
            Ok(next) => self.current = Some(next),
            Err((at, why)) => self.end = End { file: path, at, seq: first, why },
        }
        !self.end.is_final()
    }

    /// Looks for a segment that was begun since.
    fn more_segments(&mut self, due: Seq) -> bool {
        let Some(dir) = &self.dir else { return false };
        let begun = dir.join(segment_name(due));
        let is_new = self.current.as_ref().is_some_and(|current| current.head.first != due);
        if is_new && self.ahead.is_empty() && begun.exists() {
            self.ahead.push_back((due, begun));
            return true;
        }
        false
    }

    /// Reads all once, to have places to begin at on the way back.
    fn walk(&mut self) {
        let mut count = 0;
        loop {
            let before = self.current.as_ref().map(|current| (current.head.first, current.spot));
            let Some(entry) = self.forward() else { return };
            self.until = entry.seq.next();
            let Some(current) = &self.current else { return };
            let same = before.filter(|(first, _)| *first == current.head.first);
            if count % STRIDE == 0 || same.is_none() {
                // a block lies in one segment
                let spot = same.map_or(current.begin(), |(_, spot)| spot);
                self.marks.push((current.path.clone(), spot));
                count = 0;
            }
            count += 1;
        }
    }

    fn backward(&mut self) -> Option<Entry> {
        while self.block.is_empty() {
            let (path, begin) = self.marks.pop()?;
            let mut spot = begin;
            match Current::open(&path) {
                Ok(current) => {
                    while spot.seq < self.until
                        && let Ok(entry) =
                            recover::next(&current.bytes, &mut spot, Seq(0), &mut self.buf)
                    {
                        self.block.push(entry);
                    }
                }
                // trimmed away since: what is older is gone, too
                Err((at, why)) => {
                    self.end = End { file: path, at, seq: begin.seq, why };
                    self.marks.clear();
                }
            }
            self.until = begin.seq;
        }
        self.block.pop()
    }

    fn wants(&self, entry: &Entry) -> bool {
        let from = match self.options.from {
            Some(Bound::Seq(from)) => entry.seq >= from,
            Some(Bound::TimeNs(from)) => entry.record.time_ns >= from,
            None => true,
        };
        let to = match self.options.to {
            Some(Bound::Seq(to)) => entry.seq <= to,
            Some(Bound::TimeNs(to)) => entry.record.time_ns <= to,
            None => true,
        };
        from && to && self.options.path.as_ref().is_none_or(|top| is_below(entry, top))
    }
}

impl Iterator for Dump {
    type Item = Entry;

    fn next(&mut self) -> Option<Entry> {
        loop {
            let entry = if self.options.reverse { self.backward() } else { self.forward() }?;
            if self.wants(&entry) {
                return Some(entry);
            }
        }
    }
}

fn is_below(entry: &Entry, top: &[u8]) -> bool {
    let start = top.iter().take_while(|byte| **byte == b'/').count();
    let end = top.iter().rposition(|byte| *byte != b'/').map_or(start, |last| last + 1);
    let top = &top[start..end];
    let below = entry.record.path.strip_prefix(top);
    below.is_some_and(|rest| top.is_empty() || rest.is_empty() || rest[0] == b'/')
}

/// What the cursors say was durable; nothing where they cannot be read.
fn synced_mark(dir: &Path) -> Seq {
    let Ok(bytes) = fs::read(dir.join("cursors")) else { return Seq(0) };
    let pages = [bytes.get(..), bytes.get(CURSORS_STRIDE..)].into_iter().flatten();
    let pages = pages.filter_map(|page| CursorPage::verify(page).ok());
    let newest = pages.max_by_key(|page| page.generation).unwrap_or_default();
    let mark = newest.cursors.iter().find(|(name, _)| name == SYNCED.as_bytes());
    Seq(mark.map_or(0, |(_, value)| *value))
}

#[cfg(test)]
mod tests;
