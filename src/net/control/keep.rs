//! What a mount is asked about its cache: pins and eviction. See control.rs for the socket.
//!
//! Paths are those of the volume, from its root, without slashes at the ends, and travel as
//! hexadecimal digits: names are bytes.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{ControlError, Request, ask};

/// What may be asked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
pub enum Wish {
    /// keep the path whole; answered with [`Done`]
    Pin { path: String, priority: u8 },
    /// no more; answered with [`Done`]
    Unpin { path: String },
    /// answered with [`Pinned`]
    Pins,
    /// evict the path and what is below it; answered with [`Begun`]
    Evict { path: String },
    /// what became of that; answered with [`Evicted`]
    Evicted { number: u64 },
}

/// It is done.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Done {
    /// for `Unpin`: there was such a pin
    pub was: bool,
}

/// It goes on under this number.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Begun {
    pub number: u64,
}

/// All pins, the most important first.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Pinned {
    pub pins: Vec<PinState>,
}

/// One pin. Sizes are bytes.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PinState {
    /// for people
    pub path: String,
    pub path_hex: String,
    pub priority: u8,
    /// new, fetching, whole, away, absent or failed
    pub state: String,
    /// why it failed
    pub error: Option<String>,
    pub objects: u64,
    pub bytes: u64,
    pub missing_files: u64,
    pub missing_bytes: u64,
}

/// What an eviction came to, so far.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Evicted {
    pub done: bool,
    pub files: u64,
    pub bytes: u64,
    /// files that keep their data, and the first of them with the reasons
    pub kept: u64,
    pub named: Vec<(String, String)>,
}

fn asked<T: serde::de::DeserializeOwned>(socket: &Path, wish: Wish) -> Result<T, ControlError> {
    let answer = ask(socket, Request::Keep { wish })?;
    serde_json::from_value(answer).map_err(|_| ControlError::Garbled)
}

/// # Errors
/// [`ControlError`].
pub fn pin(socket: &Path, path: String, priority: u8) -> Result<(), ControlError> {
    asked::<Done>(socket, Wish::Pin { path, priority }).map(drop)
}

/// False: it was not pinned.
///
/// # Errors
/// [`ControlError`].
pub fn unpin(socket: &Path, path: String) -> Result<bool, ControlError> {
    Ok(asked::<Done>(socket, Wish::Unpin { path })?.was)
}

/// # Errors
/// [`ControlError`].
pub fn pins(socket: &Path) -> Result<Vec<PinState>, ControlError> {
    Ok(asked::<Pinned>(socket, Wish::Pins)?.pins)
}

/// Begins an eviction; its number.
///
/// # Errors
/// [`ControlError`].
pub fn evict(socket: &Path, path: String) -> Result<u64, ControlError> {
    Ok(asked::<Begun>(socket, Wish::Evict { path })?.number)
}

/// # Errors
/// [`ControlError`].
pub fn evicted(socket: &Path, number: u64) -> Result<Evicted, ControlError> {
    asked(socket, Wish::Evicted { number })
}
