//! The worker: what would make the loop wait.
//!
//! Cuts batches (reads the journal, optimises, reads small contents) and makes things durable: the
//! index, the cursors, the tree. One job after another, in order. A batch leaves only after the
//! journal is durable up to its end, and then the tree: else a power cut could take records back
//! that the server has, or the contents that they announce.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::In;
use crate::kml::codec::{self, Outcome};
use crate::kml::log::LogError;
use crate::kml::optimise::optimise;
use crate::kml::record::{Op, Record, Seq, Stamp};
use crate::lento::message::{BATCH_RECORDS_MAX, Batch, INLINE_LEN_MAX, Item, PAGE_LEN};
use crate::net::poll::Waker;
use crate::replica::cache::{Cache, CacheError};
use crate::replica::merge::is_kept;
use crate::replica::pending::data_len;
use crate::replica::tree::TreeError;
use crate::sys::fs::{self, o};
use crate::sys::{Errno, crash};

/// Most records that are optimised together.
const TOGETHER_MAX: usize = 16384;
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

pub(super) fn start(cache: Arc<Cache>, tell: Sender<In>, waker: Waker) -> std::io::Result<Worker> {
    let (jobs, todo) = unbounded();
    let thread = std::thread::Builder::new()
        .name("imz-worker".into())
        .spawn(move || run(&cache, &todo, &tell, &waker))?;
    Ok(Worker { jobs: Some(jobs), thread: Some(thread) })
}

fn run(cache: &Cache, todo: &Receiver<Job>, tell: &Sender<In>, waker: &Waker) {
    let mut cutter = Cutter::default();
    for job in todo {
        match job {
            Job::Cut { generation, after, upto } => {
                let cut = cutter.cut(cache, after, upto);
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
    cache.log.trim(acked)?;
    let keep = |fid, stat: &fs::Stat| is_kept(cache, fid, stat.kind(), acked);
    if let Err(e) = cache.limbo.clear(LIMBO_REST, keep) {
        log::warn!("limbo: {e}");
    }
    Ok(())
}

/// Reads ahead in the journal, so that what is optimised together may travel in several batches.
#[derive(Default)]
struct Cutter {
    ready: VecDeque<(Seq, Record)>,
    /// records up to here have been cut, and read
    cut: Seq,
    read: Seq,
}

impl Cutter {
    fn cut(&mut self, cache: &Cache, after: Seq, upto: Seq) -> Cut {
        if after != self.cut || self.read < self.cut {
            *self = Cutter { ready: VecDeque::new(), cut: after, read: after };
        }
        if self.read == self.cut {
            self.read_on(cache, upto)?;
        }
        if self.read == self.cut {
            return Ok(None);
        }
        let (mut items, mut len, mut content_len) = (Vec::new(), 0, 0);
        while let Some((seq, record)) = self.ready.front() {
            if items.len() == BATCH_RECORDS_MAX || len >= PAGE_LEN {
                break;
            }
            let wire = codec::encode_wire(record, *seq).map_err(LogError::Unwritable)?;
            let data = content(cache, record);
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

    fn read_on(&mut self, cache: &Cache, upto: Seq) -> Result<(), LogError> {
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
        self.ready = optimise(&records).into();
        Ok(())
    }
}

/// The bytes that travel with the record: `None` when the server is to fetch them. Shorter than
/// announced when the file is gone, as a later record says as well.
fn content(cache: &Cache, record: &Record) -> Option<Vec<u8>> {
    let Op::Store { fid, ranges, .. } = &record.op else { return None };
    let total = data_len(record);
    if total > INLINE_LEN_MAX as u64 {
        return None;
    }
    let mut bytes = vec![0; total as usize];
    let file = match cache.tree.open_object(*fid, o::RDONLY | o::NONBLOCK) {
        Ok(file) => file,
        Err(TreeError::Gone(_) | TreeError::Os(Errno::NOENT | Errno::LOOP)) => {
            return Some(Vec::new());
        }
        Err(e) => {
            // The server asks for them, and will be told.
            log::warn!("the contents of {fid} cannot be read: {e}");
            return None;
        }
    };
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
