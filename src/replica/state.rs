//! What a node remembers about itself beside its tree: one small file, written whole.
//!
//! `state.json` in the state directory, replaced by rename after an fsync. It holds the volume's
//! identity, the node's number and incarnation, the next free fid counter (reserved in blocks, so
//! that a crash skips numbers and never repeats one), the cache's epoch, and whether the last
//! stop was clean. `lock` beside it is held while a process lives; `state.json.old` is the file as
//! it was before the last change, for `imz fsck`. A checksum of all other keys stands in the key
//! `crc32` ([`seal`]): a digit that has become another must not pass for a fact.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::lives::Table;
use super::settings::Settings;
use crate::kml::record::Fid;
use crate::sys::{self, boot, crash};

/// The file in a state directory.
pub const FILE: &str = "state.json";
/// The file before its last change.
pub const OLD_FILE: &str = "state.json.old";
/// The key of the checksum in a file of ours.
const CRC_KEY: &str = "crc32";
/// Fid counters that one write of the file sets aside.
pub const RESERVE: u64 = 65536;

/// The file's contents.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Facts {
    /// of this file's layout
    pub version: u32,
    /// hex of 128 random bits; of the volume, equal at server and clients
    pub volume_id: String,
    /// the volume's name, for people
    pub volume: String,
    /// where the volume came from: `HOST:PORT:/NAME` or a directory; empty at a server
    pub source: String,
    /// 0: the server, or a client that has not met its server
    pub node: u32,
    /// hex of 128 random bits; of this journal's life
    pub incarnation: String,
    /// no fid counter from here on was given away
    pub fid_next: u64,
    /// objects of older epochs are stale
    pub epoch: u32,
    /// false while a process uses the state, and after one that died
    pub clean: bool,
    /// the machine's start in which the state was last found, or put, in order: when it is another
    /// one, and the stop was not clean, power may have been lost
    #[serde(default)]
    pub boot_id: String,
    /// of a served volume: when its last server stopped cleanly, and since when nobody has looked at
    /// the tree, nanoseconds since 1970; 0: neither
    #[serde(default)]
    pub stopped_at: u64,
    /// and when the root of the tree was made that was served last, as far as its file system says;
    /// 0: unknown
    #[serde(default)]
    pub root_born: u64,
    /// of a served volume: which stamps its records have
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lives: Table,
    /// what people decided about the volume; at a client, what the server said of it
    #[serde(default, skip_serializing_if = "Settings::is_default")]
    pub settings: Settings,
}

/// The state could not be kept.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path}: is in use by another imz process")]
    InUse { path: PathBuf },
    #[error("{path}: cannot be read: {what}")]
    Damaged { path: PathBuf, what: String },
}

/// An open state directory; no other process has it open.
pub struct State {
    dir: PathBuf,
    facts: Mutex<(Facts, u64)>,
    _lock: File,
}

impl State {
    /// Opens `dir`, creating it for a new volume `fresh` where there is none.
    pub fn open(dir: &Path, fresh: impl FnOnce() -> Facts) -> Result<State, StateError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| StateError::Io { path, source }
        };
        fs::create_dir_all(dir).map_err(io(dir))?;
        let lock_path = dir.join("lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(io(&lock_path))?;
        match sys::fs::try_lock(&lock) {
            Ok(true) => {}
            Ok(false) => return Err(StateError::InUse { path: dir.to_owned() }),
            Err(e) => return Err(io(&lock_path)(e.into())),
        }
        let path = dir.join(FILE);
        let facts = match fs::read(&path) {
            Ok(bytes) => read_facts(&path, &bytes)?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => fresh(),
            Err(e) => return Err(io(&path)(e)),
        };
        let high = facts.fid_next;
        let state = State { dir: dir.to_owned(), facts: Mutex::new((facts, high)), _lock: lock };
        state.edit(|_| ())?;
        Ok(state)
    }

    pub fn facts(&self) -> Facts {
        self.held().0.clone()
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Changes the facts. Durable on return: yes.
    pub fn edit(&self, change: impl FnOnce(&mut Facts)) -> Result<(), StateError> {
        let mut held = self.held();
        let mut facts = held.0.clone();
        change(&mut facts);
        // The file always names a counter that was not given away yet.
        let stored = Facts { fid_next: held.1.max(facts.fid_next), ..facts.clone() };
        self.write(&stored)?;
        held.0 = facts;
        Ok(())
    }

    /// A fid that was never given before.
    pub fn new_fid(&self) -> Result<Fid, StateError> {
        let mut held = self.held();
        if held.0.fid_next >= held.1 {
            let high = held.0.fid_next + RESERVE;
            self.write(&Facts { fid_next: high, ..held.0.clone() })?;
            held.1 = high;
        }
        let fid = Fid::new(held.0.node, held.0.fid_next);
        held.0.fid_next += 1;
        Ok(fid)
    }

    fn write(&self, facts: &Facts) -> Result<(), StateError> {
        let path = self.dir.join(FILE);
        let fresh = self.dir.join("state.json.new");
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&fresh)?;
            file.write_all(&seal(facts)?)?;
            file.sync_all()?;
            crash::point("state-written");
            keep_old(&path, &self.dir.join(OLD_FILE))?;
            fs::rename(&fresh, &path)?;
            crash::point("state-named");
            File::open(&self.dir)?.sync_all()
        };
        write().map_err(|source| StateError::Io { path: path.clone(), source })
    }

    fn held(&self) -> std::sync::MutexGuard<'_, (Facts, u64)> {
        self.facts.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Gives the file a second name. Where a file system has no such names there is no old one.
fn keep_old(path: &Path, old: &Path) -> std::io::Result<()> {
    for gone in [fs::remove_file(old), fs::hard_link(path, old)] {
        match gone {
            Err(e) if !is_fine(e.kind()) => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

fn is_fine(kind: std::io::ErrorKind) -> bool {
    use std::io::ErrorKind::{NotFound, PermissionDenied, Unsupported};
    matches!(kind, NotFound | PermissionDenied | Unsupported)
}

/// The facts in a file of a state directory that nobody has open. Nothing is changed.
///
/// # Errors
/// `Io` (also where there is none) and `Damaged`.
pub fn read(path: &Path) -> Result<Facts, StateError> {
    let bytes = fs::read(path).map_err(|source| StateError::Io { path: path.into(), source })?;
    read_facts(path, &bytes)
}

/// A value as JSON with a checksum of it.
pub fn seal(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut value = serde_json::to_value(value)?;
    // keys are sorted, here as in `unseal`
    let crc = crc32fast::hash(&serde_json::to_vec(&value)?);
    if let Value::Object(keys) = &mut value {
        keys.insert(CRC_KEY.to_owned(), crc.into());
    }
    let mut bytes = serde_json::to_vec_pretty(&value)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Takes back what [`seal`] made. What has no checksum was written before there was one.
///
/// # Errors
/// Why it is not to be believed.
pub fn unseal<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    let mut value: Value = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    if let Some(crc) = value.as_object_mut().and_then(|keys| keys.remove(CRC_KEY)) {
        let rest = serde_json::to_vec(&value).map_err(|e| e.to_string())?;
        if crc != crc32fast::hash(&rest) {
            return Err("its checksum is wrong".to_owned());
        }
    }
    serde_json::from_value(value).map_err(|e| e.to_string())
}

fn read_facts(path: &Path, bytes: &[u8]) -> Result<Facts, StateError> {
    let damaged = |what: String| StateError::Damaged { path: path.to_owned(), what };
    let facts: Facts = unseal(bytes).map_err(damaged)?;
    if facts.version != 1 {
        return Err(damaged(format!("version {} is not known", facts.version)));
    }
    Ok(facts)
}

impl Facts {
    /// A new volume or cache with a new incarnation.
    pub fn new(volume: &str, source: &str, volume_id: u128, node: u32) -> Facts {
        Facts {
            version: 1,
            volume_id: hex(volume_id),
            volume: volume.to_owned(),
            source: source.to_owned(),
            node,
            incarnation: hex(random()),
            fid_next: 2, // 1 is the root
            epoch: 1,
            clean: true,
            boot_id: boot::id(),
            stopped_at: 0,
            root_born: 0,
            lives: Table::new(),
            settings: Settings::default(),
        }
    }

    /// Whether what was in the page cache when the last process ended may be lost.
    pub fn power_lost(&self) -> bool {
        let now = boot::id();
        !self.clean && (now.is_empty() || self.boot_id != now)
    }

    pub fn volume_id(&self) -> u128 {
        u128::from_str_radix(&self.volume_id, 16).unwrap_or(0)
    }

    pub fn incarnation(&self) -> u128 {
        u128::from_str_radix(&self.incarnation, 16).unwrap_or(0)
    }
}

pub fn hex(n: u128) -> String {
    format!("{n:032x}")
}

/// 128 random bits from the kernel.
pub fn random() -> u128 {
    let mut bytes = [0; 16];
    // The kernel's generator does not fail once the machine is up; zeros would be a fault.
    #[allow(clippy::expect_used)]
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    u128::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fids_are_never_given_twice() {
        let dir = tempfile::tempdir().unwrap();
        let open = || State::open(dir.path(), || Facts::new("v", "", 7, 3)).unwrap();
        let state = open();
        let first: Vec<Fid> = (0..3).map(|_| state.new_fid().unwrap()).collect();
        state.edit(|f| f.epoch += 1).unwrap();
        assert_eq!(first[0], Fid::new(3, 2));
        drop(state); // as after a kill: nothing was written at the end
        let state = open();
        assert_eq!(state.facts().epoch, 2);
        let next = state.new_fid().unwrap();
        assert!(next > first[2], "{next:?} was given before");
    }

    #[test]
    fn no_digit_becomes_another_unseen() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::open(dir.path(), || Facts::new("v", "h:/v", 7, 3)).unwrap();
        let facts = state.facts();
        drop(state);
        let path = dir.path().join(FILE);
        let good = fs::read(&path).unwrap();
        assert_eq!(read(&path).unwrap(), facts);
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            // blanks may become other blanks, and the name of the check that of nothing
            let found = unseal::<Facts>(&bad);
            assert!(found.is_err() || found == Ok(facts.clone()), "bit {bit}: {found:?}");
        }
        let plain = serde_json::to_vec(&facts).unwrap();
        assert_eq!(unseal(&plain), Ok(facts), "of before there was a check");
    }

    #[test]
    fn the_file_before_the_last_change_is_there_too() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::open(dir.path(), || Facts::new("v", "", 7, 3)).unwrap();
        state.edit(|f| f.epoch = 8).unwrap();
        state.edit(|f| f.epoch = 9).unwrap();
        assert_eq!(read(&dir.path().join(OLD_FILE)).unwrap().epoch, 8);
        assert_eq!(read(&dir.path().join(FILE)).unwrap().epoch, 9);
    }

    #[test]
    fn a_second_process_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let fresh = || Facts::new("v", "", 7, 0);
        let _held = State::open(dir.path(), fresh).unwrap();
        let again = State::open(dir.path(), fresh);
        assert!(matches!(again, Err(StateError::InUse { .. })));
    }
}
