//! Requests that wait: for what is fetched, for the server's word, for a lock. And interrupts.
//!
//! Each request is answered by whoever takes its [`Ticket`] from here: its completion, or an
//! interrupt, which answers EINTR; the other one finds nothing and lets it be. One that waits for
//! a lock is only told to give up, since the lock may be granted at that moment, and whoever has
//! it must know. An interrupt may overtake its request, so those that nobody waits for are kept
//! for a while.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use super::open::held;
use crate::sys::Errno;

/// Interrupts that are kept for requests that may still come to wait.
const EARLY_MAX: usize = 64;

/// How requests come in and answers go out.
pub trait Way: Send + Sync {
    /// Sends the one answer of a request: a body, or why there is none. On any thread; `slot` is
    /// the number that came with the request.
    fn send(&self, unique: u64, slot: u32, result: Result<Vec<u8>, Errno>);
}

/// The duty to answer one request. Dropped without an answer, it fails with EIO.
pub struct Ticket {
    unique: u64,
    slot: u32,
    way: Option<Arc<dyn Way>>,
}

impl Ticket {
    pub fn new(unique: u64, slot: u32, way: Arc<dyn Way>) -> Ticket {
        Ticket { unique, slot, way: Some(way) }
    }

    pub fn unique(&self) -> u64 {
        self.unique
    }

    pub fn answer(mut self, result: Result<Vec<u8>, Errno>) {
        self.send(result);
    }

    /// For the few requests that have no answer.
    pub fn needs_none(mut self) {
        self.way = None;
    }

    fn send(&mut self, result: Result<Vec<u8>, Errno>) {
        if let Some(way) = self.way.take() {
            way.send(self.unique, self.slot, result);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.send(Err(Errno::IO));
    }
}

/// What a request waits for.
enum Waits {
    /// for something whose late coming does no harm
    Plain,
    /// for a lock; its number is known once it was asked for
    Lock { number: Option<u64>, given_up: bool },
}

/// What an interrupt leaves to do.
#[derive(PartialEq, Eq, Debug)]
pub enum Interrupted {
    /// nothing
    Done,
    /// this wait for a lock is to be cancelled
    Cancel(u64),
}

#[derive(Default)]
struct State {
    waiting: HashMap<u64, (Ticket, Waits)>,
    early: VecDeque<u64>,
}

/// The requests that wait.
#[derive(Default)]
pub struct Parked(Mutex<State>);

impl Parked {
    /// Keeps the ticket until it is taken. False: the request was interrupted, and is answered.
    pub fn park(&self, ticket: Ticket) -> bool {
        self.add(ticket, Waits::Plain)
    }

    /// The same for a request that is about to ask for a lock; [`Parked::asked`] comes next.
    pub fn park_for_lock(&self, ticket: Ticket) -> bool {
        self.add(ticket, Waits::Lock { number: None, given_up: false })
    }

    fn add(&self, ticket: Ticket, waits: Waits) -> bool {
        let mut state = held(&self.0);
        if let Some(at) = state.early.iter().position(|unique| *unique == ticket.unique) {
            state.early.remove(at);
            drop(state);
            ticket.answer(Err(Errno::INTR));
            return false;
        }
        state.waiting.insert(ticket.unique, (ticket, waits));
        true
    }

    /// The lock that the request waits for was asked for, under this number. True when the wait is
    /// to be cancelled at once.
    pub fn asked(&self, unique: u64, lock: u64) -> bool {
        match held(&self.0).waiting.get_mut(&unique) {
            Some((_, Waits::Lock { number, given_up })) => {
                *number = Some(lock);
                *given_up
            }
            _ => false, // it has ended already
        }
    }

    /// Whether the request still waits.
    pub fn has(&self, unique: u64) -> bool {
        held(&self.0).waiting.contains_key(&unique)
    }

    /// Whoever gets the ticket answers.
    pub fn take(&self, unique: u64) -> Option<Ticket> {
        held(&self.0).waiting.remove(&unique).map(|(ticket, _)| ticket)
    }

    /// The kernel does not want to wait for the request any more.
    pub fn interrupt(&self, unique: u64) -> Interrupted {
        let mut state = held(&self.0);
        match state.waiting.get_mut(&unique) {
            Some((_, Waits::Lock { number, given_up })) => {
                *given_up = true;
                number.map_or(Interrupted::Done, Interrupted::Cancel)
            }
            Some((_, Waits::Plain)) => {
                let waited = state.waiting.remove(&unique);
                drop(state);
                if let Some((ticket, _)) = waited {
                    ticket.answer(Err(Errno::INTR));
                }
                Interrupted::Done
            }
            None => {
                if state.early.len() == EARLY_MAX {
                    state.early.pop_front();
                }
                state.early.push_back(unique);
                Interrupted::Done
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Answer = (u64, Result<Vec<u8>, Errno>);

    #[derive(Default)]
    struct Told(Mutex<Vec<Answer>>);

    impl Way for Told {
        fn send(&self, unique: u64, _slot: u32, result: Result<Vec<u8>, Errno>) {
            held(&self.0).push((unique, result));
        }
    }

    fn fresh() -> (Arc<Told>, Parked, impl Fn(u64) -> Ticket) {
        let told = Arc::new(Told::default());
        let way = told.clone();
        (told, Parked::default(), move |unique| Ticket::new(unique, 0, way.clone()))
    }

    fn all(told: &Told) -> Vec<Answer> {
        std::mem::take(&mut held(&told.0))
    }

    #[test]
    fn a_request_is_answered_once() {
        let (told, parked, ticket) = fresh();
        assert!(parked.park(ticket(1)) && parked.park(ticket(2)));
        assert_eq!(parked.interrupt(1), Interrupted::Done);
        assert!(parked.take(1).is_none(), "the late completion finds nothing");
        parked.take(2).unwrap().answer(Ok(vec![7]));
        assert_eq!(parked.interrupt(2), Interrupted::Done);
        assert_eq!(all(&told), [(1, Err(Errno::INTR)), (2, Ok(vec![7]))]);
        drop(ticket(3));
        ticket(4).needs_none();
        assert_eq!(all(&told), [(3, Err(Errno::IO))], "a lost duty is an error, not a hang");
    }

    #[test]
    fn an_interrupt_may_come_first() {
        let (told, parked, ticket) = fresh();
        for unique in 0..2 * EARLY_MAX as u64 {
            parked.interrupt(unique);
        }
        assert!(parked.park(ticket(1)), "too long ago");
        assert!(!parked.park(ticket(EARLY_MAX as u64)));
        assert_eq!(all(&told), [(EARLY_MAX as u64, Err(Errno::INTR))]);
    }

    #[test]
    fn who_waits_for_a_lock_hears_of_it_from_the_lock() {
        let (told, parked, ticket) = fresh();
        assert!(parked.park_for_lock(ticket(1)));
        assert!(!parked.asked(1, 40));
        assert_eq!(parked.interrupt(1), Interrupted::Cancel(40));
        assert_eq!(all(&told), [], "the lock may have been granted just now");
        parked.take(1).unwrap().answer(Ok(vec![]));
        assert_eq!(all(&told), [(1, Ok(vec![]))]);
        // before the number is known
        assert!(parked.park_for_lock(ticket(2)));
        assert_eq!(parked.interrupt(2), Interrupted::Done);
        assert!(parked.asked(2, 41), "then whoever asked cancels");
        drop(parked);
        assert_eq!(all(&told), [(2, Err(Errno::IO))]);
    }
}
