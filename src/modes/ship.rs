//! Waits until all that was done in a mount is at the server, and shows how it goes.
//!
//! Asks the control socket alone, so it can be interrupted at any time and changes nothing but that
//! the journal stops ageing.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use super::place::unanswered;
use super::{Exit, fail};
use crate::net::control::{self, ControlError, Status};

/// How often the acknowledged seq is asked for.
const ASK_EVERY: Duration = Duration::from_millis(50);
/// How often the whole status is asked for.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How often in a row the process may fail to answer: a machine out of breath is no dead daemon.
const SILENT_COUNT_MAX: u32 = 3;

/// Asks the process behind `socket` to ship now, and waits until the server has acknowledged all.
///
/// # Errors
/// The server is away (exit code 3), `timeout` is over, or the process does not answer.
pub fn wait(socket: &Path, timeout: Option<Duration>) -> anyhow::Result<()> {
    let began = Instant::now();
    let goal = patient(|| control::ship(socket))?;
    let first = patient(|| control::acked(socket))?;
    let mut status = patient(|| control::status(socket))?;
    let mut looked = Instant::now();
    let bar = bar(goal.saturating_sub(first))?;
    loop {
        let acked = patient(|| control::acked(socket))?;
        if acked >= goal {
            bar.finish_and_clear();
            return Ok(());
        }
        bar.set_position(acked.saturating_sub(first));
        if looked.elapsed() >= LOOK_EVERY {
            status = patient(|| control::status(socket))?;
            looked = Instant::now();
        }
        bar.set_message(message(&status));
        if let Some(why) = verdict(&status, began.elapsed(), timeout) {
            bar.abandon();
            return fail(why, explain(&status, goal - acked));
        }
        std::thread::sleep(ASK_EVERY);
    }
}

/// Whether to give up, and with which exit code.
fn verdict(status: &Status, waited: Duration, timeout: Option<Duration>) -> Option<Exit> {
    match (status.connected, timeout) {
        (true, Some(most)) if waited >= most => Some(Exit::Failure),
        (false, Some(most)) if waited >= most => Some(Exit::Unreachable),
        (false, None) if status.away => Some(Exit::Unreachable),
        _ => None,
    }
}

fn explain(status: &Status, records: u64) -> String {
    let left = format!("{records} records ({})", HumanBytes(status.pending_bytes));
    if status.connected {
        return format!("the time is over and {left} are still to be shipped; shipping goes on");
    }
    let why = status.last_error.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
    format!(
        "{} is away since {}{why}; {left} wait in {} and are shipped when it is back",
        status.server,
        status.since,
        status.cache.display()
    )
}

fn message(status: &Status) -> String {
    match status.connected {
        true => format!(
            "{} left, {}/s",
            HumanBytes(status.pending_bytes),
            HumanBytes(status.rate_bytes_per_second)
        ),
        false => format!("{} is away", status.server),
    }
}

/// Shown on a terminal only.
fn bar(records: u64) -> anyhow::Result<ProgressBar> {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} records, {msg}")
        .context("the progress bar")?;
    Ok(ProgressBar::new(records).with_style(style.progress_chars("=> ")))
}

/// Asks again when the process is late with its answer, but not for ever.
fn patient<T>(ask: impl Fn() -> Result<T, ControlError>) -> anyhow::Result<T> {
    let mut silent_count = 0;
    loop {
        match ask() {
            Ok(it) => return Ok(it),
            Err(ControlError::Silent { .. } | ControlError::Full)
                if silent_count < SILENT_COUNT_MAX =>
            {
                silent_count += 1;
            }
            Err(e) => return Err(unanswered(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn giving_up_is_a_table() {
        let s = Duration::from_secs;
        // connected, known to be away, waited, timeout: verdict
        let table = [
            (true, false, s(9999), None, None),
            (true, false, s(4), Some(s(5)), None),
            (true, false, s(5), Some(s(5)), Some(Exit::Failure)),
            (false, false, s(9), None, None),
            (false, true, s(0), None, Some(Exit::Unreachable)),
            (false, true, s(4), Some(s(5)), None),
            (false, false, s(5), Some(s(5)), Some(Exit::Unreachable)),
        ];
        for (connected, away, waited, timeout, want) in table {
            let status = Status { connected, away, ..Status::default() };
            assert_eq!(verdict(&status, waited, timeout), want, "{away:?} {waited:?}");
        }
    }

    /// Acknowledges one record each time it is asked.
    struct Daemon {
        acked: AtomicU64,
        connected: bool,
    }

    impl control::Answer for Daemon {
        fn status(&self) -> Status {
            let since = "2026-11-21T10:00:00Z".to_owned();
            let server = "h:7070".to_owned();
            let connected = self.connected;
            Status { connected, away: !connected, since, server, ..Status::default() }
        }
        fn ship_now(&self) -> u64 {
            5
        }
        fn acked(&self) -> u64 {
            self.acked.fetch_add(u64::from(self.connected), Ordering::SeqCst)
        }
        fn shutdown(&self) {}
    }

    #[test]
    fn it_waits_for_the_last_record_and_not_for_an_absent_server() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("imz/x.sock");
        assert!(wait(&socket, None).is_err(), "nobody is there");
        let daemon = |connected| Arc::new(Daemon { acked: AtomicU64::new(0), connected });

        let (here, away) = (daemon(true), daemon(false));
        let control = control::serve(&socket, here.clone()).unwrap();
        wait(&socket, None).unwrap();
        assert_eq!(here.acked.load(Ordering::SeqCst), 6, "asked until 5 was the answer");
        drop(control);

        let _control = control::serve(&socket, away).unwrap();
        let began = Instant::now();
        let error = wait(&socket, None).unwrap_err();
        assert_eq!(crate::modes::exit_code(&error), 3);
        assert!(error.to_string().contains("h:7070 is away since 2026-11-21"), "{error}");
        assert!(began.elapsed() < Duration::from_secs(2), "it is known to be away");
        let limit = Duration::from_millis(300);
        let began = Instant::now();
        assert_eq!(crate::modes::exit_code(&wait(&socket, Some(limit)).unwrap_err()), 3);
        assert!(began.elapsed() >= limit, "a time limit is waited for, away or not");
    }
}
