//! Journals that want out of their tree, and trees that are no copies. Beside the tree stands a
//! sentinel that nobody may touch: its changes of any kind would show in its ctimes.

use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use super::*;
use crate::kml::record::{Attr, Change, Gone, Origin};
use crate::replica::meta::Meta;
use crate::replica::state::{Facts, State};

struct World {
    dir: tempfile::TempDir,
    seq: u64,
}

impl World {
    fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("tree")).unwrap();
        std::fs::create_dir_all(dir.path().join("sentinel/below")).unwrap();
        std::fs::write(dir.path().join("sentinel/file"), "precious").unwrap();
        World { dir, seq: 0 }
    }
    fn tree(&self) -> std::path::PathBuf {
        self.dir.path().join("tree")
    }
    fn sentinel(&self) -> std::path::PathBuf {
        self.dir.path().join("sentinel")
    }
    fn replay(&self) -> Replay {
        let target = Target::open(&self.tree(), true).unwrap();
        let mut survey = Survey::default();
        (survey.is_history, survey.last) = (true, Seq(u64::MAX));
        Replay::new(target, Part::default(), survey, false)
    }
    fn entry(&mut self, path: &str, op: Op) -> Entry {
        self.seq += 1;
        let origin = Origin { node: 1, seq: Seq(self.seq) };
        let (time_ns, path) = (77_000_000_000, path.as_bytes().to_vec());
        let record = Record { time_ns, origin, uid: 0, gid: 0, path, op };
        Entry { seq: Seq(self.seq), record, outcome: Outcome::Done }
    }
    /// All of the sentinel that could change.
    fn watch(&self) -> Vec<(std::path::PathBuf, i64, i64, u64, Vec<u8>)> {
        let mut seen = Vec::new();
        let mut dirs = vec![self.sentinel()];
        while let Some(dir) = dirs.pop() {
            let mut paths = vec![dir.clone()];
            for entry in std::fs::read_dir(&dir).unwrap() {
                paths.push(entry.unwrap().path());
            }
            for path in paths {
                let stat = std::fs::symlink_metadata(&path).unwrap();
                let bytes = std::fs::read(&path).unwrap_or_default();
                if stat.is_dir() && path != dir {
                    dirs.push(path.clone());
                }
                seen.push((path, stat.ctime(), stat.ctime_nsec(), stat.nlink(), bytes));
            }
        }
        seen.sort();
        seen
    }
}

fn place(dir: u64, name: &str) -> Place {
    Place { dir: Fid(dir), base: Stamp(0), name: Name::new(name.as_bytes()).unwrap() }
}
fn create(dir: u64, name: &str, fid: u64) -> Op {
    Op::Create { at: place(dir, name), fid: Fid(fid), mode: 0o644, umask: 0 }
}
fn mkdir(dir: u64, name: &str, fid: u64) -> Op {
    Op::Mkdir { at: place(dir, name), fid: Fid(fid), mode: 0o755, umask: 0 }
}
fn chmod(fid: u64) -> Op {
    let new = Change { mode: Some(0o600), ..Change::default() };
    Op::Setattr { fid: Fid(fid), base: Stamp(0), new, old: Change::default() }
}
fn truncate(fid: u64) -> Op {
    let new = Change { size: Some(0), ..Change::default() };
    Op::Setattr { fid: Fid(fid), base: Stamp(0), new, old: Change::default() }
}
fn store(fid: u64) -> Op {
    let (base, mtime, ranges) = (Stamp(0), Time { sec: 1, nsec: 1 }, vec![]);
    Op::Store { fid: Fid(fid), base, size: 0, mtime, ranges, old_size: 0 }
}
fn setxattr(fid: u64, name: &str) -> Op {
    let (name, value) = (name.as_bytes().to_vec(), b"x".to_vec());
    Op::Setxattr { fid: Fid(fid), base: Stamp(0), name, value, old: None }
}
fn gone(fid: u64) -> Gone {
    Gone { fid: Fid(fid), base: Stamp(0), attr: Attr::default(), target: None }
}
fn unlink(dir: u64, name: &str, fid: u64) -> Op {
    Op::Unlink { at: place(dir, name), gone: gone(fid) }
}
fn rename(from: Place, to: Place, fid: u64) -> Op {
    let over = Over::Nothing { noreplace: false };
    Op::Rename { from, to, fid: Fid(fid), base: Stamp(0), over }
}
fn link(dir: u64, name: &str, fid: u64) -> Op {
    Op::Link { at: place(dir, name), fid: Fid(fid), base: Stamp(0) }
}

#[test]
fn a_symbolic_link_at_the_place_of_a_directory_leads_nowhere() {
    let mut world = World::new();
    symlink(world.sentinel(), world.tree().join("d")).unwrap();
    symlink(world.sentinel().join("file"), world.tree().join("f")).unwrap();
    let before = world.watch();
    let mut replay = world.replay();
    for (path, op) in [
        ("d/x", create(50, "x", 51)),
        ("d/file", unlink(50, "file", 52)),
        ("d/below/x", mkdir(53, "x", 54)),
        ("d/file", chmod(55)),
        ("d/file", store(56)),
        ("../sentinel/file", chmod(57)),
        ("/sentinel/file", chmod(58)),
        ("d/../../sentinel/file", setxattr(59, "user.x")),
        ("f", truncate(60)),
        ("f", store(61)),
    ] {
        let entry = world.entry(path, op);
        let fate = replay.step(&entry).unwrap();
        assert!(matches!(fate, Fate::Misfit(_)), "{path}: {fate:?}");
    }
    // the links themselves are objects of the tree
    for op in [chmod(62), setxattr(62, "user.x"), rename(place(1, "f"), place(1, "g"), 62)] {
        let entry = world.entry("f", op);
        replay.step(&entry).unwrap();
    }
    replay.finish().unwrap();
    assert_eq!(world.watch(), before);
}

#[test]
fn what_is_replaced_between_records_is_not_taken_for_what_it_was() {
    let mut world = World::new();
    let mut replay = world.replay();
    let made = [mkdir(1, "d", 50), mkdir(50, "e", 51), create(51, "f", 52)];
    for (path, op) in ["d", "d/e", "d/e/f"].into_iter().zip(made) {
        let entry = world.entry(path, op);
        assert_eq!(replay.step(&entry).unwrap(), Fate::Done);
    }
    let (d, away) = (world.tree().join("d"), world.sentinel().join("away"));
    std::fs::rename(&d, &away).unwrap();
    symlink(&away, &d).unwrap();
    let before = world.watch();
    let attempts = || {
        [
            create(51, "x", 53),
            chmod(52),
            truncate(52),
            store(52),
            setxattr(52, "user.x"),
            unlink(51, "f", 52),
            rename(place(51, "f"), place(1, "f"), 52),
            link(1, "l", 52),
            mkdir(50, "m", 54),
            Op::Rmdir { at: place(50, "e"), gone: gone(51) },
        ]
    };
    for op in attempts() {
        let entry = world.entry("d/e/f", op);
        let fate = replay.step(&entry).unwrap();
        assert!(matches!(fate, Fate::Misfit(_)), "{entry:?}: {fate:?}");
    }
    // a directory of the same name, and not the same
    std::fs::remove_file(&d).unwrap();
    std::fs::create_dir_all(d.join("e")).unwrap();
    for op in attempts() {
        let entry = world.entry("d/e/f", op);
        let fate = replay.step(&entry).unwrap();
        assert!(matches!(fate, Fate::Misfit(_)), "{entry:?}: {fate:?}");
    }
    assert_eq!(world.watch(), before);
    assert_eq!(std::fs::read_dir(d.join("e")).unwrap().count(), 0);
}

#[test]
fn a_file_with_names_elsewhere_is_left_alone() {
    let mut world = World::new();
    let own = |name: &str| world.tree().join(name);
    std::fs::hard_link(world.sentinel().join("file"), own("shared")).unwrap();
    std::fs::write(own("ours"), "ours").unwrap();
    std::fs::hard_link(own("ours"), own("ours too")).unwrap();
    let before = world.watch();
    let mut replay = world.replay();
    for op in [chmod(50), truncate(50), store(50), setxattr(50, "user.x")] {
        let entry = world.entry("shared", op);
        let fate = replay.step(&entry).unwrap();
        assert!(matches!(fate, Fate::Misfit(_)), "{fate:?}");
    }
    let others = [unlink(1, "shared", 50), rename(place(1, "shared"), place(1, "x"), 50)];
    for op in others {
        let entry = world.entry("shared", op);
        assert!(matches!(replay.step(&entry).unwrap(), Fate::Misfit(_)));
    }
    let entry = world.entry("ours", chmod(51));
    assert_eq!(replay.step(&entry).unwrap(), Fate::Done, "both names are in the tree");
    replay.finish().unwrap();
    assert_eq!(world.watch(), before);
}

#[test]
fn what_is_imzs_own_is_not_named() {
    let mut world = World::new();
    let own = world.tree().join(".imz");
    std::fs::create_dir(&own).unwrap();
    std::fs::write(own.join("state"), "mine").unwrap();
    let key = if crate::sys::cred::is_root() { "trusted.imz" } else { "user.imz" };
    let inside = fs::open_root(&own).unwrap();
    let value = Meta::whole(Fid(77)).encode();
    fs::xattr::set(&inside, b"state", key.as_bytes(), &value, 0).unwrap();
    std::fs::write(world.tree().join("f"), "").unwrap();
    let mut replay = world.replay();
    for (path, op) in [
        (".imz", Op::Rmdir { at: place(1, ".imz"), gone: gone(50) }),
        (".imz-conflicts", mkdir(1, ".imz-conflicts", 51)),
        ("f", rename(place(1, "f"), place(1, ".imz"), 52)),
        (".imz", rename(place(1, ".imz"), place(1, "g"), 53)),
        (".imz/state", unlink(54, "state", 77)),
        (".imz/state", chmod(77)),
        (".imz/state", link(1, "l", 77)),
        ("f", setxattr(52, key)),
    ] {
        let entry = world.entry(path, op);
        let fate = replay.step(&entry).unwrap();
        assert!(matches!(fate, Fate::Misfit(_)), "{path}: {fate:?}");
    }
    assert_eq!(std::fs::read(own.join("state")).unwrap(), b"mine");
    let names: Vec<_> = std::fs::read_dir(world.tree()).unwrap().collect();
    assert_eq!(names.len(), 2);
}

#[test]
fn a_gap_in_the_history_is_counted() {
    let mut world = World::new();
    let mut replay = world.replay();
    let entry = world.entry("f", create(1, "f", 50));
    replay.step(&entry).unwrap();
    world.seq = 90;
    let Op::Setattr { new, old, .. } = chmod(50) else { unreachable!() };
    let base = Stamp(40); // record 40 is in no journal that was seen here
    let entry = world.entry("f", Op::Setattr { fid: Fid(50), base, new, old });
    assert_eq!(replay.step(&entry).unwrap(), Fate::Done);
    assert_eq!((replay.sums.gaps, replay.sums.is_whole()), (1, false));
}

#[test]
fn what_is_in_use_or_no_copy_is_refused() {
    let world = World::new();
    let open = |path: &Path| Target::open(path, true).map(drop);
    let own = world.tree().join(".imz");
    let below = world.tree().join("below");
    std::fs::create_dir_all(&below).unwrap();
    open(&world.tree()).unwrap();
    {
        let _one = Target::open(&world.tree(), true).unwrap();
        assert!(matches!(open(&world.tree()), Err(ReplayError::InUse { .. })), "a second replay");
    }
    {
        let _server = State::open(&own, || Facts::new("v", "", 7, 0)).unwrap();
        assert!(matches!(open(&world.tree()), Err(ReplayError::InUse { .. })));
        assert!(matches!(open(&below), Err(ReplayError::InUse { .. })));
    }
    open(&world.tree()).unwrap();
    {
        // one whose state is elsewhere has its spool here
        let _spool = crate::replica::spool::Spool::open(&own.join("spool")).unwrap();
        assert!(matches!(open(&world.tree()), Err(ReplayError::InUse { .. })));
    }
    let facts = super::target::facts_in(&own).unwrap();
    assert!(!facts.clean, "the next server looks for itself where everything is");
    let cache = world.sentinel();
    drop(State::open(&cache.join(".imz"), || Facts::new("v", "h:7070:/v", 7, 1)).unwrap());
    std::fs::create_dir(cache.join("tree")).unwrap();
    assert!(matches!(open(&cache), Err(ReplayError::Cache { .. })));
    assert!(matches!(open(&cache.join("tree")), Err(ReplayError::Cache { .. })));
    assert!(matches!(open(&cache.join("none")), Err(ReplayError::NoTarget { .. })));
}
