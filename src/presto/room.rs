//! Room at the server, before anything is done here: what operations and open files take.
//!
//! ```text
//!   an operation        its record's charge, before it acts
//!   a write by us       what a store of all that was written so far would take
//!   a mapping           all of the file, where there is room; else the file cannot be mapped, or
//!                       not be opened so, where the kernel would map it all the same
//!   the kernel writes   all of the file as it is, looked at every `LOOK_EVERY`; and a reserve
//! ```
//!
//! Who lacks room stops with a want; lento gets more, or ends it with ENOSPC. What is written already
//! is journaled in any case. Figures are in lento::grant, estimates in lento::charge; how a writer
//! is stopped whom the kernel serves by itself, in stop.rs.

use std::os::fd::AsFd;

use super::filter::{Filter, Result, Stop, Want, is_done};
use super::open::{Open, OpenState, add_range};
use crate::kml::record::{PATH_LEN_MAX, Range};
use crate::lento::charge;
use crate::lento::grant::{Charge, Regime};
use crate::lento::room::{BLOCK_LEN, Room, blocks};
use crate::sys::Errno;
use crate::sys::fs::{self, Stat, o};

/// Pieces of a sparse file that are counted; the rest counts as data.
const PIECES_MAX: usize = 1024;

impl Filter {
    /// Room for what is to be done; stops where there is none. What is done already gets it anyway.
    pub fn charged(&self, room: Room) -> Result<Charge> {
        match self.room.charge(room) {
            Some(charge) => Ok(charge),
            None if is_done() => Ok(self.room.charge_done(room)),
            None if !room.is_sane() => Err(Errno::FBIG.into()), // no disk has so much
            None => Err(Stop::Miss(Want::Room(room))),
        }
    }

    /// A writer that comes before the server has said how it is off for room waits for that word: it
    /// decides whether the kernel may write by itself.
    pub fn room_heard(&self) -> Result<()> {
        match self.room.is_heard() || is_done() {
            true => Ok(()),
            false => Err(Stop::Miss(Want::Room(Room::NONE))),
        }
    }

    /// Room for a write of `at..at + len` to an open file, beyond what it has.
    pub fn charged_write(&self, open: &Open, at: u64, len: u64) -> Result<Charge> {
        let need = {
            let stat = fs::fstat(&open.fd)?;
            let state = open.state();
            let more = blocks(len).saturating_add(BLOCK_LEN);
            let need = match &state.dirty {
                Some(dirty) if self.prefers_ranges(&stat) => {
                    let mut ranges = dirty.clone();
                    add_range(&mut ranges, Range { at, len });
                    of_ranges(open, &stat, &ranges, PATH_LEN_MAX, more)
                }
                _ => {
                    let data = data_len(&open.fd, &stat).saturating_add(more);
                    of_whole(data.min(stat.size.max(at.saturating_add(len))))
                }
            };
            need.less(state.charge_room())
        };
        self.charged(need)
    }

    /// Whether only what was written is to be shipped, and not all of the file. Where room is scarce
    /// it is; away from the server others may have changed the file, and then all of ours is kept.
    fn prefers_ranges(&self, stat: &Stat) -> bool {
        let figures = self.room.figures();
        match figures.regime {
            Regime::Off => false,
            _ if !self.cache.is_online() => false,
            Regime::Exact => true,
            Regime::Ample => !figures.free.covers(of_whole(stat.size)),
        }
    }

    /// Whether a store ships only what was written: where it is to, or where there is no room for all
    /// of the file.
    pub fn ships_ranges(&self, open: &Open, state: &OpenState, stat: &Stat) -> bool {
        let covered = || state.charge_room().covers(of_whole(data_len(&open.fd, stat)));
        !self.room.is_off() && (self.prefers_ranges(stat) || !covered())
    }

    /// The room of a store, from what the open file has already. The data are written: what is
    /// lacking is taken in any case.
    pub fn charge_of_store(
        &self,
        open: &Open,
        state: &mut OpenState,
        stat: &Stat,
        ranges: &[Range],
        path_len: usize,
    ) -> Charge {
        let room = of_ranges(open, stat, ranges, path_len, 0);
        let held = state.charge.as_mut().map(|held| held.take(room));
        let mut charge = held.unwrap_or_else(|| self.room.charge_done(Room::NONE));
        let lacks = room.less(charge.room());
        if !lacks.is_none() {
            let more = self.room.charge(lacks);
            charge.join(more.unwrap_or_else(|| self.room.charge_done(lacks)));
        }
        charge
    }

    /// Whether the kernel is to move a file's data, as the first one opens it: what it writes is
    /// counted afterwards, so a writer's file is the daemon's where room is scarce.
    pub fn kernel_may_move(&self, flags: i32, stat: &Stat) -> bool {
        let figures = self.room.figures();
        match figures.regime {
            Regime::Off => true,
            _ if flags & o::ACCMODE == o::RDONLY => true,
            Regime::Exact => self.by_kernel.has_reserve(),
            Regime::Ample => {
                figures.free.covers(of_whole(stat.size).plus(self.by_kernel.reserve()))
            }
        }
    }

    /// Takes room for a store of all of the file, beyond what it has; false when there is none.
    pub fn cover_whole(&self, open: &Open) -> bool {
        if self.room.is_off() {
            return true;
        }
        let Ok(stat) = fs::fstat(&open.fd) else { return false };
        let data_len = data_len(&open.fd, &stat);
        let mut state = open.state();
        let lacks = of_whole(data_len).less(state.charge_room());
        match self.room.charge(lacks) {
            Some(charge) => {
                state.keep_charge(charge);
                true
            }
            None => false,
        }
    }

    /// The same with the holes of the file: a mapping may fill them. Stops where there is none.
    pub fn cover_mapping(&self, open: &Open) -> Result<()> {
        if self.room.is_off() {
            return Ok(());
        }
        let stat = fs::fstat(&open.fd)?;
        let mut state = open.state();
        let lacks = of_whole(stat.size).less(state.charge_room());
        // Nothing is written yet, whoever asks: nobody gets it anyway.
        let charge = self.room.charge(lacks).ok_or(Stop::Miss(Want::Room(lacks)))?;
        state.keep_charge(charge);
        Ok(())
    }
}

/// The room of a store of so many bytes in a row.
pub(super) fn of_whole(len: u64) -> Room {
    charge::of_store(&[Range { at: 0, len: len.max(1) }], PATH_LEN_MAX as u64)
}

/// The room of a store of these ranges, when `more` bytes of data are in the file: holes in them take
/// none.
fn of_ranges(open: &Open, stat: &Stat, ranges: &[Range], path_len: usize, more: u64) -> Room {
    let room = charge::of_store(ranges, path_len as u64);
    let len = ranges.iter().fold(0, |sum: u64, range| sum.saturating_add(range.len));
    if len <= stat.blocks.saturating_mul(512) {
        return room; // there need be no hole in them
    }
    let entry = Room::new(charge::RANGE_LEN * ranges.len() as u64, 0);
    room.min(of_whole(data_len(&open.fd, stat).saturating_add(more)).plus(entry))
}

/// The data of a file without its holes, bytes.
pub(super) fn data_len(fd: impl AsFd, stat: &Stat) -> u64 {
    if stat.blocks.saturating_mul(512) >= stat.size {
        return stat.size;
    }
    let (mut sum, mut at) = (0, 0);
    for _ in 0..PIECES_MAX {
        let Ok(data) = fs::seek_sparse(&fd, at, false) else { return sum }; // none is left
        let Ok(hole) = fs::seek_sparse(&fd, data, true) else { return stat.size };
        sum += blocks(hole.saturating_sub(data)) + BLOCK_LEN;
        at = hole;
    }
    sum.saturating_add(stat.size.saturating_sub(at)).min(stat.size)
}

#[cfg(test)]
mod tests;
