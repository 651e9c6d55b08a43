//! The house: which room may name which, and which file alone names each door.

#![allow(clippy::unwrap_used)] // here it is the message

use std::fs;
use std::path::{Path, PathBuf};

/// Rooms from the top down: each may name those after it, and those of its own step.
const STEPS: [&[&str]; 6] =
    [&["modes"], &["presto", "net"], &["lento", "replica"], &["kml"], &["sys"], &["cli"]];
/// Pairs of one step that may name each other nevertheless: none but these.
const ALSO: [(&str, &str); 1] = [("modes", "cli")];
/// Crates and the only places whose sources may name them.
const DOORS: [(&str, &[&str]); 9] = [
    ("toml_edit", &["src/modes/serve/config.rs"]),
    ("io_uring", &["src/sys/ring.rs"]),
    ("mio", &["src/net/poll.rs"]),
    ("signal_hook", &["src/net/poll.rs"]),
    ("memmap2", &["src/kml/map.rs"]),
    ("rustix", &["src/sys/"]),
    ("libc", &["src/sys/"]),
    ("redb", &["src/replica/index.rs", "src/replica/index/"]),
    ("clap", &["src/cli.rs", "src/cli/", "src/main.rs"]),
];
/// What a state machine cannot name: files, sockets, the clock.
const NOT_IN_LENTO: [&str; 6] =
    ["std::fs", "std::net", "std::os", "SystemTime::now", "Instant::now", "std::thread"];

fn sources(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

/// Every source with its path from the top, and its code without comments and unit tests.
fn code() -> Vec<(String, String)> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    sources(&top.join("src"), &mut paths);
    assert!(paths.len() > 40, "the sources were not found");
    let tests = |name: &str| name.ends_with("/tests.rs") || name.contains("/tests/");
    let mut all = Vec::new();
    for path in paths {
        let name = path.strip_prefix(top).unwrap().to_str().unwrap().to_owned();
        if tests(&name) {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        let uncommented: Vec<&str> =
            text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        all.push((name, uncommented.join("\n")));
    }
    all
}

/// The room of a source, if it stands in one.
fn room(name: &str) -> Option<&str> {
    let rest = name.strip_prefix("src/")?;
    Some(rest.split(['/', '.']).next().unwrap())
}

fn step(room: &str) -> Option<usize> {
    STEPS.iter().position(|rooms| rooms.contains(&room))
}

/// True if `word` stands in `text` as a path's first part or as one of its parts.
fn names(text: &str, word: &str) -> bool {
    text.match_indices(word).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = text[at + word.len()..].chars().next();
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':' || c == '.')
            && after == Some(':')
    })
}

#[test]
fn dependencies_run_one_way() {
    let mut wrong = Vec::new();
    for (name, text) in code() {
        let Some(from) = room(&name).filter(|room| step(room).is_some()) else { continue };
        for to in STEPS.iter().copied().flatten().copied().filter(|to| *to != from) {
            let down = step(to) > step(from);
            let allowed = down && to != "cli" || ALSO.contains(&(from, to));
            if !allowed && text.contains(&format!("crate::{to}::")) {
                wrong.push(format!("{name} names {to}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn modes_never_name_each_other() {
    // what several of them share stands beside them
    let shared = ["place", "ship", "explain", "journal"];
    let modes = [
        "mount",
        "serve",
        "status",
        "sync",
        "umount",
        "replay",
        "kml",
        "inspect",
        "fsck",
        "pin",
        "unpin",
        "evict",
        "conflicts",
        "volume",
    ];
    let mut wrong = Vec::new();
    for (name, text) in code() {
        let Some(rest) = name.strip_prefix("src/modes/") else { continue };
        let own = rest.split(['/', '.']).next().unwrap();
        if own == "mod" || shared.contains(&own) {
            continue;
        }
        for other in modes.iter().filter(|other| **other != own) {
            let (up, full) = (format!("super::{other}::"), format!("crate::modes::{other}::"));
            if text.contains(&up) || text.contains(&full) {
                wrong.push(format!("{name} names {other}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn each_door_stands_in_one_place() {
    let mut wrong = Vec::new();
    let mut seen = [false; DOORS.len()];
    for (name, text) in code() {
        for (nth, (door, places)) in DOORS.iter().enumerate() {
            if names(&text, door) {
                seen[nth] = true;
                if !places.iter().any(|place| name.starts_with(place)) {
                    wrong.push(format!("{name} names {door}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(seen, [true; DOORS.len()], "a door that nobody names is not one");
}

#[test]
fn lento_has_no_file_no_socket_and_no_clock() {
    let mut wrong = Vec::new();
    for (name, text) in code().iter().filter(|(name, _)| room(name) == Some("lento")) {
        for word in NOT_IN_LENTO.iter().filter(|word| text.contains(**word)) {
            wrong.push(format!("{name} names {word}"));
        }
        for line in text.lines().filter(|line| line.contains("crate::kml::")) {
            if !line.contains("crate::kml::record") && !line.contains("crate::kml::codec") {
                wrong.push(format!("{name}: {line}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn unsafe_code_stands_where_the_kernel_is() {
    let mut wrong = Vec::new();
    for (name, text) in code() {
        if text.contains("unsafe ") && !name.starts_with("src/sys/") && name != "src/kml/map.rs" {
            wrong.push(name);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn sources_are_ascii_and_no_file_is_a_heap() {
    let mut wrong = Vec::new();
    for (name, text) in code() {
        if !text.is_ascii() {
            wrong.push(format!("{name} is not ASCII"));
        }
        let count = text.lines().count();
        if count > 900 {
            wrong.push(format!("{name} has {count} lines of code"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
