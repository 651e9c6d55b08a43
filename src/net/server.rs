//! The server's event loop: it carries out what the machine (lento/server.rs) decides.
//!
//! One thread has the sockets, the machine and the volumes; what it does never waits but for the
//! disk. A second one, the syncer, makes things durable, so that nobody who reads waits for that.
//! A stop (SIGTERM, SIGINT, [`Handle::stop`]) waits a moment for what is applied to be acknowledged,
//! then closes the volumes cleanly. Peers in the same process come in by [`Handle::connect`].

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::answer;
use super::conflicts;
use super::conn::{Conn, Fault, Incoming, Lane};
use super::handle::{Handle, LocalAsk, Report, Shared, VolumeReport};
use super::poll::{Event, Listener, Loop, Stream, Token, Waker};
use super::room;
use super::volumes::{OrderError, Served, Waiting};
use crate::kml::record::Stamp;
use crate::lento::message::{Code, Failed, Message, Resolve};
use crate::lento::promises::ConnId;
use crate::lento::server::{Effect, Server as Machine, Settings, VolumeNo, Why};
use crate::replica::usage::Counted;
use crate::replica::volume::{self, SyncJob, Volume, VolumeError};
use crate::sys::crash;

/// Longest wait, at a stop, for what is applied to be acknowledged.
const STOP_MAX: Duration = Duration::from_secs(2);
/// Pause after a connection could not be accepted (out of descriptors, most likely).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A sync is followed by a pause as long as itself, but no longer than this.
const SYNC_PAUSE_MAX: Duration = Duration::from_millis(250);
/// How often the figures for people are brought up to date.
const REPORT_EVERY: Duration = Duration::from_secs(1);
const TOKEN_LISTENER: Token = Token(0);
/// Connection n has this token and n.
const TOKEN_CONN: usize = 1;

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("{path}: {source}")]
    Volume { path: PathBuf, source: VolumeError },
    #[error("{path}: {why}")]
    Order { path: PathBuf, why: OrderError },
    #[error("cannot listen on {addr}: {source}")]
    Listen { addr: SocketAddr, source: io::Error },
    #[error("the event loop: {0}")]
    Loop(#[from] io::Error),
}

/// What to serve.
#[derive(Clone, Debug)]
pub struct Export {
    /// of the volume
    pub name: String,
    pub dir: PathBuf,
    /// imz's own state; `.imz` in the directory if not told
    pub state: Option<PathBuf>,
}

/// A server that runs in a thread of this process, for one volume; it ends with this.
pub struct Embedded {
    handle: Handle,
    thread: Option<JoinHandle<Result<(), ServerError>>>,
}

impl Embedded {
    /// # Errors
    /// As socketpair(2).
    pub fn connect(&self) -> io::Result<UnixStream> {
        self.handle.connect()
    }
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }
    /// Ends it cleanly. Durable on return: yes.
    ///
    /// # Errors
    /// Why it did not end well, now or earlier.
    pub fn stop(mut self) -> Result<(), ServerError> {
        self.end()
    }
    fn end(&mut self) -> Result<(), ServerError> {
        self.handle.stop();
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(io::Error::other("the server's thread panicked").into()),
            None => Ok(()),
        }
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            log::error!("the embedded server: {e}");
        }
    }
}

/// Everything that listens, and the volumes behind it.
pub struct Server {
    pub(super) poll: Loop,
    listener: Option<Listener>,
    accept_at: Option<Instant>,
    pub(super) machine: Machine,
    pub(super) volumes: Served,
    /// orders that wait for something
    pub(super) waiting: Vec<Waiting>,
    conns: BTreeMap<ConnId, Conn>,
    /// connections that may have something to read although no event says so
    readable: BTreeSet<ConnId>,
    /// connections with something to send
    dirty: BTreeSet<ConnId>,
    last_conn: u32,
    /// decisions that came from this process, and who waits for them
    locals: BTreeMap<ConnId, Sender<Message>>,
    pub(super) shared: Arc<Shared>,
    jobs: Sender<(VolumeNo, SyncJob)>,
    synced: Receiver<(VolumeNo, volume::Result<Stamp>)>,
    pub(super) count_done: Sender<(VolumeNo, volume::Result<Counted>)>,
    counted: Receiver<(VolumeNo, volume::Result<Counted>)>,
    bytes_in: u64,
    bytes_out: u64,
    last_error: Option<String>,
}

impl Server {
    /// Opens the port, and then the volumes; clients are served by [`Server::run`].
    ///
    /// # Errors
    /// A volume or the port; what was opened before is closed again.
    pub fn open(
        exports: &[Export],
        listen: Option<SocketAddr>,
        settings: Settings,
    ) -> Result<Server, ServerError> {
        let mut server = Server::new(listen, settings)?;
        for export in exports {
            let at = |source| ServerError::Volume { path: export.dir.clone(), source };
            let volume =
                Volume::open(&export.dir, export.state.as_deref(), &export.name).map_err(at)?;
            let at = |(why, _)| ServerError::Order { path: export.dir.clone(), why };
            server.serve(volume).map_err(at)?;
        }
        Ok(server)
    }
    /// Opens the port; volumes come by [`Server::serve`].
    ///
    /// # Errors
    /// The port, or the loop.
    pub fn new(listen: Option<SocketAddr>, settings: Settings) -> Result<Server, ServerError> {
        let poll = Loop::new()?;
        let mut listener = None;
        if let Some(addr) = listen {
            let at = |source| ServerError::Listen { addr, source };
            let mut bound = Listener::tcp(addr).map_err(at)?;
            poll.add_listener(&mut bound, TOKEN_LISTENER)?;
            listener = Some(bound);
        }
        let (jobs, todo) = unbounded();
        let (done, synced) = unbounded();
        let (count_done, counted) = unbounded();
        let waker = poll.waker();
        std::thread::Builder::new().name("syncer".into()).spawn(move || {
            syncer(&todo, &done, &waker);
        })?;
        Ok(Server {
            poll,
            listener,
            accept_at: None,
            machine: Machine::new(settings),
            volumes: Served::default(),
            waiting: Vec::new(),
            conns: BTreeMap::new(),
            readable: BTreeSet::new(),
            dirty: BTreeSet::new(),
            last_conn: 0,
            locals: BTreeMap::new(),
            shared: Arc::default(),
            jobs,
            synced,
            count_done,
            counted,
            bytes_in: 0,
            bytes_out: 0,
            last_error: None,
        })
    }
    /// Serves a directory to this process alone, in a thread of its own.
    ///
    /// # Errors
    /// The volume cannot be opened.
    pub fn embedded(export: &Export) -> Result<Embedded, ServerError> {
        let server = Server::open(std::slice::from_ref(export), None, Settings::default())?;
        let handle = server.handle();
        let thread =
            std::thread::Builder::new().name("server".into()).spawn(move || server.run())?;
        Ok(Embedded { handle, thread: Some(thread) })
    }
    /// Where it listens: the port that was given, or that the kernel chose for port 0.
    pub fn addr(&self) -> Option<SocketAddr> {
        self.listener.as_ref().and_then(Listener::addr)
    }
    /// SIGTERM and SIGINT stop the server, cleanly.
    ///
    /// # Errors
    /// As sigaction(2).
    pub fn take_signals(&mut self) -> io::Result<()> {
        self.poll.take_signals()
    }
    pub fn handle(&self) -> Handle {
        Handle { shared: self.shared.clone(), waker: self.poll.waker() }
    }

    /// Serves until it is stopped. Durable on return: yes.
    ///
    /// # Errors
    /// The loop failed, or a volume could not be closed cleanly.
    pub fn run(mut self) -> Result<(), ServerError> {
        let mut events = Vec::new();
        let mut stop_by: Option<Instant> = None;
        let mut report_at = Instant::now();
        // the last report names no clients: without them nothing changes that one would say
        let mut quiet = false;
        loop {
            let now = Instant::now();
            if now >= report_at {
                self.survey(now);
                self.report();
                quiet = self.conns.is_empty();
                report_at = now + REPORT_EVERY;
            }
            let over = stop_by.is_some_and(|by| now >= by || self.machine.is_idle());
            if over {
                break;
            }
            let mut wake_at = self.machine.wake_at();
            let orders = self.orders_wake_at();
            for at in [self.accept_at, stop_by, orders, Some(report_at)].into_iter().flatten() {
                let idle = at == report_at && quiet && self.conns.is_empty();
                if !idle {
                    wake_at = Some(wake_at.map_or(at, |wake| wake.min(at)));
                }
            }
            let timeout = match self.readable.is_empty() {
                true => wake_at.map(|at| at.saturating_duration_since(now)),
                false => Some(Duration::ZERO),
            };
            self.poll.wait(timeout, &mut events)?;
            for event in &events {
                match *event {
                    Event::Terminate => self.shared.stop(),
                    Event::Woken => {}
                    Event::Ready { token: TOKEN_LISTENER, .. } => self.accept_at = Some(now),
                    Event::Ready { token, readable, writable } => {
                        let conn = ConnId((token.0 - TOKEN_CONN) as u32);
                        if readable {
                            self.readable.insert(conn);
                        }
                        if writable {
                            self.dirty.insert(conn);
                        }
                    }
                }
            }
            if stop_by.is_none() && self.shared.is_stopped() {
                log::info!("stopping");
                stop_by = Some(Instant::now() + STOP_MAX);
            }
            if self.turn(Instant::now()) {
                report_at = now; // who gave an order wants to see what came of it
            }
        }
        for conn in self.conns.values_mut() {
            let _ = conn.flush(); // what it does not take now it asks for again
        }
        self.close()
    }
    /// One round over everything that is ready. True if there was an order.
    fn turn(&mut self, now: Instant) -> bool {
        if self.accept_at.is_some_and(|at| at <= now) {
            self.accept(now);
        }
        for stream in self.shared.take_streams() {
            match Stream::from_unix(stream) {
                Ok(stream) => self.add(stream, now),
                Err(e) => log::warn!("a connection of this process: {e}"),
            }
        }
        for ask in self.shared.take_asks() {
            self.answer_local(ask, now);
        }
        while let Ok((volume, result)) = self.synced.try_recv() {
            let stamp = match result {
                Ok(stamp) => {
                    if let Some(of) = self.volumes.get_mut(volume) {
                        of.synced();
                    }
                    crash::point("sync-told");
                    Some(stamp)
                }
                Err(e) => {
                    let name = self.volumes.get_mut(volume).map_or("", |of| of.name());
                    log::error!("{name}: cannot be made durable, takes no more changes: {e}");
                    self.last_error = Some(e.to_string());
                    None
                }
            };
            self.machine.on_synced(volume, stamp);
        }
        while let Ok((volume, walked)) = self.counted.try_recv() {
            self.on_counted(volume, walked);
        }
        self.drain(now);
        for conn in std::mem::take(&mut self.readable) {
            self.read(conn, now);
        }
        if self.machine.wake_at().is_some_and(|at| at <= now) {
            self.machine.wake(now);
            self.drain(now);
        }
        let ordered = self.take_orders(now);
        for conn in std::mem::take(&mut self.dirty) {
            self.flush(conn, now);
        }
        ordered
    }
    fn close(self) -> Result<(), ServerError> {
        let mut result = Ok(());
        for volume in self.volumes.into_volumes() {
            let path = volume.path().to_owned();
            if let Err(source) = volume.close() {
                result = Err(ServerError::Volume { path, source });
            }
        }
        result
    }

    fn accept(&mut self, now: Instant) {
        self.accept_at = None;
        loop {
            let accepted = self.listener.as_ref().map_or(Ok(None), Listener::accept);
            match accepted {
                Ok(Some(stream)) => self.add(stream, now),
                Ok(None) => return,
                Err(e) => {
                    log::warn!("cannot accept a connection: {e}");
                    self.accept_at = Some(now + ACCEPT_PAUSE);
                    return;
                }
            }
        }
    }
    fn add(&mut self, mut stream: Stream, now: Instant) {
        self.last_conn += 1;
        let conn = ConnId(self.last_conn);
        if let Err(e) = self.poll.add_stream(&mut stream, Token(TOKEN_CONN + conn.0 as usize)) {
            log::warn!("cannot take a connection: {e}");
            return;
        }
        log::debug!("connection {} from {}", conn.0, stream.peer());
        let compress = !stream.is_local();
        self.conns.insert(conn, Conn::new(stream, compress));
        self.machine.on_connect(conn, now);
        self.readable.insert(conn);
    }
    fn read(&mut self, conn: ConnId, now: Instant) {
        let Some(from) = self.conns.get_mut(&conn) else { return };
        let result = from.read();
        if from.has_more() {
            self.readable.insert(conn);
        }
        match result {
            Ok(incoming) => {
                for incoming in incoming {
                    self.take(conn, incoming, now);
                    self.drain(now);
                }
            }
            Err(fault) => {
                match &fault {
                    Fault::Closed => log::debug!("connection {}: {fault}", conn.0),
                    // so ends a process that is killed
                    Fault::Io(e) if e.kind() == io::ErrorKind::ConnectionReset => {
                        log::debug!("connection {}: {fault}", conn.0);
                    }
                    _ => log::warn!("connection {}: {fault}", conn.0),
                }
                self.drop_conn(conn);
                self.machine.on_closed(conn, now);
                self.drain(now);
            }
        }
    }
    fn take(&mut self, conn: ConnId, incoming: Incoming, now: Instant) {
        let Incoming { id, answer, message } = incoming;
        match message {
            Message::Batch(batch) if !answer => {
                let (after, upto) = (batch.after, batch.upto);
                match answer::changes(batch) {
                    Ok(changes) => {
                        self.machine.on_batch(conn, id, (after, upto), changes, now);
                    }
                    Err(e) => self.machine.on_garbage(conn, &e.to_string(), now),
                }
            }
            Message::Resolve(ask) if !answer => self.resolve(conn, id, ask, now),
            message => self.machine.on_message(conn, id, answer, message, now),
        }
    }
    /// A decision about a conflict: first it is looked at what it would change.
    fn resolve(&mut self, conn: ConnId, id: u64, ask: Resolve, now: Instant) {
        let touched = match self.machine.volume_at(conn) {
            Some(volume) => {
                let choice = conflicts::choice(&ask.choice);
                let touched = self.volumes[volume].conflict_touches(&ask.id, &choice);
                touched.map_err(|e| answer::failure(&e))
            }
            None => Ok(Vec::new()), // the machine says what that means
        };
        self.machine.on_resolve(conn, id, ask, touched, now);
    }
    /// Somebody in this process has a question about conflicts.
    fn answer_local(&mut self, ask: LocalAsk, now: Instant) {
        let of_name = |(_, volume): &(VolumeNo, &Volume)| volume.name() == ask.volume;
        let Some((no, _)) = self.volumes.iter().find(of_name) else { return };
        match ask.message {
            Message::Resolve(resolve) => {
                self.last_conn += 1;
                let conn = ConnId(self.last_conn);
                self.locals.insert(conn, ask.reply);
                self.machine.on_local(conn, no, now);
                self.resolve(conn, 0, resolve, now);
            }
            message => {
                let (answer, _) = answer::answer(&mut self.volumes[no], 0, &message);
                let _ = ask.reply.send(answer); // who has asked may have given up
            }
        }
    }
    fn flush(&mut self, conn: ConnId, now: Instant) {
        let Some(to) = self.conns.get_mut(&conn) else { return };
        if let Err(fault) = to.flush() {
            log::debug!("connection {}: {fault}", conn.0);
            self.drop_conn(conn);
            self.machine.on_closed(conn, now);
            self.drain(now);
        } else if to.has_more() {
            self.readable.insert(conn); // its answers are on their way: there is room for more
        }
    }
    fn drop_conn(&mut self, conn: ConnId) {
        self.locals.remove(&conn);
        if let Some(gone) = self.conns.remove(&conn) {
            self.bytes_in += gone.bytes_in();
            self.bytes_out += gone.bytes_out();
        }
    }

    /// Carries out what the machine wants, until it wants nothing more.
    pub(super) fn drain(&mut self, now: Instant) {
        while let Some(effect) = self.machine.poll() {
            if effect.volume().is_some_and(|no| self.volumes.is_hole(no)) {
                continue;
            }
            match effect {
                Effect::Send { conn, background, id, answer, message } => {
                    self.send(conn, background, (id, answer), &message, now);
                }
                Effect::Close { conn, why } => {
                    match why {
                        Why::Replaced | Why::Removed | Why::Changed => {
                            log::info!("connection {}: {why}", conn.0)
                        }
                        _ => log::warn!("connection {} is closed: {why}", conn.0),
                    }
                    if let Some(to) = self.conns.get_mut(&conn) {
                        let _ = to.flush(); // it is closed anyway
                    }
                    self.drop_conn(conn);
                }
                Effect::Meet { conn, volume, hello } => {
                    match self.volumes[volume].meet(hello.incarnation, hello.node, &hello.host) {
                        Ok((node, acked)) => {
                            self.volumes[volume].brings(node, hello.pending);
                            let seen = self.volumes[volume].newest_of(node);
                            self.machine.on_met(conn, node, (acked, seen.max(acked)), now);
                        }
                        Err(e) => {
                            let failed = answer::failure(&e);
                            self.machine.on_unmet(conn, failed.code, failed.what, now);
                        }
                    }
                }
                Effect::Ask { conn, id, volume, node, request } => {
                    let (message, given) =
                        answer::answer(&mut self.volumes[volume], node, &request);
                    self.machine.on_answer(conn, id, (&request, message), &given, now);
                }
                Effect::Spool { volume, key, at, bytes } => {
                    if let Err(e) = self.volumes[volume].spool(key.node, key.seq, at, &bytes) {
                        log::warn!("{}: spool: {e}", self.volumes[volume].name());
                        let failed = answer::failure(&e);
                        let why = (failed.code, &failed.what[..]);
                        self.machine.on_spool_failed(volume, key, why, now);
                    }
                }
                Effect::Unspool { volume, key } => {
                    self.volumes[volume].unspool(key.node, key.seq);
                }
                Effect::Apply { volume, ticket, node, upto, changes } => {
                    let applied = answer::apply(&mut self.volumes[volume], node, upto, &changes);
                    if let Some((_, what)) = &applied.failure {
                        self.last_error = Some(what.clone());
                    }
                    self.machine.on_conflicts(volume, self.volumes[volume].conflicts());
                    self.machine.on_applied(ticket, volume, applied, now);
                }
                Effect::Resolve { volume, ticket, ask } => {
                    let (applied, what) = answer::resolve(&mut self.volumes[volume], &ask);
                    self.machine.on_conflicts(volume, self.volumes[volume].conflicts());
                    self.machine.on_resolved(ticket, volume, applied, what, now);
                }
                Effect::Survey { volume } => {
                    let (free, used) = room::survey(&self.volumes[volume]);
                    self.machine.on_surveyed(volume, free, used, now);
                }
                Effect::SaveGrants { volume, saved, then: (conn, id, message) } => {
                    let message = room::save(&self.volumes[volume], &saved).unwrap_or(message);
                    self.send(conn, false, (id, true), &message, now);
                }
                Effect::Live { volume, nodes } => self.volumes[volume].keep_live(&nodes),
                Effect::Sync { volume } => {
                    let job = self.volumes[volume].sync_job();
                    if self.jobs.send((volume, job)).is_err() {
                        log::error!("the syncer is gone");
                        self.machine.on_synced(volume, None);
                    }
                }
            }
        }
    }
    fn send(
        &mut self,
        conn: ConnId,
        background: bool,
        (id, answer): (u64, bool),
        message: &Message,
        now: Instant,
    ) {
        if let (true, Some(reply)) = (answer, self.locals.remove(&conn)) {
            let _ = reply.send(message.clone()); // who has asked may have given up
            return self.machine.on_local_over(conn, now);
        }
        let Some(to) = self.conns.get_mut(&conn) else { return };
        let lane = if background { Lane::Background } else { Lane::Foreground };
        if let Err(fault) = to.send(lane, id, answer, message) {
            log::warn!("connection {}: message {} is not sent: {fault}", conn.0, message.op());
            let failed = Failed { code: Code::Io, what: "the answer is too large".into() };
            if answer {
                let _ = to.send(lane, id, true, &failed.into()); // this one is small
            }
        }
        self.dirty.insert(conn);
    }

    pub(super) fn report(&self) {
        let (mut bytes_in, mut bytes_out) = (self.bytes_in, self.bytes_out);
        for conn in self.conns.values() {
            bytes_in += conn.bytes_in();
            bytes_out += conn.bytes_out();
        }
        let volume = |(no, volume): (VolumeNo, &Volume)| VolumeReport {
            no,
            settings: volume.settings(),
            figures: self.figures(no),
            owing: self.machine.owing(no),
            name: volume.name().to_owned(),
            dir: volume.path().to_owned(),
            stamp: volume.stamp(),
            conflicts: volume.conflicts(),
            history_len: volume.history_len(),
            bytes_in,
            bytes_out,
            last_error: self.last_error.clone(),
            room: self.room(no),
        };
        let volumes = self.volumes.iter().map(volume).collect();
        self.shared.set_report(Report { clients: self.machine.clients(), volumes });
    }
}

/// Makes durable what it is told to, one job after the other; it ends with the server.
fn syncer(
    jobs: &Receiver<(VolumeNo, SyncJob)>,
    done: &Sender<(VolumeNo, volume::Result<Stamp>)>,
    waker: &Waker,
) {
    for (volume, job) in jobs {
        let begun = Instant::now();
        if done.send((volume, job.run())).is_err() {
            return;
        }
        waker.wake();
        // the disk is for readers, too; and the next sync covers more
        std::thread::sleep(begun.elapsed().min(SYNC_PAUSE_MAX));
    }
}

/// The directory that holds a volume's state when several share one: named after the volume.
pub fn state_of(state: &Path, name: &str, is_only: bool) -> PathBuf {
    if is_only { state.to_owned() } else { state.join(name) }
}
