//! Crash points: named places where a test lets the process die, as by SIGKILL from outside.
//!
//! ```text
//!   IMZ_CRASH_AT=NAME[:NTH]    die at the NTH time that the place is passed (1 if not told)
//! ```
//!
//! Without the feature `crash-points`, which is how imz is built, a point is nothing at all.
//! tests/crash_points.rs goes through [`POINTS`], dies at each, and recovers; a test here holds the
//! list to the sources. A point stands right behind the step that its name tells.

/// On which side a point is passed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    Client,
    Server,
    /// in what both sides run
    Both,
}

/// Every point there is.
pub const POINTS: &[(&str, Side)] = &[
    ("log-appended", Side::Both),
    ("log-settled", Side::Both),
    ("log-synced", Side::Both),
    ("log-segment-made", Side::Both),
    ("log-segment-named", Side::Both),
    ("log-extended", Side::Both),
    ("log-trimmed", Side::Client),
    ("cursor-written", Side::Both),
    ("state-written", Side::Both),
    ("state-named", Side::Both),
    ("index-written", Side::Both),
    ("index-durable", Side::Both),
    ("tree-made", Side::Both),
    ("tree-labelled", Side::Both),
    ("tree-renamed", Side::Both),
    ("tree-unlinked", Side::Both),
    ("tree-cut", Side::Both),
    ("change-journaled", Side::Client),
    ("change-done", Side::Client),
    ("change-settled", Side::Client),
    ("store-begun", Side::Client),
    ("store-journaled", Side::Client),
    ("fsync-data", Side::Client),
    ("fsync-names", Side::Client),
    ("ship-journal", Side::Client),
    ("ship-tree", Side::Client),
    ("ship-cut", Side::Client),
    ("keep-index", Side::Client),
    ("keep-tree", Side::Client),
    ("keep-cursors", Side::Client),
    ("acked-stamps", Side::Client),
    ("hydrate-labelled", Side::Client),
    ("hydrate-cut", Side::Client),
    ("hydrate-written", Side::Client),
    ("hydrate-noted", Side::Client),
    ("merge-stub-made", Side::Client),
    ("merge-moved", Side::Client),
    ("limbo-taken", Side::Client),
    ("recover-settled", Side::Both),
    ("power-redone", Side::Client),
    ("power-journaled", Side::Client),
    ("apply-certified", Side::Server),
    ("apply-journaled", Side::Server),
    ("apply-done", Side::Server),
    ("apply-settled", Side::Server),
    ("apply-stamped", Side::Server),
    ("spool-kept", Side::Server),
    ("store-dressed", Side::Server),
    ("store-renamed", Side::Server),
    ("store-swapped", Side::Server),
    ("sync-journal", Side::Server),
    ("sync-tree", Side::Server),
    ("sync-cursor", Side::Server),
    ("sync-told", Side::Server),
    ("nodes-written", Side::Server),
    ("nodes-named", Side::Server),
    ("conflict-record", Side::Server),
    ("conflict-data", Side::Server),
];

/// Dies here, if a test wants it.
#[cfg(not(feature = "crash-points"))]
#[inline(always)]
pub const fn point(_name: &str) {}

/// Dies here, if a test wants it.
#[cfg(feature = "crash-points")]
pub fn point(name: &str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicI64, Ordering};
    static AT: OnceLock<Option<(String, AtomicI64)>> = OnceLock::new();
    let at = AT.get_or_init(|| {
        let wish = std::env::var("IMZ_CRASH_AT").ok()?;
        let (name, nth) = wish.split_once(':').unwrap_or((&wish, "1"));
        Some((name.to_owned(), AtomicI64::new(nth.parse().ok()?)))
    });
    if let Some((wanted, left)) = at
        && wanted == name
        && left.fetch_sub(1, Ordering::SeqCst) == 1
    {
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        loop {
            std::thread::park(); // it is on its way
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;

    fn count_in(dir: &Path, counts: &mut BTreeMap<String, usize>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                count_in(&path, counts);
            } else {
                let text = std::fs::read_to_string(&path).unwrap();
                for rest in text.split("crash::point(\"").skip(1) {
                    let name = rest.split('"').next().unwrap();
                    *counts.entry(name.to_owned()).or_default() += 1;
                }
            }
        }
    }

    #[test]
    fn the_list_is_what_the_sources_name() {
        let mut counts = BTreeMap::new();
        count_in(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut counts);
        let mut named: Vec<&str> = counts.keys().map(String::as_str).collect();
        let mut listed: Vec<&str> = POINTS.iter().map(|(name, _)| *name).collect();
        named.sort_unstable();
        listed.sort_unstable();
        assert_eq!(named, listed);
    }
}
