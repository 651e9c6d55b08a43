//! The server's side of reservations: who asks for room, and who is asked to give some back.
//!
//! ```text
//!   RoomAsk --look at the disk--> enough: granted
//!                                 not: everybody else on the disk is asked to give back
//!                                      --all have, or RECALL_MAX--> what there is, `short`
//! ```
//!
//! The figures of the disk are looked at before each decision ([`Effect::Survey`]). What is granted
//! is durable before it is said ([`Effect::SaveGrants`]). The book itself is in ledger.rs, the
//! client's side in asking.rs. No I/O, no clock.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use super::ledger::{DiskId, Holding, Ledger, Saved};
use super::message::{GiveBack, GivenBack, Message, RoomAsk, RoomHeld, RoomTerms, Space};
use super::policy;
use super::promises::ConnId;
use super::room::Room;
use super::server::{Effect, Server, State, VolumeNo};

/// One request for room.
struct Asking {
    conn: ConnId,
    id: u64,
    need: Room,
    ahead: bool,
    /// others were asked, until then
    until: Option<Instant>,
}

/// Reservations of all volumes.
#[derive(Default)]
pub(super) struct Rooms {
    pub(super) book: Ledger,
    /// volumes in the book: all, or none
    count: usize,
    queue: VecDeque<Asking>,
    /// clients that were asked to give back, by request: their disk, and until when
    recalls: BTreeMap<(ConnId, u64), (DiskId, Instant)>,
    /// volumes whose limit has changed: what nobody uses beyond a lower one is to come back
    changed: BTreeSet<VolumeNo>,
}

/// For people: how a volume's room is shared out.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RoomReport {
    pub available: Room,
    pub granted: Room,
    pub quota: Option<Room>,
    /// counted only where there is a quota
    pub used: Room,
    pub holdings: Vec<Holding>,
}

impl Server {
    /// Reserves room in the volume that was added last; for all of them, or for none. `disk`: the
    /// file system that it is on; `saved`: the book of the life before.
    pub fn reserve(&mut self, disk: DiskId, saved: Saved, now: Instant) {
        let no = self.rooms.count;
        self.rooms.book.add_volume(disk, saved, now);
        self.rooms.count += 1;
        self.effects.push_back(Effect::Survey { volume: no });
        self.due_room();
    }
    /// A volume's limit, from now on. What was granted beyond a lower one stays granted; clients are
    /// asked to give back what they do not use of it.
    pub fn set_quota(&mut self, no: VolumeNo, quota: Option<Room>) {
        if no < self.rooms.count {
            self.rooms.book.set_quota(no, quota);
            self.rooms.changed.insert(no);
            self.effects.push_back(Effect::Survey { volume: no });
        }
    }
    pub fn quota(&self, no: VolumeNo) -> Option<Room> {
        (no < self.rooms.count).then(|| self.rooms.book.quota(no)).flatten()
    }
    /// `None`: nothing is reserved in this volume.
    pub fn room_report(&self, no: VolumeNo) -> Option<RoomReport> {
        let book = &self.rooms.book;
        (no < self.rooms.count).then(|| RoomReport {
            available: book.available(no),
            granted: book.outstanding(no),
            quota: book.quota(no),
            used: book.used(no),
            holdings: book.holdings(no),
        })
    }
    /// The answer to `Survey`: what is free for clients on the volume's disk, whoever has it, and
    /// what the volume's files take.
    pub fn on_surveyed(&mut self, no: VolumeNo, free: Room, used: Room, now: Instant) {
        if no < self.rooms.count {
            self.rooms.book.set_free(no, free);
            self.rooms.book.set_used(no, used);
            if self.rooms.changed.remove(&no) && self.rooms.book.is_overdrawn(no) {
                self.recall_room(self.rooms.book.disk(no), None, now);
            }
            self.serve_room(self.rooms.book.disk(no), now);
        }
    }

    /// A client comes, and says what it has.
    pub(super) fn on_room_met(
        &mut self,
        no: VolumeNo,
        node: u32,
        held: Option<&RoomHeld>,
    ) -> Option<RoomTerms> {
        let held = held.filter(|_| no < self.rooms.count)?;
        self.rooms.book.meet(no, node, held);
        self.rooms.book.terms(no, node, false, self.settings.keep_grant)
    }
    pub(super) fn on_room_ask(&mut self, conn: ConnId, id: u64, ask: RoomAsk) {
        let Some((no, node)) = self.account(conn) else {
            return self.fail(conn, id, super::message::Code::Other, "nothing is reserved here");
        };
        self.rooms.book.returned(no, node, &ask.held);
        // one is answered at a time: a client has no reason to send two
        self.rooms.queue.retain(|asking| asking.conn != conn);
        let RoomAsk { need, ahead, .. } = ask;
        self.rooms.queue.push_back(Asking { conn, id, need, ahead, until: None });
        self.effects.push_back(Effect::Survey { volume: no });
    }
    /// A client gave back, asked or by itself. False: it was not asked for that.
    pub(super) fn on_given_back(
        &mut self,
        conn: ConnId,
        id: u64,
        answer: bool,
        given: Option<GivenBack>,
    ) -> bool {
        let Some((no, node)) = self.account(conn) else { return false };
        if answer && self.rooms.recalls.remove(&(conn, id)).is_none() {
            return false;
        }
        if let Some(given) = given {
            self.rooms.book.returned(no, node, &given.held);
        }
        if !self.rooms.queue.is_empty() {
            self.effects.push_back(Effect::Survey { volume: no });
        }
        true
    }
    pub(super) fn on_room_left(&mut self, no: VolumeNo, conn: ConnId, node: u32, now: Instant) {
        if no >= self.rooms.count {
            return;
        }
        self.rooms.queue.retain(|asking| asking.conn != conn);
        self.rooms.recalls.retain(|(of, _), _| *of != conn);
        if !self.volumes[no].nodes.contains_key(&node) {
            self.rooms.book.away(no, node, now);
            self.due_room();
        }
        if !self.rooms.queue.is_empty() {
            self.effects.push_back(Effect::Survey { volume: no });
        }
    }
    fn account(&self, conn: ConnId) -> Option<(VolumeNo, u32)> {
        let peer = self.peers.get(&conn).filter(|peer| peer.state == State::Live)?;
        (peer.volume < self.rooms.count).then_some((peer.volume, peer.node))
    }

    /// Answers whom it can on a disk that was looked at just now.
    fn serve_room(&mut self, disk: DiskId, now: Instant) {
        for mut asking in std::mem::take(&mut self.rooms.queue) {
            let Some((no, node)) = self.account(asking.conn) else { continue };
            if self.rooms.book.disk(no) != disk {
                self.rooms.queue.push_back(asking);
                continue;
            }
            let enough = self.rooms.book.available(no).covers(asking.need);
            if !enough && !asking.ahead && asking.until.is_none() {
                asking.until = Some(now + policy::RECALL_MAX);
                self.recall_room(disk, Some(asking.conn), now);
            }
            let pending = || self.rooms.recalls.values().any(|(of, _)| *of == disk);
            let waits = !enough && asking.until.is_some_and(|until| now < until) && pending();
            if waits {
                self.rooms.queue.push_back(asking);
                continue;
            }
            self.rooms.book.grant(no, node, asking.need, !asking.ahead);
            let keep = self.settings.keep_grant;
            let Some(terms) = self.rooms.book.terms(no, node, !enough, keep) else { continue };
            let (conn, id, message) = (asking.conn, asking.id, Message::from(terms));
            match self.rooms.book.to_save(no) {
                Some(saved) => {
                    let then = (conn, id, message);
                    self.effects.push_back(Effect::SaveGrants { volume: no, saved, then });
                }
                None => self.answer(conn, id, message),
            }
        }
        self.due_room();
    }
    /// Has everybody else on the disk give back what is in no use.
    fn recall_room(&mut self, disk: DiskId, asker: Option<ConnId>, now: Instant) {
        let until = now + policy::RECALL_MAX;
        let holders: Vec<ConnId> = self
            .rooms
            .book
            .holders(disk)
            .filter_map(|(no, node)| self.volumes[no].nodes.get(&node).copied())
            .filter(|conn| Some(*conn) != asker && self.account(*conn).is_some())
            .filter(|conn| !self.rooms.recalls.keys().any(|(of, _)| of == conn))
            .collect();
        for conn in holders {
            let id = self.request(conn, false, GiveBack {}.into());
            self.rooms.recalls.insert((conn, id), (disk, until));
        }
    }

    pub(super) fn room_deadline(&self) -> Option<Instant> {
        let asked = self.rooms.queue.iter().filter_map(|asking| asking.until).min();
        let recall = self.rooms.recalls.values().map(|(_, until)| *until).min();
        let end = self.rooms.book.ends_at(self.settings.keep_grant);
        [asked, recall, end].into_iter().flatten().min()
    }
    fn due_room(&mut self) {
        if let Some(at) = self.room_deadline() {
            self.due(at);
        }
    }
    pub(super) fn wake_room(&mut self, now: Instant) {
        self.rooms.recalls.retain(|_, (_, until)| now < *until);
        let ended = self.rooms.book.end_old(self.settings.keep_grant, now);
        let late = self.rooms.queue.iter().any(|a| a.until.is_some_and(|until| now >= until));
        if ended || late {
            let all = (0..self.rooms.count).map(|volume| Effect::Survey { volume });
            self.effects.extend(all);
        }
    }

    /// What df shows is what can be written: the room that nobody holds. A client adds its own.
    pub(super) fn shown_space(&self, no: VolumeNo, space: Space) -> Space {
        if no >= self.rooms.count || space.block_len == 0 {
            return space;
        }
        let (book, block_len) = (&self.rooms.book, u64::from(space.block_len));
        let left = book.available(no);
        let mut shown = space;
        shown.blocks_available = left.bytes() / block_len;
        shown.files_free = left.files().min(space.files);
        if let Some(quota) = book.quota(no) {
            shown.blocks = shown.blocks.min(quota.bytes() / block_len);
            shown.files = shown.files.min(quota.files());
            shown.files_free = left.files().min(shown.files);
        }
        // Root's reserve is nobody's: `df` counts as used what is neither free nor available.
        shown.blocks_free = shown.blocks_available;
        shown
    }
}

#[cfg(test)]
mod tests;
