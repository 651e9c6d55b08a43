//! The checks of names, attributes, permissions and locks; those of data are in [`data`].

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, FlockOperation, Mode, RenameFlags, XattrFlags};
use rustix::io::Errno;

use super::{Place, data};
use crate::common::compare::xattrs;
use crate::common::tree::{acl, every_byte, set_mtime, set_xattr};
use crate::common::{NOBODY, as_nobody, command, run};

/// Name, whether only root can do it, and what it does in an empty directory.
type Check = (&'static str, bool, fn(&Place));

pub const CHECKS: &[Check] = &[
    ("unlinked-files", false, data::unlinked_files),
    ("open-flags", false, data::open_flags),
    ("direct", false, data::direct),
    ("mapped", false, data::mapped),
    ("allocate", false, data::allocate),
    ("holes", false, data::holes),
    ("copy-range", false, data::copy_range),
    ("beyond-4-gib", false, data::beyond_4_gib),
    ("truncate", false, data::truncate),
    ("model", false, data::against_a_model),
    ("two-handles", false, data::two_handles),
    ("sync", false, data::sync_calls),
    ("execute", false, data::execute),
    ("rename-below", false, rename_below),
    ("rename-rules", false, rename_rules),
    ("rename-flags", false, rename_flags),
    ("name-lengths", false, name_lengths),
    ("wrong-types", false, wrong_types),
    ("symlinks", false, symlinks),
    ("hard-links", false, hard_links),
    ("special", true, special),
    ("fifo", false, fifo),
    ("socket", false, socket),
    ("set-gid-directories", true, set_gid_directories),
    ("sticky-directories", true, sticky_directories),
    ("set-uid-cleared", true, set_uid_cleared),
    ("permissions", true, permissions),
    ("umask", false, umask),
    ("lists", true, lists),
    ("times", false, times),
    ("times-of-parents", false, times_of_parents),
    ("xattrs", false, xattr_rules),
    ("flock", false, flock),
    ("fcntl-locks", false, fcntl_locks),
    ("statfs", false, statfs),
    ("large-directory", false, large_directory),
    ("directory-entries", false, directory_entries),
    ("removed-directory", false, removed_directory),
    ("deep", false, deep),
    ("unnamed", false, unnamed),
];

/// The errno of what failed; 0 for success.
pub fn errno<T>(result: std::io::Result<T>) -> i32 {
    result.map_or_else(|e| e.raw_os_error().unwrap_or(-1), |_| 0)
}

pub fn raw<T>(result: rustix::io::Result<T>) -> i32 {
    result.map_or_else(Errno::raw_os_error, |_| 0)
}

// ---- names -----------------------------------------------------------------------------------

fn rename_below(p: &Place) {
    fs::create_dir_all(p.at("a/b")).unwrap();
    let mut file = File::create(p.at("a/b/open")).unwrap();
    file.write_all(b"one ").unwrap();
    let dir = File::open(p.at("a/b")).unwrap();
    fs::rename(p.at("a"), p.at("moved")).unwrap();
    file.write_all(b"two").unwrap();
    assert_eq!(fs::read(p.at("moved/b/open")).unwrap(), b"one two");
    let made = rustix::fs::openat(
        &dir,
        "new",
        rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY,
        Mode::from_raw_mode(0o600),
    );
    drop(made.unwrap());
    assert!(p.at("moved/b/new").exists());
    assert!(!p.at("a").exists());
    fs::rename(p.at("moved/b/open"), p.at("out")).unwrap();
    file.write_all(b" three").unwrap();
    drop(file);
    assert_eq!(fs::read(p.at("out")).unwrap(), b"one two three");
    p.sync();
    assert_eq!(fs::read(p.served.join("out")).unwrap(), b"one two three");
}

fn rename_rules(p: &Place) {
    p.alike(|at| {
        for dir in ["full/below", "empty", "other"] {
            fs::create_dir_all(at.join(dir)).unwrap();
        }
        fs::write(at.join("file"), "file").unwrap();
        fs::write(at.join("victim"), "victim").unwrap();
        fs::hard_link(at.join("file"), at.join("twin")).unwrap();
        let rename = |from: &str, to: &str| errno(fs::rename(at.join(from), at.join(to)));
        let said = vec![
            rename("empty", "full"),
            rename("full", "full/below/deep"),
            rename("file", "empty"),
            rename("empty", "file"),
            rename("nothing", "file"),
            rename("file", "nowhere/file"),
            rename("file", "twin"),
            rename("file", "victim"),
            rename("other", "empty"),
            rename("full", "full"),
            rename("victim/", "x"),
        ];
        let names: BTreeSet<_> =
            fs::read_dir(at).unwrap().map(|it| it.unwrap().file_name()).collect();
        (said, names, fs::read(at.join("victim")).ok())
    });
}

fn rename_flags(p: &Place) {
    fs::write(p.at("one"), "1").unwrap();
    fs::create_dir(p.at("two")).unwrap();
    fs::write(p.at("two/below"), "2").unwrap();
    let flagged = |from: &str, to: &str, flags| {
        rustix::fs::renameat_with(CWD, p.at(from), CWD, p.at(to), flags)
    };
    assert_eq!(flagged("one", "two", RenameFlags::NOREPLACE), Err(Errno::EXIST));
    assert_eq!(flagged("one", "none", RenameFlags::EXCHANGE), Err(Errno::NOENT));
    let inodes = |name: &str| fs::metadata(p.at(name)).unwrap().ino();
    let (one, two) = (inodes("one"), inodes("two"));
    flagged("one", "two", RenameFlags::EXCHANGE).unwrap();
    assert_eq!((inodes("two"), inodes("one")), (one, two));
    assert_eq!(fs::read(p.at("one/below")).unwrap(), b"2");
    flagged("two", "three", RenameFlags::NOREPLACE).unwrap();
    assert_eq!(fs::read(p.at("three")).unwrap(), b"1");
    p.sync();
    assert_eq!(fs::read(p.served.join("one/below")).unwrap(), b"2");
}

fn name_lengths(p: &Place) {
    let longest = "x".repeat(255);
    fs::write(p.at(&longest), "longest").unwrap();
    assert_eq!(fs::read(p.at(&longest)).unwrap(), b"longest");
    p.alike(|at| {
        let too_long = at.join("x".repeat(256));

        [
            errno(File::create(&too_long)),
            errno(fs::create_dir(&too_long)),
            errno(fs::metadata(&too_long)),
            errno(symlink("x", &too_long)),
        ]
    });
    fs::write(p.dir.join(every_byte()), "every").unwrap();
    fs::rename(p.dir.join(every_byte()), p.at(&longest)).unwrap();
    assert_eq!(fs::read(p.at(&longest)).unwrap(), b"every");
    fs::create_dir(p.dir.join(every_byte())).unwrap();
}

fn wrong_types(p: &Place) {
    let said = p.alike(|at| {
        fs::create_dir_all(at.join("dir/full")).unwrap();
        fs::write(at.join("file"), "file").unwrap();
        let result = vec![
            errno(fs::remove_file(at.join("dir"))),
            errno(fs::remove_dir(at.join("file"))),
            errno(fs::remove_dir(at.join("dir"))),
            errno(fs::create_dir(at.join("dir"))),
            errno(fs::create_dir(at.join("file"))),
            errno(fs::read_dir(at.join("file"))),
            errno(File::options().write(true).open(at.join("dir"))),
            errno(File::create(at.join("file/below"))),
            errno(File::create(at.join("none/below"))),
            errno(fs::hard_link(at.join("dir"), at.join("link"))),
            errno(fs::hard_link(at.join("file"), at.join("dir"))),
            errno(fs::remove_file(at.join("none"))),
            errno(fs::remove_dir(at.join("none"))),
            errno(fs::remove_dir(at.join("dir/."))),
            errno(fs::read_link(at.join("file"))),
            errno(symlink("x", at.join("file"))),
        ];
        result
    });
    assert!(!said.contains(&0), "{said:?}");
}

fn symlinks(p: &Place) {
    let long = "t".repeat(4000);
    symlink(&long, p.at("long")).unwrap();
    assert_eq!(fs::read_link(p.at("long")).unwrap().as_os_str(), long.as_str());
    assert_eq!(fs::symlink_metadata(p.at("long")).unwrap().len(), 4000);
    p.alike(|at| {
        symlink("loop", at.join("loop")).unwrap();
        symlink("nowhere", at.join("dangling")).unwrap();
        fs::write(at.join("file"), "file").unwrap();
        symlink("file", at.join("good")).unwrap();
        fs::hard_link(at.join("good"), at.join("good2")).unwrap();
        let nofollow = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).to_owned();
        let result = (
            errno(File::open(at.join("loop"))),
            errno(File::open(at.join("dangling"))),
            errno(nofollow.open(at.join("good"))),
            errno(symlink("", at.join("empty"))),
            fs::read(at.join("good2")).unwrap(),
            fs::symlink_metadata(at.join("good")).unwrap().mode(),
            fs::symlink_metadata(at.join("good")).unwrap().nlink(),
        );
        // creating through a dangling link makes its target
        fs::write(at.join("dangling"), "now there").unwrap();
        (result, fs::read(at.join("nowhere")).unwrap())
    });
}

fn hard_links(p: &Place) {
    const COUNT: u64 = 300;
    fs::write(p.at("first"), "first").unwrap();
    let ino = fs::metadata(p.at("first")).unwrap().ino();
    for i in 1..COUNT {
        fs::hard_link(p.at("first"), p.at(&format!("name{i}"))).unwrap();
    }
    let meta = fs::metadata(p.at("name7")).unwrap();
    assert_eq!((meta.nlink(), meta.ino()), (COUNT, ino));
    fs::write(p.at("name8"), "through another name").unwrap();
    fs::remove_file(p.at("first")).unwrap();
    assert_eq!(fs::read(p.at("name9")).unwrap(), b"through another name");
    assert_eq!(fs::metadata(p.at("name1")).unwrap().nlink(), COUNT - 1);
    fs::create_dir(p.at("below")).unwrap();
    fs::rename(p.at("name1"), p.at("below/name1")).unwrap();
    p.sync();
    assert_eq!(fs::metadata(p.served.join("below/name1")).unwrap().nlink(), COUNT - 1);
    // two names of one object: a rename does nothing
    fs::rename(p.at("name2"), p.at("name3")).unwrap();
    assert!(p.at("name2").exists() && p.at("name3").exists());
}

// ---- special files ---------------------------------------------------------------------------

fn special(p: &Place) {
    let device = rustix::fs::makedev(1, 5);
    let mode = Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(CWD, p.at("zero"), FileType::CharacterDevice, mode, device).unwrap();
    let meta = fs::metadata(p.at("zero")).unwrap();
    assert!(meta.file_type().is_char_device());
    assert_eq!((meta.rdev(), meta.mode() & 0o7777), (device, 0o600));
    let mut bytes = [1; 16];
    File::open(p.at("zero")).unwrap().read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, [0; 16]);
    rustix::fs::mknodat(CWD, p.at("plain"), FileType::RegularFile, mode, 0).unwrap();
    fs::write(p.at("plain"), "a file by mknod").unwrap();
    let large = rustix::fs::makedev(240, 70_000);
    rustix::fs::mknodat(CWD, p.at("block"), FileType::BlockDevice, mode, large).unwrap();
    chown(p.at("block"), Some(5), Some(6)).unwrap();
    assert_eq!(fs::metadata(p.at("block")).unwrap().rdev(), large);
}

fn fifo(p: &Place) {
    let mode = Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(CWD, p.at("fifo"), FileType::Fifo, mode, 0).unwrap();
    let path = p.at("fifo");
    let writer = std::thread::spawn(move || {
        File::options().write(true).open(path).unwrap().write_all(b"through").unwrap();
    });
    let mut text = String::new();
    File::open(p.at("fifo")).unwrap().read_to_string(&mut text).unwrap();
    writer.join().unwrap();
    assert_eq!(text, "through");
}

fn socket(p: &Place) {
    use std::os::unix::net::{UnixListener, UnixStream};
    let listener = UnixListener::bind(p.at("s")).unwrap();
    let mut stream = UnixStream::connect(p.at("s")).unwrap();
    stream.write_all(b"x").unwrap();
    let mut byte = [0];
    listener.accept().unwrap().0.read_exact(&mut byte).unwrap();
    assert!(fs::metadata(p.at("s")).unwrap().file_type().is_socket());
}

// ---- permissions -----------------------------------------------------------------------------

/// Mode and owner.
fn rights(path: &Path) -> (u32, u32, u32) {
    let meta = fs::symlink_metadata(path).unwrap();
    (meta.mode(), meta.uid(), meta.gid())
}

fn set_gid_directories(p: &Place) {
    p.alike(|at| {
        let dir = at.join("dir");
        fs::create_dir(&dir).unwrap();
        chown(&dir, Some(0), Some(1234)).unwrap();
        fs::set_permissions(&dir, Permissions::from_mode(0o2777)).unwrap();
        File::create(dir.join("file")).unwrap();
        fs::create_dir(dir.join("dir")).unwrap();
        symlink("x", dir.join("link")).unwrap();
        let script = "cd $1; umask 022; echo x > other; mkdir otherdir; chmod 2755 other; true";
        as_nobody(&["sh", "-c", script, "sh", dir.to_str().unwrap()]).output().unwrap();
        ["file", "dir", "link", "other", "otherdir"].map(|name| rights(&dir.join(name)))
    });
}

fn sticky_directories(p: &Place) {
    p.alike(|at| {
        let dir = at.join("dir");
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, Permissions::from_mode(0o1777)).unwrap();
        fs::write(dir.join("root's"), "r").unwrap();
        fs::write(dir.join("nobody's"), "n").unwrap();
        chown(dir.join("nobody's"), Some(NOBODY), Some(NOBODY)).unwrap();
        let tries = ["rm -f \"root's\"", "mv \"root's\" x", "mv \"nobody's\" y", "rm y"];
        tries.map(|what| {
            let words = ["sh", "-c", &format!("cd $1 && {what}"), "sh", dir.to_str().unwrap()];
            as_nobody(&words).output().unwrap().status.code()
        })
    });
    assert!(p.at("dir/root's").exists());
}

fn set_uid_cleared(p: &Place) {
    // what is done by nobody to a file of these bits, and by root
    let deeds = [
        ("echo x >> $1", true),
        ("echo x > $1", true),
        ("truncate -s 3 $1", true),
        ("dd if=/dev/zero of=$1 bs=4096 count=1 conv=notrunc 2>/dev/null", true),
        ("chgrp 65534 $1", true),
        ("echo x >> $1", false),
        ("chown 5 $1", false),
        ("chmod 6700 $1", false),
    ];
    for (deed, by_nobody) in deeds {
        for mode in [0o6777, 0o4777, 0o2777, 0o2767] {
            let found = p.alike(|at| {
                let path = at.join("file");
                fs::write(&path, "content").unwrap();
                chown(&path, Some(NOBODY), Some(0)).unwrap();
                fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
                let words = ["sh", "-c", deed, "sh", path.to_str().unwrap()];
                let out = match by_nobody {
                    true => as_nobody(&words).output().unwrap(),
                    false => command(&words).output().unwrap(),
                };
                let found = (out.status.code(), fs::metadata(&path).unwrap().mode());
                fs::remove_file(&path).unwrap();
                (deed, by_nobody, mode, found)
            });
            assert_ne!(found.3.0, Some(127), "{found:?}");
        }
    }
}

fn permissions(p: &Place) {
    p.alike(|at| {
        fs::write(at.join("secret"), "s").unwrap();
        fs::set_permissions(at.join("secret"), Permissions::from_mode(0o600)).unwrap();
        fs::write(at.join("public"), "p").unwrap();
        fs::set_permissions(at.join("public"), Permissions::from_mode(0o644)).unwrap();
        fs::create_dir(at.join("closed")).unwrap();
        fs::set_permissions(at.join("closed"), Permissions::from_mode(0o700)).unwrap();
        fs::set_permissions(at, Permissions::from_mode(0o755)).unwrap();
        let tries = [
            "cat secret",
            "cat public",
            "echo x >> public",
            "echo x > new",
            "ls closed",
            "cat closed/x",
            "chmod 777 public",
            "chown 65534 public",
            "touch public",
            "rm -f public",
            "mv public x",
            "ln -s x y",
            "setfattr -n user.x -v y public",
            "mkdir d",
            "getfattr -n trusted.imz public",
            "truncate -s 0 public",
            "test -w public",
        ];
        tries.map(|what| {
            let words = ["sh", "-c", &format!("cd $1 && {what}"), "sh", at.to_str().unwrap()];
            let good = as_nobody(&words).output().unwrap().status.success();
            (what, good)
        })
    });
}

fn umask(p: &Place) {
    p.alike(|at| {
        let script = "cd $1; for m in 000 022 077 177 777; do umask $m; : > file$m; mkdir dir$m; \
                      mkfifo fifo$m; done; umask 000; chmod 0 file777";
        run(&["sh", "-c", script, "sh", at.to_str().unwrap()]);
        ["000", "022", "077", "177", "777"]
            .map(|m| ["file", "dir", "fifo"].map(|kind| rights(&at.join(format!("{kind}{m}")))))
    });
}

fn lists(p: &Place) {
    p.alike(|at| {
        let dir = at.join("dir");
        fs::create_dir(&dir).unwrap();
        set_xattr(&dir, "system.posix_acl_default", &acl(3000));
        set_xattr(&dir, "system.posix_acl_access", &acl(4000));
        let script = "cd $1; for m in 000 022 077; do umask $m; : > file$m; mkdir -p dir$m/below; \
                      mkfifo fifo$m; done; chmod 750 dir022; chmod 640 file022";
        run(&["sh", "-c", script, "sh", dir.to_str().unwrap()]);
        set_xattr(&dir.join("file000"), "system.posix_acl_access", &acl(5000));
        let mut found = Vec::new();
        for m in ["000", "022", "077"] {
            for kind in ["file", "dir", "fifo"] {
                let path = dir.join(format!("{kind}{m}"));
                found.push((rights(&path), xattrs(&path)));
            }
            let below = dir.join(format!("dir{m}/below"));
            found.push((rights(&below), xattrs(&below)));
        }
        let bad =
            rustix::fs::setxattr(&dir, "system.posix_acl_access", b"bad", XattrFlags::empty());
        rustix::fs::removexattr(&dir, "system.posix_acl_default").unwrap();
        found.push((rights(&dir), xattrs(&dir)));
        (found, raw(bad))
    });
    // the kernel decides by them
    let granted = p.at("granted");
    fs::write(&granted, "for nobody").unwrap();
    let list = acl(NOBODY);
    set_xattr(&granted, "system.posix_acl_access", &list);
    fs::set_permissions(&granted, Permissions::from_mode(0o660)).unwrap();
    let read = as_nobody(&["cat", granted.to_str().unwrap()]).output().unwrap();
    assert_eq!(read.stdout, b"for nobody");
}

// ---- times and attributes --------------------------------------------------------------------

fn times(p: &Place) {
    let moments = [
        (0, 0),
        (-1, 0),
        (-1, 999_999_999),
        (-86_400 * 365 * 50, 123_456_789),
        (1 << 31, 5),
        ((1 << 33) + 77, 999_999_999),
        (1_700_000_000, 1),
    ];
    for (seconds, nanoseconds) in moments {
        fs::write(p.at("file"), "x").unwrap();
        set_mtime(&p.at("file"), seconds, nanoseconds);
        let meta = fs::metadata(p.at("file")).unwrap();
        assert_eq!((meta.mtime(), meta.mtime_nsec()), (seconds, nanoseconds));
        assert_eq!((meta.atime(), meta.atime_nsec()), (seconds, nanoseconds));
        p.sync();
        let meta = fs::metadata(p.served.join("file")).unwrap();
        assert_eq!((meta.mtime(), meta.mtime_nsec()), (seconds, nanoseconds), "at the server");
    }
    // one of the two, and now
    let time = |tv_sec, tv_nsec| rustix::fs::Timespec { tv_sec, tv_nsec };
    let set = |last_access, last_modification| {
        let times = rustix::fs::Timestamps { last_access, last_modification };
        rustix::fs::utimensat(CWD, p.at("file"), &times, AtFlags::empty()).unwrap();
        fs::metadata(p.at("file")).unwrap()
    };
    let meta = set(time(5, 6), time(0, rustix::fs::UTIME_OMIT));
    assert_eq!((meta.atime(), meta.atime_nsec(), meta.mtime()), (5, 6, 1_700_000_000));
    let meta = set(time(0, rustix::fs::UTIME_OMIT), time(0, rustix::fs::UTIME_NOW));
    assert_eq!(meta.atime(), 5);
    assert!(meta.mtime() > 1_700_000_000);
}

fn times_of_parents(p: &Place) {
    let times = |at: &Path| {
        let meta = fs::metadata(at).unwrap();
        ((meta.mtime(), meta.mtime_nsec()), (meta.ctime(), meta.ctime_nsec()))
    };
    p.alike(|at| {
        let dir = at.join("dir");
        fs::create_dir(&dir).unwrap();
        fs::write(at.join("outside"), "x").unwrap();
        let deeds: [(&str, &dyn Fn()); 8] = [
            ("create", &|| fs::write(dir.join("a"), "a").unwrap()),
            ("overwrite", &|| fs::write(dir.join("a"), "b").unwrap()),
            ("chmod", &|| {
                fs::set_permissions(dir.join("a"), Permissions::from_mode(0o600)).unwrap();
            }),
            ("link", &|| fs::hard_link(at.join("outside"), dir.join("l")).unwrap()),
            ("rename", &|| fs::rename(dir.join("a"), dir.join("b")).unwrap()),
            ("unlink", &|| fs::remove_file(dir.join("b")).unwrap()),
            ("mkdir", &|| fs::create_dir(dir.join("d")).unwrap()),
            ("rmdir", &|| fs::remove_dir(dir.join("d")).unwrap()),
        ];
        deeds.map(|(what, deed)| {
            set_mtime(&dir, 1000, 0);
            // a ctime is as coarse as the kernel's tick
            let before = times(&dir);
            std::thread::sleep(std::time::Duration::from_millis(12));
            deed();
            let after = times(&dir);
            let links = fs::metadata(&dir).unwrap().nlink();
            (what, before.0 != after.0, before.1 != after.1, links)
        })
    });
}

fn xattr_rules(p: &Place) {
    let set = |path: &Path, key: &str, value: &[u8], flags| {
        raw(rustix::fs::lsetxattr(path, key, value, flags))
    };
    let none = XattrFlags::empty();
    p.alike(|at| {
        let file = at.join("file");
        fs::write(&file, "x").unwrap();
        symlink("file", at.join("link")).unwrap();
        let mut small = [0; 2];
        let said = vec![
            set(&file, "user.a", b"value", none),
            set(&file, "user.a", b"value", XattrFlags::CREATE),
            set(&file, "user.b", b"value", XattrFlags::REPLACE),
            set(&file, "user.empty", b"", none),
            set(&file, "user.binary", &[0, 255, 10, 0], none),
            set(&file, &format!("user.{}", "k".repeat(251)), b"v", none),
            set(&file, &format!("user.{}", "k".repeat(250)), b"v", none),
            set(&file, "user.", b"v", none),
            set(&file, "noclass", b"v", none),
            set(&file, "user.large", &vec![1; 65_537], none),
            set(&at.join("link"), "user.a", b"v", none),
            raw(rustix::fs::lgetxattr(&file, "user.none", &mut [0; 10])),
            raw(rustix::fs::lgetxattr(&file, "user.a", &mut small)),
            raw(rustix::fs::lremovexattr(&file, "user.none")),
            raw(rustix::fs::lremovexattr(&file, "user.binary")),
        ];
        (said, xattrs(&file))
    });
    // imz's own attribute is nobody's business
    let file = p.at("file");
    let mut list = vec![0; 4096];
    let len = rustix::fs::listxattr(&file, &mut list[..]).unwrap();
    assert!(!String::from_utf8_lossy(&list[..len]).contains(".imz"));
    for key in ["trusted.imz", "user.imz"] {
        let mut value = vec![0; 4096];
        let own = rustix::fs::getxattr(&file, key, &mut value[..]);
        assert!(own.is_err(), "{key} is shown");
        let _ = rustix::fs::setxattr(&file, key, b"nonsense", none);
    }
    p.sync();
    assert_eq!(xattrs(&p.served.join("file")), xattrs(&file));
}

// ---- locks -----------------------------------------------------------------------------------

/// The file that `lock_probe` is to look at.
pub const PROBED: &str = "IMZ_LOCK_PROBE";

/// What this process gets of the locks that others hold on a file.
pub fn probe(file: &File) -> String {
    let got = |ok: bool| if ok { "free" } else { "taken" };
    let flock = rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).is_ok();
    let fcntl = rustix::fs::fcntl_lock(file, FlockOperation::NonBlockingLockExclusive).is_ok();
    format!("probed: flock {}, fcntl {}", got(flock), got(fcntl))
}

/// The same of another process.
fn probe_elsewhere(path: &Path) -> String {
    let me = std::env::current_exe().unwrap();
    let mut other = command(&[me.as_os_str(), "--exact".as_ref(), "lock_probe".as_ref()]);
    other.arg("--nocapture").env(PROBED, path).env_remove(super::INNER);
    let said = crate::common::succeed(&mut other);
    let line = said.lines().find_map(|it| it.split_once("probed: "));
    line.unwrap_or_else(|| panic!("{said}")).1.to_owned()
}

fn flock(p: &Place) {
    p.alike(|at| {
        let path = at.join("file");
        let file = File::create(&path).unwrap();
        let free = probe_elsewhere(&path);
        rustix::fs::flock(&file, FlockOperation::LockExclusive).unwrap();
        let taken = probe_elsewhere(&path);
        let second = File::open(&path).unwrap();
        let again = rustix::fs::flock(&second, FlockOperation::NonBlockingLockShared).is_ok();
        rustix::fs::flock(&file, FlockOperation::LockShared).unwrap();
        let shared = rustix::fs::flock(&second, FlockOperation::NonBlockingLockShared).is_ok();
        drop((file, second));
        (free, taken, again, shared, probe_elsewhere(&path))
    });
}

fn fcntl_locks(p: &Place) {
    p.alike(|at| {
        let path = at.join("file");
        let file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
        rustix::fs::fcntl_lock(&file, FlockOperation::LockExclusive).unwrap();
        let taken = probe_elsewhere(&path);
        rustix::fs::fcntl_lock(&file, FlockOperation::Unlock).unwrap();
        let free = probe_elsewhere(&path);
        rustix::fs::fcntl_lock(&file, FlockOperation::LockExclusive).unwrap();
        drop(file);
        (taken, free, probe_elsewhere(&path))
    });
}

// ---- directories -----------------------------------------------------------------------------

fn statfs(p: &Place) {
    let stat = rustix::fs::statvfs(&p.dir).unwrap();
    assert_eq!(stat.f_namemax, 255);
    assert!(stat.f_blocks > 0 && stat.f_bfree <= stat.f_blocks && stat.f_bavail <= stat.f_bfree);
    assert!(stat.f_files > 0 && stat.f_ffree <= stat.f_files);
    assert!(stat.f_frsize >= 512);
    run(&["df", p.dir.to_str().unwrap()]);
}

fn large_directory(p: &Place) {
    const COUNT: usize = 20_000;
    for i in 0..COUNT {
        File::create(p.at(&format!("{i:05}"))).unwrap();
    }
    // every second one is removed as it comes; the others must come once each
    let mut kept = BTreeSet::new();
    let mut seen = 0;
    for entry in fs::read_dir(&p.dir).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        seen += 1;
        if name.parse::<usize>().unwrap() % 2 == 0 {
            fs::remove_file(p.at(&name)).unwrap();
        } else {
            assert!(kept.insert(name), "an entry came twice");
        }
    }
    assert_eq!((seen, kept.len()), (COUNT, COUNT / 2));
    assert_eq!(fs::read_dir(&p.dir).unwrap().count(), COUNT / 2);
    for entry in fs::read_dir(&p.dir).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    assert_eq!(fs::read_dir(&p.dir).unwrap().count(), 0);
}

fn directory_entries(p: &Place) {
    fs::create_dir(p.at("dir")).unwrap();
    fs::write(p.at("file"), "x").unwrap();
    symlink("x", p.at("link")).unwrap();
    let dir = File::open(&p.dir).unwrap();
    let mut names = BTreeSet::new();
    for entry in rustix::fs::Dir::read_from(&dir).unwrap().map(Result::unwrap) {
        let name = entry.file_name().to_str().unwrap().to_owned();
        let meta = fs::symlink_metadata(p.at(&name)).unwrap();
        if name != ".." {
            assert_eq!(entry.ino(), meta.ino(), "{name}");
        }
        assert_eq!(entry.file_type() == FileType::Directory, meta.is_dir(), "{name}");
        assert_eq!(entry.file_type() == FileType::Symlink, meta.is_symlink(), "{name}");
        names.insert(name);
    }
    assert_eq!(names, BTreeSet::from([".", "..", "dir", "file", "link"].map(str::to_owned)));
}

fn removed_directory(p: &Place) {
    p.alike(|at| {
        fs::create_dir(at.join("gone")).unwrap();
        let dir = File::open(at.join("gone")).unwrap();
        fs::remove_dir(at.join("gone")).unwrap();
        let mode = Mode::from_raw_mode(0o700);
        let flags = rustix::fs::OFlags::CREATE;

        [
            raw(rustix::fs::mkdirat(&dir, "x", mode)),
            raw(rustix::fs::openat(&dir, "x", flags, mode)),
            raw(rustix::fs::statat(&dir, "x", AtFlags::empty())),
        ]
    });
}

fn deep(p: &Place) {
    let mut path = p.dir.clone();
    for i in 0..120 {
        path.push(format!("level-{i:03}-{}", "d".repeat(10)));
        fs::create_dir(&path).unwrap();
    }
    fs::write(path.join("bottom"), "bottom").unwrap();
    fs::rename(p.at("level-000-dddddddddd"), p.at("top")).unwrap();
    let below = path.strip_prefix(p.at("level-000-dddddddddd")).unwrap();
    assert_eq!(fs::read(p.at("top").join(below).join("bottom")).unwrap(), b"bottom");
}

/// O_TMPFILE: FUSE may say that it has none, and programs then do without.
/// O_TMPFILE: a file without a name, which may get one.
fn unnamed(p: &Place) {
    let made = |at: &Path, flags| {
        let mut options = File::options();
        options.read(true).write(true).mode(0o640).custom_flags(libc::O_TMPFILE | flags);
        options.open(at).unwrap()
    };
    let named = |file: &File, path: &Path| {
        let own = format!("/proc/self/fd/{}", file.as_raw_fd());
        rustix::fs::linkat(CWD, own, CWD, path, AtFlags::SYMLINK_FOLLOW)
    };
    p.alike(|at| {
        let mut file = made(at, 0);
        file.write_all(b"without a name").unwrap();
        let before = file.metadata().unwrap();
        let none = fs::read_dir(at).unwrap().count();
        file.set_len(7).unwrap();
        let kept = made(at, libc::O_EXCL);
        let refused = raw(named(&kept, &at.join("kept")));
        let said = raw(named(&file, &at.join("named")));
        let again = raw(named(&file, &at.join("twin")));
        let twice = raw(named(&file, &at.join("named")));
        let after = file.metadata().unwrap();
        let text = fs::read(at.join("named")).unwrap();
        (before.nlink(), none, refused, said, again, twice, after.nlink(), after.mode(), text)
    });
    let file = made(&p.dir, 0);
    rustix::fs::fsetxattr(&file, "user.mark", b"here", XattrFlags::empty()).unwrap();
    file.set_permissions(Permissions::from_mode(0o604)).unwrap();
    named(&file, &p.at("marked")).unwrap();
    (&file).write_all(b"and more").unwrap();
    drop(file);
    drop(made(&p.dir, 0));
    p.sync();
    assert_eq!(fs::read(p.served.join("named")).unwrap(), b"without");
    assert_eq!(fs::metadata(p.served.join("named")).unwrap().nlink(), 2);
    assert_eq!(fs::read(p.served.join("marked")).unwrap(), b"and more");
    let meta = fs::metadata(p.served.join("marked")).unwrap();
    assert_eq!(meta.mode() & 0o7777, 0o604);
    let attributes = xattrs(&p.served.join("marked"));
    assert_eq!(attributes.get(&b"user.mark"[..]).map(Vec::as_slice), Some(&b"here"[..]));
    assert_eq!(fs::read_dir(&p.served).unwrap().count(), 3);
}
