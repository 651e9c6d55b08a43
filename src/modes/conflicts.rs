//! `imz conflicts`: versions that lost, and what becomes of them.
//!
//! Asks the control socket of a mount (which asks its server) or of a server; never touches a
//! mount. What there is to know of a conflict comes as JSON from the server; here it is shown.

use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Context;
use indicatif::HumanBytes;
use serde_json::{Value, json};
use similar::TextDiff;

use super::place::{self, Place};
use super::{Exit, fail, print};
use crate::cli::conflicts::{
    ConflictChoice, ConflictsArgs, ConflictsCommand, ConflictsDiffArgs, ConflictsListArgs,
    ConflictsResolveArgs, ConflictsShowArgs,
};
use crate::net::conflicts::{Ask, Choice, PIECE_LEN_MAX};
use crate::net::control::{self, ControlError};

/// Longest text that is compared line by line, bytes.
const TEXT_LEN_MAX: usize = 1 << 20;
/// Longest time for it; what is left is shown as replaced.
const DIFF_TIME_MAX: Duration = Duration::from_secs(5);

/// # Errors
/// No such place or conflict (exit code 5), the server is away (3), or the decision is refused (4).
pub fn run(args: &ConflictsArgs) -> anyhow::Result<()> {
    match &args.command {
        ConflictsCommand::List(args) => list(args),
        ConflictsCommand::Show(args) => show(args),
        ConflictsCommand::Diff(args) => diff(args),
        ConflictsCommand::Resolve(args) => resolve(args),
    }
}

/// Where to ask; a mount whose server is away cannot know.
fn ask_at(path: &Path) -> anyhow::Result<Place> {
    let place = place::find(path)?;
    let name = || place.path.display().to_string();
    let status = control::status(&place.socket).map_err(place::unanswered).with_context(name)?;
    if !status.connected {
        let what = format!("{} is away, and the conflicts are there", status.server);
        return fail(Exit::Unreachable, what).with_context(name);
    }
    Ok(place)
}

fn ask(place: &Place, ask: Ask) -> anyhow::Result<Value> {
    let answer = match control::conflicts(&place.socket, ask) {
        Err(ControlError::Refused { error, .. }) => fail(Exit::Refused, error),
        Err(e) => Err(place::unanswered(e)),
        Ok(answer) => Ok(answer),
    };
    answer.with_context(|| place.path.display().to_string())
}

fn page(place: &Place, after: &str) -> anyhow::Result<(Vec<Value>, bool)> {
    let mut answer = ask(place, Ask::List { after: after.to_owned() })?;
    let more = answer["more"].as_bool().unwrap_or_default();
    match answer["conflicts"].take() {
        Value::Array(page) => Ok((page, more)),
        _ => fail(Exit::Failure, "the answer makes no sense; is it of another version?"),
    }
}

fn list(args: &ConflictsListArgs) -> anyhow::Result<()> {
    let place = ask_at(&args.place)?;
    let (mut after, mut all) = (String::new(), Vec::new());
    loop {
        let (page, more) = page(&place, &after)?;
        let last = page.last().and_then(|it| it["id"].as_str()).map(str::to_owned);
        if !args.json {
            print(&page.iter().map(line).collect::<String>())?;
        }
        all.extend(page);
        match last.filter(|_| more) {
            Some(last) => after = last,
            None => break,
        }
    }
    if args.json {
        print(&(serde_json::to_string_pretty(&all)? + "\n"))?;
    }
    Ok(())
}

fn find(place: &Place, id: &str) -> anyhow::Result<Value> {
    let missing = || fail(Exit::NotFound, format!("there is no conflict {id}; imz conflicts list"));
    // the one before it in the order of the list need not exist
    let before = id.split_once('-').and_then(|(node, seq)| {
        Some(format!("{node}-{}", seq.parse::<u64>().ok()?.checked_sub(1)?))
    });
    let Some(before) = before else { return missing() };
    let (page, _) = page(place, &before)?;
    match page.into_iter().next().filter(|it| it["id"] == id) {
        Some(found) => Ok(found),
        None => missing(),
    }
}

fn show(args: &ConflictsShowArgs) -> anyhow::Result<()> {
    let place = ask_at(&args.place)?;
    let found = find(&place, &args.id)?;
    let text = match args.json {
        true => serde_json::to_string_pretty(&found)? + "\n",
        false => render(&found),
    };
    Ok(print(&text)?)
}

fn resolve(args: &ConflictsResolveArgs) -> anyhow::Result<()> {
    let choice = match (args.choice, &args.path) {
        (ConflictChoice::Mine, None) => Choice::Mine,
        (ConflictChoice::Theirs, None) => Choice::Theirs,
        (ConflictChoice::Both, None) => Choice::Both,
        (ConflictChoice::Keep, Some(path)) if path.len() <= 2048 => Choice::Keep(path.clone()),
        (ConflictChoice::Keep, _) => return fail(Exit::Usage, "PATH is too long"),
        _ => return fail(Exit::Usage, "a PATH goes with keep only"),
    };
    let place = ask_at(&args.place)?;
    let found = find(&place, &args.id)?;
    let now = found["now"]["stamp"].as_u64().unwrap_or_default();
    let stamp = Some(args.stamp.unwrap_or(now));
    let answer = ask(&place, Ask::Resolve { id: args.id.clone(), choice, stamp })?;
    let done = answer["done"].as_str().unwrap_or_default();
    let text = match args.json {
        true => json!({ "id": args.id, "done": done }).to_string() + "\n",
        false => format!("{}: {done}\n", args.id),
    };
    Ok(print(&text)?)
}

// ---- diff ------------------------------------------------------------------------------------

/// One of the two versions, as far as it was read.
struct Version {
    bytes: Vec<u8>,
    size: u64,
}

impl Version {
    /// Reads on, up to `len`.
    fn read(&mut self, place: &Place, id: &str, mine: bool, len: usize) -> anyhow::Result<()> {
        while self.bytes.len() < len {
            let at = self.bytes.len() as u64;
            let answer = ask(place, Ask::Read { id: id.to_owned(), mine, at, len: PIECE_LEN_MAX })?;
            self.size = answer["size"].as_u64().unwrap_or_default();
            let piece = piece(&answer)?;
            if piece.is_empty() {
                break;
            }
            self.bytes.extend(piece);
        }
        Ok(())
    }
    fn as_text(&self) -> Option<&str> {
        let whole = self.bytes.len() as u64 == self.size && !self.bytes.contains(&0);
        std::str::from_utf8(&self.bytes).ok().filter(|_| whole)
    }
}

fn diff(args: &ConflictsDiffArgs) -> anyhow::Result<()> {
    let place = ask_at(&args.place)?;
    let found = find(&place, &args.id)?;
    let is_file = |it: &Value| it["kind"] == "file";
    if !is_file(&found["preserved"]) {
        return fail(Exit::Refused, "no contents of a file are kept; imz conflicts show says what");
    }
    let read = |mine| {
        let mut version = Version { bytes: Vec::new(), size: 0 };
        version.read(&place, &args.id, mine, TEXT_LEN_MAX).map(|()| version)
    };
    let mine = read(true)?;
    let theirs = match is_file(&found["now"]) {
        true => read(false)?,
        false => Version { bytes: Vec::new(), size: 0 },
    };
    let text = match (theirs.as_text(), mine.as_text()) {
        (Some(old), Some(new)) => Some(unified(&found, old, new)),
        _ => None,
    };
    let first = match &text {
        Some(_) => None,
        None => first_difference(&place, &args.id, theirs, mine)?,
    };
    let (old, new) = (&found["now"]["size"], &found["preserved"]["size"]);
    let shown = match (args.json, text) {
        (true, text) => {
            let told = json!({ "id": args.id, "diff": text, "theirs_bytes": old,
                "mine_bytes": new, "first_difference": first });
            told.to_string() + "\n"
        }
        (false, Some(text)) => text,
        (false, None) => {
            let bytes = |it: &Value| it.as_u64().unwrap_or_default();
            let at = match first {
                Some(at) => format!("they first differ at byte {at}"),
                None => "they are the same".to_owned(),
            };
            format!("binary: theirs {} bytes, mine {} bytes; {at}\n", bytes(old), bytes(new))
        }
    };
    Ok(print(&shown)?)
}

fn unified(found: &Value, old: &str, new: &str) -> String {
    let path = shown(&found["path"]);
    let head = |side: &str| format!("{path} ({side}: {})", shown(&found[side]["host"]));
    let mut diff = TextDiff::configure();
    let diff = diff.timeout(DIFF_TIME_MAX).diff_lines(old, new);
    diff.unified_diff().header(&head("theirs"), &head("mine")).to_string()
}

/// Where the two first differ; reads on until then. `None`: nowhere.
fn first_difference(
    place: &Place,
    id: &str,
    mut theirs: Version,
    mut mine: Version,
) -> anyhow::Result<Option<u64>> {
    let mut base = 0;
    loop {
        let same = theirs.bytes.iter().zip(&mine.bytes).take_while(|(a, b)| a == b).count();
        let both = theirs.bytes.len().min(mine.bytes.len());
        let at = base + same as u64;
        if same < both || at >= theirs.size.min(mine.size) {
            return Ok((at < theirs.size.max(mine.size)).then_some(at));
        }
        base = at;
        for (version, is_mine) in [(&mut theirs, false), (&mut mine, true)] {
            let ask_ = Ask::Read { id: id.to_owned(), mine: is_mine, at, len: PIECE_LEN_MAX };
            version.bytes = piece(&ask(place, ask_)?)?;
        }
        if theirs.bytes.is_empty() || mine.bytes.is_empty() {
            return Ok(Some(at)); // cut short meanwhile
        }
    }
}

fn piece(answer: &Value) -> anyhow::Result<Vec<u8>> {
    let digits = answer["hex"].as_str().unwrap_or_default().as_bytes();
    let byte = |pair: &[u8]| -> anyhow::Result<u8> {
        let pair = std::str::from_utf8(pair).context("a piece of a file")?;
        u8::from_str_radix(pair, 16).context("a piece of a file")
    };
    digits.chunks_exact(2).map(byte).collect()
}

// ---- for people ------------------------------------------------------------------------------

/// A text of somebody else's making, harmless on a terminal.
fn shown(text: &Value) -> String {
    text.as_str().map_or_else(|| "?".to_owned(), |text| text.escape_debug().to_string())
}

fn when(ns: &Value) -> String {
    match ns.as_u64() {
        Some(ns) => {
            let time = UNIX_EPOCH + Duration::from_nanos(ns);
            humantime::format_rfc3339_seconds(time).to_string()
        }
        None => "?".to_owned(),
    }
}

fn line(it: &Value) -> String {
    format!(
        "{}  {}  {}  {}  {}  {}\n",
        shown(&it["id"]),
        when(&it["mine"]["time_ns"]),
        shown(&it["mine"]["host"]),
        shown(&it["path"]),
        shown(&it["kind"]),
        shown(&it["why"]),
    )
}

fn render(it: &Value) -> String {
    let size = |of: &Value| {
        of["size"].as_u64().map_or_else(String::new, |size| format!(", {}", HumanBytes(size)))
    };
    let stamp = |of: &Value| of.as_u64().map_or_else(|| "?".to_owned(), |stamp| stamp.to_string());
    let (mine, theirs, now) = (&it["mine"], &it["theirs"], &it["now"]);
    let by = format!("{}, {}", shown(&theirs["host"]), when(&theirs["time_ns"]));
    let theirs = match theirs["gone"] == true {
        true => format!("removed ({by})"),
        false => format!(
            "{} by {by}, version {}{}",
            theirs["change"].as_str().unwrap_or("as it was"),
            stamp(&theirs["stamp"]),
            size(theirs)
        ),
    };
    let now = match now.is_null() {
        true => "nothing".to_owned(),
        false => {
            format!("{}, version {}{}", shown(&now["path"]), stamp(&now["stamp"]), size(now))
        }
    };
    let kept = match it["holds"].as_str() {
        Some("data") if mine["whole"] == false => "the changed parts of the contents",
        Some("data") => "the contents",
        Some("object") => "the object",
        _ => "the change alone",
    };
    let more = match it["changes"].as_u64() {
        Some(count) if count > 1 => format!(" and {} more changes", count - 1),
        _ => String::new(),
    };
    let kind = shown(&it["kind"]);
    let lines = [
        ("path", shown(&it["path"])),
        ("change", format!("{kind}{more}")),
        ("why", shown(&it["why"])),
        (
            "mine",
            format!(
                "{}, {}, made on version {}",
                shown(&mine["host"]),
                when(&mine["time_ns"]),
                stamp(&mine["stamp"])
            ),
        ),
        ("kept", format!("{kept}{}", size(&it["preserved"]))),
        ("theirs", theirs),
        ("now", now),
    ];
    let lines = lines.map(|(key, value)| format!("  {key:<6}  {value}\n"));
    format!("{}\n{}", shown(&it["id"]), lines.concat())
}
