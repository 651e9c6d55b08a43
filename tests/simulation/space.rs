//! Room in the simulation: a disk that each record takes its part of, and clients that reserve it.
//!
//! The machines and the books are real; a record takes of the disk what it was charged, and nothing
//! ever becomes free, so that histories run into the end of the disk, or of the quota. At every step
//! what is used and what clients hold beside it is on the disk; no record lacks room; and in the end
//! the clients and the server have the same figures.

use std::collections::BTreeMap;
use std::sync::Arc;

use imz::kml::record::{Fid, Op, Range, Seq};
use imz::lento::charge;
use imz::lento::grant::{Charge, Grant, Kept};
use imz::lento::intake::Change;
use imz::lento::ledger::Saved;
use imz::lento::room::Room as Figure;
use imz::lento::server::Server as Machine;

use crate::cache::Entry;
use crate::plan::{Plan, SECOND};
use crate::volume::Volume;
use crate::world::{Ctx, World};

/// Longer than any path of a history.
const PATH_LEN: u64 = 128;
/// With what a violation begins.
const MARK: &str = "room: ";

fn of(op: &Op) -> Figure {
    charge::of_op(op, PATH_LEN)
}

/// All files are smaller than a block.
fn of_store() -> Figure {
    charge::of_store(&[Range { at: 0, len: 1 }], PATH_LEN)
}

fn of_entry(entry: &Entry) -> Figure {
    match &entry.record.op {
        Op::Store { .. } => of_store(),
        op => of(op),
    }
}

/// A client's room.
#[derive(Default)]
pub struct Room {
    grant: Option<Arc<Grant>>,
    /// as it was written down
    kept: Kept,
    /// of the operation that is about to be journaled
    next: Option<Charge>,
    /// of files that are open
    writers: BTreeMap<Fid, Charge>,
    /// of the next file that is made
    new: Option<Charge>,
    /// something was stored without a charge, as a new life does with what was open in the last one
    forced: bool,
    /// what was in the journal when the machine had lost its power, and its figures were old
    anew: Figure,
    /// what records took beyond what was granted: so far, and of those not acknowledged
    unpaid: (Figure, Figure),
}

impl Room {
    fn take(&self, room: Figure) -> Result<Option<Charge>, Figure> {
        match &self.grant {
            None => Ok(None),
            Some(grant) => grant.charge(room).map(Some).ok_or(room),
        }
    }
    pub fn charge(&mut self, op: &Op) -> Result<(), Figure> {
        self.next = self.take(of(op))?;
        Ok(())
    }
    /// A file is made, and written to at once.
    pub fn charge_new(&mut self) -> Result<(), Figure> {
        self.new = self.take(of_store())?;
        Ok(())
    }
    pub fn charged_new(&mut self, fid: Fid) {
        self.writers.extend(self.new.take().map(|charge| (fid, charge)));
    }
    pub fn charge_write(&mut self, fid: Fid) -> Result<(), Figure> {
        if !self.writers.contains_key(&fid) {
            let charge = self.take(of_store())?;
            self.writers.extend(charge.map(|charge| (fid, charge)));
        }
        Ok(())
    }
    /// What was written is stored, in any case.
    pub fn charge_store(&mut self, fid: Fid) {
        let held = self.writers.remove(&fid);
        self.forced |= held.is_none();
        let done = || self.grant.as_ref().map(|grant| grant.charge_done(of_store()));
        self.next = held.or_else(done);
    }
    pub fn end_writing(&mut self, fid: Fid) {
        self.writers.remove(&fid);
    }
    pub fn settle(&mut self, seq: Seq, done: bool) {
        if let Some(charge) = self.next.take().filter(|_| done) {
            charge.bind(seq, None);
        }
    }
    pub fn keep(&mut self) {
        if let Some(grant) = &self.grant {
            self.kept = grant.kept();
        }
    }
    /// The process has ended.
    pub fn restart(&mut self, journal: &[Entry], acked: Seq, power: bool) {
        let on = self.grant.is_some();
        (self.next, self.new) = (None, None);
        self.writers.clear();
        if power {
            // the figures of another life of the machine may be old
            self.kept.granted = self.kept.returned;
            let pending = journal.iter().skip(acked.0 as usize).map(of_entry);
            self.anew = if on { self.anew.plus(pending.sum()) } else { Figure::NONE };
        }
        self.grant = None;
        if on {
            self.grant(journal, acked);
        }
    }
    /// As the life before left it.
    pub fn grant(&mut self, journal: &[Entry], acked: Seq) -> Arc<Grant> {
        if let Some(grant) = &self.grant {
            return grant.clone();
        }
        let grant = Grant::new(self.kept, false);
        for (nth, entry) in journal.iter().enumerate().skip(acked.0 as usize) {
            let room = of_entry(entry);
            if Seq(nth as u64 + 1) > self.kept.upto {
                grant.charge_done(room).bind(Seq(nth as u64 + 1), None);
            }
        }
        self.grant = Some(grant.clone());
        grant
    }
    /// `over`: what records that are not acknowledged take beyond what is held.
    fn note_unpaid(&mut self, over: Figure) {
        if self.forced {
            let (all, before) = self.unpaid;
            self.unpaid = (all.plus(over.less(before)), over);
        }
    }
    /// What the client holds, and the newest record whose charge is not in it any more.
    fn held(&self) -> (Figure, Seq) {
        let of = |grant: &Arc<Grant>| (grant.figures().granted, grant.kept().upto);
        self.grant.as_ref().map_or((Figure::NONE, Seq(0)), of)
    }
}

/// The server's disk.
#[derive(Default)]
pub struct Disk {
    /// what can be written: of the disk, or of the quota
    capacity: Option<Figure>,
    quota: bool,
    costs: BTreeMap<(u32, Seq), Figure>,
    pub saved: Saved,
}

impl Disk {
    pub fn start(&mut self, machine: &mut Machine, ctx: &Ctx) {
        let Some(len) = ctx.setup.room else { return };
        let capacity = Figure::new(len, 1 << 20);
        (self.capacity, self.quota) = (Some(capacity), len % 2 == 1);
        machine.reserve(1, self.saved.clone(), ctx.instant(ctx.server_no()));
        if self.quota {
            machine.set_quota(0, Some(capacity));
        }
    }
    /// What these records take, if they are applied.
    pub fn announce(&mut self, node: u32, changes: &[Change]) {
        for change in changes {
            let room = match &change.record.op {
                Op::Store { .. } => of_store(),
                op => of(op),
            };
            self.costs.insert((node, change.seq), room);
        }
    }
    fn used(&self, volume: &Volume) -> Figure {
        volume.outcomes.keys().filter_map(|key| self.costs.get(key)).copied().sum()
    }
    pub fn survey(&self, volume: &Volume) -> (Figure, Figure) {
        let used = self.used(volume);
        let disk = self.capacity.unwrap_or_default();
        let disk = if self.quota { disk.plus(disk) } else { disk };
        (disk.less(used), used)
    }
}

impl World {
    /// What clients hold is beside what is used, but for the charges of records that have arrived
    /// and are not acknowledged: these count twice. What a client's new life has to store anew it
    /// stores, granted or not; so it is with its journal when its figures went with the power.
    pub fn check_room(&mut self) {
        let (disk, volume) = (&self.server.disk, &self.server.volume);
        let Some(mut capacity) = disk.capacity else { return };
        let mut all = disk.used(volume);
        for client in &mut self.clients {
            let (held, upto) = client.cache.room.held();
            let node = client.cache.node;
            let newer = volume.outcomes.range((node, upto.next())..=(node, Seq(u64::MAX)));
            let arrived = newer.filter_map(|(key, _)| disk.costs.get(key)).copied().sum();
            let room = &mut client.cache.room;
            room.note_unpaid(Figure::less(arrived, held));
            all = all.plus(held.less(arrived));
            capacity = capacity.plus(room.unpaid.0).plus(room.anew);
        }
        if !capacity.covers(all) {
            self.ctx.fail(format!("{MARK}{all:?} are used or held, of {capacity:?}"));
        }
    }
    /// After all that could fail, both sides agree. A question may be under way.
    pub fn check_room_end(&mut self) -> Result<(), String> {
        let until = self.ctx.now + 30 * SECOND;
        while let Some(why) = self.disagreement() {
            if self.ctx.now > until || !self.one_event() {
                return Err(why);
            }
            if let Some(why) = self.ctx.violation.take() {
                return Err(why);
            }
        }
        Ok(())
    }
    fn disagreement(&self) -> Option<String> {
        let report = self.server.machine.as_ref()?.room_report(0)?;
        self.clients.iter().find_map(|client| {
            let (held, _) = client.cache.room.held();
            let of = report.holdings.iter().find(|holding| holding.node == client.cache.node);
            let there = of.map_or(Figure::NONE, |holding| holding.outstanding);
            let what = || format!("{MARK}c{} holds {held:?}, and has {there:?}", client.no);
            (held != there).then(what)
        })
    }
}

/// Seeds that every run of the tests covers.
const ROOM_SEEDS: std::ops::Range<u64> = 0..80;
/// Sizes of disks; odd ones are quotas.
const ROOMS: [u64; 4] = [300_000, 600_001, 1_000_000, 400_001];

fn plan(seed: u64) -> Plan {
    let mut plan = Plan::of(seed, crate::ops());
    plan.setup.room = Some(ROOMS[seed as usize % ROOMS.len()]);
    plan
}

#[test]
fn no_record_lacks_room() {
    crate::run_all(crate::seeds(ROOM_SEEDS), plan);
    let is_full = |line: &&String| line.contains("NOSPC") || line.contains("os error 28");
    let full = |seed: u64| {
        let mut world = World::new(&plan(seed), true);
        let _ = world.run();
        world.ctx.story.take().unwrap().iter().filter(is_full).count()
    };
    let count: usize = (0..80).map(full).sum();
    assert!(count > 50, "the disks are seldom full: {count} times");
}

#[cfg(feature = "planted-faults")]
mod planted {
    use imz::lento::faults::{Fault, plant};

    use crate::shrink::{Ended, run};

    /// Why the history fails, if it does for room.
    fn fails(seed: u64) -> Option<String> {
        match run(&super::plan(seed)) {
            Ended::Badly(why) if why.contains(super::MARK) => Some(why),
            _ => None,
        }
    }
    fn is_caught(fault: Fault) {
        let caught = (0..1000).find_map(|seed| {
            plant(Some(fault));
            let why = fails(seed);
            plant(None);
            Some((seed, why?))
        });
        let (seed, why) = caught.unwrap_or_else(|| panic!("{fault:?} goes unseen"));
        println!("{fault:?}: caught by history {}: {why}", seed + 1);
    }

    #[test]
    fn room_given_back_before_the_record_is_durable_is_caught() {
        is_caught(Fault::RoomBackEarly);
    }

    #[test]
    fn room_that_counts_twice_is_caught() {
        is_caught(Fault::RoomTwice);
    }

    #[test]
    fn a_restart_that_forgets_what_was_granted_is_caught() {
        is_caught(Fault::RoomForgotten);
    }

    #[test]
    fn grants_beyond_the_quota_are_caught() {
        is_caught(Fault::QuotaIgnored);
    }
}
