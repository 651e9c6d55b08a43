//! A server's configuration file: read with the line of every fault, changed with its comments kept.
//!
//! imz-serve(1) shows one. The file is the truth for all that it can say, so what `imz volume`
//! changes in a running server is changed in the file, too: prepared before ([`ConfigFile::stage`]),
//! when it can still fail, and put in its place after ([`Staged::commit`]). Durable on return: yes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use toml_edit::{ArrayOfTables, Document, DocumentMut, Item, Table, TableLike, Value};

use crate::cli::options::{self, Bound};
use crate::replica::settings::{Change, Limit, Quota, USERS_MAX};

/// Longest file, bytes.
const LEN_MAX: u64 = 1 << 20;
const KEYS: [&str; 4] = ["listen", "state", "keep_grant", "volume"];
const VOLUME_KEYS: [&str; 7] =
    ["name", "dir", "state", "quota", "quota_files", "mode", "user_quota"];

/// What a file says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Config {
    pub listen: Option<SocketAddr>,
    pub state: Option<PathBuf>,
    pub keep_grant: Option<Duration>,
    pub volumes: Vec<VolumeConfig>,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct VolumeConfig {
    pub name: String,
    pub dir: PathBuf,
    pub state: Option<PathBuf>,
    pub quota: Quota,
    pub read_only: bool,
    pub users: BTreeMap<u32, u64>,
    /// where it begins in the file
    pub line: usize,
}

/// What is wrong, and in which line (from 1).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    pub line: usize,
    pub what: String,
}

/// Reads a configuration.
///
/// # Errors
/// All faults that there are, in the order of their lines; of the syntax only the first one.
pub fn parse(text: &str) -> Result<Config, Vec<Fault>> {
    let mut reader = Reader { text, faults: Vec::new() };
    let document = match Document::parse(text) {
        Ok(document) => document,
        Err(e) => {
            let line = reader.line(e.span());
            let what = e.message().trim().replace('\n', ", ");
            return Err(vec![Fault { line, what }]);
        }
    };
    let config = reader.config(document.as_table());
    let Reader { mut faults, .. } = reader;
    faults.sort_by_key(|fault| fault.line);
    if faults.is_empty() { Ok(config) } else { Err(faults) }
}

/// What only a look at the disk shows: directories that are not there.
pub fn check_dirs(config: &Config) -> Vec<Fault> {
    let missing = |volume: &&VolumeConfig| !volume.dir.is_dir();
    let fault = |volume: &VolumeConfig| {
        let dir = volume.dir.display();
        let what = format!("volume {}: {dir}: no such directory; make it first", volume.name);
        Fault { line: volume.line, what }
    };
    config.volumes.iter().filter(missing).map(fault).collect()
}

struct Reader<'a> {
    text: &'a str,
    faults: Vec<Fault>,
}

type Span = Option<std::ops::Range<usize>>;

impl Reader<'_> {
    fn line(&self, span: Span) -> usize {
        let before = span.map_or(0, |span| span.start.min(self.text.len()));
        1 + self.text.as_bytes()[..before].iter().filter(|byte| **byte == b'\n').count()
    }
    fn fault(&mut self, line: usize, what: impl Into<String>) {
        self.faults.push(Fault { line, what: what.into() });
    }
    fn known(&mut self, table: &dyn TableLike, keys: &[&str]) {
        for (name, item) in table.iter().filter(|(name, _)| !keys.contains(name)) {
            let line = self.line(key_span(table, name).or(item.span()));
            self.fault(line, format!("unknown key {name}; known here: {}", keys.join(", ")));
        }
    }
    /// The value of a key, if there is one and it is as it should be.
    fn value<'t, T>(
        &mut self,
        table: &'t dyn TableLike,
        name: &str,
        read: impl FnOnce(&'t Item) -> Result<T, String>,
    ) -> Option<T> {
        let item = table.get(name)?;
        match read(item) {
            Ok(value) => Some(value),
            Err(why) => {
                let line = self.line(key_span(table, name).or(item.span()));
                self.fault(line, format!("{name}: {why}"));
                None
            }
        }
    }

    fn config(&mut self, table: &Table) -> Config {
        self.known(table, &KEYS);
        let listen = self.value(table, "listen", |item| {
            options::listen(text_of(item)?).map_err(|e| e.to_string())
        });
        let state = self.value(table, "state", path_of);
        let keep_grant = self.value(table, "keep_grant", |item| {
            options::duration(text_of(item)?).map_err(|e| e.to_string())
        });
        let tables = self.value(table, "volume", |item| {
            item.as_array_of_tables().ok_or("each volume begins with [[volume]]".to_owned())
        });
        let tables = tables.into_iter().flat_map(ArrayOfTables::iter);
        let volumes: Vec<VolumeConfig> = tables.map(|table| self.volume(table)).collect();
        let (mut names, mut dirs) = (BTreeSet::new(), BTreeSet::new());
        for volume in &volumes {
            if !volume.name.is_empty() && !names.insert(&volume.name) {
                let what =
                    format!("there is a volume {} already; choose another name", volume.name);
                self.fault(volume.line, what);
            }
            if !volume.dir.as_os_str().is_empty() && !dirs.insert(&volume.dir) {
                let what = format!("{} is a volume already", volume.dir.display());
                self.fault(volume.line, what);
            }
        }
        Config { listen, state, keep_grant, volumes }
    }
    fn volume(&mut self, table: &Table) -> VolumeConfig {
        let line = self.line(table.span());
        self.known(table, &VOLUME_KEYS);
        for name in ["name", "dir"].into_iter().filter(|name| !table.contains_key(name)) {
            self.fault(line, format!("the volume has no {name}"));
        }
        let name = self.value(table, "name", |item| {
            options::volume_name(text_of(item)?).map_err(|e| e.to_string())
        });
        let dir = self.value(table, "dir", path_of);
        let state = self.value(table, "state", path_of);
        let bytes = self.value(table, "quota", size_of).flatten();
        let files = self.value(table, "quota_files", |item| {
            let text = item.as_integer().map(|n| n.to_string());
            let text = text.as_deref().or(item.as_str()).unwrap_or_default();
            Bound::count(text).map(|bound| bound.0).map_err(|e| e.to_string())
        });
        let read_only = self.value(table, "mode", |item| match text_of(item)? {
            "rw" => Ok(false),
            "ro" => Ok(true),
            _ => Err("write \"rw\" or \"ro\"".to_owned()),
        });
        let users = self.value(table, "user_quota", |item| {
            item.as_table_like().ok_or("write [volume.user_quota] and a line for each user".into())
        });
        let users = users.map_or_else(BTreeMap::new, |users| self.users(users));
        VolumeConfig {
            name: name.unwrap_or_default(),
            dir: dir.unwrap_or_default(),
            state,
            quota: Quota { bytes, files: files.flatten() },
            read_only: read_only.unwrap_or_default(),
            users,
            line,
        }
    }
    fn users(&mut self, table: &dyn TableLike) -> BTreeMap<u32, u64> {
        let mut users = BTreeMap::new();
        for (name, _) in table.iter() {
            let user = self.value(table, name, |item| {
                let uid = name.parse::<u32>().map_err(|_| "a user is told by its number")?;
                Ok((uid, size_of(item)?))
            });
            if let Some((uid, Some(bytes))) = user {
                users.insert(uid, bytes);
            }
        }
        if users.len() > USERS_MAX {
            let line = self.line(table.iter().next().and_then(|(name, _)| key_span(table, name)));
            self.fault(line, format!("at most {USERS_MAX} users can have limits of their own"));
        }
        users
    }
}

fn key_span(table: &dyn TableLike, name: &str) -> Span {
    table.key(name).and_then(toml_edit::Key::span)
}

fn text_of(item: &Item) -> Result<&str, String> {
    item.as_str().ok_or_else(|| "write a text in quotation marks".to_owned())
}

fn path_of(item: &Item) -> Result<PathBuf, String> {
    let path = PathBuf::from(text_of(item)?);
    match path.is_absolute() {
        true => Ok(path.components().collect()),
        false => Err(format!("{}: write the whole path, from / on", path.display())),
    }
}

fn size_of(item: &Item) -> Result<Option<u64>, String> {
    let text = item.as_integer().map(|n| n.to_string());
    let text = text.as_deref().or(item.as_str()).unwrap_or_default();
    Bound::size(text).map(|bound| bound.0).map_err(|e| e.to_string())
}

/// A change of a file.
pub enum Edit<'a> {
    Add(&'a VolumeConfig),
    Remove(&'a str),
    /// `state`: where its state is, if its name said that so far
    Rename {
        name: &'a str,
        to: &'a str,
        state: Option<&'a Path>,
    },
    Set {
        name: &'a str,
        change: &'a Change,
    },
}

/// The text with the change in it, and everything else as it was.
///
/// # Errors
/// Why that cannot be, for people.
pub fn edit(text: &str, edit: &Edit) -> Result<String, String> {
    parse(text).map_err(|faults| {
        let first = faults.first().map(ToString::to_string).unwrap_or_default();
        format!("it was changed since the server read it, and has a fault: {first}")
    })?;
    let mut document: DocumentMut = text.parse().map_err(|_| "it cannot be read".to_owned())?;
    let item = document.entry("volume").or_insert(Item::ArrayOfTables(ArrayOfTables::new()));
    let Some(all) = item.as_array_of_tables_mut() else {
        return Err("it has no [[volume]]".into());
    };
    let find = |name: &str| {
        let is_it = |table: &Table| table.get("name").and_then(Item::as_str) == Some(name);
        let gone = || format!("it has no volume {name} any more; it was changed meanwhile");
        all.iter().position(is_it).ok_or_else(gone)
    };
    match edit {
        Edit::Add(volume) => {
            if find(&volume.name).is_ok() {
                return Err(format!("it has a volume {} already", volume.name));
            }
            all.push(table_of(volume)?);
        }
        Edit::Remove(name) => {
            let at = find(name)?;
            all.remove(at);
        }
        Edit::Rename { name, to, state } => {
            let at = find(name)?;
            if let Some(table) = all.get_mut(at) {
                put(table, "name", (*to).into());
                if let Some(state) = state {
                    put(table, "state", path_text(state)?.into());
                }
            }
        }
        Edit::Set { name, change } => {
            let at = find(name)?;
            if let Some(table) = all.get_mut(at) {
                set(table, change);
            }
        }
    }
    let text = document.to_string();
    match parse(&text) {
        Ok(_) => Ok(text),
        Err(faults) => Err(faults.first().map(ToString::to_string).unwrap_or_default()),
    }
}

fn table_of(volume: &VolumeConfig) -> Result<Table, String> {
    let mut table = Table::new();
    table.decor_mut().set_prefix("\n");
    put(&mut table, "name", volume.name[..].into());
    put(&mut table, "dir", path_text(&volume.dir)?.into());
    if let Some(state) = &volume.state {
        put(&mut table, "state", path_text(state)?.into());
    }
    let read_only = volume.read_only.then_some(true);
    let change = Change::to(volume.quota, volume.read_only, &volume.users);
    set(&mut table, &Change { read_only, ..change });
    Ok(table)
}

fn path_text(path: &Path) -> Result<&str, String> {
    path.to_str().ok_or_else(|| format!("{}: a file in TOML holds UTF-8 only", path.display()))
}

fn set(table: &mut Table, change: &Change) {
    limit(table, "quota", change.bytes, size_text);
    limit(table, "quota_files", change.files, |count| (count as i64).into());
    if let Some(read_only) = change.read_only {
        put(table, "mode", if read_only { "ro" } else { "rw" }.into());
    }
    if change.users.is_empty() {
        return;
    }
    let users = table.entry("user_quota").or_insert(Item::Table(Table::new()));
    let Some(users) = users.as_table_like_mut() else { return }; // it was parsed as one
    for (uid, bound) in &change.users {
        limit(users, &uid.to_string(), *bound, size_text);
    }
    if users.is_empty() {
        table.remove("user_quota");
    }
}

fn limit(table: &mut dyn TableLike, name: &str, limit: Limit, text: impl Fn(u64) -> Value) {
    match limit {
        Limit::Keep => {}
        Limit::Unlimited => _ = table.remove(name),
        Limit::At(limit) => put(table, name, text(limit)),
    }
}

/// Sets a value, and leaves alone what stands around it.
fn put(table: &mut dyn TableLike, name: &str, mut value: Value) {
    match table.get_mut(name).and_then(Item::as_value_mut) {
        Some(old) => {
            *value.decor_mut() = old.decor().clone();
            *old = value;
        }
        None => _ = table.insert(name, Item::Value(value)),
    }
}

/// A size as people write it, without loss.
fn size_text(bytes: u64) -> Value {
    let units = ["", "K", "M", "G", "T"];
    let mut at = 0;
    let mut number = bytes;
    while number > 0 && number.is_multiple_of(1024) && at + 1 < units.len() {
        number /= 1024;
        at += 1;
    }
    format!("{number}{}", units[at]).into()
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "line {}: {}", self.line, self.what)
    }
}

/// The file that a server was started with.
pub struct ConfigFile(PathBuf);

impl ConfigFile {
    /// # Errors
    /// It is not there, is too long, or is no text.
    pub fn open(path: &Path) -> anyhow::Result<(ConfigFile, String)> {
        let at = || path.display().to_string();
        let path = path.canonicalize().with_context(at)?;
        let text = read(&path).with_context(at)?;
        Ok((ConfigFile(path), text))
    }
    pub fn path(&self) -> &Path {
        &self.0
    }
    /// Prepares a change beside the file.
    ///
    /// # Errors
    /// The file was changed meanwhile, or its directory cannot be written.
    pub fn stage(&self, change: &Edit) -> anyhow::Result<Staged> {
        let at = || format!("{}, from which the server was started", self.0.display());
        let text = read(&self.0).with_context(at)?;
        let text = edit(&text, change).map_err(anyhow::Error::msg).with_context(at)?;
        let mut fresh = self.0.clone().into_os_string();
        fresh.push(".new");
        let staged = Staged { fresh: fresh.into(), path: self.0.clone() };
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&staged.fresh)?;
            file.set_permissions(std::fs::metadata(&self.0)?.permissions())?;
            file.write_all(text.as_bytes())?;
            file.sync_all()
        };
        write().with_context(at)?;
        Ok(staged)
    }
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(LEN_MAX + 1).read_to_string(&mut text)?;
    match text.len() as u64 > LEN_MAX {
        true => Err(std::io::ErrorKind::FileTooLarge.into()),
        false => Ok(text),
    }
}

/// A change that waits to be put in its place; dropped, it never was.
#[must_use]
pub struct Staged {
    fresh: PathBuf,
    path: PathBuf,
}

impl Staged {
    /// # Errors
    /// As rename(2): the file is as it was.
    pub fn commit(self) -> anyhow::Result<()> {
        let at = || format!("{} is not changed", self.path.display());
        std::fs::rename(&self.fresh, &self.path).with_context(at)?;
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        crate::sys::file::sync_dir(dir).with_context(|| dir.display().to_string())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.fresh); // it is not there when all went well
    }
}

#[cfg(test)]
mod tests;
