//! `imz volume`: the volumes of a running server, asked for and changed over its control socket.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use indicatif::HumanBytes;

use super::{Exit, Failure, fail, place, print};
use crate::cli::options::{Bound, UserBound};
use crate::cli::volume::{LimitArgs, VolumeArgs, VolumeCommand, VolumeListArgs, VolumeMode};
use crate::net::control::volumes::{Said, VolumeAsk, VolumeStatus, servers, volumes};
use crate::net::control::{ControlError, socket_path};
use crate::replica::settings::{Change, Limit};

/// # Errors
/// There is no server, or it refuses, with the exit code that says why.
pub fn run(args: &VolumeArgs) -> anyhow::Result<()> {
    let ask = match &args.command {
        VolumeCommand::List(_) => VolumeAsk::List,
        VolumeCommand::Create(it) => {
            let dir = std::path::absolute(&it.dir).context("the working directory")?;
            if dir.to_str().is_none() {
                let what = "its path is not UTF-8; serve it on the command line of imz serve";
                return fail(Exit::Usage, format!("{}: {what}", dir.display()));
            }
            let change = Change { read_only: Some(it.read_only), ..change(&it.limits) };
            VolumeAsk::Create { name: it.name.clone(), dir, change }
        }
        VolumeCommand::Set(it) => {
            let read_only = it.mode.map(|mode| mode == VolumeMode::Ro);
            let change = Change { read_only, ..change(&it.limits) };
            if change == Change::default() {
                let what = "nothing to change: say --quota, --quota-files, --user-quota or --mode";
                return fail(Exit::Usage, what);
            }
            VolumeAsk::Set { name: it.name.clone(), change, force: it.force }
        }
        VolumeCommand::Rename(it) => VolumeAsk::Rename { name: it.name.clone(), to: it.to.clone() },
        VolumeCommand::Remove(it) => VolumeAsk::Remove { name: it.name.clone(), force: it.force },
    };
    let socket = find(args.server.as_deref())?;
    let Said { volumes, note } = volumes(&socket, ask).map_err(refused)?;
    if let VolumeCommand::List(list) = &args.command {
        return Ok(print(&render(&volumes, list)?)?);
    }
    if let Some(note) = note {
        eprintln!("imz: {note}");
    }
    Ok(())
}

/// The exit code is what the server says.
fn refused(error: ControlError) -> anyhow::Error {
    match error {
        ControlError::Refused { error, exit: Some(exit) } => {
            Failure::new(Exit::from_code(exit), error).into()
        }
        error => place::unanswered(error),
    }
}

fn change(limits: &LimitArgs) -> Change {
    let limit = |bound: Bound| bound.0.map_or(Limit::Unlimited, Limit::At);
    let of = |bound: Option<Bound>| bound.map_or(Limit::Keep, limit);
    let user = |UserBound { uid, bound }: &UserBound| (*uid, limit(*bound));
    let users = limits.user_quota.iter().map(user).collect();
    Change { bytes: of(limits.quota), files: of(limits.quota_files), read_only: None, users }
}

/// The control socket of the server that is meant: the only one, if none is named.
fn find(server: Option<&Path>) -> anyhow::Result<PathBuf> {
    let Some(server) = server else {
        let mut all = servers();
        return match (all.pop(), &all[..]) {
            (None, _) => fail(Exit::NotFound, "no imz serve of this user runs here"),
            (Some((_, socket)), []) => Ok(socket),
            (Some((last, _)), others) => {
                let pids = others.iter().map(|(pid, _)| pid.to_string());
                let pids: Vec<String> = pids.chain([last.to_string()]).collect();
                let what =
                    format!("several servers run here: {}; say --server PID", pids.join(", "));
                fail(Exit::Usage, what)
            }
        };
    };
    if let Some(pid) = server.to_str().and_then(|text| text.parse::<u32>().ok()) {
        let found = servers().into_iter().find(|(of, _)| *of == pid);
        let missing =
            || Failure::new(Exit::NotFound, format!("{pid} is no imz serve of this user"));
        return Ok(found.ok_or_else(missing)?.1);
    }
    if std::fs::metadata(server).is_ok_and(|it| it.file_type().is_socket()) {
        return Ok(server.to_owned());
    }
    let real = server.canonicalize().with_context(|| server.display().to_string())?;
    let socket = socket_path(&real);
    match socket.exists() {
        true => Ok(socket),
        false => fail(Exit::NotFound, format!("{}: no imz serve serves it", server.display())),
    }
}

fn render(volumes: &[VolumeStatus], args: &VolumeListArgs) -> anyhow::Result<String> {
    if args.json {
        return Ok(serde_json::to_string_pretty(volumes)? + "\n");
    }
    if volumes.is_empty() {
        return Ok("no volume is served\n".to_owned());
    }
    let head =
        ["NAME", "MODE", "USED", "GRANTED", "CAPACITY", "QUOTA", "CLIENTS", "PENDING", "DIR"];
    let mut rows = vec![head.map(str::to_owned)];
    rows.extend(volumes.iter().map(row));
    let widths: Vec<usize> = (0..head.len())
        .map(|at| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0))
        .collect();
    let line = |row: &[String; 9]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    let mut text: String = rows.iter().map(line).collect();
    for volume in volumes.iter().filter(|_| args.users) {
        for user in &volume.users {
            let size = HumanBytes(user.quota_bytes);
            text.push_str(&format!("{}: user {} may have {size}\n", volume.name, user.uid));
        }
    }
    Ok(text)
}

fn row(volume: &VolumeStatus) -> [String; 9] {
    let amount = |bytes: Option<u64>, files: Option<u64>| match (bytes, files) {
        (None, None) => "-".to_owned(),
        (Some(bytes), None) => HumanBytes(bytes).to_string(),
        (None, Some(files)) => format!("{files} files"),
        (Some(bytes), Some(files)) => format!("{}, {files} files", HumanBytes(bytes)),
    };
    [
        volume.name.clone(),
        volume.mode.clone(),
        amount(volume.used_bytes, volume.used_files),
        amount(volume.granted_bytes, volume.granted_files),
        amount(volume.capacity_bytes, volume.capacity_files),
        amount(volume.quota_bytes, volume.quota_files),
        volume.clients.to_string(),
        volume.pending_clients.to_string(),
        volume.dir.display().to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_that_are_not_known_are_a_dash() {
        let volume = |name: &str, used| VolumeStatus {
            name: name.into(),
            dir: "/srv/x".into(),
            mode: "rw".into(),
            quota_bytes: Some(200 << 20),
            quota_files: Some(7),
            used_bytes: used,
            clients: 2,
            pending_clients: 1,
            users: vec![crate::net::control::volumes::UserQuota { uid: 5, quota_bytes: 1024 }],
            ..VolumeStatus::default()
        };
        let list = VolumeListArgs { users: true, json: false };
        let text = render(&[volume("photos", None), volume("v", Some(3))], &list).unwrap();
        let want = "\
NAME    MODE  USED  GRANTED  CAPACITY  QUOTA                CLIENTS  PENDING  DIR
photos  rw    -     -        -         200.00 MiB, 7 files  2        1        /srv/x
v       rw    3 B   -        -         200.00 MiB, 7 files  2        1        /srv/x
photos: user 5 may have 1.00 KiB
v: user 5 may have 1.00 KiB
";
        assert_eq!(text, want);
        let json = render(&[volume("v", None)], &VolumeListArgs { users: false, json: true });
        let json: serde_json::Value = serde_json::from_str(&json.unwrap()).unwrap();
        assert!(json[0]["used_bytes"].is_null() && json[0]["granted_files"].is_null());
        assert_eq!(json[0]["quota_files"], 7);
    }
}
