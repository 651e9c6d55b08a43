//! The clients that a volume has met: their numbers, and how far each one's journal is in it.
//!
//! `nodes.json` in the state directory, replaced by rename after an fsync. The journal says what
//! came after it was written: each record names its origin. A number stands for one incarnation of
//! one client's journal for ever, and is never given twice.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::state::{StateError, hex, seal, unseal};
use crate::kml::record::{Fid, NODE_MAX, Seq};
use crate::sys::{boot, crash};

const FILE: &str = "nodes.json";
/// How far beyond the numbers that were given a client's claim is believed.
const CLAIM_AHEAD_MAX: u32 = 65536;

/// The file's contents.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug, Default)]
struct Table {
    /// of this file's layout
    version: u32,
    /// of the machine's last start: page caches die with it
    boot_id: String,
    /// the server's journal was read up to here
    as_of: u64,
    node_next: u32,
    nodes: Vec<Node>,
}

/// One client.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug, Default)]
pub struct Node {
    pub number: u32,
    /// hex of 128 bits
    pub incarnation: String,
    pub host: String,
    /// newest record of it that was applied; in the file: that is kept
    pub last: u64,
    /// newest record of it that stands in the journal, applied or lost with the power
    pub seen: u64,
    /// fid of a directory that it made, and of the one that stood there already
    aliases: Vec<(u64, u64)>,
}

/// All clients of a volume.
pub struct Nodes {
    path: PathBuf,
    table: Table,
    by_number: HashMap<u32, usize>,
    by_incarnation: HashMap<String, usize>,
    /// per client, what a power cut cannot take back
    kept: HashMap<u32, Seq>,
    /// the aliases of the table
    by_alias: HashMap<(u32, Fid), Fid>,
}

impl Nodes {
    /// # Errors
    /// The file cannot be read, or is of another version.
    pub fn open(dir: &Path) -> Result<Nodes, StateError> {
        let path = dir.join(FILE);
        let damaged = |what| StateError::Damaged { path: path.clone(), what };
        let table = match std::fs::read(&path) {
            Ok(bytes) => unseal::<Table>(&bytes).map_err(damaged)?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                Table { version: 1, node_next: 1, ..Table::default() }
            }
            Err(source) => return Err(StateError::Io { path, source }),
        };
        if table.version != 1 {
            return Err(damaged(format!("version {} is not known", table.version)));
        }
        let number = |(at, node): (usize, &Node)| (node.number, at);
        let incarnation = |(at, node): (usize, &Node)| (node.incarnation.clone(), at);
        Ok(Nodes {
            by_number: table.nodes.iter().enumerate().map(number).collect(),
            by_incarnation: table.nodes.iter().enumerate().map(incarnation).collect(),
            kept: HashMap::new(),
            by_alias: table
                .nodes
                .iter()
                .flat_map(|node| {
                    node.aliases.iter().map(|(a, b)| ((node.number, Fid(*a)), Fid(*b)))
                })
                .collect(),
            path,
            table,
        })
    }
    /// A table without clients, whose first number is `next`. Durable on return: yes.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn begin(dir: &Path, next: u32) -> Result<(), StateError> {
        let nodes = Nodes::open(dir)?;
        let table = Table { node_next: next.min(NODE_MAX), ..nodes.table.clone() };
        nodes.write(&table)
    }
    /// All clients, in the order in which they were met.
    pub fn all(&self) -> &[Node] {
        &self.table.nodes
    }
    /// Whether the machine has been up ever since the file was written.
    pub fn same_boot(&self) -> bool {
        !self.table.boot_id.is_empty() && self.table.boot_id.trim() == boot::id()
    }
    /// The journal was read up to here.
    pub fn as_of(&self) -> Seq {
        Seq(self.table.as_of)
    }
    /// The number of an incarnation, and how much of its journal is kept; a new one gets a number:
    /// the one it says that it has (`claimed`, 0 for none), if nobody has that, for this table may
    /// have been lost. Durable on return: yes.
    ///
    /// # Errors
    /// The file cannot be written, or there are no numbers left.
    pub fn meet(
        &mut self,
        incarnation: u128,
        claimed: u32,
        host: &str,
    ) -> Result<(u32, Seq), StateError> {
        let key = hex(incarnation);
        if let Some(at) = self.by_incarnation.get(&key) {
            let number = self.table.nodes[*at].number;
            return Ok((number, self.kept.get(&number).copied().unwrap_or_default()));
        }
        let next = self.table.node_next;
        let plausible = (1..next.saturating_add(CLAIM_AHEAD_MAX)).contains(&claimed);
        let free = plausible && !self.by_number.contains_key(&claimed);
        let number = if free { claimed } else { next };
        if number > NODE_MAX {
            let what = "all numbers of clients are given away".to_owned();
            return Err(StateError::Damaged { path: self.path.clone(), what });
        }
        let host = host.to_owned();
        let node = Node { number, incarnation: key.clone(), host, ..Node::default() };
        let mut table = self.table.clone();
        table.node_next = next.max(number + 1);
        table.nodes.push(node);
        self.write(&table)?;
        self.table = table;
        let at = self.table.nodes.len() - 1;
        self.by_number.insert(number, at);
        self.by_incarnation.insert(key, at);
        Ok((number, Seq(0)))
    }
    fn node(&self, number: u32) -> Option<&Node> {
        self.table.nodes.get(*self.by_number.get(&number)?)
    }
    fn node_mut(&mut self, number: u32) -> Option<&mut Node> {
        self.table.nodes.get_mut(*self.by_number.get(&number)?)
    }
    /// The client's host, as it said; empty when it is not known.
    pub fn host(&self, number: u32) -> &str {
        self.node(number).map_or("", |node| &node.host)
    }
    /// Newest record of the client that was applied.
    pub fn last(&self, number: u32) -> Seq {
        Seq(self.node(number).map_or(0, |node| node.last))
    }
    /// Newest record of the client that the journal names.
    pub fn seen(&self, number: u32) -> Seq {
        Seq(self.node(number).map_or(0, |node| node.seen))
    }
    /// A record of the client stands in the journal; `applied` says whether it needs not come again.
    pub fn note(&mut self, number: u32, seq: Seq, applied: bool) {
        if let Some(node) = self.node_mut(number) {
            node.seen = node.seen.max(seq.0);
            if applied {
                node.last = node.last.max(seq.0);
            }
        }
    }
    /// What the client calls `fid`, under the name that the tree has for it.
    pub fn alias(&self, number: u32, fid: Fid) -> Fid {
        self.by_alias.get(&(number, fid)).copied().unwrap_or(fid)
    }
    pub fn has_aliases(&self, number: u32) -> bool {
        self.node(number).is_some_and(|node| !node.aliases.is_empty())
    }
    /// From now on the client's `from` is `to`. Durable with the next `save`.
    pub fn add_alias(&mut self, number: u32, from: Fid, to: Fid) {
        let before = self.by_alias.insert((number, from), to);
        if let Some(node) = self.node_mut(number) {
            if before.is_some() {
                node.aliases.retain(|(known, _)| *known != from.0);
            }
            node.aliases.push((from.0, to.0));
        }
    }
    /// Where every client is, for [`Nodes::keep`] once it is durable.
    pub fn marks(&self) -> Vec<(u32, Seq)> {
        self.table.nodes.iter().map(|node| (node.number, Seq(node.last))).collect()
    }
    /// These are durable.
    pub fn keep(&mut self, marks: Vec<(u32, Seq)>) {
        for (number, seq) in marks {
            let kept = self.kept.entry(number).or_default();
            *kept = seq.max(*kept);
        }
    }
    /// Writes everything, as of this place in the server's journal, up to which all is durable
    /// and kept. Durable on return: yes.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&mut self, as_of: Seq) -> Result<(), StateError> {
        self.table.as_of = as_of.0;
        self.table.boot_id = boot::id();
        self.write(&self.table)
    }
    /// What is not kept yet does not reach the file: the journal will tell.
    fn write(&self, table: &Table) -> Result<(), StateError> {
        let mut table = table.clone();
        for node in &mut table.nodes {
            node.last = self.kept.get(&node.number).map_or(0, |seq| seq.0);
        }
        let fresh = self.path.with_extension("json.new");
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&fresh)?;
            file.write_all(&seal(&table)?)?;
            file.sync_all()?;
            crash::point("nodes-written");
            std::fs::rename(&fresh, &self.path)?;
            crash::point("nodes-named");
            self.path.parent().map_or(Ok(()), crate::sys::file::sync_dir)
        };
        write().map_err(|source| StateError::Io { path: self.path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_stands_for_one_incarnation_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let mut nodes = Nodes::open(dir.path()).unwrap();
        assert_eq!(nodes.meet(77, 0, "a").unwrap(), (1, Seq(0)));
        assert_eq!(nodes.meet(78, 0, "b").unwrap(), (2, Seq(0)));
        nodes.note(1, Seq(9), true);
        nodes.note(1, Seq(12), false);
        nodes.add_alias(1, Fid(5), Fid(6));
        assert_eq!(nodes.meet(77, 0, "a").unwrap(), (1, Seq(0)), "applied, but not durable");
        nodes.keep(nodes.marks());
        assert_eq!(nodes.meet(77, 0, "a").unwrap(), (1, Seq(9)));
        nodes.save(Seq(40)).unwrap();
        let mut nodes = Nodes::open(dir.path()).unwrap();
        assert_eq!(nodes.as_of(), Seq(40));
        assert!(nodes.same_boot());
        assert_eq!((nodes.last(1), nodes.seen(1)), (Seq(9), Seq(12)));
        assert_eq!((nodes.alias(1, Fid(5)), nodes.alias(2, Fid(5))), (Fid(6), Fid(5)));
        assert_eq!(nodes.meet(79, 0, "c").unwrap().0, 3);
        assert_eq!(nodes.meet(80, 2, "d").unwrap().0, 4, "that one is taken");
        assert_eq!(nodes.meet(81, 7, "e").unwrap().0, 7, "a number from before the table");
        assert_eq!(nodes.meet(82, NODE_MAX, "f").unwrap().0, 8);
    }
}
