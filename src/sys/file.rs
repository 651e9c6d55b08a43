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

/// A process that holds a lock.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Holder {
    pub pid: u32,
    /// its command, if it is still there
    pub command: String,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.command[..] {
            "" => write!(f, "process {}", self.pid),
            command => write!(f, "process {} ({command})", self.pid),
        }
    }
}

/// Who holds the lock (flock(2)) of a file, as the kernel's list says.
pub fn lock_holder(file: &File) -> Option<Holder> {
    let stat = rustix::fs::fstat(file).ok()?;
    let device = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    let text = std::fs::read_to_string("/proc/locks").ok()?;
    let pid = holder_in(&text, device, stat.st_ino)?;
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = command.split(|byte| *byte == 0).filter(|word| !word.is_empty());
    let words: Vec<_> = words.map(String::from_utf8_lossy).collect();
    Some(Holder { pid, command: words.join(" ") })
}

/// Lines are `1: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE START END`, the device in hexadecimal.
fn holder_in(locks: &str, device: (u32, u32), inode: u64) -> Option<u32> {
    let of = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, "FLOCK", _, _, pid, place, ..] = fields[..] else { return None };
        let mut parts = place.split(':');
        let mut hex = || u32::from_str_radix(parts.next()?, 16).ok();
        let found = (hex()?, hex()?);
        (parts.next()?.parse() == Ok(inode)).then_some((found == device, pid.parse().ok()?))
    };
    // some file systems show another device than they tell in stat: the inode must do then
    locks.lines().filter_map(of).max_by_key(|(same, _)| *same).map(|(_, pid)| pid)
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
    fn the_holder_of_a_lock_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = File::create(&path).unwrap();
        held.lock().unwrap();
        let holder = lock_holder(&File::open(&path).unwrap()).unwrap();
        assert_eq!(holder.pid, std::process::id());
        let text = "1: POSIX  ADVISORY  WRITE 7 08:01:55 0 EOF\n\
                    2: FLOCK  ADVISORY  WRITE 8 00:2a:55 0 EOF\n\
                    3: FLOCK  ADVISORY  WRITE 9 08:01:55 0 EOF\n\
                    3: -> FLOCK  ADVISORY  WRITE 10 08:01:55 0 EOF\n";
        assert_eq!(holder_in(text, (8, 1), 55), Some(9));
        assert_eq!(holder_in(text, (8, 1), 56), None);
        assert_eq!(holder_in(text, (0, 0x2a), 55), Some(8));
    }

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
