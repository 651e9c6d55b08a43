//! The server away: work in the cache goes on, what is not there fails in time, and all that was
//! done is at the server once it is back.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use common::compare::{assert_same, assert_same_but_times};
use common::{Disk, Mount, Server, command, imz_run, is_mounted, ops, run, tree, wait_for};

/// Objects of which nothing is in the cache may take this long to fail; the rest is for a machine
/// that is busy.
const TIMEOUT: Duration = Duration::from_secs(2);
const PROMPT: Duration = Duration::from_secs(5);

fn away(mount: &Mount) {
    wait_for("the mount sees that the server is away", 15, || !mount.is_connected());
}

fn back(mount: &Mount) {
    wait_for("the mount is connected again", 30, || mount.is_connected());
}

fn is_unreachable(result: io::Result<impl Sized>) {
    let error = result.map(drop).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EHOSTUNREACH), "{error}");
}

#[test]
fn five_hundred_operations_without_the_server() {
    let Some(disk) = Disk::new(512) else { return };
    let mut server = Server::start(&disk);
    let a = Mount::start(&server, &disk, "cache-a");
    let b = Mount::start(&server, &disk, "cache-b");
    let model = disk.dir("model");
    ops::in_both(a.path(), &model, 1, 150);
    a.sync();
    assert_same(a.path(), b.path());
    for round in 0..3 {
        if round == 1 {
            server.kill()
        } else {
            server.stop()
        }
        away(&a);
        let began = Instant::now();
        ops::in_both(a.path(), &model, 20 + round, 500);
        assert!(began.elapsed() < Duration::from_secs(20), "operations wait for the server");
        assert_same_but_times(&model, a.path());
        let status = a.status();
        assert!(status["pending_records"].as_u64().unwrap() > 0, "{status:#}");
        server.restart();
        a.sync();
        assert_same_but_times(&model, a.path());
        assert_same(a.path(), server.dir());
        back(&b);
        assert_same(a.path(), b.path());
    }
    a.no_conflicts();
    b.no_conflicts();
}

#[test]
fn what_is_not_in_the_cache_fails_in_time() {
    let Some(disk) = Disk::new(512) else { return };
    let served = disk.dir("served");
    fs::create_dir_all(served.join("known/unknown")).unwrap();
    fs::write(served.join("known/read"), "it was read").unwrap();
    fs::write(served.join("known/unread"), vec![1; 3 << 20]).unwrap();
    let mut server = Server::start(&disk);
    let options = format!("timeout={}s", TIMEOUT.as_secs());
    let a = Mount::with(server.source(), &disk.dir("cache-a"), &options);
    assert_eq!(fs::read_dir(a.at("known")).unwrap().count(), 3);
    assert_eq!(fs::read(a.at("known/read")).unwrap(), b"it was read");

    let check = |how: &str| {
        let began = Instant::now();
        assert_eq!(fs::metadata(a.at("known/unread")).unwrap().len(), 3 << 20, "{how}");
        assert_eq!(fs::read(a.at("known/read")).unwrap(), b"it was read", "{how}");
        assert!(!a.at("known/nothing").exists(), "a complete directory needs no server");
        fs::write(a.at(format!("known/written {how}")), "new").unwrap();
        assert!(began.elapsed() < TIMEOUT, "{how}: cached objects wait for the server");
        for attempt in 0..2 {
            let began = Instant::now();
            is_unreachable(fs::read(a.at("known/unread")));
            assert!(began.elapsed() < TIMEOUT + PROMPT, "{how}, attempt {attempt}: a read");
            let began = Instant::now();
            let list = || fs::read_dir(a.at("known/unknown"))?.collect::<io::Result<Vec<_>>>();
            is_unreachable(list());
            assert!(began.elapsed() < TIMEOUT + PROMPT, "{how}, attempt {attempt}: a listing");
        }
    };
    // silent, as behind a cut cable
    server.freeze();
    check("silent");
    server.thaw();
    back(&a);
    assert_eq!(fs::read_dir(a.at("known/unknown")).unwrap().count(), 0);
    fs::remove_dir(a.at("known/unknown")).unwrap();
    a.sync();

    server.stop();
    away(&a);
    let began = Instant::now();
    is_unreachable(fs::read(a.at("known/unread")));
    assert!(began.elapsed() < PROMPT, "a closed connection is known at once");
    server.restart();
    back(&a);
    assert_eq!(fs::read(a.at("known/unread")).unwrap(), vec![1; 3 << 20]);
    a.sync();
    assert_same(&a.at("known"), &served.join("known"));
}

/// A process that waits for a silent server can be killed at once... or its wait ends in time.
#[test]
fn a_waiting_process_can_be_killed() {
    let Some(disk) = Disk::new(256) else { return };
    fs::write(disk.dir("served").join("unread"), vec![1; 3 << 20]).unwrap();
    let server = Server::start(&disk);
    let options = format!("timeout={}s", TIMEOUT.as_secs());
    let a = Mount::with(server.source(), &disk.dir("cache-a"), &options);
    assert_eq!(fs::read_dir(a.path()).unwrap().count(), 1);
    server.freeze();
    let mut reader = std::process::Command::new("cat")
        .arg(a.at("unread"))
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the reader waits for the server", 5, || {
        a.status()["requests_foreground"].as_u64().unwrap() > 0
    });
    reader.kill().unwrap();
    let began = Instant::now();
    reader.wait().unwrap();
    assert!(began.elapsed() < TIMEOUT + PROMPT, "it hangs in the kernel");
    server.thaw();
    back(&a);
    assert_eq!(fs::read(a.at("unread")).unwrap().len(), 3 << 20);
}

#[test]
fn unmounting_and_mounting_without_the_server() {
    let Some(disk) = Disk::new(512) else { return };
    let mut server = Server::start(&disk);
    let mut a = Mount::start(&server, &disk, "cache-a");
    tree::make(&disk.dir("original"), 4, 200, 8 << 20);
    let original = disk.dir("original");
    let copy = |to: &Path| {
        run(&["cp", "-a", &format!("{}/.", original.display()), to.to_str().unwrap()]);
    };
    fs::create_dir(a.at("before")).unwrap();
    copy(&a.at("before"));
    a.sync();
    server.stop();
    away(&a);
    fs::create_dir(a.at("during")).unwrap();
    copy(&a.at("during"));

    // it does not lose anything without being told to
    let point = a.path().to_str().unwrap().to_owned();
    let (code, text) = imz_run(&["umount", "--timeout", "1s", &point]);
    assert_eq!(code, 3, "{text}");
    assert!(is_mounted(a.path()));
    let (code, text) = imz_run(&["sync", "--timeout", "1s", &point]);
    assert_eq!(code, 3, "{text}");
    let began = Instant::now();
    let (code, text) = imz_run(&["umount", "--now", &point]);
    assert_eq!(code, 0, "{text}");
    assert!(began.elapsed() < PROMPT, "umount --now waits");
    a.gone();

    // the same cache, still without the server
    a.again();
    assert!(!a.is_connected());
    assert!(a.pending() > 0);
    assert_same(&original, &a.at("before"));
    assert_same(&original, &a.at("during"));
    fs::create_dir(a.at("after")).unwrap();
    copy(&a.at("after"));
    // umount(8) loses nothing either
    let began = Instant::now();
    assert!(command(&["umount", &point]).status().unwrap().success());
    a.gone();
    assert!(began.elapsed() < PROMPT, "umount(8) waits");

    a.again();
    server.restart();
    a.sync();
    for name in ["before", "during", "after"] {
        assert_same(&original, &a.at(name));
        assert_same(&original, &server.dir().join(name));
    }
    assert!(a.is_connected());
    a.no_conflicts();
    a.umount();
}

/// The other one's changes while this one was away arrive with the connection.
#[test]
fn who_comes_back_sees_what_others_did() {
    let Some(disk) = Disk::new(512) else { return };
    let server = Server::start(&disk);
    let a = Mount::start(&server, &disk, "cache-a");
    let mut b = Mount::start(&server, &disk, "cache-b");
    let model = disk.dir("model");
    ops::in_both(a.path(), &model, 31, 300);
    a.sync();
    assert_same(a.path(), b.path());
    let point = b.path().to_str().unwrap().to_owned();
    for round in 0..3 {
        // unmounted, killed, or only frozen out of the network
        match round {
            0 => b.umount(),
            1 => {
                b.kill();
                b.umount_dead();
            }
            _ => {
                assert_eq!(imz_run(&["umount", "--now", &point]).0, 0);
                b.gone();
            }
        }
        ops::in_both(a.path(), &model, 40 + round, 200);
        a.sync();
        b.again();
        back(&b);
        assert_same(a.path(), b.path());
        assert_same(b.path(), server.dir());
    }
    let file = File::create(b.at("from b")).unwrap();
    drop(file);
    b.sync();
    assert!(a.at("from b").exists());
    b.no_conflicts();
}
