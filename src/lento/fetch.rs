//! Fetching: what callers wait for, as few requests as will do.
//!
//! Callers that want the same directory, object or granule share one request. A directory comes
//! page by page; if it is broken or recalled meanwhile it is begun again. A granule comes in pieces of at most
//! `RANGE_LEN_MAX`, one after another; `READS_MAX` pieces are under way at one time, those that
//! somebody waits for before those that are fetched ahead. Requests remember `acked` as it was
//! when they were sent (`mark`): a newer own change wins over what they bring. Nothing is lost by
//! a connection that breaks: `on_online` asks again for all that is still wanted.
//!
//! How many callers wait is bounded by who calls: each has a request of the kernel's open.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Instant;

use super::client::{Ask, Bytes, Effect, Line, Ticket, Unmet, Want};
use super::message::*;
use super::policy;
use crate::kml::record::{Fid, Seq, Stamp};

/// Most files whose reading is watched for its direction.
const READERS_MAX: usize = 256;

struct Listing {
    tickets: Vec<Ticket>,
    have: Stamp,
    mark: Seq,
    request: Option<u64>,
    after: Vec<u8>,
    restarts: u32,
    /// it changed while it was listed, and too often to begin again
    stale: bool,
}

struct Look {
    tickets: Vec<Ticket>,
    mark: Seq,
    have: Stamp,
}

/// Objects that somebody wants to change.
struct Permit {
    no: u64,
    fids: Vec<Fid>,
    tickets: Vec<Ticket>,
}

struct File {
    stamp: Stamp,
    granule_len: u64,
    base_size: u64,
    /// who waits, and for which granules that are not here yet
    wants: Vec<(Ticket, Vec<u64>)>,
    /// granules that are under way or to come, by where they begin
    pieces: BTreeMap<u64, Piece>,
}

#[derive(Default)]
struct Piece {
    got_len: u64,
    token: Option<u64>,
    request: Option<u64>,
    /// somebody waits for it
    waited: bool,
}

struct Reader {
    /// where a reader that goes on will ask next
    next: u64,
    ahead: u32,
}

#[derive(Default)]
pub(super) struct Fetcher {
    permits: Vec<Permit>,
    /// what was given a moment ago, the newest last
    given: VecDeque<(Instant, Fid)>,
    last_permit: u64,
    // in order, so that the same events always have the same effects
    listings: BTreeMap<Fid, Listing>,
    looks: BTreeMap<Fid, Look>,
    files: BTreeMap<Fid, File>,
    readers: HashMap<Fid, Reader>,
    waited: VecDeque<(Fid, u64)>,
    ahead: VecDeque<(Fid, u64)>,
    reads: usize,
}

impl File {
    fn granule(&self, at: u64) -> u64 {
        self.granule_len.min(self.base_size.saturating_sub(at))
    }
}

impl Fetcher {
    pub fn is_idle(&self) -> bool {
        self.listings.is_empty() && self.looks.is_empty() && self.files.is_empty()
    }

    /// The oldest mark of what is under way.
    pub fn floor(&self) -> Option<Seq> {
        let marks = self.listings.values().map(|l| l.mark);
        marks.chain(self.looks.values().map(|l| l.mark)).min()
    }

    pub fn on_want(
        &mut self,
        want: Want,
        ticket: Ticket,
        mark: Seq,
        online: bool,
        line: &mut Line,
        now: Instant,
    ) {
        match want {
            Want::Dir { fid: dir, have } => {
                if let Some(listing) = self.listings.get_mut(&dir) {
                    return listing.tickets.push(ticket);
                }
                let (tickets, after) = (vec![ticket], Vec::new());
                let (request, restarts, stale) = (None, 0, false);
                let fresh = Listing { tickets, have, mark, request, after, restarts, stale };
                let listing = self.listings.entry(dir).or_insert(fresh);
                if online {
                    listing.ask(dir, line, now);
                }
            }
            Want::Object { fid, have } => {
                self.look(fid, have, (vec![ticket], mark), online, line, now);
            }
            Want::Room(_) => line.resolve([ticket], Ok(())), // others see to that
            Want::Permit(fids) => self.ask_permit(fids, ticket, line, now),
            Want::Bytes(bytes) => {
                self.on_want_bytes(bytes, ticket, line);
                if online {
                    self.fill(line, now);
                }
            }
        }
    }

    fn ask_permit(&mut self, fids: Vec<Fid>, ticket: Ticket, line: &mut Line, now: Instant) {
        if let Some(permit) = self.permits.iter_mut().find(|permit| permit.fids == fids) {
            return permit.tickets.push(ticket);
        }
        self.last_permit += 1;
        let no = self.last_permit;
        line.ask(Ask::Permit { no }, Some(now), super::message::Ask { fids: fids.clone() }.into());
        self.permits.push(Permit { no, fids, tickets: vec![ticket] });
    }

    /// Somebody may be about to use this: it is not taken away in the same moment.
    pub fn note_given(&mut self, fid: Fid, now: Instant) {
        while self.given.front().is_some_and(|(at, _)| *at + policy::HOLD <= now) {
            self.given.pop_front();
        }
        self.given.push_back((now, fid));
    }

    /// Until when some of these are kept, if any were given just now.
    pub fn held_until(&self, fids: &[Fid]) -> Option<Instant> {
        let of = self.given.iter().rev().find(|(_, fid)| fids.contains(fid));
        of.map(|(at, _)| *at + policy::HOLD)
    }

    /// What was asked for, and who waits for it.
    pub fn take_permit(&mut self, no: u64) -> Option<(Vec<Fid>, Vec<Ticket>)> {
        let at = self.permits.iter().position(|permit| permit.no == no)?;
        let permit = self.permits.swap_remove(at);
        Some((permit.fids, permit.tickets))
    }

    fn look(
        &mut self,
        fid: Fid,
        have: Stamp,
        (tickets, mark): (Vec<Ticket>, Seq),
        online: bool,
        line: &mut Line,
        now: Instant,
    ) {
        if let Some(look) = self.looks.get_mut(&fid) {
            return look.tickets.extend(tickets);
        }
        self.looks.insert(fid, Look { tickets, mark, have });
        if online {
            line.ask(Ask::Stat { fid }, Some(now), Stat { fid, have }.into());
        }
    }

    fn on_want_bytes(&mut self, bytes: Bytes, ticket: Ticket, line: &mut Line) {
        let fid = bytes.fid;
        if self.files.get(&fid).is_some_and(|file| file.stamp != bytes.stamp) {
            // What is under way is of an older version: whoever waits for it looks again.
            let waiting = self.drop_file(fid, line);
            line.resolve(waiting, Ok(()));
        }
        let ahead = self.direction(&bytes);
        let file = self.files.entry(fid).or_insert_with(|| File {
            stamp: bytes.stamp,
            granule_len: bytes.granule_len.max(1),
            base_size: bytes.base_size,
            wants: Vec::new(),
            pieces: BTreeMap::new(),
        });
        let base_size = file.base_size;
        let inside = |at: &u64| *at < base_size;
        let need: Vec<u64> = bytes.need.into_iter().filter(inside).collect();
        for at in &need {
            let piece = file.pieces.entry(*at).or_default();
            if !piece.waited {
                piece.waited = true;
                self.waited.push_back((fid, *at));
            }
        }
        for at in bytes.ahead.into_iter().filter(inside).take(ahead as usize) {
            file.pieces.entry(at).or_insert_with(|| {
                self.ahead.push_back((fid, at));
                Piece::default()
            });
        }
        if need.is_empty() {
            line.resolve([ticket], Ok(()));
        } else {
            file.wants.push((ticket, need));
        }
        if file.pieces.is_empty() {
            self.files.remove(&fid);
        }
    }

    /// How many granules to fetch ahead, by where this file's last want ended.
    fn direction(&mut self, bytes: &Bytes) -> u32 {
        let (Some(first), Some(last)) = (bytes.need.first(), bytes.need.last()) else { return 0 };
        if self.readers.len() >= READERS_MAX && !self.readers.contains_key(&bytes.fid) {
            self.readers.clear();
        }
        let reader = self.readers.entry(bytes.fid).or_insert(Reader { next: 0, ahead: 0 });
        reader.ahead = policy::read_ahead(reader.ahead, reader.next == *first);
        let ahead_last = bytes.ahead.iter().take(reader.ahead as usize).next_back();
        reader.next = ahead_last.unwrap_or(last).max(last).saturating_add(bytes.granule_len);
        reader.ahead
    }

    /// Sends reads while there is room.
    fn fill(&mut self, line: &mut Line, now: Instant) {
        while self.reads < policy::READS_MAX {
            let (next, waited) = match self.waited.pop_front() {
                Some(next) => (next, true),
                None => match self.ahead.pop_front() {
                    Some(next) => (next, false),
                    None => return,
                },
            };
            let (fid, at) = next;
            let Some(file) = self.files.get_mut(&fid) else { continue };
            let granule = file.granule(at);
            let Some(piece) = file.pieces.get_mut(&at) else { continue };
            if piece.request.is_some() {
                continue;
            }
            let len = (granule - piece.got_len).min(u64::from(RANGE_LEN_MAX)) as u32;
            let read = Read { fid, at: at + piece.got_len, len, stamp: file.stamp };
            let since = waited.then_some(now);
            piece.request = Some(line.ask(Ask::Piece { fid, at }, since, read.into()));
            self.reads += 1;
        }
    }

    /// False when the answer does not fit the request: the peer is not one of ours.
    pub fn on_answer(
        &mut self,
        ask: Ask,
        message: Message,
        acked: Seq,
        line: &mut Line,
        now: Instant,
    ) -> bool {
        match (ask, message) {
            (Ask::List { dir }, Message::Page(page)) => self.on_page(dir, page, line, now),
            (Ask::List { dir }, Message::Failed(m)) => {
                let listing = self.listings.remove(&dir);
                line.resolve(listing.map(|l| l.tickets).unwrap_or_default(), Err(unmet(&m)));
                true
            }
            (Ask::Stat { fid }, Message::Status(m)) => {
                let Some(look) = self.looks.remove(&fid) else { return true };
                let fits = m.object.fid == fid;
                if fits {
                    self.note_given(fid, now);
                    let (stamp, size) = (m.object.stamp, m.object.attr.size);
                    let (object, mark, mode) = (m.object, look.mark, m.mode);
                    line.effect(Effect::SetObject { object, mark, mode });
                    // All of it, or it is fetched: what is short would pass for zeros.
                    if let Some(bytes) = m.data.filter(|bytes| bytes.len() as u64 == size) {
                        let granule = Some((0, size));
                        line.effect(Effect::WriteRange { fid, stamp, at: 0, bytes, granule });
                    }
                }
                line.resolve(look.tickets, Ok(()));
                fits
            }
            (Ask::Stat { fid }, Message::Failed(m)) => {
                let look = self.looks.remove(&fid);
                line.resolve(look.map(|l| l.tickets).unwrap_or_default(), Err(unmet(&m)));
                true
            }
            (Ask::Piece { fid, at }, message) => {
                self.reads = self.reads.saturating_sub(1);
                let fits = self.on_piece(fid, at, message, acked, line, now);
                self.fill(line, now);
                fits
            }
            _ => false,
        }
    }

    fn on_page(&mut self, dir: Fid, page: Page, line: &mut Line, now: Instant) -> bool {
        self.note_given(dir, now);
        let Some(listing) = self.listings.get_mut(&dir) else { return true };
        let mut last = &listing.after;
        for entry in &page.entries {
            if entry.name <= *last {
                return false;
            }
            last = &entry.name;
        }
        let partial = page.gone.is_some();
        if page.dir.fid != dir
            || (page.more && page.entries.is_empty())
            || (partial && listing.have == Stamp(0))
        {
            return false;
        }
        let (last, first, more) = (last.clone(), listing.after.is_empty(), page.more);
        // Nothing is trusted before it is merged; the directory is, when all of it is.
        let mode = page.mode;
        line.effect(Effect::MergePage { dir, first, mark: listing.mark, page });
        listing.request = None;
        if more {
            listing.after = last;
            listing.ask(dir, line, now);
        } else if let Some(listing) = self.listings.remove(&dir) {
            let (mark, fresh) = (listing.mark, !listing.stale);
            line.effect(Effect::FinishListing { dir, mark, fresh, mode });
            line.resolve(listing.tickets, Ok(()));
        }
        true
    }

    fn on_piece(
        &mut self,
        fid: Fid,
        at: u64,
        message: Message,
        acked: Seq,
        line: &mut Line,
        now: Instant,
    ) -> bool {
        let Some(file) = self.files.get_mut(&fid) else { return true };
        let granule = file.granule(at);
        let Some(piece) = file.pieces.get_mut(&at) else { return true };
        piece.request = None;
        let data = match message {
            Message::Data(data) => data,
            Message::Failed(m) if m.code == Code::Moved => {
                self.moved(fid, acked, line, now);
                return true;
            }
            Message::Failed(m) => {
                let waiting = self.drop_file(fid, line);
                line.resolve(waiting, Err(unmet(&m)));
                return true;
            }
            _ => return false,
        };
        let asked_len = (granule - piece.got_len).min(u64::from(RANGE_LEN_MAX));
        let len = data.bytes.len() as u64;
        if data.at != at + piece.got_len || len > asked_len {
            return false;
        }
        if len < asked_len {
            // The file ends earlier than the version that we know of.
            self.moved(fid, acked, line, now);
            return true;
        }
        let waited = piece.waited;
        if piece.token.is_some_and(|token| token != data.token) {
            *piece = Piece { waited, ..Piece::default() };
        } else {
            (piece.token, piece.got_len) = (Some(data.token), piece.got_len + len);
            let done = (piece.got_len == granule).then_some((at, granule));
            let (stamp, at, bytes) = (file.stamp, data.at, data.bytes);
            line.effect(Effect::WriteRange { fid, stamp, at, bytes, granule: done });
            if done.is_some() {
                self.arrived(fid, done.map_or(0, |(start, _)| start), line);
                return true;
            }
        }
        let queue = if waited { &mut self.waited } else { &mut self.ahead };
        queue.push_front((fid, at));
        true
    }

    fn arrived(&mut self, fid: Fid, at: u64, line: &mut Line) {
        let Some(file) = self.files.get_mut(&fid) else { return };
        file.pieces.remove(&at);
        file.wants.retain_mut(|(ticket, left)| {
            left.retain(|start| *start != at);
            if left.is_empty() {
                line.resolve([*ticket], Ok(()));
            }
            !left.is_empty()
        });
        if file.pieces.is_empty() {
            self.files.remove(&fid);
        }
    }

    /// The file has a newer version: fetch its attributes, and whoever waits looks again.
    fn moved(&mut self, fid: Fid, acked: Seq, line: &mut Line, now: Instant) {
        let waiting = self.drop_file(fid, line);
        if !waiting.is_empty() {
            self.look(fid, Stamp(0), (waiting, acked), true, line, now);
        }
    }

    fn drop_file(&mut self, fid: Fid, line: &mut Line) -> Vec<Ticket> {
        let Some(file) = self.files.remove(&fid) else { return Vec::new() };
        for id in file.pieces.values().filter_map(|piece| piece.request) {
            line.forget(id);
            self.reads = self.reads.saturating_sub(1);
        }
        file.wants.into_iter().map(|(ticket, _)| ticket).collect()
    }

    /// The server changes these objects: listings of them that are under way begin again.
    pub fn on_break(&mut self, fids: &[Fid], acked: Seq, line: &mut Line, now: Instant) {
        if self.listings.is_empty() {
            return;
        }
        for dir in fids {
            let Some(listing) = self.listings.get_mut(dir) else { continue };
            if listing.restarts >= policy::RELIST_MAX {
                listing.stale = true;
                continue;
            }
            listing.restarts += 1;
            listing.begin(*dir, acked, line, now);
        }
    }

    /// These (all, if none is named) are let go: what the server says of them from now on may have
    /// own changes in it that it did not have before. The two must not be mixed in one listing.
    pub fn on_recall(&mut self, fids: &[Fid], acked: Seq, line: &mut Line, now: Instant) {
        match fids {
            [] => {
                let all: Vec<Fid> = self.listings.keys().copied().collect();
                self.on_break(&all, acked, line, now);
            }
            _ => self.on_break(fids, acked, line, now),
        }
    }

    /// The connection is gone, and every request with it.
    pub fn on_away(&mut self, line: &mut Line) {
        for permit in self.permits.drain(..) {
            line.resolve(permit.tickets, Ok(())); // away from the server nobody asks
        }
        self.reads = 0;
        self.waited.clear();
        self.ahead.clear();
        self.files.retain(|_, file| {
            file.pieces.retain(|_, piece| piece.waited);
            !file.pieces.is_empty()
        });
        for listing in self.listings.values_mut() {
            listing.request = None;
        }
    }

    /// The connection stands: ask for all that is still wanted.
    pub fn on_online(&mut self, acked: Seq, line: &mut Line, now: Instant) {
        for (dir, listing) in &mut self.listings {
            listing.begin(*dir, acked, line, now);
        }
        for (fid, look) in &mut self.looks {
            look.mark = acked;
            let stat = Stat { fid: *fid, have: look.have };
            line.ask(Ask::Stat { fid: *fid }, Some(now), stat.into());
        }
        for (fid, file) in &mut self.files {
            for (at, piece) in &mut file.pieces {
                *piece = Piece { waited: piece.waited, ..Piece::default() };
                self.waited.push_back((*fid, *at));
            }
        }
        self.fill(line, now);
    }

    /// Nobody is to wait any longer.
    pub fn give_up(&mut self, line: &mut Line) {
        let away = Err(Unmet::Unreachable);
        for (_, listing) in std::mem::take(&mut self.listings) {
            line.resolve(listing.tickets, away);
        }
        for (_, look) in std::mem::take(&mut self.looks) {
            line.resolve(look.tickets, away);
        }
        for (_, file) in std::mem::take(&mut self.files) {
            line.resolve(file.wants.into_iter().map(|(ticket, _)| ticket), away);
        }
        self.waited.clear();
        self.ahead.clear();
    }
}

impl Listing {
    fn ask(&mut self, dir: Fid, line: &mut Line, now: Instant) {
        let list = List { dir, after: self.after.clone(), have: self.have };
        self.request = Some(line.ask(Ask::List { dir }, Some(now), list.into()));
    }
    fn begin(&mut self, dir: Fid, acked: Seq, line: &mut Line, now: Instant) {
        if let Some(id) = self.request.take() {
            line.forget(id);
        }
        self.after.clear();
        self.mark = acked;
        self.ask(dir, line, now);
    }
}

fn unmet(m: &Failed) -> Unmet {
    if m.code == Code::Gone { Unmet::Gone } else { Unmet::Failed(m.code) }
}
