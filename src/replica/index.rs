//! Where objects stand: fid -> its (parent fid, name) pairs. Rebuildable, never the truth.
//!
//! Changes gather in memory and go to disk together: every lookup sees both. `flush(false)` costs
//! no disk flush and is lost by a kill; `flush(true)` is what a restart finds. The caller makes a
//! durable flush before it trims the journal, so that the journal's tail holds what the index
//! may have forgotten. Objects that cannot carry an extended attribute (symbolic links and
//! special files without root) have their metadata in a second table here.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::Path;
use std::sync::Mutex;

use redb::{Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, TableDefinition};

use crate::kml::record::{Fid, Name};
use crate::sys::crash;

pub mod view;

const NAMES: TableDefinition<u64, &[u8]> = TableDefinition::new("names");
const LOOSE: TableDefinition<&[u8], &[u8]> = TableDefinition::new("loose");
/// Memory that the index may use for its pages, bytes.
const CACHE_LEN: usize = 8 << 20;

/// A place in the tree.
pub type At = (Fid, Name);

/// The index's file could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("index of names: {0}")]
pub struct IndexError(#[from] Box<redb::Error>);

fn wrap<E: Into<redb::Error>>(e: E) -> IndexError {
    IndexError(Box::new(e.into()))
}

/// Whether every page is as it was written. A million objects take some 0.15 s.
fn is_sound(db: &mut Database) -> Result<bool, IndexError> {
    match db.check_integrity() {
        Ok(sound) => Ok(sound),
        Err(DatabaseError::Storage(redb::StorageError::Corrupted(_))) => Ok(false),
        Err(e) => Err(wrap(e)),
    }
}

/// Runs what may panic over a damaged file: that is an error then, like all other damage.
fn guarded<T>(look: impl FnOnce() -> Result<T, IndexError>) -> Result<T, IndexError> {
    let damaged = || Err(wrap(redb::StorageError::Corrupted("its structure is broken".into())));
    // What panicked is dropped as a whole.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(look)).unwrap_or_else(|_| damaged())
}

pub struct Index {
    db: Database,
    fresh: Mutex<Fresh>,
}

/// What is not in the file yet; the value replaces what the file has.
#[derive(Default)]
struct Fresh {
    names: HashMap<Fid, Vec<At>>,
    loose: HashMap<Vec<u8>, Option<Vec<u8>>>,
}

type Names<'a> = redb::Table<'a, u64, &'static [u8]>;
type Loose<'a> = redb::Table<'a, &'static [u8], &'static [u8]>;

impl Fresh {
    fn write_to(
        &self,
        names: &mut Names<'_>,
        loose: &mut Loose<'_>,
    ) -> Result<(), redb::StorageError> {
        for (fid, at) in &self.names {
            match at.is_empty() {
                true => names.remove(fid.0).map(drop)?,
                false => names.insert(fid.0, &pack(at)[..]).map(drop)?,
            }
        }
        for (key, value) in &self.loose {
            match value {
                None => loose.remove(&key[..]).map(drop)?,
                Some(value) => loose.insert(&key[..], &value[..]).map(drop)?,
            }
        }
        Ok(())
    }
}

impl Index {
    /// Opens or creates the index's file. A file that cannot be read is begun anew: the second
    /// value is then true, and the tree must be walked.
    pub fn open(path: &Path) -> Result<(Index, bool), IndexError> {
        let build = || {
            guarded(|| {
                let mut db =
                    Database::builder().set_cache_size(CACHE_LEN).create(path).map_err(wrap)?;
                let sound = is_sound(&mut db)?;
                Ok((db, sound))
            })
        };
        // of an empty file the library makes a new one
        let existed = path.metadata().is_ok_and(|it| it.len() > 0);
        let why = match build() {
            Ok((db, true)) => return Index::with(db, !existed),
            Ok((_, false)) => "pages do not verify".to_owned(),
            Err(e) if existed => e.to_string(),
            Err(e) => return Err(e),
        };
        log::warn!("{}: {why}; building it anew", path.display());
        let mut aside = path.as_os_str().to_owned();
        aside.push(".damaged");
        std::fs::rename(path, aside).map_err(|e| wrap(redb::StorageError::Io(e)))?;
        Index::with(build()?.0, true)
    }

    fn with(db: Database, anew: bool) -> Result<(Index, bool), IndexError> {
        let index = Index { db, fresh: Mutex::default() };
        index.write(true, |_, _| Ok(()))?; // the tables exist from now on
        Ok((index, anew))
    }

    /// An index that lives as long as the process: of a tree that is not imz's to keep.
    pub fn in_memory() -> Result<Index, IndexError> {
        let memory = redb::backends::InMemoryBackend::new();
        let mut build = Database::builder();
        let db = build.set_cache_size(CACHE_LEN).create_with_backend(memory).map_err(wrap)?;
        Ok(Index::with(db, true)?.0)
    }

    /// All places where the object stands, as far as is known.
    pub fn names(&self, fid: Fid) -> Result<Vec<At>, IndexError> {
        if let Some(at) = self.fresh().names.get(&fid) {
            return Ok(at.clone());
        }
        self.stored(fid)
    }

    /// Every object with its places, what is fresh included.
    pub fn all(&self, each: &mut dyn FnMut(Fid, Vec<At>)) -> Result<(), IndexError> {
        self.flush(false)?;
        every(&self.db, each)
    }

    fn stored(&self, fid: Fid) -> Result<Vec<At>, IndexError> {
        let tx = self.db.begin_read().map_err(wrap)?;
        let table = tx.open_table(NAMES).map_err(wrap)?;
        let row = table.get(fid.0).map_err(wrap)?;
        Ok(row.map(|row| unpack(row.value())).unwrap_or_default())
    }

    /// Notes a place of an object that has no other: no look at the file.
    pub fn set(&self, fid: Fid, parent: Fid, name: &Name) {
        self.fresh().names.insert(fid, vec![(parent, name.clone())]);
    }

    /// Notes a further place.
    pub fn add(&self, fid: Fid, parent: Fid, name: &Name) -> Result<(), IndexError> {
        self.edit(fid, |at| {
            if !at.iter().any(|(p, n)| *p == parent && n == name) {
                at.push((parent, name.clone()));
            }
        })
    }

    /// Forgets a place.
    pub fn remove(&self, fid: Fid, parent: Fid, name: &Name) -> Result<(), IndexError> {
        self.edit(fid, |at| at.retain(|(p, n)| *p != parent || n != name))
    }

    /// Calls `look` with every place that is known of any object; it may end the walk by `false`.
    pub fn each(&self, mut look: impl FnMut(Fid, &At) -> bool) -> Result<(), IndexError> {
        let fresh = self.fresh();
        let tx = self.db.begin_read().map_err(wrap)?;
        let table = tx.open_table(NAMES).map_err(wrap)?;
        for row in table.iter().map_err(wrap)? {
            let (fid, at) = row.map_err(wrap)?;
            let fid = Fid(fid.value());
            let stale = fresh.names.contains_key(&fid);
            if !stale && !unpack(at.value()).iter().all(|at| look(fid, at)) {
                return Ok(());
            }
        }
        for (fid, at) in &fresh.names {
            if !at.iter().all(|at| look(*fid, at)) {
                break;
            }
        }
        Ok(())
    }

    fn edit(&self, fid: Fid, change: impl FnOnce(&mut Vec<At>)) -> Result<(), IndexError> {
        match self.fresh().names.entry(fid) {
            Entry::Occupied(mut at) => change(at.get_mut()),
            Entry::Vacant(place) => change(place.insert(self.stored(fid)?)),
        }
        Ok(())
    }

    /// Metadata of an object that carries no attribute.
    pub fn loose(&self, parent: Fid, name: &[u8]) -> Result<Option<Vec<u8>>, IndexError> {
        let key = loose_key(parent, name);
        if let Some(value) = self.fresh().loose.get(&key) {
            return Ok(value.clone());
        }
        let tx = self.db.begin_read().map_err(wrap)?;
        let table = tx.open_table(LOOSE).map_err(wrap)?;
        Ok(table.get(&key[..]).map_err(wrap)?.map(|row| row.value().to_vec()))
    }

    pub fn set_loose(&self, parent: Fid, name: &[u8], value: Option<Vec<u8>>) {
        self.fresh().loose.insert(loose_key(parent, name), value);
    }

    /// How many changes are not in the file yet.
    pub fn fresh_count(&self) -> usize {
        let fresh = self.fresh();
        fresh.names.len() + fresh.loose.len()
    }

    /// Writes what is fresh to the file. Durable on return: as `durable` says.
    pub fn flush(&self, durable: bool) -> Result<(), IndexError> {
        let mut fresh = self.fresh();
        if !fresh.names.is_empty() || !fresh.loose.is_empty() {
            self.write(false, |names, loose| fresh.write_to(names, loose))?;
            *fresh = Fresh::default();
            crash::point("index-written");
        }
        drop(fresh); // the disk's own time is spent without the lock
        if durable {
            self.write(true, |_, _| Ok(()))?;
            crash::point("index-durable");
        }
        Ok(())
    }

    fn write(
        &self,
        durable: bool,
        fill: impl FnOnce(&mut Names<'_>, &mut Loose<'_>) -> Result<(), redb::StorageError>,
    ) -> Result<(), IndexError> {
        let mut tx = self.db.begin_write().map_err(wrap)?;
        tx.set_durability(if durable { Durability::Immediate } else { Durability::None })
            .map_err(wrap)?;
        tx.set_quick_repair(durable);
        {
            let mut names = tx.open_table(NAMES).map_err(wrap)?;
            let mut loose = tx.open_table(LOOSE).map_err(wrap)?;
            fill(&mut names, &mut loose).map_err(wrap)?;
        }
        tx.commit().map_err(wrap)
    }

    fn fresh(&self) -> std::sync::MutexGuard<'_, Fresh> {
        // A panic while the lock was held leaves whole entries: they are only inserted.
        self.fresh.lock().unwrap_or_else(|e| e.into_inner())
    }
}

fn every(db: &Database, each: &mut dyn FnMut(Fid, Vec<At>)) -> Result<(), IndexError> {
    let tx = db.begin_read().map_err(wrap)?;
    for row in tx.open_table(NAMES).map_err(wrap)?.iter().map_err(wrap)? {
        let (fid, at) = row.map_err(wrap)?;
        each(Fid(fid.value()), unpack(at.value()));
    }
    Ok(())
}

fn loose_key(parent: Fid, name: &[u8]) -> Vec<u8> {
    [&parent.0.to_be_bytes(), name].concat()
}

/// parent (8), length of the name (1), the name; one after another.
fn pack(at: &[At]) -> Vec<u8> {
    let mut out = Vec::new();
    for (parent, name) in at {
        out.extend_from_slice(&parent.0.to_le_bytes());
        out.push(name.as_bytes().len() as u8);
        out.extend_from_slice(name.as_bytes());
    }
    out
}

/// Stops at the first thing that is no place: the index is only a hint, and checked when used.
fn unpack(mut bytes: &[u8]) -> Vec<At> {
    let mut at = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<9>() {
        let len = usize::from(head[8]);
        let Some((name, rest)) = rest.split_at_checked(len) else { break };
        let Ok(name) = Name::new(name) else { break };
        let [a, b, c, d, e, f, g, h, _] = *head;
        at.push((Fid(u64::from_le_bytes([a, b, c, d, e, f, g, h])), name));
        bytes = rest;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(s: &str) -> Name {
        Name::new(s.as_bytes()).unwrap()
    }

    #[test]
    fn finds_names_before_and_after_a_flush_and_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        let (index, anew) = Index::open(&path).unwrap();
        assert!(anew);
        index.set(Fid(5), Fid(1), &name("a"));
        index.add(Fid(5), Fid(2), &name("b")).unwrap();
        let both = vec![(Fid(1), name("a")), (Fid(2), name("b"))];
        assert_eq!(index.names(Fid(5)).unwrap(), both);
        index.flush(true).unwrap();
        assert_eq!(index.names(Fid(5)).unwrap(), both);
        index.remove(Fid(5), Fid(1), &name("a")).unwrap();
        index.set_loose(Fid(1), b"link", Some(vec![1, 2]));
        assert_eq!(index.names(Fid(5)).unwrap(), both[1..]);
        index.flush(true).unwrap();
        drop(index);
        let (index, anew) = Index::open(&path).unwrap();
        assert!(!anew);
        assert_eq!(index.names(Fid(5)).unwrap(), both[1..]);
        assert_eq!(index.loose(Fid(1), b"link").unwrap(), Some(vec![1, 2]));
        index.remove(Fid(5), Fid(2), &name("b")).unwrap();
        index.flush(false).unwrap();
        assert_eq!(index.names(Fid(5)).unwrap(), vec![]);
    }

    #[test]
    fn a_damaged_file_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        std::fs::write(&path, [7u8; 5000]).unwrap();
        let (index, anew) = Index::open(&path).unwrap();
        assert!(anew);
        assert_eq!(index.names(Fid(5)).unwrap(), vec![]);
    }
}
