//! The client's side of the conversation, as a state machine: connection, currency, breaks.
//!
//! ```text
//!  Away --retry_at--> Connecting --on_connected--> Greeting --Welcome--> CatchingUp --!more--> Online
//!   ^------------------- closed, refused, silent for TIMEOUT, out of turn ------------------------'
//! ```
//!
//! Events go in by `on_*`, effects come out by [`Client::poll`] and are carried out in their order
//! before the next event goes in. What callers wait for is in fetch.rs, what is shipped in ship.rs;
//! both speak through [`Line`]. What it keeps true:
//!
//! - `current` (the stamp up to which every break was processed) only grows by messages that the
//!   server sent after those breaks, and only once the answer to `Since` is complete.
//! - A break is answered after the driver says that no reader sees the cached state any more.
//! - Every want ends: met, or unmet at the latest `TIMEOUT` after the server was last there, and at
//!   once while it is known to be away. Wants survive a connection that breaks, if the next one
//!   stands within `policy::away_after`.
//!
//! Absent on purpose: sockets, files, the clock, and decisions (policy.rs).
//! Source: etcd's raft and quinn-proto for the form; AFS callbacks for the promises.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::asking::Asker;
use super::fetch::Fetcher;
use super::grant::Grant;
use super::locker::{Locker, Number};
use super::locks::{Denied, Lock, LockAsk, LockHeld};
use super::message::*;
use super::policy;
use super::rights::Mode;
use super::room::Room;
use super::ship::{Bell, Heard, Shipper};
use crate::kml::record::{Fid, Seq, Stamp};

mod letting;

use letting::Letting;

/// Most breaks that wait for the kernel at one time, and most recalls that are remembered; a server
/// that sends more is not ours.
const BREAKS_MAX: usize = 4096;

/// The driver's name for somebody who waits.
pub type Ticket = u64;

/// Why a want was not met.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unmet {
    #[error("the server is away")]
    Unreachable,
    #[error("the object is gone at the server")]
    Gone,
    #[error("the server failed the request ({0:?})")]
    Failed(Code),
    #[error("there is no room at the server")]
    NoRoom,
    /// the cache could not take what came: an errno of the local file system
    #[error("the cache cannot keep what the server sent (errno {0})")]
    Local(i32),
}

/// What somebody waits for. An object is fetched with its attributes, a directory with its entries.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Want {
    /// `have`: the version whose entries are all here; zero otherwise
    Dir {
        fid: Fid,
        have: Stamp,
    },
    /// `have`: the version of a file that is all here; zero otherwise
    Object {
        fid: Fid,
        have: Stamp,
    },
    Bytes(Bytes),
    /// these are to be changed
    Permit(Vec<Fid>),
    /// so much is to be written, and is not granted
    Room(Room),
}

/// Bytes of a file that is not all here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bytes {
    pub fid: Fid,
    /// the version whose bytes are here
    pub stamp: Stamp,
    /// length of the file's granules, and of its base version, bytes
    pub granule_len: u64,
    pub base_size: u64,
    /// where the granules begin that the caller waits for, ascending; not empty
    pub need: Vec<u64>,
    /// where the next granules begin that are missing as well, ascending
    pub ahead: Vec<u64>,
}

/// How this client introduces itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Who {
    pub volume: String,
    pub incarnation: [u8; 16],
    /// 0 until a server gave one
    pub node: u32,
    /// zeros until the cache belongs to a volume
    pub volume_id: [u8; 16],
    pub host: String,
    /// what it may do rests with it while it asks for nothing
    pub keeps: bool,
}

/// How patient a client is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// how long changes rest before they are shipped
    pub age: Duration,
    /// a server that says nothing for so long is away, and no want waits longer for one
    pub timeout: Duration,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings { age: policy::AGE, timeout: policy::TIMEOUT }
    }
}

/// What the driver is to do.
#[derive(Clone, PartialEq, Debug)]
pub enum Effect {
    Connect,
    Close {
        why: String,
    },
    Send {
        foreground: bool,
        id: u64,
        answer: bool,
        message: Message,
    },
    Resolve {
        ticket: Ticket,
        how: Result<(), Unmet>,
    },
    /// the cache belongs to this volume from now on
    Welcomed {
        node: u32,
        volume_id: [u8; 16],
        volume: String,
        /// the server takes no change of it
        read_only: bool,
    },
    /// the server will not have us; attempts go on
    Refused {
        code: Code,
        what: String,
    },
    /// the server does not take changes at the moment; they are offered again
    NotTaken {
        what: String,
    },
    /// `first`: forget what an earlier attempt at this listing saw. Names and objects whose newest
    /// own record is after `mark` stay as they are. What was made as the page has it may be read
    /// from then on (and, of the page's `read_only`, no more), and nothing else of it
    MergePage {
        dir: Fid,
        first: bool,
        mark: Seq,
        page: Page,
    },
    /// the pages covered the directory; not `fresh`: it changed again meanwhile. With it `mode` may
    /// be done
    FinishListing {
        dir: Fid,
        mark: Seq,
        fresh: bool,
        mode: Mode,
    },
    /// with it `mode` may be done, once it is so
    SetObject {
        object: Object,
        mark: Seq,
        mode: Mode,
    },
    /// bytes of the version `stamp`; `granule` (at, len) is all here with them
    WriteRange {
        fid: Fid,
        stamp: Stamp,
        at: u64,
        bytes: Vec<u8>,
        granule: Option<(u64, u64)>,
    },
    /// tell [`Client::on_break_done`] of a `break_id` once no reader sees the cached state
    MarkStale {
        break_id: Option<u64>,
        fids: Vec<Fid>,
    },
    /// others changed these while there was no right to read them. What may be read now is current,
    /// and of the rest the kernel keeps nothing: it is not told, for it may be asking just now, and
    /// would drop the answer
    CatchUp {
        fids: Vec<Fid>,
    },
    /// everything in the cache may be old
    BumpEpoch,
    /// what may be done with the volume; `raise`: what may be changed by itself stays so
    SetVolume {
        mode: Mode,
        raise: bool,
    },
    /// at least this may be done with these. What could not be read just before may have changed
    /// since it was last read: it is to be fetched again
    Raise {
        fids: Vec<Fid>,
        mode: Mode,
    },
    /// this, and no more, may be done with these
    SetModes {
        fids: Vec<Fid>,
        mode: Mode,
    },
    /// no more than this may be done with these; none: with the whole volume. Wait for the changes
    /// under way, forget what may not be read, and call [`Client::on_lowered`]
    Lower {
        recall_id: u64,
        fids: Vec<Fid>,
        mode: Mode,
    },
    /// give [`Client::on_batch_cut`] the batch that follows `after` and covers no more than `upto`
    CutBatch {
        after: Seq,
        upto: Seq,
    },
    /// what was read of the journal for batches is to be read again
    RestartShipping,
    /// answer with `Data` or `Failed`, in the background, under this id
    AnswerRead {
        id: u64,
        read: Read,
    },
    Acked {
        upto: Seq,
        stamps: Vec<Stamped>,
        conflicts: Vec<Fid>,
    },
    /// the server lost what it had acknowledged
    ServerBehind {
        theirs: Seq,
        ours: Seq,
    },
    SpaceIs(Space),
    /// so many versions are kept aside at the server
    Conflicts(u64),
    /// the answer to a question about conflicts
    ConflictAnswer {
        number: u64,
        how: Result<Message, Failed>,
    },
    /// a lock was granted or refused, or the question after it answered
    LockEnded {
        number: Number,
        how: Result<Option<LockHeld>, Denied>,
    },
    /// the server gave it to somebody else while it was away
    LockLost {
        lock: Lock,
    },
    SetOnline(bool),
    /// what the grant says of itself must outlive the process, before anything is sent
    KeepGrant,
    SaveCurrent(Stamp),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Away { retry_at: Instant },
    Connecting { until: Instant },
    Greeting,
    CatchingUp,
    Online,
}

/// What a request of ours was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ask {
    Hello,
    Ping,
    Space,
    Since,
    /// the same, to read all of the volume
    ReadAll,
    Permit {
        no: u64,
    },
    List {
        dir: Fid,
    },
    Stat {
        fid: Fid,
    },
    Piece {
        fid: Fid,
        at: u64,
    },
    Batch,
    Room,
    Lock {
        number: Number,
    },
    Claim,
    Conflict {
        number: u64,
    },
}

struct Asked {
    ask: Ask,
    /// someone waits, since then
    waits_since: Option<Instant>,
}

/// The way out: requests that wait for their answers, and effects that wait for the driver.
#[derive(Default)]
pub(super) struct Line {
    next_id: u64,
    asked: HashMap<u64, Asked>,
    effects: VecDeque<Effect>,
    pub foreground_count: u64,
    /// sent or received, but for pings
    pub message_count: u64,
}

impl Line {
    /// `waits_since`: someone waits for the answer, so it goes ahead of the rest.
    pub fn ask(&mut self, ask: Ask, waits_since: Option<Instant>, message: Message) -> u64 {
        self.next_id += 1;
        // Locks stay in order. Some are not answered for long, so nobody counts how long they wait.
        let is_lock = matches!(ask, Ask::Lock { .. } | Ask::Claim);
        let (id, foreground) = (self.next_id, waits_since.is_some() || is_lock);
        let wanted = !matches!(
            ask,
            Ask::Hello | Ask::Ping | Ask::Space | Ask::Since | Ask::Batch | Ask::Conflict { .. }
        );
        self.foreground_count += u64::from(foreground && wanted);
        self.asked.insert(id, Asked { ask, waits_since });
        self.message_count += u64::from(ask != Ask::Ping);
        self.effects.push_back(Effect::Send { foreground, id, answer: false, message });
        id
    }
    /// What needs no answer, in the order of requests.
    pub fn tell(&mut self, message: Message) {
        self.next_id += 1;
        let id = self.next_id;
        self.effects.push_back(Effect::Send { foreground: true, id, answer: false, message });
    }
    /// The answer to this request means nothing any more.
    pub fn forget(&mut self, id: u64) {
        self.asked.remove(&id);
    }
    pub fn effect(&mut self, effect: Effect) {
        self.effects.push_back(effect);
    }
    pub fn poll(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }
    pub fn resolve(&mut self, tickets: impl IntoIterator<Item = Ticket>, how: Result<(), Unmet>) {
        let resolve = |ticket| Effect::Resolve { ticket, how };
        self.effects.extend(tickets.into_iter().map(resolve));
    }
}

/// The machine.
pub struct Client {
    state: State,
    /// what may be done with the volume, but for single objects
    volume: Mode,
    lettings: Vec<Letting>,
    /// what was recalled while it was asked what may be done with the volume
    recalled: Vec<Recall>,
    /// recalls of what was given just now
    held_back: Vec<(Instant, u64, Recall)>,
    /// when somebody last had to ask, without a right to read all
    asked_at: VecDeque<Instant>,
    asks_all: bool,
    who: Who,
    line: Line,
    fetcher: Fetcher,
    shipper: Shipper,
    pub(super) locker: Locker,
    asker: Asker,
    /// all breaks up to here have been processed
    current: Stamp,
    /// where the last question after changes began
    asked_from: Stamp,
    saved: Stamp,
    timeout: Duration,
    saved_at: Instant,
    /// attempts that failed since the connection last stood
    fails: u32,
    chance: u64,
    /// not online: until then wants wait for the connection
    grace_until: Instant,
    /// the same for locks, which are decided here from then on: two clients may then hold one
    locks_until: Instant,
    /// when the newest request was sent that the server has answered: it heard of us not earlier,
    /// so what we may do lasts a lease from then
    proved_at: Instant,
    /// when that answer came
    answered_at: Instant,
    /// when bytes came that somebody may wait for
    moved_at: Instant,
    moved_len: u64,
    pinged: bool,
    breaks: usize,
}

impl Client {
    /// `current`: as `SaveCurrent` gave it; `acked`: the journal's cursor; `seed`: any number.
    pub fn new(
        who: Who,
        current: Stamp,
        acked: Seq,
        settings: Settings,
        seed: u64,
        now: Instant,
    ) -> Client {
        Client {
            state: State::Away { retry_at: now },
            volume: Mode::None,
            lettings: Vec::new(),
            recalled: Vec::new(),
            held_back: Vec::new(),
            asked_at: VecDeque::new(),
            asks_all: false,
            who,
            line: Line::default(),
            fetcher: Fetcher::default(),
            shipper: Shipper::new(acked, settings.age, now),
            locker: Locker::default(),
            asker: Asker::new(Grant::off()),
            timeout: settings.timeout,
            current,
            asked_from: current,
            saved: current,
            saved_at: now,
            fails: 0,
            chance: seed | 1,
            grace_until: now + policy::away_after(settings.timeout),
            locks_until: now + settings.timeout,
            proved_at: now,
            answered_at: now,
            moved_at: now,
            moved_len: 0,
            pinged: false,
            breaks: 0,
        }
    }

    /// Before the first contact: the room of what is written. Without it nothing is reserved.
    pub fn set_grant(&mut self, grant: Arc<Grant>) {
        self.asker = Asker::new(grant);
    }
    /// Before the first contact: so long ago the server was last there for this cache.
    pub fn was_away(&mut self, ago: Duration, now: Instant) {
        self.asker.was_away(ago, now);
    }

    /// From here on. Before the first contact its clock begins anew.
    pub fn set_timeout(&mut self, timeout: Duration, now: Instant) {
        self.timeout = timeout;
        if !self.is_online() && now < self.grace_until {
            self.grace_until = now + policy::away_after(timeout);
            self.locks_until = now + timeout;
        }
    }

    /// From when on nobody waits for the server, if it is not there.
    pub fn away_at(&self) -> Option<Instant> {
        (!self.is_online()).then_some(self.grace_until)
    }
    pub fn is_connecting(&self) -> bool {
        matches!(self.state, State::Connecting { .. })
    }

    /// The network says that there is no way to the server: nobody needs to wait for it.
    pub fn on_no_way(&mut self, now: Instant) {
        if !self.is_online() {
            self.grace_until = self.grace_until.min(now);
        }
    }

    pub fn poll(&mut self) -> Option<Effect> {
        let effect = self.line.poll()?;
        self.locker.on_rights(&effect);
        Some(effect)
    }
    pub fn is_online(&self) -> bool {
        self.state == State::Online
    }
    /// Every break up to this stamp has been processed.
    pub fn current(&self) -> Stamp {
        self.current
    }
    /// The newest own record that the server keeps.
    pub fn acked(&self) -> Seq {
        self.shipper.acked()
    }
    /// Own records up to here are seen by every fetch that is under way.
    pub fn floor(&self) -> Seq {
        self.fetcher.floor().unwrap_or(self.acked()).min(self.acked())
    }
    /// Requests since the start that somebody waited for.
    pub fn requests_foreground(&self) -> u64 {
        self.line.foreground_count
    }
    /// Messages since the start, both ways, but for pings.
    pub fn messages(&self) -> u64 {
        self.line.message_count
    }
    pub fn shipped_len(&self) -> u64 {
        self.shipper.shipped_len()
    }

    /// When `on_wake` has something to do.
    pub fn wake_at(&self) -> Instant {
        let at = match self.state {
            State::Away { retry_at } => retry_at,
            State::Connecting { until } => until,
            _ => {
                let lease_end = self.proved_at + policy::lease(self.timeout);
                let silent = if self.pinged { lease_end } else { self.ping_at() };
                let patience = policy::patience(self.timeout);
                self.oldest_wait().map_or(silent, |since| silent.min(since + patience))
            }
        };
        if self.is_online() {
            let held_back = self.held_back.iter().map(|(until, ..)| *until).min();
            let save = (self.current != self.saved).then(|| self.saved_at + policy::SAVE_EVERY);
            let ship = self.shipper.wake_at();
            let room = self.asker.wake_at(true);
            return [held_back, save, ship, room].into_iter().flatten().fold(at, Instant::min);
        }
        let waits = !self.fetcher.is_idle() || !self.asker.is_idle();
        let wants = waits.then_some(self.grace_until);
        let locks = (!self.locker.is_idle()).then_some(self.locks_until);
        let room = self.asker.wake_at(false);
        [wants, locks, room].into_iter().flatten().fold(at, Instant::min)
    }

    /// Time has passed.
    pub fn on_wake(&mut self, now: Instant) {
        match self.state {
            State::Away { retry_at } if now >= retry_at => {
                self.state = State::Connecting { until: now + self.timeout };
                self.line.effect(Effect::Connect);
            }
            State::Connecting { until } if now >= until => {
                self.close("the server does not answer", now);
            }
            State::Away { .. } | State::Connecting { .. } => {}
            _ => self.look_for_silence(now),
        }
        let online = self.is_online();
        self.asker.on_wake(online, &mut self.shipper, &mut self.line, now);
        if !online {
            if now >= self.grace_until {
                self.fetcher.give_up(&mut self.line);
                self.asker.give_up(&mut self.line);
            }
            if now >= self.locks_until {
                self.locker.give_up(&mut self.line);
            }
            return;
        }
        for (_, id, m) in
            self.held_back.extract_if(.., |(until, ..)| *until <= now).collect::<Vec<_>>()
        {
            self.on_recall(id, m, now);
        }
        if self.current != self.saved && now >= self.saved_at + policy::SAVE_EVERY {
            (self.saved, self.saved_at) = (self.current, now);
            self.line.effect(Effect::SaveCurrent(self.current));
        }
        if self.shipper.on_wake(&mut self.line, now).is_err() {
            self.close("the server takes no batch", now);
        }
    }

    /// Counted from the answer before, if that came soon: a server answers many at once, and who asks
    /// again in step with that costs it one wake for all of them.
    fn ping_at(&self) -> Instant {
        let after = policy::PING_AFTER.min(policy::lease(self.timeout) / 2);
        self.answered_at.min(self.proved_at + after / 4) + after
    }

    fn look_for_silence(&mut self, now: Instant) {
        let (timeout, lease) = (self.timeout, policy::lease(self.timeout));
        let overdue = |since: Instant| now >= since + policy::patience(timeout);
        if now >= self.proved_at + lease || self.oldest_wait().is_some_and(overdue) {
            self.close("the server is silent", now);
            // Whoever waited has waited long enough.
            (self.grace_until, self.locks_until) = (now, now);
        } else if now >= self.ping_at() && !self.pinged {
            self.pinged = true;
            self.line.ask(Ask::Ping, Some(now), Ping {}.into());
        }
    }

    /// Since when the oldest request that somebody waits for has seen nothing move.
    fn oldest_wait(&self) -> Option<Instant> {
        let since = self.line.asked.values().filter_map(|asked| asked.waits_since).min();
        since.map(|since| since.max(self.moved_at))
    }

    pub fn on_connected(&mut self, now: Instant) {
        if !matches!(self.state, State::Connecting { .. }) {
            return;
        }
        self.state = State::Greeting;
        (self.proved_at, self.answered_at) = (now, now);
        (self.moved_at, self.pinged) = (now, false);
        let hello = Hello {
            version: VERSION,
            volume: self.who.volume.clone(),
            incarnation: self.who.incarnation,
            node: self.who.node,
            volume_id: self.who.volume_id,
            host: self.who.host.clone(),
            pending: self.shipper.settled(),
            keeps: self.who.keeps,
            locks: self.locker.has_locks(),
            room: self.asker.hello(),
        };
        self.line.ask(Ask::Hello, Some(now), hello.into());
    }

    /// The connection broke, or could not be made. Not to be told of one that `Close` asked for.
    pub fn on_closed(&mut self, now: Instant) {
        if !matches!(self.state, State::Away { .. }) {
            self.away(now);
        }
    }

    fn close(&mut self, why: &str, now: Instant) {
        self.line.effect(Effect::Close { why: why.to_owned() });
        self.away(now);
    }

    fn away(&mut self, now: Instant) {
        if self.is_online() {
            self.grace_until = now + policy::away_after(self.timeout);
            self.locks_until = now + self.timeout;
            self.line.effect(Effect::SetOnline(false));
        }
        self.set_volume(Mode::None, false);
        self.lettings.clear();
        self.recalled.clear();
        self.held_back.clear();
        self.asked_at.clear();
        self.asks_all = false;
        self.chance ^= self.chance << 13;
        self.chance ^= self.chance >> 7;
        self.chance ^= self.chance << 17;
        self.state = State::Away { retry_at: now + policy::retry_after(self.fails, self.chance) };
        self.fails = self.fails.saturating_add(1);
        self.line.asked.clear();
        self.breaks = 0;
        self.fetcher.on_away(&mut self.line);
        self.locker.on_away(&mut self.line);
        self.asker.on_away(now);
    }

    /// Bytes came, of whatever message: the server is there.
    pub fn on_heard(&mut self, len: u64, now: Instant) {
        /// So much is more than the answers to pings: what somebody waits for is coming.
        const MOVED_LEN: u64 = 16 << 10;
        self.moved_len += len;
        if self.moved_len >= MOVED_LEN {
            (self.moved_len, self.moved_at) = (0, now);
        }
    }

    /// A message came: an answer to our request `id`, or the server's request `id`.
    pub fn on_message(&mut self, id: u64, answer: bool, message: Message, now: Instant) {
        let ping = matches!(message, Message::Ping(_) | Message::Pong(_));
        self.line.message_count += u64::from(!ping);
        match self.state {
            State::Away { .. } | State::Connecting { .. } => {}
            _ if answer => self.on_answer(id, message, now),
            _ => self.on_request(id, message, now),
        }
    }

    fn on_request(&mut self, id: u64, message: Message, now: Instant) {
        let greeted = self.state != State::Greeting;
        match message {
            Message::Ping(_) => {
                let message = Pong { stamp: Stamp(0) }.into();
                self.line.effect(Effect::Send { foreground: true, id, answer: true, message });
            }
            Message::Break(m) if greeted && self.breaks < BREAKS_MAX => {
                self.breaks += 1;
                let acked = self.acked();
                self.fetcher.on_break(&m.fids, acked, &mut self.line, now);
                self.line.effect(Effect::MarkStale { break_id: Some(id), fids: m.fids });
            }
            Message::Recall(m) if greeted && self.recalls() < BREAKS_MAX => {
                let until = self.fetcher.held_until(&m.fids);
                match until.filter(|until| *until > now) {
                    Some(until) => self.held_back.push((until, id, m)),
                    None => self.on_recall(id, m, now),
                }
            }
            Message::GiveBack(_) if greeted => {
                let online = self.is_online();
                let (shipper, line) = (&mut self.shipper, &mut self.line);
                if self.asker.on_give_back(id, online, shipper, line, now).is_err() {
                    self.close("the server asks for room too often", now);
                }
            }
            // by itself: nobody else wants anything
            Message::Granted(m) if greeted => self.set_volume(m.volume, true),
            Message::ConflictCount(m) if greeted => self.line.effect(Effect::Conflicts(m.count)),
            Message::Read(read) if greeted => {
                self.shipper.on_read(now);
                self.line.effect(Effect::AnswerRead { id, read });
            }
            _ => self.close("the server spoke out of turn", now),
        }
    }

    /// The kernel has forgotten what the break named.
    pub fn on_break_done(&mut self, break_id: u64) {
        let connected = !matches!(self.state, State::Away { .. } | State::Connecting { .. });
        if connected && self.breaks > 0 {
            self.breaks -= 1;
            self.line.message_count += 1;
            let message = Pong { stamp: Stamp(0) }.into();
            let send = Effect::Send { foreground: true, id: break_id, answer: true, message };
            self.line.effect(send);
        }
    }

    fn on_answer(&mut self, id: u64, message: Message, now: Instant) {
        // An answer that nobody waits for any more; what it acknowledges holds all the same.
        let Some(asked) = self.line.asked.remove(&id) else {
            if let (Message::Acked(m), true) = (message, self.is_online()) {
                self.on_acked(id, m, now);
            }
            return;
        };
        if let Some(since) = asked.waits_since {
            (self.proved_at, self.answered_at) = (self.proved_at.max(since), now);
            match asked.ask {
                Ask::Ping => self.pinged = false,
                _ => self.moved_at = now,
            }
        }
        match (asked.ask, message) {
            (Ask::Hello, Message::Welcome(m)) => self.on_welcome(m, now),
            (Ask::Hello, Message::Refused(m)) => {
                // The same words as those of the refusal: they are what people are shown.
                let why = format!("refused: {}", m.what);
                self.line.effect(Effect::Refused { code: m.code, what: m.what });
                self.close(&why, now);
            }
            (ask @ (Ask::Since | Ask::ReadAll), Message::Changes(m)) => {
                self.on_changes(ask, m, now);
            }
            (Ask::ReadAll, Message::Failed(_)) => {
                self.asks_all = false;
                self.recalled.clear();
            }
            (Ask::Permit { no }, Message::Granted(_)) => {
                if let Some((fids, tickets)) = self.fetcher.take_permit(no) {
                    fids.iter().for_each(|fid| self.fetcher.note_given(*fid, now));
                    self.line.effect(Effect::Raise { fids, mode: Mode::Write });
                    self.line.resolve(tickets, Ok(()));
                }
            }
            (Ask::Permit { no }, Message::Failed(m)) => {
                if let Some((_, tickets)) = self.fetcher.take_permit(no) {
                    self.line.resolve(tickets, Err(Unmet::Failed(m.code)));
                }
            }
            (Ask::Ping, Message::Pong(m)) => self.is_current(m.stamp),
            (Ask::Space, Message::Space(m)) => self.line.effect(Effect::SpaceIs(m)),
            (Ask::Space, Message::Failed(_)) => {}
            (Ask::Batch, Message::Acked(m)) => self.on_acked(id, m, now),
            (Ask::Batch, Message::Failed(m)) => {
                if m.code == Code::Gap {
                    return self.close("the server misses records", now);
                }
                let what = format!("the server does not take changes: {} ({:?})", m.what, m.code);
                self.line.effect(Effect::NotTaken { what });
                self.shipper.on_failed(&mut self.line, now);
            }
            (Ask::Lock { number }, Message::LockAnswer(m)) => {
                self.locker.on_answer(number, &m, &mut self.line);
            }
            (Ask::Lock { number }, Message::Failed(_)) => {
                let why = Some(Denied::NoRoom);
                let answer = LockAnswer { why, held: None, others: true };
                self.locker.on_answer(number, &answer, &mut self.line);
            }
            (Ask::Room, Message::RoomTerms(m)) => {
                self.asker.on_terms(&m, &mut self.shipper, &mut self.line, now);
            }
            (Ask::Room, Message::Failed(_)) => self.asker.on_failed(&mut self.line, now),
            (Ask::Claim, Message::Claimed(m)) => {
                self.locker.on_claimed(id, &m.lost, &mut self.line);
            }
            (Ask::Conflict { number }, message) => {
                if let Message::Resolved(m) = &message {
                    let fids = m.fids.clone();
                    self.line.effect(Effect::MarkStale { break_id: None, fids });
                }
                let how = match message {
                    Message::Failed(failed) => Err(failed),
                    message => Ok(message),
                };
                self.line.effect(Effect::ConflictAnswer { number, how });
            }
            (Ask::List { .. } | Ask::Stat { .. } | Ask::Piece { .. }, message) => {
                let acked = self.acked();
                let fits = self.fetcher.on_answer(asked.ask, message, acked, &mut self.line, now);
                if !fits {
                    self.close("the server's answer does not fit the request", now);
                }
            }
            _ => self.close("the server's answer does not fit the request", now),
        }
    }

    fn on_welcome(&mut self, m: Welcome, now: Instant) {
        let fresh = self.who.volume_id == [0; 16];
        let refusal = if m.version != VERSION {
            Some((Code::WrongVersion, format!("the server speaks version {}", m.version)))
        } else if !fresh && m.volume_id != self.who.volume_id {
            Some((Code::ForeignCache, "the cache belongs to another volume".to_owned()))
        } else if self.who.node != 0 && m.node != self.who.node {
            Some((Code::ForeignCache, "the server does not know this cache any more".to_owned()))
        } else {
            None
        };
        if let Some((code, what)) = refusal {
            self.line.effect(Effect::Refused { code, what });
            return self.close("the server is not the one of this cache", now);
        }
        (self.who.node, self.who.volume_id) = (m.node, m.volume_id);
        self.who.volume.clone_from(&m.volume);
        if fresh {
            self.current = m.stamp;
        }
        self.state = State::CatchingUp;
        self.asker.on_welcome(m.room.as_ref(), &mut self.line);
        self.line.effect(Effect::Welcomed {
            node: m.node,
            volume_id: m.volume_id,
            volume: m.volume,
            read_only: m.read_only,
        });
        if !self.shipper.on_welcome(m.acked, m.seen, &mut self.line, now) {
            let what = "the server has changes of this cache that the cache itself has lost";
            let what = what.to_owned();
            self.line.effect(Effect::Refused { code: Code::ForeignCache, what });
            return self.close("the cache is older than the server's memory of it", now);
        }
        let acked = self.acked();
        self.asker.on_acked(acked, &mut self.line, now);
        self.since(Ask::Since, self.current, now);
    }

    fn on_changes(&mut self, ask: Ask, m: Changes, now: Instant) {
        if m.more && m.upto <= self.asked_from && !m.lost {
            return self.close("the server's history does not advance", now);
        }
        if m.lost {
            self.line.effect(Effect::BumpEpoch);
        } else if !m.fids.is_empty() {
            self.line.effect(match ask {
                Ask::ReadAll => Effect::CatchUp { fids: m.fids },
                _ => Effect::MarkStale { break_id: None, fids: m.fids },
            });
        }
        if m.more && !m.lost {
            // a power cut at the server may take back what it names: it is no place to begin from
            return self.since(ask, m.upto, now);
        }
        self.current = m.upto;
        // What was recalled on the way is not given back with the volume.
        let recalled = std::mem::take(&mut self.recalled);
        let whole = recalled.iter().filter(|m| m.fids.is_empty()).map(|m| m.mode);
        let volume = whole.fold(m.volume, Mode::min);
        self.set_volume(volume, ask == Ask::ReadAll);
        let fids: Vec<Fid> = recalled.into_iter().flat_map(|m| m.fids).collect();
        if !fids.is_empty() {
            self.line.effect(Effect::SetModes { fids, mode: Mode::None });
        }
        if ask == Ask::ReadAll {
            self.asks_all = false;
            return;
        }
        (self.state, self.fails) = (State::Online, 0);
        self.line.effect(Effect::SetOnline(true));
        let acked = self.acked();
        self.fetcher.on_online(acked, &mut self.line, now);
        self.locker.on_online(self.volume == Mode::Write, &mut self.line);
        self.shipper.fill(&mut self.line, now);
        self.asker.on_online(&mut self.line, now);
    }

    fn on_acked(&mut self, id: u64, m: Acked, now: Instant) {
        let heard = self.shipper.on_acked(id, m.upto, now);
        if let Heard::Nonsense = heard {
            return self.close("the server acknowledges what it was not sent", now);
        }
        let (upto, stamp) = (m.upto, m.stamp);
        self.line.effect(Effect::Acked { upto, stamps: m.stamps, conflicts: m.conflicts });
        self.is_current(stamp);
        self.let_go();
        self.asker.on_acked(upto, &mut self.line, now);
        if let Heard::Short = heard {
            let what = "the server could not take all changes".to_owned();
            self.line.effect(Effect::NotTaken { what });
            self.shipper.on_failed(&mut self.line, now);
        }
        self.shipper.fill(&mut self.line, now);
    }

    fn is_current(&mut self, stamp: Stamp) {
        // Of what it may not read, it is told nothing.
        if self.is_online() && self.volume != Mode::None {
            self.current = self.current.max(stamp);
        }
    }

    /// Somebody waits. `ticket` is resolved in every case.
    pub fn on_want(&mut self, want: Want, ticket: Ticket, now: Instant) {
        let online = self.is_online();
        if !online && matches!(want, Want::Permit(_)) {
            return self.line.resolve([ticket], Ok(())); // away from the server nobody asks
        }
        if !online && now >= self.grace_until {
            let how = match want {
                Want::Room(need) => self.asker.without_more(need),
                _ => Err(Unmet::Unreachable),
            };
            return self.line.resolve([ticket], how);
        }
        if let Want::Room(need) = want {
            return self.asker.on_want(need, ticket, online, &mut self.line, now);
        }
        if !matches!(want, Want::Bytes(_)) {
            self.note_asking(now);
        }
        let acked = self.acked();
        self.fetcher.on_want(want, ticket, acked, online, &mut self.line, now);
    }

    /// Somebody asks for a lock, or after one. `LockEnded` follows, sooner or later. `permitted`:
    /// the object may be changed.
    pub fn on_lock(&mut self, number: Number, ask: LockAsk, permitted: bool, now: Instant) {
        let offline = !self.is_online() && now >= self.locks_until;
        if offline {
            self.locker.give_up(&mut self.line);
        }
        let alone = offline || (permitted && self.locker.is_sure(ask.fid));
        self.locker.on_ask(number, ask, alone, &mut self.line);
    }

    /// Nobody waits for that lock any more.
    pub fn on_lock_cancel(&mut self, number: Number) {
        self.locker.on_cancel(number, &mut self.line);
    }

    /// How much room is there? `SpaceIs` may follow.
    pub fn on_want_space(&mut self) {
        if self.is_online() && !self.line.asked.values().any(|asked| asked.ask == Ask::Space) {
            self.line.ask(Ask::Space, None, Statfs {}.into());
        }
    }

    /// A question about conflicts, or a decision. `ConflictAnswer` follows, unless the connection
    /// ends first. False: the server is away.
    pub fn on_conflict_ask(&mut self, number: u64, message: Message) -> bool {
        if self.is_online() {
            // others may have to be told first, which takes its time: nobody counts it
            self.line.ask(Ask::Conflict { number }, None, message);
        }
        self.is_online()
    }

    /// The journal grew.
    pub fn on_bell(&mut self, bell: Bell, now: Instant) {
        self.shipper.on_bell(bell, now);
        self.ship(now);
        if self.is_online() {
            self.asker.look(&mut self.line, now);
        }
    }

    /// Ship what there is, whatever its age; somebody waits, so a server that is away is tried now.
    pub fn on_ship_now(&mut self, now: Instant) {
        if let State::Away { retry_at } = &mut self.state {
            *retry_at = now;
        }
        self.shipper.ask_all();
        self.ship(now);
    }

    fn ship(&mut self, now: Instant) {
        if self.is_online() {
            self.shipper.fill(&mut self.line, now);
        }
    }

    /// The answer to `CutBatch`; `None`: there is nothing to ship. `len`: of the contents that the
    /// batch carries or announces, bytes.
    pub fn on_batch_cut(&mut self, batch: Option<Batch>, len: u64, now: Instant) {
        if self.is_online() {
            self.shipper.on_batch_cut(batch, len, &mut self.line, now);
            self.asker.on_sent(self.shipper.sent());
            self.let_go();
        }
    }
}

#[cfg(test)]
mod tests;
