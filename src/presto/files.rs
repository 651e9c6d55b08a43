//! Operations on open files: open, read, write, flush, sync, release, allocate, seek, copy.
//!
//! What the kernel writes by passthrough is not seen here. So a change shows by the file's times
//! and size against those of the last store record, and is journaled at flush (each close of a
//! writer), fsync and release (for what a mapping changed later). A table that outlives the
//! process names the files that are open for writing: after a kill they are stored anew.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use super::filter::{Filter, Found, Result, Spot, Stop, done, missing};
use super::open::{Closed, Grip, Had, Mark, Open, Way, open_backing};
use crate::kml::record::{Fid, Op, PATH_LEN_MAX, ROOT, Range, Seq, Stamp, Time};
use crate::lento::rights::Mode;
use crate::replica::cache::Written;
use crate::replica::hydrate::CAPABILITY;
use crate::replica::meta::Meta;
use crate::replica::tree::TreeError;
use crate::sys::cred::Caller;
use crate::sys::fs::{self, Kind, o};
use crate::sys::{Errno, crash};

/// Modes of fallocate(2).
const PUNCH_HOLE: u32 = 0x02;
const COLLAPSE_RANGE: u32 = 0x08;
const INSERT_RANGE: u32 = 0x20;
/// Files up to this size are fetched whole when they are opened, bytes.
const WHOLE_LEN_MAX: u64 = 4 << 20;

impl Filter {
    /// Opens a file that exists.
    pub fn open(&self, by: Caller, fid: Fid, flags: i32) -> Result<Grip> {
        let writer = flags & o::ACCMODE != o::RDONLY;
        if flags & o::TRUNC != 0 && writer {
            let wish = super::attrs::Wish { size: Some(0), ..Default::default() };
            self.setattr(by, fid, wish)?;
        }
        let grip = self.open_found(fid, flags)?;
        if writer && !grip.open.writable {
            self.close(&grip).1?;
            return Err(Errno::ROFS.into());
        }
        Ok(grip)
    }

    fn open_found(&self, fid: Fid, flags: i32) -> Result<Grip> {
        let writer = flags & o::ACCMODE != o::RDONLY;
        // So that a file that is to be written stays as it is found.
        let _object = self.cache.tree.lock_objects(&[fid]);
        let object = self.here(fid)?;
        if object.stat.kind() != Kind::File {
            return Err(Errno::INVAL.into());
        }
        if object.stat.size <= WHOLE_LEN_MAX
            && !self.cache.is_unsaved(fid)
            && let Some(miss) = missing(&object.meta, 0, u64::MAX)
        {
            return Err(miss);
        }
        if writer {
            self.changeable()?;
            self.permitted([fid].into_iter())?;
            self.room_heard()?;
        }
        self.cache.note_used(fid);
        let complete = object.meta.complete;
        if writer && let Spot::Open(open) = &object.spot {
            self.cache.settle_hydrated(fid, &open.fd)?;
        }
        let way = || -> Result<Way> {
            // Whoever had it open has closed it meanwhile: then it is looked up again.
            let Spot::Entry(dir, name) = &object.spot else { return Err(Errno::STALE.into()) };
            let (fd, writable) = open_backing(&**dir, name.as_bytes())?;
            if writer {
                self.cache.settle_hydrated(fid, &fd)?;
            }
            let stat = fs::fstat(&fd)?;
            let (mark, blocks) = (Mark::of(&stat), stat.blocks);
            let able = self.passthrough.load(Ordering::Relaxed);
            let passthrough = able && complete && writable && self.kernel_may_move(flags, &stat);
            let unseen = self.cache.seen(object.meta.fid).is_some();
            Ok(Way { fd, passthrough, writable, unseen, mark, blocks })
        };
        self.open_handle(fid, flags, way)
    }

    /// The first handle of a file that was made just now.
    pub(super) fn open_new(&self, fd: OwnedFd, meta: &Meta, flags: i32) -> Result<(Found, Grip)> {
        let stat = fs::fstat(&fd)?;
        let (mark, blocks) = (Mark::of(&stat), stat.blocks);
        let able = self.passthrough.load(Ordering::Relaxed);
        let passthrough = able && self.kernel_may_move(flags, &stat);
        let (writable, unseen) = (true, false);
        let way = || Ok(Way { fd, passthrough, writable, unseen, mark, blocks });
        let grip = self.open_handle(meta.fid, flags, way)?;
        Ok((self.found(stat, meta), grip))
    }

    /// One more handle; a writer is noted where a kill cannot erase it.
    pub fn open_handle(
        &self,
        fid: Fid,
        flags: i32,
        way: impl FnOnce() -> Result<Way>,
    ) -> Result<Grip> {
        let writer = flags & o::ACCMODE != o::RDONLY;
        let open = self.files.open(fid, writer, way)?;
        if writer {
            let mut state = open.state();
            if state.slot.is_none() {
                state.slot = self.writers.take(fid);
                if state.slot.is_none() {
                    drop(state);
                    self.files.close(&open, Had { writer, ..Had::default() });
                    return Err(Errno::NFILE.into());
                }
                self.cache.begin_writing(fid, open.clone());
            }
        }
        let by_kernel = writer && open.passthrough && self.kernel_may_write(&open);
        let rdwr = flags & o::ACCMODE == o::RDWR;
        if by_kernel {
            open.state().begin_by_kernel();
        } else if rdwr && open.passthrough {
            open.state().dirty = None; // what a mapping writes nobody sees
        }
        // Whoever writes past the daemon is looked at.
        let covered = (rdwr && !by_kernel && !self.strict).then(|| self.cover_mapping(&open));
        let maps = match covered {
            None => false,
            Some(Ok(())) => true,
            // Where readers have it open past the daemon, the kernel maps it whatever it is told.
            Some(Err(stop)) if open.passthrough => {
                self.open_failed(&open);
                return Err(stop);
            }
            Some(Err(_)) => false,
        };
        if maps {
            open.state().begin_mapping();
        }
        // Readers may have it open past the daemon, or a mapping takes room that is not there: then
        // each write is a request of its own. So is each access in strict mode: while one waits for its
        // right the kernel would keep pages locked that others' rights need to be forgotten.
        let direct = self.strict || (writer && !by_kernel && (open.passthrough || (rdwr && !maps)));
        Ok(Grip { open, writer, by_kernel, maps, direct })
    }

    /// A writer's handle that nobody gets: it has written nothing.
    fn open_failed(&self, open: &Open) {
        let Closed { slot, .. } = self.files.close(open, Had { writer: true, ..Had::default() });
        // Else a store has failed before, and leaves its note.
        if let Some(slot) = slot.filter(|_| !open.is_unsaved()) {
            self.writers.release(slot);
            self.cache.end_writing(open.fid);
        }
    }

    /// Closes one handle, in any case. True when it was the object's last.
    pub fn close(&self, grip: &Grip) -> (bool, Result<()>) {
        let Grip { open, writer, by_kernel, maps, .. } = grip;
        let (writer, by_kernel, maps) = (*writer, *by_kernel, *maps);
        let stored = if writer { done(|| self.store(open)) } else { Ok(()) };
        let Closed { last, slot } = self.files.close(open, Had { writer, by_kernel, maps });
        if by_kernel {
            self.kernel_wrote();
        }
        // A store that failed leaves its note: the next start stores the file.
        if let (Some(slot), Ok(())) = (slot, &stored) {
            self.writers.release(slot);
            self.cache.end_writing(open.fid);
        }
        (last, stored)
    }

    /// Journals that the file's data changed, if they did since the last such record.
    pub fn store(&self, open: &Open) -> Result<()> {
        let _object = self.cache.tree.lock_objects(&[open.fid]);
        let stat = fs::fstat(&open.fd)?;
        let mark = Mark::of(&stat);
        let mut state = open.state();
        if (state.stored == mark && !state.changed) || stat.nlink == 0 {
            return Ok(());
        }
        let meta = self.cache.tree.meta_of(&open.fd)?.ok_or(Errno::STALE)?;
        // What was written in passthrough is not known: then it is the whole file. Where the
        // server's new contents were on their way in just then, it is a version of its own, based on
        // none: the server keeps it aside.
        let (ranges, base) = match &state.dirty {
            Some(ranges) if !meta.complete || self.ships_ranges(open, &state, &stat) => {
                (within(ranges, stat.size), meta.stamp)
            }
            None if !meta.complete => (whole(stat.size), Stamp(0)),
            _ => (whole(stat.size), meta.stamp),
        };
        let mtime = Time { sec: stat.mtime.0, nsec: stat.mtime.1 };
        let (fid, size, old_size) = (open.fid, stat.size, state.stored.size);
        let path = self.cache.tree.path_by_fid(fid);
        self.permitted([fid].into_iter())?;
        let charge = self.charge_of_store(open, &mut state, &stat, &ranges, path.len());
        let op = Op::Store { fid, base, size, mtime, ranges, old_size };
        let by = Caller { uid: stat.uid, gid: stat.gid, umask: 0 };
        crash::point("store-begun");
        self.change_charged(by, path.clone(), op, charge, |_| Ok(()))?;
        crash::point("store-journaled");
        // New data end a file's capabilities wherever they are written: these were set after it.
        let name = CAPABILITY.to_vec();
        if let Some(value) = fs::xattr::get(&open.fd, b"", CAPABILITY).unwrap_or_default() {
            let op = Op::Setxattr { fid, base, name, old: Some(value.clone()), value };
            done(|| self.change(by, path, op, |_| Ok(())))?;
        }
        // What was taken beyond that is for what is still to be written, if anybody is to write.
        state.charge = None;
        (state.stored, state.changed) = (mark, false);
        if self.cache.seen(fid).is_some() {
            self.cache.watch(fid, (stat.size, stat.mtime));
        }
        self.cache.note_held(stat.blocks * 512, state.held_blocks * 512);
        state.held_blocks = stat.blocks;
        if let Some(ranges) = &mut state.dirty {
            ranges.clear();
        }
        let (by_kernel, mapped) = (state.by_kernel(), state.may_be_mapped());
        drop(state);
        if by_kernel {
            self.cover_whole(open); // or the next look does
        }
        if mapped {
            let _ = self.cover_mapping(open); // or the next store, or the write of a page does
        }
        Ok(())
    }

    /// Journals what was written so far to files that are still open. The kernel tells of the last
    /// close, and of the end of a mapping, only after the application goes on.
    pub fn store_all(&self) {
        for open in self.files.written() {
            if let Err(e) = self.store(&open) {
                log::warn!("{}: what was written is not journaled yet: {e:?}", open.fid);
            }
        }
    }

    /// The file's data, its names with the directories on their way, and the journal are durable on
    /// the local disk on return.
    pub fn fsync(&self, open: &Open) -> Result<()> {
        let durable = self.cache.durable();
        match self.cache.pending().made(open.fid).attr > durable {
            true => fs::fsync(&open.fd)?, // what imz knows of it, too
            false => fs::fdatasync(&open.fd)?,
        }
        crash::point("fsync-data");
        self.store(open)?;
        for (dir, _) in self.cache.tree.names(open.fid)? {
            self.sync_way(dir, durable)?;
        }
        crash::point("fsync-names");
        Ok(self.cache.log.sync(self.cache.log.last())?)
    }

    /// The directory's entries, its own way from the root, and the journal are durable on return.
    pub fn fsync_dir(&self, fid: Fid) -> Result<()> {
        let dir = self.cache.tree.dir(fid)?;
        fs::fsync(&*dir)?;
        self.sync_way(fid, self.cache.durable())?;
        Ok(self.cache.log.sync(self.cache.log.last())?)
    }

    /// Makes the directories durable in which something has changed since the tree was, from this
    /// one up to the root.
    fn sync_way(&self, mut fid: Fid, durable: Seq) -> Result<()> {
        for _ in 0..PATH_LEN_MAX {
            if self.cache.pending().made(fid).entries > durable {
                match self.cache.tree.dir(fid) {
                    Ok(dir) => fs::fsync(&*dir)?,
                    Err(TreeError::Gone(_)) => {} // an old place
                    Err(e) => return Err(e.into()),
                }
            }
            let up = self.cache.tree.names(fid)?.pop();
            match up.filter(|_| fid != ROOT) {
                Some((parent, _)) => fid = parent,
                None => break,
            }
        }
        Ok(())
    }

    /// Stops with a miss when the bytes are not all here.
    fn bytes_here(&self, open: &Open, at: u64, len: u64) -> Result<()> {
        let meta = self.cache.tree.meta_of(&open.fd)?.ok_or(Errno::STALE)?;
        missing(&meta, at, len).map_or(Ok(()), Err)
    }

    /// Journals what was written so far to these files, or to all: others need them. What was done
    /// under a permit that is being let go is done.
    pub fn save_written(&self, fids: &[Fid]) {
        for open in self.files.written() {
            if (fids.is_empty() || fids.contains(&open.fid))
                && let Err(e) = done(|| self.store(&open))
            {
                log::warn!("{}: what was written is not journaled yet: {e:?}", open.fid);
            }
        }
    }

    /// In strict mode each access needs its right, not only the opening of the file.
    fn admit(&self, open: &Open, mode: Mode) -> Result<()> {
        if mode == Mode::Write {
            self.changeable()?;
        }
        if !self.strict {
            return Ok(());
        }
        if mode == Mode::Write {
            self.permitted([open.fid].into_iter())?;
        }
        // others may have changed it before the right came back
        self.here(open.fid).map(drop)
    }

    pub fn read(&self, open: &Open, at: u64, len: u32) -> Result<Vec<u8>> {
        self.admit(open, Mode::Read)?;
        self.bytes_here(open, at, len.into())?;
        let mut bytes = vec![0; len as usize];
        let mut filled = 0;
        while filled < bytes.len() {
            match fs::pread(&open.fd, &mut bytes[filled..], at + filled as u64)? {
                0 => break,
                n => filled += n,
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }

    /// A write that comes to the daemon. `kill`: the kernel wants set-id bits gone. `page`: a mapping
    /// has written it, and nobody would hear of an error.
    pub fn write(
        &self,
        by: Caller,
        open: &Open,
        at: u64,
        bytes: &[u8],
        (kill, page): (bool, bool),
    ) -> Result<u32> {
        let end = at.checked_add(bytes.len() as u64).ok_or(Errno::FBIG)?;
        let _object = self.cache.tree.lock_objects(&[open.fid]);
        self.admit(open, Mode::Read)?;
        self.admit(open, Mode::Write)?;
        self.bytes_here(open, at, end - at)?;
        self.cache.settle_hydrated(open.fid, &open.fd)?;
        let charged = || self.charged_write(open, at, bytes.len() as u64);
        let charge = if page { done(charged)? } else { charged()? };
        if kill {
            self.drop_set_id(by, open.fid)?;
        }
        fs::pwrite_all(&open.fd, bytes, at)?;
        open.wrote(at, bytes.len() as u64, Some(charge));
        Ok(bytes.len() as u32)
    }

    pub fn fallocate(&self, open: &Open, mode: u32, at: u64, len: u64) -> Result<()> {
        // Holes, zeros and shifts change bytes that must be here to be kept right.
        let _object = self.cache.tree.lock_objects(&[open.fid]);
        self.admit(open, Mode::Read)?;
        self.admit(open, Mode::Write)?;
        self.bytes_here(open, 0, u64::MAX)?;
        self.cache.settle_hydrated(open.fid, &open.fd)?;
        let size = fs::fstat(&open.fd)?.size;
        let changed_len = match mode {
            // Whoever gives room takes none.
            mode if mode & PUNCH_HOLE != 0 => len.min(size.saturating_sub(at)),
            // A shift moves all that follows.
            mode if mode & (COLLAPSE_RANGE | INSERT_RANGE) != 0 => {
                size.max(at).saturating_add(len) - at
            }
            _ => len,
        };
        let charge = match mode & PUNCH_HOLE {
            0 => Some(self.charged_write(open, at, changed_len)?),
            _ => None,
        };
        fs::fallocate(&open.fd, mode, at, len)?;
        open.wrote(at, changed_len, charge);
        Ok(())
    }

    /// The next data (or hole) at or after `at`. What is not here counts as data.
    pub fn seek(&self, open: &Open, at: u64, hole: bool) -> Result<u64> {
        if self.cache.tree.meta_of(&open.fd)?.is_none_or(|meta| meta.complete) {
            return Ok(fs::seek_sparse(&open.fd, at, hole)?);
        }
        let size = fs::fstat(&open.fd)?.size;
        match (at < size, hole) {
            (false, _) => Err(Errno::NXIO.into()),
            (true, true) => Ok(size),
            (true, false) => Ok(at),
        }
    }

    pub fn copy_range(&self, from: (&Open, u64), to: (&Open, u64), len: u64) -> Result<u32> {
        let _objects = self.cache.tree.lock_objects(&[from.0.fid, to.0.fid]);
        self.admit(from.0, Mode::Read)?;
        self.admit(to.0, Mode::Read)?;
        self.admit(to.0, Mode::Write)?;
        self.bytes_here(from.0, from.1, len)?;
        self.bytes_here(to.0, to.1, len)?;
        self.cache.settle_hydrated(to.0.fid, &to.0.fd)?;
        let len = len.min(1 << 30) as usize;
        let charge = self.charged_write(to.0, to.1, len as u64)?;
        let copied = fs::copy_range(&from.0.fd, from.1, &to.0.fd, to.1, len)?;
        to.0.wrote(to.1, copied as u64, Some(charge));
        Ok(copied as u32)
    }

    /// After a kill: what was open for writing then may have changed without a record.
    pub fn store_what_was_open(&self) -> Result<usize> {
        self.store_these(&self.writers.listed())
    }

    /// Journals these files as they are.
    pub fn store_these(&self, listed: &[Fid]) -> Result<usize> {
        for fid in listed {
            if let Ok(fd) = self.cache.tree.open_object(*fid, o::RDONLY) {
                self.store_anew(*fid, fd)?;
            }
        }
        Ok(listed.len())
    }

    /// Journals all the data of a file that nobody else has open.
    pub fn store_anew(&self, fid: Fid, fd: OwnedFd) -> Result<()> {
        let stat = fs::fstat(&fd)?;
        let meta = self.cache.tree.meta_of(&fd)?.ok_or(Errno::STALE)?;
        let mark = Mark::of(&fs::Stat::default());
        let (passthrough, writable, blocks) = (meta.complete, false, stat.blocks);
        let unseen = passthrough;
        let way = || Ok::<_, Stop>(Way { fd, passthrough, writable, unseen, mark, blocks });
        let open = self.files.open(fid, false, way)?;
        // Of a file that is not all here, whatever is here may have been written.
        for range in meta.present(stat.size) {
            open.wrote(range.at, range.len, None);
        }
        let stored = done(|| self.store(&open));
        self.files.close(&open, Had::default());
        stored
    }
}

fn whole(size: u64) -> Vec<Range> {
    within(&[Range { at: 0, len: size }], size)
}

/// The ranges as far as the file goes.
fn within(ranges: &[Range], size: u64) -> Vec<Range> {
    let cut = |r: &Range| Range { at: r.at, len: r.len.min(size.saturating_sub(r.at)) };
    ranges.iter().map(cut).filter(|r| r.len > 0).collect()
}
