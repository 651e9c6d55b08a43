//! Conflicts: the tree keeps its own version, the client's is kept aside, and nothing is blocked.
//!
//! ```text
//!   .imz-conflicts/NODE-SEQ/record.json   who, when, what, and why it did not fit
//!   .imz-conflicts/NODE-SEQ/record        the same in the journal's encoding
//!   .imz-conflicts/NODE-SEQ/data          the bytes of a store, each range at its place
//!   .imz-conflicts/NODE-SEQ/kept/NAME     an object that found its name taken
//! ```
//!
//! An object that was made under a taken name is made in `kept` instead, with its own fid: what the
//! client does with it later finds it there. So is a file that was renamed to a taken name.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::apply::{Applied, Content};
use super::certify::Clash;
use super::tree::{CONFLICTS_NAME, Dir, TreeError};
use super::volume::{Result, Volume};
use crate::kml::codec;
use crate::kml::record::{Name, Op, Over, Record};
use crate::sys::{Errno, crash, fs};

impl Volume {
    /// A record does not fit.
    pub(super) fn conflict(
        &mut self,
        mut record: Record,
        content: Content<'_>,
        clash: Clash,
        out: &mut Applied,
    ) -> Result<()> {
        let origin = record.origin;
        out.conflicts.extend(record.op.touched());
        let dir = self.keep_aside(&record, content, clash)?;
        // a directory stays where it is, under its old name
        let is_dir = match &record.op {
            Op::Rename { from, .. } => match self.standing(from)? {
                Ok(Some((_, stat))) => stat.kind() == fs::Kind::Dir,
                _ => true,
            },
            _ => false,
        };
        let fits_elsewhere = matches!(clash, Clash::NameTaken | Clash::Changed);
        let redirected = match &mut record.op {
            Op::Create { at, .. }
            | Op::Mkdir { at, .. }
            | Op::Symlink { at, .. }
            | Op::Mknod { at, .. }
                if clash != Clash::ForeignFid =>
            {
                Some(at)
            }
            Op::Rename { to, over, .. } if !is_dir && fits_elsewhere => {
                *over = Over::Nothing { noreplace: true };
                Some(to)
            }
            _ => None,
        };
        if let Some(place) = redirected {
            place.dir = self.subdir(&dir, b"kept")?.fid;
            out.also.push(place.dir);
            return self.carry_out(record, content, out);
        }
        self.note_seq(origin.node, origin.seq, record.path)
    }

    /// Keeps what a client wanted, whole. Doing it again changes nothing.
    pub(super) fn keep_aside(
        &mut self,
        record: &Record,
        content: Content<'_>,
        clash: Clash,
    ) -> Result<Arc<Dir>> {
        let origin = record.origin;
        log::warn!(
            "{}: conflict: node {}, record {}, {}: {clash}",
            self.name,
            origin.node,
            origin.seq.0,
            record.path.escape_ascii()
        );
        let root = self.tree.root().clone();
        let all = self.subdir(&root, CONFLICTS_NAME)?;
        let name = format!("{}-{}", origin.node, origin.seq.0);
        let is_new = fs::stat(&*all, name.as_bytes()) == Err(Errno::NOENT);
        let dir = self.subdir(&all, name.as_bytes())?;
        let told = serde_json::json!({
            "node": origin.node,
            "seq": origin.seq.0,
            "time_ns": record.time_ns,
            "uid": record.uid,
            "gid": record.gid,
            "path": String::from_utf8_lossy(&record.path),
            "kind": codec::kind_name(&record.op),
            "what": format!("{:?}", record.op),
            "why": clash.to_string(),
        });
        write(&dir, b"record.json", format!("{told:#}\n").as_bytes())?;
        match codec::encode_wire(record, origin.seq) {
            Ok(bytes) => write(&dir, b"record", &bytes)?,
            Err(e) => log::warn!("{name}: the record itself is not kept: {e}"),
        }
        crash::point("conflict-record");
        if let Op::Store { size, ranges, .. } = &record.op {
            match content {
                Content::Spooled => {
                    let spooled = super::spool::Spool::name(origin.node, origin.seq);
                    let file = self.spool.get(origin.node, origin.seq).map_err(TreeError::from)?;
                    fs::truncate(&file, *size).map_err(TreeError::from)?;
                    let replace = fs::RenameMode::Replace;
                    fs::rename(&self.spool, &spooled, &*dir, b"data", replace)
                        .map_err(TreeError::from)?;
                }
                Content::Inline(bytes) => {
                    let file = open(&dir, b"data")?;
                    super::apply::write_ranges(&file, ranges, bytes).map_err(TreeError::from)?;
                    fs::truncate(&file, *size).map_err(TreeError::from)?;
                }
                Content::None => fs::truncate(open(&dir, b"data")?, *size)?,
                Content::Gone => {}
            }
        }
        crash::point("conflict-data");
        self.conflicts += u64::from(is_new);
        Ok(dir)
    }

    /// A directory of imz's own in the tree, made if it is not there.
    fn subdir(&mut self, dir: &Arc<Dir>, name: &[u8]) -> Result<Arc<Dir>> {
        let before = fs::fstat(&**dir)?.mtime;
        match fs::mkdir(&**dir, name, 0o700) {
            Ok(()) if dir.fid == crate::kml::record::ROOT => {
                // the root looks to clients as if nothing had happened
                let keep = fs::SetTime::At(before.0, before.1);
                fs::utimes_fd(&**dir, fs::SetTime::Keep, keep)?;
            }
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(TreeError::from(e).into()),
        }
        // the names given here are names
        let name = Name::new(name).map_err(|_| Errno::INVAL)?;
        self.seen(dir, &name)?;
        Ok(self.tree.open_dir(dir, &name)?)
    }

    pub(super) fn count_conflicts(&self) -> u64 {
        let root = self.tree.root();
        match fs::open(&**root, CONFLICTS_NAME, fs::o::DIRECTORY, 0) {
            Ok(dir) => fs::read_dir(dir).map_or(0, |entries| entries.len() as u64),
            Err(_) => 0,
        }
    }
}

fn open(dir: &Dir, name: &[u8]) -> Result<OwnedFd> {
    let flags = fs::o::CREAT | fs::o::TRUNC | fs::o::WRONLY;
    Ok(fs::open(dir, name, flags, 0o600).map_err(TreeError::from)?)
}

fn write(dir: &Dir, name: &[u8], bytes: &[u8]) -> Result<()> {
    Ok(fs::pwrite_all(open(dir, name)?, bytes, 0).map_err(TreeError::from)?)
}
