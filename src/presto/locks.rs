//! flock and fcntl locks: publish at unlock, validate at lock.
//!
//! Before a lock is ended, or made weaker, what was written to the file is journaled, as by fsync
//! but without a wait for the disk. With a write permit that is all: whoever locks it next has the
//! permit recalled, and with it the record. Where the permit is gone (somebody read the file, while
//! the kernel went on writing), the lock is ended when the server has the record.
//! When a lock is granted, its holder is told only after what is here is current, and for a lock to
//! write, after the file may be changed: so what it reads is what the one before it wrote.
//! Who decides about locks is lento's matter.

use std::sync::Arc;

use super::filter::{FRESH_TRIES_MAX, Filter, LockDone, Result, Stop, TRIES_MAX, as_is, done};
use crate::kml::record::{Fid, Seq};
use crate::lento::locks::{LockAsk, LockKind};
use crate::lento::rights::Mode;
use crate::sys::Errno;

impl Filter {
    /// Asks for a lock, its end, or who holds it. `then` is called exactly once, on whatever
    /// thread; the result is for [`Filter::cancel_lock`].
    ///
    /// A lock is ended in any case; if what was written under it could not be journaled, `then`
    /// hears of that.
    pub fn lock(self: &Arc<Filter>, ask: LockAsk, then: LockDone) -> u64 {
        if ask.test {
            return self.lento.lock(ask, then);
        }
        if ask.kind == LockKind::Write {
            return self.ask(ask, then);
        }
        match (self.publish(ask.fid), ask.kind) {
            (Ok(None), _) => self.ask(ask, then),
            // who waits must have a number by which the wait can be ended: so not here
            (Ok(Some(_)), LockKind::Read) if ask.wait => self.ask(ask, then),
            (Ok(Some(seq)), _) => {
                let filter = self.clone();
                // away from the server nobody else sees the lock end, either
                let go_on = move |_| {
                    filter.ask(ask, then);
                };
                self.lento.when_acked(seq, Box::new(go_on));
                0
            }
            (Err(e), LockKind::Unlock) => {
                self.lento.lock(ask, Box::new(move |how| then(how.and(Err(e)))))
            }
            (Err(e), _) => {
                then(Err(e)); // the stronger lock stays
                0
            }
        }
    }

    fn ask(self: &Arc<Filter>, ask: LockAsk, then: LockDone) -> u64 {
        if ask.kind == LockKind::Unlock {
            return self.lento.lock(ask, then);
        }
        let (filter, granted) = (self.clone(), ask.clone());
        let then: LockDone = Box::new(move |how| match how {
            Ok(_) => filter.validate(granted, then, 0),
            Err(e) => then(Err(e)),
        });
        self.lento.lock(ask, then)
    }

    /// Nobody waits for that lock any more. One that is granted at this moment stays.
    pub fn cancel_lock(&self, waiting: u64) {
        self.lento.cancel(waiting);
    }

    /// What was written to the file is in the journal on return. Durable on return: no. The result
    /// is the record that the server must have before others may lock the file; none where a
    /// permit makes them wait for it.
    fn publish(&self, fid: Fid) -> std::result::Result<Option<Seq>, Errno> {
        if let (Some(_), Some(open)) = (self.cache.written(fid), self.files.get(fid)) {
            match done(|| self.store(&open)) {
                Ok(()) => {}
                Err(Stop::Errno(e)) => return Err(e),
                Err(Stop::Miss(_)) => return Err(Errno::IO), // what is done asks for nothing
            }
        }
        // After the store: a recall in between ships it.
        if self.may(fid, Mode::Write) {
            return Ok(None);
        }
        let pending = self.cache.pending();
        Ok(pending.is_ours(fid).then(|| pending.own(fid).newest()))
    }

    /// Tells the new holder of a lock as soon as what is here is current.
    fn validate(self: Arc<Filter>, ask: LockAsk, then: LockDone, tries: u32) {
        let current = match tries {
            ..FRESH_TRIES_MAX => self.current(&ask),
            _ => as_is(|| self.current(&ask)),
        };
        let e = match current {
            Ok(()) => return then(Ok(None)),
            Err(Stop::Miss(want)) if tries < TRIES_MAX => {
                let filter = self.clone();
                let again = move |met| match met {
                    Ok(()) => filter.validate(ask, then, tries + 1),
                    Err(e) => filter.give_back(ask, then, e),
                };
                return self.lento.want(want, Box::new(again));
            }
            Err(Stop::Miss(_)) => Errno::BUSY,
            // removed meanwhile: its lock is as good as any
            Err(Stop::Errno(Errno::STALE | Errno::NOENT)) => return then(Ok(None)),
            Err(Stop::Errno(e)) => e,
        };
        self.give_back(ask, then, e);
    }

    /// A lock over what is not current is none.
    fn give_back(&self, ask: LockAsk, then: LockDone, e: Errno) {
        let ask = LockAsk { kind: LockKind::Unlock, wait: false, ..ask };
        self.lento.lock(ask, Box::new(move |_| then(Err(e))));
    }

    fn current(&self, ask: &LockAsk) -> Result<()> {
        self.here(ask.fid)?;
        match ask.kind {
            LockKind::Write if self.cache.written(ask.fid).is_some() => {
                self.permitted([ask.fid].into_iter())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
