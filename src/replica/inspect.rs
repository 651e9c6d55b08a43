//! All that imz knows of one thing, as a sheet of names and values: for people, who read its lines,
//! and for tools, who read it as JSON.
//!
//! Nothing is changed and nothing waits: a cache's own process answers from its tree and journal
//! ([`in_mount`]), all else is read from files. Lists are bounded: the first of them, and how many
//! there are.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::cache::{ACKED, Cache};
use super::compare::own_key;
use super::fsck::{House, Side};
use super::lives::Lives;
use super::meta::Meta;
use super::nodes::Nodes;
use super::room::{BookFile, FiguresFile};
use super::state::{self, Facts};
use super::tree::{CONFLICTS_NAME, TreeError};
use crate::kml::codec::{Entry, Outcome};
use crate::kml::dump::{Bound, Dump, Options, render};
use crate::kml::record::{Fid, Name, Stamp};
use crate::kml::salvage::{self, Survey};
use crate::sys::Errno;
use crate::sys::fs::{self as at, Kind, Stat, xattr};

/// Most entries of a list that are shown.
const SHOWN_MAX: usize = 10;
/// Longest line of a list, bytes.
const LINE_LEN_MAX: usize = 400;
/// Most records that are looked at for one answer.
const RECORDS_MAX: usize = 200_000;

/// Names and values, in the order in which they are read.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Sheet(pub Vec<(String, Value)>);

impl Sheet {
    fn add(&mut self, key: &str, value: impl Into<Value>) {
        self.0.push((key.to_owned(), value.into()));
    }
    /// The first of many, and how many.
    fn list(&mut self, key: &str, count: usize, lines: Vec<String>) {
        self.add(key, count);
        if !lines.is_empty() {
            self.add(&format!("{key}_first"), lines);
        }
    }
    /// As one JSON object.
    pub fn into_json(self) -> Value {
        Value::Object(self.0.into_iter().collect::<Map<_, _>>())
    }
    /// As it travels: in order.
    pub fn to_pairs(&self) -> Value {
        json!(self.0)
    }
    /// Takes back what [`Sheet::to_pairs`] made.
    pub fn from_pairs(value: Value) -> Option<Sheet> {
        serde_json::from_value(value).ok().map(Sheet)
    }
}

fn cut(mut line: String) -> String {
    if line.len() > LINE_LEN_MAX {
        let end = (0..=LINE_LEN_MAX).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0);
        line.truncate(end);
        line.push_str("...");
    }
    line
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::File => "file",
        Kind::Dir => "directory",
        Kind::Symlink => "symbolic link",
        Kind::Fifo => "fifo",
        Kind::Socket => "socket",
        Kind::Char => "character device",
        Kind::Block => "block device",
    }
}

fn when(time_ns: u64) -> String {
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_nanos(time_ns)).to_string()
}

fn text(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

fn looks(sheet: &mut Sheet, stat: &Stat) {
    sheet.add("kind", kind_name(stat.kind()));
    sheet.add("size_bytes", stat.size);
    sheet.add("mode", format!("{:o}", stat.mode & 0o7777));
    sheet.add("owner", format!("{}:{}", stat.uid, stat.gid));
}

fn identity(sheet: &mut Sheet, meta: &Meta) {
    sheet.add("fid", meta.fid.to_string());
    sheet.add("inode", meta.fid.0);
    sheet.add("stamp", meta.stamp.0);
}

/// Which parts of it are here.
fn here(sheet: &mut Sheet, stat: &Stat, meta: &Meta) {
    match stat.kind() {
        Kind::Dir if meta.complete => sheet.add("here", "all entries"),
        Kind::Dir => sheet.add("here", "not all entries: it is listed at its next use"),
        Kind::File if meta.complete => sheet.add("here", "all of it"),
        Kind::File => {
            let ranges = meta.present(stat.size);
            let have: u64 = ranges.iter().map(|range| range.len).sum();
            sheet.add("here_bytes", have);
            let lines = ranges.iter().take(SHOWN_MAX);
            let lines = lines.map(|it| format!("{}..{}", it.at, it.at + it.len)).collect();
            sheet.list("here_ranges", ranges.len(), lines);
        }
        _ => {}
    }
}

// ---- an object in a mount ---------------------------------------------------------------------

/// The object at `path` in a mount's cache. `right`: what may be done with it without asking.
///
/// # Errors
/// Why there is nothing to be said.
pub fn in_mount(
    cache: &Cache,
    path: &[u8],
    right: &dyn Fn(Fid) -> &'static str,
) -> Result<Sheet, String> {
    let known = |e: TreeError| match e {
        TreeError::Os(Errno::NOENT) => {
            "it is not in the cache; a look at it in the mount would ask the server".to_owned()
        }
        e => e.to_string(),
    };
    let (stat, meta) = look_up(cache, path).map_err(known)?;
    let mut sheet = Sheet::default();
    sheet.add("path", text(path));
    looks(&mut sheet, &stat);
    identity(&mut sheet, &meta);
    here(&mut sheet, &stat, &meta);
    let promise = match () {
        () if !cache.is_online() => "away: the server cannot be asked",
        () if cache.current(&meta) => "current",
        () => "stale: it is fetched anew at its next use",
    };
    sheet.add("promise", promise);
    sheet.add("right", right(meta.fid));
    sheet.add("open_for_writing", cache.written(meta.fid).is_some());
    records(&mut sheet, cache, &meta).map_err(|e| e.to_string())?;
    let place = cache.state.dir().parent().unwrap_or(Path::new("/")).join("tree");
    sheet.add("cached_at", place.join(OsStr::from_bytes(path)).to_string_lossy());
    Ok(sheet)
}

fn look_up(cache: &Cache, path: &[u8]) -> Result<(Stat, Meta), TreeError> {
    let tree = &cache.tree;
    let mut dir = tree.root().clone();
    let mut names = path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()).peekable();
    if names.peek().is_none() {
        return Ok((at::fstat(&*dir)?, dir.meta()));
    }
    while let Some(raw) = names.next() {
        let name = Name::new(raw).map_err(|_| Errno::INVAL)?;
        if names.peek().is_some() {
            dir = tree.open_dir(&dir, &name)?;
            continue;
        }
        let stat = at::stat(&*dir, raw)?;
        let meta = tree.meta(&dir, &name)?.ok_or(Errno::NOENT)?;
        return Ok((stat, meta));
    }
    Err(Errno::NOENT.into())
}

/// What pends of the object, and who changed it last.
fn records(sheet: &mut Sheet, cache: &Cache, meta: &Meta) -> io::Result<()> {
    let about = |entry: &Entry| {
        let op = &entry.record.op;
        entry.outcome != Outcome::Void
            && (op.fid() == Some(meta.fid) || op.other() == Some(meta.fid))
    };
    let acked = cache.pending().acked_upto();
    let (mut lines, mut count, mut newest) = (Vec::new(), 0, None);
    let mut looked = 0;
    for entry in cache.log.entries(acked.next().max(cache.log.first())).take(RECORDS_MAX) {
        let entry = entry.map_err(io::Error::other)?;
        looked += 1;
        if about(&entry) {
            if lines.len() < SHOWN_MAX {
                lines.push(cut(render::line(&entry)));
            }
            count += 1;
            newest = Some(entry);
        }
    }
    sheet.list("pending", count, lines);
    if looked == RECORDS_MAX {
        sheet.add("pending_looked_at", looked);
    }
    if newest.is_none() {
        let back = cache.log.entries_back(acked).take(RECORDS_MAX).filter_map(Result::ok);
        newest = back.into_iter().find(about);
    }
    let changed = match newest {
        Some(entry) => format!(
            "here, by uid {}, at {}: record {}{}",
            entry.record.uid,
            when(entry.record.time_ns),
            entry.seq.0,
            if entry.seq > acked { ", which the server lacks" } else { "" },
        ),
        None => "not here, as far as the journal goes back".to_owned(),
    };
    sheet.add("changed", changed);
    Ok(())
}

// ---- files ------------------------------------------------------------------------------------

/// An object in a served directory, or in the tree of a cache; `path` from its root.
///
/// # Errors
/// It is not there, or cannot be read.
pub fn in_house(house: &House, path: &Path) -> io::Result<Sheet> {
    let errno = |e: Errno| io::Error::from_raw_os_error(e.raw_os_error());
    let root = at::open_root(&house.tree).map_err(errno)?;
    let raw = path.as_os_str().as_bytes();
    let (dir, name) = match raw.iter().rposition(|byte| *byte == b'/') {
        Some(cut) => {
            let dir = at::open_beneath(&root, &raw[..cut], at::o::DIRECTORY).map_err(errno)?;
            (dir, &raw[cut + 1..])
        }
        None => (root, raw),
    };
    let stat = match name {
        b"" => at::fstat(&dir),
        name => at::stat(&dir, name),
    };
    let stat = stat.map_err(errno)?;
    let mut sheet = Sheet::default();
    sheet.add("path", text(raw));
    looks(&mut sheet, &stat);
    let known = match xattr::get(&dir, name, own_key()) {
        Err(Errno::OPNOTSUPP | Errno::PERM) => Ok(None),
        known => known,
    };
    match known.map_err(errno)?.map(|value| Meta::decode(&value)) {
        None => sheet.add("known", "no: it gets its fid when a client first sees it"),
        Some(Err(e)) => sheet.add("known", format!("damaged: {e}; imz fsck says what to do")),
        Some(Ok(meta)) => {
            identity(&mut sheet, &meta);
            match house.side {
                Side::Cache => here(&mut sheet, &stat, &meta),
                Side::Served => changed(&mut sheet, house, &meta),
            }
        }
    }
    Ok(sheet)
}

/// Who changed an object of a served directory last: its stamp leads to that record.
fn changed(sheet: &mut Sheet, house: &House, meta: &Meta) {
    if meta.stamp == Stamp(0) {
        return sheet.add("changed", "by no client since it is served");
    }
    let lives = Lives::beside(&house.journal).unwrap_or_default();
    let entry = lives.seq(meta.stamp).and_then(|seq| {
        let bound = Some(Bound::Seq(seq));
        let options = Options { from: bound, to: bound, ..Options::default() };
        Dump::open(&house.journal, options).ok()?.next()
    });
    let who = match host(house, meta.author) {
        Some(host) => format!("by client {} ({host})", meta.author),
        None => format!("by client {}", meta.author),
    };
    match entry {
        Some(entry) => {
            let record = &entry.record;
            let time = when(record.time_ns);
            sheet.add("changed", format!("{who}, uid {}, at {time}", record.uid));
            sheet.add("record", cut(render::line(&entry)));
        }
        None => sheet.add("changed", format!("{who}; the history of it is not here")),
    }
}

fn host(house: &House, number: u32) -> Option<String> {
    let nodes = Nodes::open(&house.state).ok()?;
    nodes.all().iter().find(|node| node.number == number).map(|node| node.host.clone())
}

/// A cache, or a served directory with its state.
///
/// # Errors
/// Its files cannot be read.
pub fn house(house: &House) -> io::Result<Sheet> {
    let mut sheet = Sheet::default();
    sheet.add("is", house.side.name());
    sheet.add("path", house.dir.to_string_lossy());
    match state::read(&house.state.join(state::FILE)) {
        Ok(facts) => who(&mut sheet, house.side, &facts),
        Err(e) => sheet.add("state", e.to_string()),
    }
    let mut pending = (0, Vec::new());
    if house.journal.is_dir() {
        let acked = salvage::cursors(&house.journal).get(ACKED).unwrap_or(0);
        let survey = salvage::survey(&house.journal, None, &mut |entry| {
            let pends =
                house.side == Side::Cache && entry.seq.0 > acked && entry.outcome != Outcome::Void;
            if pends {
                if pending.1.len() < SHOWN_MAX {
                    pending.1.push(cut(render::line(entry)));
                }
                pending.0 += 1;
            }
        })?;
        journal_lines(&mut sheet, &survey);
    }
    match house.side {
        Side::Cache => {
            sheet.list("pending", pending.0, pending.1);
            granted(&mut sheet, house);
            sheet.add("limbo", count(&house.state.join("limbo")));
        }
        Side::Served => {
            clients(&mut sheet, house);
            grants(&mut sheet, house);
            let conflicts = house.tree.join(OsStr::from_bytes(CONFLICTS_NAME));
            sheet.add("conflicts", count(&conflicts));
        }
    }
    sheet.add("lost_found", count(&house.lost_found()));
    Ok(sheet)
}

fn count(dir: &Path) -> usize {
    fs::read_dir(dir).map_or(0, Iterator::count)
}

fn who(sheet: &mut Sheet, side: Side, facts: &Facts) {
    sheet.add("volume", &*facts.volume);
    sheet.add("volume_id", &*facts.volume_id);
    if side == Side::Cache {
        sheet.add("source", &*facts.source);
        sheet.add("node", facts.node);
        sheet.add("epoch", facts.epoch);
    }
    sheet.add("incarnation", &*facts.incarnation);
    sheet.add("next_fid", facts.fid_next);
    let clean = if facts.clean { "cleanly" } else { "it runs, or did not end cleanly" };
    sheet.add("ended", clean);
}

fn clients(sheet: &mut Sheet, house: &House) {
    match Nodes::open(&house.state) {
        Err(e) => sheet.add("clients", e.to_string()),
        Ok(nodes) => {
            let all = nodes.all();
            let line = |node: &super::nodes::Node| {
                cut(format!("{} {} has {} records here", node.number, node.host, node.last))
            };
            // the newest are the ones that are asked after
            let lines = all.iter().rev().take(SHOWN_MAX).map(line).collect();
            sheet.list("clients", all.len(), lines);
            sheet.add("clients_as_of", nodes.as_of().0);
        }
    }
}

/// What the server granted to this cache.
fn granted(sheet: &mut Sheet, house: &House) {
    match FiguresFile::of(&house.state).load() {
        Err(e) => sheet.add("granted", format!("damaged: {e}; imz fsck says what to do")),
        Ok(None) => sheet.add("granted", "nothing yet"),
        Ok(Some(figures)) => {
            let (bytes, files) = figures.outstanding();
            sheet.add("granted_bytes", bytes);
            sheet.add("granted_files", files);
            sheet.add("granted_as_of", figures.upto);
        }
    }
}

/// What clients hold of the volume's room.
fn grants(sheet: &mut Sheet, house: &House) {
    let book = match BookFile::of(&house.state).load() {
        Err(e) => return sheet.add("grants", format!("damaged: {e}; imz fsck says what to do")),
        Ok(book) => book.unwrap_or_default(),
    };
    let line = |line: &super::room::Line| {
        let (bytes, files) = line.outstanding();
        let who = host(house, line.node).unwrap_or_default();
        cut(format!("{} {who} up to {bytes} bytes, {files} files", line.node))
    };
    let lines = book.nodes.iter().rev().take(SHOWN_MAX).map(line).collect();
    sheet.list("grants", book.nodes.len(), lines);
}

/// A journal's directory.
///
/// # Errors
/// It cannot be read.
pub fn journal(dir: &Path) -> io::Result<Sheet> {
    let mut sheet = Sheet::default();
    sheet.add("is", "journal");
    sheet.add("path", dir.to_string_lossy());
    let mut kinds = std::collections::BTreeMap::<&str, u64>::new();
    let mut times = None;
    let survey = salvage::survey(dir, None, &mut |entry| {
        *kinds.entry(crate::kml::codec::kind_name(&entry.record.op)).or_default() += 1;
        let time = entry.record.time_ns;
        times = Some((times.map_or(time, |(first, _)| first), time));
    })?;
    journal_lines(&mut sheet, &survey);
    if let Some((first, last)) = times {
        sheet.add("oldest", when(first));
        sheet.add("newest", when(last));
    }
    let kinds = kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect::<Vec<_>>();
    sheet.add("kinds", kinds);
    Ok(sheet)
}

fn journal_lines(sheet: &mut Sheet, survey: &Survey) {
    sheet.add("records", survey.count);
    sheet.add("records_bytes", survey.used_len);
    let range = match survey.count {
        0 => "none".to_owned(),
        _ => format!("{} to {}", survey.first().0, survey.last.0),
    };
    sheet.add("numbers", range);
    sheet.add("segments", survey.segments.len());
    if let Some(page) = survey.cursors.newest() {
        let cursor = |(name, value): &(Vec<u8>, u64)| format!("{} {value}", text(name));
        sheet.add("cursors", page.cursors.iter().map(cursor).collect::<Vec<_>>());
    }
    let damage = match survey.is_damaged() {
        true => "damaged: imz fsck says where, and what to do",
        false => "whole",
    };
    sheet.add("journal", damage);
}
