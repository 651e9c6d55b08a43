//! How much room a served volume has: what its disk has left for clients, and what its files take.
//!
//! Aside stay what the next records of the journal take (all of its next segment, as this one
//! fills), and a margin for the index, the tables and contents that are being put in place. What the
//! files take is counted only where somebody wants to know, which is for a quota: by a walk first, on
//! another thread while the volume is served, then by what each record changes (apply.rs).

use std::collections::{BTreeSet, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::room::{Book, Line, Pair};
use super::settings::Quota;
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

    /// Bytes and files that the volume's files take; zero while that is not known.
    pub fn usage(&self) -> Pair {
        match &self.usage {
            Usage::Known(pair) => *pair,
            _ => (0, 0),
        }
    }
    /// Whether a job counts.
    pub fn is_counting(&self) -> bool {
        matches!(self.usage, Usage::Counting(_))
    }
    /// From now on it is to be known what the files take, or not any more. `Some`: a job for another
    /// thread, whose end [`Volume::counted`] is to be told.
    ///
    /// # Errors
    /// The tree cannot be read.
    pub fn count_usage(&mut self, wanted: bool) -> Result<Option<CountJob>> {
        match (wanted, &self.usage) {
            (false, Usage::Known(_)) => self.usage = Usage::Unwanted,
            (true, Usage::Unwanted) => {
                let root = fs::open(&**self.tree.root(), b".", fs::o::DIRECTORY, 0)?;
                self.usage = Usage::Counting(HashMap::new());
                return Ok(Some(CountJob { root }));
            }
            _ => {}
        }
        Ok(None)
    }
    /// The same at once, if the volume has a limit.
    ///
    /// # Errors
    /// A directory that cannot be read.
    pub fn count_for_limit(&mut self) -> Result<()> {
        match self.count_usage(self.settings().quota != Quota::default())? {
            Some(job) => self.counted(job.run()),
            None => Ok(()),
        }
    }
    /// A job has come to its end.
    ///
    /// # Errors
    /// The job's; then it is not known.
    pub fn counted(&mut self, walked: Result<Counted>) -> Result<()> {
        let Usage::Counting(since) = std::mem::take(&mut self.usage) else { return Ok(()) };
        let mut files = walked?.0;
        for (ino, now) in since {
            match now {
                Some(len) => _ = files.insert(ino, len),
                None => _ = files.remove(&ino),
            }
        }
        self.usage = Usage::Known((files.values().sum(), files.len() as u64));
        Ok(())
    }
    /// What the objects that a record touches take now, by inode; nothing while nobody wants to know.
    pub(super) fn weigh(&self, op: &Op) -> Vec<(u64, u64)> {
        if matches!(self.usage, Usage::Unwanted) {
            return Vec::new();
        }
        let touched: BTreeSet<Fid> = op.touched().filter(|fid| *fid != ROOT).collect();
        let stat = |fid: Fid| {
            let (dir, name): (_, Name) = self.tree.place(fid).ok()?;
            fs::stat(&*dir, name.as_bytes()).ok()
        };
        let found = touched.into_iter().filter_map(stat);
        found.map(|stat| (stat.ino, stat.blocks * 512)).collect()
    }
    /// They took `before`, and take `after`.
    pub(super) fn note_usage(&mut self, before: Vec<(u64, u64)>, after: Vec<(u64, u64)>) {
        let sum = |of: &[(u64, u64)]| (of.iter().map(|it| it.1).sum::<u64>(), of.len() as u64);
        match &mut self.usage {
            Usage::Unwanted => {}
            Usage::Counting(since) => {
                since.extend(before.into_iter().map(|(ino, _)| (ino, None)));
                since.extend(after.into_iter().map(|(ino, len)| (ino, Some(len))));
            }
            Usage::Known(usage) => {
                let (before, after) = (sum(&before), sum(&after));
                usage.0 = (usage.0 + after.0).saturating_sub(before.0);
                usage.1 = (usage.1 + after.1).saturating_sub(before.1);
            }
        }
    }
}

/// What a volume's files take, as far as somebody wants to know.
#[derive(Default)]
pub(super) enum Usage {
    #[default]
    Unwanted,
    /// A job counts. By inode: what was changed since it began, and what it takes now, if it is there.
    Counting(HashMap<u64, Option<u64>>),
    Known(Pair),
}

/// A count of a volume's files, for another thread to carry out. Memory: some 40 bytes a file.
pub struct CountJob {
    root: OwnedFd,
}

/// Bytes that each file takes, by inode.
pub struct Counted(HashMap<u64, u64>);

impl CountJob {
    /// Walks the tree, with one directory open a level.
    ///
    /// # Errors
    /// A directory that cannot be read.
    pub fn run(self) -> Result<Counted> {
        let mut files = HashMap::new();
        let mut steps: Vec<(Arc<OwnedFd>, Option<Vec<u8>>)> = vec![(Arc::new(self.root), None)];
        while let Some((parent, name)) = steps.pop() {
            let is_root = name.is_none();
            let dir = match name {
                None => parent,
                Some(name) => {
                    let flags = fs::o::DIRECTORY | fs::o::NOFOLLOW;
                    match fs::open(&*parent, &name, flags, 0) {
                        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                        opened => Arc::new(opened?),
                    }
                }
            };
            for entry in fs::read_dir(&*dir)? {
                if is_root && is_own(&entry.name) {
                    continue;
                }
                let stat = match fs::stat(&*dir, &entry.name) {
                    Err(Errno::NOENT) => continue,
                    stat => stat?,
                };
                files.insert(stat.ino, stat.blocks * 512);
                if stat.kind() == Kind::Dir {
                    steps.push((dir.clone(), Some(entry.name)));
                }
            }
        }
        Ok(Counted(files))
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
