//! A client node: the real machine, driven as net's client drives it, over the model cache.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use imz::kml::codec;
use imz::kml::optimise::optimise;
use imz::kml::record::{Fid, Op as Change, Record, Seq, Stamp};
use imz::lento::client::{Client as Machine, Effect, Settings, Ticket, Unmet, Want as Need, Who};
use imz::lento::message::*;
use imz::lento::rights::Mode;
use imz::lento::ship::Bell;
use imz::replica::pending::{LetGo, data_len};
use imz::sys::Errno;

use crate::apps::{Run, Turn, Want, Written};
use crate::cache::{Cache, Listing};
use crate::history::{Key, Seen, Value};
use crate::linear::Event;
use crate::plan::{MS, Micros, Op};
use crate::tree::BLOCK_LEN;
use crate::tree::path;
use crate::world::{Ctx, Later};

/// How soon after a look at the journal the next one comes.
const BELL_PAUSE: Micros = 50 * MS;
/// How often everything is made durable.
const KEEP_EVERY: Micros = 5000 * MS;
/// A want that waits for longer was forgotten: there is patience with a server that is there, time
/// for a new connection, and patience once more.
const WANT_MAX: Micros = 80_000 * MS;

/// So often a node may be woken while it has nothing to do.
pub const IN_VAIN_MAX: u32 = 3;

/// Reads ahead in the journal, so that what is optimised together may travel in several batches.
#[derive(Default)]
struct Cutter {
    ready: VecDeque<(Seq, Record)>,
    cut: Seq,
    read: Seq,
}

pub struct Client {
    pub no: usize,
    pub cache: Cache,
    /// `None` while the process is down
    pub machine: Option<Machine>,
    pub life: u32,
    pub conn: Option<usize>,
    volume_id: [u8; 16],
    cutter: Cutter,
    cutting: u64,
    look_at: Option<Micros>,
    settled: Seq,
    kept_at: Micros,
    /// times in a row that it was to be woken again at once
    in_vain: u32,
    tickets: BTreeMap<Ticket, (Fid, Option<usize>, Micros)>,
    next_ticket: Ticket,
    listings: BTreeMap<Fid, Listing>,
    failed: BTreeMap<Fid, Errno>,
    /// operations under way, by the number of their step
    pub runs: BTreeMap<usize, Run>,
    waiting: Vec<(Seq, usize)>,
    tokens: u64,
    /// all blocks that were written, and not by its own later changes written over
    pub written: Vec<Written>,
    /// records that were sent: each must come to something at the server
    pub sent: BTreeMap<Seq, String>,
    /// up to here, what is to come to something was decided when it was sent first: what the
    /// optimiser left out then may be sent now, and passed over
    covered: Seq,
    first: BTreeSet<Seq>,
    /// since when it is online without a break, and the server thinks so as well
    pub healthy_since: Option<Micros>,
}

impl Client {
    pub fn new(no: usize) -> Client {
        Client {
            no,
            cache: Cache::new(),
            machine: None,
            life: 0,
            conn: None,
            volume_id: [0; 16],
            cutter: Cutter::default(),
            cutting: 0,
            look_at: None,
            settled: Seq(0),
            kept_at: 0,
            in_vain: 0,
            tickets: BTreeMap::new(),
            next_ticket: 0,
            listings: BTreeMap::new(),
            failed: BTreeMap::new(),
            runs: BTreeMap::new(),
            waiting: Vec::new(),
            tokens: 0,
            written: Vec::new(),
            sent: BTreeMap::new(),
            covered: Seq(0),
            first: BTreeSet::new(),
            healthy_since: None,
        }
    }
    pub fn start(&mut self, ctx: &mut Ctx) {
        let mut incarnation = [0; 16];
        incarnation[0] = self.no as u8 + 1;
        let node = self.cache.node;
        let (volume_id, host) = (self.volume_id, format!("c{}", self.no));
        let (volume, keeps) = ("v".into(), false);
        let who = Who { volume, incarnation, node, volume_id, host, keeps };
        let age = Duration::from_micros(ctx.setup.age);
        let settings = Settings { age, ..Settings::default() };
        let seed = ctx.rng.next();
        let (acked, current) = (self.cache.acked, self.cache.current);
        let mut machine = Machine::new(who, current, acked, settings, seed, ctx.instant(self.no));
        if ctx.setup.room.is_some() {
            machine.set_grant(self.cache.room.grant(&self.cache.journal, acked));
        }
        self.machine = Some(machine);
        self.settled = Seq(0);
        self.look_at = None;
        self.look(ctx);
        self.turn(ctx);
    }
    /// The process is gone, and whoever waited with it.
    pub fn stop(&mut self, ctx: &mut Ctx, power: bool) {
        self.machine = None;
        self.life += 1;
        self.cutting += 1;
        if let Some(conn) = self.conn.take() {
            ctx.die(conn, false, power);
        }
        self.cutter = Cutter::default();
        self.tickets.clear();
        self.listings.clear();
        self.failed.clear();
        self.waiting.clear();
        self.runs.clear();
        if power {
            let (contents, first) = self.cache.power_cut(&mut ctx.rng);
            self.written.retain(|w| w.seq < first && !contents.contains(&w.seq));
            ctx.tell(|| format!("c{}: records from {} on are lost", self.no, first.0));
        } else {
            self.cache.restart();
        }
        self.cache.heard = self.cache.acked;
        // The next life knows nothing of what this one left out: it may send that, to be passed over,
        // and leave out what this one sent.
        self.covered = self.covered.min(self.cache.last());
        self.first.retain(|seq| *seq <= self.cache.acked);
    }
    pub fn is_online(&self) -> bool {
        self.machine.as_ref().is_some_and(Machine::is_online)
    }
    pub fn acked(&self) -> Seq {
        self.machine.as_ref().map_or(self.cache.acked, Machine::acked)
    }

    // Events.

    pub fn on_wake(&mut self, ctx: &mut Ctx) {
        let now = ctx.instant(self.no);
        if let Some(machine) = &mut self.machine {
            machine.on_wake(now);
            if ctx.now >= self.kept_at + KEEP_EVERY {
                self.keep(ctx);
            }
            self.turn(ctx);
            let again = self.machine.as_ref().is_some_and(|machine| machine.wake_at() <= now);
            self.in_vain = if again { self.in_vain + 1 } else { 0 };
            if self.in_vain > IN_VAIN_MAX {
                ctx.fail(format!("c{} is woken again and again", self.no));
            }
        }
    }
    pub fn on_connected(&mut self, conn: usize, ctx: &mut Ctx) {
        let now = ctx.instant(self.no);
        if let Some(machine) = self.machine.as_mut().filter(|_| self.conn == Some(conn)) {
            machine.on_connected(now);
            self.turn(ctx);
        }
    }
    pub fn on_closed(&mut self, conn: usize, ctx: &mut Ctx) {
        let now = ctx.instant(self.no);
        if let Some(machine) = self.machine.as_mut().filter(|_| self.conn == Some(conn)) {
            (self.conn, self.listings) = (None, BTreeMap::new());
            machine.on_closed(now);
            self.turn(ctx);
        }
    }
    pub fn on_message(&mut self, conn: usize, packet: (u64, bool, Message), ctx: &mut Ctx) {
        let now = ctx.instant(self.no);
        if let Some(machine) = self.machine.as_mut().filter(|_| self.conn == Some(conn)) {
            let (id, answer, message) = packet;
            machine.on_heard(100, now);
            machine.on_message(id, answer, message, now);
            self.turn(ctx);
        }
    }
    pub fn on_later(&mut self, later: Later, ctx: &mut Ctx) {
        let now = ctx.instant(self.no);
        match later {
            Later::Look => self.look(ctx),
            Later::Cut { generation, after, upto } if generation == self.cutting => {
                let batch = self.cut(after, upto, ctx);
                let len = batch.as_ref().map_or(0, |batch| batch.items.len() as u64);
                if let Some(machine) = &mut self.machine {
                    machine.on_batch_cut(batch, len, now);
                }
            }
            Later::Cut { .. } => {}
            Later::BreakDone { conn, id } => {
                if let Some(machine) = self.machine.as_mut().filter(|_| self.conn == Some(conn)) {
                    machine.on_break_done(id);
                }
            }
            Later::Told { conn, recall_id } => {
                if let Some(machine) = self.machine.as_mut().filter(|_| self.conn == Some(conn)) {
                    machine.on_told(recall_id);
                }
            }
            Later::Go(step) => self.go(step, ctx),
        }
        self.turn(ctx);
    }
    pub fn begin(&mut self, step: usize, op: Op, ctx: &mut Ctx) {
        if self.machine.is_none() || self.cache.node == 0 {
            return; // nobody can ask for anything yet
        }
        self.runs.insert(step, Run::new(op, ctx.now));
        self.go(step, ctx);
        self.turn(ctx);
    }
    pub fn evict(&mut self, nth: u64, ctx: &mut Ctx) {
        let found = self.cache.evictable();
        if self.machine.is_none() || found.is_empty() {
            return;
        }
        let fid = found[nth as usize % found.len()];
        ctx.tell(|| format!("c{}: evicts {fid} {}", self.no, path(&self.cache.tree, fid)));
        if self.cache.has_unshipped(fid, self.acked()) {
            ctx.fail(format!("c{}: dirty data of {fid} are evicted", self.no));
        }
        self.cache.evict(fid);
    }

    // Operations.

    fn go(&mut self, step: usize, ctx: &mut Ctx) {
        let Some(mut run) = self.runs.remove(&step) else { return };
        self.cache.now_ns = ctx.now_ns(self.no);
        let (no, tokens) = (self.no as u64 + 1, &mut self.tokens);
        let mut token = || {
            *tokens += 1;
            no << 48 | *tokens
        };
        match run.go(&mut self.cache, &ctx.setup, &mut token) {
            Turn::Done { how, seen, written } => {
                ctx.tell(|| format!("c{}: #{step} {:?}: {how:?}", self.no, run.op));
                // who has just been cut off goes on with what is here
                let healthy = self.cache.online
                    && self.healthy_since.is_some_and(|since| since <= run.began_at);
                for seen in seen.iter().filter(|_| healthy) {
                    if let Err(why) = ctx.history.allows(seen, run.began_at) {
                        ctx.fail(format!("c{}: #{step} {:?}: {why}", self.no, run.op));
                    }
                }
                if how.is_ok() {
                    self.note_blocks(&run, &seen, ctx);
                }
                self.written.extend(written);
            }
            Turn::Want(want) => {
                self.want(want, Some(step), ctx);
                self.runs.insert(step, run);
            }
            Turn::Rest(time) => {
                self.runs.insert(step, run);
                ctx.later(time, self.no, self.life, Later::Go(step));
            }
            Turn::Acked(seq) if seq <= self.acked() => {}
            Turn::Acked(seq) => {
                self.runs.insert(step, run);
                self.waiting.push((seq, step));
                self.look_at = None;
                self.look(ctx);
                if let Some(machine) = &mut self.machine {
                    machine.on_ship_now(ctx.instant(self.no));
                }
            }
        }
        self.ring(ctx);
    }
    /// What was done with blocks of files, in strict mode.
    fn note_blocks(&self, run: &Run, seen: &[Seen], ctx: &mut Ctx) {
        if !ctx.setup.strict {
            return;
        }
        let (begin, end) = (run.began_at, ctx.now);
        for Seen { key, range, value } in seen {
            if let (Key::Data(fid), Value::Bytes(bytes)) = (key, value) {
                for (nth, block) in bytes.as_chunks().0.iter().enumerate() {
                    let at = range.0 + nth as u64 * BLOCK_LEN;
                    let value = u64::from_le_bytes(*block);
                    ctx.history.did((*fid, at), Event { begin, end, write: false, value });
                }
            }
        }
        let (fid, wrote) = run.wrote();
        for &(at, value) in wrote {
            ctx.history.did((fid, at), Event { begin, end, write: true, value });
        }
    }
    /// Ends an operation whose want cannot be met.
    fn fail(&mut self, step: usize, e: Errno, ctx: &mut Ctx) {
        let Some(mut run) = self.runs.remove(&step) else { return };
        self.cache.now_ns = ctx.now_ns(self.no);
        if let Turn::Done { written, .. } = run.end(&mut self.cache, Err(e)) {
            self.written.extend(written);
        }
        ctx.tell(|| format!("c{}: #{step} {:?}: fails with {e}", self.no, run.op));
        self.ring(ctx);
    }
    fn want(&mut self, want: Want, step: Option<usize>, ctx: &mut Ctx) {
        let (fid, need) = match want {
            Want::Dir(fid) => (fid, Need::Dir { fid, have: self.cache.version(fid) }),
            Want::Object(fid) => (fid, Need::Object { fid, have: self.cache.version(fid) }),
            Want::Permit(fids) => (fids[0], Need::Permit(fids)),
            Want::Room(room) => (Fid(0), Need::Room(room)),
            Want::Bytes(fid, from, to) => match self.cache.bytes(fid, from, to) {
                Some(bytes) => (fid, Need::Bytes(bytes)),
                None => {
                    let go = Later::Go(step.unwrap_or(usize::MAX));
                    return ctx.later(0, self.no, self.life, go);
                }
            },
        };
        self.failed.remove(&fid);
        self.next_ticket += 1;
        self.tickets.insert(self.next_ticket, (fid, step, ctx.now));
        if let Some(machine) = &mut self.machine {
            machine.on_want(need, self.next_ticket, ctx.instant(self.no));
        }
    }
    fn resolve(&mut self, ticket: Ticket, how: Result<(), Unmet>, ctx: &mut Ctx) {
        let Some((fid, Some(step), _)) = self.tickets.remove(&ticket) else { return };
        match (how, self.failed.get(&fid)) {
            (Ok(()), None) => self.go(step, ctx),
            (Ok(()), Some(e)) => self.fail(step, *e, ctx),
            (Err(Unmet::NoRoom), _) => self.fail(step, Errno::NOSPC, ctx),
            (Err(Unmet::Gone), _) => self.fail(step, Errno::STALE, ctx),
            (Err(_), _) => self.fail(step, Errno::HOSTUNREACH, ctx),
        }
    }
    /// The journal may have grown.
    fn ring(&mut self, ctx: &mut Ctx) {
        if self.cache.last() > self.settled && self.look_at.is_none() {
            self.look_at = Some(ctx.now);
            ctx.later(0, self.no, self.life, Later::Look);
        }
    }
    fn look(&mut self, ctx: &mut Ctx) {
        self.look_at = None;
        let settled = self.cache.last();
        if settled <= self.settled {
            return;
        }
        self.settled = settled;
        self.look_at = Some(ctx.now + BELL_PAUSE);
        ctx.later(BELL_PAUSE, self.no, self.life, Later::Look);
        let now = ctx.instant(self.no);
        let oldest_ns = self.cache.pending.oldest_ns().unwrap_or(u64::MAX);
        let age = Duration::from_nanos(ctx.now_ns(self.no).saturating_sub(oldest_ns));
        let oldest_at = now.checked_sub(age).unwrap_or(now);
        let written_len = self.cache.pending.written_len();
        if let Some(machine) = &mut self.machine {
            machine.on_bell(Bell { settled, written_len, oldest_at }, now);
        }
    }

    // Effects.

    fn turn(&mut self, ctx: &mut Ctx) {
        while let Some(effect) = self.machine.as_mut().and_then(Machine::poll) {
            self.carry_out(effect, ctx);
        }
        if let Some(machine) = &self.machine {
            let at = machine.wake_at();
            ctx.wake_client(self.no, at, self.kept_at + KEEP_EVERY);
        }
    }
    fn carry_out(&mut self, effect: Effect, ctx: &mut Ctx) {
        match effect {
            Effect::Connect => self.conn = Some(ctx.connect(self.no)),
            Effect::Close { why } => {
                ctx.tell(|| format!("c{}: closes: {why}", self.no));
                self.listings.clear();
                if let Some(conn) = self.conn.take() {
                    ctx.close(conn, false);
                }
            }
            Effect::Send { foreground, id, answer, message } => {
                if let Some(conn) = self.conn {
                    ctx.send((conn, true), !foreground, id, answer, message);
                }
            }
            Effect::Resolve { ticket, how } => self.resolve(ticket, how, ctx),
            Effect::Welcomed { node, volume_id, .. } => {
                (self.cache.node, self.volume_id) = (node, volume_id);
            }
            Effect::Refused { code, what } => {
                ctx.fail(format!("c{}: refused: {code:?} {what}", self.no));
            }
            Effect::NotTaken { what } => ctx.tell(|| format!("c{}: {what}", self.no)),
            Effect::MergePage { dir, first, mark, page } => {
                if first {
                    self.listings.remove(&dir);
                    self.failed.remove(&dir);
                }
                ctx.rights_changed = true;
                let listing = self.listings.entry(dir).or_default();
                if !self.cache.merge_page(listing, dir, page, mark) {
                    self.failed.insert(dir, Errno::STALE);
                }
            }
            Effect::FinishListing { dir, mark, fresh, mode } => {
                let listing = self.listings.remove(&dir).unwrap_or_default();
                if !self.failed.contains_key(&dir) {
                    self.cache.finish_listing(listing, dir, mark, fresh);
                    self.cache.rights.set(dir, mode);
                }
                ctx.rights_changed = true;
            }
            Effect::SetObject { object, mark, mode } => {
                self.cache.set_object(&object, mark);
                self.cache.rights.set(object.fid, mode);
                ctx.rights_changed = true;
            }
            Effect::WriteRange { fid, stamp, at, bytes, granule } => {
                self.cache.write_range(fid, stamp, at, &bytes, granule);
            }
            Effect::MarkStale { break_id, fids } => {
                self.cache.mark_stale(&fids);
                if let (Some(id), Some(conn)) = (break_id, self.conn) {
                    let pause = ctx.rng.pick(&[0, MS, 30 * MS]);
                    ctx.later(pause, self.no, self.life, Later::BreakDone { conn, id });
                }
            }
            // no locks are taken here: src/lento/locker has histories of its own
            Effect::LockEnded { .. } | Effect::LockLost { .. } => {}
            Effect::CatchUp { mut fids } => {
                fids.retain(|fid| self.cache.rights.mode(*fid) == Mode::None);
                self.cache.mark_stale(&fids);
            }
            Effect::BumpEpoch => self.cache.bump_epoch(),
            Effect::SetVolume { mode, raise } => {
                match raise {
                    true => self.cache.rights.raise_volume(mode),
                    false => self.cache.rights.set_volume(mode),
                }
                ctx.rights_changed = true;
            }
            Effect::Raise { fids, mode } => {
                let none = |fid: &Fid| self.cache.rights.mode(*fid) == Mode::None;
                let unknown: Vec<Fid> = fids.iter().copied().filter(none).collect();
                self.cache.mark_stale(&unknown);
                let rights = &mut self.cache.rights;
                fids.iter().for_each(|fid| rights.set(*fid, rights.mode(*fid).max(mode)));
                ctx.rights_changed = true;
            }
            Effect::SetModes { fids, mode } => {
                fids.iter().for_each(|fid| self.cache.rights.set(*fid, mode));
                ctx.rights_changed = true;
            }
            Effect::Lower { recall_id, fids, mode } => self.lower(recall_id, &fids, mode, ctx),
            Effect::CutBatch { after, upto } => {
                let generation = self.cutting;
                let pause = ctx.rng.pick(&[0, MS, 20 * MS]);
                let cut = Later::Cut { generation, after, upto };
                ctx.later(pause, self.no, self.life, cut);
            }
            Effect::RestartShipping => {
                self.cutting += 1;
                self.cutter = Cutter::default();
                // what did not arrive may be found to be void before it is sent again
                let acked = self.acked();
                self.sent.retain(|seq, _| *seq <= acked);
            }
            Effect::AnswerRead { id, read } => {
                let message = self.answer(&read);
                if let Some(conn) = self.conn {
                    ctx.send((conn, true), true, id, true, message);
                }
            }
            Effect::Acked { upto, stamps, conflicts } => {
                self.on_acked(upto, stamps, &conflicts, ctx)
            }
            Effect::ServerBehind { theirs, ours } => {
                let what = format!("it kept {} and has {}", ours.0, theirs.0);
                ctx.fail(format!("c{}: the server lost acknowledged records: {what}", self.no));
            }
            Effect::SpaceIs(_) | Effect::Conflicts(_) | Effect::ConflictAnswer { .. } => {}
            Effect::SetOnline(online) => {
                ctx.tell(|| format!("c{}: online: {online}", self.no));
                self.cache.online = online;
                if !online {
                    self.cache.pending.take_back();
                }
            }
            Effect::KeepGrant => self.cache.room.keep(),
            Effect::SaveCurrent(_) => self.keep(ctx),
        }
    }
    /// Others need what we may do.
    fn lower(&mut self, recall_id: u64, fids: &[Fid], mode: Mode, ctx: &mut Ctx) {
        let rights = &mut self.cache.rights;
        match fids {
            [] => rights.lower_volume(mode),
            _ => fids.iter().for_each(|fid| rights.set(*fid, rights.mode(*fid).min(mode))),
        }
        self.cache.now_ns = ctx.now_ns(self.no);
        self.cache.save_written(fids);
        self.look(ctx);
        let last = self.cache.last();
        let let_go = self.cache.pending.let_go(fids, last, mode == Mode::Read);
        let LetGo { upto, kept, gone } = let_go;
        gone.iter().for_each(|fid| self.cache.rights.set(*fid, Mode::None));
        if let Some(machine) = &mut self.machine {
            machine.on_lowered(recall_id, upto, kept, ctx.instant(self.no));
        }
        self.cache.mark_stale(&gone);
        if let Some(conn) = self.conn {
            let pause = ctx.rng.pick(&[0, MS, 30 * MS]);
            ctx.later(pause, self.no, self.life, Later::Told { conn, recall_id });
        }
    }
    fn keep(&mut self, ctx: &mut Ctx) {
        self.kept_at = ctx.now;
        self.cache.room.keep();
        if let Some(machine) = &self.machine {
            self.cache.keep(machine.acked(), machine.current());
            self.cache.pending.prune(machine.floor());
        }
    }
    fn on_acked(&mut self, upto: Seq, stamps: Vec<Stamped>, conflicts: &[Fid], ctx: &mut Ctx) {
        let stamps: Vec<(Fid, Stamp)> = stamps.iter().map(|s| (s.fid, s.stamp)).collect();
        self.cache.acknowledged(upto, &stamps, conflicts);
        self.cache.heard = self.cache.heard.max(upto);
        self.cache.pending.acked(upto);
        if let Some(machine) = &self.machine {
            self.cache.pending.prune(machine.floor());
        }
        for (_, step) in self.waiting.extract_if(.., |(seq, _)| *seq <= upto).collect::<Vec<_>>() {
            self.go(step, ctx);
        }
    }
    /// The answer to a read of the server's.
    fn answer(&mut self, read: &Read) -> Message {
        match self.cache.shipped(read.fid).filter(|file| !file.is_dir()) {
            None => {
                // what took it away must not be lost now
                self.cache.synced = self.cache.journal.len();
                Failed { code: Code::Gone, what: String::new() }.into()
            }
            Some(file) => {
                let size = file.data.len() as u64;
                let (from, to) = (read.at.min(size), (read.at + u64::from(read.len)).min(size));
                let bytes = file.data[from as usize..to as usize].to_vec();
                Data { at: read.at, bytes, size, token: file.token }.into()
            }
        }
    }

    // Batches.

    fn cut(&mut self, after: Seq, upto: Seq, ctx: &mut Ctx) -> Option<Batch> {
        let cutter = &mut self.cutter;
        if after != cutter.cut || cutter.read < cutter.cut {
            *cutter = Cutter { ready: VecDeque::new(), cut: after, read: after };
        }
        if cutter.read == cutter.cut {
            let upto = upto.min(self.cache.last());
            self.cache.synced = self.cache.synced.max(upto.0 as usize);
            let fresh = cutter.cut.0 as usize..upto.0.max(cutter.cut.0) as usize;
            // Contents as well: else a loss of power leaves others than the server has. (The real
            // worker makes the journal durable, and leaves the contents to the kernel.)
            for entry in &mut self.cache.journal[fresh.clone()] {
                entry.solid = true;
            }
            let records: Vec<(Seq, Record)> = fresh
                .filter(|nth| self.cache.journal[*nth].done)
                .map(|nth| (Seq(nth as u64 + 1), self.cache.journal[nth].record.clone()))
                .collect();
            (cutter.read, cutter.ready) = (upto.max(cutter.cut), optimise(&records).into());
        }
        if cutter.read == cutter.cut {
            return None;
        }
        let mut items = Vec::new();
        while items.len() < ctx.setup.batch_count_max {
            let Some((seq, record)) = cutter.ready.pop_front() else { break };
            if seq > self.covered {
                self.first.insert(seq);
            }
            if self.first.contains(&seq) {
                self.sent.insert(seq, format!("{:?}", record.op));
            }
            let data = content(&mut self.cache, &record, ctx.setup.inline_len_max);
            let wire = codec::encode_wire(&record, seq);
            items.push(Item { record: wire.expect("it fits"), data });
        }
        cutter.cut = match cutter.ready.front() {
            Some((next, _)) => Seq(next.0 - 1),
            None => cutter.read,
        };
        self.covered = self.covered.max(cutter.cut);
        Some(Batch { after, upto: cutter.cut, items })
    }

    /// Fetches something for nobody's operation.
    pub fn want_now(&mut self, want: Want, ctx: &mut Ctx) {
        self.want(want, None, ctx);
        self.turn(ctx);
    }
    pub fn is_waiting(&self) -> bool {
        !self.tickets.is_empty()
    }
    /// What waits for too long.
    pub fn check_waits(&self, ctx: &mut Ctx) {
        for (fid, step, since) in self.tickets.values() {
            if ctx.now > since + WANT_MAX {
                ctx.fail(format!("c{}: a want of {fid} (#{step:?}) never ends", self.no));
            }
        }
    }
}

/// The bytes that travel with the record: `None` when the server is to fetch them.
fn content(cache: &mut Cache, record: &Record, inline_len_max: usize) -> Option<Vec<u8>> {
    let Change::Store { fid, ranges, .. } = &record.op else { return None };
    if data_len(record) > inline_len_max as u64 {
        return None;
    }
    let Some(file) = cache.shipped(*fid).filter(|file| !file.is_dir()) else {
        // what took it away must not be lost now
        cache.synced = cache.journal.len();
        return Some(Vec::new());
    };
    let mut bytes = Vec::new();
    for range in ranges {
        let mut piece: Vec<u8> =
            file.data.iter().skip(range.at as usize).take(range.len as usize).copied().collect();
        // what a later truncation took reads as zeros: its record follows
        piece.resize(range.len as usize, 0);
        bytes.extend(piece);
    }
    Some(bytes)
}
