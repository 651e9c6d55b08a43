//! Volumes that come, go, and change while they are served.
//!
//! ```text
//!   served --remove--> hole (its number is never used again)
//!   rw --begin_freeze--> recalling --all have let go--> draining --nobody owes--> ro
//!        |                    `------------- until is over: back to rw, or ro if forced
//!        `<--set_read_only--------------------------------------------------------'
//! ```
//!
//! A volume is made read-only in such a way that nothing which is done already is left behind: the
//! clients' rights to change are recalled, with which comes what they changed, before the first
//! batch is refused. What comes later (of a client that was away) is refused, and waits at the
//! client until the volume may be changed again. No I/O, no clock.

use std::collections::BTreeMap;
use std::time::Instant;

use super::locking::Locking;
use super::message::{Code, Hello};
use super::permits::Permits;
use super::promises::{ConnId, Promises};
use super::reint::{Batch, Parked};
use super::rights::{Mode, Rights};
use super::server::{Server, State, VolumeNo, Why};
use crate::kml::record::Seq;

/// Most clients that are away with changes whose volume remembers it.
const OWING_MAX: usize = 4096;

/// What holds for a volume, besides what its clients do.
#[derive(Default)]
pub(super) struct Terms {
    /// it is not served any more
    removed: bool,
    pub(super) read_only: bool,
    /// names that it had
    former: Vec<String>,
    freezing: Option<Freezing>,
    /// clients that are away, and had changes which did not come, by node
    owing: BTreeMap<u32, Owing>,
}

/// On the way to read-only.
struct Freezing {
    until: Instant,
    forced: bool,
    /// nobody may change anything any more
    let_go: bool,
}

/// A client with changes that the server does not have, or that may have some.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Owing {
    pub node: u32,
    pub host: String,
    /// records, at most; 0: how many is not known, for it was cut off while it could change things
    pub records: u64,
    pub connected: bool,
}

/// For people: one client of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Client {
    pub host: String,
    pub volume: VolumeNo,
    pub node: u32,
    pub since: Instant,
    /// batches that wait or are worked on
    pub batches: usize,
    /// records that it is known to have, and that are not in the tree; at most
    pub pending: u64,
    /// what it may do with the volume
    pub mode: Mode,
    /// and with how many objects something else
    pub apart: usize,
}

impl Terms {
    /// The client is here, and says itself what it has.
    pub(super) fn forget_owing(&mut self, node: u32) {
        self.owing.remove(&node);
    }
}

impl Server {
    /// Which volume a client means: the one of that name, or the one that its cache is of, and that
    /// had the name once.
    pub(super) fn meant_by(&self, hello: &Hello) -> Result<VolumeNo, (Code, String)> {
        let served = || self.volumes.iter().enumerate().filter(|(_, of)| !of.terms.removed);
        let only = served().count() == 1;
        let is_named = |name: &str| name == hello.volume || (hello.volume.is_empty() && only);
        let named = served().find(|(_, volume)| is_named(&volume.name));
        let fits = |id: [u8; 16]| hello.volume_id == [0; 16] || hello.volume_id == id;
        if let Some((no, _)) = named.filter(|(_, volume)| fits(volume.id)) {
            return Ok(no);
        }
        let had_it = |name: &String| *name == hello.volume;
        let renamed = served().find(|(_, volume)| {
            volume.id == hello.volume_id && volume.terms.former.iter().any(had_it)
        });
        if let Some((no, _)) = renamed {
            return Ok(no);
        }
        if let Some((_, volume)) = named {
            let what = format!("the cache is not of this {}", volume.name);
            return Err((Code::ForeignCache, what));
        }
        let names: Vec<&str> = served().map(|(_, v)| &v.name[..]).take(16).collect();
        let gone = self.volumes.iter().any(|v| v.terms.removed && v.id == hello.volume_id);
        let what = match gone {
            true => format!("the volume {:?} is not served any more", hello.volume),
            false => format!("no volume {:?}", hello.volume),
        };
        let what = match names.is_empty() {
            true => format!("{what}; none is served"),
            false => format!("{what}; there are: {}", names.join(", ")),
        };
        Err((Code::UnknownVolume, what.chars().take(512).collect()))
    }
    /// What holds for a volume, before the first client of it comes.
    pub fn set_terms(&mut self, no: VolumeNo, read_only: bool, former: &[String]) {
        let terms = &mut self.volumes[no].terms;
        (terms.read_only, terms.former) = (read_only, former.to_vec());
    }
    /// Its clients hear the new name when they next come.
    pub fn rename_volume(&mut self, no: VolumeNo, name: &str, former: &[String]) {
        let volume = &mut self.volumes[no];
        name.clone_into(&mut volume.name);
        volume.terms.former = former.to_vec();
    }
    /// Nobody is served there any more: connections are closed, the place stays empty.
    pub fn remove_volume(&mut self, no: VolumeNo, now: Instant) {
        self.volumes[no].terms.removed = true;
        self.close_all(no, Why::Removed, now);
        let promises = Promises::new(self.settings.promises_max);
        let volume = &mut self.volumes[no];
        (volume.promises, volume.permits) = (promises, Permits::default());
        (volume.locking, volume.parked) = (Locking::default(), Parked::default());
        volume.unsettled.clear();
        volume.terms.owing.clear();
        volume.terms.freezing = None;
        self.rooms.book.remove_volume(no);
    }
    /// Whether a sync is under way, whose end the owner waits for.
    pub fn is_syncing(&self, no: VolumeNo) -> bool {
        self.volumes[no].syncing.is_some()
    }
    pub fn is_read_only(&self, no: VolumeNo) -> bool {
        self.volumes[no].terms.read_only && self.volumes[no].terms.freezing.is_none()
    }
    /// At once. The clients come anew, and hear it.
    pub fn set_read_only(&mut self, no: VolumeNo, read_only: bool, now: Instant) {
        let terms = &mut self.volumes[no].terms;
        terms.freezing = None;
        terms.read_only = read_only;
        self.recall_none(no, now);
        self.close_all(no, Why::Changed, now);
    }
    /// Begins to make it read-only; [`Server::poll_freeze`] says when that is done. `forced`: at
    /// the latest then, whoever still has changes.
    pub fn begin_freeze(&mut self, no: VolumeNo, until: Instant, forced: bool, now: Instant) {
        self.volumes[no].terms.freezing = Some(Freezing { until, forced, let_go: false });
        self.recall_all(no, now);
    }
    /// Nobody may change anything any more, and nobody will be allowed to.
    pub(super) fn on_all_let_go(&mut self, no: VolumeNo) {
        let terms = &mut self.volumes[no].terms;
        if let Some(freezing) = &mut terms.freezing {
            freezing.let_go = true;
            terms.read_only = true;
        }
    }
    /// `None`: it goes on. `Err`: these clients have changes that do not come; the volume may be
    /// changed as before.
    pub fn poll_freeze(&mut self, no: VolumeNo, now: Instant) -> Option<Result<(), Vec<Owing>>> {
        let Freezing { until, forced, let_go } = *self.volumes[no].terms.freezing.as_ref()?;
        let owing = self.owing(no);
        let over = now >= until;
        let here = owing.iter().any(|owing| owing.connected);
        let away = owing.iter().any(|owing| !owing.connected);
        let coming = !let_go || here;
        if coming && !over {
            return None;
        }
        if !forced && (coming || away) {
            let terms = &mut self.volumes[no].terms;
            (terms.freezing, terms.read_only) = (None, false);
            self.recall_none(no, now);
            return Some(Err(owing));
        }
        self.set_read_only(no, true, now);
        Some(Ok(()))
    }
    /// Until when a freeze is looked at again, at the latest.
    pub fn freeze_until(&self, no: VolumeNo) -> Option<Instant> {
        self.volumes[no].terms.freezing.as_ref().map(|freezing| freezing.until)
    }
    /// Whether batches are taken: on the way to read-only those that are still due.
    pub(super) fn takes_changes(&self, no: VolumeNo) -> bool {
        let terms = &self.volumes[no].terms;
        !terms.read_only || terms.freezing.is_some()
    }
    fn close_all(&mut self, no: VolumeNo, why: Why, now: Instant) {
        let of = |(_, peer): &(&ConnId, &super::server::Peer)| {
            peer.state != State::Greeting && peer.volume == no
        };
        let conns: Vec<ConnId> = self.peers.iter().filter(of).map(|(conn, _)| *conn).collect();
        for conn in conns {
            self.close(conn, why.clone(), now);
        }
    }

    /// Records that the client is known to have, and that are not in the tree; at most, for some may
    /// have been dropped on the way.
    fn pending_of(&self, conn: ConnId) -> u64 {
        let Some(peer) = self.peers.get(&conn).filter(|peer| peer.state == State::Live) else {
            return 0;
        };
        let newest: Seq = peer.pending.max(peer.expected);
        newest.0.saturating_sub(peer.applied.0)
    }
    /// A connection ends: what its client still has, or may have, is remembered. Who says farewell
    /// has no right left, and has shipped what he had.
    pub(super) fn note_owing(&mut self, conn: ConnId) {
        let records = self.pending_of(conn);
        let Some(peer) = self.peers.get(&conn) else { return };
        let (node, host, no) = (peer.node, peer.host.clone(), peer.volume);
        let rights = self.volumes[no].permits.rights(conn);
        if records == 0 && !rights.is_some_and(Rights::any_write) {
            return;
        }
        let owing = &mut self.volumes[no].terms.owing;
        if owing.len() < OWING_MAX {
            owing.insert(node, Owing { node, host, records, connected: false });
        }
    }
    /// Clients of the volume that are known to have changes which are not here.
    pub fn owing(&self, no: VolumeNo) -> Vec<Owing> {
        let here = self.peers.iter().filter(|(_, peer)| peer.volume == no);
        let here = here.filter_map(|(conn, peer)| {
            let waits = peer.batches.iter().any(|batch: &Batch| !batch.is_applied());
            let records = self.pending_of(*conn).max(u64::from(waits));
            let (node, host) = (peer.node, peer.host.clone());
            (records > 0).then_some(Owing { node, host, records, connected: true })
        });
        here.chain(self.volumes[no].terms.owing.values().cloned()).collect()
    }
    /// Who is connected.
    pub fn clients(&self) -> Vec<Client> {
        // node 0 is the server's own process
        let live =
            self.peers.iter().filter(|(_, peer)| peer.state == State::Live && peer.node != 0);
        live.map(|(conn, peer)| {
            let (mode, apart) = self.held(peer.volume, *conn);
            Client {
                host: peer.host.clone(),
                volume: peer.volume,
                node: peer.node,
                since: peer.opened_at,
                batches: peer.batches.len(),
                pending: self.pending_of(*conn),
                mode,
                apart,
            }
        })
        .collect()
    }
}

#[cfg(test)]
mod tests;
