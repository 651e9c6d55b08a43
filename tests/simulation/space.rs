//! Room in the simulation: a disk that each record takes its part of, and clients that reserve it.
//!
//! The machines and the books are real; a record takes of the disk what it was charged, and nothing
//! ever becomes free, so that histories run into the end of the disk, or of the quota. At every step
//! what is used and what clients may still write is on the disk; no record lacks room. Histories
//! here do not fail for what main.rs finds: they look for room alone.

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
use crate::plan::Plan;
use crate::shrink::{Ended, run};
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
            let room = match &entry.record.op {
                Op::Store { .. } => of_store(),
                op => of(op),
            };
            if Seq(nth as u64 + 1) > self.kept.upto {
                grant.charge_done(room).bind(Seq(nth as u64 + 1), None);
            }
        }
        self.grant = Some(grant.clone());
        grant
    }
    /// What may be written at once.
    fn free(&self) -> Figure {
        self.grant.as_ref().map_or(Figure::NONE, |grant| grant.figures().free)
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
    pub fn check(&self, volume: &Volume) -> Option<String> {
        let (capacity, used) = (self.capacity?, self.used(volume));
        let over = !capacity.covers(used);
        over.then(|| format!("{MARK}a record finds none: {used:?} of {capacity:?} are used"))
    }
}

impl World {
    pub fn check_room(&mut self) {
        let Some(capacity) = self.server.disk.capacity else { return };
        let used = self.server.disk.used(&self.server.volume);
        let free: Figure = self.clients.iter().map(|client| client.cache.room.free()).sum();
        if !capacity.covers(used.plus(free)) {
            self.ctx.fail(format!("{MARK}{used:?} used, {free:?} free to write, of {capacity:?}"));
        }
    }
}

/// Sizes of disks; odd ones are quotas.
const ROOMS: [u64; 4] = [300_000, 600_001, 1_000_000, 400_001];

fn plan(seed: u64) -> Plan {
    let mut plan = Plan::of(seed, crate::OPS);
    plan.setup.room = Some(ROOMS[seed as usize % ROOMS.len()]);
    plan
}

/// Why the history fails, if it does for room.
fn fails(seed: u64) -> Option<String> {
    match run(&plan(seed)) {
        Ended::Badly(why) if why.contains(MARK) => Some(why),
        _ => None,
    }
}

#[test]
fn no_record_lacks_room() {
    let full = std::cell::Cell::new(0);
    for seed in 0..80 {
        if let Some(why) = fails(seed) {
            panic!("seed {seed}: {why}");
        }
        let mut world = World::new(&plan(seed), true);
        let _ = world.run();
        let story = world.ctx.story.take().unwrap();
        full.set(
            full.get()
                + story
                    .iter()
                    .filter(|line| line.contains("NOSPC") || line.contains("os error 28"))
                    .count(),
        );
    }
    assert!(full.get() > 100, "the disks were never full: {}", full.get());
}

#[cfg(feature = "planted-faults")]
mod planted {
    use imz::lento::faults::{Fault, plant};

    fn is_caught(fault: Fault) {
        let caught = (0..1000).find_map(|seed| {
            plant(Some(fault));
            let why = super::fails(seed);
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
