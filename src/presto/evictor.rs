//! Which files give up their data, and when: the limit of a cache, and what people ask for.
//!
//! One thread. Over the limit (`-o cache-max=`) it evicts until there is a tenth of it free again:
//! first files that nobody used in this life of the mount, as the tree has them, then the others, the
//! least recently opened or fetched first. The order is kept in memory, of the last 65,536 files. Whether
//! a file may go is not decided here: see `replica::evict`. Where nothing more may go (all the rest
//! is open, pinned, or not at the server yet), it looks again later and later.

use std::collections::{HashSet, VecDeque};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use super::filter::Filter;
use super::open::held;
use crate::kml::record::{Fid, Name, ROOT};
use crate::lento::policy;
use crate::replica::evict::{Kept, evict};
use crate::replica::tree::{Dir, is_own};
use crate::sys::fs::{self, Kind};
use crate::sys::{Errno, clock};

/// How often the limit is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// First and longest pause after a look that could not free enough.
const STUCK_MIN: Duration = Duration::from_secs(5);
const STUCK_MAX: Duration = Duration::from_secs(300);
/// How long it may take until what the server has acknowledged is noted durably, and how often that is
/// looked at.
const KEEP_TIME_MAX: Duration = Duration::from_secs(10);
const KEEP_POLL: Duration = Duration::from_millis(5);
/// Jobs whose outcome is remembered.
const JOBS_MAX: usize = 16;
/// Jobs that wait for their turn.
const QUEUE_MAX: usize = 64;
/// Files that a job names as kept; of more it gives the number.
const NAMED_MAX: usize = 100;

/// What became of one wish.
#[derive(Clone, Default, Debug)]
pub struct Outcome {
    pub number: u64,
    pub done: bool,
    /// files that gave up data, and how much, bytes
    pub files: u64,
    pub len: u64,
    pub kept_count: u64,
    /// the first of those that were kept
    pub kept: Vec<(Vec<u8>, Kept)>,
}

struct Job {
    number: u64,
    path: Vec<u8>,
}

/// Takes wishes; the thread ends with the filter.
pub struct Evictor {
    filter: Weak<Filter>,
    max: Option<u64>,
    queue: Sender<Job>,
    /// has what the server acknowledged noted durably, soon
    keep: Box<dyn Fn() + Send + Sync>,
    outcomes: Mutex<VecDeque<Outcome>>,
}

impl Evictor {
    /// `max`: data that the cache may hold, bytes. `keep` has what the server acknowledged noted
    /// durably, soon.
    ///
    /// # Errors
    /// As pthread_create(3).
    pub fn start(
        filter: &Arc<Filter>,
        max: Option<u64>,
        keep: Box<dyn Fn() + Send + Sync>,
    ) -> std::io::Result<Arc<Evictor>> {
        let (queue, jobs) = channel();
        if max.is_some() {
            filter.cache.keep_order();
        }
        let filter = Arc::downgrade(filter);
        let evictor = Arc::new(Evictor { filter, max, queue, keep, outcomes: Mutex::default() });
        let me = Arc::downgrade(&evictor);
        std::thread::Builder::new().name("evictor".into()).spawn(move || run(&me, &jobs))?;
        Ok(evictor)
    }

    /// Data that the cache may hold, bytes.
    pub fn max(&self) -> Option<u64> {
        self.max
    }

    /// Evicts what stands at the path and below it, in the background; the number is for
    /// [`Evictor::outcome`].
    ///
    /// # Errors
    /// `BUSY` when too much waits already.
    pub fn ask(&self, path: &[u8]) -> Result<u64, Errno> {
        let mut outcomes = held(&self.outcomes);
        if outcomes.iter().filter(|outcome| !outcome.done).count() >= QUEUE_MAX {
            return Err(Errno::BUSY);
        }
        let number = outcomes.back().map_or(1, |last| last.number + 1);
        while outcomes.len() >= JOBS_MAX && outcomes.front().is_some_and(|first| first.done) {
            outcomes.pop_front();
        }
        outcomes.push_back(Outcome { number, ..Outcome::default() });
        // Its thread lives as long as we do.
        let _ = self.queue.send(Job { number, path: path.to_vec() });
        Ok(number)
    }

    /// `None`: of no wish, or of one long ago.
    pub fn outcome(&self, number: u64) -> Option<Outcome> {
        held(&self.outcomes).iter().find(|outcome| outcome.number == number).cloned()
    }

    fn note(&self, number: u64, change: impl FnOnce(&mut Outcome)) {
        let mut outcomes = held(&self.outcomes);
        if let Some(outcome) = outcomes.iter_mut().find(|outcome| outcome.number == number) {
            change(outcome);
        }
    }

    fn carry_out(&self, filter: &Filter, job: &Job) {
        let kept = |path: &[u8], why| {
            self.note(job.number, |outcome| {
                outcome.kept_count += 1;
                if outcome.kept.len() < NAMED_MAX {
                    outcome.kept.push((path.to_vec(), why));
                }
            });
        };
        walk(filter, &job.path, &mut |found| {
            match found {
                Ok(file) => match self.give_up(filter, file.fid) {
                    Ok(0) => {}
                    Ok(len) => self.note(job.number, |outcome| {
                        (outcome.files, outcome.len) = (outcome.files + 1, outcome.len + len);
                    }),
                    // A stub has nothing to keep.
                    Err(_) if file.len == 0 => {}
                    Err(why) => kept(file.path, why),
                },
                Err((path, e)) => kept(path, e.into()),
            }
            true
        });
        self.note(job.number, |outcome| outcome.done = true);
    }

    fn give_up(&self, filter: &Filter, fid: Fid) -> Result<u64, Kept> {
        let evict = || evict(&filter.cache, fid, || filter.files.get(fid).is_some());
        let tried = evict();
        let (goal, is_named) = {
            let pending = filter.cache.pending();
            let acked = pending.acked_upto();
            (acked, pending.is_named(fid, acked))
        };
        match tried {
            Err(Kept::Named) if !is_named => {
                // The server has it, which a crash would not know yet.
                let began = Instant::now();
                (self.keep)();
                while filter.cache.acked() < goal && began.elapsed() < KEEP_TIME_MAX {
                    std::thread::sleep(KEEP_POLL);
                }
                evict()
            }
            done => done,
        }
    }

    /// Evicts until the cache holds no more than `goal`, or nothing more may go.
    fn free(&self, filter: &Filter, goal: u64) {
        let enough = || filter.cache.held_len() <= goal;
        let used = filter.cache.used();
        let known: HashSet<Fid> = used.iter().map(|(fid, _)| *fid).collect();
        walk(filter, b"", &mut |found| {
            if let Ok(file) = found
                && file.len > 0
                && !known.contains(&file.fid)
                && let Err(why) = self.give_up(filter, file.fid)
            {
                log::trace!("{}: {why}", file.fid);
            }
            !enough()
        });
        for (fid, at_ns) in used {
            if enough() || clock::age_of(at_ns) < policy::EVICT_REST {
                return;
            }
            if let Err(why) = self.give_up(filter, fid) {
                log::trace!("{fid}: {why}");
            }
        }
    }
}

fn run(me: &Weak<Evictor>, jobs: &Receiver<Job>) {
    let mut limit = Limit { look_at: Instant::now(), pause: STUCK_MIN, counted: false };
    loop {
        let job = match jobs.recv_timeout(LOOK_EVERY) {
            Ok(job) => Some(job),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let Some(evictor) = me.upgrade() else { return };
        let Some(filter) = evictor.filter.upgrade() else { return };
        match (job, evictor.max) {
            (Some(job), _) => evictor.carry_out(&filter, &job),
            (None, Some(max)) => limit.look(&evictor, &filter, max),
            (None, None) => {}
        }
    }
}

/// The state of one limit.
struct Limit {
    look_at: Instant,
    pause: Duration,
    /// the figure of what is held was counted in this life
    counted: bool,
}

impl Limit {
    fn look(&mut self, evictor: &Evictor, filter: &Filter, max: u64) {
        if !self.counted {
            // What a life that was killed left behind as a figure may be old.
            let mut sum = 0;
            walk(filter, b"", &mut |found| {
                sum += found.map_or(0, |file| file.len);
                true
            });
            filter.cache.set_held(sum);
            self.counted = true;
        }
        let over = || filter.cache.held_len() > max;
        if !over() || Instant::now() < self.look_at || !policy::may_evict(filter.cache.is_online())
        {
            return;
        }
        let goal = max - max / 10;
        evictor.free(filter, goal);
        if over() {
            self.look_at = Instant::now() + self.pause;
            self.pause = (self.pause * 2).min(STUCK_MAX);
        } else {
            self.pause = STUCK_MIN;
        }
    }
}

/// A file that a walk has found.
struct File<'a> {
    fid: Fid,
    path: &'a [u8],
    /// room that its data take, bytes
    len: u64,
}

type Visit<'v> = &'v mut dyn FnMut(Result<File<'_>, (&[u8], Errno)>) -> bool;

/// Shows all files at the path and below it, as they are here: nothing is fetched. `visit` ends it by
/// `false`.
fn walk(filter: &Filter, top: &[u8], visit: Visit) {
    let tree = &filter.cache.tree;
    let mut todo = vec![(ROOT, Vec::new())];
    if !top.is_empty() {
        let (above, name) = match top.iter().rposition(|byte| *byte == b'/') {
            Some(at) => (&top[..at], &top[at + 1..]),
            None => (&b""[..], top),
        };
        let found = super::pinner::dir_at(above, |fid| tree.dir(fid).map_err(|e| e.errno()), tree);
        todo.clear();
        match found.and_then(|dir| Ok((Name::new(name).map_err(|_| Errno::NOENT)?, dir))) {
            Ok((name, dir)) => {
                if !visit_entry(filter, &dir, &name, top, &mut todo, visit) {
                    return;
                }
            }
            Err(e) => {
                visit(Err((top, e)));
                return;
            }
        }
    }
    while let Some((fid, path)) = todo.pop() {
        let Ok(dir) = tree.dir(fid) else { continue };
        let entries = match fs::read_dir(&*dir) {
            Ok(entries) => entries,
            Err(e) => {
                visit(Err((&path, e)));
                continue;
            }
        };
        for entry in entries {
            let Ok(name) = Name::new(&entry.name) else { continue };
            if fid == ROOT && is_own(name.as_bytes()) {
                continue;
            }
            let below = super::pinner::join(&path, &name);
            if !visit_entry(filter, &dir, &name, &below, &mut todo, visit) {
                return;
            }
        }
    }
}

fn visit_entry(
    filter: &Filter,
    dir: &Dir,
    name: &Name,
    path: &[u8],
    todo: &mut Vec<(Fid, Vec<u8>)>,
    visit: Visit,
) -> bool {
    let stat = match fs::stat(dir, name.as_bytes()) {
        Ok(stat) => stat,
        Err(e) => return visit(Err((path, e))),
    };
    let Ok(Some(meta)) = filter.cache.tree.meta(dir, name) else { return true };
    match stat.kind() {
        Kind::Dir => todo.push((meta.fid, path.to_vec())),
        Kind::File => return visit(Ok(File { fid: meta.fid, path, len: stat.blocks * 512 })),
        _ => {}
    }
    true
}
