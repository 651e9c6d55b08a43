//! A client's locks: which it decides about alone, and which the server decides about.
//!
//! ```text
//!   here:  the own table decides                 there: the server does, the table only notes it
//!    ^  |                                                ^   |
//!    |  '-- not alone, recalled (hand_over), contended --'   |
//!    '------- nothing held or asked, and nobody else --------'
//! ```
//!
//! A client decides alone while it holds a write permit over the file and the server said, after
//! that began, that nobody else has locks of it; or offline (then locks hold among its own
//! processes, as far as that goes). What it keeps true:
//!
//! - The table has every lock of this node, wherever it was decided: on a new connection all that
//!   are not decided here are claimed before anything is asked. So the server has them, or says
//!   which it gave to somebody else: those are lost, and the next call of their owner fails.
//! - Waits are all here or all there: a circle of waits is seen by the one who sees all of them.
//! - Whoever asks is told in the end, once. What was asked of the server outlives a connection that
//!   breaks, and is asked anew (at the end of the queue) when the next one stands; when none stands
//!   within the grace of wants, it ends as [`Denied::Away`]. An unlock never waits for a server.
//!
//! Known to be weak: of one open file that asks for several flock locks at a time, the table may
//! note another kind than the server has, until it asks again.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::client::{Ask, Effect, Line};
use super::locks::{Denied, Lock, LockAsk, LockHeld, LockKind, Table, Ticket, WAITERS_MAX};
use super::message::{Claim, LockAnswer, LockCancel};
use super::rights::Mode;
use crate::kml::record::Fid;

/// The driver's name for an ask. Later asks have greater ones.
pub type Number = u64;
/// This node in its own table.
const US: u32 = 0;
/// Most asks that the server has not answered.
const ASKED_MAX: usize = 2 * WAITERS_MAX;
/// Most owners of whom it is remembered that a lock of theirs was lost.
const LOST_MAX: usize = 4096;

/// Whose: (object, owner, flock).
type Whose = (Fid, u64, bool);

/// An object whose locks the server decides about.
#[derive(Default)]
struct There {
    /// asks that are not answered
    asked: usize,
    /// other clients have locks of it, as far as is known
    others: bool,
}

/// An ask for the server.
struct Asked {
    ask: LockAsk,
    /// of the request, if it was sent over this connection
    id: Option<u64>,
    cancelled: bool,
    /// its owner is to hear that a lock was lost, whatever comes of this
    lost: bool,
}

/// Of which objects, as long as they may be changed, nobody else can have locks.
#[derive(Default)]
struct Sure {
    all: bool,
    /// objects of which the contrary holds
    except: HashSet<Fid>,
    /// of all: objects that may not be changed now
    lowered: HashSet<Fid>,
}

impl Sure {
    fn is(&self, fid: Fid) -> bool {
        self.all != self.except.contains(&fid)
    }
    fn set(&mut self, fid: Fid, sure: bool) {
        match sure == self.all {
            true => self.except.remove(&fid),
            false => self.except.insert(fid),
        };
    }
    fn set_all(&mut self, sure: bool) {
        *self = Sure { all: sure, ..Sure::default() };
    }
    fn lower(&mut self, fid: Fid) {
        self.set(fid, false);
        if self.all {
            self.lowered.insert(fid);
        }
    }
    /// It may be changed anew: what was said about it before may not hold any more. All of the
    /// volume is given to nobody while others have locks, so that what was not lowered since
    /// is still so.
    fn raise(&mut self, fid: Fid) {
        if !self.all || self.lowered.remove(&fid) {
            self.set(fid, false);
        }
    }
}

#[derive(Default)]
pub(super) struct Locker {
    table: Table,
    /// asks that wait here
    waits: HashMap<Ticket, (Number, LockAsk)>,
    there: HashMap<Fid, There>,
    asked: BTreeMap<Number, Asked>,
    /// claims that are not answered, by request
    claims: HashMap<u64, Vec<Lock>>,
    lost: HashSet<Whose>,
    sure: Sure,
    connected: bool,
    /// the server was told what is held, over this connection
    claimed: bool,
    /// the server may think that something is held
    is_known: bool,
}

impl Locker {
    /// Nobody waits for the server.
    pub fn is_idle(&self) -> bool {
        self.asked.is_empty()
    }

    /// Objects that have locks, or waits, that are decided here.
    fn decided_here(&self) -> BTreeSet<Fid> {
        let all = self.table.objects().into_iter();
        all.filter(|fid| !self.there.contains_key(fid)).collect()
    }

    /// Whether anything is held, that the server is to hear of when it meets us.
    pub fn has_locks(&mut self) -> bool {
        self.is_known |= !self.table.is_empty();
        !self.table.is_empty()
    }

    /// Whether nobody else can lock the object, if it may be changed, without our hearing of it.
    pub fn is_sure(&self, fid: Fid) -> bool {
        self.sure.is(fid)
    }

    /// The rights of this client change as the effect says.
    pub fn on_rights(&mut self, effect: &Effect) {
        match effect {
            Effect::SetVolume { mode, .. } => self.sure.set_all(*mode == Mode::Write),
            Effect::Raise { fids, mode: Mode::Write }
            | Effect::SetModes { fids, mode: Mode::Write } => {
                fids.iter().for_each(|fid| self.sure.raise(*fid));
            }
            Effect::Lower { fids, mode, .. } if fids.is_empty() => {
                self.sure.set_all(*mode == Mode::Write);
            }
            Effect::Lower { fids, .. } | Effect::SetModes { fids, .. } => {
                fids.iter().for_each(|fid| self.sure.lower(*fid))
            }
            Effect::MergePage { page, .. } => {
                page.read_only.iter().for_each(|fid| self.sure.lower(*fid));
            }
            Effect::FinishListing { dir: fid, mode, .. } => self.sure_of(*fid, *mode),
            Effect::SetObject { object, mode, .. } => self.sure_of(object.fid, *mode),
            _ => {}
        }
    }

    fn sure_of(&mut self, fid: Fid, mode: Mode) {
        match mode {
            Mode::Write => self.sure.raise(fid),
            _ => self.sure.lower(fid),
        }
    }

    /// Others need these objects (none: all of the volume): what is held of them goes to the
    /// server ahead of the answer.
    pub fn on_recall(&mut self, fids: &[Fid], line: &mut Line) {
        match fids {
            [] => self.hand_over(self.decided_here(), line),
            _ => self.hand_over(fids.iter().copied(), line),
        }
    }

    /// Somebody asks. `alone`: nobody else can lock the object without our hearing of it first.
    pub fn on_ask(&mut self, number: Number, ask: LockAsk, alone: bool, line: &mut Line) {
        let lost = self.lost.remove(&(ask.fid, ask.owner, ask.flock));
        if lost && !is_unlock(&ask) {
            return end(number, Err(Denied::Lost), line);
        }
        if self.there.contains_key(&ask.fid) || !alone {
            self.ask_there(number, ask, lost, line);
        } else if ask.test {
            end(number, Ok(self.table.test(US, &ask)), line);
        } else {
            self.set_here(number, ask, lost, line);
        }
    }

    fn set_here(&mut self, number: Number, ask: LockAsk, lost: bool, line: &mut Line) {
        match self.table.set(US, &ask) {
            Ok(None) => end(number, done(lost), line),
            Err(why) => end(number, Err(why), line),
            Ok(Some(ticket)) => {
                let fid = ask.fid;
                self.waits.insert(ticket, (number, ask));
                if !self.there.is_empty() {
                    self.hand_over([fid], line);
                }
            }
        }
        self.tell(line);
    }

    fn ask_there(&mut self, number: Number, ask: LockAsk, lost: bool, line: &mut Line) {
        if is_unlock(&ask) && !self.connected {
            self.table.note(US, &ask); // the next claim says it
            self.tell(line);
            return end(number, done(lost), line);
        }
        if self.asked.len() >= ASKED_MAX {
            return end(number, Err(Denied::NoRoom), line);
        }
        let waits_here =
            if self.there.is_empty() { self.table.contended() } else { BTreeSet::new() };
        self.hand_over(waits_here.into_iter().chain([ask.fid]), line);
        self.queue(number, ask, lost);
        self.send(number, line);
    }

    fn queue(&mut self, number: Number, ask: LockAsk, lost: bool) {
        self.there.entry(ask.fid).or_default().asked += 1;
        self.asked.insert(number, Asked { ask, id: None, cancelled: false, lost });
    }

    fn send(&mut self, number: Number, line: &mut Line) {
        let Some(asked) = self.asked.get(&number).filter(|_| self.connected) else { return };
        let ask = asked.ask.clone();
        self.claim(line);
        if self.table.exchanges(US, &ask) {
            // the server ends it now: it is not to be claimed again
            self.table.note(US, &LockAsk { kind: LockKind::Unlock, ..ask.clone() });
        }
        let id = line.ask(Ask::Lock { number }, None, ask.into());
        if let Some(asked) = self.asked.get_mut(&number) {
            asked.id = Some(id);
        }
    }

    /// Says, as the first thing over a connection, all that is held as far as the server decides.
    fn claim(&mut self, line: &mut Line) {
        if self.claimed {
            return;
        }
        (self.claimed, self.is_known) = (true, true);
        let mut fids: Vec<Fid> = self.there.keys().copied().collect();
        fids.sort_unstable();
        let locks = fids.iter().flat_map(|fid| self.table.locks(US, *fid)).collect();
        self.send_claim(true, locks, line);
    }

    fn send_claim(&mut self, fresh: bool, locks: Vec<Lock>, line: &mut Line) {
        let id = line.ask(Ask::Claim, None, Claim { fresh, locks: locks.clone() }.into());
        self.claims.insert(id, locks);
    }

    /// From now on the server decides about locks of these objects: it is told those that are
    /// held, ahead of whatever is sent after this, and asked for those that are waited for.
    fn hand_over(&mut self, fids: impl IntoIterator<Item = Fid>, line: &mut Line) {
        let (mut locks, mut moved) = (Vec::new(), Vec::new());
        for fid in fids {
            if self.there.contains_key(&fid) {
                continue;
            }
            let held = self.table.locks(US, fid);
            let tickets = self.table.withdraw(fid);
            if held.is_empty() && tickets.is_empty() {
                continue;
            }
            self.there.insert(fid, There::default());
            locks.extend(held);
            moved.extend(tickets.iter().filter_map(|ticket| self.waits.remove(ticket)));
        }
        if self.there.is_empty() {
            return;
        }
        if self.connected && self.claimed && !locks.is_empty() {
            self.send_claim(false, locks, line);
        } else if self.connected && !(locks.is_empty() && moved.is_empty()) {
            self.claim(line);
        }
        for (number, ask) in moved {
            self.queue(number, ask, false);
            self.send(number, line);
        }
    }

    /// The ask needs not be waited for any more.
    pub fn on_cancel(&mut self, number: Number, line: &mut Line) {
        if let Some((ticket, _)) = self.waits.iter().find(|(_, wait)| wait.0 == number) {
            self.table.cancel(*ticket);
            return self.tell(line);
        }
        let Some(asked) = self.asked.get_mut(&number).filter(|asked| asked.ask.wait) else {
            return;
        };
        match asked.id {
            // the server may have granted it at this moment: its answer counts
            Some(id) if !asked.cancelled => {
                asked.cancelled = true;
                line.tell(LockCancel { id }.into());
            }
            Some(_) => {}
            None => self.end_asked(number, Err(Denied::Interrupted), line),
        }
    }

    /// The server has answered an ask.
    pub fn on_answer(&mut self, number: Number, answer: &LockAnswer, line: &mut Line) {
        let Some(Asked { ask, .. }) = self.asked.get(&number) else { return };
        let ask = ask.clone();
        if let Some(there) = self.there.get_mut(&ask.fid) {
            there.others = answer.others;
        }
        self.sure.set(ask.fid, !answer.others);
        match answer.why {
            _ if ask.test => {}
            None => self.table.note(US, &ask),
            Some(_) => {}
        }
        let how = match answer.why {
            None if ask.test => Ok(answer.held),
            None => Ok(None),
            Some(why) => Err(why),
        };
        self.end_asked(number, how, line);
    }

    /// The server has answered a claim: of these locks, others have taken `lost`.
    pub fn on_claimed(&mut self, id: u64, lost: &[u32], line: &mut Line) {
        let locks = self.claims.remove(&id).unwrap_or_default();
        for lock in lost.iter().filter_map(|at| locks.get(*at as usize)) {
            let Lock { fid, owner, flock, held: LockHeld { start, end, pid, .. } } = *lock;
            let kind = LockKind::Unlock;
            let (wait, test) = (false, false);
            self.table.note(US, &LockAsk { fid, owner, flock, start, end, kind, pid, wait, test });
            if self.lost.len() < LOST_MAX {
                self.lost.insert((fid, owner, flock));
            }
            line.effect(Effect::LockLost { lock: *lock });
        }
    }

    /// The connection stands, and the cache has caught up. `alone`: with the whole volume.
    pub fn on_online(&mut self, alone: bool, line: &mut Line) {
        (self.connected, self.claimed) = (true, false);
        if !alone {
            self.hand_over(self.decided_here(), line);
        }
        if !self.there.is_empty() {
            self.hand_over(self.table.contended(), line);
        }
        if self.is_known || !self.there.is_empty() {
            self.claim(line);
        }
        // what still waits here does so because nothing is decided there
        for number in self.asked.keys().copied().collect::<Vec<_>>() {
            if self.asked.get(&number).is_some_and(|asked| asked.id.is_none()) {
                self.send(number, line);
            }
        }
    }

    /// The connection broke.
    pub fn on_away(&mut self, line: &mut Line) {
        self.connected = false;
        self.sure.set_all(false);
        self.claims.clear();
        for number in self.asked.keys().copied().collect::<Vec<_>>() {
            let Some(asked) = self.asked.get_mut(&number) else { continue };
            asked.id = None;
            if is_unlock(&asked.ask) {
                let ask = asked.ask.clone();
                self.table.note(US, &ask);
                self.end_asked(number, Ok(None), line);
            } else if asked.cancelled {
                self.end_asked(number, Err(Denied::Interrupted), line);
            }
        }
    }

    /// No connection stands in time: from now on all is decided here, and nobody waits.
    pub fn give_up(&mut self, line: &mut Line) {
        for number in self.asked.keys().copied().collect::<Vec<_>>() {
            self.end_asked(number, Err(Denied::Away), line);
        }
        self.there.clear();
    }

    fn end_asked(
        &mut self,
        number: Number,
        how: Result<Option<LockHeld>, Denied>,
        line: &mut Line,
    ) {
        let Some(Asked { ask, lost, .. }) = self.asked.remove(&number) else { return };
        if let Some(there) = self.there.get_mut(&ask.fid) {
            there.asked = there.asked.saturating_sub(1);
            if there.asked == 0 && !there.others && self.table.locks(US, ask.fid).is_empty() {
                self.there.remove(&ask.fid);
            }
        }
        end(number, if lost { done(lost) } else { how }, line);
        self.tell(line);
    }

    /// Tells those whose wait has ended here.
    fn tell(&mut self, line: &mut Line) {
        while let Some((ticket, how)) = self.table.poll() {
            if let Some((number, _)) = self.waits.remove(&ticket) {
                end(number, how.map(|()| None), line);
            }
        }
    }
}

fn is_unlock(ask: &LockAsk) -> bool {
    ask.kind == LockKind::Unlock && !ask.test
}

/// It is done, but perhaps its owner hears of a loss.
fn done(lost: bool) -> Result<Option<LockHeld>, Denied> {
    if lost { Err(Denied::Lost) } else { Ok(None) }
}

fn end(number: Number, how: Result<Option<LockHeld>, Denied>, line: &mut Line) {
    line.effect(Effect::LockEnded { number, how });
}

#[cfg(test)]
mod tests;
