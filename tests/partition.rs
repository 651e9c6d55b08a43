//! A client away from its server for a long day, while others change the same files and names:
//! afterwards all sides agree, every line that anybody wrote is in the tree or preserved, and it
//! takes time in proportion to the changes.
//!
//! `IMZ_PARTITION_OPS=50000` makes it as long as one likes; 500 by default. `IMZ_PARTITION_SEED` is
//! another history.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::cable::Cable;
use common::compare::assert_same;
use common::tree::Rng;
use common::{Disk, Mount, Server, imz_run};

/// Few names below each of some directories, so that clients meet.
const NAMES: usize = 6;
const DIRS: usize = 20;

struct Worker<'a> {
    root: &'a Path,
    /// of the client
    name: &'static str,
    rng: Rng,
    dirs: usize,
    written: usize,
}

impl Worker<'_> {
    fn path(&mut self) -> PathBuf {
        let dir = self.root.join(format!("d{}", self.rng.below(self.dirs)));
        match self.rng.below(4) {
            0 => dir.join(format!("sub{}", self.rng.below(2))).join(self.file()),
            // where nobody else works
            1 => {
                let file = self.file();
                dir.join(format!("of-{}-{file}", self.name))
            }
            _ => dir.join(self.file()),
        }
    }
    fn file(&mut self) -> String {
        format!("n{}", self.rng.below(NAMES))
    }
    /// A line that nobody else writes.
    fn line(&mut self) -> String {
        self.written += 1;
        format!("line {} of {}\n", self.written, self.name)
    }
    fn step(&mut self) -> io::Result<()> {
        let path = self.path();
        match self.rng.below(20) {
            0..=5 => fs::write(path, self.line()),
            6..=9 => {
                let line = self.line();
                File::options().append(true).open(path)?.write_all(line.as_bytes())
            }
            10 => fs::create_dir(path.parent().unwrap()),
            11 => fs::create_dir(path),
            12 => fs::remove_dir(path.parent().unwrap()),
            13 => fs::remove_file(path),
            14 | 15 => fs::rename(path, self.path()),
            16 => {
                // as editors do
                let temp = path.with_extension(self.name);
                fs::write(&temp, self.line())?;
                fs::rename(temp, path)
            }
            17 => fs::hard_link(path, self.path()),
            18 => {
                let mode = 0o600 + self.rng.below(8) as u32;
                fs::set_permissions(path, fs::Permissions::from_mode(mode))
            }
            _ => {
                let line = self.line();
                let flags = rustix::fs::XattrFlags::empty();
                Ok(rustix::fs::lsetxattr(path, "user.op", line.as_bytes(), flags)?)
            }
        }
    }
    /// Operations that were done; what cannot be (nothing is there) does not count.
    fn work(&mut self, count: usize) {
        let mut done = 0;
        for _ in 0..count * 20 {
            if done == count {
                return;
            }
            match self.step() {
                Ok(()) => done += 1,
                Err(e) => assert!(is_usual(&e), "{}: {e}", self.name),
            }
        }
        panic!("only {done} of {count} operations could be done");
    }
}

fn is_usual(e: &io::Error) -> bool {
    let usual = [
        libc::ENOENT,
        libc::EEXIST,
        libc::ENOTDIR,
        libc::EISDIR,
        libc::ENOTEMPTY,
        libc::EINVAL,
        libc::EPERM,
    ];
    e.raw_os_error().is_some_and(|e| usual.contains(&e))
}

/// Every line of every file below a directory.
fn lines(dir: &Path) -> HashSet<String> {
    let (mut found, mut dirs) = (HashSet::new(), vec![dir.to_owned()]);
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if name == ".imz" || name.starts_with("record") {
                continue;
            }
            match fs::symlink_metadata(&path).unwrap() {
                meta if meta.is_dir() => dirs.push(path),
                _ => {
                    let text = fs::read(path).unwrap();
                    found.extend(String::from_utf8_lossy(&text).lines().map(str::to_owned));
                }
            }
        }
    }
    found
}

struct Outcome {
    took: Duration,
    conflicts: u64,
}

fn partition(ops: usize, seed: u64) -> Option<Outcome> {
    let disk = Disk::new(if ops > 5000 { 8192 } else { 1024 })?;
    let server = Server::start(&disk);
    let cable = Cable::to(server.port());
    let a = Mount::start(&server, &disk, "a");
    let c = Mount::start(&server, &disk, "c");
    let mut b = Mount::with(cable.source(), &disk.dir("b"), "");
    let dirs = DIRS + ops / 50;
    let worker = |mount: &'_ Mount, name, seed| (mount.path().to_owned(), name, Rng(seed));
    for dir in 0..dirs {
        fs::create_dir_all(a.at(format!("d{dir}/sub0"))).unwrap();
        for file in 0..NAMES {
            fs::write(a.at(format!("d{dir}/n{file}")), format!("at first {dir} {file}\n")).unwrap();
        }
    }
    a.sync();
    let base = lines(b.path()); // all of it is in the cache now
    assert_eq!(base.len(), dirs * NAMES);
    assert_same(a.path(), c.path());

    // It takes its leave first: then nobody waits for its lease.
    b.umount();
    cable.cut();
    b.again();
    assert!(!b.is_connected());
    std::thread::scope(|scope| {
        for (mount, name, count) in [(&b, "b", ops), (&a, "a", ops / 5), (&c, "c", ops / 5)] {
            let own = seed * 1000 + u64::from(name.as_bytes()[0]);
            let (root, name, rng) = worker(mount, name, own);
            scope.spawn(move || {
                Worker { root: &root, name, rng, dirs, written: 0 }.work(count);
            });
        }
    });
    a.sync();
    c.sync();
    let (of_b, of_others) = (lines(b.path()), lines(server.dir()));
    assert!(b.pending() > 0);
    let pending = b.pending();

    cable.mend();
    let begun = Instant::now();
    b.sync();
    let took = begun.elapsed();
    for mount in [&a, &b, &c] {
        mount.sync();
    }
    let conflicts = b.status()["conflicts"].as_u64().unwrap();
    println!(
        "{ops} operations, {pending} records: {:.2} s, {conflicts} conflicts, {} of {} lines b, {} others",
        took.as_secs_f64(),
        of_b.difference(&base).count(),
        of_b.len(),
        of_others.difference(&base).count(),
    );
    let kept = lines(server.dir());
    let lost = |of: &HashSet<String>| -> BTreeSet<String> {
        of.difference(&base).filter(|line| !kept.contains(*line)).cloned().collect()
    };
    let (lost_b, lost_others) = (lost(&of_b), lost(&of_others));
    assert!(lost_b.is_empty(), "seed {seed}: of b: {lost_b:?}");
    assert!(lost_others.is_empty(), "seed {seed}: of the others: {lost_others:?}");
    assert_same(b.path(), server.dir());
    assert_same(a.path(), server.dir());
    assert_same(c.path(), server.dir());
    assert!(conflicts > 0, "the clients never met");
    let list = imz_run(&["conflicts", "list", a.path().to_str().unwrap()]);
    assert_eq!((list.0, list.1.lines().count() as u64), (0, conflicts));
    Some(Outcome { took, conflicts })
}

#[test]
fn all_sides_agree_after_a_partition() {
    let ops = std::env::var("IMZ_PARTITION_OPS").map_or(500, |n| n.parse().unwrap());
    let seed = std::env::var("IMZ_PARTITION_SEED").map_or(7, |n| n.parse().unwrap());
    let Some(small) = partition(ops / 2, seed) else { return };
    let large = partition(ops, seed).unwrap();
    println!("{} and {} conflicts", small.conflicts, large.conflicts);
    // twice as much may take twice as long, and the machine may be busy with something
    let bound = small.took * 4 + Duration::from_secs(3);
    assert!(large.took < bound, "{:?} for the half, {:?} for all", small.took, large.took);
}
