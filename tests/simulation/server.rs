//! The server node: the real machine, driven as net's server drives it, over the model volume.

use std::collections::{BTreeMap, BTreeSet};

use imz::kml::record::Seq;
use imz::lento::faults::{Fault, is_planted};
use imz::lento::message::{Code, Message};
use imz::lento::promises::ConnId;
use imz::lento::server::{Effect, Server as Machine, Settings};
use imz::net::answer;

use crate::client::IN_VAIN_MAX;
use crate::plan::Micros;
use crate::space::Disk;
use crate::volume::{Volume, Watch};
use crate::world::{Ctx, Event};

pub struct Server {
    /// `None` while the process is down
    pub machine: Option<Machine>,
    pub volume: Volume,
    /// what the disk has for sure
    durable: Volume,
    syncing: Option<Volume>,
    /// as of the last sync: how far the nodes were
    marks: BTreeMap<u32, Seq>,
    pub life: u32,
    /// the machine has power, and refuses connections to a process that is not there
    pub powered: bool,
    pub full_until: Micros,
    pub slow_until: Micros,
    /// nodes that may have rights, as the next life is told
    expected: Vec<u32>,
    /// connections whose clients are known
    pub live: BTreeMap<usize, u32>,
    conns: BTreeSet<usize>,
    /// the newest record of each node that it was told is kept
    pub told: BTreeMap<u32, Seq>,
    /// somebody was told: what others have must be current now
    pub has_told: bool,
    pub disk: Disk,
    /// times in a row that it was to be woken again at once
    in_vain: u32,
}

/// The machine's name for a connection. Zero is nobody's.
fn conn_id(conn: usize) -> ConnId {
    ConnId(conn as u32 + 1)
}
fn conn_of(id: ConnId) -> usize {
    id.0 as usize - 1
}

impl Server {
    pub fn new(volume: Volume) -> Server {
        Server {
            machine: None,
            durable: volume.clone(),
            volume,
            syncing: None,
            marks: BTreeMap::new(),
            life: 0,
            powered: true,
            full_until: 0,
            slow_until: 0,
            expected: Vec::new(),
            live: BTreeMap::new(),
            conns: BTreeSet::new(),
            told: BTreeMap::new(),
            has_told: false,
            disk: Disk::default(),
            in_vain: 0,
        }
    }
    pub fn start(&mut self, ctx: &Ctx) {
        let mut machine = Machine::new(Settings::default());
        // what it finds it makes durable first
        self.durable = self.volume.clone();
        self.marks = self.volume.marks();
        let no = machine.add_volume("v", [7; 16], self.volume.stamp());
        machine.expect_back(no, &self.expected, ctx.instant(ctx.server_no()));
        self.disk.start(&mut machine, ctx);
        self.machine = Some(machine);
        self.powered = true;
    }
    pub fn stop(&mut self, ctx: &mut Ctx, power: bool) {
        if self.machine.take().is_none() {
            return;
        }
        self.life += 1;
        self.syncing = None;
        self.live.clear();
        self.powered = !power;
        for conn in std::mem::take(&mut self.conns) {
            ctx.die(conn, true, power);
        }
        if power {
            let (durable, kept) = (self.durable.clone(), self.durable.stamp());
            let (volume, lost) = durable.after_power_cut(&self.volume, &mut ctx.rng);
            ctx.history.lost(&lost);
            ctx.history.recovered(&volume.tree, kept);
            self.volume = volume;
        }
        if is_planted(Fault::CursorApart) {
            self.volume.forget_marks(&self.marks);
        }
    }

    pub fn on_connect(&mut self, conn: usize, ctx: &mut Ctx) {
        let now = ctx.instant(ctx.server_no());
        if let Some(machine) = &mut self.machine {
            self.conns.insert(conn);
            machine.on_connect(conn_id(conn), now);
            self.drain(ctx);
        }
    }
    pub fn on_closed(&mut self, conn: usize, ctx: &mut Ctx) {
        let now = ctx.instant(ctx.server_no());
        self.live.remove(&conn);
        if let Some(machine) = self.machine.as_mut().filter(|_| self.conns.remove(&conn)) {
            machine.on_closed(conn_id(conn), now);
            self.drain(ctx);
        }
    }
    pub fn on_message(&mut self, conn: usize, packet: (u64, bool, Message), ctx: &mut Ctx) {
        let now = ctx.instant(ctx.server_no());
        let (id, answer, message) = packet;
        let Some(machine) = self.machine.as_mut().filter(|_| self.conns.contains(&conn)) else {
            return;
        };
        match message {
            Message::Batch(batch) if !answer => {
                let bounds = (batch.after, batch.upto);
                match answer::changes(batch) {
                    Ok(changes) => machine.on_batch(conn_id(conn), id, bounds, changes, now),
                    Err(e) => ctx.fail(format!("a batch is garbage: {e}")),
                }
            }
            message => machine.on_message(conn_id(conn), id, answer, message, now),
        }
        self.drain(ctx);
    }
    pub fn on_wake(&mut self, ctx: &mut Ctx) {
        let now = ctx.instant(ctx.server_no());
        if let Some(machine) = &mut self.machine {
            machine.wake(now);
            self.drain(ctx);
            let next = self.machine.as_ref().and_then(Machine::wake_at);
            self.in_vain = if next.is_some_and(|at| at <= now) { self.in_vain + 1 } else { 0 };
            if self.in_vain > IN_VAIN_MAX {
                ctx.fail("the server is woken again and again".to_owned());
            }
        }
    }
    pub fn on_synced(&mut self, life: u32, ctx: &mut Ctx) {
        if life != self.life {
            return;
        }
        let Some(volume) = self.syncing.take() else { return };
        let stamp = volume.stamp();
        if stamp >= self.durable.stamp() {
            self.durable = volume;
        }
        if let Some(machine) = &mut self.machine {
            machine.on_synced(0, Some(stamp));
            self.drain(ctx);
        }
    }

    fn drain(&mut self, ctx: &mut Ctx) {
        let now = ctx.instant(ctx.server_no());
        while let Some(effect) = self.machine.as_mut().and_then(Machine::poll) {
            let Some(machine) = &mut self.machine else { return };
            match effect {
                Effect::Send { conn, background, id, answer, message } => {
                    let conn = conn_of(conn);
                    if let Message::Acked(acked) = &message {
                        self.tell(conn, acked.upto, ctx);
                    }
                    if let Message::Welcome(welcome) = &message {
                        self.tell(conn, welcome.acked, ctx);
                    }
                    ctx.send((conn, false), background, id, answer, message);
                }
                Effect::Close { conn, why } => {
                    ctx.tell(|| format!("server: closes {}: {why}", conn_of(conn)));
                    let conn = conn_of(conn);
                    self.live.remove(&conn);
                    if self.conns.remove(&conn) {
                        ctx.close(conn, true);
                    }
                }
                Effect::Meet { conn, hello, .. } => {
                    let node = self.volume.meet(hello.incarnation);
                    // who is told is found by the connection
                    self.live.insert(conn_of(conn), node);
                    let kept = (self.durable.last(node), self.volume.newest_of(node));
                    machine.on_met(conn, node, kept, now);
                }
                Effect::Ask { conn, id, node, request, .. } => {
                    let pages = ctx.setup.page_count;
                    let (message, given) = self.volume.answer(node, &request, pages);
                    machine.on_answer(conn, id, (&request, message), &given, now);
                }
                Effect::Spool { key, .. } if ctx.now < self.full_until && ctx.rng.one_in(2) => {
                    machine.on_spool_failed(0, key, (Code::NoSpace, "no room"), now);
                }
                Effect::Spool { key, at, bytes, .. } => self.volume.spool(key, at, &bytes),
                Effect::Unspool { key, .. } => self.volume.unspool(key),
                Effect::Apply { ticket, node, upto, changes, .. } => {
                    let full = ctx.now < self.full_until;
                    let room = if full { ctx.rng.below(3) } else { u64::MAX };
                    let history = &mut ctx.history;
                    let mut watch = Watch { history, violations: Vec::new(), room };
                    self.disk.announce(node, &changes);
                    let applied = self.volume.apply(node, upto, &changes, &mut watch);
                    let violations = watch.violations;
                    ctx.tell(|| {
                        let of: Vec<String> = changes
                            .iter()
                            .map(|c| {
                                let outcome = self.volume.outcomes.get(&(node, c.seq));
                                format!("{} {:?} {outcome:?}", c.seq.0, c.record.op)
                            })
                            .collect();
                        let stamp = self.volume.stamp().0;
                        format!("server: applies of node {node}: {of:#?}, now at {stamp}")
                    });
                    for why in violations {
                        ctx.fail(why);
                    }
                    if !applied.also.is_empty() {
                        // aliases must outlive what is acknowledged under them
                        self.durable = self.volume.clone();
                    }
                    machine.on_applied(ticket, 0, applied, now);
                }
                Effect::Resolve { .. } => unreachable!("no client here decides anything"),
                Effect::Survey { volume } => {
                    let (free, used) = self.disk.survey(&self.volume);
                    machine.on_surveyed(volume, free, used, now);
                }
                Effect::SaveGrants { saved, then: (conn, id, message), .. } => {
                    self.disk.saved = saved;
                    ctx.send((conn_of(conn), false), false, id, true, message);
                }
                Effect::Live { nodes, .. } => self.expected = nodes,
                Effect::Sync { .. } => {
                    self.syncing = Some(self.volume.clone());
                    self.marks = self.durable.marks();
                    let slow = if ctx.now < self.slow_until { 20 } else { 1 };
                    let time = ctx.rng.within(100, ctx.setup.sync_time * slow);
                    ctx.after(time, Event::Synced { life: self.life });
                }
            }
        }
        if let Some(at) = self.machine.as_ref().and_then(Machine::wake_at) {
            ctx.wake_server(at);
        }
    }
    /// A client hears that its records up to here are kept.
    fn tell(&mut self, conn: usize, upto: Seq, ctx: &mut Ctx) {
        let Some(node) = self.live.get(&conn).copied() else { return };
        ctx.history.known(node, upto, ctx.now);
        let told = self.told.entry(node).or_default();
        *told = upto.max(*told);
        self.has_told = true;
    }
}
