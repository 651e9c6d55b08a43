//! Limbo: where objects wait that vanished from one listing and may appear in another.
//!
//! `LIMBO/FID` (hexadecimal), a directory beside the tree on its file system. An object that a
//! rename at the server moved is seen to vanish here before it is seen to appear there: in
//! between it rests here with its data. What nobody asks for within a while is removed; how long that
//! is, is counted anew in each life: the time of day may be set, and is not asked.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::kml::record::{Fid, Name};
use crate::sys::fs::{self, RenameMode};
use crate::sys::{Errno, crash, cred};

pub struct Limbo {
    fd: OwnedFd,
    path: PathBuf,
    /// since when each name is known to be here
    since: Mutex<HashMap<Vec<u8>, Instant>>,
}

/// The object's name in limbo.
fn name_of(fid: Fid) -> Vec<u8> {
    format!("{:x}", fid.0).into_bytes()
}

fn fid_of(name: &[u8]) -> Option<Fid> {
    let text = std::str::from_utf8(name).ok()?;
    u64::from_str_radix(text, 16).ok().map(Fid)
}

fn errno(e: std::io::Error) -> Errno {
    Errno::from_io_error(&e).unwrap_or(Errno::IO)
}

impl Limbo {
    pub fn open(path: &Path) -> Result<Limbo, Errno> {
        std::fs::create_dir_all(path).map_err(errno)?;
        let since = Mutex::default();
        Ok(Limbo { fd: fs::open_root(path)?, path: path.to_owned(), since })
    }

    /// Moves what stands at `name` here. What was here under its fid is removed.
    /// Its name here is returned.
    pub fn take(&self, dir: impl AsFd, name: &[u8], fid: Fid) -> Result<Name, Errno> {
        let to = name_of(fid);
        if fs::stat(&self.fd, &to).is_ok() {
            self.remove(&to)?;
        }
        fs::rename(dir, name, &self.fd, &to, RenameMode::NoReplace)?;
        crash::point("limbo-taken");
        self.since().remove(&to); // what was here under its name before was another
        Name::new(&to).map_err(|_| Errno::INVAL)
    }

    /// What stands at `name` is to be here, too, when its name goes.
    pub fn keep(&self, dir: impl AsFd, name: &[u8], fid: Fid) -> Result<Name, Errno> {
        let to = name_of(fid);
        match fs::link(dir, name, &self.fd, &to) {
            Ok(()) | Err(Errno::EXIST) => Name::new(&to).map_err(|_| Errno::INVAL),
            Err(e) => Err(e),
        }
    }

    /// The directory itself, once more, and what rests in it.
    pub fn resting(&self) -> Result<(OwnedFd, Vec<(Fid, Name)>), Errno> {
        let entries = fs::read_dir(&self.fd)?;
        let named = |name: &[u8]| Some((fid_of(name)?, Name::new(name).ok()?));
        Ok((fs::open_root(&self.path)?, entries.iter().filter_map(|e| named(&e.name)).collect()))
    }

    /// Removes what has been here for `rest` or longer, unless `keep` says that it is needed. A
    /// time counts from the first look at it, or since it came.
    pub fn clear(
        &self,
        rest: Duration,
        now: Instant,
        keep: impl Fn(Fid, &fs::Stat) -> bool,
    ) -> Result<(), Errno> {
        let mut here = HashMap::new();
        for entry in fs::read_dir(&self.fd)? {
            let Some(fid) = fid_of(&entry.name) else { continue };
            let stat = fs::stat(&self.fd, &entry.name)?;
            let since = self.since().get(&entry.name).copied().unwrap_or(now);
            if now.saturating_duration_since(since) >= rest && !keep(fid, &stat) {
                self.remove(&entry.name)?;
            } else {
                here.insert(entry.name, since);
            }
        }
        *self.since() = here;
        Ok(())
    }

    fn since(&self) -> MutexGuard<'_, HashMap<Vec<u8>, Instant>> {
        // Whole after every statement.
        self.since.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn remove(&self, name: &[u8]) -> Result<(), Errno> {
        if fs::stat(&self.fd, name)?.kind() != fs::Kind::Dir {
            return fs::unlink(&self.fd, name);
        }
        let path = self.path.join(std::str::from_utf8(name).map_err(|_| Errno::INVAL)?);
        if !cred::is_root() {
            // A directory of the user's own may deny its owner.
            open_up(&path).map_err(errno)?;
        }
        std::fs::remove_dir_all(path).map_err(errno)
    }
}

/// Gives the owner all rights to a directory and all those below it.
fn open_up(dir: &Path) -> std::io::Result<()> {
    std::fs::set_permissions(dir, PermissionsExt::from_mode(0o700))?;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            open_up(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn things_wait_and_come_back_or_go() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        std::fs::create_dir_all(tree.join("d/e")).unwrap();
        std::fs::write(tree.join("d/e/f"), "x").unwrap();
        std::fs::write(tree.join("g"), "data").unwrap();
        let limbo = Limbo::open(&dir.path().join("limbo")).unwrap();
        let fd = fs::open_root(&tree).unwrap();
        limbo.take(&fd, b"d", Fid(10)).unwrap();
        limbo.take(&fd, b"g", Fid(11)).unwrap();
        let mut resting = limbo.resting().unwrap().1;
        resting.sort();
        let name = |n: &[u8]| Name::new(n).unwrap();
        assert_eq!(resting, [(Fid(10), name(b"a")), (Fid(11), name(b"b"))]);
        let (hour, now) = (Duration::from_secs(3600), Instant::now());
        // the time of day says that it came a year ago, and is not asked
        let year = std::time::SystemTime::now() - 8766 * hour;
        let times = std::fs::FileTimes::new().set_modified(year);
        std::fs::File::open(dir.path().join("limbo/a")).unwrap().set_times(times).unwrap();
        limbo.clear(hour, now, |_, _| false).unwrap();
        limbo.clear(hour, now + hour / 2, |_, _| false).unwrap();
        assert!(dir.path().join("limbo/a/e/f").exists());
        limbo.clear(hour, now + hour, |fid, _| fid == Fid(10)).unwrap();
        assert!(dir.path().join("limbo/a/e/f").exists() && !dir.path().join("limbo/b").exists());
        limbo.clear(hour, now + hour, |_, _| false).unwrap();
        assert!(!dir.path().join("limbo/a").exists());
    }

    #[test]
    fn the_newest_of_one_fid_stays() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), "1").unwrap();
        std::fs::write(dir.path().join("b"), "2").unwrap();
        let limbo = Limbo::open(&dir.path().join("limbo")).unwrap();
        let fd = fs::open_root(dir.path()).unwrap();
        limbo.take(&fd, b"a", Fid(5)).unwrap();
        limbo.take(&fd, b"b", Fid(5)).unwrap();
        assert_eq!(std::fs::read(dir.path().join("limbo/5")).unwrap(), b"2");
    }
}
