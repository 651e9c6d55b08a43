//! The world: true time, the network between the nodes, and what happens next.
//!
//! ```text
//!   plan --steps--> World --events--> Client, Server (real machines, model disks)
//!                     ^                   |
//!                     '---- Ctx: queue, network, history, story <----'
//! ```
//!
//! One thread, one queue of events in the order of their times. A connection is two queues, one a
//! direction; what is sent in the foreground may overtake what is sent in the background, and
//! nothing else overtakes anything on one connection. Every node's clock runs a little wrong.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::{Duration, Instant};

use imz::kml::record::Seq;
use imz::lento::message::Message;

use crate::client::Client;
use crate::history::History;
use crate::plan::{MS, Micros, Plan, SECOND, Setup, What};
use crate::rng::Rng;
use crate::server::Server;
use crate::volume::Volume;

/// How often what must not take long is looked at.
const CHECK_EVERY: Micros = SECOND;
/// Healthy clients have nothing unshipped that is older than this and the age that they wait.
const SHIP_MAX: Micros = 20 * SECOND;
/// So long after it is healed nobody has a connection left that is of no use.
const SETTLE: Micros = 40 * SECOND;
/// After the server had no room, shipping rests for so long at most.
const REST_AFTER_FULL: Micros = 35 * SECOND;
/// A world that is healed rests within this time.
const REST_MAX: Micros = 300 * SECOND;
/// Nanoseconds since the Unix epoch when it begins.
const EPOCH_NS: u64 = 1_700_000_000_000_000_000;
/// More events than any history has.
const EVENTS_MAX: u64 = 200_000;

/// Something that a client's process does for itself.
pub enum Later {
    Look,
    Cut {
        generation: u64,
        after: Seq,
        upto: Seq,
    },
    BreakDone {
        conn: usize,
        id: u64,
    },
    Told {
        conn: usize,
        recall_id: u64,
    },
    /// the operation goes on
    Go(usize),
}

#[allow(clippy::large_enum_variant)] // few wait at a time, and most are messages
pub enum Event {
    Step(usize),
    Accept { conn: usize },
    Connected { conn: usize },
    Message { conn: usize, to_server: bool, packet: (u64, bool, Message) },
    Closed { conn: usize, to_server: bool },
    WakeClient(usize),
    WakeServer,
    Later { client: usize, life: u32, later: Later },
    Synced { life: u32 },
    StartClient { client: usize, life: u32 },
    StartServer { life: u32 },
    Resume(usize),
    Check,
    Heal,
}

struct Queued {
    at: Micros,
    no: u64,
    event: Event,
}

impl PartialEq for Queued {
    fn eq(&self, other: &Queued) -> bool {
        (self.at, self.no) == (other.at, other.no)
    }
}
impl Eq for Queued {}
impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Queued) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Queued {
    fn cmp(&self, other: &Queued) -> std::cmp::Ordering {
        (self.at, self.no).cmp(&(other.at, other.no))
    }
}

/// A connection. Directions: 0 to the client, 1 to the server.
struct Conn {
    client: usize,
    /// the client's end, the server's end
    open: [bool; 2],
    /// what is sent in this direction is lost
    lost: [bool; 2],
    /// when the last message of each lane arrives, by direction
    last: [[Micros; 2]; 2],
}

/// What the nodes share: all but themselves.
pub struct Ctx {
    pub now: Micros,
    pub rng: Rng,
    pub setup: Setup,
    pub history: History,
    pub violation: Option<String>,
    /// somebody may do something else now
    pub rights_changed: bool,
    pub story: Option<Vec<String>>,
    queue: BinaryHeap<Reverse<Queued>>,
    no: u64,
    conns: Vec<Conn>,
    /// nothing passes between the client and the server until then
    parted_until: Vec<Micros>,
    /// what was sent before it was healed may come until then
    pub late_until: Micros,
    server_down: Option<bool>,
    begin: Instant,
    client_wake: Vec<Micros>,
    server_wake: Micros,
}

impl Ctx {
    pub fn server_no(&self) -> usize {
        self.setup.drift_ppm.len() - 1
    }
    /// What a node's clock says, microseconds since the beginning.
    fn local(&self, node: usize) -> Micros {
        let drift = self.setup.drift_ppm[node] * self.now as i64 / 1_000_000;
        (self.now as i64 + drift) as Micros
    }
    pub fn instant(&self, node: usize) -> Instant {
        self.begin + Duration::from_micros(self.local(node))
    }
    /// The same for people; no two nodes ever say the same.
    pub fn now_ns(&self, node: usize) -> u64 {
        EPOCH_NS + self.local(node) * 1000 + node as u64
    }
    /// When a node's clock says this.
    fn true_time(&self, node: usize, at: Instant) -> Micros {
        let local = at.saturating_duration_since(self.begin).as_nanos().div_ceil(1000) as i64;
        let ppm = self.setup.drift_ppm[node];
        // the next microsecond is late enough
        (local * 1_000_000 / (1_000_000 + ppm) + 1) as Micros
    }
    pub fn at(&mut self, at: Micros, event: Event) {
        self.no += 1;
        let (at, no) = (at.max(self.now), self.no);
        self.queue.push(Reverse(Queued { at, no, event }));
    }
    pub fn after(&mut self, time: Micros, event: Event) {
        self.at(self.now + time, event);
    }
    pub fn later(&mut self, time: Micros, client: usize, life: u32, later: Later) {
        self.after(time, Event::Later { client, life, later });
    }
    pub fn wake_client(&mut self, client: usize, at: Instant, keep_at: Micros) {
        let at = self.true_time(client, at).min(keep_at).max(self.now + 1);
        if self.client_wake[client] <= self.now || at < self.client_wake[client] {
            self.client_wake[client] = at;
            self.at(at, Event::WakeClient(client));
        }
    }
    pub fn wake_server(&mut self, at: Instant) {
        let at = self.true_time(self.server_no(), at).max(self.now + 1);
        if self.server_wake <= self.now || at < self.server_wake {
            self.server_wake = at;
            self.at(at, Event::WakeServer);
        }
    }
    pub fn fail(&mut self, why: String) {
        self.tell(|| format!("VIOLATION {why}"));
        self.violation.get_or_insert(why);
    }
    pub fn tell(&mut self, line: impl FnOnce() -> String) {
        if let Some(story) = &mut self.story {
            story.push(format!("{:>12.6} {}", self.now as f64 / 1e6, line()));
        }
    }

    // The network.

    fn delay(&mut self) -> Micros {
        let (least, most) = self.setup.latency;
        let spike = if self.rng.one_in(200) { 300 * MS } else { 0 };
        self.rng.within(least, most) + spike
    }
    /// When something that is sent now would arrive.
    fn arrival(&mut self, client: usize) -> Micros {
        let delay = self.delay();
        self.now.max(self.parted_until[client]) + delay
    }
    pub fn connect(&mut self, client: usize) -> usize {
        let conn = self.conns.len();
        let (open, lost, last) = ([true, false], [false; 2], [[0; 2]; 2]);
        self.conns.push(Conn { client, open, lost, last });
        let at = self.arrival(client);
        self.tell(|| format!("c{client}: connects ({conn})"));
        self.at(at, Event::Accept { conn });
        conn
    }
    /// `from`: the connection, and whether the client sends.
    pub fn send(
        &mut self,
        (conn, to_server): (usize, bool),
        background: bool,
        id: u64,
        answer: bool,
        message: Message,
    ) {
        let client = self.conns[conn].client;
        let at = self.arrival(client);
        let no = conn;
        let conn = &mut self.conns[conn];
        let way = usize::from(to_server);
        if !conn.open[usize::from(!to_server)] {
            return; // the sender itself has closed it
        }
        let last = &mut conn.last[way];
        let at = if background { at.max(last[0]).max(last[1]) } else { at.max(last[0]) };
        last[usize::from(background)] = at;
        let is_lost = conn.lost[way];
        self.tell(|| {
            let who = if to_server { "->" } else { "<-" };
            let lost = if is_lost { " LOST" } else { "" };
            let answer = if answer { "answer" } else { "request" };
            format!("c{client} {who} s ({no}) {answer} {id}: {}{lost}", short(&message))
        });
        if !is_lost {
            let packet = (id, answer, message);
            self.at(at, Event::Message { conn: no, to_server, packet });
        }
    }
    /// One end closes; the other hears of it after all that was sent.
    pub fn close(&mut self, conn: usize, by_server: bool) {
        let client = self.conns[conn].client;
        let at = self.arrival(client);
        let to_server = !by_server;
        let c = &mut self.conns[conn];
        let (own, way) = (usize::from(by_server), usize::from(to_server));
        if !std::mem::replace(&mut c.open[own], false) {
            return;
        }
        let at = at.max(c.last[way][0]).max(c.last[way][1]);
        if !c.lost[way] {
            self.at(at, Event::Closed { conn, to_server });
        }
    }
    /// One end dies with its process, or silently with its machine.
    pub fn die(&mut self, conn: usize, server: bool, silently: bool) {
        if silently {
            self.conns[conn].open[usize::from(server)] = false;
        } else {
            self.close(conn, server);
        }
    }
    fn current_conn(&self, client: usize) -> Option<usize> {
        self.conns.iter().rposition(|conn| conn.client == client && conn.open[0])
    }
}

/// A message in a line.
fn short(message: &Message) -> String {
    match message {
        Message::Batch(batch) => {
            let seqs: Vec<String> = batch
                .items
                .iter()
                .map(|item| match imz::kml::codec::decode_wire(&item.record) {
                    Ok((seq, record)) => format!("{} {:?} {:?}", seq.0, record.op, item.data),
                    Err(e) => e.to_string(),
                })
                .collect();
            format!("Batch {}..={} {seqs:?}", batch.after.0, batch.upto.0)
        }
        Message::Page(page) => {
            let entry = |e: &imz::lento::message::Entry| {
                format!("{}={}@{}", e.name.escape_ascii(), e.object.fid, e.object.stamp.0)
            };
            let entries: Vec<String> = page.entries.iter().map(entry).collect();
            let dir = &page.dir;
            format!("Page {}@{} {entries:?} more {}", dir.fid, dir.stamp.0, page.more)
        }
        Message::Status(m) => format!("Status {}@{}", m.object.fid, m.object.stamp.0),
        other => format!("{other:?}"),
    }
}

pub struct World {
    pub ctx: Ctx,
    pub clients: Vec<Client>,
    pub server: Server,
    plan: Plan,
    /// processes that are stopped, and what they have not seen yet
    stopped: BTreeMap<usize, Vec<Event>>,
    healed_at: Option<Micros>,
    pub events: u64,
}

impl World {
    pub fn new(plan: &Plan, story: bool) -> World {
        let mut rng = Rng::new(plan.seed ^ 0x5eed);
        let volume = Volume::new(rng.within(1, 20) as usize);
        let mut history = History::default();
        history.begin(&volume.tree);
        let ctx = Ctx {
            now: 0,
            rng,
            setup: plan.setup.clone(),
            history,
            violation: None,
            rights_changed: false,
            story: story.then(Vec::new),
            queue: BinaryHeap::new(),
            no: 0,
            conns: Vec::new(),
            parted_until: vec![0; plan.clients],
            late_until: 0,
            server_down: None,
            begin: Instant::now() + Duration::from_secs(1000),
            client_wake: vec![0; plan.clients],
            server_wake: 0,
        };
        let clients = (0..plan.clients).map(Client::new).collect();
        let server = Server::new(volume);
        let (stopped, plan) = (BTreeMap::new(), plan.clone());
        World { ctx, clients, server, plan, stopped, healed_at: None, events: 0 }
    }

    /// Runs the plan, heals the world, and lets it come to rest.
    pub fn run(&mut self) -> Result<(), String> {
        const BEGIN: Micros = SECOND; // until then everybody is connected
        self.server.start(&self.ctx);
        for client in &mut self.clients {
            client.start(&mut self.ctx);
        }
        let mut end = BEGIN;
        for (nth, step) in self.plan.steps.iter().enumerate() {
            end = end.max(BEGIN + step.at);
            self.ctx.at(BEGIN + step.at, Event::Step(nth));
        }
        self.ctx.at(CHECK_EVERY, Event::Check);
        self.ctx.at(end + 1, Event::Heal);
        while self.one_event() {
            if let Some(why) = self.ctx.violation.take() {
                return Err(why);
            }
            if self.is_at_rest() {
                return self.check_end();
            }
            if self.ctx.now > end + REST_MAX {
                return Err(self.why_no_rest());
            }
        }
        Err("nothing happens any more".to_owned())
    }

    /// False when nothing is to come.
    pub fn one_event(&mut self) -> bool {
        let Some(Reverse(queued)) = self.ctx.queue.pop() else { return false };
        self.ctx.now = queued.at;
        self.dispatch(queued.event);
        self.check_step();
        self.events += 1;
        if self.events > EVENTS_MAX {
            self.ctx.fail("the nodes never rest".to_owned());
        }
        true
    }
    fn client_of(&self, event: &Event) -> Option<usize> {
        match event {
            Event::Connected { conn }
            | Event::Message { conn, to_server: false, .. }
            | Event::Closed { conn, to_server: false } => Some(self.ctx.conns[*conn].client),
            Event::WakeClient(client) | Event::Later { client, .. } => Some(*client),
            _ => None,
        }
    }

    fn dispatch(&mut self, event: Event) {
        if let Some(client) = self.client_of(&event)
            && let Some(held) = self.stopped.get_mut(&client)
        {
            return held.push(event);
        }
        let ctx = &mut self.ctx;
        match event {
            Event::Step(nth) => self.step(nth),
            Event::Accept { conn } => {
                let client = ctx.conns[conn].client;
                if !ctx.conns[conn].open[0] {
                    return;
                }
                match ctx.server_down {
                    None => {
                        ctx.conns[conn].open[1] = true;
                        let at = ctx.arrival(client);
                        ctx.conns[conn].last[0] = [at; 2];
                        ctx.at(at, Event::Connected { conn });
                        self.server.on_connect(conn, ctx);
                    }
                    Some(false) => {
                        let at = ctx.arrival(client);
                        ctx.at(at, Event::Closed { conn, to_server: false });
                    }
                    Some(true) => {} // no power: silence
                }
            }
            Event::Connected { conn } => {
                let client = ctx.conns[conn].client;
                self.clients[client].on_connected(conn, ctx);
            }
            Event::Message { conn, to_server: true, packet } => {
                if ctx.conns[conn].open[1] {
                    self.server.on_message(conn, packet, ctx);
                } else if ctx.server_down != Some(true) && ctx.conns[conn].open[0] {
                    // nobody knows this connection any more
                    let at = ctx.arrival(ctx.conns[conn].client);
                    ctx.at(at, Event::Closed { conn, to_server: false });
                }
            }
            Event::Message { conn, packet, .. } => {
                let client = ctx.conns[conn].client;
                if ctx.conns[conn].open[0] {
                    self.clients[client].on_message(conn, packet, ctx);
                } else if self.clients[client].machine.is_some() && ctx.conns[conn].open[1] {
                    let at = ctx.arrival(client);
                    ctx.at(at, Event::Closed { conn, to_server: true });
                }
            }
            Event::Closed { conn, to_server: true } => {
                ctx.conns[conn].open[1] = false;
                self.server.on_closed(conn, ctx);
            }
            Event::Closed { conn, .. } => {
                ctx.conns[conn].open[0] = false;
                let client = ctx.conns[conn].client;
                self.clients[client].on_closed(conn, ctx);
            }
            Event::WakeClient(client) => self.clients[client].on_wake(ctx),
            Event::WakeServer => self.server.on_wake(ctx),
            Event::Later { client, life, later } => {
                if self.clients[client].life == life && self.clients[client].machine.is_some() {
                    self.clients[client].on_later(later, ctx);
                }
            }
            Event::Synced { life } => self.server.on_synced(life, ctx),
            Event::StartClient { client, life } => {
                if self.clients[client].life == life && self.clients[client].machine.is_none() {
                    ctx.tell(|| format!("c{client}: begins anew"));
                    self.clients[client].start(ctx);
                }
            }
            Event::StartServer { life } => {
                if self.server.life == life && self.server.machine.is_none() {
                    ctx.tell(|| "server: begins anew".to_owned());
                    ctx.server_down = None;
                    self.server.start(ctx);
                }
            }
            Event::Resume(client) => self.resume(client),
            Event::Check => {
                self.check_bounds();
                self.ctx.after(CHECK_EVERY, Event::Check);
            }
            Event::Heal => self.heal(),
        }
    }

    fn resume(&mut self, client: usize) {
        let held = self.stopped.remove(&client).unwrap_or_default();
        for event in held {
            self.dispatch(event);
        }
        let ctx = &mut self.ctx;
        ctx.at(ctx.now, Event::WakeClient(client));
    }

    fn step(&mut self, nth: usize) {
        let what = self.plan.steps[nth].what.clone();
        let ctx = &mut self.ctx;
        ctx.tell(|| format!("#{nth} {what:?}"));
        match what {
            What::Do { client, op } => {
                if !self.stopped.contains_key(&client) {
                    self.clients[client].begin(nth, op, ctx);
                }
            }
            What::Cut(client) => {
                if let Some(conn) = ctx.current_conn(client) {
                    for to_server in [false, true] {
                        let at = ctx.arrival(client);
                        ctx.conns[conn].lost[usize::from(to_server)] = true;
                        ctx.at(at, Event::Closed { conn, to_server });
                    }
                }
            }
            What::HalfOpen { client, to_server } => {
                if let Some(conn) = ctx.current_conn(client) {
                    ctx.conns[conn].lost[usize::from(to_server)] = true;
                }
            }
            What::Partition { client, lasts } => {
                ctx.parted_until[client] = ctx.parted_until[client].max(ctx.now + lasts);
            }
            What::Kill { client, down } => self.kill(client, down, false),
            What::Power { client, down } => self.kill(client, down, true),
            What::Stop { client, lasts } => {
                if self.clients[client].machine.is_some() && !self.stopped.contains_key(&client) {
                    self.stopped.insert(client, Vec::new());
                    ctx.after(lasts, Event::Resume(client));
                }
            }
            What::Evict { client, nth } => {
                if !self.stopped.contains_key(&client) {
                    self.clients[client].evict(nth, ctx);
                }
            }
            What::KillServer { down } => self.kill_server(down, false),
            What::PowerServer { down } => self.kill_server(down, true),
            What::FullServer { lasts } => self.server.full_until = ctx.now + lasts,
            What::SlowDisk { lasts } => self.server.slow_until = ctx.now + lasts,
            What::TrimServer => self.server.volume.trim(),
        }
    }
    fn kill(&mut self, client: usize, down: Micros, power: bool) {
        let (ctx, who) = (&mut self.ctx, &mut self.clients[client]);
        if who.machine.is_some() {
            self.stopped.remove(&client);
            who.stop(ctx, power);
            ctx.after(down, Event::StartClient { client, life: who.life });
        }
    }
    fn kill_server(&mut self, down: Micros, power: bool) {
        if self.server.machine.is_some() {
            self.ctx.server_down = Some(power);
            self.server.stop(&mut self.ctx, power);
            self.ctx.after(down, Event::StartServer { life: self.server.life });
            self.check_kept();
        }
    }
    /// Everything works from now on.
    fn heal(&mut self) {
        let ctx = &mut self.ctx;
        ctx.tell(|| "everything is healed".to_owned());
        self.healed_at = Some(ctx.now);
        ctx.late_until = ctx.parted_until.iter().copied().max().unwrap_or(0);
        ctx.parted_until.fill(0);
        self.server.full_until = self.server.full_until.min(ctx.now);
        self.server.slow_until = self.server.slow_until.min(ctx.now);
        ctx.at(ctx.now, Event::StartServer { life: self.server.life });
        for client in 0..self.clients.len() {
            let life = self.clients[client].life;
            ctx.at(ctx.now, Event::StartClient { client, life });
            ctx.at(ctx.now, Event::Resume(client));
        }
    }
    fn is_at_rest(&self) -> bool {
        let settled = self.healed_at.is_some_and(|at| self.ctx.now > at + SETTLE);
        settled
            && self.stopped.is_empty()
            && self.clients.iter().all(|client| {
                client.is_online()
                    && client.healthy_since.is_some()
                    && client.runs.is_empty()
                    && client.acked() == client.cache.last()
                    && client.cache.writers.is_empty()
            })
    }
    fn why_no_rest(&self) -> String {
        let of = |client: &Client| {
            let (acked, last) = (client.acked().0, client.cache.last().0);
            let (online, runs) = (client.is_online(), client.runs.len());
            let healthy = client.healthy_since.is_some();
            format!(
                "c{}: online {online} healthy {healthy}, {acked} of {last} records, {runs} operations",
                client.no
            )
        };
        let all: Vec<String> = self.clients.iter().map(of).collect();
        format!("it never comes to rest: {all:#?}")
    }
}

#[path = "check.rs"]
mod check;
