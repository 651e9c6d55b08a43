//! Who was promised to be told before an object changes. Pure: no I/O, no clock.
//!
//! A promise is made with every object that is given out, and ends when its break is sent, or with
//! the connection. Two kinds of holders are not kept by object: a client that came back and trusts
//! its whole cache (`blanket`: it hears of every first break, and of the second one where it came
//! back between the two), and one that holds more than
//! [`PROMISES_MAX`] (`all`: it hears of every break, so the memory for a client is bounded).
//! The first promise for an object costs 30 to 60 bytes, each further one four; what an operation
//! costs grows with the logarithm of the holders, but for the copy of their row.
//! Source: the callbacks of AFS.

use std::collections::{BTreeMap, HashMap};

use crate::kml::record::Fid;

/// Most promises that are kept one by one for a client.
pub const PROMISES_MAX: usize = 1 << 20;

/// A connection's number; never used twice in a process, and never zero: that is nobody.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ConnId(pub u32);

/// Which of the two breaks of a change this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Round {
    /// before the change is applied: everybody who may hold the objects
    Before,
    /// after it: those who fetched the objects in between, or came back when so many blankets had
    /// been given ([`Promises::blankets`])
    After { since: u64 },
}

/// Almost always one client holds an object: no allocation for it.
#[derive(Debug)]
enum Holders {
    One(ConnId),
    /// ascending
    Many(Box<[ConnId]>),
}

impl Holders {
    fn as_slice(&self) -> &[ConnId] {
        match self {
            Holders::One(conn) => std::slice::from_ref(conn),
            Holders::Many(conns) => conns,
        }
    }
    fn contains(&self, conn: ConnId) -> bool {
        self.as_slice().binary_search(&conn).is_ok()
    }
    /// Nothing changes if it is one of them.
    fn add(&mut self, conn: ConnId) -> bool {
        let Err(at) = self.as_slice().binary_search(&conn) else { return false };
        let (before, after) = self.as_slice().split_at(at);
        *self = Holders::Many([before, &[conn], after].concat().into());
        true
    }
    /// Those who are left, if it was one of them.
    fn without(&self, conn: ConnId) -> Option<Option<Holders>> {
        let at = self.as_slice().binary_search(&conn).ok()?;
        let (before, after) = (&self.as_slice()[..at], &self.as_slice()[at + 1..]);
        Some(match (before, after) {
            ([], []) => None,
            ([one], []) | ([], [one]) => Some(Holders::One(*one)),
            _ => Some(Holders::Many([before, after].concat().into())),
        })
    }
}

#[derive(Default, Debug)]
struct Holder {
    count: usize,
    /// the how manieth it was
    blanket: Option<u64>,
    all: bool,
}

/// The promises of one volume.
#[derive(Debug)]
pub struct Promises {
    objects: HashMap<Fid, Holders>,
    holders: BTreeMap<ConnId, Holder>,
    /// blankets that were given so far
    blankets: u64,
    count_max: usize,
}

impl Promises {
    /// `count_max`: promises kept one by one for each client.
    pub fn new(count_max: usize) -> Promises {
        Promises { objects: HashMap::new(), holders: BTreeMap::new(), blankets: 0, count_max }
    }
    /// The client was given the object.
    pub fn give(&mut self, conn: ConnId, fid: Fid) {
        let holder = self.holders.entry(conn).or_default();
        if holder.all {
            return;
        }
        match self.objects.get_mut(&fid) {
            None => {
                self.objects.insert(fid, Holders::One(conn));
            }
            Some(holders) => {
                if !holders.add(conn) {
                    return;
                }
            }
        }
        holder.count += 1;
        if holder.count > self.count_max {
            *holder = Holder { count: 0, blanket: None, all: true };
            self.drop_objects(conn);
        }
    }
    /// The client trusts everything in its cache from now on.
    pub fn give_blanket(&mut self, conn: ConnId) {
        self.blankets += 1;
        self.holders.entry(conn).or_default().blanket = Some(self.blankets);
    }
    /// How many blankets were given so far: what the second break of a change asks for.
    pub fn blankets(&self) -> u64 {
        self.blankets
    }
    /// Ends the promises for these objects, but for the author of their change, and says who must
    /// be told of which.
    pub fn take(
        &mut self,
        fids: &[Fid],
        author: ConnId,
        round: Round,
    ) -> BTreeMap<ConnId, Vec<Fid>> {
        let mut out: BTreeMap<ConnId, Vec<Fid>> = BTreeMap::new();
        let mut every: Vec<ConnId> = Vec::new();
        // ascending, as they are
        for (conn, holder) in &self.holders {
            let hears = match (holder.blanket, round) {
                _ if holder.all => true,
                (Some(_), Round::Before) => true,
                // it asked what had changed before this had, and after others were told
                (Some(given), Round::After { since }) => given > since,
                (None, _) => false,
            };
            if hears && *conn != author {
                every.push(*conn);
            }
        }
        for fid in fids {
            for conn in &every {
                out.entry(*conn).or_default().push(*fid);
            }
            let Some(holders) = self.objects.remove(fid) else { continue };
            for conn in holders.as_slice().iter().filter(|conn| **conn != author) {
                if let Some(holder) = self.holders.get_mut(conn) {
                    holder.count -= 1;
                }
                if every.binary_search(conn).is_err() {
                    out.entry(*conn).or_default().push(*fid);
                }
            }
            if holders.contains(author) {
                self.objects.insert(*fid, Holders::One(author));
            }
        }
        out
    }
    /// Whether the client was promised to be told of this object.
    pub fn holds(&self, conn: ConnId, fid: Fid) -> bool {
        self.objects.get(&fid).is_some_and(|holders| holders.contains(conn))
    }
    /// Whether the client holds any promise at all.
    pub fn is_holder(&self, conn: ConnId) -> bool {
        self.holders.get(&conn).is_some_and(|h| h.count > 0 || h.blanket.is_some() || h.all)
    }
    /// Whether it holds so many that it hears of every change.
    pub fn is_all(&self, conn: ConnId) -> bool {
        self.holders.get(&conn).is_some_and(|holder| holder.all)
    }
    /// Ends one promise.
    pub fn drop_one(&mut self, conn: ConnId, fid: Fid) {
        let Some(rest) = self.objects.get(&fid).and_then(|holders| holders.without(conn)) else {
            return;
        };
        match rest {
            Some(rest) => self.objects.insert(fid, rest),
            None => self.objects.remove(&fid),
        };
        if let Some(holder) = self.holders.get_mut(&conn) {
            holder.count -= 1;
        }
    }
    /// The client is gone, and its promises with it.
    pub fn forget(&mut self, conn: ConnId) {
        if self.holders.remove(&conn).is_some_and(|holder| holder.count > 0) {
            self.drop_objects(conn);
        }
    }
    /// Objects that somebody holds a promise for, one by one.
    pub fn len(&self) -> usize {
        self.objects.len()
    }
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    fn drop_objects(&mut self, conn: ConnId) {
        self.objects.retain(|_, holders| match holders.without(conn) {
            Some(Some(rest)) => {
                *holders = rest;
                true
            }
            Some(None) => false,
            None => true,
        });
        self.objects.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ConnId = ConnId(1);
    const B: ConnId = ConnId(2);
    const C: ConnId = ConnId(3);

    fn promises() -> Promises {
        let mut p = Promises::new(100);
        for (conn, fid) in [(A, 10), (B, 10), (B, 11), (C, 12)] {
            p.give(conn, Fid(fid));
        }
        p
    }

    fn list(of: &BTreeMap<ConnId, Vec<Fid>>) -> Vec<(ConnId, Vec<u64>)> {
        of.iter().map(|(c, f)| (*c, f.iter().map(|f| f.0).collect())).collect()
    }

    #[test]
    fn a_break_goes_to_the_holders_and_not_to_the_author() {
        let mut p = promises();
        let out = p.take(&[Fid(10), Fid(11), Fid(99)], A, Round::Before);
        assert_eq!(list(&out), [(B, vec![10, 11])]);
        let again = p.take(&[Fid(10), Fid(11)], C, Round::Before);
        assert_eq!(list(&again), [(A, vec![10])], "the author's own promise stays");
    }

    #[test]
    fn a_client_that_fetched_in_between_is_told_again() {
        let mut p = promises();
        p.take(&[Fid(10)], A, Round::Before);
        assert!(p.take(&[Fid(10)], A, Round::After { since: 1 }).is_empty());
        p.give(B, Fid(10));
        assert_eq!(list(&p.take(&[Fid(10)], A, Round::After { since: 1 })), [(B, vec![10])]);
    }

    #[test]
    fn a_blanket_client_hears_of_everything_once() {
        let mut p = promises();
        p.give_blanket(C);
        let out = p.take(&[Fid(7), Fid(12)], A, Round::Before);
        assert_eq!(list(&out), [(C, vec![7, 12])]);
        assert!(p.take(&[Fid(7), Fid(12)], A, Round::After { since: 1 }).is_empty());
        assert!(p.take(&[Fid(7)], C, Round::Before).is_empty(), "its own change");
    }

    #[test]
    fn a_client_that_comes_back_between_the_breaks_hears_of_the_second() {
        let mut p = promises();
        p.give_blanket(C);
        let since = p.blankets();
        p.take(&[Fid(7)], A, Round::Before);
        p.give_blanket(B);
        assert_eq!(list(&p.take(&[Fid(7)], A, Round::After { since })), [(B, vec![7])]);
    }

    #[test]
    fn too_many_promises_become_one_for_all() {
        let mut p = promises();
        for fid in 100..=201 {
            p.give(A, Fid(fid));
        }
        assert_eq!(p.len(), 3, "only those of B and C are kept one by one");
        assert_eq!(list(&p.take(&[Fid(5)], B, Round::Before)), [(A, vec![5])]);
        assert_eq!(list(&p.take(&[Fid(5)], B, Round::After { since: 1 })), [(A, vec![5])]);
    }

    #[test]
    fn promises_end_with_the_connection() {
        let mut p = promises();
        p.forget(B);
        assert_eq!(list(&p.take(&[Fid(10), Fid(11)], C, Round::Before)), [(A, vec![10])]);
        p.forget(A);
        p.forget(C);
        assert!(p.is_empty());
    }

    #[test]
    fn many_hold_one_object_in_any_order() {
        let mut p = Promises::new(100);
        for conn in [5, 1, 9, 3, 7, 5] {
            p.give(ConnId(conn), Fid(10));
        }
        for conn in 0..=10 {
            assert_eq!(p.holds(ConnId(conn), Fid(10)), conn % 2 == 1, "{conn}");
        }
        for conn in [9, 2, 5, 9] {
            p.drop_one(ConnId(conn), Fid(10));
        }
        let told: Vec<u32> = list(&p.take(&[Fid(10)], ConnId(3), Round::Before))
            .iter()
            .map(|(conn, _)| conn.0)
            .collect();
        assert_eq!(told, [1, 7]);
        assert!(!p.is_holder(ConnId(7)) && p.is_holder(ConnId(3)));
        p.drop_one(ConnId(3), Fid(10));
        assert!(p.is_empty() && !p.is_holder(ConnId(3)));
    }

    #[test]
    fn the_memory_for_a_promise_is_small() {
        assert!(size_of::<(Fid, Holders)>() <= 24);
    }
}
