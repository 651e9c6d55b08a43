//! The client's rights: what is given, what is let go for others, and when to ask for more.
//!
//! ```text
//!   Recall --Lower--> driver --on_lowered(target), on_told--> sent up to target --> Released
//! ```

use std::time::Instant;

use super::{Ask, Client, Effect, State};
use crate::kml::record::{Fid, Seq, Stamp};
use crate::lento::message::{Recall, Released, Since};
use crate::lento::policy;
use crate::lento::rights::Mode;

/// A recall that is not answered yet.
pub(super) struct Letting {
    id: u64,
    /// `None` until the driver says that nobody works by the old rights any more
    target: Option<Seq>,
    kept: Vec<Fid>,
    /// the kernel has forgotten what may not be read
    told: bool,
}

impl Client {
    /// How many are remembered, for one reason or another.
    pub(super) fn recalls(&self) -> usize {
        self.lettings.len() + self.held_back.len() + self.recalled.len()
    }

    pub(super) fn on_recall(&mut self, id: u64, m: Recall, now: Instant) {
        if self.state == State::CatchingUp || self.asks_all {
            self.recalled.push(m.clone());
        }
        self.lettings.push(Letting { id, target: None, kept: Vec::new(), told: false });
        if m.fids.is_empty() {
            self.volume = self.volume.min(m.mode);
        }
        let acked = self.acked();
        self.fetcher.on_recall(&m.fids, acked, &mut self.line, now);
        self.locker.on_recall(&m.fids, &mut self.line);
        self.line.effect(Effect::Lower { recall_id: id, fids: m.fids, mode: m.mode });
    }

    /// Nobody works by the recalled rights any more. They are let go when everything up to `target`
    /// is on its way; `kept` is still read.
    pub fn on_lowered(&mut self, recall_id: u64, target: Seq, kept: Vec<Fid>, now: Instant) {
        let Some(letting) = self.lettings.iter_mut().find(|l| l.id == recall_id) else { return };
        (letting.target, letting.kept) = (Some(target), kept);
        self.shipper.ask_upto(target);
        self.ship(now);
        self.let_go();
    }

    /// The kernel has forgotten what may not be read any more.
    pub fn on_told(&mut self, recall_id: u64) {
        if let Some(letting) = self.lettings.iter_mut().find(|l| l.id == recall_id) {
            letting.told = true;
            self.let_go();
        }
    }

    /// Answers the recalls that are done.
    pub(super) fn let_go(&mut self) {
        let sent = self.shipper.sent();
        let is_done = |l: &mut Letting| l.told && l.target.is_some_and(|target| target <= sent);
        for letting in self.lettings.extract_if(.., is_done).collect::<Vec<_>>() {
            self.line.message_count += 1;
            let upto = letting.target.unwrap_or_default();
            let message = Released { kept: letting.kept, upto }.into();
            let id = letting.id;
            self.line.effect(Effect::Send { foreground: true, id, answer: true, message });
        }
    }

    /// The mount ends, with nothing left to be shipped: others need not wait for it.
    pub fn farewell(&mut self) {
        if self.is_online() {
            self.asker.farewell(&mut self.line);
            let (message, id) = (Released { kept: Vec::new(), upto: Seq(0) }.into(), 0);
            self.line.effect(Effect::Send { foreground: true, id, answer: false, message });
        }
    }

    pub(super) fn set_volume(&mut self, mode: Mode, raise: bool) {
        self.volume = mode;
        self.line.effect(Effect::SetVolume { mode, raise });
    }

    /// Somebody has to ask. Who does so often asks for all at once.
    pub(super) fn note_asking(&mut self, now: Instant) {
        if self.volume != Mode::None || self.asks_all || !self.is_online() {
            return;
        }
        self.asked_at.push_back(now);
        if self.asked_at.len() >= policy::ASKS_MAX
            && let Some(first) = self.asked_at.pop_front()
            && now < first + policy::ASKS_WITHIN
        {
            self.asks_all = true;
            self.asked_at.clear();
            self.since(Ask::ReadAll, self.current, now);
        }
    }

    pub(super) fn since(&mut self, ask: Ask, stamp: Stamp, now: Instant) {
        self.asked_from = stamp;
        let read_all = ask == Ask::ReadAll;
        self.line.ask(ask, Some(now), Since { stamp, read_all }.into());
    }
}
