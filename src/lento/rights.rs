//! What one client may do without asking: a mode for the whole volume, and objects that differ.
//!
//! ```text
//!   Write   nobody else reads or writes it: change it here, say so later
//!   Read    nobody else has changes of it that the server lacks: what is current here is current
//!   None    ask first
//! ```
//!
//! Of any object, when one client has `Write`, no other has more than `None`. Client and server
//! keep the same table of a client; the client's may only ever hold less. Pure: no I/O, no clock.
//! Source: InterMezzo's permit for a file set, the tokens of Calypso, the states of cache lines.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard};

use minicbor::{Decode, Encode};

use crate::kml::record::{Fid, Op};

/// What may be done with an object.
#[derive(Encode, Decode, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
#[cbor(index_only)]
pub enum Mode {
    #[default]
    #[n(0)]
    None,
    #[n(1)]
    Read,
    #[n(2)]
    Write,
}

impl Mode {
    /// Whether two clients may have these modes of one object at once.
    pub fn agrees(self, other: Mode) -> bool {
        self.min(other) == Mode::None || self.max(other) == Mode::Read
    }
}

/// One client's modes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rights {
    volume: Mode,
    /// what differs from the volume's mode
    objects: HashMap<Fid, Mode>,
    /// of these, how many are `Write`
    write_count: usize,
}

impl Rights {
    /// Of everything that is not told apart.
    pub fn volume(&self) -> Mode {
        self.volume
    }
    pub fn mode(&self, fid: Fid) -> Mode {
        self.objects.get(&fid).copied().unwrap_or(self.volume)
    }
    /// Objects that are told apart from the volume.
    pub fn apart(&self) -> impl Iterator<Item = (Fid, Mode)> + '_ {
        self.objects.iter().map(|(fid, mode)| (*fid, *mode))
    }
    /// How many they are.
    pub fn apart_count(&self) -> usize {
        self.objects.len()
    }
    pub fn set(&mut self, fid: Fid, mode: Mode) {
        let before = match mode == self.volume {
            true => self.objects.remove(&fid),
            false => self.objects.insert(fid, mode),
        };
        self.write_count -= usize::from(before == Some(Mode::Write));
        self.write_count += usize::from(mode == Mode::Write && self.volume != Mode::Write);
    }
    /// These are known now, and may be read at least; of `read_only` no more.
    pub fn read(&mut self, known: &[Fid], read_only: &[Fid]) {
        for fid in read_only {
            self.set(*fid, Mode::None);
        }
        for fid in known {
            self.set(*fid, self.mode(*fid).max(Mode::Read));
        }
    }
    /// The promise for an object was broken: what was read by it must be asked for anew.
    pub fn broken(&mut self, fid: Fid) {
        if self.objects.get(&fid) == Some(&Mode::Read) && self.volume == Mode::None {
            self.set(fid, Mode::None);
        }
    }
    /// One mode for everything.
    pub fn set_volume(&mut self, mode: Mode) {
        *self = Rights { volume: mode, ..Rights::default() };
    }
    /// A higher mode for everything but what may be changed already.
    pub fn raise_volume(&mut self, mode: Mode) {
        let written: Vec<Fid> =
            self.apart().filter(|(_, m)| *m == Mode::Write).map(|(fid, _)| fid).collect();
        self.set_volume(mode);
        for fid in written {
            self.set(fid, Mode::Write);
        }
    }
    /// No more than this of everything.
    pub fn lower_volume(&mut self, mode: Mode) {
        let apart: Vec<(Fid, Mode)> = self.apart().collect();
        self.set_volume(self.volume.min(mode));
        for (fid, before) in apart {
            self.set(fid, before.min(mode));
        }
    }
    /// Whether anything may be changed.
    pub fn any_write(&self) -> bool {
        self.volume == Mode::Write || self.write_count > 0
    }
    /// Whether nothing may be done at all.
    pub fn is_none(&self) -> bool {
        self.volume == Mode::None && self.objects.values().all(|mode| *mode == Mode::None)
    }
}

/// A client's rights as its threads share them. The volume's mode alone is told without a lock.
#[derive(Debug, Default)]
pub struct Held {
    /// the volume's mode, and nothing is told apart from it
    plain: AtomicU8,
    rights: Mutex<Rights>,
}

impl Held {
    pub fn mode(&self, fid: Fid) -> Mode {
        match self.plain.load(Ordering::Acquire) {
            WRITE_ALL => Mode::Write,
            _ => self.locked().mode(fid),
        }
    }
    /// What is made in a directory that may be changed may be changed, too.
    pub fn made(&self, fid: Fid) {
        if self.plain.load(Ordering::Acquire) != WRITE_ALL {
            self.edit(|rights| rights.set(fid, Mode::Write));
        }
    }
    /// Changes the rights; who looks after the return sees the change.
    pub fn edit<T>(&self, change: impl FnOnce(&mut Rights) -> T) -> T {
        let mut rights = self.locked();
        let out = change(&mut rights);
        let all = rights.volume == Mode::Write && rights.objects.is_empty();
        self.plain.store(if all { WRITE_ALL } else { 0 }, Ordering::Release);
        out
    }
    fn locked(&self) -> MutexGuard<'_, Rights> {
        // Whole after every call that changes it.
        self.rights.lock().unwrap_or_else(|e| e.into_inner())
    }
}

const WRITE_ALL: u8 = 1;

/// The directory and the object, if the operation makes one.
pub fn made(op: &Op) -> Option<(Fid, Fid)> {
    match op {
        Op::Create { at, fid, .. }
        | Op::Mkdir { at, fid, .. }
        | Op::Symlink { at, fid, .. }
        | Op::Mknod { at, fid, .. } => Some((at.dir, *fid)),
        _ => None,
    }
}

/// The objects that must be writable for the operation.
pub fn needs(op: &Op) -> impl Iterator<Item = Fid> + '_ {
    let new = made(op).map(|(_, fid)| fid);
    op.touched().filter(move |fid| Some(*fid) != new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_clients_never_share_what_one_may_change() {
        use Mode::{None, Read, Write};
        for (a, b, want) in [
            (None, None, true),
            (None, Read, true),
            (None, Write, true),
            (Read, Read, true),
            (Read, Write, false),
            (Write, Write, false),
        ] {
            assert_eq!((a.agrees(b), b.agrees(a)), (want, want), "{a:?} {b:?}");
        }
    }

    #[test]
    fn what_differs_from_the_volume_is_kept_apart_and_nothing_else() {
        let mut r = Rights::default();
        assert!(r.is_none() && !r.any_write());
        r.set(Fid(7), Mode::Write);
        r.set(Fid(8), Mode::Read);
        assert_eq!(
            (r.mode(Fid(7)), r.mode(Fid(8)), r.mode(Fid(9))),
            (Mode::Write, Mode::Read, Mode::None)
        );
        assert!(r.any_write() && !r.is_none());
        r.set(Fid(7), Mode::Read);
        assert!(!r.any_write());
        r.set(Fid(7), Mode::None);
        r.set(Fid(8), Mode::None);
        assert_eq!(r, Rights::default());
        r.set_volume(Mode::Write);
        r.set(Fid(7), Mode::None);
        assert!(r.any_write() && r.apart_count() == 1);
        r.set(Fid(7), Mode::Write);
        assert_eq!(r.apart_count(), 0);
    }

    #[test]
    fn what_is_lowered_is_never_raised() {
        let mut r = Rights::default();
        r.set(Fid(7), Mode::Write);
        r.lower_volume(Mode::Read);
        assert_eq!((r.volume(), r.mode(Fid(7))), (Mode::None, Mode::Read));
        r.set_volume(Mode::Write);
        r.set(Fid(8), Mode::None);
        r.lower_volume(Mode::Read);
        assert_eq!((r.volume(), r.mode(Fid(8)), r.any_write()), (Mode::Read, Mode::None, false));
        r.lower_volume(Mode::None);
        assert_eq!(r, Rights::default());
    }
}
