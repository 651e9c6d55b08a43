//! The loop's part in rights: what is let go, what is not to be trusted, what the kernel forgets.

use std::time::Instant;

use super::Driver;
use crate::kml::record::Fid;
use crate::lento::rights::Mode;
use crate::net::client::In;
use crate::replica::hydrate::{self, Notice};
use crate::replica::pending::LetGo;

impl Driver {
    pub(super) fn mark_stale(&mut self, break_id: Option<u64>, fids: &[Fid]) {
        self.shared.rights.edit(|rights| {
            for fid in fids {
                rights.broken(*fid);
            }
        });
        let notices = self.mark(fids);
        match break_id {
            None => self.notify(notices, Box::new(|| ())),
            Some(id) => {
                let (shared, generation) = (self.shared.clone(), self.generation);
                let done = move || shared.tell(In::BreakDone { generation, id });
                self.notify(notices, Box::new(done));
            }
        }
    }

    /// Others changed these while they could not be read here.
    pub(super) fn catch_up(&mut self, mut fids: Vec<Fid>) {
        let rights = &self.shared.rights;
        rights.edit(|rights| fids.retain(|fid| rights.mode(*fid) == Mode::None));
        self.mark(&fids);
    }

    /// These were given. What was let go while they were asked for is to be fetched again.
    pub(super) fn raise(&mut self, fids: &[Fid], mode: Mode) {
        let none = |fid: &Fid| self.shared.rights.mode(*fid) == Mode::None;
        let unknown: Vec<Fid> = fids.iter().copied().filter(none).collect();
        self.mark(&unknown); // the kernel has forgotten them when they were let go
        self.shared.rights.edit(|rights| {
            fids.iter().for_each(|fid| rights.set(*fid, rights.mode(*fid).max(mode)));
        });
    }

    /// Notes that these are old, and says what the kernel must forget.
    fn mark(&mut self, fids: &[Fid]) -> Vec<Notice> {
        let (notices, marked) = hydrate::mark_stale(&self.cache, fids);
        if let Err(e) = marked {
            self.note_error(&format!("a broken promise cannot be noted: {e}"));
            // Then everything counts as old: nothing stale may pass for fresh.
            self.bump_epoch();
        }
        notices
    }

    /// Others need what we may do. What we have changed of it is shipped; what we have not changed
    /// can be read on, if that is all they want.
    pub(super) fn lower(&mut self, recall_id: u64, fids: &[Fid], mode: Mode, now: Instant) {
        self.shared.rights.edit(|rights| match fids {
            [] => rights.lower_volume(mode),
            _ => fids.iter().for_each(|fid| rights.set(*fid, rights.mode(*fid).min(mode))),
        });
        // Whoever works by the old rights has journaled it when this returns.
        self.cache.tree.barrier();
        self.cache.save_written(fids);
        self.look_at = Some(now);
        self.look_at_journal(now);
        let last = self.cache.log.last();
        let let_go = self.cache.pending().let_go(fids, last, mode == Mode::Read);
        let LetGo { upto, kept, gone } = let_go;
        self.shared.rights.edit(|rights| gone.iter().for_each(|fid| rights.set(*fid, Mode::None)));
        self.machine.on_lowered(recall_id, upto, kept, now);
        let (shared, generation) = (self.shared.clone(), self.generation);
        let done = Box::new(move || shared.tell(In::Told { generation, recall_id }));
        if fids.is_empty() && mode == Mode::None {
            return self.forget_all(done);
        }
        let notices = self.mark(&gone);
        self.notify(notices, done);
    }

    /// The kernel forgets everything: what is here has to be asked for.
    pub(super) fn forget_all(&mut self, done: Box<dyn FnOnce() + Send>) {
        self.cache.news.ring();
        let given = self.cache.take_given().into_iter();
        let object = |fid| Notice::Object { fid, dir: false };
        self.notify(given.map(object).chain([Notice::All]).collect(), done);
    }

    pub(super) fn bump_epoch(&mut self) {
        if let Err(e) = self.cache.bump_epoch() {
            self.note_error(&e.to_string());
        }
        self.notify(vec![Notice::All], Box::new(|| ()));
    }
}
