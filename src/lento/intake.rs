//! A batch on its way in: its changes, and the contents that are still to be fetched for them.
//!
//! Small contents came with the batch. Larger ones are read from the client in pieces, a few at a
//! time. Pieces of one version of a file carry one token: when it changes, the file is begun anew;
//! after [`RESTARTS_MAX`] times a mixture is taken, for a file that never rests still gets through,
//! and the journal of the client has a later store of it by then. What was fetched outlives the
//! connection: [`Fetch::park`] gives back the point to go on from.
//! Pure: no I/O, no clock.

use crate::kml::record::{Fid, Op, Range, Record, Seq};

use super::message::RANGE_LEN_MAX;

/// How often a file that changes while it is fetched is begun anew.
pub const RESTARTS_MAX: u32 = 3;

/// The bytes of a store, and where they are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Content {
    /// the record has none
    None,
    /// of all its ranges in a row
    Inline(Vec<u8>),
    /// in the spool, each range at its place in the file; shorter if the file has become shorter
    Spooled,
    /// the client has them no more, as a later record removes the file
    Gone,
}

/// One record of a batch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    pub seq: Seq,
    pub record: Record,
    pub content: Content,
}

/// A store's name in the spool.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Key {
    pub node: u32,
    pub seq: Seq,
}

/// What is wrong with the items of a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadBatch {
    #[error("records out of order")]
    Order,
    #[error("more bytes than the record announces")]
    TooMuch,
    #[error("ranges that make no sense")]
    Ranges,
}

/// Makes a change of what a batch's item says; `None` for `data` means that it is to be fetched.
///
/// # Errors
/// [`BadBatch`] for what no honest client sends.
pub fn change(seq: Seq, record: Record, data: Option<Vec<u8>>) -> Result<Change, BadBatch> {
    let total = match &record.op {
        Op::Store { ranges, .. } => total(ranges).ok_or(BadBatch::Ranges)?,
        _ => 0,
    };
    let content = match data {
        Some(data) if data.len() as u64 > total => return Err(BadBatch::TooMuch),
        _ if total == 0 => Content::None,
        Some(data) if data.len() as u64 == total => Content::Inline(data),
        Some(_) => Content::Gone,
        None => Content::Spooled,
    };
    Ok(Change { seq, record, content })
}

/// Bytes in all ranges together; `None` when one of them begins before the end of another, or ends
/// beyond what a file can hold.
fn total(ranges: &[Range]) -> Option<u64> {
    let (mut sum, mut end) = (0u64, 0);
    for range in ranges {
        if range.at < end {
            return None;
        }
        end = range.at.checked_add(range.len).filter(|end| *end <= i64::MAX as u64)?;
        sum = sum.checked_add(range.len)?;
    }
    Some(sum)
}

/// A piece that was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// in the file
    pub at: u64,
    pub len: u32,
    /// counted over all ranges
    start: u64,
    /// pieces of an older round are passed over
    round: u32,
}

/// What an arrived piece means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arrival {
    /// keep the bytes
    Keep,
    /// the file has changed: forget everything that was kept, and these bytes too
    Restart,
    /// of no use any more
    Stale,
}

/// The fetching of one store's contents.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fetch {
    pub key: Key,
    pub fid: Fid,
    ranges: Vec<Range>,
    total: u64,
    /// asked for up to here, counted over all ranges
    asked: u64,
    open: Vec<Piece>,
    token: Option<u64>,
    round: u32,
}

impl Fetch {
    /// `None` when the change needs nothing fetched.
    pub fn of(node: u32, change: &Change) -> Option<Fetch> {
        let (Op::Store { fid, ranges, .. }, Content::Spooled) =
            (&change.record.op, &change.content)
        else {
            return None;
        };
        Some(Fetch {
            key: Key { node, seq: change.seq },
            fid: *fid,
            ranges: ranges.clone(),
            total: total(ranges)?,
            asked: 0,
            open: Vec::new(),
            token: None,
            round: 0,
        })
    }
    /// The next piece to ask for; `None` when all of it is on its way.
    pub fn ask(&mut self) -> Option<Piece> {
        let mut base = 0;
        for range in &self.ranges {
            if self.asked < base + range.len {
                let into = self.asked - base;
                let len = (range.len - into).min(u64::from(RANGE_LEN_MAX));
                let piece = Piece {
                    at: range.at + into,
                    len: len as u32,
                    start: self.asked,
                    round: self.round,
                };
                self.asked += len;
                self.open.push(piece);
                return Some(piece);
            }
            base += range.len;
        }
        None
    }
    /// A piece has come with this token.
    pub fn arrived(&mut self, piece: Piece, token: u64) -> Arrival {
        let Some(at) = self.open.iter().position(|open| *open == piece) else {
            return Arrival::Stale;
        };
        self.open.swap_remove(at);
        if self.token.is_some_and(|known| known != token) && self.round < RESTARTS_MAX {
            (self.asked, self.token) = (0, None);
            self.round += 1;
            self.open.clear();
            return Arrival::Restart;
        }
        self.token = Some(token);
        Arrival::Keep
    }
    /// Whether a piece of it was asked for, and has come if it was parked since.
    pub fn is_begun(&self) -> bool {
        self.asked > 0
    }
    pub fn is_done(&self) -> bool {
        self.asked == self.total && self.open.is_empty()
    }
    /// The same, to go on with over another connection.
    pub fn park(mut self) -> Fetch {
        if let Some(first) = self.open.iter().map(|piece| piece.start).min() {
            self.asked = first;
        }
        self.open.clear();
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kml::record::{Origin, Stamp, Time};

    const MIB: u64 = 1 << 20;

    fn store(ranges: &[(u64, u64)]) -> Record {
        let ranges = ranges.iter().map(|&(at, len)| Range { at, len }).collect();
        let (fid, base, mtime) = (Fid(7), Stamp(0), Time::default());
        let op = Op::Store { fid, base, size: 9 * MIB, mtime, ranges, old_size: 0 };
        Record { time_ns: 0, origin: Origin::default(), uid: 0, gid: 0, path: Vec::new(), op }
    }

    fn fetch() -> Fetch {
        let record = store(&[(10, 2 * MIB + 5), (8 * MIB, 3)]);
        Fetch::of(4, &change(Seq(9), record, None).unwrap()).unwrap()
    }

    fn ask_all(fetch: &mut Fetch) -> Vec<Piece> {
        std::iter::from_fn(|| fetch.ask()).collect()
    }

    #[test]
    fn pieces_cover_the_ranges() {
        let mut fetch = fetch();
        let pieces = ask_all(&mut fetch);
        let shape: Vec<(u64, u64)> = pieces.iter().map(|p| (p.at, p.len.into())).collect();
        assert_eq!(shape, [(10, MIB), (10 + MIB, MIB), (10 + 2 * MIB, 5), (8 * MIB, 3)]);
        for piece in pieces.iter().rev() {
            assert!(!fetch.is_done());
            assert_eq!(fetch.arrived(*piece, 1), Arrival::Keep);
        }
        assert!(fetch.is_done());
    }

    #[test]
    fn a_file_that_changes_is_begun_anew_but_not_for_ever() {
        let mut fetch = fetch();
        for round in 0..RESTARTS_MAX {
            let pieces = ask_all(&mut fetch);
            assert_eq!(fetch.arrived(pieces[0], u64::from(round) * 2), Arrival::Keep);
            assert_eq!(fetch.arrived(pieces[1], u64::from(round) * 2 + 1), Arrival::Restart);
            assert_eq!(fetch.arrived(pieces[2], 99), Arrival::Stale);
        }
        for (token, piece) in ask_all(&mut fetch).into_iter().enumerate() {
            assert_eq!(fetch.arrived(piece, token as u64), Arrival::Keep);
        }
        assert!(fetch.is_done());
    }

    #[test]
    fn a_parked_fetch_goes_on_where_it_was() {
        let mut fetch = fetch();
        let pieces = ask_all(&mut fetch);
        fetch.arrived(pieces[0], 1);
        fetch.arrived(pieces[2], 1);
        let mut fetch = fetch.park();
        assert_eq!(ask_all(&mut fetch).len(), 3, "from the first that had not come");
    }

    #[test]
    fn contents_are_checked_against_the_record() {
        let two = || store(&[(0, 2)]);
        let of = |record, data| change(Seq(1), record, data).map(|c| c.content);
        assert_eq!(of(two(), Some(vec![1, 2])), Ok(Content::Inline(vec![1, 2])));
        assert_eq!(of(two(), Some(vec![])), Ok(Content::Gone));
        assert_eq!(of(two(), None), Ok(Content::Spooled));
        assert_eq!(of(two(), Some(vec![0; 3])), Err(BadBatch::TooMuch));
        assert_eq!(of(store(&[]), None), Ok(Content::None));
        assert_eq!(of(store(&[(u64::MAX, 2)]), None), Err(BadBatch::Ranges));
        assert_eq!(of(store(&[(i64::MAX as u64, 1)]), None), Err(BadBatch::Ranges));
        assert_eq!(of(store(&[(0, 2), (2, 1)]), None), Ok(Content::Spooled));
        for ranges in [[(0, 3), (2, 1)], [(5, 1), (0, 1)]] {
            assert_eq!(of(store(&ranges), None), Err(BadBatch::Ranges));
        }
    }
}
