//! `imz mount`: wires cache, filter, client and, for a directory, a server of its own together.
//!
//! Order of a start: look at the arguments; go into the background; open the cache and settle what
//! a death left; meet the server; mount; answer on the control socket; say that all is ready. It
//! ends when the file system is unmounted, by whomever: a signal unmounts it. What is pending then
//! stays in the cache, and the next mount of it goes on shipping.

mod cache;
mod keep;
mod wire;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use anyhow::Context;

use super::{Exit, Failure, exit_code, fail, place};
use crate::cli::MountArgs;
use crate::cli::options::{
    Coherence, MountOptions, Offline, OfflineSpace, Passthrough, Reserve, Source, Uring,
};
use crate::lento::grant::Grant;
use crate::lento::policy;
use crate::lento::rights::Held;
use crate::net::client::{self, Handle, Peer};
use crate::net::control;
use crate::net::room;
use crate::net::server::{self, Server};
use crate::presto::adapter::Ways;
use crate::presto::device;
use crate::presto::filter::Filter;
use crate::presto::pinner::Pinner;
use crate::presto::stop::Looks;
use crate::replica::room::FiguresFile;
use crate::sys::daemon::{self, Forked, Signals, Teller};
use crate::sys::{self, cred};

/// Threads that answer the kernel.
const THREADS: usize = 2;
/// Time between two looks at files that are written through mappings.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Time between two looks for directories that were taken out of the cache.
const TREE_EVERY: Duration = Duration::from_secs(2);
/// How long an end waits for the kernel to let go.
const END_TIME_MAX: Duration = Duration::from_secs(10);
/// How long an end goes on shipping while the server is there; the rest waits for the next mount.
const SHIP_TIME_MAX: Duration = Duration::from_secs(2);

/// What ends a mount.
enum Event {
    Signal,
    /// `imz umount` asks, having unmounted by itself
    Asked,
    /// the kernel has unmounted the file system
    Unmounted,
}

/// Mounts a volume and returns when it is usable; with `-f`, when it is unmounted.
pub fn run(args: &MountArgs) -> anyhow::Result<()> {
    let mountpoint = look_at_mountpoint(&args.mountpoint)?;
    let mut args = args.clone();
    args.mountpoint = mountpoint;
    if let Source::Local(dir) = &mut args.source {
        *dir = look_at_source(dir, &args.mountpoint)?;
    }
    let settings = args.settings();
    let place = match &settings.cache {
        Some(dir) => std::path::absolute(dir).with_context(|| dir.display().to_string())?,
        None => cache::default_dir(&args.source)?,
    };
    if place.starts_with(&args.mountpoint) {
        return fail(
            Exit::Refused,
            format!("{}: the cache cannot lie in the mount", place.display()),
        );
    }
    if args.foreground {
        return hold(&args, &settings, &place, None);
    }
    match daemon::fork().context("cannot go into the background (use -f)")? {
        Forked::Parent(child) => match child.wait() {
            Ok(()) => Ok(()),
            Err((exit, what)) => Err(Failure::new(Exit::from_code(exit), what).into()),
        },
        Forked::Child(parent) => {
            if let Err(e) = hold(&args, &settings, &place, Some(parent)) {
                log::error!("{e:#}");
                std::process::exit(exit_code(&e).into());
            }
            std::process::exit(0)
        }
    }
}

/// The mount point, absolute: an existing directory on which nothing of ours is mounted.
fn look_at_mountpoint(path: &Path) -> anyhow::Result<PathBuf> {
    let name = || path.display().to_string();
    let absolute: PathBuf = std::path::absolute(path).with_context(name)?.components().collect();
    // The table of mounts is asked first: a mount whose process died must not be touched.
    clear_if_dead(&absolute).with_context(name)?;
    match std::fs::canonicalize(&absolute) {
        Ok(real) if real.is_dir() => {
            clear_if_dead(&real).with_context(name)?;
            Ok(real)
        }
        Ok(_) => fail(Exit::NotFound, format!("{}: the mount point is not a directory", name())),
        Err(e) => fail(Exit::NotFound, format!("{}: the mount point: {e} (mkdir it)", name())),
    }
}

/// What a process left here that was killed is taken away; what lives is left alone.
fn clear_if_dead(point: &Path) -> anyhow::Result<()> {
    if !sys::mount::ours()?.contains(&point.to_owned()) {
        return Ok(());
    }
    let (path, socket) = (point.to_owned(), control::socket_path(point));
    let place = place::Place { path, socket, mounted: true };
    match control::status(&place.socket) {
        Err(e) if place::is_dead(&place, &e) => {
            place::clear_dead(&place)?;
            log::warn!("{}: the process of the mount here had died; it is gone", point.display());
            Ok(())
        }
        _ => fail(Exit::Refused, "something is mounted here by imz already (imz umount it)"),
    }
}

/// A directory to be served by this process.
fn look_at_source(dir: &Path, mountpoint: &Path) -> anyhow::Result<PathBuf> {
    let name = dir.display();
    let real = match std::fs::canonicalize(dir) {
        Ok(real) if real.is_dir() => real,
        Ok(_) => return fail(Exit::NotFound, format!("{name}: is not a directory")),
        Err(e) => return fail(Exit::NotFound, format!("{name}: {e}")),
    };
    if mountpoint.starts_with(&real) {
        return fail(
            Exit::Refused,
            format!("the mount point lies in {name}, which would be served"),
        );
    }
    Ok(real)
}

/// The life of a mount.
fn hold(
    args: &MountArgs,
    settings: &MountOptions,
    place: &Path,
    parent: Option<Teller>,
) -> anyhow::Result<()> {
    let background = parent.is_some();
    let start = || -> anyhow::Result<Running> {
        daemon::raise_file_limit();
        let signals = Signals::take().context("signals")?;
        Running::start(args, settings, place, signals)
    };
    match (start(), parent) {
        (Ok(running), parent) => {
            if background {
                let log = place.join(".imz").join("log");
                daemon::leave_terminal(&log).with_context(|| log.display().to_string())?;
            } else {
                eprintln!("imz: {} is mounted on {}", args.source, args.mountpoint.display());
            }
            parent.into_iter().for_each(Teller::ready);
            running.until_the_end()
        }
        (Err(e), Some(parent)) => {
            parent.failed(exit_code(&e), &format!("{e:#}"));
            std::process::exit(exit_code(&e).into())
        }
        (Err(e), None) => Err(e),
    }
}

/// A mount that is up.
struct Running {
    mountpoint: PathBuf,
    filter: Arc<Filter>,
    handle: Handle,
    pinner: Arc<Pinner>,
    server: Option<server::Embedded>,
    control: control::Control,
    events: Receiver<Event>,
}

impl Running {
    fn start(
        args: &MountArgs,
        settings: &MountOptions,
        place: &Path,
        signals: Signals,
    ) -> anyhow::Result<Running> {
        let mountpoint = args.mountpoint.clone();
        let (peer, volume, server) = match &args.source {
            Source::Server { host, port, volume } => {
                (Peer::Tcp(host.clone(), *port), volume.clone(), None)
            }
            Source::Local(dir) => {
                let (name, state) = (String::from("local"), None);
                let export = server::Export { name: name.clone(), dir: dir.clone(), state };
                let embedded = Server::embedded(&export).map_err(super::explain::explain)?;
                let way = embedded.handle();
                (Peer::Embedded(Box::new(move || way.connect())), name, Some(embedded))
            }
        };
        let opened = cache::open(place, &args.source, &volume)?;
        let (notify, kernel) = wire::notifier()?;
        let (age, host) = (settings.age, sys::daemon::host_name());
        let rights = Arc::new(Held::default());
        let keeps = settings.coherence == Coherence::Session;
        let strict = settings.coherence == Coherence::Strict;
        let file = Arc::new(FiguresFile::of(&place.join(".imz")));
        let grant = match settings.reserve {
            Reserve::On | Reserve::Exact => {
                let optimistic = settings.offline_space == OfflineSpace::Optimistic;
                let grant = room::grant_of(&opened.cache, &file, optimistic)?;
                if settings.reserve == Reserve::Exact {
                    grant.count_each();
                }
                grant
            }
            Reserve::Off => Grant::off(),
        };
        let options = client::Options {
            age,
            host,
            rights: rights.clone(),
            keeps,
            grant: grant.clone(),
            grant_file: (settings.reserve != Reserve::Off).then_some(file),
        };
        let handle = client::start(opened.cache.clone(), peer, options, notify)?;
        handle.set_timeout(settings.timeout);
        wire::meet(&handle, (place, &opened.cache), &args.source, settings.timeout)?;
        let filter = Arc::new(Filter {
            cache: opened.cache,
            lento: Arc::new(wire::Way(handle.clone())),
            rights,
            files: Default::default(),
            writers: opened.writers,
            mapped: Default::default(),
            room: grant,
            by_kernel: Default::default(),
            // what the kernel writes by itself cannot be told at once
            passthrough: (settings.passthrough == Passthrough::Auto && !strict).into(),
            strict,
            forgets_names: false.into(),
        });
        cache::store_what_was_open(&filter, opened.store.as_deref())?;
        if strict {
            let saves = Arc::downgrade(&filter);
            filter.cache.connect_saver(Box::new(move |fids| {
                if let Some(filter) = saves.upgrade() {
                    filter.save_written(fids);
                }
            }));
        }
        let (tell, events) = channel();
        let keeping = keep::Keeping::start(&filter, &handle, settings.cache_max)?;
        let answer = wire::Told::new(&keeping, &handle, args, place, {
            let tell = tell.clone();
            move || drop(tell.send(Event::Asked))
        });
        // Before the mount is there: whoever finds a mount whose socket is dead knows what that means.
        let control = control::serve(&control::socket_path(&mountpoint), Arc::new(answer))
            .context("the control socket")?;
        let mounted = device::mount(filter.clone(), &mountpoint, &fuse_options(args, settings))
            .with_context(|| format!("mounting on {}", mountpoint.display()))?;
        kernel.connect(mounted.kernel());
        watch(mounted, signals, &tell)?;
        watch_mapped(&filter)?;
        watch_kernel(&filter, &mountpoint)?;
        watch_tree(&filter, &handle, place)?;
        let pinner = keeping.pinner;
        Ok(Running { mountpoint, filter, handle, pinner, server, control, events })
    }

    /// Waits until the file system is unmounted, then leaves everything in order.
    fn until_the_end(self) -> anyhow::Result<()> {
        let mut unmounted = false;
        if !matches!(self.events.recv(), Ok(Event::Unmounted)) {
            let gone = !sys::mount::ours()?.contains(&self.mountpoint);
            if !gone && let Err(e) = sys::mount::umount(&self.mountpoint, false) {
                log::info!("{}: {e}; it is detached", self.mountpoint.display());
                sys::mount::umount(&self.mountpoint, true)?;
            }
        } else {
            unmounted = true;
        }
        if !unmounted {
            // Who still has files open in a detached mount keeps it for a while at most.
            let _ = self.events.recv_timeout(END_TIME_MAX);
        }
        self.pinner.stop();
        // The kernel may have dropped its last words with the mount.
        self.filter.store_all();
        self.filter.look_at_mapped();
        let patience = if self.handle.status().connected { SHIP_TIME_MAX } else { Duration::ZERO };
        self.handle.shutdown(patience);
        if let Some(server) = self.server {
            server.stop().map_err(super::explain::explain)?;
        }
        cache::close(&self.filter.cache)?;
        drop(self.control);
        Ok(())
    }
}

/// Starts the threads that answer the kernel and wait for signals.
fn watch(
    mounted: device::Mounted,
    mut signals: Signals,
    tell: &Sender<Event>,
) -> anyhow::Result<()> {
    let ended = tell.clone();
    std::thread::Builder::new().name("fuse".into()).spawn(move || {
        if let Err(e) = mounted.run() {
            log::error!("the kernel's requests cannot be read any more: {e}");
        }
        let _ = ended.send(Event::Unmounted);
    })?;
    let signalled = tell.clone();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        while signals.wait().is_ok() {
            let _ = signalled.send(Event::Signal);
        }
    })?;
    Ok(())
}

/// Looks after what is written through mappings, as long as the mount lives.
fn watch_mapped(filter: &Arc<Filter>) -> anyhow::Result<()> {
    let filter = Arc::downgrade(filter);
    std::thread::Builder::new().name("mapped".into()).spawn(move || {
        while let Some(filter) = filter.upgrade() {
            filter.look_at_mapped();
            drop(filter);
            std::thread::sleep(LOOK_EVERY);
        }
    })?;
    Ok(())
}

/// Notices when somebody takes files out of the cache that is in use.
fn watch_tree(filter: &Arc<Filter>, handle: &Handle, place: &Path) -> anyhow::Result<()> {
    let (filter, handle) = (Arc::downgrade(filter), handle.clone());
    let tree = place.join("tree");
    std::thread::Builder::new().name("tree".into()).spawn(move || {
        let mut was_there = true;
        while let Some(filter) = filter.upgrade() {
            let torn = filter.cache.tree.is_torn(&tree);
            drop(filter);
            let is_there = tree.exists();
            if torn && (is_there || was_there) {
                handle.doubt_all(cache::torn(&tree, is_there));
            }
            was_there = is_there;
            std::thread::sleep(TREE_EVERY);
        }
    })?;
    Ok(())
}

/// Counts what the kernel writes by itself, while it does, and makes it ask where room is short.
fn watch_kernel(filter: &Arc<Filter>, mountpoint: &Path) -> anyhow::Result<()> {
    let looks = Arc::downgrade(filter);
    std::thread::Builder::new().name("room".into()).spawn(move || {
        sys::limit::go_first();
        while let Some(filter) = looks.upgrade() {
            if filter.by_kernel.wait(LOOK_EVERY) {
                filter.look_at_kernel();
                let close = filter.by_kernel.is_guarded();
                drop(filter);
                std::thread::sleep(if close { policy::LOOK_CLOSELY } else { policy::LOOK_EVERY });
            }
        }
    })?;
    // It waits for looks at files of the mount: nobody else waits for it.
    let looks = Looks::start()?;
    let (asks, mountpoint) = (Arc::downgrade(filter), mountpoint.to_owned());
    std::thread::Builder::new().name("stop".into()).spawn(move || {
        sys::limit::go_first();
        while let Some(filter) = asks.upgrade() {
            if filter.by_kernel.wait_guarded(policy::REST_EVERY) {
                filter.make_kernel_ask(&looks, &mountpoint);
                let close = filter.by_kernel.is_guarded();
                drop(filter);
                std::thread::sleep(if close { policy::LOOK_CLOSELY } else { policy::REST_EVERY });
            }
        }
    })?;
    Ok(())
}

fn fuse_options(args: &MountArgs, settings: &MountOptions) -> device::Options {
    let mut flags = Vec::new();
    for (allowed, flag) in [
        (settings.suid, "nosuid"),
        (settings.dev, "nodev"),
        (settings.exec, "noexec"),
        (settings.atime, "noatime"),
    ] {
        if !allowed {
            flags.push(flag.to_owned());
        }
    }
    device::Options {
        source: args.source.to_string(),
        read_only: settings.read_only,
        allow_other: settings.allow_other || cred::is_root(),
        flags,
        threads: THREADS,
        ways: Ways { sync: settings.sync, locks: true, waits: settings.offline == Offline::Wait },
        uring: match settings.uring {
            Uring::Auto => device::Uring::Auto,
            Uring::On => device::Uring::On,
            Uring::Off => device::Uring::Off,
        },
    }
}
