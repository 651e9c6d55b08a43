//! The spool: contents on their way into the tree, each in a file of its own.
//!
//! It lies in the served directory's own `.imz`, on the file system of the tree, so that a content
//! that is complete takes its place by a rename. Emptied at open: what a client had sent and was
//! not told to be kept, it sends again. Its lock keeps a second server away from the tree.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use super::state::StateError;
use crate::kml::record::Seq;
use crate::sys::{self, Errno, crash, fs};

/// A directory of contents.
pub struct Spool {
    fd: OwnedFd,
    _lock: File,
}

impl Spool {
    /// Makes the directory if there is none, takes its lock, and empties it.
    ///
    /// # Errors
    /// `InUse` when another server has it.
    pub fn open(dir: &Path) -> Result<Spool, StateError> {
        let io = |source| StateError::Io { path: dir.to_owned(), source };
        std::fs::create_dir_all(dir).map_err(io)?;
        let mut options = File::options();
        let options = options.create(true).truncate(false).write(true);
        let lock = options.open(dir.join("lock")).map_err(io)?;
        if !sys::fs::try_lock(&lock).map_err(|e| io(e.into()))? {
            return Err(StateError::InUse { path: dir.to_owned() });
        }
        let fd = fs::open_root(dir).map_err(|e| io(e.into()))?;
        for entry in fs::read_dir(&fd).map_err(|e| io(e.into()))? {
            if entry.name != b"lock" {
                fs::unlink(&fd, &entry.name).map_err(|e| io(e.into()))?;
            }
        }
        Ok(Spool { fd, _lock: lock })
    }
    /// The file name of a store's content.
    pub fn name(node: u32, seq: Seq) -> Vec<u8> {
        format!("{node}-{}", seq.0).into_bytes()
    }
    /// Keeps a piece; holes stay holes.
    ///
    /// # Errors
    /// As open(2) and write(2).
    pub fn put(&self, node: u32, seq: Seq, at: u64, bytes: &[u8]) -> Result<(), Errno> {
        let flags = fs::o::CREAT | fs::o::WRONLY;
        let file = fs::open(&self.fd, &Spool::name(node, seq), flags, 0o600)?;
        let end = at + bytes.len() as u64;
        if fs::fstat(&file)?.size < end {
            fs::truncate(&file, end)?;
        }
        fs::pwrite_sparse(&file, bytes, at)?;
        crash::point("spool-kept");
        Ok(())
    }
    /// The content so far; an empty one if nothing was kept.
    ///
    /// # Errors
    /// As open(2).
    pub fn get(&self, node: u32, seq: Seq) -> Result<OwnedFd, Errno> {
        fs::open(&self.fd, &Spool::name(node, seq), fs::o::CREAT | fs::o::RDWR, 0o600)
    }
    /// Forgets a content; there may be none.
    pub fn remove(&self, node: u32, seq: Seq) {
        match fs::unlink(&self.fd, &Spool::name(node, seq)) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => log::warn!("spool: {node}-{}: {e}", seq.0),
        }
    }
}

impl AsFd for Spool {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
