//! `imz replay`: applies a journal to a copy of a tree, or takes it back.
//!
//! Two readings of the journal: one to know what is in it, one to do it. Then contents.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::journal::{self, bound};
use super::{Exit, Failure, fail};
use crate::cli::replay::ReplayArgs;
use crate::kml::codec::Entry;
use crate::kml::dump::{Bound, Dump, Options, render};
use crate::kml::record::Seq;
use crate::replica::lives::Lives;
use crate::replica::replay::contents::Source;
use crate::replica::replay::survey::{Part, Survey};
use crate::replica::replay::target::Target;
use crate::replica::replay::{Fate, Filled, Replay, ReplayError};
use crate::sys;

/// The bar moves once in so many records.
const SHOWN_EVERY: u64 = 64;

/// # Errors
/// Something was left out (exit code 1), the target is in use (4), something is not there (5), or
/// the journal is damaged (6) behind what was applied.
pub fn run(args: &ReplayArgs) -> anyhow::Result<()> {
    let path = journal::find(&args.journal)?;
    refuse_mounts(&args.onto)?;
    let part =
        Part { from: Seq(args.from.unwrap_or(1)), until: args.until.map(bound), undo: args.undo };
    let open = |options| Dump::open(&path, options).map_err(journal::missing);
    let target = Target::open(&args.onto, !args.dry_run).map_err(failure)?;
    let source = args.data.as_deref().map(Source::open).transpose().map_err(failure)?;
    if let Some(source) = &source {
        refuse_same(source, args)?;
    }
    let (mut survey, end) = read(open(Options::default())?, &part, target.is_plain);
    match Lives::beside(&path) {
        Some(lives) => survey.lives = lives,
        None if target.newest.0 > survey.last.0 => {
            log::warn!(
                "{}: no state.json is beside it: its records and the versions in {} cannot be compared",
                path.display(),
                args.onto.display()
            );
            survey.is_history = false;
        }
        None => {}
    }
    let (until, count) = (survey.until, survey.count);
    let mut replay = Replay::new(target, part, survey, args.dry_run);
    if let Some(source) = source {
        replay.set_source(source);
    }
    let mut out = Printer::new(args, count)?;
    let range = (Some(Bound::Seq(part.from)), Some(Bound::Seq(until)));
    let (from, to) = range;
    let options = Options { reverse: part.undo, from, to, ..Options::default() };
    let done = carry_out(&mut replay, open(options)?, until, part.undo, &mut out);
    // what was done has its stamps and is on disk, also where it could not go on
    let finished = replay.finish().map_err(failure);
    out.end(&replay, until)?;
    done?;
    finished?;
    journal::verdict(&end)?;
    if replay.sums.is_whole() {
        return Ok(());
    }
    fail(Exit::Failure, "not everything could be done: see what is said above")
}

/// One reading of the whole journal.
fn read(mut dump: Dump, part: &Part, is_plain: bool) -> (Survey, crate::kml::dump::End) {
    let mut survey = Survey::default();
    for entry in dump.by_ref() {
        survey.add(part, is_plain, &entry);
    }
    (survey, dump.into_end())
}

fn carry_out(
    replay: &mut Replay,
    dump: Dump,
    until: Seq,
    undo: bool,
    out: &mut Printer,
) -> anyhow::Result<()> {
    for entry in dump {
        if !undo && entry.seq > until {
            break; // of a journal that grows
        }
        let fate = replay.step(&entry).map_err(failure)?;
        out.record(&entry, &fate)?;
        if entry.seq == until && !undo {
            break;
        }
    }
    out.contents(replay.wanted_count());
    while let Some(file) = replay.fill_next().map_err(failure)? {
        out.filled();
        if let Err(why) = file.filled {
            out.missing(&file, &why.to_string())?;
        }
    }
    Ok(())
}

/// Neither a mount of ours nor what is in one: its process keeps it in step.
fn refuse_mounts(onto: &Path) -> anyhow::Result<()> {
    let mounts = sys::mount::ours().context("/proc/self/mountinfo")?;
    let absolute: PathBuf = std::path::absolute(onto)?.components().collect();
    let inside = |path: &Path| mounts.iter().any(|mount| path.starts_with(mount));
    let inside = inside(&absolute) || absolute.canonicalize().is_ok_and(|real| inside(&real));
    match inside {
        true => fail(Exit::Refused, format!("{}: is in a mount: take a copy", onto.display())),
        false => Ok(()),
    }
}

fn refuse_same(source: &Source, args: &ReplayArgs) -> anyhow::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let there = source.ino().map_err(std::io::Error::from).context("--data")?;
    if std::fs::metadata(&args.onto).is_ok_and(|onto| onto.ino() == there) {
        return fail(Exit::Usage, "--data and --onto are one directory");
    }
    Ok(())
}

fn failure(error: ReplayError) -> anyhow::Error {
    let exit = match &error {
        ReplayError::NoTarget { .. } => Exit::NotFound,
        ReplayError::InUse { .. } | ReplayError::Cache { .. } | ReplayError::NotARoot { .. } => {
            Exit::Refused
        }
        ReplayError::NoRoom => Exit::NoRoom,
        ReplayError::Tree(e) if e.is_no_xattrs() => Exit::NoRoom,
        _ => Exit::Failure,
    };
    Failure::new(exit, error.to_string()).into()
}

/// The word for a fate, and why.
fn word(fate: &Fate) -> (&'static str, Option<String>) {
    match fate {
        Fate::Done => ("apply", None),
        Fate::Standing => ("standing", None),
        Fate::Empty => ("empty", None),
        Fate::Unsettled => ("unsettled", None),
        Fate::Misfit(why) => ("misfit", Some(why.to_string())),
        Fate::Lost(why) => ("lost", Some(why.to_string())),
    }
}

/// Lines on standard output, a bar on a terminal.
struct Printer {
    out: BufWriter<io::Stdout>,
    bar: ProgressBar,
    json: bool,
    all: bool,
    count: u64,
}

impl Printer {
    fn new(args: &ReplayArgs, records: u64) -> anyhow::Result<Printer> {
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}")
            .context("the progress bar")?;
        let bar = ProgressBar::new(records).with_style(style).with_message("records");
        let out = BufWriter::new(io::stdout());
        Ok(Printer { out, bar, json: args.json, all: args.dry_run, count: 0 })
    }

    fn record(&mut self, entry: &Entry, fate: &Fate) -> anyhow::Result<()> {
        self.count += 1;
        if self.count.is_multiple_of(SHOWN_EVERY) {
            self.bar.set_position(self.count);
        }
        if !self.all && !matches!(fate, Fate::Misfit(_) | Fate::Lost(_) | Fate::Unsettled) {
            return Ok(());
        }
        let (word, why) = word(fate);
        let line = match self.json {
            true => {
                let mut value = render::json(entry);
                value["fate"] = word.into();
                value["why"] = why.into();
                value.to_string()
            }
            false => {
                let why = why.map(|why| format!(": {why}")).unwrap_or_default();
                format!("{word:<9} {}{why}", render::line(entry))
            }
        };
        self.line(&line)
    }

    fn contents(&mut self, files: u64) {
        self.bar.set_length(files);
        self.bar.set_position(0);
        self.bar.set_message("files");
    }

    fn filled(&mut self) {
        self.bar.inc(1);
    }

    fn missing(&mut self, file: &Filled, why: &str) -> anyhow::Result<()> {
        let path = &file.path;
        let line = match self.json {
            true => {
                let mut value =
                    json!({ "fate": "missing", "why": why, "fid": file.fid.to_string() });
                render::put_path(&mut value, path);
                value.to_string()
            }
            false => format!("missing   {}: {why}", render::plain(path)),
        };
        self.line(&line)
    }

    /// A reader that has seen enough (head(1)) does not stop what is being done.
    fn line(&mut self, line: &str) -> anyhow::Result<()> {
        let out = &mut self.out;
        let done = self.bar.suspend(|| writeln!(out, "{line}").and_then(|()| out.flush()));
        match done {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            done => done.context("standard output"),
        }
    }

    fn end(&mut self, replay: &Replay, until: Seq) -> anyhow::Result<()> {
        self.bar.finish_and_clear();
        let sums = &replay.sums;
        let value: Value = json!({ "sums": {
            "records": sums.records,
            "until": until.0,
            "done": sums.done,
            "standing": sums.standing,
            "empty": sums.empty,
            "unsettled": sums.unsettled,
            "misfits": sums.misfits,
            "lost": sums.lost,
            "gaps": sums.gaps,
            "files_filled": sums.filled,
            "bytes_filled": sums.filled_bytes,
            "files_missing": sums.missing,
        }});
        if self.json {
            return self.line(&value.to_string());
        }
        let would = if self.all { "would be " } else { "" };
        self.line(&format!(
            "{} records up to {}: {} {would}done, {} standing, {} empty, {} unsettled, {} misfits, \
             {} lost; contents of {} files ({}) filled in, of {} missing",
            sums.records,
            until.0,
            sums.done,
            sums.standing,
            sums.empty,
            sums.unsettled,
            sums.misfits,
            sums.lost,
            sums.filled,
            HumanBytes(sums.filled_bytes),
            sums.missing,
        ))?;
        if sums.gaps > 0 {
            self.line(&format!(
                "{} records were made on versions that this tree never had: it is older than where \
                 the journal (or --from) begins",
                sums.gaps
            ))?;
        }
        Ok(())
    }
}
