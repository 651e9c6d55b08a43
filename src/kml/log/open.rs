//! Opening a log: what is there, what of it holds, and a first segment where there is none.
//!
//! Only a torn tail is changed (it is cut); everything worse is refused, and left as it is.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{
    Cursors, LogError, Options, Piece, SETTLED, SYNCED, Settled, corrupt, get_in, io_error, lock,
};
use crate::kml::codec::{CursorPage, Fault, Outcome, SEGMENT_HEADER_LEN, SegmentHead};
use crate::kml::record::{NODE_MAX, Seq};
use crate::kml::recover::{self, Spot, Stop};
use crate::kml::store::{Store, segment_name};

/// The newer of the two pages. None at all is right only where there are no segments either.
pub(super) fn read_cursors(store: &dyn Store, fresh: bool) -> Result<Cursors, LogError> {
    let path = store.path("cursors");
    let pages = store.cursors().map_err(|source| io_error("read", &path, source))?;
    let damaged = |at, why| LogError::Corrupt { file: path.clone(), at, seq: Seq(0), why };
    let Some(pages) = pages else {
        let none = Cursors { page: CursorPage::default(), durable_slot: 1 };
        return if fresh { Ok(none) } else { Err(damaged(0, Fault::Short)) };
    };
    let found = match pages.map(|page| CursorPage::verify(&page)) {
        [Ok(a), Ok(b)] if a.generation < b.generation => Cursors { page: b, durable_slot: 1 },
        [Ok(page), _] => Cursors { page, durable_slot: 0 },
        [_, Ok(page)] => Cursors { page, durable_slot: 1 },
        [Err(why), Err(_)] => return Err(damaged(0, why)),
    };
    if fresh && get_in(&found.page, SYNCED) > 0 {
        // the segments that it speaks of are gone
        return Err(damaged(0, Fault::Short));
    }
    Ok(found)
}

pub(super) fn create_piece(store: &dyn Store, head: SegmentHead) -> Result<Piece, LogError> {
    let made = store.create(head.first, head.len as usize, &head.encode());
    let segment = made.map_err(|source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => LogError::NoRoom(source),
        _ => io_error("make", &store.path(&segment_name(head.first)), source),
    })?;
    let piece = Piece::new(head, segment);
    *lock(&piece.index) = Some(Vec::new());
    Ok(piece)
}

pub(super) fn first_piece(
    store: &dyn Store,
    cursors: &Cursors,
    node: u32,
    incarnation: u128,
    options: Options,
) -> Result<Arc<Piece>, LogError> {
    if node > NODE_MAX {
        return Err(LogError::Unwritable(Fault::Field("node")));
    }
    let page = cursors.page.encode().map_err(LogError::Unwritable)?;
    store
        .put_cursors(cursors.durable_slot, &page, true)
        .map_err(|source| io_error("write", &store.path("cursors"), source))?;
    let head = SegmentHead {
        node,
        incarnation,
        first: Seq(1),
        len: options.segment_len as u64,
        seed: SegmentHead::first_seed(incarnation),
    };
    create_piece(store, head).map(Arc::new)
}

pub(super) fn open_piece(store: &dyn Store, first: Seq) -> Result<Arc<Piece>, LogError> {
    let path = store.path(&segment_name(first));
    let segment = store.open(first).map_err(|source| io_error("open", &path, source))?;
    let mut header = vec![0; SEGMENT_HEADER_LEN.min(segment.size() & !3)];
    segment.read(0, &mut header);
    let head = SegmentHead::verify(&header).and_then(|head| match head {
        head if head.first != first => Err(Fault::Seq { found: head.first.0 }),
        head if head.len != segment.size() as u64 => Err(Fault::Short),
        head => Ok(head),
    });
    let head = head.map_err(|why| LogError::Corrupt { file: path, at: 0, seq: first, why })?;
    Ok(Arc::new(Piece::new(head, segment)))
}

pub(super) struct Found {
    pub(super) spot: Spot,
    pub(super) synced: u64,
    /// up to here nobody asks for outcomes
    pub(super) outcomes: u64,
    pub(super) settled: Settled,
}

/// Reads what was not both durable and settled, cuts a torn tail, and refuses anything worse.
pub(super) fn recover_pieces(
    store: &dyn Store,
    pieces: &[Arc<Piece>],
    page: &CursorPage,
) -> Result<Found, LogError> {
    let newest = pieces.len() - 1;
    for (piece, behind) in pieces.iter().zip(&pieces[1..]) {
        piece.limit.store(behind.head.first.0, Ordering::Release);
        if piece.head.incarnation != behind.head.incarnation || piece.head.node != behind.head.node
        {
            return Err(corrupt(store, behind.head.first, behind.begin(), Fault::Chain));
        }
    }
    // a segment is begun only when all before it is durable
    let synced = get_in(page, SYNCED).max(pieces[newest].head.first.0 - 1);
    let known = synced.min(get_in(page, SETTLED));
    let start = pieces.partition_point(|piece| piece.head.first.0 <= known + 1).max(1) - 1;
    let outcomes = pieces[start].head.first.0 - 1;
    let mut settled = Settled { through: outcomes, ahead: VecDeque::new() };
    let mut buf = Vec::new();
    let mut spot = pieces[start].begin();
    for (nth, piece) in pieces.iter().enumerate().skip(start) {
        let begin = piece.begin();
        if spot.seq != begin.seq || spot.chain != begin.chain {
            return Err(corrupt(store, piece.head.first, begin, Fault::Chain));
        }
        spot = begin;
        *lock(&piece.index) = Some(Vec::new());
        let stop = loop {
            if spot.seq.0 >= piece.limit() {
                break Stop::End;
            }
            let here = spot;
            match recover::next(&*piece.segment, &mut spot, Seq(synced), &mut buf) {
                Err(stop) => break stop,
                Ok(entry) => {
                    piece.note(here);
                    if entry.outcome == Outcome::Intended {
                        let ahead = (entry.seq.0 - settled.through) as usize;
                        settled.ahead.resize(ahead, false);
                    } else {
                        settled.settle(entry.seq);
                    }
                }
            }
        };
        match stop {
            Stop::End => {}
            Stop::Torn(_) if nth == newest => cut(store, piece, spot)?,
            Stop::Torn(why) | Stop::Corrupt(why) | Stop::Alien(why) => {
                return Err(corrupt(store, piece.head.first, spot, why));
            }
        }
    }
    Ok(Found { spot, synced, outcomes, settled })
}

/// Zeroes what stands behind `spot`: it was never acknowledged.
fn cut(store: &dyn Store, piece: &Piece, spot: Spot) -> Result<(), LogError> {
    let end = recover::data_end(&*piece.segment, spot.at);
    piece.segment.put(spot.at, &vec![0; end - spot.at]);
    let path = store.path(&segment_name(piece.head.first));
    piece.segment.sync(spot.at, end - spot.at).map_err(|source| io_error("sync", &path, source))
}
