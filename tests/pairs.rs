//! Every pair of changes that two clients make without knowing of each other, as the tables of
//! imz-conflicts(7) have them: the expectations are read from the manual page.
//!
//! Each pair has a directory of its own in one volume, which is driven by its own calls: first the
//! other client's records come, then this one's, made on what was there before. Whatever a table
//! says: what the server keeps is looked at, one conflict is one, no byte that anybody wrote is
//! lost, and records that come twice change nothing.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use imz::kml::record::{
    Attr, Change, Fid, Gone, Name, Op, Origin, Over, Place, ROOT, Range, Record, Seq, Stamp, Time,
};
use imz::replica::apply::{Applied, Content, Incoming};
use imz::replica::resolve::Choice;
use imz::replica::volume::{Object, Volume};

const MANUAL: &str = include_str!("../man/imz-conflicts.7");
/// Who made what is there at first; the other client; the one whose records are looked at.
const MAKER: u32 = 3;
const OTHER: u32 = 1;
const OWN: u32 = 2;
const FREE: Over = Over::Nothing { noreplace: false };

struct World {
    dir: tempfile::TempDir,
    volume: Option<Volume>,
    seqs: HashMap<u32, u64>,
    last_fid: u64,
    /// of the records
    path: String,
}

/// A record and the bytes of its store.
type Step = (Op, Vec<u8>);

impl World {
    fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        let mut world = World {
            dir,
            volume: None,
            seqs: HashMap::new(),
            last_fid: 0,
            path: "some/path".into(),
        };
        world.open();
        for node in [OTHER, OWN, MAKER] {
            let met = world.v().meet([node as u8; 16], 0, &format!("host{node}")).unwrap();
            assert_eq!(met, (node, Seq(0)));
        }
        world
    }
    fn open(&mut self) {
        self.volume = None;
        self.volume = Some(Volume::open(self.dir.path(), None, "v").unwrap());
    }
    fn v(&mut self) -> &mut Volume {
        self.volume.as_mut().unwrap()
    }
    fn fid(&mut self, node: u32) -> Fid {
        self.last_fid += 1;
        Fid::new(node, self.last_fid)
    }
    /// Applies records of a node in one batch; a second time, nothing may happen.
    fn apply(&mut self, node: u32, steps: &[Step]) -> Applied {
        let records: Vec<(Seq, Record)> = steps
            .iter()
            .map(|(op, _)| {
                let seq = self.seqs.entry(node).or_default();
                *seq += 1;
                let time_ns = 1_700_000_000_000_000_000 + u64::from(node) * 1_000 + *seq;
                let origin = Origin::default();
                let path = self.path.clone().into_bytes();
                (Seq(*seq), Record { time_ns, origin, uid: 0, gid: 0, path, op: op.clone() })
            })
            .collect();
        let upto = records.last().unwrap().0;
        let changes: Vec<Incoming<'_>> = records
            .iter()
            .zip(steps)
            .map(|((seq, record), (op, bytes))| {
                let content = match op {
                    Op::Store { .. } => Content::Inline(bytes),
                    _ => Content::None,
                };
                Incoming { seq: *seq, record, content }
            })
            .collect();
        let out = self.v().apply(node, upto, &changes);
        assert!(out.failure.is_none(), "{:?}", out.failure);
        assert_eq!(out.upto, upto);
        let before = (self.v().stamp(), self.v().conflicts());
        let again = self.v().apply(node, upto, &changes);
        assert!(again.failure.is_none() && again.stamps.is_empty());
        assert_eq!((self.v().stamp(), self.v().conflicts()), before, "twice is once");
        out
    }
    fn ids(&self) -> BTreeSet<String> {
        let all = self.dir.path().join(".imz-conflicts");
        let Ok(entries) = fs::read_dir(all) else { return BTreeSet::new() };
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }
    fn kept(&self, id: &str) -> PathBuf {
        self.dir.path().join(".imz-conflicts").join(id)
    }
}

/// What is there when the two part: a directory of the pair's own with these in it.
struct Base {
    name: String,
    dir: Fid,
    /// `f`, `o` and `p`: files with their names in them
    f: Fid,
    o: Fid,
    p: Fid,
    /// a directory with the file `k`
    d: Fid,
    k: Fid,
    stamp: Stamp,
}

fn name(text: &str) -> Name {
    Name::new(text.as_bytes()).unwrap()
}

impl Base {
    fn new(world: &mut World, no: usize) -> Base {
        let [dir, f, o, p, d, k] = std::array::from_fn(|_| world.fid(MAKER));
        let name = format!("pair{no}");
        let steps = [
            vec![mkdir(at(ROOT, &name), dir), mkdir(at(dir, "d"), d)],
            new_file(at(dir, "f"), f, b"f at first"),
            new_file(at(dir, "o"), o, b"o"),
            new_file(at(dir, "p"), p, b"p"),
            new_file(at(d, "k"), k, b"k at first"),
        ];
        let out = world.apply(MAKER, &steps.concat());
        assert!(out.conflicts.is_empty());
        let stamp = world.v().stamp();
        Base { name, dir, f, o, p, d, k, stamp }
    }
    fn gone(&self, fid: Fid) -> Gone {
        Gone { fid, base: self.stamp, attr: Attr::default(), target: None }
    }
    fn place(&self, text: &str) -> Place {
        Place { dir: self.dir, base: self.stamp, name: name(text) }
    }
}

fn at(dir: Fid, text: &str) -> Place {
    Place { dir, base: Stamp(0), name: name(text) }
}

fn mkdir(at: Place, fid: Fid) -> Step {
    (Op::Mkdir { at, fid, mode: 0o755, umask: 0 }, Vec::new())
}

fn store(fid: Fid, base: Stamp, bytes: &[u8]) -> Step {
    let size = bytes.len() as u64;
    let ranges = vec![Range { at: 0, len: size }];
    let mtime = Time { sec: 1_600_000_000 + (fid.counter() as i64), nsec: 1 };
    (Op::Store { fid, base, size, mtime, ranges, old_size: 0 }, bytes.to_vec())
}

fn new_file(at: Place, fid: Fid, bytes: &[u8]) -> Vec<Step> {
    let create = Op::Create { at, fid, mode: 0o644, umask: 0 };
    vec![(create, Vec::new()), store(fid, Stamp(0), bytes)]
}

/// One of the two clients, and what it makes.
struct Client {
    node: u32,
    /// of what it makes
    fid: Fid,
    text: String,
}

impl Client {
    fn new(world: &mut World, node: u32, base: &Base) -> Client {
        Client { node, fid: world.fid(node), text: format!("by {node} in {}", base.name) }
    }
    fn is_own(&self) -> bool {
        self.node == OWN
    }
    /// Two clients use two names, where not the names are what is looked at.
    fn named(&self, stem: &str) -> String {
        format!("{stem}{}", self.node)
    }
    /// The file of the base that it uses.
    fn source(&self, base: &Base) -> (Fid, &'static str) {
        if self.is_own() { (base.o, "o") } else { (base.p, "p") }
    }
    fn mode(&self) -> u32 {
        if self.is_own() { 0o640 } else { 0o600 }
    }

    /// The records of what a table calls by this word.
    fn does(&self, table: &str, word: &str, base: &Base) -> Vec<Step> {
        let (fid, stamp, text) = (self.fid, base.stamp, self.text.as_bytes());
        let rename = |from: Place, to: Place, fid, over| {
            vec![(Op::Rename { from, to, fid, base: stamp, over }, Vec::new())]
        };
        let (source, source_name) = self.source(base);
        let set = |fid, new, old| vec![(Op::Setattr { fid, base: stamp, new, old }, Vec::new())];
        let chmod = |fid, old| {
            let of = |mode| Change { mode: Some(mode), ..Change::default() };
            set(fid, of(self.mode()), of(old))
        };
        let xattr = |fid| {
            let (name, value) = (b"user.x".to_vec(), self.node.to_string().into_bytes());
            vec![(Op::Setxattr { fid, base: stamp, name, value, old: None }, Vec::new())]
        };
        let link = |at, fid| vec![(Op::Link { at, fid, base: stamp }, Vec::new())];
        let unlink = |at, fid| vec![(Op::Unlink { at, gone: base.gone(fid) }, Vec::new())];
        let in_d = |text: &str| Place { dir: base.d, base: stamp, name: name(text) };
        let n = || base.place("n");
        match (table, word) {
            ("names", "create") => new_file(n(), fid, text),
            ("names", "the same") => new_file(n(), fid, b"the same"),
            ("names", "mkdir") => vec![mkdir(n(), fid)],
            ("names", "symlink") => {
                vec![(Op::Symlink { at: n(), fid, target: b"t".to_vec() }, Vec::new())]
            }
            ("names", "mknod") => {
                let (mode, umask, rdev) = (0o010_644, 0, 0);
                vec![(Op::Mknod { at: n(), fid, mode, umask, rdev }, Vec::new())]
            }
            ("names", "link") => link(n(), source),
            ("names", "rename") => rename(base.place(source_name), n(), source, FREE),

            ("files", "store") => vec![store(base.f, stamp, text)],
            ("files", "the same") => vec![store(base.f, stamp, b"the same")],
            ("files", "truncate") => {
                let size = Some(if self.is_own() { 3 } else { 2 });
                set(base.f, Change { size, ..Change::default() }, Change::default())
            }
            ("files", "chmod") => chmod(base.f, 0o644),
            ("files", "utimes") => {
                let mtime = Some(Time { sec: self.node.into(), nsec: 7 });
                set(base.f, Change { mtime, ..Change::default() }, Change::default())
            }
            ("files", "xattr") => xattr(base.f),
            ("files", "unlink") => unlink(base.place("f"), base.f),
            ("files", "rename") => {
                rename(base.place("f"), base.place(&self.named("f")), base.f, FREE)
            }
            ("files", "replace") => {
                let temp = base.place(&self.named("temp"));
                let over = Over::Replaced(base.gone(base.f));
                let put = rename(temp.clone(), base.place("f"), fid, over);
                [new_file(temp, fid, text), put].concat()
            }
            ("files", "remake") => {
                [unlink(base.place("f"), base.f), new_file(base.place("f"), fid, text)].concat()
            }
            ("files", "link") => link(base.place(&self.named("l")), base.f),

            ("directories", "rm -r") => {
                let rmdir = Op::Rmdir { at: base.place("d"), gone: base.gone(base.d) };
                [unlink(in_d("k"), base.k), vec![(rmdir, Vec::new())]].concat()
            }
            ("directories", "store") => vec![store(base.k, stamp, text)],
            ("directories", "create") => new_file(in_d(&self.named("c")), fid, text),
            ("directories", "mkdir") => vec![mkdir(in_d(&self.named("m")), fid)],
            ("directories", "link") => link(in_d(&self.named("l")), source),
            ("directories", "move in") => {
                rename(base.place(source_name), in_d(&self.named("r")), source, FREE)
            }
            ("directories", "rename") => {
                rename(base.place("d"), base.place(&self.named("d")), base.d, FREE)
            }
            ("directories", "chmod") => chmod(base.d, 0o755),
            ("directories", "xattr") => xattr(base.d),
            other => panic!("the manual has words that nobody knows: {other:?}"),
        }
    }

    /// Whether that stands in the tree.
    fn is_done(&self, table: &str, word: &str, base: &Base, world: &mut World) -> bool {
        let (fid, text) = (self.fid, self.text.as_bytes());
        let (source, source_name) = self.source(base);
        let f = world.v().stat(base.f).ok();
        let d = world.v().stat(base.d).ok();
        let read = |world: &mut World, fid| bytes_of(world, fid);
        let has_mode =
            |it: Option<Object>| it.is_some_and(|it| it.attr.mode & 0o777 == self.mode());
        let has_xattr = |it: Option<Object>| {
            let value = self.node.to_string().into_bytes();
            it.is_some_and(|it| it.xattrs.contains(&(b"user.x".to_vec(), value)))
        };
        let own = Some(fid);
        let mut here = |dir, name: &str| entry(world, dir, name).map(|it| it.fid);
        match (table, word) {
            ("names", "create") => here(base.dir, "n") == own && read(world, fid) == text,
            ("names", "the same") => {
                let n = here(base.dir, "n");
                n.is_some_and(|n| read(world, n) == b"the same")
            }
            ("names", "mkdir") => kind(world, base.dir, "n") == 0o040_000,
            ("names", "symlink") => kind(world, base.dir, "n") == 0o120_000,
            ("names", "mknod") => kind(world, base.dir, "n") == 0o010_000,
            ("names", "link") => here(base.dir, "n") == Some(source),
            ("names", "rename") => {
                here(base.dir, "n") == Some(source) && here(base.dir, source_name).is_none()
            }
            ("files", "store") => read(world, base.f) == text,
            ("files", "the same") => read(world, base.f) == b"the same",
            ("files", "truncate") => {
                f.is_some_and(|it| it.attr.size == if self.is_own() { 3 } else { 2 })
            }
            ("files", "chmod") => has_mode(f),
            ("files", "utimes") => f.is_some_and(|it| it.attr.mtime.sec == i64::from(self.node)),
            ("files", "xattr") => has_xattr(f),
            ("files", "unlink") => here(base.dir, "f") != Some(base.f),
            ("files", "rename") => here(base.dir, &self.named("f")) == Some(base.f),
            ("files", "replace" | "remake") => {
                here(base.dir, "f") == own && read(world, fid) == text
            }
            ("files", "link") => here(base.dir, &self.named("l")) == Some(base.f),
            ("directories", "rm -r") => here(base.dir, "d").is_none(),
            ("directories", "store") => read(world, base.k) == text,
            ("directories", "create") => {
                here(base.d, &self.named("c")) == own && read(world, fid) == text
            }
            ("directories", "mkdir") => here(base.d, &self.named("m")) == own,
            ("directories", "link") => here(base.d, &self.named("l")) == Some(source),
            ("directories", "move in") => here(base.d, &self.named("r")) == Some(source),
            ("directories", "rename") => here(base.dir, &self.named("d")) == Some(base.d),
            ("directories", "chmod") => has_mode(d),
            ("directories", "xattr") => has_xattr(d),
            other => panic!("{other:?}"),
        }
    }

    /// What is kept when this one's object is: name and, of a file, bytes.
    fn would_be_kept(&self, table: &str, word: &str) -> (String, Option<Vec<u8>>) {
        let text = Some(self.text.clone().into_bytes());
        let named = |stem| self.named(stem);
        match (table, word) {
            ("names", "create") => ("n".into(), text),
            ("names", "the same") => ("n".into(), Some(b"the same".to_vec())),
            ("names", "link" | "rename") => ("n".into(), Some(b"o".to_vec())),
            ("names", _) => ("n".into(), None),
            ("files", _) => ("f".into(), text),
            (_, "create") => (named("c"), text),
            (_, "mkdir") => (named("m"), None),
            (_, "link") => (named("l"), Some(b"o".to_vec())),
            other => panic!("{other:?} is never kept"),
        }
    }
    /// Bytes that it wrote and that nobody has removed since.
    fn wrote(&self, steps: &[Step]) -> Option<Vec<u8>> {
        steps.iter().find(|(op, _)| matches!(op, Op::Store { .. })).map(|(_, bytes)| bytes.clone())
    }
}

fn entry(world: &mut World, dir: Fid, name: &str) -> Option<Object> {
    let page = world.v().list(dir, b"").ok()?;
    page.entries.into_iter().find(|(n, _)| n == name.as_bytes()).map(|it| it.1)
}

fn kind(world: &mut World, dir: Fid, name: &str) -> u32 {
    entry(world, dir, name).map_or(0, |it| it.attr.mode & 0o170_000)
}

fn bytes_of(world: &mut World, fid: Fid) -> Vec<u8> {
    let Ok(object) = world.v().stat(fid) else { return Vec::new() };
    let piece = world.v().read(MAKER, fid, 0, 1 << 20, object.stamp);
    piece.map(|it| it.bytes).unwrap_or_default()
}

/// All files' bytes below a directory.
fn all_bytes(dir: &Path, into: &mut Vec<Vec<u8>>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let kind = fs::symlink_metadata(&path).unwrap();
        if kind.is_dir() {
            all_bytes(&path, into);
        } else if kind.is_file() {
            into.push(fs::read(path).unwrap());
        }
    }
}

/// The word at the left, and the cells.
type Row = (String, Vec<String>);

/// The tables of the manual: name, words of the columns, rows.
fn tables() -> Vec<(String, Vec<String>, Vec<Row>)> {
    let parts = MANUAL.split(".\\\" TABLE ").skip(1);
    parts
        .map(|part| {
            let (name, rest) = part.split_once('\n').unwrap();
            let text = rest.split(".TE").next().unwrap();
            let mut rows = text.lines().filter(|line| line.contains('\t')).map(|line| {
                let mut cells = line.split('\t').map(|cell| cell.trim().replace("\\-", "-"));
                (cells.next().unwrap(), cells.collect::<Vec<_>>())
            });
            let (_, head) = rows.next().unwrap();
            (name.to_owned(), head, rows.collect())
        })
        .collect()
}

#[test]
fn every_pair_is_as_the_manual_has_it() {
    let mut world = World::new();
    let (mut no, mut wrong, mut seen) = (0, Vec::new(), BTreeMap::new());
    for (table, head, rows) in tables() {
        for (first, cells) in &rows {
            assert_eq!(cells.len(), head.len(), "{table}: {first}");
            for (second, want) in head.iter().zip(cells) {
                no += 1;
                let got = run(&mut world, no, &table, first, second, want);
                if let Err(why) = got {
                    wrong.push(format!("{table}: {first} then {second}: {why}"));
                }
                *seen.entry(want.clone()).or_insert(0) += 1;
            }
        }
        // all changes are there in both ways
        let firsts: BTreeSet<&String> = rows.iter().map(|row| &row.0).collect();
        assert_eq!(firsts, head.iter().collect(), "{table}");
    }
    println!("{no} pairs: {seen:?}");
    assert!(wrong.is_empty(), "{} of {no} pairs:\n{}", wrong.len(), wrong.join("\n"));
    assert!(no > 240 && seen.len() == 7, "{no} {seen:?}");
    let before = (world.v().conflicts(), world.ids());
    assert_eq!(before.0, before.1.len() as u64);
    world.open();
    assert_eq!((world.v().conflicts(), world.ids()), before, "found again");
}

/// One pair: `Ok` when all is as the cell says.
fn run(
    world: &mut World,
    no: usize,
    table: &str,
    first: &str,
    second: &str,
    want: &str,
) -> Result<(), String> {
    let base = Base::new(world, no);
    let (other, own) = (Client::new(world, OTHER, &base), Client::new(world, OWN, &base));
    let theirs = other.does(table, first, &base);
    let before = world.ids();
    let out = world.apply(OTHER, &theirs);
    assert!(out.conflicts.is_empty() && world.ids() == before, "{first}: nobody else is there yet");
    assert!(other.is_done(table, first, &base, world), "{table}: {first}");
    let mine = own.does(table, second, &base);
    world.apply(OWN, &mine);
    let ids = world.ids();
    let new: Vec<&String> = ids.difference(&before).collect();
    let (theirs_done, own_done) =
        (other.is_done(table, first, &base, world), own.is_done(table, second, &base, world));
    let mut found = Vec::new();
    all_bytes(&world.dir.path().join(&base.name), &mut found);
    new.iter().for_each(|id| all_bytes(&world.kept(id), &mut found));
    for bytes in [other.wrote(&theirs), own.wrote(&mine)].into_iter().flatten() {
        if !found.contains(&bytes) {
            return Err(format!("the bytes {:?} are lost", String::from_utf8_lossy(&bytes)));
        }
    }
    let kept = |id: &str| {
        let dir = world.kept(id);
        let told: serde_json::Value =
            serde_json::from_slice(&fs::read(dir.join("record.json")).unwrap()).unwrap();
        assert_eq!(told["mine"]["host"], "host2", "{told:#}");
        let theirs = &told["theirs"];
        // what is gone says who removed it, as long as that is not long ago
        assert!(theirs["host"] == "host1" || theirs["host"] == "host3", "{told:#}");
        assert!(theirs["stamp"].as_u64().is_some_and(|stamp| stamp > 0), "{told:#}");
        let (name, bytes) = match second {
            "store" | "the same" if dir.join("data").exists() => ("data".to_owned(), None),
            _ => (String::new(), None::<Vec<u8>>),
        };
        match (&name[..], dir.join("kept").exists()) {
            ("data", _) => match fs::read(dir.join("data")).unwrap() == own.wrote(&mine).unwrap() {
                true => "data",
                false => "other data",
            },
            (_, true) => {
                let (name, bytes) = (own.would_be_kept(table, second), bytes);
                let path = dir.join("kept").join(&name.0);
                let (Ok(meta), None) = (fs::symlink_metadata(&path), bytes) else {
                    return "nothing where it should be kept";
                };
                match name.1 {
                    Some(bytes) if !meta.is_file() || fs::read(&path).unwrap() != bytes => {
                        "something else"
                    }
                    _ if meta.uid() != 0 => "of somebody else",
                    _ => "kept",
                }
            }
            _ => "note",
        }
    };
    let got = match (&new[..], theirs_done, own_done) {
        ([], true, true) if table == "names" && first == "mkdir" => "one",
        ([], true, true) => "both",
        ([], false, true) => "last",
        ([], true, false) => "-",
        ([], false, false) => "nothing is done",
        ([_], false, _) => "the other's is not done any more",
        ([id], true, _) => kept(id),
        _ => "more than one conflict",
    };
    // what is there already, or the same for both, is done by both, and is no change
    let is_same = got == "both" && want == "-";
    if got == want || is_same { Ok(()) } else { Err(format!("{want} it says, {got} it is")) }
}

/// Names below a directory, and the bytes of files.
fn tree(dir: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(tree(&path));
            found.insert(path, None);
        } else {
            let bytes = fs::read(&path).unwrap();
            found.insert(path, Some(bytes));
        }
    }
    found
}

/// A crash comes when a decision is in the tree, and the conflict not forgotten yet.
#[test]
fn a_decision_that_a_crash_cut_off_has_the_same_outcome() {
    let mut world = World::new();
    let pairs = [
        ("files", "store", "store", "f"),
        ("files", "unlink", "store", "f"),
        ("files", "store", "replace", "f"),
        ("names", "create", "create", "n"),
        ("files", "chmod", "chmod", "f"),
    ];
    let choices = ["mine", "theirs", "both", "keep"];
    let mut no = 1000;
    for ((table, first, second, name), choice) in
        pairs.iter().flat_map(|pair| choices.iter().map(move |choice| (*pair, *choice)))
    {
        if second == "chmod" && matches!(choice, "both" | "keep") {
            continue;
        }
        no += 1;
        let shown = format!("{table}: {first} then {second}: {choice}");
        let base = Base::new(&mut world, no);
        let dir = world.dir.path().join(&base.name);
        world.path = format!("{}/{name}", base.name);
        let (other, own) =
            (Client::new(&mut world, OTHER, &base), Client::new(&mut world, OWN, &base));
        world.apply(OTHER, &other.does(table, first, &base));
        world.apply(OWN, &own.does(table, second, &base));
        let ids = world.ids();
        assert_eq!(ids.len(), 1, "{shown}");
        let id = ids.first().unwrap();
        let (entry, aside) = (world.kept(id), world.dir.path().join(".imz/aside"));
        let copied = std::process::Command::new("cp").arg("-a").args([&entry, &aside]).status();
        assert!(copied.unwrap().success());
        let of = match choice {
            "mine" => Choice::Mine,
            "theirs" => Choice::Theirs,
            "both" => Choice::Both,
            _ => Choice::Keep(format!("{}/kept here", base.name).into_bytes()),
        };
        let mut out = Applied::default();
        world.v().resolve(id, &of, None, &mut out).unwrap_or_else(|e| panic!("{shown}: {e}"));
        assert!(world.ids().is_empty() && world.v().conflicts() == 0, "{shown}");
        let after = tree(&dir);
        let own_bytes = Some(own.text.clone().into_bytes());
        let is_there = after.values().any(|bytes| *bytes == own_bytes);
        assert_eq!(is_there, choice != "theirs" && second != "chmod", "{shown}: {after:?}");
        let named = after.get(&dir.join(name)).cloned().flatten();
        match (choice, second) {
            (_, "chmod") => {}
            ("mine", _) => assert_eq!(named, own_bytes, "{shown}"),
            _ => assert_ne!(named, own_bytes, "{shown}"),
        }
        // what was moved into the tree is not there any more; all else is
        let is_moved = ["both", "keep"].contains(&choice)
            || (choice == "mine" && (first, second) != ("store", "store"));
        if is_moved {
            let _ = fs::remove_file(aside.join("data")); // it has one or the other
            if let Ok(kept) = fs::read_dir(aside.join("kept")) {
                kept.for_each(|it| fs::remove_file(it.unwrap().path()).unwrap());
            }
        }
        fs::rename(&aside, &entry).unwrap();
        world.open();
        if world.ids().contains(id) {
            assert!(!is_moved || second == "chmod", "{shown}");
            world.v().resolve(id, &of, None, &mut out).unwrap_or_else(|e| panic!("{shown}: {e}"));
        }
        assert!(world.ids().is_empty() && world.v().conflicts() == 0, "{shown}");
        assert_eq!(tree(&dir), after, "{shown}");
    }
}

/// What this client does later with what was kept aside is done there, or ends the conflict.
#[test]
fn what_depends_on_a_conflict_goes_where_that_went() {
    let mut world = World::new();
    let base = Base::new(&mut world, 1);
    let steps = new_file(base.place("n"), Fid::new(OTHER, 900), b"of the other");
    world.apply(OTHER, &steps);
    let kept = |world: &World| -> Vec<String> {
        let found = world.ids();
        let found = found.iter().flat_map(|id| tree(&world.kept(id).join("kept")));
        let mut names: Vec<String> =
            found.map(|it| it.0.file_name().unwrap().to_str().unwrap().to_owned()).collect();
        names.sort();
        names
    };
    let f = |no| Fid::new(OWN, no);
    // below a directory that is kept, and out of it again
    world.apply(OWN, &[mkdir(base.place("n"), f(901))]);
    world.apply(OWN, &new_file(at(f(901), "below"), f(902), b"below"));
    world.apply(OWN, &[mkdir(at(f(901), "sub"), f(903))]);
    assert_eq!(kept(&world), ["below", "n", "sub"]);
    let rename = |from, to, fid, over| (Op::Rename { from, to, fid, base: Stamp(0), over }, vec![]);
    let out = rename(at(f(901), "below"), base.place("outside"), f(902), FREE);
    world.apply(OWN, &[out]);
    assert_eq!(bytes_of(&mut world, f(902)), b"below");
    assert_eq!(entry(&mut world, base.dir, "outside").unwrap().fid, f(902));
    // under a name that is free there is no conflict any more
    world.apply(OWN, &[rename(base.place("n"), base.place("free"), f(901), FREE)]);
    assert_eq!((world.ids().len(), world.v().conflicts()), (0, 0));
    assert_eq!(entry(&mut world, base.dir, "free").unwrap().fid, f(901));
    assert_eq!(entry(&mut world, f(901), "sub").unwrap().fid, f(903));

    // a file: replaced by its own client, and removed
    world.apply(OWN, &new_file(base.place("n"), f(910), b"one"));
    world.apply(OWN, &new_file(base.place("temp"), f(911), b"two"));
    let over = Over::Replaced(base.gone(f(910)));
    world.apply(OWN, &[rename(base.place("temp"), base.place("n"), f(911), over)]);
    assert_eq!((kept(&world), world.v().conflicts()), (vec!["n".to_owned()], 1));
    assert_eq!(bytes_of(&mut world, f(911)), b"two");
    world.open();
    world.apply(OWN, &[(Op::Unlink { at: base.place("n"), gone: base.gone(f(911)) }, vec![])]);
    assert_eq!((world.ids().len(), world.v().conflicts()), (0, 0));

    // the same contents, in two steps: the client's file is the other's
    world.apply(OWN, &new_file(base.place("n"), f(920), b"of the other"));
    assert_eq!((world.ids().len(), world.v().conflicts()), (0, 0));
    let stamp = entry(&mut world, base.dir, "n").unwrap().stamp;
    world.apply(OWN, &[store(f(920), stamp, b"written on")]);
    assert_eq!(bytes_of(&mut world, Fid::new(OTHER, 900)), b"written on");

    // a hundred changes of one file are one conflict, with the last contents
    world.apply(OTHER, &[store(base.f, base.stamp, b"the other's f")]);
    for no in 0..100 {
        world.apply(OWN, &[store(base.f, base.stamp, format!("own {no}").as_bytes())]);
    }
    assert_eq!(world.ids().len(), 1);
    let id = world.ids().pop_first().unwrap();
    assert_eq!(fs::read(world.kept(&id).join("data")).unwrap(), b"own 99");
    let (page, more) = world.v().list_conflicts("").unwrap();
    assert!(page.len() == 1 && !more && page[0].told.contains("\"changes\":100"), "{page:?}");
}

/// The other client has moved the file away and made another of its name, as logs are rotated.
#[test]
fn a_name_that_stands_for_another_file_now() {
    let mut world = World::new();
    let base = Base::new(&mut world, 1);
    let rename = Op::Rename {
        from: base.place("f"),
        to: base.place("f.old"),
        fid: base.f,
        base: base.stamp,
        over: FREE,
    };
    let fresh = Fid::new(OTHER, 900);
    world.apply(OTHER, &[(rename, vec![])]);
    world.apply(OTHER, &new_file(base.place("f"), fresh, b"fresh"));
    // it is not that one which is removed
    world.apply(OWN, &[(Op::Unlink { at: base.place("f"), gone: base.gone(base.f) }, vec![])]);
    assert_eq!(world.v().conflicts(), 1);
    assert_eq!(bytes_of(&mut world, fresh), b"fresh");
    // and what is written goes to the old one
    let out = world.apply(OWN, &[store(base.f, base.stamp, b"more")]);
    assert!(out.conflicts.is_empty());
    assert_eq!(entry(&mut world, base.dir, "f.old").unwrap().attr.size, 4);
    assert_eq!(bytes_of(&mut world, base.f), b"more");
    // removed by both, and made anew by one: no conflict
    world.apply(OTHER, &[(Op::Unlink { at: base.place("o"), gone: base.gone(base.o) }, vec![])]);
    world.apply(OTHER, &new_file(base.place("o"), Fid::new(OTHER, 901), b"new o"));
    let out =
        world.apply(OWN, &[(Op::Unlink { at: base.place("o"), gone: base.gone(base.o) }, vec![])]);
    assert!(out.conflicts.is_empty() && world.v().conflicts() == 1);
    assert_eq!(bytes_of(&mut world, Fid::new(OTHER, 901)), b"new o");
}
