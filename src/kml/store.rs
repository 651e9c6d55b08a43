//! Where a journal keeps its bytes: the seam between the log and the disk.
//!
//! [`Dir`] is the real one: a directory with a lock file, mapped segments, the cursors and the
//! writers. The tests have another, whose sectors survive a crash by the toss of a coin and whose
//! syncs fail on demand.
//!
//! ```text
//!   lock                    held by flock(2) while a process has the journal open
//!   0000000000000001.kml    segments, named by their first seq in hexadecimal
//!   0000000000008235.kml
//!   cursors                 two pages, 4096 bytes apart
//!   writers                 see writers.rs
//!   new                     a segment in the making; removed at open
//! ```
//!
//! A segment appears by rename after its header and its room are durable: there is no half of one.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::kml::codec::CURSORS_LEN;
use crate::kml::map::Map;
use crate::kml::record::Seq;
use crate::sys::crash;
use crate::sys::file::{allocate, sync_dir};

/// Distance of the two pages of cursors, bytes: they share no sector and no page.
pub const CURSORS_STRIDE: usize = 4096;

/// A journal's bytes.
pub trait Store: Send + Sync {
    /// First seqs of the segments there are, ascending.
    fn list(&self) -> io::Result<Vec<Seq>>;
    fn open(&self, first: Seq) -> io::Result<Arc<dyn Segment>>;
    /// A new segment of `len` bytes, zero behind its header. Durable on return: yes.
    fn create(&self, first: Seq, len: usize, header: &[u8]) -> io::Result<Arc<dyn Segment>>;
    /// Durable on return: no.
    fn remove(&self, first: Seq) -> io::Result<()>;
    /// The two pages of cursors; `None` if they were never written.
    fn cursors(&self) -> io::Result<Option<[Vec<u8>; 2]>>;
    /// Writes one page of cursors. Durable on return: if `durable`.
    fn put_cursors(&self, slot: usize, page: &[u8], durable: bool) -> io::Result<()>;
    /// What to call a file in messages.
    fn path(&self, file: &str) -> PathBuf;
}

/// Bytes that can be read. `at` and lengths are multiples of 4, within `size`.
pub trait Bytes: Send + Sync {
    /// Length in bytes.
    fn size(&self) -> usize;
    fn read(&self, at: usize, out: &mut [u8]);
}

/// A segment's bytes, shared by all threads.
pub trait Segment: Bytes {
    /// Durable on return: no; but it survives the death of the process.
    fn put(&self, at: usize, bytes: &[u8]);
    /// Reads one word; sees what [`Segment::set_word`] of any thread has set.
    fn word(&self, at: usize) -> u32;
    /// Sets one word at once, as readers see it. Durable on return: no.
    fn set_word(&self, at: usize, word: u32);
    /// Makes bytes `at..at + len` durable.
    ///
    /// # Errors
    /// Final: the caller must not try again.
    fn sync(&self, at: usize, len: usize) -> io::Result<()>;
}

/// A segment's file name.
pub fn segment_name(first: Seq) -> String {
    format!("{:016x}.kml", first.0)
}

/// The seq that a segment's file name tells, if it is one.
pub fn segment_first(name: &str) -> Option<Seq> {
    let digits = name.strip_suffix(".kml").filter(|digits| digits.len() == 16)?;
    let first = u64::from_str_radix(digits, 16).ok().map(Seq)?;
    (segment_name(first) == name).then_some(first)
}

/// First seqs of the segments in a directory, ascending.
///
/// # Errors
/// Those of reading a directory.
pub fn segments_in(dir: &Path) -> io::Result<Vec<Seq>> {
    let mut firsts = Vec::new();
    for entry in fs::read_dir(dir)? {
        firsts.extend(entry?.file_name().to_str().and_then(segment_first));
    }
    firsts.sort_unstable();
    Ok(firsts)
}

/// A journal's directory, locked for this process.
pub struct Dir {
    dir: PathBuf,
    cursors: File,
    /// held, never read: its lock goes when it is closed
    _lock: File,
}

impl Dir {
    /// Locks the directory (it must exist). `None`: another process has it.
    ///
    /// # Errors
    /// Those of creating and locking files.
    pub fn lock(dir: &Path) -> io::Result<Option<Dir>> {
        let options = || {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            options
        };
        let lock = options().open(dir.join("lock"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(why)) => return Err(why),
        }
        match fs::remove_file(dir.join("new")) {
            Err(why) if why.kind() != io::ErrorKind::NotFound => return Err(why),
            _ => {}
        }
        let cursors = options().open(dir.join("cursors"))?;
        Ok(Some(Dir { dir: dir.to_path_buf(), cursors, _lock: lock }))
    }
}

impl Store for Dir {
    fn list(&self) -> io::Result<Vec<Seq>> {
        segments_in(&self.dir)
    }
    fn open(&self, first: Seq) -> io::Result<Arc<dyn Segment>> {
        let path = self.dir.join(segment_name(first));
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        Ok(Arc::new(Mapped { map: Map::new(&file, len)?, len }))
    }
    fn create(&self, first: Seq, len: usize, header: &[u8]) -> io::Result<Arc<dyn Segment>> {
        let new = self.dir.join("new");
        let made = || {
            let mut options = OpenOptions::new();
            let mut file = options.read(true).write(true).create(true).truncate(true).open(&new)?;
            allocate(&mut file, len as u64)?;
            file.write_all_at(header, 0)?;
            file.sync_all()?;
            crash::point("log-segment-made");
            fs::rename(&new, self.dir.join(segment_name(first)))?;
            crash::point("log-segment-named");
            sync_dir(&self.dir)
        };
        if let Err(why) = made() {
            // the room it took, if any, is given back; that failing changes nothing
            let _ = fs::remove_file(&new);
            return Err(why);
        }
        self.open(first)
    }
    fn remove(&self, first: Seq) -> io::Result<()> {
        fs::remove_file(self.dir.join(segment_name(first)))
    }
    fn cursors(&self) -> io::Result<Option<[Vec<u8>; 2]>> {
        let len = self.cursors.metadata()?.len();
        let page = |slot: usize| {
            let at = (slot * CURSORS_STRIDE) as u64;
            let mut bytes = vec![0; CURSORS_LEN.min(len.saturating_sub(at) as usize)];
            self.cursors.read_exact_at(&mut bytes, at).map(|()| bytes)
        };
        if len == 0 { Ok(None) } else { Ok(Some([page(0)?, page(1)?])) }
    }
    fn put_cursors(&self, slot: usize, page: &[u8], durable: bool) -> io::Result<()> {
        self.cursors.write_all_at(page, (slot * CURSORS_STRIDE) as u64)?;
        crash::point("cursor-written");
        if durable { self.cursors.sync_data() } else { Ok(()) }
    }
    fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }
}

/// A file that is only read, as it is at each moment; what it does not have (any more) reads as
/// zeros.
pub struct FileBytes {
    file: File,
    size: usize,
}

impl FileBytes {
    /// # Errors
    /// As open(2).
    pub fn open(path: &Path) -> io::Result<FileBytes> {
        let file = File::open(path)?;
        let size = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX) & !7;
        Ok(FileBytes { file, size })
    }
}

impl Bytes for FileBytes {
    fn size(&self) -> usize {
        self.size
    }
    fn read(&self, at: usize, out: &mut [u8]) {
        if self.file.read_exact_at(out, at as u64).is_err() {
            out.fill(0);
        }
    }
}

/// Writes the whole of a new small file beside the journal, durably, by rename.
///
/// # Errors
/// Those of the calls; the old file, if any, is then still there.
pub fn replace(path: &Path, len: u64, header: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    allocate(&mut file, len)?;
    file.flush()?;
    file.write_all_at(header, 0)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    path.parent().map_or(Ok(()), sync_dir)
}

struct Mapped {
    map: Map,
    len: usize,
}

impl Mapped {
    fn words(&self, at: usize, len: usize) -> &[AtomicU32] {
        &self.map.words()[at / 4..(at + len) / 4]
    }
}

impl Bytes for Mapped {
    fn size(&self) -> usize {
        self.len
    }
    fn read(&self, at: usize, out: &mut [u8]) {
        for (word, bytes) in self.words(at, out.len()).iter().zip(out.chunks_exact_mut(4)) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
    }
}

impl Segment for Mapped {
    fn put(&self, at: usize, bytes: &[u8]) {
        for (word, bytes) in self.words(at, bytes.len()).iter().zip(bytes.chunks_exact(4)) {
            let value = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            word.store(value, Ordering::Relaxed);
        }
    }
    fn word(&self, at: usize) -> u32 {
        u32::from_le(self.words(at, 4)[0].load(Ordering::Acquire))
    }
    fn set_word(&self, at: usize, word: u32) {
        self.words(at, 4)[0].store(word.to_le(), Ordering::Release);
    }
    fn sync(&self, at: usize, len: usize) -> io::Result<()> {
        self.map.sync(at, len)
    }
}
