//! Which record a stamp names: no stamp is ever given twice, though records may be lost.
//!
//! A record's seq is its place in the volume's journal, and a power cut, or a backup that is put
//! back, gives places to other records than before. Clients have heard of the lost ones: an object
//! is shown with its stamp before the record is durable. So the stamps of each life of a server (one
//! run of its process) are a row of numbers of their own, which no other life has:
//!
//! ```text
//!   life     records            their stamps
//!   first    1 ..= 500          1 ..= 500
//!   second   501 ..= 900        B ..= B + 399       B: ten thousandths of a second since 2020,
//!   third    901 ..             C ..                or beyond all before, if that is more
//! ```
//!
//! - A life's stamps are larger than all before it. After a power cut nobody knows how many were
//!   given: by [`UNKNOWN_MAX`] larger, which is more than can be under way at a time.
//! - After a backup was put back, the lives that it does not know have their stamps from times
//!   before now, or from beyond them: each power cut takes some two hours of stamps in advance. So a
//!   stamp that is larger than all which this history gave is no version of it, and nothing that is
//!   based on it is current (certify.rs). (A clock that was set back since then, or cuts in quick
//!   succession, cost this: such a stamp may be given once more.)
//! - A stamp that no record of this history has leads nowhere: its client is told that the history
//!   does not reach back to it, and asks for everything anew.
//! - After a power cut the new life begins with a noop that says that records are lost: whoever asks
//!   across it is told the same, for he may have seen what is not any more.
//! - The counters of a volume's own fids go on from the time as well, for the same reason.
//! - An object of the tree whose stamp lies behind what was durable at the cut gets that noop's
//!   stamp (behind.rs): it may be other than it was shown under the old one.
//!
//! The table is in `state.json`, as `[first seq, first stamp]`, durable before the life's first
//! stamp is given. Source: the terms of viewstamped replication and of raft.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use super::state;
use crate::kml::record::{FID_COUNTER_BITS, Seq, Stamp};

/// Records that may have been under way when the power went, at most: with 4,096 clients of 8
/// batches of 1,000 records it is half of that.
const UNKNOWN_MAX: u64 = 1 << 26;
/// Lives that are remembered. A stamp of an older one leads nowhere.
const LIVES_MAX: usize = 4096;
/// 2020-01-01, seconds since 1970.
const BEGINNING_S: u64 = 1_577_836_800;
/// Stamps and fids a second for which the clock has room.
const PER_SECOND: u64 = 10_000;
const FIDS_PER_SECOND: u64 = 1000;
/// Counters up to here are given by the clock, which is until 2054.
const FIDS_BY_CLOCK_MAX: u64 = (1 << FID_COUNTER_BITS) - (1 << 36);

/// (first seq, first stamp) of each life, ascending in both; empty: stamps are seqs.
pub type Table = Vec<(u64, u64)>;

/// The stamps of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lives(Table);

impl Default for Lives {
    fn default() -> Lives {
        Lives::of(&Table::new())
    }
}

impl Lives {
    pub fn of(table: &Table) -> Lives {
        Lives(if table.is_empty() { vec![(0, 0)] } else { table.clone() })
    }
    /// Those of the volume's journal in `kml`, as the state beside it says.
    pub fn beside(kml: &Path) -> Option<Lives> {
        let facts = state::read(&kml.parent()?.join(state::FILE)).ok()?;
        Some(Lives::of(&facts.lives))
    }
    pub fn table(&self) -> Table {
        self.0.clone()
    }

    /// The stamp of a record.
    pub fn stamp(&self, seq: Seq) -> Stamp {
        let nth = self.0.partition_point(|(first, _)| *first <= seq.0);
        let Some((first, base)) = nth.checked_sub(1).map(|nth| self.0[nth]) else {
            return Stamp(0); // of a life that is forgotten: older than all
        };
        Stamp(base + (seq.0 - first))
    }
    /// The record that has, or would have, this stamp; `None`: it was lost, or never was.
    pub fn seq(&self, stamp: Stamp) -> Option<Seq> {
        let nth = self.0.partition_point(|(_, base)| *base <= stamp.0).checked_sub(1)?;
        let (first, base) = self.0[nth];
        let seq = first.checked_add(stamp.0 - base)?;
        let lost = self.0.get(nth + 1).is_some_and(|(next, _)| seq >= *next);
        (!lost).then_some(Seq(seq))
    }
    /// Whether the stamp was given to a record that this history has not.
    pub fn is_lost(&self, stamp: Stamp) -> bool {
        stamp.0 >= self.0[0].1 && self.seq(stamp).is_none()
    }

    /// A new life behind the record `last`. `cut`: records behind it may have been lost. `kept`: the
    /// oldest record that there is.
    pub fn begin(&mut self, last: Seq, cut: bool, kept: Seq) {
        let beyond = if cut { UNKNOWN_MAX } else { 0 };
        let end = Stamp(self.stamp(last.next()).0.saturating_add(beyond));
        self.begin_at(last.next(), end.0.max(clock(PER_SECOND)), kept);
    }
    /// A new life behind the record `last`, whose stamps are larger than `stamp`.
    pub fn begin_beyond(&mut self, last: Seq, stamp: Stamp) {
        let end = self.stamp(last.next()).0.max(stamp.0.saturating_add(1));
        self.begin_at(last.next(), end, Seq(0));
    }
    fn begin_at(&mut self, first: Seq, base: u64, kept: Seq) {
        // a life without records, or of some that are lost, leaves nothing
        self.0.retain(|(other, _)| *other < first.0);
        self.0.push((first.0, base));
        let old = self.0.iter().skip(1).take_while(|(next, _)| *next <= kept.0).count();
        self.0.drain(..old.max(self.0.len().saturating_sub(LIVES_MAX)));
    }
}

/// The first counter of a new life's fids, which is at least `next`.
pub fn fid_next(next: u64) -> u64 {
    let now = clock(FIDS_PER_SECOND);
    // when the numbers come to their end, none is given for safety's sake
    if now < FIDS_BY_CLOCK_MAX { next.max(now) } else { next }
}

/// So many a second since 2020.
fn clock(per_second: u64) -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let ms = (since.as_millis() as u64).saturating_sub(BEGINNING_S * 1000);
    (ms / 8).saturating_mul(per_second / 125)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_are_seqs_in_the_first_life() {
        let lives = Lives::of(&Table::new());
        assert_eq!(lives.stamp(Seq(77)), Stamp(77));
        assert_eq!(lives.seq(Stamp(77)), Some(Seq(77)));
    }

    #[test]
    fn no_stamp_is_given_twice() {
        let mut lives = Lives::of(&Table::new());
        lives.begin(Seq(500), false, Seq(1));
        let second = lives.clone();
        let (b, given) = (lives.stamp(Seq(501)), lives.stamp(Seq(900)));
        assert!(b > Stamp(500) && given == Stamp(b.0 + 399));
        assert_eq!(lives.seq(Stamp(500)), Some(Seq(500)));
        assert_eq!(lives.seq(Stamp(501)), None, "501 has another stamp");
        assert_eq!(lives.seq(given), Some(Seq(900)));
        // all behind 700 is lost
        lives.begin(Seq(700), true, Seq(1));
        assert_eq!(lives.seq(given), None, "the record that it named is lost");
        assert!(lives.is_lost(given) && !lives.is_lost(Stamp(b.0 + 199)));
        assert_eq!(lives.seq(Stamp(b.0 + 199)), Some(Seq(700)));
        assert!(lives.stamp(Seq(701)).0 > given.0 + (1 << 20));
        assert_eq!(lives.seq(lives.stamp(Seq(701))), Some(Seq(701)));
        // the same with all of the second life's records
        lives = second;
        lives.begin(Seq(500), true, Seq(1));
        assert!(lives.stamp(Seq(501)) > given);
        assert_eq!(lives.seq(given), None);
        assert_eq!(lives.table().len(), 2);
        // a backup of the first life that is put back: its next one knows nothing of the second
        std::thread::sleep(std::time::Duration::from_millis(50));
        let mut restored = Lives::of(&Table::new());
        restored.begin(Seq(480), false, Seq(1));
        assert!(restored.stamp(Seq(481)) > given);
        assert_eq!((restored.seq(given), restored.seq(Stamp(490))), (None, None));
    }

    #[test]
    fn a_clock_that_was_set_back_and_a_stamp_of_unknown_origin_do_no_harm() {
        let future = 1 << 50;
        let mut lives = Lives::of(&vec![(0, 0), (10, future)]);
        lives.begin(Seq(20), false, Seq(1));
        assert_eq!(lives.stamp(Seq(21)), Stamp(future + 11));
        lives.begin_beyond(Seq(20), Stamp(future + 5000));
        assert_eq!(lives.stamp(Seq(21)), Stamp(future + 5001));
        assert_eq!(lives.seq(Stamp(u64::MAX)).map(|seq| seq > Seq(20)), Some(true));
    }

    #[test]
    fn what_the_journal_has_no_more_is_forgotten() {
        let mut lives = Lives::of(&Table::new());
        for n in 1..=3 {
            lives.begin(Seq(n * 100), false, Seq(1));
        }
        lives.begin(Seq(400), false, Seq(250));
        assert_eq!(lives.table().iter().map(|life| life.0).collect::<Vec<_>>(), [201, 301, 401]);
        assert_eq!(lives.seq(Stamp(7)), None);
        assert!(!lives.is_lost(Stamp(7)), "only too old");
        assert_eq!(lives.stamp(Seq(7)), Stamp(0));
        for n in 0..5000 {
            lives.begin(Seq(1000 + n), false, Seq(250));
        }
        assert_eq!(lives.table().len(), LIVES_MAX);
    }
}
