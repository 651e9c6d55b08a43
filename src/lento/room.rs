//! Room on a disk: bytes and files together, in arithmetic that cannot wrap.
//!
//! Sums end at the largest number, differences at nothing; who must know that a difference was not
//! there asks [`Room::minus`]. What travels is bounded ([`ROOM_MAX`]). Pure.
//! Source: Lustre's grants, whose unsigned counters wrapped.

use minicbor::{Decode, Encode};

/// Largest figure of a message: what a client is granted in all its life stays below.
pub const ROOM_MAX: u64 = 1 << 62;
/// The unit in which file systems give room, bytes. Larger blocks are rare, and a margin covers them.
pub const BLOCK_LEN: u64 = 4096;

/// So many bytes, and so many files (inodes).
#[derive(Encode, Decode, Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Room {
    #[n(0)]
    bytes: u64,
    #[n(1)]
    files: u64,
}

impl Room {
    pub const NONE: Room = Room { bytes: 0, files: 0 };
    /// the most that a message may carry
    pub const MOST: Room = Room { bytes: ROOM_MAX, files: ROOM_MAX };

    pub const fn new(bytes: u64, files: u64) -> Room {
        Room { bytes, files }
    }
    pub const fn bytes(self) -> u64 {
        self.bytes
    }
    pub const fn files(self) -> u64 {
        self.files
    }
    pub fn is_none(self) -> bool {
        self == Room::NONE
    }
    /// Whether the figures are such as a message may carry.
    pub fn is_sane(self) -> bool {
        Room::MOST.covers(self)
    }
    pub fn plus(self, other: Room) -> Room {
        self.both(other, u64::saturating_add)
    }
    /// `None` when `other` is not all in it.
    pub fn minus(self, other: Room) -> Option<Room> {
        self.covers(other).then(|| self.less(other))
    }
    /// What is left without `other`, of each kind at least nothing.
    pub fn less(self, other: Room) -> Room {
        self.both(other, u64::saturating_sub)
    }
    pub fn max(self, other: Room) -> Room {
        self.both(other, u64::max)
    }
    pub fn min(self, other: Room) -> Room {
        self.both(other, u64::min)
    }
    /// Whether `other` fits into it.
    pub fn covers(self, other: Room) -> bool {
        self.bytes >= other.bytes && self.files >= other.files
    }
    /// The `n`th part of it.
    pub fn part(self, n: u64) -> Room {
        Room::new(self.bytes / n.max(1), self.files / n.max(1))
    }
    fn both(self, other: Room, f: impl Fn(u64, u64) -> u64) -> Room {
        Room::new(f(self.bytes, other.bytes), f(self.files, other.files))
    }
}

impl std::iter::Sum for Room {
    fn sum<I: Iterator<Item = Room>>(iter: I) -> Room {
        iter.fold(Room::NONE, Room::plus)
    }
}

/// Bytes in whole blocks.
pub fn blocks(len: u64) -> u64 {
    len.div_ceil(BLOCK_LEN).saturating_mul(BLOCK_LEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_wraps() {
        let (most, one) = (Room::new(u64::MAX, u64::MAX), Room::new(1, 1));
        assert_eq!(most.plus(one), most);
        assert_eq!(Room::NONE.less(one), Room::NONE);
        assert_eq!(Room::new(5, 0).less(one), Room::new(4, 0));
        assert_eq!(Room::new(5, 0).minus(one), None, "a file is missing");
        assert_eq!(Room::new(5, 1).minus(one), Some(Room::new(4, 0)));
        assert!(Room::new(5, 1).covers(one) && !Room::new(0, 9).covers(one));
        assert_eq!([most, most].into_iter().sum::<Room>(), most);
        assert!(!most.is_sane() && one.is_sane() && Room::MOST.is_sane());
        assert_eq!((blocks(0), blocks(1), blocks(4096), blocks(4097)), (0, 4096, 4096, 8192));
        assert!(blocks(u64::MAX) > u64::MAX - BLOCK_LEN);
        assert_eq!(Room::new(9, 3).part(0), Room::new(9, 3));
    }
}
