//! What this client may still take of the server's room, as its threads share it.
//!
//! ```text
//!   granted    all that the server ever set aside for this client      (the server counts)
//!   returned   all that it ever gave back                               (the client counts)
//!   in_use     charges of operations, open writers, and records that are not acknowledged
//!   free     = granted - returned - in_use
//! ```
//!
//! A [`Charge`] is taken before an operation acts. It is bound to the operation's record, or given
//! back when it is dropped. When its record is acknowledged, the room is in the disk's figures, so
//! the charge goes to `returned` and is never used again. Both counters only grow, so a message that
//! is lost, late or doubled changes nothing.
//!
//! Away from the server a store of all of a file takes over what an earlier one of it has that was
//! not sent: most likely only the later one is shipped, and a program that stores again and again
//! would use up what is granted. If both are shipped in the end, the earlier one gets its room back
//! before it goes out, beyond the grant if need be. With the server there nothing is taken over: what
//! pends is shipped soon, and gives its room back.
//!
//! What must be done at any price (the store of data
//! that are written already) is charged beyond the grant: then nothing is given back until the
//! grant covers it again. Pure: no I/O, no clock.
//! Source: Calypso's reservations; the traps of Lustre's grants.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use super::charge;
use super::faults::{Fault, is_planted};
use super::message::{RoomHeld, RoomTerms};
use super::policy;
use super::room::Room;
use crate::kml::record::{Fid, Record, Seq};

/// What outlives the process. Kept before anybody hears of a larger `returned`.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Kept {
    /// of the server's ledger; 0: none was ever met
    pub epoch: u64,
    pub granted: Room,
    pub returned: Room,
    /// the charges of records up to here are in `returned`
    pub upto: Seq,
    /// how long the server keeps what it grants while we are away; 0: not known
    pub keep_ms: u64,
    /// when it was last there, by the driver's clock on the wall; 0: not known
    pub heard_ns: u64,
}

/// How writes are counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Regime {
    /// nothing is reserved: by choice, or because the server cannot
    Off,
    /// the kernel may write by itself, and what it wrote is counted afterwards
    Ample,
    /// each write is counted before it is done
    Exact,
}

#[derive(Default, Debug)]
struct Inner {
    kept: Kept,
    in_use: Room,
    /// charges of records that are not acknowledged, ascending
    bound: VecDeque<(Seq, Room)>,
    /// of these, the newest store of all of a file
    stores: HashMap<Fid, Seq>,
    /// what later ones took over, by the record that had it
    taken: BTreeMap<Seq, Room>,
    /// records up to here may be on their way
    sent: Seq,
    /// nothing is counted, by choice
    never: bool,
    /// the server counts nothing
    off: bool,
    /// each write is counted before it is done, by choice
    each: bool,
    /// the server has plenty
    ample: bool,
    /// the grant has ended, because the server was away for too long
    ended: bool,
    online: bool,
    /// the server has answered a request for room on this connection
    heard: bool,
    /// away from the server, what is not granted is taken all the same
    optimistic: bool,
}

impl Inner {
    fn is_off(&self) -> bool {
        self.never || self.off
    }
    /// What is not granted is taken all the same.
    fn takes_any(&self) -> bool {
        self.is_off() || (self.optimistic && !self.online)
    }
    fn held(&self) -> Room {
        self.kept.granted.less(self.kept.returned)
    }
    fn free(&self) -> Room {
        if self.ended { Room::NONE } else { self.held().less(self.in_use) }
    }
    /// A record takes its room. Of all of a file, it is most likely shipped instead of the one before.
    fn bind(&mut self, seq: Seq, room: Room, whole: Option<Fid>) {
        bind(&mut self.bound, seq, room);
        let Some(before) = whole.and_then(|fid| self.stores.insert(fid, seq)) else { return };
        if self.online || before <= self.sent {
            return;
        }
        if let Ok(at) = self.bound.binary_search_by_key(&before, |(seq, _)| *seq) {
            let room = std::mem::take(&mut self.bound[at].1);
            self.in_use = self.in_use.less(room);
            self.taken.insert(before, room);
        }
    }
    /// Gives back as much of this as is not needed by what is in use.
    fn give_back(&mut self, room: Room) {
        let spare = self.held().less(self.in_use);
        self.kept.returned = self.kept.returned.plus(room.min(spare));
    }
}

/// For people, and for who asks ahead.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Figures {
    pub granted: Room,
    pub in_use: Room,
    pub free: Room,
    pub regime: Regime,
    /// too little is free to go on for long without asking
    pub is_low: bool,
}

/// A client's room.
#[derive(Default, Debug)]
pub struct Grant(Mutex<Inner>);

impl Grant {
    pub fn new(kept: Kept, optimistic: bool) -> Arc<Grant> {
        Arc::new(Grant(Mutex::new(Inner { kept, optimistic, ..Inner::default() })))
    }
    /// Nothing is reserved, ever.
    pub fn off() -> Arc<Grant> {
        Arc::new(Grant(Mutex::new(Inner { never: true, ..Inner::default() })))
    }
    /// From now on it is as where room is scarce: no write is counted afterwards.
    pub fn count_each(&self) {
        self.inner().each = true;
    }
    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Plain figures: whole after every call.
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes room for what is to be done. `None`: there is not so much.
    pub fn charge(self: &Arc<Grant>, room: Room) -> Option<Charge> {
        if !room.is_none() {
            let mut inner = self.inner();
            if !inner.takes_any() && !inner.free().covers(room) {
                return None;
            }
            inner.in_use = inner.in_use.plus(room);
        }
        Some(Charge { room, grant: self.clone() })
    }
    /// Takes room for what is done already, granted or not.
    pub fn charge_done(self: &Arc<Grant>, room: Room) -> Charge {
        let mut inner = self.inner();
        inner.in_use = inner.in_use.plus(room);
        drop(inner);
        Charge { room, grant: self.clone() }
    }
    /// The record is in the journal since the life before.
    pub fn found(&self, seq: Seq, record: &Record) {
        let mut inner = self.inner();
        if seq <= inner.kept.upto {
            return;
        }
        let room = charge::of(record);
        inner.in_use = inner.in_use.plus(room);
        inner.bind(seq, room, charge::whole(&record.op));
    }
    /// The record goes out now, and needs its room whatever took it over.
    pub fn goes_out(&self, seq: Seq) {
        let mut inner = self.inner();
        let Some(room) = inner.taken.remove(&seq) else { return };
        if let Ok(at) = inner.bound.binary_search_by_key(&seq, |(seq, _)| *seq) {
            inner.bound[at].1 = room;
            inner.in_use = inner.in_use.plus(room);
        }
    }
    /// The server keeps all records up to here, durably.
    pub fn acked(&self, upto: Seq) {
        let mut inner = self.inner();
        while let Some((seq, room)) = inner.bound.pop_front_if(|(seq, _)| *seq <= upto) {
            inner.in_use = inner.in_use.less(room);
            inner.give_back(room);
            inner.kept.upto = inner.kept.upto.max(seq);
        }
        inner.kept.upto = inner.kept.upto.max(upto);
        inner.stores.retain(|_, seq| *seq > upto);
        inner.taken = inner.taken.split_off(&upto.next());
    }
    /// The records up to here are on their way, and need their room until they have arrived.
    pub fn sent(&self, upto: Seq) {
        let mut inner = self.inner();
        inner.sent = inner.sent.max(upto);
        drop(inner);
        if is_planted(Fault::RoomBackEarly) {
            self.acked(upto);
        }
    }

    /// What the server is told first on a new connection. It has told nothing since that was not
    /// heard, so that what it granted beyond this was lost with the connection before.
    pub fn hello(&self) -> Option<RoomHeld> {
        let inner = self.inner();
        let Kept { epoch, granted, returned, .. } = inner.kept;
        // After a power cut what was heard may be forgotten. What is in use was granted.
        let granted = granted.max(returned.plus(inner.in_use)).min(Room::MOST);
        (!inner.never).then_some(RoomHeld { epoch, granted, returned })
    }
    /// The server's first word on a connection: it counts from here.
    pub fn welcome(&self, terms: Option<&RoomTerms>) {
        let mut inner = self.inner();
        (inner.online, inner.ended, inner.off) = (true, false, terms.is_none());
        inner.heard = false;
        let Some(terms) = terms else { return };
        inner.ample = terms.ample;
        let upto = inner.kept.upto;
        let RoomTerms { epoch, granted, returned, .. } = *terms;
        let returned = match epoch == inner.kept.epoch {
            true => inner.kept.returned.max(returned),
            false => returned,
        };
        let (keep_ms, heard_ns) = (terms.keep_ms, inner.kept.heard_ns);
        inner.kept = Kept { epoch, granted, returned, upto, keep_ms, heard_ns };
    }
    /// Whether it is known how the server is off for room.
    pub fn is_heard(&self) -> bool {
        let inner = self.inner();
        inner.heard || !inner.online || inner.is_off()
    }
    /// The server has answered, whatever it was.
    pub fn heard(&self) {
        self.inner().heard = true;
    }
    /// The server's word: it grants so much in all. An older one changes nothing.
    pub fn hear(&self, terms: &RoomTerms) {
        let mut inner = self.inner();
        inner.heard = true;
        if terms.epoch == inner.kept.epoch {
            inner.kept.granted = inner.kept.granted.max(terms.granted);
            inner.ample = terms.ample;
        }
    }
    pub fn away(&self) {
        self.inner().online = false;
    }
    /// The server is there, or was until now.
    pub fn note_there(&self, now_ns: u64) {
        self.inner().kept.heard_ns = now_ns;
    }
    /// The server has been away for longer than it keeps what it grants.
    pub fn end(&self) {
        self.inner().ended = true;
    }
    /// Gives back what is not in use, but for `keep`.
    pub fn give_back_all_but(&self, keep: Room) {
        let mut inner = self.inner();
        let spare = inner.free().less(keep);
        inner.give_back(spare);
    }
    pub fn kept(&self) -> Kept {
        self.inner().kept
    }
    /// What is in use without being granted.
    pub fn lacks(&self) -> Room {
        let inner = self.inner();
        if inner.is_off() { Room::NONE } else { inner.in_use.less(inner.held()) }
    }
    pub fn covers(&self, room: Room) -> bool {
        let inner = self.inner();
        inner.is_off() || inner.free().covers(room)
    }
    pub fn figures(&self) -> Figures {
        let inner = self.inner();
        let free = inner.free();
        let ample = inner.ample && !inner.each && free.bytes() >= policy::AMPLE_LEN;
        let regime = match (inner.is_off(), ample) {
            (true, _) => Regime::Off,
            (false, true) => Regime::Ample,
            (false, false) => Regime::Exact,
        };
        let low = if inner.ample { policy::LOW_AMPLE } else { policy::LOW };
        let is_low = !inner.is_off() && !free.covers(low);
        Figures { granted: inner.held(), in_use: inner.in_use, free, regime, is_low }
    }
    pub fn is_off(&self) -> bool {
        self.inner().is_off()
    }
    /// Whether room is taken whatever was granted.
    pub fn takes_any(&self) -> bool {
        self.inner().takes_any()
    }
}

/// Records may come a little out of order.
fn bind(bound: &mut VecDeque<(Seq, Room)>, seq: Seq, room: Room) {
    let at = bound.iter().rposition(|(other, _)| *other < seq).map_or(0, |at| at + 1);
    bound.insert(at, (seq, room));
}

/// Room that was taken. It cannot be copied; dropped, it is free again.
#[must_use = "dropped, the room is free again"]
pub struct Charge {
    room: Room,
    grant: Arc<Grant>,
}

impl Charge {
    pub fn room(&self) -> Room {
        self.room
    }
    /// The room belongs to this record now, until it is acknowledged. `whole`: the file of which it
    /// stores all.
    pub fn bind(mut self, seq: Seq, whole: Option<Fid>) {
        let room = std::mem::take(&mut self.room);
        if !room.is_none() {
            self.grant.inner().bind(seq, room, whole);
        }
    }
    /// Takes another one in.
    pub fn join(&mut self, mut other: Charge) {
        debug_assert!(Arc::ptr_eq(&self.grant, &other.grant), "room of another client");
        self.room = self.room.plus(std::mem::take(&mut other.room));
    }
    /// Splits off as much of this as there is.
    pub fn take(&mut self, room: Room) -> Charge {
        let room = room.min(self.room);
        self.room = self.room.less(room);
        Charge { room, grant: self.grant.clone() }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if !self.room.is_none() {
            let mut inner = self.grant.inner();
            inner.in_use = inner.in_use.less(self.room);
        }
    }
}

impl std::fmt::Debug for Charge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.room.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kml::record::{Op, Origin, Range, Stamp, Time};

    fn bytes(len: u64) -> Room {
        Room::new(len, 0)
    }
    fn terms(epoch: u64, granted: u64, returned: u64) -> RoomTerms {
        let (granted, returned) = (bytes(granted), bytes(returned));
        RoomTerms { epoch, granted, returned, ample: false, short: false, keep_ms: 1000 }
    }
    fn met(granted: u64) -> Arc<Grant> {
        let grant = Grant::new(Kept::default(), false);
        grant.welcome(Some(&terms(5, granted, 0)));
        grant
    }
    fn free(grant: &Grant) -> u64 {
        grant.figures().free.bytes()
    }

    #[test]
    fn a_charge_is_bound_or_free_again() {
        let grant = met(100);
        assert!(grant.charge(bytes(101)).is_none());
        let mut charge = grant.charge(bytes(60)).unwrap();
        assert!(grant.charge(bytes(41)).is_none());
        let part = charge.take(bytes(10));
        drop(part);
        assert_eq!(free(&grant), 50);
        charge.join(grant.charge(bytes(20)).unwrap());
        charge.bind(Seq(3), None);
        assert_eq!(free(&grant), 30);
        grant.acked(Seq(2));
        assert_eq!((free(&grant), grant.kept().returned), (30, bytes(0)));
        grant.acked(Seq(3));
        assert_eq!((free(&grant), grant.kept().returned), (30, bytes(70)), "used up, not free");
        grant.acked(Seq(3));
        assert_eq!(grant.kept().returned, bytes(70));
    }

    #[test]
    fn records_out_of_order_are_returned_in_order() {
        let grant = met(100);
        for (seq, len) in [(2, 2), (1, 1), (4, 4), (3, 3)] {
            grant.charge(bytes(len)).unwrap().bind(Seq(seq), None);
        }
        for (upto, want) in [(1, 1), (3, 6), (9, 10)] {
            grant.acked(Seq(upto));
            assert_eq!(grant.kept().returned, bytes(want));
        }
    }

    #[test]
    fn what_is_heard_twice_or_late_changes_nothing() {
        let grant = met(10);
        for (epoch, granted, want) in [(5, 30, 30), (5, 30, 30), (5, 20, 30), (4, 90, 30)] {
            grant.hear(&terms(epoch, granted, 0));
            assert_eq!(free(&grant), want);
        }
        // a new ledger counts from its own figures
        grant.welcome(Some(&terms(6, 7, 2)));
        assert_eq!(free(&grant), 5);
        // the same one may have granted more than was heard of, and takes that back
        grant.hear(&terms(6, 50, 2));
        grant.welcome(Some(&terms(6, 40, 2)));
        assert_eq!(free(&grant), 38);
    }

    #[test]
    fn what_is_done_is_charged_beyond_the_grant_and_nothing_given_back_for_it() {
        let grant = met(10);
        grant.charge_done(bytes(25)).bind(Seq(1), None);
        assert_eq!((free(&grant), grant.lacks()), (0, bytes(15)));
        grant.give_back_all_but(Room::NONE);
        assert_eq!(grant.kept().returned, Room::NONE);
        grant.hear(&terms(5, 25, 0));
        assert_eq!((free(&grant), grant.lacks()), (0, bytes(0)));
        grant.charge_done(bytes(5)).bind(Seq(2), None);
        grant.acked(Seq(1));
        // 25 granted, 5 still in use: no more than 20 go back
        assert_eq!((grant.kept().returned, free(&grant)), (bytes(20), 0));
        assert_eq!(grant.hello().unwrap().granted, bytes(25));
    }

    /// A store of all of a file.
    fn store(fid: u64, len: u64) -> Record {
        let (ranges, base) = (vec![Range { at: 0, len }], Stamp(0));
        let (fid, mtime, old_size) = (Fid(fid), Time::default(), 0);
        let op = Op::Store { fid, base, size: len, mtime, ranges, old_size };
        Record { time_ns: 0, origin: Origin::default(), uid: 0, gid: 0, path: vec![], op }
    }

    #[test]
    fn the_next_life_finds_its_charges_in_the_journal() {
        let grant = met(0);
        grant.hear(&RoomTerms { granted: Room::new(1 << 20, 100), ..terms(5, 0, 0) });
        let records = [store(7, 5000), store(8, 9000)];
        for (seq, record) in (1..).zip(&records) {
            grant.charge(charge::of(record)).unwrap().bind(Seq(seq), Some(Fid(6 + seq)));
        }
        grant.acked(Seq(1));
        let next = Grant::new(grant.kept(), false);
        for (seq, record) in (1..).zip(&records) {
            next.found(Seq(seq), record); // the journal's cursor may be behind
        }
        assert_eq!((free(&next), next.kept()), (free(&grant), grant.kept()));
        assert_eq!(next.kept().returned, charge::of(&records[0]));
    }

    #[test]
    fn away_from_the_server_a_file_that_is_stored_again_and_again_takes_its_room_once() {
        let grant = met(0);
        grant.hear(&RoomTerms { granted: Room::new(1 << 20, 100), ..terms(5, 0, 0) });
        let room = charge::of(&store(7, 5000));
        let store_at = |seq: u64| {
            grant.charge(room).unwrap().bind(Seq(seq), Some(Fid(7)));
            grant.figures().in_use
        };
        let times = |n: u64| (0..n).map(|_| room).sum::<Room>();
        assert_eq!([store_at(1), store_at(2)], [times(1), times(2)], "both may be shipped");
        grant.away();
        assert_eq!([store_at(3), store_at(4)], [times(2), times(2)], "the last of them, and one");
        // a store that comes to nothing leaves the one before its room
        drop(grant.charge(room).unwrap());
        assert_eq!(grant.figures().in_use, times(2));
        // found in the journal, the newest has its room
        let next = Grant::new(grant.kept(), false);
        (1..=4).for_each(|seq| next.found(Seq(seq), &store(7, 5000)));
        assert_eq!(next.figures().in_use, times(1));
        // the server is back, and two of those that took over are shipped after all
        grant.goes_out(Seq(3));
        assert_eq!(grant.figures().in_use, times(3));
        grant.goes_out(Seq(3));
        grant.goes_out(Seq(4));
        assert_eq!(grant.figures().in_use, times(3), "once, and only what it had");
        grant.sent(Seq(4));
        assert_eq!(store_at(5), times(4), "the one that is on its way keeps its own");
        grant.acked(Seq(5));
        assert_eq!((grant.figures().in_use, grant.kept().returned), (Room::NONE, times(4)));
        assert!(grant.inner().taken.is_empty());
    }

    #[test]
    fn without_a_ledger_nothing_is_counted_and_an_ended_grant_is_empty() {
        let grant = met(10);
        grant.end();
        assert!(grant.charge(bytes(1)).is_none());
        grant.welcome(None);
        assert!(grant.charge(bytes(1 << 40)).is_some());
        assert_eq!(grant.figures().regime, Regime::Off);
        assert_eq!(Grant::off().hello(), None);
        let counting = met(1 << 30);
        counting.hear(&RoomTerms { ample: true, ..terms(5, 1 << 30, 0) });
        assert_eq!(counting.figures().regime, Regime::Ample);
        counting.count_each();
        assert_eq!(counting.figures().regime, Regime::Exact);
        let optimist = Grant::new(Kept::default(), true);
        assert!(optimist.charge(bytes(7)).is_some(), "away from the server");
        optimist.welcome(Some(&terms(1, 5, 0)));
        assert!(optimist.charge(bytes(7)).is_none());
    }
}
