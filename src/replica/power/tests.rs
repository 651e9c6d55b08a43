//! Each part of the comparison by itself: a cache whose tree and journal were pulled apart by hand.
//! (tests/power.rs cuts the power for real.)

use std::path::PathBuf;

use super::*;
use crate::kml::log::Options;
use crate::kml::record::{Attr, Change, Gone, Origin, Over, Place, ROOT, Range, Record};
use crate::replica::meta::Meta;
use crate::replica::ops::time_of_ns;
use crate::sys::cred::Caller;
use crate::sys::fs::RenameMode;

const NODE: u32 = 5;
const EPOCH: u32 = 9;
const ME: Caller = Caller { uid: 0, gid: 0, umask: 0 };
const WHEN: u64 = 1_700_000_000_000_000_007;

struct Rig {
    dir: tempfile::TempDir,
    tree: Tree,
    log: Log,
}

fn name(s: &str) -> Name {
    Name::new(s.as_bytes()).unwrap()
}

fn place(s: &str) -> Place {
    Place { dir: ROOT, base: Stamp(0), name: name(s) }
}

fn gone(fid: Fid) -> Gone {
    let attr = Attr { nlink: 1, ..Attr::default() };
    Gone { fid, base: Stamp(0), attr, target: None }
}

fn fid(counter: u64) -> Fid {
    Fid::new(NODE, counter)
}

fn create(at: &str, counter: u64) -> Op {
    Op::Create { at: place(at), fid: fid(counter), mode: 0o640, umask: 0 }
}

fn store(counter: u64, size: u64) -> Op {
    let mtime = time_of_ns(WHEN);
    let ranges = vec![Range { at: 0, len: size }];
    Op::Store { fid: fid(counter), base: Stamp(0), size, mtime, ranges, old_size: 0 }
}

fn rename(from: &str, to: &str, counter: u64, over: Over) -> Op {
    let (from, to, base) = (place(from), place(to), Stamp(0));
    Op::Rename { from, to, fid: fid(counter), base, over }
}

const NOTHING: Over = Over::Nothing { noreplace: false };

impl Rig {
    fn new() -> Rig {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("t")).unwrap();
        let tree = Tree::open(&dir.path().join("t"), &dir.path().join("i"), true).unwrap();
        let log = Log::open_or_create(&dir.path().join("k"), 0, 7, Options::default()).unwrap();
        Rig { dir, tree, log }
    }
    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join("t").join(name)
    }
    fn record(&self, op: Op, outcome: Outcome) {
        let origin = Origin::default();
        let record = Record { time_ns: WHEN, origin, uid: 0, gid: 0, path: vec![], op };
        let ticket = self.log.append(&record).unwrap();
        self.log.settle(ticket, outcome);
    }
    fn done(&self, op: Op) {
        self.record(op, Outcome::Done);
    }
    fn put(&self, at: &str, meta: &Meta, bytes: &str) {
        let (root, when) = (self.tree.root().clone(), time_of_ns(WHEN));
        self.tree.create(&root, &name(at), ME, 0o600, meta, when).unwrap();
        std::fs::write(self.at(at), bytes).unwrap();
    }
    /// As the index had it when it was last durable.
    fn index_has(&self, at: &str, of: Fid) {
        self.tree.index.set(of, ROOT, &name(at));
    }
    fn index_lacks(&self, at: &str, of: Fid) {
        self.tree.index.remove(of, ROOT, &name(at)).unwrap();
    }
    fn recover(&self) -> Report {
        let aside = self.dir.path().join("aside");
        recover(&self.tree, &self.log, (EPOCH, NODE), &aside).unwrap()
    }
    /// The changes that are not void, from a record on.
    fn ops(&self, from: u64) -> Vec<Op> {
        let entries = self.log.entries(Seq(from)).map(|entry| entry.unwrap());
        let kept = entries.filter(|entry| entry.outcome != Outcome::Void);
        kept.map(|entry| entry.record.op).collect()
    }
    fn fid_at(&self, at: &str) -> Option<Fid> {
        self.tree.meta(self.tree.root(), &name(at)).ok().flatten().map(|meta| meta.fid)
    }
}

#[test]
fn records_without_effect_are_done_again_in_order() {
    let rig = Rig::new();
    let mode = Change { mode: Some(0o750), ..Change::default() };
    let (at, base) = (place("d"), Stamp(0));
    rig.done(Op::Mkdir { at, fid: fid(10), mode: 0o700, umask: 0 });
    rig.done(Op::Setattr { fid: fid(10), base, new: mode, old: mode });
    rig.done(create("empty", 11));
    rig.done(create("lost", 12));
    rig.done(store(12, 5));
    rig.done(Op::Symlink { at: place("s"), fid: fid(13), target: b"to".to_vec() });
    rig.done(rename("s", "s2", 13, NOTHING));
    rig.done(create("short-lived", 14));
    rig.done(Op::Unlink { at: place("short-lived"), gone: gone(fid(14)) });
    let report = rig.recover();
    assert_eq!((report.in_doubt, report.void, report.journaled), (9, 2, 0), "{report:?}");
    assert_eq!(fs::stat(&**rig.tree.root(), b"d").unwrap().mode & 0o7777, 0o750);
    assert_eq!(rig.fid_at("empty"), Some(fid(11)));
    assert!(!rig.at("lost").exists(), "an empty file in place of one whose contents are lost");
    assert_eq!(std::fs::read_link(rig.at("s2")).unwrap(), PathBuf::from("to"));
    assert!(!rig.at("short-lived").exists());
    // once more changes nothing
    let again = rig.recover();
    assert_eq!((again.void, again.journaled, again.store), (0, 0, vec![]));
}

/// Found by cutting the power: the first version was void, for it was nowhere, and the second one
/// then replaced what it had never seen.
#[test]
fn what_a_later_record_replaced_is_not_lost() {
    let rig = Rig::new();
    for counter in [10, 11] {
        rig.done(create("tmp", counter));
        rig.done(store(counter, 5));
        let over = if counter == 10 { NOTHING } else { Over::Replaced(gone(fid(10))) };
        rig.done(rename("tmp", "file", counter, over));
    }
    rig.put("file", &Meta::whole(fid(11)), "12345");
    let report = rig.recover();
    assert_eq!((report.void, report.redone, report.journaled), (0, 0, 0), "{report:?}");
    // but a second version that is lost has replaced nothing
    let rig = Rig::new();
    for counter in [10, 11] {
        rig.done(create("tmp", counter));
        rig.done(store(counter, 5));
        let over = if counter == 10 { NOTHING } else { Over::Replaced(gone(fid(10))) };
        rig.done(rename("tmp", "file", counter, over));
    }
    let report = rig.recover();
    assert_eq!(report.void, 6, "{report:?}");
    assert!(!rig.at("file").exists() && !rig.at("tmp").exists());
}

#[test]
fn what_only_looks_missing_is_left_alone() {
    let rig = Rig::new();
    // unlinked after a further name was given, which went without a record
    let mut seen = gone(fid(10));
    seen.attr.nlink = 2;
    rig.put("x", &Meta::whole(fid(10)), "precious");
    rig.done(create("x", 10));
    rig.done(Op::Unlink { at: place("x"), gone: seen });
    // cut, then written again: the record of the cut must not cut it once more
    rig.put("cut", &Meta::whole(fid(11)), "written after the cut");
    let new = Change { size: Some(0), mtime: Some(time_of_ns(WHEN)), ..Change::default() };
    rig.done(Op::Setattr { fid: fid(11), base: Stamp(0), new, old: Change::default() });
    // a name that somebody else has
    rig.put("taken", &Meta::whole(fid(12)), "mine");
    rig.index_has("taken", fid(12));
    rig.done(create("taken", 13));
    let report = rig.recover();
    assert_eq!(std::fs::read(rig.at("x")).unwrap(), b"precious");
    assert_eq!(std::fs::read(rig.at("cut")).unwrap(), b"written after the cut");
    assert_eq!(std::fs::read(rig.at("taken")).unwrap(), b"mine");
    assert_eq!(report.store, [fid(10), fid(11)], "they are stored as they are");
}

#[test]
fn effects_without_record_are_journaled() {
    let rig = Rig::new();
    // made by us, before and after the index was last durable
    let known = [("a", 20), ("b", 21), ("old", 22)];
    for (at, counter) in known {
        rig.put(at, &Meta { stamp: Stamp(3), ..Meta::whole(fid(counter)) }, "");
    }
    let root = rig.tree.root().clone();
    let when = time_of_ns(WHEN);
    let made = rig.tree.mkdir(&root, &name("new"), ME, 0o711, &Meta::whole(fid(30)), when).unwrap();
    rig.put("made", &Meta::whole(fid(31)), "bytes");
    let go = |from: &str, dir, to: &str, counter, other| {
        let (old, new) = (name(from), name(to));
        let to = (dir, &new);
        let mode = RenameMode::Replace;
        rig.tree.rename((&root, &old), to, fid(counter), other, mode, when).unwrap();
    };
    go("a", &*made, "a2", 20, None);
    go("b", &*root, "old", 21, Some(fid(22)));
    // the index as it was
    for counter in [30, 31, 20, 21] {
        for (dir, at) in rig.tree.names(fid(counter)).unwrap() {
            rig.tree.index.remove(fid(counter), dir, &at).unwrap();
        }
    }
    known.iter().for_each(|(at, counter)| rig.index_has(at, fid(*counter)));
    let report = rig.recover();
    let ops = rig.ops(1);
    let has = |what: &dyn Fn(&Op) -> bool| ops.iter().position(what);
    let made_dir = has(&|op| matches!(op, Op::Mkdir { fid: f, mode: 0o711, .. } if *f == fid(30)));
    let moved = has(
        &|op| matches!(op, Op::Rename { fid: f, to, .. } if *f == fid(20) && to.dir == fid(30)),
    );
    assert!(made_dir.unwrap() < moved.unwrap(), "{ops:#?}");
    assert!(has(&|op| matches!(op, Op::Create { fid: f, .. } if *f == fid(31))).is_some());
    let replaced = has(&|op| match op {
        Op::Rename { fid: f, over: Over::Replaced(gone), .. } => {
            *f == fid(21) && gone.fid == fid(22)
        }
        _ => false,
    });
    assert!(replaced.is_some(), "{ops:#?}");
    assert_eq!(report.store, [fid(31)], "the new file's bytes are to be stored");
    let count = ops.len();
    rig.recover();
    assert_eq!(rig.ops(1).len(), count, "once is enough");
}

#[test]
fn what_the_server_sent_is_neither_ours_nor_believed() {
    let rig = Rig::new();
    let theirs = |counter| Meta { stamp: Stamp(4), ..Meta::whole(Fid::new(2, counter)) };
    rig.put("came", &theirs(1), "perhaps zeros");
    rig.put("empty", &theirs(2), "");
    rig.index_lacks("came", Fid::new(2, 1));
    rig.index_lacks("empty", Fid::new(2, 2));
    // written to since, with a record: ours
    rig.put("ours", &theirs(3), "12345");
    let op = match store(1, 5) {
        Op::Store { base, size, mtime, ranges, old_size, .. } => {
            Op::Store { fid: Fid::new(2, 3), base, size, mtime, ranges, old_size }
        }
        other => other,
    };
    rig.done(op);
    let report = rig.recover();
    assert_eq!((report.journaled, report.distrusted, report.kept_aside), (0, 1, 1), "{report:?}");
    let meta = rig.tree.meta(rig.tree.root(), &name("came")).unwrap().unwrap();
    assert!(!meta.complete && meta.stale && meta.missing(0, 100) == Some((0, 13)), "{meta:?}");
    let kept: Vec<_> = std::fs::read_dir(rig.dir.path().join("aside")).unwrap().collect();
    assert_eq!(std::fs::read(kept[0].as_ref().unwrap().path()).unwrap(), b"perhaps zeros");
    assert!(rig.tree.meta(rig.tree.root(), &name("ours")).unwrap().unwrap().complete);
    assert_eq!(report.store, [Fid::new(2, 3)], "its time is not the one that was announced");
}

#[test]
fn half_made_objects_go_unless_they_hold_something() {
    let rig = Rig::new();
    std::fs::write(rig.at("nobody"), "").unwrap();
    std::fs::create_dir(rig.at("empty dir")).unwrap();
    std::fs::write(rig.at("with bytes"), "bytes").unwrap();
    std::fs::write(rig.at("known"), "").unwrap();
    rig.done(create("known", 40));
    let report = rig.recover();
    assert_eq!((report.half_made, report.kept_aside), (3, 1));
    assert_eq!(rig.fid_at("known"), Some(fid(40)));
    let left = std::fs::read_dir(rig.dir.path().join("t")).unwrap().count();
    assert_eq!(left, 1);
}
