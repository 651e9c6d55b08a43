//! Errors of a server in words for people: what happened, what to do, which exit code.

use std::path::Path;

use super::{Exit, Failure};
use crate::kml::log::LogError;
use crate::net::server::ServerError;
use crate::replica::state::StateError;
use crate::replica::tree::TreeError;
use crate::replica::volume::VolumeError;
use crate::sys::mount;

/// What people can do about it, and the exit code.
pub fn explain(error: ServerError) -> anyhow::Error {
    let (exit, what) = match &error {
        ServerError::Listen { addr, source } if source.kind() == std::io::ErrorKind::AddrInUse => {
            let what = format!("{addr}: another process listens there; choose with --listen");
            (Exit::Refused, what)
        }
        ServerError::Volume { path, source } => match volume_exit(path, source) {
            Some(explained) => explained,
            None => return error.into(),
        },
        _ => return error.into(),
    };
    Failure::new(exit, what).into()
}

fn volume_exit(path: &Path, error: &VolumeError) -> Option<(Exit, String)> {
    let dir = path.display();
    Some(match error {
        VolumeError::Missing { .. } => (Exit::NotFound, format!("{dir}: no such directory")),
        VolumeError::State(StateError::InUse { .. })
        | VolumeError::Log(LogError::Locked { .. }) => {
            (Exit::Refused, format!("{dir}: another imz serves it"))
        }
        VolumeError::Tree(TreeError::NoXattrs { source, key, .. }) => {
            let fs = mount::type_of(path).unwrap_or_else(|| "unknown".to_owned());
            let what = "cannot carry the extended attribute";
            (Exit::NoRoom, format!("{dir}: its file system ({fs}) {what} {key}: {source}"))
        }
        VolumeError::NoRoom => (Exit::NoRoom, format!("{dir}: its file system is full")),
        VolumeError::Log(e @ LogError::Corrupt { .. }) => (Exit::Damaged, format!("{dir}: {e}")),
        VolumeError::State(e @ StateError::Damaged { .. }) => {
            (Exit::Damaged, format!("{dir}: {e}"))
        }
        _ => return None,
    })
}
