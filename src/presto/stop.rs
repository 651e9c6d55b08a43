//! Writers whose data the kernel moves by itself: how they are counted, and stopped in time.
//!
//! ```text
//!   written   between two looks from the reserve; a look charges it, and fills the reserve again
//!   guarded   less than 3/4 of the reserve is left: the kernel is to ask before each write, and may
//!             go on while enough of it is there
//!   asking    the kernel asks before the next write to this file: nothing is written unseen
//! ```
//!
//! There is no request that stops such a writer. But before a write the kernel takes away what a
//! change of the data ends, and asks for the attribute `security.capability` unless it knows that
//! there is none; it forgets that whenever it hears the file's attributes anew. So we look at the
//! file by its path in the mount (by force, past the kernel's cache), and say yes when it asks; then
//! it has the attribute removed, and there the write waits for room, or ends with ENOSPC. Once it is
//! let go, it asks no more, until the next look. Of no use for mappings, and within one call of
//! write(2): that much the reserve must cover, and imz-space(7) says so.
//!
//! Writers that rest are made to ask as well. Then they need no reserve, and others can have it.
//! Source: file_remove_privs() in Linux (fs/inode.c), and S_NOSEC in fs/fuse.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::filter::{Filter, Result, Want};
use super::open::{Open, held};
use super::room::{data_len, of_whole};
use crate::kml::record::Fid;
use crate::lento::grant::{Charge, Regime};
use crate::lento::policy;
use crate::lento::room::Room;
use crate::sys::{fs, limit};

/// What the kernel may write before it is looked at again, at least.
const RESERVE_MIN: u64 = policy::AMPLE_LEN;
/// On a machine that writes faster: so many times what was lately seen between two looks.
const RESERVE_FACTOR: u64 = 4;
/// Less than what is asked for ahead, else no file would be the kernel's again after one late look.
const RESERVE_MAX: u64 = policy::AMPLE_LEN / 2 * 3;
const _: () = assert!(RESERVE_MAX < policy::LOW_AMPLE.bytes());
/// A write that was stopped goes on with the same, of half the reserve at most, and at least this.
const GO_ON_MIN: u64 = policy::AMPLE_LEN / 4;
/// Who has written nothing for so long rests.
const REST: Duration = Duration::from_secs(1);
/// An answer to the kernel that the attribute is there: its length.
pub const CAPABILITY_LEN: u32 = 20;

/// Files that the kernel writes to by itself.
#[derive(Default)]
pub struct ByKernel {
    state: Mutex<Kernel>,
    /// somebody may write unseen again
    begun: Condvar,
    /// the reserve has become short
    short: Condvar,
    /// more was asked for, and there is no answer yet
    asked: Arc<AtomicBool>,
}

#[derive(Default)]
struct Kernel {
    /// handles
    writers: u32,
    reserve: Option<Charge>,
    /// the reserve is short
    guarded: bool,
    /// when anything was written last; `None`: nobody can, without asking
    wrote_at: Option<Instant>,
    /// most that was written between two looks, bytes: ever, and lately, which halves with each rest
    most: u64,
    lately: u64,
}

impl Kernel {
    fn reserve_len(&self) -> u64 {
        self.lately.saturating_mul(RESERVE_FACTOR).clamp(RESERVE_MIN, RESERVE_MAX)
    }
    fn wants(&self) -> Room {
        Room::new(self.reserve_len(), 0).less(self.held())
    }
    fn saw(&mut self, written: u64) {
        (self.most, self.lately) = (self.most.max(written), self.lately.max(written));
    }
    /// Nobody can write any more without asking.
    fn rest(&mut self) {
        (self.reserve, self.wrote_at, self.guarded) = (None, None, false);
        self.lately /= 2;
    }
    fn held(&self) -> Room {
        self.reserve.as_ref().map_or(Room::NONE, Charge::room)
    }
    fn is_short(&self) -> bool {
        self.held().bytes() < self.reserve_len() / 4 * 3
    }
    /// What a write that was stopped lacks to go on: it may be the first of many, until the kernel
    /// is made to ask again.
    fn lacks(&self) -> Room {
        let many = self.lately.saturating_mul(RESERVE_FACTOR);
        let many = many.clamp(GO_ON_MIN, self.reserve_len() / 2);
        Room::new(many, 0).less(self.held())
    }
}

impl ByKernel {
    /// Waits until the kernel may write to something unseen; false: it still may not.
    pub fn wait(&self, patience: Duration) -> bool {
        let none = |kernel: &mut Kernel| kernel.wrote_at.is_none();
        let waited = self.begun.wait_timeout_while(held(&self.state), patience, none);
        waited.unwrap_or_else(|e| e.into_inner()).0.wrote_at.is_some()
    }
    /// Waits until the kernel is to be made to ask; false: it still is not.
    pub fn wait_guarded(&self, patience: Duration) -> bool {
        let calm = |kernel: &Kernel| {
            let rests = |at: Instant| at.elapsed() >= REST;
            !kernel.wrote_at.is_some_and(|at| kernel.guarded || rests(at))
        };
        let waited = self.short.wait_timeout_while(held(&self.state), patience, |it| calm(it));
        !calm(&waited.unwrap_or_else(|e| e.into_inner()).0)
    }
    pub fn is_guarded(&self) -> bool {
        held(&self.state).guarded
    }
    /// Most that was written between two looks, bytes.
    pub fn most(&self) -> u64 {
        held(&self.state).most
    }
    pub(super) fn has_reserve(&self) -> bool {
        held(&self.state).reserve.is_some()
    }
    /// What is to be kept for what is written unseen.
    pub(super) fn reserve(&self) -> Room {
        Room::new(held(&self.state).reserve_len(), 0)
    }
    fn wake(&self, kernel: &mut Kernel) {
        if kernel.wrote_at.replace(Instant::now()).is_none() {
            self.begun.notify_one();
        }
    }
}

/// Looks at files of the mount, as a program does.
pub struct Looks {
    ask: Sender<PathBuf>,
    seen: Receiver<Option<u64>>,
}

impl Looks {
    /// Starts its thread, which ends with it.
    ///
    /// # Errors
    /// As pthread_create(3).
    pub fn start() -> io::Result<Looks> {
        let ((ask, paths), (tell, seen)) = (bounded::<PathBuf>(1), bounded(1));
        std::thread::Builder::new().name("look".into()).spawn(move || {
            limit::go_first();
            if let Err(e) = limit::let_go_of_files() {
                return log::warn!("who writes past the daemon cannot be stopped: {e}");
            }
            for path in paths {
                if tell.send(fs::look_again(&path).ok()).is_err() {
                    return;
                }
            }
        })?;
        Ok(Looks { ask, seen })
    }
    /// The number of what is there. Waits as long as a program would.
    fn look(&self, path: PathBuf) -> Option<u64> {
        self.ask.send(path).ok()?;
        self.seen.recv().ok()?
    }
}

impl Filter {
    /// Whether a writer's data may go past the daemon: there is room for all of the file, and for
    /// what may be written until the next look. If so, the kernel counts as one more writer.
    pub fn kernel_may_write(&self, open: &Open) -> bool {
        let mut kernel = held(&self.by_kernel.state);
        match self.room.figures().regime {
            Regime::Off => {}
            Regime::Exact if kernel.reserve.is_none() => return false,
            Regime::Ample | Regime::Exact => {
                if !self.cover_whole(open) {
                    return false;
                }
                if kernel.reserve.is_none() {
                    kernel.reserve = self.room.charge(kernel.wants());
                }
                if kernel.reserve.is_none() {
                    return false;
                }
            }
        }
        kernel.writers += 1;
        open.state().asks = false;
        if !self.room.is_off() {
            self.by_kernel.wake(&mut kernel);
        }
        true
    }
    /// Such a writer has closed.
    pub fn kernel_wrote(&self) {
        let mut kernel = held(&self.by_kernel.state);
        kernel.writers = kernel.writers.saturating_sub(1);
        if kernel.writers == 0 {
            kernel.rest();
        }
    }

    /// Counts what the kernel wrote by itself since the last look, and asks ahead. What the grant
    /// does not cover comes from the reserve.
    pub fn look_at_kernel(&self) {
        if self.room.is_off() {
            return;
        }
        let mut written = 0;
        for open in self.files.written().into_iter().filter(|open| open.state().by_kernel()) {
            match open.is_counted() {
                true => written += self.look_at_one(&open),
                false => open.state().charge = None,
            }
        }
        let mut kernel = held(&self.by_kernel.state);
        if kernel.writers == 0 {
            return;
        }
        kernel.saw(written);
        if written > 0 {
            self.by_kernel.wake(&mut kernel);
        }
        self.fill_reserve(&mut kernel);
    }
    /// Charges what is in the file by now; how much more it is, bytes.
    fn look_at_one(&self, open: &Open) -> u64 {
        let Ok(stat) = fs::fstat(&open.fd) else { return 0 };
        let need = of_whole(data_len(&open.fd, &stat));
        let mut kernel = held(&self.by_kernel.state);
        let mut state = open.state();
        let lacks = need.less(state.charge_room());
        // after a store all of it is charged anew, which was not written just now
        let written = if state.charge.is_some() { lacks.bytes() } else { 0 };
        if lacks.is_none() {
            return 0;
        }
        let charge = self.room.charge(lacks).unwrap_or_else(|| {
            let part = kernel.reserve.as_mut().map(|reserve| reserve.take(lacks));
            let mut charge = part.unwrap_or_else(|| self.room.charge_done(Room::NONE));
            let rest = lacks.less(charge.room());
            if !rest.is_none() {
                charge.join(self.room.charge_done(rest));
            }
            charge
        });
        state.keep_charge(charge);
        written
    }
    /// The reserve is full again, and as much is free: else more is asked for.
    fn fill_reserve(&self, kernel: &mut Kernel) {
        if kernel.wrote_at.is_none() {
            return; // nobody writes without asking
        }
        let wants = kernel.wants();
        let lacks = match self.room.charge(wants) {
            Some(charge) => {
                match &mut kernel.reserve {
                    Some(reserve) => reserve.join(charge),
                    none => *none = Some(charge),
                }
                !self.room.covers(Room::new(kernel.reserve_len(), 0))
            }
            None => true,
        };
        let is_short = kernel.is_short();
        if is_short && !kernel.guarded {
            self.by_kernel.short.notify_one();
        }
        kernel.guarded = is_short;
        // once: what waits is added up
        let asked = &self.by_kernel.asked;
        if lacks && self.cache.is_online() && !asked.swap(true, Ordering::Relaxed) {
            let (more, asked) = (Room::new(kernel.reserve_len(), 0), asked.clone());
            let done = move |_| asked.store(false, Ordering::Relaxed);
            self.lento.want(Want::Room(more), Box::new(done));
        }
    }

    /// Makes the kernel ask before it writes to what it writes by itself; `mount`: where it is
    /// mounted. May wait as long as a look at a file there may.
    pub fn make_kernel_ask(&self, looks: &Looks, mount: &Path) {
        let writers = || {
            let all = self.files.written().into_iter();
            all.filter(|open| open.is_counted())
        };
        let (guarded, rests) = {
            let kernel = held(&self.by_kernel.state);
            let rests = kernel.wrote_at.is_some_and(|at| at.elapsed() >= REST);
            (kernel.guarded, rests)
        };
        for open in writers().filter(|open| guarded || !open.state().asks) {
            let path = self.cache.tree.path_by_fid(open.fid);
            let before = fs::fstat(&open.fd).map(|stat| (stat.size, stat.blocks, stat.mtime));
            let path = mount.join(std::ffi::OsStr::from_bytes(&path));
            let seen = looks.look(path) == Some(open.fid.0);
            let after = fs::fstat(&open.fd).map(|stat| (stat.size, stat.blocks, stat.mtime));
            // A hole may be filled by a mapping. A write that was let go long ago is over.
            let whole = after.is_ok_and(|(size, blocks, _)| blocks.saturating_mul(512) >= size);
            open.state().asks = seen && whole && rests && before == after;
        }
        self.look_at_kernel();
        let all_ask = writers().all(|open| open.state().asks);
        let mut kernel = held(&self.by_kernel.state);
        // whoever was let go meanwhile has set the clock anew
        let rests = kernel.wrote_at.is_some_and(|at| at.elapsed() >= REST);
        if rests && all_ask {
            kernel.rest();
        }
    }

    pub fn is_by_kernel(&self, fid: Fid) -> bool {
        self.files.get(fid).is_some_and(|open| open.state().by_kernel())
    }
    /// Whether the kernel is told that the file has a capability, so that it asks to remove it.
    pub fn stops_kernel(&self, fid: Fid) -> bool {
        let kernel = held(&self.by_kernel.state);
        let stops = kernel.guarded || kernel.wrote_at.is_none();
        drop(kernel);
        stops && !self.room.is_off() && self.is_by_kernel(fid)
    }
    /// The kernel is about to write to a file, and asks: it may when there is room.
    pub fn let_kernel_write(&self, fid: Fid) -> Result<()> {
        let Some(open) = self.files.get(fid).filter(|open| open.is_counted()) else {
            return Ok(());
        };
        if self.room.is_off() {
            return Ok(());
        }
        self.look_at_kernel();
        let lacks = held(&self.by_kernel.state).lacks();
        let more = self.charged(lacks)?;
        let mut kernel = held(&self.by_kernel.state);
        match &mut kernel.reserve {
            Some(reserve) => reserve.join(more),
            none => *none = Some(more),
        }
        open.state().asks = false;
        self.by_kernel.wake(&mut kernel);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_late_look_is_forgotten_after_some_rests() {
        let mut kernel = Kernel::default();
        assert_eq!(kernel.reserve_len(), RESERVE_MIN);
        kernel.saw(u64::MAX);
        assert_eq!(kernel.reserve_len(), RESERVE_MAX);
        assert_eq!(kernel.lacks(), Room::new(RESERVE_MAX / 2, 0));
        kernel.saw(RESERVE_MIN);
        (0..40).for_each(|_| kernel.rest());
        assert_eq!((kernel.reserve_len(), kernel.most), (RESERVE_MIN, u64::MAX));
    }

    #[test]
    fn nobody_is_woken_who_need_not_look() {
        let by_kernel = ByKernel::default();
        by_kernel.wake(&mut held(&by_kernel.state));
        assert!(by_kernel.wait(Duration::ZERO));
        assert!(!by_kernel.wait_guarded(Duration::ZERO), "it has written just now");
        held(&by_kernel.state).guarded = true;
        assert!(by_kernel.wait_guarded(Duration::ZERO));
    }
}
