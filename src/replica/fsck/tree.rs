//! Every object of the tree: its attribute, its places, what is here of it, and whether it is what
//! the journal's records want.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::journal::Journal;
use super::{Finding, Fix, Found, FsckError, House, Seen, Severity, Side, Watch};
use crate::kml::codec::SEQ_MAX;
use crate::kml::record::{
    Change, Fid, Name, Op, Origin, Place, ROOT, Range, Record, Seq, Stamp, Time,
};
use crate::replica::compare::{self, Changes, Difference, Knowledge, Places, Spot, own_key};
use crate::replica::index::view::View;
use crate::replica::lives::Lives;
use crate::replica::meta::Meta;
use crate::replica::ops::attr_of;
use crate::replica::state::{self, Facts};
use crate::replica::tree::LIMBO;
use crate::sys::Errno;
use crate::sys::fs::{self, Kind, xattr};

const TELL_EVERY: u64 = 1024;

pub(super) fn look(
    house: &House,
    facts: Option<&Facts>,
    journal: &Journal,
    found: &mut Found,
    watch: &Watch<'_>,
) -> Result<Seen, FsckError> {
    let root = fs::open_root(&house.tree)
        .map_err(|source| FsckError::Tree { path: house.tree.clone(), source })?;
    look_at_root(house, journal, &root, found);
    let clean = facts.is_some_and(|facts| facts.clean);
    let view = open_index(house, clean, found);
    let knowledge = Knowledge {
        places: view.as_ref().map(|view| view as &dyn Places),
        facts: journal.known.clone(),
        stopped_at: stopped_at(house, facts),
    };
    let mut look = Look {
        house,
        own: facts.map_or(0, |facts| facts.node),
        clean,
        journal,
        found,
        seen: Seen::default(),
        standing: HashMap::new(),
        moved: HashMap::new(),
        places: knowledge.places,
        names: None,
    };
    limbo(&mut look);
    let mut stopped = Ok(());
    compare::compare(root, &knowledge, &mut |what| {
        stopped = watch.check();
        if look.seen.count.is_multiple_of(TELL_EVERY) {
            (watch.progress)("objects", look.seen.count);
        }
        match what {
            compare::Found::Object(spot, dir) => look.object(spot, dir),
            compare::Found::Differs(spot, difference) => look.difference(spot, difference),
            compare::Found::Failed { path, error } => {
                let finding = Finding::error("unreadable", shown(path), error.to_string());
                look.found.add(finding.advise("look after the disk, or the rights, first"));
            }
        }
        stopped.is_ok()
    })?;
    look.wanted();
    Ok(look.seen)
}

/// A path of the volume, for people.
fn shown(path: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(path))
}

/// imz itself changed nothing after it wrote down that it stopped.
fn stopped_at(house: &House, facts: Option<&Facts>) -> Option<(i64, u32)> {
    if house.side == Side::Cache || !facts?.clean {
        return None;
    }
    let dir = fs::open_root(&house.state).ok()?;
    Some(fs::stat(&dir, state::FILE.as_bytes()).ok()?.mtime)
}

fn look_at_root(house: &House, journal: &Journal, root: &OwnedFd, found: &mut Found) {
    let known = match xattr::get(root, b"", own_key()) {
        Ok(Some(value)) => Meta::decode(&value).ok().filter(|meta| meta.fid == ROOT),
        Ok(None) => return, // it gets one at the start
        Err(_) => None,
    };
    if known.is_none() {
        let stamp = match house.side {
            Side::Cache => Stamp(0),
            // of an unknown version: as if it had changed just now
            Side::Served => {
                let last = journal.survey.as_ref().map_or(Seq(0), |survey| survey.last);
                Lives::beside(&house.journal).unwrap_or_default().stamp(last)
            }
        };
        let meta = Meta { fid: ROOT, stamp, ..Meta::default() };
        let what = "what imz knows of the root cannot be read: nothing would start";
        found.add(Finding::error("attribute-damaged", &house.tree, what).mend(
            Fix::Meta { path: Vec::new(), meta: Box::new(meta) },
            "note it anew; its entries are looked at again",
        ));
    }
}

fn open_index(house: &House, clean: bool, found: &mut Found) -> Option<View> {
    if !house.index.exists() {
        let severity = if clean { Severity::Warning } else { Severity::Note };
        let what = "the index of names is missing";
        let finding = Finding::new(severity, "index-missing", &house.index, what);
        found.add(finding.mend(Fix::Index, "build it anew from the tree"));
        return None;
    }
    match View::open(&house.index) {
        Ok(view) => Some(view),
        Err(e) => {
            let finding = Finding::warning("index-damaged", &house.index, e.to_string());
            found.add(
                finding.mend(
                    Fix::Index,
                    "build it anew from the tree; the old one goes to lost+found",
                ),
            );
            None
        }
    }
}

struct Look<'a> {
    house: &'a House,
    own: u32,
    clean: bool,
    journal: &'a Journal,
    found: &'a mut Found,
    seen: Seen,
    /// what stands where records that pend name something, and where objects are that they name
    standing: HashMap<(Fid, Name), Option<Fid>>,
    /// objects that stand where the index does not know them, and their findings
    moved: HashMap<Fid, (Spot, usize)>,
    places: Option<&'a dyn Places>,
    /// which object a name stood for, by the index; made when it is first needed
    names: Option<HashMap<(Fid, Name), Fid>>,
}

/// Objects that vanished from a listing wait there.
fn limbo(look: &mut Look<'_>) {
    let path = look.house.state.join("limbo");
    if look.house.side == Side::Served || !path.is_dir() {
        return;
    }
    let Ok(dir) = fs::open_root(&path) else { return };
    for entry in fs::read_dir(&dir).unwrap_or_default() {
        let name = OsStr::from_bytes(&entry.name);
        let named = name.to_str().and_then(|text| u64::from_str_radix(text, 16).ok()).map(Fid);
        let known = xattr::get(&dir, &entry.name, own_key()).ok().flatten();
        let known = known.and_then(|value| Meta::decode(&value).ok());
        match (named, known) {
            (Some(fid), Some(meta)) if meta.fid == fid => {
                look.note_object(fid);
                look.found.add(
                    Finding::note(
                        "limbo",
                        path.join(name),
                        format!("{fid} waits for its new name"),
                    )
                    .advise("the mount removes it after ten minutes, unless it is needed"),
                );
            }
            (Some(fid), None) if !is_plain(&dir, &entry.name) => look.note_object(fid),
            _ => {
                let file = path.join(name);
                let what = "nobody's: what imz knows of it does not go with its name";
                look.found.add(Finding::warning("limbo-stray", &file, what).mend(
                    Fix::SetAside { path: file.clone(), relist: None },
                    "move it to lost+found",
                ));
            }
        }
    }
}

/// Whether it can carry an attribute by every user.
fn is_plain(dir: &OwnedFd, name: &[u8]) -> bool {
    fs::stat(dir, name).is_ok_and(|stat| matches!(stat.kind(), Kind::File | Kind::Dir))
}

impl Look<'_> {
    fn note_object(&mut self, fid: Fid) {
        self.seen.fid(fid, self.own);
        if self.journal.pends(fid) {
            // any place will do: it is there
            let nowhere = Name::new(b"-").ok();
            self.standing.extend(nowhere.map(|name| ((fid, name), Some(fid))));
        }
    }

    fn real(&self, path: &[u8]) -> PathBuf {
        self.house.tree.join(shown(path))
    }

    fn object(&mut self, spot: &Spot, _dir: &OwnedFd) {
        self.seen.count += 1;
        if let Some(dir) = spot.dir {
            let key = (dir, spot.name.clone());
            if self.journal.names.contains_key(&key) {
                self.standing.insert(key, spot.meta.as_ref().map(|meta| meta.fid));
            }
        }
        let Some(meta) = &spot.meta else { return };
        self.note_object(meta.fid);
        if meta.fid == Fid(0) || meta.fid == ROOT || meta.fid == LIMBO {
            self.damaged(spot, "it has a fid that no object has");
            return;
        }
        match self.house.side {
            Side::Served => self.served(spot, meta),
            Side::Cache => self.cached(spot, meta),
        }
    }

    fn served(&mut self, spot: &Spot, meta: &Meta) {
        if meta.stamp.0 > SEQ_MAX {
            self.damaged(spot, "it has a version that no volume gets to");
            return;
        }
        self.seen.newest = self.seen.newest.max(meta.stamp);
        if spot.stat.kind() == Kind::File && !meta.complete {
            let what = "it is a stub: not all of its data is here, and a server has no other";
            self.found.add(
                Finding::error("stub-served", shown(&spot.path), what)
                    .advise("the directory is, or was, the tree of a cache: serve the original"),
            );
        }
    }

    fn cached(&mut self, spot: &Spot, meta: &Meta) {
        let size = spot.stat.size;
        if spot.stat.kind() == Kind::File && !meta.complete {
            let granules = meta.base_size.div_ceil(meta.granule_len());
            if meta.have.len() as u64 != granules.div_ceil(8) {
                self.damaged(spot, "what it says of the ranges that are here makes no sense");
                return;
            }
            if size < meta.base_size {
                let what = format!("it has {size} bytes, and should have {}", meta.base_size);
                let stale = Meta { stale: true, ..meta.clone() };
                let fix = Fix::Meta { path: spot.path.clone(), meta: Box::new(stale) };
                let finding = Finding::warning("stub-short", shown(&spot.path), what);
                self.found.add(finding.mend(fix, "ask the server for it again"));
            }
        }
        self.pending_store(spot, meta);
        self.doubtful(spot, meta);
    }

    /// What is to be shipped must be here.
    fn pending_store(&mut self, spot: &Spot, meta: &Meta) {
        let Some(store) = self.journal.stores.get(&meta.fid) else { return };
        let lost = |at: u64, len: u64| meta.missing(at, len);
        if let Some((at, len)) = store.ranges.iter().find_map(|range| lost(range.at, range.len)) {
            let what = format!(
                "record {} announces its contents, and {len} bytes from {at} on are not here: they \
                 are lost, unless the server has them",
                store.seq.0
            );
            self.found.add(
                Finding::error("data-lost", shown(&spot.path), what)
                    .advise("what the server has of it comes when it is read"),
            );
        } else if spot.stat.size < store.size && self.clean {
            let what = format!(
                "record {} says {} bytes, and it has {}",
                store.seq.0, store.size, spot.stat.size
            );
            self.found.add(
                Finding::error("data-short", shown(&spot.path), what)
                    .advise("it is shipped as it is; a longer version may be in a backup"),
            );
        }
    }

    /// Objects that lost records may have been about are journaled once more.
    fn doubtful(&mut self, spot: &Spot, meta: &Meta) {
        if self.journal.gaps.is_empty() {
            return;
        }
        let ns = |(sec, nsec): (i64, u32)| {
            u64::try_from(sec).unwrap_or(0).saturating_mul(1_000_000_000) + u64::from(nsec)
        };
        let times = [ns(spot.stat.mtime), ns(spot.stat.ctime)];
        let within = |gap: &crate::kml::salvage::Gap| {
            times.iter().any(|time| (gap.after_ns..=gap.before_ns).contains(time))
        };
        let is_new = meta.stamp == Stamp(0)
            && meta.fid.node() == self.own
            && !self.journal.made.contains(&meta.fid);
        if !is_new && !self.journal.gaps.iter().any(within) {
            return;
        }
        let records = records(self.house, spot, meta, is_new);
        let what = "it was made or changed when records that are lost were written";
        let finding = Finding::warning("may-differ", shown(&spot.path), what);
        self.found.add(match records {
            Ok(records) => finding.mend(
                Fix::Journalize(records),
                "journal it once more; the server takes it, or keeps both",
            ),
            Err(e) => finding.advise(format!("compare it with the server's by hand ({e})")),
        });
    }

    fn damaged(&mut self, spot: &Spot, why: &str) {
        let known = self.named(spot);
        let path = spot.path.clone();
        let finding = Finding::error("attribute-damaged", shown(&spot.path), why);
        self.found.add(match (self.house.side, known) {
            (Side::Served, _) => finding.mend(
                Fix::DropMeta { path },
                "give it a new fid: to clients it is another object then",
            ),
            (Side::Cache, Some(fid)) => {
                let meta = Box::new(self.remade(fid, spot));
                let what = match meta.complete {
                    true => "note what index and journal say of it",
                    false => "keep a copy in lost+found, and ask the server for it again",
                };
                let keep = !meta.complete;
                finding.mend(Fix::Remake { path, meta, keep }, what)
            }
            (Side::Cache, None) if spot.stat.kind() == Kind::Dir => finding.advise(
                "nobody knows which directory it is: move what is needed out of it, into the mount",
            ),
            (Side::Cache, None) => finding.mend(
                Fix::SetAside {
                    path: self.real(&spot.path),
                    relist: Some(parent(&spot.path).to_vec()),
                },
                "move it to lost+found; the server's version comes with the next listing",
            ),
        });
    }

    /// Which object stands at a name, by the newest record of it, or by the index.
    fn named(&mut self, spot: &Spot) -> Option<Fid> {
        let key = (spot.dir?, spot.name.clone());
        if let Some(fid) = self.journal.last_place.get(&key) {
            return Some(*fid);
        }
        if self.names.is_none() {
            let mut names = HashMap::new();
            if let Some(places) = self.places {
                let put = &mut |fid, at: Vec<(Fid, Name)>| {
                    names.extend(at.into_iter().map(|at| (at, fid)));
                };
                places.all(put).ok()?;
            }
            self.names = Some(names);
        }
        self.names.as_ref()?.get(&key).copied()
    }

    /// What is known of an object without its attribute. Its data are here as far as they are to be
    /// shipped; nothing else of a file can be told from what is not.
    fn remade(&self, fid: Fid, spot: &Spot) -> Meta {
        let size = spot.stat.size;
        if self.journal.made.contains(&fid) || spot.stat.kind() != Kind::File {
            return Meta { stale: !self.journal.made.contains(&fid), ..Meta::whole(fid) };
        }
        let mut meta = Meta { stale: true, ..Meta::stub(fid, Stamp(0), size) };
        for range in self.journal.stores.get(&fid).into_iter().flat_map(|store| &store.ranges) {
            meta.arrived(range.at, range.len);
        }
        meta
    }

    fn difference(&mut self, spot: Option<&Spot>, difference: Difference) {
        match (spot, difference) {
            (Some(spot), Difference::New) => self.nobodys(spot),
            (Some(spot), Difference::Damaged) => {
                self.damaged(spot, "what imz knows of it cannot be read");
            }
            (Some(spot), Difference::Copied) => self.copied(spot),
            (Some(spot), Difference::Moved { was }) => {
                let fid = spot.meta.as_ref().map_or(Fid(0), |meta| meta.fid);
                if matches!(fid, Fid(0) | ROOT | LIMBO) {
                    return; // told by its fid
                }
                let severity = if self.clean { Severity::Warning } else { Severity::Note };
                let what = match was.first() {
                    None => format!("the index does not know {fid}"),
                    Some((_, name)) => format!("the index knows {fid} elsewhere, as {name:?}"),
                };
                self.moved.insert(fid, (spot.clone(), self.found.0.len()));
                let finding = Finding::new(severity, "index-lacks", shown(&spot.path), what);
                self.found.add(finding.mend(Fix::Index, "build the index anew from the tree"));
            }
            (Some(spot), Difference::Changed(changes)) => self.changed(spot, changes),
            (None, Difference::Missing { fid, was }) if !self.journal.gone.contains(&fid) => {
                let name = was.first().map(|(_, name)| format!("{name:?}")).unwrap_or_default();
                if was.iter().all(|(parent, _)| *parent == LIMBO) {
                    return;
                }
                let what = format!("the index knows {fid} as {name}, and it is not there");
                let finding = Finding::note("index-orphan", &self.house.index, what);
                self.found.add(finding.mend(Fix::Index, "build the index anew from the tree"));
            }
            _ => {}
        }
    }

    fn nobodys(&mut self, spot: &Spot) {
        if self.house.side == Side::Served {
            self.seen.unseen += 1;
            return;
        }
        let pends = spot.dir.and_then(|dir| {
            self.journal.names.get(&(dir, spot.name.clone())).and_then(|(_, fid)| *fid)
        });
        let what = "imz knows nothing of it";
        let finding = Finding::warning("unknown", shown(&spot.path), what);
        self.found.add(match pends {
            Some(fid) => {
                let meta = Box::new(self.remade(fid, spot));
                let fix = Fix::Remake { path: spot.path.clone(), keep: !meta.complete, meta };
                finding.mend(fix, "note what the journal says of it")
            }
            None => finding.mend(
                Fix::SetAside {
                    path: self.real(&spot.path),
                    relist: Some(parent(&spot.path).to_vec()),
                },
                "move it to lost+found: put it into the mount from there",
            ),
        });
    }

    /// Two objects have one fid. Which of them has it by mistake says the index.
    fn copied(&mut self, spot: &Spot) {
        let fid = spot.meta.as_ref().map_or(Fid(0), |meta| meta.fid);
        let known = self.places.and_then(|places| places.of(fid).ok()).unwrap_or_default();
        let here = |(dir, name): &(Fid, Name)| Some(*dir) == spot.dir && *name == spot.name;
        let wrong = match self.moved.get(&fid).filter(|_| known.iter().any(here)) {
            Some((first, nth)) => {
                // that it stands elsewhere is no news of the object
                let finding = &mut self.found.0[*nth];
                (finding.fix, finding.severity) = (Fix::None, Severity::Note);
                first.clone()
            }
            None => spot.clone(),
        };
        let path = wrong.path.clone();
        let cache = self.house.side == Side::Cache;
        if cache && self.named(&wrong).is_some_and(|own| own != fid) {
            return self.damaged(&wrong, "it has the fid of another object");
        }
        let what = format!("it is a copy that has the fid {fid} of another object");
        let finding = Finding::warning("fid-twice", shown(&path), what);
        self.found.add(match cache {
            false => finding.mend(Fix::DropMeta { path }, "give it a fid of its own"),
            true => finding.mend(
                Fix::SetAside { path: self.real(&path), relist: Some(parent(&path).to_vec()) },
                "move it to lost+found: put it into the mount from there",
            ),
        });
    }

    fn changed(&mut self, spot: &Spot, changes: Changes) {
        let names = [
            (changes.size, "size"),
            (changes.mtime, "time"),
            (changes.mode, "mode"),
            (changes.owner, "owner"),
        ];
        let told: Vec<&str> = names.iter().filter(|(is, _)| *is).map(|(_, name)| *name).collect();
        let what = match told.is_empty() {
            true => "it was changed after imz stopped".to_owned(),
            false => format!("imz did not make its {}", told.join(", ")),
        };
        let finding = Finding::note("changed-behind", shown(&spot.path), what);
        self.found.add(finding.advise("clients see it when they fetch it anew"));
    }

    /// What the records that pend want of the tree, and the tree lacks.
    fn wanted(&mut self) {
        for ((dir, name), (seq, want)) in &self.journal.names {
            let stands = self.standing.get(&(*dir, name.clone())).copied().flatten();
            let what = match (want, stands) {
                (Some(fid), Some(stands)) if *fid != stands => {
                    format!("record {} puts {fid} at this name, and {stands} stands there", seq.0)
                }
                (Some(fid), None) if !self.journal.gone.contains(fid) => {
                    format!("record {} puts {fid} at this name, and nothing stands there", seq.0)
                }
                (None, Some(stands)) if self.journal.gone.contains(&stands) => {
                    format!("record {} takes {stands} away, and it stands there", seq.0)
                }
                _ => continue,
            };
            let subject = format!("{dir}/{name:?}");
            self.found.add(
                Finding::warning("name-differs", subject, what)
                    .advise("the record is shipped as it is; look at the name afterwards"),
            );
        }
        let found: HashSet<Fid> = self.standing.values().copied().flatten().collect();
        for (fid, store) in &self.journal.stores {
            let is_there = found.contains(fid);
            if is_there || self.journal.gone.contains(fid) {
                continue;
            }
            let what = format!("record {} announces its contents, and it is gone", store.seq.0);
            self.found.add(
                Finding::error("data-lost", shown(&store.path), what)
                    .advise("look for it in lost+found, or in a backup"),
            );
        }
    }
}

fn parent(path: &[u8]) -> &[u8] {
    path.iter().rposition(|byte| *byte == b'/').map_or(b"", |at| &path[..at])
}

/// Records that say all of an object: that it was made, if it is new, its attributes, its contents.
fn records(house: &House, spot: &Spot, meta: &Meta, is_new: bool) -> Result<Vec<Record>, Errno> {
    let (stat, fid) = (&spot.stat, meta.fid);
    let attr = attr_of(stat);
    let at = Place { dir: spot.dir.ok_or(Errno::STALE)?, base: Stamp(0), name: spot.name.clone() };
    let mode = stat.mode & 0o7777;
    let made = match stat.kind() {
        _ if !is_new => None,
        Kind::File => Some(Op::Create { at, fid, mode, umask: 0 }),
        Kind::Dir => Some(Op::Mkdir { at, fid, mode, umask: 0 }),
        Kind::Symlink => {
            let path = house.tree.join(shown(&spot.path));
            let target = std::fs::read_link(path)
                .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
            Some(Op::Symlink { at, fid, target: target.as_os_str().as_bytes().to_vec() })
        }
        _ => Some(Op::Mknod { at, fid, mode: stat.mode, umask: 0, rdev: stat.rdev }),
    };
    let base = meta.stamp;
    let store = (stat.kind() == Kind::File).then(|| Op::Store {
        fid,
        base,
        size: stat.size,
        mtime: attr.mtime,
        ranges: present(meta, stat.size),
        old_size: 0,
    });
    let new = Change {
        mode: Some(mode),
        uid: Some(stat.uid),
        gid: Some(stat.gid),
        mtime: Some(attr.mtime),
        ..Change::default()
    };
    let is_link = stat.kind() == Kind::Symlink;
    let setattr = (!is_link).then_some(Op::Setattr { fid, base, new, old: Change::default() });
    let time_ns = time_ns(attr.mtime);
    let record = |op| Record {
        time_ns,
        origin: Origin::default(),
        uid: stat.uid,
        gid: stat.gid,
        path: spot.path.clone(),
        op,
    };
    Ok([made, store, setattr].into_iter().flatten().map(record).collect())
}

/// The ranges that are here; empty ones are no ranges.
fn present(meta: &Meta, size: u64) -> Vec<Range> {
    meta.present(size).into_iter().filter(|range| range.len > 0).take(256).collect()
}

fn time_ns(time: Time) -> u64 {
    u64::try_from(time.sec).unwrap_or(0).saturating_mul(1_000_000_000) + u64::from(time.nsec)
}
