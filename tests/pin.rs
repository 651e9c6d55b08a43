//! What stays in the cache and what leaves it: pins, eviction, the limit.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use common::compare::assert_same;
use common::{Disk, Mount, Server, imz_fails, imz_run, tree, wait_for};

const MIB: usize = 1 << 20;

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Room that a file's data take in the cache, bytes.
fn held(mount: &Mount, name: &str) -> u64 {
    fs::metadata(mount.cache().join("tree").join(name)).unwrap().blocks() * 512
}

fn number(mount: &Mount, key: &str) -> u64 {
    mount.status()[key].as_u64().unwrap_or_else(|| panic!("{key}"))
}

#[track_caller]
fn imz(words: &[&str]) -> String {
    let (code, said) = imz_run(words);
    assert_eq!(code, 0, "{words:?}: {said}");
    said
}

fn pins(mount: &Mount) -> serde_json::Value {
    serde_json::from_str(&imz(&["pin", "--list", "--json", &text(mount.path())])).unwrap()
}

#[test]
fn what_is_pinned_is_here_when_the_server_is_not() {
    let Some(disk) = Disk::new(512) else { return };
    let served = disk.dir("served");
    tree::make(&disk.dir("served/work/project"), 3, 120, 12 << 20);
    fs::write(served.join("work/other"), vec![3; 2 * MIB]).unwrap();
    fs::write(served.join("work/single"), vec![4; 6 * MIB]).unwrap();
    let mut server = Server::start(&disk);
    let mut a = Mount::start(&server, &disk, "cache-a");
    let b = Mount::start(&server, &disk, "cache-b");
    let (project, single) = (text(&a.at("work/project")), text(&a.at("work/single")));
    imz(&["pin", &project]);
    imz(&["pin", "--priority", "90", &single]);
    let list = pins(&a);
    assert_eq!((&list[0]["path"], &list[0]["state"]), (&"work/single".into(), &"whole".into()));
    assert_eq!((&list[0]["priority"], &list[1]["priority"]), (&90.into(), &50.into()));
    assert_eq!(list[0]["bytes"], 6 * MIB);
    assert!(imz(&["pin", "--list", &text(a.path())]).contains(&project));
    assert_eq!((number(&a, "pins"), number(&a, "pinned_missing_files")), (2, 0));
    assert_eq!(held(&a, "work/other"), 0, "nobody asked for this one");

    // what appears there later comes by itself, and the new version of what was there
    fs::create_dir(b.at("work/project/later")).unwrap();
    fs::write(b.at("work/project/later/file"), vec![5; 3 * MIB]).unwrap();
    fs::write(b.at("work/single"), vec![6; 5 * MIB]).unwrap();
    b.sync();
    wait_for("what is new has come", 20, || {
        let later = a.cache().join("tree/work/project/later/file");
        let came = fs::metadata(later).is_ok_and(|stat| stat.blocks() * 512 >= 3 * MIB as u64);
        came && number(&a, "pinned_missing_files") == 0
            && pins(&a)[0]["bytes"] == 5 * MIB
            && pins(&a)[0]["state"] == "whole"
    });

    // also after a restart without the server
    drop(b);
    server.stop();
    wait_for("it is known", 15, || a.status()["away"].as_bool().unwrap());
    assert_same(&a.at("work/project"), &served.join("work/project"));
    a.kill();
    a.again();
    wait_for("the pins are there", 10, || number(&a, "pins") == 2);
    assert_same(&a.at("work/project"), &served.join("work/project"));
    assert_eq!(fs::read(a.at("work/single")).unwrap(), vec![6; 5 * MIB]);
    fs::read(a.at("work/other")).unwrap_err();

    // a pin that cannot be whole now becomes so when the server is back
    let other = text(&a.at("work/other"));
    imz_fails(&["pin", &other], 3, "the server is away");
    assert_eq!(number(&a, "pinned_missing_files"), 1);
    imz_fails(&["evict", &project], 4, "it is pinned");
    server.restart();
    wait_for("it has come", 30, || held(&a, "work/other") >= 2 * MIB as u64);
    imz(&["unpin", &other, &project, &single]);
    imz_fails(&["unpin", &project], 5, "not pinned");
    assert_eq!(number(&a, "pins"), 0);
    imz_fails(&["pin", &text(&a.at("work/none"))], 5, "nothing stands there");
    imz_fails(&["pin", &text(disk.path())], 5, "no imz mount");
    assert_eq!(number(&a, "pins"), 0, "what is not there is not pinned either");
}

#[test]
fn what_may_not_go_is_refused_by_name() {
    let Some(disk) = Disk::new(256) else { return };
    let served = disk.dir("served");
    let names = ["clean", "open", "mapped", "read only", "pinned", "dirty", "gone"];
    fs::create_dir(served.join("d")).unwrap();
    for name in names {
        fs::write(served.join("d").join(name), vec![7; 2 * MIB]).unwrap();
    }
    let mut server = Server::start(&disk);
    let a = Mount::start(&server, &disk, "cache-a");
    let at = |name: &str| a.at("d").join(name);
    for name in names {
        assert_eq!(fs::read(at(name)).unwrap(), vec![7; 2 * MIB]);
    }
    // mapped, with every handle closed
    let file =
        |name: &str| File::options().read(true).write(name == "mapped").open(at(name)).unwrap();
    // SAFETY: nobody else changes or cuts the files while they are mapped
    #[allow(unsafe_code)]
    let (written, seen) = unsafe {
        let written = memmap2::MmapMut::map_mut(&file("mapped")).unwrap();
        (written, memmap2::Mmap::map(&file("read only")).unwrap())
    };
    let open = File::open(at("open")).unwrap();
    imz(&["pin", &text(&at("pinned"))]);
    server.stop();
    wait_for("it is known", 15, || a.status()["away"].as_bool().unwrap());
    fs::write(at("dirty"), vec![8; 2 * MIB]).unwrap();
    fs::rename(at("gone"), at("renamed")).unwrap();

    let (code, said) = imz_run(&["evict", &text(&a.at("d"))]);
    assert_eq!(code, 4, "{said}");
    for (name, why) in [
        ("d/open", "it is open"),
        ("d/mapped", "mapped"),
        ("d/read only", "mapped"),
        ("d/pinned", "it is pinned"),
        ("d/dirty", "the server does not have all of it yet"),
        ("d/renamed", "the server does not have all of it yet"),
    ] {
        let line = said.lines().find(|line| line.starts_with(&format!("{name}:")));
        assert!(line.is_some_and(|line| line.contains(why)), "{name}: {said}");
        assert!(held(&a, name) >= 2 * MIB as u64, "{name} has lost data");
    }
    assert!(said.contains("1 files gave 2.00 MiB"), "{said}");
    assert!(said.contains("the server is away"), "{said}");
    assert_eq!(
        (held(&a, "d/clean"), fs::metadata(at("clean")).unwrap().len()),
        (0, 2 * MIB as u64)
    );
    fs::read(at("clean")).unwrap_err();
    assert_eq!((written[MIB], seen[MIB]), (7, 7));
    let mut byte = [0];
    open.read_exact_at(&mut byte, MIB as u64).unwrap();
    assert_eq!((byte, fs::read(at("dirty")).unwrap()), ([7], vec![8; 2 * MIB]));

    server.restart();
    a.sync();
    drop(open);
    drop((written, seen));
    // the end of a mapping is seen at the next look
    wait_for("all but the pin may go", 10, || {
        imz(&["evict", "--all", &text(a.path())]);
        ["open", "mapped", "read only", "dirty", "renamed"]
            .iter()
            .all(|name| held(&a, &format!("d/{name}")) == 0)
    });
    assert!(held(&a, "d/pinned") >= 2 * MIB as u64);
    // and all of it is read as before
    let before = fs::metadata(at("dirty")).unwrap();
    assert_eq!(fs::read(at("dirty")).unwrap(), vec![8; 2 * MIB]);
    let after = fs::metadata(at("dirty")).unwrap();
    assert_eq!((before.mtime_nsec(), before.mode()), (after.mtime_nsec(), after.mode()));
    assert_same(a.path(), &served);
    a.no_conflicts();
    assert!(number(&a, "evicted_bytes") >= 12 * MIB as u64);
}

#[test]
fn a_limit_is_kept_by_what_the_server_has() {
    let Some(disk) = Disk::new(512) else { return };
    let served = disk.dir("served");
    let name = |nth: usize| format!("file {nth:02}");
    for nth in 0..24 {
        fs::write(served.join(name(nth)), vec![nth as u8; MIB]).unwrap();
    }
    let mut server = Server::start(&disk);
    let a = Mount::with(server.source(), &disk.dir("cache-a"), "cache-max=10M");
    for nth in 0..24 {
        assert_eq!(fs::read(a.at(name(nth))).unwrap(), vec![nth as u8; MIB]);
    }
    let sum = || (0..24).map(|nth| held(&a, &name(nth))).sum::<u64>();
    let kept = |mount: &Mount| {
        let (clean, dirty) =
            (number(mount, "cache_clean_bytes"), number(mount, "cache_dirty_bytes"));
        clean + dirty <= 10 * MIB as u64
    };
    wait_for("the limit is kept", 20, || kept(&a) && sum() <= 10 * MIB as u64);
    assert_eq!(number(&a, "cache_max_bytes"), 10 * MIB as u64);
    assert_eq!(held(&a, &name(0)), 0, "the first one was used longest ago");
    assert!(held(&a, &name(23)) >= MIB as u64, "the last one is still wanted");
    // which is used again, stays
    let here: Vec<usize> = (0..24).filter(|nth| held(&a, &name(*nth)) > 0).collect();
    assert_eq!(fs::read(a.at(name(here[0]))).unwrap().len(), MIB);
    std::thread::sleep(Duration::from_secs(3));
    for nth in 0..4 {
        assert_eq!(fs::read(a.at(name(nth))).unwrap(), vec![nth as u8; MIB]);
    }
    wait_for("the limit is kept again", 20, || kept(&a) && sum() <= 10 * MIB as u64);
    assert!(held(&a, &name(here[0])) > 0 && held(&a, &name(here[1])) == 0, "{here:?}");

    // What the server does not have goes over every limit, and is all there.
    server.stop();
    wait_for("it is known", 15, || a.status()["away"].as_bool().unwrap());
    for nth in 0..14 {
        fs::write(a.at(format!("new {nth}")), vec![100 + nth as u8; MIB]).unwrap();
    }
    assert!(
        imz(&["status", &text(a.path())]).contains("EXCEEDED by what the server does not have")
    );
    std::thread::sleep(Duration::from_secs(3));
    for nth in 0..14 {
        let file = format!("new {nth}");
        assert_eq!(fs::read(a.at(&file)).unwrap(), vec![100 + nth as u8; MIB]);
        assert!(held(&a, &file) >= MIB as u64);
    }
    assert!(sum() > 0, "away from the server nothing is evicted");
    server.restart();
    a.sync();
    wait_for("then it gives way", 40, || kept(&a));
    for nth in 0..14 {
        let file = format!("new {nth}");
        assert_eq!(fs::read(a.at(&file)).unwrap(), vec![100 + nth as u8; MIB]);
    }
    assert_same(a.path(), &served);
    a.no_conflicts();
}
