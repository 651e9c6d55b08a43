//! Between messages and the cache's files: each put in the other's terms.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::AsFd;

use crate::kml::record::{Fid, Range};
use crate::lento::client::Bytes;
use crate::lento::message::{Code, Data, Failed, Message, Object, Page, RANGE_LEN_MAX, Read};
use crate::lento::policy;
use crate::replica::cache::Cache;
use crate::replica::hydrate::Remote;
use crate::replica::merge::RemotePage;
use crate::replica::meta::Meta;
use crate::replica::tree::TreeError;
use crate::sys::Errno;
use crate::sys::fs::{self, Kind, o};

pub fn remote(object: Object) -> Remote {
    let xattrs = object.xattrs.into_iter().map(|x| (x.name, x.value)).collect();
    let Object { fid, stamp, attr, target, stored, .. } = object;
    Remote { fid, stamp, attr, target, xattrs, stored }
}

pub fn remote_page(page: Page) -> RemotePage {
    let entries = page.entries.into_iter().map(|e| (e.name, remote(e.object))).collect();
    let gone = page.gone.map(|names| names.into_iter().map(|bare| bare.name).collect());
    RemotePage { dir: remote(page.dir), entries, gone }
}

/// What is missing of `at..at + len`, and behind it; `None` when all is here.
pub fn bytes_of(cache: &Cache, fid: Fid, at: u64, len: u64) -> Result<Option<Bytes>, TreeError> {
    let file = cache.tree.open_object(fid, o::RDONLY | o::NONBLOCK)?;
    let Some(meta) = cache.tree.meta_of(&file)? else { return Ok(None) };
    let granule_len = meta.granule_len();
    let starts = |from: u64, to: u64| {
        let (mut starts, mut next) = (Vec::new(), from);
        while next < to {
            let Some((start, len)) = meta.missing(next, to - next) else { break };
            let first = (start.max(next) / granule_len) * granule_len;
            starts.extend((first..start + len).step_by(granule_len as usize));
            next = start + len;
        }
        starts
    };
    let need = starts(at, at.saturating_add(len).min(meta.base_size));
    let Some(last) = need.last() else { return Ok(None) };
    let from = last + granule_len;
    let window = granule_len * u64::from(policy::READ_AHEAD_MAX);
    let ahead = starts(from, (from + window).min(meta.base_size));
    let (stamp, base_size) = (meta.stamp, meta.base_size);
    Ok(Some(Bytes { fid, stamp, granule_len, base_size, need, ahead }))
}

/// The answer to a read of the server's.
pub fn answer_of(cache: &Cache, read: &Read) -> Message {
    let failed = |code, what: String| Failed { code, what }.into();
    let answer = || -> Result<Message, TreeError> {
        let file = cache.tree.open_object(read.fid, o::RDONLY | o::NONBLOCK)?;
        let stat = fs::fstat(&file)?;
        if stat.kind() != Kind::File {
            return Err(TreeError::Gone(read.fid));
        }
        if !is_here(cache, &file, &[Range { at: read.at, len: read.len.into() }]) {
            return Err(TreeError::Gone(read.fid));
        }
        let mut bytes = vec![0; read.len.min(RANGE_LEN_MAX) as usize];
        let len = read_full(&file, &mut bytes, read.at)?;
        bytes.truncate(len);
        let mut hasher = DefaultHasher::new();
        (stat.size, stat.mtime, stat.ctime).hash(&mut hasher);
        Ok(Data { at: read.at, bytes, size: stat.size, token: hasher.finish() }.into())
    };
    match answer() {
        Ok(message) => message,
        Err(TreeError::Gone(_) | TreeError::Os(Errno::NOENT | Errno::LOOP)) => {
            // What took it away must not be lost with the power now: it is not asked for again.
            match cache.log.sync(cache.log.last()) {
                Ok(()) => failed(Code::Gone, "the file is gone".to_owned()),
                Err(e) => failed(Code::Io, e.to_string()),
            }
        }
        Err(e) => failed(Code::Io, e.to_string()),
    }
}

/// Whether these ranges were not evicted, for then they would read as zeros. (The server lost what
/// it had acknowledged: only then it asks for what may be evicted.) What is merely old, since new
/// contents are to come, is here.
pub fn is_here(cache: &Cache, file: impl AsFd, ranges: &[Range]) -> bool {
    let meta = cache.tree.meta_of(&file);
    let missing = |meta: &Meta| ranges.iter().any(|r| meta.missing(r.at, r.len).is_some());
    let missing = meta.is_ok_and(|meta| meta.is_some_and(|meta| missing(&meta)));
    !(missing && fs::fstat(&file).is_ok_and(|stat| stat.blocks == 0))
}

/// Reads until the end of the file or of `into`.
pub fn read_full(file: impl AsFd, into: &mut [u8], at: u64) -> Result<usize, Errno> {
    let mut got = 0;
    while got < into.len() {
        match fs::pread(&file, &mut into[got..], at + got as u64) {
            Ok(0) => break,
            Ok(count) => got += count,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(got)
}
