//! A source tree of everything that a file system may hold, the same for the same seed.
//!
//! `IMZ_TREE=/path` puts a real one in its place, for the large run.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

use super::Disk;

/// How much the tests copy when no real tree is given.
pub const FILE_COUNT: usize = 2000;
pub const BYTE_COUNT: u64 = 20 << 20;

pub fn is_real() -> bool {
    std::env::var_os("IMZ_TREE").is_some()
}

/// The tree to copy: the real one, or one made on the disk.
pub fn source(disk: &Disk) -> PathBuf {
    match std::env::var_os("IMZ_TREE") {
        Some(path) => path.into(),
        None => {
            let dir = disk.dir("original");
            make(&dir, 1, FILE_COUNT, BYTE_COUNT);
            dir
        }
    }
}

/// Splitmix64: small, and good enough to vary things.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// Bytes like a program's text, or like nothing at all.
    pub fn bytes(&mut self, len: usize, is_text: bool) -> Vec<u8> {
        const WORDS: [&str; 8] =
            ["int ", "return ", "x = ", "(void) ", "{\n", "}\n", "\tif ", "/* seed */ "];
        let mut bytes = Vec::with_capacity(len + 16);
        while bytes.len() < len {
            match is_text {
                true => bytes.extend_from_slice(self.pick(&WORDS).as_bytes()),
                false => bytes.extend_from_slice(&self.next().to_le_bytes()),
            }
        }
        bytes.truncate(len);
        bytes
    }
}

/// Makes about `file_count` files with `byte_count` bytes below the directory `root`.
pub fn make(root: &Path, seed: u64, file_count: usize, byte_count: u64) {
    let mut rng = Rng(seed);
    let mut dirs = vec![root.to_owned()];
    for i in 0..file_count / 12 {
        let above = rng.pick(&dirs).clone();
        let dir = above.join(format!("dir{i}"));
        fs::create_dir(&dir).unwrap();
        dirs.push(dir);
    }
    // one branch that is deep
    let mut deep = root.join("deep");
    for i in 0..40 {
        fs::create_dir(&deep).unwrap();
        dirs.push(deep.clone());
        deep.push(format!("level{i}"));
    }
    let mut files = Vec::new();
    let mean = (byte_count.saturating_sub(7 << 20) / file_count as u64).max(64) as usize;
    for i in 0..file_count {
        let suffix = *rng.pick(&["c", "h", "o", "txt", "bin"]);
        let path = rng.pick(&dirs).join(format!("file{i}.{suffix}"));
        let len = match i % 10 {
            0 => 0,
            1..=6 => rng.below(mean),
            _ => rng.below(mean * 4),
        };
        fs::write(&path, rng.bytes(len, !matches!(suffix, "o" | "bin"))).unwrap();
        files.push(path);
    }
    odd_files(root, &mut rng);
    links(&files, &dirs, &mut rng);
    special_files(root);
    attributes(&files, &dirs, &mut rng);
    times(root, &mut rng);
}

/// Sizes at the edges, and names at the edges.
fn odd_files(root: &Path, rng: &mut Rng) {
    let odd = root.join("odd");
    fs::create_dir(&odd).unwrap();
    for (name, len) in [("zero", 0), ("granule-and-one", (1 << 20) + 1), ("large", 5 << 20)] {
        fs::write(odd.join(name), rng.bytes(len, false)).unwrap();
    }
    let sparse = File::create(odd.join("sparse")).unwrap();
    sparse.set_len(48 << 20).unwrap();
    sparse.write_all_at(b"in the middle", 17 << 20).unwrap();
    sparse.write_all_at(b"at the end", (48 << 20) - 10).unwrap();
    fs::write(odd.join("n".repeat(255)), "a long name").unwrap();
    fs::write(odd.join(every_byte()), "a name of every byte").unwrap();
    fs::write(odd.join(OsStr::from_bytes(b"\xff\xfe not utf-8\n")), "latin").unwrap();
    fs::write(odd.join(" -rf *"), "a name to trip over").unwrap();
    fs::create_dir(odd.join("empty directory")).unwrap();
}

/// A name of all bytes that a name can have.
pub fn every_byte() -> OsString {
    let bytes: Vec<u8> = (1..=255).filter(|&byte| byte != b'/').collect();
    OsStr::from_bytes(&bytes).to_owned()
}

fn any<'a>(rng: &mut Rng, from: &'a [PathBuf]) -> &'a Path {
    rng.pick::<PathBuf>(from)
}

fn links(files: &[PathBuf], dirs: &[PathBuf], rng: &mut Rng) {
    for i in 0..30 {
        fs::hard_link(any(rng, files), any(rng, dirs).join(format!("hard{i}"))).unwrap();
    }
    for i in 0..30 {
        let target = match i % 3 {
            0 => any(rng, files).to_owned(),       // absolute
            1 => format!("file{i}.c").into(),      // of a neighbour, or dangling
            _ => format!("../nowhere/{i}").into(), // dangling
        };
        symlink(target, any(rng, dirs).join(format!("soft{i}"))).unwrap();
    }
    symlink("t".repeat(4000), dirs[0].join("soft-long")).unwrap();
}

fn special_files(root: &Path) {
    let node = |name: &str, kind, device| {
        let mode = Mode::from_raw_mode(0o640);
        rustix::fs::mknodat(CWD, root.join(name), kind, mode, device).unwrap();
    };
    node("fifo", FileType::Fifo, 0);
    node("socket", FileType::Socket, 0);
    node("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    node("block", FileType::BlockDevice, rustix::fs::makedev(240, 70_000));
}

/// Owners first: a change of owner takes set-id bits and capabilities away.
fn attributes(files: &[PathBuf], dirs: &[PathBuf], rng: &mut Rng) {
    for i in 0..60 {
        lchown(any(rng, files), Some(1000 + i % 7), Some(2000 + i % 5)).unwrap();
    }
    for i in 0..12 {
        lchown(any(rng, dirs), Some(1000 + i % 7), Some(2000)).unwrap();
    }
    let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    for raw in [0o0, 0o400, 0o4755, 0o2711, 0o6755, 0o755, 0o777, 0o1644] {
        (0..6).for_each(|_| mode(any(rng, files), raw));
    }
    for raw in [0o2775, 0o1777, 0o700, 0o0, 0o3755] {
        (0..3).for_each(|_| mode(any(rng, dirs), raw));
    }
    for i in 0..40 {
        let value = rng.bytes(i * 20, i % 2 == 0);
        set_xattr(any(rng, files), &format!("user.note{}", i % 3), &value);
        set_xattr(any(rng, dirs), "user.place", &value);
    }
    set_xattr(any(rng, files), "trusted.other", b"not imz's");
    // cap_net_raw+ep, as ping has it
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    set_xattr(any(rng, files), "security.capability", &capability);
    for i in 0..10 {
        set_xattr(any(rng, files), "system.posix_acl_access", &acl(3000 + i));
        let dir = any(rng, &dirs[1..]);
        set_xattr(dir, "system.posix_acl_access", &acl(3000 + i));
        set_xattr(dir, "system.posix_acl_default", &acl(4000 + i));
    }
}

pub fn set_xattr(path: &Path, key: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, key, value, XattrFlags::empty())
        .unwrap_or_else(|e| panic!("{}: {key}: {e}", path.display()));
}

/// An access control list with one more user and one more group, as the kernel has it.
pub fn acl(id: u32) -> Vec<u8> {
    const NO_ID: u32 = u32::MAX;
    let mut bytes = 2u32.to_le_bytes().to_vec(); // version
    let entries = [
        (0x01u16, 6u16, NO_ID), // owner
        (0x02, 5, id),
        (0x04, 4, NO_ID), // group
        (0x08, 7, id + 1),
        (0x10, 7, NO_ID), // mask
        (0x20, 4, NO_ID), // others
    ];
    for (tag, permissions, id) in entries {
        bytes.extend_from_slice(&tag.to_le_bytes());
        bytes.extend_from_slice(&permissions.to_le_bytes());
        bytes.extend_from_slice(&id.to_le_bytes());
    }
    bytes
}

/// Times of all kinds, directories after what is in them.
fn times(dir: &Path, rng: &mut Rng) {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|it| it.unwrap().file_name()).collect();
    names.sort(); // the order of a directory is not the same for the same seed
    for name in names {
        let path = dir.join(name);
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            times(&path, rng);
        } else {
            set_mtime(
                &path,
                1_000_000_000 + rng.below(700_000_000) as i64,
                rng.below(1_000_000_000) as i64,
            );
        }
    }
    set_mtime(dir, 1_000_000_000 + rng.below(700_000_000) as i64, rng.below(1_000_000_000) as i64);
}

/// Of the object itself, also of a symlink.
pub fn set_mtime(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
        .unwrap_or_else(|e| panic!("{}: utimensat: {e}", path.display()));
}
