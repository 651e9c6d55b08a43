//! Reading a log in both directions, while it grows.

use std::sync::Arc;

use super::{Log, LogError, Piece};
use crate::kml::codec::{self, Entry, Fault, SEGMENT_HEADER_LEN, TRAILER_LEN};
use crate::kml::record::Seq;
use crate::kml::recover::{self, Spot, Stop};

/// Records in the order of their seqs; see [`Log::entries`].
pub struct Entries<'a> {
    log: &'a Log,
    piece: Option<Arc<Piece>>,
    spot: Spot,
    buf: Vec<u8>,
    failed: bool,
}

impl<'a> Entries<'a> {
    pub(super) fn new(log: &'a Log, from: Seq) -> Entries<'a> {
        let spot = Spot { at: 0, seq: from, chain: 0 };
        Entries { log, piece: None, spot, buf: Vec::new(), failed: false }
    }
    fn step(&mut self) -> Result<Entry, LogError> {
        let piece = match &self.piece {
            Some(piece) if self.spot.seq.0 < piece.limit() => piece.clone(),
            old => {
                let (piece, spot) = self.log.locate(self.spot.seq)?;
                if old.is_some() && spot.chain != self.spot.chain {
                    return Err(self.log.corrupt(&piece, spot, Fault::Chain));
                }
                self.spot = spot;
                self.piece = Some(piece.clone());
                piece
            }
        };
        let synced = self.spot.seq;
        recover::next(&*piece.segment, &mut self.spot, synced, &mut self.buf).map_err(|stop| {
            let (Stop::Torn(why) | Stop::Corrupt(why) | Stop::Alien(why)) = stop else {
                return self.log.corrupt(&piece, self.spot, Fault::Short);
            };
            self.log.corrupt(&piece, self.spot, why)
        })
    }
}

impl Iterator for Entries<'_> {
    type Item = Result<Entry, LogError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed || self.spot.seq > self.log.last() {
            return None;
        }
        let step = self.step();
        self.failed = step.is_err();
        Some(step)
    }
}

/// Records from newer to older; see [`Log::entries_back`]. It reads by the lengths at the records'
/// ends.
pub struct EntriesBack<'a> {
    log: &'a Log,
    piece: Option<Arc<Piece>>,
    /// where the record `seq` ends
    end: usize,
    seq: Seq,
    /// what the record behind says that this one's crc is
    crc: Option<u32>,
    buf: Vec<u8>,
}

impl<'a> EntriesBack<'a> {
    pub(super) fn new(log: &'a Log, seq: Seq) -> EntriesBack<'a> {
        EntriesBack { log, piece: None, end: 0, seq, crc: None, buf: Vec::new() }
    }
    fn step(&mut self) -> Result<Entry, LogError> {
        let piece = match &self.piece {
            Some(piece) if self.seq >= piece.head.first => piece.clone(),
            _ => {
                let (piece, mut spot) = self.log.locate(self.seq)?;
                let at = spot;
                recover::skip(&*piece.segment, &mut spot, &mut self.buf)
                    .map_err(|why| self.log.corrupt(&piece, at, why))?;
                self.end = spot.at;
                self.piece = Some(piece.clone());
                piece
            }
        };
        let spot = Spot { at: self.end, seq: self.seq, chain: 0 };
        self.read(&piece).map_err(|why| self.log.corrupt(&piece, spot, why))
    }
    fn read(&mut self, piece: &Piece) -> Result<Entry, Fault> {
        let mut trailer = [0; TRAILER_LEN];
        let room = self.end - SEGMENT_HEADER_LEN;
        if room < TRAILER_LEN {
            return Err(Fault::Short);
        }
        piece.segment.read(self.end - TRAILER_LEN, &mut trailer);
        let len = codec::record_len_before(&trailer)?;
        if len > room {
            return Err(Fault::TooLong);
        }
        let suspect = recover::look(&*piece.segment, self.end - len, &mut self.buf);
        let chain = suspect.chain_claimed().ok_or(Fault::Short)?;
        let verified = suspect.verify(chain, self.seq)?;
        if verified.bytes().len() != len {
            return Err(Fault::Trailer);
        }
        if self.crc.is_some_and(|crc| crc != verified.crc()) {
            return Err(Fault::Chain);
        }
        let record = verified.decode()?;
        let entry = Entry { seq: self.seq, record, outcome: verified.outcome() };
        self.end -= len;
        self.crc = Some(chain);
        self.seq = Seq(self.seq.0 - 1);
        Ok(entry)
    }
}

impl Iterator for EntriesBack<'_> {
    type Item = Result<Entry, LogError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.seq < self.log.first() || self.seq.0 == 0 {
            return None;
        }
        let step = self.step();
        if step.is_err() {
            self.seq = Seq(0);
        }
        Some(step)
    }
}
