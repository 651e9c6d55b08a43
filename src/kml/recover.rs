//! Reading a segment record by record, and what to make of the place where that ends.
//!
//! ```text
//!   the bytes are       acknowledged  only zeros follow   so
//!   a record            any           any                 go on
//!   a newer imz's       any           any                 Alien: refuse
//!   faulty              yes           any                 Corrupt: refuse, say where
//!   faulty              no            yes                 End
//!   faulty              no            no                  Torn: cut here
//! ```
//!
//! Acknowledged means that somebody was told that the record is durable: its seq is at most the
//! `synced` mark, or an intact record behind it says so (each carries the mark of its time). That
//! an intact record follows is no proof by itself: sectors reach the disk in any order, so a power
//! cut may leave the fifth record and not the fourth, neither of them promised.
//!
//! What is cut is zeroed. Even where a crash undoes that, nothing behind the cut can come back:
//! the next record written there has another crc, and the chain breaks.
//!
//! No file, no clock: bytes come through [`Bytes`].

use crate::kml::codec::{Entry, Fault, HEADER_LEN, Suspect, record_len_claimed};
use crate::kml::record::Seq;
use crate::kml::store::Bytes;

/// Why reading a journal stops. An end is a value, not an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// nothing but zeros from here on
    End,
    /// a record that was never acknowledged, and is not whole
    Torn(Fault),
    /// an acknowledged record is damaged
    Corrupt(Fault),
    /// a whole record that this version cannot read
    Alien(Fault),
}

/// What the bytes at a place are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Check {
    Record,
    Alien(Fault),
    Faulty(Fault),
}

/// The table above. `None`: it is a record, go on.
pub fn decide(check: Check, acknowledged: bool, zeros: bool) -> Option<Stop> {
    match (check, acknowledged, zeros) {
        (Check::Record, _, _) => None,
        (Check::Alien(why), _, _) => Some(Stop::Alien(why)),
        (Check::Faulty(why), true, _) => Some(Stop::Corrupt(why)),
        (Check::Faulty(_), false, true) => Some(Stop::End),
        (Check::Faulty(why), false, false) => Some(Stop::Torn(why)),
    }
}

/// A place in a segment: the record `seq` is due at byte `at`, chained to `chain`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Spot {
    pub at: usize,
    pub seq: Seq,
    pub chain: u32,
}

/// Reads what may be a record at `at`: no more bytes than its header claims, or there are.
pub fn look<'b>(bytes: &dyn Bytes, at: usize, buf: &'b mut Vec<u8>) -> Suspect<'b> {
    let left = bytes.size().saturating_sub(at) & !7;
    buf.resize(left.min(HEADER_LEN), 0);
    bytes.read(at, buf);
    if let Ok(len) = record_len_claimed(buf) {
        let have = buf.len();
        buf.resize(left.min(len), 0);
        bytes.read(at + have, &mut buf[have..]);
    }
    Suspect(buf)
}

/// The record at `spot`, which then moves behind it.
///
/// # Errors
/// How the reading ends here; `spot` stays.
pub fn next(
    bytes: &dyn Bytes,
    spot: &mut Spot,
    synced: Seq,
    buf: &mut Vec<u8>,
) -> Result<Entry, Stop> {
    let (check, entry) = match look(bytes, spot.at, buf).verify(spot.chain, spot.seq) {
        Err(why) => (Check::Faulty(why), None),
        Ok(verified) => match verified.decode() {
            Err(why) => (Check::Alien(why), None),
            Ok(record) => {
                let behind = Spot {
                    at: spot.at + verified.bytes().len(),
                    seq: spot.seq.next(),
                    chain: verified.crc(),
                };
                let entry = Entry { seq: spot.seq, record, outcome: verified.outcome() };
                (Check::Record, Some((entry, behind)))
            }
        },
    };
    if let Some((entry, behind)) = entry {
        *spot = behind;
        return Ok(entry);
    }
    let zeros = data_end(bytes, spot.at) == spot.at;
    let acknowledged = spot.seq <= synced || (!zeros && promised_behind(bytes, *spot, buf));
    match decide(check, acknowledged, zeros) {
        Some(stop) => Err(stop),
        // the check is not `Record`, so the table has a stop for it
        None => Err(Stop::End),
    }
}

/// Moves `spot` behind its record, without taking the record apart.
///
/// # Errors
/// What is wrong with the record.
pub fn skip(bytes: &dyn Bytes, spot: &mut Spot, buf: &mut Vec<u8>) -> Result<(), Fault> {
    let verified = look(bytes, spot.at, buf).verify(spot.chain, spot.seq)?;
    let at = spot.at + verified.bytes().len();
    *spot = Spot { at, seq: spot.seq.next(), chain: verified.crc() };
    Ok(())
}

/// Where the bytes from `at` on become nothing but zeros; a multiple of 8.
pub fn data_end(bytes: &dyn Bytes, at: usize) -> usize {
    const STEP: usize = 65536;
    let mut buf = vec![0; STEP];
    let mut end = bytes.size() & !7;
    while end > at {
        let from = end.saturating_sub(STEP).max(at);
        let part = &mut buf[..end - from];
        bytes.read(from, part);
        if let Some(last) = part.iter().rposition(|byte| *byte != 0) {
            return from + (last + 1).next_multiple_of(8);
        }
        end = from;
    }
    at
}

/// Whether an intact record behind `spot` says that `spot`'s record was durable in its time.
///
/// Where the damage ends is not known, so every multiple of 8 may be a record's start. An old
/// record behind a cut does no harm: what it says of its time stays true, for a record that was
/// once durable is never cut.
fn promised_behind(bytes: &dyn Bytes, spot: Spot, buf: &mut Vec<u8>) -> bool {
    let end = data_end(bytes, spot.at);
    let mut at = spot.at + 8;
    while at + HEADER_LEN <= end {
        let suspect = look(bytes, at, buf);
        // only what claims to be a near successor is worth a checksum
        let claims = suspect.seq_claimed().zip(suspect.chain_claimed());
        if let Some((seq, chain)) = claims.filter(|(seq, _)| *seq > spot.seq)
            && let Ok(verified) = suspect.verify(chain, seq)
        {
            if verified.synced() >= spot.seq {
                return true;
            }
            at += verified.bytes().len();
        } else {
            at += 8;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_input_has_its_decision() {
        let why = Fault::Crc;
        let both = [true, false];
        let inputs = [Check::Record, Check::Alien(why), Check::Faulty(why)]
            .into_iter()
            .flat_map(|check| both.map(|acked| (check, acked)))
            .flat_map(|(check, acked)| both.map(|zeros| (check, acked, zeros)));
        let decided: Vec<_> = inputs.map(|(c, a, z)| decide(c, a, z)).collect();
        let (alien, corrupt) = (Some(Stop::Alien(why)), Some(Stop::Corrupt(why)));
        let expected = [
            // a record: acknowledged and zeros, acknowledged, zeros, neither
            [None, None, None, None],
            [alien, alien, alien, alien],
            [corrupt, corrupt, Some(Stop::End), Some(Stop::Torn(why))],
        ];
        assert_eq!(decided, expected.concat());
    }
}
