//! `imz kml dump`: a journal as lines, for people or for tools.
//!
//! Reads files only. A process is asked where its journal is, and a mount is never touched.

use std::io::{self, BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use anyhow::Context;

use super::journal::{self, bound};
use crate::cli::DumpArgs;
use crate::kml::dump::{Dump, Options, render};

/// How often a journal that is followed is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// # Errors
/// There is no journal (exit code 5), or it is damaged (6) after what was printed.
pub fn run(args: &DumpArgs) -> anyhow::Result<()> {
    let journal = journal::find(&args.path)?;
    let options = Options {
        reverse: args.reverse,
        from: args.from.map(bound),
        to: args.to.map(bound),
        path: args.only.as_ref().map(|it| it.as_bytes().to_vec()),
        still: false,
    };
    let mut dump = Dump::open(&journal, options).map_err(journal::missing)?;
    let out = BufWriter::new(io::stdout().lock());
    match show(&mut dump, out, args.json, args.follow) {
        // the reader has seen enough, as head(1) has
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
        shown => shown.context("standard output")?,
    }
    journal::verdict(dump.end())
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
