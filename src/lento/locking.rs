//! Locks at the server: whose request waits for which ticket of the table, and whose locks outlive
//! their connection.
//!
//! ```text
//!   LockAsk --granted, refused--> LockAnswer          connection ends --> its waits end at once,
//!      '-- waits --> ... --granted, cancelled--'        its locks are kept for `lock_grace`:
//!                                                       Claim(fresh) --> those that it names stay
//!                                                       silence --> released
//! ```
//!
//! A client that comes back claims what it holds before it asks for more: what it does not name has
//! ended, and so has all that a process held that died with its client. Who can decide about locks
//! alone, by a write permit, must have claimed them here before somebody else's ask is put to
//! [`Server::on_lock`]; the caller sees to that.
//! Absent on purpose: locks do not outlive the server. Clients claim theirs when it is back, and
//! who comes first is not kept waiting for the others.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use super::locks::{Denied, LockAsk, Table, Ticket};
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
}

impl Server {
    /// A client asks for a lock, or after one.
    pub(super) fn on_lock(&mut self, conn: ConnId, id: u64, ask: &LockAsk, now: Instant) {
        let Some(peer) = self.peers.get(&conn) else { return };
        let (no, node) = (peer.volume, peer.node);
        let locking = &mut self.volumes[no].locking;
        if locking.kept.contains_key(&node) || locking.requests.contains_key(&(conn, id)) {
            return self.close(conn, Why::OutOfTurn(44), now); // it claims first, and asks once
        }
        let (why, held) = if ask.test {
            (None, locking.table.test(node, ask))
        } else {
            match locking.table.set(node, ask) {
                Ok(Some(ticket)) => {
                    locking.requests.insert((conn, id), ticket);
                    locking.waits.insert(ticket, (conn, id, ask.fid));
                    return self.tell_locks(no);
                }
                Ok(None) => (None, None),
                Err(why) => (Some(why), None),
            }
        };
        let others = locking.table.has_others(node, ask.fid);
        self.answer(conn, id, LockAnswer { why, held, others }.into());
        self.tell_locks(no);
    }

    /// A client does not wait any more.
    pub(super) fn on_lock_cancel(&mut self, conn: ConnId, cancel: &LockCancel) {
        let Some(peer) = self.peers.get(&conn) else { return };
        let no = peer.volume;
        let locking = &mut self.volumes[no].locking;
        // one that was granted meanwhile is not there: that answer is on its way
        if let Some(ticket) = locking.requests.get(&(conn, cancel.id)) {
            locking.table.cancel(*ticket);
        }
        self.tell_locks(no);
    }

    /// A client says what it holds.
    pub(super) fn on_claim(&mut self, conn: ConnId, id: u64, claim: &Claim, now: Instant) {
        let Some(peer) = self.peers.get(&conn) else { return };
        let (no, node) = (peer.volume, peer.node);
        let locking = &mut self.volumes[no].locking;
        if claim.fresh {
            locking.kept.remove(&node);
        } else if locking.kept.contains_key(&node) {
            return self.close(conn, Why::OutOfTurn(47), now);
        }
        let lost = locking.table.claim(node, claim.fresh, &claim.locks);
        let lost = lost.into_iter().map(|at| at as u32).collect();
        self.answer(conn, id, Claimed { lost }.into());
        self.tell_locks(no);
    }

    /// Objects that other nodes hold locks of, or wait for: whoever gets a write permit over one
    /// of them may not decide about its locks alone.
    pub fn locked_by_others(&self, no: VolumeNo, node: u32) -> Vec<Fid> {
        let table = &self.volumes[no].locking.table;
        table.objects().into_iter().filter(|fid| table.has_others(node, *fid)).collect()
    }

    /// The connection of a node has ended: its waits do, too, and its locks unless it comes back.
    pub(super) fn on_locks_left(&mut self, no: VolumeNo, conn: ConnId, node: u32, now: Instant) {
        let locking = &mut self.volumes[no].locking;
        let all = locking.requests.range((conn, 0)..=(conn, u64::MAX));
        let all: Vec<(u64, Ticket)> = all.map(|((_, id), ticket)| (*id, *ticket)).collect();
        for (id, ticket) in all {
            locking.requests.remove(&(conn, id));
            locking.waits.remove(&ticket);
            locking.table.forget(ticket);
        }
        if locking.table.knows(node) {
            locking.kept.insert(node, now + self.settings.lock_grace);
        }
        self.tell_locks(no);
    }

    /// When the next locks end of a node that did not come back.
    pub(super) fn locks_wake_at(&self) -> Option<Instant> {
        self.volumes.iter().flat_map(|volume| volume.locking.kept.values()).min().copied()
    }

    pub(super) fn wake_locks(&mut self, now: Instant) {
        for no in 0..self.volumes.len() {
            let locking = &mut self.volumes[no].locking;
            let late = locking.kept.extract_if(|_, until| *until <= now);
            let late: Vec<u32> = late.map(|(node, _)| node).collect();
            for node in late {
                locking.table.release_node(node);
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
            let node = self.peers.get(&conn).map_or(0, |peer| peer.node);
            let others = locking.table.has_others(node, fid);
            let why: Option<Denied> = how.err();
            let message: Message = LockAnswer { why, held: None, others }.into();
            self.answer(conn, id, message);
        }
    }
}
