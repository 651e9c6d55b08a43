//! Shipping: when which records of the journal go to the server.
//!
//! ```text
//!   acked        sent            target        settled
//!   --|--- in flight ---|--- to be cut ---|--- ageing ---|
//! ```
//!
//! Batches follow each other without a gap, at most `WINDOW` in flight. The driver cuts one batch at
//! a time, so that contents are read when they are sent and not before. After a failure or a new
//! connection everything after `acked` is sent again.
//!
//! The server may have what was sent up to the end of any batch, though not durably, and passes over
//! what it has when it comes again. So what is on both sides of such an end is never optimised
//! together: a file that the server has would stay there if its creation and its removal cancelled
//! each other now. How far it has `seen` the journal, which a new connection says, is such an end, too:
//! a server that lost power may have a part of a batch.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::client::{Ask, Effect, Line};
use super::message::Batch;
use super::policy;
use crate::kml::record::Seq;

/// What the journal holds, as the driver reports it when it has grown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bell {
    /// every record up to here is done or void
    pub settled: Seq,
    /// contents that all records since the start announced, bytes; only grows
    pub written_len: u64,
    /// when the oldest record was made that the server does not have
    pub oldest_at: Instant,
}

/// No batch was acknowledged for too long.
pub(super) struct Stalled;

/// What an acknowledgement says.
pub(super) enum Heard {
    /// the batch is there
    All,
    /// only the beginning of it: the rest must be sent again
    Short,
    /// nothing so new was ever sent
    Nonsense,
}

struct InFlight {
    id: u64,
    upto: Seq,
    len: u64,
}

pub(super) struct Shipper {
    age: Duration,
    acked: Seq,
    sent: Seq,
    target: Seq,
    /// the server may have all up to one of these, ascending
    ends: VecDeque<Seq>,
    /// somebody else needs all up to here, settled or not
    recalled: Seq,
    settled: Seq,
    /// since when records beyond `target` wait
    ageing_since: Option<Instant>,
    written_len: u64,
    written_len_at_target: u64,
    cutting: bool,
    in_flight: VecDeque<InFlight>,
    /// nothing is sent before, because the server could not take a batch
    rest_until: Option<Instant>,
    fails: u32,
    moved_at: Instant,
    shipped_len: u64,
}

impl Shipper {
    pub fn new(acked: Seq, age: Duration, now: Instant) -> Shipper {
        Shipper {
            age,
            acked,
            sent: acked,
            target: acked,
            ends: VecDeque::new(),
            recalled: Seq(0),
            settled: acked,
            ageing_since: None,
            written_len: 0,
            written_len_at_target: 0,
            cutting: false,
            in_flight: VecDeque::new(),
            rest_until: None,
            fails: 0,
            moved_at: now,
            shipped_len: 0,
        }
    }
    pub fn acked(&self) -> Seq {
        self.acked
    }
    /// The newest record that is under way, or was acknowledged.
    pub fn sent(&self) -> Seq {
        self.sent
    }
    pub fn settled(&self) -> Seq {
        self.settled
    }
    pub fn shipped_len(&self) -> u64 {
        self.shipped_len
    }

    pub fn wake_at(&self) -> Option<Instant> {
        let stall = (!self.in_flight.is_empty()).then(|| self.moved_at + policy::SHIP_STALL);
        let due = self.ageing_since.map(|since| since + self.age);
        let work = match self.rest_until {
            Some(rest) => Some(rest),
            None => due,
        };
        [stall, work].into_iter().flatten().min()
    }

    pub fn on_wake(&mut self, line: &mut Line, now: Instant) -> Result<(), Stalled> {
        if !self.in_flight.is_empty() && now >= self.moved_at + policy::SHIP_STALL {
            return Err(Stalled);
        }
        if self.rest_until.is_some_and(|until| now >= until) {
            self.rest_until = None;
        }
        self.fill(line, now);
        Ok(())
    }

    pub fn on_bell(&mut self, bell: Bell, now: Instant) {
        self.settled = self.settled.max(bell.settled);
        self.written_len = self.written_len.max(bell.written_len);
        if self.settled > self.target && self.ageing_since.is_none() {
            // With nothing under way the oldest record is one that waits here.
            let idle = self.in_flight.is_empty() && self.sent == self.target;
            self.ageing_since = Some(if idle { bell.oldest_at.min(now) } else { now });
        }
    }

    /// Everything that is settled is to go.
    pub fn ask_all(&mut self) {
        self.target = self.target.max(self.settled);
        self.ageing_since = None;
        self.written_len_at_target = self.written_len;
    }

    /// What is in the journal up to here is to go as soon as it is settled.
    pub fn ask_upto(&mut self, upto: Seq) {
        self.recalled = self.recalled.max(upto);
    }

    /// Asks for the next batch if one is due and may go.
    pub fn fill(&mut self, line: &mut Line, now: Instant) {
        if let Some(since) = self.ageing_since {
            let waited = now.saturating_duration_since(since);
            let count = self.settled.0.saturating_sub(self.target.0);
            let len = self.written_len - self.written_len_at_target;
            if policy::ship_now(waited, self.age, count, len) {
                self.ask_all();
            }
        }
        self.target = self.target.max(self.recalled.min(self.settled));
        let may = !self.cutting && self.rest_until.is_none();
        if may && self.sent < self.target && self.in_flight.len() < policy::WINDOW {
            self.cutting = true;
            let end = self.ends.iter().find(|end| **end > self.sent);
            let upto = end.map_or(self.target, |end| self.target.min(*end));
            line.effect(Effect::CutBatch { after: self.sent, upto });
        }
    }

    pub fn on_batch_cut(&mut self, batch: Option<Batch>, len: u64, line: &mut Line, now: Instant) {
        self.cutting = false;
        let Some(batch) = batch else {
            // Nothing but what the server has: wait for the next bell.
            self.target = self.sent;
            return;
        };
        if batch.after != self.sent || batch.upto <= batch.after {
            return;
        }
        if self.in_flight.is_empty() {
            self.moved_at = now;
        }
        let upto = batch.upto;
        let id = line.ask(Ask::Batch, None, batch.into());
        self.in_flight.push_back(InFlight { id, upto, len });
        self.sent = upto;
        self.note_end(upto);
        self.fill(line, now);
    }

    fn note_end(&mut self, end: Seq) {
        if let Err(at) = self.ends.binary_search(&end) {
            self.ends.insert(at, end);
        }
    }

    /// The server fetches contents: shipping moves.
    pub fn on_read(&mut self, now: Instant) {
        self.moved_at = now;
    }

    pub fn on_acked(&mut self, id: u64, upto: Seq, now: Instant) -> Heard {
        if upto > self.settled {
            return Heard::Nonsense;
        }
        let whole = self.in_flight.iter().find(|batch| batch.id == id).map(|batch| batch.upto);
        if let Some(at) = self.in_flight.iter().position(|batch| batch.id == id) {
            let done = self.in_flight.drain(..=at);
            self.shipped_len += done.map(|batch| batch.len).sum::<u64>();
        }
        while self.in_flight.front().is_some_and(|batch| batch.upto <= upto) {
            self.in_flight.pop_front();
        }
        (self.moved_at, self.fails) = (now, 0);
        self.acked = self.acked.max(upto);
        self.ends.retain(|end| *end > upto);
        self.sent = self.sent.max(upto);
        self.target = self.target.max(upto);
        if whole.is_some_and(|whole| upto < whole) { Heard::Short } else { Heard::All }
    }

    /// The server could not take a batch: all that is not acknowledged goes again, after a rest.
    pub fn on_failed(&mut self, line: &mut Line, now: Instant) {
        for batch in self.in_flight.drain(..) {
            line.forget(batch.id);
        }
        self.rest_until = Some(now + policy::reship_after(self.fails));
        self.fails = self.fails.saturating_add(1);
        self.restart(line);
    }

    /// A new connection: the server says what it keeps, and what it has `seen`. False when that is
    /// more than the journal.
    pub fn on_welcome(&mut self, theirs: Seq, seen: Seq, line: &mut Line, now: Instant) -> bool {
        if theirs.max(seen) > self.settled {
            return false;
        }
        self.note_end(seen);
        self.in_flight.clear();
        self.rest_until = None;
        self.moved_at = now;
        if theirs < self.acked {
            line.effect(Effect::ServerBehind { theirs, ours: self.acked });
            self.acked = theirs;
        } else if theirs > self.acked {
            // The answer was lost with the connection before.
            self.acked = theirs;
            let (stamps, conflicts) = (Vec::new(), Vec::new());
            line.effect(Effect::Acked { upto: theirs, stamps, conflicts });
        }
        self.restart(line);
        true
    }

    fn restart(&mut self, line: &mut Line) {
        self.cutting = false;
        self.sent = self.acked;
        self.target = self.target.max(self.acked);
        line.effect(Effect::RestartShipping);
    }
}
