//! Locks of files: who holds what, who waits, and who is next. Pure: no I/O, no clock.
//!
//! Two families that never see each other, as on Linux: flock locks cover a whole object and belong
//! to an open file, fcntl locks cover ranges of bytes and belong to a process. One algorithm serves
//! both: a flock lock is a lock on all bytes. Asks go in by [`Table::set`] and the like, and
//! tickets that were granted or refused come out by [`Table::poll`].
//!
//! - Nobody holds bytes that somebody else writes. Setting, cutting, and joining of ranges are as
//!   fcntl(2) has them; a flock lock that changes its kind is given up first, as flock(2) has it.
//! - Who waits is not overtaken by a conflicting ask that waits too, unless he waits for its owner
//!   himself, over whatever detours: there, being fair would mean that nobody ever goes on.
//!   An ask that does not wait sees only what is held.
//! - No circle of fcntl owners waits for itself: the one who would close it gets [`Denied::Deadlock`].
//!   (Threads of one process count as one, as in Linux.)
//! - A node has at most [`LOCKS_MAX`] locks and [`WAITERS_MAX`] waiting asks.
//!
//! Source: fcntl(2), flock(2), and fs/locks.c of Linux for what they leave open.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use minicbor::{Decode, Encode};

use crate::kml::record::Fid;

/// What a lock allows others.
#[derive(Encode, Decode, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[cbor(index_only)]
pub enum LockKind {
    /// shared: other readers
    #[n(0)]
    Read,
    /// exclusive: nobody
    #[n(1)]
    Write,
    /// asked for only: what is held there ends
    #[n(2)]
    Unlock,
}

/// What an application asks of a lock.
#[derive(Encode, Decode, Clone, PartialEq, Eq, Debug)]
pub struct LockAsk {
    #[n(0)]
    pub fid: Fid,
    /// the kernel's number for who holds it: a process (fcntl), an open file (flock)
    #[n(1)]
    pub owner: u64,
    /// flock, not fcntl: the range is the whole object, whatever it says
    #[n(2)]
    pub flock: bool,
    /// first byte
    #[n(3)]
    pub start: u64,
    /// last byte, inclusive; `u64::MAX`: to the end, wherever that will be
    #[n(4)]
    pub end: u64,
    #[n(5)]
    pub kind: LockKind,
    /// for people, and for `F_GETLK`
    #[n(6)]
    pub pid: u32,
    /// wait until it is granted; else it is granted now or not at all
    #[n(7)]
    pub wait: bool,
    /// only say who is in the way (`F_GETLK`)
    #[n(8)]
    pub test: bool,
}

/// A lock that somebody holds.
#[derive(Encode, Decode, Clone, Copy, PartialEq, Eq, Debug)]
pub struct LockHeld {
    #[n(0)]
    pub kind: LockKind,
    #[n(1)]
    pub start: u64,
    /// inclusive
    #[n(2)]
    pub end: u64,
    /// on the machine of its holder
    #[n(3)]
    pub pid: u32,
}

/// Most locks of one node; all of them fit into one message.
pub const LOCKS_MAX: usize = 8192;
/// Most asks of one node that wait.
pub const WAITERS_MAX: usize = 1024;
/// Setting a range may leave so many locks more: what it cuts out of the middle of one.
const SPLIT_MAX: usize = 2;

/// A lock and where it is: what travels when locks change the table they are in.
#[derive(Encode, Decode, Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lock {
    #[n(0)]
    pub fid: Fid,
    #[n(1)]
    pub owner: u64,
    #[n(2)]
    pub flock: bool,
    #[n(3)]
    pub held: LockHeld,
}

/// Why a lock is not granted.
#[derive(Encode, Decode, Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[cbor(index_only)]
pub enum Denied {
    /// EAGAIN
    #[n(0)]
    #[error("somebody else holds it")]
    Busy,
    /// EDEADLK
    #[n(1)]
    #[error("its holder waits for who asks")]
    Deadlock,
    /// EINTR
    #[n(2)]
    #[error("the wait was ended")]
    Interrupted,
    /// ENOLCK
    #[n(3)]
    #[error("too many locks, or too many that wait")]
    NoRoom,
    /// ENOLCK
    #[n(4)]
    #[error("who decides about it cannot be reached")]
    Away,
    /// EIO
    #[n(5)]
    #[error("a lock of this owner was lost while the server was away")]
    Lost,
}

/// Who holds or asks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Owner {
    pub node: u32,
    pub owner: u64,
    pub flock: bool,
}

/// Names an ask that waits. A later ask has a greater one.
pub type Ticket = u64;

/// One family of one object's locks.
type Key = (Fid, bool);

/// A lock that is held, or asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Span {
    owner: Owner,
    kind: LockKind,
    start: u64,
    end: u64,
    pid: u32,
}

impl Span {
    fn of(node: u32, ask: &LockAsk) -> Span {
        let owner = Owner { node, owner: ask.owner, flock: ask.flock };
        let (start, end) = if ask.flock { (0, u64::MAX) } else { (ask.start, ask.end) };
        Span { owner, kind: ask.kind, start, end, pid: ask.pid }
    }
    fn overlaps(&self, other: &Span) -> bool {
        self.start <= other.end && other.start <= self.end
    }
    /// Overlaps, or is next to it.
    fn touches(&self, other: &Span) -> bool {
        self.start <= other.end.saturating_add(1) && other.start <= self.end.saturating_add(1)
    }
    fn conflicts(&self, other: &Span) -> bool {
        self.owner != other.owner
            && self.overlaps(other)
            && (self.kind == LockKind::Write || other.kind == LockKind::Write)
    }
    fn held(&self) -> LockHeld {
        LockHeld { kind: self.kind, start: self.start, end: self.end, pid: self.pid }
    }
    /// Who acts. `loose`: all that one process does is one, through whatever file it does it.
    fn is_by(&self, other: &Span, loose: bool) -> bool {
        let same_process = self.owner.node == other.owner.node && self.pid == other.pid;
        self.owner == other.owner || (loose && same_process)
    }
}

#[derive(Default)]
struct File {
    held: Vec<Span>,
    queue: BTreeSet<Ticket>,
}

#[derive(Default)]
struct Node {
    lock_count: usize,
    waiting: BTreeSet<Ticket>,
}

/// The locks of a volume.
#[derive(Default)]
pub struct Table {
    files: HashMap<Key, File>,
    waiters: BTreeMap<Ticket, (Key, Span)>,
    nodes: HashMap<u32, Node>,
    last: Ticket,
    ended: VecDeque<(Ticket, Result<(), Denied>)>,
}

impl Table {
    /// Sets or ends a lock: `None` when that is done, else it waits.
    ///
    /// # Errors
    /// [`Denied`]: nothing has changed, but that a flock lock of the other kind is gone.
    pub fn set(&mut self, node: u32, ask: &LockAsk) -> Result<Option<Ticket>, Denied> {
        let (key, want) = ((ask.fid, ask.flock), Span::of(node, ask));
        if want.kind == LockKind::Unlock {
            if self.splits(key, &want) && !self.has_room(node, 1) {
                return Err(Denied::NoRoom);
            }
            self.put(key, want);
            self.settle(vec![key]);
            return Ok(None);
        }
        if ask.flock {
            match self.held(key).iter().find(|held| held.owner == want.owner).copied() {
                Some(held) if held.kind == want.kind => return Ok(None),
                Some(_) => {
                    self.put(key, Span { kind: LockKind::Unlock, ..want });
                    self.settle(vec![key]);
                }
                None => {}
            }
        }
        if !self.has_room(node, SPLIT_MAX) {
            return Err(Denied::NoRoom);
        }
        if self.is_free(key, &want) && !(ask.wait && self.is_behind(key, &want, Ticket::MAX)) {
            self.put(key, want);
            let keys = self.stirred(key, &want);
            self.settle(keys);
            return Ok(None);
        }
        if !ask.wait {
            return Err(Denied::Busy);
        }
        self.enqueue(key, want).map(Some)
    }

    fn enqueue(&mut self, key: Key, want: Span) -> Result<Ticket, Denied> {
        let waiting = &mut self.nodes.entry(want.owner.node).or_default().waiting;
        if waiting.len() >= WAITERS_MAX {
            return Err(Denied::NoRoom);
        }
        self.last += 1;
        let ticket = self.last;
        waiting.insert(ticket);
        self.files.entry(key).or_default().queue.insert(ticket);
        self.waiters.insert(ticket, (key, want));
        if self.is_deadlocked(ticket) {
            self.forget(ticket);
            return Err(Denied::Deadlock);
        }
        let keys = self.stirred(key, &want);
        self.settle(keys);
        Ok(ticket)
    }

    /// The first lock that is in the way of this one.
    pub fn test(&self, node: u32, ask: &LockAsk) -> Option<LockHeld> {
        let want = Span::of(node, ask);
        let held = self.held((ask.fid, ask.flock)).iter();
        held.filter(|held| held.conflicts(&want)).min_by_key(|held| held.start).map(Span::held)
    }

    /// Ends a wait: its ticket comes out as interrupted, unless it has come out already.
    pub fn cancel(&mut self, ticket: Ticket) {
        if let Some(key) = self.dequeue(ticket) {
            self.ended.push_back((ticket, Err(Denied::Interrupted)));
            self.settle(vec![key]);
        }
    }

    /// Ends a wait of which nobody wants to hear any more. False: it does not wait.
    pub fn forget(&mut self, ticket: Ticket) -> bool {
        let Some(key) = self.dequeue(ticket) else { return false };
        self.settle(vec![key]);
        true
    }

    /// Ends all waits for locks of an object, and names them, oldest first.
    pub fn withdraw(&mut self, fid: Fid) -> Vec<Ticket> {
        let mut tickets: Vec<Ticket> =
            [false, true].iter().flat_map(|f| self.queue((fid, *f))).collect();
        tickets.sort_unstable();
        for ticket in &tickets {
            self.dequeue(*ticket);
        }
        tickets
    }

    /// All that a node holds or waits for ends; its tickets do not come out.
    pub fn release_node(&mut self, node: u32) {
        self.release(|owner| owner.node == node);
    }

    /// All that an owner holds or waits for ends, on whatever object; its tickets do not come out.
    pub fn release_owner(&mut self, owner: Owner) {
        self.release(|of| of == owner);
    }

    fn release(&mut self, whose: impl Fn(Owner) -> bool) {
        let waiting = self.waiters.iter().filter(|(_, (_, want))| whose(want.owner));
        let tickets: Vec<Ticket> = waiting.map(|(ticket, _)| *ticket).collect();
        let mut keys: Vec<Key> = tickets.iter().filter_map(|t| self.dequeue(*t)).collect();
        keys.extend(self.strip(whose));
        self.settle(keys);
    }

    /// Takes over locks that a node held before, at another table or over another connection.
    /// `fresh`: whatever else it holds here ends. Names those that somebody else has taken.
    pub fn claim(&mut self, node: u32, fresh: bool, locks: &[Lock]) -> Vec<usize> {
        let mut keys = if fresh { self.strip(|owner| owner.node == node) } else { Vec::new() };
        let mut lost = Vec::new();
        for (at, lock) in locks.iter().enumerate() {
            let owner = Owner { node, owner: lock.owner, flock: lock.flock };
            let LockHeld { kind, start, end, pid } = lock.held;
            let (key, want) = ((lock.fid, lock.flock), Span { owner, kind, start, end, pid });
            if self.has_room(node, 1) && self.is_free(key, &want) {
                self.put(key, want);
                keys.extend(self.stirred(key, &want));
            } else {
                lost.push(at);
            }
        }
        self.settle(keys);
        lost
    }

    /// Whether this is a flock lock that is to become another, or none: then what is held of it
    /// ends, whatever comes of the ask.
    pub fn exchanges(&self, node: u32, ask: &LockAsk) -> bool {
        let want = Span::of(node, ask);
        let other = |held: &Span| held.owner == want.owner && held.kind != want.kind;
        ask.flock && !ask.test && self.held((ask.fid, true)).iter().any(other)
    }

    /// Makes it so, as another table has decided: conflicts and bounds were its matter.
    pub fn note(&mut self, node: u32, ask: &LockAsk) {
        let key = (ask.fid, ask.flock);
        self.put(key, Span::of(node, ask));
        self.settle(vec![key]);
    }

    /// What a node holds of an object.
    pub fn locks(&self, node: u32, fid: Fid) -> Vec<Lock> {
        let both = [false, true].into_iter().flat_map(|flock| self.held((fid, flock)));
        let own = both.filter(|span| span.owner.node == node);
        let lock = |span: &Span| {
            let Owner { owner, flock, .. } = span.owner;
            Lock { fid, owner, flock, held: span.held() }
        };
        own.map(lock).collect()
    }

    /// The objects that locks are held of, or waited for, in ascending order.
    pub fn objects(&self) -> BTreeSet<Fid> {
        self.files.keys().map(|(fid, _)| *fid).collect()
    }

    /// The objects that asks wait for, in ascending order.
    pub fn contended(&self) -> BTreeSet<Fid> {
        self.waiters.values().map(|((fid, _), _)| *fid).collect()
    }

    /// Whether another node holds a lock of the object, or waits for one.
    pub fn has_others(&self, node: u32, fid: Fid) -> bool {
        [(fid, false), (fid, true)].into_iter().any(|key| {
            let waits = |t: Ticket| self.waiters.get(&t).is_some_and(|w| w.1.owner.node != node);
            self.held(key).iter().any(|held| held.owner.node != node) || self.queue(key).any(waits)
        })
    }

    /// Whether another node holds a lock of anything, or waits for one.
    pub fn has_other_nodes(&self, node: u32) -> bool {
        self.nodes.keys().any(|of| *of != node)
    }

    /// Whether the node holds anything, or waits.
    pub fn knows(&self, node: u32) -> bool {
        self.nodes.contains_key(&node)
    }

    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// The next ticket whose wait has ended.
    pub fn poll(&mut self) -> Option<(Ticket, Result<(), Denied>)> {
        self.ended.pop_front()
    }

    // What is held.

    fn held(&self, key: Key) -> &[Span] {
        self.files.get(&key).map_or(&[], |file| &file.held)
    }

    fn queue(&self, key: Key) -> impl Iterator<Item = Ticket> + '_ {
        self.files.get(&key).into_iter().flat_map(|file| file.queue.iter().copied())
    }

    fn has_room(&self, node: u32, more: usize) -> bool {
        self.nodes.get(&node).is_none_or(|node| node.lock_count + more <= LOCKS_MAX)
    }

    fn is_free(&self, key: Key, want: &Span) -> bool {
        !self.held(key).iter().any(|held| held.conflicts(want))
    }

    /// Whether ending it cuts a lock in two.
    fn splits(&self, key: Key, end: &Span) -> bool {
        let cut = |held: &Span| held.start < end.start && end.end < held.end;
        self.held(key).iter().any(|held| held.owner == end.owner && cut(held))
    }

    /// Gives its range to the owner, or takes it: his other locks are cut, and joined.
    fn put(&mut self, key: Key, mut want: Span) {
        let file = self.files.entry(key).or_default();
        let before = file.held.len();
        let mut cut = Vec::new();
        file.held.retain(|held| {
            if held.owner != want.owner {
                return true;
            }
            if held.kind == want.kind && held.touches(&want) {
                want.start = want.start.min(held.start);
                want.end = want.end.max(held.end);
                return false;
            }
            if !held.overlaps(&want) {
                return true;
            }
            if held.start < want.start {
                cut.push(Span { end: want.start - 1, ..*held });
            }
            if held.end > want.end {
                cut.push(Span { start: want.end + 1, ..*held });
            }
            false
        });
        file.held.append(&mut cut);
        if want.kind != LockKind::Unlock {
            file.held.push(want);
        }
        let after = file.held.len();
        let node = self.nodes.entry(want.owner.node).or_default();
        node.lock_count = (node.lock_count + after).saturating_sub(before);
        self.tidy(key, want.owner.node);
    }

    /// Takes everything from these owners, and names the files that this is about.
    fn strip(&mut self, whose: impl Fn(Owner) -> bool) -> Vec<Key> {
        let mut touched = Vec::new();
        for (key, file) in &mut self.files {
            for span in file.held.extract_if(.., |span| whose(span.owner)) {
                touched.push((*key, span.owner.node));
                if let Some(node) = self.nodes.get_mut(&span.owner.node) {
                    node.lock_count = node.lock_count.saturating_sub(1);
                }
            }
        }
        for (key, node) in &touched {
            self.tidy(*key, *node);
        }
        touched.into_iter().map(|(key, _)| key).collect()
    }

    /// Keeps no memory for what is empty.
    fn tidy(&mut self, key: Key, node: u32) {
        if self.files.get(&key).is_some_and(|f| f.held.is_empty() && f.queue.is_empty()) {
            self.files.remove(&key);
        }
        if self.nodes.get(&node).is_some_and(|n| n.lock_count == 0 && n.waiting.is_empty()) {
            self.nodes.remove(&node);
        }
    }

    // Who waits.

    fn dequeue(&mut self, ticket: Ticket) -> Option<Key> {
        let (key, want) = self.waiters.remove(&ticket)?;
        if let Some(file) = self.files.get_mut(&key) {
            file.queue.remove(&ticket);
        }
        if let Some(node) = self.nodes.get_mut(&want.owner.node) {
            node.waiting.remove(&ticket);
        }
        self.tidy(key, want.owner.node);
        Some(key)
    }

    /// What stands in the way of an ask that waits: locks, and unless `held_only` also those who
    /// came before it.
    fn blockers(&self, ticket: Ticket, held_only: bool) -> Vec<Span> {
        let Some((key, want)) = self.waiters.get(&ticket) else { return Vec::new() };
        let held = self.held(*key).iter().copied().filter(|held| held.conflicts(want));
        let before = self.queue(*key).take_while(|t| !held_only && *t < ticket);
        let before = before.filter_map(|t| self.waiters.get(&t).map(|w| w.1));
        held.chain(before.filter(|other| other.conflicts(want))).collect()
    }

    /// What else the one who acts there waits for.
    fn waits_of(&self, who: &Span, loose: bool) -> Vec<Ticket> {
        let waiting = self.nodes.get(&who.owner.node).map(|node| node.waiting.iter().copied());
        let is_his = |t: &Ticket| self.waiters.get(t).is_some_and(|w| w.1.is_by(who, loose));
        waiting.into_iter().flatten().filter(is_his).collect()
    }

    /// All that these tickets wait for, over whatever detours, as far as `stop` lets it go on.
    /// `loose` looks at processes and at who came before, too; else at owners and locks alone.
    fn walk(
        &self,
        from: Vec<Ticket>,
        loose: bool,
        mut stop: impl FnMut(&Span) -> bool,
    ) -> BTreeSet<Ticket> {
        let (mut todo, mut seen) = (from, BTreeSet::new());
        while let Some(ticket) = todo.pop() {
            if !seen.insert(ticket) {
                continue;
            }
            for blocker in self.blockers(ticket, !loose) {
                if stop(&blocker) {
                    return seen;
                }
                todo.extend(self.waits_of(&blocker, loose));
            }
        }
        seen
    }

    fn reaches(&self, from: Ticket, target: &Span, loose: bool) -> bool {
        let mut found = false;
        self.walk(vec![from], loose, |blocker| {
            found |= blocker.is_by(target, loose);
            found
        });
        found
    }

    fn is_deadlocked(&self, ticket: Ticket) -> bool {
        let Some(((_, is_flock), want)) = self.waiters.get(&ticket) else { return false };
        !is_flock && self.reaches(ticket, want, false) // flock(2) knows no EDEADLK
    }

    /// Whether somebody who asked before `ticket` goes first.
    fn is_behind(&self, key: Key, want: &Span, ticket: Ticket) -> bool {
        self.queue(key).take_while(|t| *t < ticket).any(|t| {
            let conflicts = self.waiters.get(&t).is_some_and(|w| w.1.conflicts(want));
            conflicts && !self.reaches(t, want, true)
        })
    }

    /// Where somebody may go on now that this owner got, or waits for, a lock of `key`. There,
    /// since it may be less than he held. And since more depends on him: where he waits, over
    /// whatever detours, the rule of who goes first may let others by now; and a process of
    /// several threads may have closed a circle.
    fn stirred(&mut self, key: Key, who: &Span) -> Vec<Key> {
        for ticket in self.waits_of(who, false) {
            if self.is_deadlocked(ticket)
                && let Some(key) = self.dequeue(ticket)
            {
                self.ended.push_back((ticket, Err(Denied::Deadlock)));
                self.settle(vec![key]);
            }
        }
        let waits = self.walk(self.waits_of(who, true), true, |_| false);
        let there = waits.iter().filter_map(|t| self.waiters.get(t)).map(|w| w.0);
        [key].into_iter().chain(there).collect()
    }

    /// Grants what can be granted in these files, and in those where that matters.
    fn settle(&mut self, mut keys: Vec<Key>) {
        while let Some(key) = keys.pop() {
            for ticket in self.queue(key).collect::<Vec<_>>() {
                let Some((_, want)) = self.waiters.get(&ticket).copied() else { continue };
                if !self.is_free(key, &want) || self.is_behind(key, &want, ticket) {
                    continue;
                }
                self.dequeue(ticket);
                if !self.has_room(want.owner.node, SPLIT_MAX) {
                    self.ended.push_back((ticket, Err(Denied::NoRoom)));
                    continue;
                }
                self.put(key, want);
                self.ended.push_back((ticket, Ok(())));
                keys.extend(self.stirred(key, &want));
            }
        }
    }
}

#[cfg(test)]
mod tests;
