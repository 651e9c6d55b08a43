//! Two trees, and every difference between them.
//!
//! Looked at: names, types, modes, owners, sizes, contents, targets of links, mtimes to the
//! nanosecond (all types), link counts and which names are one object, device numbers, extended
//! attributes with the access control lists. Not looked at: atime and ctime, which each machine
//! has for itself; imz's own attribute; imz's own two names at the root.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// imz's own names, at the root of a served directory.
const OWN_NAMES: [&str; 2] = [".imz", ".imz-conflicts"];
const OWN_XATTRS: [&[u8]; 2] = [b"trusted.imz", b"user.imz"];
/// Lists that a file system may carry without listing them.
const ACLS: [&str; 2] = ["system.posix_acl_access", "system.posix_acl_default"];
const CHUNK_LEN: usize = 1 << 20;
const SHOWN_MAX: usize = 40;

pub type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

struct Object {
    meta: Metadata,
    /// without imz's own directories at the root
    nlink: u64,
    target: Option<PathBuf>,
    xattrs: Xattrs,
    /// the first name, in order, of the same object
    first: PathBuf,
}

type Tree = BTreeMap<PathBuf, Object>;

/// Fails with the differences.
#[track_caller]
pub fn assert_same(a: &Path, b: &Path) {
    shown(a, b, &compare(a, b));
}

/// The same without times: for what was done twice, not copied.
#[track_caller]
pub fn assert_same_but_times(a: &Path, b: &Path) {
    let found = compare(a, b);
    let found: Vec<String> = found.into_iter().filter(|it| !it.contains(": mtime ")).collect();
    shown(a, b, &found);
}

#[track_caller]
fn shown(a: &Path, b: &Path, found: &[String]) {
    let some = found.iter().take(SHOWN_MAX).map(String::as_str).collect::<Vec<_>>().join("\n  ");
    let count = found.len();
    assert!(count == 0, "{} and {}: {count} differences\n  {some}", a.display(), b.display());
}

/// Every difference, a line each: `PATH: what A -> B`.
pub fn compare(a: &Path, b: &Path) -> Vec<String> {
    let (left, right) = (gather(a), gather(b));
    let mut found = Vec::new();
    for name in left.keys().filter(|it| !right.contains_key(*it)) {
        found.push(format!("{name:?}: only in the first"));
    }
    for name in right.keys().filter(|it| !left.contains_key(*it)) {
        found.push(format!("{name:?}: only in the second"));
    }
    for (name, one) in &left {
        if let Some(other) = right.get(name) {
            compare_object(name, one, other, &mut found);
            let both_files = one.meta.is_file() && other.meta.is_file();
            if both_files && one.meta.len() == other.meta.len() {
                compare_contents(name, &a.join(name), &b.join(name), &mut found);
            }
        }
    }
    found
}

fn compare_object(name: &Path, one: &Object, other: &Object, found: &mut Vec<String>) {
    let (a, b) = (&one.meta, &other.meta);
    let mut tell = |what: &str, a: String, b: String| {
        if a != b {
            found.push(format!("{name:?}: {what} {a} -> {b}"));
        }
    };
    tell("mode", format!("{:o}", a.mode()), format!("{:o}", b.mode()));
    tell("owner", format!("{}:{}", a.uid(), a.gid()), format!("{}:{}", b.uid(), b.gid()));
    if !a.is_dir() {
        tell("size", a.len().to_string(), b.len().to_string());
    }
    let mtime = |it: &Metadata| format!("{}.{:09}", it.mtime(), it.mtime_nsec());
    tell("mtime", mtime(a), mtime(b));
    tell("links", one.nlink.to_string(), other.nlink.to_string());
    if a.file_type().is_char_device() || a.file_type().is_block_device() {
        tell("device", a.rdev().to_string(), b.rdev().to_string());
    }
    tell("target", format!("{:?}", one.target), format!("{:?}", other.target));
    tell("same object as", format!("{:?}", one.first), format!("{:?}", other.first));
    let shown = |xattrs: &Xattrs| {
        let text = |bytes: &[u8]| bytes.escape_ascii().to_string();
        let all = xattrs.iter().map(|(key, value)| format!("{}={}", text(key), text(value)));
        all.collect::<Vec<_>>().join(" ")
    };
    tell("xattrs", shown(&one.xattrs), shown(&other.xattrs));
}

fn compare_contents(name: &Path, a: &Path, b: &Path, found: &mut Vec<String>) {
    let (mut one, mut other) = match (File::open(a), File::open(b)) {
        (Ok(one), Ok(other)) => (one, other),
        (one, other) => {
            let errors = (one.err(), other.err());
            found.push(format!("{name:?}: cannot be opened: {errors:?}"));
            return;
        }
    };
    let (mut left, mut right) = (vec![0; CHUNK_LEN], vec![0; CHUNK_LEN]);
    let mut at = 0;
    loop {
        match (fill(&mut one, &mut left), fill(&mut other, &mut right)) {
            (Ok(0), Ok(0)) => return,
            (Ok(n), Ok(m)) if n == m && left[..n] == right[..m] => at += n,
            (Ok(n), Ok(m)) => {
                let same = left[..n].iter().zip(&right[..m]).take_while(|(a, b)| a == b).count();
                found.push(format!("{name:?}: contents from byte {} on", at + same));
                return;
            }
            (one, other) => {
                found.push(format!("{name:?}: cannot be read at {at}: {one:?}, {other:?}"));
                return;
            }
        }
    }
}

/// Reads until the buffer is full or the file at its end.
fn fill(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match file.read(&mut buffer[len..])? {
            0 => break,
            n => len += n,
        }
    }
    Ok(len)
}

fn gather(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut queue = vec![PathBuf::new()];
    while let Some(name) = queue.pop() {
        let path = root.join(&name);
        let seen =
            |what: &str, e: std::io::Error| -> ! { panic!("{}: {what}: {e}", path.display()) };
        let meta = fs::symlink_metadata(&path).unwrap_or_else(|e| seen("stat", e));
        let mut nlink = meta.nlink();
        if meta.is_dir() {
            for entry in fs::read_dir(&path).unwrap_or_else(|e| seen("readdir", e)) {
                let entry = entry.unwrap_or_else(|e| seen("readdir", e)).file_name();
                let is_own = OWN_NAMES.iter().any(|own| entry == *own);
                match is_own && name.as_os_str().is_empty() {
                    true => nlink -= 1,
                    false => queue.push(name.join(entry)),
                }
            }
        }
        let target =
            meta.is_symlink().then(|| fs::read_link(&path).unwrap_or_else(|e| seen("readlink", e)));
        let xattrs = xattrs(&path);
        tree.insert(name.clone(), Object { meta, nlink, target, xattrs, first: name });
    }
    let mut firsts = BTreeMap::new();
    for (name, object) in &mut tree {
        if !object.meta.is_dir() && object.meta.nlink() > 1 {
            let first = firsts.entry(object.meta.ino()).or_insert_with(|| name.clone());
            object.first.clone_from(first);
        }
    }
    tree
}

/// All extended attributes of an object but imz's own; a symlink's are its own.
pub fn xattrs(path: &Path) -> Xattrs {
    let mut list = vec![0; 64 << 10];
    let len = rustix::fs::llistxattr(path, &mut list[..]).unwrap_or(0);
    let listed = list[..len].split(|&byte| byte == 0).filter(|it| !it.is_empty());
    let acls = ACLS.iter().map(|it| it.as_bytes());
    let mut found = Xattrs::new();
    for key in listed.chain(acls).filter(|key| !OWN_XATTRS.contains(key)) {
        let mut value = vec![0; 64 << 10];
        if let Ok(len) = rustix::fs::lgetxattr(path, key, &mut value[..]) {
            value.truncate(len);
            found.insert(key.to_vec(), value);
        }
    }
    found
}
