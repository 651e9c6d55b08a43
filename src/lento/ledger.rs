//! The server's book of room: what is on the disks, and what was promised of it to whom.
//!
//! ```text
//!   available(volume) = min(free on its disk - what all volumes there have granted,
//!                           quota - used - what the volume has granted)
//!   outstanding(node) = granted - returned          both only grow (grant.rs)
//! ```
//!
//! Nothing is granted beyond what is available: so used + outstanding <= capacity at each grant, and
//! a record whose charge was granted finds its room. What is granted to a node must be durable before
//! the node hears of it: it is saved ahead, so that this is rare ([`Ledger::to_save`]). The next life
//! begins with the saved figures, which are larger; a node that comes says how much it had heard.
//! A node that stays away for too long loses its grant, and with it its epoch.
//! Pure: no I/O, no clock. What is free and used its owner says.
//! Source: Calypso; Lustre's grants for what goes wrong (quotas that they ignore, resends).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::faults::{Fault, is_planted};
use super::message::{RoomHeld, RoomTerms};
use super::policy;
use super::room::Room;

/// Volumes on one file system share its room: its number tells which.
pub type DiskId = u64;

/// One node as it is kept for the next life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SavedNode {
    pub node: u32,
    pub epoch: u64,
    pub granted: Room,
    pub returned: Room,
}

/// A volume's book as it is kept for the next life.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Saved {
    /// given to the next node that begins anew; the first one is random and not 0
    pub epoch_next: u64,
    pub nodes: Vec<SavedNode>,
}

/// For people: what one node holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Holding {
    pub node: u32,
    pub outstanding: Room,
    pub away: bool,
}

struct Entry {
    epoch: u64,
    granted: Room,
    returned: Room,
    /// at least `granted` once it was heard of
    saved: Room,
    /// since then it is not connected
    away_since: Option<Instant>,
}

impl Entry {
    fn outstanding(&self) -> Room {
        self.granted.less(self.returned)
    }
}

struct Account {
    disk: DiskId,
    quota: Option<Room>,
    /// by the volume's files; counted only where there is a quota
    used: Room,
    epoch_next: u64,
    nodes: BTreeMap<u32, Entry>,
}

impl Account {
    fn outstanding(&self) -> Room {
        self.nodes.values().map(Entry::outstanding).sum()
    }
}

/// The book of all volumes, which are named by their places.
#[derive(Default)]
pub struct Ledger {
    /// what is free for clients on each disk
    disks: BTreeMap<DiskId, Room>,
    accounts: Vec<Account>,
}

impl Ledger {
    /// The next volume. Whoever had a grant in the life before is away `now`.
    pub fn add_volume(&mut self, disk: DiskId, saved: Saved, now: Instant) {
        let entry = |node: SavedNode| {
            let SavedNode { node, epoch, granted, returned } = node;
            let away_since = Some(now);
            (node, Entry { epoch, granted, returned, saved: granted, away_since })
        };
        let nodes = match is_planted(Fault::RoomForgotten) {
            true => BTreeMap::new(),
            false => saved.nodes.into_iter().map(entry).collect(),
        };
        self.disks.entry(disk).or_default();
        let (quota, used, epoch_next) = (None, Room::NONE, saved.epoch_next.max(1));
        self.accounts.push(Account { disk, quota, used, epoch_next, nodes });
    }
    /// The volume is not served any more: its room is everybody's. What was granted stands in the book
    /// that was saved, for the day when it is served again.
    pub fn remove_volume(&mut self, no: usize) {
        let Some(account) = self.accounts.get_mut(no) else { return };
        (account.quota, account.used) = (None, Room::NONE);
        account.nodes.clear();
    }
    pub fn disk(&self, no: usize) -> DiskId {
        self.accounts[no].disk
    }
    /// So much of the disk is free for clients, whoever has it.
    pub fn set_free(&mut self, no: usize, free: Room) {
        let disk = self.accounts[no].disk;
        self.disks.insert(disk, free);
    }
    /// `None`: no limit but the disk.
    pub fn set_quota(&mut self, no: usize, quota: Option<Room>) {
        self.accounts[no].quota = quota;
    }
    pub fn quota(&self, no: usize) -> Option<Room> {
        self.accounts[no].quota
    }
    pub fn set_used(&mut self, no: usize, used: Room) {
        self.accounts[no].used = used;
    }
    pub fn used(&self, no: usize) -> Room {
        self.accounts[no].used
    }
    /// Whether more is used and granted than the volume's limit allows, as it was lowered.
    pub fn is_overdrawn(&self, no: usize) -> bool {
        let account = &self.accounts[no];
        let taken = account.used.plus(account.outstanding());
        account.quota.is_some_and(|quota| !quota.covers(taken))
    }
    /// What can still be granted.
    pub fn available(&self, no: usize) -> Room {
        let account = &self.accounts[no];
        let on_disk = self.accounts.iter().filter(|other| other.disk == account.disk);
        let taken = on_disk.map(Account::outstanding).sum();
        let left = self.disks.get(&account.disk).copied().unwrap_or_default().less(taken);
        match account.quota {
            Some(quota) if !is_planted(Fault::QuotaIgnored) => {
                left.min(quota.less(account.used).less(account.outstanding()))
            }
            _ => left,
        }
    }
    /// What the volume's nodes hold of it.
    pub fn outstanding(&self, no: usize) -> Room {
        self.accounts[no].outstanding()
    }
    /// Who on the volume's disk holds anything, by volume.
    pub fn holders(&self, disk: DiskId) -> impl Iterator<Item = (usize, u32)> + '_ {
        let on_disk = self.accounts.iter().enumerate().filter(move |(_, of)| of.disk == disk);
        on_disk.flat_map(|(no, of)| {
            let has = |(_, entry): &(&u32, &Entry)| !entry.outstanding().is_none();
            of.nodes.iter().filter(has).map(move |(node, _)| (no, *node))
        })
    }
    pub fn holdings(&self, no: usize) -> Vec<Holding> {
        let nodes = self.accounts[no].nodes.iter();
        let holding = |(node, entry): (&u32, &Entry)| Holding {
            node: *node,
            outstanding: entry.outstanding(),
            away: entry.away_since.is_some(),
        };
        nodes.map(holding).filter(|held| !held.outstanding.is_none()).collect()
    }

    /// A node is there, and says what it knows. What was granted beyond that never reached it: the
    /// connection on which it could still arrive is gone.
    pub fn meet(&mut self, no: usize, node: u32, held: &RoomHeld) {
        let account = &mut self.accounts[no];
        match account.nodes.get_mut(&node) {
            Some(entry) if entry.epoch == held.epoch => {
                entry.away_since = None;
                entry.returned = entry.returned.max(held.returned);
                entry.granted = entry.granted.min(held.granted).max(entry.returned);
                entry.saved = entry.saved.max(entry.granted);
            }
            // It begins anew, and asks for what it needs; what it had is in no use any more.
            _ => {
                let (granted, returned, saved) = (Room::NONE, Room::NONE, Room::NONE);
                let epoch = account.epoch_next;
                account.epoch_next = account.epoch_next.wrapping_add(1).max(1);
                let away_since = None;
                account.nodes.insert(node, Entry { epoch, granted, returned, saved, away_since });
            }
        }
    }
    /// The node's own word of what it gave back. An older word, or one of another epoch, changes
    /// nothing.
    pub fn returned(&mut self, no: usize, node: u32, held: &RoomHeld) {
        let Some(entry) = self.accounts[no].nodes.get_mut(&node) else { return };
        if entry.epoch != held.epoch {
            return;
        }
        if is_planted(Fault::RoomTwice) && held.returned == entry.returned {
            entry.returned = entry.returned.plus(held.returned).min(entry.granted);
        }
        // more than it was granted nobody can give back
        entry.returned = entry.returned.max(held.returned).min(entry.granted.max(entry.returned));
    }
    /// Grants what a node needs and, where there is much, more. False when there is not so much:
    /// then it gets what there is if `partly`, and else nothing.
    pub fn grant(&mut self, no: usize, node: u32, need: Room, partly: bool) -> bool {
        let left = self.available(no);
        let enough = left.covers(need);
        let room = match (enough, partly) {
            (true, _) => need.plus(policy::ahead(left.less(need))),
            (false, true) => need.min(left),
            (false, false) => Room::NONE,
        };
        let Some(entry) = self.accounts[no].nodes.get_mut(&node) else { return false };
        entry.granted = entry.granted.plus(room);
        debug_assert!(left.covers(room), "granted beyond what is there");
        enough
    }
    /// What the node is told.
    pub fn terms(&self, no: usize, node: u32, short: bool, keep: Duration) -> Option<RoomTerms> {
        let entry = self.accounts[no].nodes.get(&node)?;
        let Entry { epoch, granted, returned, .. } = *entry;
        let ample = policy::is_ample(self.available(no));
        let keep_ms = u64::try_from(keep.as_millis()).unwrap_or(u64::MAX);
        Some(RoomTerms { epoch, granted, returned, ample, short, keep_ms })
    }
    /// What must be durable before a node hears what it was granted; `None`: it is already.
    pub fn to_save(&mut self, no: usize) -> Option<Saved> {
        let left = self.available(no);
        let account = &mut self.accounts[no];
        if account.nodes.values().all(|entry| entry.saved.covers(entry.granted)) {
            return None;
        }
        for entry in account.nodes.values_mut().filter(|e| !e.saved.covers(e.granted)) {
            entry.saved = entry.granted.plus(policy::ahead(left).part(2));
        }
        Some(self.save(no))
    }
    /// The book as it is.
    pub fn save(&self, no: usize) -> Saved {
        let account = &self.accounts[no];
        let node = |(node, entry): (&u32, &Entry)| {
            let Entry { epoch, returned, saved, .. } = *entry;
            SavedNode { node: *node, epoch, granted: saved, returned }
        };
        let nodes = account.nodes.iter().map(node).collect();
        Saved { epoch_next: account.epoch_next, nodes }
    }
    /// The connection is gone; the grant stays.
    pub fn away(&mut self, no: usize, node: u32, now: Instant) {
        if let Some(entry) = self.accounts[no].nodes.get_mut(&node) {
            entry.away_since = Some(now);
        }
    }
    /// Ends the grants of nodes that have been away for so long. True: some were.
    pub fn end_old(&mut self, keep: Duration, now: Instant) -> bool {
        let is_old = |entry: &Entry| {
            entry.away_since.is_some_and(|since| now.saturating_duration_since(since) >= keep)
        };
        let mut any = false;
        for account in &mut self.accounts {
            let before = account.nodes.len();
            account.nodes.retain(|_, entry| !is_old(entry));
            any |= account.nodes.len() < before;
        }
        any
    }
    /// When the first such grant ends.
    pub fn ends_at(&self, keep: Duration) -> Option<Instant> {
        let entries = self.accounts.iter().flat_map(|account| account.nodes.values());
        let ends = entries.filter_map(|entry| entry.away_since?.checked_add(keep));
        ends.min()
    }
}

#[cfg(test)]
mod tests;
