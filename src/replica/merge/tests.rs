//! Listings and objects of an imagined server, merged into a cache in a scratch directory.

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;

use super::*;
use crate::kml::codec::Outcome;
use crate::kml::log::{Log, Options};
use crate::kml::record::{Attr, Op, Origin, Place, Range, Record, Stamp};
use crate::replica::hydrate::{acked, mark_stale, set_object, write_range};
use crate::replica::ops::time_of_ns;
use crate::replica::state::{Facts, State};
use crate::replica::tree::Tree;

const MIB: u64 = 1 << 20;
const T: Time = Time { sec: 1_500_000_000, nsec: 987_654_321 };

struct Rig {
    _dir: tempfile::TempDir,
    root: PathBuf,
    cache: Cache,
}

fn rig() -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: &str| dir.path().join(n);
    std::fs::create_dir(at("tree")).unwrap();
    let tree = Tree::open(&at("tree"), &at("index"), true).unwrap();
    let log = Log::open_or_create(&at("kml"), 3, 77, Options::default()).unwrap();
    let state = State::open(&at("state"), || Facts::new("v", "", 7, 3)).unwrap();
    let cache = Cache::new(tree, log, state, &at("limbo")).unwrap();
    cache.set_online(true);
    Rig { root: at("tree"), _dir: dir, cache }
}

fn name(s: &str) -> Name {
    Name::new(s.as_bytes()).unwrap()
}

fn remote(fid: u64, mode: u32, size: u64) -> Remote {
    let (uid, gid) = cred::own();
    let nlink = if mode & 0o170000 == 0o040000 { 2 } else { 1 };
    let attr = Attr { mode, uid, gid, nlink, rdev: 0, size, atime: T, mtime: T };
    let fid = Fid(fid);
    Remote { fid, stamp: Stamp(5), attr, target: vec![], xattrs: vec![], stored: None }
}

fn file(fid: u64, size: u64) -> Remote {
    remote(fid, 0o100644, size)
}

fn subdir(fid: u64) -> Remote {
    remote(fid, 0o040755, 0)
}

fn record(op: Op) -> Record {
    let origin = Origin::default();
    Record { time_ns: 42_000_000_007, origin, uid: 0, gid: 0, path: vec![], op }
}

impl Rig {
    /// Merges a whole listing.
    fn list(&self, dir: u64, mark: u64, entries: Vec<(&str, Remote)>) -> Vec<Notice> {
        let mut listing = Listing::default();
        let entries = entries.into_iter().map(|(n, r)| (n.as_bytes().to_vec(), r)).collect();
        let dir_now = Remote { stamp: Stamp(9), ..subdir(dir) };
        let page = RemotePage { dir: dir_now, entries, gone: None };
        let (dir, mark) = (Fid(dir), Seq(mark));
        let mut notices = merge_page(&self.cache, &mut listing, dir, page, mark).unwrap();
        notices.extend(finish_listing(&self.cache, listing, dir, mark, true).unwrap());
        notices
    }
    fn meta(&self, fid: u64) -> Meta {
        if fid == 1 {
            return self.cache.tree.root().meta();
        }
        self.cache.tree.find(Fid(fid)).unwrap().2
    }
    fn fill(&self, fid: u64, bytes: &[u8]) {
        let len = bytes.len() as u64;
        let stamp = self.meta(fid).stamp;
        write_range(&self.cache, Fid(fid), stamp, 0, bytes, Some((0, len))).unwrap();
    }
    fn own(&self, op: Op) -> Seq {
        let ticket = self.cache.append(&record(op)).unwrap();
        let seq = ticket.seq;
        self.cache.settle(ticket, Outcome::Done);
        seq
    }
    fn own_create(&self, dir: u64, n: &str, fid: u64) -> Seq {
        let at = Place { dir: Fid(dir), base: Stamp(0), name: name(n) };
        let seq = self.own(Op::Create { at, fid: Fid(fid), mode: 0o644, umask: 0 });
        let by = cred::Caller { uid: cred::own().0, gid: cred::own().1, umask: 0 };
        let dir = self.cache.tree.dir(Fid(dir)).unwrap();
        let meta = Meta { epoch: self.cache.epoch(), ..Meta::whole(Fid(fid)) };
        self.cache
            .tree
            .create(&dir, &name(n), by, 0o644, &meta, time_of_ns(42_000_000_007))
            .unwrap();
        seq
    }
    fn own_store(&self, fid: u64) -> Seq {
        let ranges = vec![Range { at: 0, len: 1 }];
        let (fid, base) = (Fid(fid), Stamp(5));
        self.own(Op::Store { fid, base, size: 1, mtime: T, ranges, old_size: 0 })
    }
    fn path(&self, p: &str) -> PathBuf {
        self.root.join(p)
    }
    fn limbo_has(&self, fid: u64) -> bool {
        self.root.parent().unwrap().join(format!("limbo/{fid:x}")).symlink_metadata().is_ok()
    }
}

fn entry(dir: u64, n: &str) -> Notice {
    Notice::Entry { dir: Fid(dir), name: name(n) }
}

#[test]
fn a_listing_makes_stubs_of_every_kind() {
    let rig = rig();
    let mut acl = vec![2, 0, 0, 0];
    for (tag, perm, id) in [
        (1u16, 6u16, u32::MAX),
        (2, 4, 1234),
        (4, 4, u32::MAX),
        (16, 4, u32::MAX),
        (32, 0, u32::MAX),
    ] {
        acl.extend([tag.to_le_bytes(), perm.to_le_bytes()].concat());
        acl.extend(id.to_le_bytes());
    }
    let mut f = file(10, 3 * MIB + 5);
    f.attr.mode = 0o106640;
    (f.attr.uid, f.attr.gid) = if cred::is_root() { (12, 34) } else { cred::own() };
    f.xattrs = vec![
        (b"user.colour".to_vec(), b"red".to_vec()),
        (b"system.posix_acl_access".to_vec(), acl.clone()),
    ];
    let mut link = remote(11, 0o120777, 6);
    link.target = b"../f/x".to_vec();
    let mut hard = file(14, 0);
    hard.attr.nlink = 3;
    rig.list(
        1,
        0,
        vec![
            ("d", subdir(12)),
            ("f", f),
            ("hard", hard),
            ("link", link),
            ("pipe", remote(13, 0o010600, 0)),
            ("sock", remote(15, 0o140600, 0)),
        ],
    );
    let meta = rig.path("f").symlink_metadata().unwrap();
    assert_eq!(
        (meta.len(), meta.mode(), meta.blocks()),
        (3 * MIB + 5, 0o106640, 8.min(meta.blocks()))
    );
    assert_eq!((meta.mtime(), meta.mtime_nsec()), (T.sec, i64::from(T.nsec)));
    assert_eq!(meta.atime_nsec(), i64::from(T.nsec));
    if cred::is_root() {
        assert_eq!((meta.uid(), meta.gid()), (12, 34));
    }
    let root = rig.cache.tree.root();
    assert_eq!(fs::xattr::get(&**root, b"f", b"user.colour").unwrap().unwrap(), b"red");
    assert_eq!(fs::xattr::get(&**root, b"f", b"system.posix_acl_access").unwrap(), Some(acl));
    assert_eq!(std::fs::read_link(rig.path("link")).unwrap().to_str(), Some("../f/x"));
    assert!(rig.path("pipe").metadata().unwrap().file_type().is_fifo());
    assert!(rig.path("sock").metadata().unwrap().file_type().is_socket());
    assert_eq!(rig.meta(14).nlink, 3);
    let (file, dir, top) = (rig.meta(10), rig.meta(12), rig.meta(1));
    assert_eq!(file.missing(0, u64::MAX), Some((0, 3 * MIB + 5)));
    assert!(!file.complete && !dir.complete && top.complete && rig.meta(14).complete);
    for meta in [&file, &dir, &top] {
        assert!(rig.cache.valid(meta), "{meta:?}");
    }
    assert_eq!(top.stamp, Stamp(9));
    let now = rig.root.metadata().unwrap();
    assert_eq!((now.mtime(), now.mtime_nsec()), (T.sec, i64::from(T.nsec)));
}

#[test]
fn a_device_needs_root() {
    let rig = rig();
    let mut null = remote(16, 0o020666, 0);
    null.attr.rdev = 0x103;
    rig.list(1, 0, vec![("null", null)]);
    // Where even root may not make devices, they are an error and not a half-made entry.
    assert_eq!(rig.path("null").symlink_metadata().is_ok(), cred::is_root());
}

#[test]
fn what_vanishes_comes_back_elsewhere_with_its_data() {
    let rig = rig();
    rig.list(1, 0, vec![("a", subdir(10)), ("b", subdir(11)), ("stub", file(20, MIB))]);
    rig.list(10, 0, vec![("f", file(12, 4)), ("sub", subdir(13))]);
    rig.list(13, 0, vec![("g", file(14, 2))]);
    rig.fill(12, b"data");
    rig.fill(14, b"gg");
    // Seen to vanish first: a/f and a/sub went to b.
    let notices = rig.list(10, 0, vec![]);
    assert!(notices.contains(&entry(10, "f")) && notices.contains(&entry(10, "sub")));
    assert!(!rig.path("a/f").exists() && rig.limbo_has(12) && rig.limbo_has(13));
    let moved = |mut r: Remote| {
        (r.stamp, r.stored) = (Stamp(8), Some(Stamp(5)));
        r
    };
    rig.list(11, 0, vec![("f2", moved(file(12, 4))), ("sub2", moved(subdir(13)))]);
    assert_eq!(std::fs::read(rig.path("b/f2")).unwrap(), b"data");
    assert_eq!(std::fs::read(rig.path("b/sub2/g")).unwrap(), b"gg");
    assert!(rig.meta(12).complete && rig.meta(12).stamp == Stamp(8));
    assert!(!rig.cache.valid(&rig.meta(13)), "what it contains may have changed");
    assert_eq!(rig.cache.tree.place(Fid(14)).unwrap().1, name("g"));
    // Seen to appear first: b/f2 goes to a.
    let notices = rig.list(10, 0, vec![("f3", moved(file(12, 4)))]);
    assert!(notices.contains(&entry(11, "f2")) && notices.contains(&entry(10, "f3")));
    assert_eq!(std::fs::read(rig.path("a/f3")).unwrap(), b"data");
    assert!(!rig.path("b/f2").exists());
    // A stub without data is not worth keeping.
    rig.list(1, 0, vec![("a", subdir(10)), ("b", subdir(11))]);
    assert!(!rig.path("stub").exists() && !rig.limbo_has(20));
}

#[test]
fn names_of_one_file_are_hard_links() {
    let rig = rig();
    let two = || {
        let mut f = file(12, 4);
        f.attr.nlink = 2;
        f
    };
    rig.list(1, 0, vec![("a", two()), ("b", two())]);
    rig.fill(12, b"data");
    assert_eq!(std::fs::read(rig.path("b")).unwrap(), b"data");
    assert_eq!(rig.path("a").metadata().unwrap().ino(), rig.path("b").metadata().unwrap().ino());
    rig.list(1, 0, vec![("b", file(12, 4))]);
    assert_eq!(rig.cache.tree.place(Fid(12)).unwrap().1, name("b"));
    assert_eq!(std::fs::read(rig.path("b")).unwrap(), b"data");
    assert_eq!(rig.meta(12).nlink, 1, "as the server counts, also while an old name is here");
}

#[test]
fn a_name_in_limbo_is_a_name_of_the_same_file() {
    let rig = rig();
    let two = || {
        let mut f = file(12, 4);
        f.attr.nlink = 2;
        f
    };
    rig.list(1, 0, vec![("d", subdir(10)), ("e", subdir(11))]);
    rig.list(10, 0, vec![("a", two())]);
    rig.fill(12, b"data");
    // At the server d went into e, and the file got a name there.
    rig.list(1, 0, vec![("e", subdir(11))]);
    assert!(rig.limbo_has(10));
    rig.cache.tree.close_dir(Fid(10)); // as one that was not used for a while
    rig.list(11, 0, vec![("b", two()), ("d", subdir(10))]);
    assert_eq!(std::fs::read(rig.path("e/b")).unwrap(), b"data");
    rig.list(10, 0, vec![("a", two())]);
    let ino = |p| rig.path(p).metadata().unwrap().ino();
    assert_eq!(ino("e/b"), ino("e/d/a"));
}

#[test]
fn the_next_life_finds_what_rests_in_limbo() {
    let rig = rig();
    rig.list(1, 0, vec![("f", file(12, 4))]);
    rig.fill(12, b"data");
    rig.list(1, 0, vec![]);
    let dir = rig.root.parent().unwrap().to_owned();
    rig.cache.tree.index.flush(true).unwrap();
    drop(rig.cache);
    std::fs::remove_file(dir.join("index")).unwrap();
    let at = |n: &str| dir.join(n);
    let tree = Tree::open(&at("tree"), &at("index"), true).unwrap();
    let log = Log::open_or_create(&at("kml"), 3, 77, Options::default()).unwrap();
    let state = State::open(&at("state"), || Facts::new("v", "", 7, 3)).unwrap();
    let cache = Cache::new(tree, log, state, &at("limbo")).unwrap();
    assert!(cache.tree.open_object(Fid(12), o::RDONLY).is_ok());
}

/// A file that an application has open for writing.
struct OpenFile(bool);

impl crate::replica::cache::Written for OpenFile {
    fn is_unsaved(&self) -> bool {
        self.0
    }
    fn is_by_kernel(&self) -> bool {
        true
    }
    fn taken_over(&self) {}
}

#[test]
fn what_was_written_and_not_journaled_yet_stays() {
    let rig = rig();
    rig.list(1, 0, vec![("f", file(12, 4)), ("g", file(13, 4))]);
    for (fid, is_unsaved) in [(12, true), (13, false)] {
        rig.fill(fid, b"data");
        rig.cache.begin_writing(Fid(fid), std::sync::Arc::new(OpenFile(is_unsaved)));
        let mut new = file(fid, 9);
        new.stamp = Stamp(6);
        mark_stale(&rig.cache, &[Fid(fid)]).1.unwrap();
        set_object(&rig.cache, &new, Seq(0)).unwrap();
    }
    assert_eq!(std::fs::read(rig.path("f")).unwrap(), b"data");
    let meta = rig.meta(12);
    assert!(meta.stale && meta.stamp == Stamp(5), "the store that comes is based on what was here");
    assert!(rig.cache.valid(&meta));
    assert!(!rig.meta(13).complete && rig.meta(13).stamp == Stamp(6));
    assert_eq!(rig.cache.take_wanted(), [Fid(13)], "its data are to come at once");
    rig.cache.end_writing(Fid(12));
    assert!(!rig.cache.valid(&meta));
}

#[test]
fn an_acknowledgement_gives_no_stamp_to_what_is_not_here() {
    let rig = rig();
    rig.list(1, 0, vec![("f", file(12, 4)), ("g", file(13, 4))]);
    mark_stale(&rig.cache, &[Fid(12)]).1.unwrap();
    // Own renames, say: the server applied them after somebody's new contents of f.
    let stamps = [(Fid(12), Stamp(8)), (Fid(13), Stamp(9))];
    acked(&rig.cache, Seq(0), &stamps, &[], |_| true).1.unwrap();
    assert!(rig.meta(12).stale && rig.meta(12).stamp == Stamp(5));
    assert_eq!(rig.meta(13).stamp, Stamp(9));
}

#[test]
fn a_name_that_stands_for_another_object_is_replaced() {
    let rig = rig();
    rig.list(1, 0, vec![("x", file(12, 4))]);
    rig.fill(12, b"data");
    let notices = rig.list(1, 0, vec![("x", subdir(13)), ("y", file(12, 4))]);
    assert!(notices.contains(&entry(1, "x")));
    assert!(rig.path("x").is_dir());
    assert_eq!(std::fs::read(rig.path("y")).unwrap(), b"data", "swapped names: out of limbo");
}

#[test]
fn own_changes_that_the_server_lacks_stay() {
    let rig = rig();
    rig.list(1, 0, vec![("d", subdir(10)), ("f", file(11, 1))]);
    rig.list(10, 0, vec![("e", subdir(15))]);
    rig.list(15, 0, vec![]);
    rig.fill(11, b"1");
    rig.own_create(1, "new", 30);
    rig.own_create(15, "deep", 31);
    let last = rig.own_store(11);
    // The server knows none of it, and has others' things under the same names.
    rig.list(1, 0, vec![("new", file(99, 0))]);
    assert_eq!(rig.meta(30).fid, Fid(30));
    assert!(rig.path("d/e/deep").exists(), "a directory with own changes in it stays");
    assert_eq!(std::fs::read(rig.path("f")).unwrap(), b"1");
    assert!(rig.meta(1).stale, "to be listed again");
    let now = rig.root.metadata().unwrap();
    assert_eq!((now.mtime(), now.mtime_nsec()), (42, 7), "own times stay, too");
    // A fetch that is older than the acknowledgement says nothing about them either.
    rig.cache.pending().acked(last);
    rig.list(1, 0, vec![]);
    assert!(rig.path("new").exists() && rig.path("f").exists());
    // One that is younger does.
    let notices = rig.list(1, last.0, vec![("new", file(99, 0))]);
    assert!(notices.contains(&entry(1, "new")) && notices.contains(&entry(1, "d")));
    assert_eq!(rig.meta(99).fid, Fid(99));
    assert!(!rig.path("d").exists() && !rig.path("f").exists() && !rig.meta(1).stale);
}

#[test]
fn a_listing_leaves_own_times_of_its_directory() {
    let rig = rig();
    rig.list(1, 0, vec![("f", file(11, 1)), ("g", file(12, 1))]);
    rig.own_create(1, "new", 30);
    // A removal that failed, say of a directory that was not empty.
    let at = Place { dir: ROOT, base: Stamp(0), name: name("d") };
    let (fid, base, attr, target) = (Fid(31), Stamp(0), Attr::default(), None);
    let gone = crate::kml::record::Gone { fid, base, attr, target };
    let mut late = record(Op::Rmdir { at, gone });
    late.time_ns += 1_000_000_000;
    let ticket = rig.cache.append(&late).unwrap();
    rig.cache.settle(ticket, Outcome::Void);
    let mtime = || {
        let now = rig.root.metadata().unwrap();
        (now.mtime(), now.mtime_nsec())
    };
    rig.list(1, 0, vec![("h", file(13, 1))]);
    assert_eq!(mtime(), (42, 7), "what took no effect set no time");
    // And one that an application has set since.
    let root = rig.cache.tree.root().clone();
    fs::utimes_fd(&*root, SetTime::Keep, SetTime::At(99, 5)).unwrap();
    rig.list(1, 0, vec![("f", file(11, 1))]);
    assert_eq!(mtime(), (99, 5));
}

#[test]
fn a_directory_that_would_lie_in_itself_waits_for_the_next_listing() {
    let rig = rig();
    rig.list(1, 0, vec![("a", subdir(10))]);
    rig.list(10, 0, vec![("b", subdir(11))]);
    // At the server b went to the root and a into it.
    rig.list(11, 0, vec![("a", subdir(10))]);
    assert!(rig.path("a/b").exists() && rig.meta(11).stale);
    rig.list(1, 0, vec![("b", subdir(11))]);
    rig.list(11, 0, vec![("a", subdir(10))]);
    assert!(rig.path("b/a").is_dir() && !rig.path("a").exists() && !rig.meta(11).stale);
}

#[test]
fn hostile_entries_do_no_harm() {
    let rig = rig();
    rig.list(
        1,
        0,
        vec![
            ("", file(50, 0)),
            ("..", file(51, 0)),
            (".imz", file(52, 0)),
            ("a/b", file(53, 0)),
            ("me", subdir(1)),
        ],
    );
    assert_eq!(std::fs::read_dir(&rig.root).unwrap().count(), 0);
    rig.list(1, 0, vec![("d", subdir(10))]);
    rig.list(10, 0, vec![("loop", subdir(10))]);
    assert_eq!(std::fs::read_dir(rig.path("d")).unwrap().count(), 0);
}

#[test]
fn new_contents_make_a_stub_and_new_attributes_do_not() {
    let rig = rig();
    rig.list(1, 0, vec![("f", file(12, 4))]);
    rig.fill(12, b"data");
    let mut chmodded = file(12, 4);
    (chmodded.stamp, chmodded.attr.mode) = (Stamp(6), 0o100600);
    chmodded.stored = Some(Stamp(5));
    rig.cache.tree.edit_meta(Fid(12), |m| m.stale = true).unwrap();
    set_object(&rig.cache, &chmodded, Seq(0)).unwrap();
    let meta = rig.meta(12);
    assert!(meta.complete && !meta.stale && meta.stamp == Stamp(6));
    assert_eq!(rig.path("f").metadata().unwrap().mode() & 0o777, 0o600);
    // other data of the same size, and the time was set back
    let restored = Remote { stamp: Stamp(7), stored: None, ..chmodded };
    set_object(&rig.cache, &restored, Seq(0)).unwrap();
    assert!(!rig.meta(12).complete);
    rig.fill(12, b"data");
    // and what is nobody's has no version
    rig.cache.tree.edit_meta(Fid(12), Meta::disown).unwrap();
    set_object(&rig.cache, &restored, Seq(0)).unwrap();
    assert!(!rig.meta(12).complete);
    let mut stored = file(12, 6);
    (stored.stamp, stored.attr.mtime.sec) = (Stamp(8), T.sec + 1);
    set_object(&rig.cache, &stored, Seq(0)).unwrap();
    let meta = rig.meta(12);
    assert_eq!((meta.complete, meta.missing(0, 9)), (false, Some((0, 6))));
    let now = rig.path("f").metadata().unwrap();
    assert_eq!((now.len(), now.mtime(), now.mtime_nsec()), (6, T.sec + 1, i64::from(T.nsec)));
    assert_eq!(std::fs::read(rig.path("f")).unwrap(), b"data\0\0", "no zeros for who has it open");
    // Bytes of the older version come too late.
    write_range(&rig.cache, Fid(12), Stamp(7), 0, b"oldold", Some((0, 6))).unwrap();
    assert!(!rig.meta(12).complete);
    write_range(&rig.cache, Fid(12), Stamp(8), 0, b"newnew", Some((0, 6))).unwrap();
    assert!(rig.meta(12).complete);
    assert_eq!(std::fs::read(rig.path("f")).unwrap(), b"newnew");
    // What is changed here and not shipped is not touched, but known to be old.
    rig.own_store(12);
    let mut third = file(12, 1);
    third.stamp = Stamp(9);
    third.attr.mtime.sec += 9;
    set_object(&rig.cache, &third, Seq(0)).unwrap();
    assert_eq!(std::fs::read(rig.path("f")).unwrap(), b"newnew");
    assert!(rig.meta(12).stale && rig.cache.valid(&rig.meta(12)), "ours is what readers see");
    set_object(&rig.cache, &file(777, 1), Seq(0)).unwrap();
}

/// After a power cut a file whose record pends is believed as it stands.
#[test]
fn what_comes_into_a_file_that_was_written_is_durable() {
    let rig = rig();
    rig.list(1, 0, vec![("f", file(12, 700)), ("g", file(13, 700))]);
    rig.own_store(12);
    for (fid, settled) in [(12, true), (13, false)] {
        rig.fill(fid, &[7; 700]);
        assert!(rig.meta(fid).complete);
        assert_eq!(rig.cache.is_settled(Fid(fid)), settled, "{fid}");
    }
}

#[test]
fn ranges_arrive_and_leave_no_trace_but_the_data() {
    let rig = rig();
    let mut f = file(12, 3 * MIB + 5);
    f.attr.mode = 0o104755;
    rig.list(1, 0, vec![("f", f)]);
    let root = rig.cache.tree.root().clone();
    // Version 2, permitted, effective: cap_net_raw.
    let cap = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let has_cap =
        cred::is_root() && fs::xattr::set(&*root, b"f", b"security.capability", &cap, 0).is_ok();
    let piece = vec![7u8; MIB as usize];
    let write = |at: u64, bytes: &[u8]| {
        let granule = Some((at, bytes.len() as u64));
        write_range(&rig.cache, Fid(12), Stamp(5), at, bytes, granule).unwrap();
    };
    write(3 * MIB, &[9; 5]);
    write(MIB, &piece);
    write(MIB, &vec![8; MIB as usize]);
    let meta = rig.meta(12);
    assert_eq!(meta.missing(0, u64::MAX), Some((0, MIB)));
    assert_eq!(meta.missing(MIB, MIB), None);
    write(2 * MIB, &vec![0; MIB as usize]);
    write(0, &vec![0; MIB as usize]);
    assert!(rig.meta(12).complete);
    let now = rig.path("f").metadata().unwrap();
    assert!(now.blocks() * 512 < 2 * MIB, "holes stay holes: {}", now.blocks());
    assert_eq!((now.mtime(), now.mtime_nsec(), now.mode()), (T.sec, i64::from(T.nsec), 0o104755));
    let all = std::fs::read(rig.path("f")).unwrap();
    assert!(all[MIB as usize..2 * MIB as usize] == piece[..], "what is here is not overwritten");
    assert_eq!(all[3 * MIB as usize..], [9; 5]);
    if has_cap {
        assert!(fs::xattr::get(&*root, b"f", b"security.capability").unwrap().is_some());
    }
    let (clean, dirty) = rig.cache.clean_and_dirty();
    assert!(clean > MIB - 8192 && clean < 2 * MIB && dirty == 0, "{clean}");
}

#[test]
fn a_file_cut_here_takes_no_bytes_beyond_its_end() {
    let rig = rig();
    rig.list(1, 0, vec![("f", file(12, 2 * MIB))]);
    let file = std::fs::File::options().write(true).open(rig.path("f")).unwrap();
    file.set_len(100).unwrap();
    rig.cache.tree.edit_meta(Fid(12), |m| assert!(!m.truncated(100))).unwrap();
    let piece = vec![7u8; MIB as usize];
    write_range(&rig.cache, Fid(12), Stamp(5), 0, &piece, Some((0, MIB))).unwrap();
    assert_eq!(std::fs::read(rig.path("f")).unwrap(), [7; 100]);
    assert!(rig.meta(12).complete);
}

#[test]
fn broken_promises_are_noted_and_told() {
    let rig = rig();
    rig.list(1, 0, vec![("d", subdir(10)), ("f", file(12, 0))]);
    rig.list(10, 0, vec![]);
    let (notices, done) = mark_stale(&rig.cache, &[Fid(12), Fid(10), Fid(777)]);
    done.unwrap();
    assert_eq!(
        notices,
        [Notice::Object { fid: Fid(12), dir: false }, Notice::Object { fid: Fid(10), dir: true },]
    );
    assert!(!rig.cache.valid(&rig.meta(12)) && !rig.cache.valid(&rig.meta(10)));
    rig.cache.set_online(false);
    assert!(rig.cache.valid(&rig.meta(12)), "away from the server it is the best there is");
    rig.cache.set_online(true);
    // The same stamp in the parent's listing says nothing about a directory that was broken.
    rig.list(1, 0, vec![("d", subdir(10)), ("f", file(12, 0))]);
    assert!(rig.cache.valid(&rig.meta(12)) && !rig.cache.valid(&rig.meta(10)));
    rig.list(10, 0, vec![]);
    assert!(rig.cache.valid(&rig.meta(10)));
    rig.cache.bump_epoch().unwrap();
    assert!(!rig.cache.valid(&rig.meta(10)) && !rig.cache.valid(&rig.meta(12)));
    // By equal stamps one listing makes its children current again.
    let mut d = subdir(10);
    d.stamp = Stamp(9);
    rig.list(1, 0, vec![("d", d), ("f", file(12, 0))]);
    assert!(rig.cache.valid(&rig.meta(10)) && rig.cache.valid(&rig.meta(12)));
}

#[test]
fn acknowledgements_bring_stamps_and_conflicts() {
    let rig = rig();
    rig.list(1, 0, vec![("d", subdir(10)), ("f", file(12, 0))]);
    rig.list(10, 0, vec![]);
    rig.cache.bump_epoch().unwrap();
    let seq = rig.own_create(10, "new", 30);
    let (notices, done) =
        acked(&rig.cache, Seq(0), &[(Fid(30), Stamp(21)), (Fid(10), Stamp(21))], &[], |_| true);
    done.unwrap();
    assert_eq!(notices, []);
    rig.cache.pending().acked(seq);
    assert_eq!(rig.meta(30).stamp, Stamp(21));
    assert!(rig.cache.valid(&rig.meta(30)));
    assert!(rig.meta(10).stale, "it was old before, and its new stamp must not hide that");
    let (notices, done) = acked(&rig.cache, Seq(0), &[], &[Fid(30)], |_| true);
    done.unwrap();
    assert!(notices.contains(&Notice::Object { fid: Fid(30), dir: false }));
    assert!(notices.contains(&Notice::Object { fid: Fid(10), dir: true }));
    assert!(rig.meta(30).stale);
}

/// What was let go for others is still only here until the server has fetched it.
#[test]
fn what_is_on_its_way_stays_in_limbo() {
    let rig = rig();
    rig.list(1, 0, vec![]);
    let seq = rig.own_create(1, "a", 30);
    let kept = |kind| is_kept(&rig.cache, Fid(30), kind, Seq(0));
    assert!(kept(Kind::File), "it was never shipped");
    for fids in [&[Fid(30)][..], &[]] {
        rig.cache.pending().let_go(fids, seq, false);
        assert!(kept(Kind::File) && kept(Kind::Dir), "it is shipped at this moment");
        rig.cache.pending().take_back();
    }
    rig.cache.pending().let_go(&[Fid(30)], seq, false);
    rig.cache.pending().acked(seq);
    rig.cache.pending().prune(seq);
    assert!(!is_kept(&rig.cache, Fid(30), Kind::File, seq), "the server has it");
}

#[test]
fn what_the_journal_holds_pends_again_after_a_restart() {
    let rig = rig();
    let first = rig.own_create(1, "a", 30);
    rig.own_store(30);
    rig.cache.log.set_cursor("acked", first.0).unwrap();
    let Rig { _dir, cache, .. } = rig;
    drop(cache);
    let at = |n: &str| _dir.path().join(n);
    let tree = Tree::open(&at("tree"), &at("index"), false).unwrap();
    let log = Log::open_or_create(&at("kml"), 3, 77, Options::default()).unwrap();
    let state = State::open(&at("state"), || Facts::new("v", "", 7, 3)).unwrap();
    let cache = Cache::new(tree, log, state, &at("limbo")).unwrap();
    assert_eq!(cache.pending().count(), 1);
    assert_eq!(cache.pending().len(), 1);
    assert!(cache.pending().is_dirty(Fid(30)));
    assert_eq!(cache.pending().name(Fid(1), &name("a")), Seq(0));
}

#[test]
fn limbo_keeps_modes_that_deny_everybody() {
    let rig = rig();
    let mut d = subdir(10);
    d.attr.mode = 0o040000;
    rig.list(1, 0, vec![("d", d)]);
    let mode = rig.path("d").metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, if cred::is_root() { 0 } else { 0o700 });
    rig.list(1, 0, vec![]);
    assert!(rig.limbo_has(10));
    rig.cache
        .limbo
        .clear(std::time::Duration::ZERO, std::time::Instant::now(), |_, _| false)
        .unwrap();
    assert!(!rig.limbo_has(10));
}
