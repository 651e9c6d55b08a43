//! The first request of a session: what the kernel can, and what we take of it.

use super::reply::Body;
use super::{Fields, Garbled, HEAD_LEN, Head, Result, code};

/// The protocol that is spoken here: the major number, and the newest minor one that was read.
pub const MAJOR: u32 = 7;
const MINOR: u32 = 45;
/// The oldest minor number that has all that is used without asking.
const MINOR_MIN: u32 = 31;
/// Length of `struct fuse_init_out`.
const INIT_OUT_LEN: usize = 64;

/// Flags of INIT, in 64 bits.
pub mod flag {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const POSIX_LOCKS: u64 = 1 << 1;
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DONT_MASK: u64 = 1 << 6;
    pub const FLOCK_LOCKS: u64 = 1 << 10;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const POSIX_ACL: u64 = 1 << 20;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    /// flags beyond 32 bits count
    pub const INIT_EXT: u64 = 1 << 30;
    pub const PASSTHROUGH: u64 = 1 << 37;
    pub const OVER_IO_URING: u64 = 1 << 41;
}

/// What the kernel offers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Offer {
    pub unique: u64,
    pub major: u32,
    pub minor: u32,
    /// bytes
    pub readahead_max: u32,
    pub flags: u64,
}

/// What we take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Taken {
    pub flags: u64,
    pub readahead_max: u32,
    /// requests that the kernel queues in the background
    pub background_max: u16,
    /// largest write, bytes
    pub write_len_max: u32,
    /// file systems that backing files may be stacked on
    pub stack_depth: u32,
}

impl Offer {
    /// # Errors
    /// [`Garbled`]: no INIT, or one of a kernel that is too old.
    pub fn parse(bytes: &[u8]) -> Result<Offer> {
        let head = Head::parse(bytes)?;
        if head.opcode != code::INIT {
            return Err(Garbled);
        }
        let mut f = Fields(&bytes[HEAD_LEN..]);
        let (major, minor, readahead_max, low) = (f.u32()?, f.u32()?, f.u32()?, f.u32()?);
        if (major, minor) < (MAJOR, MINOR_MIN) {
            return Err(Garbled);
        }
        let mut flags = u64::from(low);
        if flags & flag::INIT_EXT != 0 {
            flags |= u64::from(f.u32()?) << 32;
        }
        Ok(Offer { unique: head.unique, major, minor, readahead_max, flags })
    }
}

/// The answer of one who speaks an older protocol than the kernel: it offers again.
pub fn older() -> Vec<u8> {
    Body::default().u32(MAJOR).u32(MINOR).padded(INIT_OUT_LEN)
}

/// `struct fuse_init_out`:
///
/// ```text
///  at  len  field
///   0    8  major, minor
///   8    4  max_readahead       bytes
///  12    4  flags               low half
///  16    4  max_background, congestion_threshold
///  20    4  max_write           bytes
///  24    4  time_gran           ns
///  28    4  max_pages, map_alignment
///  32    4  flags2              high half
///  36    4  max_stack_depth
///  40   24  unused
/// ```
pub fn taken(t: &Taken) -> Vec<u8> {
    let pages = t.write_len_max.div_ceil(4096).min(u16::MAX.into()) as u16;
    let body = Body::with_room(INIT_OUT_LEN).u32(MAJOR).u32(MINOR).u32(t.readahead_max);
    let body = body.u32(t.flags as u32).u16(t.background_max).u16(t.background_max / 4 * 3);
    let body = body.u32(t.write_len_max).u32(1).u16(pages).u16(0);
    body.u32((t.flags >> 32) as u32).u32(t.stack_depth).padded(INIT_OUT_LEN)
}
