//! What this node changed and the server does not have yet: by object, and by name.
//!
//! In memory only, and rebuilt from the journal at start. A listing or an object that was fetched
//! when the server had own records up to `mark` says nothing about what a newer own record
//! changed: there, what is here stays. So entries outlive their acknowledgement until no fetch is
//! under way that might be older ([`Pending::prune`]). What was let go for others counts as theirs
//! already ([`Pending::let_go`]): the server says nothing about it before it has our changes, or
//! the connection breaks. Its owner makes it safe for threads.

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::kml::record::{Fid, Name, Op, Record, Seq};

/// The newest own records on one object, by what they changed; 0: none.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Own {
    /// its attributes, or its being there at all
    pub attr: Seq,
    /// a file's contents
    pub data: Seq,
    /// a directory's entries, and with them its times
    pub entries: Seq,
}

impl Own {
    /// The newest of all.
    pub fn newest(&self) -> Seq {
        self.attr.max(self.data).max(self.entries)
    }
}

/// What becomes of objects that were let go.
#[derive(PartialEq, Eq, Debug)]
pub struct LetGo {
    /// others may have them once the server has own records up to here
    pub upto: Seq,
    /// can be read on
    pub kept: Vec<Fid>,
    /// have to be asked for
    pub gone: Vec<Fid>,
}

struct Waiting {
    seq: Seq,
    at_ns: u64,
    len: u64,
}

#[derive(Default)]
pub struct Pending {
    objects: HashMap<Fid, Own>,
    names: HashMap<Fid, HashMap<Name, Seq>>,
    /// objects that were let go, and own records up to which that is so
    let_go: HashMap<Fid, Seq>,
    all_let_go: Seq,
    name_count: usize,
    /// records that are not acknowledged, in order
    waiting: VecDeque<Waiting>,
    len: u64,
    written_len: u64,
    acked: Seq,
    /// directories that came while the server was not known to have own changes of them, up to
    /// these records
    doubtful: BTreeMap<Fid, Seq>,
    /// entries up to here have gone
    pruned: Seq,
    acked_since_prune: usize,
}

/// Bytes that the record announces.
pub fn data_len(record: &Record) -> u64 {
    match &record.op {
        Op::Store { ranges, .. } => {
            ranges.iter().fold(0, |sum: u64, range| sum.saturating_add(range.len))
        }
        _ => 0,
    }
}

impl Pending {
    /// Nothing pends, and the server has everything up to `acked`.
    pub fn new(acked: Seq) -> Pending {
        Pending { acked, pruned: acked, ..Pending::default() }
    }

    /// A record was appended. Records may come a little out of order. `at_ns`: when it was made,
    /// by a clock that nobody sets.
    pub fn add(&mut self, seq: Seq, record: &Record, at_ns: u64) {
        let len = data_len(record);
        let at = self.waiting.iter().rposition(|w| w.seq < seq).map_or(0, |at| at + 1);
        self.waiting.insert(at, Waiting { seq, at_ns, len });
        self.len = self.len.saturating_add(len);
        self.written_len = self.written_len.saturating_add(len);
        for fid in [record.op.fid(), record.op.other()].into_iter().flatten() {
            let own = self.objects.entry(fid).or_default();
            own.attr = own.attr.max(seq);
            if changes_data(&record.op) {
                own.data = own.data.max(seq);
            }
        }
        for place in record.op.places().into_iter().flatten() {
            let dir = self.objects.entry(place.dir).or_default();
            dir.entries = dir.entries.max(seq);
            let names = self.names.entry(place.dir).or_default();
            let newest = names.entry(place.name.clone()).or_insert_with(|| {
                self.name_count += 1;
                seq
            });
            *newest = (*newest).max(seq);
        }
    }

    /// The server keeps everything up to here.
    pub fn acked(&mut self, upto: Seq) {
        self.acked = self.acked.max(upto);
        while let Some(first) = self.waiting.front().filter(|first| first.seq <= upto) {
            self.len = self.len.saturating_sub(first.len);
            self.waiting.pop_front();
            self.acked_since_prune += 1;
        }
    }

    /// What came about a directory, asked for when the server had `mark`, left alone what newer own
    /// records changed. Perhaps it had them in it already, and others had changed the same names
    /// since. True when such a record is acknowledged by now: the directory is to be looked at anew.
    /// For those that are not, [`Pending::take_doubtful`] names it later.
    pub fn doubt(&mut self, dir: Fid, mark: Seq) -> bool {
        let own = self.own(dir);
        if own.newest() > self.acked.max(mark) {
            self.doubtful.insert(dir, own.newest());
        }
        let too_late = |seq: Seq| seq > mark && seq <= self.acked;
        let names = || self.names.get(&dir).into_iter().flat_map(HashMap::values);
        too_late(own.attr) || (own.entries > mark && names().any(|seq| too_late(*seq)))
    }
    /// After a start nobody knows what came in the life before.
    pub fn doubt_all(&mut self) {
        let dirs: Vec<Fid> = self.names.keys().copied().collect();
        for dir in dirs {
            self.doubt(dir, self.acked);
        }
    }
    /// The server keeps everything up to here: these directories must be looked at anew.
    pub fn take_doubtful(&mut self, upto: Seq) -> Vec<Fid> {
        self.doubtful.extract_if(.., |_, seq| *seq <= upto).map(|(dir, _)| dir).collect()
    }

    /// The server turned out to have no more than this; what it lost is added again.
    pub fn fell_back(&mut self, acked: Seq) {
        let written_len = self.written_len; // it only grows
        *self = Pending { written_len, ..Pending::new(acked) };
    }

    /// No fetch is under way that was sent when less than `floor` was acknowledged, and a crash would
    /// not go back behind it. Work is put off until it is worth while.
    pub fn prune(&mut self, floor: Seq) {
        let floor = floor.min(self.acked);
        self.let_go.retain(|_, seq| *seq > floor);
        let size = self.objects.len() + self.name_count;
        if floor <= self.pruned || self.acked_since_prune * 4 < size {
            return;
        }
        self.objects.retain(|_, own| own.newest() > floor);
        self.names.retain(|_, names| {
            names.retain(|_, seq| *seq > floor);
            !names.is_empty()
        });
        self.name_count = self.names.values().map(HashMap::len).sum();
        (self.pruned, self.acked_since_prune) = (floor, 0);
    }

    /// The newest own records on an object, but for what was let go.
    pub fn own(&self, fid: Fid) -> Own {
        let own = self.made(fid);
        let gone = self.let_go_upto(fid);
        let rest = |seq: Seq| if seq > gone { seq } else { Seq(0) };
        Own { attr: rest(own.attr), data: rest(own.data), entries: rest(own.entries) }
    }
    /// The newest own records on an object, let go or not.
    pub fn made(&self, fid: Fid) -> Own {
        self.objects.get(&fid).copied().unwrap_or_default()
    }
    /// The newest own record on a name, unless the directory was let go since.
    pub fn name(&self, dir: Fid, name: &Name) -> Seq {
        let newest = self.names.get(&dir).and_then(|names| names.get(name)).copied();
        newest.filter(|seq| *seq > self.let_go_upto(dir)).unwrap_or_default()
    }
    fn let_go_upto(&self, fid: Fid) -> Seq {
        self.let_go.get(&fid).copied().unwrap_or_default().max(self.all_let_go)
    }
    /// Others need these (all, if none is named): from now on they count as theirs. `last`: the newest
    /// own record of all; `readable`: they can be read on here, but for what the server lacks.
    pub fn let_go(&mut self, fids: &[Fid], last: Seq, readable: bool) -> LetGo {
        // what was let go before is still on its way, and whoever asks now must wait for it, too
        let newest = |fid: &Fid| self.made(*fid).newest();
        let upto = fids.iter().map(newest).max().unwrap_or(last);
        let is_kept = |fid: &Fid| readable && newest(fid) <= self.acked;
        let (kept, gone) = fids.iter().partition(|fid| is_kept(fid));
        if fids.is_empty() {
            self.all_let_go = self.all_let_go.max(upto);
        }
        for fid in fids {
            let known = self.let_go.entry(*fid).or_default();
            *known = upto.max(*known);
        }
        LetGo { upto, kept, gone }
    }
    /// Whether the server may lack something that was let go.
    pub fn is_letting_go(&self) -> bool {
        self.all_let_go > self.acked || self.let_go.values().any(|upto| *upto > self.acked)
    }
    /// The connection is gone: what has not arrived is ours again.
    pub fn take_back(&mut self) {
        self.let_go.clear();
        self.all_let_go = Seq(0);
    }
    /// Whether the server lacks something of the object itself (entries do not count).
    pub fn is_ours(&self, fid: Fid) -> bool {
        let own = self.own(fid);
        own.attr.max(own.data) > self.acked
    }
    /// Whether the server lacks contents of the file: it must not be evicted.
    pub fn is_dirty(&self, fid: Fid) -> bool {
        self.objects.get(&fid).is_some_and(|own| own.data > self.acked)
    }
    /// Whether the journal names the object, or would after a crash: something of it, attributes or
    /// data, is not at the server, be it on its way, or the server is not known for sure to have it.
    /// `kept`: own records up to here are known to be there, also after a crash.
    pub fn is_named(&self, fid: Fid, kept: Seq) -> bool {
        let newest = self.objects.get(&fid).map_or(Seq(0), |own| own.attr.max(own.data));
        newest > self.acked.min(kept)
    }
    /// The server has all own records up to here.
    pub fn acked_upto(&self) -> Seq {
        self.acked
    }
    /// Whether a later record than `seq` is about the object itself: it may say that it is gone.
    pub fn is_changed_after(&self, fid: Fid, seq: Seq) -> bool {
        self.objects.get(&fid).is_some_and(|own| own.attr > seq)
    }
    /// Whether the newest own record on the object changed its data, and is not newer than `upto`.
    pub fn is_stored(&self, fid: Fid, upto: Seq) -> bool {
        self.objects
            .get(&fid)
            .is_some_and(|own| own.data > Seq(0) && own.data == own.newest() && own.data <= upto)
    }
    /// Everything that is touched by records which the server is not known to have.
    pub fn unheard(&self) -> Vec<Fid> {
        let newer = self.objects.iter().filter(|(_, own)| own.newest() > self.acked);
        newer.map(|(fid, _)| *fid).collect()
    }
    /// Every object that own records newer than `mark` are about, and every directory in which
    /// such a record changed a name.
    pub fn newer_than(&self, mark: Seq) -> impl Iterator<Item = Fid> + '_ {
        self.objects.keys().copied().filter(move |fid| self.own(*fid).newest() > mark)
    }
    /// Records that the server lacks.
    pub fn count(&self) -> u64 {
        self.waiting.len() as u64
    }
    /// Contents that the server lacks, bytes (of a file that was stored twice, both).
    pub fn len(&self) -> u64 {
        self.len
    }
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
    /// Contents of all records that were ever added, bytes.
    pub fn written_len(&self) -> u64 {
        self.written_len
    }
    /// When the oldest record was made that the server lacks, by the clock that came with it.
    pub fn oldest_ns(&self) -> Option<u64> {
        self.waiting.front().map(|first| first.at_ns)
    }
}

fn changes_data(op: &Op) -> bool {
    match op {
        Op::Store { .. } | Op::Create { .. } => true,
        Op::Setattr { new, .. } => new.size.is_some(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kml::record::{Change, Origin, Over, Place, Range, Stamp, Time};

    fn name(s: &str) -> Name {
        Name::new(s.as_bytes()).unwrap()
    }

    fn record(op: Op) -> Record {
        let (origin, path) = (Origin::default(), vec![]);
        Record { time_ns: 70, origin, uid: 0, gid: 0, path, op }
    }

    fn place(dir: u64, n: &str) -> Place {
        Place { dir: Fid(dir), base: Stamp(0), name: name(n) }
    }

    fn store(fid: u64, len: u64) -> Record {
        let ranges = vec![Range { at: 0, len }, Range { at: 50, len: 1 }];
        let (base, mtime) = (Stamp(0), Time::default());
        record(Op::Store { fid: Fid(fid), base, size: len, mtime, ranges, old_size: 0 })
    }

    fn create(dir: u64, n: &str, fid: u64) -> Record {
        record(Op::Create { at: place(dir, n), fid: Fid(fid), mode: 0o644, umask: 0 })
    }

    #[test]
    fn counts_what_the_server_lacks() {
        let mut table = Pending::new(Seq(0));
        table.add(Seq(1), &create(1, "a", 9), 70);
        table.add(Seq(3), &store(9, 2000), 70);
        table.add(Seq(2), &store(9, 1000), 70);
        assert_eq!((table.count(), table.len(), table.written_len()), (3, 3002, 3002));
        assert_eq!(table.oldest_ns(), Some(70));
        assert!(table.is_dirty(Fid(9)) && !table.is_ours(Fid(1)));
        table.acked(Seq(2));
        assert_eq!((table.count(), table.len(), table.written_len()), (1, 2001, 3002));
        assert!(table.is_dirty(Fid(9)));
        table.acked(Seq(3));
        assert_eq!((table.count(), table.len(), table.oldest_ns()), (0, 0, None));
        assert!(!table.is_dirty(Fid(9)) && !table.is_ours(Fid(9)));
    }

    #[test]
    fn who_asks_later_waits_for_what_was_let_go_before() {
        let (clean, dirty, last) = (Fid(8), Fid(9), Seq(3));
        let one_after_another: [&[Fid]; 3] = [&[], &[dirty], &[clean, dirty]];
        for first in one_after_another {
            let mut table = Pending::new(Seq(0));
            table.add(Seq(1), &store(8, 10), 70);
            table.add(Seq(2), &store(9, 10), 70);
            table.add(Seq(3), &create(1, "a", 7), 70);
            table.acked(Seq(1));
            let upto = table.let_go(first, last, true).upto;
            assert_eq!(upto, if first.is_empty() { last } else { Seq(2) });
            assert_eq!(table.own(dirty).newest(), Seq(0), "it counts as theirs");
            let again = table.let_go(&[clean, dirty], last, true);
            let want = LetGo { upto: Seq(2), kept: vec![clean], gone: vec![dirty] };
            assert_eq!(again, want, "after {first:?}");
            assert_eq!(table.let_go(&[clean], last, false).gone, [clean]);
        }
    }

    #[test]
    fn every_kind_of_change_has_its_mark() {
        let mut table = Pending::new(Seq(0));
        let over = Over::Exchanged { fid: Fid(8), base: Stamp(0) };
        let (from, to) = (place(1, "a"), place(2, "b"));
        let rename = Op::Rename { from, to, fid: Fid(7), base: Stamp(0), over };
        table.add(Seq(5), &record(rename), 70);
        assert_eq!(table.name(Fid(1), &name("a")), Seq(5));
        assert_eq!(table.name(Fid(2), &name("b")), Seq(5));
        assert_eq!(table.name(Fid(2), &name("a")), Seq(0));
        for fid in [7, 8] {
            let own = Own { attr: Seq(5), ..Own::default() };
            assert_eq!(table.own(Fid(fid)), own);
        }
        assert_eq!(table.own(Fid(2)), Own { entries: Seq(5), ..Own::default() });
        assert!(!table.is_stored(Fid(7), Seq(5)));
        let cut = Change { size: Some(0), ..Change::default() };
        let new = Change { mode: Some(0o600), ..Change::default() };
        let (base, old) = (Stamp(0), Change::default());
        table.add(Seq(6), &record(Op::Setattr { fid: Fid(7), base, new, old }), 70);
        assert!(table.is_ours(Fid(7)) && !table.is_dirty(Fid(7)));
        table.add(Seq(7), &record(Op::Setattr { fid: Fid(7), base, new: cut, old }), 70);
        assert!(table.is_dirty(Fid(7)));
        assert!(table.is_stored(Fid(7), Seq(7)) && !table.is_stored(Fid(7), Seq(6)));
        table.acked(Seq(5));
        assert_eq!(table.unheard(), [Fid(7)]);
        let mut newer: Vec<Fid> = table.newer_than(Seq(5)).collect();
        newer.sort();
        assert_eq!(newer, [Fid(7)]);
    }

    #[test]
    fn a_directory_that_came_too_early_is_looked_at_again() {
        let mut table = Pending::new(Seq(0));
        table.add(Seq(1), &create(1, "a", 9), 70);
        table.add(Seq(2), &create(1, "b", 10), 70);
        table.add(Seq(3), &create(2, "c", 11), 70);
        assert!(!table.doubt(Fid(1), Seq(0)));
        assert_eq!(table.take_doubtful(Seq(1)), []);
        assert_eq!(table.take_doubtful(Seq(3)), [Fid(1)]);
        table.doubt_all();
        table.acked(Seq(3));
        assert_eq!(table.take_doubtful(Seq(3)), [Fid(1), Fid(2)]);
        assert!(table.doubt(Fid(1), Seq(1)), "its last change was acknowledged meanwhile");
        assert!(!table.doubt(Fid(1), Seq(2)), "it is in what came");
        assert_eq!(table.take_doubtful(Seq(9)), []);
    }

    #[test]
    fn marks_outlive_the_acknowledgement_until_pruned() {
        let mut table = Pending::new(Seq(0));
        for seq in 1..=100 {
            table.add(Seq(seq), &create(1, &seq.to_string(), 1000 + seq), 70);
        }
        table.acked(Seq(100));
        table.prune(Seq(40));
        assert_eq!(table.name(Fid(1), &name("40")), Seq(0));
        assert_eq!(table.name(Fid(1), &name("41")), Seq(41));
        assert_eq!(table.own(Fid(1041)).attr, Seq(41));
        table.add(Seq(101), &create(2, "x", 1), 70);
        table.acked(Seq(101));
        table.prune(Seq(101));
        assert_eq!(table.name(Fid(2), &name("x")), Seq(101), "one record is not worth the work");
    }
}
