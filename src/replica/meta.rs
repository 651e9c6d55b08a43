//! What imz knows of one object: the value of the extended attribute on it.
//!
//! ```text
//!  at  len  field
//!   0    1  version   2
//!   1    1  flags     bit 0 COMPLETE, bit 1 STALE
//!   2    2  zero
//!   4    4  epoch     of the cache when this was fetched
//!   8    8  fid
//!  16    8  stamp     version of the object at the server
//!  24    8  foreign   stamp of the last change by another node than `author`
//!  32    4  author    node that made the last change
//!  36    4  nlink     names that the server counts; 0: as the backing file has them
//!  40    8  base_size bytes of the server's file that `have` speaks of
//!  48    4  crc       CRC-32 of all other bytes
//!  52    a  data      stamp of the last change of the contents; it and the next two have 7 bits
//!                     a byte, the lowest first, and all bytes but the last their highest bit set
//!        b  data_foreign  of the last one by another node than
//!        c  data_author   the node that made it
//!        n  have      a bit for each granule that is here; empty for a complete object
//! ```
//!
//! Version 1 had neither crc nor stamps of the contents (`have` at 48), and is still read: there,
//! every change counts as one of them. Short numbers, since with more than 68 bytes the value
//! leaves ext4's inode for a block.
//!
//! Little-endian. A granule is 1 MiB, doubled until a file has at most 16,384 of them: the value
//! stays below 2.1 KiB, which every file system takes.

use crate::kml::record::{Fid, Range, Stamp};

/// Smallest granule of hydration, bytes.
pub const GRANULE_LEN_MIN: u64 = 1 << 20;
/// Most granules of one file.
pub const GRANULES_MAX: u64 = 16384;
const FIXED_LEN: usize = 48;
const CRC_LEN: usize = 4;
const VERSION: u8 = 2;
/// Without a crc.
const VERSION_PLAIN: u8 = 1;
const COMPLETE: u8 = 1;
const STALE: u8 = 2;

/// The metadata of one object.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Meta {
    pub fid: Fid,
    pub stamp: Stamp,
    pub foreign: Stamp,
    pub author: u32,
    /// file: all data are here; directory: all entries are here
    pub complete: bool,
    /// a promise was broken: the server has a newer state
    pub stale: bool,
    pub epoch: u32,
    pub nlink: u32,
    pub base_size: u64,
    /// as `stamp`, `foreign` and `author`, for changes of the contents alone
    pub data: Stamp,
    pub data_foreign: Stamp,
    pub data_author: u32,
    /// one bit a granule of the first `base_size` bytes, lowest bit first; empty when complete
    pub have: Vec<u8>,
}

/// The value is not one that this version wrote.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the attribute with imz's knowledge of the object is damaged or of another version")]
pub struct BadMeta;

impl Meta {
    /// An object that is all here, as its creator has it.
    pub fn whole(fid: Fid) -> Meta {
        Meta { fid, complete: true, ..Meta::default() }
    }

    /// An object that `node` has made with the server's record `stamp`.
    pub fn made(fid: Fid, node: u32, stamp: Stamp) -> Meta {
        let (author, data_author) = (node, node);
        Meta { author, stamp, data_author, data: stamp, ..Meta::whole(fid) }
    }

    /// Whether nobody but `node` has changed the object after `base`.
    pub fn is_current(&self, node: u32, base: Stamp) -> bool {
        base >= if self.author == node { self.foreign } else { self.stamp }
    }

    /// Whether nobody but `node` has changed the contents after `base`.
    pub fn has_current_data(&self, node: u32, base: Stamp) -> bool {
        base >= if self.data_author == node { self.data_foreign } else { self.data }
    }

    /// A file of which nothing is here yet (or a directory, with `size` 0).
    pub fn stub(fid: Fid, stamp: Stamp, size: u64) -> Meta {
        let granules = size.div_ceil(granule_len(size));
        let have = vec![0; granules.div_ceil(8) as usize];
        Meta { fid, stamp, base_size: size, have, ..Meta::default() }
    }

    /// The server keeps an own change, and gave the object this stamp with it. `known`: what others
    /// change of it is told. `stored`: the change was of its data, and nobody else had changed them
    /// since the version that is here: else the server would not have taken it.
    pub fn kept(&mut self, stamp: Stamp, epoch: u32, known: bool, stored: bool) {
        // What was not current does not become so by an own change; and what is changed here next
        // must not pass for a change of a version that is not here.
        self.stale |= self.epoch != epoch || !known;
        if !self.stale || (stored && !self.is_disowned()) {
            self.stamp = self.stamp.max(stamp);
        }
    }

    /// The server kept its own version: what is here is of none, whatever the stamp says.
    pub fn disown(&mut self) {
        (self.epoch, self.stale) = (0, true); // no cache ever has this epoch
    }
    pub fn is_disowned(&self) -> bool {
        self.epoch == 0
    }

    /// The attributes of a directory have come. `listed`: all its entries are here now.
    pub fn dir_came(&mut self, stamp: Stamp, epoch: u32, listed: bool) {
        let same = self.stamp == stamp && !self.stale;
        // Its attributes are known; what it contains only if nothing has changed since.
        self.stale = !listed && self.complete && !same;
        self.complete |= listed;
        // The version is that of what it contains.
        if !self.stale {
            self.stamp = self.stamp.max(stamp);
        }
        self.epoch = epoch;
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(FIXED_LEN + CRC_LEN + self.have.len());
        let flags = if self.complete { COMPLETE } else { 0 } | if self.stale { STALE } else { 0 };
        out.extend_from_slice(&[VERSION, flags, 0, 0]);
        out.extend_from_slice(&self.epoch.to_le_bytes());
        out.extend_from_slice(&self.fid.0.to_le_bytes());
        out.extend_from_slice(&self.stamp.0.to_le_bytes());
        out.extend_from_slice(&self.foreign.0.to_le_bytes());
        out.extend_from_slice(&self.author.to_le_bytes());
        out.extend_from_slice(&self.nlink.to_le_bytes());
        out.extend_from_slice(&self.base_size.to_le_bytes());
        let mut rest = Vec::new();
        for number in [self.data.0, self.data_foreign.0, self.data_author.into()] {
            put_short(&mut rest, number);
        }
        rest.extend_from_slice(&self.have);
        out.extend_from_slice(&crc(&out, &rest).to_le_bytes());
        out.extend_from_slice(&rest);
        out
    }

    /// # Errors
    /// [`BadMeta`] when the bytes are damaged, too few, too many, or of another version.
    pub fn decode(bytes: &[u8]) -> Result<Meta, BadMeta> {
        let (fixed, mut have) = bytes.split_first_chunk::<FIXED_LEN>().ok_or(BadMeta)?;
        let u32_at = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| fixed[at + i]));
        let u64_at = |at| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let (stamp, foreign, author) = (u64_at(16), u64_at(24), u32_at(32));
        let (data, data_foreign, data_author) = match fixed[0] {
            VERSION_PLAIN => (stamp, foreign, author), // it knew no difference
            VERSION => {
                let check = have.split_off(..CRC_LEN).ok_or(BadMeta)?;
                if check != crc(fixed, have).to_le_bytes() {
                    return Err(BadMeta);
                }
                let (data, foreign) = (take_short(&mut have)?, take_short(&mut have)?);
                let author = take_short(&mut have)?;
                (data, foreign, u32::try_from(author).map_err(|_| BadMeta)?)
            }
            _ => return Err(BadMeta),
        };
        if have.len() as u64 > GRANULES_MAX / 8 {
            return Err(BadMeta);
        }
        Ok(Meta {
            fid: Fid(u64_at(8)),
            stamp: Stamp(stamp),
            foreign: Stamp(foreign),
            author,
            complete: fixed[1] & COMPLETE != 0,
            stale: fixed[1] & STALE != 0,
            epoch: u32_at(4),
            nlink: u32_at(36),
            base_size: u64_at(40),
            data: Stamp(data),
            data_foreign: Stamp(data_foreign),
            data_author,
            have: have.to_vec(),
        })
    }

    /// Length of this file's granules, bytes.
    pub fn granule_len(&self) -> u64 {
        granule_len(self.base_size)
    }

    /// The first byte range within `at..at + len` that is not here, cut to whole granules and to
    /// the base size; `None` when all is here.
    pub fn missing(&self, at: u64, len: u64) -> Option<(u64, u64)> {
        if self.complete || self.have.is_empty() {
            return None;
        }
        let granule = self.granule_len();
        let end = at.saturating_add(len).min(self.base_size);
        if at >= end {
            return None; // also behind the base size, in the granule where it lies
        }
        let wanted = at / granule..end.div_ceil(granule);
        let first = wanted.clone().find(|g| !self.has(*g))?;
        let past = (first..wanted.end).find(|g| self.has(*g)).unwrap_or(wanted.end);
        let start = first * granule;
        Some((start, (past * granule).min(self.base_size) - start))
    }

    /// The ranges of a file of `size` bytes that are here, in ascending order.
    pub fn present(&self, size: u64) -> Vec<Range> {
        if self.complete {
            return vec![Range { at: 0, len: size }];
        }
        let granule = self.granule_len();
        let mut ranges: Vec<Range> = Vec::new();
        for g in (0..self.base_size.div_ceil(granule)).filter(|g| self.has(*g)) {
            let at = g * granule;
            let len = granule.min(self.base_size - at);
            match ranges.last_mut() {
                Some(last) if last.at + last.len == at => last.len += len,
                _ => ranges.push(Range { at, len }),
            }
        }
        if size > self.base_size {
            ranges.push(Range { at: self.base_size, len: size - self.base_size });
        }
        ranges
    }

    /// Notes that `at..at + len` is here: every granule that lies wholly in it (the last one
    /// ends at the base size). Returns true when that completed the file.
    pub fn arrived(&mut self, at: u64, len: u64) -> bool {
        let granule = self.granule_len();
        let end = at.saturating_add(len).min(self.base_size);
        let past = if end == self.base_size { end.div_ceil(granule) } else { end / granule };
        for g in at.div_ceil(granule)..past {
            if let Some(byte) = self.have.get_mut((g / 8) as usize) {
                *byte |= 1 << (g % 8);
            }
        }
        if self.missing(0, self.base_size).is_none() {
            self.complete = true;
            self.have = Vec::new();
        }
        self.complete
    }

    /// The file was cut to `size`: what lay beyond is not the server's any more. Returns true
    /// when nothing is missing of what is left.
    pub fn truncated(&mut self, size: u64) -> bool {
        if self.complete || size >= self.base_size {
            return self.complete;
        }
        let (old, granule) = (self.clone(), self.granule_len());
        // Granules may be shorter for the smaller file; a bit then covers several.
        *self = Meta { base_size: size, ..Meta::stub(self.fid, self.stamp, size) };
        let keep = (old.foreign, old.author, old.stale, old.epoch, old.nlink);
        (self.foreign, self.author, self.stale, self.epoch, self.nlink) = keep;
        for g in (0..size.div_ceil(granule)).filter(|g| old.has(*g)) {
            self.arrived(g * granule, granule);
        }
        if self.missing(0, size).is_none() {
            self.complete = true;
            self.have = Vec::new();
        }
        self.complete
    }

    fn has(&self, granule: u64) -> bool {
        self.have.get((granule / 8) as usize).is_some_and(|b| b & (1 << (granule % 8)) != 0)
    }
}

fn crc(fixed: &[u8], have: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(fixed);
    hasher.update(have);
    hasher.finalize()
}

/// Seven bits a byte, the lowest first.
fn put_short(out: &mut Vec<u8>, mut number: u64) {
    while number > 0x7f {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn take_short(bytes: &mut &[u8]) -> Result<u64, BadMeta> {
    let mut number = 0;
    for nth in 0..10 {
        let (byte, rest) = bytes.split_first().ok_or(BadMeta)?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << (7 * nth);
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(BadMeta)
}

fn granule_len(size: u64) -> u64 {
    let mut len = GRANULE_LEN_MIN;
    while size.div_ceil(len) > GRANULES_MAX {
        len *= 2;
    }
    len
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn decodes_what_it_encodes() {
        let mut meta = Meta::stub(Fid::new(3, 77), Stamp(9), 40 * MIB + 5);
        (meta.foreign, meta.author, meta.stale, meta.epoch, meta.nlink) = (Stamp(8), 3, true, 6, 2);
        meta.arrived(3 * MIB, MIB);
        assert_eq!(Meta::decode(&meta.encode()), Ok(meta.clone()));
        (meta.data, meta.data_foreign, meta.data_author) = (Stamp(7), Stamp(6), 5);
        assert_eq!(Meta::decode(&meta.encode()), Ok(meta.clone()));
        (meta.data, meta.data_foreign, meta.data_author) = (Stamp(u64::MAX), Stamp(300), u32::MAX);
        assert_eq!(Meta::decode(&meta.encode()), Ok(meta.clone()));
        for len in 0..FIXED_LEN + 3 {
            assert_eq!(Meta::decode(&meta.encode()[..len]), Err(BadMeta));
        }
        let mut other = meta.encode();
        other[0] = 3;
        assert_eq!(Meta::decode(&other), Err(BadMeta));
        other.resize(FIXED_LEN + 2049, 0);
        other[0] = VERSION_PLAIN;
        assert_eq!(Meta::decode(&other), Err(BadMeta));
        // as the version before wrote it
        let mut old = meta.encode()[..FIXED_LEN].to_vec();
        old[0] = 1;
        old.extend_from_slice(&meta.have);
        (meta.data, meta.data_foreign, meta.data_author) = (Stamp(9), Stamp(8), 3);
        assert_eq!(Meta::decode(&old), Ok(meta));
        assert_eq!(Meta::decode(&old[..47]), Err(BadMeta));
        old.resize(FIXED_LEN + 2049, 0);
        assert_eq!(Meta::decode(&old), Err(BadMeta));
        let usual = Meta::made(Fid::new(99, 1 << 30), 99, Stamp(1 << 27));
        assert!(usual.encode().len() <= 64, "it fits into an inode");
    }

    #[test]
    fn no_flipped_bit_and_no_cut_passes() {
        let mut meta = Meta::stub(Fid::new(3, 77), Stamp(9), 40 * MIB + 5);
        meta.arrived(3 * MIB, MIB);
        let good = meta.encode();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Meta::decode(&bad), Err(BadMeta), "bit {bit}");
        }
        for len in 0..good.len() {
            assert_eq!(Meta::decode(&good[..len]), Err(BadMeta), "{len} bytes");
        }
    }

    #[test]
    fn the_first_version_is_still_read() {
        let mut first = Meta::whole(Fid::new(3, 77)).encode();
        first.drain(FIXED_LEN..);
        first[0] = VERSION_PLAIN;
        assert_eq!(Meta::decode(&first), Ok(Meta::whole(Fid::new(3, 77))));
    }

    #[test]
    fn misses_what_has_not_arrived() {
        let mut meta = Meta::stub(Fid(5), Stamp(1), 3 * MIB + 10);
        assert_eq!(meta.missing(MIB + 1, 1), Some((MIB, MIB)));
        assert_eq!(meta.missing(3 * MIB, 100), Some((3 * MIB, 10)));
        assert_eq!(meta.missing(4 * MIB, 100), None, "beyond the base all is local");
        assert_eq!(meta.missing(3 * MIB + 10, 100), None, "in the granule where it ends, too");
        assert_eq!(meta.missing(MIB + 1, 0), None, "nothing of it is wanted");
        assert!(!meta.arrived(0, MIB + 5), "half a granule does not count");
        assert_eq!(meta.missing(0, 4 * MIB), Some((MIB, 2 * MIB + 10)));
        assert!(!meta.arrived(3 * MIB, 10));
        assert!(meta.arrived(MIB, 2 * MIB));
        assert_eq!(meta.missing(0, u64::MAX), None);
    }

    #[test]
    fn what_is_present_is_told_in_ranges() {
        let mut meta = Meta::stub(Fid(5), Stamp(1), 4 * MIB + 10);
        meta.arrived(0, 2 * MIB);
        meta.arrived(4 * MIB, 10);
        let range = |at, len| Range { at, len };
        let want = vec![range(0, 2 * MIB), range(4 * MIB, 10)];
        assert_eq!(meta.present(4 * MIB + 10), want);
        assert_eq!(meta.present(5 * MIB).last(), Some(&range(4 * MIB + 10, MIB - 10)));
    }

    #[test]
    fn an_empty_file_misses_nothing() {
        let mut meta = Meta::stub(Fid(5), Stamp(1), 0);
        assert_eq!(meta.missing(0, 10), None);
        assert!(meta.arrived(0, 0));
    }

    #[test]
    fn truncation_forgets_the_rest() {
        let mut meta = Meta::stub(Fid(5), Stamp(1), 3 * MIB);
        meta.arrived(0, MIB);
        assert!(!meta.truncated(2 * MIB));
        assert_eq!(meta.missing(0, 9 * MIB), Some((MIB, MIB)));
        assert!(meta.truncated(MIB / 2));
    }

    #[test]
    fn large_files_have_large_granules() {
        let meta = Meta::stub(Fid(5), Stamp(1), 100 << 30);
        assert_eq!(meta.granule_len(), 8 * MIB);
        assert!(meta.encode().len() < 2100);
    }
}
