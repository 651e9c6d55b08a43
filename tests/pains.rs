//! What hurts the users of write-back systems, one test each: lost and wedged queues, full disks,
//! files that multiply.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::cable::Cable;
use common::compare::assert_same;
use common::{Disk, Mount, Server, imz_run, wait_for};
use serde_json::Value;

const MIB: usize = 1 << 20;

fn away(mount: &Mount) {
    wait_for("the mount sees that the server is away", 15, || !mount.is_connected());
}

fn back(mount: &Mount) {
    wait_for("the mount is connected again", 30, || mount.is_connected());
}

fn conflicts(mount: &Mount) -> Vec<Value> {
    let (code, text) = imz_run(&["conflicts", "list", "--json", mount.path().to_str().unwrap()]);
    assert_eq!(code, 0, "{text}");
    serde_json::from_str(&text).unwrap()
}

/// Contents of all files that are kept for conflicts.
fn preserved(server: &Server) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    let mut dirs = vec![server.dir().join(".imz-conflicts")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if !path.file_name().unwrap().to_str().unwrap().starts_with("record") {
                found.push(fs::read(path).unwrap());
            }
        }
    }
    found.sort();
    found
}

#[test]
fn a_rename_over_a_file_that_is_being_uploaded() {
    let Some(disk) = Disk::new(1024) else { return };
    let server = Server::start(&disk);
    let cable = Cable::to(server.port());
    let a = Mount::with(cable.source(), &disk.dir("a"), "age=10ms");
    let b = Mount::start(&server, &disk, "b");
    cable.limit(16 << 20);
    for round in 0..3u8 {
        fs::write(a.at("large"), vec![round; 24 * MIB]).unwrap();
        // until the server is in the midst of it
        wait_for("the upload to begin", 20, || {
            let spool = fs::read_dir(server.dir().join(".imz/spool")).unwrap();
            spool.flatten().any(|entry| entry.file_name() != "lock")
        });
        assert!(a.pending() > 0);
        fs::write(a.at("small"), [b'a' + round; 5]).unwrap();
        match round {
            0 => fs::rename(a.at("small"), a.at("large")).unwrap(),
            1 => {
                fs::rename(a.at("large"), a.at("moved")).unwrap();
                fs::rename(a.at("small"), a.at("large")).unwrap();
            }
            _ => {
                // a new large one, in the way of editors
                fs::write(a.at("temp"), vec![99; 3 * MIB]).unwrap();
                fs::rename(a.at("temp"), a.at("large")).unwrap();
            }
        }
    }
    cable.limit(0);
    a.sync();
    assert_eq!(fs::read(b.at("moved")).unwrap(), vec![1; 24 * MIB]);
    assert_eq!(fs::read(b.at("large")).unwrap(), vec![99; 3 * MIB]);
    assert_eq!(fs::read(b.at("small")).unwrap(), b"ccccc");
    b.sync();
    assert_same(a.path(), b.path());
    assert_same(a.path(), server.dir());
    a.no_conflicts();
    let spool = fs::read_dir(server.dir().join(".imz/spool")).unwrap().count();
    assert_eq!(spool, 1, "the lock alone");
}

/// A queue of `count` files, of which the first one's name is taken; how long it took to arrive.
fn queue_behind_a_conflict(count: usize) -> Option<Duration> {
    let disk = Disk::new(2048)?;
    let server = Server::start(&disk);
    let cable = Cable::to(server.port());
    let a = Mount::start(&server, &disk, "a");
    let b = Mount::with(cable.source(), &disk.dir("b"), "");
    assert_eq!(fs::read_dir(b.path()).unwrap().count(), 0);
    cable.cut();
    away(&b);
    fs::write(b.at("first"), "of b").unwrap();
    for no in 0..count / 100 {
        fs::create_dir(b.at(format!("{no}"))).unwrap();
        for file in 1..100 {
            File::create(b.at(format!("{no}/{file}"))).unwrap();
        }
    }
    assert!(b.pending() as usize >= count);
    fs::write(a.at("first"), "of a").unwrap();
    a.sync();
    cable.mend();
    let begun = Instant::now();
    b.sync();
    let took = begun.elapsed();
    assert_eq!(fs::read_to_string(b.at("first")).unwrap(), "of a");
    assert_eq!(preserved(&server), [b"of b"]);
    assert_eq!(conflicts(&b).len(), 1);
    assert_same(b.path(), a.path());
    assert_same(b.path(), server.dir());
    Some(took)
}

#[test]
fn a_conflict_on_the_first_record_of_a_queue_of_ten_thousand() {
    let Some(short) = queue_behind_a_conflict(2_500) else { return };
    let long = queue_behind_a_conflict(10_000).unwrap();
    println!("2,500 records in {short:?}, 10,000 in {long:?}");
    // four times as much may take four times as long, and the machine may be busy with something
    assert!(long < short * 10 + Duration::from_secs(5), "{short:?} {long:?}");
}

#[test]
fn the_same_file_edited_on_three_clients_offline() {
    let Some(disk) = Disk::new(512) else { return };
    let server = Server::start(&disk);
    let cables: [Cable; 3] = std::array::from_fn(|_| Cable::to(server.port()));
    let mounts: [Mount; 3] = std::array::from_fn(|no| {
        Mount::with(cables[no].source(), &disk.dir(&format!("m{no}")), "")
    });
    let long = "a line that all have\n".repeat(5000);
    fs::write(mounts[0].at("file"), &long).unwrap();
    fs::write(mounts[0].at("saved"), "at first").unwrap();
    for mount in &mounts {
        assert_eq!(fs::read_to_string(mount.at("file")).unwrap(), long);
        assert_eq!(fs::read_to_string(mount.at("saved")).unwrap(), "at first");
        mount.sync();
    }
    cables.iter().for_each(Cable::cut);
    let text = |no: usize| format!("{long}by client {no}\n");
    for (no, mount) in mounts.iter().enumerate() {
        away(mount);
        // one in place, by a few bytes at the end; one as editors do, twice
        let mut file = File::options().append(true).open(mount.at("file")).unwrap();
        writeln!(file, "by client {no}").unwrap();
        drop(file);
        for turn in 0..2 {
            fs::write(mount.at(".saved.tmp"), format!("saved by {no}, turn {turn}")).unwrap();
            fs::rename(mount.at(".saved.tmp"), mount.at("saved")).unwrap();
        }
    }
    let order = [1, 2, 0];
    for no in order {
        cables[no].mend();
        back(&mounts[no]);
        mounts[no].sync();
    }
    for mount in &mounts {
        mount.sync();
        assert_eq!(fs::read_to_string(mount.at("file")).unwrap(), text(1), "the first one back");
        assert_eq!(fs::read_to_string(mount.at("saved")).unwrap(), "saved by 1, turn 1");
        wait_for("the count", 5, || mount.status()["conflicts"] == 4);
    }
    let want = [text(0), text(2), "saved by 0, turn 1".into(), "saved by 2, turn 1".into()];
    let mut want: Vec<Vec<u8>> = want.map(String::into_bytes).into();
    want.sort();
    let found = preserved(&server);
    assert!(found == want, "{:?}", found.iter().map(Vec::len).collect::<Vec<_>>());
    assert_same(mounts[0].path(), mounts[1].path());
    assert_same(mounts[0].path(), mounts[2].path());
    assert_same(mounts[0].path(), server.dir());
}

#[test]
fn a_rename_that_changes_the_case_alone() {
    let Some(disk) = Disk::new(512) else { return };
    let server = Server::start(&disk);
    let cable = Cable::to(server.port());
    let a = Mount::start(&server, &disk, "a");
    let b = Mount::with(cable.source(), &disk.dir("b"), "");
    let names = |dir: &Path| {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.starts_with(".imz"))
            .collect();
        names.sort();
        names
    };
    fs::write(a.at("readme"), "text").unwrap();
    assert_eq!(fs::read_to_string(b.at("readme")).unwrap(), "text");
    fs::rename(a.at("readme"), a.at("README")).unwrap();
    assert_eq!(names(b.path()), ["README"]);
    assert!(!b.at("readme").exists() && fs::read(b.at("README")).unwrap() == b"text");
    b.sync();
    a.sync();
    // away, and written to by the other one meanwhile
    cable.cut();
    away(&b);
    fs::rename(b.at("README"), b.at("ReadMe")).unwrap();
    fs::write(a.at("README"), "more text").unwrap();
    a.sync();
    cable.mend();
    back(&b);
    b.sync();
    for dir in [a.path(), b.path(), server.dir()] {
        assert_eq!(names(dir), ["ReadMe"]);
        assert_eq!(fs::read(dir.join("ReadMe")).unwrap(), b"more text");
    }
    a.no_conflicts();
    // two ways at once: the first one's name stays
    cable.cut();
    away(&b);
    fs::rename(b.at("ReadMe"), b.at("README")).unwrap();
    fs::rename(a.at("ReadMe"), a.at("readme")).unwrap();
    a.sync();
    cable.mend();
    back(&b);
    b.sync();
    for dir in [a.path(), b.path(), server.dir()] {
        assert_eq!(names(dir), ["readme"]);
    }
    assert_eq!(conflicts(&b).len(), 1);
}

/// Files of 1 MiB each, with their number in every byte.
fn write_files(dir: &Path, numbers: std::ops::Range<u8>) -> std::io::Result<u8> {
    let end = numbers.end;
    for no in numbers {
        let written = File::create(dir.join(format!("file{no}"))).and_then(|mut file| {
            file.write_all(&vec![no; MIB])?;
            file.sync_all()
        });
        match written {
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => return Ok(no),
            other => other?,
        }
    }
    Ok(end)
}

#[test]
fn a_disk_that_is_full_at_the_server() {
    let (Some(disk), Some(small)) = (Disk::new(512), Disk::new(64)) else { return };
    let server = Server::serve(&small.dir("served"), &disk.dir("state"));
    // with its room reserved, it would have been told at write(2)
    let a = Mount::with(server.source(), &disk.dir("a"), "age=100ms,reserve=off");
    let b = Mount::start(&server, &disk, "b");
    fs::write(a.at("before"), "is there").unwrap();
    a.sync();
    let filler = small.fill(6 << 20);
    assert_eq!(write_files(a.path(), 0..20).unwrap(), 20, "the client has room");
    fs::create_dir(a.at("dir")).unwrap();
    fs::write(a.at("dir/last"), "last").unwrap();
    wait_for("the client says what is wrong", 30, || {
        a.status()["last_error"].as_str().is_some_and(|it| it.contains("no room"))
    });
    let pending = a.pending();
    assert!(pending > 0);
    assert!(a.is_connected());
    let said = server.said();
    assert!(said.contains("there is no room left"), "{said}");
    assert!(said.lines().count() < 60, "it says so again and again: {said}");
    fs::remove_file(filler).unwrap();
    let begun = Instant::now();
    wait_for("it to go on by itself", 60, || a.pending() == 0);
    println!("{pending} records went on {:?} after there was room", begun.elapsed());
    a.sync();
    assert_eq!(a.status()["last_error"], Value::Null);
    for no in 0..20 {
        assert!(fs::read(b.at(format!("file{no}"))).unwrap() == vec![no; MIB], "{no}");
    }
    b.sync();
    assert_same(a.path(), b.path());
    assert_same(a.path(), server.dir());
    a.no_conflicts();
    once(&server, &disk.path().join("state"));
}

#[test]
fn a_disk_that_is_full_at_the_client() {
    let (Some(disk), Some(small)) = (Disk::new(512), Disk::new(96)) else { return };
    let server = Server::start(&disk);
    let cable = Cable::to(server.port());
    let a = Mount::start(&server, &disk, "a");
    let b = Mount::with(cable.source(), &small.dir("b"), "age=100ms");
    fs::write(a.at("of a"), "at first").unwrap();
    assert_eq!(fs::read_to_string(b.at("of a")).unwrap(), "at first");
    cable.cut();
    away(&b);
    let count = write_files(b.path(), 0..200).unwrap();
    println!("{count} files of 1 MiB fit");
    assert!((5..150).contains(&count), "{count}");
    let status = b.status();
    assert!(status["pending_records"].as_u64().unwrap() >= 2 * u64::from(count), "{status:#}");
    fs::write(a.at("of a"), "and then").unwrap();
    fs::write(a.at("new"), "new").unwrap();
    a.sync();
    cable.mend();
    back(&b);
    // what is here goes out, though nothing fits in
    b.sync();
    for no in 0..count {
        assert!(fs::read(a.at(format!("file{no}"))).unwrap() == vec![no; MIB], "{no}");
    }
    assert_eq!(fs::read_to_string(a.at("of a")).unwrap(), "and then");
    // and with room again all is as it should be
    fs::remove_file(b.at("file0")).unwrap();
    fs::remove_file(b.at("file1")).unwrap();
    b.sync();
    assert_eq!(fs::read_to_string(b.at("of a")).unwrap(), "and then");
    assert_eq!(fs::read_to_string(b.at("new")).unwrap(), "new");
    assert_same(a.path(), b.path());
    assert_same(a.path(), server.dir());
    b.no_conflicts();
    once(&server, &disk.path().join("state"));
}

/// No record of a client stands twice in the history, but for what was void the first time.
fn once(server: &Server, state: &Path) {
    let journal: PathBuf = state.join("kml");
    let (code, text) = imz_run(&["kml", "dump", "--json", journal.to_str().unwrap()]);
    assert_eq!(code, 0, "{text}\n{}", server.said());
    let mut seen = std::collections::BTreeSet::new();
    for line in text.lines() {
        let entry: Value = serde_json::from_str(line).unwrap();
        let is_done = entry["outcome"] == "done" && entry["kind"] != "noop";
        let origin = (entry["origin"]["node"].as_u64(), entry["origin"]["seq"].as_u64());
        assert!(origin.0.is_some() && origin.1.is_some(), "{entry:#}");
        assert!(!is_done || seen.insert(origin), "twice: {entry:#}");
    }
    assert!(seen.len() > 10, "{text}");
}
