//! Mounts: which of ours there are, and how one ends.
//!
//! Nothing here looks into a mount: a hung one must not hang who asks about it. The list comes from
//! `/proc/self/mountinfo`, whose paths have blanks, tabs, newlines and backslashes in octal.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::mount::UnmountFlags;

/// The type under which our mounts stand in `/proc/self/mountinfo`.
pub const FS_TYPE: &str = "fuse.imz";

/// The mount points of this name space that are ours, in the order of mounting.
///
/// # Errors
/// `/proc` is missing.
pub fn ours() -> io::Result<Vec<PathBuf>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// Mount points of our type in the text of a mountinfo file.
fn parse(mountinfo: &[u8]) -> Vec<PathBuf> {
    let point = |line: &[u8]| {
        let mut fields = line.split(|&b| b == b' ');
        let point = fields.nth(4)?;
        // optional fields end with a lone dash; the type comes after it
        fields.find(|field| field == b"-")?;
        (fields.next()? == FS_TYPE.as_bytes()).then(|| unescape(point))
    };
    mountinfo.split(|&b| b == b'\n').filter_map(point).collect()
}

/// Who mounted the newest of ours at `path`: its user id.
pub fn owner(path: &Path) -> Option<u32> {
    owner_in(&std::fs::read("/proc/self/mountinfo").ok()?, path)
}

fn owner_in(mountinfo: &[u8], path: &Path) -> Option<u32> {
    let owner = |line: &[u8]| {
        let mut fields = line.split(|&b| b == b' ');
        let at_path = unescape(fields.nth(4)?) == path;
        fields.find(|field| field == b"-")?;
        (at_path && fields.next()? == FS_TYPE.as_bytes()).then_some(())?;
        let options = fields.nth(1)?;
        let uid = options.split(|&b| b == b',').find_map(|o| o.strip_prefix(b"user_id="))?;
        std::str::from_utf8(uid).ok()?.parse().ok()
    };
    mountinfo.split(|&b| b == b'\n').filter_map(owner).next_back()
}

/// The type of the file system that an absolute path is on, for messages.
pub fn type_of(path: &Path) -> Option<String> {
    let text = std::fs::read("/proc/self/mountinfo").ok()?;
    let mounted = |line: &[u8]| {
        let mut fields = line.split(|&b| b == b' ');
        let point = unescape(fields.nth(4)?);
        fields.find(|field| field == b"-")?;
        let fs_type = String::from_utf8_lossy(fields.next()?).into_owned();
        path.starts_with(&point).then_some((point.as_os_str().len(), fs_type))
    };
    // the last of two on one mount point is the one that is seen
    let found = text.split(|&b| b == b'\n').filter_map(mounted).max_by_key(|(len, _)| *len);
    found.map(|(_, fs_type)| fs_type)
}

/// Asks the file system at `path` itself, for its free room: a stat may be answered by the kernel
/// from what it knows of a mount whose process is dead. This may hang with the mount.
///
/// # Errors
/// ENOTCONN is that of a dead mount.
pub fn probe(path: &Path) -> io::Result<()> {
    Ok(rustix::fs::statvfs(path).map(drop)?)
}

/// `\040` and the like become the bytes that they stand for.
fn unescape(text: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|d| d.iter().all(|b| (b'0'..=b'7').contains(b)));
        match digits {
            Some(digits) if first == b'\\' => {
                let value = digits.iter().fold(0u32, |n, b| n * 8 + u32::from(b - b'0'));
                bytes.push((value & 0xff) as u8);
                rest = &after[3..];
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// Why a mount did not end.
#[derive(Debug, thiserror::Error)]
pub enum UmountError {
    #[error("it is busy: a process has a file open in it or stands in it")]
    Busy,
    #[error("nothing is mounted there")]
    NotMounted,
    #[error("fusermount3 cannot be run")]
    NoFusermount(#[source] io::Error),
    #[error("fusermount3 says: {said}")]
    Fusermount { said: String },
    #[error("umount failed")]
    Kernel(#[source] io::Error),
}

/// Unmounts `path`; `lazy` takes a mount away at once that is dead or busy. Root asks the kernel,
/// others fusermount3, which may do it for whoever mounted.
///
/// # Errors
/// [`UmountError`]; the mount is as it was.
pub fn umount(path: &Path, lazy: bool) -> Result<(), UmountError> {
    if super::local::euid() != 0 {
        return fusermount(path, lazy);
    }
    let mut flags = UnmountFlags::NOFOLLOW;
    flags.set(UnmountFlags::DETACH, lazy);
    match rustix::mount::unmount(path, flags) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::BUSY) => Err(UmountError::Busy),
        Err(rustix::io::Errno::INVAL) => Err(UmountError::NotMounted),
        Err(e) => Err(UmountError::Kernel(e.into())),
    }
}

fn fusermount(path: &Path, lazy: bool) -> Result<(), UmountError> {
    let mut command = Command::new("fusermount3");
    command.arg("-u");
    if lazy {
        command.arg("-z");
    }
    // its messages are compared below
    command.arg("--").arg(path).env("LC_ALL", "C").stdin(Stdio::null());
    let done = command.output().map_err(UmountError::NoFusermount)?;
    let said = String::from_utf8_lossy(&done.stderr).trim().to_owned();
    match () {
        () if done.status.success() => Ok(()),
        () if said.contains("resource busy") => Err(UmountError::Busy),
        () if said.contains("not found in") => Err(UmountError::NotMounted),
        () => Err(UmountError::Fusermount { said }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_read_by_type_and_unescaped() {
        let text = b"\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
90 22 0:50 / /mnt/a\\040b\\134c rw,nosuid shared:9 master:2 - fuse.imz h:7070:/v rw,user_id=0\n\
91 22 0:51 / /mnt/plain rw - fuse.imz ./dir rw\n\
92 22 0:52 / /mnt/other rw - fuse.sshfs fuse.imz rw\n\
93 22 0:53 / /mnt/odd\\0 rw - fuse.imz x rw\n\
garbage\n";
        let want: Vec<PathBuf> =
            ["/mnt/a b\\c", "/mnt/plain", "/mnt/odd\\0"].iter().map(PathBuf::from).collect();
        assert_eq!(parse(text), want);
        assert_eq!(owner_in(text, Path::new("/mnt/a b\\c")), Some(0));
        assert_eq!(owner_in(text, Path::new("/mnt/plain")), None);
        assert_eq!(owner_in(text, Path::new("/mnt/other")), None);
    }
}
