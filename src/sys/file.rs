//! Files: room on the disk, who else writes to them, and directories that are durable.
//!
//! Absent on purpose: locks of whole files, which std has (`File::try_lock` is flock(2)).

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

/// fcntl(2): which signal tells of a lease that is broken; not in libc.
const F_SETSIG: i32 = 10;

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

/// Whether somebody else has the file open, or mapped, for writing. `file` is open for reading
/// only. False where the file system has no leases.
#[allow(unsafe_code)]
pub fn has_writer(file: BorrowedFd) -> bool {
    let (fd, lease) = (file.as_raw_fd(), libc::F_SETLEASE);
    // SAFETY: fcntl with integers, on a descriptor that is borrowed for all of the calls.
    unsafe {
        // Who opens the file for writing in this instant breaks the lease, and we are told by a
        // signal. The default one ends a process; nobody minds this one.
        libc::fcntl(fd, F_SETSIG, libc::SIGURG);
        if libc::fcntl(fd, lease, libc::F_RDLCK) == 0 {
            libc::fcntl(fd, lease, libc::F_UNLCK);
            return false;
        }
    }
    Errno::from_io_error(&io::Error::last_os_error()) == Some(Errno::AGAIN)
}

/// Whether nobody else has the file open or mapped, in whatever way, or runs it. `file` is open for
/// reading and writing, and for nothing else through another descriptor.
///
/// # Errors
/// `INVAL` and the like where the file system has no leases: then nobody can tell.
#[allow(unsafe_code)]
pub fn is_alone(file: BorrowedFd) -> Result<bool, Errno> {
    let (fd, lease) = (file.as_raw_fd(), libc::F_SETLEASE);
    // SAFETY: fcntl with integers, on a descriptor that is borrowed for all of the calls.
    let taken = unsafe {
        libc::fcntl(fd, F_SETSIG, libc::SIGURG); // as above
        let taken = libc::fcntl(fd, lease, libc::F_WRLCK) == 0;
        let error = io::Error::last_os_error();
        libc::fcntl(fd, lease, libc::F_UNLCK);
        if taken { Ok(()) } else { Err(error) }
    };
    match taken.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO)) {
        Ok(()) => Ok(true),
        Err(Errno::AGAIN | Errno::BUSY) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Makes the entries of a directory durable.
///
/// # Errors
/// Those of open(2) and fsync(2).
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::sys::fs::{self, o};

    #[test]
    fn the_question_for_writers_keeps_nobody_out() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("f"), "x").unwrap();
        let at = fs::open_root(dir.path()).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let file = fs::open(&at, b"f", o::RDONLY, 0).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    has_writer(file.as_fd());
                }
            });
            let opened: Vec<_> = (0..30000)
                .map(|_| fs::open(&at, b"f", o::RDWR | o::NONBLOCK, 0).map(drop))
                .collect();
            stop.store(true, Ordering::Relaxed);
            assert!(opened.iter().all(Result::is_ok), "{:?}", opened.iter().find(|o| o.is_err()));
        });
    }
}
