//! The filter over a real cache, with a grant of so many bytes, and nobody who grants more.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::*;
use crate::kml::log::Log;
use crate::kml::record::{Fid, Name, ROOT, Seq, Time};
use crate::kml::writers::Writers;
use crate::lento::grant::{Grant, Kept};
use crate::lento::locks::LockAsk;
use crate::lento::message::{RoomTerms, Space};
use crate::lento::rights::{Held, Mode};
use crate::presto::filter::{Lento, LockDone};
use crate::presto::open::Grip;
use crate::replica::cache::Cache;
use crate::replica::meta::Meta;
use crate::replica::state::{Facts, State};
use crate::replica::tree::Tree;
use crate::sys::cred::{self, Caller};

const FILE: Fid = Fid(70);
const MIB: u64 = 1 << 20;

struct Nobody;

impl Lento for Nobody {
    fn when_back(&self, done: Box<dyn FnOnce(bool) + Send>) {
        done(false)
    }
    fn want(&self, _: Want, done: Box<dyn FnOnce(std::result::Result<(), Errno>) + Send>) {
        done(Err(Errno::NOSPC))
    }
    fn when_acked(&self, _: Seq, done: Box<dyn FnOnce(std::result::Result<(), Errno>) + Send>) {
        done(Ok(()))
    }
    fn space(&self) -> Space {
        Space::default()
    }
    fn lock(&self, _: LockAsk, _: LockDone) -> u64 {
        0
    }
    fn cancel(&self, _: u64) {}
}

struct Rig {
    dir: tempfile::TempDir,
    filter: Arc<Filter>,
}

fn terms(bytes: u64, ample: bool) -> RoomTerms {
    let granted = Room::new(bytes, 1000);
    RoomTerms { epoch: 1, granted, returned: Room::NONE, ample, short: false, keep_ms: 1000 }
}

/// Online, with one empty file, and the right to everything.
fn rig(bytes: u64) -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: &str| dir.path().join(n);
    std::fs::create_dir(at("tree")).unwrap();
    let tree = Tree::open(&at("tree"), &at("index"), true).unwrap();
    let log = Log::open_or_create(&at("kml"), 0, 77, crate::kml::log::Options::default()).unwrap();
    let state = State::open(&at("state"), || Facts::new("v", "", 0, 0)).unwrap();
    let cache = Arc::new(Cache::new(tree, log, state, &at("limbo")).unwrap());
    let meta = Meta { epoch: cache.epoch(), ..Meta::whole(FILE) };
    let (root, name) = (cache.tree.root().clone(), Name::new(b"f").unwrap());
    cache.tree.create(&root, &name, by(), 0o644, &meta, Time::default()).unwrap();
    cache.tree.edit_dir(&root, |meta| (meta.complete, meta.epoch) = (true, cache.epoch())).unwrap();
    cache.set_online(true);
    let rights = Arc::new(Held::default());
    rights.edit(|rights| rights.set_volume(Mode::Write));
    let room = Grant::new(Kept::default(), false);
    room.welcome(Some(&terms(bytes, false)));
    room.heard();
    let filter = Arc::new(Filter {
        cache,
        lento: Arc::new(Nobody),
        rights,
        files: Default::default(),
        writers: Writers::open(&at("kml")).unwrap(),
        mapped: Default::default(),
        room,
        by_kernel: Default::default(),
        passthrough: false.into(),
        strict: false,
        forgets_names: false.into(),
    });
    Rig { dir, filter }
}

fn by() -> Caller {
    Caller { uid: cred::own().0, gid: cred::own().1, umask: 0 }
}

impl Rig {
    fn open(&self, flags: i32) -> Result<Grip> {
        self.filter.open(by(), FILE, flags)
    }
    /// As somebody had it before.
    fn sized(&self, len: u64) {
        std::fs::OpenOptions::new().write(true).open(self.path()).unwrap().set_len(len).unwrap();
    }
    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("tree/f")
    }
    fn in_use(&self) -> u64 {
        self.filter.room.figures().in_use.bytes()
    }
}

#[test]
fn what_no_disk_has_is_not_asked_for() {
    let rig = rig(MIB);
    let grip = rig.open(o::RDWR).unwrap();
    let stop = rig.filter.fallocate(&grip.open, 0, 0, 1 << 62);
    assert!(matches!(stop, Err(Stop::Errno(Errno::FBIG))), "{stop:?}");
    let stop = rig.filter.fallocate(&grip.open, 0, 0, 1 << 61);
    assert!(matches!(stop, Err(Stop::Miss(Want::Room(_)))), "{stop:?}");
}

#[test]
fn room_for_a_mapping_lasts_over_a_store_and_its_pages_always_get_theirs() {
    let rig = rig(8 * MIB);
    rig.sized(MIB);
    let grip = rig.open(o::RDWR).unwrap();
    assert!(grip.maps && !grip.direct && rig.in_use() >= MIB);
    let write = |page| rig.filter.write(by(), &grip.open, 0, b"x", (false, page));
    write(true).unwrap();
    rig.filter.store(&grip.open).unwrap();
    let beside = rig.filter.room.figures().free;
    assert!(rig.in_use() >= MIB && beside.bytes() < 7 * MIB, "what is mapped has its room again");
    // others take all that is left, and this one's with it
    let others = rig.filter.room.charge(beside).unwrap();
    rig.filter.store(&grip.open).unwrap();
    grip.open.state().charge = None;
    let rest = rig.filter.room.charge(rig.filter.room.figures().free).unwrap();
    assert!(matches!(write(false), Err(Stop::Miss(Want::Room(_)))), "it can be told");
    write(true).unwrap();
    drop((others, rest));
    rig.filter.close(&grip).1.unwrap();
}

#[test]
fn what_readers_have_open_is_not_mapped_without_room() {
    let rig = rig(8 * MIB);
    rig.sized(64 * MIB);
    rig.filter.passthrough.store(true, Ordering::Relaxed);
    let reader = rig.open(o::RDONLY).unwrap();
    assert!(reader.open.passthrough, "where room is scarce, too");
    let stop = rig.open(o::RDWR).map(|_| ());
    assert!(matches!(stop, Err(Stop::Miss(Want::Room(lacks))) if lacks.bytes() > 64 * MIB));
    assert!(!rig.filter.cache.is_unsaved(FILE) && rig.filter.files.written().is_empty());
    // who only writes cannot map
    let writer = rig.open(o::WRONLY).unwrap();
    assert!(writer.direct && !writer.maps);
    rig.filter.room.hear(&terms(100 * MIB, false));
    let mapper = rig.open(o::RDWR).unwrap();
    assert!(mapper.maps && rig.in_use() > 64 * MIB);
    for grip in [reader, writer, mapper] {
        rig.filter.close(&grip).1.unwrap();
    }
    assert_eq!(rig.in_use(), 0);
}

#[test]
fn when_the_last_writer_has_closed_its_room_is_free_whoever_reads() {
    let rig = rig(8 * MIB);
    let reader = rig.open(o::RDONLY).unwrap();
    let (one, other) = (rig.open(o::WRONLY).unwrap(), rig.open(o::WRONLY).unwrap());
    rig.filter.write(by(), &one.open, 0, &[1; 1 << 20], (false, false)).unwrap();
    rig.filter.close(&one).1.unwrap();
    let stored = rig.in_use();
    assert!(stored >= MIB, "its record's");
    assert!(rig.filter.cover_whole(&other.open) && rig.in_use() >= 2 * MIB);
    rig.filter.close(&other).1.unwrap();
    assert_eq!(rig.in_use(), stored);
    rig.filter.close(&reader).1.unwrap();
}

#[test]
fn a_hole_that_is_made_takes_no_room_nor_do_writes_and_stores_beside_it() {
    const PUNCH: u32 = 0x03; // and keep the size
    let rig = rig(64 * MIB);
    rig.sized(1 << 40);
    let grip = rig.open(o::WRONLY).unwrap();
    let write = |at| rig.filter.write(by(), &grip.open, at, &[1; 1 << 20], (false, false));
    write(0).unwrap();
    let written = rig.in_use();
    rig.filter.fallocate(&grip.open, PUNCH, 2 * MIB, 1 << 41).unwrap();
    assert_eq!(rig.in_use(), written);
    assert_eq!(grip.open.state().dirty.as_ref().unwrap()[1].len, (1 << 40) - 2 * MIB);
    write(4 * MIB).unwrap();
    assert!(rig.in_use() < 3 * MIB, "{}", rig.in_use());
    rig.filter.store(&grip.open).unwrap();
    assert!((2 * MIB..3 * MIB).contains(&rig.in_use()), "{}", rig.in_use());
    rig.filter.close(&grip).1.unwrap();
}

#[test]
fn what_has_lost_its_name_holds_no_room_and_no_reserve() {
    let rig = rig(2048 * MIB);
    rig.filter.room.hear(&terms(2048 * MIB, true));
    rig.filter.passthrough.store(true, Ordering::Relaxed);
    let grip = rig.open(o::RDWR).unwrap();
    std::fs::write(rig.path(), [1; 1 << 20]).unwrap();
    let (_, other) = rig.filter.tmpfile(by(), ROOT, 0o600, o::RDWR).unwrap();
    assert!(grip.by_kernel && other.by_kernel);
    rig.filter.look_at_kernel();
    assert!(rig.in_use() > 256 * MIB + MIB);
    rig.filter.unlink(by(), ROOT, b"f").unwrap();
    rig.filter.look_at_kernel();
    assert!(!grip.open.is_counted() && other.open.is_counted(), "that one may get a name");
    assert!(rig.in_use() < 256 * MIB + MIB, "the reserve alone");
    rig.filter.close(&grip).1.unwrap();
    rig.filter.close(&other).1.unwrap();
}
