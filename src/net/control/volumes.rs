//! What a server is asked, and says, about its volumes and their clients over the control socket.
//!
//!   {"ask":"volume","do":"list"}     [`Said`]: every volume
//!   {"ask":"volume","do":"create"}   and set, rename, remove: [`Said`] with the volume, and a note
//!
//! Sizes are bytes. Figures that are not known are null.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{ControlError, Request, ask_within, lossy, socket_dir};
use crate::replica::settings::Change;
use crate::sys::local;

/// Longest wait for an answer: a volume is opened, or clients hand in what they changed.
const ORDER_TIME_MAX: Duration = Duration::from_secs(60);
/// Most clients that one status names.
pub const CLIENTS_MAX: usize = 64;
/// Of a server's own socket; the name of no directory becomes one that begins so.
const SERVER_PREFIX: &str = "%s";

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
pub enum VolumeAsk {
    List,
    Create { name: String, dir: PathBuf, change: Change },
    Set { name: String, change: Change, force: bool },
    Rename { name: String, to: String },
    Remove { name: String, force: bool },
}

/// A volume as its server has it.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct VolumeStatus {
    pub name: String,
    #[serde(serialize_with = "lossy")]
    pub dir: PathBuf,
    /// `rw` or `ro`
    pub mode: String,
    pub quota_bytes: Option<u64>,
    pub quota_files: Option<u64>,
    pub used_bytes: Option<u64>,
    pub used_files: Option<u64>,
    pub granted_bytes: Option<u64>,
    pub granted_files: Option<u64>,
    pub capacity_bytes: Option<u64>,
    pub capacity_files: Option<u64>,
    /// connected
    pub clients: u64,
    /// those, here or away, that are known to have changes which are not here
    pub pending_clients: u64,
    /// users with a limit of their own
    pub users: Vec<UserQuota>,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct UserQuota {
    pub uid: u32,
    pub quota_bytes: u64,
}

/// A client as its server has it.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ClientStatus {
    pub host: String,
    pub node: u32,
    pub connected: bool,
    /// since when it is connected, RFC 3339 in UTC, and how long; empty while it is away
    pub since: String,
    pub since_seconds: u64,
    /// records that it is known to have, and that are not here; at most. Of one that is away 0 says
    /// that it may have some
    pub pending_records: u64,
    /// what it may do with the volume without asking: write, read or none
    pub permit: String,
    /// objects with which it may do more or less
    pub permits_apart: u64,
}

/// The answer to every [`VolumeAsk`].
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Said {
    pub volumes: Vec<VolumeStatus>,
    /// what is left to be done by hand
    pub note: Option<String>,
}

/// The socket of a server as a whole; its volumes have theirs besides.
pub fn server_socket(pid: u32) -> PathBuf {
    socket_dir().join(format!("{SERVER_PREFIX}{pid}.sock"))
}

pub(super) fn is_server(socket: &Path) -> bool {
    socket.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"%s"))
}

/// The servers of this user that answer, and their process ids. Sockets that dead ones left are
/// taken away.
pub fn servers() -> Vec<(u32, PathBuf)> {
    let alive = |socket: PathBuf| {
        let name = socket.file_stem()?.to_str()?;
        let pid = name.strip_prefix(SERVER_PREFIX)?.parse().ok()?;
        match local::connect(&socket) {
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
                let _ = std::fs::remove_file(&socket); // another one may have been faster
                None
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            _ => Some((pid, socket)),
        }
    };
    super::all_sockets().into_iter().filter(|it| is_server(it)).filter_map(alive).collect()
}

/// Has a server do something with its volumes, or say how they are.
///
/// # Errors
/// [`ControlError`]; `Refused` says why nothing has changed.
pub fn volumes(socket: &Path, ask: VolumeAsk) -> Result<Said, ControlError> {
    let said = ask_within(socket, Request::Volume(ask), ORDER_TIME_MAX)?;
    serde_json::from_value(said).map_err(|_| ControlError::Garbled)
}
