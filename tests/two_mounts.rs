//! One tree on two machines: what is done in one mount is at the server and in the other mount,
//! without remount and without waiting for any timer.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::Path;

use common::compare::assert_same;
use common::tree::{self, set_mtime, set_xattr};
use common::{AMPLE, Disk, Mount, Server, ops, run};
use rustix::fs::{CWD, RenameFlags};

#[test]
fn a_copied_tree_is_the_same_everywhere() {
    let Some(disk) = Disk::for_trees() else { return };
    let original = tree::source(&disk);
    let server = Server::start(&disk);
    let a = Mount::start(&server, &disk, "cache-a");
    let mut b = Mount::start(&server, &disk, "cache-b");
    // b holds a promise for the empty root
    assert_eq!(fs::read_dir(b.path()).unwrap().count(), 0);

    let from = format!("{}/.", original.display());
    run(&["cp", "-a", &from, a.path().to_str().unwrap()]);
    a.sync();
    let c = Mount::start(&server, &disk, "cache-c");
    assert_same(&original, a.path());
    assert_same(&original, server.dir());
    assert_same(&original, b.path());
    assert_same(&original, c.path());
    assert_same_inodes(a.path(), b.path());
    a.no_conflicts();

    // the same from the caches alone, and after a remount
    assert_same(&original, b.path());
    b.umount();
    b.again();
    assert_same(&original, b.path());
    assert_same_inodes(a.path(), b.path());

    fs::read_dir(b.path()).unwrap().for_each(|entry| remove(&entry.unwrap().path()));
    b.sync();
    assert_same(b.path(), a.path());
    assert_same(b.path(), server.dir());
    assert_eq!(fs::read_dir(a.path()).unwrap().count(), 0);
}

fn remove(path: &Path) {
    run(&["rm".as_ref(), "-rf".as_ref(), "--".as_ref(), path.as_os_str()]);
}

/// An object has one inode number on all machines, for ever.
fn assert_same_inodes(a: &Path, b: &Path) {
    for entry in fs::read_dir(a).unwrap() {
        let (name, meta) = entry.map(|it| (it.file_name(), it.metadata().unwrap())).unwrap();
        let other = fs::symlink_metadata(b.join(&name)).unwrap();
        assert_eq!(meta.ino(), other.ino(), "{name:?} in {}", a.display());
        if meta.is_dir() {
            assert_same_inodes(&a.join(&name), &b.join(&name));
        }
    }
}

/// What is there before each change of the table.
fn prepare(root: &Path) {
    for dir in ["dir", "dir/below", "other", "empty"] {
        fs::create_dir(root.join(dir)).unwrap();
    }
    for file in ["file", "dir/file", "dir/below/file", "twin"] {
        fs::write(root.join(file), format!("this is {file}")).unwrap();
    }
    fs::write(root.join("large"), vec![7; (1 << 20) + (1 << 19)]).unwrap();
    symlink("file", root.join("soft")).unwrap();
    fs::hard_link(root.join("file"), root.join("hard")).unwrap();
    set_xattr(&root.join("file"), "user.old", b"old");
}

type Change = (&'static str, fn(&Path));

/// Each is done in one mount, below a directory of its own, that the other has wholly cached.
const CHANGES: [Change; 30] = [
    ("create", |at| fs::write(at.join("new"), "new").unwrap()),
    ("create below", |at| fs::write(at.join("dir/below/new"), "new").unwrap()),
    ("make directories", |at| fs::create_dir_all(at.join("x/y/z")).unwrap()),
    ("overwrite, same length", |at| fs::write(at.join("file"), "THIS IS file").unwrap()),
    ("overwrite in place", |at| {
        let file = File::options().write(true).open(at.join("large")).unwrap();
        file.write_all_at(b"in the middle", (1 << 20) - 5).unwrap();
    }),
    ("append", |at| {
        let mut file = File::options().append(true).open(at.join("large")).unwrap();
        file.write_all(b"more").unwrap();
    }),
    ("truncate", |at| {
        File::options().write(true).open(at.join("large")).unwrap().set_len(1234).unwrap();
    }),
    ("truncate by path", |at| {
        run(&["truncate", "-s", "5M", at.join("file").to_str().unwrap()]);
    }),
    ("empty it", |at| drop(File::create(at.join("large")).unwrap())),
    ("write through a hard link", |at| fs::write(at.join("hard"), "both names").unwrap()),
    ("chmod", |at| fs::set_permissions(at.join("file"), Permissions::from_mode(0o4711)).unwrap()),
    ("chmod a directory", |at| {
        fs::set_permissions(at.join("dir"), Permissions::from_mode(0o1770)).unwrap();
    }),
    ("chown", |at| lchown(at.join("file"), Some(12), Some(34)).unwrap()),
    ("chown a symlink", |at| lchown(at.join("soft"), Some(12), Some(34)).unwrap()),
    ("set the time", |at| set_mtime(&at.join("file"), 1_234_567, 890)),
    ("set the time of a directory", |at| set_mtime(&at.join("dir"), -5, 890)),
    ("set the time of a symlink", |at| set_mtime(&at.join("soft"), 5_000_000_000, 7)),
    ("set an attribute", |at| set_xattr(&at.join("file"), "user.new", b"value")),
    ("change an attribute", |at| set_xattr(&at.join("file"), "user.old", b"new")),
    ("remove an attribute", |at| rustix::fs::removexattr(at.join("file"), "user.old").unwrap()),
    ("set a list", |at| set_xattr(&at.join("dir"), "system.posix_acl_default", &tree::acl(99))),
    ("unlink", |at| fs::remove_file(at.join("twin")).unwrap()),
    ("unlink one of two names", |at| fs::remove_file(at.join("hard")).unwrap()),
    ("remove a directory", |at| fs::remove_dir(at.join("empty")).unwrap()),
    ("rename", |at| fs::rename(at.join("file"), at.join("renamed")).unwrap()),
    ("rename over another", |at| fs::rename(at.join("file"), at.join("twin")).unwrap()),
    ("rename a directory", |at| fs::rename(at.join("dir"), at.join("other/dir")).unwrap()),
    ("exchange", |at| {
        let (a, b) = (at.join("file"), at.join("dir"));
        rustix::fs::renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).unwrap();
    }),
    ("replace by a symlink", |at| {
        fs::remove_file(at.join("twin")).unwrap();
        symlink("dir/file", at.join("twin")).unwrap();
    }),
    ("save as editors do", |at| {
        fs::write(at.join("file~new"), "saved").unwrap();
        fs::rename(at.join("file~new"), at.join("file")).unwrap();
    }),
];

/// Every change in one mount is in the other as soon as `imz sync` is back, in both directions.
#[test]
fn every_change_is_seen_by_the_other() {
    let Some(disk) = Disk::new(AMPLE) else { return };
    let server = Server::start(&disk);
    let a = Mount::start(&server, &disk, "cache-a");
    let b = Mount::start(&server, &disk, "cache-b");
    let mut failures = Vec::new();
    for (round, (one, other)) in [(&a, &b), (&b, &a)].into_iter().enumerate() {
        for (i, (what, change)) in CHANGES.iter().enumerate() {
            let name = format!("case-{round}-{i}");
            fs::create_dir(one.at(&name)).unwrap();
            prepare(&one.at(&name));
            one.sync();
            // the other reads all of it, and then has promises for all of it
            assert_same(&one.at(&name), &other.at(&name));
            assert!(!other.at(&name).join("new").exists());
            change(&one.at(&name));
            one.sync();
            for (who, tree) in
                [("the other", other.at(&name)), ("server", server.dir().join(&name))]
            {
                let found = common::compare::compare(&one.at(&name), &tree);
                if !found.is_empty() {
                    failures
                        .push(format!("{what} (round {round}), at {who}: {}", found.join("; ")));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    a.no_conflicts();
    b.no_conflicts();
}

/// What a shell that stands in a directory sees, and what a reader with an open file sees.
#[test]
fn open_directories_and_open_files_see_changes() {
    let Some(disk) = Disk::new(AMPLE) else { return };
    let server = Server::start(&disk);
    let a = Mount::start(&server, &disk, "cache-a");
    let b = Mount::start(&server, &disk, "cache-b");
    fs::create_dir(a.at("dir")).unwrap();
    fs::write(a.at("dir/old"), "old").unwrap();
    fs::write(a.at("dir/read"), "before").unwrap();
    a.sync();

    let names = |dir: &File| -> BTreeSet<String> {
        let mut stream = rustix::fs::Dir::read_from(dir).unwrap();
        let mut names = BTreeSet::new();
        while let Some(entry) = stream.read() {
            names.insert(entry.unwrap().file_name().to_str().unwrap().to_owned());
        }
        names
    };
    let dir = File::open(b.at("dir")).unwrap();
    assert_eq!(names(&dir), BTreeSet::from([".", "..", "old", "read"].map(str::to_owned)));
    let mut reader = File::open(b.at("dir/read")).unwrap();
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "before");
    let removed = File::open(b.at("dir/old")).unwrap();

    fs::write(a.at("dir/new"), "new").unwrap();
    fs::remove_file(a.at("dir/old")).unwrap();
    fs::write(a.at("dir/read"), "after!").unwrap();
    a.sync();
    assert_eq!(names(&dir), BTreeSet::from([".", "..", "new", "read"].map(str::to_owned)));
    let through_dir = format!("/proc/self/fd/{}/new", std::os::fd::AsRawFd::as_raw_fd(&dir));
    assert_eq!(fs::read_to_string(through_dir).unwrap(), "new");
    assert_eq!(fs::read_to_string(b.at("dir/read")).unwrap(), "after!");
    // the descriptor that was open keeps one whole version, whichever
    text.clear();
    reader.seek(SeekFrom::Start(0)).unwrap();
    reader.read_to_string(&mut text).unwrap();
    assert!(["before", "after!"].contains(&text.as_str()), "{text}");
    let mut byte = [0; 3];
    removed.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(&byte, b"old");
}

/// Different names in one directory, different files, at the same time: both sides' work stays.
#[test]
fn work_side_by_side_meets_without_conflict() {
    let Some(disk) = Disk::new(AMPLE) else { return };
    let server = Server::start(&disk);
    let a = Mount::start(&server, &disk, "cache-a");
    let b = Mount::start(&server, &disk, "cache-b");
    fs::create_dir(a.at("shared")).unwrap();
    a.sync();
    let work = |mount: &Mount, who: &str| {
        for i in 0..100 {
            let path = mount.at(format!("shared/{who}{i}"));
            fs::write(&path, format!("{who} {i}")).unwrap();
            if i % 3 == 0 {
                fs::rename(&path, path.with_extension("renamed")).unwrap();
            }
        }
        fs::create_dir(mount.at(format!("dir-{who}"))).unwrap();
        ops::in_both(&mount.at(format!("dir-{who}")), &disk.dir(&format!("model-{who}")), 5, 150);
    };
    std::thread::scope(|threads| {
        threads.spawn(|| work(&a, "a"));
        threads.spawn(|| work(&b, "b"));
    });
    a.sync();
    b.sync();
    assert_same(a.path(), b.path());
    assert_same(a.path(), server.dir());
    assert_eq!(fs::read_dir(a.at("shared")).unwrap().count(), 200);
    for who in ["a", "b"] {
        let model = disk.dir(&format!("model-{who}"));
        common::compare::assert_same_but_times(&model, &a.at(format!("dir-{who}")));
    }
    a.no_conflicts();
    b.no_conflicts();
}

/// A directory that was full before imz came, served as it is; large files come by ranges.
#[test]
fn an_existing_directory_is_served_as_it_is() {
    let Some(disk) = Disk::new(AMPLE) else { return };
    let original = disk.dir("served");
    tree::make(&original, 3, 300, 10 << 20);
    let huge = File::create(original.join("huge")).unwrap();
    huge.set_len(8 << 30).unwrap();
    huge.write_all_at(b"near the end", (8 << 30) - 100).unwrap();
    let mut server = Server::start(&disk);
    let a = Mount::start(&server, &disk, "cache-a");
    let file = File::open(a.at("huge")).unwrap();
    let mut bytes = [0; 12];
    file.read_exact_at(&mut bytes, (8 << 30) - 100).unwrap();
    assert_eq!(&bytes, b"near the end");
    assert!(a.status()["cache_clean_bytes"].as_u64().unwrap() < 64 << 20, "it fetched the file");
    drop(file);
    fs::remove_file(a.at("huge")).unwrap();
    a.sync();
    assert_same(&original, a.path());
    // imz is taken away, and plain files are left
    server.stop();
    assert!(!original.join("huge").exists());
    assert!(fs::read(original.join("odd/large")).unwrap().len() == 5 << 20);
}

/// The kernel decides about permissions by what is so now, not by what it knew before.
#[test]
fn permissions_that_the_other_gave_count_at_once() {
    let Some(disk) = Disk::new(AMPLE) else { return };
    let server = Server::start(&disk);
    let a = Mount::start(&server, &disk, "cache-a");
    let b = Mount::with(server.source(), &disk.dir("cache-b"), "allow_other");
    fs::create_dir(a.at("dir")).unwrap();
    fs::write(a.at("dir/file"), "for all").unwrap();
    let modes = |dir, file| {
        fs::set_permissions(a.path(), Permissions::from_mode(dir)).unwrap();
        fs::set_permissions(a.at("dir"), Permissions::from_mode(dir)).unwrap();
        fs::set_permissions(a.at("dir/file"), Permissions::from_mode(file)).unwrap();
        a.sync();
    };
    let path = b.at("dir/file");
    for round in 0..20 {
        for (dir, file, open) in
            [(0o700, 0o644, false), (0o755, 0o644, true), (0o755, 0o600, false)]
        {
            modes(dir, file);
            let out = common::as_nobody(&["cat".as_ref(), path.as_os_str()]).output().unwrap();
            let said = common::told(&out);
            assert_eq!(out.status.success(), open, "round {round}, {dir:o} {file:o}: {said}");
        }
    }
}
