//! The table of open files: one entry an object, however often it is open.
//!
//! All handles of an object share one backing descriptor, and one way of moving data: either the
//! kernel reads and writes the backing file by itself (passthrough), or each request comes to the
//! daemon. The way is chosen when the first handle opens and stays until the last one closes,
//! since the kernel allows one way at a time. An entry outlives the object's last name.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::kml::record::{Fid, RANGES_MAX, Range};
use crate::kml::writers::Slot;
use crate::lento::grant::Charge;
use crate::lento::room::Room;
use crate::replica::cache::Written;
use crate::sys::fs::{self, Stat, o};

/// An object that is open.
pub struct Open {
    pub fid: Fid,
    pub fd: OwnedFd,
    /// the kernel moves the data by itself
    pub passthrough: bool,
    /// false where the backing file could be opened for reading only
    pub writable: bool,
    state: Mutex<OpenState>,
}

/// What changes while the object is open.
pub struct OpenState {
    handles: u32,
    writers: u32,
    /// of these, how many write past the daemon
    kernel_writers: u32,
    /// and how many may be mapped, with room for what a mapping may write
    mappers: u32,
    /// the kernel asks before it writes the next time (stop.rs)
    pub asks: bool,
    /// it never had a name, and may get one
    pub may_be_named: bool,
    /// room for what was written since the last store record
    pub charge: Option<Charge>,
    /// in the table of files that were open for writing when the process died
    pub slot: Option<Slot>,
    /// the file as the last store record had it
    pub stored: Mark,
    /// the data have changed since then, whatever the mark says
    pub changed: bool,
    /// room that it took then, in blocks of 512 bytes
    pub held_blocks: u64,
    /// what was written through the daemon since then; all of the file when `None`
    pub dirty: Option<Vec<Range>>,
}

impl OpenState {
    /// The room that is there for what was written.
    pub fn charge_room(&self) -> Room {
        self.charge.as_ref().map_or(Room::NONE, Charge::room)
    }
    pub fn keep_charge(&mut self, charge: Charge) {
        match &mut self.charge {
            Some(held) => held.join(charge),
            none => *none = Some(charge),
        }
    }
    /// Whether somebody writes past the daemon.
    pub fn by_kernel(&self) -> bool {
        self.kernel_writers > 0
    }
    /// One more writes past the daemon: from now on it is not known where.
    pub fn begin_by_kernel(&mut self) {
        self.kernel_writers += 1;
        self.dirty = None;
    }
    /// Whether it differs from what the last store record has; `stat` as it is now.
    fn is_unsaved(&self, stat: &Stat) -> bool {
        self.changed || self.stored != Mark::of(stat)
    }
    /// Whether a mapping may write to it, and room is kept for that.
    pub fn may_be_mapped(&self) -> bool {
        self.mappers > 0
    }
    /// One more may map it, with room for that.
    pub fn begin_mapping(&mut self) {
        self.mappers += 1;
    }
}

/// One handle that an application has open.
pub struct Grip {
    pub open: Arc<Open>,
    pub writer: bool,
    /// its data go past the daemon
    pub by_kernel: bool,
    /// room is kept for what a mapping of it may write
    pub maps: bool,
    /// no pages are kept for it, so that it cannot be mapped
    pub direct: bool,
}

/// By what a change of the data shows. Not by the ctime: our own notes on the object move it, and
/// so do its renames and links, at the server's word, too.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mark {
    pub size: u64,
    mtime: (i64, u32),
}

impl Mark {
    pub fn of(stat: &Stat) -> Mark {
        Mark { size: stat.size, mtime: stat.mtime }
    }
}

impl Open {
    pub fn state(&self) -> MutexGuard<'_, OpenState> {
        held(&self.state)
    }

    /// Whether what the kernel writes to it counts: it may be shipped. What has lost its last name is
    /// nobody's but its holders'.
    pub fn is_counted(&self) -> bool {
        let state = self.state();
        let has_name = || fs::fstat(&self.fd).is_ok_and(|stat| stat.nlink > 0);
        state.by_kernel() && (state.may_be_named || has_name())
    }

    /// Notes bytes that were written through the daemon, and the room that was taken for them.
    pub fn wrote(&self, at: u64, len: u64, charge: Option<Charge>) {
        let mut state = self.state();
        state.changed = true;
        charge.into_iter().for_each(|charge| state.keep_charge(charge));
        if let Some(ranges) = &mut state.dirty {
            add_range(ranges, Range { at, len });
        }
    }

    /// Takes note of a change of attributes alone: it is no change of the data, and hides none
    /// that was made before.
    pub fn attributes_changed(&self, before: &Stat, after: &Stat) {
        let mut state = self.state();
        state.changed |= state.stored != Mark::of(before);
        state.stored = Mark::of(after);
    }
}

impl Written for Open {
    fn is_unsaved(&self) -> bool {
        let state = self.state();
        fs::fstat(&self.fd).map_or(state.changed, |stat| state.is_unsaved(&stat))
    }
    fn is_by_kernel(&self) -> bool {
        self.passthrough
    }
    fn taken_over(&self) {
        if let Ok(stat) = fs::fstat(&self.fd) {
            self.state().stored = Mark::of(&stat);
        }
    }
}

/// Adds to a sorted list of ranges that neither touch nor overlap; a full list grows its last.
pub fn add_range(ranges: &mut Vec<Range>, new: Range) {
    let (mut at, mut end) = (new.at, new.at.saturating_add(new.len));
    ranges.retain(|r| {
        let apart = r.at > end || r.at + r.len < at;
        if !apart {
            at = at.min(r.at);
            end = end.max(r.at + r.len);
        }
        apart
    });
    let place = ranges.partition_point(|r| r.at < at);
    ranges.insert(place, Range { at, len: end - at });
    if ranges.len() > RANGES_MAX
        && let (Some(last), Some(before)) = (ranges.pop(), ranges.last_mut())
    {
        before.len = last.at + last.len - before.at;
    }
}

/// What the first handle of an object finds out about it.
pub struct Way {
    pub fd: OwnedFd,
    pub passthrough: bool,
    pub writable: bool,
    /// it was, or may be, written to where nobody sees it
    pub unseen: bool,
    pub mark: Mark,
    /// of 512 bytes
    pub blocks: u64,
}

#[derive(Default)]
pub struct OpenFiles(Mutex<HashMap<Fid, Arc<Open>>>);

impl OpenFiles {
    pub fn get(&self, fid: Fid) -> Option<Arc<Open>> {
        held(&self.0).get(&fid).cloned()
    }

    /// Opens one more handle; `way` is asked when it is the first.
    pub fn open<E>(
        &self,
        fid: Fid,
        writer: bool,
        way: impl FnOnce() -> Result<Way, E>,
    ) -> Result<Arc<Open>, E> {
        let mut all = held(&self.0);
        let open = match all.get(&fid) {
            Some(open) => open.clone(),
            None => {
                let way = way()?;
                let dirty = if way.unseen { None } else { Some(Vec::new()) };
                let (slot, stored, held_blocks) = (None, way.mark, way.blocks);
                let (handles, writers, changed) = (0, 0, false);
                let (kernel_writers, mappers, charge) = (0, 0, None);
                let (asks, may_be_named) = (false, false);
                let state = OpenState {
                    handles,
                    writers,
                    kernel_writers,
                    mappers,
                    asks,
                    may_be_named,
                    charge,
                    slot,
                    stored,
                    changed,
                    held_blocks,
                    dirty,
                };
                let open = Arc::new(Open {
                    fid,
                    fd: way.fd,
                    passthrough: way.passthrough,
                    writable: way.writable,
                    state: Mutex::new(state),
                });
                all.insert(fid, open.clone());
                open
            }
        };
        let mut state = open.state();
        state.handles += 1;
        state.writers += u32::from(writer);
        drop(state);
        Ok(open)
    }

    /// All that somebody may be writing to.
    pub fn written(&self) -> Vec<Arc<Open>> {
        held(&self.0).values().filter(|open| open.state().writers > 0).cloned().collect()
    }

    /// Closes one handle.
    pub fn close(&self, open: &Open, had: Had) -> Closed {
        let mut all = held(&self.0);
        let mut state = open.state();
        state.handles = state.handles.saturating_sub(1);
        state.writers = state.writers.saturating_sub(u32::from(had.writer));
        state.kernel_writers = state.kernel_writers.saturating_sub(u32::from(had.by_kernel));
        state.mappers = state.mappers.saturating_sub(u32::from(had.maps));
        let slot = if state.writers == 0 { state.slot.take() } else { None };
        // What nobody writes any more, and is stored, needs no room beyond its record's.
        if state.writers == 0 && fs::fstat(&open.fd).is_ok_and(|stat| !state.is_unsaved(&stat)) {
            state.charge = None;
        }
        let last = state.handles == 0;
        drop(state);
        if last {
            all.remove(&open.fid);
        }
        Closed { last, slot }
    }
}

/// What a handle that is closed was, as [`Grip`] says it.
#[derive(Clone, Copy, Default, Debug)]
pub struct Had {
    pub writer: bool,
    pub by_kernel: bool,
    pub maps: bool,
}

/// What the closing of a handle leaves to do.
pub struct Closed {
    pub last: bool,
    /// to be given back: nobody writes any more
    pub slot: Option<Slot>,
}

/// Opens the backing file for all handles to come: for writing where that is allowed.
pub fn open_backing(dir: impl std::os::fd::AsFd, name: &[u8]) -> fs::Result<(OwnedFd, bool)> {
    match fs::open(&dir, name, o::RDWR | o::NONBLOCK, 0) {
        Ok(fd) => Ok((fd, true)),
        Err(_) => Ok((fs::open(&dir, name, o::RDONLY | o::NONBLOCK, 0)?, false)),
    }
}

pub(super) fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_stay_sorted_and_apart() {
        let mut ranges = Vec::new();
        for (at, len) in [(10, 5), (30, 5), (20, 5), (15, 5), (0, 1)] {
            add_range(&mut ranges, Range { at, len });
        }
        let want = [(0, 1), (10, 15), (30, 5)].map(|(at, len)| Range { at, len });
        assert_eq!(ranges, want);
        add_range(&mut ranges, Range { at: 0, len: 100 });
        assert_eq!(ranges, [Range { at: 0, len: 100 }]);
    }

    #[test]
    fn too_many_ranges_are_merged_at_the_end() {
        let mut ranges = Vec::new();
        for i in 0..RANGES_MAX as u64 + 10 {
            add_range(&mut ranges, Range { at: i * 10, len: 1 });
        }
        assert_eq!(ranges.len(), RANGES_MAX);
        let last = ranges.last().unwrap();
        assert_eq!(last.at + last.len, (RANGES_MAX as u64 + 9) * 10 + 1, "all is covered");
    }
}
