//! What outlives a process of reservations: a server's book, and a client's figures.
//!
//! ```text
//!   state directory/grants.json   what each client was granted; durable before it is told
//!   cache/.imz/room.json          what was granted to this cache, and what it gave back
//! ```
//!
//! Each is small and replaced whole by a rename. The book is synced: a power cut forgets no grant.
//! The client's figures are not: after a power cut they may be old, and count for nothing until the
//! server has spoken. A file that cannot be read counts as none, and says so. The figures mean
//! something in lento (ledger.rs, grant.rs); here they are numbers.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::kml::store::replace;
use crate::sys::boot;

const BOOK: &str = "grants.json";
const FIGURES: &str = "room.json";
const VERSION: u32 = 1;
/// Longer than any such file, bytes.
const LEN_MAX: u64 = 16 << 20;

/// Bytes and files.
pub type Pair = (u64, u64);

/// One client's line in a server's book.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub struct Line {
    pub node: u32,
    pub epoch: u64,
    pub granted: Pair,
    pub returned: Pair,
}

/// A volume's book.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug, Default)]
pub struct Book {
    version: u32,
    pub epoch_next: u64,
    pub nodes: Vec<Line>,
}

/// A client's figures.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Figures {
    pub epoch: u64,
    pub granted: Pair,
    pub returned: Pair,
    /// the newest record whose charge is in `returned`
    pub upto: u64,
}

/// The same in its file.
#[derive(Serialize, Deserialize)]
struct Written {
    version: u32,
    /// of the machine's life, or [`CLOSED`]
    boot_id: String,
    figures: Figures,
}

/// Reads one of the files; `None` when there is none that can be used.
fn read<T: for<'a> Deserialize<'a>>(path: &Path, version: impl Fn(&T) -> u32) -> Option<T> {
    let load = || -> io::Result<T> {
        if std::fs::metadata(path)?.len() > LEN_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let read: T = serde_json::from_slice(&std::fs::read(path)?)?;
        match version(&read) {
            VERSION => Ok(read),
            other => Err(io::Error::other(format!("version {other} is not known"))),
        }
    };
    match load() {
        Ok(read) => Some(read),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => {
            log::warn!("{}: {e}; what was reserved is not known any more", path.display());
            None
        }
    }
}

/// Where a server's book is.
pub struct BookFile(PathBuf);

impl BookFile {
    pub fn of(state_dir: &Path) -> BookFile {
        BookFile(state_dir.join(BOOK))
    }
    pub fn read(&self) -> Option<Book> {
        read(&self.0, |book: &Book| book.version)
    }
    /// Durable on return: yes.
    ///
    /// # Errors
    /// As write(2) and rename(2); then the old one is still there.
    pub fn keep(&self, epoch_next: u64, nodes: Vec<Line>) -> io::Result<()> {
        let bytes = serde_json::to_vec(&Book { version: VERSION, epoch_next, nodes })?;
        replace(&self.0, bytes.len() as u64, &bytes)
    }
}

/// In place of a machine's life: the file is durable as it is.
const CLOSED: &str = "closed";

/// Where a client's figures are.
#[derive(Debug)]
pub struct FiguresFile(PathBuf);

impl FiguresFile {
    pub fn of(own_dir: &Path) -> FiguresFile {
        FiguresFile(own_dir.join(FIGURES))
    }
    /// Of this life of the machine; those of an earlier one may be too old, so that nothing of them
    /// is left to be used.
    pub fn read(&self) -> Option<Figures> {
        let Written { boot_id: of, figures, .. } = read(&self.0, |it: &Written| it.version)?;
        if of == boot::id() || of == CLOSED {
            return Some(figures);
        }
        let granted = figures.returned;
        Some(Figures { granted, ..figures })
    }
    /// Durable on return: against the death of the process, not of the machine.
    ///
    /// # Errors
    /// As write(2) and rename(2); then the old one is still there.
    pub fn keep(&self, figures: &Figures) -> io::Result<()> {
        let all = Written { version: VERSION, boot_id: boot::id(), figures: *figures };
        let new = self.0.with_extension("new");
        std::fs::write(&new, serde_json::to_vec(&all)?)?;
        std::fs::rename(new, &self.0)
    }
    /// The last word of this life, good for every later one. Durable on return: yes.
    ///
    /// # Errors
    /// As write(2) and rename(2).
    pub fn close(&self, figures: &Figures) -> io::Result<()> {
        let boot_id = CLOSED.to_owned();
        let all = Written { version: VERSION, boot_id, figures: *figures };
        let bytes = serde_json::to_vec(&all)?;
        replace(&self.0, bytes.len() as u64, &bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_and_damage_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = BookFile::of(dir.path());
        assert_eq!(file.read(), None);
        let line = Line { node: 3, epoch: 9, granted: (u64::MAX, 1), returned: (5, 0) };
        file.keep(77, vec![line]).unwrap();
        let book = file.read().unwrap();
        assert_eq!((book.epoch_next, book.nodes), (77, vec![line]));
        for damage in ["", "{}", "{\"version\":2,\"epoch_next\":1,\"nodes\":[]}", "[1]"] {
            std::fs::write(dir.path().join(BOOK), damage).unwrap();
            assert_eq!(file.read(), None, "{damage:?}");
        }
    }

    #[test]
    fn figures_of_an_earlier_life_of_the_machine_leave_nothing_to_use() {
        let dir = tempfile::tempdir().unwrap();
        let file = FiguresFile::of(dir.path());
        let figures = Figures { epoch: 4, granted: (90, 9), returned: (40, 4), upto: 6 };
        file.keep(&figures).unwrap();
        let read = file.read().unwrap();
        assert_eq!((read.epoch, read.granted, read.returned, read.upto), (4, (90, 9), (40, 4), 6));
        let text = std::fs::read_to_string(dir.path().join(FIGURES)).unwrap();
        let old = text.replace(&boot::id(), "another");
        assert_ne!(old, text);
        std::fs::write(dir.path().join(FIGURES), old).unwrap();
        assert_eq!(file.read().unwrap().granted, (40, 4));
        file.close(&figures).unwrap();
        assert_eq!(file.read().unwrap().granted, (90, 9));
    }
}
