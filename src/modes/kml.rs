//! `imz kml dump`: a journal as lines, for people or for tools.
//!
//! Reads files only. A process is asked where its journal is, and a mount is never touched.

use std::io::{self, BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;

use super::{Exit, Failure, fail, place};
use crate::cli::DumpArgs;
use crate::cli::options::Point;
use crate::kml::dump::{Bound, Dump, DumpError, End, Options, Why, render};
use crate::kml::recover::Stop;
use crate::kml::store::segments_in;
use crate::net::control;

/// How often a journal that is followed is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// # Errors
/// There is no journal (exit code 5), or it is damaged (6) after what was printed.
pub fn run(args: &DumpArgs) -> anyhow::Result<()> {
    let journal = journal_of(&args.path).with_context(|| args.path.display().to_string())?;
    let options = Options {
        reverse: args.reverse,
        from: args.from.map(bound),
        to: args.to.map(bound),
        path: args.only.as_ref().map(|it| it.as_bytes().to_vec()),
    };
    let mut dump = Dump::open(&journal, options).map_err(no_journal)?;
    let out = BufWriter::new(io::stdout().lock());
    match show(&mut dump, out, args.json, args.follow) {
        // the reader has seen enough, as head(1) has
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
        shown => shown.context("standard output")?,
    }
    verdict(dump.end())
}

fn show(dump: &mut Dump, mut out: impl Write, json: bool, follow: bool) -> io::Result<()> {
    loop {
        for entry in dump.by_ref() {
            let line = if json { render::json(&entry).to_string() } else { render::line(&entry) };
            writeln!(out, "{line}")?;
        }
        out.flush()?;
        if !follow || dump.end().is_final() {
            return Ok(());
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn verdict(end: &End) -> anyhow::Result<()> {
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

fn no_journal(error: DumpError) -> anyhow::Error {
    match &error {
        DumpError::Empty { .. } => Failure::new(Exit::NotFound, error.to_string()).into(),
        DumpError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
            Failure::new(Exit::NotFound, format!("{error}: {source}")).into()
        }
        DumpError::Io { .. } => error.into(),
    }
}

fn bound(point: Point) -> Bound {
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
fn journal_of(path: &Path) -> anyhow::Result<PathBuf> {
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
