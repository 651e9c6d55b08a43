//! What need not be shipped: a pure function from records to fewer records with the same end.
//!
//! ```text
//!   store, store                      -> the last, with the ranges of both
//!   setattr size, store               -> the store, with the range that the truncation zeroed
//!   setattr, setattr                  -> per attribute, the last
//!   setxattr or removexattr, again    -> the last; set and removed again: neither
//!   changes of what is removed later  -> the removal
//!   link, unlink                      -> neither
//!   create .. unlink, rmdir, replaced -> nothing at all, with every record of the object
//!   rename a b, rename b c            -> rename a c (a and b in one directory)
//!   create a, rename a b              -> create b (in one directory)
//! ```
//!
//! The promise: replaying what survives ends in the same tree as replaying everything, contents,
//! attributes, times, links and directories' mtimes. Where the record that gave a directory its
//! mtime was cancelled, a setattr of that mtime takes its place, unless a later record touches the
//! directory anyway. Whoever authorises it must grant it to whoever may change the directory.
//!
//! The rules that keep it true: a surviving record keeps its seq and its time, and touches no
//! directory that it did not touch before. The bytes of a store are those that the file has when it
//! is shipped, not those it had. Each record is authorised at the server, so what gives a right is
//! not cancelled while a record in between may need it: modes and owners only fold when
//! neighbours, ACLs and security attributes never. A rename puts stores in order (write, then
//! rename into place), so stores do not fold across one.
//!
//! The caller passes only records that nobody has seen yet; what is in flight is frozen. No I/O.
//!
//! Source: Coda's log optimisations, with its cascades; rename folding on top.

use std::collections::{HashMap, HashSet};

use crate::kml::record::{
    Change, Fid, Name, Op, Over, PATH_LEN_MAX, Place, RANGES_MAX, Range, Record, Seq, Stamp, Time,
};

/// Passes over the records; each pass may make room for the next one's cascades.
const PASSES_MAX: usize = 8;

/// What must still be shipped, in order. `records` are in order of their seqs.
pub fn optimise(records: &[(Seq, Record)]) -> Vec<(Seq, Record)> {
    let mut work = Work {
        records: records
            .iter()
            .map(|(_, record)| (record.op != Op::Noop).then(|| record.clone()))
            .collect(),
        by_fid: HashMap::new(),
        by_slot: HashMap::new(),
        changed: false,
    };
    for _ in 0..PASSES_MAX {
        work.changed = false;
        work.index();
        work.fold_changes();
        work.index();
        work.cancel_changes_of_removed();
        work.index();
        work.cancel_created_and_removed();
        work.index();
        work.fold_names();
        if !work.changed {
            break;
        }
    }
    if !work.keep_mtimes(records) {
        // cannot be (see there); shipping everything is always right
        return records.to_vec();
    }
    let seqs = records.iter().map(|(seq, _)| *seq);
    seqs.zip(work.records).filter_map(|(seq, record)| Some((seq, record?))).collect()
}

struct Work {
    /// `None`: cancelled
    records: Vec<Option<Record>>,
    /// records that touch an object, in order
    by_fid: HashMap<Fid, Vec<usize>>,
    /// records that name a place, in order
    by_slot: HashMap<(Fid, Name), Vec<usize>>,
    changed: bool,
}

fn slot(place: &Place) -> (Fid, Name) {
    (place.dir, place.name.clone())
}

/// A change of an object's own state, and of nothing else.
fn is_change(op: &Op) -> bool {
    matches!(
        op,
        Op::Setattr { .. } | Op::Setxattr { .. } | Op::Removexattr { .. } | Op::Store { .. }
    )
}

fn is_creation(op: &Op) -> bool {
    matches!(op, Op::Create { .. } | Op::Mkdir { .. } | Op::Symlink { .. } | Op::Mknod { .. })
}

fn is_dir_of(op: &Op, fid: Fid) -> bool {
    op.places().into_iter().flatten().any(|place| place.dir == fid)
}

/// Whether the operation takes a name from `fid`, and its last name by what the record says.
fn takes_name(op: &Op, fid: Fid) -> Option<bool> {
    match op {
        Op::Unlink { gone, .. } if gone.fid == fid => Some(gone.attr.nlink <= 1),
        Op::Rmdir { gone, .. } if gone.fid == fid => Some(true),
        Op::Rename { over: Over::Replaced(gone), .. } if gone.fid == fid => {
            Some(gone.attr.nlink <= 1 || gone_dir(op).is_some())
        }
        _ => None,
    }
}

/// The directory that the operation removes.
fn gone_dir(op: &Op) -> Option<Fid> {
    match op {
        Op::Rmdir { gone, .. } => Some(gone.fid),
        Op::Rename { over: Over::Replaced(gone), .. }
            if gone.attr.mode & 0o170_000 == 0o040_000 =>
        {
            Some(gone.fid)
        }
        _ => None,
    }
}

impl Work {
    fn op(&self, nth: usize) -> &Op {
        self.records[nth].as_ref().map_or(&Op::Noop, |record| &record.op)
    }
    fn cancel(&mut self, nth: usize) {
        self.changed |= self.records[nth].take().is_some();
    }
    fn set_op(&mut self, nth: usize, op: Op) {
        if let Some(record) = &mut self.records[nth] {
            record.op = op;
            self.changed = true;
        }
    }
    fn index(&mut self) {
        self.by_fid.clear();
        self.by_slot.clear();
        for (nth, record) in self.records.iter().enumerate() {
            let Some(record) = record else { continue };
            let mut touched: Vec<Fid> = record.op.touched().collect();
            touched.sort_unstable();
            touched.dedup();
            for fid in touched {
                self.by_fid.entry(fid).or_default().push(nth);
            }
            for place in record.op.places().into_iter().flatten() {
                let named = self.by_slot.entry(slot(place)).or_default();
                if named.last() != Some(&nth) {
                    named.push(nth);
                }
            }
        }
    }
    fn fids(&self) -> Vec<Fid> {
        let mut fids: Vec<Fid> = self.by_fid.keys().copied().collect();
        fids.sort_unstable();
        fids
    }
    fn touching(&self, fid: Fid) -> Vec<usize> {
        self.by_fid.get(&fid).cloned().unwrap_or_default()
    }

    // ---- changes of one object ----

    /// Later changes of an object void earlier ones.
    fn fold_changes(&mut self) {
        for fid in self.fids() {
            let touching = self.touching(fid);
            let is_file = touching.iter().any(|nth| {
                matches!(self.op(*nth), Op::Create { .. } | Op::Store { .. } | Op::Unlink { .. })
                    && self.op(*nth).fid() == Some(fid)
            });
            self.fold_times(fid, &touching);
            self.fold_xattrs(fid, &touching);
            for pair in touching.windows(2) {
                let (a, b) = (pair[0], pair[1]);
                self.fold_neighbours(a, b, is_file);
            }
            self.fold_data(fid, &touching);
        }
    }

    /// Times that a later record sets again, whatever is in between.
    fn fold_times(&mut self, fid: Fid, touching: &[usize]) {
        // the later record that sets it
        let (mut atime_by, mut mtime_by) = (None, None);
        for nth in touching.iter().rev().copied() {
            match *self.op(nth) {
                Op::Setattr { fid: own, base, mut new, mut old } if own == fid => {
                    let before = new;
                    if let Some(later) = atime_by
                        && new.atime.take().is_some()
                    {
                        let replaced = old.atime.take();
                        self.edit_old(later, |old| old.atime = replaced);
                    } else if new.atime.is_some() {
                        atime_by = Some(nth);
                    }
                    if let Some(later) = mtime_by
                        && new.mtime.take().is_some()
                    {
                        let replaced = old.mtime.take();
                        self.edit_old(later, |old| old.mtime = replaced);
                    } else if new.mtime.is_some() {
                        mtime_by = Some(nth);
                    }
                    if new != before && new == Change::default() {
                        self.cancel(nth);
                    } else if new != before {
                        self.set_op(nth, Op::Setattr { fid, base, new, old });
                    }
                }
                Op::Store { .. } => mtime_by = Some(nth),
                ref op if is_dir_of(op, fid) => mtime_by = Some(nth),
                _ => {}
            }
        }
    }

    /// What a setattr replaced; other records do not say it.
    fn edit_old(&mut self, nth: usize, edit: impl FnOnce(&mut Change)) {
        if let Some(Record { op: Op::Setattr { old, .. }, .. }) = &mut self.records[nth] {
            edit(old);
        }
    }

    /// Two changes of attributes with no other record of the object in between: `b` swallows `a`'s
    /// mode, owner and size.
    fn fold_neighbours(&mut self, a: usize, b: usize, is_file: bool) {
        let (Some(first), Some(second)) = (&self.records[a], &self.records[b]) else { return };
        let Op::Setattr { fid, base, new, old } = first.op else { return };
        let Op::Setattr { fid: same, new: later, old: mut later_old, .. } = second.op else {
            return;
        };
        let same_caller = first.uid == second.uid && first.gid == second.gid;
        // a directory's mode and owner may be what let records elsewhere below it happen
        let lets_nothing = is_file || (a + 1..b).all(|nth| self.records[nth].is_none());
        if fid != same || !same_caller {
            return;
        }
        let (mut rest, mut rest_old) = (new, old);
        if lets_nothing {
            if later.mode.is_some() && rest.mode.take().is_some() {
                later_old.mode = rest_old.mode.take();
            }
            if later.uid.is_some() && rest.uid.take().is_some() {
                later_old.uid = rest_old.uid.take();
            }
            if later.gid.is_some() && rest.gid.take().is_some() {
                later_old.gid = rest_old.gid.take();
            }
        }
        // cutting twice is cutting once, cutting and growing is not growing
        if later.size.zip(rest.size).is_some_and(|(later, first)| later <= first) {
            rest.size = None;
            later_old.size = rest_old.size.take();
        }
        if rest == new {
            return;
        }
        self.set_op(b, Op::Setattr { fid, base, new: later, old: later_old });
        if rest == Change::default() {
            self.cancel(a);
        } else {
            self.set_op(a, Op::Setattr { fid, base, new: rest, old: rest_old });
        }
    }

    /// Stores, and truncations before them, become the last store.
    fn fold_data(&mut self, fid: Fid, touching: &[usize]) {
        let mut earlier: Vec<usize> = Vec::new();
        for nth in touching.iter().copied() {
            match self.op(nth).clone() {
                Op::Setattr { new, .. } if new.size.is_some() => earlier.push(nth),
                Op::Store { base, size, mtime, ranges, old_size, .. } => {
                    let mut all = Op::Store { fid, base, size, mtime, ranges, old_size };
                    for old in earlier.drain(..).rev() {
                        all = self.swallow(old, all);
                    }
                    if *self.op(nth) != all {
                        self.set_op(nth, all);
                    }
                    earlier.push(nth);
                }
                op if is_change(&op) => {}
                Op::Noop => {}
                // names change hands here: what was stored before must be there by now
                _ => earlier.clear(),
            }
        }
    }

    /// Adds to the later store what `nth` did to the same file's data, and cancels that.
    fn swallow(&mut self, nth: usize, later: Op) -> Op {
        let Op::Store { fid, base, size, mtime, ranges: mut all, old_size } = later else {
            return later;
        };
        match self.op(nth).clone() {
            Op::Store { base, ranges, old_size, size: its_size, .. } => {
                all.extend(ranges);
                // where it ended, a hole may have grown since
                all.push(Range { at: its_size, len: size.saturating_sub(its_size) });
                self.cancel(nth);
                let ranges = merged(all, size);
                Op::Store { fid, base, size, mtime, ranges, old_size }
            }
            Op::Setattr { base: its_base, mut new, mut old, .. } => {
                let cut = new.size.take().unwrap_or(size);
                let old_size = old.size.take().unwrap_or(old_size);
                all.push(Range { at: cut, len: size.saturating_sub(cut) });
                if new == Change::default() {
                    self.cancel(nth);
                } else {
                    self.set_op(nth, Op::Setattr { fid, base: its_base, new, old });
                }
                Op::Store { fid, base: its_base, size, mtime, ranges: merged(all, size), old_size }
            }
            _ => Op::Store { fid, base, size, mtime, ranges: all, old_size },
        }
    }

    fn fold_xattrs(&mut self, fid: Fid, touching: &[usize]) {
        let mut last: HashMap<Vec<u8>, usize> = HashMap::new();
        for nth in touching.iter().copied() {
            let (Op::Setxattr { name, .. } | Op::Removexattr { name, .. }) = self.op(nth) else {
                continue;
            };
            let name = name.clone();
            // others give or take rights
            if !name.starts_with(b"user.") && !name.starts_with(b"trusted.") {
                continue;
            }
            let Some(before) = last.insert(name.clone(), nth) else { continue };
            let (Op::Setxattr { base, old, .. } | Op::Removexattr { base, old, .. }) =
                self.op(before).clone()
            else {
                continue;
            };
            self.cancel(before);
            match (self.op(nth).clone(), old) {
                (Op::Removexattr { .. }, None) => {
                    self.cancel(nth);
                    last.remove(&name);
                }
                (Op::Removexattr { .. }, old) => {
                    self.set_op(nth, Op::Removexattr { fid, base, name, old });
                }
                (Op::Setxattr { value, .. }, old) => {
                    self.set_op(nth, Op::Setxattr { fid, base, name, value, old });
                }
                _ => {}
            }
        }
    }

    // ---- objects that go ----

    /// An object that loses its last name needs none of the changes made before.
    fn cancel_changes_of_removed(&mut self) {
        for fid in self.fids() {
            let touching = self.touching(fid);
            let takes = |nth: &&usize| takes_name(self.op(**nth), fid) == Some(true);
            let Some(removal) = touching.iter().rev().find(takes).copied() else { continue };
            let remover = self.records[removal].as_ref().map(|record| record.uid);
            let is_dir = touching.iter().any(|nth| is_dir_of(self.op(*nth), fid))
                || gone_dir(self.op(removal)) == Some(fid);
            for nth in touching.into_iter().filter(|nth| *nth < removal) {
                let Some(record) = &self.records[nth] else { continue };
                let void = match &record.op {
                    // rights in a directory let records below it happen; the owner's let it go
                    Op::Setattr { new, .. } => {
                        let owner = new.uid.is_some() || new.gid.is_some();
                        let right = owner || new.mode.is_some();
                        if is_dir { !right } else { !owner || Some(record.uid) == remover }
                    }
                    Op::Setxattr { name, .. } | Op::Removexattr { name, .. } => {
                        !is_dir || name.starts_with(b"user.")
                    }
                    Op::Store { .. } => true,
                    _ => false,
                };
                if void {
                    self.cancel(nth);
                }
            }
        }
    }

    /// An object that came and went, and that no surviving record needs, was never there.
    fn cancel_created_and_removed(&mut self) {
        for fid in self.fids() {
            let touching = self.touching(fid);
            if touching.is_empty() || !self.came_and_went(fid, &touching) {
                continue;
            }
            for nth in touching {
                match self.op(nth).clone() {
                    Op::Rename { from, to, fid: mover, base, over: Over::Replaced(gone) }
                        if gone.fid == fid =>
                    {
                        let over = Over::Nothing { noreplace: false };
                        self.set_op(nth, Op::Rename { from, to, fid: mover, base, over });
                    }
                    _ => self.cancel(nth),
                }
            }
        }
    }

    fn came_and_went(&self, fid: Fid, touching: &[usize]) -> bool {
        let mut names = 0;
        for (place, nth) in touching.iter().enumerate() {
            let op = self.op(*nth);
            if is_dir_of(op, fid) {
                return false;
            }
            let own = op.fid() == Some(fid);
            match op {
                _ if place == 0 && !(own && is_creation(op)) => return false,
                op if own && is_creation(op) => names += 1,
                Op::Link { .. } => names += 1,
                Op::Rename { over: Over::Nothing { .. }, .. } if own => {}
                op if takes_name(op, fid).is_some() => names -= 1,
                op if is_change(op) => {}
                _ => return false,
            }
        }
        names == 0
    }

    // ---- names ----

    fn fold_names(&mut self) {
        for b in 0..self.records.len() {
            match self.op(b).clone() {
                Op::Rename { from, to, fid, base, over } => {
                    self.fold_rename(b, &from, &to, (fid, base), over);
                }
                Op::Unlink { at, gone } => self.fold_link(b, &at, gone.fid),
                _ => {}
            }
        }
    }

    /// The record before `nth` that names this place, if all since then leave it alone.
    fn named_before(&self, place: &Place, nth: usize) -> Option<usize> {
        let named = self.by_slot.get(&slot(place))?;
        let before = named.partition_point(|other| *other < nth);
        named[..before].iter().rev().copied().find(|nth| self.records[*nth].is_some())
    }

    fn fold_link(&mut self, b: usize, at: &Place, fid: Fid) {
        let Some(a) = self.named_before(at, b) else { return };
        let is_link = matches!(self.op(a), Op::Link { fid: same, .. } if *same == fid);
        let between = |nth: &usize| *nth > a && *nth < b && self.records[*nth].is_some();
        if is_link && !self.touching(fid).iter().any(between) {
            self.cancel(a);
            self.cancel(b);
        }
    }

    /// `b` renames what `a` renamed or created before, in the same directory.
    fn fold_rename(
        &mut self,
        b: usize,
        from: &Place,
        to: &Place,
        (fid, base): (Fid, Stamp),
        over: Over,
    ) {
        if matches!(over, Over::Exchanged { .. }) {
            return;
        }
        let Some(a) = self.named_before(from, b) else { return };
        let identity = |first: &Place, over: &Over| {
            slot(first) == slot(to) && matches!(over, Over::Nothing { .. })
        };
        match self.op(a).clone() {
            // the name that `a` freed must have stayed free
            Op::Rename {
                from: first, to: same, fid: mover, over: Over::Nothing { .. }, ..
            } if mover == fid
                && slot(&same) == slot(from)
                && first.dir == from.dir
                && self.named_before(&first, b) == Some(a) =>
            {
                if identity(&first, &over) {
                    self.cancel(a);
                    self.cancel(b);
                    return;
                }
                self.set_op(b, Op::Rename { from: first.clone(), to: to.clone(), fid, base, over });
                self.renamed(&first, b);
                self.cancel(a);
            }
            // the new name must have been free all along
            op if is_creation(&op)
                && op.fid() == Some(fid)
                && op.places()[0].is_some_and(|at| slot(at) == slot(from))
                && from.dir == to.dir
                && matches!(over, Over::Nothing { .. })
                && self.named_before(to, b).is_none_or(|nth| nth < a) =>
            {
                let Some(record) = &mut self.records[a] else { return };
                record.path = sibling(&record.path, to.name.as_bytes());
                let at = Place { name: to.name.clone(), ..from.clone() };
                let moved = match op {
                    Op::Create { mode, umask, .. } => Op::Create { at, fid, mode, umask },
                    Op::Mkdir { mode, umask, .. } => Op::Mkdir { at, fid, mode, umask },
                    Op::Mknod { mode, umask, rdev, .. } => Op::Mknod { at, fid, mode, umask, rdev },
                    Op::Symlink { target, .. } => Op::Symlink { at, fid, target },
                    other => other,
                };
                self.set_op(a, moved);
                self.renamed(to, a);
                self.cancel(b);
            }
            _ => {}
        }
    }

    /// `nth` names this place now, too.
    fn renamed(&mut self, place: &Place, nth: usize) {
        let named = self.by_slot.entry(slot(place)).or_default();
        let at = named.partition_point(|other| *other < nth);
        named.insert(at, nth);
    }

    // ---- directories' mtimes ----

    /// Puts a setattr where the record that gave a directory its last mtime was cancelled.
    ///
    /// Its place is free: a record that survives still touches every directory it touched, and of
    /// the two directories of a cancelled rename, the later removal touches the second one.
    /// `false` if that should ever not be so.
    fn keep_mtimes(&mut self, original: &[(Seq, Record)]) -> bool {
        let before = mtimes(original.iter().map(|(_, record)| Some(record)));
        let after = mtimes(self.records.iter().map(Option::as_ref));
        let dirs = original.iter().flat_map(|(_, record)| record.op.places()).flatten();
        let mut dirs: HashSet<Fid> = dirs.map(|place| place.dir).collect();
        for (_, record) in original {
            if let Some(gone) = gone_dir(&record.op) {
                dirs.remove(&gone);
            }
        }
        for (dir, (nth, mtime)) in before {
            if !dirs.contains(&dir) || after.get(&dir).is_some_and(|(_, same)| *same == mtime) {
                continue;
            }
            if self.records[nth].is_some() {
                return false;
            }
            let record = &original[nth].1;
            let places = record.op.places();
            let Some(place) = places.into_iter().flatten().find(|place| place.dir == dir) else {
                return false;
            };
            let new = Change { mtime: Some(mtime), ..Change::default() };
            let op = Op::Setattr { fid: dir, base: place.base, new, old: Change::default() };
            let path = parent(&record.path).to_vec();
            self.records[nth] = Some(Record { path, op, ..record.clone() });
        }
        true
    }
}

/// The last record that sets each object's mtime, and to what, directories by their entries
/// included.
fn mtimes<'a>(records: impl Iterator<Item = Option<&'a Record>>) -> HashMap<Fid, (usize, Time)> {
    let mut mtimes = HashMap::new();
    for (nth, record) in records.enumerate() {
        let Some(record) = record else { continue };
        let now = Time {
            sec: (record.time_ns / 1_000_000_000) as i64,
            nsec: (record.time_ns % 1_000_000_000) as u32,
        };
        for place in record.op.places().into_iter().flatten() {
            mtimes.insert(place.dir, (nth, now));
        }
        if let Op::Setattr { fid, new: Change { mtime: Some(mtime), .. }, .. } = &record.op {
            mtimes.insert(*fid, (nth, *mtime));
        }
    }
    mtimes
}

/// Ranges in order and apart from each other, within the file, and no more than a record holds.
fn merged(mut ranges: Vec<Range>, size: u64) -> Vec<Range> {
    ranges.sort_unstable_by_key(|range| range.at);
    let mut merged: Vec<Range> = Vec::new();
    for range in ranges {
        let end = range.at.saturating_add(range.len).min(size);
        match merged.last_mut() {
            _ if end <= range.at => {}
            Some(last) if last.at + last.len >= range.at => {
                last.len = last.len.max(end - last.at);
            }
            _ => merged.push(Range { at: range.at, len: end - range.at }),
        }
    }
    match (merged.first(), merged.last()) {
        (Some(first), Some(last)) if merged.len() > RANGES_MAX => {
            vec![Range { at: first.at, len: last.at + last.len - first.at }]
        }
        _ => merged,
    }
}

fn parent(path: &[u8]) -> &[u8] {
    let end = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    &path[..end]
}

fn sibling(path: &[u8], name: &[u8]) -> Vec<u8> {
    let dir = parent(path);
    let mut path = dir.to_vec();
    if !dir.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path.split_off(path.len().saturating_sub(PATH_LEN_MAX))
}

#[cfg(test)]
mod tests;
