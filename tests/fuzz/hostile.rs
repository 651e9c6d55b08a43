//! Journals that want out: replayed onto a tree beside which a sentinel stands.
//!
//! An input is a byte, whose lowest bit says whether it is undone, and records one after another as
//! they travel. In between, the tree is changed by another hand: a directory becomes a symbolic link
//! to the sentinel. What the sentinel is made of, times of change included, must stay as it is.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use imz::kml::codec::{self, Entry, Outcome};
use imz::kml::record::Seq;
use imz::replica::replay::Replay;
use imz::replica::replay::contents::Source;
use imz::replica::replay::survey::{Part, Survey};
use imz::replica::replay::target::Target as Tree;

use super::engine::{Rng, Target, scratch};
use super::records::World;
use super::repair_records;

const WORLD: World = World {
    names: &[b"a", b"b", b"a", b"b", b"link", b"file", b"hard", b".imz", b".imz-conflicts"],
    paths: &[
        b"a",
        b"b",
        b"a/b",
        b"b/a",
        b"a/b/a",
        b"link",
        b"link/file",
        b"link/dir/x",
        b"hard",
        b"file",
        b"..",
        b"../sentinel/file",
        b"a/../../sentinel/file",
        b"/etc/hostname",
        b"//",
        b"a//b",
        b".imz/state",
        b".imz",
        b"b/link/file",
        b"",
    ],
    fids: 8,
};
/// After so many inputs the tree is made anew.
const LIFE: u64 = 50;
/// Most records of one input.
const RECORDS_MAX: usize = 200;

/// Name, times of change, links and contents of one thing.
type Seen = (PathBuf, i64, i64, u64, Vec<u8>);

pub struct Hostile {
    dir: tempfile::TempDir,
    sentinel: Vec<Seen>,
    inputs: u64,
}

impl Hostile {
    pub fn new() -> Hostile {
        let dir = scratch();
        let sentinel = dir.path().join("sentinel");
        fs::create_dir_all(sentinel.join("dir/below")).unwrap();
        for name in ["file", "dir/file", "dir/below/file"] {
            fs::write(sentinel.join(name), format!("precious {name}")).unwrap();
        }
        symlink("file", sentinel.join("link")).unwrap();
        fs::create_dir(dir.path().join("data")).unwrap();
        fs::write(dir.path().join("data/a"), vec![7; 5000]).unwrap();
        let mut hostile = Hostile { dir, sentinel: Vec::new(), inputs: 0 };
        hostile.renew();
        hostile
    }

    fn tree(&self) -> PathBuf {
        self.dir.path().join("tree")
    }

    /// A tree with traps in it.
    fn renew(&mut self) {
        let (tree, sentinel) = (self.tree(), self.dir.path().join("sentinel"));
        let _ = fs::remove_dir_all(&tree); // there is none at first
        fs::create_dir_all(tree.join("b/a")).unwrap();
        fs::create_dir(tree.join(".imz")).unwrap();
        fs::write(tree.join(".imz/state"), "ours").unwrap();
        fs::write(tree.join("a"), "a file").unwrap();
        symlink(&sentinel, tree.join("link")).unwrap();
        symlink(&sentinel, tree.join("b/link")).unwrap();
        symlink(sentinel.join("file"), tree.join("file")).unwrap();
        fs::hard_link(sentinel.join("file"), tree.join("hard")).unwrap();
        self.sentinel = self.look();
    }

    fn look(&self) -> Vec<Seen> {
        let mut seen = Vec::new();
        look_into(&self.dir.path().join("sentinel"), &mut seen);
        look_into(&self.dir.path().join("data"), &mut seen);
        look_into(&self.tree().join(".imz"), &mut seen);
        seen
    }

    /// Another hand: what is a directory now leads out; or back again.
    fn interfere(&self, path: &Path) {
        let aside = self.dir.path().join("aside");
        if fs::symlink_metadata(path).is_ok_and(|it| it.is_dir()) && !aside.exists() {
            fs::rename(path, &aside).unwrap();
            symlink(self.dir.path().join("sentinel/dir"), path).unwrap();
        } else if aside.exists() {
            let _ = fs::remove_file(path); // it may be something else by now
            let _ = fs::rename(&aside, path);
        }
    }
}

fn look_into(path: &Path, seen: &mut Vec<Seen>) {
    let stat = fs::symlink_metadata(path).unwrap();
    let is_dir = stat.is_dir();
    let bytes = if is_dir { Vec::new() } else { fs::read(path).unwrap_or_default() };
    seen.push((path.to_owned(), stat.ctime(), stat.ctime_nsec(), stat.nlink(), bytes));
    if is_dir {
        let mut names: Vec<_> =
            fs::read_dir(path).unwrap().map(|it| it.unwrap().file_name()).collect();
        names.sort();
        names.iter().for_each(|name| look_into(&path.join(name), seen));
    }
}

impl Target for Hostile {
    fn name(&self) -> &'static str {
        "replay"
    }
    fn seeds(&self, rng: &mut Rng) -> Vec<Vec<u8>> {
        let seed = |rng: &mut Rng| {
            let mut bytes = vec![rng.next() as u8];
            for nth in 0..20 {
                let record = WORLD.record(rng);
                bytes.extend(codec::encode_wire(&record, Seq(nth + 1)).unwrap_or_default());
            }
            bytes
        };
        (0..300).map(|_| seed(rng)).collect()
    }
    fn repair(&self, bytes: &mut [u8]) {
        if let Some((_, records)) = bytes.split_first_mut() {
            repair_records(records, 0, 1, None);
        }
    }
    fn run(&mut self, bytes: &[u8]) -> bool {
        let Some((how, mut rest)) = bytes.split_first() else { return false };
        let mut entries = Vec::new();
        while let Ok(len) = codec::record_len_claimed(rest)
            && entries.len() < RECORDS_MAX
            && let Some(record) = rest.get(..len)
        {
            if let Ok((seq, record)) = codec::decode_wire(record) {
                entries.push(Entry { seq, record, outcome: Outcome::Done });
            }
            rest = &rest[len..];
        }
        let part = Part { from: Seq(1), until: None, undo: how & 1 == 1 };
        let target = Tree::open(&self.tree(), true).unwrap();
        let mut survey = Survey::default();
        entries.iter().for_each(|entry| survey.add(&part, target.is_plain, entry));
        let mut replay = Replay::new(target, part, survey, how & 2 == 2);
        replay.set_source(Source::open(&self.dir.path().join("data")).unwrap());
        if part.undo {
            entries.reverse();
        }
        for (nth, entry) in entries.iter().enumerate() {
            // a fate or a named error; an error of the tree would end it
            if replay.step(entry).is_err() {
                break;
            }
            if how & 4 == 4 && nth % 5 == 4 {
                let names = ["b", "a", "b/a"];
                self.interfere(&self.tree().join(names[nth / 5 % 3]));
            }
        }
        while let Ok(Some(_)) = replay.fill_next() {}
        let _ = replay.finish(); // a directory that was moved away has its error
        drop(replay);
        let _ = fs::remove_dir_all(self.dir.path().join("aside"));
        assert_eq!(self.look(), self.sentinel, "the sentinel was touched");
        self.inputs += 1;
        // what another hand did may have left no root to look at
        if self.inputs.is_multiple_of(LIFE) || how & 4 == 4 {
            self.renew();
        }
        !entries.is_empty()
    }
}
