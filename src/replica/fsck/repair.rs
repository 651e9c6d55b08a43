//! Carries out what can be put right, one finding after another; deletes nothing.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::journal::Journal;
use super::{Finding, Fix, FsckError, House, Side, Watch, io};
use crate::kml::record::{Fid, Name, Record, Seq};
use crate::kml::salvage::rebuild::{Plan, rebuild};
use crate::replica::cache::ACKED;
use crate::replica::compare::{self, Knowledge, Places, own_key};
use crate::replica::index::view::View;
use crate::replica::index::{At, Index, IndexError};
use crate::replica::meta::Meta;
use crate::replica::nodes::Nodes;
use crate::replica::state::{self, Facts};
use crate::sys::file::sync_dir;
use crate::sys::fs::{self as at, xattr};

/// Where this run puts things.
struct Aside {
    /// what stood in the tree
    tree: PathBuf,
    /// files of the state
    state: PathBuf,
}

/// What was done, to be read beside what was set aside.
const REPORT: &str = "report.jsonl";

pub(super) fn repair(
    house: &House,
    facts: Option<&Facts>,
    journal: &Journal,
    findings: &mut [Finding],
    watch: &Watch<'_>,
) -> Result<Option<PathBuf>, FsckError> {
    let aside = Aside::make(house)?;
    let mut report = File::create(aside.tree.join(REPORT)).map_err(io(&aside.tree))?;
    // what the journal is given in addition, before it is written
    let extra: Vec<Record> = findings
        .iter()
        .filter_map(|finding| match &finding.fix {
            Fix::Journalize(records) => Some(records.clone()),
            _ => None,
        })
        .flatten()
        .collect();
    let wants_journal =
        !extra.is_empty() || findings.iter().any(|finding| matches!(finding.fix, Fix::Journal));
    let written = wants_journal.then(|| write_journal(house, facts, journal, &extra, &aside));
    let mut tree_changed = false;
    for finding in findings.iter_mut().filter(|finding| finding.is_repairable()) {
        watch.check()?;
        let done = match &finding.fix {
            Fix::None | Fix::Index => continue, // the index comes last
            Fix::Journal | Fix::Journalize(_) => match &written {
                Some(Err(e)) => Err(e.to_string()),
                _ => Ok(()),
            },
            Fix::SetAside { path, relist } => {
                tree_changed = true;
                set_aside(house, &aside, path, relist.as_deref())
            }
            Fix::State(facts) => write_state(house, facts, &aside),
            Fix::Nodes { next } => write_nodes(house, *next, &aside),
            Fix::Meta { path, meta } => {
                tree_changed = true;
                set_meta(house, path, Some(meta), &mut report)
            }
            Fix::Remake { path, meta, keep } => {
                tree_changed = true;
                let kept = if *keep { keep_copy(house, &aside, path) } else { Ok(()) };
                kept.and_then(|()| set_meta(house, path, Some(meta), &mut report))
            }
            Fix::DropMeta { path } => {
                tree_changed = true;
                set_meta(house, path, None, &mut report)
            }
        };
        note(&mut report, finding, &done).map_err(io(&aside.tree))?;
        finding.repaired = Some(done);
    }
    let wants_index = findings.iter().any(|finding| matches!(finding.fix, Fix::Index));
    if wants_index || tree_changed {
        watch.check()?;
        let done = write_index(house, &aside, watch).map_err(|e| e.to_string());
        for finding in findings.iter_mut().filter(|it| matches!(it.fix, Fix::Index)) {
            note(&mut report, finding, &done).map_err(io(&aside.tree))?;
            finding.repaired = Some(done.clone());
        }
    }
    report.sync_all().map_err(io(&aside.tree))?;
    let root = at::open_root(&house.tree)
        .map_err(|source| FsckError::Tree { path: house.tree.clone(), source })?;
    at::syncfs(&root).map_err(|source| FsckError::Tree { path: house.tree.clone(), source })?;
    Ok(Some(aside.tree))
}

fn note(report: &mut File, finding: &Finding, done: &Result<(), String>) -> std::io::Result<()> {
    let line = serde_json::json!({
        "kind": finding.kind,
        "path": finding.subject.to_string_lossy(),
        "message": finding.message,
        "repair": finding.remedy,
        "error": done.as_ref().err(),
    });
    writeln!(report, "{line}")
}

impl Aside {
    /// A new directory in lost+found: the first number that is free.
    fn make(house: &House) -> Result<Aside, FsckError> {
        let (tree, state) = (house.lost_found(), house.state_lost_found());
        for base in [&tree, &state] {
            fs::create_dir_all(base).map_err(io(base))?;
        }
        let free = (1..).find(|n: &u32| {
            !tree.join(n.to_string()).exists() && !state.join(n.to_string()).exists()
        });
        let name = free.unwrap_or(0).to_string();
        let aside = Aside { tree: tree.join(&name), state: state.join(&name) };
        for dir in [&aside.tree, &aside.state] {
            fs::create_dir_all(dir).map_err(io(dir))?;
        }
        Ok(aside)
    }
}

fn write_journal(
    house: &House,
    facts: Option<&Facts>,
    journal: &Journal,
    extra: &[Record],
    aside: &Aside,
) -> Result<Seq, FsckError> {
    let Some(survey) = &journal.survey else {
        let source = std::io::ErrorKind::NotFound.into();
        return Err(FsckError::Io { path: house.journal.clone(), source });
    };
    let gaps = survey.gaps().map(|gap| gap.to).fold(survey.synced, Seq::max);
    let cursors = match survey.cursors.newest() {
        Some(page) => page.cursors.clone(),
        // what was trimmed was acknowledged; all else is offered again
        None if house.side == Side::Cache => {
            vec![(ACKED.as_bytes().to_vec(), journal.acked.0)]
        }
        None => Vec::new(),
    };
    let named = cursors.iter().filter(|(name, _)| {
        name == ACKED.as_bytes() || name == crate::replica::volume::CURSOR.as_bytes()
    });
    let mut upto = named.map(|(_, value)| Seq(*value)).fold(gaps, Seq::max);
    if let Ok(nodes) = Nodes::open(&house.state)
        && house.side == Side::Served
    {
        upto = upto.max(nodes.as_of());
    }
    if survey.open_end {
        // nobody knows how many there were: no more than had room
        upto = upto.max(Seq(survey.last.0 + survey.room_count));
    }
    let plan = Plan {
        incarnation: facts.map_or(0, Facts::incarnation),
        upto,
        extra,
        cursors,
        aside: &aside.state.join("kml"),
    };
    Ok(rebuild(survey, &plan)?)
}

/// Moves something to lost+found, under its own path.
fn set_aside(
    house: &House,
    aside: &Aside,
    path: &Path,
    relist: Option<&[u8]>,
) -> Result<(), String> {
    let text = |e: std::io::Error| format!("{}: {e}", path.display());
    let to = match (path.strip_prefix(&house.state), relist) {
        (Ok(own), None) => aside.state.join(own),
        _ => {
            let below = path.strip_prefix(&house.tree).unwrap_or(path);
            aside.tree.join("tree").join(below)
        }
    };
    if let Some(dir) = to.parent() {
        fs::create_dir_all(dir).map_err(text)?;
    }
    // a directory of its own a run, and each path once: nothing stands there
    if to.symlink_metadata().is_ok() {
        return Err(format!("{} is taken", to.display()));
    }
    match fs::rename(path, &to) {
        // it went along with its directory
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !parent_is_there(path) => {
            return Ok(());
        }
        moved => moved.map_err(text)?,
    }
    match relist {
        Some(dir) => edit_meta(house, dir, |meta| meta.stale = true),
        None => Ok(()),
    }
}

fn parent_is_there(path: &Path) -> bool {
    path.parent().is_some_and(|dir| dir.symlink_metadata().is_ok())
}

/// A copy of a file in lost+found, holes included; the file itself stays.
fn keep_copy(house: &House, aside: &Aside, path: &[u8]) -> Result<(), String> {
    let text = |e: std::io::Error| format!("{}: {e}", path.escape_ascii());
    let below = Path::new(OsStr::from_bytes(path));
    let to = aside.tree.join("tree").join(below);
    if let Some(dir) = to.parent() {
        fs::create_dir_all(dir).map_err(text)?;
    }
    let from = house.tree.join(below);
    if !from.symlink_metadata().map_err(text)?.is_file() {
        return Ok(());
    }
    fs::copy(&from, &to).map_err(text)?;
    File::open(&to).and_then(|file| file.sync_all()).map_err(text)
}

/// The directory in which an object stands, and its name; the root is itself, with no name.
fn place(house: &House, path: &[u8]) -> Result<(std::os::fd::OwnedFd, Vec<u8>), String> {
    let text = |e: crate::sys::Errno| format!("{}: {e}", path.escape_ascii());
    let root = at::open_root(&house.tree).map_err(text)?;
    let Some(cut) = path.iter().rposition(|byte| *byte == b'/') else {
        return Ok((root, path.to_vec()));
    };
    let dir = at::open_beneath(&root, &path[..cut], at::o::DIRECTORY).map_err(text)?;
    Ok((dir, path[cut + 1..].to_vec()))
}

fn edit_meta(house: &House, path: &[u8], edit: impl FnOnce(&mut Meta)) -> Result<(), String> {
    let text = |e: crate::sys::Errno| format!("{}: {e}", path.escape_ascii());
    let (dir, name) = place(house, path)?;
    let value = xattr::get(&dir, &name, own_key()).map_err(text)?.unwrap_or_default();
    // where it is damaged itself, it is put right by its own finding
    let Ok(mut meta) = Meta::decode(&value) else { return Ok(()) };
    edit(&mut meta);
    xattr::set(&dir, &name, own_key(), &meta.encode(), 0).map_err(text)
}

fn set_meta(
    house: &House,
    path: &[u8],
    meta: Option<&Meta>,
    report: &mut File,
) -> Result<(), String> {
    let text = |e: crate::sys::Errno| format!("{}: {e}", path.escape_ascii());
    let (dir, name) = place(house, path)?;
    let old = xattr::get(&dir, &name, own_key()).map_err(text)?.unwrap_or_default();
    let old: String = old.iter().map(|byte| format!("{byte:02x}")).collect();
    let line = serde_json::json!({ "path": path.escape_ascii().to_string(), "was": old });
    writeln!(report, "{line}").map_err(|e| e.to_string())?;
    match meta {
        Some(meta) => xattr::set(&dir, &name, own_key(), &meta.encode(), 0).map_err(text),
        None => match xattr::remove(&dir, &name, own_key()) {
            Ok(()) | Err(crate::sys::Errno::NODATA) => Ok(()),
            Err(e) => Err(text(e)),
        },
    }
}

fn write_state(house: &House, facts: &Facts, aside: &Aside) -> Result<(), String> {
    let path = house.state.join(state::FILE);
    let write = || -> std::io::Result<()> {
        match fs::hard_link(&path, aside.state.join(state::FILE)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let fresh = house.state.join("state.json.new");
        let mut file = File::create(&fresh)?;
        file.write_all(&state::seal(facts)?)?;
        file.sync_all()?;
        fs::rename(&fresh, &path)?;
        sync_dir(&house.state)
    };
    write().map_err(|e| format!("{}: {e}", path.display()))
}

fn write_nodes(house: &House, next: u32, aside: &Aside) -> Result<(), String> {
    let path = house.state.join("nodes.json");
    let text = |e: std::io::Error| format!("{}: {e}", path.display());
    match fs::rename(&path, aside.state.join("nodes.json")) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(text(e)),
        _ => {}
    }
    Nodes::begin(&house.state, next).map_err(|e| e.to_string())
}

/// A new index of everything that stands in the tree; what the old one knew of objects that carry no
/// attribute is taken over.
fn write_index(house: &House, aside: &Aside, watch: &Watch<'_>) -> Result<(), FsckError> {
    let fresh = house.index.with_extension("new");
    let _ = fs::remove_file(&fresh); // of a repair that did not end
    let view = View::open(&house.index).ok();
    let (index, _) = Index::open(&fresh)?;
    let root = at::open_root(&house.tree)
        .map_err(|source| FsckError::Tree { path: house.tree.clone(), source })?;
    let carried = Carried(view);
    let places: Option<&dyn Places> = Some(&carried);
    let known = Knowledge { places, facts: HashMap::new(), stopped_at: None };
    let (mut failed, mut count) = (Ok(()), 0);
    compare::compare(root, &known, &mut |found| {
        if let compare::Found::Object(spot, _) = found
            && let (Some(dir), Some(meta)) = (spot.dir, &spot.meta)
        {
            count += 1;
            (watch.progress)("objects", count);
            failed = put(&index, dir, &spot.name, meta, &carried);
        }
        failed.is_ok() && watch.check().is_ok()
    })?;
    failed?;
    index.flush(true)?;
    drop(index);
    let name = house.index.file_name().unwrap_or_default();
    if house.index.exists() {
        fs::rename(&house.index, aside.state.join(name)).map_err(io(&house.index))?;
    }
    fs::rename(&fresh, &house.index).map_err(io(&house.index))?;
    sync_dir(&house.state).map_err(io(&house.state))
}

fn put(index: &Index, dir: Fid, name: &Name, meta: &Meta, old: &Carried) -> Result<(), FsckError> {
    index.add(meta.fid, dir, name)?;
    if let Some(value) = old.loose(dir, name.as_bytes())? {
        index.set_loose(dir, name.as_bytes(), Some(value));
    }
    if index.fresh_count() > 4096 {
        index.flush(false)?;
    }
    Ok(())
}

/// Of the old index only what stands nowhere else.
struct Carried(Option<View>);

impl Places for Carried {
    fn of(&self, _: Fid) -> Result<Vec<At>, IndexError> {
        Ok(Vec::new())
    }
    fn all(&self, _: &mut dyn FnMut(Fid, Vec<At>)) -> Result<(), IndexError> {
        Ok(())
    }
    fn loose(&self, dir: Fid, name: &[u8]) -> Result<Option<Vec<u8>>, IndexError> {
        self.0.as_ref().map_or(Ok(None), |view| view.loose(dir, name))
    }
}
