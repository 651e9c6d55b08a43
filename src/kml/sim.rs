//! A store whose crashes are simulated: each 512-byte sector that was not synced is old or new by
//! the toss of a coin. Making and removing a segment are durable at once, as in the real one
//! (where removal may come back, which the log must bear: see the log's tests).

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use crate::kml::codec::CURSORS_LEN;
use crate::kml::record::Seq;
use crate::kml::store::{Bytes, Segment, Store};

const SECTOR: usize = 512;

/// xorshift64*: small, seeded, the same for ever.
pub struct Rng(pub u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn coin(&mut self) -> bool {
        self.next() & 1 == 1
    }
}

/// What may go wrong.
#[derive(Default)]
pub struct Faults {
    pub sync_fails: AtomicBool,
    pub disk_full: AtomicBool,
    /// zeros that recovery writes are dropped: what was cut stays on the disk
    pub cuts_are_lost: AtomicBool,
}

pub struct SimSegment {
    now: Vec<AtomicU32>,
    disk: Mutex<Vec<u8>>,
    faults: Arc<Faults>,
}

#[derive(Default)]
struct Pages {
    now: Option<[Vec<u8>; 2]>,
    disk: Option<[Vec<u8>; 2]>,
}

#[derive(Default)]
struct Disk {
    segments: Mutex<BTreeMap<Seq, Arc<SimSegment>>>,
    cursors: Mutex<Pages>,
    faults: Arc<Faults>,
}

/// Clones share one disk.
#[derive(Clone, Default)]
pub struct SimStore(Arc<Disk>);

impl SimSegment {
    fn with(bytes: &[u8], faults: Arc<Faults>) -> SimSegment {
        let word = |b: &[u8]| AtomicU32::new(u32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
        let now = bytes.chunks_exact(4).map(word).collect();
        SimSegment { now, disk: Mutex::new(bytes.to_vec()), faults }
    }
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.size()];
        self.read(0, &mut bytes);
        bytes
    }
}

impl SimStore {
    pub fn faults(&self) -> &Faults {
        &self.0.faults
    }
    /// Power cut: what a new machine finds on the disk.
    pub fn crash(&self, rng: &mut Rng) -> SimStore {
        let next = SimStore::default();
        let lost = self.faults().cuts_are_lost.load(Ordering::Relaxed);
        next.faults().cuts_are_lost.store(lost, Ordering::Relaxed);
        for (first, segment) in self.0.segments.lock().unwrap().iter() {
            let mut disk = segment.disk.lock().unwrap().clone();
            let now = segment.bytes();
            for (old, new) in disk.chunks_mut(SECTOR).zip(now.chunks(SECTOR)) {
                if rng.coin() {
                    old.copy_from_slice(new);
                }
            }
            let segment = Arc::new(SimSegment::with(&disk, next.0.faults.clone()));
            next.0.segments.lock().unwrap().insert(*first, segment);
        }
        let pages = self.0.cursors.lock().unwrap();
        let mut found = pages.disk.clone();
        if let (Some(disk), Some(now)) = (&mut found, &pages.now) {
            for (old, new) in disk.iter_mut().zip(now) {
                if rng.coin() {
                    old.clone_from(new);
                }
            }
        }
        *next.0.cursors.lock().unwrap() = Pages { now: found.clone(), disk: found };
        drop(pages);
        next
    }
    /// The process died, the machine did not: all that was written is there.
    pub fn killed(&self) -> SimStore {
        SimStore(self.0.clone())
    }
}

impl Store for SimStore {
    fn list(&self) -> io::Result<Vec<Seq>> {
        Ok(self.0.segments.lock().unwrap().keys().copied().collect())
    }
    fn open(&self, first: Seq) -> io::Result<Arc<dyn Segment>> {
        match self.0.segments.lock().unwrap().get(&first) {
            Some(segment) => Ok(segment.clone()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
    fn create(&self, first: Seq, len: usize, header: &[u8]) -> io::Result<Arc<dyn Segment>> {
        if self.faults().disk_full.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let mut bytes = vec![0; len];
        bytes[..header.len()].copy_from_slice(header);
        let segment = Arc::new(SimSegment::with(&bytes, self.0.faults.clone()));
        self.0.segments.lock().unwrap().insert(first, segment.clone());
        Ok(segment)
    }
    fn remove(&self, first: Seq) -> io::Result<()> {
        self.0.segments.lock().unwrap().remove(&first);
        Ok(())
    }
    fn cursors(&self) -> io::Result<Option<[Vec<u8>; 2]>> {
        Ok(self.0.cursors.lock().unwrap().now.clone())
    }
    fn put_cursors(&self, slot: usize, page: &[u8], durable: bool) -> io::Result<()> {
        let mut pages = self.0.cursors.lock().unwrap();
        let empty = || [vec![0; CURSORS_LEN], vec![0; CURSORS_LEN]];
        if durable && self.faults().sync_fails.load(Ordering::Relaxed) {
            // the worst that a failed write can leave
            pages.now.get_or_insert_with(empty)[slot] = vec![0xee; CURSORS_LEN];
            pages.disk = pages.now.clone();
            return Err(io::Error::from_raw_os_error(5));
        }
        pages.now.get_or_insert_with(empty)[slot] = page.to_vec();
        if durable {
            pages.disk = pages.now.clone();
        }
        Ok(())
    }
    fn path(&self, file: &str) -> PathBuf {
        PathBuf::from("/simulated").join(file)
    }
}

impl Bytes for SimSegment {
    fn size(&self) -> usize {
        self.now.len() * 4
    }
    fn read(&self, at: usize, out: &mut [u8]) {
        let words = &self.now[at / 4..(at + out.len()) / 4];
        for (word, bytes) in words.iter().zip(out.chunks_exact_mut(4)) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
    }
}

impl Segment for SimSegment {
    fn put(&self, at: usize, bytes: &[u8]) {
        let zeros = bytes.iter().all(|byte| *byte == 0);
        if zeros && self.faults.cuts_are_lost.load(Ordering::Relaxed) {
            return;
        }
        for (word, b) in self.now[at / 4..].iter().zip(bytes.chunks_exact(4)) {
            word.store(u32::from_ne_bytes([b[0], b[1], b[2], b[3]]), Ordering::Relaxed);
        }
    }
    fn word(&self, at: usize) -> u32 {
        u32::from_le(self.now[at / 4].load(Ordering::Acquire))
    }
    fn set_word(&self, at: usize, word: u32) {
        self.now[at / 4].store(word.to_le(), Ordering::Release);
    }
    fn sync(&self, at: usize, len: usize) -> io::Result<()> {
        if self.faults.sync_fails.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(5));
        }
        // whole sectors, as the kernel writes whole pages
        let (from, to) = (at / SECTOR * SECTOR, (at + len).next_multiple_of(SECTOR));
        let now = self.bytes();
        let to = to.min(now.len());
        self.disk.lock().unwrap()[from..to].copy_from_slice(&now[from..to]);
        Ok(())
    }
}
