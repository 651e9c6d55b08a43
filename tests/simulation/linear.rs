//! Whether what several clients did with one value could have happened one after another, each
//! operation at some instant between its begin and its end: linearisability of a register.
//!
//! Each value is written once, which makes it a question of intervals: a write and the reads of its
//! value are a cluster, and clusters must not interleave. The zone of a cluster runs from its first
//! end to its last begin. If it runs forward, the register surely had this value all the time; two
//! such zones must not overlap. If it runs backward, all of the cluster fits into one instant of it;
//! it must not lie wholly within a forward zone.
//! Source: Gibbons and Korach, Testing shared memories, 1997.

use std::collections::BTreeMap;

use crate::plan::Micros;

/// One operation on the value.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event<V> {
    pub begin: Micros,
    pub end: Micros,
    pub write: bool,
    pub value: V,
}

/// `first`: the value before anything was written.
pub fn is_linear<V: Ord + Clone>(events: &[Event<V>], first: &V) -> bool {
    let mut clusters: BTreeMap<&V, Vec<&Event<V>>> = BTreeMap::new();
    for event in events {
        clusters.entry(&event.value).or_default().push(event);
    }
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    for (value, cluster) in clusters {
        let write = cluster.iter().find(|event| event.write);
        if write.is_none() && value != first {
            return false; // nobody ever wrote it
        }
        if write.is_some_and(|write| cluster.iter().any(|event| event.end < write.begin)) {
            return false; // it was read before it was written
        }
        let begins = cluster.iter().map(|event| event.begin).max().unwrap_or_default();
        // the first value was there before anybody began
        let ends = match write {
            None => 0,
            Some(_) => cluster.iter().map(|event| event.end).min().unwrap_or_default(),
        };
        if ends < begins { forward.push((ends, begins)) } else { backward.push((begins, ends)) }
    }
    forward.sort_unstable();
    let apart = forward.windows(2).all(|pair| pair[0].1 <= pair[1].0);
    let within = |(from, to): &(Micros, Micros)| forward.iter().any(|f| f.0 < *from && *to < f.1);
    apart && !backward.iter().any(within)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ops(list: &[(Micros, Micros, char, u32)]) -> Vec<Event<u32>> {
        let event = |&(begin, end, kind, value): &(Micros, Micros, char, u32)| Event {
            begin,
            end,
            write: kind == 'w',
            value,
        };
        list.iter().map(event).collect()
    }

    #[test]
    fn one_after_another_is_linear() {
        let good = [(1, 2, 'w', 1), (3, 4, 'r', 1), (5, 6, 'w', 2), (7, 8, 'r', 2)];
        assert!(is_linear(&ops(&good), &0));
        assert!(is_linear(&ops(&[(1, 2, 'r', 0), (3, 4, 'w', 1), (5, 6, 'r', 1)]), &0));
    }

    #[test]
    fn what_overlaps_may_go_either_way() {
        for seen in [0, 1] {
            assert!(is_linear(&ops(&[(1, 9, 'w', 1), (2, 3, 'r', seen)]), &0), "{seen}");
        }
        let both = [(1, 9, 'w', 1), (1, 9, 'w', 2), (3, 4, 'r', 1), (5, 6, 'r', 2)];
        assert!(is_linear(&ops(&both), &0));
    }

    #[test]
    fn what_is_stale_or_goes_back_is_not() {
        let stale = [(1, 2, 'w', 1), (3, 4, 'w', 2), (5, 6, 'r', 1)];
        assert!(!is_linear(&ops(&stale), &0));
        let back = [(1, 9, 'w', 1), (1, 9, 'w', 2), (2, 3, 'r', 1), (4, 5, 'r', 2), (6, 7, 'r', 1)];
        assert!(!is_linear(&ops(&back), &0));
        assert!(!is_linear(&ops(&[(1, 2, 'w', 1), (3, 4, 'r', 0)]), &0), "the first value");
        assert!(!is_linear(&ops(&[(3, 4, 'r', 7)]), &0), "nobody wrote it");
        assert!(!is_linear(&ops(&[(1, 2, 'r', 7), (3, 4, 'w', 7)]), &0), "before it was written");
    }
}
