//! A server that is restored from an older backup: what its clients did since is not at the server,
//! what they have seen since is not any more, and its numbers begin again where the backup ends.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, SystemTime};

use common::compare::compare;
use common::{AMPLE, Disk, Mount, Server, wait_for};

fn copy(disk: &Disk, from: &str, to: &str) {
    let (from, to) = (disk.path().join(from), disk.path().join(to));
    let _ = fs::remove_dir_all(&to); // there may be none
    common::run(&["cp", "-a", from.to_str().unwrap(), to.to_str().unwrap()]);
}

/// A version that cannot be told from another by its size and time.
fn write_at(path: &Path, bytes: &[u8], when: SystemTime) {
    fs::write(path, bytes).unwrap();
    File::options().write(true).open(path).unwrap().set_modified(when).unwrap();
}

fn text(mount: &Mount, path: &str) -> String {
    fs::read_to_string(mount.at(path)).unwrap()
}

/// What stands below, and what is kept for conflicts.
fn contents(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            match entry.file_type().unwrap() {
                kind if kind.is_dir() => dirs.push(entry.path()),
                kind if kind.is_file() => {
                    found.extend(fs::read(entry.path()).ok().and_then(|it| it.try_into().ok()));
                }
                _ => {}
            }
        }
    }
    found
}

#[test]
fn an_older_backup_costs_nothing_that_a_client_still_has() {
    let Some(disk) = Disk::new(AMPLE) else { return };
    let when = SystemTime::UNIX_EPOCH + Duration::from_secs(1_600_000_000);
    let mut server = Server::start(&disk);
    let a = Mount::start(&server, &disk, "a");
    let mut b = Mount::start(&server, &disk, "b");
    let mut gone = Mount::start(&server, &disk, "gone");
    fs::create_dir(a.at("d")).unwrap();
    for name in ["changed", "ghost", "disputed"] {
        write_at(&a.at(format!("d/{name}")), b"version 1", when);
    }
    fs::write(a.at("d/stays"), b"as it was").unwrap();
    fs::write(a.at("d/renamed"), b"another name").unwrap();
    fs::write(a.at("d/removed"), b"to be removed").unwrap();
    a.sync();
    contents(b.path());
    server.stop();
    for name in ["served", "state"] {
        copy(&disk, name, &format!("{name}.old"));
    }
    server.restart();
    for mount in [&a, &b, &gone] {
        wait_for("all are back", 30, || mount.is_connected());
    }

    // what the backup does not have
    write_at(&a.at("d/changed"), b"version 2", when);
    write_at(&a.at("d/disputed"), b"version a", when);
    fs::write(a.at("d/new"), b"new of a").unwrap();
    fs::create_dir_all(a.at("e/f")).unwrap();
    fs::write(a.at("e/f/deep"), b"deep of a").unwrap();
    fs::rename(a.at("d/renamed"), a.at("d/moved")).unwrap();
    fs::remove_file(a.at("d/removed")).unwrap();
    fs::write(b.at("of-b"), b"new of b").unwrap();
    write_at(&gone.at("d/ghost"), b"version 2", when);
    for mount in [&a, &b, &gone] {
        mount.sync();
    }
    for (mount, path, want) in [
        (&b, "d/ghost", "version 2"),
        (&a, "d/ghost", "version 2"),
        (&b, "d/changed", "version 2"),
        (&b, "d/disputed", "version a"),
        (&b, "e/f/deep", "deep of a"),
        (&a, "of-b", "new of b"),
    ] {
        assert_eq!(text(mount, path), want, "before");
    }
    assert!(a.status()["warning"].is_null());
    // its machine is lost, with all that it had
    gone.umount();
    b.umount();
    a.freeze();
    server.stop();
    for name in ["served", "state"] {
        copy(&disk, &format!("{name}.old"), name);
    }
    server.restart();

    // others work before those come who know more
    let c = Mount::start(&server, &disk, "c");
    for n in 0..100 {
        fs::write(c.at(format!("c-{n}")), format!("of c: {n}")).unwrap();
    }
    write_at(&c.at("d/disputed"), b"version c", when);
    c.sync();
    a.thaw();
    b.again();
    for mount in [&a, &b] {
        wait_for("it is connected again", 60, || mount.is_connected());
        mount.sync();
    }
    let said = a.said();
    assert!(said.contains("the server has lost records") && said.contains("backup"), "{said}");
    let warning = a.status()["warning"].as_str().unwrap().to_owned();
    assert!(warning.contains("older backup") && warning.contains("sent again"), "{warning}");
    assert!(b.said().contains("the server has lost records"), "{}", b.said());

    for (path, want) in [
        ("d/changed", "version 2"),
        ("d/ghost", "version 1"), // nobody has it any more who made it
        ("d/disputed", "version c"),
        ("d/stays", "as it was"),
        ("d/new", "new of a"),
        ("d/moved", "another name"),
        ("e/f/deep", "deep of a"),
        ("of-b", "new of b"),
        ("c-99", "of c: 99"),
    ] {
        for mount in [&a, &b, &c] {
            // that its version lost is told to a client's kernel behind what it waits for
            let what = format!("{path} is {want:?} in {:?}", mount.path());
            wait_for(&what, 10, || text(mount, path) == want);
        }
    }
    for mount in [&a, &b, &c] {
        assert!(!mount.at("d/removed").exists() && !mount.at("d/renamed").exists());
        let differing = compare(mount.path(), server.dir());
        assert!(differing.is_empty(), "{differing:#?}");
    }
    let kept = contents(&server.dir().join(".imz-conflicts"));
    assert!(kept.iter().any(|it| it == "version a"), "{kept:?}");
}
