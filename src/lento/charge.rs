//! What a record takes at the server, at most: the one place where it is estimated.
//!
//! ```text
//!   any record        its journal entry there; the attribute in which imz notes its stamp
//!   a new object      an inode, blocks for a directory that splits, and for its attributes
//!   a store           its data in whole blocks, range by range; extents; an inode in the spool
//!   what gives room   nothing: a person must be able to delete on a full volume
//! ```
//!
//! Charged in full also where old blocks are written over: the server keeps new contents beside the
//! old ones until they are complete. A pure function of the record, so that a charge that was lost
//! with the process is found again in the journal. No I/O, no clock.

use super::room::{BLOCK_LEN, Room, blocks};
use crate::kml::record::{Fid, Op, Range, Record};

/// An entry of the journal without what varies, of the index, and of the table of clients, bytes.
const RECORD_LEN: u64 = 512;
/// What each range of a store adds to that.
pub const RANGE_LEN: u64 = 16;
/// A directory whose blocks are full gets one more. (Once in some thousand names its index grows, too:
/// the server keeps a margin for that.)
const DIR_LEN: u64 = BLOCK_LEN;
/// Where a file system makes inodes as it goes, bytes.
const INODE_LEN: u64 = 512;
/// A block of data has at most one extent of 12 bytes, or one pointer of 4: with the blocks above
/// these, less than a 256th.
const MAP_PART: u64 = 256;
/// An inode has room for so many extents; more take a block of their own.
const EXTENTS_INSIDE: u64 = 4;

/// The room that the record takes at the server until it is acknowledged, and what it leads to.
pub fn of(record: &Record) -> Room {
    of_op(&record.op, record.path.len() as u64)
}

/// The same of its parts.
pub fn of_op(op: &Op, path_len: u64) -> Room {
    let entry = RECORD_LEN.saturating_add(path_len);
    let made = |more: u64| {
        // with an attribute block, for lists and labels that it inherits
        let len = entry + INODE_LEN + DIR_LEN + BLOCK_LEN + more;
        Room::new(len, 1)
    };
    match op {
        Op::Noop | Op::Unlink { .. } | Op::Rmdir { .. } | Op::Removexattr { .. } => Room::NONE,
        Op::Setattr { new, old, .. } => match (new.size, old.size) {
            (Some(new), Some(old)) if new > old => Room::new(entry + BLOCK_LEN, 0),
            _ => Room::NONE,
        },
        Op::Create { .. } | Op::Mknod { .. } => made(0),
        Op::Mkdir { .. } => made(BLOCK_LEN),
        Op::Symlink { target, .. } => made(blocks(target.len() as u64)),
        Op::Link { .. } | Op::Rename { .. } => Room::new(entry + DIR_LEN, 0),
        Op::Setxattr { value, old, .. } => {
            let old_len = old.as_ref().map_or(0, Vec::len) as u64;
            // beside each other in the journal, and the new one in the file system
            let len = blocks(value.len() as u64) + value.len() as u64 + old_len;
            Room::new(entry + BLOCK_LEN + len, 0)
        }
        Op::Store { ranges, .. } => of_store(ranges, path_len),
    }
}

/// The file whose data the record stores as a whole.
pub fn whole(op: &Op) -> Option<Fid> {
    match op {
        Op::Store { fid, size, ranges, .. } => match ranges[..] {
            [Range { at: 0, len }] if len >= *size => Some(*fid),
            _ => None,
        },
        _ => None,
    }
}

/// The room of a store of these ranges.
pub fn of_store(ranges: &[Range], path_len: u64) -> Room {
    if ranges.is_empty() {
        return Room::NONE;
    }
    let data = ranges.iter().map(|range| {
        let first = range.at - range.at % BLOCK_LEN;
        blocks(range.at.saturating_add(range.len).saturating_sub(first))
    });
    let data = data.fold(0, u64::saturating_add);
    let entry = RECORD_LEN.saturating_add(path_len).saturating_add(RANGE_LEN * ranges.len() as u64);
    // at worst each block is an extent
    let map_len = if data > EXTENTS_INSIDE * BLOCK_LEN { BLOCK_LEN } else { 0 };
    let len = data.saturating_add(data / MAP_PART).saturating_add(map_len).saturating_add(entry);
    Room::new(len, 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kml::record::{Attr, Change, Gone, Name, Origin, Place, Stamp, Time};

    fn record(op: Op) -> Record {
        let origin = Origin::default();
        Record { time_ns: 0, origin, uid: 0, gid: 0, path: b"a/b".to_vec(), op }
    }

    fn store(ranges: &[(u64, u64)]) -> Record {
        let ranges = ranges.iter().map(|&(at, len)| Range { at, len }).collect();
        let (fid, base, mtime) = (Fid(7), Stamp(0), Time::default());
        record(Op::Store { fid, base, size: 1 << 40, mtime, ranges, old_size: 0 })
    }

    fn place() -> Place {
        Place { dir: Fid(1), base: Stamp(0), name: Name::new(b"n").unwrap() }
    }

    #[test]
    fn data_count_in_whole_blocks_range_by_range() {
        let of = |ranges: &[(u64, u64)]| of(&store(ranges)).bytes();
        assert!(of(&[(4095, 2)]) >= 2 * BLOCK_LEN, "it touches two blocks");
        assert!(of(&[(0, 1), (1 << 30, 1)]) - of(&[(0, 1)]) >= BLOCK_LEN);
        assert!(of(&[(0, 1), (1 << 30, 1)]) < 8 * BLOCK_LEN, "the hole between is free");
        assert!(of(&[(0, 1 << 30)]) < (1 << 30) + (1 << 30) / 200, "the estimate is no waste");
        assert!(of(&[(1 << 62, u64::MAX), (0, u64::MAX)]) >= u64::MAX - BLOCK_LEN, "no wrap");
    }

    #[test]
    fn what_gives_room_takes_none() {
        let gone = Gone { fid: Fid(7), base: Stamp(0), attr: Attr::default(), target: None };
        for op in [
            Op::Noop,
            Op::Unlink { at: place(), gone: gone.clone() },
            Op::Rmdir { at: place(), gone },
            Op::Removexattr { fid: Fid(7), base: Stamp(0), name: vec![], old: None },
            Op::Setattr {
                fid: Fid(7),
                base: Stamp(0),
                new: Change { size: Some(3), mode: Some(0o600), ..Change::default() },
                old: Change { size: Some(9), mode: Some(0o644), ..Change::default() },
            },
        ] {
            assert_eq!(of(&record(op.clone())), Room::NONE, "{op:?}");
        }
    }

    #[test]
    fn what_is_made_takes_a_file_and_more_takes_more() {
        let (fid, mode, umask) = (Fid(7), 0o644, 0);
        let create = of(&record(Op::Create { at: place(), fid, mode, umask }));
        let mkdir = of(&record(Op::Mkdir { at: place(), fid, mode, umask }));
        let target = vec![b'x'; 4000];
        let symlink = of(&record(Op::Symlink { at: place(), fid, target }));
        assert_eq!((create.files(), mkdir.files(), symlink.files()), (1, 1, 1));
        assert!(mkdir.bytes() > create.bytes() && symlink.bytes() > create.bytes());
        let value = |len: usize| Op::Setxattr {
            fid,
            base: Stamp(0),
            name: b"user.x".to_vec(),
            value: vec![0; len],
            old: None,
        };
        assert!(of(&record(value(60_000))).bytes() > of(&record(value(1))).bytes() + 60_000);
        let grown = |old, new| {
            let change = |size| Change { size: Some(size), ..Change::default() };
            Op::Setattr { fid, base: Stamp(0), new: change(new), old: change(old) }
        };
        assert!(of(&record(grown(1, 2))).bytes() > 0);
    }
}
