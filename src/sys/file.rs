//! Files: room on the disk, and directories that are durable.
//!
//! Absent on purpose: locks of whole files, which std has (`File::try_lock` is flock(2)).

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

/// Makes `file` `len` bytes long, of zeros that have their room on the disk. Durable on return: no.
///
/// # Errors
/// ENOSPC and the like, before anything was promised. The file may then have any length.
pub fn allocate(file: &mut File, len: u64) -> io::Result<()> {
    match fallocate(&*file, FallocateFlags::empty(), 0, len) {
        // a file system without fallocate: write the zeros
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            let zeros = [0; 65536];
            let mut left = len;
            while left > 0 {
                let part = left.min(zeros.len() as u64) as usize;
                file.write_all(&zeros[..part])?;
                left -= part as u64;
            }
            Ok(())
        }
        other => Ok(other?),
    }
}

/// Makes the entries of a directory durable.
///
/// # Errors
/// Those of open(2) and fsync(2).
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
