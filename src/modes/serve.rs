//! `imz serve`: volumes, a port, and the signals that end it.

mod config;
mod orders;

use std::net;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;

use super::explain::explain;
use super::{Exit, Failure, fail};
use crate::cli::{ServeArgs, options};
use crate::lento::policy;
use crate::lento::server::Settings;
use crate::net::server::{Server, ServerError, state_of};
use crate::replica::settings::Change;
use crate::replica::state::FILE as STATE;
use crate::replica::volume::Volume;
use crate::sys;
use config::{Config, ConfigFile, Fault};
use orders::Orders;

/// # Errors
/// With the exit codes that `imz --help` lists; nothing is left half made.
pub fn run(args: &ServeArgs) -> anyhow::Result<()> {
    if let Some(path) = &args.check_config {
        let (_, text) = ConfigFile::open(path)?;
        let faults = config::parse(&text).map(|config| config::check_dirs(&config));
        return faulty(path, &faults.unwrap_or_else(|faults| faults));
    }
    let (plan, file) = match &args.config {
        None => (plan_of(args)?, None),
        Some(path) => {
            let (file, text) = ConfigFile::open(path)?;
            let config = config::parse(&text);
            let config =
                config.or_else(|faults| faulty(path, &faults).map(|()| Config::default()))?;
            (plan_in(config, args)?, Some(file))
        }
    };
    sys::limit::raise_files();
    let settings = Settings { keep_grant: plan.keep_grant, ..Settings::default() };
    let mut server = Server::new(Some(plan.listen), settings).map_err(explain)?;
    for Serving { name, dir, state, settings } in &plan.volumes {
        let volume = open_volume(dir, state.as_deref(), name, settings.as_ref())?;
        let twice = |(why, _)| explain(ServerError::Order { path: dir.clone(), why });
        server.serve(volume).map_err(twice)?;
    }
    server.take_signals().context("cannot take over SIGTERM and SIGINT")?;
    let addr = server.addr().unwrap_or(plan.listen).to_string();
    if let Some(file) = &file {
        log::info!("{} says what is served", file.path().display());
    }
    if plan.volumes.is_empty() {
        eprintln!("imz: serving no volume yet on {addr}");
    }
    for (name, dir) in server.served() {
        eprintln!("imz: serving {} as /{name} on {addr}", dir.display());
    }
    let orders = Orders::new((server.handle(), addr), plan.state, file);
    let places = plan.volumes.into_iter().map(|it| (it.dir, it.state));
    orders.open(&places.collect::<Vec<_>>());
    notify(b"READY=1");
    let result = server.run().map_err(explain);
    notify(b"STOPPING=1");
    orders.close();
    result
}

/// What is to be served, wherever that was said.
struct Plan {
    listen: net::SocketAddr,
    /// volumes that are created later have their state in a directory of their name below it
    state: Option<PathBuf>,
    keep_grant: Duration,
    volumes: Vec<Serving>,
}

struct Serving {
    name: String,
    dir: PathBuf,
    state: Option<PathBuf>,
    /// all of them, where a file says so
    settings: Option<Change>,
}

/// Opens a volume; `settings` are all that it has from then on.
fn open_volume(
    dir: &Path,
    state: Option<&Path>,
    name: &str,
    settings: Option<&Change>,
) -> anyhow::Result<Volume> {
    let at = |source| explain(ServerError::Volume { path: dir.to_owned(), source });
    let mut volume = Volume::open(dir, state, name).map_err(at)?;
    if let Some(settings) = settings {
        volume.set_settings(settings).map_err(|e| at(e.into()))?;
        if volume.name() != name {
            volume.set_name(name).map_err(|e| at(e.into()))?; // a file tells its name, too
        }
    }
    // Here nobody waits for it. What fails is tried again, and said, when it is served.
    if let Err(e) = volume.count_for_limit() {
        log::debug!("{name}: {e}");
    }
    Ok(volume)
}

/// `Err` of all faults of a file, if it has any.
fn faulty(path: &Path, faults: &[Fault]) -> anyhow::Result<()> {
    if faults.is_empty() {
        return Ok(());
    }
    let lines = faults.iter().map(|fault| format!("\n  {fault}"));
    fail(Exit::Usage, format!("{}:{}", path.display(), lines.collect::<String>()))
}

/// As a file says; what the command line says as well holds.
fn plan_in(config: Config, args: &ServeArgs) -> anyhow::Result<Plan> {
    let state = args.state.clone().or(config.state);
    let mut volumes = Vec::new();
    for volume in config.volumes {
        let own = || state.as_deref().map(|state| state_of(state, &volume.name, false));
        let state = volume.state.clone().or_else(own);
        let settings = Some(Change::to(volume.quota, volume.read_only, &volume.users));
        let dir = real_dir(&volume.dir).with_context(|| format!("line {}", volume.line))?;
        volumes.push(Serving { name: volume.name, dir, state, settings });
    }
    let listen = args.listen.or(config.listen).unwrap_or(options::LISTEN);
    let keep_grant = args.keep_grant.or(config.keep_grant).unwrap_or(policy::KEEP_GRANT);
    Ok(Plan { listen, state, keep_grant, volumes })
}

/// As the command line says: the directories by their real paths, with the names of their volumes.
fn plan_of(args: &ServeArgs) -> anyhow::Result<Plan> {
    let mut volumes: Vec<Serving> = Vec::new();
    let is_only = args.exports.len() == 1;
    if let Some(state) = args.state.as_deref().filter(|it| !is_only && it.join(STATE).exists()) {
        let what = format!(
            "{} is the state of one volume alone; of several each needs a directory of its name in \
             it: move what is there into {0}/NAME",
            state.display()
        );
        return fail(Exit::Refused, what);
    }
    for export in &args.exports {
        let dir = real_dir(&export.dir)?;
        let name = export.volume(&dir).map_err(|e| Failure::new(Exit::Usage, e.to_string()))?;
        if let Some(twin) = volumes.iter().find(|twin| twin.name == name) {
            let what = format!(
                "{} and {} would both be /{name}; write NAME=DIR",
                twin.dir.display(),
                dir.display()
            );
            return fail(Exit::Usage, what);
        }
        let state = args.state.as_deref().map(|state| state_of(state, &name, is_only));
        volumes.push(Serving { name, dir, state, settings: None });
    }
    let listen = args.listen.unwrap_or(options::LISTEN);
    let keep_grant = args.keep_grant.unwrap_or(policy::KEEP_GRANT);
    Ok(Plan { listen, state: args.state.clone(), keep_grant, volumes })
}

/// A directory by its real path.
fn real_dir(dir: &Path) -> anyhow::Result<PathBuf> {
    match dir.canonicalize() {
        Ok(dir) if dir.is_dir() => Ok(dir),
        Ok(dir) => fail(Exit::NotFound, format!("{}: not a directory", dir.display())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            fail(Exit::NotFound, format!("{}: no such directory", dir.display()))
        }
        Err(e) => Err(e).with_context(|| dir.display().to_string()),
    }
}

/// Tells systemd, if it started us and wants to know (sd_notify(3)).
fn notify(what: &[u8]) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else {
        return;
    };
    let told = || -> std::io::Result<()> {
        let to = match path.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(PathBuf::from(&path))?,
        };
        UnixDatagram::unbound()?.send_to_addr(what, &to).map(drop)
    };
    if let Err(e) = told() {
        log::warn!("NOTIFY_SOCKET: {e}");
    }
}
