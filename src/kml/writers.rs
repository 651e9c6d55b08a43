//! Which files are open for writing: a small mapped table that outlives the process.
//!
//! A store is journaled when the last writer closes, so a process that dies with writers open
//! leaves changed files that no record names. This table names them. It is never synced: after a
//! power cut the tree is compared with what imz knew anyway.
//!
//! ```text
//!   at  len  field
//!    0    8  magic    "imz-wri\n"
//!    8    8  version  1
//!   16    8  slots    65,536 fids; 0: free
//! ```
//!
//! Invariant: a slot holds a fid from before `take` returns until `release`. The same fid may be in
//! several slots.

use std::fs::OpenOptions;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

use crate::kml::codec::{Fault, WRITERS_HEADER, WRITERS_MAX};
use crate::kml::log::LogError;
use crate::kml::map::Map;
use crate::kml::record::{Fid, Seq};
use crate::kml::store::replace;

const HEADER_WORDS: usize = WRITERS_HEADER.len();
const LEN: usize = (HEADER_WORDS + WRITERS_MAX) * 8;

/// A place in the table. Give it back with [`Writers::release`].
#[derive(PartialEq, Eq, Hash, Debug)]
pub struct Slot(usize);

/// The table of one journal's directory. `Send + Sync`.
pub struct Writers {
    map: Map,
    free: Mutex<Vec<usize>>,
}

impl Writers {
    /// Opens or makes the table `writers` in `dir`, whose lock the caller has (an open `Log`).
    ///
    /// # Errors
    /// [`LogError::Io`], and [`LogError::Corrupt`] for a file that is no such table.
    pub fn open(dir: &Path) -> Result<Writers, LogError> {
        let path = dir.join("writers");
        let io = |what| {
            let path = path.clone();
            move |source| LogError::Io { what, path, source }
        };
        if !path.try_exists().map_err(io("look for"))? {
            let header: Vec<u8> =
                WRITERS_HEADER.iter().flat_map(|word| word.to_le_bytes()).collect();
            replace(&path, LEN as u64, &header).map_err(io("make"))?;
        }
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(io("open"))?;
        if file.metadata().map_err(io("look at"))?.len() != LEN as u64 {
            return Err(LogError::Corrupt { file: path, at: 0, seq: Seq(0), why: Fault::Short });
        }
        let map = Map::new(&file, LEN).map_err(io("map"))?;
        let word = |nth: usize| u64::from_le(map.long_words()[nth].load(Ordering::Relaxed));
        if word(0) != WRITERS_HEADER[0] {
            return Err(LogError::Corrupt { file: path, at: 0, seq: Seq(0), why: Fault::Magic });
        }
        if word(1) != WRITERS_HEADER[1] {
            let why = Fault::Version(word(1) as u32);
            return Err(LogError::Corrupt { file: path, at: 8, seq: Seq(0), why });
        }
        let free = (0..WRITERS_MAX).rev().filter(|slot| word(HEADER_WORDS + slot) == 0).collect();
        Ok(Writers { map, free: Mutex::new(free) })
    }

    /// Notes that `fid` is about to be written. `None`: the table is full. Survives the death of
    /// the process, not a power cut.
    pub fn take(&self, fid: Fid) -> Option<Slot> {
        let slot = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
        self.set(slot, fid.0);
        Some(Slot(slot))
    }

    /// Notes that this writer is gone, its change journaled.
    pub fn release(&self, slot: Slot) {
        self.set(slot.0, 0);
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(slot.0);
    }

    /// The files in the table, each once: right after opening, what the last life left.
    pub fn listed(&self) -> Vec<Fid> {
        let slots = &self.map.long_words()[HEADER_WORDS..];
        let fids = slots.iter().map(|slot| Fid(u64::from_le(slot.load(Ordering::Acquire))));
        let mut listed: Vec<Fid> = fids.filter(|fid| fid.0 != 0).collect();
        listed.sort_unstable();
        listed.dedup();
        listed
    }

    /// Forgets all that the last life left: for a caller that dealt with it, before any `take`.
    pub fn clear(&self) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        (0..WRITERS_MAX).for_each(|slot| self.set(slot, 0));
        *free = (0..WRITERS_MAX).rev().collect();
    }

    fn set(&self, slot: usize, fid: u64) {
        self.map.long_words()[HEADER_WORDS + slot].store(fid.to_le(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_life_reads_what_this_one_left() {
        let dir = tempfile::tempdir().unwrap();
        let writers = Writers::open(dir.path()).unwrap();
        assert!(writers.listed().is_empty());
        let a = writers.take(Fid(7)).unwrap();
        let b = writers.take(Fid(9)).unwrap();
        let again = writers.take(Fid(7)).unwrap();
        assert_ne!(a, again);
        writers.release(a);
        writers.release(b);
        drop(writers);
        let next = Writers::open(dir.path()).unwrap();
        assert_eq!(next.listed(), [Fid(7)]);
        // a slot that is still listed is not given out
        let slots: Vec<Slot> = std::iter::from_fn(|| next.take(Fid(1))).collect();
        assert_eq!(slots.len(), WRITERS_MAX - 1);
        assert_eq!(next.listed(), [Fid(1), Fid(7)]);
        next.clear();
        assert!(next.listed().is_empty());
    }

    #[test]
    fn another_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("writers"), vec![1; LEN]).unwrap();
        assert!(matches!(
            Writers::open(dir.path()),
            Err(LogError::Corrupt { why: Fault::Magic, .. })
        ));
        std::fs::write(dir.path().join("writers"), b"short").unwrap();
        assert!(matches!(
            Writers::open(dir.path()),
            Err(LogError::Corrupt { why: Fault::Short, .. })
        ));
    }
}
