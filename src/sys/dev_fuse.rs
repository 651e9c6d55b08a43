//! Mounting a FUSE file system as root, without a helper program.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags};

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

/// Tells the kernel to look up every name of the file system again when it is next used. An error
/// where the kernel does not know this (before Linux 6.16).
pub fn next_epoch(dev: impl AsFd) -> io::Result<()> {
    const FUSE_NOTIFY_INC_EPOCH: u32 = 8;
    // struct fuse_out_header: length, code, and a unique id of 0 for a notification
    let mut header = [0; 16];
    header[..4].copy_from_slice(&16u32.to_ne_bytes());
    header[4..8].copy_from_slice(&FUSE_NOTIFY_INC_EPOCH.to_ne_bytes());
    rustix::io::write(dev, &header)?;
    Ok(())
}

/// Takes the mount away at once; who is in it keeps what is open.
pub fn detach(at: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(at, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?)
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
