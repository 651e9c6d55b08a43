//! Between the books of room in lento and the files that keep them: each put in the other's terms.

use std::sync::Arc;

use crate::kml::record::Seq;
use crate::lento::grant::{Grant, Kept};
use crate::lento::ledger::{Saved, SavedNode};
use crate::lento::message::{Code, Failed, Message};
use crate::lento::room::Room;
use crate::replica::cache::Cache;
use crate::replica::room::{Figures, FiguresFile, Line, Pair};
use crate::replica::settings::Quota;
use crate::replica::state::random;
use crate::replica::volume::Volume;

fn pair(room: Room) -> Pair {
    (room.bytes(), room.files())
}

fn room((bytes, files): Pair) -> Room {
    Room::new(bytes, files)
}

// The server's.

/// What the life before granted. A new book has an epoch that no client ever heard of.
pub fn saved(volume: &Volume) -> Saved {
    let Some(book) = volume.book() else {
        let epoch_next = (random() as u64 >> 8).max(1);
        return Saved { epoch_next, nodes: Vec::new() };
    };
    let node = |line: Line| SavedNode {
        node: line.node,
        epoch: line.epoch,
        granted: room(line.granted),
        returned: room(line.returned),
    };
    Saved { epoch_next: book.epoch_next, nodes: book.nodes.into_iter().map(node).collect() }
}

/// A volume's limit; a kind without one has no end.
pub fn limit(quota: Quota) -> Option<Room> {
    let Quota { bytes, files } = quota;
    let any = bytes.is_some() || files.is_some();
    any.then(|| Room::new(bytes.unwrap_or(u64::MAX), files.unwrap_or(u64::MAX)))
}

/// Durable on return: yes, or what the client is told instead.
pub fn save(volume: &Volume, saved: &Saved) -> Option<Message> {
    let line = |node: &SavedNode| Line {
        node: node.node,
        epoch: node.epoch,
        granted: pair(node.granted),
        returned: pair(node.returned),
    };
    let e = volume.keep_book(saved.epoch_next, saved.nodes.iter().map(line).collect()).err()?;
    log::warn!("{}: what is granted cannot be kept: {e}", volume.name());
    let what = "the server cannot keep what it grants".to_owned();
    Some(Failed { code: Code::NoSpace, what }.into())
}

/// What is free on the disk for clients, and what the volume's files take.
pub fn survey(volume: &Volume) -> (Room, Room) {
    let free = volume.free_room().unwrap_or_else(|e| {
        log::warn!("{}: how much room there is cannot be told: {e}", volume.name());
        (0, 0)
    });
    (room(free), used(volume))
}

pub fn used(volume: &Volume) -> Room {
    room(volume.usage())
}

// The client's.

/// The grant of a cache: as the last life left it, with the charges of what the journal holds.
///
/// # Errors
/// As [`crate::kml::log::Log::entries`].
pub fn grant_of(
    cache: &Cache,
    file: &FiguresFile,
    optimistic: bool,
) -> Result<Arc<Grant>, crate::kml::log::LogError> {
    let figures = file.read().unwrap_or_default();
    let kept = Kept {
        epoch: figures.epoch,
        granted: room(figures.granted),
        returned: room(figures.returned),
        upto: Seq(figures.upto),
        keep_ms: figures.keep_ms,
        heard_ns: figures.heard_ns,
    };
    let grant = Grant::new(kept, optimistic);
    for entry in cache.log.entries(cache.acked().next().max(cache.log.first())) {
        let entry = entry?;
        grant.found(entry.seq, &entry.record);
    }
    Ok(grant)
}

/// Whether the figures must be kept at once: those that are kept would give the next life what was
/// taken back, or less than half of what this one has free.
pub fn must_keep(grant: &Grant, kept: &Figures) -> bool {
    let now = figures(grant);
    let unknown = room(now.granted).less(room(kept.granted));
    now.takes_back(kept) || !grant.figures().free.part(2).covers(unknown)
}

pub fn figures(grant: &Grant) -> Figures {
    let Kept { epoch, granted, returned, upto, keep_ms, heard_ns } = grant.kept();
    let (granted, returned) = (pair(granted), pair(returned));
    Figures { epoch, granted, returned, upto: upto.0, keep_ms, heard_ns }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lento::message::RoomTerms;

    #[test]
    fn what_is_granted_on_top_has_time_while_half_is_kept() {
        let grant = Grant::new(Kept::default(), false);
        let (returned, ample, short, keep_ms) = (Room::NONE, false, false, 9);
        let hear = |len: u64| {
            let granted = Room::new(len, len);
            let terms = RoomTerms { epoch: 1, granted, returned, ample, short, keep_ms };
            grant.hear(&terms);
            terms
        };
        grant.welcome(Some(&hear(0)));
        assert!(must_keep(&grant, &Figures::default()), "another book");
        let none = figures(&grant);
        assert!(!must_keep(&grant, &none));
        hear(100);
        assert!(must_keep(&grant, &none), "a life without the server could write nothing");
        let kept = figures(&grant);
        hear(150);
        assert!(!must_keep(&grant, &kept));
        let _used = grant.charge(Room::new(80, 0));
        assert!(must_keep(&grant, &kept), "half of what is free would be lost");
        let kept = figures(&grant);
        grant.give_back_all_but(Room::new(70, 149));
        assert!(must_keep(&grant, &kept), "a file was given back");
    }
}
