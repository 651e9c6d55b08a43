//! A journal as it is, damage included: everything that can be read of it, and what is lost.
//!
//! Where a mount stops at the first acknowledged record that is damaged, this goes on behind the
//! damage, at the next place where a record stands:
//!
//! ```text
//!   the bytes are    and                                       so
//!   a record         chained to the one before                 it is read
//!   zeros            nothing is due behind them                the end
//!   faulty           never acknowledged, and no successor      torn: what the mount cuts
//!   faulty           else                                      lost, up to the next record that
//!                                                              stands there whole
//! ```
//!
//! A successor of a torn record is a record that stands right behind it, and is chained to the crc
//! which the torn one still has. Behind an acknowledged record any later one counts, for what was
//! ever acknowledged is never cut. Segments are taken by their own word for which they are: files
//! that changed places are put in order.
//!
//! [`survey`] reads files and changes nothing; `rebuild` writes a journal anew from what it found.

pub mod rebuild;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::kml::codec::{
    CURSORS_LEN, CursorPage, Entry, Fault, HEADER_LEN, RECORD_LEN_MIN, SEGMENT_HEADER_LEN,
    SegmentHead, Suspect, record_len_claimed,
};
use crate::kml::log::{SEGMENT_LEN_MAX, SYNCED};
use crate::kml::record::Seq;
use crate::kml::recover::{data_end, look};
use crate::kml::store::{Bytes, CURSORS_STRIDE, FileBytes, segment_name, segments_in};

/// What is wrong with a journal. Places are bytes of a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Trouble {
    /// the header of the segment does not verify
    Head {
        file: PathBuf,
        why: Fault,
    },
    /// the file is not the segment that its name says
    Name {
        file: PathBuf,
        first: Seq,
    },
    /// the segment is there twice, or is of another journal: it is left out
    Stray {
        file: PathBuf,
    },
    /// the file is longer or shorter than its header says
    Length {
        file: PathBuf,
        found: u64,
        said: u64,
    },
    /// the segment does not follow from the one before, which is whole
    Seam {
        file: PathBuf,
    },
    /// records are damaged or missing
    Lost(Gap),
    /// records that were never acknowledged end here
    Torn {
        file: PathBuf,
        at: u64,
        seq: Seq,
        why: Fault,
    },
    /// a whole record that this version cannot read: nothing behind it is looked at
    Alien {
        file: PathBuf,
        at: u64,
        seq: Seq,
        why: Fault,
    },
    Unreadable {
        file: PathBuf,
        why: String,
    },
}

/// Records `from..=to` that are gone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Gap {
    pub file: PathBuf,
    pub at: u64,
    pub from: Seq,
    pub to: Seq,
    pub why: Fault,
    /// when the records around the gap were made, nanoseconds since the Unix epoch: 0 and
    /// `u64::MAX` where there is none
    pub after_ns: u64,
    pub before_ns: u64,
}

/// The two pages of cursors.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cursors {
    pub pages: [Result<CursorPage, Fault>; 2],
}

impl Cursors {
    fn read(dir: &Path) -> Cursors {
        let bytes = fs::read(dir.join("cursors")).unwrap_or_default();
        let page = |at: usize| {
            let page = bytes.get(at..).ok_or(Fault::Short)?;
            CursorPage::verify(&page[..page.len().min(CURSORS_LEN)])
        };
        Cursors { pages: [page(0), page(CURSORS_STRIDE)] }
    }
    /// The page that counts.
    pub fn newest(&self) -> Option<&CursorPage> {
        self.pages.iter().flatten().max_by_key(|page| page.generation)
    }
    /// The value of a cursor, if it is known.
    pub fn get(&self, name: &str) -> Option<u64> {
        let page = self.newest()?;
        page.cursors.iter().find(|(key, _)| key == name.as_bytes()).map(|(_, value)| *value)
    }
}

/// The cursors of the journal in a directory.
pub fn cursors(dir: &Path) -> Cursors {
    Cursors::read(dir)
}

/// One segment that counts.
#[derive(Clone, Debug)]
pub struct Segment {
    pub file: PathBuf,
    /// the first record's seq
    pub first: Seq,
    /// `None`: it does not verify
    pub head: Option<SegmentHead>,
    /// whether something in it, or before it, is wrong
    pub touched: bool,
    /// what the first record is chained to, where that is known
    pub seed: Option<u32>,
    /// bytes
    pub len: u64,
}

/// All that was found.
#[derive(Clone, Debug)]
pub struct Survey {
    pub dir: PathBuf,
    pub segments: Vec<Segment>,
    pub troubles: Vec<Trouble>,
    pub cursors: Cursors,
    /// of the segments that verify
    pub node: Option<u32>,
    pub incarnation: Option<u128>,
    /// the newest record that can be read; one before the first if there is none
    pub last: Seq,
    /// the newest record that is known to have been durable
    pub synced: Seq,
    /// records that were read
    pub count: u64,
    /// bytes of records
    pub used_len: u64,
    /// the end is not certain: nobody can say how many records are lost at the end
    pub open_end: bool,
    /// records that may have stood in the room behind the last one, at most
    pub room_count: u64,
}

impl Survey {
    /// The oldest record that is kept.
    pub fn first(&self) -> Seq {
        self.segments.first().map_or(Seq(1), |segment| segment.first)
    }
    pub fn gaps(&self) -> impl Iterator<Item = &Gap> {
        self.troubles.iter().filter_map(|trouble| match trouble {
            Trouble::Lost(gap) => Some(gap),
            _ => None,
        })
    }
    /// Whether a mount would refuse it, now or when it gets there.
    pub fn is_damaged(&self) -> bool {
        let torn = |trouble: &Trouble| matches!(trouble, Trouble::Torn { .. });
        self.cursors.newest().is_none() || !self.troubles.iter().all(torn)
    }
    /// Whether a newer imz wrote it.
    pub fn is_alien(&self) -> bool {
        self.troubles.iter().any(|trouble| match trouble {
            Trouble::Alien { .. } => true,
            Trouble::Head { why, .. } => matches!(why, Fault::Version(_)),
            _ => false,
        })
    }
}

/// Reads a journal's directory; `each` gets every record that verifies, in order. `incarnation`:
/// the journal's, where the caller knows it.
///
/// # Errors
/// The directory cannot be read.
pub fn survey(
    dir: &Path,
    incarnation: Option<u128>,
    each: &mut dyn FnMut(&Entry),
) -> io::Result<Survey> {
    let cursors = Cursors::read(dir);
    let mut found = Survey {
        dir: dir.to_owned(),
        segments: Vec::new(),
        troubles: Vec::new(),
        synced: Seq(cursors.get(SYNCED).unwrap_or(0)),
        cursors,
        node: None,
        incarnation,
        last: Seq(0),
        count: 0,
        used_len: 0,
        open_end: false,
        room_count: 0,
    };
    list(&mut found)?;
    let newest_first = found.segments.last().map_or(1, |segment| segment.first.0);
    // a segment is begun only when all before it is durable
    found.synced = found.synced.max(Seq(newest_first - 1));
    found.last = Seq(found.first().0 - 1);
    let mut reader = Reader { due: None, time_ns: 0, open_gap: None, buf: Vec::new(), each };
    for nth in 0..found.segments.len() {
        if found.is_alien() {
            break;
        }
        reader.segment(&mut found, nth);
    }
    reader.close(&mut found);
    Ok(found)
}

/// The segments in their order, by what they say of themselves.
fn list(found: &mut Survey) -> io::Result<()> {
    let mut segments: Vec<Segment> = Vec::new();
    let mut strays = Vec::new();
    for named in segments_in(&found.dir)? {
        let file = found.dir.join(segment_name(named));
        let (head, len) = match head_of(&file) {
            Ok((head, len)) => (head, len),
            Err(e) => {
                found.troubles.push(Trouble::Unreadable { file: file.clone(), why: e.to_string() });
                (Err(Fault::Short), 0)
            }
        };
        let first = head.as_ref().map_or(named, |head| head.first);
        match &head {
            Err(why) => found.troubles.push(Trouble::Head { file: file.clone(), why: *why }),
            Ok(head) if head.first != named => {
                found.troubles.push(Trouble::Name { file: file.clone(), first: head.first });
            }
            Ok(head) if head.len != len => {
                let (found_len, said) = (len, head.len);
                let what = Trouble::Length { file: file.clone(), found: found_len, said };
                found.troubles.push(what);
            }
            Ok(_) => {}
        }
        let misnamed = head.as_ref().is_ok_and(|head| head.first != named);
        let (head, seed) = (head.ok(), None);
        let touched = head.is_none() || misnamed || head.is_some_and(|head| head.len != len);
        segments.push(Segment { file, first, head, touched, seed, len });
    }
    // of two that say the same, the one with the right name comes first
    segments.sort_by_key(|it| (it.first, it.file != found.dir.join(segment_name(it.first))));
    let newest = segments.iter().rev().find_map(|it| it.head).map(|head| head.incarnation);
    found.incarnation = found.incarnation.or(newest);
    let mut before = None;
    segments.retain(|segment| {
        let foreign = segment.head.is_some_and(|head| Some(head.incarnation) != found.incarnation);
        let keep = !foreign && before != Some(segment.first);
        if keep {
            before = Some(segment.first);
        } else {
            strays.push(Trouble::Stray { file: segment.file.clone() });
        }
        keep
    });
    found.node = segments.iter().find_map(|it| it.head).map(|head| head.node);
    found.troubles.extend(strays);
    found.segments = segments;
    Ok(())
}

fn head_of(file: &Path) -> io::Result<(Result<SegmentHead, Fault>, u64)> {
    let len = fs::metadata(file)?.len();
    let bytes = FileBytes::open(file)?;
    let mut header = vec![0; SEGMENT_HEADER_LEN.min(bytes.size())];
    bytes.read(0, &mut header);
    let head = match SegmentHead::verify(&header) {
        Ok(head) if head.len > SEGMENT_LEN_MAX as u64 => Err(Fault::TooLong),
        head => head,
    };
    Ok((head, len))
}

struct Reader<'a> {
    /// the record that is due, and what it is chained to, if that is known
    due: Option<(Seq, Option<u32>)>,
    /// when the newest record was made that was read
    time_ns: u64,
    /// a gap whose end was not seen yet
    open_gap: Option<Gap>,
    buf: Vec<u8>,
    each: &'a mut dyn FnMut(&Entry),
}

/// What stands at a place.
enum Here {
    Record(Box<Entry>, usize, u32),
    Alien(Fault),
    Faulty(Fault),
}

impl Reader<'_> {
    fn segment(&mut self, found: &mut Survey, nth: usize) {
        let (file, first, head) = {
            let segment = &found.segments[nth];
            (segment.file.clone(), segment.first, segment.head)
        };
        let limit = found.segments.get(nth + 1).map(|next| next.first);
        let bytes = match FileBytes::open(&file) {
            Ok(bytes) => bytes,
            Err(_) => return, // told when the segments were listed
        };
        let mut chain = head.map(|head| head.seed);
        match self.due {
            Some((due, known)) => {
                if due < first {
                    self.lose(&file, 0, due, Fault::Short);
                    self.lost_up_to(Seq(first.0 - 1));
                    found.segments[nth].touched = true;
                } else if let (Some(known), Some(seed)) = (known, chain)
                    && known != seed
                {
                    found.troubles.push(Trouble::Seam { file: file.clone() });
                    found.segments[nth].touched = true;
                }
                chain = chain.or(known.filter(|_| due == first));
            }
            None if chain.is_none() && first == Seq(1) => {
                chain = found.incarnation.map(SegmentHead::first_seed);
            }
            None => {}
        }
        found.segments[nth].seed = chain;
        self.due = Some((first, chain));
        self.records(found, nth, &bytes, limit);
    }

    fn records(&mut self, found: &mut Survey, nth: usize, bytes: &FileBytes, limit: Option<Seq>) {
        let file = found.segments[nth].file.clone();
        let mut at = SEGMENT_HEADER_LEN;
        let end = data_end(bytes, at.min(bytes.size()));
        while let Some((due, chain)) = self.due.filter(|(due, _)| Some(*due) != limit) {
            match self.look(bytes, at, due, chain) {
                Here::Record(entry, len, crc) => {
                    self.take(found, &entry);
                    at += len;
                    found.used_len += len as u64;
                    self.due = Some((entry.seq.next(), Some(crc)));
                }
                Here::Alien(why) => {
                    let at = at as u64;
                    found.troubles.push(Trouble::Alien { file, at, seq: due, why });
                    return;
                }
                Here::Faulty(why) => {
                    found.segments[nth].touched |= at < end || limit.is_some();
                    let tail = Tail { at, end, due, why, limit };
                    match self.behind(found, &file, bytes, tail) {
                        Some(next) => at = next,
                        None => {
                            let room = bytes.size().saturating_sub(at);
                            found.room_count = (room / RECORD_LEN_MIN) as u64;
                            return;
                        }
                    }
                }
            }
        }
    }

    fn look(&mut self, bytes: &dyn Bytes, at: usize, due: Seq, chain: Option<u32>) -> Here {
        let suspect = look(bytes, at, &mut self.buf);
        let chain = chain.or(suspect.chain_claimed()).unwrap_or_default();
        let verified = match suspect.verify(chain, due) {
            Ok(verified) => verified,
            Err(why) => return Here::Faulty(why),
        };
        match verified.decode() {
            Ok(record) => {
                let (seq, outcome) = (verified.seq(), verified.outcome());
                let entry = Entry { seq, record, outcome };
                Here::Record(Box::new(entry), verified.bytes().len(), verified.crc())
            }
            Err(why) => Here::Alien(why),
        }
    }

    fn take(&mut self, found: &mut Survey, entry: &Entry) {
        if let Some(mut gap) = self.open_gap.take() {
            (gap.to, gap.before_ns) = (Seq(entry.seq.0 - 1), entry.record.time_ns);
            found.troubles.push(Trouble::Lost(gap));
        }
        self.time_ns = entry.record.time_ns;
        found.last = entry.seq;
        found.count += 1;
        (self.each)(entry);
    }

    /// What comes behind a fault. `Some`: a record stands there, and is due now.
    fn behind(
        &mut self,
        found: &mut Survey,
        file: &Path,
        bytes: &FileBytes,
        tail: Tail,
    ) -> Option<usize> {
        let Tail { at, end, due, why, limit } = tail;
        let successor = self.successor(bytes, at, due);
        let known = limit.is_some() || due <= found.synced;
        let (again, promised) = self.search(bytes, &tail, known);
        let acknowledged = known || promised;
        if !acknowledged {
            let Some(next) = successor else {
                if at < end {
                    let (file, at) = (file.to_owned(), at as u64);
                    found.troubles.push(Trouble::Torn { file, at, seq: due, why });
                    found.open_end |= found.cursors.newest().is_none();
                }
                return None;
            };
            return Some(self.resume(file, (at, due, why), next));
        }
        if let Some(next) = again {
            return Some(self.resume(file, (at, due, why), next));
        }
        self.lose(file, at, due, why);
        if limit.is_none() {
            self.lost_up_to(found.synced.max(due));
            found.open_end |= found.cursors.newest().is_none();
        }
        None
    }

    fn resume(
        &mut self,
        file: &Path,
        (at, due, why): (usize, Seq, Fault),
        (next, seq, chain): (usize, Seq, u32),
    ) -> usize {
        self.lose(file, at, due, why);
        self.due = Some((seq, Some(chain)));
        next
    }

    /// A record right behind the damaged one, chained to the crc that this one still has.
    fn successor(&mut self, bytes: &FileBytes, at: usize, due: Seq) -> Option<(usize, Seq, u32)> {
        let mut head = [0; HEADER_LEN];
        if at + HEADER_LEN > bytes.size() {
            return None;
        }
        bytes.read(at, &mut head);
        let next = at + record_len_claimed(&head).ok()?;
        let crc = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        let suspect = look(bytes, next, &mut self.buf);
        let ours = Suspect(&head).seq_claimed() == Some(due);
        (ours && suspect.verify(crc, due.next()).is_ok()).then_some((next, due.next(), crc))
    }

    /// The first record that stands whole behind the fault, and whether any there says that the
    /// faulty one was durable in its time (unless that is `known`).
    fn search(
        &mut self,
        bytes: &FileBytes,
        tail: &Tail,
        known: bool,
    ) -> (Option<(usize, Seq, u32)>, bool) {
        let (mut again, mut promised) = (None, known);
        let mut at = tail.at + 8;
        while at + HEADER_LEN <= tail.end && !(promised && again.is_some()) {
            let suspect = look(bytes, at, &mut self.buf);
            let claims = suspect.seq_claimed().zip(suspect.chain_claimed());
            let room = (at - tail.at) as u64;
            // each record that is gone took its room
            let near = |seq: Seq| {
                seq > tail.due
                    && (seq.0 - tail.due.0).saturating_mul(RECORD_LEN_MIN as u64) <= room
                    && tail.limit.is_none_or(|limit| seq < limit)
            };
            if let Some((seq, chain)) = claims.filter(|(seq, _)| near(*seq))
                && let Ok(verified) = suspect.verify(chain, seq)
            {
                promised |= verified.synced() >= tail.due;
                again = again.or(Some((at, seq, chain)));
                at += verified.bytes().len();
            } else {
                at += 8;
            }
        }
        (again, promised)
    }

    fn lose(&mut self, file: &Path, at: usize, due: Seq, why: Fault) {
        if self.open_gap.is_none() {
            self.open_gap = Some(Gap {
                file: file.to_owned(),
                at: at as u64,
                from: due,
                to: due,
                why,
                after_ns: self.time_ns,
                before_ns: u64::MAX,
            });
        }
    }

    /// Everything up to here is gone; the gap may go on.
    fn lost_up_to(&mut self, upto: Seq) {
        if let Some(gap) = &mut self.open_gap {
            gap.to = gap.to.max(upto);
        }
    }

    /// Behind all segments.
    fn close(&mut self, found: &mut Survey) {
        if self.open_gap.is_none()
            && found.last < found.synced
            && !found.is_alien()
            && let Some(segment) = found.segments.last_mut()
        {
            segment.touched = true;
            let (file, at, due) = (segment.file.clone(), segment.len, found.last.next());
            self.lose(&file, at as usize, due, Fault::Short);
            self.lost_up_to(found.synced);
        }
        if let Some(gap) = self.open_gap.take() {
            found.troubles.push(Trouble::Lost(gap));
        }
    }
}

/// A fault at byte `at`, where the record `due` should be; bytes from `end` on are zero.
struct Tail {
    at: usize,
    end: usize,
    due: Seq,
    why: Fault,
    limit: Option<Seq>,
}
