//! Questions about conflicts, and decisions, on their way from a control socket to a volume.
//!
//! `imz conflicts` asks the process of a mount or of a server; a mount hands the question on to its
//! server. Here each is put in the terms of the next: JSON, message, call. What people are told of
//! a conflict is JSON from the volume on.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::kml::record::Stamp;
use crate::lento::message::{
    self, Conflict, ConflictPage, ConflictRead, Conflicts, Data, Failed, Message, Resolve,
};
use crate::replica::resolve::{self, Side};
use crate::replica::volume::{self, Volume};

/// Longest wait for an answer: others may have to be told first, each within ten seconds.
pub const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);
/// Largest piece of contents in one answer, bytes; it travels in hexadecimal digits.
pub const PIECE_LEN_MAX: u32 = 256 << 10;

/// One question, as the control socket takes it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
pub enum Ask {
    /// a page of those behind `after`
    List {
        after: String,
    },
    /// a piece of the preserved version, or else of the tree's
    Read {
        id: String,
        mine: bool,
        at: u64,
        len: u32,
    },
    Resolve {
        id: String,
        choice: Choice,
        stamp: Option<u64>,
    },
}

/// What becomes of a preserved version.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    Mine,
    Theirs,
    Both,
    Keep(String),
}

impl From<Ask> for Message {
    fn from(ask: Ask) -> Message {
        match ask {
            Ask::List { after } => Conflicts { after }.into(),
            Ask::Read { id, mine, at, len } => {
                ConflictRead { id, mine, at, len: len.clamp(1, PIECE_LEN_MAX) }.into()
            }
            Ask::Resolve { id, choice, stamp } => {
                let choice = match choice {
                    Choice::Mine => message::Choice::Mine,
                    Choice::Theirs => message::Choice::Theirs,
                    Choice::Both => message::Choice::Both,
                    Choice::Keep(path) => message::Choice::Keep(path.into_bytes()),
                };
                Resolve { id, choice, stamp: stamp.map(Stamp) }.into()
            }
        }
    }
}

/// The answer for the control socket.
///
/// # Errors
/// The text of a failure.
pub fn told(answer: Result<Message, Failed>) -> Result<Value, String> {
    match answer {
        Ok(Message::ConflictPage(page)) => {
            let told = |it: Conflict| -> Value {
                serde_json::from_str(&it.told).unwrap_or_else(|_| json!({ "id": it.id }))
            };
            let all: Vec<Value> = page.conflicts.into_iter().map(told).collect();
            Ok(json!({ "conflicts": all, "more": page.more }))
        }
        Ok(Message::Data(data)) => {
            let digits: String = data.bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            Ok(json!({ "hex": digits, "size": data.size }))
        }
        Ok(Message::Resolved(done)) => Ok(json!({ "done": done.what })),
        Ok(_) => Err("the server's answer makes no sense".to_owned()),
        Err(failed) => Err(failed.what),
    }
}

/// Answers a list or a piece from the volume; what else there is goes through the machine.
pub(super) fn answer(volume: &mut Volume, request: &Message) -> volume::Result<Option<Message>> {
    Ok(match request {
        Message::Conflicts(ask) => {
            let (page, more) = volume.list_conflicts(&ask.after)?;
            let conflict = |it: resolve::Listed| Conflict { id: it.id, told: it.told };
            let conflicts = page.into_iter().map(conflict).collect();
            Some(ConflictPage { conflicts, more }.into())
        }
        Message::ConflictRead(ask) => {
            let side = if ask.mine { Side::Mine } else { Side::Theirs };
            let piece = volume.read_conflict(&ask.id, side, ask.at, ask.len)?;
            let (bytes, size, token) = (piece.bytes, piece.size, piece.token);
            Some(Data { at: ask.at, bytes, size, token }.into())
        }
        _ => None,
    })
}

/// What a decision of a message means to a volume.
pub(super) fn choice(of: &message::Choice) -> resolve::Choice {
    match of {
        message::Choice::Mine => resolve::Choice::Mine,
        message::Choice::Theirs => resolve::Choice::Theirs,
        message::Choice::Both => resolve::Choice::Both,
        message::Choice::Keep(path) => resolve::Choice::Keep(path.clone()),
    }
}
