//! Eviction: the data of a file go, and a stub stays that is fetched again when it is read.
//!
//! The one place where data are given up, and so the one where it stands when they may be. Under the
//! object's lock, which everybody takes who opens it or journals a change of it, a file goes only if
//!
//! 1. the journal does not name it: the server has all that was ever acknowledged here of it, and that is
//!    durably known, so that a journal that is read again after a crash does not name it either;
//! 2. nobody has it open through the mount, or wrote to it since somebody last looked;
//! 3. nobody has it open or mapped behind the mount: the kernel gives us a lease for writing;
//! 4. it is not pinned, and no piece of it is on its way.
//!
//! First what is known of it, then the data: a crash in between fetches again. How much may stay is
//! policy; in which order files go is the filter's (`presto::evictor`).

use std::os::fd::AsFd;

use super::cache::Cache;
use super::hydrate;
use super::meta::Meta;
use super::tree::{LIMBO, Result, TreeError};
use crate::kml::record::Fid;
use crate::sys::fs::{self, Kind, Stat, o};
use crate::sys::{Errno, file};

/// Why a file keeps its data.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Kept {
    #[error("the server does not have all of it yet")]
    Named,
    #[error("it is open")]
    Open,
    #[error("a process has it mapped, or open in the cache")]
    InUse,
    #[error("it is pinned")]
    Pinned,
    #[error("it is being fetched")]
    Arriving,
    #[error("it is no file, or gone")]
    Gone,
    #[error("the cache's file system says: {0}")]
    Failed(Errno),
}

impl From<Errno> for Kept {
    fn from(e: Errno) -> Kept {
        match e {
            // somebody runs it, or has a lease of it
            Errno::TXTBSY | Errno::AGAIN => Kept::InUse,
            Errno::NOENT | Errno::LOOP => Kept::Gone,
            e => Kept::Failed(e),
        }
    }
}

impl From<TreeError> for Kept {
    fn from(e: TreeError) -> Kept {
        match e {
            TreeError::Gone(_) => Kept::Gone,
            e => Kept::from(e.errno()),
        }
    }
}

/// Makes a stub of a file; how much room that gave, bytes. `is_open`: through the mount. Durable on
/// return: no.
///
/// # Errors
/// [`Kept`]: it is as it was.
pub fn evict(
    cache: &Cache,
    fid: Fid,
    is_open: impl FnOnce() -> bool,
) -> std::result::Result<u64, Kept> {
    let _object = cache.tree.lock_objects(&[fid]);
    let kept = cache.acked();
    if cache.pending().is_named(fid, kept) {
        return Err(Kept::Named);
    }
    if is_open() || cache.written(fid).is_some() {
        return Err(Kept::Open);
    }
    if cache.seen(fid).is_some() {
        return Err(Kept::InUse);
    }
    if cache.is_arriving(fid) {
        return Err(Kept::Arriving);
    }
    if is_pinned(cache, fid)? {
        return Err(Kept::Pinned);
    }
    let fd = cache.tree.open_object(fid, o::RDWR | o::NONBLOCK)?;
    let stat = fs::fstat(&fd)?;
    let meta = cache.tree.meta_of(&fd)?.ok_or(Kept::Gone)?;
    if stat.kind() != Kind::File || meta.fid != fid {
        return Err(Kept::Gone);
    }
    if stat.blocks == 0 {
        return Ok(0);
    }
    if !file::is_alone(fd.as_fd())? {
        return Err(Kept::InUse);
    }
    cache.tree.set_meta_of(&fd, &stub_of(&meta, stat.size))?;
    hydrate::as_it_looked(&fd, &stat, || punch(&fd, &stat))?;
    let left = fs::fstat(&fd)?.blocks;
    let gave = stat.blocks.saturating_sub(left) * 512;
    cache.note_held(0, gave);
    cache.note_evicted(gave);
    Ok(gave)
}

fn is_pinned(cache: &Cache, fid: Fid) -> Result<bool> {
    if cache.pins.is_empty() {
        return Ok(false);
    }
    // A file may have several names, and one that is pinned keeps it.
    for (dir, name) in cache.tree.names(fid)?.into_iter().filter(|(dir, _)| *dir != LIMBO) {
        let Ok(dir) = cache.tree.dir(dir) else { continue };
        if cache.pins.covers(&cache.tree.path_of(&dir, &name)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The same object, of whose `size` bytes nothing is here.
fn stub_of(meta: &Meta, size: u64) -> Meta {
    let Meta { fid, stamp, foreign, author, stale, epoch, nlink, .. } = *meta;
    Meta { foreign, author, stale, epoch, nlink, ..Meta::stub(fid, stamp, size) }
}

fn punch(fd: impl AsFd, stat: &Stat) -> std::result::Result<(), Errno> {
    /// FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
    const PUNCH: u32 = 1 | 2;
    match fs::fallocate(&fd, PUNCH, 0, stat.size.max(stat.blocks * 512)) {
        Err(Errno::OPNOTSUPP) => {
            fs::truncate(&fd, 0)?;
            fs::truncate(&fd, stat.size)
        }
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::kml::codec::Outcome;
    use crate::kml::log::{Log, Options};
    use crate::kml::record::{Name, Op, Origin, ROOT, Range, Record, Seq, Stamp, Time};
    use crate::replica::state::{Facts, State};
    use crate::replica::tree::Tree;

    const F: Fid = Fid(77);
    const LEN: usize = 3 << 20;

    struct Rig {
        _dir: tempfile::TempDir,
        file: PathBuf,
        cache: Cache,
    }

    fn rig() -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let at = |n: &str| dir.path().join(n);
        std::fs::create_dir(at("tree")).unwrap();
        let tree = Tree::open(&at("tree"), &at("index"), true).unwrap();
        let log = Log::open_or_create(&at("kml"), 3, 1, Options::default()).unwrap();
        let state = State::open(&at("state"), || Facts::new("v", "", 7, 3)).unwrap();
        let cache = Cache::new(tree, log, state, &at("limbo")).unwrap();
        let file = at("tree/f");
        std::fs::write(&file, vec![9; LEN]).unwrap();
        let name = Name::new(b"f").unwrap();
        let meta = Meta { stamp: Stamp(5), ..Meta::whole(F) };
        cache.tree.set_meta(cache.tree.root(), &name, &meta).unwrap();
        cache.tree.index.set(F, ROOT, &name);
        Rig { _dir: dir, file, cache }
    }

    fn store() -> Record {
        let ranges = vec![Range { at: 0, len: LEN as u64 }];
        let (base, mtime, size) = (Stamp(5), Time::default(), LEN as u64);
        let op = Op::Store { fid: F, base, size, mtime, ranges, old_size: 0 };
        Record { time_ns: 1, origin: Origin::default(), uid: 0, gid: 0, path: vec![], op }
    }

    fn closed() -> bool {
        false
    }

    #[test]
    fn a_clean_file_becomes_a_stub_that_looks_the_same() {
        use std::os::unix::fs::MetadataExt;
        let rig = rig();
        let before = std::fs::metadata(&rig.file).unwrap();
        assert!(evict(&rig.cache, F, closed).unwrap() >= LEN as u64);
        let after = std::fs::metadata(&rig.file).unwrap();
        assert_eq!((after.len(), after.blocks()), (LEN as u64, 0));
        assert_eq!(
            (after.mtime(), after.mtime_nsec(), after.mode()),
            (before.mtime(), before.mtime_nsec(), before.mode())
        );
        let meta = rig.cache.tree.find(F).unwrap().2;
        assert!(!meta.complete && meta.stamp == Stamp(5));
        assert_eq!(meta.missing(0, u64::MAX), Some((0, LEN as u64)));
        assert_eq!(evict(&rig.cache, F, closed), Ok(0), "there is nothing left to give");
        let one = vec![9; 1 << 20];
        hydrate::write_range(&rig.cache, F, Stamp(5), 0, &one, Some((0, 1 << 20))).unwrap();
        assert!(evict(&rig.cache, F, closed).unwrap() > 0, "also of one that is not whole");
    }

    /// Each reason alone keeps every byte.
    #[test]
    fn what_may_not_go_stays() {
        let rig = rig();
        let whole = |rig: &Rig| std::fs::read(&rig.file).unwrap() == vec![9; LEN];
        // the journal names it, until the server has it
        let ticket = rig.cache.append(&store()).unwrap();
        let seq = ticket.seq;
        rig.cache.settle(ticket, Outcome::Done);
        assert_eq!(evict(&rig.cache, F, closed), Err(Kept::Named));
        rig.cache.pending().let_go(&[F], seq, false);
        assert_eq!(evict(&rig.cache, F, closed), Err(Kept::Named), "it is only on its way");
        rig.cache.pending().acked(seq);
        assert!(rig.cache.fell_back(Seq(0), seq).unwrap().contains("sent again"));
        assert_eq!(evict(&rig.cache, F, closed), Err(Kept::Named), "the server lost it again");
        rig.cache.pending().acked(seq);
        assert_eq!(evict(&rig.cache, F, closed), Err(Kept::Named), "a crash would not know it");
        rig.cache.keep_all(seq, Stamp(5)).unwrap();
        assert_eq!(evict(&rig.cache, F, || true), Err(Kept::Open));
        // watched, for somebody had it mapped
        rig.cache.watch(F, (0, (0, 0)));
        assert_eq!(evict(&rig.cache, F, closed), Err(Kept::InUse));
        rig.cache.end_watching(F);
        // open behind the mount, in whatever way
        let reader = std::fs::File::open(&rig.file).unwrap();
        assert_eq!(evict(&rig.cache, F, closed), Err(Kept::InUse));
        drop(reader);
        rig.cache.pins.add(b"f", 0).unwrap();
        assert_eq!(evict(&rig.cache, F, closed), Err(Kept::Pinned));
        assert!(whole(&rig) && rig.cache.tree.find(F).unwrap().2.complete);
        rig.cache.pins.remove(b"f").unwrap();
        assert!(evict(&rig.cache, F, closed).is_ok());
        // a piece of a granule has come, and the granule is not whole
        hydrate::write_range(&rig.cache, F, Stamp(5), 0, &[9; 10], None).unwrap();
        assert_eq!(evict(&rig.cache, F, closed), Err(Kept::Arriving));
        rig.cache.end_arriving();
        assert!(evict(&rig.cache, F, closed).is_ok());
        assert_eq!(evict(&rig.cache, Fid(5), closed), Err(Kept::Gone));
    }
}
