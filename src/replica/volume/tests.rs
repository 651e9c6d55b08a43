//! A volume on a real directory: what is served, what is applied, what a crash leaves.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::super::apply::{Applied, Content, Incoming};
use super::super::certify::View;
use super::*;
use crate::kml::record::{
    Change, Gone, Op, Origin, Over, Place, Range, Record, Seq, TARGET_LEN_MAX,
};

const T: u64 = 1_700_000_000_123_456_789;

struct Rig {
    at: tempfile::TempDir,
    volume: Option<Volume>,
    /// next seq of each client
    seqs: HashMap<u32, u64>,
}

/// A volume in an empty directory, with two clients, 1 and 2.
fn rig() -> Rig {
    let at = tempfile::tempdir().unwrap();
    std::fs::create_dir(at.path().join("v")).unwrap();
    let mut rig = Rig { at, volume: None, seqs: HashMap::new() };
    rig.open();
    for node in [1, 2] {
        assert_eq!(rig.v().meet([node as u8; 16], 0, "h").unwrap(), (node, Seq(0)));
    }
    rig
}

impl Rig {
    fn dir(&self) -> PathBuf {
        self.at.path().join("v")
    }
    fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }
    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }
    fn open(&mut self) {
        self.volume = Some(Volume::open(&self.dir(), None, "v").unwrap());
    }
    /// As after a kill: nothing is written at the end.
    fn kill(&mut self) {
        self.volume = None;
    }
    /// As if the machine had been started anew since.
    fn another_boot(&self) {
        let nodes = self.path(".imz/nodes.json");
        let table = std::fs::read_to_string(&nodes).unwrap();
        let table = table.replace(&crate::sys::boot::id(), "another boot");
        let unsealed: Vec<&str> = table.lines().filter(|line| !line.contains("crc32")).collect();
        std::fs::write(&nodes, unsealed.join("\n")).unwrap();
    }
    /// `what` as it is now, put beside, or put back.
    fn copy(&self, what: &str, back: bool) {
        let (there, aside) = (self.path(what), self.at.path().join("aside"));
        let (from, to) = if back { (&aside, &there) } else { (&there, &aside) };
        let _ = std::fs::remove_dir_all(to); // there may be none
        copy_all(from, to);
    }
    fn v(&mut self) -> &mut Volume {
        self.volume.as_mut().unwrap()
    }
    fn record(&self, op: Op) -> Record {
        let (uid, gid) = cred::own();
        let path = b"some/path".to_vec();
        Record { time_ns: T, origin: Origin::default(), uid, gid, path, op }
    }
    fn next(&mut self, node: u32) -> Seq {
        let seq = self.seqs.entry(node).or_default();
        *seq += 1;
        Seq(*seq)
    }
    fn with(&mut self, node: u32, op: Op, content: Content<'_>) -> Applied {
        let (seq, record) = (self.next(node), self.record(op));
        let change = Incoming { seq, record: &record, content };
        self.v().apply(node, seq, &[change])
    }
    /// Applies an operation that fits.
    fn ok(&mut self, node: u32, op: Op) {
        let out = self.with(node, op.clone(), Content::None);
        assert!(out.failure.is_none() && out.conflicts.is_empty(), "{op:?}: {out:?}");
    }
    fn store(&mut self, node: u32, fid: Fid, base: Stamp, bytes: &[u8]) -> Applied {
        self.with(node, store(fid, base, bytes.len() as u64), Content::Inline(bytes))
    }
    fn stamp(&mut self, fid: Fid) -> Stamp {
        self.v().stat(fid).unwrap().stamp
    }
    fn fid(&mut self, name: &str) -> Fid {
        let page = self.v().list(ROOT, b"").unwrap();
        page.entries.iter().find(|(n, _)| n == name.as_bytes()).unwrap().1.fid
    }
    fn names(&mut self) -> Vec<String> {
        let page = self.v().list(ROOT, b"").unwrap();
        page.entries.iter().map(|(n, _)| String::from_utf8_lossy(n).into_owned()).collect()
    }
}

/// With times and imz's attributes. (No other process: it would have the locks of other tests.)
fn copy_all(from: &Path, to: &Path) {
    let meta = std::fs::symlink_metadata(from).unwrap();
    if meta.is_dir() {
        std::fs::create_dir(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap().flatten() {
            copy_all(&entry.path(), &to.join(entry.file_name()));
        }
    } else {
        std::fs::copy(from, to).unwrap();
    }
    let open = |path: &Path| std::fs::File::open(path).unwrap();
    let key = super::super::compare::own_key();
    if let Some(value) = fs::xattr::get(open(from), b"", key).unwrap() {
        fs::xattr::set(open(to), b"", key, &value, 0).unwrap();
    }
    open(to).set_modified(meta.modified().unwrap()).unwrap();
}

fn at(dir: Fid, name: &str) -> Place {
    Place { dir, base: Stamp(0), name: Name::new(name.as_bytes()).unwrap() }
}

fn create(dir: Fid, name: &str, fid: Fid) -> Op {
    Op::Create { at: at(dir, name), fid, mode: 0o666, umask: 0o027 }
}

fn mkdir(dir: Fid, name: &str, fid: Fid) -> Op {
    Op::Mkdir { at: at(dir, name), fid, mode: 0o777, umask: 0o022 }
}

fn store(fid: Fid, base: Stamp, size: u64) -> Op {
    let mtime = crate::kml::record::Time { sec: 77, nsec: 5 };
    let ranges = vec![Range { at: 0, len: size }];
    Op::Store { fid, base, size, mtime, ranges, old_size: 0 }
}

fn gone(fid: Fid, base: Stamp) -> Gone {
    Gone { fid, base, attr: Default::default(), target: None }
}

fn unlink(dir: Fid, name: &str, fid: Fid, base: Stamp) -> Op {
    Op::Unlink { at: at(dir, name), gone: gone(fid, base) }
}

fn rename(from: &str, to: &str, fid: Fid, over: Over) -> Op {
    Op::Rename { from: at(ROOT, from), to: at(ROOT, to), fid, base: Stamp(0), over }
}

const FREE: Over = Over::Nothing { noreplace: false };

fn f(node: u32, counter: u64) -> Fid {
    Fid::new(node, counter)
}

#[test]
fn an_existing_directory_is_served_as_it_is() {
    let at = tempfile::tempdir().unwrap();
    let dir = at.path().join("v");
    std::fs::create_dir_all(dir.join("sub")).unwrap();
    std::fs::write(dir.join("b"), "hello").unwrap();
    std::fs::hard_link(dir.join("b"), dir.join("c")).unwrap();
    std::os::unix::fs::symlink("nowhere", dir.join("a")).unwrap();
    let before = std::fs::metadata(&dir).unwrap();
    let mut volume = Volume::open(&dir, None, "v").unwrap();
    let page = volume.list(ROOT, b"").unwrap();
    let names: Vec<&[u8]> = page.entries.iter().map(|(n, _)| &n[..]).collect();
    assert_eq!(names, [b"a", b"b", b"c", &b"sub"[..]], "sorted, and .imz is not there");
    let object = |i: usize| &page.entries[i].1;
    assert_eq!(object(0).target, b"nowhere");
    assert_eq!((object(1).fid, object(1).attr.nlink), (object(2).fid, 2));
    assert_eq!((object(1).attr.size, object(1).stamp), (5, Stamp(0)));
    assert_eq!(page.dir.attr.mtime.nsec, before.mtime_nsec() as u32, "as it was");
    assert_eq!(page.dir.attr.nlink, before.nlink() as u32);
    let (b, sub) = (object(1).fid, object(3).fid);
    volume.close().unwrap();
    let mut volume = Volume::open(&dir, None, "v").unwrap();
    assert_eq!(volume.stat(b).unwrap().attr.size, 5, "found by the fid it had before");
    assert!(volume.list(sub, b"").unwrap().entries.is_empty());
    assert!(matches!(volume.list(b, b""), Err(VolumeError::Gone(_) | VolumeError::NotADir)));
    assert!(matches!(volume.stat(Fid(99999)), Err(VolumeError::Gone(_))));
    let piece = volume.read(1, b, 1, 3, Stamp(0)).unwrap();
    assert_eq!((&piece.bytes[..], piece.size), (&b"ell"[..], 5));
    assert_eq!(volume.read(1, b, 5, 3, Stamp(0)).unwrap().bytes, b"");
    assert!(matches!(volume.read(1, b, 0, 3, Stamp(9)), Err(VolumeError::Moved)));
    assert!(matches!(volume.read(1, sub, 0, 3, Stamp(0)), Err(VolumeError::NotAFile)));
}

#[test]
fn large_directories_come_in_pages() {
    let mut rig = rig();
    let long = "x".repeat(200);
    for i in 0..4000 {
        std::fs::write(rig.path(&format!("{i:04}{long}")), "").unwrap();
    }
    let (mut after, mut count, mut pages) = (Vec::new(), 0, 0);
    loop {
        let page = rig.v().list(ROOT, &after).unwrap();
        (count, pages) = (count + page.entries.len(), pages + 1);
        assert!(page.entries.is_sorted_by(|a, b| a.0 < b.0) && page.entries[0].0 > after);
        after.clone_from(&page.entries.last().unwrap().0);
        if !page.more {
            break;
        }
    }
    assert_eq!(count, 4000);
    assert!((3..=5).contains(&pages), "{pages}");
}

#[test]
fn a_copied_attribute_does_not_make_two_of_one_object() {
    let mut rig = rig();
    std::fs::write(rig.path("a"), "1").unwrap();
    let a = rig.fid("a");
    std::fs::write(rig.path("b"), "2").unwrap();
    let key = rig.v().tree.own_key();
    let dir = fs::open_root(&rig.dir()).unwrap();
    let value = fs::xattr::get(&dir, b"a", key).unwrap().unwrap();
    fs::xattr::set(&dir, b"b", key, &value, 0).unwrap();
    assert_ne!(rig.fid("b"), a);
    assert_eq!(rig.fid("a"), a);
    std::fs::rename(rig.path("a"), rig.path("c")).unwrap();
    assert_eq!(rig.fid("c"), a, "and one that was moved keeps its own");
}

#[test]
fn every_kind_of_record_is_applied() {
    let mut rig = rig();
    rig.ok(1, mkdir(ROOT, "d", f(1, 1)));
    rig.ok(1, create(f(1, 1), "f", f(1, 2)));
    let out = rig.store(1, f(1, 2), Stamp(0), b"hello");
    let stamp = rig.v().stamp();
    assert_eq!(out.stamps, [(f(1, 2), stamp)]);
    assert_eq!(rig.read("d/f"), "hello");
    let meta = std::fs::metadata(rig.path("d/f")).unwrap();
    assert_eq!((meta.mtime(), meta.mtime_nsec(), meta.mode() & 0o777), (77, 5, 0o640));
    rig.store(1, f(1, 2), Stamp(0), b"other text");
    assert_eq!(rig.read("d/f"), "other text");
    let meta = std::fs::metadata(rig.path("d/f")).unwrap();
    assert_eq!((meta.len(), meta.mode() & 0o777), (10, 0o640), "a new file in the old one's dress");
    rig.ok(1, Op::Symlink { at: at(ROOT, "s"), fid: f(1, 3), target: b"d/f".to_vec() });
    assert_eq!(std::fs::read_link(rig.path("s")).unwrap(), Path::new("d/f"));
    let mode = 0o010666;
    rig.ok(1, Op::Mknod { at: at(ROOT, "p"), fid: f(1, 4), mode, umask: 0, rdev: 0 });
    rig.ok(1, Op::Link { at: at(ROOT, "g"), fid: f(1, 2), base: Stamp(0) });
    assert_eq!(rig.v().stat(f(1, 2)).unwrap().attr.nlink, 2);
    rig.store(1, f(1, 2), Stamp(0), b"in place");
    assert_eq!((rig.read("g"), rig.read("d/f")), ("in place".into(), "in place".into()));
    let name = b"user.x".to_vec();
    let value = b"1".to_vec();
    let (fid, base) = (f(1, 2), Stamp(0));
    rig.ok(1, Op::Setxattr { fid, base, name: name.clone(), value, old: None });
    assert_eq!(rig.v().stat(fid).unwrap().xattrs, [(name.clone(), b"1".to_vec())]);
    rig.ok(1, Op::Removexattr { fid, base, name, old: None });
    assert_eq!(rig.v().stat(fid).unwrap().xattrs, []);
    let new = Change { mode: Some(0o600), size: Some(2), ..Change::default() };
    rig.ok(1, Op::Setattr { fid, base, new, old: Change::default() });
    assert_eq!(rig.read("g"), "in");
    rig.ok(1, rename("g", "h", fid, FREE));
    rig.ok(1, create(ROOT, "i", f(1, 5)));
    rig.ok(1, rename("i", "h", f(1, 5), Over::Replaced(gone(fid, base))));
    assert_eq!(rig.v().stat(fid).unwrap().attr.nlink, 1);
    rig.ok(1, rename("h", "s", f(1, 5), Over::Exchanged { fid: f(1, 3), base }));
    assert_eq!(rig.fid("h"), f(1, 3));
    rig.ok(1, unlink(ROOT, "s", f(1, 5), base));
    rig.ok(1, unlink(f(1, 1), "f", fid, base));
    rig.ok(1, Op::Rmdir { at: at(ROOT, "d"), gone: gone(f(1, 1), base) });
    assert_eq!(rig.names(), ["h", "p"]);
    let root = std::fs::metadata(rig.dir()).unwrap();
    assert_eq!((root.mtime(), root.mtime_nsec()), (1_700_000_000, 123_456_789));
    let stamp = rig.v().stamp();
    assert_eq!(rig.stamp(ROOT), stamp);
    assert_eq!(rig.v().conflicts(), 0);
    let kinds = rig.v().log.entries(Seq(1)).map(|e| e.unwrap().outcome);
    assert!(kinds.collect::<Vec<_>>().iter().all(|o| *o == Outcome::Done));
}

#[test]
fn objects_belong_to_who_made_them() {
    if !cred::is_root() {
        eprintln!("skipped: only root makes files of others");
        return;
    }
    let mut rig = rig();
    let mut record = rig.record(create(ROOT, "f", f(1, 1)));
    (record.uid, record.gid) = (1234, 4321);
    let change = Incoming { seq: Seq(1), record: &record, content: Content::None };
    assert!(rig.v().apply(1, Seq(1), &[change]).failure.is_none());
    let meta = std::fs::metadata(rig.path("f")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (1234, 4321));
    rig.seqs.insert(1, 1);
    rig.store(1, f(1, 1), Stamp(0), b"1");
    rig.store(1, f(1, 1), Stamp(0), b"2");
    let meta = std::fs::metadata(rig.path("f")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (1234, 4321), "also after it was replaced");
}

#[test]
fn spooled_contents_take_their_place() {
    let mut rig = rig();
    rig.ok(1, create(ROOT, "f", f(1, 1)));
    let big = vec![7; 3 << 20];
    rig.v().spool(1, Seq(2), 1 << 20, &big[1 << 20..]).unwrap();
    rig.v().spool(1, Seq(2), 0, &big[..1 << 20]).unwrap();
    rig.with(1, store(f(1, 1), Stamp(0), big.len() as u64), Content::Spooled);
    assert_eq!(std::fs::read(rig.path("f")).unwrap(), big);
    // only a part of it
    rig.v().spool(1, Seq(3), 5, b"xyz").unwrap();
    let ranges = vec![Range { at: 5, len: 3 }];
    let mtime = Default::default();
    let (fid, base, size) = (f(1, 1), Stamp(0), 9);
    let op = Op::Store { fid, base, size, mtime, ranges, old_size: 0 };
    rig.with(1, op, Content::Spooled);
    assert_eq!(std::fs::read(rig.path("f")).unwrap(), b"\x07\x07\x07\x07\x07xyz\x07");
    let left = std::fs::read_dir(rig.path(".imz/spool")).unwrap().count();
    assert_eq!(left, 1, "the lock");
    // of a file that the client has removed since
    let out = rig.with(1, store(f(1, 1), Stamp(0), 100), Content::Gone);
    assert!(out.conflicts.is_empty() && out.failure.is_none());
}

/// The second piece lies where the file system has no place for it.
#[test]
fn a_store_that_ends_in_the_middle_leaves_no_mixture() {
    for before in ["old text", ""] {
        let mut rig = rig();
        rig.ok(1, create(ROOT, "f", f(1, 1)));
        rig.store(1, f(1, 1), Stamp(0), before.as_bytes());
        let old = rig.stamp(f(1, 1));
        let (mtime, fid, far) = (Default::default(), f(1, 1), (i64::MAX as u64) - 9);
        let ranges = vec![Range { at: 0, len: 4 }, Range { at: far, len: 4 }];
        let op = Op::Store { fid, base: old, size: far + 4, mtime, ranges, old_size: 8 };
        let out = rig.with(1, op, Content::Inline(b"new!new!"));
        if out.failure.is_none() && out.conflicts.is_empty() {
            eprintln!("skipped: the file system takes files of any length");
            return;
        }
        assert_eq!((rig.read("f"), rig.stamp(fid)), (before.to_owned(), old));
        assert_eq!(std::fs::read_dir(rig.path(".imz/spool")).unwrap().count(), 1, "the lock");
    }
}

#[test]
fn a_record_is_applied_once() {
    let mut rig = rig();
    rig.ok(1, create(ROOT, "f", f(1, 1)));
    rig.ok(1, unlink(ROOT, "f", f(1, 1), Stamp(0)));
    let stamp = rig.v().stamp();
    let record = rig.record(create(ROOT, "f", f(1, 1)));
    let again = Incoming { seq: Seq(1), record: &record, content: Content::None };
    let out = rig.v().apply(1, Seq(1), &[again]);
    assert!(out.failure.is_none() && out.upto == Seq(1) && out.stamps.is_empty());
    assert_eq!((rig.names().len(), rig.v().stamp()), (0, stamp));
    // the optimiser dropped some records at the end
    let out = rig.v().apply(1, Seq(7), &[]);
    assert_eq!(out.upto, Seq(7));
    assert_eq!(rig.v().meet([1; 16], 0, "h").unwrap(), (1, Seq(0)), "nothing is durable yet");
    rig.v().sync_job().run().unwrap();
    rig.v().synced();
    assert_eq!(rig.v().meet([1; 16], 0, "h").unwrap(), (1, Seq(7)));
}

#[test]
fn names_of_imz_and_fids_of_others_are_refused() {
    let mut rig = rig();
    for (op, conflicts) in [
        (create(ROOT, ".imz", f(1, 1)), 1),
        (mkdir(ROOT, ".imz-conflicts", f(1, 2)), 2),
        (create(ROOT, "x", f(2, 3)), 3),
        (create(ROOT, "y", Fid(77)), 4),
    ] {
        let out = rig.with(1, op, Content::None);
        assert!(out.failure.is_none() && !out.conflicts.is_empty());
        assert_eq!(rig.v().conflicts(), conflicts);
    }
    assert_eq!(rig.names(), Vec::<String>::new(), "hidden, both of them");
    rig.ok(1, mkdir(ROOT, "d", f(1, 5)));
    rig.ok(1, create(f(1, 5), ".imz", f(1, 6)));
    let out = rig.with(1, unlink(ROOT, ".imz", Fid(1), Stamp(0)), Content::None);
    assert!(!out.conflicts.is_empty());
    assert!(rig.path(".imz").is_dir());
    let (fid, base, value) = (f(1, 5), Stamp(0), vec![1]);
    let name = rig.v().tree.own_key().to_vec();
    let out = rig.with(1, Op::Setxattr { fid, base, name, value, old: None }, Content::None);
    assert!(!out.conflicts.is_empty());
    assert_eq!(rig.v().stat(fid).unwrap().fid, fid);
}

#[test]
fn two_stores_conflict_and_both_are_kept() {
    let mut rig = rig();
    rig.ok(1, create(ROOT, "f", f(1, 1)));
    rig.store(1, f(1, 1), Stamp(0), b"one");
    let base = rig.stamp(f(1, 1));
    rig.store(2, f(1, 1), base, b"from two");
    // a stamp is only as old as what others did: the author's own changes do not make it so
    rig.store(2, f(1, 1), base, b"from two, again");
    assert_eq!(rig.v().conflicts(), 0);
    let out = rig.store(1, f(1, 1), base, b"from one");
    assert_eq!((out.conflicts, out.stamps.len()), (vec![f(1, 1)], 0));
    assert_eq!(rig.read("f"), "from two, again");
    assert_eq!(rig.read(".imz-conflicts/1-3/data"), "from one");
    let told = rig.read(".imz-conflicts/1-3/record.json");
    assert!(told.contains("somebody else has changed") && told.contains("some/path"), "{told}");
    // what comes behind it is not blocked, and equal contents are no conflict
    rig.ok(1, create(ROOT, "g", f(1, 2)));
    let out = rig.store(1, f(1, 1), base, b"from two, again");
    assert!(out.conflicts.is_empty());
    assert_eq!(rig.v().conflicts(), 1);
    rig.kill();
    rig.open();
    assert_eq!(rig.v().conflicts(), 1);
}

#[test]
fn who_cuts_others_contents_to_the_length_that_they_have_hears_of_them() {
    let (mut rig, file) = (rig(), f(1, 9));
    rig.ok(1, create(ROOT, "f", file));
    rig.store(1, file, Stamp(0), b"mine");
    let base = rig.stamp(file);
    assert!(rig.store(2, file, base, b"else").conflicts.is_empty());
    let there = rig.v().stat(file).unwrap();
    let cut = Change { size: Some(4), mtime: Some(Default::default()), ..Change::default() };
    let old = Change { mode: Some(0o640), ..Change::default() };
    let out = rig.with(1, Op::Setattr { fid: file, base, new: cut, old }, Content::None);
    assert_eq!((&out.stamps[..], &out.conflicts[..]), (&[][..], &[file][..]));
    // and what else it sets is set
    let new = Change { mode: Some(0o600), ..cut };
    let out = rig.with(1, Op::Setattr { fid: file, base, new, old }, Content::None);
    assert_eq!((out.stamps.len(), &out.conflicts[..]), (1, &[file][..]));
    let now = rig.v().stat(file).unwrap();
    assert_eq!((now.attr.mtime, now.stored), (there.attr.mtime, there.stored));
    assert_eq!((now.attr.mode & 0o777, rig.read("f")), (0o600, "else".to_owned()));
    assert_eq!(rig.v().conflicts(), 0);
}

#[test]
fn a_taken_name_keeps_the_other_object_aside_with_all_that_follows() {
    let mut rig = rig();
    rig.ok(1, create(ROOT, "f", f(1, 1)));
    rig.store(1, f(1, 1), Stamp(0), b"of one");
    let out = rig.with(2, create(ROOT, "f", f(2, 1)), Content::None);
    assert_eq!(out.conflicts, [ROOT, f(2, 1)]);
    rig.store(2, f(2, 1), Stamp(0), b"of two");
    assert_eq!((rig.read("f"), rig.names()), ("of one".into(), vec!["f".to_owned()]));
    assert_eq!(rig.read(".imz-conflicts/2-1/kept/f"), "of two");
    // and a file that is renamed to it
    rig.ok(2, create(ROOT, "tmp", f(2, 2)));
    rig.store(2, f(2, 2), Stamp(0), b"third");
    let out = rig.with(2, rename("tmp", "f", f(2, 2), FREE), Content::None);
    assert!(!out.conflicts.is_empty());
    assert_eq!(rig.read(".imz-conflicts/2-5/kept/f"), "third");
    assert_eq!(rig.names(), ["f"]);
}

/// The look at the tree passes over what is kept, and must not take it for gone.
#[test]
fn what_is_kept_aside_is_found_by_the_next_life_as_well() {
    for is_clean in [true, false] {
        let mut rig = rig();
        rig.ok(1, create(ROOT, "f", f(1, 1)));
        rig.store(1, f(1, 1), Stamp(0), b"of one");
        rig.ok(1, create(ROOT, "d", f(1, 2)));
        rig.with(2, create(ROOT, "f", f(2, 1)), Content::None);
        rig.with(2, mkdir(ROOT, "d", f(2, 2)), Content::None);
        let known = rig.v().stamp();
        match is_clean {
            true => rig.volume.take().unwrap().close().unwrap(),
            false => rig.kill(),
        }
        rig.open();
        assert_eq!(rig.v().since(known, 1).unwrap().fids, []);
        let out = rig.store(2, f(2, 1), Stamp(0), b"of two");
        assert_eq!((out.conflicts, rig.v().conflicts()), (vec![], 2));
        assert_eq!(rig.read(".imz-conflicts/2-1/kept/f"), "of two");
        rig.ok(2, create(f(2, 2), "in it", f(2, 3)));
        // the client takes its versions away again, and there is no conflict any more
        rig.ok(2, unlink(f(2, 2), "in it", f(2, 3), Stamp(0)));
        rig.ok(2, Op::Rmdir { at: at(ROOT, "d"), gone: gone(f(2, 2), Stamp(0)) });
        rig.ok(2, unlink(ROOT, "f", f(2, 1), Stamp(0)));
        assert_eq!(rig.v().conflicts(), 0, "clean: {is_clean}");
    }
}

#[test]
fn two_that_make_one_directory_share_it() {
    let mut rig = rig();
    rig.ok(1, mkdir(ROOT, "d", f(1, 1)));
    let out = rig.with(2, mkdir(ROOT, "d", f(2, 1)), Content::None);
    assert!(out.conflicts.contains(&f(2, 1)) && out.also == [f(1, 1)]);
    let out = rig.with(2, create(f(2, 1), "g", f(2, 2)), Content::None);
    // and hears that it has not all of it
    assert!(out.conflicts == [f(1, 1)] && out.also.contains(&f(1, 1)));
    rig.ok(1, create(f(1, 1), "f", f(1, 2)));
    assert!(rig.path("d/f").exists() && rig.path("d/g").exists());
    assert_eq!(rig.v().conflicts(), 0);
    rig.kill();
    rig.open();
    rig.with(2, create(f(2, 1), "h", f(2, 3)), Content::None);
    assert!(rig.path("d/h").exists(), "also after a restart");
}

#[test]
fn removals_certify_too() {
    let mut rig = rig();
    rig.ok(1, create(ROOT, "f", f(1, 1)));
    let base = rig.stamp(f(1, 1));
    rig.store(1, f(1, 1), Stamp(0), b"new");
    let out = rig.with(2, unlink(ROOT, "f", f(1, 1), base), Content::None);
    assert_eq!((out.conflicts.len(), rig.read("f")), (2, "new".into()), "bytes it has not seen");
    rig.ok(1, unlink(ROOT, "f", f(1, 1), base));
    rig.ok(2, unlink(ROOT, "f", f(1, 1), base));
    rig.ok(1, mkdir(ROOT, "d", f(1, 2)));
    rig.ok(1, create(f(1, 2), "x", f(1, 3)));
    let out =
        rig.with(2, Op::Rmdir { at: at(ROOT, "d"), gone: gone(f(1, 2), Stamp(0)) }, Content::None);
    assert!(!out.conflicts.is_empty() && out.failure.is_none());
    assert!(rig.path("d/x").exists());
    let out = rig.store(2, f(1, 1), base, b"too late");
    assert_eq!(
        (out.conflicts, rig.read(".imz-conflicts/2-1/data")),
        (vec![f(1, 1)], "too late".into())
    );
    // in a directory that is gone
    let out = rig.with(2, create(Fid(4711), "y", f(2, 1)), Content::None);
    assert!(out.failure.is_none() && rig.path(".imz-conflicts/2-5/kept/y").exists());
}

#[test]
fn the_history_says_what_others_changed() {
    let mut rig = rig();
    rig.ok(1, create(ROOT, "f", f(1, 1)));
    rig.ok(2, create(ROOT, "g", f(2, 1)));
    let of = |rig: &mut Rig, stamp, node| rig.v().since(Stamp(stamp), node).unwrap();
    let all = History { fids: vec![ROOT, f(2, 1)], upto: Stamp(2), more: false, lost: false };
    assert_eq!(of(&mut rig, 0, 1), all);
    assert_eq!(of(&mut rig, 1, 2), History { upto: Stamp(2), ..History::default() });
    assert_eq!(of(&mut rig, 2, 1), History { upto: Stamp(2), ..History::default() });
    assert!(of(&mut rig, 3, 1).lost, "a stamp that this server never gave");
}

#[test]
fn one_server_at_a_time_and_only_of_a_directory() {
    let mut rig = rig();
    let again = Volume::open(&rig.dir(), None, "v");
    assert!(matches!(again, Err(VolumeError::State(StateError::InUse { .. }))));
    let elsewhere = rig.at.path().join("state");
    let again = Volume::open(&rig.dir(), Some(&elsewhere), "v");
    assert!(matches!(again, Err(VolumeError::State(StateError::InUse { .. }))));
    let missing = Volume::open(&rig.at.path().join("no"), None, "v");
    assert!(matches!(missing, Err(VolumeError::Missing { .. })));
    std::fs::write(rig.path("f"), "").unwrap();
    let file = Volume::open(&rig.path("f"), None, "v");
    assert!(matches!(file, Err(VolumeError::Missing { .. })));
    let id = rig.v().id();
    rig.volume.take().unwrap().close().unwrap();
    rig.open();
    assert_eq!(rig.v().id(), id);
}

#[test]
fn state_may_be_elsewhere() {
    let at = tempfile::tempdir().unwrap();
    let (dir, state) = (at.path().join("v"), at.path().join("s"));
    std::fs::create_dir(&dir).unwrap();
    let volume = Volume::open(&dir, Some(&state), "v").unwrap();
    volume.close().unwrap();
    assert!(state.join("state.json").exists() && state.join("kml").exists());
    assert!(!dir.join(".imz/state.json").exists());
}

#[test]
fn a_kill_loses_nothing_that_was_applied() {
    let mut rig = rig();
    rig.ok(1, create(ROOT, "f", f(1, 1)));
    rig.store(1, f(1, 1), Stamp(0), b"text");
    let stamp = rig.v().stamp();
    rig.kill();
    rig.open();
    assert_eq!((rig.v().stamp(), rig.read("f")), (stamp, "text".into()));
    assert_eq!(rig.v().meet([1; 16], 0, "h").unwrap(), (1, Seq(2)), "synced at the start");
    assert_eq!(rig.stamp(f(1, 1)), stamp);
}

/// Appends a record as if the process had died right behind it.
fn intend(rig: &mut Rig, node: u32, op: Op) -> Seq {
    let seq = rig.next(node);
    let mut record = rig.record(op);
    record.origin = Origin { node, seq };
    rig.v().log.append(&record).unwrap();
    seq
}

#[test]
fn an_intention_is_carried_out_by_the_next_life() {
    let cases: Vec<(&str, Op)> = vec![
        ("made", create(ROOT, "new", f(1, 9))),
        ("made", mkdir(ROOT, "new", f(1, 9))),
        ("made", Op::Symlink { at: at(ROOT, "new"), fid: f(1, 9), target: b"t".to_vec() }),
        ("made", Op::Link { at: at(ROOT, "new"), fid: f(1, 1), base: Stamp(0) }),
        ("moved", rename("f", "new", f(1, 1), FREE)),
        ("gone", unlink(ROOT, "f", f(1, 1), Stamp(0))),
    ];
    // the crash came before the operation, or behind it
    for (what, op) in cases {
        for done in [false, true] {
            let mut rig = rig();
            rig.ok(1, create(ROOT, "f", f(1, 1)));
            let seq = intend(&mut rig, 1, op.clone());
            if done {
                let mut record = rig.record(op.clone());
                record.origin = Origin { node: 1, seq };
                let stamp = rig.v().stamp();
                rig.v().perform(&record, Content::None, stamp).unwrap();
            }
            for _ in 0..2 {
                rig.kill();
                rig.open();
                let want: &[&str] = match what {
                    "made" => &["f", "new"],
                    "moved" => &["new"],
                    _ => &[],
                };
                assert_eq!(rig.names(), want, "{op:?} {done}");
                assert_eq!(rig.v().meet([1; 16], 0, "h").unwrap().1, seq);
                assert_eq!(rig.v().log.unsettled().unwrap().len(), 0);
                assert_eq!(rig.v().conflicts(), 0);
            }
            if what == "made" && !matches!(op, Op::Link { .. }) {
                assert_eq!(rig.fid("new"), f(1, 9));
            }
        }
    }
}

#[test]
fn a_half_made_object_gets_its_fid() {
    let mut rig = rig();
    intend(&mut rig, 1, create(ROOT, "f", f(1, 1)));
    std::fs::write(rig.path("f"), "").unwrap();
    rig.kill();
    rig.open();
    assert_eq!(rig.fid("f"), f(1, 1));
}

#[test]
fn a_store_that_was_cut_off_comes_again() {
    let mut rig = rig();
    rig.ok(1, create(ROOT, "f", f(1, 1)));
    let seq = intend(&mut rig, 1, store(f(1, 1), Stamp(0), 4));
    rig.kill();
    rig.open();
    assert_eq!(rig.v().meet([1; 16], 0, "h").unwrap().1, Seq(1), "not this one");
    let record = rig.record(store(f(1, 1), Stamp(0), 4));
    let change = Incoming { seq, record: &record, content: Content::Inline(b"text") };
    let out = rig.v().apply(1, seq, &[change]);
    assert!(out.failure.is_none() && out.conflicts.is_empty());
    assert_eq!(rig.read("f"), "text");
}

#[test]
fn what_the_power_took_is_done_again() {
    let mut rig = rig();
    rig.ok(1, mkdir(ROOT, "d", f(1, 1)));
    rig.v().sync_job().run().unwrap();
    rig.v().synced();
    // behind the last sync: applied, and then lost with the power
    rig.ok(1, create(f(1, 1), "a", f(1, 2)));
    rig.store(1, f(1, 2), Stamp(0), b"text");
    rig.ok(
        1,
        Op::Rename {
            from: at(f(1, 1), "a"),
            to: at(ROOT, "b"),
            fid: f(1, 2),
            base: Stamp(0),
            over: FREE,
        },
    );
    rig.kill();
    rig.another_boot();
    std::fs::remove_file(rig.path("b")).unwrap();
    rig.open();
    assert_eq!(rig.names(), ["b", "d"], "names are redone from the journal");
    assert_eq!((rig.fid("b"), rig.read("b")), (f(1, 2), String::new()));
    assert_eq!(rig.v().meet([1; 16], 0, "h").unwrap().1, Seq(1), "all the rest comes again");
    let records = [
        rig.record(create(f(1, 1), "a", f(1, 2))),
        rig.record(store(f(1, 2), Stamp(0), 4)),
        rig.record(Op::Rename {
            from: at(f(1, 1), "a"),
            to: at(ROOT, "b"),
            fid: f(1, 2),
            base: Stamp(0),
            over: FREE,
        }),
    ];
    let contents = [Content::None, Content::Inline(b"text"), Content::None];
    let changes: Vec<Incoming<'_>> = (0..3)
        .map(|i| Incoming { seq: Seq(2 + i as u64), record: &records[i], content: contents[i] })
        .collect();
    let out = rig.v().apply(1, Seq(4), &changes);
    assert!(out.failure.is_none() && out.conflicts.is_empty(), "{out:?}");
    assert_eq!((rig.names(), rig.read("b")), (vec!["b".into(), "d".to_owned()], "text".into()));
    rig.kill();
    rig.open();
    assert_eq!(rig.v().meet([1; 16], 0, "h").unwrap().1, Seq(4));
}

/// One object that was damaged does not keep the others from being served.
#[test]
fn what_is_damaged_by_a_power_cut_is_passed_over() {
    let mut rig = rig();
    rig.ok(1, create(ROOT, "f", f(1, 1)));
    rig.v().sync_job().run().unwrap();
    rig.v().synced();
    rig.store(1, f(1, 1), Stamp(0), b"text");
    rig.ok(1, create(ROOT, "g", f(1, 2)));
    rig.kill();
    rig.another_boot();
    let file = std::fs::File::open(rig.path("f")).unwrap();
    fs::xattr::set(file, b"", super::super::compare::own_key(), b"rubbish", 0).unwrap();
    rig.open();
    assert_eq!(rig.names(), ["f", "g"]);
    assert_eq!(rig.v().meet([1; 16], 0, "h").unwrap().1, Seq(1), "they come again");
}

/// A client was shown a version, and with the power went its record alone, or its effect as well.
#[test]
fn a_stamp_that_was_lost_is_never_given_again() {
    for what in [".imz/kml", ""] {
        let mut rig = rig();
        rig.ok(1, create(ROOT, "f", f(1, 1)));
        rig.ok(2, create(ROOT, "g", f(2, 1)));
        rig.store(1, f(1, 1), Stamp(0), b"old!");
        rig.v().sync_job().run().unwrap();
        rig.v().synced();
        let (old, durable) = (rig.stamp(f(1, 1)), rig.v().stamp());
        rig.copy(what, false);
        rig.store(1, f(1, 1), old, b"new!");
        let shown = rig.stamp(f(1, 1));
        assert!(shown > old);
        rig.kill();
        rig.copy(what, true);
        rig.another_boot();
        rig.open();
        let found = rig.stamp(f(1, 1));
        assert!(found != shown, "{what}: nobody is to take it for what was shown");
        assert_eq!(found == old, what.is_empty(), "{what}");
        assert!(rig.v().since(durable, 2).unwrap().lost, "{what}: who saw it asks anew");
        assert!(rig.v().list_since(ROOT, durable).unwrap().is_none());
        assert!(rig.v().list_since(ROOT, shown).unwrap().is_none());
        rig.store(2, f(2, 1), Stamp(0), b"another");
        let next = rig.stamp(f(2, 1));
        assert!(next > shown && next > found, "{what}: {next:?} {shown:?} {found:?}");
        // it was not acknowledged: it comes again, and is no conflict
        assert_eq!(rig.v().meet([1; 16], 0, "h").unwrap().1, Seq(2));
        rig.seqs.insert(1, 2);
        let out = rig.store(1, f(1, 1), old, b"new!");
        assert!(out.failure.is_none() && out.conflicts.is_empty(), "{what}: {out:?}");
        assert_eq!(rig.read("f"), "new!");
        // what is known now, is known in the next life, too
        let now = rig.v().stamp();
        rig.kill();
        rig.open();
        let again = rig.v().since(now, 2).unwrap();
        assert_eq!((again.lost, again.fids, again.upto), (false, vec![], now));
        assert!(rig.v().since(shown, 2).unwrap().lost);
    }
}

/// Its journal is ahead of its tree, and the machine was not started anew since.
#[test]
fn what_a_backup_of_a_running_server_lacks_is_done_again() {
    let mut rig = rig();
    rig.ok(1, create(ROOT, "f", f(1, 1)));
    rig.v().sync_job().run().unwrap();
    rig.v().synced();
    rig.copy("", false);
    rig.ok(1, create(ROOT, "g", f(1, 2)));
    rig.ok(1, rename("f", "h", f(1, 1), FREE));
    let kml = rig.at.path().join("aside/.imz/kml");
    std::fs::remove_dir_all(&kml).unwrap();
    copy_all(&rig.path(".imz/kml"), &kml);
    rig.kill();
    rig.copy("", true);
    rig.open();
    assert_eq!(rig.names(), ["g", "h"]);
    assert_eq!(rig.v().meet([1; 16], 0, "h").unwrap().1, Seq(1), "the rest may come again");
    rig.seqs.insert(1, 1);
    rig.ok(1, create(ROOT, "g", f(1, 2)));
    rig.ok(1, rename("f", "h", f(1, 1), FREE));
    // the next start, of the same tree, is one like any other
    let known = rig.v().stamp();
    rig.kill();
    rig.open();
    assert!(!rig.v().since(known, 2).unwrap().lost);
}

/// A power cut sets stamps aside, so that those of a life that a backup does not know may lie in the
/// future of the life that is restored from it.
#[test]
fn a_version_that_was_never_given_is_not_the_current_one() {
    let mut rig = rig();
    rig.ok(1, create(ROOT, "f", f(1, 1)));
    rig.store(1, f(1, 1), Stamp(0), b"old!");
    rig.v().sync_job().run().unwrap();
    rig.copy("", false);
    for _ in 0..2 {
        rig.kill();
        rig.another_boot();
        rig.open();
    }
    let old = rig.stamp(f(1, 1));
    rig.store(2, f(1, 1), old, b"lost");
    let lost = rig.stamp(f(1, 1));
    rig.kill();
    rig.copy("", true);
    rig.open();
    assert!(lost > rig.v().stamp(), "else this tests nothing");
    let now = rig.stamp(f(1, 1));
    rig.seqs.insert(1, 2);
    assert_eq!(rig.store(1, f(1, 1), now, b"mine").conflicts, []);
    rig.seqs.insert(2, 0);
    for base in [lost, Stamp(u64::MAX)] {
        let out = rig.store(2, f(1, 1), base, b"late");
        assert_eq!((out.conflicts, rig.read("f")), (vec![f(1, 1)], "mine".to_owned()));
    }
    let stamp = rig.v().stamp();
    assert_eq!((rig.v().known(stamp), rig.v().known(Stamp(stamp.0 + 1))), (Some(stamp), None));
}

/// The tree kept what the journal lost: what comes again is done, or was done and is over; the
/// directory has the time that the client's has.
#[test]
fn what_a_power_cut_left_without_its_record_is_no_conflict() {
    let mut rig = rig();
    rig.ok(1, mkdir(ROOT, "d", f(1, 1)));
    rig.v().sync_job().run().unwrap();
    rig.v().synced();
    rig.copy(".imz/kml", false);
    let (from, to, base) = (at(f(1, 1), "a"), at(ROOT, "b"), Stamp(0));
    let ops = [
        create(f(1, 1), "a", f(1, 2)),
        Op::Rename { from, to, fid: f(1, 2), base, over: FREE },
        create(f(1, 1), "a", f(1, 3)),
    ];
    ops.iter().for_each(|op| rig.ok(1, op.clone()));
    rig.kill();
    rig.copy(".imz/kml", true);
    rig.another_boot();
    let mtime = |rig: &Rig| std::fs::metadata(rig.path("d")).unwrap().modified().unwrap();
    let before = mtime(&rig);
    let now = std::time::SystemTime::now();
    std::fs::File::open(rig.path("d")).unwrap().set_modified(now).unwrap();
    rig.open();
    assert_eq!(rig.v().meet([1; 16], 0, "h").unwrap().1, Seq(1));
    rig.seqs.insert(1, 1);
    ops.into_iter().for_each(|op| rig.ok(1, op));
    assert_eq!((rig.v().conflicts(), mtime(&rig)), (0, before));
    assert_eq!(rig.names(), ["b", "d"]);
    let page = rig.v().list(f(1, 1), b"").unwrap();
    assert_eq!(page.entries.iter().map(|(_, it)| it.fid).collect::<Vec<_>>(), [f(1, 3)]);
    // somebody else's change in the same place is one
    let out = rig.with(2, mkdir(f(1, 1), "a", f(2, 9)), Content::None);
    assert!(!out.conflicts.is_empty());
}

/// Found by cutting the power: the tree shows a name's last state, and the records that led there
/// come again, one after the other.
#[test]
fn what_outlived_its_records_is_no_conflict_with_them() {
    let mut rig = rig();
    rig.ok(1, create(ROOT, "e", f(1, 1)));
    rig.ok(1, create(ROOT, "o", f(1, 3)));
    rig.v().sync_job().run().unwrap();
    rig.v().synced();
    rig.copy(".imz/kml", false);
    let ops = [
        rename("e", "f", f(1, 1), FREE),
        rename("f", "g", f(1, 1), FREE),
        create(ROOT, "e", f(1, 2)),
        Op::Link { at: at(ROOT, "o2"), fid: f(1, 3), base: Stamp(0) },
        unlink(ROOT, "o", f(1, 3), Stamp(0)),
        create(ROOT, "o", f(1, 4)),
    ];
    ops.iter().for_each(|op| rig.ok(1, op.clone()));
    rig.kill();
    rig.copy(".imz/kml", true);
    rig.another_boot();
    rig.open();
    assert_eq!(rig.v().meet([1; 16], 0, "h").unwrap().1, Seq(2));
    rig.v().brings(1, Seq(8));
    rig.seqs.insert(1, 2);
    ops.iter().for_each(|op| rig.ok(1, op.clone()));
    assert_eq!(rig.names(), ["e", "g", "o", "o2"]);
    assert_eq!((rig.fid("g"), rig.fid("o2")), (f(1, 1), f(1, 3)));
    assert_eq!(rig.v().conflicts(), 0);
    // in a life that was not cut it is one
    rig.kill();
    rig.open();
    let out = rig.with(1, rename("e", "h", f(1, 1), FREE), Content::None);
    assert!(!out.conflicts.is_empty());
}

/// What a client does after the cut is certified like any other's, however long that was ago.
#[test]
fn what_comes_after_the_power_cut_outlives_nothing() {
    let mut rig = rig();
    rig.ok(1, create(ROOT, "a", f(1, 1)));
    rig.v().sync_job().run().unwrap();
    rig.v().synced();
    rig.copy(".imz/kml", false);
    rig.ok(1, create(ROOT, "b", f(1, 2)));
    rig.kill();
    rig.copy(".imz/kml", true);
    rig.another_boot();
    rig.open();
    rig.v().brings(1, Seq(2));
    rig.v().brings(1, Seq(9)); // when it came once more
    rig.seqs.insert(1, 1);
    rig.ok(1, create(ROOT, "b", f(1, 2)));
    rig.ok(2, rename("a", "c", f(1, 1), FREE));
    let base = rig.stamp(f(1, 2));
    let over = Over::Replaced(gone(f(1, 2), base));
    let out = rig.with(1, rename("a", "b", f(1, 1), over), Content::None);
    assert_eq!((out.conflicts.is_empty(), rig.v().conflicts()), (false, 1));
}

/// Killed in the midst of a store: who has the version before it must not believe that it has what
/// stands there.
#[test]
fn a_file_that_is_half_written_is_another_version() {
    let mut rig = rig();
    rig.ok(1, create(ROOT, "f", f(1, 1)));
    rig.store(1, f(1, 1), Stamp(0), b"text");
    let (old, known) = (rig.stamp(f(1, 1)), rig.v().stamp());
    intend(&mut rig, 1, store(f(1, 1), old, 4));
    std::fs::write(rig.path("f"), b"teXX").unwrap();
    rig.kill();
    rig.open();
    assert!(rig.stamp(f(1, 1)) > old);
    assert_eq!(rig.v().since(known, 2).unwrap().fids, [f(1, 1)]);
    assert_eq!(rig.v().meet([1; 16], 0, "h").unwrap().1, Seq(2), "it comes again");
    rig.seqs.insert(1, 2);
    let out = rig.store(1, f(1, 1), old, b"TEXT");
    assert!(out.failure.is_none() && out.conflicts.is_empty(), "{out:?}");
    assert_eq!(rig.read("f"), "TEXT");
}

/// Found by cutting the power: contents that come again must not undo what came after them.
#[test]
fn what_was_set_after_the_contents_comes_again_as_well() {
    let mut rig = rig();
    rig.ok(1, create(ROOT, "a", f(1, 2)));
    rig.v().sync_job().run().unwrap();
    rig.v().synced();
    let mtime = crate::kml::record::Time { sec: 1000, nsec: 7 };
    let new = Change { size: Some(2), mtime: Some(mtime), ..Change::default() };
    let cut = Op::Setattr { fid: f(1, 2), base: Stamp(0), new, old: Change::default() };
    rig.store(1, f(1, 2), Stamp(0), b"text");
    rig.ok(1, cut.clone());
    rig.kill();
    rig.another_boot();
    rig.open();
    let records = [rig.record(store(f(1, 2), Stamp(0), 4)), rig.record(cut)];
    let contents = [Content::Inline(b"text"), Content::None];
    let changes: Vec<Incoming<'_>> = (0..2)
        .map(|i| Incoming { seq: Seq(2 + i as u64), record: &records[i], content: contents[i] })
        .collect();
    let out = rig.v().apply(1, Seq(3), &changes);
    assert!(out.failure.is_none() && out.conflicts.is_empty(), "{out:?}");
    assert_eq!(rig.read("a"), "te");
    assert_eq!(rig.v().stat(f(1, 2)).unwrap().attr.mtime, mtime);
}

#[test]
fn what_the_file_system_refuses_is_a_conflict_and_no_stop() {
    let mut rig = rig();
    let target = vec![b'x'; TARGET_LEN_MAX];
    rig.ok(1, Op::Symlink { at: at(ROOT, "long"), fid: f(1, 1), target: target.clone() });
    assert_eq!(rig.v().stat(f(1, 1)).unwrap().target.len(), target.len());
    rig.ok(1, mkdir(ROOT, "d", f(1, 2)));
    rig.ok(1, mkdir(f(1, 2), "e", f(1, 3)));
    // into itself
    let op = Op::Rename {
        from: at(ROOT, "d"),
        to: at(f(1, 3), "x"),
        fid: f(1, 2),
        base: Stamp(0),
        over: FREE,
    };
    let out = rig.with(1, op, Content::None);
    assert!(out.failure.is_none() && !out.conflicts.is_empty(), "{out:?}");
    assert!(rig.path("d/e").exists());
    rig.ok(1, create(ROOT, "next", f(1, 4)));
    std::fs::set_permissions(rig.path("next"), std::fs::Permissions::from_mode(0o400)).unwrap();
    assert_eq!(rig.names(), ["d", "long", "next"]);
}

fn count(rig: &mut Rig) {
    let job = rig.v().count_usage(true).unwrap().unwrap();
    rig.v().counted(job.run()).unwrap();
    assert!(rig.v().count_usage(true).unwrap().is_none());
}

/// A walk that came by these before, or after.
#[test]
fn what_changes_while_it_is_counted_counts_once() {
    for walked_first in [true, false] {
        let mut rig = rig();
        for (n, name) in ["stays", "grows", "goes"].into_iter().enumerate() {
            rig.ok(1, create(ROOT, name, f(1, 1 + n as u64)));
            rig.store(1, f(1, 1 + n as u64), Stamp(0), &[7; 9_000]);
        }
        let job = rig.v().count_usage(true).unwrap().unwrap();
        assert!(rig.v().count_usage(true).unwrap().is_none() && rig.v().is_counting());
        let (before, job) = match walked_first {
            true => (Some(job.run()), None),
            false => (None, Some(job)),
        };
        rig.store(1, f(1, 2), Stamp(0), &[7; 90_000]);
        let base = rig.stamp(f(1, 3));
        rig.ok(1, unlink(ROOT, "goes", f(1, 3), base));
        rig.ok(1, create(ROOT, "comes", f(1, 4)));
        assert_eq!(rig.v().usage(), (0, 0));
        let walked = before.unwrap_or_else(|| job.unwrap().run());
        rig.v().counted(walked).unwrap();
        let counted = rig.v().usage();
        rig.v().count_usage(false).unwrap();
        count(&mut rig);
        assert_eq!((rig.v().usage(), counted.1), (counted, 3), "{walked_first}");
    }
}

/// More of them than the process may have open.
#[test]
fn a_directory_with_many_subdirectories_is_counted() {
    let mut rig = rig();
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let limit: u64 = line.split_whitespace().next().unwrap().parse().unwrap();
    if limit > 20_000 {
        eprintln!("skipped: {limit} files may be open");
        return;
    }
    (0..limit + 10).for_each(|n| std::fs::create_dir(rig.path(&n.to_string())).unwrap());
    count(&mut rig);
    assert_eq!(rig.v().usage().1, limit + 10);
}

#[test]
fn what_files_take_is_counted_as_a_walk_counts_it() {
    let mut rig = rig();
    let (f, g, d) = (Fid::new(1, 1), Fid::new(1, 2), Fid::new(1, 3));
    rig.ok(1, create(ROOT, "before", f));
    assert_eq!(rig.v().usage(), (0, 0), "nobody wants to know");
    count(&mut rig);
    assert_eq!(rig.v().usage().1, 1);
    rig.ok(1, mkdir(ROOT, "d", d));
    rig.ok(1, create(d, "g", g));
    rig.store(1, g, Stamp(0), &[7; 50_000]);
    rig.store(1, f, Stamp(0), &[7; 9_000]);
    let at_first = rig.v().usage();
    assert!(at_first.0 >= 59_000 && at_first.1 == 3, "{at_first:?}");
    // a second name takes no file, and goes before the file does
    let base = rig.stamp(g);
    rig.ok(1, Op::Link { at: at(ROOT, "again"), fid: g, base });
    assert_eq!(rig.v().usage().1, 3);
    let base = rig.stamp(g);
    let mut twice = gone(g, base);
    twice.attr.nlink = 2;
    rig.ok(1, Op::Unlink { at: at(d, "g"), gone: twice });
    assert_eq!(rig.v().usage().1, 3);
    rig.store(1, f, Stamp(0), &[7; 90_000]);
    let counted = rig.v().usage();
    rig.v().count_usage(false).unwrap();
    count(&mut rig);
    assert_eq!(rig.v().usage(), counted, "as a walk counts it");
    let base = rig.stamp(g);
    rig.ok(1, unlink(ROOT, "again", g, base));
    assert_eq!(rig.v().usage().1, 2);
}

#[test]
fn the_book_of_room_outlives_the_server() {
    let mut rig = rig();
    assert_eq!(rig.v().book(), None);
    let line = super::super::room::Line { node: 1, epoch: 5, granted: (9, 1), returned: (2, 0) };
    rig.v().keep_book(6, vec![line]).unwrap();
    rig.kill();
    rig.open();
    let book = rig.v().book().unwrap();
    assert_eq!((book.epoch_next, book.nodes), (6, vec![line]));
    let (bytes, files) = rig.v().free_room().unwrap();
    let space = rig.v().space().unwrap();
    assert!(bytes < space.blocks_available * u64::from(space.block_len) && files > 0);
}

/// Longer than the steps of the clock by which files get their ctimes.
const TICK: std::time::Duration = std::time::Duration::from_millis(20);

/// Stops it cleanly, and looks at the tree with the eyes of client 2 after `act` and a new start.
fn behind(rig: &mut Rig, act: impl FnOnce(&Rig)) -> Vec<Fid> {
    let known = rig.v().stamp();
    rig.volume.take().unwrap().close().unwrap();
    std::thread::sleep(TICK);
    act(rig);
    rig.open();
    let found = rig.v().since(known, 2).unwrap();
    assert!(!found.lost && !found.more);
    found.fids
}

#[test]
fn what_was_done_while_nobody_served_is_journaled() {
    let mut rig = rig();
    rig.ok(1, mkdir(ROOT, "d", f(1, 1)));
    for (n, name) in ["f", "g", "h"].into_iter().enumerate() {
        rig.ok(1, create(f(1, 1), name, f(1, 2 + n as u64)));
        rig.store(1, f(1, 2 + n as u64), Stamp(0), b"text");
    }
    let (d, file) = (f(1, 1), f(1, 2));
    assert_eq!(behind(&mut rig, |_| ()), []);
    // a time to come is no change, nor is that all of it was copied
    let mtime = Some(crate::kml::record::Time { sec: 5_000_000_000, nsec: 0 });
    let (new, old) = (Change { mtime, ..Change::default() }, Change::default());
    rig.ok(1, Op::Setattr { fid: f(1, 4), base: Stamp(0), new, old });
    assert_eq!(behind(&mut rig, |_| ()), []);
    let copied = behind(&mut rig, |rig| {
        rig.copy("", false);
        std::fs::remove_dir_all(rig.path("")).unwrap();
        rig.copy("", true);
    });
    assert_eq!(copied, []);
    let (data, stamp) = (rig.v().stat(file).unwrap().stored, rig.stamp(file));
    // attributes, and contents
    let found = behind(&mut rig, |rig| {
        std::fs::set_permissions(rig.path("d/f"), std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(rig.path("d/g"), b"TEXT").unwrap();
    });
    assert_eq!(found, [file, f(1, 3)]);
    assert!(rig.stamp(file) > stamp && rig.v().stat(file).unwrap().stored == data);
    assert!(rig.v().stat(f(1, 3)).unwrap().stored > data);
    // names: the directory's listing is not told in part
    let listed = rig.v().stamp();
    let found = behind(&mut rig, |rig| {
        std::fs::rename(rig.path("d/h"), rig.path("h")).unwrap();
        std::fs::write(rig.path("d/new"), b"").unwrap();
        std::fs::remove_file(rig.path("d/g")).unwrap();
    });
    assert_eq!(found, [ROOT, d, f(1, 4)]);
    assert!(rig.v().list_since(d, listed).unwrap().is_none());
    assert_eq!(rig.names(), ["d", "h"]);
    assert_eq!(rig.fid("h"), f(1, 4));
    assert!(matches!(rig.v().stat(f(1, 3)), Err(VolumeError::Gone(_))));
    // a change of a client that came first wins; one that was made on the version before does not
    let base = rig.stamp(f(1, 4));
    behind(&mut rig, |rig| std::fs::write(rig.path("h"), b"by hand").unwrap());
    let out = rig.store(2, f(1, 4), base, b"late");
    assert_eq!((out.conflicts, rig.read("h")), (vec![f(1, 4)], "by hand".to_owned()));
}

/// The walk comes by the original first, or by the copy.
#[test]
fn a_copy_with_its_attribute_is_no_change_of_the_original() {
    for (from, to) in [("f", "d/copy"), ("d/g", "copy")] {
        for is_clean in [true, false] {
            let mut rig = rig();
            rig.ok(1, mkdir(ROOT, "d", f(1, 1)));
            rig.ok(1, create(ROOT, "f", f(1, 2)));
            rig.ok(1, create(f(1, 1), "g", f(1, 3)));
            let known = rig.v().stamp();
            let copy = |rig: &Rig| copy_all(&rig.path(from), &rig.path(to));
            let found = match is_clean {
                true => behind(&mut rig, copy),
                false => {
                    rig.kill();
                    copy(&rig);
                    rig.open();
                    rig.v().since(known, 2).unwrap().fids
                }
            };
            let dir = if to == "copy" { ROOT } else { f(1, 1) };
            let want = if is_clean || dir == f(1, 1) { vec![dir] } else { vec![ROOT, f(1, 1)] };
            assert_eq!(found, want, "{to}, clean: {is_clean}");
            // both of them changed: that is one of the original
            let found = behind(&mut rig, |rig| {
                std::fs::write(rig.path(from), b"more").unwrap();
                std::fs::remove_file(rig.path(to)).unwrap();
                copy(rig);
            });
            let original = if from == "f" { f(1, 2) } else { f(1, 3) };
            assert_eq!(found, [dir, original], "{to}, clean: {is_clean}");
        }
    }
}

/// A start that ends before it has looked at all is no start.
#[test]
fn a_look_that_was_cut_off_is_done_again() {
    let mut rig = rig();
    rig.ok(1, create(ROOT, "f", f(1, 1)));
    let known = rig.v().stamp();
    rig.volume.take().unwrap().close().unwrap();
    std::thread::sleep(TICK);
    std::fs::write(rig.path("f"), b"by hand").unwrap();
    // as open() leaves it while it looks
    let state = State::open(&rig.path(".imz"), || panic!("it is there")).unwrap();
    assert!(state.facts().stopped_at > 0);
    state.edit(|facts| facts.clean = false).unwrap();
    drop(state);
    rig.open();
    assert_eq!(rig.v().since(known, 2).unwrap().fids, [f(1, 1)]);
    assert_eq!(rig.v().state.facts().stopped_at, 0);
}
