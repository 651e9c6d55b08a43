//! A client's connection to its server: one loop thread that carries out what lento decides.
//!
//! ```text
//!  filter's threads --want, ring--> loop (drive.rs) --notices--> notifier's thread --done--> loop
//!                                    |        ^
//!                                    v        |
//!                                  worker (work.rs): reads the journal, makes things durable
//! ```
//!
//! [`start`] begins it, the [`Handle`] speaks to it from any thread. No call of the handle waits
//! for the network but [`Handle::first_contact`] and [`Handle::shutdown`], which are told how long.
//! What somebody waits for ends with a call of his continuation, on the loop thread, exactly once,
//! whatever happens; so it must not wait itself.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::Sender;

use super::poll::{Loop, Waker};
use crate::kml::record::{Fid, Seq};
use crate::lento::client::Unmet;
use crate::lento::grant::{Figures, Grant};
use crate::lento::locks::LockAsk;
use crate::lento::message::{Code, Failed, Message, Space};
use crate::lento::policy;
use crate::lento::rights::{Held, Mode};
use crate::lento::room::Room;
use crate::replica::cache::Cache;
use crate::replica::hydrate::Notice;
use crate::replica::room::FiguresFile;
use crate::sys::{clock, fs};

mod drive;
mod files;
mod work;

/// The figure of [`Handle::space`] is asked for anew when it is older.
const SPACE_AGE: Duration = Duration::from_secs(1);

/// Where the server is.
pub enum Peer {
    /// host and port; the host's name is looked up at each attempt
    Tcp(String, u16),
    /// in this process: gives one end of a pair of which the server has the other
    Embedded(Box<dyn FnMut() -> std::io::Result<UnixStream> + Send>),
}

/// Tells the kernel what is not so any more.
pub trait Notify: Send {
    /// Called on the loop thread: must not wait, not even for the kernel. `done` is called, from
    /// any thread, when no reader sees the old state any more.
    fn stale(&mut self, what: Vec<Notice>, done: Box<dyn FnOnce() + Send>);
}

/// What may be chosen.
#[derive(Clone, Debug)]
pub struct Options {
    /// how long changes rest before they are shipped
    pub age: Duration,
    /// for people, at the server
    pub host: String,
    /// what may be done without asking, as the loop knows it
    pub rights: Arc<Held>,
    /// rights are kept while the mount rests
    pub keeps: bool,
    /// what may be written without asking, and the file that keeps it
    pub grant: Arc<Grant>,
    pub grant_file: Option<Arc<FiguresFile>>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            age: policy::AGE,
            host: String::new(),
            rights: Arc::default(),
            keeps: false,
            grant: Grant::off(),
            grant_file: None,
        }
    }
}

/// What somebody waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Want {
    /// a directory's entries and its own attributes
    Dir(Fid),
    /// an object's attributes; of a directory they come without its entries
    Object(Fid),
    /// `at..at + len` of a file
    Bytes { fid: Fid, at: u64, len: u64 },
    /// these are to be changed
    Permit(Few),
    /// so much is to be written, and is not granted
    Room(Room),
}

/// The objects of one operation: the first ones, up to the first `None`.
pub type Few = [Option<Fid>; 4];

/// What is called in the end.
pub type Then = Box<dyn FnOnce(Result<(), Unmet>) + Send>;

/// A continuation that is called in any case.
struct Waiter(Option<Then>);

impl Waiter {
    fn end(mut self, how: Result<(), Unmet>) {
        if let Some(then) = self.0.take() {
            then(how);
        }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        if let Some(then) = self.0.take() {
            then(Err(Unmet::Unreachable));
        }
    }
}

/// Why the first contact failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FirstContact {
    #[error("{server} cannot be reached: {what}")]
    Unreachable { server: String, what: String },
    #[error("{server} has no volume {volume}")]
    UnknownVolume { server: String, volume: String },
    #[error("{server} speaks another version of the protocol: {what}")]
    WrongVersion { server: String, what: String },
    #[error("the cache cannot be used with {server}: {what}")]
    ForeignCache { server: String, what: String },
    #[error("{server} refuses: {what} ({code:?})")]
    Refused { server: String, code: Code, what: String },
}

/// How the connection is doing.
#[derive(Clone, PartialEq, Debug)]
pub struct Snapshot {
    pub connected: bool,
    /// when `connected` last changed, and how long ago
    pub since: SystemTime,
    pub since_ago: Duration,
    /// not connected, and nobody waits for the server any more
    pub away: bool,
    /// records that the server lacks, and their contents, bytes
    pub pending_count: u64,
    pub pending_len: u64,
    /// age of the oldest of them
    pub oldest: Option<Duration>,
    /// bytes per second that went out, over the last few seconds
    pub rate: u64,
    /// requests since the start that somebody waited for
    pub requests_foreground: u64,
    /// sent and received since the start, but for pings
    pub messages: u64,
    /// what may be done with the volume, and with how many objects more or less
    pub permit: Mode,
    pub permits_apart: u64,
    /// room that is granted, and in use
    pub room: Figures,
    /// contents that were acknowledged since the start, bytes
    pub shipped_len: u64,
    /// versions that are kept aside at the server, as it last said
    pub conflicts: u64,
    /// that later changes made void before they were shipped, since the start: records, and
    /// contents, bytes
    pub saved_records: u64,
    pub saved_len: u64,
    pub clean_len: u64,
    pub dirty_len: u64,
    pub last_error: Option<String>,
    /// what people must hear of, although all goes on
    pub warning: Option<String>,
    /// `HOST:PORT`, or `local`
    pub server: String,
    pub volume: String,
    /// 0 until a server gave one
    pub node: u32,
}

/// What the loop is told.
enum In {
    Want(Want, Waiter),
    Timeout(Duration),
    ShipNow,
    WaitAcked(Seq, Waiter),
    WaitOnline(Waiter),
    Doubt(String),
    Keep,
    WantSpace,
    Lock(u64, LockAsk, drive::LockWaiter),
    CancelLock(u64),
    /// a question about conflicts; without an answer the sender is dropped
    Conflicts(Message, Sender<Result<Message, Failed>>),
    BreakDone {
        generation: u64,
        id: u64,
    },
    Told {
        generation: u64,
        recall_id: u64,
    },
    Resolved {
        found: std::io::Result<Vec<std::net::SocketAddr>>,
    },
    Cut {
        generation: u64,
        cut: work::Cut,
    },
    Stop,
}

/// What the loop tells others, each part under its own small lock.
struct Shared {
    cache: Arc<Cache>,
    inbox: Sender<In>,
    waker: Waker,
    server: String,
    facts: Mutex<Facts>,
    /// changes of `facts.contact`, and of what is acknowledged
    changed: Condvar,
    acked: AtomicU64,
    saved: Arc<work::Saved>,
    /// number of the last ask for a lock
    last_lock: AtomicU64,
    space: Mutex<(Space, Option<Instant>)>,
    rights: Arc<Held>,
    grant: Arc<Grant>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Facts {
    connected: bool,
    since: SystemTime,
    /// the same by a clock that nobody sets
    since_at: Instant,
    /// from when on nobody waits for the server
    away_at: Option<Instant>,
    rate: u64,
    requests_foreground: u64,
    messages: u64,
    shipped_len: u64,
    conflicts: u64,
    last_error: Option<String>,
    warning: Option<String>,
    /// the first answer of a server: caught up with it, or refused
    contact: Option<Result<(), (Code, String)>>,
}

impl Shared {
    fn facts(&self) -> MutexGuard<'_, Facts> {
        // Plain figures: whole after every statement.
        self.facts.lock().unwrap_or_else(|e| e.into_inner())
    }
    fn tell(&self, what: In) {
        // A loop that has ended drops what it is sent, and with it the waiters, who are told.
        if self.inbox.send(what).is_ok() {
            self.waker.wake();
        }
    }
}

/// Speaks to the loop. Cheap to clone.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

/// Starts the loop and its worker. The cache's state knows volume, incarnation and node; the
/// journal may name node 0, for a cache that has not met its server yet.
///
/// # Errors
/// As epoll_create(2) and pthread_create(3).
pub fn start(
    cache: Arc<Cache>,
    peer: Peer,
    options: Options,
    notifier: Box<dyn Notify>,
) -> std::io::Result<Handle> {
    let event_loop = Loop::new()?;
    let (inbox, outbox) = crossbeam_channel::unbounded();
    let waker = event_loop.waker();
    let server = match &peer {
        Peer::Tcp(host, port) if host.contains(':') => format!("[{host}]:{port}"),
        Peer::Tcp(host, port) => format!("{host}:{port}"),
        Peer::Embedded(_) => "local".to_owned(),
    };
    let here = fs::space(&**cache.tree.root()).unwrap_or_default();
    let shared = Arc::new(Shared {
        inbox,
        waker: waker.clone(),
        server,
        facts: Mutex::new(Facts {
            connected: false,
            since: SystemTime::now(),
            since_at: clock::now(),
            away_at: None,
            rate: 0,
            requests_foreground: 0,
            messages: 0,
            shipped_len: 0,
            conflicts: 0,
            last_error: None,
            warning: None,
            contact: None,
        }),
        changed: Condvar::new(),
        acked: AtomicU64::new(cache.acked().0),
        saved: Arc::default(),
        last_lock: AtomicU64::new(0),
        space: Mutex::new((space_of(&here), None)),
        rights: options.rights.clone(),
        grant: options.grant.clone(),
        thread: Mutex::new(None),
        cache: cache.clone(),
    });
    cache.bell.connect(Box::new(move || waker.wake()));
    let (tell, waker) = (shared.inbox.clone(), shared.waker.clone());
    let worker = work::start(cache, shared.grant.clone(), tell, waker, shared.saved.clone())?;
    let driver =
        drive::Driver::new(shared.clone(), peer, options, notifier, event_loop, outbox, worker);
    let thread = std::thread::Builder::new().name("imz-loop".into()).spawn(|| driver.run())?;
    *shared.thread.lock().unwrap_or_else(|e| e.into_inner()) = Some(thread);
    Ok(Handle(shared))
}

fn space_of(here: &fs::Space) -> Space {
    Space {
        block_len: here.block_len,
        blocks: here.blocks,
        blocks_free: here.blocks_free,
        blocks_available: here.blocks_available,
        files: here.files,
        files_free: here.files_free,
    }
}

/// What others cannot have is ours to write.
fn with_own(said: Space, free: Room) -> Space {
    let own = free.bytes().checked_div(u64::from(said.block_len)).unwrap_or(0);
    let blocks_available = said.blocks_available.saturating_add(own).min(said.blocks);
    let files_free = said.files_free.saturating_add(free.files()).min(said.files);
    Space { blocks_available, blocks_free: blocks_available, files_free, ..said }
}

impl Handle {
    /// Fetches what is wanted; `then` is called in any case. `Ok` means: answer now from what is
    /// here. That is as fresh as can be had, also where it is marked as stale again already.
    pub fn want(&self, want: Want, then: Then) {
        self.0.tell(In::Want(want, Waiter(Some(then))));
    }

    /// How long a silent server is waited for, from now on; `TIMEOUT` until it is said.
    pub fn set_timeout(&self, timeout: Duration) {
        self.0.tell(In::Timeout(timeout));
    }

    /// Ships what there is, whatever its age. When [`Handle::acked`] has reached the result, all
    /// that was journaled before this call is at the server.
    pub fn ship_now(&self) -> Seq {
        let last = self.0.cache.log.last();
        self.0.tell(In::ShipNow);
        last
    }

    /// The newest record that the server keeps.
    pub fn acked(&self) -> Seq {
        Seq(self.0.acked.load(Ordering::Acquire))
    }

    /// Ships, and calls `then` when the server keeps everything up to `seq`; with `Unreachable`
    /// when nothing was acknowledged for the timeout while the server is away.
    pub fn wait_acked(&self, seq: Seq, then: Then) {
        self.0.tell(In::WaitAcked(seq, Waiter(Some(then))));
    }

    /// Calls `then` once the server is there; with `Unreachable` if the loop ends before.
    pub fn wait_online(&self, then: Then) {
        self.0.tell(In::WaitOnline(Waiter(Some(then))));
    }

    /// Nothing in the cache is taken for current any more, for this reason: all of it is compared with
    /// what the server has.
    pub fn doubt_all(&self, why: String) {
        self.0.tell(In::Doubt(why));
    }

    /// Has all that is known made durable soon, the acknowledgements of the server among it.
    pub fn keep_now(&self) {
        self.0.tell(In::Keep);
    }

    pub fn status(&self) -> Snapshot {
        let cache = &self.0.cache;
        let (pending_count, pending_len, oldest_ns) = {
            let pending = cache.pending();
            (pending.count(), pending.len(), pending.oldest_ns())
        };
        let (clean_len, dirty_len) = cache.clean_and_dirty();
        let state = cache.state.facts();
        let (permit, permits_apart) =
            self.0.rights.edit(|rights| (rights.volume(), rights.apart_count()));
        let facts = self.0.facts();
        Snapshot {
            connected: facts.connected,
            since: facts.since,
            since_ago: clock::now().saturating_duration_since(facts.since_at),
            away: !facts.connected && facts.away_at.is_some_and(|at| clock::now() >= at),
            pending_count,
            pending_len,
            oldest: oldest_ns.map(clock::age_of),
            rate: facts.rate,
            requests_foreground: facts.requests_foreground,
            messages: facts.messages,
            permit,
            permits_apart: permits_apart as u64,
            room: self.0.grant.figures(),
            shipped_len: facts.shipped_len,
            conflicts: facts.conflicts,
            saved_records: self.0.saved.records.load(Ordering::Relaxed),
            saved_len: self.0.saved.len.load(Ordering::Relaxed),
            clean_len,
            dirty_len,
            last_error: facts.last_error.clone(),
            warning: facts.warning.clone(),
            server: self.0.server.clone(),
            volume: state.volume,
            node: state.node,
        }
    }

    /// The room that the volume has, as the server last said; before it ever did, that of the
    /// cache's file system. Never waits.
    pub fn space(&self) -> Space {
        let mut space = self.0.space.lock().unwrap_or_else(|e| e.into_inner());
        let now = Instant::now();
        let space_heard = space.1.is_some();
        if space.1.is_none_or(|asked| now >= asked + SPACE_AGE) {
            space.1 = Some(now);
            self.0.tell(In::WantSpace);
        }
        let shown = space.0;
        drop(space);
        let grant = &self.0.grant;
        match space_heard && !grant.is_off() {
            true => with_own(shown, grant.figures().free),
            false => shown,
        }
    }

    /// Asks the server about conflicts, or decides about one; waits for the answer.
    ///
    /// # Errors
    /// Why not, for people.
    pub fn conflicts(&self, ask: super::conflicts::Ask) -> Result<serde_json::Value, String> {
        let (reply, answer) = crossbeam_channel::bounded(1);
        self.0.tell(In::Conflicts(ask.into(), reply));
        match answer.recv_timeout(super::conflicts::ANSWER_TIME_MAX) {
            Ok(answer) => super::conflicts::told(answer),
            Err(_) => Err(format!(
                "{} is away or does not answer, and the conflicts are there: try again later",
                self.0.server
            )),
        }
    }

    /// Waits until the cache has caught up with the server for the first time.
    ///
    /// # Errors
    /// See [`FirstContact`]. Attempts go on: a cache that is known can be used meanwhile.
    pub fn first_contact(&self, timeout: Duration) -> Result<(), FirstContact> {
        self.contact(timeout, |facts| facts.contact.is_none())
    }

    /// The same, but waits for one attempt only, where that fails at once.
    ///
    /// # Errors
    /// See [`Handle::first_contact`].
    pub fn first_attempt(&self, timeout: Duration) -> Result<(), FirstContact> {
        self.contact(timeout, |facts| facts.contact.is_none() && facts.last_error.is_none())
    }

    fn contact(
        &self,
        timeout: Duration,
        waiting: impl FnMut(&mut Facts) -> bool,
    ) -> Result<(), FirstContact> {
        let facts = self.0.facts();
        let (facts, _) = self
            .0
            .changed
            .wait_timeout_while(facts, timeout, waiting)
            .unwrap_or_else(|e| e.into_inner());
        let server = self.0.server.clone();
        let (code, what) = match &facts.contact {
            Some(Ok(())) => return Ok(()),
            Some(Err((code, what))) => (*code, what.clone()),
            None => {
                let what = facts.last_error.clone();
                let what = what.unwrap_or_else(|| "it does not answer".to_owned());
                return Err(FirstContact::Unreachable { server, what });
            }
        };
        Err(match code {
            Code::UnknownVolume => {
                let volume = self.0.cache.state.facts().volume;
                FirstContact::UnknownVolume { server, volume }
            }
            Code::WrongVersion => FirstContact::WrongVersion { server, what },
            Code::ForeignCache => FirstContact::ForeignCache { server, what },
            code => FirstContact::Refused { server, code, what },
        })
    }

    /// Ships what pends for at most `patience`, makes all that is known durable, and ends the
    /// loop: whoever still waits is told that the server cannot be reached. True when nothing
    /// pends any more. What does is shipped after the next start.
    pub fn shutdown(&self, patience: Duration) -> bool {
        let last = self.ship_now();
        let until = Instant::now() + patience;
        {
            let mut facts = self.0.facts();
            while self.acked() < last && Instant::now() < until {
                // Also a server that comes back late is worth the patience that is left.
                let step = (until - Instant::now()).min(Duration::from_millis(100));
                let waited = self.0.changed.wait_timeout(facts, step);
                facts = waited.unwrap_or_else(|e| e.into_inner()).0;
            }
        }
        self.0.tell(In::Stop);
        let thread = self.0.thread.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(Err(_)) = thread.map(JoinHandle::join) {
            log::error!("the loop ended by a panic");
        }
        self.0.cache.pending().is_empty()
    }
}

#[cfg(test)]
mod tests;
