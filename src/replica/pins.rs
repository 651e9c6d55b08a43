//! Pins: paths of the volume whose objects are kept whole in the cache, also while nobody reads them.
//!
//! `pins.json` in the state directory, replaced by rename after an fsync. A pin is of a path, not
//! of an object: what stands there is kept, also after a program has put a new file in the place of
//! the old one. Paths are bytes, kept as hexadecimal digits; the readable form beside them is for
//! people. A file that cannot be read counts as empty, and says so: nothing is lost by it but room
//! for what was pinned.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

const FILE: &str = "pins.json";
/// Most pins of one cache.
pub const PINS_MAX: usize = 1024;
/// Longer than any file of so many pins.
const LEN_MAX: u64 = 64 << 20;

/// One pin.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pin {
    /// from the volume's root, without a slash at its ends; empty is the root
    pub path: Vec<u8>,
    /// higher ones are fetched first
    pub priority: u8,
}

#[derive(Serialize, Deserialize)]
struct Line {
    path: String,
    readable: String,
    priority: u8,
}

pub struct Pins {
    file: PathBuf,
    pins: Mutex<Vec<Pin>>,
}

/// Bytes as hexadecimal digits.
pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `None`: these are not pairs of hexadecimal digits.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let pairs = text.as_bytes().chunks(2);
    pairs
        .map(|pair| match *pair {
            [high, low] => Some((digit(high)? << 4 | digit(low)?) as u8),
            _ => None,
        })
        .collect()
}

impl Pins {
    /// Those that the state directory names.
    pub fn open(state_dir: &Path) -> Pins {
        let file = state_dir.join(FILE);
        let pins = match read(&file) {
            Ok(pins) => pins,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(e) => {
                log::warn!("{}: {e}; nothing is pinned (imz pin does it anew)", file.display());
                Vec::new()
            }
        };
        Pins { file, pins: Mutex::new(pins) }
    }

    /// All, the most important first.
    pub fn all(&self) -> Vec<Pin> {
        let mut all = self.held().clone();
        all.sort_by_key(|pin| std::cmp::Reverse(pin.priority));
        all
    }

    /// Whether the path is pinned, or lies below one that is.
    pub fn covers(&self, path: &[u8]) -> bool {
        self.held().iter().any(|pin| lies_in(path, &pin.path))
    }

    pub fn is_empty(&self) -> bool {
        self.held().is_empty()
    }

    /// Pins a path, or gives its pin another priority. Durable on return: yes.
    ///
    /// # Errors
    /// As of the file system; `QuotaExceeded` when there are [`PINS_MAX`] already.
    pub fn add(&self, path: &[u8], priority: u8) -> io::Result<()> {
        let mut pins = self.held();
        let mut new = pins.clone();
        new.retain(|pin| pin.path != path);
        if new.len() >= PINS_MAX {
            let what = format!("a cache has at most {PINS_MAX} pins");
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, what));
        }
        new.push(Pin { path: path.to_vec(), priority });
        self.write(&new)?;
        *pins = new;
        Ok(())
    }

    /// False: it was not pinned. Durable on return: yes.
    ///
    /// # Errors
    /// As of the file system.
    pub fn remove(&self, path: &[u8]) -> io::Result<bool> {
        let mut pins = self.held();
        let new: Vec<Pin> = pins.iter().filter(|pin| pin.path != path).cloned().collect();
        if new.len() == pins.len() {
            return Ok(false);
        }
        self.write(&new)?;
        *pins = new;
        Ok(true)
    }

    fn write(&self, pins: &[Pin]) -> io::Result<()> {
        let line = |pin: &Pin| Line {
            path: to_hex(&pin.path),
            readable: String::from_utf8_lossy(&pin.path).into_owned(),
            priority: pin.priority,
        };
        let lines: Vec<Line> = pins.iter().map(line).collect();
        let fresh = self.file.with_extension("json.new");
        let mut file = File::create(&fresh)?;
        file.write_all(&serde_json::to_vec_pretty(&lines)?)?;
        file.sync_all()?;
        fs::rename(&fresh, &self.file)?;
        crate::sys::file::sync_dir(self.file.parent().unwrap_or(Path::new("/")))
    }

    fn held(&self) -> MutexGuard<'_, Vec<Pin>> {
        // Replaced whole.
        self.pins.lock().unwrap_or_else(|e| e.into_inner())
    }
}

fn read(file: &Path) -> io::Result<Vec<Pin>> {
    if fs::metadata(file)?.len() > LEN_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let lines: Vec<Line> = serde_json::from_slice(&fs::read(file)?)?;
    let pin = |line: &Line| Some(Pin { path: from_hex(&line.path)?, priority: line.priority });
    let pins: Option<Vec<Pin>> = lines.iter().take(PINS_MAX).map(pin).collect();
    pins.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Whether `path` is `top` or lies below it.
fn lies_in(path: &[u8], top: &[u8]) -> bool {
    match path.strip_prefix(top) {
        Some([]) => true,
        Some(rest) => top.is_empty() || rest[0] == b'/',
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_are_kept_in_order_and_survive() {
        let dir = tempfile::tempdir().unwrap();
        let pins = Pins::open(dir.path());
        assert!(pins.is_empty() && !pins.covers(b""));
        pins.add(b"a/b", 1).unwrap();
        pins.add(b"\xff odd", 9).unwrap();
        pins.add(b"a/b", 5).unwrap();
        let pin = |path: &[u8], priority| Pin { path: path.to_vec(), priority };
        assert_eq!(Pins::open(dir.path()).all(), [pin(b"\xff odd", 9), pin(b"a/b", 5)]);
        for (path, want) in [
            (&b"a/b"[..], true),
            (b"a/b/c", true),
            (b"a/bc", false),
            (b"a", false),
            (b"\xff odd/x", true),
        ] {
            assert_eq!(pins.covers(path), want, "{}", path.escape_ascii());
        }
        assert!(pins.remove(b"a/b").unwrap() && !pins.remove(b"a/b").unwrap());
        assert_eq!(Pins::open(dir.path()).all(), [pin(b"\xff odd", 9)]);
        pins.add(b"", 0).unwrap();
        assert!(pins.covers(b"anything") && pins.covers(b""));
    }

    #[test]
    fn damage_is_no_pin_and_too_many_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for damage in ["", "[", "[{\"path\":\"6\",\"readable\":\"\",\"priority\":0}]", "{}"] {
            fs::write(dir.path().join(FILE), damage).unwrap();
            assert!(Pins::open(dir.path()).is_empty(), "{damage}");
        }
        fs::remove_file(dir.path().join(FILE)).unwrap();
        let pins = Pins::open(dir.path());
        *pins.held() = vec![Pin { path: vec![b'x'], priority: 0 }; PINS_MAX];
        assert!(pins.add(b"one more", 0).is_err());
    }

    #[test]
    fn names_are_bytes() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(from_hex(&to_hex(&all)), Some(all));
        for bad in ["0", "0g", "+1", "\u{e9}0"] {
            assert_eq!(from_hex(bad), None, "{bad}");
        }
    }
}
