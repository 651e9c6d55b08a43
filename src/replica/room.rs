//! What outlives a process of reservations: a server's book, and a client's figures.
//!
//! ```text
//!   state directory/grants.json   what each client was granted; durable before it is told
//!   cache/.imz/room.json          what was granted to this cache, and what it gave back
//! ```
//!
//! Each is small, has a checksum (state.rs), and is replaced whole by a rename. The book is synced: a
//! power cut forgets no grant. The client's figures are not: after a power cut they may be old, and
//! count for nothing until the server has spoken. A file that cannot be read counts as none, and
//! says so. The figures mean something in lento (ledger.rs, grant.rs); here they are numbers.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::state::{seal, unseal};
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

impl Line {
    /// What it holds.
    pub fn outstanding(&self) -> Pair {
        less(self.granted, self.returned)
    }
}

impl Book {
    /// What in it cannot be: first of all what more was given back than was granted.
    pub fn oddity(&self) -> Option<String> {
        let mut nodes = BTreeSet::new();
        self.nodes.iter().find_map(|line| match line {
            line if !nodes.insert(line.node) => {
                Some(format!("client {} is there twice", line.node))
            }
            line if !covers(line.granted, line.returned) => {
                Some(format!("client {} gave back more than it was granted", line.node))
            }
            _ => None,
        })
    }
}

impl Figures {
    pub fn outstanding(&self) -> Pair {
        less(self.granted, self.returned)
    }
    /// Whether what `before` says must not be used any more: something of it was taken back.
    pub fn takes_back(&self, before: &Figures) -> bool {
        let less = !covers(self.granted, before.granted) || !covers(before.returned, self.returned);
        less || self.epoch != before.epoch
    }
}

fn less(all: Pair, part: Pair) -> Pair {
    (all.0.saturating_sub(part.0), all.1.saturating_sub(part.1))
}

fn covers(all: Pair, part: Pair) -> bool {
    all.0 >= part.0 && all.1 >= part.1
}

/// A client's figures.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Figures {
    pub epoch: u64,
    pub granted: Pair,
    pub returned: Pair,
    /// the newest record whose charge is in `returned`
    pub upto: u64,
    /// how long the server keeps what it grants while this client is away; 0: not known
    #[serde(default)]
    pub keep_ms: u64,
    /// when it was last there, since the Unix epoch; 0: not known
    #[serde(default)]
    pub heard_ns: u64,
}

/// The same in its file.
#[derive(Serialize, Deserialize)]
struct Written {
    version: u32,
    /// of the machine's life, or [`CLOSED`]
    boot_id: String,
    figures: Figures,
}

/// Reads one of the files; `None`: there is none.
fn load<T: DeserializeOwned>(path: &Path, version: impl Fn(&T) -> u32) -> io::Result<Option<T>> {
    let len = match std::fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        found => found?.len(),
    };
    if len > LEN_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let read: T = unseal(&std::fs::read(path)?).map_err(io::Error::other)?;
    match version(&read) {
        VERSION => Ok(Some(read)),
        other => Err(io::Error::other(format!("version {other} is not known"))),
    }
}

/// What cannot be read counts as none.
fn or_none<T>(path: &Path, loaded: io::Result<Option<T>>) -> Option<T> {
    loaded.unwrap_or_else(|e| {
        log::warn!("{}: {e}; what was reserved is not known any more", path.display());
        None
    })
}

/// Where a server's book is.
pub struct BookFile(PathBuf);

impl BookFile {
    pub fn of(state_dir: &Path) -> BookFile {
        BookFile(state_dir.join(BOOK))
    }
    pub fn path(&self) -> &Path {
        &self.0
    }
    pub fn read(&self) -> Option<Book> {
        or_none(&self.0, self.load())
    }
    /// # Errors
    /// It is there, and no book; or read(2).
    pub fn load(&self) -> io::Result<Option<Book>> {
        load(&self.0, |book: &Book| book.version)
    }
    /// Durable on return: yes.
    ///
    /// # Errors
    /// As write(2) and rename(2); then the old one is still there.
    pub fn keep(&self, epoch_next: u64, nodes: Vec<Line>) -> io::Result<()> {
        let bytes = seal(&Book { version: VERSION, epoch_next, nodes })?;
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
    pub fn path(&self) -> &Path {
        &self.0
    }
    /// The figures as they stand there, of whatever life.
    ///
    /// # Errors
    /// They are there, and no figures; or read(2).
    pub fn load(&self) -> io::Result<Option<Figures>> {
        Ok(load(&self.0, |it: &Written| it.version)?.map(|it| it.figures))
    }
    /// Of this life of the machine; those of an earlier one may be too old, so that nothing of them
    /// is left to be used.
    pub fn read(&self) -> Option<Figures> {
        let loaded = load(&self.0, |it: &Written| it.version);
        let Written { boot_id: of, figures, .. } = or_none(&self.0, loaded)?;
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
        std::fs::write(&new, seal(&all)?)?;
        std::fs::rename(new, &self.0)
    }
    /// Better none than an old one that cannot be replaced: it would be used again.
    ///
    /// # Errors
    /// As unlink(2).
    pub fn drop_figures(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.0) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
    /// The last word of this life, good for every later one. Durable on return: yes.
    ///
    /// # Errors
    /// As write(2) and rename(2).
    pub fn close(&self, figures: &Figures) -> io::Result<()> {
        let boot_id = CLOSED.to_owned();
        let all = Written { version: VERSION, boot_id, figures: *figures };
        let bytes = seal(&all)?;
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
            assert!(file.load().is_err(), "{damage:?}");
        }
        let book = |nodes| Book { version: VERSION, epoch_next: 1, nodes };
        assert_eq!(book(vec![line]).oddity(), None);
        assert!(book(vec![line, line]).oddity().is_some_and(|what| what.contains("twice")));
        let odd = Line { granted: (9, 9), returned: (9, 10), ..line };
        assert!(book(vec![odd]).oddity().is_some_and(|what| what.contains("gave back more")));
        std::fs::remove_file(file.path()).unwrap();
        assert!(matches!(file.load(), Ok(None)));
    }

    #[test]
    fn figures_of_an_earlier_life_of_the_machine_leave_nothing_to_use() {
        let dir = tempfile::tempdir().unwrap();
        let file = FiguresFile::of(dir.path());
        let (granted, returned, keep_ms, heard_ns) = ((90, 9), (40, 4), 1000, 5);
        let figures = Figures { epoch: 4, granted, returned, upto: 6, keep_ms, heard_ns };
        file.keep(&figures).unwrap();
        let read = file.read().unwrap();
        assert_eq!(read, figures);
        let old = r#"{"version":1,"boot_id":"closed","figures":
            {"epoch":4,"granted":[90,9],"returned":[40,4],"upto":6}}"#;
        std::fs::write(dir.path().join(FIGURES), old).unwrap();
        assert_eq!(file.read(), Some(Figures { keep_ms: 0, heard_ns: 0, ..figures }));
        file.keep(&figures).unwrap();
        let text = std::fs::read_to_string(dir.path().join(FIGURES)).unwrap();
        std::fs::write(dir.path().join(FIGURES), text.replace("90", "91")).unwrap();
        assert_eq!(file.read(), None, "its checksum is wrong");
        let all = Written { version: VERSION, boot_id: "another".to_owned(), figures };
        std::fs::write(dir.path().join(FIGURES), seal(&all).unwrap()).unwrap();
        assert_eq!(file.read().unwrap().granted, (40, 4));
        file.close(&figures).unwrap();
        assert_eq!(file.read().unwrap().granted, (90, 9));
        file.drop_figures().unwrap();
        file.drop_figures().unwrap();
        assert_eq!(file.read(), None);
    }

    #[test]
    fn what_was_taken_back_is_kept_at_once() {
        let (granted, returned) = ((90, 9), (40, 4));
        let before = Figures { epoch: 4, granted, returned, ..Figures::default() };
        let table = [
            (Figures { granted: (91, 9), upto: 7, heard_ns: 9, ..before }, false),
            (Figures { granted: (91, 8), ..before }, true),
            (Figures { returned: (40, 5), ..before }, true),
            (Figures { returned: (39, 4), ..before }, false),
            (Figures { epoch: 5, ..before }, true),
        ];
        for (now, must) in table {
            assert_eq!(now.takes_back(&before), must, "{now:?}");
        }
    }
}
