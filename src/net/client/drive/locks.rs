//! The loop's part in locks: who is told what became of an ask.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Driver;
use crate::lento::locks::{Denied, Lock, LockAsk, LockHeld};
use crate::lento::rights::Mode;
use crate::net::client::{Handle, In};

/// What is called in the end; with `Some` only for a test, for who is in the way.
pub type LockThen = Box<dyn FnOnce(Result<Option<LockHeld>, Denied>) + Send>;

/// A continuation that is called in any case.
pub(in crate::net::client) struct LockWaiter(Option<LockThen>);

impl LockWaiter {
    fn end(mut self, how: Result<Option<LockHeld>, Denied>) {
        if let Some(then) = self.0.take() {
            then(how);
        }
    }
}

impl Drop for LockWaiter {
    fn drop(&mut self) {
        if let Some(then) = self.0.take() {
            then(Err(Denied::Away));
        }
    }
}

impl Handle {
    /// Asks for a lock, its end, or who holds it. `then` is called in any case. The result names
    /// the ask for [`Handle::cancel_lock`].
    pub fn lock(&self, ask: LockAsk, then: LockThen) -> u64 {
        // numbers begin with 1, and go up in the order in which asks of one thread come
        let number = self.0.last_lock.fetch_add(1, Ordering::Relaxed) + 1;
        self.0.tell(In::Lock(number, ask, LockWaiter(Some(then))));
        number
    }

    /// Nobody waits for that lock any more: its continuation is called soon, as interrupted
    /// unless the lock was granted meanwhile.
    pub fn cancel_lock(&self, number: u64) {
        self.0.tell(In::CancelLock(number));
    }
}

impl Driver {
    pub(super) fn on_lock(&mut self, number: u64, ask: LockAsk, then: LockWaiter, now: Instant) {
        self.locks.insert(number, then);
        let permitted = self.shared.rights.mode(ask.fid) == Mode::Write;
        self.machine.on_lock(number, ask, permitted, now);
    }

    pub(super) fn lock_ended(&mut self, number: u64, how: Result<Option<LockHeld>, Denied>) {
        if let Some(waiter) = self.locks.remove(&number) {
            waiter.end(how);
        }
    }

    pub(super) fn lock_lost(&mut self, lock: &Lock) {
        let (fid, pid) = (lock.fid, lock.held.pid);
        let what = if lock.flock { "flock" } else { "fcntl" };
        self.note_error(&format!(
            "the {what} lock of process {pid} on object {fid} was lost while the server was away: \
             its next call fails"
        ));
    }
}
