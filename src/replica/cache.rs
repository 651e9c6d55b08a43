//! A client's cache: tree, journal, what pends, and whether the server is there.
//!
//! One struct that the filter's threads, the loop and its worker share. It joins the parts and
//! decides nothing: whether something may be answered from here says lento's policy.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::SystemTime;

use super::limbo::Limbo;
use super::meta::Meta;
use super::pending::Pending;
use super::pins::Pins;
use super::power;
use super::state::{State, StateError};
use super::tree::{self, Dir, LIMBO, Tree, TreeError};
use lru::LruCache;

use crate::kml::codec::Outcome;
use crate::kml::log::{Log, LogError, Ticket};
use crate::kml::record::{Fid, Name, Record, Seq, Stamp};
use crate::sys::fs::{self, Stat};
use crate::sys::{Errno, clock, crash};

/// The journal's cursors: the newest record that the server keeps, the stamp up to which every
/// break was processed, and about how much data the tree holds.
pub const ACKED: &str = "acked";
pub(super) const CURRENT: &str = "current";
const HELD_LEN: &str = "held_len";
/// And: up to here the tree is durable as well; when all of it last was, by the machine's clock.
pub(super) const TREE: &str = "tree";
pub(super) const KEPT_AT: &str = "kept_at";
/// Files that came lately, of which it is known: more of them, and they are made durable.
const HYDRATED_MAX: usize = 16384;
/// Most files whose last use is remembered.
const USED_MAX: NonZeroUsize = NonZeroUsize::new(65536).unwrap();

/// The cache could not be opened, or not be changed.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    #[error(transparent)]
    Tree(#[from] TreeError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("{path}: {source}")]
    Limbo { path: PathBuf, source: Errno },
}

/// Tells the loop that the journal grew. Cheap when it was told already.
#[derive(Default)]
pub struct Bell {
    rung: AtomicBool,
    wake: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Bell {
    /// Sets, once, what ringing does.
    pub fn connect(&self, wake: Box<dyn Fn() + Send + Sync>) {
        // A second loop on one cache would be a fault of the caller; the first one stays.
        let _ = self.wake.set(wake);
    }
    pub fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel)
            && let Some(wake) = self.wake.get()
        {
            wake();
        }
    }
    pub fn is_rung(&self) -> bool {
        self.rung.load(Ordering::Acquire)
    }
    /// The loop looked; the next ring wakes it again. Look once more after this.
    pub fn rearm(&self) {
        self.rung.store(false, Ordering::Release);
    }
}

/// A file that is open for writing.
pub trait Written: Send + Sync {
    /// It was written to since the last store record.
    fn is_unsaved(&self) -> bool;
    /// The kernel writes to it without asking.
    fn is_by_kernel(&self) -> bool;
    /// What differs now is the server's doing.
    fn taken_over(&self);
}

/// Journals what was written to these files so far; to all, if none is named.
pub type Saver = Box<dyn Fn(&[Fid]) + Send + Sync>;

/// By what a change of a file shows: size and time.
pub type Seen = (u64, (i64, u32));

/// Files that are open for writing, by how many.
type Writing = HashMap<Fid, (u32, Arc<dyn Written>)>;

pub struct Cache {
    pub tree: Tree,
    pub log: Log,
    pub state: State,
    pub limbo: Limbo,
    pub pending: Mutex<Pending>,
    pub bell: Bell,
    /// files that are open for writing, by how many
    writing: Mutex<Writing>,
    saver: OnceLock<Saver>,
    /// files that somebody may write to unseen, and how they were when they were last looked at
    watched: Mutex<HashMap<Fid, Seen>>,
    /// of those that are open, what the server has new contents of
    wanted: Mutex<Vec<Fid>>,
    /// what the kernel was given to keep
    given: Mutex<HashSet<Fid>>,
    /// files of which some granule is here in part
    arriving: Mutex<HashSet<Fid>>,
    /// what is kept whole
    pub pins: Pins,
    /// rings when something may have changed at the server that was known before
    pub news: Bell,
    /// files by their last use, if anybody needs to know
    used: OnceLock<Mutex<LruCache<Fid, u64>>>,
    /// data that were evicted since the start, bytes
    evicted_len: AtomicU64,
    online: AtomicBool,
    /// the server takes no change of the volume
    read_only: AtomicBool,
    epoch: AtomicU32,
    /// data that the tree holds, bytes, about
    held_len: AtomicU64,
    /// up to here the tree is durable, not only the journal
    durable: AtomicU64,
    /// a sync of the tree failed: what is durable is not known any more, and never will be
    broken: AtomicBool,
    /// files of which bytes came from the server since all was last durable
    hydrated: Mutex<HashSet<Fid>>,
}

impl Cache {
    /// Joins the parts. `limbo`: a directory on the tree's file system; made if it is not there.
    /// What the journal still holds beyond the cursor `acked` pends.
    ///
    /// # Errors
    /// The journal cannot be read, or the limbo not be made.
    pub fn new(tree: Tree, log: Log, state: State, limbo: &Path) -> Result<Cache, CacheError> {
        let at_limbo = |source| CacheError::Limbo { path: limbo.to_owned(), source };
        let limbo = Limbo::open(limbo).map_err(at_limbo)?;
        let (fd, resting) = limbo.resting().map_err(at_limbo)?;
        tree.add_limbo(fd, &resting)?;
        let acked = Seq(log.cursor(ACKED));
        let mut pending = Pending::new(acked);
        for entry in log.entries(acked.next().max(log.first())) {
            let entry = entry?;
            pending.add(entry.seq, &entry.record, made_at(&entry.record));
        }
        pending.doubt_all();
        let pins = Pins::open(state.dir());
        let (epoch, held_len) = (state.facts().epoch, log.cursor(HELD_LEN));
        let durable = log.cursor(TREE);
        let read_only = state.facts().settings.read_only;
        Ok(Cache {
            tree,
            log,
            state,
            limbo,
            pending: Mutex::new(pending),
            bell: Bell::default(),
            writing: Mutex::default(),
            given: Mutex::default(),
            arriving: Mutex::default(),
            pins,
            news: Bell::default(),
            used: OnceLock::new(),
            evicted_len: AtomicU64::new(0),
            saver: OnceLock::new(),
            watched: Mutex::default(),
            wanted: Mutex::default(),
            online: AtomicBool::new(false),
            read_only: AtomicBool::new(read_only),
            epoch: AtomicU32::new(epoch),
            held_len: AtomicU64::new(held_len),
            durable: AtomicU64::new(durable),
            broken: AtomicBool::new(false),
            hydrated: Mutex::default(),
        })
    }

    pub fn pending(&self) -> MutexGuard<'_, Pending> {
        // The table's methods leave it whole, and none of them panics in between.
        self.pending.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Journals an intention; the caller holds the locks of the objects. Durable on return: no.
    ///
    /// # Errors
    /// As [`Log::append`]; then nothing pends.
    pub fn append(&self, record: &Record) -> Result<Ticket, LogError> {
        let ticket = self.log.append(record)?;
        self.pending().add(ticket.seq, record, clock::now_ns());
        Ok(ticket)
    }

    /// Says what became of it; what is settled may be shipped.
    pub fn settle(&self, ticket: Ticket, outcome: Outcome) {
        self.log.settle(ticket, outcome);
        self.bell.ring();
    }

    /// The file is open for writing, until [`Cache::end_writing`]. The caller holds its lock.
    pub fn begin_writing(&self, fid: Fid, file: Arc<dyn Written>) {
        self.writing().entry(fid).or_insert((0, file)).0 += 1;
    }
    /// What was written is journaled.
    pub fn end_writing(&self, fid: Fid) {
        let mut writing = self.writing();
        if let Some((count, _)) = writing.get_mut(&fid) {
            *count -= 1;
            if *count == 0 {
                writing.remove(&fid);
            }
        }
    }
    /// The file, if it is open for writing.
    pub fn written(&self, fid: Fid) -> Option<Arc<dyn Written>> {
        self.writing().get(&fid).map(|(_, file)| file.clone())
    }
    /// Whether something was written that is not journaled yet: it stays as it is here.
    pub fn is_unsaved(&self, fid: Fid) -> bool {
        self.written(fid).is_some_and(|file| file.is_unsaved())
    }
    /// Sets, once, what journals writes that nobody has closed yet, where they count at once.
    pub fn connect_saver(&self, saver: Saver) {
        // A second filter on one cache would be a fault of the caller; the first one stays.
        let _ = self.saver.set(saver);
    }
    /// Others need these files, or all: what was written so far is journaled, if it counts.
    pub fn save_written(&self, fids: &[Fid]) {
        if let Some(saver) = self.saver.get() {
            saver(fids);
        }
    }
    /// Remembers how the file looks, until [`Cache::end_watching`].
    pub fn watch(&self, fid: Fid, seen: Seen) {
        self.watched().insert(fid, seen);
    }
    pub fn end_watching(&self, fid: Fid) {
        self.watched().remove(&fid);
    }
    /// How the file looked, if it is watched.
    pub fn seen(&self, fid: Fid) -> Option<Seen> {
        self.watched().get(&fid).copied()
    }
    /// What the file is now is the server's doing.
    pub(super) fn note_taken_over(
        &self,
        fid: Fid,
        stat: impl FnOnce() -> Result<Stat, Errno>,
    ) -> Result<(), Errno> {
        if let Some(seen) = self.watched().get_mut(&fid) {
            let stat = stat()?;
            *seen = (stat.size, stat.mtime);
        }
        Ok(())
    }
    fn watched(&self) -> MutexGuard<'_, HashMap<Fid, Seen>> {
        // Whole after every statement.
        self.watched.lock().unwrap_or_else(|e| e.into_inner())
    }
    /// The contents of a file that is open for writing must come at once: the kernel may write to
    /// it without asking.
    pub fn want_now(&self, fid: Fid) {
        self.wanted.lock().unwrap_or_else(|e| e.into_inner()).push(fid);
    }
    /// The kernel keeps what it was told of the object, until it is told otherwise.
    pub fn note_given(&self, fid: Fid) {
        self.given.lock().unwrap_or_else(|e| e.into_inner()).insert(fid);
    }
    /// The kernel has forgotten the object by itself.
    pub fn note_forgotten(&self, fid: Fid) {
        self.given.lock().unwrap_or_else(|e| e.into_inner()).remove(&fid);
    }
    /// Everything that the kernel may keep; it is about to be told otherwise.
    pub fn take_given(&self) -> Vec<Fid> {
        std::mem::take(&mut *self.given.lock().unwrap_or_else(|e| e.into_inner()))
            .into_iter()
            .collect()
    }
    /// What must come at once, and was not told yet.
    pub fn take_wanted(&self) -> Vec<Fid> {
        std::mem::take(&mut *self.wanted.lock().unwrap_or_else(|e| e.into_inner()))
    }
    fn writing(&self) -> MutexGuard<'_, Writing> {
        // Whole after every statement.
        self.writing.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Whether no promise for the object was broken.
    pub fn current(&self, meta: &Meta) -> bool {
        !meta.stale && meta.epoch == self.epoch()
    }

    /// Whether what is here of the object may be shown: its attributes, and a directory's listing
    /// or a file's contents as far as they are complete.
    pub fn valid(&self, meta: &Meta) -> bool {
        self.current(meta)
            || !self.is_online()
            || self.is_unsaved(meta.fid)
            || self.pending().is_ours(meta.fid)
    }

    pub fn is_online(&self) -> bool {
        self.online.load(Ordering::Acquire)
    }
    /// Whether the server said, when it was last there, that the volume may not be changed.
    pub fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Acquire)
    }
    pub fn set_read_only(&self, read_only: bool) {
        self.read_only.store(read_only, Ordering::Release);
    }
    pub fn set_online(&self, online: bool) {
        self.online.store(online, Ordering::Release);
    }
    pub fn epoch(&self) -> u32 {
        self.epoch.load(Ordering::Acquire)
    }

    /// The server has no more than `theirs` of this journal, of which it had acknowledged all up to
    /// `ours`: an older copy of it was put back. What the journal still has of the rest pends again;
    /// what happened, for people.
    ///
    /// # Errors
    /// The journal cannot be read.
    pub fn fell_back(&self, theirs: Seq, ours: Seq) -> Result<String, LogError> {
        let first = theirs.next().max(self.log.first());
        let mut pending = self.pending();
        pending.fell_back(theirs);
        for entry in self.log.entries(first) {
            let entry = entry?;
            pending.add(entry.seq, &entry.record, made_at(&entry.record));
        }
        pending.doubt_all();
        self.log.note_cursor(ACKED, theirs.0);
        let lost = format!(
            "the server has lost records {} to {}, which it had acknowledged: was it restored from \
             an older backup?",
            theirs.next().0,
            ours.0
        );
        Ok(match first.0.saturating_sub(theirs.next().0) {
            0 => format!("{lost} They are sent again"),
            gone => format!("{lost} All but the first {gone} of them are sent again"),
        })
    }

    /// Makes everything in the cache stale at once. Durable on return: yes.
    pub fn bump_epoch(&self) -> Result<(), StateError> {
        self.state.edit(|facts| facts.epoch = facts.epoch.wrapping_add(1).max(1))?;
        self.epoch.store(self.state.facts().epoch, Ordering::Release);
        Ok(())
    }

    /// Makes the journal up to `upto`, which is settled, and then the whole tree durable: what these
    /// records say, and the contents that they announce, survive a power cut from here on.
    ///
    /// # Errors
    /// Final: after the first one nothing is known of the tree any more.
    pub fn make_durable(&self, upto: Seq) -> Result<(), LogError> {
        let upto = upto.min(self.log.settled_through());
        if upto.0 <= self.durable.load(Ordering::Acquire) {
            return Ok(());
        }
        self.log.sync_settled(upto)?;
        crash::point("ship-journal");
        let now = power::clock_ns();
        self.sync_tree()?;
        crash::point("ship-tree");
        self.durable.fetch_max(upto.0, Ordering::AcqRel);
        self.log.note_cursor(TREE, upto.0);
        self.log.note_cursor(KEPT_AT, now);
        Ok(())
    }
    fn sync_tree(&self) -> Result<(), LogError> {
        if self.broken.load(Ordering::Acquire) {
            return Err(LogError::Poisoned);
        }
        let hydrated = std::mem::take(&mut *self.hydrated());
        fs::syncfs(&**self.tree.root()).map_err(|e| {
            self.broken.store(true, Ordering::Release);
            self.hydrated().extend(hydrated);
            let path = self.state.dir().to_owned();
            LogError::Io { what: "make durable the tree beside", path, source: e.into() }
        })
    }
    /// Up to here records and their effects are durable.
    pub fn durable(&self) -> Seq {
        Seq(self.durable.load(Ordering::Acquire))
    }
    /// Makes everything durable, then the cursors that say so: a power cut in between costs work,
    /// not truth.
    ///
    /// # Errors
    /// As [`Cache::make_durable`], and the index.
    pub fn keep_all(&self, acked: Seq, current: Stamp) -> Result<(), CacheError> {
        let (now, upto) = (power::clock_ns(), self.log.settled_through());
        self.tree.index.flush(true).map_err(TreeError::from)?;
        crash::point("keep-index");
        self.log.sync_settled(upto)?;
        self.sync_tree()?;
        crash::point("keep-tree");
        self.durable.fetch_max(upto.0, Ordering::AcqRel);
        self.log.set_cursors(&[
            (TREE, upto.0),
            (KEPT_AT, now),
            (ACKED, acked.0),
            (HELD_LEN, self.held_len.load(Ordering::Relaxed)),
            (CURRENT, current.0),
        ])?;
        crash::point("keep-cursors");
        Ok(())
    }
    /// Bytes of the file came from the server: they are not durable.
    pub fn note_hydrated(&self, fid: Fid) {
        let mut hydrated = self.hydrated();
        hydrated.insert(fid);
        let full = hydrated.len() >= HYDRATED_MAX;
        drop(hydrated);
        if full && let Err(e) = self.sync_tree() {
            log::error!("{e}");
        }
    }
    /// The file is about to be changed: what came from the server must be durable before, or a power
    /// cut could leave holes in what is then shipped as our version.
    ///
    /// # Errors
    /// The file system's; then it must not be changed.
    pub fn settle_hydrated(&self, fid: Fid, file: impl AsFd) -> Result<(), Errno> {
        if !self.hydrated().contains(&fid) {
            return Ok(());
        }
        fs::fdatasync(file)?;
        self.hydrated().remove(&fid);
        Ok(())
    }
    #[cfg(test)]
    pub(super) fn is_settled(&self, fid: Fid) -> bool {
        !self.hydrated().contains(&fid)
    }
    fn hydrated(&self) -> MutexGuard<'_, HashSet<Fid>> {
        // Whole after every statement.
        self.hydrated.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The newest own record that the server keeps.
    pub fn acked(&self) -> Seq {
        Seq(self.log.cursor(ACKED))
    }
    /// Every break up to this stamp was processed before the last stop.
    pub fn current_stamp(&self) -> Stamp {
        Stamp(self.log.cursor(CURRENT))
    }

    /// About how much data came into the tree, or left it, bytes.
    pub fn note_held(&self, came: u64, left: u64) {
        // Relaxed and clamped: a figure for people.
        let _ = self.held_len.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
            Some(held.saturating_add(came).saturating_sub(left))
        });
    }
    /// The same, as somebody has counted it.
    pub fn set_held(&self, len: u64) {
        self.held_len.store(len, Ordering::Relaxed);
    }
    /// About how much data the tree holds, bytes.
    pub fn held_len(&self) -> u64 {
        self.held_len.load(Ordering::Relaxed)
    }
    pub(super) fn note_evicted(&self, len: u64) {
        self.evicted_len.fetch_add(len, Ordering::Relaxed);
    }
    /// Data that were evicted since the start, bytes.
    pub fn evicted_len(&self) -> u64 {
        self.evicted_len.load(Ordering::Relaxed)
    }

    /// A part of a granule came: it does not count yet, but must not go either.
    pub(super) fn note_arriving(&self, fid: Fid) {
        self.arriving().insert(fid);
    }
    /// The granule is whole, or will be fetched from its start.
    pub(super) fn note_arrived(&self, fid: Fid) {
        self.arriving().remove(&fid);
    }
    /// The connection is gone: whatever came in part is fetched from its start.
    pub fn end_arriving(&self) {
        self.arriving().clear();
    }
    pub(super) fn is_arriving(&self, fid: Fid) -> bool {
        self.arriving().contains(&fid)
    }
    fn arriving(&self) -> MutexGuard<'_, HashSet<Fid>> {
        // Whole after every statement.
        self.arriving.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// From now on the order is kept in which files are used.
    pub fn keep_order(&self) {
        let fresh = Mutex::new(LruCache::new(USED_MAX));
        // A second one would be as good as the first, which stays.
        let _ = self.used.set(fresh);
    }
    /// The file was opened, or something of it came.
    pub fn note_used(&self, fid: Fid) {
        if let Some(used) = self.used.get() {
            used.lock().unwrap_or_else(|e| e.into_inner()).put(fid, clock::now_ns());
        }
    }
    /// Files with the time of their last use, as [`clock::now_ns`] has it, the oldest first. What is
    /// not among them was used before them all, or in an earlier life.
    pub fn used(&self) -> Vec<(Fid, u64)> {
        let Some(used) = self.used.get() else { return Vec::new() };
        let used = used.lock().unwrap_or_else(|e| e.into_inner());
        used.iter().rev().map(|(fid, at)| (*fid, *at)).collect()
    }

    /// Data in the tree that the server has, and that it lacks, bytes, about.
    pub fn clean_and_dirty(&self) -> (u64, u64) {
        let dirty = self.pending().len();
        (self.held_len.load(Ordering::Relaxed).saturating_sub(dirty), dirty)
    }

    /// Moves what stands at `name` to limbo.
    pub fn retire(&self, dir: &Dir, name: &Name, fid: Fid) -> tree::Result<()> {
        let _moving = self.tree.moving();
        let resting = self.limbo.take(dir, name.as_bytes(), fid)?;
        self.tree.index.remove(fid, dir.fid, name)?;
        Ok(self.tree.index.add(fid, LIMBO, &resting)?)
    }

    /// What stands at `name` stays in limbo when its name goes.
    pub fn keep(&self, dir: &Dir, name: &Name, fid: Fid) -> tree::Result<()> {
        let resting = self.limbo.keep(dir, name.as_bytes(), fid)?;
        Ok(self.tree.index.add(fid, LIMBO, &resting)?)
    }
}

/// When a record of an earlier life was made, by the clock of this one. The time of day may have been
/// set since: then it is as wrong as that, but it does not change any more.
fn made_at(record: &Record) -> u64 {
    let day = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    clock::now_ns().saturating_sub((day.as_nanos() as u64).saturating_sub(record.time_ns))
}
