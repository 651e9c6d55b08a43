//! Permits at the server: who may read and change what, and how that changes hands.
//!
//! A request that needs what another client has waits in the volume's queue, first come first
//! served, while the holders are told to let go: `Recall` to who may change, `Break` to who may
//! read. Then it is answered, and goes on with the rights that it asked for:
//!
//! - what is listed or looked up may be read; alone with it, the client may change it at once, so
//!   that a file that goes back and forth costs one question a turn;
//! - a client that is alone, or beside clients that ask for nothing, may change the whole volume;
//! - a client that asks much may read the whole volume (`Since` with `read_all`).
//!
//! Who was told by a batch's `Break` that an object changes, has it until that is answered, like
//! any other reader; and if it is cut off before, its ghost has it.
//!
//! A client that is cut off keeps its rights for its lease, as a *ghost*: counted from when it was
//! last heard, for by then it knows itself that it is away. Its next connection ends the ghost as
//! soon as all that it had changed is here, and a farewell at once. A server that starts again has
//! a ghost of each client that it had. Who does not let go in that time loses the connection, though
//! not its lease. What it then still ships is certified (replica's matter).
//! Source: the token servers of DFS and Calypso; leases by Gray and Cheriton.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::time::{Duration, Instant};

use super::faults::{Fault, is_planted};
use super::message::{Break, Code, FIDS_MAX, Granted, Message, Recall, Released, Since};
use super::policy;
use super::promises::ConnId;
use super::rights::{Mode, Rights};
use super::server::{Effect, Server, VolumeNo, Why};
use crate::kml::record::{Fid, Seq};

/// No connection has this number.
const NOBODY: ConnId = ConnId(0);
/// Most requests of one client that wait for others; each is one of its kernel's.
const WAITING_MAX: usize = 4096;
/// Most objects whose rights are kept apart from a volume's, of one client. Beyond it everything is
/// recalled: it asks anew for what it uses.
const APART_MAX: usize = 1 << 16;

/// What one client may do, and since when it wants nothing.
struct Holder {
    node: u32,
    rights: Rights,
    active_at: Instant,
    /// it was told of all changes before it could read all
    knows: bool,
    /// what it may do is not taken from it only because it asks for nothing
    keeps: bool,
    ghost: Option<Ghost>,
}

/// A connection that is gone, while its client may not know it.
struct Ghost {
    until: Instant,
    /// the client is back, and this is the newest change that it made before
    upto: Option<Seq>,
}

#[derive(Clone, PartialEq, Debug)]
enum Need {
    Objects(Vec<Fid>, Mode),
    ReadAll,
    /// not asked for, but useful: everybody else wants nothing
    WriteAll,
}

/// A request that waits for others to let go.
struct Waiting {
    conn: ConnId,
    node: u32,
    id: u64,
    need: Need,
    /// what is to be answered then; nothing when the right itself was asked for
    request: Option<Message>,
}

/// A `Recall` or `Break` that is not answered.
struct Letting {
    volume: VolumeNo,
    /// none: the whole volume
    fids: Vec<Fid>,
    mode: Mode,
    until: Instant,
    /// it is let go as soon as the client's records up to here are in the tree
    released: Option<Released>,
}

/// The rights of one volume.
#[derive(Default)]
pub(super) struct Permits {
    holders: BTreeMap<ConnId, Holder>,
    queue: VecDeque<Waiting>,
    /// what is being let go, and by whom; `None`: the whole volume
    underway: BTreeSet<(Option<Fid>, ConnId)>,
    /// nodes with rights, as the next life was told
    live: BTreeSet<u32>,
}

/// Recalls of all volumes, by connection and request.
#[derive(Default)]
pub(super) struct Lettings(BTreeMap<(ConnId, u64), Letting>);

impl Need {
    fn writes(&self) -> bool {
        matches!(self, Need::Objects(_, Mode::Write) | Need::WriteAll)
    }
    /// Whether two clients' needs exclude each other. What nobody asked for excludes nothing.
    fn agrees(&self, other: &Need) -> bool {
        match (self, other) {
            (Need::Objects(a, m), Need::Objects(b, n)) => {
                m.agrees(*n) || !a.iter().any(|fid| b.contains(fid))
            }
            (Need::ReadAll, Need::Objects(_, m)) | (Need::Objects(_, m), Need::ReadAll) => {
                m.agrees(Mode::Read)
            }
            _ => true,
        }
    }
}

impl Permits {
    fn others(&self, conn: ConnId, node: u32) -> impl Iterator<Item = (&ConnId, &Holder)> {
        self.holders.iter().filter(move |(of, holder)| **of != conn && holder.node != node)
    }
    fn ghosts_end_at(&self) -> Option<Instant> {
        self.holders.values().filter_map(|holder| holder.ghost.as_ref().map(|g| g.until)).min()
    }
    /// Whether the client is just letting go some of this.
    fn lets_go(&self, conn: ConnId, need: &Need) -> bool {
        let of = |fid: &Fid| self.underway.contains(&(Some(*fid), conn));
        let apart = match need {
            Need::Objects(fids, _) => fids.iter().any(of),
            Need::ReadAll | Need::WriteAll => self.underway.iter().any(|(_, of)| *of == conn),
        };
        apart || self.underway.contains(&(None, conn))
    }
    /// Whether others are just letting go the same object.
    fn others_let_go(&self, fid: Fid) -> bool {
        let of_fid = (Some(fid), ConnId(0))..=(Some(fid), ConnId(u32::MAX));
        self.underway.range(of_fid).next().is_some()
    }
    /// A lock that waits for others' rights needs not be waited for any more.
    pub(super) fn withdraw_lock(&mut self, conn: ConnId, id: u64) -> Option<Message> {
        let is_it = |w: &Waiting| {
            (w.conn, w.id) == (conn, id) && matches!(w.request, Some(Message::LockAsk(_)))
        };
        let at = self.queue.iter().position(is_it)?;
        self.queue.remove(at)?.request
    }
    pub(super) fn rights(&self, conn: ConnId) -> Option<&Rights> {
        self.holders.get(&conn).map(|holder| &holder.rights)
    }
    /// It was told already that the object changes, and has not asked since.
    pub(super) fn has_let_go(&self, conn: ConnId, fid: Fid) -> bool {
        let of = self.rights(conn);
        of.is_some_and(|r| r.volume() != Mode::None && r.mode(fid) == Mode::None)
    }
}

impl Server {
    /// What a client may do with an object; a promise is the right to read where nothing else is.
    pub fn mode(&self, no: VolumeNo, conn: ConnId, fid: Fid) -> Mode {
        let volume = &self.volumes[no];
        let Some(rights) = volume.permits.rights(conn) else { return Mode::None };
        match rights.mode(fid) {
            Mode::None if rights.volume() == Mode::None && volume.promises.holds(conn, fid) => {
                Mode::Read
            }
            Mode::None if self.trusts(conn, fid) => Mode::Read,
            mode => mode,
        }
    }
    /// Whether a client may trust what it has of anything.
    fn has_any(&self, no: VolumeNo, conn: ConnId, holder: &Holder) -> bool {
        let told = self.breaks.range((conn, 0)..=(conn, u64::MAX)).next().is_some();
        told || !holder.rights.is_none() || self.volumes[no].promises.is_holder(conn)
    }
    fn set_mode(&mut self, no: VolumeNo, conn: ConnId, fid: Fid, mode: Mode) {
        match mode {
            Mode::None => self.volumes[no].promises.drop_one(conn, fid),
            _ => self.promise(no, conn, fid),
        }
        let permits = &mut self.volumes[no].permits;
        let Some(holder) = permits.holders.get_mut(&conn) else { return };
        // Reading by a promise needs no other note.
        let by_promise = mode == Mode::Read && holder.rights.volume() == Mode::None;
        holder.rights.set(fid, if by_promise { Mode::None } else { mode });
    }
    /// Promises to tell of a change; who holds too many promises is told of all.
    pub(super) fn promise(&mut self, no: VolumeNo, conn: ConnId, fid: Fid) {
        let volume = &mut self.volumes[no];
        let Some(holder) = volume.permits.holders.get_mut(&conn) else { return };
        volume.promises.give(conn, fid);
        if holder.rights.volume() == Mode::None && volume.promises.is_all(conn) {
            holder.rights.raise_volume(Mode::Read);
        }
    }

    /// Nobody knows what they might do: anything.
    pub(super) fn revive(&mut self, no: VolumeNo, nodes: &[u32], until: Instant) {
        self.due(until);
        let permits = &mut self.volumes[no].permits;
        for (at, node) in (0..).zip(nodes) {
            let mut rights = Rights::default();
            rights.set_volume(Mode::Write);
            let ghost = Some(Ghost { until, upto: None });
            // No connection will ever have such a number.
            let conn = ConnId(u32::MAX - 1 - at);
            let (node, keeps) = (*node, false);
            let holder = Holder { node, rights, active_at: until, knows: false, keeps, ghost };
            permits.holders.insert(conn, holder);
        }
        permits.live = nodes.iter().copied().collect();
    }
    /// Has the next life told who has rights in this one.
    fn keep_live(&mut self, no: VolumeNo) {
        let permits = &mut self.volumes[no].permits;
        let live: BTreeSet<u32> = permits.holders.values().map(|holder| holder.node).collect();
        if live != permits.live {
            let nodes = live.iter().copied().collect();
            permits.live = live;
            self.effects.push_back(Effect::Live { volume: no, nodes });
        }
    }

    pub(super) fn on_permits_met(&mut self, conn: ConnId, pending: Seq, acked: Seq, now: Instant) {
        let Some(peer) = self.peers.get(&conn) else { return };
        let (no, node, keeps) = (peer.volume, peer.node, peer.keeps);
        let permits = &mut self.volumes[no].permits;
        for holder in permits.holders.values_mut().filter(|holder| holder.node == node) {
            if let Some(ghost) = &mut holder.ghost {
                ghost.upto = Some(pending);
            }
        }
        let rights = Rights::default();
        let (knows, ghost) = (false, None);
        permits.holders.insert(conn, Holder { node, rights, active_at: now, knows, keeps, ghost });
        self.keep_live(no);
        self.has_come(no, node, acked, now);
    }
    /// Everything of this node up to here is in the tree: its ghosts may go.
    pub(super) fn has_come(&mut self, no: VolumeNo, node: u32, upto: Seq, now: Instant) {
        let done = |holder: &Holder| {
            let all = holder.ghost.as_ref().and_then(|ghost| ghost.upto);
            holder.node == node && all.is_some_and(|pending| pending <= upto)
        };
        self.end_ghosts(no, done, now);
    }
    fn end_ghosts(&mut self, no: VolumeNo, done: impl Fn(&Holder) -> bool, now: Instant) {
        let volume = &mut self.volumes[no];
        let mut any = false;
        volume.permits.holders.retain(|conn, holder| {
            let over = done(holder);
            if over {
                volume.promises.forget(*conn);
            }
            any |= over;
            !over
        });
        if any {
            self.keep_live(no);
            self.pump(no, now);
        }
    }
    /// The connection is gone. `lease`: what it held stays, until its client knows that, too.
    pub(super) fn on_permits_closed(
        &mut self,
        no: VolumeNo,
        conn: ConnId,
        lease: Instant,
        now: Instant,
    ) {
        self.lettings.0.retain(|(of, _), _| *of != conn);
        let volume = &mut self.volumes[no];
        volume.permits.underway.retain(|(_, of)| *of != conn);
        volume.permits.queue.retain(|waiting| waiting.conn != conn);
        let held = volume.promises.is_holder(conn)
            || volume.permits.rights(conn).is_some_and(|rights| !rights.is_none());
        match volume.permits.holders.get_mut(&conn) {
            Some(holder) if held && lease > now => {
                holder.ghost = Some(Ghost { until: lease, upto: None });
                self.due(lease);
            }
            _ => {
                volume.permits.holders.remove(&conn);
                volume.promises.forget(conn);
            }
        }
        self.keep_live(no);
        self.pump(no, now);
    }
    /// The client leaves, and lets everything go.
    pub(super) fn on_farewell(&mut self, conn: ConnId, now: Instant) {
        let Some(no) = self.peers.get(&conn).map(|peer| peer.volume) else { return };
        self.set_volume(no, conn, Mode::None);
        self.pump(no, now);
    }
    fn set_volume(&mut self, no: VolumeNo, conn: ConnId, mode: Mode) {
        let volume = &mut self.volumes[no];
        let Some(holder) = volume.permits.holders.get_mut(&conn) else { return };
        holder.rights.set_volume(mode);
        match mode {
            Mode::None => volume.promises.forget(conn),
            _ => volume.promises.give_blanket(conn),
        }
    }

    /// A client asks what has changed: it may do with the volume what nobody minds, or it waits
    /// until it may read all of it.
    pub(super) fn on_since(&mut self, conn: ConnId, id: u64, since: Since, now: Instant) {
        let Some(peer) = self.peers.get(&conn) else { return };
        let (no, node) = (peer.volume, peer.node);
        self.is_active(no, conn, now);
        if let Some(holder) = self.volumes[no].permits.holders.get_mut(&conn) {
            holder.knows = false;
        }
        if since.read_all {
            return self.wait((no, conn, node, id), Need::ReadAll, Some(since.into()), now);
        }
        let volume = &self.volumes[no];
        let others = volume.permits.others(conn, node);
        let free = |conn: &ConnId, holder: &Holder| !self.has_any(no, *conn, holder);
        let (alone, written) = others.fold((true, false), |(alone, written), (conn, holder)| {
            (alone && free(conn, holder), written || holder.rights.any_write())
        });
        let alone = alone && volume.permits.queue.is_empty();
        let alone = alone && volume.locking.has_only(node);
        let mode = policy::first_right(alone, written, volume.permits.holders.len());
        let mode = if volume.terms.read_only { mode.min(Mode::Read) } else { mode };
        // Before the history is read: what comes after it is broken to the client.
        self.set_volume(no, conn, mode);
        self.answer_request(no, conn, id, since.into(), now);
    }
    pub(super) fn on_ask(&mut self, conn: ConnId, id: u64, fids: Vec<Fid>, now: Instant) {
        let Some(peer) = self.peers.get(&conn) else { return };
        let (no, node) = (peer.volume, peer.node);
        self.is_active(no, conn, now);
        self.wait((no, conn, node, id), Need::Objects(fids, Mode::Write), None, now);
    }
    /// Whether the answer to a request may go out: if others have changes of what stands in it,
    /// they are asked for them first, and the request is answered anew.
    pub(super) fn may_answer(
        &mut self,
        conn: ConnId,
        id: u64,
        (request, given): (&Message, &[Fid]),
        now: Instant,
    ) -> bool {
        let Some(peer) = self.peers.get(&conn) else { return false };
        let (no, node) = (peer.volume, peer.node);
        self.is_active(no, conn, now);
        let permits = &self.volumes[no].permits;
        let idle = permits.queue.is_empty() && permits.underway.is_empty();
        if idle && !permits.others(conn, node).any(|(_, h)| h.rights.any_write()) {
            return true;
        }
        let need = Need::Objects(given.to_vec(), Mode::Read);
        let queued = |waiting: &Waiting| waiting.node != node && !waiting.need.agrees(&need);
        let may = !permits.queue.iter().any(queued) && !permits.lets_go(conn, &need);
        if may && self.blockers(no, conn, node, &need).is_empty() {
            return true;
        }
        self.wait((no, conn, node, id), need, Some(request.clone()), now);
        false
    }
    /// The answer goes out now: the client may read what stands in it, or more.
    pub(super) fn give(&mut self, conn: ConnId, given: &[Fid], message: &mut Message) {
        let Some(peer) = self.peers.get(&conn) else { return };
        let (no, node) = (peer.volume, peer.node);
        for fid in given {
            let mode = self.mode(no, conn, *fid).max(Mode::Read);
            self.set_mode(no, conn, *fid, mode);
        }
        match message {
            Message::Status(status) => {
                status.mode = self.give_more(no, conn, node, status.object.fid);
            }
            Message::Page(page) => {
                page.mode = self.give_more(no, conn, node, page.dir.fid);
                let rights = self.volumes[no].permits.rights(conn);
                if let Some(rights) = rights.filter(|rights| rights.volume() == Mode::Write) {
                    let entries = page.entries.iter().map(|entry| entry.object.fid);
                    page.read_only =
                        entries.filter(|fid| rights.mode(*fid) == Mode::Read).collect();
                }
            }
            Message::Changes(changes) => {
                let Some(holder) = self.volumes[no].permits.holders.get_mut(&conn) else { return };
                changes.volume = holder.rights.volume();
                holder.knows = !changes.more;
            }
            _ => {}
        }
    }
    /// Where nobody else has a right, the next question is spared.
    fn give_more(&mut self, no: VolumeNo, conn: ConnId, node: u32, fid: Fid) -> Mode {
        let none = |(of, _): (&ConnId, &Holder)| self.mode(no, *of, fid) == Mode::None;
        if !self.volumes[no].terms.read_only
            && self.volumes[no].permits.others(conn, node).all(none)
        {
            self.set_mode(no, conn, fid, Mode::Write);
        }
        self.mode(no, conn, fid)
    }
    /// What a batch made in directories that its author may change, it may change, too.
    pub(super) fn on_made(
        &mut self,
        no: VolumeNo,
        conn: ConnId,
        (made, gone): (&[(Fid, Fid)], &[Fid]),
        now: Instant,
    ) {
        for (dir, fid) in made {
            if self.mode(no, conn, *dir) == Mode::Write {
                self.set_mode(no, conn, *fid, Mode::Write);
                // Those who may do more with the volume have not seen it, and learn this with it.
                let permits = &mut self.volumes[no].permits;
                for (_, other) in permits.holders.iter_mut().filter(|(of, _)| **of != conn) {
                    other.rights.set(*fid, Mode::None);
                }
            }
        }
        for holder in self.volumes[no].permits.holders.values_mut() {
            for fid in gone {
                let whole = holder.rights.volume();
                holder.rights.set(*fid, whole);
            }
        }
        self.bound_apart(no, now);
    }
    /// The memory for what a client may do has a bound, whatever it and others do.
    fn bound_apart(&mut self, no: VolumeNo, now: Instant) {
        let holders = self.volumes[no].permits.holders.iter();
        let many = holders.filter(|(_, holder)| holder.rights.apart_count() > APART_MAX);
        for conn in many.map(|(conn, _)| *conn).collect::<Vec<_>>() {
            self.recall(no, conn, Vec::new(), Mode::None, now);
        }
    }

    fn is_active(&mut self, no: VolumeNo, conn: ConnId, now: Instant) {
        if let Some(holder) = self.volumes[no].permits.holders.get_mut(&conn) {
            holder.active_at = now;
        }
    }
    /// Has others let go of the right to change these objects, if they have it. `None`: the
    /// request waits for that; else it can be answered now.
    pub(super) fn unless_written(
        &mut self,
        (no, conn, node, id): (VolumeNo, ConnId, u32, u64),
        fids: Vec<Fid>,
        request: Message,
        now: Instant,
    ) -> Option<Message> {
        let need = Need::Objects(fids, Mode::Read);
        if self.blockers(no, conn, node, &need).is_empty() {
            return Some(request);
        }
        self.wait((no, conn, node, id), need, Some(request), now);
        None
    }
    fn answer_request(
        &mut self,
        volume: VolumeNo,
        conn: ConnId,
        id: u64,
        request: Message,
        now: Instant,
    ) {
        if matches!(request, Message::LockAsk(_) | Message::Claim(_)) {
            return self.decide_lock(conn, id, request, now);
        }
        let Some(node) = self.peers.get(&conn).map(|peer| peer.node) else { return };
        self.effects.push_back(Effect::Ask { conn, id, volume, node, request });
    }
    fn wait(
        &mut self,
        (no, conn, node, id): (VolumeNo, ConnId, u32, u64),
        need: Need,
        request: Option<Message>,
        now: Instant,
    ) {
        let queue = &mut self.volumes[no].permits.queue;
        if queue.iter().filter(|waiting| waiting.conn == conn).count() >= WAITING_MAX {
            return self.fail(conn, id, Code::Other, "too many requests wait for other clients");
        }
        queue.push_back(Waiting { conn, node, id, need, request });
        // For those before it nothing has changed, but for what nobody asked for: it may go now.
        let not_asked = queue.iter().position(|waiting| waiting.need == Need::WriteAll);
        let from = not_asked.unwrap_or(queue.len() - 1);
        self.pump_from(no, from, now);
    }

    /// Serves whoever can be served, in order, and has the others' rights recalled.
    pub(super) fn pump(&mut self, no: VolumeNo, now: Instant) {
        self.pump_from(no, 0, now);
    }
    /// The same, beginning with the `at`th.
    fn pump_from(&mut self, no: VolumeNo, mut at: usize, now: Instant) {
        loop {
            let queue = &self.volumes[no].permits.queue;
            let Some(waiting) = queue.get(at) else { return };
            let (conn, node, need) = (waiting.conn, waiting.node, waiting.need.clone());
            let behind = queue.iter().take(at).any(|w| w.node != node && !w.need.agrees(&need));
            // What is being let go must not be given in between: the answer to it would take it.
            if behind || self.volumes[no].permits.lets_go(conn, &need) {
                at += 1;
                continue;
            }
            if self.volumes[no].terms.read_only && need.writes() {
                if let Some(waiting) = self.volumes[no].permits.queue.remove(at)
                    && need != Need::WriteAll
                {
                    self.fail(conn, waiting.id, Code::ReadOnly, "the volume is read-only");
                }
                continue;
            }
            let blockers = self.blockers(no, conn, node, &need);
            // Only who knows all changes may be given all.
            let knows = || self.volumes[no].permits.holders.get(&conn).is_some_and(|h| h.knows);
            let free = || knows() && self.volumes[no].locking.has_only(node);
            if need == Need::WriteAll && !(free() && self.all_idle(no, &blockers, now)) {
                self.volumes[no].permits.queue.remove(at);
                continue;
            }
            if blockers.is_empty() {
                if let Some(waiting) = self.volumes[no].permits.queue.remove(at) {
                    self.serve(no, waiting, now);
                }
                at = 0; // what was served may have asked for more, and changed the queue
                continue;
            }
            for (holder, fids, mode) in blockers {
                self.recall(no, holder, fids, mode, now);
            }
            at += 1;
        }
    }
    /// Who stands in the way, with what (nothing: the whole volume), and what it may keep of it.
    fn blockers(
        &self,
        no: VolumeNo,
        conn: ConnId,
        node: u32,
        need: &Need,
    ) -> Vec<(ConnId, Vec<Fid>, Mode)> {
        let volume = &self.volumes[no];
        let mut out = Vec::new();
        if is_planted(Fault::PermitTwice) {
            return out;
        }
        for (of, holder) in volume.permits.others(conn, node) {
            match need {
                Need::Objects(fids, mode) => {
                    if *mode == Mode::Read && !holder.rights.any_write() {
                        continue;
                    }
                    let keep = if *mode == Mode::Write { Mode::None } else { Mode::Read };
                    // Promises, which many may hold, only matter to who writes.
                    let has = |fid: Fid| match mode {
                        Mode::Read => holder.rights.mode(fid),
                        _ => self.mode(no, *of, fid),
                    };
                    let conflict = |fid: &&Fid| !has(**fid).agrees(*mode);
                    let fids: Vec<Fid> = fids.iter().filter(conflict).copied().collect();
                    if !fids.is_empty() {
                        out.push((*of, fids, keep));
                    }
                }
                Need::ReadAll if !holder.rights.any_write() => {}
                Need::ReadAll if holder.rights.volume() == Mode::None => {
                    let apart = holder.rights.apart().filter(|(_, mode)| *mode == Mode::Write);
                    let mut fids: Vec<Fid> = apart.map(|(fid, _)| fid).collect();
                    fids.sort_unstable();
                    out.push((*of, fids, Mode::Read));
                }
                Need::ReadAll => out.push((*of, Vec::new(), Mode::Read)),
                Need::WriteAll => {
                    if self.has_any(no, *of, holder) {
                        out.push((*of, Vec::new(), Mode::None));
                    }
                }
            }
        }
        out
    }
    fn all_idle(&self, no: VolumeNo, blockers: &[(ConnId, Vec<Fid>, Mode)], now: Instant) -> bool {
        let holders = &self.volumes[no].permits.holders;
        blockers.iter().all(|(conn, ..)| {
            holders.get(conn).is_none_or(|holder| {
                let idle = now.saturating_duration_since(holder.active_at);
                holder.ghost.is_none() && !holder.keeps && idle >= policy::IDLE
            })
        })
    }
    fn serve(&mut self, no: VolumeNo, waiting: Waiting, now: Instant) {
        let Waiting { conn, node, id, need, request } = waiting;
        match need {
            Need::Objects(fids, Mode::Write) => {
                for fid in fids {
                    self.set_mode(no, conn, fid, Mode::Write);
                }
                self.answer(conn, id, Granted { volume: Mode::None }.into());
                self.bound_apart(no, now);
                let rights = self.volumes[no].permits.rights(conn);
                if rights.is_some_and(|rights| rights.volume() == Mode::Read) {
                    self.wait((no, conn, node, 0), Need::WriteAll, None, now);
                }
            }
            Need::WriteAll => {
                self.set_volume(no, conn, Mode::Write);
                self.request(conn, false, Granted { volume: Mode::Write }.into());
            }
            Need::ReadAll if conn == NOBODY => self.on_all_let_go(no),
            Need::ReadAll => {
                let volume = &mut self.volumes[no];
                if let Some(holder) = volume.permits.holders.get_mut(&conn) {
                    // more may have come meanwhile
                    if holder.rights.volume() < Mode::Write {
                        holder.rights.raise_volume(Mode::Read);
                    }
                    volume.promises.give_blanket(conn);
                }
                if let Some(request) = request {
                    self.answer_request(no, conn, id, request, now);
                }
            }
            Need::Objects(..) => {
                if let Some(request) = request {
                    self.answer_request(no, conn, id, request, now);
                }
            }
        }
    }
    /// Has a client let go, unless it is asked already.
    fn recall(&mut self, no: VolumeNo, conn: ConnId, fids: Vec<Fid>, mode: Mode, now: Instant) {
        let permits = &mut self.volumes[no].permits;
        let is_ghost = permits.holders.get(&conn).is_none_or(|holder| holder.ghost.is_some());
        if is_ghost || permits.underway.contains(&(None, conn)) {
            return;
        }
        let until = now + self.settings.silence_max;
        if fids.is_empty() {
            permits.underway.insert((None, conn));
            self.due(until);
            let id = self.request(conn, false, Recall { fids: Vec::new(), mode }.into());
            let letting = Letting { volume: no, fids, mode, until, released: None };
            self.lettings.0.insert((conn, id), letting);
            return;
        }
        let (mut written, mut read) = (Vec::new(), Vec::new());
        for fid in fids {
            if self.volumes[no].permits.underway.insert((Some(fid), conn)) {
                let is_written = self.mode(no, conn, fid) == Mode::Write;
                if is_written { written.push(fid) } else { read.push(fid) }
            }
        }
        self.due(until);
        for (fids, is_written) in [(written, true), (read, false)] {
            for fids in fids.chunks(FIDS_MAX).map(<[Fid]>::to_vec) {
                let message: Message = match is_written {
                    true => Recall { fids: fids.clone(), mode }.into(),
                    false => Break { fids: fids.clone() }.into(),
                };
                let id = self.request(conn, false, message);
                let letting = Letting { volume: no, fids, mode, until, released: None };
                self.lettings.0.insert((conn, id), letting);
            }
        }
    }
    /// A client has let go. False: that was not asked of it.
    pub(super) fn on_released(
        &mut self,
        conn: ConnId,
        id: u64,
        released: Option<Released>,
        now: Instant,
    ) -> bool {
        let applied = self.peers.get(&conn).map_or(Seq(0), |peer| peer.applied);
        let Some(letting) = self.lettings.0.get_mut(&(conn, id)) else { return false };
        if let Some(released) = released.as_ref().filter(|released| released.upto > applied) {
            letting.released = Some(released.clone());
            return true;
        }
        self.let_go((conn, id), released, now);
        true
    }
    /// Records of the client up to here are in the tree: what waited for them is let go.
    pub(super) fn on_reached(&mut self, conn: ConnId, upto: Seq, now: Instant) {
        let reached = |((of, id), letting): (&(ConnId, u64), &Letting)| {
            let released = letting.released.as_ref().filter(|_| *of == conn)?;
            (released.upto <= upto).then(|| ((*of, *id), released.clone()))
        };
        let mut done: Vec<_> = self.lettings.0.iter().filter_map(reached).collect();
        done.sort_unstable_by_key(|(key, _)| *key);
        for (key, released) in done {
            self.let_go(key, Some(released), now);
        }
    }
    fn let_go(&mut self, key: (ConnId, u64), released: Option<Released>, now: Instant) {
        let Some(letting) = self.lettings.0.remove(&key) else { return };
        let (conn, no) = (key.0, letting.volume);
        let permits = &mut self.volumes[no].permits;
        if letting.fids.is_empty() {
            permits.underway.remove(&(None, conn));
            self.set_volume(no, conn, letting.mode);
        } else {
            for fid in &letting.fids {
                permits.underway.remove(&(Some(*fid), conn));
            }
            // Of many that are told, the last one lets the queue go on.
            let waits = permits.queue.iter().any(|waiting| waiting.conn == conn);
            let last = waits || letting.fids.iter().any(|fid| !permits.others_let_go(*fid));
            let kept: HashSet<Fid> = released.into_iter().flat_map(|r| r.kept).collect();
            for fid in letting.fids {
                let keeps = letting.mode == Mode::Read && kept.contains(&fid);
                self.set_mode(no, conn, fid, if keeps { Mode::Read } else { Mode::None });
            }
            if !last {
                return;
            }
        }
        self.pump(no, now);
    }

    /// Has everybody let go the right to change anything; `on_all_let_go` follows.
    pub(super) fn recall_all(&mut self, no: VolumeNo, now: Instant) {
        self.wait((no, NOBODY, 0, 0), Need::ReadAll, None, now);
    }
    /// It is not wanted any more.
    pub(super) fn recall_none(&mut self, no: VolumeNo, now: Instant) {
        self.volumes[no].permits.queue.retain(|waiting| waiting.conn != NOBODY);
        self.pump(no, now);
    }
    /// In short, what a client may do: with the volume, and with how many objects something else.
    pub(super) fn held(&self, no: VolumeNo, conn: ConnId) -> (Mode, usize) {
        let rights = self.volumes[no].permits.rights(conn);
        rights.map_or((Mode::None, 0), |rights| (rights.volume(), rights.apart_count()))
    }

    pub(super) fn permits_wake_at(&self) -> Option<Instant> {
        let ghosts = self.volumes.iter().filter_map(|volume| volume.permits.ghosts_end_at());
        ghosts.chain(self.lettings.0.values().map(|letting| letting.until)).min()
    }
    /// Ends what is over, and names who does not let go in time. Who ships meanwhile has time.
    pub(super) fn wake_permits(&mut self, now: Instant) -> Vec<(ConnId, Why)> {
        let lease = self.settings.silence_max;
        let mut late = Vec::new();
        for ((conn, _), letting) in &mut self.lettings.0 {
            if letting.until > now {
                continue;
            }
            let moved = self.peers.get(conn).map(|peer| {
                // What it let go is here, and waits for others: no fault of its own.
                let reached = |r: &Released| !peer.is_stuck && r.upto <= peer.expected;
                let here = letting.released.as_ref().is_some_and(reached);
                let moved_at = if here { now } else { peer.moved_at };
                moved_at + lease
            });
            match moved.filter(|until| *until > now) {
                Some(until) => letting.until = until,
                None => late.push((*conn, Why::RecallUnanswered)),
            }
        }
        let over = |holder: &Holder| holder.ghost.as_ref().is_some_and(|g| g.until <= now);
        for no in 0..self.volumes.len() {
            self.end_ghosts(no, over, now);
        }
        late
    }
}

/// How long the rights of a client last that was heard then.
pub(super) fn lease_end(heard_at: Instant, lease: Duration) -> Instant {
    heard_at + lease
}

#[cfg(test)]
mod tests;
