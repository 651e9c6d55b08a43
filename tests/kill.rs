//! SIGKILL at any moment, on either side: nothing is lost, nothing is there twice, and the next
//! life goes on where the last one stopped.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;

use common::compare::{assert_same, assert_same_but_times};
use common::tree::{self, Rng};
use common::{AMPLE, Disk, Mount, Server, ops, run, wait_for};

/// `cp -av` under way.
struct Copy {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
    complaints: JoinHandle<String>,
}

impl Copy {
    fn start(from: &Path, to: &Path) -> Copy {
        let mut child = Command::new("cp")
            .args(["-av", &format!("{}/.", from.display()), to.to_str().unwrap()])
            .env("LC_ALL", "C")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let mut stderr = child.stderr.take().unwrap();
        let complaints = std::thread::spawn(move || {
            let mut text = Vec::new();
            stderr.read_to_end(&mut text).unwrap();
            String::from_utf8_lossy(&text).into_owned()
        });
        Copy { child, lines, complaints }
    }

    /// Returns when it has begun that many objects.
    fn until(&mut self, count: usize) {
        let mut line = Vec::new();
        for _ in 0..count {
            line.clear();
            let len = self.lines.read_until(b'\n', &mut line).unwrap();
            assert!(len > 0, "cp ended before it was a part of the way");
        }
    }

    /// Its end, and what it complained of.
    fn end(mut self) -> (bool, String) {
        std::io::copy(&mut self.lines, &mut std::io::sink()).unwrap();
        let status = self.child.wait().unwrap();
        (status.success(), self.complaints.join().unwrap())
    }
}

/// Brings `to` to what `from` is, as after an interrupted copy.
fn finish(from: &Path, to: &Path) {
    let (from, to) = (format!("{}/", from.display()), format!("{}/", to.display()));
    run(&["rsync", "-aHAX", "--devices", "--specials", "--delete", &from, &to]);
}

/// When, in thousandths of the copy.
const MOMENTS: [usize; 4] = [20, 330, 600, 930];

fn count(tree: &Path) -> usize {
    let names = fs::read_dir(tree).unwrap().map(|it| it.unwrap());
    names.map(|it| if it.file_type().unwrap().is_dir() { 1 + count(&it.path()) } else { 1 }).sum()
}

#[test]
fn a_mount_killed_in_the_middle_of_a_copy() {
    let Some(disk) = Disk::for_trees() else { return };
    let original = tree::source(&disk);
    let total = count(&original);
    let server = Server::start(&disk);
    let mut a = Mount::start(&server, &disk, "cache-a");
    for (round, moment) in MOMENTS.into_iter().enumerate() {
        let to = a.at(format!("round{round}"));
        fs::create_dir(&to).unwrap();
        let mut copy = Copy::start(&original, &to);
        copy.until(total * moment / 1000);
        a.kill();
        let (good, complaints) = copy.end();
        assert!(!good && !complaints.is_empty(), "cp did not notice that the mount died");
        a.umount_dead();
        a.again();
        finish(&original, &to);
        a.sync();
        assert_same(&original, &to);
        assert_same(&original, &server.dir().join(format!("round{round}")));
    }
    assert_eq!(a.pending(), 0);
    a.no_conflicts();
    let b = Mount::start(&server, &disk, "cache-b");
    assert_same(a.path(), b.path());
    assert_same(a.path(), server.dir());
}

/// The copy does not even notice: it goes on in the cache.
#[test]
fn a_server_killed_in_the_middle_of_a_copy() {
    let Some(disk) = Disk::for_trees() else { return };
    let original = tree::source(&disk);
    let total = count(&original);
    let mut server = Server::start(&disk);
    let a = Mount::with(server.source(), &disk.dir("cache-a"), "age=0");
    for (round, moment) in MOMENTS.into_iter().enumerate() {
        let to = a.at(format!("round{round}"));
        fs::create_dir(&to).unwrap();
        let mut copy = Copy::start(&original, &to);
        copy.until(total * moment / 1000);
        server.kill();
        copy.until(total * 50 / 1000);
        server.restart();
        let (good, complaints) = copy.end();
        assert!(good, "{complaints}");
        a.sync();
        assert_same(&original, &to);
        assert_same(&original, &server.dir().join(format!("round{round}")));
    }
    a.no_conflicts();
    let b = Mount::start(&server, &disk, "cache-b");
    assert_same(a.path(), b.path());
    assert_same(a.path(), server.dir());
}

/// Both die, again and again, while operations of all kinds run; a model says what must be there.
#[test]
fn both_killed_again_and_again() {
    let Some(disk) = Disk::new(AMPLE) else { return };
    let mut server = Server::start(&disk);
    let mut a = Mount::with(server.source(), &disk.dir("cache-a"), "age=0");
    let model = disk.dir("model");
    let mut rng = Rng(11);
    for life in 0..8 {
        ops::in_both(a.path(), &model, 100 + life, 40 + rng.below(120));
        // sometimes in the middle of shipping, sometimes after it
        if rng.below(3) == 0 {
            wait_for("all is shipped", 30, || a.pending() == 0);
        }
        match rng.below(3) {
            0 => a.die_and_come_back(),
            1 => {
                server.kill();
                server.restart();
            }
            _ => {
                server.kill();
                a.die_and_come_back();
                ops::in_both(a.path(), &model, 200 + life, 50);
                server.restart();
            }
        }
        assert_same_but_times(&model, a.path());
    }
    a.sync();
    assert_same_but_times(&model, a.path());
    assert_same(a.path(), server.dir());
    a.no_conflicts();
    let b = Mount::start(&server, &disk, "cache-b");
    assert_same(a.path(), b.path());
}

/// What a program wrote before the kill is there after it, though it never closed the file.
#[test]
fn files_that_were_open_for_writing() {
    for options in ["", "passthrough=off"] {
        let Some(disk) = Disk::new(AMPLE) else { return };
        let server = Server::start(&disk);
        let mut a = Mount::with(server.source(), &disk.dir("cache-a"), options);
        let old = vec![b'o'; 3 << 20];
        fs::write(a.at("old"), &old).unwrap();
        fs::write(a.at("unlinked"), &old).unwrap();
        a.sync();

        let mut new = File::create(a.at("new")).unwrap();
        let patched = File::options().read(true).write(true).open(a.at("old")).unwrap();
        let unlinked = File::options().read(true).write(true).open(a.at("unlinked")).unwrap();
        fs::remove_file(a.at("unlinked")).unwrap();
        new.write_all(&vec![b'n'; (1 << 20) + 77]).unwrap();
        patched.write_all_at(b"patched", (1 << 20) - 3).unwrap();
        unlinked.write_all_at(b"gone with the kill", 0).unwrap();
        a.kill();
        drop((new, patched, unlinked));
        a.umount_dead();
        a.again();

        let mut want = old.clone();
        want[(1 << 20) - 3..(1 << 20) + 4].copy_from_slice(b"patched");
        assert!(fs::read(a.at("old")).unwrap() == want, "{options}: old, in the mount");
        assert!(fs::read(a.at("new")).unwrap() == vec![b'n'; (1 << 20) + 77], "{options}: new");
        assert!(!a.at("unlinked").exists());
        a.sync();
        assert_same(a.path(), server.dir());
        a.no_conflicts();
    }
}

/// Killed while it comes back: the journal is replayed by whoever lives long enough.
#[test]
fn a_mount_killed_while_it_recovers() {
    let Some(disk) = Disk::new(AMPLE) else { return };
    let mut server = Server::start(&disk);
    let mut a = Mount::start(&server, &disk, "cache-a");
    let model = disk.dir("model");
    for life in 0..6 {
        ops::in_both(a.path(), &model, 300 + life, 120);
        if life % 2 == 0 {
            server.kill();
        }
        a.die_and_come_back();
        a.die_and_come_back();
        if life % 2 == 0 {
            server.restart();
        }
    }
    a.sync();
    assert_same_but_times(&model, a.path());
    assert_same(a.path(), server.dir());
    a.no_conflicts();
}
