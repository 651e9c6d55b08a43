//! What is known of a journal before it is replayed: one reading of all of it.

use std::collections::HashMap;

use crate::kml::codec::{Entry, Outcome};
use crate::kml::dump::Bound;
use crate::kml::record::{Fid, Op, Over, Seq, Time};
use crate::replica::lives::Lives;
use crate::replica::ops::time_of_ns;

/// What is to be replayed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Part {
    /// records before this one are passed over
    pub from: Seq,
    /// the last one; a time ends before the first record that is later
    pub until: Option<Bound>,
    /// backwards
    pub undo: bool,
}

#[derive(Default, Debug)]
pub struct Survey {
    /// records of the part
    pub count: u64,
    /// newest record of the part; 0 for none
    pub until: Seq,
    /// newest record of the journal
    pub last: Seq,
    /// it is a volume's: records have an origin, and stamps by `lives`
    pub is_history: bool,
    pub lives: Lives,
    /// the first change of each file's contents that is not to be seen in the end
    pub beyond: HashMap<Fid, Seq>,
    /// undoing: the last one that is
    pub before: HashMap<Fid, Seq>,
    /// the last record that took a name of the object away
    pub gone: HashMap<Fid, Seq>,
    /// where an object that the journal did not make was first named
    pub paths: HashMap<Fid, Vec<u8>>,
    /// before the part: when the object was last changed
    pub times: HashMap<Fid, Time>,
    ended: bool,
}

impl Survey {
    /// Takes in the next record.
    pub fn add(&mut self, part: &Part, is_plain: bool, entry: &Entry) {
        let (seq, record) = (entry.seq, &entry.record);
        self.last = seq;
        self.is_history |= record.origin.seq.0 != 0;
        self.ended |= match part.until {
            Some(Bound::Seq(until)) => seq > until,
            Some(Bound::TimeNs(until)) => record.time_ns > until,
            None => false,
        };
        if !self.ended && seq >= part.from {
            self.count += 1;
            self.until = seq;
        }
        if entry.outcome != Outcome::Done {
            return;
        }
        let op = &record.op;
        match op {
            Op::Unlink { gone, .. } | Op::Rmdir { gone, .. } => {
                self.gone.insert(gone.fid, seq);
            }
            Op::Rename { over: Over::Replaced(gone), .. } => {
                self.gone.insert(gone.fid, seq);
            }
            _ => {}
        }
        if let Some(fid) = contents_changed(op) {
            if self.ended || part.undo && seq >= part.from {
                self.beyond.entry(fid).or_insert(seq);
            } else if part.undo {
                self.before.insert(fid, seq);
            }
        }
        if is_plain {
            self.note_paths(op, &record.path);
        }
        if part.undo && seq < part.from {
            self.note_times(op, record.time_ns);
        }
    }

    fn note_paths(&mut self, op: &Op, path: &[u8]) {
        if let [Some(at), None] = op.places()
            && let Some(cut) = path.iter().rposition(|byte| *byte == b'/')
        {
            self.paths.entry(at.dir).or_insert_with(|| path[..cut].to_vec());
        }
        if let Some(fid) = op.fid() {
            self.paths.entry(fid).or_insert_with(|| path.to_vec());
        }
    }

    fn note_times(&mut self, op: &Op, time_ns: u64) {
        let when = time_of_ns(time_ns);
        for place in op.places().into_iter().flatten() {
            self.times.insert(place.dir, when);
        }
        let own = match op {
            Op::Create { .. } | Op::Mkdir { .. } | Op::Symlink { .. } | Op::Mknod { .. } => {
                Some(when)
            }
            Op::Store { mtime, .. } => Some(*mtime),
            Op::Setattr { new, .. } => new.mtime,
            _ => None,
        };
        if let (Some(fid), Some(time)) = (op.fid(), own) {
            self.times.insert(fid, time);
        }
    }
}

/// The file whose contents a record changes.
pub fn contents_changed(op: &Op) -> Option<Fid> {
    match op {
        Op::Store { fid, .. } => Some(*fid),
        Op::Setattr { fid, new, .. } if new.size.is_some() => Some(*fid),
        _ => None,
    }
}
