//! `imz status`: how mounts and servers of this user are doing.
//!
//! The order: mounts as they were mounted, then what answers without being a mount (servers).

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use indicatif::HumanBytes;
use serde_json::{Value, json};

use super::{Exit, fail, place, print};
use crate::cli::StatusArgs;
use crate::net::control::volumes::ClientStatus;
use crate::net::control::{self, ControlError, Status};
use crate::sys;

/// What one process said, or why it said nothing.
struct Report {
    mount: PathBuf,
    said: Result<Status, ControlError>,
}

/// # Errors
/// No such mount, or a process that does not answer.
pub fn run(args: &StatusArgs) -> anyhow::Result<()> {
    let Some(path) = &args.mountpoint else {
        return run_all(args.json);
    };
    let place = place::find(path)?;
    let status = control::status(&place.socket)
        .map_err(place::unanswered)
        .with_context(|| place.path.display().to_string())?;
    let text = match args.json {
        true => pretty(&serde_json::to_value(&status)?)?,
        false => render(&status),
    };
    Ok(print(&text)?)
}

fn run_all(json: bool) -> anyhow::Result<()> {
    let reports = gather()?;
    let silent_count = reports.iter().filter(|it| it.said.is_err()).count();
    let text = match json {
        true => pretty(&Value::Array(reports.iter().map(as_json).collect::<Result<_, _>>()?))?,
        false if reports.is_empty() => "nothing of this user is mounted or served\n".to_owned(),
        false => reports.iter().map(as_text).collect::<Vec<_>>().join("\n"),
    };
    print(&text)?;
    match silent_count {
        0 => Ok(()),
        n => fail(Exit::Failure, format!("{n} of {} do not answer", reports.len())),
    }
}

fn gather() -> anyhow::Result<Vec<Report>> {
    let mounts = sys::mount::ours().context("/proc/self/mountinfo")?;
    let mut sockets = control::sockets();
    let mut reports = Vec::new();
    for mount in mounts {
        let socket = control::socket_path(&mount);
        // two mounts on one mount point have one socket
        if let Some(at) = sockets.iter().position(|it| *it == socket) {
            sockets.remove(at);
        } else if reports.iter().any(|it: &Report| it.mount == mount) {
            continue;
        }
        reports.push(Report { said: control::status(&socket), mount });
    }
    for socket in sockets {
        match control::status(&socket) {
            // what a killed server leaves behind, or an ended one left just now
            Err(ControlError::Dead | ControlError::Absent) => {}
            said => {
                let mount = said.as_ref().map_or_else(|_| socket, |it| it.mount.clone());
                reports.push(Report { mount, said });
            }
        }
    }
    Ok(reports)
}

fn as_json(report: &Report) -> Result<Value, serde_json::Error> {
    match &report.said {
        Ok(status) => serde_json::to_value(status),
        Err(e) => Ok(json!({ "mount": path_text(&report.mount), "error": e.to_string() })),
    }
}

fn as_text(report: &Report) -> String {
    match &report.said {
        Ok(status) => render(status),
        Err(e) => format!("{}\n  error       {e}\n", path_text(&report.mount)),
    }
}

fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn pretty(value: &Value) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// What a server says of one of its volumes, and of who has it mounted.
fn render_served(status: &Status, clients: &[ClientStatus]) -> String {
    let mut text = path_text(&status.mount) + "\n";
    let mut line = |key: &str, value: String| {
        let _ = writeln!(text, "  {key:<10}  {value}"); // a String takes everything
    };
    line("serves", format!("{} on {}", status.volume, status.server));
    line("since", format!("{} ({})", status.since, seconds(status.since_seconds)));
    let journal = HumanBytes(status.journal_bytes);
    line("journal", format!("{journal}, in {}", path_text(&status.cache)));
    line("conflicts", conflicts(status.conflicts));
    let count = clients.len() as u64;
    if count == 0 {
        line("clients", "none".to_owned());
    }
    let keys = std::iter::once("clients").chain(std::iter::repeat(""));
    for (client, key) in clients.iter().zip(keys) {
        line(key, client_text(client));
    }
    if status.client_count > count {
        line("", format!("and {} more", status.client_count - count));
    }
    line("process", format!("{}, imz {}", status.pid, status.version));
    if let Some(error) = &status.last_error {
        line("last error", error.clone());
    }
    text
}

fn client_text(client: &ClientStatus) -> String {
    let ClientStatus { host, node, since, .. } = client;
    let pending = match client.pending_records {
        0 if client.connected => "nothing pending".to_owned(),
        0 => "may have changes".to_owned(),
        n => format!("up to {n} records pending"),
    };
    if !client.connected {
        return format!("{host} (node {node}), away, {pending}");
    }
    let may = match &client.permit[..] {
        "write" => "may change all",
        "read" => "may read all",
        _ => "asks",
    };
    let but = match client.permits_apart {
        0 => String::new(),
        n => format!(", but for {n} objects"),
    };
    let age = seconds(client.since_seconds);
    format!("{host} (node {node}), since {since} ({age}), {pending}, {may}{but}")
}

fn conflicts(count: u64) -> String {
    match count {
        0 => "none".to_owned(),
        1 => "1 version kept; imz conflicts list shows it".to_owned(),
        n => format!("{n} versions kept; imz conflicts list shows them"),
    }
}

/// A status for people: the mount, then one aligned line a subject.
fn render(status: &Status) -> String {
    if let Some(clients) = &status.clients {
        return render_served(status, clients);
    }
    let mut text = path_text(&status.mount) + "\n";
    let mut line = |key: &str, value: String| {
        let _ = writeln!(text, "  {key:<10}  {value}"); // a String takes everything
    };
    let state = match status.connected {
        true => "connected",
        false => "AWAY",
    };
    line("volume", format!("{} of {}", status.volume, status.server));
    line("server", format!("{state} since {} ({})", status.since, seconds(status.since_seconds)));
    line("pending", pending(status));
    let (clean, dirty) =
        (HumanBytes(status.cache_clean_bytes), HumanBytes(status.cache_dirty_bytes));
    line("cache", format!("{clean} clean, {dirty} dirty, in {}", path_text(&status.cache)));
    if let Some(limit) = limit(status) {
        line("limit", limit);
    }
    if status.pins > 0 {
        let missing = match status.pinned_missing_files {
            0 => "all here".to_owned(),
            n => format!("{n} files not all here"),
        };
        let (pins, objects) = (status.pins, status.pinned_objects);
        let bytes = HumanBytes(status.pinned_bytes);
        line("pinned", format!("{pins} paths, {objects} objects, {bytes}, {missing}"));
    }
    line("journal", HumanBytes(status.journal_bytes).to_string());
    line("conflicts", conflicts(status.conflicts));
    if status.saved_records > 0 {
        let (count, bytes) = (status.saved_records, HumanBytes(status.saved_bytes));
        line("saved", format!("{count} records and {bytes} not shipped since the start"));
    }
    let may = match &status.permit[..] {
        "write" => "the whole volume may be changed without asking",
        "read" => "the whole volume may be read without asking",
        _ => "asked for object by object",
    };
    let but = match status.permits_apart {
        0 => String::new(),
        n => format!(", but for {n} objects"),
    };
    if status.connected {
        line("permit", format!("{may}{but}"));
    }
    if let Some(room) = room(status) {
        line("space", room);
    }
    for grant in &status.space_grants {
        let host = if grant.away { "away" } else { &grant.host };
        let files = grant.files;
        line(
            "granted",
            format!("{}, {files} files: node {} ({host})", HumanBytes(grant.bytes), grant.node),
        );
    }
    if status.requests_foreground > 0 {
        line("requests", format!("{} that an operation waited for", status.requests_foreground));
    }
    let passthrough = if status.passthrough { ", passthrough" } else { "" };
    line("process", format!("{}, imz {}{passthrough}", status.pid, status.version));
    if let Some(warning) = &status.warning {
        line("warning", warning.clone());
    }
    if let Some(error) = &status.last_error {
        line("last error", error.clone());
    }
    text
}

fn limit(status: &Status) -> Option<String> {
    let (max, dirty) = (status.cache_max_bytes, status.cache_dirty_bytes);
    let held = status.cache_clean_bytes + dirty;
    let state = match max {
        0 => return None,
        _ if dirty > max => "EXCEEDED by what the server does not have yet",
        _ if held > max => "exceeded; what is open, pinned or away from its server stays",
        _ => "kept",
    };
    Some(format!("{}, {state}; {} evicted", HumanBytes(max), HumanBytes(status.evicted_bytes)))
}

/// What a mount may still write, or a server still grant.
fn room(status: &Status) -> Option<String> {
    let (granted, used) = (status.space_granted_bytes, status.space_used_bytes);
    match &status.space_regime[..] {
        "" if status.space_available_bytes == 0 && granted == 0 => None,
        "" => {
            let (left, files) = (status.space_available_bytes, status.space_available_files);
            let left = format!("{} and {files} files left to grant", HumanBytes(left));
            let quota = status.space_quota_bytes.map(HumanBytes);
            let quota = quota.map_or(String::new(), |quota| format!("; quota {quota}"));
            Some(format!("{left}, {} granted{quota}", HumanBytes(granted)))
        }
        "off" => Some("nothing is reserved at the server".to_owned()),
        regime => {
            Some(format!("{} granted, {} in use, {regime}", HumanBytes(granted), HumanBytes(used)))
        }
    }
}

fn pending(status: &Status) -> String {
    if status.pending_records == 0 {
        return "nothing".to_owned();
    }
    let records = if status.pending_records == 1 { "record" } else { "records" };
    format!(
        "{} {records}, {}, the oldest {}; {}/s",
        status.pending_records,
        HumanBytes(status.pending_bytes),
        seconds(status.oldest_pending_seconds),
        HumanBytes(status.rate_bytes_per_second),
    )
}

fn seconds(count: u64) -> String {
    humantime::format_duration(Duration::from_secs(count)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Status {
        Status {
            mount: "/mnt/x".into(),
            server: "h:7070".to_owned(),
            volume: "v".to_owned(),
            connected: true,
            since: "2026-11-21T10:00:00Z".to_owned(),
            since_seconds: 3723,
            pending_records: 2,
            pending_bytes: 3 << 20,
            oldest_pending_seconds: 61,
            rate_bytes_per_second: 1024,
            cache: "/var/lib/imz/x".into(),
            cache_clean_bytes: 5,
            pid: 7,
            version: "0.1.0".to_owned(),
            passthrough: true,
            space_regime: "exact".to_owned(),
            space_granted_bytes: 2 << 20,
            space_used_bytes: 1 << 20,
            ..Status::default()
        }
    }

    #[test]
    fn people_read_aligned_lines() {
        let want = "\
/mnt/x
  volume      v of h:7070
  server      connected since 2026-11-21T10:00:00Z (1h 2m 3s)
  pending     2 records, 3.00 MiB, the oldest 1m 1s; 1.00 KiB/s
  cache       5 B clean, 0 B dirty, in /var/lib/imz/x
  journal     0 B
  conflicts   none
  permit      asked for object by object
  space       2.00 MiB granted, 1.00 MiB in use, exact
  process     7, imz 0.1.0, passthrough
";
        assert_eq!(render(&sample()), want);
        let away = Status {
            connected: false,
            since: "?".to_owned(),
            pending_records: 0,
            requests_foreground: 4,
            conflicts: 1,
            saved_records: 7,
            saved_bytes: 2048,
            last_error: Some("connection refused".to_owned()),
            ..sample()
        };
        let text = render(&away);
        for part in [
            "server      AWAY since ? (1h 2m 3s)\n",
            "pending     nothing\n",
            "requests    4 that an operation waited for",
            "conflicts   1 version kept; imz conflicts",
            "saved       7 records and 2.00 KiB not shipped since the start\n",
            "last error  connection refused\n",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn a_limit_says_whether_it_is_kept() {
        assert_eq!(limit(&sample()), None);
        let with = |clean, dirty| Status {
            cache_max_bytes: 100,
            cache_clean_bytes: clean,
            cache_dirty_bytes: dirty,
            ..sample()
        };
        for (clean, dirty, want) in
            [(60, 40, "100 B, kept; 0 B evicted"), (61, 40, "exceeded; "), (0, 101, "EXCEEDED by")]
        {
            let said = limit(&with(clean, dirty)).unwrap();
            assert!(said.contains(want), "{clean} {dirty}: {said}");
        }
        let pinned = Status { pins: 2, pinned_objects: 7, pinned_missing_files: 1, ..sample() };
        let said = render(&pinned);
        assert!(said.contains("pinned      2 paths, 7 objects, 0 B, 1 files not all"), "{said}");
    }

    #[test]
    fn a_server_names_its_clients() {
        let client = |node, connected, pending_records, permit: &str| ClientStatus {
            host: "laptop".into(),
            node,
            connected,
            since: "2026-11-21T11:02:00Z".into(),
            since_seconds: 3,
            pending_records,
            permit: permit.into(),
            permits_apart: u64::from(node == 2),
        };
        let clients = vec![
            client(1, true, 0, "write"),
            client(2, true, 3, "none"),
            client(3, false, 9, "none"),
            client(4, false, 0, "none"),
        ];
        let served = Status { clients: Some(clients), client_count: 6, ..sample() };
        let want = "\
/mnt/x
  serves      v on h:7070
  since       2026-11-21T10:00:00Z (1h 2m 3s)
  journal     0 B, in /var/lib/imz/x
  conflicts   none
  clients     laptop (node 1), since 2026-11-21T11:02:00Z (3s), nothing pending, may change all
              laptop (node 2), since 2026-11-21T11:02:00Z (3s), up to 3 records pending, asks, but for 1 objects
              laptop (node 3), away, up to 9 records pending
              laptop (node 4), away, may have changes
              and 2 more
  process     7, imz 0.1.0
";
        assert_eq!(render(&served), want);
        let empty = Status { clients: Some(Vec::new()), ..sample() };
        assert!(render(&empty).contains("  clients     none\n"));
    }

    #[test]
    fn scripts_read_the_promised_keys() {
        let value = serde_json::to_value(sample()).unwrap();
        for key in [
            "mount",
            "server",
            "volume",
            "connected",
            "pending_records",
            "pending_bytes",
            "oldest_pending_seconds",
            "cache_clean_bytes",
            "cache_dirty_bytes",
            "conflicts",
        ] {
            assert!(value.get(key).is_some(), "{key}");
        }
        let silent = Report { mount: "/mnt/y".into(), said: Err(ControlError::Dead) };
        let value = as_json(&silent).unwrap();
        assert_eq!(value["mount"], "/mnt/y");
        assert!(value["error"].is_string());
    }
}
