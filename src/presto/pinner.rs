//! Keeps what is pinned whole in the cache, also what appears there later.
//!
//! ```text
//!   rung --> for each pin: list and count --> fetch what is missing --> rest --> rung ...
//! ```
//!
//! One thread, and a few helpers while it fetches. It is rung when a pin is made, when the server is
//! back, and when something of what was current is not so any more: then it looks through the pins
//! again, at most a tenth of the time. Where it goes, it asks as an application would (`here`,
//! `dir_here`), so it is promised to be told of the next change. What the user asked for just now is
//! fetched as fast as it comes, what follows later at a bounded rate. Absent on purpose: whether an
//! object may be evicted (`replica::evict`), and the list of pins itself (`replica::pins`).

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use super::filter::{Filter, Stop, Want, as_is};
use super::open::held;
use crate::kml::record::{Fid, Name, ROOT};
use crate::lento::policy;
use crate::replica::pins::Pin;
use crate::replica::tree::{Dir, Tree, is_own};
use crate::sys::Errno;
use crate::sys::fs::{self, Kind};

/// How often something that changes while it is fetched is fetched again.
const TRIES_MAX: u32 = 8;
/// Bytes that are asked for at a time, so that others have their turn in between.
const SLICE_LEN: u64 = 4 << 20;
/// Files that are fetched at a time.
const HELPERS: usize = 4;
/// Missing files that are noted before they are fetched.
const TODO_MAX: usize = 65536;

/// How one pin is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum State {
    /// not looked at yet
    #[default]
    New,
    /// it is listed, counted, fetched
    Fetching,
    /// all of it is here
    Whole,
    /// the server is away: what is missing comes when it is back
    Away,
    /// nothing stands at its path
    Absent,
    /// not all could be fetched, for this reason
    Failed(Errno),
}

/// What a look at one pin has found so far. Lengths are bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Report {
    pub state: State,
    /// objects, directories included
    pub objects: u64,
    /// data that are here
    pub len: u64,
    /// files that are not all here or not current, and what is to be fetched of them
    pub missing: u64,
    pub missing_len: u64,
}

/// A file that is not all here, or not current. Lengths are bytes.
struct Todo {
    fid: Fid,
    present: u64,
    missing: u64,
}

impl Report {
    fn came(&mut self, file: &Todo, size: u64) {
        self.missing = self.missing.saturating_sub(1);
        self.missing_len = self.missing_len.saturating_sub(file.missing);
        self.len = self.len.saturating_sub(file.present).saturating_add(size);
    }
}

#[derive(Default)]
struct Shared {
    rung: bool,
    /// somebody waits: no rest before the next look
    hurry: bool,
    stop: bool,
    reports: HashMap<Vec<u8>, Report>,
    /// pins that were asked for just now
    fresh: Vec<Vec<u8>>,
    /// the server's return will ring
    told: bool,
}

/// Speaks to the thread, which ends when this is stopped.
pub struct Pinner {
    filter: Weak<Filter>,
    shared: Mutex<Shared>,
    changed: Condvar,
    /// when the next background fetch may begin
    next_at: Mutex<Instant>,
}

impl Pinner {
    /// # Errors
    /// As pthread_create(3).
    pub fn start(filter: &Arc<Filter>) -> std::io::Result<Arc<Pinner>> {
        let pinner = Arc::new(Pinner {
            filter: Arc::downgrade(filter),
            shared: Mutex::default(),
            changed: Condvar::new(),
            next_at: Mutex::new(Instant::now()),
        });
        let rung = Arc::downgrade(&pinner);
        filter.cache.news.connect(Box::new(move || {
            if let Some(pinner) = rung.upgrade() {
                pinner.ring(false);
            }
        }));
        let me = pinner.clone();
        std::thread::Builder::new().name("pinner".into()).spawn(move || me.run())?;
        pinner.ring(false); // what was pinned in the life before
        Ok(pinner)
    }

    /// The thread ends soon; what it waits for, it waits for no more.
    pub fn stop(&self) {
        held(&self.shared).stop = true;
        self.changed.notify_all();
    }

    /// A pin was made: it is seen to at once.
    pub fn pinned(&self, path: &[u8]) {
        let mut shared = held(&self.shared);
        shared.reports.insert(path.to_vec(), Report::default());
        shared.fresh.push(path.to_vec());
        drop(shared);
        self.ring(true);
    }

    /// How a pin is doing.
    pub fn report(&self, pin: &Pin) -> Report {
        held(&self.shared).reports.get(&pin.path).copied().unwrap_or_default()
    }

    fn ring(&self, hurry: bool) {
        let mut shared = held(&self.shared);
        shared.rung = true;
        shared.hurry |= hurry;
        drop(shared);
        self.changed.notify_all();
    }

    fn is_stopped(&self) -> bool {
        held(&self.shared).stop
    }

    fn run(self: Arc<Pinner>) {
        let mut rest_until = Instant::now();
        while self.wait(rest_until) {
            let Some(filter) = self.filter.upgrade() else { return };
            filter.cache.news.rearm();
            let worked = self.look(&filter);
            rest_until = Instant::now() + policy::pin_rest(worked);
        }
    }

    /// Waits until there is something to do, and for the rest to be over; false: it is the end.
    fn wait(&self, rest_until: Instant) -> bool {
        let mut shared = held(&self.shared);
        let idle_until = Instant::now() + policy::PIN_LOOK;
        loop {
            let now = Instant::now();
            let due = shared.rung && (shared.hurry || now >= rest_until);
            if shared.stop {
                return false;
            }
            if due || now >= idle_until {
                (shared.rung, shared.hurry) = (false, false);
                return true;
            }
            let until = if shared.rung { rest_until.min(idle_until) } else { idle_until };
            let pause = until.saturating_duration_since(now);
            shared = self.changed.wait_timeout(shared, pause).unwrap_or_else(|e| e.into_inner()).0;
        }
    }

    /// Looks through all pins once; for how long, but for waits for the server.
    fn look(self: &Arc<Pinner>, filter: &Filter) -> Duration {
        let mut worked = Duration::ZERO;
        let pins = filter.cache.pins.all();
        held(&self.shared).reports.retain(|path, _| pins.iter().any(|pin| pin.path == *path));
        for pin in pins {
            let fresh = {
                let mut shared = held(&self.shared);
                let before = shared.fresh.len();
                shared.fresh.retain(|path| *path != pin.path);
                shared.fresh.len() < before
            };
            let report = Mutex::new(Report { state: State::Fetching, ..Report::default() });
            let shown = AtomicBool::new(fresh);
            let (path, waited) = (&pin.path[..], Mutex::default());
            let look = Look { pinner: self, filter, path, paced: !fresh, report, shown, waited };
            let began = Instant::now();
            let kept = look.keep();
            worked += began.elapsed().saturating_sub(*held(&look.waited));
            let state = match kept {
                Ok(()) => State::Whole,
                Err(Errno::INTR) => State::Fetching,
                Err(Errno::HOSTUNREACH) => State::Away,
                Err(Errno::NOENT | Errno::NOTDIR) => State::Absent,
                Err(e) => State::Failed(e),
            };
            if fresh && state == State::Away {
                held(&self.shared).fresh.push(pin.path.clone());
            }
            look.show();
            look.note(|report| report.state = state);
            if state == State::Away {
                self.wait_for_server(filter);
            }
            if self.is_stopped() || held(&self.shared).hurry {
                // What was asked for now comes first; the rest is looked at again.
                self.ring(false);
                break;
            }
        }
        worked
    }

    fn wait_for_server(self: &Arc<Pinner>, filter: &Filter) {
        if !std::mem::replace(&mut held(&self.shared).told, true) {
            let me = self.clone();
            filter.lento.when_back(Box::new(move |is_back| {
                held(&me.shared).told = false;
                if is_back {
                    me.ring(false);
                }
            }));
        }
    }

    /// Waits until a background fetch of `len` bytes keeps to the rate.
    fn pace(&self, len: u64) {
        let at = {
            let mut next_at = held(&self.next_at);
            let at = (*next_at).max(Instant::now());
            *next_at = at + policy::pin_pause(len);
            at
        };
        let mut shared = held(&self.shared);
        while !shared.stop && Instant::now() < at {
            let pause = at.saturating_duration_since(Instant::now());
            shared = self.changed.wait_timeout(shared, pause).unwrap_or_else(|e| e.into_inner()).0;
        }
    }
}

/// One look at one pin.
struct Look<'a> {
    pinner: &'a Pinner,
    filter: &'a Filter,
    path: &'a [u8],
    /// at the bounded rate
    paced: bool,
    report: Mutex<Report>,
    /// the report is shown as it grows; else the one of the look before stays until all is counted
    shown: AtomicBool,
    /// for the server, with nothing else to do
    waited: Mutex<Duration>,
}

impl Look<'_> {
    fn note(&self, change: impl FnOnce(&mut Report)) {
        let mut report = held(&self.report);
        change(&mut report);
        if self.shown.load(Ordering::Relaxed) {
            held(&self.pinner.shared).reports.insert(self.path.to_vec(), *report);
        }
    }

    fn show(&self) {
        self.shown.store(true, Ordering::Relaxed);
    }

    fn is_over(&self) -> bool {
        let shared = held(&self.pinner.shared);
        shared.stop || (shared.hurry && self.paced)
    }

    fn keep(&self) -> Result<(), Errno> {
        let mut dirs = vec![ROOT];
        let mut files = Vec::new();
        if !self.path.is_empty() {
            let (above, name) = match self.path.iter().rposition(|byte| *byte == b'/') {
                Some(at) => (&self.path[..at], &self.path[at + 1..]),
                None => (&b""[..], self.path),
            };
            let dir = dir_at(above, |fid| self.dir(fid), &self.filter.cache.tree)?;
            dirs.clear();
            let name = Name::new(name).map_err(|_| Errno::NOENT)?;
            fs::stat(&*dir, name.as_bytes())?;
            self.count(&dir, &name, &mut dirs, &mut files)?;
        }
        let mut first_error = None;
        while let Some(fid) = dirs.pop() {
            let dir = match self.dir(fid) {
                Ok(dir) => dir,
                Err(Errno::STALE | Errno::NOENT) => continue, // it went meanwhile
                Err(e) => return Err(e),
            };
            if fid == ROOT {
                self.note(|report| report.objects += 1);
            }
            for entry in fs::read_dir(&*dir)? {
                let Ok(name) = Name::new(&entry.name) else { continue };
                if !(fid == ROOT && is_own(name.as_bytes())) {
                    self.count(&dir, &name, &mut dirs, &mut files)?;
                }
            }
            if files.len() >= TODO_MAX {
                first_error = first_error.or(self.fetch_all(std::mem::take(&mut files))?);
            }
            if self.is_over() {
                return Err(Errno::INTR);
            }
        }
        self.show();
        first_error = first_error.or(self.fetch_all(files)?);
        first_error.map_or(Ok(()), Err)
    }

    /// Takes note of one entry: what is below it, or missing of it.
    fn count(
        &self,
        dir: &Dir,
        name: &Name,
        dirs: &mut Vec<Fid>,
        files: &mut Vec<Todo>,
    ) -> Result<(), Errno> {
        let Ok(stat) = fs::stat(dir, name.as_bytes()) else { return Ok(()) };
        let Ok(Some(meta)) = self.filter.cache.tree.meta(dir, name) else { return Ok(()) };
        self.note(|report| report.objects += 1);
        match stat.kind() {
            Kind::Dir => dirs.push(meta.fid),
            Kind::File => {
                let present = meta.present(stat.size).iter().map(|range| range.len).sum::<u64>();
                let missing = stat.size.saturating_sub(present);
                let whole = missing == 0 && self.filter.valid(&meta);
                if !whole {
                    files.push(Todo { fid: meta.fid, present: stat.size.min(present), missing });
                }
                self.note(|report| {
                    report.len += stat.size.min(present);
                    report.missing += u64::from(!whole);
                    report.missing_len += missing;
                });
            }
            _ => {}
        }
        Ok(())
    }

    /// Fetches files, a few at a time. `Some`: the first reason why one could not be fetched.
    ///
    /// # Errors
    /// What stops them all: the server is away, or there is no room.
    fn fetch_all(&self, files: Vec<Todo>) -> Result<Option<Errno>, Errno> {
        let todo = Mutex::new(files.into_iter());
        let (first, fatal) = (Mutex::new(None), Mutex::new(None));
        let work = || {
            loop {
                let Some(file) = held(&todo).next() else { return };
                if held(&fatal).is_some() || self.is_over() {
                    return;
                }
                match self.fetch_file(file.fid) {
                    // it may have another size by now
                    Ok(size) => self.note(|report| report.came(&file, size)),
                    Err(Errno::STALE | Errno::NOENT) => self.note(|report| report.came(&file, 0)),
                    Err(e @ (Errno::HOSTUNREACH | Errno::NOSPC | Errno::DQUOT)) => {
                        held(&fatal).get_or_insert(e);
                        return;
                    }
                    Err(e) => {
                        held(&first).get_or_insert(e);
                    }
                }
            }
        };
        let helpers = HELPERS.min(held(&todo).len().saturating_sub(1));
        self.wait(|| {
            std::thread::scope(|scope| {
                for _ in 0..helpers {
                    scope.spawn(work);
                }
                work();
            })
        });
        if self.is_over() {
            return Err(Errno::INTR);
        }
        let fatal = *held(&fatal);
        fatal.map_or(Ok(*held(&first)), Err)
    }

    /// The size of the file that is all here then, bytes.
    fn fetch_file(&self, fid: Fid) -> Result<u64, Errno> {
        let mut tries = 0;
        while tries < TRIES_MAX && !self.is_over() {
            let object = match self.filter.here(fid) {
                Ok(object) => object,
                Err(Stop::Errno(e)) => return Err(e),
                Err(Stop::Miss(want)) => {
                    tries += 1;
                    self.fetch(slice(want))?;
                    continue;
                }
            };
            let Some((at, len)) = object.meta.missing(0, u64::MAX) else {
                return Ok(object.stat.size);
            };
            drop(object); // nothing of it stays open while the server is waited for
            self.fetch(slice(Want::Bytes { fid, at, len }))?;
        }
        Err(Errno::BUSY)
    }

    fn dir(&self, fid: Fid) -> Result<Arc<Dir>, Errno> {
        for _ in 0..TRIES_MAX {
            match self.filter.dir_here(fid) {
                Ok(dir) => return Ok(dir),
                Err(Stop::Errno(e)) => return Err(e),
                Err(Stop::Miss(want)) => self.wait(|| self.fetch(want))?,
            }
        }
        // It changes as fast as it comes.
        match as_is(|| self.filter.dir_here(fid)) {
            Ok(dir) => Ok(dir),
            Err(_) => Err(Errno::BUSY),
        }
    }

    /// Does what is mostly waiting.
    fn wait<T>(&self, act: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let done = act();
        *held(&self.waited) += began.elapsed();
        done
    }

    fn fetch(&self, want: Want) -> Result<(), Errno> {
        if self.paced {
            self.pinner.pace(match want {
                Want::Bytes { len, .. } => len,
                _ => 0,
            });
        }
        let (tell, told) = std::sync::mpsc::channel();
        self.filter.lento.want(
            want,
            Box::new(move |met| {
                let _ = tell.send(met); // who asked has ended
            }),
        );
        while !held(&self.pinner.shared).stop {
            match told.recv_timeout(Duration::from_millis(200)) {
                Ok(met) => return met,
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
            }
        }
        Err(Errno::HOSTUNREACH)
    }
}

fn slice(want: Want) -> Want {
    match want {
        Want::Bytes { fid, at, len } => Want::Bytes { fid, at, len: len.min(SLICE_LEN) },
        want => want,
    }
}

/// The directory at a path of the volume. `open` gives each on the way.
pub(super) fn dir_at(
    path: &[u8],
    open: impl Fn(Fid) -> Result<Arc<Dir>, Errno>,
    tree: &Tree,
) -> Result<Arc<Dir>, Errno> {
    let mut dir = open(ROOT)?;
    for raw in path.split(|byte| *byte == b'/').filter(|raw| !raw.is_empty()) {
        let name = Name::new(raw).map_err(|_| Errno::NOENT)?;
        if fs::stat(&*dir, raw)?.kind() != Kind::Dir {
            return Err(Errno::NOTDIR);
        }
        let meta = tree.meta(&dir, &name).map_err(|e| e.errno())?.ok_or(Errno::NOENT)?;
        dir = open(meta.fid)?;
    }
    Ok(dir)
}

/// A path with one more name.
pub(super) fn join(path: &[u8], name: &Name) -> Vec<u8> {
    match path {
        [] => name.as_bytes().to_vec(),
        _ => [path, b"/", name.as_bytes()].concat(),
    }
}
