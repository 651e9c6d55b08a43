//! One file per subcommand: wiring only. Modes never name each other; what two of them need is
//! here, in [`place`] (which mount is meant), in [`journal`] (which journal), and in [`ship`] (wait
//! until all is at the server).
//!
//! The exit codes are decided in one function, [`exit_code`]. A mode returns an error whose chain
//! tells the story from the outside in, and names a code with [`Failure`] where there is one.

pub mod conflicts;
pub mod evict;
pub mod explain;
pub mod fsck;
pub mod inspect;
pub mod journal;
pub mod kml;
pub mod mount;
pub mod pin;
pub mod place;
pub mod replay;
pub mod serve;
pub mod ship;
pub mod status;
pub mod sync;
pub mod umount;
pub mod unpin;
pub mod volume;

use std::fmt;
use std::io::{self, Write};

use crate::kml::log::LogError;

/// The exit codes other than 0, as `imz --help` explains them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Exit {
    Failure = 1,
    /// the arguments; clap exits with it as well
    Usage = 2,
    /// the server is away
    Unreachable = 3,
    /// in use, busy, another volume's
    Refused = 4,
    /// no such volume, mount or directory
    NotFound = 5,
    /// a journal does not verify
    Damaged = 6,
    /// no room, or a file system that cannot carry imz
    NoRoom = 7,
}

impl Exit {
    /// What another process of ours meant by its code.
    pub fn from_code(code: u8) -> Exit {
        match code {
            2 => Exit::Usage,
            3 => Exit::Unreachable,
            4 => Exit::Refused,
            5 => Exit::NotFound,
            6 => Exit::Damaged,
            7 => Exit::NoRoom,
            _ => Exit::Failure,
        }
    }
}

/// What failed, what to do about it, and the exit code that says so. An error by itself, or the
/// context of one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    pub exit: Exit,
    pub what: String,
}

impl Failure {
    pub fn new(exit: Exit, what: impl Into<String>) -> Failure {
        Failure { exit, what: what.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Failure {}

/// `Err` of a [`Failure`], for returning.
///
/// # Errors
/// Always.
pub fn fail<T>(exit: Exit, what: impl Into<String>) -> anyhow::Result<T> {
    Err(Failure::new(exit, what).into())
}

/// The exit code of an error: its outermost [`Failure`]'s, or what the journal's or the kernel's
/// error in its chain means.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if let Some(failure) = error.downcast_ref::<Failure>() {
        return failure.exit as u8;
    }
    error.chain().find_map(meaning).unwrap_or(Exit::Failure) as u8
}

/// What an error of a lower layer means to the user.
fn meaning(error: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    if let Some(error) = error.downcast_ref::<LogError>() {
        return match error {
            LogError::Corrupt { .. } => Some(Exit::Damaged),
            LogError::Locked { .. } | LogError::OtherNode { .. } => Some(Exit::Refused),
            LogError::NoRoom(_) => Some(Exit::NoRoom),
            _ => None,
        };
    }
    match error.downcast_ref::<io::Error>()?.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Some(Exit::NoRoom),
        _ => None,
    }
}

/// Prints to standard output; a reader that went away (`| head`) is no failure.
///
/// # Errors
/// Standard output cannot be written.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn a_failure_keeps_its_code_through_the_chain() {
        let deep = fail::<()>(Exit::Unreachable, "h is away").context("/mnt/x").unwrap_err();
        assert_eq!(exit_code(&deep), 3);
        assert_eq!(format!("{deep:#}"), "/mnt/x: h is away");
        let io = io::Error::from(io::ErrorKind::StorageFull);
        let as_context = anyhow::Error::from(io).context(Failure::new(Exit::Refused, "busy"));
        assert_eq!(exit_code(&as_context), 4);
        let full = anyhow::Error::from(io::Error::from(io::ErrorKind::StorageFull)).context("x");
        assert_eq!(exit_code(&full), 7);
        let locked = anyhow::Error::from(LogError::Locked { dir: "/c".into() }).context("x");
        assert_eq!(exit_code(&locked), 4);
        assert_eq!(exit_code(&anyhow::anyhow!("what")), 1);
    }
}
