//! The bodies of records: what each kind packs, part by part. With codec.rs, all packing there is.
//!
//! The writer and the reader of each part stand in the same order and check the same bounds, so
//! that nothing is written that would not be read. Each record has one encoding.

use super::{Fault, SEQ_MAX, u32_at, u64_at};
use crate::kml::record::{
    Attr, Change, Fid, Gone, NAME_LEN_MAX, Name, Op, Over, Place, RANGES_MAX, Range, Stamp,
    TARGET_LEN_MAX, Time, XATTR_LEN_MAX,
};

const MODE_MAX: u32 = 0o177_777;
const PERMISSIONS_MAX: u32 = 0o7777;
const NSEC_MAX: u32 = 999_999_999;

const HAS_MODE: u32 = 1;
const HAS_UID: u32 = 2;
const HAS_GID: u32 = 4;
const HAS_SIZE: u32 = 8;
const HAS_ATIME: u32 = 16;
const HAS_MTIME: u32 = 32;

fn bounded(value: u32, max: u32, field: &'static str) -> Result<u32, Fault> {
    if value > max { Err(Fault::Field(field)) } else { Ok(value) }
}

fn xattr_name(name: &[u8]) -> Result<&[u8], Fault> {
    if name.is_empty() || name.contains(&0) { Err(Fault::Field("xattr name")) } else { Ok(name) }
}

fn target(bytes: &[u8]) -> Result<&[u8], Fault> {
    if bytes.is_empty() || bytes.contains(&0) { Err(Fault::Field("target")) } else { Ok(bytes) }
}

pub(super) struct Writer<'a>(pub(super) &'a mut Vec<u8>);

impl Writer<'_> {
    fn u8(&mut self, value: u8) {
        self.0.push(value);
    }
    fn u16(&mut self, value: u16) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }
    fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }
    fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }
    /// `bytes` behind their length of 1 byte; all callers' bounds fit it
    fn bytes8(&mut self, bytes: &[u8], len_max: usize) -> Result<(), Fault> {
        if bytes.len() > len_max {
            return Err(Fault::TooLong);
        }
        self.u8(u8::try_from(bytes.len()).map_err(|_| Fault::TooLong)?);
        self.0.extend_from_slice(bytes);
        Ok(())
    }
    pub(super) fn bytes16(&mut self, bytes: &[u8], len_max: usize) -> Result<(), Fault> {
        if bytes.len() > len_max {
            return Err(Fault::TooLong);
        }
        self.u16(u16::try_from(bytes.len()).map_err(|_| Fault::TooLong)?);
        self.0.extend_from_slice(bytes);
        Ok(())
    }
    fn value(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        if bytes.len() > XATTR_LEN_MAX {
            return Err(Fault::TooLong);
        }
        self.u32(bytes.len() as u32);
        self.0.extend_from_slice(bytes);
        Ok(())
    }
    fn value_or_none(&mut self, bytes: Option<&[u8]>) -> Result<(), Fault> {
        self.u8(u8::from(bytes.is_some()));
        self.value(bytes.unwrap_or_default())
    }
    fn fid(&mut self, fid: Fid) -> Result<(), Fault> {
        if fid.0 == 0 || fid.0 > SEQ_MAX {
            return Err(Fault::Field("fid"));
        }
        self.u64(fid.0);
        Ok(())
    }
    fn time(&mut self, time: Time) -> Result<(), Fault> {
        self.u64(time.sec as u64);
        self.u32(bounded(time.nsec, NSEC_MAX, "nsec")?);
        Ok(())
    }
    fn place(&mut self, place: &Place) -> Result<(), Fault> {
        self.fid(place.dir)?;
        self.u64(place.base.0);
        self.bytes8(place.name.as_bytes(), NAME_LEN_MAX)
    }
    fn gone(&mut self, gone: &Gone) -> Result<(), Fault> {
        self.fid(gone.fid)?;
        self.u64(gone.base.0);
        self.u32(bounded(gone.attr.mode, MODE_MAX, "mode")?);
        self.u32(gone.attr.uid);
        self.u32(gone.attr.gid);
        self.u32(gone.attr.nlink);
        self.u64(gone.attr.rdev);
        self.u64(gone.attr.size);
        self.time(gone.attr.atime)?;
        self.time(gone.attr.mtime)?;
        match &gone.target {
            // a target is never empty, so that an empty one can stand for none
            None => self.bytes16(&[], 0),
            Some(bytes) => self.bytes16(target(bytes)?, TARGET_LEN_MAX),
        }
    }
    fn change(&mut self, change: &Change) -> Result<(), Fault> {
        let bit = |present, bit| if present { bit } else { 0 };
        self.u32(
            bit(change.mode.is_some(), HAS_MODE)
                | bit(change.uid.is_some(), HAS_UID)
                | bit(change.gid.is_some(), HAS_GID)
                | bit(change.size.is_some(), HAS_SIZE)
                | bit(change.atime.is_some(), HAS_ATIME)
                | bit(change.mtime.is_some(), HAS_MTIME),
        );
        self.u32(bounded(change.mode.unwrap_or(0), PERMISSIONS_MAX, "mode")?);
        self.u32(change.uid.unwrap_or(0));
        self.u32(change.gid.unwrap_or(0));
        self.u64(change.size.unwrap_or(0));
        self.time(change.atime.unwrap_or_default())?;
        self.time(change.mtime.unwrap_or_default())
    }
    fn made(&mut self, at: &Place, fid: Fid, mode: u32, umask: u32) -> Result<(), Fault> {
        self.place(at)?;
        self.fid(fid)?;
        self.u32(bounded(mode, MODE_MAX, "mode")?);
        self.u32(bounded(umask, PERMISSIONS_MAX, "umask")?);
        Ok(())
    }
    fn object(&mut self, fid: Fid, base: Stamp) -> Result<(), Fault> {
        self.fid(fid)?;
        self.u64(base.0);
        Ok(())
    }
    fn over(&mut self, over: &Over) -> Result<(), Fault> {
        match over {
            Over::Nothing { noreplace } => {
                self.u8(u8::from(*noreplace));
                Ok(())
            }
            Over::Replaced(gone) => {
                self.u8(2);
                self.gone(gone)
            }
            Over::Exchanged { fid, base } => {
                self.u8(3);
                self.object(*fid, *base)
            }
        }
    }
    fn ranges(&mut self, ranges: &[Range]) -> Result<(), Fault> {
        if ranges.len() > RANGES_MAX {
            return Err(Fault::TooLong);
        }
        self.u16(ranges.len() as u16);
        for range in ranges {
            self.u64(range.at);
            self.u64(checked(*range)?.len);
        }
        Ok(())
    }
    pub(super) fn op(&mut self, op: &Op) -> Result<(), Fault> {
        match op {
            Op::Noop => Ok(()),
            Op::Create { at, fid, mode, umask } | Op::Mkdir { at, fid, mode, umask } => {
                self.made(at, *fid, *mode, *umask)
            }
            Op::Symlink { at, fid, target: bytes } => {
                self.place(at)?;
                self.fid(*fid)?;
                self.bytes16(target(bytes)?, TARGET_LEN_MAX)
            }
            Op::Mknod { at, fid, mode, umask, rdev } => {
                self.made(at, *fid, *mode, *umask)?;
                self.u64(*rdev);
                Ok(())
            }
            Op::Link { at, fid, base } => {
                self.place(at)?;
                self.object(*fid, *base)
            }
            Op::Rename { from, to, fid, base, over } => {
                self.place(from)?;
                self.place(to)?;
                self.object(*fid, *base)?;
                self.over(over)
            }
            Op::Unlink { at, gone } | Op::Rmdir { at, gone } => {
                self.place(at)?;
                self.gone(gone)
            }
            Op::Setattr { fid, base, new, old } => {
                self.object(*fid, *base)?;
                self.change(new)?;
                self.change(old)
            }
            Op::Setxattr { fid, base, name, value, old } => {
                self.object(*fid, *base)?;
                self.bytes8(xattr_name(name)?, NAME_LEN_MAX)?;
                self.value(value)?;
                self.value_or_none(old.as_deref())
            }
            Op::Removexattr { fid, base, name, old } => {
                self.object(*fid, *base)?;
                self.bytes8(xattr_name(name)?, NAME_LEN_MAX)?;
                self.value_or_none(old.as_deref())
            }
            Op::Store { fid, base, size, mtime, ranges, old_size } => {
                self.object(*fid, *base)?;
                self.u64(*size);
                self.time(*mtime)?;
                self.u64(*old_size);
                self.ranges(ranges)
            }
        }
    }
}

fn checked(range: Range) -> Result<Range, Fault> {
    let end = range.at.checked_add(range.len).ok_or(Fault::Field("range"))?;
    if end > i64::MAX as u64 { Err(Fault::Field("range")) } else { Ok(range) }
}

pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Fault> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(Fault::Short)?;
        self.0 = rest;
        Ok(taken)
    }
    fn u8(&mut self) -> Result<u8, Fault> {
        Ok(self.take(1)?[0])
    }
    fn u16(&mut self) -> Result<u16, Fault> {
        let bytes = self.take(2)?;
        Ok(u16::from_le_bytes([bytes[0], bytes[1]]))
    }
    fn u32(&mut self) -> Result<u32, Fault> {
        Ok(u32_at(self.take(4)?, 0))
    }
    fn u64(&mut self) -> Result<u64, Fault> {
        Ok(u64_at(self.take(8)?, 0))
    }
    fn bytes8(&mut self) -> Result<&'a [u8], Fault> {
        let len = usize::from(self.u8()?);
        self.take(len)
    }
    pub(super) fn bytes16(&mut self, len_max: usize) -> Result<&'a [u8], Fault> {
        let len = usize::from(self.u16()?);
        if len > len_max { Err(Fault::TooLong) } else { self.take(len) }
    }
    fn value(&mut self) -> Result<Vec<u8>, Fault> {
        let len = self.u32()? as usize;
        if len > XATTR_LEN_MAX { Err(Fault::TooLong) } else { Ok(self.take(len)?.to_vec()) }
    }
    fn value_or_none(&mut self) -> Result<Option<Vec<u8>>, Fault> {
        match (self.u8()?, self.value()?) {
            (1, value) => Ok(Some(value)),
            (0, value) if value.is_empty() => Ok(None),
            _ => Err(Fault::Field("old value")),
        }
    }
    fn fid(&mut self) -> Result<Fid, Fault> {
        match self.u64()? {
            fid @ 1..=SEQ_MAX => Ok(Fid(fid)),
            _ => Err(Fault::Field("fid")),
        }
    }
    fn stamp(&mut self) -> Result<Stamp, Fault> {
        Ok(Stamp(self.u64()?))
    }
    fn time(&mut self) -> Result<Time, Fault> {
        Ok(Time { sec: self.u64()? as i64, nsec: bounded(self.u32()?, NSEC_MAX, "nsec")? })
    }
    fn place(&mut self) -> Result<Place, Fault> {
        let (dir, base) = (self.fid()?, self.stamp()?);
        let name = Name::new(self.bytes8()?).map_err(|_| Fault::Field("name"))?;
        Ok(Place { dir, base, name })
    }
    fn gone(&mut self) -> Result<Gone, Fault> {
        let (fid, base) = (self.fid()?, self.stamp()?);
        let attr = Attr {
            mode: bounded(self.u32()?, MODE_MAX, "mode")?,
            uid: self.u32()?,
            gid: self.u32()?,
            nlink: self.u32()?,
            rdev: self.u64()?,
            size: self.u64()?,
            atime: self.time()?,
            mtime: self.time()?,
        };
        let bytes = self.bytes16(TARGET_LEN_MAX)?;
        let target = if bytes.is_empty() { None } else { Some(target(bytes)?.to_vec()) };
        Ok(Gone { fid, base, attr, target })
    }
    fn change(&mut self) -> Result<Change, Fault> {
        let mask = self.u32()?;
        let mode = bounded(self.u32()?, PERMISSIONS_MAX, "mode")?;
        let (uid, gid, size) = (self.u32()?, self.u32()?, self.u64()?);
        let (atime, mtime) = (self.time()?, self.time()?);
        let change = Change {
            mode: (mask & HAS_MODE != 0).then_some(mode),
            uid: (mask & HAS_UID != 0).then_some(uid),
            gid: (mask & HAS_GID != 0).then_some(gid),
            size: (mask & HAS_SIZE != 0).then_some(size),
            atime: (mask & HAS_ATIME != 0).then_some(atime),
            mtime: (mask & HAS_MTIME != 0).then_some(mtime),
        };
        // one change has one encoding: what is absent is zero
        let absent = mode != change.mode.unwrap_or(0)
            || uid != change.uid.unwrap_or(0)
            || gid != change.gid.unwrap_or(0)
            || size != change.size.unwrap_or(0)
            || atime != change.atime.unwrap_or_default()
            || mtime != change.mtime.unwrap_or_default();
        if absent || mask >= HAS_MTIME * 2 { Err(Fault::Field("change")) } else { Ok(change) }
    }
    fn made(&mut self) -> Result<(Place, Fid, u32, u32), Fault> {
        let (at, fid) = (self.place()?, self.fid()?);
        let mode = bounded(self.u32()?, MODE_MAX, "mode")?;
        let umask = bounded(self.u32()?, PERMISSIONS_MAX, "umask")?;
        Ok((at, fid, mode, umask))
    }
    fn over(&mut self) -> Result<Over, Fault> {
        match self.u8()? {
            0 => Ok(Over::Nothing { noreplace: false }),
            1 => Ok(Over::Nothing { noreplace: true }),
            2 => Ok(Over::Replaced(self.gone()?)),
            3 => Ok(Over::Exchanged { fid: self.fid()?, base: self.stamp()? }),
            _ => Err(Fault::Field("over")),
        }
    }
    fn ranges(&mut self) -> Result<Vec<Range>, Fault> {
        let count = usize::from(self.u16()?);
        if count > RANGES_MAX {
            return Err(Fault::TooLong);
        }
        (0..count).map(|_| checked(Range { at: self.u64()?, len: self.u64()? })).collect()
    }
    pub(super) fn op(&mut self, kind: u8) -> Result<Op, Fault> {
        Ok(match kind {
            1 => Op::Noop,
            2 => {
                let (at, fid, mode, umask) = self.made()?;
                Op::Create { at, fid, mode, umask }
            }
            3 => {
                let (at, fid, mode, umask) = self.made()?;
                Op::Mkdir { at, fid, mode, umask }
            }
            4 => {
                let (at, fid) = (self.place()?, self.fid()?);
                Op::Symlink { at, fid, target: target(self.bytes16(TARGET_LEN_MAX)?)?.to_vec() }
            }
            5 => {
                let (at, fid, mode, umask) = self.made()?;
                Op::Mknod { at, fid, mode, umask, rdev: self.u64()? }
            }
            6 => Op::Link { at: self.place()?, fid: self.fid()?, base: self.stamp()? },
            7 => Op::Rename {
                from: self.place()?,
                to: self.place()?,
                fid: self.fid()?,
                base: self.stamp()?,
                over: self.over()?,
            },
            8 => Op::Unlink { at: self.place()?, gone: self.gone()? },
            9 => Op::Rmdir { at: self.place()?, gone: self.gone()? },
            10 => Op::Setattr {
                fid: self.fid()?,
                base: self.stamp()?,
                new: self.change()?,
                old: self.change()?,
            },
            11 => Op::Setxattr {
                fid: self.fid()?,
                base: self.stamp()?,
                name: xattr_name(self.bytes8()?)?.to_vec(),
                value: self.value()?,
                old: self.value_or_none()?,
            },
            12 => Op::Removexattr {
                fid: self.fid()?,
                base: self.stamp()?,
                name: xattr_name(self.bytes8()?)?.to_vec(),
                old: self.value_or_none()?,
            },
            13 => {
                let (fid, base) = (self.fid()?, self.stamp()?);
                let (size, mtime, old_size) = (self.u64()?, self.time()?, self.u64()?);
                Op::Store { fid, base, size, mtime, ranges: self.ranges()?, old_size }
            }
            other => return Err(Fault::Kind(other)),
        })
    }
}
