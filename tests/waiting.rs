//! Requests that wait: a process that waits for the server can be killed, and a mount that is
//! waited in can be taken away.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use common::{Disk, Mount, Server, imz_run, is_mounted, wait_for};

/// Far less than the time after which a silent server counts as away, which is 10 s.
const PROMPT: Duration = Duration::from_secs(3);

/// A mount of a server that is silent, with names but no contents in its cache.
fn silent() -> Option<(Disk, Server, Mount)> {
    let disk = Disk::new(256)?;
    let served = disk.dir("served");
    for name in ["one", "two", "three"] {
        fs::write(served.join(name), vec![7; 3 << 20]).unwrap();
    }
    let server = Server::start(&disk);
    let a = Mount::start(&server, &disk, "cache-a");
    assert_eq!(fs::read_dir(a.path()).unwrap().count(), 3);
    server.freeze();
    Some((disk, server, a))
}

fn reader(path: &Path) -> Child {
    Command::new("cat").arg(path).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Waits until the process sleeps in a request.
fn sleeps(child: &Child) {
    let stat = format!("/proc/{}/stat", child.id());
    wait_for("the reader waits", 5, || {
        let text = fs::read_to_string(&stat).unwrap();
        let state = text.rsplit(')').next().unwrap().trim_start().chars().next();
        matches!(state, Some('S' | 'D')) && text.contains("(cat)")
    });
    // it may sleep before it comes so far
    std::thread::sleep(Duration::from_millis(200));
}

fn end(child: &mut Child) -> (ExitStatus, Duration) {
    let began = Instant::now();
    (child.wait().unwrap(), began.elapsed())
}

#[test]
fn who_waits_for_the_server_can_be_killed() {
    let Some((_disk, server, a)) = silent() else { return };
    for signal in ["KILL", "TERM", "USR1"] {
        let mut child = reader(&a.at("one"));
        sleeps(&child);
        common::run(&["kill", "-s", signal, &child.id().to_string()]);
        let (status, took) = end(&mut child);
        assert!(took < PROMPT, "SIG{signal} took {took:?}");
        assert!(!status.success(), "SIG{signal}: {status}");
    }
    // what was given up did no harm
    server.thaw();
    assert_eq!(fs::read(a.at("one")).unwrap(), vec![7; 3 << 20]);
    a.no_conflicts();
}

#[test]
fn many_may_wait_and_others_go_on() {
    let Some((_disk, server, a)) = silent() else { return };
    // more than any queue between the kernel and us has places
    let mut children: Vec<Child> = (0..150).map(|_| reader(&a.at("two"))).collect();
    children.iter().for_each(sleeps_soon);
    let began = Instant::now();
    fs::write(a.at("new"), "new").unwrap();
    assert_eq!(fs::read(a.at("new")).unwrap(), b"new");
    fs::remove_file(a.at("new")).unwrap();
    assert!(began.elapsed() < PROMPT, "what is here waits too: {:?}", began.elapsed());
    let (killed, left) = children.split_at_mut(75);
    killed.iter_mut().for_each(|child| child.kill().unwrap());
    for child in killed {
        let (_, took) = end(child);
        assert!(took < PROMPT, "{took:?}");
    }
    server.thaw();
    for child in left {
        assert!(end(child).0.success());
    }
}

fn sleeps_soon(child: &Child) {
    let stat = format!("/proc/{}/stat", child.id());
    wait_for("a reader waits", 10, || fs::read_to_string(&stat).unwrap().contains("(cat) S"));
}

#[test]
fn a_mount_in_which_somebody_waits_can_be_taken_away() {
    let Some((_disk, _server, mut a)) = silent() else { return };
    let mut child = reader(&a.at("three"));
    sleeps(&child);
    let (code, text) = imz_run(&["umount", "--now", a.path().to_str().unwrap()]);
    if code != 0 {
        // busy: as a person would
        assert!(text.contains("busy"), "{code}: {text}");
        common::run(&["umount", "-l", a.path().to_str().unwrap()]);
    }
    assert!(!is_mounted(a.path()));
    child.kill().unwrap();
    let (status, took) = end(&mut child);
    assert!(took < PROMPT && !status.success(), "{status} after {took:?}");
    a.gone();
}
