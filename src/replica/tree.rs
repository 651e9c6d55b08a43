//! The tree of ordinary files: finding objects by fid, and what imz knows of each.
//!
//! An object is found through the index and then checked: the attribute on it must name the same
//! fid. Directories are kept open in a bounded cache, and every operation is one call relative to
//! such a descriptor. Nothing here follows a symbolic link or leaves the tree. Absent on purpose:
//! a table of all objects in memory, and any knowledge of promises or servers.
//!
//! Locks: by fid, for the entries of directories ([`Tree::lock`]) and for the objects themselves
//! ([`Tree::lock_objects`]); entries first, each kind together in ascending order.

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, RwLock, RwLockReadGuard};

use lru::LruCache;

use super::index::{At, Index, IndexError};
use super::meta::{BadMeta, Meta};
use crate::kml::record::{Fid, Name, PATH_LEN_MAX, ROOT};
use crate::sys::{self, Errno, fs};

/// Most directories that are kept open.
const DIRS_MAX: usize = 2048;
/// Locks by fid.
const LOCKS: u64 = 256;
/// Deepest directory that can be found by its fid.
const DEPTH_MAX: usize = 4096;
/// The parent of what rests in limbo: no fid that is ever given.
pub const LIMBO: Fid = Fid(u64::MAX);
/// imz's own directory at the root of a served tree.
pub const OWN_NAME: &[u8] = b".imz";
/// Where a volume keeps the versions that lost a conflict.
pub const CONFLICTS_NAME: &[u8] = b".imz-conflicts";

#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    #[error("no object has the fid {0}")]
    Gone(Fid),
    #[error("{0}")]
    Os(#[from] Errno),
    #[error("{0}")]
    Index(#[from] IndexError),
    #[error("{0}")]
    BadMeta(#[from] BadMeta),
    #[error("{path}: {source}")]
    Root { path: PathBuf, source: Errno },
    #[error("{path}: its file system keeps no extended attributes ({key}): {source}")]
    NoXattrs { path: PathBuf, key: String, source: Errno },
}

impl TreeError {
    pub fn is_no_xattrs(&self) -> bool {
        matches!(self, TreeError::NoXattrs { .. })
    }
    /// The error number that an application sees.
    pub fn errno(&self) -> Errno {
        match self {
            TreeError::Gone(_) => Errno::STALE,
            TreeError::Os(e) => *e,
            TreeError::Index(_) | TreeError::BadMeta(_) => Errno::IO,
            TreeError::Root { source, .. } | TreeError::NoXattrs { source, .. } => *source,
        }
    }
}

pub type Result<T> = std::result::Result<T, TreeError>;

/// An open directory of the tree.
pub struct Dir {
    pub fid: Fid,
    fd: OwnedFd,
    meta: Mutex<Meta>,
    /// from the root, and the tree's generation when it was true
    path: Mutex<Option<(u64, Vec<u8>)>>,
}

impl Dir {
    /// What imz knows of the directory.
    pub fn meta(&self) -> Meta {
        held(&self.meta).clone()
    }
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

pub struct Tree {
    root: Arc<Dir>,
    /// where objects rest that have no place in the tree: they are found by their fids, too
    limbo: OnceLock<Arc<Dir>>,
    /// of the attribute that holds the metadata
    key: &'static [u8],
    pub index: Index,
    dirs: Mutex<LruCache<Fid, Arc<Dir>>>,
    names: Vec<Mutex<()>>,
    objects: Vec<Mutex<()>>,
    /// false when the index may have forgotten something: a miss then walks the tree
    certain: Mutex<bool>,
    /// held while an object is between two names; the innermost of the locks
    moving: RwLock<()>,
    /// goes up when a directory moves: paths must be found anew
    moves: AtomicU64,
    /// its root was not known
    is_new: bool,
}

/// One step on the way up from a directory.
struct Step {
    fid: Fid,
    /// the step before, which has this name in `fid`
    below: Option<(usize, Name)>,
}

/// Holds the locks of some objects.
pub struct Locked<'a> {
    _held: Vec<MutexGuard<'a, ()>>,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these mutexes guard is whole after every statement, also in a panic.
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Tree {
    /// Opens the tree at `root`, whose index is at `index`. `clean` says that the index has
    /// everything that the tree has. The root gets fid 1.
    pub fn open(root: &Path, index: &Path, clean: bool) -> Result<Tree> {
        let at_root = |source| TreeError::Root { path: root.to_owned(), source };
        let fd = fs::open_root(root).map_err(at_root)?;
        let key: &[u8] = if sys::cred::is_root() { b"trusted.imz" } else { b"user.imz" };
        let known = match fs::xattr::get(&fd, b"", key).map_err(|e| no_xattrs(root, key, e))? {
            Some(value) => Some(Meta::decode(&value)?),
            None => None,
        };
        let is_new = known.is_none();
        let meta = known.unwrap_or_else(|| Meta { fid: ROOT, ..Meta::default() });
        fs::xattr::set(&fd, b"", key, &meta.encode(), 0).map_err(|e| no_xattrs(root, key, e))?;
        let (index, anew) = Index::open(index)?;
        Ok(Tree { is_new, ..Tree::with(fd, meta, key, index, clean && !anew) })
    }

    /// The tree at `root`, with an index that its caller fills. Changes nothing there.
    pub fn look(root: &Path, index: Index) -> Result<Tree> {
        let at_root = |source| TreeError::Root { path: root.to_owned(), source };
        let fd = fs::open_root(root).map_err(at_root)?;
        let key: &[u8] = if sys::cred::is_root() { b"trusted.imz" } else { b"user.imz" };
        let known = fs::xattr::get(&fd, b"", key).map_err(|e| no_xattrs(root, key, e))?;
        let meta = known.map(|value| Meta::decode(&value)).transpose()?;
        let meta = meta.unwrap_or_else(|| Meta { fid: ROOT, ..Meta::default() });
        Ok(Tree::with(fd, meta, key, index, true))
    }

    fn with(fd: OwnedFd, meta: Meta, key: &'static [u8], index: Index, certain: bool) -> Tree {
        let dir = Dir { fid: ROOT, fd, meta: Mutex::new(meta), path: Mutex::new(None) };
        let capacity = NonZeroUsize::new(DIRS_MAX).unwrap_or(NonZeroUsize::MIN);
        Tree {
            root: Arc::new(dir),
            limbo: OnceLock::new(),
            key,
            index,
            dirs: Mutex::new(LruCache::new(capacity)),
            names: (0..LOCKS).map(|_| Mutex::new(())).collect(),
            objects: (0..LOCKS).map(|_| Mutex::new(())).collect(),
            certain: Mutex::new(certain),
            moving: RwLock::new(()),
            moves: AtomicU64::new(0),
            is_new: false,
        }
    }

    /// The key of imz's own attribute, to be hidden from applications.
    pub fn own_key(&self) -> &'static [u8] {
        self.key
    }

    pub fn root(&self) -> &Arc<Dir> {
        &self.root
    }

    /// Objects that rest in the directory `fd` under these names are found there.
    pub fn add_limbo(&self, fd: OwnedFd, resting: &[(Fid, Name)]) -> Result<()> {
        for (fid, name) in resting {
            self.index.add(*fid, LIMBO, name)?;
        }
        let (meta, path) = (Mutex::new(Meta::default()), Mutex::new(None));
        // Set once: a cache has one limbo.
        let _ = self.limbo.set(Arc::new(Dir { fid: LIMBO, fd, meta, path }));
        Ok(())
    }

    /// Locks the entries of directories. The caller holds no lock of the tree yet.
    pub fn lock(&self, dirs: &[Fid]) -> Locked<'_> {
        lock_of(&self.names, dirs)
    }

    /// Locks objects: their attributes and data. The caller holds no lock of objects yet.
    pub fn lock_objects(&self, fids: &[Fid]) -> Locked<'_> {
        lock_of(&self.objects, fids)
    }

    /// Returns when everybody who holds a lock now has given it back.
    pub fn barrier(&self) {
        for lock in self.names.iter().chain(&self.objects) {
            drop(held(lock));
        }
    }

    /// While this is held, what has no name at the moment is not taken for gone.
    pub fn moving(&self) -> RwLockReadGuard<'_, ()> {
        self.moving.read().unwrap_or_else(|e| e.into_inner())
    }

    /// The directory with this fid, open.
    pub fn dir(&self, fid: Fid) -> Result<Arc<Dir>> {
        self.surely(|| self.dir_once(fid))
    }

    /// Looks for an object; what is not found was not just on its way to another name.
    fn surely<T>(&self, look: impl Fn() -> Result<T>) -> Result<T> {
        match look() {
            Err(TreeError::Gone(_)) => {}
            found => return found,
        }
        let _still = self.moving.write().unwrap_or_else(|e| e.into_inner());
        match look() {
            Err(TreeError::Gone(_)) if self.walk_once()? => look(),
            found => found,
        }
    }

    fn dir_once(&self, fid: Fid) -> Result<Arc<Dir>> {
        self.cached_dir(fid).map_or_else(|| self.find_dir(fid), Ok)
    }

    /// Goes up to a directory that is open, then down again. The index may know old places, too:
    /// all ways up are tried.
    fn find_dir(&self, fid: Fid) -> Result<Arc<Dir>> {
        let mut steps = vec![Step { fid, below: None }];
        let mut nth = 0;
        while nth < steps.len() && steps.len() <= DEPTH_MAX {
            let at = steps[nth].fid;
            if let Some(dir) = self.cached_dir(at) {
                if let Some(found) = self.go_down(dir, &steps, nth)? {
                    return Ok(found);
                }
            } else {
                for (parent, name) in self.index.names(at)?.into_iter().rev() {
                    steps.push(Step { fid: parent, below: Some((nth, name)) });
                }
            }
            nth += 1;
        }
        Err(TreeError::Gone(fid))
    }

    /// `None`: this way does not lead there any more.
    fn go_down(
        &self,
        mut dir: Arc<Dir>,
        steps: &[Step],
        mut nth: usize,
    ) -> Result<Option<Arc<Dir>>> {
        while let Some((below, name)) = &steps[nth].below {
            nth = *below;
            dir = match self.open_dir(&dir, name) {
                Ok(dir) if dir.fid == steps[nth].fid => dir,
                Ok(_) | Err(TreeError::Os(Errno::NOENT | Errno::NOTDIR | Errno::LOOP)) => {
                    return Ok(None);
                }
                Err(e) => return Err(e),
            };
        }
        Ok(Some(dir))
    }

    /// Opens the directory `name` in `dir`, which must have metadata.
    pub fn open_dir(&self, dir: &Dir, name: &Name) -> Result<Arc<Dir>> {
        let fd = fs::open(dir, name.as_bytes(), fs::o::DIRECTORY, 0)?;
        let value = fs::xattr::get(&fd, b"", self.key)?.ok_or(BadMeta)?;
        let meta = Meta::decode(&value)?;
        let fid = meta.fid;
        let mut dirs = held(&self.dirs);
        if let Some(dir) = dirs.get(&fid) {
            return Ok(dir.clone()); // another thread was faster; its metadata are the cached ones
        }
        let dir = Arc::new(Dir { fid, fd, meta: Mutex::new(meta), path: Mutex::new(None) });
        dirs.put(fid, dir.clone());
        Ok(dir)
    }

    /// The directory, if it is open already.
    pub fn cached_dir(&self, fid: Fid) -> Option<Arc<Dir>> {
        match fid {
            ROOT => Some(self.root.clone()),
            LIMBO => self.limbo.get().cloned(),
            _ => held(&self.dirs).get(&fid).cloned(),
        }
    }

    /// A place where the object stands, checked.
    pub fn place(&self, fid: Fid) -> Result<(Arc<Dir>, Name)> {
        self.find(fid).map(|(dir, name, _)| (dir, name))
    }

    /// A place where the object stands, checked, and what imz knows of it.
    pub fn find(&self, fid: Fid) -> Result<(Arc<Dir>, Name, Meta)> {
        self.surely(|| self.find_indexed(fid))
    }

    fn find_indexed(&self, fid: Fid) -> Result<(Arc<Dir>, Name, Meta)> {
        for (parent, name) in self.index.names(fid)? {
            let dir = match self.dir_once(parent) {
                Ok(dir) => dir,
                Err(TreeError::Gone(_)) => continue,
                Err(e) => return Err(e),
            };
            match self.meta(&dir, &name) {
                Ok(Some(meta)) if meta.fid == fid => return Ok((dir, name, meta)),
                Ok(_) | Err(TreeError::Os(Errno::NOENT)) => {}
                Err(e) => return Err(e),
            }
        }
        Err(TreeError::Gone(fid))
    }

    /// Whether the object at `name`, with this fid and inode, is the one that has the fid. False: it
    /// is a copy that somebody made with the attribute, behind our back.
    pub fn is_placed(&self, dir: &Dir, name: &Name, fid: Fid, ino: u64) -> Result<bool> {
        let known = self.index.names(fid)?;
        if known.iter().any(|(parent, at)| *parent == dir.fid && at == name) {
            return Ok(true);
        }
        for (parent, at) in known {
            let Ok(parent) = self.dir_once(parent) else { continue };
            let stands = self.meta(&parent, &at).ok().flatten().is_some_and(|it| it.fid == fid);
            if stands && fs::stat(&*parent, at.as_bytes()).is_ok_and(|stat| stat.ino != ino) {
                return Ok(false);
            }
        }
        // moved or linked meanwhile, or the index has forgotten it
        self.index.add(fid, dir.fid, name)?;
        Ok(true)
    }

    /// Opens an object that is not a symbolic link.
    pub fn open_object(&self, fid: Fid, flags: i32) -> Result<OwnedFd> {
        if fid == ROOT {
            return Ok(fs::reopen(&self.root, flags)?);
        }
        self.surely(|| {
            let (dir, name, _) = self.find_indexed(fid)?;
            let fd = match fs::open(&*dir, name.as_bytes(), flags, 0) {
                Err(Errno::NOENT) => return Err(TreeError::Gone(fid)),
                opened => opened?,
            };
            // Another object may have come to the name meanwhile.
            let found = self.meta_of(&fd)?.is_some_and(|meta| meta.fid == fid);
            if found { Ok(fd) } else { Err(TreeError::Gone(fid)) }
        })
    }

    /// What imz knows of `name`; `None` when it has not seen the object yet.
    pub fn meta(&self, dir: &Dir, name: &Name) -> Result<Option<Meta>> {
        let value = match fs::xattr::get(dir, name.as_bytes(), self.key) {
            Ok(Some(value)) => Some(value),
            Ok(None) => self.index.loose(dir.fid, name.as_bytes())?,
            Err(e) if carries_none(e) => self.index.loose(dir.fid, name.as_bytes())?,
            Err(e) => return Err(e.into()),
        };
        Ok(value.map(|v| Meta::decode(&v)).transpose()?)
    }

    /// Notes what imz knows of `name`, and where it stands. Durable on return: no.
    pub fn set_meta(&self, dir: &Dir, name: &Name, meta: &Meta) -> Result<()> {
        let value = meta.encode();
        match fs::xattr::set(dir, name.as_bytes(), self.key, &value, 0) {
            Err(e) if carries_none(e) => {
                self.index.set_loose(dir.fid, name.as_bytes(), Some(value));
            }
            done => done?,
        }
        if let Some(open) = held(&self.dirs).peek(&meta.fid) {
            *held(&open.meta) = meta.clone();
        }
        Ok(())
    }

    /// Of an open object.
    pub fn meta_of(&self, fd: impl AsFd) -> Result<Option<Meta>> {
        let value = fs::xattr::get(fd, b"", self.key)?;
        Ok(value.map(|v| Meta::decode(&v)).transpose()?)
    }

    pub fn set_meta_of(&self, fd: impl AsFd, meta: &Meta) -> Result<()> {
        Ok(fs::xattr::set(fd, b"", self.key, &meta.encode(), 0)?)
    }

    /// Changes what imz knows of a directory.
    pub fn edit_dir(&self, dir: &Dir, change: impl FnOnce(&mut Meta)) -> Result<()> {
        let mut meta = held(&dir.meta);
        let mut next = meta.clone();
        change(&mut next);
        if next != *meta {
            fs::xattr::set(dir, b"", self.key, &next.encode(), 0)?;
            *meta = next;
        }
        Ok(())
    }

    /// Changes what imz knows of any object, wherever it stands.
    pub fn edit_meta(&self, fid: Fid, change: impl FnOnce(&mut Meta)) -> Result<()> {
        if fid == ROOT {
            return self.edit_dir(&self.root, change);
        }
        if let Some(dir) = held(&self.dirs).peek(&fid).cloned() {
            return self.edit_dir(&dir, change);
        }
        let (dir, name, mut meta) = self.find(fid)?;
        let before = meta.clone();
        change(&mut meta);
        if meta != before { self.set_meta(&dir, &name, &meta) } else { Ok(()) }
    }

    /// Forgets an open directory, for it was removed.
    pub fn close_dir(&self, fid: Fid) {
        held(&self.dirs).pop(&fid);
    }

    /// A directory has moved: paths are found anew.
    pub fn moved(&self) {
        self.moves.fetch_add(1, Ordering::Relaxed);
    }

    /// The directory's path from the root, without a leading slash: for people and tools.
    pub fn path(&self, dir: &Dir) -> Vec<u8> {
        let now = self.moves.load(Ordering::Relaxed);
        if let Some((then, path)) = &*held(&dir.path)
            && *then == now
        {
            return path.clone();
        }
        let mut names = Vec::new();
        let mut fid = dir.fid;
        while fid != ROOT && names.len() < DEPTH_MAX {
            let Ok(Some((parent, name))) = self.index.names(fid).map(|mut at| at.pop()) else {
                break;
            };
            names.push(name);
            fid = parent;
        }
        let mut path = Vec::new();
        for name in names.iter().rev() {
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name.as_bytes());
        }
        *held(&dir.path) = Some((now, path.clone()));
        path
    }

    /// The path of `name` in `dir`, cut at its front to what a record holds.
    pub fn path_of(&self, dir: &Dir, name: &Name) -> Vec<u8> {
        let mut path = self.path(dir);
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name.as_bytes());
        path.split_off(path.len().saturating_sub(PATH_LEN_MAX))
    }

    /// A path of the object as the index has it, unchecked; empty when it has none.
    pub fn path_by_fid(&self, fid: Fid) -> Vec<u8> {
        let Ok(Some((parent, name))) = self.index.names(fid).map(|mut at| at.pop()) else {
            return Vec::new();
        };
        self.dir(parent).map(|dir| self.path_of(&dir, &name)).unwrap_or_default()
    }

    /// Walks the tree and notes where everything stands, unless the index is certain. Nothing may
    /// move meanwhile.
    fn walk_once(&self) -> Result<bool> {
        let mut certain = held(&self.certain);
        if *certain {
            return Ok(false);
        }
        log::info!("the index of names is not certain: walking the tree");
        let mut steps: Vec<(Arc<Dir>, Option<Name>)> = vec![(self.root.clone(), None)];
        while let Some((parent, name)) = steps.pop() {
            let opened = name.as_ref().map_or(Ok(parent.clone()), |it| self.open_dir(&parent, it));
            let read = opened.and_then(|dir| Ok((fs::read_dir(&*dir)?, dir)));
            let (entries, dir) = match read {
                Ok(read) => read,
                Err(TreeError::Os(e @ (Errno::MFILE | Errno::NFILE | Errno::NOMEM))) => {
                    return Err(e.into());
                }
                // what stands there cannot be reached anyway
                Err(e) if name.is_some() => {
                    log::warn!("a directory in /{}: {e}", self.path(&parent).escape_ascii());
                    continue;
                }
                Err(e) => return Err(e),
            };
            for entry in entries {
                let Ok(name) = Name::new(&entry.name) else { continue };
                // what is kept for conflicts is found by its fid, too
                if dir.fid == ROOT && name.as_bytes() == OWN_NAME {
                    continue;
                }
                let Ok(Some(meta)) = self.meta(&dir, &name) else { continue };
                self.index.add(meta.fid, dir.fid, &name)?;
                let stat = fs::stat(&*dir, name.as_bytes());
                if stat.is_ok_and(|stat| stat.kind() == fs::Kind::Dir) {
                    steps.push((dir.clone(), Some(name)));
                }
            }
        }
        *certain = true;
        Ok(true)
    }

    /// Whether directories of the tree were taken away by somebody else: the root (`path` is its
    /// place), or one that is open here.
    pub fn is_torn(&self, path: &Path) -> bool {
        let root = fs::fstat(&*self.root).map(|stat| stat.ino).ok();
        let there = fs::open_root(path).and_then(fs::fstat).map(|stat| stat.ino).ok();
        if there != root {
            return true;
        }
        let open: Vec<Arc<Dir>> = held(&self.dirs).iter().map(|(_, dir)| dir.clone()).collect();
        let gone = |dir: &Dir| fs::fstat(dir).is_ok_and(|stat| stat.nlink == 0);
        let mut torn = false;
        for dir in open.into_iter().filter(|dir| gone(dir)) {
            // Whoever removes one of ours holds these, and closes it before they are given back.
            let (_entries, _object) = (self.lock(&[dir.fid]), self.lock_objects(&[dir.fid]));
            let is_open = self.cached_dir(dir.fid).is_some_and(|now| Arc::ptr_eq(&now, &dir));
            let rested = self.index.names(dir.fid).is_ok_and(|at| at.iter().any(|p| p.0 == LIMBO));
            if is_open {
                self.close_dir(dir.fid);
                torn |= !rested; // limbo is cleared by ourselves
            }
        }
        torn
    }

    /// The root is to count as unknown at the next start.
    pub fn forget_root(&self) -> Result<()> {
        Ok(fs::xattr::remove(&*self.root, b"", self.key)?)
    }

    /// Whether the root carried nothing of ours when the tree was opened.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// All places that the index knows, unchecked.
    pub fn names(&self, fid: Fid) -> Result<Vec<At>> {
        Ok(self.index.names(fid)?)
    }
}

fn lock_of<'a>(locks: &'a [Mutex<()>], fids: &[Fid]) -> Locked<'a> {
    let mut slots: Vec<u64> = fids.iter().map(|f| f.0 % LOCKS).collect();
    slots.sort_unstable();
    slots.dedup();
    Locked { _held: slots.into_iter().map(|s| held(&locks[s as usize])).collect() }
}

/// True for the names at the root that belong to imz.
pub fn is_own(name: &[u8]) -> bool {
    name == OWN_NAME || name == CONFLICTS_NAME
}

/// True for the errors of objects that take no attribute.
fn carries_none(e: Errno) -> bool {
    matches!(e, Errno::OPNOTSUPP | Errno::PERM)
}

fn no_xattrs(root: &Path, key: &[u8], source: Errno) -> TreeError {
    let key = String::from_utf8_lossy(key).into_owned();
    TreeError::NoXattrs { path: root.to_owned(), key, source }
}
