//! What all operations share: is the object here, who asks, how is a change journaled.
//!
//! A change is: take the objects' locks, append the record (intended), change the backing tree,
//! settle the record (done, or void when nothing changed). A crash in between leaves an intended
//! record, which recovery checks against the tree. `here`, `dir_here` are the one place that
//! decides whether a request can be answered locally.

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::LocalKey;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::mapped::Mapped;
use super::open::{Open, OpenFiles};
use super::stop::ByKernel;
use crate::kml::codec::Outcome;
use crate::kml::log::LogError;
use crate::kml::record::{Fid, Name, Op, Origin, Place, ROOT, Record, Seq, Time};
use crate::kml::writers::Writers;
use crate::lento::charge;
use crate::lento::grant::{Charge, Grant};
use crate::lento::locks::{LockAsk, LockHeld};
use crate::lento::message::Space;
use crate::lento::rights::{self, Held, Mode};
use crate::lento::room::Room;
use crate::replica::cache::Cache;
use crate::replica::meta::Meta;
use crate::replica::ops::time_of_ns;
use crate::replica::state::StateError;
use crate::replica::tree::{Dir, TreeError, is_own};
use crate::sys::cred::Caller;
use crate::sys::fs::{self, Kind, Stat};
use crate::sys::{Errno, crash};

/// After so many fetches an operation takes what is here: it changes as fast as it comes.
pub const FRESH_TRIES_MAX: u32 = 32;
/// After so many it is given up.
pub const TRIES_MAX: u32 = 64;

/// What must come from the server before an operation can go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Want {
    /// a directory's entries and its own attributes
    Dir(Fid),
    /// an object's attributes
    Object(Fid),
    /// `at..at + len` of a file
    Bytes { fid: Fid, at: u64, len: u64 },
    /// these are to be changed: nobody else may have them then
    Permit([Option<Fid>; 4]),
    /// so much is to be written, and is not granted
    Room(Room),
}

/// Why an operation did not end.
#[derive(Debug)]
pub enum Stop {
    /// the application gets this
    Errno(Errno),
    /// this must be fetched first; then the operation is tried again
    Miss(Want),
}

pub type Result<T> = std::result::Result<T, Stop>;

impl From<Errno> for Stop {
    fn from(e: Errno) -> Stop {
        Stop::Errno(e)
    }
}

impl From<TreeError> for Stop {
    fn from(e: TreeError) -> Stop {
        if matches!(e, TreeError::Index(_) | TreeError::BadMeta(_)) {
            log::error!("{e}");
        }
        Stop::Errno(e.errno())
    }
}

impl From<LogError> for Stop {
    fn from(e: LogError) -> Stop {
        log::error!("journal: {e}");
        Stop::Errno(if matches!(e, LogError::NoRoom(_)) { Errno::NOSPC } else { Errno::IO })
    }
}

impl From<StateError> for Stop {
    fn from(e: StateError) -> Stop {
        log::error!("{e}");
        Stop::Errno(Errno::IO)
    }
}

/// An object as applications see it.
#[derive(Clone, Debug)]
pub struct Found {
    pub fid: Fid,
    pub stat: Stat,
    /// the kernel may keep it: the promise ends it, not a timer
    pub keep: bool,
}

/// What the filter needs of the world outside the cache. Carried out by the loop.
pub trait Lento: Send + Sync {
    /// Fetches what is wanted, then calls `done`, on whatever thread; always, and in bounded time.
    fn want(&self, want: Want, done: Box<dyn FnOnce(std::result::Result<(), Errno>) + Send>);
    /// Calls `done` when the server has everything up to `seq`, or cannot be reached.
    fn when_acked(&self, seq: Seq, done: Box<dyn FnOnce(std::result::Result<(), Errno>) + Send>);
    /// Calls `done(true)` once the server is there, `done(false)` if the mount ends before.
    fn when_back(&self, done: Box<dyn FnOnce(bool) + Send>);
    /// The volume's room as last heard; does not wait.
    fn space(&self) -> Space;
    /// Asks for a lock, its end, or who holds it. `done` is called exactly once, on whatever
    /// thread: with `Some` only for a test, for who is in the way. The number is for `cancel`.
    fn lock(&self, ask: LockAsk, done: LockDone) -> u64;
    /// Ends the wait for a lock: its `done` hears `EINTR`, unless it was called already, or the
    /// lock is granted at this moment.
    fn cancel(&self, waiting: u64);
}

/// What is called when a lock was granted or refused, or the question after it answered.
pub type LockDone = Box<dyn FnOnce(std::result::Result<Option<LockHeld>, Errno>) + Send>;

/// The filter of one mount.
pub struct Filter {
    pub cache: Arc<Cache>,
    pub lento: Arc<dyn Lento>,
    /// what may be done without asking
    pub rights: Arc<Held>,
    pub files: OpenFiles,
    /// which files are open for writing: outlives the process
    pub writers: Writers,
    pub mapped: Mapped,
    /// what may be written without asking
    pub room: Arc<Grant>,
    pub by_kernel: ByKernel,
    /// data may move without the daemon
    pub passthrough: AtomicBool,
    /// a write counts when it returns, not when the file is closed
    pub strict: bool,
    /// the kernel can be told to look up all names again; else it keeps none
    pub forgets_names: AtomicBool,
}

/// By what an object was found.
pub enum Spot {
    Entry(Arc<Dir>, Name),
    /// the object is this open directory
    Dir(Arc<Dir>),
    /// a file that is open; perhaps it has no name any more
    Open(Arc<Open>),
}

/// An object: where it is, what it is, what imz knows of it.
pub struct Object {
    pub spot: Spot,
    pub stat: Stat,
    pub meta: Meta,
}

impl Object {
    /// Only its holders have it left: nothing about it is journaled.
    pub fn is_nameless(&self) -> bool {
        self.stat.nlink == 0
    }

    /// The name's bytes for `*at` calls relative to the object's descriptor.
    pub fn at(&self) -> &[u8] {
        match &self.spot {
            Spot::Entry(_, name) => name.as_bytes(),
            Spot::Dir(_) | Spot::Open(_) => b"",
        }
    }

    /// Its attributes as they are now.
    pub fn stat_again(&self) -> fs::Result<Stat> {
        match &self.spot {
            Spot::Entry(dir, name) => fs::stat(&**dir, name.as_bytes()),
            Spot::Dir(_) | Spot::Open(_) => fs::fstat(self),
        }
    }
}

impl AsFd for Object {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.spot {
            Spot::Entry(dir, _) | Spot::Dir(dir) => dir.as_fd(),
            Spot::Open(open) => open.fd.as_fd(),
        }
    }
}

thread_local! {
    /// the operation on this thread takes what is here, stale or not
    static AS_IS: Cell<bool> = const { Cell::new(false) };
    /// what was done cannot be undone: it is journaled, permit or not
    static DONE: Cell<bool> = const { Cell::new(false) };
}

/// Runs an operation that takes what is here as it is: what it wanted was fetched, and has
/// changed again meanwhile. That is as fresh as can be had.
pub fn as_is<T>(op: impl FnOnce() -> T) -> T {
    with(&AS_IS, op)
}

/// Journals what has been done already, also where the permit for it was lost meanwhile: the server
/// finds out whether it conflicts.
pub fn done<T>(op: impl FnOnce() -> T) -> T {
    with(&DONE, op)
}

/// Whether what runs here is done already.
pub fn is_done() -> bool {
    DONE.get()
}

fn with<T>(flag: &'static LocalKey<Cell<bool>>, op: impl FnOnce() -> T) -> T {
    struct Reset(&'static LocalKey<Cell<bool>>);
    impl Drop for Reset {
        fn drop(&mut self) {
            self.0.set(false); // also after a panic
        }
    }
    let _reset = Reset(flag);
    flag.set(true);
    op()
}

impl Filter {
    /// Whether what is here may be answered: no promise for it was broken, or there is no better.
    pub fn valid(&self, meta: &Meta) -> bool {
        (self.cache.valid(meta) && self.may(meta.fid, Mode::Read)) || AS_IS.get()
    }

    /// Whether nobody else stands against it. Away from the server nobody can be asked.
    pub fn may(&self, fid: Fid, mode: Mode) -> bool {
        self.rights.mode(fid) >= mode || !self.cache.is_online()
    }

    /// `EROFS` where the server takes no change: nothing is journaled that it would refuse. What
    /// is done already is.
    pub fn changeable(&self) -> Result<()> {
        match self.cache.is_read_only() && !DONE.get() {
            true => Err(Errno::ROFS.into()),
            false => Ok(()),
        }
    }

    /// Stops with a miss where one of the objects may not be changed. Under their locks: a recall
    /// waits for who has passed this.
    pub fn permitted(&self, fids: impl Iterator<Item = Fid>) -> Result<()> {
        let mut few = [None; 4];
        let (mut lacks, mut count) = (false, 0);
        for fid in fids {
            lacks |= !self.may(fid, Mode::Write);
            few[count.min(3)] = Some(fid);
            count += 1;
        }
        if lacks && !is_done() { Err(Stop::Miss(Want::Permit(few))) } else { Ok(()) }
    }

    /// The directory, with all its entries here.
    pub fn dir_here(&self, fid: Fid) -> Result<Arc<Dir>> {
        let dir = self.cache.tree.dir(fid)?;
        let meta = dir.meta();
        if meta.complete && self.valid(&meta) { Ok(dir) } else { Err(Stop::Miss(Want::Dir(fid))) }
    }

    /// The object, with attributes that are current. Its last name may be gone while it is open.
    pub fn here(&self, fid: Fid) -> Result<Object> {
        let object = self.object(fid)?;
        if object.is_nameless() {
            return Ok(object);
        }
        if !self.valid(&object.meta) {
            return Err(stale(object.stat.kind(), fid));
        }
        self.whole_for_kernel(&object.meta)?;
        Ok(object)
    }

    /// Stops with a miss where the kernel moves the data of a file for those who have it open, and
    /// new data are still to come: they must not find holes, nor write into them.
    pub fn whole_for_kernel(&self, meta: &Meta) -> Result<()> {
        let by_kernel = || self.files.get(meta.fid).is_some_and(|open| open.passthrough);
        if !meta.complete
            && by_kernel()
            && self.cache.is_online()
            && !self.cache.is_unsaved(meta.fid)
            && !AS_IS.get()
        {
            return missing(meta, 0, u64::MAX).map_or(Ok(()), Err);
        }
        Ok(())
    }

    fn object(&self, fid: Fid) -> Result<Object> {
        let tree = &self.cache.tree;
        if let Some(open) = self.files.get(fid) {
            let stat = fs::fstat(&open.fd)?;
            let meta = tree.meta_of(&open.fd)?.ok_or(Errno::STALE)?;
            return Ok(Object { spot: Spot::Open(open), stat, meta });
        }
        if let Some(dir) = tree.cached_dir(fid) {
            let (stat, meta) = (fs::fstat(&*dir)?, dir.meta());
            return Ok(Object { spot: Spot::Dir(dir), stat, meta });
        }
        let (dir, name, meta) = tree.find(fid)?;
        let stat = fs::stat(&*dir, name.as_bytes())?;
        Ok(Object { spot: Spot::Entry(dir, name), stat, meta })
    }

    /// The object's path, for people.
    pub fn path(&self, object: &Object) -> Vec<u8> {
        let tree = &self.cache.tree;
        match &object.spot {
            Spot::Entry(dir, name) => tree.path_of(dir, name),
            Spot::Dir(dir) => tree.path(dir),
            Spot::Open(open) => tree.path_by_fid(open.fid),
        }
    }

    /// What stands at `name`: `None` when nothing does.
    pub fn entry(&self, dir: &Dir, name: &Name) -> Result<Option<(Stat, Meta)>> {
        let stat = match fs::stat(dir, name.as_bytes()) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        match self.cache.tree.meta(dir, name)? {
            Some(meta) if self.cache.tree.is_placed(dir, name, meta.fid, stat.ino)? => {
                Ok(Some((stat, meta)))
            }
            Some(meta) => {
                log::error!(
                    "{name:?} in {} is a copy of {}; imz fsck the cache",
                    dir.fid,
                    meta.fid
                );
                Err(Stop::Errno(Errno::IO))
            }
            None => {
                log::error!("{name:?} in {} is unknown to imz; imz fsck the cache", dir.fid);
                Err(Stop::Errno(Errno::IO))
            }
        }
    }

    /// What stands at `name`, with current attributes; `ENOENT` when nothing does.
    pub fn entry_here(&self, dir: &Dir, name: &Name) -> Result<(Stat, Meta)> {
        let (stat, meta) = self.entry(dir, name)?.ok_or(Errno::NOENT)?;
        if self.valid(&meta) { Ok((stat, meta)) } else { Err(stale(stat.kind(), meta.fid)) }
    }

    /// Appends a record, carries the change out, and settles the record. The caller holds the
    /// objects' locks.
    pub fn change<T>(
        &self,
        by: Caller,
        path: Vec<u8>,
        op: Op,
        act: impl FnOnce(Time) -> Result<T>,
    ) -> Result<T> {
        let room = charge::of_op(&op, path.len() as u64);
        let charge = self.charged(room)?;
        self.change_charged(by, path, op, charge, act)
    }

    /// The same with room that was taken before.
    pub fn change_charged<T>(
        &self,
        by: Caller,
        path: Vec<u8>,
        op: Op,
        charge: Charge,
        act: impl FnOnce(Time) -> Result<T>,
    ) -> Result<T> {
        let time_ns = now_ns();
        let origin = Origin::default();
        let record = Record { time_ns, origin, uid: by.uid, gid: by.gid, path, op };
        self.changeable()?;
        self.permitted(rights::needs(&record.op))?;
        // As of now: a recall that comes meanwhile leaves what is made here to us.
        let made = rights::made(&record.op);
        let made = made.filter(|(dir, _)| self.rights.mode(*dir) == Mode::Write);
        let ticket = self.cache.append(&record)?;
        crash::point("change-journaled");
        let done = act(time_of_ns(time_ns));
        let outcome = if done.is_ok() { Outcome::Done } else { Outcome::Void };
        if let (Some((_, fid)), Ok(_)) = (made, &done) {
            self.rights.made(fid);
        }
        if done.is_ok() {
            charge.bind(ticket.seq, charge::whole(&record.op));
        }
        crash::point("change-done");
        self.cache.settle(ticket, outcome);
        crash::point("change-settled");
        done
    }

    /// A name that an application may use in `dir`.
    pub fn name(&self, dir: Fid, name: &[u8]) -> Result<Name> {
        if name.len() > crate::kml::record::NAME_LEN_MAX {
            return Err(Errno::NAMETOOLONG.into());
        }
        if dir == ROOT && is_own(name) {
            return Err(Errno::ACCESS.into());
        }
        Ok(Name::new(name).map_err(|_| Errno::INVAL)?)
    }

    /// Where `name` is to stand.
    pub fn place(&self, dir: &Dir, name: &Name) -> Place {
        Place { dir: dir.fid, base: dir.meta().stamp, name: name.clone() }
    }

    /// The metadata of an object that is made here and now.
    pub fn new_meta(&self) -> Result<Meta> {
        let fid = self.cache.state.new_fid()?;
        Ok(Meta { epoch: self.cache.epoch(), ..Meta::whole(fid) })
    }

    /// The object for the kernel.
    pub fn found(&self, stat: Stat, meta: &Meta) -> Found {
        // What is answered for want of better must be asked for again: no notice ends it.
        let keep = self.forgets_names.load(Ordering::Relaxed)
            && stat.nlink > 0
            && self.cache.current(meta)
            && self.may(meta.fid, Mode::Read);
        if keep {
            self.cache.note_given(meta.fid);
        }
        Found { fid: meta.fid, stat: shown(stat, meta), keep }
    }
}

/// The attributes that applications see: the server counts names that are not here.
pub fn shown(mut stat: Stat, meta: &Meta) -> Stat {
    stat.ino = meta.fid.0;
    if meta.nlink > 0 && stat.nlink > 0 {
        match stat.kind() {
            Kind::Dir if meta.complete => {}
            Kind::Dir => stat.nlink = stat.nlink.max(meta.nlink),
            _ => stat.nlink = meta.nlink,
        }
    }
    stat
}

/// The miss of an object whose attributes are not current.
fn stale(kind: Kind, fid: Fid) -> Stop {
    Stop::Miss(if kind == Kind::Dir { Want::Dir(fid) } else { Want::Object(fid) })
}

/// What must be fetched before `at..at + len` of the file can be read; `None` when it is here.
pub fn missing(meta: &Meta, at: u64, len: u64) -> Option<Stop> {
    meta.missing(at, len)?;
    let len = len.min(meta.base_size.saturating_sub(at));
    Some(Stop::Miss(Want::Bytes { fid: meta.fid, at, len }))
}

/// The clock of records: nanoseconds since the Unix epoch.
pub fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    since.as_nanos() as u64
}
