//! The model of a tree: objects by fid, entries by name, contents as a few bytes.
//!
//! It stands in for the backing file system of a cache and of a served volume alike. What imz knows
//! of an object is the real [`Meta`], but for which pieces of a file are here (`have`): granules are
//! [`GRANULE_LEN`] bytes here, so that small files have several. Cloning is cheap: objects are
//! shared until they change.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use imz::kml::record::{Attr, Change, Fid, Name, Op, Over, Place, ROOT, Range, Time};
use imz::replica::meta::Meta;
use imz::sys::Errno;

pub const BLOCK_LEN: u64 = 8;
pub const GRANULE_LEN: u64 = 16;
pub const DIR_MODE: u32 = 0o040_000;
pub const FILE_MODE: u32 = 0o100_000;
const TYPE_MASK: u32 = 0o170_000;

#[derive(Clone, Debug)]
pub struct Node {
    pub meta: Meta,
    pub attr: Attr,
    pub data: Rc<Vec<u8>>,
    /// changes whenever the data do
    pub token: u64,
    /// where granules begin that are here, of a file that is not complete
    pub have: BTreeSet<u64>,
    pub entries: BTreeMap<Name, Fid>,
    pub names: BTreeSet<(Fid, Name)>,
}

impl Node {
    pub fn new(meta: Meta, mode: u32, when: Time) -> Node {
        let nlink = if mode & TYPE_MASK == DIR_MODE { 2 } else { 0 };
        let attr = Attr { mode, nlink, atime: when, mtime: when, ..Attr::default() };
        Node {
            meta,
            attr,
            data: Rc::default(),
            token: 0,
            have: BTreeSet::new(),
            entries: BTreeMap::new(),
            names: BTreeSet::new(),
        }
    }
    pub fn is_dir(&self) -> bool {
        self.attr.mode & TYPE_MASK == DIR_MODE
    }
    /// The data, to be changed.
    pub fn data_mut(&mut self) -> &mut Vec<u8> {
        self.token += 1;
        Rc::make_mut(&mut self.data)
    }
    pub fn resize(&mut self, size: u64) {
        self.data_mut().resize(size as usize, 0);
        self.attr.size = size;
    }
    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        let end = at as usize + bytes.len();
        if self.data.len() < end {
            self.resize(end as u64);
        }
        self.data_mut()[at as usize..end].copy_from_slice(bytes);
    }
    /// Where the granules begin that are missing of `from..to`.
    pub fn missing(&self, from: u64, to: u64) -> Vec<u64> {
        let to = to.min(self.meta.base_size);
        if self.meta.complete || from >= to {
            return Vec::new();
        }
        let first = from / GRANULE_LEN * GRANULE_LEN;
        let starts = (first..to).step_by(GRANULE_LEN as usize);
        starts.filter(|at| !self.have.contains(at)).collect()
    }
    /// Nothing of it is here.
    pub fn make_stub(&mut self) {
        self.meta.complete = self.attr.size == 0;
        self.meta.base_size = self.attr.size;
        self.have.clear();
    }
    /// As `Meta::truncated`: what lay beyond is not the server's any more.
    pub fn cut_base(&mut self, size: u64) {
        if !self.meta.complete && size < self.meta.base_size {
            self.meta.base_size = size;
            self.have.retain(|at| *at < size);
            self.meta.complete = self.missing(0, size).is_empty();
        }
    }
}

#[derive(Clone, Debug, Default)]
pub struct Tree(BTreeMap<Fid, Rc<Node>>);

pub type Result<T> = std::result::Result<T, Errno>;

impl Tree {
    /// With a root.
    pub fn new(root: Meta) -> Tree {
        let mut tree = Tree::default();
        tree.put(Node::new(root, DIR_MODE | 0o755, Time::default()));
        tree
    }
    pub fn put(&mut self, node: Node) {
        self.0.insert(node.meta.fid, Rc::new(node));
    }
    pub fn get(&self, fid: Fid) -> Option<&Node> {
        self.0.get(&fid).map(|node| &**node)
    }
    pub fn edit(&mut self, fid: Fid) -> Option<&mut Node> {
        self.0.get_mut(&fid).map(Rc::make_mut)
    }
    pub fn remove(&mut self, fid: Fid) {
        self.0.remove(&fid);
    }
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.0.values().map(|node| &**node)
    }
    pub fn at(&self, dir: Fid, name: &Name) -> Option<Fid> {
        self.get(dir)?.entries.get(name).copied()
    }
    /// Gives an object a name that is free.
    pub fn name(&mut self, dir: Fid, name: &Name, fid: Fid) {
        if let Some(dir) = self.edit(dir) {
            dir.entries.insert(name.clone(), fid);
        }
        if let Some(node) = self.edit(fid) {
            node.names.insert((dir, name.clone()));
            if !node.is_dir() {
                node.attr.nlink = node.names.len() as u32;
            }
        }
    }
    /// Takes a name away; the object stays, perhaps without any.
    pub fn unname(&mut self, dir: Fid, name: &Name) -> Option<Fid> {
        let fid = self.edit(dir)?.entries.remove(name)?;
        if let Some(node) = self.edit(fid) {
            node.names.remove(&(dir, name.clone()));
            if !node.is_dir() {
                node.attr.nlink = node.names.len() as u32;
            }
        }
        Some(fid)
    }
    pub fn touch(&mut self, dir: Fid, when: Time) {
        if let Some(dir) = self.edit(dir) {
            dir.attr.mtime = when;
        }
    }
    /// Whether `fid` is `of`, or stands below it.
    pub fn is_below(&self, fid: Fid, of: Fid) -> bool {
        let (mut todo, mut seen) = (vec![fid], BTreeSet::new());
        while let Some(at) = todo.pop() {
            if at == of {
                return true;
            }
            if seen.insert(at) {
                todo.extend(self.get(at).into_iter().flat_map(|n| n.names.iter().map(|n| n.0)));
            }
        }
        false
    }

    fn dir(&self, fid: Fid) -> Result<&Node> {
        let node = self.get(fid).ok_or(Errno::NOENT)?;
        if node.is_dir() { Ok(node) } else { Err(Errno::NOTDIR) }
    }
    fn free(&self, at: &Place) -> Result<()> {
        if self.dir(at.dir)?.entries.contains_key(&at.name) { Err(Errno::EXIST) } else { Ok(()) }
    }

    /// Does what a record says, but for the contents of a store. `meta`: of an object that is made.
    /// What loses its last name stays, for its owner to drop.
    pub fn perform(&mut self, op: &Op, when: Time, meta: &Meta) -> Result<()> {
        match op {
            Op::Create { at, mode, umask, .. } => {
                self.make(at, FILE_MODE | mode & !umask, meta, when)
            }
            Op::Mkdir { at, mode, umask, .. } => {
                self.make(at, DIR_MODE | mode & !umask, meta, when)
            }
            Op::Link { at, fid, .. } => {
                self.free(at)?;
                let node = self.get(*fid).ok_or(Errno::NOENT)?;
                if node.is_dir() {
                    return Err(Errno::PERM);
                }
                self.name(at.dir, &at.name, *fid);
                self.touch(at.dir, when);
                Ok(())
            }
            Op::Rename { from, to, fid, over, .. } => self.rename((from, to), *fid, over, when),
            Op::Unlink { at, .. } => {
                let fid = self.at(at.dir, &at.name).ok_or(Errno::NOENT)?;
                if self.get(fid).is_some_and(Node::is_dir) {
                    return Err(Errno::ISDIR);
                }
                self.unname(at.dir, &at.name);
                self.touch(at.dir, when);
                Ok(())
            }
            Op::Rmdir { at, .. } => {
                let fid = self.at(at.dir, &at.name).ok_or(Errno::NOENT)?;
                if !self.dir(fid)?.entries.is_empty() {
                    return Err(Errno::NOTEMPTY);
                }
                self.unname(at.dir, &at.name);
                self.touch(at.dir, when);
                Ok(())
            }
            Op::Setattr { fid, new, .. } => {
                let node = self.edit(*fid).ok_or(Errno::NOENT)?;
                set(node, new);
                Ok(())
            }
            _ => Ok(()),
        }
    }
    fn make(&mut self, at: &Place, mode: u32, meta: &Meta, when: Time) -> Result<()> {
        self.free(at)?;
        self.put(Node::new(meta.clone(), mode, when));
        self.name(at.dir, &at.name, meta.fid);
        self.touch(at.dir, when);
        Ok(())
    }
    fn rename(
        &mut self,
        (from, to): (&Place, &Place),
        fid: Fid,
        over: &Over,
        when: Time,
    ) -> Result<()> {
        if self.at(from.dir, &from.name) != Some(fid) {
            return Err(Errno::NOENT);
        }
        self.dir(to.dir)?;
        let is_dir = self.get(fid).is_some_and(Node::is_dir);
        if is_dir && self.is_below(to.dir, fid) {
            return Err(Errno::INVAL);
        }
        let there = self.at(to.dir, &to.name);
        if there == Some(fid) {
            return Ok(()); // two names of one object: both stay
        }
        match (over, there) {
            (Over::Nothing { .. }, Some(_)) => return Err(Errno::EXIST),
            (Over::Exchanged { .. }, None) => return Err(Errno::NOENT),
            (Over::Exchanged { .. }, Some(other)) => {
                if self.get(other).is_some_and(Node::is_dir) && self.is_below(from.dir, other) {
                    return Err(Errno::INVAL);
                }
                self.unname(to.dir, &to.name);
                self.unname(from.dir, &from.name);
                self.name(from.dir, &from.name, other);
            }
            (Over::Replaced(_), Some(other)) => {
                let other = self.get(other).ok_or(Errno::NOENT)?;
                match (is_dir, other.is_dir()) {
                    (false, true) => return Err(Errno::ISDIR),
                    (true, false) => return Err(Errno::NOTDIR),
                    (true, true) if !other.entries.is_empty() => return Err(Errno::NOTEMPTY),
                    _ => {}
                }
                self.unname(to.dir, &to.name);
                self.unname(from.dir, &from.name);
            }
            (_, None) => {
                self.unname(from.dir, &from.name);
            }
        }
        self.name(to.dir, &to.name, fid);
        self.touch(from.dir, when);
        self.touch(to.dir, when);
        Ok(())
    }
}

pub fn set(node: &mut Node, new: &Change) {
    let attr = &mut node.attr;
    if let Some(mode) = new.mode {
        attr.mode = attr.mode & TYPE_MASK | mode;
    }
    attr.uid = new.uid.unwrap_or(attr.uid);
    attr.gid = new.gid.unwrap_or(attr.gid);
    attr.atime = new.atime.unwrap_or(attr.atime);
    if let Some(size) = new.size {
        node.cut_base(size);
        node.resize(size);
    }
    node.attr.mtime = new.mtime.unwrap_or(node.attr.mtime);
}

/// Writes the bytes of ranges, which stand in a row.
pub fn write_ranges(node: &mut Node, ranges: &[Range], mut bytes: &[u8]) {
    for range in ranges {
        let (piece, rest) = bytes.split_at(bytes.len().min(range.len as usize));
        node.write(range.at, piece);
        bytes = rest;
    }
}

/// The path of an object, for people.
pub fn path(tree: &Tree, fid: Fid) -> String {
    let mut parts = Vec::new();
    let mut at = fid;
    while at != ROOT && parts.len() < 20 {
        let Some((dir, name)) = tree.get(at).and_then(|node| node.names.iter().next()) else {
            parts.push(format!("({at})"));
            break;
        };
        parts.push(String::from_utf8_lossy(name.as_bytes()).into_owned());
        at = *dir;
    }
    parts.reverse();
    parts.join("/")
}
