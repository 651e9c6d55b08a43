//! What the server sends about one object, put into the cache: attributes, data, staleness.
//!
//! A file whose contents are new at the server becomes a stub in place: right size, and nothing of
//! it counts as here. The old bytes stay where they lie until the new ones replace them, so that a
//! process that has the file open and mapped never sees zeros. All functions take the object's
//! lock; what own records are newer about than the fetch (`mark`) stays as it is.

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use super::cache::Cache;
use super::meta::Meta;
use super::ops::attr_of;
use super::tree::{Dir, Result, TreeError};
use crate::kml::record::{Attr, Fid, Name, ROOT, Seq, Stamp, Time};
use crate::sys::fs::{self, Kind, SetTime, Stat, o};
use crate::sys::{Errno, crash, cred};

/// Writing to a file takes this attribute away, whoever writes.
pub const CAPABILITY: &[u8] = b"security.capability";

/// One object as the server has it.
#[derive(Clone, PartialEq, Debug)]
pub struct Remote {
    pub fid: Fid,
    pub stamp: Stamp,
    pub attr: Attr,
    /// where a symbolic link leads; empty otherwise
    pub target: Vec<u8>,
    /// (name, value) of all but imz's own
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// of a file: when its data became what they are, at the latest; `None`: at `stamp`
    pub stored: Option<Stamp>,
}

/// What the kernel must forget, because it is not so any more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Notice {
    /// attributes and data of the object; of a directory also its listing, and what it is known
    /// not to contain
    Object { fid: Fid, dir: bool },
    /// what this name stands for
    Entry { dir: Fid, name: Name },
    /// everything
    All,
}

pub(super) fn time(time: Time) -> SetTime {
    SetTime::At(time.sec, time.nsec)
}

/// Puts an object as the server has it into the cache, where it stands already. Of one that was
/// stale the kernel keeps nothing, and is told nothing: it may be asking for it at this moment, and
/// would drop the answer to a question from before a notice.
///
/// # Errors
/// The backing file system failed. An object that is not in the cache is no error.
pub fn set_object(cache: &Cache, object: &Remote, mark: Seq) -> Result<Vec<Notice>> {
    let fid = object.fid;
    let is_dir = Kind::of(object.attr.mode) == Kind::Dir;
    if let Some(dir) = cache.tree.cached_dir(fid).filter(|_| is_dir) {
        let _locked = cache.tree.lock_objects(&[fid]);
        let known = cache.current(&dir.meta());
        update_dir(cache, &dir, object, mark, false)?;
        return Ok(if known { vec![Notice::Object { fid, dir: true }] } else { Vec::new() });
    }
    let mut known = false;
    let done = at_place(cache, fid, |dir, name, meta| {
        known = cache.current(&meta);
        let stat = fs::stat(dir, name.as_bytes())?;
        if stat.kind() == Kind::of(object.attr.mode) {
            update(cache, dir, name, meta, object, mark)?;
        }
        Ok(())
    });
    match not_gone(done)? {
        Some(()) if known => Ok(vec![Notice::Object { fid, dir: is_dir }]),
        _ => Ok(Vec::new()),
    }
}

/// Does something with an object where it stands, under the locks that keep it there.
fn at_place<T>(
    cache: &Cache,
    fid: Fid,
    act: impl FnOnce(&Dir, &Name, Meta) -> Result<T>,
) -> Result<T> {
    for _ in 0..8 {
        let (dir, name, _) = cache.tree.find(fid)?;
        let _entries = cache.tree.lock(&[dir.fid]);
        let _object = cache.tree.lock_objects(&[fid]);
        if let Some(meta) = not_gone(cache.tree.meta(&dir, &name))?.flatten()
            && meta.fid == fid
        {
            return act(&dir, &name, meta);
        }
        // It moved while the locks were awaited.
    }
    Err(TreeError::Gone(fid))
}

/// Changes what is known of an object, wherever it stands.
fn edit(cache: &Cache, fid: Fid, change: impl FnOnce(&mut Meta)) -> Result<()> {
    if let Some(dir) = cache.tree.cached_dir(fid) {
        let _locked = cache.tree.lock_objects(&[fid]);
        return cache.tree.edit_dir(&dir, change);
    }
    at_place(cache, fid, |dir, name, mut meta| {
        let before = meta.clone();
        change(&mut meta);
        if meta == before { Ok(()) } else { cache.tree.set_meta(dir, name, &meta) }
    })
}

fn not_gone<T>(found: Result<T>) -> Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(TreeError::Gone(_) | TreeError::Os(Errno::NOENT)) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Brings the object at `name`, which is `object` by its fid, to the server's state. The caller
/// holds the locks.
pub(super) fn update(
    cache: &Cache,
    dir: &Dir,
    name: &Name,
    mut meta: Meta,
    object: &Remote,
    mark: Seq,
) -> Result<()> {
    let kind = Kind::of(object.attr.mode);
    if kind == Kind::Dir {
        let open = cache.tree.open_dir(dir, name)?;
        return update_dir(cache, &open, object, mark, false);
    }
    let own = cache.pending().own(meta.fid);
    if own.newest() > mark || cache.is_unsaved(meta.fid) {
        if object.stamp != meta.stamp && !meta.stale {
            meta.stale = true;
            cache.tree.set_meta(dir, name, &meta)?;
        }
        return Ok(());
    }
    let stat = fs::stat(dir, name.as_bytes())?;
    let before = meta.clone();
    meta.nlink = nlink(object, stat.nlink);
    meta.epoch = cache.epoch();
    if kind == Kind::File && !same_content(cache, &before, &stat, object) {
        meta = Meta { nlink: meta.nlink, epoch: meta.epoch, ..stub_meta(object) };
        // First what is known, then the file: a crash in between fetches again.
        cache.tree.set_meta(dir, name, &meta)?;
        crash::point("hydrate-labelled");
        let fd = fs::open(dir, name.as_bytes(), o::WRONLY | o::NONBLOCK, 0)?;
        fs::truncate(&fd, object.attr.size)?;
        crash::point("hydrate-cut");
        cache.note_held(0, stat.blocks * 512);
        cache.note_arrived(meta.fid); // pieces of the old version count no more
    } else {
        (meta.stamp, meta.stale) = (object.stamp, false);
        if meta != before {
            cache.tree.set_meta(dir, name, &meta)?;
        }
    }
    set_attributes(cache, dir, name.as_bytes(), object, false)?;
    cache.note_taken_over(meta.fid, || fs::stat(dir, name.as_bytes()))?;
    if let Some(file) = cache.written(meta.fid) {
        file.taken_over();
        if !meta.complete {
            cache.want_now(meta.fid);
        }
    }
    Ok(())
}

/// Whether the file's data here are those of the server's version, so that a rename or a chmod
/// elsewhere does not cost a fetch. Size and modification time alone would not tell, for times are
/// set; and what is of another history than the server's (the epoch is another one) may be alike in
/// all but its bytes.
fn same_content(cache: &Cache, meta: &Meta, stat: &Stat, object: &Remote) -> bool {
    let attr = attr_of(stat);
    let alike = attr.size == object.attr.size && attr.mtime == object.attr.mtime;
    let is_here = meta.epoch == cache.epoch() && !meta.is_disowned();
    let known = is_here && object.stored.unwrap_or(object.stamp) <= meta.stamp;
    (meta.stamp == object.stamp && !meta.stale) || (known && alike)
}

pub(super) fn stub_meta(object: &Remote) -> Meta {
    let mut meta = Meta::stub(object.fid, object.stamp, object.attr.size);
    if object.attr.size == 0 {
        meta.complete = true;
    }
    meta
}

/// The server's count of names, unless the backing file with `here` of them says the same for ever.
pub(super) fn nlink(object: &Remote, here: u32) -> u32 {
    match Kind::of(object.attr.mode) {
        Kind::Dir => object.attr.nlink,
        _ if object.attr.nlink > 1 || here > 1 => object.attr.nlink,
        _ => 0,
    }
}

/// A directory's attributes. `listed`: all its entries are here now, so that it is current.
pub(super) fn update_dir(
    cache: &Cache,
    dir: &Dir,
    object: &Remote,
    mark: Seq,
    listed: bool,
) -> Result<()> {
    let own = cache.pending().own(dir.fid);
    let epoch = cache.epoch();
    let again = cache.pending().doubt(dir.fid, mark);
    cache.tree.edit_dir(dir, |meta| {
        meta.dir_came(object.stamp, epoch, listed);
        meta.stale |= again;
        meta.nlink = if meta.complete { 0 } else { nlink(object, 0) };
    })?;
    if own.attr > mark {
        return Ok(());
    }
    set_attributes(cache, dir, b"", object, own.entries > mark)
}

/// Sets owner, mode, extended attributes and times, as far as they differ and we may.
/// `keep_times`: own changes are newer.
pub(super) fn set_attributes(
    cache: &Cache,
    dir: impl AsFd + Copy,
    name: &[u8],
    object: &Remote,
    keep_times: bool,
) -> Result<()> {
    let attr = &object.attr;
    let stat = if name.is_empty() { fs::fstat(dir)? } else { fs::stat(dir, name)? };
    if cred::is_root() && (stat.uid, stat.gid) != (attr.uid, attr.gid) {
        fs::chown(dir, name, Some(attr.uid), Some(attr.gid))?;
    }
    let kind = stat.kind();
    set_xattrs(cache, dir, name, &object.xattrs)?;
    if kind != Kind::Symlink {
        // After the owner, whose change takes set-id bits away, and after the access list.
        let now = if name.is_empty() { fs::fstat(dir)? } else { fs::stat(dir, name)? };
        let mode = attr.mode;
        if now.mode & 0o7777 != mode & 0o7777 {
            if name.is_empty() {
                fs::chmod_fd(dir, mode)?;
            } else {
                fs::chmod(dir, name, mode)?;
            }
        }
    }
    if keep_times {
        return Ok(());
    }
    let (atime, mtime) = (time(attr.atime), time(attr.mtime));
    if name.is_empty() {
        fs::utimes_fd(dir, atime, mtime)?;
    } else {
        fs::utimes(dir, name, atime, mtime)?;
    }
    Ok(())
}

fn set_xattrs(
    cache: &Cache,
    dir: impl AsFd + Copy,
    name: &[u8],
    wanted: &[(Vec<u8>, Vec<u8>)],
) -> Result<()> {
    let mut want: BTreeMap<&[u8], &[u8]> = BTreeMap::new();
    want.extend(wanted.iter().map(|(name, value)| (&name[..], &value[..])));
    want.remove(cache.tree.own_key());
    let refused = |key: &[u8], done: std::result::Result<(), Errno>| match done {
        Ok(()) | Err(Errno::NODATA) => Ok(()),
        Err(e @ (Errno::PERM | Errno::OPNOTSUPP | Errno::ACCESS)) => {
            log::debug!("attribute {} is left out: {e}", key.escape_ascii());
            Ok(())
        }
        Err(e) => Err(e),
    };
    for key in fs::xattr::list(dir, name)? {
        let foreign = key.starts_with(b"security.") && key != CAPABILITY;
        if key == cache.tree.own_key() || foreign {
            continue;
        }
        match want.remove(&key[..]) {
            Some(value) if fs::xattr::get(dir, name, &key)?.as_deref() == Some(value) => {}
            Some(value) => refused(&key, fs::xattr::set(dir, name, &key, value, 0))?,
            None => refused(&key, fs::xattr::remove(dir, name, &key))?,
        }
    }
    for (key, value) in want {
        refused(key, fs::xattr::set(dir, name, key, value, 0))?;
    }
    Ok(())
}

/// Writes bytes of the server's version `stamp` where they are missing. `granule` (at, len): these
/// are all here now. Bytes of another version than the one that is here are left out.
///
/// # Errors
/// The backing file system failed; the granule counts as missing.
pub fn write_range(
    cache: &Cache,
    fid: Fid,
    stamp: Stamp,
    at: u64,
    bytes: &[u8],
    granule: Option<(u64, u64)>,
) -> Result<()> {
    let _locked = cache.tree.lock_objects(&[fid]);
    let Some(fd) = not_gone(cache.tree.open_object(fid, o::RDWR | o::NONBLOCK))? else {
        return Ok(());
    };
    let Some(mut meta) = cache.tree.meta_of(&fd)? else { return Ok(()) };
    if meta.fid != fid || meta.stamp != stamp || meta.complete {
        return Ok(());
    }
    let is_unsaved = cache.is_unsaved(fid);
    if is_unsaved && cache.written(fid).is_some_and(|file| file.is_by_kernel()) {
        // Somebody has written where new contents were to come, and where is not known. It is left
        // as it is, to be kept aside as a version of its own: see the filter's `store`.
        return Ok(());
    }
    let stat = fs::fstat(&fd)?;
    let end = (at + bytes.len() as u64).min(meta.base_size).min(stat.size);
    as_it_looked(&fd, &stat, || {
        let mut next = at;
        while let Some((start, len)) = meta.missing(next, end.saturating_sub(next)) {
            let (from, to) = (start.max(next), (start + len).min(end));
            fs::pwrite_sparse(&fd, &bytes[(from - at) as usize..(to - at) as usize], from)?;
            next = to;
            if next >= end {
                break;
            }
        }
        Ok(())
    })?;
    cache.note_hydrated(fid);
    if is_unsaved || cache.pending().is_dirty(fid) {
        // After a power cut what pends is believed as it stands on the disk, and shipped.
        cache.settle_hydrated(fid, &fd)?;
    }
    crash::point("hydrate-written");
    match granule {
        Some((start, len)) => {
            meta.arrived(start, len);
            cache.tree.set_meta_of(&fd, &meta)?;
            crash::point("hydrate-noted");
            let now = fs::fstat(&fd)?;
            cache.note_held(now.blocks * 512, stat.blocks * 512);
            cache.note_arrived(fid);
            cache.note_used(fid);
        }
        None => cache.note_arriving(fid),
    }
    cache.note_taken_over(fid, || fs::fstat(&fd))?;
    if let Some(file) = cache.written(fid).filter(|_| !is_unsaved) {
        file.taken_over();
    }
    Ok(())
}

/// Changes data of a file that are none of anybody's changes: capabilities, mode and times stay, also
/// when it failed halfway.
pub(super) fn as_it_looked(
    fd: impl AsFd,
    stat: &Stat,
    act: impl FnOnce() -> std::result::Result<(), Errno>,
) -> std::result::Result<(), Errno> {
    let capability = fs::xattr::get(&fd, b"", CAPABILITY).unwrap_or_default();
    let done = act();
    if let Some(value) = capability {
        fs::xattr::set(&fd, b"", CAPABILITY, &value, 0)?;
    }
    if fs::fstat(&fd)?.mode != stat.mode {
        fs::chmod_fd(&fd, stat.mode)?;
    }
    let Attr { atime, mtime, .. } = attr_of(stat);
    let timed = fs::utimes_fd(&fd, time(atime), time(mtime));
    done.and(timed)
}

/// The server changes these objects: what is here of them is not to be trusted.
///
/// # Errors
/// An object could not be marked. All others are.
pub fn mark_stale(cache: &Cache, fids: &[Fid]) -> (Vec<Notice>, Result<()>) {
    mark(cache, fids, false)
}

/// `always`: the kernel may also keep something of what was stale before.
fn mark(cache: &Cache, fids: &[Fid], always: bool) -> (Vec<Notice>, Result<()>) {
    let (mut notices, mut result) = (Vec::new(), Ok(()));
    if !fids.is_empty() {
        cache.news.ring();
    }
    for fid in fids {
        let mut known = true;
        let marked = edit(cache, *fid, |meta| {
            known = cache.current(meta);
            meta.stale = true;
        });
        match not_gone(marked) {
            Ok(None) => continue,
            Ok(Some(())) if !known && !always => continue, // the kernel keeps nothing of it
            Ok(Some(())) => {}
            Err(e) => result = Err(e),
        }
        // Its names are its directories' matter. And to forget one, the kernel would wait for whoever
        // looks something up there, who may wait for this very object.
        let is_dir = *fid == ROOT || cache.tree.dir(*fid).is_ok();
        notices.push(Notice::Object { fid: *fid, dir: is_dir });
    }
    (notices, result)
}

/// The server keeps own changes up to here: the objects have these stamps now. `conflicts` kept the
/// server's version: they, and the directories where they stand here, are to be fetched again; so
/// are directories that came before it was known that these changes are in them, and objects of
/// which nobody tells what others change (not `known`).
///
/// # Errors
/// An object could not be marked. All others are.
pub fn acked(
    cache: &Cache,
    upto: Seq,
    stamps: &[(Fid, Stamp)],
    conflicts: &[Fid],
    known: impl Fn(Fid) -> bool,
) -> (Vec<Notice>, Result<()>) {
    let mut result = Ok(());
    let epoch = cache.epoch();
    for (fid, stamp) in stamps {
        let stored = cache.pending().is_stored(*fid, upto);
        let done = edit(cache, *fid, |meta| meta.kept(*stamp, epoch, known(*fid), stored));
        if let Err(e) = not_gone(done) {
            result = Err(e);
        }
    }
    crash::point("acked-stamps");
    let mut lost: Vec<Fid> = conflicts.to_vec();
    // One that was lost with its connection does not say what became of what.
    if stamps.is_empty() && conflicts.is_empty() {
        lost = cache.pending().unheard();
    }
    for fid in &lost {
        if let Err(e) = not_gone(edit(cache, *fid, Meta::disown)) {
            result = Err(e);
        }
    }
    for fid in conflicts {
        lost.extend(cache.tree.names(*fid).unwrap_or_default().into_iter().map(|(dir, _)| dir));
    }
    for fid in &lost {
        // What is here and never was there, no list of changes since a version would name.
        if cache.tree.dir(*fid).is_ok()
            && let Err(e) = not_gone(edit(cache, *fid, |meta| meta.stamp = Stamp(0)))
        {
            result = Err(e);
        }
    }
    lost.extend(cache.pending().take_doubtful(upto));
    lost.sort_unstable();
    lost.dedup();
    let (notices, marked) = mark(cache, &lost, true);
    (notices, result.and(marked))
}
