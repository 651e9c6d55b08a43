//! The worker: what would make the loop wait.
//!
//! Cuts batches (reads the journal, optimises, reads small contents) and makes things durable: the
//! index, the cursors, the tree. One job after another, in order. A batch leaves only after the
//! journal is durable up to its end, and then the tree: else a power cut could take records back
//! that the server has, or the contents that they announce.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::In;
use crate::kml::codec::{self, Outcome};
use crate::kml::log::{LogError, SEGMENT_LEN};
use crate::kml::optimise::optimise;
use crate::kml::record::{Op, Range, Record, Seq, Stamp};
use crate::lento::grant::Grant;
use crate::lento::message::{BATCH_RECORDS_MAX, Batch, INLINE_LEN_MAX, Item, PAGE_LEN};
use crate::net::poll::Waker;
use crate::replica::cache::{Cache, CacheError};
use crate::replica::merge::is_kept;
use crate::replica::meta::Meta;
use crate::replica::pending::data_len;
use crate::replica::tree::TreeError;
use crate::sys::fs::{self, o};
use crate::sys::{Errno, clock, crash};

/// Most records that are optimised together.
const TOGETHER_MAX: usize = 16384;
/// So much of the journal, and this part of the disk at most, is kept although the server has it: one
/// that is restored from an older backup gets it again.
const KEPT_LEN_MAX: u64 =
    if cfg!(feature = "crash-points") { SEGMENT_LEN as u64 } else { 32 << 20 };
const KEPT_PART: u64 = 64;
/// How long what vanished rests in limbo.
const LIMBO_REST: Duration = Duration::from_secs(600);

/// The answer to `CutBatch`: a batch, and the length of its contents.
pub(super) type Cut = Result<Option<(Batch, u64)>, LogError>;

pub(super) enum Job {
    Cut {
        generation: u64,
        after: Seq,
        upto: Seq,
    },
    /// what was read for batches is to be read again
    Restart,
    /// put the index's changes into its file
    Flush,
    /// make everything durable, then the cursors
    Keep {
        acked: Seq,
        current: Stamp,
    },
}

pub(super) struct Worker {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    pub fn give(&self, job: Job) {
        // It ends only when the sender is dropped, which is after the last job.
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(job);
        }
    }
    /// Waits until all jobs are done.
    pub fn finish(&mut self) {
        self.jobs = None;
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            log::error!("the worker ended by a panic");
        }
    }
}

/// What the optimiser saved since the start.
#[derive(Default)]
pub(super) struct Saved {
    pub records: AtomicU64,
    /// of contents, bytes
    pub len: AtomicU64,
}

pub(super) fn start(
    cache: Arc<Cache>,
    grant: Arc<Grant>,
    tell: Sender<In>,
    waker: Waker,
    saved: Arc<Saved>,
) -> std::io::Result<Worker> {
    let (jobs, todo) = unbounded();
    let thread = std::thread::Builder::new()
        .name("imz-worker".into())
        .spawn(move || run((&cache, &grant), &todo, &tell, (&waker, &saved)))?;
    Ok(Worker { jobs: Some(jobs), thread: Some(thread) })
}

fn run(
    (cache, grant): (&Cache, &Grant),
    todo: &Receiver<Job>,
    tell: &Sender<In>,
    (waker, saved): (&Waker, &Saved),
) {
    let mut cutter = Cutter::default();
    let mut counted = Seq(0);
    for job in todo {
        match job {
            Job::Cut { generation, after, upto } => {
                let cut = cutter.cut((cache, grant), after, upto, &mut |read, left| {
                    saved.count(read, left, &mut counted);
                });
                if tell.send(In::Cut { generation, cut }).is_ok() {
                    waker.wake();
                }
            }
            Job::Restart => cutter = Cutter::default(),
            Job::Flush => {
                if let Err(e) = cache.tree.index.flush(false) {
                    log::error!("{e}");
                }
            }
            Job::Keep { acked, current } => {
                if let Err(e) = keep(cache, acked, current) {
                    log::error!("cannot make the cache durable: {e}");
                }
            }
        }
    }
}

/// What says that all is durable comes last: a power cut in between costs work, not truth.
fn keep(cache: &Cache, acked: Seq, current: Stamp) -> Result<(), CacheError> {
    cache.keep_all(acked, current)?;
    let space = fs::space(&**cache.tree.root()).map_err(TreeError::from)?;
    let disk_len = u64::from(space.block_len).saturating_mul(space.blocks);
    if cache.log.bytes() > KEPT_LEN_MAX.min(disk_len / KEPT_PART) {
        cache.log.trim(acked)?;
    }
    let keep = |fid, stat: &fs::Stat| is_kept(cache, fid, stat.kind(), acked);
    if let Err(e) = cache.limbo.clear(LIMBO_REST, clock::now(), keep) {
        log::warn!("limbo: {e}");
    }
    Ok(())
}

impl Saved {
    /// Counts each record once, however often it is read: those up to `counted` were.
    fn count(&self, read: &[(Seq, Record)], left: &[(Seq, Record)], counted: &mut Seq) {
        let sum = |all: &[(Seq, Record)]| {
            let fresh = all.iter().filter(|(seq, _)| seq > counted);
            fresh.fold((0, 0), |(count, len), (_, it)| (count + 1, len + data_len(it)))
        };
        let (before, after) = (sum(read), sum(left));
        // a folded store may announce more than the one whose place it takes
        self.records.fetch_add(before.0 - after.0, Ordering::Relaxed);
        self.len.fetch_add(before.1.saturating_sub(after.1), Ordering::Relaxed);
        *counted = read.last().map_or(*counted, |(seq, _)| *seq.max(counted));
    }
}

type Count<'a> = dyn FnMut(&[(Seq, Record)], &[(Seq, Record)]) + 'a;

/// Reads ahead in the journal, so that what is optimised together may travel in several batches.
#[derive(Default)]
struct Cutter {
    ready: VecDeque<(Seq, Record)>,
    /// records up to here have been cut, and read
    cut: Seq,
    read: Seq,
}

impl Cutter {
    /// `count` is told what was read, and what of it is left.
    fn cut(
        &mut self,
        (cache, grant): (&Cache, &Grant),
        after: Seq,
        upto: Seq,
        count: &mut Count<'_>,
    ) -> Cut {
        if after != self.cut || self.read < self.cut {
            *self = Cutter { ready: VecDeque::new(), cut: after, read: after };
        }
        if self.read == self.cut {
            self.read_on(cache, upto, count)?;
        }
        if self.read == self.cut {
            return Ok(None);
        }
        let (mut items, mut len, mut content_len) = (Vec::new(), 0, 0);
        while let Some((seq, record)) = self.ready.front_mut() {
            if items.len() == BATCH_RECORDS_MAX || len >= PAGE_LEN {
                break;
            }
            make_whole(cache, record);
            grant.goes_out(*seq);
            let wire = codec::encode_wire(record, *seq).map_err(LogError::Unwritable)?;
            let data = content(cache, *seq, record);
            if data.as_ref().is_some_and(|data| (data.len() as u64) < data_len(record)) {
                // What took the file away must not be lost with the power now: the server will not
                // ask for the contents again.
                cache.log.sync(cache.log.last())?;
            }
            len += wire.len() + data.as_ref().map_or(0, Vec::len);
            content_len += data_len(record);
            items.push(Item { record: wire, data });
            self.ready.pop_front();
        }
        self.cut = match self.ready.front() {
            Some((next, _)) => Seq(next.0 - 1),
            None => self.read,
        };
        Ok(Some((Batch { after, upto: self.cut, items }, content_len)))
    }

    fn read_on(&mut self, cache: &Cache, upto: Seq, count: &mut Count<'_>) -> Result<(), LogError> {
        let upto = upto.min(cache.log.settled_through());
        // What was trimmed is at the server, unless it lost it: then there is nothing to be done.
        let from = self.cut.next().max(cache.log.first());
        if from > upto {
            return Ok(());
        }
        cache.make_durable(upto)?;
        crash::point("ship-cut");
        let mut records = Vec::new();
        for entry in cache.log.entries(from).take(TOGETHER_MAX) {
            let entry = entry?;
            if entry.seq > upto {
                break;
            }
            self.read = entry.seq;
            if entry.outcome != Outcome::Void {
                records.push((entry.seq, entry.record));
            }
        }
        let left = optimise(&records);
        count(&records, &left);
        self.ready = left.into();
        Ok(())
    }
}

/// A store of some ranges of a file that others have changed since is most likely a conflict: then
/// all of the file goes, as it is here, so that the server can preserve this version whole.
fn make_whole(cache: &Cache, record: &mut Record) {
    let Op::Store { fid, size, ranges, .. } = &mut record.op else { return };
    let is_whole = ranges.iter().map(|range| range.len).sum::<u64>() >= *size;
    if is_whole || *size == 0 {
        return;
    }
    let is_here = |meta: Meta| meta.stale && meta.complete;
    if cache.tree.find(*fid).is_ok_and(|(_, _, meta)| is_here(meta)) {
        *ranges = vec![Range { at: 0, len: *size }];
    }
}

/// The bytes that travel with the record: `None` when the server is to fetch them. Shorter than
/// announced when nobody has them any more: the file is gone, as a later record says as well, or
/// somebody took it out of the cache. Then the server's version stays as it is.
fn content(cache: &Cache, seq: Seq, record: &Record) -> Option<Vec<u8>> {
    let Op::Store { fid, ranges, .. } = &record.op else { return None };
    let total = data_len(record);
    if total > INLINE_LEN_MAX as u64 {
        return None;
    }
    let mut bytes = vec![0; total as usize];
    let file = match cache.tree.open_object(*fid, o::RDONLY | o::NONBLOCK) {
        Ok(file) => file,
        Err(TreeError::Gone(_) | TreeError::Os(Errno::NOENT | Errno::LOOP)) => {
            if !cache.pending().is_changed_after(*fid, seq) {
                let path = record.path.escape_ascii();
                log::error!("{path} is gone from the cache, and its contents are lost");
            }
            return Some(Vec::new());
        }
        Err(e) => {
            // The server asks for them, and will be told.
            log::warn!("the contents of {fid} cannot be read: {e}");
            return None;
        }
    };
    let here = super::files::is_here(cache, &file, ranges);
    if !here {
        log::error!("{} is not all in the cache any more", record.path.escape_ascii());
        return Some(Vec::new());
    }
    let mut at = 0;
    for range in ranges {
        // What a later truncation took reads as zeros: its record follows.
        let into = &mut bytes[at..at + range.len as usize];
        if super::files::read_full(&file, into, range.at).is_err() {
            // The server asks for them, and will be told what is wrong.
            return None;
        }
        at += range.len as usize;
    }
    Some(bytes)
}
