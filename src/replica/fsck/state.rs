//! What stands beside journal and tree: state.json, the tables of clients, of writers and of what
//! was granted, the conflict store, and what was left behind.

use std::fs;
use std::path::Path;

use super::journal::Journal;
use super::{Finding, Fix, Found, FsckError, House, Seen, Side, io};
use crate::kml::codec::{WRITERS_HEADER, WRITERS_MAX, decode_wire};
use crate::kml::record::{Op, Seq};
use crate::replica::nodes::Nodes;
use crate::replica::room::{BookFile, FiguresFile};
use crate::replica::state::{self, Facts, RESERVE};
use crate::replica::tree::CONFLICTS_NAME;

/// Files that are written and then renamed: what a crash leaves of them.
const TEMPORARY: [&str; 10] = [
    "kml/new",
    "kml/fsck.new",
    "kml/writers.new",
    "state.json.new",
    "nodes.json.new",
    "live.new",
    "grants.new",
    "room.new",
    "index.damaged",
    "index.redb.damaged",
];
/// Longest record in the conflict store that is looked at, bytes.
const RECORD_LEN_MAX: u64 = 1 << 20;

/// Who this node is; where the file is damaged, what its last version said.
pub(super) fn facts(house: &House, found: &mut Found) -> Option<Facts> {
    let path = house.state.join(state::FILE);
    let why = match state::read(&path) {
        Ok(facts) => return Some(facts),
        Err(e) => e.to_string(),
    };
    let finding = Finding::error("state-damaged", &path, why);
    match state::read(&house.state.join(state::OLD_FILE)) {
        Ok(old) => {
            // what was given since is not known: two blocks further on is safe
            let next = old.fid_next.saturating_add(2 * RESERVE);
            let facts = Facts { fid_next: next, clean: false, ..old };
            let fix = Fix::State(Box::new(facts.clone()));
            found.add(finding.mend(fix, "take its last version, and skip numbers to be safe"));
            Some(facts)
        }
        Err(_) => {
            found.add(finding.advise(match house.side {
                Side::Cache => {
                    "restore it from a backup, or copy the files that are needed out of \
                                tree/ and begin a new cache"
                }
                Side::Served => {
                    "restore it from a backup, with the volume_id that a client's \
                                 .imz/state.json has: clients know the volume by it"
                }
            }));
            None
        }
    }
}

pub(super) fn look(
    house: &House,
    facts: Option<&Facts>,
    journal: &Journal,
    seen: &Seen,
    found: &mut Found,
) -> Result<(), FsckError> {
    for name in TEMPORARY {
        let path = house.state.join(name);
        if path.symlink_metadata().is_ok() {
            let what = "it was left behind in the midst of a change";
            found.add(
                Finding::note("left-behind", &path, what).mend(
                    Fix::SetAside { path: path.clone(), relist: None },
                    "move it to lost+found",
                ),
            );
        }
    }
    if let Some(facts) = facts.filter(|facts| !facts.clean) {
        let what = format!("the last life of {} did not end cleanly", facts.volume);
        found.add(
            Finding::note("not-clean", house.state.join(state::FILE), what)
                .advise("the next start settles what was under way"),
        );
    }
    match house.side {
        Side::Cache => {
            writers(house, facts, found);
            figures(house, found);
        }
        Side::Served => {
            nodes(house, journal, seen, found);
            book(house, found);
            spool(house, found)?;
            conflicts(house, facts, found)?;
        }
    }
    Ok(())
}

fn writers(house: &House, facts: Option<&Facts>, found: &mut Found) {
    let path = house.journal.join("writers");
    let Ok(bytes) = fs::read(&path) else { return };
    let word = |nth: usize| {
        bytes.get(nth * 8..nth * 8 + 8).and_then(|it| it.try_into().ok()).map(u64::from_le_bytes)
    };
    let head = WRITERS_HEADER.len();
    let whole = bytes.len() == (head + WRITERS_MAX) * 8
        && (0..head).all(|nth| word(nth) == Some(WRITERS_HEADER[nth]));
    if !whole {
        let what = "it is no table of open files";
        found.add(Finding::error("writers-damaged", &path, what).mend(
            Fix::SetAside { path: path.clone(), relist: None },
            "move it to lost+found; files that were open when the process died are as the tree \
             has them, and are shipped when they are next changed",
        ));
        return;
    }
    let open = (head..head + WRITERS_MAX).filter(|nth| word(*nth) != Some(0)).count();
    if open > 0 {
        let clean = facts.is_some_and(|facts| facts.clean);
        let what = format!("{open} files were open for writing");
        let finding = Finding::note("writers-open", &path, what);
        found.add(finding.advise(match clean {
            true => "the next mount forgets them",
            false => "the next mount ships them as they are",
        }));
    }
}

fn nodes(house: &House, journal: &Journal, seen: &Seen, found: &mut Found) {
    let path = house.state.join("nodes.json");
    let last = journal.survey.as_ref().map_or(Seq(0), |survey| survey.last);
    let nodes = match Nodes::open(&house.state) {
        Ok(nodes) => nodes,
        Err(e) => {
            let highest = journal.origins.keys().copied().max().unwrap_or(0);
            let next = highest.max(seen.node_max) + 1;
            found.add(Finding::error("nodes-damaged", &path, e.to_string()).mend(
                Fix::Nodes { next },
                "begin a new table; each client keeps its number when it says it, and offers what \
                 is in its journal once more",
            ));
            return;
        }
    };
    if nodes.as_of() > last {
        let what =
            format!("it is as of record {}, and the journal ends with {}", nodes.as_of().0, last.0);
        found.add(
            Finding::error("nodes-ahead", &path, what)
                .mend(Fix::Journal, "go on behind that number"),
        );
    }
    let mut numbers: Vec<u32> = nodes.all().iter().map(|node| node.number).collect();
    numbers.sort_unstable();
    if let Some(twice) = numbers.windows(2).find(|pair| pair[0] == pair[1]) {
        let what = format!("two clients have the number {}", twice[0]);
        found.add(
            Finding::error("nodes-twice", &path, what)
                .advise("restore the file from a backup: changes of the two cannot be told apart"),
        );
    }
    for node in nodes.all().iter().filter(|node| node.last > node.seen.max(node.last)) {
        let what = format!("client {} ({}) is said to be ahead of itself", node.number, node.host);
        found.add(Finding::warning("nodes-odd", &path, what));
    }
}

/// What clients were granted.
fn book(house: &House, found: &mut Found) {
    let file = BookFile::of(&house.state);
    let set_aside = || Fix::SetAside { path: file.path().to_owned(), relist: None };
    match file.load() {
        Ok(book) => {
            if let Some(what) = book.and_then(|book| book.oddity()) {
                found.add(Finding::warning("grants-odd", file.path(), what).advise(
                    "nothing is granted twice for that; move it away while nothing pends at any \
                     client, and all begin anew",
                ));
            }
        }
        Err(e) => {
            let what = format!("what clients were granted is not known: {e}");
            found.add(Finding::error("grants-damaged", file.path(), what).mend(
                set_aside(),
                "move it to lost+found: the next start begins a new book, and clients ask for what \
                 they need when they come; until then others may take the room that a client which \
                 is away counts on",
            ));
        }
    }
}

/// What this cache was granted.
fn figures(house: &House, found: &mut Found) {
    let file = FiguresFile::of(&house.state);
    if let Err(e) = file.load() {
        let what = format!("what the server granted is not known: {e}");
        found.add(Finding::warning("room-damaged", file.path(), what).mend(
            Fix::SetAside { path: file.path().to_owned(), relist: None },
            "move it to lost+found: the next mount asks the server, and writes nothing new before \
             it is there",
        ));
    }
}

fn spool(house: &House, found: &mut Found) -> Result<(), FsckError> {
    let dir = house.dir.join(".imz/spool");
    let Ok(entries) = fs::read_dir(&dir) else { return Ok(()) };
    for entry in entries {
        let entry = entry.map_err(io(&dir))?;
        if entry.file_name() != "lock" {
            found.add(
                Finding::note("spool", entry.path(), "contents that were on their way in")
                    .advise("the next start removes it: the client sends it again"),
            );
        }
    }
    Ok(())
}

/// Every version that lost must be there whole.
fn conflicts(house: &House, facts: Option<&Facts>, found: &mut Found) -> Result<(), FsckError> {
    let dir = house.tree.join(String::from_utf8_lossy(CONFLICTS_NAME).as_ref());
    let Ok(entries) = fs::read_dir(&dir) else { return Ok(()) };
    for entry in entries {
        let entry = entry.map_err(io(&dir))?;
        let path = entry.path();
        // one that was decided, and is being removed
        if entry.file_name().as_encoded_bytes().starts_with(b".gone-") {
            continue;
        }
        let clean = facts.is_some_and(|facts| facts.clean);
        match conflict(&path) {
            Ok(()) => {}
            Err(_) if !clean && !path.join("record.json").exists() => found.add(
                Finding::note("conflict-half", &path, "it was being kept when the server ended")
                    .advise("the client sends it again"),
            ),
            Err(why) => found
                .add(Finding::error("conflict-damaged", &path, why).advise(
                    "what is left of this version is in the directory: take it from there",
                )),
        }
    }
    Ok(())
}

fn conflict(path: &Path) -> Result<(), String> {
    let read = |name: &str| {
        let file = path.join(name);
        let len = file.metadata().map_err(|e| format!("{name}: {e}"))?.len();
        if len > RECORD_LEN_MAX {
            return Err(format!("{name} has {len} bytes"));
        }
        fs::read(&file).map_err(|e| format!("{name}: {e}"))
    };
    let told = read("record.json")?;
    serde_json::from_slice::<serde_json::Value>(&told).map_err(|e| format!("record.json: {e}"))?;
    // the first one, and those of the same client that it takes along
    for entry in fs::read_dir(path).map_err(|e| e.to_string())? {
        let name = entry.map_err(|e| e.to_string())?.file_name();
        let name = name.to_string_lossy();
        if name == "record" || name.strip_prefix("record.").is_some_and(|it| it != "json") {
            decode_wire(&read(&name)?).map_err(|e| format!("{name}: {e}"))?;
        }
    }
    let (_, record) = decode_wire(&read("record")?).map_err(|e| format!("record: {e}"))?;
    // of a file that was removed before its contents could be sent there are none
    let is_store = matches!(record.op, Op::Store { size, .. } if size > 0);
    match path.join("data").metadata() {
        Err(e) if is_store && e.kind() != std::io::ErrorKind::NotFound => Err(format!("data: {e}")),
        _ => Ok(()),
    }
}
