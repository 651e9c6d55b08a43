//! One entry as a line for people, or as a JSON object for tools.
//!
//! Names are bytes. In a line, what is not plain is quoted and escaped. In JSON, a key whose bytes
//! are not UTF-8 has them readable under its own name and exact under `KEY_hex`.
//!
//! JSON keys of every entry: `seq`, `time` (RFC 3339), `time_ns`, `outcome`, `kind`, `path`, `uid`,
//! `gid`, and `origin` (`{node, seq}`) where another node made the change. Fids are strings
//! `NODE.COUNTER` in hexadecimal; times of files are `{sec, nsec}`; modes are numbers. The rest
//! is named as the fields of `record::Op`, with `dir`, `dir_base`, `name` for a place (`to_dir`,
//! `to_dir_base`, `to_name` for a rename's second) and ranges as `[at, len]`.

use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use crate::kml::codec::{Entry, kind_name};
use crate::kml::record::{Change, Gone, Op, Over, Place, Range, Time};

fn rfc3339(time_ns: u64) -> String {
    humantime::format_rfc3339_nanos(UNIX_EPOCH + Duration::from_nanos(time_ns)).to_string()
}

/// Bytes as one word without blanks.
pub fn plain(bytes: &[u8]) -> String {
    match str::from_utf8(bytes) {
        Ok("") => "\"\"".to_string(),
        Ok(text)
            if text.chars().all(|c| c.is_alphanumeric() || c.is_ascii_punctuation())
                && !text.contains(['"', '\\']) =>
        {
            text.to_string()
        }
        Ok(text) => format!("{text:?}"),
        Err(_) => format!("\"{}\"", bytes.escape_ascii()),
    }
}

/// `seq time outcome kind path what changed`, without a newline.
pub fn line(entry: &Entry) -> String {
    let record = &entry.record;
    let path = if record.path.is_empty() { "/".to_string() } else { plain(&record.path) };
    let mut line = format!(
        "{} {} {} {} {path}",
        entry.seq.0,
        rfc3339(record.time_ns),
        entry.outcome.name(),
        kind_name(&record.op),
    );
    line.push_str(&what(&record.op));
    line.push_str(&format!(" by {}:{}", record.uid, record.gid));
    if record.origin.seq.0 != 0 {
        line.push_str(&format!(" from {}/{}", record.origin.node, record.origin.seq.0));
    }
    line
}

fn what(op: &Op) -> String {
    match op {
        Op::Noop => String::new(),
        Op::Create { at, fid, mode, umask } | Op::Mkdir { at, fid, mode, umask } => {
            format!(
                " {fid} in {} as {} mode {:o}",
                at.dir,
                plain(at.name.as_bytes()),
                mode & !umask
            )
        }
        Op::Symlink { at, fid, target } => {
            format!(" {fid} in {} as {} -> {}", at.dir, plain(at.name.as_bytes()), plain(target))
        }
        Op::Mknod { at, fid, mode, umask, rdev } => format!(
            " {fid} in {} as {} mode {:o} rdev {rdev:#x}",
            at.dir,
            plain(at.name.as_bytes()),
            mode & !umask
        ),
        Op::Link { at, fid, .. } => {
            format!(" {fid} in {} as {}", at.dir, plain(at.name.as_bytes()))
        }
        Op::Rename { from, to, fid, over, .. } => {
            let over = match over {
                Over::Nothing { noreplace: false } => String::new(),
                Over::Nothing { noreplace: true } => " noreplace".to_string(),
                Over::Replaced(gone) => format!(" replacing {}", gone.fid),
                Over::Exchanged { fid, .. } => format!(" exchanging {fid}"),
            };
            format!(
                " {fid} from {} as {} to {} as {}{over}",
                from.dir,
                plain(from.name.as_bytes()),
                to.dir,
                plain(to.name.as_bytes())
            )
        }
        Op::Unlink { at, gone } | Op::Rmdir { at, gone } => {
            format!(" {} in {} as {}", gone.fid, at.dir, plain(at.name.as_bytes()))
        }
        Op::Setattr { fid, new, .. } => format!(" {fid}{}", changes(new)),
        Op::Setxattr { fid, name, value, .. } => {
            format!(" {fid} {} ({} bytes)", plain(name), value.len())
        }
        Op::Removexattr { fid, name, .. } => format!(" {fid} {}", plain(name)),
        Op::Store { fid, size, ranges, old_size, .. } => {
            let bytes: u64 = ranges.iter().map(|range| range.len).sum();
            let count = ranges.len();
            format!(" {fid} size {old_size} -> {size}, {bytes} bytes in {count} ranges")
        }
    }
}

fn changes(new: &Change) -> String {
    let time = |time: Time| format!("{}.{:09}", time.sec, time.nsec);
    let parts = [
        new.mode.map(|mode| format!(" mode {mode:o}")),
        new.uid.map(|uid| format!(" uid {uid}")),
        new.gid.map(|gid| format!(" gid {gid}")),
        new.size.map(|size| format!(" size {size}")),
        new.atime.map(|at| format!(" atime {}", time(at))),
        new.mtime.map(|at| format!(" mtime {}", time(at))),
    ];
    parts.into_iter().flatten().collect()
}

/// A JSON object; its `Display` is one line.
pub fn json(entry: &Entry) -> Value {
    let record = &entry.record;
    let mut out = Map::new();
    out.insert("seq".into(), entry.seq.0.into());
    out.insert("time".into(), rfc3339(record.time_ns).into());
    out.insert("time_ns".into(), record.time_ns.into());
    out.insert("outcome".into(), entry.outcome.name().into());
    out.insert("kind".into(), kind_name(&record.op).into());
    out.insert("uid".into(), record.uid.into());
    out.insert("gid".into(), record.gid.into());
    put_bytes(&mut out, "path", &record.path);
    if record.origin.seq.0 != 0 {
        let origin = json!({ "node": record.origin.node, "seq": record.origin.seq.0 });
        out.insert("origin".into(), origin);
    }
    if let Some(fid) = record.op.fid() {
        out.insert("fid".into(), fid.to_string().into());
    }
    put_op(&mut out, &record.op);
    Value::Object(out)
}

/// Puts a path into an object, as every entry has it.
pub fn put_path(out: &mut Value, path: &[u8]) {
    if let Value::Object(out) = out {
        put_bytes(out, "path", path);
    }
}

fn put_bytes(out: &mut Map<String, Value>, key: &str, bytes: &[u8]) {
    out.insert(key.into(), String::from_utf8_lossy(bytes).into());
    if str::from_utf8(bytes).is_err() {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        out.insert(format!("{key}_hex"), hex.into());
    }
}

fn put_place(out: &mut Map<String, Value>, prefix: &str, place: &Place) {
    out.insert(format!("{prefix}dir"), place.dir.to_string().into());
    out.insert(format!("{prefix}dir_base"), place.base.0.into());
    put_bytes(out, &format!("{prefix}name"), place.name.as_bytes());
}

fn time(time: Time) -> Value {
    json!({ "sec": time.sec, "nsec": time.nsec })
}

fn gone(gone: &Gone) -> Value {
    let mut out = Map::new();
    let attr = &gone.attr;
    out.insert("fid".into(), gone.fid.to_string().into());
    out.insert("base".into(), gone.base.0.into());
    out.insert("mode".into(), attr.mode.into());
    out.insert("uid".into(), attr.uid.into());
    out.insert("gid".into(), attr.gid.into());
    out.insert("nlink".into(), attr.nlink.into());
    out.insert("rdev".into(), attr.rdev.into());
    out.insert("size".into(), attr.size.into());
    out.insert("atime".into(), time(attr.atime));
    out.insert("mtime".into(), time(attr.mtime));
    if let Some(target) = &gone.target {
        put_bytes(&mut out, "target", target);
    }
    Value::Object(out)
}

fn change(change: &Change) -> Value {
    let parts = [
        ("mode", change.mode.map(Value::from)),
        ("uid", change.uid.map(Value::from)),
        ("gid", change.gid.map(Value::from)),
        ("size", change.size.map(Value::from)),
        ("atime", change.atime.map(time)),
        ("mtime", change.mtime.map(time)),
    ];
    let parts = parts.into_iter().filter_map(|(key, value)| Some((key.to_string(), value?)));
    Value::Object(parts.collect())
}

fn put_made(out: &mut Map<String, Value>, at: &Place, mode: u32, umask: u32) {
    put_place(out, "", at);
    out.insert("mode".into(), mode.into());
    out.insert("umask".into(), umask.into());
}

fn put_op(out: &mut Map<String, Value>, op: &Op) {
    if let Op::Link { base, .. }
    | Op::Rename { base, .. }
    | Op::Setattr { base, .. }
    | Op::Setxattr { base, .. }
    | Op::Removexattr { base, .. }
    | Op::Store { base, .. } = op
    {
        out.insert("base".into(), base.0.into());
    }
    match op {
        Op::Noop => {}
        Op::Create { at, mode, umask, .. } | Op::Mkdir { at, mode, umask, .. } => {
            put_made(out, at, *mode, *umask);
        }
        Op::Mknod { at, mode, umask, rdev, .. } => {
            put_made(out, at, *mode, *umask);
            out.insert("rdev".into(), (*rdev).into());
        }
        Op::Symlink { at, target, .. } => {
            put_place(out, "", at);
            put_bytes(out, "target", target);
        }
        Op::Link { at, .. } => put_place(out, "", at),
        Op::Rename { from, to, over, .. } => {
            put_place(out, "", from);
            put_place(out, "to_", to);
            match over {
                Over::Nothing { noreplace } => {
                    out.insert("noreplace".into(), (*noreplace).into());
                }
                Over::Replaced(replaced) => {
                    out.insert("replaced".into(), gone(replaced));
                }
                Over::Exchanged { fid, base } => {
                    let other = json!({ "fid": fid.to_string(), "base": base.0 });
                    out.insert("exchanged".into(), other);
                }
            }
        }
        Op::Unlink { at, gone: object } | Op::Rmdir { at, gone: object } => {
            put_place(out, "", at);
            out.insert("gone".into(), gone(object));
        }
        Op::Setattr { new, old, .. } => {
            out.insert("new".into(), change(new));
            out.insert("old".into(), change(old));
        }
        Op::Setxattr { name, value, old, .. } => {
            put_bytes(out, "name", name);
            put_bytes(out, "value", value);
            if let Some(old) = old {
                put_bytes(out, "old", old);
            }
        }
        Op::Removexattr { name, old, .. } => {
            put_bytes(out, "name", name);
            if let Some(old) = old {
                put_bytes(out, "old", old);
            }
        }
        Op::Store { size, mtime, ranges, old_size, .. } => {
            out.insert("size".into(), (*size).into());
            out.insert("mtime".into(), time(*mtime));
            out.insert("old_size".into(), (*old_size).into());
            let ranges = ranges.iter().map(|Range { at, len }| json!([at, len]));
            out.insert("ranges".into(), ranges.collect());
        }
    }
}
