//! A file mapped into memory as words: the only file that names memmap2.
//!
//! The mapping is shared with the kernel and with whoever reads the file, so no `&[u8]` into it is
//! ever made: it is seen as atomic words only, and there is nothing to race with. Other processes
//! must not shorten the file (its owner holds the journal's lock); its room was allocated before,
//! so that a full disk cannot turn a store into a SIGBUS. (On a copy-on-write file system that
//! promise is the file system's to keep.)
//!
//! Absent on purpose: read-only mappings. The dump reads with pread(2), so that a file which
//! shrinks under it is a short read and not a signal.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64};

use memmap2::{MmapOptions, MmapRaw};

/// A writable mapping of the whole of a file.
pub struct Map {
    raw: MmapRaw,
}

impl Map {
    /// Maps the first `len` bytes of `file`; the file must be that long.
    ///
    /// # Errors
    /// Those of fstat(2) and mmap(2); `UnexpectedEof` for a file that is shorter.
    pub fn new(file: &File, len: usize) -> io::Result<Map> {
        if file.metadata()?.len() < len as u64 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Map { raw: MmapOptions::new().len(len).map_raw(file)? })
    }
    /// The mapping as words of 4 bytes, in memory order (little-endian by `to_le`).
    pub fn words(&self) -> &[AtomicU32] {
        // SAFETY: the mapping is page-aligned, lives as long as `self`, is readable and writable,
        // and `len / 4` words of it exist. Atomic words allow any sharing; each mapping is only
        // ever seen as words of one size (segments: 4 bytes).
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(self.raw.as_ptr().cast::<AtomicU32>(), self.raw.len() / 4)
        }
    }
    /// The mapping as words of 8 bytes, in memory order.
    pub fn long_words(&self) -> &[AtomicU64] {
        // SAFETY: as in `words`; this mapping is only ever seen as words of 8 bytes (writers).
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(self.raw.as_ptr().cast::<AtomicU64>(), self.raw.len() / 8)
        }
    }
    /// Waits until bytes `at..at + len` are durable (msync(2), which on Linux is fsync of a range).
    ///
    /// # Errors
    /// After one, what reached the disk is unknown, and a second call may succeed falsely.
    pub fn sync(&self, at: usize, len: usize) -> io::Result<()> {
        self.raw.flush_range(at, len)
    }
}
