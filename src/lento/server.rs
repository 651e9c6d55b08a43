//! The file server as a machine: who is connected, who was promised what, whose batch is where.
//!
//! ```text
//!   peer:   Greeting --Hello--> Asked --on_met--> Live --silence, garbage, end--> gone
//!   batch:  Fetching --contents are here--> Breaking --pongs--> Applying --on_applied-->
//!           Settling --synced, and pongs of the second round--> Acked     (reint.rs)
//! ```
//!
//! Promises of the objects that a batch touches are broken before it is applied, and its author
//! hears that it is durable only after everybody who fetched one of them in between was told once
//! more. A stamp that a client hears is durable. Everything ordered goes out in one lane: a
//! `Break` before the `Pong`, `Changes` or `Acked` whose stamp covers it.
//! No socket, no clock, no file: the owner carries out the [`Effect`]s and reports back. Every
//! wait has a bound ([`Settings`]); who passes it loses the connection, and with it the promises.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::kml::record::{Fid, Seq, Stamp};

use super::granting::Rooms;
use super::intake::{Change, Key};
use super::ledger::Saved;
use super::locking::Locking;
use super::message::{
    Code, ConflictCount, Failed, Hello, Message, Pong, Refused, Resolve, RoomHeld, VERSION, Welcome,
};
use super::permits::{Lettings, Permits, lease_end};
use super::policy;
use super::promises::{ConnId, PROMISES_MAX, Promises, Round};
use super::reint::{Batch, Parked, Ticket, ToRead};
use super::serving::Terms;

/// The bounds of every wait and queue.
#[derive(Clone, Debug)]
pub struct Settings {
    /// until the first message
    pub greet_max: Duration,
    /// of a peer, until it is gone: the lease of what it may do. It is not asked whether it lives:
    /// a client that has nothing to say asks that of the server (policy.rs)
    pub silence_max: Duration,
    /// how long the answer to a ping rests, so that many go out at once: from then on their clients
    /// ask at the same time, and the server wakes up once for all of them
    pub pong_after: Duration,
    /// until a break is answered
    pub break_max: Duration,
    /// until a piece of a file that was asked for is here
    pub fetch_max: Duration,
    pub peers_max: usize,
    /// batches of one client that wait or are worked on
    pub batches_max: usize,
    /// pieces of 1 MiB that are fetched from one client at a time
    pub window: usize,
    /// contents that came with batches, all clients together, bytes
    pub queue_len_max: usize,
    /// promises kept one by one for a client
    pub promises_max: usize,
    /// how long the locks of a client whose connection ended wait for it to come back
    pub lock_grace: Duration,
    /// how long the room that a client was granted is kept while it is away
    pub keep_grant: Duration,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            greet_max: Duration::from_secs(10),
            silence_max: Duration::from_secs(10),
            pong_after: Duration::from_millis(100),
            break_max: Duration::from_secs(10),
            fetch_max: Duration::from_secs(30),
            peers_max: 4096,
            batches_max: 8,
            window: 4,
            queue_len_max: 256 << 20,
            promises_max: PROMISES_MAX,
            lock_grace: Duration::from_secs(10),
            keep_grant: policy::KEEP_GRANT,
        }
    }
}

/// A volume's place in the server's list.
pub type VolumeNo = usize;

/// Why a connection is closed. The text is for the log.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Why {
    #[error("it did not say hello in time")]
    NoHello,
    #[error("its first message is not hello")]
    Impolite,
    #[error("it was silent for too long")]
    Silent,
    #[error("it did not answer a break in time")]
    BreakUnanswered,
    #[error("it did not let go in time what others need")]
    RecallUnanswered,
    #[error("it did not send a piece of a file in time")]
    FetchUnanswered,
    #[error("message {0} out of turn")]
    OutOfTurn(u16),
    #[error("it was refused: {0}")]
    Refused(String),
    #[error("the same client has a newer connection")]
    Replaced,
    #[error("its batch makes no sense: {0}")]
    BadBatch(String),
    #[error("the volume is not served any more")]
    Removed,
    #[error("it is to hear whether the volume may be changed")]
    Changed,
}

/// What the owner must do.
#[derive(Clone, PartialEq, Debug)]
pub enum Effect {
    /// `background`: it may be overtaken
    Send { conn: ConnId, background: bool, id: u64, answer: bool, message: Message },
    /// send what is queued, as far as that goes at once, and close; no `on_closed` follows
    Close { conn: ConnId, why: Why },
    /// find the client's number; `on_met` or `on_unmet` follows
    Meet { conn: ConnId, volume: VolumeNo, hello: Hello },
    /// answer a `List`, `Stat`, `Read`, `Since` or `Statfs`; `on_answer` follows
    Ask { conn: ConnId, id: u64, volume: VolumeNo, node: u32, request: Message },
    /// keep a piece of a store's content; `on_spool_failed` may follow
    Spool { volume: VolumeNo, key: Key, at: u64, bytes: Vec<u8> },
    /// forget what was kept of it
    Unspool { volume: VolumeNo, key: Key },
    /// apply these records of a node, in order; `on_applied` follows
    Apply { volume: VolumeNo, ticket: Ticket, node: u32, upto: Seq, changes: Vec<Change> },
    /// carry out what was decided about a conflict; `on_resolved` follows
    Resolve { volume: VolumeNo, ticket: Ticket, ask: Resolve },
    /// keep these nodes' numbers for the next life: they may have rights
    Live { volume: VolumeNo, nodes: Vec<u32> },
    /// look at the volume's disk; `on_surveyed` follows
    Survey { volume: VolumeNo },
    /// keep what was granted for the next life, durably; then answer a client's request, or fail it
    SaveGrants { volume: VolumeNo, saved: Saved, then: (ConnId, u64, Message) },
    /// make durable what was applied so far; `on_synced` follows
    Sync { volume: VolumeNo },
}

impl Effect {
    /// The volume that the owner has to do with.
    pub fn volume(&self) -> Option<VolumeNo> {
        match self {
            Effect::Send { .. } | Effect::Close { .. } => None,
            Effect::Meet { volume, .. }
            | Effect::Ask { volume, .. }
            | Effect::Spool { volume, .. }
            | Effect::Unspool { volume, .. }
            | Effect::Apply { volume, .. }
            | Effect::Resolve { volume, .. }
            | Effect::Live { volume, .. }
            | Effect::Survey { volume }
            | Effect::SaveGrants { volume, .. }
            | Effect::Sync { volume } => Some(*volume),
        }
    }
}

/// A volume as the machine knows it.
pub(super) struct Volume {
    pub(super) name: String,
    pub(super) id: [u8; 16],
    /// newest stamp that a power cut cannot take back
    pub(super) durable: Stamp,
    pub(super) promises: Promises,
    pub(super) permits: Permits,
    /// batches that were applied
    pub(super) applied: u64,
    /// of these, how many the sync under way covers
    pub(super) syncing: Option<u64>,
    /// its journal takes nothing more
    pub(super) dead: bool,
    pub(super) nodes: HashMap<u32, ConnId>,
    /// contents that were half fetched when their client went away
    pub(super) parked: Parked,
    /// changes whose author left before all had answered that they know: the author's node, and
    /// how many have not
    pub(super) unsettled: BTreeMap<Ticket, (u32, usize)>,
    pub(super) locking: Locking,
    /// versions that are kept aside
    conflicts: u64,
    pub(super) terms: Terms,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum State {
    Greeting,
    Asked,
    Live,
}

pub(super) struct Peer {
    pub(super) state: State,
    pub(super) opened_at: Instant,
    heard_at: Instant,
    /// when something came of what it ships
    pub(super) moved_at: Instant,
    /// what it ships could not be taken: to offer it again is no progress
    pub(super) is_stuck: bool,
    pub(super) host: String,
    hello_id: u64,
    /// of a ping whose answer rests
    ping: Option<u64>,
    /// the newest record of its journal when it came
    pub(super) pending: Seq,
    pub(super) keeps: bool,
    /// what is kept of it, until it can be told
    met: Option<(Seq, Seq)>,
    /// it said that it has locks to claim
    has_locks: bool,
    /// the room that it has
    room: Option<RoomHeld>,
    pub(super) volume: VolumeNo,
    pub(super) node: u32,
    /// the newest record that is in the tree, though perhaps not durably
    pub(super) applied: Seq,
    /// `upto` of the last batch that was taken in
    pub(super) expected: Seq,
    pub(super) batches: VecDeque<Batch>,
    pub(super) reads: HashMap<u64, ToRead>,
}

impl Peer {
    pub(super) fn heard(&mut self, now: Instant) {
        self.heard_at = now;
    }
}

/// A break that is not answered.
pub(super) struct BreakWait {
    /// the batches that wait for the answer, and their authors: until it comes, the holder may trust
    /// what it has
    pub(super) batches: Vec<(ConnId, Ticket)>,
    /// ascending
    fids: Vec<Fid>,
    pub(super) until: Instant,
}

impl BreakWait {
    fn is_about(&self, fids: &[Fid]) -> bool {
        fids.iter().any(|fid| self.fids.binary_search(fid).is_ok())
    }
}

pub struct Server {
    pub(super) settings: Settings,
    pub(super) volumes: Vec<Volume>,
    pub(super) peers: BTreeMap<ConnId, Peer>,
    /// by the id of the request; in order, so that the same events always have the same effects
    pub(super) breaks: BTreeMap<(ConnId, u64), BreakWait>,
    pub(super) lettings: Lettings,
    pub(super) rooms: Rooms,
    pub(super) effects: VecDeque<Effect>,
    pub(super) last_id: u64,
    pub(super) last_ticket: Ticket,
    /// contents of queued batches, bytes
    pub(super) queue_len: usize,
    /// no deadline is before this; looked for anew when it has come ([`Server::due`])
    wake_at: Option<Instant>,
    /// who is answered at this instant
    pongs: Vec<ConnId>,
    pongs_at: Option<Instant>,
}

impl Server {
    pub fn new(settings: Settings) -> Server {
        Server {
            settings,
            volumes: Vec::new(),
            peers: BTreeMap::new(),
            breaks: BTreeMap::new(),
            lettings: Lettings::default(),
            rooms: Rooms::default(),
            effects: VecDeque::new(),
            last_id: 0,
            last_ticket: Ticket(0),
            queue_len: 0,
            wake_at: None,
            pongs: Vec::new(),
            pongs_at: None,
        }
    }
    /// One more volume; its number stays the same for ever. `durable`: its stamp.
    pub fn add_volume(&mut self, name: &str, id: [u8; 16], durable: Stamp) -> VolumeNo {
        self.volumes.push(Volume {
            name: name.to_owned(),
            id,
            durable,
            promises: Promises::new(self.settings.promises_max),
            permits: Permits::default(),
            applied: 0,
            syncing: None,
            dead: false,
            nodes: HashMap::new(),
            parked: Parked::default(),
            unsettled: BTreeMap::new(),
            locking: Locking::default(),
            conflicts: 0,
            terms: Terms::default(),
        });
        self.volumes.len() - 1
    }
    /// In the life before, these nodes had rights: until they are back with all that they changed, or
    /// their lease is over, they are waited for.
    pub fn expect_back(&mut self, volume: VolumeNo, nodes: &[u32], now: Instant) {
        self.revive(volume, nodes, now + self.settings.silence_max);
    }
    /// The next thing to do.
    pub fn poll(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }
    /// Whether nothing is under way that a clean stop would wait for.
    pub fn is_idle(&self) -> bool {
        self.volumes.iter().all(|volume| volume.syncing.is_none())
            && self.peers.values().all(|peer| !peer.batches.iter().any(Batch::is_applied))
    }

    /// So many versions are kept aside in the volume: who is connected hears of it.
    pub fn on_conflicts(&mut self, volume: VolumeNo, count: u64) {
        if std::mem::replace(&mut self.volumes[volume].conflicts, count) == count {
            return;
        }
        let here =
            |peer: &Peer| peer.volume == volume && peer.state == State::Live && peer.node > 0;
        let conns = self.peers.iter().filter(|(_, peer)| here(peer)).map(|(conn, _)| *conn);
        for conn in conns.collect::<Vec<_>>() {
            self.request(conn, false, ConflictCount { count }.into());
        }
    }
    /// The volume that a client has.
    pub fn volume_at(&self, conn: ConnId) -> Option<VolumeNo> {
        let peer = self.peers.get(&conn)?;
        (peer.state == State::Live).then_some(peer.volume)
    }
    /// Somebody in the server's own process has a request; he is no client.
    pub fn on_local(&mut self, conn: ConnId, volume: VolumeNo, now: Instant) {
        self.on_connect(conn, now);
        if let Some(peer) = self.peers.get_mut(&conn) {
            (peer.state, peer.volume) = (State::Live, volume);
        }
    }
    /// He has his answer.
    pub fn on_local_over(&mut self, conn: ConnId, now: Instant) {
        self.on_gone(conn, now, now);
    }

    pub fn on_connect(&mut self, conn: ConnId, now: Instant) {
        debug_assert!(conn.0 > 0, "a connection with nobody's number");
        let peer = Peer {
            state: State::Greeting,
            opened_at: now,
            heard_at: now,
            moved_at: now,
            is_stuck: false,
            host: String::new(),
            hello_id: 0,
            ping: None,
            pending: Seq(0),
            keeps: false,
            met: None,
            has_locks: false,
            room: None,
            volume: 0,
            node: 0,
            applied: Seq(0),
            expected: Seq(0),
            batches: VecDeque::new(),
            reads: HashMap::new(),
        };
        self.peers.insert(conn, peer);
        self.due(now + self.settings.greet_max);
    }
    /// The connection has ended by itself.
    pub fn on_closed(&mut self, conn: ConnId, now: Instant) {
        let lease = self.settings.silence_max;
        let Some(peer) = self.peers.get(&conn) else { return };
        let until = lease_end(peer.heard_at, lease);
        self.on_gone(conn, until, now);
    }
    /// `lease`: until then the client may not know it.
    fn on_gone(&mut self, conn: ConnId, lease: Instant, now: Instant) {
        self.note_owing(conn);
        let Some(peer) = self.peers.remove(&conn) else { return };
        let no = peer.volume;
        let volume = &mut self.volumes[peer.volume];
        if volume.nodes.get(&peer.node) == Some(&conn) {
            volume.nodes.remove(&peer.node);
        }
        for batch in peer.batches {
            self.queue_len -= batch.len();
            if let Some((ticket, waiting)) = batch.unsettled() {
                volume.unsettled.insert(ticket, (peer.node, waiting));
            }
            for fetch in batch.into_fetches() {
                if let Some(key) = volume.parked.put(fetch) {
                    self.effects.push_back(Effect::Unspool { volume: peer.volume, key });
                }
            }
        }
        let waits = self.breaks.range((conn, 0)..=(conn, u64::MAX));
        let waits: Vec<(u64, Vec<Fid>)> =
            waits.map(|((_, id), wait)| (*id, wait.fids.clone())).collect();
        for (id, fids) in waits {
            // What it does not know to be old, it trusts until its lease ends.
            fids.iter().for_each(|fid| self.promise(no, conn, *fid));
            self.on_break_over(conn, id, now);
        }
        if peer.state == State::Live {
            self.on_locks_left(no, conn, peer.node, now);
            self.on_permits_closed(no, conn, lease, now);
            self.on_room_left(no, conn, peer.node, now);
        }
    }

    /// Anything but a batch, which its owner takes apart first ([`Server::on_batch`]).
    pub fn on_message(
        &mut self,
        conn: ConnId,
        id: u64,
        answer: bool,
        message: Message,
        now: Instant,
    ) {
        let Some(peer) = self.peers.get_mut(&conn) else { return };
        peer.heard(now);
        let (state, volume, node) = (peer.state, peer.volume, peer.node);
        let op = message.op();
        match (state, message) {
            (State::Greeting, Message::Hello(hello)) if !answer => {
                peer.hello_id = id;
                self.on_hello(conn, hello, now);
            }
            (State::Greeting, _) => self.close(conn, Why::Impolite, now),
            (State::Live, Message::Pong(_)) if answer => {
                if !self.on_released(conn, id, None, now) {
                    self.on_break_over(conn, id, now);
                }
            }
            (State::Live, Message::Released(released)) => match answer {
                true => _ = self.on_released(conn, id, Some(released), now),
                false => {
                    self.on_locks_farewell(conn);
                    self.on_farewell(conn, now);
                }
            },
            (State::Live, Message::Ask(ask)) if !answer => self.on_ask(conn, id, ask.fids, now),
            (State::Live, Message::Since(since)) if !answer => self.on_since(conn, id, since, now),
            (State::Live, Message::Data(data)) if answer => self.on_data(conn, id, data, now),
            (State::Live, Message::Failed(failed)) if answer => {
                self.on_failed(conn, id, failed, now);
            }
            (State::Live, Message::Ping(_)) if !answer => self.on_ping(conn, id, now),
            (
                State::Live,
                request @ (Message::List(_)
                | Message::Stat(_)
                | Message::Read(_)
                | Message::Conflicts(_)
                | Message::ConflictRead(_)
                | Message::Statfs(_)),
            ) if !answer => {
                if matches!(request, Message::Statfs(_)) {
                    self.effects.push_back(Effect::Survey { volume });
                }
                self.effects.push_back(Effect::Ask { conn, id, volume, node, request });
            }
            (State::Live, Message::RoomAsk(ask)) if !answer => self.on_room_ask(conn, id, ask),
            (State::Live, Message::GivenBack(m)) => {
                self.on_given_back(conn, id, answer, Some(m));
            }
            (State::Live, Message::LockAsk(ask)) if !answer => self.on_lock(conn, id, ask, now),
            (State::Live, Message::LockCancel(m)) if !answer => self.on_lock_cancel(conn, &m, now),
            (State::Live, Message::Claim(m)) if !answer => self.on_claim(conn, id, m, now),
            _ => self.close(conn, Why::OutOfTurn(op), now),
        }
    }

    fn on_ping(&mut self, conn: ConnId, id: u64, now: Instant) {
        let Some(peer) = self.peers.get_mut(&conn) else { return };
        match peer.ping.replace(id) {
            // nobody is owed more than one answer
            Some(before) => self.pong(conn, before),
            None => self.pongs.push(conn),
        }
        self.pongs_at.get_or_insert(now + self.settings.pong_after);
    }
    fn pong(&mut self, conn: ConnId, id: u64) {
        let Some(peer) = self.peers.get(&conn) else { return };
        let stamp = self.volumes[peer.volume].durable;
        self.answer(conn, id, Pong { stamp }.into());
    }
    /// A batch came that its owner could not take apart.
    pub fn on_garbage(&mut self, conn: ConnId, what: &str, now: Instant) {
        self.close(conn, Why::BadBatch(what.to_owned()), now);
    }
    fn on_hello(&mut self, conn: ConnId, hello: Hello, now: Instant) {
        let refusal = if hello.version != VERSION {
            let what = format!("this server speaks version {VERSION} of the protocol");
            Some((Code::WrongVersion, format!("{what}, the client version {}", hello.version)))
        } else if self.peers.len() > self.settings.peers_max {
            Some((Code::TooManyClients, format!("{} clients are connected", self.peers.len() - 1)))
        } else {
            None
        };
        let found = refusal.map_or_else(|| self.meant_by(&hello), Err);
        match (found, self.peers.get_mut(&conn)) {
            (Ok(volume), Some(peer)) => {
                peer.state = State::Asked;
                peer.volume = volume;
                peer.host.clone_from(&hello.host);
                (peer.pending, peer.keeps) = (hello.pending, hello.keeps);
                peer.has_locks = hello.locks;
                peer.room = hello.room;
                self.effects.push_back(Effect::Meet { conn, volume, hello });
            }
            (Err((code, what)), _) => self.refuse(conn, code, what, now),
            (Ok(_), None) => {}
        }
    }
    /// The client is `node`; everything up to `acked` of it is kept durably, and up to `seen` in some
    /// way. It hears so once nobody trusts what is older than that any more.
    pub fn on_met(&mut self, conn: ConnId, node: u32, (acked, seen): (Seq, Seq), now: Instant) {
        let Some(peer) = self.peers.get_mut(&conn) else { return };
        (peer.node, peer.met) = (node, Some((acked, seen)));
        let before = self.volumes[peer.volume].nodes.insert(node, conn);
        if let Some(before) = before.filter(|before| *before != conn) {
            self.close(before, Why::Replaced, now);
        }
        self.welcome(conn, now);
    }
    /// Welcomes clients that waited until others knew of their last changes.
    pub(super) fn welcome_all(&mut self, now: Instant) {
        let met = self.peers.iter().filter(|(_, peer)| peer.met.is_some());
        for conn in met.map(|(conn, _)| *conn).collect::<Vec<_>>() {
            self.welcome(conn, now);
        }
    }
    fn welcome(&mut self, conn: ConnId, now: Instant) {
        let Some(peer) = self.peers.get_mut(&conn) else { return };
        let (no, node, id) = (peer.volume, peer.node, peer.hello_id);
        let (pending, has_locks) = (peer.pending, peer.has_locks);
        let volume = &mut self.volumes[no];
        let unsettled = volume.unsettled.values().any(|(of, _)| *of == node);
        let Some((acked, seen)) = peer.met.take_if(|_| !unsettled) else { return };
        volume.terms.forget_owing(node);
        let held = peer.room.take();
        peer.state = State::Live;
        let silent_at = peer.heard_at + self.settings.silence_max;
        (peer.expected, peer.applied) = (acked, acked);
        let (volume_id, durable, name) = (volume.id, volume.durable, volume.name.clone());
        let read_only = volume.terms.read_only;
        let room = self.on_room_met(no, node, held.as_ref());
        let welcome = Welcome {
            version: VERSION,
            volume_id,
            node,
            acked,
            stamp: durable,
            volume: name,
            seen,
            read_only,
            room,
        };
        let count = self.volumes[no].conflicts;
        self.answer(conn, id, welcome.into());
        if count > 0 {
            self.request(conn, false, ConflictCount { count }.into());
        }
        if has_locks {
            self.on_locks_met(no, node, now); // before others get what the client had
        }
        self.due(silent_at);
        self.on_permits_met(conn, pending, acked, now);
    }
    /// The client cannot be taken.
    pub fn on_unmet(&mut self, conn: ConnId, code: Code, what: String, now: Instant) {
        self.refuse(conn, code, what, now);
    }
    /// A request was answered; `given` are the objects whose state stands in the answer. If others
    /// have newer states of them, it is thrown away, and the request is answered again later.
    pub fn on_answer(
        &mut self,
        conn: ConnId,
        id: u64,
        (request, mut message): (&Message, Message),
        given: &[Fid],
        now: Instant,
    ) {
        if !given.is_empty() && !self.may_answer(conn, id, (request, given), now) {
            return;
        }
        self.give(conn, given, &mut message);
        let Some(peer) = self.peers.get(&conn) else { return };
        let volume = &self.volumes[peer.volume];
        let message = match message {
            // what a power cut may take back is no place to begin from, when the connection is gone
            Message::Changes(mut changes) if !changes.more => {
                changes.upto = changes.upto.min(volume.durable);
                changes.into()
            }
            Message::Space(space) => self.shown_space(peer.volume, space).into(),
            other => other,
        };
        self.answer(conn, id, message);
    }

    /// The instant at which [`Server::wake`] is to be called: it may have something to do then, and
    /// never has before. Costs the same for any number of clients.
    pub fn wake_at(&self) -> Option<Instant> {
        let missed = |next: Instant| self.wake_at.is_none_or(|at| at > next);
        debug_assert!(!self.next_deadline().is_some_and(missed), "a deadline without `due`");
        [self.wake_at, self.pongs_at].into_iter().flatten().min()
    }
    /// To be called with every deadline that is set, but for one that only moves on.
    pub(super) fn due(&mut self, at: Instant) {
        self.wake_at = Some(self.wake_at.map_or(at, |before| before.min(at)));
    }
    fn next_deadline(&self) -> Option<Instant> {
        let of_peer = |peer: &Peer| {
            let silent = match peer.state {
                State::Live => peer.heard_at + self.settings.silence_max,
                _ => peer.opened_at + self.settings.greet_max,
            };
            let fetch = peer.reads.values().map(|read| read.until).min();
            fetch.map_or(silent, |fetch| fetch.min(silent))
        };
        let breaks = self.breaks.values().map(|wait| wait.until);
        let permits = self.permits_wake_at();
        let all = self.peers.values().map(of_peer).chain(breaks);
        all.chain(permits).chain(self.locks_wake_at()).chain(self.room_deadline()).min()
    }
    /// Time has passed.
    pub fn wake(&mut self, now: Instant) {
        if self.pongs_at.is_some_and(|at| at <= now) {
            self.pongs_at = None;
            for conn in std::mem::take(&mut self.pongs) {
                if let Some(id) = self.peers.get_mut(&conn).and_then(|peer| peer.ping.take()) {
                    self.pong(conn, id);
                }
            }
        }
        if self.wake_at.is_some_and(|at| at <= now) {
            self.end_overdue(now);
            self.wake_at = self.next_deadline();
        }
    }
    /// Looks at every deadline there is.
    fn end_overdue(&mut self, now: Instant) {
        self.wake_locks(now);
        self.wake_room(now);
        let mut late: Vec<(ConnId, Why)> = Vec::new();
        for (conn, peer) in &self.peers {
            let silence = now.saturating_duration_since(peer.heard_at);
            let opened = now.saturating_duration_since(peer.opened_at);
            if peer.state != State::Live {
                if opened >= self.settings.greet_max {
                    late.push((*conn, Why::NoHello));
                }
            } else if silence >= self.settings.silence_max {
                late.push((*conn, Why::Silent));
            } else if peer.reads.values().any(|read| read.until <= now) {
                late.push((*conn, Why::FetchUnanswered));
            }
        }
        let overdue = self.breaks.iter().filter(|(_, wait)| wait.until <= now);
        late.extend(overdue.map(|((conn, _), _)| (*conn, Why::BreakUnanswered)));
        late.extend(self.wake_permits(now));
        for (conn, why) in late {
            self.close(conn, why, now);
        }
    }

    /// Whether the client has not answered yet that it knows the object to be old.
    pub(super) fn trusts(&self, conn: ConnId, fid: Fid) -> bool {
        let of = self.breaks.range((conn, 0)..=(conn, u64::MAX));
        of.into_iter().any(|(_, wait)| wait.is_about(&[fid]))
    }
    /// Tells the holders of these objects, and lets the batch wait for their answers, and for those
    /// of holders who were told for another's sake. Returns how many it waits for.
    pub(super) fn send_breaks(
        &mut self,
        (conn, ticket): (ConnId, Ticket),
        volume: VolumeNo,
        fids: &[Fid],
        round: Round,
        now: Instant,
    ) -> usize {
        let mut count = 0;
        for ((holder, _), wait) in &mut self.breaks {
            let here = self.peers.get(holder).is_some_and(|peer| peer.volume == volume);
            let other = *holder != conn && here && !wait.batches.contains(&(conn, ticket));
            if other && wait.is_about(fids) {
                wait.batches.push((conn, ticket));
                count += 1;
            }
        }
        let told = self.volumes[volume].promises.take(fids, conn, round);
        let permits = &self.volumes[volume].permits;
        let told: Vec<(ConnId, Vec<Fid>)> = told
            .into_iter()
            .map(|(holder, mut fids)| {
                fids.retain(|fid| !permits.has_let_go(holder, *fid));
                (holder, fids)
            })
            .filter(|(holder, fids)| !fids.is_empty() && self.peers.contains_key(holder))
            .collect();
        count += told.len();
        let until = now + self.settings.break_max;
        for (holder, mut fids) in told {
            fids.sort_unstable();
            let of = fids.clone();
            let id = self.request(holder, false, super::message::Break { fids }.into());
            let wait = BreakWait { batches: vec![(conn, ticket)], fids: of, until };
            self.breaks.insert((holder, id), wait);
            self.due(until);
        }
        count
    }

    /// Sends a request of ours, and returns its id.
    pub(super) fn request(&mut self, conn: ConnId, background: bool, message: Message) -> u64 {
        self.last_id += 1;
        let id = self.last_id;
        self.effects.push_back(Effect::Send { conn, background, id, answer: false, message });
        id
    }
    pub(super) fn answer(&mut self, conn: ConnId, id: u64, message: Message) {
        let effect = Effect::Send { conn, background: false, id, answer: true, message };
        self.effects.push_back(effect);
    }
    pub(super) fn fail(&mut self, conn: ConnId, id: u64, code: Code, what: &str) {
        self.answer(conn, id, Failed { code, what: what.to_owned() }.into());
    }
    fn refuse(&mut self, conn: ConnId, code: Code, what: String, now: Instant) {
        let Some(peer) = self.peers.get(&conn) else { return };
        let id = peer.hello_id;
        self.answer(conn, id, Refused { code, what: what.clone() }.into());
        self.close(conn, Why::Refused(what), now);
    }
    pub(super) fn close(&mut self, conn: ConnId, why: Why, now: Instant) {
        let lease = self.settings.silence_max;
        if let Some(peer) = self.peers.get(&conn) {
            // Also who was told, and did not do it, does not know yet that it is cut off.
            let until = lease_end(peer.heard_at, lease);
            self.effects.push_back(Effect::Close { conn, why });
            self.on_gone(conn, until, now);
        }
    }
}

#[cfg(test)]
mod tests;
