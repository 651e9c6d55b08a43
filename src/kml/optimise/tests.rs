//! Optimised replay = full replay, on a small tree in memory that applies records.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::kml::record::{Attr, Gone, ROOT};
use crate::kml::samples;

#[derive(Clone, PartialEq, Debug)]
enum Kind {
    File(Vec<u8>),
    Dir(BTreeMap<Name, Fid>),
    Link(Vec<u8>),
    Special(u64),
}

#[derive(Clone, PartialEq, Debug)]
struct Node {
    kind: Kind,
    attr: (u32, u32, u32),
    atime: Time,
    mtime: Time,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

#[derive(Clone, PartialEq, Debug)]
struct Tree(BTreeMap<Fid, Node>);

fn time(ns: u64) -> Time {
    Time { sec: (ns / 1_000_000_000) as i64, nsec: (ns % 1_000_000_000) as u32 }
}

impl Tree {
    fn new() -> Tree {
        let mut tree = Tree(BTreeMap::new());
        tree.make(ROOT, Kind::Dir(BTreeMap::new()), 0o755, &samples::small(0));
        tree
    }
    fn node(&mut self, fid: Fid) -> &mut Node {
        self.0.get_mut(&fid).unwrap_or_else(|| panic!("no object {fid}"))
    }
    fn make(&mut self, fid: Fid, kind: Kind, mode: u32, record: &Record) {
        let now = time(record.time_ns);
        let attr = (mode, record.uid, record.gid);
        let node = Node { kind, attr, atime: now, mtime: now, xattrs: BTreeMap::new() };
        assert!(self.0.insert(fid, node).is_none(), "{fid} made twice");
    }
    fn entries(&mut self, dir: Fid) -> &mut BTreeMap<Name, Fid> {
        match &mut self.node(dir).kind {
            Kind::Dir(entries) => entries,
            other => panic!("{dir} is no directory but {other:?}"),
        }
    }
    fn nlink(&self, fid: Fid) -> u32 {
        let dirs = self.0.values().filter_map(|node| match &node.kind {
            Kind::Dir(entries) => Some(entries),
            _ => None,
        });
        dirs.flat_map(BTreeMap::values).filter(|found| **found == fid).count() as u32
    }
    fn enter(&mut self, at: &Place, fid: Fid) {
        assert!(self.entries(at.dir).insert(at.name.clone(), fid).is_none(), "{at:?} is taken");
    }
    fn leave(&mut self, at: &Place, fid: Fid) {
        assert_eq!(self.entries(at.dir).remove(&at.name), Some(fid), "{at:?}");
    }
    fn reap(&mut self, fid: Fid) {
        if self.nlink(fid) == 0 {
            let node = self.0.remove(&fid).unwrap();
            assert!(!matches!(node.kind, Kind::Dir(entries) if !entries.is_empty()), "not empty");
        }
    }

    /// `now`: the objects as they are when the records are shipped, where stores take their bytes.
    fn apply(&mut self, record: &Record, now: &Tree) {
        match &record.op {
            Op::Noop => {}
            Op::Create { at, fid, mode, umask } => {
                self.make(*fid, Kind::File(vec![]), mode & !umask, record);
                self.enter(at, *fid);
            }
            Op::Mkdir { at, fid, mode, umask } => {
                self.make(*fid, Kind::Dir(BTreeMap::new()), mode & !umask, record);
                self.enter(at, *fid);
            }
            Op::Symlink { at, fid, target } => {
                self.make(*fid, Kind::Link(target.clone()), 0o777, record);
                self.enter(at, *fid);
            }
            Op::Mknod { at, fid, mode, umask, rdev } => {
                self.make(*fid, Kind::Special(*rdev), mode & !umask, record);
                self.enter(at, *fid);
            }
            Op::Link { at, fid, .. } => {
                self.node(*fid);
                self.enter(at, *fid);
            }
            Op::Unlink { at, gone } | Op::Rmdir { at, gone } => {
                self.leave(at, gone.fid);
                self.reap(gone.fid);
            }
            Op::Rename { from, to, fid, over, .. } => {
                self.leave(from, *fid);
                match over {
                    Over::Nothing { .. } => {}
                    Over::Replaced(gone) => {
                        self.leave(to, gone.fid);
                        self.reap(gone.fid);
                    }
                    Over::Exchanged { fid: other, .. } => {
                        self.leave(to, *other);
                        self.enter(from, *other);
                    }
                }
                self.enter(to, *fid);
            }
            Op::Setattr { fid, new, .. } => self.setattr(*fid, new, time(record.time_ns)),
            Op::Setxattr { fid, name, value, .. } => {
                self.node(*fid).xattrs.insert(name.clone(), value.clone());
            }
            Op::Removexattr { fid, name, .. } => {
                assert!(self.node(*fid).xattrs.remove(name).is_some(), "no such attribute");
            }
            Op::Store { fid, size, mtime, ranges, .. } => {
                let source = now.0.get(fid).map(|node| node.kind.clone());
                let node = self.node(*fid);
                node.mtime = *mtime;
                let Kind::File(data) = &mut node.kind else { panic!("{fid} is no file") };
                data.resize(*size as usize, 0);
                let Some(Kind::File(bytes)) = source else { return };
                for at in ranges.iter().flat_map(|range| range.at..range.at + range.len) {
                    data[at as usize] = bytes.get(at as usize).copied().unwrap_or(0);
                }
            }
        }
        for place in record.op.places().into_iter().flatten() {
            self.node(place.dir).mtime = time(record.time_ns);
        }
    }
    fn setattr(&mut self, fid: Fid, new: &Change, now: Time) {
        let node = self.node(fid);
        if let Some(size) = new.size {
            let Kind::File(data) = &mut node.kind else { panic!("{fid} is no file") };
            data.resize(size as usize, 0);
            node.mtime = now;
        }
        node.attr.0 = new.mode.unwrap_or(node.attr.0);
        node.attr.1 = new.uid.unwrap_or(node.attr.1);
        node.attr.2 = new.gid.unwrap_or(node.attr.2);
        node.atime = new.atime.unwrap_or(node.atime);
        node.mtime = new.mtime.unwrap_or(node.mtime);
    }
}

/// A user at work: every step is made valid, done on the tree, and recorded.
struct User {
    tree: Tree,
    records: Vec<Record>,
    clock_ns: u64,
    next_fid: u64,
}

impl User {
    fn place(&self, dir: Fid, name: u8) -> Place {
        Place { dir, ..samples::place(1, &[b'a' + name % 4]) }
    }
    fn pick<T: Copy>(of: &[T], by: u8) -> Option<T> {
        of.get(usize::from(by) % of.len().max(1)).copied()
    }
    fn fids(&self, wanted: impl Fn(&Kind) -> bool) -> Vec<Fid> {
        self.tree.0.iter().filter(|(_, node)| wanted(&node.kind)).map(|(fid, _)| *fid).collect()
    }
    fn at(&self, place: &Place) -> Option<Fid> {
        match &self.tree.0.get(&place.dir)?.kind {
            Kind::Dir(entries) => entries.get(&place.name).copied(),
            _ => None,
        }
    }
    fn gone(&self, fid: Fid) -> Gone {
        let node = &self.tree.0[&fid];
        let kind = if matches!(node.kind, Kind::Dir(_)) { 0o040_000 } else { 0o100_000 };
        let attr =
            Attr { mode: kind | node.attr.0, nlink: self.tree.nlink(fid), ..Attr::default() };
        Gone { attr, ..samples::gone(fid.0) }
    }
    fn is_below(&self, mut dir: Fid, top: Fid) -> bool {
        loop {
            if dir == top {
                return true;
            }
            let holds =
                |node: &Node| matches!(&node.kind, Kind::Dir(e) if e.values().any(|f| *f == dir));
            match self.tree.0.iter().find(|(_, node)| holds(node)) {
                Some((parent, _)) => dir = *parent,
                None => return false,
            }
        }
    }
    fn record(&mut self, op: Op) {
        self.clock_ns += 1_000_000_001;
        let record = Record { time_ns: self.clock_ns, ..samples::record(op) };
        let now = self.tree.clone();
        self.tree.apply(&record, &now);
        self.records.push(record);
    }

    fn step(&mut self, what: u8, a: u8, b: u8, c: u8) {
        let dirs = self.fids(|kind| matches!(kind, Kind::Dir(_)));
        let files = self.fids(|kind| matches!(kind, Kind::File(_)));
        let any = self.fids(|_| true);
        let from = self.place(Self::pick(&dirs, a).unwrap(), b);
        let there = self.at(&from);
        let fid = Fid(self.next_fid);
        match (what % 16, there) {
            (0..=3, None) => {
                self.next_fid += 1;
                let (mode, umask) = (0o100_666 & 0o7777, 0o022);
                self.record(match c % 8 {
                    0 | 1 => Op::Mkdir { at: from, fid, mode: 0o777, umask },
                    2 => Op::Symlink { at: from, fid, target: vec![b't', c] },
                    3 => Op::Mknod { at: from, fid, mode, umask, rdev: 5 },
                    _ => Op::Create { at: from, fid, mode, umask },
                });
            }
            (4, None) => {
                if let Some(fid) = Self::pick(&files, c) {
                    self.record(Op::Link { at: from, fid, base: Stamp(1) });
                }
            }
            (4 | 5 | 0 | 1, Some(fid)) => match &self.tree.0[&fid].kind {
                Kind::Dir(entries) if !entries.is_empty() => {}
                Kind::Dir(_) => self.record(Op::Rmdir { gone: self.gone(fid), at: from }),
                _ => self.record(Op::Unlink { gone: self.gone(fid), at: from }),
            },
            (6..=9, Some(fid)) => {
                let dir = if what & 32 == 0 { from.dir } else { Self::pick(&dirs, c).unwrap() };
                self.rename(fid, from, self.place(dir, c / 16), c & 8 == 8);
            }
            (10 | 11, _) => {
                if let Some(fid) = Self::pick(&files, a) {
                    self.store(fid, b % 24, c % 24);
                }
            }
            (12 | 13, _) => {
                let fid = Self::pick(&any, a).unwrap();
                self.setattr(fid, b, c);
            }
            (14 | 15, _) => {
                let (fid, name) = (Self::pick(&any, a).unwrap(), vec![b'x', b % 2]);
                let name = [b"user.", name.as_slice()].concat();
                let old = self.tree.0[&fid].xattrs.get(&name).cloned();
                let base = Stamp(1);
                self.record(match (c % 3, &old) {
                    (0, Some(_)) => Op::Removexattr { fid, base, name, old },
                    _ => Op::Setxattr { fid, base, name, value: vec![c], old },
                });
            }
            _ => {}
        }
    }
    fn rename(&mut self, fid: Fid, from: Place, to: Place, exchange: bool) {
        let other = self.at(&to);
        let is_dir = |fid: Fid| matches!(self.tree.0[&fid].kind, Kind::Dir(_));
        let loops = self.is_below(to.dir, fid);
        if other == Some(fid) || loops || (from == to) {
            return;
        }
        let over = match other {
            None => Over::Nothing { noreplace: exchange },
            Some(other) if exchange => {
                if self.is_below(from.dir, other) {
                    return;
                }
                Over::Exchanged { fid: other, base: Stamp(1) }
            }
            Some(other) => {
                let full = matches!(&self.tree.0[&other].kind, Kind::Dir(e) if !e.is_empty());
                if is_dir(fid) != is_dir(other) || full {
                    return;
                }
                Over::Replaced(self.gone(other))
            }
        };
        self.record(Op::Rename { from, to, fid, base: Stamp(1), over });
    }
    /// Writes `len` new bytes at `at`, cuts or grows to some size, and closes.
    fn store(&mut self, fid: Fid, at: u8, len: u8) {
        let stamp = self.records.len() as u8 + 1;
        let Kind::File(data) = &mut self.tree.node(fid).kind else { return };
        let (old_size, end) = (data.len() as u64, usize::from(at + len));
        data.resize(data.len().max(end), 0);
        data[usize::from(at)..end].fill(stamp);
        if at.is_multiple_of(3) {
            data.truncate(end);
        }
        let size = data.len() as u64;
        let ranges = vec![Range { at: u64::from(at), len: u64::from(len) }];
        let mtime = time(self.clock_ns + 5);
        self.record(Op::Store { fid, base: Stamp(1), size, mtime, ranges, old_size });
    }
    fn setattr(&mut self, fid: Fid, which: u8, value: u8) {
        let node = &self.tree.0[&fid];
        let set = |bit: u8| which & bit != 0;
        let at = time(u64::from(value) * 7_000_000_007);
        let is_file = matches!(node.kind, Kind::File(_));
        let new = Change {
            mode: set(1).then_some(u32::from(value)),
            uid: set(2).then_some(u32::from(value)),
            gid: set(4).then_some(u32::from(value)),
            size: (set(8) && is_file).then_some(u64::from(value % 40)),
            atime: set(16).then_some(at),
            mtime: set(32).then_some(at),
        };
        self.record(Op::Setattr { fid, base: Stamp(1), new, old: Change::default() });
    }
}

fn numbered(records: &[Record]) -> Vec<(Seq, Record)> {
    records.iter().enumerate().map(|(nth, record)| (Seq(nth as u64 + 7), record.clone())).collect()
}

/// The first steps make what the server has already; the rest is the slice.
fn check(steps: &[(u8, u8, u8, u8)], known: usize) -> (usize, usize) {
    let mut user = User { tree: Tree::new(), records: vec![], clock_ns: 1 << 60, next_fid: 2 };
    let mut start = user.tree.clone();
    for (nth, (what, a, b, c)) in steps.iter().enumerate() {
        if nth == known {
            user.records.clear();
            start = user.tree.clone();
        }
        user.step(*what, *a, *b, *c);
    }
    let full = numbered(&user.records);
    let fewer = optimise(&full);
    assert!(fewer.is_sorted_by(|a, b| a.0 < b.0), "in order, each once");
    assert!(fewer.len() <= full.len());
    let replay = |records: &[(Seq, Record)]| {
        let mut tree = start.clone();
        records.iter().for_each(|(_, record)| tree.apply(record, &user.tree));
        tree
    };
    assert_eq!(replay(&full), user.tree, "the model itself");
    assert_eq!(replay(&fewer), user.tree, "optimised: {fewer:#?}");
    let again = optimise(&fewer);
    assert_eq!(replay(&again), user.tree, "optimised twice");
    (full.len(), fewer.len())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..Default::default() })]
    #[test]
    fn optimised_replay_is_full_replay(
        steps in proptest::collection::vec(any::<(u8, u8, u8, u8)>(), 0..60),
        known in 0usize..30,
    ) {
        check(&steps, known);
    }
}

#[test]
fn it_is_worth_its_while() {
    let mut rng = crate::kml::sim::Rng::new(11);
    let (mut before, mut after) = (0, 0);
    for _ in 0..300 {
        let mut byte = || rng.next() as u8;
        let steps: Vec<_> = (0..120).map(|_| (byte(), byte(), byte(), byte())).collect();
        let (full, fewer) = check(&steps, 20);
        (before, after) = (before + full, after + fewer);
    }
    assert!(after * 10 < before * 8, "{before} records became {after}");
}

fn kinds(records: Vec<Record>) -> Vec<&'static str> {
    let fewer = optimise(&numbered(&records));
    fewer.iter().map(|(_, record)| crate::kml::codec::kind_name(&record.op)).collect()
}

fn create(name: &[u8], fid: u64) -> Op {
    Op::Create { at: samples::place(1, name), fid: Fid(fid), mode: 0o644, umask: 0 }
}
fn store(fid: u64, at: u64) -> Op {
    let ranges = vec![Range { at, len: 10 }];
    let size = at + 10;
    Op::Store { fid: Fid(fid), base: Stamp(0), size, mtime: Time::default(), ranges, old_size: 0 }
}
fn unlink(name: &[u8], fid: u64) -> Op {
    let mut gone = samples::gone(fid);
    gone.attr.nlink = 1;
    Op::Unlink { at: samples::place(1, name), gone }
}
fn rename(from: &[u8], to: &[u8], fid: u64, over: Over) -> Op {
    let (from, to) = (samples::place(1, from), samples::place(1, to));
    Op::Rename { from, to, fid: Fid(fid), base: Stamp(0), over }
}
fn mode(fid: u64, mode: u32) -> Op {
    let new = Change { mode: Some(mode), ..Change::default() };
    Op::Setattr { fid: Fid(fid), base: Stamp(0), new, old: Change::default() }
}

#[test]
fn each_rule_does_what_it_says() {
    let nothing = || Over::Nothing { noreplace: false };
    let cases: Vec<(Vec<Op>, &[&str])> = vec![
        (vec![store(5, 0), store(5, 10)], &["store"]),
        (vec![create(b"a", 5), store(5, 0), unlink(b"a", 5)], &["setattr"]),
        (vec![create(b"a", 5), unlink(b"a", 5), create(b"b", 6)], &["create"]),
        (vec![store(5, 0), mode(5, 1), unlink(b"a", 5)], &["unlink"]),
        (vec![mode(5, 1), mode(5, 2)], &["setattr"]),
        // what may have given a right stays
        (vec![mode(5, 1), create(b"a", 6), mode(5, 2)], &["setattr", "create", "setattr"]),
        (vec![rename(b"a", b"b", 5, nothing()), rename(b"b", b"c", 5, nothing())], &["rename"]),
        (vec![rename(b"a", b"b", 5, nothing()), rename(b"b", b"a", 5, nothing())], &["setattr"]),
        (
            vec![create(b"a", 5), store(5, 0), rename(b"a", b"b", 5, nothing()), create(b"c", 6)],
            &["create", "store", "create"],
        ),
        // write, then rename into place, then write: the first store must not wait
        (
            vec![store(5, 0), rename(b"a", b"b", 5, Over::Replaced(samples::gone(6))), store(5, 9)],
            &["store", "rename", "store"],
        ),
        // an editor's save of a file that is itself new
        (
            vec![
                create(b"a", 5),
                store(5, 0),
                create(b"tmp", 6),
                store(6, 0),
                rename(b"tmp", b"a", 6, {
                    let mut gone = samples::gone(5);
                    gone.attr.nlink = 1;
                    Over::Replaced(gone)
                }),
            ],
            &["create", "store", "setattr"],
        ),
    ];
    let cases = cases.into_iter().chain(cascades());
    for (ops, expected) in cases {
        let shown = format!("{ops:?}");
        let records = ops
            .into_iter()
            .zip(1..)
            .map(|(op, n)| Record { time_ns: n * 1_000_000_000, ..samples::record(op) });
        assert_eq!(kinds(records.collect()), expected, "{shown}");
    }
}

/// Coda's rules, with what follows from them.
fn cascades() -> Vec<(Vec<Op>, &'static [&'static str])> {
    let set =
        |new: Change| Op::Setattr { fid: Fid(5), base: Stamp(0), new, old: Change::default() };
    let utimes = |sec| {
        let mtime = Some(Time { sec, nsec: 0 });
        set(Change { mtime, ..Change::default() })
    };
    let chown = |uid| set(Change { uid: Some(uid), ..Change::default() });
    let size = |size| set(Change { size: Some(size), ..Change::default() });
    let xattr = |value: &[u8], old: Option<&[u8]>| {
        let (name, old) = (b"user.x".to_vec(), old.map(<[u8]>::to_vec));
        Op::Setxattr { fid: Fid(5), base: Stamp(0), name, value: value.to_vec(), old }
    };
    let unset = |old: Option<&[u8]>| {
        let (name, old) = (b"user.x".to_vec(), old.map(<[u8]>::to_vec));
        Op::Removexattr { fid: Fid(5), base: Stamp(0), name, old }
    };
    let mkdir = |at, fid| Op::Mkdir { at, fid: Fid(fid), mode: 0o755, umask: 0 };
    let link = |name: &[u8]| Op::Link { at: samples::place(1, name), fid: Fid(5), base: Stamp(0) };
    let below = |dir, name: &[u8], fid| {
        let at = samples::place(dir, name);
        Op::Create { at, fid: Fid(fid), mode: 0o644, umask: 0 }
    };
    let unlink_below = |dir, name: &[u8], fid| {
        let mut gone = samples::gone(fid);
        gone.attr.nlink = 1;
        Op::Unlink { at: samples::place(dir, name), gone }
    };
    let rmdir = |at, fid| {
        let mut gone = samples::gone(fid);
        gone.attr.mode = 0o040_755;
        Op::Rmdir { at, gone }
    };
    let d = |name: &[u8]| samples::place(1, name);
    vec![
        (vec![utimes(1), utimes(2)], &["setattr"]),
        (vec![store(5, 0), utimes(1), store(5, 0)], &["store"]),
        (vec![chown(1), chown(2)], &["setattr"]),
        (vec![mode(5, 1), chown(2)], &["setattr", "setattr"]),
        (vec![size(10), store(5, 0)], &["store"]),
        (vec![size(10), size(3)], &["setattr"]),
        (vec![size(3), size(10)], &["setattr", "setattr"]),
        (vec![xattr(b"1", None), xattr(b"2", Some(b"1"))], &["setxattr"]),
        (vec![xattr(b"1", None), unset(Some(b"1"))], &[]),
        (vec![xattr(b"1", Some(b"0")), unset(Some(b"1"))], &["removexattr"]),
        (vec![link(b"b"), unlink(b"b", 5)], &["setattr"]),
        // a tree that came and went, from the leaves up; the last record's time stays
        (
            vec![
                mkdir(d(b"d"), 5),
                mkdir(samples::place(5, b"e"), 6),
                below(6, b"x", 7),
                store(7, 0),
                unlink_below(6, b"x", 7),
                rmdir(samples::place(5, b"e"), 6),
                rmdir(d(b"d"), 5),
            ],
            &["setattr"],
        ),
        // a directory that was there before: what was below it goes, it is still to be removed
        (
            vec![below(5, b"x", 7), store(7, 0), unlink_below(5, b"x", 7), rmdir(d(b"d"), 5)],
            &["rmdir"],
        ),
    ]
}

#[test]
fn merged_stores_name_all_that_changed() {
    let ranges_of = |records: &[Op]| {
        let records: Vec<Record> = records.iter().cloned().map(samples::record).collect();
        let fewer = optimise(&numbered(&records));
        let [(_, Record { op: Op::Store { ranges, .. }, .. })] = &fewer[..] else {
            panic!("{fewer:?}")
        };
        ranges.iter().map(|range| (range.at, range.len)).collect::<Vec<_>>()
    };
    assert_eq!(ranges_of(&[store(5, 100), store(5, 105)]), [(100, 15)]);
    // where the file ended in between, zeros may stand now: they are named, too
    assert_eq!(ranges_of(&[store(5, 0), store(5, 105)]), [(0, 115)]);
    assert_eq!(ranges_of(&[store(5, 100), store(5, 0)]), [(0, 10)]);
    // more ranges than a record holds become one
    let many = |count| (0..count).map(|n| Range { at: n * 10, len: 5 }).collect::<Vec<_>>();
    assert_eq!(merged(many(400), 1000), many(100));
    assert_eq!(merged(many(400), 1 << 20), [Range { at: 0, len: 3995 }]);
}
