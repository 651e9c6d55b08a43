//! A tree as it is against what imz knew of it: every difference, object by object.
//!
//! ```text
//!   imz knew (before)             what differs          and how it is told
//!   the attribute on an object    New, Damaged          it has none; it does not verify
//!   the index: fid -> places      Moved, Missing        the fid stands elsewhere; nowhere
//!   both                          Copied                two objects (inodes) with one fid
//!   the newest records            Changed: size, mtime, mode, owner
//!   when imz stopped cleanly      Changed: ctime        no user can set a ctime
//! ```
//!
//! What it cannot notice. An attribute holds no size, time or mode, so that a change in place shows
//! only against the journal's newest record of the object, or by its ctime after a clean stop: while
//! a server runs, or after it was killed, a change of a file which the journal has no record of
//! looks like imz's own (giving a fid sets the ctime, too). A file that was moved over another is
//! Moved and Missing; two that changed names are both Moved; what was removed and made anew under
//! its name is Missing and New. A clock that was set back hides changes by ctime alone.
//!
//! The walk holds open one directory a level, follows no link, and changes nothing. Memory: some 40
//! bytes an object. Absent on purpose: what to do about a difference.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::index::view::View;
use super::index::{At, Index, IndexError};
use super::meta::Meta;
use super::tree::is_own;
use crate::kml::codec::{Entry, Outcome};
use crate::kml::record::{Fid, Name, Op, ROOT, Time};
use crate::sys::fs::{self, Kind, Stat, xattr};
use crate::sys::{Errno, cred};

/// Where objects stand, as far as imz knew.
pub trait Places {
    /// # Errors
    /// It cannot be read.
    fn of(&self, fid: Fid) -> Result<Vec<At>, IndexError>;
    /// # Errors
    /// It cannot be read.
    fn all(&self, each: &mut dyn FnMut(Fid, Vec<At>)) -> Result<(), IndexError>;
    /// Metadata of an object that carries no attribute.
    ///
    /// # Errors
    /// It cannot be read.
    fn loose(&self, dir: Fid, name: &[u8]) -> Result<Option<Vec<u8>>, IndexError>;
}

impl Places for Index {
    fn of(&self, fid: Fid) -> Result<Vec<At>, IndexError> {
        self.names(fid)
    }
    fn all(&self, each: &mut dyn FnMut(Fid, Vec<At>)) -> Result<(), IndexError> {
        Index::all(self, each)
    }
    fn loose(&self, dir: Fid, name: &[u8]) -> Result<Option<Vec<u8>>, IndexError> {
        Index::loose(self, dir, name)
    }
}

impl Places for View {
    fn of(&self, fid: Fid) -> Result<Vec<At>, IndexError> {
        self.names(fid)
    }
    fn all(&self, each: &mut dyn FnMut(Fid, Vec<At>)) -> Result<(), IndexError> {
        View::all(self, each)
    }
    fn loose(&self, dir: Fid, name: &[u8]) -> Result<Option<Vec<u8>>, IndexError> {
        View::loose(self, dir, name)
    }
}

/// What the newest records say of one object; `None` is not known.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Facts {
    pub size: Option<u64>,
    pub mtime: Option<Time>,
    /// permission bits
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

/// What imz knew, beside the attributes.
pub struct Knowledge<'a> {
    /// `None`: the index is lost; no object is Moved or Missing then
    pub places: Option<&'a dyn Places>,
    /// by the journal, see [`learn`]
    pub facts: HashMap<Fid, Facts>,
    /// imz itself changed nothing after this moment, seconds and nanoseconds
    pub stopped_at: Option<(i64, u32)>,
}

/// Takes in one record of the volume's journal, in order.
pub fn learn(facts: &mut HashMap<Fid, Facts>, entry: &Entry) {
    let Some(fid) = entry.record.op.fid() else { return };
    if entry.outcome == Outcome::Void {
        return;
    }
    if entry.outcome == Outcome::Intended {
        facts.remove(&fid);
        return;
    }
    let time_ns = entry.record.time_ns;
    let made =
        Time { sec: (time_ns / 1_000_000_000) as i64, nsec: (time_ns % 1_000_000_000) as u32 };
    match &entry.record.op {
        // its mode and owner depend on the directory where it is made
        Op::Create { .. } => {
            let new = Facts { size: Some(0), mtime: Some(made), ..Facts::default() };
            facts.insert(fid, new);
        }
        Op::Store { size, mtime, .. } => {
            let known = facts.entry(fid).or_default();
            (known.size, known.mtime) = (Some(*size), Some(*mtime));
        }
        Op::Setattr { new, .. } => {
            let known = facts.entry(fid).or_default();
            if new.size.is_some() {
                (known.size, known.mtime) = (new.size, None);
            }
            known.mtime = new.mtime.or(known.mtime);
            known.mode = new.mode.or(known.mode);
            known.uid = new.uid.or(known.uid);
            known.gid = new.gid.or(known.gid);
            if new.uid.or(new.gid).is_some() && new.mode.is_none() {
                known.mode = None; // a change of owner takes set-id bits away
            }
        }
        Op::Unlink { gone, .. } | Op::Rmdir { gone, .. } if gone.attr.nlink <= 1 => {
            facts.remove(&fid);
        }
        _ => {}
    }
}

/// One object that stands in the tree.
#[derive(Clone, Debug)]
pub struct Spot {
    /// the directory's fid; `None` where it has none that can be read
    pub dir: Option<Fid>,
    pub name: Name,
    /// from the root, without a leading slash
    pub path: Vec<u8>,
    pub stat: Stat,
    /// what imz's attribute says, if there is one that verifies
    pub meta: Option<Meta>,
}

/// Which attributes are not as imz knew them.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Changes {
    pub size: bool,
    pub mtime: bool,
    pub mode: bool,
    pub owner: bool,
    /// something was changed after imz stopped: perhaps this is all that is known
    pub ctime: bool,
}

/// What is not as imz knew it.
#[derive(Clone, Debug)]
pub enum Difference {
    /// nobody gave it a fid
    New,
    /// what imz knew of it cannot be read
    Damaged,
    /// another object, seen before, has the same fid
    Copied,
    /// it stood at these places, and not here
    Moved {
        was: Vec<At>,
    },
    Changed(Changes),
    /// a fid whose object stands nowhere
    Missing {
        fid: Fid,
        was: Vec<At>,
    },
}

/// What the caller is told of.
pub enum Found<'a> {
    /// an object of the tree, and the directory that it stands in, open
    Object(&'a Spot, &'a OwnedFd),
    /// it differs; after its `Object`. A missing one has no spot
    Differs(Option<&'a Spot>, Difference),
    /// a directory or an object cannot be read
    Failed { path: &'a [u8], error: Errno },
}

/// The walk was ended by its caller, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    #[error("interrupted")]
    Stopped,
    #[error("the tree: {0}")]
    Root(Errno),
    #[error("{0}")]
    Index(#[from] IndexError),
}

/// A directory to be walked through.
struct Step {
    parent: Arc<OwnedFd>,
    name: Option<Name>,
    fid: Option<Fid>,
    path: Vec<u8>,
}

/// Walks the tree, and tells of every object and every difference; `tell` says false to stop.
/// imz's own two names at the root are left out.
///
/// # Errors
/// [`CompareError`]; what cannot be read further down is told, and passed over.
pub fn compare(
    root: OwnedFd,
    known: &Knowledge<'_>,
    tell: &mut dyn FnMut(Found<'_>) -> bool,
) -> Result<(), CompareError> {
    let mut walk = Walk { known, seen: HashMap::new(), tell };
    let root = Arc::new(root);
    let step = Step { parent: root, name: None, fid: Some(ROOT), path: Vec::new() };
    let mut steps = vec![step];
    while let Some(step) = steps.pop() {
        let opened = match &step.name {
            None => Ok(step.parent.clone()),
            Some(name) => {
                fs::open(&*step.parent, name.as_bytes(), fs::o::DIRECTORY, 0).map(Arc::new)
            }
        };
        let read = opened.and_then(|dir| fs::read_dir(&*dir).map(|entries| (dir, entries)));
        let (dir, entries) = match read {
            Ok(read) => read,
            Err(e) if step.name.is_none() => return Err(CompareError::Root(e)),
            Err(error) => {
                walk.tell(Found::Failed { path: &step.path, error })?;
                continue;
            }
        };
        for entry in entries {
            let Ok(name) = Name::new(&entry.name) else { continue };
            if step.name.is_none() && is_own(name.as_bytes()) {
                continue;
            }
            let mut path = step.path.clone();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name.as_bytes());
            if let Some(fid) = walk.object(&dir, step.fid, &name, &path)? {
                steps.push(Step { parent: dir.clone(), name: Some(name), fid, path });
            }
        }
    }
    walk.missing()
}

struct Walk<'a, 'b> {
    known: &'a Knowledge<'a>,
    /// fid -> inode
    seen: HashMap<Fid, u64>,
    tell: &'a mut (dyn FnMut(Found<'_>) -> bool + 'b),
}

impl Walk<'_, '_> {
    fn tell(&mut self, found: Found<'_>) -> Result<(), CompareError> {
        if (self.tell)(found) { Ok(()) } else { Err(CompareError::Stopped) }
    }

    /// `Some`: it is a directory, with this fid if it has one.
    fn object(
        &mut self,
        dir: &Arc<OwnedFd>,
        parent: Option<Fid>,
        name: &Name,
        path: &[u8],
    ) -> Result<Option<Option<Fid>>, CompareError> {
        let stat = match fs::stat(&**dir, name.as_bytes()) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(None), // removed while we look
            Err(error) => {
                self.tell(Found::Failed { path, error })?;
                return Ok(None);
            }
        };
        let raw = match own_value(self.known, &**dir, parent, name)? {
            Ok(raw) => raw,
            Err(error) => {
                self.tell(Found::Failed { path, error })?;
                return Ok(None);
            }
        };
        let meta = raw.as_deref().map(Meta::decode);
        let spot = Spot {
            dir: parent,
            name: name.clone(),
            path: path.to_vec(),
            stat,
            meta: meta.clone().and_then(Result::ok),
        };
        self.tell(Found::Object(&spot, dir))?;
        let is_dir = stat.kind() == Kind::Dir;
        match meta {
            None => self.tell(Found::Differs(Some(&spot), Difference::New))?,
            Some(Err(_)) => self.tell(Found::Differs(Some(&spot), Difference::Damaged))?,
            Some(Ok(meta)) => {
                let fid = meta.fid;
                for difference in self.differences(&spot, fid)? {
                    self.tell(Found::Differs(Some(&spot), difference))?;
                }
                return Ok(is_dir.then_some(Some(fid)));
            }
        }
        Ok(is_dir.then_some(None))
    }

    fn differences(&mut self, spot: &Spot, fid: Fid) -> Result<Vec<Difference>, CompareError> {
        let mut found = Vec::new();
        match self.seen.insert(fid, spot.stat.ino) {
            Some(ino) if ino != spot.stat.ino => {
                self.seen.insert(fid, ino);
                return Ok(vec![Difference::Copied]);
            }
            _ => {}
        }
        if let (Some(places), Some(dir)) = (self.known.places, spot.dir) {
            let was = places.of(fid)?;
            if !was.iter().any(|(parent, name)| *parent == dir && *name == spot.name) {
                found.push(Difference::Moved { was });
            }
        }
        if let Some(changes) = self.changes(spot, fid) {
            found.push(Difference::Changed(changes));
        }
        Ok(found)
    }

    fn changes(&self, spot: &Spot, fid: Fid) -> Option<Changes> {
        let (stat, facts) = (&spot.stat, self.known.facts.get(&fid).copied().unwrap_or_default());
        let is_file = stat.kind() == Kind::File;
        let mtime = Time { sec: stat.mtime.0, nsec: stat.mtime.1 };
        let changes = Changes {
            size: is_file && facts.size.is_some_and(|size| size != stat.size),
            mtime: is_file && facts.mtime.is_some_and(|known| known != mtime),
            mode: facts.mode.is_some_and(|mode| mode != stat.mode & 0o7777),
            owner: cred::is_root()
                && (facts.uid.is_some_and(|uid| uid != stat.uid)
                    || facts.gid.is_some_and(|gid| gid != stat.gid)),
            ctime: self.known.stopped_at.is_some_and(|stopped| stat.ctime > stopped),
        };
        (changes != Changes::default()).then_some(changes)
    }

    /// Behind all objects: what the index knows, and the tree does not.
    fn missing(&mut self) -> Result<(), CompareError> {
        let Some(places) = self.known.places else { return Ok(()) };
        let (seen, tell, mut stopped) = (&self.seen, &mut self.tell, false);
        places.all(&mut |fid, was| {
            if !stopped && fid != ROOT && !seen.contains_key(&fid) {
                let difference = Difference::Missing { fid, was };
                stopped = !tell(Found::Differs(None, difference));
            }
        })?;
        if stopped { Err(CompareError::Stopped) } else { Ok(()) }
    }
}

/// The value of imz's attribute, or what stands for it.
fn own_value(
    known: &Knowledge<'_>,
    dir: impl AsFd,
    parent: Option<Fid>,
    name: &Name,
) -> Result<Result<Option<Vec<u8>>, Errno>, CompareError> {
    match xattr::get(&dir, name.as_bytes(), own_key()) {
        Ok(Some(value)) => Ok(Ok(Some(value))),
        Ok(None) | Err(Errno::OPNOTSUPP | Errno::PERM) => match (known.places, parent) {
            (Some(places), Some(parent)) => Ok(Ok(places.loose(parent, name.as_bytes())?)),
            _ => Ok(Ok(None)),
        },
        Err(Errno::NOENT) => Ok(Ok(None)),
        Err(error) => Ok(Err(error)),
    }
}

/// The key of imz's attribute.
pub fn own_key() -> &'static [u8] {
    if cred::is_root() { b"trusted.imz" } else { b"user.imz" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kml::record::{Change, Origin, Range, Record, Seq, Stamp};
    use crate::replica::ops::attr_of;
    use crate::replica::tree::Tree;
    use crate::sys::cred::Caller;

    const ME: Caller = Caller { uid: 0, gid: 0, umask: 0 };
    const WHEN: Time = Time { sec: 5, nsec: 6 };

    fn name(s: &str) -> Name {
        Name::new(s.as_bytes()).unwrap()
    }

    fn entry(op: Op) -> Entry {
        let origin = Origin::default();
        let record = Record { time_ns: 5_000_000_006, origin, uid: 0, gid: 0, path: vec![], op };
        Entry { seq: Seq(1), record, outcome: Outcome::Done }
    }

    struct Rig {
        dir: tempfile::TempDir,
        tree: Tree,
    }

    impl Rig {
        /// `a` (10) with `a/f` (11) in it, `g` (12), `h` (13).
        fn new() -> Rig {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir(dir.path().join("t")).unwrap();
            let index = dir.path().join("index");
            let tree = Tree::open(&dir.path().join("t"), &index, true).unwrap();
            let root = tree.root().clone();
            let a = tree.mkdir(&root, &name("a"), ME, 0o755, &Meta::whole(Fid(10)), WHEN).unwrap();
            for (at, n, fid) in [(&a, "f", 11), (&root, "g", 12), (&root, "h", 13)] {
                tree.create(at, &name(n), ME, 0o644, &Meta::whole(Fid(fid)), WHEN).unwrap();
            }
            Rig { dir, tree }
        }
        fn path(&self, name: &str) -> std::path::PathBuf {
            self.dir.path().join("t").join(name)
        }
        /// `PATH what`, sorted.
        fn differences(&self, facts: HashMap<Fid, Facts>, stop: Option<(i64, u32)>) -> Vec<String> {
            let known = Knowledge { places: Some(&self.tree.index), facts, stopped_at: stop };
            let mut all = Vec::new();
            let root = fs::open_root(&self.dir.path().join("t")).unwrap();
            compare(root, &known, &mut |found| {
                if let Found::Differs(spot, what) = found {
                    let path = spot
                        .map_or(String::new(), |it| String::from_utf8(it.path.clone()).unwrap());
                    all.push(format!("{path} {what:?}"));
                }
                true
            })
            .unwrap();
            all.sort();
            all
        }
        fn plain(&self) -> Vec<String> {
            self.differences(HashMap::new(), None)
        }
    }

    #[test]
    fn what_is_as_it_was_is_not_told() {
        assert_eq!(Rig::new().plain(), Vec::<String>::new());
    }

    #[test]
    fn every_difference_is_told() {
        let rig = Rig::new();
        std::fs::write(rig.path("a/new"), "x").unwrap();
        assert_eq!(rig.plain(), ["a/new New"]);
        std::fs::remove_file(rig.path("a/new")).unwrap();
        std::fs::rename(rig.path("g"), rig.path("a/moved")).unwrap();
        assert_eq!(rig.plain(), [r"a/moved Moved { was: [(0.1, g)] }"]);
        std::fs::rename(rig.path("a/moved"), rig.path("g")).unwrap();
        std::fs::remove_file(rig.path("h")).unwrap();
        assert_eq!(rig.plain(), [" Missing { fid: 0.d, was: [(0.1, h)] }"]);
        std::fs::write(rig.path("h"), "anew").unwrap();
        assert_eq!(rig.plain(), [" Missing { fid: 0.d, was: [(0.1, h)] }", "h New"]);
        // a copy with the attribute, and a further name
        let root = fs::open_root(&rig.dir.path().join("t")).unwrap();
        let value = xattr::get(&root, b"g", own_key()).unwrap().unwrap();
        xattr::set(&root, b"h", own_key(), &value, 0).unwrap();
        let told = rig.plain();
        assert!(told.iter().any(|it| it.ends_with(" Copied")), "{told:?}");
        xattr::set(&root, b"h", own_key(), b"rubbish", 0).unwrap();
        assert!(rig.plain().contains(&"h Damaged".to_owned()));
        std::fs::remove_file(rig.path("h")).unwrap();
        std::fs::hard_link(rig.path("g"), rig.path("i")).unwrap();
        assert!(rig.plain().contains(&"i Moved { was: [(0.1, g)] }".to_owned()));
    }

    #[test]
    fn changes_show_against_the_newest_record_and_the_stop() {
        let rig = Rig::new();
        let stat = fs::stat(&**rig.tree.root(), b"g").unwrap();
        let (fid, base) = (Fid(12), Stamp(0));
        let mut facts = HashMap::new();
        let ranges = vec![Range { at: 0, len: 3 }];
        let store = Op::Store { fid, base, size: 3, mtime: WHEN, ranges, old_size: 0 };
        learn(&mut facts, &entry(store));
        let new = Change { mode: Some(0o644), ..Change::default() };
        learn(&mut facts, &entry(Op::Setattr { fid, base, new, old: Change::default() }));
        let told = rig.differences(facts.clone(), None);
        assert_eq!(told.len(), 1);
        assert!(told[0].starts_with("g Changed(Changes { size: true, mtime: false"), "{told:?}");
        let cut = Change { size: Some(0), mtime: Some(attr_of(&stat).mtime), ..new };
        learn(&mut facts, &entry(Op::Setattr { fid, base, new: cut, old: Change::default() }));
        assert_eq!(rig.differences(facts.clone(), None), Vec::<String>::new());
        assert_eq!(rig.differences(facts, Some(stat.ctime)), Vec::<String>::new());
        let told = rig.differences(HashMap::new(), Some((stat.ctime.0 - 1, 0)));
        assert_eq!(told.len(), 4, "{told:?}");
    }
}
