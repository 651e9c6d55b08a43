//! Operations of all kinds, chosen by a seed, that can be done alike in two trees.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, RenameFlags, XattrFlags};

use super::tree::{self, Rng};

/// Few names, so that operations meet.
const NAMES: [&str; 7] = ["a", "b", "c", "d", "e", "f", "g"];

#[derive(Clone, Debug)]
pub enum Op {
    Write(PathBuf, Vec<u8>),
    Append(PathBuf, Vec<u8>),
    Patch(PathBuf, u64, Vec<u8>),
    Truncate(PathBuf, u64),
    Mkdir(PathBuf),
    Unlink(PathBuf),
    Rmdir(PathBuf),
    Rename(PathBuf, PathBuf, RenameFlags),
    Link(PathBuf, PathBuf),
    Symlink(PathBuf, PathBuf),
    Fifo(PathBuf),
    Chmod(PathBuf, u32),
    Chown(PathBuf, u32, u32),
    SetTime(PathBuf, i64, i64),
    SetXattr(PathBuf, Vec<u8>),
    RemoveXattr(PathBuf),
}

impl Op {
    pub fn random(rng: &mut Rng) -> Op {
        use Op::*;
        let path =
            |rng: &mut Rng| -> PathBuf { (0..=rng.below(3)).map(|_| *rng.pick(&NAMES)).collect() };
        let one = path(rng);
        match rng.below(28) {
            0..=4 => {
                let len = *rng.pick(&[0, 1, 100, 5000, 70_000]);
                Write(one, rng.bytes(len, true))
            }
            5 | 6 => Append(one, rng.bytes(300, true)),
            7 | 8 => Patch(one, rng.below(100_000) as u64, rng.bytes(500, false)),
            9 => Truncate(one, rng.below(50_000) as u64),
            10..=13 => Mkdir(one),
            14 => Unlink(one),
            15 => Rmdir(one),
            16 | 17 => Rename(one, path(rng), RenameFlags::empty()),
            18 => Rename(one, path(rng), RenameFlags::NOREPLACE),
            19 => Rename(one, path(rng), RenameFlags::EXCHANGE),
            20 => Link(one, path(rng)),
            21 => Symlink(path(rng), one),
            22 => Fifo(one),
            23 => Chmod(one, *rng.pick(&[0o600, 0o755, 0o4755, 0o1777, 0o644])),
            24 => Chown(one, rng.below(5000) as u32, rng.below(5000) as u32),
            25 => SetTime(one, rng.below(1 << 31) as i64, rng.below(1_000_000_000) as i64),
            26 => SetXattr(one, rng.bytes(50, true)),
            _ => RemoveXattr(one),
        }
    }

    /// Does it below `root`; what went wrong is an errno.
    pub fn apply(&self, root: &Path) -> Result<(), Option<i32>> {
        self.done(root).map_err(|e| e.raw_os_error())
    }

    fn done(&self, root: &Path) -> io::Result<()> {
        use Op::*;
        let at = |path: &PathBuf| root.join(path);
        // neither fifos nor symlinks (which lead anywhere) are written through
        let file = |path: &PathBuf, options: &mut OpenOptions| -> io::Result<File> {
            match fs::symlink_metadata(at(path)) {
                Ok(meta) if !meta.is_file() => Err(io::Error::from_raw_os_error(libc::EPERM)),
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
                _ => options.open(at(path)),
            }
        };
        let options = || OpenOptions::new();
        match self {
            Write(path, bytes) => {
                let mut file = file(path, options().write(true).create(true).truncate(true))?;
                file.write_all(bytes)
            }
            Append(path, bytes) => file(path, options().append(true))?.write_all(bytes),
            Patch(path, offset, bytes) => {
                file(path, options().read(true).write(true))?.write_all_at(bytes, *offset)
            }
            Truncate(path, len) => file(path, options().write(true))?.set_len(*len),
            Mkdir(path) => fs::create_dir(at(path)),
            Unlink(path) => fs::remove_file(at(path)),
            Rmdir(path) => fs::remove_dir(at(path)),
            Rename(from, to, flags) => {
                Ok(rustix::fs::renameat_with(CWD, at(from), CWD, at(to), *flags)?)
            }
            Link(from, to) => fs::hard_link(at(from), at(to)),
            Symlink(target, path) => symlink(target, at(path)),
            Fifo(path) => {
                let mode = Mode::from_raw_mode(0o600);
                Ok(rustix::fs::mknodat(CWD, at(path), FileType::Fifo, mode, 0)?)
            }
            Chmod(path, mode) => match fs::symlink_metadata(at(path))?.is_symlink() {
                true => Err(io::Error::from_raw_os_error(libc::EPERM)),
                false => fs::set_permissions(at(path), Permissions::from_mode(*mode)),
            },
            Chown(path, uid, gid) => lchown(at(path), Some(*uid), Some(*gid)),
            SetTime(path, seconds, nanoseconds) => {
                fs::symlink_metadata(at(path))?;
                tree::set_mtime(&at(path), *seconds, *nanoseconds);
                Ok(())
            }
            SetXattr(path, value) => {
                let flags = XattrFlags::empty();
                Ok(rustix::fs::lsetxattr(at(path), "user.op", value, flags)?)
            }
            RemoveXattr(path) => Ok(rustix::fs::lremovexattr(at(path), "user.op")?),
        }
    }
}

/// Does `count` operations in both trees, which must answer alike.
#[track_caller]
pub fn in_both(a: &Path, b: &Path, seed: u64, count: usize) {
    let mut rng = Rng(seed);
    for i in 0..count {
        let op = Op::random(&mut rng);
        let (one, other) = (op.apply(a), op.apply(b));
        let same = one == other;
        assert!(
            same,
            "seed {seed}, operation {i}: {one:?}, but {other:?}: {:.300}",
            format!("{op:?}")
        );
    }
}
