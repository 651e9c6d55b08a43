//! Which side a directory is of, where its parts are, and that nobody uses it meanwhile.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::{FsckError, io};
use crate::kml::store::segments_in;
use crate::replica::state;
use crate::sys;

/// Which side it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    Cache,
    Served,
}

impl Side {
    pub fn name(self) -> &'static str {
        match self {
            Side::Cache => "cache",
            Side::Served => "served directory",
        }
    }
}

/// The parts of a cache, or of a served directory.
#[derive(Debug)]
pub struct House {
    pub side: Side,
    pub dir: PathBuf,
    /// the files
    pub tree: PathBuf,
    /// state.json and the like
    pub state: PathBuf,
    pub journal: PathBuf,
    pub index: PathBuf,
    /// held as long as this lives
    locks: Vec<File>,
}

impl House {
    /// Looks at what is in `dir`; `state`: where a served directory's state is, if not in it.
    ///
    /// # Errors
    /// `NotOurs`, `StateElsewhere`.
    pub fn find(dir: &Path, state: Option<&Path>) -> Result<House, FsckError> {
        let dir = fs::canonicalize(dir).map_err(io(dir))?;
        let own = dir.join(".imz");
        let place = state.map_or_else(|| own.clone(), Path::to_path_buf);
        if !own.is_dir() && state.is_none() {
            return Err(FsckError::NotOurs { path: dir });
        }
        let is_cache = state.is_none()
            && match state::read(&place.join(state::FILE)) {
                Ok(facts) => !facts.source.is_empty(),
                // a served directory may have a `tree`, but no index of this name
                Err(_) => {
                    !place.join("nodes.json").exists()
                        && !place.join("index.redb").exists()
                        && dir.join("tree").is_dir()
                }
            };
        let has_state = place.join(state::FILE).exists()
            || segments_in(&place.join("kml")).is_ok_and(|found| !found.is_empty());
        if !has_state && !is_cache {
            return Err(match own.join("spool").exists() && state.is_none() {
                true => FsckError::StateElsewhere { path: dir },
                false => FsckError::NotOurs { path: place },
            });
        }
        let (side, tree, index) = match is_cache {
            true => (Side::Cache, dir.join("tree"), place.join("index")),
            false => (Side::Served, dir.clone(), place.join("index.redb")),
        };
        let journal = place.join("kml");
        Ok(House { side, dir, tree, state: place, journal, index, locks: Vec::new() })
    }

    /// A served directory whose state is elsewhere: only its tree.
    pub fn tree_of(dir: &Path) -> House {
        let state = dir.join(".imz");
        House {
            side: Side::Served,
            dir: dir.to_owned(),
            tree: dir.to_owned(),
            journal: state.join("kml"),
            index: state.join("index.redb"),
            state,
            locks: Vec::new(),
        }
    }

    /// Keeps every imz away from it, as long as this lives.
    ///
    /// # Errors
    /// `InUse`, with the process that has it.
    pub fn lock(&mut self) -> Result<(), FsckError> {
        let spool = self.dir.join(".imz/spool");
        for dir in [&self.state, &self.journal, &spool] {
            let path = dir.join("lock");
            // one that is not there nobody holds; making it would be a change
            let Ok(lock) = File::open(&path) else { continue };
            if !sys::fs::try_lock(&lock).map_err(|e| io(&path)(e.into()))? {
                let who = match sys::file::lock_holder(&lock) {
                    Some(holder) => holder.to_string(),
                    None => "another process".to_owned(),
                };
                return Err(FsckError::InUse { path: self.dir.clone(), who });
            }
            self.locks.push(lock);
        }
        Ok(())
    }

    /// Where objects of the tree go that cannot stay.
    pub fn lost_found(&self) -> PathBuf {
        match self.side {
            Side::Cache => self.dir.join("lost+found"),
            Side::Served => self.dir.join(".imz/lost+found"),
        }
    }
    /// Where files of the state go: on the same file system as these.
    pub fn state_lost_found(&self) -> PathBuf {
        match self.side {
            Side::Cache => self.lost_found(),
            Side::Served => self.state.join("lost+found"),
        }
    }
}
