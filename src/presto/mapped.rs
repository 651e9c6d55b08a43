//! Files that somebody still has mapped for writing although every handle is closed.
//!
//! With passthrough a mapping holds the backing file, not ours. So the kernel tells of the last
//! close, and nobody of what is written through the mapping after it. The last close of a writer
//! therefore asks for a lease that the kernel refuses while somebody can write to the file; who is
//! refused is watched until the lease is granted. A change shows by size and time, since the first
//! write to a page that is clean sets the time: the data are synced before each look, so that all
//! pages are clean again.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Mutex;

use super::filter::{Filter, Result};
use super::open::held;
use crate::kml::record::Fid;
use crate::kml::writers::Slot;
use crate::replica::cache::Seen;
use crate::sys::file::has_writer;
use crate::sys::fs::{self, Stat, o};

fn seen(stat: &Stat) -> Seen {
    (stat.size, stat.mtime)
}

struct Watched {
    /// after a kill it is stored anew
    slot: Option<Slot>,
}

/// The files that are watched.
#[derive(Default)]
pub struct Mapped {
    all: Mutex<HashMap<Fid, Watched>>,
    /// held while they are looked at, so that a look begins after the one before has ended
    looking: Mutex<()>,
}

impl Filter {
    /// Watches a file, whose last handle was closed just now, if somebody can still write to it.
    pub fn watch_if_mapped(&self, fid: Fid) {
        let Ok(fd) = self.cache.tree.open_object(fid, o::RDONLY) else { return };
        let Ok(stat) = fs::fstat(&fd) else { return };
        if has_writer(fd.as_fd()) {
            let slot = self.writers.take(fid);
            self.cache.watch(fid, seen(&stat));
            self.watch(fid, Watched { slot });
        }
    }

    fn watch(&self, fid: Fid, watched: Watched) {
        let before = held(&self.mapped.all).insert(fid, watched);
        self.unwatch(before);
    }

    fn unwatch(&self, watched: Option<Watched>) {
        if let Some(slot) = watched.and_then(|watched| watched.slot) {
            self.writers.release(slot);
        }
    }

    /// Journals what was written through mappings since the last look.
    pub fn look_at_mapped(&self) {
        let _looking = held(&self.mapped.looking);
        // Not under the lock: a close must not wait for the disk.
        let fids: Vec<Fid> = held(&self.mapped.all).keys().copied().collect();
        for fid in fids {
            let Some(watched) = held(&self.mapped.all).remove(&fid) else { continue };
            let mapped = self.look(fid).unwrap_or_else(|e| {
                log::warn!("{fid}: what was written by a mapping is not journaled yet: {e:?}");
                true
            });
            match mapped {
                true => self.watch(fid, watched),
                false => {
                    self.cache.end_watching(fid);
                    self.unwatch(Some(watched));
                }
            }
        }
    }

    /// Whether it is still to be watched.
    fn look(&self, fid: Fid) -> Result<bool> {
        if self.files.get(fid).is_some() {
            return Ok(true); // who has it open sees to it
        }
        let Ok(fd) = self.cache.tree.open_object(fid, o::RDONLY) else { return Ok(false) };
        let mapped = has_writer(fd.as_fd());
        if self
            .cache
            .seen(fid)
            .is_some_and(|before| fs::fstat(&fd).is_ok_and(|s| seen(&s) != before))
        {
            fs::fdatasync(&fd)?;
            self.store_anew(fid, fd)?;
        }
        Ok(mapped)
    }
}
