//! A served volume: a tree, its history, and what the clients know of it.
//!
//! ```text
//!   DIR/.imz/lock, state.json   identity, counters of fids, settings; one server at a time
//!   DIR/.imz/kml/               the volume's history: every change, with its origin
//!   DIR/.imz/index.redb         fid -> names
//!   DIR/.imz/nodes.json         the clients, and how far each one's journal is in the tree
//!   DIR/.imz/grants.json        what the clients were granted (room.rs)
//!   DIR/.imz/spool/             contents on their way in
//!   DIR/.imz-conflicts/         versions that lost (conflict.rs)
//! ```
//!
//! (With a state directory elsewhere all but `spool` and the conflicts are there.) An object gets
//! its fid when it is first seen. One thread has the volume; only a sync ([`SyncJob`]) runs on
//! another. A change is journaled, then done, then settled (apply.rs); what a crash left open is
//! redone at open (redo.rs). Clients neither see nor name `.imz` and `.imz-conflicts` at the root.

use std::collections::{BTreeSet, HashMap};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use super::behind::Past;
use super::conflict::Kept;
use super::live::Live;
use super::lives::{self, Lives};
use super::meta::Meta;
use super::nodes::Nodes;
use super::ops::attr_of;
use super::power::clock_ns;
use super::room::BookFile;
use super::settings::name_at_start;
use super::spool::Spool;
use super::state::{Facts, State, StateError, random};
use super::tree::{Dir, OWN_NAME, Tree, TreeError, is_own};
use super::usage;
use crate::kml::codec::Outcome;
use crate::kml::log::{Log, LogError, Options};
use crate::kml::record::{Attr, Fid, Name, Op, ROOT, Seq, Stamp};
use crate::sys::{Errno, crash, cred, fs};

/// Times of files go in steps of at most this.
const CTIME_TICK: Duration = Duration::from_millis(10);
/// Name of the journal's cursor: up to here the tree is durable as well.
pub(super) const CURSOR: &str = "tree";
/// A page of a listing is closed when it reaches this size, bytes.
const PAGE_LEN: usize = 512 << 10;
/// Most bytes in all attributes of one object that are given to clients.
const XATTRS_LEN_MAX: usize = 1 << 20;
const XATTRS_MAX: usize = 1024;
/// Most records that are read to find what changed in one directory.
const LIST_RECORDS_MAX: u64 = 8192;
/// Most records that one answer about the history looks at.
const SINCE_RECORDS_MAX: usize = 65536;
/// Most objects in one such answer.
const SINCE_FIDS_MAX: usize = 8000;
/// The history is cut to half when it takes more room than this, or than a part of the disk, bytes.
const HISTORY_LEN_MAX: u64 = 1 << 30;
/// Records that a restart must look at, before the table of clients is written anew.
const TAIL_MAX: u64 = 65536;
/// Changes of the index that wait in memory.
const FRESH_MAX: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("no object has the fid {0}")]
    Gone(Fid),
    #[error("the object has changed meanwhile")]
    Moved,
    #[error("it is not a regular file")]
    NotAFile,
    #[error("it is not a directory")]
    NotADir,
    #[error("there is no room left")]
    NoRoom,
    #[error("it is half written, and what was there cannot be put back: {0}")]
    Mixed(Errno),
    #[error("{path}: no such directory")]
    Missing { path: PathBuf },
    #[error("there is no conflict {id}; imz conflicts list says which there are")]
    NoConflict { id: String },
    /// a decision about a conflict that cannot be carried out
    #[error("{what}")]
    Undecided { what: String },
    #[error("{0}")]
    Os(#[from] Errno),
    #[error("{0}")]
    Tree(TreeError),
    #[error("{0}")]
    Log(LogError),
    #[error("{0}")]
    State(#[from] StateError),
}

impl From<TreeError> for VolumeError {
    fn from(e: TreeError) -> VolumeError {
        match e {
            TreeError::Gone(fid) => VolumeError::Gone(fid),
            TreeError::Os(Errno::NOSPC | Errno::DQUOT) => VolumeError::NoRoom,
            TreeError::Os(e) => VolumeError::Os(e),
            e => VolumeError::Tree(e),
        }
    }
}

impl From<LogError> for VolumeError {
    fn from(e: LogError) -> VolumeError {
        match e {
            LogError::NoRoom(_) => VolumeError::NoRoom,
            e => VolumeError::Log(e),
        }
    }
}

pub type Result<T> = std::result::Result<T, VolumeError>;

/// One object as it is now.
#[derive(Clone, PartialEq, Debug)]
pub struct Object {
    pub fid: Fid,
    pub stamp: Stamp,
    pub attr: Attr,
    /// where a symbolic link leads; empty otherwise
    pub target: Vec<u8>,
    /// names and values, without imz's own
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// when a file's data became what they are, at the latest, if that is known to be before `stamp`
    pub stored: Option<Stamp>,
}

/// A page of a directory's entries, in ascending order of their names' bytes.
#[derive(Clone, PartialEq, Debug)]
pub struct Listing {
    pub dir: Object,
    pub entries: Vec<(Vec<u8>, Object)>,
    pub more: bool,
}

/// Bytes of a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Piece {
    pub bytes: Vec<u8>,
    /// of the whole file, bytes
    pub size: u64,
    /// changes with the file's data
    pub token: u64,
}

/// What others have changed since a stamp.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct History {
    pub fids: Vec<Fid>,
    pub upto: Stamp,
    pub more: bool,
    /// the history does not reach back so far
    pub lost: bool,
}

pub struct Volume {
    pub(super) dir: PathBuf,
    pub(super) name: String,
    pub(super) tree: Arc<Tree>,
    pub(super) log: Arc<Log>,
    pub(super) lives: Arc<Lives>,
    pub(super) state: State,
    pub(super) nodes: Nodes,
    pub(super) spool: Spool,
    live: Live,
    pub(super) book: BookFile,
    /// the file system's number
    pub(super) disk: u64,
    /// what the files take, where somebody wants to know
    pub(super) usage: usage::Usage,
    pub(super) history_len_max: u64,
    /// the life before ended with the power: versions that may be lost became this one, and the
    /// tree may show more than the journal tells
    pub(super) mark: Option<Stamp>,
    /// and what its clients had journaled when they first came to this life
    pub(super) brought: HashMap<u32, Seq>,
    /// directories whose entries were changed, by whom and at which stamp: set once a batch
    pub(super) touched: HashMap<Fid, (u32, Stamp)>,
    pub(super) kept: Kept,
    /// where the clients were when the sync under way began
    syncing: Vec<(u32, Seq)>,
    /// of the directory that is being listed in pages
    names: Option<Names>,
}

/// The sorted names of a directory as they were at `ctime`.
struct Names {
    dir: Fid,
    ctime: (i64, u32),
    sorted: Arc<Vec<Name>>,
}

/// About how much an entry adds to a page, bytes.
fn entry_len(name: &Name, object: &Object) -> usize {
    let xattrs = object.xattrs.iter().map(|(k, v)| 8 + k.len() + v.len());
    128 + name.as_bytes().len() + object.target.len() + xattrs.sum::<usize>()
}

/// A sync, for another thread to carry out.
pub struct SyncJob {
    tree: Arc<Tree>,
    log: Arc<Log>,
    lives: Arc<Lives>,
}

impl SyncJob {
    /// Makes journal and tree durable, and returns the stamp up to which they are.
    ///
    /// # Errors
    /// Final: nothing more may be acknowledged.
    pub fn run(&self) -> Result<Stamp> {
        Ok(self.lives.stamp(self.sync()?))
    }
    fn sync(&self) -> Result<Seq> {
        let upto = self.log.settled_through();
        self.log.sync_settled(upto)?;
        crash::point("sync-journal");
        fs::syncfs(&**self.tree.root())?;
        crash::point("sync-tree");
        self.log.set_cursor(CURSOR, upto.0)?;
        crash::point("sync-cursor");
        if self.tree.index.fresh_count() > FRESH_MAX {
            self.tree.index.flush(true).map_err(TreeError::from)?;
        }
        Ok(upto)
    }
}

impl Volume {
    /// Opens the directory `dir` as a volume called `name`, with imz's own state in `state`, or in
    /// `dir/.imz` if not told. Nothing is made before all that can be checked is checked.
    ///
    /// # Errors
    /// `Missing`, `State(InUse)`, `Tree(NoXattrs)` and those of the files behind it.
    pub fn open(dir: &Path, state: Option<&Path>, name: &str) -> Result<Volume> {
        let root = fs::open_root(dir).map_err(|e| match e {
            Errno::NOENT | Errno::NOTDIR => VolumeError::Missing { path: dir.to_owned() },
            source => TreeError::Root { path: dir.to_owned(), source }.into(),
        })?;
        let key: &[u8] = if cred::is_root() { b"trusted.imz" } else { b"user.imz" };
        if let Err(source) = fs::xattr::get(&root, b"", key) {
            let key = String::from_utf8_lossy(key).into_owned();
            return Err(TreeError::NoXattrs { path: dir.to_owned(), key, source }.into());
        }
        let before = fs::fstat(&root)?;
        let root_ctime = before.ctime;
        let own = dir.join(std::str::from_utf8(OWN_NAME).unwrap_or(".imz"));
        let state_dir = state.unwrap_or(&own);
        let spool = Spool::open(&own.join("spool"))?;
        if fs::fstat(&root)?.mtime != before.mtime {
            // the directory looks to its users as it was
            let keep = fs::SetTime::At(before.mtime.0, before.mtime.1);
            fs::utimes_fd(&root, fs::SetTime::Keep, keep)?;
        }
        let state = State::open(state_dir, || Facts::new(name, "", random(), 0))?;
        let name = &name_at_start(&state, name)?[..];
        let facts = state.facts();
        state.edit(|facts| facts.clean = false)?;
        let tree = Tree::open(dir, &state_dir.join("index.redb"), facts.clean)?;
        let incarnation = facts.incarnation();
        let space = fs::space(&root)?;
        let disk_len = u64::from(space.block_len).saturating_mul(space.blocks);
        let is_new = !state_dir.join("kml").exists();
        let options = Options { segment_len: usage::segment_len(disk_len) };
        let log = Log::open_or_create(&state_dir.join("kml"), 0, incarnation, options)?;
        let nodes = Nodes::open(state_dir)?;
        let born = born(dir);
        let is_copy = ![0, born].contains(&facts.root_born);
        // a copy of a tree that was served at the time has only a part of what its journal says
        let cut = !facts.clean && (is_copy || !nodes.same_boot());
        let mut lives = Lives::of(&facts.lives);
        if !is_new {
            lives.begin(log.last(), cut, log.first());
            state.edit(|facts| {
                (facts.lives, facts.fid_next) = (lives.table(), lives::fid_next(facts.fid_next));
            })?;
        }
        let mut volume = Volume {
            dir: dir.to_owned(),
            name: name.to_owned(),
            tree: Arc::new(tree),
            log: Arc::new(log),
            lives: Arc::new(lives),
            nodes,
            state,
            spool,
            live: Live::of(state_dir),
            book: BookFile::of(state_dir),
            disk: std::fs::metadata(dir).map_err(|_| Errno::IO)?.dev(),
            usage: usage::Usage::Unwanted,
            history_len_max: usage::history_len(disk_len, HISTORY_LEN_MAX),
            mark: None,
            brought: HashMap::new(),
            touched: HashMap::new(),
            kept: Kept::default(),
            syncing: Vec::new(),
            names: None,
        };
        let lost = volume.recover(facts.clean, cut)?;
        volume.mark = lost.map(|(_, mark)| mark);
        if !is_new {
            let stopped_at = facts.stopped_at;
            volume.look_behind(&Past { stopped_at, root_ctime, is_copy, lost })?;
        }
        volume.state.edit(|facts| (facts.stopped_at, facts.root_born) = (0, born))?;
        volume.find_conflicts()?;
        volume.save_nodes()?;
        log::info!("{}: volume {name} at stamp {}", dir.display(), volume.stamp().0);
        Ok(volume)
    }
    /// Ends it cleanly. Durable on return: yes.
    ///
    /// # Errors
    /// What was not acknowledged may be lost.
    pub fn close(mut self) -> Result<()> {
        self.flush_touched()?;
        self.save_nodes()?;
        let (now, born) = (clock_ns(), born(&self.dir));
        // what others change from here on has a later ctime
        std::thread::sleep(CTIME_TICK);
        let stopped = |facts: &mut Facts| {
            (facts.clean, facts.stopped_at, facts.root_born) = (true, now, born);
        };
        Ok(self.state.edit(stopped)?)
    }

    pub fn name(&self) -> &str {
        &self.name
    }
    pub fn path(&self) -> &Path {
        &self.dir
    }
    pub fn id(&self) -> [u8; 16] {
        self.state.facts().volume_id().to_be_bytes()
    }
    /// The newest change, durable or not.
    pub fn stamp(&self) -> Stamp {
        self.lives.stamp(self.log.last())
    }
    /// Versions that lost and were kept aside.
    pub fn conflicts(&self) -> u64 {
        self.kept.count
    }
    /// Room that the history takes, bytes.
    pub fn history_len(&self) -> u64 {
        self.log.bytes()
    }

    /// A client says hello: its number, and the newest record of it that is kept durably.
    ///
    /// # Errors
    /// The table of clients cannot be written.
    pub fn meet(&mut self, incarnation: [u8; 16], claimed: u32, host: &str) -> Result<(u32, Seq)> {
        Ok(self.nodes.meet(u128::from_be_bytes(incarnation), claimed, host)?)
    }
    /// The client comes, with records up to `newest` in its journal.
    pub fn brings(&mut self, node: u32, newest: Seq) {
        if self.mark.is_some() {
            self.brought.entry(node).or_insert(newest);
        }
    }
    /// The newest record of the client that the journal names, durably or not.
    pub fn newest_of(&self, node: u32) -> Seq {
        self.nodes.seen(node).max(self.nodes.last(node))
    }
    /// Begins a sync of everything that was applied so far; [`Volume::synced`] ends it.
    pub fn sync_job(&mut self) -> SyncJob {
        self.syncing = self.nodes.marks();
        self.job()
    }
    fn job(&self) -> SyncJob {
        let (tree, log, lives) = (self.tree.clone(), self.log.clone(), self.lives.clone());
        SyncJob { tree, log, lives }
    }
    /// The sync went well.
    pub fn synced(&mut self) {
        self.nodes.keep(std::mem::take(&mut self.syncing));
        if self.log.settled_through().0 > self.nodes.as_of().0 + TAIL_MAX
            && let Err(e) = self.save_nodes()
        {
            log::warn!("{}: what a restart must look at grows: {e}", self.dir.display());
        }
        if self.log.bytes() > self.history_len_max
            && let Err(e) = self.trim()
        {
            log::warn!("{}: the history cannot be cut: {e}", self.dir.display());
        }
    }
    pub(super) fn trim(&mut self) -> Result<()> {
        let (first, last) = (self.log.first().0, self.log.settled_through().0);
        self.save_nodes()?;
        Ok(self.log.trim(Seq(first + (last - first) / 2))?)
    }
    /// Makes everything durable, and the table of clients as well: a restart looks at the journal
    /// from here on only.
    pub(super) fn save_nodes(&mut self) -> Result<()> {
        self.tree.index.flush(true).map_err(TreeError::from)?;
        let marks = self.nodes.marks();
        let upto = self.job().sync()?;
        self.nodes.keep(marks);
        Ok(self.nodes.save(upto)?)
    }
    /// Clients that may still think that they may read and change.
    pub fn live(&self) -> Vec<u32> {
        self.live.read()
    }
    pub fn keep_live(&self, nodes: &[u32]) {
        if let Err(e) = self.live.keep(nodes) {
            log::warn!("{}: a restart would not wait for its clients: {e}", self.dir.display());
        }
    }
    /// Keeps a piece of a content that is on its way in.
    ///
    /// # Errors
    /// `NoRoom`, or as write(2).
    pub fn spool(&self, node: u32, seq: Seq, at: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.spool.put(node, seq, at, bytes).map_err(TreeError::from)?)
    }
    pub fn unspool(&self, node: u32, seq: Seq) {
        self.spool.remove(node, seq);
    }

    /// The entries of a directory behind the name `after`.
    ///
    /// # Errors
    /// `Gone`, `NotADir`.
    pub fn list(&mut self, fid: Fid, after: &[u8]) -> Result<Listing> {
        let dir = self.dir(fid)?;
        let names = self.names(&dir, after.is_empty())?;
        let from = names.partition_point(|name| name.as_bytes() <= after);
        let mut page = Listing { dir: self.dir_object(&dir)?, entries: Vec::new(), more: false };
        let mut len = 0;
        for name in &names[from..] {
            if len >= PAGE_LEN {
                page.more = true;
                break;
            }
            let object = match self.object(&dir, name) {
                Ok(object) => object,
                // removed by somebody at the server while we look
                Err(VolumeError::Os(Errno::NOENT)) => continue,
                Err(e) => return Err(e),
            };
            len += entry_len(name, &object);
            page.entries.push((name.as_bytes().to_vec(), object));
        }
        if !page.more {
            self.names = None;
        }
        if self.tree.index.fresh_count() > 16 * FRESH_MAX {
            self.tree.index.flush(false).map_err(TreeError::from)?;
        }
        Ok(page)
    }
    /// What has changed in a directory since a version of it: entries as they are now, and names
    /// that are gone. `None`: too much, or too long ago.
    ///
    /// # Errors
    /// `Gone`, `NotADir`.
    pub fn list_since(&mut self, fid: Fid, have: Stamp) -> Result<Option<(Listing, Vec<Name>)>> {
        let last = self.log.last();
        let Some(had) = self.lives.seq(have).filter(|had| *had != Seq(0) && *had <= last) else {
            return Ok(None);
        };
        let from = had.next();
        if from < self.log.first() || last.0 - had.0 > LIST_RECORDS_MAX {
            return Ok(None);
        }
        let mut names = BTreeSet::new();
        for entry in self.log.entries(from) {
            let record = entry?.record;
            // what changed in it while it was not served is not known by name
            let is_unnamed = record.origin.node == 0
                && matches!(record.op, Op::Setattr { fid: of, .. } if of == fid);
            if record.is_lost() || is_unnamed {
                return Ok(None);
            }
            let places = record.op.places().into_iter().flatten();
            names.extend(places.filter(|place| place.dir == fid).map(|place| place.name.clone()));
        }
        let dir = self.dir(fid)?;
        let mut page = Listing { dir: self.dir_object(&dir)?, entries: Vec::new(), more: false };
        let (mut gone, mut len) = (Vec::new(), 0);
        for name in names {
            if len >= PAGE_LEN {
                return Ok(None);
            }
            match self.object(&dir, &name) {
                Ok(object) => {
                    len += entry_len(&name, &object);
                    page.entries.push((name.as_bytes().to_vec(), object));
                }
                Err(VolumeError::Os(Errno::NOENT)) => {
                    len += 8 + name.as_bytes().len();
                    gone.push(name);
                }
                Err(e) => return Err(e),
            }
        }
        Ok(Some((page, gone)))
    }
    /// Sorted; those of the directory that is being paged through are kept.
    fn names(&mut self, dir: &Dir, first: bool) -> Result<Arc<Vec<Name>>> {
        let ctime = fs::fstat(dir)?.ctime;
        if let Some(known) = &self.names
            && (known.dir, known.ctime, first) == (dir.fid, ctime, false)
        {
            return Ok(known.sorted.clone());
        }
        let entries = fs::read_dir(dir)?.into_iter();
        let mut names: Vec<Name> = entries.filter_map(|e| Name::new(&e.name).ok()).collect();
        if dir.fid == ROOT {
            names.retain(|name| !is_own(name.as_bytes()));
        }
        names.sort_unstable();
        let sorted = Arc::new(names);
        self.names = Some(Names { dir: dir.fid, ctime, sorted: sorted.clone() });
        Ok(sorted)
    }

    /// # Errors
    /// `Gone`.
    pub fn stat(&mut self, fid: Fid) -> Result<Object> {
        if fid == ROOT {
            let root = self.tree.root().clone();
            return self.dir_object(&root);
        }
        let (dir, name) = self.tree.place(fid)?;
        self.object(&dir, &name)
    }
    /// Bytes `at..at + len` of a file at this stamp, or at a later one if all changes since were
    /// made by `node`, which asks: it may not have heard of its own stamps yet.
    ///
    /// # Errors
    /// `Gone`, `NotAFile`, and `Moved` when somebody else changed the file after the stamp.
    pub fn read(&mut self, node: u32, fid: Fid, at: u64, len: u32, stamp: Stamp) -> Result<Piece> {
        let (dir, name) = self.tree.place(fid)?;
        if fs::stat(&*dir, name.as_bytes())?.kind() != fs::Kind::File {
            return Err(VolumeError::NotAFile);
        }
        let moved =
            |meta: Meta| meta.stamp != stamp && !(meta.author == node && stamp >= meta.foreign);
        if self.tree.meta(&dir, &name)?.is_some_and(moved) {
            return Err(VolumeError::Moved);
        }
        let flags = fs::o::RDONLY | fs::o::NONBLOCK;
        let file = fs::open(&*dir, name.as_bytes(), flags, 0)?;
        let stat = fs::fstat(&file)?;
        let len = stat.size.saturating_sub(at).min(len.into()) as usize;
        let mut bytes = vec![0; len];
        let mut have = 0;
        while have < len {
            match fs::pread(&file, &mut bytes[have..], at + have as u64) {
                Ok(0) => break,
                Ok(count) => have += count,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        bytes.truncate(have);
        Ok(Piece { bytes, size: stat.size, token: token(&stat) })
    }
    /// Which objects others than `node` have changed after `stamp`.
    ///
    /// # Errors
    /// The history cannot be read.
    pub fn since(&mut self, stamp: Stamp, node: u32) -> Result<History> {
        let last = self.log.settled_through();
        let lost = History { upto: self.lives.stamp(last), lost: true, ..History::default() };
        let known = self.lives.seq(stamp).filter(|seq| *seq <= last);
        let Some(next) = known.map(Seq::next).filter(|next| *next >= self.log.first()) else {
            return Ok(lost);
        };
        let mut found = History { upto: stamp, ..History::default() };
        for (count, entry) in self.log.entries(next).enumerate() {
            let entry = entry?;
            if entry.seq > last {
                break;
            }
            if count >= SINCE_RECORDS_MAX || found.fids.len() >= SINCE_FIDS_MAX {
                found.more = true;
                break;
            }
            if entry.record.is_lost() {
                return Ok(lost);
            }
            if entry.outcome == Outcome::Done && entry.record.origin.node != node {
                found.fids.extend(entry.record.op.touched());
            }
            found.upto = self.lives.stamp(entry.seq);
        }
        found.fids.sort_unstable();
        found.fids.dedup();
        Ok(found)
    }
    /// # Errors
    /// As statvfs(2).
    pub fn space(&self) -> Result<fs::Space> {
        Ok(fs::space(&**self.tree.root())?)
    }

    pub(super) fn dir(&self, fid: Fid) -> Result<Arc<Dir>> {
        match self.tree.dir(fid) {
            Err(TreeError::Os(Errno::NOTDIR)) => Err(VolumeError::NotADir),
            found => Ok(found?),
        }
    }
    fn dir_object(&self, dir: &Dir) -> Result<Object> {
        let stat = fs::fstat(dir)?;
        let mut attr = attr_of(&stat);
        if dir.fid == ROOT && attr.nlink > 2 {
            // imz's own directories are not there for clients
            let own = [OWN_NAME, super::tree::CONFLICTS_NAME];
            let here = own.iter().filter(|name| fs::stat(dir, name).is_ok()).count();
            attr.nlink -= here as u32;
        }
        let (xattrs, stamp) = (self.xattrs(dir, b"")?, dir.meta().stamp);
        Ok(Object { fid: dir.fid, stamp, attr, target: Vec::new(), xattrs, stored: None })
    }
    fn object(&mut self, dir: &Dir, name: &Name) -> Result<Object> {
        let (meta, stat) = self.seen(dir, name)?;
        let target = match stat.kind() {
            fs::Kind::Symlink => fs::readlink(dir, name.as_bytes())?,
            _ => Vec::new(),
        };
        let xattrs = self.xattrs(dir, name.as_bytes())?;
        let (fid, stamp, attr) = (meta.fid, meta.stamp, attr_of(&stat));
        Ok(Object { fid, stamp, attr, target, xattrs, stored: Some(meta.data) })
    }
    fn xattrs(&self, dir: &Dir, name: &[u8]) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut found = Vec::new();
        let mut len = 0;
        for key in fs::xattr::list(dir, name)? {
            if key == self.tree.own_key() {
                continue;
            }
            if let Some(value) = fs::xattr::get(dir, name, &key)? {
                len += key.len() + value.len();
                if len > XATTRS_LEN_MAX || found.len() == XATTRS_MAX {
                    let name = name.escape_ascii();
                    log::warn!("{name}: more extended attributes than can be given to clients");
                    break;
                }
                found.push((key, value));
            }
        }
        Ok(found)
    }

    /// What stands at `name`, with a fid if it has none yet.
    pub(super) fn seen(&mut self, dir: &Dir, name: &Name) -> Result<(Meta, fs::Stat)> {
        let stat = fs::stat(dir, name.as_bytes())?;
        let known = match self.tree.meta(dir, name) {
            Err(TreeError::BadMeta(e)) => {
                // Else nobody could list the directory. Its contents are what they were.
                log::error!("{}: {name:?} in {}: {e}: it gets a new fid", self.name, dir.fid);
                None
            }
            known => known?,
        };
        if let Some(meta) = known {
            let known = self.tree.names(meta.fid)?;
            if known.iter().any(|(parent, at)| *parent == dir.fid && at == name) {
                return Ok((meta, stat));
            }
            // moved or linked behind our back; or copied, and the attribute with it
            let mut elsewhere = known.iter().filter_map(|(parent, at)| {
                let dir = self.tree.dir(*parent).ok()?;
                let fid = self.tree.meta(&dir, at).ok()??.fid;
                let ino = fs::stat(&*dir, at.as_bytes()).ok()?.ino;
                (fid == meta.fid).then_some(ino)
            });
            if elsewhere.all(|ino| ino == stat.ino) {
                self.tree.index.add(meta.fid, dir.fid, name).map_err(TreeError::from)?;
                return Ok((meta, stat));
            }
        }
        let meta = Meta::whole(self.state.new_fid()?);
        self.tree.set_meta(dir, name, &meta)?;
        self.tree.index.set(meta.fid, dir.fid, name);
        Ok((meta, stat))
    }
}

/// When a directory was made, nanoseconds since 1970; 0: its file system does not say.
fn born(dir: &Path) -> u64 {
    let at = std::fs::metadata(dir).and_then(|it| it.created()).ok();
    let since = at.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    since.map_or(0, |since| since.as_nanos() as u64)
}

/// Changes with a file's data: FNV-1a over what moves when they do.
fn token(stat: &fs::Stat) -> u64 {
    let words = [stat.ino, stat.size, stat.mtime.0 as u64, stat.mtime.1.into()];
    let words = words.into_iter().chain([stat.ctime.0 as u64, stat.ctime.1.into()]);
    words.flat_map(u64::to_le_bytes).fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests;
