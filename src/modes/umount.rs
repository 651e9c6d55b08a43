//! `imz umount`: ship what is pending, unmount, wait for the end of the process.
//!
//! What the table of [`run`] rests on: a mount whose process has died answers every operation with
//! ENOTCONN at once; only such a mount is taken away lazily. One that merely does not answer us
//! (another user's, or one that hangs) is never forced.

use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::{Exit, Failure, fail, place, ship};
use crate::cli::UmountArgs;
use crate::net::control::{self, ControlError};
use crate::sys::Errno;
use crate::sys::mount::{UmountError, probe, umount};

/// How long the process may take to end after the mount is gone.
const END_TIME_MAX: Duration = Duration::from_secs(10);
/// How long a mount may take to show that it is dead.
const PROBE_TIME_MAX: Duration = Duration::from_secs(2);

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
        (Err(ControlError::Absent | ControlError::Dead), _) if is_dead(&place.path) => {
            take_away(&place.path, true).with_context(name)?;
            let _ = std::fs::remove_file(&place.socket); // its owner is dead
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

/// Whether every operation on the mount fails with ENOTCONN. Asks for the free room, since the
/// kernel answers a stat from what it knows. The thread that looks stays behind if the mount hangs.
fn is_dead(mount: &Path) -> bool {
    let (tell, told) = mpsc::channel();
    let (mount, began) = (mount.to_owned(), Instant::now());
    std::thread::spawn(move || {
        let mut looked = probe(&mount);
        while is_dying(&looked) && began.elapsed() < PROBE_TIME_MAX {
            std::thread::sleep(Duration::from_millis(5));
            looked = probe(&mount);
        }
        tell.send(looked)
    });
    let looked = told.recv_timeout(PROBE_TIME_MAX);
    matches!(looked, Ok(Err(e)) if e.kind() == std::io::ErrorKind::NotConnected)
}

/// The kernel takes the rings of a dead process away a moment after its death.
fn is_dying(looked: &std::io::Result<()>) -> bool {
    let dying = [Errno::CANCELED, Errno::CONNABORTED].map(|e| Some(e.raw_os_error()));
    looked.as_ref().is_err_and(|e| dying.contains(&e.raw_os_error()))
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

    #[test]
    fn a_plain_directory_is_not_a_dead_mount() {
        assert!(!is_dead(tempfile::tempdir().unwrap().path()));
        assert!(!is_dead(Path::new("/nonexistent")));
    }
}
