//! A check of what imz keeps, on both sides: a cache, and a served directory with its state.
//!
//! ```text
//!   house     which side it is, where its parts are, and that nobody uses it
//!   journal   segments, chain, cursors; what pends, and what its records want of the tree
//!   tree      every object: attribute, index, version, what is here of it
//!   state     state.json, the table of clients, conflicts, limbo, spool, what was left behind
//!   repair    carries out what can be put right
//! ```
//!
//! Looking changes nothing, and ends at nothing: every finding is told, with what can be done about
//! it. A repair deletes nothing: what cannot stay where it is goes to `lost+found`, in a directory
//! of its own a run. In a cache that is beside `tree`, where a person finds it; of a served
//! directory it is in `.imz`, where clients do not.
//!
//! Absent on purpose: printing, signals and exit codes (the mode's), and the contents of files,
//! which have no checksums.

mod house;
mod journal;
mod repair;
mod state;
mod tree;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use super::compare::CompareError;
use super::index::IndexError;
use super::meta::Meta;
use super::nodes::Nodes;
use super::state::Facts;
use crate::kml::record::{Fid, Record, Stamp};
use crate::kml::salvage::rebuild::RebuildError;
use crate::sys::Errno;

pub use house::{House, Side};

/// How bad it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Severity {
    /// nothing is wrong, or it is put right by the next start
    Note,
    /// something is not as it should be; nothing is lost
    Warning,
    /// something is lost, or imz would refuse to start
    Error,
}

impl Severity {
    pub fn name(self) -> &'static str {
        match self {
            Severity::Note => "note",
            Severity::Warning => "warning",
            Severity::Error => "error",
        }
    }
}

/// What a repair does about a finding.
#[derive(Clone, Debug, Default)]
enum Fix {
    /// nothing: a person must
    #[default]
    None,
    /// moves the file or object to lost+found. `relist`: this directory of the tree is to be listed
    /// anew, so that the server's version comes
    SetAside {
        path: PathBuf,
        relist: Option<Vec<u8>>,
    },
    /// writes the journal and its cursors anew
    Journal,
    /// builds the index anew from the tree
    Index,
    State(Box<Facts>),
    /// a table of clients that gives no number twice
    Nodes {
        next: u32,
    },
    /// what imz knows of the object is this
    Meta {
        path: Vec<u8>,
        meta: Box<Meta>,
    },
    /// the same, in a cache; with `keep` a copy of its data goes to lost+found
    Remake {
        path: Vec<u8>,
        meta: Box<Meta>,
        keep: bool,
    },
    /// the object gets a fid of its own
    DropMeta {
        path: Vec<u8>,
    },
    /// the object is journaled once more
    Journalize(Vec<Record>),
}

/// One thing that was found.
#[derive(Clone, Debug)]
pub struct Finding {
    pub severity: Severity,
    /// one word for tools, with dashes; the manual lists them
    pub kind: &'static str,
    /// which file, or which path of the volume
    pub subject: PathBuf,
    pub message: String,
    /// what a repair does, or what a person can do
    pub remedy: String,
    fix: Fix,
    /// `None`: nothing was tried
    pub repaired: Option<Result<(), String>>,
}

impl Finding {
    fn new(
        severity: Severity,
        kind: &'static str,
        subject: impl AsRef<Path>,
        message: impl Into<String>,
    ) -> Finding {
        Finding {
            severity,
            kind,
            subject: subject.as_ref().to_owned(),
            message: message.into(),
            remedy: String::new(),
            fix: Fix::None,
            repaired: None,
        }
    }
    fn note(kind: &'static str, subject: impl AsRef<Path>, what: impl Into<String>) -> Finding {
        Finding::new(Severity::Note, kind, subject, what)
    }
    fn warning(kind: &'static str, subject: impl AsRef<Path>, what: impl Into<String>) -> Finding {
        Finding::new(Severity::Warning, kind, subject, what)
    }
    fn error(kind: &'static str, subject: impl AsRef<Path>, what: impl Into<String>) -> Finding {
        Finding::new(Severity::Error, kind, subject, what)
    }
    /// What a person can do.
    fn advise(self, remedy: impl Into<String>) -> Finding {
        Finding { remedy: remedy.into(), ..self }
    }
    /// What a repair does.
    fn mend(self, fix: Fix, remedy: impl Into<String>) -> Finding {
        Finding { fix, remedy: remedy.into(), ..self }
    }
    /// Whether a repair can do something about it.
    pub fn is_repairable(&self) -> bool {
        !matches!(self.fix, Fix::None)
    }
    /// Whether it is put right, or nothing to be put right.
    pub fn is_settled(&self) -> bool {
        self.severity == Severity::Note || matches!(self.repaired, Some(Ok(())))
    }
}

/// Why there was no check, or no end of it.
#[derive(Debug, thiserror::Error)]
pub enum FsckError {
    #[error("{}: neither an imz cache nor a served directory: it has no .imz", path.display())]
    NotOurs { path: PathBuf },
    #[error("{}: its state is in another directory: say --state", path.display())]
    StateElsewhere { path: PathBuf },
    #[error("{}: is in use by {who}", path.display())]
    InUse { path: PathBuf, who: String },
    #[error("interrupted")]
    Stopped,
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: {source}", path.display())]
    Tree { path: PathBuf, source: Errno },
    #[error("{0}")]
    Index(#[from] IndexError),
    #[error("{0}")]
    Rebuild(#[from] RebuildError),
}

impl From<CompareError> for FsckError {
    fn from(e: CompareError) -> FsckError {
        match e {
            CompareError::Stopped => FsckError::Stopped,
            CompareError::Root(source) => FsckError::Tree { path: "the tree".into(), source },
            CompareError::Index(e) => FsckError::Index(e),
        }
    }
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> FsckError + '_ {
    move |source| FsckError::Io { path: path.to_owned(), source }
}

/// What the check says while it runs, and whether it is to go on.
pub struct Watch<'a> {
    pub stop: &'a AtomicBool,
    /// what is looked at, and how many records or objects were
    pub progress: &'a dyn Fn(&'static str, u64),
}

impl Watch<'_> {
    fn check(&self) -> Result<(), FsckError> {
        if self.stop.load(Ordering::Relaxed) { Err(FsckError::Stopped) } else { Ok(()) }
    }
}

/// What was looked at, for the summary.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counts {
    pub records: u64,
    /// of them not acknowledged by the server
    pub pending: u64,
    pub objects: u64,
    /// objects of a served directory that no client has seen yet
    pub unseen: u64,
}

/// All that a check found.
#[derive(Debug)]
pub struct Report {
    pub side: Side,
    pub counts: Counts,
    pub findings: Vec<Finding>,
    /// where a repair put things
    pub lost_found: Option<PathBuf>,
}

/// Checks everything in a house that nobody uses; with `repair` puts right what can be.
///
/// # Errors
/// [`FsckError`]; findings are no errors.
pub fn check(house: &House, repair: bool, watch: &Watch<'_>) -> Result<Report, FsckError> {
    let mut found = Found::default();
    let facts = state::facts(house, &mut found);
    let journal = journal::look(house, facts.as_ref(), &mut found, watch)?;
    let seen = tree::look(house, facts.as_ref(), &journal, &mut found, watch)?;
    state::look(house, facts.as_ref(), &journal, &seen, &mut found)?;
    journal::close(house, facts.as_ref(), &journal, &seen, &mut found);
    let counts = Counts {
        records: journal.survey.as_ref().map_or(0, |survey| survey.count),
        pending: journal.pending_count,
        objects: seen.count,
        unseen: seen.unseen,
    };
    let mut findings = found.0;
    if facts.as_ref().is_some_and(|facts| power_lost(house, facts)) {
        findings.iter_mut().for_each(put_off);
    }
    // the worst last, where a terminal shows it
    findings.sort_by_key(|finding| finding.severity);
    let lost_found = match repair && findings.iter().any(Finding::is_repairable) {
        true => repair::repair(house, facts.as_ref(), &journal, &mut findings, watch)?,
        false => None,
    };
    Ok(Report { side: house.side, counts, findings, lost_found })
}

/// Whether the next start finds what a power cut left. (A server keeps the machine's start with its
/// clients.)
fn power_lost(house: &House, facts: &Facts) -> bool {
    match house.side {
        Side::Cache => facts.power_lost(),
        Side::Served => {
            !facts.clean && !Nodes::open(&house.state).is_ok_and(|nodes| nodes.same_boot())
        }
    }
}

/// After a loss of power the next start compares tree and journal by itself, and knows better what
/// is missing.
fn put_off(finding: &mut Finding) {
    let kinds = [
        "index-lacks",
        "name-differs",
        "data-lost",
        "data-short",
        "unknown",
        "stub-short",
        "journal-behind",
    ];
    if kinds.contains(&finding.kind) {
        (finding.severity, finding.fix) = (Severity::Note, Fix::None);
        finding.remedy = "the machine lost its power: the next start looks at it first".to_owned();
    }
}

/// Findings as they come.
#[derive(Default)]
struct Found(Vec<Finding>);

impl Found {
    fn add(&mut self, finding: Finding) {
        self.0.push(finding);
    }
}

/// What the tree showed that others need to know.
#[derive(Default)]
struct Seen {
    count: u64,
    unseen: u64,
    /// the newest version of an object of a served tree
    newest: Stamp,
    /// the largest counter of a fid that this node gave
    counter_max: u64,
    /// the largest node number in any fid
    node_max: u32,
}

impl Seen {
    fn fid(&mut self, fid: Fid, own: u32) {
        self.node_max = self.node_max.max(fid.node());
        if fid.node() == own {
            self.counter_max = self.counter_max.max(fid.counter());
        }
    }
}
