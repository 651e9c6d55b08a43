//! Merging a listing: a directory of the cache becomes what the server has, page by page.
//!
//! Names and objects that own records newer than the fetch are about stay as they are. What
//! stands here under another name and is clean moves with its data; what is new becomes a stub;
//! what is not there any more goes to limbo, unless something of it is not at the server yet:
//! then it stays, and the directory stays stale so that it is listed again. Each entry is merged
//! under the locks of all objects that it touches; in between, other operations go on.

use std::collections::HashSet;
use std::sync::Arc;

use super::cache::Cache;
use super::hydrate::{self, Notice, Remote};
use super::meta::Meta;
use super::tree::{Dir, LIMBO, OWN_NAME, Result, TreeError};
use crate::kml::record::{Fid, Name, ROOT, Seq, Time};
use crate::sys::fs::{self, Kind, RenameMode, SetTime, Stat, o};
use crate::sys::{Errno, crash, cred};

/// One listing under way.
#[derive(Default)]
pub struct Listing {
    seen: HashSet<Name>,
    /// the directory as the newest page had it
    dir: Option<Remote>,
    /// something stayed that the server does not have there
    kept: bool,
    /// the pages name only what has changed
    partial: bool,
    /// objects that are here now as the pages had them
    merged: Vec<Fid>,
}

impl Listing {
    /// The objects that are here as the newest pages had them; told once.
    pub fn take_merged(&mut self) -> Vec<Fid> {
        std::mem::take(&mut self.merged)
    }
}

/// One page of a listing.
pub struct RemotePage {
    /// the directory itself
    pub dir: Remote,
    /// the bytes of names, not checked yet, and what they stand for
    pub entries: Vec<(Vec<u8>, Remote)>,
    /// the entries are those that changed, and these names are gone
    pub gone: Option<Vec<Vec<u8>>>,
}

/// What one entry needs, found before its locks are taken and checked after.
struct Found {
    /// what stands at the name
    here: Option<(Stat, Option<Meta>)>,
    /// where the entry's object stands otherwise
    elsewhere: Option<(Arc<Dir>, Name)>,
}

impl Found {
    fn here_fid(&self) -> Option<Fid> {
        self.here.as_ref().and_then(|(_, meta)| meta.as_ref()).map(|meta| meta.fid)
    }
    /// The directories and the objects to lock: the directory's own times, too.
    fn locks(&self, dir: Fid, object: Fid) -> (Vec<Fid>, Vec<Fid>) {
        let other = self.elsewhere.as_ref().map(|(dir, _)| dir.fid);
        let dirs = [Some(dir), other].into_iter().flatten().collect();
        (dirs, [Some(object), Some(dir), self.here_fid()].into_iter().flatten().collect())
    }
}

/// Merges one page. Returns the names that stand for something else now, or for nothing.
///
/// # Errors
/// The backing file system failed; entries before are merged.
pub fn merge_page(
    cache: &Cache,
    listing: &mut Listing,
    dir: Fid,
    page: RemotePage,
    mark: Seq,
) -> Result<Vec<Notice>> {
    let dir = cache.tree.dir(dir)?;
    let mut notices = Vec::new();
    let mut merged = Ok(());
    for (raw, object) in &page.entries {
        let Ok(name) = Name::new(raw) else {
            log::warn!("the server has an entry that is not a name: {}", raw.escape_ascii());
            continue;
        };
        if dir.fid == ROOT && name.as_bytes() == OWN_NAME {
            continue;
        }
        listing.seen.insert(name.clone());
        merged = merge_entry(cache, listing, &dir, &name, object, mark, &mut notices);
        if merged.is_err() {
            break;
        }
    }
    merged?;
    for raw in page.gone.iter().flatten() {
        let Ok(name) = Name::new(raw) else { continue };
        listing.kept |= !let_go(cache, &dir, name, mark, &mut notices)?;
    }
    listing.partial |= page.gone.is_some();
    listing.dir = Some(page.dir);
    Ok(notices)
}

/// Takes away a name that the server does not have. False: it is to be looked at again.
fn let_go(
    cache: &Cache,
    dir: &Dir,
    name: Name,
    mark: Seq,
    notices: &mut Vec<Notice>,
) -> Result<bool> {
    let found = Found { here: look(cache, dir, &name)?, elsewhere: None };
    let _entries = cache.tree.lock(&[dir.fid]);
    let objects: Vec<Fid> = found.here_fid().into_iter().chain([dir.fid]).collect();
    let _objects = cache.tree.lock_objects(&objects);
    let here = look(cache, dir, &name)?;
    let Some((stat, meta)) = here else { return Ok(true) };
    if meta.as_ref().map(|meta| meta.fid) != found.here_fid() {
        return Ok(false); // it changed while the locks were awaited
    }
    if cache.pending().name(dir.fid, &name) > mark {
        return Ok(true);
    }
    let gone = untouched(dir, || retire(cache, dir, &name, &stat, meta.as_ref(), mark))?;
    if gone {
        notices.push(Notice::Entry { dir: dir.fid, name });
    }
    Ok(gone)
}

/// Putting a directory right is no change of it: it keeps its time. The caller holds its locks.
fn untouched<T>(dir: &Dir, act: impl FnOnce() -> Result<T>) -> Result<T> {
    let was = fs::fstat(dir)?.mtime;
    let done = act();
    if fs::fstat(dir)?.mtime != was {
        fs::utimes_fd(dir, SetTime::Keep, SetTime::At(was.0, was.1))?;
    }
    done
}

/// The pages covered the directory: what none of them named goes. `fresh`: nothing has changed
/// since the first page.
///
/// # Errors
/// The backing file system failed; the directory stays as stale as it was.
pub fn finish_listing(
    cache: &Cache,
    listing: Listing,
    dir: Fid,
    mark: Seq,
    fresh: bool,
) -> Result<Vec<Notice>> {
    let Some(object) = listing.dir else { return Ok(Vec::new()) };
    let dir = cache.tree.dir(dir)?;
    let (mut notices, mut kept) = (Vec::new(), listing.kept);
    let entries = if listing.partial { Vec::new() } else { fs::read_dir(&*dir)? };
    for entry in entries {
        let Ok(name) = Name::new(&entry.name) else { continue };
        if listing.seen.contains(&name) || (dir.fid == ROOT && name.as_bytes() == OWN_NAME) {
            continue;
        }
        kept |= !let_go(cache, &dir, name, mark, &mut notices)?;
    }
    let _locked = cache.tree.lock_objects(&[dir.fid]);
    let before = dir.meta();
    let known = cache.current(&before);
    hydrate::update_dir(cache, &dir, &object, mark, true)?;
    if kept || !fresh {
        // What has changed since is still to be looked at.
        cache.tree.edit_dir(&dir, |meta| (meta.stale, meta.stamp) = (true, before.stamp))?;
    }
    // else the kernel keeps nothing of it, as with set_object
    if known {
        notices.push(Notice::Object { fid: dir.fid, dir: true });
    }
    Ok(notices)
}

fn look(cache: &Cache, dir: &Dir, name: &Name) -> Result<Option<(Stat, Option<Meta>)>> {
    match fs::stat(dir, name.as_bytes()) {
        Ok(stat) => match cache.tree.meta(dir, name) {
            Ok(meta) => Ok(Some((stat, meta))),
            Err(TreeError::Os(Errno::NOENT)) => Ok(None),
            Err(e) => Err(e),
        },
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

fn find(cache: &Cache, dir: &Dir, name: &Name, fid: Fid) -> Result<Found> {
    let mut found = Found { here: look(cache, dir, name)?, elsewhere: None };
    if found.here_fid() != Some(fid) {
        found.elsewhere = match cache.tree.place(fid) {
            Ok(place) => Some(place),
            Err(TreeError::Gone(_)) => None,
            Err(e) => return Err(e),
        };
    }
    Ok(found)
}

fn merge_entry(
    cache: &Cache,
    listing: &mut Listing,
    dir: &Arc<Dir>,
    name: &Name,
    object: &Remote,
    mark: Seq,
    notices: &mut Vec<Notice>,
) -> Result<()> {
    if object.fid == ROOT || object.fid == dir.fid {
        log::warn!("the server names a directory in itself: {name:?}");
        return Ok(());
    }
    let before = find(cache, dir, name, object.fid)?;
    let locks = before.locks(dir.fid, object.fid);
    let _entries = cache.tree.lock(&locks.0);
    let _objects = cache.tree.lock_objects(&locks.1);
    let found = find(cache, dir, name, object.fid)?;
    if found.locks(dir.fid, object.fid) != locks {
        listing.kept = true; // it changed while the locks were awaited
        return Ok(());
    }
    if cache.pending().name(dir.fid, name) > mark {
        return Ok(());
    }
    match untouched(dir, || put_entry(cache, (dir, name), object, found, mark, notices))? {
        true => listing.merged.push(object.fid),
        false => listing.kept = true,
    }
    Ok(())
}

/// Makes the entry what the server has, under the locks of all that it needs. False: not now.
fn put_entry(
    cache: &Cache,
    (dir, name): (&Arc<Dir>, &Name),
    object: &Remote,
    found: Found,
    mark: Seq,
    notices: &mut Vec<Notice>,
) -> Result<bool> {
    let kind = Kind::of(object.attr.mode);
    if let Some((stat, meta)) = &found.here {
        let same = meta.as_ref().filter(|m| m.fid == object.fid && stat.kind() == kind);
        if let Some(meta) = same {
            return hydrate::update(cache, dir, name, meta.clone(), object, mark).map(|()| true);
        }
        if !retire(cache, dir, name, stat, meta.as_ref(), mark)? {
            return Ok(false);
        }
    }
    // The name stood for something else, or was known to be free.
    if found.here.is_some() || dir.meta().complete {
        notices.push(Notice::Entry { dir: dir.fid, name: name.clone() });
    }
    if let Some((from, old)) = &found.elsewhere {
        // One more name takes nothing from the others.
        let is_link = kind != Kind::Dir && object.attr.nlink > 1 && from.fid != LIMBO;
        let ours = !is_link && cache.pending().name(from.fid, old) > mark;
        if ours || !bring(cache, dir, name, (from, old), object, is_link)? {
            return Ok(false);
        }
        notices.push(Notice::Entry { dir: from.fid, name: old.clone() });
    } else {
        return make_stub(cache, dir, name, object, mark).map(|()| true);
    }
    if let Some(meta) = cache.tree.meta(dir, name)? {
        hydrate::update(cache, dir, name, meta, object, mark)?;
    }
    Ok(true)
}

/// Gives the object that stands at `old` the name that the server has for it. False: it cannot
/// be done now.
fn bring(
    cache: &Cache,
    dir: &Dir,
    name: &Name,
    (from, old): (&Dir, &Name),
    object: &Remote,
    is_link: bool,
) -> Result<bool> {
    let (kind, when) = (Kind::of(object.attr.mode), fs::fstat(dir)?.mtime);
    let was = fs::fstat(from)?;
    let when = Time { sec: when.0, nsec: when.1 };
    let done = if fs::stat(from, old.as_bytes())?.kind() != kind {
        Ok(())
    } else if is_link {
        cache.tree.link((from, old), object.fid, dir, name, when)
    } else {
        let mode = RenameMode::NoReplace;
        cache.tree.rename((from, old), (dir, name), object.fid, None, mode, when)
    };
    crash::point("merge-moved");
    // What is put right here is no change of the other directory.
    fs::utimes_fd(from, SetTime::Keep, SetTime::At(was.mtime.0, was.mtime.1))?;
    match done {
        Ok(()) => Ok(fs::stat(dir, name.as_bytes()).is_ok()),
        // It would lie in itself: the listing of what is between has not come yet.
        Err(TreeError::Os(Errno::INVAL | Errno::LOOP)) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Takes away what the server does not have under this name. False: not while something of it is
/// only here.
fn retire(
    cache: &Cache,
    dir: &Dir,
    name: &Name,
    stat: &Stat,
    meta: Option<&Meta>,
    mark: Seq,
) -> Result<bool> {
    let raw = name.as_bytes();
    let Some(meta) = meta else {
        // Nobody's: half made when a process died. Anything with data in it is left alone.
        match stat.kind() {
            Kind::Dir => return Ok(fs::rmdir(dir, raw).is_ok()),
            Kind::File if stat.blocks > 0 => return Ok(false),
            _ => fs::unlink(dir, raw)?,
        }
        return Ok(true);
    };
    // One of several names takes nothing with it.
    let is_last = stat.nlink <= 1 || stat.kind() == Kind::Dir;
    if is_last && is_needed(cache, meta.fid, stat.kind(), mark) {
        return Ok(false);
    }
    let is_written = cache.written(meta.fid).is_some();
    let has_data = stat.kind() == Kind::File && (stat.blocks > 0 || is_written);
    if !is_last {
        fs::unlink(dir, raw)?;
    } else if has_data || stat.kind() == Kind::Dir {
        cache.retire(dir, name, meta.fid)?;
        cache.note_held(0, stat.blocks * 512);
    } else {
        fs::unlink(dir, raw)?;
    }
    if stat.kind() == Kind::Dir {
        cache.tree.close_dir(meta.fid);
        cache.tree.moved();
    }
    cache.tree.index.set_loose(dir.fid, raw, None);
    cache.tree.index.remove(meta.fid, dir.fid, name)?;
    Ok(true)
}

/// Whether what vanished from the tree must be kept: somebody writes to it, or the server does not
/// have all of it. While anything that was let go is on its way, that may be this.
pub fn is_kept(cache: &Cache, fid: Fid, kind: Kind, acked: Seq) -> bool {
    cache.written(fid).is_some()
        || cache.pending().is_letting_go()
        || is_needed(cache, fid, kind, acked)
}

/// Whether own records newer than `mark` are about the object, or about anything below it.
fn is_needed(cache: &Cache, fid: Fid, kind: Kind, mark: Seq) -> bool {
    let newer: Vec<Fid> = {
        let pending = cache.pending();
        if pending.own(fid).newest() > mark {
            return true;
        }
        if kind != Kind::Dir {
            return false;
        }
        pending.newer_than(mark).collect()
    };
    let mut clear: HashSet<Fid> = HashSet::from([ROOT]);
    newer.into_iter().any(|start| {
        // All ways up: a file may have several names, and the index may know old ones.
        let mut todo = vec![start];
        while let Some(at) = todo.pop() {
            if at == fid {
                return true;
            }
            if clear.insert(at) {
                let up = cache.tree.names(at).unwrap_or_default();
                todo.extend(up.into_iter().map(|(parent, _)| parent));
            }
        }
        false
    })
}

/// Makes an object of which only the attributes are here.
fn make_stub(cache: &Cache, dir: &Arc<Dir>, name: &Name, object: &Remote, mark: Seq) -> Result<()> {
    let (raw, attr) = (name.as_bytes(), &object.attr);
    let meta = Meta {
        // Own changes that this state lacks: it is fetched again when the server has them.
        stale: cache.pending().own(object.fid).newest() > mark,
        epoch: cache.epoch(),
        nlink: hydrate::nlink(object, 1),
        ..match Kind::of(attr.mode) {
            Kind::File => hydrate::stub_meta(object),
            Kind::Dir => Meta::stub(object.fid, object.stamp, 0),
            _ => Meta { stamp: object.stamp, ..Meta::whole(object.fid) },
        }
    };
    // Of one that went long ago, and comes back.
    cache.tree.close_dir(object.fid);
    match Kind::of(attr.mode) {
        Kind::File => drop(fs::open(&**dir, raw, o::WRONLY | o::CREAT | o::EXCL, 0o600)?),
        Kind::Dir => fs::mkdir(&**dir, raw, 0o700)?,
        Kind::Symlink => fs::symlink(&object.target, &**dir, raw)?,
        _ => match fs::mknod(&**dir, raw, attr.mode, attr.rdev) {
            Err(Errno::PERM) if !cred::is_root() => {
                log::info!("{name:?} is a device: left out of the cache of a user who is not root");
                return Ok(());
            }
            made => made?,
        },
    }
    crash::point("merge-stub-made");
    let filled = fill_stub(cache, dir, name, object, &meta);
    if filled.is_err() {
        // Not half made: what was created a moment ago goes again.
        match Kind::of(attr.mode) {
            Kind::Dir => fs::rmdir(&**dir, raw)?,
            _ => fs::unlink(&**dir, raw)?,
        }
    }
    filled
}

fn fill_stub(
    cache: &Cache,
    dir: &Arc<Dir>,
    name: &Name,
    object: &Remote,
    meta: &Meta,
) -> Result<()> {
    let raw = name.as_bytes();
    cache.tree.set_meta(dir, name, meta)?;
    if Kind::of(object.attr.mode) == Kind::File && object.attr.size > 0 {
        let fd = fs::open(&**dir, raw, o::WRONLY, 0)?;
        fs::truncate(&fd, object.attr.size)?;
    }
    hydrate::set_attributes(cache, &**dir, raw, object, false)?;
    cache.tree.index.set(object.fid, dir.fid, name);
    Ok(())
}

#[cfg(test)]
mod tests;
