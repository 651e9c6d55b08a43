//! Which journal a path on the command line means, and what its end says.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;

use super::{Exit, Failure, fail, place};
use crate::cli::options::Point;
use crate::kml::dump::{Bound, DumpError, End, Why};
use crate::kml::recover::Stop;
use crate::kml::store::segments_in;
use crate::net::control;

/// What the end of a journal means to the user.
///
/// # Errors
/// There is damage (exit code 6), or what cannot be read.
pub fn verdict(end: &End) -> anyhow::Result<()> {
    match &end.why {
        Why::Stop(Stop::End) => Ok(()),
        Why::Stop(Stop::Torn(_)) => {
            log::warn!("{end}");
            Ok(())
        }
        Why::Stop(Stop::Corrupt(_)) => fail(Exit::Damaged, end.to_string()),
        Why::Stop(Stop::Alien(_)) | Why::Unreadable(_) => fail(Exit::Failure, end.to_string()),
    }
}

/// The error for a journal that is not there.
pub fn missing(error: DumpError) -> anyhow::Error {
    match &error {
        DumpError::Empty { .. } => Failure::new(Exit::NotFound, error.to_string()).into(),
        DumpError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
            Failure::new(Exit::NotFound, format!("{error}: {source}")).into()
        }
        DumpError::Io { .. } => error.into(),
    }
}

/// A place in a journal, as the command line has it.
pub fn bound(point: Point) -> Bound {
    match point {
        Point::Seq(seq) => Bound::Seq(crate::kml::record::Seq(seq)),
        Point::Time(time) => Bound::TimeNs(time_ns(time)),
    }
}

/// Nanoseconds since the Unix epoch; times out of range are the nearest in it.
fn time_ns(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Where the journal is that `path` means: a segment, a journal, a mount, a cache, a served
/// directory, or a server's state.
///
/// # Errors
/// There is none (exit code 5), or the process behind a mount does not answer.
pub fn find(path: &Path) -> anyhow::Result<PathBuf> {
    look(path).with_context(|| path.display().to_string())
}

fn look(path: &Path) -> anyhow::Result<PathBuf> {
    if let Some(place) = place::look(path)? {
        match control::status(&place.socket) {
            Ok(status) => return below(&status.cache),
            Err(e) if place.mounted => return Err(place::unanswered(e)),
            Err(_) => {} // a server that has ended; its directory is at hand
        }
    }
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => below(path),
        Ok(_) => Ok(path.to_owned()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => fail(Exit::NotFound, e.to_string()),
        Err(e) => Err(e.into()),
    }
}

/// The journal in or below a directory.
fn below(dir: &Path) -> anyhow::Result<PathBuf> {
    for journal in [dir.to_owned(), dir.join("kml"), dir.join(".imz/kml")] {
        match segments_in(&journal) {
            Ok(segments) if !segments.is_empty() => return Ok(journal),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| journal.display().to_string()),
        }
    }
    fail(Exit::NotFound, format!("there is no journal in {}", dir.display()))
}
