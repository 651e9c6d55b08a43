//! `imz replay` for real: an old copy of a served directory and the server's journal make the newer
//! tree, and the other way round; and what replay refuses.
//!
//! `IMZ_REPLAY_OPS=N` does so many operations of all kinds in each of the tests (default 1500).

#![allow(clippy::unwrap_used)] // in tests it is the message

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use common::compare::{assert_same, compare};
use common::ops::Op;
use common::tree::{self, Rng};
use common::{AMPLE, Disk, Mount, Server, imz_fails, imz_run, run};
use serde_json::Value;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn ops() -> usize {
    std::env::var("IMZ_REPLAY_OPS").map_or(1500, |it| it.parse().unwrap())
}

fn work(root: &Path, seed: u64, count: usize) {
    let mut rng = Rng(seed);
    for _ in 0..count {
        let _ = Op::random(&mut rng).apply(root); // what fails changes nothing
    }
}

/// A tree of everything, made anew in a directory of this name.
fn make(root: &Path, name: &str) {
    fs::create_dir(root.join(name)).unwrap();
    tree::make(&root.join(name), 3, 60, 8 << 20);
}

/// As root, with all attributes: names, owners, times, links, imz's own.
fn copy(from: &Path, to: &Path) {
    run(&["cp", "-a", "--", text(from), text(to)]);
}

/// Without what is imz's: as a tool makes it that knows nothing of imz.
fn without_imz(dir: &Path) {
    for own in [".imz", ".imz-conflicts"] {
        let _ = fs::remove_dir_all(dir.join(own)); // there may be none
    }
    for path in everything(dir) {
        let _ = rustix::fs::lremovexattr(&path, "trusted.imz"); // not all have one
    }
}

fn everything(dir: &Path) -> Vec<PathBuf> {
    let lines = run(&["find", text(dir), "-print0"]);
    lines.split('\0').filter(|it| !it.is_empty()).map(PathBuf::from).collect()
}

struct World {
    server: Server,
    mount: Mount,
    disk: Disk,
}

impl World {
    fn new() -> Option<World> {
        let disk = Disk::new(AMPLE)?;
        let served = disk.dir("served");
        // some of it was there before anybody served it
        tree::make(&disk.dir("served/before"), 7, 60, 8 << 20);
        copy(&served, &disk.path().join("virgin"));
        let server = Server::serve(&served, &served.join(".imz"));
        let mount = Mount::start(&server, &disk, "cache");
        Some(World { server, mount, disk })
    }
    fn at(&self, name: &str) -> PathBuf {
        self.disk.path().join(name)
    }
    /// A copy of what is served now.
    fn copy(&self, name: &str) -> PathBuf {
        self.mount.sync();
        let to = self.at(name);
        copy(self.server.dir(), &to);
        to
    }
    fn last_seq(&self) -> u64 {
        self.mount.sync();
        let lines = run(&[&common::imz(), "kml", "dump", "--reverse", text(self.server.dir())]);
        lines.split(' ').next().unwrap().parse().unwrap()
    }
    fn stop(&mut self) {
        self.mount.sync();
        self.mount.umount();
        self.server.stop();
    }
}

/// Runs it with `--json`: exit code, what was left out, and the sums.
#[track_caller]
fn replay(journal: &Path, onto: &Path, more: &[&str]) -> (i32, Vec<Value>, Value) {
    let words = ["replay", "--json", text(journal), "--onto", text(onto)];
    let (code, said) = imz_run(&[&words[..], more].concat());
    let parsed = said.lines().map(serde_json::from_str);
    let mut values: Vec<Value> = parsed.filter_map(Result::ok).collect();
    let sums = values.pop().map(|it| it["sums"].clone()).unwrap_or_else(|| panic!("{said}"));
    assert!(sums.is_object(), "{said}");
    (code, values, sums)
}

#[track_caller]
fn replay_well(journal: &Path, onto: &Path, more: &[&str]) -> Value {
    let (code, left_out, sums) = replay(journal, onto, more);
    let some = left_out.iter().filter(|it| !it["why"].is_null()).take(5).collect::<Vec<_>>();
    assert_eq!(code, 0, "{sums}: {some:#?}");
    sums
}

/// What changes with any change of an object. (Names that are not UTF-8 are left out.)
fn ctimes(dir: &Path) -> Vec<(PathBuf, i64, i64)> {
    let stat = |path: PathBuf| {
        let stat = fs::symlink_metadata(&path).ok()?;
        Some((path, stat.ctime(), stat.ctime_nsec()))
    };
    everything(dir).into_iter().filter_map(stat).collect()
}

#[test]
fn an_old_copy_and_the_journal_make_the_newer_tree() {
    let Some(mut world) = World::new() else { return };
    let first = world.copy("first");
    make(world.mount.path(), "made");
    work(world.mount.path(), 1, ops());
    let middle = world.copy("middle");
    work(world.mount.path(), 2, ops());
    let cut = world.last_seq();
    let then = world.copy("then");
    work(world.mount.path(), 3, ops());
    world.stop();
    let served = world.server.dir().to_owned();
    let data = ["--data", text(&served)];

    // from the beginning, and from the middle: what is there already is passed over
    let sums = replay_well(&served, &first, &data);
    assert_eq!(sums["standing"], 0, "{sums}");
    assert_same(&served, &first);
    let dry = replay_well(&served, &middle, &["--dry-run", "--data", text(&served)]);
    let sums = replay_well(&served, &middle, &data);
    assert!(sums["standing"].as_u64() > Some(0) && sums["done"].as_u64() > Some(0), "{sums}");
    assert_eq!(dry["done"], sums["done"], "a dry run says what will be done");
    assert_same(&served, &middle);

    // again, and nothing changes
    let before = ctimes(&first);
    let sums = replay_well(&served, &first, &data);
    assert_eq!((&sums["done"], &sums["files_filled"]), (&0.into(), &0.into()), "{sums}");
    let after = ctimes(&first);
    let changed: Vec<_> = before.iter().filter(|it| !after.contains(it)).collect();
    assert!(changed.is_empty(), "{changed:?}");

    // up to a record in between; contents are those of then, where there is a copy of then
    let at_cut = world.at("at-cut");
    copy(&then, &at_cut);
    let sums = replay_well(&served, &at_cut, &["--until", &cut.to_string()]);
    assert_eq!(sums["done"], 0, "{sums}");
    let early = world.at("early");
    copy(&world.at("virgin"), &early);
    let (_, left_out, sums) =
        replay(&served, &early, &["--until", &cut.to_string(), "--data", text(&then)]);
    assert_eq!(sums["files_missing"], 0, "{left_out:#?}");
    assert_same(&then, &early);
    // with newer data, what has changed since is said, and only that differs
    let early = world.at("early-newer");
    copy(&world.at("virgin"), &early);
    let (code, left_out, _) =
        replay(&served, &early, &["--until", &cut.to_string(), "--data", text(&served)]);
    assert_eq!(code, 1);
    let named: Vec<&str> = left_out.iter().map(|it| it["path"].as_str().unwrap()).collect();
    for line in compare(&then, &early) {
        assert!(named.iter().any(|name| line.contains(&format!("{:?}", name))), "{line}");
    }
}

#[test]
fn a_copy_without_our_attributes_is_brought_up_to_date_too() {
    let Some(mut world) = World::new() else { return };
    make(world.mount.path(), "made");
    work(world.mount.path(), 4, ops());
    let from = (world.last_seq() + 1).to_string();
    let (bare, plain) = (world.copy("bare"), world.at("plain"));
    without_imz(&bare);
    // as a person would: no owner, no time
    run(&["cp", "-r", "--", text(&bare), text(&plain)]);
    work(world.mount.path(), 5, ops());
    world.stop();
    let served = world.server.dir().to_owned();
    let more = ["--from", &from, "--data", text(&served)];
    let sums = replay_well(&served, &bare, &more);
    assert_eq!(sums["standing"], 0, "{sums}");
    assert_same(&served, &bare);
    let sums = replay_well(&served, &bare, &more);
    assert_eq!((&sums["done"], &sums["files_filled"]), (&0.into(), &0.into()), "{sums}");
    // contents by path, from a tree that knows nothing of imz
    let data = world.at("data");
    copy(&served, &data);
    without_imz(&data);
    replay_well(&served, &plain, &["--from", &from, "--data", text(&data)]);
    let kept = ["mode", "owner", "mtime", "links", "xattrs", "same object as"];
    let differs = compare(&served, &plain);
    let odd = |line: &&String| !kept.iter().any(|it| line.contains(&format!(": {it} ")));
    assert_eq!(differs.iter().find(odd), None, "names, types, sizes, contents, targets");
}

/// Changes of all kinds of which the journal tells enough to take them back.
fn reversible_work(at: &Path) {
    let path = |name: &str| at.join(name);
    let append = |name: &str, bytes: &[u8]| {
        let mut file = fs::OpenOptions::new().append(true).create(true).open(path(name)).unwrap();
        file.write_all(bytes).unwrap();
    };
    append("log", b"and more\n");
    append("empty", b"not any more");
    append("new/deep/file", b"new");
    fs::create_dir(path("new/other")).unwrap();
    symlink("../log", path("new/link")).unwrap();
    run(&["mkfifo", text(&path("new/fifo"))]);
    fs::rename(path("one"), path("new/one")).unwrap();
    fs::rename(path("dir"), path("new/dir")).unwrap();
    let exchange = rustix::fs::RenameFlags::EXCHANGE;
    rustix::fs::renameat_with(
        rustix::fs::CWD,
        path("two"),
        rustix::fs::CWD,
        path("tree"),
        exchange,
    )
    .unwrap();
    fs::rename(path("three"), path("four")).unwrap(); // and four is gone
    fs::hard_link(path("log"), path("log2")).unwrap();
    fs::remove_file(path("hard1")).unwrap(); // hard2 stays
    for name in ["zero", "full", "soft", "pipe", "tty"] {
        fs::remove_file(path(name)).unwrap();
    }
    fs::remove_dir(path("void")).unwrap();
    std::os::unix::fs::chown(path("owned"), Some(7), Some(8)).unwrap();
    fs::set_permissions(path("owned"), fs::Permissions::from_mode(0o4711)).unwrap();
    tree::set_mtime(&path("owned"), 77, 88);
    tree::set_xattr(&path("owned"), "user.a", b"new");
    tree::set_xattr(&path("owned"), "user.b", b"new");
    rustix::fs::lremovexattr(path("owned"), "user.c").unwrap();
    fs::OpenOptions::new().write(true).open(path("grows")).unwrap().set_len(90_000).unwrap();
}

#[test]
fn what_was_done_is_taken_back() {
    let Some(mut world) = World::new() else { return };
    let at = world.mount.at("work");
    for dir in ["", "new", "new/deep", "dir", "tree", "void"] {
        fs::create_dir(at.join(dir)).unwrap();
    }
    for name in ["log", "one", "two", "three", "four", "hard1", "full", "owned", "grows", "tree/x"]
    {
        fs::write(at.join(name), format!("{name} as it was")).unwrap();
    }
    fs::hard_link(at.join("hard1"), at.join("hard2")).unwrap();
    fs::write(at.join("zero"), "").unwrap();
    fs::write(at.join("empty"), "").unwrap();
    symlink("nowhere", at.join("soft")).unwrap();
    run(&["mkfifo", "-m", "604", text(&at.join("pipe"))]);
    run(&["mknod", text(&at.join("tty")), "c", "4", "5"]);
    ["user.a", "user.c"].iter().for_each(|key| tree::set_xattr(&at.join("owned"), key, b"old"));
    let from = (world.last_seq() + 1).to_string();
    let old = world.copy("old");
    reversible_work(&at);
    world.stop();
    let served = world.server.dir().to_owned();
    let now = world.at("now");
    copy(&served, &now);

    let more = ["--undo", "--from", &from, "--data", text(&old)];
    let dry = replay_well(&served, &now, &[&more[..], &["--dry-run"]].concat());
    assert_same(&served, &now);
    let sums = replay_well(&served, &now, &more);
    assert_eq!((&sums["standing"], &sums["done"]), (&0.into(), &dry["done"]), "{sums}");
    assert_same(&old, &now);
    let sums = replay_well(&served, &now, &more);
    assert_eq!(sums["done"], 0, "what is undone already: {sums}");
    assert_same(&old, &now);
    // and forth again
    replay_well(&served, &now, &["--data", text(&served)]);
    assert_same(&served, &now);

    // without the old bytes, two files cannot come back and one keeps what it has: they are named,
    // and the rest is right
    let bare = ["--undo", "--from", &from];
    let (code, left_out, sums) = replay(&served, &now, &bare);
    assert_eq!((code, &sums["lost"], &sums["misfits"]), (1, &2.into(), &0.into()), "{left_out:#?}");
    assert_eq!(sums["files_missing"], 1, "{left_out:#?}");
    let differs = compare(&old, &now);
    let named =
        ["work/four\": only in the first", "work/full\": only in the first", "work/log\": size"];
    let is_named = |line: &String| named.iter().any(|it| line.contains(it));
    assert_eq!((differs.len(), differs.iter().all(is_named)), (3, true), "{differs:#?}");
    // and later they can
    replay_well(&served, &now, &["--data", text(&served)]);
    assert_same(&served, &now);
}

/// imz's number of an object.
fn fid(path: &Path) -> Option<String> {
    let mut value = [0; 4096];
    rustix::fs::lgetxattr(path, "trusted.imz", &mut value[..]).ok()?;
    let fid = u64::from_le_bytes(value[8..16].try_into().unwrap());
    Some(format!("{:x}.{:x}", fid >> 40, fid & ((1 << 40) - 1)))
}

#[test]
fn what_cannot_be_taken_back_is_named_and_nothing_else_differs() {
    let Some(mut world) = World::new() else { return };
    make(world.mount.path(), "made");
    work(world.mount.path(), 6, ops());
    let from = (world.last_seq() + 1).to_string();
    let old = world.copy("old");
    work(world.mount.path(), 7, ops());
    world.stop();
    let served = world.server.dir().to_owned();
    let now = world.at("now");
    copy(&served, &now);
    let (code, left_out, sums) = replay(&served, &now, &["--undo", "--from", &from]);
    assert_eq!((code, &sums["misfits"]), (1, &0.into()), "{sums}: {left_out:#?}");
    assert!(sums["lost"].as_u64() > Some(0) && sums["files_missing"].as_u64() > Some(0), "{sums}");
    let named = serde_json::to_string(&left_out).unwrap();
    for line in compare(&old, &now) {
        let name: PathBuf = line.split("\": ").next().unwrap().trim_start_matches('"').into();
        let fids = [&old, &now].map(|tree| fid(&tree.join(&name)));
        let is_named = fids.iter().flatten().any(|fid| named.contains(&format!("\"{fid}\"")));
        assert!(is_named, "{line}: {fids:?} is not named in {left_out:#?}");
    }
}

#[test]
fn what_is_in_use_is_refused() {
    let Some(mut world) = World::new() else { return };
    fs::write(world.mount.at("file"), "1").unwrap();
    world.mount.sync();
    let served = world.server.dir().to_owned();
    let cache = world.at("cache");
    fs::create_dir(world.mount.at("dir")).unwrap();
    let point = world.mount.path().to_owned();
    for onto in [&served, &served.join("before"), &cache, &cache.join("tree"), &point] {
        imz_fails(&["replay", text(&served), "--onto", text(onto)], 4, "take a copy");
    }
    imz_fails(&["replay", text(&served), "--onto", text(&point.join("dir"))], 4, "mount");
    imz_fails(&["replay", text(&served), "--onto", text(&world.at("none"))], 5, "none");
    let copy = world.copy("copy");
    imz_fails(&["replay", text(&world.at("virgin")), "--onto", text(&copy)], 5, "virgin");
    let same = ["replay", text(&served), "--onto", text(&copy), "--data", text(&copy)];
    imz_fails(&same, 2, "--data");
    // the journals of those in use are at hand, a mount's by its mount point too
    let sums = replay_well(&served, &copy, &["--data", text(&served)]);
    assert_eq!(sums["done"], 0, "{sums}");
    // a client's has no stamps: what can be done again is done again
    for journal in [&cache, &point] {
        replay_well(journal, &copy, &["--data", text(&served)]);
        assert_same(&served, &copy);
    }
    world.stop();
    imz_fails(&["replay", text(&served), "--onto", text(&cache)], 4, "cache");
}

/// The one segment of a server's journal.
fn segment(served: &Path) -> PathBuf {
    served.join(".imz/kml").join(imz::kml::store::segment_name(imz::kml::record::Seq(1)))
}

#[test]
fn a_damaged_journal_is_applied_up_to_there() {
    let Some(mut world) = World::new() else { return };
    for nth in 0..9 {
        fs::create_dir(world.mount.at(format!("made{nth}"))).unwrap();
    }
    world.stop();
    let served = world.server.dir().to_owned();
    let (file, onto) = (segment(&served), world.at("virgin"));
    let whole = fs::read(&file).unwrap();
    let at = whole.windows(5).position(|it| it == b"made6").unwrap();
    let mut bytes = whole.clone();
    bytes[at] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let (code, said) = imz_run(&["replay", text(&served), "--onto", text(&onto)]);
    assert_eq!(code, 6, "{said}");
    assert!(said.contains("corrupt") && said.contains(text(&file)), "{said}");
    assert!(onto.join("made5").is_dir() && !onto.join("made6").exists(), "{said}");
    let (code, _, _) = replay(&served, &onto, &["--undo", "--from", "1"]);
    assert_eq!((code, onto.join("made5").exists()), (6, false), "backwards as well");
    // the rest, once it is whole again
    fs::write(&file, &whole).unwrap();
    replay_well(&served, &onto, &[]);
    assert_same(&served, &onto);
}

#[test]
fn names_that_lead_out_are_no_names() {
    use imz::kml::codec::{self, SEGMENT_HEADER_LEN, SegmentHead, record_at};
    let Some(mut world) = World::new() else { return };
    fs::create_dir(world.mount.at("xyz")).unwrap();
    world.stop();
    let file = segment(world.server.dir());
    let whole = fs::read(&file).unwrap();
    let onto = world.at("virgin");
    let before = ctimes(world.disk.path());
    let record_len = codec::record_len_claimed(&whole[SEGMENT_HEADER_LEN..]).unwrap();
    // the path is for people; the name behind it is what counts
    let at = whole.windows(3).enumerate().filter(|(_, it)| it == b"xyz").map(|it| it.0).nth(1);
    for (name, len) in [("a/b", 3), ("/ab", 3), ("a\0b", 3), ("..", 2), (".", 1), ("", 0)] {
        let mut bytes = whole.clone();
        let at = at.unwrap();
        bytes[at - 1] = len;
        bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
        let record = &mut bytes[SEGMENT_HEADER_LEN..SEGMENT_HEADER_LEN + record_len];
        let crc = crc32fast::hash(&record[record_at::CHAIN..]);
        record[record_at::CRC..record_at::CRC + 4].copy_from_slice(&crc.to_le_bytes());
        assert!(SegmentHead::verify(&bytes).is_ok());
        fs::write(&file, &bytes).unwrap();
        let (code, said) = imz_run(&["replay", text(&file), "--onto", text(&onto)]);
        assert!(code != 0 && said.contains("the field `name` is out of its range"), "{said}");
        assert!(said.contains("before record 1"), "{name:?}: {said}");
    }
    let after = ctimes(world.disk.path());
    let changed: Vec<_> = before.iter().filter(|it| !after.contains(it)).collect();
    assert!(changed.iter().all(|it| it.0 == file), "{changed:?}");
}
