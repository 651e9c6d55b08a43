//! `imz inspect` of everything: what it says, and that it never waits for a mount.

#![allow(clippy::unwrap_used)] // in tests it is the message

mod common;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Disk, Mount, Server, imz_fails, imz_run};
use serde_json::Value;

#[track_caller]
fn inspect(path: &Path) -> Value {
    let (code, said) = imz_run(&["inspect", "--json", path.to_str().unwrap()]);
    assert_eq!(code, 0, "{said}");
    let (code, text) = imz_run(&["inspect", path.to_str().unwrap()]);
    assert!(code == 0 && text.lines().count() > 2, "{text}");
    serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"))
}

#[test]
fn everything_can_be_inspected() {
    let Some(disk) = Disk::new(512) else { return };
    let mut server = Server::start(&disk);
    let mut mount = Mount::start(&server, &disk, "cache");
    fs::create_dir(mount.at("dir")).unwrap();
    fs::write(mount.at("dir/plan"), vec![7; 3000]).unwrap();
    mount.sync();

    let told = inspect(&mount.at("dir/plan"));
    assert_eq!((&told["kind"], &told["size_bytes"]), (&"file".into(), &3000.into()));
    assert_eq!((&told["pending"], &told["here"]), (&0.into(), &"all of it".into()));
    assert_eq!((&told["promise"], &told["right"]), (&"current".into(), &"write".into()));
    let fid = told["fid"].clone();
    assert!(told["changed"].as_str().unwrap().starts_with("here, by uid 0, at 20"), "{told}");
    assert_eq!(fs::read(told["cached_at"].as_str().unwrap()).unwrap(), vec![7; 3000]);
    assert_eq!(inspect(mount.path())["is"], "mount point");
    assert_eq!(inspect(&mount.at("dir"))["kind"], "directory");

    // the same object at the server, whose process is not asked
    let here = inspect(&server.dir().join("dir"));
    assert_eq!(here["kind"], "directory");
    assert!(here["known"].is_null() && here["fid"].is_string(), "{here}");
    let journal = inspect(&disk.path().join("state/kml"));
    assert_eq!((&journal["is"], &journal["journal"]), (&"journal".into(), &"whole".into()));
    assert!(journal["records"].as_u64().unwrap() >= 3, "{journal}");

    // away, with something that pends
    server.stop();
    fs::write(mount.at("dir/plan"), b"another plan").unwrap();
    let told = inspect(&mount.at("dir/plan"));
    assert_eq!((&told["fid"], &told["size_bytes"]), (&fid, &12.into()));
    assert!(told["pending"].as_u64().unwrap() >= 1, "{told}");
    assert!(told["pending_first"][0].as_str().unwrap().contains("dir/plan"), "{told}");
    assert!(told["changed"].as_str().unwrap().ends_with("which the server lacks"), "{told}");
    imz_fails(&["inspect", mount.at("dir/none").to_str().unwrap()], 1, "not in the cache");

    // a mount that hangs does not hang it
    mount.freeze();
    let began = Instant::now();
    imz_fails(&["inspect", mount.at("dir/plan").to_str().unwrap()], 1, "does not answer");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    mount.thaw();

    let (code, said) = imz_run(&["umount", "--now", mount.path().to_str().unwrap()]);
    assert_eq!(code, 0, "{said}");
    mount.gone();
    let told = inspect(mount.cache());
    assert_eq!((&told["is"], &told["journal"]), (&"cache".into(), &"whole".into()));
    assert!(told["pending"].as_u64().unwrap() >= 1 && told["lost_found"] == 0, "{told}");
    let told = inspect(&mount.cache().join("tree/dir/plan"));
    assert_eq!(told["fid"], fid);
    let kml = mount.cache().join(".imz/kml");
    let segment = fs::read_dir(&kml).unwrap().map(|it| it.unwrap().path());
    let segment = segment.into_iter().find(|it| it.extension().is_some_and(|it| it == "kml"));
    assert_eq!(inspect(&segment.unwrap())["is"], "segment of a journal");
    imz_fails(&["inspect", "/usr"], 5, "no mount, no cache");
}
