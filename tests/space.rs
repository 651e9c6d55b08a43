//! Room: a write that returned success finds its place at the server, on disks that are full.
//!
//! Mounts for real. `IMZ_SPACE_SECONDS=600` makes the long run of the last test as long; it is 20
//! otherwise.

#![allow(clippy::unwrap_used)] // here it is the message

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::RwLock;
use std::time::{Duration, Instant};

use common::tree::Rng;
use common::{Disk, Mount, Server, wait_for};

const MIB: u64 = 1 << 20;
const ENOSPC: i32 = 28;

fn is_full(e: &io::Error) -> bool {
    e.raw_os_error() == Some(ENOSPC)
}

/// Room that a file system has for everybody but root, bytes and files.
fn room(path: &Path) -> (u64, u64) {
    let stat = rustix::fs::statvfs(path).unwrap();
    (stat.f_bavail * stat.f_frsize, stat.f_ffree)
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Writes a file in pieces until it is whole or there is no room; what was written.
fn write_file(path: &Path, seed: u64, len: usize) -> Result<Vec<u8>, (Vec<u8>, io::Error)> {
    let all = pattern(seed, len);
    let mut file = match File::create_new(path) {
        Ok(file) => file,
        Err(e) => return Err((Vec::new(), e)),
    };
    let mut done = 0;
    for piece in all.chunks(64 << 10) {
        match file.write(piece) {
            Ok(count) => done += count,
            Err(e) => return Err((all[..done].to_vec(), e)),
        }
    }
    Ok(all[..done].to_vec())
}

/// Fills the mount with files of one size; contents by name.
fn fill(mount: &Mount, prefix: &str, len: usize) -> Vec<(String, Vec<u8>)> {
    let mut written = Vec::new();
    for nth in 0.. {
        let name = format!("{prefix}{nth}");
        match write_file(&mount.at(&name), nth + len as u64, len) {
            Ok(bytes) => written.push((name, bytes)),
            Err((bytes, e)) => {
                assert!(is_full(&e), "{name}: {e}");
                if mount.at(&name).exists() {
                    written.push((name, bytes));
                }
                return written;
            }
        }
    }
    unreachable!("a disk without end")
}

fn total(written: &[(String, Vec<u8>)]) -> u64 {
    written.iter().map(|(_, bytes)| bytes.len() as u64).sum()
}

#[track_caller]
fn all_there(dir: &Path, written: &[(String, Vec<u8>)]) {
    for (name, bytes) in written {
        let there = fs::read(dir.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(there == *bytes, "{name}: {} of {} bytes", there.len(), bytes.len());
    }
}

/// The server took everything at once, never for want of room later.
#[track_caller]
fn nothing_refused(server: &Server, mounts: &[&Mount]) {
    for mount in mounts {
        mount.no_conflicts();
        let said = mount.said();
        assert!(!said.contains("does not take changes"), "{said}");
    }
    assert!(!server.said().contains("there is no room"), "{}", server.said());
}

#[test]
fn the_last_client_gets_nearly_all_and_everything_that_was_written_is_there() {
    let (Some(disk), Some(caches)) = (Disk::new(200), Disk::new(1024)) else { return };
    let server = Server::start(&disk);
    let nominal = room(server.dir()).0;
    let idle: Vec<Mount> =
        ["i1", "i2"].map(|name| Mount::start(&server, &caches, name)).into_iter().collect();
    for (nth, mount) in idle.iter().enumerate() {
        fs::write(mount.at(format!("idle{nth}")), b"x").unwrap();
        mount.sync();
    }
    let mount = Mount::start(&server, &caches, "last");
    let written = fill(&mount, "big", 5 << 20);
    let part = total(&written) as f64 / nominal as f64;
    eprintln!("the last client gets {part:.4} of {nominal} bytes");
    mount.sync();
    all_there(server.dir(), &written);
    nothing_refused(&server, &[&idle[0], &idle[1], &mount]);
    assert!(part >= 0.95, "the last client gets only {part:.3} of {nominal}");
    // Room that is made there can be written by anybody.
    fs::remove_file(mount.at("big3")).unwrap();
    mount.sync();
    fs::write(idle[0].at("another"), vec![7; 4 << 20]).unwrap();
    idle[0].sync();
    assert_eq!(fs::metadata(server.dir().join("another")).unwrap().len(), 4 << 20);
    nothing_refused(&server, &[&idle[0], &mount]);
}

#[test]
fn small_files_appends_and_holes_are_counted_as_what_they_take() {
    let (Some(disk), Some(caches)) = (Disk::new(64), Disk::new(512)) else { return };
    let server = Server::start(&disk);
    let mount = Mount::start(&server, &caches, "a");
    // A hole takes nothing, and what is in it does.
    let sparse = File::create_new(mount.at("sparse")).unwrap();
    sparse.set_len(1 << 40).unwrap();
    sparse.write_all_at(&pattern(1, 10_000), 1 << 39).unwrap();
    drop(sparse);
    let mut written = fill(&mount, "small", 3000);
    assert!(written.len() > 2000, "{}", written.len());
    mount.sync();
    all_there(server.dir(), &written);
    let there = fs::metadata(server.dir().join("sparse")).unwrap();
    assert_eq!((there.len(), there.blocks() * 512 < MIB), (1 << 40, true));
    // Appends find room again where files went.
    for (name, _) in written.drain(100..) {
        fs::remove_file(mount.at(name)).unwrap();
    }
    mount.sync();
    let mut log = OpenOptions::new().append(true).open(mount.at("small7")).unwrap();
    let before = written[7].1.len() as u64;
    let mut appended = 0;
    let full = loop {
        match log.write(&pattern(9, 4096)) {
            Ok(count) => appended += count as u64,
            Err(e) => break e,
        }
    };
    assert!(is_full(&full) && appended > 8 * MIB, "{full} after {appended}");
    drop(log);
    mount.sync();
    let there = fs::metadata(server.dir().join("small7")).unwrap().len();
    assert_eq!(there, before + appended);
    nothing_refused(&server, &[&mount]);
}

#[test]
fn a_volume_without_inodes_refuses_creates_at_create() {
    let (Some(disk), Some(caches)) = (Disk::with_files(64, 512), Disk::new(256)) else { return };
    let server = Server::start(&disk);
    let mount = Mount::start(&server, &caches, "a");
    let other = Mount::start(&server, &caches, "b");
    let mut made = 0;
    let full = loop {
        let path = mount.at(format!("f{made}"));
        let result = match made % 3 {
            0 => fs::create_dir(&path),
            1 => std::os::unix::fs::symlink("x", &path),
            _ => File::create_new(&path).map(drop),
        };
        match result {
            Ok(()) => made += 1,
            Err(e) => break e,
        }
    };
    assert!(is_full(&full) && made > 350, "{full} after {made}");
    mount.sync();
    let there = fs::read_dir(server.dir()).unwrap().count();
    assert!(there >= made, "{there} of {made}");
    assert!(is_full(&File::create_new(other.at("no")).unwrap_err()));
    fs::remove_file(mount.at("f1")).unwrap();
    fs::remove_file(mount.at("f4")).unwrap();
    mount.sync();
    File::create_new(mount.at("yes")).unwrap();
    mount.sync();
    nothing_refused(&server, &[&mount, &other]);
}

#[test]
fn away_from_the_server_a_client_writes_what_it_was_granted_and_no_more() {
    let (Some(disk), Some(caches)) = (Disk::new(200), Disk::new(1024)) else { return };
    let mut server = Server::start(&disk);
    let mount = Mount::with(server.source(), &caches.dir("a"), "timeout=1s");
    fs::write(mount.at("first"), b"x").unwrap();
    mount.sync();
    let granted = mount.status()["space_granted_bytes"].as_u64().unwrap();
    assert!(granted > 8 * MIB, "{granted}");
    server.kill();
    wait_for("the mount knows it", 20, || !mount.is_connected());
    let written = fill(&mount, "away", 1 << 20);
    let len = total(&written);
    assert!(len <= granted && len > granted / 2, "{len} of {granted}");
    server.restart();
    mount.sync();
    all_there(server.dir(), &written);
    nothing_refused(&server, &[&mount]);
}

#[test]
fn df_shows_what_can_be_written() {
    let (Some(disk), Some(caches)) = (Disk::new(200), Disk::new(1024)) else { return };
    let server = Server::start(&disk);
    let holder = Mount::start(&server, &caches, "holder");
    fs::write(holder.at("x"), b"x").unwrap();
    holder.sync();
    let mount = Mount::start(&server, &caches, "a");
    room(mount.path());
    std::thread::sleep(std::time::Duration::from_millis(1500));
    let (shown, files) = room(mount.path());
    let status = server_status(&server);
    let held: u64 = status["space_grants"]
        .as_array()
        .unwrap()
        .iter()
        .map(|grant| grant["bytes"].as_u64().unwrap())
        .sum();
    assert!(shown < room(server.dir()).0, "{shown}");
    assert!(held > 0 && files > 1000, "{status:#}");
    let written = total(&fill(&mount, "f", 3 << 20));
    // what the other one does not use, it gives back
    assert!(written + written / 20 > shown, "{written} of {shown}");
    std::thread::sleep(std::time::Duration::from_millis(1500));
    room(mount.path());
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert!(room(mount.path()).0 < 4 * MIB, "{}", room(mount.path()).0);
}

/// Writes on until there is no room; what was written, and how it ended.
fn write_on(file: &File, piece: &[u8]) -> (u64, io::Error) {
    let mut done = 0;
    loop {
        match (&*file).write(piece) {
            Ok(count) => done += count as u64,
            Err(e) => return (done, e),
        }
    }
}

/// A reserve of 256 MiB must outlast what is written between two looks, several times over.
fn seldom_unseen(mount: &Mount) {
    let unseen = mount.status()["space_unseen_max_bytes"].as_u64().unwrap();
    eprintln!("{} KiB were written between two looks", unseen >> 10);
    assert!(unseen > 0 && unseen * 2 < 256 * MIB, "{unseen} bytes between two looks");
}

#[test]
fn a_writer_past_the_daemon_is_stopped_before_it_outruns_its_grant() {
    let (Some(disk), Some(caches)) = (Disk::new(2200), Disk::new(3000)) else { return };
    let server = Server::start(&disk);
    let nominal = room(server.dir()).0;
    let mount = Mount::start(&server, &caches, "a");
    wait_for("there is plenty", 10, || mount.status()["space_regime"] == "ample");
    // In a process of its own: at each fork here, a copy of the descriptor would be closed, and what
    // is written so far be stored.
    let big = mount.at("big");
    let script = format!("yes 0123456789abcde | dd of={} bs=1M iflag=fullblock", big.display());
    let out = common::command(&["sh", "-c", &script]).output().unwrap();
    let said = common::told(&out);
    assert!(said.contains("No space left on device"), "{said}");
    let written = fs::metadata(&big).unwrap().len();
    let status = mount.status();
    let of = |key: &str| status[key].as_u64().unwrap();
    let (held, used) = (of("space_granted_bytes"), of("space_used_bytes"));
    assert!(used <= held, "{used} bytes are used of {held}: it has outrun its grant");
    let part = written as f64 / nominal as f64;
    eprintln!("an open writer gets {part:.4} of {nominal} bytes");
    seldom_unseen(&mount);
    mount.sync();
    let there = File::open(server.dir().join("big")).unwrap();
    assert_eq!(there.metadata().unwrap().len(), written);
    let mut bytes = [0; 4096];
    for at in (0..written - 4096).step_by(37 << 20) {
        there.read_exact_at(&mut bytes, at).unwrap();
        assert!(bytes == *b"0123456789abcde\n".repeat(256), "other bytes at {at}");
    }
    nothing_refused(&server, &[&mount]);
    assert!((0.85..=1.0).contains(&part), "{part:.3} of {nominal}");
}

#[test]
fn a_writer_that_rests_keeps_no_room_from_others() {
    let (Some(disk), Some(caches)) = (Disk::new(2200), Disk::new(1000)) else { return };
    let server = Server::start(&disk);
    let rests = Mount::start(&server, &caches, "rests");
    wait_for("there is plenty", 10, || rests.status()["space_regime"] == "ample");
    let log = File::create_new(rests.at("log")).unwrap();
    write_all(&log, b"begun");
    let in_use = || rests.status()["space_used_bytes"].as_u64().unwrap();
    assert!(in_use() >= 256 * MIB, "{}", in_use());
    wait_for("it keeps no reserve", 10, || in_use() < MIB);
    // it need not know
    write_all(&log, b", and gone on");
    assert!(in_use() >= 32 * MIB, "{}", in_use());
    wait_for("it keeps no reserve again", 10, || in_use() < MIB);
    rests.sync();
    // somebody else has filled the disk
    disk.fill(330 * MIB);
    let nominal = room(server.dir()).0;
    let others = Mount::start(&server, &caches, "others");
    let written = fill(&others, "f", 8 << 20);
    let part = total(&written) as f64 / nominal as f64;
    eprintln!("beside one who rests: {part:.4} of {nominal}");
    assert!(part >= 0.9, "only {part:.3} of {nominal}");
    let (more, full) = write_on(&log, &[7; 4096]);
    assert!(is_full(&full), "{full} after {more}");
    for (name, _) in &written[..18] {
        fs::remove_file(others.at(name)).unwrap();
    }
    others.sync();
    // a refusal is remembered for a moment
    wait_for("there is room again", 10, || (&log).write_all(b", to its end").is_ok());
    drop(log);
    rests.sync();
    let there = fs::read(server.dir().join("log")).unwrap();
    assert!(there.starts_with(b"begun, and gone on") && there.ends_with(b", to its end"));
    nothing_refused(&server, &[&rests, &others]);
}

/// A thread of the process waits in statx(2).
fn looks_at_a_file(pid: u32) -> bool {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.flatten().any(|task| {
        let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let call = format!("{} ", libc::SYS_statx);
        ["look", "stop"].contains(&read("comm").trim()) && read("syscall").starts_with(&call)
    })
}

#[test]
fn a_mount_that_looks_at_itself_can_be_killed() {
    let (Some(disk), Some(caches)) = (Disk::new(2200), Disk::new(1000)) else { return };
    let server = Server::start(&disk);
    let mut mount = Mount::start(&server, &caches, "a");
    let other = Mount::start(&server, &caches, "b");
    wait_for("there is plenty", 10, || mount.status()["space_regime"] == "ample");
    // A writer that rests, with a hole that a mapping might fill: it is looked at again and again.
    let log = File::create_new(mount.at("log")).unwrap();
    log.set_len(MIB).unwrap();
    let mut hangs = false;
    for mode in 0o600..0o640 {
        fs::set_permissions(other.at("log"), fs::Permissions::from_mode(mode)).unwrap();
        server.freeze();
        std::thread::sleep(Duration::from_millis(600));
        hangs = looks_at_a_file(mount.pid());
        if hangs {
            break;
        }
        server.thaw();
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(hangs, "no look was ever without an answer");
    let pid = mount.pid();
    let killed = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(killed, rustix::process::Signal::KILL).unwrap();
    let tasks = || fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    let ends_at = Instant::now() + Duration::from_secs(5);
    while tasks() > 1 && Instant::now() < ends_at {
        std::thread::sleep(Duration::from_millis(20));
    }
    let ended = tasks() <= 1;
    if !ended {
        // Or it stays for ever, as what waits for it does: the first fork here, which closes the log.
        let _ = rustix::mount::unmount(mount.path(), rustix::mount::UnmountFlags::FORCE);
    }
    assert!(ended, "the kernel keeps what was killed");
    server.thaw();
    drop(log);
    mount.kill();
    mount.umount_dead();
}

fn write_all(mut file: &File, bytes: &[u8]) {
    file.write_all(bytes).unwrap();
}

fn server_status(server: &Server) -> serde_json::Value {
    let (code, text) = common::imz_run(&["status", "--json", server.dir().to_str().unwrap()]);
    assert_eq!(code, 0, "{text}");
    serde_json::from_str(&text).unwrap()
}

// ---- everything at once --------------------------------------------------------------------------

/// One file as its writer knows it.
struct Known {
    bytes: Vec<u8>,
    /// something was under way when the mount died: then it is one of two things
    unsure: bool,
}

/// A program that writes as fast as it can, makes room when there is none, and goes on.
struct Writer<'a> {
    mount: &'a RwLock<Mount>,
    no: usize,
    rng: Rng,
    count: u64,
    files: BTreeMap<String, Known>,
    full: u64,
    written: u64,
}

impl Writer<'_> {
    /// Does something with a path while the mount is there.
    fn with<T>(&self, name: &str, act: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
        let mount = self.mount.read().unwrap_or_else(|e| e.into_inner());
        act(&mount.at(format!("c{}", self.no)).join(name))
    }
    /// What came of it: true for success; after ENOSPC there is room again.
    fn ended(&mut self, name: &str, result: io::Result<()>) -> bool {
        let Err(e) = result else { return true };
        match e.raw_os_error() {
            Some(ENOSPC) => {
                self.full += 1;
                let names: Vec<String> = self.files.keys().cloned().collect();
                for name in names.iter().skip(self.rng.below(2)).step_by(2) {
                    self.remove(name);
                }
                // others have room to make as well
                std::thread::sleep(Duration::from_millis(50));
            }
            // the mount died under it
            _ => {
                if let Some(known) = self.files.get_mut(name) {
                    known.unsure = true;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        false
    }
    fn remove(&mut self, name: &str) {
        let removed = self.with(name, |path| fs::remove_file(path));
        match removed {
            Ok(()) => _ = self.files.remove(name),
            Err(e) if e.kind() == io::ErrorKind::NotFound => _ = self.files.remove(name),
            Err(_) => {
                if let Some(known) = self.files.get_mut(name) {
                    known.unsure = true;
                }
            }
        }
    }
    fn any(&mut self) -> Option<String> {
        let sure: Vec<&String> = self.files.iter().filter(|f| !f.1.unsure).map(|f| f.0).collect();
        let nth = self.rng.below(sure.len().max(1));
        sure.get(nth).map(|name| (*name).clone())
    }
    /// Writes at a place of a file that is open, in pieces, and notes what returned.
    fn write(&mut self, name: &str, file: &File, at: usize, bytes: &[u8]) -> bool {
        for (nth, piece) in bytes.chunks(128 << 10).enumerate() {
            let at = at + nth * (128 << 10);
            let wrote = {
                let _mount = self.mount.read().unwrap_or_else(|e| e.into_inner());
                file.write_all_at(piece, at as u64)
            };
            let is_full = wrote.as_ref().is_err_and(is_full);
            if !self.ended(name, wrote) {
                // part of a piece may have been written
                if let Some(known) = self.files.get_mut(name) {
                    known.unsure |= !is_full || piece.len() > 4096;
                }
                return false;
            }
            if let Some(known) = self.files.get_mut(name) {
                if known.bytes.len() < at + piece.len() {
                    known.bytes.resize(at + piece.len(), 0);
                }
                known.bytes[at..at + piece.len()].copy_from_slice(piece);
            }
            self.written += piece.len() as u64;
        }
        true
    }
    fn create(&mut self, at: usize, len: usize) {
        self.count += 1;
        let name = format!("f{}", self.count);
        let bytes = pattern(self.count * 7 + self.no as u64, len);
        let made = self
            .with(&name, |path| File::options().read(true).write(true).create_new(true).open(path));
        match made {
            Ok(file) => {
                self.files.insert(name.clone(), Known { bytes: Vec::new(), unsure: false });
                self.write(&name, &file, at, &bytes);
            }
            Err(e) => {
                if !is_full(&e) {
                    self.files.insert(name.clone(), Known { bytes: Vec::new(), unsure: true });
                }
                self.ended(&name, Err(e));
            }
        }
    }
    fn append(&mut self) {
        let Some(name) = self.any() else { return };
        let len = 1 + self.rng.below(200 << 10);
        let bytes = pattern(self.count + len as u64, len);
        let opened = self.with(&name, |path| File::options().write(true).open(path));
        match opened {
            Ok(file) => {
                let at = self.files[&name].bytes.len();
                self.write(&name, &file, at, &bytes);
            }
            Err(e) => _ = self.ended(&name, Err(e)),
        }
    }
    #[allow(unsafe_code)]
    fn map(&mut self) {
        let Some(name) = self.any().filter(|name| !self.files[name].bytes.is_empty()) else {
            return;
        };
        let len = self.files[&name].bytes.len();
        let (at, fill) = (self.rng.below(len), pattern(self.count, 1)[0]);
        let end = (at + 5000).min(len);
        let mapped = self.with(&name, |path| {
            let file = File::options().read(true).write(true).open(path)?;
            // SAFETY: nobody truncates the file; the mount does not die while it is held here.
            let mut map = unsafe { memmap2::MmapMut::map_mut(&file) }?;
            map[at..end].fill(fill);
            map.flush()
        });
        // where a mapping has no room at all, there is none
        let no_room = mapped.as_ref().is_err_and(|e| e.raw_os_error() == Some(19));
        if no_room {
            return;
        }
        if mapped.is_err()
            && let Some(known) = self.files.get_mut(&name)
        {
            known.unsure = true;
        }
        if self.ended(&name, mapped) {
            self.files.get_mut(&name).unwrap().bytes[at..end].fill(fill);
        }
    }
    fn go(&mut self, until: Instant) {
        while Instant::now() < until {
            match self.rng.below(20) {
                0..8 => {
                    let len = self.rng.below(20 << 10);
                    self.create(0, len);
                }
                8..10 => {
                    let len = (1 << 20) + self.rng.below(7 << 20);
                    self.create(0, len);
                }
                10..11 => self.create(3 << 20, 10_000),
                11..16 => self.append(),
                16..18 => self.map(),
                _ => {
                    if let Some(name) = self.any() {
                        self.remove(&name);
                    }
                }
            }
        }
    }
}

#[test]
fn three_clients_fill_a_volume_over_and_over_while_processes_die() {
    let seconds = std::env::var("IMZ_SPACE_SECONDS").map_or(20, |text| text.parse().unwrap());
    let (Some(disk), Some(caches)) = (Disk::new(200), Disk::new(3000)) else { return };
    let mut server = Server::start(&disk);
    let mounts: Vec<RwLock<Mount>> =
        (0..3).map(|no| RwLock::new(Mount::start(&server, &caches, &format!("c{no}")))).collect();
    for (no, mount) in mounts.iter().enumerate() {
        fs::create_dir(mount.read().unwrap().at(format!("c{no}"))).unwrap();
    }
    let until = Instant::now() + Duration::from_secs(seconds);
    let (mut kills, mut rng) = (0, Rng(0x5eed ^ seconds));
    let writers: Vec<Writer<'_>> = std::thread::scope(|scope| {
        let threads: Vec<_> = mounts
            .iter()
            .enumerate()
            .map(|(no, mount)| {
                scope.spawn(move || {
                    let (rng, files) = (Rng(no as u64 * 977 + 13), BTreeMap::new());
                    let (count, full, written) = (0, 0, 0);
                    let mut writer = Writer { mount, no, rng, count, files, full, written };
                    writer.go(until);
                    writer
                })
            })
            .collect();
        while Instant::now() + Duration::from_secs(3) < until {
            std::thread::sleep(Duration::from_millis(500 + rng.below(4000) as u64));
            match rng.below(4) {
                0 => {
                    server.kill();
                    std::thread::sleep(Duration::from_millis(rng.below(1500) as u64));
                    server.restart();
                }
                1 => {
                    server.freeze();
                    std::thread::sleep(Duration::from_millis(rng.below(1500) as u64));
                    server.thaw();
                }
                nth => {
                    let mount = &mounts[(nth + rng.below(2)) % 3];
                    mount.write().unwrap_or_else(|e| e.into_inner()).die_and_come_back();
                }
            }
            kills += 1;
        }
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let (mut files, mut full, mut written) = (0, 0, 0);
    for mount in &mounts {
        mount.read().unwrap().sync();
    }
    for writer in &writers {
        for (name, known) in writer.files.iter().filter(|(_, known)| !known.unsure) {
            let path = server.dir().join(format!("c{}", writer.no)).join(name);
            let there = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let differs = there.iter().zip(&known.bytes).position(|(a, b)| a != b);
            assert!(
                there == known.bytes,
                "{}: {} of {} bytes, first other at {differs:?}",
                path.display(),
                there.len(),
                known.bytes.len()
            );
            files += 1;
        }
        full += writer.full;
        written += writer.written;
    }
    let refused = server.said().matches("there is no room").count();
    eprintln!(
        "{seconds} s: {} MiB written, {full} times full, {kills} deaths, {files} files alike, \
         {refused} refused",
        written / MIB
    );
    assert!(full > 3, "it was never full");
    assert_eq!(refused, 0, "{}", server.said());
    for mount in &mounts {
        mount.read().unwrap().no_conflicts();
    }
    // Both sides agree, and the books agree with the disk.
    let of = |status: &serde_json::Value, key: &str| status[key].as_u64().unwrap();
    wait_for("the figures agree", 20, || {
        let status = server_status(&server);
        let held: u64 =
            mounts.iter().map(|m| of(&m.read().unwrap().status(), "space_granted_bytes")).sum();
        let used: u64 =
            mounts.iter().map(|m| of(&m.read().unwrap().status(), "space_used_bytes")).sum();
        used == 0 && held == of(&status, "space_granted_bytes")
    });
    let status = server_status(&server);
    let book = of(&status, "space_available_bytes") + of(&status, "space_granted_bytes");
    let left = room(server.dir()).0;
    assert!(book <= left && left - book < 6 * MIB, "{book} in the book, {left} on the disk");
}

// ---- limits that change --------------------------------------------------------------------------

fn volume(server: &Server, words: &[&str]) -> String {
    let pid = server.pid().to_string();
    let run = |words: &[&str]| common::imz_run(&[&["volume"], words, &["--server", &pid]].concat());
    // its socket comes last
    wait_for("the server answers", 20, || run(&["list"]).0 == 0);
    let (code, said) = run(words);
    assert_eq!(code, 0, "{words:?}: {said}");
    said
}

fn limit(server: &Server, quota: &str) {
    volume(server, &["set", common::VOLUME, "--quota", quota, "--force"]);
}

fn figures(server: &Server) -> serde_json::Value {
    let list: serde_json::Value =
        serde_json::from_str(&volume(server, &["list", "--json"])).unwrap();
    list[0].clone()
}

#[test]
fn a_quota_changes_while_three_clients_write() {
    let (Some(disk), Some(caches)) = (Disk::new(600), Disk::new(2000)) else { return };
    let server = Server::start(&disk);
    let mounts: Vec<RwLock<Mount>> =
        (0..3).map(|no| RwLock::new(Mount::start(&server, &caches, &format!("c{no}")))).collect();
    for (no, mount) in mounts.iter().enumerate() {
        fs::create_dir(mount.read().unwrap().at(format!("c{no}"))).unwrap();
    }
    let until = Instant::now() + Duration::from_secs(11);
    let writers: Vec<Writer<'_>> = std::thread::scope(|scope| {
        let start = |(no, mount)| {
            scope.spawn(move || {
                let (rng, files) = (Rng(no as u64 * 71 + 5), BTreeMap::new());
                let (count, full, written) = (0, 0, 0);
                let mut writer = Writer { mount, no, rng, count, files, full, written };
                writer.go(until);
                writer
            })
        };
        let threads: Vec<_> = mounts.iter().enumerate().map(start).collect();
        for quota in ["90M", "40M", "120M", "25M", "none", "70M", "35M"] {
            limit(&server, quota);
            std::thread::sleep(Duration::from_secs(1));
        }
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    mounts.iter().for_each(|mount| mount.read().unwrap().sync());
    let mut files = 0;
    for writer in &writers {
        assert!(writer.full > 0, "client {} was never refused", writer.no);
        for (name, known) in writer.files.iter().filter(|(_, known)| !known.unsure) {
            let path = server.dir().join(format!("c{}", writer.no)).join(name);
            let there = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            assert!(there == known.bytes, "{}: {} bytes", path.display(), there.len());
            files += 1;
        }
    }
    eprintln!("{files} files alike, {} times full", writers.iter().map(|it| it.full).sum::<u64>());
    let all: Vec<_> = mounts.iter().map(|mount| mount.read().unwrap()).collect();
    nothing_refused(&server, &all.iter().map(|mount| &**mount).collect::<Vec<_>>());
    // the last limit holds, and df shows it
    let used = || figures(&server)["used_bytes"].as_u64().unwrap();
    let shown = || rustix::fs::statvfs(all[0].path()).unwrap();
    wait_for("df shows it", 10, || shown().f_blocks * shown().f_frsize == 35 * MIB);
    // what the files take is what was counted
    let blocks =
        common::run(&["du", "-s", "-B1", "--exclude=.imz", server.dir().to_str().unwrap()]);
    let blocks: u64 = blocks.split_whitespace().next().unwrap().parse().unwrap();
    assert!(used().abs_diff(blocks) <= 8192, "{} and {blocks}", used());
    for (writer, mount) in writers.iter().zip(&all) {
        let left = writer.files.keys().map(|name| mount.at(format!("c{}", writer.no)).join(name));
        left.for_each(|path| _ = fs::remove_file(path)); // one of an unsure outcome may be gone
        mount.sync();
    }
    assert!(used() < 2 * MIB, "{}", used());
    let written = total(&fill(&all[1], "again", 1 << 20));
    assert!(written <= 35 * MIB && written > 25 * MIB, "{written} of {}", 35 * MIB);
    limit(&server, "none");
    drop(all);
    let mount = mounts[1].read().unwrap();
    wait_for("there is room", 10, || fs::write(mount.at("more"), vec![1; 50 << 20]).is_ok());
    mount.sync();
    assert_eq!(fs::metadata(server.dir().join("more")).unwrap().len(), 50 << 20);
}

#[test]
fn a_volume_at_its_limit_of_files_refuses_creates_at_create() {
    let (Some(disk), Some(caches)) = (Disk::new(200), Disk::new(256)) else { return };
    let server = Server::start(&disk);
    volume(&server, &["set", common::VOLUME, "--quota-files", "120"]);
    let mount = Mount::start(&server, &caches, "a");
    let mut made = 0;
    let full = loop {
        match File::create_new(mount.at(format!("f{made}"))) {
            Ok(_) => made += 1,
            Err(e) => break e,
        }
    };
    assert!(is_full(&full) && (100..=120).contains(&made), "{full} after {made}");
    mount.sync();
    let shown = || rustix::fs::statvfs(mount.path()).unwrap();
    wait_for("df -i shows it", 10, || (shown().f_files, shown().f_ffree < 20) == (120, true));
    volume(&server, &["set", common::VOLUME, "--quota-files", "140", "--force"]);
    wait_for("there is room", 10, || File::create_new(mount.at("more")).is_ok());
    mount.sync();
    nothing_refused(&server, &[&mount]);
}
