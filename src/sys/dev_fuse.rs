//! /dev/fuse: mounting as root without a helper program, reading requests, writing answers.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;

use super::Errno;

/// The `whence` of lseek(2) that looks for a hole.
pub const SEEK_HOLE: i32 = libc::SEEK_HOLE;

/// Opens /dev/fuse for a new file system.
pub fn open() -> io::Result<OwnedFd> {
    let fd = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    fd.map_err(|e| {
        let e = io::Error::from(e);
        io::Error::new(e.kind(), format!("/dev/fuse: {e} (is the fuse module loaded?)"))
    })
}

/// Mounts the file system behind `dev`; permissions are checked by the kernel, for all users.
/// `flags` are words of mount(8) such as `nosuid`.
pub fn mount(
    dev: impl AsFd,
    at: &Path,
    source: &str,
    read_only: bool,
    flags: &[String],
) -> io::Result<()> {
    let mut bits = MountFlags::empty();
    bits.set(MountFlags::RDONLY, read_only);
    for flag in flags {
        bits |= match flag.as_str() {
            "nosuid" => MountFlags::NOSUID,
            "nodev" => MountFlags::NODEV,
            "noexec" => MountFlags::NOEXEC,
            "noatime" => MountFlags::NOATIME,
            "nodiratime" => MountFlags::NODIRATIME,
            "relatime" => MountFlags::RELATIME,
            "strictatime" => MountFlags::STRICTATIME,
            _ => MountFlags::empty(),
        };
    }
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other\0",
        dev.as_fd().as_raw_fd()
    );
    let data = std::ffi::CStr::from_bytes_with_nul(data.as_bytes()).map_err(io::Error::other)?;
    Ok(rustix::mount::mount(source, at, "fuse.imz", bits, data)?)
}

/// `_IOR(229, 0, u32)`: makes a new descriptor one more of the session.
const IOC_CLONE: libc::c_ulong = 0x8004_e500;
/// `_IOW(229, 1, struct fuse_backing_map)`
const IOC_BACKING_OPEN: libc::c_ulong = 0x4010_e501;
/// `_IOW(229, 2, u32)`
const IOC_BACKING_CLOSE: libc::c_ulong = 0x4004_e502;

/// A further descriptor of the session, with a queue of its own in the kernel for requests that
/// are being answered: who reads a request from one writes the answer to the same.
pub fn clone_of(dev: BorrowedFd) -> io::Result<OwnedFd> {
    let new = open()?;
    ioctl(new.as_fd(), IOC_CLONE, &mut (dev.as_raw_fd() as u32))?;
    Ok(new)
}

/// Gives the kernel a file that it is to read and write by itself for others; by which number.
pub fn backing_open(dev: impl AsFd, file: impl AsFd) -> io::Result<i32> {
    // struct fuse_backing_map: descriptor, flags, padding
    let mut map = [file.as_fd().as_raw_fd() as u32, 0, 0, 0];
    ioctl(dev.as_fd(), IOC_BACKING_OPEN, &mut map)
}

pub fn backing_close(dev: impl AsFd, id: i32) -> io::Result<()> {
    ioctl(dev.as_fd(), IOC_BACKING_CLOSE, &mut (id as u32)).map(drop)
}

#[allow(unsafe_code)]
fn ioctl<T>(fd: BorrowedFd, request: libc::c_ulong, argument: &mut T) -> io::Result<i32> {
    // SAFETY: each of the three requests above carries the length of its argument, which is what
    // the callers pass; the kernel keeps no pointer to it.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done) }
}

/// Waits for one request.
pub fn receive(dev: impl AsFd, into: &mut [u8]) -> Result<usize, Errno> {
    rustix::io::read(dev, into)
}

/// Writes one answer or notice.
pub fn send(dev: impl AsFd, head: &[u8], body: &[u8]) -> Result<(), Errno> {
    let parts = [IoSlice::new(head), IoSlice::new(body)];
    rustix::io::writev(dev, &parts).map(drop)
}

/// A device number as FUSE carries it: 12 bits of major, 20 of minor.
pub fn encode_dev(dev: u64) -> u32 {
    let (major, minor) = (libc::major(dev), libc::minor(dev));
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

pub fn decode_dev(dev: u32) -> u64 {
    libc::makedev((dev & 0xfff00) >> 8, (dev & 0xff) | ((dev >> 12) & 0xfff00))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive() {
        for (major, minor) in [(0, 0), (8, 1), (259, 65536), (4095, 1_048_575)] {
            let dev = libc::makedev(major, minor);
            assert_eq!(decode_dev(encode_dev(dev)), dev, "{major}:{minor}");
        }
    }
}
