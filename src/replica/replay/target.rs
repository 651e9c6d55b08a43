//! The tree that a journal is replayed onto: whose it is, where its objects are, and its bounds.
//!
//! At open the whole tree is walked once: what has a fid is found by it from then on, and files
//! with names outside of the tree (as `cp -al` makes them) are noted, for they are not ours alone.
//! imz's own two directories at the root are never looked into, so nothing in them has a fid here.
//!
//! An object without a fid gets one when a record first names it, by the record's path or place.
//! Directories on the way that no record has named yet get a fid of [`STAND_IN`]'s, until a record
//! tells their own, in this replay or a later one.
//!
//! Before a directory is used, its path is walked anew from the root, through no symbolic link: it
//! must be the one that is open. So what was put in its place meanwhile is not taken for it.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::ReplayError;
use crate::kml::record::{FID_COUNTER_BITS, Fid, NODE_MAX, Name, ROOT, Stamp};
use crate::replica::index::Index;
use crate::replica::meta::Meta;
use crate::replica::state::{self, Facts, State, StateError};
use crate::replica::tree::{Dir, OWN_NAME, Result, Tree, TreeError, is_own};
use crate::sys::fs::{self, Kind, o};
use crate::sys::{self, Errno};

/// The node whose fids stand for those that are not known yet; no client ever has its number.
const STAND_IN: u32 = NODE_MAX;
/// Deepest directory that is looked into.
const DEPTH_MAX: usize = 900;

pub struct Target {
    pub tree: Tree,
    /// inode numbers of files that have names elsewhere
    outside: HashSet<u64>,
    /// the newest version of an object in it
    pub newest: Stamp,
    /// whether something in it had no fid when it was opened
    pub is_plain: bool,
    next_stand_in: u64,
    /// kept until the end: no server and no second replay begins meanwhile
    _locks: Vec<File>,
    _root: OwnedFd,
}

impl Target {
    /// Locks the tree and looks at all of it. Without `write` nothing in it is changed, ever.
    ///
    /// # Errors
    /// `InUse` of a tree that a server or a mount has; `Cache` of a cache; what cannot be read.
    pub fn open(dir: &Path, write: bool) -> std::result::Result<Target, ReplayError> {
        let io = |source: Errno| ReplayError::Io { path: dir.to_owned(), source };
        let real = dir
            .canonicalize()
            .map_err(|e| ReplayError::NoTarget { path: dir.to_owned(), source: e })?;
        let root = fs::open_root(&real).map_err(io)?;
        if !fs::try_lock(&root).map_err(io)? {
            return Err(ReplayError::InUse { path: real });
        }
        let own = real.join(".imz");
        let above = real.parent().filter(|_| real.ends_with("tree")).map(|up| up.join(".imz"));
        for state in [Some(own.clone()), above].into_iter().flatten() {
            if facts_in(&state).is_some_and(|facts| !facts.source.is_empty()) {
                refuse_live(&real)?;
                return Err(ReplayError::Cache { path: real });
            }
        }
        refuse_live(&real)?;
        if write && facts_in(&own).is_some_and(|facts| facts.clean) {
            mark_unclean(&own)?; // its index will not know of what is done here
        }
        let locks = refuse_live(&real)?;
        let tree = Tree::look(&real, Index::in_memory().map_err(TreeError::from)?)?;
        if tree.root().meta().fid != ROOT {
            return Err(ReplayError::NotARoot { path: real });
        }
        let is_plain = tree.root().meta() == Meta { fid: ROOT, ..Meta::default() };
        let mut target = Target {
            newest: tree.root().meta().stamp,
            tree,
            outside: HashSet::new(),
            is_plain,
            next_stand_in: 2,
            _locks: locks,
            _root: root,
        };
        let mut links = HashMap::new();
        let root = target.tree.root().clone();
        target.walk(root.as_fd(), Some(ROOT), 0, &mut links)?;
        target.outside = links.into_iter().filter(|(_, left)| *left > 0).map(|it| it.0).collect();
        Ok(target)
    }

    /// `links`: of each file with several names, how many were not met yet.
    fn walk(
        &mut self,
        dir: impl AsFd,
        fid: Option<Fid>,
        depth: usize,
        links: &mut HashMap<u64, u32>,
    ) -> Result<()> {
        for entry in fs::read_dir(&dir)? {
            let Ok(name) = Name::new(&entry.name) else { continue };
            if depth == 0 && is_own(name.as_bytes()) {
                continue;
            }
            let stat = match fs::stat(&dir, name.as_bytes()) {
                Err(Errno::NOENT) => continue,
                stat => stat?,
            };
            let known = match fs::xattr::get(&dir, name.as_bytes(), self.tree.own_key()) {
                Ok(Some(value)) => {
                    let meta = Meta::decode(&value)?;
                    self.newest = self.newest.max(meta.stamp);
                    Some(meta.fid)
                }
                Ok(None) | Err(Errno::OPNOTSUPP | Errno::PERM) => None,
                Err(e) => return Err(e.into()),
            };
            match (known, fid) {
                (Some(fid), Some(parent)) => {
                    self.tree.index.add(fid, parent, &name)?;
                    if fid.node() == STAND_IN {
                        self.next_stand_in = self.next_stand_in.max(fid.counter() + 1);
                    }
                }
                _ => self.is_plain = true,
            }
            if stat.kind() == Kind::Dir && depth < DEPTH_MAX {
                let below = fs::open(&dir, name.as_bytes(), o::DIRECTORY, 0)?;
                self.walk(below, known, depth + 1, links)?;
            } else if stat.nlink > 1 {
                *links.entry(stat.ino).or_insert(stat.nlink) -= 1;
            }
        }
        Ok(())
    }

    /// Whether a file has names outside of the tree, so that a change of it would be seen there.
    pub fn is_shared(&self, stat: &fs::Stat) -> bool {
        self.outside.contains(&stat.ino)
    }

    /// Whether the directory still stands in the tree, where its path leads.
    pub fn holds(&self, dir: &Dir) -> Result<bool> {
        if dir.fid == ROOT {
            return Ok(true);
        }
        let path = self.tree.path(dir);
        match fs::open_beneath(&**self.tree.root(), &path, o::PATH | o::DIRECTORY) {
            Ok(there) => Ok(fs::fstat(there)?.ino == fs::fstat(dir)?.ino),
            Err(e) if is_elsewhere(e) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Gives what stands at `path` the number `fid`, if it has none yet; true if it has it then.
    pub fn identify(&mut self, path: &[u8], fid: Fid) -> Result<bool> {
        let mut names = Vec::new();
        for part in path.split(|byte| *byte == b'/') {
            match Name::new(part) {
                Ok(name) => names.push(name),
                Err(_) => return Ok(false),
            }
        }
        let Some(last) = names.pop() else { return Ok(false) };
        if !self.wants_number(path)? {
            return Ok(false);
        }
        let mut dir = self.tree.root().clone();
        for (depth, name) in names.iter().enumerate() {
            let own = depth == 0 && is_own(name.as_bytes());
            if own || !self.is_dir(&dir, name)? {
                return Ok(false);
            }
            if self.tree.meta(&dir, name)?.is_none() {
                // a hostile tree may have the last of these numbers
                if self.next_stand_in >> FID_COUNTER_BITS != 0 {
                    return Ok(false);
                }
                let stand_in = Fid::new(STAND_IN, self.next_stand_in);
                self.next_stand_in += 1;
                self.name_it(&dir, name, stand_in)?;
            }
            dir = self.tree.open_dir(&dir, name)?;
        }
        self.identify_at(&dir, &last, fid)
    }

    /// Whether something stands at `path`, and has no number of its own.
    fn wants_number(&self, path: &[u8]) -> Result<bool> {
        let cut = path.iter().rposition(|byte| *byte == b'/');
        let (parent, last) = cut.map_or((&b"."[..], path), |cut| (&path[..cut], &path[cut + 1..]));
        let root = self.tree.root();
        let dir = match fs::open_beneath(&**root, parent, o::RDONLY | o::DIRECTORY) {
            Err(e) if is_elsewhere(e) => return Ok(false),
            dir => dir?,
        };
        match fs::xattr::get(&dir, last, self.tree.own_key()) {
            Ok(None) => Ok(true),
            Ok(Some(value)) => Ok(Meta::decode(&value)?.fid.node() == STAND_IN),
            Err(Errno::OPNOTSUPP | Errno::PERM) => Ok(true),
            Err(e) if is_elsewhere(e) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// The same for `name` in `dir`.
    pub fn identify_at(&mut self, dir: &Arc<Dir>, name: &Name, fid: Fid) -> Result<bool> {
        if dir.fid == ROOT && is_own(name.as_bytes()) {
            return Ok(false);
        }
        let stat = match fs::stat(&**dir, name.as_bytes()) {
            Err(Errno::NOENT | Errno::NAMETOOLONG) => return Ok(false),
            stat => stat?,
        };
        let known = self.tree.meta(dir, name)?.map(|meta| meta.fid);
        match known {
            Some(known) if known == fid => {
                self.tree.index.add(fid, dir.fid, name)?;
                return Ok(true);
            }
            Some(known) if known.node() != STAND_IN => return Ok(false),
            _ => {}
        }
        // a number has one object, but for further names of it
        if self.is_shared(&stat) || self.has_other(fid, stat.ino)? {
            return Ok(false);
        }
        self.name_it(dir, name, fid)?;
        if let Some(stand_in) = known {
            self.tree.index.remove(stand_in, dir.fid, name)?;
            self.tree.close_dir(stand_in);
            self.tree.moved();
        }
        if stat.kind() == Kind::Dir {
            let opened = self.tree.open_dir(dir, name)?;
            self.note_entries(&opened)?;
        }
        Ok(true)
    }

    fn has_other(&self, fid: Fid, ino: u64) -> Result<bool> {
        match self.tree.place(fid) {
            Ok((dir, name)) => Ok(fs::stat(&*dir, name.as_bytes())?.ino != ino),
            Err(TreeError::Gone(_)) => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn name_it(&self, dir: &Dir, name: &Name, fid: Fid) -> Result<()> {
        self.tree.set_meta(dir, name, &Meta::whole(fid))?;
        self.tree.index.add(fid, dir.fid, name)?;
        Ok(())
    }

    /// What stands in a directory whose number has just become known.
    fn note_entries(&self, dir: &Dir) -> Result<()> {
        for entry in fs::read_dir(dir)? {
            let Ok(name) = Name::new(&entry.name) else { continue };
            if let Some(meta) = self.tree.meta(dir, &name)? {
                self.tree.index.add(meta.fid, dir.fid, &name)?;
            }
        }
        Ok(())
    }

    fn is_dir(&self, dir: &Dir, name: &Name) -> Result<bool> {
        match fs::stat(dir, name.as_bytes()) {
            Ok(stat) => Ok(stat.kind() == Kind::Dir),
            Err(Errno::NOENT | Errno::NAMETOOLONG) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Makes all of it durable.
    ///
    /// # Errors
    /// As syncfs(2).
    pub fn sync(&self) -> Result<()> {
        Ok(fs::syncfs(&**self.tree.root())?)
    }
}

/// What a state directory says of itself; `None` when it is none.
pub(super) fn facts_in(dir: &Path) -> Option<Facts> {
    state::read(&dir.join("state.json")).ok()
}

/// The errors of a path that does not lead to what it led to.
fn is_elsewhere(e: Errno) -> bool {
    matches!(e, Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV | Errno::NAMETOOLONG)
}

/// Locks what a server or a mount of this directory, or of one above it, would have locked.
fn refuse_live(real: &Path) -> std::result::Result<Vec<File>, ReplayError> {
    let own = Path::new(std::str::from_utf8(OWN_NAME).unwrap_or(".imz"));
    let mut kept = Vec::new();
    for dir in real.ancestors() {
        for lock in [own.join("lock"), own.join("spool/lock")] {
            let path: PathBuf = dir.join(lock);
            let Ok(file) = File::open(&path) else { continue };
            match sys::fs::try_lock(&file) {
                Ok(true) if dir == real => kept.push(file),
                Ok(true) => {}
                Ok(false) => return Err(ReplayError::InUse { path: dir.to_owned() }),
                Err(source) => return Err(ReplayError::Io { path, source }),
            }
        }
    }
    Ok(kept)
}

/// The next server of it looks for itself where everything is.
fn mark_unclean(own: &Path) -> std::result::Result<(), ReplayError> {
    let unused = || Facts::new("", "", 0, 0); // there is a state: it was read just now
    let marked = State::open(own, unused).and_then(|state| state.edit(|facts| facts.clean = false));
    marked.map_err(|e| match e {
        StateError::InUse { path } => ReplayError::InUse { path },
        e => ReplayError::State(e),
    })
}
