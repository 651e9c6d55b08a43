//! Locks at the server: whose request waits for which ticket of the table, and whose locks outlive
//! their connection.
//!
//! ```text
//!   LockAsk --recall of who may decide alone--> table --granted, refused--> LockAnswer
//!                                                 '-- waits --> ... --granted, cancelled--'
//!   connection ends --> its waits end at once, its locks are kept for `lock_grace`
//!   Hello(locks) --> nobody else gets a lock before this client's Claim(fresh): those that it names
//!                    stay (or were taken meanwhile), others that it had have ended
//! ```
//!
//! Who may change an object decides about its locks alone, once it was told that nobody else has
//! any. So an ask of somebody else has that right recalled, and the holder claims its locks before
//! it lets go; unless the table has a lock in the way, for then nobody decides alone. The whole
//! volume is given to nobody while others have locks.
//! Absent on purpose: locks do not outlive the server. Clients claim theirs when it is back; until
//! then the ghosts of those clients (permits.rs) keep others' asks waiting.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use super::locks::{Denied, LockAsk, LockKind, Table, Ticket, WAITERS_MAX};
use super::message::{Claim, Claimed, LockAnswer, LockCancel, Message};
use super::promises::ConnId;
use super::server::{Server, VolumeNo, Why};
use crate::kml::record::Fid;

/// A volume's locks, and who waits for an answer.
#[derive(Default)]
pub(super) struct Locking {
    pub(super) table: Table,
    /// requests that wait, both ways
    requests: BTreeMap<(ConnId, u64), Ticket>,
    waits: HashMap<Ticket, (ConnId, u64, Fid)>,
    /// nodes without a connection that claims their locks, and until when that can be made good
    kept: HashMap<u32, Instant>,
    /// nodes that are here, and have said that they have locks to claim
    claiming: HashMap<u32, Instant>,
    /// asks that wait for that, in order
    held_back: Vec<(ConnId, u64, LockAsk)>,
}

impl Locking {
    /// Whether no other node has locks, or may have.
    pub(super) fn has_only(&self, node: u32) -> bool {
        !self.table.has_other_nodes(node) && self.claiming.keys().all(|of| *of == node)
    }
}

impl Server {
    /// A client asks for a lock, or after one.
    pub(super) fn on_lock(&mut self, conn: ConnId, id: u64, ask: LockAsk, now: Instant) {
        let Some(peer) = self.peers.get(&conn) else { return };
        let (no, node) = (peer.volume, peer.node);
        let locking = &self.volumes[no].locking;
        if locking.kept.contains_key(&node) || locking.requests.contains_key(&(conn, id)) {
            return self.close(conn, Why::OutOfTurn(44), now); // it claims first, and asks once
        }
        let decided = ask.kind == LockKind::Unlock || locking.table.test(node, &ask).is_some();
        let fid = ask.fid;
        let request = Message::LockAsk(ask);
        if decided || self.may_answer(conn, id, (&request, &[fid]), now) {
            self.decide_lock(conn, id, request, now);
        }
    }

    /// Nobody can decide about it alone any more: the table does.
    pub(super) fn decide_lock(&mut self, conn: ConnId, id: u64, request: Message, now: Instant) {
        let Some(peer) = self.peers.get(&conn) else { return };
        let (no, node) = (peer.volume, peer.node);
        let ask = match request {
            Message::LockAsk(ask) => ask,
            Message::Claim(claim) => return self.decide_claim((conn, id), node, &claim, now),
            _ => return,
        };
        let locking = &mut self.volumes[no].locking;
        let late = locking.claiming.contains_key(&node) || ask.kind != LockKind::Unlock;
        if late && !locking.claiming.is_empty() {
            let all = &mut locking.held_back;
            if all.iter().filter(|(of, ..)| *of == conn).count() < 2 * WAITERS_MAX {
                return all.push((conn, id, ask));
            }
            return self.answer_lock(no, (conn, id, ask.fid), Some(Denied::NoRoom));
        }
        // Answers go out in the order in which the table changed: clients note it by them.
        self.tell_locks(no);
        let locking = &mut self.volumes[no].locking;
        if ask.test {
            let held = locking.table.test(node, &ask);
            let others = locking.table.has_others(node, ask.fid);
            return self.answer(conn, id, LockAnswer { why: None, held, others }.into());
        }
        match locking.table.set(node, &ask) {
            Ok(Some(ticket)) => {
                locking.requests.insert((conn, id), ticket);
                locking.waits.insert(ticket, (conn, id, ask.fid));
            }
            how => self.answer_lock(no, (conn, id, ask.fid), how.err()),
        }
        self.tell_locks(no);
    }

    fn answer_lock(
        &mut self,
        no: VolumeNo,
        (conn, id, fid): (ConnId, u64, Fid),
        why: Option<Denied>,
    ) {
        let node = self.peers.get(&conn).map_or(0, |peer| peer.node);
        let others = self.volumes[no].locking.table.has_others(node, fid);
        self.answer(conn, id, LockAnswer { why, held: None, others }.into());
    }

    /// A client does not wait any more.
    pub(super) fn on_lock_cancel(&mut self, conn: ConnId, cancel: &LockCancel, now: Instant) {
        let Some(peer) = self.peers.get(&conn) else { return };
        let (no, node, id) = (peer.volume, peer.node, cancel.id);
        let volume = &mut self.volumes[no];
        let locking = &mut volume.locking;
        if let Some(ticket) = locking.requests.get(&(conn, id)) {
            locking.table.cancel(*ticket);
            return self.tell_locks(no);
        }
        let back = locking.held_back.iter().position(|(of, no, _)| (*of, *no) == (conn, id));
        let ask = match back {
            Some(at) => Some(Message::LockAsk(locking.held_back.remove(at).2)),
            None => volume.permits.withdraw_lock(conn, id),
        };
        // one that was granted meanwhile is nowhere: that answer is on its way
        if let Some(Message::LockAsk(ask)) = ask {
            let locking = &mut self.volumes[no].locking;
            if locking.table.exchanges(node, &ask) {
                // as if it had come to the table
                locking.table.note(node, &LockAsk { kind: LockKind::Unlock, ..ask.clone() });
                self.tell_locks(no);
            }
            self.answer_lock(no, (conn, id, ask.fid), Some(Denied::Interrupted));
            self.pump(no, now);
        }
    }

    /// A client says what it holds. Who came back late may find that others decide alone by now.
    pub(super) fn on_claim(&mut self, conn: ConnId, id: u64, claim: Claim, now: Instant) {
        let Some(peer) = self.peers.get(&conn) else { return };
        let (no, node) = (peer.volume, peer.node);
        let until = now + 2 * self.settings.lock_grace;
        self.due(until);
        let locking = &mut self.volumes[no].locking;
        if claim.fresh {
            locking.kept.remove(&node);
            locking.claiming.insert(node, until);
        } else if locking.kept.contains_key(&node) {
            return self.close(conn, Why::OutOfTurn(47), now);
        }
        let mut fids: Vec<Fid> = claim.locks.iter().map(|lock| lock.fid).collect();
        fids.dedup();
        let at = (no, conn, node, id);
        if let Some(Message::Claim(claim)) = self.unless_written(at, fids, claim.into(), now) {
            self.decide_claim((conn, id), node, &claim, now);
        }
    }

    fn decide_claim(&mut self, at: (ConnId, u64), node: u32, claim: &Claim, now: Instant) {
        let Some(no) = self.peers.get(&at.0).map(|peer| peer.volume) else { return };
        let locking = &mut self.volumes[no].locking;
        let lost = locking.table.claim(node, claim.fresh, &claim.locks);
        let lost = lost.into_iter().map(|at| at as u32).collect();
        self.answer(at.0, at.1, Claimed { lost }.into());
        self.end_claiming(no, node, now);
        self.tell_locks(no);
    }

    fn end_claiming(&mut self, no: VolumeNo, node: u32, now: Instant) {
        let locking = &mut self.volumes[no].locking;
        locking.claiming.remove(&node);
        if locking.claiming.is_empty() {
            for (conn, id, ask) in std::mem::take(&mut locking.held_back) {
                self.on_lock(conn, id, ask, now); // by now, somebody may decide alone again
            }
        }
    }

    /// A client has come that has locks to claim.
    pub(super) fn on_locks_met(&mut self, no: VolumeNo, node: u32, now: Instant) {
        let until = now + self.settings.lock_grace;
        self.due(until);
        self.volumes[no].locking.claiming.insert(node, until);
    }

    /// The connection of a node has ended: its waits do, too, and its locks unless it comes back.
    pub(super) fn on_locks_left(&mut self, no: VolumeNo, conn: ConnId, node: u32, now: Instant) {
        let until = now + self.settings.lock_grace;
        self.due(until);
        let volume = &mut self.volumes[no];
        let is_back = volume.nodes.contains_key(&node);
        let locking = &mut volume.locking;
        let all = locking.requests.range((conn, 0)..=(conn, u64::MAX));
        let all: Vec<(u64, Ticket)> = all.map(|((_, id), ticket)| (*id, *ticket)).collect();
        for (id, ticket) in all {
            locking.requests.remove(&(conn, id));
            locking.waits.remove(&ticket);
            locking.table.forget(ticket);
        }
        locking.held_back.retain(|(of, ..)| *of != conn);
        if locking.table.knows(node) {
            locking.kept.insert(node, until);
        }
        if !is_back {
            self.end_claiming(no, node, now);
        }
        self.tell_locks(no);
    }

    /// The client leaves for good, and nothing that it held outlives it.
    pub(super) fn on_locks_farewell(&mut self, conn: ConnId) {
        let Some(peer) = self.peers.get(&conn) else { return };
        let (no, node) = (peer.volume, peer.node);
        self.volumes[no].locking.table.release_node(node);
        self.tell_locks(no);
    }

    /// When somebody's time ends to say what it holds.
    pub(super) fn locks_wake_at(&self) -> Option<Instant> {
        let locking = self.volumes.iter().map(|volume| &volume.locking);
        locking.flat_map(|of| of.kept.values().chain(of.claiming.values())).min().copied()
    }

    pub(super) fn wake_locks(&mut self, now: Instant) {
        for no in 0..self.volumes.len() {
            let locking = &mut self.volumes[no].locking;
            let late = locking.kept.extract_if(|_, until| *until <= now);
            let late: Vec<u32> = late.map(|(node, _)| node).collect();
            for node in late {
                locking.table.release_node(node);
            }
            let silent = locking.claiming.iter().filter(|(_, until)| **until <= now);
            let silent: Vec<u32> = silent.map(|(node, _)| *node).collect();
            for node in silent {
                self.end_claiming(no, node, now);
            }
            self.tell_locks(no);
        }
    }

    /// Answers those whose wait has ended.
    fn tell_locks(&mut self, no: VolumeNo) {
        loop {
            let locking = &mut self.volumes[no].locking;
            let Some((ticket, how)) = locking.table.poll() else { return };
            let Some((conn, id, fid)) = locking.waits.remove(&ticket) else { continue };
            locking.requests.remove(&(conn, id));
            self.answer_lock(no, (conn, id, fid), how.err());
        }
    }
}
