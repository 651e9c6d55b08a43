//! What a running server answers on its control sockets: how its volumes are, and changes of them.
//!
//! One change at a time: what must hold is checked first, then the configuration file is prepared
//! (where there is one), then the loop does it, then the file is put in its place. Every volume has
//! a socket under its directory's name, and the server one of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use super::config::{ConfigFile, Edit, Staged, VolumeConfig};
use crate::cli::options;
use crate::lento::ledger::Holding;
use crate::lento::rights::Mode;
use crate::lento::room::Room;
use crate::lento::serving::{Client, Owing};
use crate::modes::explain::explain;
use crate::modes::{Exit, Failure, exit_code};
use crate::net::conflicts::Ask;
use crate::net::control::volumes::{
    CLIENTS_MAX, ClientStatus, Said, UserQuota, VolumeAsk, VolumeStatus, server_socket,
};
use crate::net::control::{self, Answer, Control, Refusal, SpaceGrant, Status};
use crate::net::handle::{Handle, Report, VolumeReport};
use crate::net::server::ServerError;
use crate::net::volumes::{Done, Order, OrderError};
use crate::replica::settings::Change;
use crate::sys::clock;

/// The running server, for all of its sockets.
pub struct Orders {
    handle: Handle,
    addr: String,
    /// when it began, for people and by the clock that counts
    since: String,
    began: u64,
    /// volumes that come later have their state in a directory of their name below this one
    state: Option<PathBuf>,
    held: Mutex<Held>,
}

/// One change at a time has this.
struct Held {
    config: Option<ConfigFile>,
    /// where the state of each volume is, if not in its directory; by directory
    states: BTreeMap<PathBuf, PathBuf>,
    controls: BTreeMap<PathBuf, Control>,
    whole: Option<Control>,
}

impl Orders {
    pub fn new(
        (handle, addr): (Handle, String),
        state: Option<PathBuf>,
        config: Option<ConfigFile>,
    ) -> Arc<Orders> {
        let since = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let (states, controls) = (BTreeMap::new(), BTreeMap::new());
        let held = Mutex::new(Held { config, states, controls, whole: None });
        Arc::new(Orders { handle, addr, since, began: clock::now_ns(), state, held })
    }
    /// Answers on the server's own socket, and for the directories that it serves, with the places
    /// of their states.
    pub fn open(self: &Arc<Orders>, served: &[(PathBuf, Option<PathBuf>)]) {
        control::volumes::servers(); // takes away what dead ones left
        let socket = server_socket(std::process::id());
        let whole = self.answer_on(&socket, None);
        self.held().whole = whole;
        for (dir, state) in served {
            self.open_one(dir, state.as_deref());
        }
    }
    fn open_one(self: &Arc<Orders>, dir: &Path, state: Option<&Path>) {
        let control = self.answer_on(&control::socket_path(dir), Some(dir));
        let mut held = self.held();
        held.controls.extend(control.map(|control| (dir.to_owned(), control)));
        held.states.extend(state.map(|state| (dir.to_owned(), state.to_owned())));
    }
    fn answer_on(self: &Arc<Orders>, socket: &Path, dir: Option<&Path>) -> Option<Control> {
        let told = Told { orders: self.clone(), dir: dir.map(Path::to_owned) };
        match control::serve(socket, Arc::new(told)) {
            Ok(control) => Some(control),
            // it serves all the same; only questions do not reach it
            Err(e) => {
                log::warn!("{}: no control socket: {e}", socket.display());
                None
            }
        }
    }
    /// The sockets go.
    pub fn close(&self) {
        let mut held = self.held();
        let (controls, whole) = (std::mem::take(&mut held.controls), held.whole.take());
        drop(held); // whoever is answered just now may want it
        drop((controls, whole));
    }
    fn held(&self) -> MutexGuard<'_, Held> {
        // Whole after every statement.
        self.held.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn carry_out(self: &Arc<Orders>, ask: VolumeAsk) -> anyhow::Result<Said> {
        // held over all of it but the sockets: one change at a time
        let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
        let (name, note) = match ask {
            VolumeAsk::List => {
                let report = self.handle.report_now();
                let of = |volume| volume_status(&report, volume);
                return Ok(Said { volumes: report.volumes.iter().map(of).collect(), note: None });
            }
            VolumeAsk::Create { name, dir, change } => {
                let note = self.create(&name, &dir, &change)?;
                (Some(name), note)
            }
            VolumeAsk::Set { name, change, force } => {
                let staged = self.stage(&Edit::Set { name: &name, change: &change })?;
                let order = Order::Change { name: name.clone(), change, force };
                self.order(order)?;
                (Some(name), commit(staged))
            }
            VolumeAsk::Rename { name, to } => {
                options::volume_name(&to).map_err(|e| Failure::new(Exit::Usage, e.to_string()))?;
                let report = self.handle.report_now();
                let dir = report.volumes.iter().find(|it| it.name == name).map(|it| it.dir.clone());
                let state = dir.and_then(|dir| self.held().states.get(&dir).cloned());
                let edit = Edit::Rename { name: &name, to: &to, state: state.as_deref() };
                let staged = self.stage(&edit)?;
                self.order(Order::Rename { name, to: to.clone() })?;
                (Some(to), commit(staged))
            }
            VolumeAsk::Remove { name, force } => {
                let note = self.remove(name, force)?;
                (None, note)
            }
        };
        let report = self.handle.report_now();
        let volumes = report.volumes.iter().filter(|volume| Some(&volume.name) == name.as_ref());
        Ok(Said { volumes: volumes.map(|it| volume_status(&report, it)).collect(), note })
    }
    fn create(
        self: &Arc<Orders>,
        name: &str,
        dir: &Path,
        change: &Change,
    ) -> anyhow::Result<Option<String>> {
        options::volume_name(name).map_err(|e| Failure::new(Exit::Usage, e.to_string()))?;
        let dir = super::real_dir(dir)?;
        let report = self.handle.report_now();
        if report.volumes.iter().any(|volume| volume.name == name) {
            let name = name.to_owned();
            return Err(refused(OrderError::Taken { name }));
        }
        let overlaps = |it: &&VolumeReport| it.dir.starts_with(&dir) || dir.starts_with(&it.dir);
        if let Some(other) = report.volumes.iter().find(overlaps) {
            let what = format!(
                "{}: the volume {} is served from {}; a directory is in one volume only",
                dir.display(),
                other.name,
                other.dir.display()
            );
            return Err(Failure::new(Exit::Refused, what).into());
        }
        let state = self.state.as_ref().map(|state| state.join(name));
        let settings = change.apply(&Default::default());
        let (quota, read_only) = (settings.quota, settings.read_only);
        let users = settings.users;
        let has_config = self.held().config.is_some();
        let config = VolumeConfig {
            name: name.to_owned(),
            dir: dir.clone(),
            quota,
            read_only,
            users,
            ..VolumeConfig::default()
        };
        let staged = self.stage(&Edit::Add(&config))?;
        let wanted = Change::to(config.quota, config.read_only, &config.users);
        let volume = super::open_volume(&dir, state.as_deref(), name, Some(&wanted))?;
        self.order(Order::Add(Box::new(volume)))?;
        self.open_one(&dir, state.as_deref());
        let by_hand = format!(
            "served until the server ends; to keep it, start the server with {name}={} as well, or \
             with --config",
            dir.display()
        );
        Ok(if has_config { commit(staged) } else { Some(by_hand) })
    }
    fn remove(&self, name: String, force: bool) -> anyhow::Result<Option<String>> {
        let staged = self.stage(&Edit::Remove(&name))?;
        let has_config = self.held().config.is_some();
        let Done::Removed(volume) = self.order(Order::Remove { name, force })? else {
            return Ok(None);
        };
        let dir = volume.path().to_owned();
        let closed = volume.close();
        let mut held = self.held();
        let control = held.controls.remove(&dir);
        held.states.remove(&dir);
        drop(held);
        drop(control);
        let note = commit(staged);
        if let Err(source) = closed {
            return Err(explain(ServerError::Volume { path: dir, source }));
        }
        let by_hand = format!(
            "its files are in {} as before; the next start of the server serves it again, unless it \
             is left out of the command line",
            dir.display()
        );
        Ok(if has_config { note } else { Some(by_hand) })
    }
    fn order(&self, order: Order) -> anyhow::Result<Done> {
        self.handle.order(order).map_err(refused)
    }
    fn stage(&self, edit: &Edit) -> anyhow::Result<Option<Staged>> {
        self.held().config.as_ref().map(|config| config.stage(edit)).transpose()
    }
}

/// Changes come one at a time, also those that come over different sockets.
static ONE: Mutex<()> = Mutex::new(());

/// What is left to do by hand when the file could not be put in its place.
fn commit(staged: Option<Staged>) -> Option<String> {
    let failed = staged.map(Staged::commit)?.err()?;
    Some(format!("done, but not kept for the next start: {failed:#}"))
}

fn refused(e: OrderError) -> anyhow::Error {
    let exit = match &e {
        OrderError::Unknown { .. } => Exit::NotFound,
        OrderError::TooManyUsers { .. } => Exit::Usage,
        OrderError::State(_) | OrderError::Late => Exit::Failure,
        _ => Exit::Refused,
    };
    let advice = match &e {
        OrderError::InUse { .. } => "; unmount it there, or say --force",
        OrderError::Owing { .. } => {
            "; wait for them, or say --force: then these changes wait at their clients"
        }
        OrderError::TooSmall { .. } => "; remove files first, or say --force",
        _ => "",
    };
    Failure::new(exit, format!("{e}{advice}")).into()
}

fn volume_status(report: &Report, volume: &VolumeReport) -> VolumeStatus {
    let (settings, figures) = (&volume.settings, &volume.figures);
    let here = report.clients.iter().filter(|client| client.volume == volume.no);
    let user = |(uid, bytes): (&u32, &u64)| UserQuota { uid: *uid, quota_bytes: *bytes };
    VolumeStatus {
        name: volume.name.clone(),
        dir: volume.dir.clone(),
        mode: if settings.read_only { "ro" } else { "rw" }.to_owned(),
        quota_bytes: settings.quota.bytes,
        quota_files: settings.quota.files,
        used_bytes: figures.used.map(|it| it.bytes),
        used_files: figures.used.map(|it| it.files),
        granted_bytes: figures.granted.map(|it| it.bytes),
        granted_files: figures.granted.map(|it| it.files),
        capacity_bytes: figures.capacity.map(|it| it.bytes),
        capacity_files: figures.capacity.map(|it| it.files),
        clients: here.count() as u64,
        pending_clients: volume.owing.len() as u64,
        users: settings.users.iter().map(user).collect(),
    }
}

fn client_status(client: &Client) -> ClientStatus {
    let age = Instant::now().saturating_duration_since(client.since).as_secs();
    let since = SystemTime::now().checked_sub(Duration::from_secs(age));
    let since = since.map(|it| humantime::format_rfc3339_seconds(it).to_string());
    let permit = match client.mode {
        Mode::Write => "write",
        Mode::Read => "read",
        Mode::None => "none",
    };
    ClientStatus {
        host: client.host.clone(),
        node: client.node,
        connected: true,
        since: since.unwrap_or_default(),
        since_seconds: age,
        pending_records: client.pending,
        permit: permit.to_owned(),
        permits_apart: client.apart as u64,
    }
}

fn away_status(owing: &Owing) -> ClientStatus {
    ClientStatus {
        host: owing.host.clone(),
        node: owing.node,
        pending_records: owing.records,
        permit: "none".to_owned(),
        ..ClientStatus::default()
    }
}

/// Answers on one control socket: a volume's, or the server's.
struct Told {
    orders: Arc<Orders>,
    dir: Option<PathBuf>,
}

impl Answer for Told {
    fn status(&self) -> Status {
        let report = self.orders.handle.report();
        let volume = report.volumes.iter().find(|volume| Some(&volume.dir) == self.dir.as_ref());
        let state = self.dir.as_ref().and_then(|dir| {
            // a change that is under way must not keep anybody waiting
            let held = self.orders.held.try_lock().ok()?;
            held.states.get(dir).cloned()
        });
        let own = || self.dir.as_ref().map(|dir| dir.join(".imz")).unwrap_or_default();
        let here = report.clients.iter().filter(|of| Some(of.volume) == volume.map(|it| it.no));
        let away = volume.into_iter().flat_map(|it| &it.owing).filter(|owing| !owing.connected);
        let clients = here.map(client_status).chain(away.map(away_status));
        let clients: Vec<ClientStatus> = clients.collect();
        let client_count = clients.len() as u64;
        Status {
            mount: self.dir.clone().unwrap_or_default(),
            server: self.orders.addr.clone(),
            volume: volume.map_or_else(String::new, |volume| volume.name.clone()),
            connected: true,
            since: self.orders.since.clone(),
            since_seconds: clock::age_of(self.orders.began).as_secs(),
            cache: state.unwrap_or_else(own),
            conflicts: volume.map_or(0, |volume| volume.conflicts),
            journal_bytes: volume.map_or(0, |volume| volume.history_len),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            last_error: volume.and_then(|volume| volume.last_error.clone()),
            clients: Some(clients.into_iter().take(CLIENTS_MAX).collect()),
            client_count,
            ..room_of(volume, &report.clients)
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
        self.orders.handle.stop();
    }
    fn conflicts(&self, ask: Ask) -> Result<serde_json::Value, String> {
        let report = self.orders.handle.report_now();
        let volume = report.volumes.iter().find(|volume| Some(&volume.dir) == self.dir.as_ref());
        match volume {
            Some(volume) => self.orders.handle.conflicts(&volume.name, ask),
            None => Err("say the directory of a volume".to_owned()),
        }
    }
    fn volumes(&self, ask: VolumeAsk) -> Result<Said, Refusal> {
        self.orders
            .carry_out(ask)
            .map_err(|e| Refusal { error: format!("{e:#}"), exit: Some(exit_code(&e)) })
    }
}

/// How the volume's room is shared out.
fn room_of(volume: Option<&VolumeReport>, clients: &[Client]) -> Status {
    let Some((volume, room)) = volume.and_then(|it| Some((it, it.room.as_ref()?))) else {
        return Status::default();
    };
    let host = |node: u32| {
        let is_it = |client: &&Client| client.volume == volume.no && client.node == node;
        clients.iter().find(is_it).map_or_else(String::new, |client| client.host.clone())
    };
    let grant = |held: &Holding| SpaceGrant {
        node: held.node,
        host: host(held.node),
        away: held.away,
        bytes: held.outstanding.bytes(),
        files: held.outstanding.files(),
    };
    Status {
        space_available_bytes: room.available.bytes(),
        space_available_files: room.available.files(),
        space_granted_bytes: room.granted.bytes(),
        space_granted_files: room.granted.files(),
        space_quota_bytes: room.quota.map(Room::bytes),
        space_quota_files: room.quota.map(Room::files),
        space_volume_bytes: room.used.bytes(),
        space_volume_files: room.used.files(),
        space_grants: room.holdings.iter().map(grant).collect(),
        ..Status::default()
    }
}
