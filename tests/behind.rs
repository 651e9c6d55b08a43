//! What somebody changes in a served directory while its server is stopped: clients see it.
//!
//! `IMZ_BEHIND_FILES=100000 cargo test --release --test behind -- --nocapture` says what the look at a
//! tree costs a start.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use common::compare::compare;
use common::{AMPLE, Disk, Mount, Server, wait_for};
use imz::kml::record::ROOT;
use imz::replica::volume::Volume;

fn agree(mount: &Mount, server: &Server) {
    let differing = compare(mount.path(), server.dir());
    assert!(differing.is_empty(), "{differing:#?}");
}

fn read_all(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
    entries
        .map(|entry| match entry.file_type().unwrap().is_dir() {
            true => 1 + read_all(&entry.path()),
            false => fs::read(entry.path()).map_or(0, |_| 1),
        })
        .sum()
}

#[test]
fn what_changes_while_nobody_serves_is_seen_by_clients() {
    let Some(disk) = Disk::new(AMPLE) else { return };
    let served = disk.dir("served");
    fs::create_dir_all(served.join("never/looked/at")).unwrap();
    let mut server = Server::start(&disk);
    let here = Mount::start(&server, &disk, "here");
    let mut away = Mount::start(&server, &disk, "away");
    fs::create_dir_all(here.at("d/e")).unwrap();
    for name in ["same", "longer", "mode", "removed", "moved", "linked", "e/deep", "mine"] {
        fs::write(here.at("d").join(name), format!("{name}, as it was")).unwrap();
    }
    fs::write(here.at("top"), b"top").unwrap();
    here.sync();
    let count = read_all(away.path());
    assert_eq!(count, read_all(here.path()));
    away.umount();
    for round in 0..2 {
        server.stop();
        // a change of a client that is not shipped goes with those that are found
        fs::write(here.at("d/mine"), format!("mine, round {round}")).unwrap();
        let at = |name: &str| served.join("d").join(name);
        fs::write(at("same"), format!("SAME, as it w{round}s")).unwrap();
        fs::write(at("longer"), format!("longer{:1$}", "", round + 50)).unwrap();
        fs::set_permissions(at("mode"), Permissions::from_mode(0o640 + round as u32)).unwrap();
        if round == 0 {
            fs::remove_file(at("removed")).unwrap();
            fs::rename(at("moved"), served.join("renamed")).unwrap();
            fs::hard_link(at("linked"), at("e/link")).unwrap();
            fs::create_dir_all(at("new/dir")).unwrap();
            fs::rename(at("e"), served.join("e-moved")).unwrap();
        }
        fs::write(at(&format!("new/dir/file-{round}")), b"of somebody").unwrap();
        fs::write(served.join(format!("never/looked/at/{round}")), b"of somebody").unwrap();
        server.restart();
        wait_for("it is connected", 30, || here.is_connected());
        here.sync();
        let text = |name: &str| fs::read_to_string(here.at("d").join(name)).unwrap();
        assert_eq!(text("same"), format!("SAME, as it w{round}s"));
        assert_eq!(text("mine"), format!("mine, round {round}"));
        agree(&here, &server);
        away.again();
        agree(&away, &server);
        away.umount();
        here.no_conflicts();
        let said = server.said();
        assert!(said.contains("were changed while it was not served"), "{said}");
    }
    // nothing has changed, and nothing is said to have
    let before = server.said().len();
    server.stop();
    server.restart();
    let said = server.said()[before..].to_owned();
    assert!(!said.contains("changed"), "{said}");
    agree(&here, &server);

    // killed: what was added or taken away is seen
    server.kill();
    fs::write(served.join("d/added"), b"while it was dead").unwrap();
    fs::remove_file(served.join("d/mode")).unwrap();
    server.restart();
    wait_for("it is connected", 30, || here.is_connected());
    here.sync();
    assert_eq!(fs::read(here.at("d/added")).unwrap(), b"while it was dead");
    agree(&here, &server);
    here.no_conflicts();
}

/// On a disk with room for a part of the records that this takes.
#[test]
fn all_of_a_tree_is_changed_on_a_disk_that_is_nearly_full() {
    let Some(disk) = Disk::with_files(96, 30_000) else { return };
    let served = disk.dir("served");
    let name = |n: u64| served.join(format!("{:02}/{n:0100}", n / 500));
    (0..48).for_each(|n| fs::create_dir(served.join(format!("{n:02}"))).unwrap());
    (0..24_000).for_each(|n| fs::write(name(n), b"").unwrap());
    let open = || Volume::open(&served, None, "v").unwrap();
    let mut volume = open();
    for (_, dir) in volume.list(ROOT, b"").unwrap().entries {
        let mut after = Vec::new();
        loop {
            let page = volume.list(dir.fid, &after).unwrap();
            after = page.entries.last().unwrap().0.clone();
            if !page.more {
                break;
            }
        }
    }
    volume.close().unwrap();
    let space = rustix::fs::statvfs(disk.path()).unwrap();
    let free = space.f_bfree * space.f_frsize; // root may take nearly all of it
    fs::write(disk.path().join("full"), vec![7; (free - (4 << 20)) as usize]).unwrap();
    (0..24_000).for_each(|n| fs::set_permissions(name(n), Permissions::from_mode(0o600)).unwrap());
    open().close().unwrap();
}

/// One directory that takes no stamp: all else is served, and clients see what is in it.
#[test]
fn what_cannot_be_stamped_keeps_nothing_from_being_served() {
    let Some(disk) = Disk::new(AMPLE) else { return };
    let served = disk.dir("served");
    fs::create_dir_all(served.join("d")).unwrap();
    fs::write(served.join("d/f"), b"as it was").unwrap();
    fs::write(served.join("moved"), b"as it was").unwrap();
    let mut server = Server::start(&disk);
    let here = Mount::start(&server, &disk, "here");
    fs::write(here.at("d/mine"), b"mine").unwrap();
    here.sync();
    assert_eq!(read_all(here.path()), 4);
    let immutable = |flag: &str| {
        let done = Command::new("chattr").arg(flag).arg(served.join("d")).status();
        done.is_ok_and(|it| it.success())
    };
    server.stop();
    fs::rename(served.join("moved"), served.join("d/g")).unwrap();
    if !immutable("+i") {
        eprintln!("skipped: chattr(1) is not there, or makes nothing immutable");
        return;
    }
    server.restart();
    let said = server.said();
    server.stop();
    server.restart();
    assert!(immutable("-i"));
    assert!(said.contains("Operation not permitted"), "{said}");
    wait_for("it is connected", 30, || here.is_connected());
    here.sync();
    agree(&here, &server);
}

#[test]
fn a_look_at_a_large_tree() {
    let Ok(count) = std::env::var("IMZ_BEHIND_FILES") else { return };
    let count: u64 = count.parse().unwrap();
    let Some(disk) = Disk::with_files(AMPLE, count * 21 / 10 + 10_000) else { return };
    let served = disk.dir("served");
    for n in 0..count {
        let dir = served.join(format!("{:03}", n / 500));
        if n % 500 == 0 {
            fs::create_dir(&dir).unwrap();
        }
        fs::write(dir.join(format!("file-{n}")), b"").unwrap();
    }
    let mut server = Server::start(&disk);
    let mut mount = Mount::start(&server, &disk, "a");
    read_all(mount.path());
    mount.umount();
    server.stop();
    for cold in [false, true] {
        if cold {
            fs::write("/proc/sys/vm/drop_caches", b"3").unwrap();
        }
        let (before, begun) = (server.said().len(), Instant::now());
        server.restart();
        let ms = begun.elapsed().as_millis();
        eprintln!("cold {cold}: a start in {ms} ms: {}", &server.said()[before..]);
        server.stop();
    }
}
