//! Between messages and a served volume: requests answered, batches taken apart.
//!
//! The volume knows no messages, and the machine no files: here each is put in the other's terms.

use super::conflicts;
use crate::kml::codec;
use crate::kml::record::{Fid, Name, Seq, Stamp};
use crate::lento::intake::{self, BadBatch, Change, Content};
use crate::lento::message::{
    Bare, Batch, Changes, Code, Data, Entry, Failed, Message, Object, Page, Pong, Resolve, Space,
    Stat, Status, WHAT_LEN_MAX, Xattr,
};
use crate::lento::reint;
use crate::lento::rights::Mode;
use crate::replica::apply::{self, Incoming};
use crate::replica::volume::{self, Volume, VolumeError};
use crate::sys::fs::Kind;

/// Contents up to this size travel with the attributes of a file that has changed, bytes.
const FRESH_LEN_MAX: u32 = 32 << 10;

/// Why a batch cannot be taken apart.
#[derive(Debug, thiserror::Error)]
pub enum BadItems {
    #[error("{0}")]
    Record(#[from] codec::Fault),
    #[error("{0}")]
    Batch(#[from] BadBatch),
}

/// The code and the text with which a request fails.
pub fn failure(e: &VolumeError) -> Failed {
    let code = match e {
        VolumeError::Gone(_) => Code::Gone,
        VolumeError::Moved => Code::Moved,
        VolumeError::NoRoom => Code::NoSpace,
        VolumeError::NoConflict { .. } => Code::Gone,
        VolumeError::NotAFile
        | VolumeError::NotADir
        | VolumeError::Missing { .. }
        | VolumeError::Undecided { .. } => Code::Other,
        VolumeError::Os(crate::sys::Errno::NOENT) => Code::Gone,
        VolumeError::Os(_) | VolumeError::Tree(_) | VolumeError::Log(_) => Code::Io,
        VolumeError::Mixed(_) | VolumeError::State(_) => Code::Io,
    };
    let what = e.to_string().chars().take(WHAT_LEN_MAX / 4).collect();
    Failed { code, what }
}

/// The answer to a request of a client, and the objects whose state stands in it.
pub fn answer(volume: &mut Volume, node: u32, request: &Message) -> (Message, Vec<Fid>) {
    match try_answer(volume, node, request) {
        Ok(answer) => answer,
        Err(e) => {
            log::debug!("{}: node {node}: {request:?}: {e}", volume.name());
            (failure(&e).into(), Vec::new())
        }
    }
}

fn try_answer(
    volume: &mut Volume,
    node: u32,
    request: &Message,
) -> volume::Result<(Message, Vec<Fid>)> {
    Ok(match request {
        Message::List(list) => {
            let since = match list.after.is_empty() {
                true => volume.list_since(list.dir, list.have)?,
                false => None,
            };
            let (found, gone) = match since {
                Some((found, gone)) => (found, Some(gone)),
                None => (volume.list(list.dir, &list.after)?, None),
            };
            let bare = |name: Name| Bare { name: name.as_bytes().to_vec() };
            let gone = gone.map(|names| names.into_iter().map(bare).collect());
            let mut given = vec![found.dir.fid];
            given.extend(found.entries.iter().map(|(_, object)| object.fid));
            let entry = |(name, o)| Entry { name, object: object(o) };
            let entries = found.entries.into_iter().map(entry).collect();
            let (mode, read_only) = (Mode::None, Vec::new());
            let dir = object(found.dir);
            let page = Page { dir, entries, more: found.more, gone, mode, read_only };
            (page.into(), given)
        }
        Message::Stat(Stat { fid, have }) => {
            let found = volume.stat(*fid)?;
            // What the client has seen before, it most likely reads again.
            let is_file = Kind::of(found.attr.mode) == Kind::File;
            let stored = found.stored.unwrap_or(found.stamp);
            let is_old = *have != Stamp(0) && *have < stored && is_file;
            let is_small = found.attr.size <= FRESH_LEN_MAX.into();
            let data = match is_old && is_small && found.attr.size > 0 {
                // What cannot be read now is told to who asks for it.
                true => volume.read(node, *fid, 0, FRESH_LEN_MAX, found.stamp).ok(),
                false => None,
            };
            let data = data.map(|it| it.bytes).filter(|it| it.len() as u64 == found.attr.size);
            (Status { object: object(found), mode: Mode::None, data }.into(), vec![*fid])
        }
        Message::Read(read) => {
            let piece = volume.read(node, read.fid, read.at, read.len, read.stamp)?;
            let (at, size, token) = (read.at, piece.size, piece.token);
            (Data { at, bytes: piece.bytes, size, token }.into(), vec![read.fid])
        }
        Message::Since(since) => {
            let found = volume.since(since.stamp, node)?;
            let (fids, upto) = (found.fids, found.upto);
            let (more, lost, volume) = (found.more, found.lost, Mode::None);
            (Changes { fids, upto, more, lost, volume }.into(), Vec::new())
        }
        Message::Statfs(_) => {
            let space = volume.space()?;
            let space = Space {
                block_len: space.block_len,
                blocks: space.blocks,
                blocks_free: space.blocks_free,
                blocks_available: space.blocks_available,
                files: space.files,
                files_free: space.files_free,
            };
            (space.into(), Vec::new())
        }
        request => match conflicts::answer(volume, request)? {
            Some(answer) => (answer, Vec::new()),
            None => (Pong { stamp: volume.stamp() }.into(), Vec::new()), // it asks nothing else
        },
    })
}

fn object(of: volume::Object) -> Object {
    let xattr = |(name, value)| Xattr { name, value };
    let xattrs = of.xattrs.into_iter().map(xattr).collect();
    let volume::Object { fid, stamp, attr, target, stored, .. } = of;
    Object { fid, stamp, attr, target, xattrs, stored }
}

/// The records of a batch, decoded and checked.
///
/// # Errors
/// The client sent what no client sends.
pub fn changes(batch: Batch) -> Result<Vec<Change>, BadItems> {
    let change = |item: crate::lento::message::Item| {
        let (seq, record) = codec::decode_wire(&item.record)?;
        Ok(intake::change(seq, record, item.data)?)
    };
    batch.items.into_iter().map(change).collect()
}

/// Carries out a decision about a conflict; what was done, for people.
pub fn resolve(volume: &mut Volume, ask: &Resolve) -> (reint::Applied, String) {
    let mut out = apply::Applied::default();
    let done = volume.resolve(&ask.id, &conflicts::choice(&ask.choice), ask.stamp, &mut out);
    let failure = done.as_ref().err().map(failure).map(|failed| (failed.code, failed.what));
    let applied = reint::Applied { also: out.also, failure, ..reint::Applied::default() };
    (applied, done.unwrap_or_default())
}

/// Applies the records of a batch.
pub fn apply(volume: &mut Volume, node: u32, upto: Seq, changes: &[Change]) -> reint::Applied {
    let list: Vec<Incoming<'_>> = changes.iter().map(incoming).collect();
    let applied = volume.apply(node, upto, &list);
    let failure = applied.failure.map(|e| {
        let failed = failure(&e);
        (failed.code, failed.what)
    });
    let (stamps, conflicts, also) = (applied.stamps, applied.conflicts, applied.also);
    let gone = applied.gone;
    reint::Applied { upto: applied.upto, stamps, conflicts, also, gone, failure }
}

fn incoming(change: &Change) -> Incoming<'_> {
    let content = match &change.content {
        Content::None => apply::Content::None,
        Content::Inline(bytes) => apply::Content::Inline(bytes),
        Content::Spooled => apply::Content::Spooled,
        Content::Gone => apply::Content::Gone,
    };
    Incoming { seq: change.seq, record: &change.record, content }
}
