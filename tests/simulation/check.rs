//! What must hold: at every step, while time passes, and in the end (DESIGN.md, section 11).

use std::collections::{BTreeMap, BTreeSet};

use imz::kml::record::{Fid, Op, Over, ROOT, Seq};

use imz::lento::rights::Mode;

use super::{REST_AFTER_FULL, SHIP_MAX, World};
use crate::apps::{Filter, Stop, Want};
use crate::client::Client;
use crate::tree::{BLOCK_LEN, Node, Tree};

impl World {
    /// After each event.
    pub(super) fn check_step(&mut self) {
        let now = self.ctx.now;
        for client in &mut self.clients {
            let live = client.conn.is_some_and(|conn| self.server.live.contains_key(&conn));
            if !(live && client.is_online()) {
                client.healthy_since = None;
            } else if client.healthy_since.is_none() {
                client.healthy_since = Some(now);
            }
        }
        self.check_room();
        if std::mem::take(&mut self.ctx.rights_changed) {
            self.check_permits();
        }
        if std::mem::take(&mut self.server.has_told) {
            self.check_kept();
            for nth in 0..self.clients.len() {
                self.check_promises(nth);
            }
        }
    }
    /// What an author was told to be there, nobody may have an older state of and trust it.
    fn check_promises(&mut self, nth: usize) {
        let client = &self.clients[nth];
        if client.healthy_since.is_none() {
            return;
        }
        let node_no = client.cache.node;
        let old = client.cache.tree.nodes().find_map(|node| {
            let foreign = self.ctx.history.foreign(node.meta.fid, node_no);
            let trusts =
                client.cache.is_current(&node.meta) && client.cache.may(node.meta.fid, Mode::Read);
            let is_old = trusts && foreign > node.meta.stamp;
            is_old.then_some((node.meta.fid, node.meta.stamp, foreign))
        });
        if let Some((fid, has, foreign)) = old {
            self.ctx.fail(format!(
                "c{nth} trusts {fid} at {}, but its change {} is complete",
                has.0, foreign.0
            ));
        }
    }
    /// What one client may change, no other may change or read. (Of what is gone the server keeps no
    /// account; what is not there yet only its maker has.)
    fn check_permits(&mut self) {
        let live = |client: &&Client| client.is_online() && !self.stopped.contains_key(&client.no);
        let clients: Vec<&Client> = self.clients.iter().filter(live).collect();
        let fids: BTreeSet<Fid> = self.server.volume.tree.nodes().map(|n| n.meta.fid).collect();
        for (nth, a) in clients.iter().enumerate() {
            for b in &clients[nth + 1..] {
                let modes = |fid: Fid| (a.cache.acts(fid), b.cache.acts(fid));
                let clash = |fid: &&Fid| {
                    let (a, b) = modes(**fid);
                    !a.agrees(b)
                };
                if let Some(fid) = fids.iter().find(clash) {
                    let (x, y) = modes(*fid);
                    self.ctx.fail(format!(
                        "c{} may {x:?} and c{} may {y:?} of {fid} at once",
                        a.no, b.no
                    ));
                    return;
                }
            }
        }
    }
    /// What a client was told to be kept, is kept.
    pub(super) fn check_kept(&mut self) {
        for client in &self.clients {
            let node = client.cache.node;
            let Some(told) = self.server.told.get(&node).copied() else { continue };
            let volume = &self.server.volume;
            let gone = client
                .sent
                .range(..=told)
                .find(|(seq, _)| !volume.outcomes.contains_key(&(node, **seq)));
            if let Some((seq, op)) = gone {
                let what = format!("record {} of c{} ({op})", seq.0, client.no);
                self.ctx.fail(format!("{what} is acknowledged, and the server does not have it"));
                return;
            }
        }
    }
    /// Now and then: what must not take long.
    pub(super) fn check_bounds(&mut self) {
        let now = self.ctx.now;
        for nth in 0..self.clients.len() {
            if self.stopped.contains_key(&nth) {
                continue;
            }
            let client = &self.clients[nth];
            client.check_waits(&mut self.ctx);
            let trouble = self.server.full_until.max(self.server.slow_until);
            let trouble = trouble.max(self.ctx.late_until);
            let troubled =
                now < trouble + REST_AFTER_FULL + SHIP_MAX || self.server.machine.is_none();
            let healthy = client.healthy_since.is_some_and(|since| now > since + 2 * SHIP_MAX);
            if !healthy || troubled {
                continue;
            }
            let oldest = client.cache.pending.oldest_ns();
            let age_ns = oldest.map_or(0, |ns| self.ctx.now_ns(nth).saturating_sub(ns));
            if age_ns / 1000 > SHIP_MAX + self.ctx.setup.age {
                self.ctx
                    .fail(format!("c{nth} does not ship what is {} s old", age_ns / 1_000_000_000));
            }
        }
    }

    // The end.

    pub(super) fn check_end(&mut self) -> Result<(), String> {
        self.check_kept();
        if let Some(why) = self.ctx.violation.take() {
            return Err(why);
        }
        for client in &self.clients {
            let node = client.cache.node;
            let known = |seq: &Seq| self.server.volume.outcomes.contains_key(&(node, *seq));
            if let Some((seq, op)) = client.sent.iter().find(|(seq, _)| !known(seq)) {
                return Err(format!("record {} of c{node} ({op}) came to nothing", seq.0));
            }
        }
        self.check_bytes()?;
        self.check_room_end()?;
        if self.ctx.setup.strict
            && let Some(why) = self.ctx.history.not_linear()
        {
            return Err(why);
        }
        let want = listed(&self.server.volume.tree);
        for nth in 0..self.clients.len() {
            let have = self.walk(nth)?;
            let differ = |path: &&String| want.get(*path) != have.get(*path);
            let paths: BTreeSet<&String> = want.keys().chain(have.keys()).collect();
            if let Some(path) = paths.into_iter().find(differ) {
                return Err(format!(
                    "c{nth} and the server do not agree on {path:?}: {:?} and {:?}",
                    have.get(path),
                    want.get(path)
                ));
            }
        }
        Ok(())
    }
    /// Every block that was written is at the server, in the tree once or kept aside, unless its own
    /// writer wrote over it.
    fn check_bytes(&self) -> Result<(), String> {
        let mut there: BTreeSet<u64> = BTreeSet::new();
        let mut add = |bytes: &[u8]| {
            let blocks = bytes.as_chunks::<{ BLOCK_LEN as usize }>().0;
            there.extend(blocks.iter().map(|block| u64::from_le_bytes(*block)));
        };
        self.ctx.history.contents().for_each(&mut add);
        for kept in &self.server.volume.kept {
            add(kept.content.as_deref().unwrap_or_default());
        }
        for client in &self.clients {
            let lost = client.written.iter().find(|written| {
                !there.contains(&written.token)
                    && !client.cache.over.contains(&written.token)
                    && !is_over(client, written.fid, written.at, written.seq)
            });
            if let Some(written) = lost {
                return Err(format!("what c{} wrote is nowhere: {written:?}", client.no));
            }
        }
        Ok(())
    }

    /// Reads everything as an application of the client would.
    fn walk(&mut self, nth: usize) -> Result<BTreeMap<String, String>, String> {
        for _ in 0..1_000 {
            let client = &mut self.clients[nth];
            let mut seen = Vec::new();
            let mut fs =
                Filter { cache: &mut client.cache, seen: &mut seen, whole_len_max: u64::MAX };
            let mut found = BTreeMap::new();
            match look(&mut fs, ROOT, "", &mut found) {
                Ok(()) => return Ok(found),
                Err(Stop::Miss(want)) => self.fetch(nth, want)?,
                Err(e) => return Err(format!("c{nth} cannot look: {e:?}")),
            }
        }
        Err(format!("c{nth} never sees all"))
    }
    /// Lets time pass until a want is met.
    fn fetch(&mut self, nth: usize, want: Want) -> Result<(), String> {
        self.clients[nth].want_now(want, &mut self.ctx);
        let until = self.ctx.now + 30 * crate::plan::SECOND;
        while self.clients[nth].is_waiting() {
            if self.ctx.now > until || !self.one_event() {
                return Err(format!("c{nth} waits for ever"));
            }
            if let Some(why) = self.ctx.violation.take() {
                return Err(why);
            }
        }
        Ok(())
    }
}

/// Whether a later record of the client itself wrote over the block, or took the file away.
fn is_over(client: &Client, fid: Fid, at: u64, seq: Seq) -> bool {
    let end = at + BLOCK_LEN;
    client.cache.journal[seq.0 as usize..].iter().filter(|entry| entry.done).any(|entry| {
        match &entry.record.op {
            Op::Store { fid: of, ranges, size, .. } => {
                let covers = ranges.iter().any(|r| r.at <= at && r.at + r.len >= end);
                *of == fid && (covers || *size < end)
            }
            Op::Setattr { fid: of, new, .. } => *of == fid && new.size.is_some_and(|s| s < end),
            Op::Unlink { gone, .. } => gone.fid == fid,
            Op::Rename { over: Over::Replaced(gone), .. } => gone.fid == fid,
            _ => false,
        }
    })
}

fn describe(node: &Node) -> String {
    let (fid, attr) = (node.meta.fid, &node.attr);
    let (mode, nlink, mtime) = (attr.mode, attr.nlink, attr.mtime);
    if node.is_dir() {
        return format!("{fid} {mode:o} mtime {mtime:?}");
    }
    format!("{fid} {mode:o} nlink {nlink} mtime {mtime:?} {:?}", node.data)
}

fn listed(tree: &Tree) -> BTreeMap<String, String> {
    fn below(tree: &Tree, dir: Fid, path: &str, into: &mut BTreeMap<String, String>) {
        let Some(node) = tree.get(dir) else { return };
        into.insert(path.to_owned(), describe(node));
        for (name, fid) in &node.entries {
            let path = format!("{path}/{}", name.as_bytes().escape_ascii());
            below(tree, *fid, &path, into);
        }
    }
    let mut all = BTreeMap::new();
    below(tree, ROOT, "", &mut all);
    all
}

fn look(
    fs: &mut Filter<'_>,
    fid: Fid,
    path: &str,
    into: &mut BTreeMap<String, String>,
) -> Result<(), Stop> {
    let node = fs.here(fid)?;
    let mut shown = node.clone();
    if shown.meta.nlink > 0 {
        shown.attr.nlink = shown.meta.nlink;
    }
    if !node.is_dir() {
        fs.bytes_here(fid, 0, u64::MAX)?;
        into.insert(path.to_owned(), describe(&shown));
        return Ok(());
    }
    let entries = fs.dir_here(fid)?.entries.clone();
    into.insert(path.to_owned(), describe(&shown));
    for (name, below) in entries {
        let path = format!("{path}/{}", name.as_bytes().escape_ascii());
        look(fs, below, &path, into)?;
    }
    Ok(())
}
