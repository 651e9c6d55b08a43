//! `imz conflicts` on real mounts: what is listed, shown and compared, and each decision.

#![allow(clippy::unwrap_used)]

mod common;

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use common::compare::assert_same;
use common::{Disk, Mount, Server, imz_fails, imz_run, wait_for};
use serde_json::Value;

/// Two clients of one volume, of which the second one can be away.
struct Two {
    server: Server,
    a: Mount,
    b: Mount,
    disk: Disk,
}

impl Two {
    fn new() -> Option<Two> {
        let disk = Disk::new(512)?;
        let server = Server::start(&disk);
        let a = Mount::start(&server, &disk, "a");
        let b = Mount::start(&server, &disk, "b");
        Some(Two { server, a, b, disk })
    }
    /// B does this without the server, then A does that with it, then B comes back.
    fn apart(&mut self, b_does: impl FnOnce(&Path), a_does: impl FnOnce(&Path)) {
        self.a.sync();
        self.b.sync();
        let (point, there) = (self.b.path().to_owned(), self.b.path().to_owned());
        // all of it is in the cache
        let read = format!("find {} -type f -exec cat {{}} + > /dev/null", point.display());
        common::run(&["sh", "-c", &read]);
        let words = [OsStr::new("umount"), "--now".as_ref(), point.as_ref()];
        assert_eq!(imz_run(&words).0, 0);
        self.b.gone();
        self.server.stop();
        self.b.again();
        b_does(&there);
        assert_eq!(imz_run(&words).0, 0);
        self.b.gone();
        self.server.restart();
        wait_for("A to be back", 30, || self.a.is_connected());
        a_does(self.a.path());
        self.a.sync();
        self.b.again();
        wait_for("B to be back", 30, || self.b.is_connected());
        self.b.sync();
    }
    fn ask(&self, words: &[&str]) -> String {
        let mut all = vec!["conflicts"];
        all.extend(words);
        let (code, text) = imz_run(&all);
        assert_eq!(code, 0, "{words:?}: {text}");
        text
    }
    fn at_a(&self) -> String {
        self.a.path().to_str().unwrap().to_owned()
    }
    /// Conflicts by the path that they are about.
    fn id_of(&self, path: &str) -> String {
        let all = self.ask(&["list", "--json", &self.at_a()]);
        let all: Vec<Value> = serde_json::from_str(&all).unwrap();
        let found = all.iter().find(|it| it["path"] == path);
        found.unwrap_or_else(|| panic!("{path}: {all:#?}"))["id"].as_str().unwrap().to_owned()
    }
    fn both_see(&self, path: &str, text: &str) {
        for mount in [&self.a, &self.b] {
            assert_eq!(fs::read_to_string(mount.at(path)).unwrap(), text, "{path}");
        }
    }
    fn count(&self, count: u64) {
        for mount in [&self.a, &self.b] {
            wait_for("the count of conflicts", 5, || mount.status()["conflicts"] == count);
        }
    }
}

fn conflicts<'a>(words: &[&'a str]) -> Vec<&'a str> {
    [&["conflicts"], words].concat()
}

#[test]
fn a_conflict_is_shown_and_decided_from_any_client() {
    let Some(mut two) = Two::new() else { return };
    let write = |dir: &Path, name: &str, text: &str| fs::write(dir.join(name), text).unwrap();
    for name in ["mine", "theirs", "both", "keep", "removed"] {
        write(two.a.path(), name, "at first\nsecond line\n");
    }
    write(two.a.path(), "binary", "\0at first");
    fs::create_dir(two.a.at("dir")).unwrap();
    let names = ["mine", "theirs", "both", "keep", "binary"];
    two.apart(
        |b| {
            names.iter().for_each(|name| write(b, name, "of b\nsecond line\n"));
            write(b, "binary", "\0of b, and longer");
            write(b, "removed", "of b");
            write(b, "made", "made by b");
            fs::rename(b.join("dir"), b.join("dir of b")).unwrap();
        },
        |a| {
            names.iter().for_each(|name| write(a, name, "of a\nsecond line\n"));
            write(a, "binary", "\0of a");
            fs::remove_file(a.join("removed")).unwrap();
            write(a, "made", "made by a");
            fs::rename(a.join("dir"), a.join("dir of a")).unwrap();
        },
    );
    two.count(8);
    names[..4].iter().for_each(|name| two.both_see(name, "of a\nsecond line\n"));
    two.both_see("made", "made by a");
    assert!(!two.b.at("removed").exists() && two.b.at("dir of a").is_dir());
    assert!(!two.a.at(".imz-conflicts").exists(), "no client sees it");

    // what people see
    let at = two.at_a();
    let list = two.ask(&["list", &at]);
    assert_eq!(list.lines().count(), 8, "{list}");
    let id = two.id_of("mine");
    let line = list.lines().find(|line| line.starts_with(&format!("{id}  "))).unwrap();
    assert!(line.contains("  mine  store  somebody else has changed"), "{line}");
    let shown = two.ask(&["show", &at, &id]);
    for part in ["why     somebody else has", "kept    the contents, 17 B", "store by ", "version"]
    {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let told: Value = serde_json::from_str(&two.ask(&["show", "--json", &at, &id])).unwrap();
    assert_ne!(told["mine"]["node"], told["theirs"]["node"], "{told:#}");
    assert_eq!(told["theirs"]["stamp"], told["now"]["stamp"], "{told:#}");
    let diff = two.ask(&["diff", &at, &id]);
    assert!(diff.starts_with("--- mine (theirs: "), "{diff}");
    assert!(diff.contains("\n-of a\n+of b\n second line\n"), "{diff}");
    let diff = two.ask(&["diff", &at, &two.id_of("binary")]);
    assert!(diff.contains("theirs 5 bytes, mine 17 bytes; they first differ at byte 4"), "{diff}");
    let gone = two.ask(&["show", &at, &two.id_of("removed")]);
    assert!(gone.contains("theirs  removed (") && gone.contains("now     nothing"), "{gone}");

    // what cannot be
    imz_fails(&conflicts(&["show", &at, "1-999"]), 5, "no conflict 1-999");
    imz_fails(&conflicts(&["show", &at, "../x"]), 5, "no conflict");
    imz_fails(&conflicts(&["resolve", &at, &id, "keep"]), 2, "PATH");
    imz_fails(&conflicts(&["resolve", &at, &id, "mine", "--stamp", "1"]), 4, "look again");
    imz_fails(
        &conflicts(&["resolve", &at, &id, "keep", "no/dir"]),
        4,
        "its directory is not there",
    );
    imz_fails(&conflicts(&["resolve", &at, &id, "keep", ".imz/x"]), 4, "belongs to imz");
    imz_fails(&conflicts(&["resolve", &at, &id, "keep", "both"]), 4, "something at that path");
    two.count(8);

    // every decision, from either client, and at the server itself
    let b = two.b.path().to_str().unwrap().to_owned();
    let served = two.server.dir().to_str().unwrap().to_owned();
    two.ask(&["resolve", &b, &id, "mine"]);
    two.both_see("mine", "of b\nsecond line\n");
    two.ask(&["resolve", &served, &two.id_of("theirs"), "theirs"]);
    two.both_see("theirs", "of a\nsecond line\n");
    let said = two.ask(&["resolve", "--json", &served, &two.id_of("both"), "both"]);
    let said: Value = serde_json::from_str(&said).unwrap();
    let name = said["done"].as_str().unwrap().rsplit(' ').next().unwrap().to_owned();
    assert!(name.starts_with("both.conflict-"), "{said}");
    two.both_see(&name, "of b\nsecond line\n");
    two.both_see("both", "of a\nsecond line\n");
    two.ask(&["resolve", &at, &two.id_of("keep"), "keep", "dir of a/kept"]);
    two.both_see("dir of a/kept", "of b\nsecond line\n");
    two.ask(&["resolve", &at, &two.id_of("removed"), "mine"]);
    two.both_see("removed", "of b");
    two.ask(&["resolve", &at, &two.id_of("made"), "mine"]);
    two.both_see("made", "made by b");
    two.ask(&["resolve", &at, &two.id_of("dir"), "mine"]);
    for mount in [&two.a, &two.b] {
        assert!(mount.at("dir of b/kept").exists() && !mount.at("dir of a").exists());
    }
    two.ask(&["resolve", &b, &two.id_of("binary"), "theirs"]);
    two.count(0);
    assert_eq!(two.ask(&["list", &at]), "");
    assert_eq!(fs::read_dir(two.server.dir().join(".imz-conflicts")).unwrap().count(), 0);

    // the decisions are changes like all others
    fs::write(two.a.at("mine"), "goes on").unwrap();
    two.both_see("mine", "goes on");
    two.a.sync();
    two.b.sync();
    assert_same(two.a.path(), two.b.path());
    assert_same(two.a.path(), two.server.dir());
    two.server.stop();
    wait_for("A to see that", 15, || !two.a.is_connected());
    imz_fails(&conflicts(&["list", &at]), 3, "is away");
    drop(two.disk);
}

#[test]
fn what_needs_not_be_shipped_is_counted() {
    let Some(disk) = Disk::new(512) else { return };
    let server = Server::start(&disk);
    let a = Mount::with(server.source(), &disk.dir("a"), "age=60s");
    for no in 0..50 {
        fs::write(a.at(format!("temp{no}")), vec![7; 20_000]).unwrap();
        fs::write(a.at("log"), vec![no; 10_000]).unwrap();
    }
    for no in 0..50 {
        fs::remove_file(a.at(format!("temp{no}"))).unwrap();
    }
    assert_eq!(a.status()["saved_records"], 0, "nothing was shipped yet");
    a.sync();
    let status = a.status();
    let (records, bytes) =
        (status["saved_records"].as_u64().unwrap(), status["saved_bytes"].as_u64().unwrap());
    println!("{records} records and {bytes} bytes were not shipped");
    // create, store and unlink of each, and the stores of the log but for the last
    assert!((150..400).contains(&records), "{status:#}");
    assert!((1_400_000..1_600_000).contains(&bytes), "{status:#}");
    let (code, text) = imz_run(&["status", a.path().to_str().unwrap()]);
    assert!(code == 0 && text.contains("not shipped since the start"), "{text}");
    // the same journal, read again by another connection, counts once
    fs::write(a.at("last"), "").unwrap();
    a.sync();
    assert_eq!(a.status()["saved_records"], records);
    assert_same(a.path(), server.dir());
}
