//! How much room a served volume has: what its disk has left for clients, and what its files take.
//!
//! Aside stay what the next records of the journal take (all of its next segment, as this one
//! fills), and a margin for the index, the tables and contents that are being put in place. What the
//! files take is counted only where somebody wants to know, which is for a quota: by a walk first,
//! then by what each record changes (apply.rs).

use std::collections::BTreeSet;

use super::room::{Book, Line, Pair};
use super::tree::is_own;
use super::volume::{Result, Volume};
use crate::kml::record::{Fid, Name, Op, ROOT};
use crate::sys::Errno;
use crate::sys::fs::{self, Kind};

/// Kept aside on every disk, bytes, and of a larger one this part.
const MARGIN_LEN: u64 = 2 << 20;
const MARGIN_PART: u64 = 512;
/// Files for imz's own use: spool, segments, tables, conflicts.
const MARGIN_FILES: u64 = 16;
/// A file system that counts no files has no end of them.
const FILES_ENDLESS: u64 = 1 << 40;

impl Volume {
    /// The number of the file system that it is on.
    pub fn disk(&self) -> u64 {
        self.disk
    }
    /// Bytes and files on the disk that clients may take, whoever they are.
    ///
    /// # Errors
    /// As statvfs(2).
    pub fn free_room(&self) -> Result<Pair> {
        let space = self.space()?;
        let block_len = u64::from(space.block_len);
        let left = block_len.saturating_mul(space.blocks_available);
        let all = block_len.saturating_mul(space.blocks);
        let aside = MARGIN_LEN + all / MARGIN_PART + self.log.filled();
        let files = match space.files {
            0 => FILES_ENDLESS,
            _ => space.files_free.saturating_sub(MARGIN_FILES),
        };
        Ok((left.saturating_sub(aside), files))
    }
    /// What clients were granted in the life before.
    pub fn book(&self) -> Option<Book> {
        self.book.read()
    }
    /// Durable on return: yes.
    ///
    /// # Errors
    /// As write(2).
    pub fn keep_book(&self, epoch_next: u64, nodes: Vec<Line>) -> std::io::Result<()> {
        self.book.keep(epoch_next, nodes)
    }

    /// Bytes and files that the volume's files take; zero while nobody wants to know.
    pub fn usage(&self) -> Pair {
        self.usage.unwrap_or_default()
    }
    /// From now on what the files take is known, or not any more. Walks the tree, the first time.
    ///
    /// # Errors
    /// A directory that cannot be read.
    pub fn count_usage(&mut self, wanted: bool) -> Result<()> {
        self.usage = match (wanted, self.usage) {
            (false, _) => None,
            (true, Some(known)) => Some(known),
            (true, None) => Some(self.walk_usage()?),
        };
        Ok(())
    }
    fn walk_usage(&self) -> Result<Pair> {
        let (mut sum, mut linked) = ((0, 0), BTreeSet::new());
        let mut dirs = vec![fs::open(&**self.tree.root(), b".", fs::o::DIRECTORY, 0)?];
        let mut is_root = true;
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(&dir)? {
                if is_root && is_own(&entry.name) {
                    continue;
                }
                let stat = match fs::stat(&dir, &entry.name) {
                    Ok(stat) => stat,
                    Err(Errno::NOENT) => continue,
                    Err(e) => return Err(e.into()),
                };
                let is_dir = stat.kind() == Kind::Dir;
                if !is_dir && stat.nlink > 1 && !linked.insert(stat.ino) {
                    continue;
                }
                sum = (sum.0 + stat.blocks * 512, sum.1 + 1);
                if is_dir {
                    let flags = fs::o::DIRECTORY | fs::o::NOFOLLOW;
                    dirs.push(fs::open(&dir, &entry.name, flags, 0)?);
                }
            }
            is_root = false;
        }
        Ok(sum)
    }
    /// What the objects that a record touches take now; nothing while nobody wants to know.
    pub(super) fn weigh(&self, op: &Op) -> Pair {
        if self.usage.is_none() {
            return (0, 0);
        }
        let touched: BTreeSet<Fid> = op.touched().filter(|fid| *fid != ROOT).collect();
        let stat = |fid: Fid| {
            let (dir, name): (_, Name) = self.tree.place(fid).ok()?;
            fs::stat(&*dir, name.as_bytes()).ok()
        };
        let found = touched.into_iter().filter_map(stat);
        found.fold((0, 0), |sum, stat| (sum.0 + stat.blocks * 512, sum.1 + 1))
    }
    /// They took `before`, and take `after`.
    pub(super) fn note_usage(&mut self, before: Pair, after: Pair) {
        if let Some(usage) = &mut self.usage {
            usage.0 = (usage.0 + after.0).saturating_sub(before.0);
            usage.1 = (usage.1 + after.1).saturating_sub(before.1);
        }
    }
}

/// How long a segment of the journal is on a disk of this size, bytes: a small part of it.
pub(super) fn segment_len(disk_len: u64) -> usize {
    let most = crate::kml::log::SEGMENT_LEN as u64;
    let small = most.min(1 << 20); // tests may have shorter ones
    let part = (disk_len / 128).clamp(small, most);
    (part - part % small) as usize
}

/// How much history is kept on a disk of this size, bytes.
pub(super) fn history_len(disk_len: u64, most: u64) -> u64 {
    (disk_len / 32).clamp(4 << 20, most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kml::log::{SEGMENT_LEN, SEGMENT_LEN_MIN};

    #[test]
    fn the_journal_takes_a_small_part_of_a_small_disk() {
        for (mib, want) in [(10, 1), (200, 1), (512, 4), (2048, 8), (1 << 30, 8)] {
            let len = segment_len(mib << 20);
            assert_eq!(len as u64, want << 20, "{mib}");
            assert!((SEGMENT_LEN_MIN..=SEGMENT_LEN).contains(&len));
        }
        assert_eq!(history_len(200 << 20, 1 << 30), 6553600);
        assert_eq!(history_len(1 << 50, 1 << 30), 1 << 30);
    }
}
