//! The damage matrix: what is done to a file of imz's x which part of it, and what each command makes
//! of it. The tables below say every outcome; a cell that comes out otherwise fails.
//!
//! ```text
//!   fsck    the kinds of its warnings and errors ("clean": none)
//!   dump    imz kml dump: "ok", or "exit N" after what could be read
//!   replay  imz replay of the journal, onto the served tree as it was before the changes (of a server's
//!           journal: onto an empty directory), with contents from what is damaged here: "all": the
//!           tree is what was acknowledged; "exit 6, part": the journal stops before its end, replay
//!           names the record there, and the tree is what it was, with what the records before say;
//!           "exit 1, ...": it named what it left out. A file, or a target, that no record says is no
//!           outcome
//!   mount   "same": it came up, and names, contents and count of pending changes are what was
//!           acknowledged; "exit N": it refused, in words; "errors N": it came up, and whoever
//!           looks at these N objects gets an error; all else is as it was. Anything else is a wrong
//!           silent answer, and has no place in the table
//!   repair  the exit code of imz fsck --repair, what it leaves for persons, and what a mount is then
//! ```
//!
//! Of a served directory, opening the volume and reading all of it, as `imz serve` does for a client,
//! stands in the place of mount: "refused" is exit code 6.
//!
//! The cache has 5,000 changes that its server lacks (so that its journal has two segments). It is
//! mounted while the server is away: all that a mount shows is from the cache. `IMZ_SHOW=1` prints
//! the table as it comes out, instead of failing.

#![allow(clippy::unwrap_used)] // in tests it is the message

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use common::{AMPLE, Disk, Mount, Server, imz, imz_run, is_mounted, wait_for};
use imz::kml::codec::{HEADER_LEN, SEGMENT_HEADER_LEN, record_len_claimed};
use imz::kml::log::LogError;
use imz::kml::record::ROOT;
use imz::kml::store::{segment_name, segments_in};
use imz::net::control;
use imz::replica::state::StateError;
use imz::replica::volume::{Volume, VolumeError};
use rustix::fs::XattrFlags;

/// What stands where, or the error of looking at it.
type Tree = BTreeMap<String, Result<Vec<u8>, String>>;

const ACTIONS: [&str; 5] = ["flip", "truncate", "zero", "duplicate", "swap"];
const PLACES: [&str; 10] =
    ["header", "body", "tail", "boundary", "index", "xattr", "cursors", "state", "writers", "room"];
/// Cells at a time: most of their time is waiting.
const TOGETHER: usize = 4;
const OWN_KEY: &str = "trusted.imz";

const SERVED_PLACES: [&str; 9] =
    ["header", "body", "tail", "index", "xattr", "cursors", "state", "nodes", "grants"];

/// `place action | fsck | dump | replay | mount | repair`
const CACHE: &str = "
header flip | records-lost | exit 6 | exit 6, part | exit 6 | 1, same
header truncate | records-lost,segment-length | exit 6 | exit 6, part | exit 6 | 1, same
header zero | records-lost | exit 6 | exit 6, part | exit 6 | 1, same
header duplicate | records-lost | exit 6 | exit 6, part | exit 6 | 1, same
header swap | records-lost | exit 6 | exit 6, part | exit 6 | 1, same
body flip | records-lost | exit 6 | exit 6, part | exit 6 | 1, same
body truncate | records-lost,segment-length | exit 6 | exit 6, part | exit 6 | 1, same
body zero | records-lost | exit 6 | exit 6, part | exit 6 | 1, same
body duplicate | records-lost | exit 6 | exit 6, part | exit 6 | 1, same
body swap | records-lost | exit 6 | exit 6, part | exit 6 | 1, same
tail flip | may-differ,records-lost | exit 6 | exit 6, part | exit 6 | 1, same
tail truncate | may-differ,records-lost,segment-length | exit 6 | exit 6, part | exit 6 | 1, same
tail zero | may-differ,records-lost | exit 6 | exit 6, part | exit 6 | 1, same
tail duplicate | clean | ok | all | same | 0, same
tail swap | may-differ,records-lost | exit 6 | exit 6, part | exit 6 | 1, same
boundary flip | segment-header | exit 6 | exit 6, part | exit 6 | 1, same
boundary truncate | may-differ,records-lost,segment-header | exit 6 | exit 6, part | exit 6 | 1, same
boundary zero | segment-header | exit 6 | exit 6, part | exit 6 | 1, same
boundary duplicate | may-differ,records-lost,segment-name,segment-stray | exit 6 | exit 6, part | exit 6 | 1, same
boundary swap | segment-name | exit 6 | exit 6, part | exit 6 | 1, same
index flip | index-damaged | ok | all | same | 1, same
index truncate | index-damaged | ok | all | same | 1, same
index zero | index-damaged | ok | all | same | 1, same
index duplicate | index-damaged | ok | all | same | 1, same
index swap | index-damaged | ok | all | same | 1, same
xattr flip | attribute-damaged | ok | all | errors 1 | 1, errors 1
xattr truncate | attribute-damaged | ok | all | errors 1 | 1, errors 1
xattr zero | attribute-damaged | ok | all | errors 1 | 1, errors 1
xattr duplicate | attribute-damaged | ok | exit 1, all | errors 1 | 1, errors 1
xattr swap | index-lacks,name-differs | ok | exit 1, all | same | 4 name-differs, same
cursors flip | cursors-damaged | ok | all | exit 6 | 1, same
cursors truncate | cursors-damaged | ok | all | exit 6 | 1, same
cursors zero | cursors-damaged | ok | all | exit 6 | 1, same
cursors duplicate | clean | ok | all | same | 0, same
cursors swap | clean | ok | all | same | 0, same
state flip | state-damaged | ok | all | exit 6 | 1, same
state truncate | state-damaged | ok | all | exit 6 | 1, same
state zero | state-damaged | ok | all | exit 6 | 1, same
state duplicate | state-damaged | ok | all | exit 6 | 1, same
state swap | state-damaged | ok | all | exit 6 | 1, same
writers flip | writers-damaged | ok | all | exit 6 | 1, same
writers truncate | writers-damaged | ok | all | exit 6 | 1, same
writers zero | writers-damaged | ok | all | exit 6 | 1, same
writers duplicate | writers-damaged | ok | all | exit 6 | 1, same
writers swap | writers-damaged | ok | all | exit 6 | 1, same
room flip | room-damaged | ok | all | same | 1, same
room truncate | room-damaged | ok | all | same | 1, same
room zero | room-damaged | ok | all | same | 1, same
room duplicate | room-damaged | ok | all | same | 1, same
room swap | room-damaged | ok | all | same | 1, same
";

/// The same of a served directory, with `serve` for mount.
const SERVED: &str = "
header flip | records-lost | exit 6 | exit 6, part | refused | 1, same
header truncate | nodes-ahead,records-lost,segment-length | exit 6 | exit 6, part | refused | 1, same
header zero | records-lost | exit 6 | exit 6, part | refused | 1, same
header duplicate | records-lost | exit 6 | exit 6, part | refused | 1, same
header swap | records-lost | exit 6 | exit 6, part | refused | 1, same
body flip | records-lost | exit 6 | exit 6, part | refused | 1, same
body truncate | nodes-ahead,records-lost,segment-length | exit 6 | exit 6, part | refused | 1, same
body zero | records-lost | exit 6 | exit 6, part | refused | 1, same
body duplicate | records-lost | exit 6 | exit 6, part | refused | 1, same
body swap | records-lost | exit 6 | exit 6, part | refused | 1, same
tail flip | nodes-ahead,records-lost | exit 6 | exit 6, part | refused | 1, same
tail truncate | nodes-ahead,records-lost,segment-length | exit 6 | exit 6, part | refused | 1, same
tail zero | nodes-ahead,records-lost | exit 6 | exit 6, part | refused | 1, same
tail duplicate | clean | ok | all | same | 0, same
tail swap | nodes-ahead,records-lost | exit 6 | exit 6, part | refused | 1, same
index flip | index-damaged | ok | all | same | 1, same
index truncate | index-damaged | ok | all | same | 1, same
index zero | index-damaged | ok | all | same | 1, same
index duplicate | index-damaged | ok | all | same | 1, same
index swap | index-damaged | ok | all | same | 1, same
xattr flip | attribute-damaged | ok | all | same | 1, same
xattr truncate | attribute-damaged | ok | all | same | 1, same
xattr zero | attribute-damaged | ok | all | same | 1, same
xattr duplicate | fid-twice | ok | exit 1, part | same | 1, same
xattr swap | index-lacks | ok | exit 1, part | same | 1, same
cursors flip | cursors-damaged | ok | all | refused | 1, same
cursors truncate | cursors-damaged | ok | all | refused | 1, same
cursors zero | cursors-damaged | ok | all | refused | 1, same
cursors duplicate | clean | ok | all | same | 0, same
cursors swap | clean | ok | all | same | 0, same
state flip | state-damaged | ok | all | refused | 1, same
state truncate | state-damaged | ok | all | refused | 1, same
state zero | state-damaged | ok | all | refused | 1, same
state duplicate | state-damaged | ok | all | refused | 1, same
state swap | state-damaged | ok | all | refused | 1, same
nodes flip | nodes-damaged | ok | all | refused | 1, same
nodes truncate | nodes-damaged | ok | all | refused | 1, same
nodes zero | nodes-damaged | ok | all | refused | 1, same
nodes duplicate | nodes-damaged | ok | all | refused | 1, same
nodes swap | nodes-damaged | ok | all | refused | 1, same
grants flip | grants-damaged | ok | all | same | 1, same
grants truncate | grants-damaged | ok | all | same | 1, same
grants zero | grants-damaged | ok | all | same | 1, same
grants duplicate | grants-damaged | ok | all | same | 1, same
grants swap | grants-damaged | ok | all | same | 1, same
";

// ---- the cache -------------------------------------------------------------------------------

struct Rig {
    disk: Disk,
    cache: PathBuf,
    /// where nobody answers any more
    source: String,
    tree: Tree,
    /// what the server has of it
    before: Tree,
    pending: u64,
}

fn rig() -> Option<Rig> {
    let disk = Disk::new(AMPLE)?;
    let mut server = Server::start(&disk);
    let mut mount = Mount::start(&server, &disk, "cache");
    fs::create_dir(mount.at("dir")).unwrap();
    for n in 0..20u8 {
        fs::write(mount.at(format!("dir/file-{n}")), vec![n; 5000 + usize::from(n)]).unwrap();
    }
    fs::write(mount.at("first"), b"the first").unwrap();
    fs::write(mount.at("second"), b"and the second").unwrap();
    std::os::unix::fs::symlink("dir/file-1", mount.at("link")).unwrap();
    mount.sync();
    server.stop();
    fs::write(mount.at("dir/late"), b"late, and nowhere else").unwrap();
    fs::rename(mount.at("dir/file-3"), mount.at("moved")).unwrap();
    for n in 0..5_000u32 {
        // with the value before it, a record has about 2 KB
        let value = n.to_le_bytes().repeat(225);
        let path = mount.at("second");
        rustix::fs::lsetxattr(path, "user.large", &value, XattrFlags::empty()).unwrap();
    }
    fs::write(mount.at("last"), b"the very last").unwrap();
    let tree = look(mount.path());
    assert!(!segments_in(&disk.path().join("state/kml")).unwrap().is_empty());
    let pending = mount.pending();
    let (code, said) = imz_run(&["umount", "--now", mount.path().to_str().unwrap()]);
    assert_eq!(code, 0, "{said}");
    mount.gone();
    let cache = mount.cache().to_owned();
    assert_eq!(segments_in(&cache.join(".imz/kml")).unwrap().len(), 2, "two segments");
    assert!(tree.values().all(Result::is_ok));
    let mut before = look(&disk.dir("served"));
    before.retain(|path, _| !path.starts_with(".imz"));
    Some(Rig { cache, source: server.source(), tree, before, pending, disk })
}

fn look(top: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut todo = vec![top.to_owned()];
    while let Some(dir) = todo.pop() {
        let name = |path: &Path| path.strip_prefix(top).unwrap().to_str().unwrap().to_owned();
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) => {
                tree.insert(name(&dir), Err(e.to_string()));
                continue;
            }
        };
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(e) => {
                    tree.insert(name(&dir), Err(e.to_string()));
                    break;
                }
            };
            let path = entry.path();
            let what = match fs::symlink_metadata(&path) {
                Ok(meta) if meta.is_dir() => {
                    todo.push(path.clone());
                    Ok(Vec::new())
                }
                Ok(meta) if meta.is_symlink() => {
                    fs::read_link(&path).map(|to| to.into_os_string().into_encoded_bytes())
                }
                Ok(_) => fs::read(&path),
                Err(e) => Err(e),
            };
            tree.insert(name(&path), what.map_err(|e| e.to_string()));
        }
    }
    tree
}

// ---- damage ----------------------------------------------------------------------------------

/// A range of a file, and the one behind it.
struct Spot {
    file: PathBuf,
    at: u64,
    len: u64,
    /// for duplicate and swap: another range of the same length
    other: u64,
}

fn records(segment: &Path) -> Vec<(u64, u64)> {
    let bytes = fs::read(segment).unwrap();
    let mut at = SEGMENT_HEADER_LEN;
    let mut found = Vec::new();
    while at + HEADER_LEN <= bytes.len() && bytes[at + 16..at + 24] != [0; 8] {
        let len = record_len_claimed(&bytes[at..]).unwrap();
        found.push((at as u64, len as u64));
        at += len;
    }
    found
}

/// Where the parts are that are damaged.
struct Parts {
    own: PathBuf,
    index: &'static str,
    /// two files in the tree
    files: [PathBuf; 2],
}

fn of_cache(cache: &Path) -> Parts {
    let files = ["first", "moved"].map(|name| cache.join("tree").join(name));
    Parts { own: cache.join(".imz"), index: "index", files }
}

fn of_served(dir: &Path, state: &Path) -> Parts {
    let files = ["first", "dir/file-7"].map(|name| dir.join(name));
    Parts { own: state.to_owned(), index: "index.redb", files }
}

fn segments(parts: &Parts) -> Vec<PathBuf> {
    let kml = parts.own.join("kml");
    segments_in(&kml).unwrap().into_iter().map(|first| kml.join(segment_name(first))).collect()
}

fn spot(parts: &Parts, place: &str) -> Spot {
    let own = &parts.own;
    let segments = segments(parts);
    match place {
        "header" | "body" => {
            let file = segments[0].clone();
            let all = records(&file);
            // among the many that are alike
            let nth = all.len() / 2;
            let ((at, one), (other, two)) = (all[nth], all[nth + 1]);
            let len = one.min(two);
            let (from, len) = match place {
                "header" => (0, HEADER_LEN as u64),
                _ => (HEADER_LEN as u64, len - HEADER_LEN as u64),
            };
            Spot { file, at: at + from, len, other: other + from }
        }
        "tail" => {
            let file = segments[segments.len() - 1].clone();
            let all = records(&file);
            let (at, len) = all[all.len() - 1];
            Spot { file, at, len, other: all[all.len() - 2].0 }
        }
        "index" => {
            let file = own.join(parts.index);
            let pages = index_pages(&file);
            // the other one is the first of the file, which says where all else is
            Spot { file, at: pages[0], len: 4096, other: 0 }
        }
        "cursors" => Spot { file: own.join("kml/cursors"), at: 0, len: 512, other: 4096 },
        "state" => {
            let file = own.join("state.json");
            let text = fs::read_to_string(&file).unwrap();
            let at = text.find("\"incarnation\": ").unwrap() as u64 + 20;
            Spot { file, at, len: 4, other: at + 4 }
        }
        "nodes" => {
            let file = own.join("nodes.json");
            let text = fs::read_to_string(&file).unwrap();
            let at = text.find("\"last\": ").unwrap() as u64 + 8;
            Spot { file, at, len: 2, other: at - 8 }
        }
        "room" | "grants" => {
            let file = own.join(format!("{place}.json"));
            let text = fs::read_to_string(&file).unwrap();
            // the digits of what was granted, or in the book of whose turn is next
            let key = if place == "room" { "\"granted\": [" } else { "\"epoch_next\": " };
            let at = (text.find(key).unwrap() + key.len()) as u64;
            let at = at + text[at as usize..].find(|c: char| c.is_ascii_digit()).unwrap() as u64;
            Spot { file, at, len: 2, other: at - 8 }
        }
        "writers" => Spot { file: own.join("kml/writers"), at: 0, len: 8, other: 8 },
        "boundary" => Spot { file: segments[1].clone(), at: 0, len: 64, other: 0 },
        place => panic!("{place}"),
    }
}

/// Pages of the index that have names in them, old ones included.
fn index_pages(file: &Path) -> Vec<u64> {
    let bytes = fs::read(file).unwrap();
    let has = |page: &[u8]| page.windows(7).any(|it| it == b"file-19");
    let pages = bytes.chunks(4096).enumerate();
    let found: Vec<u64> =
        pages.filter(|(_, page)| has(page)).map(|(nth, _)| nth as u64 * 4096).collect();
    assert!(!found.is_empty(), "the index has no names");
    found
}

fn damage(parts: &Parts, place: &str, action: &str) {
    if place == "xattr" {
        return damage_xattr(parts, action);
    }
    let Spot { file, at, len, other } = spot(parts, place);
    let open = || File::options().read(true).write(true).open(&file).unwrap();
    let read = |at: u64, len: u64| {
        let mut bytes = vec![0; len as usize];
        open().read_exact_at(&mut bytes, at).unwrap();
        bytes
    };
    let write = |at: u64, bytes: &[u8]| open().write_all_at(bytes, at).unwrap();
    match (place, action) {
        ("boundary", "duplicate") => drop(fs::copy(&segments(parts)[0], &file).unwrap()),
        ("boundary", "swap") => {
            let [one, two] = [0, 1].map(|nth| segments(parts)[nth].clone());
            let aside = parts.own.join("aside");
            fs::rename(&one, &aside).unwrap();
            fs::rename(&two, &one).unwrap();
            fs::rename(&aside, &two).unwrap();
        }
        ("state" | "nodes" | "room" | "grants", "duplicate") => {
            let twice = fs::read(&file).unwrap().repeat(2);
            fs::write(&file, twice).unwrap();
        }
        ("writers", "duplicate") => write(len, &read(0, len)),
        ("index", "flip" | "zero") => {
            let bytes = fs::read(&file).unwrap();
            for at in (0..bytes.len() - 7).filter(|at| bytes[*at..].starts_with(b"file-19")) {
                let byte = if action == "zero" { 0 } else { bytes[at + 3] ^ 0x04 };
                write(at as u64 + 3, &[byte]);
            }
        }
        (_, "flip") => {
            // neither the first byte nor the last
            let mut byte = read(at + len / 2, 1);
            byte[0] ^= 0x04;
            write(at + len / 2, &byte);
            if place == "cursors" {
                write(other + len / 2, &byte);
            }
        }
        (_, "truncate") => open().set_len(at + len / 2).unwrap(),
        (_, "zero") => {
            write(at, &vec![0; len as usize]);
            if place == "cursors" {
                write(other, &vec![0; len as usize]);
            }
        }
        (_, "duplicate") if place == "tail" => write(at + len, &read(at, len)),
        (_, "duplicate") => write(other, &read(at, len)),
        (_, "swap") => {
            let (one, two) = (read(at, len), read(other, len));
            match place {
                // of different lengths: the two stand in the other order
                "tail" => {
                    let before = read(other, at - other);
                    write(other, &[one, before].concat());
                }
                _ => {
                    write(at, &two);
                    write(other, &one);
                }
            }
        }
        (place, action) => panic!("{action} {place}"),
    }
}

fn damage_xattr(parts: &Parts, action: &str) {
    let get = |path: &Path| {
        let mut value = vec![0; 4096];
        let len = rustix::fs::lgetxattr(path, OWN_KEY, &mut value[..]).unwrap();
        value.truncate(len);
        value
    };
    let set = |path: &Path, value: &[u8]| {
        rustix::fs::lsetxattr(path, OWN_KEY, value, XattrFlags::empty()).unwrap();
    };
    let [first, other] = parts.files.clone();
    let (mut one, two) = (get(&first), get(&other));
    match action {
        "flip" => {
            one[17] ^= 1;
            set(&first, &one);
        }
        "truncate" => set(&first, &one[..20]),
        "zero" => set(&first, &vec![0; one.len()]),
        "duplicate" => set(&first, &two),
        "swap" => {
            set(&first, &two);
            set(&other, &one);
        }
        action => panic!("{action}"),
    }
}

// ---- commands --------------------------------------------------------------------------------

/// Exit code, the kinds of its warnings and errors, and whether anything could be repaired.
fn fsck(words: &[&str]) -> (i32, String, bool) {
    let out = common::command(&[&[&*imz(), "fsck", "--json"], words].concat()).output().unwrap();
    let said = common::told(&out);
    assert!(!said.contains("panicked"), "{said}");
    let mut kinds = BTreeSet::new();
    let mut repairable = false;
    for line in String::from_utf8(out.stdout).unwrap().lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        if line.get("summary").is_some() {
            continue;
        }
        repairable |= line["repairable"] == true;
        if line["severity"] != "note" && line["repaired"] != true {
            kinds.insert(line["kind"].as_str().unwrap().to_owned());
        }
    }
    let kinds: Vec<String> = kinds.into_iter().collect();
    let kinds = if kinds.is_empty() { "clean".to_owned() } else { kinds.join(",") };
    (out.status.code().unwrap_or(-1), kinds, repairable)
}

/// As the table has it: what it finds, what a repair leaves, and that a second one finds nothing.
fn repair(words: &[&str], name: &str) -> String {
    let (code, left, _) = fsck(&[words, &["--repair"]].concat());
    let (_, again, repairable) = fsck(words);
    assert!(!repairable, "{name}: a repair left something to be repaired: {again}");
    let left = if left == "clean" { String::new() } else { format!(" {left}") };
    format!("{code}{left}")
}

fn dump(cache: &Path) -> String {
    let out = common::command(&[&imz(), "kml", "dump", cache.to_str().unwrap()]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!said.contains("panicked"), "{said}");
    match out.status.code() {
        Some(0) => "ok".to_owned(),
        Some(code) => format!("exit {code}"),
        None => "killed".to_owned(),
    }
}

/// Replays a journal onto a tree that is `before`; with all of it, it is `want`.
fn replay(journal: &Path, onto: &Path, data: &Path, before: &Tree, want: &Tree) -> String {
    let words = [journal, Path::new("--onto"), onto, Path::new("--data"), data];
    let out = common::command(&[imz().as_ref(), Path::new("replay")]).args(words).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!said.contains("panicked"), "{said}");
    let mut found = look(onto);
    found.retain(|path, _| !path.starts_with(".imz"));
    let code = out.status.code().unwrap_or(-1);
    if code == 6 {
        assert!(said.contains("at byte") && said.contains("before record"), "where: {said}");
    }
    // made, and no more
    let is_new = |what: &Result<Vec<u8>, String>| what.as_ref().is_ok_and(Vec::is_empty);
    let is_said = |(path, what): (&String, &Result<Vec<u8>, String>)| {
        let known = [want.get(path), before.get(path)].into_iter().flatten();
        known.clone().any(|it| it == what) || (known.count() > 0 && is_new(what))
    };
    let extent = match (found == *want, found.iter().find(|it| !is_said(*it))) {
        (true, _) => "all".to_owned(),
        (_, None) => "part".to_owned(),
        (_, Some((path, _))) => format!("DIFFERS {path}"),
    };
    fs::remove_dir_all(onto).unwrap();
    match code {
        0 => extent,
        code => format!("exit {code}, {extent}"),
    }
}

/// A mount of a cache whose server is away.
fn mount(rig: &Rig, cache: &Path) -> String {
    let point = tempfile::Builder::new().prefix("imz-damage-").tempdir().unwrap();
    let log = tempfile::NamedTempFile::new().unwrap();
    let mut child = Command::new(imz())
        .args(["mount", "-f", &rig.source])
        .arg(point.path())
        .arg("--cache")
        .arg(cache)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log.reopen().unwrap())
        .spawn()
        .unwrap();
    let outcome = watch(rig, &mut child, point.path());
    let _ = child.kill(); // it may have ended
    child.wait().unwrap();
    while is_mounted(point.path()) {
        Command::new("umount").arg("-l").arg(point.path()).status().unwrap();
    }
    let said = fs::read_to_string(log.path()).unwrap();
    assert!(!said.contains("panicked"), "{said}");
    outcome
}

fn watch(rig: &Rig, child: &mut Child, point: &Path) -> String {
    let mut ended = None;
    wait_for("it is mounted, or ended", 30, || {
        ended = child.try_wait().unwrap();
        let up = || control::status(&control::socket_path(point)).is_ok();
        ended.is_some() || (is_mounted(point) && up())
    });
    if let Some(status) = ended {
        return format!("exit {}", status.code().unwrap_or(-1));
    }
    let mut tree = look(point);
    if std::env::var_os("IMZ_SHOW").is_some() {
        tree.iter()
            .filter(|(_, it)| it.is_err())
            .for_each(|(name, it)| eprintln!("{name}: {it:?}"));
    }
    // a second look finds the kernel's cache
    let again = look(point);
    tree.extend(again.into_iter().filter(|(_, it)| it.is_err()));
    let pending = control::status(&control::socket_path(point)).unwrap().pending_records;
    let mut outcome = compared(&rig.tree, &tree);
    if pending < rig.pending {
        outcome.push_str(&format!(" pending -{}", rig.pending - pending));
    }
    outcome
}

fn compared(want: &Tree, found: &Tree) -> String {
    if want == found {
        return "same".to_owned();
    }
    let failed = found.values().filter(|it| it.is_err()).count();
    let wrong: Vec<&String> = want
        .iter()
        .filter(|(name, what)| found.get(*name).is_none_or(|it| it.is_ok() && it != *what))
        .map(|(name, _)| name)
        .collect();
    let new: Vec<&String> = found.keys().filter(|name| !want.contains_key(*name)).collect();
    match (failed, wrong.is_empty() && new.is_empty()) {
        (n, true) => format!("errors {n}"),
        (n, false) => format!("DIFFERS {wrong:?} {new:?} errors {n}"),
    }
}

// ---- the matrix ------------------------------------------------------------------------------

fn copy(rig: &Rig, name: &str) -> PathBuf {
    let to = rig.disk.path().join(name);
    common::run(&["cp", "-a", rig.cache.to_str().unwrap(), to.to_str().unwrap()]);
    to
}

fn cell(rig: &Rig, place: &str, action: &str) -> String {
    let name = format!("{place} {action}");
    let mut cache = copy(rig, &name.replace(' ', "-"));
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    damage(&of_cache(&cache), place, action);
    let (code, found, _) = fsck(&[&text(&cache)]);
    assert_eq!(code, if found == "clean" { 0 } else { 4 }, "{name}: {found}");
    let dumped = dump(&cache);
    let onto = rig.disk.path().join(format!("onto-{place}-{action}"));
    common::run(&["cp", "-a", &text(&rig.disk.dir("served")), &text(&onto)]);
    let replayed = replay(&cache, &onto, &cache, &rig.before, &rig.tree);
    let mounted = mount(rig, &cache);
    if !mounted.starts_with("exit") {
        // it came up, and has changed things
        fs::remove_dir_all(&cache).unwrap();
        cache = copy(rig, &format!("{}-again", name.replace(' ', "-")));
        damage(&of_cache(&cache), place, action);
    }
    let repaired = repair(&[&text(&cache)], &name);
    let after = mount(rig, &cache);
    fs::remove_dir_all(&cache).unwrap();
    format!("{name} | {found} | {dumped} | {replayed} | {mounted} | {repaired}, {after}")
}

/// Does all cells, several at a time; their lines in order.
fn all(places: &[&str], cell: impl Fn(&str, &str) -> String + Sync) -> Vec<String> {
    let cells = places.iter().flat_map(|place| ACTIONS.map(|action| (*place, action)));
    let todo = Mutex::new(cells.collect::<Vec<_>>().into_iter().enumerate());
    let done = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..TOGETHER {
            scope.spawn(|| {
                loop {
                    let next = todo.lock().unwrap().next();
                    let Some((nth, (place, action))) = next else { return };
                    let line = cell(place, action);
                    done.lock().unwrap().insert(nth, line);
                }
            });
        }
    });
    done.into_inner().unwrap().into_values().collect()
}

#[test]
fn every_cell_of_both_sides() {
    let Some(rig) = rig() else { return };
    assert_eq!(mount(&rig, &copy(&rig, "whole")), "same", "what is not damaged");
    check(CACHE, &all(&PLACES, |place, action| cell(&rig, place, action)));
    let mut served = look(&rig.disk.dir("served"));
    served.retain(|path, _| !path.starts_with(".imz"));
    check(SERVED, &all(&SERVED_PLACES, |place, action| served_cell(&rig, &served, place, action)));
    a_look_changes_nothing(&rig);
    for (place, action) in [("body", "flip"), ("tail", "zero"), ("boundary", "truncate")] {
        all_arrives_after_a_repair(&rig, place, action);
    }
}

// ---- the served side -------------------------------------------------------------------------

/// What a server makes of it: the volume is opened as `imz serve` does, and read as a client would.
fn serve(dir: &Path, state: &Path, want: &Tree) -> String {
    let mut volume = match Volume::open(dir, Some(state), "vol") {
        Ok(volume) => volume,
        Err(
            VolumeError::Log(LogError::Corrupt { .. })
            | VolumeError::State(StateError::Damaged { .. }),
        ) => {
            return "refused".to_owned();
        }
        Err(e) => return format!("fails: {e}"),
    };
    let mut tree = Tree::new();
    let mut todo = vec![(ROOT, String::new())];
    while let Some((fid, above)) = todo.pop() {
        let page = match volume.list(fid, b"") {
            Ok(page) => page,
            Err(e) => {
                tree.insert(above, Err(e.to_string()));
                continue;
            }
        };
        for (name, object) in page.entries {
            let path = format!("{above}{}", String::from_utf8(name).unwrap());
            let what = match object.attr.mode & 0o170_000 {
                0o040_000 => {
                    todo.push((object.fid, format!("{path}/")));
                    Ok(Vec::new())
                }
                0o120_000 => Ok(object.target),
                _ => volume
                    .read(1, object.fid, 0, 1 << 20, object.stamp)
                    .map(|piece| piece.bytes)
                    .map_err(|e| e.to_string()),
            };
            tree.insert(path, what);
        }
    }
    compared(want, &tree)
}

fn served_cell(rig: &Rig, want: &Tree, place: &str, action: &str) -> String {
    let name = format!("{place} {action}");
    let make = || {
        let to = |what: &str| rig.disk.path().join(format!("{what}-{place}-{action}"));
        let (dir, state) = (to("served"), to("state"));
        for (what, to) in [("served", &dir), ("state", &state)] {
            let from = rig.disk.path().join(what);
            let _ = fs::remove_dir_all(to); // of the round before
            common::run(&["cp", "-a", from.to_str().unwrap(), to.to_str().unwrap()]);
        }
        damage(&of_served(&dir, &state), place, action);
        (dir, state)
    };
    let (dir, state) = make();
    let words = [dir.to_str().unwrap(), "--state", state.to_str().unwrap()];
    let (_, found, _) = fsck(&words);
    let dumped = dump(&state);
    let onto = rig.disk.dir(&format!("onto-{place}-{action}"));
    let replayed = replay(&state, &onto, &dir, &Tree::new(), want);
    let served = serve(&dir, &state, want);
    let (dir, state) = make();
    let repaired = repair(&words, &name);
    let after = serve(&dir, &state, want);
    fs::remove_dir_all(dir).unwrap();
    fs::remove_dir_all(state).unwrap();
    format!("{name} | {found} | {dumped} | {replayed} | {served} | {repaired}, {after}")
}

// ---- and -------------------------------------------------------------------------------------

fn a_look_changes_nothing(rig: &Rig) {
    let cache = copy(rig, "looked-at");
    damage(&of_cache(&cache), "body", "flip");
    damage(&of_cache(&cache), "xattr", "flip");
    let text = cache.to_str().unwrap();
    let listed = || common::run(&["find", text, "-printf", "%p %s %m %T@ %C@\n"]);
    let before = listed();
    let (code, found, repairable) = fsck(&[text]);
    assert_eq!((code, &*found, repairable), (4, "attribute-damaged,records-lost", true));
    assert_eq!(listed(), before);
}

/// The server comes back after a repair: it gets every byte that is nowhere else.
fn all_arrives_after_a_repair(rig: &Rig, place: &str, action: &str) {
    let cache = copy(rig, "arrives");
    damage(&of_cache(&cache), place, action);
    let text = cache.to_str().unwrap();
    assert_eq!(fsck(&[text, "--repair"]).0, 1);
    for what in ["served", "state"] {
        let from = rig.disk.path().join(what);
        let to = rig.disk.path().join(format!("{what}-arrives"));
        common::run(&["cp", "-a", from.to_str().unwrap(), to.to_str().unwrap()]);
    }
    let mut server = Server::serve(&rig.disk.dir("served-arrives"), &rig.disk.dir("state-arrives"));
    let mut mount = Mount::with(server.source(), &cache, "");
    // who has it is told
    let (code, said) = imz_run(&["fsck", text]);
    assert_eq!(code, 8, "{said}");
    assert!(said.contains("is in use by process") && said.contains("mount"), "{said}");
    mount.sync();
    mount.no_conflicts();
    let mut want = rig.tree.clone();
    let mut found = look(server.dir());
    for name in [".imz", ".imz-conflicts"] {
        found.retain(|path, _| path.split('/').next() != Some(name));
        want.remove(name);
    }
    assert_eq!(compared(&want, &found), "same", "{place} {action}");
    mount.umount();
    server.stop();
    for what in ["arrives", "served-arrives", "state-arrives"] {
        fs::remove_dir_all(rig.disk.path().join(what)).unwrap();
    }
}

#[track_caller]
fn check(table: &str, lines: &[String]) {
    if std::env::var_os("IMZ_SHOW").is_some() {
        lines.iter().for_each(|line| println!("{line}"));
        return;
    }
    let want: Vec<&str> = table.lines().filter(|line| !line.is_empty()).collect();
    let wrong = lines.iter().filter(|line| !want.contains(&line.as_str()));
    let wrong: Vec<&String> = wrong.collect();
    assert!(wrong.is_empty() && want.len() == lines.len(), "other outcomes: {wrong:#?}");
    assert!(!table.contains("DIFFERS"), "a wrong silent answer is no outcome");
}
