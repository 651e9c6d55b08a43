//! The model of a client's cache: what replica's cache, merge, hydrate and limbo do, over the model
//! tree, and a journal that loses what was not synced. What pends is counted by the real table.

use std::collections::{BTreeMap, BTreeSet};

use imz::kml::record::{Change, Fid, Name, Op, Origin, ROOT, Range, Record, Seq, Stamp, Time};
use imz::lento::client::Bytes;
use imz::lento::message::{Object, Page};
use imz::lento::policy;
use imz::lento::rights::{Mode, Rights};
use imz::replica::meta::Meta;
use imz::replica::ops::time_of_ns;
use imz::replica::pending::Pending;

use crate::rng::Rng;
use crate::space::Room;
use crate::tree::{DIR_MODE, GRANULE_LEN, Node, Tree, set};

/// A record of the cache's own journal.
#[derive(Clone)]
pub struct Entry {
    pub record: Record,
    pub done: bool,
    /// the contents of its store are on the disk
    pub solid: bool,
    /// what the cache looked like right after it, for a loss of power
    after: Option<(Tree, BTreeSet<Fid>)>,
}

/// What a loss of power leaves for sure.
#[derive(Clone, Default)]
struct Durable {
    tree: Tree,
    limbo: BTreeSet<Fid>,
    epoch: u32,
    acked: Seq,
    current: Stamp,
    upto: usize,
    /// files that were written to and not stored
    unsaved: Vec<Fid>,
}

/// A file that is open for writing.
#[derive(Default)]
pub struct Writer {
    pub count: u32,
    /// it was written to since the last store record
    pub unsaved: bool,
    /// it has lost its last name: what is written to it is nobody's business
    gone: bool,
    ranges: Vec<Range>,
    old_size: u64,
}

/// One listing under way.
#[derive(Default)]
pub struct Listing {
    seen: BTreeSet<Name>,
    dir: Option<Object>,
    kept: bool,
}

pub struct Cache {
    pub tree: Tree,
    /// objects without a name that may get one again, or whose data are still to be shipped
    pub limbo: BTreeSet<Fid>,
    pub journal: Vec<Entry>,
    /// records that a loss of power cannot take
    pub synced: usize,
    pub pending: Pending,
    pub writers: BTreeMap<Fid, Writer>,
    pub online: bool,
    /// what may be done without asking
    pub rights: Rights,
    epoch: u32,
    /// as they were last written down
    pub acked: Seq,
    pub current: Stamp,
    /// the newest own record that the server was heard to keep
    pub heard: Seq,
    /// the number that the server gave; 0 before
    pub node: u32,
    next_fid: u64,
    durable: Durable,
    /// the node's clock, nanoseconds
    pub now_ns: u64,
    /// what is here is taken as it is
    pub as_is: bool,
    /// blocks that own later writes wrote over, by what they had in them
    pub over: BTreeSet<u64>,
    pub room: Room,
}

fn is_dir(object: &Object) -> bool {
    object.attr.mode & 0o170_000 == DIR_MODE
}

impl Cache {
    pub fn new() -> Cache {
        let root = Meta { complete: false, ..Meta::whole(ROOT) };
        let tree = Tree::new(root);
        let durable = Durable { tree: tree.clone(), epoch: 1, ..Durable::default() };
        Cache {
            tree,
            limbo: BTreeSet::new(),
            journal: Vec::new(),
            synced: 0,
            pending: Pending::new(Seq(0)),
            writers: BTreeMap::new(),
            online: false,
            rights: Rights::default(),
            epoch: 1,
            acked: Seq(0),
            current: Stamp(0),
            heard: Seq(0),
            node: 0,
            next_fid: 0,
            durable,
            now_ns: 0,
            as_is: false,
            over: BTreeSet::new(),
            room: Room::default(),
        }
    }
    pub fn new_meta(&mut self) -> Meta {
        self.next_fid += 1;
        Meta { epoch: self.epoch, ..Meta::whole(Fid::new(self.node, self.next_fid)) }
    }
    pub fn last(&self) -> Seq {
        Seq(self.journal.len() as u64)
    }
    pub fn now(&self) -> Time {
        time_of_ns(self.now_ns)
    }
    /// Whether no promise for the object was broken.
    pub fn is_current(&self, meta: &Meta) -> bool {
        !meta.stale && meta.epoch == self.epoch
    }
    /// Whether what is here of the object may be shown.
    pub fn is_valid(&self, meta: &Meta) -> bool {
        let ours = self.is_unsaved(meta.fid) || self.pending.is_ours(meta.fid);
        let valid = policy::answers(self.is_current(meta), ours, self.online);
        (valid && self.may(meta.fid, Mode::Read)) || self.as_is
    }
    /// Whether a record that the server is not known to have is of this kind.
    pub fn has_own(&self, kind: impl Fn(&Op) -> bool) -> bool {
        let unheard = &self.journal[(self.heard.0 as usize).min(self.journal.len())..];
        unheard.iter().any(|entry| entry.done && kind(&entry.record.op))
    }
    /// Whether nobody else stands against it. Away from the server nobody can be asked.
    pub fn may(&self, fid: Fid, mode: Mode) -> bool {
        self.rights.mode(fid) >= mode || !self.online
    }
    /// What can be done now with the object, without asking: nobody reads what is stale, and nothing
    /// is done with what is not known.
    pub fn acts(&self, fid: Fid) -> Mode {
        let Some(node) = self.tree.get(fid) else { return Mode::None };
        match self.rights.mode(fid) {
            Mode::Read if !self.is_current(&node.meta) => Mode::None,
            mode => mode,
        }
    }
    /// The version of an object that is all here; zero where it is not.
    pub fn version(&self, fid: Fid) -> Stamp {
        let here = |node: &&Node| node.meta.complete && node.meta.epoch == self.epoch;
        self.tree.get(fid).filter(here).map_or(Stamp(0), |node| node.meta.stamp)
    }
    pub fn is_unsaved(&self, fid: Fid) -> bool {
        self.writers.get(&fid).is_some_and(|writer| writer.unsaved)
    }
    pub fn bump_epoch(&mut self) {
        self.epoch += 1;
        self.durable.epoch = self.epoch;
    }

    // Own changes.

    /// Journals a change and carries it out.
    pub fn change(
        &mut self,
        op: Op,
        act: impl FnOnce(&mut Cache) -> Result<(), imz::sys::Errno>,
    ) -> Result<(), imz::sys::Errno> {
        let path = op.fid().map(|fid| crate::tree::path(&self.tree, fid)).unwrap_or_default();
        let origin = Origin::default();
        let path = path.into_bytes();
        let record = Record { time_ns: self.now_ns, origin, uid: 0, gid: 0, path, op };
        let entry = Entry { record, done: false, solid: false, after: None };
        let nth = self.journal.len();
        self.pending.add(Seq(nth as u64 + 1), &entry.record, entry.record.time_ns);
        self.journal.push(entry);
        let done = act(self);
        self.journal[nth].done = done.is_ok();
        self.room.settle(Seq(nth as u64 + 1), done.is_ok());
        self.journal[nth].after = Some((self.tree.clone(), self.limbo.clone()));
        done
    }
    pub fn begin_writing(&mut self, fid: Fid) {
        let writer = self.writers.entry(fid).or_default();
        if writer.gone {
            // the file has come back under its fid: the one that was open is another
            *writer = Writer { count: writer.count, ..Writer::default() };
        }
        writer.count += 1;
    }
    pub fn wrote(&mut self, fid: Fid, at: u64, bytes: &[u8]) {
        let now = self.now();
        let Some(writer) = self.writers.get_mut(&fid).filter(|writer| !writer.gone) else { return };
        let Some(file) = self.tree.edit(fid) else { return };
        let old_size = file.attr.size;
        let old = file.data.get(at as usize..at as usize + bytes.len());
        if let Some(block) = old.and_then(|old| old.try_into().ok()) {
            self.over.insert(u64::from_le_bytes(block));
        }
        file.write(at, bytes);
        file.attr.mtime = now;
        if !writer.unsaved {
            (writer.unsaved, writer.old_size) = (true, old_size);
        }
        writer.ranges.push(Range { at, len: bytes.len() as u64 });
    }
    /// Journals that the file's data changed, if they did since the last such record.
    pub fn store(&mut self, fid: Fid) {
        let Some(writer) = self.writers.get_mut(&fid).filter(|writer| writer.unsaved) else {
            return;
        };
        writer.unsaved = false;
        let (mut ranges, old_size) = (std::mem::take(&mut writer.ranges), writer.old_size);
        let Some(file) = self.shipped(fid) else { return };
        let (size, mtime, base) = (file.attr.size, file.attr.mtime, file.meta.stamp);
        if file.meta.complete {
            ranges = vec![Range { at: 0, len: size }];
        }
        let ranges = merged(ranges, size);
        self.room.charge_store(fid);
        let op = Op::Store { fid, base, size, mtime, ranges, old_size };
        let done = self.change(op, |_| Ok(()));
        debug_assert!(done.is_ok());
    }
    /// What was written to these so far, or to all, is journaled: others need it.
    pub fn save_written(&mut self, fids: &[Fid]) {
        let needed = |fid: &Fid| fids.is_empty() || fids.contains(fid);
        let open: Vec<Fid> = self.writers.keys().copied().filter(needed).collect();
        open.into_iter().for_each(|fid| self.store(fid));
    }
    pub fn end_writing(&mut self, fid: Fid) {
        self.store(fid);
        self.room.end_writing(fid);
        if let Some(writer) = self.writers.get_mut(&fid) {
            writer.count -= 1;
            if writer.count == 0 {
                self.writers.remove(&fid);
                self.drop_nameless(fid);
            }
        }
    }
    /// An object that has lost its last name goes, unless somebody needs it.
    pub fn drop_nameless(&mut self, fid: Fid) {
        let gone = self.tree.get(fid).is_some_and(|node| node.names.is_empty());
        if gone && !self.limbo.contains(&fid) && fid != ROOT {
            self.tree.remove(fid);
            if let Some(writer) = self.writers.get_mut(&fid) {
                (writer.gone, writer.unsaved) = (true, false);
            }
        }
    }
    /// The content that the object has for the server; `None` when it is gone.
    pub fn shipped(&self, fid: Fid) -> Option<&Node> {
        let node = self.tree.get(fid)?;
        (!node.names.is_empty() || self.limbo.contains(&fid)).then_some(node)
    }

    // Eviction.

    /// Files whose data may go, as far as this knows.
    pub fn evictable(&self) -> Vec<Fid> {
        let clean = |fid: Fid| {
            let dirty = self.pending.is_dirty(fid)
                && !imz::lento::faults::is_planted(imz::lento::faults::Fault::DirtyEvicted);
            !dirty && !self.writers.contains_key(&fid)
        };
        let full = |node: &&Node| !node.is_dir() && node.meta.complete && node.attr.size > 0;
        self.tree.nodes().filter(full).map(|node| node.meta.fid).filter(|f| clean(*f)).collect()
    }
    pub fn evict(&mut self, fid: Fid) {
        if let Some(file) = self.tree.edit(fid) {
            file.make_stub();
            let len = file.data.len();
            *file.data_mut() = vec![0; len];
        }
    }
    /// Whether the journal has contents of the file that the server is not known to keep.
    pub fn has_unshipped(&self, fid: Fid, acked: Seq) -> bool {
        self.journal[acked.0 as usize..].iter().any(|entry| {
            let data = match &entry.record.op {
                Op::Store { ranges, .. } => !ranges.is_empty(),
                _ => false,
            };
            entry.done && data && entry.record.op.fid() == Some(fid)
        })
    }

    // What comes from the server.

    /// What is missing of `from..to`; `None` when all is here.
    pub fn bytes(&self, fid: Fid, from: u64, to: u64) -> Option<Bytes> {
        let file = self.tree.get(fid)?;
        let need = file.missing(from, to);
        let after = need.last()? + GRANULE_LEN;
        let ahead = file.missing(after, after + 4 * GRANULE_LEN);
        let (stamp, base_size) = (file.meta.stamp, file.meta.base_size);
        Some(Bytes { fid, stamp, granule_len: GRANULE_LEN, base_size, need, ahead })
    }
    pub fn is_needed(&self, fid: Fid, mark: Seq) -> bool {
        if self.pending.own(fid).newest() > mark {
            return true;
        }
        self.tree.get(fid).is_some_and(Node::is_dir)
            && self.pending.newer_than(mark).any(|at| self.tree.is_below(at, fid))
    }

    pub fn merge_page(&mut self, listing: &mut Listing, dir: Fid, page: Page, mark: Seq) -> bool {
        let mut merged = Vec::new();
        let done = self.tree.get(dir).is_some();
        let read_only = page.read_only.clone();
        if done {
            self.merge_entries(listing, dir, page, mark, &mut merged);
        }
        self.rights.read(&merged, &read_only);
        done
    }
    fn merge_entries(
        &mut self,
        listing: &mut Listing,
        dir: Fid,
        page: Page,
        mark: Seq,
        merged: &mut Vec<Fid>,
    ) {
        for entry in page.entries {
            let Ok(name) = Name::new(&entry.name) else { continue };
            listing.seen.insert(name.clone());
            if entry.object.fid == dir || self.pending.name(dir, &name) > mark {
                continue;
            }
            match self.put_entry(dir, &name, &entry.object, mark) {
                true => merged.push(entry.object.fid),
                false => listing.kept = true,
            }
        }
        listing.dir = Some(page.dir);
    }
    /// False when it cannot be made what the server has.
    fn put_entry(&mut self, dir: Fid, name: &Name, object: &Object, mark: Seq) -> bool {
        let fid = object.fid;
        if let Some(here) = self.tree.at(dir, name) {
            if here == fid {
                self.update(object, mark);
                return true;
            }
            if !self.retire(dir, name, mark) {
                return false;
            }
        }
        let place = self.tree.get(fid).and_then(|node| node.names.first().cloned());
        match place {
            Some((from, old)) => {
                // one more name takes nothing from the others
                let is_link = !is_dir(object) && object.attr.nlink > 1;
                let ours = !is_link && self.pending.name(from, &old) > mark;
                if ours || (is_dir(object) && self.tree.is_below(dir, fid)) {
                    return false;
                }
                if !is_link {
                    self.tree.unname(from, &old);
                }
            }
            None if self.limbo.contains(&fid) => {
                if is_dir(object) && self.tree.is_below(dir, fid) {
                    return false;
                }
                self.limbo.remove(&fid);
            }
            None => {
                self.make_stub(dir, name, object, mark);
                return true;
            }
        }
        self.tree.name(dir, name, fid);
        self.update(object, mark);
        true
    }
    /// Takes away what the server does not have under this name; false: not now.
    fn retire(&mut self, dir: Fid, name: &Name, mark: Seq) -> bool {
        let Some(fid) = self.tree.at(dir, name) else { return true };
        // one of several names takes nothing with it
        let is_last = self.tree.get(fid).is_none_or(|node| node.names.len() <= 1);
        if is_last && self.is_needed(fid, mark) {
            return false;
        }
        self.tree.unname(dir, name);
        let is_last = |node: &&Node| node.names.is_empty();
        if let Some(node) = self.tree.get(fid).filter(is_last) {
            let has_data = node.meta.complete && node.attr.size > 0 || !node.have.is_empty();
            if node.is_dir() || has_data || self.writers.contains_key(&fid) {
                self.limbo.insert(fid);
            } else {
                self.tree.remove(fid);
            }
        }
        true
    }
    fn make_stub(&mut self, dir: Fid, name: &Name, object: &Object, mark: Seq) {
        let meta = Meta {
            fid: object.fid,
            stamp: object.stamp,
            stale: self.pending.own(object.fid).newest() > mark,
            epoch: self.epoch,
            nlink: nlink(object, 1),
            ..Meta::default()
        };
        let mut node = Node::new(meta, object.attr.mode, object.attr.mtime);
        if !is_dir(object) {
            node.resize(object.attr.size);
            node.make_stub();
        }
        self.tree.put(node);
        self.tree.name(dir, name, object.fid);
        self.set_attributes(object, false);
    }
    pub fn finish_listing(&mut self, listing: Listing, dir: Fid, mark: Seq, fresh: bool) {
        let Some(object) = listing.dir else { return };
        let Some(here) = self.tree.get(dir) else { return };
        let names: Vec<Name> = here.entries.keys().cloned().collect();
        let mut kept = listing.kept;
        for name in names.iter().filter(|name| !listing.seen.contains(name)) {
            if self.pending.name(dir, name) <= mark && !self.retire(dir, name, mark) {
                kept = true;
            }
        }
        let before = self.tree.get(dir).map(|node| node.meta.stamp).unwrap_or_default();
        self.update_dir(&object, mark, true);
        if kept || !fresh {
            // what has changed since is still to be looked at
            self.edit_meta(dir, |meta| (meta.stale, meta.stamp) = (true, before));
        }
    }
    fn edit_meta(&mut self, fid: Fid, change: impl FnOnce(&mut Meta)) {
        if let Some(node) = self.tree.edit(fid) {
            change(&mut node.meta);
        }
    }
    pub fn set_object(&mut self, object: &Object, mark: Seq) {
        if self.tree.get(object.fid).is_some_and(|node| node.is_dir() == is_dir(object)) {
            self.update(object, mark);
        }
    }
    /// Brings an object that is here to the server's state.
    fn update(&mut self, object: &Object, mark: Seq) {
        if is_dir(object) {
            return self.update_dir(object, mark, false);
        }
        let (fid, epoch, unsaved) = (object.fid, self.epoch, self.is_unsaved(object.fid));
        let newer = self.pending.own(fid).newest() > mark;
        let Some(file) = self.tree.edit(fid) else { return };
        if newer || unsaved {
            file.meta.stale |= object.stamp != file.meta.stamp;
            return;
        }
        let meta = &mut file.meta;
        let stored = object.stored.unwrap_or(object.stamp);
        let alike = file.attr.size == object.attr.size && file.attr.mtime == object.attr.mtime;
        let known = !meta.is_disowned() && stored <= meta.stamp;
        let same = meta.stamp == object.stamp && !meta.stale || known && alike;
        (meta.nlink, meta.epoch) = (nlink(object, file.attr.nlink), epoch);
        (meta.stamp, meta.stale) = (object.stamp, false);
        if !same {
            file.resize(object.attr.size);
            file.make_stub();
        }
        self.set_attributes(object, false);
    }
    fn update_dir(&mut self, object: &Object, mark: Seq, listed: bool) {
        let (own, epoch) = (self.pending.own(object.fid), self.epoch);
        let again = self.pending.doubt(object.fid, mark);
        self.edit_meta(object.fid, |meta| {
            meta.dir_came(object.stamp, epoch, listed);
            meta.stale |= again;
        });
        if own.attr <= mark {
            self.set_attributes(object, own.entries > mark);
        }
    }
    fn set_attributes(&mut self, object: &Object, keep_times: bool) {
        let Some(node) = self.tree.edit(object.fid) else { return };
        let attr = &object.attr;
        let mut new = Change { uid: Some(attr.uid), gid: Some(attr.gid), ..Change::default() };
        new.mode = Some(attr.mode & 0o7777);
        if !keep_times {
            (new.atime, new.mtime) = (Some(attr.atime), Some(attr.mtime));
        }
        set(node, &new);
    }
    pub fn write_range(
        &mut self,
        fid: Fid,
        stamp: Stamp,
        at: u64,
        bytes: &[u8],
        granule: Option<(u64, u64)>,
    ) {
        let Some(file) = self.tree.edit(fid) else { return };
        if file.meta.stamp != stamp || file.meta.complete {
            return;
        }
        let end = (at + bytes.len() as u64).min(file.meta.base_size).min(file.attr.size);
        for start in file.missing(at, end) {
            let (from, to) = (start.max(at), (start + GRANULE_LEN).min(end));
            file.write(from, &bytes[(from - at) as usize..(to - at) as usize]);
        }
        if let Some((start, len)) = granule {
            file.have.extend((start..start + len).step_by(GRANULE_LEN as usize));
            file.meta.complete = file.missing(0, file.meta.base_size).is_empty();
        }
    }
    pub fn mark_stale(&mut self, fids: &[Fid]) {
        for fid in fids {
            self.rights.broken(*fid);
            self.edit_meta(*fid, |meta| meta.stale = true);
        }
    }
    pub fn acknowledged(&mut self, upto: Seq, stamps: &[(Fid, Stamp)], conflicts: &[Fid]) {
        let epoch = self.epoch;
        for (fid, stamp) in stamps {
            let known = self.rights.mode(*fid) != Mode::None;
            let stored = self.pending.is_stored(*fid, upto);
            self.edit_meta(*fid, |meta| meta.kept(*stamp, epoch, known, stored));
        }
        let mut lost: Vec<Fid> = conflicts.to_vec();
        if stamps.is_empty() && conflicts.is_empty() {
            lost = self.pending.unheard();
        }
        for fid in &lost {
            self.edit_meta(*fid, Meta::disown);
        }
        for node in conflicts.iter().filter_map(|fid| self.tree.get(*fid)) {
            lost.extend(node.names.iter().map(|(dir, _)| *dir));
        }
        lost.extend(self.pending.take_doubtful(upto));
        self.mark_stale(&lost);
    }

    // Lives.

    /// Makes everything durable, then the cursors.
    pub fn keep(&mut self, acked: Seq, current: Stamp) {
        self.synced = self.journal.len();
        (self.acked, self.current) = (acked, current);
        self.clear_limbo(acked);
        for entry in &mut self.journal[self.durable.upto..] {
            (entry.solid, entry.after) = (true, None);
        }
        self.durable = Durable {
            tree: self.tree.clone(),
            limbo: self.limbo.clone(),
            epoch: self.epoch,
            acked,
            current,
            upto: self.journal.len(),
            unsaved: self.writers.keys().copied().filter(|fid| self.is_unsaved(*fid)).collect(),
        };
    }
    /// What rests without a name goes, unless something of it is not at the server.
    fn clear_limbo(&mut self, acked: Seq) {
        if self.pending.is_letting_go() {
            return; // that may be it
        }
        let resting: Vec<Fid> = self.limbo.iter().copied().collect();
        for fid in resting {
            if self.writers.contains_key(&fid) || self.is_needed(fid, acked) {
                continue;
            }
            self.limbo.remove(&fid);
            self.remove_all(fid);
        }
    }
    fn remove_all(&mut self, fid: Fid) {
        let entries = self.tree.get(fid).map(|node| node.entries.clone()).unwrap_or_default();
        for (name, below) in entries {
            self.tree.unname(fid, &name);
            if self.tree.get(below).is_some_and(|node| node.names.is_empty()) {
                self.remove_all(below);
            }
        }
        self.tree.remove(fid);
    }
    /// The process died: what it had in memory is gone.
    pub fn restart(&mut self) {
        self.online = false;
        self.room.restart(&self.journal, self.acked, false);
        self.rights = Rights::default();
        let open: Vec<Fid> = self.writers.keys().copied().collect();
        for fid in open {
            // the table of writers outlives the process
            self.store_anew(fid);
        }
        self.pending = Pending::new(self.acked);
        for nth in self.acked.0 as usize..self.journal.len() {
            let record = &self.journal[nth].record;
            self.pending.add(Seq(nth as u64 + 1), record, record.time_ns);
        }
        self.pending.doubt_all();
    }
    /// Journals all the data that are here of a file, whatever was written to it.
    fn store_anew(&mut self, fid: Fid) {
        if let Some(file) = self.tree.get(fid).filter(|file| !file.is_dir()) {
            let present = |at: &u64| Range { at: *at, len: GRANULE_LEN };
            let mut ranges: Vec<Range> = file.have.iter().map(present).collect();
            let (base_size, old_size) = (file.meta.base_size, file.attr.size);
            if old_size > base_size {
                ranges.push(Range { at: base_size, len: old_size - base_size });
            }
            self.writers
                .insert(fid, Writer { unsaved: true, ranges, old_size, ..Writer::default() });
            self.store(fid);
        }
        self.writers.remove(&fid);
        self.drop_nameless(fid);
    }
    /// The machine lost power. Returns the records whose contents are lost, and the first record
    /// that is lost altogether.
    pub fn power_cut(&mut self, rng: &mut Rng) -> (Vec<Seq>, Seq) {
        let mut open: BTreeSet<Fid> = self.writers.keys().copied().collect();
        open.extend(&self.durable.unsaved);
        self.writers.clear();
        let survives = rng.within(self.synced as u64, self.journal.len() as u64) as usize;
        let durable = self.durable.clone();
        let after = self.journal[durable.upto.min(survives)..survives].last();
        let (tree, limbo) = match after.and_then(|entry| entry.after.clone()) {
            Some(after) => after,
            None => (durable.tree.clone(), durable.limbo.clone()),
        };
        // everything is asked for again before it is believed
        (self.tree, self.limbo, self.epoch) = (tree, limbo, durable.epoch + 1);
        (self.acked, self.current) = (durable.acked, durable.current);
        self.journal.truncate(survives);
        self.synced = survives;
        self.room.restart(&self.journal, self.acked, true);
        // The newest store of each file says what its data are, if they reached the disk.
        let mut lost = Vec::new();
        let mut newest: BTreeMap<Fid, usize> = BTreeMap::new();
        for (nth, entry) in self.journal.iter().enumerate().skip(durable.upto) {
            if let (Op::Store { fid, .. }, false) = (&entry.record.op, entry.solid) {
                newest.insert(*fid, nth);
            }
        }
        for (fid, nth) in newest {
            if rng.one_in(2) {
                continue;
            }
            lost.extend((durable.upto..=nth).filter(|nth| {
                let entry = &self.journal[*nth];
                matches!(entry.record.op, Op::Store { fid: f, .. } if f == fid) && !entry.solid
            }));
            if let Some(file) = self.tree.edit(fid) {
                let len = file.data.len();
                *file.data_mut() = vec![0; len];
            }
        }
        let nameless: Vec<Fid> =
            self.tree.nodes().filter(|n| n.names.is_empty()).map(|n| n.meta.fid).collect();
        for fid in nameless {
            self.drop_nameless(fid);
        }
        self.restart();
        for fid in open {
            self.store_anew(fid);
        }
        // Contents that pend are as they are; others that changed since all was durable are not
        // believed (replica's power.rs).
        let files: Vec<Fid> =
            self.tree.nodes().filter(|node| !node.is_dir()).map(|node| node.meta.fid).collect();
        for fid in files {
            let before = durable.tree.get(fid).map(|node| &node.data);
            let same = before == self.tree.get(fid).map(|node| &node.data);
            if self.pending.is_dirty(fid) {
                self.store_anew(fid);
            } else if !same {
                self.evict(fid);
                self.edit_meta(fid, Meta::disown);
            }
        }
        for entry in &mut self.journal {
            entry.solid = true;
        }
        self.keep(self.acked, self.current);
        (lost.into_iter().map(|nth| Seq(nth as u64 + 1)).collect(), Seq(survives as u64 + 1))
    }
}

/// The server's count of names, unless the backing file with `here` of them says the same for ever.
fn nlink(object: &Object, here: u32) -> u32 {
    let counted = !is_dir(object) && (object.attr.nlink > 1 || here > 1);
    if counted { object.attr.nlink } else { 0 }
}

/// Sorted and apart, and cut to the file's size.
fn merged(mut ranges: Vec<Range>, size: u64) -> Vec<Range> {
    ranges.sort_by_key(|range| range.at);
    let mut out: Vec<Range> = Vec::new();
    for range in ranges {
        let end = (range.at + range.len).min(size);
        match out.last_mut() {
            Some(last) if range.at <= last.at + last.len => {
                last.len = last.len.max(end.saturating_sub(last.at));
            }
            _ if end > range.at => out.push(Range { at: range.at, len: end - range.at }),
            _ => {}
        }
    }
    out
}
