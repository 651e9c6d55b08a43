//! What is the same however requests come in: run the operation, and see to its one answer.
//!
//! An operation is tried at once, on the thread that read the request. If it misses, the request
//! is kept as it came, what it wants goes to lento, and it is taken apart and run again when the
//! want is met: no thread waits. With `-o offline=wait` what misses while the server is away is kept in
//! the same way until it is back. What waits for a disk goes to threads of its own, so that those
//! that read requests do not. Absent on purpose: descriptors of the kernel (`device`), what an
//! operation does (`answer`).

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use crossbeam_channel::{Receiver, Sender};

use super::abi::reply::{self, OpenFlags};
use super::abi::{Lock, LockType, Op, Raw, Request};
use super::filter::{FRESH_TRIES_MAX, Filter, Result, Stop, TRIES_MAX, Want, as_is};
use super::open::{Grip, Open, held};
use super::parked::{Interrupted, Parked, Ticket};
use crate::kml::record::Fid;
use crate::lento::locks::{LockAsk, LockHeld, LockKind};
use crate::sys::{Errno, dev_fuse};

/// Requests that may wait for a thread that waits for the disk; then it is done at once.
const SLOW_QUEUE_MAX: usize = 1024;
/// Threads that wait for the disk.
const SLOW_THREADS: usize = 2;

#[derive(Default)]
struct Handles {
    next: u64,
    open: HashMap<u64, Arc<Grip>>,
}

/// The kernel's name for a backing file; given back on drop.
struct Backing {
    dev: Arc<OwnedFd>,
    id: i32,
}

impl Drop for Backing {
    fn drop(&mut self) {
        // With the mount gone it went, too.
        let _ = dev_fuse::backing_close(&self.dev, self.id);
    }
}

/// Of one mount.
pub struct Adapter {
    pub filter: Arc<Filter>,
    /// fsync waits for the server
    sync: bool,
    /// flock and fcntl come to us; otherwise the kernel keeps them by itself
    locks: bool,
    dev: Arc<OwnedFd>,
    handles: Mutex<Handles>,
    /// the kernel's name for the backing file of an open object
    backings: Mutex<HashMap<Fid, Arc<Backing>>>,
    parked: Parked,
    /// what misses while the server is away waits for it
    waits: bool,
    patient: Mutex<Patient>,
    /// owners that may have fcntl locks on a file: their closes end them
    lock_owners: Mutex<HashSet<(Fid, u64)>>,
    slow: (Sender<Slow>, Receiver<Slow>),
}

/// What became of a request so far.
#[derive(Clone, Copy, Default)]
struct Tries {
    count: u32,
    /// what it wanted last, when the server was away
    unmet: Option<Want>,
}

/// Requests that wait for the server to come back, as they came, by number.
#[derive(Default)]
struct Patient {
    requests: HashMap<u64, (Vec<u8>, Tries)>,
    /// we are to be told when it is back
    asked: bool,
}

/// What distinguishes one mount's adapter from another's.
#[derive(Clone, Copy, Debug)]
pub struct Ways {
    /// fsync waits for the server
    pub sync: bool,
    /// flock and fcntl locks are asked for; otherwise the kernel keeps them by itself
    pub locks: bool,
    /// what misses while the server is away waits until it is back
    pub waits: bool,
}

/// A request, as it came, for a thread that may wait for the disk.
type Slow = (Vec<u8>, Ticket);

impl Adapter {
    pub fn new(filter: Arc<Filter>, dev: Arc<OwnedFd>, ways: Ways) -> Arc<Adapter> {
        let Ways { sync, locks, waits } = ways;
        Arc::new(Adapter {
            filter,
            sync,
            locks,
            waits,
            patient: Mutex::default(),
            dev,
            handles: Mutex::default(),
            backings: Mutex::default(),
            parked: Parked::default(),
            lock_owners: Mutex::default(),
            slow: crossbeam_channel::bounded(SLOW_QUEUE_MAX),
        })
    }

    /// Starts the threads that wait for the disk; they end with the adapter.
    pub fn start(self: &Arc<Adapter>) -> io::Result<()> {
        for _ in 0..SLOW_THREADS {
            let (me, queue) = (Arc::downgrade(self), self.slow.1.clone());
            std::thread::Builder::new().name("fuse-slow".into()).spawn(move || {
                for (bytes, ticket) in queue {
                    let Some(me) = me.upgrade() else { break };
                    me.run_kept(bytes, ticket, Tries::default());
                }
            })?;
        }
        Ok(())
    }

    /// Sees to one request: it is answered now or later, once.
    pub fn serve(self: &Arc<Adapter>, raw: Raw<'_>, ticket: Ticket) {
        match raw.parse() {
            Ok(request) if is_slow(&request.op) => {
                if let Err(full) = self.slow.0.try_send((raw.to_vec(), ticket)) {
                    let (bytes, ticket) = full.into_inner();
                    self.run_kept(bytes, ticket, Tries::default());
                }
            }
            Ok(request) => self.run(raw, &request, ticket, Tries::default()),
            Err(e) => {
                log::error!("{e}");
                ticket.answer(Err(Errno::IO));
            }
        }
    }

    fn run_kept(self: &Arc<Adapter>, bytes: Vec<u8>, ticket: Ticket, tries: Tries) {
        let raw = Raw::whole(&bytes);
        match raw.and_then(|raw| Ok((raw, raw.parse()?))) {
            Ok((raw, request)) => self.run(raw, &request, ticket, tries),
            Err(_) => ticket.answer(Err(Errno::IO)),
        }
    }

    fn run(self: &Arc<Adapter>, raw: Raw<'_>, request: &Request<'_>, ticket: Ticket, tries: Tries) {
        match request.op {
            Op::Forget => return ticket.needs_none(),
            Op::Interrupt { unique } => {
                ticket.needs_none();
                let interrupted = self.parked.interrupt(unique);
                held(&self.patient).requests.remove(&unique);
                if let Interrupted::Cancel(lock) = interrupted {
                    self.filter.cancel_lock(lock);
                }
                return;
            }
            Op::Lock(lock) => return self.lock(Fid(request.head.nodeid), &lock, ticket),
            _ => {}
        }
        let done = catch_unwind(AssertUnwindSafe(|| match tries.count {
            ..FRESH_TRIES_MAX => self.perform(request),
            _ => as_is(|| self.perform(request)),
        }));
        match done {
            Ok(Ok(body)) => self.finish(request, ticket, body),
            Ok(Err(Stop::Errno(e))) => ticket.answer(Err(e)),
            Ok(Err(Stop::Miss(_))) if tries.count >= TRIES_MAX => ticket.answer(Err(Errno::BUSY)),
            Ok(Err(Stop::Miss(want))) if tries.unmet == Some(want) && self.is_away() => {
                self.unreachable(raw.to_vec(), ticket, tries);
            }
            Ok(Err(Stop::Miss(want))) => self.fetch(want, raw.to_vec(), ticket, tries),
            Err(_) => {
                log::error!("an operation panicked; it fails with EIO");
                ticket.answer(Err(Errno::IO));
            }
        }
    }

    /// What comes after success and before the answer.
    fn finish(self: &Arc<Adapter>, request: &Request<'_>, ticket: Ticket, body: Vec<u8>) {
        let fid = Fid(request.head.nodeid);
        match request.op {
            Op::Fsync { .. } | Op::Fsyncdir if self.sync => {
                let (unique, me) = (ticket.unique(), self.clone());
                let last = self.filter.cache.log.last();
                if self.parked.park(ticket) {
                    let acked = move |acked: std::result::Result<(), Errno>| {
                        if let Some(ticket) = me.parked.take(unique) {
                            ticket.answer(acked.map(|()| body));
                        }
                    };
                    self.filter.lento.when_acked(last, Box::new(acked));
                }
            }
            Op::Flush { owner, .. } if held(&self.lock_owners).remove(&(fid, owner)) => {
                self.unlock(fid, owner, false, ticket, body);
            }
            Op::Release { owner, flock: true, .. } if self.locks => {
                self.unlock(fid, owner, true, ticket, body);
            }
            _ => ticket.answer(Ok(body)),
        }
    }

    /// Has something fetched, and then runs the request again.
    fn fetch(self: &Arc<Adapter>, want: Want, bytes: Vec<u8>, ticket: Ticket, tries: Tries) {
        let (unique, me) = (ticket.unique(), self.clone());
        if !self.parked.park(ticket) {
            return;
        }
        let again = move |met: std::result::Result<(), Errno>| {
            // One that was interrupted meanwhile is answered, and must not be done any more.
            let Some(ticket) = me.parked.take(unique) else { return };
            let count = tries.count + 1;
            match met {
                Ok(()) => me.run_kept(bytes, ticket, Tries { count, unmet: None }),
                // The server is away since somebody asked it: then what is here is good, as it is.
                Err(Errno::HOSTUNREACH) => {
                    me.run_kept(bytes, ticket, Tries { count, unmet: Some(want) });
                }
                Err(e) => ticket.answer(Err(e)),
            }
        };
        self.filter.lento.want(want, Box::new(again));
    }

    fn is_away(&self) -> bool {
        !self.filter.cache.is_online()
    }

    /// Ends a request that cannot be served without the server; or keeps it until the server is
    /// back, or somebody interrupts it.
    fn unreachable(self: &Arc<Adapter>, bytes: Vec<u8>, ticket: Ticket, tries: Tries) {
        if !self.waits {
            return ticket.answer(Err(Errno::HOSTUNREACH));
        }
        let unique = ticket.unique();
        if !self.parked.park(ticket) {
            return;
        }
        let asked = {
            let mut patient = held(&self.patient);
            patient.requests.insert(unique, (bytes, tries));
            if !self.parked.has(unique) {
                patient.requests.remove(&unique); // it was interrupted in this moment
            }
            std::mem::replace(&mut patient.asked, true)
        };
        if !asked {
            let me = self.clone();
            self.filter.lento.when_back(Box::new(move |is_back| me.on_back(is_back)));
        }
    }

    /// Not `is_back`: nobody will tell us, for the mount ends.
    fn on_back(self: &Arc<Adapter>, is_back: bool) {
        let patient = std::mem::take(&mut *held(&self.patient));
        for (unique, (bytes, tries)) in patient.requests {
            let Some(ticket) = self.parked.take(unique) else { continue };
            match is_back {
                true => self.run_kept(bytes, ticket, tries),
                false => ticket.answer(Err(Errno::HOSTUNREACH)),
            }
        }
    }

    fn lock(self: &Arc<Adapter>, fid: Fid, lock: &Lock, ticket: Ticket) {
        if !self.locks {
            return ticket.answer(Err(Errno::NOSYS));
        }
        if !lock.flock && !lock.test && lock.kind != LockType::Unlock {
            held(&self.lock_owners).insert((fid, lock.owner));
        }
        let (unique, me, test) = (ticket.unique(), self.clone(), lock.test);
        if !self.parked.park_for_lock(ticket) {
            return;
        }
        let ended = move |result: std::result::Result<Option<LockHeld>, Errno>| {
            if let Some(ticket) = me.parked.take(unique) {
                ticket.answer(result.map(|other| if test { in_the_way(other) } else { vec![] }));
            }
        };
        let number = self.filter.lock(ask(fid, lock), Box::new(ended));
        if self.parked.asked(unique, number) {
            self.filter.cancel_lock(number);
        }
    }

    /// Ends all locks of an owner on a file, then answers with `body`.
    fn unlock(&self, fid: Fid, owner: u64, flock: bool, ticket: Ticket, body: Vec<u8>) {
        let (kind, pid, wait, test) = (LockKind::Unlock, 0, false, false);
        let ask = LockAsk { fid, owner, flock, start: 0, end: u64::MAX, kind, pid, wait, test };
        let ended = move |result: std::result::Result<Option<LockHeld>, Errno>| {
            if let Err(e) = result {
                log::warn!("{fid}: locks of a file that was closed: {e}");
            }
            ticket.answer(Ok(body));
        };
        self.filter.lock(ask, Box::new(ended));
    }

    pub fn handle(&self, fh: u64) -> Result<Arc<Grip>> {
        Ok(held(&self.handles).open.get(&fh).cloned().ok_or(Errno::BADF)?)
    }

    /// A new handle, and how the kernel is to treat it.
    pub fn add(&self, grip: Grip) -> (u64, OpenFlags) {
        let backing = self.backing(&grip.open);
        let flags = OpenFlags {
            // A reader's close tells us nothing, unless it ends locks.
            no_flush: !grip.writer && !self.locks,
            // Then the kernel's pages are as good as a promise.
            keep_cache: self.keeps_pages(&grip.open),
            direct: grip.direct,
            backing: backing.map(|backing| backing.id),
        };
        let mut handles = held(&self.handles);
        handles.next += 1;
        let fh = handles.next;
        handles.open.insert(fh, Arc::new(grip));
        (fh, flags)
    }

    /// The kernel's name for the open file's backing, one an object; `None`: by the daemon then.
    fn backing(&self, open: &Open) -> Option<Arc<Backing>> {
        if !open.passthrough {
            return None;
        }
        let mut backings = held(&self.backings);
        if let Some(id) = backings.get(&open.fid) {
            return Some(id.clone());
        }
        match dev_fuse::backing_open(&self.dev, &open.fd) {
            Ok(id) => {
                let id = Arc::new(Backing { dev: self.dev.clone(), id });
                backings.insert(open.fid, id.clone());
                Some(id)
            }
            Err(e) => {
                log::debug!("no passthrough for {}: {e}", open.fid);
                None
            }
        }
    }

    /// Where the daemon always moves the data, and what is here is what the server has.
    fn keeps_pages(&self, open: &Open) -> bool {
        let current = || {
            let meta = self.filter.cache.tree.meta_of(&open.fd);
            meta.is_ok_and(|meta| meta.is_some_and(|meta| self.filter.cache.current(&meta)))
        };
        !self.filter.passthrough.load(Ordering::Relaxed) && current()
    }

    pub fn close(&self, fh: u64) -> Result<()> {
        let Some(handle) = held(&self.handles).open.remove(&fh) else { return Ok(()) };
        // Under the lock that opens take: a new first handle must not find the old backing.
        let mut backings = held(&self.backings);
        let (last, stored) = self.filter.close(&handle);
        if last {
            backings.remove(&handle.open.fid);
        }
        drop(backings);
        let (fid, writer) = (handle.open.fid, handle.writer && handle.open.passthrough);
        drop(handle); // it can write, too
        if last && writer {
            self.filter.watch_if_mapped(fid);
        }
        stored
    }
}

/// What waits for a disk, or moves much data.
fn is_slow(op: &Op) -> bool {
    matches!(op, Op::Fsync { .. } | Op::Fsyncdir | Op::Fallocate { .. } | Op::CopyRange { .. })
}

fn ask(fid: Fid, lock: &Lock) -> LockAsk {
    let kind = match lock.kind {
        LockType::Read => LockKind::Read,
        LockType::Write => LockKind::Write,
        LockType::Unlock => LockKind::Unlock,
    };
    let Lock { owner, flock, start, end, pid, wait, test, .. } = *lock;
    LockAsk { fid, owner, flock, start, end, kind, pid, wait, test }
}

/// The answer to F_GETLK.
fn in_the_way(other: Option<LockHeld>) -> Vec<u8> {
    let Some(other) = other else { return reply::lock(0, 0, LockType::Unlock, 0) };
    let kind = match other.kind {
        LockKind::Read => LockType::Read,
        LockKind::Write => LockType::Write,
        LockKind::Unlock => LockType::Unlock,
    };
    reply::lock(other.start, other.end, kind, other.pid)
}
