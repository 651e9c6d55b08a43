//! `imz status`: how mounts and servers of this user are doing.
//!
//! The order: mounts as they were mounted, then what answers without being a mount (servers).

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use indicatif::HumanBytes;
use serde_json::{Value, json};

use super::{Exit, fail, place, print};
use crate::cli::StatusArgs;
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
        false => render(&status, SystemTime::now()),
    };
    Ok(print(&text)?)
}

fn run_all(json: bool) -> anyhow::Result<()> {
    let reports = gather()?;
    let silent_count = reports.iter().filter(|it| it.said.is_err()).count();
    let text = match json {
        true => pretty(&Value::Array(reports.iter().map(as_json).collect::<Result<_, _>>()?))?,
        false if reports.is_empty() => "nothing of this user is mounted or served\n".to_owned(),
        false => {
            let now = SystemTime::now();
            reports.iter().map(|it| as_text(it, now)).collect::<Vec<_>>().join("\n")
        }
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

fn as_text(report: &Report, now: SystemTime) -> String {
    match &report.said {
        Ok(status) => render(status, now),
        Err(e) => format!("{}\n  error       {e}\n", path_text(&report.mount)),
    }
}

fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn pretty(value: &Value) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// A status for people: the mount, then one aligned line a subject.
fn render(status: &Status, now: SystemTime) -> String {
    let mut text = path_text(&status.mount) + "\n";
    let mut line = |key: &str, value: String| {
        let _ = writeln!(text, "  {key:<10}  {value}"); // a String takes everything
    };
    let state = match status.connected {
        true => "connected",
        false => "AWAY",
    };
    line("volume", format!("{} of {}", status.volume, status.server));
    line("server", format!("{state} since {}{}", status.since, ago(&status.since, now)));
    line("pending", pending(status));
    let (clean, dirty) =
        (HumanBytes(status.cache_clean_bytes), HumanBytes(status.cache_dirty_bytes));
    line("cache", format!("{clean} clean, {dirty} dirty, in {}", path_text(&status.cache)));
    line("journal", HumanBytes(status.journal_bytes).to_string());
    match status.conflicts {
        0 => line("conflicts", "none".to_owned()),
        1 => line("conflicts", "1 version kept; imz conflicts list shows it".to_owned()),
        n => line("conflicts", format!("{n} versions kept; imz conflicts list shows them")),
    }
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
    if status.requests_foreground > 0 {
        line("requests", format!("{} that an operation waited for", status.requests_foreground));
    }
    let passthrough = if status.passthrough { ", passthrough" } else { "" };
    line("process", format!("{}, imz {}{passthrough}", status.pid, status.version));
    if let Some(error) = &status.last_error {
        line("last error", error.clone());
    }
    text
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
        humantime::format_duration(Duration::from_secs(status.oldest_pending_seconds)),
        HumanBytes(status.rate_bytes_per_second),
    )
}

/// ` (3m 5s)`, or nothing for a time that is none.
fn ago(since: &str, now: SystemTime) -> String {
    let age = humantime::parse_rfc3339_weak(since).ok().and_then(|it| now.duration_since(it).ok());
    match age {
        Some(age) => {
            let whole = Duration::from_secs(age.as_secs());
            format!(" ({})", humantime::format_duration(whole))
        }
        None => String::new(),
    }
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
            pending_records: 2,
            pending_bytes: 3 << 20,
            oldest_pending_seconds: 61,
            rate_bytes_per_second: 1024,
            cache: "/var/lib/imz/x".into(),
            cache_clean_bytes: 5,
            pid: 7,
            version: "0.1.0".to_owned(),
            passthrough: true,
            ..Status::default()
        }
    }

    #[test]
    fn people_read_aligned_lines() {
        let now = humantime::parse_rfc3339("2026-11-21T11:02:03Z").unwrap();
        let want = "\
/mnt/x
  volume      v of h:7070
  server      connected since 2026-11-21T10:00:00Z (1h 2m 3s)
  pending     2 records, 3.00 MiB, the oldest 1m 1s; 1.00 KiB/s
  cache       5 B clean, 0 B dirty, in /var/lib/imz/x
  journal     0 B
  conflicts   none
  permit      asked for object by object
  process     7, imz 0.1.0, passthrough
";
        assert_eq!(render(&sample(), now), want);
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
        let text = render(&away, now);
        for part in [
            "server      AWAY since ?\n",
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
