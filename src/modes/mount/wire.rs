//! What joins the rooms in a mount: filter to loop, loop to kernel, control socket to both.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::keep::Keeping;
use crate::cli::MountArgs;
use crate::cli::options::Source;
use crate::kml::record::{ROOT, Seq};
use crate::lento::client::Unmet;
use crate::lento::grant::Regime;
use crate::lento::locks::{Denied, LockAsk};
use crate::lento::message::{Code, Space};
use crate::lento::policy;
use crate::lento::rights::Mode;
use crate::modes::{Exit, Failure};
use crate::net::client::{self, FirstContact, Handle, Notify};
use crate::net::conflicts::Ask;
use crate::net::control::keep::Wish;
use crate::net::control::{Answer, Status};
use crate::presto::device::Kernel;
use crate::presto::filter::{Filter, Lento, LockDone, Want};
use crate::replica::cache::Cache;
use crate::replica::hydrate::Notice;
use crate::replica::inspect;
use crate::sys::Errno;

/// The filter's way to the loop.
pub struct Way(pub Handle);

impl Lento for Way {
    fn want(&self, want: Want, done: Box<dyn FnOnce(Result<(), Errno>) + Send>) {
        let want = match want {
            Want::Dir(fid) => client::Want::Dir(fid),
            Want::Object(fid) => client::Want::Object(fid),
            Want::Bytes { fid, at, len } => client::Want::Bytes { fid, at, len },
            Want::Permit(few) => client::Want::Permit(few),
            Want::Room(room) => client::Want::Room(room),
        };
        self.0.want(want, Box::new(|met| done(met.map_err(errno))));
    }

    fn when_acked(&self, seq: Seq, done: Box<dyn FnOnce(Result<(), Errno>) + Send>) {
        self.0.wait_acked(seq, Box::new(|met| done(met.map_err(errno))));
    }

    fn when_back(&self, done: Box<dyn FnOnce(bool) + Send>) {
        self.0.wait_online(Box::new(|met| done(met.is_ok())));
    }

    fn space(&self) -> Space {
        self.0.space()
    }

    fn lock(&self, ask: LockAsk, done: LockDone) -> u64 {
        self.0.lock(ask, Box::new(|how| done(how.map_err(lock_errno))))
    }

    fn cancel(&self, waiting: u64) {
        self.0.cancel_lock(waiting);
    }
}

/// What an application gets when it does not get its lock.
fn lock_errno(why: Denied) -> Errno {
    match why {
        Denied::Busy => Errno::AGAIN,
        Denied::Deadlock => Errno::DEADLK,
        Denied::Interrupted => Errno::INTR,
        Denied::NoRoom | Denied::Away => Errno::NOLCK,
        Denied::Lost => Errno::IO,
    }
}

/// What an application gets when its want is not met.
fn errno(why: Unmet) -> Errno {
    match why {
        Unmet::Unreachable => Errno::HOSTUNREACH,
        Unmet::Gone => Errno::STALE,
        Unmet::Failed(Code::ReadOnly) => Errno::ROFS,
        Unmet::NoRoom => Errno::NOSPC,
        Unmet::Failed(_) => Errno::IO,
        Unmet::Local(errno) => Errno::from_raw_os_error(errno),
    }
}

/// A thread that tells the kernel what is stale, once it knows the kernel.
pub struct ToKernel(Arc<OnceLock<Kernel>>);

impl ToKernel {
    pub fn connect(&self, kernel: Kernel) {
        // Set once: a mount has one kernel.
        let _ = self.0.set(kernel);
    }
}

type News = (Vec<Notice>, Box<dyn FnOnce() + Send>);

struct Notifier(Sender<News>);

impl Notify for Notifier {
    fn stale(&mut self, what: Vec<Notice>, done: Box<dyn FnOnce() + Send>) {
        if let Err(returned) = self.0.send((what, done)) {
            (returned.0.1)(); // the thread has ended with the mount: nobody reads any more
        }
    }
}

/// The loop's way to the kernel; it leads nowhere until it is connected.
pub fn notifier() -> std::io::Result<(Box<dyn Notify>, ToKernel)> {
    let kernel = Arc::new(OnceLock::new());
    let (send, news) = channel();
    let known = kernel.clone();
    std::thread::Builder::new().name("notifier".into()).spawn(move || tell(&news, &known))?;
    Ok((Box::new(Notifier(send)), ToKernel(kernel)))
}

fn tell(news: &Receiver<News>, known: &OnceLock<Kernel>) {
    for (what, done) in news {
        if let Some(kernel) = known.get() {
            let all_entries = what
                .iter()
                .any(|notice| matches!(notice, Notice::All | Notice::Object { dir: true, .. }));
            if all_entries && kernel.has_epochs {
                kernel.forget_entries();
            }
            for notice in what {
                match notice {
                    Notice::Object { fid, .. } => {
                        kernel.forget_object(fid);
                    }
                    // Entries are looked up again after their directory has changed; to forget
                    // one, the kernel would wait for whoever works in the directory.
                    Notice::Entry { .. } => {}
                    // Of the root there is no entry that could be looked up again.
                    Notice::All => kernel.forget_object(ROOT),
                }
            }
        }
        done();
    }
}

/// The first word with the server. A cache that knows its volume can be mounted without it.
pub fn meet(
    handle: &Handle,
    (place, cache): (&Path, &Cache),
    source: &Source,
    timeout: Duration,
) -> anyhow::Result<()> {
    let facts = cache.state.facts();
    let known = facts.volume_id() != 0;
    let met = match known {
        true => handle.first_attempt(policy::away_after(timeout)),
        false => handle.first_contact(timeout),
    };
    let Err(e) = met else { return Ok(()) };
    let exit = match &e {
        FirstContact::Unreachable { .. } => Exit::Unreachable,
        FirstContact::UnknownVolume { .. } => Exit::NotFound,
        _ => Exit::Refused,
    };
    if exit == Exit::Unreachable && known {
        if facts.source != source.to_string() {
            let what = format!("{e}, and the cache is that of {}", facts.source);
            return Err(Failure::new(Exit::Refused, what).into());
        }
        log::warn!("{e}; mounted with what is in the cache, offline");
        return Ok(());
    }
    let hint = match exit {
        Exit::Refused if known => &*format!("; {} is that of {}", place.display(), facts.source),
        Exit::Unreachable => "; nothing is cached yet, so start imz serve there first",
        Exit::NotFound => "; imz serve says the names of its volumes when it starts",
        _ => "",
    };
    Err(Failure::new(exit, format!("{e}{hint}")).into())
}

/// The mount, for the control socket.
pub struct Told<F> {
    filter: Arc<Filter>,
    handle: Handle,
    keeping: Keeping,
    mountpoint: PathBuf,
    cache_dir: PathBuf,
    shutdown: F,
}

impl<F> Told<F> {
    pub fn new(
        keeping: &Keeping,
        handle: &Handle,
        args: &MountArgs,
        cache_dir: &Path,
        shutdown: F,
    ) -> Told<F> {
        Told {
            filter: keeping.filter.clone(),
            keeping: keeping.clone(),
            handle: handle.clone(),
            mountpoint: args.mountpoint.clone(),
            cache_dir: cache_dir.to_owned(),
            shutdown,
        }
    }
}

impl<F: Fn() + Send + Sync> Answer for Told<F> {
    fn status(&self) -> Status {
        let (s, pinned) = (self.handle.status(), self.keeping.sum());
        Status {
            mount: self.mountpoint.clone(),
            server: s.server,
            volume: s.volume,
            connected: s.connected,
            since: humantime::format_rfc3339_seconds(s.since).to_string(),
            since_seconds: s.since_ago.as_secs(),
            away: s.away,
            pending_records: s.pending_count,
            pending_bytes: s.pending_len,
            oldest_pending_seconds: s.oldest.map_or(0, |age| age.as_secs()),
            rate_bytes_per_second: s.rate,
            cache: self.cache_dir.clone(),
            cache_clean_bytes: s.clean_len,
            cache_dirty_bytes: s.dirty_len,
            cache_max_bytes: self.keeping.evictor.max().unwrap_or(0),
            evicted_bytes: self.filter.cache.evicted_len(),
            pins: pinned.pins,
            pinned_objects: pinned.objects,
            pinned_bytes: pinned.len,
            pinned_missing_files: pinned.missing,
            conflicts: s.conflicts,
            saved_records: s.saved_records,
            saved_bytes: s.saved_len,
            journal_bytes: self.filter.cache.log.bytes(),
            requests_foreground: s.requests_foreground,
            messages: s.messages,
            permit: match s.permit {
                Mode::Write => "write".to_owned(),
                Mode::Read => "read".to_owned(),
                Mode::None => "none".to_owned(),
            },
            permits_apart: s.permits_apart,
            passthrough: self.filter.passthrough.load(Ordering::Relaxed),
            space_regime: match s.room.regime {
                Regime::Off => "off".to_owned(),
                Regime::Ample => "ample".to_owned(),
                Regime::Exact => "exact".to_owned(),
            },
            space_granted_bytes: s.room.granted.bytes(),
            space_granted_files: s.room.granted.files(),
            space_used_bytes: s.room.in_use.bytes(),
            space_used_files: s.room.in_use.files(),
            space_unseen_max_bytes: self.filter.by_kernel.most(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            last_error: s.last_error,
            warning: s.warning,
            ..Status::default()
        }
    }

    fn ship_now(&self) -> u64 {
        self.filter.store_all();
        self.filter.look_at_mapped();
        self.handle.ship_now().0
    }

    fn acked(&self) -> u64 {
        self.handle.acked().0
    }

    fn shutdown(&self) {
        (self.shutdown)();
    }

    fn conflicts(&self, ask: Ask) -> Result<serde_json::Value, String> {
        self.handle.conflicts(ask)
    }

    fn keep(&self, wish: &Wish) -> Result<serde_json::Value, String> {
        self.keeping.answer(wish)
    }

    fn inspect(&self, path: &[u8]) -> Result<serde_json::Value, String> {
        let right = |fid| match self.filter.rights.mode(fid) {
            Mode::Write => "write",
            Mode::Read => "read",
            Mode::None => "none",
        };
        Ok(inspect::in_mount(&self.filter.cache, path, &right)?.to_pairs())
    }
}
