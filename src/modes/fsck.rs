//! `imz fsck`: a check, its findings as lines or as JSON, and the exit codes of fsck(8).

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::cli::check::FsckArgs;
use crate::replica::fsck::{self, Finding, FsckError, House, Report, Severity, Watch};
use crate::sys::daemon::Signals;

const CLEAN: u8 = 0;
const REPAIRED: u8 = 1;
const LEFT: u8 = 4;
const FAILED: u8 = 8;
/// The arguments are wrong.
pub const USAGE: u8 = 16;
const STOPPED: u8 = 32;

/// Checks, prints, and returns the exit code.
pub fn run(args: &FsckArgs) -> u8 {
    let (report, code) = match checked(args) {
        Ok(report) => {
            let code = verdict(&report.findings);
            (report, code)
        }
        Err(FsckError::Stopped) => {
            eprintln!("imz: fsck: {}: interrupted", args.dir.display());
            return STOPPED;
        }
        Err(e) => {
            eprintln!("imz: fsck: {e}");
            return FAILED;
        }
    };
    match show(args, &report) {
        // the reader has seen enough, as head(1) has
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => code,
        Err(e) => {
            eprintln!("imz: fsck: standard output: {e}");
            FAILED
        }
        Ok(()) => code,
    }
}

fn checked(args: &FsckArgs) -> Result<Report, FsckError> {
    let stop = Arc::new(AtomicBool::new(false));
    // before any thread is there
    match Signals::take() {
        Ok(mut signals) => {
            let stop = stop.clone();
            std::thread::spawn(move || {
                if signals.wait().is_ok() {
                    stop.store(true, Ordering::Relaxed);
                }
            });
        }
        Err(e) => log::warn!("an interrupt ends the check at once: {e}"),
    }
    let mut house = House::find(&args.dir, args.state.as_deref())?;
    house.lock()?;
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    let progress = |what: &'static str, count: u64| bar.set_message(format!("{what}: {count}"));
    let watch = Watch { stop: &stop, progress: &progress };
    let report = fsck::check(&house, args.repair, &watch);
    bar.finish_and_clear();
    report
}

fn verdict(findings: &[Finding]) -> u8 {
    match () {
        () if findings.iter().any(|it| !it.is_settled()) => LEFT,
        () if findings.iter().any(|it| it.severity > Severity::Note) => REPAIRED,
        () => CLEAN,
    }
}

fn show(args: &FsckArgs, report: &Report) -> io::Result<()> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    for finding in &report.findings {
        match args.json {
            true => writeln!(out, "{}", as_json(finding))?,
            false => writeln!(out, "{}", line(finding))?,
        }
    }
    match args.json {
        true => writeln!(out, "{}", json!({ "summary": summary_json(args, report) }))?,
        false => writeln!(out, "{}", summary(args, report))?,
    }
    out.flush()
}

/// `SEVERITY PATH: what; what can be done`, on one line whatever the path is.
fn line(finding: &Finding) -> String {
    let path = one_line(&finding.subject);
    let mut line = format!("{}: {path}: {}", finding.severity.name(), finding.message);
    let remedy = match (&finding.repaired, finding.is_repairable()) {
        (Some(Ok(())), _) => format!("REPAIRED: {}", finding.remedy),
        (Some(Err(e)), _) => format!("NOT repaired: {e}"),
        (None, true) => format!("--repair would: {}", finding.remedy),
        (None, false) => finding.remedy.clone(),
    };
    if !remedy.is_empty() {
        line.push_str("; ");
        line.push_str(&remedy);
    }
    line
}

fn one_line(path: &Path) -> String {
    let text = path.to_string_lossy();
    match text.chars().any(char::is_control) {
        true => format!("{text:?}"),
        false if text.is_empty() => "/".to_owned(),
        false => text.into_owned(),
    }
}

fn as_json(finding: &Finding) -> Value {
    json!({
        "severity": finding.severity.name(),
        "kind": finding.kind,
        "path": finding.subject.to_string_lossy(),
        "message": finding.message,
        "remedy": finding.remedy,
        "repairable": finding.is_repairable(),
        "repaired": finding.repaired.as_ref().map(Result::is_ok),
        "error": finding.repaired.as_ref().and_then(|it| it.as_ref().err()),
    })
}

/// How many findings of a severity, and how many of them are repaired.
fn tally(report: &Report, severity: Severity) -> (usize, usize) {
    let of = report.findings.iter().filter(|it| it.severity == severity);
    let repaired = of.clone().filter(|it| matches!(it.repaired, Some(Ok(())))).count();
    (of.count(), repaired)
}

fn summary(args: &FsckArgs, report: &Report) -> String {
    let counts = &report.counts;
    let mut text = format!("{}: {}: ", one_line(&args.dir), report.side.name());
    let several = |count: u64, what: &str| match count {
        1 => format!("1 {what}"),
        n => format!("{n} {what}s"),
    };
    text.push_str(&several(counts.objects, "object"));
    if counts.unseen > 0 {
        text.push_str(&format!(" ({} not seen by any client yet)", counts.unseen));
    }
    text.push_str(&format!(", {}", several(counts.records, "record")));
    if counts.pending > 0 {
        text.push_str(&format!(" ({} pending)", counts.pending));
    }
    let mut repaired = 0;
    for (severity, what) in
        [(Severity::Error, "error"), (Severity::Warning, "warning"), (Severity::Note, "note")]
    {
        let (count, done) = tally(report, severity);
        text.push_str(if severity == Severity::Error { "; " } else { ", " });
        text.push_str(&several(count as u64, what));
        repaired += done;
    }
    if repaired > 0 {
        text.push_str(&format!("; {repaired} repaired"));
    }
    if let Some(place) = &report.lost_found {
        text.push_str(&format!("; what was set aside is in {}", one_line(place)));
    }
    text
}

fn summary_json(args: &FsckArgs, report: &Report) -> Value {
    let all = |severity| tally(report, severity).0;
    json!({
        "path": args.dir.to_string_lossy(),
        "side": report.side.name(),
        "objects": report.counts.objects,
        "unseen": report.counts.unseen,
        "records": report.counts.records,
        "pending": report.counts.pending,
        "errors": all(Severity::Error),
        "warnings": all(Severity::Warning),
        "notes": all(Severity::Note),
        "lost_found": report.lost_found.as_ref().map(|it| it.to_string_lossy().into_owned()),
    })
}
