//! The applications, and what presto's filter does for them: one operation is tried, stops where
//! something is missing, and is tried again when that was fetched.

use imz::kml::record::{Change, Fid, Gone, Name, Op as Change_, Over, Place, ROOT, Seq, Time};
use imz::lento::rights::{self, Mode};
use imz::replica::meta::Meta;
use imz::sys::Errno;

use crate::cache::Cache;
use crate::history::{Key, Seen, Value};
use crate::plan::{Micros, Op, Setup};
use crate::tree::{BLOCK_LEN, Node, set};

/// After so many fetches an operation takes what is here; after more it is given up.
const FRESH_TRIES_MAX: u32 = 32;
const TRIES_MAX: u32 = 64;

/// What must be fetched.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Want {
    Dir(Fid),
    Object(Fid),
    /// from, to
    Bytes(Fid, u64, u64),
    /// these are to be changed
    Permit(Vec<Fid>),
    /// so much is to be written
    Room(imz::lento::room::Room),
}

#[derive(Debug)]
pub enum Stop {
    Errno(Errno),
    Miss(Want),
    /// it goes on after a while
    Rest(Micros),
    /// it goes on when the server has everything up to here
    Acked(Seq),
}

impl From<Errno> for Stop {
    fn from(e: Errno) -> Stop {
        Stop::Errno(e)
    }
}

/// A block that was written, and the record that announced it.
#[derive(Clone, Debug)]
pub struct Written {
    pub token: u64,
    pub fid: Fid,
    pub at: u64,
    pub seq: Seq,
}

/// One operation under way.
#[derive(Debug)]
pub struct Run {
    pub op: Op,
    pub began_at: Micros,
    /// how far it is: 0 looks, then as each operation counts
    stage: u32,
    tries: u32,
    fid: Fid,
    wrote: Vec<(u64, u64)>,
    /// own records before it wrote
    last: Seq,
    seen: Vec<Seen>,
}

/// How a try ended.
pub enum Turn {
    Done { how: Result<(), Errno>, seen: Vec<Seen>, written: Vec<Written> },
    Want(Want),
    Rest(Micros),
    Acked(Seq),
}

type Result_<T> = Result<T, Stop>;

impl Run {
    pub fn new(op: Op, began_at: Micros) -> Run {
        let (wrote, seen) = (Vec::new(), Vec::new());
        Run { op, began_at, stage: 0, tries: 0, fid: ROOT, wrote, last: Seq(0), seen }
    }
    /// The file that it holds open for writing.
    pub fn holds(&self) -> bool {
        self.stage > 0 && matches!(self.op, Op::Write { .. })
    }

    /// What it wrote to a file: where, and what.
    pub fn wrote(&self) -> (Fid, &[(u64, u64)]) {
        (self.fid, &self.wrote)
    }

    /// Tries the operation. `tokens`: gives a number that was never given before.
    pub fn go(
        &mut self,
        cache: &mut Cache,
        setup: &Setup,
        tokens: &mut dyn FnMut() -> u64,
    ) -> Turn {
        self.seen.clear();
        cache.as_is = self.tries >= FRESH_TRIES_MAX;
        let stop = self.attempt(cache, setup, tokens);
        cache.as_is = false;
        if self.tries >= FRESH_TRIES_MAX {
            self.seen.clear(); // what is taken as it is, may be old
        }
        let how = match stop {
            Ok(()) => Ok(()),
            Err(Stop::Errno(e)) => Err(e),
            Err(Stop::Miss(_)) if self.tries >= TRIES_MAX => Err(Errno::BUSY),
            Err(Stop::Miss(want)) => {
                self.tries += 1;
                return Turn::Want(want);
            }
            Err(Stop::Rest(time)) => return Turn::Rest(time),
            Err(Stop::Acked(seq)) => return Turn::Acked(seq),
        };
        self.end(cache, how)
    }
    /// It ends, perhaps before its time.
    pub fn end(&mut self, cache: &mut Cache, how: Result<(), Errno>) -> Turn {
        let mut written = Vec::new();
        if self.holds() {
            cache.end_writing(self.fid);
            // by now, or when others needed it
            let seq = cache.pending.made(self.fid).data;
            if seq > self.last {
                // another operation may have written over it before it was stored
                let data = cache.tree.get(self.fid).map(|file| file.data.clone());
                let data = data.unwrap_or_default();
                let is_stored = |(at, token): &&(u64, u64)| {
                    let end = (at + BLOCK_LEN) as usize;
                    data.get(*at as usize..end) == Some(&token.to_le_bytes())
                };
                let stored = self.wrote.iter().filter(is_stored);
                let of = |&(at, token)| Written { token, fid: self.fid, at, seq };
                written = stored.map(of).collect();
            }
        }
        Turn::Done { how, seen: std::mem::take(&mut self.seen), written }
    }

    fn attempt(
        &mut self,
        cache: &mut Cache,
        setup: &Setup,
        tokens: &mut dyn FnMut() -> u64,
    ) -> Result_<()> {
        let op = self.op.clone();
        let mut fs = Filter { cache, seen: &mut self.seen, whole_len_max: setup.whole_len_max };
        match &op {
            Op::Create { path, blocks } => {
                fs.cache.room.charge_new().map_err(|room| Stop::Miss(Want::Room(room)))?;
                let fid = fs.create(path, false)?;
                fs.cache.room.charged_new(fid);
                fs.cache.begin_writing(fid);
                self.fid = fid;
                for block in 0..*blocks {
                    let token = tokens();
                    fs.cache.wrote(fid, block * BLOCK_LEN, &token.to_le_bytes());
                    self.wrote.push((block * BLOCK_LEN, token));
                }
                fs.cache.end_writing(fid);
                Ok(())
            }
            Op::Write { path, at, blocks, truncate, hold } => {
                if self.stage == 0 {
                    self.fid = fs.open(path, *truncate)?;
                    fs.permitted([self.fid].into_iter())?;
                    fs.cache.begin_writing(self.fid);
                    (self.stage, self.last) = (1, fs.cache.last());
                    if *hold > 0 {
                        return Err(Stop::Rest(hold / 2));
                    }
                }
                if self.stage == 1 {
                    if setup.strict {
                        fs.permitted([self.fid].into_iter())?;
                        fs.here(self.fid)?;
                    }
                    let (from, to) = (at * BLOCK_LEN, (at + blocks) * BLOCK_LEN);
                    fs.bytes_here(self.fid, from, to)?;
                    let charged = fs.cache.room.charge_write(self.fid);
                    charged.map_err(|room| Stop::Miss(Want::Room(room)))?;
                    for block in *at..at + blocks {
                        let token = tokens();
                        fs.cache.wrote(self.fid, block * BLOCK_LEN, &token.to_le_bytes());
                        self.wrote.push((block * BLOCK_LEN, token));
                    }
                    self.stage = 2;
                    if *hold > 0 {
                        return Err(Stop::Rest(hold / 2));
                    }
                }
                // the close: others may have needed it meanwhile
                fs.permitted([self.fid].into_iter())
            }
            Op::Read { path, block } => {
                let fid = fs.open(path, false)?;
                let (from, to) = match block {
                    Some(at) => (at * BLOCK_LEN, (at + 1) * BLOCK_LEN),
                    None => (0, u64::MAX),
                };
                fs.bytes_here(fid, from, to)?;
                fs.note_data(fid, from, to);
                Ok(())
            }
            Op::Rename { from, to, exchange } => fs.rename(from, to, *exchange),
            Op::Unlink(path) => fs.unlink(path),
            Op::Mkdir(path) => fs.create(path, true).map(drop),
            Op::Rmdir(path) => fs.rmdir(path),
            Op::Link { old, new } => fs.link(old, new),
            Op::Chmod(path, mode) => {
                fs.setattr(path, Change { mode: Some(*mode), ..Change::default() })
            }
            Op::Truncate(path, blocks) => {
                let (size, mtime) = (Some(blocks * BLOCK_LEN), Some(fs.cache.now()));
                fs.setattr(path, Change { size, mtime, ..Change::default() })
            }
            Op::Touch(path, sec) => {
                let mtime = Some(Time { sec: *sec, nsec: 0 });
                fs.setattr(path, Change { mtime, ..Change::default() })
            }
            Op::Readdir(path) => {
                let dir = fs.resolve(path)?;
                fs.dir_here(dir)?;
                fs.note_names(dir);
                Ok(())
            }
            Op::Stat(path) => {
                let fid = fs.resolve(path)?;
                fs.here(fid)?;
                fs.note_mode(fid);
                Ok(())
            }
            Op::Fsync(path) => {
                let fid = fs.resolve(path)?;
                fs.cache.store(fid);
                fs.cache.synced = fs.cache.journal.len();
                for entry in &mut fs.cache.journal {
                    entry.solid |= entry.record.op.fid() == Some(fid);
                }
                Ok(())
            }
            Op::Sync if self.stage == 0 => {
                self.stage = 1;
                Err(Stop::Acked(fs.cache.last()))
            }
            Op::Sync => Ok(()),
        }
    }
}

/// The filter, for one try of one operation.
pub struct Filter<'a> {
    pub cache: &'a mut Cache,
    pub seen: &'a mut Vec<Seen>,
    pub whole_len_max: u64,
}

fn name(text: &str) -> Result_<Name> {
    Ok(Name::new(text.as_bytes()).map_err(|_| Errno::INVAL)?)
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

impl Filter<'_> {
    fn node(&self, fid: Fid) -> Result_<&Node> {
        Ok(self.cache.tree.get(fid).ok_or(Errno::STALE)?)
    }
    /// The directory, with all its entries here.
    pub fn dir_here(&self, fid: Fid) -> Result_<&Node> {
        let dir = self.node(fid)?;
        if !dir.is_dir() {
            return Err(Errno::NOTDIR.into());
        }
        let whole = dir.meta.complete && self.cache.is_valid(&dir.meta);
        if whole { Ok(dir) } else { Err(Stop::Miss(Want::Dir(fid))) }
    }
    /// The object, with attributes that are current.
    pub fn here(&self, fid: Fid) -> Result_<&Node> {
        let node = self.node(fid)?;
        if node.names.is_empty() && fid != ROOT || self.cache.is_valid(&node.meta) {
            return Ok(node);
        }
        Err(Stop::Miss(if node.is_dir() { Want::Dir(fid) } else { Want::Object(fid) }))
    }
    /// What stands at `name`; `None` when nothing does.
    fn lookup(&mut self, dir: Fid, name: &Name) -> Result_<Option<Fid>> {
        let found = self.dir_here(dir)?.entries.get(name).copied();
        self.note_name(dir, name, found);
        if let Some(fid) = found {
            self.here(fid)?;
        }
        Ok(found)
    }
    pub fn resolve(&mut self, path: &str) -> Result_<Fid> {
        let mut at = ROOT;
        for part in path.split('/').filter(|part| !part.is_empty()) {
            at = self.lookup(at, &name(part)?)?.ok_or(Errno::NOENT)?;
        }
        Ok(at)
    }
    fn parent(&mut self, path: &str) -> Result_<(Fid, Name)> {
        let (dir, last) = split(path);
        let dir = self.resolve(dir)?;
        self.dir_here(dir)?;
        Ok((dir, name(last)?))
    }
    fn place(&self, dir: Fid, name: &Name) -> Result_<Place> {
        Ok(Place { dir, base: self.node(dir)?.meta.stamp, name: name.clone() })
    }

    // What was seen, for the observer. What is our own and not at the server yet is no news.

    fn note_name(&mut self, dir: Fid, name: &Name, found: Option<Fid>) {
        // a directory that was made here is not at the server yet
        let about = |op: &Change_| {
            let at = op.places().into_iter().flatten().any(|at| at.dir == dir && at.name == *name);
            at || op.fid() == Some(dir)
        };
        let ours = self.cache.has_own(about)
            // it stays until the server has what only we have of it
            || found.is_some_and(|fid| self.cache.is_needed(fid, self.cache.heard));
        if !ours {
            let key = Key::Name(dir, name.clone());
            self.seen.push(Seen { key, value: Value::Object(found), range: (0, 0) });
        }
    }
    fn note_names(&mut self, dir: Fid) {
        let entries = self.node(dir).map(|node| node.entries.clone()).unwrap_or_default();
        for (name, fid) in entries {
            self.note_name(dir, &name, Some(fid));
        }
    }
    fn is_ours(&self, fid: Fid) -> bool {
        let about = |op: &Change_| op.fid() == Some(fid) || op.other() == Some(fid);
        self.cache.has_own(about) || self.cache.writers.contains_key(&fid)
    }
    fn note_mode(&mut self, fid: Fid) {
        if let Some(node) = self.cache.tree.get(fid)
            && fid.node() != 0
            && !self.is_ours(fid)
        {
            let value = Value::Mode(node.attr.mode & 0o7777);
            self.seen.push(Seen { key: Key::Mode(fid), value, range: (0, 0) });
        }
    }
    fn note_data(&mut self, fid: Fid, from: u64, to: u64) {
        if let Some(node) = self.cache.tree.get(fid)
            && !self.is_ours(fid)
        {
            let size = node.data.len() as u64;
            let bytes = node.data[from.min(size) as usize..to.min(size) as usize].to_vec();
            let (key, range) = (Key::Data(fid), (from, to));
            self.seen.push(Seen { key, value: Value::Bytes(bytes.into()), range });
        }
    }

    // Operations.

    pub fn bytes_here(&self, fid: Fid, from: u64, to: u64) -> Result_<()> {
        let missing = self.node(fid)?.missing(from, to);
        if missing.is_empty() { Ok(()) } else { Err(Stop::Miss(Want::Bytes(fid, from, to))) }
    }
    pub fn open(&mut self, path: &str, truncate: bool) -> Result_<Fid> {
        let fid = self.resolve(path)?;
        if self.here(fid)?.is_dir() {
            return Err(Errno::ISDIR.into());
        }
        if truncate {
            let (size, mtime) = (Some(0), Some(self.cache.now()));
            self.setattr_of(fid, Change { size, mtime, ..Change::default() })?;
        }
        let file = self.here(fid)?;
        if file.attr.size <= self.whole_len_max && !self.cache.is_unsaved(fid) {
            self.bytes_here(fid, 0, u64::MAX)?;
        }
        Ok(fid)
    }
    fn create(&mut self, path: &str, dir: bool) -> Result_<Fid> {
        let (parent, name) = self.parent(path)?;
        if self.lookup(parent, &name)?.is_some() {
            return Err(Errno::EXIST.into());
        }
        let at = self.place(parent, &name)?;
        let meta = self.cache.new_meta();
        let (fid, umask) = (meta.fid, 0);
        let op = match dir {
            true => Change_::Mkdir { at, fid, mode: 0o755, umask },
            false => Change_::Create { at, fid, mode: 0o644, umask },
        };
        self.change(op, &meta)?;
        Ok(fid)
    }
    /// Stops with a miss where one of the objects may not be changed.
    fn permitted(&self, fids: impl Iterator<Item = Fid>) -> Result_<()> {
        let fids: Vec<Fid> = fids.collect();
        let may = fids.iter().all(|fid| self.cache.may(*fid, Mode::Write));
        if may { Ok(()) } else { Err(Stop::Miss(Want::Permit(fids))) }
    }
    /// Stops with a miss where the change may not be made now.
    fn ready(&mut self, op: &Change_) -> Result_<()> {
        self.permitted(rights::needs(op))?;
        self.cache.room.charge(op).map_err(|room| Stop::Miss(Want::Room(room)))
    }
    fn carry_out(&mut self, op: Change_, meta: &Meta) -> Result_<()> {
        let when = self.cache.now();
        let made = rights::made(&op).filter(|(dir, _)| self.cache.rights.mode(*dir) == Mode::Write);
        self.cache.change(op.clone(), |cache| cache.tree.perform(&op, when, meta))?;
        if let Some((_, fid)) = made {
            self.cache.rights.set(fid, Mode::Write);
        }
        Ok(())
    }
    fn change(&mut self, op: Change_, meta: &Meta) -> Result_<()> {
        self.ready(&op)?;
        self.carry_out(op, meta)
    }
    fn gone(&self, fid: Fid) -> Result_<Gone> {
        let node = self.node(fid)?;
        let mut attr = node.attr;
        if node.meta.nlink > 0 && !node.is_dir() {
            attr.nlink = node.meta.nlink;
        }
        Ok(Gone { fid, base: node.meta.stamp, attr, target: None })
    }
    /// What the server counts as names beside those that are here.
    fn count_names(&mut self, fid: Fid, by: i32) {
        if let Some(node) = self.cache.tree.edit(fid)
            && node.meta.nlink > 0
        {
            node.meta.nlink = node.meta.nlink.saturating_add_signed(by);
        }
    }
    /// Before an object loses a name that is here.
    fn before_loss(&mut self, fid: Fid) -> Result_<()> {
        let node = self.node(fid)?;
        let (server, here, file) = (node.meta.nlink, node.attr.nlink, !node.is_dir());
        if server > 1 {
            self.count_names(fid, -1); // also of what rests without a name here, and may come back
        }
        let wanted = self.cache.writers.contains_key(&fid) || self.cache.pending.is_dirty(fid);
        if file && here == 1 && server > 1 && wanted {
            self.cache.limbo.insert(fid);
        }
        Ok(())
    }
    fn unlink(&mut self, path: &str) -> Result_<()> {
        let (dir, name) = self.parent(path)?;
        let fid = self.lookup(dir, &name)?.ok_or(Errno::NOENT)?;
        if self.node(fid)?.is_dir() {
            return Err(Errno::ISDIR.into());
        }
        let op = Change_::Unlink { at: self.place(dir, &name)?, gone: self.gone(fid)? };
        self.ready(&op)?;
        self.before_loss(fid)?;
        self.carry_out(op, &Default::default())?;
        self.cache.drop_nameless(fid);
        Ok(())
    }
    fn rmdir(&mut self, path: &str) -> Result_<()> {
        let (dir, name) = self.parent(path)?;
        let fid = self.lookup(dir, &name)?.ok_or(Errno::NOENT)?;
        self.dir_here(fid)?;
        let op = Change_::Rmdir { at: self.place(dir, &name)?, gone: self.gone(fid)? };
        self.change(op, &Default::default())?;
        self.cache.drop_nameless(fid);
        Ok(())
    }
    fn link(&mut self, old: &str, new: &str) -> Result_<()> {
        let fid = self.resolve(old)?;
        if self.here(fid)?.is_dir() {
            return Err(Errno::PERM.into());
        }
        let (dir, name) = self.parent(new)?;
        if self.lookup(dir, &name)?.is_some() {
            return Err(Errno::EXIST.into());
        }
        let base = self.node(fid)?.meta.stamp;
        self.change(Change_::Link { at: self.place(dir, &name)?, fid, base }, &Default::default())?;
        self.count_names(fid, 1);
        Ok(())
    }
    fn rename(&mut self, from: &str, to: &str, exchange: bool) -> Result_<()> {
        let (old_dir, old) = self.parent(from)?;
        let (new_dir, new) = self.parent(to)?;
        let fid = self.lookup(old_dir, &old)?.ok_or(Errno::NOENT)?;
        let other = self.lookup(new_dir, &new)?;
        if other == Some(fid) {
            return Ok(());
        }
        let over = match (other, exchange) {
            (None, true) => return Err(Errno::NOENT.into()),
            (None, false) => Over::Nothing { noreplace: false },
            (Some(other), true) => {
                Over::Exchanged { fid: other, base: self.node(other)?.meta.stamp }
            }
            (Some(other), false) => {
                if self.node(other)?.is_dir() && self.node(fid)?.is_dir() {
                    self.dir_here(other)?;
                }
                Over::Replaced(self.gone(other)?)
            }
        };
        let replaced = matches!(over, Over::Replaced(_)).then_some(other).flatten();
        let base = self.node(fid)?.meta.stamp;
        let (from, to) = (self.place(old_dir, &old)?, self.place(new_dir, &new)?);
        let op = Change_::Rename { from, to, fid, base, over };
        self.ready(&op)?;
        let mut trial = self.cache.tree.clone();
        if trial.perform(&op, self.cache.now(), &Default::default()).is_ok()
            && let Some(other) = replaced
        {
            self.before_loss(other)?;
        }
        self.carry_out(op, &Default::default())?;
        if let Some(other) = replaced {
            self.cache.drop_nameless(other);
        }
        Ok(())
    }
    fn setattr(&mut self, path: &str, new: Change) -> Result_<()> {
        let fid = self.resolve(path)?;
        let is_dir = self.here(fid)?.is_dir();
        if is_dir && new.size.is_some() {
            return Err(Errno::ISDIR.into());
        }
        self.setattr_of(fid, new)
    }
    fn setattr_of(&mut self, fid: Fid, new: Change) -> Result_<()> {
        let node = self.here(fid)?;
        if node.names.is_empty() && fid != ROOT {
            if let Some(node) = self.cache.tree.edit(fid) {
                set(node, &new);
            }
            return Ok(());
        }
        let (base, old) = (node.meta.stamp, Change::default());
        self.change(Change_::Setattr { fid, base, new, old }, &Default::default())
    }
}
