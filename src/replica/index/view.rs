//! The index's file as it is, without a change to it: for those who only look.
//!
//! Opening the file for good may write to it (what a crash left half done is put right). Here such
//! writes stay in memory, in pages over the file's own. Every page is checked before anything is
//! believed.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use redb::{Database, ReadableDatabase, StorageBackend};

use super::{At, CACHE_LEN, IndexError, LOOSE, NAMES, every, is_sound, loose_key, unpack, wrap};
use crate::kml::record::Fid;

const PAGE: u64 = 4096;

/// A file, and what was written over it.
#[derive(Debug)]
struct Overlay {
    file: File,
    over: Mutex<Over>,
}

#[derive(Debug)]
struct Over {
    len: u64,
    /// bytes of the file that are still its own
    own_len: u64,
    pages: HashMap<u64, Box<[u8]>>,
}

impl Overlay {
    fn over(&self) -> MutexGuard<'_, Over> {
        // Whole after every statement.
        self.over.lock().unwrap_or_else(|e| e.into_inner())
    }
    fn page(&self, over: &Over, nth: u64) -> io::Result<Box<[u8]>> {
        if let Some(page) = over.pages.get(&nth) {
            return Ok(page.clone());
        }
        let mut page = vec![0; PAGE as usize].into_boxed_slice();
        let have = over.own_len.saturating_sub(nth * PAGE).min(PAGE) as usize;
        self.file.read_exact_at(&mut page[..have], nth * PAGE)?;
        Ok(page)
    }
}

/// The pages that `at..at + len` touches, with the part of each and of the bytes.
fn parts(at: u64, len: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let now = at + done as u64;
        let within = (now % PAGE) as usize;
        let part = (PAGE as usize - within).min(len - done);
        let range = done..done + part;
        done += part;
        (part > 0).then_some((now / PAGE, within, range))
    })
}

impl StorageBackend for Overlay {
    fn len(&self) -> io::Result<u64> {
        Ok(self.over().len)
    }
    fn read(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        let over = self.over();
        if at.checked_add(out.len() as u64).is_none_or(|end| end > over.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (nth, within, range) in parts(at, out.len()) {
            let len = range.len();
            out[range].copy_from_slice(&self.page(&over, nth)?[within..within + len]);
        }
        Ok(())
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut over = self.over();
        over.own_len = over.own_len.min(len);
        over.len = len;
        over.pages.retain(|nth, _| nth * PAGE < len);
        Ok(())
    }
    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let mut over = self.over();
        for (nth, within, range) in parts(at, bytes.len()) {
            let mut page = self.page(&over, nth)?;
            page[within..within + range.len()].copy_from_slice(&bytes[range]);
            over.pages.insert(nth, page);
        }
        over.len = over.len.max(at + bytes.len() as u64);
        Ok(())
    }
}

/// An index, to be looked at.
pub struct View {
    db: Database,
}

impl View {
    /// # Errors
    /// The file cannot be read, or is damaged.
    pub fn open(path: &Path) -> Result<View, IndexError> {
        let open = || -> io::Result<Overlay> {
            let file = File::open(path)?;
            let len = file.metadata()?.len();
            if len == 0 {
                // the library would take it for a new one
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let over = Over { len, own_len: len, pages: HashMap::new() };
            Ok(Overlay { file, over: Mutex::new(over) })
        };
        let backend = open().map_err(|e| wrap(redb::StorageError::Io(e)))?;
        super::guarded(|| {
            let build = Database::builder().set_cache_size(CACHE_LEN).create_with_backend(backend);
            let mut db = build.map_err(wrap)?;
            match is_sound(&mut db)? {
                true => Ok(View { db }),
                false => Err(wrap(redb::StorageError::Corrupted("pages do not verify".into()))),
            }
        })
    }
    /// Every object with its places.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn all(&self, each: &mut dyn FnMut(Fid, Vec<At>)) -> Result<(), IndexError> {
        every(&self.db, each)
    }
    /// All places of one object.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn names(&self, fid: Fid) -> Result<Vec<At>, IndexError> {
        let tx = self.db.begin_read().map_err(wrap)?;
        let table = tx.open_table(NAMES).map_err(wrap)?;
        let row = table.get(fid.0).map_err(wrap)?;
        Ok(row.map(|row| unpack(row.value())).unwrap_or_default())
    }
    /// Metadata of an object that carries no attribute.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn loose(&self, dir: Fid, name: &[u8]) -> Result<Option<Vec<u8>>, IndexError> {
        let tx = self.db.begin_read().map_err(wrap)?;
        let table = tx.open_table(LOOSE).map_err(wrap)?;
        let row = table.get(&loose_key(dir, name)[..]).map_err(wrap)?;
        Ok(row.map(|row| row.value().to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Index;
    use super::*;
    use crate::kml::record::Name;

    #[test]
    fn a_look_changes_nothing_and_sees_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        let (index, _) = Index::open(&path).unwrap();
        let name = |n: u64| Name::new(n.to_string().as_bytes()).unwrap();
        (2..3000).for_each(|n| index.set(Fid(n), Fid(1), &name(n)));
        index.set_loose(Fid(1), b"link", Some(vec![1, 2]));
        index.flush(true).unwrap();
        drop(index);
        let before = std::fs::read(&path).unwrap();
        let view = View::open(&path).unwrap();
        let mut seen = Vec::new();
        view.all(&mut |fid, at| seen.push((fid, at))).unwrap();
        assert_eq!(seen.len(), 2998);
        assert_eq!(seen[7], (Fid(9), vec![(Fid(1), name(9))]));
        assert_eq!(view.loose(Fid(1), b"link").unwrap(), Some(vec![1, 2]));
        assert_eq!(view.names(Fid(9)).unwrap(), vec![(Fid(1), name(9))]);
        drop(view);
        assert!(std::fs::read(&path).unwrap() == before);
    }

    #[test]
    fn damage_is_an_error_wherever_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        let (index, _) = Index::open(&path).unwrap();
        let name = |n: u64| Name::new(n.to_string().as_bytes()).unwrap();
        (2..300).for_each(|n| index.set(Fid(n), Fid(1), &name(n)));
        index.flush(true).unwrap();
        drop(index);
        let good = std::fs::read(&path).unwrap();
        let count = |path: &Path| {
            let mut rows = Vec::new();
            View::open(path)?.all(&mut |fid, at| rows.push((fid, at)))?;
            Ok::<_, IndexError>(rows)
        };
        let all = count(&path).unwrap();
        let (mut refused, mut whole) = (0, 0);
        for at in (0..good.len()).step_by(997) {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            std::fs::write(&path, bad).unwrap();
            match count(&path) {
                Err(_) => refused += 1,
                Ok(rows) => {
                    assert!(rows == all, "byte {at}: other rows without a word");
                    whole += 1;
                }
            }
        }
        assert!(refused > 0 && whole > 0, "{refused} {whole}");
        for len in [0, 1, 4096, good.len() / 2] {
            std::fs::write(&path, &good[..len]).unwrap();
            assert!(count(&path).is_err(), "{len} bytes");
        }
    }
}
