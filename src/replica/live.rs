//! Which clients may still think that they may read and change: a server that starts again waits
//! for them, as long as their lease.
//!
//! One file of numbers, a line each, put in place by a rename. Not synced: a machine that lost its
//! power is away for longer than a lease. A file that cannot be read counts as empty, and says so.

use std::io;
use std::path::{Path, PathBuf};

const FILE: &str = "live";
/// Longer than any list of clients that a server takes.
const LEN_MAX: u64 = 1 << 20;

pub struct Live(PathBuf);

impl Live {
    pub fn of(state_dir: &Path) -> Live {
        Live(state_dir.join(FILE))
    }
    /// The clients' numbers, as they were last kept.
    pub fn read(&self) -> Vec<u32> {
        match self.try_read() {
            Ok(nodes) => nodes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(e) => {
                log::warn!("{}: {e}; no client is waited for", self.0.display());
                Vec::new()
            }
        }
    }
    fn try_read(&self) -> io::Result<Vec<u32>> {
        if std::fs::metadata(&self.0)?.len() > LEN_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let text = std::fs::read_to_string(&self.0)?;
        let number = |line: &str| line.parse().map_err(|_| io::ErrorKind::InvalidData.into());
        text.lines().map(number).collect()
    }
    /// Durable on return: against the death of the process, not of the machine.
    ///
    /// # Errors
    /// As write(2) and rename(2).
    pub fn keep(&self, nodes: &[u32]) -> io::Result<()> {
        let text: String = nodes.iter().map(|node| format!("{node}\n")).collect();
        let new = self.0.with_extension("new");
        std::fs::write(&new, text)?;
        std::fs::rename(new, &self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_and_damage_is_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let live = Live::of(dir.path());
        assert!(live.read().is_empty());
        live.keep(&[3, 70_000]).unwrap();
        assert_eq!(live.read(), [3, 70_000]);
        for damage in ["3\nx\n", "4294967296\n", "\n"] {
            std::fs::write(dir.path().join(FILE), damage).unwrap();
            assert!(live.read().is_empty(), "{damage:?}");
        }
    }
}
