//! `imz inspect`: finds out what a path is, without touching a mount, and shows its sheet.

use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use indicatif::HumanBytes;
use serde_json::Value;

use super::{Exit, fail, place, print};
use crate::cli::check::InspectArgs;
use crate::kml::codec::SEGMENT_MAGIC;
use crate::kml::dump::{Dump, Options};
use crate::kml::store::segments_in;
use crate::net::control;
use crate::replica::fsck::{FsckError, House};
use crate::replica::inspect::{self, Sheet};

/// # Errors
/// It is nothing of imz's (exit code 5), or the process of its mount does not answer.
pub fn run(args: &InspectArgs) -> anyhow::Result<()> {
    let sheet = sheet(&args.path).with_context(|| args.path.display().to_string())?;
    let text = match args.json {
        true => serde_json::to_string_pretty(&sheet.into_json())? + "\n",
        false => render(&sheet),
    };
    Ok(print(&text)?)
}

fn sheet(path: &Path) -> anyhow::Result<Sheet> {
    if let Some((place, rest)) = place::within(path)? {
        return match rest.as_os_str().is_empty() {
            true => mount(&place),
            false => {
                let said = control::inspect(&place.socket, rest.as_os_str().as_bytes());
                let said = said.map_err(place::unanswered)?;
                Sheet::from_pairs(said).context("the answer of its process makes no sense")
            }
        };
    }
    let found = match path.symlink_metadata() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return fail(Exit::NotFound, "there is nothing of this name");
        }
        found => found?,
    };
    if found.is_dir() {
        if segments_in(path).is_ok_and(|segments| !segments.is_empty()) {
            return Ok(inspect::journal(path)?);
        }
        if let Ok(house) = House::find(path, None) {
            return Ok(inspect::house(&house)?);
        }
        if path.join("kml").is_dir() {
            return Ok(inspect::journal(&path.join("kml"))?);
        }
    } else if found.is_file() && is_segment(path) {
        return segment(path);
    }
    match house_of(path)? {
        Some((house, rest)) => Ok(inspect::in_house(&house, &rest)?),
        None => fail(Exit::NotFound, "it is in no mount, no cache and no served directory"),
    }
}

/// What the process of a mount says of it.
fn mount(place: &place::Place) -> anyhow::Result<Sheet> {
    let status = control::status(&place.socket).map_err(place::unanswered)?;
    let mut sheet = Sheet(vec![("is".to_owned(), "mount point".into())]);
    if let Value::Object(keys) = serde_json::to_value(&status)? {
        sheet.0.extend(keys);
    }
    Ok(sheet)
}

fn is_segment(path: &Path) -> bool {
    let mut magic = [0; SEGMENT_MAGIC.len()];
    let read = std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    read.is_ok() && magic == SEGMENT_MAGIC
}

fn segment(path: &Path) -> anyhow::Result<Sheet> {
    let mut dump = Dump::open(path, Options::default())?;
    let (mut count, mut seqs) = (0u64, None);
    for entry in dump.by_ref() {
        count += 1;
        seqs = Some((seqs.map_or(entry.seq.0, |(first, _)| first), entry.seq.0));
    }
    let numbers = seqs.map_or("none".to_owned(), |(first, last)| format!("{first} to {last}"));
    let pairs: [(&str, Value); 5] = [
        ("is", "segment of a journal".into()),
        ("path", path.to_string_lossy().into()),
        ("records", count.into()),
        ("numbers", numbers.into()),
        ("ends", dump.end().to_string().into()),
    ];
    Ok(Sheet(pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()))
}

/// The cache or served directory that an object is in, and its path there.
fn house_of(path: &Path) -> anyhow::Result<Option<(House, PathBuf)>> {
    // the object itself may be a link: only what is above it is resolved
    let absolute = std::path::absolute(path)?;
    let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else {
        return Ok(None);
    };
    let real = parent.canonicalize()?.join(name);
    for above in real.ancestors().skip(1) {
        let house = match House::find(above, None) {
            Ok(house) => house,
            Err(FsckError::StateElsewhere { path }) => House::tree_of(&path),
            Err(_) => continue,
        };
        if let Ok(rest) = real.strip_prefix(&house.tree) {
            return Ok(Some((house, rest.to_owned())));
        }
    }
    Ok(None)
}

/// One aligned line a value; lists are below, a line each.
fn render(sheet: &Sheet) -> String {
    let width = sheet.0.iter().map(|(key, _)| label(key).len()).max().unwrap_or(0);
    let mut text = String::new();
    for (key, value) in &sheet.0 {
        let name = label(key);
        match value {
            Value::Array(lines) => {
                for (nth, line) in lines.iter().enumerate() {
                    let name = if nth == 0 { &*name } else { "" };
                    text.push_str(&format!("{name:<width$}  {}\n", shown(key, line)));
                }
            }
            value => text.push_str(&format!("{name:<width$}  {}\n", shown(key, value))),
        }
    }
    text
}

/// `cache_dirty_bytes` is read as `cache dirty`.
fn label(key: &str) -> String {
    key.strip_suffix("_bytes").unwrap_or(key).replace('_', " ")
}

fn shown(key: &str, value: &Value) -> String {
    match value {
        Value::Null => "none".to_owned(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::Number(n) if key.ends_with("_bytes") => match n.as_u64() {
            Some(n) if n >= 1024 => format!("{} ({n} bytes)", HumanBytes(n)),
            Some(n) => format!("{n} bytes"),
            None => n.to_string(),
        },
        Value::String(text) if text.chars().any(char::is_control) => format!("{text:?}"),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_read_aligned_lines() {
        let pairs = serde_json::json!([
            ["path", "a\nb"],
            ["size_bytes", 2048],
            ["here_bytes", 5],
            ["open_for_writing", false],
            ["pending", 2],
            ["pending_first", ["1 create", "2 store"]],
            ["last_error", null]
        ]);
        let want = "\
path              \"a\\nb\"
size              2.00 KiB (2048 bytes)
here              5 bytes
open for writing  no
pending           2
pending first     1 create
                  2 store
last error        none
";
        assert_eq!(render(&Sheet::from_pairs(pairs).unwrap()), want);
    }
}
