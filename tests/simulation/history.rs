//! What an observer who sees everything knows: each value that the server ever had, who wrote it,
//! and since when its writer knows that it is there. Reads are held against it.

use std::collections::BTreeMap;
use std::rc::Rc;

use imz::kml::record::{Fid, Name, Op, Record, Seq, Stamp};

use crate::linear::{Event, is_linear};
use crate::plan::Micros;
use crate::tree::Tree;

/// What is read and written as one.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Key {
    Data(Fid),
    Name(Fid, Name),
    Mode(Fid),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Value {
    Bytes(Rc<Vec<u8>>),
    /// what a name stands for
    Object(Option<Fid>),
    Mode(u32),
}

#[derive(Clone, Debug)]
struct Version {
    stamp: Stamp,
    node: u32,
    value: Value,
    /// since when the writer knows
    known_at: Option<Micros>,
}

/// What somebody read.
#[derive(Clone, Debug)]
pub struct Seen {
    pub key: Key,
    pub value: Value,
    /// of data: which part of it
    pub range: (u64, u64),
}

/// A change whose writer does not know yet that it is there.
struct Waiting {
    seq: Seq,
    stamp: Stamp,
    keys: Vec<Key>,
    fids: Vec<Fid>,
}

#[derive(Default)]
pub struct History {
    versions: BTreeMap<Key, Vec<Version>>,
    waiting: BTreeMap<u32, Vec<Waiting>>,
    /// per object and node, the newest change that its writer knows of
    known: BTreeMap<Fid, BTreeMap<u32, Stamp>>,
    /// what was done with blocks of files, by offset, in strict mode
    blocks: BTreeMap<(Fid, u64), Vec<Event<u64>>>,
}

/// The values that a change touches.
fn keys(op: &Op) -> Vec<Key> {
    let names = op.places().into_iter().flatten();
    let mut keys: Vec<Key> = names.map(|at| Key::Name(at.dir, at.name.clone())).collect();
    match op {
        Op::Create { fid, .. } => keys.extend([Key::Data(*fid), Key::Mode(*fid)]),
        Op::Mkdir { fid, .. } => keys.push(Key::Mode(*fid)),
        Op::Store { fid, .. } => keys.push(Key::Data(*fid)),
        Op::Setattr { fid, new, .. } => {
            keys.extend(new.size.map(|_| Key::Data(*fid)));
            keys.extend(new.mode.map(|_| Key::Mode(*fid)));
        }
        _ => {}
    }
    keys
}

fn value_of(tree: &Tree, key: &Key) -> Option<Value> {
    Some(match key {
        Key::Data(fid) => Value::Bytes(tree.get(*fid)?.data.clone()),
        Key::Name(dir, name) => Value::Object(tree.at(*dir, name)),
        Key::Mode(fid) => Value::Mode(tree.get(*fid)?.attr.mode & 0o7777),
    })
}

impl History {
    /// What is there before anything happens.
    pub fn begin(&mut self, tree: &Tree) {
        for node in tree.nodes() {
            for (dir, name) in &node.names {
                let value = Value::Object(Some(node.meta.fid));
                let version = Version { stamp: Stamp(0), node: 0, value, known_at: Some(0) };
                self.versions.insert(Key::Name(*dir, name.clone()), vec![version]);
            }
        }
    }
    /// Somebody read or wrote a block.
    pub fn did(&mut self, block: (Fid, u64), event: Event<u64>) {
        self.blocks.entry(block).or_default().push(event);
    }
    /// A block whose readers did not see every write that was complete, and what was done with it.
    pub fn not_linear(&self) -> Option<String> {
        let bad = |(_, events): &(&_, &Vec<Event<u64>>)| !is_linear(events, &0);
        let ((fid, at), events) = self.blocks.iter().find(bad)?;
        Some(format!("what was read of {fid} at {at} is no order of what was written: {events:#?}"))
    }
    /// All contents that files ever had.
    pub fn contents(&self) -> impl Iterator<Item = &[u8]> {
        self.versions.values().flatten().filter_map(|version| match &version.value {
            Value::Bytes(bytes) => Some(&bytes[..]),
            _ => None,
        })
    }
    /// The server's tree has changed.
    pub fn applied(&mut self, record: &Record, stamp: Stamp, tree: &Tree) {
        let (node, keys) = (record.origin.node, keys(&record.op));
        for key in &keys {
            let Some(value) = value_of(tree, key) else { continue };
            let version = Version { stamp, node, value, known_at: None };
            self.versions.entry(key.clone()).or_default().push(version);
        }
        let fids = record.op.touched().collect();
        let waiting = Waiting { seq: record.origin.seq, stamp, keys, fids };
        self.waiting.entry(node).or_default().push(waiting);
    }
    /// The node hears that its changes up to here are kept.
    pub fn known(&mut self, node: u32, upto: Seq, now: Micros) {
        let Some(waiting) = self.waiting.get_mut(&node) else { return };
        for change in waiting.extract_if(.., |change| change.seq <= upto) {
            let Waiting { stamp, keys, fids, .. } = change;
            for key in keys {
                let versions = self.versions.entry(key).or_default();
                if let Some(version) = versions.iter_mut().find(|v| v.stamp == stamp) {
                    version.known_at = Some(now);
                }
            }
            for fid in fids {
                let newest = self.known.entry(fid).or_default().entry(node).or_default();
                *newest = stamp.max(*newest);
            }
        }
    }
    /// The server lost these.
    pub fn lost(&mut self, stamps: &[Stamp]) {
        let is_lost = |stamp: &Stamp| stamps.contains(stamp);
        for versions in self.versions.values_mut() {
            versions.retain(|v| !is_lost(&v.stamp));
        }
        for waiting in self.waiting.values_mut() {
            waiting.retain(|change| !is_lost(&change.stamp));
        }
    }
    /// What a new life has of contents that were in doubt, behind `kept`: perhaps none that ever was.
    pub fn recovered(&mut self, tree: &Tree, kept: Stamp) {
        for file in tree.nodes().filter(|node| !node.is_dir() && node.meta.data > kept) {
            let (key, value) = (Key::Data(file.meta.fid), Value::Bytes(file.data.clone()));
            let version = Version { stamp: file.meta.data, node: 0, value, known_at: None };
            self.versions.entry(key).or_default().push(version);
        }
    }
    /// The newest change of the object by another node that its writer knows of.
    pub fn foreign(&self, fid: Fid, node: u32) -> Stamp {
        let known = self.known.get(&fid).into_iter().flatten();
        known.filter(|(by, _)| **by != node).map(|(_, stamp)| *stamp).max().unwrap_or_default()
    }
    /// Whether somebody who began to look at `start` may have seen this: nothing that is older than
    /// what was known by then.
    pub fn allows(&self, seen: &Seen, start: Micros) -> Result<(), String> {
        let none = Vec::new();
        let versions = self.versions.get(&seen.key).unwrap_or(&none);
        let from = versions.iter().rposition(|v| v.known_at.is_some_and(|at| at <= start));
        let allowed = &versions[from.unwrap_or(0)..];
        // Before the first change a name stands for nothing.
        let first = from.is_none() && seen.value == Value::Object(None);
        if first || allowed.iter().any(|v| is_same(&v.value, seen)) {
            return Ok(());
        }
        let list: Vec<String> = versions
            .iter()
            .map(|v| format!("{:?} of {} by {} known {:?}", v.value, v.stamp.0, v.node, v.known_at))
            .collect();
        Err(format!("{:?} was seen as {:?}, of {list:#?}", seen.key, seen.value))
    }
}

fn is_same(value: &Value, seen: &Seen) -> bool {
    let (Value::Bytes(have), Value::Bytes(read)) = (value, &seen.value) else {
        return *value == seen.value;
    };
    let len = have.len() as u64;
    let (from, to) = (seen.range.0.min(len), seen.range.1.min(len));
    have[from as usize..to as usize] == read[..]
}
