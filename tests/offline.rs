//! The server away: work in the cache goes on, what is not there fails in time, and all that was
//! done is at the server once it is back.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use common::compare::{assert_same, assert_same_but_times};
use imz::replica::state::State;

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
/// What others changed, and the server did not come to say, is shown as it was.
#[test]
fn what_was_asked_for_when_the_server_went_is_shown_as_it_is() {
    let Some(disk) = Disk::new(256) else { return };
    let server = Server::start(&disk);
    let a = Mount::start(&server, &disk, "a");
    let b = Mount::start(&server, &disk, "b");
    fs::create_dir(a.at("d")).unwrap();
    fs::write(a.at("d/old"), "at first").unwrap();
    a.sync();
    assert_eq!(fs::read_to_string(b.at("d/old")).unwrap(), "at first");
    fs::write(a.at("d/new"), "later").unwrap();
    a.sync();
    // B was told that its listing is old, and asks now
    server.freeze();
    let began = Instant::now();
    fs::write(b.at("d/made"), "by b").unwrap();
    assert!(began.elapsed() > Duration::from_secs(1), "it did not ask");
    assert_eq!(fs::read_to_string(b.at("d/old")).unwrap(), "at first");
    assert!(!b.at("d/new").exists(), "as it was");
    server.thaw();
    back(&b);
    b.sync();
    assert_eq!(fs::read_to_string(a.at("d/made")).unwrap(), "by b");
    assert_eq!(fs::read_to_string(b.at("d/new")).unwrap(), "later");
    b.no_conflicts();
}

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

// ---- known to be away -------------------------------------------------------------------------

/// What anybody may ask of a mount without its server.
const SOON: Duration = Duration::from_millis(100);

/// The best of a few runs: this machine may have other things to do.
fn at_once(what: &str, words: &[&str]) {
    let mut times: Vec<Duration> = (0..5)
        .map(|_| {
            let began = Instant::now();
            run(words);
            began.elapsed()
        })
        .collect();
    times.sort();
    println!("{what}: {:?} to {:?}", times[0], times[4]);
    assert!(times[0] < SOON, "{what}: {times:?}");
}

fn questions(a: &Mount, when: &str) {
    let (point, known) = (a.path().to_str().unwrap(), a.at("known"));
    at_once(&format!("{when}: df"), &["df", point]);
    at_once(&format!("{when}: ls"), &["ls", "-la", known.to_str().unwrap()]);
    at_once(&format!("{when}: status"), &[&common::imz(), "status", point]);
    at_once(&format!("{when}: status --json"), &[&common::imz(), "status", "--json", point]);
}

/// With things that are here and things that are not.
fn served(disk: &Disk) -> std::path::PathBuf {
    let served = disk.dir("served");
    fs::create_dir_all(served.join("known/unknown")).unwrap();
    fs::write(served.join("known/read"), "it was read").unwrap();
    fs::write(served.join("known/unread"), vec![1; 3 << 20]).unwrap();
    fs::write(served.join("known/large"), vec![2; 8 << 20]).unwrap();
    served
}

fn know(a: &Mount) {
    assert_eq!(fs::read_dir(a.at("known")).unwrap().count(), 4);
    assert_eq!(fs::read(a.at("known/read")).unwrap(), b"it was read");
    // the first range alone
    let mut start = [0; 1000];
    io::Read::read_exact(&mut File::open(a.at("known/large")).unwrap(), &mut start).unwrap();
    assert_eq!(start, [2; 1000]);
}

/// Each kind of thing that may be asked for has its answer, at once.
fn knows_that_it_is_away(a: &Mount, when: &str) {
    assert!(a.status()["away"].as_bool().unwrap());
    let began = Instant::now();
    is_unreachable(fs::read(a.at("known/unread")));
    is_unreachable(
        fs::read_dir(a.at("known/unknown")).and_then(Iterator::collect::<Result<Vec<_>, _>>),
    );
    is_unreachable(fs::metadata(a.at("known/unknown/name")));
    let mut end = [0; 10];
    let large = File::open(a.at("known/large")).unwrap();
    is_unreachable(std::os::unix::fs::FileExt::read_at(&large, &mut end, 7 << 20));
    let took = began.elapsed();
    println!("{when}: four things that are not here failed in {took:?}");
    assert!(took < Duration::from_secs(1), "{when}: {took:?}");
    // a stub has its name and its attributes, and can be changed
    assert_eq!(fs::metadata(a.at("known/unread")).unwrap().len(), 3 << 20);
    assert_eq!(fs::metadata(a.at("known/absent")).unwrap_err().kind(), io::ErrorKind::NotFound);
    fs::rename(a.at("known/unread"), a.at("known/moved")).unwrap();
    fs::rename(a.at("known/moved"), a.at("known/unread")).unwrap();
    // and what is here works in full
    assert_eq!(fs::read(a.at("known/read")).unwrap(), b"it was read");
    let mut start = [0; 1000];
    std::os::unix::fs::FileExt::read_exact_at(&large, &mut start, 0).unwrap();
    fs::create_dir_all(a.at(format!("made {when}/below"))).unwrap();
    fs::write(a.at(format!("made {when}/below/file")), when).unwrap();
    assert!(began.elapsed() < Duration::from_secs(3), "{when}: {:?}", began.elapsed());
}

/// Every packet is lost, and nobody says so: while the client still thinks that it is connected,
/// when it knows better, and when it is mounted in the midst of it.
#[test]
fn in_a_black_hole_what_is_here_answers_at_once() {
    let Some(disk) = Disk::new(256) else { return };
    let Some(network) = common::Network::new("hole") else { return };
    let served = served(&disk);
    let server = Server::start(&disk);
    let mut a = Mount::start(&server, &disk, "cache-a");
    know(&a);
    network.cut();
    assert!(a.is_connected());
    questions(&a, "not known yet");
    let began = Instant::now();
    is_unreachable(fs::read(a.at("known/unread")));
    println!("it was known after {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
    knows_that_it_is_away(&a, "known");
    questions(&a, "known");

    let point = a.path().to_str().unwrap().to_owned();
    let began = Instant::now();
    run(&["umount", &point]);
    println!("umount(8): {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    a.gone();
    let began = Instant::now();
    a.again();
    println!("mount: {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(7), "{:?}", began.elapsed());
    assert!(a.said().contains("offline"), "{}", a.said());
    knows_that_it_is_away(&a, "mounted");
    questions(&a, "mounted");
    let began = Instant::now();
    let (code, text) = imz_run(&["umount", &point]);
    assert_eq!(code, 3, "it does not wait, and loses nothing: {text}");
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());

    network.heal();
    back(&a);
    a.sync();
    assert_eq!(fs::read(a.at("known/unread")).unwrap(), vec![1; 3 << 20]);
    assert_same(a.path(), &served);
    a.no_conflicts();
}

/// No interface is up, as on a machine that starts in a train; then the name cannot be looked up.
#[test]
fn a_machine_without_a_network_mounts_what_it_has() {
    let Some(disk) = Disk::new(256) else { return };
    let Some(network) = common::Network::new("train") else { return };
    let served = served(&disk);
    let server = Server::start(&disk);
    let mut a = Mount::start(&server, &disk, "cache-a");
    know(&a);
    let point = a.path().to_str().unwrap().to_owned();
    assert_eq!(imz_run(&["umount", &point]).0, 0);
    a.gone();
    network.down();
    let began = Instant::now();
    a.again();
    println!("mount without a network: {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    knows_that_it_is_away(&a, "train");
    assert_eq!(imz_run(&["umount", "--now", &point]).0, 0);
    a.gone();

    // the same by a name that nobody knows
    let own = a.cache().join(".imz");
    let call = |from: &str, to: &str| {
        let state = State::open(&own, || unreachable!("it is there")).unwrap();
        state.edit(|facts| facts.source = facts.source.replace(from, to)).unwrap();
    };
    call("127.0.0.1", "nobody.invalid");
    a.set_source(server.source().replace("127.0.0.1", "nobody.invalid"));
    let began = Instant::now();
    a.again();
    println!("mount without the name: {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(7), "{:?}", began.elapsed());
    knows_that_it_is_away(&a, "nameless");
    assert_eq!(imz_run(&["umount", "--now", &point]).0, 0);
    a.gone();
    call("nobody.invalid", "127.0.0.1");
    a.set_source(server.source());

    network.up();
    a.again();
    a.sync();
    assert_same(&a.at("known"), &served.join("known"));
    assert!(served.join("made train/below/file").exists());
    assert!(served.join("made nameless/below/file").exists());
}

/// With `-o offline=wait` nothing fails for want of the server: it waits, and can be killed.
#[test]
fn who_may_wait_waits_until_the_server_is_back() {
    let Some(disk) = Disk::new(256) else { return };
    fs::create_dir(served(&disk).join("known/unknown/inner")).unwrap();
    let mut server = Server::start(&disk);
    let a = Mount::with(server.source(), &disk.dir("cache-a"), "offline=wait");
    know(&a);
    let cat = |name: &str| {
        let mut command = std::process::Command::new("cat");
        command.arg(a.at(name)).stdout(std::process::Stdio::piped());
        command.stderr(std::process::Stdio::null()).spawn().unwrap()
    };
    server.stop();
    let mut early = cat("known/unread");
    wait_for("it is known", 10, || a.status()["away"].as_bool().unwrap());
    let mut late = cat("known/unread");
    let mut lists = std::process::Command::new("ls");
    let mut lists = lists.arg(a.at("known/unknown")).spawn().unwrap();
    let mut ends = cat("known/large");
    let mut tired: Vec<_> = (0..20).map(|_| cat("known/unread")).collect();
    std::thread::sleep(Duration::from_secs(1));
    for child in [&mut early, &mut late, &mut lists, &mut ends] {
        assert!(child.try_wait().unwrap().is_none(), "it does not wait");
    }
    for (nth, child) in tired.iter_mut().enumerate() {
        let began = Instant::now();
        // not INT: who starts us in the background may have it ignored
        let signal = ["TERM", "USR1", "KILL"][nth % 3];
        run(&["kill", "-s", signal, &child.id().to_string()]);
        assert!(!child.wait().unwrap().success());
        assert!(began.elapsed() < Duration::from_secs(3), "SIG{signal}: {:?}", began.elapsed());
    }
    // what is here is not held up
    fs::write(a.at("known/new"), "new").unwrap();
    assert_eq!(fs::read(a.at("known/read")).unwrap(), b"it was read");
    server.restart();
    for (mut child, len) in [(early, 3 << 20), (late, 3 << 20), (ends, 8 << 20)] {
        let mut got = Vec::new();
        io::Read::read_to_end(&mut child.stdout.take().unwrap(), &mut got).unwrap();
        assert!(child.wait().unwrap().success() && got.len() == len, "{} of {len}", got.len());
    }
    assert!(lists.wait().unwrap().success());

    // a mount that is waited in can be taken away
    server.stop();
    wait_for("it is known", 15, || a.status()["away"].as_bool().unwrap());
    let mut stuck = std::process::Command::new("ls");
    let mut stuck = stuck.arg(a.at("known/unknown/inner")).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert!(stuck.try_wait().unwrap().is_none(), "it does not wait");
    let mut a = a;
    run(&["umount", "-l", a.path().to_str().unwrap()]);
    stuck.kill().unwrap();
    stuck.wait().unwrap();
    a.gone();
}

// ---- dead mounts ------------------------------------------------------------------------------

/// What a killed process leaves is cleaned up by `imz umount` and by the next `imz mount`; what lives,
/// or only does not answer, is left alone.
#[test]
fn a_dead_mount_is_told_from_a_live_one() {
    let Some(disk) = Disk::new(256) else { return };
    served(&disk);
    let mut server = Server::start(&disk);
    let mut a = Mount::start(&server, &disk, "cache-a");
    know(&a);
    let point = a.path().to_str().unwrap().to_owned();
    let cache = disk.dir("cache-b").to_str().unwrap().to_owned();
    let source = server.source();
    let other = ["mount", &source, &point, "--cache", &cache];
    common::imz_fails(&other, 4, "something is mounted here by imz already");
    a.freeze();
    let began = Instant::now();
    common::imz_fails(&other, 4, "something is mounted here by imz already");
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    a.thaw();
    fs::write(a.at("known/kept"), "it is not at the server").unwrap();
    server.kill();
    for round in 0..3 {
        a.kill();
        assert!(is_mounted(a.path()));
        let began = Instant::now();
        a.again(); // imz mount, and nothing else
        println!("a new mount over a dead one, round {round}: {:?}", began.elapsed());
        assert!(a.said().contains("had died"), "{}", a.said());
        assert_eq!(fs::read(a.at("known/kept")).unwrap(), b"it is not at the server");
        let info = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert_eq!(info.matches(&point).count(), 1, "the dead one is gone: {info}");
    }
    a.die_and_come_back(); // by imz umount
    server.restart();
    a.sync();
    assert!(server.dir().join("known/kept").exists());
}

// ---- pains ------------------------------------------------------------------------------------

#[test]
fn the_cache_is_removed_while_it_is_in_use() {
    let Some(disk) = Disk::new(256) else { return };
    let served = served(&disk);
    let mut server = Server::start(&disk);
    let mut a = Mount::start(&server, &disk, "cache-a");
    know(&a);
    fs::create_dir(a.at("mine")).unwrap();
    fs::write(a.at("mine/shipped"), "at the server").unwrap();
    fs::write(a.at("known/read"), "a second version").unwrap();
    a.sync();
    let model = disk.dir("model");
    run(&["cp", "-a", &format!("{}/.", served.display()), model.to_str().unwrap()]);
    // what is not shipped goes with the cache; what the server has must not be touched by that
    server.stop();
    away(&a);
    fs::write(a.at("known/read"), "a third version, that is lost").unwrap();
    fs::remove_file(a.at("mine/shipped")).unwrap();
    fs::write(a.at("mine/shipped"), "made anew, and lost").unwrap();
    run(&["sh", "-c", &format!("rm -rf {}/tree/*", a.cache().display())]);
    wait_for("it says so", 10, || a.status()["last_error"].to_string().contains("removed"));
    server.restart();
    a.sync();
    assert_eq!(fs::read(served.join("known/read")).unwrap(), b"a second version");
    assert_eq!(fs::read(served.join("known/unread")).unwrap(), vec![1; 3 << 20]);
    back(&a);
    // and the cache fills again
    wait_for("it is all there again", 10, || {
        fs::read_dir(a.at("known")).is_ok_and(|d| d.count() == 4)
    });
    assert_eq!(fs::read(a.at("known/read")).unwrap(), b"a second version");
    a.umount();

    // all of the tree, with nothing that the server lacks
    a.again();
    fs::remove_dir_all(a.cache().join("tree")).unwrap();
    wait_for("it says so", 10, || a.status()["last_error"].to_string().contains("all of them"));
    let (code, text) = imz_run(&["umount", "--now", a.path().to_str().unwrap()]);
    assert_eq!(code, 0, "{text}");
    a.gone();
    a.again();
    back(&a);
    assert!(a.said().contains("removed files of the cache"), "{}", a.said());
    assert_same(a.path(), &served);
    a.umount();
}

#[test]
fn the_cache_is_removed_while_nobody_uses_it() {
    let Some(disk) = Disk::new(256) else { return };
    let served = served(&disk);
    let mut server = Server::start(&disk);
    let mut a = Mount::start(&server, &disk, "cache-a");
    know(&a);
    let point = a.path().to_str().unwrap().to_owned();
    // the files, and nothing pends: they come back
    a.umount();
    run(&["sh", "-c", &format!("rm -rf {}/tree/*", a.cache().display())]);
    a.again();
    back(&a);
    assert!(a.said().contains("removed files of the cache"), "{}", a.said());
    assert_same(a.path(), &served);
    a.umount();
    // the files, and something pends: it is refused, with what to do
    a.again();
    server.stop();
    away(&a);
    fs::write(a.at("pending"), "nowhere else").unwrap();
    assert_eq!(imz_run(&["umount", "--now", &point]).0, 0);
    a.gone();
    fs::remove_dir_all(a.cache().join("tree")).unwrap();
    server.restart();
    let cache = a.cache().to_str().unwrap().to_owned();
    let source = server.source();
    for _ in 0..2 {
        common::imz_fails(&["mount", &source, &point, "--cache", &cache], 6, "--cache");
    }
    // imz's own part: it is no cache any more, and nothing is taken for one
    fs::create_dir_all(a.cache().join("tree/known")).unwrap();
    fs::remove_dir_all(a.cache().join(".imz")).unwrap();
    common::imz_fails(&["mount", &source, &point, "--cache", &cache], 4, "--cache");
    // all of it: a new cache
    fs::remove_dir_all(a.cache()).unwrap();
    a.again();
    assert_same(a.path(), &served);
    assert!(!served.join("pending").exists());
    a.umount();
}

/// The cache's disk is full while the server is away, and while something is fetched.
#[test]
fn a_full_disk_stops_nothing_for_good() {
    let Some(disk) = Disk::new(64) else { return };
    let Some(there) = Disk::new(128) else { return };
    fs::write(there.dir("served").join("large"), vec![5; 20 << 20]).unwrap();
    let mut server = Server::start(&there);
    let a = Mount::start(&server, &disk, "cache-a");
    fs::write(a.at("before"), vec![1; 1 << 20]).unwrap();
    a.sync();
    let filler = disk.fill(6 << 20);
    let error = fs::read(a.at("large")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "a fetch: {error}");
    let error = fs::write(a.at("none"), [1; 100_000]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
    // what came of it can be given up, also on a full disk
    let (code, text) = imz_run(&["evict", a.at("large").to_str().unwrap()]);
    assert_eq!(code, 0, "{text}");
    fs::remove_file(a.at("none")).unwrap();
    server.stop();
    away(&a);
    let mut whole = Vec::new();
    let mut refused = 0;
    for nth in 0..40 {
        let (path, bytes) = (a.at(format!("file {nth}")), vec![nth as u8; 300_000]);
        match fs::write(&path, &bytes) {
            Ok(()) => whole.push((path, bytes)),
            Err(e) => {
                assert_eq!(e.raw_os_error(), Some(libc::ENOSPC), "{e}");
                refused += 1;
            }
        }
    }
    assert!(refused > 0 && !whole.is_empty(), "{refused} refused");
    assert!(a.status()["pid"].is_u64(), "it answers");
    assert_eq!(fs::read(a.at("before")).unwrap(), vec![1; 1 << 20], "and what is here is read");
    fs::remove_file(filler).unwrap();
    server.restart();
    a.sync();
    for (path, bytes) in &whole {
        let there = server.dir().join(path.file_name().unwrap());
        assert_eq!(fs::read(path).unwrap(), *bytes);
        assert_eq!(fs::read(there).unwrap(), *bytes, "what was written is at the server");
    }
    assert_eq!(fs::read(a.at("large")).unwrap(), vec![5; 20 << 20]);
    assert_same(a.path(), server.dir());
}
