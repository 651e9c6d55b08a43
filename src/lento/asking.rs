//! The client's side of reservations: who waits for room, and what others are given back.
//!
//! ```text
//!   Idle --somebody lacks room--> Asked --enough--> Idle
//!                                   |short
//!                                   v
//!                        Shipping what pends: deletions make room only there
//!                                   |there, or RECALL_MAX
//!                                   v
//!                                 Asked again --short--> no room; for a moment nobody asks
//! ```
//!
//! Every wait ends in bounded time. What is given back is kept on the disk ([`Effect::KeepGrant`])
//! before the server hears of it. Figures are in grant.rs, the server's side in granting.rs.
//! No I/O, no clock.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::client::{Ask, Effect, Line, Ticket, Unmet};
use super::grant::Grant;
use super::message::{GivenBack, RoomAsk, RoomHeld, RoomTerms};
use super::policy;
use super::room::Room;
use super::ship::Shipper;
use crate::kml::record::Seq;

/// Most requests of the server's for room that wait; one that sends more is not ours.
const GIVE_BACKS_MAX: usize = 64;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Idle,
    Asked,
    /// until the server has everything up to there
    Shipping {
        upto: Seq,
        until: Instant,
    },
}

/// A request of the server's that is not answered.
struct Recall {
    id: u64,
    upto: Seq,
    until: Instant,
}

pub(super) struct Asker {
    grant: Arc<Grant>,
    stage: Stage,
    /// asked once more already, after everything was shipped
    again: bool,
    waiting: Vec<(Room, Ticket)>,
    recalls: Vec<Recall>,
    refused_until: Option<Instant>,
    /// asking ahead brought nothing: not before this again
    ahead_at: Option<Instant>,
    told: Room,
    tell_at: Option<Instant>,
    /// how long the server keeps what it grants while we are away
    keep: Duration,
    ends_at: Option<Instant>,
}

impl Asker {
    pub fn new(grant: Arc<Grant>) -> Asker {
        let keep = match grant.kept().keep_ms {
            0 => policy::KEEP_GRANT,
            ms => Duration::from_millis(ms),
        };
        Asker {
            grant,
            stage: Stage::Idle,
            again: false,
            waiting: Vec::new(),
            recalls: Vec::new(),
            refused_until: None,
            ahead_at: None,
            told: Room::NONE,
            tell_at: None,
            keep,
            ends_at: None,
        }
    }
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty()
    }
    pub fn hello(&self) -> Option<RoomHeld> {
        self.grant.hello()
    }

    pub fn on_welcome(&mut self, terms: Option<&RoomTerms>, line: &mut Line) {
        self.grant.welcome(terms);
        if let Some(terms) = terms {
            self.keep = Duration::from_millis(terms.keep_ms);
            self.told = terms.returned;
            line.effect(Effect::KeepGrant);
        }
        (self.stage, self.again, self.ends_at) = (Stage::Idle, false, None);
        (self.refused_until, self.ahead_at) = (None, None);
    }
    pub fn on_online(&mut self, line: &mut Line, now: Instant) {
        self.look(line, now);
    }
    pub fn on_away(&mut self, now: Instant) {
        self.grant.away();
        (self.stage, self.tell_at) = (Stage::Idle, None);
        self.recalls.clear();
        // An attempt to come back that fails makes it no later.
        self.ends_at = self.ends_at.or_else(|| now.checked_add(self.kept_for()));
    }
    /// The life before this one ended without the server, which was last there so long ago.
    pub fn was_away(&mut self, ago: Duration, now: Instant) {
        let left = self.kept_for().saturating_sub(ago);
        self.ends_at = now.checked_add(left);
        if left.is_zero() {
            self.grant.end();
        }
    }
    /// We stop a little earlier than the server stops to keep it.
    fn kept_for(&self) -> Duration {
        self.keep.saturating_sub(self.keep / 16)
    }
    /// Away from the server nobody is asked any more.
    pub fn give_up(&mut self, line: &mut Line) {
        for (need, ticket) in std::mem::take(&mut self.waiting) {
            line.resolve([ticket], self.without_more(need));
        }
    }
    /// How a want ends for which nobody is asked.
    pub fn without_more(&self, need: Room) -> Result<(), Unmet> {
        match need.is_none() || self.grant.takes_any() {
            true => Ok(()),
            false => Err(Unmet::NoRoom),
        }
    }

    /// Before the server listens there is nothing to do but to give up.
    pub fn wake_at(&self, online: bool) -> Option<Instant> {
        if !online {
            return self.ends_at;
        }
        let shipping = match self.stage {
            Stage::Shipping { until, .. } => Some(until),
            _ => None,
        };
        let recall = self.recalls.iter().map(|recall| recall.until).min();
        [shipping, recall, self.tell_at, self.ends_at].into_iter().flatten().min()
    }
    pub fn on_wake(&mut self, online: bool, shipper: &mut Shipper, line: &mut Line, now: Instant) {
        if self.ends_at.take_if(|at| now >= *at).is_some() {
            self.grant.end();
        }
        if !online {
            return;
        }
        self.answer_recalls(shipper.acked(), line, now);
        if self.tell_at.take_if(|at| now >= *at).is_some() {
            self.tell(line);
        }
        if matches!(self.stage, Stage::Shipping { until, .. } if now >= until) {
            self.stage = Stage::Idle;
        }
        self.look(line, now);
    }

    /// Somebody lacks room.
    pub fn on_want(
        &mut self,
        need: Room,
        ticket: Ticket,
        online: bool,
        line: &mut Line,
        now: Instant,
    ) {
        if self.refused_until.is_some_and(|until| now < until) && !self.grant.covers(need) {
            return line.resolve([ticket], Err(Unmet::NoRoom));
        }
        self.waiting.push((need, ticket));
        if online {
            self.look(line, now);
        }
    }

    /// Serves those for whom there is room, and asks for the others.
    pub fn look(&mut self, line: &mut Line, now: Instant) {
        if self.grant.is_off() {
            let tickets = std::mem::take(&mut self.waiting).into_iter().map(|(_, ticket)| ticket);
            return line.resolve(tickets, Ok(()));
        }
        let figures = self.grant.figures();
        let mut left = figures.free;
        let mut served = Vec::new();
        // who needs nothing waits for the server's first word
        let heard = self.grant.is_heard();
        self.waiting.retain(|(need, ticket)| match left.minus(*need) {
            Some(rest) if heard || !need.is_none() => {
                left = rest;
                served.push(*ticket);
                false
            }
            _ => true,
        });
        line.resolve(served, Ok(()));
        if self.stage != Stage::Idle {
            return;
        }
        let waiting: Room = self.waiting.iter().map(|(need, _)| *need).sum();
        let lacks = self.grant.lacks();
        if !waiting.is_none() {
            return self.ask(waiting.less(left).plus(lacks), false, line, now);
        }
        let rests = self.ahead_at.is_some_and(|at| now < at);
        let is_low = figures.is_low || !lacks.is_none() || !heard;
        if is_low && !rests {
            self.ahead_at = Some(now + policy::TELL_AFTER);
            self.ask(policy::LOW.less(left).plus(lacks), true, line, now);
        }
    }
    fn ask(&mut self, need: Room, ahead: bool, line: &mut Line, now: Instant) {
        let Some(held) = self.hello() else { return };
        // More is no message that the server takes; and it has no more.
        let need = need.min(Room::MOST);
        (self.told, self.tell_at) = (held.returned, None);
        self.stage = Stage::Asked;
        line.effect(Effect::KeepGrant);
        line.ask(Ask::Room, Some(now), RoomAsk { held, need, ahead }.into());
    }

    pub fn on_terms(
        &mut self,
        terms: &RoomTerms,
        shipper: &mut Shipper,
        line: &mut Line,
        now: Instant,
    ) {
        self.grant.hear(terms);
        line.effect(Effect::KeepGrant);
        if !self.grant.figures().is_low {
            self.ahead_at = None;
        }
        self.stage = Stage::Asked; // so that it serves, and asks for nobody
        self.look(line, now);
        self.stage = Stage::Idle;
        if !terms.short || self.waiting.is_empty() {
            self.again = false;
            return match self.waiting.is_empty() {
                true => {}
                false => self.look(line, now),
            };
        }
        if !self.again && shipper.acked() < shipper.settled() {
            self.again = true;
            let (upto, until) = (shipper.settled(), now + policy::RECALL_MAX);
            self.stage = Stage::Shipping { upto, until };
            shipper.ask_all();
            return shipper.fill(line, now);
        }
        self.again = false;
        self.refused_until = Some(now + policy::REFUSED);
        self.give_up(line);
    }
    /// The server failed the request.
    pub fn on_failed(&mut self, line: &mut Line, now: Instant) {
        self.grant.heard();
        (self.stage, self.again) = (Stage::Idle, false);
        self.refused_until = Some(now + policy::REFUSED);
        self.give_up(line);
    }

    /// Others lack room: what waits here is shipped, and what nobody uses given back.
    pub fn on_give_back(
        &mut self,
        id: u64,
        online: bool,
        shipper: &mut Shipper,
        line: &mut Line,
        now: Instant,
    ) -> Result<(), ()> {
        if self.recalls.len() >= GIVE_BACKS_MAX {
            return Err(());
        }
        shipper.ask_all();
        if online {
            shipper.fill(line, now); // else it does so as soon as it is
        }
        let (upto, until) = (shipper.settled(), now + policy::GIVE_BACK_MAX);
        self.recalls.push(Recall { id, upto, until });
        self.answer_recalls(shipper.acked(), line, now);
        Ok(())
    }
    fn answer_recalls(&mut self, acked: Seq, line: &mut Line, now: Instant) {
        let done = |recall: &mut Recall| recall.upto <= acked || now >= recall.until;
        let done: Vec<Recall> = self.recalls.extract_if(.., done).collect();
        if done.is_empty() {
            return;
        }
        let waiting: Room = self.waiting.iter().map(|(need, _)| *need).sum();
        self.grant.give_back_all_but(waiting);
        // It would be asked back at once.
        self.ahead_at = Some(now + policy::TELL_AFTER);
        let Some(held) = self.hello() else { return };
        (self.told, self.tell_at) = (held.returned, None);
        line.effect(Effect::KeepGrant);
        for recall in done {
            let (message, id) = (GivenBack { held }.into(), recall.id);
            line.message_count += 1;
            line.effect(Effect::Send { foreground: true, id, answer: true, message });
        }
    }

    /// The server has everything up to here.
    pub fn on_acked(&mut self, upto: Seq, line: &mut Line, now: Instant) {
        self.grant.acked(upto);
        self.refused_until = None;
        if self.grant.is_off() {
            return;
        }
        self.tell_at.get_or_insert(now + policy::TELL_AFTER);
        self.answer_recalls(upto, line, now);
        if matches!(self.stage, Stage::Shipping { upto: all, .. } if all <= upto) {
            self.stage = Stage::Idle;
            self.look(line, now);
        }
    }
    /// Records went out.
    pub fn on_sent(&mut self, upto: Seq) {
        self.grant.sent(upto);
    }
    /// Says what became free.
    fn tell(&mut self, line: &mut Line) {
        if let Some(held) = self.hello().filter(|held| held.returned != self.told) {
            self.told = held.returned;
            line.effect(Effect::KeepGrant);
            line.message_count += 1;
            line.tell(GivenBack { held }.into());
        }
    }
    /// The mount ends, with nothing left to be shipped. The next one may begin without the server,
    /// and must have something to write with.
    pub fn farewell(&mut self, line: &mut Line) {
        self.grant.give_back_all_but(policy::kept_free(self.grant.figures().free));
        self.tell(line);
    }
}
