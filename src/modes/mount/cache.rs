//! Opening and closing the cache of a mount.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;

use crate::cli::options::Source;
use crate::kml::codec::Outcome;
use crate::kml::log::{Log, LogError, Options};
use crate::kml::record::Fid;
use crate::kml::writers::Writers;
use crate::modes::{Exit, Failure, fail};
use crate::presto::filter::Filter;
use crate::replica::cache::{Cache, CacheError};
use crate::replica::state::{Facts, State, StateError};
use crate::replica::tree::{Tree, TreeError};
use crate::replica::{power, recover};
use crate::sys::{boot, crash, cred, fs};

/// imz's part of a cache directory; the files are in `tree` beside it.
const OWN: &str = ".imz";

/// How the tree's root looked at the last end.
const LEFT: &str = "left";

/// An open cache.
pub struct Opened {
    pub cache: Arc<Cache>,
    pub writers: Writers,
    /// after a loss of power: files to be journaled as they are; the table of writers is not true
    pub store: Option<Vec<Fid>>,
}

/// Where the cache of a source is, unless the user says otherwise. Not in a directory whose name
/// says that it may be deleted.
pub fn default_dir(source: &Source) -> anyhow::Result<PathBuf> {
    let home = std::env::home_dir().filter(|home| !home.as_os_str().is_empty());
    let base = match std::env::var_os("XDG_STATE_HOME").map(PathBuf::from) {
        _ if cred::is_root() => PathBuf::from("/var/lib"),
        Some(dir) if dir.is_absolute() => dir,
        _ => match home {
            Some(home) => home.join(".local/state"),
            None => return fail(Exit::Usage, "HOME is not set: say --cache DIR"),
        },
    };
    Ok(base.join("imz").join(dir_name(&source.to_string())))
}

/// A source as the name of a directory: readable, and different for different sources.
fn dir_name(source: &str) -> String {
    let keep = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let readable: String = source.chars().map(keep).collect();
    let start = readable.len().saturating_sub(80);
    format!("{}-{:08x}", readable[start..].trim_matches('_'), crc32fast::hash(source.as_bytes()))
}

/// Opens the cache at `dir`, or makes it, and settles what the death of a process left.
pub fn open(dir: &Path, source: &Source, volume: &str) -> anyhow::Result<Opened> {
    let name = || dir.display().to_string();
    if dir.is_dir() && !dir.join(OWN).exists() && dir.read_dir()?.next().is_some() {
        let what = "is neither empty nor an imz cache; say --cache with another directory";
        return fail(Exit::Refused, format!("{}: {what}", name()));
    }
    std::fs::create_dir_all(dir.join("tree")).with_context(name)?;
    let own = dir.join(OWN);
    let state = State::open(&own, || Facts::new(volume, &source.to_string(), 0, 0));
    let state = state.map_err(|e| match e {
        StateError::InUse { .. } => {
            let what = format!("{}: the cache is in use by another mount", name());
            anyhow::Error::from(Failure::new(Exit::Refused, what))
        }
        e @ StateError::Damaged { .. } => damaged(dir, &e),
        e => e.into(),
    })?;
    if state.facts().volume_id() == 0 {
        // what it was made for answered never: it may be another's
        state
            .edit(|facts| (facts.volume, facts.source) = (volume.to_owned(), source.to_string()))?;
    }
    let facts = state.facts();
    let kml = own.join("kml");
    std::fs::create_dir_all(&kml).with_context(|| kml.display().to_string())?;
    let log = Log::open_or_create(&kml, 0, facts.incarnation(), Options::default());
    let log = log.map_err(|e| match e {
        e @ LogError::Corrupt { .. } => damaged(dir, &e),
        e => e.into(),
    })?;
    let writers = Writers::open(&kml).map_err(|e| match e {
        e @ LogError::Corrupt { .. } => damaged(dir, &e),
        e => e.into(),
    })?;
    let tree = Tree::open(&dir.join("tree"), &own.join("index"), facts.clean);
    let tree = tree.map_err(|e| match e {
        e @ TreeError::BadMeta(_) => damaged(dir, &e),
        e => Failure::new(Exit::NoRoom, e.to_string()).into(),
    })?;
    state.edit(|facts| facts.clean = false)?;
    let mut store = None;
    if facts.power_lost() {
        state.edit(|facts| facts.epoch = facts.epoch.wrapping_add(1).max(1))?;
        let us = (state.facts().epoch, facts.node);
        let found = power::recover(&tree, &log, us, &dir.join("lost+found"));
        store = Some(found.with_context(|| format!("{}: recovery", name()))?.store);
        tree.index.flush(true)?;
    } else if !facts.clean {
        settle(&tree, &log, facts.epoch).with_context(|| format!("{}: recovery", name()))?;
    }
    let cache = Cache::new(tree, log, state, &own.join("limbo")).map_err(|e| match e {
        CacheError::Log(e @ LogError::Corrupt { .. }) => damaged(dir, &e),
        e => e.into(),
    })?;
    look_for_losses(dir, &cache)?;
    Ok(Opened { cache: Arc::new(cache), writers, store })
}

/// Whether somebody removed files of the cache since it was last used. What the server has comes back;
/// where the cache had something that the server lacks, that is for people to know before all else.
fn look_for_losses(dir: &Path, cache: &Cache) -> anyhow::Result<()> {
    let left = std::fs::read_to_string(dir.join(OWN).join(LEFT)).unwrap_or_default();
    let _ = std::fs::remove_file(dir.join(OWN).join(LEFT)); // it is true at the start only
    let is_changed = !left.is_empty() && left != looks(cache);
    let is_gone = cache.tree.is_new() && cache.state.facts().volume_id() != 0;
    let pending = cache.pending().count();
    if is_gone && pending > 0 {
        let what = format!(
            "{}: the files of this cache were removed, and with them the contents of changes that \
             the server does not have: {pending} records (imz kml dump {} names them). Nothing of \
             them is shipped. Put the files back, mount with another --cache, or remove {} to begin \
             anew with what the server has",
            dir.join("tree").display(),
            dir.display(),
            dir.display()
        );
        // so that it is seen again
        cache.tree.forget_root().map_err(anyhow::Error::from)?;
        return Err(Failure::new(Exit::Damaged, what).into());
    }
    if is_gone || is_changed {
        log::warn!("{}", torn(&dir.join("tree"), true));
        cache.bump_epoch()?;
    }
    Ok(())
}

/// What is said of files that somebody else removed.
pub fn torn(tree: &Path, is_there: bool) -> String {
    let what = "somebody removed files of the cache";
    match is_there {
        true => format!(
            "{}: {what}: what the server has comes back, what it lacked of them is lost",
            tree.display()
        ),
        false => format!(
            "{}: {what}, all of them: unmount (imz umount --now) and mount again; what the server \
             has comes back",
            tree.display()
        ),
    }
}

/// How the root of the tree looks: any name that comes or goes there shows.
fn looks(cache: &Cache) -> String {
    match fs::fstat(&**cache.tree.root()) {
        Ok(stat) => format!("{} {:?}\n", stat.ino, stat.mtime),
        Err(_) => String::new(),
    }
}

/// The error of a cache that is damaged, with what to do about it.
fn damaged(dir: &Path, error: &dyn std::error::Error) -> anyhow::Error {
    let what = format!(
        "{error}; the files in {} are whole, and imz fsck {} says what is wrong and what --repair \
         would do",
        dir.join("tree").display(),
        dir.display()
    );
    Failure::new(Exit::Damaged, what).into()
}

/// Finds the outcome of what was under way, and tells the index what it may have forgotten.
fn settle(tree: &Tree, log: &Log, epoch: u32) -> anyhow::Result<()> {
    for entry in log.entries(log.first()) {
        let entry = entry?;
        if entry.outcome == Outcome::Done {
            recover::note(&tree.index, &entry.record.op)?;
        }
    }
    for entry in log.unsettled()? {
        let outcome = recover::settle(tree, &entry.record, epoch)?;
        log.settle_seq(entry.seq, outcome)?;
        crash::point("recover-settled");
        log::info!("record {} was under way: {outcome:?}", entry.seq.0);
    }
    Ok(())
}

/// Journals what was open for writing when the last process died, and forgets that it was; after a
/// loss of power, what is not as its records say. Then the cache is in order, and is said to be so.
pub fn store_what_was_open(filter: &Filter, lost: Option<&[Fid]>) -> anyhow::Result<()> {
    let stored = match lost {
        Some(fids) => filter.store_these(fids),
        None => filter.store_what_was_open(),
    };
    match stored {
        Ok(0) => {}
        Ok(count) => log::info!("{count} files are journaled as they are now"),
        Err(e) => anyhow::bail!("files that were open for writing cannot be journaled: {e:?}"),
    }
    filter.writers.clear();
    let cache = &filter.cache;
    if cache.state.facts().boot_id != boot::id() {
        // all that recovery did is durable before nobody looks after it any more
        cache.log.sync_settled(cache.log.last())?;
        fs::syncfs(&**cache.tree.root())?;
        cache.state.edit(|facts| facts.boot_id = boot::id())?;
    }
    Ok(())
}

/// Leaves the cache in order: the next start believes its index.
pub fn close(cache: &Cache) -> anyhow::Result<()> {
    cache.tree.index.flush(true)?;
    cache.log.sync_settled(cache.log.last())?;
    // "clean" is believed after a power cut, too
    fs::syncfs(&**cache.tree.root())?;
    cache.state.edit(|facts| (facts.clean, facts.boot_id) = (true, boot::id()))?;
    // A hint, and not worth a failure.
    let _ = std::fs::write(cache.state.dir().join(LEFT), looks(cache));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_caches_are_readable_and_different() {
        let name = dir_name("host:7070:/vol");
        assert!(name.starts_with("host_7070__vol-"), "{name}");
        assert_ne!(dir_name("host:7070:/a_b"), dir_name("host:7070:/a b"));
        assert!(dir_name(&"x".repeat(1000)).len() < 100);
    }
}
