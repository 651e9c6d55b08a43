//! `imz umount`: ship what is pending, unmount, wait for the end of the process.
//!
//! Only a mount whose process has died is taken away lazily ([`place::is_dead`]). One that merely does
//! not answer us (another user's, or one that hangs) is never forced.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::{Exit, Failure, fail, place, ship};
use crate::cli::UmountArgs;
use crate::net::control::{self, ControlError};
use crate::sys::mount::{UmountError, umount};

/// How long the process may take to end after the mount is gone.
const END_TIME_MAX: Duration = Duration::from_secs(10);

/// # Errors
/// No such mount, busy, the server is away (nothing is unmounted then).
pub fn run(args: &UmountArgs) -> anyhow::Result<()> {
    let place = place::find(&args.mountpoint)?;
    let name = || place.path.display().to_string();
    if !place.mounted {
        let what = "it is served, not mounted; a server ends with SIGTERM";
        return fail(Exit::NotFound, what).with_context(name);
    }
    match (control::status(&place.socket), args.now) {
        (Ok(status), now) => {
            if !now {
                ship::wait(&place.socket, args.timeout)
                    .context("not unmounted (--now does not wait)")
                    .with_context(name)?;
            }
            end(&place).with_context(name)?;
            await_end(&place.socket, status.pid).with_context(name)
        }
        (Err(e), _) if place::is_dead(&place, &e) => {
            place::clear_dead(&place).with_context(name)?;
            log::warn!("{}: its process had died; the next mount of its cache goes on", name());
            Ok(())
        }
        (Err(_), true) => take_away(&place.path, false).with_context(name),
        (Err(e), false) => Err(place::unanswered(e))
            .context("not unmounted (--now does not ask)")
            .with_context(name),
    }
}

/// The mount goes, then its process is told, in case that it waits for something.
fn end(place: &place::Place) -> anyhow::Result<()> {
    take_away(&place.path, false)?;
    match control::shutdown(&place.socket) {
        Ok(()) | Err(ControlError::Absent | ControlError::Dead) => Ok(()), // it was faster
        Err(e) => Err(e).context("unmounted, but its process was not told"),
    }
}

fn take_away(path: &Path, lazy: bool) -> anyhow::Result<()> {
    match umount(path, lazy) {
        Ok(()) => Ok(()),
        Err(e @ UmountError::Busy) => {
            let what = format!("{e} (fuser -vm {} lists them)", path.display());
            Err(Failure::new(Exit::Refused, what).into())
        }
        Err(UmountError::NotMounted) => Ok(()), // somebody was faster
        Err(e) => Err(e.into()),
    }
}

/// Waits until the process is gone, and with it its lock on the cache.
fn await_end(socket: &Path, pid: u32) -> anyhow::Result<()> {
    let began = Instant::now();
    while socket.exists() || is_running(pid) {
        if began.elapsed() > END_TIME_MAX {
            let what = format!("unmounted, but its process {pid} has not ended yet");
            return fail(Exit::Failure, what);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// A zombie has let go of everything, so it is not running.
fn is_running(pid: u32) -> bool {
    let Ok(stat) = std::fs::read(format!("/proc/{pid}/stat")) else {
        return false;
    };
    let state = stat.rsplit(|&b| b == b')').next().and_then(|rest| rest.get(1));
    !matches!(state, Some(b'Z' | b'X'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zombies_are_not_running() {
        assert!(is_running(std::process::id()));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let began = Instant::now();
        while is_running(child.id()) {
            assert!(began.elapsed() < Duration::from_secs(10));
            std::thread::sleep(Duration::from_millis(5));
        }
        child.wait().unwrap();
        assert!(!is_running(child.id()));
    }
}
