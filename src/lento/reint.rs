//! Reintegration at the server: the way of a client's batches, from arrival to acknowledgement.
//!
//! Batches of one client are applied in order, each `after` the `upto` of the one before. A batch
//! that fails takes those behind it with it (`Gap`): the client sends them again. What was applied
//! of a batch before it failed stays, and is acknowledged by an `Acked` that ends earlier.
//! Several batches share a sync: one is under way at a time, and covers all that was applied
//! when it began.

use std::collections::{HashSet, VecDeque};
use std::time::Instant;

use crate::kml::record::{Fid, Seq, Stamp};

use super::faults::{Fault, is_planted};
use super::intake::{Arrival, Change, Content, Fetch, Key, Piece};
use super::message::{Acked, Code, Data, FIDS_MAX, Failed, Read, Resolve, Resolved, Stamped};
use super::promises::{ConnId, Round};
use super::rights::made;
use super::server::{Effect, Peer, Server, State, VolumeNo, Why};

/// Most half-fetched contents that a volume keeps for clients that went away.
const PARKED_MAX: usize = 64;

/// Names a batch while it is worked on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Ticket(pub u64);

/// What became of a batch's records.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Applied {
    /// the newest record that needs not be sent again
    pub upto: Seq,
    pub stamps: Vec<(Fid, Stamp)>,
    pub conflicts: Vec<Fid>,
    /// objects that were changed, as far as the records do not name them
    pub also: Vec<Fid>,
    /// objects that lost their last name
    pub gone: Vec<Fid>,
    /// why it ended early
    pub failure: Option<(Code, String)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Fetching,
    Breaking,
    Applying,
    /// the batch's number among those that were applied
    Settling(u64),
}

/// One batch of a client.
pub(super) struct Batch {
    ticket: Ticket,
    /// of the request
    id: u64,
    after: Seq,
    upto: Seq,
    changes: Vec<Change>,
    /// of its contents that did not come with it, finished ones too
    fetches: Vec<Fetch>,
    /// objects that its records name
    touched: Vec<Fid>,
    /// and what they make, with the directory
    made: Vec<(Fid, Fid)>,
    stage: Stage,
    /// blankets that were given when it was told of first
    blankets: u64,
    /// breaks that are not answered
    waiting: usize,
    synced: bool,
    applied: Applied,
    len: usize,
    /// it is no batch of records, but a decision about a conflict, in their order
    resolve: Option<Decision>,
}

/// What becomes of a decision about a conflict.
enum Decision {
    Asked(Resolve),
    /// what was done, for people
    Done(String),
}

impl Batch {
    pub(super) fn len(&self) -> usize {
        self.len
    }
    /// Applied, and not acknowledged yet.
    pub(super) fn is_applied(&self) -> bool {
        matches!(self.stage, Stage::Settling(_))
    }
    /// Applied, and so many have not answered that they know of it.
    pub(super) fn unsettled(&self) -> Option<(Ticket, usize)> {
        (self.is_applied() && self.waiting > 0).then_some((self.ticket, self.waiting))
    }
    /// Ended early: what is behind it will not be applied.
    fn is_short(&self) -> bool {
        self.is_applied() && self.applied.upto < self.upto
    }
    pub(super) fn into_fetches(self) -> impl Iterator<Item = Fetch> {
        self.fetches.into_iter()
    }
}

/// A piece that a client was asked for.
pub(super) struct ToRead {
    pub(super) until: Instant,
    ticket: Ticket,
    key: Key,
    piece: Piece,
}

/// Contents that were half fetched when their client went away, the newest last.
#[derive(Default)]
pub(super) struct Parked(VecDeque<Fetch>);

impl Parked {
    /// Keeps it, and names one that is to be forgotten for it.
    pub(super) fn put(&mut self, fetch: Fetch) -> Option<Key> {
        let fetch = fetch.park();
        if !fetch.is_begun() {
            return None;
        }
        self.0.retain(|kept| kept.key != fetch.key);
        self.0.push_back(fetch);
        if self.0.len() > PARKED_MAX { self.0.pop_front().map(|f| f.key) } else { None }
    }
    /// The one that was kept for the same store, or else `fetch` itself.
    pub(super) fn take(&mut self, fetch: Fetch) -> Fetch {
        let at = self.0.iter().position(|kept| kept.key == fetch.key && kept.fid == fetch.fid);
        at.and_then(|at| self.0.remove(at)).unwrap_or(fetch)
    }
}

impl Server {
    /// A batch has come; its records were decoded, and its contents checked ([`super::intake`]).
    pub fn on_batch(
        &mut self,
        conn: ConnId,
        id: u64,
        (after, upto): (Seq, Seq),
        changes: Vec<Change>,
        now: Instant,
    ) {
        let Some(peer) = self.peers.get_mut(&conn) else { return };
        peer.heard(now);
        if peer.state != State::Live || peer.batches.len() >= self.settings.batches_max {
            return self.close(conn, Why::OutOfTurn(20), now);
        }
        let mut last = after;
        for change in &changes {
            if change.seq <= last || change.seq > upto {
                let what = super::intake::BadBatch::Order.to_string();
                return self.close(conn, Why::BadBatch(what), now);
            }
            last = change.seq;
        }
        if self.volumes[peer.volume].dead {
            return self.fail(conn, id, Code::Io, "the server's journal has failed");
        }
        let (no, expected) = (peer.volume, peer.expected);
        if !self.takes_changes(no) {
            return self.fail(conn, id, Code::ReadOnly, "the volume is read-only");
        }
        if after != expected && !is_planted(Fault::PastGap) {
            let what = format!("expected a batch after {}", expected.0);
            return self.fail(conn, id, Code::Gap, &what);
        }
        let len = changes.iter().map(inline_len).sum();
        if self.queue_len + len > self.settings.queue_len_max {
            return self.fail(conn, id, Code::Other, "too much is on its way in");
        }
        let Some(peer) = self.peers.get_mut(&conn) else { return };
        self.queue_len += len;
        let volume = peer.volume;
        peer.expected = upto;
        let node = peer.node;
        let mut touched: Vec<Fid> = changes.iter().flat_map(|c| c.record.op.touched()).collect();
        touched.sort_unstable();
        touched.dedup();
        let made = changes.iter().filter_map(|change| made(&change.record.op)).collect();
        let fetches = changes.iter().filter_map(|change| Fetch::of(node, change));
        let parked = &mut self.volumes[volume].parked;
        let fetches = fetches.map(|fetch| parked.take(fetch)).collect();
        let fresh = self.fresh_batch(id, (after, upto), touched);
        let batch = Batch { changes, fetches, made, len, ..fresh };
        if let Some(peer) = self.peers.get_mut(&conn) {
            peer.batches.push_back(batch);
        }
        self.advance(conn, now);
    }

    fn fresh_batch(&mut self, id: u64, (after, upto): (Seq, Seq), touched: Vec<Fid>) -> Batch {
        self.last_ticket.0 += 1;
        Batch {
            ticket: self.last_ticket,
            id,
            after,
            upto,
            changes: Vec::new(),
            fetches: Vec::new(),
            touched,
            made: Vec::new(),
            stage: Stage::Fetching,
            blankets: 0,
            waiting: 0,
            synced: false,
            applied: Applied::default(),
            len: 0,
            resolve: None,
        }
    }

    /// A decision about a conflict has come; `touched`: what it changes, or why it cannot be carried
    /// out. It goes the way of a batch without records, behind those that came before.
    pub fn on_resolve(
        &mut self,
        conn: ConnId,
        id: u64,
        ask: Resolve,
        touched: Result<Vec<Fid>, Failed>,
        now: Instant,
    ) {
        let Some(peer) = self.peers.get_mut(&conn) else { return };
        peer.heard(now);
        if peer.state != State::Live {
            return self.close(conn, Why::OutOfTurn(63), now);
        }
        let (expected, is_full) = (peer.expected, peer.batches.len() >= self.settings.batches_max);
        let touched = match touched {
            Ok(touched) if touched.len() <= FIDS_MAX => touched,
            Ok(_) => return self.fail(conn, id, Code::Other, "it touches too much"),
            Err(failed) => return self.fail(conn, id, failed.code, &failed.what),
        };
        let no = peer.volume;
        if !self.takes_changes(no) {
            return self.fail(conn, id, Code::ReadOnly, "the volume is read-only");
        }
        let Some(peer) = self.peers.get_mut(&conn) else { return };
        if is_full || self.volumes[peer.volume].dead {
            let what = "the server takes no changes at the moment: try again";
            return self.fail(conn, id, Code::Io, what);
        }
        let fresh = self.fresh_batch(id, (expected, expected), touched);
        let batch = Batch { resolve: Some(Decision::Asked(ask)), ..fresh };
        if let Some(peer) = self.peers.get_mut(&conn) {
            peer.batches.push_back(batch);
        }
        self.advance(conn, now);
    }

    /// A decision was carried out, with this to be said to people; or not, as `applied` says.
    pub fn on_resolved(
        &mut self,
        ticket: Ticket,
        volume: VolumeNo,
        applied: Applied,
        what: String,
        now: Instant,
    ) {
        let conn = self.author(ticket).unwrap_or(ConnId(u32::MAX));
        if let Some(batch) = self.batch(conn, ticket) {
            batch.resolve = Some(Decision::Done(what));
            batch.touched.extend_from_slice(&applied.also);
            batch.touched.sort_unstable();
            batch.touched.dedup();
        }
        self.on_applied(ticket, volume, applied, now);
    }

    /// Takes every batch of the client as far as it can go.
    fn advance(&mut self, conn: ConnId, now: Instant) {
        self.fetch_more(conn, now);
        let Some(peer) = self.peers.get_mut(&conn) else { return };
        let (volume, node) = (peer.volume, peer.node);
        if peer.batches.iter().any(Batch::is_short) {
            return; // it takes those behind it along when it is answered
        }
        let Some(batch) = peer.batches.iter_mut().find(|batch| !batch.is_applied()) else {
            return;
        };
        if batch.stage == Stage::Fetching && batch.fetches.iter().all(Fetch::is_done) {
            batch.stage = Stage::Breaking;
            let (ticket, touched) = (batch.ticket, batch.touched.clone());
            let blankets = self.volumes[volume].promises.blankets();
            let count = match is_planted(Fault::BreakAfterReply) {
                false => self.send_breaks((conn, ticket), volume, &touched, Round::Before, now),
                true => 0,
            };
            if let Some(batch) = self.batch(conn, ticket) {
                (batch.waiting, batch.blankets) = (count, blankets);
            }
        }
        let Some(peer) = self.peers.get_mut(&conn) else { return };
        let Some(batch) = peer.batches.iter_mut().find(|batch| !batch.is_applied()) else {
            return;
        };
        if batch.stage == Stage::Breaking && batch.waiting == 0 {
            batch.stage = Stage::Applying;
            let (ticket, upto) = (batch.ticket, batch.upto);
            let changes = std::mem::take(&mut batch.changes);
            batch.fetches.clear();
            self.effects.push_back(match batch.resolve.take() {
                Some(Decision::Asked(ask)) => Effect::Resolve { volume, ticket, ask },
                _ => Effect::Apply { volume, ticket, node, upto, changes },
            });
        }
    }

    /// Asks for pieces until the window is full, in the order of the batches.
    fn fetch_more(&mut self, conn: ConnId, now: Instant) {
        loop {
            let Some(peer) = self.peers.get_mut(&conn) else { return };
            if peer.reads.len() >= self.settings.window {
                return;
            }
            let next = peer.batches.iter_mut().find_map(|batch| {
                let ticket = batch.ticket;
                batch.fetches.iter_mut().find_map(|f| Some((ticket, f.key, f.fid, f.ask()?)))
            });
            let Some((ticket, key, fid, piece)) = next else { return };
            let read = Read { fid, at: piece.at, len: piece.len, stamp: Stamp(0) };
            let id = self.request(conn, true, read.into());
            let until = now + self.settings.fetch_max;
            if let Some(peer) = self.peers.get_mut(&conn) {
                peer.reads.insert(id, ToRead { until, ticket, key, piece });
            }
            self.due(until);
        }
    }

    pub(super) fn on_data(&mut self, conn: ConnId, id: u64, data: Data, now: Instant) {
        let Some(peer) = self.peers.get_mut(&conn) else { return };
        if !peer.is_stuck {
            peer.moved_at = now;
        }
        let volume = peer.volume;
        let Some(read) = peer.reads.remove(&id) else { return };
        if data.at != read.piece.at || data.bytes.len() > read.piece.len as usize {
            let what = "a piece that was not asked for".to_owned();
            return self.close(conn, Why::BadBatch(what), now);
        }
        let fetch = peer
            .batches
            .iter_mut()
            .find(|batch| batch.ticket == read.ticket)
            .and_then(|batch| batch.fetches.iter_mut().find(|f| f.key == read.key));
        let Some(fetch) = fetch else { return self.advance(conn, now) };
        match fetch.arrived(read.piece, data.token) {
            Arrival::Stale => {}
            Arrival::Restart => self.effects.push_back(Effect::Unspool { volume, key: read.key }),
            Arrival::Keep => {
                let (key, at, bytes) = (read.key, data.at, data.bytes);
                self.effects.push_back(Effect::Spool { volume, key, at, bytes });
            }
        }
        self.advance(conn, now);
    }

    /// The client could not answer a request of ours.
    pub(super) fn on_failed(&mut self, conn: ConnId, id: u64, failed: Failed, now: Instant) {
        let Some(peer) = self.peers.get_mut(&conn) else { return };
        let volume = peer.volume;
        if let Some(read) = peer.reads.remove(&id) {
            let (ticket, key) = (read.ticket, read.key);
            if failed.code == Code::Gone {
                self.effects.push_back(Effect::Unspool { volume, key });
                self.gone(conn, ticket, key);
                self.advance(conn, now);
            } else {
                let what = format!("the client could not send the content: {}", failed.what);
                self.give_up(conn, ticket, (failed.code, &what), now);
            }
        } else {
            // a break that it does not understand: it knows nothing of the objects
            self.on_break_over(conn, id, now);
        }
    }
    fn gone(&mut self, conn: ConnId, ticket: Ticket, key: Key) {
        let Some(batch) = self.batch(conn, ticket) else { return };
        batch.fetches.retain(|fetch| fetch.key != key);
        if let Some(change) = batch.changes.iter_mut().find(|change| change.seq == key.seq) {
            change.content = Content::Gone;
        }
    }
    /// A content could not be kept.
    pub fn on_spool_failed(&mut self, volume: VolumeNo, key: Key, why: (Code, &str), now: Instant) {
        // It may have been the last piece: then what is to be applied next lacks it.
        let lacks = |effect: &Effect| {
            matches!(effect, Effect::Apply { volume: no, node, changes, .. }
                if (*no, *node) == (volume, key.node) && changes.iter().any(|c| c.seq == key.seq))
        };
        let mut ticket = None;
        if let Some(at) = self.effects.iter().position(lacks)
            && let Some(Effect::Apply { ticket: of, changes, .. }) = self.effects.remove(at)
        {
            ticket = Some(of);
            for change in changes.iter().filter(|change| change.content == Content::Spooled) {
                let key = Key { node: key.node, seq: change.seq };
                self.effects.push_back(Effect::Unspool { volume, key });
            }
        }
        let Some(conn) = self.volumes[volume].nodes.get(&key.node).copied() else { return };
        let Some(peer) = self.peers.get(&conn) else { return };
        let of_key = |batch: &&Batch| {
            Some(batch.ticket) == ticket || batch.changes.iter().any(|change| change.seq == key.seq)
        };
        if let Some(batch) = peer.batches.iter().find(of_key) {
            let ticket = batch.ticket;
            self.give_up(conn, ticket, why, now);
        }
    }

    /// A break was answered, or nobody is there any more to answer it.
    pub(super) fn on_break_over(&mut self, conn: ConnId, id: u64, now: Instant) {
        let Some(wait) = self.breaks.remove(&(conn, id)) else { return };
        for (author, ticket) in wait.batches {
            let Some(batch) = self.batch(author, ticket) else {
                self.settle(ticket, now);
                continue;
            };
            batch.waiting = batch.waiting.saturating_sub(1);
            if batch.waiting == 0 {
                self.advance(author, now);
                self.acknowledge(author);
            }
        }
    }

    /// One more knows of a change whose author has left.
    fn settle(&mut self, ticket: Ticket, now: Instant) {
        for volume in &mut self.volumes {
            let Some((_, waiting)) = volume.unsettled.get_mut(&ticket) else { continue };
            *waiting -= 1;
            if *waiting == 0 {
                volume.unsettled.remove(&ticket);
            }
        }
        self.welcome_all(now);
    }

    /// The records of a batch are in the tree and the journal, though not durably.
    pub fn on_applied(&mut self, ticket: Ticket, volume: VolumeNo, applied: Applied, now: Instant) {
        self.volumes[volume].applied += 1;
        let no = self.volumes[volume].applied;
        // the author may have left meanwhile; what it changed is told all the same
        let conn = self.author(ticket).unwrap_or(ConnId(u32::MAX));
        let (mut touched, mut since) = (applied.also.clone(), 0);
        if let Some(batch) = self.batch(conn, ticket) {
            touched.extend_from_slice(&batch.touched);
            since = batch.blankets;
        } else {
            touched.extend(applied.stamps.iter().map(|(fid, _)| *fid));
        }
        touched.sort_unstable();
        touched.dedup();
        let (mut count, mistaken) = (0, is_planted(Fault::BreakAfterReply));
        if !applied.also.is_empty() && !mistaken {
            count += self.send_breaks((conn, ticket), volume, &applied.also, Round::Before, now);
        }
        if !mistaken {
            let round = Round::After { since };
            count += self.send_breaks((conn, ticket), volume, &touched, round, now);
        }
        if let Some(batch) = self.batch(conn, ticket) {
            batch.stage = Stage::Settling(no);
            batch.waiting = count;
            batch.applied = Applied { upto: applied.upto.max(batch.after), ..applied };
            let made = std::mem::take(&mut batch.made);
            let gone = std::mem::take(&mut batch.applied.gone);
            let upto = batch.applied.upto;
            let is_gone: HashSet<Fid> = gone.iter().copied().collect();
            for fid in touched.into_iter().filter(|fid| !is_gone.contains(fid)) {
                // what it changed, it has in its cache
                self.promise(volume, conn, fid);
            }
            self.on_made(volume, conn, (&made, &gone), now);
            if let Some(peer) = self.peers.get_mut(&conn) {
                if upto > peer.applied {
                    (peer.moved_at, peer.applied, peer.is_stuck) = (now, upto, false);
                }
                let node = peer.node;
                self.on_reached(conn, upto, now);
                self.has_come(volume, node, upto, now);
            }
        }
        self.sync(volume);
        self.advance(conn, now);
    }

    fn sync(&mut self, volume: VolumeNo) {
        let of = &mut self.volumes[volume];
        if of.syncing.is_none() {
            of.syncing = Some(of.applied);
            self.effects.push_back(Effect::Sync { volume });
        }
    }
    /// Everything that was applied when the sync began is durable, with the volume at `stamp`; or
    /// it is not, and never will be known to be.
    pub fn on_synced(&mut self, volume: VolumeNo, stamp: Option<Stamp>) {
        let of = &mut self.volumes[volume];
        let Some(covered) = of.syncing.take() else { return };
        match stamp {
            Some(stamp) => of.durable = of.durable.max(stamp),
            None => of.dead = true,
        }
        let (dead, more) = (of.dead, of.applied > covered);
        let ships = |peer: &Peer| peer.volume == volume && !peer.batches.is_empty();
        let here = self.peers.iter().filter(|(_, peer)| ships(peer));
        for conn in here.map(|(conn, _)| *conn).collect::<Vec<_>>() {
            if dead {
                self.give_up_all(conn, "the server's disk has failed");
                continue;
            }
            let Some(peer) = self.peers.get_mut(&conn) else { continue };
            for batch in &mut peer.batches {
                batch.synced |= matches!(batch.stage, Stage::Settling(no) if no <= covered);
            }
            self.acknowledge(conn);
        }
        if more && !dead {
            self.sync(volume);
        }
    }

    /// Answers the batches at the front that are durable and known to everybody.
    fn acknowledge(&mut self, conn: ConnId) {
        loop {
            let Some(peer) = self.peers.get_mut(&conn) else { return };
            let stamp = self.volumes[peer.volume].durable;
            let synced = |b: &Batch| b.synced || is_planted(Fault::UnsyncedAck);
            let done = |b: &Batch| b.is_applied() && synced(b) && b.waiting == 0;
            if !peer.batches.front().is_some_and(done) {
                return;
            }
            let Some(batch) = peer.batches.pop_front() else { return };
            self.queue_len -= batch.len;
            let short = batch.is_short();
            let touched = batch.touched;
            let Applied { upto, stamps, conflicts, failure, .. } = batch.applied;
            let stamps = stamps.into_iter().map(|(fid, stamp)| Stamped { fid, stamp }).collect();
            match (failure, batch.resolve) {
                (Some((code, what)), _) if upto == batch.after => {
                    self.fail(conn, batch.id, code, &what);
                }
                (_, Some(Decision::Done(what))) => {
                    let fids = touched.clone();
                    self.answer(conn, batch.id, Resolved { what, fids }.into());
                }
                _ => {
                    let acked = Acked { upto, stamps, conflicts, stamp };
                    self.answer(conn, batch.id, acked.into());
                }
            }
            if is_planted(Fault::BreakAfterReply) {
                self.break_late(conn, &touched);
            }
            if short {
                self.drop_from(conn, 0, upto);
                return;
            }
        }
    }

    /// What must never be done.
    fn break_late(&mut self, conn: ConnId, touched: &[Fid]) {
        let Some(volume) = self.peers.get(&conn).map(|peer| peer.volume) else { return };
        for (holder, fids) in self.volumes[volume].promises.take(touched, conn, Round::Before) {
            self.request(holder, false, super::message::Break { fids }.into());
        }
    }

    /// A batch cannot be applied: it and all behind it are answered, and must be sent again.
    fn give_up(&mut self, conn: ConnId, ticket: Ticket, (code, what): (Code, &str), now: Instant) {
        let Some(peer) = self.peers.get_mut(&conn) else { return };
        let Some(at) = peer.batches.iter().position(|batch| batch.ticket == ticket) else { return };
        let (id, after) = (peer.batches[at].id, peer.batches[at].after);
        self.fail(conn, id, code, what);
        if let Some(batch) = self.peers.get_mut(&conn).and_then(|peer| peer.batches.remove(at)) {
            self.forget(conn, batch);
        }
        self.drop_from(conn, at, after);
        self.advance(conn, now);
    }
    /// The client goes on after `expected`: the batches from the `at`th on must be sent again.
    fn drop_from(&mut self, conn: ConnId, at: usize, expected: Seq) {
        let Some(peer) = self.peers.get_mut(&conn) else { return };
        (peer.expected, peer.is_stuck) = (expected, true);
        for batch in peer.batches.split_off(at) {
            self.fail(conn, batch.id, Code::Gap, "a batch before it failed");
            self.forget(conn, batch);
        }
    }
    fn give_up_all(&mut self, conn: ConnId, what: &str) {
        let Some(peer) = self.peers.get_mut(&conn) else { return };
        for batch in std::mem::take(&mut peer.batches) {
            self.fail(conn, batch.id, Code::Io, what);
            self.forget(conn, batch);
        }
    }
    /// Gives back what a batch took.
    fn forget(&mut self, conn: ConnId, batch: Batch) {
        self.queue_len -= batch.len;
        let Some(volume) = self.peers.get(&conn).map(|peer| peer.volume) else { return };
        for fetch in batch.fetches {
            self.effects.push_back(Effect::Unspool { volume, key: fetch.key });
        }
    }
    fn batch(&mut self, conn: ConnId, ticket: Ticket) -> Option<&mut Batch> {
        let batches = &mut self.peers.get_mut(&conn)?.batches;
        batches.iter_mut().find(|batch| batch.ticket == ticket)
    }
    fn author(&self, ticket: Ticket) -> Option<ConnId> {
        let has = |peer: &Peer| peer.batches.iter().any(|batch| batch.ticket == ticket);
        self.peers.iter().find(|(_, peer)| has(peer)).map(|(conn, _)| *conn)
    }
}

fn inline_len(change: &Change) -> usize {
    match &change.content {
        Content::Inline(bytes) => bytes.len(),
        _ => 0,
    }
}
