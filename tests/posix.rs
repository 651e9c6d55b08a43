//! What POSIX and Linux say of files, in a mount: with passthrough, without it, over io_uring, and
//! as a user without any right through fusermount3.
//!
//! A check gets two directories: one in the mount, one on the bare file system below. Most look at
//! the mount alone; where the answer is the file system's own affair, the two must agree. All
//! checks of a list run, and all that fail are told. At the end the server has what the mount has.

#![allow(clippy::unwrap_used)]

#[path = "posix/checks.rs"]
mod checks;
mod common;
#[path = "posix/data.rs"]
mod data;

use std::fs;
use std::os::unix::fs::chown;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use checks::CHECKS;
use common::compare::assert_same;
use common::{AMPLE, Disk, Mount, NOBODY, Server, imz_run, unable};

/// Characters of a result that a failure shows.
const SHOWN_LEN_MAX: usize = 3000;

/// Where a check works.
pub struct Place {
    /// in the mount, empty
    pub dir: PathBuf,
    /// on the bare file system, empty
    pub bare: PathBuf,
    /// `dir` as the server has it
    pub served: PathBuf,
    point: PathBuf,
}

impl Place {
    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Waits until the server has all.
    #[track_caller]
    pub fn sync(&self) {
        let (code, text) = imz_run(&["sync", "--timeout", "60s", self.point.to_str().unwrap()]);
        assert_eq!(code, 0, "sync: {text}");
    }

    /// The same in both directories must give the same.
    #[track_caller]
    pub fn alike<T: PartialEq + std::fmt::Debug>(&self, act: impl Fn(&Path) -> T) -> T {
        let (here, bare) = (act(&self.dir), act(&self.bare));
        let shown = |it: &T| format!("{it:?}").chars().take(SHOWN_LEN_MAX).collect::<String>();
        assert!(here == bare, "mount: {}\n bare: {}", shown(&here), shown(&bare));
        here
    }
}

/// Runs the list below a mount; `is_root`: also what only root can do.
fn run_list(point: &Path, bare: &Path, served: &Path, is_root: bool) -> Vec<String> {
    let only = std::env::var("IMZ_POSIX").ok(); // one check, by its name
    let mut failures = Vec::new();
    for (name, needs_root, check) in CHECKS {
        if (*needs_root && !is_root) || only.as_ref().is_some_and(|only| only != name) {
            continue;
        }
        let (dir, bare, served) = (point.join(name), bare.join(name), served.join(name));
        fs::create_dir(&dir).unwrap();
        fs::create_dir_all(&bare).unwrap();
        let place = Place { dir, bare, served, point: point.to_owned() };
        if catch_unwind(AssertUnwindSafe(|| check(&place))).is_err() {
            failures.push((*name).to_owned());
        }
    }
    failures
}

fn as_root(options: &str) {
    let Some(disk) = Disk::new(AMPLE) else { return };
    let server = Server::start(&disk);
    let a = Mount::with(server.source(), &disk.dir("cache-a"), options);
    let failures = run_list(a.path(), &disk.dir("bare"), server.dir(), true);
    assert!(failures.is_empty(), "failed with -o {options}: {failures:?}");
    a.sync();
    assert_same(a.path(), server.dir());
    a.no_conflicts();
    let b = Mount::start(&server, &disk, "cache-b");
    assert_same(a.path(), b.path());
}

#[test]
fn with_passthrough() {
    as_root("allow_other");
}

#[test]
fn without_passthrough() {
    as_root("allow_other,passthrough=off");
}

/// Only where somebody has told the kernel's module to offer it; `auto` is in all other tests.
#[test]
fn over_io_uring() {
    let enabled = fs::read("/sys/module/fuse/parameters/enable_uring");
    match enabled.is_ok_and(|text| text.starts_with(b"Y")) {
        true => as_root("allow_other,uring=on"),
        false => eprintln!("skipped: enable_uring of the module fuse is not Y"),
    }
}

/// The checks of this process's second life, as nobody: where the mount is, and so on.
const INNER: &str = "IMZ_POSIX_INNER";

/// As a user without any right. The mount is made, and the checks run, by this same program in a
/// mount name space of its own, where /dev/fuse is open to all, as it is on most machines.
#[test]
fn as_another_user() {
    let Some(disk) = Disk::new(AMPLE) else { return };
    if std::process::Command::new("fusermount3").arg("-V").output().is_err() {
        return unable("fusermount3 is missing").unwrap_or(());
    }
    chown(disk.dir("served"), Some(NOBODY), Some(NOBODY)).unwrap();
    let server = Server::start(&disk);
    let work = disk.dir("work");
    for name in ["", "bare", "cache", "point"] {
        fs::create_dir_all(work.join(name)).unwrap();
        chown(work.join(name), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let imz = common::imz_for_all(&disk);
    let me = disk.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &me).unwrap();
    let script = "set -e; mknod $1/fuse c 10 229; chmod 666 $1/fuse; mount --bind $1/fuse /dev/fuse; \
                  shift; exec setpriv --reuid=65534 --regid=65534 --clear-groups \"$@\"";
    let mut inner = common::command(&["unshare", "-m", "sh", "-c", script, "sh"]);
    inner.arg(disk.path()).arg(&me).args(["--exact", "inner", "--nocapture"]);
    inner.env(INNER, &work).env("IMZ_SOURCE", server.source()).env("IMZ", &imz);
    inner.env("TMPDIR", &work).env_remove("XDG_RUNTIME_DIR");
    let out = inner.output().unwrap();
    assert!(out.status.success(), "{}", common::told(&out));
    // it really ran
    let count = fs::read_dir(work.join("bare")).unwrap().count();
    assert!(count > 10, "{count} checks: {}", common::told(&out));
    let a = Mount::start(&server, &disk, "cache-root");
    assert_same(server.dir(), a.path());
}

/// Nothing in a run of its own: what [`as_another_user`] starts.
#[test]
fn inner() {
    let Some(work) = std::env::var_os(INNER).map(PathBuf::from) else { return };
    let point = work.join("point");
    let source = std::env::var_os("IMZ_SOURCE").unwrap();
    let mut a = Mount::at_point(source, &work.join("cache"), &point);
    assert!(!a.status()["passthrough"].as_bool().unwrap());
    let served = work.parent().unwrap().join("served");
    let failures = run_list(&point, &work.join("bare"), &served, false);
    // what nobody may read cannot be compared
    common::run(&["chmod", "-R", "u+rwX", point.to_str().unwrap()]);
    a.sync();
    assert_same(&point, &served);
    a.umount();
    assert!(failures.is_empty(), "failed as another user: {failures:?}");
}

/// What [`checks`] runs as another process: tries to lock a file, and says what it got.
#[test]
fn lock_probe() {
    if let Some(path) = std::env::var_os(checks::PROBED) {
        let file = fs::File::options().read(true).write(true).open(path).unwrap();
        println!("{}", checks::probe(&file));
    }
}
