//! Contents of the spool take their place in a file that stays, with a way back.
//!
//! ```text
//!   spool   AAAA  ->  BBBB        piece by piece; where one has a hole, the other one gets it
//!   file    BBBB  ->  AAAA
//! ```
//!
//! What was in the file goes where the contents were: so both together never take more room than
//! they had (but for one piece, which the server's margin covers), and whatever fails on the way is
//! undone by doing it once more. Then the file is what it was, and the contents are whole in the
//! spool, to be kept aside; or that fails as well, and its caller hears that it is a mixture. When the process dies in the middle, the spool is emptied, and the
//! client sends the contents again: none of it was acknowledged. Pure of records and names.

use std::os::fd::OwnedFd;

use super::tree::TreeError;
use super::volume::{self, VolumeError};
use crate::kml::record::Range;
use crate::sys::{Errno, crash, fs};

/// Both pieces are in memory while they change places, bytes.
const PIECE_LEN: u64 = 1 << 20;

/// A step failed, and both files are as they were; or the first one is a mixture now.
enum Fault {
    Undone(Errno),
    Mixed(Errno),
}

impl From<Errno> for Fault {
    fn from(e: Errno) -> Fault {
        Fault::Undone(e)
    }
}

/// Puts these ranges of `from` into `to` (open for reading and writing, both), and finishes. What
/// lies beyond the end of `from` is left out: the file has become shorter since. `finish` cuts
/// nothing off when it fails. Durable on return: no.
///
/// # Errors
/// What failed, and both files are as they were; or `Mixed`.
pub(super) fn in_place(
    from: &OwnedFd,
    to: &OwnedFd,
    ranges: &[Range],
    finish: impl FnOnce() -> volume::Result<()>,
) -> volume::Result<()> {
    let was_len = fs::fstat(to)?.size;
    let mut done: Vec<Range> = Vec::new();
    let swapped = swap_all(from, to, ranges, |piece| {
        crash::point("store-swapped");
        match done.last_mut() {
            Some(last) if last.at + last.len == piece.at => last.len += piece.len,
            _ => done.push(piece),
        }
    });
    let finished = match swapped {
        Ok(()) => finish(),
        Err(Fault::Undone(e)) => Err(TreeError::from(e).into()),
        Err(Fault::Mixed(e)) => return Err(VolumeError::Mixed(e)),
    };
    let e = match finished {
        Ok(()) => return Ok(()),
        Err(e @ VolumeError::Mixed(_)) => return Err(e),
        Err(e) => e,
    };
    let cut = || match fs::fstat(to)?.size == was_len {
        true => Ok(()),
        false => fs::truncate(to, was_len),
    };
    let mut left: u64 = done.iter().map(|piece| piece.len).sum();
    match swap_all(from, to, &done, |piece| left -= piece.len).and_then(|()| Ok(cut()?)) {
        Ok(()) if left == 0 => Err(e),
        Ok(()) => Err(VolumeError::Mixed(Errno::IO)), // the contents have lost their end
        Err(Fault::Undone(again) | Fault::Mixed(again)) => {
            log::error!("a store failed: {e}");
            Err(VolumeError::Mixed(again))
        }
    }
}

fn swap_all(
    from: &OwnedFd,
    to: &OwnedFd,
    ranges: &[Range],
    mut done: impl FnMut(Range),
) -> Result<(), Fault> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for range in ranges {
        let mut into = 0;
        while into < range.len {
            let (at, len) = (range.at + into, (range.len - into).min(PIECE_LEN));
            ours.resize(len as usize, 0);
            let have = read(from, &mut ours, at)?;
            if have == 0 {
                break;
            }
            theirs.clear();
            theirs.resize(have, 0); // zeros beyond the end
            read(to, &mut theirs, at)?;
            swap(from, to, (&ours[..have], &theirs), at)?;
            done(Range { at, len: have as u64 });
            into += have as u64;
        }
    }
    Ok(())
}

/// Changes a piece of both; after a failure both are as before, if that can be.
fn swap(
    from: &OwnedFd,
    to: &OwnedFd,
    (ours, theirs): (&[u8], &[u8]),
    at: u64,
) -> Result<(), Fault> {
    if ours == theirs {
        return Ok(());
    }
    let done = fs::pwrite_punching(to, ours, at);
    let Err(e) = done.and_then(|()| fs::pwrite_punching(from, theirs, at)) else { return Ok(()) };
    let put_back = |fd: &OwnedFd, bytes: &[u8]| {
        fs::pwrite_punching(fd, bytes, at).or_else(|e| match read_is(fd, bytes, at) {
            true => Ok(()), // it was not changed
            false => Err(Fault::Mixed(e)),
        })
    };
    put_back(to, theirs)?;
    put_back(from, ours)?;
    Err(e.into())
}

/// Reads until the buffer is full or the file ends.
fn read(fd: &OwnedFd, into: &mut [u8], at: u64) -> fs::Result<usize> {
    let mut have = 0;
    while have < into.len() {
        match fs::pread(fd, &mut into[have..], at + have as u64) {
            Ok(0) => break,
            Ok(n) => have += n,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(have)
}

fn read_is(fd: &OwnedFd, bytes: &[u8], at: u64) -> bool {
    let mut there = vec![0; bytes.len()]; // zeros beyond the end
    read(fd, &mut there, at).is_ok() && there == bytes
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    struct Rig {
        dir: tempfile::TempDir,
    }

    impl Rig {
        fn new(spool: &[u8], file: &[u8]) -> Rig {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("spool"), spool).unwrap();
            std::fs::write(dir.path().join("file"), file).unwrap();
            Rig { dir }
        }
        fn open(&self, name: &str, flags: i32) -> OwnedFd {
            let root = fs::open_root(self.dir.path()).unwrap();
            fs::open(&root, name.as_bytes(), flags, 0).unwrap()
        }
        fn both(&self) -> (OwnedFd, OwnedFd) {
            (self.open("spool", fs::o::RDWR), self.open("file", fs::o::RDWR))
        }
        fn read(&self) -> (Vec<u8>, Vec<u8>) {
            let of = |name: &str| std::fs::read(self.dir.path().join(name)).unwrap();
            (of("spool"), of("file"))
        }
        fn room(&self) -> u64 {
            let of = |name: &str| self.dir.path().join(name).metadata().unwrap().blocks();
            of("spool") + of("file")
        }
    }

    const MIB: usize = 1 << 20;

    /// New bytes, with a hole and an odd end, and old ones that are shorter.
    fn contents() -> (Vec<u8>, Vec<u8>) {
        let mut new: Vec<u8> = (0..3 * MIB + 77).map(|n| (n % 251) as u8 + 1).collect();
        new[MIB / 2..MIB + 8192].fill(0);
        (new, (0..2 * MIB + 5).map(|n| (n % 13) as u8 + 7).collect())
    }

    fn ranges(new: &[u8]) -> Vec<Range> {
        let end = new.len() as u64;
        vec![Range { at: 100, len: 9000 }, Range { at: 200_000, len: end - 200_000 + 999 }]
    }

    #[test]
    fn the_ranges_take_their_place_and_no_more_room() {
        let (new, old) = contents();
        let rig = Rig::new(&new, &old);
        let (from, to) = rig.both();
        let before = rig.room();
        in_place(&from, &to, &ranges(&new), || Ok(())).unwrap();
        let mut want = old.clone();
        want.resize(new.len(), 0);
        want[100..9100].copy_from_slice(&new[100..9100]);
        want[200_000..].copy_from_slice(&new[200_000..]);
        assert!(rig.read().1 == want);
        assert!(rig.room() <= before, "{} of {before}", rig.room());
    }

    #[test]
    fn what_fails_at_the_end_leaves_both_as_they_were() {
        let (new, old) = contents();
        let rig = Rig::new(&new, &old);
        let (from, to) = rig.both();
        let finish = || {
            fs::truncate(&to, 5 * MIB as u64).unwrap();
            Err(VolumeError::Os(Errno::PERM))
        };
        let failed = in_place(&from, &to, &ranges(&new), finish);
        assert!(matches!(failed, Err(VolumeError::Os(Errno::PERM))));
        assert!(rig.read() == (new, old), "a byte is lost");
    }

    #[test]
    fn what_fails_in_the_middle_leaves_both_as_they_were() {
        let (mut new, old) = contents();
        // the first piece is alike, so that the failure comes with the next one
        new[200_000..200_000 + MIB].copy_from_slice(&old[200_000..200_000 + MIB]);
        let rig = Rig::new(&new, &old);
        let (from, to) = rig.both();
        let range = [Range { at: 200_000, len: 2 * MIB as u64 }];
        for (spool, file) in [(fs::o::RDONLY, fs::o::RDWR), (fs::o::RDWR, fs::o::RDONLY)] {
            let (from, to) = (rig.open("spool", spool), rig.open("file", file));
            let failed = in_place(&from, &to, &range, || Ok(()));
            assert!(matches!(failed, Err(VolumeError::Os(_))), "{failed:?}");
            assert!(rig.read() == (new.clone(), old.clone()), "a byte is lost");
        }
        in_place(&from, &to, &range, || Ok(())).unwrap();
        assert!(rig.read().1 != old);
    }

    #[test]
    fn what_cannot_be_put_back_is_told_apart() {
        let rig = Rig::new(&[1; 10], &[2; 10]);
        let (from, to) = rig.both();
        // it cannot be read, nor written any more, when it is undone
        let range = [Range { at: 0, len: 10 }];
        let finish = || {
            fs::truncate(&from, 0).unwrap();
            Err(VolumeError::NoRoom)
        };
        let failed = in_place(&from, &to, &range, finish);
        assert!(matches!(failed, Err(VolumeError::Mixed(_))), "{failed:?}");
    }
}
