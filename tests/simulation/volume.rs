//! The model of a served volume: what replica's volume, apply, conflict and redo do, over the model
//! tree. The certification and the rules of stamps are the real ones. A clone is what the disk has
//! when a sync is done.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use imz::kml::record::{Fid, Name, Op, Origin, Over, Place, ROOT, Range, Record, Seq, Stamp};
use imz::lento::intake::{Change, Content as In, Key};
use imz::lento::message::*;
use imz::lento::reint::Applied;
use imz::lento::rights::Mode;
use imz::replica::apply::{Content, map_fids, noted, restamped};
use imz::replica::certify::{self, Clash, Verdict, View, certify};
use imz::replica::meta::Meta;
use imz::replica::ops::time_of_ns;
use imz::sys::Errno;

use crate::history::History;
use crate::plan::DIRS;
use crate::rng::Rng;
use crate::tree::{DIR_MODE, Node, Tree, write_ranges};

/// A record of the volume's history.
#[derive(Debug)]
struct Logged {
    record: Record,
    /// the bytes of a store, as they were when it was applied
    content: Option<Vec<u8>>,
    /// each range stands at its place in it, and not all in a row
    spooled: bool,
    done: bool,
    loss: Loss,
}

/// What a loss of power made of a place in the history (replica's lives.rs).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Loss {
    None,
    /// the record is gone, and its stamp is never given again
    Gone,
    /// here the history went on
    Mark,
}

#[derive(Clone, Default, Debug)]
struct NodeState {
    last: Seq,
    seen: Seq,
    aliases: BTreeMap<Fid, Fid>,
}

/// A version that lost.
#[derive(Debug)]
pub struct Kept {
    pub record: Record,
    pub content: Option<Vec<u8>>,
}

/// What became of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    Done,
    /// done, but the disk may not have all of it: it may be done once more
    InDoubt,
    NotNeeded,
    KeptAside,
}

#[derive(Clone)]
pub struct Volume {
    pub tree: Tree,
    log: Vec<Rc<Logged>>,
    /// oldest record that is kept
    first: Seq,
    nodes: BTreeMap<u32, NodeState>,
    by_incarnation: BTreeMap<[u8; 16], u32>,
    next_fid: u64,
    pub kept: Vec<Rc<Kept>>,
    /// directories of conflicts: roots of their own
    hidden: BTreeSet<Fid>,
    spool: BTreeMap<Key, Vec<u8>>,
    touched: BTreeMap<Fid, (u32, Stamp)>,
    pub outcomes: BTreeMap<(u32, Seq), Outcome>,
    since_count_max: usize,
}

/// What happens beside the tree when records are applied.
pub struct Watch<'a> {
    pub history: &'a mut History,
    pub violations: Vec<String>,
    /// there is no room for these many records from now on; `u64::MAX` for plenty
    pub room: u64,
}

enum Stop {
    NoRoom,
}

fn place(dir: Fid, name: &str) -> Place {
    let name = Name::new(name.as_bytes()).expect("a name");
    Place { dir, base: Stamp(0), name }
}

impl Volume {
    /// With the directories that histories begin with.
    pub fn new(since_count_max: usize) -> Volume {
        let mut volume = Volume {
            tree: Tree::new(Meta::whole(ROOT)),
            log: Vec::new(),
            first: Seq(1),
            nodes: BTreeMap::new(),
            by_incarnation: BTreeMap::new(),
            next_fid: 1,
            kept: Vec::new(),
            hidden: BTreeSet::new(),
            spool: BTreeMap::new(),
            touched: BTreeMap::new(),
            outcomes: BTreeMap::new(),
            since_count_max,
        };
        for path in &DIRS[1..] {
            let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
            let dir = volume.resolve(parent);
            let meta = Meta::whole(volume.new_fid());
            let at = place(dir, name);
            let op = Op::Mkdir { at, fid: meta.fid, mode: 0o755, umask: 0 };
            volume.tree.perform(&op, time_of_ns(1), &meta).expect("it is new");
        }
        volume
    }
    fn resolve(&self, path: &str) -> Fid {
        let parts = path.split('/').filter(|part| !part.is_empty());
        parts.fold(ROOT, |at, part| {
            self.tree.at(at, &Name::new(part.as_bytes()).expect("a name")).expect("it was made")
        })
    }
    fn new_fid(&mut self) -> Fid {
        self.next_fid += 1;
        Fid::new(0, self.next_fid)
    }
    pub fn stamp(&self) -> Stamp {
        Stamp(self.log.len() as u64)
    }
    pub fn meet(&mut self, incarnation: [u8; 16]) -> u32 {
        let next = self.by_incarnation.len() as u32 + 1;
        *self.by_incarnation.entry(incarnation).or_insert(next)
    }
    pub fn last(&self, node: u32) -> Seq {
        self.nodes.get(&node).map(|n| n.last).unwrap_or_default()
    }
    pub fn newest_of(&self, node: u32) -> Seq {
        self.nodes.get(&node).map(|n| n.last.max(n.seen)).unwrap_or_default()
    }
    /// How far each node is: what a sync that begins now makes durable.
    pub fn marks(&self) -> BTreeMap<u32, Seq> {
        self.nodes.iter().map(|(node, state)| (*node, state.last)).collect()
    }
    /// The process forgets how far the nodes are, but for this.
    pub fn forget_marks(&mut self, marks: &BTreeMap<u32, Seq>) {
        for (node, state) in &mut self.nodes {
            state.last = marks.get(node).copied().unwrap_or_default();
            state.seen = state.last;
        }
    }
    pub fn trim(&mut self) {
        self.first = Seq(self.log.len() as u64 / 2 + 1);
    }
    pub fn spool(&mut self, key: Key, at: u64, bytes: &[u8]) {
        let file = self.spool.entry(key).or_default();
        let end = at as usize + bytes.len();
        file.resize(file.len().max(end), 0);
        file[at as usize..end].copy_from_slice(bytes);
    }
    pub fn unspool(&mut self, key: Key) {
        self.spool.remove(&key);
    }

    // Requests.

    /// The answer to a request, and the objects whose state stands in it.
    pub fn answer(&self, node: u32, request: &Message, page_count: usize) -> (Message, Vec<Fid>) {
        let failed = |code| (Failed { code, what: String::new() }.into(), Vec::new());
        match request {
            Message::List(m) => match self.page(m, page_count) {
                Some(page) => {
                    let mut given = vec![m.dir];
                    given.extend(page.entries.iter().map(|e| e.object.fid));
                    (page.into(), given)
                }
                None => failed(Code::Gone),
            },
            Message::Stat(m) => match self.tree.get(m.fid) {
                Some(node) => {
                    let object = self.object(node);
                    let stored = object.stored.unwrap_or(object.stamp);
                    let is_old = m.have != Stamp(0) && m.have < stored;
                    let has = is_old && !node.is_dir() && node.attr.size > 0;
                    let data = has.then(|| node.data.to_vec());
                    (Status { object, mode: Mode::None, data }.into(), vec![m.fid])
                }
                None => failed(Code::Gone),
            },
            Message::Read(m) => match self.tree.get(m.fid) {
                None => failed(Code::Gone),
                Some(file) if file.is_dir() => failed(Code::Other),
                Some(file) => {
                    let meta = &file.meta;
                    let ours = meta.author == node && m.stamp >= meta.foreign;
                    if meta.stamp != m.stamp && !ours {
                        return failed(Code::Moved);
                    }
                    let (at, size) = (m.at, file.attr.size);
                    let (from, to) = (at.min(size), (at + u64::from(m.len)).min(size));
                    let bytes = file.data[from as usize..to as usize].to_vec();
                    (Data { at, bytes, size, token: file.token }.into(), vec![m.fid])
                }
            },
            Message::Since(m) => (self.since(m.stamp, node).into(), Vec::new()),
            Message::Statfs(_) => (Space::default().into(), Vec::new()),
            _ => (Pong { stamp: self.stamp() }.into(), Vec::new()),
        }
    }
    fn page(&self, list: &List, count: usize) -> Option<Page> {
        let dir = self.tree.get(list.dir).filter(|node| node.is_dir())?;
        let names = dir.entries.iter().filter(|(name, _)| *name.as_bytes() > list.after[..]);
        let mut entries: Vec<Entry> = names
            .take(count + 1)
            .filter_map(|(name, fid)| {
                let object = self.object(self.tree.get(*fid)?);
                Some(Entry { name: name.as_bytes().to_vec(), object })
            })
            .collect();
        let more = entries.len() > count;
        entries.truncate(count);
        let (gone, mode, read_only) = (None, Mode::None, Vec::new());
        Some(Page { dir: self.object(dir), entries, more, gone, mode, read_only })
    }
    fn object(&self, node: &Node) -> Object {
        let (fid, stamp) = (node.meta.fid, node.meta.stamp);
        let (target, xattrs) = (Vec::new(), Vec::new());
        let stored = Some(node.meta.data);
        Object { fid, stamp, attr: node.attr, target, xattrs, stored }
    }
    fn since(&self, stamp: Stamp, node: u32) -> Changes {
        let last = self.stamp();
        let (fids, volume) = (Vec::new(), Mode::None);
        let mut changes = Changes { fids, upto: last, more: false, lost: false, volume };
        let is_cut = |nth: u64| self.log[nth as usize].loss != Loss::None;
        if stamp > last || stamp.0 + 1 < self.first.0 || (stamp.0..last.0).any(is_cut) {
            changes.lost = true;
            return changes;
        }
        for nth in stamp.0..last.0 {
            if nth - stamp.0 >= self.since_count_max as u64 {
                (changes.upto, changes.more) = (Stamp(nth), true);
                break;
            }
            let entry = &self.log[nth as usize];
            if entry.done && entry.record.origin.node != node {
                changes.fids.extend(entry.record.op.touched());
            }
        }
        changes.fids.sort_unstable();
        changes.fids.dedup();
        changes
    }

    // Records.

    pub fn apply(
        &mut self,
        node: u32,
        upto: Seq,
        changes: &[Change],
        watch: &mut Watch<'_>,
    ) -> Applied {
        let mut out = Applied::default();
        for change in changes {
            match self.apply_one(node, change, &mut out, watch) {
                Ok(()) => out.upto = change.seq,
                Err(Stop::NoRoom) => {
                    out.failure = Some((Code::NoSpace, "no room".to_owned()));
                    break;
                }
            }
        }
        if out.failure.is_none() {
            out.upto = upto;
        } else {
            for change in changes.iter().filter(|change| change.content == In::Spooled) {
                self.unspool(Key { node, seq: change.seq });
            }
        }
        for (fid, (node, stamp)) in std::mem::take(&mut self.touched) {
            self.restamp(fid, node, stamp, false); // a directory has no data
        }
        if self.last(node) < out.upto {
            self.note_seq(node, out.upto);
        }
        out.stamps.sort_unstable();
        out.stamps.reverse();
        out.stamps.dedup_by_key(|(fid, _)| *fid);
        out.conflicts.sort_unstable();
        out.conflicts.dedup();
        out
    }
    fn note(&mut self, node: u32, seq: Seq, applied: bool) {
        let state = self.nodes.entry(node).or_default();
        state.seen = state.seen.max(seq);
        if applied {
            state.last = state.last.max(seq);
        }
    }
    fn note_seq(&mut self, node: u32, seq: Seq) {
        let origin = Origin { node, seq };
        let record = Record { time_ns: 0, origin, uid: 0, gid: 0, path: Vec::new(), op: Op::Noop };
        self.put_log(record, Loss::None);
        self.note(node, seq, true);
    }
    /// A record that changes nothing.
    fn put_log(&mut self, record: Record, loss: Loss) {
        self.log.push(Rc::new(Logged { record, content: None, spooled: false, done: true, loss }));
    }

    fn apply_one(
        &mut self,
        node: u32,
        change: &Change,
        out: &mut Applied,
        watch: &mut Watch<'_>,
    ) -> Result<(), Stop> {
        let seq = change.seq;
        let key = Key { node, seq };
        let state = self.nodes.entry(node).or_default();
        if seq <= state.last {
            self.unspool(key);
            return Ok(());
        }
        let mut record = change.record.clone();
        record.origin = Origin { node, seq };
        let aliases = &state.aliases;
        map_fids(&mut record.op, |fid| aliases.get(&fid).copied().unwrap_or(fid));
        if record.op != change.record.op {
            out.also.extend(record.op.touched());
            let own = |fid: &Fid| change.record.op.touched().any(|own| own == *fid);
            out.conflicts.extend(record.op.touched().filter(|fid| !own(fid)));
        }
        // contents that come again undo what was set after them
        let is_file = |fid: &Fid| self.tree.get(*fid).is_some_and(|node| !node.is_dir());
        let comes_again = match &record.op {
            Op::Store { .. } => true,
            Op::Setattr { fid, .. } => is_file(fid),
            _ => false,
        };
        if seq <= state.seen && !comes_again {
            self.outcomes.entry((node, seq)).or_insert(Outcome::NotNeeded);
            return Ok(());
        }
        if watch.room == 0 {
            return Err(Stop::NoRoom);
        }
        watch.room -= 1;
        let content = match &change.content {
            In::None => Content::None,
            In::Inline(bytes) => Content::Inline(bytes),
            In::Spooled => Content::Spooled,
            In::Gone => Content::Gone,
        };
        let verdict = match certify(self, (node, seq), &record, content) {
            Ok(verdict) => verdict,
            Err(never) => match never {},
        };
        let Ok(others) = certify::is_of_others(self, node, &record.op, verdict);
        if others {
            out.conflicts.extend(record.op.touched());
        }
        match verdict {
            Verdict::Apply => {
                if let Op::Setattr { fid, base, new, .. } = &mut record.op
                    && let Some(there) = self.tree.get(*fid)
                {
                    certify::fit(new, &seen(there), node, self.known(*base));
                }
                self.carry_out(record, content, out, watch)
            }
            Verdict::Same => {
                self.outcomes.entry((node, seq)).or_insert(Outcome::NotNeeded);
            }
            Verdict::Alias(to) => {
                if let Some(from) = change.record.op.fid() {
                    self.nodes.entry(node).or_default().aliases.insert(from, to);
                }
                out.also.push(to);
                out.conflicts.extend(change.record.op.touched());
                self.outcomes.entry((node, seq)).or_insert(Outcome::NotNeeded);
            }
            Verdict::Conflict(clash) => self.conflict(record, content, clash, out, watch),
        }
        self.unspool(key);
        Ok(())
    }

    fn carry_out(
        &mut self,
        record: Record,
        content: Content<'_>,
        out: &mut Applied,
        watch: &mut Watch<'_>,
    ) {
        let Origin { node, seq } = record.origin;
        let bytes = self.bytes(&record, content);
        let stamp = Stamp(self.log.len() as u64 + 1);
        let done = self.perform(&record, content, bytes.as_deref(), stamp);
        let (record_again, spooled) = (record.clone(), content == Content::Spooled);
        let done_ok = done.is_ok();
        let logged = Logged {
            record: record_again,
            content: bytes,
            spooled,
            done: done_ok,
            loss: Loss::None,
        };
        self.log.push(Rc::new(logged));
        if done.is_err() {
            // what the file system refuses, it refuses for ever
            out.conflicts.extend(record.op.touched());
            return self.keep_aside(record, content);
        }
        if self.outcomes.get(&(node, seq)) == Some(&Outcome::Done) {
            watch.violations.push(format!("record {seq:?} of node {node} is applied twice"));
        }
        let later = self.outcomes.range((node, seq.next())..=(node, Seq(u64::MAX)));
        if later.into_iter().any(|(_, outcome)| *outcome == Outcome::Done) {
            watch.violations.push(format!("record {seq:?} of node {node} is applied out of order"));
        }
        self.outcomes.insert((node, seq), Outcome::Done);
        self.note(node, seq, true);
        for fid in record.op.touched() {
            match self.is_there(fid) {
                true => out.stamps.push((fid, stamp)),
                false => out.gone.push(fid),
            }
        }
        watch.history.applied(&record, stamp, &self.tree);
    }
    fn is_there(&self, fid: Fid) -> bool {
        fid == ROOT || self.tree.get(fid).is_some_and(|node| !node.names.is_empty())
    }
    fn bytes(&self, record: &Record, content: Content<'_>) -> Option<Vec<u8>> {
        match (&record.op, content) {
            (Op::Store { .. }, Content::Inline(bytes)) => Some(bytes.to_vec()),
            (Op::Store { .. }, Content::Spooled) => {
                let Origin { node, seq } = record.origin;
                Some(self.spool.get(&Key { node, seq }).cloned().unwrap_or_default())
            }
            (Op::Store { .. }, Content::None) => Some(Vec::new()),
            _ => None,
        }
    }
    fn restamp(&mut self, fid: Fid, node: u32, stamp: Stamp, data: bool) {
        match self.tree.edit(fid) {
            Some(object) if data => restamped(&mut object.meta, node, stamp),
            Some(object) => noted(&mut object.meta, node, stamp),
            None => {}
        }
    }

    fn perform(
        &mut self,
        record: &Record,
        content: Content<'_>,
        bytes: Option<&[u8]>,
        stamp: Stamp,
    ) -> Result<(), Errno> {
        let node = record.origin.node;
        let fid = record.op.fid().unwrap_or_default();
        let meta = Meta { author: node, stamp, ..Meta::whole(fid) };
        self.tree.perform(&record.op, time_of_ns(record.time_ns), &meta)?;
        if let Op::Store { fid, size, mtime, ranges, .. } = &record.op {
            let file = self.tree.edit(*fid).ok_or(Errno::NOENT)?;
            if file.is_dir() {
                return Err(Errno::INVAL);
            }
            if let Some(bytes) = bytes {
                let whole = covers(ranges, *size) && file.attr.nlink == 1;
                if content == Content::Spooled {
                    if whole {
                        file.resize(0);
                    }
                    copy_ranges(bytes, file, ranges);
                } else {
                    write_ranges(file, ranges, bytes);
                }
                file.resize(*size);
                file.attr.mtime = *mtime;
            }
        }
        let data = match &record.op {
            Op::Store { .. } => true,
            Op::Setattr { new, .. } => new.size.is_some(),
            _ => false,
        };
        for fid in [Some(fid), record.op.other()].into_iter().flatten() {
            self.restamp(fid, node, stamp, data);
            let nameless = self.tree.get(fid).is_some_and(|n| n.names.is_empty());
            if nameless && fid != ROOT && !self.hidden.contains(&fid) {
                self.tree.remove(fid);
            }
        }
        for place in record.op.places().into_iter().flatten() {
            self.touched.insert(place.dir, (node, stamp));
        }
        Ok(())
    }

    fn keep_aside(&mut self, record: Record, content: Content<'_>) {
        let content = self.bytes(&record, content);
        let origin = record.origin;
        self.outcomes.insert((origin.node, origin.seq), Outcome::KeptAside);
        self.kept.push(Rc::new(Kept { record, content }));
    }
    fn conflict(
        &mut self,
        mut record: Record,
        content: Content<'_>,
        clash: Clash,
        out: &mut Applied,
        watch: &mut Watch<'_>,
    ) {
        let origin = record.origin;
        out.conflicts.extend(record.op.touched());
        let before = self.outcomes.get(&(origin.node, origin.seq)).copied();
        self.keep_aside(record.clone(), content);
        let is_dir = match &record.op {
            Op::Rename { from, .. } => {
                let there = self.tree.at(from.dir, &from.name).and_then(|fid| self.tree.get(fid));
                there.is_none_or(Node::is_dir)
            }
            _ => false,
        };
        let fits_elsewhere = matches!(clash, Clash::NameTaken | Clash::Changed);
        let redirected = match &mut record.op {
            Op::Create { at, .. } | Op::Mkdir { at, .. } if clash != Clash::ForeignFid => Some(at),
            Op::Rename { to, over, .. } if !is_dir && fits_elsewhere => {
                *over = Over::Nothing { noreplace: true };
                Some(to)
            }
            _ => None,
        };
        let Some(place) = redirected else { return self.note_seq(origin.node, origin.seq) };
        let dir = Fid::new(0, self.next_fid + 1);
        place.dir = dir;
        self.next_fid += 1;
        self.tree.put(Node::new(Meta::whole(dir), DIR_MODE | 0o700, time_of_ns(0)));
        self.hidden.insert(dir);
        out.also.push(dir);
        match before {
            Some(before) => self.outcomes.insert((origin.node, origin.seq), before),
            None => self.outcomes.remove(&(origin.node, origin.seq)),
        };
        self.carry_out(record, content, out, watch);
    }

    // Power.

    /// What a new life finds after a loss of power: `self` is what the disk had for sure, `now` what
    /// memory had. Some of the history in between is there, and some contents of it. Also the
    /// stamps that are lost, or whose contents are.
    pub fn after_power_cut(mut self, now: &Volume, rng: &mut Rng) -> (Volume, Vec<Stamp>) {
        let (from, to) = (self.log.len(), now.log.len());
        let survives = rng.within(from as u64, to as u64) as usize;
        let (mut lost, mut half_written) = (Vec::new(), Vec::new());
        self.next_fid = now.next_fid;
        self.hidden.clone_from(&now.hidden);
        self.by_incarnation.clone_from(&now.by_incarnation);
        self.first = now.first.min(Seq(survives as u64 + 1));
        for nth in from..survives {
            let entry = now.log[nth].clone();
            let stamp = Stamp(nth as u64 + 1);
            let Origin { node, seq } = entry.record.origin;
            let is_store = matches!(entry.record.op, Op::Store { .. });
            if let Some(place) = entry.record.op.places().into_iter().flatten().last()
                && self.hidden.contains(&place.dir)
                && self.tree.get(place.dir).is_none()
            {
                self.tree.put(Node::new(Meta::whole(place.dir), DIR_MODE | 0o700, time_of_ns(0)));
            }
            if entry.done && is_store && rng.one_in(2) {
                lost.push(stamp);
                half_written.extend(entry.record.op.fid().map(|fid| (fid, node)));
            } else if entry.done {
                let bytes = entry.content.as_deref();
                let content = if entry.spooled { Content::Spooled } else { Content::None };
                let done = self.perform(&entry.record, content, bytes, stamp);
                debug_assert!(done.is_ok(), "{:?}: {done:?}", entry.record.op);
            }
            if entry.record.op == Op::Noop {
                let mine = now.kept.iter().filter(|kept| kept.record.origin.node == node);
                self.kept.extend(mine.filter(|kept| kept.record.origin.seq == seq).cloned());
            }
            self.log.push(entry);
            self.note(node, seq, false);
            if let Some(outcome) = now.outcomes.get(&(node, seq)) {
                // contents may come once more, and then behind later changes of names
                let done = *outcome == Outcome::Done;
                let outcome = if done { Outcome::InDoubt } else { *outcome };
                self.outcomes.insert((node, seq), outcome);
            }
        }
        for (fid, (node, stamp)) in std::mem::take(&mut self.touched) {
            self.restamp(fid, node, stamp, false); // a directory has no data
        }
        // bytes are not missed of what was removed or stored since by who had seen them
        let is_missed = |stamp: &Stamp| {
            let (nth, fid) = (stamp.0 as usize, now.log[stamp.0 as usize - 1].record.op.fid());
            let is_again = |entry: &Rc<Logged>| {
                matches!(entry.record.op, Op::Store { .. }) && entry.record.op.fid() == fid
            };
            fid.is_some_and(|fid| self.is_there(fid)) && !now.log[nth..].iter().any(is_again)
        };
        lost.retain(is_missed);
        lost.extend((survives..to).map(|nth| Stamp(nth as u64 + 1)));
        self.go_on_after_loss(to - survives, (Stamp(from as u64), &half_written));
        (self, lost)
    }
    /// The history goes on behind what may have been lost: what clients were shown of it is no version
    /// any more (replica's redo.rs).
    fn go_on_after_loss(&mut self, gone: usize, (kept, half_written): (Stamp, &[(Fid, u32)])) {
        let (time_ns, origin, op) = (0, Origin::default(), Op::Noop);
        let record = Record { time_ns, origin, uid: 0, gid: 0, path: Vec::new(), op };
        for _ in 0..gone {
            self.put_log(record.clone(), Loss::Gone);
        }
        self.put_log(record.clone(), Loss::Mark);
        let mark = self.stamp();
        let newer = |stamp: &mut Stamp| *stamp = if *stamp > kept { mark } else { *stamp };
        let fids: Vec<Fid> = self.tree.nodes().map(|node| node.meta.fid).collect();
        for fid in fids {
            if let Some(node) = self.tree.edit(fid) {
                newer(&mut node.meta.stamp);
                newer(&mut node.meta.data);
            }
        }
        for (fid, node) in half_written {
            self.put_log(record.clone(), Loss::None);
            let stamp = self.stamp();
            self.restamp(*fid, *node, stamp, true);
        }
    }
}

/// Whether ranges in a row are all of a file.
fn covers(ranges: &[Range], size: u64) -> bool {
    let mut end = 0;
    for range in ranges {
        if range.at > end {
            return false;
        }
        end = end.max(range.at + range.len);
    }
    size > 0 && end >= size
}

/// What lies beyond the source's end is left out: the file has become shorter since.
fn copy_ranges(from: &[u8], to: &mut Node, ranges: &[Range]) {
    for range in ranges {
        let len = from.len() as u64;
        let (start, end) = (range.at.min(len), (range.at + range.len).min(len));
        to.write(start, &from[start as usize..end as usize]);
    }
}

impl View for Volume {
    type Error = std::convert::Infallible;

    fn known(&self, base: Stamp) -> Option<Stamp> {
        let Some(nth) = base.0.checked_sub(1) else { return Some(base) };
        let entry = self.log.get(nth as usize)?;
        (entry.loss != Loss::Gone).then_some(base)
    }
    fn stands(&mut self, at: &Place) -> Result<Result<Option<certify::Seen>, Clash>, Self::Error> {
        Ok(match self.tree.get(at.dir) {
            Some(dir) if dir.is_dir() => {
                Ok(dir.entries.get(&at.name).and_then(|fid| self.tree.get(*fid).map(seen)))
            }
            _ => Err(Clash::DirGone),
        })
    }
    fn find(&mut self, fid: Fid) -> Result<Option<certify::Seen>, Self::Error> {
        Ok(self.tree.get(fid).filter(|_| self.is_there(fid)).map(seen))
    }
    fn target(&mut self, _: &Place) -> Result<Option<Vec<u8>>, Self::Error> {
        Ok(None) // the model has no symbolic links
    }
    fn holds(
        &mut self,
        fid: Fid,
        (node, seq): (u32, Seq),
        ranges: &[Range],
        content: Content<'_>,
    ) -> Result<bool, Self::Error> {
        let Some(file) = self.tree.get(fid) else { return Ok(false) };
        let mut other = file.clone();
        match content {
            Content::Inline(bytes) => write_ranges(&mut other, ranges, bytes),
            Content::Spooled => match self.spool.get(&Key { node, seq }) {
                Some(bytes) => copy_ranges(bytes, &mut other, ranges),
                None => return Ok(false),
            },
            Content::None | Content::Gone => return Ok(ranges.iter().all(|r| r.len == 0)),
        }
        Ok(other.data == file.data)
    }
    fn own_key(&self) -> &[u8] {
        b"user.imz"
    }
}

fn seen(node: &Node) -> certify::Seen {
    certify::Seen { meta: node.meta.clone(), attr: node.attr }
}
