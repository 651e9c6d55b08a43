//! The loop: events to the machine, its effects to the world. See client.rs for the picture.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};

use super::files::{answer_of, bytes_of, remote, remote_page};
use super::work::{Job, Worker};
use super::{In, Notify, Options, Peer, Shared, Waiter, Want};
use crate::kml::record::{Fid, Seq, Stamp};
use crate::lento::client::{Client, Effect, Settings, Ticket, Unmet, Want as Need, Who};
use crate::lento::message::*;
use crate::lento::rights::Mode;
use crate::lento::ship::Bell;
use crate::net::conn::{Conn, Lane};
use crate::net::poll::{Event, Loop, Stream};
use crate::net::room;
use crate::replica::cache::Cache;
use crate::replica::hydrate::{self, Notice};
use crate::replica::merge::{self, Listing};
use crate::replica::meta::Meta;
use crate::replica::room::{Figures, FiguresFile};
use crate::replica::tree::TreeError;
use crate::sys::clock;

mod link;
mod locks;
mod rights;

pub(super) use locks::LockWaiter;

/// How soon after a look at the journal the next one comes.
const BELL_PAUSE: Duration = Duration::from_millis(50);
/// How soon a change of the index is put into its file, and when everything is made durable.
const FLUSH_AFTER: Duration = Duration::from_secs(1);
const KEEP_EVERY: Duration = Duration::from_secs(30);
/// Reads of the server's that wait for room on the way out; a server that has more is not ours.
const READS_MAX: usize = 1024;

pub(super) struct Driver {
    shared: Arc<Shared>,
    cache: Arc<Cache>,
    peer: Peer,
    machine: Client,
    timeout: Duration,
    notifier: Box<dyn Notify>,
    event_loop: Loop,
    inbox: Receiver<In>,
    worker: Worker,
    link: Link,
    /// counts attempts to connect; names the socket in the loop
    generation: u64,
    resolving: bool,
    cutting: u64,
    tickets: HashMap<Ticket, (Fid, Waiter)>,
    next_ticket: Ticket,
    /// who asked for a lock, or after one, by number
    locks: HashMap<u64, LockWaiter>,
    /// who has asked about conflicts, by number
    conflicts: HashMap<u64, Sender<Result<Message, Failed>>>,
    last_conflict: u64,
    /// own records whose acknowledgement somebody waits for, and since when nothing moves
    waiting: Vec<(Seq, Instant, Waiter)>,
    /// who waits for the server to come back
    for_online: Vec<Waiter>,
    listings: HashMap<Fid, Listing>,
    /// objects whose last fetch the cache could not take
    failed: HashMap<Fid, i32>,
    reads: VecDeque<(u64, Read)>,
    settled: Seq,
    look_at: Option<Instant>,
    flush_at: Option<Instant>,
    keep_at: Instant,
    kept: (Seq, Stamp),
    /// the cache has changed since everything was made durable
    changed: bool,
    rate: Rate,
    grant_file: Option<Arc<FiguresFile>>,
    /// what stands there, if this life wrote it
    grant_kept: Figures,
    stop: bool,
}

enum Link {
    None,
    /// and the addresses to try next
    Connecting(Stream, Vec<std::net::SocketAddr>),
    Up(Box<Conn>),
}

/// Bytes per second that went out, smoothed.
struct Rate {
    since: Instant,
    out: u64,
    per_second: f64,
}

impl Driver {
    pub fn new(
        shared: Arc<Shared>,
        peer: Peer,
        options: Options,
        notifier: Box<dyn Notify>,
        event_loop: Loop,
        inbox: Receiver<In>,
        worker: Worker,
    ) -> Driver {
        let cache = shared.cache.clone();
        let (facts, now) = (cache.state.facts(), clock::now());
        let who = Who {
            volume: facts.volume.clone(),
            incarnation: facts.incarnation().to_be_bytes(),
            node: facts.node,
            volume_id: facts.volume_id().to_be_bytes(),
            host: options.host,
            keeps: options.keeps,
        };
        let (acked, current) = (cache.acked(), cache.current_stamp());
        // Any number does: clients differ in their incarnation, and attempts in their time.
        let seed = facts.incarnation() as u64 ^ u64::from(std::process::id());
        let settings = Settings { age: options.age, ..Settings::default() };
        let mut machine = Client::new(who, current, acked, settings, seed, now);
        let heard_ns = options.grant.kept().heard_ns;
        machine.set_grant(options.grant);
        if heard_ns > 0 {
            machine.was_away(clock::since_wall(heard_ns), now);
        }
        Driver {
            shared,
            peer,
            machine,
            timeout: settings.timeout,
            notifier,
            event_loop,
            inbox,
            worker,
            link: Link::None,
            generation: 0,
            resolving: false,
            cutting: 0,
            tickets: HashMap::new(),
            next_ticket: 0,
            locks: HashMap::new(),
            conflicts: HashMap::new(),
            last_conflict: 0,
            waiting: Vec::new(),
            for_online: Vec::new(),
            listings: HashMap::new(),
            failed: HashMap::new(),
            reads: VecDeque::new(),
            settled: Seq(0),
            look_at: Some(now),
            flush_at: None,
            keep_at: now + KEEP_EVERY,
            kept: (acked, current),
            changed: false,
            rate: Rate { since: now, out: 0, per_second: 0.0 },
            grant_file: options.grant_file,
            grant_kept: Figures::default(),
            stop: false,
            cache,
        }
    }

    pub fn run(mut self) {
        let mut events = Vec::new();
        self.look_at_journal(clock::now());
        while !self.stop {
            let now = clock::now();
            self.machine.on_wake(now);
            self.turn(now);
            let timeout = self.wake_at().saturating_duration_since(clock::now());
            if let Err(e) = self.event_loop.wait(Some(timeout), &mut events) {
                log::error!("the event loop cannot wait: {e}");
                break;
            }
            let now = clock::now();
            for event in &events {
                if let Event::Ready { token, .. } = event
                    && token.0 as u64 == self.generation
                {
                    self.on_ready(now);
                }
            }
            if let Link::Up(conn) = &self.link
                && conn.has_more()
            {
                self.on_ready(now);
            }
            while let Ok(what) = self.inbox.try_recv() {
                self.on_told(what, now);
                self.turn(now);
            }
            self.look_at_journal(now);
            self.keep_house(now);
        }
        self.finish();
    }

    fn wake_at(&self) -> Instant {
        if let Link::Up(conn) = &self.link
            && conn.has_more()
        {
            return clock::now();
        }
        let waiting = self.waiting.iter().map(|(_, since, _)| *since + self.timeout).min();
        let keep = self.must_keep().then_some(self.keep_at);
        let moving = (self.rate.per_second > 1.0).then(|| self.rate.since + FLUSH_AFTER);
        let all = [waiting, self.look_at, self.flush_at, keep, moving];
        all.into_iter().flatten().fold(self.machine.wake_at(), Instant::min)
    }

    fn must_keep(&self) -> bool {
        self.changed || self.kept != (self.machine.acked(), self.machine.current())
    }

    /// Carries out what the machine decided, until it has nothing more to say.
    fn turn(&mut self, now: Instant) {
        loop {
            while let Some(effect) = self.machine.poll() {
                self.carry_out(effect, now);
            }
            self.answer_reads();
            let Link::Up(conn) = &mut self.link else { break };
            match conn.flush() {
                Ok(()) => break,
                Err(fault) => self.lost(&fault.to_string(), now),
            }
        }
    }

    fn on_told(&mut self, what: In, now: Instant) {
        match what {
            In::Want(want, waiter) => self.on_want(want, waiter, now),
            In::Timeout(timeout) => {
                self.timeout = timeout;
                self.machine.set_timeout(timeout, now);
            }
            In::ShipNow => {
                self.look_at = Some(now);
                self.look_at_journal(now);
                self.machine.on_ship_now(now);
            }
            In::WaitAcked(seq, waiter) if seq <= self.machine.acked() => waiter.end(Ok(())),
            In::WaitAcked(seq, waiter) => {
                self.waiting.push((seq, now, waiter));
                self.on_told(In::ShipNow, now);
            }
            In::WaitOnline(waiter) if self.machine.is_online() => waiter.end(Ok(())),
            In::WaitOnline(waiter) => self.for_online.push(waiter),
            In::Keep => self.keep(now),
            In::Doubt(why) => {
                self.note_error(&why);
                self.bump_epoch();
            }
            In::WantSpace => self.machine.on_want_space(),
            In::Lock(number, ask, then) => self.on_lock(number, ask, then, now),
            In::CancelLock(number) => self.machine.on_lock_cancel(number),
            In::Conflicts(message, reply) => {
                self.last_conflict += 1;
                if self.machine.on_conflict_ask(self.last_conflict, message) {
                    self.conflicts.insert(self.last_conflict, reply);
                }
            }
            In::BreakDone { generation, id } if generation == self.generation => {
                self.machine.on_break_done(id);
            }
            In::BreakDone { .. } => {}
            In::Told { generation, recall_id } if generation == self.generation => {
                self.machine.on_told(recall_id);
            }
            In::Told { .. } => {}
            In::Resolved { found } => self.on_resolved(found, now),
            In::Cut { generation, cut } if generation == self.cutting => match cut {
                Ok(Some((batch, len))) => self.machine.on_batch_cut(Some(batch), len, now),
                Ok(None) => self.machine.on_batch_cut(None, 0, now),
                Err(e) => {
                    self.note_error(&format!("the journal cannot be shipped: {e}"));
                    self.machine.on_batch_cut(None, 0, now);
                }
            },
            In::Cut { .. } => {}
            In::Stop => {
                if self.cache.pending().is_empty() {
                    self.machine.farewell();
                    self.turn(now);
                }
                self.stop = true;
            }
        }
    }

    fn on_want(&mut self, want: Want, waiter: Waiter, now: Instant) {
        let (fid, need) = match want {
            Want::Dir(fid) => (fid, Need::Dir { fid, have: self.listed(fid) }),
            Want::Object(fid) => (fid, Need::Object { fid, have: self.version(fid) }),
            Want::Room(room) => (Fid(0), Need::Room(room)),
            Want::Permit(few) => {
                let fids: Vec<Fid> = few.into_iter().flatten().collect();
                let Some(first) = fids.first() else { return waiter.end(Ok(())) };
                (*first, Need::Permit(fids))
            }
            Want::Bytes { fid, at, len } => match bytes_of(&self.cache, fid, at, len) {
                Ok(Some(bytes)) => (fid, Need::Bytes(bytes)),
                Ok(None) => return waiter.end(Ok(())),
                Err(TreeError::Gone(_)) => return waiter.end(Err(Unmet::Gone)),
                Err(e) => return waiter.end(Err(Unmet::Local(e.errno().raw_os_error()))),
            },
        };
        self.failed.remove(&fid);
        self.next_ticket += 1;
        self.tickets.insert(self.next_ticket, (fid, waiter));
        self.machine.on_want(need, self.next_ticket, now);
    }

    /// The version of a directory whose entries were last all here.
    fn listed(&self, fid: Fid) -> Stamp {
        let meta = self.cache.tree.dir(fid).map(|dir| dir.meta());
        let here = |meta: &Meta| meta.complete && meta.epoch == self.cache.epoch();
        meta.ok().filter(here).map_or(Stamp(0), |meta| meta.stamp)
    }

    /// Of a file that is all here.
    fn version(&self, fid: Fid) -> Stamp {
        let meta = self.cache.tree.find(fid).map(|(_, _, meta)| meta);
        meta.ok().filter(|meta| meta.complete).map_or(Stamp(0), |meta| meta.stamp)
    }

    fn carry_out(&mut self, effect: Effect, now: Instant) {
        match effect {
            Effect::Connect => self.begin_to_connect(now),
            Effect::Close { why } => {
                self.note_error(&why);
                self.unlink();
            }
            Effect::Send { foreground, id, answer, message } => {
                let lane = if foreground { Lane::Foreground } else { Lane::Background };
                self.send(lane, id, answer, &message, now);
            }
            Effect::Resolve { ticket, how } => self.resolve(ticket, how),
            Effect::Welcomed { node, volume_id, volume, read_only } => {
                self.shared.facts().conflicts = 0; // it says at once if there are any
                self.on_welcomed((node, volume_id), volume, read_only);
            }
            Effect::Refused { code, what } => self.on_refused(code, what),
            Effect::NotTaken { what } => self.note_error(&what),
            Effect::MergePage { .. }
            | Effect::FinishListing { .. }
            | Effect::SetObject { .. }
            | Effect::WriteRange { .. } => {
                self.note_change(now);
                self.take_in(effect);
                for fid in self.cache.take_wanted() {
                    let want = Want::Bytes { fid, at: 0, len: u64::MAX };
                    self.on_want(want, Waiter(Some(Box::new(|_| ()))), now);
                }
            }
            Effect::MarkStale { break_id, fids } => self.mark_stale(break_id, &fids),
            Effect::CatchUp { fids } => self.catch_up(fids),
            Effect::BumpEpoch => {
                log::warn!(
                    "{}: the server's history does not reach back to what is known here: all of the \
                     cache is checked anew",
                    self.shared.server
                );
                self.bump_epoch();
            }
            Effect::SetVolume { mode, raise } => self.shared.rights.edit(|rights| match raise {
                true => rights.raise_volume(mode),
                false => rights.set_volume(mode),
            }),
            Effect::Raise { fids, mode } => self.raise(&fids, mode),
            Effect::SetModes { fids, mode } => self.shared.rights.edit(|rights| {
                for fid in fids {
                    rights.set(fid, mode);
                }
            }),
            Effect::Lower { recall_id, fids, mode } => self.lower(recall_id, &fids, mode, now),
            Effect::CutBatch { after, upto } => {
                // from now on each of these needs its own room
                self.shared.grant.sent(upto);
                let generation = self.cutting;
                self.worker.give(Job::Cut { generation, after, upto });
            }
            Effect::RestartShipping => {
                self.cutting += 1;
                self.worker.give(Job::Restart);
            }
            Effect::AnswerRead { id, read } if self.reads.len() < READS_MAX => {
                self.reads.push_back((id, read));
            }
            Effect::AnswerRead { .. } => self.lost("the server asks for too much at once", now),
            Effect::Acked { upto, stamps, conflicts } => {
                self.on_acked(upto, &stamps, &conflicts, now);
            }
            Effect::ServerBehind { theirs, ours } => {
                let what = match self.cache.fell_back(theirs, ours) {
                    Ok(what) => what,
                    Err(e) => format!("the server lost what it had, and the journal: {e}"),
                };
                self.note_error(&what);
                self.shared.facts().warning = Some(what);
            }
            Effect::SpaceIs(space) => {
                let mut held = self.shared.space.lock().unwrap_or_else(|e| e.into_inner());
                held.0 = space;
            }
            Effect::Conflicts(count) => self.shared.facts().conflicts = count,
            Effect::ConflictAnswer { number, how } => {
                if let Some(reply) = self.conflicts.remove(&number) {
                    let _ = reply.send(how); // who has asked may have given up
                }
            }
            Effect::LockEnded { number, how } => self.lock_ended(number, how),
            Effect::LockLost { lock } => self.lock_lost(&lock),
            Effect::SetOnline(online) => {
                self.shared.grant.note_there(clock::wall_ns());
                self.set_online(online);
                // What it was given while the server was away is no better than the rest.
                if online && self.shared.rights.edit(|rights| rights.volume()) == Mode::None {
                    self.forget_all(Box::new(|| ()));
                }
                if online {
                    self.for_online.drain(..).for_each(|waiter| waiter.end(Ok(())));
                }
            }
            Effect::KeepGrant => self.keep_grant_in_time(now),
            Effect::SaveCurrent(_) => self.keep(now),
        }
    }

    fn resolve(&mut self, ticket: Ticket, how: Result<(), Unmet>) {
        let Some((fid, waiter)) = self.tickets.remove(&ticket) else { return };
        match (how, self.failed.get(&fid)) {
            (Ok(()), Some(errno)) => waiter.end(Err(Unmet::Local(*errno))),
            (how, _) => waiter.end(how),
        }
    }

    // What comes in for the cache.

    fn take_in(&mut self, effect: Effect) {
        let rights = self.shared.rights.clone();
        // Nothing is trusted before it is here.
        let may = |fid: Fid, mode: Mode, done: &Result<Vec<Notice>, TreeError>| {
            let mode = if done.is_ok() { mode } else { Mode::None };
            rights.edit(|rights| rights.set(fid, mode));
        };
        let (fid, done) = match effect {
            Effect::MergePage { dir, first, mark, mut page } => {
                if first {
                    self.listings.remove(&dir);
                    self.failed.remove(&dir);
                }
                let listing = self.listings.entry(dir).or_default();
                let read_only = std::mem::take(&mut page.read_only);
                let done = merge::merge_page(&self.cache, listing, dir, remote_page(page), mark);
                let merged = listing.take_merged();
                rights.edit(|rights| rights.read(&merged, &read_only));
                (dir, done)
            }
            Effect::FinishListing { dir, mark, fresh, mode } => {
                let listing = self.listings.remove(&dir).unwrap_or_default();
                if self.failed.contains_key(&dir) {
                    return; // not all of it is here
                }
                let done = merge::finish_listing(&self.cache, listing, dir, mark, fresh);
                may(dir, mode, &done);
                (dir, done)
            }
            Effect::SetObject { object, mark, mode } => {
                let fid = object.fid;
                let done = hydrate::set_object(&self.cache, &remote(object), mark);
                may(fid, mode, &done);
                (fid, done)
            }
            Effect::WriteRange { fid, stamp, at, bytes, granule } => {
                let done = hydrate::write_range(&self.cache, fid, stamp, at, &bytes, granule);
                (fid, done.map(|()| Vec::new()))
            }
            _ => return,
        };
        match done {
            Ok(notices) => self.notify(notices, Box::new(|| ())),
            Err(e) => {
                self.note_error(&format!("the cache cannot take the object {fid}: {e}"));
                self.failed.insert(fid, e.errno().raw_os_error());
            }
        }
    }

    fn notify(&mut self, notices: Vec<Notice>, done: Box<dyn FnOnce() + Send>) {
        if notices.is_empty() {
            return done();
        }
        self.notifier.stale(notices, done);
    }

    fn on_acked(&mut self, upto: Seq, stamps: &[Stamped], conflicts: &[Fid], now: Instant) {
        let stamps: Vec<(Fid, Stamp)> = stamps.iter().map(|s| (s.fid, s.stamp)).collect();
        self.shared.facts().last_error = None;
        let (notices, marked) = hydrate::acked(&self.cache, upto, &stamps, conflicts, |fid| {
            self.shared.rights.mode(fid) != Mode::None
        });
        if let Err(e) = marked {
            self.note_error(&format!("new stamps cannot be noted: {e}"));
        }
        {
            let mut pending = self.cache.pending();
            pending.acked(upto);
            pending.prune(self.machine.floor().min(self.cache.acked()));
        }
        self.notify(notices, Box::new(|| ()));
        self.shared.acked.store(upto.0, Ordering::Release);
        if !conflicts.is_empty() {
            let count = conflicts.len();
            log::info!("of {count} objects the server keeps what others made of them");
        }
        for (_, since, _) in &mut self.waiting {
            *since = now;
        }
        for (_, _, waiter) in self.waiting.extract_if(.., |(seq, _, _)| *seq <= upto) {
            waiter.end(Ok(()));
        }
        let _facts = self.shared.facts(); // so that no waiter misses it
        self.shared.changed.notify_all();
    }

    // What goes out of the cache.

    fn answer_reads(&mut self) {
        while let Link::Up(conn) = &mut self.link {
            if !conn.has_room(Lane::Background) {
                return;
            }
            let Some((id, read)) = self.reads.pop_front() else { return };
            let message = answer_of(&self.cache, &read);
            if let Err(e) = conn.send(Lane::Background, id, true, &message) {
                log::error!("an answer of {} bytes is too long: {e}", read.len);
            }
        }
    }

    /// Tells the machine what is in the journal, but not for each record.
    fn look_at_journal(&mut self, now: Instant) {
        match self.look_at {
            Some(at) if now < at => return,
            None if !self.cache.bell.is_rung() => return,
            _ => {}
        }
        let settled = self.cache.log.settled_through();
        if settled <= self.settled {
            self.look_at = None;
            self.cache.bell.rearm();
            if self.cache.log.settled_through() > self.settled {
                self.cache.bell.ring();
            }
            return;
        }
        (self.settled, self.look_at) = (settled, Some(now + BELL_PAUSE));
        self.note_change(now);
        let (written_len, oldest_ns) = {
            let pending = self.cache.pending();
            (pending.written_len(), pending.oldest_ns())
        };
        let age = oldest_ns.map_or(Duration::ZERO, clock::age_of);
        let oldest_at = now.checked_sub(age).unwrap_or(now);
        self.machine.on_bell(Bell { settled, written_len, oldest_at }, now);
        self.turn(now);
    }

    // Housekeeping.

    fn note_change(&mut self, now: Instant) {
        self.changed = true;
        self.flush_at.get_or_insert(now + FLUSH_AFTER);
    }

    fn keep_house(&mut self, now: Instant) {
        if self.flush_at.is_some_and(|at| now >= at) {
            self.flush_at = None;
            if room::figures(&self.shared.grant) != self.grant_kept {
                self.keep_grant();
            }
            self.worker.give(Job::Flush);
        }
        if now >= self.keep_at && self.must_keep() {
            self.keep(now);
        }
        let timeout = self.timeout;
        let late = |since: &Instant| now >= *since + timeout;
        let online = self.machine.is_online();
        for (_, since, _) in &mut self.waiting {
            if online && late(since) {
                *since = now; // the server is there, and works
            }
        }
        for (_, _, waiter) in self.waiting.extract_if(.., |(_, since, _)| late(since)) {
            waiter.end(Err(Unmet::Unreachable));
        }
        let floor = self.machine.floor().min(self.cache.acked());
        self.cache.pending().prune(floor);
        let passed = now.saturating_duration_since(self.rate.since);
        if passed >= FLUSH_AFTER {
            let out = match &self.link {
                Link::Up(conn) => conn.bytes_out(),
                _ => self.rate.out,
            };
            let fresh = out.saturating_sub(self.rate.out) as f64 / passed.as_secs_f64();
            let per_second = (self.rate.per_second * 2.0 + fresh) / 3.0;
            self.rate = Rate { since: now, out, per_second };
        }
        let mut facts = self.shared.facts();
        facts.away_at = self.machine.away_at();
        facts.rate = self.rate.per_second as u64;
        facts.messages = self.machine.messages();
        facts.requests_foreground = self.machine.requests_foreground();
        facts.shipped_len = self.machine.shipped_len();
    }

    fn keep(&mut self, now: Instant) {
        (self.keep_at, self.changed) = (now + KEEP_EVERY, false);
        // Before the journal's cursor: charges up to there are not found again.
        self.keep_grant();
        self.kept = (self.machine.acked(), self.machine.current());
        self.worker.give(Job::Keep { acked: self.kept.0, current: self.kept.1 });
    }

    /// Before anything goes out that takes back what the file says: the next life must not use it
    /// again. What is granted on top has time, unless it is most of what there is.
    fn keep_grant_in_time(&mut self, now: Instant) {
        match room::must_keep(&self.shared.grant, &self.grant_kept) {
            true => self.keep_grant(),
            false => drop(self.flush_at.get_or_insert(now + FLUSH_AFTER)),
        }
    }

    fn keep_grant(&mut self) {
        let Some(file) = &self.grant_file else { return };
        if self.machine.is_online() {
            self.shared.grant.note_there(clock::wall_ns());
        }
        self.grant_kept = room::figures(&self.shared.grant);
        if let Err(e) = file.keep(&self.grant_kept) {
            self.grant_kept = Figures::default();
            let dropped = file.drop_figures();
            let rest = dropped.err().map_or(String::new(), |e| format!("; nor dropped: {e}"));
            self.note_error(&format!("what was granted cannot be kept: {e}{rest}"));
        }
    }

    fn finish(mut self) {
        self.keep(clock::now());
        self.link = Link::None;
        self.cache.set_online(false);
        self.worker.finish();
        if let Some(file) = &self.grant_file
            && let Err(e) = file.close(&room::figures(&self.shared.grant))
        {
            log::warn!("what was granted is not kept: {e}");
        }
        self.shared.facts().connected = false;
        // Waiters that are left are told by being dropped, here and in the inbox.
    }
}
