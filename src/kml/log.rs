//! The log: records in, records out, for all threads of a process at once.
//!
//! ```text
//!   append -> Ticket      the intention is in the map: it survives the death of the process
//!   settle(Ticket, Done)  the operation was carried out (or Void: it was not)
//!   sync(seq)             it survives a power cut too
//!   trim(seq)             nobody needs it any more
//! ```
//!
//! Invariants: seqs have no gaps; a record never changes, but for its outcome word; `synced` never
//! says more than is durable; a segment is begun only when the one before it is durable as a whole,
//! so that damage there is never taken for a torn tail; after a failed sync nothing more is
//! accepted, ever (what the disk holds is then unknown, and a second sync may succeed falsely).
//!
//! Locks, in this order: `syncing` (one sync or extension at a time), `inner` (held for the copy
//! into the map, and while a segment is added), then any one of the small ones.
//!
//! Absent on purpose: threads, clocks, any wish to ship what is here. Outcomes are made durable by
//! [`Log::sync_settled`] only: after a power cut, a record behind that may read as intended again.
//!
//! Opening checks everything that was not yet both durable and settled; older segments are checked
//! as they are read.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::open::{create_piece, first_piece, open_piece, read_cursors, recover_pieces};
use self::read::{Entries, EntriesBack};
use crate::kml::codec::{
    self, CursorPage, Entry, Fault, Outcome, SEGMENT_HEADER_LEN, SegmentHead, record_at,
};
use crate::kml::record::{Record, Seq};
use crate::kml::recover::{self, Spot};
use crate::kml::store::{Dir, Segment, Store, segment_name, segments_in};
use crate::sys::crash;

/// Length of a segment unless told otherwise, bytes: some 30,000 records. Where crashes are tried
/// it is short, so that it is met how one ends.
pub const SEGMENT_LEN: usize =
    if cfg!(feature = "crash-points") { SEGMENT_LEN_MIN } else { 8 << 20 };
/// Shortest segment, bytes: the longest record fits.
pub const SEGMENT_LEN_MIN: usize = 256 << 10;
/// Longest segment, bytes.
pub const SEGMENT_LEN_MAX: usize = 1 << 30;
/// Name of the cursor that the log keeps: the newest seq that is known to be durable.
pub const SYNCED: &str = "synced";
/// Name of the cursor that the log keeps: see [`Log::settled_through`].
pub const SETTLED: &str = "settled";
/// One place in so many records is remembered.
const STRIDE: u64 = 64;

/// What may be chosen when a journal is made.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// bytes, a multiple of 4096, `SEGMENT_LEN_MIN..=SEGMENT_LEN_MAX`
    pub segment_len: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options { segment_len: SEGMENT_LEN }
    }
}

/// Why the journal did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("no journal in {}", dir.display())]
    Missing { dir: PathBuf },
    #[error("the journal in {} is in use by another process", dir.display())]
    Locked { dir: PathBuf },
    #[error("the journal in {} is that of node {found}, not of node {wanted}", dir.display())]
    OtherNode { dir: PathBuf, found: u32, wanted: u32 },
    #[error(
        "segments of {len} bytes: not between {SEGMENT_LEN_MIN} and {SEGMENT_LEN_MAX}, or no multiple of 4096"
    )]
    SegmentLen { len: usize },
    #[error("{} is damaged at byte {at}, where record {} should be: {why}", file.display(), seq.0)]
    Corrupt { file: PathBuf, at: u64, seq: Seq, why: Fault },
    #[error("record {} is not in the journal, which holds {} to {}", seq.0, first.0, last.0)]
    NotKept { seq: Seq, first: Seq, last: Seq },
    #[error("a record cannot be written: {0}")]
    Unwritable(Fault),
    #[error("the cursor `{name}` cannot be kept")]
    Cursor { name: String },
    #[error("no room to extend the journal")]
    NoRoom(#[source] io::Error),
    #[error("cannot {what} {}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("the journal is closed for good: an earlier sync failed")]
    Poisoned,
}

/// A record that was appended and not settled yet.
#[derive(Clone)]
pub struct Ticket {
    pub seq: Seq,
    segment: Arc<dyn Segment>,
    at: usize,
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ticket({})", self.seq.0)
    }
}

/// One journal, open. `Send + Sync`: put it in an `Arc`.
pub struct Log {
    node: u32,
    incarnation: u128,
    segment_len: usize,
    /// newest seq, 0 if there is none; stored after the record's bytes
    last: AtomicU64,
    synced: AtomicU64,
    /// all outcomes up to here are durable, since this life began
    outcomes: AtomicU64,
    poisoned: AtomicBool,
    syncing: Mutex<()>,
    inner: Mutex<Inner>,
    settled: Mutex<Settled>,
    cursors: Mutex<Cursors>,
    store: Box<dyn Store>,
}

struct Inner {
    /// oldest first, never empty
    pieces: VecDeque<Arc<Piece>>,
    /// where the next record goes, in the newest piece
    spot: Spot,
}

/// One segment, and the way into it.
struct Piece {
    head: SegmentHead,
    segment: Arc<dyn Segment>,
    /// first seq of the piece behind this one; `u64::MAX` while there is none
    limit: AtomicU64,
    /// `at` and chain of every `STRIDE`th record; `None` until somebody asks
    index: Mutex<Option<Vec<(usize, u32)>>>,
}

/// Which records are settled: all up to `through`, and behind it those that say `true`.
struct Settled {
    through: u64,
    ahead: VecDeque<bool>,
}

struct Cursors {
    page: CursorPage,
    /// the page that is known to be durable; the other one is written next
    durable_slot: usize,
}

/// A panic while a lock was held cannot leave these half-changed: each is changed by one store.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Settled {
    fn settle(&mut self, seq: Seq) {
        let Some(ahead) = seq.0.checked_sub(self.through + 1) else { return };
        let ahead = ahead as usize;
        if self.ahead.len() <= ahead {
            self.ahead.resize(ahead + 1, false);
        }
        self.ahead[ahead] = true;
        while self.ahead.front() == Some(&true) {
            self.ahead.pop_front();
            self.through += 1;
        }
    }
}

impl Piece {
    fn new(head: SegmentHead, segment: Arc<dyn Segment>) -> Piece {
        Piece { head, segment, limit: AtomicU64::new(u64::MAX), index: Mutex::new(None) }
    }
    fn begin(&self) -> Spot {
        Spot { at: SEGMENT_HEADER_LEN, seq: self.head.first, chain: self.head.seed }
    }
    fn limit(&self) -> u64 {
        self.limit.load(Ordering::Acquire)
    }
    fn note(&self, spot: Spot) {
        if (spot.seq.0 - self.head.first.0).is_multiple_of(STRIDE)
            && let Some(index) = &mut *lock(&self.index)
        {
            index.push((spot.at, spot.chain));
        }
    }
    /// Where the record `seq` stands, which is known to be in this piece.
    fn find(&self, seq: Seq, last: Seq) -> Result<Spot, (Spot, Fault)> {
        let mut buf = Vec::new();
        let mut index = lock(&self.index);
        let marks = match &mut *index {
            Some(marks) => marks,
            none => none.insert(self.make_index(last, &mut buf)?),
        };
        let nth = ((seq.0 - self.head.first.0) / STRIDE).min(marks.len() as u64 - 1);
        let (at, chain) = marks[nth as usize];
        drop(index);
        let mut spot = Spot { at, seq: Seq(self.head.first.0 + nth * STRIDE), chain };
        while spot.seq < seq {
            recover::skip(&*self.segment, &mut spot, &mut buf).map_err(|why| (spot, why))?;
        }
        Ok(spot)
    }
    /// The index of a piece that was not read at open: all of it is checked now.
    fn make_index(&self, last: Seq, buf: &mut Vec<u8>) -> Result<Vec<(usize, u32)>, (Spot, Fault)> {
        let mut marks = Vec::new();
        let mut spot = self.begin();
        while spot.seq.0 < self.limit().min(last.0 + 1) {
            if (spot.seq.0 - self.head.first.0).is_multiple_of(STRIDE) {
                marks.push((spot.at, spot.chain));
            }
            recover::skip(&*self.segment, &mut spot, buf).map_err(|why| (spot, why))?;
        }
        if marks.is_empty() { Err((spot, Fault::Short)) } else { Ok(marks) }
    }
}

impl Log {
    /// Opens the journal in `dir`, or makes directory and journal.
    ///
    /// # Errors
    /// See [`LogError`]; nothing is changed then, but that a directory may have been made.
    pub fn open_or_create(
        dir: &Path,
        node: u32,
        incarnation: u128,
        options: Options,
    ) -> Result<Log, LogError> {
        let len = options.segment_len;
        if !(SEGMENT_LEN_MIN..=SEGMENT_LEN_MAX).contains(&len) || !len.is_multiple_of(4096) {
            return Err(LogError::SegmentLen { len });
        }
        std::fs::create_dir_all(dir).map_err(|source| io_error("make", dir, source))?;
        let log = Log::with_store(Log::lock_dir(dir)?, Some((node, incarnation)), options)?;
        if log.node != node {
            return Err(LogError::OtherNode { dir: dir.into(), found: log.node, wanted: node });
        }
        Ok(log)
    }

    /// Opens the journal in `dir`, which must be there. Damage that is no torn tail is refused.
    ///
    /// # Errors
    /// See [`LogError`].
    pub fn open(dir: &Path) -> Result<Log, LogError> {
        match segments_in(dir) {
            Ok(found) if !found.is_empty() => {}
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("read", dir, source));
            }
            _ => return Err(LogError::Missing { dir: dir.into() }),
        }
        Log::with_store(Log::lock_dir(dir)?, None, Options::default())
    }

    fn lock_dir(dir: &Path) -> Result<Box<dyn Store>, LogError> {
        match Dir::lock(dir).map_err(|source| io_error("lock the journal in", dir, source))? {
            Some(store) => Ok(Box::new(store)),
            None => Err(LogError::Locked { dir: dir.into() }),
        }
    }

    /// Opens, or with `make` makes, the journal in any store.
    ///
    /// # Errors
    /// See [`LogError`].
    pub fn with_store(
        store: Box<dyn Store>,
        make: Option<(u32, u128)>,
        options: Options,
    ) -> Result<Log, LogError> {
        let dir = store.path("");
        let firsts = store.list().map_err(|source| io_error("read", &dir, source))?;
        let cursors = read_cursors(&*store, firsts.is_empty())?;
        let mut pieces = Vec::new();
        for first in &firsts {
            pieces.push(open_piece(&*store, *first)?);
        }
        if pieces.is_empty() {
            let (node, incarnation) = make.ok_or(LogError::Missing { dir })?;
            pieces.push(first_piece(&*store, &cursors, node, incarnation, options)?);
        }
        let found = recover_pieces(&*store, &pieces, &cursors.page)?;
        let head = pieces[0].head;
        let segment_len = pieces.last().map_or(options.segment_len, |last| last.segment.size());
        Ok(Log {
            node: head.node,
            incarnation: head.incarnation,
            segment_len,
            last: AtomicU64::new(found.spot.seq.0 - 1),
            synced: AtomicU64::new(found.synced),
            outcomes: AtomicU64::new(found.outcomes),
            poisoned: AtomicBool::new(false),
            syncing: Mutex::new(()),
            inner: Mutex::new(Inner { pieces: pieces.into(), spot: found.spot }),
            settled: Mutex::new(found.settled),
            cursors: Mutex::new(cursors),
            store,
        })
    }

    /// Writes an intention. Durable on return: no (see [`Log::sync`]), but it survives the death
    /// of the process.
    ///
    /// # Errors
    /// [`LogError::NoRoom`] and [`LogError::Unwritable`] leave the log as it was and usable.
    pub fn append(&self, record: &Record) -> Result<Ticket, LogError> {
        let mut bytes = codec::draft(record).map_err(LogError::Unwritable)?;
        loop {
            let mut inner = lock(&self.inner);
            self.check_poison()?;
            let piece = newest(&inner);
            let spot = inner.spot;
            if spot.at + bytes.len() > piece.segment.size() {
                drop(inner);
                self.extend(bytes.len())?;
                continue;
            }
            let chain = codec::seal(&mut bytes, spot.seq, spot.chain, self.synced());
            piece.segment.put(spot.at, &bytes);
            piece.note(spot);
            inner.spot = Spot { at: spot.at + bytes.len(), seq: spot.seq.next(), chain };
            self.last.store(spot.seq.0, Ordering::Release);
            crash::point("log-appended");
            return Ok(Ticket { seq: spot.seq, segment: piece.segment.clone(), at: spot.at });
        }
    }

    /// Says what became of an intention. Durable on return: no.
    pub fn settle(&self, ticket: Ticket, outcome: Outcome) {
        ticket.segment.set_word(ticket.at + record_at::OUTCOME, outcome.word());
        crash::point("log-settled");
        if outcome != Outcome::Intended {
            lock(&self.settled).settle(ticket.seq);
        }
    }

    /// As [`Log::settle`], for a record that was found at open.
    ///
    /// # Errors
    /// [`LogError::NotKept`] and [`LogError::Corrupt`].
    pub fn settle_seq(&self, seq: Seq, outcome: Outcome) -> Result<(), LogError> {
        let (piece, spot) = self.locate(seq)?;
        self.settle(Ticket { seq, segment: piece.segment.clone(), at: spot.at }, outcome);
        Ok(())
    }

    /// Makes all records up to `upto` (at most all there are) durable; one disk write serves all
    /// callers that wait meanwhile. Outcomes set before are made durable along, in the newest
    /// segment.
    ///
    /// # Errors
    /// After the first failure, [`LogError::Poisoned`] for ever.
    pub fn sync(&self, upto: Seq) -> Result<(), LogError> {
        self.sync_unless(|| self.synced() >= upto.min(self.last()))
    }

    /// As [`Log::sync`], of records that are settled, with their outcomes.
    ///
    /// # Errors
    /// As [`Log::sync`].
    pub fn sync_settled(&self, upto: Seq) -> Result<(), LogError> {
        self.sync(upto)?;
        let upto = upto.min(self.settled_through());
        self.sync_unless(|| self.outcomes.load(Ordering::Acquire) >= upto.0)
    }

    fn sync_unless(&self, durable: impl Fn() -> bool) -> Result<(), LogError> {
        self.check_poison()?;
        if durable() {
            return Ok(());
        }
        let _one = lock(&self.syncing);
        self.check_poison()?;
        if durable() {
            return Ok(());
        }
        let (late, piece, spot) = {
            let inner = lock(&self.inner);
            (self.settled_late(&inner), newest(&inner), inner.spot)
        };
        self.sync_piece(&late, &piece, spot)
    }

    /// The caller holds `syncing`: two syncs at once would share one report of a failure.
    fn sync_piece(&self, late: &[Arc<Piece>], piece: &Piece, end: Spot) -> Result<(), LogError> {
        // what is settled from here on is for the next one
        let settled = self.settled_through().0;
        for late in late {
            self.sync_bytes(late, late.segment.size())?;
        }
        self.sync_bytes(piece, end.at)?;
        self.outcomes.fetch_max(settled, Ordering::AcqRel);
        crash::point("log-synced");
        self.synced.fetch_max(end.seq.0 - 1, Ordering::SeqCst);
        self.save_marks();
        Ok(())
    }

    fn sync_bytes(&self, piece: &Piece, len: usize) -> Result<(), LogError> {
        piece.segment.sync(0, len).map_err(|source| {
            self.poisoned.store(true, Ordering::SeqCst);
            let path = self.store.path(&segment_name(piece.head.first));
            LogError::Io { what: "sync", path, source }
        })
    }

    /// Segments before the newest one, whose last records were settled after it was begun.
    fn settled_late(&self, inner: &Inner) -> Vec<Arc<Piece>> {
        let outcomes = self.outcomes.load(Ordering::Acquire);
        let before_newest = inner.pieces.iter().take(inner.pieces.len() - 1);
        before_newest.filter(|piece| piece.limit() > outcomes + 1).cloned().collect()
    }

    /// Adds a segment, unless another thread just did. What came before is made durable first.
    fn extend(&self, len: usize) -> Result<(), LogError> {
        let _one = lock(&self.syncing);
        let mut inner = lock(&self.inner);
        self.check_poison()?;
        let old = newest(&inner);
        if inner.spot.at + len <= old.segment.size() {
            return Ok(());
        }
        if SEGMENT_HEADER_LEN + len > self.segment_len {
            return Err(LogError::Unwritable(Fault::TooLong));
        }
        self.sync_piece(&self.settled_late(&inner), &old, inner.spot)?;
        let head = SegmentHead {
            node: self.node,
            incarnation: self.incarnation,
            first: inner.spot.seq,
            len: self.segment_len as u64,
            seed: inner.spot.chain,
        };
        let piece = create_piece(&*self.store, head)?;
        old.limit.store(head.first.0, Ordering::Release);
        inner.spot = piece.begin();
        inner.pieces.push_back(Arc::new(piece));
        crash::point("log-extended");
        Ok(())
    }

    /// Keeps what is known to be durable and settled, for the next open to begin at. It is written
    /// and not synced: an older mark is as true, only less useful, and so is a failed write.
    fn save_marks(&self) {
        let mut cursors = lock(&self.cursors);
        self.set_marks(&mut cursors.page);
        if let Ok(page) = cursors.page.encode() {
            let _ = self.store.put_cursors(1 - cursors.durable_slot, &page, false);
        }
    }
    fn set_marks(&self, page: &mut CursorPage) {
        page.generation += 1;
        set_in(page, SYNCED, self.synced().0);
        set_in(page, SETTLED, self.settled_through().0);
    }

    /// Keeps a number as [`Log::set_cursor`] does, but neither durably nor surely: an older value
    /// must do as well.
    pub fn note_cursor(&self, name: &str, value: u64) {
        if name != SYNCED && name != SETTLED {
            set_in(&mut lock(&self.cursors).page, name, value);
            self.save_marks();
        }
    }

    /// The value of a cursor; 0 if it was never set.
    pub fn cursor(&self, name: &str) -> u64 {
        get_in(&lock(&self.cursors).page, name)
    }

    /// Keeps a number beside the journal, under a name of 1..=16 bytes; at most 14 of them. Durable
    /// on return: yes. The log keeps `synced` and `settled` itself.
    ///
    /// # Errors
    /// [`LogError::Cursor`] for a bad name; a failed write poisons the log.
    pub fn set_cursor(&self, name: &str, value: u64) -> Result<(), LogError> {
        self.set_cursors(&[(name, value)])
    }

    /// Keeps several numbers in one step; see [`Log::set_cursor`].
    ///
    /// # Errors
    /// As [`Log::set_cursor`].
    pub fn set_cursors(&self, values: &[(&str, u64)]) -> Result<(), LogError> {
        let names = || values.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        let bad = |_| LogError::Cursor { name: names() };
        if values.iter().any(|(name, _)| *name == SYNCED || *name == SETTLED) {
            return Err(bad(Fault::Field("cursor name")));
        }
        let mut cursors = lock(&self.cursors);
        self.check_poison()?;
        let mut page = cursors.page.clone();
        values.iter().for_each(|(name, value)| set_in(&mut page, name, *value));
        self.set_marks(&mut page);
        let bytes = page.encode().map_err(bad)?;
        let slot = 1 - cursors.durable_slot;
        self.store.put_cursors(slot, &bytes, true).map_err(|source| {
            self.poisoned.store(true, Ordering::SeqCst);
            LogError::Io { what: "write", path: self.store.path("cursors"), source }
        })?;
        *cursors = Cursors { page, durable_slot: slot };
        Ok(())
    }

    /// Frees the segments that hold nothing newer than `upto`, and nothing unsettled. The newest
    /// segment always stays.
    ///
    /// # Errors
    /// [`LogError::Io`] if a file cannot be removed; it is tried again after the next open.
    pub fn trim(&self, upto: Seq) -> Result<(), LogError> {
        let keep = upto.min(self.settled_through()).min(self.synced()).next();
        let mut freed = Vec::new();
        {
            let mut inner = lock(&self.inner);
            while inner.pieces.front().is_some_and(|piece| piece.limit() <= keep.0) {
                freed.extend(inner.pieces.pop_front());
            }
        }
        // oldest first: whatever stays behind after a crash has no hole
        for piece in freed {
            let first = piece.head.first;
            self.store.remove(first).map_err(|source| {
                io_error("remove", &self.store.path(&segment_name(first)), source)
            })?;
            crash::point("log-trimmed");
        }
        Ok(())
    }

    /// The record `seq`.
    ///
    /// # Errors
    /// [`LogError::NotKept`] and [`LogError::Corrupt`].
    pub fn get(&self, seq: Seq) -> Result<Entry, LogError> {
        self.entries(seq).next().unwrap_or_else(|| Err(self.not_kept(seq)))
    }

    /// The records from `from` on. At the newest it ends, and goes on when there are newer ones.
    /// What was trimmed away is an error and not a gap: begin at [`Log::first`] or later.
    pub fn entries(&self, from: Seq) -> Entries<'_> {
        Entries::new(self, from)
    }

    /// The records from `upto` (or the newest, if that is older) down to the oldest kept.
    pub fn entries_back(&self, upto: Seq) -> EntriesBack<'_> {
        EntriesBack::new(self, upto.min(self.last()))
    }

    /// All records whose outcome is not known: right after opening, what the last life left.
    ///
    /// # Errors
    /// [`LogError::Corrupt`].
    pub fn unsettled(&self) -> Result<Vec<Entry>, LogError> {
        let mut found = Vec::new();
        for entry in self.entries(self.settled_through().next().max(self.first())) {
            let entry = entry?;
            if entry.outcome == Outcome::Intended {
                found.push(entry);
            }
        }
        Ok(found)
    }

    /// The oldest seq kept; the next one to be written if there is none.
    pub fn first(&self) -> Seq {
        lock(&self.inner).pieces[0].head.first
    }
    /// The newest seq; 0 if nothing was ever written.
    pub fn last(&self) -> Seq {
        Seq(self.last.load(Ordering::Acquire))
    }
    /// The newest seq that is known to be durable.
    pub fn synced(&self) -> Seq {
        Seq(self.synced.load(Ordering::Acquire))
    }
    /// The largest seq such that it and all before it are settled.
    pub fn settled_through(&self) -> Seq {
        Seq(lock(&self.settled).through)
    }
    /// Room that the segments take on the disk, bytes.
    pub fn bytes(&self) -> u64 {
        lock(&self.inner).pieces.iter().map(|piece| piece.segment.size() as u64).sum()
    }
    /// How much of the newest segment is in use, bytes: when it is full, another one is made.
    pub fn filled(&self) -> u64 {
        lock(&self.inner).spot.at as u64
    }
    pub fn incarnation(&self) -> u128 {
        self.incarnation
    }
    pub fn node(&self) -> u32 {
        self.node
    }
    /// Whether an earlier sync failed, so that nothing is accepted any more.
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::SeqCst)
    }

    fn check_poison(&self) -> Result<(), LogError> {
        if self.is_poisoned() { Err(LogError::Poisoned) } else { Ok(()) }
    }
    fn not_kept(&self, seq: Seq) -> LogError {
        LogError::NotKept { seq, first: self.first(), last: self.last() }
    }
    fn corrupt(&self, piece: &Piece, spot: Spot, why: Fault) -> LogError {
        corrupt(&*self.store, piece.head.first, spot, why)
    }
    /// The piece and the place of a record.
    fn locate(&self, seq: Seq) -> Result<(Arc<Piece>, Spot), LogError> {
        let last = self.last();
        let piece = {
            let inner = lock(&self.inner);
            let behind = inner.pieces.partition_point(|piece| piece.head.first <= seq);
            behind.checked_sub(1).map(|nth| inner.pieces[nth].clone())
        };
        let piece = piece.filter(|_| seq <= last).ok_or_else(|| self.not_kept(seq))?;
        let spot = piece.find(seq, last).map_err(|(at, why)| self.corrupt(&piece, at, why))?;
        Ok((piece, spot))
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        if !self.is_poisoned() {
            self.save_marks();
        }
    }
}

fn io_error(what: &'static str, path: &Path, source: io::Error) -> LogError {
    LogError::Io { what, path: path.into(), source }
}

fn corrupt(store: &dyn Store, first: Seq, spot: Spot, why: Fault) -> LogError {
    let file = store.path(&segment_name(first));
    LogError::Corrupt { file, at: spot.at as u64, seq: spot.seq, why }
}

fn newest(inner: &Inner) -> Arc<Piece> {
    // there is always one: it is made before the log is, and trim leaves the newest
    inner.pieces[inner.pieces.len() - 1].clone()
}

fn get_in(page: &CursorPage, name: &str) -> u64 {
    page.cursors.iter().find(|(key, _)| key == name.as_bytes()).map_or(0, |(_, value)| *value)
}

fn set_in(page: &mut CursorPage, name: &str, value: u64) {
    match page.cursors.iter_mut().find(|(key, _)| key == name.as_bytes()) {
        Some((_, old)) => *old = value,
        None => page.cursors.push((name.as_bytes().to_vec(), value)),
    }
}

mod open;
pub mod read;

#[cfg(test)]
mod tests;
