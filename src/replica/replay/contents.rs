//! Where replay takes the contents of files from: a served directory, a cache, or any tree.
//!
//! A journal only announces contents. A file's is looked for at its path, and there taken if the
//! attribute on it has the same fid, or if it has none; else by fid, in a table that one walk of
//! the directory makes. The directory is only read.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use super::ReplayError;
use super::target::facts_in;
use crate::kml::record::{Fid, Stamp};
use crate::replica::meta::Meta;
use crate::replica::tree::is_own;
use crate::sys::Errno;
use crate::sys::cred::is_root;
use crate::sys::fs::{self, Kind, Result, Stat, o};

/// Longest path that is looked for, bytes.
const PATH_LEN_MAX: usize = 4095;

pub struct Source {
    root: OwnedFd,
    key: &'static [u8],
    by_fid: Option<HashMap<Fid, Vec<u8>>>,
}

/// A file there.
pub struct Found {
    pub file: OwnedFd,
    pub stat: Stat,
    /// what imz knows of it
    pub meta: Option<Meta>,
}

/// Why a file's contents are missing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Missing {
    #[error("its contents are not in the journal: name a directory that has them with --data")]
    NoSource,
    #[error("its contents are not in the data directory")]
    Absent,
    #[error("the data directory has {has} bytes of it, not {want}")]
    Size { has: u64, want: u64 },
    #[error("the data directory has a newer version of it")]
    Newer,
    #[error("the data directory has an older version of it")]
    Older,
    #[error("the data directory has not all of it")]
    Partial,
    #[error("it changed while it was read")]
    Changed,
    #[error("{0}")]
    Os(Errno),
}

/// Which version of a file is wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Version {
    /// of the record that made it; `None`: there are none to be compared
    pub stamp: Option<Stamp>,
    /// bytes
    pub size: u64,
    /// of the first later change of its contents that is known
    pub beyond: Option<Stamp>,
    /// of the journal's newest record: what comes behind it is not known
    pub last: Stamp,
    /// of the file, if it is known
    pub mtime: Option<(i64, u32)>,
}

impl Source {
    /// `dir`: a tree, or a cache, which has its tree in `tree`.
    ///
    /// # Errors
    /// The directory cannot be opened.
    pub fn open(dir: &Path) -> std::result::Result<Source, ReplayError> {
        let is_cache = facts_in(&dir.join(".imz")).is_some_and(|it| !it.source.is_empty());
        let tree = if is_cache { dir.join("tree") } else { dir.to_owned() };
        let root = fs::open_root(&tree)
            .map_err(|e| ReplayError::NoTarget { path: tree.clone(), source: e.into() })?;
        let key: &[u8] = if is_root() { b"trusted.imz" } else { b"user.imz" };
        Ok(Source { root, key, by_fid: None })
    }

    /// The root's inode number: to tell whether it is the tree that is replayed onto.
    pub fn ino(&self) -> Result<u64> {
        Ok(fs::fstat(&self.root)?.ino)
    }

    /// The file `fid`, or what stands at `path`, of this version.
    ///
    /// # Errors
    /// Why there is none.
    pub fn find(
        &mut self,
        fid: Fid,
        path: &[u8],
        want: &Version,
    ) -> std::result::Result<Found, Missing> {
        let at_path = self.open_file(path).map_err(Missing::Os)?;
        let found = match at_path {
            Some(found) if found.meta.as_ref().is_none_or(|meta| meta.fid == fid) => found,
            _ => self.find_fid(fid)?,
        };
        found.check(want)?;
        Ok(found)
    }

    fn find_fid(&mut self, fid: Fid) -> std::result::Result<Found, Missing> {
        if self.by_fid.is_none() {
            self.by_fid = Some(self.table().map_err(Missing::Os)?);
        }
        let path = self.by_fid.as_ref().and_then(|table| table.get(&fid)).cloned();
        let found = path.map(|path| self.open_file(&path)).transpose().map_err(Missing::Os)?;
        let found = found.flatten().ok_or(Missing::Absent)?;
        let same = found.meta.as_ref().is_some_and(|meta| meta.fid == fid);
        if same { Ok(found) } else { Err(Missing::Absent) }
    }

    /// `None`: there is no regular file.
    fn open_file(&self, path: &[u8]) -> Result<Option<Found>> {
        let first = path.split(|byte| *byte == b'/').next().unwrap_or_default();
        if path.is_empty() || path.len() > PATH_LEN_MAX || path.contains(&0) || is_own(first) {
            return Ok(None);
        }
        let file = match fs::open_beneath(&self.root, path, o::RDONLY | o::NONBLOCK) {
            Ok(file) => file,
            Err(
                Errno::NOENT
                | Errno::NOTDIR
                | Errno::LOOP
                | Errno::XDEV
                | Errno::NXIO
                | Errno::NAMETOOLONG
                | Errno::NODEV,
            ) => return Ok(None),
            Err(e) => return Err(e),
        };
        let stat = fs::fstat(&file)?;
        if stat.kind() != Kind::File {
            return Ok(None);
        }
        let meta = self.meta(&file, b"")?;
        Ok(Some(Found { file, stat, meta }))
    }

    fn meta(&self, dir: impl AsFd, name: &[u8]) -> Result<Option<Meta>> {
        match fs::xattr::get(dir, name, self.key) {
            Ok(value) => Ok(value.and_then(|value| Meta::decode(&value).ok())),
            Err(Errno::OPNOTSUPP | Errno::PERM) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn table(&self) -> Result<HashMap<Fid, Vec<u8>>> {
        let mut table = HashMap::new();
        let mut dirs = vec![Vec::new()];
        while let Some(path) = dirs.pop() {
            let at: &[u8] = if path.is_empty() { b"." } else { &path };
            let dir = match fs::open_beneath(&self.root, at, o::RDONLY | o::DIRECTORY) {
                Ok(dir) => dir,
                // removed meanwhile, or too deep to be named
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG) => continue,
                Err(e) => return Err(e),
            };
            for entry in fs::read_dir(&dir)? {
                if path.is_empty() && is_own(&entry.name) {
                    continue;
                }
                let below = match path.is_empty() {
                    true => entry.name.clone(),
                    false => [&path[..], b"/", &entry.name].concat(),
                };
                match fs::stat(&dir, &entry.name).map(|stat| stat.kind()) {
                    Ok(Kind::Dir) => dirs.push(below),
                    Ok(Kind::File) => {
                        if let Ok(Some(meta)) = self.meta(&dir, &entry.name) {
                            table.insert(meta.fid, below);
                        }
                    }
                    _ => {}
                }
            }
        }
        Ok(table)
    }
}

impl Found {
    fn check(&self, want: &Version) -> std::result::Result<(), Missing> {
        // what tells a version where no stamp does, as far as it goes
        let looks_right = want.beyond.is_none() || want.mtime == Some(self.stat.mtime);
        match (&self.meta, want.stamp) {
            (Some(meta), _) if !meta.complete => return Err(Missing::Partial),
            (Some(meta), Some(stamp)) => {
                let has = meta.data;
                let passed = want.beyond.is_some_and(|beyond| has >= beyond);
                if passed || has > want.last {
                    return Err(Missing::Newer);
                }
                if has < stamp {
                    return Err(Missing::Older);
                }
            }
            _ if !looks_right => return Err(Missing::Newer),
            _ => {}
        }
        let (has, want) = (self.stat.size, want.size);
        if has == want { Ok(()) } else { Err(Missing::Size { has, want }) }
    }
}
