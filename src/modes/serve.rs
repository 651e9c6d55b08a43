//! `imz serve`: volumes, a port, and the signals that end it.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Context;

use super::explain::explain;
use super::{Exit, Failure, fail};
use crate::cli::ServeArgs;
use crate::lento::server::Settings;
use crate::net::conflicts::Ask;
use crate::net::control::{self, Answer, Status};
use crate::net::handle::Handle;
use crate::net::server::{Export, Server, state_of};
use crate::sys::{self, clock};

/// # Errors
/// With the exit codes that `imz --help` lists; nothing is left half made.
pub fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let exports = exports(args)?;
    sys::limit::raise_files();
    let server = Server::open(&exports, Some(args.listen), Settings::default());
    let mut server = server.map_err(explain)?;
    server.take_signals().context("cannot take over SIGTERM and SIGINT")?;
    let addr = server.addr().map_or_else(|| args.listen.to_string(), |addr| addr.to_string());
    let since = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    let mut controls = Vec::new();
    for export in &exports {
        let told = Told {
            handle: server.handle(),
            server: addr.clone(),
            since: since.clone(),
            began: clock::now_ns(),
            export: export.clone(),
        };
        match control::serve(&control::socket_path(&export.dir), Arc::new(told)) {
            Ok(control) => controls.push(control),
            // it serves all the same; only `imz status` does not see it
            Err(e) => log::warn!("{}: no control socket: {e}", export.dir.display()),
        }
    }
    for Export { name, dir, .. } in &exports {
        eprintln!("imz: serving {} as /{name} on {addr}", dir.display());
    }
    notify(b"READY=1");
    let result = server.run().map_err(explain);
    notify(b"STOPPING=1");
    drop(controls);
    result
}

/// The directories by their real paths, with the names of their volumes.
fn exports(args: &ServeArgs) -> anyhow::Result<Vec<Export>> {
    let mut exports: Vec<Export> = Vec::new();
    let is_only = args.exports.len() == 1;
    for export in &args.exports {
        let dir = match export.dir.canonicalize() {
            Ok(dir) if dir.is_dir() => dir,
            Ok(dir) => return fail(Exit::NotFound, format!("{}: not a directory", dir.display())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return fail(
                    Exit::NotFound,
                    format!("{}: no such directory", export.dir.display()),
                );
            }
            Err(e) => return Err(e).with_context(|| export.dir.display().to_string()),
        };
        let name = export.volume(&dir).map_err(|e| Failure::new(Exit::Usage, e.to_string()))?;
        if let Some(twin) = exports.iter().find(|twin| twin.name == name) {
            let what = format!(
                "{} and {} would both be /{name}; write NAME=DIR",
                twin.dir.display(),
                dir.display()
            );
            return fail(Exit::Usage, what);
        }
        let state = args.state.as_deref().map(|state| state_of(state, &name, is_only));
        exports.push(Export { name, dir, state });
    }
    Ok(exports)
}

/// Answers on the control socket of one volume.
struct Told {
    handle: Handle,
    server: String,
    since: String,
    began: u64,
    export: Export,
}

impl Answer for Told {
    fn status(&self) -> Status {
        let report = self.handle.report();
        let volume = report.volumes.iter().find(|volume| volume.name == self.export.name);
        let own = || self.export.dir.join(".imz");
        Status {
            mount: self.export.dir.clone(),
            server: self.server.clone(),
            volume: self.export.name.clone(),
            connected: true,
            since: self.since.clone(),
            since_seconds: clock::age_of(self.began).as_secs(),
            cache: self.export.state.clone().unwrap_or_else(own),
            conflicts: volume.map_or(0, |volume| volume.conflicts),
            journal_bytes: volume.map_or(0, |volume| volume.history_len),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            last_error: volume.and_then(|volume| volume.last_error.clone()),
            ..Status::default()
        }
    }
    // a server has nothing to ship
    fn ship_now(&self) -> u64 {
        0
    }
    fn acked(&self) -> u64 {
        0
    }
    fn shutdown(&self) {
        self.handle.stop();
    }
    fn conflicts(&self, ask: Ask) -> Result<serde_json::Value, String> {
        self.handle.conflicts(&self.export.name, ask)
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
